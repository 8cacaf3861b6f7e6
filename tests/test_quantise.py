"""quantise.py: what int8 arithmetic computes, simulated; and training with it."""

import json
from collections import OrderedDict

import pytest
import torch
from helpers import NETWORK, SMALL
from torch import nn

from tiny_cifar10_net import NetCIFAR10_Tiny, folded
from tinycifar import get_recipe, train
from tinycifar.acceleration import accelerated
from tinycifar.networks import BlueprintNet, make_network
from tinycifar.quantise import (
    MAX_WEIGHT,
    Int8Conv,
    Quantiser,
    calibrate,
    layer_errors,
    simulated_int8,
)
from tinycifar.weights import load_pretrained


def trained(model):
    """With other statistics than BatchNorm starts from, with which all answers are the same."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all that it sees
    model.train()
    for _ in range(3):
        model(torch.randn(16, 3, 16, 16))
    return model.eval()


def test_rounding_is_that_of_torchs_own_operation():
    x, quantiser = torch.randn(4, 3, 8, 8) * 2, Quantiser().train()
    y = quantiser(x)
    scale, zero = quantiser.scale_and_zero()
    assert torch.equal(y, torch.fake_quantize_per_tensor_affine(x, scale, zero.int(), 0, 255))
    assert 0 < (y - x).abs().max() <= scale * 0.51
    assert len(y.unique()) <= 256 and not quantiser(torch.zeros(3)).any(), "0 is a level"


def test_the_range_is_a_moving_average_in_training_and_stays_in_evaluation():
    quantiser = Quantiser().train()
    for high in (1.0, 3.0):
        quantiser(torch.tensor([0.5, high]))
    assert (float(quantiser.low), float(quantiser.high)) == (0, 2)  # a ReLU's output has no less
    quantiser.seen.fill_(1000)
    quantiser(torch.tensor([12.0]))
    assert float(quantiser.high) == pytest.approx(2.1), "later a hundredth of the way"
    quantiser.high.fill_(2)
    quantiser.eval()
    assert float(quantiser(torch.tensor([9.0]))) == 2, "clipped"
    assert float(quantiser.high) == 2


def test_gradients_pass_as_if_nothing_were_rounded():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    Quantiser().train()(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_weights_are_rounded_channel_by_channel():
    conv = Int8Conv(nn.Conv2d(3, 4, 3, bias=False))
    levels = (conv.weight / conv.weight_scale()).detach()
    torch.testing.assert_close(levels.abs().amax(dim=(1, 2, 3)), torch.full((4,), 63.0))
    eye = torch.zeros(3, 3, 3, 3)
    eye[:, :, 1, 1] = torch.eye(3)
    conv.train()
    seen = conv(eye)  # of 0 and 1, which are levels: the weights themselves
    torch.testing.assert_close(
        seen[0], (conv.weight_scale() * levels.round())[:, 0, 1, 1, None, None]
    )
    assert MAX_WEIGHT * 255 * 2 < 2**15, "pairs of products fit into 16 bits"


@pytest.mark.parametrize("make", [NetCIFAR10_Tiny, BlueprintNet])
def test_all_but_the_first_and_the_last_are_in_int8(make):
    size = {"layout": NETWORK} if make is BlueprintNet else {"width": 0.25}
    net, x = trained(make(**size)), torch.randn(32, 3, 16, 16)
    int8 = simulated_int8(net)
    convs = [m for m in int8.modules() if isinstance(m, nn.Conv2d)]
    assert [isinstance(conv, Int8Conv) for conv in convs] == [
        0 < i < len(convs) - 1 for i in range(len(convs))
    ]
    assert not any(module.training for module in int8.modules()), "else its ranges would move on"
    calibrate(int8, x.split(8))
    assert not any(module.training for module in int8.modules())
    assert (net(x[:16]) - net(x[16:])).abs().max() > 0.05, "else there was nothing to compare"
    off = (int8(x).exp() - net(x).exp()).abs().max()
    assert 0 < off < 0.02
    exact, last, outputs = folded(net), convs[-2], []
    errors = layer_errors(exact, int8, x)
    assert len(errors) == len(convs) - 2
    assert errors["alone"].between(0, 10).all() and errors["alone"].min() > 0
    name = next(name for name, module in int8.named_modules() if module is last)
    for each in (exact, int8):
        copied = lambda _, given, out: outputs.append((given[0].clone(), out.clone()))  # noqa: E731
        each.get_submodule(name).register_forward_hook(copied)
        with torch.no_grad():
            each(x)
    (given, right), (_, ours) = outputs
    wrong = {"alone": last(given).detach() - right, "together": ours - right}
    for column, error in wrong.items():
        percent = 100 * float(error.norm() / right.norm())
        assert errors[column].iloc[-1] == pytest.approx(percent, rel=1e-3)


def test_calibrating_moves_the_ranges_alone():
    """Not a BatchNorm that wasn't folded, and no Dropout drops: those are as in evaluation."""
    parts = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 1)
    net = nn.Sequential(OrderedDict(zip("abcde", parts, strict=True)))
    net.gap, net.head = nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1)
    int8, x = simulated_int8(net.eval()), torch.randn(8, 3, 4, 4)
    calibrate(int8, [x])
    assert int8.c.num_batches_tracked == 0 and not int8.c.running_mean.any()
    high = int8.c(int8.a(x).relu()).max()
    torch.testing.assert_close(int8.e.input.high, high, msg="the range of what isn't dropped")
    assert not any(module.training for module in int8.modules())


