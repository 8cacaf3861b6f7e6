"""The installed package: its names, its weights, and a user's own files beside it."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tinycifar.paths import CHECKOUT

SCRIPT = """
import sys, tiny_cifar10_net, tinycifar
from pathlib import Path
from tinycifar import analysis, get_recipe, load_pretrained, load_run, predict, run_directory, train
from tinycifar.data import load

for module in (tinycifar, tiny_cifar10_net):
    assert module.__file__.startswith(sys.argv[1])
data = load("shapes", limit=100)
for preset in run_directory.PRETRAINED:
    assert len(predict(data.test_images[0], load_pretrained(preset), top=3)) == 3
assert run_directory.find_run(get_recipe("taught").teacher).is_relative_to(sys.argv[1])
recipe = get_recipe("quick", name="mine", epochs=1, network="4 8s2")
train(recipe, dataset=data, device="cpu", progress=False)
run = load_run("runs/mine-val-seed0")
assert run.folder == Path.cwd() / "runs" / "mine-val-seed0"
assert "mine" in analysis.markdown(analysis.runs_table([run, load_run("tuned")]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a build leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "augment.py", "tiny_cifar10_net.py"):
        shutil.copy(CHECKOUT / name, source)
    for name in ("tinycifar", "results"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / name, source / name, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(source / "dist"), str(source)], check=True)
    return next((source / "dist").glob("*.whl"))


def test_the_wheel_holds_the_package_and_the_weights_of_the_presets(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {file.filename: file.file_size for file in archive.infolist()}
    names = [name for name in sizes if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {
        "augment.py",
        "tiny_cifar10_net.py",
        "tinycifar",
    }
    results = [name for name in names if name.startswith("tinycifar/results/")]
    assert {name.split("/")[2] for name in results if name.count("/") > 2} == {
        "baseline-val",
        "int8-seed0",
        "quick",
        "sprint-seed0",
        "studies",
        "taught-seed2",
        "tuned-seed0",
    }
    code = {
        path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "tinycifar").rglob("*.py")
    }
    assert set(names) - set(results) == code | {"augment.py", "tiny_cifar10_net.py"}
    assert {name.rpartition(".")[2] for name in results} == {"csv", "json", "pt"}
    assert sum(sizes[name] for name in results) < 2_000_000


def test_it_works_beside_a_users_own_modules(wheel, tmp_path):
    installed, mine = tmp_path / "installed", tmp_path / "mine"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(installed), str(wheel)], check=True)
    [distribution] = importlib.metadata.distributions(path=[str(installed)])
    top = {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}
    assert {name for name in top if not name.endswith(("-info", "__pycache__"))} == {
        "augment.py",
        "tiny_cifar10_net.py",
        "tinycifar",
    }
    for name in ("training", "engine", "study", "data", "analysis/__init__"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / f"{name}.py").write_text("raise ImportError('this is the user\\'s own')")
    (mine / "script.py").write_text(SCRIPT)
    # This environment's packages serve, but not its copy of the project: the target comes first.
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "script.py", str(installed)], cwd=mine, env=environment, check=True
    )
    assert (mine / "runs" / "mine-val-seed0" / "metrics.json").is_file()
