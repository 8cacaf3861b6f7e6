"""Run directories in; curves, tables and pictures out.

    runs = find_runs("runs")
    show(runs_table(runs))                      # a table, in a notebook
    figure = plot_history(runs)                 # a figure, in a notebook
    figure.savefig("curves.png")                # or in a file

Tables are markdown, and say the same however often they are made; figures are matplotlib's, and
say in their title on which data they rest. Nothing here trains, and nothing here writes.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from torch import nn

import augment
import cifar10
from tiny_cifar10_net import (
    Field,
    LayerCost,
    NetCIFAR10_Tiny,
    SeparableConv,
    layer_costs,
    load_pretrained,
    receptive_field,
)
from training import (
    HISTORY_COLUMNS,
    PROTOCOLS,
    RECIPES,
    Recipe,
    evaluate,
    log_probabilities,
    train_index,
)

__all__ = [
    "Run",
    "load_run",
    "load_runs",
    "find_runs",
    "load_data",
    "load_model",
    "test_log_probabilities",
    "show",
    "recipe_table",
    "metrics_table",
    "runs_table",
    "study_table",
    "choice_table",
    "drops_table",
    "fit_table",
    "confusion_table",
    "layer_table",
    "field_table",
    "separable_table",
    "dilation_table",
    "batch_check",
    "plot_class_counts",
    "plot_samples",
    "plot_augmentations",
    "plot_receptive_field",
    "plot_history",
    "confusion_matrix",
    "plot_confusion",
    "plot_per_class",
    "plot_mistakes",
    "CalibrationBin",
    "calibration",
    "plot_reliability",
    "effective_receptive_field",
    "plot_effective_receptive_field",
    "plot_study",
    "Network",
    "published_networks",
    "plot_accuracy_vs_params",
]

PUBLISHED = Path(__file__).resolve().parent / "results" / "published.csv"
PICTURE = 32  # side of a picture of CIFAR-10, in pixels

# Okabe and Ito's colours, which the colour-blind can tell apart (jfly.uni-koeln.de/color, 2008).
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#8C8C8C"
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK)
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "figure.titlesize": 12,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw a figure in this module's style, and leave matplotlib's own settings alone."""

    @functools.wraps(draw)
    def styled(*args, **kwargs) -> Figure:
        with plt.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # ticks take their style when they are first drawn
            interactive = matplotlib.is_interactive()
        # A notebook's backend is loaded by its first figure and turns interactive drawing on, one
        # of the settings that the context has just put back: no later figure would be shown.
        matplotlib.interactive(interactive)
        return figure

    return styled


# ------------------------------------------------------------------------------------------ runs


@dataclass(frozen=True, eq=False)
class Run:
    """What a run directory holds; `load_run` makes it.

    Attributes:
        folder: the run directory.
        name: its name.
        config: config.json.
        history: the columns of history.csv, float64 (epochs,) each, NaN where a field is empty.
        metrics: metrics.json; None while the run isn't finished.
    """

    folder: Path
    name: str
    config: dict
    history: dict[str, np.ndarray]
    metrics: dict | None

    @property
    def epochs(self) -> int:
        """How many epochs are done."""
        return len(self.history["epoch"])

    @property
    def data_title(self) -> str:
        """The data set, as `cifar10.Data.title` has it."""
        return cifar10.title(self.config["dataset"], self.config.get("limit"))

    @property
    def protocol(self) -> str:
        """The protocol; where the epoch was chosen on test, it says so."""
        name = self.config["protocol"]
        return f"{name}: epoch chosen on test" if name == "test-selected" else name

    @property
    def label(self) -> str:
        """What tells it from other runs on its data, e.g. "quick · val · seed 0"."""
        parts = [self.config["recipe"]["name"], self.protocol, f"seed {self.config['seed']}"]
        if self.metrics is None:
            parts.append(f"unfinished, {_count(self.epochs, 'epoch')}")
        return " · ".join(parts)

    @property
    def title(self) -> str:
        """What a figure says about its run, e.g. "quick · val · seed 0 · CIFAR-10"."""
        return f"{self.label} · {self.data_title}"


def load_run(folder: str | Path) -> Run:
    """Read a run directory, finished or not.

    Raises:
        FileNotFoundError: the folder isn't a run directory; lists those beside it.
        ValueError: a file in it isn't what training wrote.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        beside = ", ".join(sorted(f.parent.name for f in folder.parent.glob("*/config.json")))
        raise FileNotFoundError(
            f"{folder} is not a run directory: expected one that holds config.json, as train() "
            f"writes it; beside it there {f'are: {beside}' if beside else 'is none'}"
        )
    config = _read_json(folder / "config.json", ("recipe", "seed", "protocol", "dataset", "split"))
    if config["protocol"] not in PROTOCOLS:
        raise ValueError(
            f"{folder / 'config.json'} names the protocol {config['protocol']!r}; expected one of "
            f"{', '.join(PROTOCOLS)}: was it written by another version?"
        )
    finished = (folder / "metrics.json").is_file()
    metrics = _read_json(folder / "metrics.json", ("test_acc", "params")) if finished else None
    name = folder.resolve().name
    return Run(folder, name, config, _read_history(folder / "history.csv"), metrics)


def load_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read several run directories; see `load_run`."""
    if isinstance(folders, (str, Path)):
        raise TypeError(
            f"load_runs takes a list of run directories, got {str(folders)!r}: "
            "use load_run for one, or find_runs for all in a folder"
        )
    return [load_run(folder) for folder in folders]


def find_runs(parent: str | Path) -> list[Run]:
    """All run directories directly below `parent`, sorted by name; there may be none.

    Raises:
        FileNotFoundError: no such folder.
    """
    parent = Path(parent)
    if not parent.is_dir():
        raise FileNotFoundError(f"no folder {parent}: name one that holds run directories")
    return load_runs(sorted(file.parent for file in parent.glob("*/config.json")))


def load_data(run: Run, root: str | Path | None = None) -> cifar10.Data:
    """The data set that a run was trained on; `root` and what it raises: see `cifar10.load`."""
    return cifar10.load(run.config["dataset"], root=root, limit=run.config.get("limit"))


def load_model(run: Run) -> NetCIFAR10_Tiny:
    """The network of a run's selected epoch (so far, if it isn't finished), in eval mode, on CPU.

    Raises:
        FileNotFoundError, ValueError: no weights, or unusable ones; see `load_pretrained`.
    """
    return load_pretrained(run.folder)


def test_log_probabilities(run: Run, data: cifar10.Data) -> np.ndarray:
    """What a run's network says of the test pictures: log-probabilities, float32 (N, classes).

    Raises:
        ValueError: `data` isn't what the run was trained on.
    """
    _require_its_data(run, data)
    return log_probabilities(load_model(run), data.test_images, _stats(run)).numpy()


test_log_probabilities.__test__ = False  # its name makes pytest take it for a test


def _require_its_data(run: Run, data: cifar10.Data) -> None:
    if data.checksum != run.config["data_sha256"]:
        raise ValueError(
            f"run {run.name} was trained on {run.data_title} (sha256 "
            f"{run.config['data_sha256'][:12]}), not on {data.title} ({data.checksum[:12]}): "
            "pass the data of load_data(run)"
        )


