"""A study is a file: a base recipe, variations of it, seeds. `make sweep STUDY=studies/x.yaml`.

    about: What each part of the schedule is worth.
    base: baseline               # a recipe, see training.RECIPES
    always: {epochs: 12}         # changes of the base that all variations share
    protocol: val                # val, unless said
    seeds: [0, 1, 2]             # [0], unless said
    variations:                  # name: changes
      one cycle: {schedule: one_cycle, lr: 0.2}
      no dilation: {dilated: false}

To add a variation is to add a line. Each becomes an ordinary recipe, called by its name, and each
of its seeds an ordinary run directory, in runs/<name of the file>/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from training import Recipe, check_settings, get_recipe

__all__ = ["Study", "load_study"]

ROOT = Path(__file__).resolve().parent
KEYS = {"about", "base", "always", "protocol", "seeds", "variations"}


@dataclass(frozen=True)
class Study:
    """What `load_study` read; see the module's docstring.

    Attributes:
        name: the file's, without its ending.
        about: what it is to find out.
        recipes: the base, called `base`, and then its variations.
        seeds: each of them is trained with each.
        protocol: a name in training.PROTOCOLS.
    """

    name: str
    about: str
    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    protocol: str

    @property
    def folder(self) -> str:
        """Where its run directories go, from the repository's root."""
        return f"runs/{self.name}"


def load_study(file: str | Path) -> Study:
    """Read and check a study, a relative path from the repository's root.

    Raises:
        FileNotFoundError: no such file; lists those beside it.
        ValueError: it isn't YAML, or says what no recipe can be; the message names the place.
    """
    file = ROOT / file
    if not file.is_file():
        beside = ", ".join(sorted(p.name for p in file.parent.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"no study at {file}; there: {beside}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file.name} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return _study(file.stem, content)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error


def _study(name: str, content: object) -> Study:
    content = _mapping("a study", content)
    unknown, missing = content.keys() - KEYS, {"about", "base", "variations"} - content.keys()
    if unknown or missing:
        what = f"unknown key {min(unknown)!r}" if unknown else f"no {min(missing)!r}"
        raise ValueError(f"{what}; a study has {', '.join(sorted(KEYS))}")
    always = _mapping("always", content.get("always", {}))
    base = replace(get_recipe(content["base"], **always), name="base")
    recipes = [base]
    for variation, changes in _mapping("variations", content["variations"]).items():
        recipes.append(_varied(base, variation, _mapping(variation, changes)))
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
        raise ValueError(f"seeds must be a list of different whole numbers; got {seeds!r}")
    protocol = content.get("protocol", "val")
    for recipe in recipes:
        for seed in seeds:
            check_settings(recipe, protocol, seed)
    return Study(name, str(content["about"]), tuple(recipes), tuple(seeds), protocol)


def _varied(base: Recipe, name: object, changes: dict) -> Recipe:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 .-]*", str(name)) or name == "base":
        raise ValueError(
            "a variation's name has letters, digits, spaces, dots and hyphens, and isn't 'base'; "
            f"got {name!r}"
        )
    try:
        recipe = get_recipe(base, **changes)
    except ValueError as error:
        raise ValueError(f"variation {name!r}: {error}") from error
    if recipe == base:
        raise ValueError(f"variation {name!r} changes nothing of the base")
    return replace(recipe, name=str(name).replace(" ", "_"))


def _mapping(what: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a mapping of names to values; got {value!r}")
    return value
