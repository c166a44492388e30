"""Blocks whose wrapped diagonals are one number each (CirCNN, MICRO 2017; FFT-based deployment, DATE 2018)."""

from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor

from lib.constraint import Constraint, ConstraintError, Storage, check_count
from lib.constraint.views import gemm, kernel_area, wide


def fft_operations(k: int) -> int:
    """Additions and multiplications of the Fourier transform of ``k`` real numbers, or back, by split radix.

    ``2 k log2(k) - 4 k + 6`` (Sorensen et al., IEEE TASSP 1987), none for one number.

    Raises:
        ConstraintError: ``k`` is no power of two.

    >>> from lib.sharing import fft_operations
    >>> [fft_operations(k) for k in (1, 2, 4, 8)]
    [0, 2, 6, 22]
    """
    if k & (k - 1):
        raise ConstraintError(f"k = {k}: operations of a transform are counted for powers of two")
    return 0 if k == 1 else 2 * k * int(log2(k)) - 4 * k + 6


@dataclass(frozen=True)
class BlockCirculant(Constraint):
    """Blocks of ``k x k`` between outputs and inputs, ``W[i, j] = c[(i - j) mod k]`` in each (Ding et al., MICRO 2017).

    A convolution has such blocks between filters and channels at every position of its kernel. What does not fill
    whole blocks is padded: a diagonal is the mean of those of its numbers that are there. A linear subspace.

    Attributes:
        k: rows and columns of a block; 1 leaves all weights free.

    >>> from lib.sharing import BlockCirculant
    >>> BlockCirculant(2).project(torch.tensor([[1.0, 2.0], [4.0, 3.0], [5.0, 7.0]])).tolist()
    [[2.0, 3.0], [3.0, 2.0], [5.0, 7.0]]
    """

    k: int

    def __post_init__(self) -> None:
        check_count(k=self.k)

    def sides(self, weight: Tensor) -> tuple[int, int]:
        """Rows and columns of blocks, those at the edges included."""
        rows, columns = len(gemm(weight)), gemm(weight).shape[1] // kernel_area(weight)
        return -(-rows // self.k), -(-columns // self.k)

    def diagonals(self, weight: Tensor) -> Tensor:
        """For every weight the number of its diagonal, ``((R * S + s) * k + (i - j) mod k) * Kh*Kw + position``."""
        positions, (_, across) = kernel_area(weight), self.sides(weight)
        i = torch.arange(len(gemm(weight)), device=weight.device)[:, None, None]
        j = torch.arange(gemm(weight).shape[1] // positions, device=weight.device)[:, None]
        block = (i // self.k) * across + j // self.k
        which = (block * self.k + (i - j) % self.k) * positions + torch.arange(positions, device=weight.device)
        return which.reshape(-1)  # from (F, C, Kh*Kw)

    def columns(self, weight: Tensor) -> Tensor:
        """The first column of every block, ``(R, S, k)`` or ``(R, S, k, Kh, Kw)``, of the projection.

        Zero where a padded block has no number of a diagonal.

        >>> from lib.sharing import BlockCirculant
        >>> BlockCirculant(2).columns(torch.tensor([[1.0, 2.0], [4.0, 3.0], [5.0, 7.0]])).tolist()
        [[[2.0, 3.0]], [[5.0, 7.0]]]
        """
        which, shape = self.diagonals(weight), (*self.sides(weight), self.k, *weight.shape[2:])
        size = torch.Size(shape).numel()
        sums = wide(weight).new_zeros(size).index_add_(0, which, wide(weight).reshape(-1))
        return (sums / which.bincount(minlength=size).clamp(min=1)).to(weight.dtype).reshape(shape)

    def weight(self, columns: Tensor, shape: torch.Size) -> Tensor:
        """A weight of ``shape`` from the first columns of its blocks; gradients pass.

        >>> from lib.sharing import BlockCirculant
        >>> BlockCirculant(3).weight(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.Size([2, 3])).tolist()
        [[1.0, 3.0, 2.0], [2.0, 1.0, 3.0]]
        """
        which = self.diagonals(torch.empty(shape, device=columns.device))
        return columns.reshape(-1)[which].reshape(shape)

    def project(self, weight: Tensor) -> Tensor:
        """Every weight at the mean of its diagonal."""
        return self.weight(self.columns(weight), weight.shape)

    def tangent(self, z: Tensor, gradient: Tensor) -> Tensor:
        """The mean gradient of every diagonal."""
        return self.project(gradient)

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """A number for each entry of the first columns, padding included; where they stand follows from the shape."""
        rows, across = self.sides(z)
        return Storage(rows * across * self.k * kernel_area(z) * bits)

    def operations(self, weight: Tensor) -> int:
        """Additions and multiplications for one input vector, by transforms of ``k`` numbers; those of weights before.

        A transform for each column of blocks and one back for each row; in between ``k`` real numbers for each block
        and kernel position, of which the two without an imaginary part take one multiplication and pairs of the others
        four and two additions; and their sum. A convolution's stride is 1: as many inputs as outputs are transformed.

        Raises:
            ConstraintError: ``k`` is no power of two.

        >>> from lib.sharing import BlockCirculant
        >>> weight = torch.zeros(512, 512)
        >>> [BlockCirculant(k).operations(weight) for k in (1, 8, 512)]  # 2 * 512^2 - 512 in the dense product
        [523776, 116992, 15880]
        """
        rows, across = self.sides(weight)
        terms = across * kernel_area(weight)
        product = 3 * self.k - 4 if self.k > 1 else 1
        return (rows + across) * fft_operations(self.k) + rows * (terms * product + (terms - 1) * self.k)