def _stats(run: Run) -> cifar10.Stats:
    return cifar10.Stats(tuple(run.config["mean"]), tuple(run.config["std"]))


# ---------------------------------------------------------------------------------------- tables


def show(markdown: str) -> None:
    """Display a table in a notebook."""
    from IPython.display import Markdown, display

    display(Markdown(markdown))


def recipe_table(recipe: Recipe) -> str:
    """Each field of a recipe beside the published reference's; bold where the two differ."""
    rows = []
    for name, reference in asdict(RECIPES["baseline"]).items():
        value = getattr(recipe, name)
        shown = f"`{value}`" if value == reference else f"**`{value}`**"
        rows.append((name, shown, f"`{reference}`"))
    return _table(("field", "this recipe", "reference"), rows, text_columns=3)


def metrics_table(run: Run, times: bool = False) -> str:
    """The final metrics of a run, or how far it is.

    Args:
        times: also say how long it took, and where: the lines that differ when it is repeated.
    """
    rows = [
        ("run", run.name),
        ("recipe", run.config["recipe"]["name"]),
        ("data", run.data_title),
        ("protocol", run.protocol),
        ("pictures: train / selection / test", _split_sizes(run)),
        ("seed", run.config["seed"]),
    ]
    if run.metrics is None:
        rows.append(("state", f"unfinished, {_progress(run)} epochs"))
        return _table(("", "value"), rows, text_columns=2)
    m, where = run.metrics, _selected_on(run)
    rows += [
        ("parameters", f"{m['params']:,}"),
        ("multiply-adds per picture", f"{m['macs']:,}"),
        ("epochs trained", m["epochs_run"]),
        ("selected epoch", f"{m['best_epoch']}, {f'by {where} loss' if where else 'the last'}"),
        ("training accuracy, as augmented", _percent(m["train_acc"])),
    ]
    if where == "validation":
        rows.append(("validation accuracy", _percent(m["val_acc"])))
        rows.append(("validation loss", f"{m['val_loss']:.4f}"))
    rows += [
        ("**test accuracy**", f"**{_percent(m['test_acc'])}**"),
        ("test loss", f"{m['test_loss']:.4f}"),
        ("test accuracy with flip at test time", _percent(m["test_acc_tta"])),
    ]
    if times:
        rows += [
            ("training time", f"{m['seconds_train'] / 60:.1f} min"),
            ("training speed", f"{m['images_per_second']:,.0f} images/s"),
            ("device", m["device"]),
            ("torch", m["torch"]),
            ("git commit", m["git_commit"] or "not known"),
        ]
    return _table(("", "value"), rows, text_columns=2)


# What tuning_CNN_for_CIFAR10 (Shashank Sane, 2025) reports, in its README and notebook.
REFERENCE_ROW = (
    "the reference, as published",
    "CIFAR-10",
    "test-selected: epoch chosen on test",
    "n = 1",
    "36,170",
    "50",
    "–",
    "87.31",
    "–",
    "0.3716",
)


def runs_table(runs: Iterable[Run], reference: bool = False) -> str:
    """A row for each (recipe, data, protocol): mean and sample standard deviation over its seeds.

    An unfinished run has a row of its own that says how far it is, and no accuracy. A seed that
    comes twice counts once, and the table says so.

    Args:
        reference: begin with what the published reference reports.
    """
    runs = _as_list(runs)
    groups, repeats = _grouped(runs)
    unfinished = [run for run in runs if run.metrics is None]
    rows = [REFERENCE_ROW] if reference else []
    rows += [_group_row(group) for group in groups] + [_unfinished_row(run) for run in unfinished]
    header = ("recipe", "data", "protocol", "seeds", "parameters", "epochs")
    header += ("validation, %", "test, %", "test with flip, %", "test loss")
    notes = ["Accuracies: mean ± sample standard deviation over seeds."]
    if repeats:
        notes.append(f"Left out, as their seed is there already: {', '.join(repeats)}.")
    return f"{_table(header, rows, text_columns=3)}\n{' '.join(notes)}\n"


def study_table(runs: Iterable[Run]) -> str:
    """Variations of a recipe against the recipe itself, the run or runs called `base`.

    Accuracies are those that a choice may rest on: validation, under the protocol `val`; only
    where nothing was held back, test. Their difference from the base comes with its standard
    error, root(s1²/n1 + s2²/n2), which takes two seeds of each.

    Raises:
        ValueError: no finished base among the runs.
    """
    base, *others = _study_groups(runs)
    accuracy, where = _settled(base)
    rows = [("base", "", f"n = {len(base)}", _mean_std(accuracy), "–")]
    for group in others:
        changes = _changes(base[0], group[0])
        values = _settled(group)[0]
        difference, error = _difference(accuracy, values)
        shown = f"{difference:+.2f}" + ("" if error is None else f" ± {error:.2f}")
        rows.append((_name(group), changes, f"n = {len(group)}", _mean_std(values), shown))
    header = ("variation", "what changes", "seeds", f"{where}, %", "against base")
    epochs, data = base[0].config["recipe"]["epochs"], base[0].data_title
    waiting = sum(run.metrics is None for run in _as_list(runs))
    note = f"{data}, protocol {base[0].protocol}, {_count(epochs, 'epoch')} unless said otherwise."
    if waiting:
        note += f" Not finished, and left out: {_count(waiting, 'run')}."
    return f"{_table(header, rows, text_columns=2)}\n{note}\n"


