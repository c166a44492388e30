"""Regrowth by gradient: masks that move while a sparse network trains (RigL)."""

from collections.abc import Callable
from functools import partial
from math import cos, pi
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lib.constraint import Masks, Plan, attach_masks
from lib.constraint.selection import keep_largest
from lib.data import Data
from lib.pruning.groups import Unstructured
from lib.recipes.common import Pulling, movable, own_masks
from lib.recipes.growing import random_masks
from lib.shapes import dense_macs, prunable, uses
from lib.training import Hook, TrainingError, charge, fit, steps_per_epoch


class _Regrow(Pulling):
    """RigL: every few steps the smallest live weights go, and as many come where the gradient is largest."""

    def __init__(self, model: nn.Module, masks: Masks, interval: int, share: float, last: int) -> None:
        super().__init__(model, masks)
        self.layers = {name: layer for name, layer in prunable(model).items() if name in masks}
        self.interval, self.share, self.last = interval, share, last
        self.gradients: dict[str, Tensor] = {}
        self.taps: list = []

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def end(self, model: nn.Module) -> None:
        for tap in self.taps:
            tap.remove()
        self.taps = []

    def before_step(self, model: nn.Module, step: int) -> None:
        if step % self.interval or not 0 < step < self.last:
            return
        every = uses(model)
        for name, layer in self.layers.items():  # behind the mask: the gradient of removed weights too
            mask = layer.parametrizations.weight[0]
            self.taps.append(mask.register_forward_hook(self._tap(name)))
            charges = partial(_charge_removed, layer)
            self.taps += [module.register_forward_hook(charges) for module in every[name]]

    def _tap(self, name: str) -> Callable:
        def keep(gradient: Tensor) -> None:  # a layer that is used twice has the sum of both
            self.gradients[name] = self.gradients.get(name, 0) + gradient

        def tap(mask: nn.Module, inputs: tuple[Tensor, ...], weight: Tensor) -> None:
            if weight.requires_grad:
                weight.register_hook(keep)

        return tap

    @torch.no_grad()
    def after_backward(self, model: nn.Module, step: int) -> None:
        super().after_backward(model, step)
        if not self.taps:
            return
        self.end(model)
        fraction = self.share / 2 * (1 + cos(pi * step / self.last))
        for name, gradient in self.gradients.items():
            self._move(name, gradient, fraction)
        self.gradients = {}
        for parameter in model.parameters():  # the step that changes masks changes no weight
            parameter.grad = None

    @torch.no_grad()
    def _move(self, name: str, gradient: Tensor, fraction: float) -> None:
        mask, weight = self.layers[name].parametrizations.weight[0].mask, self.parameters[name]
        live = int(mask.sum())
        stay = keep_largest(torch.where(mask, weight.abs(), -1.0), live - int(fraction * live))
        new = keep_largest(torch.where(stay, -1.0, gradient.abs()), live - int(stay.sum()))
        for tensor in (weight, self.optimizer.state[weight].get("momentum_buffer")):
            if tensor is not None:  # what comes begins at zero, without momentum
                tensor[~stay] = 0.0
        mask.copy_(stay | new)


def _charge_removed(layer: nn.Module, used: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """The gradient of removed weights, which only this step needs, in one of the modules that share the tensor."""
    mask = layer.parametrizations.weight[0].mask
    charge(layer, "weight_gradient", dense_macs(layer, output) * float((~mask).sum()) / mask.numel())


def rigl(
    model: nn.Module,
    plan: Plan,
    data: Data,
    *,
    epochs: int,
    interval: int = 100,
    share: float = 0.3,
    until: float = 0.75,
    seed: int = 0,
    hooks: tuple[Hook, ...] = (),
    **fit_options: Any,
) -> pd.DataFrame:
    """RigL: sparse all the way, masks that move along the gradient (Evci et al., ICML 2020, arXiv 1911.11134).

    From random masks of the plan. At every ``interval``-th step no weight moves; instead each layer loses the share
    ``share / 2 (1 + cos(pi t / T))`` of its live weights of least magnitude, and as many come back where the gradient,
    that of removed weights included, is largest: at zero, without momentum. ``T`` is ``until`` of all steps.

    Args:
        plan: `Unstructured` sets, whose numbers of weights each layer keeps. model: left with zeros, without masks.

    Returns:
        As `fit`.

    Raises:
        TrainingError: other sets, which single weights would leave, an interval below 1, or shares outside [0, 1].

    >>> from lib import constraint, data, models, pruning, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> plan = pruning.uniform_plan(model, pruning.Unstructured(0.9))
    >>> log = recipes.rigl(model, plan, images, epochs=4, interval=2, lr=0.05)
    >>> round(constraint.sparsity(model), 4)
    0.9
    """
    if interval < 1 or not 0 <= share <= 1 or not 0 <= until <= 1:
        raise TrainingError(
            f"rigl: {interval=}, {share=}, {until=}: allowed are an interval from 1 and shares in [0, 1]"
        )
    for name, constraint in plan.items():
        if not isinstance(constraint, Unstructured):
            raise TrainingError(f"{name}: rigl moves single weights, {type(constraint).__name__} would be left")
    if fit_options.get("optimizer", "sgd") != "sgd":
        raise TrainingError("rigl: optimizer = 'adam': allowed is 'sgd', whose momentum of new weights is cleared")
    movable(model, plan)
    last = round(until * epochs * steps_per_epoch(data, **fit_options))
    with own_masks(model, plan) as others:
        masks = random_masks(model, plan, seed)
        hook = _Regrow(attach_masks(model, others | masks), masks, interval, share, last)
        return fit(model, data, epochs=epochs, seed=seed, hooks=(*hooks, hook), **fit_options)
