"""A run in, ONNX files out: `net.onnx` in float32 and `net-int8.onnx`, measured as they are.

    export("taught", "runs/export")     # `make export RUN=taught TO=runs/export`

Both take `images`, uint8 (N, 32, 32, 3) in RGB with N left free, and give `probabilities`, float32
(N, classes): normalisation is inside. Opset 20 and IR version 10, which ONNX Runtime reads from
1.18 on. What else is to be known is in their metadata, all strings: `producer` is "tinycifar";
`run`, `recipe`, `dataset` and `licence`; `classes`, `mean` and `std` (of pixels from 0 to 1), JSON
lists; `accuracy`, a JSON object with `percent` and what it was `measured` on.

torch's exporter writes them. The int8 one has QuantizeLinear and DequantizeLinear around each
convolution but the first and the head (see `quantise`), which ONNX Runtime joins into integer
convolutions.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import augment
from tiny_cifar10_net import NetCIFAR10_Tiny, folded
from tinycifar.checks import DataUnavailable
from tinycifar.data import DATASETS, Data, DataSplits, Stats, load, some_of
from tinycifar.evaluation import log_probabilities
from tinycifar.images import SIDE
from tinycifar.paths import DEFAULT, RESULTS, absolute, shown
from tinycifar.quantise import Int8Conv, Quantiser, calibrate, simulated_int8
from tinycifar.run_directory import RunDirectory, RunError, find_run, write_file
from tinycifar.weights import load_network

OPSET = 20
FILES = ("net.onnx", "net-int8.onnx", "export.json")
LICENCE = "MIT"
TOLERANCE = 1e-4  # by how much a probability may differ from torch's
CALIBRATION = 512  # training images
LANES = 16  # channels that a CPU's widest registers take at once
BATCHES = (1, 256)  # sizes that are timed


def export(
    run: str | Path = DEFAULT,
    folder: str | Path = "runs/export",
    *,
    dataset: Data | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write FILES into a folder, and measure them with ONNX Runtime on the test images.

    The int8 file is of the run itself if its recipe is an int8 one (then the float file is of its
    teacher), else of the published int8 run that started from this one, else calibrated on
    CALIBRATION training images. Without the data set that the run was trained on there is a float
    file alone, compared with torch on the stand-in's images; its accuracy is that of metrics.json,
    and says so.

    Args:
        run: a finished run, as `find_run` takes it.
        folder: where to, a relative one as in `paths.absolute`.
        dataset: what the run was trained on; None loads it.
        progress: print what was written.

    Returns:
        What export.json holds; `files` has a row a file: accuracy in percent, agreement with the
        float file's predictions in percent, bytes, microseconds an image by batch size.

    Raises:
        FileNotFoundError: no such run. RunError: it isn't finished; the float file's answers aren't
        torch's; or the folder has an int8 file, and the images for another aren't here.
        ImportError: what is needed beside torch isn't installed. OSError: the folder can't be
        written. ValueError: the run's files can't be used, or the images aren't 32 x 32.
    """
    ort = _needed()
    source, int8_source = sources(run)
    config, into = source.config(), absolute(folder)
    _require_writable(into)
    network = load_network(source)
    data = dataset or _data_of(config)
    own = data.checksum == config["data_sha256"]
    if not own and (into / FILES[1]).exists():
        raise RunError(
            f"{shown(into / FILES[1])} is there already, and without the images of "
            f"{config['dataset']} it can't be replaced along with the float file: name another "
            "folder, or get the images"
        )
    images, labels, stats = data.test_images, data.test_labels, Stats(network.mean, network.std)

    expected = log_probabilities(network, images, stats).exp().numpy()
    models = {FILES[0]: onnx_model(folded(network))}
    if own:
        models[FILES[1]] = onnx_model(int8_network(run, data))
    elif progress:
        print(f"{FILES[1]} isn't written: that takes the images of {config['dataset']}.")

    rows, contents, runs = [], {}, (source, int8_source or source)
    sessions = {name: ort_session(model) for name, model in models.items()}
    given = {name: answers(session, images) for name, session in sessions.items()}
    _require_equal(given[FILES[0]], expected)
    times = in_turns_by_batch(sessions, images)
    for (name, model), of in zip(models.items(), runs, strict=False):
        called = given[name].argmax(1)
        percent = 100 * float((called == labels).mean())
        measured = f"this file, {len(labels):,} test images, ONNX Runtime {ort.__version__}"
        if not own:
            percent, measured = source.metrics()["test_acc"], "by torch, see metrics.json"
        accuracy = {"percent": percent, "measured": measured}
        content = _labelled(model, config, of, accuracy)
        row: dict[str, Any] = {"file": name, "run": of.path.name, **accuracy}
        row["agreement"] = 100 * float((called == given[FILES[0]].argmax(1)).mean())
        row |= {"bytes": len(content), "microseconds": times[name]}
        rows.append(row | {"sha256": hashlib.sha256(content).hexdigest()})
        contents[name] = content
    result = {
        "compared_on": data.title,
        "opset": OPSET,
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "threads": 1,
        "vnni": bool(torch.cpu.get_capabilities().get("avx512_vnni")),
        "files": rows,
    }
    contents[FILES[2]] = (json.dumps(result, indent=2) + "\n").encode()
    for name in FILES[1:]:  # a kill in between must not leave what belongs to another float file
        (into / name).unlink(missing_ok=True)
    for name, content in contents.items():  # once all are made
        write_file(into / name, content)
    if progress:
        print(f"Written into {shown(into)}:\n\n{table(result)}")
    return result


