"""A study is a file: a base recipe, variations of it, seeds. `make sweep STUDY=studies/x.yaml`.

    about: What each part of the schedule is worth.
    base: baseline               # a recipe, see recipes.RECIPES
    always: {epochs: 12}         # changes of the base that all variations share
    seeds: [0, 1, 2]             # [0], unless said
    variations:                  # name: changes
      one cycle: {schedule: one_cycle, lr: 0.2, stop_patience: null}
      no dilation: {dilated: false}

To add a variation is to add a line. Each becomes an ordinary recipe, called by its name, and each
of its seeds an ordinary run directory, in runs/<name of the file>/. The protocol is `val`: what is
to be chosen is chosen on validation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from recipes import Recipe, get_recipe
from training import check_settings

__all__ = ["Study", "load_study"]

ROOT = Path(__file__).resolve().parent
KEYS = {"about", "base", "always", "seeds", "variations"}


@dataclass(frozen=True)
class Study:
    """What `load_study` read; see the module's docstring.

    Attributes:
        name: the file's, without its ending.
        about: what it is to find out.
        recipes: the base, called `base`, and then its variations.
        seeds: each of them is trained with each.
    """

    name: str
    about: str
    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]

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
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
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
        what = f"unknown key {min(unknown, key=str)!r}" if unknown else f"no {min(missing)!r}"
        raise ValueError(f"{what}; a study has {', '.join(sorted(KEYS))}")
    always = _mapping("always", content.get("always", {}))
    base = _changed(get_recipe(content["base"]), "always", always, name="base")
    recipes = [base]
    for variation, changes in _mapping("variations", content["variations"]).items():
        recipes.append(_varied(base, variation, _mapping(variation, changes)))
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
        raise ValueError(f"seeds must be a list of different whole numbers; got {seeds!r}")
    for recipe in recipes:
        for seed in seeds:
            check_settings(recipe, "val", seed)
    return Study(name, str(content["about"]), tuple(recipes), tuple(seeds))


def _varied(base: Recipe, name: object, changes: dict) -> Recipe:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 .-]*", str(name)) or name == "base":
        raise ValueError(
            "a variation's name has letters, digits, spaces, dots and hyphens, and isn't 'base'; "
            f"got {name!r}"
        )
    recipe = _changed(base, f"variation {name!r}", changes, name=str(name).replace(" ", "_"))
    if replace(recipe, name="base") == base:
        raise ValueError(f"variation {name!r} changes nothing of the base")
    return recipe


def _changed(recipe: Recipe, where: str, changes: dict, name: str) -> Recipe:
    unknown = changes.keys() - {f.name for f in fields(Recipe) if f.name != "name"}
    if unknown:
        raise ValueError(f"{where}: a recipe has no field {min(unknown, key=str)!r} to change")
    try:
        return replace(recipe, **changes, name=name)  # not get_recipe: null mustn't pass for "keep"
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a name that comes twice, of which YAML silently keeps the last; reads 1e-3."""

    def construct_mapping(self, node, deep=False):
        merge = "tag:yaml.org,2002:merge"  # <<, which may bring names that are then given anew
        keys = [key for key, _ in node.value if key.tag != merge]
        names = [self.construct_object(key, deep=True) for key in keys]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name!r} comes twice")
        return super().construct_mapping(node, deep)


# YAML 1.1, as PyYAML has it, takes a number with an exponent but no point for text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping(what: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a mapping of names to values; got {value!r}")
    return value
