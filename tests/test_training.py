"""training.py: the loop, against plain PyTorch written out by hand, and what it may see."""

import json
import math
import shutil
import threading
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import NETWORK, SMALL, assert_same_outcome, history
from torch.utils._pytree import tree_leaves

import augment
from tiny_cifar10_net import NetCIFAR10_Tiny
from tinycifar import data, optim, training
from tinycifar.data import DataSplits, channel_stats, split
from tinycifar.evaluation import evaluate, log_probabilities
from tinycifar.loaders import key
from tinycifar.recipes import RECIPES, get_recipe
from tinycifar.run_directory import RunDirectory, RunError
from tinycifar.studies import train_many
from tinycifar.training import Trainer, run_name, settle, train
from tinycifar.weights import load_pretrained

ONE_EPOCH = get_recipe(SMALL, epochs=1, name="one")


def trainer_of(recipe, dataset, **settings):
    return Trainer(settle(recipe, dataset=dataset, **settings))


# ------------------------------------------------------------------------------------- the door


def test_unknown_names_list_the_valid_ones(tiny, tmp_path):
    with pytest.raises(ValueError, match="unknown protocol 'test'; valid: val, full"):
        train(SMALL, tmp_path / "r", protocol="test", dataset=tiny)
    with pytest.raises(data.DataError, match=r"cifar100.*shapes"):
        train(SMALL, tmp_path / "r", dataset="cifar100")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"seed": "1"}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"workers": -1}, "workers must be"),
        ({"compile": "yes"}, "unknown compile 'yes'; valid: True, False, auto"),
        ({"force": "no"}, "force must be True or False; got 'no'"),
        ({"device": "gpu"}, "unknown device 'gpu'; valid: auto, cpu"),
        ({"recipe": get_recipe(SMALL, batch_size=181)}, "batch_size .* from 1 to 180, the number"),
        ({"recipe": "baseline", "protocol": "full"}, "plateau"),
    ],
)
def test_arguments_out_of_range_stop_before_anything_is_written(tiny, tmp_path, arguments, says):
    arguments = {"recipe": SMALL, "dataset": tiny, **arguments}
    with pytest.raises(ValueError, match=says):
        train(run_dir=tmp_path / "r", **arguments)
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_an_absent_gpu_is_refused_and_auto_goes_without(tiny, tmp_path):
    with pytest.raises(ValueError, match="device 'cuda' isn't there; use device='auto'"):
        train(SMALL, tmp_path / "r", dataset=tiny, device="cuda")
    assert training.pick_device("auto").type in ("cpu", "mps")


def test_an_experiment_holds_what_was_settled(tiny):
    seed = np.arange(3, 4)[0]
    experiment = settle("quick", seed=seed, dataset=tiny, protocol="full")
    assert experiment.recipe == RECIPES["quick"]
    assert experiment.seed == 3 and type(experiment.seed) is int
    assert (experiment.splits.data, experiment.splits.protocol) == (tiny, "full")
    assert experiment.device == torch.device("cpu") and experiment.teacher is None
    assert experiment.name == run_name(RECIPES["quick"], "full", 3) == "quick-full-seed3"
    with pytest.raises(AttributeError):
        experiment.seed = 4
    config = experiment.config
    assert config["split"] == {"train": 200, "selection": 0, "test": 40, "seed": 0}
    assert config["mean"] == list(channel_stats(tiny.train_images).mean)
    assert config["classes"] == list(tiny.classes)
    assert json.loads(json.dumps(config)).keys() == config.keys()
    assert experiment.identity.items() <= config.items()


def test_a_run_goes_where_it_is_told_or_by_its_name(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = train(ONE_EPOCH, dataset=tiny, seed=np.int64(2), progress=False)
    assert metrics["name"] == "one-val-seed2" and metrics["seed"] == 2
    assert RunDirectory(tmp_path / "runs" / "one-val-seed2").metrics() == metrics
    assert train(ONE_EPOCH, "runs/one-val-seed2", seed=2, dataset=tiny, progress=False) == metrics


# ------------------------------------------------------------------------- against plain PyTorch


def test_the_loop_is_plain_sgd_written_out_by_hand(tiny, tmp_path):
    """Nothing of training.py but the order of the images and the initial weights' seed.

    Three steps at a low rate: the first of a training multiply every rounding difference.
    """
    recipe = get_recipe(
        SMALL,
        network="tiny",
        width=0.25,
        epochs=1,
        batch_size=80,
        lr=1e-3,
        schedule="constant",
        policy="none",
        label_smoothing=0.1,
    )
    train(recipe, tmp_path / "r", seed=3, protocol="full", dataset=tiny, progress=False)

    torch.manual_seed(key(3))
    net = NetCIFAR10_Tiny(width=0.25).to(memory_format=torch.channels_last)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9, nesterov=True, weight_decay=5e-4)
    x = torch.from_numpy(tiny.train_images).permute(0, 3, 1, 2) / 255
    std, mean = torch.std_mean(x.double(), dim=(0, 2, 3), correction=0, keepdim=True)
    x, y = ((x - mean) / std).float(), torch.from_numpy(tiny.train_labels)
    total = 0.0
    generator = torch.Generator().manual_seed(key(3, 1))
    for index in torch.randperm(200, generator=generator).split(80):
        batch = x[index].contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(net(batch), y[index], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(index)

    assert history(tmp_path / "r")["train_loss"][0] == pytest.approx(total / 200, rel=1e-4)
    trained = torch.load(tmp_path / "r" / "best.pt", weights_only=True)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-2, atol=1e-3)
    # Beside the way that they went, which is shorter than that; rounding alone is some percent.
    steps = {name: value.detach() - start[name] for name, value in net.named_parameters()}
    off = torch.cat([(trained[name] - start[name] - steps[name]).flatten() for name in steps])
    assert off.norm() < 0.15 * torch.cat([step.flatten() for step in steps.values()]).norm()