def _study_groups(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs of each variation, the base first, then best first."""
    groups, _ = _grouped(runs)
    base = [group for group in groups if _name(group) == "base"]
    if len(base) != 1:
        raise ValueError(
            f"a study has one base with a finished run; here there are {len(base)}: train it "
            "first, with make sweep STUDY=..., and pass the runs of one study"
        )
    others = [group for group in groups if group is not base[0]]
    return [*base, *sorted(others, key=lambda g: -statistics.fmean(_settled(g)[0]))]


def _name(group: list[Run]) -> str:
    return group[0].config["recipe"]["name"].replace("_", " ")


def _settled(group: list[Run]) -> tuple[list[float], str]:
    """The accuracies by which a study decides, and on what they are."""
    if _selected_on(group[0]) == "validation":
        return [run.metrics["val_acc"] for run in group], "validation"
    return [run.metrics["test_acc"] for run in group], "test"


def _changes(base: Run, run: Run) -> str:
    """The fields of a recipe that differ from the base's."""
    was, now = base.config["recipe"], run.config["recipe"]
    changed = [k for k in now if k != "name" and now[k] != was.get(k)]
    return ", ".join(f"`{k}={now[k]}`" for k in changed)


def _difference(base: Sequence[float], values: Sequence[float]) -> tuple[float, float | None]:
    """Of the means, and its standard error; None where a single run can't tell."""
    difference = statistics.fmean(values) - statistics.fmean(base)
    if min(len(base), len(values)) < 2:
        return difference, None
    return difference, math.sqrt(sum(statistics.variance(v) / len(v) for v in (base, values)))


def choice_table(runs: Iterable[Run]) -> str:
    """What choosing the epoch is worth: the chosen epoch beside the last and the luckiest.

    A row for each (recipe, data, protocol) that chooses; means and standard deviations over its
    seeds. Accuracies are those on the pictures that chose, and under `test-selected` these are
    the test pictures: what is gained there over the last epoch is flattery.
    """
    groups, _ = _grouped(_as_list(runs))
    rows = [_choice_row(group) for group in groups if _selected_on(group[0])]
    if not rows:
        return "No finished run here chose its epoch.\n"
    header = ("recipe", "data", "protocol", "seeds", "chosen on", "chosen epoch", "there, %")
    header += ("last epoch, %", "chosen − last", "highest − last", "test, %")
    return _table(header, rows, text_columns=3)


def _choice_row(group: list[Run]) -> tuple:
    accuracy = [run.history["val_acc"] for run in group]
    chosen = [a[run.metrics["best_epoch"] - 1] for a, run in zip(accuracy, group, strict=True)]
    last, highest = [a[-1] for a in accuracy], [a.max() for a in accuracy]
    return (
        *_labels(group[0]),
        f"n = {len(group)}",
        _selected_on(group[0]),
        _range([run.metrics["best_epoch"] for run in group]),
        _mean_std(chosen),
        _mean_std(last),
        _mean_std(np.subtract(chosen, last), sign="+"),
        _mean_std(np.subtract(highest, last), sign="+"),
        _mean_std([run.metrics["test_acc"] for run in group]),
    )


def drops_table(run: Run) -> str:
    """The stretches of equal learning rate, and what each drop between them bought.

    "At the drop" is the first epoch after it less the last before it; "in all" the stretch's
    highest accuracy less the highest before it.
    """
    if run.config["recipe"]["schedule"] != "plateau":
        return "This run's learning rate doesn't drop in steps.\n"
    lr, accuracy = run.history["lr"], run.history["val_acc"]
    starts = [0, *(np.flatnonzero(np.diff(lr)) + 1)]
    rows = []
    for start, end in zip(starts, [*starts[1:], len(lr)], strict=True):
        highest, gains = accuracy[start:end].max(), ("–", "–")
        if start:
            jump, more = accuracy[start] - accuracy[start - 1], highest - accuracy[:start].max()
            gains = (f"{jump:+.2f}", f"{more:+.2f}")
        epochs = "–".join(str(e) for e in sorted({start + 1, end}))
        trained = f"{run.history['train_acc'][end - 1]:.2f}"
        rows.append((epochs, f"{lr[start]:.2g}", trained, f"{highest:.2f}", *gains))
    header = (
        "epochs",
        "learning rate",
        "training at its end, %",
        f"highest on {_selected_on(run)}, %",
    )
    return _table((*header, "at the drop", "in all"), rows)


def fit_table(run: Run, data: cifar10.Data) -> str:
    """How well a run's network fits what it was trained on, beside what it hasn't seen.

    Training pictures stand here twice: as they were fed, augmented and while the weights moved,
    and whole, through the kept weights. A network that is right less often on these than on the
    test pictures, or hardly more often, is short of fit, not of regularisation.
    The first is a mean over all of them; the other rests on as many as there are test pictures.

    Raises:
        ValueError: `data` isn't what the run was trained on.
    """
    _require_its_data(run, data)
    if run.metrics is None:
        return f"The run {run.name} isn't finished.\n"
    index = train_index(data, run.config["protocol"])
    index = index[: len(data.test_labels)]  # as many as test pictures: enough, and soon done
    loss, accuracy = evaluate(
        load_model(run), data.train_images[index], data.train_labels[index], _stats(run)
    )
    m, fed = run.metrics, run.metrics["best_epoch"] - 1
    fed_loss, fed_accuracy = run.history["train_loss"][fed], run.history["train_acc"][fed]
    rows = (
        ("training, as fed: augmented", run.config["split"]["train"], fed_accuracy, fed_loss),
        ("training, whole", len(index), accuracy, loss),
        ("test", run.config["split"]["test"], m["test_acc"], m["test_loss"]),
    )
    rows = [(name, f"{n:,}", _percent(right), f"{loss:.4f}") for name, n, right, loss in rows]
    return _table(("pictures", "how many", "accuracy", "loss"), rows)


def confusion_table(
    log_p: np.ndarray, labels: np.ndarray, classes: Sequence[str], top: int = 6
) -> str:
    """The pairs of classes that are mistaken for one another most often, both ways.

    Args: as in `plot_confusion`; top: how many pairs.
    """
    _check_at_least("top", top, 1)
    predicted = _checked(log_p, labels).argmax(axis=1)
    counts = confusion_matrix(labels, predicted, len(classes))
    mistakes = counts.sum() - counts.trace()
    both = np.triu(counts + counts.T, k=1)
    order = np.argsort(-both, axis=None, kind="stable")[:top]
    rows = [
        (f"{classes[i]}, {classes[j]}", counts[i, j], counts[j, i], _share(both[i, j], mistakes))
        for i, j in zip(*np.unravel_index(order, both.shape), strict=True)
        if both[i, j]
    ]
    return _table(("a, b", "a taken for b", "b taken for a", "of all mistakes"), rows)


def layer_table(model: nn.Module) -> str:
    """Output shape, parameters and multiply-adds of each layer on one 32 x 32 picture."""
    costs = layer_costs(model)
    params, macs = _totals(costs)
    rows = []
    for c in costs:
        shape = " x ".join(map(str, c.out_shape))
        price = (f"{c.params:,}", _share(c.params, params), f"{c.macs:,}", _share(c.macs, macs))
        rows.append((c.name, c.kind, shape, *price))
    total = ("**total**", "", "", f"**{params:,}**", "100 %", f"**{macs:,}**", "100 %")
    header = ("layer", "kind", "output", "parameters", "share", "multiply-adds", "share")
    return _table(header, [*rows, total], text_columns=2)


def field_table(model: nn.Module) -> str:
    """Growth of the receptive field, layer by layer, in pixels of the picture."""
    header = ("layer", "kernel", "stride", "dilation", "output side", "jump", "receptive field")
    rows = [
        (f.name, f"{f.kernel} x {f.kernel}", f.stride, f.dilation, f.size, f.jump, f.field)
        for f in receptive_field(model)
    ]
    return _table(header, rows)


def separable_table(model: nn.Module) -> str:
    """Each separable block against a standard 3x3 convolution between the same channels.

    Weights of the convolutions only; BatchNorm is left out on both sides. The multiply-adds are
    those of one 32 x 32 picture.
    """
    layers = {c.name: c for c in layer_costs(model)}
    rows, weights, macs = [], [], []  # the latter two: (separable, standard) for each block
    for name, block in model.named_modules():
        if not isinstance(block, SeparableConv):
            continue
        c_in, c_out = block.pw.in_channels, block.pw.out_channels
        pair = (layers[f"{name}.dw"], layers[f"{name}.pw"])
        weights.append((sum(c.params for c in pair), 9 * c_in * c_out))
        macs.append((sum(c.macs for c in pair), 9 * pair[1].macs))
        rows.append((name, f"{c_in} → {c_out}", *_versus(*weights[-1]), *_versus(*macs[-1])))
    if not rows:
        return "This network has no separable block: every convolution is a standard one.\n"
    total = (*_versus(*np.sum(weights, axis=0)), *_versus(*np.sum(macs, axis=0)))
    header = ("block", "channels", "parameters", "standard 3x3", "ratio")
    header += ("multiply-adds", "standard 3x3", "ratio")
    return _table(header, [*rows, ("**total**", "", *total)])


def dilation_table() -> str:
    """What dilation buys, and what it costs: the reference network with and without it."""
    rows = []
    for label, dilated in (("with dilation", True), ("without", False)):
        model = NetCIFAR10_Tiny(dilated=dilated)
        field, (params, macs) = receptive_field(model)[-1].field, _totals(layer_costs(model))
        rows.append((label, f"{field} px", f"{params:,}", f"{macs:,}"))
    return _table(("network", "receptive field", "parameters", "multiply-adds"), rows)


def batch_check(
    data: cifar10.Data, policy: str | augment.Policy, seed: int = 0, n: int = 10_000
) -> str:
    """Channel mean and std of normalised training pictures: without augmentation, and with it.

    Measured on the first `n` pictures, and normalised by the statistics of all, so that the first
    row must be close to 0 and 1.
    """
    _check_at_least("n", n, 1)
    stats = cifar10.channel_stats(data.train_images)
    name = policy if isinstance(policy, str) else "the policy"
    policies = {"none": augment.get_policy("none"), name: augment.get_policy(policy)}
    rows = []
    for label, chosen in policies.items():
        mean, std = _normalised_moments(data.train_images[:n], chosen, stats, seed)
        rows.append((label, *(f"{value:.3f}" for value in (*mean, *std))))
    header = ("policy", *(f"{what} {c}" for what in ("mean", "std") for c in "RGB"))
    note = f"{data.title}: {len(data.train_images[:n]):,} normalised training pictures."
    return f"{note}\n\n{_table(header, rows)}"


# -------------------------------------------------------------------------- pictures of the data


@_styled
def plot_class_counts(data: cifar10.Data) -> Figure:
    """How many pictures of each class there are for training and for testing."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    position, height = np.arange(len(data.classes)), 0.4
    parts = (("train", data.train_labels, BLUE), ("test", data.test_labels, ORANGE))
    for i, (label, labels, colour) in enumerate(parts):
        counts = np.bincount(labels, minlength=len(data.classes))
        bars = axes.barh(position + (i - 0.5) * height, counts, height, color=colour)
        bars.set_label(f"{label}: {len(labels):,}")
        axes.bar_label(bars, [f"{count:,}" for count in counts], padding=3, fontsize=8)
    axes.set_yticks(position, data.classes)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("pictures")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title(f"Pictures per class · {data.title}")
    return figure


@_styled
def plot_samples(data: cifar10.Data, per_class: int = 8) -> Figure:
    """The first `per_class` training pictures of each class, a row a class."""
    _check_at_least("per_class", per_class, 1)
    rows = [data.train_images[data.train_labels == c] for c in range(len(data.classes))]
    per_class = min(per_class, *map(len, rows))
    size = (max(4.5, 0.62 * per_class + 1.2), 0.62 * len(rows) + 0.6)
    figure, axes = plt.subplots(figsize=size)
    _draw_mosaic(axes, np.stack([row[:per_class] for row in rows]), data.classes)
    figure.suptitle(_wrapped(f"Training pictures · {data.title}", figure))
    return figure


@_styled
def plot_augmentations(
    data: cifar10.Data,
    policies: Sequence[str] | None = None,
    builds: Sequence[str] | None = None,
    n: int = 6,
    seed: int = 0,
) -> Figure:
    """The first `n` training pictures under each policy, once for each build.

    Args:
        policies: names in `augment.POLICIES`; None is all.
        builds: names in `augment.BUILDS`; None is all.
        n: how many pictures.
        seed: another one draws other augmentations. The builds draw differently from the same
            seed: they agree in distribution, picture by picture only where nothing is random.

    Raises:
        ValueError: an unknown policy or build. ImportError: a build's library isn't there.
    """
    _check_at_least("n", n, 1)
    policies = list(augment.POLICIES) if policies is None else list(policies)
    builds = list(augment.BUILDS) if builds is None else list(builds)
    images, stats = data.train_images[:n], cifar10.channel_stats(data.train_images)
    size = (max(4.5, 0.72 * n + 1.4), len(policies) * (0.72 * len(builds) + 0.35) + 0.5)
    figure, all_axes = plt.subplots(len(policies), figsize=size, squeeze=False)
    for axes, policy in zip(all_axes[:, 0], policies, strict=True):
        rows = [_augmented(images, policy, build, stats, seed) for build in builds]
        _draw_mosaic(axes, np.stack(rows), builds)
        axes.set_title(f"policy {policy}", loc="left")
    figure.suptitle(_wrapped(f"Augmentation · {data.title}", figure))
    return figure


# ------------------------------------------------------------------------- pictures of a training


@_styled
def plot_receptive_field(model: nn.Module) -> Figure:
    """The receptive field after each layer that widens it, beside the side of a picture."""
    fields = [f for f in receptive_field(model) if f.kernel > 1]  # 1x1 layers add nothing
    figure, axes = plt.subplots(figsize=(9, 3.8))
    position, sides = np.arange(len(fields)), np.array([f.field for f in fields])
    dilated = np.array([f.dilation > 1 for f in fields])
    for chosen, label, colour in ((~dilated, "3x3", BLUE), (dilated, "3x3, dilated", ORANGE)):
        if chosen.any():
            bars = axes.bar(position[chosen], sides[chosen], 0.7, color=colour, label=label)
            axes.bar_label(bars, sides[chosen], padding=2, fontsize=9)
    axes.axhline(PICTURE, color=BLACK, linestyle="--", linewidth=1)
    axes.text(-0.35, PICTURE + 0.7, f"side of a picture: {PICTURE} px", fontsize=9)
    axes.set_xticks(position, [_field_label(f) for f in fields], fontsize=8, va="top")
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, max(PICTURE, sides.max()) * 1.12)
    axes.set_ylabel("receptive field, px")
    axes.legend(loc="upper left")
    name = type(model).__name__
    axes.set_title(f"{name}: each output of the last layer sees {sides[-1]} x {sides[-1]} px")
    return figure


@_styled
def plot_history(runs: Run | Iterable[Run]) -> Figure:
    """Loss, accuracy and learning rate by epoch, of one run or of many, a colour a run.

    Dashed is training, on the pictures as they were augmented; solid is what selects the epoch
    (validation or, said plainly, test); a star marks the selected epoch of a finished run.

    Raises:
        ValueError: no run at all.
    """
    runs = _as_list(runs)
    if not runs:
        raise ValueError("there is no run to plot: pass one or more, as load_run gives them")
    figure, (loss, accuracy, lr) = plt.subplots(1, 3, figsize=(11, 3.9))
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        _draw_curves(loss, run, "loss", colour)
        _draw_curves(accuracy, run, "acc", colour)
        lr.plot(run.history["epoch"], run.history["lr"], color=colour, marker=_marker(run))
    if all(run.config["recipe"].get("schedule") == "plateau" for run in runs):
        lr.set_yscale("log")  # its drops are factors
    solid = _selection_labels(runs)
    shown = f"train (dashed), {solid}" if solid else "train (dashed)"
    for axes, what in ((loss, "loss"), (accuracy, "accuracy, %")):
        axes.set_ylabel(f"{what}\n{shown}", fontsize=9)
    lr.set_ylabel("learning rate at the epoch's end", fontsize=9)
    for axes in (loss, accuracy, lr):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    _history_legend(figure, runs)
    return figure


# ---------------------------------------------------------------------- what a network gets wrong


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, n: int) -> np.ndarray:
    """How often class i (row) was taken for class j (column): int64 (n, n).

    Args:
        labels, predicted: integers (N,) of 0..n-1.

    Raises:
        ValueError: unequal lengths, or a class that isn't in 0..n-1.
    """
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.ndim != 1 or labels.shape != predicted.shape:
        raise ValueError(
            "labels and predicted must be one class for each picture, of shape (N,); "
            f"got {labels.shape} and {predicted.shape}"
        )
    both = np.concatenate((labels, predicted))
    if len(both) and (both.dtype.kind not in "iu" or both.min() < 0 or both.max() >= n):
        raise ValueError(f"classes must be whole numbers from 0 to {n - 1}; got {np.unique(both)}")
    pairs = n * labels.astype(np.int64) + predicted
    return np.bincount(pairs, minlength=n * n).reshape(n, n).astype(np.int64)


@_styled
def plot_confusion(
    log_p: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str
) -> Figure:
    """The confusion matrix: counts in the cells, the share of the true class as colour.

    Args:
        log_p: log-probabilities (N, classes).
        labels: integers (N,).
        classes: names, by label.
        title: what the numbers rest on: a run's title.
    """
    predicted = _checked(log_p, labels).argmax(axis=1)
    counts = confusion_matrix(labels, predicted, len(classes))
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(7.5, 6.4))
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for i, j in np.argwhere(counts):
        colour = "white" if shares[i, j] > 50 else "black"
        axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(classes)), classes, rotation=40, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.grid(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(picture, label="share of the true class, %", shrink=0.8)
    figure.suptitle(_wrapped(f"Confusion matrix, test pictures · {title}", figure))
    return figure


@_styled
def plot_per_class(
    log_p: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str
) -> Figure:
    """Accuracy class by class, best first, beside the whole; arguments as in `plot_confusion`."""
    predicted = _checked(log_p, labels).argmax(axis=1)
    counts = confusion_matrix(labels, predicted, len(classes))
    accuracy = 100 * counts.diagonal() / np.maximum(counts.sum(axis=1), 1)
    overall = 100 * counts.trace() / counts.sum()
    order = np.argsort(-accuracy, kind="stable")
    figure, axes = plt.subplots(figsize=(8, 3.8))
    bars = axes.barh(range(len(classes)), accuracy[order], color=BLUE, height=0.7)
    axes.axvline(overall, color=ORANGE, linestyle="--")
    around = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    texts = [f"{a:.1f}" for a in accuracy[order]]
    axes.bar_label(bars, texts, padding=3, fontsize=9, bbox=around)
    axes.set_yticks(range(len(classes)), [classes[i] for i in order])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 108)
    axes.set_xlabel(f"accuracy on the test pictures, % (dashed: all classes, {overall:.2f} %)")
    figure.suptitle(_wrapped(f"Accuracy by class · {title}", figure))
    return figure


@_styled
def plot_mistakes(
    log_p: np.ndarray, data: cifar10.Data, n: int = 16, title: str | None = None
) -> Figure:
    """The `n` test pictures that the network gets wrong and is surest of, surest first.

    Args:
        log_p: log-probabilities of data's test pictures, (N, classes).
        title: what the figure rests on; None is the data's title.
    """
    _check_at_least("n", n, 1)
    predicted = _checked(log_p, data.test_labels).argmax(axis=1)
    confidence = np.exp(log_p.max(axis=1))
    wrong = np.flatnonzero(predicted != data.test_labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:n]
    columns = min(8, max(4, len(worst)))
    rows = max(1, -(-len(worst) // columns))
    figure, all_axes = plt.subplots(rows, columns, figsize=(1.35 * columns, 1.85 * rows + 0.6))
    for axes in all_axes.flat:
        axes.axis("off")
    for axes, i in zip(all_axes.flat, worst, strict=False):
        axes.imshow(data.test_images[i])
        true, taken = data.classes[data.test_labels[i]], data.classes[predicted[i]]
        axes.set_title(f"{true}\n→ {taken}\n{100 * confidence[i]:.1f} %", fontsize=9)
    what = f"{len(worst)} surest of {_count(len(wrong), 'mistake')}: true → predicted, probability"
    what = what if len(wrong) else "No mistake on the test pictures"
    figure.suptitle(_wrapped(f"{what} · {title or data.title}", figure))
    return figure


@dataclass(frozen=True)
class CalibrationBin:
    """The predictions whose confidence lies in low < confidence <= high, all in 0..1.

    `confidence` and `accuracy` are means over the bin; NaN where `count` is 0.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def calibration(
    log_p: np.ndarray, labels: np.ndarray, bins: int = 15
) -> tuple[list[CalibrationBin], float]:
    """How sure the network is, and how often rightly so; and the expected calibration error.

    ECE is the mean of |accuracy - confidence| over bins of equal width, weighted by their counts:
    Guo et al., "On Calibration of Modern Neural Networks", 2017 (arXiv:1706.04599).

    Args:
        log_p: log-probabilities (N, classes), N at least 1.
        labels: integers (N,).
        bins: how many.

    Returns:
        The bins from 0 to 1, and the ECE, in 0..1.

    Raises:
        ValueError: shapes that don't fit, or no bin.
    """
    _check_at_least("bins", bins, 1)
    log_p = _checked(log_p, labels).astype(np.float64)
    right = log_p.argmax(axis=1) == labels
    # Rounding may lift a probability above 1.
    confidence = np.minimum(np.exp(log_p.max(axis=1)), 1.0)
    edges = np.linspace(0, 1, bins + 1)
    where = np.searchsorted(edges, confidence, side="left") - 1
    rows = []
    for b in range(bins):
        inside = where == b
        means = (x[inside].mean() if inside.any() else np.nan for x in (confidence, right))
        rows.append(CalibrationBin(edges[b], edges[b + 1], int(inside.sum()), *map(float, means)))
    gaps = (row.count * abs(row.accuracy - row.confidence) for row in rows if row.count)
    return rows, float(sum(gaps) / len(confidence))


@_styled
def plot_reliability(log_p: np.ndarray, labels: np.ndarray, title: str, bins: int = 15) -> Figure:
    """Reliability diagram: accuracy by confidence, how many predictions lie there, and the ECE.

    Arguments as in `calibration`, where the source is.
    """
    rows, ece = calibration(log_p, labels, bins)
    filled = [row for row in rows if row.count]
    centres, width = [(row.low + row.high) / 2 for row in filled], 0.94 / bins
    sizes = {"height_ratios": (3, 1)}
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(6.4, 6), gridspec_kw=sizes)
    accuracy, confidence = [r.accuracy for r in filled], [r.confidence for r in filled]
    top.bar(centres, accuracy, width, color=BLUE, label="accuracy")
    gaps = np.subtract(confidence, accuracy)
    look = {"facecolor": "none", "edgecolor": RED, "hatch": "///", "linewidth": 0.8}
    top.bar(centres, gaps, width, bottom=accuracy, label="gap to the confidence", **look)
    top.plot((0, 1), (0, 1), "--", color=BLACK, linewidth=1, label="perfectly calibrated")
    top.text(0.97, 0.06, f"ECE {100 * ece:.2f} %", transform=top.transAxes, ha="right", fontsize=11)
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    top.legend(loc="upper left")
    bottom.bar(centres, [row.count for row in filled], width, color=GREY)
    bottom.set(xlabel="confidence (probability of the predicted class)", ylabel="predictions")
    figure.suptitle(_wrapped(f"Reliability, test pictures · {title}", figure))
    return figure


