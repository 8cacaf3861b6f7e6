"""Studies: files that say what to train, and the tables and figures of what came of them."""

import subprocess

import pytest
import yaml

from tinycifar import studies
from tinycifar.recipes import RECIPES, get_recipe
from tinycifar.studies import ROOT, load_study
from tiny_cifar10_net import run_path

SMALL = {
    "about": "Is a higher rate better?",
    "base": "quick",
    "always": {"epochs": 1, "start_side": 32},
    "seeds": [0, 1],
    "variations": {"lr 0.1": {"lr": 0.1}, "no dilation": {"dilated": False}},
}


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        content = {k: v for k, v in {**SMALL, **changes}.items() if v is not None}
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "small.yaml"

    return write


def test_a_study_is_recipes_and_seeds(write):
    study = load_study(write())
    base = get_recipe("quick", name="base", epochs=1, start_side=32)
    assert study.recipes == (
        base,
        get_recipe(base, name="lr_0.1", lr=0.1),
        get_recipe(base, name="no_dilation", dilated=False),
    )
    assert (study.name, study.seeds) == ("small", (0, 1))


def test_null_is_a_change_as_well(write):
    always = {"stop_patience": None, "ema": 0.9}
    study = load_study(write(base="baseline", always=always, variations={"x": {"ema": None}}))
    assert [r.stop_patience for r in study.recipes] == [None, None]
    assert [r.ema for r in study.recipes] == [0.9, None]


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_studies_here_can_be_run(file):
    study = load_study(file.relative_to(ROOT))
    for teacher in {recipe.teacher for recipe in study.recipes} - {None}:
        assert (run_path(teacher) / "metrics.json").is_file(), teacher


def test_numbers_are_numbers(write):
    file = write()
    file.write_text(file.read_text().replace("lr: 0.1", "lr: 1e-3"))
    assert load_study(file).recipes[1].lr == 1e-3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base": None}, "no 'base'; a study has about, always, base"),
        ({"sedes": [1]}, "unknown key 'sedes'"),
        ({"base": "slow"}, f"unknown recipe 'slow'; valid: {', '.join(RECIPES)}"),
        ({"variations": {"x": {"lrate": 1}}}, "variation 'x': a recipe has no field 'lrate'"),
        ({"variations": {"x": {"name": "y"}}}, "variation 'x': a recipe has no field 'name' to"),
        ({"variations": {"x": {"lr": -1}}}, "variation 'x': lr must be"),
        ({"variations": {"x": {"epochs": 1}}}, "'x' changes nothing"),
        ({"variations": {"../x": {"lr": 1}}}, "a variation's name has letters"),
        ({"variations": ["lr"]}, "variations must be a mapping"),
        ({"seeds": [0, 0]}, "list of different whole numbers"),
        ({"seeds": ["a"]}, "seed must be a whole number"),
        ({"protocol": "full"}, "unknown key 'protocol'"),
    ],
)
def test_a_wrong_study_is_refused_by_name(write, changes, says):
    with pytest.raises(ValueError) as caught:
        load_study(write(**changes))
    assert str(caught.value).startswith("small.yaml: ") and says in str(caught.value)


def test_what_is_no_study_is_refused(write):
    file = write()
    with pytest.raises(FileNotFoundError, match=r"no study at .*other\.yaml; there: small\.yaml"):
        load_study(file.with_name("other.yaml"))
    file.write_text("{")
    with pytest.raises(ValueError, match=r"small\.yaml is not YAML"):
        load_study(file)
    file.write_text("variations:\n  x: {lr: 0.1}\n  x: {lr: 0.2}\n")
    with pytest.raises(ValueError, match=r"small\.yaml .*'x' comes twice"):
        load_study(file)


def test_a_study_may_say_things_once(write):
    file = write()
    file.write_text(
        "about: a\nbase: quick\nvariations:\n  x: &x {lr: 0.1, epochs: 3}\n  y: {<<: *x, lr: 0.2}\n"
    )
    assert [(r.lr, r.epochs) for r in load_study(file).recipes[1:]] == [(0.1, 3), (0.2, 3)]


def test_a_study_is_swept_into_a_table_and_kept(write, tmp_path, monkeypatch, capsys, tiny):
    study = write(seeds=[0], variations={"lr 0.1": {"lr": 0.1}})
    train_many = studies.train_many
    monkeypatch.setattr(sweep, "train_many", lambda **a: train_many(**a | {"dataset": tiny}))
    command = ["--study", str(study), "--folder", str(tmp_path / "out")]
    studies.main(command)
    printed = capsys.readouterr().out
    assert "Is a higher rate better?" in printed and "| lr 0.1 | `lr=0.1` | n = 1 |" in printed
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"base-val-seed0", "lr_0.1-val-seed0"}
    studies.main(command)
    assert capsys.readouterr().out.count("kept") == 2


def test_a_failed_variation_leaves_the_table_of_the_others(
    write, tmp_path, monkeypatch, capsys, tiny
):
    study = write(
        seeds=[0],
        variations={"lr 0.1": {"lr": 0.1}, "too high": {"lr": 99, "schedule": "constant"}},
    )
    train_many = studies.train_many
    monkeypatch.setattr(sweep, "train_many", lambda **a: train_many(**a | {"dataset": tiny}))
    with pytest.raises(SystemExit, match="1 of 3 runs failed"):
        studies.main(["--study", str(study), "--folder", str(tmp_path / "out")])
    assert "| lr 0.1 | `lr=0.1` | n = 1 |" in capsys.readouterr().out


def test_make_refuses_settings_that_a_study_has_itself():
    command = ["make", "-n", "sweep", "STUDY=studies/architecture.yaml", "SEEDS=1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode and "leave out SEEDS" in result.stderr


def test_a_study_and_recipes_exclude_each_other(write):
    for more in (["quick"], ["--seeds", "1"], ["--protocol", "val"]):
        with pytest.raises(SystemExit, match="leave these out"):
            studies.main([*more, "--study", str(write())])
