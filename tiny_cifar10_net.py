"""NetCIFAR10_Tiny: a 36,170-parameter network of depthwise separable and dilated convolutions.

No max-pooling and a single strided convolution: the receptive field grows to 45 pixels, past the
32 of the picture, by dilation. The architecture is that of tuning_CNN_for_CIFAR10 (Shashank Sane,
2025, MIT), with its submodule names, so that weights of the reference load by name.

Depthwise separable convolutions: Howard et al., "MobileNets", 2017 (arXiv:1704.04861).
Dilated convolutions: Yu and Koltun, 2016 (arXiv:1511.07122).

    python -m tiny_cifar10_net cat.jpg        # classify a picture
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.nn.utils import fuse_conv_bn_eval

__all__ = [
    "NetCIFAR10_Tiny",
    "DepthwiseConv",
    "SeparableConv",
    "FusedNet",
    "LayerCost",
    "Field",
    "fuse",
    "layer_costs",
    "receptive_field",
    "PRETRAINED",
    "load_weights",
    "load_pretrained",
    "run_path",
    "weights_checksum",
    "predict",
    "eval_mode",
]

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
# Recipe: the published run, settled without the test set, whose weights go by its name.
PRETRAINED = {"tuned": "tuned-seed0", "sprint": "sprint-seed0", "baseline": "baseline-val"}


# --------------------------------------------------------------------------------------- network


def conv_block(c_in: int, c_out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """A standard 3x3 convolution, BatchNorm, ReLU. Padding keeps the size (at stride 1)."""
    conv = nn.Conv2d(c_in, c_out, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class DepthwiseConv(nn.Conv2d):
    """A 3x3 convolution of each channel by itself: (N, C, H, W) -> (N, C, H', W').

    On a CPU some of its gradients are taken another way: see `_Dilated` and `_Strided`.
    """

    def __init__(self, channels: int, stride: int = 1, dilation: int = 1):
        super().__init__(
            channels,
            channels,
            3,
            stride,
            padding=dilation,
            dilation=dilation,
            groups=channels,
            bias=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        (stride, _), (dilation, _) = self.stride, self.dilation
        plain = self.bias is None and not torch.is_autocast_enabled("cpu")
        if plain and x.device.type == "cpu" and torch.is_grad_enabled():
            if dilation > 1 and stride == 1:
                return _Dilated.apply(x, self.weight, dilation)
            if stride > 1 and dilation == 1 and x.dtype == torch.bfloat16:
                return _Strided.apply(x, self.weight, stride)
        return super().forward(x)


class _Dilated(torch.autograd.Function):
    """A dilated depthwise convolution whose backward pass is fast on a CPU.

    oneDNN, the library behind torch there, has no fast code for either gradient: measured, each
    takes five to twenty times as long as the forward pass. But its input's is a dilated depthwise
    convolution as well, with the filter turned about, for which there is fast code; and its
    filter's is that of an undilated convolution of the d² pictures that every d-th pixel makes.
    """

    generate_vmap_rule = True  # for torch.func, e.g. gradients picture by picture

    @staticmethod
    def forward(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        return _depthwise(x, weight, dilation)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, weight), d = ctx.saved_tensors, ctx.dilation
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _depthwise(grad, weight.flip(2, 3), d)
        if ctx.needs_input_grad[1]:
            grad_weight = conv2d_weight(
                _every(d, x), weight.shape, _every(d, grad), padding=1, groups=x.shape[1]
            )
        return grad_x, grad_weight, None


class _Strided(torch.autograd.Function):
    """A strided depthwise convolution in bfloat16 whose backward pass is fast on a CPU.

    oneDNN has no fast code for its input's gradient: measured, it takes fifty times as long as in
    float32. But that is an undilated convolution of the output's gradient, spread out, with the
    filter turned about.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: int) -> Tensor:
        return F.conv2d(x, weight, stride=stride, padding=1, groups=x.shape[1])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, ctx.stride = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, weight), s = ctx.saved_tensors, ctx.stride
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            # Not in place, for torch.func's sake.
            rows = torch.zeros_like(x[:, :, ::s]).slice_scatter(grad, 3, step=s)
            spread = torch.zeros_like(x).slice_scatter(rows, 2, step=s)
            grad_x = _depthwise(spread, weight.flip(2, 3), 1)
        if ctx.needs_input_grad[1]:
            grad_weight = conv2d_weight(
                x, weight.shape, grad, stride=s, padding=1, groups=x.shape[1]
            )
        return grad_x, grad_weight, None


def _every(d: int, x: Tensor) -> Tensor:
    """The pictures that every d-th pixel makes, padded: (N, C, H, W) -> (N d², C, H/d, W/d)."""
    n, c, h, w = x.shape
    if h % d or w % d:
        x = F.pad(x, (0, -w % d, 0, -h % d))
    rows, columns = x.shape[2] // d, x.shape[3] // d
    x = x.view(n, c, rows, d, columns, d).permute(0, 3, 5, 2, 4, 1)
    return x.reshape(n * d * d, rows, columns, c).permute(0, 3, 1, 2)