# -------------------------------------------------------------------- what a network looks at


def effective_receptive_field(
    model: nn.Module,
    images: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    chunk: int = 8,
) -> np.ndarray:
    """How much each input pixel moves the centre of the last feature map: float64 (S, S).

    The mean of |d(sum over channels of c4's output at its centre) / d(input)| over the pictures
    and the colour channels, from Luo et al., "Understanding the Effective Receptive Field in Deep
    Convolutional Neural Networks", 2016 (arXiv:1701.04128). For `NetCIFAR10_Tiny` it is centred
    on pixel (S // 2, S // 2). Pictures larger than the theoretical field show all of it.

    Args:
        model: a network of stages c1 to c4; left as it was.
        images: uint8 (N, S, S, 3), N at least 1.
        mean, std: the channel statistics that it was trained with, of 0..1 pixels.
        chunk: how many pictures at a time; a matter of memory only.

    Raises:
        ValueError: images of another dtype or shape.
    """
    shape = np.shape(images)
    if len(shape) != 4 or shape[1] != shape[2] or not len(images):
        raise ValueError(f"images must be square, of shape (N, S, S, 3), N > 0; got {shape}")
    device, was_training = next(model.parameters()).device, model.training
    normalise = augment.Batched("none", mean, std).to(device)
    stages = nn.Sequential(model.c1, model.c2, model.c3, model.c4)
    total = torch.zeros(shape[1:3], dtype=torch.float64)
    model.eval()
    for part in torch.as_tensor(images).split(chunk):
        pixels = normalise(part.to(device)).requires_grad_()
        features = stages(pixels)
        centre = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
        (gradient,) = torch.autograd.grad(centre.sum(), pixels)
        total += gradient.abs().double().sum(dim=(0, 1)).cpu()
    model.train(was_training)
    return (total / (3 * len(images))).numpy()


