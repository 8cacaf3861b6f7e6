"""Which layers may be in int8, on validation: what docs/export.md shows. Nothing is trained here.

python benchmarks/int8.py      # some minutes; needs CIFAR-10
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import augment
from tiny_cifar10_net import folded
from tinycifar import load, load_pretrained, quantise
from tinycifar.data import DataSplits, some_of
from tinycifar.evaluation import evaluate
from tinycifar.export import CALIBRATION

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Evaluate the default weights with simulated int8 in several ways, and the recipe `int8`."""
    network, splits = load_pretrained(), DataSplits(load("cifar10"), "val")
    images = splits.train[0][some_of(splits.train_index, CALIBRATION)]
    batches = augment.normalised(images, network.mean, network.std).split(64)
    convs = {n: m for n, m in folded(network).named_modules() if isinstance(m, nn.Conv2d)}
    first, *_, head = convs
    dilated = [name for name, conv in convs.items() if conv.dilation[0] > 1]
    depthwise = [name for name, conv in convs.items() if conv.groups > 1]
    ways = {  # name: layers in float, the weights' largest level
        "none": ([], 63),
        "the first": ([first], 63),
        "the first and the head": ([first, head], 63),
        "these, weights of eight bits": ([first, head], 127),
        "these and the dilated depthwise": ([first, head, *dilated], 63),
        "these and all depthwise": ([first, head, *depthwise], 63),
    }
    rows: list[dict[str, Any]] = []

    def note(name: str, trained: bool, model: nn.Module) -> None:
        model = model.to(memory_format=torch.channels_last)
        assert splits.selection is not None
        loss, accuracy = evaluate(model, *splits.selection, splits.stats)
        rows.append({"float": name, "trained": trained, "val_acc": accuracy, "val_loss": loss})
        print(rows[-1], flush=True)

    note("all", False, network)
    for name, (exact, largest) in ways.items():
        with mock.patch.object(quantise, "MAX_WEIGHT", largest):
            model = quantise.simulated_int8(network, exact)
            quantise.calibrate(model, batches)
            note(name, False, model)
    note("the first and the head", True, load_pretrained("int8"))
    (HERE / "int8.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
