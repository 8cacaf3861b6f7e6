"""Reading run directories, and telling which runs differ in their seed alone."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import torch

import augment
from tinycifar import data as datasets
from tinycifar import optim, trials
from tinycifar.analysis.measures import check_predictions
from tinycifar.data import Data, DataSplits, Stats
from tinycifar.evaluation import log_probabilities
from tinycifar.paths import RESULTS, absolute
from tinycifar.recipes import RECIPES, Recipe
from tinycifar.run_directory import HISTORY_COLUMNS, RunDirectory, find_run
from tinycifar.studies import Study, chosen, load_study
from tinycifar.weights import load_pretrained

__all__ = [
    "Predictions", "Run", "find_runs", "load_run", "load_runs", "load_search", "predictions",
    "published_networks", "published_study", "reference_code_run", "reference_run", "study_runs",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Run:
    """What a run directory holds; `load_run` makes it.

    Attributes:
        folder: the run directory.
        name: its name.
        config: config.json, its recipe with today's fields.
        history: history.csv, a row an epoch: float64, NaN where a field is empty.
        metrics: metrics.json; None while the run isn't finished.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    history: pd.DataFrame
    metrics: dict[str, Any] | None

    @property
    def epochs(self) -> int:
        """How many epochs are done."""
        return len(self.history)

    @property
    def recipe(self) -> dict[str, Any]:
        """All fields of its recipe, and those retired since that it used."""
        return self.config["recipe"]

    @property
    def data_title(self) -> str:
        """The data set, as `Data.title` has it."""
        return datasets.title(self.config["dataset"], self.config.get("limit"))

    @property
    def stats(self) -> Stats:
        """The channel mean and std that its images were normalised with."""
        return Stats(tuple(self.config["mean"]), tuple(self.config["std"]))

    @property
    def protocol(self) -> str:
        return self.config["protocol"]

    @property
    def selects_on(self) -> str | None:
        """What selects the epoch: validation, test, or nothing."""
        return {"val": "validation", "test-selected": "test"}.get(self.protocol)

    @property
    def losses_compare(self) -> bool:
        """Whether the training loss is the plain one, as the loss on other images is."""
        return self.recipe["label_smoothing"] == 0 and self.recipe["teacher"] is None

    @property
    def kind(self) -> str:
        """Recipe and protocol; where the epoch was selected on test, it says so."""
        return f"{self.recipe['name']} · {protocol_title(self.protocol)}"

    @property
    def label(self) -> str:
        """What tells it from other runs on its data, e.g. "quick · val · seed 0"."""
        label = f"{self.kind} · seed {self.config['seed']}"
        if self.metrics is None or self.cut_short:
            how = "unfinished" if self.metrics is None else "cut short"
            label += f" · {how}, {counted(self.epochs, 'epoch')}"
        return label

    @property
    def title(self) -> str:
        """What a figure says about its run, e.g. "quick · val · seed 0 · CIFAR-10"."""
        return f"{self.label} · {self.data_title}"

    @property
    def cut_short(self) -> bool:
        """Whether its caller ended it before its recipe did, by `on_epoch`."""
        return bool(self.metrics and self.metrics.get("cut_short"))

    @property
    def pool_key(self) -> str:
        """What runs share that differ in their seed alone, and so may be pooled.

        Whole recipes, not their names: a mean over two recipes would mean nothing. The teacher's
        weights and the policies as well: what a name stands for may change.
        """
        sums = [self.config.get(f"{of}_sha256") for of in ("teacher", "network", "data")]
        data = [self.data_title, self.protocol]
        parts = [self.recipe, self._policies(), sums, data, self.cut_short]
        return json.dumps(parts, sort_keys=True)

    def _policies(self) -> dict[str, dict[str, Any]]:
        """What the name of its policy meant; an early run, which didn't note it, has today's."""
        name = self.recipe["policy"]
        today = {n: asdict(policy) for n, policy in augment.POLICIES.items() if n == name}
        noted = self.config.get("policies", today)
        return {name: asdict(augment.Policy()) | policy for name, policy in noted.items()}

    def splits(self, data: Data) -> DataSplits:
        """`data` as the run saw it.

        Raises:
            ValueError: it isn't what the run was trained on, or config.json tells other channel
            statistics or classes than its own.
        """
        was, limit = self.config["data_sha256"], self.config.get("limit")
        if data.checksum != was:
            raise ValueError(
                f"run {self.name} was trained on {self.data_title} (sha256 {was[:12]}), not on "
                f"{data.title} ({data.checksum[:12]}): pass "
                f"tinycifar.data.load({self.config['dataset']!r}, limit={limit})"
            )
        splits = DataSplits(data, self.protocol)
        if (splits.stats, list(data.classes)) != (self.stats, self.config["classes"]):
            raise ValueError(
                f"{self.folder / 'config.json'} was changed since the run: its mean, std or "
                f"classes aren't those of {data.title}, which were {splits.stats}"
            )
        return splits


