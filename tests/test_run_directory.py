"""run_directory.py: one name, one folder; files that are whole or absent; whose run it is."""

import errno
import json
import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import SMALL

import augment
from tinycifar import run_directory
from tinycifar.paths import CHECKOUT, RESULTS
from tinycifar.recipes import RECIPES, Recipe, get_recipe
from tinycifar.run_directory import (
    FILES,
    HISTORY_COLUMNS,
    PRETRAINED,
    RunDirectory,
    RunError,
    conditions,
    find_run,
    identity,
    read_tensors,
    write_file,
)

CPU = torch.device("cpu")
# Of a run of one epoch, see `state`, as far as they are relied on.
METRICS = {"dataset": "shapes", "limit": 200, "protocol": "val", "params": 1, "epochs_run": 1}
METRICS |= {"best_epoch": 1, "train_acc": 10.0, "test_acc": 90.0, "test_loss": 0.5}
WORDS = (",".join(HISTORY_COLUMNS) + "\n1,fast,2,3,4,5,6\n").encode()
METRICS |= {"val_acc": None, "val_loss": None, "seconds_train": 1.0}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def begun(run, tiny):
    """A run of SMALL that has a config.json and nothing else."""
    write(run, "config.json", config_of(identity(SMALL, 0, "val", tiny)))
    return run


def write(run, name, content):
    (run.path / name).write_text(json.dumps(content))


def state(seconds=1.0):
    """What a trainer would save after one epoch."""
    row = dict(zip(HISTORY_COLUMNS, (1, 0.1, 2.5, 10.0, None, None, seconds), strict=True))
    best = (1, math.inf, {"w": torch.arange(3)})
    return {"history": [row], "model": {}, "optimizers": [], "best": best}


def config_of(who):
    described = {"split": {}, "mean": [0.5] * 3, "std": [0.2] * 3, "classes": ["a"], "model": {}}
    return who | described | conditions(SMALL, CPU, "auto")


# --------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("preset", PRETRAINED)
def test_a_presets_name_is_its_published_run(preset):
    assert find_run(preset) == RESULTS / PRETRAINED[preset]
    recipe = RunDirectory(RESULTS / PRETRAINED[preset]).config()["recipe"]
    assert Recipe(**recipe) == RECIPES[preset], (
        "the preset is what its published run was trained by"
    )


@pytest.mark.parametrize("folder", sorted(p.parent for p in RESULTS.glob("*/config.json")))
def test_a_published_runs_name_is_its_folder(folder):
    assert find_run(folder.name) == RESULTS / PRETRAINED.get(folder.name, folder.name)
    assert find_run(folder) == folder


def test_a_studys_run_is_named_by_its_study():
    name = "ablation/plateau-val-seed0"
    assert find_run(name) == find_run(Path(name)) == RESULTS / "studies" / name
    with pytest.raises(FileNotFoundError):
        find_run("ablation")  # a study's folder is no run


@pytest.mark.skipif(CHECKOUT is None, reason="an installed copy")
@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_every_way_to_name_a_run_means_one_folder(monkeypatch, folder):
    monkeypatch.chdir(CHECKOUT / folder)
    ways = ["quick", "results/quick", "./results/quick", "results/../results/quick/"]
    ways += [Path("results", "quick"), RESULTS / "quick", str(RESULTS / "quick")]
    assert {find_run(way).resolve() for way in ways} == {(RESULTS / "quick").resolve()}


