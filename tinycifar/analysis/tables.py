"""Tables, in markdown: the same however often they are made."""

from __future__ import annotations

import inspect
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import numpy as np
from torch import nn

import augment
import tinycifar.data as cifar10
from tinycifar.analysis.measures import (
    check_at_least,
    confusion_matrix,
    normalised_moments,
)
from tinycifar.analysis.runs import (
    Predictions,
    Run,
    as_list,
    counted,
    gains,
    grouped,
    load_model,
    published_run,
    require_its_data,
    selects_on,
    study_groups,
    val_accuracies,
    variation_name,
)
from tinycifar.recipes import Recipe
from tiny_cifar10_net import (
    Field,
    LayerCost,
    NetCIFAR10_Tiny,
    SeparableConv,
    layer_costs,
    receptive_field,
)
from tinycifar.training import evaluate, train_index


def show(markdown: str) -> None:
    """Display a table in a notebook."""
    from IPython.display import Markdown, display

    display(Markdown(markdown))


def show_source(thing: object) -> None:
    """Display the code of a class or a function in a notebook."""
    show(f"```python\n{textwrap.dedent(inspect.getsource(thing))}```")


# ------------------------------------------------------------------------------------------ of runs


def recipes_table(recipes: Iterable[Recipe], all_fields: bool = False) -> str:
    """Recipes side by side, a dash where a field isn't used: those in which they differ.

    Args:
        all_fields: all that any of them uses; those in which they differ are bold.
    """
    recipes = list(recipes)
    rows = []
    for name in asdict(recipes[0]):
        values = [_used(recipe, name) for recipe in recipes]
        differ = len(set(values)) > 1
        if name == "name" or not (differ or all_fields) or set(values) == {"–"}:
            continue
        shown = f"**`{name}`**" if differ and all_fields else f"`{name}`"
        rows.append((shown, *values))
    return _table(("", *(f"`{recipe.name}`" for recipe in recipes)), rows)


