"""What is committed: clean source notebooks, published runs that hold together."""

import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import asdict

import nbformat
import pytest

from tinycifar import analysis
from tinycifar import publish
from tinycifar import run_directory
from tinycifar import training
from tinycifar.recipes import DEFAULTS, RECIPES
from tinycifar.studies import load_study
from tiny_cifar10_net import PRETRAINED, load_pretrained

ROOT = training.ROOT
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Those of a study lie a folder deeper. An unfinished one holds nothing yet that could be wrong.
PUBLISHED = sorted(path.parent for path in (ROOT / "results").rglob("metrics.json"))


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
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"\.PHONY: (.*)", makefile)[1].split()) - {"help"}
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert targets <= set(re.findall(r"make ([a-z-]+)", printed))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda p: p.name)
def test_a_published_run_holds_together(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert metrics["dataset"] == "cifar10" and metrics["limit"] is None
    digest = hashlib.sha256((folder / "best.pt").read_bytes()).hexdigest()
    assert digest == metrics["weights_sha256"]
    rows = (folder / "history.csv").read_text().splitlines()
    assert len(rows) == 1 + metrics["epochs_run"]
    assert config["recipe"]["name"] == metrics["recipe"]
    model = load_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == metrics["params"]


def test_what_is_published_under_a_presets_name_is_of_that_preset():
    """As it is now: who changes a preset has to run it again, or call the older run otherwise."""
    for run in analysis.find_runs(publish.RESULTS):
        recipe = DEFAULTS | run.config["recipe"]
        preset = RECIPES.get(recipe["name"].split("-")[0])
        assert preset is not None, run.name
        changed = {k for k, v in asdict(preset).items() if k != "name" and recipe[k] != v}
        said = set(filter(None, recipe["name"].partition("-")[2].split(",")))
        assert said == {f"{k}={recipe[k]}" for k in changed}, run.name


# All the other runs are verified by make verify-results alone: there may be dozens.
@pytest.mark.parametrize("name", PRETRAINED)
def test_published_weights_reach_the_published_accuracy(name, real):
    model, folder = load_pretrained(name), publish.RESULTS / PRETRAINED[name]
    stats = training.cifar10.Stats(model.mean, model.std)
    loss, accuracy = training.evaluate(model, real.test_images, real.test_labels, stats)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert accuracy == pytest.approx(metrics["test_acc"], abs=0.01)
    assert loss == pytest.approx(metrics["test_loss"], abs=1e-4)


def test_the_tables_are_those_of_the_runs():
    runs = analysis.find_runs(publish.RESULTS)
    for page in (ROOT / "README.md", publish.REFERENCE_PAGE):
        assert page.read_text() == publish.with_tables(page, runs), "stale: run `make results`"
    page = (publish.RESULTS / "README.md").read_text()
    assert page == publish.results_page(runs), "stale: run `make results`"


def test_a_published_run_stands_for_the_base_of_a_study():
    """If it is of that recipe, as results/quick is of the base of studies/ablation.yaml."""
    first, *others = analysis.published_study("ablation")
    assert first.folder == publish.RESULTS / "quick"
    assert first.config["recipe"] == asdict(load_study("studies/ablation.yaml").recipes[0])
    assert all(run.folder.parent == publish.RESULTS / "ablation" for run in others)


def test_a_study_takes_what_another_has_trained(tmp_path, monkeypatch):
    taken = "ablation/batch_128_in_bfloat16-val-seed0"
    shutil.copytree(publish.RESULTS / taken, tmp_path / taken)
    (tmp_path / "ingredients").mkdir()
    monkeypatch.setattr(analysis.runs, "RESULTS", tmp_path)
    [run] = analysis.published_study("ingredients")
    assert run.folder == tmp_path / taken
    assert run.config["recipe"] == asdict(load_study("studies/optim.yaml").recipes[0])


def test_published_studies_hold_only_what_their_files_say():
    for name, runs in publish.studies().items():
        study = load_study(f"studies/{name}.yaml")
        meant = {recipe.name: asdict(recipe) for recipe in study.recipes}
        for run in runs:
            recipe = DEFAULTS | run.config["recipe"]
            assert recipe == meant[recipe["name"]] and run.config["seed"] in study.seeds


def test_the_tables_of_the_studies_are_those_of_their_runs():
    page = publish.STUDY_PAGE.read_text()
    for name, runs in publish.compared_studies().items():
        assert page == publish.with_study(page, name, runs), "stale: run `make results`"


def test_a_table_goes_between_its_marks_and_needs_them():
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb"
    assert publish._between_marks(page, "x", "new\n") == page.replace("old", "new")
    with pytest.raises(ValueError, match="<!-- y -->"):
        publish._between_marks(page, "y", "new\n")


def test_the_readmes_first_paragraphs_quote_the_runs():
    first_screen = (ROOT / "README.md").read_text().split("<!-- results -->")[0]
    for recipe in (
        "baseline-test-selected",
        "baseline-val",
        "quick",
        "sprint",
        "sprint-full",
        "tuned",
    ):
        runs = [publish.RESULTS / recipe, *publish.RESULTS.glob(f"{recipe}-seed*")]
        files = [run / "metrics.json" for run in runs if (run / "metrics.json").is_file()]
        reached = [json.loads(file.read_text())["test_acc"] for file in files]
        assert f"{sum(reached) / len(reached):.2f} %" in first_screen, recipe


def test_verification_finds_the_run_that_claims_too_much(monkeypatch, capsys):
    run = analysis.load_run(publish.RESULTS / "quick")
    monkeypatch.setattr(publish.cifar10, "load", lambda name: None)
    measured = {name: run.metrics[name] for name in ("test_acc", "val_acc")}
    monkeypatch.setattr(publish, "_measured", lambda run, data: measured)
    publish.verify([run])
    assert "differs" not in capsys.readouterr().out
    measured["val_acc"] -= 0.02
    with pytest.raises(RuntimeError, match="results/quick"):
        publish.verify([run])
    assert capsys.readouterr().out.count("<- differs") == 1


def test_published_files_name_no_folder_of_a_machine():
    home = re.compile(r"(?<![\w.:/])/(home|root|Users|work|mnt|tmp)/")
    for path in (ROOT / "results").rglob("*"):
        if path.suffix in {".json", ".csv", ".ipynb", ".md", ".html"}:
            assert not home.search(path.read_text()), f"{path} names a path of a machine"


def test_the_run_directory_is_as_documented():
    documented = set(re.findall(r"^    (\S+\.\w+) ", run_directory.__doc__, re.MULTILINE))
    assert documented == set(run_directory.FILES)
