"""The command line: `python -m tinycifar VERB ...`.

Environment variables can give the options as well: TINYCIFAR_SEED=1. The Makefile passes its
settings on in this way, so that no shell interprets them. An empty variable means the default.
"""

from __future__ import annotations

import ast
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinycifar.checks import check_whole, explained
from tinycifar.paths import DEFAULT

if TYPE_CHECKING:
    from tinycifar.inference import Network

# Heavy modules, torch above all, are imported by the command that needs them, so that help appears
# at once. Help isn't taken from docstrings, which `python -OO` drops.
app = typer.Typer(
    help="Train, evaluate and use tiny networks for CIFAR-10.",
    epilog="Options may also be given in the environment: TINYCIFAR_SEED=1.",
    add_completion=False,
    rich_markup_mode=None,
)


def _option(name: str, help: str, *flags: str, **more: Any) -> Any:
    return typer.Option(*flags, help=help, envvar=f"TINYCIFAR_{name}", show_envvar=False, **more)


def _argument(name: str, help: str) -> Any:
    return typer.Argument(help=help, envvar=f"TINYCIFAR_{name}", show_envvar=False)


def literal(text: Any) -> Any:
    """What a parameter's text means: a value of Python or JSON; else the text itself."""
    for read in (ast.literal_eval, json.loads):
        with suppress(ValueError, SyntaxError, TypeError):
            return read(str(text))
    return text


RecipeName = Annotated[str, _option("RECIPE", "quick, tuned, taught, sprint, baseline or int8")]
Protocol = Annotated[str, _option("PROTOCOL", "val, full or test-selected")]
Dataset = Annotated[str, _option("DATASET", "auto, cifar10 or shapes, the stand-in")]
Limit = Annotated[int | None, _option("LIMIT", "number of training images to use  [all]")]
Seed = Annotated[int, _option("SEED", "from 0 to 2**32 - 1", parser=literal, metavar="N")]
Device = Annotated[str, _option("DEVICE", "auto, cpu, cuda or mps")]
RunDir = Annotated[str, _option("RUN", "the run directory  [runs/RECIPE-PROTOCOL-seedSEED]")]
Force = Annotated[bool, _option("FORCE", "replace a finished or different run")]
Folder = Annotated[str, _option("FOLDER", "folder of the runs  [runs, or runs/<study>]")]
StudyFile = Annotated[str, _option("STUDY", "a study file, as in studies/")]
Storage = Annotated[str, _option("STORAGE", "URL of a database  [SQLite, in the folder]")]
Pairs = Annotated[list[str] | None, typer.Option("-p", metavar="NAME VALUE", help="repeatable")]


@app.command(
    help="Run notebooks headless into one run directory.\n\n"
    "-p gives a parameter of the notebooks, or any field of a recipe, as often as needed."
)
def notebook(
    names: Annotated[list[str] | None, _argument("NB", "[stats training analysis]")] = None,
    recipe: RecipeName = "quick",
    protocol: Protocol = "val",
    dataset: Dataset = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    run: RunDir = "",
    force: Force = False,
    parameters: Pairs = None,
) -> None:
    from tinycifar.notebooks import ALL, run_notebooks

    settings: dict[str, Any] = {"recipe": recipe, "protocol": protocol, "dataset": dataset}
    settings |= {"seed": seed, "device": device, "force": force}
    run_notebooks(names or ALL, run or None, settings | _values(parameters))


@app.command(help="Train a network, without a notebook. -p changes a field of the recipe.")
def train(
    recipe: RecipeName = "quick",
    protocol: Protocol = "val",
    dataset: Dataset = "auto",
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "auto",
    workers: Annotated[int, _option("WORKERS", "loader processes")] = 0,
    run: RunDir = "",
    force: Force = False,
    changes: Pairs = None,
) -> None:
    from tinycifar import data, recipes, training

    values = _values(changes)
    metrics = training.train(
        recipes.get_recipe(recipe, **values),
        run or None,
        seed=seed,
        protocol=protocol,
        dataset=_data(dataset, limit),
        device=device,
        workers=workers,
        force=force,
    )
    on = data.title(metrics["dataset"], metrics["limit"])
    print(f"test accuracy {metrics['test_acc']:.2f} % on {on}")