def _used(recipe: Recipe, name: str) -> str:
    unused = {
        "muon_lr": not recipe.optimizer.startswith("muon"),
        "momentum": recipe.optimizer == "adamw",
        "warmup": recipe.schedule not in ("one_cycle", "cosine"),
        "plateau_factor": recipe.schedule != "plateau",
        "plateau_patience": recipe.schedule != "plateau",
        "grow": recipe.start_side == 32,
        "teaching": recipe.teacher is None,
        "temperature": recipe.teacher is None,
    }
    value = getattr(recipe, name)
    return "–" if value is None or unused.get(name) else str(value)


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
        ("images: train / selection / test", _split_sizes(run)),
        ("seed", run.config["seed"]),
    ]
    if run.metrics is None:
        rows.append(("state", f"unfinished, {_progress(run)} epochs"))
        return _table(("", "value"), rows, text_columns=2)
    m, where = run.metrics, selects_on(run)
    rows += [
        ("parameters", f"{m['params']:,}"),
        ("multiply-adds per image", f"{m['macs']:,}"),
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


def runs_table(runs: Iterable[Run], reference: bool = False, times: bool = False) -> str:
    """A row for each (recipe, data, protocol): mean and sample standard deviation over its seeds.

    An unfinished run has a row of its own that says how far it is, and no accuracy. A seed that
    comes twice counts once, and the table says so.

    Args:
        reference: begin with what the published reference reports.
        times: also say how long training took, which is another time when it is repeated.
    """
    runs = as_list(runs)
    groups, repeats = grouped(runs)
    unfinished = [run for run in runs if run.metrics is None]
    rows = [_group_row([published_run()])] if reference else []
    rows += [_group_row(group) for group in groups] + [_unfinished_row(run) for run in unfinished]
    header = ("recipe", "data", "protocol", "seeds", "parameters", "epochs")
    header += ("validation, %", "test, %", "test with flip, %", "test loss", "minutes")
    if not times:
        header, rows = header[:-1], [row[:-1] for row in rows]
    notes = ["Mean ± sample standard deviation over seeds; of two seeds both figures."]
    if repeats:
        notes.append(f"Left out, as their seed is there already: {', '.join(repeats)}.")
    return f"{_table(header, rows, text_columns=3)}\n{' '.join(notes)}\n"


def study_table(runs: Iterable[Run]) -> str:
    """Variations of a recipe against the recipe itself, the run or runs called `base`.

    Accuracies are those on validation, which a choice may rest on; for the standard error of a
    gain see `analysis.runs.gains`.

    Raises:
        ValueError: no finished base among the runs, or runs under another protocol than `val`.
    """
    runs = as_list(runs)
    base, *others = groups = study_groups(runs)
    rows = [("base", "", f"n = {len(base)}", mean_std(val_accuracies(base)), _mean_loss(base), "–")]
    for group, gain in zip(others, gains(groups), strict=True):
        shown = f"{gain.points:+.2f} ± {gain.error:.2f}"
        shown = f"**{shown}**" if gain.clear else shown
        changes = _changes(base[0], group[0])
        accuracy, loss = mean_std(val_accuracies(group)), _mean_loss(group)
        rows.append((variation_name(group), changes, f"n = {len(group)}", accuracy, loss, shown))
    header = ("variation", "what changes", "seeds", "validation, %", "loss", "gain over base")
    epochs = counted(base[0].config["recipe"]["epochs"], "epoch")
    note = (
        f"{base[0].data_title}, {epochs} unless said otherwise. Accuracy: mean ± standard "
        "deviation over seeds (of two, both figures); loss: its mean; gain: in accuracy, ± its "
        "standard error (`analysis.runs.gains`), bold where beyond noise (t-test at 5 %)."
    )
    waiting = sum(run.metrics is None for run in runs)
    if waiting:
        note += f" Not finished, and left out: {counted(waiting, 'run')}."
    return f"{_table(header, rows, text_columns=2)}\n{note}\n"


def _mean_loss(group: list[Run]) -> str:
    return f"{statistics.fmean(run.metrics['val_loss'] for run in group):.3f}"


def _changes(base: Run, run: Run) -> str:
    """The fields of a recipe that differ from the base's."""
    was, now = base.recipe, run.recipe
    changed = [k for k in now if k != "name" and now[k] != was[k]]
    return ", ".join(f"`{k}={now[k]}`" for k in changed)


def choice_table(runs: Iterable[Run]) -> str:
    """What choosing the epoch is worth: the chosen epoch beside the last and the luckiest.

    A row for each (recipe, data, protocol) that chooses; means and standard deviations over its
    seeds. Accuracies are those on the images that chose (by their loss): under `test-selected`,
    the test images, and then "chosen − last" goes into the result. What stopping and a schedule
    that watch the same images add to that doesn't show here.
    """
    groups, _ = grouped(as_list(runs))
    rows = [_choice_row(group) for group in groups if selects_on(group[0])]
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
        selects_on(group[0]),
        _range([run.metrics["best_epoch"] for run in group]),
        mean_std(chosen),
        mean_std(last),
        mean_std(np.subtract(chosen, last), sign="+"),
        mean_std(np.subtract(highest, last), sign="+"),
        mean_std([run.metrics["test_acc"] for run in group]),
    )


def drops_table(run: Run) -> str:
    """The stretches of equal learning rate, and what each drop between them bought.

    Its first epoch is compared with the last before it, which may happen to be a bad one, and its
    highest accuracy with the highest before it.
    """
    if run.config["recipe"]["schedule"] != "plateau":
        return "This run's learning rate doesn't drop in steps.\n"
    if not run.epochs:
        return f"The run {run.name} hasn't finished an epoch.\n"
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
        f"highest on {selects_on(run)}, %",
    )
    gains = ("first after the drop − last before", "highest − highest before")
    return _table((*header, *gains), rows)


def start_table(runs: Iterable[Run], epochs: int = 5) -> str:
    """Training accuracy over each of the first epochs: how fast recipes start, a row a run."""
    runs = [run for run in as_list(runs) if run.epochs]
    rows = [
        (
            run.title.replace("_", " "),
            *(f"{accuracy:.2f}" for accuracy in run.history["train_acc"][:epochs]),
        )
        for run in runs
    ]
    header = ("training accuracy, %", *(f"epoch {e}" for e in range(1, epochs + 1)))
    return _table(header, [row + ("–",) * (len(header) - len(row)) for row in rows])


