"""Images in: CIFAR-10 or its built-in stand-in, the split, exact channel statistics.

    data = load()                                   # real CIFAR-10, or the stand-in `shapes`
    train, val = split(data.train_labels)           # 45,000 / 5,000, stratified
    stats = channel_stats(data.train_images[train]) # mean and std of 0..1 pixels

The files of CIFAR-10 are read by cifar10.py; `shapes` is drawn by shapes.py.
"""

from __future__ import annotations

import hashlib
import math
import os
import reprlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tinycifar.checks import DataError, DataUnavailable, check_choice, check_whole
from tinycifar.images import SIDE
from tinycifar.shapes import SHAPES, Arrays, draw_shapes

DATASETS = ("auto", "cifar10", "shapes")
PROTOCOLS = {
    "val": "a tenth of the training set (5,000 of CIFAR-10's 50,000) is held back as validation, "
    "and everything is chosen on it",
    "full": "the whole training set, fixed epochs, last weights; nothing is chosen",
    "test-selected": "the whole training set; schedule, stopping and epoch are chosen ON TEST, "
    "as the published reference did",
}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZES = {"cifar10": 50_000, "shapes": 10_000}  # training images; a fifth as many for testing

BANNER = """\
################################################################################
#                                                                              #
#   THIS IS NOT CIFAR-10.  It isn't here and can't be downloaded just now, so  #
#   `shapes` takes its place: ten classes of images drawn by code.             #
#   Nothing measured on them says anything about CIFAR-10.                     #
#                                                                              #
#   For the real data, set CIFAR10_ROOT to the folder that holds               #
#   cifar-10-batches-py, or put cifar-10-python.tar.gz into data/.             #
#                                                                              #
################################################################################"""


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in memory: from `load`, or your own, which `DataSplits` checks."""

    name: str  #: "cifar10" or "shapes", or the name of your own
    classes: tuple[str, ...]  #: names, by label, no two alike
    train_images: np.ndarray  #: uint8 (N, 32, 32, 3), RGB
    train_labels: np.ndarray  #: int64 (N,)
    test_images: np.ndarray  #: uint8 (M, 32, 32, 3), RGB
    test_labels: np.ndarray  #: int64 (M,)
    limit: int | None = None  #: number of training images asked for; None is all

    @cached_property
    def checksum(self) -> str:
        """sha256, hexadecimal, over the four arrays: what tells one data set from another."""
        sums = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            sums.update(np.ascontiguousarray(array).data)
        return sums.hexdigest()

    @property
    def title(self) -> str:
        """What every figure says about its data."""
        return title(self.name, self.limit)


@dataclass(frozen=True)
class Stats:
    """Per-channel mean and population standard deviation of pixels scaled to 0..1, in RGB order."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load(
    dataset: str = "auto",
    root: str | os.PathLike | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> Data:
    """Load CIFAR-10 or its stand-in.

    Args:
        dataset: "cifar10" is the real data set and nothing else. "shapes" is ten classes of
            coloured shapes drawn by code, the same bits every time, 10,000 for training and
            2,000 for testing. "auto" is CIFAR-10 where it is on the disk or its host answers
            within seconds; else it prints a banner and is "shapes".
        root: the folder that holds `cifar-10-batches-py`, or the archive
            `cifar-10-python.tar.gz`, or to which CIFAR-10 is downloaded; or either of the two
            itself. None is the environment variable CIFAR10_ROOT, else `data`. A relative one
            counts as in `paths.absolute`.
        limit: use so many training images, the first of each class, and a fifth as many for
            testing; at least 100, so that 10 % for validation still hold every class.
        progress: show a bar on stderr while downloading.

    Raises:
        DataError: the data set is unknown, can't be had, or a file of it is missing, truncated
            or altered (also under "auto": a damaged copy is never passed over in silence).
        ValueError: the limit isn't a whole number in range.
    """
    if not isinstance(dataset, str) or dataset not in DATASETS:
        raise DataError(
            f"dataset {reprlib.repr(dataset)} is unknown: choose one of {', '.join(DATASETS)}; "
            "`train` also takes a data.Data."
        )
    _check_limit(limit, "shapes" if dataset == "shapes" else "cifar10")
    if dataset != "shapes":
        from tinycifar.cifar10 import read_cifar10  # torchvision, which takes seconds

        try:
            return _pack("cifar10", CLASSES, read_cifar10(root, progress), limit)
        except DataUnavailable:
            if dataset == "cifar10":
                raise
        print(BANNER)
        _check_limit(limit, "shapes")
    return _pack("shapes", SHAPES, draw_shapes(limit or SIZES["shapes"]), limit)