def test_a_convolution_of_ones_own_stays_in_float():
    class Halved(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) / 2

    net = BlueprintNet(layout=NETWORK)
    net.blocks[0].pw = Halved(4, 8, 1, bias=False)
    net.blocks[1].pw = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", bias=False)
    int8 = simulated_int8(net.eval())
    assert type(int8.blocks[0].pw) is Halved and isinstance(int8.blocks[0].dw, Int8Conv)
    assert type(int8.blocks[1].pw) is nn.Conv2d, "an Int8Conv pads with zeros"


@pytest.mark.parametrize("convs", [["stem"], ["stem", "head"], []])
def test_nothing_to_round_is_said(convs):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gap = nn.AdaptiveAvgPool2d(1)
            for name in convs:
                self.add_module(name, nn.Conv2d(3, 3, 1))

    with pytest.raises(ValueError, match=r"between the first and the head, .* leave it in float"):
        simulated_int8(Net().eval())


def test_a_folded_network_keeps_its_relus_in_the_twin():
    net = folded(trained(NetCIFAR10_Tiny(width=0.25))).train()
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(accelerated(net, norms=True)(x), net(x))


def test_an_int8_run_goes_on_from_its_teachers_weights(tmp_path, tiny):
    options = {"dataset": tiny, "progress": False, "compile": False}
    train(SMALL, tmp_path / "float", **options)
    taught = {"int8": True, "teacher": str(tmp_path / "float"), "epochs": 1, "lr": 1e-8}
    train(get_recipe(SMALL, **taught), tmp_path / "int8", **options)
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["model"]["int8"]
    int8, exact = load_pretrained(tmp_path / "int8"), folded(load_pretrained(tmp_path / "float"))
    assert isinstance(int8.blocks[0].dw, Int8Conv) and int8.blocks[0].dw.input.high > 0
    assert all(parameter.requires_grad for parameter in int8.parameters())
    for name, parameter in exact.named_parameters():
        torch.testing.assert_close(int8.get_parameter(name), parameter, rtol=0, atol=1e-5)

    other = get_recipe(SMALL, **taught, network="4 8")
    with pytest.raises(ValueError, match=r"is another network, .* give the recipe its options"):
        train(other, tmp_path / "other", **options)


def test_what_int8_needs_is_said():
    for changes in ({"teacher": None}, {"teacher": "quick", "precision": "bfloat16"}):
        with pytest.raises(ValueError, match="int8 takes a teacher, whose weights it starts from"):
            get_recipe(SMALL, int8=True, **changes)


def test_a_config_makes_the_network_again():
    recipe = get_recipe(SMALL, int8=True, teacher="quick")
    model = make_network(3, recipe.model_options)
    assert model.head.out_channels == 3 and isinstance(model.blocks[0].pw, Int8Conv)
