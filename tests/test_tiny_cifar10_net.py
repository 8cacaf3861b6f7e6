"""The network: what design and the reference say of it, counted and measured independently."""

import copy
import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import tiny_cifar10_net
from tiny_cifar10_net import (
    DepthwiseConv,
    NetCIFAR10_Tiny,
    fuse,
    layer_costs,
    load_pretrained,
    load_weights,
    predict,
    receptive_field,
)

CLASSES = tuple("abcdefghij")


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = NetCIFAR10_Tiny().eval()
    net.classes, net.mean, net.std = CLASSES, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    return net


@pytest.fixture
def run_dir(tmp_path, model):
    config = {"classes": CLASSES, "mean": model.mean, "std": model.std, "model": {"width": 1.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "best.pt")
    return tmp_path


# --------------------------------------------------------------------------------- architecture


def test_parameters_and_multiply_adds_are_the_published_ones(model):
    rows = layer_costs(model)
    assert sum(p.numel() for p in model.parameters()) == 36_170
    assert sum(row.params for row in rows) == 36_170
    assert sum(row.macs for row in rows) == 17_330_816


def test_multiply_adds_agree_with_torchs_own_counter(model):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() == 2 * sum(row.macs for row in layer_costs(model))


def test_state_dict_names_are_the_references():
    keys = [k for k in NetCIFAR10_Tiny().state_dict() if k.endswith(("weight", "head.bias"))]
    plain = [f"c1.{i}.{j}.weight" for i in (0, 1) for j in (0, 1)]
    separable = [
        f"{stage}.{i}.{part}.weight"
        for stage, count in (("c2", 2), ("c3", 2), ("c4", 5))
        for i in range(count)
        for part in ("dw", "bn_dw", "pw", "bn_pw")
    ]
    assert keys == [*plain, *separable, "head.weight", "head.bias"]


def test_stage_shapes(model):
    shapes, x = [], torch.zeros(2, 3, 32, 32)
    for stage in (model.c1, model.c2, model.c3, model.c4, model.gap):
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(24, 32, 32), (36, 32, 32), (48, 32, 32), (64, 16, 16), (64, 1, 1)]


