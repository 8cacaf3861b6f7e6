"""Many runs: every recipe with every seed, or a study, several at once.

    table = train_many(["quick", get_recipe("quick", lr=0.01)], seeds=[0, 1, 2])

A study is a file: a base recipe, variations of it, seeds. `make sweep STUDY=studies/x.yaml`.

    about: What each part of the schedule is worth.
    base: baseline               # a recipe, see recipes.RECIPES
    always: {epochs: 12}         # changes of the base that all variations share
    seeds: [0, 1, 2]             # [0], unless said
    variations:                  # name: changes
      one cycle: {schedule: one_cycle, lr: 0.2, stop_patience: null}
      no dilation: {dilated: false}

To add a variation is to add a line. Each becomes an ordinary recipe, called by its name, and each
of its seeds an ordinary run directory, in runs/<name of the file>/. The protocol is `val`: what is
to be chosen is chosen on validation.

A net this small leaves most of a GPU idle; on a CPU one-thread runs side by side gain a little.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

import augment
from tinycifar.checks import check_whole
from tinycifar.data import Data, load, title
from tinycifar.paths import absolute
from tinycifar.recipes import Recipe, check_protocol, get_recipe
from tinycifar.run_directory import RunDirectory, RunError
from tinycifar.training import check_seed, require_teacher, settle, train

KEYS = {"about", "base", "always", "seeds", "variations"}
Waiting = dict[tuple[Recipe, int], RunDirectory]  # runs to train, by recipe and seed
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
    """

    name: str
    about: str
    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]


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
    unknown, missing = content.keys() - KEYS, {"about", "base", "variations"} - content.keys()
    if unknown or missing:
        what = f"unknown key {min(unknown, key=str)!r}" if unknown else f"no {min(missing)!r}"
        raise ValueError(f"{what}; a study has {', '.join(sorted(KEYS))}")
    base = _changed(get_recipe(content["base"]), "always", content.get("always", {}), name="base")
    variations = _mapping("variations", content["variations"]).items()
    recipes = [base, *(_varied(base, variation, changes) for variation, changes in variations)]
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
        raise ValueError(f"seeds must be a list of different whole numbers; got {seeds!r}")
    about = _text("about", content["about"])
    return Study(name, about, tuple(recipes), tuple(map(check_seed, seeds)))


