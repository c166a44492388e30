"""Sets that remove whole groups of weights: tiles of the GEMM matrix, the weakest first.

Cut the GEMM matrix (`lib.constraint.views`) into tiles of ``height x width`` weights, and most structures of the field
are a choice of the two: filters ``1 x all``, columns ``all x 1``, channels ``all x Kh*Kw``, kernels ``1 x Kh*Kw``,
blocks ``p x q``, single weights ``1 x 1``. The budget holds for the layer, or in every *region*, a larger tile.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lib.constraint import ConstraintError, Storage, SupportConstraint, check_count, check_sparsity, formats
from lib.constraint.selection import keep_largest, keep_largest_in_rows, kept
from lib.constraint.views import Size, blocks, gemm, joined, kernel_area, padded, spread, wide


@dataclass(frozen=True)
class Groups(SupportConstraint):
    """What the sets below share. Projection: keep the groups of largest L2 norm, as many as the budget says.

    The budget counts groups: a short one at the matrix's edge counts as one. At least one is kept.

    Raises:
        ConstraintError: a sparsity outside [0, 1), or a size that is not a whole number from 1.

    >>> from lib.pruning import Groups
    >>> class Halves(Groups):  # the left and the right half of the GEMM matrix
    ...     def group(self, weight):
    ...         return weight.shape[0], weight.shape[1] // 2
    >>> Halves(0.5).project(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])).tolist()
    [[0.0, 0.0, 3.0, 4.0], [0.0, 0.0, 7.0, 8.0]]
    """

    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity(sparsity=self.sparsity)

    def group(self, weight: Tensor) -> Size:
        """Height and width of a group on the GEMM matrix of ``weight``."""
        raise NotImplementedError

    def region(self, weight: Tensor) -> Size | None:
        """Height and width, in weights, of the regions that each have the budget; None: the layer is one region."""
        return None

    def group_norms(self, weight: Tensor) -> Tensor:
        """L2 norms of the groups, ``(R, S)``: what a group lasso sums."""
        size, matrix = self.group(weight), gemm(wide(weight))
        whole = self.region(weight) or size
        if size == (1, 1):  # not through squares, which underflow
            return padded(matrix.abs(), whole)
        return blocks(padded(matrix.square(), whole), size).sum((2, 3)).sqrt()

    def spread_groups(self, values: Tensor, weight: Tensor) -> Tensor:
        """One value per group, ``(R, S)``, on all weights of the group: a tensor of the weight's shape."""
        return spread(values, self.group(weight), weight.shape)

    def select(self, weight: Tensor) -> Tensor:
        """Mask of the groups of largest norm, in the layer or in every region."""
        norms = self.group_norms(weight)
        if self.region(weight) is None:
            return self.spread_groups(keep_largest(norms, kept(self.sparsity, norms.numel())), weight)
        return self.spread_groups(self._largest_in_regions(norms, weight), weight)

    def _largest_in_regions(self, norms: Tensor, weight: Tensor) -> Tensor:
        (h, w), (height, width), (rows, columns) = self.group(weight), self.region(weight), gemm(weight).shape
        inner = height // h, width // w  # groups in a region
        grid = blocks(norms, inner)  # (regions down, regions across, *inner)
        scores, total = grid.flatten(2).flatten(0, 1), inner[0] * inner[1]  # (regions, total)
        budget: Tensor | int = kept(self.sparsity, total)
        if rows % height or columns % width:  # short regions at the edges keep the same share of the groups they have
            there = norms.new_ones(-(-rows // h), -(-columns // w), dtype=torch.bool)
            there = blocks(there, inner).reshape(scores.shape)
            scores = torch.where(there, scores, -1.0)
            shares = torch.tensor([kept(self.sparsity, n) for n in range(total + 1)], device=norms.device)
            budget = shares[there.sum(1)]
            budget = int(budget[0]) if (budget == budget[0]).all() else budget
        return joined(keep_largest_in_rows(scores, budget).view(grid.shape), norms.shape)

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """Whole groups at ``bits`` a weight, and which groups they are: in the layer, or in each region."""
        keep = self.group_norms(z) > 0
        data = int(self.spread_groups(keep, z).sum()) * bits
        if (region := self.region(z)) is None:
            return Storage(data, formats.which(keep))
        groups = region[0] * region[1] // (self.group(z)[0] * self.group(z)[1])
        there = self.group_norms(torch.ones_like(z)) > 0  # padding at a region's edge is no group
        return Storage(data, min(int(there.sum()), int(keep.sum()) * formats.index_width(groups)))


@dataclass(frozen=True)
class Unstructured(Groups):
    """At most ``(1 - sparsity) * N`` nonzero weights, anywhere: in each layer, or in all layers that share it.

    Projection: keep the largest by absolute value. ``scope = "global"`` couples the layers of a plan that hold an equal
    set.

    Raises:
        ConstraintError: sparsity outside [0, 1), or an unknown scope.

    >>> from lib.pruning import Unstructured
    >>> Unstructured(0.5).project(torch.tensor([[1.0, -2.0, 3.0], [-4.0, 0.5, 0.1]])).tolist()
    [[0.0, -2.0, 3.0], [-4.0, 0.0, 0.0]]
    """

    scope: Literal["layer", "global"] = "layer"

    anywhere = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in ("layer", "global"):
            raise ConstraintError(f"scope = {self.scope!r}: allowed are 'layer' and 'global'")

    @property
    def per_layer(self) -> bool:
        """False for the global budget, which couples layers."""
        return self.scope == "layer"

    def group(self, weight: Tensor) -> Size:
        """A single weight."""
        return 1, 1

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """In the cheapest format for nonzeros that may lie anywhere."""
        return formats.irregular(z, bits)


@dataclass(frozen=True)
class _Lines(Groups):
    """Whole rows or columns."""

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """The rows and columns that are left as one dense matrix."""
        return formats.submatrix(z, bits)


@dataclass(frozen=True)
class Filter(_Lines):
    """Whole filters, rows of the GEMM matrix (StructADMM); output neurons of a linear layer.

    Layers with equal sets that name a ``coupled`` group lose the same filters, ranked by the norm over all: what
    layers that are added to one another need (`lib.channels`). A removed filter's bias and batch norm go with
    it only through `lib.channels.follow`.

    >>> from lib.pruning import Filter
    >>> Filter(0.5).project(torch.tensor([[1.0, 2.0], [3.0, 0.0]])).tolist()
    [[0.0, 0.0], [3.0, 0.0]]
    """

    coupled: str = ""

    @property
    def per_layer(self) -> bool:
        """False for coupled filters."""
        return not self.coupled

    def view(self, weight: Tensor) -> Tensor:
        """The GEMM matrix: the filters of coupled layers stand in one row, ``(F, sum of C*Kh*Kw)``."""
        return gemm(weight)

    def group(self, weight: Tensor) -> Size:
        """A row of the GEMM matrix."""
        return 1, gemm(weight).shape[1]


@dataclass(frozen=True)
class Column(_Lines):
    """GEMM columns: one kernel position of one channel in all filters ("shape-wise", StructADMM).

    >>> from lib.pruning import Column
    >>> Column(0.5).project(torch.tensor([[1.0, 2.0], [3.0, 0.0]])).tolist()
    [[1.0, 0.0], [3.0, 0.0]]
    """

    def group(self, weight: Tensor) -> Size:
        """A column of the GEMM matrix."""
        return gemm(weight).shape[0], 1


@dataclass(frozen=True)
class Channel(_Lines):
    """Input channels ``W[:, c, :, :]``; input neurons of a linear layer.

    >>> from lib.pruning import Channel
    >>> weight = torch.tensor([[[[3.0, 1.0]], [[0.5, 1.0]]], [[[1.0, 0.0]], [[2.0, 4.0]]]])  # F, C, Kh, Kw = 2, 2, 1, 2
    >>> Channel(0.5).project(weight).flatten(2).tolist()
    [[[0.0, 0.0], [0.5, 1.0]], [[0.0, 0.0], [2.0, 4.0]]]
    """

    def group(self, weight: Tensor) -> Size:
        """The columns of one channel."""
        return gemm(weight).shape[0], kernel_area(weight)


@dataclass(frozen=True)
class Kernel(Groups):
    """Whole kernels ``W[f, c, :, :]``: connectivity pruning (PatDNN); single weights of a linear layer.

    >>> from lib.pruning import Kernel
    >>> weight = torch.tensor([[[[3.0, 1.0]], [[0.5, 1.0]]], [[[1.0, 0.0]], [[2.0, 4.0]]]])  # F, C, Kh, Kw = 2, 2, 1, 2
    >>> Kernel(0.5).project(weight).flatten(2).tolist()
    [[[3.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 4.0]]]
    """

    def group(self, weight: Tensor) -> Size:
        """One kernel, contiguous in its row."""
        return 1, kernel_area(weight)


@dataclass(frozen=True)
class Block(Groups):
    """Blocks of ``height x width`` weights of the GEMM matrix.

    Ranked by L2 norm, which is the projection; released code of the field uses the L1 sum, which is not.

    >>> from lib.pruning import Block
    >>> Block(0.5, height=2, width=2).project(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])).tolist()
    [[0.0, 0.0, 3.0, 4.0], [0.0, 0.0, 7.0, 8.0]]
    """

    height: int = 4
    width: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(height=self.height, width=self.width)

    def group(self, weight: Tensor) -> Size:
        """A block."""
        return self.height, self.width


@dataclass(frozen=True)
class PETile(Groups):
    """Tiles that a processing-element array works on in one pass: ``outputs`` filters x ``inputs`` whole channels.

    PE-wise structured pruning (Yang, He and Fan, AAAI 2020).

    >>> from lib.pruning import PETile
    >>> PETile(0.5, outputs=4, inputs=4).group(torch.zeros(20, 8, 3, 3))  # 4 filters, 4 channels of 9
    (4, 36)
    >>> PETile(0.5, outputs=1, inputs=2).project(torch.tensor([[1.0, 2.0, 3.0, 4.0], [9.0, 6.0, 7.0, 8.0]])).tolist()
    [[0.0, 0.0, 0.0, 0.0], [9.0, 6.0, 7.0, 8.0]]
    """

    outputs: int = 4
    inputs: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(outputs=self.outputs, inputs=self.inputs)

    def group(self, weight: Tensor) -> Size:
        """All kernels between the tile's outputs and inputs."""
        return self.outputs, self.inputs * kernel_area(weight)


@dataclass(frozen=True)
class BlockColumns(Groups):
    """Column segments inside blocks of ``height x width`` (BLK-REW, arXiv 2001.08357; RTMobile's first step).

    Every block keeps the same share of its columns, or (``per = "layer"``) the layer keeps the strongest segments
    wherever they are. Height 1 is irregular pruning, the height of the matrix column pruning.

    >>> from lib.pruning import BlockColumns
    >>> weight = torch.tensor([[9.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    >>> BlockColumns(0.5, height=2, width=2).project(weight).tolist()  # one column of each block
    [[9.0, 0.0, 0.0, 4.0], [5.0, 0.0, 0.0, 8.0]]
    """

    height: int = 4
    width: int = 16
    per: Literal["block", "layer"] = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(height=self.height, width=self.width)
        if self.per not in ("block", "layer"):
            raise ConstraintError(f"per = {self.per!r}: allowed are 'block' and 'layer'")

    def group(self, weight: Tensor) -> Size:
        """One column of one block; of the matrix, where that is lower than a block."""
        return min(self.height, gemm(weight).shape[0]), 1

    def region(self, weight: Tensor) -> Size | None:
        """The block, unless the budget is the layer's."""
        return (self.group(weight)[0], self.width) if self.per == "block" else None


@dataclass(frozen=True)
class BlockRows(Groups):
    """Row segments inside blocks of ``height x width``: the same share in each (BLK-REW).

    >>> from lib.pruning import BlockRows
    >>> weight = torch.tensor([[9.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    >>> BlockRows(0.5, height=2, width=2).project(weight).tolist()  # one row of each block
    [[9.0, 2.0, 0.0, 0.0], [0.0, 0.0, 7.0, 8.0]]
    """

    height: int = 16
    width: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(height=self.height, width=self.width)

    def group(self, weight: Tensor) -> Size:
        """One row of one block; of the matrix, where that is narrower than a block."""
        return 1, min(self.width, gemm(weight).shape[1])

    def region(self, weight: Tensor) -> Size:
        """The block."""
        return self.height, self.group(weight)[1]


@dataclass(frozen=True)
class NM(Groups):
    """At most ``n`` nonzeros in every ``m`` consecutive weights of a GEMM row; a short end keeps the same share.

    Along memory order, so over kernel positions first, then channels.

    >>> from lib.pruning import NM
    >>> NM(n=2, m=4).project(torch.tensor([[1.0, -4.0, 3.0, 2.0, 9.0, 8.0, 7.0, 6.0]])).tolist()
    [[0.0, -4.0, 3.0, 0.0, 9.0, 8.0, 0.0, 0.0]]
    """

    sparsity: float = field(init=False)
    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        check_count(n=self.n, m=self.m)
        if self.n > self.m:
            raise ConstraintError(f"n = {self.n}: allowed are whole numbers up to m = {self.m}")
        object.__setattr__(self, "sparsity", 1 - self.n / self.m)

    def group(self, weight: Tensor) -> Size:
        """A single weight."""
        return 1, 1

    def region(self, weight: Tensor) -> Size:
        """``m`` consecutive weights."""
        return 1, self.m

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """``n`` weights of every ``m`` at their position's index; a kept weight that is zero is stored all the same."""
        stored = int(self.select(z).sum())
        return Storage(stored * bits, min(stored * formats.index_width(self.m), z.numel()))


def block_max(b: int) -> NM:
    """BMWM: of every ``b`` consecutive weights of a row the largest alone (DARB, arXiv 1911.08020).

    >>> from lib.pruning import block_max
    >>> block_max(4).project(torch.tensor([[1.0, -4.0, 3.0, 2.0, 9.0, 8.0, 7.0, 6.0]])).tolist()
    [[0.0, -4.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0]]
    """
    return NM(n=1, m=b)