def table(result: Mapping[str, Any]) -> str:
    """What `export` returned, in Markdown."""
    from tabulate import tabulate

    rows = [
        {
            "file": row["file"],
            "run": row["run"],
            "test accuracy, %": f"{row['percent']:.2f}"
            + " by torch" * ("torch" in row["measured"]),
            "as float, %": f"{row['agreement']:.2f}",
            "bytes": f"{row['bytes']:,}",
            **{f"µs an image, batch {n}": f"{us:.0f}" for n, us in row["microseconds"].items()},
        }
        for row in result["files"]
    ]
    return str(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


# -------------------------------------------------------------------------------- what is exported


def _needed() -> Any:
    """onnxruntime, if all is there that an export needs beside torch."""
    try:
        for name in ("onnx", "onnxscript"):
            import_module(name)
        return import_module("onnxruntime")
    except ImportError as error:
        raise ImportError(
            f"an export needs {error.name}, which isn't installed: pip install onnx onnxscript "
            "onnxruntime (in the versions of requirements.txt), or this package's extra `export`"
        ) from error


def sources(run: str | Path) -> tuple[RunDirectory, RunDirectory | None]:
    """The run of the float file, and that of the int8 one if there is one; see `export`."""
    given = _tested(run)
    recipe = given.config()["recipe"]
    if not recipe["int8"]:
        files = sorted(RESULTS.glob("*int8*/config.json"))
        published = (RunDirectory(file.parent) for file in files)
        same = (r for r in published if r.config().get("teacher_sha256") == given.checksum())
        return given, next(same, None)
    teacher = _tested(recipe["teacher"])
    if teacher.checksum() != given.config()["teacher_sha256"]:
        raise RunError(
            f"{shown(given.path)} started from other weights than {recipe['teacher']!r} has now: "
            "restore those, or train the run again"
        )
    return teacher, given


def _tested(run: str | Path) -> RunDirectory:
    found = RunDirectory(find_run(run))
    if not found.is_done(test=True):
        raise RunError(
            f"{shown(found.path)} isn't finished and tested: finish its run first, then export it"
        )
    return found


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"can't write into {folder} ({error}): name a folder that can be written"
        ) from error


def _data_of(config: Mapping[str, Any]) -> Data:
    try:
        if config["dataset"] not in DATASETS:
            return load("shapes")
        return load(config["dataset"], limit=config["limit"])
    except DataUnavailable as error:
        print(f"{error}\nThe float file is compared with torch on `shapes` instead.")
        return load("shapes")


def int8_network(run: str | Path, data: Data) -> Any:
    """The network with simulated int8 (see `quantise`) that `export` writes: trained or calibrated.

    Arguments, and what is raised: see `export`; `data` is what the run was trained on.
    """
    source, int8_source = sources(run)
    if int8_source is not None:
        return load_network(int8_source)
    network = load_network(source)
    splits = DataSplits(data, source.config()["protocol"])
    images = splits.train[0][some_of(splits.train_index, CALIBRATION)]
    model = simulated_int8(network)
    calibrate(model, augment.normalised(images, network.mean, network.std).split(64))
    return model


# --------------------------------------------------------------------------------- torch to ONNX


class _FromPixels(nn.Module):
    """uint8 (N, H, W, 3) -> probabilities (N, classes)."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network
        for name in ("mean", "std"):
            values = 255 * torch.tensor(getattr(network, name))
            self.register_buffer(name, values.view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        pixels: Any = images.permute(0, 3, 1, 2).float()
        return self.network((pixels - self.mean) / self.std).exp()


class _Mean(nn.Module):
    """The global average pool; torch's own becomes ten nodes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class _OnnxQuantiser(nn.Module):
    """A Quantiser as the two nodes of ONNX."""

    def __init__(self, quantiser: Quantiser):
        super().__init__()
        scale, zero = quantiser.scale_and_zero()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        onnx: Any = torch.onnx.ops
        grid = (self.scale, self.zero)
        q = onnx.symbolic("QuantizeLinear", (x, *grid), dtype=torch.uint8, shape=x.shape)
        return onnx.symbolic("DequantizeLinear", (q, *grid), dtype=x.dtype, shape=x.shape)


