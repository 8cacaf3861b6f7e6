"""What results/ and docs/ show, rebuilt from the run directories; published weights verified.

    rebuild()   # `make results`
    verify()    # `make verify-results`

The pages hold two kinds of marks: a table lies between `<!-- name -->` and `<!-- /name -->`, a
number within a sentence between `<!--v name-->` and `<!--/v-->`. `rebuild` fills them all, so that
no number is typed by hand; a test fails when a page is stale.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from tinycifar import analysis, card
from tinycifar.analysis import Run, markdown
from tinycifar.data import Data, load, title
from tinycifar.evaluation import evaluate
from tinycifar.paths import CHECKOUT, DEFAULT, RESULTS, shown
from tinycifar.recipes import RECIPES
from tinycifar.run_directory import write_file
from tinycifar.studies import load_study
from tinycifar.training import test_figures
from tinycifar.trials import recorded
from tinycifar.weights import load_pretrained

_ROOT = CHECKOUT or Path()
_MARKS = (
    re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- /\2 -->)", re.DOTALL),
    re.compile(r"(<!--v (.+?)-->)[^<]*(<!--/v-->)"),
)
_OPENING = re.compile(r"<!--(?:v .+?| [\w-]+ )-->")
STUDIES = RESULTS / "studies"

Studies = dict[str, list[Run]]  # the runs of each, by its name

# What docs/recipes.md shows of the studies.
BRINGS = {
    "ablation": "SGD alone, SGD beside Muon, default initialisation, reference augmentation, "
    "plateau, whole images from the start, batch 128, batch 128 in bfloat16, "
    "decay of all parameters",
    "architecture": "default initialisation",
    "ingredients": "AdamW alone, alternating flips, only flips, crops half as far, "
    "average of weights, float32",
    "sprint": "batch 128, batch 128 in bfloat16",
    "tuned": "sgd beside muon",
}


def rebuild() -> None:
    """Fill the tables and the numbers of all pages, and draw all figures."""
    plt.switch_backend("Agg")
    now = contents()
    renewed = {page: filled(page.read_text(encoding="utf-8"), now) for page in pages()}
    for page, text in renewed.items():  # all or none
        write_file(page, text.encode())
        print(shown(page))
    for file, figure in _figures():
        figure.savefig(file, dpi=110)
        plt.close(figure)  # dozens at once would be a warning, and memory
        print(shown(file))


# ----------------------------------------------------------------------------------------- pages


def pages() -> list[Path]:
    """The pages that hold marks."""
    cards = [RESULTS / "README.md", RESULTS / "MODEL_CARD.md"]
    return [_ROOT / "README.md", *cards, *sorted((_ROOT / "docs").glob("*.md"))]


def filled(page: str, contents: Mapping[str, str]) -> str:
    """The text of a page, with what lies between its marks renewed.

    Raises:
        ValueError: a mark isn't closed, or names nothing that there is.
    """
    if sum(len(pattern.findall(page)) for pattern in _MARKS) != len(_OPENING.findall(page)):
        raise ValueError("a page has a mark that isn't closed, <!-- name --> or <!--v name-->")

    def renewed(mark: re.Match[str]) -> str:
        if mark[2] not in contents:
            raise ValueError(f"a page marks {mark[2]!r}: there is no such table or number")
        return mark[1] + contents[mark[2]] + mark[3]

    for pattern in _MARKS:
        page = pattern.sub(renewed, page)
    return page


def contents() -> dict[str, str]:
    """The tables and numbers of all pages, by the names in their marks."""
    runs, studies = analysis.find_runs(RESULTS), compared_studies()
    return _tables(runs, studies) | _values(runs, studies)


def _tables(runs: list[Run], studies: Studies) -> dict[str, str]:
    results = analysis.runs_table(runs, reference=True, times=True)
    frames = {
        "summary": _summary(results),
        "results": results,
        "recipes": analysis.recipes_table(RECIPES.values()).drop(columns="differs"),
        "brings": _brings(studies),
        "choice": analysis.choice_table(_baselines(runs)),
        "start": analysis.start_table(_starts(runs) + analysis.published_study("reference")),
        "published": analysis.published_networks().sort_values("parameters"),
        **{name: _study(varied) for name, varied in studies.items()},
        **{f"{name}-costs": _costs(varied) for name, varied in studies.items()},
        **card.tables(),
    }
    return {
        **{name: markdown(frame) for name, frame in frames.items()},
        "runs": "".join(map(_run_line, runs)),
        "drops": "\n".join(markdown(analysis.drops_table(run)) for run in _baselines(runs)),
        "speed": speed_table(_benchmark("cpu")),
        "int8": _int8_table(),
        "inference": inference_table(_benchmark("inference")),
        "pruning": markdown(pruning_table(_benchmark("pruning"))),
        "overhead": markdown(overhead_table(_benchmark("queue_overhead"))),
    }


def _values(runs: list[Run], studies: Studies) -> dict[str, str]:
    """What rests on a single seed has no name, so that no sentence can quote it."""
    found: dict[str, str] = {}
    for row in _rows(analysis.runs_table(runs)):
        name = row["recipe"] if row["protocol"] == "val" else f"{row['recipe']}-{row['protocol']}"
        found |= accuracies(name, row)
    for study, varied in studies.items():
        base, *others = _rows(analysis.study_table(varied))
        for row in others:
            if min(row["n"], base["n"]) > 1:
                seeds = f"n = {row['n']} beside {base['n']}"
                gain = f"{row['gain']:+.2f} ± {row['gain_error']:.2f} points ({seeds})"
                found[f"{study}/{row['variation']}.gain"] = gain
        for row in _rows(analysis.runs_table(varied)):
            found |= accuracies(f"{study}/{row['recipe'].replace('_', ' ')}", row)
    measured = _benchmark("cpu")["figures"] + _benchmark("inference")["figures"]
    speed = {f"speed.{row['figure']}": row["measured"] for row in measured}
    for row in card.exported():
        speed[f"export.{row['file']}.kilobytes"] = f"{row['bytes'] / 1000:.0f}"
    found |= _published_values() | _reference_values(runs) | speed
    return found | _answers() | card.values()


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return frame.to_dict("records")  # type: ignore[return-value]  # the stubs' keys are Hashable


def accuracies(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    """Mean and standard deviation over seeds, of two both figures, of one nothing."""
    found, n = {}, row["n"]
    for part in ("test", "val"):
        mean = row[f"{part}_acc"]
        if n == 2 and pd.notna(mean):
            low, high = row[f"{part}_acc_min"], row[f"{part}_acc_max"]
            found[f"{name}.{part}"] = f"{mean:.2f} % ({low:.2f} and {high:.2f})"
            found[f"{name}.{part} spread"] = f"{high - low:.2f}"
        elif n > 2 and pd.notna(mean):
            found[f"{name}.{part}"] = f"{mean:.2f} ± {row[f'{part}_acc_std']:.2f} % (n = {n})"
    return found


def _published_values() -> dict[str, str]:
    found = {}
    for i, row in enumerate(_rows(analysis.published_networks())):
        name = row["network"] if i else "reference"
        found[f"{name}.accuracy"] = f"{row['accuracy']:g}"
        if pd.notna(row["multiply_adds"]):
            found[f"{name}.macs"] = f"{row['multiply_adds'] / 1e6:.3g} M"
    return found


def _reference_values(runs: list[Run]) -> dict[str, str]:
    """How the published run starts beside ours; and what a sample of images can tell."""
    published, *ours = (run.history["train_acc"][1:5].mean() for run in _baselines(runs))
    best = [r for r in runs if r.recipe["name"] == DEFAULT and r.protocol == "val"]
    right = fmean(r.metrics["val_acc"] for r in best if r.metrics) / 100
    errors = {
        part: 100 * math.sqrt(right * (1 - right) / best[0].config["split"][part])
        for part in ("selection", "test")
    }
    return {
        "start.lead": f"{published - max(ours):.1f} to {published - min(ours):.1f}",
        "start.span": f"{max(ours) - min(ours):.1f}",
        "start.runs": f"{len(ours)}",
        **{f"sampling.{part}": f"{error:.2f}" for part, error in errors.items()},
    }


def _answers() -> dict[str, str]:
    """How long an answer takes: what benchmarks/answers.py measured."""
    result = _benchmark("answers")
    seconds, page = result["predict_seconds"], result["page_milliseconds"]
    return {
        "answers.machine": "{processor}, {threads} threads".format_map(result["machine"]),
        **{f"answers.{name}": f"{taken:.2f} s" for name, taken in seconds.items()},
        **{f"answers.{name}": f"{taken:.0f} ms" for name, taken in page.items()},
    }


def _benchmark(name: str) -> Any:
    """What benchmarks/ holds by that name."""
    return json.loads((_ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------- tables


def _summary(results: pd.DataFrame) -> pd.DataFrame:
    """Four recipes and the reference, of what runs_table has."""
    presets = [("taught", "val"), ("tuned", "val"), ("sprint", "val")]
    kinds = [*presets, *((r, "test-selected") for r in ("baseline", results["recipe"].iloc[0]))]
    shown = results.set_index(["recipe", "protocol"], drop=False).loc[kinds]
    wanted = "recipe|protocol|n|(epochs|minutes)_(min|max)|test_acc(_std|_min|_max)?"
    return shown.filter(regex=f"^({wanted})$")


def _study(runs: list[Run]) -> pd.DataFrame:
    """A study's table, with a note that leaves out what docs/findings.md says once."""
    table = analysis.study_table(runs)
    table.attrs["note"] = "{data}, {epochs} epochs unless said otherwise.".format_map(table.attrs)
    return table


