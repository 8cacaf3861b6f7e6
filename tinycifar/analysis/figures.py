"""Figures, matplotlib's: each says in its title on which data it rests."""

from __future__ import annotations

import functools
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ParamSpec

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator
from scipy.stats import binomtest
from torch import nn

import augment
from tinycifar.analysis import measures
from tinycifar.analysis.presentation import mean_std
from tinycifar.analysis.runs import (
    Predictions,
    Run,
    as_list,
    counted,
    protocol_title,
    published_networks,
)
from tinycifar.analysis.tables import field_table, layer_table, runs_table, study_table
from tinycifar.checks import check_choice, check_whole
from tinycifar.costs import receptive_field
from tinycifar.data import Data, channel_stats, title
from tinycifar.images import SIDE
from tinycifar.recipes import Recipe
from tinycifar.weights import load_pretrained

__all__ = [
    "SEARCH_FIGURES", "plot_accuracy_vs_cost", "plot_augmentations", "plot_class_counts",
    "plot_confusion", "plot_costs", "plot_effective_receptive_field", "plot_history",
    "plot_mistakes", "plot_per_class", "plot_receptive_field", "plot_reliability", "plot_samples",
    "plot_search", "plot_start", "plot_study",
]  # fmt: skip

Arguments = ParamSpec("Arguments")
Colour = Any  # what matplotlib takes for one
Kind = tuple[str, str]  # what runs share that are drawn alike: Run.kind and their data


# Okabe and Ito's colours, which the colour-blind can tell apart (jfly.uni-koeln.de/color, 2008).
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY, DIM = "#CC79A7", "#56B4E9", "#000000", "#8C8C8C", "#505050"
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK)
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.labelsize": 9,
    "figure.titlesize": 12,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


def _styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Draw a figure in this module's style, and leave matplotlib's own settings alone."""

    @functools.wraps(draw)
    def styled(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with plt.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # ticks take their style when they are first drawn
            interactive = matplotlib.is_interactive()
        # A notebook's first figure loads its backend, which turns interactive drawing on. The
        # context has just undone that, and without this line no later figure would be shown.
        matplotlib.interactive(interactive)
        return figure

    return styled


# -------------------------------------------------------------------------------------- of the data


@_styled
def plot_class_counts(data: Data) -> Figure:
    """How many images of each class there are for training and for testing."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    rows = np.arange(len(data.classes))
    parts = (("train", data.train_labels, BLUE, -0.2), ("test", data.test_labels, ORANGE, 0.2))
    for part, labels, colour, shift in parts:
        counts, label = np.bincount(labels, minlength=len(rows)), f"{part}: {len(labels):,}"
        bars = axes.barh(rows + shift, counts, 0.4, color=colour, label=label)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.set_yticks(rows, data.classes)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes.set(xlabel="images", title=f"Images per class · {data.title}")
    return figure


@_styled
def plot_samples(data: Data, per_class: int = 8) -> Figure:
    """The first `per_class` training images of each class, a row a class."""
    check_whole("per_class", per_class, 1)
    present = np.unique(data.train_labels)
    rows = [data.train_images[data.train_labels == c] for c in present]
    per_class = min(per_class, *map(len, rows))
    size = (max(4.5, 0.62 * per_class + 1.2), 0.62 * len(rows) + 0.6)
    figure, axes = plt.subplots(figsize=size)
    names = [data.classes[c] for c in present]
    _draw_mosaic(axes, np.stack([row[:per_class] for row in rows]), names)
    return _titled(figure, f"Training images · {data.title}")


@_styled
def plot_augmentations(
    data: Data,
    policies: Sequence[str] | None = None,
    builds: Sequence[str] | None = None,
    n: int = 6,
    seed: int = 0,
) -> Figure:
    """The first `n` training images under each policy, once for each build.

    Args:
        policies: names in `augment.POLICIES`; None is all.
        builds: names in `augment.BUILDS`; None is all.
        n: how many images.
        seed: another one draws other augmentations. The builds draw differently from the same
            seed: they agree in distribution, image by image only where nothing is random.

    Raises:
        ValueError: an unknown policy or build. ImportError: a build's library isn't there.
    """
    check_whole("n", n, 1)
    policies = list(augment.POLICIES) if policies is None else list(policies)
    builds = list(augment.BUILDS) if builds is None else list(builds)
    images, stats = data.train_images[:n], channel_stats(data.train_images)
    size = (max(4.5, 0.72 * n + 1.4), len(policies) * (0.72 * len(builds) + 0.4) + 0.5)
    figure, all_axes = plt.subplots(len(policies), figsize=size, squeeze=False)
    for axes, policy in zip(all_axes[:, 0], policies, strict=True):
        rows = [measures.augmented(images, policy, build, stats, seed) for build in builds]
        _draw_mosaic(axes, np.stack(rows), builds)
        what = f"{policy}: {_described(augment.get_policy(policy))}"
        axes.set_title(_wrapped(what, 0.75 * size[0]), loc="left", fontsize=10)
    return _titled(figure, f"Augmentation · {data.title}")


