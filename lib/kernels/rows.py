"""Matrices whose rows share columns: inputs are gathered once for a group of rows, then all is dense.

RTMobile's block-structured pruning (DAC 2020) and BLK-REW's column segments make such matrices; so does pruning whole
rows and columns.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

from lib.constraint import Storage
from lib.constraint.formats import index_width
from lib.kernels.errors import KernelError


@dataclass(frozen=True, eq=False)
class GroupedRows:
    """A matrix in RTMobile's five arrays: rows that keep the same columns lie side by side.

    Attributes:
        shape: of the matrix. reorder: its rows in the order of the groups, without empty ones.
        offset: where each group begins among them, ``(groups + 1,)``. stride: where its columns begin,
            ``(groups + 1,)``. index: columns. values: group by group, row by row.

    >>> from lib.kernels import GroupedRows
    >>> kept = GroupedRows.of(torch.tensor([[1.0, 0, 2], [0, 3, 0], [4, 0, 5]]))
    >>> kept.reorder.tolist(), kept.offset.tolist(), kept.index.tolist(), kept.values.tolist()
    ([1, 0, 2], [0, 1, 3], [1, 0, 2], [3.0, 1.0, 2.0, 4.0, 5.0])
    """

    shape: tuple[int, int]
    reorder: np.ndarray
    offset: np.ndarray
    stride: np.ndarray
    index: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """From a matrix ``(F, K)`` with zeros."""
        w = weight.detach().cpu().float().numpy()
        shapes, group = np.unique(w != 0, axis=0, return_inverse=True)
        order = np.argsort(group.ravel(), kind="stable")
        order = order[shapes.any(1)[group.ravel()[order]]]
        groups = [g for g, shape in enumerate(shapes) if shape.any()]
        columns = [np.flatnonzero(shapes[g]) for g in groups]
        rows = [order[group.ravel()[order] == g] for g in groups]
        starts = [np.cumsum([0, *map(len, parts)]) for parts in (rows, columns)]
        values = [w[np.ix_(r, c)].ravel() for r, c in zip(rows, columns, strict=True)]
        joined = [np.concatenate([*parts, []]) for parts in (columns, values)]
        return cls((*w.shape,), order, *starts, joined[0].astype(np.int32), joined[1].astype(np.float32))

    def storage(self, bits: int) -> Storage:
        """Bits of values and of their index."""
        rows, columns = self.shape
        starts = (len(self.offset) + len(self.stride)) * index_width(max(rows, len(self.index)) + 1)
        index = len(self.reorder) * index_width(rows) + len(self.index) * index_width(columns) + starts
        return Storage(float(len(self.values) * bits), float(index))


@njit(nogil=True, fastmath=True)
def _one(x, reorder, offset, stride, index, values, gathered, out):
    """One vector: its numbers gathered once a group, then a product of contiguous numbers for each row."""
    at = 0
    for g in range(len(offset) - 1):
        own = index[stride[g] : stride[g + 1]]
        got = gathered[: len(own)]
        for i in range(len(own)):
            got[i] = x[own[i]]
        for r in range(offset[g], offset[g + 1]):
            row = values[at : at + len(own)]  # a slice: only then are these loops of vectors
            total = np.float32(0)
            for i in range(len(own)):
                total += row[i] * got[i]
            out[reorder[r]] += total
            at += len(own)


class GroupedLinear(nn.Module):
    """A linear layer that computes with groups of rows: inference on a CPU, in float32.

    Args:
        layer: whose weights and bias it takes.

    >>> from lib.kernels import GroupedLinear
    >>> layer = torch.nn.Linear(8, 4)
    >>> layer.weight.data[:, ::2] = 0
    >>> x = torch.rand(5, 8)
    >>> torch.allclose(GroupedLinear(layer)(x), layer(x), atol=1e-6)
    True
    """

    format = "grouped rows"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.kept = GroupedRows.of(layer.weight)
        self.bias = None if layer.bias is None else layer.bias.detach().float().numpy().copy()

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of ``(..., K)``, without a gradient.

        Raises:
            KernelError: other inputs than float32 numbers of that shape on a CPU.
        """
        kept = self.kept
        if x.shape[-1:] != (kept.shape[1],) or x.dtype != torch.float32 or x.device.type != "cpu":
            raise KernelError(
                f"inputs {(*x.shape,)}, {x.dtype} on {x.device}: (..., {kept.shape[1]}) of float32 on a CPU is allowed"
            )
        vectors = x.detach().reshape(-1, kept.shape[1]).contiguous().numpy()
        out = np.zeros((len(vectors), kept.shape[0]), np.float32)
        out += 0.0 if self.bias is None else self.bias
        if len(vectors) == 1:
            gathered = np.empty(kept.shape[1], np.float32)
            _one(vectors[0], kept.reorder, kept.offset, kept.stride, kept.index, kept.values, gathered, out[0])
        else:
            at = 0
            for (a, b), (c, d) in zip(
                np.c_[kept.offset[:-1], kept.offset[1:]], np.c_[kept.stride[:-1], kept.stride[1:]], strict=True
            ):
                values = kept.values[at : (at := at + (b - a) * (d - c))].reshape(b - a, d - c)
                out[:, kept.reorder[a:b]] += vectors[:, kept.index[c:d]] @ values.T
        return torch.from_numpy(out).reshape(*x.shape[:-1], kept.shape[0])
