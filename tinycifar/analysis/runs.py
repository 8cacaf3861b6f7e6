"""Run directories, read; runs alike but for their seed, grouped."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t

import augment
import tinycifar.data as cifar10
from tinycifar import optim
from tinycifar.analysis.measures import checked
from tinycifar.recipes import DEFAULTS, RECIPES, Recipe
from tinycifar.studies import load_study
from tiny_cifar10_net import NetCIFAR10_Tiny, load_pretrained
from tinycifar.training import HISTORY_COLUMNS, PROTOCOLS, ROOT, log_probabilities

RESULTS = Path(__file__).resolve().parent.parent / "results"
PUBLISHED = RESULTS / "published.csv"


@dataclass(frozen=True, eq=False)
class Run:
    """What a run directory holds; `load_run` makes it.

    Attributes:
        folder: the run directory.
        name: its name.
        config: config.json.
        history: the columns of history.csv, float64 (epochs,) each, NaN where a field is empty.
        metrics: metrics.json; None while the run isn't finished.
    """

    folder: Path
    name: str
    config: dict
    history: dict[str, np.ndarray]
    metrics: dict | None

    @property
    def epochs(self) -> int:
        """How many epochs are done."""
        return len(self.history["epoch"])

    @property
    def recipe(self) -> dict:
        """All fields of its recipe; one that came later had its default."""
        return DEFAULTS | self.config["recipe"]

    @property
    def data_title(self) -> str:
        """The data set, as `cifar10.Data.title` has it."""
        return cifar10.title(self.config["dataset"], self.config.get("limit"))

    @property
    def stats(self) -> cifar10.Stats:
        """The channel mean and std that its images were normalised with."""
        return cifar10.Stats(tuple(self.config["mean"]), tuple(self.config["std"]))

    @property
    def protocol(self) -> str:
        """The protocol; where the epoch was chosen on test, it says so."""
        name = self.config["protocol"]
        return f"{name}: epoch chosen on test" if name == "test-selected" else name

    @property
    def label(self) -> str:
        """What tells it from other runs on its data, e.g. "quick · val · seed 0"."""
        parts = [self.config["recipe"]["name"], self.protocol, f"seed {self.config['seed']}"]
        if self.metrics is None:
            parts.append(f"unfinished, {counted(self.epochs, 'epoch')}")
        return " · ".join(parts)

    @property
    def title(self) -> str:
        """What a figure says about its run, e.g. "quick · val · seed 0 · CIFAR-10"."""
        return f"{self.label} · {self.data_title}"


def load_run(folder: str | Path) -> Run:
    """Read a run directory, finished or not.

    Args:
        folder: a relative one from the current folder, or else from the repository's root, or else
            from results/.

    Raises:
        FileNotFoundError: the folder isn't a run directory; lists those beside it.
        ValueError: a file in it isn't what training wrote.
    """
    folder = _found(folder)
    if not (folder / "config.json").is_file():
        beside = ", ".join(sorted(f.parent.name for f in folder.parent.glob("*/config.json")))
        raise FileNotFoundError(
            f"{folder} is not a run directory: expected one that holds config.json, as train() "
            f"writes it; beside it there {f'are: {beside}' if beside else 'is none'}"
        )
    config = _read_json(folder / "config.json", ("recipe", "seed", "protocol", "dataset", "split"))
    if config["protocol"] not in PROTOCOLS:
        raise ValueError(
            f"{folder / 'config.json'} names the protocol {config['protocol']!r}; expected one of "
            f"{', '.join(PROTOCOLS)}: was it written by another version?"
        )
    finished = (folder / "metrics.json").is_file()
    metrics = _read_json(folder / "metrics.json", ("test_acc", "params")) if finished else None
    name = folder.resolve().name
    return Run(folder, name, config, _read_history(folder / "history.csv"), metrics)


def load_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read several run directories; see `load_run`."""
    if isinstance(folders, (str, Path)):
        raise TypeError(
            f"load_runs takes a list of run directories, got {str(folders)!r}: "
            "use load_run for one, or find_runs for all in a folder"
        )
    return [load_run(folder) for folder in folders]


def find_runs(parent: str | Path) -> list[Run]:
    """All run directories directly below `parent`, sorted by name; there may be none.

    Args:
        parent: a relative one as for `load_run`.

    Raises:
        FileNotFoundError: no such folder.
    """
    parent = _found(parent)
    if not parent.is_dir():
        raise FileNotFoundError(f"no folder {parent}: name one that holds run directories")
    return load_runs(sorted(file.parent for file in parent.glob("*/config.json")))


