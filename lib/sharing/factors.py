"""Sparse powers of two times a small basis, slice by slice (SmartExchange, ISCA 2020)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lib.constraint import Constraint, ConstraintError, Storage, check_count
from lib.constraint.formats import irregular_levels
from lib.constraint.selection import nearest_power
from lib.constraint.views import blocks, gemm, joined, wide

EXPONENT_BITS = 8
"""Of the step in which a slice's basis is counted."""


class Factors(NamedTuple):
    """``weight = coefficients @ basis``, slice by slice.

    Attributes:
        coefficients: ``(slices, rows, n)``, zero or signed powers of two. basis: ``(slices, n, n)``, whole numbers of
            a step that is a power of two, one for each slice.
        weight: their product, in the layer's shape.
        errors: ``||W - Ce B|| / ||W||`` after every turn; it need not fall.

    >>> from lib.sharing import SmartExchange
    >>> basis = torch.diag(torch.tensor([2.0, 4.0, 8.0]))
    >>> factors = SmartExchange().factors(torch.cat([basis, basis / 2]).reshape(1, 18))
    >>> factors.coefficients[0].round(decimals=4).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5]]
    >>> bill = factors.storage(bits=4, basis_bits=8)
    >>> bill.data, bill.table  # 6 coefficients; 9 numbers and their step
    (24, 80.0)
    """

    coefficients: Tensor
    basis: Tensor
    weight: Tensor
    errors: tuple[float, ...]

    def storage(self, bits: int, basis_bits: int) -> Storage:
        """Nonzero coefficients, where they are, and the bases of slices that have any, with the exponents of steps."""
        bill = irregular_levels((self.coefficients != 0).flatten(0, 1), bits)  # (slices * rows, n)
        made = self.basis[self.coefficients.flatten(1).any(1)]
        return bill._replace(table=bill.table + made.numel() * basis_bits + len(made) * EXPONENT_BITS)