@_styled
def plot_effective_receptive_field(
    source: Run | nn.Module, data: cifar10.Data, n: int = 64
) -> Figure:
    """The effective receptive field beside the theoretical one and the picture.

    It is measured on the first `n` test pictures, each continued by reflection on all sides, so
    that the theoretical field fits in.

    Args:
        source: a run, or a network; a network without `mean` and `std` gets those of the data.
    """
    _check_at_least("n", n, 1)
    is_run = isinstance(source, Run)
    model, title = (load_model(source), source.title) if is_run else (source, data.title)
    stats = cifar10.channel_stats(data.train_images)
    mean, std = getattr(model, "mean", None) or stats.mean, getattr(model, "std", None) or stats.std
    theoretical, margin = receptive_field(model)[-1].field, PICTURE // 2
    around = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    images = np.pad(data.test_images[:n], around, mode="reflect")
    field = effective_receptive_field(model, images, mean, std)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8))
    _draw_field(left, field, theoretical, margin)
    _draw_shares(right, field, theoretical)
    what = f"Effective receptive field over {_count(len(images), 'picture')}"
    figure.suptitle(_wrapped(f"{what} · {title}", figure))
    return figure


# ------------------------------------------------------------------------- among other networks


@_styled
def plot_study(runs: Iterable[Run]) -> Figure:
    """What each variation of a study gains or loses against its base, with the standard error.

    Raises:
        ValueError: no finished base among the runs.
    """
    base, *others = _study_groups(runs)
    accuracy, where = _settled(base)
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.36 * max(1, len(others))))
    for row, group in enumerate(others):
        difference, error = _difference(accuracy, _settled(group)[0])
        colour = GREEN if difference > 0 else RED
        axes.errorbar(difference, row, xerr=error, fmt="o", color=colour, capsize=3)
    axes.axvline(0, color=GREY, linestyle="--")
    axes.set_yticks(range(len(others)), [f"{_name(g)}, n = {len(g)}" for g in others])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(y=0.08)
    axes.set_xlabel(
        f"{where} accuracy less the base's ({statistics.fmean(accuracy):.2f} %, "
        f"n = {len(base)}), points"
    )
    figure.suptitle(_wrapped(f"Variations of the base · {base[0].data_title}", figure))
    return figure


