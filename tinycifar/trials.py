"""Trials in an Optuna storage, trained by any number of workers on any number of machines.

Every run waits in the storage as a trial; one of a search gets its parameters from the sampler
when a worker takes it. Taking a trial is atomic, so none is trained twice and a search has as many
as were asked for. A trial trains an ordinary run directory. One whose worker died or was
interrupted is queued again and resumes that directory.

Whole runs (recipes with seeds) and a search are two Optuna studies of one storage; `Plan` is what
a worker is told. Two machines share the storage and the folder of the runs.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm.auto import tqdm

import augment
from tinycifar.data import Data, load
from tinycifar.paths import absolute
from tinycifar.recipes import Recipe, in_full
from tinycifar.run_directory import RunDirectory, RunError, RunLocked, locked, unlike
from tinycifar.training import Diverged, Row, run_name, train

HEARTBEAT = 20  # seconds between a worker's signs of life; it counts as dead after three times that
RETRIES = 3
PATIENCE = 60  # seconds that SQLite waits for another process's lock
DATABASE = "trials.db"  # SQLite's file in the folder of the runs, where no storage is named
SAMPLERS: dict[str, Any] = {
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
    "random": optuna.samplers.RandomSampler,
}
PRUNERS: dict[str, Callable[[int], optuna.pruners.BasePruner]] = {  # by the most epochs of a trial
    # A quarter goes on at each rung: its authors suggest a third or a quarter (arXiv:1603.06560).
    "hyperband": lambda epochs: Hyperband(1, epochs, 4),
    "median": lambda epochs: optuna.pruners.MedianPruner(n_warmup_steps=epochs // 4),
    "none": lambda epochs: optuna.pruners.NopPruner(),
}

optuna.logging.set_verbosity(optuna.logging.ERROR)
# Of heartbeats, which Optuna has had since 2021.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def ends_of(distribution: Any) -> tuple[Any, ...]:
    """All choices, or the lowest and the highest number."""
    return getattr(distribution, "choices", None) or (distribution.low, distribution.high)


@dataclass(frozen=True)
class Search:
    """A search as a study file describes it.

    Attributes:
        base: the recipe that is changed.
        ranges: the distribution of each field that is searched.
        seed: of every trial, and of the sampler.
        trials: how many, complete and pruned.
        sampler, prune: names in SAMPLERS and PRUNERS.
        confirm: so many of the best are trained with two more seeds; 0: none.
    """

    base: Recipe
    ranges: dict[str, BaseDistribution]
    seed: int
    trials: int
    sampler: str = "tpe"
    prune: str = "median"
    confirm: int = 0

    @property
    def epochs(self) -> int:
        """The most that a trial trains."""
        d = self.ranges.get("epochs")
        return self.base.epochs if d is None else max(ends_of(d))

    @property
    def confirming_seeds(self) -> tuple[int, ...]:
        return (self.seed + 1, self.seed + 2) if self.confirm else ()

    def ends(self) -> Iterator[Recipe]:
        """The base with each field that is searched, by itself, at each of its ends or choices."""
        for name, d in self.ranges.items():
            for value in ends_of(d):
                yield replace(self.base, **{name: value})

    def recipe(self, trial: Trial, number: int) -> Recipe:
        """The base with the parameters that the sampler gives the trial."""
        changes = {name: _suggested(trial, name, d) for name, d in self.ranges.items()}
        return replace(self.base, **changes, name=f"trial_{number}")

    def optuna_study(self, storage: RDBStorage, name: str) -> optuna.Study:
        """Made, or loaded if it is there."""
        return optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize",
            sampler=keyed_sampler(self.sampler, self.seed),
            pruner=PRUNERS[self.prune](self.epochs),
            load_if_exists=True,
        )

    def description(self) -> dict[str, Any]:
        """All that the storage must have been made for, as JSON has it."""
        return {
            "base": asdict(self.base),
            "search": {
                name: {"choices": list(d.choices)}
                if isinstance(d, CategoricalDistribution)
                else {"low": d.low, "high": d.high, "step": d.step, "log": d.log}  # type: ignore[attr-defined]
                for name, d in self.ranges.items()
            },
            "seed": self.seed,
            "sampler": self.sampler,
            "prune": self.prune,
        }


def _suggested(trial: Trial, name: str, d: BaseDistribution) -> Any:
    if isinstance(d, CategoricalDistribution):
        return trial.suggest_categorical(name, d.choices)
    if isinstance(d, IntDistribution):
        return trial.suggest_int(name, d.low, d.high, step=d.step, log=d.log)
    assert isinstance(d, FloatDistribution)
    return trial.suggest_float(name, d.low, d.high, step=d.step, log=d.log)


class Hyperband(optuna.pruners.HyperbandPruner):
    """Optuna's, for trials that may be interrupted and queued again, under another number.

    An attempt that failed or waits isn't compared with others; the next one stays in its bracket.
    """

    def _get_bracket_id(self, study: optuna.Study, trial: FrozenTrial) -> int:
        if trial.state in (TrialState.FAIL, TrialState.WAITING):
            return -1
        trial = copy.copy(trial)
        trial.number = original(trial)
        return super()._get_bracket_id(study, trial)


def keyed_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """A sampler of Optuna's whose random numbers are keyed by (seed, trial), whoever draws.

    Workers with the same seed would all begin with the same parameters, and workers without one
    couldn't be repeated.
    """
    kind = SAMPLERS[name]

    class Keyed(kind):  # type: ignore[misc, valid-type]  # chosen by its name
        def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
            kind.__init__(self, seed=(seed * 1_000_003 + trial.number) % 2**32)  # starts again
            super().before_trial(study, trial)

    return Keyed(seed=seed)


# ------------------------------------------------------------------------------------- the storage


def default_storage(folder: Path) -> str:
    """The URL of SQLite's file in the folder of the runs."""
    return sqlite_url(str(folder / DATABASE))


