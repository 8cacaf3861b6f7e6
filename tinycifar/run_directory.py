"""The files of a run: found by name, locked, written all or nothing, checked when read.

A run directory holds

    config.json    everything that decides the outcome, and where it was computed
    history.csv    one row an epoch
    last.pt        all that is needed to go on from here
    best.pt        the weights of the selected epoch: a plain state_dict
    metrics.json   written once, at the end
"""

from __future__ import annotations

import csv
import errno
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
import torch

import augment
from tinycifar.data import PROTOCOLS, Data
from tinycifar.networks import source_sha256
from tinycifar.paths import CHECKOUT, RESULTS, absolute
from tinycifar.recipes import Recipe, in_full

if TYPE_CHECKING:
    import pandas as pd

FILES = ("config.json", "history.csv", "last.pt", "best.pt", "metrics.json")
# In this order: without last.pt no run is resumed by mistake, and config.json, removed last, says
# which run the other files are from.
_REMOVED = ("last.pt", "metrics.json", "best.pt", "history.csv", "config.json")
HISTORY_COLUMNS = ("epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "seconds")
# Preset: the published run, settled without the test set, whose weights go by its name.
PRETRAINED = {
    "taught": "taught-seed2",
    "tuned": "tuned-seed0",
    "sprint": "sprint-seed0",
    "quick": "quick",
    "baseline": "baseline-val",
    "int8": "int8-seed0",
}


# What is relied on in each file, and its type. (An early run noted less of the rest.)
_NUMBER, _NONE = (int, float), type(None)
_CONFIG = {
    "recipe": dict, "seed": int, "protocol": str, "dataset": str, "limit": (int, _NONE),
    "data_sha256": str, "split": dict, "mean": list, "std": list, "classes": list, "model": dict,
}  # fmt: skip
_METRICS = {
    "dataset": str, "limit": (int, _NONE), "protocol": str, "params": int, "epochs_run": int,
    "best_epoch": int, "train_acc": _NUMBER, "seconds_train": _NUMBER,
    **dict.fromkeys(("test_acc", "test_loss", "val_acc", "val_loss"), (*_NUMBER, _NONE)),
}  # fmt: skip
# What follows from a run's identity: of the data, and for whoever loads its weights.
_DERIVED = ("split", "mean", "std", "classes", "model")
_ADVICE = "put a whole copy of it back, give another name, or remove the folder to begin again"


class RunError(RuntimeError):
    """A run that can't start or go on; the message says what to do, and nothing was lost."""


class RunLocked(RunError):
    """Another process is training the run."""


# ------------------------------------------------------------------------------------------- names


def find_run(run: str | os.PathLike[str]) -> Path:
    """The run directory that is meant by `run`, wherever a run is asked for.

    Args:
        run: the name of a preset (its published run, see PRETRAINED), of a published run (a folder
            of results/, or of one of its studies, "ablation/plateau-val-seed0"), or else the path
            of any run directory, a relative one as in `paths.absolute`; "./quick" is a path.

    Raises:
        FileNotFoundError: there is none; lists what there is.
    """
    name = os.fspath(run)
    within = name.removeprefix("results/").removeprefix("studies/")  # as recipes name teachers
    published = [RESULTS / PRETRAINED.get(name, name), RESULTS / "studies" / within]
    is_path = name.startswith(".") or ".." in Path(name).parts
    for place in [*([] if is_path else published), absolute(name)]:
        if (place / "config.json").is_file():
            return place
    there = {p.parent.name for p in RESULTS.glob("*/config.json")}
    names = [name for name, folder in PRETRAINED.items() if folder in there]
    names += sorted(there - set(names))
    raise FileNotFoundError(
        f"no run at {name!r}: expected the path of a run directory (it holds config.json, as "
        f"train() writes it; looked for in {absolute(name)}) or a published one: "
        f"{', '.join(names) or '(there is none yet)'}"
    )


def new_run(run: str | os.PathLike[str]) -> Path:
    """The run directory to train into that is meant by a path; see `find_run`.

    Raises:
        ValueError: `find_run` takes it for the name of a published run.
    """
    folder = absolute(run)
    with suppress(FileNotFoundError):
        if find_run(run) != folder:
            raise ValueError(
                f"{str(run)!r} is the name of a published run: train into another folder, "
                f"e.g. runs/{run}"
            )
    return folder


# ------------------------------------------------------------------------------------------- files


class RunDirectory:
    """The files of one run; `path` need not be there yet."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: tuple[int, int] | None = None  # which file is locked, while it is
        self._notes: dict[str, str] = {}  # what goes into last.pt and metrics.json beside their own

    @property
    def is_finished(self) -> bool:
        return (self.path / "metrics.json").is_file()

    def is_done(self, test: bool) -> bool:
        """Whether it is finished, the figures on test included where they are wanted."""
        return self.is_finished and not (test and self.metrics()["test_acc"] is None)

    # The one reader of each file: it says the file's name when that isn't what training wrote.

    def config(self) -> dict[str, Any]:
        """What config.json holds, its recipe with today's fields.

        Raises:
            FileNotFoundError: it isn't there. ValueError: it isn't that of a run, or not the one
            that the run was finished with.
        """
        config = self._read_config()
        if self.is_finished:
            self._check_noted(config, self.metrics(), "metrics.json")
        return config | {"recipe": in_full(config["recipe"])}

    def _read_config(self) -> dict[str, Any]:
        file, config = self.path / "config.json", self._read_json("config.json", _CONFIG)
        if config["protocol"] not in PROTOCOLS:
            raise ValueError(
                f"{file} names the protocol {config['protocol']!r}; expected one of "
                f"{', '.join(PROTOCOLS)}: was it written by another version?"
            )
        for name in ("mean", "std"):
            values = config[name]
            if len(values) != 3 or not all(isinstance(v, float) and 0 <= v <= 1 for v in values):
                raise ValueError(f"{file} has the {name} {values}; expected three of 0..1")
        return config

    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds.

        Raises:
            FileNotFoundError: the run isn't finished. ValueError: it isn't that of a run.
        """
        return self._read_json("metrics.json", _METRICS)

    def history(self) -> pd.DataFrame:
        """history.csv: a row an epoch, the columns HISTORY_COLUMNS, float64, NaN where empty.

        A run killed in its first epoch has none yet: no rows.

        Raises:
            ValueError: it can't be read, lacks rows, or isn't the one that the run was finished
            with.
        """
        import pandas as pd

        file = self.path / "history.csv"
        if not file.is_file() and not self.is_finished:
            return pd.DataFrame(columns=list(HISTORY_COLUMNS), dtype="float64")
        try:
            text = file.read_text(encoding="utf-8")
            rows = pd.read_csv(io.StringIO(text))[list(HISTORY_COLUMNS)].astype("float64")
        except (KeyError, ValueError, FileNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{file} can't be read ({reason}); expected numbers in {', '.join(HISTORY_COLUMNS)}"
            ) from error
        whole = rows.drop(columns=["val_loss", "val_acc"]).notna().all(axis=None)
        if not whole or rows["epoch"].tolist() != list(range(1, len(rows) + 1)):
            raise ValueError(f"{file} is damaged: expected a whole row for each epoch, from 1 on")
        if self.is_finished and not _agrees(rows, _curves(text), self.metrics()):
            raise ValueError(f"{file} is damaged, or another run's: metrics.json tells otherwise")
        return rows

    def checksum(self) -> str:
        """sha256, hexadecimal, of the weights."""
        return hashlib.sha256((self.path / "best.pt").read_bytes()).hexdigest()

    def verify_weights(self) -> None:
        """Raise a ValueError for weights other than those that the run was measured with.

        Or, in a run that isn't finished, for another config.json than its checkpoint's.
        """
        if not self.is_finished:
            self._state()
            return
        there = self.checksum() if (self.path / "best.pt").is_file() else None
        if there and self.metrics().get("weights_sha256", there) != there:
            raise ValueError(
                f"{self.path / 'best.pt'} is refused: its checksum isn't the one in metrics.json, "
                "so it was changed since the run; get the file again, or train the run again"
            )

    def _read_json(self, name: str, needed: Mapping[str, Any]) -> dict[str, Any]:
        file = self.path / name
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON, as train() writes it: {error}") from error
        there = content if isinstance(content, dict) else {}
        wrong = [key for key, kind in needed.items() if not isinstance(there.get(key, ...), kind)]
        if wrong:
            raise ValueError(f"{file} was not written by train(): no valid {', '.join(wrong)}")
        return content

    def _state(self) -> dict[str, Any] | None:
        """What last.pt holds, its tensors on the CPU; None where there is none.

        Raises:
            ValueError: it is damaged, or another run's.
        """
        file = self.path / "last.pt"
        if not file.is_file():
            return None
        state = read_tensors(file)
        if not isinstance(state, dict):
            raise ValueError(f"{file} is not a checkpoint, as train() writes it")
        self._check_noted(self._read_config(), state, "last.pt")
        return state

    def _check_noted(self, config: dict[str, Any], there: dict[str, Any], name: str) -> None:
        """Refuse another config than the one whose checksum is there; an early run noted none."""
        if there.get("config_sha256") not in (None, json_sha256(config)):
            raise ValueError(
                f"{self.path / 'config.json'} was changed since the run wrote it, or is another "
                f"run's: its checksum isn't the one in {name}"
            )

    # For training.

    def kept(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The metrics of the run that `identity` describes, if it is finished; else None.

        Raises:
            RunError: another run is in this directory, or one whose files are damaged.
        """
        if differences := self._differences(identity):
            raise RunError(
                f"{self.path} holds a run that differs: {'; '.join(differences)}. "
                "Nothing was touched: give the same settings to go on, another name, "
                "or FORCE=1 to replace it (of a sweep, remove the folder)"
            )
        return self.metrics() if self.is_finished else None

    @contextmanager
    def opened(
        self, config: dict[str, Any], identity: dict[str, Any], force: bool = False
    ) -> Iterator[dict[str, Any] | None]:
        """Lock the directory, make it that of this run, and give its checkpoint.

        The lock ends with its process. A run that goes on under other conditions than it was begun
        with causes a warning.

        Args:
            config: becomes config.json, unless there is one.
            force: first remove a run that is finished or isn't the one that `identity` describes.

        Yields:
            what `save` was last given, with tensors on the CPU; None in a new run.

        Raises:
            RunError: another process is training here, another run is here, or the checkpoint
            can't be used. OSError: the directory can't be written.
        """
        with self._locked():
            if force and (self.is_finished or self._differences(identity)):
                for name in _REMOVED:
                    (self.path / name).unlink(missing_ok=True)
            self.kept(identity)
            if (self.path / "config.json").is_file():
                self._check_derived(config)
                _warn_if_elsewhere(self.config(), config)
            else:
                self._write_json("config.json", config)
            self._notes = {"config_sha256": json_sha256(self._read_config())}
            try:
                state = self._state()
            except ValueError as error:
                raise RunError(f"{error}: {_ADVICE}") from error
            if state is not None:
                if "optimizers" not in state:
                    raise RunError(
                        f"{self.path} was begun by an earlier version of this code: finish it with "
                        "that one, give another name, or remove the folder"
                    )
                if not self.is_finished:  # a kill may have come between last.pt and these
                    self._write_derived(state)
            yield state

    def save(self, state: dict[str, Any]) -> None:
        """Write a trainer's state: last.pt first, the one file that a resumed run believes."""
        self._write_tensors("last.pt", state | self._notes)
        self._write_derived(state)

    def finish(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write metrics.json, with the run's name and checksums of its files; returns it."""
        self._check_held()
        history = _curves((self.path / "history.csv").read_text(encoding="utf-8"))
        checksums = {"weights_sha256": self.checksum(), **self._notes, "history_sha256": history}
        metrics = {"name": self.path.name, **metrics, **checksums}
        self._write_json("metrics.json", metrics)
        return metrics

    def _write_derived(self, state: dict[str, Any]) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, HISTORY_COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(state["history"])
        self._write("history.csv", text.getvalue().encode())
        self._write_tensors("best.pt", state["best"][-1])

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        self._write(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def _write_tensors(self, name: str, value: Any) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        self._write(name, buffer.getvalue())

    def _write(self, name: str, content: bytes) -> None:
        self._check_held()
        try:
            write_file(self.path / name, content)
        except OSError as error:
            self._check_held()
            raise OSError(
                f"{error}; the run is intact up to its last finished epoch: make room, then the "
                "same command goes on"
            ) from error

    def make(self) -> None:
        """Make the folder, unless it is there.

        Raises:
            RunError: something else is in its place. OSError: it can't be made.
        """
        for place in (self.path, *self.path.parents):
            if place.is_symlink() and not place.exists():
                raise RunError(
                    f"{place} is a link to {os.readlink(place)}, which isn't there: mend the link, "
                    "or give another name"
                )
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file, not a run directory: give another name")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"can't make the run directory {self.path}: {error.strerror}; name one that can be "
                "written"
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.make()
        file = self.path / ".lock"
        if file.is_symlink():
            raise RunError(f"{file} is a link, which no lock of ours is: remove it")
        busy = "is being trained by another process: wait for it or give another name"
        with locked(file, f"{self.path} {busy}"):
            self._lock = _status(file)
            yield

    def _check_held(self) -> None:
        """Refuse to write into a folder that isn't the one that was locked, or no more there."""
        if not self.path.is_dir() or _status(self.path / ".lock") != self._lock:
            raise RunError(
                f"{self.path} was removed, renamed or replaced during its run, which ends here: "
                "put it back, and the same command goes on from its last finished epoch"
            )

    def _check_derived(self, config: dict[str, Any]) -> None:
        """Refuse a config.json that isn't what its identity makes of the data at hand."""
        there = self._read_config()
        if changed := [name for name in _DERIVED if there[name] != _as_json(config[name])]:
            raise RunError(
                f"{self.path / 'config.json'} was changed since the run wrote it, or is of another "
                f"version: its {', '.join(changed)} isn't what recipe and data give: {_ADVICE}"
            )

    def _differences(self, identity: dict[str, Any]) -> list[str]:
        """In which fields the run that is there isn't the one meant.

        A field that an older run doesn't have is taken as it is now.
        """
        if not (self.path / "config.json").is_file():
            if left := [name for name in FILES if (self.path / name).is_file()]:
                raise RunError(
                    f"{self.path} holds {', '.join(left)} without a config.json to say whose they "
                    f"are: {_ADVICE}"
                )
            return []
        try:
            there = self.config()
        except ValueError as error:
            raise RunError(f"{error}: {_ADVICE}") from error
        now = _as_json(identity)
        return unlike({k: there.get(k, now[k]) for k in now}, now)


def _as_json(value: Any) -> Any:
    """With lists for tuples, as it is read again."""
    return json.loads(json.dumps(value))


def _agrees(rows: pd.DataFrame, curves: str, metrics: dict[str, Any]) -> bool:
    """Whether a history is the one that those metrics were taken from."""
    names = ["train_acc", "val_acc", "val_loss"]
    best = rows[rows["epoch"] == metrics["best_epoch"]][names].to_numpy()
    told = np.array([[metrics[name] for name in names]], dtype="float64")
    return (
        len(rows) == metrics["epochs_run"]
        and best.shape == told.shape
        and np.allclose(best, told, rtol=1e-9, equal_nan=True)
        and np.isclose(rows["seconds"].sum(), metrics["seconds_train"])
        and metrics.get("history_sha256", curves) == curves
    )


def _curves(history: str) -> str:
    """The checksum of a history.csv but for its last column, the times, which never repeat."""
    return json_sha256([line.rpartition(",")[0] for line in history.splitlines()])


def json_sha256(value: Any) -> str:
    """The checksum of a JSON value, however it was laid out in its file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def locked(file: Path, busy: str, timeout: float = 0) -> Iterator[None]:
    """Hold the lock of a file, which dies with the process; nothing where there are no locks.

    Raises:
        RunLocked: another process has held it for `timeout` seconds; says what `busy` says.
    """
    # As a fallback filelock would leave a file: after a crash, other machines never get in again.
    lock = filelock.FileLock(file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=timeout)
    except filelock.Timeout as error:
        raise RunLocked(busy) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    try:
        yield
    finally:
        lock.release()


def _status(file: Path) -> tuple[int, int] | None:
    """The device and inode of a file; None where there is none."""
    with suppress(OSError):
        status = file.lstat()
        return status.st_dev, status.st_ino
    return None


def unlike(old: Any, new: Any, name: str = "") -> list[str]:
    """In which fields two values of JSON differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line
            for key in keys
            for line in unlike(old.get(key), new.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if old == new else [f"{name} is {old!r} there and {new!r} now"]


def read_tensors(path: Path) -> Any:
    """What a file written by torch.save holds, on the CPU.

    Raises:
        ValueError: it is damaged, or holds more than tensors and plain values.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        if zipfile.is_zipfile(content):  # what torch wrote before 1.6 isn't, and has no checksums
            _check_archive(zipfile.ZipFile(content))
        content.seek(0)
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # of a dozen kinds, as the damage has it
        raise ValueError(f"{path} is damaged, or holds more than tensors") from error


def _check_archive(archive: zipfile.ZipFile) -> None:
    """What torch.load leaves out: it checks no checksum, and reads a "folder" as zeros."""
    damaged = archive.testzip()
    folders = [record.filename for record in archive.infolist() if record.external_attr & 0x10]
    if damaged or folders:
        raise zipfile.BadZipFile(damaged or folders[0])


def write_file(path: Path, content: bytes) -> None:
    """Write all of it or nothing: under a temporary name, synced, then renamed into place.

    Raises:
        OSError: it can't; what was there before still is.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a run that was killed; or a link, never followed
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"can't write {path}: {error.strerror}") from error


# -------------------------------------------------------------------------------------- provenance


def identity(
    recipe: Recipe, seed: int, protocol: str, data: Data, teacher: RunDirectory | None = None
) -> dict[str, Any]:
    """What tells a run from any other: the fields of config.json that a resumed one must share.

    Not the checksum of a teacher, or of the file of a network of one's own, that is gone: a
    finished run has no more need of it.
    """
    who = {
        "recipe": asdict(recipe),
        # What the name meant: augment.POLICIES can be changed.
        "policies": {recipe.policy: asdict(augment.get_policy(recipe.policy))},
        "seed": seed,
        "protocol": protocol,
        "dataset": data.name,
        "limit": data.limit,
        "data_sha256": data.checksum,
    }
    if teacher is not None or recipe.teacher is None:
        who["teacher_sha256"] = teacher and teacher.checksum()
    if ":" in recipe.network and (source := source_sha256(recipe.network)):
        who["network_sha256"] = source
    return who


# What changes the digits, beside the run's identity; on a GPU `device` names it.
_CONDITIONS = "threads instructions bfloat16 device torch numpy libraries compile git_commit"


def conditions(recipe: Recipe, device: torch.device, compile: bool | str) -> dict[str, Any]:
    """Where and by what a run is computed: the fields of config.json that only describe."""
    if device.type == "cuda":
        name = f"{device}: {torch.cuda.get_device_name(device)}"
    else:
        name = f"{device}: {platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": [
            name for name, able in torch.cpu.get_capabilities().items() if able and "bf16" in name
        ],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "libraries": _libraries(recipe),
        "compile": compile,
        "git_commit": _git_commit(),
    }


def _libraries(recipe: Recipe) -> dict[str, str | None]:
    """Versions of what augments beside torch; None where it was installed under another name."""
    of = {"albumentations": ["albumentations", "opencv-python-headless"], "batched": []}
    versions: dict[str, str | None] = {}
    for name in of.get(recipe.build, [recipe.build]):
        versions[name] = None
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _warn_if_elsewhere(begun: dict[str, Any], now: dict[str, Any]) -> None:
    """A run that goes on under other conditions is still good, but can't be repeated exactly."""
    changed = [
        f"{name} was {begun.get(name)} and is {now[name]}"
        for name in _CONDITIONS.split()
        if begun.get(name, now[name]) != now[name]  # an older run didn't note all of them
    ]
    if changed:
        warnings.warn(
            f"this run was begun under other conditions ({'; '.join(changed)}): it goes on, and "
            "may end with slightly different numbers than it would have",
            stacklevel=5,  # the line that called train
        )


@functools.cache  # the code that runs stays what was imported, whatever is committed meanwhile
def _git_commit() -> str | None:
    """The commit of this code, with `+` if tracked files other than results changed since.

    None outside a checkout, also where the code lies within another project's repository.
    """
    if CHECKOUT is None or not (CHECKOUT / ".git").exists():
        return None

    def git(*command: str) -> str:
        # Neither a repository around this one, should .git be damaged, nor that of $GIT_DIR.
        command = ("git", "-C", str(CHECKOUT), "--git-dir=.git", "--work-tree=.", *command)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", ".", ":(exclude)results")
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        return None
    return commit + "+" if changed else commit
