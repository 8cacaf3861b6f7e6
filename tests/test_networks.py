"""networks.py: networks written as one line, for screening; whether one is better is open."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, assert_same_outcome
from PIL import Image
from torch import nn

from tiny_cifar10_net import NetCIFAR10_Tiny, fuse
from tinycifar.__main__ import main
from tinycifar.costs import layer_costs
from tinycifar.data import channel_stats, split
from tinycifar.evaluation import evaluate
from tinycifar.networks import (
    BlueprintBlock,
    BlueprintNet,
    ChannelAttention,
    Layer,
    make_network,
    own_network,
    read_layout,
)
from tinycifar.paths import CHECKOUT
from tinycifar.recipes import get_recipe
from tinycifar.run_directory import RunError
from tinycifar.studies import train_many
from tinycifar.training import train
from tinycifar.weights import load_pretrained, predict


def test_a_layout_names_channels_strides_and_dilations():
    assert read_layout("16 24 36d2 48k5s2 64s2d3 64x2") == [
        (16, 3, 1, 1, 1), (24, 3, 1, 1, 1), (36, 3, 1, 2, 1), (48, 5, 2, 1, 1), (64, 3, 2, 3, 1),
        (64, 3, 1, 1, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["", "16", "16 x", "16 24d", "16,24", "16 24d2s2", "16 24k4"])
def test_a_layout_that_cant_be_read_is_shown(layout):
    with pytest.raises(ValueError, match="a layout names the channels of each layer"):
        read_layout(layout)


@pytest.mark.parametrize("size", [(32, 32), (13, 18)])
@pytest.mark.parametrize("skips", ["none", "same", "all"])
def test_outputs_are_log_probabilities_of_any_size(size, skips):
    net = BlueprintNet(7, layout="4 8s2 8d2", skips=skips).eval()
    out = net(torch.randn(2, 3, *size))
    assert out.shape == (2, 7)
    torch.testing.assert_close(out.exp().sum(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    ("skips", "which"), [("none", [0, 0, 0]), ("same", [0, 0, 1]), ("all", [1, 1, 1])]
)
def test_which_blocks_have_skips(skips, which):
    net = BlueprintNet(layout="4 8 8s2 8", skips=skips)
    assert [int(block.skip) for block in net.blocks] == which


def test_a_skip_adds_the_input_pooled_and_padded_with_zeros():
    x = torch.randn(2, 4, 9, 8)
    block = BlueprintBlock(4, Layer(6, stride=2), skip=True).eval()
    plain = BlueprintBlock(4, Layer(6, stride=2)).eval()
    plain.load_state_dict(block.state_dict())
    added = block(x) - plain(x)
    torch.testing.assert_close(added[:, :4], F.avg_pool2d(x, 2, ceil_mode=True))
    assert not added[:, 4:].any()


def test_parameters_are_those_of_pointwise_depthwise_and_norm():
    block = BlueprintBlock(4, Layer(6))
    assert sum(p.numel() for p in block.parameters()) == 4 * 6 + 9 * 6 + 2 * 6


def test_a_gated_block_makes_twice_as_many_channels_and_multiplies_their_halves():
    gated = BlueprintBlock(4, Layer(6), activation="glu").eval()
    x = torch.randn(2, 4, 9, 8)
    features, gates = gated.bn(gated.dw(gated.pw(x))).split(6, dim=1)
    torch.testing.assert_close(gated(x), features * gates.sigmoid())
    assert sum(p.numel() for p in gated.parameters()) == 12 * (4 + 9 + 2)


def test_convolutions_used_twice_are_two_blocks_that_share_them():
    twice, first, second = (BlueprintBlock(4, Layer(4, uses=n), skip=True) for n in (2, 1, 1))
    with torch.no_grad():
        twice.more_bns[0].weight.fill_(0.5)
    first.load_state_dict({k: v for k, v in twice.state_dict().items() if "more" not in k})
    second.load_state_dict(first.state_dict())
    second.bn.load_state_dict(twice.more_bns[0].state_dict())
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(twice(x), second(first(x)))
    net = BlueprintNet(layout="4 4x3")
    once = BlueprintNet(layout="4 4")
    more, less = layer_costs(net), layer_costs(once)
    extra = sum(row.macs for row in more) - sum(row.macs for row in less)
    assert extra == 2 * (4 * 4 + 9 * 4) * 32 * 32
    assert sum(row.params for row in more) == sum(p.numel() for p in net.parameters())
    assert sum(row.params for row in more) - sum(row.params for row in less) == 2 * (4 + 4)
    with pytest.raises(ValueError, match="only a layer that keeps the shape can be used several"):
        BlueprintNet(layout="4 8x2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_weights_a_channel_by_the_means_of_it_and_its_neighbours(dtype):
    eca = ChannelAttention()
    x = torch.randn(2, 5, 4, 4, dtype=dtype)
    means = F.pad(x.float().mean((2, 3)), (1, 1))
    a, b, c = eca.conv.weight.detach().flatten()
    weights = (a * means[:, :-2] + b * means[:, 1:-1] + c * means[:, 2:]).sigmoid()
    torch.testing.assert_close(eca(x), x * weights[:, :, None, None].to(dtype))
    block = BlueprintBlock(5, Layer(6), attention=True)
    plain = BlueprintBlock(5, Layer(6))
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if "attention" not in k})
    torch.testing.assert_close(block(x.float()), block.attention(plain(x.float())))
    net = BlueprintNet(layout="4 4 8", attention="eca")
    assert sum(isinstance(m, ChannelAttention) for m in net.modules()) == 2


def test_options_and_inputs_that_cant_be_are_named():
    with pytest.raises(ValueError, match="unknown skips 'some'; valid: none, same, all"):
        BlueprintNet(skips="some")
    with pytest.raises(ValueError, match="unknown activation 'tanh'; valid: relu, silu, glu"):
        BlueprintNet(activation="tanh")
    for layout in ("0 24", "16 24s0", "16 24d0", "16 16x0"):
        with pytest.raises(ValueError, match="a layout names the channels of each layer"):
            BlueprintNet(layout=layout)
    with pytest.raises(ValueError, match="layers that don't narrow; got 4 channels after 8"):
        BlueprintNet(layout="4 8 4", skips="all")
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\); got \(3, 32, 32\)"):
        BlueprintNet(layout="4 4")(torch.zeros(3, 32, 32))


@pytest.mark.parametrize("activation", ["silu", "glu"])
@pytest.mark.parametrize("attention", ["none", "eca"])
@pytest.mark.parametrize("skips", ["none", "same", "all"])
def test_it_can_be_fused(skips, attention, activation):
    options = {"skips": skips, "activation": activation, "attention": attention}
    net = BlueprintNet(7, layout="4 8s2 8d2 8x3 8k5x2", **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    net(torch.randn(16, 3, 16, 16))
    x = torch.randn(2, 3, 13, 18)
    fused = fuse(net.eval())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(x), net(x), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\); got \(3, 32, 32\)"):
        fused(torch.zeros(3, 32, 32))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The network of docs/library.md, and variations of it, in a module `my_net`."""
    page = (CHECKOUT / "docs" / "library.md").read_text(encoding="utf-8")
    (code,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "MyNet" in b)
    more = """
class Logits(MyNet):
    def forward(self, x):
        return self.head(self.gap(self.stem(x))).flatten(1)

class Wider(MyNet):
    def __init__(self, num_classes):
        super().__init__(num_classes + 1)

class Dropout(MyNet):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.2, self.training))

class Residue(MyNet):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        self.register_buffer("one", torch.ones(()), persistent=False)

    def forward(self, x):
        return self.one * super().forward(x) + 0 * self.scale.sum()

class OneSize(MyNet):
    def forward(self, x):
        return super().forward(x.view(-1, 3, 32, 32))

class Fails(MyNet):
    def forward(self, x):
        return super().forward(x[:, :2])

class Asks(MyNet):
    def forward(self, x):
        if x.shape[1] != 3:
            raise ValueError("not images")
        return super().forward(x)

class Squeezes(MyNet):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.squeeze = nn.Linear(16, 16)

    def forward(self, x):
        x = self.stem(x)
        x = x * self.squeeze(x.mean((2, 3)))[:, :, None, None]
        x = x + 0 * self.bn(self.conv(x))
        return self.head(self.gap(x)).flatten(1).log_softmax(dim=1)

class Pair(MyNet):
    def forward(self, x):
        return super().forward(x), x

class Greedy(MyNet):
    def __init__(self, num_classes, depth):
        super().__init__(num_classes)

class Headless(MyNet):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        del self.head
"""
    (tmp_path / "my_net.py").write_text("import torch\n" + code + more)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_net", raising=False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_network_of_ones_own_trains_and_loads(mine, tiny, tmp_path, precision):
    recipe = get_recipe(SMALL, epochs=1, network="my_net:MyNet", precision=precision)
    assert recipe.name.startswith("small-epochs=1,network=my_net_MyNet")
    metrics = train(recipe, tmp_path / "r", dataset=tiny, progress=False)
    model, state = load_pretrained(tmp_path / "r"), torch.get_rng_state()
    load_pretrained(tmp_path / "r")
    assert torch.equal(torch.get_rng_state(), state), "the caller's random stream is left alone"
    assert type(model).__name__ == "MyNet" and metrics["params"] == 2_938
    stats = channel_stats(tiny.train_images, split(tiny.train_labels)[0])
    accuracy = evaluate(model, tiny.test_images, tiny.test_labels, stats)[1]
    assert accuracy == pytest.approx(metrics["test_acc"])
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(fuse(model)(x), model(x), rtol=0, atol=1e-5)


