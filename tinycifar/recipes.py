"""Recipes: how to train, in full, as data that can be written to a file and compared.

    recipe = get_recipe("quick", epochs=20)

`training.train` carries one out; `RECIPES` holds the presets. What they were measured to bring:
docs/recipes.md.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

import augment
from tinycifar.checks import check_choice, check_flag, check_number, check_whole
from tinycifar.data import PROTOCOLS
from tinycifar.networks import make_network


@dataclass(frozen=True)
class Recipe:
    """How to train: everything that decides the outcome but for seed, data and protocol.

    Raises:
        ValueError: a field out of its range; the message names the field and the range.
    """

    name: str
    epochs: int = 50
    batch_size: int = 128
    precision: str = "float32"  # or bfloat16, in training: see acceleration.MixedPrecision

    optimizer: str = "sgd"  # sgd (Nesterov), adamw; muon, muon_adamw: Muon where channels mix
    lr: float = 0.045  # the highest the schedule reaches
    muon_lr: float = 0.02  # the same for what muon trains
    momentum: float = 0.9  # sgd and muon
    weight_decay: float = 5e-4  # as sgd or adamw takes it; muon's weights shrink as fast as theirs
    decay_all: bool = True  # False: no decay on BatchNorm and biases
    dirac: bool = False  # depthwise filters start as a random one plus the identity

    schedule: str = "plateau"  # plateau, one_cycle, cosine or constant
    warmup: float = 0.2  # one_cycle, cosine: share of all steps spent rising to lr
    plateau_factor: float = 0.1
    plateau_patience: int = 2  # epochs without a better selection loss before the one that drops lr
    stop_patience: int | None = 6  # epochs without a better loss until training stops; None: never
    min_delta: float = 1e-4  # by how much a loss must be lower to be better: for stop and selection

    label_smoothing: float = 0.0
    ema: float | None = None  # decay of the weights' moving average, per step; None: no average

    teacher: str | None = None  # a run to learn from, for load_pretrained; None: labels alone
    teaching: float = 0.5  # the teacher's share of the loss, beside the labels'
    temperature: float = 4.0  # softens what both say before the two are compared
    teacher_whole: bool = False  # it sees whole images, also where the student's are shrunk
    int8: bool = False  # go on from the teacher's weights, with simulated int8 arithmetic; where
    # convolutions are used twice, each use goes on with weights of its own

    policy: str = "reference"  # a name in augment.POLICIES
    build: str = "batched"  # who makes the batches: batched, albumentations or torchvision
    alternate_flip: bool = False  # mirror each image in every second epoch, not at random

    start_side: int = 32  # pixels: the side to which images are shrunk in the first epoch
    grow: float = 0.5  # share of the epochs in which they grow back to 32: cheap steps first

    network: str = "tiny"  # NetCIFAR10_Tiny; your own, as "module:Class", see own_network in
    # networks.py; or the layout of a BlueprintNet there, which takes these three options:
    skips: str = "same"
    activation: str = "relu"
    attention: str = "none"
    dilated: bool = True  # the options of NetCIFAR10_Tiny
    separable: bool = True
    width: float = 1.0

    def __post_init__(self) -> None:
        for check, ranges in ((check_number, _NUMBERS), (check_whole, _WHOLE_NUMBERS)):
            for name, (low, high, *none) in ranges.items():
                value = getattr(self, name)
                if value is not None or not none:
                    value = check(name, value, low, high, *none)
                    object.__setattr__(self, name, value)  # one of NumPy's as a plain one
        for field in fields(self):
            if field.type == "bool":
                check_flag(field.name, getattr(self, field.name))
        for name, valid in _CHOICES.items():
            check_choice(name, getattr(self, name), valid)
        for name, (kind, what) in _TEXTS.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name} must be {what}; got {value!r}")
        flips = augment.get_policy(self.policy).flip > 0
        if self.alternate_flip and (self.build != "batched" or not flips):
            raise ValueError(
                "alternate_flip takes build 'batched' and a policy that flips; got build "
                f"{self.build!r} and policy {self.policy!r}"
            )
        if self.int8 and ":" in self.network:
            raise ValueError(f"int8 takes a network of this package; got {self.network!r}")
        if self.network != "tiny" and ":" not in self.network:
            with torch.device("meta"):  # where no random numbers are drawn
                make_network(10, self.model_options)  # raises if it can't be built
        if self.int8 and (self.teacher is None or self.precision != "float32"):
            raise ValueError(
                "int8 takes a teacher, whose weights it starts from, and precision 'float32'; got "
                f"teacher {self.teacher!r} and precision {self.precision!r}"
            )
        if not isinstance(self.name, str) or "/" in self.name or "\\" in self.name:
            raise ValueError(f"a recipe's name becomes a folder's: no slashes; got {self.name!r}")

    def side(self, epoch: int) -> int:
        """Side of the images in this epoch, counted from 1: from start_side in steps of 8 to 32.

        Progressive resizing, as in fast.ai's DAWNBench entry (2018) and EfficientNetV2 (Tan and
        Le, 2021, arXiv:2104.00298): a quarter of the pixels is a quarter of the work. Few
        different sides, as each is compiled by itself.
        """
        growing = round(self.grow * self.epochs, 9)  # 0.28 * 50 is a little more than 14
        share = min(1.0, (epoch - 1) / growing) if growing else 1.0
        missing = 32 - self.start_side
        return 32 if share == 1 else self.start_side + 8 * int(missing * share / 8)

    def epochs_by_side(self) -> Counter[int]:
        """How many epochs see images of each side."""
        return Counter(self.side(epoch) for epoch in range(1, self.epochs + 1))

    @property
    def model_options(self) -> dict[str, Any]:
        """What `networks.make_network` makes the network from."""
        int8 = {"int8": True} if self.int8 else {}
        if ":" in self.network:
            return {"class": self.network}
        if self.network != "tiny":
            names = ("skips", "activation", "attention")
            options = {"layout": self.network} | {name: getattr(self, name) for name in names}
            return options | int8
        return {"dilated": self.dilated, "separable": self.separable, "width": self.width} | int8


_WHOLE_NUMBERS: dict[str, tuple] = {
    "epochs": (1, 10_000),
    "batch_size": (1, 50_000),
    "plateau_patience": (0, 10_000),
    "stop_patience": (1, 10_000, "None"),
    "start_side": (8, 32),
}
_NUMBERS: dict[str, tuple] = {
    "lr": (1e-8, 100),
    "muon_lr": (1e-8, 100),
    "momentum": (0, 0.9999),
    "weight_decay": (0, 1),
    "warmup": (0, 0.9),
    "plateau_factor": (1e-4, 0.99),
    "min_delta": (0, 1),
    "label_smoothing": (0, 0.9),
    "ema": (0, 0.99999, "None"),
    "teaching": (0, 1),
    "temperature": (0.1, 100),
    "grow": (0, 1),
    "width": (0.05, 16),
}
_CHOICES = {
    "optimizer": ("sgd", "adamw", "muon", "muon_adamw"),
    "schedule": ("plateau", "one_cycle", "cosine", "constant"),
    "precision": ("float32", "bfloat16"),
    "build": augment.BUILDS,
}
_TEXTS: dict[str, tuple] = {
    "policy": (str, "the name of one in augment.POLICIES, where you can add your own"),
    "network": (str, "'tiny', a layout or 'module:Class', as text"),
    "teacher": (str | None, "a run's name or path, as text, or None"),
}
_CAN_BE_NONE = [field.name for field in fields(Recipe) if "None" in str(field.type)]


# The published reference's, number for number.
_BASELINE = Recipe("baseline")
# The reference's 50 epochs put to better use: Muon, AdamW for the rest, depthwise filters that
# start by passing their input on, one cycle, batches that the caches hold, only light augmentation.
# What was measured on the way: docs/recipes.md.
_TUNED = Recipe(
    "tuned",
    epochs=50,
    batch_size=32,
    optimizer="muon_adamw",
    lr=0.006,
    muon_lr=0.04,
    weight_decay=0.05,
    decay_all=False,
    dirac=True,
    schedule="one_cycle",
    warmup=0.2,
    stop_patience=None,
    policy="light",
    start_side=24,
    grow=0.5,
)
# Batches of 128 with rates and decay to suit, the weights of about the last 200 steps averaged, and
# nine tenths of the loss from a network of twice the size: docs/findings.md, study `fifty`.
_TAUGHT = replace(
    _TUNED,
    name="taught",
    batch_size=128,
    precision="bfloat16",
    lr=0.012,
    muon_lr=0.08,
    weight_decay=0.1,
    ema=0.995,
    teacher="results/studies/family/78922_parameters-val-seed2",
    teaching=0.9,
    alternate_flip=True,
)
# As far as twelve epochs go.
_SPRINT = replace(_TUNED, name="sprint", epochs=12, start_side=32, alternate_flip=True)
# The most in some minutes on two CPU cores: smaller images first.
_QUICK = replace(_TUNED, name="quick", epochs=8, warmup=0.25, start_side=16, grow=0.75)

# Two epochs in which the weights of `taught` get used to being rounded.
_INT8 = replace(
    _TUNED,
    name="int8",
    epochs=2,
    optimizer="adamw",
    lr=0.0005,
    weight_decay=0.0,
    dirac=False,
    schedule="cosine",
    warmup=0.1,
    teacher="taught-seed2",
    start_side=32,
    int8=True,
)

RECIPES = {recipe.name: recipe for recipe in (_BASELINE, _QUICK, _TUNED, _TAUGHT, _SPRINT, _INT8)}


_DEFAULTS = asdict(Recipe(""))
# Fields that were taken out, and the value that had no effect; runs trained with another keep it.
_RETIRED = {"whiten": False, "decay_depthwise": 1.0, "calm": 0.0}


def in_full(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as an older config.json has it, with today's fields, so that recipes compare."""
    kept = {k: v for k, v in recipe.items() if k not in _RETIRED or v != _RETIRED[k]}
    return _DEFAULTS | kept