def test_history_has_the_rate_of_each_epochs_last_step(tiny, tmp_path):
    train(SMALL, tmp_path / "r", dataset=tiny, progress=False)  # six steps an epoch
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], SMALL.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, SMALL.lr, 18, pct_start=SMALL.warmup, cycle_momentum=False
    )
    curve = []
    for _ in range(18):
        curve.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rates = history(tmp_path / "r")["lr"].tolist()
    assert rates == pytest.approx(curve[5::6])
    assert rates[-1] < 1e-4 * SMALL.lr


def test_a_trainer_starts_with_filters_that_pass_their_input_on_where_told(tiny):
    plain, dirac = (
        trainer_of(get_recipe(SMALL, network="tiny", width=0.25, dirac=d), tiny).model
        for d in (False, True)
    )
    optim.dirac(plain)
    assert all(map(torch.equal, plain.parameters(), dirac.parameters()))


def test_a_trainer_by_itself_is_what_train_does(tiny, tmp_path):
    """The public loop, driven by hand."""
    metrics = train(SMALL, tmp_path / "r", dataset=tiny, seed=5, progress=False)
    trainer = trainer_of(SMALL, tiny, seed=5)
    with training.deterministic(torch.device("cpu")):
        while not trainer.stopped:
            row = trainer.train_epoch()
            assert row is trainer.history[-1]
        measured = trainer.measure()
    kept = torch.load(tmp_path / "r" / "best.pt", weights_only=True)
    assert all(torch.equal(kept[k], v) for k, v in trainer.best_weights.items())
    for name in ("test_loss", "test_acc", "test_acc_tta", "val_loss", "best_epoch", "epochs_run"):
        assert measured[name] == metrics[name]


def test_a_step_returns_the_loss_and_answers_and_moves_the_weights(tiny):
    trainer = trainer_of(get_recipe(SMALL, schedule="constant"), tiny)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    before = trainer.model.head.weight.detach().clone()
    loss, log_p = trainer.step(images, labels)
    assert log_p.shape == (4, 10) and not (loss.requires_grad or log_p.requires_grad)
    torch.testing.assert_close(loss, F.nll_loss(log_p, labels))
    assert not torch.equal(trainer.model.head.weight, before)


def test_images_of_each_epoch_have_its_side(tiny):
    recipe = get_recipe(SMALL, epochs=2, start_side=16, grow=1.0)
    trainer, step, fed = trainer_of(recipe, tiny), Trainer.step, []
    trainer.step = lambda images, labels, whole: (
        fed.append(images.shape[2:]) or step(trainer, images, labels)
    )
    for epoch in (1, 2):
        fed.clear()
        trainer.train_epoch()
        assert fed == [(recipe.side(epoch),) * 2] * 6
    assert recipe.side(1) < recipe.side(2)


