"""card.py: the model card's figures belong to the published weights, and its tables to them."""

import numpy as np
import pytest

from tinycifar import analysis, card
from tinycifar.paths import DEFAULT


@pytest.fixture(scope="module")
def published():
    return card.read()


@pytest.fixture(scope="module")
def measured(tiny):
    """Of the stand-in, whose labels mean nothing to these weights."""
    return card.measure(tiny)


def test_the_published_figures_are_of_the_default_weights(published):
    run = analysis.load_run(DEFAULT)
    assert published["run"] == run.name
    confusion = np.array(published["confusion"])
    assert confusion.sum() == 10_000 and (confusion.sum(axis=1) == 1000).all()
    assert 100 * confusion.trace() / 10_000 == pytest.approx(run.metrics["test_acc"])
    right, wrong = published["confidence"][:2]
    assert (right["n_images"], wrong["n_images"]) == (confusion.trace(), 10_000 - confusion.trace())
    assert sum(row["n"] for row in published["calibration"]) == 10_000


def test_what_it_says_of_foreign_images_is_measured(published, measured):
    """But for the threshold, which is that of the test images."""
    for was, now in zip(published["confidence"][2:], measured["confidence"][2:], strict=True):
        assert was["mean_confidence"] == pytest.approx(now["mean_confidence"], abs=0.05)
        assert all(was[name] == now[name] for name in ("images", "n_images", "named_most"))


def test_the_threshold_keeps_most_test_images(measured, published, tiny):
    for figures, n in ((measured, len(tiny.test_labels)), (published, 10_000)):
        rows, right = figures["confidence"][:2], np.trace(figures["confusion"])
        assert [row["n_images"] for row in rows] == [right, n - right]
        kept = sum(row["kept_share"] * row["n_images"] / 100 for row in rows)
        assert kept == pytest.approx(card.KEPT * n, abs=1)


def test_a_class_with_its_accuracy_precision_and_what_it_is_taken_for():
    confusion = np.array([[8, 2, 0], [1, 9, 0], [3, 0, 7]])
    table = card.class_table(confusion, ["a", "b", "c"])
    assert table["accuracy"].tolist() == [80, 90, 70]
    assert table["precision"].tolist() == pytest.approx([100 * 8 / 12, 100 * 9 / 11, 100])
    assert table["mostly_taken_for"].tolist() == ["b", "a", "a"]
    assert table["so_often"].tolist() == [2, 1, 3]


def test_the_figures_fit_into_the_file(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "FILE", tmp_path / "card.json")
    card.write(measured)
    assert card.read() == measured
    assert set(card.tables()) == {
        "card-classes",
        "card-calibration",
        "card-confidence",
        "card-files",
    }
