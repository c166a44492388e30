"""Signed powers of two: products become shifts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, log2

import torch
from torch import Tensor

from lib.constraint import Constraint, ConstraintError, Storage, check_count
from lib.constraint.formats import irregular_levels
from lib.constraint.selection import nearest_power
from lib.constraint.views import wide

EXPONENT_BITS = 8
"""What a layer's largest exponent takes in a table."""


@dataclass(frozen=True)
class PowerOfTwo(Constraint):
    """Zero and ``2^(bits-1) - 1`` powers of two of either sign, so that a product is a shift.

    Without ``top`` the set is free in its largest exponent; `fit` freezes the one of least squared error. Scaling by
    anything but a power of two leaves the set, so it is no cone.

    Raises:
        ConstraintError: fewer than 2 bits or more than 8.

    >>> from lib.quantization import PowerOfTwo
    >>> PowerOfTwo(bits=3).project(torch.tensor([1.1, -0.4, 0.3, 0.01])).tolist()  # 0, 0.25, 0.5 and 1
    [1.0, -0.5, 0.25, 0.0]
    """

    bits: int = 4
    top: int | None = None

    cone = False

    def __post_init__(self) -> None:
        check_count(2, 8, bits=self.bits)

    @property
    def count(self) -> int:
        """Magnitudes other than zero."""
        return 2 ** (self.bits - 1) - 1

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, "PowerOfTwo"]:
        """For each layer its largest exponent.

        Raises:
            ConstraintError: a layer has no weight left, so that no exponent is better than another.
        """
        if empty := [n for n, w in weights.items() if self.top is None and not w.any()]:
            raise ConstraintError(f"{empty[0]} has no weight that is not zero: no exponent to choose")
        return {n: replace(self, top=self._best_top(w)) for n, w in weights.items()}

    def _best_top(self, weight: Tensor) -> int:
        """The exponent of the largest power, of those from the largest weight down; 0 for a layer of zeros."""
        if self.top is not None or not weight.any():
            return self.top or 0
        w = wide(weight)
        largest = ceil(log2(float(w.abs().max())))
        tops = range(largest, largest - 16, -1)
        return min(tops, key=lambda top: float((w - nearest_power(w, top, self.count)).square().sum()))

    def project(self, weight: Tensor) -> Tensor:
        """Each weight at its nearest power of two, or zero."""
        return nearest_power(weight, self._best_top(weight), self.count)

    def tangent(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Nothing moves on a grid."""
        return torch.zeros_like(gradient)

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """A number for each weight, or for each nonzero and where it is; ``bits`` is not used."""
        named = Storage(z.numel() * self.bits, table=EXPONENT_BITS)
        sparse = irregular_levels(z != 0, ceil(log2(2 * self.count)))._replace(table=EXPONENT_BITS)
        return min(named, sparse, key=lambda s: s.total)
