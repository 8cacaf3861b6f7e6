"""Evaluation of a network on images: log-probabilities, loss and accuracy."""

from __future__ import annotations

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
    batch_size: int = 100,
) -> Tensor:
    """Log-probabilities of uint8 `images` (N, 32, 32, 3): float32 (N, classes), on the CPU.

    Args:
        stats: the channel mean and std that the model was trained with.
        batch_size: images at once; no faster when larger on a CPU, and 2 MB each.

    Raises:
        ValueError: there are no images, or of another dtype or shape.
    """
    images = torch.as_tensor(images)
    check_images("images", images)
    device = next(model.parameters()).device
    all_log_p: Tensor | None = None
    with torch.inference_mode(), full_precision(), eval_mode(model):
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size].to(device)
            batch = augment.normalised(part, stats.mean, stats.std)
            log_p = model(batch)
            if all_log_p is None:
                # One tensor for all: many small ones would stay between the large buffers, which
                # then couldn't be used again, and cost 0.3 GB.
                shape = len(images), log_p.shape[1]
                all_log_p = torch.empty(shape, dtype=torch.float32, device="cpu")
            all_log_p[start : start + len(batch)] = log_p
    assert all_log_p is not None
    return all_log_p.clone()  # a plain tensor, not one of inference mode


def evaluate(
    model: nn.Module,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    stats: Stats,
) -> tuple[float, float]:
    """(mean negative log-likelihood, accuracy in percent) on uint8 images (N, 32, 32, 3).

    Labels are int64 (N,). For `stats` and what is raised see `log_probabilities`; a ValueError
    too if the labels have another shape, or name a class that there isn't.
    """
    log_p = log_probabilities(model, images, stats)
    labels = torch.as_tensor(labels)
    check_labels("labels", labels, *log_p.shape)
    return F.nll_loss(log_p, labels).item(), accuracy(log_p, labels)


def accuracy(log_p: Tensor, labels: Tensor) -> float:
    """Percent of log-probabilities (N, classes) that are highest at the label (N,)."""
    return 100 * (log_p.argmax(dim=1) == labels).double().mean().item()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model answers in eval mode, and is afterwards in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]  # some may be frozen
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


_CUDNN: Any = torch.backends.cudnn
_MKLDNN: Any = torch.backends.mkldnn
_SETTINGS: tuple[tuple[Any, str, Any], ...] = (
    (_CUDNN.conv, "fp32_precision", "ieee"),  # by default rounded to TF32
    (_CUDNN, "deterministic", True),
    (_CUDNN, "benchmark", False),
    (torch.backends.cuda.matmul, "fp32_precision", "ieee"),  # of linear layers
    (_MKLDNN.conv, "fp32_precision", "ieee"),
    (_MKLDNN.matmul, "fp32_precision", "ieee"),  # of 1x1 convolutions as well
)
_lock = threading.Lock()
_users, _found = 0, list[Any]()  # how many use the settings, and what the first one found


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions and matrix products in full float32, on a GPU deterministically.

    The settings are those of the whole process: of several threads, the last one to end restores
    what the first one found.
    """
    global _users, _found
    with _lock:
        if not _users:
            _found = [getattr(holder, name) for holder, name, _ in _SETTINGS]
        _users += 1
        for holder, name, value in _SETTINGS:
            setattr(holder, name, value)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                for (holder, name, _), value in zip(_SETTINGS, _found, strict=True):
                    setattr(holder, name, value)