@app.command(
    help="Train recipes with seeds, or a study, by several workers.\n\n"
    "The same command on another machine, with the same storage and folder, joins in."
)
def sweep(
    names: Annotated[list[str] | None, _argument("RECIPES", "[quick]")] = None,
    seeds: Annotated[list[int] | None, _option("SEEDS", "repeatable  [0 1 2]", "--seed")] = None,
    protocol: Annotated[str, _option("PROTOCOL", "val, full or test-selected  [val]")] = "",
    study: StudyFile = "",
    dataset: Dataset = "auto",
    limit: Limit = None,
    device: Device = "auto",
    folder: Folder = "",
    storage: Storage = "",
    jobs: Annotated[
        int | None, _option("JOBS", "workers  [one a core; on a GPU 8 at most]")
    ] = None,
    threads: Annotated[int, _option("THREADS", "of each worker")] = 1,
    heartbeat: Annotated[int, _option("HEARTBEAT", "seconds between signs of life")] = 20,
) -> None:
    from tinycifar.run_directory import RunError
    from tinycifar.studies import load_study, train_many, train_study

    more: dict[str, Any] = {"device": device, "jobs": jobs, "threads": threads}
    more |= {"dataset": _data(dataset, limit), "storage": storage or None, "heartbeat": heartbeat}
    if not study:
        more |= {"protocol": protocol or "val", "folder": folder or "runs"}
        train_many(names or ["quick"], seeds or [0, 1, 2], **more)
        return
    if names or seeds or protocol:
        raise ValueError(
            "a study names its own recipes and seeds, under val: leave out RECIPES, SEEDS, PROTOCOL"
        )
    loaded = load_study(study)
    into = Path(folder or f"runs/{loaded.name}")
    try:
        train_study(loaded, folder=into, **more)
    except RunError:  # if some runs failed, of the others
        _print_table(loaded, into)
        raise
    _print_table(loaded, into)


def _print_table(study: Any, folder: Path) -> None:
    from tinycifar import analysis  # matplotlib, which the runs do without

    try:
        table = analysis.study_table(analysis.study_runs(study, folder))
        print(f"\n{study.about}\n\n{analysis.markdown(table)}")
    except FileNotFoundError:
        pass  # nothing was trained
    except ValueError as error:  # no run of the base is finished, or one is damaged
        print(f"no table: {error}")


@app.command(help="Look at a study in the browser while it is trained, with optuna-dashboard.")
def dashboard(
    study: StudyFile = "",
    folder: Folder = "",
    storage: Storage = "",
    port: Annotated[int, _option("PORT", "of the page")] = 8080,
) -> None:
    from tinycifar.trials import show_dashboard

    if not (study or folder or storage):
        raise ValueError("name a study, e.g. make dashboard STUDY=studies/mine.yaml")
    show_dashboard(Path(folder or f"runs/{Path(study).stem}"), storage or None, port)


@app.command(hidden=True)
def worker() -> None:
    """What `sweep` starts: train what the plan on standard input says."""
    from tinycifar.trials import work_for_parent

    try:
        work_for_parent()
    except KeyboardInterrupt:
        sys.exit(130)  # our parent says so


@app.command(help="Classify an image with trained weights; or many, into a table.")
def predict(
    images: Annotated[list[str] | None, typer.Argument(help="images of any size, folders")] = None,
    run: Annotated[str, _option("RUN", "a preset, published run or run directory  [taught]")] = "",
    onnx: Annotated[str, _option("ONNX", "instead: a file of make export; needs no torch")] = "",
    top: Annotated[int, _option("TOP", "how many classes of a single image")] = 5,
    csv: Annotated[str, _option("CSV", "write a table to this file  [of several: to stdout]")] = "",
) -> None:
    # Read here, as typer would split it at spaces.
    names = images or list(filter(None, [os.environ.get("TINYCIFAR_IMAGE")]))
    if not names:
        raise ValueError("name an image, e.g. make predict IMAGE=cat.jpg")
    check_whole("top", top, 1)
    if csv and not csv.lower().endswith(".csv"):
        raise ValueError(f"the file of --csv must end in .csv; got {csv}")
    if csv and not Path(csv).parent.is_dir():
        raise FileNotFoundError(f"the folder of --csv isn't there, make it first: {csv}")
    if run and onnx:
        raise ValueError("give --run or --onnx, not both: a file of make export holds its weights")
    from tinycifar import inference

    files = inference.image_files(*names)
    network = inference.load_onnx(onnx) if onnx else _torch_network(run or DEFAULT)
    if len(files) == 1 and not csv:
        [(_, result)] = inference.classify(files, network)
        if isinstance(result, Exception):
            raise result
        for name, probability in inference.likeliest(result, network.classes, top):
            print(f"{probability:7.2%}  {name}")
        return
    with ExitStack() as opened:
        to = opened.enter_context(open(csv, "w", encoding="utf-8")) if csv else sys.stdout
        skipped = inference.write_csv(files, network, to)
    if skipped:
        raise ValueError(f"{skipped:,} of {len(files):,} images could not be read: skipped")


