"""Training steps that take less time and memory, while the network itself stays unchanged.

`accelerated(model)` is a twin of a network for training on a CPU: it shares the parameters and
buffers, and computes the same values, some of them by faster code. `CompiledNetwork` runs it
through torch.compile where that pays.
"""

from __future__ import annotations

import copy
import ctypes
import logging
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, compile, nn
from torch.func import functional_call
from torch.nn.grad import conv2d_weight

PROGRAMS = 128  # one for each size of the images, in all runs of a process


class CompiledNetwork:
    """A network called through torch.compile, for batches of the shapes that are worth it.

    Each shape is compiled separately, which takes the time that is saved on some 50,000 images: so
    only whole batches are, and only of the sides named. All others, such as the last batch of
    an epoch, run eagerly, and so does everything, after a warning, if there is no compiler. Both
    ways give the same values up to rounding.

    Args:
        model: takes batches (N, 3, side, side). On its device already, since the compiled program
            shares the parameters and buffers that it has now; and in the mode, train or eval, in
            which it is to run.
        batch_size: N of a whole batch.
        sides: the sides, in pixels, that are compiled.
        precision: in which the network computes, compiled or not.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        sides: Collection[int],
        precision: torch.dtype = torch.float32,
    ):
        self.model, self.batch_size, self.sides = model, batch_size, set(sides)
        on_cpu = next(model.parameters()).device.type == "cpu"
        if on_cpu and precision == torch.bfloat16 and not computes_bfloat16():
            warnings.warn(
                "this CPU has no instructions for bfloat16: a step takes about ten times as long "
                'as in float32; use precision="float32"',
                stacklevel=4,  # the line that called train
            )

        def prepared(norms: bool) -> nn.Module:
            fast = accelerated(model, precision, norms) if on_cpu else model
            return fast if precision == torch.float32 else MixedPrecision(fast, precision)

        self.eager, self.program = prepared(norms=False), None
        if sides:  # the compiler takes seconds to import
            # It warns of a CUDA toolkit without a GPU, which is of no concern here.
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            # One shape, one program: with shapes left open, torch 2.12 fails on the dilated layers.
            self.program = compile(prepared(norms=True), dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        whole = len(images) == self.batch_size and images.shape[-1] in self.sides
        if self.program is None or not whole:
            return self.eager(images)
        try:
            with _compiling():
                return self.program(images)
        except Exception as error:
            # A fault of the network's own shows again in the eager call.
            output, self.sides = self.eager(images), set()
            warnings.warn(
                f"torch.compile failed ({_reason(error)}): training goes on without, more slowly",
                stacklevel=2,
            )
            return output


@contextmanager
def _compiling() -> Iterator[None]:
    """The compiler's settings as they have to be here; the caller's own programs keep theirs."""
    import torch._dynamo.config  # seconds: only where something is compiled
    import torch._functorch.config

    # All networks of a process share one cache of programs. By default it holds eight; after that
    # torch silently compiles no more.
    programs = torch._dynamo.config.patch(
        recompile_limit=PROGRAMS, fail_on_recompile_limit_hit=True
    )
    # Compile the backward pass with the forward, so that a failure is raised, and handled, here.
    backward = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    with programs, backward:
        yield


def _reason(error: Exception) -> str:
    """What went wrong, in a line; torch's own message is a page."""
    if " " in str(torch.__file__):
        return "it can't run from an environment whose path has a space in it"
    lines = [line.strip() for line in str(error).splitlines() if "rror" in line or "No " in line]
    return lines[0] if lines else type(error).__name__


# ---------------------------------------------------------------------------------------- the twin


