"""Each notebook is run by papermill on a small case, and run again under strict nbval.

nbval compares every output of every cell with the first run's, so that anything that doesn't
repeat, anywhere, fails here. Images can't be compared; that they were drawn is.
"""

import json
import re
import subprocess
import sys

import nbformat
import pytest

from tinycifar import notebooks

SMALL = {
    "stats": {"limit": 500, "policies": ["none", "reference"]},
    "training": {"limit": 200, "epochs": 2, "batch_size": 60, "policy": "reference"},
    "analysis": {},
    "tuning_CNN_CIFAR10": {"limit": 200, "epochs": 1},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """All four, executed; in a folder whose name has a space."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    settings = {"dataset": "shapes", "recipe": "quick", "protocol": "val", "seed": 0}
    settings |= {"force": True, "device": "cpu"}
    for name, extra in SMALL.items():
        into = folder / "tour" if name == "tuning_CNN_CIFAR10" else folder
        notebooks.run_notebooks([name], into, settings, extra)
    (folder / "tour" / "tuning_CNN_CIFAR10.ipynb").rename(folder / "tuning_CNN_CIFAR10.ipynb")
    return folder


def nbval(notebook):
    command = [sys.executable, "-m", "pytest", "--nbval", "-q", "-p", "no:cacheprovider"]
    limits = ["--nbval-cell-timeout=300", "--nbval-kernel-name=python3", "-x"]
    return subprocess.run(
        [*command, *limits, str(notebook)], capture_output=True, text=True, cwd=notebook.parent
    )


def code_cells(notebook):
    return [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("name", SMALL)
def test_it_repeats_cell_by_cell(run_dir, name):
    result = nbval(run_dir / f"{name}.ipynb")
    assert result.returncode == 0, result.stdout[-3000:]
    passed = int(re.search(r"(\d+) passed", result.stdout)[1])
    assert passed == len(code_cells(run_dir / f"{name}.ipynb"))


@pytest.mark.parametrize(
    ("name", "images"),
    [("stats", 3), ("training", 4), ("analysis", 8), ("tuning_CNN_CIFAR10", 6)],
)
def test_every_image_was_drawn_and_nothing_warned(run_dir, name, images):
    outputs = [o for cell in code_cells(run_dir / f"{name}.ipynb") for o in cell.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == images
    assert [o["text"] for o in outputs if o.get("name") == "stderr"] == []


def test_the_stand_in_is_never_passed_off_as_cifar10(run_dir):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["dataset"] == "shapes"
    for name in SMALL:
        assert "NOT CIFAR-10" in (run_dir / f"{name}.ipynb").read_text()


def test_this_check_can_fail(tmp_path):
    cell = nbformat.v4.new_code_cell("print(1)", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="2\n")]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(notebook, tmp_path / "wrong.ipynb")
    assert nbval(tmp_path / "wrong.ipynb").returncode == 1