def _depthwise(x: Tensor, weight: Tensor, d: int) -> Tensor:
    return F.conv2d(x, weight, padding=d, dilation=d, groups=x.shape[1])


class SeparableConv(nn.Module):
    """Depthwise 3x3, BN, ReLU, pointwise 1x1, BN, ReLU: (N, c_in, H, W) -> (N, c_out, H', W').

    The depthwise half looks around, one filter a channel; the pointwise half mixes the channels.
    Together 9 c_in + c_in c_out weights, where a standard 3x3 convolution has 9 c_in c_out.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.dw = DepthwiseConv(c_in, stride, dilation)
        self.bn_dw = nn.BatchNorm2d(c_in)
        self.pw = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.bn_pw = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn_dw(self.dw(x)))
        return self.relu(self.bn_pw(self.pw(x)))


class NetCIFAR10_Tiny(nn.Module):
    """(N, 3, H, W) normalised float pictures -> (N, num_classes) log-probabilities.

    At 32 x 32 and with the default options: 36,170 parameters, 17,330,816 multiply-adds in the
    convolutions, receptive field 45 before the global average pool. Any H and W will do.

    Args:
        num_classes: width of the output.
        dilated: False sets every dilation to 1 (same parameters, receptive field 31).
        separable: False puts a standard 3x3 convolution in place of each separable one.
        width: multiplies every channel count; 1.0 is the reference.

    Attributes:
        classes, mean, std: what the outputs are called and how the inputs were normalised;
            None until `load_pretrained` or the caller sets them. Needed by `predict` alone.

    Raises:
        ValueError: an option out of its range; an input that isn't (N, 3, H, W).
        TypeError: an input that isn't floating point.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        dilated: bool = True,
        separable: bool = True,
        width: float = 1.0,
    ):
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(
                f"num_classes must be a whole number of 1 or more, not {num_classes!r}"
            )
        if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width <= 16:
            raise ValueError(f"width must be a number above 0 and up to 16, not {width!r}")
        self.classes: tuple[str, ...] | None = None
        self.mean: tuple[float, ...] | None = None
        self.std: tuple[float, ...] | None = None

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
        _check_pictures(x)
        x = self.c4(self.c3(self.c2(self.c1(x))))
        x = x.to(self.head.weight.dtype)  # the same, but in mixed precision (engine.MixedPrecision)
        return self.head(self.gap(x)).flatten(1).log_softmax(dim=1)


def _check_pictures(x: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(
            "NetCIFAR10_Tiny takes a batch of colour pictures of shape (N, 3, H, W); "
            f"got {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"NetCIFAR10_Tiny takes normalised floating-point pictures; got {x.dtype} "
            "(for plain pictures use predict)"
        )


class FusedNet(nn.Module):
    """What `fuse` makes: convolutions with the BatchNorms folded in, a ReLU after each, the head.

    (N, 3, H, W) normalised float pictures -> (N, num_classes) log-probabilities, for inference.
    """

    def __init__(self, convs: list[nn.Conv2d], head: nn.Conv2d):
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        _check_pictures(x)
        for c in self.convs:  # not c(x): for one picture, calling a module costs a tenth of it all
            x = F.conv2d(x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups).relu_()
        return self.head(self.gap(x)).flatten(1).log_softmax(dim=1)


def fuse(model: NetCIFAR10_Tiny) -> FusedNet:
    """A copy for inference, each BatchNorm folded into the convolution before it.

    In eval mode a BatchNorm only scales and shifts each channel, which the convolution's weights
    and a bias can do at no cost. The same outputs to rounding (1e-5).

    Raises:
        TypeError: another kind of network.
        ValueError: the model is in training mode, where BatchNorm depends on the batch.
    """
    if not isinstance(model, NetCIFAR10_Tiny):
        raise TypeError(f"fuse takes a NetCIFAR10_Tiny; got {type(model).__name__}")
    if model.training:
        raise ValueError("fuse takes a network in eval mode: call model.eval() first")
    *layers, head = (m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)))
    convs, norms = layers[::2], layers[1::2]  # a convolution, its BatchNorm, and so on
    fused = FusedNet(list(map(fuse_conv_bn_eval, convs, norms)), copy.deepcopy(head))
    fused.classes, fused.mean, fused.std = model.classes, model.mean, model.std
    return fused.eval()


# -------------------------------------------------------------------------- what it costs and sees


@dataclass(frozen=True)
class LayerCost:
    """One layer's price: trainable parameters, and multiply-adds for one picture."""

    name: str
    kind: str
    out_shape: tuple[int, ...]  # (C, H, W)
    params: int
    macs: int


