"""Tables: pandas frames of numbers. `presentation` says how they look.

Accuracies are percentages, differences of accuracies points. NaN is what isn't there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import optuna
import pandas as pd
from torch import nn

import augment
from tiny_cifar10_net import SeparableConv
from tinycifar.analysis.measures import confusion_matrix, gains, normalised_moments
from tinycifar.analysis.runs import Predictions, Run, as_list, counted, reference_run
from tinycifar.checks import check_whole
from tinycifar.costs import FUNCTIONS, layer_costs, receptive_field
from tinycifar.data import Data, channel_stats, some_of, title
from tinycifar.evaluation import evaluate
from tinycifar.recipes import Recipe
from tinycifar.trials import latest
from tinycifar.weights import load_pretrained

__all__ = [
    "batch_check", "choice_table", "confusion_table", "dilation_table", "drops_table",
    "field_table", "fit_table", "layer_table", "metrics_table", "recipes_table", "runs_table",
    "search_table",
    "separable_table", "start_table", "study_table",
]  # fmt: skip

_COSTS = ["parameters", "multiply_adds"]
# ------------------------------------------------------------------------------------ of recipes


def recipes_table(recipes: Iterable[Recipe], all_fields: bool = False) -> pd.DataFrame:
    """Recipes side by side, a row for each field in which they differ.

    Args:
        all_fields: a row for every field that any of them uses.

    Returns:
        field, a column for each recipe (None where the field isn't used), differs.

    Raises:
        ValueError: two different recipes of one name.
    """
    columns: dict[str, dict[str, Any]] = {}
    for recipe in dict.fromkeys(recipes):
        if recipe.name in columns:
            raise ValueError(f"two recipes are called {recipe.name!r}: rename one of them")
        columns[recipe.name] = _used(recipe)
    table = pd.DataFrame(columns, dtype=object).drop(index="name")
    table["differs"] = table.map(repr).nunique(axis=1) > 1
    used = table.drop(columns="differs").notna().any(axis=1)
    chosen = table[used & (table["differs"] | all_fields)]
    return chosen.rename_axis("field").reset_index()


def _used(recipe: Recipe) -> dict[str, Any]:
    """Its fields, None for those without effect."""
    unused = {
        "muon_lr": not recipe.optimizer.startswith("muon"),
        "momentum": recipe.optimizer == "adamw",
        "warmup": recipe.schedule not in ("one_cycle", "cosine"),
        "plateau_factor plateau_patience": recipe.schedule != "plateau",
        "grow": recipe.start_side == 32,
        "teaching temperature teacher_whole": recipe.teacher is None,
        "skips activation attention": recipe.network == "tiny" or ":" in recipe.network,
        "dilated separable width": recipe.network != "tiny",
    }
    without = " ".join(names for names, is_unused in unused.items() if is_unused).split()
    return {name: None if name in without else value for name, value in asdict(recipe).items()}


# --------------------------------------------------------------------------------------- of runs


def metrics_table(runs: Run | Iterable[Run]) -> pd.DataFrame:
    """A row for each run: what it is, and what came out, NaN while it isn't finished.

    Returns:
        run, recipe, data, protocol, seed, train_images, selection_images, test_images, parameters,
        multiply_adds, epochs (done), epochs_planned, selects_on, best_epoch, train_acc, val_acc,
        val_loss (on validation, nothing else), test_acc, test_loss, test_acc_tta.

    Raises:
        ValueError: no run at all.
    """
    runs = as_list(runs)
    if not runs:
        raise ValueError("there is no run to show: pass one or more, as load_run gives them")
    table = pd.DataFrame(map(_metrics, runs)).reindex(columns=[*_COLUMNS, *_MEASURED])
    table = table.astype(dict.fromkeys(_MEASURED, float))
    for name in ("val_acc", "val_loss"):  # those of test-selected were measured on test
        table[name] = table[name].where(table["selects_on"] == "validation")
    table.attrs["vertical"] = True
    return table


_COLUMNS = ["run", "recipe", "data", "protocol", "seed", "train_images", "selection_images"]
_COLUMNS += ["test_images", *_COSTS, "epochs", "epochs_planned", "selects_on", "best_epoch"]
_MEASURED = ["train_acc", "val_acc", "val_loss", "test_acc", "test_loss", "test_acc_tta"]


def _metrics(run: Run) -> dict[str, Any]:
    metrics = run.metrics or {}
    return metrics | {
        "run": run.name,
        "recipe": run.recipe["name"],
        "data": run.data_title,
        "protocol": run.protocol,
        "seed": run.config["seed"],
        **{f"{part}_images": n for part, n in run.config.get("split", {}).items()},
        "parameters": metrics.get("params"),
        "multiply_adds": metrics.get("macs"),
        "epochs": run.epochs,
        "epochs_planned": run.recipe["epochs"],
        "selects_on": run.selects_on,
    }


def _pooled(runs: list[Run], **more: list[Any]) -> tuple[pd.DataFrame, list[str]]:
    """A row for each run, `pool` the same where they are alike but for their seed.

    Returns:
        metrics_table with minutes, pool and the columns of `more`, finished runs first; and the
        names of the runs that are left out, as their seed came before.
    """
    seconds = [(run.metrics or {}).get("seconds_train", np.nan) for run in runs]
    table = metrics_table(runs).assign(minutes=np.array(seconds) / 60, **more)
    keys = (run.pool_key if run.metrics else f"unfinished {i}" for i, run in enumerate(runs))
    table["pool"], table["finished"] = list(keys), [run.metrics is not None for run in runs]
    repeated = table.duplicated(["pool", "seed"])
    table.attrs = {}
    ordered = table[~repeated].sort_values("finished", ascending=False, kind="stable")
    return ordered, list(table["run"][repeated])


def _statistics(*columns: str) -> dict[str, tuple[str, Any]]:
    """Mean, std, min and max of each column, as `agg` takes them; NaN if a run has no figure.

    (The seeds that confirm a trial may have a test accuracy before the trial itself has one.)
    """
    each = {"": "mean", "_std": "std", "_min": "min", "_max": "max"}
    return {
        f"{c}{suffix}": (c, lambda values, how=how: getattr(values, how)(skipna=False))
        for c in columns
        for suffix, how in each.items()
    }


def _range(column: str) -> dict[str, tuple[str, str]]:
    return {f"{column}_min": (column, "min"), f"{column}_max": (column, "max")}


def _first(*columns: str) -> dict[str, tuple[str, str]]:
    return {column: (column, "first") for column in columns}


def runs_table(
    runs: Run | Iterable[Run], reference: bool = False, times: bool = False
) -> pd.DataFrame:
    """A row for each recipe, data and protocol: mean and sample standard deviation over its seeds.

    Runs are pooled only where the whole recipe agrees, and a seed counts once. An unfinished run
    has a row of its own, with n = 0 and no accuracy.

    Args:
        reference: begin with what the published reference reports.
        times: also how long training took, which is another time when it is repeated.

    Returns:
        recipe, data, protocol, n, seeds (text), parameters, multiply_adds, epochs_min, epochs_max,
        epochs_planned; each with its _std, _min and _max: val_acc, test_acc, test_acc_tta,
        test_loss; with `times` minutes_min, minutes_max.
    """
    each, repeats = _pooled([reference_run()] * reference + as_list(runs))
    table = each.groupby("pool", sort=False).agg(
        **_first("recipe", "data", "protocol"),
        n=("finished", "sum"),
        seeds=("seed", lambda seeds: ", ".join(map(str, seeds))),
        **_first("parameters", "multiply_adds"),
        **_range("epochs"),
        **_first("epochs_planned"),
        **_statistics("val_acc", "test_acc", "test_acc_tta", "test_loss"),
        **(_range("minutes") if times else {}),
    )
    note = "Mean ± sample standard deviation over seeds; for two seeds, both values."
    return _noted(table, note + _left_out(repeats))


def _left_out(repeats: list[str]) -> str:
    return f" Left out, as their seed is there already: {', '.join(repeats)}." if repeats else ""


def study_table(runs: Iterable[Run]) -> pd.DataFrame:
    """Variations of a recipe against the recipe itself, the run or runs called `base`.

    The base comes first, then the best. Accuracies are those on validation, which a choice may
    rest on; for what a gain is and when it is clear see `measures.gains`.

    Returns:
        variation, changes (text), n, val_acc with its _std, _min and _max, val_loss, gain,
        gain_error, gain_interval, clear. attrs: data and epochs of the base, note.

    Raises:
        ValueError: not one base with a finished run, or runs under another protocol than `val`, or
            on different data.
    """
    runs = as_list(runs)
    finished = [run for run in runs if run.metrics is not None]
    if len({(run.data_title, run.config.get("data_sha256")) for run in finished}) > 1:
        raise ValueError("a study compares on the same data: pass the runs on one data set only")
    if any(run.protocol != "val" for run in finished):
        raise ValueError("a study compares on validation: pass runs under the protocol val only")
    bases = {run.pool_key: run for run in finished if run.recipe["name"] == "base"}
    if len(bases) != 1:
        raise ValueError(
            f"a study has one base with a finished run; here there are {len(bases)}: train it "
            "first, with make sweep STUDY=..., and pass the runs of one study"
        )
    (base,) = bases.values()
    each, repeats = _pooled(
        finished,
        variation=[run.recipe["name"].replace("_", " ") for run in finished],
        changes=[_changes(base, run) for run in finished],
    )
    table = each.groupby("pool", sort=False).agg(
        **_first("variation", "changes"),
        n=("finished", "sum"),
        **_statistics("val_acc"),
        val_loss=("val_loss", "mean"),
    )
    worse = -table["val_acc"].where(table["variation"] != "base", np.inf)
    table = table.loc[worse.sort_values(kind="stable").index]
    table = table.join(gains(table, base.config["split"]["selection"]))
    note = (
        f"{base.data_title}, {counted(base.recipe['epochs'], 'epoch')} unless said otherwise. "
        "Accuracy: mean ± standard deviation over seeds (of two, both figures); loss: its mean; "
        "gain: in accuracy, ± its standard error (`analysis.gains`), bold where beyond noise "
        "(t-test at 5 %, corrected after Holm for all rows)." + _left_out(repeats)
    )
    if waiting := len(runs) - len(finished):
        note += f" Not finished, and left out: {counted(waiting, 'run')}."
    table.attrs |= {"data": base.data_title, "epochs": base.recipe["epochs"]}
    return _noted(table, note)


def _changes(base: Run, run: Run) -> str:
    """The fields of a recipe that differ from the base's, one retired since among them.

    And that `on_epoch` ended it early.
    """
    was, now = base.recipe, run.recipe
    names = [name for name in {**was, **now} if name != "name" and was.get(name) != now.get(name)]
    values = ((name, now.get(name, "default")) for name in names)
    changes = [f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values]
    return ", ".join(changes + ["cut short"] * run.cut_short)


def search_table(search: optuna.Study) -> pd.DataFrame:
    """What became of the trials of a search, a row for each outcome; see `load_search`.

    Returns:
        outcome, trials (how many), epochs (that they trained together), highest_val_acc (of pruned
        trials that of their last epoch). attrs: note.
    """
    trials = latest(search).values()
    rows = [(t.state.name.lower(), len(t.intermediate_values), t.value) for t in trials]
    each = pd.DataFrame(rows, columns=["outcome", "epochs", "val_acc"]).astype({"val_acc": float})
    table = each.groupby("outcome", as_index=False).agg(
        trials=("epochs", "size"), epochs=("epochs", "sum"), highest_val_acc=("val_acc", "max")
    )
    made_for = search.user_attrs["made_for"]
    ends = made_for["search"].get("epochs", {})
    most = max(ends.get("choices") or [ends.get("high", made_for["base"]["epochs"])]) * len(each)
    return _noted(
        table,
        f"{title(made_for['dataset'], made_for['limit'])}. Epochs trained: {each['epochs'].sum()} "
        f"of the {most} that all trials in full would have taken.",
    )


def choice_table(runs: Run | Iterable[Run]) -> pd.DataFrame:
    """What selecting the epoch is worth: the selected epoch beside the last and the highest.

    A row for each recipe, data and protocol that selects. Accuracies are those on the images that
    select (by their loss): under `test-selected`, the test images, and then best_minus_last goes
    into the result. What is gained by stopping and by a schedule that watch the same images isn't
    included.

    Returns:
        recipe, data, protocol, n, selects_on, best_epoch_min, best_epoch_max; each with its _std,
        _min and _max: best_acc, last_acc, best_minus_last, highest_minus_last, test_acc. No rows
        where no run selects.
    """
    selecting = [run for run in as_list(runs) if run.metrics and run.selects_on]
    if not selecting:
        return _noted(pd.DataFrame(), "No finished run here selected its epoch.")
    curves = [run.history.set_index("epoch")["val_acc"] for run in selecting]
    best = [c[run.metrics["best_epoch"]] for c, run in zip(curves, selecting, strict=True)]  # type: ignore[index]  # finished
    last, highest = [c.iloc[-1] for c in curves], [c.max() for c in curves]
    each, _ = _pooled(selecting, best_acc=best, last_acc=last, highest_acc=highest)
    for which in ("best", "highest"):
        each[f"{which}_minus_last"] = each[f"{which}_acc"] - each["last_acc"]
    table = each.groupby("pool", sort=False).agg(
        **_first("recipe", "data", "protocol"),
        n=("finished", "sum"),
        **_first("selects_on"),
        **_range("best_epoch"),
        **_statistics("best_acc", "last_acc", "best_minus_last", "highest_minus_last", "test_acc"),
    )
    return _noted(table)


def drops_table(run: Run) -> pd.DataFrame:
    """The stretches of equal learning rate, and what each drop between them brought.

    A stretch's first epoch is compared with the last before it, which may happen to be a bad one,
    and its highest accuracy with the highest before it.

    Returns:
        epochs_min, epochs_max (first and last epoch), lr, train_acc (in its last epoch),
        highest_acc, jump_at_drop, gain_of_highest. No rows where the schedule isn't plateau.
    """
    if run.recipe["schedule"] != "plateau":
        return _noted(pd.DataFrame(), "This run's learning rate doesn't drop in steps.")
    lr = run.history["lr"]
    stretches = run.history.groupby(lr.ne(lr.shift()).cumsum())
    table = stretches.agg(
        epochs_min=("epoch", "min"),
        epochs_max=("epoch", "max"),
        lr=("lr", "first"),
        train_acc=("train_acc", "last"),
        highest_acc=("val_acc", "max"),
    )
    accuracy = stretches["val_acc"]
    table["jump_at_drop"] = accuracy.first() - accuracy.last().shift()
    table["gain_of_highest"] = table["highest_acc"] - table["highest_acc"].cummax().shift()
    if not run.epochs:
        return _noted(table, f"The run {run.name} hasn't finished an epoch.")
    return _noted(table, f"{run.title}. Accuracies in training, and on {run.selects_on}.")


def start_table(runs: Run | Iterable[Run], epochs: int = 5) -> pd.DataFrame:
    """Training accuracy over each of the first epochs: how fast recipes start, a row a run.

    Returns:
        run (its title), epoch_1, epoch_2, ...; NaN where it didn't come so far.
    """
    runs = [run for run in as_list(runs) if run.epochs]
    curves = [run.history["train_acc"].reindex(range(epochs)) for run in runs]
    table = pd.DataFrame(map(list, curves), columns=[f"epoch_{e + 1}" for e in range(epochs)])
    table.insert(0, "run", [run.title.replace("_", " ") for run in runs])
    return _noted(table, "Training accuracy, in percent.")


def fit_table(run: Run, data: Data) -> pd.DataFrame:
    """How well a run's network fits what it was trained on, beside what it hasn't seen.

    Training images have two rows: augmented, as they were trained on while the weights changed,
    and plain, with the selected weights. A network whose accuracy on the plain ones is below that
    on the test images, or hardly above it, underfits: it doesn't need more regularisation. The
    first row is a mean over all of them; the second is of as many as there are test images.

    Returns:
        part (which images), n_images, accuracy, loss. No rows for an unfinished run.

    Raises:
        ValueError: `data` isn't what the run was trained on.
    """
    splits = run.splits(data)
    if run.metrics is None:
        return _noted(pd.DataFrame(), f"The run {run.name} isn't finished.")
    index = some_of(splits.train_index, len(data.test_labels))  # as many as test images: soon done
    images, labels = (part[index] for part in splits.train)
    loss, accuracy = evaluate(load_pretrained(run.folder), images, labels, run.stats)
    metrics, sizes = run.metrics, run.config["split"]
    trained = run.history.set_index("epoch")["train_loss"][metrics["best_epoch"]]
    trained = trained if run.losses_compare else np.nan
    rows = [
        ("training, augmented", sizes["train"], metrics["train_acc"], trained),
        ("training, plain", len(index), accuracy, loss),
        ("validation", sizes["selection"], metrics["val_acc"], metrics["val_loss"]),
        ("test", sizes["test"], metrics["test_acc"], metrics["test_loss"]),
    ]
    if run.selects_on != "validation":
        del rows[2]
    note = "The test set was left alone."
    if metrics["test_acc"] is not None:
        gap = accuracy - metrics["test_acc"]
        note = f"Plain training images minus test images: {gap:+.2f} points."
    return _noted(pd.DataFrame(rows, columns=["part", "n_images", "accuracy", "loss"]), note)


def confusion_table(predictions: Predictions, top: int = 6) -> pd.DataFrame:
    """The `top` pairs of classes that are mistaken for one another most often, both ways.

    Returns:
        a, b (classes), a_as_b, b_as_a (counts), share (percent of all mistakes).
    """
    check_whole("top", top, 1)
    classes = np.array(predictions.classes)
    counts = confusion_matrix(predictions.labels, predictions.predicted, len(classes))
    a, b = np.triu_indices(len(classes), k=1)
    pairs = {"a": classes[a], "b": classes[b], "a_as_b": counts[a, b], "b_as_a": counts[b, a]}
    table = pd.DataFrame(pairs)
    both = table["a_as_b"] + table["b_as_a"]
    table["share"] = 100 * both / max(1, both.sum())
    table = table[both > 0].sort_values("share", ascending=False, kind="stable")
    return _noted(table.head(top))


# ----------------------------------------------------------------------------------- of networks


def layer_table(model: nn.Module) -> pd.DataFrame:
    """The output and the costs of each layer, for one 32 x 32 image.

    Returns:
        layer, stage (the first part of its name; for `blocks`, also the side), kind
        (standard, depthwise, pointwise, BatchNorm or attention), channels, side (of its square
        output, or the one that it weights), activations (the values it puts out), parameters,
        multiply_adds, parameters_share, multiply_adds_share; shares in percent.
    """
    table = pd.DataFrame(layer_costs(model))
    shape = table["out_shape"].str
    layers = map(model.get_submodule, table["name"].replace(FUNCTIONS, ""))
    side = shape[1].where(shape.len() == 3).ffill().fillna(0).astype(int)
    stage = table["name"].str.split(".").str[0]
    table = pd.DataFrame(
        {
            "layer": table["name"],
            "stage": stage.mask(stage == "blocks", stage + ", " + side.astype(str) + " px"),
            "kind": list(map(_kind, layers)),
            "channels": shape[0].where(shape.len() != 2, shape[1]),
            "side": side,
            "activations": table["out_shape"].map(math.prod),
            "parameters": table["params"],
            "multiply_adds": table["macs"],
        }
    )
    sums = table[_COSTS].sum()
    table = table.join((100 * table[_COSTS] / sums).add_suffix("_share"))
    return _noted(table, "In all {:,} parameters, {:,} multiply-adds.".format(*sums))


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.Conv1d):
        return "attention"
    if not isinstance(layer, nn.Conv2d):
        return "BatchNorm" if isinstance(layer, nn.BatchNorm2d) else type(layer).__name__
    if layer.groups > 1:
        return "depthwise"
    return "pointwise" if layer.kernel_size == (1, 1) else "standard"


def field_table(model: nn.Module) -> pd.DataFrame:
    """Growth of the receptive field, layer by layer, in pixels of the image.

    Returns:
        layer, kernel, stride, dilation, side (of its output), jump, receptive_field.
    """
    names = {"name": "layer", "size": "side", "field": "receptive_field"}
    return _noted(pd.DataFrame(receptive_field(model)).rename(columns=names))


def separable_table(model: nn.Module) -> pd.DataFrame:
    """Each separable block against a standard 3x3 convolution between the same channels.

    Of the blocks, weights of the convolutions only; the whole network with all that is in it,
    BatchNorm too. The multiply-adds are those of one 32 x 32 image.

    Returns:
        block (the last two: these blocks, whole network), c_in, c_out, parameters,
        standard_parameters, multiply_adds, standard_multiply_adds, times_fewer_parameters,
        times_fewer_multiply_adds. No rows where there is no such block.
    """
    blocks = [name for name, module in model.named_modules() if isinstance(module, SeparableConv)]
    if not blocks:
        note = "This network has no block of the kind `SeparableConv`."
        return _noted(pd.DataFrame(), note)
    layers = layer_table(model).set_index("layer")
    dw, pw = (layers.loc[[f"{b}.{part}" for b in blocks]] for part in ("dw", "pw"))
    bn = layers.reindex([f"{b}.bn_dw" for b in blocks])  # NaN where it is folded
    table = pd.DataFrame({"block": [*blocks, "these blocks", "whole network"]})
    table["c_in"], table["c_out"] = pd.Series(dw["channels"].array), pd.Series(pw["channels"].array)
    for what in _COSTS:
        own, standard = dw[what].to_numpy() + pw[what].to_numpy(), 9 * pw[what].to_numpy()
        whole = layers[what].sum()
        # A standard block has one BatchNorm, a separable one a second, after its depthwise half.
        instead = whole - own.sum() - bn[what].sum() + standard.sum()
        table[what] = [*own, own.sum(), whole]
        table[f"standard_{what}"] = [*standard, standard.sum(), instead]
    for what in _COSTS:
        table[f"times_fewer_{what}"] = table[f"standard_{what}"] / table[what]
    return _noted(table)


def dilation_table(model: nn.Module) -> pd.DataFrame:
    """What dilation buys, and what it costs: the network with and without it.

    Returns:
        network, receptive_field, sees_all (positions of the last feature map that see the whole
        image), positions, parameters, multiply_adds.
    """
    rows = []
    for label, net in (("as built", model), ("without dilation", _undilated(model))):
        last, costs = receptive_field(net)[-1], layer_table(net)[_COSTS].sum()
        # Position i is centred on pixel i * jump, with padding that keeps the size.
        reach, centres = last.field // 2, np.arange(last.size) * last.jump
        along_a_side = int(((centres <= reach) & (centres >= 31 - reach)).sum())
        rows.append((label, last.field, along_a_side**2, last.size**2, *costs))
    columns = ["network", "receptive_field", "sees_all", "positions", *_COSTS]
    return _noted(pd.DataFrame(rows, columns=columns))


def _undilated(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            conv.padding = tuple(side // 2 for side in conv.kernel_size)  # all keep the size
            conv.dilation = (1, 1)
    return model


# ------------------------------------------------------------------------------- of augmentation


def batch_check(data: Data, policy: str | augment.Policy, seed: int = 0) -> pd.DataFrame:
    """Channel mean and std of normalised training images: without augmentation, and with it.

    Measured on 10,000 images, and normalised by the statistics of all, so that the first
    row must be close to 0 and 1.

    Returns:
        policy, mean_r, mean_g, mean_b, std_r, std_g, std_b.
    """
    images = data.train_images[some_of(np.arange(len(data.train_labels)), 10_000)]
    stats = channel_stats(data.train_images)
    name = policy if isinstance(policy, str) else "the policy"
    chosen = {"none": augment.POLICIES["none"], name: augment.get_policy(policy)}
    rows = [normalised_moments(images, how, stats, seed).ravel() for how in chosen.values()]
    table = pd.DataFrame(rows, columns=[f"{m}_{c}" for m in ("mean", "std") for c in "rgb"])
    table.insert(0, "policy", list(chosen))
    return _noted(table, f"{data.title}: {len(images):,} normalised training images.")


def _noted(table: pd.DataFrame, note: str = "") -> pd.DataFrame:
    """The table with rows numbered, and a note for whoever shows it."""
    table = table.reset_index(drop=True)
    if note:
        table.attrs["note"] = note
    return table