def recorded(folder: Path) -> str:
    """The same, to be read alone: nothing is written, not even a table."""
    return sqlite_url((folder / DATABASE).as_uri(), mode="ro", uri="true")


def sqlite_url(database: str, **query: str) -> str:
    """The URL of an SQLite database, whatever characters its path holds."""
    url = sqlalchemy.URL.create("sqlite", database=database, query=query)
    return url.render_as_string(hide_password=False)


def shown_url(url: str) -> str:
    """A storage's URL without its password."""
    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return "STORAGE"  # what can't be read can't be told from a password
    secret = [name for name in parsed.query if "pass" in name.lower()]
    return parsed.difference_update_query(secret).render_as_string(hide_password=True)


@contextmanager
def reachable(url: str) -> Iterator[None]:
    """Turn errors of the storage into a RunError of one sentence, without its password.

    Raises:
        RunError: it can't be reached or written, or the URL isn't a storage's.
    """
    try:
        yield
    except (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError):
        raise RunError(
            f"{shown_url(url)} isn't a storage's URL: expected one as "
            "postgresql://user:password@host/database, mysql+pymysql://... or sqlite:////a/file.db"
        ) from None
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise RunError(_storage_trouble(url, error)) from None
    except ImportError as error:
        if "DB access module" not in str(error):
            raise
        raise RunError(
            f"{shown_url(url)} needs a driver that isn't installed: pip install 'psycopg[binary]' "
            "for PostgreSQL, PyMySQL (and mysql+pymysql:// in the URL) for MySQL"
        ) from None


