"""Notebooks run headless, in order, into one run directory.

    run_notebooks(["stats", "training", "analysis"], parameters={"epochs": 5})

papermill does the work. Added to it: parameter names are checked (papermill only warns of a wrong
one), the fields of a recipe count as parameters, a failed notebook never replaces a good one, and
the kernel is the Python that runs this, whatever Jupyter calls `python3`.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tinycifar.paths import CHECKOUT, absolute, home, shown

NOTEBOOKS = (CHECKOUT or Path.cwd()) / "notebooks"
ALL = ("stats", "training", "analysis")
TOUR = "tuning_CNN_CIFAR10"
LONGEST = 15  # lines that a cell may print on the terminal; more is a table, for the notebook

# Parameters that have an option of their own on the command line.
SETTINGS: dict[str, Any] = {"recipe": "quick", "protocol": "val", "dataset": "auto", "seed": 0}
SETTINGS |= {"device": "auto", "force": False}

Parameters = dict[str, Any]


def run_notebooks(
    names: Iterable[str] = ALL,
    run_dir: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> None:
    """Execute notebooks/<name>.ipynb for each name, the executed copies going into `run_dir`.

    Args:
        run_dir: the run directory; None: what `train` would choose, or runs/tour for the tour.
        parameters: changes of SETTINGS, and others, which at least one of the notebooks must have;
            for a notebook that has `changes`, fields of a recipe too.

    Raises:
        ValueError: no such notebook or parameter, or a setting that training would refuse; the
            message lists the valid names. FileNotFoundError: no run to analyse.
        RunError: the run directory holds another run.
        RuntimeError: a cell failed, and the message is that of its error; or a process was killed,
            most likely as memory ran out.
    """
    names = list(names)
    declared = {name: _declared_parameters(name) for name in names}
    given = {**SETTINGS, "run_dir": run_dir, **(parameters or {})}
    command = getattr(sys.modules["__main__"].__spec__, "name", "") == "tinycifar.__main__"
    # A spawned process imports the main module: a script may lack the guard, the command has it.
    apart = command and "torch" not in sys.modules
    folder, settled = (_settle_apart if apart else _settle)(declared, given)
    started = time.time() - 1  # the times of files are coarse
    warnings.filterwarnings("ignore", module="papermill|nbclient|nbformat")
    log = logging.getLogger("papermill")
    log.handlers, log.propagate = [_Terminal()], False
    log.setLevel(logging.INFO)
    try:
        for name in names:
            print(f"notebooks/{name}.ipynb -> {shown(folder)}/{name}.ipynb", flush=True)
            _execute(name, folder, settled[name])
            if settled[name].get("force"):
                for page in ("analysis", "export"):  # of the run that was there before
                    for kind in ("ipynb", "html"):
                        (folder / f"{page}.{kind}").unlink(missing_ok=True)
    except BaseException as error:
        metrics = folder / "metrics.json"
        trained = metrics.is_file() and metrics.stat().st_mtime >= started
        if trained and any(given.get("force") for given in settled.values()):
            error.add_note(
                "the new run is trained: leave out FORCE=1, which would train it once more"
            )
        raise


# ---------------------------------------------------------------------------------- what is given


def _declared_parameters(name: str) -> set[str]:
    import papermill

    file = NOTEBOOKS / f"{name}.ipynb"
    if not file.is_file():
        valid = ", ".join(sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb")))
        raise ValueError(f"no notebook {name!r}; valid: {valid or f'none in {NOTEBOOKS}'}")
    try:
        return set(papermill.inspect_notebook(file))
    except Exception as error:  # of half a dozen kinds, as the damage has it
        raise ValueError(f"{file} is not a notebook: {str(error)[:200]}") from error


def _settle(declared: dict[str, set[str]], given: Parameters) -> tuple[Path, dict[str, Parameters]]:
    """The run directory, and the parameters of each notebook; both checked."""
    from tinycifar.checks import check_choice
    from tinycifar.data import DATASETS, SIZES
    from tinycifar.recipes import Recipe, check_protocol, get_recipe
    from tinycifar.run_directory import RunDirectory
    from tinycifar.training import check_seed, pick_device, run_name

    valid = set().union(*declared.values())
    recipes = {field.name for field in fields(Recipe)} if "changes" in valid else set()
    # What has an option of its own may be given as a parameter as well.
    if unknown := sorted(given.keys() - valid - recipes - SETTINGS.keys() - {"run_dir"}):
        choice = ", ".join(sorted(valid | recipes))
        raise ValueError(f"no parameter {unknown[0]!r} in {', '.join(declared)}; valid: {choice}")
    if given["force"] not in (0, 1):  # True and False are these two
        raise ValueError(f"force must be 0 or 1, not {given['force']!r}")
    given["force"] = bool(given["force"])
    changes = given.pop("changes", {})
    if not isinstance(changes, dict):
        raise ValueError(f"changes must be a mapping of a recipe's fields; got {changes!r}")
    single = {name: given.pop(name) for name in list(given) if name in recipes - valid}
    if twice := sorted(single.keys() & changes.keys()):
        raise ValueError(f"{', '.join(twice)}: given both by itself and in changes; give it once")
    if changes := changes | single:
        given["changes"] = changes

    recipe = get_recipe(given["recipe"], **changes)
    check_protocol(recipe, given["protocol"])
    check_seed(given["seed"])
    pick_device(given["device"])
    check_choice("dataset", given["dataset"], DATASETS)
    name = run_name(recipe, given["protocol"], given["seed"])
    trains = any("force" in names for names in declared.values())
    folder = _folder(list(declared), trains, str(given["run_dir"] or ""), name)
    if trains and not given["force"]:
        meant = {"recipe": asdict(recipe), "seed": given["seed"], "protocol": given["protocol"]}
        if given.get("limit") not in SIZES.values():  # which may be no limit at all
            meant["limit"] = given.get("limit")
        if given["dataset"] != "auto":
            meant["dataset"] = given["dataset"]
        RunDirectory(folder).kept(meant)  # refuses another
    RunDirectory(folder).make()
    given["run_dir"] = str(shown(folder))
    return folder, {
        name: {key: value for key, value in given.items() if key in names}
        for name, names in declared.items()
    }


def _settle_apart(*arguments: Any) -> tuple[Path, dict[str, Parameters]]:
    """`_settle` in a process that ends: kernels have better use for the 0.4 GB that torch takes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_settle, *arguments).result()