def check_protocol(recipe: Recipe, protocol: str) -> None:
    """Raise a ValueError if the recipe can't be trained under the protocol."""
    check_choice("protocol", protocol, PROTOCOLS)
    if recipe.schedule == "plateau" and protocol == "full":
        raise ValueError(
            f"recipe {recipe.name!r} has a plateau schedule, which needs a loss to watch, and "
            "protocol 'full' has none: set schedule to one_cycle, cosine or constant"
        )


def get_recipe(recipe: str | Recipe, /, **changes: Any) -> Recipe:
    """A preset by name (or a Recipe as it is), with `changes` applied.

    None means unchanged, but for stop_patience, ema and teacher, which it switches off.

    A changed preset is called after its changes, e.g. `quick-epochs=2`, so that no table passes
    it off as the preset.

    Raises:
        ValueError: unknown preset or field (the valid ones are listed), or a value out of range.
    """
    if not isinstance(recipe, Recipe):
        check_choice("recipe", recipe, RECIPES)
        recipe = RECIPES[recipe]
    for name in changes:
        check_choice("recipe field", name, [field.name for field in fields(Recipe)])
    changes = {k: v for k, v in changes.items() if v is not None or k in _CAN_BE_NONE}
    changed = {k: v for k, v in changes.items() if v != getattr(recipe, k)}
    if changed and "name" not in changes:
        settings = ",".join(f"{k}={v}" for k, v in sorted(changed.items()))
        changed["name"] = re.sub(r'[<>:"/\\|?*]', "_", f"{recipe.name}-{settings}")  # a folder's
    return replace(recipe, **changed)
