"""The benchmark's machinery: that it times what it says. How fast anything is, no test asks."""

import importlib.util
import json
import pickle
import sys

import pytest
import torch

import tinycifar.data as cifar10
from tinycifar import publish
from tiny_cifar10_net import NetCIFAR10_Tiny

FOLDER = publish.ROOT / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))  # as for a script that is run from there
    try:
        spec = importlib.util.spec_from_file_location("bench", FOLDER / "bench.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


def test_contestants_train_when_told(bench):
    runs = bench.race(["reference", "ours-eager"], rounds=1, steps=1)
    for run in runs.values():
        (turn,) = run.turns
        assert turn["steps"] == 1 and turn["seconds"] > 0
        assert run.process.returncode == 0
    parts = runs["ours-eager"].turns[0]["parts"]
    told_apart = {"data and augmentation", "forward", "backward", "optimizer and metrics"}
    assert set(parts) == (told_apart if bench.DEVICE.type == "cpu" else set())
    assert sum(parts.values()) <= runs["ours-eager"].turns[0]["seconds"]


def test_the_references_images_reach_a_loaders_process(bench):
    from contestants import Images

    data = cifar10.load("shapes", limit=100)
    images = Images(data.train_images, data.train_labels, cifar10.Stats((0.5,) * 3, (0.2,) * 3))
    image, label = pickle.loads(pickle.dumps(images))[3]  # as where processes are spawned
    assert image.shape == (3, 32, 32) and label == data.train_labels[3]


def test_the_roofline_counts_what_the_network_does(bench, monkeypatch):
    monkeypatch.setattr(bench, "measured_peak", lambda device: 1e9)
    monkeypatch.setattr(bench, "measured_bandwidth", lambda device: 1e9)
    roof = bench.roofline(step_seconds=100.0)
    outputs = []
    net = NetCIFAR10_Tiny()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, out: outputs.append(out[0].numel()))
    net(torch.zeros(1, 3, 32, 32).expand(2, -1, -1, -1))
    floors = roof["floor_seconds"]
    assert floors["multiply-adds"] == pytest.approx(3 * 128 * 17_330_816 / 1e9)
    assert floors["memory"] == pytest.approx(6 * 4 * 128 * sum(outputs) / 1e9)
    assert roof["share"] == pytest.approx(max(floors.values()) / 100)


def test_the_committed_figures_can_be_shown(bench):
    result = json.loads(publish.BENCHMARK.read_text())
    table = publish.speed_table(result)
    assert f"{result['ratio']:.2f}x" in table and result["machine"]["processor"] in table
    assert result["ratio"] == pytest.approx(
        result["images_per_second"]["ours"] / result["images_per_second"]["reference"]
    )
    assert bench.plot(result).axes