# ------------------------------------------------------------------ of the network and its training


@_styled
def plot_receptive_field(model: nn.Module) -> Figure:
    """The receptive field after each layer that widens it, with and without dilation."""
    table = field_table(model).query("kernel > 1").reset_index(drop=True)  # 1x1 layers add nothing
    sides, last = table["receptive_field"], table["receptive_field"].iloc[-1]
    figure, axes = plt.subplots(figsize=(max(9, 0.75 * len(table)), 3.8))
    for dilated, rows in sides.groupby(table["dilation"] > 1):
        label, colour = ("dilated", ORANGE) if dilated else ("not dilated", BLUE)
        axes.bar_label(axes.bar(rows.index, rows, 0.7, color=colour, label=label), padding=2)
    if (table["dilation"] > 1).any():
        jumps = table["jump"] // table["stride"]  # between the positions that each layer reads
        undilated = 1 + ((table["kernel"] - 1) * jumps).cumsum()
        label = f"the same without dilation: up to {undilated.max()} px"
        axes.hlines(undilated, table.index - 0.35, table.index + 0.35, BLACK, lw=2, label=label)
    axes.axhline(SIDE, color=BLACK, linestyle="--", linewidth=1)
    axes.text(3, SIDE + 0.7, f"side of an image: {SIDE} px")
    axes.set_xticks(table.index, table.apply(_field_label, axis=1), fontsize=8, va="top")
    axes.grid(axis="x", visible=False)
    axes.set(ylim=(0, max(SIDE, last) * 1.12), ylabel="receptive field, px")
    axes.legend(loc="upper left")
    name = type(model).__name__
    axes.set_title(f"{name}: one position of the last layer sees {last} x {last} px")
    return figure


@_styled
def plot_costs(model: nn.Module) -> Figure:
    """Parameters, multiply-adds and activations by stage, coloured by the kind of layer.

    For one 32 x 32 image. Activations are the values that the layers put out: what a training
    step has to write, read and keep, and what bounds it where there are few multiply-adds.
    """
    layers = layer_table(model)
    there = list(layers["kind"].unique())
    known = ["standard", "depthwise", "pointwise", "BatchNorm", "attention"]
    kinds = [kind for kind in known if kind in there] + [k for k in there if k not in known]
    figure, all_axes = plt.subplots(1, 3, figsize=(11, 3.9))
    for axes, what in zip(all_axes, ("parameters", "multiply_adds", "activations"), strict=True):
        sums = layers.pivot_table(what, "stage", "kind", "sum", sort=False)
        sums = sums.reindex(columns=kinds).fillna(0)
        sums.index = sums.index.str.replace(", ", "\n")
        total = layers[what].sum()
        most = max(1, sums.sum(axis=1).max())  # a fused network's activations aren't known
        sums.columns = [f"{kind} {100 * n / max(1, total):.0f} %" for kind, n in sums.sum().items()]
        sums.plot.bar(stacked=True, ax=axes, width=0.7, rot=0, xlabel="", color=[*COLOURS])
        axes.set_title(f"{total:,} {what.replace('_', '-')}")
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper left")
        axes.set_ylim(0, 1.45 * most)
    return figure


@_styled
def plot_history(runs: Run | Iterable[Run]) -> Figure:
    """Loss, accuracy and learning rate by epoch; runs alike but for their seed share a colour.

    Dashed is training, on the images as they were augmented (and shrunk); solid is what selects
    the epoch (validation or, said plainly, test); a star marks the selected epoch of a finished
    run. Where a dotted line stands, the training images grow; those that select never shrink. A
    training loss that can't be compared, as with a teacher, is left out.

    Raises:
        ValueError: no run at all.
    """
    runs = as_list(runs)
    if not runs:
        raise ValueError("there is no run to plot: pass one or more, as load_run gives them")
    figure, (loss, accuracy, lr) = plt.subplots(1, 3, figsize=(11, 3.9))
    colours = _colour_by_kind(runs)
    for run in runs:
        # A single epoch is a point; fifty are a line.
        look = {"color": colours[_kind(run)], "marker": "o" if run.epochs <= 15 else ""}
        _draw_curves(loss, run, "loss", look)
        _draw_curves(accuracy, run, "acc", look)
        steps = "steps-mid" if run.recipe["schedule"] == "plateau" else "default"
        rates = run.history["lr"] / run.recipe["lr"]
        lr.plot(run.history["epoch"], rates, drawstyle=steps, **look)
    for kind, run in {_kind(run): run for run in reversed(runs)}.items():
        for axes in (loss, accuracy):
            _draw_growth(axes, _sides(run), colours[kind], named=len(colours) == 1)
    if any(run.recipe["schedule"] == "plateau" for run in runs):
        lr.set_yscale("log")  # its drops are factors
        lr.set_ylim(bottom=max(lr.get_ylim()[0], 3e-5))  # one cycle ends at nothing
    labels = ("loss", "accuracy, %", "learning rate, share of its peak")
    for axes, label in zip((loss, accuracy, lr), labels, strict=True):
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    _history_legend(figure, runs, colours)
    return _titled(figure, _history_title(runs))


