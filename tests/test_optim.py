"""optim.py: optimizers, schedules, losses and initialisation, each against its definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiny_cifar10_net import NetCIFAR10_Tiny
from tinycifar import optim
from tinycifar.networks import BlueprintNet
from tinycifar.recipes import get_recipe


def channels_last(**options):
    return NetCIFAR10_Tiny(**options).to(memory_format=torch.channels_last)


def test_weight_decay_spares_norms_and_biases_when_told():
    net = NetCIFAR10_Tiny()
    (spared,), (everything,) = (
        optim.optimizers(get_recipe("baseline", decay_all=decay_all), net)
        for decay_all in (False, True)
    )
    decayed, free = (g["params"] for g in spared.param_groups)
    assert {p.ndim for p in decayed} == {4}
    assert sum(p.numel() for p in free) == sum(p.numel() for p in net.parameters() if p.ndim == 1)
    assert [g["weight_decay"] for g in spared.param_groups] == [5e-4, 0.0]
    assert len(everything.param_groups) == 1


def test_the_optimizers_are_those_that_the_recipe_names():
    """Their steps are torch's own; the settings are ours."""
    net = channels_last()
    for momentum in (0.0, 0.8):  # torch refuses Nesterov's without any
        (sgd,) = optim.optimizers(get_recipe("baseline", momentum=momentum), net)
        assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == momentum
        assert sgd.defaults["nesterov"] == (momentum > 0)
    recipe = get_recipe("baseline", optimizer="muon_adamw", momentum=0.8)
    adamw, muon = optim.optimizers(recipe, net)
    assert adamw.defaults["betas"] == (0.9, 0.99)
    assert muon.defaults["momentum"] == 0.8 and muon.defaults["nesterov"]


def lr_curve(recipe, steps_per_epoch):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], recipe.lr)
    schedule = optim.schedule(recipe, optimizer, steps_per_epoch)
    curve = []
    for _ in range(recipe.epochs * steps_per_epoch):
        curve.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return curve


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 8), (0.2, 5), (0.25, 4), (0.5, 1)])
def test_a_rise_of_no_or_one_step_is_no_trouble(schedule, warmup, steps):
    curve = lr_curve(get_recipe("quick", epochs=1, schedule=schedule, warmup=warmup), steps)
    assert all(0 < lr <= 0.06 for lr in curve)


def test_cosine_rises_to_lr_and_falls_to_zero():
    curve = lr_curve(get_recipe("quick", schedule="cosine", epochs=10, warmup=0.2, lr=0.4), 10)
    assert max(curve) == pytest.approx(0.4)
    assert curve.index(max(curve)) == 20
    for t in (30, 60, 95):
        expected = 0.4 * (1 + math.cos(math.pi * (t - 20) / 80)) / 2
        assert curve[t] == pytest.approx(expected, rel=1e-6)


def test_one_cycle_peaks_where_told_and_ends_near_zero():
    curve = lr_curve(get_recipe("quick", epochs=10, warmup=0.3, lr=0.4), 10)
    assert max(curve) == pytest.approx(0.4)
    assert curve.index(max(curve)) == 29
    assert curve[-1] < 1e-4


def test_muon_has_its_own_rate_and_the_same_schedule():
    net = channels_last()
    recipe = get_recipe("quick", epochs=1, optimizer="muon", lr=0.1, muon_lr=0.03)
    both = optim.optimizers(recipe, net)
    schedules = [optim.schedule(recipe, one, 12) for one in both]
    highest = 0
    for _ in range(12):
        sgd, muon = (one.param_groups[0]["lr"] for one in both)
        assert muon == pytest.approx(0.3 * sgd)
        assert all(one.param_groups[0]["momentum"] == 0.9 for one in both), "it isn't cycled"
        highest = max(highest, muon)
        for schedule in schedules:
            schedule.optimizer._opt_called = True  # as if a step had been taken
            schedule.step()
    assert highest == pytest.approx(0.03)


def test_a_filter_on_the_only_channel_counts_as_mixing():
    net = channels_last(width=0.05)  # 1, 1, 2, 2 and 3 channels
    sgd, muon = optim.optimizers(get_recipe("quick", optimizer="muon", width=0.05), net)
    taken = {id(weight) for weight in muon.weights}
    assert id(net.c2[0].dw.weight) in taken and id(net.c2[1].dw.weight) not in taken
    left = {id(p) for group in sgd.param_groups for p in group["params"]}
    assert left == {id(p) for p in net.parameters()} - taken


def test_muon_leaves_a_layer_that_a_step_didnt_use():
    net = channels_last()
    recipe = get_recipe("baseline", optimizer="muon", weight_decay=0.0)
    _, muon = optim.optimizers(recipe, net)
    net(torch.rand(4, 3, 16, 16).to(memory_format=torch.channels_last))[:, 0].sum().backward()
    muon.step()
    before = [weight.detach().clone() for weight in muon.weights]
    muon.weights[0].grad = None
    muon.step()
    moved = [not torch.equal(*pair) for pair in zip(before, muon.weights, strict=True)]
    assert not moved[0] and all(moved[1:])