@dataclass(frozen=True)
class SmartExchange(Constraint):
    """``Ce @ B``: sparse powers of two times a small basis, slice by slice (Zhao et al., ISCA 2020, arXiv 2005.03403).

    A convolution's filter is a slice of ``C*Kh`` rows and ``Kw`` columns, a linear layer's row one of 3 columns; at
    most ``rows`` each. By turns: coefficients to powers of two, the basis by least squares and rounded, coefficients by
    least squares, small ones to zero. That need not converge, nor give the same point twice: the best turn is taken. So
    harden once, and keep that. The released code's thresholds and powers are absolute; here each column of coefficients
    is scaled to at most 1 first, which the basis takes up, so that they don't depend on a layer's scale.

    Attributes:
        threshold: coefficients below it become zero. bits: of a coefficient, sign and zero included.
        basis_bits: of a number of the basis, in steps of a power of two for each slice. iterations: turns. rows: of a
            slice, at most.

    >>> from lib.sharing import SmartExchange
    >>> basis = torch.diag(torch.tensor([2.0, 4.0, 8.0]))
    >>> weight = torch.cat([basis, basis / 2]).reshape(1, 18)
    >>> [round(SmartExchange(bits=bits).factors(weight).errors[0], 2) for bits in (2, 4)]  # 2 bits: 0, +-1 and no half
    [0.32, 0.0]
    >>> torch.allclose(SmartExchange().project(weight), weight)
    True
    """

    threshold: float = 0.1
    bits: int = 4
    basis_bits: int = 8
    iterations: int = 30
    rows: int = 192

    exact = False
    cone = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ConstraintError(f"threshold = {self.threshold}: allowed are shares of the largest, in [0, 1)")
        check_count(2, 8, bits=self.bits)
        check_count(2, 24, basis_bits=self.basis_bits)
        check_count(iterations=self.iterations)
        check_count(3, rows=self.rows)

    def slices(self, weight: Tensor) -> Tensor:
        """``(slices, rows, n)``, padded with zeros where rows don't fill them."""
        width = weight.shape[-1] if weight.dim() > 2 and weight.shape[-1] > 1 else 3
        matrix = gemm(wide(weight))
        tall = -(-matrix.shape[1] // width)
        pieces = -(-tall // self.rows)
        rows = -(-tall // pieces)
        return blocks(matrix, (1, rows * width)).reshape(-1, rows, width)  # from (F, pieces, 1, rows * width)

    @staticmethod
    def _joined(slices: Tensor, weight: Tensor) -> Tensor:
        """Back from `slices`, in the shape and type of ``weight``."""
        pieces = slices.reshape(len(gemm(weight)), -1, 1, slices[0].numel())  # (F, pieces, 1, rows * n)
        return joined(pieces, weight.shape).to(weight.dtype)

    def factors(self, weight: Tensor) -> Factors:
        """The decomposition of least error among the turns."""
        w = self.slices(weight.detach())
        n, size = w.shape[2], w.norm().clamp(min=1e-30)
        basis, raw = torch.eye(n, dtype=w.dtype, device=w.device).repeat(len(w), 1, 1), w
        best, errors = None, []
        for _ in range(self.iterations):
            raw, basis = _balanced(raw, basis)
            coefficients = nearest_power(torch.where(raw.abs() < self.threshold, 0.0, raw), 0, 2 ** (self.bits - 1) - 1)
            basis = _rounded(_least_squares(coefficients, w, basis), self.basis_bits)
            errors.append(float((w - coefficients @ basis).norm() / size))
            if errors[-1] == min(errors):
                best = coefficients, basis
            raw = w @ torch.linalg.pinv(basis, rtol=1e-4)
        return Factors(*best, self._joined(best[0] @ best[1], weight), tuple(errors))

    def project(self, weight: Tensor) -> Tensor:
        """The product of the factors; exact zeros stay."""
        return torch.where(weight != 0, self.factors(weight).weight, 0.0)

    def member(self, weight: Tensor, tolerance: float = 0.0) -> bool:
        """Refused: whether factors exist is not known from the product; compare with `Factors.weight`."""
        raise ConstraintError("SmartExchange: membership cannot be told from the product; keep its factors")

    def tangent(self, z: Tensor, gradient: Tensor) -> Tensor:
        """What moves with the bases while coefficients stay: ``Ce (Ce^+ g)`` in every slice.

        Coefficients are those that the alternation finds for ``z``.
        """
        coefficients = self.factors(z).coefficients
        moved = coefficients @ (torch.linalg.pinv(coefficients, rtol=1e-4) @ self.slices(gradient))
        return self._joined(moved, z)

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """Coefficients and bases of a decomposition of ``z``; ``bits`` is not used.

        Of a layer that was just decomposed, `Factors.storage` is the account of those very factors.
        """
        return self.factors(z).storage(self.bits, self.basis_bits)


def _balanced(raw: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the coefficients at most 1 in magnitude, the rows of the basis as much larger."""
    scale = raw.abs().amax(1, keepdim=True)  # (slices, 1, n)
    scale = torch.where(scale > 0, scale, 1.0)
    return raw / scale, basis * scale.transpose(1, 2)  # (slices, n, 1)


def _rounded(basis: Tensor, bits: int) -> Tensor:
    """Signed whole numbers of so many bits, times the least power of two that reaches the largest of a slice."""
    largest = basis.abs().amax((1, 2), keepdim=True) / (2 ** (bits - 1) - 1)
    step = torch.where(largest > 0, largest, 1.0).log2().ceil().exp2()
    return (basis / step).round() * step


def _least_squares(coefficients: Tensor, w: Tensor, before: Tensor) -> Tensor:
    """The basis of least error; rows whose coefficients are all zero stay as they were, or they would never return."""
    dead = ~coefficients.any(1)  # (slices, n)
    return torch.where(dead[:, :, None], before, torch.linalg.pinv(coefficients, rtol=1e-4) @ w)
