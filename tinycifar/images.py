"""An image of any kind, as the networks take it: small, square, upright, opaque, RGB.

    pixels = read_image("cat.jpg")              # uint8 (32, 32, 3)

Needs NumPy and Pillow alone.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

SIDE = 32  # of the images that the networks are trained on, in pixels
BACKGROUND = "white"  # what shows through transparent pixels, as in most viewers

ORIENTATION = 0x0112  # the tag of EXIF; 1 is upright, and this turns the others:
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The factor by which a PNG's samples become 8 bits. Pillow doesn't scale the transparent one.
_TO_8_BITS: dict[Any, float] = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}


def read_image(
    image: str | os.PathLike[str] | IO[bytes] | Image.Image | np.ndarray,
) -> np.ndarray:
    """Any image as uint8 RGB pixels (32, 32, 3).

    It is turned upright by its EXIF orientation, composed on white where it is transparent, its
    shorter side scaled to 32 (bicubic), and its centre cropped.

    Args:
        image: a path, an open file, such as io.BytesIO(data), a PIL image, or uint8 pixels of shape
            (H, W) or (H, W, 1), which are grey, (H, W, 3), RGB, or (H, W, 4), RGBA. OpenCV's are
            BGR: give `image[..., ::-1]`.

    Raises:
        FileNotFoundError: no such image.
        ValueError: the image can't be read, is too large, or has a wrong shape or type.
    """
    name = "this image"
    if isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
        if not Path(name).is_file():
            raise FileNotFoundError(f"no image at {name}")
    elif isinstance(image, np.ndarray):
        image = _from_array(image)
    elif not isinstance(image, Image.Image) and not hasattr(image, "read"):
        raise ValueError(
            "an image is a path, an open file, a PIL image or a uint8 array of shape (H, W, 3); "
            f"got {type(image).__name__}"
        )
    try:
        rgb = _as_rgb(image if isinstance(image, Image.Image) else Image.open(image))
        return np.array(ImageOps.fit(rgb, (SIDE, SIDE), Image.Resampling.BICUBIC))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise ValueError(
            f"{name} is too large to be read: shrink it to 80 megapixels or fewer"
        ) from error
    except Exception as error:  # of a damaged file, Pillow raises whatever it trips over
        raise ValueError(
            f"{name} can't be read as an image (expected PNG, JPEG or the like): {error}"
        ) from error


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    right_shape = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not right_shape or 0 in pixels.shape:
        raise ValueError(
            "pixels must be uint8 of shape (H, W, 3) in RGB, (H, W, 4) in RGBA or (H, W) in grey; "
            f"got {pixels.dtype} of shape {tuple(pixels.shape)}"
        )
    return Image.fromarray(pixels)


def _as_rgb(image: Image.Image) -> Image.Image:
    """The whole image upright, opaque, and in RGB."""
    grey_16 = image.mode == "I;16" and isinstance(image, PngImageFile)  # of which 65,535 is white
    if (image.mode in ("I", "F") or image.mode.startswith("I;")) and not grey_16:
        raise ValueError(
            f"mode {image.mode!r} doesn't say which value is white: scale its pixels to 0..255 and "
            "give them as a uint8 array"
        )
    if 0 in image.size:
        raise ValueError("it has no pixels")
    transparent = _transparent_colour(image)
    image.load()
    if transparent is not None:  # as its pixels are from now on, for the next time as well
        image.info["transparency"] = transparent
    turn = _turn(image)
    image = image.copy() if turn is None else image.transpose(turn)  # the caller's stays as it is
    if grey_16:
        key = image.info.get("transparency")
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if key is not None:
            image.info["transparency"] = key >> 8
    if not image.has_transparency_data:
        return image.convert("RGB")
    # Before anything is scaled, which would mix in the colours of what can't be seen.
    rgba = image.convert("LA" if image.mode == "La" else image.mode).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, BACKGROUND), rgba).convert("RGB")


def _transparent_colour(image: Image.Image) -> int | tuple[int, ...] | None:
    """The transparent colour of a PNG whose samples are to be scaled to 8 bits, scaled too."""
    if not isinstance(image, PngImageFile) or not image.tile:  # or it is loaded already
        return None
    factor, colour = _TO_8_BITS.get(image.tile[0].args), image.info.get("transparency")
    if factor is None or colour is None:
        return None
    return tuple(int(c * factor) for c in colour) if factor < 1 else int(colour * factor)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The turn that its EXIF or XMP asks for, even if the rest of them is damaged."""
    with suppress(Exception):  # Pillow raises whatever it trips over
        return _UPRIGHT.get(image.getexif()[ORIENTATION])
    with suppress(Exception):  # at a field that points beyond the end, Pillow stops reading
        return _UPRIGHT.get(_orientation(image.info["exif"].removeprefix(b"Exif\0\0")))
    return None


def _orientation(tiff: bytes) -> int:
    """That of EXIF data, which is laid out like a TIFF file: one field of 12 bytes a tag."""
    order = {b"II*\0": "<", b"MM\0*": ">"}[tiff[:4]]
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    fields = (struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * i) for i in range(count))
    return next(value for tag, _, _, value in fields if tag == ORIENTATION)
