"""ADMM toward a plan, with one auxiliary pair a layer or several, and in steps of tightening budgets."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn

from lib.constraint import Masks, Plan, State, attach_masks, fitted, harden, project, weights
from lib.data import Data
from lib.models import copied
from lib.recipes.common import Pulling, movable, own_masks, part
from lib.recipes.quantizing import straight_through
from lib.recipes.rewinding import one_shot
from lib.shapes import prunable
from lib.training import Hook, Progress, TrainingError, evaluate, fit


def split(plan: Plan) -> list[Plan]:
    """The plan as several of simpler sets, whose intersection it is: `Constraint.parts` of every layer.

    Raises:
        TrainingError: no constraint of the plan has more than one part.

    >>> from lib.pruning import FilterColumn
    >>> from lib.recipes import split
    >>> split({"fc1": FilterColumn(0.5, 0.25)})
    [{'fc1': Filter(sparsity=0.5, coupled='')}, {'fc1': Column(sparsity=0.25)}]
    """
    most = max(len(constraint.parts) for constraint in plan.values())
    if most == 1:
        kinds = ", ".join(sorted({type(constraint).__name__ for constraint in plan.values()}))
        raise TrainingError(f"pairs = 'split': {kinds} is one set, not an intersection; use pairs = 'joint'")
    return [{name: c.parts[i] for name, c in plan.items() if i < len(c.parts)} for i in range(most)]


class _Pair:
    """An auxiliary pair ``(Z, U)`` for the layers of a plan."""

    def __init__(self, plan: Plan, w: State) -> None:
        self.plan = plan
        self.z = project(plan, {n: w[n] for n in plan})  # Z_0 = P_S(W): with Z_0 = W the first interval has no pull
        self.u = {n: torch.zeros_like(z) for n, z in self.z.items()}
        self.target = {n: z.clone() for n, z in self.z.items()}  # Z - U

    def update(self, w: State) -> State:
        """The Z- and U-steps; returns the Z before them."""
        before, self.z = self.z, project(self.plan, {n: w[n] + u for n, u in self.u.items()})
        for n, u in self.u.items():
            u += w[n] - self.z[n]
        return before

    def retarget(self, divisor: float) -> None:
        self.u = {n: u / divisor for n, u in self.u.items()}
        self.target = {n: self.z[n] - u for n, u in self.u.items()}


class _Pull(Pulling):
    """The ADMM iteration as a hook: the penalty's pull at every step, the Z- and U-steps every ``interval`` epochs.

    The gradient of ``rho/2 * ||W - Z + U||^2`` is ``rho * (W - (Z - U))``; it is added to ``.grad`` directly, which
    is cheaper than a second loss term through autograd (tests/benchmarks/admm_step.py prints both).
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        data: Data,
        interval: int,
        rho: float,
        rho_growth: float,
        rho_max: float,
        rescale_u: bool,
        pairs: Literal["joint", "split"] = "joint",
    ) -> None:
        super().__init__(model, plan)
        self.data, self.interval = data, interval
        self.rho, self.rho_growth, self.rho_max, self.rescale_u = rho, rho_growth, rho_max, rescale_u
        w = weights(model, plan)
        self.pairs = [_Pair(part, w) for part in (split(plan) if pairs == "split" else [plan])]
        self.rows: list[dict[str, float]] = []

    def pull(self, name: str, parameter: nn.Parameter) -> None:
        for pair in self.pairs:
            if name in pair.target:
                parameter.grad.add_(parameter, alpha=self.rho).sub_(pair.target[name], alpha=self.rho)

    @torch.no_grad()
    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        if (epoch + 1) % self.interval:
            return
        w = weights(model, self.plan)
        before = [pair.update(w) for pair in self.pairs]
        self.rows.append(self._diagnostics(model, epoch + 1, w, before))
        growth = min(self.rho_growth, self.rho_max / self.rho) if self.rho < self.rho_max else 1.0
        self.rho *= growth
        for pair in self.pairs:
            pair.retarget(growth if self.rescale_u else 1.0)

    def _diagnostics(self, model: nn.Module, epoch: int, w: State, before: list[State]) -> dict[str, float]:
        apart = {n: sum((w[n] - p.z[n]).square().sum() for p in self.pairs if n in p.z) for n in w}
        moved = sum((p.z[n] - z[n]).square().sum() for p, z in zip(self.pairs, before, strict=True) for n in z)
        size = {n: t.square().sum() for n, t in w.items()}
        return {
            "epoch": epoch,
            "rho": self.rho,
            "distance": float((sum(apart.values()) / sum(size.values()).clamp(min=1e-30)).sqrt()),
            "dual_residual": self.rho * float(moved.sqrt()),
            "accuracy": evaluate(model, self.data.validation),
            "hardened_accuracy": evaluate(harden(copied(model), self.plan), self.data.validation),
            **{f"distance/{n}": float((apart[n] / size[n].clamp(min=1e-30)).sqrt()) for n in w},
        }


