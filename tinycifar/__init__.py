"""tinycifar: training, evaluating and using tiny networks for CIFAR-10.

    from tinycifar import get_recipe, load_pretrained, load_run, predict, train, train_many

Each name is imported from its module when it is first asked for.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinycifar.analysis import find_runs as find_runs
    from tinycifar.analysis import load_run as load_run
    from tinycifar.data import load as load
    from tinycifar.inference import classify as classify
    from tinycifar.inference import load_onnx as load_onnx
    from tinycifar.recipes import RECIPES as RECIPES
    from tinycifar.recipes import Recipe as Recipe
    from tinycifar.recipes import get_recipe as get_recipe
    from tinycifar.run_directory import RunError as RunError
    from tinycifar.studies import train_many as train_many
    from tinycifar.studies import train_study as train_study
    from tinycifar.training import train as train
    from tinycifar.weights import load_pretrained as load_pretrained
    from tinycifar.weights import predict as predict

# How long a waiting OpenMP thread spins before it sleeps, as in the Makefile. It has to be said
# before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
# Deterministic algorithms of CUDA ask for it, before anything is multiplied on the GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Name: the module that it is from, imported when the name is first asked for. So what needs
# little, such as the command line's help or load_onnx, doesn't wait for torch and matplotlib.
_HOMES = {
    "RECIPES": "recipes",
    "Recipe": "recipes",
    "RunError": "run_directory",
    "classify": "inference",
    "find_runs": "analysis",
    "get_recipe": "recipes",
    "load": "data",
    "load_onnx": "inference",
    "load_pretrained": "weights",
    "load_run": "analysis",
    "predict": "weights",
    "train": "training",
    "train_many": "studies",
    "train_study": "studies",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tinycifar' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tinycifar.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
