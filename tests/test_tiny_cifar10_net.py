"""The network: what the reference says of it, and that torch's own tools can take it apart."""

import ast
import copy
import importlib.util
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import jvp, vjp
from torchvision.models.feature_extraction import create_feature_extractor

import tiny_cifar10_net
from tiny_cifar10_net import NetCIFAR10_Tiny, folded, fuse
from tinycifar.paths import RESULTS
from tinycifar.weights import load_pretrained

FILE = Path(tiny_cifar10_net.__file__)

either = pytest.mark.parametrize("prepare", [lambda net: net, fuse], ids=["plain", "fused"])


def trained(**options):
    """A network whose BatchNorms have seen something, in eval mode."""
    torch.manual_seed(0)
    net = NetCIFAR10_Tiny(**{"width": 0.25} | options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = None  # the mean of all that it sees
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(16, 3, 16, 16))
    return net.eval()


# ----------------------------------------------------------------------------------- the file


def test_the_file_can_be_copied_away_alone(tmp_path):
    imported = set()
    for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or ".").split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch"}

    copied = tmp_path / "copied_net.py"
    copied.write_bytes(FILE.read_bytes())
    spec = importlib.util.spec_from_file_location("copied_net", copied)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net, copy = trained(), module.NetCIFAR10_Tiny(width=0.25).eval()
    copy.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(copy(x), net(x))
    torch.testing.assert_close(module.fuse(copy)(x), net(x), rtol=0, atol=1e-5)


def test_the_file_is_read_at_a_glance():
    assert len(FILE.read_text(encoding="utf-8").splitlines()) <= 260


# ------------------------------------------------------------------------------- architecture


def test_parameters_are_the_published_number():
    assert sum(p.numel() for p in NetCIFAR10_Tiny().parameters()) == 36_170
    plain = sum(p.numel() for p in NetCIFAR10_Tiny(dilated=False).parameters())
    assert plain == 36_170, "dilation costs no parameters"


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


@pytest.mark.parametrize("run", ["baseline-val", "quick", "tuned-seed0"])
def test_published_weights_have_the_same_names_in_the_same_order(run):
    published = torch.load(RESULTS / run / "best.pt", weights_only=True)
    state = NetCIFAR10_Tiny().state_dict()
    assert list(published) == list(state)
    assert [v.shape for v in published.values()] == [v.shape for v in state.values()]


def test_stage_shapes():
    net, x, shapes = NetCIFAR10_Tiny().eval(), torch.zeros(2, 3, 32, 32), []
    for stage in (net.c1, net.c2, net.c3, net.c4, net.gap):
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(24, 32, 32), (36, 32, 32), (48, 32, 32), (64, 16, 16), (64, 1, 1)]


def test_dilations_are_the_references():
    dilations = {
        name: m.dilation[0]
        for name, m in NetCIFAR10_Tiny().named_modules()
        if isinstance(m, nn.Conv2d) and m.dilation != (1, 1)
    }
    assert dilations == {"c2.1.dw": 2, "c4.1.dw": 2, "c4.2.dw": 3}


@either
@pytest.mark.parametrize("size", [(32, 32), (17, 40), (1, 1)])
def test_outputs_are_log_probabilities_of_any_size(prepare, size):
    out = prepare(trained())(torch.randn(4, 3, *size))
    assert out.shape == (4, 10)
    torch.testing.assert_close(out.exp().sum(dim=1), torch.ones(4))


def test_options_change_what_they_say():
    standard = NetCIFAR10_Tiny(separable=False)
    assert standard.c2[0][0].weight.shape == (36, 24, 3, 3)
    wide = NetCIFAR10_Tiny(width=2.0)
    assert wide.c4[0].pw.out_channels == 128
    net = NetCIFAR10_Tiny(num_classes=7, dilated=False, width=0.1).eval()
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    assert {m.dilation for m in net.modules() if isinstance(m, nn.Conv2d)} == {(1, 1)}


@pytest.mark.parametrize("width", [0, -1, 17, "1", True, float("nan")])
def test_a_width_out_of_range_is_named(width):
    with pytest.raises(ValueError, match=r"width must be a number above 0 and up to 16; got"):
        NetCIFAR10_Tiny(width=width)


@pytest.mark.parametrize("num_classes", [0, 2.0, "10", True])
def test_a_number_of_classes_out_of_range_is_named(num_classes):
    with pytest.raises(ValueError, match=r"num_classes must be a whole number of 1 or more; got"):
        NetCIFAR10_Tiny(num_classes=num_classes)


@either
@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (3, 32, 32), (2, 32, 32, 3)])
def test_images_of_another_shape_are_refused(prepare, shape):
    with pytest.raises(ValueError) as error:
        prepare(trained())(torch.zeros(shape))
    assert str(error.value) == (
        f"the network takes a batch of colour images of shape (N, 3, H, W); got {shape}"
    )


@either
def test_images_that_arent_normalised_are_refused(prepare):
    with pytest.raises(TypeError, match=r"normalised floating-point images; got torch\.uint8"):
        prepare(trained())(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


# --------------------------------------------------------------------------------------- fuse


@pytest.mark.parametrize("options", [{"width": 1.0}, {"separable": False}, {"dilated": False}])
def test_fused_gives_the_same_outputs(options):
    net, x = trained(**options), torch.randn(8, 3, 32, 32)
    before = net(x)
    fused = fuse(net)
    torch.testing.assert_close(fused(x), before, rtol=0, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), before, rtol=0, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules()), "a copy is fused"
    assert not {id(p) for p in fused.parameters()} & {id(p) for p in net.parameters()}
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)