def test_a_run_of_ones_own_is_named_by_its_path(monkeypatch, tmp_path):
    own = tmp_path / "runs" / "mine"
    own.mkdir(parents=True)
    (own / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for way in ("runs/mine", "./runs/mine", "runs/../runs/mine", own, str(own)):
        assert find_run(way).resolve() == own.resolve()
    monkeypatch.chdir(own.parent)
    assert find_run("mine") == own
    assert find_run("quick") == RESULTS / "quick", "published names mean the same everywhere"


def test_a_path_that_begins_with_a_dot_is_never_a_published_name(monkeypatch, tmp_path):
    own = tmp_path / "quick"
    own.mkdir()
    (own / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_run("./quick").resolve() == own.resolve()


@pytest.mark.parametrize("name", ["ablation/../../quick", "../results/quick", "studies/../quick"])
def test_names_that_climb_are_paths_and_nothing_else(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run at"):
        find_run(name)


@pytest.mark.parametrize("name", ["nobody", "", "results", "/nowhere/at/all", "~/nobody"])
def test_an_unknown_name_lists_what_there_is(name):
    with pytest.raises(FileNotFoundError) as error:
        find_run(name)
    text = str(error.value)
    assert text.startswith(f"no run at {name!r}: expected the path of a run directory")
    there = text.rpartition("published one: ")[2].split(", ")
    assert there[:4] == ["taught", "tuned", "sprint", "quick"]
    assert "baseline-test-selected" in there and len(set(there)) == len(there)
    assert {find_run(known).parent for known in there} == {RESULTS}


# --------------------------------------------------------------------------------- what is read


def test_a_config_reads_in_todays_fields(begun):
    config = json.loads((begun.path / "config.json").read_text())
    del config["recipe"]["network"], config["recipe"]["temperature"]
    (begun.path / "config.json").write_text(json.dumps(config))
    recipe = begun.config()["recipe"]
    assert (recipe["network"], recipe["temperature"]) == ("tiny", 4.0)
    assert recipe["name"] == "small"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", r"config\.json is not JSON, as train\(\) writes it"),
        ("{", r"config\.json is not JSON, as train\(\) writes it"),
        ("[" * 10_000, r"config\.json is not JSON, as train\(\) writes it"),
        ("[]", r"config\.json was not written by train\(\): no valid recipe, seed, protocol"),
        ('{"model_type": "bert"}', r"was not written by train\(\): no valid recipe, seed"),
    ],
)
def test_a_config_of_something_else_is_named(begun, tiny, content, says):
    (begun.path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        begun.config()
    with pytest.raises(RunError, match=says + ".*put a whole copy of it back, give another name"):
        begun.kept(identity(SMALL, 0, "val", tiny))


@pytest.mark.parametrize("content", [b"", b"caf\xe9", b"[" * 10_000, b"[]", b"3", b"{}", b"null"])
def test_metrics_of_something_else_are_named(begun, tiny, content):
    (begun.path / "metrics.json").write_bytes(content)
    says = r"metrics\.json (is not JSON, as|was not written by) train\(\)"
    for read in (begun.metrics, begun.config, begun.verify_weights, begun.history):
        if read == begun.verify_weights:
            (begun.path / "best.pt").touch()
        if read == begun.history:
            (begun.path / "history.csv").write_text(",".join(HISTORY_COLUMNS) + "\n")
        with pytest.raises(ValueError, match=says):
            read()
    with pytest.raises(RunError, match=says + ".*put a whole copy of it back"):
        begun.kept(identity(SMALL, 0, "val", tiny))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recipe", []),
        ("seed", "0"),
        ("split", None),
        ("mean", [0.5, 0.5]),
        ("mean", [125.3, 123.0, 113.9]),
        ("std", ["a"] * 3),
        ("std", [0.2, 0.2, math.nan]),
        ("classes", 10),
        ("protocol", "train"),
    ],
)
def test_a_field_of_another_kind_is_named(begun, field, value):
    config = json.loads((begun.path / "config.json").read_text())
    write(begun, "config.json", config | {field: value})
    with pytest.raises(ValueError, match=rf"config\.json .*\b{field}\b"):
        begun.config()


def test_metrics_are_there_once_the_run_is_finished(run):
    assert not run.is_finished
    with pytest.raises(FileNotFoundError):
        run.metrics()
    write(run, "metrics.json", {"test_acc": 90.0})
    assert run.is_finished
    with pytest.raises(ValueError, match=r"metrics\.json was not written by train\(\).*params"):
        run.metrics()
    write(run, "metrics.json", METRICS)
    assert run.metrics() == METRICS


def test_the_history_is_numbers_and_empty_before_the_first_epoch(run):
    assert list(run.history().columns) == list(HISTORY_COLUMNS) and run.history().empty
    (run.path / "history.csv").write_text(
        ",".join(HISTORY_COLUMNS) + "\n1,0.1,2.5,10.0,,,3.0\n2,0.05,2.0,20.0,,,3.5\n"
    )
    history = run.history()
    assert set(history.dtypes) == {pd.Series([0.5]).dtype}
    assert history["train_loss"].tolist() == [2.5, 2.0] and history["epoch"].tolist() == [1, 2]
    assert history["val_loss"].map(math.isnan).all()