def _storage_trouble(url: str, error: BaseException) -> str:
    cause = error if isinstance(error, sqlalchemy.exc.SQLAlchemyError) else error.__cause__
    reason = (str(getattr(cause, "orig", cause)).strip() or type(cause).__name__).splitlines()[0]
    with suppress(sqlalchemy.exc.ArgumentError, ValueError):
        parsed = sqlalchemy.make_url(url)
        hidden = (value for name, value in parsed.query.items() if "pass" in name.lower())
        for secret in (parsed.password, *hidden):
            reason = reason.replace(str(secret), "***") if secret else reason
    start = f"the storage {shown_url(url)} can't be used ({reason})"
    if "disk" in reason and "full" in reason:
        return f"{start}: make room, then the same command goes on"
    if url.startswith("sqlite"):
        return (
            f"{start}: SQLite needs a folder that can be written and a file system with locks, "
            "which network shares often lack; name a folder on this machine, or a server, "
            "STORAGE=postgresql://..."
        )
    return f"{start}: check that the server runs, host, port, database, user and password"


def connect(url: str, heartbeat: int = HEARTBEAT) -> RDBStorage:
    """Open a storage, with its tables made; see `reachable` for what goes wrong."""
    patient = {"connect_args": {"timeout": PATIENCE}} if url.startswith("sqlite") else {}
    quoted = sqlalchemy.make_url(url).render_as_string(hide_password=False)
    storage = RDBStorage(
        quoted,  # Optuna formats it, and a password may hold braces
        engine_kwargs={"pool_pre_ping": True, **patient},
        heartbeat_interval=heartbeat,
        grace_period=3 * heartbeat,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(RETRIES),
    )
    if storage.engine.dialect.name == "postgresql":
        _let_go_when_frozen(storage.engine, 3 * heartbeat)
    return storage


def _let_go_when_frozen(engine: sqlalchemy.Engine, seconds: int) -> None:
    """Have the server end a connection that was idle in a transaction for so many seconds.

    A worker suspended within a transaction would keep all others waiting for its locks.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def limit(connection: Any, _: Any) -> None:
        connection.cursor().execute(f"SET idle_in_transaction_session_timeout = {1000 * seconds}")
        connection.commit()

    engine.dispose()  # connections that were opened without


def original(trial: FrozenTrial) -> int:
    """The number of a trial's first attempt: its own, unless it was queued again."""
    first = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial)
    return trial.number if first is None else first


