"""images.py: an image of any kind becomes the same pixels wherever it comes from, or is refused."""

import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tinycifar.images import read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
WHITE = [255, 255, 255]


def as_before(image):
    """What was done with an opaque, upright image before this module was."""
    return np.array(ImageOps.fit(image.convert("RGB"), (32, 32), Image.Resampling.BICUBIC))


def test_it_needs_no_torch():
    script = (
        "import sys, tinycifar.images; assert not {'torch', 'torchvision'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_an_opaque_image_is_scaled_and_cropped(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    pixels = read_image(image)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (32, 32, 3))
    assert np.array_equal(pixels, as_before(image))


def test_a_path_an_image_and_an_array_are_read_alike(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "an image.png")
    path, bgr = tmp_path / "an image.png", PIXELS[..., ::-1].copy()
    for image in (path, str(path), Image.open(path), PIXELS, bgr[..., ::-1]):
        assert np.array_equal(read_image(image), as_before(Image.fromarray(PIXELS)))


@pytest.mark.parametrize("shape", [(7, 5, 3), (400, 300, 3), (1, 90), (64, 64, 1), (33, 33, 4)])
def test_any_size_and_number_of_channels(shape):
    image = np.full(shape, 200, dtype=np.uint8)
    if shape[2:] == (4,):
        image[..., 3] = 255
    assert (read_image(image) == 200).all()


# ---------------------------------------------------------------------------------- transparency


def cut_out(hidden):
    """Green, and a transparent half of a hidden colour: RGBA, in a shape that is scaled."""
    image = Image.new("RGBA", (96, 64), (0, 160, 0, 255))
    image.paste((*hidden, 0), (0, 0, 96, 32))
    return image


def palette(hidden, transparency):
    image = Image.new("P", (96, 64), 0)
    image.putpalette([*hidden, 0, 160, 0])
    image.paste(1, (0, 32, 96, 64))
    image.info["transparency"] = transparency
    return image


def keyed(image, colour):
    image.info["transparency"] = colour
    return image


def saved(image, kind):
    file = io.BytesIO()
    image.save(file, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    return Image.open(io.BytesIO(file.getvalue()))


def grey_alpha(hidden):
    luminance = Image.new("L", (96, 64), hidden[0])
    luminance.paste(100, (0, 32, 96, 64))
    return Image.merge("LA", (luminance, cut_out(hidden).getchannel("A")))


COLOUR = {
    "RGBA": cut_out,
    "RGBa": lambda hidden: cut_out(hidden).convert("RGBa"),
    "PA": lambda hidden: cut_out(hidden).convert("PA"),
    "RGB with a colour key": lambda hidden: keyed(cut_out(hidden).convert("RGB"), hidden),
    "a palette's index": lambda hidden: palette(hidden, 0),
    "a palette's alphas": lambda hidden: palette(hidden, b"\0\xff"),
    "an array": lambda hidden: np.array(cut_out(hidden)),
    "PNG": lambda hidden: saved(cut_out(hidden), "PNG"),
    "PNG with a colour key": lambda hidden: saved(COLOUR["RGB with a colour key"](hidden), "PNG"),
    "PNG with a palette": lambda hidden: saved(palette(hidden, b"\0\xff"), "PNG"),
    "GIF": lambda hidden: saved(palette(hidden, 0), "GIF"),
    "TIFF": lambda hidden: saved(cut_out(hidden), "TIFF"),
    "WebP": lambda hidden: saved(cut_out(hidden), "WEBP"),
}
GREY = {
    "LA": grey_alpha,
    "La": lambda hidden: grey_alpha(hidden).convert("La"),
    "L with a key": lambda hidden: keyed(grey_alpha(hidden).convert("L"), hidden[0]),
}


@pytest.mark.parametrize(
    ("make", "seen"),
    [(make, [0, 160, 0]) for make in COLOUR.values()] + [(g, [100] * 3) for g in GREY.values()],
    ids=[*COLOUR, *GREY],
)
@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 0, 255), (250, 250, 250)])
def test_what_is_transparent_is_white_whatever_colour_it_hides(make, seen, hidden):
    pixels = read_image(make(hidden))
    assert np.array_equal(pixels, read_image(make((7, 0, 7)))), "the hidden colour shows"
    assert (pixels[:14] == WHITE).all() and (pixels[18:] == seen).all()


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 128))
    assert np.unique(read_image(image).reshape(-1, 3), axis=0).tolist() == [[255, 127, 127]]