def _found(folder: str | Path) -> Path:
    places = [Path(folder), ROOT / folder, RESULTS / folder]
    return next((place for place in places if place.is_dir()), places[1])


def _read_json(file: Path, needed: Sequence[str]) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON, as train() writes it: {error}") from error
    missing = [key for key in needed if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{file} was not written by train(): it lacks {', '.join(missing)}")
    return content


def _read_history(file: Path) -> dict[str, np.ndarray]:
    """A run killed in its first epoch has no history.csv yet: columns of length 0."""
    rows = []
    if file.is_file():
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    try:
        columns = {name: [float(row[name] or "nan") for row in rows] for name in HISTORY_COLUMNS}
        return {name: np.array(values) for name, values in columns.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} can't be read ({error!r}); expected numbers in {', '.join(HISTORY_COLUMNS)}"
        ) from error


def published_run() -> Run:
    """The reference's own run, as far as its notebook tells of it (results/published-log.csv).

    github.com/saneshashank/tuning_CNN_for_CIFAR10 (MIT), commit 898d388, tuning_CNN_CIFAR10.ipynb,
    prints the training accuracy and the test loss and accuracy of each epoch. The learning rate,
    which it doesn't print, follows from the losses (in epoch 45 by a hair: their four digits leave
    a third drop possible). The training loss is unknown (NaN), and so are weights and seed: this is
    for tables of runs, of choices and of drops, and for curves.
    """
    return _run_of_log("published-log.csv", "the reference, as published", "unknown")


def published_code_run() -> Run:
    """The same notebook's code, run by us for its first epochs (results/published-code-log.csv).

    With the albumentations 1.4.7 that it installs, torch 2.12.1, on one CPU core.
    """
    return _run_of_log("published-code-log.csv", "the reference's own code, run by us", 0)


def _run_of_log(file: str, title: str, seed: int | str) -> Run:
    """A run of the reference's recipe of which only what it prints of each epoch is there."""
    recipe = RECIPES["baseline"]
    lines = (RESULTS / file).read_text(encoding="utf-8").splitlines()
    log = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)]
    column = {name: np.array([row[name] for row in log]) for name in log[0]}
    history = {
        "epoch": column["epoch"],
        "lr": plateau_rates(recipe, column["test_loss"]),
        "train_loss": np.full(len(log), np.nan),
        "train_acc": column["train_acc"],
        "val_loss": column["test_loss"],
        "val_acc": column["test_acc"],
        "seconds": np.full(len(log), np.nan),
    }
    config = {
        "recipe": asdict(recipe) | {"name": title},
        "seed": seed,
        "protocol": "test-selected",
        "dataset": "cifar10",
    }
    best = int(column["test_loss"].argmin())
    metrics = {
        "params": sum(p.numel() for p in NetCIFAR10_Tiny().parameters()),
        "epochs_run": len(log),
        "best_epoch": best + 1,
        "test_acc": float(column["test_acc"][best]),
        "test_acc_tta": None,
        "test_loss": float(column["test_loss"][best]),
    }
    return Run(RESULTS, title, config, history, metrics)


def plateau_rates(recipe: Recipe, losses: Sequence[float]) -> np.ndarray:
    """The learning rate at each epoch that a plateau recipe makes of those selection losses."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=recipe.lr)
    schedule = optim.schedule(recipe, optimizer, steps_per_epoch=1)
    rates = []
    for loss in losses:
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(loss)
    return np.array(rates)


def load_data(run: Run, root: str | Path | None = None) -> cifar10.Data:
    """The data set that a run was trained on; `root` and what it raises: see `cifar10.load`."""
    return cifar10.load(run.config["dataset"], root=root, limit=run.config.get("limit"))


def load_model(run: Run) -> NetCIFAR10_Tiny:
    """The network of a run's selected epoch (so far, if it isn't finished), in eval mode, on CPU.

    Raises:
        FileNotFoundError, ValueError: no weights, or unusable ones; see `load_pretrained`.
    """
    return load_pretrained(run.folder)


@dataclass(frozen=True)
class Predictions:
    """What a network says of some images, and what is true of them.

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

    def __post_init__(self):
        checked(self.log_p, self.labels)
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images, but {len(self.labels)} labels")

    @property
    def predicted(self) -> np.ndarray:
        """The likeliest class of each image: integers (N,)."""
        return self.log_p.argmax(axis=1)


