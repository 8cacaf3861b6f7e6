"""acceleration.py: the twin computes what the network does, by faster ways; compiled or not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import needs_compiler
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.func import jacrev

from tiny_cifar10_net import NetCIFAR10_Tiny
from tinycifar.acceleration import (
    CompiledNetwork,
    FastDepthwise,
    MixedPrecision,
    NormReLU,
    accelerated,
    is_depthwise,
    peak_memory,
)
from tinycifar.networks import BlueprintNet
from tinycifar.weights import load_pretrained


class Unusual(nn.Module):
    """What looks like the layers that have a faster way, and isn't quite."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.dw = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, dilation=2, groups=8, bias=False),
            nn.Conv2d(8, 16, 3, padding=2, dilation=2, groups=8, bias=False),
            nn.Conv2d(
                16, 16, 3, padding=2, dilation=2, groups=16, bias=False, padding_mode="circular"
            ),
            nn.Conv2d(16, 16, 3, padding=(2, 1), dilation=(2, 1), groups=16, bias=False),
        )
        self.bn, self.act = nn.BatchNorm2d(16), nn.ReLU()
        self.gap, self.head = nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 10, 1)

    def forward(self, x):
        x = self.dw(self.stem(x))
        return self.head(self.gap(self.act(x + self.bn(x)))).flatten(1).log_softmax(dim=1)


class Standardised(nn.Conv2d):
    """A convolution that computes something of its own."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((2, 3), keepdim=True)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


class Frozen(nn.Module):
    """Its BatchNorm stays in eval mode when it is trained, and its convolutions are subclasses."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.act = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
        options = {"padding": 2, "dilation": 2, "groups": 8, "bias": False}
        self.own = Standardised(8, 8, 3, **options)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, **options))
        self.gap, self.head = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 10, 1)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x):
        x = self.normed(self.own(self.act(self.bn(self.stem(x)))))
        return self.head(self.gap(x)).flatten(1).log_softmax(dim=1)


