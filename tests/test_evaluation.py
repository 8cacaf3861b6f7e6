"""evaluation.py: log-probabilities, loss and accuracy, against the network called by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiny_cifar10_net import NetCIFAR10_Tiny
from tinycifar.data import channel_stats
from tinycifar.evaluation import (
    accuracy,
    eval_mode,
    evaluate,
    full_precision,
    log_probabilities,
)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = NetCIFAR10_Tiny(width=0.1)
    # With statistics of its own: with those that it starts from, twenty layers leave nothing of
    # the images, and the answer to each is the same.
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net(torch.randn(8, 3, 16, 16))
    return net


@pytest.fixture(scope="module")
def stats(tiny):
    return channel_stats(tiny.train_images)


def by_hand(net, images, stats):
    """float32 (N, classes) of the images and of their mirror images."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (stats.mean, stats.std))
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        return net(x), net(x.flip(3))


def test_log_probabilities_are_the_networks_own(net, tiny, stats):
    net.eval()
    plain, mirrored = by_hand(net, tiny.test_images, stats)
    ours = log_probabilities(net, tiny.test_images, stats)
    assert ours.shape == (40, 10) and ours.dtype == torch.float32 and not ours.is_inference()
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    flipped = log_probabilities(net, torch.from_numpy(tiny.test_images).flip(2), stats)
    torch.testing.assert_close(flipped, mirrored, rtol=0, atol=1e-5)
    assert (plain - mirrored).abs().max() > 0.01, "else there was nothing to compare"


def test_log_probabilities_are_computed_in_full_precision(net, tiny, stats):
    cudnn, seen = torch.backends.cudnn, []
    net.head.register_forward_hook(lambda *_: seen.append(cudnn.conv.fp32_precision))
    log_probabilities(net, tiny.test_images, stats, batch_size=20)
    assert seen == ["ieee"] * 2 != [cudnn.conv.fp32_precision] * 2


def test_log_probabilities_are_float32_whatever_the_default(net, tiny, stats):
    torch.set_default_dtype(torch.float64)
    try:
        log_p = log_probabilities(net, tiny.test_images, stats)
    finally:
        torch.set_default_dtype(torch.float32)
    assert log_p.dtype == torch.float32


def test_loss_and_accuracy_are_of_these_log_probabilities(net, tiny, stats):
    log_p = log_probabilities(net, tiny.test_images, stats)
    labels = torch.from_numpy(tiny.test_labels)
    loss, percent = evaluate(net, tiny.test_images, tiny.test_labels, stats)
    assert loss == pytest.approx(F.nll_loss(log_p, labels).item())
    assert percent == pytest.approx(100 * (log_p.argmax(1) == labels).double().mean().item())


def test_accuracy_is_in_percent():
    log_p = torch.eye(4)[:, [0, 1, 2]]  # likeliest: 0, 1, 2, and of zeros the first
    assert accuracy(log_p, torch.tensor([0, 1, 0, 2])) == 50.0


def test_evaluation_leaves_the_mode_and_the_weights(net, tiny, stats):
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    log_p = log_probabilities(net, tiny.test_images, stats, batch_size=7)
    assert net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    torch.testing.assert_close(log_p, log_probabilities(net, tiny.test_images, stats))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:0],
        lambda x: x / 255,
        lambda x: x.transpose(0, 3, 1, 2),
    ],
    ids=["none", "floats", "channels first"],
)
def test_images_of_another_kind_are_refused(net, tiny, stats, change):
    with pytest.raises(ValueError, match=r"^images must be uint8 of shape \(N, 32, 32, 3\)"):
        log_probabilities(net, change(tiny.test_images), stats)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda y: y.astype(float), r"int64 of shape \(40,\).*got float64"),
        (lambda y: y[:1], r"int64 of shape \(40,\).*got int64 of shape \(1,\)"),
        (lambda y: y + 1, "from 0 to 9, as there are 10 classes; got 1 to 10"),
        (lambda y: y * 0 - 100, "got -100 to -100"),  # which torch would leave out
    ],
)
def test_labels_of_another_kind_are_refused(net, tiny, stats, change, says):
    with pytest.raises(ValueError, match=f"^labels must be .*{says}"):
        evaluate(net, tiny.test_images, change(tiny.test_labels), stats)


def test_eval_mode_gives_the_mode_back_whatever_happens(net):
    for training in (True, False):
        net.train(training)
        net.c1.eval()  # as one does to freeze a part
        with pytest.raises(KeyError), eval_mode(net):
            assert not net.training
            raise KeyError
        assert (net.training, net.c1.training, net.c2.training) == (training, False, training)


@pytest.mark.parametrize(("library", "low"), [("cudnn", "tf32"), ("mkldnn", "bf16")])
def test_convolutions_are_float32_whatever_the_caller_set(library, low, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    conv = getattr(torch.backends, library).conv
    before = conv.fp32_precision
    for precision in (low, "ieee", before):
        conv.fp32_precision = precision
        with full_precision():
            assert conv.fp32_precision == "ieee" and torch.backends.cudnn.deterministic
            assert not torch.backends.cudnn.benchmark, "which picks by time"
        assert conv.fp32_precision == precision and torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.deterministic and torch.backends.cudnn.allow_tf32


def test_matrix_products_are_float32_whatever_the_caller_set():
    matmul, on_cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            assert matmul.fp32_precision == on_cuda.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16" and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_callers_random_stream_is_left_alone(net, tiny, stats):
    state = torch.get_rng_state()
    log_probabilities(net, tiny.test_images, stats)
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_give_the_switches_back_when_the_last_is_done():
    """The first to come is the first to go, in the midst of the other's work."""
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.deterministic
    first, second = full_precision(), full_precision()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (cudnn.conv.fp32_precision, cudnn.deterministic) == ("ieee", True)
    second.__exit__(None, None, None)
    assert (cudnn.conv.fp32_precision, cudnn.deterministic) == before
