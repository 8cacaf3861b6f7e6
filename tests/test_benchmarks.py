"""The benchmark's machinery: that it times what it says. How fast anything is, no test asks."""

import importlib
import json
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import SMALL

from tiny_cifar10_net import NetCIFAR10_Tiny
from tinycifar import publish
from tinycifar.data import Stats, load
from tinycifar.paths import CHECKOUT
from tinycifar.recipes import get_recipe
from tinycifar.training import settle, train

FOLDER = CHECKOUT / "benchmarks"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))  # as for a script that is run from there
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def bench(script):
    return script("bench")


@pytest.mark.parametrize("name", ["reference", "ours"])
def test_contestants_train_when_told(bench, monkeypatch, tiny, name):
    import contestants

    monkeypatch.setattr(contestants, "load", lambda: tiny)
    monkeypatch.setattr(contestants, "BATCH", 20)
    monkeypatch.setattr(contestants, "settle", partial(settle, dataset=tiny))
    ways = {"reference": contestants.reference, "ours": partial(contestants.ours, "ours-eager")}
    answer = contestants.timed(ways[name](), 2)
    told_apart = {"data and augmentation", "forward", "backward", "optimizer and metrics"}
    on_cpu = contestants.DEVICE.type == "cpu" and name == "ours"
    assert set(answer["parts"]) == (told_apart if on_cpu else set())
    assert sum(answer["parts"].values()) <= answer["seconds"]


def test_a_contestant_answers_from_a_process_of_its_own(bench):
    runs = bench.race(["ours-eager"], rounds=1, steps=1)
    assert runs["ours-eager"].process.exitcode == 0
    assert runs["ours-eager"].rate() > 0


def test_the_references_images_reach_a_loaders_process(bench):
    from contestants import Images

    data = load("shapes", limit=100)
    images = Images(data.train_images, data.train_labels, Stats((0.5,) * 3, (0.2,) * 3))
    image, label = pickle.loads(pickle.dumps(images))[3]  # as where processes are spawned
    assert image.shape == (3, 32, 32) and label == data.train_labels[3]


def test_the_roofline_counts_what_the_network_does(bench, monkeypatch):
    monkeypatch.setattr(bench, "measured_peak", lambda device: 1e9)
    monkeypatch.setattr(bench, "measured_bandwidth", lambda device: 1e9)
    outputs = []
    net = NetCIFAR10_Tiny()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, out: outputs.append(out[0].numel()))
    net(torch.zeros(1, 3, 32, 32).expand(2, -1, -1, -1))
    floors = bench.roofline()
    assert floors["multiply-adds"] == pytest.approx(3 * 128 * 17_330_816 / 1e9)
    assert floors["memory"] == pytest.approx(6 * 4 * 128 * sum(outputs) / 1e9)


def test_ratios_of_inference_are_over_plain_torch(bench, monkeypatch):
    import inference

    def in_turns(calls, rounds, repeat):
        for call in calls.values():
            call()
        return {name: 1 / (i + 1) for i, name in enumerate(calls)}

    monkeypatch.setattr(inference, "in_turns", in_turns)
    monkeypatch.setattr(inference, "BATCHES", (1, 2))
    found = inference.find_spec  # OpenVINO isn't pinned: an installed one may be any
    monkeypatch.setattr(inference, "find_spec", lambda name: name != "openvino" and found(name))
    result = inference.measure(rounds=1, compiled=False)
    measured = {row["figure"]: row["measured"] for row in result["figures"]}
    assert measured["torch, fused, over plain torch, batch 1"] == "2.0x"
    assert measured["ONNX Runtime, int8 over float, batch 2"] == "1.3x"
    table = publish.inference_table({"machine": bench.machine(), "date": "today", **result})
    assert "one thread" in table and result["versions"]["onnxruntime"] in table


def test_the_committed_figures_can_be_shown(bench):
    result = json.loads((FOLDER / "cpu.json").read_text())
    table = publish.speed_table(result)
    for row in result["figures"]:
        assert row["figure"] in table and row["measured"] in table
    assert result["machine"]["processor"] in table
    assert bench.plot(result).axes


# -------------------------------------------------------------------------------------- kills


def test_killed_and_resumed_runs_are_counted_and_compared():
    command = [sys.executable, FOLDER / "kills.py", "--kills", "2", "--only", "adamw, cosine"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 kills (1 of the process alone)" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["all", "2", "kills,", "0", "differences"]


def test_a_run_that_ends_otherwise_is_named(script, tiny, tmp_path):
    for folder, seed in (("a", 0), ("same", 0), ("other", 1)):
        recipe = get_recipe(SMALL, epochs=1)
        train(recipe, tmp_path / folder / "run", seed=seed, dataset=tiny, progress=False)
    kills = script("kills")
    assert list(kills.differences(tmp_path / "a", tmp_path / "same")) == []
    assert "has other weights" in next(kills.differences(tmp_path / "a", tmp_path / "other"))
    history = tmp_path / "same" / "run" / "history.csv"
    history.write_text(history.read_text().replace("1,", "2,", 1))
    assert "is damaged" in next(kills.differences(tmp_path / "a", tmp_path / "same"))
    (tmp_path / "other" / "run" / "metrics.json").unlink()
    assert "isn't finished" in next(kills.differences(tmp_path / "a", tmp_path / "other"))
