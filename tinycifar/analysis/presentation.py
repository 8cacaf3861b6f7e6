"""How a table looks, in a page and in a notebook: what its columns are called, and their digits.

    print(markdown(runs_table(runs)))           # for a page
    styled(runs_table(runs))                    # in a notebook, as the last line of a cell

The names of a frame's columns decide how they are shown:

- `x`, `x_std`, `x_min`, `x_max` are shown as one, mean ± standard deviation over the row's `n`;
  of two values both are shown, as they may agree by chance; one is shown alone;
- `x_min`, `x_max` without an `x` are a range;
- `gain`, `gain_error` are one, bold where `clear`;
- `attrs["note"]` comes below the table; `attrs["vertical"]` turns its rows into columns.
"""

from __future__ import annotations

import hashlib
import html
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from tinycifar.analysis.runs import protocol_title

__all__ = ["markdown", "show_source", "styled"]

NOTHING = "–"  # where there is no value
SUFFIXES = ("_std", "_min", "_max")
# Columns that say how another is shown.
_WITHIN_OTHERS = ("clear", "differs", "gain_error", "gain_interval", "seeds", "epochs_planned")

# Headings that aren't just a column's name, with _WORDS for its words.
_HEADINGS = {
    "a_as_b": "a taken for b",
    "b_as_a": "b taken for a",
    "b": "b",  # beside a; not of R, G and B
    "best_acc": "accuracy at best epoch, %",
    "changes": "what changes",
    "field": "",
    "gain": "gain over base",
    "gain_of_highest": "highest − highest before",
    "jump_at_drop": "first after the drop − last before",
    "kept_share": "above the threshold",
    "last_acc": "at last epoch, %",
    "n": "seeds",
    "n_images": "how many",
    "named_most": "most frequent prediction",
    "named_most_share": "its share",
    "part": "images",
    "receptive_field": "receptive field, px",
    "sees_all": "positions that see the whole image",
    "share": "share of all mistakes",
    "side": "side, px",
    "test_acc_tta": "test accuracy with flip, %",
}
_WORDS = {"acc": "accuracy, %", "accuracy": "accuracy, %", "lr": "learning rate", "minus": "−"}
_WORDS |= {"confidence": "probability, %", "precision": "precision, %"}
_WORDS |= {"train": "training", "val": "validation", "r": "R", "g": "G", "b": "B"}
# How a value is written, by what its column's name ends with; the others: see `_plain`.
_FORMATS = {
    r"acc|accuracy|precision|tta|epoch_\d+": "{:.2f}",
    r"confidence": "{:.1f}",
    r"loss": "{:.4f}",
    r"gain.*|minus_last|jump_at_drop": "{:+z.2f}",
    r"share": "{:.1f} %",
    r"times_fewer.*": "{:.1f}",
    r"(mean|std)_[rgb]": "{:z.3f}",
    r"minutes": "{:,.0f}",
    r"lr": "{:.2g}",
    r"n": "n = {}",
}


def markdown(frame: pd.DataFrame) -> str:
    """A table as Markdown, with its note."""
    cells = presented(frame).map(lambda cell: cell.replace("|", "\\|"))
    for row, column in _bold(frame, cells):
        cells.iat[row, column] = "**" + str(cells.iat[row, column]) + "**"
    parts = [str(frame.attrs.get("note", ""))]
    if len(cells):
        align = ["left" if left else "right" for left in _left(frame, cells)]
        parts.insert(0, cells.to_markdown(index=False, disable_numparse=True, colalign=align))
    return "\n\n".join(filter(None, parts)) + "\n"


class _Table(Styler):
    """A Styler that says the same wherever it is printed, as nbval compares what notebooks show."""

    text = ""

    def __repr__(self) -> str:
        return self.text


