"""Networks beside the reference's, each written as one line.

    BlueprintNet(layout="16 24 36 36d2 48 48 64s2 64d2 64d3 64 64")

A block mixes the channels first and filters each afterwards: pointwise 1x1, depthwise 3x3,
BatchNorm, ReLU (blueprint separable convolutions: Haase and Amthor, 2020, arXiv:2003.13549).
Where shapes allow it, its input is added to its output (He et al., 2015, arXiv:1512.03385).
Its channels can be weighted (efficient channel attention: Wang et al., 2019, arXiv:1910.03151), and
its convolutions applied several times in a row, each time with a BatchNorm of its own (as in
ThriftyNet: Coiffier et al., 2020, arXiv:2007.10106).
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_cifar10_net import NetCIFAR10_Tiny, check_images, conv_block
from tinycifar.checks import check_choice
from tinycifar.costs import layer_costs
from tinycifar.evaluation import eval_mode
from tinycifar.images import SIDE
from tinycifar.quantise import simulated_int8

# glu: half of the channels times the sigmoid of the other (Dauphin et al., 2017, arXiv:1612.08083).
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "silu": partial(nn.SiLU, inplace=True),
    "glu": partial(nn.GLU, dim=1),
}
SKIPS = ("none", "same", "all")
ATTENTION = ("none", "eca")


class Layer(NamedTuple):
    """What a word of a layout says."""

    channels: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    uses: int = 1


class ChannelAttention(nn.Module):
    """Each channel times a weight, from its own and its neighbours' means: (N, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        means = x.to(self.conv.weight.dtype).mean((2, 3))  # float32 in mixed precision
        weights = self.conv(means[:, None])[:, 0].sigmoid()
        return x * weights[:, :, None, None].to(x.dtype)


torch.fx.wrap("check_images")  # here as well, so that fuse can trace what calls it


class BlueprintBlock(nn.Module):
    """Pointwise 1x1, depthwise, BatchNorm, activation: (N, c_in, H, W) -> (N, c_out, H', W').

    Args:
        layer: c_out, and the kernel, stride and dilation of the depthwise convolution; uses: how
            often the two convolutions are applied, for which shapes must stay the same.
        skip: add the input to the output; where they differ in size it is average-pooled, and
            channels of zeros are added (He et al.'s option A subsamples instead). c_out must be at
            least c_in.
        attention: whether channels are weighted, once a use.
    """

    def __init__(
        self,
        c_in: int,
        layer: Layer,
        activation: str = "relu",
        skip: bool = False,
        attention: bool = False,
    ):
        super().__init__()
        c_out, kernel, stride, dilation, uses = layer
        padding = kernel // 2 * dilation
        wide = 2 * c_out if activation == "glu" else c_out
        self.pw = nn.Conv2d(c_in, wide, 1, bias=False)
        self.dw = nn.Conv2d(wide, wide, kernel, stride, padding, dilation, groups=wide, bias=False)
        self.bn = nn.BatchNorm2d(wide)
        self.more_bns = nn.ModuleList(nn.BatchNorm2d(wide) for _ in range(uses - 1))
        self.act = ACTIVATIONS[activation]()
        self.attention = ChannelAttention() if attention else nn.Identity()
        self.skip, self.stride, self.more = skip, stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        for bn in (self.bn, *self.more_bns):
            x = self.once(x, bn)
        return x

    def unrolled(self) -> nn.Module:
        """The same function as a chain of blocks, each with its own convolutions, used once."""
        if not self.more_bns:
            return self
        blocks = nn.Sequential(*(copy.deepcopy(self) for _ in (self.bn, *self.more_bns)))
        for block, bn in zip(blocks, (self.bn, *self.more_bns), strict=True):
            block.bn, block.more_bns = copy.deepcopy(bn), nn.ModuleList()
        return blocks

    def once(self, x: Tensor, bn: nn.Module) -> Tensor:
        y = self.attention(self.act(bn(self.dw(self.pw(x)))))
        if not self.skip:
            return y
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        if self.more:
            x = F.pad(x, (0, 0, 0, 0, 0, self.more))
        return x + y