@dataclass(frozen=True)
class Field:
    """The receptive field after one layer, in pixels of the input picture."""

    name: str
    kernel: int
    stride: int
    dilation: int
    size: int  # side of the feature map
    jump: int  # distance between neighbouring outputs
    field: int  # side of the receptive field


def layer_costs(model: nn.Module, size: int = 32) -> list[LayerCost]:
    """Parameters and multiply-adds of each convolution and BatchNorm, on (3, size, size) pictures.

    Multiply-adds are counted in the convolutions alone, as is usual: in inference a BatchNorm
    folds into the convolution before it.

    Raises:
        ValueError: a layer isn't called as a module, as those of a fused network.
    """
    rows = []
    for name, module, out in _trace(model, size):
        params = sum(p.numel() for p in module.parameters() if p.requires_grad)
        macs = 0
        if isinstance(module, nn.Conv2d):
            macs = module.weight.numel() * out.shape[-2] * out.shape[-1]
        if params or macs:
            rows.append(LayerCost(name, type(module).__name__, tuple(out.shape[1:]), params, macs))
    return rows


def receptive_field(model: nn.Module, size: int = 32) -> list[Field]:
    """Growth of the receptive field, a row a convolution or pool, up to the global average pool.

    Layer by layer field += (kernel - 1) * dilation * jump, then jump *= stride (Araujo et al.,
    "Computing Receptive Fields of Convolutional Neural Networks", Distill, 2019). Holds for
    networks that are one chain of square layers, as this one is.

    Raises:
        ValueError: a layer isn't called as a module, as those of a fused network.
    """
    rows: list[Field] = []
    field = jump = 1
    for name, module, out in _trace(model, size):
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


def _trace(model: nn.Module, size: int) -> list[tuple[str, nn.Module, Tensor]]:
    """(name, leaf module, its output) in the order of execution; `model` itself is left alone."""
    model = copy.deepcopy(model).cpu().eval()
    seen: list[tuple[str, nn.Module, Tensor]] = []

    def note(name):
        return lambda module, _, out: seen.append((name, module, out))

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(note(name))
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    missed = {n for n, m in model.named_modules() if m._parameters} - {n for n, *_ in seen}
    if missed:
        raise ValueError(
            f"{type(model).__name__} runs {min(missed)} without calling it as a module, so that it "
            "can't be seen: pass the network as it was before fuse"
        )
    return seen


# --------------------------------------------------------------------------------------- weights


def load_weights(path: str | Path, model: nn.Module) -> nn.Module:
    """Load a plain state_dict file into `model`; anything but tensors in it is refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file isn't a state_dict of tensors, or doesn't fit the model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}: train a run first, or name another")
    content = io.BytesIO(path.read_bytes())
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # of a dozen kinds, as the damage has it
        raise ValueError(
            f"{path} is refused: it is damaged, or holds more than tensors; a weights file is what "
            "torch.save(state_dict) writes: get it again, or ask its author for one"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{path} is refused: a weights file must be one dict of names to tensors (a state_dict)"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {path} do not fit {type(model).__name__}: {_first_lines(error)}"
        ) from error
    return model


def load_pretrained(run: str | Path = "tuned") -> NetCIFAR10_Tiny:
    """The network of a run, in eval mode, with its `classes`, `mean` and `std`.

    Args:
        run: the name of a published recipe (PRETRAINED) or run (a folder under results/), or any
            run directory's path, a relative one from the current folder or else from the
            repository's root.

    Raises:
        FileNotFoundError: no such run.
        ValueError: its weights or its config.json can't be used, or the weights aren't those
            whose checksum its metrics.json holds.
    """
    folder = run_path(run)
    config_file = folder / "config.json"
    try:
        config = json.loads(config_file.read_text())
        import networks  # which imports this module

        model = networks.make_network(len(config["classes"]), config["model"])
        model.classes = tuple(config["classes"])
        model.mean, model.std = tuple(config["mean"]), tuple(config["std"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{config_file} is not the config.json of a run: {error!r}") from error
    _verify_checksum(folder)
    return load_weights(folder / "best.pt", model).eval()


def run_path(run: str | Path) -> Path:
    """The run directory that `load_pretrained` takes for `run`.

    Raises:
        FileNotFoundError: no such run; lists the published ones.
    """
    places = [RESULTS / PRETRAINED.get(str(run), run), Path(run), ROOT / run]
    for place in places:
        if (place / "config.json").is_file():
            return place
    there = sorted(p.parent.name for p in RESULTS.glob("*/config.json"))
    names = [name for name, folder in PRETRAINED.items() if folder in there] + there
    raise FileNotFoundError(
        f"no run at {str(run)!r}: expected the path of a run directory (it holds config.json "
        f"and best.pt) or a published one: {', '.join(names) or '(there is none yet)'}"
    )


def weights_checksum(folder: Path) -> str:
    """sha256, hexadecimal, of a run's weights."""
    return hashlib.sha256((folder / "best.pt").read_bytes()).hexdigest()


