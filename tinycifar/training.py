"""A recipe in, a run directory out; resumable, and the same bits every time.

    metrics = train("quick", "runs/mine", seed=1)

What is to be trained is settled once, in `settle`; all else is handed the `Experiment` that it
returns. `Trainer` is the loop. Randomness is keyed by (seed, epoch, batch or sample), never by
which worker came first, so a run in one go, a run killed and resumed, and a run with other loader
workers end with the same numbers.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tiny_cifar10_net import folded
from tinycifar import optim
from tinycifar.acceleration import CompiledNetwork, Memory, MixedPrecision, peak_memory
from tinycifar.checks import check_choice, check_flag, check_whole
from tinycifar.costs import layer_costs
from tinycifar.data import Data, DataSplits, load, title
from tinycifar.evaluation import accuracy, evaluate, full_precision, log_probabilities
from tinycifar.images import SIDE
from tinycifar.loaders import key, make_loader, resized
from tinycifar.networks import make_network, own_network
from tinycifar.quantise import simulated_int8
from tinycifar.recipes import Recipe, check_protocol, get_recipe
from tinycifar.run_directory import (
    HISTORY_COLUMNS,
    RunDirectory,
    RunError,
    conditions,
    find_run,
    identity,
    new_run,
)
from tinycifar.weights import load_network

# From this many images of one size, compiling the network for that size pays: on two cores it was
# measured to take as long as 40,000 to 60,000 images save, at any size.
COMPILE_FROM = 80_000

Row = dict[str, Any]  # a row of history.csv
OnEpoch = Callable[[Row], Any]


# -------------------------------------------------------------------------------------- settling


@dataclass(frozen=True, eq=False)
class Experiment:
    """What is to be trained, checked and settled: `settle` makes it.

    Attributes:
        teacher: the run of the network to learn from; None without one, or if it is gone.
        identity: what tells this run from any other, see `run_directory.identity`.
    """

    recipe: Recipe
    seed: int
    splits: DataSplits
    device: torch.device
    workers: int
    compile: bool | str
    teacher: RunDirectory | None
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        """How its run directory is called unless told otherwise."""
        return run_name(self.recipe, self.splits.protocol, self.seed)

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json is to hold."""
        stats = self.splits.stats
        return {
            **self.identity,
            "split": self.splits.sizes | {"seed": 0},
            "mean": list(stats.mean),
            "std": list(stats.std),
            "classes": list(self.splits.data.classes),
            "model": self.recipe.model_options,
            **conditions(self.recipe, self.device, self.compile),
        }


def settle(
    recipe: str | Recipe,
    seed: int = 0,
    protocol: str = "val",
    dataset: str | Data = "auto",
    device: str = "auto",
    workers: int = 0,
    compile: bool | str = "auto",
) -> Experiment:
    """Check what `train` is given, and find the data, the device and the teacher.

    Arguments, and what is raised: see `train`.
    """
    recipe = get_recipe(recipe)
    check_protocol(recipe, protocol)
    check_choice("compile", compile, (True, False, "auto"))
    workers, seed = check_whole("workers", workers, 0, 64), check_seed(seed)
    chosen = pick_device(device)
    splits = DataSplits(dataset if isinstance(dataset, Data) else load(dataset), protocol)
    if recipe.batch_size > len(splits.train_index):
        raise ValueError(
            f"batch_size must be a whole number from 1 to {len(splits.train_index)}, "
            f"the number of training images; got {recipe.batch_size}"
        )
    teacher = None
    if recipe.teacher is not None:
        with suppress(FileNotFoundError):  # a finished run needs it no more; see check_parts
            teacher = RunDirectory(find_run(recipe.teacher))
            if not (teacher.path / "best.pt").is_file():
                teacher = None
    who = identity(recipe, seed, protocol, splits.data, teacher)
    return Experiment(recipe, seed, splits, chosen, workers, compile, teacher, who)


def check_seed(seed: int) -> int:
    """A seed that every generator here takes, as a plain int; else a ValueError."""
    return check_whole("seed", seed, 0, 2**32 - 1)


