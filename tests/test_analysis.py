"""Analysis: what it computes against hand-made and independent figures; what it says and refuses.

Most run directories are written here by hand, as run_directory.py and training.py lay them out.
"""

import json
import math
import shutil
import statistics
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from helpers import search_study, searched
from matplotlib.text import Text
from scipy.stats import ttest_ind
from torch import nn

import augment
from tiny_cifar10_net import NetCIFAR10_Tiny, fuse
from tinycifar import analysis
from tinycifar import data as datasets
from tinycifar.analysis.measures import augmented, gains, share_within
from tinycifar.analysis.runs import plateau_rates
from tinycifar.evaluation import evaluate
from tinycifar.networks import BlueprintNet
from tinycifar.paths import RESULTS
from tinycifar.recipes import RECIPES, Recipe, get_recipe
from tinycifar.run_directory import HISTORY_COLUMNS, RunError
from tinycifar.studies import chosen, load_study
from tinycifar.training import train
from tinycifar.trials import recorded
from tinycifar.weights import load_pretrained


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run that was really trained."""
    folder = tmp_path_factory.mktemp("trained") / "a"
    # Of so many steps that its BatchNorms know what they see: else all answers are the same.
    recipe = get_recipe("baseline", epochs=2, width=0.5, batch_size=8)
    train(recipe, folder, dataset=tiny, compile=False, progress=False)
    return analysis.load_run(folder)


@pytest.fixture
def write_run(tmp_path):
    """Write a run directory as training does; returns it loaded."""

    def write(name="a", *, recipe="quick", protocol="val", seed=0, epochs=4, finished=True, **more):
        folder = tmp_path / name
        folder.mkdir()
        fields = {"epochs": 4, "schedule": "plateau", "lr": 0.1} | more.get("fields", {})
        config = {
            "recipe": {"name": recipe} | fields,
            "seed": seed,
            "protocol": protocol,
            "dataset": more.get("dataset", "cifar10"),
            "limit": more.get("limit"),
            "data_sha256": more.get("data_sha256", "0" * 64),
            "split": {"train": 45_000, "selection": 5_000, "test": 10_000, "seed": 0},
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "classes": list(datasets.CLASSES),
            "model": {},
        }
        (folder / "config.json").write_text(json.dumps(config))
        index = np.arange(1, epochs + 1)
        val_acc = more.get("val_acc", 40.0)
        history = pd.DataFrame({"epoch": index, "lr": 0.1, "train_loss": 1.9 / index})
        history = history.assign(train_acc=44.0 * index / epochs, val_loss=0.5 * epochs / index)
        history = history.assign(val_acc=val_acc * index / epochs, seconds=123 / max(epochs, 1))
        if protocol == "full":
            history[["val_loss", "val_acc"]] = np.nan
        history.to_csv(folder / "history.csv", index=False)
        if finished:
            metrics = {
                "dataset": config["dataset"],
                "limit": config["limit"],
                "protocol": protocol,
                "params": 36_170,
                "macs": 17_330_816,
                "epochs_run": epochs,
                "best_epoch": epochs,
                "train_acc": 44.0,
                "val_acc": None if protocol == "full" else val_acc,
                "val_loss": None if protocol == "full" else 0.5,
                "test_acc": more.get("test_acc", 70.0),
                "test_loss": 0.9,
                "test_acc_tta": more.get("test_acc", 70.0) + 0.5,
                "seconds_train": 123.0,
                "images_per_second": 1234.0,
                "device": "cpu",
                "torch": torch.__version__,
                "git_commit": None,
            }
            (folder / "metrics.json").write_text(json.dumps(metrics))
        return analysis.load_run(folder)

    return write


def random_predictions(n=200, seed=0, sharpness=2.0):
    """Log-probabilities (n, 10) that are right more often than not, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=n)
    logits = rng.normal(size=(n, 10)).astype(np.float32)
    logits[np.arange(n), labels] += sharpness
    return torch.from_numpy(logits).log_softmax(1).numpy(), labels


def predictions_of(log_p, labels, classes=datasets.CLASSES):
    images = np.zeros((len(labels), 32, 32, 3), np.uint8)
    return analysis.Predictions(log_p, images, labels, classes, "test images · my run")


def with_history(run, best_epoch=None, **columns):
    """`run`, columns of its history replaced, and another selected epoch."""
    metrics = run.metrics if best_epoch is None else run.metrics | {"best_epoch": best_epoch}
    return replace(run, history=run.history.assign(**columns), metrics=metrics)


def shown(frame):
    """The cells of a table as Markdown: a dict for each row."""
    lines = [line for line in analysis.markdown(frame).splitlines() if line.startswith("|")]
    header, _, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def texts(figure):
    """All text in a figure, without line breaks."""
    found = [t.get_text() for t in figure.findobj(plt.Text)]
    return " ".join(" ".join(found).replace("\xa0", " ").split())


# ------------------------------------------------------------------------------------------ runs


def test_load_run(trained):
    folder = trained.folder
    run = analysis.load_run(str(folder))
    assert run.name == "a" and run.epochs == 2 and run.selects_on == "validation"
    history = (folder / "history.csv").read_text().splitlines()
    assert run.history.to_numpy()[1].tolist() == [float(v) for v in history[2].split(",")]
    assert run.metrics == json.loads((folder / "metrics.json").read_text())
    title = "baseline-batch_size=8,epochs=2,width=0.5 · val · seed 0"
    assert run.title == f"{title} · shapes (stand-in, NOT CIFAR-10), 200 training images"


def test_a_run_goes_by_the_name_that_it_has_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert analysis.load_run("tuned").folder == RESULTS / "tuned-seed0"
    study = RESULTS / "studies" / "ablation"
    assert analysis.load_run("ablation/plateau-val-seed0").folder.parent == study
    with pytest.raises(FileNotFoundError, match="no run at 'three'"):
        analysis.load_run("three")


def test_find_runs_sorts_and_passes_over_other_folders(write_run, tmp_path):
    for name in ("b", "c", "a"):
        write_run(name)
    (tmp_path / "notes").mkdir()
    assert [run.name for run in analysis.find_runs(tmp_path)] == ["a", "b", "c"]
    assert analysis.find_runs(tmp_path / "notes") == []
    with pytest.raises(FileNotFoundError, match="no folder"):
        analysis.find_runs(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="find_runs"):
        analysis.load_runs(str(tmp_path))


def test_titles_say_what_must_be_said(write_run):
    run = write_run(dataset="shapes", limit=1000, protocol="test-selected", finished=False)
    assert "shapes (stand-in, NOT CIFAR-10), 1,000 training images" in run.title
    assert "epoch chosen on test" in run.title
    assert "unfinished, 4 epochs" in run.title
    assert "unfinished, 1 epoch ·" in write_run("b", epochs=1, finished=False).title


def test_a_run_before_its_first_epoch(write_run):
    run = write_run(epochs=0, finished=False)
    (run.folder / "history.csv").unlink()
    run = analysis.load_run(run.folder)
    assert run.epochs == 0 and run.metrics is None
    assert shown(analysis.runs_table([run]))[0]["epochs"] == "unfinished: 0 of 4"
    assert not len(analysis.start_table([run]))
    assert "hasn't finished an epoch" in analysis.markdown(analysis.drops_table(run))
    analysis.plot_history(run)