def test_compiled_where_it_pays(tiny, monkeypatch):
    """The stand-in is too small; that it were as large as CIFAR-10 is made up."""

    def sides(recipe, images, mode="auto"):
        experiment = settle(recipe, dataset=tiny, compile=mode)
        monkeypatch.setattr(training, "COMPILE_FROM", 80_000 * 180 / images)
        return training._worth_compiling(experiment)

    assert sides("quick", 45_000) == {16, 24, 32}
    assert sides("quick", 9_000) == set(), "the stand-in: compiling takes longer"
    assert sides("baseline", 45_000) == {32}
    assert sides("baseline", 45_000, False) == set()
    assert sides("quick", 100, True) == {16, 24, 32}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_compiled_network_trains_alike(tiny, tmp_path, monkeypatch, precision):
    """Also the last batch, which is a smaller one: 180 images in batches of 64.

    Through torch's tracing and its own kernels: C++ is compiled in test_acceleration.
    """

    def traced(model, dynamic):
        return torch.compile(model, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr("tinycifar.acceleration.compile", traced)
    recipe = get_recipe(ONE_EPOCH, batch_size=64, lr=0.01, precision=precision)
    plain = train(recipe, tmp_path / "plain", dataset=tiny, compile=False, progress=False)
    compiled = train(recipe, tmp_path / "compiled", dataset=tiny, compile=True, progress=False)
    assert compiled["compiled_sides"] == [32]
    assert plain["compiled_sides"] == []
    near = {"float32": 1e-4, "bfloat16": 0.01}[precision]
    assert compiled["test_loss"] == pytest.approx(plain["test_loss"], rel=near)
    taught = get_recipe(recipe, teacher=str(tmp_path / "plain"), teaching=1.0)
    for mode, folder in ((False, "taught"), (True, "compiled_taught")):
        train(taught, tmp_path / folder, dataset=tiny, compile=mode, progress=False)
    plain, compiled = (RunDirectory(tmp_path / f).history() for f in ("taught", "compiled_taught"))
    assert compiled["train_loss"][0] == pytest.approx(plain["train_loss"][0], rel=near)


def test_a_run_in_bfloat16_repeats_and_is_near_one_in_float32(tiny, tmp_path):
    recipe = get_recipe(ONE_EPOCH, lr=0.01, precision="bfloat16")
    losses = {}
    for name, run in (("a", recipe), ("b", recipe), ("c", get_recipe(recipe, precision="float32"))):
        metrics = train(run, tmp_path / name, dataset=tiny, compile=False, progress=False)
        losses[name] = metrics["test_loss"]
    assert_same_outcome(tmp_path / "a", tmp_path / "b")
    assert losses["a"] != losses["c"]
    assert losses["a"] == pytest.approx(losses["c"], rel=0.03)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bfloat16_on_a_cpu_that_lacks_it_is_said_first(tiny, tmp_path, monkeypatch, precision):
    monkeypatch.setattr("tinycifar.acceleration.computes_bfloat16", lambda: False)
    monkeypatch.setattr(Trainer, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with warnings.catch_warnings(record=True) as warned, pytest.raises(KeyboardInterrupt):
        train(get_recipe(ONE_EPOCH, precision=precision), tmp_path, dataset=tiny, progress=False)
    assert [w.filename for w in warned] == [__file__] * (precision == "bfloat16")
    if warned:
        assert "no instructions for bfloat16" in str(warned[0].message)


def test_without_a_compiler_training_goes_on(tiny, tmp_path, monkeypatch):
    def no_compiler(model, **options):
        def program(images):
            raise RuntimeError("No working C++ compiler found")

        return program

    monkeypatch.setattr("tinycifar.acceleration.compile", no_compiler)
    with pytest.warns(UserWarning, match=r"torch.compile failed .*goes on without"):
        metrics = train(SMALL, tmp_path / "r", dataset=tiny, compile=True, progress=False)
    assert metrics["compiled_sides"] == []
    train(SMALL, tmp_path / "plain", dataset=tiny, compile=False, progress=False)
    assert_same_outcome(tmp_path / "r", tmp_path / "plain")


def test_plateau_drops_the_rate_and_stopping_restores_the_best(tiny, tmp_path, monkeypatch):
    """Selection losses are dictated; what follows from them is counted by hand."""
    dictated = [2.0, 1.5, 1.6, 1.6, 1.6, 1.49995, 1.6, 1.6, 1.6]
    asked = []

    def fake_evaluate(model, images, labels, stats):
        asked.append({k: v.clone() for k, v in model.state_dict().items()})
        return dictated[len(asked) - 1], 50.0

    monkeypatch.setattr(training, "evaluate", fake_evaluate)
    recipe = get_recipe("baseline", epochs=9, batch_size=90, policy="none", network=NETWORK)
    metrics = train(recipe, tmp_path / "r", dataset=tiny, progress=False)
    # Epoch 2 is the best; 6 is better by less than min_delta; 6 epochs later, at 8, it stops.
    assert (metrics["epochs_run"], metrics["best_epoch"]) == (8, 2)
    # torch's plateau has patience 2: after 3, 4, 5 without a better loss the rate drops.
    rates = history(tmp_path / "r")["lr"].tolist()
    assert rates == pytest.approx([0.045] * 5 + [0.0045] * 3)
    best = torch.load(tmp_path / "r" / "best.pt", weights_only=True)
    assert all(torch.equal(best[k], asked[1][k]) for k in best)
    stats = channel_stats(tiny.train_images, split(tiny.train_labels)[0])
    log_p = log_probabilities(load_pretrained(tmp_path / "r"), tiny.test_images, stats)
    loss = F.nll_loss(log_p, torch.from_numpy(tiny.test_labels)).item()
    assert metrics["test_loss"] == pytest.approx(loss, rel=1e-6), "of the weights that are kept"


def test_ema_is_the_average_it_claims(tiny):
    trainer = trainer_of(get_recipe(ONE_EPOCH, ema=0.8), tiny, protocol="full")
    seen, step = [], Trainer.step

    def spy(*batch):
        out = step(trainer, *batch)
        seen.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        return out

    trainer.step = spy
    trainer.train_epoch()
    for name in ("head.weight", "stem.1.running_mean"):
        average = seen[0][name]
        for state in seen[1:]:
            average = 0.8 * average + 0.2 * state[name]
        torch.testing.assert_close(trainer.best_weights[name], average)
        torch.testing.assert_close(trainer.evaluated.state_dict()[name], average)


# ------------------------------------------------------------------------------------- on_epoch


def test_on_epoch_gets_each_row_of_the_history(tiny, tmp_path):
    rows = []
    train(SMALL, tmp_path / "r", dataset=tiny, progress=False, on_epoch=rows.append)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    written = RunDirectory(tmp_path / "r").history()
    for row, (_, expected) in zip(rows, written.iterrows(), strict=True):
        assert row == pytest.approx(expected.to_dict())


def test_on_epoch_may_do_with_its_row_what_it_likes(tiny, tmp_path):
    def logger(row):
        row["run"] = "mine"
        row.pop("epoch")
        row["val_acc"] = math.nan

    for folder, on_epoch in (("alone", None), ("logged", logger)):
        train(SMALL, tmp_path / folder, dataset=tiny, progress=False, on_epoch=on_epoch)
    alone, logged = (RunDirectory(tmp_path / folder).history() for folder in ("alone", "logged"))
    pd.testing.assert_frame_equal(alone.drop(columns="seconds"), logged.drop(columns="seconds"))


def test_on_epoch_may_end_the_run_which_is_finished_then(tiny, tmp_path):
    stop = lambda row: row["epoch"] == 2  # noqa: E731
    metrics = train(SMALL, tmp_path / "r", dataset=tiny, progress=False, on_epoch=stop)
    assert (
        metrics["epochs_run"] == 2
        and metrics["cut_short"]
        and RunDirectory(tmp_path / "r").is_finished
    )
    assert train(SMALL, tmp_path / "r", dataset=tiny, progress=False) == metrics, "it is kept"
    losses = history(tmp_path / "r")["val_loss"].tolist()
    assert metrics["best_epoch"] in (1, 2) and metrics["val_loss"] in losses


def test_only_true_ends_a_run(tiny, tmp_path):
    answers = iter([None, 1, "stop"])
    train(SMALL, tmp_path / "r", dataset=tiny, progress=False, on_epoch=lambda row: next(answers))
    assert len(history(tmp_path / "r")) == 3
    assert not RunDirectory(tmp_path / "r").metrics()["cut_short"]


def test_a_true_of_numpys_ends_a_run_too(tiny, tmp_path):
    stop = lambda row: np.float64(row["val_acc"]) >= 0  # noqa: E731
    train(SMALL, tmp_path / "r", dataset=tiny, progress=False, on_epoch=stop)
    assert len(history(tmp_path / "r")) == 1


def test_an_error_of_on_epoch_leaves_a_run_that_resumes_to_the_same_bits(tiny, tmp_path):
    def failing(row):
        if row["epoch"] == 2:
            raise KeyError("a logger's own")

    train(SMALL, tmp_path / "whole", dataset=tiny, progress=False)
    with pytest.raises(KeyError, match="a logger's own"):
        train(SMALL, tmp_path / "r", dataset=tiny, progress=False, on_epoch=failing)
    assert not RunDirectory(tmp_path / "r").is_finished and len(history(tmp_path / "r")) == 2
    rows = []
    train(SMALL, tmp_path / "r", dataset=tiny, progress=False, on_epoch=rows.append)
    assert [row["epoch"] for row in rows] == [1, 2, 3], "those restored included"
    assert_same_outcome(tmp_path / "whole", tmp_path / "r")


def test_a_run_that_on_epoch_ended_ends_there_when_resumed_too(tiny, tmp_path, monkeypatch):
    """Killed after the epoch at which it was to stop, before that was written down."""
    stop = lambda row: row["epoch"] == 2  # noqa: E731
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train(SMALL, tmp_path / "r", dataset=tiny, progress=False, on_epoch=stop)
    metrics = train(SMALL, tmp_path / "r", dataset=tiny, progress=False, on_epoch=stop)
    assert metrics["epochs_run"] == 2


# ------------------------------------------------------------------------------------- teachers


def test_a_student_learns_what_its_teacher_says(tiny, tmp_path):
    train(ONE_EPOCH, tmp_path / "teacher", dataset=tiny, progress=False)
    alone = get_recipe(SMALL, epochs=2, policy="none")
    taught = get_recipe(alone, teacher=str(tmp_path / "teacher"), teaching=1.0)
    images, stats = tiny.train_images, channel_stats(tiny.train_images)
    says = {}
    for name, recipe in (("alone", alone), ("taught", taught)):
        train(recipe, tmp_path / name, dataset=tiny, progress=False)
        says[name] = log_probabilities(load_pretrained(tmp_path / name), images, stats)
    teacher_log_p = log_probabilities(load_pretrained(tmp_path / "teacher"), images, stats)
    loss = {n: optim.distillation_loss(says[n], teacher_log_p, 1.0) for n in says}
    assert loss["taught"] < loss["alone"]


def test_a_teacher_computes_in_the_precision_of_the_recipe(tiny, tmp_path):
    """Its BatchNorms with the statistics that it learned, whatever the batch."""
    train(ONE_EPOCH, tmp_path / "t", dataset=tiny, progress=False)
    right = load_pretrained(tmp_path / "t")
    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.1)):
        taught = get_recipe(SMALL, teacher=str(tmp_path / "t"), precision=precision)
        teacher = Trainer(settle(taught, dataset=tiny)).teacher
        for images in torch.randn(2, 4, 3, 32, 32):
            with torch.no_grad():
                error = (teacher(images) - right(images)).abs().max()
            assert error < tolerance and (error > 1e-4) == (precision == "bfloat16")


