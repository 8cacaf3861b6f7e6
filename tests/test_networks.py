"""networks.py: networks written as one line, for screening; whether one is better is open."""

import pytest
import torch
import torch.nn.functional as F

from tiny_cifar10_net import NetCIFAR10_Tiny
from tinycifar.networks import BlueprintBlock, BlueprintNet, make_network, read_layout


def test_a_layout_names_channels_strides_and_dilations():
    assert read_layout("16 24 36d2 48s2 64s2d3") == [
        (16, 1, 1), (24, 1, 1), (36, 1, 2), (48, 2, 1), (64, 2, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["", "16", "16 x", "16 24d", "16,24", "16 24d2s2"])
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
    block = BlueprintBlock(4, 6, stride=2, skip=True).eval()
    plain = BlueprintBlock(4, 6, stride=2).eval()
    plain.load_state_dict(block.state_dict())
    added = block(x) - plain(x)
    torch.testing.assert_close(added[:, :4], F.avg_pool2d(x, 2, ceil_mode=True))
    assert not added[:, 4:].any()


def test_parameters_are_those_of_pointwise_depthwise_and_norm():
    block = BlueprintBlock(4, 6)
    assert sum(p.numel() for p in block.parameters()) == 4 * 6 + 9 * 6 + 2 * 6


def test_options_and_inputs_that_cant_be_are_named():
    with pytest.raises(ValueError, match="unknown skips 'some'; valid: none, same, all"):
        BlueprintNet(skips="some")
    with pytest.raises(ValueError, match="unknown activation 'tanh'; valid: relu, silu"):
        BlueprintNet(activation="tanh")
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\); got \(3, 32, 32\)"):
        BlueprintNet(layout="4 4")(torch.zeros(3, 32, 32))


def test_a_runs_model_options_make_its_network():
    assert type(make_network(10, {"width": 0.1})) is NetCIFAR10_Tiny
    net = make_network(3, {"layout": "4 8", "skips": "all", "activation": "silu"})
    assert type(net) is BlueprintNet and net.head.out_channels == 3
