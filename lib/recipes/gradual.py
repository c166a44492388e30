"""Gradual pruning: more and more weights go while one training goes on (Zhu and Gupta, 2017)."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from lib.constraint import Plan, attach_masks, fitted, mask_of, weights
from lib.data import Data
from lib.recipes.common import movable, own_masks
from lib.recipes.rewinding import one_shot
from lib.shapes import prunable
from lib.training import Hook, TrainingError, fit, steps_per_epoch


class _Tighten(Hook):
    """Before some steps the masks shrink to those of the next plan; what is gone stays gone.

    A plan whose step another hook has skipped comes before the next step that there is.
    """

    def __init__(self, plans: Mapping[int, Plan]) -> None:
        self.plans = dict(plans)

    def before_step(self, model: nn.Module, step: int) -> None:
        layers = prunable(model)
        for due in [at for at in self.plans if at <= step]:
            for name, mask in one_shot(model, fitted(model, self.plans.pop(due))).items():
                mask_of(layers[name]).logical_and_(mask)


def gradual(
    model: nn.Module,
    plans: Sequence[Plan],
    data: Data,
    *,
    epochs: int,
    first: float = 0.1,
    last: float = 0.75,
    hooks: tuple[Hook, ...] = (),
    **fit_options: Any,
) -> pd.DataFrame:
    """Prune to one plan after the other while the network trains, in place (Zhu and Gupta, arXiv 1710.01878, 2017).

    One training with one schedule of the learning rate, where `prune_and_tune` begins anew after every pruning. With
    the sparsities of `lib.pruning.cubic` this is the gradual pruning of that paper.

    Args:
        plans: ever tighter ones. model: left with its zeros, without masks.
        first, last: shares of the training. Of n plans the i-th is pruned to at ``first + (last - first) i / n``, so
            that training is dense until shortly after ``first``, and the masks stand still from ``last`` on.

    Returns:
        As `fit`.

    Raises:
        TrainingError: no plan, shares that are not ``0 <= first <= last < 1``, or more plans than there are steps for.

    >>> from lib import constraint, data, models, pruning, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> plans = [pruning.uniform_plan(model, pruning.Unstructured(s)) for s in pruning.cubic(0.9, prunings=3)]
    >>> log = recipes.gradual(model, plans, images, epochs=3, batch_size=20, lr=0.05)
    >>> len(log), round(constraint.sparsity(model), 4)
    (3, 0.9)
    """
    if not plans or not 0 <= first <= last < 1:
        raise TrainingError(
            f"gradual: {len(plans)} plans, {first=}, {last=}: allowed are 1 or more, 0 <= first <= last < 1"
        )
    for plan in plans:
        movable(model, plan)
    steps = epochs * steps_per_epoch(data, **fit_options)
    at = [int((first + (last - first) * (i + 1) / len(plans)) * steps) for i in range(len(plans))]
    if len({*at}) < len(at):
        raise TrainingError(f"gradual: {len(plans)} plans between steps {at[0]} and {at[-1]}: allowed is one a step")
    planned = weights(model, {name: None for plan in plans for name in plan})
    with own_masks(model, *plans) as others:
        attach_masks(model, others | {name: torch.ones_like(w, dtype=torch.bool) for name, w in planned.items()})
        tighten = _Tighten(dict(zip(at, plans, strict=True)))
        log = fit(model, data, epochs=epochs, hooks=(tighten, *hooks), **fit_options)
        tighten.before_step(model, steps if fit_options.get("stop") is None else fit_options["stop"] - 1)
        return log
