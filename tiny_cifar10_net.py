"""NetCIFAR10_Tiny: a 36,170-parameter network of depthwise separable and dilated convolutions.

No max-pooling and a single strided convolution: the receptive field grows to 45 pixels, past the
32 of the image, by dilation. The architecture is that of tuning_CNN_for_CIFAR10 (Shashank Sane,
2025, MIT), with its submodule names, so that weights of the reference load by name.

Depthwise separable convolutions: Howard et al., "MobileNets", 2017 (arXiv:1704.04861).
Dilated convolutions: Yu and Koltun, 2016 (arXiv:1511.07122).

This file needs nothing but torch, so that it can be copied into another project by itself.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch.fx
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval


def conv_block(c_in: int, c_out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """A standard 3x3 convolution, BatchNorm, ReLU: (N, c_in, H, W) -> (N, c_out, H', W').

    Padding keeps the size at stride 1.
    """
    conv = nn.Conv2d(c_in, c_out, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class SeparableConv(nn.Module):
    """Depthwise 3x3, BN, ReLU, pointwise 1x1, BN, ReLU: (N, c_in, H, W) -> (N, c_out, H', W').

    The depthwise convolution filters each channel by itself; the pointwise one mixes the channels.
    Together 9 c_in + c_in c_out weights, where a standard 3x3 convolution has 9 c_in c_out.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.dw = nn.Conv2d(
            c_in, c_in, 3, stride, padding=dilation, dilation=dilation, groups=c_in, bias=False
        )
        self.bn_dw = nn.BatchNorm2d(c_in)
        self.pw = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.bn_pw = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn_dw(self.dw(x)))
        return self.relu(self.bn_pw(self.pw(x)))


