"""Sums of columns and their conversion, one by one, compiled: what PyTorch has no operation for.

Innermost loops run over contiguous numbers: the compiler makes vector instructions of them.
"""

import numpy as np
from numba import njit
from numba.extending import intrinsic

LANES = 1024
"""Sums at a time: they and the bits on their rows stay in a core's nearest cache."""


def compiled(function):
    """Compiled at its first call, in some seconds, and kept for later processes where there is a place for it.

    That is beside this file, or where the user's caches are; ``NUMBA_CACHE_DIR`` names another.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # nothing can be written
        return njit(nogil=True)(function)


@intrinsic
def ones(typing, word):
    """How many bits of a word are set."""
    return word(word), lambda context, builder, signature, args: builder.ctpop(args[0])


@compiled
def pack(x, first, height, start, words, digit, steps):
    """Whole numbers ``(rows, M)`` on ``height`` rows from ``first`` on, vectors from ``start`` on, 64 rows a word.

    Row ``w * digit + q`` of ``words``, ``(ceil(height / 64) * digit, steps * vectors)``, gets bit ``q`` of every step's
    digit, of rows ``64 w`` and on.
    """
    words[:] = 0
    vectors = words.shape[1] // steps
    for r in range(first, min(len(x), first + height)):
        row = x[r, start : start + vectors]
        by = np.uint64((r - first) % 64)
        for bit in range(digit * steps):
            begin = bit // digit * vectors
            word = words[(r - first) // 64 * digit + bit % digit, begin : begin + vectors]
            for m in range(vectors):
                word[m] |= np.uint64(np.int32(row[m]) >> bit & 1) << by


@compiled
def convert(sums, gain, places, step, low, high, less, total, out):
    """Add the codes of a column's ``sums`` (T * M), less ``less`` times these in steps, to ``out`` (M).

    A step in time counts for its number in ``places``, the column for ``gain``; ``total`` (M) is room to work in.
    """
    total[:] = 0
    for t in range(len(places)):
        own = sums[t * len(out) : (t + 1) * len(out)]
        for m in range(len(out)):
            there = own[m] / step
            total[m] += places[t] * (max(low, min(np.rint(there), high)) - less * there)
    for m in range(len(out)):
        out[m] += gain * total[m]


@compiled
def add(x, digit, cells, gains, places, step, low, high, out):
    """Any cells under whole inputs: a column's sum is that of its cells on the rows that are on.

    Few are: many inputs are zero, and the others have about as many zeros as ones in them.

    Args:
        x: (G, M, rows), integers. digit: bits that go a step.
        cells: (B, height + 1, columns), the last row all zeros. gains: (columns).
        out: (G, M, F / G), to which is added; column ``k`` is of filter ``k % (F / G)``.
    """
    blocks, height, columns = cells.shape
    height -= 1
    tiles, filters, steps = blocks // len(x), out.shape[2], len(places)
    nonzero, many = np.empty(height + 1, np.uint64), np.empty(steps * digit, np.int64)
    on = np.empty((steps * digit, height + 3), np.uint64)
    for b in range(blocks):
        g, first = b // tiles, b % tiles * height
        for begin in range(0, columns, LANES):
            end = min(columns, begin + LANES)
            sums, total = np.empty(end - begin, cells.dtype), np.empty(end - begin, places.dtype)
            for m in range(x.shape[1]):
                row = x[g, m, first : first + height]
                some = 0
                for r in range(len(row)):
                    nonzero[some] = r
                    some += row[r] != 0
                for bit in range(steps * digit):
                    n = 0
                    for i in range(some):
                        on[bit, n] = nonzero[i]
                        n += row[nonzero[i]] >> bit & 1
                    on[bit, n : n + 3] = height  # where all is zero
                    many[bit] = n
                total[:] = 0
                for t in range(steps):
                    sums[:] = 0
                    for bit in range(digit * (t + 1) - 1, digit * t - 1, -1):
                        if digit > 1:
                            sums *= 2
                        for i in range(0, many[bit], 4):
                            p, q = cells[b, on[bit, i], begin:end], cells[b, on[bit, i + 1], begin:end]
                            r, s = cells[b, on[bit, i + 2], begin:end], cells[b, on[bit, i + 3], begin:end]
                            for k in range(len(sums)):
                                sums[k] += p[k] + q[k] + (r[k] + s[k])
                    for k in range(len(sums)):
                        total[k] += places[t] * max(low, min(np.rint(sums[k] / step), high))
                f = begin % filters
                for k in range(len(total)):
                    out[g, m, f] += gains[begin + k] * total[k]
                    f = f + 1 if f + 1 < filters else 0


@compiled
def count(x, height, digit, cells, words, units, gains, places, step, low, high, less, out):
    """Whole cells under whole inputs: a column's sum is how often a bit of an input meets a bit of a cell.

    Args:
        x: (G, rows, M). height: rows that are read at once.
        cells: bits of 64 cells a word, ``(B, columns, terms)``, an even number of terms; the ``n``-th meets row
            ``words[n]`` of what `pack` makes of the inputs, and a bit that meets one counts ``units[n]`` modulo 2^32.
        gains: (B, columns). less: 0 for what converters read, 1 for that minus the sums.
        out: (G, F / G, M), to which is added; column ``k`` is of filter ``k % (F / G)``.
    """
    vectors = x.shape[2]
    blocks, columns, terms = cells.shape
    tiles, filters, steps = blocks // len(x), out.shape[1], len(places)
    wide = max(1, LANES // steps)
    for b in range(blocks):
        if not cells[b].any():
            continue
        g, first = b // tiles, b % tiles * height
        for start in range(0, vectors, wide):
            stop = min(vectors, start + wide)
            bits = np.empty(((height + 63) // 64 * digit, steps * (stop - start)), np.uint64)
            pack(x[g], first, height, start, bits, digit, steps)
            sums, total = np.empty(bits.shape[1], np.float32), np.empty(stop - start, places.dtype)
            for k in range(columns):
                own = cells[b, k]
                if not own.any():
                    continue
                sums[:] = 0
                n = 0
                while n < terms:
                    p, q, c, d = bits[words[n]], bits[words[n + 1]], own[n], own[n + 1]
                    u, v = np.uint64(units[n]), np.uint64(units[n + 1])
                    if n + 4 <= terms and u == v and units[n + 2] == units[n + 3]:
                        r, s, e, f = bits[words[n + 2]], bits[words[n + 3]], own[n + 2], own[n + 3]
                        v = np.uint64(units[n + 2])
                        for m in range(len(sums)):
                            found = (ones(p[m] & c) + ones(q[m] & d)) * u + (ones(r[m] & e) + ones(s[m] & f)) * v
                            sums[m] += np.float32(np.int32(found))
                        n += 4
                    else:
                        for m in range(len(sums)):
                            sums[m] += np.float32(np.int32(ones(p[m] & c) * u + ones(q[m] & d) * v))
                        n += 2
                convert(sums, gains[b, k], places, step, low, high, less, total, out[g, k % filters, start:stop])
