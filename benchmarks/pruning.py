"""What pruning saves: the searches of two studies without it, and what each pruner makes of them.

    python benchmarks/pruning.py

Writes pruning.json. On the first 5,000 training images of CIFAR-10, 500 of them for validation;
three searches a study, which differ in the sampler's seed. Their sampler is random, so that a
trial's parameters depend on its number alone, and its accuracies on its parameters: a search with
pruning trains the same trials, some of them for fewer epochs. So it is replayed.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import optuna

from tinycifar import trials
from tinycifar.data import load
from tinycifar.paths import CHECKOUT
from tinycifar.studies import load_study

OUT = Path(__file__).with_suffix(".json")
LIMIT, SEEDS, STUDIES = 5_000, (0, 1, 2), ("pruning", "pruning-one-cycle")
PRUNERS = ("hyperband", "median")
NAME = "pruning"  # Hyperband deals trials out by it


def trained(study: str, seed: int) -> list[list[float]]:
    """The validation accuracy after each epoch, of each trial."""
    assert CHECKOUT is not None
    search = load_study(CHECKOUT / "studies" / f"{study}.yaml").search
    assert search is not None and search.sampler == "random"
    search = replace(search, seed=seed, prune="none")
    data = load("cifar10", limit=LIMIT)
    settings = {"protocol": "val", "dataset": data, "device": "auto"}
    identity = {"dataset": data.name, "limit": data.limit}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = trials.default_storage(folder)
        plan = trials.Plan(url, NAME, folder, settings, identity, search=search)
        trials.queue(plan, {})
        trials.work(plan)
        return [list(trial.intermediate_values.values()) for trial in plan.studies()[1].trials]


def replayed(curves: list[list[float]], prune: str) -> dict[str, Any]:
    """The epochs that all trials take together, the best accuracy, how many are pruned."""
    pruner = trials.PRUNERS[prune](max(map(len, curves)))
    search = optuna.create_study(study_name=NAME, direction="maximize", pruner=pruner)
    for curve in curves:
        trial = search.ask()
        trial.set_user_attr("seed", 0)
        state = optuna.trial.TrialState.COMPLETE
        for epoch, accuracy in enumerate(curve, start=1):
            trial.report(accuracy, epoch)
            if epoch < len(curve) and trial.should_prune():
                state = optuna.trial.TrialState.PRUNED
                break
        search.tell(trial, None if state.name == "PRUNED" else curve[-1], state)
    return {
        "prune": prune,
        "trials": len(curves),
        "epochs": sum(len(trial.intermediate_values) for trial in search.trials),
        "best": search.best_value,
        "pruned": sum(trial.state.name == "PRUNED" for trial in search.trials),
    }


def main() -> None:
    kept = json.loads(OUT.read_text(encoding="utf-8")).get("curves", {}) if OUT.is_file() else {}
    curves: dict[str, list[list[float]]] = {}
    rows = []
    for study, seed in product(STUDIES, SEEDS):
        key = f"{study}, {seed}"
        curves[key] = kept.get(key) or trained(study, seed)  # delete the file to train again
        for prune in ("none", *PRUNERS):
            rows.append({"study": study, "seed": seed, **replayed(curves[key], prune)})
            print(rows[-1], flush=True)
        result = {"date": str(date.today()), "limit": LIMIT, "rows": rows, "curves": curves}
        OUT.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