def run_name(recipe: Recipe, protocol: str, seed: int) -> str:
    """How a run directory is called unless told otherwise."""
    return f"{recipe.name}-{protocol}-seed{seed}"


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA, else MPS, else the CPU; any other name must be there.

    Raises:
        ValueError: no such device here.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    here = {"cpu": True, "cuda": cuda, "mps": mps}
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in here:
        raise ValueError(f"unknown device {name!r}; valid: auto, {', '.join(here)}")
    too_high = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if not here[device.type] or too_high:
        raise ValueError(f"device {name!r} isn't there; use device='auto', which takes what is")
    return device


def check_parts(experiment: Experiment) -> None:
    """Check what only an unfinished run needs: its teacher, and a network of your own.

    Raises:
        FileNotFoundError: there is no such teacher. RunError: it isn't finished, so that its
        weights still change. ValueError: it may have seen what is held back here, or is an int8
        network; or your network can't be trained.
    """
    recipe = experiment.recipe
    if ":" in recipe.network:
        _check_own_network(recipe, len(experiment.splits.data.classes))
    if recipe.teacher is not None:
        _check_teacher(experiment)


def _check_own_network(recipe: Recipe, num_classes: int) -> None:
    with torch.random.fork_rng([]), torch.no_grad():
        network = own_network(num_classes, recipe.network).eval()
        for side in recipe.epochs_by_side():
            try:
                network(torch.zeros(2, 3, side, side))
            except Exception as error:  # its code may raise anything
                raise ValueError(
                    f"network {recipe.network!r} fails on images of {side} x {side}, which the "
                    f"recipe has in its first epochs ({error}): give it start_side=32"
                ) from error
        if recipe.precision == "float32":
            return
        try:
            MixedPrecision(network, getattr(torch, recipe.precision))(torch.zeros(2, 3, SIDE, SIDE))
        except RuntimeError as error:
            raise ValueError(
                f"network {recipe.network!r} can't be trained in {recipe.precision} ({error}): "
                "only convolutions and BatchNorms may have weights before `gap`; float32 takes all"
            ) from error


def _check_teacher(experiment: Experiment) -> None:
    name, splits = experiment.recipe.teacher, experiment.splits
    teacher = _teacher(experiment)
    if not (teacher.is_finished and (teacher.path / "best.pt").is_file()):
        raise RunError(
            f"teacher {name!r} isn't finished, or lost its weights: finish its run first"
        )
    saw = teacher.config()
    if (saw["protocol"], saw["data_sha256"]) != (splits.protocol, splits.data.checksum):
        raise ValueError(
            f"teacher {name!r} was trained under protocol {saw['protocol']!r} on "
            f"{title(saw['dataset'], saw['limit'])}: it must be {splits.protocol!r} on "
            f"{splits.data.title}, as here, so that it passes on nothing that is held back"
        )
    options = experiment.recipe.model_options
    if saw["model"].get("int8"):
        raise ValueError(f"teacher {name!r} is an int8 network: name the one it came from")
    if experiment.recipe.int8 and saw["model"] | {"int8": True} != options:
        raise ValueError(
            f"teacher {name!r} is another network, {saw['model']}: int8 goes on from its weights, "
            f"so give the recipe its options; got {options}"
        )


def _teacher(experiment: Experiment) -> RunDirectory:
    return experiment.teacher or RunDirectory(find_run(str(experiment.recipe.teacher)))


# ----------------------------------------------------------------------------------------- train


