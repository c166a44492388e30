"""Training onto value sets: straight through the projection, and by freezing a growing share of weights at levels."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lib.constraint import Mask, Plan, attach, attach_masks, detach, fitted, harden, masks, project, weights
from lib.constraint.selection import keep_largest
from lib.data import Data
from lib.models import copied
from lib.quantization import Quantized
from lib.recipes.common import movable, part
from lib.shapes import Parametrization, uses
from lib.training import Hook, Progress, TrainingError, evaluate, fit


class _Projected(Parametrization):
    """Parametrization ``W -> W + (P_S(W) - W)``, the difference a constant: gradients go straight through."""

    def __init__(self, constraint) -> None:
        super().__init__()
        self.constraint = constraint

    def forward(self, weight: Tensor) -> Tensor:
        """The projection of ``weight``, with the gradient of the identity."""
        return weight + (self.constraint.project(weight.detach()) - weight.detach())


class _Through(Hook):
    """The projection of every planned layer between its latent weights and the network, while it trains."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        layers = uses(model)
        for name, constraint in self.plan.items():
            attach(layers[name], _Projected(constraint))

    def end(self, model: nn.Module) -> None:
        layers = uses(model)
        for name in self.plan:
            detach(layers[name], _Projected)


def straight_through(
    model: nn.Module, plan: Plan, data: Data, *, hooks: tuple[Hook, ...] = (), **fit_options: Any
) -> pd.DataFrame:
    """Train latent weights through their projection, in place, from a trained model. Leaves ``W <- P_S(W)``.

    Every forward pass sees ``P_S(W)``, and the gradient there moves ``W``. Masks that are attached stay, and what they
    removed is off the support. Sets that adapt (`fitted`) keep what they have; levels with a free step find it anew at
    every pass.

    Returns:
        As `fit`; loss and accuracy are those of the projected network.

    Raises:
        TrainingError: a plan that couples layers. ConstraintError: one that cannot be.

    >>> from lib import data, models, pruning, quantization, recipes, shapes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> plan = pruning.uniform_plan(model, quantization.ternary())
    >>> log = recipes.straight_through(model, plan, images, epochs=1, lr=0.05)
    >>> [len(layer.weight.unique()) for layer in shapes.prunable(model).values()]
    [3, 3, 3]
    """
    movable(model, plan)
    for name, constraint in plan.items():
        if not constraint.per_layer:
            raise TrainingError(f"{name}: {constraint} couples layers; straight-through training takes one at a time")
    log = fit(model, data, hooks=(*hooks, _Through(plan)), **fit_options)
    harden(model, plan)
    return log


class _Frozen(Mask):
    """Parametrization that moves what is ``free`` and holds all else at ``value``; the mask is of what may be there."""

    def __init__(self, free: Tensor, value: Tensor) -> None:
        super().__init__(free | (value != 0))
        self.register_buffer("free", free)
        self.register_buffer("value", torch.where(free, 0.0, value))

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` where it is free."""
        return torch.where(self.free, weight, self.value)


def partial_hardening(
    model: nn.Module,
    plan: Plan,
    data: Data,
    *,
    shares: Sequence[float] = (0.3, 0.5, 0.8),
    progress: Progress | None = None,
    **fit_options: Any,
) -> pd.DataFrame:
    """Snap the weights nearest to their levels, freeze them, let the others make up for it (ADMM-NN, arXiv 1812.11677).

    Each round freezes, in every layer and at every level, the given share of the weights that are still free, nearest
    first, and retrains the rest with `fit`; at last all are snapped: ``W <- P_S(W)``. What is free by then has moved
    away from its levels, so little of it should be left. Levels are those of the weights at the start, and so is the
    support of a joint set: what it removes goes before the first round. Masks that are attached stay attached.

    Args:
        shares: ADMM-NN freezes 30 % at first; of the later rounds the papers don't tell.

    Returns:
        One row per round: ``round``, ``frozen`` (share of the nonzero planned weights), validation ``accuracy`` after
        retraining, and ``hardened_accuracy`` of the network as it would be with all weights snapped.

    Raises:
        ConstraintError: a plan that cannot be. TrainingError: a share outside [0, 1].

    >>> from lib import data, models, pruning, quantization, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> plan = pruning.uniform_plan(model, quantization.Levels(2))
    >>> log = recipes.partial_hardening(model, plan, images, shares=(0.5, 0.8), epochs=1, lr=0.05)
    >>> log["frozen"].round(2).tolist(), len(model.fc1.weight.unique())  # half, then 0.8 of the other half
    ([0.5, 0.9], 4)
    """
    if not shares or min(shares) < 0 or max(shares) > 1:
        raise TrainingError(f"partial_hardening: {shares=}: allowed are shares in [0, 1], at least one")
    movable(model, plan)
    plan = fitted(model, plan)
    layers, before = uses(model), masks(model)
    levels = project(plan, weights(model, plan))
    support = {n: z != 0 for n, z in levels.items() if isinstance(plan[n], Quantized)}  # chosen once: joint sets prune
    free = {n: support.get(n, w != 0) for n, w in weights(model, plan).items()}
    total = sum(int(f.sum()) for f in free.values())
    rows = []
    try:
        for i, share in enumerate(shares):
            w = weights(model, plan)
            levels = project(plan, w)
            for name, level in levels.items():
                free[name] &= ~_nearest(w[name], level, free[name], share)
            attach_masks(model, {n: m for n, m in before.items() if n not in plan})
            for name, level in levels.items():
                attach(layers[name], _Frozen(free[name].clone(), level))
            fit(model, data, progress=part(progress, i, 1, len(shares), f"round {i + 1}"), **fit_options)
            frozen = 1 - sum(int(f.sum()) for f in free.values()) / max(1, total)
            hardened = evaluate(harden(copied(model), plan), data.validation)
            rows.append((i + 1, frozen, evaluate(model, data.validation), hardened))
        harden(model, plan)
    finally:
        attach_masks(model, before)
    return pd.DataFrame(rows, columns=["round", "frozen", "accuracy", "hardened_accuracy"])


def _nearest(weight: Tensor, level: Tensor, free: Tensor, share: float) -> Tensor:
    """Of the free weights at each level, the mask of the share that lies nearest to it."""
    chosen = torch.zeros_like(free)
    for value in level[free].unique():
        at = free & (level == value)
        near = keep_largest(-(weight[at] - value).abs(), round(share * int(at.sum())))
        chosen[at] = near
    return chosen
