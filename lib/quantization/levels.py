"""Equal-distance levels with a given step or the best one; binary and ternary are the smallest of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, isfinite, log2

import numpy as np
import torch
from torch import Tensor

from lib.constraint import Constraint, ConstraintError, Storage, check_count
from lib.constraint.formats import irregular_levels
from lib.constraint.views import wide

STEP_BITS = 32
"""What a layer's step takes in a table."""


def best_step(weight: Tensor, per_side: int, zero: bool = False) -> float:
    """The step ``q`` of the levels ``{+-1 .. +-per_side} * q`` (and 0, if ``zero``) with the least squared error.

    One level a side has closed forms: the mean magnitude; with zero, the mean of the ``k`` largest that maximize
    ``(sum of them)^2 / k``. Otherwise the best of many first steps are improved by turns of the nearest levels and the
    best step for these (Lloyd's iteration), and the best of all is taken. Exact zeros don't count.

    Args:
        weight: any shape; finite.

    Returns:
        The step, 0 for a weight without nonzeros.

    >>> from lib.quantization.levels import best_step
    >>> best_step(torch.tensor([1.0, -3.0]), per_side=1), best_step(torch.tensor([1.0, -3.0]), per_side=1, zero=True)
    (2.0, 3.0)
    """
    a = wide(weight[weight != 0]).abs()
    if not len(a):
        return 0.0
    if per_side == 1 and not zero:
        return float(a.double().mean())
    a = _sorted(a).double()
    sums = torch.cat([a.new_zeros(1), a.cumsum(0)])
    if per_side == 1:
        count = torch.arange(1, len(a) + 1, device=a.device)
        top = sums[-1] - sums[len(a) - count]
        best = (top.square() / count).argmax()
        return float(top[best] / count[best])
    level = torch.arange(1, per_side + 1, device=a.device).double()
    lower = level - 0.5
    lower[0] = 0.5 if zero else 0.0  # without zero all small weights go to the first level

    def fit(step: Tensor) -> tuple[Tensor, Tensor]:
        """For every step (Q,): the sums of ``level * |w|`` and of ``level^2`` over all weights."""
        edge = torch.searchsorted(a, step[:, None] * lower)  # (Q, per_side): where each level begins
        edge = torch.cat([edge, edge.new_full((len(step), 1), len(a))], dim=1)
        return (sums[edge].diff(dim=1) * level).sum(1), (edge.diff(dim=1) * level.square()).sum(1)

    starts = 512 if per_side < 64 else 64  # the more levels, the smoother the error
    step = a[-1] / per_side * torch.logspace(-2, 0.3, starts, dtype=a.dtype, device=a.device)
    if len(a) > 200:  # the error of few weights is too rough to tell the promising ones from the others
        product, square = fit(step)
        step = step[(2 * step * product - step.square() * square).topk(32).indices]
    for _ in range(20):
        product, square = fit(step)
        before, step = step, torch.where(square > 0, product / square.clamp(min=1), step)
        if torch.allclose(step, before, rtol=1e-6):
            break
    product, square = fit(step)
    return float(step[(2 * step * product - step.square() * square).argmax()])


def _sorted(a: Tensor) -> Tensor:
    """Ascending. On the CPU by NumPy, which is ten times as fast as torch on a large layer."""
    return a.sort().values if a.is_cuda else torch.from_numpy(np.sort(a.detach().numpy()))


@dataclass(frozen=True)
class Levels(Constraint):
    """Equal-distance levels ``{+-1 .. +-per_side} * step``, of which zero is one only if asked for.

    Without a step the set is free in it, and every projection takes the one with the least error (`best_step`); `fit`
    freezes the one that suits the weights as they are, as ADMM-NN does before its iterations.

    Raises:
        ConstraintError: ``per_side`` is not a whole number from 1, or the step is not a positive number.

    >>> from lib.quantization import Levels
    >>> Levels(per_side=2, step=0.5).project(torch.tensor([0.1, -0.6, 3.0])).tolist()
    [0.5, -0.5, 1.0]
    >>> Levels(per_side=2, step=0.5, zero=True).project(torch.tensor([0.1, -0.6, 3.0])).tolist()
    [0.0, -0.5, 1.0]
    """

    per_side: int
    zero: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        check_count(per_side=self.per_side)
        if self.step is not None and not (isfinite(self.step) and self.step > 0):
            raise ConstraintError(f"step = {self.step}: allowed are positive numbers, or None for the best")

    @property
    def exact(self) -> bool:
        """Whether the step is given or has a closed form; otherwise it is as good as the search for it."""
        return self.step is not None or self.per_side == 1

    @property
    def cone(self) -> bool:
        """A free step scales with the weights."""
        return self.step is None

    @property
    def bits(self) -> int:
        """Bits that name a nonzero level."""
        return ceil(log2(2 * self.per_side))

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, "Levels"]:
        """For each layer: the levels with a step that stays.

        Raises:
            ConstraintError: a layer has no weight left, so that no step is better than another.
        """
        steps = {n: self.step or best_step(w, self.per_side, self.zero) for n, w in weights.items()}
        if empty := [n for n, step in steps.items() if not step]:
            raise ConstraintError(f"{empty[0]} has no weight that is not zero: no step to choose")
        return {n: replace(self, step=step) for n, step in steps.items()}

    def project(self, weight: Tensor) -> Tensor:
        """Each weight at its nearest level; exact zeros stay."""
        step = self.step or best_step(weight, self.per_side, self.zero)
        if not step:
            return torch.zeros_like(weight)
        level = (wide(weight) / step).abs_().round_().clamp_(0 if self.zero else 1, self.per_side)
        return level.mul_(step).mul_(weight.sign()).to(weight.dtype)

    def tangent(self, z: Tensor, gradient: Tensor) -> Tensor:
        """A fixed grid cannot move; with a free step all weights grow or shrink together."""
        if self.step is not None:
            return torch.zeros_like(gradient)
        return z * ((z * gradient).sum() / z.square().sum().clamp(min=1e-30))

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """Level numbers, positions where there are zeros, and the step; ``bits`` is not used.

        Levels with zero may also name the zeros along with the rest, if that takes less.
        """
        mask = z != 0
        if mask.all():
            return Storage(z.numel() * self.bits, table=STEP_BITS)
        sparse = irregular_levels(mask, self.bits)._replace(table=STEP_BITS)
        named = Storage(z.numel() * ceil(log2(2 * self.per_side + 1)), table=STEP_BITS)
        return min(sparse, named, key=lambda s: s.total) if self.zero else sparse


def binary() -> Levels:
    """``{-a, +a}`` with ``a`` free: the mean magnitude, of what is not zero (Rastegari et al. 2016).

    >>> from lib.quantization import binary
    >>> binary().project(torch.tensor([1.0, -3.0])).tolist()
    [2.0, -2.0]
    """
    return Levels(1)


def ternary() -> Levels:
    """``{-a, 0, +a}`` with ``a`` free: the exact projection, not the usual threshold rule.

    >>> from lib.quantization import ternary
    >>> ternary().project(torch.tensor([0.1, 3.0, -5.0])).tolist()
    [0.0, 4.0, -4.0]
    """
    return Levels(1, zero=True)


def uniform(bits: int) -> Levels:
    """``2^bits - 1`` levels, zero among them and as many on each side, with a free step: what everybody compares with.

    Raises:
        ConstraintError: fewer than 2 bits.

    >>> from lib.quantization import ternary, uniform
    >>> uniform(4).per_side, uniform(2) == ternary()
    (7, True)
    """
    check_count(2, bits=bits)
    return Levels(2 ** (bits - 1) - 1, zero=True)