@_styled
def plot_start(runs: Iterable[Run], epochs: int = 8) -> Figure:
    """Training accuracy over the first epochs: how fast runs start; alike ones share a colour."""
    check_whole("epochs", epochs, 1)
    runs = as_list(runs)
    figure, axes = plt.subplots(figsize=(8, 4.2))
    colours = _colour_by_kind(runs)
    for run in runs:
        x, y = (run.history[name].head(epochs) for name in ("epoch", "train_acc"))
        axes.plot(x, y, "o-", color=colours[_kind(run)], label=run.label)
    axes.set(xlabel="epoch", ylabel="training accuracy, as augmented, %")
    axes.legend(loc="lower right")
    axes.set_title(" and ".join(dict.fromkeys(run.data_title for run in runs)))
    return figure


# --------------------------------------------------------------------- of what a network gets wrong


@_styled
def plot_confusion(predictions: Predictions) -> Figure:
    """The confusion matrix: counts in the cells, mistakes coloured by their share of the class."""
    classes = predictions.classes
    counts = measures.confusion_matrix(predictions.labels, predictions.predicted, len(classes))
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(7.5, 6.4))
    mistakes = np.ma.masked_where(np.eye(len(classes), dtype=bool), shares)
    highest = max(1.0, float(mistakes.max()))  # what is right would leave no colour to the rest
    image = axes.imshow(mistakes, cmap="Reds", vmin=0, vmax=highest)
    for i, j in np.argwhere(counts):
        colour = "white" if i != j and shares[i, j] > 0.6 * highest else "black"
        axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(classes)), classes, rotation=40, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.grid(False)
    axes.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, label="mistakes, share of the true class, %", shrink=0.8)
    return _titled(figure, f"Confusion matrix · {predictions.title}")


@_styled
def plot_per_class(predictions: Predictions) -> Figure:
    """Accuracy class by class, best first, with its 95 % interval (Wilson's), beside the whole."""
    counts = measures.confusion_matrix(
        predictions.labels, predictions.predicted, len(predictions.classes)
    )
    overall = 100 * counts.trace() / counts.sum()
    rows = []
    for name, correct, n in zip(predictions.classes, counts.diagonal(), counts.sum(1), strict=True):
        if n:
            test = binomtest(correct, n)
            rows.append((name, test.statistic, *test.proportion_ci(method="wilson")))
    shown = pd.DataFrame(rows, columns=["class", "rate", "low", "high"]).set_index("class") * 100
    shown = shown.sort_values("rate", kind="stable")
    whiskers = [shown["rate"] - shown["low"], shown["high"] - shown["rate"]]
    figure, axes = plt.subplots(figsize=(8, 3.8))
    look: dict[str, Any] = {"xerr": whiskers, "ecolor": BLACK, "capsize": 2, "color": BLUE}
    bars = axes.barh(shown.index, shown["rate"], height=0.7, **look)
    axes.bar_label(bars, fmt="{:.1f}", label_type="center", color="white")
    axes.axvline(overall, color=ORANGE, linestyle="--")
    axes.grid(axis="y", visible=False)
    label = f"accuracy, % (dashed: all classes, {overall:.2f} %; whiskers: 95 % interval)"
    axes.set(xlim=(0, 108), xlabel=label)
    return _titled(figure, f"Accuracy by class · {predictions.title}")


