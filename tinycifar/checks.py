"""Checks of arguments, and errors of data: the one sentence that says what isn't accepted."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable
from typing import Any


def check_number(name: str, value: Any, low: float, high: float = math.inf, other: str = "") -> Any:
    """A real number from `low` to `high`, one of NumPy's as a plain one.

    Args:
        other: what else is accepted, for the message: "None".

    Raises:
        ValueError: it isn't one; NaN, bools and strings aren't either.
    """
    return _checked(name, value, numbers.Real, float, "a number", low, high, other)


def check_whole(name: str, value: Any, low: int, high: float = math.inf, other: str = "") -> Any:
    """The same for whole numbers."""
    return _checked(name, value, numbers.Integral, int, "a whole number", low, high, other)


def _checked(
    name: str, value: Any, kind: Any, plain: Any, noun: str, low: float, high: float, other: str
) -> Any:
    if isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high:
        return value if type(value) in (int, float) else plain(value)  # NumPy's float64 is a float
    limits = f"of {low:,} or more" if high == math.inf else f"from {low:,} to {high:,}"
    other = f" or {other}" if other else ""
    raise ValueError(f"{name} must be {noun} {limits}{other}; got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}")


def check_choice(name: str, value: Any, valid: Iterable[Any]) -> None:
    """Raise a ValueError that lists the valid ones, unless `value` is one of them."""
    valid = tuple(valid)
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; valid: {', '.join(map(str, valid))}")


class DataError(RuntimeError):
    """A data set that is unknown, unavailable or damaged."""


class DataUnavailable(DataError):
    """CIFAR-10 is neither on the disk nor can it be downloaded: `auto` falls back on `shapes`."""


# As Python, NumPy, torch, the system's loader, torch's DataLoader, Jupyter and a pool of processes
# say it; the last three only see that a process is gone.
_NO_MEMORY = re.compile(
    r"MemoryError|allocate|bad_alloc|out of memory|insufficient memory|failed to map segment"
    r"|killed by signal|Kernel died|terminated abruptly",
    re.IGNORECASE,
)


def explained(message: str) -> str:
    """An error's message; where it means that memory ran out, says so, and what to do."""
    if not _NO_MEMORY.search(message):
        return message
    return (
        f"most likely memory ran out ({message}): close other programs, or use a machine with more "
        "memory; the same command goes on from the last finished epoch"
    )
