"""Group lasso that leaves strong groups alone, with or without ternary weights (Yang, He and Fan, AAAI 2020)."""

from typing import Any

import pandas as pd
import torch
from torch import nn

from lib.constraint import ConstraintError, Plan, leaf, weights
from lib.data import Data
from lib.pruning.groups import Groups
from lib.quantization import TernaryRule, branch
from lib.recipes.quantizing import straight_through
from lib.shapes import prunable
from lib.training import Hook, Progress, TrainingError, evaluate, fit, learning_rate


class _ClippedLasso(Hook):
    """The proximal step of ``strength * m0 * sum_G min(|W_G|, clip * m)``, ``m`` the layer's mean norm of a group.

    A group beyond the clip has no gradient and stays; one within shrinks by the same length, whatever its norm: by
    ``lr * strength`` in shares of ``m0``, the mean norm at the start, so that layers of all scales shrink at one pace.
    """

    def __init__(self, model: nn.Module, plan: Plan, data: Data, strength: float, clip: float | None, rate) -> None:
        self.plan, self.data, self.strength, self.clip, self.rate = plan, data, strength, clip, rate
        self.parameters = {n: leaf(layer) for n, layer in prunable(model).items() if n in plan}
        self.mean = {n: float(plan[n].group_norms(w.detach()).mean()) for n, w in self.parameters.items()}
        self.due: int | None = None  # the step whose proximal step has not been taken yet
        self.rows: list[dict[str, float]] = []

    def before_step(self, model: nn.Module, step: int) -> None:
        if self.due is not None:
            self._shrink(self.due)
        self.due = step

    @torch.no_grad()
    def _shrink(self, step: int) -> None:
        for name, w in self.parameters.items():
            groups = self.plan[name]
            norms = groups.group_norms(w)
            shrink = (1 - self.rate(step) * self.strength * self.mean[name] / norms.clamp(min=1e-30)).clamp(min=0)
            if self.clip is not None:
                shrink = torch.where(norms < self.clip * norms[norms > 0].mean(), shrink, 1.0)
            w.mul_(groups.spread_groups(shrink, w))

    @torch.no_grad()
    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        self._shrink(self.due)
        self.due = None
        row = {"epoch": epoch + 1, "accuracy": evaluate(model, self.data.validation)}
        for name, w in self.parameters.items():
            norms = self.plan[name].group_norms(w)
            scale, threshold = branch(w, TernaryRule.beta)
            row |= {f"tiles/{name}": float((norms > 0).float().mean())}
            row |= {f"scale/{name}": scale, f"threshold/{name}": threshold}
        self.rows.append(row)


def group_lasso(
    model: nn.Module,
    plan: Plan,
    data: Data,
    *,
    strength: float,
    epochs: int,
    lr: float,
    clip: float | None = None,
    values: Plan | None = None,
    schedule: str = "cosine",
    progress: Progress | None = None,
    **fit_options: Any,
) -> pd.DataFrame:
    """Shrink groups while training, in place: plain group lasso, or with weight penalty clipping (``clip``).

    Minimizes the loss plus ``strength * sum_G m_l |W_G|``, ``m_l`` the mean norm of a group in its layer at the start.

    Weight penalty clipping (Yang, He and Fan, AAAI 2020) pushes only groups whose norm is below ``clip`` times the
    layer's mean norm at that step (of groups that are left), so that the strong ones, whose statistics set ternary
    thresholds and scales, are not shrunk along. That threshold is a reconstruction: the paper's is not known. As in
    `reweighted` the penalty acts as a proximal step, so groups vanish exactly; an order of the plan's sets says which
    to keep of those that are left (`one_shot`).

    Args:
        plan: sets of fixed groups, `Groups`; their budgets are not used here.
        strength: of the penalty; 1 shrinks a group of the layer's mean norm to nothing in ``1 / lr`` steps.
        values: levels to train through at the same time (`straight_through`); the latent weights are shrunk.

    Returns:
        One row an epoch: validation ``accuracy``, and for each layer ``tiles/`` (share of groups that are left),
        ``scale/`` and ``threshold/`` that `TernaryRule` would find for the latent weights.

    Raises:
        ConstraintError: sets without fixed groups. TrainingError: a strength that is negative, or a clip not above 0.

    >>> from lib import data, models, pruning, recipes
    >>> images, left = data.load(train_size=200, test_size=100, validation_size=100), []
    >>> for clip in (None, 1.0):  # clipped, what is stronger than the mean stays
    ...     model, plan = models.build("lenet300", images.shape, images.classes), {"fc1": pruning.PETile(0.5, 10, 28)}
    ...     log = recipes.group_lasso(model, plan, images, strength=2.0, epochs=1, lr=0.1, batch_size=20, clip=clip)
    ...     left.append(float(log["tiles/fc1"].iloc[-1]))
    >>> left[0] < 0.3 < left[1] < 0.7
    True
    """
    if strength < 0 or (clip is not None and clip <= 0):
        raise TrainingError(f"group_lasso: {strength=}, {clip=}: allowed are a strength >= 0, and a clip > 0 or None")
    for name, c in plan.items():
        if not isinstance(c, Groups):
            raise ConstraintError(f"{name}: {type(c).__name__} has no fixed groups that a penalty could shrink")
    weights(model, plan)
    steps = epochs * -(-len(data.train) // fit_options.get("batch_size", 128))
    rate = lambda step: learning_rate(schedule, lr, step / steps)  # noqa: E731
    hook = _ClippedLasso(model, plan, data, strength, clip, rate)
    options = fit_options | {"epochs": epochs, "lr": lr, "schedule": schedule, "hooks": (hook,), "progress": progress}
    if values:
        straight_through(model, values, data, **options)
    else:
        fit(model, data, **options)
    return pd.DataFrame(hook.rows)
