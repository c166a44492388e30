"""Training schemes toward a plan: one-shot, iterative with rewinding, and ADMM.

Each recipe works on a model in place, for any plan whose constraints it makes sense for, and leaves the masks or
the weights that training goes on from. The loop is always `lib.training.fit`; recipes only hook into it.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lib.constraint import Masks, Plan, attach_masks, detach_masks, harden, leaf, project, select, weights
from lib.data import Data
from lib.models import prunable
from lib.training import Hook, Progress, evaluate, fit

State = dict[str, Tensor]


def state_of(model: nn.Module) -> State:
    """A copy of a network's parameters and buffers under the names of the unmasked network, zeros baked in."""
    return deepcopy(detach_masks(deepcopy(model)).state_dict())


def layer_weights(state: State, layers: Iterable[str]) -> dict[str, Tensor]:
    """The weights of some layers out of a `state_of` a network, by layer name: what `lib.pruning.correlation` takes."""
    return {name: state[f"{name}.weight"] for name in layers}


def rewind(model: nn.Module, state: State, masks: Masks | None = None) -> nn.Module:
    """Set every parameter and buffer (batch norm included) to ``state``, then hold ``masks``. Returns the model.

    The lottery ticket is ``rewind(model, theta_0, m)``, fine-tuning starts from ``rewind(model, theta_T, m)``.
    """
    detach_masks(model).load_state_dict(state)
    return attach_masks(model, masks or {})


def one_shot(model: nn.Module, plan: Plan) -> Masks:
    """Masks of the projection of the weights as they are: for `Unstructured`, magnitude pruning in one step."""
    return select(plan, weights(model, plan))


def iterative(
    model: nn.Module,
    plans: Sequence[Plan],
    data: Data,
    start: State,
    *,
    progress: Progress | None = None,
    **fit_options: Any,
) -> list[Masks]:
    """Iterative magnitude pruning with rewinding (Frankle and Carbin 2019; papers/pruning.md section 2).

    ``model`` comes in trained. Each round prunes it to the next, tighter plan, rewinds what is left to ``start``
    (``theta_0``, or ``theta_k``) and trains it again; the last plan's mask needs no training after it. So the search
    costs ``(len(plans) - 1) * epochs`` on top of the dense training, and the mask of plan ``i`` costs ``i * epochs``.

    Returns:
        The masks of every plan, each inside the one before it.
    """
    found: list[Masks] = []
    for i, plan in enumerate(plans):
        if i:
            report = None
            if progress:
                report = lambda done, text, i=i: progress((i - 1 + done) / (len(plans) - 1), f"round {i}: {text}")  # noqa: E731
            fit(model, data, progress=report, **fit_options)
        masks = one_shot(model, plan)
        if found:  # a survivor that became exactly zero must not be traded for a removed weight
            masks = {name: m & found[-1].get(name, m) for name, m in masks.items()}
        found.append(masks)
        rewind(model, start, masks)
    detach_masks(model)
    return found


class _Pull(Hook):
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
    ) -> None:
        self.plan, self.data, self.interval = plan, data, interval
        self.rho, self.rho_growth, self.rho_max, self.rescale_u = rho, rho_growth, rho_max, rescale_u
        self.parameters = {n: leaf(layer) for n, layer in prunable(model).items() if n in plan}
        self.z = project(plan, weights(model, plan))  # Z_0 = P_S(W): with Z_0 = W the first interval has no pull
        self.u = {n: torch.zeros_like(z) for n, z in self.z.items()}
        self.target = {n: z.clone() for n, z in self.z.items()}  # Z - U
        self.rows: list[dict[str, float]] = []

    @torch.no_grad()
    def after_backward(self, model: nn.Module, step: int) -> None:
        for name, w in self.parameters.items():
            w.grad.add_(w, alpha=self.rho).sub_(self.target[name], alpha=self.rho)

    @torch.no_grad()
    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        if (epoch + 1) % self.interval:
            return
        w = weights(model, self.plan)
        z_before, self.z = self.z, project(self.plan, {n: w[n] + self.u[n] for n in w})
        for n in w:
            self.u[n] += w[n] - self.z[n]
        self.rows.append(self._diagnostics(model, epoch + 1, w, z_before))
        growth = min(self.rho_growth, self.rho_max / self.rho) if self.rho < self.rho_max else 1.0
        self.rho *= growth
        if self.rescale_u:
            self.u = {n: u / growth for n, u in self.u.items()}
        self.target = {n: self.z[n] - self.u[n] for n in w}

    def _diagnostics(self, model: nn.Module, epoch: int, w: State, z_before: State) -> dict[str, float]:
        def norm(tensors: State) -> float:
            return float(sum(t.square().sum() for t in tensors.values()) ** 0.5)

        per_layer = {f"distance/{n}": float((w[n] - self.z[n]).norm() / w[n].norm()) for n in w}
        return {
            "epoch": epoch,
            "rho": self.rho,
            "distance": norm({n: w[n] - self.z[n] for n in w}) / norm(w),
            "dual_residual": self.rho * norm({n: self.z[n] - z_before[n] for n in w}),
            "accuracy": evaluate(model, self.data.validation),
            "hardened_accuracy": evaluate(harden(deepcopy(model), self.plan), self.data.validation),
            **per_layer,
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
    schedule: str = "constant",
    progress: Progress | None = None,
    **fit_options: Any,
) -> pd.DataFrame:
    """ADMM toward a plan, in place, from a trained model: papers/pruning.md section B. Leaves ``W <- P_S(W)``.

    W-step: ``interval`` epochs of the loss plus ``rho/2 * ||W - Z + U||^2``; then ``Z = P_S(W + U)`` and
    ``U = U + W - Z``; ``rho`` grows by ``rho_growth`` up to ``rho_max``. Masked retraining is up to the caller:
    ``masks = one_shot(model, plan)``, `attach_masks`, and `fit` with its fresh optimizer.

    Args:
        epochs: in all; a multiple of ``interval``.
        rescale_u: divide ``U`` by the growth of ``rho``, as scaled ADMM asks for and the released code does not.

    Returns:
        One row per Z-step: ``epoch``, ``rho``, ``distance`` = ||W - Z|| / ||W|| (and per layer),
        ``dual_residual`` = rho * ||Z_new - Z_old||, validation ``accuracy`` of W and ``hardened_accuracy`` of P_S(W).
        A run that works shows the two accuracies meet.

    Raises:
        ValueError: ``epochs`` is not a positive multiple of ``interval``, or rho or its growth is out of range.
    """
    if interval < 1 or epochs < 1 or epochs % interval:
        raise ValueError(f"admm: epochs = {epochs}, interval = {interval}: epochs must be a positive multiple")
    if not 0 < rho <= rho_max or rho_growth < 1:
        raise ValueError(f"admm: {rho=}, {rho_max=}, {rho_growth=}: allowed are 0 < rho <= rho_max, rho_growth >= 1")
    pull = _Pull(model, plan, data, interval, rho, rho_growth, rho_max, rescale_u)
    fit(model, data, epochs=epochs, schedule=schedule, hooks=(pull,), progress=progress, **fit_options)
    harden(model, plan)
    return pd.DataFrame(pull.rows)