class Forked(nn.Module):
    """What its BatchNorm gives goes into a ReLU, and past it."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.act = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.gap, self.head = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 10, 1)

    def forward(self, x):
        x = self.bn(self.stem(x))
        return self.head(self.gap(self.act(x) + x)).flatten(1).log_softmax(dim=1)


NETWORKS = {
    "forked": Forked,
    "unusual": Unusual,
    "frozen": Frozen,
    "tiny": lambda: NetCIFAR10_Tiny(width=0.25),
    "standard convolutions": lambda: NetCIFAR10_Tiny(width=0.25, separable=False),
    "blueprint": lambda: BlueprintNet(layout="4 8s2 8d2"),
    "silu": lambda: BlueprintNet(layout="4 8s2 8d2", activation="silu"),
    "gated": lambda: BlueprintNet(layout="4 8s2 8d2", activation="glu"),
    "used twice": lambda: BlueprintNet(layout="4 8s2 8d2x2 8k5", attention="eca"),
}


def depthwise(channels, kernel=3, dilation=1, **options):
    padding = kernel // 2 * dilation
    options |= {"padding": padding, "dilation": dilation, "groups": channels}
    return nn.Conv2d(channels, channels, kernel, bias=False, **options)


def kinds(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


# ------------------------------------------------------------------------------------ its layers


@pytest.mark.parametrize(("dilation", "kernel"), [(2, 3), (3, 3), (2, 5), (3, 7)])
@pytest.mark.parametrize("size", [(16, 16), (15, 17), (5, 32), (1, 2)])
def test_a_dilated_layer_is_torchs_own(dilation, kernel, size):
    """Same sums by another way: outputs and both gradients, also where nothing divides evenly."""
    torch.manual_seed(0)
    conv = depthwise(6, kernel, dilation)
    x = torch.randn(2, 6, *size).to(memory_format=torch.channels_last).requires_grad_()
    layer = FastDepthwise(conv)
    assert layer.weight is conv.weight
    weights = torch.randn(2, 6, *size)
    expected = torch.autograd.grad((conv(x) * weights).sum(), (x, conv.weight))
    got = torch.autograd.grad((layer(x) * weights).sum(), (x, conv.weight))
    torch.testing.assert_close(layer(x), conv(x))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (1, 5), (2, 7)])
@pytest.mark.parametrize("size", [(16, 16), (17, 15)])
def test_a_layer_in_bfloat16(size, stride, kernel):
    """Against float32 on the same rounded numbers."""
    torch.manual_seed(0)
    conv = depthwise(6, kernel, stride=stride).bfloat16()
    layer = FastDepthwise(conv)
    exact = copy.deepcopy(conv).float()
    x = torch.randn(2, 6, *size).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    images = x.detach().float().requires_grad_()
    got, expected = layer(x), exact(images)
    weights = torch.randn_like(expected).bfloat16()
    got.backward(weights)
    expected.backward(weights.float())
    for mine, theirs in (
        (got, expected),
        (x.grad, images.grad),
        (conv.weight.grad, exact.weight.grad),
    ):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), theirs, rtol=0.01, atol=0.03)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"stride": 2}], ids=["dilated", "strided"])
def test_layers_have_jacobians_by_torch_func(options):
    torch.manual_seed(0)
    conv = depthwise(2, **options).double()
    layer = FastDepthwise(conv)
    x = torch.randn(1, 2, 5, 4, dtype=torch.double)
    torch.testing.assert_close(jacrev(layer)(x), jacrev(conv)(x))


def test_norm_and_relu_sum_in_float32_what_is_bfloat16():
    """Sums of 8,192 numbers: rounded to bfloat16 on the way, they would be off by percents."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    layer, exact = NormReLU(norm), copy.deepcopy(norm).double()
    x = (3 + torch.randn(32, 4, 16, 16)).bfloat16().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    up = (1 + torch.randn(32, 4, 16, 16)).bfloat16()
    ours, wanted = layer(x), exact(x64).relu()
    ours.backward(up)
    wanted.backward(up.double())
    for name in ("weight", "bias"):
        got, right = getattr(norm, name).grad, getattr(exact, name).grad
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, right.float(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(norm.running_mean, exact.running_mean.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, exact.running_var.float(), rtol=1e-5, atol=1e-6)
    assert norm.num_batches_tracked == 1
    for got, right in ((ours, wanted), (x.grad, x64.grad)):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), right, rtol=2**-8, atol=1e-4)


def test_norm_and_relu_keep_digits_where_the_mean_is_large():
    norm = nn.BatchNorm2d(4)
    x = 1000 + torch.randn(16, 4, 8, 8)
    norm.running_mean += 990
    exact = copy.deepcopy(norm).double()(x.double()).relu()
    assert (NormReLU(norm)(x) - exact).abs().max() < 1e-3


def test_norm_and_relu_bear_constant_channels():
    """Their variance is 0, but for rounding: below it there would be no root."""
    norm = nn.BatchNorm2d(200)
    layer = NormReLU(norm)
    # Sums of a power of two of equal numbers would be exact, hence the odd sizes.
    x = torch.linspace(10, 300, 200).view(1, 200, 1, 1).expand(7, 200, 11, 13).clone()
    layer(x.requires_grad_()).sum().backward()
    assert torch.isfinite(layer(x)).all() and torch.isfinite(x.grad).all()
    assert (norm.running_var < 1).all()  # begun at 1, drawn towards 0


