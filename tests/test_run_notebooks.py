"""Running notebooks headless: names are checked, errors are short, good notebooks are kept."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import nbformat
import pytest

from tinycifar import run_directory
from tinycifar import notebooks
from tinycifar.recipes import RECIPES
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
        ("none", "none"),  # a policy
        ("one_cycle", "one_cycle"),
        ("['none', 'light']", ["none", "light"]),
        ("{{1}}", "{{1}}"),  # Python, but no value of it
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
        (["--dataset", "cifar"], "error: unknown dataset 'cifar'; valid: .*cifar10"),
        (["--device", "gpu"], "error: unknown device 'gpu'; valid: auto, cpu"),
        (["--force", "no"], "error: FORCE must be 0 or 1, not 'no'"),
        (["-p", "force", "2"], "error: FORCE must be 0 or 1, not 2"),
        (["-p", "protocol", "test"], "error: unknown protocol 'test'"),
        (["-p", "changes", "{'optimiser': 'sgd'}"], "error: unknown recipe field 'optimiser'"),
        (["-p", "changes", "muon"], "error: changes must be a mapping .* got 'muon'"),
        (["-p", "epochs", "3", "-p", "changes", "{'epochs': 9}"], "error: epochs: given both"),
    ],
)
def test_what_training_would_refuse_is_refused_at_once(in_this_process, tmp_path, settings, says):
    with pytest.raises(SystemExit, match=says):
        run_notebook.main(["stats", "training", "--run", str(tmp_path / "run"), *settings])
    assert not (tmp_path / "run").exists()


def test_values_of_the_recipe_are_refused_at_once_and_name_the_folder(in_this_process):
    settings = {"recipe": "quick", "protocol": "val", "seed": 1, "run_dir": ""}
    settings |= {"dataset": "auto", "device": "auto", "force": False}
    folder = run_notebook._run_dir(["training"], dict(settings), {"epochs": 9, "limit": 200})
    assert folder.name == "quick-epochs=9-val-seed1"
    changes = {"epochs": None, "changes": {"optimizer": "adamw", "epochs": 9}}
    folder = run_notebook._run_dir(["training"], dict(settings), changes)
    assert folder.name == "quick-epochs=9,optimizer=adamw-val-seed1"
    with pytest.raises(ValueError, match="epochs must be a whole number from 1"):
        run_notebook._run_dir(["training"], dict(settings), {"epochs": 0})
    numbered = run_notebook._run_dir(["training"], settings | {"run_dir": 2024}, {})
    assert numbered.name == "2024"  # as -p run_dir 2024 reads it
    assert run_notebook._run_dir(["tuning_CNN_CIFAR10"], settings, {}).name == "tour"


def test_a_limit_that_takes_all_is_none(in_this_process, a_run):
    settings = {"recipe": "quick", "protocol": "val", "seed": 0, "run_dir": str(a_run)}
    settings |= {"dataset": "shapes", "device": "auto", "force": False}
    assert run_notebook._run_dir(["training"], dict(settings), {"limit": 10_000}) == a_run
    with pytest.raises(run_directory.RunError, match="limit is None there and 200 now"):
        run_notebook._run_dir(["training"], settings, {"limit": 200})


def test_a_terminal_without_a_name_stops_nothing(monkeypatch):
    def nameless(_):
        raise OSError(19, "No such device")

    monkeypatch.setattr(run_notebook.os, "ttyname", nameless)
    monkeypatch.setattr(run_notebook.sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.delenv("PROGRESS_TTY", raising=False)
    with warnings.catch_warnings():
        run_notebook._draw_progress_on_the_terminal()
    assert run_notebook.os.environ["TQDM_DISABLE"] == "1"


@pytest.fixture
def a_run(tmp_path):
    """What tells a finished run of `quick` from another."""
    config = {"recipe": {**asdict(RECIPES["quick"])}, "seed": 0, "protocol": "val"}
    config |= {"dataset": "shapes", "limit": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["--seed", "1"], "seed is 0 there and 1 now"),
        (["--recipe", "tuned"], "recipe.epochs is 8 there and 50 now"),
        (["--dataset", "cifar10"], "dataset is 'shapes' there and 'cifar10' now"),
        (["-p", "limit", "2000"], "limit is None there and 2000 now"),
    ],
)
def test_another_run_is_refused_before_its_notebooks_are_touched(
    in_this_process, a_run, settings, says
):
    with pytest.raises(SystemExit, match=says):
        run_notebook.main(["stats", "training", "analysis", "--run", str(a_run), *settings])
    assert {p.name for p in a_run.iterdir()} == {"config.json", "metrics.json"}


def test_a_run_of_these_settings_is_gone_on_with(in_this_process, a_run, monkeypatch):
    executed = []
    monkeypatch.setattr(run_notebook, "_execute", lambda name, *_: executed.append(name))
    names = ["stats", "training", "analysis"]
    run_notebook.main([*names, "--run", str(a_run)])
    (a_run / "analysis.html").write_text("of the run before")
    run_notebook.main([*names, "--run", str(a_run), "--recipe", "tuned", "--force", "1"])
    assert not (a_run / "analysis.html").exists()
    run_notebook.main(["analysis", "--run", str(a_run), "--recipe", "tuned"])  # looks at what it is
    assert executed == [*names, *names, "analysis"]


def test_analysis_needs_a_run(in_this_process, tmp_path):
    with pytest.raises(SystemExit, match=r"error: no run in .*typo: train it first"):
        run_notebook.main(["analysis", "--run", str(tmp_path / "typo")])
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("failure", [RuntimeError("no room"), KeyboardInterrupt()], ids=repr)
def test_whoever_forced_is_told_not_to_do_so_twice(in_this_process, a_run, monkeypatch, failure):
    """The new run is trained, and then a notebook fails, or is interrupted."""

    def fails(name, run_dir, *_):
        (run_dir / "metrics.json").touch()
        raise failure

    monkeypatch.setattr(run_notebook, "_execute", fails)
    for force in (["--force", "1"], ["-p", "force", "True"]):
        with pytest.raises(SystemExit, match="leave out FORCE=1"):
            run_notebook.main(["training", "--run", str(a_run), *force])
    with pytest.raises(SystemExit) as caught:
        run_notebook.main(["training", "--run", str(a_run)])
    assert "FORCE" not in str(caught.value)
