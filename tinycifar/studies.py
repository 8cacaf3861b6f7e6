"""Many runs: every recipe with every seed, or a study file's variations and searches.

    table = train_many(["quick", get_recipe("quick", lr=0.01)], seeds=[0, 1, 2])
    table = train_study("studies/mine.yaml")    # make sweep STUDY=studies/mine.yaml

A study is a file: a base recipe, and variations of it, a search, or both.

    about: What each part of the schedule is worth.
    base: baseline               # a recipe, see recipes.RECIPES
    always: {epochs: 12}         # changes of the base that all variations share
    seeds: [0]                   # [0], unless said; without a search, several
    variations:                  # name: changes
      one cycle: {schedule: one_cycle, lr: 0.2, stop_patience: null}
      no dilation: {dilated: false}
    search:                      # field of a recipe: its range, or its choices
      lr: {low: 0.002, high: 0.02, log: true}
      ema: [null, 0.99]
    trials: 40                   # of the search, those that were pruned included
    sampler: tpe                 # see trials.SAMPLERS; tpe, unless said
    prune: median                # see trials.PRUNERS; median, unless said
    confirm: 3                   # train so many of the best with two more seeds; 0, unless said
    test: false                  # leave the test set alone; true, unless said

To add a variation is to add a line. Each becomes an ordinary recipe, called by its name, and each
of its seeds an ordinary run directory, in runs/<name of the file>/; a trial of a search is called
by its number. The protocol is `val`: what is to be chosen is chosen on validation. How the runs
are shared out, over processes and machines: trials.py, docs/searches.md.

On a CPU, one-thread runs side by side train somewhat more images a second than one run with all
threads (docs/speed.md); on a GPU that isn't measured.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml

from tinycifar import trials
from tinycifar.checks import check_choice, check_flag, check_number, check_whole
from tinycifar.data import Data, load, title
from tinycifar.paths import absolute
from tinycifar.recipes import Recipe, get_recipe
from tinycifar.run_directory import RunDirectory, RunError, json_sha256
from tinycifar.training import check_parts, check_seed, settle
from tinycifar.trials import Plan, Search

KEYS = {"about", "base", "always", "seeds", "variations", "test"}
SEARCH_KEYS = {"search", "trials", "sampler", "prune", "confirm"}
JOBS_ON_A_GPU = 8  # a guess, not yet measured: each takes some 1 GB of it, and a core to feed it

# ------------------------------------------------------------------------------------------ studies


@dataclass(frozen=True)
class Study:
    """What `load_study` read; see the module's docstring.

    Attributes:
        name: the file's, without its ending.
        about: what it is to find out.
        recipes: the base, called `base`, and then its variations.
        seeds: each of them is trained with each.
        search: None without one.
        test: whether whole runs are evaluated on test.
    """

    name: str
    about: str
    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    search: Search | None = None
    test: bool = True

    @property
    def runs(self) -> list[tuple[Recipe, int]]:
        """Recipe and seed of each whole run; where a search is confirmed, the base's are too."""
        more = self.search.confirming_seeds if self.search else ()
        return [*product(self.recipes, self.seeds), *((self.recipes[0], seed) for seed in more)]


def load_study(file: str | Path) -> Study:
    """Read and check a study, a relative path as in `paths.absolute`.

    Raises:
        FileNotFoundError: no such file; lists those beside it.
        ValueError: it isn't YAML, or says what no recipe can be; the message names the place.
    """
    file = absolute(file)
    if not file.is_file():
        beside = ", ".join(sorted(p.name for p in file.parent.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"no study at {file}; there: {beside}")
    try:
        return _study(file.stem, yaml.load(file.read_text(encoding="utf-8"), _Loader))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file.name} is not YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error


def _study(name: str, content: object) -> Study:
    content = _mapping("a study", content)
    unknown, missing = content.keys() - KEYS - SEARCH_KEYS, {"about", "base"} - content.keys()
    if not content.keys() & {"variations", "search"}:
        missing.add("variations or search")
    if unknown or missing:
        what = f"unknown key {min(unknown, key=str)!r}" if unknown else f"no {min(missing)!r}"
        raise ValueError(f"{what}; a study has {', '.join(sorted(KEYS | SEARCH_KEYS))}")
    base = _changed(get_recipe(content["base"]), "always", content.get("always", {}), name="base")
    variations = _mapping("variations", content.get("variations", {})).items()
    recipes = [base, *(_varied(base, variation, changes) for variation, changes in variations)]
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
        raise ValueError(f"seeds must be a list of different whole numbers; got {seeds!r}")
    seeds = tuple(map(check_seed, seeds))
    about, test = _text("about", content["about"]), content.get("test", True)
    check_flag("test", test)
    return Study(name, about, tuple(recipes), seeds, _search(content, base, seeds), test)