def latest(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The last attempt of each trial that was queued, by the number of the first."""
    trials = study.get_trials(deepcopy=False)
    meant = (t for t in trials if "seed" in t.user_attrs and "dropped" not in t.user_attrs)
    return {original(trial): trial for trial in meant}


# --------------------------------------------------------------------------------------- the queue

_OPEN = (TrialState.WAITING, TrialState.RUNNING)


@dataclass(frozen=True)
class Plan:
    """What is to be trained, and all that a worker needs for it; it is pickled.

    Attributes:
        url: of the storage.
        name: of the Optuna studies in it.
        folder: where the run directories go.
        settings: protocol, dataset and device, as `train` takes them.
        identity: what the storage must have been made for: the data.
        search: None without one.
        runs: the names of the whole runs.
        threads: of each worker.
        heartbeat: see HEARTBEAT.
        test: whether whole runs are evaluated on test.
        policies: augmentation policies, which may be the caller's own.
    """

    url: str
    name: str
    folder: Path
    settings: dict[str, Any]
    identity: dict[str, Any]
    search: Search | None = None
    runs: frozenset[str] = frozenset()
    threads: int = 1
    heartbeat: int = HEARTBEAT
    test: bool = True
    policies: dict[str, augment.Policy] = field(default_factory=lambda: dict(augment.POLICIES))

    def studies(self) -> list[optuna.Study]:
        """Of the whole runs, and of the search."""
        storage = connect(self.url, self.heartbeat)
        whole = optuna.create_study(
            storage=storage, study_name=f"{self.name}, whole runs", load_if_exists=True
        )
        if self.search is None:
            return [whole]
        return [whole, self.search.optuna_study(storage, self.name)]

    def asked_for(self, studies: list[optuna.Study]) -> list[tuple[optuna.Study, FrozenTrial]]:
        """The trials of this plan, each with its study; of a run that was changed, the last."""
        whole, *search = studies
        by_run = {trial.user_attrs["run"]: trial for trial in latest(whole).values()}
        asked = [(whole, trial) for run, trial in by_run.items() if run in self.runs]
        return asked + [(study, trial) for study in search for trial in latest(study).values()]

    def unfinished(self) -> int:
        """How many trials wait or are being trained, here or elsewhere."""
        with reachable(self.url):
            return sum(len(s.get_trials(deepcopy=False, states=_OPEN)) for s in self.studies())


def queue(plan: Plan, runs: Mapping[str, tuple[Recipe, int]]) -> None:
    """Queue the runs, the trials of the search, and what failed, unless they are queued already.

    Args:
        runs: recipe and seed by the name of the run.

    Raises:
        RunError: the storage was made for something else, or can't be used.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    busy = f"{plan.folder} has been locked for ten minutes by another process"
    # One process at a time, of all that share the folder, makes and fills a storage.
    with locked(plan.folder / ".lock", busy, timeout=600), reachable(plan.url):
        whole, *search = plan.studies()
        there = {trial.user_attrs["run"]: trial for trial in latest(whole).values()}
        wanted = {
            name: {"run": name, "recipe": asdict(recipe), "seed": seed}
            for name, (recipe, seed) in runs.items()
        }
        made_for = {study: plan.identity for study in (whole, *search)}
        if plan.search is not None:
            made_for[search[0]] = plan.identity | plan.search.description()
        was = {name: in_full(there[name].user_attrs["recipe"]) for name in wanted if name in there}
        changed = {n: unlike({n: old}, {n: wanted[n]["recipe"]}) for n, old in was.items()}
        failed = {n for n in was if there[n].state == TrialState.FAIL}
        differences = [line for name in sorted(was.keys() - failed) for line in changed[name]]
        for study, now in made_for.items():
            differences += unlike(study.user_attrs.get("made_for", now), now)
        if differences:
            raise RunError(
                f"{shown_url(plan.url)} was made for something else: "
                f"{'; '.join(dict.fromkeys(differences))}. Nothing was touched: undo that, or "
                "give another FOLDER (on a server, rename the study file as well)"
            )
        for study, now in made_for.items():
            if "made_for" not in study.user_attrs:
                study.set_user_attr("made_for", now)
        again = [(whole, there[name]) for name in sorted(failed) if not changed[name]]
        for study in search:
            again += [(study, t) for t in latest(study).values() if t.state == TrialState.FAIL]
        for study, trial in again:
            _queue_again(study, trial, afresh=True)
        for name, attributes in wanted.items():
            one = there.get(name)
            missing = one is None or one.state == TrialState.COMPLETE  # or its folder was removed
            revised = name in failed and changed[name]
            if (missing or revised) and not RunDirectory(plan.folder / name).is_done(plan.test):
                whole.enqueue_trial({}, user_attrs=attributes)
        if plan.search is not None:
            for _ in range(plan.search.trials - len(latest(search[0]))):
                search[0].enqueue_trial({}, user_attrs={"seed": plan.search.seed})
        _drop_what_was_taken_out(plan, whole, *search)


def _drop_what_was_taken_out(plan: Plan, whole: optuna.Study, *search: optuna.Study) -> None:
    """Mark what isn't done and not in the plan, which is the latest: no worker will train it.

    Decided here and not by a worker, whose plan may be older than what another command queued. What
    is being trained is marked too: should its worker die, it isn't queued again.
    """
    dropped: list[tuple[optuna.Study, FrozenTrial]] = []
    # The best trials, as whole runs, are queued last, by a plan of their own.
    if not all(name.startswith("trial_") for name in plan.runs):
        for trial in latest(whole).values():
            name = trial.user_attrs["run"]
            if name not in plan.runs and not name.startswith("trial_"):
                dropped.append((whole, trial))
    for study in search:
        assert plan.search is not None
        done_first = sorted(
            latest(study).values(),
            key=lambda t: (t.state == TrialState.WAITING, t.state == TrialState.RUNNING),
        )
        dropped += [(study, trial) for trial in done_first[plan.search.trials :]]
    storage = connect(plan.url)
    for study, trial in dropped:
        if trial.state in _OPEN:
            number = storage.get_study_id_from_name(study.study_name), trial.number
            of_trial = storage.get_trial_id_from_study_id_trial_number(*number)
            storage.set_trial_user_attr(of_trial, "dropped", True)


def _queue_again(study: optuna.Study, trial: FrozenTrial, afresh: bool = False) -> None:
    """Queue a failed trial once more; RETRIES times at most, counted from now if afresh."""
    if afresh:
        trial = copy.deepcopy(trial)
        trial.system_attrs |= {"failed_trial": original(trial), "retry_history": []}
        trial.user_attrs.pop("error", None)
    RetryHeartbeatStaleTrialCallback(RETRIES)(study, trial)


# --------------------------------------------------------------------------------------- a worker


def work(plan: Plan) -> None:
    """Train what waits, until nothing waits and no other worker trains anything any more."""
    import torch._inductor.config  # seconds

    torch.set_num_threads(plan.threads)
    torch._inductor.config.compile_threads = plan.threads  # by default a compiler for every core
    augment.POLICIES.update(plan.policies)
    dataset = plan.settings["dataset"]
    data = dataset if isinstance(dataset, Data) else load(dataset, progress=False)
    with reachable(plan.url):
        worker = _Worker(replace(plan, settings=plan.settings | {"dataset": data}))
        while worker.train_next():
            pass


_SILENT = sqlalchemy.text(
    "SELECT number FROM trials JOIN studies ON trials.study_id = studies.study_id "
    "WHERE study_name = :name AND state = 'RUNNING' "
    "AND trial_id NOT IN (SELECT trial_id FROM trial_heartbeats)"
)


class _NotQueued(RuntimeError):
    """A trial that isn't asked for.

    Optuna made it up, as another worker has taken the last that waited; or it was dropped.
    """


class _Worker:
    def __init__(self, plan: Plan):
        self.plan, self.studies = plan, plan.studies()
        self.engine = connect(plan.url).engine
        self.silent: dict[tuple[str, int], float] = {}  # since when, by study and trial

    def train_next(self) -> bool:
        """Train one trial, or wait a second for those of others; False when there are none."""
        for study in self.studies:
            optuna.storages.fail_stale_trials(study)
            self._fail_silent_trials(study)
            if study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                self._train_one_of(study)
                return True
        if not any(
            s.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) for s in self.studies
        ):
            return False
        time.sleep(1)
        return True

    def _fail_silent_trials(self, study: optuna.Study) -> None:
        """Queue again the trials of workers that died before their first heartbeat.

        Optuna only looks for heartbeats that have stopped, and would never find these.
        """
        with self.engine.connect() as connection:
            numbers = connection.scalars(_SILENT, {"name": study.study_name}).all()
        now = time.monotonic()
        self.silent = {
            key: since
            for key, since in self.silent.items()
            if key[0] != study.study_name or key[1] in numbers
        }
        for number in numbers:
            since = self.silent.setdefault((study.study_name, number), now)
            if now - since > 3 * self.plan.heartbeat:
                with suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
                    study.tell(number, state=TrialState.FAIL)  # refused if another was faster
                    _queue_again(study, study.get_trials(deepcopy=False)[number])

    def _train_one_of(self, study: optuna.Study) -> None:
        number, interrupted = -1, False

        def objective(trial: Trial) -> float:
            nonlocal number, interrupted
            number = trial.number
            try:
                return self._train(study, trial)
            except (optuna.TrialPruned, _NotQueued):
                raise
            except (RuntimeError, ValueError) as error:  # of this trial: others may do better
                trial.set_user_attr("error", str(error))
                raise
            except BaseException:  # of this process or machine: Ctrl-C, a full disk
                interrupted = True
                raise

        try:
            study.optimize(objective, n_trials=1, catch=(RuntimeError, ValueError))
        except ValueError:  # Optuna's: we were taken for dead, and another worker goes on with it
            pass
        except BaseException:
            if interrupted:
                _queue_again(study, study.get_trials(deepcopy=False)[number])
            raise

    def _train(self, study: optuna.Study, trial: Trial) -> float:
        if "seed" not in trial.user_attrs or "dropped" in trial.user_attrs:
            raise _NotQueued
        plan, seed, whole = self.plan, trial.user_attrs["seed"], study is self.studies[0]
        if whole:
            recipe = Recipe(**in_full(trial.user_attrs["recipe"]))
        else:
            assert plan.search is not None
            number = original(study.get_trials(deepcopy=False)[trial.number])
            recipe = plan.search.recipe(trial, number)
        name = run_name(recipe, plan.settings["protocol"], seed)
        if trial.user_attrs.get("run") != name:
            trial.set_user_attr("run", name)
        reported = set()

        def report(row: Row) -> None:
            reported.add(row["epoch"])
            trial.report(_accuracy(row), int(row["epoch"]))
            if not whole and row["epoch"] < recipe.epochs and trial.should_prune():
                raise optuna.TrialPruned

        run_dir = plan.folder / name
        metrics = None
        while metrics is None:
            try:
                metrics = train(
                    recipe,
                    run_dir,
                    seed=seed,
                    progress=False,
                    on_epoch=report,
                    test=whole and plan.test,
                    **plan.settings,
                )
            except RunLocked:  # by a worker that only seemed dead, and may yet finish it
                time.sleep(1)
            except RunError as error:
                if whole or not isinstance(error.__cause__, Diverged):
                    raise
                raise optuna.TrialPruned(str(error)) from error  # these rates are no good
        rows: Any = RunDirectory(run_dir).history().to_dict("records")
        for row in rows:  # of a run that was finished before
            if row["epoch"] not in reported:
                trial.report(_accuracy(row), int(row["epoch"]))
        return _accuracy(metrics)


