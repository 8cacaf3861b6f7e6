"""Networks beside the reference's, each written as one line.

    BlueprintNet("16 24 36 36d2 48 48 64s2 64d2 64d3 64 64")

A block mixes the channels first and looks around afterwards: pointwise 1x1, depthwise 3x3,
BatchNorm, ReLU (blueprint separable convolutions: Haase and Amthor, 2020, arXiv:2003.13549).
Where shapes allow it, its input is added to its output (He et al., 2015, arXiv:1512.03385).
"""

from __future__ import annotations

import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tiny_cifar10_net import NetCIFAR10_Tiny, check_images, conv_block
from tinycifar.checks import check_choice

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
SKIPS = ("none", "same", "all")


class BlueprintBlock(nn.Module):
    """Pointwise 1x1, depthwise 3x3, BatchNorm, activation: (N, c_in, H, W) -> (N, c_out, H', W').

    Args:
        skip: add the input to the output; where they differ in size it is average-pooled, and
            channels of zeros are added (He et al.'s option A). c_out must be at least c_in.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int = 1,
        dilation: int = 1,
        activation: str = "relu",
        skip: bool = False,
    ):
        super().__init__()
        self.pw = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.dw = nn.Conv2d(
            c_out, c_out, 3, stride, padding=dilation, dilation=dilation, groups=c_out, bias=False
        )
        self.bn = nn.BatchNorm2d(c_out)
        self.act = ACTIVATIONS[activation](inplace=True)
        self.skip, self.stride, self.more = skip, stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.dw(self.pw(x))))
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
            `s2` for a stride and `d2` for a dilation: "16 24 24d2 32s2".
        skips: over which blocks the input is added: none, same (those that keep the shape), all.
        activation: relu or silu.

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
    ):
        super().__init__()
        check_choice("skips", skips, SKIPS)
        check_choice("activation", activation, ACTIVATIONS)
        (channels, *_), *rest = read_layout(layout)
        self.stem = conv_block(3, channels)
        blocks = []
        for c_out, stride, dilation in rest:
            same = c_out == channels and stride == 1
            skip = skips == "all" or (skips == "same" and same)
            blocks.append(BlueprintBlock(channels, c_out, stride, dilation, activation, skip))
            channels = c_out
        self.blocks = nn.Sequential(*blocks)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        x = self.blocks(self.stem(x))
        return self.head(self.gap(x)).flatten(1).log_softmax(dim=1)


def read_layout(layout: str) -> list[tuple[int, int, int]]:
    """(channels, stride, dilation) of each word of a layout."""
    words = [re.fullmatch(r"(\d+)(?:s(\d))?(?:d(\d))?", word) for word in layout.split()]
    numbers = [[int(part or 1) for part in word.groups()] for word in words if word]
    if len(numbers) < max(2, len(words)):
        raise ValueError(
            "a layout names the channels of each layer, with s2 for a stride and d2 for a "
            f"dilation, e.g. '16 24 24d2 32s2'; got {layout!r}"
        )
    return [(channels, stride, dilation) for channels, stride, dilation in numbers]


def make_network(num_classes: int, options: dict[str, Any]) -> nn.Module:
    """The network that a run's config.json describes under `model`."""
    kind = BlueprintNet if "layout" in options else NetCIFAR10_Tiny
    return kind(num_classes, **options)
