"""A recipe in, a run directory out; resumable, and the same bits every time.

    from training import train
    metrics = train("quick", run_dir="runs/mine", seed=1)

The run directory (see run_directory.py) is all that passes from training to analysis.

Randomness is keyed by (seed, epoch, batch or sample), never by which worker came first, so a run
in one go, a run killed and resumed, and a run with other loader workers end with the same numbers.
"""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import augment
import cifar10
import ingredients
from engine import CompiledNetwork, Memory, peak_memory
from feeding import key, make_feed, resized
from recipes import DEFAULTS, Recipe, check_choice, check_number, get_recipe
from networks import make_network
from run_directory import (
    RunError,
    begin,
    is_finished,
    locked,
    refuse_another_run,
    write,
    write_json,
)
from tiny_cifar10_net import (
    eval_mode,
    fuse,
    layer_costs,
    load_pretrained,
    run_path,
    weights_checksum,
)

__all__ = [
    "HISTORY_COLUMNS",
    "PROTOCOLS",
    "RunError",
    "check_settings",
    "evaluate",
    "identity",
    "log_probabilities",
    "run_folder",
    "teachers_run",
    "train",
    "train_index",
]

ROOT = Path(__file__).resolve().parent

PROTOCOLS = {
    "val": "a tenth of the training set (5,000 of CIFAR-10's 50,000) is held back as validation, "
    "and everything is chosen on it",
    "full": "the whole training set, fixed epochs, last weights; nothing is chosen",
    "test-selected": "the whole training set; schedule, stopping and epoch are chosen ON TEST, "
    "as the published reference did",
}

SEEDS = 0, 2**32 - 1  # the lowest and the highest

# Deterministic algorithms of CUDA ask for it, before anything is multiplied on the GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# So many pictures of one size pay for compiling the network for it: measured on two cores, at any
# size, that takes what 40,000 to 60,000 pictures save.
COMPILE_FROM = 80_000

