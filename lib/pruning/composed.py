"""Sets made of others, or with a budget that differs from row to row."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from lib.constraint import ConstraintError, Storage, SupportConstraint, check_sparsity, formats
from lib.constraint.selection import keep_largest, keep_largest_in_rows, kept
from lib.constraint.views import blocks, gemm, wide
from lib.pruning.groups import NM, BlockColumns, Column, Filter, Unstructured

ADDITIONS = 250_000  # up to which all choices of rows, or all of columns, are tried


@cache
def _choices(total: int, n: int) -> Tensor:
    """All choices of ``n`` out of ``total``, ``(choices, total)`` of zeros and ones."""
    return torch.tensor([[i in chosen for i in range(total)] for chosen in combinations(range(total), n)]).double()


def best_lines(energy: Tensor, n: int, m: int) -> Tensor | None:
    """The ``n`` rows and ``m`` columns of every matrix ``(B, R, C)`` that keep the most energy together, as masks.

    Exact, by trying all choices of the side that has fewer; None where these are too many.
    """
    rows, columns = energy.shape[1:]
    if comb(rows, n) > comb(columns, m):
        found = best_lines(energy.mT, m, n)
        return None if found is None else found.mT.contiguous()
    if comb(rows, n) * energy.numel() > ADDITIONS:
        return None
    choices = _choices(rows, n).to(energy.device)
    sums = choices @ energy.double()  # (B, choices, C)
    best = sums.topk(m, dim=2).values.sum(2).argmax(1)  # (B,)
    sums = sums.take_along_dim(best[:, None, None], 1)[:, 0]  # (B, C)
    return (choices[best] > 0)[:, :, None] & keep_largest_in_rows(sums, m)[:, None]


@dataclass(frozen=True)
class FilterColumn(SupportConstraint):
    """Filter and column budgets together (StructADMM's combination).

    Choosing rows and columns at once has no closed form. In a small matrix all choices of its shorter side are tried
    (`best_lines`), which is exact. Elsewhere the projection alternates: the best rows for the columns at hand, the best
    columns for those rows, until neither moves. Kept energy never falls, so it stops, at a choice that no change of
    rows or of columns alone improves; it need not be the nearest point (``exact = False``).

    >>> from lib.pruning import FilterColumn
    >>> FilterColumn(0.5, 0.5).project(torch.tensor([[5.0, 2.0], [3.0, 9.0]])).tolist()
    [[0.0, 0.0], [0.0, 9.0]]
    """

    filter_sparsity: float = 0.5
    column_sparsity: float = 0.5

    exact = False

    def __post_init__(self) -> None:
        check_sparsity(filter_sparsity=self.filter_sparsity, column_sparsity=self.column_sparsity)

    @property
    def parts(self) -> tuple[SupportConstraint, SupportConstraint]:
        """The filter set and the column set."""
        return Filter(self.filter_sparsity), Column(self.column_sparsity)

    def select(self, weight: Tensor) -> Tensor:
        """Mask of the best rows and columns, or of those on which the alternation stops."""
        energy = gemm(wide(weight)).square()
        n, m = kept(self.filter_sparsity, energy.shape[0]), kept(self.column_sparsity, energy.shape[1])
        if (found := best_lines(energy[None], n, m)) is not None:
            return found.reshape(weight.shape)
        columns = torch.ones(energy.shape[1], dtype=torch.bool, device=weight.device)
        while True:
            rows = keep_largest(energy @ columns.to(energy.dtype), n)
            better = keep_largest(rows.to(energy.dtype) @ energy, m)
            if torch.equal(better, columns):
                return (rows[:, None] & columns).reshape(weight.shape)
            columns = better

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """The kept rows by the kept columns as one dense matrix, and which they are."""
        return formats.submatrix(z, bits)


@dataclass(frozen=True)
class BlockStructured(SupportConstraint):
    """RTMobile's BSP: column segments inside blocks, then whole rows of what is left (arXiv 2002.11474).

    A projection of one step after the other, as published: not the nearest point of both together
    (``exact = False``). Blocks are ``height x width``; the published code counts blocks instead.

    >>> from lib.pruning import BlockStructured
    >>> weight = torch.tensor([[9.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    >>> BlockStructured(0.5, 0.0, height=2, width=2).project(weight).tolist()
    [[9.0, 0.0, 0.0, 4.0], [5.0, 0.0, 0.0, 8.0]]
    >>> BlockStructured(0.5, 0.5, height=2, width=2).project(weight).tolist()  # 81 + 16 against 25 + 64
    [[9.0, 0.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]]
    """

    column_sparsity: float = 0.5
    row_sparsity: float = 0.5
    height: int = 16
    width: int = 16

    exact = False

    def __post_init__(self) -> None:
        check_sparsity(column_sparsity=self.column_sparsity, row_sparsity=self.row_sparsity)
        self.parts  # noqa: B018  checks the sizes

    @property
    def parts(self) -> tuple[SupportConstraint, SupportConstraint]:
        """Step 1 and step 2."""
        return BlockColumns(self.column_sparsity, self.height, self.width), Filter(self.row_sparsity)

    def select(self, weight: Tensor) -> Tensor:
        """Mask of both steps."""
        segments, rows = self.parts
        first = segments.select(weight)
        return first & rows.select(torch.where(first, weight, 0.0))

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """Kept rows of kept segments, zeros in them too; the segments of each block once, and which rows."""
        segments, _ = self.parts
        bill, matrix = segments.storage_bits(z, bits), gemm(z) != 0
        rows, (height, _) = matrix.any(1), segments.region(z)
        of_block = blocks(matrix, (height, self.width)).any(2).sum(2)  # segments, (R, S)
        stored = of_block.sum(1) * blocks(rows[:, None], (height, 1)).sum((1, 2, 3))
        return Storage(int(stored.sum()) * bits, bill.index + formats.which(rows))


MENU = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class DARB(SupportConstraint):
    """Density-adaptive regular blocks: one survivor per block, with a block size for every row (AAAI 2020).

    `fit` prunes the layer irregularly at ``sparsity`` and gives a row of density ``d`` a block size near ``1/d`` out of
    ``menu``, so that the layer stays within its budget: every row starts at the largest block, and the step to the next
    smaller block is taken in the order of how far ``d`` lies above the geometric mean of the two. A layer whose largest
    blocks keep more than that (none is longer than a row) stays at these. Projection: the largest magnitude of each
    block, exact.

    >>> from lib.pruning import DARB
    >>> weight = torch.tensor([[9.0, 8.0, 7.0, 1.0], [6.0, 0.1, 0.2, 0.3]])  # of the largest half, rows have 3 and 1
    >>> blocks = DARB(0.5, menu=(1, 2, 4)).fit({"fc": weight})["fc"]
    >>> blocks.blocks, blocks.project(weight).tolist()
    ((2, 4), [[9.0, 0.0, 7.0, 0.0], [6.0, 0.0, 0.0, 0.0]])
    """

    sparsity: float = 0.9
    menu: tuple[int, ...] = MENU
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_sparsity(sparsity=self.sparsity)
        if not self.menu or min(self.menu) < 1 or list(self.menu) != sorted(set(self.menu)):
            raise ConstraintError(f"menu = {self.menu}: allowed are increasing block sizes from 1")

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, SupportConstraint]:
        """Block sizes for every layer's rows."""
        if self.blocks is not None:
            return dict.fromkeys(weights, self)
        return {name: replace(self, blocks=self._sizes(gemm(w))) for name, w in weights.items()}

    def _sizes(self, matrix: Tensor) -> tuple[int, ...]:
        rows, columns = matrix.shape
        menu = torch.tensor([b for b in self.menu if b <= columns] or self.menu[:1], device=matrix.device).flip(0)
        survivors = -(-columns // menu)  # of a row, at each block size; the largest block comes first
        density = Unstructured(self.sparsity).select(matrix).sum(1) / columns
        step_cost = survivors.diff().expand(rows, -1)
        urgency = density[:, None] * (menu[:-1] * menu[1:]).sqrt()  # (rows, steps), falls along a row
        order = urgency.reshape(-1).argsort(descending=True, stable=True)  # (rows * steps,)
        spent = step_cost.reshape(-1)[order].cumsum(0) + rows * survivors[0]
        taken = torch.zeros(urgency.numel(), dtype=torch.bool, device=matrix.device)
        taken[order] = spent <= kept(self.sparsity, matrix.numel())
        return tuple(menu[taken.reshape(rows, -1).sum(1)].tolist())

    def select(self, weight: Tensor) -> Tensor:
        """Mask of the largest of every block."""
        if self.blocks is None:
            raise ConstraintError("the block sizes are not chosen yet: call lib.constraint.fitted(model, plan) first")
        matrix, sizes = gemm(weight), torch.tensor(self.blocks, device=weight.device)
        if len(sizes) != len(matrix):
            raise ConstraintError(f"{len(sizes)} block sizes for the {len(matrix)} rows of {tuple(weight.shape)}")
        mask = torch.zeros_like(matrix, dtype=torch.bool)
        for b in set(self.blocks):
            mask[sizes == b] = NM(n=1, m=b).select(matrix[sizes == b])
        return mask.reshape(weight.shape)

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """One weight and its place per block; each row's block size as an index into the menu."""
        columns = gemm(z).shape[1]
        survivors = {b: -(-columns // b) for b in set(self.blocks)}
        index = sum(survivors[b] * formats.index_width(b) for b in self.blocks)
        data = sum(survivors[b] for b in self.blocks) * bits
        return Storage(data, index, len(self.blocks) * formats.index_width(len(self.menu)))