def test_predictions_on_validation_and_test(trained, tiny):
    model, (_, held_back) = load_pretrained(trained.folder), datasets.split(tiny.train_labels)
    parts = {
        "validation": (tiny.train_images[held_back], tiny.train_labels[held_back]),
        "test": (tiny.test_images, tiny.test_labels),
    }
    for part, (images, labels) in parts.items():
        predictions = analysis.predictions(trained, tiny, part)
        np.testing.assert_array_equal(predictions.images, images)
        np.testing.assert_array_equal(predictions.labels, labels)
        assert predictions.title == f"{part} images · {trained.title}"
        pixels = torch.from_numpy(images / 255.0) - torch.tensor(trained.config["mean"])
        pixels = (pixels / torch.tensor(trained.config["std"])).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            np.testing.assert_allclose(predictions.log_p, model(pixels).numpy(), atol=1e-4)
        assert np.ptp(predictions.log_p, axis=0).max() > 0.01, "else there was nothing to compare"
        right = 100 * (predictions.predicted == labels).mean()
        assert right == pytest.approx(trained.metrics[f"{part[:4].replace('vali', 'val')}_acc"])
    assert analysis.predictions(trained, tiny).title.startswith("validation")


def test_what_predictions_refuse(trained, tiny, write_run):
    with pytest.raises(ValueError, match=r"on CIFAR-10 .*not on shapes .*load\('cifar10'"):
        analysis.predictions(write_run(), tiny)
    with pytest.raises(ValueError, match="part must be test, validation or None"):
        analysis.predictions(trained, tiny, "train")
    stats = datasets.DataSplits(tiny, "full").stats
    on_all = trained.config | {"mean": stats.mean, "std": stats.std}
    full = replace(trained, config=on_all | {"protocol": "full"})
    with pytest.raises(ValueError, match="no validation images: its protocol is full"):
        analysis.predictions(full, tiny, "validation")
    unfinished = replace(trained, metrics=None)
    trial = replace(trained, metrics=trained.metrics | {"test_acc": None})
    assert analysis.predictions(unfinished, tiny).title.startswith("validation")
    for run, part in ((unfinished, "test"), (trial, "test"), (replace(full, metrics=None), None)):
        with pytest.raises(
            ValueError, match="isn't finished, or is one trial of many: the test set is used once"
        ):
            analysis.predictions(run, tiny, part)
    on_test = on_all | {"protocol": "test-selected"}
    on_test = analysis.predictions(replace(unfinished, config=on_test), tiny)
    assert on_test.title.startswith("test")


def test_predictions_need_the_statistics_that_the_run_had(trained, tiny, monkeypatch):
    """An early run notes no checksum of its config.json, but the data tell."""
    for field, other in (("mean", [0.5, 0.5, 0.5]), ("std", [0.2] * 3), ("classes", list("abc"))):
        changed = replace(trained, config=trained.config | {field: other})
        with pytest.raises(
            ValueError, match=r"config\.json was changed since .*aren't those of sha"
        ):
            analysis.predictions(changed, tiny)


def test_a_run_with_half_a_history_is_named(write_run):
    run = write_run(epochs=4)
    lines = (run.folder / "history.csv").read_text().splitlines(keepends=True)
    for left in (lines[:3], lines[:1], [*lines[:4], lines[4][:9]]):
        (run.folder / "history.csv").write_text("".join(left))
        with pytest.raises(ValueError, match=r"history\.csv is damaged"):
            analysis.load_run(run.folder)


# --------------------------------------------------------------------------------- tables of runs


def test_runs_table_means_and_stds(write_run):
    accuracies = [87.1, 87.5, 86.2]
    runs = [write_run(f"s{i}", seed=i, test_acc=a, epochs=2 + i) for i, a in enumerate(accuracies)]
    table = analysis.runs_table(runs, times=True)
    (row,) = table.to_dict("records")
    assert all(name == name.lower() and " " not in name for name in table)
    mean, std = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert (row["n"], row["seeds"], row["parameters"]) == (3, "0, 1, 2", 36_170)
    assert row["test_acc"] == pytest.approx(mean) and row["test_acc_std"] == pytest.approx(std)
    assert (row["test_acc_min"], row["test_acc_max"]) == (86.2, 87.5)
    assert (row["epochs_min"], row["epochs_max"], row["minutes_max"]) == (2, 4, 123 / 60)
    (cells,) = shown(table)
    assert cells["seeds"] == "n = 3" and cells["parameters"] == "36,170"
    assert cells["epochs"] == "2–4" and cells["minutes"] == "2"
    assert f"{mean:.2f} ± {std:.2f}" in cells.values()
    assert f"{mean + 0.5:.2f} ± {std:.2f}" in cells.values()
    assert "minutes_min" not in analysis.runs_table(runs)
    untested = replace(runs[2], metrics=runs[2].metrics | {"test_acc": None})
    part = analysis.runs_table([*runs[:2], untested]).iloc[0]
    assert math.isnan(part["test_acc"]) and part["n"] == 3, "no mean of the tested ones alone"
    # Of two seeds both figures, of one the figure alone.
    assert f"{87.3:.2f} (87.10, 87.50)" in shown(analysis.runs_table(runs[:2]))[0].values()
    assert "87.10" in shown(analysis.runs_table(runs[0]))[0].values()


def test_unlike_runs_are_not_pooled(write_run):
    noted = {"reference": asdict(augment.POLICIES["reference"])}
    runs = [
        write_run("a"),
        write_run("b", seed=1, protocol="test-selected"),
        write_run("c", seed=2, dataset="shapes"),
        write_run("d", seed=3, limit=1000),
        write_run("e", seed=4, recipe="baseline"),
        write_run("f", seed=5, fields={"lr": 0.2}),  # the same name, but another recipe
        write_run("g", seed=6, fields={"whiten": True}),  # a field that was retired since
    ]
    for seed, more in enumerate(
        (
            {"policies": {"reference": {**noted["reference"], "rotate": 45.0}}},
            {"teacher_sha256": "0"},
        ),
        start=7,
    ):
        run = write_run(f"run{seed}", seed=seed)
        runs.append(replace(run, config=run.config | more))
    table = analysis.runs_table(runs)
    assert table["n"].tolist() == [1] * 9 and table["seeds"].tolist() == list("012345678")
    assert shown(table)[1]["protocol"] == "test-selected: epoch chosen on test"
    assert math.isnan(table["val_acc"][1]), "an accuracy on test must not stand under validation"
    assert "NOT CIFAR-10" in table["data"][2]
    # Alike: an early run, which noted no policies, and one that noted those of today.
    early = write_run("early", seed=9)
    later = replace(early, config=early.config | {"policies": noted})
    assert early.pool_key == later.pool_key
    # Not alike: one that on_epoch ended, or on other data of the same name.
    ended = replace(early, metrics=early.metrics | {"cut_short": True})
    assert ended.pool_key != early.pool_key and "cut short" in ended.label
    assert replace(early, config=early.config | {"data_sha256": "x"}).pool_key != early.pool_key


def test_an_unfinished_run_is_shown_as_such(write_run):
    runs = [write_run("b", seed=1, epochs=2, finished=False), write_run("a")]
    table = analysis.runs_table(runs)
    assert table["n"].tolist() == [1, 0] and table["test_acc"].isna().tolist() == [False, True]
    cells = shown(table)[1]
    assert cells["seeds"] == "seed 1" and cells["epochs"] == "unfinished: 2 of 4"


