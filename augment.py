"""One description of an augmentation policy, built three ways.

A `Policy` says what may happen to a training image; three builds make it happen:

- `Batched`: a module that augments a whole batch at once on any device (the training engine's);
- `albumentations_transform`: an albumentations `Compose`, one image at a time;
- `torchvision_transform`: a torchvision v2 `Compose`, one image at a time.

All three apply, in this order: crop, flip, shift-scale-rotate, hole, normalise. They agree exactly
where nothing is random and in distribution where it is. Only the build in use needs its library.

>>> augment = Batched("reference", mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
>>> augment(torch.zeros(128, 32, 32, 3, dtype=torch.uint8)).shape
torch.Size([128, 3, 32, 32])
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinycifar.checks import check_choice, check_number, check_whole

if TYPE_CHECKING:
    import albumentations
    from torchvision.transforms import v2

BUILDS = ("batched", "albumentations", "torchvision")
BORDERS = ("reflect_101", "constant")

# What each library calls the two borders.
_PAD_MODES = {"reflect_101": "reflect", "constant": "constant"}
_GRID_MODES = {"reflect_101": "reflection", "constant": "zeros"}

_FLIP = 2  # the column of a batch's draws that decides on flips, see Batched.transform

# The closed range of every numeric field of a policy. The scale stays below 1, so that the factor
# 1 - scale stays positive; what a crop or a hole may measure is known once an image is there.
_RANGES = {
    "flip": (0, 1),
    "crop_padding": (0, math.inf),
    "shift": (0, 1),
    "scale": (0, 0.99),
    "rotate": (0, 180),
    "affine_p": (0, 1),
    "hole": (0, math.inf),
    "hole_p": (0, 1),
}


@dataclass(frozen=True)
class Policy:
    """What may happen to a training image. The default policy does nothing.

    Attributes:
        flip: probability of a horizontal flip.
        crop_padding: pixels added on each side before a window of the original size is cropped,
            every position being equally likely (He et al. 2015, arXiv:1512.03385).
        shift: largest shift as a fraction of the side; uniform, continuous, each axis by itself.
        scale: the zoom factor is uniform in 1 - scale .. 1 + scale, one factor for both axes.
        rotate: the angle is uniform in -rotate .. rotate, in degrees, about the image's centre.
        affine_p: probability of shift, scale and rotation, all or none of them.
        border: what lies beyond the image, for crops and warps alike: "reflect_101" mirrors it
            without repeating the edge pixel (OpenCV's name), "constant" is black.
        hole: side in pixels of one square hole, wholly inside the image, every position being
            equally likely (after Cutout: DeVries and Taylor 2017, arXiv:1708.04552, whose hole may
            cross the border).
        hole_p: probability of the hole.
        fill: what the hole is filled with: "mean", the data's channel mean rounded to whole grey
            levels, or three grey levels of 0..255.

    Raises:
        ValueError: a field is of the wrong type or out of its range.
    """

    flip: float = 0.0
    crop_padding: int = 0
    shift: float = 0.0
    scale: float = 0.0
    rotate: float = 0.0
    affine_p: float = 1.0
    border: str = "reflect_101"
    hole: int = 0
    hole_p: float = 1.0
    fill: str | tuple[int, int, int] = "mean"

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name in _RANGES:
                check = check_whole if isinstance(field.default, int) else check_number
                value = check(field.name, getattr(self, field.name), *_RANGES[field.name])
                object.__setattr__(self, field.name, value)  # one of NumPy's as a plain one
        check_choice("border", self.border, BORDERS)
        if not (isinstance(self.fill, str) and self.fill == "mean"):
            object.__setattr__(self, "fill", _levels(self.fill))

    @property
    def warps(self) -> bool:
        """Whether any image can be shifted, scaled or rotated."""
        return self.affine_p > 0 and any((self.shift, self.scale, self.rotate))

    @property
    def cuts(self) -> bool:
        """Whether any image can get a hole."""
        return self.hole_p > 0 and self.hole > 0


def _levels(fill: Any) -> tuple[int, ...]:
    """Three grey levels as a tuple; JSON has them as a list."""
    try:
        red, green, blue = (check_whole("a level", level, 0, 255) for level in fill)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"fill must be 'mean' or three whole numbers from 0 to 255; got {fill!r}"
        ) from error
    return red, green, blue


POLICIES = {
    "none": Policy(),
    "flip": Policy(flip=0.5),
    # He et al.'s, as torchvision's RandomCrop(32, padding=4) and RandomHorizontalFlip() have it.
    "crop_flip": Policy(flip=0.5, crop_padding=4, border="constant"),
    # The same without black borders: more is left to see in a short training.
    "light": Policy(flip=0.5, crop_padding=4),
    # Half as far, as Jordan's trainings of under ten epochs have it (2024, arXiv:2404.00498).
    "gentle": Policy(flip=0.5, crop_padding=2),
    # Light, with a small hole in each image, for long trainings.
    "cutout": Policy(flip=0.5, crop_padding=4, hole=8),
    # tuning_CNN_for_CIFAR10 (Shashank Sane, 2025).
    "reference": Policy(
        flip=0.5, shift=0.0625, scale=0.10, rotate=10.0, affine_p=0.7, hole=16, hole_p=0.5
    ),
    # The same but for its holes.
    "warp": Policy(flip=0.5, shift=0.0625, scale=0.10, rotate=10.0, affine_p=0.7),
}


def get_policy(policy: str | Policy) -> Policy:
    """Return the policy of that name, or the policy itself.

    Raises:
        ValueError: no policy has that name; lists those there are.
    """
    if isinstance(policy, Policy):
        return policy
    check_choice("policy", policy, POLICIES)
    return POLICIES[policy]


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images normalised and nothing else, without random draws.

    Args:
        images: uint8 (N, H, W, 3), on any device.
        mean, std: as for `Batched`.

    Returns:
        float32 (N, 3, H, W) in channels_last memory, on the images' device.

    Raises:
        ValueError: as for `Batched`.
    """
    plain = Batched("none", mean, std).to(images.device)
    return plain.transform(images, torch.zeros(len(images), plain.DRAWS, device=images.device))


class Batched(nn.Module):
    """A policy for a whole batch at once, on the device where the images are.

    Calling it is `transform(images, draw(len(images), generator))`. All randomness is drawn on the
    CPU, so that every device augments alike; `transform` never makes the host wait for the device.

    Args:
        policy: a policy or its name.
        mean, std: three channel statistics each, of pixels scaled to 0..1.

    Raises:
        ValueError: an unknown policy, or invalid statistics.
    """

    #: Random numbers per image. As many for every policy, so that whatever is drawn from the
    #: generator next depends neither on the policy nor on what happened to an image.
    DRAWS = 11

    gain: Tensor
    bias: Tensor
    fill: Tensor

    def __init__(self, policy: str | Policy, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.policy = get_policy(policy)
        mean, std = _check_statistics(mean, std)
        fill = _fill_levels(self.policy, mean)
        # (x / 255 - mean) / std as one multiplication and one addition.
        self._constant("gain", [1 / (255 * s) for s in std])
        self._constant("bias", [-m / s for m, s in zip(mean, std, strict=True)])
        self._constant("fill", fill)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment and normalise a batch.

        Args:
            images: uint8 (N, H, W, 3), on any device.
            generator: a CPU generator; None is torch's default one.

        Returns:
            float32 (N, 3, H, W) in channels_last memory, on the images' device.

        Raises:
            ValueError: images of another dtype or shape, or too small for the policy; a generator
                that is not on the CPU.
        """
        if not isinstance(images, Tensor):
            raise ValueError(f"Expected a tensor of images, got {type(images).__name__}.")
        draws = self.draw(len(images), generator)
        return self.transform(images, draws.to(images.device))

    @classmethod
    def draw(cls, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw for `count` images all that can be random: float32 (count, DRAWS) in [0, 1), CPU."""
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(
                f"Expected a CPU generator, got one on {generator.device}: draws are made on the "
                "CPU, so that every device augments alike."
            )
        return torch.rand(count, cls.DRAWS, generator=generator, device="cpu")

    @staticmethod
    def set_flips(draws: Tensor, mirrored: Tensor) -> None:
        """Flip exactly the images in `mirrored`, if the policy flips at all.

        Args:
            draws: from `draw`; changed in place.
            mirrored: bool (N,).
        """
        draws[:, _FLIP] = torch.where(mirrored, 0.0, 1.0)

    def transform(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augment and normalise with given draws: nothing in here is random.

        Args:
            images: uint8 (N, H, W, 3).
            draws: float32 (N, DRAWS) in [0, 1), on the images' device, from `draw`.

        Returns:
            float32 (N, 3, H, W) in channels_last memory.

        Raises:
            ValueError: images of another dtype or shape, or too small for the policy; draws of
                another shape.
        """
        policy = self.policy
        _check_images(images, "NHWC", policy)
        if draws.shape != (len(images), self.DRAWS):
            expected = (len(images), self.DRAWS)
            raise ValueError(f"Expected draws of shape {expected}, got {tuple(draws.shape)}.")
        top, left, flip, warp, *geometry, cut, row, column = draws.unbind(1)
        # Contiguous rows rather than channels_last in between: with 3 channels several times
        # faster on a CPU.
        x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        if policy.crop_padding:
            x = _crop(x, policy, top, left)
        if policy.flip:
            x = _select(_each(flip < policy.flip), x.flip(3), x)
        if policy.warps:
            # Resampling would change the last digits of images that are not to be warped.
            x = _select(_each(warp < policy.affine_p), _warp(x, policy, *geometry), x)
        if policy.cuts:
            x = _select(_hole(x, policy, cut, row, column), self.fill, x)
        return (x * self.gain).add_(self.bias).contiguous(memory_format=torch.channels_last)

    def extra_repr(self) -> str:
        return str(self.policy)

    def _constant(self, name: str, values: Sequence[float]) -> None:
        tensor = torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
        self.register_buffer(name, tensor, persistent=False)


def albumentations_transform(
    policy: str | Policy, mean: Sequence[float], std: Sequence[float]
) -> albumentations.Compose:
    """Build a policy as an albumentations pipeline.

    Seed it with `set_random_state`, as `per_sample` does. In albumentations 2.0.8
    `Compose(seed=...)` and `set_random_seed` hand the same seed to every step, so that flip, warp
    and hole are all decided by one and the same number.

    Args:
        policy: a policy or its name.
        mean, std: three channel statistics each, of pixels scaled to 0..1.

    Returns:
        a callable: `transform(image=uint8 (H, W, 3) array)["image"]` is float32 (3, H, W).

    Raises:
        ValueError: an unknown policy, or invalid statistics. When called: an image of another dtype
            or shape, or too small for the policy.
        ImportError: albumentations cannot be imported.
    """
    A = _import_albumentations()
    import cv2

    policy = get_policy(policy)
    mean, std = _check_statistics(mean, std)
    borders = {"reflect_101": cv2.BORDER_REFLECT_101, "constant": cv2.BORDER_CONSTANT}
    border = {"border_mode": borders[policy.border], "fill": 0}

    steps = [A.Lambda(image=_named(_checked, layout="HWC", policy=policy), name="checked", p=1.0)]
    if policy.crop_padding:
        # A random crop of a padded image is a shift by whole pixels, which needs no image size.
        pixels = (-policy.crop_padding, policy.crop_padding)
        shift = {"translate_px": {"x": pixels, "y": pixels}}
        steps.append(A.Affine(**shift, interpolation=cv2.INTER_NEAREST, **border, p=1.0))
    if policy.flip:
        steps.append(A.HorizontalFlip(p=policy.flip))
    if policy.warps:
        steps.append(_shift_scale_rotate(A, policy, border))
    if policy.cuts:
        steps.append(
            A.CoarseDropout(
                num_holes_range=(1, 1),
                hole_height_range=(policy.hole, policy.hole),
                hole_width_range=(policy.hole, policy.hole),
                fill=_fill_levels(policy, mean),
                p=policy.hole_p,
            )
        )
    steps += [A.Normalize(mean=mean, std=std, max_pixel_value=255.0), A.ToTensorV2()]
    return A.Compose(steps, strict=True)


def torchvision_transform(
    policy: str | Policy, mean: Sequence[float], std: Sequence[float]
) -> v2.Compose:
    """Build a policy as a torchvision v2 pipeline. It draws from torch's default generator.

    Args:
        policy: a policy or its name.
        mean, std: three channel statistics each, of pixels scaled to 0..1.

    Returns:
        a callable: a uint8 (3, H, W) tensor, uint8 (H, W, 3) array or RGB PIL image in, float32
        (3, H, W) out.

    Raises:
        ValueError: an unknown policy, or invalid statistics. When called: an image of another dtype
            or shape, or too small for the policy.
    """
    from torchvision.transforms import v2

    policy = get_policy(policy)
    mean, std = _check_statistics(mean, std)
    steps = [v2.ToImage(), v2.Lambda(_named(_checked, layout="CHW", policy=policy))]
    if policy.crop_padding:
        steps.append(v2.Lambda(_named(_crop_one, policy=policy)))
    if policy.flip:
        steps.append(v2.RandomHorizontalFlip(policy.flip))
    if policy.warps:
        warp = v2.Lambda(_named(_warp_one, policy=policy))
        steps.append(v2.RandomApply([warp], policy.affine_p))
    if policy.cuts:
        cut = v2.Lambda(_named(_cut_one, side=policy.hole, fill=_fill_levels(policy, mean)))
        steps.append(v2.RandomApply([cut], policy.hole_p))
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    return v2.Compose([*steps, *normalise, v2.ToPureTensor()])


def per_sample(
    policy: str | Policy, mean: Sequence[float], std: Sequence[float], build: str
) -> Callable[[np.ndarray, int], Tensor]:
    """Return `apply(image, seed)` for one of the per-sample builds.

    What comes out depends on the image and the seed alone, not on what was augmented before or in
    which worker, and no global random state changes. It can be sent to spawned workers.

    Args:
        policy: a policy or its name.
        mean, std: three channel statistics each, of pixels scaled to 0..1.
        build: "albumentations" or "torchvision".

    Returns:
        a callable: (uint8 (H, W, 3) array, seed of at least 0) in, float32 (3, H, W) out.

    Raises:
        ValueError: an unknown build; whatever that build raises. When called: a seed below 0.
        ImportError: the build's library cannot be imported.
    """
    check_choice("per-sample build", build, _SAMPLERS)
    return _PerSample(policy, mean, std, build)


# ---- the batched build: x is float32 (N, 3, H, W) in grey levels, a draw is (N,) in [0, 1) ----


def _each(values: Tensor) -> Tensor:
    """One value an image, (N,), as (N, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def _select(where: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """torch.where by a lerp, which is exact at both ends and 4 to 8 times faster on a CPU."""
    return torch.lerp(other, chosen, where.float())


def _centred(draw: Tensor, limit: float) -> Tensor:
    """Uniform in -limit .. limit."""
    return (2 * draw - 1) * limit


def _position(draw: Tensor, count: int) -> Tensor:
    """Uniform in 0 .. count - 1, int64: in float32 the largest product too is below `count`."""
    return (draw * count).long()


def _crop(x: Tensor, policy: Policy, top: Tensor, left: Tensor) -> Tensor:
    padding, (height, width) = policy.crop_padding, x.shape[2:]
    padded = F.pad(x, (padding,) * 4, mode=_PAD_MODES[policy.border])
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, 3, rows, columns, H, W), a view
    index = torch.arange(len(x), device=x.device)
    top, left = (_position(draw, 2 * padding + 1) for draw in (top, left))
    return windows.permute(0, 2, 3, 1, 4, 5)[index, top, left]


def _warp(
    x: Tensor, policy: Policy, shift_x: Tensor, shift_y: Tensor, scale: Tensor, angle: Tensor
) -> Tensor:
    height, width = x.shape[2:]
    centre = ((width - 1) / 2, (height - 1) / 2)
    angle = _centred(angle, math.radians(policy.rotate))
    zoom = 1 + _centred(scale, policy.scale)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    # Output pixels, counted from the centre, with the shift taken back.
    x_out = torch.arange(width, device=x.device) - centre[0]
    y_out = torch.arange(height, device=x.device) - centre[1]
    x_out = x_out - _centred(shift_x, policy.shift * width)[:, None]
    y_out = y_out - _centred(shift_y, policy.shift * height)[:, None]
    # Input positions in units of the half side: a part for each column and a part for each row.
    # F.affine_grid computes the same several times slower, and in TF32 where that is allowed.
    across = torch.stack((cos[:, None] * x_out / centre[0], -sin[:, None] * x_out / centre[1]), 1)
    down = torch.stack((sin[:, None] * y_out / centre[0], cos[:, None] * y_out / centre[1]), 1)
    grid = (across[:, :, None, :] + down[:, :, :, None]).permute(0, 2, 3, 1)
    # align_corners puts -1 and 1 on the centres of the outermost pixels, so that "reflection"
    # is OpenCV's reflect-101.
    mode = _GRID_MODES[policy.border]
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=mode, align_corners=True)


def _hole(x: Tensor, policy: Policy, cut: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Where the holes are: bool (N, 1, H, W)."""
    height, width = x.shape[2:]
    rows = _inside(_position(row, height - policy.hole + 1), policy.hole, height)
    columns = _inside(_position(column, width - policy.hole + 1), policy.hole, width)
    rows = rows & (cut < policy.hole_p)[:, None]
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _inside(start: Tensor, length: int, side: int) -> Tensor:
    """Which of `side` positions lie in start .. start + length - 1: bool (N, side)."""
    offset = torch.arange(side, device=start.device) - start[:, None]
    return (offset >= 0) & (offset < length)


# ---- the albumentations build ----


def _import_albumentations() -> Any:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else it asks the package index on every import
    try:
        import albumentations
    except ImportError as error:
        raise ImportError(
            f"The albumentations build needs albumentations, which cannot be imported ({error}): "
            "install what requirements.txt lists, or use the build 'batched' or 'torchvision'."
        ) from error
    return albumentations


def _shift_scale_rotate(A: Any, policy: Policy, border: dict[str, Any]) -> albumentations.Affine:
    class ShiftScaleRotate(A.Affine):  # type: ignore[misc]  # albumentations is imported late
        """`A.Affine` cuts shifts down to whole pixels, which leaves half of a small range at 0."""

        def _get_translate_params(self, image_shape: tuple[int, ...]) -> dict[str, float]:
            sides = {"x": image_shape[1], "y": image_shape[0]}
            limits = self.translate_percent
            return {axis: self.py_random.uniform(*limits[axis]) * sides[axis] for axis in sides}

    shift = (-policy.shift, policy.shift)
    return ShiftScaleRotate(
        translate_percent={"x": shift, "y": shift},
        scale=(1 - policy.scale, 1 + policy.scale),
        rotate=(-policy.rotate, policy.rotate),
        keep_ratio=True,  # one factor for both axes
        **border,
        p=policy.affine_p,
    )


# ---- the torchvision build: an image is a uint8 tv_tensors.Image (3, H, W) ----


def _crop_one(image: Tensor, policy: Policy) -> Tensor:
    """v2.RandomCrop, but of the image's own size."""
    from torchvision.transforms.v2 import functional as T

    padding = policy.crop_padding
    top, left = torch.randint(2 * padding + 1, (2,)).tolist()
    padded = T.pad(image, [padding], padding_mode=_PAD_MODES[policy.border])
    return T.crop(padded, top, left, *image.shape[1:])


def _warp_one(image: Tensor, policy: Policy) -> Tensor:
    """v2.RandomAffine, but with a reflected border and shifts that aren't whole pixels."""
    from torchvision.transforms.v2 import functional as T

    height, width = image.shape[1:]
    shift_x, shift_y, scale, angle = _centred(torch.rand(4), 1.0).tolist()
    warp = partial(
        T.affine,
        angle=angle * policy.rotate,
        translate=[shift_x * policy.shift * width, shift_y * policy.shift * height],
        scale=1 + scale * policy.scale,
        shear=[0.0, 0.0],
        interpolation=T.InterpolationMode.BILINEAR,
    )
    if policy.border == "constant":
        return warp(image)
    padding = _reach(policy, height, width)
    padded = T.pad(image, padding, padding_mode=_PAD_MODES[policy.border])
    return T.center_crop(warp(padded), [height, width])


def _reach(policy: Policy, height: int, width: int) -> list[int]:
    """How many pixels beyond the image a warp may look: [horizontally, vertically]."""
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    corner_x, corner_y = centre_x + policy.shift * width, centre_y + policy.shift * height
    limit = math.radians(policy.rotate)

    def furthest(along: float, across: float) -> float:
        angle = min(limit, math.atan2(across, along))  # where along*cos + across*sin is largest
        reach = along * math.cos(angle) + across * math.sin(angle)
        return reach / (1 - policy.scale)

    padding = [
        math.ceil(furthest(corner_x, corner_y) - centre_x) + 1,
        math.ceil(furthest(corner_y, corner_x) - centre_y) + 1,
    ]
    if padding[0] >= width or padding[1] >= height:
        raise ValueError(
            f"The torchvision build cannot reflect {max(padding)} pixels beyond an image of "
            f"{height} x {width}: choose a smaller shift, scale or rotation, or another build."
        )
    return padding


def _cut_one(image: Tensor, side: int, fill: tuple[int, int, int]) -> Tensor:
    """v2.RandomErasing, but of a fixed size, which may be the whole image."""
    from torchvision.transforms.v2 import functional as T

    height, width = image.shape[1:]
    top = int(torch.randint(height - side + 1, ()))
    left = int(torch.randint(width - side + 1, ()))
    value = torch.tensor(fill, dtype=image.dtype).view(3, 1, 1)
    return T.erase(image, top, left, side, side, value)


def _named(function: Callable, **settings: Any) -> Callable:
    """`functools.partial` that a printed pipeline shows by its name."""
    step: Any = partial(function, **settings)
    step.__name__ = function.__name__.strip("_")
    return step


# ---- seeds ----


class _PerSample:
    """See `per_sample`. Pickled as its arguments: albumentations' part is made where it's used."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        *description, build = arguments
        make, self.sample = _SAMPLERS[build]
        self.transform = make(*description)

    def __call__(self, image: np.ndarray, seed: int) -> Tensor:
        return self.sample(self.transform, image, check_whole("seed", seed, 0))

    def __reduce__(self) -> tuple[Any, ...]:
        return _PerSample, self.arguments


def _sample_albumentations(transform: Any, image: np.ndarray, seed: int) -> Tensor:
    # One state shared by all steps, see albumentations_transform.
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return transform(image=image)["image"]


def _sample_torchvision(transform: Any, image: np.ndarray, seed: int) -> Tensor:
    # torch's CPU generator keeps the low 32 bits of a seed only; this lets all of them count.
    state = np.random.SeedSequence(seed).generate_state(1, np.uint32)
    # Only the CPU's generator is seeded: torch.manual_seed would seed the accelerators' as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(state[0]))
        return transform(image)


_SAMPLERS = {
    "albumentations": (albumentations_transform, _sample_albumentations),
    "torchvision": (torchvision_transform, _sample_torchvision),
}


# ---- checks ----


def _fill_levels(policy: Policy, mean: Sequence[float]) -> tuple[int, ...]:
    """The grey levels of a hole; whole ones, since two of the builds fill uint8 images."""
    return tuple(round(255 * m) for m in mean) if isinstance(policy.fill, str) else policy.fill


def _check_statistics(
    mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std as tuples of three floats."""
    checked = []
    for name, values, valid in (
        ("mean", mean, lambda value: 0 <= value <= 1),
        ("std", std, lambda value: 0 < value <= 1),
    ):
        try:
            numbers = tuple(float(value) for value in values)
        except (TypeError, ValueError):
            numbers = ()
        if len(numbers) != 3 or not all(map(valid, numbers)):
            raise ValueError(
                f"{name} must be three numbers of pixels scaled to 0..1 (a std is above 0); "
                f"got {values!r}."
            )
        checked.append(numbers)
    return checked[0], checked[1]


def _check_images(images: Tensor | np.ndarray, layout: str, policy: Policy) -> None:
    """Check dtype and shape, `layout` naming the axes, and that the policy fits the size."""
    dtype, shape = str(images.dtype).removeprefix("torch."), tuple(images.shape)
    sizes = dict(zip(layout, shape, strict=False))  # a length that is off is named below
    if dtype != "uint8" or len(shape) != len(layout) or sizes["C"] != 3:
        axes = ", ".join("3" if axis == "C" else axis for axis in layout)
        raise ValueError(f"Expected uint8 images of shape ({axes}), got {dtype} of shape {shape}.")
    height, width = sizes["H"], sizes["W"]
    side, size = min(height, width), f"an image of {height} x {width}"
    if side < 2:
        raise ValueError(f"Expected images of at least 2 x 2 pixels, got {size}.")
    if policy.hole > side:
        raise ValueError(f"A hole of {policy.hole} pixels does not fit into {size}.")
    if policy.border != "constant" and policy.crop_padding >= side:
        raise ValueError(f"Cannot reflect {policy.crop_padding} pixels beyond {size}.")


def _checked(
    image: Tensor | np.ndarray, layout: str, policy: Policy, **_: Any
) -> Tensor | np.ndarray:
    """`_check_images` as the first step of a pipeline."""
    _check_images(image, layout, policy)
    return image