def styled(frame: pd.DataFrame) -> Styler:
    """A table for a notebook, with its note."""
    cells, text = presented(frame), markdown(frame)
    table = _Table(cells, uuid=hashlib.sha256(text.encode()).hexdigest()[:8], cell_ids=False)
    table.text = text
    looks = [("caption", "caption-side: bottom; text-align: left; min-width: 30em")]
    texts = (i for i, is_text in enumerate(_left(frame, cells)) if is_text)
    looks += [(f".col{i}", "text-align: left") for i in texts]
    looks += [(f"td.row{i}.col{j}", "font-weight: bold") for i, j in _bold(frame, cells)]
    styles: list[Any] = [{"selector": place, "props": look} for place, look in looks]
    table.format(escape="html").format_index(escape="html", axis=1).hide(axis="index")
    return table.set_table_styles(styles).set_caption(html.escape(frame.attrs.get("note", "")))


def show_source(thing: Callable[..., Any] | type) -> None:
    """Display the code of a class or a function in a notebook."""
    from IPython.display import Markdown, display

    display(Markdown(f"```python\n{textwrap.dedent(inspect.getsource(thing))}```"))


def presented(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame as it is read: text throughout, headings instead of names."""
    rows: list[Any] = frame.to_dict("records")
    table = pd.DataFrame({n: [_cell(row, n) for row in rows] for n in _shown(frame)}, dtype="str")
    table = table.rename(columns={"field": ""} if "field" in frame else _heading)
    if not frame.attrs.get("vertical"):
        return table
    names = table.pop(table.columns[0])
    return table.T.set_axis(names, axis=1).rename_axis("").reset_index()


def mean_std(row: Mapping[str, Any] | pd.Series, name: str, form: str = "{:.2f}") -> str:
    """Mean ± sample standard deviation; for n = 2 the mean and both values, for n = 1 the mean."""
    mean, std, low, high = (row[f"{name}{suffix}"] for suffix in ("", *SUFFIXES))
    if row["n"] > 2:
        return f"{form.format(mean)} ± {form.replace('+', '').format(std)}"
    both = f" ({form.format(low)}, {form.format(high)})" if row["n"] == 2 else ""
    return form.format(mean) + both


def _shown(frame: pd.DataFrame) -> list[str]:
    """The names of what becomes a column: not those that are shown within another."""
    names = [name[:-4] if name.endswith(SUFFIXES) else name for name in map(str, frame)]
    return [name for name in dict.fromkeys(names) if name not in _WITHIN_OTHERS]


def _heading(name: str) -> str:
    words = (_WORDS.get(word, word) for word in name.split("_"))
    return _HEADINGS.get(name, " ".join(words)).replace("multiply adds", "multiply-adds")


def _format(name: str) -> str:
    fits = (form for end, form in _FORMATS.items() if re.fullmatch(f"(.*_)?({end})", name))
    return next(fits, "")


def _cell(row: dict[str, Any], name: str) -> str:
    form = "" if "field" in row else _format(name)
    if row.get("n") == 0 and name in ("n", "epochs"):  # an unfinished run
        unfinished = f"unfinished: {row['epochs_min']} of {row['epochs_planned']}"
        return f"seed {row['seeds']}" if name == "n" else unfinished
    if name not in row:
        ends = (_plain(row[f"{name}{suffix}"], form) for suffix in ("_min", "_max"))
        return "–".join(dict.fromkeys(ends))
    if f"{name}_std" in row and pd.notna(row[name]):
        return mean_std(row, name, form)
    if name == "gain" and pd.notna(row[name]):
        return f"{form.format(row['gain'])} ± {row['gain_error']:.2f}"
    return protocol_title(row[name]) if name == "protocol" else _plain(row[name], form)


def _plain(value: Any, form: str) -> str:
    if pd.isna(value):
        return NOTHING
    if form:
        return form.format(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _left(frame: pd.DataFrame, cells: pd.DataFrame) -> list[bool]:
    """Which columns are text, and so aligned to the left."""
    if frame.attrs.get("vertical"):
        return [True] * cells.shape[1]
    return [name in frame and frame[name].dtype.kind in "OUT" for name in _shown(frame)]


def _bold(frame: pd.DataFrame, cells: pd.DataFrame) -> Iterator[tuple[int, int]]:
    """(row, column) of what stands out: gains that are clear, fields that differ."""
    for flag, name in (("clear", "gain"), ("differs", "field")):
        if flag in frame:
            column = list(cells).index(_heading(name))
            yield from ((int(row), column) for row in frame[flag].to_numpy().nonzero()[0])