def test_muon_moves_what_mixes_channels_equally_far_in_all_directions():
    net = channels_last()
    recipe = get_recipe("baseline", optimizer="muon", muon_lr=0.01, weight_decay=0.0)
    sgd, muon = optim.optimizers(recipe, net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net(torch.rand(4, 3, 16, 16).to(memory_format=torch.channels_last))[:, 0].sum().backward()
    muon.step()
    moved = {name: before[name] - p.detach() for name, p in net.named_parameters()}
    mixing = {name for name, step in moved.items() if step.abs().sum() > 0}
    blocks = [f"c{c}.{b}" for c, n in ((2, 2), (3, 2), (4, 5)) for b in range(n)]
    assert mixing == {"c1.1.0.weight", *(f"{block}.pw.weight" for block in blocks)}
    for name in mixing:
        step = moved[name].flatten(1)
        # A rotation times the rate, more for a tall matrix, from singular values 0.5 to 1.5 or so.
        length = 0.01 * max(1, step.shape[0] / step.shape[1]) ** 0.5
        strengths = torch.linalg.svdvals(step) / length
        assert strengths[: len(strengths) // 2].min() > 0.5 and strengths.max() < 1.5
        assert torch.sum(step * net.get_parameter(name).grad.flatten(1)) > 0  # downhill
    decay = 0.045 * 5e-4 / (1 - 0.9)  # of SGD, through its momentum: a share of the weight a step
    sgd, muon = optim.optimizers(get_recipe(recipe, weight_decay=5e-4), net)
    net.zero_grad(set_to_none=False)
    before = net.c2[0].pw.weight.detach().clone()
    muon.step()
    torch.testing.assert_close(net.c2[0].pw.weight.detach(), before * (1 - decay))
    left_to_sgd = {id(p) for g in sgd.param_groups for p in g["params"]}
    assert left_to_sgd == {id(p) for name, p in net.named_parameters() if name not in mixing}


def test_adamw_beside_muon_takes_the_rest_and_all_weights_shrink_equally_fast():
    net = channels_last()
    recipe = get_recipe("baseline", optimizer="muon_adamw", lr=0.01, weight_decay=0.1)
    adamw, muon = optim.optimizers(recipe, net)
    assert isinstance(adamw, torch.optim.AdamW)
    assert len(muon.param_groups[0]["params"]) == 10  # c1's second convolution, nine pointwise
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    adamw.step()
    muon.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.01 * 0.1), msg=name)


@pytest.mark.parametrize("make", [NetCIFAR10_Tiny, lambda: BlueprintNet(layout="4 8k1 8k5 8k7d2")])
def test_dirac_adds_the_identity_to_depthwise_filters_alone(make):
    plain, passing = make(), make()
    passing.load_state_dict(plain.state_dict())
    optim.dirac(passing)
    for (name, before), after in zip(plain.named_parameters(), passing.parameters(), strict=True):
        identity = torch.zeros_like(before)
        if ".dw." in name:
            nn.init.dirac_(identity, groups=len(identity))
        torch.testing.assert_close(after, before + identity, msg=name)


def test_dirac_leaves_frozen_filters_alone():
    net = NetCIFAR10_Tiny(width=0.1).requires_grad_(False)
    before = [p.clone() for p in net.parameters()]
    optim.dirac(net)
    assert all(map(torch.equal, net.parameters(), before))


def test_muon_takes_what_mixes_channels_in_a_blueprint_network_too():
    net = BlueprintNet(layout="4 8 8d2").to(memory_format=torch.channels_last)
    _, muon = optim.optimizers(get_recipe("baseline", optimizer="muon"), net)
    assert {id(w) for w in muon.weights} == {id(block.pw.weight) for block in net.blocks}


def test_the_loss_is_torchs_cross_entropy_with_label_smoothing():
    logits, labels = torch.randn(5, 10), torch.tensor([3, 1, 4, 1, 5])
    for smoothing in (0.0, 0.1):
        recipe = get_recipe("baseline", label_smoothing=smoothing)
        expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(optim.loss(recipe, logits.log_softmax(1), labels), expected)


def test_a_teachers_share_of_the_loss():
    log_p, taught = torch.randn(2, 5, 10).log_softmax(2).unbind(0)
    labels = torch.tensor([3, 1, 4, 1, 5])
    recipe = get_recipe("baseline", teaching=0.25, temperature=2.0)
    distilled = optim.distillation_loss(log_p, taught, 2.0)
    torch.testing.assert_close(
        optim.loss(recipe, log_p, labels, taught),
        0.75 * F.nll_loss(log_p, labels) + 0.25 * distilled,
    )


def test_distillation_loss_is_zero_at_the_teachers_own_answer_and_hintons_elsewhere():
    logits, taught = torch.randn(2, 5, 10).unbind(0)
    loss = optim.distillation_loss(logits.log_softmax(1), taught.log_softmax(1), 4.0)
    p, q = (taught / 4).softmax(1), (logits / 4).softmax(1)
    torch.testing.assert_close(loss, 16 * (p * (p / q).log()).sum(1).mean())
    assert optim.distillation_loss(taught, taught.log_softmax(1), 4.0).abs() < 1e-5