HISTORY_COLUMNS = ("epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "seconds")


# ------------------------------------------------------------------------------------------ train


def train(
    recipe: str | Recipe = "quick",
    run_dir: str | Path | None = None,
    *,
    seed: int = 0,
    protocol: str = "val",
    dataset: str | cifar10.Data = "auto",
    device: str = "auto",
    workers: int = 0,
    force: bool = False,
    progress: bool = True,
    compile: bool | str = "auto",
) -> dict:
    """Train `NetCIFAR10_Tiny` and write a run directory.

    The same call again goes on where it was interrupted, and returns what it returned before once
    the run is finished.

    Args:
        recipe: a name in RECIPES, or a Recipe.
        run_dir: the run directory, a relative one counted from the repository's root; None:
            `run_folder(...)`.
        seed: decides initial weights, order and augmentation; not the train/val split.
        protocol: a name in PROTOCOLS.
        dataset: a name for `cifar10.load`, or what it returned.
        device: auto (CUDA, else MPS, else CPU), or a torch device name.
        workers: loader processes for the per-sample builds; changes the speed, not the bits.
        force: begin anew where a run is there that is finished, or another one.
        progress: draw bars and print a line an epoch; False is silent.
        compile: True uses torch.compile, False does without, "auto" compiles for picture sizes
            that the run feeds COMPILE_FROM pictures of. It changes the speed, and of the numbers
            only what rounding changes; a resumed run is to have the same.

    Returns:
        What metrics.json holds. Accuracies are percentages.

    Raises:
        ValueError: bad input. cifar10.DataError: the data set can't be had. FileNotFoundError:
        there is no such teacher. ImportError: the recipe's build is of a library that isn't
        installed. RunError: the run directory holds another run, or the loss is no longer finite.
        OSError: a file can't be written. In each case the run is intact up to its last finished
        epoch.
    """
    recipe = get_recipe(recipe)
    check_settings(recipe, protocol, seed)
    seed = check_number("seed", seed, int, *SEEDS)
    workers = check_number("workers", workers, int, 0, 64)
    if not isinstance(force, bool):
        raise ValueError(f"force must be True or False, not {force!r}")
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile must be True, False or 'auto', not {compile!r}")
    device = pick_device(device)
    data = dataset if isinstance(dataset, cifar10.Data) else cifar10.load(dataset)
    run_dir = run_folder(recipe, protocol, seed) if run_dir is None else ROOT / run_dir

    problem = _Problem(data, protocol)
    if recipe.batch_size > len(problem.train_index):
        raise ValueError(
            f"batch_size must be a whole number from 1 to {len(problem.train_index)}, "
            f"the number of training images; got {recipe.batch_size}"
        )
    who = identity(recipe, seed, protocol, data)
    if force or not is_finished(run_dir):
        teachers_run(recipe, protocol, data)  # what is refused leaves no folder behind
    with locked(run_dir), _repeatable(device):
        if not force:
            refuse_another_run(run_dir, who, DEFAULTS)
            if is_finished(run_dir):
                if progress:
                    print("This run is finished, and kept: FORCE=1 (force=True) trains it anew.")
                return json.loads((run_dir / "metrics.json").read_text())
        # Before anything is replaced: what can't be had, a library or memory, shows here.
        folder = teachers_run(recipe, protocol, data)
        teacher = folder and fuse(load_pretrained(folder))
        config = _config(recipe, seed, protocol, data, problem, device, compile)
        run = _Run(recipe, seed, problem, device, workers, run_dir, progress, compile, teacher)
        begun = begin(run_dir, config, who, DEFAULTS, force)
        _warn_if_elsewhere(begun, config)
        try:
            run.fit()
        except KeyboardInterrupt:
            print(f"Interrupted: {run_dir} is intact; the same command goes on from there.")
            raise
        return run.finish(config)


def check_settings(recipe: str | Recipe, protocol: str, seed: int) -> None:
    """Refuse with a ValueError what `train` would refuse, before anything else is done."""
    recipe = get_recipe(recipe)
    check_choice("protocol", protocol, tuple(PROTOCOLS))
    check_number("seed", seed, int, *SEEDS)
    if recipe.schedule == "plateau" and protocol == "full":
        raise ValueError(
            f"recipe {recipe.name!r} has a plateau schedule, which needs a loss to watch, and "
            "protocol 'full' has none: set schedule to one_cycle, cosine or constant"
        )


def run_folder(recipe: str | Recipe, protocol: str = "val", seed: int = 0) -> Path:
    """Where a run goes unless told otherwise: runs/<recipe>-<protocol>-seed<seed>."""
    return ROOT / "runs" / f"{get_recipe(recipe).name}-{protocol}-seed{seed}"


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA, else MPS, else the CPU; any other name must be there.

    Raises:
        ValueError: no such device here.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    here = {"cpu": True, "cuda": cuda, "mps": mps}
    if device is None or device.type not in here:
        raise ValueError(f"unknown device {name!r}; valid: auto, {', '.join(here)}")
    too_high = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if not here[device.type] or too_high:
        raise ValueError(f"device {name!r} isn't there; use device='auto', which takes what is")
    return device


def train_index(data: cifar10.Data, protocol: str) -> np.ndarray:
    """Which of the data's training pictures a protocol trains on: int64 indices, sorted."""
    if protocol == "val":
        return cifar10.split(data.train_labels)[0]
    return np.arange(len(data.train_labels))


class _Problem:
    """The data as a protocol sees it: what trains, what selects, what tests.

    Indices, not copies: the pictures of CIFAR-10 take 180 MB, once.
    """

    def __init__(self, data: cifar10.Data, protocol: str):
        self.protocol = protocol
        self.data = data
        self.train = (torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels))
        self.test = (torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels))
        index = train_index(data, protocol)
        self.train_index = torch.from_numpy(index)
        self.stats = cifar10.channel_stats(data.train_images, index)
        self.selection = self.test if protocol == "test-selected" else None
        if protocol == "val":
            self.selection = tuple(map(torch.from_numpy, data.validation))