@pytest.mark.parametrize("dilation", [2, 3])
@pytest.mark.parametrize("size", [(16, 16), (15, 17), (5, 32), (1, 2)])
def test_the_fast_dilated_convolution_is_torchs_own(dilation, size):
    """Same sums by another way: outputs and both gradients, also where nothing divides evenly."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, *size).to(memory_format=torch.channels_last).requires_grad_()
    ours = DepthwiseConv(6, dilation=dilation)
    plain = torch.nn.functional.conv2d(
        x, ours.weight, padding=dilation, dilation=dilation, groups=6
    )
    weights = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * weights).sum(), (x, ours.weight))
    got = torch.autograd.grad((ours(x) * weights).sum(), (x, ours.weight))
    torch.testing.assert_close(ours(x), plain)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain)


@pytest.mark.parametrize("size", [(16, 16), (17, 15)])
def test_a_strided_convolution_in_bfloat16(size):
    """Against float32 on the same rounded numbers."""
    torch.manual_seed(0)
    ours = DepthwiseConv(6, stride=2).bfloat16()
    x = torch.randn(2, 6, *size).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    exact, images = copy.deepcopy(ours).float(), x.detach().float().requires_grad_()
    got, expected = ours(x), exact(images)
    assert "Strided" in got.grad_fn.name(), "torch's own gradient is right as well, and slow"
    assert "Strided" not in expected.grad_fn.name()
    weights = torch.randn_like(expected).bfloat16()
    got.backward(weights)
    expected.backward(weights.float())
    for mine, theirs in (
        (got, expected),
        (x.grad, images.grad),
        (ours.weight.grad, exact.weight.grad),
    ):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), theirs, rtol=0.01, atol=0.03)
    # All rows of the Jacobian at once, as torch.func takes them.
    rows = torch.func.jacrev(ours)(x[:1, :, :4, :4].detach())
    assert rows.shape == (1, 6, 2, 2, 1, 6, 4, 4)


def test_gradients_image_by_image_by_torch_func():
    torch.manual_seed(0)
    net, images = NetCIFAR10_Tiny().eval(), torch.randn(3, 3, 32, 32)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def loss(weights, image):
        return -torch.func.functional_call(net, (weights, buffers), (image[None],))[0, 7]

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, images)
    net.zero_grad()
    (-net(images)[:, 7]).sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(each[name].sum(dim=0), parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_dilated_convolution_under_autocast():
    """Mixed precision takes torch's own path: the other one is for a single dtype."""
    conv, x = DepthwiseConv(8, dilation=2), torch.randn(2, 8, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and conv.weight.grad.dtype == torch.float32


def test_outputs_are_log_probabilities(model):
    out = model(torch.randn(4, 3, 32, 32))
    assert out.shape == (4, 10)
    torch.testing.assert_close(out.exp().sum(dim=1), torch.ones(4))


def test_receptive_field_ends_at_45(model):
    fields = [row.field for row in receptive_field(model) if row.kernel == 3]
    assert fields == [3, 5, 7, 11, 13, 15, 17, 25, 37, 41, 45]
    assert receptive_field(model)[-1].field == 45


@pytest.mark.parametrize(("options", "expected"), [({}, 45), ({"dilated": False}, 31)])
def test_receptive_field_as_the_gradient_sees_it(options, expected):
    """All weights positive: no path cancels, so the gradient is non-zero just where it may be."""
    net = NetCIFAR10_Tiny(**options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.1)
    x = torch.rand(1, 3, 96, 96, requires_grad=True)
    features = net.c4(net.c3(net.c2(net.c1(x))))
    features[0, :, 24, 24].sum().backward()
    seen = x.grad.abs().sum(dim=(0, 1)) > 0
    assert seen.any(dim=0).sum() == seen.any(dim=1).sum() == expected
    assert receptive_field(net)[-1].field == expected


def test_options_change_what_they_say():
    plain = sum(p.numel() for p in NetCIFAR10_Tiny(dilated=False).parameters())
    assert plain == 36_170, "dilation costs no parameters"
    standard = NetCIFAR10_Tiny(separable=False)
    assert standard.c2[0][0].weight.shape == (36, 24, 3, 3)
    wide = NetCIFAR10_Tiny(width=2.0)
    assert wide.c4[0].pw.out_channels == 128
    assert NetCIFAR10_Tiny(num_classes=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_looking_at_a_network_leaves_it_alone(model):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layer_costs(model), receptive_field(model)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: NetCIFAR10_Tiny(width=0), ValueError, "width must be"),
        (lambda: NetCIFAR10_Tiny(width="1"), ValueError, "width must be"),
        (lambda: NetCIFAR10_Tiny(num_classes=0), ValueError, "num_classes must be"),
        (lambda: NetCIFAR10_Tiny()(torch.zeros(2, 1, 32, 32)), ValueError, r"\(2, 1, 32, 32\)"),
        (lambda: NetCIFAR10_Tiny()(torch.zeros(3, 32, 32)), ValueError, r"\(3, 32, 32\)"),
        (
            lambda: NetCIFAR10_Tiny()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
            TypeError,
            "uint8",
        ),
    ],
)
def test_wrong_options_and_inputs_are_named(make, error, says):
    with pytest.raises(error, match=says):
        make()


# -------------------------------------------------------------------------------------- weights


def test_a_run_directory_loads(run_dir, model):
    loaded = load_pretrained(run_dir)
    assert not loaded.training
    assert (loaded.classes, loaded.mean, loaded.std) == (CLASSES, model.mean, model.std)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


