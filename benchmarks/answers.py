"""How long an answer takes: `predict` from a cold start, and the page of demo/ in a browser.

    python benchmarks/answers.py        # after `make site`; answers.json is written beside it

What is compared takes turns in one run; figures are medians.
"""

from __future__ import annotations

import functools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import typer
from bench import machine
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from tinycifar.paths import CHECKOUT, RESULTS

HERE = Path(__file__).resolve().parent
PHOTOGRAPH = (4000, 3000)  # as a phone takes it

# Milliseconds from the choice of a file to its probabilities on the page.
FURTHER = """([width, height]) => new Promise(async done => {
    const canvas = new OffscreenCanvas(width, height);
    canvas.getContext("2d").drawImage(document.querySelector("#drawn img"), 0, 0, width, height);
    const files = new DataTransfer();
    files.items.add(new File([await canvas.convertToBlob({type: "image/jpeg"})], "a.jpg"));
    const start = performance.now();
    new MutationObserver(() => done(performance.now() - start))
        .observe(document.querySelector("#time"), {childList: true});
    document.dispatchEvent(new DragEvent("drop", {dataTransfer: files}));
})"""


def cold_starts(image: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of `predict` in a process of its own, by what it runs on."""
    ways = {"torch": [], "onnx": ["--onnx", str(RESULTS / "export" / "net.onnx")]}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, options in ways.items():
            start = time.perf_counter()
            command = [sys.executable, "-m", "tinycifar", "predict", str(image), *options]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    return {name: turns[1:] for name, turns in seconds.items()}  # files were read from the disk


def on_the_page(browser: Browser, address: str) -> dict[str, float]:
    """Milliseconds, in a fresh profile: the first answer after navigation, and further ones."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    page.locator("#drawn button").first.click()
    page.locator("#time:not(:empty)").wait_for()
    figures = {"first": page.evaluate("performance.now()")}
    for name, size in (("32", (32, 32)), ("photograph", PHOTOGRAPH)):
        figures[name] = statistics.median(page.evaluate(FURTHER, list(size)) for _ in range(5))
    context.close()
    return figures


def page_turns(rounds: int) -> list[dict[str, float]]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    site = CHECKOUT / "site" if CHECKOUT else Path("site")
    serve = functools.partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        address = f"http://127.0.0.1:{server.server_port}/"
        turns = [on_the_page(browser, address) for _ in range(rounds)]
        browser.close()
        server.shutdown()
    return turns


def main(rounds: int = 11, out: Path = HERE / "answers.json") -> None:
    """Time both, and write the JSON."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        pixels = np.random.default_rng(0).integers(256, size=(480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image)
        starts = cold_starts(image, rounds)
    turns = page_turns(rounds)
    result = {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": rounds,
        "predict_seconds": {name: statistics.median(turns) for name, turns in starts.items()},
        "page_milliseconds": {
            name: statistics.median(turn[name] for turn in turns) for name in turns[0]
        },
        "turns": {"predict_seconds": starts, "page_milliseconds": turns},
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: result[name] for name in list(result)[:-1]}, indent=2))


if __name__ == "__main__":
    typer.run(main)
