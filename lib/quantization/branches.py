"""Ternary weights by a rule of thumb in place of the projection, and sums of such branches (WACV 2019)."""

from dataclasses import dataclass
from math import ceil, log2

import torch
from torch import Tensor

from lib.constraint import Constraint, ConstraintError, Storage, check_count
from lib.constraint.formats import irregular_levels
from lib.constraint.views import wide
from lib.quantization.levels import STEP_BITS, ternary


def _check_threshold(*betas: float) -> None:
    for beta in betas:
        if not 0 < beta < 1:
            raise ConstraintError(f"beta = {beta}: allowed are shares of the largest weight between 0 and 1")


def branch(weight: Tensor, beta: float) -> tuple[float, float]:
    """Scale ``a`` and threshold ``Delta = beta * max|W|`` of a branch: ``a`` is the mean of ``|w| >= Delta``.

    Both are 0 for a weight that is all zero.

    >>> from lib.quantization import branch
    >>> branch(torch.tensor([0.1, -0.5, 1.0]), beta=0.4)
    (0.75, 0.4)
    """
    magnitude = weight.abs()
    threshold = beta * float(magnitude.max())
    large = magnitude[magnitude >= threshold]
    return float(large.mean()), threshold


@dataclass(frozen=True)
class TernaryRule(Constraint):
    """``{-a, 0, +a}`` by statistics of the weights: zero below ``beta`` of the largest, ``a`` the mean of the others.

    He, Gong and Fan, WACV 2019. Members are those of `ternary`, but the rule does not take the nearest one: it keeps
    nearly all weights, where the projection sets about half of a bell-shaped layer to zero. `straight_through` lets
    every gradient pass; the released code stops those of latent weights beyond -1 and 1.

    >>> from lib.quantization import TernaryRule, ternary
    >>> weight = torch.tensor([0.5, 4.0])
    >>> TernaryRule(beta=0.1).project(weight).tolist(), TernaryRule(beta=0.2).project(weight).tolist()
    ([2.25, 2.25], [0.0, 4.0])
    >>> ternary().project(weight).tolist()
    [0.0, 4.0]
    """

    beta: float = 0.05

    exact = False

    def __post_init__(self) -> None:
        _check_threshold(self.beta)

    def project(self, weight: Tensor) -> Tensor:
        """The rule's point, which is no projection in the proper sense; exact zeros stay."""
        w = wide(weight)
        a, threshold = branch(w, self.beta)
        return torch.where(w.abs() >= threshold, a * w.sign(), 0.0).to(weight.dtype)

    def tangent(self, z: Tensor, gradient: Tensor) -> Tensor:
        """All weights that are not zero grow or shrink together."""
        return ternary().tangent(z, gradient)

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """As of `ternary`; ``bits`` is not used."""
        return ternary().storage_bits(z, bits)


@dataclass(frozen=True)
class Expansion(Constraint):
    """The sum of ternary branches of one latent weight, each with a threshold of its own: residual expansion.

    ``Z = sum_i T_beta_i(W)`` (He, Gong and Fan, WACV 2019). A large weight passes more thresholds, so the sum has one
    magnitude for each branch: ``a_1``, ``a_1 + a_2``, ... Every branch has the same sign, so the sum is larger than the
    weight it stands for; batch norm, or training through it, takes that up. Applied twice it gives another point, so
    harden once, and keep that. Thresholds of two branches are the paper's, those of more are ours.

    >>> from lib.quantization import Expansion
    >>> Expansion((0.4, 0.8)).project(torch.tensor([0.1, -0.5, 1.0])).tolist()  # 0.75 beyond 0.4, and 1 beyond 0.8
    [0.0, -0.75, 1.75]
    """

    betas: tuple[float, ...] = (0.05, 0.1)

    exact = False

    def __post_init__(self) -> None:
        _check_threshold(*self.betas)
        if not self.betas or list(self.betas) != sorted(set(self.betas)):
            raise ConstraintError(f"betas = {self.betas}: allowed are rising thresholds, at least one")

    @classmethod
    def of(cls, branches: int) -> "Expansion":
        """So many branches, with thresholds 0.05, 0.1, 0.15, ..."""
        check_count(1, 19, branches=branches)
        return cls(tuple(round(0.05 * i, 2) for i in range(1, branches + 1)))

    def project(self, weight: Tensor) -> Tensor:
        """The sum of the branches."""
        return sum(TernaryRule(beta).project(wide(weight)) for beta in self.betas).to(weight.dtype)

    def member(self, weight: Tensor, tolerance: float = 0.0) -> bool:
        """Whether there are at most as many magnitudes as branches, to a tolerance."""
        magnitudes = weight[weight != 0].abs().sort().values
        return int((magnitudes.diff() > tolerance).sum()) + bool(len(magnitudes)) <= len(self.betas)

    def tangent(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Each magnitude moves by itself, with all weights that have it; zeros stay."""
        signs, (values, which) = z.sign(), z.abs().unique(return_inverse=True)
        total = torch.zeros_like(values).index_add_(0, which.reshape(-1), (signs * gradient).reshape(-1))
        return signs * (total / which.reshape(-1).bincount(minlength=len(values)))[which]

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """A level's number for each weight, or for nonzeros only and where they are, and a scale for each branch.

        The paper stores branches apart, 2 bits a weight in each; ``2n + 1`` values need fewer. ``bits`` is not used.
        """
        scales = len(self.betas) * STEP_BITS
        named = Storage(z.numel() * ceil(log2(2 * len(self.betas) + 1)), table=scales)
        sparse = irregular_levels(z != 0, ceil(log2(2 * len(self.betas))))._replace(table=scales)
        return min(named, sparse, key=lambda s: s.total)
