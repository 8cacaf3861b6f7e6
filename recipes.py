"""Recipes: how to train, in full, as data that can be written to a file and compared.

    recipe = get_recipe("quick", epochs=20)

`training.train` carries one out; `RECIPES` holds the presets.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import augment
import networks

__all__ = ["DEFAULTS", "RECIPES", "Recipe", "check_choice", "check_number", "get_recipe"]


@dataclass(frozen=True)
class Recipe:
    """How to train: everything that decides the outcome but for seed, data and protocol.

    Raises:
        ValueError: a field out of its range; the message names the field and the range.
    """

    name: str
    epochs: int = 50
    batch_size: int = 128
    precision: str = "float32"  # of what passes between layers in training; or bfloat16

    optimizer: str = "sgd"  # sgd (Nesterov), adamw; muon, muon_adamw: Muon where channels mix
    lr: float = 0.045  # the highest the schedule reaches
    muon_lr: float = 0.02  # the same for what muon trains
    momentum: float = 0.9  # sgd and muon
    weight_decay: float = 5e-4  # as sgd or adamw takes it; muon's weights shrink as fast as theirs
    decay_all: bool = True  # False: no decay on BatchNorm and biases
    decay_depthwise: float = 1.0  # share of weight_decay on depthwise filters
    dirac: bool = False  # depthwise filters, where there are any, start as chance plus the identity
    whiten: bool = False  # first convolution starts as the pictures' principal patches

    schedule: str = "plateau"  # plateau, one_cycle, cosine or constant
    warmup: float = 0.2  # one_cycle, cosine: share of all steps spent rising to lr
    plateau_factor: float = 0.1
    plateau_patience: int = 2  # epochs without a better selection loss before lr drops
    stop_patience: int | None = 6  # epochs without one before training stops; None: never
    min_delta: float = 1e-4  # what counts as better: for stopping, and for the epoch kept

    label_smoothing: float = 0.0
    ema: float | None = None  # decay of the weights' moving average, per step; None: no average

    teacher: str | None = None  # a run to learn from, for load_pretrained; None: labels alone
    teaching: float = 0.5  # the teacher's share of the loss, beside the labels'
    temperature: float = 4.0  # softens what both say before the two are compared

    policy: str = "reference"  # a name in augment.POLICIES
    build: str = "batched"  # who makes the batches: batched, albumentations or torchvision
    calm: float = 0.0  # the share of the epochs, at the end, that use the policy `light` instead
    alternate_flip: bool = False  # mirror each picture in every second epoch, not at random

    start_side: int = 32  # pixels: pictures are shrunk to this side in the first epoch and grow
    grow: float = 0.5  # to their own over this share of the epochs: cheap steps first

    network: str = "tiny"  # NetCIFAR10_Tiny; or the layout of a networks.BlueprintNet, which
    skips: str = "same"  # takes these two options
    activation: str = "relu"
    dilated: bool = True  # the options of NetCIFAR10_Tiny
    separable: bool = True
    width: float = 1.0

    def __post_init__(self):
        for name, (kind, low, high) in _RANGES.items():
            self._settle(name, kind, low, high)
        for name, (kind, low, high) in _OPTIONAL_RANGES.items():
            if getattr(self, name) is not None:
                self._settle(name, kind, low, high, " or None")
        for name in ("decay_all", "dirac", "whiten", "alternate_flip", "dilated", "separable"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        check_choice("optimizer", self.optimizer, ("sgd", "adamw", "muon", "muon_adamw"))
        check_choice("schedule", self.schedule, ("plateau", "one_cycle", "cosine", "constant"))
        check_choice("precision", self.precision, ("float32", "bfloat16"))
        check_choice("build", self.build, augment.BUILDS)
        if not isinstance(self.policy, str):
            raise ValueError(
                f"policy must be the name of one in augment.POLICIES, where you can add your own; "
                f"got {self.policy!r}"
            )
        augment.get_policy(self.policy)
        if self.network != "tiny":
            networks.BlueprintNet(**self.model_options)
        if not isinstance(self.teacher, str | None):
            raise ValueError(f"teacher must be a run's name, a path or None; got {self.teacher!r}")
        if self.alternate_flip and (self.build != "batched" or not self._flips):
            raise ValueError(
                "alternate_flip takes build 'batched' and a policy that flips; got build "
                f"{self.build!r} and policy {self.policy!r}"
            )
        if not isinstance(self.name, str) or "/" in self.name or "\\" in self.name:
            raise ValueError(f"a recipe's name becomes a folder's: no slashes; got {self.name!r}")

    def _settle(self, name: str, *limits) -> None:
        object.__setattr__(self, name, check_number(name, getattr(self, name), *limits))

    @property
    def _flips(self) -> bool:
        return augment.get_policy(self.policy).flip > 0

    def policy_in(self, epoch: int) -> str:
        """Name of the policy of this epoch, counted from 1: the end may be calmer.

        The last epochs without strong augmentation: Ge et al. (2021, arXiv:2107.08430), and, for
        mixing, Touvron et al. (2022, arXiv:2204.07118).
        """
        return "light" if epoch > self.epochs - round(self.calm * self.epochs) else self.policy

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of all policies in use, sorted."""
        return tuple(sorted({self.policy_in(1), self.policy_in(self.epochs)}))

    def side(self, epoch: int) -> int:
        """Side of the pictures in this epoch, counted from 1: from start_side in steps of 8 to 32.

        Progressive resizing, as in fast.ai's DAWNBench entry (2018) and EfficientNetV2 (Tan and
        Le, 2021, arXiv:2104.00298): a quarter of the pixels is a quarter of the work. Few
        different sides, as each is compiled by itself.
        """
        growing = round(self.grow * self.epochs, 9)  # 0.28 * 50 is a little more than 14
        share = min(1.0, (epoch - 1) / growing) if growing else 1.0
        missing = 32 - self.start_side
        return 32 if share == 1 else self.start_side + 8 * int(missing * share / 8)

    @property
    def model_options(self) -> dict:
        if self.network != "tiny":
            return {"layout": self.network, "skips": self.skips, "activation": self.activation}
        return {"dilated": self.dilated, "separable": self.separable, "width": self.width}