# -------------------------------------------------------------------------------------- the twin


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_twin_trains_as_the_network_does(name, norms):
    """Outputs, all gradients and running statistics after two steps, in double precision."""
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    with torch.no_grad():  # far from where a network starts, means far from 0 among them
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "bn" in key or ".1." in key:
                tensor += torch.rand(tensor.shape).to(tensor.dtype)
    expected = copy.deepcopy(model).train()
    before = list(map(id, model.state_dict(keep_vars=True).values()))
    twin = accelerated(model, norms=norms)
    images, weights = 3 + torch.randn(4, 3, 19, 24).double(), torch.randn(4, 10).double()
    for _ in range(2):
        ours, wanted = twin(images), expected(images)
        torch.testing.assert_close(ours, wanted)
        (ours * weights).sum().backward()
        (wanted * weights).sum().backward()
    for key, tensor in model.state_dict(keep_vars=True).items():
        wanted = expected.state_dict(keep_vars=True)[key]
        torch.testing.assert_close(tensor, wanted, msg=key)
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, wanted.grad, msg=key)
    assert list(map(id, model.state_dict(keep_vars=True).values())) == before
    torch.testing.assert_close(model.eval()(images), expected.eval()(images))


def test_what_is_swapped_in_where():
    net = NetCIFAR10_Tiny()
    twin, without = accelerated(net), accelerated(net, norms=False)
    half = accelerated(net, torch.bfloat16)
    assert [kinds(t, FastDepthwise) for t in (twin, without, half)] == [3, 3, 9]
    assert [kinds(t, NormReLU) for t in (twin, without, half)] == [20, 0, 20]
    assert not kinds(net, (FastDepthwise, NormReLU)), "the network itself stays plain"
    assert not kinds(twin, nn.ReLU) and kinds(without, nn.ReLU) == kinds(net, nn.ReLU)
    assert not kinds(accelerated(NetCIFAR10_Tiny(dilated=False)), FastDepthwise)
    assert not kinds(accelerated(NETWORKS["silu"]()), NormReLU), "its activation isn't ReLU"
    both = nn.Sequential(depthwise(6, dilation=2, stride=2))
    assert not kinds(accelerated(both, torch.bfloat16), FastDepthwise)
    large = nn.Sequential(depthwise(6, 5), depthwise(6, 7, dilation=2), depthwise(6, 1))
    counts = [kinds(accelerated(large, p), FastDepthwise) for p in (torch.float32, torch.bfloat16)]
    assert counts == [1, 2]


def test_depthwise_is_a_filter_a_channel():
    assert is_depthwise(depthwise(6)) and is_depthwise(nn.Conv2d(6, 12, 3, groups=6))
    assert not is_depthwise(nn.Conv2d(6, 6, 3, groups=3))
    assert not is_depthwise(nn.Conv2d(6, 6, 1)) and not is_depthwise(depthwise(1))


@pytest.mark.parametrize("norms", [True, False], ids=["norms", "plain norms"])
def test_bfloat16_between_layers_and_float32_elsewhere(norms, tiny):
    """Against double precision; of the gradients a fifth may be noise, as of so few images."""
    model = load_pretrained("tuned").train()
    images = torch.from_numpy(tiny.train_images[:16, 8:24, 8:24]).permute(0, 3, 1, 2)
    images = (images / 255 - 0.5) / 0.25
    labels = torch.from_numpy(tiny.train_labels[:16])
    exact = copy.deepcopy(model).double()
    twin, seen = accelerated(model, torch.bfloat16, norms), []
    for module in twin.modules():
        if isinstance(module, (nn.Conv2d, FastDepthwise)):
            module.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    output, wanted = MixedPrecision(twin, torch.bfloat16)(images), exact(images.double())
    F.nll_loss(output, labels).backward()
    F.nll_loss(wanted, labels).backward()
    assert seen == [torch.bfloat16] * 20 + [torch.float32]  # the last is the head
    assert output.dtype == torch.float32
    assert (output - wanted).abs().mean() < 0.02 * wanted.abs().mean()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    ours, theirs = (
        torch.cat([p.grad.double().flatten() for p in net.parameters()]) for net in (model, exact)
    )
    assert (ours - theirs).norm() < 0.2 * theirs.norm()
    for (name, value), wanted in zip(model.named_buffers(), exact.buffers(), strict=True):
        if "running" in name:
            torch.testing.assert_close(value, wanted.float(), rtol=0.01, atol=0.01)


# -------------------------------------------------------------------------------------- compiled


