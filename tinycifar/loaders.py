"""Batches for training: augmented, normalised, on the device, and the same every time.

Randomness is keyed by (seed, epoch, batch or sample), never by which worker came first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import augment
from tinycifar.data import DataSplits
from tinycifar.recipes import Recipe


def make_loader(
    recipe: Recipe, seed: int, splits: DataSplits, device: torch.device, workers: int = 0
) -> Loader:
    """The loader that a recipe's `build` asks for; see `Loader`."""
    kind = BatchedLoader if recipe.build == "batched" else PerSampleLoader
    return kind(recipe, seed, splits, device, workers)


class Loader:
    """Batches of normalised images and labels on the device, one epoch at a time.

    Args:
        recipe, seed: decide what comes, in which order, and how it is augmented.
        splits: has the images that train, and their channel statistics.
        workers: loader processes, for the builds that take one image at a time.
    """

    def __init__(
        self, recipe: Recipe, seed: int, splits: DataSplits, device: torch.device, workers: int
    ):
        self.recipe, self.seed, self.splits, self.device = recipe, seed, splits, device
        self.workers = workers
        # The policy itself: a worker process may have others in its own augment.POLICIES.
        self.how = augment.get_policy(recipe.policy), splits.stats.mean, splits.stats.std

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, counted from 1; the last one may be smaller.

        Yields:
            float32 (N, 3, 32, 32), normalised, and int64 (N,), both on the device.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return math.ceil(len(self.splits.train_index) / self.recipe.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The indices of this epoch's images, in the order in which they come: int64 (M,)."""
        generator = torch.Generator().manual_seed(key(self.seed, epoch))
        index = self.splits.train_index
        return index[torch.randperm(len(index), generator=generator)]


class BatchedLoader(Loader):
    """The images live on the device; a whole batch is augmented there at once."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.transform = augment.Batched(*self.how).to(self.device)
        self.images, self.labels = (t.to(self.device) for t in self.splits.train)
        # Which images are mirrored in even epochs, where flips alternate.
        generator = torch.Generator().manual_seed(key(self.seed, 0, 0, 1))
        self.mirrored = torch.rand(len(self.labels), generator=generator) < 0.5

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        size, order = self.recipe.batch_size, self.order(epoch)
        draws = torch.cat(
            [
                self.transform.draw(
                    len(index), torch.Generator().manual_seed(key(self.seed, epoch, batch))
                )
                for batch, index in enumerate(order.split(size))
            ]
        )
        if self.recipe.alternate_flip:
            # After Keller Jordan (2024, arXiv:2404.00498): two epochs show each image both ways.
            self.transform.set_flips(draws, self.mirrored[order] ^ bool(epoch % 2))
        # All of an epoch at once: each copy to a GPU is waited for.
        order, draws = order.to(self.device), draws.to(self.device)
        for index, drawn in zip(order.split(size), draws.split(size), strict=True):
            yield self.transform.transform(self.images[index], drawn), self.labels[index]


class PerSampleLoader(Loader):
    """One image at a time, in a DataLoader: the reference's way, and the one people change."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        transform = augment.per_sample(*self.how, self.recipe.build)
        # (epoch, index) of each image, so that a worker knows which epoch it draws for.
        self.items: list[tuple[int, int]] = []
        self.loader = DataLoader(
            _KeyedDataset(*self.splits.train, transform, self.seed),
            batch_size=self.recipe.batch_size,
            sampler=self.items,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            # What it draws for its workers, once or each epoch, isn't to come from the stream of
            # the network's own draws. (Nothing here uses it.)
            generator=torch.Generator(),
        )

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.items[:] = [(epoch, i) for i in self.order(epoch).tolist()]
        for images, labels in self.loader:
            images = images.to(self.device, memory_format=torch.channels_last)
            yield images, labels.to(self.device)


class _KeyedDataset(Dataset):
    def __init__(self, images: Tensor, labels: Tensor, transform: Any, seed: int):
        self.images, self.labels, self.transform, self.seed = images, labels, transform, seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, i = item
        return self.transform(self.images[i].numpy(), key(self.seed, epoch, i)), self.labels[i]


def resized(images: Tensor, side: int) -> Tensor:
    """Images (N, 3, 32, 32) at another side, with antialiasing, so that every pixel counts."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def key(*parts: int) -> int:
    """One 32-bit seed from (seed, epoch, ...); neighbouring keys give unrelated seeds.

    Zeros at the end don't count, so an epoch shares its seed with its first batch.
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
