"""The one inner loop of sparse convolutions: a strip of an output image stays in registers while weights run past.

LLVM is told the vectors in so many words. Left to itself it cannot know that rows of inputs and outputs do not overlap,
and makes code of single numbers, ten times slower.
"""

from functools import cache

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
"""Numbers of float32 in a vector of AVX2; on a machine with others LLVM joins or splits them."""

FLOAT, INT, LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)

Pattern = tuple[tuple[int, int], ...]
"""Taps of a kernel that are kept: rows and columns."""


@cache
def convolution(patterns: tuple[Pattern, ...], rows: int, vectors: int, share: bool = True):
    """A compiled loop over all strips of ``rows`` rows and ``vectors`` vectors, and all filters.

    It takes the inputs of one image, padded, as one line of numbers (with some to spare at the end); for each kernel
    that is kept where its channel begins there, sorted by filter and pattern; the kernels' weights; for each filter
    where its patterns begin; the biases; the width of a row of inputs; and where the outputs go, ``(filters, rows,
    columns)``.

    Args:
        patterns: all with as many taps. share: an input that several taps of a pattern use, in this row or the next,
            is loaded once: PatDNN's load redundancy elimination.
    """
    strip = _strip(patterns, rows, vectors, share)
    count = len(patterns)

    @njit(nogil=True)
    def all_strips(x, places, weights, bounds, biases, width, out):
        filters, height, columns = out.shape
        flat = out.reshape(-1)
        for y in range(0, height, rows):
            for left in range(0, columns, vectors * LANES):
                for f in range(filters):
                    at = (f * height + y) * columns + left
                    strip(
                        x,
                        places,
                        weights,
                        bounds,
                        f * (count + 1),
                        biases[f],
                        y * width + left,
                        width,
                        flat,
                        at,
                        columns,
                    )

    return all_strips


def _strip(patterns: tuple[Pattern, ...], rows: int, vectors: int, share: bool):
    """For each pattern a loop without branches; sums stay in registers from the first to the last."""
    taps = len(patterns[0])

    @intrinsic
    def strip(typing, x, places, weights, bounds, first, bias, base, width, out, at, columns):
        signature = types.void(x, places, weights, bounds, first, bias, base, width, out, at, columns)

        def generate(context, b, signature, arguments):
            def data(i):
                return cgutils.create_struct_proxy(signature.args[i])(context, b, value=arguments[i]).data

            def vector_at(pointer, place):
                return b.bitcast(b.gep(pointer, [place]), VECTOR.as_pointer())

            def spread(number):
                one = b.insert_element(ir.Constant(VECTOR, ir.Undefined), number, INT(0))
                zeros = ir.Constant(ir.VectorType(INT, LANES), [INT(0)] * LANES)
                return b.shuffle_vector(one, ir.Constant(VECTOR, ir.Undefined), zeros)

            inputs, starts, values, limits, outputs = (data(i) for i in (0, 1, 2, 3, 8))
            first, base, width, at, columns = (b.sext(arguments[i], LONG) for i in (4, 6, 7, 9, 10))
            fma = cgutils.get_or_insert_function(
                b.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fma.v{LANES}f32"
            )
            ends = [
                b.add(b.add(at, b.mul(columns, LONG(r))), LONG(v * LANES)) for r in range(rows) for v in range(vectors)
            ]
            sums = [spread(arguments[5])] * len(ends)
            for p, pattern in enumerate(patterns):
                begin, stop = (b.load(b.gep(limits, [b.add(first, LONG(p + i))])) for i in (0, 1))
                before, loop, after = b.block, b.append_basic_block(), b.append_basic_block()
                b.cbranch(b.icmp_signed("<", begin, stop), loop, after)
                b.position_at_end(loop)
                j = b.phi(LONG)
                j.add_incoming(begin, before)
                running = [b.phi(VECTOR) for _ in sums]
                for now, old in zip(running, sums, strict=True):
                    now.add_incoming(old, before)
                place = b.add(base, b.sext(b.load(b.gep(starts, [j])), LONG))
                loaded = {}

                def load(row, column, v, place=place, loaded=loaded):
                    if (row, column, v) not in loaded or not share:
                        where = b.add(b.add(place, b.mul(width, LONG(row))), LONG(column + v * LANES))
                        found = b.load(vector_at(inputs, where), name="x")
                        found.align = 4
                        loaded[row, column, v] = found
                    return loaded[row, column, v]

                new = [*running]
                for t, (dy, dx) in enumerate(pattern):
                    weight = spread(b.load(b.gep(values, [b.add(b.mul(j, LONG(taps)), LONG(t))])))
                    for r in range(rows):
                        for v in range(vectors):
                            i = r * vectors + v
                            new[i] = b.call(fma, [load(dy + r, dx, v), weight, new[i]])
                following = b.add(j, LONG(1))
                b.cbranch(b.icmp_signed("<", following, stop), loop, after)
                j.add_incoming(following, loop)
                for now, then in zip(running, new, strict=True):
                    now.add_incoming(then, loop)
                b.position_at_end(after)
                joined = [b.phi(VECTOR) for _ in sums]
                for phi, old, then in zip(joined, sums, new, strict=True):
                    phi.add_incoming(old, before)
                    phi.add_incoming(then, loop)
                sums = joined
            for end, total in zip(ends, sums, strict=True):
                b.store(total, vector_at(outputs, end)).align = 4
            return context.get_dummy_value()

        return signature, generate

    return strip
