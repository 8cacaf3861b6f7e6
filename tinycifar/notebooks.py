"""Run notebooks headless, in order, into one run directory.

    python run_notebook.py stats training analysis --recipe quick --seed 1 -p epochs 5

papermill does the work. Added to it: parameter names are checked (papermill only warns of a wrong
one), a failed notebook never replaces a good one, and progress is drawn on the terminal, not in
the saved notebook.
"""

from __future__ import annotations

import argparse
import ast
import logging
import multiprocessing
import os
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tinycifar import run_directory

ROOT = Path(__file__).resolve().parent
NOTEBOOKS = ROOT / "notebooks"
LONGEST = 15  # lines that a cell may print on the terminal; more is a table, for the notebook


def main(argv: list[str] | None = None) -> None:
    args, started = _arguments(argv), time.time() - 1  # the times of files are coarse
    run_dir, settings = None, {}
    try:
        settings, extra = _settings(args)
        run_dir = _run_dir(args.notebooks, settings, extra)  # refuses what training would refuse
        run_notebooks(args.notebooks, run_dir, settings, extra)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}{_do_not_force_again(run_dir, started, settings)}")
    except KeyboardInterrupt:
        advice = _do_not_force_again(run_dir, started, settings)
        sys.exit(f"\ninterrupted; the same command goes on from the last finished epoch{advice}")


def _do_not_force_again(run_dir: Path | None, started: float, settings: dict) -> str:
    """Where the command stopped after it had trained anew: the same would throw that away."""
    metrics = run_dir and run_dir / "metrics.json"
    if (
        settings.get("force")
        and metrics
        and metrics.is_file()
        and metrics.stat().st_mtime >= started
    ):
        return "; the new run is trained: leave out FORCE=1, which would train it once more"
    return ""


def run_notebooks(names: list[str], run_dir: Path, settings: dict, extra: dict) -> None:
    """Execute notebooks/<name>.ipynb for each name, the executed copies going into `run_dir`.

    Args:
        settings: parameters that each notebook takes if it has them.
        extra: parameters that at least one of the notebooks must have.

    Raises:
        ValueError: no such notebook, parameter, recipe or protocol; the message lists the valid
            names.
        RuntimeError: a cell failed; the message is that of its error.
    """
    declared = {name: _declared_parameters(name) for name in names}
    unknown = sorted(extra.keys() - set().union(*declared.values()))
    if unknown:
        valid = ", ".join(sorted(set().union(*declared.values())))
        raise ValueError(f"no parameter {unknown[0]!r} in {', '.join(names)}; valid: {valid}")
    run_dir.mkdir(parents=True, exist_ok=True)
    # A run inside the repository is named from its root, so that notebooks can be moved and shared.
    shown = run_dir.relative_to(ROOT) if run_dir.is_relative_to(ROOT) else run_dir
    given = {**settings, "run_dir": str(shown), **extra}
    _draw_progress_on_the_terminal()
    os.environ.pop("MPLBACKEND", None)  # kernels draw into their notebook, whatever the shell says
    for name in names:
        _say(f"notebooks/{name}.ipynb -> {shown}/{name}.ipynb")
        _execute(name, run_dir, {k: v for k, v in given.items() if k in declared[name]})
        if name == "training" and settings.get("force"):
            for page in ("analysis.ipynb", "analysis.html"):  # of the run that was there before
                (run_dir / page).unlink(missing_ok=True)