def _brings(studies: Studies) -> pd.DataFrame:
    """The rows of BRINGS, each with its study and how many seeds the study's base has."""
    parts = []
    for study, names in BRINGS.items():
        table = analysis.study_table(studies[study])
        part = table.set_index("variation", drop=False).loc[names.split(", ")]
        link = f"[{study}](findings.md#{study})"
        parts.append(
            part.assign(study=link, epochs=table.attrs["epochs"], base_seeds=table["n"].iloc[0])
        )
    columns = ["variation", "changes", "study", "epochs", "base_seeds", "n"]
    return pd.concat(parts)[[*columns, "gain", "gain_error", "clear"]]


def _costs(runs: list[Run]) -> pd.DataFrame:
    """What networks of a study cost, each once."""
    table = analysis.runs_table(runs)[["recipe", "parameters", "multiply_adds"]]
    table.attrs.clear()
    return table.assign(recipe=table["recipe"].str.replace("_", " "))


def _baselines(runs: list[Run]) -> list[Run]:
    """The reference's own run, and ours of its recipe."""
    return [analysis.reference_run(), *(r for r in runs if r.recipe["name"] == "baseline")]


def _starts(runs: list[Run]) -> list[Run]:
    return [*_baselines(runs), analysis.reference_code_run()]


def _run_line(run: Run) -> str:
    """A link to a published run, and to its executed notebooks."""
    executed = sorted(p for p in run.folder.glob("*.ipynb") if not p.stem.endswith(".running"))
    links = ", ".join(f"[{p.stem}]({run.name}/{p.name})" for p in executed)
    return f"- [`{run.name}`]({run.name}): {run.title}{f': {links}' if links else ''}\n"


