"""Formats in which a layer is stored: bits of data, index and tables apart.

A layer is described by its mask, or by a weight whose nonzeros are what is stored; ``bits`` is the width of a weight.
Index widths are searched, never assumed: a width that suits one density ruins another.
"""

from math import ceil, log2
from typing import NamedTuple

from torch import Tensor

from lib.constraint.views import gemm, kernel_area


class Storage(NamedTuple):
    """Bits that a layer takes, counted apart so that a report can show data alone beside all of it.

    >>> from lib.constraint import Storage
    >>> Storage(data=800, index=100).total
    900.0
    """

    data: float
    index: float = 0.0
    table: float = 0.0

    @property
    def total(self) -> float:
        """Data, index and tables together."""
        return sum(self)


def index_width(choices: int) -> int:
    """Bits that name one of ``choices``; none when there is no choice.

    >>> from lib.constraint.formats import index_width
    >>> index_width(128), index_width(129), index_width(1)
    (7, 8, 0)
    """
    return ceil(log2(choices)) if choices > 1 else 0


def which(keep: Tensor) -> float:
    """Bits that say which of ``keep.numel()`` groups are stored: a bitmap, or a list of indices if that is shorter.

    >>> from lib.constraint.formats import which
    >>> which(torch.arange(100) < 3), which(torch.arange(100) < 50)  # 3 numbers of 7 bits; a bitmap
    (21.0, 100.0)
    """
    return 0.0 if keep.all() else float(min(keep.numel(), int(keep.sum()) * index_width(keep.numel())))


def dense(mask: Tensor, bits: int) -> Storage:
    """All weights, zeros included."""
    return Storage(mask.numel() * bits)


def relative_index(mask: Tensor, bits: int, width: int | None = None) -> Storage:
    """Each nonzero with the run of zeros before it in ``width`` bits; longer runs take filler zeros.

    A run of ``g`` zeros costs ``g // 2^width`` fillers of ``bits + width`` bits. Without ``width`` the best is taken.

    >>> from lib.constraint.formats import relative_index
    >>> relative_index(torch.tensor([0, 0, 0, 1, 0, 1]), bits=8)  # runs of 3 and 1, in 2 bits each
    Storage(data=16, index=4, table=0.0)
    >>> relative_index(torch.tensor([0, 0, 0, 1, 0, 1]), bits=8, width=1)  # in 1 bit, with a filler of 9
    Storage(data=16, index=11, table=0.0)
    """
    positions = mask.reshape(-1).nonzero().reshape(-1)  # (nonzeros,)
    if not len(positions):
        return Storage(0.0)
    runs = positions.diff(prepend=positions.new_tensor([-1])) - 1
    widths = [width] if width else range(1, int(runs.max() + 1).bit_length() + 1)
    data = len(positions) * bits
    return Storage(data, min((len(positions) + int((runs >> k).sum())) * (bits + k) for k in widths) - data)


def escaped_runs(mask: Tensor, bits: int) -> Storage:
    """The same without filler zeros: the largest number of a run's width means so many zeros and no weight yet.

    Needed where no code is left for a zero, as with ``2^bits`` levels of which none is zero; the best width is taken.

    >>> from lib.constraint.formats import escaped_runs
    >>> escaped_runs(torch.tensor([0, 0, 0, 1, 0, 1]), bits=1)  # runs of 3 and 1 in 2 bits: 3 + 0, 1
    Storage(data=2, index=6, table=0.0)
    """
    positions = mask.reshape(-1).nonzero().reshape(-1)  # (nonzeros,)
    if not len(positions):
        return Storage(0.0)
    runs = positions.diff(prepend=positions.new_tensor([-1])) - 1
    widths = range(1, int(runs.max() + 1).bit_length() + 1)
    index = min((len(runs) + int((runs // (2**k - 1)).sum())) * k for k in widths)
    return Storage(len(runs) * bits, index)


def submatrix(z: Tensor, bits: int) -> Storage:
    """The rows and columns of the GEMM matrix that are not all zero, as one dense matrix, and which they are.

    Columns are told in two steps: the channels that are left, then the positions inside them.

    >>> from lib.constraint.formats import submatrix
    >>> submatrix(torch.tensor([[0, 0, 0], [0, 5, 6]]), bits=8)  # one of 2 rows, two of 3 columns
    Storage(data=16, index=4.0, table=0.0)
    """
    matrix = gemm(z).bool()
    rows, columns = matrix.any(1), matrix.any(0)
    by_channel = columns.reshape(-1, kernel_area(z))  # (C, Kh*Kw)
    channels = by_channel.any(1)
    index = which(rows) + which(channels) + which(by_channel[channels])
    return Storage(int(rows.sum() * columns.sum()) * bits, index)


def bitmask(mask: Tensor, bits: int) -> Storage:
    """One bit per position says whether a weight is stored."""
    return Storage(int(mask.count_nonzero()) * bits, mask.numel())


def csr(mask: Tensor, bits: int) -> Storage:
    """Compressed sparse rows of the GEMM matrix: a column index per nonzero, a pointer per row and one more.

    >>> from lib.constraint.formats import csr
    >>> csr(torch.eye(4), bits=8)  # 4 column numbers of 2 bits, 5 pointers of 3
    Storage(data=32, index=23, table=0.0)
    """
    rows, count = mask.shape[0], int(mask.count_nonzero())
    index = count * index_width(mask.numel() // rows) + (rows + 1) * index_width(count + 1)
    return Storage(count * bits, index)


def formats(mask: Tensor, bits: int) -> dict[str, Storage]:
    """A layer in every format that takes nonzeros anywhere.

    >>> from lib.constraint.formats import formats
    >>> {name: bill.total for name, bill in formats(torch.eye(4), bits=8).items()}
    {'dense': 128.0, 'bitmask': 48.0, 'relative index': 44.0, 'csr': 55.0}
    """
    return {f.__name__.replace("_", " "): f(mask, bits) for f in (dense, bitmask, relative_index, csr)}


def irregular(mask: Tensor, bits: int) -> Storage:
    """The cheapest of the formats that take nonzeros anywhere, the dense one left out so that data is what is kept.

    >>> from lib.constraint.formats import irregular
    >>> irregular(torch.eye(4), bits=8)  # runs of 0, 4, 4 and 4 in 3 bits each
    Storage(data=32, index=12, table=0.0)
    """
    return min((f(mask, bits) for f in (bitmask, relative_index, csr)), key=lambda s: s.total)


def irregular_levels(mask: Tensor, bits: int) -> Storage:
    """The same for nonzeros that are level numbers, none of them free for a filler."""
    return min((f(mask, bits) for f in (bitmask, escaped_runs, csr)), key=lambda s: s.total)