def test_an_unknown_run_is_named():
    with pytest.raises(FileNotFoundError, match="no run at 'nowhere'"):
        load_pretrained("nowhere")


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
        load_weights(tmp_path / "bad.pt", NetCIFAR10_Tiny())
    assert "must never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "raw",
    [b"", b"not a weights file", pickle.dumps(Malicious(), protocol=2)],
    ids=["empty", "text", "a pickle with code"],
)
def test_files_of_another_kind_are_refused(tmp_path, raw, capsys):
    (tmp_path / "bad.pt").write_bytes(raw)
    with pytest.raises(ValueError, match="is refused"):
        load_weights(tmp_path / "bad.pt", NetCIFAR10_Tiny())
    assert "must never run" not in capsys.readouterr().out


def test_damaged_weights_are_refused_by_name(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "best.pt")
    whole = (tmp_path / "best.pt").read_bytes()
    for share in (0.02, 0.3, 0.6, 0.9, 0.99):
        (tmp_path / "best.pt").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"best\.pt is refused: it is damaged"):
            load_weights(tmp_path / "best.pt", NetCIFAR10_Tiny())


def test_weights_of_another_network_are_refused(tmp_path, model):
    torch.save(NetCIFAR10_Tiny(width=2.0).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(ValueError, match="do not fit"):
        load_weights(tmp_path / "wide.pt", model)


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


def test_predict_takes_a_path_a_image_an_array_and_a_tensor_alike(model, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a image.png")
    expected = predict(pixels, model)
    for image in (
        tmp_path / "a image.png",
        str(tmp_path / "a image.png"),
        Image.fromarray(pixels),
        torch.from_numpy(pixels),
    ):
        assert predict(image, model) == expected


@pytest.mark.parametrize("shape", [(7, 5, 3), (400, 300, 3), (20, 90), (64, 64, 1), (33, 33, 4)])
def test_predict_takes_any_size_and_kind(model, shape):
    answer = predict(np.full(shape, 200, dtype=np.uint8), model, top=3)
    assert len(answer) == 3
    assert 0 < sum(p for _, p in answer) <= 1 + 1e-6


def test_predict_leaves_the_network_in_its_mode(model):
    model.train()
    before = model.state_dict()["c1.0.1.running_mean"].clone()
    predict(np.zeros((32, 32, 3), dtype=np.uint8), model)
    assert model.training
    assert torch.equal(before, model.state_dict()["c1.0.1.running_mean"])


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((3, 32, 32), dtype=np.uint8), r"uint8 of shape \(3, 32, 32\)"),
        (np.zeros((32, 32, 3)), r"float64 of shape \(32, 32, 3\)"),
        (torch.zeros(1, 3, 32, 32), r"float32 of shape \(1, 3, 32, 32\)"),
        (np.zeros((0, 32, 3), dtype=np.uint8), r"\(0, 32, 3\)"),
        (42, "got int"),
    ],
)
def test_predict_says_what_came_and_what_it_takes(model, image, says):
    with pytest.raises(ValueError, match=says):
        predict(image, model)


def test_unreadable_images_are_named(model, tmp_path, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(ValueError, match=r"broken\.png can't be read as a image"):
        predict(tmp_path / "broken.png", model)
    Image.effect_noise((300, 300), 90).save(tmp_path / "torn.png")  # in several chunks
    start, first, rest = (tmp_path / "torn.png").read_bytes().split(b"IDAT", 2)
    (tmp_path / "torn.png").write_bytes(start + b"IDAT" + first + b"I\0AT" + rest)
    with pytest.raises(ValueError, match=r"torn\.png can't be read as a image"):
        predict(tmp_path / "torn.png", model)
    with pytest.raises(FileNotFoundError, match="no image at"):
        predict(tmp_path / "absent.png", model)
    Image.new("I;16", (40, 40), 30_000).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="8 bits a channel; got mode 'I;16'"):
        predict(tmp_path / "deep.png", model)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (40, 40)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"huge\.png can't be read"):
        predict(tmp_path / "huge.png", model)