@pytest.mark.parametrize(("whole", "side"), [(False, 16), (True, 32)])
def test_a_teacher_sees_the_students_images_or_whole_ones(tiny, tmp_path, whole, side):
    train(ONE_EPOCH, tmp_path / "t", dataset=tiny, progress=False)
    taught = get_recipe(
        ONE_EPOCH, teacher=str(tmp_path / "t"), teacher_whole=whole, start_side=16, grow=1.0
    )
    trainer, seen = Trainer(settle(taught, dataset=tiny)), []
    teacher = trainer.teacher
    trainer.teacher = lambda images: seen.append(images.shape[2:]) or teacher(images)
    trainer.train_epoch()
    assert set(seen) == {(side, side)}


def test_a_run_goes_on_with_the_teacher_it_had(tiny, tmp_path):
    taught = get_recipe(ONE_EPOCH, teacher=str(tmp_path / "t"), name="taught")
    train(ONE_EPOCH, tmp_path / "t", dataset=tiny, progress=False)
    train(taught, tmp_path / "r", dataset=tiny, progress=False)
    train(ONE_EPOCH, tmp_path / "t", seed=1, force=True, dataset=tiny, progress=False)
    with pytest.raises(RunError, match="teacher_sha256 is"):
        train(taught, tmp_path / "r", dataset=tiny, progress=False)
    (tmp_path / "t" / "metrics.json").unlink()
    with pytest.raises(RunError, match="isn't finished, or lost its weights: finish"):
        train(taught, tmp_path / "new", dataset=tiny)