def png(depth, colour_type, samples, transparent):
    """One of 8 x 8, with rows of `samples`; Pillow writes none of less or more than 8 bits."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, colour_type, 0, 0, 0)),
        (b"tRNS", transparent),
        (b"IDAT", zlib.compress(8 * (b"\0" + samples))),
        (b"IEND", b""),
    ]
    chunks = [(struct.pack(">I", len(data)), name + data) for name, data in chunks]
    packed = [size + body + struct.pack(">I", zlib.crc32(body)) for size, body in chunks]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


@pytest.mark.parametrize(
    "file",
    [
        png(1, 0, b"\x0f", b"\0\0"),
        png(2, 0, b"\x55\xff", b"\0\1"),
        png(4, 0, 2 * b"\x99" + 2 * b"\xff", b"\0\x09"),
        png(16, 2, 4 * b"\x80\x01\x40\x02\0\3" + 24 * b"\xff", b"\x80\x01\x40\x02\0\3"),
        png(16, 0, 4 * b"\x80\x01" + 8 * b"\xff", b"\x80\x01"),
    ],
    ids=["1 bit", "2 bits", "4 bits", "16 bits", "16 bits of grey"],
)
def test_the_transparent_colour_of_a_png_of_any_depth(file):
    """All that isn't transparent in these is white as well."""
    image = Image.open(file)
    for _ in ("first", "again, now that its pixels are loaded"):
        assert (read_image(image) == 255).all()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_grey_png_of_16_bits_is_read_as_one_of_8(tmp_path, orientation):
    eight, tags = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8), Image.Exif()
    tags[0x0112] = orientation
    for name, pixels in (("8.png", eight), ("16.png", eight.astype(np.uint16) * 257)):
        Image.fromarray(pixels).save(tmp_path / name, exif=tags)
    assert np.array_equal(read_image(tmp_path / "16.png"), read_image(tmp_path / "8.png"))


def test_the_callers_image_stays_as_it_is():
    image = palette((0, 0, 0), b"\0\xff")
    read_image(image)
    assert image.getpalette("RGBA")[:8] == [0, 0, 0, 255, 0, 160, 0, 255]
    assert image.info == {"transparency": b"\0\xff"}


# --------------------------------------------------------------------------------- orientation

ON_ITS_SIDE = np.zeros((40, 80, 3), dtype=np.uint8)
ON_ITS_SIDE[:, :40], ON_ITS_SIDE[:20, 40:, 1] = 200, 90
UPRIGHT = np.rot90(ON_ITS_SIDE, -1)
ORIENTATION_6 = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


def exif(*fields):
    """Fields (tag, type, count, four bytes: the value, or where it is)."""
    packed = [struct.pack("<HHI4s", *field) for field in sorted(fields)]
    start = struct.pack("<4sIH", b"II*\0", 8, len(fields))
    # What follows is a signed rational of -1/0, at this offset:
    assert len(start + b"".join(packed) + bytes(4)) == after(len(fields))
    return b"Exif\0\0" + start + b"".join(packed) + bytes(4) + struct.pack("<ii", -1, 0)


def after(fields):
    return 10 + 12 * fields + 4


def offset(where):
    return struct.pack("<I", where)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "field",
    [
        (0x011A, 10, 1, offset(after(2))),
        (0x011A, 2, 4, b"abc\0"),
        (0x8769, 2, 4, b"abc\0"),
        (0x8769, 12, 1, offset(after(2))),
        (0x8825, 4, 1, offset(9_999)),
        (0x010F, 2, 8, offset(9_999)),
        (0x0100, 99, 1, bytes(4)),
        (0x9286, 7, 0, bytes(4)),
    ],
    ids=["-1/0", "text", "text for a place", "a float for a place", "beyond the end",
         "before it, beyond the end", "unknown type", "empty"],
)  # fmt: skip
def test_an_image_on_its_side_is_turned_whatever_else_its_exif_holds(kind, field):
    file = io.BytesIO()
    more = {"quality": 95} if kind == "JPEG" else {"lossless": True}
    Image.fromarray(ON_ITS_SIDE).save(file, kind, exif=exif(ORIENTATION_6, field), **more)
    difference = read_image(Image.open(file)).astype(int) - read_image(UPRIGHT)
    assert abs(difference).mean() < 2


