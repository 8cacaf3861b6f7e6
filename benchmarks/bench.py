"""`make bench`: our way of training against the reference's, side by side in one run.

Both are in processes of their own and take turns, A B A B ..., so that whatever else the machine
does falls on both; the figures are medians over the rounds. Ratios carry over to other machines,
bare times don't.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from contestants import BATCH, DEVICE, SMALL

from tinycifar.publish import machine_name, speed_table
from tiny_cifar10_net import NetCIFAR10_Tiny, fuse, layer_costs
from tinycifar.training import _float32

HERE = Path(__file__).resolve().parent
SIDE_BY_SIDE = 8  # at most, as each takes 1 to 2 GB


class Contestant:
    """A process that trains on demand; between its turns it sleeps."""

    def __init__(self, name: str):
        self.batch = SMALL if "small" in name else BATCH
        environment = dict(os.environ)
        if name == "reference":
            environment.pop("GOMP_SPINCOUNT", None)  # as its author would run it
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, HERE / "contestants.py", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._answer()
        self.seconds_to_first_step = time.perf_counter() - started
        self.turns: list[dict] = []

    def begin(self, steps: int) -> None:
        """Train as many images as make so many steps of whole batches of BATCH."""
        self.process.stdin.write(f"{steps * BATCH // self.batch}\n")
        self.process.stdin.flush()

    def end(self) -> dict:
        return self._answer()

    def turn(self, steps: int, warm_up: int) -> None:
        """Steps that count, after some that don't: caches are cold, a loader's queue is full."""
        self.begin(warm_up)
        self.end()
        self.begin(steps)
        self.turns.append({"steps": steps} | self.end())

    def images_per_second(self) -> float:
        return statistics.median(BATCH * t["steps"] / t["seconds"] for t in self.turns)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict:
        while True:
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError("a contestant stopped; what it said stands above")
            if line.startswith("{"):  # else the banner of the stand-in
                return json.loads(line)


def race(names: list[str], rounds: int, steps: int) -> dict[str, Contestant]:
    contestants = {name: Contestant(name) for name in names}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            contestant.turn(steps, warm_up=10 if name == "reference" else 3)
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
        rates.append(sum(BATCH * steps / run.end()["seconds"] for run in runs))
    for run in runs:
        run.close()
    return statistics.median(rates)


# ------------------------------------------------------------------------------------- roofline


def roofline(step_seconds: float) -> dict:
    """What a step takes at least: its multiply-adds at the peak, its bytes at the bandwidth.

    Three times the forward multiply-adds (outputs, gradients of inputs, of weights). Each
    convolution's output crosses the memory six times: written and read forward; backward its
    gradient is written and read, and the output itself is read for BatchNorm and for the next
    convolution's weights.
    """
    peak, bandwidth = measured_peak(DEVICE.type), measured_bandwidth(DEVICE.type)
    costs = layer_costs(NetCIFAR10_Tiny())
    macs = 3 * BATCH * sum(c.macs for c in costs)
    outputs = [c.out_shape for c in costs if "Conv" in c.kind]
    activations = 6 * BATCH * 4 * sum(c * h * w for c, h, w in outputs)
    floors = {"multiply-adds": macs / peak, "memory": activations / bandwidth}
    bound = max(floors, key=floors.get)
    return {
        "peak_gmacs_per_second": peak / 1e9,
        "bandwidth_gb_per_second": bandwidth / 1e9,
        "floor_seconds": floors,
        "bound": bound,
        "share": floors[bound] / step_seconds,
    }


def measured_peak(device: str) -> float:
    """Multiply-adds a second of a large float32 convolution, which outdoes matrix products here."""
    images = torch.randn(32, 256, 32, 32, device=device).to(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False, device=device)
    conv = conv.to(memory_format=torch.channels_last)
    with torch.inference_mode(), _float32():
        seconds = median_seconds(lambda: conv(images), device)
    return 32 * 32 * 32 * conv.weight.numel() / seconds


def measured_bandwidth(device: str) -> float:
    """Bytes a second of x + y -> z on arrays far larger than the caches."""
    x, y, z = (torch.ones(2**26, device=device) for _ in range(3))
    return 3 * 4 * 2**26 / median_seconds(lambda: torch.add(x, y, out=z), device)


def median_seconds(function, device: str = "cpu", repeats: int = 9) -> float:
    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    function()
    wait()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        wait()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


# ------------------------------------------------------------------------------------ inference


def inference(rounds: int) -> dict:
    """Plain and fused, on one core: images/s at batch 256, ms at batch 1."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plain = NetCIFAR10_Tiny().eval().to(memory_format=torch.channels_last)
    nets = {"plain": plain, "fused": fuse(plain)}
    large, one = (torch.randn(n, 3, 32, 32) for n in (256, 1))
    large, one = (x.to(memory_format=torch.channels_last) for x in (large, one))
    seconds = {(name, n): [] for name in nets for n in (256, 1)}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, net in nets.items():
                seconds[name, 256].append(median_seconds(lambda net=net: net(large), repeats=3))
                seconds[name, 1].append(median_seconds(lambda net=net: net(one), repeats=100))
    torch.set_num_threads(threads)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return {
        "images_per_second_batch_256": {name: 256 / median[name, 256] for name in nets},
        "milliseconds_batch_1": {name: 1000 * median[name, 1] for name in nets},
        "ratio_batch_256": {n: median["plain", 256] / median[n, 256] for n in nets},
        "ratio_batch_1": {n: median["plain", 1] / median[n, 1] for n in nets},
    }