def title(name: str, limit: int | None = None) -> str:
    """What figures and tables call a data set, so that none passes for another."""
    titles = {"cifar10": "CIFAR-10", "shapes": "shapes (stand-in, NOT CIFAR-10)"}
    title = titles.get(name, f"{name} (NOT CIFAR-10)")
    return title if limit is None else f"{title}, {limit:,} training images"


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split off a tenth for validation, of every class to the nearest image; always the same.

    Args:
        labels: integers (N,).

    Returns:
        Indices of the training and of the validation images, int64, each sorted.

    Raises:
        ValueError: the labels aren't a list of integers, or a tenth can't hold one image of each
            class.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise _unlike("labels must be a one-dimensional array of integers", labels)
    classes, counts = np.unique(labels, return_counts=True)
    if len(labels) < 10 * len(classes) or not len(labels):
        raise ValueError(
            f"{len(labels)} images of {len(classes)} classes can't be split into images to train "
            f"on and a tenth for validation: at least {10 * len(classes)} are needed"
        )
    # Largest remainders: the rounded shares add up to a tenth.
    n_val = len(labels) // 10
    quota, remainder = np.divmod(counts * n_val, len(labels))
    quota[np.argsort(-remainder, kind="stable")[: n_val - quota.sum()]] += 1

    # Sorting random keys, where `permutation` would do, since NumPy may change the latter's stream.
    order = np.argsort(np.random.default_rng(0).random(len(labels)), kind="stable")
    quotas = zip(classes, quota, strict=True)
    val = np.concatenate([order[labels[order] == name][:k] for name, k in quotas])
    return np.setdiff1d(np.arange(len(labels)), val), np.sort(val)


class DataSplits:
    """A data set as a protocol sees it: what trains, what selects, what tests.

    Attributes:
        data, protocol: what it was made from.
        train: images uint8 (N, 32, 32, 3) and labels int64 (N,), all of the training set.
        train_index: int64 (M,), sorted: which of these are trained on. (Indices, not copies: the
            images of CIFAR-10 take 180 MB, once.)
        selection: images and labels that schedule, stopping and the choice of the epoch may see;
            None under `full`.
        test: images and labels.
        stats: of the images trained on.

    Raises:
        ValueError: an unknown protocol, or data that isn't what `Data` says; see `split`.
    """

    def __init__(self, data: Data, protocol: str):
        check_choice("protocol", protocol, PROTOCOLS)
        _check_data(data)
        self.data, self.protocol = data, protocol
        self.train = images, labels = _tensor(data.train_images), _tensor(data.train_labels)
        self.test = _tensor(data.test_images), _tensor(data.test_labels)
        self.train_index = torch.arange(len(labels), device="cpu")
        self.selection: tuple[Tensor, Tensor] | None = None
        if protocol == "val":
            self.train_index, held_back = map(torch.from_numpy, split(data.train_labels))
            self.selection = images[held_back], labels[held_back]
        elif protocol == "test-selected":
            self.selection = self.test

    @cached_property
    def stats(self) -> Stats:
        return channel_stats(self.data.train_images, self.train_index.numpy())

    @property
    def sizes(self) -> dict[str, int]:
        """How many images each part has."""
        selection = 0 if self.selection is None else len(self.selection[1])
        return {"train": len(self.train_index), "selection": selection, "test": len(self.test[1])}


def check_images(name: str, images: np.ndarray | Tensor) -> None:
    """Raise a ValueError unless they are uint8 (N, 32, 32, 3), N at least 1."""
    right_shape = images.ndim == 4 and tuple(images.shape[1:]) == (SIDE, SIDE, 3)
    if _dtype(images) != "uint8" or not right_shape or not len(images):
        raise _unlike(
            f"{name} must be uint8 of shape (N, {SIDE}, {SIDE}, 3), N at least 1, as "
            "images.read_image makes each",
            images,
        )


