"""Matrices with at most n weights in every m: all rows are of one length, and an index is a place among m."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numba import njit
from torch import Tensor, nn

from lib.constraint import Storage
from lib.constraint.formats import index_width
from lib.kernels.common import Product
from lib.kernels.errors import KernelError


@dataclass(frozen=True, eq=False)
class BalancedRows:
    """A matrix as N:M keeps it: ``n`` weights of every ``m`` in a row, zeros among them where fewer are left.

    Attributes:
        shape: of the matrix, ``(F, K)``. n, m: kept, of how many. index: columns, ``(F, groups * n)``; wider than a
            place among ``m`` has to be, as processors load whole numbers. values: ``(F, groups * n)``.

    >>> from lib.kernels import BalancedRows
    >>> kept = BalancedRows.of(torch.tensor([[0.0, 2, 0, 1, 0, 3]]), m=4)
    >>> kept.n, kept.index.tolist(), kept.values.tolist()  # the second group is short
    (2, [[1, 3, 4, 5]], [[2.0, 1.0, 0.0, 3.0]])
    """

    shape: tuple[int, int]
    n: int
    m: int
    index: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, weight: Tensor, m: int = 4) -> Self:
        """From a matrix ``(F, K)``; ``n`` is the largest number of weights that a group has.

        Raises:
            KernelError: groups of less than one.
        """
        if m < 1:
            raise KernelError(f"m = {m}: allowed are whole numbers from 1")
        rows, columns = weight.shape
        w = np.pad(weight.detach().cpu().float().numpy(), ((0, 0), (0, -columns % m))).reshape(rows, -1, m)
        n = max(int((w != 0).sum(2).max()), 1)
        first = np.argsort(w == 0, axis=2, kind="stable")[..., :n]  # kept ones in order, then the first zeros
        place = np.sort(first, axis=2)
        index = (place + m * np.arange(w.shape[1])[:, None]).reshape(rows, -1)
        values = np.take_along_axis(w, place, 2).reshape(rows, -1)
        return cls((rows, columns), n, m, np.minimum(index, columns - 1).astype(np.int32), values)

    def storage(self, bits: int) -> Storage:
        """Bits of values, zeros that fill a group included, and of places among ``m``."""
        return Storage(float(self.values.size * bits), float(self.values.size * index_width(self.m)))


@njit(nogil=True, fastmath=True)
def _one(x, index, values, out):
    for f in range(len(out)):
        row, own, total = values[f], index[f], np.float32(0)
        for i in range(len(row)):
            total += row[i] * x[own[i]]
        out[f] += total


@njit(nogil=True, fastmath=True)
def _many(x, index, values, out):
    """Inputs ``(K, N)`` and outputs ``(F, N)``: the inner loop is over vectors, side by side in memory."""
    for f in range(len(out)):
        row, own, sums = values[f], index[f], out[f]
        for i in range(len(row)):
            weight, numbers = row[i], x[own[i]]
            for k in range(len(sums)):
                sums[k] += weight * numbers[k]


class BalancedLinear(Product):
    """A linear layer that computes with n weights of every m: inference on a CPU, in float32.

    Args:
        layer: whose weights and bias it takes. m: as of `BalancedRows`.

    >>> from lib.kernels import BalancedLinear
    >>> from lib.pruning import NM
    >>> layer = torch.nn.Linear(8, 4)
    >>> layer.weight.data = NM(2, 4).project(layer.weight.data)
    >>> x = torch.rand(5, 8)
    >>> torch.allclose(BalancedLinear(layer)(x), layer(x), atol=1e-6)
    True
    """

    def __init__(self, layer: nn.Linear, m: int = 4) -> None:
        super().__init__(layer, BalancedRows.of(layer.weight, m))

    @property
    def format(self) -> str:
        """``2:4`` and so on."""
        return f"{self.kept.n}:{self.kept.m}"

    def one(self, x: np.ndarray, out: np.ndarray) -> None:
        """A vector."""
        _one(x, self.kept.index, self.kept.values, out)

    def many(self, x: np.ndarray, out: np.ndarray) -> None:
        """Vectors side by side."""
        _many(x, self.kept.index, self.kept.values, out)
