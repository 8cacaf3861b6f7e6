"""Many runs: every recipe with every seed, several at once, each an ordinary run directory.

    from sweep import train_many
    table = train_many(["quick", get_recipe("quick", lr=0.01)], seeds=[0, 1, 2])

    python -m sweep quick baseline --seeds 0 1 2
    python -m sweep --study studies/ingredients.yaml

A net this small leaves most of a GPU idle; on a CPU one-thread runs side by side gain a little.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import torch
import torch._inductor.config
from tqdm.auto import tqdm

import augment
from cifar10 import Data, load, title
from recipes import DEFAULTS, RECIPES, Recipe, check_number, get_recipe
from run_directory import RunError, is_finished, refuse_another_run
from study import Study, load_study
from training import (
    ROOT,
    check_settings,
    identity,
    pick_device,
    run_folder,
    teachers_run,
    train,
)

__all__ = ["train_many"]

JOBS_ON_A_GPU = 8  # a guess, not yet measured: each takes some 1 GB of it, and a core to feed it


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
) -> list[dict]:
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
    data = dataset if isinstance(dataset, Data) else load(dataset)
    tasks = _tasks([get_recipe(r) for r in recipes], list(seeds), protocol, ROOT / folder)
    for recipe, seed, run_dir in tasks:
        refuse_another_run(run_dir, identity(recipe, seed, protocol, data), DEFAULTS)
    waiting = [task for task in tasks if not is_finished(task[2])]
    for recipe, *_ in waiting:
        teachers_run(recipe, protocol, data)
    device = pick_device(device)
    jobs, threads = _share_out(len(tasks), device, jobs)
    for *_, run_dir in tasks:
        if progress and is_finished(run_dir):
            print(f"{run_dir.name}  kept: {_outcome(run_dir)}", flush=True)
    if not isinstance(dataset, Data):
        dataset, data = data.name, None  # each process loads it; this one has no more use for it
    failed = {}
    if waiting:
        context = multiprocessing.get_context("spawn")  # torch's threads don't survive a fork
        others = set(multiprocessing.active_children())  # the caller's own
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # see the Makefile
        # A process of its own has the policies as augment.py writes them.
        begin = threads, dict(augment.POLICIES)
        with ProcessPoolExecutor(jobs, context, _begin_worker, begin) as pool:
            work = partial(_train, protocol=protocol, dataset=dataset, device=str(device))
            futures = {pool.submit(work, *task): task[2] for task in waiting}
            try:
                for future in _as_they_end(futures, waiting, progress):
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):  # which ends all others as well
                        raise RunError(
                            "a training process was killed, most likely as memory ran out: give "
                            "fewer JOBS (jobs=), and what is trained so far is gone on from"
                        ) from error
                    _report(futures[future], error, failed, progress)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()  # safe at any moment, as run directories are
                raise
    if failed:
        reasons = "; ".join(f"{folder.name}: {error}" for folder, error in failed.items())
        raise RunError(f"{len(failed)} of {len(tasks)} runs failed, the others are done. {reasons}")
    return [json.loads((run_dir / "metrics.json").read_text()) for *_, run_dir in tasks]


def _tasks(recipes: list[Recipe], seeds: list[int], protocol: str, folder: Path) -> list[tuple]:
    if not recipes or not seeds:
        raise ValueError("nothing to train: give at least one recipe and one seed")
    tasks = []
    for recipe in recipes:
        for seed in seeds:
            check_settings(recipe, protocol, seed)
            seed = int(seed)  # NumPy's become plain ones
            tasks.append((recipe, seed, folder / run_folder(recipe, protocol, seed).name))
    names = [run_dir.name for *_, run_dir in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two runs would go into {twice[0]}: name recipes and seeds only once")
    return tasks


def _share_out(runs: int, device: torch.device, jobs: int | None) -> tuple[int, int]:
    """(processes, threads of each)."""
    if jobs is not None:
        jobs = check_number("jobs", jobs, int, 1, 1024)
    # With a GPU, OMP_NUM_THREADS=1, as clusters set it, shouldn't mean one run at a time.
    cores = torch.get_num_threads() if device.type == "cpu" else _cores()
    jobs = jobs or (cores if device.type == "cpu" else min(cores, JOBS_ON_A_GPU))
    jobs = max(1, min(jobs, runs))
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
    torch.set_num_threads(threads)
    torch._inductor.config.compile_threads = threads  # by default a compiler for every core
    sweep_ends = multiprocessing.parent_process().sentinel

    def end_with_the_sweep() -> None:
        multiprocessing.connection.wait([sweep_ends])
        os._exit(1)  # safe at any moment, as run directories are

    threading.Thread(target=end_with_the_sweep, daemon=True).start()


def _as_they_end(futures: dict, tasks: list[tuple], progress: bool):
    """Yields each future that is done, and draws meanwhile how many epochs of all runs are."""
    total, waiting = sum(recipe.epochs for recipe, *_ in tasks), set(futures)
    hidden = None if progress else True  # None: unless on a terminal
    with tqdm(total=total, unit="epoch", disable=hidden) as bar:
        while waiting:
            ended, waiting = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
            bar.clear()
            yield from ended
            bar.n = sum(_epochs(run_dir) for *_, run_dir in tasks)
            bar.refresh()


def _epochs(run_dir: Path) -> int:
    """How many are finished so far."""
    history = run_dir / "history.csv"
    return len(history.read_text().splitlines()) - 1 if history.is_file() else 0


def _train(recipe: Recipe, seed: int, run_dir: Path, **settings) -> None:
    train(recipe, run_dir, seed=seed, progress=False, **settings)


def _outcome(run_dir: Path) -> str:
    """Not the test accuracy where there is another to choose by."""
    metrics = json.loads((run_dir / "metrics.json").read_text())
    where = "validation" if metrics["protocol"] == "val" else "test"
    accuracy = metrics["val_acc" if where == "validation" else "test_acc"]
    return f"{where} {accuracy:.2f} % on {title(metrics['dataset'], metrics['limit'])}"


def _report(run_dir: Path, error: BaseException | None, failed: dict, progress: bool) -> None:
    if error is not None:
        failed[run_dir] = error
        line = f"failed: {error}"
    else:
        line = _outcome(run_dir)
    if progress:
        print(f"{run_dir.name}  {line}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--study", help="a file that names recipes and seeds, see study.py")
    parser.add_argument("--seeds", nargs="+", type=int, help="0")
    parser.add_argument("--protocol", help="val, full or test-selected (val)")
    parser.add_argument("--dataset", default="auto", help="auto, cifar10 or shapes (auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    parser.add_argument("--folder", help="of the run directories (runs, or runs/<study>)")
    parser.add_argument("--jobs", type=int, help="runs at once (one a core; on a GPU 8)")
    args = vars(parser.parse_args(argv))
    try:
        study = _apply_study(args)
        try:
            train_many(**{k: v for k, v in args.items() if v is not None})
        finally:  # if some runs failed, of the others
            if study:
                _print_table(study, ROOT / args["folder"])
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from the last finished epochs")


def _print_table(study: Study, folder: Path) -> None:
    from analysis import find_runs, study_table  # matplotlib, which the runs do without

    names = {recipe.name for recipe in study.recipes}
    try:
        runs = find_runs(folder) if folder.is_dir() else []
        runs = [run for run in runs if run.metrics and run.config["recipe"]["name"] in names]
        if any(run.config["recipe"]["name"] == "base" for run in runs):
            print(f"\n{study.about}\n\n{study_table(runs)}")
    except ValueError as error:  # a damaged run; what the sweep itself ended with matters more
        print(f"no table: {error}")


def _apply_study(args: dict) -> Study | None:
    """Takes the study's file out of `args`, and puts in what it names."""
    file = args.pop("study")
    if file is None:
        return None
    if args["recipes"] or args["seeds"] or args["protocol"]:
        raise ValueError("a study names its own recipes and seeds, under val: leave these out")
    study = load_study(file)
    args |= {"recipes": study.recipes, "seeds": study.seeds, "protocol": "val"}
    args["folder"] = args["folder"] or study.folder
    return study


if __name__ == "__main__":
    main()
