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
from torch.nn import functional as F

from lib.constraint import Storage
from lib.constraint.formats import index_width
from lib.kernels.common import Product, bias_of, check_inputs
from lib.kernels.errors import KernelError


@dataclass(frozen=True, eq=False)
class GroupedRows:
    """A matrix in RTMobile's five arrays: rows that keep the same columns lie side by side.

    Attributes:
        shape: of the matrix. reorder: its rows in the order of the groups, without empty ones.
        offset: where each group begins among them, ``(groups + 1,)``. stride: where its columns begin,
            ``(groups + 1,)``. index: columns. values: group by group, column by column.

    >>> from lib.kernels import GroupedRows
    >>> kept = GroupedRows.of(torch.tensor([[1.0, 0, 2], [0, 3, 0], [4, 0, 5]]))
    >>> kept.reorder.tolist(), kept.offset.tolist(), kept.index.tolist(), kept.values.tolist()
    ([1, 0, 2], [0, 1, 3], [1, 0, 2], [3.0, 1.0, 4.0, 2.0, 5.0])
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
        values = [w[np.ix_(r, c)].T.ravel() for r, c in zip(rows, columns, strict=True)]
        joined = [np.concatenate([*parts, []]) for parts in (columns, values)]
        return cls((*w.shape,), order, *starts, joined[0].astype(np.int32), joined[1].astype(np.float32))

    def storage(self, bits: int) -> Storage:
        """Bits of values and of their index."""
        rows, columns = self.shape
        starts = (len(self.offset) + len(self.stride)) * index_width(max(rows, len(self.index)) + 1)
        index = len(self.reorder) * index_width(rows) + len(self.index) * index_width(columns) + starts
        return Storage(float(len(self.values) * bits), float(index))


@njit(nogil=True, fastmath=True)
def _one(x, reorder, offset, stride, index, values, scratch, out):
    """One vector: four columns of a group at a time are added to the sums of its rows, which lie side by side.

    A row that shares its columns with no other is a product of numbers that are gathered first.
    """
    at = 0
    for g in range(len(offset) - 1):
        rows, own = offset[g + 1] - offset[g], index[stride[g] : stride[g + 1]]
        if rows == 1:
            row, got, total = values[at : at + len(own)], scratch[: len(own)], np.float32(0)  # slices become vectors
            for i in range(len(own)):
                got[i] = x[own[i]]
            for i in range(len(own)):
                total += row[i] * got[i]
            out[reorder[offset[g]]] += total
        else:
            sums, four = scratch[:rows], len(own) // 4 * 4
            sums[:] = 0
            for i in range(0, four, 4):
                block = values[at + i * rows : at + (i + 4) * rows]
                first, second, third, fourth = block[:rows], block[rows:], block[2 * rows :], block[3 * rows :]
                a, b, c, d = x[own[i]], x[own[i + 1]], x[own[i + 2]], x[own[i + 3]]
                for r in range(rows):
                    sums[r] += (a * first[r] + b * second[r]) + (c * third[r] + d * fourth[r])
            for i in range(four, len(own)):
                one, column = x[own[i]], values[at + i * rows : at + (i + 1) * rows]
                for r in range(rows):
                    sums[r] += one * column[r]
            for r in range(rows):
                out[reorder[offset[g] + r]] += sums[r]
        at += rows * len(own)


def _many(kept: GroupedRows, inputs: np.ndarray, out: np.ndarray) -> None:
    """Vectors side by side, ``(K, N)``: a dense product for each group is added to ``(F, N)``.

    The product is torch's, on as many threads as torch has: NumPy's would take all cores whatever torch is told.
    """
    at = 0
    for g in range(len(kept.offset) - 1):
        rows = kept.reorder[kept.offset[g] : kept.offset[g + 1]]
        columns = kept.index[kept.stride[g] : kept.stride[g + 1]]
        block = kept.values[at : (at := at + len(rows) * len(columns))].reshape(-1, len(rows))
        out[rows] += torch.mm(torch.from_numpy(block).T, torch.from_numpy(inputs[columns])).numpy()


class GroupedLinear(Product):
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
        super().__init__(layer, GroupedRows.of(layer.weight))

    def one(self, x: np.ndarray, out: np.ndarray) -> None:
        """A vector."""
        kept, scratch = self.kept, np.empty(max(self.kept.shape), np.float32)
        _one(x, kept.reorder, kept.offset, kept.stride, kept.index, kept.values, scratch, out)

    def many(self, x: np.ndarray, out: np.ndarray) -> None:
        """Vectors side by side."""
        _many(self.kept, x, out)


class GroupedConv2d(nn.Module):
    """A convolution that computes with groups of filters: each gathers its rows of the unfolded inputs once.

    Args:
        layer: whose weights, bias, stride, padding and dilation it takes.

    Raises:
        KernelError: channels in groups, or padding that is no number of zeros.

    >>> from lib.kernels import GroupedConv2d
    >>> layer = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1)
    >>> layer.weight.data[:, ::2] = 0
    >>> x = torch.rand(2, 4, 9, 9)
    >>> torch.allclose(GroupedConv2d(layer)(x), layer(x), atol=1e-6)
    True
    """

    stands_for_layer = True

    format = "grouped filters"

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        if layer.groups != 1 or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            raise KernelError(
                f"groups = {layer.groups}, padding {layer.padding!r}, {layer.padding_mode}: "
                "one group and numbers of zeros are known"
            )
        self.kept = GroupedRows.of(layer.weight.flatten(1))
        self.bias = bias_of(layer)
        self.inputs, self.kernel, self.stride = layer.in_channels, layer.kernel_size, layer.stride
        self.padding, self.dilation = layer.padding, layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of ``(N, C, H, W)``, without a gradient.

        Raises:
            KernelError: other inputs than float32 numbers of that shape on a CPU.
        """
        check_inputs(x, x.ndim == 4 and x.shape[1] == self.inputs, f"(N, {self.inputs}, H, W)")
        kernel, dilation, padding, stride = sizes = (self.kernel, self.dilation, self.padding, self.stride)
        unfolded = F.unfold(x.detach(), *sizes).numpy()  # (N, C*Kh*Kw, L)
        high = (x.shape[2] + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
        out = np.tile(self.bias[:, None], (len(x), 1, unfolded.shape[2]))  # (N, F, L)
        for image, result in zip(unfolded, out, strict=True):
            _many(self.kept, image, result)
        return torch.from_numpy(out).unflatten(2, (high, -1))
