"""What the model card says of the default weights: measured into a file, and shown from it.

measure(load("cifar10"))    # `make card`, which writes it to results/card.json
tables(), values()          # what `publish` puts into results/MODEL_CARD.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from tinycifar import analysis, shapes
from tinycifar.data import Data
from tinycifar.inference import OnnxNetwork, load_onnx
from tinycifar.paths import DEFAULT, RESULTS
from tinycifar.run_directory import RunDirectory, find_run, write_file

FILE = RESULTS / "card.json"
EXPORTED = RESULTS / "export"  # the default weights as ONNX files
KEPT = 0.95  # of the test images, by the threshold that is tried on foreign ones


def foreign_images() -> Iterator[tuple[str, np.ndarray]]:
    """Images of nothing that CIFAR-10 has a class for, each kind uint8 (N, 32, 32, 3)."""
    yield "shapes, drawn by code", shapes.draw_shapes(1000)[0]
    yield "noise", np.random.default_rng(0).integers(256, size=(1000, 32, 32, 3), dtype=np.uint8)
    greys = np.arange(256, dtype=np.uint8)[:, None, None, None]
    yield "one grey each", np.broadcast_to(greys, (256, 32, 32, 3)).copy()


def measure(data: Data) -> dict[str, Any]:
    """The card's figures on the test images of `data`, fit for JSON; of the exported float network.

    The threshold on the likeliest class's probability is the baseline of Hendrycks and Gimpel,
    "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks",
    2017 (arXiv:1610.02136).
    """
    network = load_onnx(EXPORTED / "net.onnx")
    log_p = _log_probabilities(network, data.test_images)
    labels, predicted = data.test_labels, log_p.argmax(axis=1)
    confidence = np.exp(log_p.max(axis=1))
    bins, ece = analysis.calibration(log_p, labels)
    threshold = float(np.quantile(confidence, 1 - KEPT))
    right = predicted == labels
    kinds = {"test images, classified rightly": log_p[right], "... wrongly": log_p[~right]}
    for kind, images in foreign_images():
        kinds[kind] = _log_probabilities(network, images)
    return {
        "run": network.metadata["run"],
        "classes": list(network.classes),
        "confusion": analysis.confusion_matrix(labels, predicted, len(network.classes)).tolist(),
        "calibration": bins[bins["n"] > 0].round(6).to_dict("records"),
        "ece": round(ece, 6),
        "threshold": round(threshold, 6),
        "confidence": [
            {"images": kind, **_confidence(p, threshold, network.classes)}
            for kind, p in kinds.items()
        ],
    }


def _log_probabilities(network: OnnxNetwork, images: np.ndarray) -> np.ndarray:
    parts = np.split(images, range(250, len(images), 250))
    return np.log(np.concatenate([network(part) for part in parts]).clip(1e-30))


def _confidence(log_p: np.ndarray, threshold: float, classes: Any) -> dict[str, Any]:
    sure = np.exp(log_p.max(axis=1))
    named = np.bincount(log_p.argmax(axis=1), minlength=len(classes))
    return {
        "n_images": len(log_p),
        "mean_confidence": round(100 * float(sure.mean()), 4),
        "kept_share": round(100 * float((sure >= threshold).mean()), 4),
        "named_most": classes[int(named.argmax())],
        "named_most_share": round(100 * float(named.max()) / len(log_p), 4),
    }


def read() -> dict[str, Any]:
    """The published figures."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def write(figures: dict[str, Any]) -> None:
    """Publish what `measure` gave."""
    write_file(FILE, (json.dumps(figures, indent=1) + "\n").encode())


# ---------------------------------------------------------------------------------------- tables


def tables() -> dict[str, pd.DataFrame]:
    """The tables of the card, by the names of their marks."""
    card = read()
    bins = pd.DataFrame(card["calibration"])
    bins["probability"] = [f"{low:.1f} to {high:.1f}" for low, high in bins[["low", "high"]].values]
    bins = bins.assign(mean_confidence=100 * bins["confidence"], accuracy=100 * bins["accuracy"])
    bins = bins.rename(columns={"n": "n_images"})
    return {
        "card-classes": class_table(np.array(card["confusion"]), card["classes"]),
        "card-calibration": bins[["probability", "n_images", "mean_confidence", "accuracy"]],
        "card-confidence": pd.DataFrame(card["confidence"]),
        "card-files": _files(),
    }


def values() -> dict[str, str]:
    """The numbers within the card's sentences, by the names of their marks."""
    card = read()
    confusion = np.array(card["confusion"])
    metrics = RunDirectory(find_run(DEFAULT)).metrics()
    return {
        "card.parameters": f"{metrics['params']:,}",
        "card.macs": f"{metrics['macs']:,}",
        "card.minutes": f"{metrics['seconds_train'] / 60:.0f}",
        "card.accuracy": f"{100 * confusion.trace() / confusion.sum():.2f}",
        "card.ece": f"{100 * card['ece']:.1f}",
        "card.kept": f"{100 * KEPT:.0f}",
        "card.threshold": f"{card['threshold']:.2f}",
    }


def class_table(confusion: np.ndarray, classes: list[str]) -> pd.DataFrame:
    """Each class: its accuracy, its precision, and the class that it is most often taken for.

    Args:
        confusion: how often class i (row) was taken for class j (column), integers (n, n).
    """
    wrong = confusion * (1 - np.eye(len(classes), dtype=int))
    most, called = wrong.argmax(axis=1), confusion.sum(axis=0)
    return pd.DataFrame(
        {
            "class": classes,
            "accuracy": 100 * confusion.diagonal() / confusion.sum(axis=1),
            "precision": 100 * confusion.diagonal() / np.where(called, called, np.nan),
            "mostly_taken_for": [classes[i] for i in most],
            "so_often": wrong[np.arange(len(classes)), most],
        }
    )


def exported() -> list[dict[str, Any]]:
    """What `export` measured of the published files, each."""
    return json.loads((EXPORTED / "export.json").read_text(encoding="utf-8"))["files"]


def _files() -> pd.DataFrame:
    """The published files, but for their times: docs/speed.md."""
    return pd.DataFrame(
        {
            "file": f"`{row['file']}`",
            "accuracy": row["percent"],
            "predicts_as_float": f"{row['agreement']:.2f} %",
            "bytes": row["bytes"],
        }
        for row in exported()
    )