def test_a_teacher_that_cannot_teach_is_named(tiny, tmp_path):
    taught = get_recipe(ONE_EPOCH, teacher=str(tmp_path / "t"), name="taught")
    train(ONE_EPOCH, tmp_path / "t", dataset=tiny, progress=False)
    with pytest.raises(ValueError, match="can't be its own teacher"):
        train(taught, tmp_path / "t", dataset=tiny, force=True)
    assert RunDirectory(tmp_path / "t").is_finished
    int8 = get_recipe(ONE_EPOCH, teacher=str(tmp_path / "t"), int8=True, name="int8")
    train(int8, tmp_path / "int8", dataset=tiny, progress=False)
    again = get_recipe(int8, teacher=str(tmp_path / "int8"))
    for recipe in (again, get_recipe(again, int8=False)):
        with pytest.raises(ValueError, match="is an int8 network: name the one it came from"):
            train(recipe, tmp_path / "twice", dataset=tiny)
    (tmp_path / "t" / "best.pt").unlink()
    with pytest.raises(RunError, match="isn't finished, or lost its weights"):
        train(taught, tmp_path / "new", dataset=tiny)


def test_a_finished_run_outlives_its_teacher(tiny, tmp_path):
    taught = get_recipe(ONE_EPOCH, teacher=str(tmp_path / "t"), name="taught")
    folder = tmp_path / run_name(taught, "val", 0)
    train(ONE_EPOCH, tmp_path / "t", dataset=tiny, progress=False)
    metrics = train(taught, folder, dataset=tiny, progress=False)
    (tmp_path / "t" / "best.pt").unlink()
    assert train(taught, folder, dataset=tiny, progress=False) == metrics
    shutil.rmtree(tmp_path / "t")
    assert train(taught, folder, dataset=tiny, progress=False) == metrics
    assert train_many([taught], folder=tmp_path, dataset=tiny, progress=False) == [metrics]
    with pytest.raises(FileNotFoundError, match="no run at"):
        train_many([taught], [0, 1], folder=tmp_path, dataset=tiny)
    assert len(list(tmp_path.iterdir())) == 1, "the run without a teacher wasn't to begin"


def test_a_teacher_that_saw_more_is_refused(tiny, tmp_path):
    train(ONE_EPOCH, tmp_path / "t", protocol="full", dataset=tiny, progress=False)
    taught = get_recipe(SMALL, teacher=str(tmp_path / "t"))
    with pytest.raises(ValueError, match=r"under protocol 'full' .* must be 'val'"):
        train(taught, tmp_path / "r", dataset=tiny)
    with pytest.raises(ValueError, match=r"on CIFAR-10: it must be 'val' on shapes"):
        train(get_recipe(SMALL, teacher="tuned"), tmp_path / "r", dataset=tiny)
    with pytest.raises(FileNotFoundError, match="no run at 'nobody'"):
        train(get_recipe(SMALL, teacher="nobody"), tmp_path / "r", dataset=tiny)
    assert not (tmp_path / "r").exists()


def test_the_averaged_weights_are_the_ones_that_are_validated(tiny, tmp_path):
    metrics = train(get_recipe(SMALL, ema=0.9), tmp_path, dataset=tiny, progress=False)
    splits = DataSplits(tiny, "val")
    measured = evaluate(load_pretrained(tmp_path), *splits.selection, splits.stats)
    assert (metrics["val_loss"], metrics["val_acc"]) == pytest.approx(measured, rel=1e-6)


def test_training_loss_and_accuracy_are_means_over_the_images_that_train(tiny):
    trainer = Trainer(settle(ONE_EPOCH, dataset=tiny))  # val: a tenth is held back
    trainer.step = lambda images, labels, whole: (torch.tensor(1.0), F.one_hot(labels, 10))
    assert trainer._train_pass(1) == (1.0, 100.0)


def test_a_run_that_another_process_finished_meanwhile_is_kept(tiny, tmp_path, monkeypatch):
    """After this one had looked, and before it got the lock; `on_epoch` had cut it short."""
    metrics = train(SMALL, tmp_path, dataset=tiny, progress=False, on_epoch=lambda row: True)
    monkeypatch.setattr(RunDirectory, "kept", lambda *_: None)
    assert train(SMALL, tmp_path, dataset=tiny, progress=False) == metrics
    assert train(SMALL, tmp_path, dataset=tiny, progress=False, test=False) == metrics
    assert len(RunDirectory(tmp_path).history()) == 1