_RANGES = {
    "epochs": (int, 1, 10_000),
    "batch_size": (int, 1, 50_000),
    "lr": (float, 1e-8, 100),
    "muon_lr": (float, 1e-8, 100),
    "momentum": (float, 0, 0.9999),
    "weight_decay": (float, 0, 1),
    "decay_depthwise": (float, 0, 1),
    "warmup": (float, 0, 0.9),
    "plateau_factor": (float, 1e-4, 0.99),
    "plateau_patience": (int, 0, 10_000),
    "min_delta": (float, 0, 1),
    "label_smoothing": (float, 0, 0.9),
    "teaching": (float, 0, 1),
    "temperature": (float, 0.1, 100),
    "calm": (float, 0, 1),
    "start_side": (int, 8, 32),
    "grow": (float, 0, 1),
    "width": (float, 0.05, 16),
}
_OPTIONAL_RANGES = {"stop_patience": (int, 1, 10_000), "ema": (float, 0, 0.99999)}


def check_number(
    name: str, value: object, kind: type, low: float, high: float, alternative: str = ""
) -> int | float:
    """A number from `low` to `high`, one of NumPy's as a plain one.

    Args:
        kind: int takes whole numbers alone, float any real one.
        alternative: what else the message is to offer.

    Raises:
        ValueError: it isn't; NaN, bools and strings aren't either.
    """
    number = isinstance(value, numbers.Integral if kind is int else numbers.Real)
    if not number or isinstance(value, bool) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {what} from {low} to {high}{alternative}; got {value!r}")
    return value if isinstance(value, (int, float)) else kind(value)


def check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    """Raise a ValueError that lists the valid ones, unless `value` is one of them."""
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; valid: {', '.join(valid)}")


# The published reference's, number for number.
_BASELINE = Recipe("baseline")
# The reference's 50 epochs put to better use: Muon, AdamW for the rest, depthwise filters that
# start by passing their input on, one cycle, batches that the caches hold, only light augmentation.
# What was measured on the way: results/STUDY.md.
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
# As far as twelve epochs go.
_SPRINT = replace(_TUNED, name="sprint", epochs=12, start_side=32, alternate_flip=True)
# The most in some minutes on two CPU cores: smaller images first.
_QUICK = replace(_TUNED, name="quick", epochs=8, warmup=0.25, start_side=16, grow=0.75)

RECIPES = {recipe.name: recipe for recipe in (_BASELINE, _QUICK, _TUNED, _SPRINT)}


# What a recipe says where it isn't told, and what one meant before a field was there.
DEFAULTS = asdict(Recipe(""))


def get_recipe(recipe: str | Recipe, **changes) -> Recipe:
    """A preset by name (or a Recipe as it is), with `changes` applied.

    None keeps what the recipe says, except where it says something itself: stop_patience, ema and
    teacher can be switched off.

    A changed preset is called after its changes, e.g. `quick-epochs=2`, so that no table passes
    it off as the preset.

    Raises:
        ValueError: unknown preset or field (the valid ones are listed), or a value out of range.
    """
    if not isinstance(recipe, Recipe):
        check_choice("recipe", recipe, tuple(RECIPES))
        recipe = RECIPES[recipe]
    valid = [f.name for f in fields(Recipe)]
    for name in changes:
        check_choice("recipe field", name, valid)
    optional = {*_OPTIONAL_RANGES, "teacher"}
    changes = {k: v for k, v in changes.items() if v is not None or k in optional}
    changed = {k: v for k, v in changes.items() if v != getattr(recipe, k)}
    if changed and "name" not in changes:
        settings = ",".join(f"{k}={v}" for k, v in sorted(changed.items()))
        changed["name"] = re.sub(r"[/\\]", "_", f"{recipe.name}-{settings}")  # names a folder
    return replace(recipe, **changed)
