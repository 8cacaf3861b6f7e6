"""What a network costs and sees: parameters, multiply-adds, receptive field."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinycifar.images import SIDE


@dataclass(frozen=True)
class LayerCost:
    """One call of a layer: its trainable parameters, and its multiply-adds for one image."""

    name: str
    kind: str
    out_shape: tuple[int, ...]  # without the batch: (C, H, W), of channel attention (1, C)
    params: int
    macs: int


@dataclass(frozen=True)
class Field:
    """The receptive field after one layer, in pixels of the input image."""

    name: str
    kernel: int
    stride: int
    dilation: int
    size: int  # side of the feature map
    jump: int  # distance between neighbouring outputs
    field: int  # side of the receptive field


def layer_costs(model: nn.Module) -> list[LayerCost]:
    """Parameters and multiply-adds of each layer that has any, for one 32 x 32 image.

    Multiply-adds are counted in convolutions and linear layers alone, as is usual: in inference a
    BatchNorm folds into the convolution before it. A layer that is called several times has as many
    rows, the first of them with its parameters.

    Raises:
        ValueError: a layer isn't called as a module, as in a fused network.
    """
    rows: list[LayerCost] = []
    for name, module, out in _trace(model):
        again = any(row.name == name for row in rows)
        own = () if again else module.parameters(recurse=False)
        params, macs = sum(p.numel() for p in own if p.requires_grad), 0
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            macs = module.weight.numel() * math.prod(out.shape[2:])
        elif isinstance(module, nn.Linear):
            macs = module.weight.numel() * math.prod(out.shape[1:-1])
        if params or macs:
            rows.append(LayerCost(name, type(module).__name__, tuple(out.shape[1:]), params, macs))
    return rows


def receptive_field(model: nn.Module) -> list[Field]:
    """Growth of the receptive field, a row a convolution or pool, up to the global average pool.

    Layer by layer field += (kernel - 1) * dilation * jump, then jump *= stride (Araujo et al.,
    "Computing Receptive Fields of Convolutional Neural Networks", Distill, 2019). Holds for
    networks that are one chain of square layers, as those here are. Not counted are the pooling of
    a shortcut, and channel attention, whose means are of the whole image.

    Raises:
        ValueError: a layer isn't called as a module, as in a fused network.
    """
    rows: list[Field] = []
    field = jump = 1
    for name, module, out in _trace(model):
        if isinstance(module, nn.AdaptiveAvgPool2d):
            break
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            kernel, stride = _side(module.kernel_size), _side(module.stride)
            dilation = _side(getattr(module, "dilation", 1))
            field += (kernel - 1) * dilation * jump
            jump *= stride
            rows.append(Field(name, kernel, stride, dilation, out.shape[-1], jump, field))
    return rows


def _side(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]


def _trace(model: nn.Module) -> list[tuple[str, nn.Module, Tensor]]:
    """(name, layer, its output) in the order of execution; `model` itself is left alone.

    Layers are modules that have parameters of their own, or nothing below them.
    """
    model = copy.deepcopy(model).cpu().eval()
    seen: list[tuple[str, nn.Module, Tensor]] = []

    def note(name: str, module: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            seen.append((name, module, out))

    for name, module in model.named_modules():
        if module._parameters or not list(module.children()):
            module.register_forward_hook(partial(note, name))
    with torch.no_grad():
        model(torch.zeros(1, 3, SIDE, SIDE))
    missed = {n for n, m in model.named_modules() if m._parameters} - {n for n, *_ in seen}
    if missed:
        raise ValueError(
            f"{type(model).__name__} runs {min(missed)} without calling it as a module that gives "
            "a tensor, so that it can't be seen: pass a fused network as it was before fuse"
        )
    return seen
