"""Blocks whose weights share one magnitude: micro-structured unification (arXiv 2106.08301)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lib.constraint import Constraint, ConstraintError, Storage, check_count
from lib.constraint.formats import which
from lib.constraint.selection import keep_largest
from lib.constraint.views import blocks, gemm, joined, wide


@dataclass(frozen=True)
class Unified(Constraint):
    """A share of the blocks of the GEMM matrix has one magnitude each, signs free, and another share is zero.

    Lin et al., arXiv 2106.08301. A block loses ``sum |w|^2 - n m^2`` when its ``n`` weights get their mean magnitude
    ``m``, and ``sum |w|^2`` when it is pruned; the cheapest are unified. With both, the blocks that lose most by
    staying out of zero are settled first: exact where all blocks are one or the other, since then only ``n m^2``
    decides; otherwise blocks are pruned first, the weakest, which need not be the best choice (``exact`` says so).

    Attributes:
        share: of the blocks that are unified. pruned: of those that are zero. height, width: filters and inputs of a
            block; blocks at the edges are shorter.

    Raises:
        ConstraintError: shares outside [0, 1] or above 1 together, or a size that is not a whole number from 1.

    >>> from lib.sharing import Unified
    >>> blocks, weight = Unified(share=0.5, width=2), torch.tensor([[1.0, -3.0, 2.0, 2.5]])
    >>> blocks.project(weight).tolist(), blocks.multiplications(weight)  # the cheaper block; 1 + 2 products
    ([[1.0, -3.0, 2.25, 2.25]], 3)
    """

    share: float = 0.5
    pruned: float = 0.0
    height: int = 1
    width: int = 4

    def __post_init__(self) -> None:
        check_count(height=self.height, width=self.width)
        if not (min(self.share, self.pruned) >= 0 and self.share + self.pruned <= 1 + 1e-9):
            raise ConstraintError(f"share = {self.share}, pruned = {self.pruned}: allowed are shares, 1 together")

    @property
    def exact(self) -> bool:
        """Where one kind is absent, or no block is left as it is."""
        return self.share == 0 or self.pruned == 0 or self._all

    @property
    def _all(self) -> bool:
        return self.share + self.pruned > 1 - 1e-9

    def _blocks(self, weight: Tensor) -> Tensor:
        """``(blocks, height * width)`` of the padded GEMM matrix."""
        return blocks(gemm(wide(weight)), (self.height, self.width)).flatten(2).flatten(0, 1)

    def _joined(self, flat: Tensor, weight: Tensor) -> Tensor:
        """Back from `_blocks`."""
        across = -(-gemm(weight).shape[1] // self.width)
        grid = flat.view(-1, across, self.height, self.width)  # (R, S, height, width)
        return joined(grid, weight.shape).to(weight.dtype)

    def states(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Which blocks are unified and which pruned, as masks ``(blocks,)``."""
        magnitude, real = self._blocks(weight).abs(), self._blocks(torch.ones_like(weight))
        energy, sizes = magnitude.square().sum(1), real.sum(1)
        mean = magnitude.sum(1) / sizes
        lose = ((magnitude - mean[:, None]).square() * real).sum(1)  # energy - common, but 0 where all are equal
        common = sizes * mean.square()  # n m^2, what a unified block keeps
        n = len(magnitude)
        pruned = round(self.pruned * n)
        unified = n - pruned if self._all else round(self.share * n)
        zero = keep_largest(-common if self._all else -energy, pruned)
        return keep_largest(-torch.where(zero, torch.inf, lose), unified), zero

    def project(self, weight: Tensor) -> Tensor:
        """Mean magnitude with each weight's sign where a block is unified (that of zero is +), zero where pruned."""
        one, zero = self.states(weight)
        flat, real = self._blocks(weight), self._blocks(torch.ones_like(weight))
        magnitude = flat.abs()
        smallest, largest = torch.where(real > 0, magnitude, torch.inf).amin(1), magnitude.amax(1)
        mean = torch.where(smallest == largest, largest, magnitude.sum(1) / real.sum(1))[:, None]  # not rounded again
        z = torch.where(one[:, None], torch.where(flat < 0, -mean, mean), flat)
        return self._joined(torch.where(zero[:, None], 0.0, z), weight)

    def tangent(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Weights of a unified block move together, each along its sign; pruned blocks stay, the others are free."""
        one, zero = self.states(z)
        flat, g, real = (self._blocks(t) for t in (z, gradient, torch.ones_like(z)))
        signs = torch.where(flat < 0, -1.0, 1.0)
        together = signs * ((signs * g * real).sum(1, keepdim=True) / real.sum(1, keepdim=True))
        moved = torch.where(one[:, None], together, g)
        return self._joined(torch.where(zero[:, None], 0.0, moved), z)

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """A magnitude, of one bit less, and signs for a unified block, all weights of the others, and which is what."""
        one, zero = self.states(z)
        sizes = self._blocks(torch.ones_like(z)).sum(1)
        rest = ~(one | zero)
        data = float(sizes[one].sum() + (bits - 1) * one.sum() + bits * sizes[rest].sum())
        return Storage(data, which(~zero) + which(one[~zero]))

    def multiplications(self, z: Tensor) -> int:
        """Multiplications for each input vector of the layer.

        A unified block needs one for each of its filters (inputs are added up with their signs first) or one for each
        of its inputs (the product serves all filters), whichever is less; the others one for each weight.
        """
        one, zero = self.states(z)
        real = self._blocks(torch.ones_like(z)).view(-1, self.height, self.width)  # (blocks, height, width)
        few = torch.minimum(real.amax(2).sum(1), real.amax(1).sum(1))
        return int(few[one].sum() + real.flatten(1).sum(1)[~(one | zero)].sum())
