"""A layer's weight as a matrix, and the matrix in tiles.

The GEMM matrix of a layer is ``(F, C*Kh*Kw)``: a row is a filter, a column one input position; a linear layer is its
own matrix.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

Size = tuple[int, int]


def gemm(weight: Tensor) -> Tensor:
    """The GEMM matrix of a layer's weight, ``(F, C, Kh, Kw) -> (F, C*Kh*Kw)``; a vector is one row.

    >>> from lib.constraint.views import gemm
    >>> tuple(gemm(torch.zeros(20, 3, 5, 5)).shape), tuple(gemm(torch.zeros(10)).shape)
    ((20, 75), (1, 10))
    """
    return weight.reshape(1, -1) if weight.dim() == 1 else weight.reshape(weight.shape[0], -1)


def kernel_area(weight: Tensor) -> int:
    """``Kh*Kw``; 1 for a linear layer, whose weights are kernels of one entry.

    >>> from lib.constraint.views import kernel_area
    >>> kernel_area(torch.zeros(20, 3, 5, 5)), kernel_area(torch.zeros(10, 500))
    (25, 1)
    """
    return weight.shape[2:].numel()


def tile_sums(matrix: Tensor, size: Size) -> Tensor:
    """Sums over tiles, ``(R*height, S*width) -> (R, S)``.

    >>> from lib.constraint.views import tile_sums
    >>> tile_sums(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), (2, 2)).tolist()
    [[14, 22]]
    """
    (height, width), (rows, columns) = size, matrix.shape
    if size == (1, 1):
        return matrix
    return matrix.reshape(rows // height, height, columns // width, width).sum((1, 3))


def padded(matrix: Tensor, size: Size) -> Tensor:
    """``matrix`` with zeros below and to the right, so that whole tiles of ``size`` cover it.

    >>> from lib.constraint.views import padded
    >>> padded(torch.ones(2, 3), (2, 2)).tolist()
    [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
    """
    (height, width), (rows, columns) = size, matrix.shape
    return pad(matrix, (0, -columns % width, 0, -rows % height)) if rows % height or columns % width else matrix


def spread(values: Tensor, size: Size, shape: torch.Size) -> Tensor:
    """Each tile's value on all of its weights, ``(R, S)`` -> a weight of ``shape``; padding is cut off.

    >>> from lib.constraint.views import spread
    >>> spread(torch.tensor([[1, 2]]), (2, 2), torch.Size([2, 3])).tolist()
    [[1, 1, 2], [1, 1, 2]]
    """
    (height, width), (r, s) = size, values.shape
    full = values[:, None, :, None].expand(r, height, s, width).reshape(r * height, s * width)
    rows = 1 if len(shape) == 1 else shape[0]
    return full[:rows, : shape.numel() // rows].reshape(shape)
