"""A network that computes as int8 arithmetic will, in evaluation and in training.

    model = simulated_int8(load_pretrained())
    calibrate(model, batches)

Weights are rounded to 127 levels, each output channel with a scale of its own; a convolution's
input is rounded to 256 levels with one scale and zero point, over the range seen. The gradient of
rounding is 0, so it is left out of the backward pass (straight-through estimator: Bengio et al.,
2013, arXiv:1308.3432; with int8 convolutions: Jacob et al., 2018, arXiv:1712.05877). BatchNorms
are folded beforehand; the first convolution, which sees the image itself, and the head stay in
float32, where they cost no time. `export` writes the same arithmetic as ONNX.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tiny_cifar10_net import folded

if TYPE_CHECKING:
    import pandas as pd

# Of the weights: seven bits. On a CPU without VNNI, and in browsers, products are added in pairs in
# 16 bits, which 2 * 255 * 64 just fits; with eight bits the sums would saturate, on some machines.
MAX_WEIGHT = 63
MAX_ACTIVATION = 255
PACE = 0.01  # of the moving average of the range


class Quantiser(nn.Module):
    """Rounds a float tensor to 256 levels between the least and the greatest value seen.

    In training it follows their moving average, which begins as the plain mean; 0 is always a
    level, as padding needs it.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("low", "high", "seen"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.seen.add_(1)
                pace = (1 / self.seen).clamp(min=PACE)
                self.low.lerp_(x.amin().clamp(max=0), pace)
                self.high.lerp_(x.amax().clamp(min=0), pace)
        scale, zero = self.scale_and_zero()
        return _Rounded.apply(x, scale, zero, 0, MAX_ACTIVATION)

    def scale_and_zero(self) -> tuple[Tensor, Tensor]:
        """The size of a level and the level that means 0: float32 scalars."""
        scale = (self.high - self.low).clamp(min=1e-8) / MAX_ACTIVATION
        return scale, (-self.low / scale).round()


class Int8Conv(nn.Conv2d):
    """A convolution with rounded weights, whose input passes through `input`, a Quantiser."""

    def __init__(self, conv: Any):
        shape = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride
        super().__init__(*shape, conv.padding, conv.dilation, conv.groups, conv.bias is not None)
        self.weight, self.bias, self.input = conv.weight, conv.bias, Quantiser()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight_scale()
        weight = _Rounded.apply(self.weight, scale, 0, -MAX_WEIGHT, MAX_WEIGHT)
        return self._conv_forward(self.input(x), weight, self.bias)

    def weight_scale(self) -> Tensor:
        """The size of a level of the weights: float32 (out_channels, 1, 1, 1)."""
        largest = self.weight.detach().abs().amax(dim=(1, 2, 3), keepdim=True)
        return largest.clamp(min=1e-8) / MAX_WEIGHT


class _Rounded(torch.autograd.Function):
    """The nearest of the levels from `least` to `most`, in floats; gradients pass unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Any, least: int, most: int) -> Tensor:
        levels = x.div(scale).add_(zero).round_().clamp_(least, most)
        return levels.sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None, None, None


def simulated_int8(model: nn.Module, exact: Collection[str] | None = None) -> Any:
    """A folded copy whose convolutions, but for the first and the head, are Int8Convs.

    What enters the pool is rounded too, so that the last of them gives int8 as well.

    Args:
        model: a network in eval mode that begins in a convolution and ends in `gap` and `head`.
        exact: the names of the convolutions that stay in float; None: the first and the head.
            Those of a subclass or that pad with anything but zeros always stay in float.

    Raises:
        ValueError: no convolution is left to round; and see `folded`.
    """
    model = folded(model)
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    exact = {*[*convs][:1], *[*convs][-1:]} if exact is None else set(exact)
    plain = (n for n, m in convs.items() if type(m) is nn.Conv2d and m.padding_mode == "zeros")
    if not (rounded := [name for name in plain if name not in exact]):
        raise ValueError(
            "int8 rounds plain convolutions between the first and the head, and this network has "
            "none: leave it in float"
        )
    for name in rounded:
        model.set_submodule(name, Int8Conv(convs[name]))
    model.gap = nn.Sequential(Quantiser(), model.get_submodule("gap"))
    return model.eval()


def layer_errors(exact: nn.Module, int8: nn.Module, images: Tensor) -> pd.DataFrame:
    """How far the outputs of each int8 convolution are from the float ones, a row a layer.

    Args:
        exact: a network, `folded`.
        int8: `simulated_int8` of the same network, whose ranges are known.
        images: normalised, float32 (N, 3, H, W).

    Returns:
        columns `layer`, `high` (the top of its input's range), `alone` and `together`: the error's
        root mean square over that of the float outputs, in percent; `alone` of a layer that is
        given float inputs, `together` with those of the int8 layers before it.
    """
    import pandas as pd

    layers = {name: m for name, m in int8.named_modules() if isinstance(m, Int8Conv)}
    right, ours = _outputs(exact, layers, images), _outputs(int8, layers, images)
    rows = []
    for name, layer in layers.items():
        given, out = right[name]
        with torch.no_grad():
            errors = (layer(given) - out, ours[name][1] - out)
        alone, together = (100 * float(error.norm() / out.norm()) for error in errors)
        rows.append((name, float(layer.input.high), alone, together))
    return pd.DataFrame(rows, columns=["layer", "high", "alone", "together"])


def _outputs(
    model: nn.Module, names: Iterable[str], images: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each named module."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Any:  # a copy: the ReLU behind works in place
        return lambda module, given, out: seen.update({name: (given[0].clone(), out.clone())})

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the quantisers' ranges by batches of normalised training images, float32 (N, 3, H, W)."""
    quantisers = [module for module in model.eval().modules() if isinstance(module, Quantiser)]
    for quantiser in quantisers:
        quantiser.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    model.eval()
