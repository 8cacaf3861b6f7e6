"""Where files are, and what relative paths mean.

A relative path counts from the working folder; inside a checkout of this repository, from its
root, wherever in it a notebook or a test runs.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

#: The root of the checkout that this package runs from; None for an installed copy.
CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "pyproject.toml").is_file() else None

#: The published runs: all in a checkout, those of the presets in an installed copy.
RESULTS = (CHECKOUT or _PACKAGE) / "results"

#: The preset whose weights are meant where no run is named: the most accurate.
DEFAULT = "taught"


def home() -> Path:
    """The folder from where relative paths count."""
    here = Path.cwd()
    return CHECKOUT if CHECKOUT and here.is_relative_to(CHECKOUT) else here


def absolute(path: str | os.PathLike[str]) -> Path:
    """`path` from where relative paths count, `~` expanded; an absolute one as it is."""
    return home() / Path(path).expanduser()


def shown(path: Path) -> Path:
    """`path` as messages and notebooks name it: relative where it can be."""
    return path.relative_to(home()) if path.is_relative_to(home()) else path