@pytest.mark.parametrize(
    "content",
    [b"", b"epoch,lr\n1,0.1\n", b"\0\1\2", b"x" * 50, b"caf\xe9", b"[" * 10_000, WORDS],
)
def test_a_damaged_history_is_named(run, content):
    (run.path / "history.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"history\.csv can't be read .*; expected numbers in ep"):
        run.history()


def test_a_history_that_lacks_something_is_named(run):
    header, row = ",".join(HISTORY_COLUMNS) + "\n", "{},0.1,2.5,10.0,,,3.0\n"
    for rows in (
        [row.format(2)],
        [row.format(1), row.format(3)],
        [row.format(1), row.format(1)],
        [row.format(1), "2,0.05,2.\n"],  # cut short
    ):
        (run.path / "history.csv").write_text(header + "".join(rows))
        with pytest.raises(ValueError, match=r"history\.csv is damaged: expected a whole row"):
            run.history()


@pytest.mark.parametrize("older", [False, True])
def test_the_history_of_a_finished_run_is_the_one_it_was_finished_with(begun, tiny, older):
    """An older run has no checksum of it, but its metrics."""
    who = identity(SMALL, 0, "val", tiny)
    with begun.opened(config_of(who), who):
        begun.save(state())
        metrics = begun.finish(METRICS)
    if older:
        write(begun, "metrics.json", METRICS)
    file = begun.path / "history.csv"
    whole = file.read_bytes()
    header, row, _ = whole.split(b"\n")
    for changed in (
        header + b"\n",
        whole + row.replace(b"1,", b"2,", 1) + b"\n",
        whole.replace(b"10.0", b"11.0"),  # train_acc
        whole.replace(b"1.0\n", b"2.0\n"),  # seconds
        *([] if older else [whole.replace(b"2.5", b"2.4")]),  # train_loss
    ):
        assert changed != whole
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"history\.csv is damaged, or another run's"):
            begun.history()
    file.unlink()
    with pytest.raises(ValueError, match=r"history\.csv can't be read"):
        begun.history()
    file.write_bytes(whole.replace(b"\n", b"\r\n"))  # as git may give it on Windows
    assert len(begun.history()) == metrics["epochs_run"]


def test_published_runs_agree_on_the_data():
    """Most note no checksum of their config.json."""
    found = {}
    for file in RESULTS.rglob("config.json"):
        run = RunDirectory(file.parent)
        config = run.config()
        told = {name: config[name] for name in ("split", "mean", "std", "classes")}
        assert found.setdefault((config["data_sha256"], config["protocol"]), told) == told, file
    assert len(found) == 3


def test_weights_are_verified_by_the_checksum_of_a_finished_run(run):
    run.verify_weights()  # nothing there yet
    (run.path / "best.pt").write_bytes(b"weights")
    write(run, "metrics.json", METRICS | {"weights_sha256": "0" * 64})
    with pytest.raises(ValueError, match=r"best\.pt is refused: its checksum isn't the one"):
        run.verify_weights()
    write(run, "metrics.json", METRICS | {"weights_sha256": run.checksum()})
    run.verify_weights()


def test_no_flipped_bit_changes_what_is_read(tmp_path):
    torch.manual_seed(0)
    state = {"epoch": 3, "lr": 0.1, "w": torch.randn(100), "steps": torch.arange(5)}
    torch.save(state, tmp_path / "whole.pt")
    whole, refused = (tmp_path / "whole.pt").read_bytes(), 0
    for place in range(0, 8 * len(whole), 41):  # every bit of a byte in turn, also of the directory
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:
            found = read_tensors(tmp_path / "flipped.pt")
        except ValueError as error:
            assert "flipped.pt is damaged" in str(error)
            refused += 1
        else:  # in the padding between records
            tensors = [found.pop("w").equal(state["w"]), found.pop("steps").equal(state["steps"])]
            assert all(tensors) and found == {"epoch": 3, "lr": 0.1}, place
    assert refused > 150


def test_a_record_marked_as_a_folder_isnt_read_as_zeros(tmp_path):
    torch.save({"w": torch.ones(100)}, tmp_path / "w.pt")
    content = bytearray((tmp_path / "w.pt").read_bytes())
    entry = content.rindex(b"PK\1\2", 0, content.rindex(b"data/0"))
    content[entry + 38] ^= 0x10
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pt is damaged"):
        read_tensors(tmp_path / "w.pt")