def test_a_teacher_that_diverged_is_named(tiny, tmp_path):
    train(ONE_EPOCH, tmp_path / "t", dataset=tiny, progress=False)
    run = RunDirectory(tmp_path / "t")
    weights = torch.load(run.path / "best.pt", weights_only=True)
    torch.save({k: v * float("nan") for k, v in weights.items()}, run.path / "best.pt")
    metrics = run.metrics() | {"weights_sha256": run.checksum()}
    (run.path / "metrics.json").write_text(json.dumps(metrics))
    taught = get_recipe(ONE_EPOCH, teacher=str(run.path))
    with pytest.raises(RunError, match=r"teacher .*t' diverged: its weights aren't finite"):
        train(taught, tmp_path / "r", dataset=tiny)
    assert not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------------- diverging


def test_a_test_loss_that_isnt_finite_is_told_whenever_it_is_measured(tmp_path):
    wild = {"epochs": 1, "lr": 100.0, "momentum": 0.9999, "schedule": "constant", "width": 0.1}
    recipe = get_recipe("quick", optimizer="sgd", batch_size=32, **wild)
    how = {"dataset": data.load("shapes", limit=100), "protocol": "full", "progress": False}
    train(recipe, tmp_path / "r", test=False, **how)
    with pytest.raises(RunError, match="the test loss is nan: the training diverged"):
        train(recipe, tmp_path / "r", **how)


def assert_refused_as_diverged(recipe, folder, dataset, says, **settings):
    with pytest.raises(RunError, match=f"{says}.*: the training diverged.*lower lr"):
        train(recipe, folder, dataset=dataset, progress=False, **settings)
    assert not (folder / "metrics.json").exists()
    for name in ("last.pt", "best.pt"):
        if (folder / name).exists():
            content = torch.load(folder / name, weights_only=True)
            tensors = [t for t in tree_leaves(content) if isinstance(t, torch.Tensor)]
            assert all(t.isfinite().all() for t in tensors), name


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"epochs": 1}], ids=str)
def test_a_run_that_diverges_in_its_last_epoch_never_counts_as_finished(tmp_path, changes):
    """Of one epoch the weights are finite still, and the test loss isn't."""
    wild = {"epochs": 3, "lr": 100.0, "momentum": 0.9999, "schedule": "constant", "width": 0.1}
    recipe = get_recipe("quick", optimizer="sgd", batch_size=32, **wild | changes)
    says = "the test loss is nan" if changes.get("epochs") else "not all weights are finite"
    few = data.load("shapes", limit=100)
    assert_refused_as_diverged(recipe, tmp_path / "r", few, says, protocol="full")


@pytest.mark.parametrize("protocol", ["val", "full"])
@pytest.mark.parametrize(
    ("poisoned", "says"),
    [
        (lambda t: t.model.head.weight, "not all weights are finite after epoch 2"),
        (lambda t: t.model.get_buffer("stem.1.running_var"), "not all weights are"),
        (lambda t: t.ema.module.head.weight, "not all averaged weights are"),
        (lambda t: t.optimizers[0].state[t.model.head.weight]["exp_avg_sq"], "not all optimizer"),
    ],
    ids=["weights", "BatchNorm", "average", "optimizer"],
)
def test_whatever_overflows_in_the_last_step_is_found(
    tiny, tmp_path, monkeypatch, protocol, poisoned, says
):
    """The loss is of the weights before the step, and infinite variances divide to zero."""
    recipe = get_recipe(SMALL, epochs=2, optimizer="adamw", lr=0.001, ema=0.9, batch_size=90)
    steps, step = [], Trainer.step

    def overflows(trainer, *batch):
        steps.append(step(trainer, *batch))
        if len(trainer.history) == 1 and len(steps) == 2 * len(trainer.loader):
            with torch.no_grad():
                poisoned(trainer).view(-1)[0] = float("inf")
        return steps[-1]

    monkeypatch.setattr(Trainer, "step", overflows)
    assert_refused_as_diverged(recipe, tmp_path / "r", tiny, says, protocol=protocol)
    assert len(history(tmp_path / "r")) == 1


# ------------------------------------------------------------------------------------- protocols


