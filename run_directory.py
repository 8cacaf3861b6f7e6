"""The files of a run: who may write them, and how nothing half-written is ever read.

A run directory holds

    config.json    everything that decides the outcome, and where it was computed
    history.csv    one row an epoch
    last.pt        all that is needed to go on from here
    best.pt        the weights of the selected epoch: a plain state_dict
    metrics.json   written once, at the end
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "FILES",
    "RunError",
    "begin",
    "is_finished",
    "locked",
    "refuse_another_run",
    "write",
    "write_json",
]

FILES = ("config.json", "history.csv", "last.pt", "best.pt", "metrics.json")


class RunError(RuntimeError):
    """A run that can't start or go on; the message says what to do, and nothing was lost."""


def begin(run_dir: Path, config: dict, identity: dict, defaults: dict, force: bool) -> dict:
    """Make the directory that we have locked ready to train in; returns what config.json holds.

    With `force` a finished run and another one than `identity` says are removed, otherwise another
    one is refused. For `identity` and `defaults` see `refuse_another_run`; `config` becomes
    config.json, unless there is one.
    """
    if force and (is_finished(run_dir) or _differences(run_dir, identity, defaults)):
        _remove(run_dir)
    refuse_another_run(run_dir, identity, defaults)
    if not (run_dir / "config.json").is_file():
        write_json(run_dir / "config.json", config)
    return json.loads((run_dir / "config.json").read_text())


def is_finished(run_dir: Path) -> bool:
    return (run_dir / "metrics.json").is_file()


def _remove(run_dir: Path) -> None:
    """All files, config.json last: killed meanwhile, it is still known whose the others are."""
    for name in reversed(FILES):
        (run_dir / name).unlink(missing_ok=True)


def refuse_another_run(run_dir: Path, identity: dict, defaults: dict) -> None:
    """Raise RunError if a run is in this directory that isn't the one meant.

    Args:
        identity: the fields of its config.json that must be the same; the others only describe.
            One that an older run doesn't have is taken as it is now.
        defaults: what a field of the recipe was before there was such a field.
    """
    differences = _differences(run_dir, identity, defaults)
    if differences:
        raise RunError(
            f"{run_dir} holds a run that differs: {'; '.join(differences)}. "
            "Nothing was touched: give the same settings to go on, another name, "
            "or FORCE=1 to replace it (of a sweep, remove the folder)"
        )


def _differences(run_dir: Path, identity: dict, defaults: dict) -> list[str]:
    """In which fields the run that is there isn't the one meant."""
    there = run_dir / "config.json"
    if not there.is_file():
        return []
    try:
        old = json.loads(there.read_text())
        old["recipe"] = defaults | old["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{there} is not the config.json of a run ({error!r}): give another name, or remove it"
        ) from error
    now = json.loads(json.dumps(identity))  # with lists for tuples, as it was read
    return _unlike({k: old.get(k, now[k]) for k in now}, now)


def _unlike(old, new, name="") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line
            for key in keys
            for line in _unlike(old.get(key), new.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if old == new else [f"{name} is {old!r} there and {new!r} now"]


@contextmanager
def locked(run_dir: Path):
    """Make the folder, and keep a second process off it as long as we are here.

    The lock dies with its process, kill -9 included.
    """
    _make_folder(run_dir)
    try:
        import fcntl
    except ImportError:  # Windows: no such lock, nothing lost but the warning
        yield
        return
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{run_dir} is being trained by another process: wait for it or give another name"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield


def _make_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file, not a run directory: give another name")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"can't make the run directory {path}: {error.strerror}; name one that can be written"
        ) from error


def write(path: Path, content: bytes) -> None:
    """Write all of it or nothing: under a temporary name, synced, then renamed into place."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"can't write {path}: {error.strerror}; the run is intact up to its last finished "
            "epoch: make room, then the same command goes on"
        ) from error


def write_json(path: Path, value: dict) -> None:
    write(path, (json.dumps(value, indent=2) + "\n").encode())