def speed_table(result: Mapping[str, Any]) -> str:
    """The figures that `make bench` wrote as JSON, beside the goals; in Markdown."""
    machine = result["machine"]
    where = machine["gpu"] or "{processor} ({instructions}), {threads} threads".format(**machine)
    frame = pd.DataFrame(result["figures"], dtype="str")
    frame.attrs["note"] = (
        f"Measured on {where}, torch {machine['torch']}, batch {result['batch_size']} unless said "
        "otherwise; speeds of training are relative to the reference's loop at that batch size; "
        f"medians of {result['rounds']} rounds, {result['date']}."
    )
    return markdown(frame)


def _int8_table() -> str:
    """What simulated int8 costs by the layers that stay in float, as benchmarks/int8.py found."""
    rows = [
        {
            "in float": row["float"],
            "trained": "yes" if row["trained"] else "–",
            "validation accuracy, %": f"{row['val_acc']:.2f}",
            "validation loss": f"{row['val_loss']:.4f}",
        }
        for row in _benchmark("int8")
    ]
    return markdown(pd.DataFrame(rows))


def inference_table(result: Mapping[str, Any]) -> str:
    """The ratios that `make bench` wrote of inference, beside the goals; in Markdown."""
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v)
    plain = " and ".join(
        f"{times['torch, plain']:,.0f} µs an image in batches of {size}"
        for size, times in result["microseconds_an_image"].items()
    )
    named = {"vnni": "with" if result["vnni"] else "without", "versions": versions, "plain": plain}
    frame = pd.DataFrame(result["figures"], dtype="str")
    frame.attrs["note"] = (
        "Plain torch takes {plain}: don't compare ratios of different batch sizes. Measured on "
        "{processor} ({instructions}, {vnni} VNNI), one thread, {versions}; medians of {rounds} "
        "rounds in turns, {date}."
    ).format_map({**result["machine"], **result, **named})
    return markdown(frame)


def pruning_table(result: Mapping[str, Any]) -> pd.DataFrame:
    """What pruning saves, by search: of what benchmarks/pruning.py wrote as JSON."""
    frame = pd.DataFrame(result["rows"])
    rows = []
    for seed, searches in frame.groupby("seed"):
        row = {"sampler's seed": seed}
        full = searches["epochs"].max()
        for prune, epochs, best in searches[["prune", "epochs", "best"]].itertuples(index=False):
            share = f" for {100 * epochs / full:.0f} % of the epochs" if epochs < full else ""
            row["no pruning" if prune == "none" else prune] = f"{best:.1f} %{share}"
        rows.append(row)
    table = pd.DataFrame(rows, dtype="str")
    table.attrs["note"] = (
        f"{title('cifar10', result['limit'])}: the best accuracy of the "
        f"{frame['trials'].max()} trials, counted on {result['limit'] // 10} validation images, of "
        f"[pruning.yaml](../studies/pruning.yaml), {result['date']}."
    )
    return table