@_styled
def plot_mistakes(predictions: Predictions, n: int = 16) -> Figure:
    """The `n` images that the network gets wrong and is surest of, surest first."""
    check_whole("n", n, 1)
    labels, predicted, classes = predictions.labels, predictions.predicted, predictions.classes
    confidence = np.exp(predictions.log_p.max(axis=1))
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:n]
    columns = min(8, max(4, len(worst)))
    rows = math.ceil(len(worst) / columns) or 1
    figure = plt.figure(figsize=(1.35 * columns, 1.85 * rows + 0.6))
    for place, i in enumerate(worst, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(predictions.images[i])
        axes.axis("off")
        true, taken = classes[labels[i]], classes[predicted[i]]
        axes.set_title(f"{true}\n→ {taken}\n{100 * confidence[i]:.1f} %", fontsize=9)
    what = f"{len(worst)} surest of {counted(len(wrong), 'mistake')}: true → predicted, probability"
    if not len(wrong):
        what = "No mistake"
    return _titled(figure, f"{what} · {predictions.title}")


@_styled
def plot_reliability(predictions: Predictions, bins: int = 10) -> Figure:
    """Reliability diagram: accuracy by confidence, how many predictions lie there, and the ECE.

    For the bins and the source see `calibration`.
    """
    table, ece = measures.calibration(predictions.log_p, predictions.labels, bins)
    table = table[table["n"] > 0]
    centres, width = (table["low"] + table["high"]) / 2, 0.94 / bins
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(6.4, 6), height_ratios=(3, 1))
    accuracy, confidence = table["accuracy"], table["confidence"]
    top.bar(centres, accuracy, width, color=BLUE, label="accuracy")
    look: dict[str, Any] = {"fill": False, "edgecolor": RED, "hatch": "///", "linewidth": 0.8}
    gap = confidence - accuracy
    top.bar(centres, gap, width, bottom=accuracy, label="gap to the confidence", **look)
    top.plot((0, 1), (0, 1), "--", color=BLACK, linewidth=1, label="perfectly calibrated")
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    sure, right = (np.average(100 * x, weights=table["n"]) for x in (confidence, accuracy))
    said = f"ECE {100 * ece:.2f} %\nmean confidence {sure:.1f} %, accuracy {right:.1f} %"
    top.legend(loc="upper left", title=said, alignment="left", frameon=True)
    bottom.bar(centres, table["n"], width, color=GREY)
    bottom.set(xlabel="confidence (probability of the predicted class)", ylabel="predictions")
    bottom.set_yscale("log")  # nearly all of them are in the last bin
    return _titled(figure, f"Reliability · {predictions.title}")


# ----------------------------------------------------------------------- of what a network looks at


@_styled
def plot_effective_receptive_field(source: Run | nn.Module, data: Data, n: int = 64) -> Figure:
    """The effective receptive field beside the theoretical one and the image.

    It is measured on the first `n` training images, each continued by reflection on all sides, so
    that the theoretical field fits in.

    Args:
        source: a run, or a network; a network without `mean` and `std` gets those of the data.
    """
    check_whole("n", n, 1)
    model: Any = load_pretrained(source.folder) if isinstance(source, Run) else source
    title = source.title if isinstance(source, Run) else data.title
    stats = model if getattr(model, "mean", None) else channel_stats(data.train_images)
    last = receptive_field(model)[-1]
    theoretical, missing = last.field, max(SIDE, last.field - SIDE) / 2
    margin = last.jump * math.ceil(missing / last.jump)  # whole positions of the last layer
    around = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    images = np.pad(data.train_images[:n], around, mode="reflect")
    field = measures.effective_receptive_field(model, images, stats.mean, stats.std)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8))
    _draw_field(left, field, theoretical, margin)
    _draw_shares(right, field, theoretical)
    what = f"Effective receptive field over {counted(len(images), 'training image')}"
    return _titled(figure, f"{what}, continued by reflection · {title}")


# ----------------------------------------------------------------------------- of runs among others


@_styled
def plot_study(runs: Iterable[Run], title: str = "Variations of the base") -> Figure:
    """What each variation of a study gains or loses against its base, with its 95 % interval.

    An interval is for one row alone, the colour for all together: see `measures.gains`.

    Raises:
        ValueError: no finished base among the runs.
    """
    table = study_table(runs)
    base, others, rows = table.iloc[0], table.iloc[1:], max(1, len(table) - 1)
    figure, axes = plt.subplots(figsize=(8, 1.8 + 0.36 * rows))
    colours = np.select([~others["clear"], others["gain"] > 0], [GREY, GREEN], RED)
    single = (others["n"] == 1) | (base["n"] == 1)
    for (colour, one), some in others.groupby([colours, single]):
        look: dict[str, Any] = {"fmt": "o", "color": colour, "capsize": 3}
        look["markerfacecolor"] = "white" if one else colour
        axes.errorbar(some["gain"], some.index, xerr=some["gain_interval"], **look)
    if others.empty:
        axes.annotate("no variation is finished yet", (0.5, 0.5), xycoords="axes fraction")
    axes.axvline(0, color=GREY, linestyle="--")
    axes.set_yticks(others.index, others["variation"] + ", n = " + others["n"].astype(str))
    axes.set_ylim(rows + 0.5, 0.5)  # the best on top
    axes.grid(axis="y", visible=False)
    figure.supxlabel(
        f"validation accuracy minus the base's ({mean_std(base, 'val_acc')} %, n = {base['n']}), "
        "points\nbars: 95 % confidence intervals, uncorrected; colour, after Holm's correction: "
        "green better,\nred worse, grey not significant; hollow: n = 1 on one side at least, "
        "not tested"
    )
    epochs = counted(table.attrs["epochs"], "epoch")
    return _titled(figure, f"{title} · {epochs} · {table.attrs['data']}")