def load_run(run: str | PathLike[str]) -> Run:
    """Read a run directory, finished or not.

    Args:
        run: what `find_run` takes: the name of a preset or of a published run, or a path.

    Raises:
        FileNotFoundError: there is no such run; lists what there is.
        ValueError: a file in it isn't what training wrote.
    """
    files = RunDirectory(find_run(run))
    metrics = files.metrics() if files.is_finished else None
    return Run(files.path, files.path.resolve().name, files.config(), files.history(), metrics)


def load_runs(runs: Iterable[str | PathLike[str]]) -> list[Run]:
    """Read several run directories; see `load_run`."""
    if isinstance(runs, (str, PathLike)):
        raise TypeError(
            f"load_runs takes a list of runs, got {str(runs)!r}: use load_run for one, or "
            "find_runs for all in a folder"
        )
    return [load_run(run) for run in runs]


def study_runs(study: Study, folder: str | PathLike[str]) -> list[Run]:
    """The runs of a study that are compared: base, variations, the best trials of its search.

    Of trials that were confirmed with other seeds, the run that they were chosen by is left out:
    it was the highest of many, partly by luck. For a study in results/studies/, runs published
    elsewhere are included: what another study or a run of results/ has trained, the base above
    all, needn't be trained again. Such a run gets the name that this study has for its recipe.

    Raises:
        FileNotFoundError: no such folder.
    """
    folder = absolute(folder)
    runs, names = find_runs(folder), {recipe.name for recipe in study.recipes}
    published = folder.parent == RESULTS / "studies"
    if study.search is not None:
        best = {(recipe.name, seed) for recipe, seed in chosen(study.search, folder)}
        if study.search.confirm:
            best = {key for key in best if key[1] != study.search.seed}
        keys = ((run, (run.recipe["name"], run.config["seed"])) for run in runs)
        runs = [run for run, key in keys if key[0] in names or key in best]
    elif not published:  # there, variations that were taken out of the file are shown as well
        runs = [run for run in runs if run.recipe["name"] in names]
    if not published:
        return runs
    others = sorted(f for f in folder.parent.iterdir() if f.is_dir() and f != folder)
    elsewhere = (_as_called(study, run) for run in chain(*map(_published_in, [RESULTS, *others])))
    return [*filter(None, elsewhere), *(_as_called(study, run) or run for run in runs)]


@functools.cache  # each study asks for all others'; results/ doesn't change in a process
def _published_in(folder: Path) -> list[Run]:
    return find_runs(folder)


def _as_called(study: Study, run: Run) -> Run | None:
    """The run under the name that the study has for its recipe; None if it isn't one of them."""
    for recipe in map(asdict, study.recipes):
        same = run.recipe | {"name": recipe["name"]} == recipe
        if same and run.protocol == "val" and run.config["seed"] in study.seeds:
            return replace(run, config=run.config | {"recipe": recipe})
    return None


def load_search(
    study: str | PathLike[str] | Study,
    folder: str | PathLike[str] | None = None,
    storage: str | None = None,
) -> optuna.Study:
    """The search of a study, as Optuna has it.

    Args:
        study: the path of a study file, or what `load_study` made of it.
        folder: that of its runs; None: runs/<name of the file>.
        storage: the URL of a database; None: TINYCIFAR_STORAGE (a notebook is no place for a
            password), else SQLite's in the folder.

    Raises:
        FileNotFoundError: it isn't there. ValueError: the study has no search.
        RunError: the storage can't be used.
    """
    study = study if isinstance(study, Study) else load_study(Path(study))
    if study.search is None:
        raise ValueError(f"the study {study.name!r} has no search")
    folder = absolute(folder or f"runs/{study.name}")
    storage = storage or os.environ.get("TINYCIFAR_STORAGE")
    if not storage and not (folder / trials.DATABASE).is_file():
        raise FileNotFoundError(
            f"no search at {folder / trials.DATABASE}: begin it with make sweep STUDY=..."
        )
    url = storage or trials.recorded(folder)
    with trials.reachable(url):
        try:
            return optuna.load_study(study_name=study.name, storage=trials.connect(url))
        except KeyError as error:
            raise FileNotFoundError(
                f"no search called {study.name!r} in {trials.shown_url(url)}"
            ) from error


def find_runs(parent: str | PathLike[str]) -> list[Run]:
    """All run directories directly below `parent`, sorted by name; there may be none.

    Args:
        parent: a relative one as in `paths.absolute`.

    Raises:
        FileNotFoundError: no such folder.
    """
    parent = absolute(parent)
    if not parent.is_dir():
        raise FileNotFoundError(f"no folder {parent}: name one that holds run directories")
    return load_runs(sorted(file.parent for file in parent.glob("*/config.json")))


def protocol_title(protocol: str) -> str:
    """The protocol; one that selects on test is never named without saying so."""
    return protocol + ": epoch chosen on test" * (protocol == "test-selected")


def as_list(runs: Run | Iterable[Run]) -> list[Run]:
    return [runs] if isinstance(runs, Run) else list(runs)


def counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


# --------------------------------------------------------------------------- published elsewhere