def _accuracy(of: Mapping[str, Any]) -> float:
    """On validation; where a protocol has none, in training, as Optuna wants a number."""
    missing = of["val_acc"] is None or math.isnan(of["val_acc"])
    return of["train_acc"] if missing else of["val_acc"]


# --------------------------------------------------------------------------------- local workers


def work_for_parent() -> None:
    """Do what the plan on standard input says; end with the process that sent it.

    The pipe closes when that process is gone, `kill -9` included. Otherwise runs would go on
    unseen, and be locked against the same command given again.
    """
    plan = pickle.load(sys.stdin.buffer)

    def end_with_the_parent() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)  # an interrupt: its trial is queued again
        time.sleep(10)
        os._exit(1)  # safe at any moment, as run directories are

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    work(plan)


def train_queued(plan: Plan, jobs: int, progress: bool) -> None:
    """Start workers here, `jobs` at most, and wait until they find nothing more to do.

    Raises:
        RunError: some trials failed, which are named; or the workers were killed.
    """
    with reachable(plan.url):
        asked = plan.asked_for(plan.studies())
    told = {_key(study, trial) for study, trial in asked if trial.state.is_finished()}
    workers = [_started(plan) for _ in range(min(jobs, plan.unfinished()))]
    try:
        _watch(plan, workers, told, progress)
    finally:
        _end(workers)
    with reachable(plan.url):
        ended = [trial for _, trial in plan.asked_for(plan.studies())]
    failed = [t for t in ended if t.state == TrialState.FAIL and not _was_trained_since(t, plan)]
    if missing := sum(not t.state.is_finished() for t in ended):
        killed = any(worker.returncode < 0 for worker in workers)
        why = "was killed, most likely as memory ran out: give fewer JOBS (jobs=)"
        raise RunError(
            f"{missing} of {len(ended)} runs are not done: a worker "
            f"{why if killed else 'ended early, see above'}; the same command resumes them"
        )
    if failed:
        reasons = "; ".join(
            f"{t.user_attrs.get('run', original(t))}: "
            f"{t.user_attrs.get('error', f'its worker died {RETRIES + 1} times')}"
            for t in failed
        )
        raise RunError(f"{len(failed)} of {len(ended)} runs failed, the others are done. {reasons}")


