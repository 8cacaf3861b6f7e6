"""loaders.py: which images come, in which order, augmented how, and the same every time."""

import pickle

import numpy as np
import pytest
import torch
from helpers import SMALL

import augment
from tinycifar.data import DataSplits
from tinycifar.loaders import key, make_loader, resized
from tinycifar.recipes import get_recipe

CPU = torch.device("cpu")
SAMPLERS = augment.BUILDS[1:]


def loader(recipe, data, workers=0, seed=0, protocol="full"):
    return make_loader(recipe, seed, DataSplits(data, protocol), CPU, workers)


def images_by_index(loader, epoch):
    images = torch.cat([images for images, _ in loader.epoch(epoch)])
    return images[loader.order(epoch).argsort()]


def normalised(images, stats):
    """Independent of the module: uint8 (N, H, W, 3) to float32 (N, 3, H, W)."""
    x = (images / 255 - np.array(stats.mean)) / np.array(stats.std)
    return torch.from_numpy(x).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("build", augment.BUILDS)
@pytest.mark.parametrize("protocol", ["val", "full"])
def test_an_epoch_is_every_training_image_once_with_its_label(tiny, build, protocol):
    plain = loader(get_recipe(SMALL, policy="none", build=build), tiny, protocol=protocol)
    batches = list(plain.epoch(1))
    index = plain.splits.train_index
    assert [len(labels) for _, labels in batches] == [
        min(32, len(index) - start) for start in range(0, len(index), 32)
    ]
    assert len(batches) == len(plain)
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    order = plain.order(1)
    assert order.sort().values.tolist() == index.tolist()
    assert labels.tolist() == tiny.train_labels[order].tolist() and labels.dtype == torch.int64
    expected = normalised(tiny.train_images[order], plain.splits.stats)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert images.dtype == torch.float32
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)


def test_the_order_is_the_seeds_and_the_epochs(tiny):
    one, other = loader(SMALL, tiny), loader(SMALL, tiny, seed=1)
    generator = torch.Generator().manual_seed(key(0, 2))
    assert torch.equal(one.order(2), torch.randperm(200, generator=generator))
    assert not torch.equal(one.order(2), one.order(3))
    assert not torch.equal(one.order(2), other.order(2))


@pytest.mark.parametrize("build", augment.BUILDS)
def test_epochs_repeat_and_differ(tiny, build):
    recipe = get_recipe(SMALL, policy="reference", build=build)
    one, again = loader(recipe, tiny), loader(recipe, tiny)
    first, second = images_by_index(one, 1), images_by_index(one, 2)
    assert torch.equal(images_by_index(again, 2), second), "whatever came before"
    other_seed = images_by_index(loader(recipe, tiny, seed=1), 1)
    for others in (second, other_seed):
        assert (first != others).flatten(1).any(1).double().mean() > 0.8


def test_a_batch_is_augmented_as_its_own_draws_say(tiny):
    ours = loader(get_recipe(SMALL, policy="reference"), tiny, seed=7)
    stats = ours.splits.stats
    policy = augment.Batched("reference", stats.mean, stats.std)
    for batch, (images, _) in enumerate(ours.epoch(3)):
        index = ours.order(3).split(32)[batch]
        generator = torch.Generator().manual_seed(key(7, 3, batch))
        assert torch.equal(images, policy(torch.from_numpy(tiny.train_images)[index], generator))


@pytest.mark.parametrize("build", SAMPLERS)
def test_any_number_of_workers_gives_the_same_bits(tiny, build):
    recipe = get_recipe(SMALL, build=build, policy="reference", batch_size=64)
    loaders = [loader(recipe, tiny, workers) for workers in (0, 1, 2)]
    for epoch in (1, 2):
        alone, *others = [list(one.epoch(epoch)) for one in loaders]
        for batches in others:
            for (images, labels), (images2, labels2) in zip(alone, batches, strict=True):
                assert torch.equal(images, images2) and torch.equal(labels, labels2)


def test_batches_draw_nothing_from_the_networks_stream(tiny):
    batches = loader(get_recipe(SMALL, build="torchvision"), tiny)
    state = torch.get_rng_state()
    list(batches.epoch(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("build", SAMPLERS)
def test_a_worker_has_the_policy_that_the_run_has(tiny, build, monkeypatch):
    """A spawned process has only the policies of augment.py."""
    with monkeypatch.context() as patch:
        patch.setitem(augment.POLICIES, "flip", augment.Policy(flip=1.0))
        recipe = get_recipe(SMALL, build=build, policy="flip")
        dataset = loader(recipe, tiny).loader.dataset
    again = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(again[1, i][0], dataset[1, i][0]) for i in range(8))


def test_alternate_flips_show_each_image_both_ways_in_two_epochs(tiny, monkeypatch):
    monkeypatch.setitem(augment.POLICIES, "light", augment.Policy(flip=0.5))  # flips, no crops
    alternating = loader(get_recipe(SMALL, alternate_flip=True), tiny)
    one, two, three = (images_by_index(alternating, e) for e in (1, 2, 3))
    assert torch.equal(two, one.flip(3)) and torch.equal(three, one)
    as_it_is = images_by_index(loader(get_recipe(SMALL, policy="none"), tiny), 1)
    mirrored = (one != as_it_is).flatten(1).any(1).double().mean()
    assert 0.35 < mirrored < 0.65
    other_seed = images_by_index(loader(get_recipe(SMALL, alternate_flip=True), tiny, seed=1), 1)
    assert not torch.equal(other_seed, one), "another seed mirrors others first"


def test_resized_images_keep_what_they_show():
    flat = torch.full((1, 3, 32, 32), 0.7)
    torch.testing.assert_close(resized(flat, 20), flat[:, :, :20, :20])
    images = torch.rand(2, 3, 32, 32)
    assert resized(images, 32) is images
    halved = resized(images, 16)
    torch.testing.assert_close(halved.mean((2, 3)), images.mean((2, 3)), rtol=0, atol=0.02)
    spots = torch.eye(32 * 32).view(32 * 32, 1, 32, 32).expand(-1, 3, -1, -1)
    for side in (8, 16, 24):
        says = resized(spots, side).sum((1, 2, 3))
        assert says.min() > says.mean() / 2, "every pixel has its say"


def test_keys_of_neighbours_are_unlike():
    keys = {key(seed, epoch, batch) for seed in range(5) for epoch in range(5) for batch in (1, 2)}
    assert len(keys) == 50 and all(0 <= k < 2**32 for k in keys)
    assert key(3, 1) == key(3, 1, 0), "zeros at the end don't count"