# --------------------------------------------------------------------------------------- report


def machine() -> dict:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def measure(rounds: int, steps: int) -> dict:
    names = ["reference", "ours", "ours-bfloat16", "ours-eager", "ours-small"]
    runs = race(names, rounds, steps)
    rates = {name: run.images_per_second() for name, run in runs.items()}
    turns = runs["ours"].turns
    # Where steps can be told apart; see contestants.Clock.
    parts = {
        part: statistics.median(t["parts"][part] / t["seconds"] for t in turns)
        for part in turns[0]["parts"]
    }
    count = min(torch.get_num_threads(), SIDE_BY_SIDE)
    together = {
        name: side_by_side(f"{name}-one-thread", count, rounds, steps)
        for name in ("ours", "ours-bfloat16", "ours-small")
    }
    return {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "batch_size": BATCH,
        "rounds": rounds,
        "steps_per_turn": steps,
        "runs_side_by_side": count,
        "images_per_second": rates,
        "images_per_second_by_turn": {
            name: [BATCH * t["steps"] / t["seconds"] for t in run.turns]
            for name, run in runs.items()
        },
        "ratio": rates["ours"] / rates["reference"],
        "ratio_eager": rates["ours-eager"] / rates["reference"],
        "ratio_one_thread_runs_side_by_side": together["ours"] / rates["reference"],
        "bfloat16": {
            "ratio": rates["ours-bfloat16"] / rates["reference"],
            "ratio_one_thread_runs_side_by_side": together["ours-bfloat16"] / rates["reference"],
            "peak_memory_mib": runs["ours-bfloat16"].turns[-1]["peak_memory_mib"],
        },
        "small_batches": {
            "batch_size": SMALL,
            "ratio": rates["ours-small"] / rates["reference"],
            "ratio_one_thread_runs_side_by_side": together["ours-small"] / rates["reference"],
            "peak_memory_mib": runs["ours-small"].turns[-1]["peak_memory_mib"],
        },
        "share_of_step": parts,
        "roofline": roofline(BATCH / rates["ours"]),
        "seconds_to_first_step_without_compile": runs["ours-eager"].seconds_to_first_step,
        "seconds_to_first_step_with_compile": runs["ours"].seconds_to_first_step,
        "peak_memory_mib": turns[-1]["peak_memory_mib"],
        "peak_memory_mib_without_compile": runs["ours-eager"].turns[-1]["peak_memory_mib"],
        "inference_one_core": inference(rounds),
    }


def plot(result: dict):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    turns = result["images_per_second_by_turn"]
    reference = result["images_per_second"]["reference"]
    labels = {
        "reference": "reference's loop",
        "ours-eager": "ours, eager",
        "ours": "ours, compiled",
        "ours-bfloat16": "ours, compiled, bfloat16",
    }
    for y, name in enumerate(labels):
        rate = result["images_per_second"][name] / reference
        left.barh(y, rate, color="0.6" if name == "reference" else "C0", height=0.6)
        left.plot([r / reference for r in turns[name]], [y] * len(turns[name]), "k.", ms=4)
        left.text(rate, y + 0.36, f"{rate:.2f}x", va="bottom", ha="right", fontsize=9)
    left.set_yticks(range(len(labels)), labels.values())
    left.set(xlabel="training images/s, over the reference's loop", ylim=(-0.5, 3.8))
    start = 0.0
    for part, share in result["share_of_step"].items():
        right.barh(0, 100 * share, left=start, height=0.5, label=part)
        start += 100 * share
    right.set(
        xlabel="share of our compiled step in float32, %",
        ylim=(-0.5, 1.2),
        yticks=[],
        xlim=(0, 100),
    )
    right.legend(loc="upper center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"{machine_name(result['machine'])}, {result['date']}", fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=HERE, help="where the JSON and the plot go")
    args = parser.parse_args()
    result = measure(args.rounds, args.steps)
    name = "gpu" if result["machine"]["gpu"] else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result).savefig(args.out / f"{name}.png", dpi=110)
    print(speed_table(result))


if __name__ == "__main__":
    main()
