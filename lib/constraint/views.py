"""A layer's weight as a matrix, and the matrix in blocks: what folds a weight folds it here.

The GEMM matrix of a layer is ``(F, C*Kh*Kw)``: a row is a filter, a column one input position; a linear layer is its
own matrix.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lib.shapes import ShapeError

Size = tuple[int, int]


def gemm(weight: Tensor) -> Tensor:
    """The GEMM matrix of a layer's weight, ``(F, C, Kh, Kw) -> (F, C*Kh*Kw)``; a vector is one row.

    >>> from lib.constraint.views import gemm
    >>> tuple(gemm(torch.zeros(20, 3, 5, 5)).shape), tuple(gemm(torch.zeros(10)).shape)
    ((20, 75), (1, 10))
    """
    return weight.reshape(1, -1) if weight.dim() == 1 else weight.reshape(weight.shape[0], -1)


def kernel_area(weight: Tensor) -> int:
    """Weights of a kernel, ``Kh*Kw``; 1 for a linear layer, whose weights are kernels of one entry."""
    return weight.shape[2:].numel()


def wide(tensor: Tensor) -> Tensor:
    """The same numbers in single precision at least: squares and sums of half precision meet where weights differ."""
    if tensor.is_complex():
        raise ShapeError("complex weights: real ones are known")
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def padded(matrix: Tensor, size: Size) -> Tensor:
    """``matrix`` with zeros below and to the right, so that whole blocks of ``size`` cover it."""
    (height, width), (rows, columns) = size, matrix.shape
    return pad(matrix, (0, -columns % width, 0, -rows % height)) if rows % height or columns % width else matrix


def blocks(matrix: Tensor, size: Size) -> Tensor:
    """A matrix in blocks of ``height x width``, zeros beyond its edges: ``(F, K) -> (R, S, height, width)``.

    >>> from lib.constraint.views import blocks
    >>> blocks(torch.tensor([[1, 2, 3], [4, 5, 6]]), (2, 2)).tolist()
    [[[[1, 2], [4, 5]], [[3, 0], [6, 0]]]]
    """
    height, width = size
    strips = padded(matrix, size).unflatten(1, (-1, width))  # (F, S, width)
    return strips.unflatten(0, (-1, height)).transpose(1, 2)  # (R, S, height, width)


def joined(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Back from `blocks`, ``(R, S, height, width)``, into a weight of ``shape``; what lies beyond its edges is cut off.

    >>> from lib.constraint.views import blocks, joined
    >>> weight = torch.tensor([[1, 2, 3], [4, 5, 6]])
    >>> joined(blocks(weight, (2, 2)), weight.shape).tolist()
    [[1, 2, 3], [4, 5, 6]]
    """
    rows = 1 if len(shape) == 1 else shape[0]
    matrix = blocks.transpose(1, 2).flatten(2).flatten(0, 1)  # (R*height, S*width)
    return matrix[:rows, : shape.numel() // rows].reshape(shape)


def spread(values: Tensor, size: Size, shape: torch.Size) -> Tensor:
    """Each block's value on all of its weights, ``(R, S)`` -> a weight of ``shape``.

    >>> from lib.constraint.views import spread
    >>> spread(torch.tensor([[1, 2]]), (2, 2), torch.Size([2, 3])).tolist()
    [[1, 1, 2], [1, 1, 2]]
    """
    return joined(values[:, :, None, None].expand(-1, -1, *size), shape)