def accelerated(
    model: nn.Module, precision: torch.dtype = torch.float32, norms: bool = True
) -> nn.Module:
    """A twin of `model` for training on a CPU, with the same parameters, buffers and mode.

    Depthwise convolutions for whose gradients torch has no fast code are replaced by ones with
    fast gradients; and where a ReLU follows each BatchNorm, each such pair by one `NormReLU`.

    Args:
        precision: what passes between the layers, see `MixedPrecision`.
        norms: False leaves the BatchNorms as they are: `NormReLU` is faster only when it is
            compiled.
    """
    twin = _copy_sharing_tensors(model)
    norms = norms and model.training and _a_relu_follows_each_norm(model)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d and is_depthwise(child):  # a subclass computes its own
                setattr(parent, name, _fast_depthwise(child, precision))
            elif norms and isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, NormReLU(child))
            elif norms and isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Identity())
    return twin


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether each of its filters sees one channel. (A network of one channel has none such.)"""
    return conv.groups == conv.in_channels > 1


def _copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """A deep copy, whose modules can be replaced, with the model's own parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def _a_relu_follows_each_norm(model: nn.Module) -> bool:
    """Whether each BatchNorm's output goes only into a ReLU, and each ReLU follows a BatchNorm.

    And whether all of these are what `NormReLU` computes: ordinary ones that are trained.
    """
    try:
        graph = torch.fx.Tracer().trace(model)
    except Exception:  # what depends on values can't be traced
        return False

    def kind(node: torch.fx.Node) -> type | None:
        called = node.op == "call_module"
        return type(model.get_submodule(str(node.target))) if called else None

    norms = [list(node.users) for node in graph.nodes if kind(node) is nn.BatchNorm2d]
    relus = [node for node in graph.nodes if kind(node) is nn.ReLU]
    followed = [users[0] for users in norms if len(users) == 1 and users[0] in relus]
    plain = all(
        type(m) is nn.BatchNorm2d
        and m.training  # not one that its network keeps frozen
        and m.affine
        and m.track_running_stats
        and m.momentum is not None
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d)
    )
    return plain and len(followed) == len(norms) == len(relus) > 0