def _was_trained_since(failed: FrozenTrial, plan: Plan) -> bool:
    """Whether the whole run is there all the same, by `train`."""
    name = failed.user_attrs.get("run")
    return name in plan.runs and RunDirectory(plan.folder / name).is_done(plan.test)


def _started(plan: Plan) -> subprocess.Popen:
    command = [sys.executable, "-m", "tinycifar", "worker"]
    # Imports what we can: tinycifar, and networks of the caller's own.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    # A session of its own: Ctrl-C reaches it once, from us.
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=env)
    assert worker.stdin is not None
    with suppress(BrokenPipeError):
        pickle.dump(plan, worker.stdin)
        worker.stdin.flush()
    return worker


def _end(workers: Iterable[subprocess.Popen]) -> None:
    """Interrupt those that still work, which queues their trials again."""
    running = [worker for worker in workers if worker.poll() is None]
    for worker in running:
        worker.terminate()
    for worker in running:
        try:
            worker.wait(timeout=10)
        except subprocess.TimeoutExpired:
            worker.kill()  # safe at any moment, as run directories are
            worker.wait()


def _watch(
    plan: Plan, workers: list[subprocess.Popen], told: set[tuple[str, int]], progress: bool
) -> None:
    """Until all workers have ended: a line for each trial that ends, and a bar of all.

    Args:
        told: the keys of those that had ended before.
    """
    with reachable(plan.url):
        studies = plan.studies()
        # None: hidden unless on a terminal.
        with tqdm(unit="run", disable=None if progress else True) as bar:
            working = True
            while working:
                working = any(worker.poll() is None for worker in workers)
                trials = plan.asked_for(studies)
                # What failed may be queued again within the moment.
                states = _GOOD if working else (*_GOOD, TrialState.FAIL)
                ended = [(s, t) for s, t in trials if t.state in states]
                where = _MEANT[plan.settings["protocol"]]
                bar.clear()
                for study, trial in ended:
                    if progress and _key(study, trial) not in told:
                        print(_outcome(trial, where), flush=True)
                    told.add(_key(study, trial))
                bar.total, bar.n = len(trials), len(ended)
                best = [t.value for s, t in ended if s is not studies[0] and t.value is not None]
                bar.set_postfix_str(f"best {max(best):.2f} %" if best else "", refresh=False)
                bar.refresh()
                if working:
                    time.sleep(1)