def fit_table(run: Run, data: cifar10.Data) -> str:
    """How well a run's network fits what it was trained on, beside what it hasn't seen.

    Training images stand here twice: as they were fed, augmented and while the weights moved,
    and whole, through the kept weights. A network that is right less often on these than on the
    test images, or hardly more often, is short of fit, not of regularisation.
    The first is a mean over all of them; the other rests on as many as there are test images.

    Raises:
        ValueError: `data` isn't what the run was trained on.
    """
    require_its_data(run, data)
    if run.metrics is None:
        return f"The run {run.name} isn't finished.\n"
    index = train_index(data, run.config["protocol"])
    index = index[: len(data.test_labels)]  # as many as test images: enough, and soon done
    loss, accuracy = evaluate(
        load_model(run), data.train_images[index], data.train_labels[index], run.stats
    )
    m, fed = run.metrics, run.metrics["best_epoch"] - 1
    plain = run.recipe["label_smoothing"] == 0 and run.recipe["teacher"] is None
    fed_loss = run.history["train_loss"][fed] if plain else None  # another loss can't be compared
    rows = [
        ("training, as fed: augmented", run.config["split"]["train"], m["train_acc"], fed_loss),
        ("training, whole", len(index), accuracy, loss),
        ("test", run.config["split"]["test"], m["test_acc"], m["test_loss"]),
    ]
    if selects_on(run) == "validation":
        held_back = run.config["split"]["selection"]
        rows.insert(2, ("validation", held_back, m["val_acc"], m["val_loss"]))
    rows = [
        (name, f"{n:,}", _percent(right), "–" if loss is None else f"{loss:.4f}")
        for name, n, right, loss in rows
    ]
    gap = f"Whole training images less test images: {accuracy - m['test_acc']:+.2f} points."
    return f"{_table(('images', 'how many', 'accuracy', 'loss'), rows)}\n{gap}\n"


def confusion_table(predictions: Predictions, top: int = 6) -> str:
    """The `top` pairs of classes that are mistaken for one another most often, both ways."""
    check_at_least("top", top, 1)
    classes = predictions.classes
    counts = confusion_matrix(predictions.labels, predictions.predicted, len(classes))
    mistakes = counts.sum() - counts.trace()
    both = np.triu(counts + counts.T, k=1)
    order = np.argsort(-both, axis=None, kind="stable")[:top]
    rows = [
        (f"{classes[i]}, {classes[j]}", counts[i, j], counts[j, i], _share(both[i, j], mistakes))
        for i, j in zip(*np.unravel_index(order, both.shape), strict=True)
        if both[i, j]
    ]
    return _table(("a, b", "a taken for b", "b taken for a", "of all mistakes"), rows)


# -------------------------------------------------------------------------------------- of networks


def layer_table(model: nn.Module) -> str:
    """Output shape, parameters and multiply-adds of each layer on one 32 x 32 image."""
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
    """Growth of the receptive field, layer by layer, in pixels of the image."""
    header = ("layer", "kernel", "stride", "dilation", "output side", "jump", "receptive field")
    rows = [
        (f.name, f"{f.kernel} x {f.kernel}", f.stride, f.dilation, f.size, f.jump, f.field)
        for f in receptive_field(model)
    ]
    return _table(header, rows)