def test_a_repeated_seed_counts_once_and_is_named(write_run):
    table = analysis.runs_table([write_run(test_acc=70.0), write_run("copy", test_acc=71.0)])
    assert table["n"].tolist() == [1] and table["test_acc"].tolist() == [70.0]
    assert "already: copy." in analysis.markdown(table)


def test_the_published_reference_comes_first_where_asked_for(write_run):
    table = analysis.runs_table([write_run()], reference=True)
    published = analysis.published_networks().iloc[0]
    assert table["test_acc"][0] == published["accuracy"] == 87.31
    assert table["parameters"][0] == published["parameters"]
    assert "as published" in table["recipe"][0] and table["recipe"][1] == "quick"


def test_metrics_table(write_run):
    runs = [write_run(test_acc=71.23), write_run("b", protocol="full"), write_run("c", finished=0)]
    table = analysis.metrics_table(runs)
    assert table["test_acc"][:2].tolist() == [71.23, 70.0] and math.isnan(table["test_acc"][2])
    assert table["val_acc"].isna().tolist() == [False, True, True]
    assert analysis.runs_table(runs[1:])["val_acc"].isna().all()
    down = {row[""]: row for row in shown(table)}  # a column for each run
    assert down["parameters"]["a"] == "36,170" and down["parameters"]["c"] == "–"
    with pytest.raises(ValueError, match="no run to show"):
        analysis.metrics_table([])


@pytest.fixture
def a_study(write_run):
    """Two runs of the base, two of a better variation, one of a worse, one unfinished."""
    runs = []
    for name, lr, accuracies in (
        ("base", 0.1, [40.8, 41.2]),
        ("worse", 0.05, [35]),
        ("higher_rate", 0.2, [46.7, 47.3]),
    ):
        for seed, accuracy in enumerate(accuracies):
            how = {"recipe": name, "seed": seed, "val_acc": float(accuracy), "fields": {"lr": lr}}
            runs.append(write_run(f"{name}{seed}", **how))
    return [*runs, write_run("late", recipe="late", finished=False)]


def test_a_study_is_compared_with_its_base(a_study, write_run):
    table = analysis.study_table(a_study)
    assert table["variation"].tolist() == ["base", "higher rate", "worse"]
    assert table["changes"].tolist() == ["", "lr=0.2", "lr=0.05"]
    # What 5,000 images tell of how far seeds differ, ten times, and what the two pairs tell.
    by_the_count = 100**2 * 0.41 * 0.59 / (2 * 5_000)
    seeds = statistics.variance([40.8, 41.2]) + statistics.variance([46.7, 47.3])
    spread = math.sqrt((10 * by_the_count + seeds) / 12)
    assert table["gain"].tolist()[1:] == pytest.approx([6, -6])
    assert table["clear"].tolist() == [False, True, False], "one seed alone isn't enough"
    errors = [spread, spread * math.sqrt(1 + 1 / 2)]
    assert table["gain_error"].tolist()[1:] == pytest.approx(errors)
    cells = shown(table)[1]
    assert (
        f"**+6.00 ± {spread:.2f}**" in cells.values() and "47.00 (46.70, 47.30)" in cells.values()
    )
    assert "CIFAR-10, 4 epochs" in table.attrs["note"] and "left out: 1 run" in table.attrs["note"]
    # An older run may have used a field that recipes don't have any more, and one was ended early.
    old = write_run("old", recipe="whitened", fields={"whiten": True})
    short = replace(a_study[2], metrics=a_study[2].metrics | {"cut_short": True})
    again = write_run("again", recipe="base", val_acc=99.0)
    table = analysis.study_table([*a_study, old, short, again])
    assert {"whiten=True", "lr=0.05, cut short"} <= set(table["changes"])
    assert table["n"][0] == 2 and "already: again." in table.attrs["note"]


def test_what_a_study_refuses(a_study, write_run):
    with pytest.raises(ValueError, match="has one base"):
        analysis.study_table(a_study[2:])
    with pytest.raises(ValueError, match="on validation"):
        analysis.study_table([write_run(recipe="base", protocol="full")])
    other = write_run("b", data_sha256="f" * 64)  # of the same name
    for run in (write_run("c", limit=200), other):
        with pytest.raises(ValueError, match="on one data set only"):
            analysis.study_table([*a_study, run])


def test_the_study_figure_shows_each_variation(a_study):
    figure = analysis.plot_study(a_study)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["higher rate, n = 2", "worse, n = 1"]
    assert next(line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1) == 6
    assert "CIFAR-10" in texts(figure) and "no variation" not in texts(figure)
    points = [line for line in axes.lines if line.get_marker() == "o"]
    hollow = [
        y for line in points if line.get_markerfacecolor() == "white" for y in line.get_ydata()
    ]
    assert len(points) == 2 and hollow == [2], "one seed, which isn't tested"
    assert "no variation is finished yet" in texts(analysis.plot_study(a_study[:2]))


def test_a_published_study_has_its_runs_wherever_they_are():
    runs = analysis.published_study("ablation")
    base = [run.folder for run in runs if run.recipe["name"] == "base"]
    assert base == [RESULTS / "quick"]
    own = {file.parent for file in (RESULTS / "studies" / "ablation").glob("*/config.json")}
    assert own <= {run.folder for run in runs} and len({run.folder for run in runs}) == len(runs)
    assert analysis.study_table(runs)["variation"][0] == "base"
    with pytest.raises(FileNotFoundError, match="no study"):
        analysis.published_study("nonsense")


def test_a_gain_is_clear_where_a_t_test_says_so():
    def gained(*groups):
        rows = [(len(g), np.mean(g), np.std(g, ddof=1) if len(g) > 1 else np.nan) for g in groups]
        table = pd.DataFrame(rows, columns=["n", "val_acc", "val_acc_std"])
        return gains(table, images=5_000)

    def gain(*groups):
        return gained(*groups).iloc[1]

    # At 90 %: sqrt(0.9 * 0.1 / 10,000) is 0.3 points. One seed is never enough for a conclusion.
    single = gain([90.0], [95.0])
    assert single["gain_error"] == pytest.approx(0.3 * math.sqrt(2)) and not single["clear"]
    # Of ten degrees of freedom, 95 % lie within 2.228 errors, by any table of Student's t.
    assert single["gain_interval"] == pytest.approx(2.228 * single["gain_error"], rel=1e-3)
    assert not gain([90.0], [95.0, 95.0])["clear"] and not gain([90.0, 90.0], [95.0])["clear"]
    # Of two pairs that agree, s is 0.3 root(10 / 12), so the error 0.274; it takes 2.18 errors.
    base = [90.0, 90.0]
    assert not gain(base, [90.55] * 2)["clear"]
    assert gain(base, [90.65] * 2)["clear"] and gain(base, [89.35] * 2)["clear"]
    # By chance, one of many will gain as much (Holm): p is 0.040 for 90.6, 0.005 for 90.9.
    few, many = [90.6] * 2, [90.9] * 2
    assert gained(base, few, few)["clear"].tolist() == [False, False, False]
    assert gained(base, few, many)["clear"].tolist() == [False, True, True]
    assert gained(base, few, base, many)["clear"].tolist() == [False, False, False, True]
    # So will one that was picked from many by its first seed: p is 0.035 for 90.65.
    assert gained(base, [90.65] * 2)["clear"].tolist() == [False, True]
    assert not gained(base, [90.65] * 2, [90.9], [90.9])["clear"].any()
    # Where all images are right, one more or less is still no difference.
    assert not gain([100.0, 100.0], [99.98, 99.98])["clear"]
    # Seeds that agree by chance don't make half a point clear; those that don't, blur a whole one.
    assert not gain([90.0, 90.0, 90.0], [90.5])["clear"]
    assert not gain([89.0, 90.0, 91.0], [91.2])["clear"]
    # Where they differ by more than the images explain, they alone count, as in any t-test.
    base, other = [77.0, 79.0, 78.0], [79.5, 82.0, 81.0]
    test, row = ttest_ind(other, base), gain(base, other)
    assert 0.01 < test.pvalue < 0.05 and row["clear"]
    assert row["gain"] / row["gain_error"] == pytest.approx(test.statistic)
    assert row["gain"] - row["gain_interval"] == pytest.approx(test.confidence_interval().low)
    # Many seeds speak for themselves.
    many = [90 + 0.01 * i for i in range(60)]
    error = gain(many, [a + 1 for a in many])["gain_error"]
    assert error == pytest.approx(0.035, rel=0.1)


