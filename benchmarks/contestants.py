"""The ways of training that are compared, each in a process of its own.

For each number N that `serve` receives it answers with the seconds that its next N steps took. A
process of its own, since the allocator's setting and the threads' behaviour belong to a process.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from itertools import count, pairwise
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import augment
from tiny_cifar10_net import NetCIFAR10_Tiny
from tinycifar.acceleration import peak_memory
from tinycifar.data import Stats, channel_stats, load
from tinycifar.evaluation import full_precision
from tinycifar.recipes import get_recipe
from tinycifar.training import Trainer, deterministic, settle

BATCH = 128
SMALL = 32  # as the recipes `quick`, `sprint` and `tuned` have it
POLICY = "reference"
PARTS = ("data and augmentation", "forward", "backward", "optimizer and metrics")
# Both on the same; not on MPS, where nothing here waits for the steps to end.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def reference() -> Iterator[dict[str, float]]:
    """Training as the reference notebook does it, a step each time `next` is called.

    The same network and policy; one image at a time by albumentations in a DataLoader with two
    workers; NCHW, float32, eager; loss and accuracy read at every step.
    """
    data = load()
    images = Images(data.train_images, data.train_labels, channel_stats(data.train_images))
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=2, drop_last=True)
    model = NetCIFAR10_Tiny().to(DEVICE)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.045, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    loss_sum = correct = 0.0
    with full_precision():  # as ours
        while True:
            for images, labels in loader:
                images, labels = images.to(DEVICE), labels.to(DEVICE)
                optimizer.zero_grad()
                output = model(images)
                loss = F.nll_loss(output, labels)
                loss.backward()
                optimizer.step()
                loss_sum += loss.item()
                correct += (output.argmax(dim=1) == labels).sum().item()
                yield {}


class Images(Dataset):
    def __init__(self, images: Any, labels: Any, stats: Stats):
        self.images, self.labels, self.stats = images, labels, stats

    @functools.cached_property
    def transform(self) -> Any:  # made in the worker that uses it: a spawned one isn't sent it
        return augment.albumentations_transform(POLICY, self.stats.mean, self.stats.std)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        return self.transform(image=self.images[i])["image"], self.labels[i]


def ours(name: str = "ours") -> Iterator[dict[str, float]]:
    """The steps of `Trainer`, one each time `next` is called; yields the seconds of its parts.

    Args:
        name: may also ask for `one-thread`, `eager`, `bfloat16` and `small` batches.
    """
    if "one-thread" in name:
        torch.set_num_threads(1)
    batch_size, compiled = SMALL if "small" in name else BATCH, "eager" not in name
    precision = "bfloat16" if "bfloat16" in name else "float32"
    recipe = get_recipe("baseline", batch_size=batch_size, precision=precision, policy=POLICY)
    recipe = get_recipe(recipe, schedule="constant", stop_patience=None)
    experiment = settle(recipe, protocol="full", device=str(DEVICE), compile=compiled)
    with deterministic(DEVICE):
        trainer = Trainer(experiment)
        trainer.model.train()
        for epoch in count(1):
            yield from steps(trainer, epoch)


def steps(trainer: Trainer, epoch: int) -> Iterator[dict[str, float]]:
    """Whole batches through the parts of `Trainer.step`; yields the seconds of each.

    On a GPU, where steps overlap, the parts aren't told apart.
    """
    batch_size, now = trainer.experiment.recipe.batch_size, time.perf_counter
    times = [now()]
    for images, labels in trainer.loader.epoch(epoch):
        if len(labels) < batch_size:
            break
        times.append(now())
        output = trainer.network(images)
        loss = F.nll_loss(output, labels)
        times.append(now())
        trainer.model.zero_grad(set_to_none=True)
        loss.backward()
        times.append(now())
        for optimizer in trainer.optimizers:
            optimizer.step()
        (output.detach().argmax(dim=1) == labels).sum()
        times.append(now())
        laps = [end - start for start, end in pairwise(times)]
        yield dict(zip(PARTS, laps, strict=True)) if DEVICE.type == "cpu" else {}
        times = [now()]


def serve(name: str, connection: Connection) -> None:
    """Take a first step, which loads the data and compiles; then as many as the other end says."""
    contestant = reference() if name == "reference" else ours(name)
    connection.send(timed(contestant, 1))
    while number := connection.recv():
        connection.send(timed(contestant, number))


def timed(contestant: Iterator[dict[str, float]], number: int) -> dict[str, Any]:
    started = time.perf_counter()
    laps = [next(contestant) for _ in range(number)]
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    parts = {name: sum(lap[name] for lap in laps) for name in laps[0]}
    return {"seconds": seconds, "parts": parts, "peak_memory_mib": peak_memory()}
