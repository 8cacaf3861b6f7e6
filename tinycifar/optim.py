"""Initialisation, optimizers, schedules and loss, by their names in a recipe."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from tinycifar.acceleration import is_depthwise
from tinycifar.recipes import Recipe

ADAM_BETAS = (0.9, 0.99)


def optimizers(recipe: Recipe, model: nn.Module) -> list[torch.optim.Optimizer]:
    """One for all parameters; or two, of which Muon trains the inner convolutions mixing channels.

    Muon's learning rate is the length of its step, so it has one of its own, `muon_lr`; both follow
    the recipe's schedule. AdamW averages squared gradients over a hundred steps, not a thousand.

    Args:
        model: on its device already; for Muon in channels_last, whose memory it shares.
    """
    mixing = _mixing(model) if recipe.optimizer.startswith("muon") else []
    taken = {id(weight) for weight in mixing}
    by_decay: dict[float, list[nn.Parameter]] = {}
    for p in model.parameters():
        if id(p) not in taken:
            spared = p.ndim == 1 and not recipe.decay_all  # BatchNorm's weights, and all biases
            by_decay.setdefault(0.0 if spared else recipe.weight_decay, []).append(p)
    groups = [{"params": group, "weight_decay": decay} for decay, group in by_decay.items()]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")  # one call for all parameters
    lr, momentum = recipe.lr, recipe.momentum
    rest: torch.optim.Optimizer
    if recipe.optimizer.endswith("adamw"):
        rest = torch.optim.AdamW(groups, lr=lr, betas=ADAM_BETAS, fused=fused)
        shrinking = lr * recipe.weight_decay
    else:
        nesterov = momentum > 0  # torch refuses Nesterov without momentum
        rest = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)
        shrinking = lr * recipe.weight_decay / (1 - momentum)  # SGD's passes through its momentum
    if not mixing:
        return [rest]
    decay = shrinking / recipe.muon_lr  # so that all weights shrink equally fast
    return [rest, _Muon(mixing, lr=recipe.muon_lr, momentum=momentum, weight_decay=decay)]


def _mixing(model: nn.Module) -> list[Tensor]:
    """Weights of the convolutions that mix channels, but for the first and the head's."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    head = list(model.get_submodule("head").modules())
    return [conv.weight for conv in convs[1:] if not is_depthwise(conv) and conv not in head]


class _Muon(torch.optim.Muon):
    """Muon for convolutions: where momentum is U S Vᵀ, the step is about U Vᵀ.

    So a step goes equally far in all directions of the gradients, rare ones included (Keller
    Jordan, 2024, kellerjordan.github.io/posts/muon). torch's Muon takes matrices only: weights
    (out, in, kh, kw) are passed to it as views (out, kh * kw * in), which channels_last memory
    allows. Gradients stay the weights' own, for the model to clear.
    """

    def __init__(self, weights: list[Tensor], **options: Any):
        self.weights = weights
        matrices = [nn.Parameter(_matrix(w.detach())) for w in weights]
        super().__init__(matrices, nesterov=True, adjust_lr_fn="original", **options)

    def step(self) -> None:  # type: ignore[override]  # no closure: nobody here has one
        for matrix, weight in zip(self.param_groups[0]["params"], self.weights, strict=True):
            matrix.grad = None  # of a layer that this step didn't use
            if weight.grad is not None:
                gradient = weight.grad.contiguous(memory_format=torch.channels_last)
                matrix.grad = _matrix(gradient)
        super().step()


def _matrix(weight: Tensor) -> Tensor:
    """(out, in, kh, kw), channels_last -> (out, kh * kw * in), the same memory."""
    return weight.permute(0, 2, 3, 1).view(len(weight), -1)


def dirac(model: nn.Module) -> None:
    """Dirac initialisation: add the identity to each depthwise filter, so that it passes its input.

    Frozen filters are left alone.

    A chain of random filters blurs and mixes up its input, and NetCIFAR10_Tiny has no skip
    connections around them. After Keller Jordan's airbench (arXiv:2404.00498), where the identity
    replaces the first filters of standard convolutions; see also Xiao et al. (2018,
    arXiv:1806.05393).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and is_depthwise(module) and module.weight.requires_grad:
            with torch.no_grad():
                height, width = module.kernel_size
                module.weight[:, :, height // 2, width // 2] += 1


def schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> LRScheduler:
    """A torch scheduler: ReduceLROnPlateau steps once an epoch, the others once a batch."""
    total = recipe.epochs * steps_per_epoch
    rising = round(recipe.warmup * total)
    peak = optimizer.defaults["lr"]
    share = float(recipe.warmup) if rising > 1 else 0.0  # OneCycleLR can't rise in one step
    if recipe.schedule == "plateau":
        return ReduceLROnPlateau(
            optimizer, factor=recipe.plateau_factor, patience=recipe.plateau_patience
        )
    if recipe.schedule == "one_cycle":
        return OneCycleLR(optimizer, peak, total, pct_start=share, cycle_momentum=False)
    if recipe.schedule == "cosine":
        falling = CosineAnnealingLR(optimizer, max(1, total - rising))
        if not rising:
            return falling
        warmup = LinearLR(optimizer, start_factor=1e-2, total_iters=rising)
        return SequentialLR(optimizer, [warmup, falling], milestones=[rising])
    return ConstantLR(optimizer, factor=1)


def loss(
    recipe: Recipe, log_p: Tensor, labels: Tensor, teacher_log_p: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of log-probabilities (N, classes), and what a teacher adds to it.

    Label smoothing after Szegedy et al. (2016, arXiv:1512.00567).

    Args:
        teacher_log_p: a teacher's log-probabilities of the same images, (N, classes).
    """
    smoothing, share = recipe.label_smoothing, recipe.teaching
    nll = F.nll_loss(log_p, labels)
    if smoothing:
        nll = (1 - smoothing) * nll - smoothing * log_p.mean()
    if teacher_log_p is None:
        return nll
    return (1 - share) * nll + share * distillation_loss(log_p, teacher_log_p, recipe.temperature)


def distillation_loss(log_p: Tensor, teacher_log_p: Tensor, temperature: float) -> Tensor:
    """How far a student's log-probabilities are from a teacher's, both (N, classes), both softened.

    Kullback-Leibler divergence times temperature², so that gradients keep their size (Hinton,
    Vinyals and Dean, 2015, arXiv:1503.02531).
    """
    student, teacher = ((x / temperature).log_softmax(dim=1) for x in (log_p, teacher_log_p))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
