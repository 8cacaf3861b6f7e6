"""Running notebooks headless: names are checked, errors are short, good notebooks are kept."""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict

import nbformat
import pytest

from tinycifar import notebooks, run_directory
from tinycifar.__main__ import main
from tinycifar.notebooks import run_notebooks
from tinycifar.paths import RESULTS, absolute
from tinycifar.recipes import RECIPES

SOURCES = {
    "count": ("n = 1\nrun_dir = None", "import sys\nprint('counted', n, sys.executable)"),
    "divide": ("n = 1", "1 / n"),
    "where": ("n = 1", "import os, beside\nprint('in', os.getcwd(), beside.WHERE)"),
    "die": ("how = 9", "import os\nos.kill(os.getpid(), how)"),
    "exhaust": ("n = 1", "raise MemoryError"),
    "learn": ("changes = {}\nforce = False\nlr = None", "print('learns', lr, changes)"),
    "wait": (
        "file = ''",
        "import os, time\nprint(os.getpid(), file=open(file, 'w'))\ntime.sleep(60)",
    ),
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Small notebooks in place of the project's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path / "notebooks")
    notebooks.NOTEBOOKS.mkdir()
    for name, (declared, source) in SOURCES.items():
        parameters = nbformat.v4.new_code_cell(declared)
        parameters.metadata["tags"] = ["parameters"]
        metadata = {
            "kernelspec": {"name": "python3", "display_name": "Python 3"},
            "language_info": {"name": "python"},
        }
        cells = [parameters, nbformat.v4.new_code_cell(source)]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
        nbformat.write(notebook, notebooks.NOTEBOOKS / f"{name}.ipynb")


@pytest.fixture
def executed(monkeypatch):
    """Nothing is run; what would be is noted."""
    calls = []
    monkeypatch.setattr(
        notebooks, "_execute", lambda name, folder, given: calls.append((name, given))
    )
    return calls


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 10_000], ids=range(5))
def test_a_file_that_is_no_notebook_is_named(small, tmp_path, content):
    (notebooks.NOTEBOOKS / "count.ipynb").write_bytes(content)
    with pytest.raises(ValueError, match=r"count\.ipynb is not a notebook: "):
        run_notebooks(["count"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_paths_and_imports_mean_the_same_to_the_kernel_as_to_the_caller(
    small, tmp_path, monkeypatch
):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "beside.py").write_text("WHERE = 'lib'")
    monkeypatch.syspath_prepend("lib")
    run_notebooks(["where"], "run")
    assert f"in {tmp_path} lib" in (tmp_path / "run" / "where.ipynb").read_text()


def test_links_are_replaced_and_not_followed(small, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    for name in ("count.running.ipynb", "count.running.html", "count.ipynb", "count.html"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    run_notebooks(["count"], tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "mine"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["count.html", "count.ipynb"]
    assert not any(p.is_symlink() for p in (tmp_path / "run").iterdir())


def test_a_run_directory_that_is_a_link_to_nothing_is_said_to_be(small, tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "unmounted")
    with pytest.raises(run_directory.RunError, match=r"run is a link to .*unmounted, which isn't"):
        run_notebooks(["count"], tmp_path / "run")


@pytest.fixture
def another_python3(tmp_path, monkeypatch):
    """As where somebody installed a kernel from another environment under this name."""
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))


def test_parameters_reach_the_notebook_and_prints_the_terminal(
    small, another_python3, tmp_path, capsys
):
    run_notebooks(["count"], tmp_path / "a run", {"n": 7})
    assert f"counted 7 {sys.executable}" in capsys.readouterr().out
    notebook = (tmp_path / "a run" / "count.ipynb").read_text()
    assert "counted 7" in notebook
    assert "put_path" not in notebook, "papermill notes the full paths of this machine"
    assert "counted 7" in (tmp_path / "a run" / "count.html").read_text()


def test_a_failed_notebook_says_why_and_keeps_the_good_one(small, tmp_path):
    run_notebooks(["divide"], tmp_path / "run")
    good = (tmp_path / "run" / "divide.ipynb").read_bytes()
    with pytest.raises(RuntimeError, match=r"division by zero .ZeroDivisionError; see divide.runn"):
        run_notebooks(["divide"], tmp_path / "run", {"n": 0})
    assert (tmp_path / "run" / "divide.ipynb").read_bytes() == good


@pytest.mark.parametrize("name", ["die", "exhaust"])
def test_want_of_memory_is_named(small, tmp_path, capsys, name):
    """The kernel is killed as the system does where memory runs out; or Python says so."""
    with pytest.raises(SystemExit):
        main(["notebook", name, "--run", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert said.startswith("error: most likely memory ran out (") and said.count("\n") == 1
    assert "the same command goes on" in said


def dies(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_so_is_it_where_the_settings_are_checked(monkeypatch, capsys):
    """In a process of its own, where torch isn't there yet."""
    monkeypatch.setattr(notebooks, "_settle", dies)
    monkeypatch.setattr(notebooks, "run_notebooks", lambda *_: notebooks._settle_apart({}, {}))
    with pytest.raises(SystemExit):
        main(["notebook", "stats"])
    assert "memory ran out (A process in the process pool was" in capsys.readouterr().err


def test_sigterm_ends_the_notebook_too(small, tmp_path, capsys):
    file = tmp_path / "pid"

    def terminate():
        while not (file.is_file() and file.read_text().strip()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(SystemExit) as end:
        main(["notebook", "wait", "--run", str(tmp_path / "run"), "-p", "file", str(file)])
    assert end.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted: repeated, a training goes on")
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_an_unknown_name_stops_before_anything_runs(small, executed, tmp_path):
    with pytest.raises(ValueError, match=r"no parameter 'm' in count, divide; valid: n, run_dir"):
        run_notebooks(["count", "divide"], tmp_path / "run", {"m": 7})
    with pytest.raises(ValueError, match="no parameter 'epochs' in count"):
        run_notebooks(["count"], tmp_path / "run", {"epochs": 7})
    with pytest.raises(ValueError, match=r"no parameter 'epoch' in learn; valid: .*epochs.*width"):
        run_notebooks(["learn"], tmp_path / "run", {"epoch": 7})
    with pytest.raises(ValueError, match=r"no notebook 'cuont'; valid: count, .*learn"):
        run_notebooks(["cuont"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fields_of_a_recipe_become_changes(small, executed, tmp_path):
    extra = {"lr": 0.5, "epochs": 9, "n": 2, "changes": {"optimizer": "adamw"}}
    run_notebooks(["learn", "count"], tmp_path / "run", extra)
    (_, learn), (_, count) = executed
    assert learn["changes"] == {"optimizer": "adamw", "epochs": 9}
    assert learn["lr"] == 0.5, "the notebook has a parameter of that name"
    assert count == {"n": 2, "run_dir": "run"}, "as seen from beside the notebooks"


def given(executed):
    return executed[-1][1]


def test_the_folder_is_named_after_what_is_trained(executed, monkeypatch, tmp_path):
    monkeypatch.setattr(run_directory, "new_run", lambda name: tmp_path / name)
    run_notebooks(["training"], None, {"seed": 1, "epochs": 9, "limit": 200})
    assert given(executed)["run_dir"] == str(tmp_path / "runs/quick-epochs=9-val-seed1")
    run_notebooks(["training"], None, {"epochs": 9, "changes": {"optimizer": "adamw"}})
    assert given(executed)["run_dir"] == str(
        tmp_path / "runs/quick-epochs=9,optimizer=adamw-val-seed0"
    )
    run_notebooks(["training"], 2024)
    assert given(executed)["run_dir"] == str(tmp_path / "2024")
    run_notebooks(["tuning_CNN_CIFAR10"])
    assert given(executed)["run_dir"] == str(tmp_path / "runs/tour")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["--recipe", "quik"], "unknown recipe 'quik'; valid: baseline, quick"),
        (["--protocol", "test"], "unknown protocol 'test'; valid: val, full, test-selected"),
        (["--seed", "one"], "seed must be a whole number from 0"),
        (["--dataset", "cifar"], "unknown dataset 'cifar'; valid: auto, cifar10, shapes"),
        (["--device", "gpu"], "unknown device 'gpu'; valid: auto, cpu"),
        (["-p", "force", "2"], "force must be 0 or 1, not 2"),
        (["-p", "protocol", "test"], "unknown protocol 'test'"),
        (["-p", "epochs", "0"], "epochs must be a whole number from 1"),
        (["-p", "changes", "{'optimiser': 'sgd'}"], "unknown recipe field 'optimiser'"),
        (["-p", "changes", "muon"], "changes must be a mapping of a recipe's fields; got 'muon'"),
        (["-p", "epochs", "3", "-p", "changes", '{"epochs": 9}'], "epochs: given both by itself"),
        (["--run", "quick"], "'quick' is the name of a published run: train into another folder"),
    ],
)
def test_what_training_would_refuse_is_refused_at_once(executed, tmp_path, capsys, settings, says):
    with pytest.raises(SystemExit) as end:
        main(["notebook", "stats", "training", "--run", str(tmp_path / "run"), *settings])
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.startswith(f"error: {says}") and said.count("\n") == 1
    assert not (tmp_path / "run").exists() and not executed


@pytest.fixture
def a_run(tmp_path):
    """What tells a finished run of `quick` from another."""
    folder = tmp_path / "a run"
    folder.mkdir()
    config = {"recipe": asdict(RECIPES["quick"]), "seed": 0, "protocol": "val", "split": {}}
    config |= {"dataset": "shapes", "limit": None, "data_sha256": "0" * 64, "classes": []}
    config |= {"mean": [0.5] * 3, "std": [0.2] * 3, "model": {}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text((RESULTS / "quick" / "metrics.json").read_text())
    return folder


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seed": 1}, "seed is 0 there and 1 now"),
        ({"recipe": "tuned"}, "recipe.epochs is 8 there and 50 now"),
        ({"dataset": "cifar10"}, "dataset is 'shapes' there and 'cifar10' now"),
        ({"limit": 2000}, "limit is None there and 2000 now"),
    ],
)
def test_another_run_is_refused_before_its_notebooks_are_touched(executed, a_run, settings, says):
    with pytest.raises(run_directory.RunError, match=says):
        run_notebooks(notebooks.ALL, a_run, settings)
    assert not executed


def test_a_run_of_these_settings_is_resumed(executed, a_run):
    run_notebooks(notebooks.ALL, a_run)
    run_notebooks(["training"], a_run, {"dataset": "shapes", "limit": 10_000})  # which is all
    for page in ("analysis.html", "export.ipynb"):
        (a_run / page).write_text("of the run before")
    run_notebooks(notebooks.ALL, a_run, {"recipe": "tuned", "force": 1})
    assert not list(a_run.glob("*.html")) + list(a_run.glob("export.ipynb"))
    run_notebooks(["analysis"], a_run, {"recipe": "tuned"})  # looks at what is there
    names = [*notebooks.ALL, "training", *notebooks.ALL, "analysis"]
    assert [name for name, _ in executed] == names


def test_analysis_needs_a_run_and_takes_what_everything_takes(executed, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run at .*typo.*or a published one: taught"):
        run_notebooks(["analysis"], tmp_path / "typo")
    with pytest.raises(FileNotFoundError, match=r"no run in .*runs/quick-val-seed987: train it"):
        run_notebooks(["analysis"], None, {"seed": 987})
    with pytest.raises(FileNotFoundError, match=r"no folder .*typo: name that of a study's runs"):
        run_notebooks(["study"], tmp_path / "typo")
    assert not executed and not (tmp_path / "typo").exists()
    run_notebooks(["analysis"], "tuned")
    assert absolute(given(executed)["run_dir"]) == run_directory.find_run("tuned")


@pytest.mark.parametrize("failure", [RuntimeError("no room"), KeyboardInterrupt()], ids=repr)
def test_whoever_forced_is_told_not_to_do_so_twice(a_run, monkeypatch, capsys, failure):
    """The new run is trained, and then a notebook fails, or is interrupted."""

    def fails(name, folder, parameters):
        (folder / "metrics.json").touch()
        raise failure

    monkeypatch.setattr(notebooks, "_execute", fails)
    for force in (["--force"], ["-p", "force", "True"], []):
        failure.__notes__ = []
        with pytest.raises(SystemExit):
            main(["notebook", "training", "--run", str(a_run), *force])
        assert ("leave out FORCE=1" in capsys.readouterr().err) == bool(force)