def test_predict_needs_to_know_how_inputs_were_normalised():
    with pytest.raises(ValueError, match="doesn't know its classes"):
        predict(np.zeros((32, 32, 3), dtype=np.uint8), NetCIFAR10_Tiny())


def test_the_command_line_prints_classes_and_errors(run_dir, capsys):
    Image.new("RGB", (50, 40), "red").save(run_dir / "red.png")
    tiny_cifar10_net.main([str(run_dir / "red.png"), "--run", str(run_dir), "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].split()[1] in CLASSES
    with pytest.raises(SystemExit, match="error: no image at"):
        tiny_cifar10_net.main(["absent.png", "--run", str(run_dir)])


def test_weights_that_were_changed_since_the_run_are_refused(run_dir):
    digest = hashlib.sha256((run_dir / "best.pt").read_bytes()).hexdigest()
    (run_dir / "metrics.json").write_text(json.dumps({"weights_sha256": digest}))
    load_pretrained(run_dir)
    (run_dir / "metrics.json").write_text(json.dumps({"weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"best\.pt is refused: its checksum"):
        load_pretrained(run_dir)
    (run_dir / "best.pt").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"best\.pt is refused: its checksum"):
        load_pretrained(run_dir)


# ------------------------------------------------------------------------------------------ fuse


def trained(**options):
    """A network whose BatchNorms have seen something, in eval mode."""
    torch.manual_seed(0)
    net = NetCIFAR10_Tiny(**options)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    with torch.no_grad():
        for _ in range(5):
            net(torch.randn(32, 3, 32, 32))
    return net.eval()


@pytest.mark.parametrize("options", [{}, {"separable": False}, {"dilated": False, "width": 0.5}])
def test_fused_gives_the_same_outputs(options):
    net, x = trained(**options), torch.randn(16, 3, 32, 32)
    before = net(x)
    fused = fuse(net)
    torch.testing.assert_close(fused(x), before, rtol=0, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), before, rtol=0, atol=1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules()), "a copy is fused"
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch's own loader
@pytest.mark.parametrize("prepare", [fuse, lambda net: net], ids=["fused", "plain"])
def test_a_network_can_be_exported_for_any_number_of_images(prepare, tmp_path):
    net = prepare(trained())
    pair, batch = torch.randn(2, 3, 32, 32), {0: torch.export.Dim("n")}
    program = torch.export.export(net, (pair,), dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "net.pt2")
    exported, x = torch.export.load(tmp_path / "net.pt2").module(), torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(exported(x), net(x), rtol=0, atol=1e-6)


def test_fuse_refuses_training_mode():
    with pytest.raises(ValueError, match="eval mode"):
        fuse(NetCIFAR10_Tiny().train())


def test_fuse_refuses_what_it_cant_fold():
    with pytest.raises(TypeError, match="got FusedNet"):
        fuse(fuse(trained()))


def test_a_fused_network_checks_its_input_as_the_plain_one():
    fused = fuse(trained())
    with pytest.raises(ValueError, match=r"takes a batch of colour images .*got \(3, 32, 32\)"):
        fused(torch.zeros(3, 32, 32))


@pytest.mark.parametrize("count", [layer_costs, receptive_field])
def test_layers_that_cant_be_seen_are_not_left_out_in_silence(count):
    with pytest.raises(ValueError, match=r"FusedNet runs convs\.0 without .* before fuse"):
        count(fuse(trained()))


def test_a_fused_network_keeps_what_predict_needs():
    net = trained()
    net.classes, net.mean, net.std = tuple("abcdefghij"), (0.5,) * 3, (0.25,) * 3
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    plain, fused = dict(predict(image, net)), dict(predict(image, fuse(net)))
    assert fused == pytest.approx(plain, abs=1e-4)