class BlueprintNet(nn.Module):
    """(N, 3, H, W) normalised float images -> (N, num_classes) log-probabilities.

    Args:
        layout: the channels of the first, standard convolution, then those of each block, with
            `k5` for a 5x5 kernel, `s2` for a stride, `d2` for a dilation and `x2` for convolutions
            used twice, in this order: "16 24 24d2 32k5s2 32x2".
        skips: over which blocks the input is added: none, same (those that keep the shape), all.
        activation: relu, silu or glu, which takes twice as many channels as it gives.
        attention: none or eca, after each block.

    Raises:
        ValueError: a layout that can't be read; an unknown activation or kind of skips.
    """

    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __init__(
        self,
        num_classes: int = 10,
        *,
        layout: str = "16 24 36 36d2 48 48 64s2 64d2 64d3 64 64",
        skips: str = "same",
        activation: str = "relu",
        attention: str = "none",
    ):
        super().__init__()
        check_choice("skips", skips, SKIPS)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("attention", attention, ATTENTION)
        (channels, *_), *layers = read_layout(layout)
        self.stem = conv_block(3, channels)
        blocks = []
        for layer in layers:
            same = layer.channels == channels and layer.stride == 1
            if layer.uses > 1 and not same:
                raise ValueError(
                    "only a layer that keeps the shape can be used several times (x2); got "
                    f"{layer.channels} channels, stride {layer.stride}, after {channels} channels"
                )
            skip = skips == "all" or (skips == "same" and same)
            if skip and layer.channels < channels:
                raise ValueError(
                    "skips 'all' takes layers that don't narrow; got "
                    f"{layer.channels} channels after {channels}"
                )
            blocks.append(BlueprintBlock(channels, layer, activation, skip, attention == "eca"))
            channels = layer.channels
        self.blocks = nn.Sequential(*blocks)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        x = self.blocks(self.stem(x))
        return self.head(self.gap(x)).flatten(1).log_softmax(dim=1)


def read_layout(layout: str) -> list[Layer]:
    """The layers that a layout names; what it doesn't say of them is a Layer's default."""
    pattern = r"([1-9]\d*)(?:k([1357]))?(?:s([1-9]))?(?:d([1-9]))?(?:x([1-9]))?"
    words = [re.fullmatch(pattern, word) for word in layout.split()]
    parts = [word.groups() for word in words if word and len(word[1]) < 5]
    if len(parts) < max(2, len(words)):
        raise ValueError(
            "a layout names the channels of each layer, up to 9999, with k5 for a kernel, s2 for a "
            "stride, d2 for a dilation and x2 for two uses, e.g. '16 24 24d2 32s2 32x2'; got "
            f"{layout!r}"
        )
    return [
        Layer(int(channels), int(kernel or 3), *(int(part or 1) for part in rest))
        for channels, kernel, *rest in parts
    ]


def source_sha256(name: str) -> str | None:
    """Checksum of the file that the class "module:Class" is from; None if there is no such file."""
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):
        return None
    file = Path(spec.origin) if spec and spec.origin else None
    return hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else None


def own_network(num_classes: int, name: str) -> nn.Module:
    """A network of the caller's own: `name` is "module:Class", of a class that can be imported.

    The class is called with the number of classes. Its last feature map goes into `gap`, and what
    comes of it into `head`, as in the networks here; it answers with log-probabilities.

    Raises:
        ValueError: there is no such class, or it isn't such a network.
    """
    module, _, kind = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), kind)
    except Exception as error:  # its code may raise anything
        raise ValueError(
            f"network {name!r} can't be imported ({error}): expected 'module:Class', where `import "
            "module` works"
        ) from error
    # Nothing else is called: the name may come with a run that somebody sent.
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"network {name!r} must be a class derived from nn.Module; got {cls!r}")
    try:
        network = cls(num_classes)
    except Exception as error:
        raise ValueError(f"network {name!r} fails for {num_classes} classes: {error}") from error
    if missing := [part for part in ("gap", "head") if not hasattr(network, part)]:
        raise ValueError(
            f"network {name!r} has no {' and no '.join(missing)}: its last feature map must go "
            "into a module `gap`, and what comes of it into `head`"
        )
    try:
        with torch.no_grad(), eval_mode(network):
            answer = network(torch.zeros(2, 3, SIDE, SIDE))
    except Exception as error:
        raise ValueError(f"network {name!r} fails on images (2, 3, 32, 32): {error}") from error
    right = isinstance(answer, Tensor) and answer.shape == (2, num_classes)
    if not right or not torch.allclose(answer.exp().sum(1), torch.ones(2)):
        what = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        sums = ", of which the exponentials don't add up to 1" if right else ""
        raise ValueError(
            f"network {name!r} must answer a batch (N, 3, H, W) with log-probabilities (N, "
            f"{num_classes}), as log_softmax(dim=1) gives; its answer to two images is {what}{sums}"
        )
    layer_costs(network)  # what fails here would fail when the training is done
    return network


def make_network(num_classes: int, options: dict[str, Any]) -> nn.Module:
    """The network that a run's config.json describes under `model`."""
    if "class" in options:
        return own_network(num_classes, options["class"])
    kind = BlueprintNet if "layout" in options else NetCIFAR10_Tiny
    network = kind(num_classes, **{k: v for k, v in options.items() if k != "int8"})
    return simulated_int8(network.eval()) if options.get("int8") else network