def test_a_network_of_ones_own_is_tried_without_changing_it(mine):
    assert own_network(10, "my_net:MyNet").bn.num_batches_tracked == 0


def test_its_own_random_draws_repeat_when_it_is_resumed(mine, tiny, tmp_path):
    recipe = get_recipe(SMALL, epochs=2, network="my_net:Dropout")
    how = {"dataset": tiny, "compile": False, "progress": False}
    train(recipe, tmp_path / "whole", **how)

    def interrupt(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", on_epoch=interrupt, **how)
    train(recipe, tmp_path / "run", **how)
    assert_same_outcome(tmp_path / "whole", tmp_path / "run")


def test_workers_import_what_the_caller_can(mine, tiny, tmp_path):
    recipe = get_recipe(SMALL, epochs=1, network="my_net:MyNet", precision="float32")
    (metrics,) = train_many([recipe], [0], folder=tmp_path / "out", dataset=tiny, progress=False)
    assert metrics["params"] == 2_938


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "nothing_here:X",
            r"can't be imported \(No module named 'nothing_here'\): expected",
        ),
        ("my_net:Missing", "can't be imported .*has no attribute 'Missing'"),
        ("os:getcwd", "must be a class derived from nn.Module; got <built-in function getcwd>"),
        ("my_net:Headless", "has no head: its last feature map must go into a module `gap`"),
        (
            "my_net:Fails",
            r"fails on images \(2, 3, 32, 32\): .*to have 3 channels",
        ),
        (
            "my_net:Logits",
            r"log-probabilities .* is \(2, 10\), of which the exponentials don't add",
        ),
        ("my_net:Wider", r"log-probabilities \(N, 10\).* is \(2, 11\)$"),
        ("my_net:Pair", r"log-probabilities \(N, 10\).* is tuple$"),
        (
            "my_net:Greedy",
            "fails for 10 classes: .*missing 1 required .*'depth'",
        ),
    ],
)
def test_what_isnt_a_network_is_refused(mine, tiny, tmp_path, name, says):
    with pytest.raises(ValueError, match=says):
        train(get_recipe(SMALL, network=name), tmp_path / "r", dataset=tiny)
    assert not (tmp_path / "r").exists()
    with pytest.raises(ValueError, match="int8 takes a network of this package"):
        get_recipe(SMALL, network=name, int8=True, teacher="tuned")