def _execute(name: str, run_dir: Path, parameters: dict) -> None:
    import papermill

    finished = run_dir / f"{name}.ipynb"
    running = run_dir / f"{name}.running.ipynb"
    try:
        papermill.execute_notebook(
            NOTEBOOKS / f"{name}.ipynb",
            running,
            parameters,
            kernel_name="python3",
            cwd=ROOT,
            progress_bar=False,
            log_output=True,
            extra_arguments=["--log-level=50"],  # of the kernel itself only what is fatal
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from error
        raise RuntimeError(f"{error.evalue} [{error.ename}; see {running.name}]") from error
    _forget_paths(running)
    os.replace(running, finished)
    write_page(finished)


def write_page(notebook: Path) -> Path:
    """An executed notebook as one HTML file beside it, images inline, for any browser."""
    from nbconvert import HTMLExporter

    page = notebook.with_suffix(".html")
    html, _ = HTMLExporter().from_filename(str(notebook))
    run_directory.write(page, html.encode())
    return page


def _forget_paths(file: Path) -> None:
    """papermill notes the full paths of this machine in a notebook that is meant to be shared."""
    import nbformat

    notebook = nbformat.read(file, as_version=4)
    for key in ("input_path", "output_path"):
        notebook.metadata.get("papermill", {}).pop(key, None)
    nbformat.write(notebook, file)


def _declared_parameters(name: str) -> set[str]:
    import papermill

    file = NOTEBOOKS / f"{name}.ipynb"
    if not file.is_file():
        valid = ", ".join(sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb")))
        raise ValueError(f"no notebook {name!r}; valid: {valid}")
    return set(papermill.inspect_notebook(file))


def _draw_progress_on_the_terminal() -> None:
    """Bars go to the terminal, if there is one; what cells print is passed on as it comes."""
    on_terminal = sys.stderr.isatty()
    try:
        os.environ.setdefault("PROGRESS_TTY", os.ttyname(sys.stderr.fileno()))
    except (AttributeError, OSError):  # Windows; no terminal, or one that has no name here
        os.environ["TQDM_DISABLE"] = "1"
    warnings.filterwarnings("ignore", module="papermill|nbclient|nbformat")
    log = logging.getLogger("papermill")
    handler = logging.StreamHandler(sys.stdout)
    # "\r\033[J": wipe a bar that is being drawn on the line, before printing there.
    handler.setFormatter(logging.Formatter(("\r\033[J" if on_terminal else "") + "  %(message)s"))
    handler.addFilter(_is_output)
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


def _is_output(record: logging.LogRecord) -> bool:
    """What cells print, but for long tables, papermill's own chatter and the reprs of figures."""
    text = record.getMessage()
    if text.count("\n") > LONGEST:
        return False
    chatter = ("Executing", "Ending", "Input Notebook", "Output Notebook", "Working directory")
    record.msg, record.args = text.rstrip().replace("\n", "\n  "), ()
    return bool(text.strip()) and not text.startswith((*chatter, "<Figure", "<IPython"))


def _say(text: str) -> None:
    print(text, flush=True)


# ------------------------------------------------------------------------------------- arguments


def _arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", default=["stats", "training", "analysis"])
    parser.add_argument("--run", default="", help="the run directory")
    parser.add_argument("--recipe", default="quick")
    parser.add_argument("--protocol", default="val")
    parser.add_argument("--dataset", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=_literal, default=0)
    parser.add_argument("--force", type=_literal, default=0)
    parser.add_argument(
        "-p",
        dest="parameters",
        action="append",
        nargs=2,
        metavar=("NAME", "VALUE"),
        default=[],
        help="a parameter of the notebooks, as papermill takes it",
    )
    args = parser.parse_args(argv)
    args.parameters = [(name, _literal(value)) for name, value in args.parameters]
    return args


def _literal(text: str):
    """Numbers, True, False, None and lists as themselves (true and false too); else the text."""
    named = {"true": True, "false": False, "null": None}  # not "none", which is a policy
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def _settings(args) -> tuple[dict, dict]:
    """(the settings that have a name of their own, all other parameters)."""
    names = ("recipe", "protocol", "dataset", "device", "seed", "force")
    settings = {name: getattr(args, name) for name in names} | {"run_dir": args.run}
    extra = dict(args.parameters)
    # What has a name of its own may be given with -p as well.
    settings |= {name: extra.pop(name) for name in list(extra) if name in settings}
    if settings["force"] not in (0, 1):  # True and False are these two
        raise ValueError(f"FORCE must be 0 or 1, not {settings['force']!r}")
    return settings | {"force": bool(settings["force"])}, extra


def _run_dir(names: list[str], settings: dict, extra: dict) -> Path:
    """The folder asked for; else the tour's own, or the one that `train` would choose."""
    given = settings.pop("run_dir")
    if not given and names == ["tuning_CNN_CIFAR10"]:
        given = "runs/tour"
    # In a process that ends: torch takes 0.4 GB, which the notebooks' kernels have better use for.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_checked_run_dir, names, given, settings, extra).result()


def _checked_run_dir(names: list[str], given: str, settings: dict, extra: dict) -> Path:
    """That folder, once it is known that training can use these settings, and there."""
    import tinycifar.data as cifar10
    from tinycifar import recipes
    from tinycifar import training

    fields = recipes.Recipe.__dataclass_fields__
    changes = {k: v for k, v in extra.items() if k in fields and v is not None}
    others = extra.get("changes", {})
    if not isinstance(others, dict):
        raise ValueError(f"changes must be a mapping of a recipe's fields; got {others!r}")
    if twice := sorted(changes.keys() & others.keys()):
        raise ValueError(f"{', '.join(twice)}: given both by itself and in changes; give it once")
    recipe = recipes.get_recipe(settings["recipe"], **changes, **others)
    training.check_settings(recipe, settings["protocol"], settings["seed"])
    training.pick_device(settings["device"])
    recipes.check_choice("dataset", settings["dataset"], cifar10.DATASETS)
    run_dir = training.run_folder(recipe, settings["protocol"], settings["seed"])
    run_dir = ROOT / str(given) if given else run_dir
    trains = {"training", "tuning_CNN_CIFAR10"} & set(names)
    if "analysis" in names and not trains and not (run_dir / "config.json").is_file():
        raise FileNotFoundError(f"no run in {run_dir}: train it first, or name another RUN")
    if trains and not settings["force"]:
        meant = {"recipe": asdict(recipe)}
        meant |= {name: settings[name] for name in ("seed", "protocol")}
        if extra.get("limit") not in cifar10.SIZES.values():  # which may be no limit at all
            meant["limit"] = extra.get("limit")
        if settings["dataset"] != "auto":
            meant["dataset"] = settings["dataset"]
        run_directory.refuse_another_run(run_dir, meant, recipes.DEFAULTS)
    return run_dir


if __name__ == "__main__":
    main()