def test_fused_knows_what_the_network_knows():
    net = trained()
    net.classes, net.mean, net.std = tuple("abcdefghij"), (0.5,) * 3, (0.25,) * 3
    fused = fuse(net)
    assert (fused.classes, fused.mean, fused.std) == (net.classes, net.mean, net.std)
    assert not fused.training


def test_fuse_refuses_what_it_cant_fold():
    with pytest.raises(ValueError, match="folded in eval mode only: call model"):
        fuse(NetCIFAR10_Tiny(width=0.1).train())


class Shuffled(nn.Module):
    """Registered in another order than it runs: norms before, beside and shared with others."""

    classes = mean = std = None

    def __init__(self):
        super().__init__()
        self.first, self.second, self.shared, self.split = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.before, self.after, self.once, self.again = (nn.BatchNorm2d(3) for _ in range(4))
        self.beside = nn.BatchNorm2d(3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean)

    def forward(self, x):
        x = self.second(self.before(x)).relu()
        x = self.split(x + self.after(self.first(x)))
        x = x + self.beside(x)
        return self.again(self.shared(self.once(self.shared(x)))).mean((2, 3))


class Named(nn.Module):
    """Its tensors' names differ in dots and underscores alone; a layer is called by keyword."""

    classes = mean = std = None

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
        self.layer_1 = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.layer_1(input=self.layer(x)) + self.layer_1(x)


def test_fuse_keeps_tensors_apart():
    net, x = Named().eval(), torch.randn(2, 3, 8, 8)
    fused = fuse(net)
    torch.testing.assert_close(fused(x), net(x), rtol=0, atol=1e-5)
    assert len(list(fused.parameters())) == 6, "what is used twice is there once"


class Particular(nn.Module):
    """A convolution whose weight is computed, and a BatchNorm without running statistics."""

    def __init__(self):
        super().__init__()
        self.computed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        self.bn = nn.BatchNorm2d(4)
        self.conv, self.batch = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        return self.batch(self.conv(self.bn(self.computed(x))))


def test_folding_leaves_what_it_cant_fold():
    net, x = Particular().eval(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(folded(net)(x), net(x), rtol=0, atol=1e-5)


def test_fuse_folds_by_what_the_graph_says():
    net, x = Shuffled().to(memory_format=torch.channels_last).eval(), torch.randn(2, 3, 8, 8)
    kept = {name for name, m in folded(net).named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert kept == {"before", "beside", "once", "again"}
    torch.testing.assert_close(fuse(net)(x), net(x), rtol=0, atol=1e-5)


def test_a_fused_network_is_laid_out_as_convolutions_are_fast():
    """Channels last; and it can be copied and sent to another process."""
    net, x = trained(), torch.randn(2, 3, 16, 16)
    fused = fuse(net)
    (standard,) = (p for name, p in fused.function.named_parameters() if "c1_1_0_weight" in name)
    assert standard.is_contiguous(memory_format=torch.channels_last)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fuse(fused)):
        assert torch.equal(again(x), fused(x)) and again.classes == net.classes


def test_folding_keeps_the_modules():
    net, x = trained(), torch.randn(2, 3, 16, 16)
    without = folded(net)
    assert type(without) is NetCIFAR10_Tiny and without.c2[0].dw.bias.requires_grad
    assert not any(isinstance(m, nn.BatchNorm2d) for m in without.modules())
    torch.testing.assert_close(without(x), net(x), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------- torch's tools


@either
def test_torch_fx_traces_it(prepare):
    net, x = prepare(trained()), torch.randn(3, 3, 20, 20)
    traced = torch.fx.symbolic_trace(net)
    assert torch.equal(traced(x), net(x))
    with pytest.raises(ValueError, match="takes a batch of colour images"):
        traced(torch.zeros(3, 32, 32))


def test_features_of_a_stage_are_extracted_by_torchvision():
    net, x, seen = load_pretrained(), torch.randn(2, 3, 32, 32), []
    extractor = create_feature_extractor(net, ["c3"])
    net.c3.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    with torch.no_grad():
        features = extractor(x)["c3"]
        net(x)
    assert features.shape == (2, 48, 32, 32)
    assert torch.equal(features, seen[-1])


@either
def test_forward_derivatives(prepare):
    """Against the backward ones, and a step each way along the tangent."""
    net = prepare(trained()).double()
    x, tangent = torch.randn(2, 2, 3, 12, 12, dtype=torch.double).unbind(0)
    out, forward = jvp(net, (x,), (tangent,))
    torch.testing.assert_close(out, net(x))
    weights = torch.randn_like(out)
    (backward,) = vjp(net, x)[1](weights)
    torch.testing.assert_close((weights * forward).sum(), (backward * tangent).sum())
    with torch.no_grad():
        difference = (net(x + 1e-7 * tangent) - net(x - 1e-7 * tangent)) / 2e-7
    torch.testing.assert_close(forward, difference, rtol=1e-4, atol=1e-5)
    assert forward.abs().min() > 1e-4, "else there was nothing to compare"


def test_gradients_image_by_image_by_torch_func():
    net, images = trained(), torch.randn(3, 3, 16, 16)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def loss(weights, image):
        return -torch.func.functional_call(net, (weights, buffers), (image[None],))[0, 7]

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, images)
    (-net(images)[:, 7]).sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(each[name].sum(dim=0), parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch's own loader
@either
def test_it_is_exported_for_any_number_of_images(prepare, tmp_path):
    net = prepare(trained())
    pair, batch = torch.randn(2, 3, 32, 32), {0: torch.export.Dim("n")}
    program = torch.export.export(net, (pair,), dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "net.pt2")
    exported = torch.export.load(tmp_path / "net.pt2").module()
    for n in (1, 5):
        x = torch.randn(n, 3, 32, 32)
        torch.testing.assert_close(exported(x), net(x), rtol=0, atol=1e-6)
