"""What tables and figures show, computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import augment
import tinycifar.data as cifar10
from tiny_cifar10_net import eval_mode


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, n: int) -> np.ndarray:
    """How often class i (row) was taken for class j (column): int64 (n, n).

    Args:
        labels, predicted: integers (N,) of 0..n-1.

    Raises:
        ValueError: unequal lengths, or a class that isn't in 0..n-1.
    """
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.ndim != 1 or labels.shape != predicted.shape:
        raise ValueError(
            "labels and predicted must be one class for each image, of shape (N,); "
            f"got {labels.shape} and {predicted.shape}"
        )
    both = np.concatenate((labels, predicted))
    if len(both) and (both.dtype.kind not in "iu" or both.min() < 0 or both.max() >= n):
        raise ValueError(f"classes must be whole numbers from 0 to {n - 1}; got {np.unique(both)}")
    pairs = n * labels.astype(np.int64) + predicted
    return np.bincount(pairs, minlength=n * n).reshape(n, n).astype(np.int64)


@dataclass(frozen=True)
class CalibrationBin:
    """The predictions whose confidence lies in low < confidence <= high, all in 0..1.

    `confidence` and `accuracy` are means over the bin; NaN where `count` is 0.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def calibration(
    log_p: np.ndarray, labels: np.ndarray, bins: int = 15
) -> tuple[list[CalibrationBin], float]:
    """How sure the network is, and how often rightly so; and the expected calibration error.

    ECE is the mean of |accuracy - confidence| over bins of equal width, weighted by their counts:
    Guo et al., "On Calibration of Modern Neural Networks", 2017 (arXiv:1706.04599).

    Args:
        log_p: log-probabilities (N, classes), N at least 1.
        labels: integers (N,).
        bins: how many.

    Returns:
        The bins from 0 to 1, and the ECE, in 0..1.

    Raises:
        ValueError: shapes that don't fit, or no bin.
    """
    check_at_least("bins", bins, 1)
    log_p = checked(log_p, labels).astype(np.float64)
    right = log_p.argmax(axis=1) == labels
    # Rounding may lift a probability above 1.
    confidence = np.minimum(np.exp(log_p.max(axis=1)), 1.0)
    edges = np.linspace(0, 1, bins + 1)
    where = np.searchsorted(edges, confidence, side="left") - 1
    rows = []
    for b in range(bins):
        inside = where == b
        means = (x[inside].mean() if inside.any() else np.nan for x in (confidence, right))
        rows.append(CalibrationBin(edges[b], edges[b + 1], int(inside.sum()), *map(float, means)))
    gaps = (row.count * abs(row.accuracy - row.confidence) for row in rows if row.count)
    return rows, float(sum(gaps) / len(confidence))


def effective_receptive_field(
    model: nn.Module,
    images: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    chunk: int = 8,
) -> np.ndarray:
    """How much each input pixel moves the centre of the last feature map: float64 (S, S).

    The mean of |d(sum over channels of c4's output at its centre) / d(input)| over the images
    and the colour channels, from Luo et al., "Understanding the Effective Receptive Field in Deep
    Convolutional Neural Networks", 2016 (arXiv:1701.04128). For `NetCIFAR10_Tiny` it is centred
    on pixel (S // 2, S // 2). Images larger than the theoretical field show all of it.

    Args:
        model: a network of stages c1 to c4; left as it was.
        images: uint8 (N, S, S, 3), N at least 1.
        mean, std: the channel statistics that it was trained with, of 0..1 pixels.
        chunk: how many images at a time; a matter of memory only.

    Raises:
        ValueError: images of another dtype or shape.
    """
    shape = np.shape(images)
    if len(shape) != 4 or shape[1] != shape[2] or not len(images):
        raise ValueError(f"images must be square, of shape (N, S, S, 3), N > 0; got {shape}")
    device = next(model.parameters()).device
    normalise = augment.Batched("none", mean, std).to(device)
    stages = nn.Sequential(model.c1, model.c2, model.c3, model.c4)
    total = torch.zeros(shape[1:3], dtype=torch.float64)
    with eval_mode(model):
        for part in torch.as_tensor(images).split(chunk):
            pixels = normalise(part.to(device)).requires_grad_()
            features = stages(pixels)
            centre = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
            (gradient,) = torch.autograd.grad(centre.sum(), pixels)
            total += gradient.abs().cpu().double().sum(dim=(0, 1))
    return (total / (3 * len(images))).numpy()


def augmented(
    images: np.ndarray, policy: str, build: str, stats: cifar10.Stats, seed: int
) -> np.ndarray:
    """uint8 (N, H, W, 3) as a build augments it, normalisation taken back: float32, in 0..1."""
    if build == "batched":
        generator = torch.Generator().manual_seed(seed)
        transform = augment.Batched(policy, stats.mean, stats.std)
        batch = transform(torch.as_tensor(images), generator)
    else:
        apply = augment.per_sample(policy, stats.mean, stats.std, build)
        batch = torch.stack([apply(image, seed + i) for i, image in enumerate(images)])
    pixels = batch.permute(0, 2, 3, 1).numpy() * np.float32(stats.std) + np.float32(stats.mean)
    return pixels.clip(0, 1)


def normalised_moments(
    images: np.ndarray, policy: augment.Policy, stats: cifar10.Stats, seed: int
) -> np.ndarray:
    """Mean and std of each channel of the augmented images: float64 (2, 3)."""
    transform = augment.Batched(policy, stats.mean, stats.std)
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for part in torch.as_tensor(images).split(500):
        batch = transform(part, generator).double()
        sums += torch.stack([batch.sum(dim=(0, 2, 3)), batch.square().sum(dim=(0, 2, 3))])
    mean, square = sums.numpy() / (images.size / 3)
    return np.stack([mean, np.sqrt(square - mean**2)]).round(3) + 0.0  # + 0.0 makes -0 plain 0


def share_within(field: np.ndarray, side: int) -> float:
    """Percent of the field's sum within a centred square; one of 32 px is the image itself."""
    start = max(0, len(field) // 2 - side // 2)
    inside = slice(start, start + side)
    return 100 * field[inside, inside].sum() / field.sum()


def checked(log_p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log-probabilities (N, classes) that belong to labels (N,), N at least 1."""
    log_p = np.asarray(log_p)
    if log_p.ndim != 2 or np.shape(labels) != log_p.shape[:1] or not len(log_p):
        raise ValueError(
            "log_p must be (N, classes) and labels (N,), with N of 1 or more; got "
            f"{log_p.shape} and {np.shape(labels)}"
        )
    return log_p


def check_at_least(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise ValueError(f"{name} must be a whole number of {low} or more; got {value!r}")
