"""Bits of storage: data, index and tables apart (papers/pruning.md section C).

A layer is described by its mask, or by a weight whose nonzeros are what is stored; ``bits`` is the width of a weight.
Index widths are searched, never assumed: a width that suits one density ruins another. Biases and batch norm are left
out, as in the papers.
"""

from math import ceil, log2

import pandas as pd
from torch import Tensor, nn

from lib.constraint import Plan, Storage
from lib.models import prunable


def index_width(choices: int) -> int:
    """Bits that name one of ``choices``; none when there is no choice."""
    return ceil(log2(choices)) if choices > 1 else 0


def which(keep: Tensor) -> float:
    """Bits that say which of ``keep.numel()`` groups are stored: a bitmap, or a list of indices if that is shorter."""
    return 0.0 if keep.all() else float(min(keep.numel(), int(keep.sum()) * index_width(keep.numel())))


def dense(mask: Tensor, bits: int) -> Storage:
    """All weights, zeros included."""
    return Storage(mask.numel() * bits)


def relative_index(mask: Tensor, bits: int, width: int | None = None) -> Storage:
    """Each nonzero with the run of zeros before it in ``width`` bits; longer runs take filler zeros.

    A run of ``g`` zeros costs ``g // 2^width`` fillers of ``bits + width`` bits. Without ``width`` the best is taken.
    """
    positions = mask.reshape(-1).nonzero().reshape(-1)
    if not len(positions):
        return Storage(0.0)
    runs = positions.diff(prepend=positions.new_tensor([-1])) - 1
    widths = [width] if width else range(1, int(runs.max() + 1).bit_length() + 1)
    data = len(positions) * bits
    return Storage(data, min((len(positions) + int((runs >> k).sum())) * (bits + k) for k in widths) - data)


def escaped_runs(mask: Tensor, bits: int) -> Storage:
    """The same without filler zeros: the largest number of a run's width means so many zeros and no weight yet.

    Needed where no code is left for a zero, as with ``2^bits`` levels of which none is zero; the best width is taken.
    """
    positions = mask.reshape(-1).nonzero().reshape(-1)
    if not len(positions):
        return Storage(0.0)
    runs = positions.diff(prepend=positions.new_tensor([-1])) - 1
    widths = range(1, int(runs.max() + 1).bit_length() + 1)
    index = min((len(runs) + int((runs // (2**k - 1)).sum())) * k for k in widths)
    return Storage(len(runs) * bits, index)


def submatrix(z: Tensor, bits: int) -> Storage:
    """The rows and columns of the GEMM matrix that are not all zero, as one dense matrix, and which they are.

    Columns are told in two steps: the channels that are left, then the positions inside them.
    """
    z = z.reshape(1, -1) if z.dim() == 1 else z
    matrix = z.reshape(len(z), -1).bool()  # (F, C*Kh*Kw)
    rows, columns = matrix.any(1), matrix.any(0)
    by_channel = columns.reshape(z.shape[1], -1)  # (C, Kh*Kw)
    channels = by_channel.any(1)
    index = which(rows) + which(channels) + which(by_channel[channels])
    return Storage(int(rows.sum() * columns.sum()) * bits, index)


def bitmask(mask: Tensor, bits: int) -> Storage:
    """One bit per position says whether a weight is stored."""
    return Storage(int(mask.count_nonzero()) * bits, mask.numel())


def csr(mask: Tensor, bits: int) -> Storage:
    """Compressed sparse rows of the GEMM matrix: a column index per nonzero, a pointer per row and one more."""
    rows, count = mask.shape[0], int(mask.count_nonzero())
    index = count * index_width(mask.numel() // rows) + (rows + 1) * index_width(count + 1)
    return Storage(count * bits, index)


def formats(mask: Tensor, bits: int) -> dict[str, Storage]:
    """A layer in every format that takes nonzeros anywhere."""
    return {f.__name__.replace("_", " "): f(mask, bits) for f in (dense, bitmask, relative_index, csr)}


def irregular(mask: Tensor, bits: int) -> Storage:
    """The cheapest of the formats that take nonzeros anywhere, the dense one left out so that data is what is kept."""
    return min((f(mask, bits) for f in (bitmask, relative_index, csr)), key=lambda s: s.total)


def irregular_levels(mask: Tensor, bits: int) -> Storage:
    """The same for nonzeros that are level numbers, none of them free for a filler."""
    return min((f(mask, bits) for f in (bitmask, escaped_runs, csr)), key=lambda s: s.total)


def network_storage(model: nn.Module, plan: Plan, bits: int) -> pd.DataFrame:
    """Bits of every prunable layer: those of the plan as their constraint stores them, of the others what is left.

    Returns:
        One row per layer: ``layer``, ``weights``, ``kept`` (nonzero), ``data_bits``, ``index_bits``, ``table_bits``.
    """
    rows = []
    for name, layer in prunable(model).items():
        weight = layer.weight.detach()
        bill = plan[name].storage_bits(weight, bits) if name in plan else submatrix(weight, bits)
        rows.append((name, weight.numel(), int(weight.count_nonzero()), *bill))
    return pd.DataFrame(rows, columns=["layer", "weights", "kept", "data_bits", "index_bits", "table_bits"])


def compression(bill: pd.DataFrame, bits: int) -> dict[str, float]:
    """Dense bits over stored bits: ``data`` alone, and ``total`` with index and tables, at ``bits`` on both sides."""
    dense_bits, data = bits * bill["weights"].sum(), bill["data_bits"].sum()
    return {
        "data": dense_bits / data,
        "total": dense_bits / bill[["data_bits", "index_bits", "table_bits"]].sum().sum(),
    }