def _torch_network(run: str) -> Network:
    from tiny_cifar10_net import fuse
    from tinycifar import weights

    model = weights.load_pretrained(run)
    with suppress(Exception):  # a network of one's own that torch.fx can't trace
        model = fuse(model)
    return weights.TorchNetwork(model)


@app.command(help="Write a network as ONNX, in float and int8, and measure both files.")
def export(
    run: Annotated[str, _option("RUN", "a preset, a published run or a run directory")] = DEFAULT,
    to: Annotated[str, _option("TO", "the folder to write into")] = "runs/export",
) -> None:
    from tinycifar import export as onnx

    onnx.export(run, to)


@app.command(help="Rebuild the tables and figures of results/ and docs/ from the runs.")
def publish() -> None:
    from tinycifar.publish import rebuild

    rebuild()


@app.command(help="Measure what the model card says, on CIFAR-10, and rebuild what shows it.")
def card() -> None:
    from tinycifar import data, publish
    from tinycifar.card import measure, write

    write(measure(data.load("cifar10")))
    publish.rebuild()


@app.command(help="Evaluate all published weights on the real test set, against their metrics.")
def verify() -> None:
    from tinycifar.publish import verify

    verify()


# ---------------------------------------------------------------------------------------- arguments


def _data(dataset: str, limit: int | None) -> Any:
    """What `train` takes for its data set."""
    from tinycifar.data import load

    return dataset if limit is None else load(dataset, limit=limit)


def _values(parameters: Iterable[str] | None) -> dict[str, Any]:
    values = {}
    for parameter in parameters or ():
        name, equals, text = parameter.partition("=")
        if not equals:
            raise ValueError(f"-p {name} has no value: give -p NAME VALUE")
        values[name] = literal(text)
    return values


def _arguments(argv: Sequence[str]) -> list[str]:
    """The arguments, for `notebook` with those in PARAMS; `-p NAME VALUE` as `-p NAME=VALUE`.

    The former is papermill's form; typer has no repeatable options with two values.
    """
    waiting = list(argv)
    if waiting[:1] == ["notebook"]:
        try:
            waiting += shlex.split(os.environ.get("TINYCIFAR_PARAMS", ""))
        except ValueError as error:
            raise ValueError(f"PARAMS can't be split into words: {error}") from error
    joined: list[str] = []
    while waiting:
        joined.append(waiting.pop(0))
        if joined[-1] == "-p" and len(waiting) > 1 and "=" not in waiting[0]:
            joined.append(f"{waiting.pop(0)}={waiting.pop(0)}")
    return joined


def main(argv: Sequence[str] | None = None) -> None:
    """Carry out a command line; what goes wrong ends it with one line."""
    command = typer.main.get_command(app)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it the way Ctrl-C does
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # if Windows' code page lacks a character
    try:
        arguments = _arguments(sys.argv[1:] if argv is None else argv)
        with command.make_context("python -m tinycifar", arguments or ["--help"]) as context:
            command.invoke(context)
            sys.stdout.flush()
    except typer.Exit as end:  # of --help
        sys.exit(end.exit_code)
    except typer.TyperException as error:
        _end(f"error: {error.format_message()}", error, error.exit_code)
    except KeyboardInterrupt as error:
        _end("interrupted: repeated, a training goes on from its last finished epoch", error, 130)
    except BrokenPipeError:  # of `predict ... | head`: whoever read is content
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        sys.exit(1)
    except (ImportError, MemoryError, OSError, ValueError, RuntimeError) as error:
        _end(f"error: {explained(str(error) or type(error).__name__)}", error, 1)


def _end(message: str, error: BaseException, code: int) -> None:
    print("; ".join([message, *getattr(error, "__notes__", [])]), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