def test_a_network_for_one_size_of_images_needs_a_recipe_with_one(mine, tiny, tmp_path):
    recipe = get_recipe(SMALL, epochs=1, network="my_net:OneSize")
    with pytest.raises(ValueError, match=r"fails on images of 16 x 16, .*: give it start_side=32"):
        train(get_recipe(recipe, start_side=16, grow=1), tmp_path / "r", dataset=tiny)
    assert not (tmp_path / "r").exists()
    train(recipe, tmp_path / "r", dataset=tiny, progress=False)


def test_parameters_of_ones_own_count_once_and_bfloat16_is_for_convolutions(mine, tiny, tmp_path):
    recipe = get_recipe(SMALL, epochs=1, network="my_net:Residue", precision="bfloat16")
    metrics = train(recipe, tmp_path / "r", dataset=tiny, progress=False)
    assert metrics["params"] == 2_938 + 16
    assert load_pretrained(tmp_path / "r").one == 1, "which best.pt doesn't hold"
    recipe = get_recipe(SMALL, epochs=1, network="my_net:Squeezes")
    metrics = train(recipe, tmp_path / "s", dataset=tiny, progress=False)
    assert metrics["macs"] == 16 * 16 * (432 + 2304) + 256 + 160
    with pytest.raises(ValueError, match=r"can't be trained in bfloat16 .*float32 takes all"):
        train(get_recipe(recipe, precision="bfloat16"), tmp_path / "t", dataset=tiny)


