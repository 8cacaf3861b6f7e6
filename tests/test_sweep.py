"""Many runs at once: ordinary run directories, each as `train` would have made it alone."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

import augment
import tinycifar.data as cifar10
from tinycifar import run_directory
from tinycifar import studies
from tinycifar.recipes import Recipe, get_recipe
from tinycifar.run_directory import RunError
from tinycifar.studies import train_many
from tinycifar.training import train

SMALL = Recipe("small", epochs=1, batch_size=32, lr=0.05, schedule="one_cycle", policy="light")
FAILING = Recipe("failing", epochs=1, batch_size=32, lr=99, schedule="constant")


def test_runs_are_what_train_makes_and_finished_ones_are_kept(tiny, tmp_path, capsys):
    threads = torch.get_num_threads()
    settings = {"dataset": tiny, "device": "cpu", "folder": tmp_path}
    many = train_many([SMALL], seeds=[3, 4], jobs=threads, **settings)
    assert [m["seed"] for m in many] == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small-val-seed3", "small-val-seed4"]
    printed = capsys.readouterr().out
    assert printed.count("on shapes (stand-in, NOT CIFAR-10), 200 training images") == 2

    torch.set_num_threads(1)  # as each of them had
    try:
        alone = train(SMALL, tmp_path / "alone", seed=4, dataset=tiny, progress=False)
    finally:
        torch.set_num_threads(threads)
    assert alone["test_loss"] == many[1]["test_loss"]

    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    again = train_many([SMALL], seeds=[3, 4], progress=False, **settings)
    assert again == many
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")} == before


def test_a_failure_stops_no_other_run(tiny, tmp_path):
    with pytest.raises(RunError, match=r"1 of 2 runs failed.*failing-val-seed0: .*lower lr"):
        train_many([FAILING, SMALL], dataset=tiny, folder=tmp_path, progress=False)
    assert json.loads((tmp_path / "small-val-seed0" / "metrics.json").read_text())["seed"] == 0


def test_policies_of_ones_own_reach_the_processes(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(augment.POLICIES, "mine", augment.Policy(flip=1.0))
    recipe = get_recipe(SMALL, name="own", policy="mine")
    train_many([recipe], dataset=tiny, folder=tmp_path, jobs=1, progress=False)
    config = json.loads((tmp_path / "own-val-seed0" / "config.json").read_text())
    assert config["policies"]["mine"]["flip"] == 1.0


def die(*_, **__):
    os._exit(9)  # as the kernel ends a process where memory runs out


def test_a_killed_process_is_named_and_loses_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_train", die)
    with pytest.raises(RunError, match=r"a training process was killed.*fewer JOBS"):
        train_many([SMALL], seeds=[0, 1], dataset=tiny, folder=tmp_path, progress=False)


def test_a_killed_sweep_leaves_nothing_training(tmp_path):
    """Its processes would hold their runs' locks, and the cores."""
    command = ["baseline", "--seeds", "0", "--dataset", "shapes", "--folder", str(tmp_path)]
    sweep_process = subprocess.Popen([sys.executable, "-m", "sweep", *command], cwd=studies.ROOT)
    run_dir = tmp_path / "baseline-val-seed0"
    wait_until((run_dir / "config.json").is_file, 120)
    assert locked(run_dir)
    sweep_process.kill()
    sweep_process.wait()
    wait_until(lambda: not locked(run_dir), 30)


def wait_until(happened, seconds):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def locked(run_dir):
    try:
        with run_directory.locked(run_dir):
            return False
    except RunError:
        return True


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"recipes": []}, "nothing to train"),
        ({"recipes": ["slow"]}, "unknown recipe"),
        ({"seeds": [1, 1]}, "only once"),
        ({"seeds": [-1]}, "seed must be"),
        ({"jobs": 0}, "jobs must be"),
        ({"protocol": "train"}, "unknown protocol"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(tiny, tmp_path, arguments, says):
    arguments = {"recipes": [SMALL], "folder": tmp_path, "dataset": tiny} | arguments
    with pytest.raises(ValueError, match=says):
        train_many(**arguments)
    assert not list(tmp_path.iterdir())


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert studies._share_out(100, cpu, None) == (16, 1)
    assert studies._share_out(3, cpu, None) == (3, 5)
    assert studies._share_out(100, cpu, 4) == (4, 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as OMP_NUM_THREADS=1 has it
    for cores, shared in ((16, (8, 2)), (2, (2, 1))):
        monkeypatch.setattr(sweep, "_cores", lambda cores=cores: cores)
        assert studies._share_out(100, gpu, None) == shared


def test_a_run_on_other_data_is_not_passed_off_as_this_one(tiny, tmp_path):
    train_many([SMALL], dataset=tiny, folder=tmp_path, jobs=1, progress=False)
    other = cifar10.load("shapes", limit=210)
    with pytest.raises(RunError, match=r"differs: .*limit is 200 there and 210 now"):
        train_many([SMALL], dataset=other, folder=tmp_path, progress=False)
    with pytest.raises(cifar10.DataError, match="is unknown"):
        train_many([SMALL], dataset="nope", folder=tmp_path)