def _varied(base: Recipe, name: object, changes: object) -> Recipe:
    name = _text("a variation's name", name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 .-]*", name) or name == "base":
        raise ValueError(
            "a variation's name has letters, digits, spaces, dots and hyphens, and isn't 'base'; "
            f"got {name!r}"
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
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train every recipe with every seed; finished runs are kept, interrupted ones go on.

    Called from a script, it has to stand under `if __name__ == "__main__":`, as for any program
    that starts processes.

    Args:
        recipes: names in `recipes.RECIPES`, or recipes; no two of the same name.
        seeds: whole numbers.
        protocol, dataset, device: as for `train`.
        folder: where the run directories go, called `<recipe>-<protocol>-seed<seed>`.
        jobs: how many at once, of 1 to 2 GB each; None is one a core, on a GPU up to 8. The cores
            are shared out among them, and each thread count rounds in its own way: for the same
            bits give the same number of jobs, however many runs are finished already.
        progress: print a line for each run that ends, and on a terminal draw a bar of the epochs.

    Returns:
        What each metrics.json holds, recipe by recipe, in the order of the seeds.

    Raises:
        ValueError: bad input, before anything is run. DataError, FileNotFoundError: so for the
        data set or a teacher that can't be had.
        RunError: a run directory holds another run, before anything is run; or some runs failed,
            which are named, and all others are finished; or a process was killed.
    """
    pairs = list(product(map(get_recipe, recipes), map(check_seed, seeds)))
    if not pairs:
        raise ValueError("nothing to train: give at least one recipe and one seed")
    for recipe, _ in pairs:
        check_protocol(recipe, protocol)
    data = dataset if isinstance(dataset, Data) else load(dataset)
    runs: dict[str, RunDirectory] = {}
    waiting: Waiting = {}
    for recipe, seed in pairs:
        one = settle(recipe, seed=seed, protocol=protocol, dataset=data, device=device)
        if one.name in runs:
            raise ValueError(f"two runs would go into {one.name}: name recipes and seeds only once")
        run = runs[one.name] = RunDirectory(absolute(folder) / one.name)
        if run.kept(one.identity) is None:
            require_teacher(one)
            waiting[recipe, seed] = run
        elif progress:
            print(f"{one.name}  kept: {_outcome(run)}", flush=True)
    jobs, threads = _share_out(len(runs), one.device, jobs)
    # Of a name, each process loads the data; this one has no more use for it.
    source = dataset if isinstance(dataset, Data) else data.name
    del data, one
    settings = {"protocol": protocol, "dataset": source, "device": device, "progress": False}
    failed = _train_in_processes(waiting, jobs, threads, settings, progress) if waiting else {}
    if failed:
        reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise RunError(f"{len(failed)} of {len(runs)} runs failed, the others are done. {reasons}")
    return [run.metrics() for run in runs.values()]


def _train_in_processes(
    waiting: Waiting, jobs: int, threads: int, settings: dict[str, Any], progress: bool
) -> dict[str, BaseException]:
    """Train all that are waiting; returns what stopped those that failed, by their names."""
    others = set(multiprocessing.active_children())  # the caller's own
    failed: dict[str, BaseException] = {}
    context = multiprocessing.get_context("spawn")  # torch's threads don't survive a fork
    # A process of its own has the policies as augment.py writes them.
    begin = threads, dict(augment.POLICIES)
    with ProcessPoolExecutor(jobs, context, _begin_worker, begin) as pool:
        futures = {
            pool.submit(train, recipe, run.path, seed=seed, **settings): run
            for (recipe, seed), run in waiting.items()
        }
        try:
            epochs = sum(recipe.epochs for recipe, _ in waiting)
            for future in _ended(futures, epochs, progress):
                run, error = futures[future], future.exception()
                if isinstance(error, BrokenProcessPool):  # which ends all others as well
                    raise RunError(
                        "a training process was killed, most likely as memory ran out: give "
                        "fewer JOBS (jobs=); the same command resumes what is unfinished"
                    ) from error
                if error is not None:
                    failed[run.path.name] = error
                if progress:
                    how = _outcome(run) if error is None else f"failed: {error}"
                    print(f"{run.path.name}  {how}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # safe at any moment, as run directories are
            raise
    return failed


def _share_out(runs: int, device: torch.device, jobs: int | None) -> tuple[int, int]:
    """(processes, threads of each)."""
    on_cpu = device.type == "cpu"
    # With a GPU, OMP_NUM_THREADS=1, as clusters set it, shouldn't mean one run at a time.
    cores = torch.get_num_threads() if on_cpu else _cores()
    most = cores if on_cpu else min(cores, JOBS_ON_A_GPU)
    jobs = min(runs, most if jobs is None else check_whole("jobs", jobs, 1, 1024))
    return jobs, max(1, cores // jobs)


def _cores() -> int:
    """How many this process may use; a cluster often lends fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin_worker(threads: int, policies: dict[str, augment.Policy]) -> None:
    """A process of our pool, with our policies; gone when the sweep is, `kill -9` included.

    Otherwise its runs would go on unseen, and be locked against the same command given again.
    """
    augment.POLICIES.update(policies)
    import torch._inductor.config  # seconds

    torch.set_num_threads(threads)
    torch._inductor.config.compile_threads = threads  # by default a compiler for every core
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_the_sweep() -> None:
        parent.join()
        os._exit(1)  # safe at any moment, as run directories are

    threading.Thread(target=end_with_the_sweep, daemon=True).start()


def _ended(futures: dict[Future, RunDirectory], epochs: int, progress: bool) -> Iterator[Future]:
    """Yields each future that is done, and draws meanwhile how many epochs of all runs are."""
    waiting = set(futures)
    # None: hidden unless on a terminal.
    with tqdm(total=epochs, unit="epoch", disable=None if progress else True) as bar:
        while waiting:
            ended, waiting = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
            bar.clear()
            yield from ended
            with suppress(ValueError):  # damaged; a run that goes on writes it again
                bar.n = sum(len(run.history()) for run in futures.values())
            bar.refresh()


def _outcome(run: RunDirectory) -> str:
    """Not the test accuracy where there is another to choose by."""
    metrics = run.metrics()
    where = "validation" if metrics["protocol"] == "val" else "test"
    accuracy = metrics["val_acc" if where == "validation" else "test_acc"]
    return f"{where} {accuracy:.2f} % on {title(metrics['dataset'], metrics['limit'])}"