def train(
    recipe: str | Recipe = "quick",
    run_dir: str | Path | None = None,
    *,
    seed: int = 0,
    protocol: str = "val",
    dataset: str | Data = "auto",
    device: str = "auto",
    workers: int = 0,
    force: bool = False,
    progress: bool = True,
    compile: bool | str = "auto",
    on_epoch: OnEpoch | None = None,
    test: bool = True,
) -> dict[str, Any]:
    """Train a network and write a run directory.

    The same call again goes on where it was interrupted; once the run is finished, it returns the
    same metrics without training.

    Args:
        recipe: a name in RECIPES, or a Recipe.
        run_dir: the run directory, a relative one as in `paths.absolute`; None:
            runs/<recipe>-<protocol>-seed<seed>.
        seed: decides initial weights, order and augmentation; not the train/val split.
        protocol: a name in PROTOCOLS.
        dataset: a name for `data.load`, or what it returned.
        device: auto (CUDA, else MPS, else CPU), or a torch device name.
        workers: loader processes for the per-sample builds; changes the speed, not the bits. Where
            processes are spawned (macOS, Windows, from Python 3.14 on), a script needs the guard
            `if __name__ == "__main__":`.
        force: begin again if the run there is finished or is another one.
        progress: draw bars and print a line an epoch; False is silent.
        compile: True uses torch.compile, False does without, "auto" compiles for image sizes
            of which the run uses COMPILE_FROM images or more. It changes the speed, and the
            numbers only by rounding; resume a run with the same setting.
        on_epoch: called with the row of history.csv after each epoch, including those that a
            resumed run has already done (but never for a finished run). If it returns True, the
            run ends there and is finished, with `cut_short` in metrics.json. An exception that it
            raises ends the call and leaves the run unfinished.
        test: False leaves the test set alone, as a search does: what metrics.json holds of it is
            None, until the same call with True adds it. (Under `test-selected` the epoch is chosen
            on test all the same.)

    Returns:
        What metrics.json holds. Accuracies are percentages.

    Raises:
        ValueError: bad input. data.DataError: the data set isn't available. FileNotFoundError:
        there is no such teacher. ImportError: the recipe's build is of a library that isn't
        installed. RunError: the run directory holds another run, another training is in progress
        in this process, or a loss or weight is no longer finite. OSError: a file can't be written.
        In each case the run is intact up to its last finished epoch.
    """
    check_flag("force", force)
    check_flag("test", test)
    experiment = settle(recipe, seed, protocol, dataset, device, workers, compile)
    run = RunDirectory(new_run(run_dir or f"runs/{experiment.name}"))
    if not force and (metrics := run.kept(experiment.identity)):
        if progress:
            print("This run is finished, and kept: FORCE=1 (force=True) trains it again.")
        return _tested(run, experiment) if test and metrics["test_acc"] is None else metrics
    check_parts(experiment)
    if experiment.teacher and run.path.exists() and experiment.teacher.path.samefile(run.path):
        raise ValueError(f"{run.path} can't be its own teacher: give another run_dir")
    with deterministic(experiment.device):
        # Before anything is replaced: a missing library or too little memory shows here.
        trainer = Trainer(experiment, progress)
        with (
            run.opened(experiment.config, experiment.identity, force) as state,
            _told(run, experiment.recipe),
        ):
            if run.is_done(test):  # by another process, meanwhile
                return run.metrics()
            if state is not None:
                trainer.load_state_dict(state)
            trainer.fit(run.save, on_epoch)
            return run.finish(trainer.measure(test))