@needs_compiler
@pytest.mark.parametrize(
    ("layout", "precision"), [("4 4d2", torch.float32), ("4 4s2", torch.bfloat16)], ids=str
)
def test_compiled_gradients_are_as_exact_as_plain_ones(layout, precision):
    """Both against double precision; the two ways only round differently.

    The one place where C++ is compiled, which takes most of a minute: of one block each.
    """
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    model = BlueprintNet(layout=layout).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()
    network = CompiledNetwork(model, batch_size=16, sides={16}, precision=precision)

    def gradient(owner, call, images):
        owner.zero_grad()
        F.nll_loss(call(images), labels).backward()
        return torch.cat([p.grad.double().flatten() for p in owner.parameters()])

    right = gradient(exact, exact, images.double())
    plain, compiled = (gradient(model, call, images) for call in (network.eager, network))
    assert network.sides == {16}, "nothing went wrong in compiling"
    assert (compiled - right).norm() < 2 * (plain - right).norm() + 1e-6 * right.norm()
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.1}[precision]
    assert (compiled - right).norm() < limit * right.norm()


@pytest.mark.parametrize("fails_at", [None, 12])
def test_many_shapes_in_one_process_are_all_compiled_or_it_is_said(monkeypatch, fails_at):
    """torch keeps eight programs by default, and runs the ninth shape uncompiled in silence."""
    torch.compiler.reset()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    compile = lambda model, dynamic: torch.compile(model, dynamic=dynamic, backend=counted)  # noqa: E731
    monkeypatch.setattr("tinycifar.acceleration.compile", compile)
    sides = set(range(16, 32))
    network = CompiledNetwork(nn.Conv2d(3, 4, 3), batch_size=2, sides=sides)
    if fails_at:
        monkeypatch.setattr("tinycifar.acceleration.PROGRAMS", fails_at)
        with pytest.warns(UserWarning, match="goes on without"):
            outputs = {side: network(torch.ones(2, 3, side, side)) for side in sides}
    else:
        outputs = {side: network(torch.ones(2, 3, side, side)) for side in sides}
    assert len(graphs) == (fails_at or len(sides))
    assert network.sides == (set() if fails_at else sides)
    assert torch._dynamo.config.recompile_limit == 8, "the caller's own programs keep their limit"
    for side, output in outputs.items():
        torch.testing.assert_close(output, network.model(torch.ones(2, 3, side, side)))


def test_only_whole_batches_of_the_sides_named_are_compiled(monkeypatch):
    ways = []

    def program(images):
        ways.append(tuple(images.shape))
        return images

    monkeypatch.setattr("tinycifar.acceleration.compile", lambda model, **_: program)
    network = CompiledNetwork(nn.Conv2d(3, 4, 3), batch_size=2, sides={8})
    for shape in ((2, 3, 8, 8), (1, 3, 8, 8), (2, 3, 16, 16)):
        network(torch.zeros(shape))
    assert ways == [(2, 3, 8, 8)]


def test_a_backward_pass_that_cannot_be_compiled_is_helped_too(monkeypatch):
    def no_room(*_, **__):
        raise RuntimeError("No space left on device")

    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=no_room)
    compile = lambda model, dynamic: torch.compile(model, dynamic=dynamic, backend=backend)  # noqa: E731
    monkeypatch.setattr("tinycifar.acceleration.compile", compile)
    network = CompiledNetwork(nn.Conv2d(3, 4, 3), batch_size=2, sides={8})
    with pytest.warns(UserWarning, match="No space left on device.*goes on without"):
        network(torch.ones(2, 3, 8, 8)).sum().backward()
    assert network.model.weight.grad is not None


# ---------------------------------------------------------------------------------------- memory


def test_peak_memory_is_in_mebibytes():
    pytest.importorskip("resource")
    before = peak_memory()
    held = torch.ones(100 * 2**20, dtype=torch.uint8)
    assert held.all()
    assert 50 < before <= peak_memory() < 2**20, "torch alone takes more than 50, and no terabyte"
