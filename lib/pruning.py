"""Sparsity sets and their exact projections (papers/pruning.md section A.2)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lib.constraint import ConstraintError, Plan, SupportConstraint
from lib.models import prunable


def keep_largest(scores: Tensor, k: int) -> Tensor:
    """Boolean mask of exactly ``k`` largest entries; among equals the first in memory order win.

    >>> keep_largest(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2)
    tensor([ True,  True, False, False])
    """
    flat = scores.reshape(-1)
    if k >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - k + 1).values if k else torch.inf
    above, ties = flat > threshold, flat == threshold
    above |= ties & (ties.cumsum(0) <= k - above.sum())
    return above.reshape(scores.shape)


def kept(sparsity: float, total: int) -> int:
    """How many of ``total`` weights a sparsity leaves: the nearest whole number, and at least one."""
    return max(1, round((1 - sparsity) * total))


@dataclass(frozen=True)
class Unstructured(SupportConstraint):
    """At most ``(1 - sparsity) * N`` nonzero weights, anywhere: in each layer, or in all layers that share it.

    Projection: keep the largest by absolute value (papers/pruning.md A.2, rows 1 and 2). A layer keeps one weight at
    least. ``scope = "global"`` couples the layers of a plan that hold this same object.

    Raises:
        ConstraintError: sparsity outside [0, 1), or an unknown scope.
    """

    sparsity: float
    scope: Literal["layer", "global"] = "layer"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ConstraintError(f"sparsity = {self.sparsity}: allowed are numbers in [0, 1)")
        if self.scope not in ("layer", "global"):
            raise ConstraintError(f"scope = {self.scope!r}: allowed are 'layer' and 'global'")

    @property
    def per_layer(self) -> bool:
        """False for the global budget, which couples layers."""
        return self.scope == "layer"

    def select(self, weight: Tensor) -> Tensor:
        """Mask of the largest absolute values, ``weight.numel()`` times the density of them."""
        return keep_largest(weight.abs(), kept(self.sparsity, weight.numel()))


def uniform_plan(model: nn.Module, constraint: SupportConstraint, keep_dense: tuple[str, ...] = ()) -> Plan:
    """The same constraint on every prunable layer but those named in ``keep_dense``.

    Raises:
        ConstraintError: ``keep_dense`` names a layer that the model lacks, or leaves nothing to prune.
    """
    layers = prunable(model)
    if unknown := [n for n in keep_dense if n not in layers]:
        raise ConstraintError(f"keep_dense names {unknown[0]!r}; the model has {', '.join(layers)}")
    plan = {name: constraint for name in layers if name not in keep_dense}
    if not plan:
        raise ConstraintError("keep_dense leaves no layer to prune")
    return plan
