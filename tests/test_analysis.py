"""Analysis: what it computes against hand-made and independent figures; what it says and refuses.

Run directories are written here by hand, as run_directory.py and training.py lay them out.
"""

import csv
import itertools
import json
import math
import statistics
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn

from tinycifar import analysis
import augment
import tinycifar.data as cifar10
from tinycifar.analysis.measures import augmented
from tinycifar.analysis.runs import Predictions, gains
from tinycifar.recipes import RECIPES
from tiny_cifar10_net import NetCIFAR10_Tiny
from tinycifar.training import evaluate

HISTORY = ("epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "seconds")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def write_run(tmp_path):
    """Write a run directory as training does; returns it loaded."""

    def write(name="a", *, recipe="quick", protocol="val", seed=0, epochs=4, finished=True, **more):
        dataset, limit = more.get("dataset", "cifar10"), more.get("limit")
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "recipe": {"name": recipe, "epochs": 4, "schedule": "plateau", "lr": 0.1},
            "seed": seed,
            "protocol": protocol,
            "dataset": dataset,
            "limit": limit,
            "data_sha256": more.get("checksum", "0" * 64),
            "split": {"train": 45_000, "selection": 5_000, "test": 10_000, "seed": 0},
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "classes": list(cifar10.CLASSES),
            "model": {},
        }
        (folder / "config.json").write_text(json.dumps(config))
        with open(folder / "history.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(HISTORY)
            for e in range(1, epochs + 1):
                selection = ("", "") if protocol == "full" else (2.0 / e, 10.0 * e)
                table.writerow((e, 0.1, 1.9 / e, 11.0 * e, *selection, 30.0))
        torch.manual_seed(seed)
        torch.save(NetCIFAR10_Tiny().state_dict(), folder / "best.pt")
        if finished:
            metrics = {
                "params": 36_170,
                "macs": 17_330_816,
                "epochs_run": epochs,
                "best_epoch": epochs,
                "train_acc": 44.0,
                "val_acc": None if protocol == "full" else more.get("val_acc", 40.0),
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


def predictions_of(log_p, labels, classes=cifar10.CLASSES):
    images = np.zeros((len(labels), 32, 32, 3), np.uint8)
    return Predictions(log_p, images, labels, classes, "test images · my run")


def rows_of(markdown):
    """The cells of a markdown table's rows, header first."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert len({len(row) for row in cells}) == 1, "ragged table"
    return [cells[0], *cells[2:]]


def texts(figure):
    """All text in a figure, without line breaks."""
    found = [t.get_text() for t in figure.findobj(plt.Text)]
    return " ".join(" ".join(found).replace("\xa0", " ").split())


# ------------------------------------------------------------------------------------------ runs


def test_load_run(write_run):
    run = write_run("first", epochs=3)
    assert run.name == "first" and run.epochs == 3
    assert run.title == "quick · val · seed 0 · CIFAR-10"
    assert run.history["val_acc"].tolist() == [10.0, 20.0, 30.0]
    assert run.history["lr"].dtype == np.float64
    assert run.metrics["test_acc"] == 70.0


def test_a_published_run_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert analysis.load_run("tuned-seed0").folder == analysis.runs.RESULTS / "tuned-seed0"


def test_empty_fields_are_nan(write_run):
    history = write_run(protocol="full").history
    assert np.isnan(history["val_loss"]).all() and np.isfinite(history["train_loss"]).all()


def test_titles_say_what_must_be_said(write_run):
    run = write_run(dataset="shapes", limit=1000, protocol="test-selected", finished=False)
    assert "shapes (stand-in, NOT CIFAR-10), 1,000 training images" in run.title
    assert "epoch chosen on test" in run.title
    assert "unfinished, 4 epochs" in run.title
    assert "unfinished, 1 epoch ·" in write_run("b", epochs=1, finished=False).title


def test_a_title_names_the_data_as_the_data_does(write_run, tiny):
    assert write_run(dataset="shapes", limit=200).data_title == tiny.title


def test_a_run_before_its_first_epoch(write_run):
    run = write_run(epochs=0, finished=False)
    (run.folder / "history.csv").unlink()
    run = analysis.load_run(run.folder)
    assert run.epochs == 0 and run.metrics is None
    assert "unfinished: 0 of 4" in analysis.runs_table([run])
    assert isinstance(analysis.plot_history(run), Figure)


def test_find_runs_sorts_and_passes_over_other_folders(write_run, tmp_path):
    for name in ("b", "c", "a"):
        write_run(name)
    (tmp_path / "notes").mkdir()
    assert [run.name for run in analysis.find_runs(tmp_path)] == ["a", "b", "c"]
    assert analysis.find_runs(tmp_path / "notes") == []


def test_what_is_no_run_directory_is_refused(write_run, tmp_path):
    write_run("one")
    write_run("two")
    with pytest.raises(FileNotFoundError, match=r"three.*config\.json.*one, two"):
        analysis.load_run(tmp_path / "three")
    with pytest.raises(FileNotFoundError, match="beside it there is none"):
        analysis.load_run(tmp_path / "one" / "deeper")
    with pytest.raises(FileNotFoundError, match="no folder"):
        analysis.find_runs(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="find_runs"):
        analysis.load_runs(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "not JSON"),
        ("config.json", "{}", "lacks recipe"),
        ("metrics.json", "[]", "lacks test_acc"),
        ("history.csv", "epoch,lr\n1,0.1\n", "expected numbers in epoch"),
        ("history.csv", ",".join(HISTORY) + "\n1,x,1,1,1,1,1\n", "expected numbers in epoch"),
    ],
)
def test_damaged_files_are_named(write_run, file, content, message):
    run = write_run()
    (run.folder / file).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        analysis.load_run(run.folder)
    assert file in str(caught.value)


def test_predictions_of_a_run(write_run, tiny):
    run = write_run(dataset="shapes", limit=200, checksum=tiny.checksum)
    predictions = analysis.predictions(run, tiny, "test")
    log_p = predictions.log_p
    assert log_p.shape == (40, 10) and log_p.dtype == np.float32
    assert predictions.title == f"test images · {run.title}"
    assert (predictions.images is tiny.test_images) and (predictions.labels is tiny.test_labels)
    assert (predictions.predicted == log_p.argmax(axis=1)).all()
    model = analysis.load_model(run)
    assert not model.training
    pixels = torch.from_numpy(tiny.test_images).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = model((pixels - 0.5) / 0.25)
    np.testing.assert_allclose(log_p, expected.numpy(), atol=1e-4)


def test_other_data_than_the_runs_is_refused(write_run, tiny):
    with pytest.raises(ValueError, match=r"CIFAR-10 .*not on shapes .*load_data"):
        analysis.predictions(write_run(), tiny)


def test_answers_on_validation(write_run, tiny):
    how = {"dataset": "shapes", "limit": 200, "checksum": tiny.checksum}
    run = write_run(**how)
    on_validation = analysis.predictions(run, tiny, "validation")
    held_back = cifar10.split(tiny.train_labels)[1]
    np.testing.assert_array_equal(on_validation.images, tiny.train_images[held_back])
    np.testing.assert_array_equal(on_validation.labels, tiny.train_labels[held_back])
    assert on_validation.title.startswith("validation images · quick · val")
    assert analysis.predictions(run, tiny).title == on_validation.title  # finished or not
    alike = evaluate(
        analysis.load_model(run), on_validation.images, on_validation.labels, run.stats
    )
    right = on_validation.predicted == on_validation.labels
    assert alike[1] == pytest.approx(100 * right.mean())
    with pytest.raises(ValueError, match="no validation images: its protocol is full"):
        analysis.predictions(write_run("b", protocol="full", **how), tiny, "validation")
    with pytest.raises(ValueError, match="part must be test, validation or None"):
        analysis.predictions(run, tiny, "train")


def test_the_test_set_is_left_alone_until_a_run_is_finished(write_run, tiny):
    how = {"dataset": "shapes", "limit": 200, "checksum": tiny.checksum, "finished": False}
    run = write_run(**how)
    assert analysis.predictions(run, tiny).title.startswith("validation")
    with pytest.raises(ValueError, match="isn't finished, and the test set is used once"):
        analysis.predictions(run, tiny, "test")
    with pytest.raises(ValueError, match="isn't finished"):
        analysis.predictions(write_run("b", protocol="full", **how), tiny)
    chosen_on_it = write_run("c", protocol="test-selected", **how)
    assert analysis.predictions(chosen_on_it, tiny).title.startswith("test")


def test_load_data_is_what_the_run_was_trained_on(write_run, tiny):
    run = write_run(dataset="shapes", limit=200)
    assert analysis.load_data(run).checksum == tiny.checksum


# ---------------------------------------------------------------------------------------- tables


def test_runs_table_means_and_stds(write_run):
    accuracies = [87.1, 87.5, 86.2]
    runs = [write_run(f"s{i}", seed=i, test_acc=a) for i, a in enumerate(accuracies)]
    header, row = rows_of(analysis.runs_table(runs))
    cells = dict(zip(header, row, strict=True))
    mean, std = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert cells["test, %"] == f"{mean:.2f} ± {std:.2f}"
    assert cells["test with flip, %"] == f"{mean + 0.5:.2f} ± {std:.2f}"
    assert cells["validation, %"] == "40.00 ± 0.00"
    assert (cells["seeds"], cells["parameters"], cells["epochs"]) == ("n = 3", "36,170", "4")


def test_one_seed_has_no_std(write_run):
    header, row = rows_of(analysis.runs_table([write_run(test_acc=70.0)]))
    cells = dict(zip(header, row, strict=True))
    assert cells["seeds"] == "n = 1" and cells["test, %"] == "70.00"


def test_unlike_runs_are_not_pooled(write_run):
    runs = [
        write_run("a"),
        write_run("b", seed=1, protocol="test-selected"),
        write_run("c", seed=2, dataset="shapes"),
        write_run("d", seed=3, limit=1000),
        write_run("e", seed=4, recipe="baseline"),
        write_run("f", seed=5, epochs=2),
    ]
    config = json.loads((runs[5].folder / "config.json").read_text())
    config["recipe"]["lr"] = 0.2  # the same name, but another recipe
    (runs[5].folder / "config.json").write_text(json.dumps(config))
    runs[5] = analysis.load_run(runs[5].folder)
    rows = rows_of(analysis.runs_table(runs))[1:]
    assert len(rows) == 6 and all(row[3] == "n = 1" for row in rows)
    assert rows[1][2] == "test-selected: epoch chosen on test"
    assert rows[1][6] == "–", "an accuracy on test must not stand under validation"
    assert "NOT CIFAR-10" in rows[2][1]


def test_runs_under_another_meaning_of_a_policys_name_are_not_pooled(write_run):
    noted = asdict(augment.POLICIES["reference"])  # the policy of these runs
    runs = [write_run(name, seed=seed) for seed, name in enumerate("abc")]
    runs[1].config["policies"] = {"reference": noted}  # as an early run, which noted none, had it
    runs[2].config["policies"] = {"reference": noted | {"rotate": 45.0}}
    rows = rows_of(analysis.runs_table(runs))[1:]
    assert [row[3] for row in rows] == ["n = 2", "n = 1"]


def test_an_unfinished_run_is_never_quoted(write_run):
    runs = [write_run("a"), write_run("b", seed=1, epochs=2, finished=False)]
    rows = rows_of(analysis.runs_table(runs))[1:]
    assert rows[0][3] == "n = 1"
    assert "unfinished: 2 of 4" in rows[1] and rows[1][6:] == ["–"] * 4


def test_a_repeated_seed_counts_once_and_is_said(write_run):
    runs = [write_run("a", test_acc=70.0), write_run("copy", test_acc=71.0)]
    table = analysis.runs_table(runs)
    assert rows_of(table)[1][7] == "70.00" and "Left out" in table and "copy" in table


def test_epochs_that_differ_are_a_range(write_run):
    runs = [write_run("a", epochs=2), write_run("b", seed=1, epochs=4)]
    assert rows_of(analysis.runs_table(runs))[1][5] == "2–4"


def test_metrics_table(write_run):
    run = write_run(test_acc=71.23)
    table = dict(rows_of(analysis.metrics_table(run)))
    assert table["**test accuracy**"] == "**71.23 %**"
    assert table["selected epoch"] == "4, by validation loss"
    assert table["parameters"] == "36,170"
    assert "training time" not in table
    assert "training time" in dict(rows_of(analysis.metrics_table(run, times=True)))


@pytest.mark.parametrize(
    ("protocol", "selected"), [("test-selected", "4, by test loss"), ("full", "4, the last")]
)
def test_metrics_table_without_validation(write_run, protocol, selected):
    table = dict(rows_of(analysis.metrics_table(write_run(protocol=protocol))))
    assert table["selected epoch"] == selected
    assert not any("validation" in label for label in table)


def test_metrics_table_of_an_unfinished_run(write_run):
    table = analysis.metrics_table(write_run(epochs=2, finished=False))
    assert "unfinished, 2 of 4 epochs" in table and "accuracy" not in table


def test_layer_table():
    rows = rows_of(analysis.layer_table(NetCIFAR10_Tiny()))
    assert rows[-1][3:] == ["**36,170**", "100 %", "**17,330,816**", "100 %"]
    number = lambda text: int(text.replace(",", ""))  # noqa: E731
    assert sum(number(row[3]) for row in rows[1:-1]) == 36_170
    assert sum(number(row[5]) for row in rows[1:-1]) == 17_330_816


def test_field_table():
    rows = rows_of(analysis.field_table(NetCIFAR10_Tiny()))
    assert rows[1][-1] == "3" and rows[-1][-1] == "45"


def test_separable_table():
    rows = rows_of(analysis.separable_table(NetCIFAR10_Tiny()))
    assert len(rows) == 1 + 9 + 2
    # c4.1 by hand: 9 * 64 + 64 * 64 weights against 9 * 64 * 64, each at 16 x 16 positions.
    row = next(row for row in rows if row[0] == "c4.1")
    assert row[1:5] == ["64 → 64", "4,672", "36,864", "7.9x less"]
    assert row[5:] == [f"{4_672 * 256:,}", f"{36_864 * 256:,}", "7.9x less"]
    # The strided one, against the layers of the network that has standard ones in its place.
    standard = rows_of(analysis.layer_table(NetCIFAR10_Tiny(separable=False)))
    strided = next(row for row in standard if row[0] == "c4.0.0")
    row = next(row for row in rows if row[0] == "c4.0")
    assert (row[3], row[6]) == (strided[3], strided[5])
    # The whole network, against the one that has standard convolutions everywhere.
    total = [cell.strip("*") for cell in standard[-1]]
    assert rows[-1][2:4] == ["36,170", total[3]] and rows[-1][5:7] == ["17,330,816", total[5]]
    assert "no separable" in analysis.separable_table(NetCIFAR10_Tiny(separable=False))


def test_dilation_table():
    with_it, without = rows_of(analysis.dilation_table())[1:]
    assert (with_it[1], without[1]) == ("45 px", "31 px") and with_it[3:] == without[3:]
    assert (with_it[2], without[2]) == ("49 of 256", "0 of 256")
    assert rows_of(analysis.dilation_table(width=2, dilated=False))[1][1] == "45 px"


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


def test_costs_add_up_and_name_the_kinds():
    figure = analysis.plot_costs(NetCIFAR10_Tiny())
    parameters, macs, _ = figure.axes
    assert round(sum(bar.get_height() for bar in parameters.patches)) == 36_170
    assert round(sum(bar.get_height() for bar in macs.patches)) == 17_330_816
    # By hand: 9 C of depthwise filters for the C that each separable block takes in.
    depthwise = 9 * (24 + 36 + 36 + 48 + 48 + 4 * 64)
    assert f"depthwise {100 * depthwise / 36_170:.0f} %" in texts(figure)


def test_batch_check(tiny):
    rows = rows_of(analysis.batch_check(tiny, "reference"))
    assert [row[0] for row in rows[1:]] == ["none", "reference"]
    assert rows[1][1:] == ["0.000"] * 3 + ["1.000"] * 3
    assert rows[2][1:] != rows[1][1:]
    assert analysis.batch_check(tiny, "reference") == analysis.batch_check(tiny, "reference")
    with pytest.raises(ValueError, match="unknown policy"):
        analysis.batch_check(tiny, "refrence")


# ------------------------------------------------------------------------------------ mathematics


def test_the_published_reference_comes_first_where_asked_for(write_run):
    rows = rows_of(analysis.runs_table([write_run()], reference=True))
    published = analysis.published_networks()[0]
    assert f"{published.accuracy:.2f}" in rows[1] and f"{published.parameters:,}" in rows[1]
    assert "as published" in rows[1][0] and rows[2][0] == "quick"


@pytest.fixture
def a_study(write_run):
    """Two runs of the base, two of a better variation, one of a worse, one unfinished."""
    runs = []
    for name, accuracies in (("base", [40, 42]), ("worse", [35]), ("higher_rate", [45, 49])):
        for seed, accuracy in enumerate(accuracies):
            run = write_run(f"{name}{seed}", recipe=name, seed=seed, val_acc=float(accuracy))
            run.config["recipe"]["lr"] = {"base": 0.1, "worse": 0.05, "higher_rate": 0.2}[name]
            runs.append(run)
    return [*runs, write_run("late", recipe="late", finished=False)]


def test_a_study_is_compared_with_its_base(a_study):
    table = analysis.study_table(a_study)
    header, base, higher, worse = rows_of(table)
    assert header[3] == "validation, %" and base[:3] == ["base", "", "n = 2"]
    # What 5,000 images tell of how far seeds differ, ten times, and what the two pairs tell.
    by_the_count = 100**2 * 0.41 * 0.59 / (2 * 5_000)
    seeds = statistics.variance([40, 42]) + statistics.variance([45, 49])
    spread = math.sqrt((10 * by_the_count + seeds) / 12)
    accuracies = "47.00 (45.00, 49.00)"
    gain = f"**+6.00 ± {spread:.2f}**"
    assert higher == ["higher rate", "`lr=0.2`", "n = 2", accuracies, "0.500", gain]
    error = spread * math.sqrt(1 + 1 / 2)
    assert worse == ["worse", "`lr=0.05`", "n = 1", "35.00", "0.500", f"**-6.00 ± {error:.2f}**"]
    assert "CIFAR-10, 4 epochs" in table and "left out: 1 run" in table
    with pytest.raises(ValueError, match="has one base"):
        analysis.study_table(a_study[2:])


def test_a_study_never_compares_on_test(write_run):
    with pytest.raises(ValueError, match="on validation"):
        analysis.study_table([write_run(recipe="base", protocol="full")])


def test_a_study_never_compares_across_data(a_study):
    a_study[0].config["limit"] = 200
    with pytest.raises(ValueError, match="on one data set only"):
        analysis.study_table(a_study)


def test_a_gain_is_clear_where_a_t_test_says_so(write_run):
    number = itertools.count()

    def gain(base, other):
        groups = [
            [write_run(f"{next(number)}", seed=i, recipe=name, val_acc=a) for i, a in enumerate(of)]
            for name, of in (("base", base), ("other", other))
        ]
        return gains(groups)[0]

    # One seed each at 90 %: sqrt(0.9 * 0.1 / 10,000) is 0.3 points, and 2.23 errors are asked for.
    single = gain((90.0,), (90.9,))
    assert single.error == pytest.approx(0.3 * math.sqrt(2)) and not single.clear
    assert gain((90.0,), (91.0,)).clear and gain((90.0,), (89.0,)).clear
    # Seeds that agree by chance don't make half a point clear; those that don't, blur a whole one.
    assert not gain((90.0, 90.0, 90.0), (90.5,)).clear
    assert not gain((89.0, 90.0, 91.0), (91.2,)).clear
    # Many seeds speak for themselves.
    many = tuple(90 + 0.01 * i for i in range(60))
    assert gain(many, tuple(a + 1 for a in many)).error == pytest.approx(0.035, rel=0.1)


def test_the_study_figure_shows_each_variation(a_study):
    figure = analysis.plot_study(a_study)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["higher rate, n = 2", "worse, n = 1"]
    assert next(line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1) == 6
    assert "CIFAR-10" in texts(figure)
    assert "no variation is finished yet" in texts(analysis.plot_study(a_study[:2]))
    assert "no variation" not in texts(figure)


def with_history(run, best_epoch=None, **columns):
    """`run`, its history's columns replaced, and another chosen epoch."""
    history = run.history | {name: np.array(values, float) for name, values in columns.items()}
    metrics = run.metrics if best_epoch is None else run.metrics | {"best_epoch": best_epoch}
    return replace(run, history=history, metrics=metrics)


def test_choosing_on_test_is_shown_for_what_it_is(write_run):
    first = write_run("a", protocol="test-selected", test_acc=60.0)
    second = write_run("b", protocol="test-selected", seed=1, test_acc=62.0)
    runs = [
        with_history(first, best_epoch=2, val_acc=[10, 60, 61, 58]),  # chosen by loss: no highest
        with_history(second, best_epoch=3, val_acc=[10, 50, 62, 61]),
        write_run("c", protocol="full"),
        write_run("d", finished=False),
    ]
    header, row = rows_of(analysis.choice_table(runs))
    shown = dict(zip(header, row, strict=True))
    assert shown["seeds"] == "n = 2" and shown["chosen on"] == "test"
    assert shown["protocol"] == "test-selected: epoch chosen on test"
    assert shown["chosen epoch"] == "2–3"
    assert shown["there, %"] == "61.00 (60.00, 62.00)"
    assert shown["chosen − last"] == "+1.50 (+2.00, +1.00)"
    assert shown["highest − last"] == "+2.00 (+3.00, +1.00)"
    assert "chose its epoch" in analysis.choice_table(runs[2:])


def test_what_each_drop_of_the_learning_rate_buys(write_run):
    run = with_history(write_run(), lr=[0.1, 0.1, 0.01, 0.001], val_acc=[50, 40, 58, 57])
    rows = [row[:2] + row[3:] for row in rows_of(analysis.drops_table(run))[1:]]
    assert rows == [
        ["1–2", "0.1", "50.00", "–", "–"],
        ["3", "0.01", "58.00", "+18.00", "+8.00"],
        ["4", "0.001", "57.00", "-1.00", "-1.00"],
    ]


def test_the_published_run_is_as_its_notebook_tells():
    run = analysis.published_run()
    assert run.epochs == 50 and np.isnan(run.history["train_loss"]).all()
    assert (run.metrics["best_epoch"], run.metrics["test_acc"]) == (50, 87.31)
    # As its README says: epoch 20 is the first above 83 %, 39 the first above 86.5 %.
    accuracy = run.history["val_acc"]
    assert [np.argmax(accuracy > level) + 1 for level in (83, 86.5)] == [20, 39]
    # Where three epochs brought no lower loss, counted by hand: 17 to 19 and 36 to 38.
    rates = [0.045] * 19 + [0.0045] * 19 + [0.00045] * 12
    np.testing.assert_allclose(run.history["lr"], rates)
    assert isinstance(analysis.plot_history([run]), Figure)


def test_the_published_code_lacks_most_of_what_the_published_run_started_with():
    code = analysis.published_code_run().history["train_acc"]
    lead = analysis.published_run().history["train_acc"][1:5] - code[1:]
    assert len(code) == 5 and lead.mean().round(1) == 1.4
    for run in ("baseline-test-selected", "baseline-test-selected-seed1", "baseline-val"):
        ours = analysis.load_run(analysis.runs.RESULTS / run).history["train_acc"]
        assert 0.2 <= (code - ours[:5])[1:].mean().round(1) <= 0.7


def test_the_rates_of_our_plateau_runs_follow_from_their_losses():
    run = analysis.load_run(analysis.runs.RESULTS / "baseline-test-selected")
    rates = analysis.runs.plateau_rates(RECIPES["baseline"], run.history["val_loss"])
    np.testing.assert_allclose(run.history["lr"], rates)


def test_the_start_of_runs_is_their_training_accuracy_epoch_by_epoch(write_run):
    short = with_history(write_run(epochs=2), train_acc=[30, 45.678])
    none = write_run("none", epochs=0, finished=False)
    header, published, ours = rows_of(
        analysis.start_table([analysis.published_run(), short, none], epochs=3)
    )
    assert header[1:] == ["epoch 1", "epoch 2", "epoch 3"]
    assert published[1:] == ["35.03", "51.66", "59.35"]  # as its notebook prints them
    assert ours[1:] == ["30.00", "45.68", "–"]


def test_no_epoch_no_drops(write_run):
    assert "an epoch" in analysis.drops_table(write_run(epochs=0, finished=False))


def test_a_schedule_without_drops_has_no_table_of_them(write_run):
    run = write_run()
    run.config["recipe"]["schedule"] = "one_cycle"
    assert "doesn't drop" in analysis.drops_table(run)


def test_the_fit_table_evaluates_what_was_trained_on(write_run, tiny):
    run = write_run(dataset="shapes", limit=200, checksum=tiny.checksum, epochs=3)
    fed, whole, validation, test = rows_of(analysis.fit_table(run, tiny))[1:]
    assert fed == ["training, as fed: augmented", "45,000", "44.00 %", f"{1.9 / 3:.4f}"]
    index = cifar10.split(tiny.train_labels)[0][:40]  # as many as there are test images
    pixels = torch.from_numpy(tiny.train_images[index]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        log_p = analysis.load_model(run)((pixels - 0.5) / 0.25)
    labels = torch.from_numpy(tiny.train_labels[index])
    right = 100 * (log_p.argmax(1) == labels).double().mean().item()
    assert whole[1:3] == ["40", f"{right:.2f} %"]
    assert float(whole[3]) == pytest.approx(nn.functional.nll_loss(log_p, labels).item(), abs=1e-4)
    assert (validation[2:], test[2:]) == (["40.00 %", "0.5000"], ["70.00 %", "0.9000"])
    assert f"less test images: {right - 70:+.2f} points" in analysis.fit_table(run, tiny)
    with pytest.raises(ValueError, match="load_data"):
        analysis.fit_table(write_run("b"), tiny)
    run.config["recipe"]["label_smoothing"] = 0.1
    assert rows_of(analysis.fit_table(run, tiny))[1][3] == "–"
    assert "isn't finished" in analysis.fit_table(replace(run, metrics=None), tiny)


def test_confused_pairs_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    predicted = np.array([1, 1, 0, 0, 1, 0, 2])  # 0 and 1: twice and once; 2 for 0: once
    log_p = np.log(np.eye(3)[predicted] * 0.9 + 0.05)
    predictions = predictions_of(log_p, labels, ("x", "y", "z"))
    rows = rows_of(analysis.confusion_table(predictions))
    assert rows[1:] == [["x, y", "2", "1", "75.0 %"], ["x, z", "0", "1", "25.0 %"]]
    assert len(rows_of(analysis.confusion_table(predictions, top=1))) == 2


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
    rows, ece = analysis.calibration(log_p, np.array([0, 1, 1, 1]), bins=10)
    assert ece == pytest.approx((2 * abs(0.5 - 0.9) + 2 * abs(1 - 0.6)) / 4)
    filled = [row for row in rows if row.count]
    assert len(rows) == 10 and [row.count for row in filled] == [2, 2]
    assert [row.accuracy for row in filled] == [1.0, 0.5]
    assert math.isnan(rows[0].accuracy)


def test_calibration_against_a_plain_loop():
    log_p, labels = random_predictions(500)
    expected = 0.0
    for b in range(15):
        hits, sure = [], []
        for row, label in zip(np.exp(log_p.astype(np.float64)), labels, strict=True):
            if b / 15 < row.max() <= (b + 1) / 15:
                hits.append(row.argmax() == label)
                sure.append(row.max())
        if hits:
            expected += len(hits) / 500 * abs(np.mean(hits) - np.mean(sure))
    rows, ece = analysis.calibration(log_p, labels)
    assert ece == pytest.approx(expected, abs=1e-12) and expected > 0.01
    assert sum(row.count for row in rows) == 500


def test_certainty_falls_into_the_last_bin():
    log_p = np.array([[1e-7, -50.0]], dtype=np.float32)  # rounding: a probability above 1
    rows, ece = analysis.calibration(log_p, np.array([0]))
    assert rows[-1].count == 1 and ece == pytest.approx(0, abs=1e-6)


def test_calibration_refuses():
    with pytest.raises(ValueError, match=r"\(0, 10\)"):
        analysis.calibration(np.zeros((0, 10)), np.zeros(0, dtype=int))
    with pytest.raises(ValueError, match="labels"):
        analysis.calibration(np.zeros((2, 10)), np.zeros(3, dtype=int))
    with pytest.raises(ValueError, match="bins"):
        analysis.calibration(*random_predictions(5), bins=0)


class Chain(nn.Module):
    """Stages c1 to c4: a single 3x3 convolution of ones each, of the given dilations."""

    def __init__(self, dilations):
        super().__init__()
        for i, d in enumerate(dilations, start=1):
            conv = nn.Conv2d(3 if i == 1 else 1, 1, 3, padding=d, dilation=d, bias=False)
            nn.init.ones_(conv.weight)
            setattr(self, f"c{i}", conv)


PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_effective_field_of_a_linear_chain_is_known_exactly():
    images = np.zeros((3, 33, 33, 3), dtype=np.uint8)
    chain = Chain((1, 1, 1, 1))
    with torch.no_grad():
        chain.c1.weight[:, 1] *= -1  # a falling channel counts as much as a rising one
    field = analysis.effective_receptive_field(chain, images, *PLAIN, chunk=2)
    # Four boxes of three convolved: the coefficients of (1 + x + x^2)^4, in both directions.
    line = np.array([1.0])
    for _ in range(4):
        line = np.convolve(line, np.ones(3))
    expected = np.zeros((33, 33))
    expected[12:21, 12:21] = np.outer(line, line)
    assert field.dtype == np.float64
    np.testing.assert_allclose(field, expected)


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
    networks = {n.network: n for n in analysis.published_networks()}
    assert len(networks) == 12
    reference = networks["NetCIFAR10_Tiny (reference)"]
    assert (reference.parameters, reference.accuracy) == (36_170, 87.31)
    assert reference.multiply_adds == 17_330_816
    assert "chosen on test" in reference.how
    assert all(n.source and 1e4 < n.parameters < 1e6 for n in networks.values())
    assert all(80 < n.accuracy < 95 for n in networks.values())
    assert sorted(n.accuracy for n in networks.values() if n.network.startswith("ResNet-20")) == [
        91.25,
        92.60,
        94.03,
    ]


def test_a_bad_row_is_refused(tmp_path):
    file = tmp_path / "published.csv"
    file.write_text("network,parameters,accuracy\nx,many,90\n")
    with pytest.raises(ValueError, match=r"many.*multiply_adds"):
        analysis.published_networks(file)


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


def test_without_augmentation_every_build_gives_back_the_image(tiny):
    stats = cifar10.channel_stats(tiny.train_images)
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
    run.config["recipe"] |= {"start_side": 16, "grow": 1.0, "lr": 0.2}
    figure = analysis.plot_history(run)
    assert "16 px" in texts(figure) and "24 px" in texts(figure) and "32 px" not in texts(figure)
    dotted = [line for line in figure.axes[1].lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in dotted] == [2.5]  # the third epoch is the first of 24
    assert figure.axes[2].lines[0].get_ydata().tolist() == [0.5] * 4  # 0.1 of 0.2

    with pytest.raises(ValueError, match="no run"):
        analysis.plot_history([])


def test_figures_of_answers_say_whose_they_are():
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
    predictions = Predictions(log_p, tiny.test_images, labels, tiny.classes, "t")
    figure = analysis.plot_mistakes(predictions)
    titles = [axes.get_title().split("\n") for axes in figure.axes if axes.get_title()]
    for (true, taken, sure), (i, p) in zip(titles, ((5, "90.0 %"), (3, "70.0 %")), strict=True):
        assert (true, sure) == (tiny.classes[labels[i]], p)
        assert taken == f"→ {tiny.classes[(labels[i] + 1) % 10]}"
    log_p[[3, 5]] = 0.0
    log_p[[3, 5], labels[[3, 5]]] = 1.0
    assert "No mistake" in texts(analysis.plot_mistakes(predictions))


def test_plot_effective_receptive_field(write_run, tiny):
    run = write_run(dataset="shapes", limit=200, checksum=tiny.checksum)
    text = texts(analysis.plot_effective_receptive_field(run, tiny, n=2))
    assert run.title in text and "100.0 % within 45 px" in text
    assert tiny.title in texts(analysis.plot_effective_receptive_field(NetCIFAR10_Tiny(), tiny, 1))


def test_the_start_of_runs_is_drawn_as_far_as_it_goes(write_run):
    long = with_history(write_run("long", epochs=3), train_acc=[30, 45, 60])
    short = with_history(write_run("short", recipe="other", epochs=1), train_acc=[20])
    figure = analysis.plot_start([long, short], epochs=2)
    lines = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert lines == [[[1, 30], [2, 45]], [[1, 20]]]
    assert "CIFAR-10" in texts(figure)


def test_accuracy_vs_cost_leaves_out_what_is_not_comparable(write_run):
    runs = [
        write_run("a", test_acc=88.0),
        write_run("b", seed=1, test_acc=89.0),
        write_run("c", dataset="shapes", test_acc=99.0),
        write_run("d", limit=1000, test_acc=33.0),
        write_run("e", seed=2, finished=False),
    ]
    text = texts(analysis.plot_accuracy_vs_cost(runs))
    assert "quick · val: 88.50 (88.00, 89.00), n = 2" in text and "Left out: 3 runs" in text
    assert "99.00" not in text and "33.00" not in text and "Tiniest" in text
    alone = texts(analysis.plot_accuracy_vs_cost(runs[0]))
    assert "quick · val: 88.00, n = 1" in alone


def test_labels_of_points_do_not_overlap(write_run):
    runs = [
        write_run(f"r{i}", recipe=f"recipe{i}", test_acc=accuracy)
        for i, accuracy in enumerate((87.3, 87.0, 90.9, 90.6))
    ]
    figure = analysis.plot_accuracy_vs_cost(runs)
    figure.canvas.draw()
    boxes = [Text.get_window_extent(t) for t in figure.axes[0].texts]
    assert len(boxes) == 16
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_settings_of_matplotlib_are_left_alone(write_run):
    plt.rcdefaults()  # whatever an earlier test has left
    before = dict(plt.rcParams)
    analysis.plot_history(write_run())
    assert dict(plt.rcParams) == before


def test_figures_of_real_cifar10(real):
    assert "5,000" in texts(analysis.plot_class_counts(real))
    assert "CIFAR-10" in texts(analysis.plot_samples(real, per_class=1))