class NetCIFAR10_Tiny(nn.Module):
    """(N, 3, H, W) normalised float images -> (N, num_classes) log-probabilities.

    At 32 x 32 and with the default options: 36,170 parameters, 17,330,816 multiply-adds in the
    convolutions, receptive field 45 before the global average pool. Any H and W will do.

    Args:
        num_classes: width of the output.
        dilated: False sets every dilation to 1 (same parameters, receptive field 31).
        separable: False puts a standard 3x3 convolution in place of each separable one.
        width: multiplies every channel count; 1.0 is the reference.

    Attributes:
        classes, mean, std: what the outputs are called and how the inputs were normalised;
            None until whoever loads the weights sets them.

    Raises:
        ValueError: an option out of its range; an input that isn't (N, 3, H, W).
        TypeError: an input that isn't floating point.
    """

    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __init__(
        self,
        num_classes: int = 10,
        *,
        dilated: bool = True,
        separable: bool = True,
        width: float = 1.0,
    ):
        super().__init__()
        _check_options(num_classes, width)
        block = SeparableConv if separable else conv_block
        c16, c24, c36, c48, c64 = (max(1, round(c * width)) for c in (16, 24, 36, 48, 64))
        d2, d3 = (2, 3) if dilated else (1, 1)

        self.c1 = nn.Sequential(conv_block(3, c16), conv_block(c16, c24))  # 24 x 32 x 32
        self.c2 = nn.Sequential(block(c24, c36), block(c36, c36, dilation=d2))  # 36 x 32 x 32
        self.c3 = nn.Sequential(block(c36, c48), block(c48, c48))  # 48 x 32 x 32
        self.c4 = nn.Sequential(  # 64 x 16 x 16
            block(c48, c64, stride=2),
            block(c64, c64, dilation=d2),
            block(c64, c64, dilation=d3),
            block(c64, c64),
            block(c64, c64),
        )
        self.gap = nn.AdaptiveAvgPool2d(1)  # 64 x 1 x 1
        self.head = nn.Conv2d(c64, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        x = self.c4(self.c3(self.c2(self.c1(x))))
        return self.head(self.gap(x)).flatten(1).log_softmax(dim=1)


def folded(model: nn.Module) -> Any:
    """A copy of the same class, BatchNorms folded into the convolutions before them.

    In eval mode a BatchNorm only scales and shifts each channel, which the convolution's weights
    and a bias can do at no cost. The same outputs to rounding (1e-5).

    Args:
        model: any network; in one that torch.fx can't trace nothing is folded. A BatchNorm is
            folded only if its input is the output of a convolution that nothing else uses. A block
            that applies one several times, each time with another BatchNorm, needs a method
            `unrolled`: see tinycifar.networks.

    Raises:
        ValueError: the model is in training mode, where BatchNorm depends on the batch.
    """
    if model.training:
        raise ValueError("a BatchNorm is folded in eval mode only: call model.eval() first")
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        unrolled: Any = getattr(module, "unrolled", None)
        if unrolled is not None:
            model.set_submodule(name, unrolled())
    try:
        graph = torch.fx.Tracer().trace(model)
    except Exception:  # whatever its forward raises when given no tensor
        return model
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    for node in calls:
        norm = model.get_submodule(str(node.target))
        before: Any = next(iter(node.all_input_nodes), None)
        if not isinstance(norm, nn.BatchNorm2d) or before not in calls or len(before.users) > 1:
            continue
        conv: Any = model.get_submodule(before.target)
        plain = type(conv) is nn.Conv2d and norm.running_mean is not None
        if plain and times[node.target] == times[before.target] == 1:
            conv = fuse_conv_bn_eval(conv, norm).requires_grad_()  # also the bias, which is new
            model.set_submodule(before.target, conv)
            model.set_submodule(str(node.target), nn.Identity())
    return model


class FusedNet(nn.Module):
    """What `fuse` makes of a network: one function of tensors, without modules to call.

    For one image, calling modules costs a tenth of the time.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.classes, self.mean, self.std = network.classes, network.mean, network.std
        self.function = torch.fx.GraphModule(network, _Flat().trace(network))
        for i, node in enumerate(self.function.graph.nodes):
            node.type = None  # annotations are strings here, which GraphModule can't pickle
            if node.op == "get_attr":  # from c1.0.0.weight, which is found module by module
                where, _, name = node.target.rpartition(".")
                tensor = getattr(self.function.get_submodule(where), name)
                # Numbered, as a_b and a.b are two tensors.
                node.target = f"{node.target.replace('.', '_')}_{i}"
                if isinstance(tensor, nn.Parameter):
                    self.function.register_parameter(node.target, nn.Parameter(tensor))
                else:
                    self.function.register_buffer(node.target, tensor.detach())
        self.function.delete_all_unused_submodules()
        self.function.recompile()

    def forward(self, x: Tensor) -> Tensor:
        return self.function.forward(x)


def fuse(model: nn.Module) -> FusedNet:
    """A copy for inference: `folded`, channels_last in memory, without modules to call.

    Args:
        model: a network that torch.fx can trace, with `classes`, `mean` and `std`.

    Raises:
        ValueError: see `folded`. Whatever torch.fx raises for a network that it can't trace.
    """
    return FusedNet(folded(model).to(memory_format=torch.channels_last)).eval()


class _Flat(torch.fx.Tracer):
    """Traces through all modules, down to functions, but for what can't be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d)  # one that `folded` left


@torch.fx.wrap  # one call in a traced graph, so that a symbolic input may pass
def check_images(x: Tensor) -> None:
    """Refuse what isn't a batch of normalised colour images (N, 3, H, W).

    Raises:
        ValueError: another shape. TypeError: not floating point.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(
            "the network takes a batch of colour images of shape (N, 3, H, W); "
            f"got {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"the network takes normalised floating-point images; got {x.dtype}")


def _check_options(num_classes: int, width: float) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes must be a whole number of 1 or more; got {num_classes!r}")
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width <= 16:
        raise ValueError(f"width must be a number above 0 and up to 16; got {width!r}")
