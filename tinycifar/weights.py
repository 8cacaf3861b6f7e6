"""Trained networks: loaded from a run, and used on an image.

model = load_pretrained()
predict("cat.jpg", model, top=3)            # [('cat', 0.61), ('dog', 0.22), ...]
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tiny_cifar10_net import fuse
from tinycifar.checks import check_whole
from tinycifar.evaluation import eval_mode
from tinycifar.images import read_image
from tinycifar.inference import Network, OnnxNetwork, check_pixels, likeliest
from tinycifar.networks import make_network, source_sha256
from tinycifar.paths import DEFAULT
from tinycifar.run_directory import RunDirectory, find_run, read_tensors


def load_pretrained(run: str | Path = DEFAULT) -> Any:
    """The network of a run, in eval mode, on the CPU, with its `classes`, `mean` and `std`.

    Args:
        run: what `find_run` takes: the name of a preset or of a published run, or the path of any
            run directory.

    Returns:
        a `NetCIFAR10_Tiny`, or the network that the run's recipe names.

    Raises:
        FileNotFoundError: no such run.
        ValueError: its weights or its config.json can't be used, or the weights aren't those
            whose checksum its metrics.json holds.
    """
    return load_network(RunDirectory(find_run(run)))


def load_network(run: RunDirectory) -> Any:
    """The same for a run directory; see `load_pretrained`."""
    config = run.config()
    # Ours is built on "meta": nothing is drawn from a random stream that a training may use.
    # A network of one's own may hold tensors that aren't in the file, so it is really built.
    own = "class" in config["model"]
    try:
        with torch.random.fork_rng([]) if own else torch.device("meta"):
            model: Any = make_network(len(config["classes"]), config["model"])
    except (AttributeError, TypeError, ValueError) as error:
        if own:
            raise
        raise ValueError(
            f"{run.path / 'config.json'} is not the config.json of a run: {error!r}"
        ) from error
    if own and source_sha256(config["model"]["class"]) != config.get("network_sha256"):
        warnings.warn(
            f"the file of {config['model']['class']} has changed since {run.path} was trained: "
            "its weights may mean something else now",
            stacklevel=3,
        )
    model.classes = tuple(config["classes"])
    model.mean, model.std = tuple(config["mean"]), tuple(config["std"])
    run.verify_weights()
    model = model if own else model.to_empty(device="cpu")
    return load_weights(run.path / "best.pt", model).eval()


def load_weights(path: str | Path, model: nn.Module) -> nn.Module:
    """Load a plain state_dict file into `model`; anything but tensors in it is refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file isn't a state_dict of tensors, or doesn't fit the model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}: train a run first, or name another")
    try:
        state = read_tensors(path)
    except ValueError as error:
        raise ValueError(
            f"{path} is refused: it is damaged, or holds more than tensors; a weights file is what "
            "torch.save(state_dict) writes: get it again, or ask its author for one"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{path} is refused: a weights file must be one dict of names to tensors (a state_dict)"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise ValueError(
            f"the weights in {path} do not fit {type(model).__name__}: {reason}"
        ) from error
    return model


def predict(
    image: str | Path | IO[bytes] | Image.Image | np.ndarray | Tensor,
    model: nn.Module | OnnxNetwork | None = None,
    top: int = 5,
) -> list[tuple[str, float]]:
    """The `top` likeliest classes of one image, with their probabilities, likeliest first.

    Args:
        image: a path, an open file, a PIL image, or uint8 pixels as an array or tensor of (H, W),
            (H, W, 1), (H, W, 3) in RGB or (H, W, 4) in RGBA; OpenCV's are BGR: give
            `image[..., ::-1]`. Any size: the shorter side is scaled to 32 and the centre cropped.
            What is transparent is composed on white; see `images.read_image`.
        model: as `load_pretrained` gives it, or fused, or as `load_onnx` does; None loads the
            published one.
        top: how many classes to return; all of them if there are fewer.

    Raises:
        FileNotFoundError: no such image.
        ValueError: the image can't be read, is too large, or has a wrong shape or type; or the
            model carries no `classes`, `mean` and `std`.
    """
    check_whole("top", top, 1)
    rgb = read_image(image.detach().cpu().numpy() if isinstance(image, Tensor) else image)
    if isinstance(model, OnnxNetwork):
        network: Network = model
    else:
        network = TorchNetwork(fuse(load_pretrained()) if model is None else model)
    return likeliest(network(rgb[None])[0], network.classes, top)


class TorchNetwork:
    """A network of torch, called as `inference.classify` calls it: on arrays.

    Args:
        model: as for `predict`.

    Raises:
        ValueError: the model carries no `classes`, `mean` and `std`.
    """

    def __init__(self, model: Any) -> None:
        if not all(getattr(model, name, None) for name in ("classes", "mean", "std")):
            raise ValueError(
                "this network doesn't know its classes, mean and std: get one from "
                "load_pretrained, or set the three attributes"
            )
        self.model = model
        self.classes: tuple[str, ...] = tuple(model.classes)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Probabilities, float32 (N, classes), of RGB images, uint8 (N, 32, 32, 3).

        Raises:
            ValueError: the images are of another shape or type.
        """
        check_pixels(images)
        first = next(self.model.parameters())
        pixels = torch.from_numpy(images).to(first.device, first.dtype) / 255
        mean, std = pixels.new_tensor(self.model.mean), pixels.new_tensor(self.model.std)
        with torch.no_grad(), eval_mode(self.model):
            log_probabilities = self.model(((pixels - mean) / std).permute(0, 3, 1, 2))
        return log_probabilities.exp().float().cpu().numpy()
