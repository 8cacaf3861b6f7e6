"""costs.py: parameters, multiply-adds and receptive field, each counted in another way too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tiny_cifar10_net import NetCIFAR10_Tiny, fuse
from tinycifar.costs import FUNCTIONS, layer_costs, receptive_field
from tinycifar.networks import BlueprintNet


class Positions(nn.Sequential):
    """A linear layer at each position, as in networks of one's own."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 10))

    def forward(self, x):
        return self[1](self[0](x).permute(0, 2, 3, 1)).mean((1, 2))


NETWORKS = {
    "positions": Positions,
    "reference": NetCIFAR10_Tiny,
    "standard": lambda: NetCIFAR10_Tiny(separable=False, width=0.5),
    "blueprint": lambda: BlueprintNet(layout="8 16s2 16d2", skips="all"),
    "attention": lambda: BlueprintNet(layout="8 16s2 16x2", attention="eca"),
}


def test_the_references_costs_are_the_published_ones():
    rows = layer_costs(NetCIFAR10_Tiny())
    assert sum(row.params for row in rows) == 36_170
    assert sum(row.macs for row in rows) == 17_330_816
    first, norm, *_, head = rows
    assert (first.name, first.kind, first.out_shape) == ("c1.0.0", "Conv2d", (16, 32, 32))
    assert (first.params, first.macs) == (27 * 16, 27 * 16 * 1024)
    assert (norm.kind, norm.params, norm.macs) == ("BatchNorm2d", 32, 0)
    assert (head.name, head.out_shape, head.params, head.macs) == ("head", (10, 1, 1), 650, 640)


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_agree_with_torchs_own_counters(name):
    model = NETWORKS[name]().eval()
    rows = layer_costs(model)
    assert FUNCTIONS not in [row.name for row in rows], "which has what the layers lack"
    assert sum(row.params for row in rows) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() == 2 * sum(row.macs for row in rows)


class Functions(nn.Module):
    """Parameters, products and a convolution outside of the layers that are called; frozen ones."""

    def __init__(self):
        super().__init__()
        self.filters = nn.Parameter(torch.ones(8, 3, 3, 3))
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10).requires_grad_(False)

    def forward(self, x):
        tokens = F.conv2d(x, self.filters, stride=4, padding=1).flatten(2).transpose(1, 2)
        return self.head(self.attend(tokens, tokens, tokens)[0].mean(1))


def test_what_is_computed_outside_of_layers_is_counted_too():
    model = Functions()
    *layers, rest = layer_costs(model)
    own = [("head", 90, 80), ("", 216, 0)]  # the filters are the network's own
    assert [(row.name, row.params, row.macs) for row in layers] == own
    assert rest.name == FUNCTIONS
    assert rest.params + 306 == sum(p.numel() for p in model.parameters())
    attention = 64 * 8 * 8 * 4 + 2 * 64 * 64 * 8  # four projections, and two products of 64 tokens
    assert rest.macs == 8 * 27 * 64 + attention


def test_a_fused_networks_costs_are_one_row():
    net = NetCIFAR10_Tiny(width=0.1)
    [row] = layer_costs(fuse(net.eval()))
    assert row.macs == sum(row.macs for row in layer_costs(net))


def test_receptive_field_ends_at_45():
    rows = receptive_field(NetCIFAR10_Tiny())
    assert [r.field for r in rows if r.kernel == 3] == [3, 5, 7, 11, 13, 15, 17, 25, 37, 41, 45]
    assert rows[-1].field == 45 and rows[-1].size == 16
    assert [(r.name, r.dilation, r.jump) for r in rows if r.stride == 2] == [("c4.0.dw", 1, 2)]


@pytest.mark.parametrize(("options", "expected"), [({}, 45), ({"dilated": False}, 31)])
def test_receptive_field_as_the_gradient_sees_it(options, expected):
    """All weights positive: no path cancels, so the gradient is non-zero just where it may be."""
    net = NetCIFAR10_Tiny(width=0.1, **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.5)
    x = torch.rand(1, 3, 96, 96, requires_grad=True)
    features = net.c4(net.c3(net.c2(net.c1(x))))
    features[0, :, 24, 24].sum().backward()
    seen = x.grad.abs().sum(dim=(0, 1)) > 0
    assert seen.any(dim=0).sum() == seen.any(dim=1).sum() == expected
    assert receptive_field(net)[-1].field == expected


def test_pools_count_too_and_the_global_one_ends_it():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 5), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1)
    )
    rows = receptive_field(net)
    assert [(r.kernel, r.jump, r.field) for r in rows] == [(5, 1, 5), (2, 2, 6), (3, 2, 10)]


def test_looking_at_a_network_leaves_it_alone():
    model = NetCIFAR10_Tiny(width=0.1).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layer_costs(model), receptive_field(model)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_cant_be_seen_are_not_left_out_in_silence():
    with pytest.raises(ValueError, match=r"FusedNet calls no convolution .* before fuse"):
        receptive_field(fuse(NetCIFAR10_Tiny(width=0.1).eval()))
