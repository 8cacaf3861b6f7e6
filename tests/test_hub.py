"""torch.hub, from a clone: without a network."""

import pytest
import torch

from tinycifar.paths import CHECKOUT


def load(**options):
    return torch.hub.load(str(CHECKOUT), "net_cifar10_tiny", source="local", **options)


def test_a_new_network():
    net = load(num_classes=7)
    assert net.training and net.head.out_channels == 7


def test_a_pretrained_one_knows_its_classes():
    net = load(pretrained=True)
    assert not net.training and net.classes[3] == "cat" and len(net.mean) == 3
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_options_that_exclude_each_other():
    with pytest.raises(ValueError, match="leave out \\['width'\\]"):
        load(pretrained=True, width=2.0)
    with pytest.raises(ValueError, match="say pretrained=True"):
        load(run="baseline")
    with pytest.raises(ValueError, match="pretrained must be"):
        load(pretrained="sprint")
