"""Causal attention that takes past keys in any order, block by block, and may stop: an online softmax, compiled.

Partial sums of an online softmax are valid after every block (FlashAttention, NeurIPS 2022), so nothing of the matrix
of attention is kept, and what is skipped is not computed.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from lib.kernels.errors import KernelError

NOTHING = -1e30  # a score that adds no mass; finite, so that differences are


@njit(nogil=True, fastmath=True)
def _add(scores, values, most, mass, sums):
    """Take a block of keys into the running maximum, mass and sums of every query; its mean share of the mass."""
    queries, keys = scores.shape
    gained = np.float32(0)
    for i in range(queries):
        row = scores[i]
        top = most[i]
        for j in range(keys):
            top = max(top, row[j])
        shrink = np.exp(most[i] - top)
        part = np.float32(0)
        for j in range(keys):
            row[j] = np.exp(row[j] - top)
            part += row[j]
        mass[i] = mass[i] * shrink + part
        most[i] = top
        gained += part / mass[i]
        for c in range(sums.shape[1]):
            sums[i, c] *= shrink
    sums += np.dot(scores, values)
    return gained / queries


@njit(nogil=True)
def _head(q, k, v, rows, order, limit, segment, queries, block, tau, out, taken):
    """One head: ``q, k, v`` ``(n, d)``; keys taken from the past by every block of queries in ``taken``."""
    n = len(q)
    for start in range(0, n, segment):
        stop = min(start + segment, n)
        for first in range(start, stop, queries):
            asks = first // queries
            own = rows[first : min(first + queries, stop)]
            asked = q[own]
            most = np.full(len(own), np.float32(NOTHING))
            mass = np.zeros(len(own), np.float32)
            sums = np.zeros((len(own), v.shape[1]), np.float32)
            for a in range(start, stop, block):  # the segment itself, densely
                b = min(a + block, stop)
                scores = np.dot(asked, np.ascontiguousarray(k[a:b].T))
                for i in range(len(own)):
                    for j in range(max(a, own[i] + 1), b):
                        scores[i, j - a] = NOTHING
                _add(scores, v[a:b], most, mass, sums)
            done = 0
            while done < limit[asks]:
                chosen = order[asks, done : min(done + block, limit[asks])]
                scores = np.dot(asked, np.ascontiguousarray(k[chosen].T))
                gain = _add(scores, v[chosen], most, mass, sums)
                done += len(chosen)
                if gain < tau:
                    break
            for i in range(len(own)):
                out[own[i]] = sums[i] / mass[i]
            taken[asks] = done


def ordered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    limit: Tensor,
    *,
    segment: int,
    rows: Tensor | None = None,
    queries: int = 64,
    block: int = 64,
    tau: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Causal attention whose queries take their own segment densely and past keys in a given order.

    Args:
        q: ``(H, n, d)``, scaled as it should be. k, v: ``(G, n, d)``; ``H / G`` heads share one of keys and values.
        order: in which each block of queries takes the keys before its segment, ``(H, blocks, n)``; what stands after
            those is not looked at.
        limit: how many of these at most, ``(H, blocks)``; more than there are: all.
        segment: length of a segment, a multiple of ``queries``. rows: in which order the queries of each segment form
            blocks, ``(H, n)``; None: as they come.
        queries, block: queries and keys of a block.
        tau: a block of queries stops when a block of keys adds a smaller share than this to the mass of its softmax,
            on average. 0: never.

    Returns:
        ``(H, n, d)``, and the keys that every block of queries took from the past, ``(H, blocks)``.

    Raises:
        KernelError: other shapes or types, a segment that blocks of queries do not fill, keys in an order that do not
            stand before their segment, or rows that are not each segment's own.

    >>> import torch
    >>> from torch.nn.functional import scaled_dot_product_attention
    >>> from lib.kernels import ordered_attention
    >>> q, k, v = torch.rand(3, 2, 100, 16)
    >>> order, limit = torch.arange(100).expand(2, 7, 100), torch.full((2, 7), 100)
    >>> out, _ = ordered_attention(q, k, v, order, limit, segment=32, queries=16)  # all keys: dense
    >>> torch.allclose(out, scaled_dot_product_attention(q, k, v, is_causal=True, scale=1), atol=1e-5)
    True
    """
    heads, n, _ = q.shape
    if segment < 1 or queries < 1 or block < 1 or (segment % queries and segment < n):
        raise KernelError(f"segment = {segment}: a positive multiple of queries = {queries} is allowed")
    count = -(-n // queries)
    shapes = {"k": (*k.shape[1:],), "v": (*v.shape[1:],), "order": (*order.shape,), "limit": (*limit.shape,)}
    asked = {"k": (*q.shape[1:],), "v": (*q.shape[1:],), "order": (heads, count, n), "limit": (heads, count)}
    for name, shape in shapes.items():
        if shape != asked[name]:
            raise KernelError(f"{name} of {shape}: {asked[name]} is allowed for queries of {(*q.shape,)}")
    if len(k) != len(v) or heads % len(k):
        raise KernelError(f"{heads} heads of queries, {len(k)} of keys and {len(v)} of values: no whole groups")
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in (q, k, v)):
        raise KernelError(f"queries, keys, values of {q.dtype}, {k.dtype}, {v.dtype}: float32 on a CPU is allowed")
    own, past = torch.arange(n).expand(heads, n), queries * torch.arange(count) // segment * segment
    rows, limit = own if rows is None else rows, torch.minimum(limit, past)
    looked_at = torch.arange(n) < limit[..., None]  # (H, blocks, n)
    if (looked_at & ((order < 0) | (order >= past[:, None]))).any():
        raise KernelError("order: a key that is to be taken does not stand before its segment")
    if not torch.equal(rows.sort().values, own) or not torch.equal(rows // segment, own // segment):
        raise KernelError("rows: the queries of each segment, each once, are allowed")
    arrays = [t.detach().contiguous().numpy() for t in (q, k, v, rows, order, limit)]
    out, taken = np.empty(q.shape, np.float32), np.zeros((heads, count), np.int64)
    q_, k_, v_, rows_, order_, limit_ = arrays
    for h in range(heads):
        g = h // (heads // len(k_))
        _head(q_[h], k_[g], v_[g], rows_[h], order_[h], limit_[h], segment, queries, block, tau, out[h], taken[h])
    return torch.from_numpy(out), torch.from_numpy(taken)