def reference_run() -> Run:
    """The reference's own run, as far as its notebook tells of it (results/published-log.csv).

    github.com/saneshashank/tuning_CNN_for_CIFAR10 (MIT), commit 898d388, tuning_CNN_CIFAR10.ipynb,
    prints the training accuracy and the test loss and accuracy of each epoch. The learning rate,
    which it doesn't print, follows from the losses (in epoch 45 by a hair: their four digits leave
    a third drop possible). The training loss is unknown (NaN), and so are weights and seed: this is
    for tables of runs, of choices and of drops, and for curves.
    """
    return _run_of_log("published-log.csv", "the reference, as published", "unknown")


def reference_code_run() -> Run:
    """The same notebook's code, run by us for its first epochs (results/published-code-log.csv).

    With the albumentations 1.4.7 that it installs, torch 2.12.1, on one CPU core.
    """
    return _run_of_log("published-code-log.csv", "the reference's own code, run by us", 0)


def _run_of_log(file: str, title: str, seed: int | str) -> Run:
    """A run of the reference's recipe of which only what it prints of each epoch is there."""
    recipe = RECIPES["baseline"]
    log = pd.read_csv(RESULTS / file, dtype="float64")
    log = log.rename(columns={"test_loss": "val_loss", "test_acc": "val_acc"})
    log["lr"] = plateau_rates(recipe, log["val_loss"])
    history = log.reindex(columns=list(HISTORY_COLUMNS))
    config: dict[str, Any] = {"seed": seed, "protocol": "test-selected", "dataset": "cifar10"}
    config["recipe"] = asdict(recipe) | {"name": title}
    best = log.iloc[int(log["val_loss"].argmin())]
    metrics = {
        "params": int(published_networks()["parameters"].iloc[0]),
        "epochs_run": len(log),
        "best_epoch": int(best["epoch"]),
        "test_acc": best["val_acc"],
        "test_loss": best["val_loss"],
    }
    return Run(RESULTS, title, config, history, metrics)


def plateau_rates(recipe: Recipe, losses: Iterable[float]) -> np.ndarray:
    """The learning rate at each epoch that a plateau recipe makes of those selection losses."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=recipe.lr)
    schedule: Any = optim.schedule(recipe, optimizer, steps_per_epoch=1)
    rates = []
    for loss in losses:
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(loss)
    return np.array(rates)


def published_study(name: str) -> list[Run]:
    """The runs of the study of that name, in results/studies/<name>; see `study_runs`.

    Raises:
        FileNotFoundError: no such study, or it isn't published.
    """
    study = load_study(RESULTS.parent / "studies" / f"{name}.yaml")
    folder = RESULTS / "studies" / name
    if not folder.is_dir():
        raise FileNotFoundError(f"the study {name!r} isn't published: no folder {folder}")
    return study_runs(study, folder)


def published_networks() -> pd.DataFrame:
    """The small networks on CIFAR-10 of results/published.csv, the reference first.

    Returns:
        network, parameters, multiply_adds (NaN where not told), accuracy (on test, in percent, as
        its authors report it), how, source.
    """
    return pd.read_csv(RESULTS / "published.csv")


# ----------------------------------------------------------------------------------- predictions


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a network predicts of some images, and their labels.

    Attributes:
        log_p: log-probabilities (N, classes), N of 1 or more.
        images: uint8 (N, 32, 32, 3).
        labels: integers (N,).
        classes: names, by label.
        title: whose predictions they are, of which images; every figure made of them says so.

    Raises:
        ValueError: log_p, images and labels that don't belong together.
    """

    log_p: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    classes: Sequence[str]
    title: str

    def __post_init__(self) -> None:
        check_predictions(self.log_p, self.labels)
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images, but {len(self.labels)} labels")

    @property
    def predicted(self) -> np.ndarray:
        """The likeliest class of each image: integers (N,)."""
        return self.log_p.argmax(axis=1)


def predictions(run: Run, data: Data, part: str | None = None) -> Predictions:
    """What the network of a run predicts of the test or the validation images.

    Args:
        part: test or validation; None is validation where the run has any, as whoever goes on to
            change something had better not know the test set.

    Raises:
        ValueError: `data` isn't what the run was trained on; there are no validation images, as
            under other protocols than `val`; or a run that isn't finished is to be looked at on
            test, which would be choosing by it.
    """
    splits = run.splits(data)
    if part not in (None, "test", "validation"):
        raise ValueError(f"part must be test, validation or None; got {part!r}")
    part = part or ("validation" if run.selects_on == "validation" else "test")
    tested = run.metrics is not None and run.metrics["test_acc"] is not None
    if part == "test" and not tested and run.selects_on != "test":
        raise ValueError(
            f"run {run.name} isn't finished, or is one trial of many: the test set is used once, "
            "at the end"
        )
    if part == "validation" and run.selects_on != "validation":
        raise ValueError(f"run {run.name} has no validation images: its protocol is {run.protocol}")
    chosen = splits.test if part == "test" else splits.selection
    assert chosen is not None
    log_p = log_probabilities(load_pretrained(run.folder), chosen[0], run.stats).numpy()
    images, labels = (tensor.numpy() for tensor in chosen)
    return Predictions(log_p, images, labels, data.classes, f"{part} images · {run.title}")
