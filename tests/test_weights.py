"""weights.py: what a run's weights are loaded from and refused for, and predictions of images."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tiny_cifar10_net import NetCIFAR10_Tiny, fuse
from tinycifar.networks import BlueprintNet
from tinycifar.paths import RESULTS
from tinycifar.recipes import get_recipe
from tinycifar.weights import load_pretrained, load_weights, predict

CLASSES = tuple("abcdefghij")


def small_network():
    return NetCIFAR10_Tiny(width=0.1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = small_network()
    # Statistics of its own, without which its answer to every image is the same.
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net(torch.randn(8, 3, 32, 32))
    net.eval()
    net.classes, net.mean, net.std = CLASSES, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    return net


@pytest.fixture
def write_run(tmp_path, model):
    """Writes a run directory that holds `model`, with whatever is to be different."""

    def write(net=model, **changes):
        config = {
            "recipe": {"name": "by hand"},
            "seed": 0,
            "protocol": "val",
            "dataset": "cifar10",
            "limit": None,
            "data_sha256": "0" * 64,
            "split": {},
            "classes": CLASSES,
            "mean": model.mean,
            "std": model.std,
            "model": {"width": 0.1},
        } | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        torch.save(net.state_dict(), tmp_path / "best.pt")
        return tmp_path

    return write


# -------------------------------------------------------------------------------------- weights


def test_a_run_directory_loads(write_run, model):
    loaded = load_pretrained(write_run())
    assert not loaded.training
    assert (loaded.classes, loaded.mean, loaded.std) == (CLASSES, model.mean, model.std)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), model(x))


def test_the_network_is_the_one_that_the_run_trained(write_run):
    recipe = get_recipe("quick", network="4 8s2", skips="all", activation="silu")
    net = BlueprintNet(**recipe.model_options).eval()
    loaded = load_pretrained(write_run(net, model=recipe.model_options))
    x = torch.randn(2, 3, 16, 16)
    assert isinstance(loaded, BlueprintNet) and torch.equal(loaded(x), net(x))


def test_an_int8_run_is_fused_too():
    net, x = load_pretrained("int8"), torch.randn(2, 3, 16, 16)
    fused = fuse(net)
    torch.testing.assert_close(fused(x), net(x), rtol=0, atol=1e-5)
    assert len(list(fused.parameters())) == len(list(net.parameters()))


def test_a_presets_name_loads_its_published_weights():
    published = torch.load(RESULTS / "tuned-seed0" / "best.pt", weights_only=True)
    for loaded in map(load_pretrained, ("tuned", "tuned-seed0")):
        assert all(torch.equal(v, published[k]) for k, v in loaded.state_dict().items())
    config = json.loads((RESULTS / "tuned-seed0" / "config.json").read_text())
    assert (list(loaded.classes), list(loaded.mean)) == (config["classes"], config["mean"])


def test_loading_draws_no_random_numbers():
    """Of which a training in another thread may be making its initial weights."""
    before = torch.get_rng_state()
    load_pretrained("quick")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "changes", [{"model": {"depth": 3}}, {"model": {"layout": 5}}, {"mean": None}, {"model": 3}]
)
def test_a_config_that_describes_no_network_is_named(write_run, changes):
    says = r"config\.json (is not the config\.json of a run|was not written by train)"
    with pytest.raises(ValueError, match=says):
        load_pretrained(write_run(**changes))


def test_a_run_without_weights_yet_is_named(write_run):
    folder = write_run()
    (folder / "best.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights file at .*best\.pt: train a run"):
        load_pretrained(folder)


class Malicious:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize(
    "content",
    [Malicious(), {"a": Malicious()}, {"c1.0.0.weight": 3}, [1, 2], torch.zeros(3)],
    ids=["code", "code inside", "a number inside", "a list", "a bare tensor"],
)
def test_anything_but_tensors_is_refused(tmp_path, content, capsys):
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="is refused"):
        load_weights(tmp_path / "bad.pt", small_network())
    assert "must never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "raw",
    [b"", b"not a weights file", pickle.dumps(Malicious(), protocol=2)],
    ids=["empty", "text", "a pickle with code"],
)
def test_files_of_another_kind_are_refused(tmp_path, raw, capsys):
    (tmp_path / "bad.pt").write_bytes(raw)
    with pytest.raises(ValueError, match="is refused"):
        load_weights(tmp_path / "bad.pt", small_network())
    assert "must never run" not in capsys.readouterr().out


def test_damaged_weights_are_refused_by_name(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "best.pt")
    whole = (tmp_path / "best.pt").read_bytes()
    for share in (0.02, 0.3, 0.6, 0.9, 0.99):
        (tmp_path / "best.pt").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"best\.pt is refused: it is damaged"):
            load_weights(tmp_path / "best.pt", small_network())


def test_weights_of_another_network_are_refused(tmp_path, model):
    torch.save(NetCIFAR10_Tiny(width=2.0).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(ValueError, match="do not fit"):
        load_weights(tmp_path / "wide.pt", model)
    state = model.state_dict()
    for changed in ({"head.bias": state.pop("head.bias")} | state | {"more": torch.ones(1)}, state):
        torch.save(changed, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=r"do not fit .*(more|head\.bias)"):
            load_weights(tmp_path / "other.pt", small_network())


def test_weights_that_were_changed_since_the_run_are_refused(write_run):
    run_dir = write_run()
    metrics = json.loads((RESULTS / "quick" / "metrics.json").read_text())
    digest = hashlib.sha256((run_dir / "best.pt").read_bytes()).hexdigest()
    (run_dir / "metrics.json").write_text(json.dumps(metrics | {"weights_sha256": digest}))
    load_pretrained(run_dir)
    (run_dir / "metrics.json").write_text(json.dumps(metrics | {"weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"best\.pt is refused: its checksum"):
        load_pretrained(run_dir)
    (run_dir / "best.pt").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"best\.pt is refused: its checksum"):
        load_pretrained(run_dir)


# ------------------------------------------------------------------------------------ prediction


def by_hand(model, pixels):
    x = (torch.tensor(pixels).permute(2, 0, 1)[None] / 255.0).float()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.mean, model.std))
    with torch.no_grad():
        return torch.softmax(model((x - mean) / std)[0], dim=0)


def test_predict_is_the_network_on_the_normalised_image(model):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = by_hand(model, pixels)
    answer = predict(pixels, model, top=10)
    assert [p for _, p in answer] == sorted((p for _, p in answer), reverse=True)
    for name, p in answer:
        assert p == pytest.approx(expected[CLASSES.index(name)].item(), abs=1e-5)
    on_its_side = by_hand(model, pixels.swapaxes(0, 1))
    assert (on_its_side - expected).abs().max() > 1e-4, "else there was nothing to compare"


def test_predict_takes_a_path_an_image_an_array_and_a_tensor_alike(model, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "an image.png")
    expected = predict(pixels, model)
    for image in (
        tmp_path / "an image.png",
        str(tmp_path / "an image.png"),
        Image.fromarray(pixels),
        torch.from_numpy(pixels),
    ):
        assert predict(image, model) == expected


def test_predict_leaves_the_network_in_its_mode(model):
    model.train()
    before = model.state_dict()["c1.0.1.running_mean"].clone()
    predict(np.zeros((32, 32, 3), dtype=np.uint8), model)
    assert model.training
    assert torch.equal(before, model.state_dict()["c1.0.1.running_mean"])


def test_predict_refuses_what_is_no_image(model, tmp_path):
    with pytest.raises(ValueError, match=r"float32 of shape \(1, 3, 32, 32\)"):
        predict(torch.zeros(1, 3, 32, 32), model)
    with pytest.raises(FileNotFoundError, match="no image at"):
        predict(tmp_path / "absent.png", model)
    with pytest.raises(ValueError, match="top must be a whole number"):
        predict(np.zeros((32, 32, 3), dtype=np.uint8), model, top=0)


def test_predict_needs_to_know_how_inputs_were_normalised():
    with pytest.raises(ValueError, match="doesn't know its classes"):
        predict(np.zeros((32, 32, 3), dtype=np.uint8), small_network())


def test_a_fused_network_keeps_what_predict_needs(model):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    plain, fused = dict(predict(image, model)), dict(predict(image, fuse(model)))
    assert fused == pytest.approx(plain, abs=1e-4)