def _verify_checksum(folder: Path) -> None:
    """Refuse weights other than those the run was measured with; an unfinished run has no sum."""
    metrics = folder / "metrics.json"
    if not (metrics.is_file() and (folder / "best.pt").is_file()):
        return
    expected = json.loads(metrics.read_text()).get("weights_sha256")
    if expected not in (None, weights_checksum(folder)):
        raise ValueError(
            f"{folder / 'best.pt'} is refused: its checksum isn't the one in metrics.json, so it "
            "was changed since the run; get the file again, or train the run again"
        )


def _first_lines(error: Exception, n: int = 3) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[1 : n + 1])


# ------------------------------------------------------------------------------------- prediction


def predict(
    image: str | Path | Image.Image | np.ndarray | Tensor,
    model: NetCIFAR10_Tiny | FusedNet | None = None,
    top: int = 5,
) -> list[tuple[str, float]]:
    """The `top` likeliest classes of one picture, with their probabilities, likeliest first.

    Args:
        image: a path, a PIL image, or uint8 pixels as an array or tensor of shape (H, W),
            (H, W, 1), (H, W, 3) or (H, W, 4). Any size: the shorter side is scaled to 32 and the
            centre cropped.
        model: as `load_pretrained` gives it, or fused; None loads the published one.
        top: how many classes to return; all of them if there are fewer.

    Raises:
        FileNotFoundError: no such picture.
        ValueError: the picture can't be read, has a wrong shape or type, or the model carries no
            `classes`, `mean` and `std`.
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ValueError(f"top must be a whole number of 1 or more, not {top!r}")
    picture = _as_rgb(image)
    model = load_pretrained() if model is None else model
    if not (model.classes and model.mean and model.std):
        raise ValueError(
            "this network doesn't know its classes, mean and std: get one from load_pretrained, "
            "or set the three attributes"
        )
    side = 32
    picture = ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC)
    first = next(model.parameters())
    pixels = torch.from_numpy(np.array(picture)).to(first.device, first.dtype) / 255
    mean, std = pixels.new_tensor(model.mean), pixels.new_tensor(model.std)
    batch = ((pixels - mean) / std).permute(2, 0, 1)[None]

    with torch.no_grad(), eval_mode(model):
        probabilities = model(batch)[0].exp().cpu()
    best = probabilities.topk(min(top, len(model.classes)))
    names = [model.classes[i] for i in best.indices]
    return list(zip(names, best.values.tolist(), strict=True))


@contextmanager
def eval_mode(model: nn.Module):
    """The model answers in eval mode, and is afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _as_rgb(image) -> Image.Image:
    """Whatever `predict` takes, as an upright RGB picture."""
    if isinstance(image, (str, Path)):
        image = _open(Path(image))
    elif isinstance(image, Tensor):
        image = _from_array(image.detach().cpu().numpy())
    elif isinstance(image, np.ndarray):
        image = _from_array(image)
    elif not isinstance(image, Image.Image):
        raise ValueError(
            "predict takes a path, a PIL image or a uint8 array of shape (H, W, 3); "
            f"got {type(image).__name__}"
        )
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(
            f"predict takes pictures of 8 bits a channel; got mode {image.mode!r}: convert it first"
        )
    return ImageOps.exif_transpose(image).convert("RGB")


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        image = Image.open(path)
        image.load()
    except (  # SyntaxError: what Pillow has for a broken PNG
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        ValueError,
        SyntaxError,
    ) as error:
        raise ValueError(
            f"{path} can't be read as a picture (expected PNG, JPEG or the like): {error}"
        ) from error
    return image


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    right_shape = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not right_shape or 0 in pixels.shape:
        raise ValueError(
            "predict takes pixels as uint8 of shape (H, W, 3), or (H, W) in grey; "
            f"got {pixels.dtype} of shape {tuple(pixels.shape)}"
        )
    return Image.fromarray(pixels)


def main(argv: list[str] | None = None) -> None:
    """Print the likeliest classes of a picture: `python -m tiny_cifar10_net cat.jpg`."""
    parser = argparse.ArgumentParser(description="Classify a picture with a trained tiny network.")
    parser.add_argument("image", help="path of a picture, any size")
    parser.add_argument("--run", default="tuned", help="as for load_pretrained (tuned)")
    parser.add_argument("--top", type=int, default=5, help="how many classes to print")
    args = parser.parse_args(argv)
    try:
        for name, probability in predict(args.image, load_pretrained(args.run), args.top):
            print(f"{probability:7.2%}  {name}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
