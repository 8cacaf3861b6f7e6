"""`make bench`: our way of training against the reference's, side by side in one run.

Both are in processes of their own and take turns, A B A B ..., so that whatever else the machine
does falls on both; the figures are medians over the rounds. Ratios carry over to other machines,
bare times don't.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from contestants import BATCH, DEVICE, SMALL, serve
from matplotlib.figure import Figure

from tiny_cifar10_net import NetCIFAR10_Tiny, fuse
from tinycifar.acceleration import computes_bfloat16
from tinycifar.costs import layer_costs
from tinycifar.evaluation import full_precision
from tinycifar.publish import speed_table

HERE = Path(__file__).resolve().parent
SIDE_BY_SIDE = 8  # at most, as each takes 1 to 2 GB
MOST_MEMORY = "under 1,536 MiB"


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

    def turn(self, steps: int, warm_up: int) -> None:
        """Steps that count, after some that don't: caches are cold, a loader's queue is full."""
        for count in (warm_up, steps):
            self.begin(count)
            turn = self.end(count)
        self.turns.append(turn)

    def median(self, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(value, self.turns))

    def close(self) -> None:
        self.connection.send(0)
        self.process.join()


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
        seconds = median_seconds(lambda: conv(images), device)
    return 32 * 32 * 32 * conv.weight.numel() / seconds


def measured_bandwidth(device: str) -> float:
    """Bytes a second of x + y -> z on arrays far larger than the caches."""
    x, y, z = (torch.ones(2**26, device=device) for _ in range(3))
    return 3 * 4 * 2**26 / median_seconds(lambda: torch.add(x, y, out=z), device)


def median_seconds(function: Callable[[], Any], device: str = "cpu", repeats: int = 9) -> float:
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def inference(rounds: int) -> dict[int, float]:
    """How many times as fast the fused network is as the plain one, on one core, by batch size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    layout: Any = {"memory_format": torch.channels_last}
    plain = NetCIFAR10_Tiny().eval().to(**layout)
    seconds: dict[tuple[int, bool], list[float]] = {}
    with torch.inference_mode():
        for _ in range(rounds):
            for size, repeats in ((256, 3), (1, 100)):
                images = torch.randn(size, 3, 32, 32).to(**layout)
                for net in (plain, fuse(plain)):
                    once = median_seconds(lambda net=net, x=images: net(x), repeats=repeats)
                    seconds.setdefault((size, net is plain), []).append(once)
    torch.set_num_threads(threads)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return {size: median[size, True] / median[size, False] for size in (1, 256)}


# --------------------------------------------------------------------------------------- report


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """All figures, as `publish.speed_table` shows them, and the single turns behind them."""
    fast = DEVICE.type == "cuda" or computes_bfloat16()
    ways = {"float32": "ours", "bfloat16": "ours-bfloat16", f"batches of {SMALL}": "ours-small"}
    if not fast:
        del ways["bfloat16"]  # it would take a quarter of an hour, to no end
    runs = race(["reference", "ours-eager", *ways.values()], rounds, steps)
    rates = {name: run.median(lambda t: t["images_per_second"]) for name, run in runs.items()}
    count = min(torch.get_num_threads(), SIDE_BY_SIDE)
    together = {
        how: side_by_side(f"{name}-one-thread", count, rounds, steps) for how, name in ways.items()
    }
    ours, reference = runs["ours"], rates["reference"]
    parts = {
        part: ours.median(lambda t, part=part: t["parts"][part] / t["seconds"])
        for part in ours.turns[0]["parts"]  # where steps can be told apart; see contestants.Clock
    }
    bound, floor = max(roofline().items(), key=lambda item: item[1])
    eager = runs["ours-eager"]
    figures = [
        ("training: the reference's loop", f"{reference:.0f} images/s", ""),
        ("training: ours, eager, float32", f"{rates['ours-eager'] / reference:.2f}x", ""),
        *(
            (f"training: ours, compiled, {how}", f"{rates[name] / reference:.2f}x", "3x")
            for how, name in ways.items()
        ),
        *(
            (f"{count} one-thread runs side by side: {how}", f"{rate / reference:.2f}x", "")
            for how, rate in together.items()
        ),
        *(
            (f"share of a step: {part}", f"{share:.1%}", "under 5 %" if "data" in part else "")
            for part, share in parts.items()
        ),
        (f"share of the roofline ({bound} bounds)", f"{floor * rates['ours'] / BATCH:.0%}", ""),
        ("launch to first step, eager", f"{eager.seconds_to_first_step:.1f} s", "under 15 s"),
        ("launch to first step, compiled", f"{ours.seconds_to_first_step:.1f} s", ""),
        *(
            (f"peak memory: {how}", f"{runs[name].turns[-1]['peak_memory_mib']:,} MiB", MOST_MEMORY)
            for how, name in ways.items()
        ),
        *(
            (f"fused inference over plain, one core, batch {size}", f"{ratio:.2f}x", goal)
            for (size, ratio), goal in zip(inference(rounds).items(), ("1.5x", ""), strict=True)
        ),
    ]
    return {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "batch_size": BATCH,
        "rounds": rounds,
        "figures": [dict(zip(("figure", "measured", "goal"), f, strict=True)) for f in figures],
        "images_per_second_by_turn": {
            name: [turn["images_per_second"] for turn in run.turns] for name, run in runs.items()
        },
        "share_of_step": parts,
    }


def machine() -> dict[str, Any]:
    """What was measured on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return {
        "processor": name,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def plot(result: dict[str, Any]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    turns = result["images_per_second_by_turn"]
    reference = statistics.median(turns["reference"])
    for y, (name, rates) in enumerate(turns.items()):
        ratio = statistics.median(rates) / reference
        left.barh(y, ratio, color="0.6" if name == "reference" else "C0", height=0.6)
        left.plot([rate / reference for rate in rates], [y] * len(rates), "k.", ms=4)
        left.text(ratio, y + 0.36, f"{ratio:.2f}x", va="bottom", ha="right", fontsize=9)
    left.set_yticks(range(len(turns)), [name.replace("-", ", ") for name in turns])
    left.set(xlabel="training images/s, over the reference's loop", ylim=(-0.5, len(turns) - 0.2))
    start = 0.0
    for part, share in result["share_of_step"].items():
        right.barh(0, 100 * share, left=start, height=0.5, label=part)
        start += 100 * share
    right.set(xlabel="share of our compiled step in float32, %", yticks=[])
    right.set(ylim=(-0.5, 1.2), xlim=(0, 100))
    right.legend(loc="upper center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"{result['machine']['processor']}, {result['date']}", fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
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
