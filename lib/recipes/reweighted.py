"""Reweighted regularization and group lasso: shrink groups until enough of them vanish."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lib.constraint import Constraint, ConstraintError, Plan, apply, harden, leaf, select, weights
from lib.data import Data
from lib.recipes.admm import split
from lib.shapes import prunable
from lib.training import Hook, Progress, evaluate, fit


def _norms(constraint: Constraint, weight: Tensor) -> Tensor:
    """On every weight, the norm of its group."""
    return constraint.spread_groups(constraint.group_norms(weight), weight)


def _penalized(plan: Plan) -> list[Plan]:
    """The plan's sets of fixed groups, intersections taken apart; anything else is refused."""
    for name, constraint in plan.items():
        for part in constraint.parts:
            if not hasattr(part, "group_norms"):
                raise ConstraintError(
                    f"{name}: {type(part).__name__} has no fixed groups that a penalty could shrink "
                    "during training; use admm"
                )
    return split(plan) if any(len(c.parts) > 1 for c in plan.values()) else [plan]


class _Shrink(Hook):
    """The proximal step of ``strength * sum_G alpha_G * ||W_G||`` after every step of the optimizer.

    ``W_G <- W_G * max(0, 1 - lr * strength * alpha_G / ||W_G||)``. It solves what the papers write without the
    oscillation of a subgradient around zero, so that groups vanish exactly and no threshold has to be chosen.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, data: Data, strength: dict[str, float], lr: float, eps: float, interval: int
    ) -> None:
        self.plan, self.data, self.strength, self.lr, self.eps, self.interval = plan, data, strength, lr, eps, interval
        self.penalties = _penalized(plan)
        w = weights(model, plan)
        norms = [apply(p, {n: w[n] for n in p}, _norms) for p in self.penalties]
        self.scale = [{n: float(v.mean()) for n, v in norm.items()} for norm in norms]
        self.alpha = [
            {n: torch.full_like(v, 1 / self.scale[i][n]) for n, v in norm.items()} for i, norm in enumerate(norms)
        ]
        self.parameters = {n: leaf(layer) for n, layer in prunable(model).items() if n in plan}
        self.due = False  # whether the optimizer has moved the weights since the last proximal step
        self.rows: list[dict[str, float]] = []

    def before_step(self, model: nn.Module, step: int) -> None:
        if self.due:
            self._shrink()
        self.due = True

    @torch.no_grad()
    def _shrink(self) -> None:
        for penalty, alpha in zip(self.penalties, self.alpha, strict=True):
            norms = apply(penalty, {n: self.parameters[n] for n in penalty}, _norms)
            for n, norm in norms.items():
                factor = 1 - self.lr * self.strength[n] * alpha[n] / norm.clamp(min=1e-30)
                self.parameters[n].mul_(factor.clamp_(min=0))

    @torch.no_grad()
    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        self._shrink()
        self.due = False
        w = weights(model, self.plan)
        if self.interval and (epoch + 1) % self.interval == 0:
            for i, penalty in enumerate(self.penalties):
                norms = apply(penalty, {n: w[n] for n in penalty}, _norms)
                self.alpha[i] = {n: 1 / (v + self.eps * self.scale[i][n]) for n, v in norms.items()}
        z = harden(deepcopy(model), self.plan)
        size = sum(t.square().sum() for t in w.values())
        lost = size - sum(t.square().sum() for t in weights(z, self.plan).values())
        self.rows.append(
            {
                "epoch": epoch + 1,
                "distance": float((lost.clamp(min=0) / size.clamp(min=1e-30)).sqrt()),
                "accuracy": evaluate(model, self.data.validation),
                "hardened_accuracy": evaluate(z, self.data.validation),
                **{f"density/{n}": float((t != 0).float().mean()) for n, t in w.items()},
            }
        )


def reweighted(
    model: nn.Module,
    plan: Plan,
    data: Data,
    *,
    strength: float | Mapping[str, float],
    epochs: int,
    lr: float,
    interval: int = 1,
    eps: float = 0.01,
    hooks: tuple[Hook, ...] = (),
    progress: Progress | None = None,
    **fit_options: Any,
) -> pd.DataFrame:
    """Reweighted group lasso toward a plan, in place, from a trained model (arXiv 2004.05531). Leaves ``P_S(W)``.

    Minimizes the loss plus ``strength * sum_G alpha_G * ||W_G||`` over the groups of every layer's set, and refreshes
    ``alpha_G = 1 / (||W_G|| + eps * mean norm)`` every ``interval`` epochs: a group that has become small is pushed
    harder, a large one is let go. ``interval = 0`` never refreshes, which is the group lasso. How much vanishes is an
    outcome of ``strength``, and `search_strength` finds one; the projection at the end meets the budget in any case.
    Plans of intersections (filters and columns) penalize the groups of each part. Masks are up to the caller.

    Args:
        strength: lambda, for all layers or by layer name.
        lr: constant; the released code's threshold of 1e-4 is not needed, as the proximal step makes exact zeros.
        eps: relative to the layer's mean group norm before training, so that one value suits all group sizes.
        hooks: of `fit`, before the penalty's own.

    Returns:
        One row per epoch: ``epoch``, ``distance`` = ||W - P_S(W)|| / ||W||, validation ``accuracy`` of W and
        ``hardened_accuracy`` of P_S(W), and the ``density/<layer>`` of what the penalty has left.

    Raises:
        ConstraintError: a set without fixed groups (patterns, adaptive blocks): A.4 item 6.
        ValueError: a negative strength or interval, or one that names no layer of the plan.

    >>> from lib import data, models, pruning, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> plan = {"fc1": pruning.Filter(0.8)}
    >>> log = recipes.reweighted(model, plan, images, strength=0.1, epochs=2, lr=0.05)
    >>> int(model.fc1.weight.any(1).sum())  # 300 filters
    60
    """
    by_layer = dict(strength) if isinstance(strength, Mapping) else dict.fromkeys(plan, strength)
    if set(by_layer) != set(plan) or min(by_layer.values()) < 0 or interval < 0 or eps <= 0:
        raise ValueError(f"reweighted: {strength=}, {interval=}, {eps=}: allowed are numbers from 0 for every layer")
    shrink = _Shrink(model, plan, data, by_layer, lr, eps, interval)
    fit_options |= {"schedule": "constant", "hooks": (*hooks, shrink)}
    fit(model, data, epochs=epochs, lr=lr, progress=progress, **fit_options)
    harden(model, plan)
    return pd.DataFrame(shrink.rows)


def search_strength(
    model: nn.Module,
    plan: Plan,
    data: Data,
    *,
    trials: int = 5,
    start: float = 0.3,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, float]:
    """The lambda of each layer at which `reweighted` leaves about the plan's budget, by bisection on its logarithm.

    Every trial trains a copy of ``model`` with ``options``, so the search costs ``trials * epochs``; the model itself
    does not move. A layer that has kept more than its budget gets a larger lambda, one that has kept less a smaller.

    Args:
        start: first lambda, in units of the squared mean group norm of the layer: the relative shrinkage of a mean
            group over a time of ``1 / lr`` steps.

    Raises:
        ConstraintError: as `reweighted`.
        ValueError: ``trials`` below 1.

    >>> from lib import data, models, pruning, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model, plan = models.build("lenet300", images.shape, images.classes), {"fc1": pruning.Filter(0.8)}
    >>> options = {"trials": 1, "epochs": 1, "lr": 0.05}
    >>> found = [recipes.search_strength(model, plan, images, start=start, **options)["fc1"] for start in (1e-6, 1e3)]
    >>> round(found[1] / found[0])  # the first leaves all filters and goes up tenfold, the second none and goes down
    10000000
    """
    if trials < 1:
        raise ValueError(f"search_strength: {trials=}: allowed are whole numbers from 1")
    w = weights(model, plan)
    target = {n: float(m.float().mean()) for n, m in select(plan, w).items()}
    squares = [apply(p, {n: w[n] for n in p}, _norms) for p in _penalized(plan)]
    strength = {n: start * float(squares[0][n].mean()) ** 2 for n in plan}
    low, high = dict.fromkeys(plan, 0.0), dict.fromkeys(plan, float("inf"))
    for trial in range(trials):
        report = None
        if progress:
            report = lambda done, text, t=trial: progress((t + done) / trials, f"trial {t + 1}: {text}")  # noqa: E731
        log = reweighted(deepcopy(model), plan, data, strength=strength, progress=report, **options)
        for n, value in strength.items():
            too_dense = log[f"density/{n}"].iloc[-1] > target[n]
            low[n], high[n] = (value, high[n]) if too_dense else (low[n], value)
        strength = {n: _between(low[n], high[n]) for n in plan}
    return strength


def _between(low: float, high: float) -> float:
    """The geometric middle of a bracket; ten times past an end that is open."""
    if high == float("inf"):
        return 10 * low
    return (low * high) ** 0.5 if low else high / 10
