"""Interrupted at any point, a run goes on to the same numbers, and nothing is ever lost."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import SMALL, assert_same_outcome, history

import augment
from tinycifar import data, optim
from tinycifar.recipes import get_recipe
from tinycifar.run_directory import FILES, RunError
from tinycifar.training import Trainer, train
from tinycifar.weights import load_pretrained

FOUR = get_recipe(
    SMALL, name="four", epochs=4, ema=0.9, policy="reference", alternate_flip=True, dirac=True
)

IN_A_PROCESS = """
import sys
from tinycifar import data
from test_resuming import FOUR
from tinycifar.training import train
train(FOUR, sys.argv[1], dataset=data.load("shapes", limit=100), device="cpu")
"""


@pytest.fixture(scope="module")
def tiny():
    """Fewer images than elsewhere: three steps an epoch."""
    return data.load("shapes", limit=100)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(FOUR, folder, dataset=tiny, device="cpu", progress=False)
    return folder


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def stop_at(monkeypatch, step_to_stop_at, error):
    """Raise `error` in the midst of training, after that many steps."""
    steps, step = [], Trainer.step

    def failing(trainer, *batch):
        steps.append(1)
        if len(steps) == step_to_stop_at:
            raise error
        return step(trainer, *batch)

    monkeypatch.setattr(Trainer, "step", failing)


@pytest.fixture
def interrupted(tiny, tmp_path, monkeypatch):
    """A run of FOUR that was stopped in its third epoch."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 8, KeyboardInterrupt)  # three steps an epoch
        train(FOUR, tmp_path / "run", dataset=tiny, progress=False)
    return tmp_path / "run"


def test_killed_in_an_epoch_and_resumed_it_ends_the_same(tiny, whole, tmp_path):
    """By the one signal that no handler sees, at a random moment of the second epoch or later."""
    folder = tmp_path / "run"
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    process = subprocess.Popen([sys.executable, "-c", IN_A_PROCESS, str(folder)], env=env)
    started = time.monotonic()
    while not (folder / "history.csv").is_file():
        assert process.poll() is None and time.monotonic() < started + 120
        time.sleep(0.002)
    time.sleep(random.Random(0).uniform(0, 0.01))
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was to be killed, not to finish or fail"
    assert not (folder / "metrics.json").is_file()
    train(FOUR, folder, dataset=tiny, progress=False)
    assert_same_outcome(whole, folder)


WITH_WORKERS = """
import sys
from tinycifar import data
from test_resuming import WORKERS
from tinycifar.training import train
train(WORKERS, sys.argv[1], dataset=data.load("shapes", limit=100), device="cpu", workers=2)
"""
WORKERS = get_recipe(SMALL, name="workers", epochs=500, build="albumentations")


def test_a_killed_run_leaves_no_lock_with_its_loaders_processes(tiny, tmp_path):
    """They are forked, and outlive it by some seconds."""
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", WITH_WORKERS, str(tmp_path)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    started = time.monotonic()
    while not (tmp_path / "history.csv").is_file():
        assert process.poll() is None and time.monotonic() < started + 120
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = []
    train(
        WORKERS, tmp_path, dataset=tiny, progress=False, on_epoch=lambda row: not done.append(row)
    )
    assert done[0]["epoch"] == 1


def test_stopped_at_every_file_in_turn_it_ends_the_same(tiny, whole, tmp_path, monkeypatch):
    """Each attempt comes one file further than the one before."""
    attempts, move = 0, os.replace

    class Killed(BaseException):
        pass

    def killed(source, target):
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        while not (tmp_path / "run" / "metrics.json").is_file():
            left = attempts = attempts + 1
            try:
                train(FOUR, tmp_path / "run", dataset=tiny, progress=False)
            except Killed:
                assert attempts < 12
    assert attempts > 4
    assert_same_outcome(whole, tmp_path / "run")