def _search(content: dict, base: Recipe, seeds: tuple[int, ...]) -> Search | None:
    if "search" not in content:
        if given := content.keys() & SEARCH_KEYS:
            raise ValueError(f"{min(given)!r} belongs to a search: name ranges under 'search'")
        return None
    if "trials" not in content:
        raise ValueError("a search needs 'trials', how many: e.g. trials: 40")
    if len(seeds) > 1:
        raise ValueError(
            f"a search has one seed; got {list(seeds)}: 'confirm: 3' gives the best 3 two more"
        )
    sampler, prune = content.get("sampler", "tpe"), content.get("prune", "median")
    prune = "none" if prune is None else prune  # null is YAML's none
    check_choice("sampler", sampler, trials.SAMPLERS)
    check_choice("prune", prune, trials.PRUNERS)
    ranges = {
        name: _range(base, name, values)
        for name, values in _mapping("search", content["search"]).items()
    }
    if not ranges:
        raise ValueError("search names no field of a recipe: give at least one with its range")
    _check_together(base, ranges)
    return Search(
        base=base,
        ranges=ranges,
        seed=seeds[0],
        trials=check_whole("trials", content["trials"], 1, 100_000),
        sampler=sampler,
        prune=prune,
        confirm=check_whole("confirm", content.get("confirm", 0), 0, 100),
    )


def _range(base: Recipe, name: object, values: Any) -> optuna.distributions.BaseDistribution:
    """The distribution of one field: choices, or numbers from low to high."""
    where = f"search of {name!r}"
    if isinstance(values, list):
        for value in values:
            _changed(base, where, {name: value}, "trial")
        plain = all(isinstance(value, str | int | float | None) for value in values)
        if not plain or not values or len(set(map(repr, values))) < len(values):
            raise ValueError(f"{where}: choices must be different plain values; got {values!r}")
        return optuna.distributions.CategoricalDistribution(values)
    known = {"low", "high", "log", "step"}
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= known:
        raise ValueError(
            f"{where} must be a list of choices, or {{low: 0.1, high: 1}}, with log: true or a "
            f"step where wanted; got {values!r}"
        )
    for end in ("low", "high"):
        recipe = _changed(base, where, {name: values[end]}, "trial")
        check_number(f"{where}: {end}", getattr(recipe, str(name)), float("-inf"))
    whole = Recipe.__annotations__[str(name)].startswith("int")
    kind = "IntDistribution" if whole else "FloatDistribution"
    try:
        return getattr(optuna.distributions, kind)(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error


def _check_together(base: Recipe, ranges: Mapping[str, Any]) -> None:
    """Check that the ranges' ends can be combined, too: up to 2,000 combinations of them."""
    for values in islice(product(*map(trials.ends_of, ranges.values())), 2_000):
        _changed(base, "search", dict(zip(ranges, values, strict=True)), "trial")


def _varied(base: Recipe, name: object, changes: object) -> Recipe:
    name = _text("a variation's name", name)
    taken = re.fullmatch(r"base|trial[ _]\d+", name)  # trials of a search are called so
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 .-]*", name) or taken:
        raise ValueError(
            "a variation's name has letters, digits, spaces, dots and hyphens, and isn't 'base' "
            f"or 'trial 1'; got {name!r}"
        )
    recipe = _changed(base, f"variation {name!r}", changes, name=name.replace(" ", "_"))
    if replace(recipe, name="base") == base:
        raise ValueError(f"variation {name!r} changes nothing of the base")
    return recipe


def _changed(recipe: Recipe, where: str, changes: object, name: str) -> Recipe:
    changes = _mapping(where, changes)
    valid = [field.name for field in fields(Recipe) if field.name != "name"]
    if unknown := changes.keys() - set(valid):
        raise ValueError(
            f"{where}: a recipe has no field {min(unknown, key=str)!r} to change; valid: "
            f"{', '.join(valid)}"
        )
    for field in fields(Recipe):
        if str(field.type).startswith("str") and changes.get(field.name) is not None:
            _text(f"{where}: {field.name}", changes[field.name])
    try:
        return replace(recipe, **changes, name=name)  # not get_recipe: null mustn't pass for "keep"
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a name that comes twice, of which YAML silently keeps the last; reads 1e-3."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # <<, which may bring names that are given again
        keys = [key for key, _ in node.value if key.tag != merge]
        names = [self.construct_object(key, deep=True) for key in keys]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name!r} comes twice")
        return super().construct_mapping(node, deep)


