"""shapes.py: the stand-in is the same bits everywhere, whole, and not too easy."""

import numpy as np
import pytest
import torch

from tinycifar import cifar10, data
from tinycifar.data import channel_stats, load
from tinycifar.shapes import SHAPES, draw_shapes

# Whatever the machine: shapes.py says why the bits are the same.
CHECKSUM = "94a898e2c093d77069150eaafd0bcd40240401698843c6074c99757f1880a1e9"


@pytest.fixture(scope="module")
def shapes():
    return load("shapes")


def test_shapes_arrays(shapes):
    assert shapes.name == "shapes" and shapes.limit is None
    assert shapes.classes == SHAPES and len(SHAPES) == 10
    assert shapes.title == "shapes (stand-in, NOT CIFAR-10)"
    for part, n in (("train", 10_000), ("test", 2_000)):
        images, labels = getattr(shapes, f"{part}_images"), getattr(shapes, f"{part}_labels")
        assert images.shape == (n, 32, 32, 3) and images.dtype == np.uint8
        assert images.flags.c_contiguous and labels.dtype == np.int64
        assert np.bincount(labels).tolist() == [n // 10] * 10
    assert len(np.unique(shapes.train_images[::10], axis=0)) == 1000  # no two discs alike
    assert not np.array_equal(shapes.train_images[:10], shapes.test_images[:10])


def test_shapes_are_the_same_bits_everywhere(shapes):
    assert shapes.checksum == CHECKSUM


def test_shapes_ask_nobody(monkeypatch, capsys):
    monkeypatch.setattr(cifar10, "read_cifar10", None)
    assert load("shapes", limit=100).name == "shapes"
    assert capsys.readouterr() == ("", "")


def test_a_linear_model_stays_under_60_percent(shapes):
    """Multinomial logistic regression on the pixels: it learns by heart, and it doesn't help."""
    stats = channel_stats(shapes.train_images)

    def pixels(images):
        images = (images / 255 - stats.mean) / stats.std
        return torch.from_numpy(images.reshape(len(images), -1)).float()

    x, y = pixels(shapes.train_images[:1500]), torch.from_numpy(shapes.train_labels[:1500])
    model = torch.nn.Linear(3072, 10)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=30, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    correct = model(pixels(shapes.test_images)).argmax(1).numpy() == shapes.test_labels
    assert (model(x).argmax(1) == y).float().mean() > 0.7
    assert correct.mean() < 0.6


def test_fewer_are_the_first_of_all(shapes):
    few = load("shapes", limit=200)
    assert np.array_equal(few.train_images, shapes.train_images[:200])
    assert np.array_equal(few.test_images, shapes.test_images[:40])
    images, labels, *_ = draw_shapes(73)  # not a multiple of what is drawn at once
    assert np.array_equal(images, shapes.train_images[:73])
    assert labels.tolist() == [i % 10 for i in range(73)]


def test_limit_of_everything_is_no_limit(shapes, monkeypatch):
    arrays = shapes.train_images, shapes.train_labels, shapes.test_images, shapes.test_labels
    monkeypatch.setattr(data, "draw_shapes", {10_000: arrays}.get)
    everything = load("shapes", limit=10_000)
    assert everything.limit is None and everything.checksum == shapes.checksum
