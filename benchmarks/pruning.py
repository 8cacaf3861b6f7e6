"""What pruning saves: the searches of two studies with it and without, by three samplers.

    python benchmarks/pruning.py [HOW MANY SEARCHES AT ONCE]

Writes pruning.json. On the first 5,000 training images of CIFAR-10, 500 of them for validation;
each search by one worker, so that it repeats.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

from tinycifar import trials
from tinycifar.data import load
from tinycifar.paths import CHECKOUT
from tinycifar.studies import load_study

OUT = Path(__file__).with_suffix(".json")
LIMIT, SEEDS, STUDIES = 5_000, (0, 1, 2), ("pruning", "pruning-one-cycle")


def searched(study: str, seed: int, pruned: bool) -> dict[str, Any]:
    """The epochs that all trials took together, the best accuracy, how many were pruned."""
    assert CHECKOUT is not None
    search = load_study(CHECKOUT / "studies" / f"{study}.yaml").search
    assert search is not None
    search = replace(search, seed=seed, prune=search.prune if pruned else "none")
    data = load("cifar10", limit=LIMIT)
    settings = {"protocol": "val", "dataset": data, "device": "auto"}
    identity = {"dataset": data.name, "limit": data.limit}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = trials.default_storage(folder)
        plan = trials.Plan(url, "pruning", folder, settings, identity, search=search)
        trials.queue(plan, {})
        trials.work(plan)
        done = plan.studies()[1]
        return {
            "study": study,
            "seed": seed,
            "prune": search.prune,
            "trials": len(done.trials),
            "epochs": sum(len(trial.intermediate_values) for trial in done.trials),
            "best": done.best_value,
            "pruned": sum(trial.state.name == "PRUNED" for trial in done.trials),
        }


def main(at_once: int) -> None:
    kinds = list(product(STUDIES, SEEDS, (False, True)))
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(searched, *zip(*kinds, strict=True)))
    result = {"date": str(date.today()), "limit": LIMIT, "rows": rows}
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
