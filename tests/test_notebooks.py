"""Each notebook is run by papermill on a small case, and run again under strict nbval.

nbval compares every output of every cell with the first run's, so anything that doesn't repeat
fails here. Images can't be compared; that they were drawn is.
"""

import ast
import json
import multiprocessing
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

import nbformat
import pytest
from helpers import search_study, searched

from tiny_cifar10_net import NetCIFAR10_Tiny
from tinycifar import notebooks
from tinycifar.data import load

TOUR = "tuning_CNN_CIFAR10"
SMALL = {
    "stats": {"limit": 200, "policies": ["none", "reference"]},
    "training": {
        "limit": 100,
        "changes": {"epochs": 2, "batch_size": 60, "policy": "reference"},
    },
    "analysis": {},
    "export": {"images": 20},
    TOUR: {"limit": 100, "changes": {"epochs": 1, "width": 0.25}},
    "study": {},
}
FIGURES = {"stats": 3, "training": 4, "analysis": 8, "export": 2, TOUR: 6, "study": 5}
# Two at a time, as most of it is the start of kernels; two read what `training` trains.
CHAINS = [("training", "analysis", "export"), (TOUR, "stats", "study")]
# Jupyter picks free ports for a kernel, and another process may take one before the kernel does.
NO_PORT = "Kernel died before replying"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The folder of the five, executed; its name has a space."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # a core each
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(execute, CHAINS, [folder, folder]))
        yield folder


def execute(names, folder):
    settings = {"dataset": "shapes", "force": True, "device": "cpu"}
    for name in names:
        into = folder / name if name in (TOUR, "study") else folder
        parameters = dict(SMALL[name])
        if name == "study":
            parameters["study"] = str(search_study(folder))
            searched(parameters["study"], into, load("shapes", limit=200))
        arguments = [name], into, settings | parameters
        try:
            notebooks.run_notebooks(*arguments)
        except RuntimeError as error:
            if NO_PORT not in str(error):
                raise
            notebooks.run_notebooks(*arguments)
        (into / f"{name}.ipynb").rename(folder / f"{name}.ipynb")


@pytest.fixture(scope="module")
def repeated(executed):
    """What nbval says of each."""
    check = lambda names: [(name, nbval(executed / f"{name}.ipynb")) for name in names]  # noqa: E731
    with ThreadPoolExecutor(2) as pool:
        return dict(result for chain in pool.map(check, CHAINS) for result in chain)


def nbval(notebook):
    command = [sys.executable, "-m", "pytest", "--nbval", "-q", "-p", "no:cacheprovider"]
    limits = ["--nbval-cell-timeout=300", "--nbval-current-env", "-x"]
    run = partial(subprocess.run, capture_output=True, text=True, cwd=notebook.parent)
    result = run([*command, *limits, notebook])
    return run([*command, *limits, notebook]) if NO_PORT in result.stdout else result


def code_cells(notebook):
    return [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("name", SMALL)
def test_it_repeats_cell_by_cell(executed, repeated, name):
    result = repeated[name]
    assert result.returncode == 0, result.stdout[-3000:]
    passed = int(re.search(r"(\d+) passed", result.stdout)[1])
    assert passed == len(code_cells(executed / f"{name}.ipynb"))


@pytest.mark.parametrize("name", SMALL)
def test_every_figure_was_drawn_and_nothing_warned(executed, name):
    outputs = [o for cell in code_cells(executed / f"{name}.ipynb") for o in cell.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == FIGURES[name]
    assert [o["text"] for o in outputs if o.get("name") == "stderr"] == []


def test_the_stand_in_is_never_passed_off_as_cifar10(executed):
    metrics = json.loads((executed / "metrics.json").read_text())
    assert metrics["dataset"] == "shapes"
    for name in SMALL:
        assert "NOT CIFAR-10" in (executed / f"{name}.ipynb").read_text()


def test_the_loop_that_the_tour_writes_out_ends_with_the_weights_of_train(executed):
    cells = code_cells(executed / f"{TOUR}.ipynb")
    ids = [cell.id for cell in cells]
    loop, compared = cells[ids.index("loop")], cells[ids.index("loop") + 1]
    assert len(loop.source.splitlines()) <= 25
    assert "loss.backward()" in loop.source
    assert not re.search(r"Trainer|CompiledNetwork|training|\btrain\(", loop.source)
    assert "torch.equal" in compared.source
    n = len(NetCIFAR10_Tiny().state_dict())
    assert compared.outputs[0]["text"] == f"{n} of {n} tensors are equal, bit by bit\n"


@pytest.mark.parametrize("name", SMALL)
def test_it_only_calls_the_package(name):
    for cell in code_cells(notebooks.NOTEBOOKS / f"{name}.ipynb"):
        assert not cell.outputs
        for node in ast.walk(ast.parse(cell.source.replace("%matplotlib inline", ""))):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)
            assert not getattr(node, "attr", "").startswith("_"), "a private name"
            assert ast.unparse(node) != "sys.path"


def test_this_check_can_fail(tmp_path):
    cell = nbformat.v4.new_code_cell("print(1)", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="2\n")]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(notebook, tmp_path / "wrong.ipynb")
    assert nbval(tmp_path / "wrong.ipynb").returncode == 1


def test_a_script_needs_no_main_guard(tmp_path):
    """Spawned processes import it, and would begin once more."""
    script = tmp_path / "script.py"
    script.write_text(
        "from tinycifar.notebooks import run_notebooks\n"
        "run_notebooks(['training'], parameters={'epochs': 0})\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert ended.stderr.endswith("epochs must be a whole number from 1 to 10,000; got 0\n")