# YAML 1.1, as PyYAML has it, takes a number with an exponent but no point for text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping(what: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a mapping of names to values; got {value!r}")
    return value


def _text(what: str, value: object) -> str:
    if not isinstance(value, str):  # YAML 1.1 takes on, off, yes and no for flags
        raise ValueError(f"{what} must be text, and YAML reads it as {value!r}: put it in quotes")
    return value


# ------------------------------------------------------------------------------------- many at once


def train_many(
    recipes: Iterable[str | Recipe],
    seeds: Iterable[int] = (0,),
    *,
    protocol: str = "val",
    dataset: str | Data = "auto",
    device: str = "auto",
    folder: str | Path = "runs",
    jobs: int | None = None,
    threads: int = 1,
    storage: str | None = None,
    heartbeat: int = trials.HEARTBEAT,
    test: bool = True,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train every recipe with every seed; finished runs are kept, interrupted ones go on.

    The same call elsewhere, with the same storage and folder, joins in.

    Args:
        recipes: names in `recipes.RECIPES`, or recipes; no two of the same name.
        seeds: whole numbers.
        protocol, dataset, device: as for `train`.
        folder: where the run directories go, called `<recipe>-<protocol>-seed<seed>`.
        jobs: how many workers here, of 1 to 2 GB each; None: cores / threads, on a GPU up to 8.
        threads: of each worker. Another number rounds in another way, whatever `jobs` is.
        storage: the URL of a database, as Optuna takes it; None is SQLite's, in the folder.
        heartbeat: seconds between a worker's signs of life; three times as long without one, and
            its run is queued again.
        test: as for `train`; False leaves the test set alone.
        progress: print a line for each run that ends, and on a terminal draw a bar.

    Returns:
        What each metrics.json holds, recipe by recipe, in the order of the seeds.

    Raises:
        ValueError: bad input, before anything is run. DataError, FileNotFoundError: so for the
        data set or a teacher that can't be had.
        RunError: a run directory holds another run, or the storage can't be used, before anything
            is run; or some runs failed, which are named, and all others are finished; or workers
            were killed.
    """
    pairs = list(product(map(get_recipe, recipes), map(check_seed, seeds)))
    if not pairs:
        raise ValueError("nothing to train: give at least one recipe and one seed")
    sweep = _Sweep(
        protocol, dataset, device, folder, jobs, threads, storage, heartbeat, test, progress
    )
    return sweep.train("", pairs)


def train_study(study: str | Path | Study, **options: Any) -> list[dict[str, Any]]:
    """Train what a study file says, under `val`; what is there is kept, and goes on.

    Args:
        study: the path of a file, or what `load_study` made of it.
        options: those of `train_many` but `protocol`; folder: runs/<name of the file>, test: what
            the study says, unless given.

    Returns:
        What the metrics.json of each whole run holds, those of the base first; then, of a search,
        those of the best trial, or of the best ones that were confirmed, with each seed. Only
        these are evaluated on test, unless the study leaves it alone.

    Raises:
        See `load_study` and `train_many`.
    """
    study = study if isinstance(study, Study) else load_study(study)
    folder = absolute(options.pop("folder", None) or f"runs/{study.name}")
    sweep = _Sweep("val", folder=folder, **{"test": study.test} | options)
    metrics = sweep.train(study.name, study.runs, study.search)
    if study.search is not None:
        sweep.check_trials_are_here(study.name, study.search)
        metrics += sweep.train(study.name, chosen(study.search, folder), study.search)
    return metrics


def chosen(search: Search, folder: Path) -> list[tuple[Recipe, int]]:
    """Recipe and seed of the best trial in a folder, by validation accuracy.

    With `confirm`, of so many of the best, each with the confirming seeds as well.
    """
    best: list[tuple[float, int, Recipe]] = []
    for file in absolute(folder).glob(f"trial_*-val-seed{search.seed}/metrics.json"):
        run = RunDirectory(file.parent)
        recipe = Recipe(**run.config()["recipe"])
        best.append((-run.metrics()["val_acc"], int(recipe.name.removeprefix("trial_")), recipe))
    recipes = [recipe for _, _, recipe in sorted(best, key=lambda b: b[:2])]
    seeds = (search.seed, *search.confirming_seeds)
    return list(product(recipes[: max(1, search.confirm)], seeds))


class _Sweep:
    """What several calls of `train` share: settings, storage, workers. Arguments: `train_many`."""

    def __init__(
        self,
        protocol: str,
        dataset: str | Data = "auto",
        device: str = "auto",
        folder: str | Path = "runs",
        jobs: int | None = None,
        threads: int = 1,
        storage: str | None = None,
        heartbeat: int = trials.HEARTBEAT,
        test: bool = True,
        progress: bool = True,
    ):
        self.jobs = None if jobs is None else check_whole("jobs", jobs, 1, 1024)
        self.threads, self.progress = check_whole("threads", threads, 1, 1024), progress
        self.heartbeat = check_whole("heartbeat", heartbeat, 1, 86_400)
        check_flag("test", test)
        self.test = test
        self.folder = absolute(folder)
        self.storage = storage or trials.default_storage(self.folder)
        self.data = dataset if isinstance(dataset, Data) else load(dataset)
        # Of a name, each worker loads the data.
        source = dataset if isinstance(dataset, Data) else self.data.name
        self.settings: dict[str, Any] = {"protocol": protocol, "dataset": source, "device": device}

    def train(
        self, name: str, pairs: list[tuple[Recipe, int]], search: Search | None = None
    ) -> list[dict[str, Any]]:
        """Train recipes with their seeds, and the trials of a search; the metrics of the former.

        Args:
            name: in the storage; "" makes one of what is to be trained.
        """
        settings = self.settings | {"dataset": self.data}
        experiments = [settle(recipe, seed, **settings) for recipe, seed in pairs]
        runs = [RunDirectory(self.folder / one.name) for one in experiments]
        times = Counter(one.name for one in experiments)
        if twice := [name for name in times if times[name] > 1]:
            raise ValueError(f"two runs would go into {twice[0]}: name recipes and seeds only once")
        waiting = {}
        for run, one in zip(runs, experiments, strict=True):
            if run.kept(one.identity) is None or not run.is_done(self.test):
                check_parts(one)
                waiting[one.name] = one.recipe, one.seed
            elif self.progress:
                print(f"{one.name}  kept: {_outcome(run)}", flush=True)
        if waiting and search is not None:  # not a finished one, which needs no teacher any more
            for recipe in search.ends():
                check_parts(settle(recipe, **settings))
        if waiting or search is not None:
            of_all = ("protocol", "dataset", "limit", "data_sha256")
            plan = Plan(
                url=self.storage,
                name=name or f"runs {json_sha256([one.identity for one in experiments])[:12]}",
                folder=self.folder,
                settings=self.settings,
                identity={key: experiments[0].identity[key] for key in of_all},
                search=search,
                runs=frozenset(one.name for one in experiments),
                threads=self.threads,
                heartbeat=self.heartbeat,
                test=self.test,
            )
            trials.queue(plan, waiting)
            jobs = self.jobs or _most_jobs(experiments[0].device, self.threads)
            trials.train_queued(plan, jobs, self.progress)
            if left := [run.path.name for run in runs if not run.is_done(self.test)]:
                raise RunError(
                    f"{', '.join(left)}: trained by a worker that was told to leave the test set "
                    "alone; the same command adds the figures on test"
                )
        return [run.metrics() for run in runs]

    def check_trials_are_here(self, name: str, search: Search) -> None:
        """Raise RunError unless all trials that the storage has as done are in the folder."""
        with trials.reachable(self.storage):
            there = trials.latest(search.optuna_study(trials.connect(self.storage), name))
        state = optuna.trial.TrialState.COMPLETE
        done = [trial.user_attrs["run"] for trial in there.values() if trial.state == state]
        if not done:
            raise RunError(f"no trial of the search {name!r} was trained to its end: all failed")
        if gone := [run for run in done if not RunDirectory(self.folder / run).is_finished]:
            raise RunError(
                f"{len(gone)} of {len(done)} finished trials aren't in {self.folder}, e.g. "
                f"{gone[0]}: put them back, or give the FOLDER that the search was begun with"
            )


def _most_jobs(device: torch.device, threads: int) -> int:
    """One for every `threads` cores; on a GPU JOBS_ON_A_GPU at most."""
    jobs = max(1, _cores() // threads)
    return jobs if device.type == "cpu" else min(jobs, JOBS_ON_A_GPU)


def _cores() -> int:
    """How many this process may use; a cluster often lends fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _outcome(run: RunDirectory) -> str:
    """How a kept run came out: on validation where it can, which is what to choose by."""
    metrics = run.metrics()
    where = "validation" if metrics["protocol"] == "val" else "test"
    accuracy = metrics["val_acc" if where == "validation" else "test_acc"]
    on = title(metrics["dataset"], metrics["limit"])
    return f"{where} {accuracy:.2f} % on {on}" if accuracy is not None else f"not tested, {on}"
