"""studies.py: files that say what to train, and many runs at once, each as `train` makes it."""

import json
import shutil

import pytest
import torch
import yaml
from helpers import NETWORK, SMALL, search_study, searched
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

import augment
from tinycifar import data, studies
from tinycifar.paths import CHECKOUT
from tinycifar.recipes import RECIPES, get_recipe
from tinycifar.run_directory import RunDirectory, RunError, find_run
from tinycifar.studies import load_study, train_many, train_study
from tinycifar.training import settle, train

ONE_EPOCH = get_recipe(SMALL, name="one", epochs=1)
DAMAGED = get_recipe(ONE_EPOCH, name="damaged")

STUDY = {
    "about": "Is a higher rate better?",
    "base": "quick",
    "always": {"epochs": 1, "start_side": 32},
    "seeds": [0, 1],
    "variations": {"lr 0.1": {"lr": 0.1}, "no dilation": {"dilated": False}},
}


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        content = {k: v for k, v in {**STUDY, **changes}.items() if v is not None}
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
    assert study.about == "Is a higher rate better?"


def test_null_is_a_change_as_well(write):
    always = {"stop_patience": None, "ema": 0.9}
    study = load_study(write(base="baseline", always=always, variations={"x": {"ema": None}}))
    assert [r.stop_patience for r in study.recipes] == [None, None]
    assert [r.ema for r in study.recipes] == [0.9, None]


FILES = sorted((CHECKOUT / "studies").glob("*.yaml")) if CHECKOUT else []


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_the_studies_here_can_be_run(file):
    study = load_study(file.relative_to(CHECKOUT))
    for teacher in {recipe.teacher for recipe in study.recipes} - {None}:
        assert (find_run(teacher) / "metrics.json").is_file(), teacher


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
        ({"variations": {"trial 3": {"lr": 1}}}, "a variation's name has letters"),
        ({"variations": None}, "no 'variations or search'"),
        ({"variations": ["lr"]}, "variations must be a mapping"),
        ({"seeds": [0, 0]}, "list of different whole numbers"),
        ({"seeds": ["a"]}, "seed must be a whole number"),
        ({"protocol": "full"}, "unknown key 'protocol'"),
        ({"test": "no"}, "test must be"),
    ],
)
def test_a_wrong_study_is_refused_by_name(write, changes, says):
    with pytest.raises(ValueError) as caught:
        load_study(write(**changes))
    assert str(caught.value).startswith("small.yaml: ") and says in str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("  on: {lr: 0.1}", "a variation's name must be text, and YAML reads it as True"),
        ("  no: {lr: 0.1}", "a variation's name must be text, and YAML reads it as False"),
        ("  1.0: {lr: 0.1}", "YAML reads it as 1.0"),
        ("  010: {lr: 0.1}", "YAML reads it as 8"),
        ("  2024-01-01: {lr: 0.1}", "YAML reads it as datetime.date"),
        ("  ~: {lr: 0.1}", "YAML reads it as None"),
        ("  x: {policy: off}", "variation 'x': policy must be text, and YAML reads it as False"),
        ("  x: {network: 16}", "variation 'x': network must be text, and YAML reads it as 16"),
        ("  x: {lr: 1}\nalways: {teacher: 1.0}", "always: teacher must be text"),
        ("  x: {lr: 1}\nabout: no", "about must be text, and YAML reads it as False"),
    ],
)
def test_what_yaml_takes_for_something_else_is_to_be_put_in_quotes(tmp_path, line, says):
    file = tmp_path / "small.yaml"
    about = "" if "about" in line else "about: a\n"
    file.write_text(f"{about}base: quick\nvariations:\n{line}\n")
    with pytest.raises(ValueError) as caught:
        load_study(file)
    said = str(caught.value)
    assert said.startswith("small.yaml: ") and says in said and said.endswith("put it in quotes")


