"""What is committed: clean source notebooks, published runs that hold together, plain words."""

import json
import re
import subprocess
from dataclasses import asdict

import nbformat
import pytest

from tinycifar import analysis, publish, run_directory
from tinycifar.paths import CHECKOUT, RESULTS
from tinycifar.recipes import RECIPES, in_full
from tinycifar.run_directory import RunDirectory
from tinycifar.studies import load_study
from tinycifar.weights import load_pretrained

NOTEBOOKS = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))
# Those of a study lie two folders deeper. An unfinished one holds nothing yet that could be wrong.
PUBLISHED = sorted(path.parent for path in RESULTS.rglob("metrics.json"))
STUDIES = sorted(folder.name for folder in publish.STUDIES.iterdir() if folder.is_dir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_source_notebooks_are_clean_and_hold_no_logic(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code:
        assert not re.search(r"^\s*(def|class) |sys\.path", cell.source, re.MULTILINE)


def test_make_alone_explains_every_target():
    makefile = (CHECKOUT / "Makefile").read_text()
    targets = set(re.search(r"\.PHONY: (.*)", makefile)[1].split()) - {"help"}
    made = subprocess.run(["make"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert targets <= set(re.findall(r"make ([a-z-]+)", made.stdout))


def test_the_words_are_the_fields():
    """The terms are image, student, again; notebooks rendered earlier stay as they came out."""
    words = "pict" + "ures?|pu" + "pil|an" + "ew"
    command = ["git", "grep", "-iwIE", words, "--", ".", ":!results/**/*.ipynb"]
    found = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert found.returncode == 1, found.stdout + found.stderr


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda p: p.name)
def test_a_published_run_holds_together(folder):
    run = RunDirectory(folder)
    metrics, config = run.metrics(), run.config()
    assert metrics["dataset"] == "cifar10" and metrics["limit"] is None
    assert len(run.history()) == metrics["epochs_run"]
    assert config["recipe"]["name"] == metrics["recipe"]
    if metrics["test_acc"] is None:  # a trial of a search: its weights aren't published
        return
    assert run.checksum() == metrics["weights_sha256"]
    model = load_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == metrics["params"]


def test_what_is_published_under_a_presets_name_is_of_that_preset():
    """As it is now: who changes a preset has to run it again, or call the older run otherwise."""
    for run in analysis.find_runs(RESULTS):
        preset = RECIPES.get(run.recipe["name"].split("-")[0])
        assert preset is not None, run.name
        changed = {k for k, v in asdict(preset).items() if k != "name" and run.recipe[k] != v}
        said = set(filter(None, run.recipe["name"].partition("-")[2].split(",")))
        assert said == {f"{k}={run.recipe[k]}" for k in changed}, run.name


@pytest.mark.parametrize("name", STUDIES)
def test_published_studies_hold_what_their_files_say(name):
    """But for runs with a field that was taken out since, which no file can name any more."""
    study = load_study(f"studies/{name}.yaml")
    meant = {recipe.name: asdict(recipe) for recipe in study.recipes}
    for run in analysis.published_study(name):
        recipe = in_full(run.recipe)
        if study.search and recipe["name"].startswith("trial_"):
            searched = {name: recipe[name] for name in study.search.ranges}
            assert recipe == meant["base"] | searched | {"name": recipe["name"]}
        elif recipe.keys() == meant["base"].keys():
            assert recipe == meant[recipe["name"]]
            seeds = {seed for recipe, seed in study.runs if recipe.name == run.recipe["name"]}
            assert run.config["seed"] in seeds


def test_a_published_teacher_is_found():
    taught = [run for run in publish.published_runs() if run.recipe["teacher"]]
    assert len(taught) >= 3
    for run in taught:
        teacher = RunDirectory(run_directory.find_run(run.recipe["teacher"]))
        assert teacher.checksum() == run.config["teacher_sha256"]


def test_published_files_name_no_folder_of_a_machine():
    home = re.compile(r"(?<![\w.:/])/(home|root|Users|work|mnt|tmp)/")
    for path in RESULTS.rglob("*"):  # but for notebooks that are running just now
        if path.suffix in {".json", ".csv", ".ipynb", ".md"} and ".running" not in path.name:
            assert not home.search(path.read_text()), f"{path} names a path of a machine"


def test_the_run_directory_is_as_documented():
    page = (CHECKOUT / "docs" / "run-directory.md").read_text()
    for text in (run_directory.__doc__.replace("    ", "  "), page):
        documented = set(re.findall(r"^  (\w+\.(?:json|csv|pt)) ", text, re.MULTILINE))
        assert documented == set(run_directory.FILES)
    assert all(f"`{name}`" in page or name in page for name in run_directory.HISTORY_COLUMNS)
    metrics = json.loads((RESULTS / "tuned-seed0" / "metrics.json").read_text())
    assert {"params", "macs", "test_acc_tta"} <= metrics.keys()