def test_protocols_differ_in_what_they_may_see(tiny, tmp_path, monkeypatch):
    recipe = get_recipe(SMALL, min_delta=0.0)  # the best epoch is the lowest loss, however close
    looked = []
    look, judge = training.log_probabilities, training.evaluate

    def spy(model, images, *args, **kwargs):
        looked.append(len(images))
        return look(model, images, *args, **kwargs)

    def spy_too(model, images, *args, **kwargs):
        looked.append(len(images))
        return judge(model, images, *args, **kwargs)

    monkeypatch.setattr(training, "log_probabilities", spy)
    monkeypatch.setattr(training, "evaluate", spy_too)
    n_test = len(tiny.test_labels)

    metrics = train(recipe, tmp_path / "val", dataset=tiny, progress=False)
    assert looked == [20, 20, 20, n_test, n_test], "test: once plain, once with flips, at the end"
    config = json.loads((tmp_path / "val" / "config.json").read_text())
    train_index, val_index = split(tiny.train_labels)
    assert config["split"] | {"seed": 0} == {
        "train": len(train_index), "selection": len(val_index), "test": n_test, "seed": 0,
    }  # fmt: skip
    stats = channel_stats(tiny.train_images[train_index])
    assert config["mean"] == list(stats.mean), "statistics are of the images trained on"
    losses = history(tmp_path / "val")["val_loss"].tolist()
    assert metrics["best_epoch"] == 1 + losses.index(min(losses))

    looked.clear()
    metrics = train(SMALL, tmp_path / "full", protocol="full", dataset=tiny, progress=False)
    assert looked == [n_test, n_test]
    assert metrics["images_per_second"] == pytest.approx(3 * 200 / metrics["seconds_train"])
    assert metrics["best_epoch"] == SMALL.epochs
    assert metrics["val_acc"] is metrics["val_loss"] is None

    metrics = train(SMALL, tmp_path / "ts", protocol="test-selected", dataset=tiny, progress=False)
    assert metrics["test_loss"] == pytest.approx(metrics["val_loss"], rel=1e-6)


def test_flips_are_averaged_over_mirror_images(tiny):
    """Labels are the classes that this average is highest for: no other average gets them all."""
    net, stats = load_pretrained("quick"), DataSplits(tiny, "full").stats
    x = augment.normalised(torch.from_numpy(tiny.test_images), stats.mean, stats.std)
    with torch.no_grad():
        labels = (net(x).exp() + net(x.flip(3)).exp()).argmax(1).numpy()
    figures = training.test_figures(net, DataSplits(replace(tiny, test_labels=labels), "full"))
    assert figures["test_acc_tta"] == 100 > figures["test_acc"]


def test_metrics_are_the_networks_own(tiny, tmp_path):
    # Of so many steps that its BatchNorms know what they see: else all answers are the same.
    recipe = get_recipe(ONE_EPOCH, network="tiny", batch_size=4)
    metrics = train(recipe, tmp_path / "r", dataset=tiny, progress=False)
    net = load_pretrained(tmp_path / "r")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (net.mean, net.std))
    x = (torch.from_numpy(tiny.test_images).permute(0, 3, 1, 2) / 255 - mean) / std
    y = torch.from_numpy(tiny.test_labels)
    with torch.no_grad():
        plain, mirrored = net(x), net(x.flip(3))
    assert (plain - mirrored).abs().max() > 0.01, "else there was nothing to compare"
    both = (plain.exp() + mirrored.exp()) / 2
    assert metrics["test_acc"] == pytest.approx(100 * (plain.argmax(1) == y).float().mean().item())
    assert metrics["test_acc_tta"] == pytest.approx(
        100 * (both.argmax(1) == y).float().mean().item()
    )
    assert metrics["test_loss"] == pytest.approx(F.nll_loss(plain, y).item(), rel=1e-4)
    wanted = (
        "name recipe dataset protocol seed params macs epochs_run best_epoch train_acc val_acc "
        "val_loss test_acc test_loss test_acc_tta seconds_train images_per_second device torch "
        "git_commit"
    )
    assert set(wanted.split()) <= metrics.keys()
    assert metrics["params"] == 36_170


# ------------------------------------------------------------------------------------- repeating