def test_choosing_on_test_is_shown_for_what_it_is(write_run):
    first = write_run("a", protocol="test-selected", test_acc=60.0)
    second = write_run("b", protocol="test-selected", seed=1, test_acc=62.0)
    runs = [
        with_history(first, best_epoch=2, val_acc=[10, 60, 61, 58]),  # chosen by loss: no highest
        with_history(second, best_epoch=3, val_acc=[10, 50, 62, 61]),
        write_run("c", protocol="full"),
        write_run("d", finished=False),
    ]
    (row,) = analysis.choice_table(runs).to_dict("records")
    assert (row["n"], row["selects_on"]) == (2, "test")
    assert (row["best_epoch_min"], row["best_epoch_max"]) == (2, 3)
    assert (row["best_acc"], row["last_acc"], row["test_acc"]) == (61, 59.5, 61)
    assert (row["best_minus_last"], row["highest_minus_last"]) == (1.5, 2)
    (cells,) = shown(analysis.choice_table(runs))
    assert "epoch chosen on test" in cells["protocol"] and "+1.50 (+1.00, +2.00)" in cells.values()
    assert "No finished run" in analysis.markdown(analysis.choice_table(runs[2:]))


def test_what_each_drop_of_the_learning_rate_brings(write_run):
    run = with_history(write_run(), lr=[0.1, 0.1, 0.01, 0.001], val_acc=[50, 40, 58, 57])
    table = analysis.drops_table(run)
    assert table["epochs_min"].tolist() == [1, 3, 4] and table["epochs_max"].tolist() == [2, 3, 4]
    assert table["lr"].tolist() == [0.1, 0.01, 0.001]
    assert table["train_acc"].tolist() == [22, 33, 44]
    assert table["highest_acc"].tolist() == [50, 58, 57]
    assert table["jump_at_drop"].tolist()[1:] == [18, -1]
    assert table["gain_of_highest"].tolist()[1:] == [8, -1]
    falling = analysis.drops_table(with_history(run, val_acc=[50, 60, 58, 59]))
    assert falling["gain_of_highest"].tolist()[1:] == [-2, -1], "over the highest so far"
    assert [row["epochs"] for row in shown(table)] == ["1–2", "3", "4"]
    smooth = write_run("b", fields={"schedule": "one_cycle"})
    assert "doesn't drop" in analysis.markdown(analysis.drops_table(smooth))


def test_the_published_run_is_as_its_notebook_tells():
    run = analysis.reference_run()
    assert run.epochs == 50 and list(run.history) == list(HISTORY_COLUMNS)
    assert run.history["train_loss"].isna().all()
    assert (run.metrics["best_epoch"], run.metrics["test_acc"]) == (50, 87.31)
    # As its README says: epoch 20 is the first above 83 %, 39 the first above 86.5 %.
    accuracy = run.history["val_acc"].to_numpy()
    assert [np.argmax(accuracy > level) + 1 for level in (83, 86.5)] == [20, 39]
    # Where three epochs brought no lower loss, counted by hand: 17 to 19 and 36 to 38.
    rates = [0.045] * 19 + [0.0045] * 19 + [0.00045] * 12
    np.testing.assert_allclose(run.history["lr"], rates)
    analysis.plot_history([run])


def test_the_published_code_lacks_most_of_what_the_published_run_started_with():
    code = analysis.reference_code_run().history["train_acc"]
    lead = analysis.reference_run().history["train_acc"][1:5] - code[1:]
    assert len(code) == 5 and lead.mean().round(1) == 1.4
    for run in ("baseline-test-selected", "baseline-test-selected-seed1", "baseline-val"):
        ours = analysis.load_run(run).history["train_acc"]
        assert 0.2 <= (code - ours[:5])[1:].mean().round(1) <= 0.7


def test_the_rates_of_our_plateau_runs_follow_from_their_losses():
    run = analysis.load_run("baseline-test-selected")
    rates = plateau_rates(RECIPES["baseline"], run.history["val_loss"])
    np.testing.assert_allclose(run.history["lr"], rates)


def test_the_start_of_runs_is_their_training_accuracy_epoch_by_epoch(write_run):
    short = with_history(write_run(epochs=2), train_acc=[30, 45.678])
    none = write_run("none", epochs=0, finished=False)
    runs = [analysis.reference_run(), short, none]
    table = analysis.start_table(runs, epochs=3)
    assert list(table) == ["run", "epoch_1", "epoch_2", "epoch_3"]
    assert table.iloc[0, 1:].tolist() == [35.03, 51.66, 59.35]  # as its notebook prints them
    assert [*shown(table)[1].values()][1:] == ["30.00", "45.68", "–"]
    lines = [line.get_xydata().tolist() for line in analysis.plot_start([short], 1).axes[0].lines]
    assert lines == [[[1, 30]]]


def test_the_fit_table_evaluates_what_was_trained_on(trained, tiny, write_run):
    table = analysis.fit_table(trained, tiny)
    augmented_, plain, validation, test = table.to_dict("records")
    metrics, best = trained.metrics, trained.metrics["best_epoch"]
    assert augmented_["accuracy"] == metrics["train_acc"] and augmented_["n_images"] == 180
    assert augmented_["loss"] == trained.history["train_loss"][best - 1]
    chosen = datasets.some_of(datasets.split(tiny.train_labels)[0], 40)  # as many as test images
    images, labels = tiny.train_images[chosen], tiny.train_labels[chosen]
    loss, accuracy = evaluate(load_pretrained(trained.folder), images, labels, trained.stats)
    assert (plain["n_images"], plain["accuracy"], plain["loss"]) == (40, accuracy, loss)
    assert (validation["accuracy"], test["loss"]) == (metrics["val_acc"], metrics["test_loss"])
    gap = f"{accuracy - metrics['test_acc']:+.2f} points"
    assert gap in table.attrs["note"]
    smoothed = trained.recipe | {"label_smoothing": 0.1}
    smoothed = replace(trained, config=trained.config | {"recipe": smoothed})
    taught = trained.recipe | {"teacher": "tuned"}
    taught = replace(trained, config=trained.config | {"recipe": taught})
    for other in (smoothed, taught):  # whose training loss is of something else
        assert math.isnan(analysis.fit_table(other, tiny)["loss"][0])
    unfinished = analysis.fit_table(replace(trained, metrics=None), tiny)
    assert "isn't finished" in analysis.markdown(unfinished)
    with pytest.raises(ValueError, match="not on shapes"):
        analysis.fit_table(write_run("b"), tiny)