SEARCH_FIGURES = {
    "history": "plot_optimization_history",
    "epochs": "plot_intermediate_values",
    "importances": "plot_param_importances",
    "slices": "plot_slice",
}


@_styled
def plot_search(search: optuna.Study, what: str = "history") -> Figure:
    """One of Optuna's figures of a search; see `load_search`.

    Args:
        what: "history", the validation accuracy of each trial and the best so far; "epochs", that
            of each trial by epoch; "importances", how much each parameter matters for it
            (PED-ANOVA: Watanabe et al., 2023, arXiv:2304.10255); "slices", the validation accuracy
            against each parameter.

    Raises:
        ValueError: another figure.
    """
    check_choice("figure", what, SEARCH_FIGURES)
    made_for = search.user_attrs["made_for"]
    data = title(made_for["dataset"], made_for["limit"])
    complete = search.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    ended = f"{counted(len(complete), 'trial')} trained to the end"
    heading = f"Search {search.study_name}: {what} · {ended} · {data}"
    if len(complete) < 2:
        figure, axes = plt.subplots(figsize=(8, 2))
        axes.annotate("no two trials have trained to their end yet", (0.3, 0.5))
        return _titled(figure, heading)
    draw = getattr(optuna.visualization.matplotlib, SEARCH_FIGURES[what])
    named = {} if what == "epochs" else {"target_name": "validation accuracy, %"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that importances rest on few trials
        panels = np.atleast_1d(draw(search, **named))
    figure = panels[0].figure
    if what == "history":
        panels[0].legend(["a trial", "the best so far"], loc="lower right")
        panels[0].set_xlabel("trial")
    if what == "epochs":
        _mark_stopped(panels[0], search)
    if what == "importances":
        panels[0].get_legend().remove()
        panels[0].set(xlabel="importance", ylabel="")
    for axes in panels:  # Optuna brings a style of its own
        for dots in axes.collections:
            dots.set_cmap("viridis_r")  # of Optuna's Blues the first can't be seen
        axes.set_facecolor("white")
        axes.grid(color=GREY, alpha=0.3)
        if axes.get_xscale() == "log":
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter("{x:g}")
    for side in ("left", "center"):
        panels[0].set_title("", loc=side)  # the figure's says it
    return _titled(figure, heading)


@_styled
def plot_accuracy_vs_cost(
    runs: Run | Iterable[Run] = (), cost: str = "parameters", family: Iterable[Run] = ()
) -> Figure:
    """Test accuracy against parameters or multiply-adds, beside the published networks.

    Runs are drawn as mean and sample standard deviation over seeds, for each recipe and protocol.
    Only runs tested on the whole of CIFAR-10 are comparable; a note says how many were left out.

    Args:
        cost: parameters, or multiply_adds (of one image), as far as their authors tell.
        family: runs of one design at several sizes, which are joined by a line.

    Raises:
        ValueError: another cost.
    """
    check_choice("cost", cost, ("parameters", "multiply_adds"))
    runs, family, networks = as_list(runs), as_list(family), published_networks()
    comparable, sizes = _tested_on_cifar10(runs), _tested_on_cifar10(family)
    reference, others = networks.iloc[0], networks.iloc[1:].dropna(subset=cost)
    figure, axes = plt.subplots(figsize=(10, 5.6))
    points = [(row[cost], row["accuracy"], row["network"], DIM) for _, row in others.iterrows()]
    axes.scatter(others[cost], others["accuracy"], s=24, color=GREY, zorder=4)
    # A ring, so that none of our runs of the same network hides it.
    ring: dict[str, Any] = {"s": 150, "facecolors": "none", "edgecolors": BLACK, "zorder": 5}
    axes.scatter(reference[cost], reference["accuracy"], **ring)
    colours = _colour_by_kind(runs)
    for _, row in runs_table(comparable).iterrows() if comparable else ():
        spread = row["test_acc_std"] if row["n"] > 2 else None
        kind = f"{row['recipe']} · {protocol_title(row['protocol'])}"
        look = {"color": colours[kind, row["data"]], "markersize": 7, "capsize": 4}
        axes.errorbar(row[cost], row["test_acc"], spread, fmt="D", **look)
        label = f"{kind}: {mean_std(row, 'test_acc')}, n = {row['n']}"
        points.append((row[cost], row["test_acc"], label, BLACK))
    if sizes:
        table = runs_table(sizes).sort_values(cost)
        spread = table["test_acc_std"].where(table["n"] > 2)
        look = {"color": SKY, "markersize": 5, "capsize": 3, "label": "one design at several sizes"}
        axes.errorbar(table[cost], table["test_acc"], spread, fmt="o-", **look)
        axes.legend(loc="upper left")
        for _, row in table.iterrows():
            label = f"{mean_std(row, 'test_acc')}, n = {row['n']}"
            points.append((row[cost], row["test_acc"], label, BLACK))
    name = f"reference: {reference['accuracy']:.2f}, epoch chosen on test"
    points.append((reference[cost], reference["accuracy"], name, BLACK))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.margins(x=0.12, y=0.08)
    names = {"parameters": "trainable parameters", "multiply_adds": "multiply-adds per image"}
    axes.set(xlabel=names[cost], ylabel="test accuracy, %", title="Small networks on CIFAR-10")
    notes = "Grey, and the ring: accuracies that their authors report, see results/published.csv."
    if left_out := len(runs) + len(family) - len(comparable) - len(sizes):
        why = "without a test accuracy, or not on the whole of CIFAR-10"
        notes += f" Left out: {counted(left_out, 'run')}, {why}."
    figure.supxlabel(notes, color=DIM)
    _label_points(figure, axes, points[::-1])  # this network first: it gets the best places
    return figure


# --------------------------------------------------------------------------------- parts of figures


def _tested_on_cifar10(runs: Iterable[Run]) -> list[Run]:
    tested = (run for run in runs if run.metrics and run.metrics["test_acc"] is not None)
    return [run for run in tested if run.data_title == "CIFAR-10"]


def _kind(run: Run) -> Kind:
    """What runs share that differ in their seed alone, as far as a figure tells them apart."""
    return run.kind, run.data_title


def _colour_by_kind(runs: Sequence[Run]) -> dict[Kind, Colour]:
    """A colour for each kind of run, the same in every figure of the same runs."""
    kinds = list(dict.fromkeys(map(_kind, runs)))
    many = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(kinds)))
    return dict(zip(kinds, COLOURS if len(kinds) <= len(COLOURS) else many, strict=False))