def admm(
    model: nn.Module,
    plan: Plan,
    data: Data,
    *,
    epochs: int,
    interval: int = 1,
    rho: float = 1e-3,
    rho_growth: float = 1.3,
    rho_max: float = 0.1,
    rescale_u: bool = False,
    pairs: Literal["joint", "split"] = "joint",
    schedule: str = "constant",
    hooks: tuple[Hook, ...] = (),
    **fit_options: Any,
) -> pd.DataFrame:
    """ADMM toward a plan, in place, from a trained model (Zhang et al., ECCV 2018). Leaves ``W <- P_S(W)``.

    W-step: ``interval`` epochs of the loss plus ``rho/2 * ||W - Z + U||^2``; then ``Z = P_S(W + U)`` and
    ``U = U + W - Z``; ``rho`` grows by ``rho_growth`` up to ``rho_max``. Masked retraining is up to the caller:
    ``masks = one_shot(model, plan)``, `attach_masks`, and `fit` with its fresh optimizer. Masks that are attached
    beforehand stay: ADMM then moves inside them.

    Args:
        epochs: in all; a multiple of ``interval``.
        rescale_u: divide ``U`` by the growth of ``rho``, as scaled ADMM asks for and the released code does not.
        pairs: ``split`` gives each part of an intersection (`Constraint.parts`) an auxiliary pair of its own, as PatDNN
            does for patterns and connectivity; ``joint`` projects onto the intersection.

    Returns:
        One row per Z-step: ``epoch``, ``rho``, ``distance`` = ||W - Z|| / ||W|| (and per layer; over all pairs),
        ``dual_residual`` = rho * ||Z_new - Z_old||, validation ``accuracy`` of W and ``hardened_accuracy`` of P_S(W).
        A run that works shows the two accuracies meet.

    Raises:
        TrainingError: ``epochs`` is not a positive multiple of ``interval``, rho or its growth is out of range, or
            ``split`` pairs for a plan without intersections.

    >>> from lib import constraint, data, models, pruning, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> plan = pruning.uniform_plan(model, pruning.Unstructured(0.9))
    >>> log = recipes.admm(model, plan, images, epochs=4, interval=2, lr=0.05, rho=0.01, rho_growth=1.5)
    >>> log["epoch"].tolist(), log["rho"].tolist(), round(constraint.sparsity(model), 3)
    ([2, 4], [0.01, 0.015], 0.9)
    """
    if interval < 1 or epochs < 1 or epochs % interval:
        raise TrainingError(f"admm: {epochs=}, {interval=}: epochs must be a positive multiple")
    if not 0 < rho <= rho_max or rho_growth < 1:
        raise TrainingError(f"admm: {rho=}, {rho_max=}, {rho_growth=}: allowed are 0 < rho <= rho_max, rho_growth >= 1")
    if pairs not in ("joint", "split"):
        raise TrainingError(f"admm: {pairs=}: allowed are 'joint' and 'split'")
    pull = _Pull(model, plan, data, interval, rho, rho_growth, rho_max, rescale_u, pairs)
    fit(model, data, epochs=epochs, schedule=schedule, hooks=(*hooks, pull), **fit_options)
    harden(model, plan)
    return pd.DataFrame(pull.rows)


def progressive(
    model: nn.Module,
    plans: Sequence[Plan],
    data: Data,
    *,
    search: Mapping[str, Any],
    retrain: Mapping[str, Any],
    progress: Progress | None = None,
    **fit_options: Any,
) -> pd.DataFrame:
    """Progressive ADMM: plans that tighten, each inside the support of the one before (arXiv 1903.09769).

    ``model`` comes in trained; weights that are zero in it stay so. Each step fits its plan to the weights as they are,
    runs `admm` toward it with the zeros held, and retrains inside the support: sets of values straight through their
    projection (`straight_through`), the others freely. So rates can rise, bits can fall, or both. Budgets are absolute.
    The model is left unmasked, a member of the last plan; a chain goes on where the last call left it.

    Args:
        plans: of tightening rates, of falling bits, ...; adaptive sets (`LayerAdaptive`, levels without a step) are
            fitted at their step.
        search: options of `admm` for each step (``epochs``, ``lr``, ``rho``, ...). retrain: of `fit`.

    Returns:
        The rows of `admm` with a column ``step``, from 1.

    Raises:
        TrainingError: no plan. ConstraintError: one that cannot be.

    >>> from lib import constraint, data, models, pruning, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> plans = [pruning.uniform_plan(model, pruning.Unstructured(sparsity)) for sparsity in (0.5, 0.8)]
    >>> log = recipes.progressive(model, plans, images, search={"epochs": 1}, retrain={"epochs": 1}, lr=0.05)
    >>> log["step"].tolist(), round(constraint.sparsity(model), 3)
    ([1, 2], 0.8)
    """
    if not plans:
        raise TrainingError("progressive: at least one plan is needed")
    for plan in plans:
        movable(model, plan)
    inside = {name: w != 0 for name, w in weights(model, dict.fromkeys(prunable(model))).items()}
    logs = []
    with own_masks(model, *plans) as others:
        attach_masks(model, others | {name: m for name, m in inside.items() if not m.all()})
        for i, plan in enumerate(plans):
            plan, step = fitted(model, plan), f"step {i + 1} of {len(plans)}"
            report = part(progress, 2 * i, 1, 2 * len(plans), step)
            logs.append(admm(model, plan, data, progress=report, **fit_options | search).assign(step=i + 1))
            inside |= {name: m & inside[name] for name, m in _support(model, plan).items()}
            attach_masks(model, others | {name: m for name, m in inside.items() if not m.all()})
            values = {name: c for name, c in plan.items() if not c.masklike}
            train = partial(straight_through, plan=values) if values else fit
            report = part(progress, 2 * i + 1, 1, 2 * len(plans), f"{step}, retraining")
            train(model, data=data, progress=report, **fit_options | retrain)
    return pd.concat(logs, ignore_index=True)


def _support(model: nn.Module, plan: Plan) -> Masks:
    """What a network in its plan's sets may still move: the masks of supports, the nonzeros of values."""
    supports = {name: c for name, c in plan.items() if c.masklike}
    values = {name: c for name, c in plan.items() if not c.masklike}
    found = one_shot(model, supports) if supports else {}
    return found | ({name: w != 0 for name, w in weights(model, values).items()} if values else {})