def test_a_run_may_leave_the_test_set_alone_until_it_is_asked_for(tiny, tmp_path, monkeypatch):
    whole = train(SMALL, tmp_path / "whole", dataset=tiny, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(training, "test_figures", None)  # can't be called
        without = train(SMALL, tmp_path / "run", dataset=tiny, progress=False, test=False)
        again = train(SMALL, tmp_path / "run", dataset=tiny, progress=False, test=False)
    assert without == again
    assert [k for k, v in without.items() if v is None and whole[k] is not None] == TESTED
    kept = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    # Another version of torch may lay out files otherwise.
    with torch.utils.serialization.config.patch({"save.storage_alignment": 128}):
        added = train(SMALL, tmp_path / "run", dataset=tiny, progress=False)
    assert {k: added[k] for k in TESTED} == {k: whole[k] for k in TESTED}
    assert {k: v for k, v in added.items() if k not in TESTED} == {
        k: v for k, v in without.items() if k not in TESTED
    }
    now = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert {name for name in kept if kept[name] != now[name]} == {"metrics.json"}
    assert list(added) == list(whole)
    assert train(SMALL, tmp_path / "run", dataset=tiny, progress=False, test=False) == added


TESTED = ["test_acc", "test_loss", "test_acc_tta"]


def test_same_seed_same_bits_and_another_seed_others(tiny, tmp_path):
    recipe = get_recipe("baseline", epochs=1, batch_size=60, width=0.1, name="narrow")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(recipe, tmp_path / name, seed=seed, dataset=tiny, progress=False)
    assert_same_outcome(tmp_path / "a", tmp_path / "b")
    assert not history(tmp_path / "a").equals(history(tmp_path / "c"))


@pytest.mark.parametrize("build", ["albumentations", "torchvision"])
def test_any_number_of_workers_trains_to_the_same_bits(tiny, tmp_path, build):
    recipe = get_recipe(SMALL, epochs=2, build=build, policy="light", name="workers")
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        train(recipe, folder, dataset=tiny, workers=workers, progress=False)
    assert_same_outcome(tmp_path / "0", tmp_path / "2")


def test_the_callers_random_stream_and_settings_are_left_alone(tiny, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    within = lambda row: seen.append(torch.are_deterministic_algorithms_enabled())  # noqa: E731
    seen = []
    train(ONE_EPOCH, tmp_path / "r", dataset=tiny, progress=False, on_epoch=within)
    assert seen == [True]
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        train(ONE_EPOCH, tmp_path / "s", dataset=tiny, progress=False)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_training_seeds_no_device_but_its_own(tiny, tmp_path, monkeypatch):
    for device in (torch.cuda, torch.mps):
        monkeypatch.delattr(device, "manual_seed")
    monkeypatch.delattr(torch.cuda, "manual_seed_all")
    train(ONE_EPOCH, tmp_path / "r", dataset=tiny, progress=False)


def test_the_callers_default_dtype_is_not_the_recipes(tiny, tmp_path):
    train(ONE_EPOCH, tmp_path / "alone", dataset=tiny, progress=False)
    torch.set_default_dtype(torch.float64)
    try:
        train(ONE_EPOCH, tmp_path / "within", dataset=tiny, progress=False)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_outcome(tmp_path / "alone", tmp_path / "within")


@pytest.mark.parametrize("protocol", ["val", "full"])
def test_the_callers_default_device_is_not_the_recipes(tiny, tmp_path, protocol):
    given = {"dataset": tiny, "protocol": protocol, "progress": False}
    train(ONE_EPOCH, tmp_path / "alone", **given)
    torch.set_default_device("meta")
    try:
        assert augment.Batched.draw(1).device.type == "cpu"
        train(ONE_EPOCH, tmp_path / "within", **given)
        assert torch.get_default_device() == torch.device("meta")
    finally:
        torch.set_default_device(None)
    assert_same_outcome(tmp_path / "alone", tmp_path / "within")


def test_the_callers_autocast_is_not_the_recipes_precision(tiny, tmp_path):
    train(ONE_EPOCH, tmp_path / "alone", dataset=tiny, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        train(ONE_EPOCH, tmp_path / "within", dataset=tiny, progress=False)
        assert torch.is_autocast_enabled("cpu")
    assert_same_outcome(tmp_path / "alone", tmp_path / "within")


def test_a_second_training_in_the_process_is_refused_and_disturbs_nothing(tiny, tmp_path):
    """From another thread, or from within on_epoch."""
    begun, tried, refused = threading.Event(), threading.Event(), []

    def other():
        begun.wait(60)
        refuse("other")
        tried.set()

    def refuse(name):
        with pytest.raises(RunError, match=r"in this process.*train_many"):
            train(ONE_EPOCH, tmp_path / name, seed=1, dataset=tiny, progress=False)
        refused.append(name)

    def on_epoch(row):
        begun.set()
        assert tried.wait(60)
        refuse("nested")

    thread = threading.Thread(target=other)
    thread.start()
    train(ONE_EPOCH, tmp_path / "r", dataset=tiny, progress=False, on_epoch=on_epoch)
    thread.join()
    assert refused == ["other", "nested"] and not (tmp_path / "other").exists()
    assert not torch.are_deterministic_algorithms_enabled()
    train(ONE_EPOCH, tmp_path / "alone", dataset=tiny, progress=False)
    assert_same_outcome(tmp_path / "r", tmp_path / "alone")


def test_silent_when_told_and_a_line_an_epoch_otherwise(tiny, tmp_path, capsys):
    train(SMALL, tmp_path / "a", dataset=tiny, progress=False)
    assert capsys.readouterr() == ("", "")
    train(SMALL, tmp_path / "b", dataset=tiny)
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines()] == ["1/3", "2/3", "3/3"]


# -------------------------------------------------------------------------------- it does learn


def test_it_learns_from_real_images(real, tmp_path):
    """A few hundred steps must beat guessing by far; a wrong label or channel would not."""
    recipe = get_recipe("quick", epochs=3, network="8 16s2 24s2")
    keep = np.concatenate([np.flatnonzero(real.train_labels == c)[:300] for c in range(10)])
    few = data.Data(
        real.name,
        real.classes,
        real.train_images[keep],
        real.train_labels[keep],
        real.test_images[:1000],
        real.test_labels[:1000],
        len(keep),
    )
    metrics = train(recipe, tmp_path / "r", dataset=few, progress=False)
    assert metrics["dataset"] == "cifar10"
    assert metrics["test_acc"] > 22


def test_every_build_trains_alike(tiny, tmp_path):
    """Unaugmented, the images are the same whoever makes them, to rounding."""
    loss = {}
    for build in augment.BUILDS:
        recipe = get_recipe(SMALL, epochs=2, lr=0.01, policy="none", build=build)
        train(recipe, tmp_path / build, dataset=tiny, progress=False)
        loss[build] = history(tmp_path / build)["train_loss"].tolist()
        config = json.loads((tmp_path / build / "config.json").read_text())
        assert (build in config["libraries"]) == (build != "batched"), "what made its images"
    for build in augment.BUILDS[1:]:
        assert loss[build] == pytest.approx(loss["batched"], rel=1e-3)
    assert loss["batched"][1] < loss["batched"][0]
