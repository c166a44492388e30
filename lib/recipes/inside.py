"""Training in and out of sets that no mask can hold: along their tangents, and by turns with their projection."""

from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lib.constraint import Constraint, Plan, Storage, weights
from lib.data import Data
from lib.recipes.common import Pulling, movable
from lib.sharing import SmartExchange
from lib.training import Hook, TrainingError, evaluate, fit

ROUNDING = 1e-4  # in shares of the largest weight: what thousands of steps in single precision add up to


class _Tangent(Pulling):
    """Every gradient along its set, and a look after every epoch whether the weights are still inside.

    What belongs together is read from the weights at the start: later a block that is free may happen to look like one
    that shares a magnitude, and rounding makes one that does look free.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__(model, plan)
        self.start = {n: w.clone() for n, w in weights(model, plan).items()}
        self.check(model, "before training")

    def pull(self, name: str, parameter: nn.Parameter) -> None:
        parameter.grad.copy_(self.plan[name].tangent(self.start[name], parameter.grad))

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        self.check(model, f"in epoch {epoch + 1}")

    def check(self, model: nn.Module, when: str) -> None:
        for name, w in weights(model, self.plan).items():
            if not self.plan[name].member(w, ROUNDING * float(w.abs().max())):
                raise TrainingError(f"{name} is outside {self.plan[name]} {when}; harden it first, or lower lr")


def retrain_inside(
    model: nn.Module, plan: Plan, data: Data, *, hooks: tuple[Hook, ...] = (), **fit_options: Any
) -> pd.DataFrame:
    """Retrain hardened weights inside their sets: each gradient becomes its part along the set.

    Which weights share a magnitude or an entry stays as it is; what they share is trained. Momentum and, for cones,
    weight decay stay inside as well, so plain SGD does; membership is looked at after every epoch.

    Returns:
        As `fit`.

    Raises:
        TrainingError: sets that couple layers, weight decay with a set that is no cone, weights outside their set, or
            Adam, whose steps have another direction than their gradients.

    >>> from lib import constraint, data, models, pruning, quantization, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> plan = pruning.uniform_plan(model, quantization.binary())
    >>> log = recipes.retrain_inside(constraint.harden(model, plan), plan, images, epochs=1, lr=0.01)
    >>> plan["fc1"].member(model.fc1.weight.detach(), 1e-6)  # still +-a, with another a
    True
    """
    if fit_options.get("optimizer", "sgd") != "sgd":
        raise TrainingError("retrain_inside: optimizer = 'adam' leaves the sets; allowed is 'sgd'")
    for name, c in plan.items():
        if not c.per_layer or (fit_options.get("weight_decay", 0) and not c.cone):
            raise TrainingError(f"{name}: {c} couples layers or is left by weight decay; retrain it otherwise")
    return fit(model, data, hooks=(*hooks, _Tangent(model, plan)), **fit_options)


class _Snap(Hook):
    """Projection every few epochs, and what it changed."""

    def __init__(self, model: nn.Module, plan: Plan, data: Data, interval: int) -> None:
        self.plan, self.data, self.interval = plan, data, interval
        self.parameters = movable(model, plan)
        self.rows: list[dict[str, float]] = []

    @torch.no_grad()
    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        if (epoch + 1) % self.interval:
            return
        free, moved, size, bill = evaluate(model, self.data.validation), 0.0, 0.0, Storage(0)
        for name, w in self.parameters.items():
            z, bits = snapped(self.plan[name], w.detach())
            moved, size = moved + float((w - z).square().sum()), size + float(w.square().sum())
            bill = Storage(*(a + b for a, b in zip(bill, bits, strict=True)))
            w.copy_(z)
        row = {"epoch": epoch + 1, "distance": (moved / max(size, 1e-30)) ** 0.5, "accuracy": free}
        row |= {"hardened_accuracy": evaluate(model, self.data.validation)}
        self.rows.append(row | {f"{k}_bits": v for k, v in bill._asdict().items()})


def snapped(constraint: Constraint, weight: Tensor) -> tuple[Tensor, Storage]:
    """A point of the set, and the bits of that very point: factors can't be told from their product.

    >>> from lib.quantization import binary
    >>> from lib.recipes import snapped
    >>> z, bill = snapped(binary(), torch.tensor([1.0, -3.0]))
    >>> z.tolist(), bill  # a sign each, and the step
    ([2.0, -2.0], Storage(data=2, index=0.0, table=32))
    """
    if isinstance(constraint, SmartExchange):
        factors = constraint.factors(weight)
        return factors.weight, factors.storage(constraint.bits, constraint.basis_bits)
    z = constraint.project(weight)
    return z, constraint.storage_bits(z, 32)


def alternating(
    model: nn.Module,
    plan: Plan,
    data: Data,
    *,
    epochs: int,
    interval: int = 1,
    hooks: tuple[Hook, ...] = (),
    **fit_options: Any,
) -> pd.DataFrame:
    """Epochs of plain training and projections by turns, in place: SmartExchange's retraining (ISCA 2020).

    Ends with a projection. Unlike `straight_through` the weights themselves are moved, so that what a set takes away
    has to grow back; unlike `admm` nothing pulls toward the set in between.

    Returns:
        One row for each projection: ``epoch``, ``distance`` = ||W - Z|| / ||W||, validation ``accuracy`` before and
        ``hardened_accuracy`` after it, and ``data_bits``, ``index_bits``, ``table_bits`` of the planned layers.

    Raises:
        TrainingError: ``epochs`` is not a positive multiple of ``interval``, or sets that couple layers.

    >>> from lib import data, models, quantization, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> log = recipes.alternating(model, {"fc3": quantization.PowerOfTwo(4)}, images, epochs=2, lr=0.05)
    >>> log["epoch"].tolist(), len(model.fc3.weight.abs().unique()) <= 8  # 7 powers and zero
    ([1, 2], True)
    """
    if interval < 1 or epochs < 1 or epochs % interval:
        raise TrainingError(f"alternating: {epochs=}, {interval=}: epochs must be a positive multiple of interval")
    if coupled := [n for n, c in plan.items() if not c.per_layer]:
        raise TrainingError(f"{coupled[0]}: {plan[coupled[0]]} couples layers; alternating takes one at a time")
    snap = _Snap(model, plan, data, interval)
    fit(model, data, epochs=epochs, hooks=(*hooks, snap), **fit_options)
    return pd.DataFrame(snap.rows)