# ------------------------------------------------------------------------------ what is written


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "file"
    write_file(file, b"one")
    write_file(file, b"two")
    assert file.read_bytes() == b"two"
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(OSError, match=r"can't write .*file: No space left on device"):
                write_file(file, b"three")
        assert file.read_bytes() == b"two" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(OSError, match=r"can't write .*absent"):
        write_file(tmp_path / "absent" / "file", b"one")


def test_links_are_never_followed_for_writing(begun, tiny, tmp_path):
    mine, who = tmp_path / "mine", identity(SMALL, 0, "val", tiny)
    mine.write_text("mine")
    names = [name for name in FILES if name != "config.json"]
    for name in names:
        (begun.path / f"{name}.tmp").symlink_to(mine)
        (begun.path / name).symlink_to(tmp_path / "nothing")
    (begun.path / "best.pt.tmp").unlink()
    os.link(mine, begun.path / "best.pt.tmp")
    with begun.opened(config_of(who), who):
        begun.save(state())
        begun.finish(METRICS)
    assert mine.read_text() == "mine" and not (tmp_path / "nothing").exists()
    assert not any(p.is_symlink() for p in begun.path.iterdir())
    assert begun.metrics()["test_acc"] == 90.0


def test_a_lock_that_is_a_link_is_refused_and_left_alone(begun, tiny, tmp_path):
    mine, who = tmp_path / "mine", identity(SMALL, 0, "val", tiny)
    mine.write_text("mine")
    for target in (mine, tmp_path / "nothing"):
        (begun.path / ".lock").symlink_to(target)
        with (
            pytest.raises(RunError, match=r"\.lock is a link, which no lock of ours is: remove"),
            begun.opened(config_of(who), who),
        ):
            pass
        (begun.path / ".lock").unlink()
    os.link(mine, begun.path / ".lock")
    with begun.opened(config_of(who), who):
        pass
    assert mine.read_text() == "mine" and not (tmp_path / "nothing").exists()


def test_a_folder_may_be_a_link_but_not_to_nothing(begun, tiny, tmp_path):
    who = identity(SMALL, 0, "val", tiny)
    (tmp_path / "link").symlink_to(begun.path)
    linked = RunDirectory(tmp_path / "link")
    with linked.opened(config_of(who), who):
        linked.save(state())
    assert len(begun.history()) == 1
    (tmp_path / "dangling").symlink_to(tmp_path / "unmounted")
    for place in (tmp_path / "dangling", tmp_path / "dangling" / "below"):
        with (
            pytest.raises(RunError, match=r"dangling is a link to .*unmounted, which isn't there"),
            RunDirectory(place).opened(config_of(who), who),
        ):
            pass
    assert not (tmp_path / "unmounted").exists()


def replaced(path):
    path.rename(path.with_name("elsewhere"))
    path.mkdir()


def begun_again(path):
    replaced(path)
    (path / ".lock").touch()  # by another process


@pytest.mark.parametrize(
    "happens",
    [shutil.rmtree, lambda path: path.rename(path.with_name("elsewhere")), replaced, begun_again],
    ids=["removed", "renamed", "replaced", "begun again"],
)
@pytest.mark.parametrize("then", ["save", "finish"])
def test_a_folder_that_is_gone_is_said_to_be_and_not_made_anew(begun, tiny, happens, then):
    who = identity(SMALL, 0, "val", tiny)
    with begun.opened(config_of(who), who):
        begun.save(state())
        happens(begun.path)
        there = sorted(begun.path.parent.rglob("*"))
        with pytest.raises(RunError, match="was removed, renamed or replaced during its run"):
            begun.save(state()) if then == "save" else begun.finish(METRICS)
    assert sorted(begun.path.parent.rglob("*")) == there


def test_a_folder_that_goes_while_a_file_is_written_is_said_to_be_gone(begun, tiny, monkeypatch):
    who, sync = identity(SMALL, 0, "val", tiny), os.fsync

    def removed(file):
        shutil.rmtree(begun.path)
        sync(file)

    with begun.opened(config_of(who), who):
        monkeypatch.setattr(os, "fsync", removed)
        with pytest.raises(RunError, match="was removed, renamed or replaced during its run"):
            begun.save(state())
    assert not begun.path.exists()