@contextmanager
def _told(run: RunDirectory, recipe: Recipe) -> Iterator[None]:
    """Say what is left of a run that was interrupted or diverged."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(f"{run.path} is intact")
        raise
    except Diverged as error:
        rates = f"{recipe.lr:g}"
        if recipe.optimizer.startswith("muon"):
            rates += f", {recipe.muon_lr:g}"
        raise RunError(
            f"{error}: the training diverged, and {run.path} is intact up to its last "
            f"finished epoch; try another name with a lower lr (this recipe's: {rates})"
        ) from error


def _tested(run: RunDirectory, experiment: Experiment) -> dict[str, Any]:
    """The metrics of a finished run that left the test set alone, with its figures added."""
    opened = run.opened(experiment.config, experiment.identity)
    with deterministic(experiment.device), opened, _told(run, experiment.recipe):
        metrics = run.metrics()
        if metrics["test_acc"] is not None:  # by another process, meanwhile
            return metrics
        model = load_network(run).to(experiment.device, memory_format=torch.channels_last)
        return run.finish(metrics | test_figures(model, experiment.splits))


def test_figures(model: nn.Module, splits: DataSplits) -> dict[str, float]:
    """Accuracy (percent) and loss on the test images; test_acc_tta: averaged with mirror images.

    Raises:
        Diverged: their loss isn't finite.
    """
    images, labels = splits.test
    log_p, mirrored = (
        log_probabilities(model, pixels, splits.stats) for pixels in (images, images.flip(2))
    )
    log_p_tta = torch.logaddexp(log_p, mirrored) - math.log(2)
    test_loss = F.nll_loss(log_p, labels).item()
    # Finite weights may still be too large for a network in eval mode.
    _require_finite(test_loss, "the test loss")
    _require_finite(F.nll_loss(log_p_tta, labels).item(), "the test loss of mirrored images")
    return {
        "test_acc": accuracy(log_p, labels),
        "test_loss": test_loss,
        "test_acc_tta": accuracy(log_p_tta, labels),
    }


# --------------------------------------------------------------------------------------- the loop


class Diverged(RuntimeError):
    """A loss, or what the next step starts from, is no longer finite."""


class Trainer:
    """One training in progress: its whole state between two epochs is `state_dict`.

    Attributes:
        model: the network that trains; `evaluated` is the one that is evaluated and kept.
        history: a dict of HISTORY_COLUMNS for each epoch done.
        best_epoch, best_loss, best_weights: the selected epoch so far.
    """

    def __init__(self, experiment: Experiment, progress: bool = False):
        recipe, splits, device = experiment.recipe, experiment.splits, experiment.device
        self.experiment, self.progress = experiment, progress
        _seed(key(experiment.seed), device)
        teacher: Any = None
        if recipe.teacher is not None:
            teacher = load_network(_teacher(experiment))
            if not _all_finite(teacher.state_dict().values()):
                raise RunError(f"teacher {recipe.teacher!r} diverged: its weights aren't finite")
        if recipe.int8:
            model = simulated_int8(teacher)
        else:
            model = make_network(len(splits.data.classes), recipe.model_options)
            if recipe.dirac:
                optim.dirac(model)
        self.model: nn.Module = model.to(device, memory_format=torch.channels_last).train()
        precision = getattr(torch, recipe.precision)
        sides = _worth_compiling(experiment)
        self.network = CompiledNetwork(self.model, recipe.batch_size, sides, precision)
        self.teacher: CompiledNetwork | None = None
        if teacher is not None:
            teacher = folded(teacher).to(device, memory_format=torch.channels_last)
            seen = {SIDE} if sides and recipe.teacher_whole else sides
            self.teacher = CompiledNetwork(teacher, recipe.batch_size, seen, precision)
        self.loader = make_loader(recipe, experiment.seed, splits, device, experiment.workers)
        self.optimizers = optim.optimizers(recipe, self.model)
        self.schedules = [
            optim.schedule(recipe, optimizer, len(self.loader)) for optimizer in self.optimizers
        ]
        self.ema = None
        if recipe.ema is not None:
            average = get_ema_multi_avg_fn(recipe.ema)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.lr = recipe.lr  # of the last step
        self.memory = Memory()
        self.history: list[Row] = []
        self.best_epoch, self.best_loss = 0, math.inf
        self.best_weights: dict[str, Tensor] = {}

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and kept: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def stopped(self) -> bool:
        """Whether all epochs are done, or the selection loss has stalled for too long."""
        recipe, waited = self.experiment.recipe, len(self.history) - self.best_epoch
        patient = recipe.stop_patience is None or waited < recipe.stop_patience
        early = self.experiment.splits.selection is not None and not patient
        return early or len(self.history) >= recipe.epochs

    def fit(self, save: Callable[[dict[str, Any]], None], on_epoch: OnEpoch | None = None) -> None:
        """Train the epochs that are missing; after each, `save` gets the state.

        For `on_epoch`, and when training stops, see `train`. Raises: see `train_epoch`.
        """
        epochs = self.experiment.recipe.epochs
        stop = [_is_true(on_epoch(dict(row))) for row in self.history] if on_epoch else []
        with _bar(total=epochs, unit="epoch", on=self.progress) as bar:
            bar.update(len(self.history))
            while not (self.stopped or any(stop)):
                row = self.train_epoch()
                save(self.state_dict())
                if self.progress:
                    bar.clear()
                    print(_line(row, epochs), flush=True)
                bar.update()
                stop.append(on_epoch is not None and _is_true(on_epoch(dict(row))))

    def train_epoch(self) -> Row:
        """Train and evaluate the next epoch; returns its row of the history.

        Raises:
            Diverged: a loss, a weight or an optimizer's state is no longer finite.
        """
        recipe, splits = self.experiment.recipe, self.experiment.splits
        epoch, started = len(self.history) + 1, time.perf_counter()
        self.memory.trim()
        train_loss, train_acc = self._train_pass(epoch)
        self._require_finite_state(epoch)
        val_loss = val_acc = None
        if splits.selection is not None:
            self.memory.trim()
            val_loss, val_acc = evaluate(self.evaluated, *splits.selection, splits.stats)
            _require_finite(val_loss, f"the selection loss after epoch {epoch}")
            for schedule in self.schedules:
                if isinstance(schedule, ReduceLROnPlateau):
                    schedule.step(val_loss)
        if val_loss is None or val_loss < self.best_loss - recipe.min_delta:
            self.best_epoch, self.best_loss = epoch, math.inf if val_loss is None else val_loss
            self.best_weights = _cpu_copy(self.evaluated)
        seconds = time.perf_counter() - started
        values = (epoch, self.lr, train_loss, train_acc, val_loss, val_acc, seconds)
        self.history.append(dict(zip(HISTORY_COLUMNS, values, strict=True)))
        return self.history[-1]

    def _train_pass(self, epoch: int) -> tuple[float, float]:
        """One epoch of steps; the mean loss and accuracy over the images as they were fed."""
        self.model.train()
        side, device = self.experiment.recipe.side(epoch), self.experiment.device
        # For whatever a network may draw by itself.
        _seed(key(self.experiment.seed, epoch), device)
        # Sums stay on the device: reading one means waiting for all that is queued. A sum that was
        # once NaN or infinite stays so, so on a GPU it is enough to check now and then.
        loss_sum, correct = torch.zeros(2, device=device)
        ask_every = 1 if device.type == "cpu" else 50
        with _bar(total=len(self.loader), unit="batch", on=self.progress, leave=False) as bar:
            for step, (images, labels) in enumerate(self.loader.epoch(epoch), start=1):
                loss, output = self.step(resized(images, side), labels, images)
                loss_sum += loss * len(labels)
                correct += (output.argmax(dim=1) == labels).sum()
                if step % ask_every == 0 or step == len(self.loader):
                    _require_finite(loss_sum.item(), f"the loss at step {step} of epoch {epoch}")
                bar.update()
        n = len(self.experiment.splits.train_index)
        return loss_sum.item() / n, 100 * correct.item() / n

    def _require_finite_state(self, epoch: int) -> None:
        """Also what the loss doesn't show: the weights after the last step, and their average."""
        tensors = {
            "weights": self.model.state_dict().values(),
            "averaged weights": self.evaluated.state_dict().values(),
            "optimizer's averages": [
                value
                for optimizer in self.optimizers
                for state in optimizer.state.values()
                for value in state.values()
            ],
        }
        for what, values in tensors.items():
            if not _all_finite(values):
                raise Diverged(f"not all {what} are finite after epoch {epoch}")

    def step(
        self, images: Tensor, labels: Tensor, whole: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step on a batch: images float32 (N, 3, H, W), labels int64 (N,).

        Args:
            whole: the images before they were shrunk, for a teacher that sees them so.

        Returns:
            the loss, a scalar, and the log-probabilities (N, classes), both detached.
        """
        output, teacher_log_p = self.network(images), None
        if self.teacher is not None:
            shown = whole if self.experiment.recipe.teacher_whole and whole is not None else images
            with torch.no_grad():
                teacher_log_p = self.teacher(shown)
        loss = optim.loss(self.experiment.recipe, output, labels, teacher_log_p)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.lr = self.optimizers[0].param_groups[0]["lr"]
        for schedule in self.schedules:
            if not isinstance(schedule, ReduceLROnPlateau):
                schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return loss.detach(), output.detach()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on after the last epoch: what last.pt holds."""
        return {
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "ema": None if self.ema is None else self.ema.state_dict(),
            "best": (self.best_epoch, self.best_loss, self.best_weights),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.best_epoch, self.best_loss, self.best_weights = state["best"]

    def measure(self, test: bool = True) -> dict[str, Any]:
        """Evaluate the selected weights on test: all that metrics.json holds of the training.

        Afterwards `evaluated` holds these weights: no training goes on from here.

        Args:
            test: False puts None for the figures on test.

        Raises:
            Diverged: their loss isn't finite.
        """
        self.memory.trim()
        experiment, splits = self.experiment, self.experiment.splits
        self.evaluated.load_state_dict(self.best_weights)
        untested = dict.fromkeys(("test_acc", "test_loss", "test_acc_tta"))
        costs, best = layer_costs(self.evaluated), self.history[self.best_epoch - 1]
        seconds = sum(row["seconds"] for row in self.history)
        return {
            "recipe": experiment.recipe.name,
            "dataset": splits.data.name,
            "limit": splits.data.limit,
            "protocol": splits.protocol,
            "seed": experiment.seed,
            "params": sum(row.params for row in costs),
            "macs": sum(row.macs for row in costs),
            "epochs_run": len(self.history),
            "cut_short": not self.stopped,  # by on_epoch
            "best_epoch": self.best_epoch,
            **{name: best[name] for name in ("train_acc", "val_acc", "val_loss")},
            **(test_figures(self.evaluated, splits) if test else untested),
            "seconds_train": seconds,
            "images_per_second": len(self.history) * len(splits.train_index) / seconds,
            "compiled_sides": sorted(self.network.sides),
            "peak_memory_mib": peak_memory(),
            **{name: experiment.config[name] for name in ("device", "torch", "git_commit")},
        }


def _worth_compiling(experiment: Experiment) -> set[int]:
    """The sides of the images that the network is compiled for."""
    epochs, images = experiment.recipe.epochs_by_side(), len(experiment.splits.train_index)
    if experiment.compile == "auto":
        able = experiment.device.type in ("cpu", "cuda")
        return {side for side in epochs if able and epochs[side] * images >= COMPILE_FROM}
    return set(epochs) if experiment.compile else set()


def _is_true(value: Any) -> bool:
    """True itself, or NumPy's: a callback that returns something else goes on."""
    return isinstance(value, (bool, np.bool_)) and bool(value)


def _seed(seed: int, device: torch.device) -> None:
    """Those streams that `deterministic` gives back; torch.manual_seed seeds all devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _require_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise Diverged(f"{what} is {value}")


def _all_finite(values: Iterable[Any]) -> bool:
    return all(bool(v.isfinite().all()) for v in values if isinstance(v, Tensor))


def _cpu_copy(model: nn.Module) -> dict[str, Tensor]:
    # Contiguous: a published file shouldn't carry this machine's memory format.
    return {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
        for k, v in model.state_dict().items()
    }


# ------------------------------------------------------------------------------ around a training


_one_at_a_time = threading.Lock()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms and our own random stream; all settings are restored afterwards.

    They are those of the whole process, so only one training runs at a time. Another is refused
    rather than kept waiting: started from within `on_epoch`, it would wait for itself.

    Raises:
        RunError: another training is in progress in this process.
    """
    if not _one_at_a_time.acquire(blocking=False):
        raise RunError(
            "another training is in progress in this process, and each needs torch's random stream "
            "and settings for itself: wait for it, or use train_many, which gives each run a "
            "process of its own"
        )
    try:
        before = torch.are_deterministic_algorithms_enabled()
        only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
        memory: Any = torch.utils.deterministic
        filled = memory.fill_uninitialized_memory
        random_stream = torch.random.fork_rng([device] if device.type == "cuda" else [])
        recipes_precision = torch.autocast(device.type, enabled=False)  # not the caller's
        dtype = torch.get_default_dtype()
        # A mode, which slows every call down: only where the caller has set another device.
        elsewhere = torch.get_default_device().type != "cpu"
        on_cpu = torch.device("cpu") if elsewhere else nullcontext()
        with random_stream, full_precision(), recipes_precision, on_cpu:
            torch.use_deterministic_algorithms(True)
            # Otherwise each new tensor is filled with NaN, which slows a memory-bound network.
            memory.fill_uninitialized_memory = False
            torch.set_default_dtype(torch.float32)
            try:
                yield
            finally:
                torch.use_deterministic_algorithms(before, warn_only=only_warned)
                memory.fill_uninitialized_memory = filled
                torch.set_default_dtype(dtype)
    finally:
        _one_at_a_time.release()


def _line(row: Row, epochs: int) -> str:
    """One epoch for the log; without its time, so that a repeated run prints the same."""
    line = (
        f"epoch {row['epoch']:3d}/{epochs}  lr {row['lr']:.2e}  "
        f"train loss {row['train_loss']:.4f} acc {row['train_acc']:5.2f}"
    )
    if row["val_loss"] is not None:
        line += f"  val loss {row['val_loss']:.4f} acc {row['val_acc']:5.2f}"
    return line


def _bar(*, on: bool, **options: Any) -> Any:
    """A tqdm bar: a widget in JupyterLab, text in a terminal, nothing when told."""
    from tqdm.auto import tqdm  # looks around for widgets when imported: not before a bar is due

    # TQDM_DISABLE is read here: where tqdm reads it, a widget stays in a notebook.
    return tqdm(disable=not on or os.environ.get("TQDM_DISABLE", "0") != "0", **options)