def check_labels(name: str, labels: np.ndarray | Tensor, images: int, classes: int) -> None:
    """Raise a ValueError unless they are int64 (images,), each from 0 to classes - 1."""
    if _dtype(labels) != "int64" or tuple(labels.shape) != (images,):
        raise _unlike(f"{name} must be int64 of shape ({images},), one an image", labels)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{name} must be from 0 to {classes - 1}, as there are {classes} classes; got {low} to "
            f"{high}."
        )


def _check_data(data: Data) -> None:
    names = data.classes
    named = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
    if not named or not names or len(set(names)) < len(names):
        raise ValueError(f"classes must be a tuple of names, no two alike; got {names!r}.")
    for part in ("train", "test"):
        for name in (f"{part}_images", f"{part}_labels"):
            if not isinstance(array := getattr(data, name), np.ndarray):
                raise ValueError(f"{name} must be a NumPy array, got {type(array).__name__}.")
        images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
        check_images(f"{part}_images", images)
        check_labels(f"{part}_labels", labels, len(images), len(names))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))  # without a copy, where it can


def channel_stats(images: np.ndarray, index: np.ndarray | None = None) -> Stats:
    """Mean and population standard deviation of each channel, of pixels scaled to 0..1.

    Exact: sums are integers of any size, and only the last division and root are rounded. (The
    often copied std 0.2023 0.1994 0.2010 of CIFAR-10 averages per-image figures, and is wrong.)

    Args:
        images: uint8 (N, H, W, 3), N at least 1.
        index: integers (M,), M at least 1: count only these images; None counts all.

    Raises:
        ValueError: another dtype or shape.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise _unlike("images must be uint8 of shape (N, H, W, 3)", images)
    index = np.arange(len(images)) if index is None else np.asarray(index)
    if index.ndim != 1 or index.dtype.kind not in "iu" or not index.size:
        raise _unlike("index must be a list of one integer or more", index)
    histograms = np.zeros((3, 256), dtype=np.int64)
    for start in range(0, len(index), 1000):  # bincount makes int64 of its input: small bites
        pixels = images[index[start : start + 1000]].reshape(-1, 3)
        histograms += [np.bincount(channel, minlength=256) for channel in pixels.T]

    n = len(index) * images.shape[1] * images.shape[2]
    values = np.arange(256)
    sums, squares = (histograms @ values).tolist(), (histograms @ values**2).tolist()
    return Stats(
        mean=tuple(s / (255 * n) for s in sums),
        std=tuple(math.sqrt(n * q - s * s) / (255 * n) for s, q in zip(sums, squares, strict=True)),
    )


def some_of(index: np.ndarray | Tensor, n: int) -> np.ndarray:
    """At most `n` of some indices, integers (M,), sorted: drawn at random, the same ones each time.

    So images that are sorted by class still give all classes.
    """
    order = np.random.default_rng(0).random(len(index)).argsort(kind="stable")
    return np.sort(np.asarray(index)[order[:n]])


def _unlike(expected: str, array: np.ndarray | Tensor) -> ValueError:
    return ValueError(f"{expected}; got {_dtype(array)} of shape {tuple(array.shape)}.")


def _dtype(array: np.ndarray | Tensor) -> str:
    return str(array.dtype).removeprefix("torch.")


def _check_limit(limit: int | None, name: str) -> None:
    if limit is not None:
        check_whole(f"limit (on {name})", limit, 100, SIZES[name])


def _pack(name: str, classes: tuple, arrays: Arrays, limit: int | None) -> Data:
    limit = None if limit == SIZES[name] else limit
    if limit is not None:
        arrays = *_first(*arrays[:2], limit), *_first(*arrays[2:], limit // 5)
    return Data(name, classes, *arrays, limit)


def _first(images: np.ndarray, labels: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first of each class, n in all, in order; where 10 doesn't divide n, one more of some."""
    of_class = [np.flatnonzero(labels == c)[: n // 10 + (c < n % 10)] for c in range(10)]
    keep = np.sort(np.concatenate(of_class))
    return images[keep], labels[keep]