def test_recipes_side_by_side():
    table = analysis.recipes_table([RECIPES["baseline"], RECIPES["tuned"]]).set_index("field")
    assert table.loc["lr", ["baseline", "tuned"]].tolist() == [0.045, 0.006]
    assert table["tuned"]["plateau_factor"] is None and "momentum" not in table.index
    whole = analysis.recipes_table([RECIPES["baseline"], RECIPES["tuned"]], all_fields=True)
    assert not whole.set_index("field")["differs"]["momentum"]
    assert "teacher_whole" not in set(whole["field"]), "neither has a teacher"
    assert {"**lr**", "momentum"} < {row[""] for row in shown(whole)}
    odd = analysis.recipes_table([RECIPES["tuned"], Recipe("a_lr")])  # called like a column
    assert {row["a_lr"] for row in shown(odd)} >= {"sgd", "0.045", "–"}
    with pytest.raises(ValueError, match="two recipes are called 'tuned'"):
        analysis.recipes_table([RECIPES["tuned"], Recipe("tuned")])


# ----------------------------------------------------------------------------------- presentation


def test_a_table_in_a_notebook_is_the_same_however_often_it_is_made(a_study):
    table = analysis.study_table(a_study)
    first, second = analysis.styled(table), analysis.styled(table.copy())
    assert first.to_html() == second.to_html() and repr(first) == analysis.markdown(table)
    assert "font-weight: bold" in first.to_html() and "**" not in first.to_html()
    assert table.attrs["note"] in first.to_html()
    other = analysis.styled(table.head(1)).to_html()
    assert other.split("id=")[1][:10] != first.to_html().split("id=")[1][:10]
    empty = analysis.styled(analysis.choice_table([]))
    assert "No finished run" in empty.to_html()


def test_nothing_in_a_table_is_taken_for_markup(write_run):
    table = analysis.runs_table([write_run(recipe="a|<b>")])
    assert "a\\|<b>" in analysis.markdown(table)
    for frame in (table, analysis.metrics_table(write_run("<b>"))):
        assert "&lt;b&gt;" in analysis.styled(frame).to_html()
        assert "<b>" not in analysis.styled(frame).to_html()


# ----------------------------------------------------------------------------------- of networks


def test_layer_table():
    table = analysis.layer_table(NetCIFAR10_Tiny())
    assert table["parameters"].sum() == 36_170 and table["multiply_adds"].sum() == 17_330_816
    assert table["parameters_share"].sum() == pytest.approx(100)
    # By hand: 9 C of depthwise filters for the C that each separable block takes in.
    depthwise = 9 * (24 + 36 + 36 + 48 + 48 + 4 * 64)
    assert table.groupby("kind")["parameters"].sum()["depthwise"] == depthwise
    last = table.iloc[-2]
    assert (last["channels"], last["side"], last["activations"]) == (64, 16, 64 * 16 * 16)
    figure = analysis.plot_costs(NetCIFAR10_Tiny())
    parameters, macs, _ = figure.axes
    assert round(sum(bar.get_height() for bar in parameters.patches)) == 36_170
    assert round(sum(bar.get_height() for bar in macs.patches)) == 17_330_816
    assert f"depthwise {100 * depthwise / 36_170:.0f} %" in texts(figure)


def test_what_isnt_computed_by_layers_is_shown_too():
    fused = fuse(NetCIFAR10_Tiny().eval())
    (row,) = analysis.layer_table(fused).to_dict("records")
    assert (row["layer"], row["kind"], row["multiply_adds"]) == (
        "(functions)",
        "FusedNet",
        17_330_816,
    )
    assert row["channels"] == row["activations"] == 0
    _, macs, _ = analysis.plot_costs(fused).axes
    assert sum(bar.get_height() for bar in macs.patches) == 17_330_816


def test_separable_table():
    table = analysis.separable_table(NetCIFAR10_Tiny()).set_index("block")
    assert len(table) == 9 + 2
    # c4.1 by hand: 9 * 64 + 64 * 64 weights against 9 * 64 * 64, each at 16 x 16 positions.
    row = table.loc["c4.1"]
    assert (row["parameters"], row["standard_parameters"]) == (4_672, 36_864)
    assert row["standard_multiply_adds"] == 36_864 * 256
    assert row["times_fewer_parameters"] == 36_864 / 4_672
    # The strided one and the whole, against the network that has standard ones in their place.
    standard = analysis.layer_table(NetCIFAR10_Tiny(separable=False))
    strided = standard.set_index("layer").loc["c4.0.0"]
    for what in ("parameters", "multiply_adds"):
        assert table.loc["c4.0", f"standard_{what}"] == strided[what]
        assert table.loc["whole network", f"standard_{what}"] == standard[what].sum()
    none = analysis.separable_table(NetCIFAR10_Tiny(separable=False))
    assert "no block of the kind" in analysis.markdown(none)
    folded = analysis.separable_table(load_pretrained("int8")).set_index("block")
    assert folded.loc["these blocks", "parameters"] < table.loc["whole network", "parameters"]


def test_fields_and_dilation():
    fields = analysis.field_table(NetCIFAR10_Tiny())["receptive_field"]
    assert (fields.iloc[0], fields.iloc[-1]) == (3, 45)
    table = analysis.dilation_table(NetCIFAR10_Tiny())
    assert table["receptive_field"].tolist() == [45, 31]
    assert table["sees_all"].tolist() == [49, 0] and table["positions"].tolist() == [256, 256]
    assert table["parameters"].tolist() == [36_170, 36_170]
    flat = analysis.dilation_table(NetCIFAR10_Tiny(dilated=False))
    assert flat["receptive_field"].tolist() == [31, 31]
    chain = analysis.dilation_table(BlueprintNet(layout="8 8k5d2 8s2 8d3"))
    assert chain["receptive_field"].tolist() == [25, 13]


def test_a_chain_of_blocks_is_shown_by_the_size_of_its_maps():
    net = BlueprintNet(layout="8 8 16s2 16x2", attention="eca")
    layers = analysis.layer_table(net).set_index("layer")
    stages = ["stem", "blocks, 32 px", "blocks, 16 px", "head"]
    assert list(dict.fromkeys(layers["stage"])) == stages
    attention = layers.loc["blocks.1.attention.conv"]
    assert attention[["kind", "channels", "side"]].tolist() == ["attention", 16, 16]
    ticks = analysis.plot_costs(net).axes[0].get_xticklabels()
    assert [t.get_text().replace("\n", ", ") for t in ticks] == stages
    labels = [t.get_text() for t in analysis.plot_receptive_field(net).axes[0].get_xticklabels()]
    assert labels[2] == "1.dw\nstride 2"