def test_in_quotes_it_is_a_name(write):
    variations = {"1.0": {"lr": 0.3}, "no": {"lr": 0.2}, "on": {"lr": 0.1}}
    assert [r.name for r in load_study(write(variations=variations)).recipes[1:]] == [*variations]


def test_what_is_no_study_is_refused(write):
    file = write()
    with pytest.raises(FileNotFoundError, match=r"no study at .*other\.yaml; there: small\.yaml"):
        load_study(file.with_name("other.yaml"))
    for content in (b"{", b"about: caf\xe9", b"[" * 10_000):
        file.write_bytes(content)
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


# ------------------------------------------------------------------------------------ searches

SEARCH = {
    "about": "Which rates?",
    "base": "sprint",
    "always": {"epochs": 2, "network": NETWORK},
    "search": {
        "lr": {"low": 0.002, "high": 0.02, "log": True},
        "ema": [None, 0.9],
        "batch_size": {"low": 32, "high": 64, "step": 16},
        "policy": ["light", "gentle", "flip"],
    },
    "trials": 4,
}


@pytest.fixture
def write_search(tmp_path):
    def write(**changes):
        content = {k: v for k, v in (SEARCH | changes).items() if v is not None}
        (tmp_path / "rates.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return tmp_path / "rates.yaml"

    return write


def test_a_search_is_a_base_and_ranges(write_search):
    study = load_study(write_search())
    assert study.search.ranges == {
        "lr": FloatDistribution(0.002, 0.02, log=True),
        "ema": CategoricalDistribution([None, 0.9]),
        "batch_size": IntDistribution(32, 64, step=16),
        "policy": CategoricalDistribution(["light", "gentle", "flip"]),
    }
    assert (study.search.seed, study.search.trials, study.search.confirm) == (0, 4, 0)
    assert (study.search.sampler, study.search.prune, study.search.epochs) == (
        "tpe",
        "median",
        2,
    )
    assert study.search.base == study.recipes[0]
    assert study.runs == [(study.recipes[0], 0)]
    confirmed = load_study(write_search(confirm=3, seeds=[5], prune="none"))
    assert [seed for _, seed in confirmed.runs] == [5, 6, 7]  # the base, too
    epochs = {"epochs": {"low": 1, "high": 9}}
    assert load_study(write_search(search=epochs)).search.epochs == 9


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trials": None}, "a search needs 'trials'"),
        ({"trials": 0}, "trials must be a whole number"),
        ({"search": {"lrate": [1]}}, "a recipe has no field 'lrate' to change; valid: epochs"),
        ({"search": {"lr": {"low": -1, "high": 1}}}, "search of 'lr': lr must be a number from"),
        ({"search": {"lr": {"low": 1, "high": 1000}}}, "search of 'lr': lr must be a number from"),
        ({"search": {"lr": {"low": 0.1}}}, "must be a list of choices, or {low: 0.1, high: 1}"),
        ({"search": {"lr": {"low": 2, "high": 1}}}, "search of 'lr': "),
        ({"search": {"lr": 0.1}}, "must be a list of choices"),
        ({"search": {"policy": ["light", "heavy"]}}, "search of 'policy': unknown policy 'heavy'"),
        ({"search": {"policy": {"low": "light", "high": "flip"}}}, "low must be a number"),
        ({"search": {"ema": [0.9, 0.9]}}, "choices must be different"),
        ({"search": {"policy": ["light", "none"]}}, "search of 'policy': alternate_flip takes"),
        (
            {"search": {"build": ["batched", "torchvision"], "alternate_flip": [True, False]}},
            "search of 'build': alternate_flip takes",
        ),
        (
            {
                "base": "quick",
                "search": {"policy": ["light", "none"], "alternate_flip": [False, True]},
            },
            "rates.yaml: search: alternate_flip takes",  # each by itself can be had
        ),
        ({"search": {}}, "search names no field"),
        ({"sampler": "best"}, "unknown sampler 'best'; valid: tpe, gp, random"),
        ({"prune": "early"}, "unknown prune 'early'; valid: hyperband, median, none"),
        ({"seeds": [0, 1]}, "a search has one seed"),
        ({"search": None, "variations": {"x": {"lr": 1}}}, "'trials' belongs to a search"),
        ({"confirm": -1}, "confirm must be"),
    ],
)
def test_a_wrong_search_is_refused_before_anything_is_stored(
    write_search, tmp_path, tiny, changes, says
):
    file = write_search(**changes)
    with pytest.raises(ValueError) as caught:
        train_study(file, folder=tmp_path / "out", dataset=tiny)
    assert str(caught.value).startswith("rates.yaml: ") and says in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        ({"teacher": [None, "nobody"]}, "no run at 'nobody'"),
        ({"batch_size": {"low": 20, "high": 512}}, "batch_size must be a whole number from 1 to"),
    ],
)
def test_a_search_that_doesnt_fit_its_data_or_teachers_is_refused_as_well(
    write_search, tmp_path, tiny, ranges, says
):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        train_study(write_search(search=ranges), folder=tmp_path / "out", dataset=tiny)
    assert not (tmp_path / "out").exists()