def overhead_table(result: Mapping[str, Any]) -> pd.DataFrame:
    """What the queue costs: of what benchmarks/queue_overhead.py wrote as JSON."""
    frame = pd.DataFrame(result["rows"])
    frame["milliseconds"] = (1000 * frame["training"]).map("{:,.0f}".format)
    table = frame.pivot_table(
        index=["trials", "workers"], columns="database", values="milliseconds", aggfunc="first"
    )
    table = table.sort_index().reset_index().rename_axis(None, axis=1)
    table.attrs["note"] = (
        "Milliseconds per trial that does nothing, mean of the first 50 of a queue of that "
        "length: Optuna reads all that wait to take one. Server and workers share one machine "
        f"of {result['cores']} cores; optuna {result['optuna']}, "
        f"{result['date']}."
    )
    return table


# --------------------------------------------------------------------------------------- figures


def _figures() -> Iterator[tuple[Path, Figure]]:
    runs = analysis.find_runs(RESULTS)
    seeds = Counter(run.kind for run in runs if run.recipe["name"] in RECIPES)
    presets = [run for run in runs if seeds[run.kind] > 1]
    sizes = analysis.published_study("family")
    for cost, name in (("parameters", "accuracy"), ("multiply_adds", "accuracy-multiply-adds")):
        yield RESULTS / f"{name}.png", analysis.plot_accuracy_vs_cost(presets, cost, sizes)
    yield RESULTS / "reference.png", _plot_baselines(runs)
    yield RESULTS / "reference-start.png", analysis.plot_start(_starts(runs))
    for run in runs:
        yield run.folder / "curves.png", analysis.plot_history(run)
    for name, varied in compared_studies().items():
        title = f"Study {name}: gains over its base"
        yield STUDIES / name / "study.png", analysis.plot_study(varied, title)
        if (study := load_study(_ROOT / "studies" / f"{name}.yaml")).search:
            search = analysis.load_search(study, storage=recorded(STUDIES / name))
            for what in analysis.SEARCH_FIGURES:
                yield STUDIES / name / f"{what}.png", analysis.plot_search(search, what)


def _plot_baselines(runs: list[Run]) -> Figure:
    """Their curves, from where they differ on; the published log has no training loss."""
    figure = analysis.plot_history(_baselines(runs))
    loss, accuracy, _ = figure.axes
    loss.set_ylim(0.35, 1)
    accuracy.set_ylim(65, 88)
    return figure


# ------------------------------------------------------------------------------------------ runs


def compared_studies() -> Studies:
    """The runs of each published study that compares on validation, by its name.

    That is all but `reference`, whose five epochs at one high learning rate are compared by their
    training accuracy, in docs/reference.md.
    """
    names = sorted(folder.name for folder in STUDIES.iterdir() if folder.is_dir())
    return {name: analysis.published_study(name) for name in names if name != "reference"}


def published_runs() -> list[Run]:
    """All of results/, those of studies included."""
    return analysis.load_runs(sorted(file.parent for file in RESULTS.rglob("config.json")))


def verify(runs: Iterable[Run] | None = None) -> None:
    """Evaluate published weights on the real images, and compare with their metrics.

    They may differ by 0.01 points of accuracy or 0.001 of loss.

    Args:
        runs: None is all of results/.

    Raises:
        RuntimeError: some differ; they are named. DataError: CIFAR-10 can't be had.
    """
    data, wrong = load("cifar10"), []
    for run in published_runs() if runs is None else runs:
        name = shown(run.folder)
        if run.metrics is None or run.metrics["test_acc"] is None:
            why = "unfinished" if run.metrics is None else "it left the test set alone"
            print(f"{name}: {why}, not verified")
            continue
        for metric, measured in measure(run, data).items():
            claimed, allowed = run.metrics[metric], 0.001 if metric == "test_loss" else 0.01
            agrees = abs(measured - claimed) <= allowed + 1e-9
            said = f"{name}: {metric} {measured:.4f} measured, {claimed:.4f} claimed"
            print(said if agrees else f"{said}  <- differs", flush=True)
            if not agrees:
                wrong.append(str(name))
    if wrong:
        raise RuntimeError(f"figures of these weights aren't those claimed: {', '.join(wrong)}")


def measure(run: Run, data: Data) -> dict[str, float]:
    """What tables quote of a run, evaluated on `data`, by its name in metrics.json."""
    model, splits = load_pretrained(run.folder), run.splits(data)
    figures = test_figures(model, splits)
    if run.protocol == "val" and splits.selection is not None:
        figures["val_acc"] = evaluate(model, *splits.selection, run.stats)[1]
    return figures
