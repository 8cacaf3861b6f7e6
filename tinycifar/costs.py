"""What a network costs and sees: parameters, multiply-adds, receptive field."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinycifar.images import SIDE

FUNCTIONS = "(functions)"


@dataclass(frozen=True)
class LayerCost:
    """One call of a layer: its parameters, and its multiply-adds for one image.

    Or, where the name is FUNCTIONS, all that isn't such a call.
    """

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

    Multiply-adds are counted in convolutions and matrix products alone, as is usual: in inference a
    BatchNorm folds into the convolution before it. A layer that is called several times has as many
    rows, the first of them with its parameters. A last row, FUNCTIONS, has what isn't computed by
    calling a convolution or linear layer: the products of attention, a fused network as a whole.
    """
    rows: list[LayerCost] = []
    with FlopCounterMode(display=False) as counter, _attention_as_products():
        called = _trace(model)
    for name, module, out in called:
        again = any(row.name == name for row in rows)
        params = 0 if again else sum(p.numel() for p in module.parameters(recurse=False))
        macs = 0
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            macs = module.weight.numel() * math.prod(out.shape[2:])
        elif isinstance(module, nn.Linear):
            macs = module.weight.numel() * math.prod(out.shape[1:-1])
        if params or macs:
            rows.append(LayerCost(name, type(module).__name__, tuple(out.shape[1:]), params, macs))
    params = sum(p.numel() for p in model.parameters()) - sum(row.params for row in rows)
    macs = counter.get_total_flops() // 2 - sum(row.macs for row in rows)
    if params or macs:
        rows.append(LayerCost(FUNCTIONS, type(model).__name__, (0,), params, macs))
    return rows


def receptive_field(model: nn.Module) -> list[Field]:
    """Growth of the receptive field, a row a convolution or pool, up to the global average pool.

    Layer by layer field += (kernel - 1) * dilation * jump, then jump *= stride (Araujo et al.,
    "Computing Receptive Fields of Convolutional Neural Networks", Distill, 2019). Holds for
    networks that are one chain of square layers, called as modules, as those here are. Not counted
    are the pooling of a shortcut, functions such as F.max_pool2d, and attention.

    Raises:
        ValueError: no layer is called as a module, as in a fused network.
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
    if not rows:
        raise ValueError(
            f"{type(model).__name__} calls no convolution or pool as a module, so its receptive "
            "field isn't known: pass a fused network as it was before fuse"
        )
    return rows


@contextmanager
def _attention_as_products() -> Iterator[None]:
    """Without torch's fused kernels, which its counter doesn't know."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


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
    return seen