@dataclass(frozen=True)
class Network:
    """A published network: its size, and its test accuracy in percent as its authors report it."""

    network: str
    parameters: int
    multiply_adds: int | None
    accuracy: float
    how: str
    source: str


def published_networks(file: str | Path = PUBLISHED) -> list[Network]:
    """The small networks on CIFAR-10 of results/published.csv, which names the sources.

    Raises:
        FileNotFoundError: no such file. ValueError: a row that can't be read.
    """
    networks = []
    for row in csv.DictReader(Path(file).read_text(encoding="utf-8").splitlines()):
        try:
            size, accuracy = int(row.pop("parameters")), float(row.pop("accuracy"))
            macs = int(row.pop("multiply_adds") or 0) or None
            networks.append(Network(parameters=size, multiply_adds=macs, accuracy=accuracy, **row))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}: can't read a row, {error}; expected the columns network, parameters, "
                "multiply_adds, accuracy, how, source"
            ) from error
    return networks


@_styled
def plot_accuracy_vs_params(runs: Run | Iterable[Run] = ()) -> Figure:
    """Test accuracy against parameters: these runs beside the published networks.

    Runs are drawn as mean and sample standard deviation over seeds, for each recipe and protocol.
    Only finished runs on the whole of CIFAR-10 are comparable; a note says how many were left out.
    """
    runs = _as_list(runs)
    groups, _ = _grouped(run for run in runs if _comparable(run))
    figure, axes = plt.subplots(figsize=(10, 5.6))
    points = [(p.parameters, p.accuracy, p.network, GREY) for p in published_networks()]
    axes.scatter(*zip(*[point[:2] for point in points], strict=True), s=24, color=GREY)
    for group, colour in zip(groups, _colours(len(groups)), strict=True):
        points.append(_draw_group(axes, group, colour))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.margins(x=0.12, y=0.08)
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel("test accuracy, %")
    left_out = sum(not _comparable(run) for run in runs)
    notes = ["Grey: as their authors report it, see results/published.csv."]
    if left_out:
        why = "not finished, or not on the whole of CIFAR-10"
        notes.append(f"Left out: {_count(left_out, 'run')}, {why}.")
    figure.supxlabel(" ".join(notes), fontsize=9, color="#444444")
    axes.set_title("Small networks on CIFAR-10")
    _label_points(axes, points[::-1])  # ours first: they get the best places
    return figure


