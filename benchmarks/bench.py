"""`make bench`: our way of training against the reference's, side by side in one run; inference.

Both are in processes of their own and take turns, A B A B ..., so that whatever else the machine
does falls on both; the figures are medians over the rounds. Ratios carry over to other machines,
bare times don't.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from pathlib import Path
from typing import Any

import inference
import matplotlib.pyplot as plt
import pandas as pd
import torch
import typer
from contestants import BATCH, DEVICE, SMALL, serve
from matplotlib.figure import Figure
from torch.utils.benchmark import Timer

from tiny_cifar10_net import NetCIFAR10_Tiny
from tinycifar.acceleration import computes_bfloat16
from tinycifar.costs import layer_costs
from tinycifar.evaluation import full_precision
from tinycifar.publish import inference_table, speed_table

HERE = Path(__file__).resolve().parent
SIDE_BY_SIDE = 8  # at most, as each takes 1 to 2 GB
GOALS = {  # of the figures that begin like this
    "training: ours, compiled": "3x",
    "share of a step: data": "under 5 %",
    "launch to first step, eager": "under 15 s",
    "peak memory": "under 1,536 MiB",
}


class Contestant:
    """A process that trains on demand; between its turns it sleeps."""

    def __init__(self, name: str):
        self.batch = SMALL if "small" in name else BATCH
        self.turns: list[dict[str, Any]] = []
        context, started = multiprocessing.get_context("spawn"), time.perf_counter()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, theirs))
        spin = os.environ.get("GOMP_SPINCOUNT", "")
        if name == "reference":  # as its author would run it
            os.environ.pop("GOMP_SPINCOUNT", None)
        self.process.start()
        os.environ["GOMP_SPINCOUNT"] = spin or "30000"
        theirs.close()
        self.connection.recv()
        self.seconds_to_first_step = time.perf_counter() - started

    def begin(self, steps: int) -> None:
        """Train as many images as make so many steps of whole batches of BATCH."""
        self.connection.send(steps * BATCH // self.batch)

    def end(self, steps: int) -> dict[str, Any]:
        answer = self.connection.recv()
        return answer | {"images_per_second": BATCH * steps / answer["seconds"]}

    def rate(self) -> float:
        return statistics.median(turn["images_per_second"] for turn in self.turns)

    def close(self) -> None:
        self.connection.send(0)
        self.process.join()


def race(names: list[str], rounds: int, steps: int) -> dict[str, Contestant]:
    contestants = {name: Contestant(name) for name in names}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            # First some that don't count: caches are cold, a loader's queue is full.
            for count in (10 if name == "reference" else 3, steps):
                contestant.begin(count)
                turn = contestant.end(count)
            contestant.turns.append(turn)
    for contestant in contestants.values():
        contestant.close()
    return contestants


def side_by_side(name: str, count: int, rounds: int, steps: int) -> float:
    """Images/s of so many one-thread runs at once, together."""
    runs = [Contestant(name) for _ in range(count)]
    rates = []
    for _ in range(rounds):
        for run in runs:
            run.begin(steps)
        rates.append(sum(run.end(steps)["images_per_second"] for run in runs))
    for run in runs:
        run.close()
    return statistics.median(rates)


# ------------------------------------------------------------------------------------- roofline


def roofline() -> dict[str, float]:
    """Least seconds of a step: its multiply-adds at the peak rate, its bytes at the bandwidth.

    Three times the forward multiply-adds (outputs, gradients of inputs, of weights). Each
    convolution's output crosses the memory six times: written and read forward; backward its
    gradient is written and read, and the output itself is read for BatchNorm and for the next
    convolution's weights.
    """
    costs = layer_costs(NetCIFAR10_Tiny())
    macs = 3 * BATCH * sum(c.macs for c in costs)
    outputs = [c.out_shape for c in costs if "Conv" in c.kind]
    activations = 6 * BATCH * 4 * sum(c * h * w for c, h, w in outputs)
    return {
        "multiply-adds": macs / measured_peak(DEVICE.type),
        "memory": activations / measured_bandwidth(DEVICE.type),
    }


def measured_peak(device: str) -> float:
    """Multiply-adds a second of a large float32 convolution, which outdoes matrix products here."""
    layout: Any = {"memory_format": torch.channels_last}
    images = torch.randn(32, 256, 32, 32, device=device).to(**layout)
    conv = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False, device=device).to(**layout)
    with torch.inference_mode(), full_precision():
        seconds = median_seconds("conv(images)", torch.get_num_threads(), conv=conv, images=images)
    return 32 * 32 * 32 * conv.weight.numel() / seconds


def measured_bandwidth(device: str) -> float:
    """Bytes a second of x + y -> z on arrays far larger than the caches."""
    arrays = {name: torch.ones(2**26, device=device) for name in "xyz"}
    add = "torch.add(x, y, out=z)"
    return 3 * 4 * 2**26 / median_seconds(add, torch.get_num_threads(), **arrays)


def median_seconds(statement: str, threads: int, **names: Any) -> float:
    timer = Timer(statement, globals={"torch": torch, **names}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=0.5).median


# --------------------------------------------------------------------------------------- report


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """All figures, as `publish.speed_table` shows them, and the single turns behind them."""
    ways = {"float32": "ours", "bfloat16": "ours-bfloat16", f"batches of {SMALL}": "ours-small"}
    if DEVICE.type == "cpu" and not computes_bfloat16():
        del ways["bfloat16"]  # it would take a quarter of an hour, to no end
    runs = race(["reference", "ours-eager", *ways.values()], rounds, steps)
    ours, eager, reference = runs["ours"], runs["ours-eager"], runs["reference"].rate()

    figures = {"training: the reference's loop": f"{reference:.0f} images/s"}
    figures["training: ours, eager, float32"] = f"{eager.rate() / reference:.2f}x"
    for how, name in ways.items():
        figures[f"training: ours, compiled, {how}"] = f"{runs[name].rate() / reference:.2f}x"
    count = min(torch.get_num_threads(), SIDE_BY_SIDE)
    for how, name in ways.items():
        rate = side_by_side(f"{name}-one-thread", count, rounds, steps)
        figures[f"{count} one-thread runs side by side: {how}"] = f"{rate / reference:.2f}x"
    # None where steps can't be told apart; see contestants.steps.
    laps = pd.DataFrame([turn["parts"] for turn in ours.turns])
    parts = laps.div([turn["seconds"] for turn in ours.turns], axis=0).median().to_dict()
    for part, share in parts.items():
        figures[f"share of a step: {part}"] = f"{share:.1%}"
    bound, floor = max(roofline().items(), key=lambda item: item[1])
    share = floor * ours.rate() / BATCH
    figures[f"share of the roofline ({bound} bounds)"] = f"{share:.0%}"
    figures["launch to first step, eager"] = f"{eager.seconds_to_first_step:.1f} s"
    figures["launch to first step, compiled"] = f"{ours.seconds_to_first_step:.1f} s"
    for how, name in ways.items():
        figures[f"peak memory: {how}"] = f"{runs[name].turns[-1]['peak_memory_mib']:,} MiB"

    return {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "batch_size": BATCH,
        "rounds": rounds,
        "figures": [
            {"figure": figure, "measured": measured, "goal": goal(figure)}
            for figure, measured in figures.items()
        ],
        "images_per_second_by_turn": {
            name: [turn["images_per_second"] for turn in run.turns] for name, run in runs.items()
        },
        "share_of_step": parts,
    }


def goal(figure: str) -> str:
    return next((goal for start, goal in GOALS.items() if figure.startswith(start)), "")


def machine() -> dict[str, Any]:
    """What was measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def plot(result: dict[str, Any]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    turns = pd.DataFrame(result["images_per_second_by_turn"])
    ratios = turns / turns["reference"].median()
    names = [name.replace("-", ", ") for name in ratios]
    bars = left.barh(names, ratios.median(), height=0.6, color=["0.6"] + ["C0"] * (len(names) - 1))
    left.bar_label(bars, fmt="%.2fx", label_type="center", color="white", fontsize=9)
    left.plot(ratios.T, names, "k.", ms=4)
    left.set(xlabel="training images/s, over the reference's loop")
    if shares := result["share_of_step"]:  # not of a GPU
        pd.DataFrame([shares]).mul(100).plot.barh(stacked=True, ax=right)
        right.legend(loc="upper center", ncols=2, frameon=False, fontsize=9)
    right.set(xlabel="share of our compiled step in float32, %", yticks=[])
    right.set(ylim=(-0.5, 1.2), xlim=(0, 100))
    figure.suptitle(f"{result['machine']['processor']}, {result['date']}", fontsize=10)
    return figure


def main(
    rounds: int = 5, steps: int = 20, out: Path = HERE, training: bool = True, turns: int = 40
) -> None:
    """Training, ours against the reference's, in ROUNDS; then inference, in TURNS.

    JSON files and a plot go to OUT. --no-training leaves out the former.
    """
    out.mkdir(parents=True, exist_ok=True)
    if training:
        plt.switch_backend("Agg")
        result = measure(rounds, steps)
        name = "gpu" if result["machine"]["gpu"] else "cpu"
        (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        plot(result).savefig(out / f"{name}.png", dpi=110)
        print(speed_table(result))
    result = inference.measure(turns)
    result = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), **result}
    (out / "inference.json").write_text(json.dumps(result, indent=2) + "\n")
    print(inference_table(result))


if __name__ == "__main__":
    typer.run(main)