def test_ctrl_c_keeps_the_finished_epochs(tiny, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as raised:
        stop_at(patch, 8, KeyboardInterrupt)
        train(FOUR, tmp_path / "run", dataset=tiny, progress=False)
    assert raised.value.__notes__ == [f"{tmp_path / 'run'} is intact"]
    assert history(tmp_path / "run").equals(history(whole)[:2])
    train(FOUR, tmp_path / "run", dataset=tiny, progress=False)
    assert_same_outcome(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        ("sgd", "plateau"),
        ("adamw", "cosine"),
        ("muon", "constant"),
        ("muon_adamw", "plateau"),
        ("muon_adamw", "one_cycle"),
    ],
)
def test_every_schedule_and_optimizer_resumes(tiny, tmp_path, monkeypatch, schedule, optimizer):
    recipe = get_recipe(
        SMALL, epochs=2, lr=0.01, schedule=schedule, optimizer=optimizer, name="variant"
    )
    train(recipe, tmp_path / "whole", dataset=tiny, progress=False)
    with monkeypatch.context() as patch:
        stop_at(patch, 5, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run", dataset=tiny, progress=False)
    train(recipe, tmp_path / "run", dataset=tiny, progress=False)
    assert_same_outcome(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("file", ["last.pt", "history.csv", "best.pt", "metrics.json"])
def test_a_full_disk_at_any_file_loses_nothing(tiny, whole, tmp_path, monkeypatch, file):
    """The disk fills while the file is written, in the third epoch or at the end."""
    move, seen = os.replace, []

    def full(source, target):
        if os.path.basename(target) == file:
            seen.append(target)
            if file == "metrics.json" or len(seen) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        says = f"can't write .*{file}: No space left on device; the run"
        with pytest.raises(OSError, match=says):
            train(FOUR, tmp_path / "run", dataset=tiny, progress=False)
    assert not list((tmp_path / "run").glob("*.tmp"))
    train(FOUR, tmp_path / "run", dataset=tiny, progress=False)
    assert_same_outcome(whole, tmp_path / "run")


def test_what_is_half_written_is_never_read(tiny, whole, interrupted):
    for name in FILES:
        (interrupted / f"{name}.tmp").write_bytes(b"half of")
    (interrupted / "history.csv").unlink()  # killed between last.pt and what follows from it
    train(FOUR, interrupted, dataset=tiny, progress=False)
    assert_same_outcome(whole, interrupted)


def test_nan_stops_at_that_step_with_the_checkpoint_intact(tiny, whole, tmp_path, monkeypatch):
    steps, loss = [], optim.loss

    def poisoned(*arguments):
        steps.append(1)
        return loss(*arguments) * (float("nan") if len(steps) == 8 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(optim, "loss", poisoned)
        with pytest.raises(RunError, match=r"the loss at step 2 of epoch 3 is nan.*lower lr"):
            train(FOUR, tmp_path / "run", dataset=tiny, progress=False)
    assert len(steps) == 8
    weights = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert all(value.isfinite().all() for value in weights.values())
    train(FOUR, tmp_path / "run", dataset=tiny, progress=False)
    assert_same_outcome(whole, tmp_path / "run")


def test_going_on_under_other_conditions_is_said(tiny, interrupted):
    config = json.loads((interrupted / "config.json").read_text())
    elsewhere = {"threads": 99, "instructions": "ABACUS", "git_commit": "0123abc"}
    elsewhere |= {"compile": True, "libraries": {"albumentations": "1.0"}}
    del config["numpy"]  # as a run of an earlier version
    (interrupted / "config.json").write_text(json.dumps(config | elsewhere))
    state = torch.load(interrupted / "last.pt", weights_only=True)
    del state["config_sha256"]
    torch.save(state, interrupted / "last.pt")
    with pytest.warns(UserWarning, match=r"threads was 99 and is ") as warned:
        train(FOUR, interrupted, dataset=tiny, progress=False)
    message = str(warned[0].message)
    assert "instructions was ABACUS" in message and "git_commit was 0123abc" in message
    assert "compile was True" in message and "libraries was {'albumentations'" in message
    assert "numpy" not in message
    assert warned[0].filename == __file__, "the line that called train"


def test_a_damaged_checkpoint_is_named_and_without_it_the_run_begins_again(
    tiny, whole, interrupted
):
    file = interrupted / "last.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    with pytest.raises(RunError, match=r"last\.pt is damaged.*put a whole copy of it back"):
        train(FOUR, interrupted, dataset=tiny, progress=False)
    file.unlink()
    train(FOUR, interrupted, dataset=tiny, progress=False)
    assert_same_outcome(whole, interrupted)


@pytest.mark.parametrize("file", ["last.pt", "best.pt"])
def test_a_flipped_bit_is_never_gone_on_with(tiny, whole, interrupted, file):
    content = bytearray((interrupted / file).read_bytes())
    tensor = next(iter(torch.load(interrupted / "best.pt", weights_only=True).values()))
    content[content.index(tensor.numpy().tobytes()) + 1] ^= 1
    (interrupted / file).write_bytes(content)
    if file == "last.pt":
        with pytest.raises(RunError, match=r"last\.pt is damaged"):
            train(FOUR, interrupted, dataset=tiny, progress=False)
        assert (interrupted / file).read_bytes() == content
    else:
        with pytest.raises(ValueError, match=r"best\.pt is refused: it is damaged"):
            load_pretrained(interrupted)
        train(FOUR, interrupted, dataset=tiny, progress=False)  # it is written again, from last.pt
        assert_same_outcome(whole, interrupted)


def test_a_finished_run_is_returned_without_writing(tiny, whole):
    """It may be in a read-only place."""
    times = lambda: {p: p.stat().st_mtime_ns for p in [whole, *whole.iterdir()]}  # noqa: E731
    before = times()
    assert train(FOUR, whole, dataset=tiny, progress=False)["epochs_run"] == 4
    assert times() == before


def test_a_run_whose_folder_is_renamed_says_so_and_goes_on_under_its_new_name(
    tiny, whole, tmp_path
):
    def rename(row):
        if row["epoch"] == 2:
            (tmp_path / "run").rename(tmp_path / "new")

    with pytest.raises(RunError, match="was removed, renamed or replaced during its run"):
        train(FOUR, tmp_path / "run", dataset=tiny, progress=False, on_epoch=rename)
    assert not (tmp_path / "run").exists()
    train(FOUR, tmp_path / "new", dataset=tiny, progress=False)
    assert_same_outcome(whole, tmp_path / "new")


def test_a_finished_run_is_kept_unless_forced(tiny, whole, tmp_path, capsys):
    before = contents(whole)
    metrics = train(FOUR, whole, dataset=tiny)
    assert metrics == json.loads((whole / "metrics.json").read_text())
    assert "is finished, and kept: FORCE=1" in capsys.readouterr().out and contents(whole) == before
    other = get_recipe(SMALL, epochs=1)
    with pytest.raises(RunError, match=r"recipe\.epochs is 4 there and 1 now.*FORCE=1"):
        train(other, whole, dataset=tiny, progress=False)
    assert contents(whole) == before
    shutil.copytree(whole, tmp_path / "r")
    metrics = train(other, tmp_path / "r", dataset=tiny, force=True, progress=False)
    assert metrics["epochs_run"] == 1
    assert json.loads((tmp_path / "r" / "config.json").read_text())["recipe"]["epochs"] == 1
    forced = train(other, tmp_path / "r", seed=0, dataset=tiny, force=True, progress=False)
    assert forced["seconds_train"] != metrics["seconds_train"], "it was trained again"


def test_a_forced_run_that_cannot_start_replaces_nothing(tiny, whole, monkeypatch):
    def missing():
        raise ImportError("needs albumentations")

    before = contents(whole)
    monkeypatch.setattr(augment, "_import_albumentations", missing)
    recipe = get_recipe(SMALL, build="albumentations", alternate_flip=False)
    with pytest.raises(ImportError, match="albumentations"):
        train(recipe, whole, dataset=tiny, force=True, progress=False)
    assert contents(whole) == before


def test_a_forced_run_that_was_interrupted_goes_on_too(tiny, whole, tmp_path, monkeypatch):
    train(get_recipe(SMALL, epochs=1), tmp_path / "run", dataset=tiny, progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 8, KeyboardInterrupt)
        train(FOUR, tmp_path / "run", dataset=tiny, force=True, progress=False)
    assert len(history(tmp_path / "run")) == 2
    with monkeypatch.context() as patch:
        stop_at(patch, 7, AssertionError("it began again"))  # two epochs are left, six steps
        train(FOUR, tmp_path / "run", dataset=tiny, force=True, progress=False)
    assert_same_outcome(whole, tmp_path / "run")


@pytest.mark.parametrize("removed", range(1, 5))
def test_a_run_that_was_half_removed_is_no_others_to_go_on_with(
    tiny, whole, tmp_path, monkeypatch, removed
):
    """Killed while FORCE=1 was removing it, after that many of its files."""
    shutil.copytree(whole, tmp_path / "run")
    gone, unlink = [], Path.unlink

    def killed(path, **options):
        if len(gone) == removed:
            raise KeyboardInterrupt
        gone.append(path)
        unlink(path, **options)

    other = get_recipe(FOUR, lr=0.01, name="other")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            train(other, tmp_path / "run", force=True, dataset=tiny, progress=False)
    with pytest.raises(RunError, match=r"recipe\.lr is 0\.05 there and 0\.01 now"):
        train(other, tmp_path / "run", dataset=tiny, progress=False)
