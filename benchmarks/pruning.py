"""What pruning saves: the searches of a study without it, and what each pruner makes of them.

    python benchmarks/pruning.py

Writes pruning.json. On the first 5,000 training images of CIFAR-10, 500 of them for validation;
three searches, which differ in the sampler's seed. Their sampler is random, so that a
trial's parameters depend on its number alone, and its accuracies on its parameters: a search with
pruning trains the same trials, some of them for fewer epochs. So it is replayed.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import optuna

from tinycifar import trials
from tinycifar.data import load
from tinycifar.paths import CHECKOUT
from tinycifar.studies import load_study

OUT = Path(__file__).with_suffix(".json")
LIMIT, SEEDS = 5_000, (0, 1, 2)
PRUNERS = ("none", "hyperband", "median")
NAME = "pruning"  # of the study; Hyperband deals trials out by it


def trained(seed: int) -> list[dict[str, Any]]:
    """Each trial's validation accuracy after each epoch (curve) and at the kept one (value)."""
    assert CHECKOUT is not None
    search = load_study(CHECKOUT / "studies" / f"{NAME}.yaml").search
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
        return [
            {"curve": list(trial.intermediate_values.values()), "value": trial.value}
            for trial in plan.studies()[1].trials
        ]


def replayed(full: list[dict[str, Any]], prune: str) -> dict[str, Any]:
    """The epochs that all trials take together, the best accuracy, how many are pruned."""
    pruner = trials.PRUNERS[prune](len(full[0]["curve"]))
    search = optuna.create_study(study_name=NAME, direction="maximize", pruner=pruner)
    for one in full:
        trial = search.ask()
        for epoch, accuracy in enumerate(one["curve"], start=1):
            trial.report(accuracy, epoch)
            if epoch < len(one["curve"]) and trial.should_prune():
                search.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            search.tell(trial, one["value"])
    return {
        "prune": prune,
        "trials": len(full),
        "epochs": sum(len(trial.intermediate_values) for trial in search.trials),
        "best": search.best_value,
        "pruned": sum(trial.state.name == "PRUNED" for trial in search.trials),
    }


def main() -> None:
    kept = json.loads(OUT.read_text(encoding="utf-8"))["searches"] if OUT.is_file() else {}
    searches: dict[str, list[dict[str, Any]]] = dict(kept)
    rows = []
    for seed in map(str, SEEDS):
        searches[seed] = kept.get(seed) or trained(int(seed))  # without the file, all are
        for prune in PRUNERS:
            rows.append({"seed": seed, **replayed(searches[seed], prune)})
            print(rows[-1], flush=True)
        result = {"date": str(date.today()), "limit": LIMIT, "rows": rows, "searches": searches}
        OUT.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