class _OnnxConv(nn.Module):
    """An Int8Conv, its weights stored as int8."""

    def __init__(self, conv: Int8Conv):
        super().__init__()
        scale = conv.weight_scale()
        self.input, self.conv = _OnnxQuantiser(conv.input), conv
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("weight", (conv.weight / scale).round().char())

    def forward(self, x: Tensor) -> Tensor:
        onnx: Any = torch.onnx.ops
        inputs, c = (self.weight, self.scale), self.conv
        weight = onnx.symbolic(
            "DequantizeLinear", inputs, {"axis": 0}, dtype=x.dtype, shape=c.weight.shape
        )
        x = self.input(x)
        return F.conv2d(x, weight, c.bias, c.stride, c.padding, c.dilation, c.groups)


def onnx_model(network: nn.Module) -> Any:
    """An onnx.ModelProto of a network without BatchNorms, as this module's docstring has it.

    Args:
        network: `folded`, or of `simulated_int8`; with `mean` and `std`.
    """
    network = _with_onnx_modules(_padded(network)).eval()
    images = torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own making
        program: Any = torch.onnx.export(
            _FromPixels(network),
            (images,),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    return _stripped(program.model_proto)


def _padded(network: Any) -> Any:
    """A copy whose channels inside are padded with zeros to whole LANES, if it is in int8.

    ONNX Runtime's integer depthwise convolutions take twice as long for 36 channels as for 48, and
    its float ones pad by themselves. Other networks than NetCIFAR10_Tiny stay as they are.
    """
    network = copy.deepcopy(network)
    convs: list[Any] = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    if not (isinstance(network, NetCIFAR10_Tiny) and isinstance(convs[1], Int8Conv)):
        return network
    width = 3
    for conv in convs:
        (out, in_group), depthwise = conv.weight.shape[:2], conv.groups > 1
        wide = width if depthwise else out if conv is convs[-1] else -(-out // LANES) * LANES
        pads = 0 if depthwise else width - in_group, wide - out
        weight = F.pad(conv.weight.detach(), (0, 0, 0, 0, 0, pads[0], 0, pads[1]))
        bias = F.pad(conv.bias.detach(), (0, pads[1]))
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        conv.groups, width = wide if depthwise else 1, wide
    return network


def _with_onnx_modules(network: nn.Module) -> nn.Module:
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Int8Conv):
                setattr(parent, name, _OnnxConv(child))
            elif isinstance(child, Quantiser):
                setattr(parent, name, _OnnxQuantiser(child))
            elif isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size in (1, (1, 1)):
                setattr(parent, name, _Mean())
    return network


def _stripped(model: Any) -> Any:
    """Without the exporter's notes, which take a quarter of the file."""
    graph = model.graph
    del graph.value_info[:], model.metadata_props[:], graph.metadata_props[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    for node in graph.node:
        node.name = ""
    return model


def _labelled(
    model: Any, config: Mapping[str, Any], run: RunDirectory, accuracy: Mapping[str, Any]
) -> bytes:
    """The bytes of the file: the model with its metadata."""
    known = {
        "producer": "tinycifar",
        "run": run.path.name,
        "recipe": run.config()["recipe"]["name"],
        "dataset": config["dataset"],
        "licence": LICENCE,
        **{name: json.dumps(config[name]) for name in ("classes", "mean", "std")},
        "accuracy": json.dumps(accuracy),
    }
    model.producer_name, model.producer_version = "tinycifar", ""
    import_module("onnx.helper").set_model_props(model, known)
    return model.SerializeToString()


# ----------------------------------------------------------------------------------- measurement


def ort_session(model: Any) -> Any:
    """An onnxruntime.InferenceSession on one thread of the CPU.

    Args:
        model: a path, or an onnx.ModelProto.
    """
    ort = _needed()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    content = str(model) if isinstance(model, (str, Path)) else model.SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def answers(session: Any, images: np.ndarray) -> np.ndarray:
    """Probabilities of uint8 images (N, 32, 32, 3): float32 (N, classes)."""
    parts = np.split(images, range(250, len(images), 250))
    given = [session.run(None, {"images": part})[0] for part in parts]
    return np.concatenate(given)


def _require_equal(given: np.ndarray, expected: np.ndarray) -> None:
    """Refuse a float file that isn't torch's network."""
    off = float(np.abs(given - expected).max())
    if not off <= TOLERANCE:
        raise RunError(
            f"the exported network's probabilities differ from torch's by up to {off:.1e}: "
            "nothing was written"
        )


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int, repeat: int) -> dict[str, float]:
    """Seconds a call: medians over rounds, in each of which all take their turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):  # the first is a warm-up
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(repeat):
                call()
            seconds[name].append((time.perf_counter() - started) / repeat)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def in_turns_by_batch(
    sessions: Mapping[str, Any], images: np.ndarray
) -> dict[str, dict[int, float]]:
    """Microseconds an image of each session, by the sizes in BATCHES."""
    times: dict[str, dict[int, float]] = {name: {} for name in sessions}
    for size in BATCHES:
        batch = {"images": np.resize(images, (size, *images.shape[1:]))}
        calls = {name: partial(s.run, None, batch) for name, s in sessions.items()}
        for name, seconds in in_turns(calls, rounds=10, repeat=max(1, 64 // size)).items():
            times[name][size] = 1e6 * seconds / size
    return times
