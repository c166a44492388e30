"""The steps that projections come down to: keeping the largest of many scores, and the nearest power of two."""

import torch
from torch import Tensor

from lib.constraint.views import wide

PAIRWISE = 16  # up to this row length, comparing all pairs of columns beats sorting every row


def kept(sparsity: float, total: int) -> int:
    """How many of ``total`` weights a sparsity leaves: the nearest whole number, and at least one.

    >>> from lib.constraint import kept
    >>> kept(0.95, 500), kept(0.99, 10)
    (25, 1)
    """
    return max(1, round((1 - sparsity) * total))


def keep_largest(scores: Tensor, k: int) -> Tensor:
    """Boolean mask of exactly ``k`` largest entries; among equals the first in memory order win.

    >>> from lib.constraint import keep_largest
    >>> keep_largest(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2).tolist()
    [True, True, False, False]
    """
    flat = scores.reshape(-1)  # (N,)
    if k >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - k + 1).values if k else torch.inf
    mask = flat >= threshold
    if int(mask.sum()) > k:  # several are equal to the last that is kept
        above, ties = flat > threshold, flat == threshold
        mask = above | (ties & (ties.cumsum(0) <= k - above.sum()))
    return mask.reshape(scores.shape)


def keep_largest_in_rows(scores: Tensor, k: Tensor | int) -> Tensor:
    """The same in every row of ``scores`` (rows, m), with one ``k`` for all or one for each row.

    >>> from lib.constraint import keep_largest_in_rows
    >>> keep_largest_in_rows(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]]), 2).tolist()
    [[False, True, True], [True, True, False]]
    """
    rows, m = scores.shape
    counts = k.reshape(rows, 1) if isinstance(k, Tensor) else int(k)  # (rows, 1) or one for all
    if not isinstance(k, Tensor) and k == 1:
        mask = torch.zeros_like(scores, dtype=torch.bool)
        return mask.scatter_(1, scores.argmax(1, keepdim=True), True)
    if m > PAIRWISE:
        order = scores.argsort(dim=1, descending=True, stable=True)
        keep = torch.arange(m, device=scores.device).expand(rows, m) < counts
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, keep)
    columns = scores.T.contiguous()  # (m, rows)
    rank = torch.zeros(columns.shape, dtype=torch.int8, device=scores.device)  # how many of its row come before it
    for i in range(m):
        for j in range(i + 1, m):
            first = columns[i] >= columns[j]
            rank[j] += first
            rank[i] += ~first
    return (counts > rank.T).contiguous()


def nearest_power(weight: Tensor, top: int, count: int) -> Tensor:
    """Each weight at the nearest of ``0, +-2^top, +-2^(top-1), ...``, ``count`` magnitudes; nearest in the number.

    >>> from lib.constraint import nearest_power
    >>> nearest_power(torch.tensor([0.7, -0.8, 3.0, 0.1]), top=0, count=2).tolist()  # 0, 0.5 and 1
    [0.5, -1.0, 1.0, 0.0]
    """
    magnitude = wide(weight).abs().clamp(min=2.0 ** (top - count - 1), max=2.0**top)
    exponent = (magnitude / 1.5).log2().ceil()  # 1.5 * 2^e lies half way from 2^e to its double
    power = torch.where(magnitude < 2.0 ** (top - count), 0.0, exponent.clamp(top - count + 1, top).exp2())
    return power.to(weight.dtype) * weight.sign()
