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
    """Which keys of the past the queries of a segment take.

    - ``ranked`` (S2O, arXiv 2602.22575): keys one by one, by their product with the mean query of the segment. Queries
      of a segment are sorted by their product with it, too, so that those that stop early stop together.
    - ``blocks``: for each block of queries, blocks of neighbouring keys by the share of its attention that the mean
      query would pay the mean keys, and always the block of the first token.
    - ``sorted blocks`` (permuted block-sparse attention, arXiv 2510.21270, as its released code chooses): the same
      after the keys of every segment are sorted by the attention that the last ``queries`` queries pay them.

    With ``tau`` a block of queries stops at the block of keys that adds a smaller share to the mass of its softmax.
    ``share`` is how much is taken: of the keys before a segment, in whole blocks (``ranked``), or of the attention
    that is paid to mean keys, by as few blocks as hold it.

    Attributes:
        segment: queries that share an order. queries: of these, computed and stopped together. block: keys.
        sort_queries: of ranked attention; off for an ablation.

    Raises:
        KernelError: a share outside [0, 1], a ``tau`` outside [0, 1), or a segment that blocks of keys do not fill.

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
        if self.rule != "ranked" and (self.block < 1 or self.segment % self.block):
            raise KernelError(f"segment = {self.segment}: a multiple of block = {self.block} is allowed")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """Attention of ``(H, n, d)`` queries and ``(G, n, d)`` keys and values, scaled by the root of ``d``.

        Raises:
            KernelError: heads that form no whole groups, or what `ordered_attention` does not take.
        """
        heads, _, d = q.shape
        if len(k) != len(v) or heads % len(k):
            raise KernelError(f"{heads} heads of queries, {len(k)} of keys and {len(v)} of values: no whole groups")
        q = q / d**0.5
        keys = k.repeat_interleave(heads // len(k), 0)  # (H, n, d)
        order, limit, rows = self._one_by_one(q, keys) if self.rule == "ranked" else self._by_blocks(q, keys)
        sizes = {"segment": self.segment, "queries": self.queries, "block": self.block}
        out, taken = ordered_attention(q, k, v, order, limit, rows=rows, tau=self.tau, **sizes)
        return Attended(out, self._density(taken, q.shape[1]))

    def _one_by_one(self, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys in the order in which they are offered to each block of queries, ``(H, blocks, n)``, how many, rows."""
        heads, n, _ = q.shape
        means, before = _means(q, self.segment), torch.arange(0, n, self.segment)
        near = (means @ keys.mT).masked_fill(torch.arange(n) >= before[:, None], -torch.inf)  # (H, S, n)
        blocks = torch.ceil(self.share * before.double() / self.block - 1e-9)  # 0.3 * 3200 / 64 is 15, not a bit more
        limit = (blocks * self.block).long().expand(heads, -1)
        of = torch.arange(0, n, self.queries) // self.segment  # the segment of every block of queries
        rows = self._sorted((q * means.repeat_interleave(self.segment, 1)[:, :n]).sum(2)) if self.sort_queries else None
        return _descending(near)[:, of], limit[:, of], rows

    def _by_blocks(self, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, None]:
        """The same, where blocks of keys are chosen by what mean queries would pay mean keys."""
        heads, n, _ = q.shape
        places = torch.arange(n).expand(heads, n)
        if self.rule == "sorted blocks":
            places = self._sorted(self._by_attention(q, keys))
            keys = keys.take_along_dim(places[:, :, None], 1)
        near = _means(q, self.queries) @ _means(keys, self.block).mT  # (H, blocks of queries, blocks of keys)
        start = torch.arange(0, n, self.queries) // self.segment * self.segment
        past = torch.arange(0, n, self.block) < start[:, None]
        paid = near.masked_fill(~past, -torch.inf).softmax(2).nan_to_num(0.0)  # none is past: nothing is paid
        best, at = paid.sort(dim=2, descending=True, stable=True)
        enough = (best.cumsum(2) - best >= self.share) & (self.share < 1)
        taken = torch.zeros_like(past.expand_as(paid)).scatter(2, at, ~enough) & past
        first = (places == 0).int().argmax(1, keepdim=True)[:, None] // self.block
        taken |= past & (torch.arange(past.shape[1]) == first)
        chosen = _descending(taken + paid)[..., None] * self.block + torch.arange(self.block)
        order = (
            places[:, None].expand(-1, len(start), -1).take_along_dim(chosen.flatten(2)[..., :n].clamp(max=n - 1), 2)
        )
        return order, self.block * taken.sum(2), None

    def _sorted(self, near: Tensor) -> Tensor:
        """Places in each segment from the largest number to the smallest, ``(H, n)``."""
        n = near.shape[1]
        order = _descending(pad(near, (0, -n % self.segment), value=-torch.inf).unflatten(1, (-1, self.segment)))
        return (order + torch.arange(order.shape[1])[:, None] * self.segment).flatten(1)[:, :n]

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


def _means(x: Tensor, length: int) -> Tensor:
    """Means over stretches of ``(H, n, d)``, the last of which may be shorter: ``(H, stretches, d)``."""
    n = x.shape[1]
    return pad(x, (0, 0, 0, -n % length)).unflatten(1, (-1, length)).sum(2) / _sizes(n, length)[:, None]


def _descending(near: Tensor) -> Tensor:
    return near.argsort(dim=-1, descending=True, stable=True)


def _sizes(n: int, length: int) -> Tensor:
    return torch.minimum(torch.tensor(length), n - torch.arange(0, n, length))