# ------------------------------------------------------------------------------- reading of files


def _read_json(file: Path, needed: Sequence[str]) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON, as train() writes it: {error}") from error
    missing = [key for key in needed if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{file} was not written by train(): it lacks {', '.join(missing)}")
    return content


def _read_history(file: Path) -> dict[str, np.ndarray]:
    """A run killed in its first epoch has no history.csv yet: columns of length 0."""
    rows = []
    if file.is_file():
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    try:
        columns = {name: [float(row[name] or "nan") for row in rows] for name in HISTORY_COLUMNS}
        return {name: np.array(values) for name, values in columns.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} can't be read ({error!r}); expected numbers in {', '.join(HISTORY_COLUMNS)}"
        ) from error


# ----------------------------------------------------------------------------- groups of runs


def _as_list(runs: Run | Iterable[Run]) -> list[Run]:
    return [runs] if isinstance(runs, Run) else list(runs)


_DEFAULTS = asdict(Recipe(""))


def _grouped(runs: Iterable[Run]) -> tuple[list[list[Run]], list[str]]:
    """Finished runs alike but for their seed; and the names of those whose seed came before.

    Whole recipes are compared, not their names: a mean over two recipes would mean nothing.
    """
    groups: dict[tuple, dict[int, Run]] = {}
    repeats = []
    for run in runs:
        if run.metrics is None:
            continue
        recipe = _DEFAULTS | run.config["recipe"]  # a field that came later had its default
        key = (json.dumps(recipe, sort_keys=True), run.data_title, run.protocol)
        seeds = groups.setdefault(key, {})
        if run.config["seed"] in seeds:
            repeats.append(run.name)
        seeds.setdefault(run.config["seed"], run)
    return [list(seeds.values()) for seeds in groups.values()], repeats


def _group_row(group: list[Run]) -> tuple:
    run, metrics = group[0], [run.metrics for run in group]
    validated = _selected_on(run) == "validation"
    return (
        *_labels(run),
        f"n = {len(group)}",
        f"{metrics[0]['params']:,}",
        _range([m["epochs_run"] for m in metrics]),
        _mean_std([m["val_acc"] for m in metrics]) if validated else "–",
        _mean_std([m["test_acc"] for m in metrics]),
        _mean_std([m["test_acc_tta"] for m in metrics]),
        _mean_std([m["test_loss"] for m in metrics], digits=4),
    )


def _unfinished_row(run: Run) -> tuple:
    seed = f"seed {run.config['seed']}"
    return (*_labels(run), seed, "–", f"unfinished: {_progress(run)}", "–", "–", "–", "–")


def _labels(run: Run) -> tuple[str, str, str]:
    return run.config["recipe"]["name"], run.data_title, run.protocol


def _progress(run: Run) -> str:
    return f"{run.epochs} of {run.config['recipe']['epochs']}"


def _split_sizes(run: Run) -> str:
    return " / ".join(f"{run.config['split'][part]:,}" for part in ("train", "selection", "test"))


def _comparable(run: Run) -> bool:
    whole = run.config["dataset"] == "cifar10" and run.config.get("limit") is None
    return whole and run.metrics is not None


def _selected_on(run: Run) -> str | None:
    """What chose the epoch: validation, test, or nothing."""
    return {"val": "validation", "test-selected": "test"}.get(run.config["protocol"])


def _selection_labels(runs: Sequence[Run]) -> str:
    """What the solid curves show; empty where nothing was selected."""
    labels = {"validation": "validation", "test": "test (selection!)"}
    selected_on = dict.fromkeys(filter(None, map(_selected_on, runs)))
    return " and ".join(labels[where] for where in selected_on)


# -------------------------------------------------------------------------------- text of tables


def _table(header: Sequence, rows: Iterable[Sequence], text_columns: int = 1) -> str:
    """A markdown table; columns of text are left-aligned, the others right-aligned."""
    rule = [":---" if i < text_columns else "---:" for i in range(len(header))]
    cells = [header, rule, *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in row)} |\n" for row in cells)