def _folder(names: list[str], trains: bool, given: str, default: str) -> Path:
    """The run directory: of a run that is there, or where one may be trained."""
    from tinycifar.run_directory import find_run, new_run

    reads = bool({"analysis", "export"} & set(names)) and not trains
    if given and reads:
        return find_run(given)
    if names == ["study"] and not given:
        raise ValueError("name the folder of a study's runs: make study RUN=runs/mine")
    if names == ["study"] and not absolute(given).is_dir():
        raise FileNotFoundError(f"no folder {absolute(given)}: name that of a study's runs")
    folder = new_run(given or f"runs/{'tour' if names == [TOUR] else default}")
    if reads and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no run in {folder}: train it first, or name another RUN")
    return folder


# --------------------------------------------------------------------------------------- execution


def _execute(name: str, folder: Path, parameters: Parameters) -> None:
    import nbformat
    import papermill
    from nbconvert import HTMLExporter

    finished, running = folder / f"{name}.ipynb", folder / f"{name}.running.ipynb"
    page = running.with_suffix(".html")
    for file in (running, page):  # of a run that failed; or a link, which is never followed
        file.unlink(missing_ok=True)
    try:
        notebook = papermill.execute_notebook(
            NOTEBOOKS / f"{name}.ipynb",
            running,
            parameters,
            kernel_name="python3",
            kernel_manager_class=_kernel_manager(),
            cwd=home(),  # so that relative paths mean what they mean to the caller
            progress_bar=False,
            log_output=True,
            extra_arguments=["--log-level=50"],  # of the kernel itself only what is fatal
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from error
        says = error.evalue or error.ename
        raise RuntimeError(f"{says} [{error.ename}; see {running.name}]") from error
    for key in ("input_path", "output_path"):  # this machine's, in what is meant to be shared
        del notebook.metadata.papermill[key]
    nbformat.write(notebook, running)
    os.replace(running, finished)
    html, _ = HTMLExporter().from_filename(str(finished))  # one file, images inline
    page.write_text(html, encoding="utf-8")
    os.replace(page, finished.with_suffix(".html"))


def _kernel_manager() -> type:
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        """Starts the Python that runs this: a `python3` of Jupyter's may be any other."""

        @property
        def kernel_spec(self) -> KernelSpec:
            # Progress bars would be saved as hundreds of lines; figures go into the notebook.
            inline = "module://matplotlib_inline.backend_inline"
            environment = {"TQDM_DISABLE": "1", "MPLBACKEND": inline}
            # Imports what we can, networks of the caller's own included.
            environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
            return KernelSpec(**get_kernel_dict(), env=environment)

    return ThisPython


class _Terminal(logging.Handler):
    """Prints what cells print, but for long tables, papermill's own chatter and figures' reprs."""

    chatter = ("Executing", "Ending", "Input Notebook", "Output Notebook", "Working directory")

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().rstrip()
        unwanted = text.startswith((*self.chatter, "<Figure", "<IPython"))
        if text and not unwanted and text.count("\n") < LONGEST:
            print(textwrap.indent(text, "  "), flush=True)
