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
def convolution(patterns: tuple[Pattern, ...], rows: int, vectors: int, share: bool = True, reorder: bool = True):
    """A compiled loop over all strips of ``rows`` rows and ``vectors`` vectors, and all filters.

    It takes the inputs of one image, padded, as one line of numbers (with some to spare at the end); for each kernel
    that is kept where its channel begins there, sorted by filter and pattern; the kernels' weights; their patterns,
    which are not read where kernels are sorted by them; for each filter where its patterns begin; the biases; the
    width of a row of inputs; and where the outputs go, ``(filters, rows, columns)``.

    Args:
        patterns: all with as many taps. share: an input that several taps of a pattern use, in this row or the next,
            is loaded once: PatDNN's load redundancy elimination between taps (theirs between filters is not done: each
            filter loads its inputs anew). reorder: a filter's kernels are sorted by pattern; without, each is asked for
            its own, and limits are where a filter begins and ends.
    """
    strip = _strip(patterns, rows, vectors, share, reorder)
    count = len(patterns) if reorder else 1

    @njit(nogil=True)
    def all_strips(x, places, weights, which, bounds, biases, width, out):
        filters, height, columns = out.shape
        flat = out.reshape(-1)
        for y in range(0, height, rows):
            for left in range(0, columns, vectors * LANES):
                for f in range(filters):
                    base, at = y * width + left, (f * height + y) * columns + left
                    strip(x, places, weights, which, bounds, f * (count + 1), biases[f], base, width, flat, at, columns)

    return all_strips


def _strip(patterns: tuple[Pattern, ...], rows: int, vectors: int, share: bool, reorder: bool):
    """For each pattern a loop without branches; sums stay in registers from the first to the last."""
    taps = len(patterns[0])

    @intrinsic
    def strip(typing, x, places, weights, which, bounds, first, bias, base, width, out, at, columns):
        signature = types.void(x, places, weights, which, bounds, first, bias, base, width, out, at, columns)

        def generate(context, b, signature, arguments):
            def data(i):
                return cgutils.create_struct_proxy(signature.args[i])(context, b, value=arguments[i]).data

            def vector_at(pointer, place):
                return b.bitcast(b.gep(pointer, [place]), VECTOR.as_pointer())

            def spread(number):
                one = b.insert_element(ir.Constant(VECTOR, ir.Undefined), number, INT(0))
                zeros = ir.Constant(ir.VectorType(INT, LANES), [INT(0)] * LANES)
                return b.shuffle_vector(one, ir.Constant(VECTOR, ir.Undefined), zeros)

            def joined(*paths):
                """The sums that came from one of several blocks."""
                found = [b.phi(VECTOR) for _ in paths[0][1]]
                for block, sums in paths:
                    for phi, value in zip(found, sums, strict=True):
                        phi.add_incoming(value, block)
                return found

            inputs, starts, values, kinds, limits, outputs = (data(i) for i in (0, 1, 2, 3, 4, 9))
            first, base, width, at, columns = (b.sext(arguments[i], LONG) for i in (5, 7, 8, 10, 11))
            fma = cgutils.get_or_insert_function(
                b.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fma.v{LANES}f32"
            )

            def multiplied(pattern, j, sums):
                """The sums after kernel ``j``, which has this pattern."""
                place, loaded = b.add(base, b.sext(b.load(b.gep(starts, [j])), LONG)), {}

                def load(row, column, v):
                    if (row, column, v) not in loaded or not share:
                        where = b.add(b.add(place, b.mul(width, LONG(row))), LONG(column + v * LANES))
                        loaded[row, column, v] = b.load(vector_at(inputs, where), name="x")
                        loaded[row, column, v].align = 4
                    return loaded[row, column, v]

                sums = [*sums]
                for t, (dy, dx) in enumerate(pattern):
                    weight = spread(b.load(b.gep(values, [b.add(b.mul(j, LONG(taps)), LONG(t))])))
                    for r in range(rows):
                        for v in range(vectors):
                            i = r * vectors + v
                            sums[i] = b.call(fma, [load(dy + r, dx, v), weight, sums[i]])
                return sums

            def asked(_, j, sums):
                """The same, by a branch to the code of the pattern that the kernel turns out to have."""
                cases, done = [b.append_basic_block() for _ in patterns], b.append_basic_block()
                switch = b.switch(b.load(b.gep(kinds, [j])), cases[0])
                ends = []
                for p, (pattern, case) in enumerate(zip(patterns, cases, strict=True)):
                    switch.add_case(INT(p), case)
                    b.position_at_end(case)
                    ends.append((case, multiplied(pattern, j, sums)))
                    b.branch(done)
                b.position_at_end(done)
                return joined(*ends)

            ends = [
                b.add(b.add(at, b.mul(columns, LONG(r))), LONG(v * LANES)) for r in range(rows) for v in range(vectors)
            ]
            sums = [spread(arguments[6])] * len(ends)
            for p, pattern in enumerate(patterns if reorder else [()]):
                begin, stop = (b.load(b.gep(limits, [b.add(first, LONG(p + i))])) for i in (0, 1))
                before, loop, after = b.block, b.append_basic_block(), b.append_basic_block()
                b.cbranch(b.icmp_signed("<", begin, stop), loop, after)
                b.position_at_end(loop)
                j = b.phi(LONG)
                j.add_incoming(begin, before)
                running = joined((before, sums))
                new = (multiplied if reorder else asked)(pattern, j, running)
                following, latch = b.add(j, LONG(1)), b.block
                b.cbranch(b.icmp_signed("<", following, stop), loop, after)
                j.add_incoming(following, latch)
                for now, then in zip(running, new, strict=True):
                    now.add_incoming(then, latch)
                b.position_at_end(after)
                sums = joined((before, sums), (latch, new))
            for end, total in zip(ends, sums, strict=True):
                b.store(total, vector_at(outputs, end)).align = 4
            return context.get_dummy_value()

        return signature, generate

    return strip