def test_layers_of_ones_own_network_are_called_what_they_are():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1))
    net.extend([nn.Flatten(), nn.Linear(8, 10)])
    layers = analysis.layer_table(net).iloc[[1, -1]]
    assert layers[["kind", "channels"]].to_numpy().tolist() == [["GroupNorm", 8], ["Linear", 10]]


def test_which_positions_see_the_whole_image_by_their_gradients():
    """Corners of the input reach c4's position if all of the image does."""
    torch.manual_seed(0)
    net = NetCIFAR10_Tiny().eval()
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    features = nn.Sequential(net.c1, net.c2, net.c3, net.c4)(pixels)
    whole = 0
    for i in range(16):  # along the diagonal: as many as along a side
        (gradient,) = torch.autograd.grad(features[0, :, i, i].sum(), pixels, retain_graph=True)
        seen = gradient.abs().sum(dim=(0, 1)) > 0
        whole += bool(seen[0].any() and seen[-1].any())
    assert whole == 7


def test_batch_check(tiny):
    table = analysis.batch_check(tiny, "reference").set_index("policy")
    assert list(table.index) == ["none", "reference"]
    np.testing.assert_allclose(table.loc["none"], [0, 0, 0, 1, 1, 1], atol=1e-3)
    pd.testing.assert_frame_equal(
        table, analysis.batch_check(tiny, "reference").set_index("policy")
    )
    assert shown(analysis.batch_check(tiny, "none"))[0]["mean R"] == "0.000"
    with pytest.raises(ValueError, match="unknown policy"):
        analysis.batch_check(tiny, "refrence")


# -------------------------------------------------------------------------------- of predictions


def test_confused_pairs_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    predicted = np.array([1, 1, 0, 0, 1, 0, 2])  # 0 and 1: twice and once; 2 for 0: once
    log_p = np.log(np.eye(3)[predicted] * 0.9 + 0.05)
    predictions = predictions_of(log_p, labels, ("x", "y", "z"))
    table = analysis.confusion_table(predictions)
    assert table.to_numpy().tolist() == [["x", "y", 2, 1, 75.0], ["x", "z", 0, 1, 25.0]]
    assert len(analysis.confusion_table(predictions, top=1)) == 1


def test_confusion_matrix_by_hand():
    labels, predicted = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 2, 2])
    counts = analysis.confusion_matrix(labels, predicted, 3)
    assert counts.dtype == np.int64
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]


@pytest.mark.parametrize(
    ("labels", "predicted"), [([0, 1], [0]), ([0, 3], [0, 1]), ([0, -1], [0, 1]), ([0.5], [0])]
)
def test_confusion_matrix_refuses(labels, predicted):
    with pytest.raises(ValueError, match=r"one class for each|whole numbers from 0 to 2"):
        analysis.confusion_matrix(np.array(labels), np.array(predicted), 3)