def test_a_finished_search_needs_its_teachers_no_more(tiny, tmp_path):
    recipe = get_recipe("sprint", epochs=1, network=NETWORK, batch_size=60)
    train(recipe, tmp_path / "t", dataset=tiny, progress=False)
    ranges = {"teacher": [None, str(tmp_path / "t")], "lr": {"low": 0.002, "high": 0.02}}
    file = search_study(tmp_path, trials=2, prune="none", search=ranges)
    metrics = searched(file, tmp_path / "out", tiny)
    shutil.rmtree(tmp_path / "t")
    assert searched(file, tmp_path / "out", tiny) == metrics


# -------------------------------------------------------------------------------- many at once


def test_runs_are_what_train_makes_and_finished_ones_are_kept(tiny, tmp_path, capsys, one_thread):
    settings = {"dataset": tiny, "device": "cpu", "folder": tmp_path}
    with pytest.MonkeyPatch.context() as patch:  # policies of one's own reach the processes too
        patch.setitem(augment.POLICIES, "mine", augment.Policy(flip=1.0))
        mine = get_recipe(ONE_EPOCH, policy="mine", name="mine")
        many = train_many([ONE_EPOCH, mine], seeds=[3], jobs=1, **settings)
    config = RunDirectory(tmp_path / "mine-val-seed3").config()
    assert config["policies"]["mine"]["flip"] == 1.0
    assert [(m["recipe"], m["seed"]) for m in many] == [("one", 3), ("mine", 3)]
    assert {p.name for p in tmp_path.glob("*-seed3")} == {"mine-val-seed3", "one-val-seed3"}
    assert f"one-val-seed3  validation {many[0]['val_acc']:.2f} %" in capsys.readouterr().out

    alone = train(ONE_EPOCH, tmp_path / "alone", seed=3, dataset=tiny, progress=False)
    assert alone["test_loss"] == many[0]["test_loss"]

    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    assert train_many([ONE_EPOCH], seeds=[3], **settings) == many[:1]
    assert "one-val-seed3  kept: validation" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")} == before

    other = data.load("shapes", limit=210)
    with pytest.raises(RunError, match=r"differs: .*limit is 200 there and 210 now"):
        train_many([ONE_EPOCH], seeds=[3], **settings | {"dataset": other})


def test_a_study_can_leave_the_test_set_alone(write, tiny, tmp_path, capsys, one_thread):
    options = {"dataset": tiny, "folder": tmp_path / "out", "jobs": 1}
    small = {"epochs": 1, "batch_size": 60, "network": NETWORK}
    changes = {"always": small, "seeds": [0], "variations": {"x": {"lr": 0.1}}}
    without = train_study(write(test=False, **changes), **options)
    assert [m["test_acc"] for m in without] == [None, None]
    capsys.readouterr()
    assert train_study(write(test=False, **changes), **options) == without
    assert capsys.readouterr().out.count("kept") == 2
    added = train_study(write(**changes), **options)
    assert all(m["test_acc"] >= 0 for m in added)
    assert [m["val_acc"] for m in added] == [m["val_acc"] for m in without]


