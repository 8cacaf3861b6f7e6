"""What makes a training step fast and keeps it small: the compiler and the allocator."""

from __future__ import annotations

import copy
import ctypes
import logging
import sys
import warnings
from collections.abc import Collection
from contextlib import contextmanager

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import Tensor, compile, nn
from torch.func import functional_call

from tiny_cifar10_net import NetCIFAR10_Tiny

__all__ = ["CompiledNetwork", "Memory", "MixedPrecision", "merged", "peak_memory"]

PROGRAMS = 128  # one for each size of the pictures, in all runs of a process


class CompiledNetwork:
    """A network called through torch.compile, for batches of the shapes that are worth it.

    Each shape is compiled anew, which takes as long as some thousand steps save: so for whole
    batches only, and only of the sides named. All others, such as the last batch of an epoch, run
    as they are, and so does everything in eval mode, and everything where there is no compiler,
    after a warning. Both ways give the same sums but for their last digits.

    Args:
        model: a network of (N, 3, side, side) batches, on its device already, since what is
            compiled works on the tensors it has now; they stay its own.
        batch_size: N of a whole batch.
        sides: the sides, in pixels, that are compiled.
        precision: in which a NetCIFAR10_Tiny trains, compiled or not; in eval mode it is the
            parameters' own.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        sides: Collection[int],
        precision: torch.dtype = torch.float32,
    ):
        self.model, self.batch_size, self.sides = model, batch_size, set(sides)
        # It warns of a CUDA toolkit without a GPU, which is of no concern here.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        on_cpu = next(model.parameters()).device.type == "cpu"
        fast = merged(model) if on_cpu and _norms_before_relus(model) else model
        self.plain = model
        if precision != torch.float32:
            self.plain = MixedPrecision(model, precision)
            fast = MixedPrecision(fast, precision)
        # One shape, one program: with shapes left open, torch 2.12 fails on the dilated layers.
        self.program = compile(fast, dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        if not self.model.training:
            return self.model(images)
        if len(images) != self.batch_size or images.shape[-1] not in self.sides:
            return self.plain(images)
        try:
            with _compiling():
                return self.program(images)
        except Exception as error:
            # A fault of the network's own shows again in the plain call.
            output = self.plain(images)
            self.sides = set()
            warnings.warn(
                f"torch.compile failed ({_reason(error)}): training goes on without, more slowly",
                stacklevel=2,
            )
            return output


@contextmanager
def _compiling():
    """The compiler's settings as they have to be here; the caller's own programs keep theirs."""
    # All networks of a process share a list of programs, which by default holds eight and then is
    # no longer added to, without a word.
    programs = torch._dynamo.config.patch(
        recompile_limit=PROGRAMS, fail_on_recompile_limit_hit=True
    )
    # The backward pass with the forward: what fails, fails here, where it can be helped.
    backward = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    with programs, backward:
        yield


def _reason(error: Exception) -> str:
    """What went wrong, in a line; torch's own message is a page."""
    if " " in torch.__file__:
        return "it can't from an environment whose path has a space in it"
    lines = [line.strip() for line in str(error).splitlines() if "rror" in line or "No " in line]
    return lines[0] if lines else type(error).__name__


def _norms_before_relus(model: nn.Module) -> bool:
    """Whether each BatchNorm is followed by a ReLU, as far as their order in the network tells."""
    kinds = [type(m) for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.ReLU, nn.SiLU))]
    if isinstance(model, NetCIFAR10_Tiny):
        return True
    return kinds[::2] == [nn.BatchNorm2d] * len(kinds[::2]) and set(kinds[1::2]) == {nn.ReLU}