class _Run:
    """One training in progress. Its whole state between two epochs is what last.pt holds."""

    def __init__(
        self, recipe, seed, problem, device, workers, run_dir, progress, compile, teacher=None
    ):
        self.recipe, self.problem, self.device = recipe, problem, device
        self.seed, self.run_dir, self.progress = seed, run_dir, progress
        torch.manual_seed(key(seed))
        model = make_network(len(problem.data.classes), recipe.model_options)
        if recipe.dirac:
            ingredients.dirac(model)
        if recipe.whiten:
            some = problem.train_index[:: max(1, len(problem.train_index) // 500)]
            ingredients.whiten(model.c1[0][0], problem.train[0][some], problem.stats)
        self.model = model.to(device, memory_format=torch.channels_last)
        sides = _worth_compiling(recipe, len(problem.train_index), device, compile)
        precision = getattr(torch, recipe.precision)
        self.network = CompiledNetwork(self.model, recipe.batch_size, sides, precision)
        self.teacher = teacher and teacher.to(device, memory_format=torch.channels_last)
        self.feed = make_feed(recipe, seed, problem, device, workers)
        self.optimizers = ingredients.optimizers(recipe, self.model)
        steps = math.ceil(len(problem.train_index) / recipe.batch_size)
        self.schedules = [
            ingredients.schedule(recipe, optimizer, steps) for optimizer in self.optimizers
        ]
        self.ema = None
        if recipe.ema is not None:
            average = get_ema_multi_avg_fn(recipe.ema)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.lr = recipe.lr  # of the last step
        self.memory = Memory()
        self.history: list[dict] = []
        self.best_epoch, self.best_loss, self.best_weights = 0, math.inf, None

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and kept: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def stopped(self) -> bool:
        patience = self.recipe.stop_patience
        waited = len(self.history) - self.best_epoch
        early = self.problem.selection is not None and patience is not None and waited >= patience
        return early or len(self.history) >= self.recipe.epochs

    def fit(self) -> None:
        self._load()
        with _bar(total=self.recipe.epochs, unit="epoch", on=self.progress) as bar:
            bar.update(len(self.history))
            while not self.stopped:
                row = self._epoch(len(self.history) + 1)
                self.history.append(row)
                self._save()
                if self.progress:
                    bar.clear()
                    print(_line(row, self.recipe.epochs), flush=True)
                bar.update()

    def _epoch(self, epoch: int) -> dict:
        started = time.perf_counter()
        self.memory.trim()
        train_loss, train_acc = self._train_pass(epoch)
        val_loss = val_acc = None
        if self.problem.selection is not None:
            self.memory.trim()
            val_loss, val_acc = evaluate(
                self.evaluated, *self.problem.selection, self.problem.stats
            )
            self._require_finite(val_loss, f"the selection loss after epoch {epoch}")
            if self.recipe.schedule == "plateau":
                for schedule in self.schedules:
                    schedule.step(val_loss)
        if val_loss is None or val_loss < self.best_loss - self.recipe.min_delta:
            self.best_epoch, self.best_loss = epoch, math.inf if val_loss is None else val_loss
            self.best_weights = _cpu_copy(self.evaluated)
        seconds = time.perf_counter() - started
        values = (epoch, self.lr, train_loss, train_acc, val_loss, val_acc, seconds)
        return dict(zip(HISTORY_COLUMNS, values, strict=True))

    def _train_pass(self, epoch: int) -> tuple[float, float]:
        """One epoch of steps; the mean loss and accuracy over the pictures as they were fed."""
        self.model.train()
        side = self.recipe.side(epoch)
        torch.manual_seed(key(self.seed, epoch))  # for whatever a network may draw by itself
        # Sums stay on the device, where reading one means waiting for all that was queued; a sum
        # that was ever NaN or infinite stays so, hence a GPU may be asked now and then.
        loss_sum, hits = torch.zeros(2, device=self.device)
        ask_every = 1 if self.device.type == "cpu" else 50
        with _bar(total=len(self.feed), unit="batch", on=self.progress, leave=False) as bar:
            for step, (images, labels) in enumerate(self.feed.epoch(epoch), start=1):
                loss, output = self._step(resized(images, side), labels)
                loss_sum += loss * len(labels)
                hits += (output.argmax(dim=1) == labels).sum()
                if step % ask_every == 0 or step == len(self.feed):
                    self._require_finite(
                        loss_sum.item(), f"the loss at step {step} of epoch {epoch}"
                    )
                bar.update()
        n = len(self.problem.train_index)
        return loss_sum.item() / n, 100 * hits.item() / n

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        output, teacher_log_p = self.network(images), None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_log_p = self.teacher(images)
        loss = ingredients.loss(self.recipe, output, labels, teacher_log_p)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.lr = self.optimizers[0].param_groups[0]["lr"]
        if self.recipe.schedule != "plateau":
            for schedule in self.schedules:
                schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return loss.detach(), output.detach()

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise RunError(
                f"{what} is {value}: training stopped there, and {self.run_dir} is intact up to "
                f"its last finished epoch; try another name with a lower lr ({self._rates})"
            )

    @property
    def _rates(self) -> str:
        """The highest rates of this recipe, in words."""
        also = f", muon_lr {self.recipe.muon_lr}" if len(self.optimizers) > 1 else ""
        return f"this recipe's is {self.recipe.lr}{also}"

    def _save(self) -> None:
        """last.pt first: the one file a resumed run believes. The others follow from it."""
        state = {
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "ema": None if self.ema is None else self.ema.state_dict(),
            "best": (self.best_epoch, self.best_loss, self.best_weights),
        }
        write(self.run_dir / "last.pt", _torch_bytes(state))
        self._write_derived()

    def _load(self) -> None:
        file = self.run_dir / "last.pt"
        if not file.is_file():
            return
        content = io.BytesIO(file.read_bytes())
        try:
            state = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # of a dozen kinds, as the damage has it
            raise RunError(
                f"{file} is damaged, so this run can't go on from it: put a whole copy there, or "
                "remove it, and the same command begins anew"
            ) from error
        if "optimizers" not in state:
            raise RunError(
                f"{self.run_dir} was begun by an earlier version of this code: finish it with "
                "that one, give another name, or remove the folder"
            )
        self.history = state["history"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.best_epoch, self.best_loss, self.best_weights = state["best"]
        self._write_derived()  # the kill may have come between last.pt and these

    def _write_derived(self) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, HISTORY_COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(self.history)
        write(self.run_dir / "history.csv", text.getvalue().encode())
        write(self.run_dir / "best.pt", _torch_bytes(self.best_weights))

    def finish(self, config: dict) -> dict:
        """Evaluate the selected weights on test, once, and write metrics.json."""
        self.memory.trim()
        self.evaluated.load_state_dict(self.best_weights)
        data, best = self.problem.data, self.history[self.best_epoch - 1]
        log_p = log_probabilities(self.evaluated, self.problem.test[0], self.problem.stats)
        log_p_tta = log_probabilities(
            self.evaluated, self.problem.test[0], self.problem.stats, tta=True
        )
        labels = self.problem.test[1]
        costs = layer_costs(self.evaluated)
        seconds = sum(row["seconds"] for row in self.history)
        metrics = {
            "name": self.run_dir.name,
            "recipe": self.recipe.name,
            "dataset": data.name,
            "limit": data.limit,
            "protocol": self.problem.protocol,
            "seed": self.seed,
            "params": sum(row.params for row in costs),
            "macs": sum(row.macs for row in costs),
            "epochs_run": len(self.history),
            "best_epoch": self.best_epoch,
            "train_acc": best["train_acc"],
            "val_acc": best["val_acc"],
            "val_loss": best["val_loss"],
            "test_acc": _accuracy(log_p, labels),
            "test_loss": F.nll_loss(log_p, labels).item(),
            "test_acc_tta": _accuracy(log_p_tta, labels),
            "seconds_train": seconds,
            "images_per_second": len(self.history) * len(self.problem.train_index) / seconds,
            "compiled_sides": sorted(self.network.sides),
            "peak_memory_mib": peak_memory(),
            "device": config["device"],
            "torch": torch.__version__,
            "git_commit": config["git_commit"],
            "weights_sha256": weights_checksum(self.run_dir),
        }
        write_json(self.run_dir / "metrics.json", metrics)
        return metrics


def _worth_compiling(recipe, pictures: int, device, compile: bool | str) -> set[int]:
    """The sides of the pictures that the network is compiled for."""
    fed = Counter()
    for epoch in range(1, recipe.epochs + 1):
        fed[recipe.side(epoch)] += pictures
    if compile == "auto":
        return {s for s in fed if device.type in ("cpu", "cuda") and fed[s] >= COMPILE_FROM}
    return set(fed) if compile else set()


def teachers_run(recipe: Recipe, protocol: str, data: cifar10.Data) -> Path | None:
    """The run directory of the network to learn from, where there is one.

    Raises:
        FileNotFoundError: there is no such run. RunError: it isn't finished, so that its weights
        still change. ValueError: it may know what the pupil mustn't.
    """
    if recipe.teacher is None:
        return None
    folder = _teacher_folder(recipe)
    if not is_finished(folder):
        raise RunError(f"teacher {recipe.teacher!r} isn't finished: finish its run first")
    saw = json.loads((folder / "config.json").read_text())
    if (saw["protocol"], saw["data_sha256"]) != (protocol, data.checksum):
        raise ValueError(
            f"teacher {recipe.teacher!r} was trained under protocol {saw['protocol']!r} on "
            f"{cifar10.title(saw['dataset'], saw['limit'])}: it must be {protocol!r} on "
            f"{data.title}, as here, so that it passes on nothing that is held back"
        )
    return folder


def _teacher_folder(recipe: Recipe) -> Path:
    here = ROOT / recipe.teacher  # as all relative paths of training
    return here if (here / "config.json").is_file() else run_path(recipe.teacher)


# ----------------------------------------------------------------------------------- evaluation


def log_probabilities(
    model: nn.Module,
    images: Tensor | np.ndarray,
    stats: cifar10.Stats,
    *,
    tta: bool = False,
    batch_size: int = 100,
) -> Tensor:
    """What `model` says of uint8 `images` (N, 32, 32, 3): float32 (N, classes), on the CPU.

    Args:
        stats: the channel mean and std that the model was trained with.
        tta: average the probabilities of the picture and its mirror image.
        batch_size: pictures at once; no faster when larger on a CPU, and 2 MB each.

    Raises:
        ValueError: there are no pictures.
    """
    images = torch.as_tensor(images)
    if not len(images):
        raise ValueError("there are no pictures to evaluate: give one or more")
    device = next(model.parameters()).device
    plain = augment.Batched(augment.get_policy("none"), stats.mean, stats.std).to(device)
    all_log_p = None
    no_draws = torch.zeros(batch_size, plain.DRAWS, device=device)  # nothing here is random
    with torch.inference_mode(), _float32(), eval_mode(model):
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size].to(device)
            batch = plain.transform(part, no_draws[: len(part)])
            log_p = model(batch)
            if tta:
                log_p = torch.logaddexp(log_p, model(batch.flip(3))) - math.log(2)
            if all_log_p is None:
                # One tensor for all: many small ones would stay between the large buffers, which
                # then couldn't be used again, and cost 0.3 GB.
                all_log_p = torch.empty(len(images), log_p.shape[1])
            all_log_p[start : start + len(batch)] = log_p
    return all_log_p.clone()  # a plain tensor, not one of inference mode


def evaluate(
    model: nn.Module,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    stats: cifar10.Stats,
    *,
    tta: bool = False,
) -> tuple[float, float]:
    """(mean negative log-likelihood, accuracy in percent) on uint8 pictures (N, 32, 32, 3).

    `tta` as for `log_probabilities`.
    """
    log_p = log_probabilities(model, images, stats, tta=tta)
    labels = torch.as_tensor(labels)
    return F.nll_loss(log_p, labels).item(), _accuracy(log_p, labels)


def _accuracy(log_p: Tensor, labels: Tensor) -> float:
    return 100 * (log_p.argmax(dim=1) == labels).double().mean().item()


# --------------------------------------------------------------------------- the run directory


def identity(recipe: Recipe, seed: int, protocol: str, data: cifar10.Data) -> dict:
    """What tells a run from any other: the fields of config.json that a resumed one must share.

    Not the teacher's checksum once the teacher is gone: a finished run has no more need of it.
    """
    who = {
        "recipe": asdict(recipe),
        # What the names meant: augment.POLICIES can be changed.
        "policies": {name: asdict(augment.get_policy(name)) for name in recipe.policies},
        "seed": seed,
        "protocol": protocol,
        "dataset": data.name,
        "limit": data.limit,
        "data_sha256": data.checksum,
        "teacher_sha256": None,
    }
    if recipe.teacher is not None:
        try:
            who["teacher_sha256"] = weights_checksum(_teacher_folder(recipe))
        except FileNotFoundError:
            del who["teacher_sha256"]
    return who


def _config(recipe, seed, protocol, data, problem, device, compile) -> dict:
    return {
        **identity(recipe, seed, protocol, data),
        "split": {
            "train": len(problem.train_index),
            "selection": 0 if problem.selection is None else len(problem.selection[1]),
            "test": len(problem.test[1]),
            "seed": 0,
        },
        "mean": list(problem.stats.mean),
        "std": list(problem.stats.std),
        "classes": list(data.classes),
        "model": recipe.model_options,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "libraries": _libraries(recipe),
        "compile": compile,
        "git_commit": _git_commit(),
        "command": _command(recipe, seed, protocol, data),
    }


# What changes the digits, beside the run's identity; on a GPU `device` names it.
_CONDITIONS = (
    "threads",
    "instructions",
    "device",
    "torch",
    "numpy",
    "libraries",
    "compile",
    "git_commit",
)


def _libraries(recipe: Recipe) -> dict[str, str | None]:
    """Versions of what augments beside torch; None where it was installed under another name."""
    builds = {
        "albumentations": ("albumentations", "opencv-python-headless"),
        "torchvision": ("torchvision",),
    }
    versions = {}
    for name in builds.get(recipe.build, ()):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _warn_if_elsewhere(begun: dict, now: dict) -> None:
    """A run that goes on under other conditions is still good, but can't be repeated exactly."""
    changed = [
        f"{name} was {begun.get(name)} and is {now[name]}"
        for name in _CONDITIONS
        if begun.get(name, now[name]) != now[name]  # an older run didn't note all of them
    ]
    if changed:
        warnings.warn(
            f"this run was begun under other conditions ({'; '.join(changed)}): it goes on, and "
            "may end with other digits than it would have",
            stacklevel=3,
        )


def _torch_bytes(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _cpu_copy(model: nn.Module) -> dict[str, Tensor]:
    # Contiguous: a published file shouldn't carry this machine's memory format.
    return {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
        for k, v in model.state_dict().items()
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}: {platform.machine()}, {torch.get_num_threads()} threads"


@functools.cache  # the code that runs stays what was imported, whatever is committed meanwhile
def _git_commit() -> str | None:
    """The commit of this code, with `+` if tracked files other than results changed since."""

    def git(*command: str) -> str:
        command = ("git", "-C", str(ROOT), *command)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", ".", ":(exclude)results")
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        return None
    return commit + "+" if changed else commit


def _command(recipe, seed, protocol, data) -> str:
    """The call that repeats this run, also once a preset of its name has changed."""
    changed = {k: v for k, v in asdict(recipe).items() if k != "name" and v != DEFAULTS[k]}
    how = f"Recipe({recipe.name!r}, **{changed})"
    source = (
        f"dataset={data.name!r}"
        if data.limit is None
        else f"dataset=load({data.name!r}, limit={data.limit})"
    )
    return f"train({how}, seed={seed}, protocol={protocol!r}, {source})"


# ---------------------------------------------------------------------------- around a training


@contextmanager
def _repeatable(device: torch.device):
    """Deterministic algorithms and our own random stream, all given back afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _float32():
        torch.use_deterministic_algorithms(True)
        # Otherwise each new tensor is filled with NaN, in a network that waits for memory.
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=only_warned)
            torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def _float32():
    """Convolutions on a GPU in full precision; by default they round to TF32's ten bits."""
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark
    cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark = "ieee", True, False
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark = before


def _line(row: dict, epochs: int) -> str:
    """One epoch for the log; without its time, so that a repeated run prints the same."""
    line = (
        f"epoch {row['epoch']:3d}/{epochs}  lr {row['lr']:.2e}  "
        f"train loss {row['train_loss']:.4f} acc {row['train_acc']:5.2f}"
    )
    if row["val_loss"] is not None:
        line += f"  val loss {row['val_loss']:.4f} acc {row['val_acc']:5.2f}"
    return line


def _bar(*, on: bool, **options):
    """A tqdm bar: a widget in JupyterLab, text in a terminal, nothing when told.

    A notebook that runs headless has no terminal of its own; PROGRESS_TTY names one to draw on,
    which also keeps the bars out of the notebook that is saved.
    """
    from tqdm.auto import tqdm  # looks around for widgets when imported: not before a bar is due

    # TQDM_DISABLE by hand: tqdm's own reading of it leaves a widget in a notebook.
    on = on and os.environ.get("TQDM_DISABLE", "0") == "0"
    terminal = os.environ.get("PROGRESS_TTY")
    if on and terminal:
        from tqdm.std import tqdm

        try:
            options |= {"file": open(terminal, "w"), "dynamic_ncols": True}  # noqa: SIM115 (as long as tqdm)
        except OSError:
            on = False
    return tqdm(disable=not on, **options)