def _sides(run: Run) -> dict[int, int]:
    """The side of the training images, in pixels, by the epoch that it first comes with."""
    recipe = Recipe("", **{name: run.recipe[name] for name in ("epochs", "start_side", "grow")})
    sides = [recipe.side(epoch) for epoch in range(1, run.epochs + 1)]
    return {sides.index(side) + 1: side for side in sides}


def _draw_growth(axes: Axes, sides: dict[int, int], colour: Colour, *, named: bool) -> None:
    """A line where the training images become larger; with their sides written above."""
    for epoch, side in sides.items() if len(sides) > 1 else ():
        if epoch > 1:
            axes.axvline(epoch - 0.5, color=colour, linestyle=":", linewidth=1)
        if named:
            place = axes.get_xaxis_transform()  # epochs along, shares of the height upwards
            axes.text(epoch - 0.5, 1.01, f" {side} px", fontsize=8, color=GREY, transform=place)


def _titled(figure: Figure, title: str) -> Figure:
    figure.suptitle(_wrapped(title, figure.get_figwidth()))
    return figure


def _wrapped(title: str, inches: float) -> str:
    """A title in as many lines as the width asks for, broken after a dot or comma."""
    parts = title.replace(" ", "\xa0").replace("·\xa0", "· ").replace(",\xa0", ", ")
    letters = int(11 * inches)  # about 11 an inch
    lines = textwrap.wrap(parts, letters, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\xa0", " ")


def _draw_mosaic(axes: Axes, images: np.ndarray, names: Sequence[str], gap: int = 2) -> None:
    """Images (rows, columns, H, W, 3) as one image, with a name for each row."""
    rows, columns, height, width, _ = images.shape
    white = 255 if images.dtype == np.uint8 else 1.0
    padding = ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0))
    tiles = np.pad(images, padding, constant_values=white).swapaxes(1, 2)
    axes.imshow(tiles.reshape(rows * (height + gap), columns * (width + gap), 3)[:-gap, :-gap])
    axes.set_yticks(height / 2 + np.arange(rows) * (height + gap), names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _described(policy: augment.Policy) -> str:
    """What may happen to an image, each with its probability, in a line."""
    warp = f"shift ±{100 * policy.shift:g} %, zoom ±{100 * policy.scale:g} % and "
    warp += f"turn ±{policy.rotate:g}° (together, {100 * policy.affine_p:g} %)"
    black = policy.border == "constant" and (policy.warps or policy.crop_padding)
    what = {
        f"flip ({100 * policy.flip:g} %)": policy.flip,
        f"crop ±{policy.crop_padding} px": policy.crop_padding,
        warp: policy.warps,
        "black borders": black,
        f"hole {policy.hole} px ({100 * policy.hole_p:g} %)": policy.cuts,
    }
    return ", ".join(text for text, happens in what.items() if happens) or "nothing"


def _field_label(row: pd.Series) -> str:
    """A layer's name, and below it what sets it apart."""
    usual = {"kernel": 3, "dilation": 1, "stride": 1}
    apart = [f"{name} {row[name]}" for name, value in usual.items() if row[name] != value]
    return "\n".join([row["layer"].removeprefix("blocks."), *apart])


def _mark_stopped(axes: Axes, search: optuna.Study) -> None:
    """Optuna has a colour for each trial; here colours say which were stopped."""
    trials = {f"Trial{trial.number}": trial for trial in search.get_trials(deepcopy=False)}
    for line in axes.lines:
        stopped = trials[str(line.get_label())].state == optuna.trial.TrialState.PRUNED
        line.set(color=RED if stopped else BLUE, marker="x" if stopped else "o", alpha=0.6)
        line.set(markevery=[-1], markersize=6, label="stopped" if stopped else "trained to the end")
    ends = {line.get_label(): line for line in axes.lines}
    axes.legend(handles=list(ends.values()), loc="lower right")
    axes.set(xlabel="epoch", ylabel="validation accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_curves(axes: Axes, run: Run, what: str, look: dict[str, Any]) -> None:
    epochs, selection = run.history["epoch"], run.history[f"val_{what}"]
    if what == "acc" or run.losses_compare or not run.selects_on:
        axes.plot(epochs, run.history[f"train_{what}"], "--", markerfacecolor="white", **look)
    if run.selects_on:
        axes.plot(epochs, selection, "-", **look)
    if run.selects_on and run.metrics:
        best, star = run.metrics["best_epoch"], look | {"marker": "*", "linestyle": ""}
        axes.plot(best, selection[best - 1], markersize=13, markeredgecolor="white", **star)


def _history_legend(figure: Figure, runs: Sequence[Run], colours: dict[Kind, Colour]) -> None:
    """Many runs are named in a legend, where their colour is; a single one in the title."""
    line = functools.partial(Line2D, [], [], color=GREY)
    named = colours if len(runs) > 1 else {}
    handles = [line(color=colour, label=_named(runs, kind)) for kind, colour in named.items()]
    handles.append(line(linestyle="--", label="train, as augmented"))
    if selected := dict.fromkeys(run.selects_on for run in runs if run.selects_on):
        label = " and ".join(selected).replace("test", "test (selection!)")
        handles.append(line(label=label))
    if any(run.metrics and run.selects_on for run in runs):
        handles.append(line(marker="*", linestyle="", markersize=11, label="selected epoch"))
    if any(len(_sides(run)) > 1 for run in runs):
        handles.append(line(linestyle=":", label="training images grow"))
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = len(handles) if len(runs) == 1 else 2 if longest < 72 else 1
    figure.set_figheight(figure.get_figheight() + 0.21 * math.ceil(len(handles) / columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def _history_title(runs: Sequence[Run]) -> str:
    """The run, or how many on which data; the rates too, where they are the same for all."""
    first, titles = runs[0], dict.fromkeys(run.data_title for run in runs)
    title = first.title if len(runs) == 1 else f"{len(runs)} runs · {' and '.join(titles)}"
    if len(set(map(_kind, runs))) == 1:
        title += f" · highest learning rate {first.recipe['lr']:g}"
        if first.recipe["optimizer"].startswith("muon"):
            title += f", Muon's {first.recipe['muon_lr']:g}"
    return title


def _named(runs: Sequence[Run], kind: Kind) -> str:
    """The runs of a kind, their seeds, and how many of them aren't finished."""
    alike = [run for run in runs if _kind(run) == kind]
    seeds = ", ".join(str(run.config["seed"]) for run in alike)
    name = f"{kind[0]} · seed{'s' * (len(alike) > 1)} {seeds}"
    if waiting := sum(run.metrics is None for run in alike):
        name += f" · {waiting} unfinished"
    return name if len({run.data_title for run in runs}) == 1 else f"{name} · {kind[1]}"


def _draw_field(axes: Axes, field: np.ndarray, theoretical: int, margin: int) -> None:
    """The field in colour, on a logarithmic scale, as its rim is a thousand times weaker."""
    image = axes.imshow(field / field.max(), cmap="magma", norm=LogNorm(1e-4, 1, clip=True))
    axes.figure.colorbar(image, ax=axes, label="gradient, relative to its peak", shrink=0.85)
    for what, side, corner, colour, line in (
        ("the image", SIDE, margin - 0.5, "white", "--"),
        ("theoretical field", theoretical, (len(field) - theoretical) / 2, SKY, "-"),
    ):
        look: dict[str, Any] = {"edgecolor": colour, "linestyle": line, "linewidth": 1.6}
        square = Rectangle((corner, corner), side, side, fill=False, **look)
        axes.add_patch(square).set_label(f"{what}, {side} px")
    axes.legend(loc="upper left", labelcolor="white", frameon=True, facecolor="#222222")
    axes.set(xlabel="px", ylabel="px")
    axes.grid(False)


def _draw_shares(axes: Axes, field: np.ndarray, theoretical: int) -> None:
    """How much of the gradient lies within a centred square of each side."""
    sides = np.arange(1, len(field) + 1, 2)  # odd: only these are centred on a pixel
    shares = np.array([measures.share_within(field, int(side)) for side in sides])
    axes.plot(sides, shares, color=BLUE, label="measured")
    even = 100 * np.minimum(sides / theoretical, 1) ** 2
    axes.plot(sides, even, "--", color=GREY, label="spread evenly over the theoretical field")
    half, most = (sides[np.argmax(shares >= share)] for share in (50, 95))
    for side in dict.fromkeys((half, most, theoretical)):
        share = measures.share_within(field, int(side))
        axes.plot(side, share, "o", color=BLUE, markersize=6)
        place: dict[str, Any] = {"xytext": (6, -5), "textcoords": "offset points", "va": "top"}
        place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        axes.annotate(f"{share:.1f} %\nwithin {side} px", (side, share), **place)
    axes.set(xlim=(0, len(field)), ylim=(0, 105))
    axes.set(xlabel="side of a centred square, px", ylabel="share of the gradient inside, %")
    axes.legend(loc="lower right")


# Where a name may stand, seen from its point: by how much away, in points, and which part of the
# name is there, in shares of its width and height. Beside the point, above and below it; else on
# either side further up and down, at the end of a line.
_PLACES = [(8, 0, 0, 0.5), (-8, 0, 1, 0.5), (0, 8, 0.5, 0), (0, -8, 0.5, 1)]
_PLACES += [
    (dx, dy * up, float(dx < 0), 0.5)
    for dy in range(10, 90, 5)
    for dx in (12, -12, 40, -40)
    for up in (1, -1)
]
_LINE = dict(arrowstyle="-", color=GREY, lw=0.6, shrinkA=0, shrinkB=3)


def _label_points(figure: Figure, axes: Axes, points: Sequence[tuple[Any, ...]]) -> None:
    """Name each point (x, y, name, colour) where it covers little and isn't far away."""
    figure.draw_without_rendering()  # places are known only once the layout is
    pixel, frame = figure.dpi / 72, axes.get_window_extent().extents
    spots = axes.transData.transform([point[:2] for point in points])
    taken = np.vstack([_boxes(spots, 6), *(_boxes(line, 3) for line in _drawn(axes))])
    for spot, (x, y, name, colour) in zip(spots, points, strict=True):
        look: dict[str, Any] = {"color": colour, "textcoords": "offset points", "va": "bottom"}
        note = axes.annotate(name, (x, y), (0, 0), **look)
        size = np.asarray(note.get_window_extent().size)
        note.remove()
        least = math.inf
        for dx, dy, *shares in _PLACES:
            end, far = spot + pixel * np.array([dx, dy]), abs(dx) > 8
            low = end - size * shares
            line = np.linspace(spot, end, 20) if far else np.empty((0, 2))
            line = line[np.hypot(*(line - spot).T) > 9]  # the rest is on the point itself
            boxes = np.vstack([[*low, *(low + size)], _boxes(line, 1)])
            inside = (boxes[:, :2] > frame[:2]).all() and (boxes[:, 2:] < frame[2:]).all()
            cost = 2 * _overlap(boxes, taken) + math.dist(spot, end) + 1e6 * (not inside)
            if cost < least:
                least, best = cost, boxes
                look["arrowprops"] = {**_LINE, "relpos": shares} if far else None
        axes.annotate(name, (x, y), (best[0, :2] - spot) / pixel, **look)
        taken = np.vstack([taken, best])


def _drawn(axes: Axes) -> Iterator[np.ndarray]:
    """Places in pixels (n, 2) along each line that is drawn, error bars too."""
    stems = [part for part in axes.collections if isinstance(part, LineCollection)]
    paths = [(line.get_path(), line.get_transform()) for line in axes.lines]
    paths += [(path, part.get_transform()) for part in stems for path in part.get_paths()]
    for path, transform in paths:
        places = np.asarray(transform.transform_path(path).interpolated(20).vertices)
        yield places[np.isfinite(places).all(axis=1)]


def _boxes(centres: np.ndarray, half: float) -> np.ndarray:
    """Squares around places (n, 2): left, bottom, right, top (n, 4)."""
    return np.hstack([centres - half, centres + half])


def _overlap(boxes: np.ndarray, others: np.ndarray) -> float:
    """The area that they share, in square pixels."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    return float((np.minimum(boxes[:, None, 2:], others[:, 2:]) - low).clip(0).prod(axis=2).sum())