def separable_table(model: nn.Module) -> str:
    """Each separable block against a standard 3x3 convolution between the same channels.

    Of the blocks, weights of the convolutions only; the whole network with all that is in it,
    BatchNorm too. The multiply-adds are those of one 32 x 32 image.
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
    blocks = (np.sum(weights, axis=0), np.sum(macs, axis=0))
    rows.append(("**these blocks**", "", *_versus(*blocks[0]), *_versus(*blocks[1])))
    whole = _totals(layers.values())
    # A standard block has one BatchNorm, a separable one a second, after its depthwise convolution.
    second = sum(c.params for name, c in layers.items() if name.endswith(".bn_dw"))
    standard = [n - ours + theirs for n, (ours, theirs) in zip(whole, blocks, strict=True)]
    standard[0] -= second
    rows.append(
        ("**whole network**", "", *_versus(whole[0], standard[0]), *_versus(whole[1], standard[1]))
    )
    header = ("block", "channels", "parameters", "standard 3x3", "ratio")
    header += ("multiply-adds", "standard 3x3", "ratio")
    return _table(header, rows)


def dilation_table(**options) -> str:
    """What dilation buys, and what it costs: the network with and without it.

    Args:
        options: of `NetCIFAR10_Tiny`, e.g. width.
    """
    rows = []
    for label, dilated in (("with dilation", True), ("without", False)):
        model = NetCIFAR10_Tiny(**options | {"dilated": dilated})
        last, (params, macs) = receptive_field(model)[-1], _totals(layer_costs(model))
        whole = _sees_all(last)
        seen = f"{whole**2} of {last.size**2}"
        rows.append((label, f"{last.field} px", seen, f"{params:,}", f"{macs:,}"))
    header = ("network", "receptive field", "positions that see the whole image")
    return _table((*header, "parameters", "multiply-adds"), rows)


def _sees_all(last: Field, image: int = 32) -> int:
    """In how many positions along one side the last layer has the whole image in view.

    Position i is centred on pixel i * jump, with padding that keeps the size.
    """
    reach = last.field // 2
    centres = range(0, last.size * last.jump, last.jump)
    return sum(c - reach <= 0 and c + reach >= image - 1 for c in centres)


# ---------------------------------------------------------------------------------- of augmentation


def batch_check(
    data: cifar10.Data, policy: str | augment.Policy, seed: int = 0, n: int = 10_000
) -> str:
    """Channel mean and std of normalised training images: without augmentation, and with it.

    Measured on the first `n` images, and normalised by the statistics of all, so that the first
    row must be close to 0 and 1.
    """
    check_at_least("n", n, 1)
    stats = cifar10.channel_stats(data.train_images)
    name = policy if isinstance(policy, str) else "the policy"
    policies = {"none": augment.get_policy("none"), name: augment.get_policy(policy)}
    rows = []
    for label, chosen in policies.items():
        mean, std = normalised_moments(data.train_images[:n], chosen, stats, seed)
        rows.append((label, *(f"{value:.3f}" for value in (*mean, *std))))
    header = ("policy", *(f"{what} {c}" for what in ("mean", "std") for c in "RGB"))
    note = f"{data.title}: {len(data.train_images[:n]):,} normalised training images."
    return f"{note}\n\n{_table(header, rows)}"


# ----------------------------------------------------------------------------------- rows and cells


def _group_row(group: list[Run]) -> tuple:
    run, metrics = group[0], [run.metrics for run in group]
    validated = selects_on(run) == "validation"
    flipped = [m["test_acc_tta"] for m in metrics]
    return (
        *_labels(run),
        f"n = {len(group)}",
        f"{metrics[0]['params']:,}",
        _range([m["epochs_run"] for m in metrics]),
        mean_std([m["val_acc"] for m in metrics]) if validated else "–",
        mean_std([m["test_acc"] for m in metrics]),
        "–" if None in flipped else mean_std(flipped),
        mean_std([m["test_loss"] for m in metrics], digits=4),
        _minutes(metrics),
    )


def _minutes(metrics: Sequence[dict]) -> str:
    """How long training took, over the seeds; the published reference's doesn't say."""
    seconds = [m["seconds_train"] for m in metrics if "seconds_train" in m]
    return _range([round(s / 60) for s in seconds]) if seconds else "–"


def _unfinished_row(run: Run) -> tuple:
    seed = f"seed {run.config['seed']}"
    return (*_labels(run), seed, "–", f"unfinished: {_progress(run)}", *"–––––")


def _labels(run: Run) -> tuple[str, str, str]:
    return run.config["recipe"]["name"], run.data_title, run.protocol


def _progress(run: Run) -> str:
    return f"{run.epochs} of {run.config['recipe']['epochs']}"


def _split_sizes(run: Run) -> str:
    return " / ".join(f"{run.config['split'][part]:,}" for part in ("train", "selection", "test"))


def _table(header: Sequence, rows: Iterable[Sequence], text_columns: int = 1) -> str:
    """A markdown table; columns of text are left-aligned, the others right-aligned."""
    rule = [":---" if i < text_columns else "---:" for i in range(len(header))]
    cells = [header, rule, *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in row)} |\n" for row in cells)


def mean_std(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Mean ± sample standard deviation; of two values both, which may agree by chance."""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    if len(values) == 1:
        return mean
    if len(values) == 2:
        return f"{mean} ({values[0]:{sign}.{digits}f}, {values[1]:{sign}.{digits}f})"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _range(values: Sequence[int]) -> str:
    return "–".join(str(v) for v in sorted({min(values), max(values)}))


def _percent(value: float) -> str:
    return f"{value:.2f} %"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _totals(costs: Iterable[LayerCost]) -> tuple[int, int]:
    """Parameters and multiply-adds of all layers together."""
    params, macs = zip(*((c.params, c.macs) for c in costs), strict=True)
    return sum(params), sum(macs)


def _versus(ours: int, standard: int) -> tuple[str, str, str]:
    return f"{ours:,}", f"{standard:,}", f"{standard / ours:.1f}x less"
