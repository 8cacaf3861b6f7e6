"""Images classified without torch: with ONNX Runtime, NumPy and Pillow alone.

    network = load_onnx("net.onnx")                     # what `make export` writes
    network(images)                                     # probabilities of uint8 (N, 32, 32, 3)
    for path, result in classify(image_files("photos"), network):
        ...

`classify` and `write_csv` take any network that is called so; `weights.TorchNetwork` is another.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TextIO

import numpy as np

from tinycifar.images import SIDE, read_image

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff"),
    *(".webp", ".heic", ".heif"),  # the last two, of phones, Pillow can't read: they are named
)


class Network(Protocol):
    """uint8 RGB images (N, 32, 32, 3) in, their probabilities, float32 (N, classes), out."""

    classes: tuple[str, ...]

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


class OnnxNetwork:
    """A network that `make export` wrote, float or int8, run by ONNX Runtime on the CPU.

    Attributes:
        classes: their names, in the order of the probabilities.
        metadata: all that the file says of itself: run, recipe, accuracy, licence, ...

    Raises:
        FileNotFoundError: no such file.
        ValueError: it isn't an ONNX file, or not one of ours.
        ImportError: onnxruntime isn't installed.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                f"ONNX Runtime is needed and can't be imported ({error}): pip install onnxruntime"
            ) from error
        if not Path(file).is_file():
            raise FileNotFoundError(f"no ONNX file at {file}: make export writes one")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        try:
            self._session = onnxruntime.InferenceSession(
                os.fspath(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its own kinds have no other base
            raise ValueError(
                f"{file} can't be loaded as an ONNX network: it is damaged, or of another kind; "
                "make export writes one"
            ) from error
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        takes = [(i.name, i.type, i.shape[1:]) for i in self._session.get_inputs()]
        ours = takes == [("images", "tensor(uint8)", [SIDE, SIDE, 3])]
        if not ours or self.metadata.get("producer") != "tinycifar":
            raise ValueError(
                f"{file} was not written by make export: expected an input `images`, uint8 "
                f"(N, {SIDE}, {SIDE}, 3), and metadata that name tinycifar as the producer"
            )
        self.classes: tuple[str, ...] = tuple(json.loads(self.metadata["classes"]))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Probabilities, float32 (N, classes), of RGB images, uint8 (N, 32, 32, 3).

        Raises:
            ValueError: the images are of another shape or type.
        """
        check_pixels(images)
        return self._session.run(["probabilities"], {"images": images})[0]


load_onnx = OnnxNetwork


def check_pixels(images: np.ndarray) -> None:
    """Raise a ValueError unless they are uint8 (N, 32, 32, 3), as a Network takes them."""
    if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(
            f"images must be uint8 of shape (N, {SIDE}, {SIDE}, 3); "
            f"got {images.dtype} of shape {images.shape}: see images.read_image"
        )


def likeliest(
    probabilities: np.ndarray, classes: Sequence[str], top: int
) -> list[tuple[str, float]]:
    """The `top` likeliest classes of one image, with their probabilities, likeliest first."""
    best = np.argsort(-probabilities, kind="stable")[:top]
    return [(classes[i], float(probabilities[i])) for i in best]


def image_files(*names: str | os.PathLike[str]) -> list[Path]:
    """The files named, and all images below the folders named (by their suffix), in order.

    What is hidden in a folder, by a dot at its name's beginning, is left out.

    Raises:
        FileNotFoundError: a folder holds none. ValueError: a name is empty.
    """
    if "" in names:  # which a path takes for the working folder
        raise ValueError("the name of an image is empty: give a file or a folder")
    files: list[Path] = []
    for path in map(Path, names):
        found = [path]
        if path.is_dir():
            inside = (file for file in path.rglob("*") if file.is_file())
            found = sorted(file for file in inside if _is_image(file.relative_to(path)))
            if not found:
                raise FileNotFoundError(f"no images in {path}: looked for {', '.join(SUFFIXES)}")
        files += found
    return files


def _is_image(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return file.suffix.lower() in SUFFIXES and not hidden


def classify(
    files: Iterable[str | os.PathLike[str]], network: Network, batch_size: int = 256
) -> Iterator[tuple[str | os.PathLike[str], np.ndarray | Exception]]:
    """Each file with its probabilities, float32 (classes,), or with the error that reading it gave.

    Images are read by `images.read_image` in several threads, and classified in batches: memory
    doesn't grow with their number.

    Raises:
        TypeError: a single name instead of several.
    """
    if isinstance(files, str | os.PathLike):
        raise TypeError(f"classify takes a list of files, also for one: [{os.fspath(files)!r}]")
    files = [*files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            read = list(pool.map(_read, batch))
            images = [image for image in read if isinstance(image, np.ndarray)]
            probabilities = iter(network(np.stack(images)) if images else ())
            for file, image in zip(batch, read, strict=True):
                yield file, image if isinstance(image, Exception) else next(probabilities)


def _read(file: str | os.PathLike[str]) -> np.ndarray | Exception:
    try:
        return read_image(file)
    except (OSError, ValueError) as error:
        return error


def write_csv(
    files: Sequence[str | os.PathLike[str]], network: Network, to: TextIO, batch_size: int = 256
) -> int:
    """Write a row an image: path, class, its probability, and the probability of each class.

    An image that can't be read is named on stderr and has no row. A terminal shows the progress.
    A text file such as sys.stdout is set to UTF-8, for any name of a file.

    Returns:
        how many images could not be read.
    """
    from tqdm import tqdm

    if isinstance(to, io.TextIOWrapper):
        to.reconfigure(encoding="utf-8", errors="surrogateescape")
    rows = csv.writer(to, lineterminator="\n")
    rows.writerow(["path", "class", "probability", *network.classes])
    skipped = 0
    hidden = True if to.isatty() else None  # None: hidden unless stderr is a terminal
    with tqdm(total=len(files), unit=" images", disable=hidden) as bar:
        for file, result in classify(files, network, batch_size):
            if isinstance(result, Exception):
                skipped += 1
                bar.write(f"skipped: {result}", file=sys.stderr)
            else:
                best, texts = int(result.argmax()), [f"{p:.6f}" for p in result]
                rows.writerow([os.fspath(file), network.classes[best], texts[best], *texts])
            bar.update()
    return skipped