def test_a_folder_is_trained_by_one_process_at_a_time(begun, tiny):
    who = identity(SMALL, 0, "val", tiny)
    config = config_of(who)
    with (
        begun.opened(config, who),
        pytest.raises(RunError, match="is being trained by another process: wait"),
        RunDirectory(begun.path).opened(config, who),
    ):
        pass
    with pytest.raises(KeyError), begun.opened(config, who):
        raise KeyError
    with begun.opened(config, who):
        pass  # let go of, whatever happened


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_is_used_without(begun, tiny, monkeypatch, reason):
    """No file in place of the lock: it would outlive its process, and keep others off for ever."""

    def flock(*_):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("fcntl.flock", flock)
    who = identity(SMALL, 0, "val", tiny)
    opened = begun.opened(config_of(who), who)
    if reason == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(reason)), opened:
            pass
    else:
        with begun.opened(config_of(who), who):
            begun.save(state())
            with RunDirectory(begun.path).opened(config_of(who), who):
                pass  # nothing in place of the lock stops another


def test_a_lock_of_another_library_is_respected(begun, tiny):
    fcntl = pytest.importorskip("fcntl")
    who = identity(SMALL, 0, "val", tiny)
    with open(begun.path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (
            pytest.raises(RunError, match="being trained by another process"),
            begun.opened(config_of(who), who),
        ):
            pass


def test_metrics_are_never_nan(begun):
    begun.save(state())
    with pytest.raises(ValueError, match="not JSON compliant"):
        begun.finish({"test_loss": math.nan})
    assert not begun.is_finished


def test_opening_makes_the_folder_or_says_why_it_cant(tmp_path, tiny):
    who = identity(SMALL, 0, "val", tiny)
    new = RunDirectory(tmp_path / "a" / "b")
    with new.opened(config_of(who), who) as checkpoint:
        assert checkpoint is None and new.config()["seed"] == 0
    (tmp_path / "file").write_text("in the way")
    for path, error, says in (
        (tmp_path / "file", RunError, "is a file, not a run directory"),
        (tmp_path / "file" / "below", OSError, "can't make the run directory"),
    ):
        with (
            pytest.raises(error, match=says),
            RunDirectory(path).opened(config_of(who), who),
        ):
            pass


def test_what_is_saved_comes_back(begun, tiny):
    begun.save(state())
    assert begun.history()["train_loss"].tolist() == [2.5]
    assert begun.history()["val_loss"].isna().all()
    best = torch.load(begun.path / "best.pt", weights_only=True)
    assert torch.equal(best["w"], torch.arange(3))
    for name in ("history.csv", "best.pt"):
        (begun.path / name).unlink()  # killed before they were written
    who = identity(SMALL, 0, "val", tiny)
    with begun.opened(config_of(who), who) as checkpoint:
        assert checkpoint["history"] == state()["history"]
        assert torch.equal(checkpoint["best"][-1]["w"], torch.arange(3))
        assert len(begun.history()) == 1 and (begun.path / "best.pt").is_file()
        metrics = begun.finish(METRICS)
    assert metrics == begun.metrics() == begun.kept(who)
    assert metrics["name"] == "run" and metrics["weights_sha256"] == begun.checksum()


def test_a_checkpoint_that_cant_be_used_is_named_and_left_alone(begun, tiny):
    begun.save(state())
    who = identity(SMALL, 0, "val", tiny)
    file = begun.path / "last.pt"
    whole = file.read_bytes()
    torch.save({"optimizer": {}}, begun.path / "old.pt")
    old = (begun.path / "old.pt").read_bytes()
    for content, says in (
        (whole[: len(whole) // 3], r"last\.pt is damaged.*put a whole copy"),
        (b"", r"last\.pt is damaged.*put a whole copy"),
        (b"not one", r"last\.pt is damaged.*put a whole copy"),
        (old, "begun by an earlier version"),
    ):
        file.write_bytes(content)
        with pytest.raises(RunError, match=says), begun.opened(config_of(who), who):
            pass
        assert file.read_bytes() == content


# ------------------------------------------------------------------------------- whose run it is


def test_the_same_run_goes_on_and_another_is_told_apart(begun, tiny):
    begun.kept(identity(SMALL, 0, "val", tiny))
    other = identity(get_recipe(SMALL, lr=0.01, name="small"), 1, "full", tiny)
    with pytest.raises(RunError) as error:
        begun.kept(other)
    assert (
        "holds a run that differs: protocol is 'val' there and 'full' now; "
        "recipe.lr is 0.05 there and 0.01 now; seed is 0 there and 1 now. Nothing was touched"
    ) in str(error.value)


@pytest.mark.parametrize("left", ["last.pt", "best.pt", "history.csv", "metrics.json"])
def test_a_state_without_its_config_is_refused_and_left_alone(begun, tiny, left):
    who = identity(SMALL, 0, "val", tiny)
    with begun.opened(config_of(who), who):
        begun.save(state())
        begun.finish(METRICS)
    for file in begun.path.iterdir():
        if file.name != left:
            file.unlink()
    before = (begun.path / left).read_bytes()
    other = who | {"seed": 77}
    says = (
        rf"run holds {left} without a config\.json to say whose they are: put .* or remove the fol"
    )
    with pytest.raises(RunError, match=says):
        begun.kept(other)
    with pytest.raises(RunError, match=says), begun.opened(config_of(other), other):
        pass
    assert (begun.path / left).read_bytes() == before
    assert not (begun.path / "config.json").exists()


def test_a_checkpoint_goes_on_only_with_its_own_config(begun, tiny):
    who = identity(SMALL, 0, "val", tiny)
    other = who | {"seed": 77}
    with begun.opened(config_of(who), who):
        begun.save(state())
    begun.verify_weights()
    write(begun, "config.json", config_of(other))
    says = (
        r"config\.json was changed .* or is another run's: its checksum isn't the one in last\.pt"
    )
    with pytest.raises(RunError, match=says + ": put"), begun.opened(config_of(other), other):
        pass
    with pytest.raises(ValueError, match=says):
        begun.verify_weights()


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("split", {"train": 1}),
        ("mean", [0.4, 0.3, 0.2]),
        ("std", [0.4, 0.3, 0.2]),
        ("classes", ["b"]),
        ("model", {"width": 2.0}),
    ],
)
def test_what_follows_from_data_and_recipe_counts(begun, tiny, field, other):
    """Also of a run that notes no checksum yet."""
    who = identity(SMALL, 0, "val", tiny)
    says = rf"config\.json was changed since the run wrote it.*its {field} isn't what"
    with pytest.raises(RunError, match=says), begun.opened(config_of(who) | {field: other}, who):
        pass


def test_a_finished_run_is_read_with_its_own_config(begun, tiny):
    who = identity(SMALL, 0, "val", tiny)
    with begun.opened(config_of(who), who):
        begun.save(state())
        begun.finish(METRICS)
    assert begun.config()["seed"] == 0
    content = (begun.path / "config.json").read_text()
    (begun.path / "config.json").write_text(content.replace("\n", " "))  # laid out otherwise
    assert begun.config()["seed"] == 0
    write(begun, "config.json", config_of(who) | {"mean": [0.5, 0.5, 0.4]})
    says = r"config\.json was changed .*: its checksum isn't the one in metrics\.json"
    with pytest.raises(ValueError, match=says):
        begun.config()
    with pytest.raises(RunError, match=says + ": put a whole copy of it back"):
        begun.kept(who)


def test_data_teacher_and_policy_count_as_well(begun, tiny, monkeypatch):
    who = identity(SMALL, 0, "val", tiny)
    with pytest.raises(RunError, match="data_sha256 is"):
        begun.kept(who | {"data_sha256": "0" * 64})
    with pytest.raises(RunError, match="teacher_sha256 is None there"):
        begun.kept(who | {"teacher_sha256": "0" * 64})
    stronger = replace(augment.POLICIES["light"], flip=0.25, fill=(1, 2, 3))
    monkeypatch.setitem(augment.POLICIES, "light", stronger)
    with pytest.raises(RunError, match=r"policies\.light\.fill is 'mean' there"):
        begun.kept(identity(SMALL, 0, "val", tiny))
    write(begun, "config.json", config_of(identity(SMALL, 0, "val", tiny)))
    begun.kept(identity(SMALL, 0, "val", tiny))  # though JSON knows no tuples


def test_a_run_from_before_a_field_goes_on(begun, tiny):
    old = json.loads((begun.path / "config.json").read_text())
    del old["recipe"]["network"], old["teacher_sha256"], old["policies"]
    write(begun, "config.json", old | {"recipe": old["recipe"] | {"network": "4 8s2 8d2"}})
    begun.kept(identity(SMALL, 0, "val", tiny))
    write(begun, "config.json", old | {"recipe": old["recipe"] | {"calm": 0.0}})
    begun.kept(identity(get_recipe(SMALL, network="tiny", name="small"), 0, "val", tiny))


def test_a_run_with_a_retired_field_is_another_one(begun, tiny):
    old = json.loads((begun.path / "config.json").read_text())
    write(begun, "config.json", old | {"recipe": old["recipe"] | {"whiten": True}})
    with pytest.raises(RunError, match=r"recipe\.whiten is True there and None now"):
        begun.kept(identity(SMALL, 0, "val", tiny))


def test_the_teacher_counts_by_its_weights_while_it_is_there(tiny):
    published = RunDirectory(RESULTS / "tuned-seed0")
    taught = get_recipe(SMALL, teacher="tuned")
    who = identity(taught, 0, "val", tiny, published)
    assert who["teacher_sha256"] == published.checksum()
    assert "teacher_sha256" not in identity(taught, 0, "val", tiny), "the teacher is gone"
    assert identity(SMALL, 0, "val", tiny)["teacher_sha256"] is None


def test_force_removes_what_another_run_left(begun, tiny):
    begun.save(state())
    who = identity(SMALL, 1, "val", tiny)
    with (
        pytest.raises(RunError, match="seed is 0 there and 1 now"),
        begun.opened(config_of(who), who),
    ):
        pass
    assert (begun.path / "last.pt").is_file()
    with begun.opened(config_of(who), who, force=True) as checkpoint:
        assert checkpoint is None and begun.config()["seed"] == 1
        assert set(os.listdir(begun.path)) <= {"config.json", ".lock"}


def test_force_goes_on_with_an_unfinished_run_and_begins_a_finished_one_again(begun, tiny):
    begun.save(state())
    who = identity(SMALL, 0, "val", tiny)
    with begun.opened(config_of(who), who, force=True) as checkpoint:
        assert len(checkpoint["history"]) == 1
        begun.finish(METRICS)
    with begun.opened(config_of(who), who, force=True) as checkpoint:
        assert checkpoint is None and not begun.is_finished


# ----------------------------------------------------------------------------------- provenance


def test_conditions_name_the_machine_and_the_libraries():
    where = conditions(SMALL, CPU, "auto")
    assert where["threads"] == torch.get_num_threads() and where["torch"] == torch.__version__
    assert where["device"].startswith("cpu: ") and where["compile"] == "auto"
    assert where["libraries"] == {}
    build = "albumentations"
    libraries = conditions(get_recipe(SMALL, build=build), CPU, "auto")["libraries"]
    assert libraries.keys() == {build, "opencv-python-headless"} and libraries[build]


def git(folder, *command):
    who = "-c", "user.name=a", "-c", "user.email=a@b"
    done = subprocess.run(["git", *who, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_commit_is_that_of_the_code_alone(tmp_path, monkeypatch):
    commit_of = run_directory._git_commit.__wrapped__  # not the one it keeps
    (tmp_path / "results").mkdir()
    for file in ("code.py", "results/table.md"):
        (tmp_path / file).write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setattr(run_directory, "CHECKOUT", tmp_path)
    (tmp_path / "results" / "table.md").write_text("2")
    (tmp_path / "untracked").write_text("3")
    assert commit_of() == head
    (tmp_path / "code.py").write_text("2")
    assert commit_of() == head + "+"

    # A copy of this code in there has no commit of its own, nor has an installed one.
    copy = tmp_path / "vendored"
    copy.mkdir()
    (copy / "pyproject.toml").write_text("")
    monkeypatch.setattr(run_directory, "CHECKOUT", copy)
    assert commit_of() is None
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    git(tmp_path, "worktree", "add", "-q", str(tmp_path / "beside"))  # its .git is a file
    (copy / ".git").mkdir()  # and no repository
    assert commit_of() is None
    monkeypatch.setattr(run_directory, "CHECKOUT", tmp_path / "beside")
    assert commit_of() == head
    monkeypatch.setattr(run_directory, "CHECKOUT", None)
    assert commit_of() is None


def test_every_field_of_a_recipe_is_part_of_who_a_run_is(tiny):
    who = identity(SMALL, 0, "val", tiny)
    assert who["recipe"].keys() == set(Recipe.__dataclass_fields__)
    json.dumps(who)  # plain values only