def test_a_network_that_cant_be_traced_teaches_and_predicts(mine, tiny, tmp_path, capsys):
    recipe = get_recipe(SMALL, epochs=1, network="my_net:Asks")
    train(recipe, tmp_path / "t", dataset=tiny, progress=False)
    taught = get_recipe(SMALL, epochs=1, teacher=str(tmp_path / "t"))
    train(taught, tmp_path / "r", dataset=tiny, progress=False)
    Image.fromarray(tiny.test_images[0]).save(tmp_path / "x.png")
    main(["predict", str(tmp_path / "x.png"), "--run", str(tmp_path / "t")])
    name, probability = predict(tmp_path / "x.png", load_pretrained(tmp_path / "t"), top=1)[0]
    assert f"{probability:7.2%}  {name}" in capsys.readouterr().out


def test_another_version_of_ones_own_network_is_another_run(mine, tiny, tmp_path):
    recipe = get_recipe(SMALL, epochs=1, network="my_net:MyNet")
    train(recipe, tmp_path / "r", dataset=tiny, progress=False)
    file = Path(sys.modules["my_net"].__file__)
    file.write_text(file.read_text() + "# changed\n")
    with pytest.raises(RunError, match="a run that differs: network_sha256 is"):
        train(recipe, tmp_path / "r", dataset=tiny, progress=False)
    with pytest.warns(UserWarning, match="file of my_net:MyNet has changed since"):
        load_pretrained(tmp_path / "r")


def test_a_finished_run_outlives_its_class(mine, tiny, tmp_path):
    recipe = get_recipe(SMALL, epochs=1, network="my_net:MyNet")
    metrics = train(recipe, tmp_path / "r", dataset=tiny, progress=False)
    sys.modules["my_net"].MyNet = None
    assert train(recipe, tmp_path / "r", dataset=tiny, progress=False) == metrics
    with pytest.raises(ValueError, match="network 'my_net:MyNet' must be a class"):
        load_pretrained(tmp_path / "r")


def test_a_runs_model_options_make_its_network():
    assert type(make_network(10, {"width": 0.1})) is NetCIFAR10_Tiny
    net = make_network(3, {"layout": "4 8", "skips": "all", "activation": "silu"})
    assert type(net) is BlueprintNet and net.head.out_channels == 3
