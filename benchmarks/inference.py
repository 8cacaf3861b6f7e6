"""The section of `make bench` on inference: torch, ONNX Runtime and OpenVINO, in turns.

All on one thread of one process, with the same network: torch's ways are given normalised images,
the others uint8 pixels, which they normalise themselves. Figures are medians over rounds in which
each way has its turn, as ratios to the plain torch network.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from tiny_cifar10_net import fuse
from tinycifar import load_pretrained
from tinycifar.export import BATCHES, FILES, in_turns, ort_session
from tinycifar.paths import RESULTS

PLAIN, FUSED, COMPILED = "torch, plain", "torch, fused", "torch, compiled"
FLOAT, INT8 = "ONNX Runtime, float", "ONNX Runtime, int8"
GOALS = {  # by way and batch size
    (FUSED, 1): "1.8x", (FUSED, 256): "3x", (FLOAT, 1): "5x", (FLOAT, 256): "7x",
}  # fmt: skip
INT8_GOAL = "1.5x on a CPU with VNNI"
EXPORTED = RESULTS / "export"


def measure(rounds: int, compiled: bool = True) -> dict[str, Any]:
    """Microseconds an image of each way and batch size, and the ratios as `figures`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        microseconds = {size: _microseconds(size, rounds, compiled) for size in BATCHES}
    finally:
        torch.set_num_threads(before)
    figures = []
    for way in microseconds[1]:
        for size in BATCHES:
            times = microseconds[size]
            if way != PLAIN:
                ratio, goal = times[PLAIN] / times[way], GOALS.get((way, size), "")
                figures.append((f"{way}, over plain torch, batch {size}", ratio, goal))
    for size in BATCHES:
        ratio = microseconds[size][FLOAT] / microseconds[size][INT8]
        figures.append((f"{INT8} over float, batch {size}", ratio, INT8_GOAL))
    return {
        "figures": [
            {"figure": figure, "measured": f"{ratio:.1f}x", "goal": goal}
            for figure, ratio, goal in figures
        ],
        "microseconds_an_image": microseconds,
        "rounds": rounds,
        "vnni": bool(torch.cpu.get_capabilities().get("avx512_vnni")),
        "versions": {name: _version(name) for name in ("torch", "onnxruntime", "openvino")},
    }


def _microseconds(size: int, rounds: int, compiled: bool) -> dict[str, float]:
    calls = ways(size, compiled)
    with torch.inference_mode():
        seconds = in_turns(calls, rounds, repeat=max(1, 32 // size))
    return {way: 1e6 * taken / size for way, taken in seconds.items()}


def ways(size: int, compiled: bool = True) -> dict[str, Callable[[], Any]]:
    """What is timed, by its name, each a call on a batch of so many images."""
    pixels = torch.randint(0, 256, (size, 32, 32, 3), dtype=torch.uint8)
    images = torch.randn(size, 3, 32, 32)
    plain = load_pretrained()
    found: dict[str, Callable[[], Any]] = {
        PLAIN: partial(plain, images),
        FUSED: partial(fuse(plain), images),
    }
    if compiled:
        found[COMPILED] = partial(torch.compile(plain, dynamic=False), images)
    for way, name in zip((FLOAT, INT8), FILES, strict=False):
        session = ort_session(EXPORTED / name)
        found[way] = partial(session.run, None, {"images": pixels.numpy()})
    if find_spec("openvino"):
        import openvino

        for way, name in zip(("OpenVINO, float", "OpenVINO, int8"), FILES, strict=False):
            options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
            model = openvino.Core().compile_model(str(EXPORTED / name), "CPU", options)
            found[way] = partial(model, pixels.numpy())
    return found


def _version(name: str) -> str | None:
    found = find_spec(name)
    return importlib.import_module(name).__version__.split("-")[0] if found else None
