"""Causal attention that leaves keys out: by blocks as they lie, by blocks of sorted keys, and S2O's ranked prefix.

All take their own segment densely and choose among the keys before it, segment by segment; they differ in the order
in which keys are offered and in when they stop.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from lib.kernels import KernelError, ordered_attention

Rule = Literal["ranked", "blocks", "sorted blocks"]


class Attended(NamedTuple):
    """Outputs ``(H, n, d)``, and the share of the causal pairs of queries and keys that was computed, by head."""

    out: Tensor
    density: Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    """Plain causal attention of ``(H, n, d)`` and grouped ``(G, n, d)``, scaled by the root of ``d``.

    >>> from lib.layers import dense_attention
    >>> dense_attention(*torch.rand(3, 2, 10, 4)).density.tolist()
    [1.0, 1.0]
    """
    out = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    return Attended(out, torch.ones(len(q)))


@dataclass(frozen=True)
class SparseAttention:
    """Which keys of the past a segment of queries takes.

    - ``ranked`` (S2O, arXiv 2602.22575): keys one by one, by their product with the mean query of the segment. Queries
      of a segment are sorted by their product with it, too, so that those that stop early stop together.
    - ``blocks``: blocks of neighbours, by the product of their mean key with the mean query.
    - ``sorted blocks`` (permuted block-sparse attention, arXiv 2510.21270): the same after the keys of every segment
      are sorted by the attention that the last ``queries`` queries pay them.

    With ``tau`` a block of queries stops at the block of keys that adds a smaller share to the mass of its softmax;
    ``share`` is the most that a segment takes of the keys before it, in whole blocks.

    Attributes:
        segment: queries that share an order. queries: of these, computed and stopped together. block: keys.
        sort_queries: of ranked attention; off for an ablation.

    Raises:
        KernelError: a share outside [0, 1], or a ``tau`` outside [0, 1).

    >>> from lib.layers import SparseAttention, dense_attention
    >>> q, k, v = torch.rand(3, 2, 300, 16)
    >>> exact = SparseAttention()(q, k, v)  # tau = 0: everything is taken
    >>> torch.allclose(exact.out, dense_attention(q, k, v).out, atol=1e-5), exact.density.tolist()
    (True, [1.0, 1.0])
    >>> round(float(SparseAttention(share=0.0)(q, k, v).density[0]), 2)  # its own segment alone
    0.39
    """

    rule: Rule = "ranked"
    tau: float = 0.0
    share: float = 1.0
    segment: int = 128
    queries: int = 64
    block: int = 64
    sort_queries: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.tau < 1:
            raise KernelError(f"tau = {self.tau}: allowed are numbers in [0, 1)")
        if not 0 <= self.share <= 1:
            raise KernelError(f"share = {self.share}: allowed are numbers in [0, 1]")
        if self.rule not in ("ranked", "blocks", "sorted blocks"):
            raise KernelError(f"rule = {self.rule!r}: allowed are ranked, blocks, sorted blocks")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """Attention of ``(H, n, d)`` queries and ``(G, n, d)`` keys and values, scaled by the root of ``d``.

        Raises:
            KernelError: heads that form no whole groups, or what `ordered_attention` does not take.
        """
        heads, n, d = q.shape
        if len(k) != len(v) or heads % len(k):
            raise KernelError(f"{heads} heads of queries, {len(k)} of keys and {len(v)} of values: no whole groups")
        q = q / d**0.5
        keys = k.repeat_interleave(heads // len(k), 0)  # (H, n, d)
        pooled = _segments(q, self.segment).sum(2) / _sizes(n, self.segment)[:, None]  # (H, S, d)
        rows = None
        if self.rule == "ranked" and self.sort_queries:
            rows = self._sorted(torch.einsum("hsld,hsd->hsl", _segments(q, self.segment), pooled).flatten(1)[:, :n])
        order = self._order(q, keys, pooled)
        before = torch.arange(0, n, self.segment)  # keys before each segment
        limit = torch.ceil(self.share * before / self.block) * self.block
        limit = torch.minimum(limit.long(), before).expand(heads, -1)
        sizes = {"segment": self.segment, "queries": self.queries, "block": self.block}
        out, taken = ordered_attention(q, k, v, order, limit, rows=rows, tau=self.tau, **sizes)
        return Attended(out, self._density(taken, n))

    def _sorted(self, near: Tensor) -> Tensor:
        """Places in each segment from the largest number to the smallest, ``(H, n)``."""
        n = near.shape[1]
        order = _descending(pad(near, (0, -n % self.segment), value=-torch.inf).unflatten(1, (-1, self.segment)))
        return (order + torch.arange(order.shape[1])[:, None] * self.segment).flatten(1)[:, :n]

    def _order(self, q: Tensor, keys: Tensor, pooled: Tensor) -> Tensor:
        """Keys in the order in which they are offered to each segment, those before it first: ``(H, S, n)``."""
        n = q.shape[1]
        before = torch.arange(0, n, self.segment)
        past = torch.arange(n) < before[:, None]  # (S, n)
        if self.rule == "ranked":
            near = pooled @ keys.mT  # (H, S, n)
            return _descending(near.masked_fill(~past, -torch.inf))
        places = torch.arange(n).expand(len(q), n)
        if self.rule == "sorted blocks":
            places = self._sorted(self._by_attention(q, keys))
            keys = keys.take_along_dim(places[:, :, None], 1)
        means = _segments(keys, self.block).sum(2) / _sizes(n, self.block)[:, None]  # (H, blocks, d)
        near = (pooled @ means.mT).repeat_interleave(self.block, 2)[:, :, :n]
        return places[:, None].expand_as(near).take_along_dim(_descending(near.masked_fill(~past, -torch.inf)), 2)

    def _by_attention(self, q: Tensor, keys: Tensor) -> Tensor:
        """What the last queries pay each key on average, ``(H, n)``."""
        n = q.shape[1]
        last = q[:, -self.queries :]
        seen = torch.arange(n) <= torch.arange(n - last.shape[1], n)[:, None]
        return (last @ keys.mT).masked_fill(~seen, -torch.inf).softmax(2).mean(1)

    def _density(self, taken: Tensor, n: int) -> Tensor:
        firsts = torch.arange(0, n, self.queries)
        sizes = torch.minimum(torch.tensor(self.queries), n - firsts)
        inside = sum(size * (size + 1) // 2 for size in _sizes(n, self.segment).tolist())
        return ((taken * sizes).sum(1) + inside) / (n * (n + 1) // 2)


def _segments(x: Tensor, length: int) -> Tensor:
    """``(H, n, d)`` in segments, zeros at the end: ``(H, S, length, d)``."""
    return pad(x, (0, 0, 0, -x.shape[1] % length)).unflatten(1, (-1, length))


def _descending(near: Tensor) -> Tensor:
    return near.argsort(dim=-1, descending=True, stable=True)


def _sizes(n: int, length: int) -> Tensor:
    return torch.minimum(torch.tensor(length), n - torch.arange(0, n, length))