def test_calibration_by_hand():
    # Confidence 0.9 twice, one of them right; 0.6 twice, both right.
    log_p = np.log([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    table, ece = analysis.calibration(log_p, np.array([0, 1, 1, 1]), bins=10)
    assert ece == pytest.approx((2 * abs(0.5 - 0.9) + 2 * abs(1 - 0.6)) / 4)
    filled = table[table["n"] > 0]
    assert len(table) == 10 and filled["n"].tolist() == [2, 2]
    assert filled["accuracy"].tolist() == [1.0, 0.5] and math.isnan(table["accuracy"][0])
    assert (table["low"][0], table["high"][9]) == (0, 1)
    _, ece = analysis.calibration(log_p[:3], np.array([0, 1, 1]))  # by how many are in each bin
    assert ece == pytest.approx((2 * abs(0.5 - 0.9) + abs(1 - 0.6)) / 3)
    log_p = np.log([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    _, ece = analysis.calibration(log_p, np.array([0, 0, 0, 1]))
    assert ece == pytest.approx((3 * 0.1 + 0.4) / 4)


def test_certainty_falls_into_the_last_bin():
    log_p = np.array([[1e-7, -50.0]], dtype=np.float32)  # rounding: a probability above 1
    table, ece = analysis.calibration(log_p, np.array([0]))
    assert table["n"].iloc[-1] == 1 and ece == pytest.approx(0, abs=1e-6)


def test_calibration_refuses():
    with pytest.raises(ValueError, match=r"\(0, 10\)"):
        analysis.calibration(np.zeros((0, 10)), np.zeros(0, dtype=int))
    with pytest.raises(ValueError, match="labels"):
        analysis.calibration(np.zeros((2, 10)), np.zeros(3, dtype=int))
    with pytest.raises(ValueError, match="bins"):
        analysis.calibration(*random_predictions(5), bins=0)


class Chain(nn.Sequential):
    """A single 3x3 convolution of ones each, of the given dilations, then a pool."""

    def __init__(self, dilations):
        super().__init__()
        for i, d in enumerate(dilations, start=1):
            conv = nn.Conv2d(3 if i == 1 else 1, 1, 3, padding=d, dilation=d, bias=False)
            nn.init.ones_(conv.weight)
            self.add_module(f"c{i}", conv)
        self.add_module("gap", nn.AdaptiveAvgPool2d(1))


PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_effective_field_of_a_linear_chain_is_known_exactly():
    images = np.zeros((9, 33, 33, 3), dtype=np.uint8)  # more than are looked at at once
    chain = Chain((1, 1, 1, 1))
    with torch.no_grad():
        chain.c1.weight[:, 1] *= -1  # a falling channel counts as much as a rising one
    field = analysis.effective_receptive_field(chain, images, *PLAIN)
    # Four boxes of three convolved: the coefficients of (1 + x + x^2)^4, in both directions.
    line = np.array([1.0])
    for _ in range(4):
        line = np.convolve(line, np.ones(3))
    expected = np.zeros((33, 33))
    expected[12:21, 12:21] = np.outer(line, line)
    assert field.dtype == np.float64
    np.testing.assert_allclose(field, expected)
    for side, seen in ((3, expected[15:18, 15:18]), (33, expected), (99, expected)):
        share = 100 * seen.sum() / expected.sum()
        assert share_within(field, side) == pytest.approx(share)


def test_effective_field_of_the_net_spans_the_theoretical_45():
    model = NetCIFAR10_Tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_().clamp_min_(1e-3)  # positive all over: no path is cut by a ReLU
    images = np.full((1, 64, 64, 3), 128, dtype=np.uint8)
    model.train()
    field = analysis.effective_receptive_field(model, images, *PLAIN)
    seen = np.flatnonzero(field.sum(axis=0))
    assert (seen[0], seen[-1], len(seen)) == (10, 54, 45)
    assert (field[10:55, 10:55] > 0).all()
    assert model.training and all(p.grad is None for p in model.parameters())


def test_effective_field_refuses():
    with pytest.raises(ValueError, match="square"):
        analysis.effective_receptive_field(
            Chain((1,) * 4), np.zeros((1, 32, 30, 3), np.uint8), *PLAIN
        )


def test_published_networks():
    table = analysis.published_networks()
    reference = table.iloc[0]
    assert (reference["parameters"], reference["accuracy"]) == (36_170, 87.31)
    assert reference["multiply_adds"] == 17_330_816 and "chosen on test" in reference["how"]
    assert table["parameters"].dtype == "int64" and table["parameters"].between(1e4, 1e6).all()
    assert table["accuracy"].between(80, 95).all() and table["source"].notna().all()
    small = table[table["parameters"] <= 40_000]
    assert table["network"].is_unique and (small["accuracy"] > reference["accuracy"]).sum() >= 4


# ---------------------------------------------------------------------------------------- figures


def test_figures_of_the_data_name_it(tiny):
    for figure in (
        analysis.plot_class_counts(tiny),
        analysis.plot_samples(tiny, per_class=2),
        analysis.plot_augmentations(tiny, ("none", "light"), ("batched", "torchvision"), n=2),
    ):
        assert tiny.title in texts(figure)


def test_samples_show_each_class(tiny):
    axes = analysis.plot_samples(tiny, per_class=3).axes[0]
    tiles = np.asarray(axes.images[0].get_array())
    assert tiles.shape == (10 * 34 - 2, 3 * 34 - 2, 3)
    third_of_class_7 = tiny.train_images[tiny.train_labels == 7][2]
    assert (tiles[7 * 34 : 7 * 34 + 32, 2 * 34 : 2 * 34 + 32] == third_of_class_7).all()


def test_a_class_without_images_is_left_out(tiny):
    few = replace(tiny, train_images=tiny.train_images[:3], train_labels=np.array([0, 2, 2]))
    axes = analysis.plot_samples(few).axes[0]
    assert np.asarray(axes.images[0].get_array()).shape == (2 * 34 - 2, 32, 3)
    log_p, labels = random_predictions(40)
    predictions = predictions_of(log_p[labels != 3], labels[labels != 3])
    axes = analysis.plot_per_class(predictions).axes[0]
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert len(names) == 9 and datasets.CLASSES[3] not in names


def test_without_augmentation_every_build_gives_back_the_image(tiny):
    stats = datasets.channel_stats(tiny.train_images)
    images = tiny.train_images[:2]
    for build in ("batched", "torchvision"):
        back = augmented(images, "none", build, stats, seed=0)
        np.testing.assert_allclose(back, images / 255, atol=1e-5)


@pytest.mark.parametrize("dilated", [True, False])
def test_plot_receptive_field(dilated):
    text = texts(analysis.plot_receptive_field(NetCIFAR10_Tiny(dilated=dilated)))
    assert ("45 x 45" if dilated else "31 x 31") in text and ("dilation 3" in text) == dilated


def test_plot_history_says_what_selected(write_run):
    on_test = analysis.plot_history(write_run("a", protocol="test-selected"))
    assert "test (selection!)" in texts(on_test) and "epoch chosen on test" in texts(on_test)
    on_validation = analysis.plot_history(write_run("b"))
    assert "validation" in texts(on_validation) and "selection!" not in texts(on_validation)
    nothing = texts(analysis.plot_history(write_run("c", protocol="full")))
    assert "validation" not in nothing and "selected epoch" not in nothing


def test_plot_history_draws_the_history(write_run):
    loss = analysis.plot_history(write_run()).axes[0]
    train, selection, star = (line.get_xydata().tolist() for line in loss.lines)
    assert train == [[e, 1.9 / e] for e in range(1, 5)]
    assert selection == [[e, 2.0 / e] for e in range(1, 5)]
    assert star == [[4, 0.5]]
    taught = write_run("taught", fields={"teacher": "results/other"})
    assert [len(axes.lines) for axes in analysis.plot_history(taught).axes[:2]] == [2, 3]


def test_plot_history_of_many_has_a_colour_for_each_recipe(write_run):
    runs = [write_run(f"run{i}", seed=i, finished=i != 2) for i in range(3)]
    runs.append(write_run("other", recipe="tuned", protocol="full"))
    figure = analysis.plot_history(runs)
    assert "4 runs · CIFAR-10" in texts(figure)
    assert "quick · val · seeds 0, 1, 2 · 1 unfinished" in texts(figure)
    assert "tuned · full · seed 0" in texts(figure)
    assert len({line.get_color() for line in figure.axes[2].lines}) == 2


def test_plot_history_shows_where_the_images_grow(write_run):
    run = write_run()
    plain = analysis.plot_history(run)
    assert "px" not in texts(plain) and "grow" not in texts(plain)
    run.recipe.update(start_side=16, grow=1.0, lr=0.2)
    figure = analysis.plot_history(run)
    assert "16 px" in texts(figure) and "24 px" in texts(figure) and "32 px" not in texts(figure)
    dotted = [line for line in figure.axes[1].lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in dotted] == [2.5]  # the third epoch is the first of 24
    assert figure.axes[2].lines[0].get_ydata().tolist() == [0.5] * 4  # 0.1 of 0.2

    with pytest.raises(ValueError, match="no run"):
        analysis.plot_history([])


def test_figures_of_predictions_say_whose_they_are():
    predictions = predictions_of(*random_predictions(40))
    for figure in (
        analysis.plot_confusion(predictions),
        analysis.plot_per_class(predictions),
        analysis.plot_reliability(predictions),
        analysis.plot_mistakes(predictions, n=5),
    ):
        assert predictions.title in texts(figure)
    with pytest.raises(ValueError, match="log_p must be"):
        replace(predictions, labels=predictions.labels[:3])
    with pytest.raises(ValueError, match="3 images, but 40 labels"):
        replace(predictions, images=predictions.images[:3])


def test_confusion_figure_shows_the_counts():
    log_p = np.log([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.9]])
    predictions = predictions_of(log_p, np.array([0, 0, 1, 1]), ("x", "y"))
    axes = analysis.plot_confusion(predictions).axes[0]
    assert [t.get_text() for t in axes.texts] == ["2", "1", "1"]
    assert axes.images[0].get_array().tolist() == [[None, 0], [50, None]]  # mistakes alone


def test_mistakes_are_the_surest_and_wrong(tiny):
    labels = tiny.test_labels
    log_p = np.full((len(labels), 10), np.log(0.001), dtype=np.float32)
    log_p[np.arange(len(labels)), labels] = np.log(0.991)
    for i, p in ((3, 0.7), (5, 0.9)):
        log_p[i] = np.log((1 - p) / 9)
        log_p[i, (labels[i] + 1) % 10] = np.log(p)
    predictions = analysis.Predictions(log_p, tiny.test_images, labels, tiny.classes, "t")
    figure = analysis.plot_mistakes(predictions)
    titles = [axes.get_title().split("\n") for axes in figure.axes if axes.get_title()]
    for (true, taken, sure), (i, p) in zip(titles, ((5, "90.0 %"), (3, "70.0 %")), strict=True):
        assert (true, sure) == (tiny.classes[labels[i]], p)
        assert taken == f"→ {tiny.classes[(labels[i] + 1) % 10]}"
    log_p[[3, 5]] = 0.0
    log_p[[3, 5], labels[[3, 5]]] = 1.0
    assert "No mistake" in texts(analysis.plot_mistakes(predictions))


def test_plot_effective_receptive_field(trained, tiny):
    text = texts(analysis.plot_effective_receptive_field(trained, tiny, n=2))
    assert trained.title in text and "100.0 % within 45 px" in text
    assert tiny.title in texts(analysis.plot_effective_receptive_field(BlueprintNet(), tiny, 1))


def test_accuracy_vs_cost_leaves_out_what_is_not_comparable(write_run):
    runs = [
        write_run("a", test_acc=88.0),
        write_run("b", seed=1, test_acc=89.0),
        write_run("c", dataset="shapes", test_acc=99.0),
        write_run("d", limit=1000, test_acc=33.0),
        write_run("e", seed=2, finished=False),
    ]
    trial = write_run("f", seed=3)
    runs.append(replace(trial, metrics=trial.metrics | {"test_acc": None}))
    text = texts(analysis.plot_accuracy_vs_cost(runs))
    assert "quick · val: 88.50 (88.00, 89.00), n = 2" in text and "Left out: 4 runs" in text
    # A mean of two would be called one of three.
    assert analysis.runs_table([*runs[:2], runs[-1]])["test_acc"].isna().all()
    assert "99.00" not in text and "33.00" not in text and "Tiniest" in text
    alone = texts(analysis.plot_accuracy_vs_cost(runs[0]))
    assert "quick · val: 88.00, n = 1" in alone


def test_sizes_of_a_design_are_joined(write_run):
    small, large = (
        replace(run := write_run(name, recipe=name), metrics=run.metrics | {"params": params})
        for name, params in (("small", 10_000), ("large", 90_000))
    )
    other = write_run("other", dataset="shapes")
    figure = analysis.plot_accuracy_vs_cost(family=[large, small, other])
    line = figure.axes[0].lines[0]
    table = analysis.runs_table([small, large])
    assert list(line.get_xdata()) == list(table["parameters"])
    assert list(line.get_ydata()) == list(table["test_acc"])
    assert "one design at several sizes" in texts(figure) and "Left out: 1 run," in texts(figure)


def test_labels_of_points_do_not_overlap(write_run):
    runs = [
        write_run(f"r{i}", recipe=f"recipe{i}", test_acc=accuracy)
        for i, accuracy in enumerate((87.3, 87.0, 90.9, 90.6))
    ]
    family = analysis.published_study("family")
    figure = analysis.plot_accuracy_vs_cost(runs, family=family)
    figure.canvas.draw()
    boxes = [Text.get_window_extent(t) for t in figure.axes[0].texts]
    sizes = len(analysis.runs_table(family))
    assert len(boxes) == len(analysis.published_networks()) + 4 + sizes
    line = max(figure.axes[0].lines, key=lambda line: len(line.get_xdata()))
    path = line.get_transform().transform_path(line.get_path()).interpolated(50)
    assert len(line.get_xdata()) == sizes and not any(
        box.count_contains(path.vertices) for box in boxes
    )
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_name_wider_than_the_figure_still_stands_at_its_point(write_run):
    name = "long" * 40
    figure = analysis.plot_accuracy_vs_cost(write_run("r", recipe=name, test_acc=90))
    (label,) = (text for text in figure.axes[0].texts if name in text.get_text())
    assert abs(label.xyann[1]) < 30, "points above or below it"


def test_settings_of_matplotlib_are_left_alone(write_run):
    plt.rcdefaults()  # whatever an earlier test has left
    before = dict(plt.rcParams)
    analysis.plot_history(write_run())
    assert dict(plt.rcParams) == before


# ------------------------------------------------------------------------------------ searches


@pytest.fixture(scope="module")
def search_folder(tiny, tmp_path_factory):
    """A study file of a search, trained into the folder `runs` beside it."""
    folder = tmp_path_factory.mktemp("search")
    searched(search_study(folder, prune="none"), folder / "runs", tiny)
    return folder


def test_what_is_compared_of_a_search(search_folder):
    study = load_study(search_folder / "rates.yaml")
    runs = analysis.study_runs(study, search_folder / "runs")
    names = [run.name for run in runs]
    accuracy = {
        run.name: run.metrics["val_acc"]
        for run in analysis.find_runs(search_folder / "runs")
        if run.name.startswith("trial")
    }
    best = max(accuracy, key=lambda name: accuracy[name])
    assert names[0] == "base-val-seed0" and accuracy[names[1]] == accuracy[best]
    assert len(names) == 2
    # Confirmed by other seeds, the one that it was chosen by is left out.
    confirmed = replace(study, search=replace(study.search, confirm=1))
    assert len(analysis.study_runs(confirmed, search_folder / "runs")) == 1
    twice = replace(study.search, confirm=2)
    two, ranked = chosen(twice, search_folder / "runs"), sorted(accuracy.values())[::-1]
    assert [seed for _, seed in two] == [0, 1, 2] * 2
    assert [accuracy[f"{r.name}-val-seed0"] for r, _ in two[::3]] == ranked[:2]
    table = analysis.study_table(runs)
    assert table["variation"].tolist() == ["base", names[1].split("-")[0].replace("_", " ")]


def test_trials_that_were_stopped_are_marked():
    search = optuna.create_study(direction="maximize")
    search.set_user_attr("made_for", {"dataset": "shapes", "limit": None})
    for state, accuracies in (("COMPLETE", [30, 50]), ("PRUNED", [20]), ("COMPLETE", [25, 60])):
        search.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[state],
                value=accuracies[-1],
                intermediate_values=dict(enumerate(accuracies, 1)),
            )
        )
    lines = analysis.plot_search(search, "epochs").axes[0].lines
    whole = "trained to the end"
    assert [line.get_label() for line in lines] == [whole, "stopped", whole]
    assert [line.get_ydata()[-1] for line in lines] == [50, 20, 60]


def test_a_search_is_read_and_drawn(search_folder, monkeypatch):
    file, folder = search_folder / "rates.yaml", search_folder / "runs"
    search = analysis.load_search(file, folder)
    table = analysis.search_table(search)
    assert table.to_dict("records")[0] == {
        "outcome": "complete", "trials": 5, "epochs": 15,
        "highest_val_acc": max(trial.value for trial in search.trials),
    }  # fmt: skip
    assert "15 of the 15" in table.attrs["note"] and "NOT CIFAR-10" in table.attrs["note"]
    before = dict(plt.rcParams)
    for what in ("history", "epochs", "importances", "slices"):
        figure = analysis.plot_search(search, what)
        assert "NOT CIFAR-10" in figure.get_suptitle()
        plt.close(figure)
    assert dict(plt.rcParams) == before
    for name in ("c#1", "what?", "d%41", "a b"):
        (odd := folder.parent / name).mkdir()
        shutil.copy(folder / "trials.db", odd)
        found = analysis.load_search(file, odd)
        assert len(found.trials) == 5 and len(list(odd.iterdir())) == 1
    new = optuna.create_study(study_name="new")
    new.set_user_attr("made_for", search.user_attrs["made_for"])
    assert "no two trials" in texts(analysis.plot_search(new))
    with pytest.raises(ValueError, match="unknown figure 'pie'; valid: history, epochs"):
        analysis.plot_search(search, "pie")
    with pytest.raises(FileNotFoundError, match=r"no search at .*begin it with make sweep"):
        analysis.load_search(file, search_folder)
    with pytest.raises(ValueError, match="'ablation' has no search"):
        analysis.load_search("studies/ablation.yaml", folder)
    monkeypatch.setenv("TINYCIFAR_STORAGE", "postgresql://u:secret@127.0.0.1:1/x")
    with pytest.raises(RunError, match=r"u:\*\*\*@127"):
        analysis.load_search(file, folder)
    # A published search is read from its own file, whatever database its reader works with.
    assert analysis.load_search(file, storage=recorded(folder)).trials == search.trials
