"""Evaluation of a network on images: log-probabilities, loss and accuracy."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import augment
from tinycifar.data import Stats, check_images, check_labels


def log_probabilities(
    model: nn.Module,
    images: Tensor | np.ndarray,
    stats: Stats,
    *,
    tta: bool = False,
    batch_size: int = 100,
) -> Tensor:
    """Log-probabilities of uint8 `images` (N, 32, 32, 3): float32 (N, classes), on the CPU.

    Args:
        stats: the channel mean and std that the model was trained with.
        tta: average the probabilities of the image and its mirror image.
        batch_size: images at once; no faster when larger on a CPU, and 2 MB each.

    Raises:
        ValueError: there are no images, or of another dtype or shape.
    """
    images = torch.as_tensor(images)
    check_images("images", images)
    device = next(model.parameters()).device
    plain = augment.Batched("none", stats.mean, stats.std).to(device)
    no_draws = torch.zeros(batch_size, plain.DRAWS, device=device)  # nothing here is random
    all_log_p: Tensor | None = None
    with torch.inference_mode(), full_precision(), eval_mode(model):
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size].to(device)
            batch = plain.transform(part, no_draws[: len(part)])
            log_p = model(batch)
            if tta:
                log_p = torch.logaddexp(log_p, model(batch.flip(3))) - math.log(2)
            if all_log_p is None:
                # One tensor for all: many small ones would stay between the large buffers, which
                # then couldn't be used again, and cost 0.3 GB.
                all_log_p = torch.empty(len(images), log_p.shape[1])
            all_log_p[start : start + len(batch)] = log_p
    assert all_log_p is not None
    return all_log_p.clone()  # a plain tensor, not one of inference mode


def evaluate(
    model: nn.Module,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    stats: Stats,
    *,
    tta: bool = False,
) -> tuple[float, float]:
    """(mean negative log-likelihood, accuracy in percent) on uint8 images (N, 32, 32, 3).

    Labels are int64 (N,). For `stats`, `tta` and what is raised see `log_probabilities`.
    """
    log_p = log_probabilities(model, images, stats, tta=tta)
    labels = torch.as_tensor(labels)
    check_labels("labels", labels, *log_p.shape)
    return F.nll_loss(log_p, labels).item(), accuracy(log_p, labels)


def accuracy(log_p: Tensor, labels: Tensor) -> float:
    """Percent of log-probabilities (N, classes) that are highest at the label (N,)."""
    return 100 * (log_p.argmax(dim=1) == labels).double().mean().item()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model answers in eval mode, and is afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _FullPrecision:
    """What `full_precision` has in use, and what it gives back."""

    lock, users, before = threading.Lock(), 0, (None,) * 3


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions on a GPU are deterministic and in float32; by default they round to TF32.

    These switches are the whole process's: of several threads the first sets them, and the last
    gives them back.
    """
    cudnn: Any = torch.backends.cudnn
    state = _FullPrecision
    with state.lock:
        state.users += 1
        if state.users == 1:
            state.before = cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark
            cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark = "ieee", True, False
    try:
        yield
    finally:
        with state.lock:
            state.users -= 1
            if not state.users:
                cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark = state.before