def predictions(run: Run, data: cifar10.Data, part: str | None = None) -> Predictions:
    """What the network of a run says of the test or the validation images.

    Args:
        part: test or validation; None is validation where the run has any, as whoever goes on to
            change something had better not know the test set.

    Raises:
        ValueError: `data` isn't what the run was trained on; there are no validation images, as
            under other protocols than `val`; or a run that isn't finished is to be looked at on
            test, which would be choosing by it.
    """
    require_its_data(run, data)
    if part not in (None, "test", "validation"):
        raise ValueError(f"part must be test, validation or None; got {part!r}")
    part = part or ("validation" if selects_on(run) == "validation" else "test")
    if part == "test" and run.metrics is None and selects_on(run) != "test":
        raise ValueError(
            f"run {run.name} isn't finished, and the test set is used once, at its end"
        )
    if part == "validation" and selects_on(run) != "validation":
        protocol = run.config["protocol"]
        raise ValueError(f"run {run.name} has no validation images: its protocol is {protocol}")
    test = data.test_images, data.test_labels
    images, labels = data.validation if part == "validation" else test
    log_p = log_probabilities(load_model(run), images, run.stats).numpy()
    return Predictions(log_p, images, labels, data.classes, f"{part} images · {run.title}")


def require_its_data(run: Run, data: cifar10.Data) -> None:
    if data.checksum != run.config["data_sha256"]:
        raise ValueError(
            f"run {run.name} was trained on {run.data_title} (sha256 "
            f"{run.config['data_sha256'][:12]}), not on {data.title} ({data.checksum[:12]}): "
            "pass the data of load_data(run)"
        )


def as_list(runs: Run | Iterable[Run]) -> list[Run]:
    return [runs] if isinstance(runs, Run) else list(runs)


def selects_on(run: Run) -> str | None:
    """What chose the epoch: validation, test, or nothing."""
    return {"val": "validation", "test-selected": "test"}.get(run.config["protocol"])


def comparable(run: Run) -> bool:
    whole = run.config["dataset"] == "cifar10" and run.config.get("limit") is None
    return whole and run.metrics is not None


def counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def grouped(runs: Iterable[Run]) -> tuple[list[list[Run]], list[str]]:
    """Finished runs alike but for their seed; and the names of those whose seed came before.

    Whole recipes are compared, not their names: a mean over two recipes would mean nothing.
    """
    groups: dict[tuple, dict[int, Run]] = {}
    repeats = []
    for run in runs:
        if run.metrics is None:
            continue
        # The teacher's weights and the policies as well: what a name stands for may change.
        teacher = run.config.get("teacher_sha256")
        how = json.dumps([run.recipe, _policies(run)], sort_keys=True)
        key = (how, teacher, run.data_title, run.protocol)
        seeds = groups.setdefault(key, {})
        if run.config["seed"] in seeds:
            repeats.append(run.name)
        seeds.setdefault(run.config["seed"], run)
    return [list(seeds.values()) for seeds in groups.values()], repeats


def _policies(run: Run) -> dict[str, dict]:
    """What the names of its policies meant; an early run, which didn't note it, has today's."""
    noted = run.config.get("policies")
    if noted is None:
        names = {run.recipe["policy"], *(["light"] if run.recipe["calm"] else [])}
        noted = {n: asdict(augment.POLICIES[n]) for n in names & augment.POLICIES.keys()}
    return {name: asdict(augment.Policy()) | policy for name, policy in noted.items()}


