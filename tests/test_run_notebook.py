"""Running notebooks headless: names are checked, errors are short, good notebooks are kept."""

from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest

import run_notebook
from run_notebook import _literal, run_notebooks


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Two small notebooks in place of the project's own."""
    monkeypatch.setattr(run_notebook, "NOTEBOOKS", tmp_path)
    for name, source in {"count": "print('counted', n)", "divide": "1 / n"}.items():
        parameters = nbformat.v4.new_code_cell("n = 1  # a number\nrun_dir = None")
        parameters.metadata["tags"] = ["parameters"]
        cells = [parameters, nbformat.v4.new_code_cell(source)]
        metadata = {
            "kernelspec": {"name": "python3", "display_name": "Python 3"},
            "language_info": {"name": "python"},
        }
        notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch):
    """Settings are checked where the test runs: another process takes seconds to import torch."""
    pool = lambda workers, context: ThreadPoolExecutor(workers)  # noqa: E731
    monkeypatch.setattr(run_notebook, "ProcessPoolExecutor", pool)


def test_parameters_reach_the_notebook_and_prints_the_terminal(notebooks, tmp_path, capsys):
    run_notebooks(["count"], tmp_path / "a run", {"n": 2, "other": "not its own"}, {"n": 7})
    assert "counted 7" in capsys.readouterr().out
    executed = (tmp_path / "a run" / "count.ipynb").read_text()
    assert "counted 7" in executed
    assert "put_path" not in executed, "papermill notes the full paths of this machine"
    assert "counted 7" in (tmp_path / "a run" / "count.html").read_text()


def test_an_unknown_parameter_stops_before_anything_runs(notebooks, tmp_path):
    with pytest.raises(ValueError, match=r"no parameter 'm' in count, divide; valid: n, run_dir"):
        run_notebooks(["count", "divide"], tmp_path / "run", {}, {"m": 7})
    assert not (tmp_path / "run").exists()


def test_an_unknown_notebook_lists_the_valid_names(notebooks, tmp_path):
    with pytest.raises(ValueError, match="no notebook 'cuont'; valid: count, divide"):
        run_notebooks(["cuont"], tmp_path / "run", {}, {})


def test_a_failed_notebook_says_why_and_keeps_the_good_one(notebooks, tmp_path):
    run_notebooks(["divide"], tmp_path / "run", {}, {})
    good = (tmp_path / "run" / "divide.ipynb").read_bytes()
    with pytest.raises(RuntimeError, match=r"division by zero .ZeroDivisionError; see divide.runn"):
        run_notebooks(["divide"], tmp_path / "run", {}, {"n": 0})
    assert (tmp_path / "run" / "divide.ipynb").read_bytes() == good


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("1e-3", 1e-3),
        ("False", False),
        ("false", False),
        ("None", None),
        ("one_cycle", "one_cycle"),
        ("['none', 'light']", ["none", "light"]),
    ],
)
def test_values_are_what_they_look_like(text, value):
    assert _literal(text) == value


def test_the_command_line_ends_with_one_sentence(tmp_path):
    arguments = ["training", "--run", str(tmp_path / "run"), "-p", "epoch", "1"]
    with pytest.raises(
        SystemExit, match=r"^error: no parameter 'epoch' in training; valid: .*epochs"
    ):
        run_notebook.main(arguments)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["--recipe", "quik"], "error: unknown recipe 'quik'; valid: baseline, quick"),
        (["--protocol", "test"], "error: unknown protocol 'test'; valid: val, full, test-selected"),
        (["--seed", "one"], "error: seed must be a whole number from 0"),
        (["--force", "no"], "error: FORCE must be 0 or 1, not 'no'"),
        (["-p", "protocol", "test"], "error: unknown protocol 'test'"),
        (["-p", "changes", "{'optimiser': 'sgd'}"], "error: unknown recipe field 'optimiser'"),
        (["-p", "changes", "muon"], "error: changes must be a mapping .* got 'muon'"),
    ],
)
def test_what_training_would_refuse_is_refused_at_once(in_this_process, tmp_path, settings, says):
    with pytest.raises(SystemExit, match=says):
        run_notebook.main(["stats", "training", "--run", str(tmp_path / "run"), *settings])
    assert not (tmp_path / "run").exists()


def test_values_of_the_recipe_are_refused_at_once_and_name_the_folder(in_this_process):
    settings = {"recipe": "quick", "protocol": "val", "seed": 1, "run_dir": ""}
    folder = run_notebook._run_dir(["training"], dict(settings), {"epochs": 9, "limit": 200})
    assert folder.name == "quick-epochs=9-val-seed1"
    changes = {"epochs": None, "changes": {"optimizer": "adamw", "epochs": 9}}
    folder = run_notebook._run_dir(["training"], dict(settings), changes)
    assert folder.name == "quick-epochs=9,optimizer=adamw-val-seed1"
    with pytest.raises(ValueError, match="epochs must be a whole number from 1"):
        run_notebook._run_dir(["training"], dict(settings), {"epochs": 0})
    assert run_notebook._run_dir(["tuning_CNN_CIFAR10"], settings, {}).name == "tour"


def test_where_training_is_done_only_the_notebooks_left_are_run(tmp_path):
    settings = {"recipe": "quick", "protocol": "val", "seed": 0, "force": False}
    names = ["stats", "training", "analysis"]
    assert run_notebook._remaining(names, tmp_path, settings) == names
    for written in ("metrics.json", "stats.ipynb", "training.ipynb"):
        (tmp_path / written).write_text("{}")
    assert run_notebook._remaining(names, tmp_path, settings) == ["analysis"]
    assert run_notebook._remaining(names, tmp_path, settings | {"force": True}) == names


def test_a_finished_run_is_refused_at_once(tmp_path):
    for written in ("metrics.json", "stats.ipynb"):
        (tmp_path / written).write_text("{}")
    with pytest.raises(SystemExit, match=r"error: the run in .* is finished, and kept.*FORCE=1"):
        run_notebook.main(["stats", "training", "--run", str(tmp_path)])
