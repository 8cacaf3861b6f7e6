"""What tables and figures show, computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import t
from torch import Tensor, nn

import augment
from tinycifar.checks import check_whole
from tinycifar.data import Stats
from tinycifar.evaluation import eval_mode

__all__ = ["calibration", "confusion_matrix", "effective_receptive_field", "gains"]

# ------------------------------------------------------------------------------- of predictions


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


def calibration(
    log_p: np.ndarray, labels: np.ndarray, bins: int = 10
) -> tuple[pd.DataFrame, float]:
    """Confidence and accuracy by bins of confidence, and the expected calibration error (ECE).

    ECE is the mean of |accuracy - confidence| over bins of equal width, weighted by their counts:
    Guo et al., "On Calibration of Modern Neural Networks", 2017 (arXiv:1706.04599).

    Args:
        log_p: log-probabilities (N, classes), N at least 1.
        labels: integers (N,).
        bins: how many.

    Returns:
        A row for each bin low < confidence <= high, from 0 to 1: low, high, n, and the means
        confidence and accuracy, in 0..1, NaN where n is 0; and the ECE, in 0..1.

    Raises:
        ValueError: shapes that don't fit, or no bin.
    """
    check_whole("bins", bins, 1)
    log_p = check_predictions(log_p, labels).astype(np.float64)
    # Rounding may lift a probability above 1.
    confidence = np.minimum(np.exp(log_p.max(axis=1)), 1.0)
    each = pd.DataFrame({"confidence": confidence, "accuracy": log_p.argmax(axis=1) == labels})
    edges = np.linspace(0, 1, bins + 1)
    binned = each.groupby(pd.cut(confidence, list(edges), labels=False))
    table = binned.mean().assign(n=binned.size()).reindex(range(bins))
    table = table.assign(low=edges[:-1], high=edges[1:], n=table["n"].fillna(0).astype(int))
    gaps = (table["accuracy"] - table["confidence"]).abs()
    ece = float((table["n"] * gaps).sum() / len(each))
    return table[["low", "high", "n", "confidence", "accuracy"]], ece


def check_predictions(log_p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log-probabilities (N, classes) that belong to labels (N,), N at least 1."""
    log_p = np.asarray(log_p)
    if log_p.ndim != 2 or np.shape(labels) != log_p.shape[:1] or not len(log_p):
        raise ValueError(
            "log_p must be (N, classes) and labels (N,), with N of 1 or more; got "
            f"{log_p.shape} and {np.shape(labels)}"
        )
    return log_p


# -------------------------------------------------------------------------------------- of runs

PRIOR = 10  # degrees of freedom that the count of images is worth, in `gains`


def gains(groups: pd.DataFrame, images: int) -> pd.DataFrame:
    """What each row but the first, the base, gains over the first, in points.

    The variance over seeds is taken to be the same for all. A few seeds say little about it, and
    may agree by chance, as three of `tuned` do (s = 0.08 points). But accuracy p is counted on N
    images, and networks that differ in their seed alone are right on different ones. Where the seed
    causes half of the variance of an image's being right or wrong, the variance of p is
    p (1 - p) / 2N. This prior counts as much as PRIOR degrees of freedom (a moderated t-test:
    Smyth, 2004, doi 10.2202/1544-6115.1027; there both are estimated, from thousands of rows):

        s² = (PRIOR p (1 - p) / 2N + sum of (n_i - 1) s_i²) / (PRIOR + sum of (n_i - 1))

    Where the seeds vary by more, as in short runs, s² is theirs alone, with their degrees of
    freedom: so the prior never makes a gain clearer than the seeds do. In simulations of one row
    without effect, with 2, 3 or 5 seeds on both sides and a true variance of 0.25, 1, 2 or 4 times
    the prior, at most 7 % are clear. The standard error is s root(1/n_i + 1/n_base).

    Args:
        groups: n, val_acc (percent) and val_acc_std over the seeds of each.
        images: on how many the accuracy was counted.

    Returns:
        gain; gain_error, its standard error; gain_interval, half of the 95 % interval by Student's
        t, for this row alone; clear: a t-test finds a difference at 5 % for all rows together,
        with Holm's correction (1979, www.jstor.org/stable/4615733); never where either side has a
        single seed. The base has NaN and False.
    """
    n, accuracy = groups["n"], groups["val_acc"]
    others = np.arange(len(groups)) > 0
    # As if one image at least were right, and one wrong: no accuracy is known without error.
    p = np.clip(accuracy.iloc[0] / 100, 1 / images, 1 - 1 / images)
    prior = 100**2 * p * (1 - p) / (2 * images)
    squares = ((n - 1) * groups["val_acc_std"].fillna(0) ** 2).sum()
    degrees = (n - 1).sum()
    if squares <= degrees * prior:
        squares, degrees = squares + PRIOR * prior, degrees + PRIOR
    spread = np.sqrt(squares / degrees)
    gain = (accuracy - accuracy.iloc[0]).where(others)
    error = (spread * np.sqrt(1 / n + 1 / n.iloc[0])).where(others)
    interval = float(t.ppf(0.975, degrees)) * error
    several = others & (np.minimum(n, n.iloc[0]) > 1)
    p_values = pd.Series(2 * t.sf(gain.abs() / error, degrees), gain.index)[several].sort_values()
    # The clearest row has to stand out among all, the next one among those that are left. Rows
    # with one seed count as well: by that seed they lost, and others went on.
    corrected = (p_values * (others.sum() - np.arange(len(p_values)))).cummax()
    clear = (corrected < 0.05).reindex(gain.index, fill_value=False)
    return pd.DataFrame(
        {"gain": gain, "gain_error": error, "gain_interval": interval, "clear": clear}
    )