def _key(study: optuna.Study, trial: FrozenTrial) -> tuple[str, int]:
    """The same for all attempts of a trial."""
    return study.study_name, original(trial)


_GOOD = (TrialState.COMPLETE, TrialState.PRUNED)


_MEANT = {"val": "validation", "full": "training", "test-selected": "test"}  # see `_accuracy`


def _outcome(trial: FrozenTrial, where: str) -> str:
    name = trial.user_attrs.get("run", f"trial {original(trial)}")
    if trial.state == TrialState.COMPLETE:
        return f"{name}  {where} {trial.value:.2f} %"
    if trial.state == TrialState.PRUNED:
        return f"{name}  pruned after epoch {trial.last_step or 0}"
    return f"{name}  failed: {trial.user_attrs.get('error', 'its worker died')}"


def show_dashboard(folder: Path, storage: str | None, port: int) -> None:
    """Serve optuna-dashboard on this machine until it is interrupted.

    Raises:
        ImportError: it isn't installed. FileNotFoundError: no study was begun in the folder.
    """
    file = absolute(folder) / DATABASE
    if storage is None and not file.is_file():
        raise FileNotFoundError(f"no study at {file}: begin it with make sweep STUDY=...")
    try:
        import optuna_dashboard
    except ImportError as error:
        raise ImportError("optuna-dashboard isn't installed: pip install it first") from error
    url = storage or default_storage(file.parent)
    with reachable(url):
        print(f"http://127.0.0.1:{port} shows {shown_url(url)} until Ctrl-C")
        optuna_dashboard.run_server(connect(url), host="127.0.0.1", port=port)