def _mean_std(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _range(values: Sequence[int]) -> str:
    return "–".join(str(v) for v in sorted({min(values), max(values)}))


def _percent(value: float) -> str:
    return f"{value:.2f} %"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _totals(costs: Sequence[LayerCost]) -> tuple[int, int]:
    """Parameters and multiply-adds of all layers together."""
    return sum(c.params for c in costs), sum(c.macs for c in costs)


def _versus(ours: int, standard: int) -> tuple[str, str, str]:
    return f"{ours:,}", f"{standard:,}", f"{standard / ours:.1f}x less"


# ------------------------------------------------------------------------------- parts of figures


def _wrapped(title: str, figure: Figure) -> str:
    """A title in as many lines as the figure's width asks for, broken after a dot or a comma."""
    parts = title.replace(" ", "\xa0").replace("·\xa0", "· ").replace(",\xa0", ", ")
    letters = int(11 * figure.get_figwidth())  # about 11 an inch
    lines = textwrap.wrap(parts, letters, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\xa0", " ")


def _colours(n: int) -> list:
    return list(COLOURS[:n]) if n <= len(COLOURS) else list(plt.cm.viridis(np.linspace(0, 0.9, n)))


def _draw_mosaic(axes: Axes, pictures: np.ndarray, names: Sequence[str], gap: int = 2) -> None:
    """Pictures (rows, columns, H, W, 3) as one image, with a name for each row."""
    rows, columns, height, width, _ = pictures.shape
    white = 255 if pictures.dtype == np.uint8 else 1.0
    padding = ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0))
    tiles = np.pad(pictures, padding, constant_values=white).swapaxes(1, 2)
    axes.imshow(tiles.reshape(rows * (height + gap), columns * (width + gap), 3)[:-gap, :-gap])
    axes.set_yticks(height / 2 + np.arange(rows) * (height + gap), names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _augmented(
    images: np.ndarray, policy: str, build: str, stats: cifar10.Stats, seed: int
) -> np.ndarray:
    """uint8 (N, H, W, 3) as a build augments it, normalisation taken back: float32, in 0..1."""
    if build == "batched":
        generator = torch.Generator().manual_seed(seed)
        transform = augment.Batched(policy, stats.mean, stats.std)
        batch = transform(torch.as_tensor(images), generator)
    else:
        apply = augment.per_sample(policy, stats.mean, stats.std, build)
        batch = torch.stack([apply(image, seed + i) for i, image in enumerate(images)])
    pixels = batch.permute(0, 2, 3, 1).numpy() * np.float32(stats.std) + np.float32(stats.mean)
    return pixels.clip(0, 1)


def _normalised_moments(
    images: np.ndarray, policy: augment.Policy, stats: cifar10.Stats, seed: int
) -> np.ndarray:
    """Mean and std of each channel of the augmented pictures: float64 (2, 3)."""
    transform = augment.Batched(policy, stats.mean, stats.std)
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for part in torch.as_tensor(images).split(500):
        batch = transform(part, generator).double()
        sums += torch.stack([batch.sum(dim=(0, 2, 3)), batch.square().sum(dim=(0, 2, 3))])
    mean, square = sums.numpy() / (images.size / 3)
    return np.stack([mean, np.sqrt(square - mean**2)]).round(3) + 0.0  # + 0.0 makes -0 plain 0


def _field_label(field: Field) -> str:
    """A layer's name, and below it what sets it apart."""
    apart = [f"dilation {field.dilation}"] if field.dilation > 1 else []
    apart += [f"stride {field.stride}"] if field.stride > 1 else []
    return "\n".join([field.name, *apart])


def _marker(run: Run) -> str:
    return "o" if run.epochs <= 15 else ""  # a single epoch is a point; fifty are a line


def _draw_curves(axes: Axes, run: Run, what: str, colour) -> None:
    epochs, look = run.history["epoch"], {"color": colour, "marker": _marker(run)}
    selection = run.history[f"val_{what}"]
    axes.plot(epochs, run.history[f"train_{what}"], "--", markerfacecolor="white", **look)
    if _selected_on(run) is None:
        return
    axes.plot(epochs, selection, "-", **look)
    if run.metrics is not None:
        best = run.metrics["best_epoch"]
        axes.plot(best, selection[best - 1], "*", color=colour, ms=13, markeredgecolor="white")


def _history_legend(figure: Figure, runs: Sequence[Run]) -> None:
    """One run is named in the title; many are named in a legend, where their colour is."""
    entries = {}
    if len(runs) == 1:
        figure.suptitle(_wrapped(runs[0].title, figure))
    else:
        data = list(dict.fromkeys(run.data_title for run in runs))
        figure.suptitle(_wrapped(f"{len(runs)} runs · {' and '.join(data)}", figure))
        colours = zip(runs, _colours(len(runs)), strict=True)
        entries = {
            f"{run.name}: {run.label if len(data) == 1 else run.title}": {"color": colour}
            for run, colour in colours
        }
    entries["train, as augmented"] = {"color": GREY, "linestyle": "--"}
    if solid := _selection_labels(runs):
        entries[solid] = {"color": GREY}
    if any(run.metrics and _selected_on(run) for run in runs):
        entries["selected epoch"] = {"color": GREY, "marker": "*", "ls": "", "markersize": 11}
    handles = [Line2D([], [], label=label, **look) for label, look in entries.items()]
    columns = len(entries) if len(runs) == 1 else 2 if max(map(len, entries)) < 72 else 1
    figure.set_figheight(figure.get_figheight() + 0.21 * -(-len(entries) // columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def _draw_field(axes: Axes, field: np.ndarray, theoretical: int, margin: int) -> None:
    """The field in colour, on a logarithmic scale, as its rim is a thousand times weaker."""
    side, centre = len(field), len(field) // 2
    shown = field / field.max()
    picture = axes.imshow(shown, cmap="magma", norm=LogNorm(1e-4, 1, clip=True))
    axes.figure.colorbar(picture, ax=axes, label="gradient, relative to its peak", shrink=0.85)
    look = {"fill": False, "linewidth": 1.6}
    corner, low = (margin - 0.5,) * 2, (centre - theoretical / 2,) * 2
    square = Rectangle(corner, PICTURE, PICTURE, edgecolor="white", linestyle="--", **look)
    axes.add_patch(square).set_label(f"the picture, {PICTURE} px")
    square = Rectangle(low, theoretical, theoretical, edgecolor=SKY, **look)
    axes.add_patch(square).set_label(f"theoretical field, {theoretical} px")
    axes.legend(loc="upper left", labelcolor="white", frameon=True, facecolor="#222222")
    axes.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5), xlabel="px", ylabel="px")
    axes.grid(False)


def _draw_shares(axes: Axes, field: np.ndarray, theoretical: int) -> None:
    """How much of the gradient lies within a centred square of each side."""
    sides = range(1, len(field) + 1)
    axes.plot(sides, [_share_within(field, side) for side in sides], color=BLUE)
    for side in dict.fromkeys((15, PICTURE, theoretical)):
        share = _share_within(field, side)
        axes.plot(side, share, "o", color=BLUE, markersize=6)
        place = {"xytext": (6, -5), "textcoords": "offset points", "ha": "left", "va": "top"}
        axes.annotate(f"{share:.1f} %\nwithin {side} px", (side, share), fontsize=9, **place)
    axes.set(xlim=(0, len(field)), ylim=(0, 105))
    axes.set(xlabel="side of a centred square, px", ylabel="share of the gradient inside, %")


def _share_within(field: np.ndarray, side: int) -> float:
    """Percent of the field's sum within a centred square; one of 32 px is the picture itself."""
    start = max(0, len(field) // 2 - side // 2)
    inside = slice(start, start + side)
    return 100 * field[inside, inside].sum() / field.sum()


def _draw_group(axes: Axes, group: list[Run], colour) -> tuple[int, float, str, str]:
    """One recipe's runs as a point with an error bar; returns what its label needs."""
    accuracies = [run.metrics["test_acc"] for run in group]
    mean, x = statistics.fmean(accuracies), group[0].metrics["params"]
    std = statistics.stdev(accuracies) if len(group) > 1 else None
    axes.errorbar(x, mean, std, fmt="D", color=colour, markersize=7, capsize=4)
    run = group[0]
    name = f"{run.config['recipe']['name']} · {run.protocol}: {_mean_std(accuracies)}"
    return x, mean, f"{name} (n = {len(group)})", colour


def _label_points(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Name each point where its name covers no other: the first free place around it."""
    axes.figure.draw_without_rendering()  # places are known only once the layout is
    spots = [axes.transData.transform(point[:2]) for point in points]
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    frame = axes.get_window_extent()
    for x, y, name, colour in points:
        look = {"fontsize": 9, "color": "#555555" if colour == GREY else BLACK}
        for place in _PLACES:
            note = axes.annotate(name, (x, y), textcoords="offset points", **place, **look)
            box = note.get_window_extent()
            inside = frame.x0 < box.x0 and box.x1 < frame.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            if place is not _PLACES[-1]:
                note.remove()
        taken.append(box)


# Beside a point, above and below it, and further up and down on its right.
_PLACES = [
    {"xytext": (8, 0), "ha": "left", "va": "center"},
    {"xytext": (-8, 0), "ha": "right", "va": "center"},
    {"xytext": (0, 7), "ha": "center", "va": "bottom"},
    {"xytext": (0, -7), "ha": "center", "va": "top"},
] + [
    {"xytext": (8, sign * dy), "ha": "left", "va": "center"}
    for dy in range(10, 60, 5)
    for sign in (1, -1)
]


# ---------------------------------------------------------------------------------------- checks


def _checked(log_p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log-probabilities (N, classes) that belong to labels (N,), N at least 1."""
    log_p = np.asarray(log_p)
    if log_p.ndim != 2 or np.shape(labels) != log_p.shape[:1] or not len(log_p):
        raise ValueError(
            "log_p must be (N, classes) and labels (N,), with N of 1 or more; got "
            f"{log_p.shape} and {np.shape(labels)}"
        )
    return log_p


def _check_at_least(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise ValueError(f"{name} must be a whole number of {low} or more; got {value!r}")
