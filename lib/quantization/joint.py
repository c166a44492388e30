"""Levels on what a sparsity set keeps: the joint projection."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2

import torch
from torch import Tensor

from lib.constraint import Constraint, ConstraintError, Storage, SupportConstraint
from lib.constraint.formats import irregular_levels
from lib.constraint.views import wide
from lib.quantization.levels import STEP_BITS, Levels


@dataclass(frozen=True)
class Quantized(Constraint):
    """What a sparsity set keeps, at levels: the exact joint projection, for any support set.

    Keeping a weight at its level saves ``g = w^2 - (w - q(w))^2`` of squared error against removing it. A support's
    projection keeps the most energy, so that of ``sqrt(g)`` saves the most; a weight that saves nothing is removed.
    This is exact for given levels and an exact support projection; a free step is found by turns with the support.

    Raises:
        ConstraintError: a support that couples layers, whose steps could not be told apart.

    >>> from lib.pruning import Unstructured
    >>> from lib.quantization import Levels, Quantized
    >>> both = Quantized(Unstructured(0.5), Levels(2, step=1.0))
    >>> both.project(torch.tensor([1.5, 1.1, -1.9, 0.6])).tolist()  # saves 2, 1.2, 3.6 and 0.2
    [2.0, 0.0, -2.0, 0.0]
    """

    support: SupportConstraint
    values: Levels

    def __post_init__(self) -> None:
        if not self.support.per_layer:
            raise ConstraintError(f"{self.support} couples layers; levels belong to one layer")

    @property
    def exact(self) -> bool:
        """Whether both parts are, and the step is given."""
        return self.support.exact and self.values.step is not None

    @property
    def cone(self) -> bool:
        """Whether both parts are."""
        return self.support.cone and self.values.cone

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, "Quantized"]:
        """The support's adaptive part, then the step that suits what it keeps."""
        supports = self.support.fit(weights)
        kept = {n: supports[n].project(w) for n, w in weights.items()}
        values = self.values.fit(kept)
        return {n: Quantized(supports[n], values[n]) for n in weights}

    def project(self, weight: Tensor) -> Tensor:
        """Levels where they save the most, zero elsewhere."""
        w = wide(weight)
        if self.values.step is not None:
            return self._joint(w, self.values).to(weight.dtype)
        z, before = self.support.project(w), None
        for _ in range(10):
            if not z.any() or (before is not None and torch.equal(before, z)):
                break
            kept = torch.where(z != 0, w, 0.0)
            before, z = z, self._joint(w, self.values.fit({"": kept})[""])
        return z.to(weight.dtype)

    def _joint(self, weight: Tensor, values: Levels) -> Tensor:
        z = values.project(weight)
        saved = (weight.square() - (weight - z).square()).clamp_(min=0)
        return torch.where(self.support.select(saved.sqrt()) & (saved > 0), z, 0.0)

    def tangent(self, z: Tensor, gradient: Tensor) -> Tensor:
        """As of the levels: removed weights don't move."""
        return self.values.tangent(z, gradient)

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """In the support's format, with a level number for zero if zeros lie among what it stores, or in none at all.

        The step comes on top; ``bits`` is not used.
        """
        anywhere = irregular_levels(z != 0, self.values.bits)
        stored = self.support.storage_bits(z, 1).data
        zeros = stored > int(z.count_nonzero())
        bill = self.support.storage_bits(z, ceil(log2(2 * self.values.per_side + zeros)))
        best = anywhere if self.support.anywhere else min(bill, anywhere, key=lambda s: s.total)
        return best._replace(table=best.table + STEP_BITS)
