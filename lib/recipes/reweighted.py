"""Group lasso, reweighted or with strong groups left alone: shrink groups until enough of them vanish."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lib.constraint import Constraint, Plan, apply, harden, project, select, weights
from lib.data import Data
from lib.models import copied
from lib.quantization import TernaryRule, branch
from lib.recipes.admm import split
from lib.recipes.common import movable, part
from lib.recipes.quantizing import straight_through
from lib.training import Hook, Progress, TrainingError, evaluate, fit


def _norms(constraint: Constraint, weight: Tensor) -> Tensor:
    """On every weight, the norm of its group."""
    return constraint.spread_groups(constraint.group_norms(weight), weight)


def _penalized(plan: Plan) -> list[Plan]:
    """The plan's sets of fixed groups, intersections taken apart; anything else is refused."""
    for name, constraint in plan.items():
        for single in constraint.parts:
            if not hasattr(single, "group_norms"):
                raise TrainingError(
                    f"{name}: {type(single).__name__} has no fixed groups that a penalty could shrink "
                    "during training; use admm"
                )
    return split(plan) if any(len(c.parts) > 1 for c in plan.values()) else [plan]


class _Shrink(Hook):
    """The proximal step of ``strength * sum_G alpha_G * m * ||W_G||`` after every step of the optimizer.

    ``W_G <- W_G * max(0, 1 - lr * strength * alpha_G * m / ||W_G||)``, ``m`` the layer's mean norm of a group at the
    start. It solves what the papers write without the oscillation of a subgradient around zero, so that groups vanish
    exactly and no threshold has to be chosen.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        data: Data,
        strength: Mapping[str, float],
        eps: float = 0.01,
        interval: int = 1,
        clip: float | None = None,
    ) -> None:
        self.plan, self.data, self.strength = plan, data, strength
        self.eps, self.interval, self.clip = eps, interval, clip
        self.parameters, self.penalties = movable(model, plan), _penalized(plan)
        self.scale = [{n: float(norm.mean()) for n, norm in norms.items()} for norms in self.norms()]
        self.alpha = [dict.fromkeys(scale, 1.0) for scale in self.scale]
        self.lr = 0.0  # of the step since which no proximal step was taken
        self.rows: list[dict[str, float]] = []

    @torch.no_grad()
    def norms(self) -> list[dict[str, Tensor]]:
        return [apply(p, {n: self.parameters[n] for n in p}, _norms) for p in self.penalties]

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def before_step(self, model: nn.Module, step: int) -> None:
        self.shrink()

    def after_backward(self, model: nn.Module, step: int) -> None:
        self.lr = self.optimizer.param_groups[0]["lr"]

    @torch.no_grad()
    def shrink(self) -> None:
        if not self.lr:
            return
        for i, penalty in enumerate(self.penalties):  # the second meets what the first has left
            norms = apply(penalty, {n: self.parameters[n] for n in penalty}, _norms)
            for n, norm in norms.items():
                pull = self.lr * self.strength[n] * self.scale[i][n] * self.alpha[i][n]
                factor = (1 - pull / norm.clamp(min=1e-30)).clamp(min=0)
                if self.clip is not None:
                    factor = torch.where(norm < self.clip * norm[norm > 0].mean(), factor, 1.0)
                self.parameters[n].mul_(factor)
        self.lr = 0.0

    @torch.no_grad()
    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        self.shrink()
        if self.interval and (epoch + 1) % self.interval == 0:
            for i, norms in enumerate(self.norms()):
                self.alpha[i] = {n: 1 / (v / self.scale[i][n] + self.eps) for n, v in norms.items()}
        row = {"epoch": epoch + 1, "accuracy": evaluate(model, self.data.validation)}
        row["hardened_accuracy"] = evaluate(harden(copied(model), self.plan), self.data.validation)
        apart = size = 0.0
        for name, z in project(self.plan, self.parameters).items():
            w = self.parameters[name]
            apart, size = apart + float((w - z).square().sum()), size + float(w.square().sum())
            scale, threshold = branch(w, TernaryRule.beta)
            row |= {f"density/{name}": float((w != 0).float().mean())}
            row |= {f"scale/{name}": scale, f"threshold/{name}": threshold}
        self.rows.append(row | {"distance": (apart / max(size, 1e-30)) ** 0.5})


def reweighted(
    model: nn.Module,
    plan: Plan,
    data: Data,
    *,
    strength: float | Mapping[str, float],
    interval: int = 1,
    eps: float = 0.01,
    clip: float | None = None,
    values: Plan | None = None,
    schedule: str = "constant",
    hooks: tuple[Hook, ...] = (),
    **fit_options: Any,
) -> pd.DataFrame:
    """Reweighted group lasso toward a plan, in place, from a trained model (arXiv 2004.05531). Leaves ``P_S(W)``.

    Minimizes the loss plus ``strength * sum_G alpha_G m |W_G|`` over the groups of every layer's set, ``m`` the mean
    norm of a group in the layer at the start, so that layers of all scales shrink at one pace. ``alpha_G`` is 1, and
    after every ``interval`` epochs ``1 / (|W_G| / m + eps)``: a group that has become small is pushed harder, a large
    one is let go. ``interval = 0`` never refreshes it, which is the group lasso. How much vanishes is an outcome, and
    `search_strength` finds a strength; the projection at the end meets the budget in any case. Plans of intersections
    (filters and columns) penalize the groups of each part. Masks are up to the caller.

    Weight penalty clipping (``clip``; Yang, He and Fan, AAAI 2020) pushes only groups whose norm is below ``clip``
    times the mean of the layer's groups that are left, so that the strong ones, whose statistics set ternary thresholds
    and scales, are not shrunk along. That threshold is a reconstruction: the paper's is not known.

    Args:
        strength: for all layers or by layer name; 1 shrinks a group of mean norm to nothing in ``1 / lr`` steps.
        values: levels to train through at the same time (`straight_through`); the latent weights are shrunk.

    Returns:
        One row per epoch: ``epoch``, ``distance`` = ||W - P_S(W)|| / ||W||, validation ``accuracy`` of W and
        ``hardened_accuracy`` of P_S(W); for each layer ``density/``, what the penalty has left, and the ``scale/`` and
        ``threshold/`` that `TernaryRule` would find. With values, W are the latent weights and accuracies those of
        their levels.

    Raises:
        TrainingError: a set without fixed groups (patterns, adaptive blocks), a negative strength or
            interval, a clip not above 0, a strength that names no layer of the plan.

    >>> from lib import data, models, pruning, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> log = recipes.reweighted(model, {"fc1": pruning.Filter(0.8)}, images, strength=1.0, epochs=2, lr=0.05)
    >>> int(model.fc1.weight.any(1).sum())  # 300 filters
    60
    """
    strength = dict(strength) if isinstance(strength, Mapping) else dict.fromkeys(plan, strength)
    if set(strength) != set(plan) or not min(strength.values()) >= 0 or interval < 0 or not eps > 0:
        raise TrainingError(f"reweighted: {strength=}, {interval=}, {eps=}: allowed are numbers from 0 for every layer")
    if clip is not None and not clip > 0:
        raise TrainingError(f"reweighted: {clip=}: allowed are numbers > 0, or None")
    shrink = _Shrink(model, plan, data, strength, eps, interval, clip)
    fit_options |= {"schedule": schedule, "hooks": (*hooks, shrink)}
    if values:
        straight_through(model, values, data, **fit_options)
    else:
        fit(model, data, **fit_options)
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

    Raises:
        TrainingError: as `reweighted`, or ``trials`` below 1.

    >>> from lib import data, models, pruning, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model, plan = models.build("lenet300", images.shape, images.classes), {"fc1": pruning.Filter(0.8)}
    >>> options = {"trials": 1, "epochs": 1, "lr": 0.05}
    >>> found = [recipes.search_strength(model, plan, images, start=start, **options)["fc1"] for start in (1e-6, 1e3)]
    >>> round(found[1] / found[0])  # the first leaves all filters and goes up tenfold, the second none and goes down
    10000000
    """
    if trials < 1 or not start > 0:
        raise TrainingError(f"search_strength: {trials=}, {start=}: allowed are whole numbers from 1, and a start > 0")
    target = {n: float(m.float().mean()) for n, m in select(plan, weights(model, plan)).items()}
    strength, low, high = (dict.fromkeys(plan, value) for value in (start, 0.0, float("inf")))
    for trial in range(trials):
        options["progress"] = part(progress, trial, 1, trials, f"trial {trial + 1}")
        log = reweighted(copied(model), plan, data, strength=strength, **options)
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
