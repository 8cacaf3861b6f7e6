"""Kill training with SIGKILL, again and again, and compare with runs that nobody disturbed.

    python benchmarks/kills.py --kills 100 --seed 0

Each case is trained once undisturbed. Then the same is started in a process of its own, killed at a
random moment of the time that the whole takes, start and end included, and started again until it
is finished: the epochs that were done must never become fewer, and its history (but for the
seconds) and its weights must be the undisturbed ones, bit for bit. Kills alternate between the
process alone, whose children have to notice, and its whole process group. Prints a line a case and
the total; exits 1 if anything differs.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import albumentations  # noqa: F401
import torch
import torchvision  # noqa: F401
import typer

from tinycifar import RunError, data, get_recipe, train, train_many
from tinycifar.acceleration import computes_bfloat16
from tinycifar.recipes import Recipe
from tinycifar.run_directory import RunDirectory

# Many epochs, each of a few milliseconds: many states to go on from.
_SHORT = Recipe(
    "kills",
    epochs=30,
    batch_size=45,  # two steps an epoch
    lr=0.01,
    schedule="one_cycle",
    policy="light",
    network="4 8s2 8d2",
    stop_patience=None,
)
# Forked from one that has imported everything, and computed nothing, processes start at once.
_CONTEXT = multiprocessing.get_context("fork")
CASES: dict[str, dict[str, Any]] = {  # what a case changes, and how many loader processes it has
    "BlueprintNet, sgd": {"recipe": _SHORT},
    "adamw, cosine": {"recipe": get_recipe(_SHORT, optimizer="adamw", schedule="cosine")},
    "average of weights": {"recipe": get_recipe(_SHORT, optimizer="muon_adamw", ema=0.9)},
    "bfloat16": {"recipe": get_recipe(_SHORT, precision="bfloat16")},
    "torchvision, 2 workers": {"recipe": get_recipe(_SHORT, build="torchvision"), "workers": 2},
    "albumentations, 2 workers": {
        "recipe": get_recipe(_SHORT, build="albumentations"),
        "workers": 2,
    },
    "train_many": {"recipe": get_recipe(_SHORT, epochs=60), "many": True},
}


def carry_out(folder: Path, recipe: Recipe, workers: int = 0, many: bool = False) -> None:
    """Train a case, or go on with it: in a process that leads a group of its own."""
    os.setpgid(0, 0)
    with open(f"{folder}.log", "a") as log:  # Python's own words about semaphores left by the dead
        os.dup2(log.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    few = data.load("shapes", limit=100)
    settings: dict[str, Any] = {"dataset": few, "device": "cpu", "progress": False}
    if many:
        train_many([recipe], seeds=[0, 1], folder=folder, jobs=2, **settings)
    else:
        train(recipe, folder / "run", workers=workers, **settings)


@dataclass
class Tally:
    """What came of a case."""

    alone: int = 0  # kills of the process itself, and of its group
    group: int = 0
    finished: int = 0  # runs that were killed, resumed, and compared
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.alone + self.group


def kill_and_resume(case: dict[str, Any], kills: int, rng: random.Random, folder: Path) -> Tally:
    """Kill a case `kills` times, in as many runs as that takes; the last one is finished too."""
    tally = Tally()
    started = time.monotonic()
    if (code := _start(case, folder / "undisturbed", None)) != 0:
        tally.wrong.append(f"undisturbed, it ends with exit status {code}")
        return tally
    whole = time.monotonic() - started
    while not tally.wrong and tally.kills < kills:
        run, done, before = folder / f"run{tally.finished}", False, tally.kills
        epochs: dict[str, int] = {}
        while not (done or tally.wrong):
            by_group = tally.group < tally.alone
            limit = rng.uniform(0, whole) if tally.kills < kills else None
            code = _start(case, run, limit, by_group)
            done = code == 0
            if code == -signal.SIGKILL:
                tally.group += by_group
                tally.alone += not by_group
            elif not done:
                said = Path(f"{run}.log").read_text()[-1000:]
                tally.wrong.append(f"after {tally.kills} kills it ends with {code}: {said}")
            now = {f.parent.name: len(RunDirectory(f.parent).history()) for f in _configs(run)}
            lost = [name for name in epochs if now.get(name, 0) < epochs[name]]
            tally.wrong += [f"{name} lost epochs: {epochs} became {now}" for name in lost]
            epochs = now
        if tally.kills > before:
            tally.finished += 1
            tally.wrong += differences(folder / "undisturbed", run)
    return tally


def _start(case: dict[str, Any], folder: Path, limit: float | None, group: bool = False) -> int:
    """Carry a case out, for so many seconds at most; the exit status, negative if killed."""
    process = _CONTEXT.Process(target=carry_out, args=(folder,), kwargs=case)
    process.start()
    process.join(limit)
    if process.is_alive():
        try:
            (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it doesn't lead a group yet
            process.kill()
        process.join()
    return process.exitcode


def differences(undisturbed: Path, killed: Path) -> Iterator[str]:
    """In what the runs of one folder differ from those of the other, in words."""
    for config in _configs(undisturbed):
        one, other = RunDirectory(config.parent), RunDirectory(killed / config.parent.name)
        try:
            if not other.is_finished:
                yield f"{other.path} isn't finished"
            elif one.checksum() != other.checksum():
                yield f"{other.path} has other weights"
            elif not _curves(one).equals(_curves(other)):
                yield f"{other.path} has another history"
        except ValueError as error:  # one of its files is damaged
            yield str(error)


def _curves(run: RunDirectory) -> Any:
    return run.history().drop(columns="seconds")


def _configs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/config.json"))


def main(
    kills: Annotated[int, typer.Option(help="in all, shared out among the cases")] = 100,
    seed: Annotated[int, typer.Option(help="decides the moments")] = 0,
    only: Annotated[str, typer.Option(help="the name of one case")] = "",
) -> None:
    """Kill training at random moments, and compare what comes of it."""
    cases = {name: case for name, case in CASES.items() if only in ("", name)}
    if not computes_bfloat16():
        cases.pop("bfloat16", None)
    if not cases:
        raise RunError(f"no case {only!r}; valid: {', '.join(CASES)}")
    rng, tallies = random.Random(seed), []
    for number, (name, case) in enumerate(cases.items()):
        share = kills * (number + 1) // len(cases) - kills * number // len(cases)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            tally = kill_and_resume(case, share, rng, Path(folder))
        tallies.append(tally)
        print(
            f"{name:26} {tally.kills:3} kills ({tally.alone} of the process alone), "
            f"{tally.finished:2} runs resumed to the end, {len(tally.wrong)} differences",
            *tally.wrong,
            sep="\n    ",
            flush=True,
        )
    wrong = sum(len(tally.wrong) for tally in tallies)
    print(f"{'all':26} {sum(t.kills for t in tallies):3} kills, {wrong} differences")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