def _fast_depthwise(conv: nn.Conv2d, precision: torch.dtype) -> nn.Module:
    (stride, _), (dilation, _) = conv.stride, conv.dilation
    side = conv.kernel_size[0]
    square = all(pair[0] == pair[1] for pair in (conv.stride, conv.dilation, conv.kernel_size))
    same = conv.padding == (side // 2 * dilation,) * 2 and conv.padding_mode == "zeros"
    plain = conv.in_channels == conv.out_channels and conv.bias is None
    if not (square and same and plain) or side not in (3, 5, 7):
        return conv
    needed = precision == torch.bfloat16 if dilation == 1 else stride == 1
    return FastDepthwise(conv) if needed else conv


class FastDepthwise(nn.Module):
    """A depthwise convolution, dilated, strided or neither, with a fast backward pass on a CPU.

    oneDNN, which torch uses there, has no fast code for a dilated one's gradients (measured, each
    takes five to twenty times as long as the forward pass), nor in bfloat16 for the gradient of a
    strided one's input (fifty times as long as in float32). But the input's gradient is a
    convolution of the output's gradient too, with the filter rotated by 180 degrees, and zeros
    between the pixels where there is a stride; the filter's gradient is that of an undilated
    convolution of the d² images made of every d-th pixel. In bfloat16 the former is twice as fast
    as oneDNN's own code even without dilation or stride. The latter is slow in bfloat16 for filters
    larger than 3x3 (some five times as slow as in float32), so it is computed in float32.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.stride, self.dilation = conv.weight, conv.stride[0], conv.dilation[0]

    def forward(self, x: Tensor) -> Tensor:
        return _Depthwise.apply(x, self.weight, self.stride, self.dilation)


class _Depthwise(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func, e.g. gradients image by image

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
        padding = weight.shape[2] // 2 * dilation
        return F.conv2d(x, weight, None, stride, padding, dilation, x.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, ctx.stride, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x, weight), s, d = ctx.saved_tensors, ctx.stride, ctx.dilation
        half = weight.shape[2] // 2
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            spread = grad
            if s > 1:  # not in place, for torch.func's sake
                rows = torch.zeros_like(x[:, :, ::s]).slice_scatter(grad, 3, step=s)
                spread = torch.zeros_like(x).slice_scatter(rows, 2, step=s)
            grad_x = F.conv2d(spread, weight.flip(2, 3), None, 1, half * d, d, x.shape[1])
        if ctx.needs_input_grad[1]:
            exact = torch.promote_types(x.dtype, torch.float32) if half > 1 else x.dtype
            images, up = (_every(d, each).to(exact) for each in (x, grad))
            grad_weight = conv2d_weight(images, weight.shape, up, s, half, groups=x.shape[1])
            grad_weight = grad_weight.to(weight.dtype)
        return grad_x, grad_weight, None, None


def _every(d: int, x: Tensor) -> Tensor:
    """The images that every d-th pixel makes, padded: (N, C, H, W) -> (N d², C, H/d, W/d)."""
    n, c, h, w = x.shape
    if h % d or w % d:
        x = F.pad(x, (0, -w % d, 0, -h % d))
    rows, columns = x.shape[2] // d, x.shape[3] // d
    x = x.view(n, c, rows, d, columns, d).permute(0, 3, 5, 2, 4, 1)
    return x.reshape(n * d * d, rows, columns, c).permute(0, 3, 1, 2)


class NormReLU(nn.Module):
    """A BatchNorm in training mode and a ReLU: the same numbers with fewer passes over memory.

    A network this small is memory-bound. The compiler by itself sums eight channels at a time, and
    so reads all images once for every eight channels; and in the backward pass it reads the ReLU's
    output too, only to see where that is zero.
    """

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self.norm  # whose buffers might be None for all that its type tells
        count = x.numel() // x.shape[1]
        y, mean, var = _NormReLU.apply(x, norm.weight, norm.bias, norm.running_mean, norm.eps)
        with torch.no_grad():
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
            norm.num_batches_tracked.add_(1)
        return y


class _NormReLU(torch.autograd.Function):
    """relu(weight (x - mean) / std + bias); also the mean and the variance, both (C,).

    Where x has lower precision than the rest, only what is written to memory is rounded to it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, guess: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Centred on a guess, the running mean: else the sum of squares would lose digits where the
        # mean is hundreds of deviations. At first the guess is 0, and the means are close to 0.
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
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        x, mean, scale, gain, shift = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        grad = torch.where(x * _spread(gain) + _spread(shift) > 0, grad, 0).to(gain.dtype)
        grad_bias = _sum(grad)
        grad_weight = _sum(grad * (x - _spread(mean))) * scale
        # Ioffe and Szegedy (2015, arXiv:1502.03167), as a straight line in grad and x. Times 1/n:
        # the compiler repeats this for every pixel, and a division takes it much longer.
        slope = -gain * scale * grad_weight * (1 / count)
        constant = -gain * grad_bias * (1 / count) - mean * slope
        grad_x = grad * _spread(gain) + x * _spread(slope) + _spread(constant)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None


def _spread(channels: Tensor) -> Tensor:
    return channels.view(1, -1, 1, 1)


def _sum(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (C,): row by row first, as a row of all channels stays in the cache."""
    return x.sum(dim=3).sum(dim=(0, 2))


class MixedPrecision(nn.Module):
    """A network that computes in another precision than its parameters have.

    The images, all that passes between layers, the parameters of convolutions as they are used,
    and the gradients of all these are rounded. The parameters themselves, BatchNorm's sums, pool
    and head aren't (Micikevicius et al., 2018, arXiv:1710.03740; with bfloat16's exponents the loss
    needs no scaling). What is kept for the backward pass takes half the space; faster on a CPU with
    AVX-512 BF16 or AMX.

    Args:
        model: takes batches (N, 3, H, W) and ends in `gap` and `head`; its parameters and buffers
            are used and updated as if it were called itself.
    """

    def __init__(self, model: nn.Module, precision: torch.dtype):
        super().__init__()
        self.model, self.precision = _copy_sharing_tensors(model), precision
        self.model.gap = nn.Sequential(_Float32(), model.get_submodule("gap"))
        convs = (nn.Conv2d, FastDepthwise)
        self.rounded = [
            f"{layer}.{name}"
            for layer, module in model.named_modules()
            if isinstance(module, convs) and layer.partition(".")[0] != "head"
            for name, _ in module.named_parameters(recurse=False)
        ]

    def forward(self, images: Tensor) -> Tensor:
        weights = {name: self.model.get_parameter(name).to(self.precision) for name in self.rounded}
        return functional_call(self.model, weights, (images.to(self.precision),))


def computes_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; without, it is a dozen times slower."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class _Float32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


# ---------------------------------------------------------------------------------------- memory


class Memory:
    """Has glibc keep large buffers that are freed, since the next step needs the same again.

    By default each goes back to the kernel, and every page of it is faulted in again: measured, an
    eighth of a step. Elsewhere than on glibc nothing happens.
    """

    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

    def __init__(self) -> None:
        self.libc: ctypes.CDLL | None = None
        try:
            libc = ctypes.CDLL(None)
            # An older glibc takes no more than half of its largest heap.
            if any(libc.mallopt(self.M_MMAP_THRESHOLD, n) for n in (2_000_000_000, 2**25)):
                libc.mallopt(self.M_TRIM_THRESHOLD, 2_000_000_000)
            self.libc = libc
        except (OSError, AttributeError, TypeError):
            pass

    def trim(self) -> None:
        """Return it to the kernel: between epochs, as buffers of another size would come on top."""
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