@pytest.mark.parametrize(("protocol", "what"), [("full", "training"), ("test-selected", "test")])
def test_a_line_says_which_accuracy_it_gives(tiny, tmp_path, capsys, protocol, what):
    options = {"protocol": protocol, "dataset": tiny, "folder": tmp_path, "jobs": 1, "test": False}
    train_many([ONE_EPOCH], **options)
    assert f"one-{protocol}-seed0  {what} " in capsys.readouterr().out
    train_many([ONE_EPOCH], **options)
    assert f"one-{protocol}-seed0  kept: not tested, shapes" in capsys.readouterr().out


def test_a_worker_that_leaves_the_test_set_alone_is_noticed(tiny, tmp_path, monkeypatch):
    def another_worker(plan, *_):  # of the same study, begun before a line was taken out of it
        assert plan.identity == {
            "protocol": "val", "dataset": "shapes", "limit": 200, "data_sha256": tiny.checksum,
        }  # fmt: skip
        train(ONE_EPOCH, tmp_path / "one-val-seed0", dataset=tiny, progress=False, test=False)

    options = {"dataset": tiny, "folder": tmp_path, "jobs": 1, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(studies.trials, "train_queued", another_worker)
        with pytest.raises(RunError, match=r"one-val-seed0: trained by a worker that was told"):
            train_many([ONE_EPOCH], **options)
    assert train_many([ONE_EPOCH], **options)[0]["test_acc"] is not None


def test_a_failure_stops_no_other_run(tiny, tmp_path):
    damaged, config = tmp_path / "damaged-val-seed0", settle(DAMAGED, dataset=tiny).config
    damaged.mkdir()
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "last.pt").write_bytes(b"half a checkpoint")
    other = tmp_path / "one-val-seed0"
    with pytest.raises(KeyboardInterrupt):
        train(ONE_EPOCH, other, dataset=tiny, progress=False, on_epoch=interrupt)
    (other / "history.csv").write_bytes(b"\xff")  # which is written again, from last.pt
    with pytest.raises(RunError, match=r"1 of 2 runs failed.*damaged-val-seed0: .*last\.pt is dam"):
        train_many([DAMAGED, ONE_EPOCH], dataset=tiny, folder=tmp_path, jobs=1, progress=False)
    assert len(RunDirectory(other).history()) == RunDirectory(other).metrics()["epochs_run"] == 1


def interrupt(row):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"recipes": []}, "nothing to train"),
        ({"recipes": ["slow"]}, "unknown recipe"),
        ({"seeds": [1, 1]}, "only once"),
        ({"seeds": [-1]}, "seed must be"),
        ({"jobs": 0}, "jobs must be"),
        ({"threads": 0}, "threads must be"),
        ({"heartbeat": 0}, "heartbeat must be"),
        ({"protocol": "train"}, "unknown protocol"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(tiny, tmp_path, arguments, says):
    arguments = {"recipes": [ONE_EPOCH], "folder": tmp_path, "dataset": tiny} | arguments
    with pytest.raises(ValueError, match=says):
        train_many(**arguments)
    assert not list(tmp_path.iterdir())


def test_there_is_a_worker_for_each_core(monkeypatch):
    monkeypatch.setattr(studies, "_cores", lambda: 16)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [studies._most_jobs(cpu, threads) for threads in (1, 4, 99)] == [16, 4, 1]
    assert studies._most_jobs(gpu, 1) == 8


def test_an_unknown_data_set_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(data.DataError, match="is unknown"):
        train_many([ONE_EPOCH], dataset="nope", folder=tmp_path)
    assert not list(tmp_path.iterdir())
