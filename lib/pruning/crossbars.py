"""Sets made for arrays of cells: what an array saves is whole rows, whole columns, conversions and sign columns.

On a crossbar a filter is a column and an input a row: the transpose of the GEMM matrix ``(F, K)`` that sets are about.
So ``rows`` below counts consecutive weights of a filter, and ``filters`` those side by side in an array.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import log2

import torch
from torch import Tensor

from lib.constraint import Constraint, ConstraintError, Storage, SupportConstraint, check_count, check_sparsity, formats
from lib.constraint.selection import keep_largest_in_rows, kept
from lib.constraint.views import blocks, gemm, joined, wide
from lib.pruning.composed import FilterColumn, best_lines
from lib.pruning.groups import NM, BlockColumns, BlockRows
from lib.pruning.patterns import code, table


def tiny_adc(n: int, rows: int = 128) -> NM:
    """At most ``n`` weights in each column of an array of ``rows``, at free places (TinyADC, DATE 2021).

    A column's sum is then as small as if the array had ``n`` rows, which each halving saves a converter bit by. What is
    left of a filter behind its last whole array keeps the same share (`NM`), where ``n`` weights would be allowed too.

    >>> from lib.crossbar import exact_bits
    >>> from lib.pruning import tiny_adc
    >>> tiny_adc(16).sparsity, exact_bits(rows=128, cell_bits=2), exact_bits(rows=16, cell_bits=2)
    (0.875, 9, 6)
    """
    return NM(n=n, m=rows)


@dataclass(frozen=True)
class PolarizedFragments(Constraint):
    """All weights of ``rows`` consecutive rows of a column have one sign (FORMS, ISCA 2021).

    Projection: the sign whose weights have more energy stays, the others become zero; exact. FORMS's own rule goes by
    the sign of the sum (``by = "sum"``), which is not the nearest point. Zeros stay zeros, so it goes with any mask.

    >>> from lib.pruning import PolarizedFragments
    >>> weight = torch.tensor([[3.0, -2.0, -2.0]])
    >>> PolarizedFragments(rows=3).project(weight).tolist()  # 9 against 8
    [[3.0, 0.0, 0.0]]
    >>> PolarizedFragments(rows=3, by="sum").project(weight).tolist()
    [[0.0, -2.0, -2.0]]
    """

    rows: int = 8
    by: str = "energy"

    def __post_init__(self) -> None:
        check_count(rows=self.rows)
        if self.by not in ("energy", "sum"):
            raise ConstraintError(f"by = {self.by!r}: allowed are 'energy' and 'sum'")

    @property
    def exact(self) -> bool:
        """Whether the nearest point is taken."""
        return self.by == "energy"

    def project(self, weight: Tensor) -> Tensor:
        """``weight`` where it has its fragment's sign, zero elsewhere."""
        parts = blocks(gemm(weight), (1, self.rows))  # (F, fragments, 1, rows)
        vote = wide(parts)
        positive = (vote if self.by == "sum" else vote * vote.abs()).sum(-1, keepdim=True) >= 0
        kept = torch.where(positive, parts.clamp(min=0), parts.clamp(max=0))
        return joined(kept, weight.shape)

    def tangent(self, z: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the weights that are not zero; the others lie on the edge of their orthant."""
        return torch.where(z != 0, gradient, 0.0)

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """Magnitudes of one bit less, in the cheapest format for nonzeros anywhere, and a table of signs."""
        fragments = len(gemm(z)) * -(-gemm(z).shape[1] // self.rows)
        return formats.irregular(z, bits - 1)._replace(table=fragments)


@dataclass(frozen=True)
class AlignedLines(FilterColumn):
    """Filter and column budgets that fill whole arrays of ``rows x filters`` (Yuan et al., ISLPED 2019).

    What fills a part of an array costs a whole one: `fit` rounds both budgets to the nearest number of full arrays, one
    at least, or all there is if that is less. ``filters`` is an array's columns over the cells of a weight.

    >>> from lib.pruning import AlignedLines
    >>> lines = AlignedLines(filter_sparsity=0.6, column_sparsity=0.6, rows=128, filters=32)
    >>> lines.fit({"fc1": torch.zeros(512, 1024)})["fc1"]  # 192 of 512 filters, 384 of 1024 rows
    FilterColumn(filter_sparsity=0.625, column_sparsity=0.625)
    """

    rows: int = 128
    filters: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(rows=self.rows, filters=self.filters)

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, FilterColumn]:
        """For each layer the plain budgets that it comes to."""

        def sparsity(wanted: float, total: int, unit: int) -> float:
            full = max(1, round(kept(wanted, total) / unit)) * unit
            return max(0.0, 1 - full / total)

        shapes = {n: gemm(w).shape for n, w in weights.items()}
        pairs = (self.filter_sparsity, self.filters), (self.column_sparsity, self.rows)
        return {
            n: FilterColumn(*(sparsity(s, size, unit) for size, (s, unit) in zip(shape, pairs, strict=True)))
            for n, shape in shapes.items()
        }


@dataclass(frozen=True)
class BlockLines(SupportConstraint):
    """Filters and rows removed inside every block of the size of an array, each on its own (PIM-Prune, DAC 2020).

    In each block the same share of its filters and of its rows goes, as by `FilterColumn`: exact where the blocks are
    small, else by turns from all rows, so not always the nearest point (``exact = False``). Blocks at the edges keep
    the same shares.

    >>> from lib.pruning import BlockLines
    >>> weight = torch.tensor([[9.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    >>> BlockLines(filter_sparsity=0.5, filters=2, rows=2).project(weight).tolist()  # one filter of each block
    [[9.0, 2.0, 0.0, 0.0], [0.0, 0.0, 7.0, 8.0]]
    """

    filter_sparsity: float = 0.5
    row_sparsity: float = 0.0
    filters: int = 32
    rows: int = 128

    exact = False

    def __post_init__(self) -> None:
        check_sparsity(filter_sparsity=self.filter_sparsity, row_sparsity=self.row_sparsity)
        check_count(filters=self.filters, rows=self.rows)

    @property
    def parts(self) -> tuple[SupportConstraint, SupportConstraint]:
        """The set of filters' parts and that of rows' parts."""
        whole = self.filters, self.rows
        return BlockRows(self.filter_sparsity, *whole), BlockColumns(self.row_sparsity, *whole)

    def select(self, weight: Tensor) -> Tensor:
        """Mask of what is left of the blocks."""
        energy = self._blocks(wide(weight).square())  # (R, S, filters, rows)
        keep = torch.zeros_like(energy, dtype=torch.bool)
        sides = zip(gemm(weight).shape, energy.shape[2:], strict=True)
        down, across = ([(slice(n // size), size), (slice(n // size, None), n % size)] for n, size in sides)
        for (i, height), (j, width) in product(down, across):  # whole blocks, and those at the edges
            part = energy[i, j, :height, :width]
            if part.numel():
                counts = kept(self.filter_sparsity, height), kept(self.row_sparsity, width)
                keep[i, j, :height, :width] = _strongest(part.flatten(0, 1), *counts).view(part.shape)
        return joined(keep, weight.shape)

    def _blocks(self, weight: Tensor) -> Tensor:
        """``(R, S, filters, rows)``; a block is no larger than the matrix."""
        matrix = gemm(weight)
        return blocks(matrix, (min(self.filters, matrix.shape[0]), min(self.rows, matrix.shape[1])))

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """Every block's submatrix, and which rows and filters of it are there."""
        nonzero = self._blocks(z != 0).flatten(0, 1)  # (blocks, filters, rows)
        lines, rows = nonzero.any(2), nonzero.any(1)
        data = int((lines.sum(1) * rows.sum(1)).sum()) * bits
        return Storage(data, sum(formats.which(side) for pair in (lines, rows) for side in pair))


def _strongest(energy: Tensor, n: int, m: int) -> Tensor:
    """In each block ``(blocks, filters, rows)`` the ``n`` and ``m`` that keep most, or those on which turns stop."""
    if (found := best_lines(energy, n, m)) is not None:
        return found
    rows = torch.ones_like(energy[:, 0], dtype=torch.bool)
    while True:
        filters = keep_largest_in_rows(torch.einsum("bfr,br->bf", energy, rows.to(energy.dtype)), n)
        better = keep_largest_in_rows(torch.einsum("bfr,bf->br", energy, filters.to(energy.dtype)), m)
        if torch.equal(better, rows):
            return filters[:, :, None] & rows[:, None, :]
        rows = better


@dataclass(frozen=True)
class SharedShapes(SupportConstraint):
    """Filters share a few choices of rows: in each group of ``rows``, one of ``shapes`` of them (SegPrune, TCAD 2022).

    A segment is a filter's weights in a group of rows, a shape the rows that it keeps. Segments of one shape are put
    side by side in one array, where the rows that they lack disappear. Projection, for given shapes: the shape of most
    kept energy, exact. `fit` finds the shapes of each layer by voting: every segment's own best rows stand for
    election, and the shape that adds most kept energy is taken, again and again (greedy cover; a reconstruction from
    the abstract).

    Attributes:
        sparsity: of the rows in each group. codes: by group of rows, each shape as a number whose bit ``i`` keeps row
            ``i``; chosen by `fit`.

    >>> from lib.pruning import SharedShapes
    >>> weight = torch.tensor([[5.0, 4.0, 1.0, 0.0], [3.0, 4.0, 0.0, 1.0], [0.0, 1.0, 2.0, 0.0]])
    >>> shared = SharedShapes(0.5, rows=4, shapes=1).fit({"fc": weight})["fc"]
    >>> shared.codes, shared.project(weight).tolist()  # rows 0 and 1 for all, although the last filter prefers others
    (((3,),), [[5.0, 4.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    """

    sparsity: float = 0.5
    rows: int = 32
    shapes: int = 4
    codes: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        check_sparsity(sparsity=self.sparsity)
        check_count(rows=self.rows, shapes=self.shapes)

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, "SharedShapes"]:
        """For each layer its own shapes."""
        return {n: self if self.codes else replace(self, codes=self._voted(w)) for n, w in weights.items()}

    def _segments(self, weight: Tensor) -> Tensor:
        """Energies ``(groups, F, rows)``."""
        energy = blocks(gemm(weight.detach()).double().square(), (1, self.rows))  # (F, groups, 1, rows)
        return energy.squeeze(2).transpose(0, 1)  # (groups, F, rows)

    def _voted(self, weight: Tensor) -> tuple[tuple[int, ...], ...]:
        length, voted = gemm(weight).shape[1], []
        for i, energy in enumerate(self._segments(weight)):  # (F, rows)
            real = min(self.rows, length - i * self.rows)
            own = keep_largest_in_rows(energy[:, :real], kept(self.sparsity, real))
            candidates = own.unique(dim=0)  # (candidates, real)
            gains = energy[:, :real] @ candidates.to(energy.dtype).T  # (F, candidates)
            best, chosen = torch.zeros(len(energy), 1, dtype=energy.dtype, device=energy.device), []
            for _ in range(min(self.shapes, len(candidates))):
                chosen.append(int(gains.maximum(best).sum(0).argmax()))
                best = best.maximum(gains[:, chosen[-1:]])
            voted.append(tuple(dict.fromkeys(code(candidates[c].nonzero().flatten().tolist()) for c in chosen)))
        return tuple(voted)

    def choice(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The shapes ``(groups, shapes, rows)`` as zeros and ones, and which one each segment takes ``(groups, F)``.

        Raises:
            ConstraintError: before `fit`, or for a layer of another size.
        """
        energy = self._segments(weight)
        if self.codes is None:
            raise ConstraintError("the shapes are not chosen yet: call lib.constraint.fitted(model, plan) first")
        if len(self.codes) != len(energy):
            raise ConstraintError(f"shapes for {len(self.codes)} groups of rows; the weight has {len(energy)}")
        most = max(map(len, self.codes))
        same = [(*own, *own[:1] * (most - len(own))) for own in self.codes]  # groups with fewer repeat one
        shapes = torch.stack([table(own, self.rows, energy) for own in same])
        return shapes, torch.einsum("gfr,gsr->gfs", energy, shapes).argmax(-1)

    def select(self, weight: Tensor) -> Tensor:
        """Mask of each segment's shape."""
        shapes, choice = self.choice(weight)
        keep = torch.take_along_dim(shapes, choice[..., None], dim=1) > 0  # (groups, F, rows)
        return joined(keep.transpose(0, 1).unsqueeze(2), weight.shape)  # from (F, groups, 1, rows)

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """Weights of the shapes, each segment's choice, and a table of the shapes."""
        kept_weights = int(self.select(z).sum())
        choices = sum(log2(len(own)) for own in self.codes) * len(gemm(z))
        return Storage(kept_weights * bits, choices, sum(len(own) for own in self.codes) * self.rows)
