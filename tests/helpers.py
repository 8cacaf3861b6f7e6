"""What several test files share: a run that takes half a second, and when two runs are the same."""

import json
import shutil

import pandas as pd
import pytest
import torch
import yaml

from tinycifar import trials
from tinycifar.recipes import Recipe
from tinycifar.run_directory import RunDirectory
from tinycifar.studies import train_study

# Where torch.compile can work, it must: a failure is no reason to skip.
needs_compiler = pytest.mark.skipif(
    " " in torch.__file__ or not any(map(shutil.which, ("g++", "clang++"))),
    reason="no C++ compiler, or an environment whose path has a space in it",
)

# What is strided, dilated and normalised in the reference, in three layers: a tenth of the time.
NETWORK = "4 8s2 8d2"
SMALL = Recipe(
    "small",
    epochs=3,
    batch_size=32,
    lr=0.05,
    schedule="one_cycle",
    policy="light",
    network=NETWORK,
)


def search_study(folder, **changes):
    """A study file of a search whose trials take half a second."""
    study = {
        "about": "Which rates?",
        "base": "sprint",
        "always": {"epochs": 3, "batch_size": 60, "network": NETWORK},
        "search": {"lr": {"low": 0.002, "high": 0.02, "log": True}, "ema": [None, 0.9]},
        "trials": 5,
        **changes,
    }
    (folder / "rates.yaml").write_text(yaml.safe_dump(study))
    return folder / "rates.yaml"


def searched(file, folder, data):
    """Train a study file in this process, as one worker would."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "train_queued", lambda plan, *_: trials.work(plan))
        try:
            return train_study(file, folder=folder, dataset=data, progress=False)
        finally:
            torch.set_num_threads(threads)


def history(folder):
    """history.csv without the times."""
    return RunDirectory(folder).history().drop(columns="seconds")


def outcome(folder):
    """All that must repeat: the curves, the metrics but for times and code, the weights."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("name", "seconds_train", "images_per_second", "git_commit", "peak_memory_mib"):
        del metrics[name]
    del metrics["weights_sha256"]  # of the file; the weights themselves are compared
    del metrics["config_sha256"]  # of settings that change no bit, too
    return history(folder), metrics, torch.load(folder / "best.pt", weights_only=True)


def assert_same_outcome(one, other):
    (rows, metrics, weights), (rows2, metrics2, weights2) = outcome(one), outcome(other)
    pd.testing.assert_frame_equal(rows, rows2, check_exact=True)
    assert metrics == metrics2
    assert weights.keys() == weights2.keys()
    assert all(torch.equal(weights[k], weights2[k]) for k in weights)