def study_groups(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs of each variation, the base first, then best first.

    Raises:
        ValueError: not one base with a finished run, or runs under another protocol than `val`, or
            on different data.
    """
    groups, _ = grouped(runs)
    if len({group[0].data_title for group in groups}) > 1:
        raise ValueError("a study compares on the same data: pass the runs on one data set only")
    if any(group[0].config["protocol"] != "val" for group in groups):
        raise ValueError("a study compares on validation: pass runs under the protocol val only")
    base = [group for group in groups if variation_name(group) == "base"]
    if len(base) != 1:
        raise ValueError(
            f"a study has one base with a finished run; here there are {len(base)}: train it "
            "first, with make sweep STUDY=..., and pass the runs of one study"
        )
    others = [group for group in groups if group is not base[0]]
    return [*base, *sorted(others, key=lambda g: -statistics.fmean(val_accuracies(g)))]


def published_study(name: str) -> list[Run]:
    """The runs of results/<name>, the study of that name, with those published elsewhere.

    What another study or no study at all has trained already, the base above all, needn't be
    trained again; it is called as this study calls it.
    """
    study = load_study(ROOT / "studies" / f"{name}.yaml")
    folders = [RESULTS, *(f for f in sorted(RESULTS.iterdir()) if f.is_dir() and f.name != name)]
    found = []
    for run in chain.from_iterable(map(find_runs, folders)):
        for recipe in map(asdict, study.recipes):
            same = run.recipe | {"name": recipe["name"]} == recipe
            if same and run.config["protocol"] == "val" and run.config["seed"] in study.seeds:
                found.append(replace(run, config=run.config | {"recipe": recipe}))
    return [*found, *find_runs(RESULTS / name)]


def variation_name(group: list[Run]) -> str:
    return group[0].config["recipe"]["name"].replace("_", " ")


def val_accuracies(group: list[Run]) -> list[float]:
    """The accuracies by which a study decides: on validation, never on test."""
    return [run.metrics["val_acc"] for run in group]


class Gain(NamedTuple):
    """What a variation gains over the base, in points, with its standard error over seeds."""

    points: float
    error: float
    interval: float  # half of the 95 % interval, by Student's t, for this variation alone

    @property
    def clear(self) -> bool:
        """Beyond noise: the interval leaves 0 out."""
        return abs(self.points) > self.interval


PRIOR = 10  # how many differences between seeds the count of images is worth, in `gains`


def gains(groups: list[list[Run]]) -> list[Gain]:
    """What each group but the first gains over the first.

    The spread over seeds is taken to be the same for all. A few seeds say little of it, and may
    agree by chance: three of `tuned`'s to 0.08 points. But accuracy is counted on n images, and
    networks that differ in their seed alone are right on different ones: with the accuracy p, by
    p (1 - p) / 2n of variance, if about half of a image's being right or wrong is the seed's
    doing (measured: 0.47 of it for `tuned`, 0.38 for `sprint`). This counts as much as PRIOR
    differences between seeds do (a moderated t-test: Smyth, 2004, doi 10.2202/1544-6115.1027):

        s² = (PRIOR p (1 - p) / 2n + sum of (n_i - 1) s_i²) / (PRIOR + sum of (n_i - 1))

    and the standard error is s root(1/n_i + 1/n_base).
    """
    values = [val_accuracies(group) for group in groups]
    p = statistics.fmean(values[0]) / 100
    prior = 100**2 * p * (1 - p) / (2 * groups[0][0].config["split"]["selection"])
    squares = sum((len(v) - 1) * statistics.variance(v) for v in values if len(v) > 1)
    degrees = PRIOR + sum(len(v) - 1 for v in values)
    spread = math.sqrt((PRIOR * prior + squares) / degrees)
    found = []
    for v in values[1:]:
        points = statistics.fmean(v) - statistics.fmean(values[0])
        error = spread * math.sqrt(1 / len(v) + 1 / len(values[0]))
        found.append(Gain(points, error, float(t.ppf(0.975, degrees)) * error))
    return found


@dataclass(frozen=True)
class Network:
    """A published network: its size, and its test accuracy in percent as its authors report it."""

    network: str
    parameters: int
    multiply_adds: int | None
    accuracy: float
    how: str
    source: str


def published_networks(file: str | Path = PUBLISHED) -> list[Network]:
    """The small networks on CIFAR-10 of results/published.csv, which names the sources.

    Raises:
        FileNotFoundError: no such file. ValueError: a row that can't be read.
    """
    networks = []
    for row in csv.DictReader(Path(file).read_text(encoding="utf-8").splitlines()):
        try:
            size, accuracy = int(row.pop("parameters")), float(row.pop("accuracy"))
            macs = int(row.pop("multiply_adds") or 0) or None
            networks.append(Network(parameters=size, multiply_adds=macs, accuracy=accuracy, **row))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}: can't read a row, {error}; expected the columns network, parameters, "
                "multiply_adds, accuracy, how, source"
            ) from error
    return networks