def test_an_image_on_its_side_is_turned_by_big_endian_exif_too():
    """As many cameras write it; Pillow stops at the field before, which points beyond the end."""
    fields = struct.pack(">HHII", 0x010F, 2, 8, 9_999) + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    image = Image.fromarray(ON_ITS_SIDE)
    image.info["exif"] = b"Exif\0\0" + struct.pack(">4sIH", b"MM\0*", 8, 2) + fields + bytes(4)
    assert np.array_equal(read_image(image), read_image(UPRIGHT))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_every_orientation(orientation, kind):
    image, tags = Image.fromarray(ON_ITS_SIDE), Image.Exif()
    tags[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=tags)
    expected = ImageOps.exif_transpose(Image.open(file))
    assert np.array_equal(read_image(Image.open(file)), as_before(expected))


def test_an_orientation_in_xmp_alone():
    image = Image.fromarray(ON_ITS_SIDE)
    image.info["xmp"] = b'<rdf:Description tiff:Orientation="6"/>'
    assert np.array_equal(read_image(image), read_image(UPRIGHT))


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage", b"Exif\0\0II*\0", b"Exif\0\0" + bytes(60), exif()[:-20], exif()],
)
def test_exif_beyond_reading_leaves_the_image_as_it_is(data):
    image = Image.fromarray(ON_ITS_SIDE)
    image.info["exif"] = data
    assert np.array_equal(read_image(image), read_image(ON_ITS_SIDE))


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((3, 32, 32), dtype=np.uint8), r"got uint8 of shape \(3, 32, 32\)"),
        (np.zeros((32, 32, 3)), r"got float64 of shape \(32, 32, 3\)"),
        (np.zeros((32, 32), dtype=bool), r"got bool of shape \(32, 32\)"),
        (np.zeros((32, 32, 3), dtype=np.uint16), r"got uint16 of shape"),
        (np.zeros((1, 32, 32, 3), dtype=np.uint8), r"got uint8 of shape \(1, 32, 32, 3\)"),
        (np.zeros((0, 32, 3), dtype=np.uint8), r"\(0, 32, 3\)"),
        ([[0, 0], [0, 0]], "got list"),
        (io.BytesIO(), "this image can't be read as an image"),
        (42, "got int"),
        (Image.new("RGB", (0, 5)), "it has no pixels"),
        (Image.new("F", (8, 8)), "mode 'F' doesn't say which value is white"),
        (Image.new("I", (8, 8)), "mode 'I' doesn't say which value is white"),
        (Image.new("I;16", (8, 8)), "mode 'I;16' doesn't say .* as a uint8 array"),
    ],
)
def test_what_is_no_image_is_refused_by_what_it_is(image, says):
    with pytest.raises(ValueError, match=says):
        read_image(image)


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.effect_noise((300, 300), 90).save(tmp_path / "torn.png")  # in several chunks
    start, first, rest = (tmp_path / "torn.png").read_bytes().split(b"IDAT", 2)
    (tmp_path / "torn.png").write_bytes(start + b"IDAT" + first + b"I\0AT" + rest)
    Image.effect_noise((300, 300), 90).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:5000])
    (tmp_path / "empty.gif").touch()
    for name in ("broken.png", "torn.png", "cut.jpg", "empty.gif"):
        with pytest.raises(ValueError, match=rf"{name} can't be read as an image \(expected PNG"):
            read_image(tmp_path / name)
    for name in ("absent.png", "."):
        with pytest.raises(FileNotFoundError, match="no image at"):
            read_image(tmp_path / name)


def test_an_image_of_210_megapixels_is_to_be_shrunk(tmp_path):
    """Its header alone: nothing is decoded."""
    file = bytearray(png(8, 2, 24 * b"\0", bytes(6)).getvalue())
    struct.pack_into(">II", file, 16, 15_000, 14_000)
    struct.pack_into(">I", file, 29, zlib.crc32(file[12:29]))
    (tmp_path / "huge.png").write_bytes(file)
    with pytest.raises(ValueError, match=r"huge\.png is too large .*: shrink it to 80 megapixels"):
        read_image(tmp_path / "huge.png")


def test_a_large_image_is_read(tmp_path, monkeypatch):
    """Over the size at which Pillow warns; where warnings are errors, it is too large."""
    Image.fromarray(PIXELS).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_500)
    with pytest.warns(Image.DecompressionBombWarning):
        assert np.array_equal(read_image(tmp_path / "large.png"), read_image(PIXELS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"large\.png is too large"):
            read_image(tmp_path / "large.png")