# ---------------------------------------------------------------------------------- of networks


def effective_receptive_field(
    model: nn.Module,
    images: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
) -> np.ndarray:
    """How much each input pixel moves the centre of the last feature map: float64 (S, S).

    The mean of |d(sum over the channels of its centre) / d(input)| over the images and the colour
    channels, from Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional
    Neural Networks", 2016 (arXiv:1701.04128). For `NetCIFAR10_Tiny` it is centred on pixel
    (S // 2, S // 2). Images larger than the theoretical field show all of it.

    Args:
        model: a network whose last feature map goes into `model.gap`; left as it was.
        images: uint8 (N, S, S, 3), N at least 1.
        mean, std: the channel statistics that it was trained with, of 0..1 pixels.

    Raises:
        ValueError: images of another dtype or shape.
    """
    shape = np.shape(images)
    if len(shape) != 4 or shape[1] != shape[2] or not len(images):
        raise ValueError(f"images must be square, of shape (N, S, S, 3), N > 0; got {shape}")
    device = next(model.parameters()).device
    total = torch.zeros(shape[1:3], dtype=torch.float64)
    last: list[Tensor] = []
    gap: Any = model.gap
    with eval_mode(model), gap.register_forward_pre_hook(lambda _, x: last.append(x[0])):
        for part in torch.as_tensor(images).split(8):  # a matter of memory only
            pixels = augment.normalised(part.to(device), mean, std).requires_grad_()
            model(pixels)
            features = last.pop()
            centre = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
            (gradient,) = torch.autograd.grad(centre.sum(), pixels)
            total += gradient.abs().cpu().double().sum(dim=(0, 1))
    return (total / (3 * len(images))).numpy()


def share_within(field: np.ndarray, side: int) -> float:
    """Percent of the field's sum within a centred square; one of 32 px is the image itself."""
    start = max(0, len(field) // 2 - side // 2)
    inside = slice(start, start + side)
    return float(100 * field[inside, inside].sum() / field.sum())


# ------------------------------------------------------------------------------ of augmentation


def augmented(images: np.ndarray, policy: str, build: str, stats: Stats, seed: int) -> np.ndarray:
    """uint8 (N, H, W, 3) as a build augments it, normalisation taken back: float32, in 0..1."""
    if build == "batched":
        generator = torch.Generator().manual_seed(seed)
        transform = augment.Batched(policy, stats.mean, stats.std)
        batch = transform(torch.as_tensor(images), generator)
    else:
        apply = augment.per_sample(policy, stats.mean, stats.std, build)
        batch = torch.stack([apply(image, seed + i) for i, image in enumerate(images)])
    mean, std = (np.array(values, np.float32) for values in (stats.mean, stats.std))
    return (batch.permute(0, 2, 3, 1).numpy() * std + mean).clip(0, 1)


def normalised_moments(
    images: np.ndarray, policy: augment.Policy, stats: Stats, seed: int
) -> np.ndarray:
    """Mean and std of each channel of the augmented images: float64 (2, 3)."""
    transform = augment.Batched(policy, stats.mean, stats.std)
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for part in torch.as_tensor(images).split(500):
        batch = transform(part, generator).double()
        sums += torch.stack([batch.sum(dim=(0, 2, 3)), batch.square().sum(dim=(0, 2, 3))])
    mean, square = sums.numpy() / (images.size / 3)
    return np.stack([mean, np.sqrt(square - mean**2)])
