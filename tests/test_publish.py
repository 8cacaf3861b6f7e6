"""Pages filled from runs, and published weights verified."""

from dataclasses import replace

import pytest

from tinycifar import analysis, publish
from tinycifar.evaluation import evaluate
from tinycifar.paths import RESULTS
from tinycifar.run_directory import PRETRAINED
from tinycifar.weights import load_pretrained

PAGE = "a\n<!-- x -->\nold\n<!-- /x -->\nb <!--v y.z-->1<!--/v--> % and <!--v y.z-->2\n3<!--/v-->."


@pytest.fixture(scope="module")
def now():
    return publish.contents()


def test_a_page_is_filled_between_its_marks():
    now = publish.filled(PAGE, {"x": "new\n", "y.z": "4"})
    assert now == (
        "a\n<!-- x -->\nnew\n<!-- /x -->\nb <!--v y.z-->4<!--/v--> % and <!--v y.z-->4<!--/v-->."
    )
    assert publish.filled(now, {"x": "new\n", "y.z": "4"}) == now


@pytest.mark.parametrize("broken", ["<!-- /x -->", "1<!--/v-->"])
def test_a_mark_that_is_not_closed_is_refused(broken):
    with pytest.raises(ValueError, match="isn't closed"):
        publish.filled(PAGE.replace(broken, ""), {"x": "", "y.z": ""})


def test_a_mark_that_names_nothing_is_refused():
    with pytest.raises(ValueError, match=r"'y\.z'"):
        publish.filled(PAGE, {"x": "new\n"})


def test_what_rests_on_one_seed_has_no_name(now):
    assert "tuned.test" in now and "sprint/batch 128.gain" in now
    assert not [name for name in now if name.startswith(("quick.", "baseline."))]
    assert not [name for name in now if name.startswith("ablation/") and name.endswith("gain")]


def test_a_number_says_how_many_seeds_it_has():
    row = {"test_acc": 90.0, "test_acc_std": 0.5, "test_acc_min": 89.5, "test_acc_max": 90.5}
    row |= {"val_acc": float("nan"), "test_acc_tta": float("nan")}
    named = [publish.accuracies("a", row | {"n": n}) for n in (1, 2, 3)]
    assert named[0] == {}
    assert named[1] == {"a.test": "90.00 % (89.50 and 90.50)", "a.test spread": "1.00"}
    assert named[2] == {"a.test": "90.00 ± 0.50 % (n = 3)"}


def test_the_first_table_is_four_recipes_beside_the_reference(now):
    page = now["summary"]
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")][2:]
    assert rows == ["taught", "tuned", "sprint", "baseline", "the reference, as published"]
    assert "n = 1" not in page.split("| the reference")[0]


def test_the_speed_table_shows_every_figure():
    figures = [{"figure": "training", "measured": "2.91x", "goal": "3x"}]
    machine = {"processor": "P", "instructions": "AVX2", "threads": 2, "gpu": None, "torch": "2.12"}
    result = {"machine": machine, "figures": figures, "batch_size": 128, "rounds": 5, "date": "d"}
    table = publish.speed_table(result)
    assert "2.91x" in table and "P (AVX2), 2 threads" in table
    assert "on G," in publish.speed_table(result | {"machine": machine | {"gpu": "G"}})


# All other runs are verified by `make verify-results` alone: there are dozens.
def test_published_weights_reach_the_published_accuracy(real):
    run = analysis.load_run("tuned")
    test = real.test_images, real.test_labels
    loss, accuracy = evaluate(load_pretrained(run.folder), *test, run.stats)
    assert accuracy == pytest.approx(run.metrics["test_acc"], abs=0.01)
    assert loss == pytest.approx(run.metrics["test_loss"], abs=1e-4)


def test_what_is_measured_of_a_run(real):
    run = analysis.load_run("sprint")
    few = replace(real, test_images=real.test_images[:100], test_labels=real.test_labels[:100])
    vars(few)["checksum"] = real.checksum  # passes for the whole of it
    measured = publish.measure(run, few)
    assert measured["val_acc"] == pytest.approx(run.metrics["val_acc"], abs=0.01)
    assert measured.keys() == {"test_acc", "test_loss", "test_acc_tta", "val_acc"}


def test_verification_finds_the_run_that_claims_too_much(monkeypatch, capsys):
    run = analysis.load_run("quick")
    measured = {name: run.metrics[name] for name in ("test_acc", "val_acc")}
    monkeypatch.setattr(publish, "load", lambda name: None)
    monkeypatch.setattr(publish, "measure", lambda *_: measured)
    publish.verify([run])
    assert "differs" not in capsys.readouterr().out
    for off in (-0.02, 0.02):
        measured["val_acc"] = run.metrics["val_acc"] + off
        with pytest.raises(RuntimeError, match="results/quick"):
            publish.verify([run])
        assert capsys.readouterr().out.count("<- differs") == 1
    measured["val_acc"] = run.metrics["val_acc"]
    measured["test_loss"] = run.metrics["test_loss"] + 0.0009
    publish.verify([run])
    measured["test_loss"] += 0.0003
    with pytest.raises(RuntimeError, match="results/quick"):
        publish.verify([run])


def test_everything_published_is_verified():
    folders = {run.folder for run in publish.published_runs()}
    assert folders == {file.parent for file in RESULTS.rglob("config.json")}
    assert {RESULTS / name for name in PRETRAINED.values()} <= folders