def merged(model: nn.Module) -> nn.Module:
    """The same network for training, of the same parameters and buffers, each BatchNorm and the
    ReLU that follows it in one step, as the compiler makes best use of them on a CPU.

    Args:
        model: a network whose every BatchNorm is followed by a ReLU, and every ReLU follows one,
            as in `NetCIFAR10_Tiny`.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=tensors).train()
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, _NormReLU(child))
            elif isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Identity())
    return twin


class MixedPrecision(nn.Module):
    """A network that trains in another precision than its parameters have.

    The pictures, all that passes between layers, the weights of convolutions as they are used, and
    the gradients of all these are rounded. The parameters, BatchNorm's sums, pool and head aren't
    (Micikevicius et al., 2018, arXiv:1710.03740; with bfloat16's exponents the loss needs no
    scaling). What is kept for the backward pass takes half the space; faster on a CPU with AVX-512
    BF16 or AMX.

    Args:
        model: takes batches (N, 3, H, W); its parameters and buffers are used as by a call of it.
    """

    def __init__(self, model: NetCIFAR10_Tiny, precision: torch.dtype):
        super().__init__()
        self.model, self.precision = model, precision
        self.rounded = [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim == 4 and not name.startswith("head")
        ]

    def forward(self, images: Tensor) -> Tensor:
        weights = {name: self.model.get_parameter(name).to(self.precision) for name in self.rounded}
        return functional_call(self.model, weights, (images.to(self.precision),))


class _NormReLU(nn.Module):
    """A BatchNorm in training, and a ReLU: the same numbers with fewer passes over memory.

    A net this small waits for memory. The compiler, left to itself, sums channel by channel,
    eight at a time, and so goes through all pictures as often as there are eights; and backward it
    reads the ReLU's output as well, only to see where that is zero.
    """

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm, count = self.norm, x.numel() // x.shape[1]
        y, mean, var = _NormReLUFunction.apply(
            x, norm.weight, norm.bias, norm.running_mean, norm.eps
        )
        with torch.no_grad():
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
            norm.num_batches_tracked.add_(1)
        return y


class _NormReLUFunction(torch.autograd.Function):
    """relu(weight (x - mean) / std + bias); also the mean and the variance, both (C,).

    x, which may be of lower precision than the rest, only rounds what is written to memory.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, guess: Tensor, eps: float):
        # About a guess at the mean, lest the squares' sum lose digits where the mean is hundreds of
        # standard deviations; in the first steps the guess is 0, and so, nearly, are the means.
        centred = x - _spread(guess)
        count = x.numel() // x.shape[1]
        offset = _sum(centred) / count
        # Rounding alone may take a constant channel's below 0, where there is no root.
        var = (_sum(centred * centred) / count - offset * offset).clamp(min=0)
        mean, scale = guess + offset, (var + eps).rsqrt()
        gain = weight * scale
        shift = bias - mean * gain
        ctx.save_for_backward(x, mean, scale, gain, shift)
        ctx.mark_non_differentiable(mean, var)
        y = (x * _spread(gain) + _spread(shift)).relu()
        return y.to(x.dtype), mean, var

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        x, mean, scale, gain, shift = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        grad = torch.where(x * _spread(gain) + _spread(shift) > 0, grad, 0).to(gain.dtype)
        grad_bias = _sum(grad)
        grad_weight = _sum(grad * (x - _spread(mean))) * scale
        # Ioffe and Szegedy (2015, arXiv:1502.03167), as a straight line in grad and x. Times 1/n:
        # the compiler does this for every pixel anew, and a division takes it much longer.
        slope = -gain * scale * grad_weight * (1 / count)
        constant = -gain * grad_bias * (1 / count) - mean * slope
        grad_x = grad * _spread(gain) + x * _spread(slope) + _spread(constant)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None


def _spread(channels: Tensor) -> Tensor:
    return channels.view(1, -1, 1, 1)


def _sum(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (C,): row by row first, which stay in the cache while all channels pass."""
    return x.sum(dim=3).sum(dim=(0, 2))


class Memory:
    """Has glibc keep large buffers that are freed, since the next step needs the same again.

    By default each goes back to the kernel, and every page of it is faulted in anew: measured, an
    eighth of a step. Elsewhere than on glibc nothing happens.
    """

    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

    def __init__(self):
        try:
            self.libc = ctypes.CDLL(None)
            # An older glibc takes no more than half of its largest heap.
            if any(self.libc.mallopt(self.M_MMAP_THRESHOLD, n) for n in (2_000_000_000, 2**25)):
                self.libc.mallopt(self.M_TRIM_THRESHOLD, 2_000_000_000)
        except (OSError, AttributeError, TypeError):
            self.libc = None

    def trim(self) -> None:
        """Give all of it back: between epochs, as buffers of another size would come on top."""
        if self.libc is not None:
            self.libc.malloc_trim(0)


def peak_memory() -> int | None:
    """The most that this process has held in memory so far, in MiB; None where nobody counts.

    Of a process that trains several runs, as a sweep's do, the most of all runs so far.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
