"""How a network lies in arrays of cells: which arrays it takes, and how often they are read and converted.

All of it follows from shapes alone: nothing is run.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

import pandas as pd

from lib.crossbar.converters import exact_bits
from lib.crossbar.mapping import CrossbarError, Mapping, Polarized, whole

Tiling = Literal["dense", "channel_aligned"]
Pair = Literal["columns", "arrays"]
Strip = tuple[int, int]
"""Rows and filters whose weights lie side by side and are read together."""

_ISAAC = Mapping("offset", weight_bits=8, cell_bits=2)


@dataclass(frozen=True)
class Array:
    """An array of cells, what lies in it, and what goes in and out: ISAAC's (ISCA 2016) with 8-bit numbers by default.

    Attributes:
        rows, columns: of cells.
        mapping: how a signed weight becomes cells; it needs ``weight_bits``.
        input_bits: of an activation; ``dac_bits`` of them are applied at once, so that it takes ``steps`` reads.
        tiling: how a layer's rows are cut: ``dense``, or ``channel_aligned`` (MNSIM 2.0), where no channel's kernel is
            spread over two arrays.
        pair: where the second cell of a weight lies: beside the first in the same array, or at its place in a second
            array (``two_crossbar`` of PRIME).
        analog_difference: a pair is subtracted before one conversion; otherwise both are converted.
        active_rows: that are read at once, and converted; the rows of an array take turns (None: all at once).
        adc_bits: of the converters; None: as many as tell all sums of perfect cells apart. Such converters, and those
            of more bits, read in steps of one level, which also rounds small deviations of cells and wires away;
            those of fewer bits have the range that loses least.
        flip: columns that are more than half full are stored inverted (ISAAC), which saves a bit and takes a column of
            ones in every array.
        dummy: a column of cells that are off is subtracted from every other, so that a finite ``on_off`` leaves no
            constant current (it cancels in pairs anyway). Without it that current is in the sums, but in no range that
            is chosen from the array's size alone.

    Raises:
        CrossbarError: a size or number of bits that cannot be.

    >>> from lib.crossbar import Array
    >>> array = Array()
    >>> array.steps, array.cell_top, array.mapping.slices  # 8 reads, levels 0 to 3, 4 cells a weight
    (8, 3, 4)
    >>> Array(tiling="channel_aligned").usable_rows(kernel=25)
    125
    """

    rows: int = 128
    columns: int = 128
    mapping: Mapping = _ISAAC
    input_bits: int = 8
    dac_bits: int = 1
    tiling: Tiling = "dense"
    pair: Pair = "columns"
    analog_difference: bool = False
    active_rows: int | None = None
    adc_bits: int | None = None
    flip: bool = False
    dummy: bool = True

    def __post_init__(self) -> None:
        whole(self, "rows", "columns", "active_rows", "input_bits", "dac_bits", "adc_bits")
        if self.rows < 1 or self.columns < 1:
            raise CrossbarError(f"an array of {self.rows} rows and {self.columns} columns: both must be 1 or more")
        if self.mapping.weight_bits is None:
            raise CrossbarError("an array counts whole cells: its mapping needs weight_bits")
        if not 1 <= self.dac_bits <= self.input_bits <= 32:
            given = f"input_bits = {self.input_bits}, dac_bits = {self.dac_bits}"
            raise CrossbarError(f"{given}: allowed are 1 <= dac_bits <= input_bits <= 32")
        for name, value, allowed in (("tiling", self.tiling, Tiling), ("pair", self.pair, Pair)):
            if value not in get_args(allowed):
                raise CrossbarError(f"{name} = {value!r}: allowed are {', '.join(get_args(allowed))}")
        if self.mapping.columns == 1 and (self.pair == "arrays" or self.analog_difference):
            raise CrossbarError(f"mapping {self.mapping.scheme!r} has one cell a weight: there is no pair to place")
        if not 1 <= self.height <= self.rows or self.rows % self.height:
            raise CrossbarError(f"active_rows = {self.active_rows}: allowed are divisors of rows = {self.rows}")
        if self.tiling == "channel_aligned" and self.height != self.rows:
            raise CrossbarError(f"active_rows = {self.active_rows}: channel_aligned reads all {self.rows} rows at once")
        if self.adc_bits is not None and not 1 <= self.adc_bits <= 24:
            raise CrossbarError(f"adc_bits = {self.adc_bits}: allowed are 1 to 24, or None for as many as it takes")
        if isinstance(self.mapping, Polarized) and self.height != self.mapping.fragment:
            raise CrossbarError(
                f"active_rows = {self.height}, fragments of {self.mapping.fragment} rows: a fragment is read at once"
            )
        if self.flip and self.analog_difference:
            raise CrossbarError("flip inverts single columns: it goes without analog_difference")

    @property
    def height(self) -> int:
        """Rows that are read at once."""
        return self.rows if self.active_rows is None else self.active_rows

    def usable_rows(self, kernel: int) -> int:
        """Rows that the tiling can fill with a layer whose channels have ``kernel`` weights.

        Raises:
            CrossbarError: ``channel_aligned``, and a channel does not fit.
        """
        if self.tiling == "dense":
            return self.rows
        if kernel > self.rows:
            raise CrossbarError(f"channel_aligned: kernels of {kernel} weights, and arrays of {self.rows} rows")
        return self.rows // kernel * kernel

    @property
    def steps(self) -> int:
        """Reads that an activation takes, ``T``."""
        return ceil(self.input_bits / self.dac_bits)

    @property
    def cell_bits(self) -> int:
        """Bits of a cell; without slices it holds a whole number."""
        mapping = self.mapping
        return mapping.cell_bits or mapping.weight_bits - (mapping.scheme != "offset")

    @property
    def cell_top(self) -> int:
        """The largest number in a cell."""
        return 2**self.cell_bits - 1

    @property
    def exact_bits(self) -> int:
        """Bits that tell all sums of a column apart; those of an analog difference have a sign."""
        return exact_bits(self.height, self.cell_bits, self.dac_bits, self.flip) + self.analog_difference

    @property
    def input_top(self) -> int:
        """The largest number on a row in one step."""
        return 2**self.dac_bits - 1


def tile(shapes: pd.DataFrame, array: Array) -> pd.DataFrame:
    """Arrays and events of every layer for one input, all weights included.

    Args:
        shapes: rows of `layer_shapes`.

    Returns:
        The shapes with, by layer: ``arrays``; ``cells`` that hold something, and ``utilization``, these over the cells
        there; ``steps``, reads one after the other; conversions from analog (``adc_used`` of columns that hold
        something, ``adc_full`` of all columns of the arrays) and to it (``dac_used``, ``dac_full``; each array has its
        own row drivers); ``cell_reads`` and ``array_reads``.

    Raises:
        CrossbarError: ``channel_aligned`` and a kernel that is larger than an array has rows.

    >>> from lib import crossbar, models, shapes
    >>> layers = shapes.layer_shapes(models.build("lenet5", (1, 28, 28), 10), (1, 28, 28))
    >>> crossbar.tile(layers, crossbar.Array())["arrays"].tolist()  # fc1: 7 strips of 128 rows, 2000 cells wide
    [1, 8, 112, 4]
    """
    counts = []
    for layer in shapes.itertuples():
        height = array.usable_rows(layer.kernel)
        whole, rest = divmod(layer.rows, height)
        strips = [(height, layer.filters)] * whole + [(rest, layer.filters)] * bool(rest)
        counts.append(count(strips * layer.groups, layer.vectors, array))
    return counted(pd.concat([shapes, pd.DataFrame(counts, index=shapes.index)], axis=1), array)


def counted(tiles: pd.DataFrame, array: Array) -> pd.DataFrame:
    """Counts that say for what layout they hold, so that nothing prices them for another."""
    tiles.attrs["layout"] = layout(array)
    return tiles


def layout(array: Array) -> dict[str, int | str | bool]:
    """What of an array the counts depend on."""
    same = ("rows", "columns", "steps", "height", "tiling", "pair", "analog_difference")
    return {name: getattr(array, name) for name in same} | {"cells": array.mapping.slices * array.mapping.columns}


def count(strips: list[Strip], vectors: int, array: Array, stacked: bool = False) -> dict[str, float]:
    """What `tile` says of one layer, whose weights lie in strips that are read on their own.

    Args:
        strips: each of so many rows and so many filters.
        stacked: strips lie above each other in an array, where they fit, and are read one after the other; otherwise
            each starts an array of its own.
    """
    cells_a_weight = array.mapping.slices * array.mapping.columns
    halves = 2 if array.pair == "arrays" else 1
    reads, share = vectors * array.steps, 2 if array.analog_difference else 1
    pieces = [halves * ceil(filters * cells_a_weight / halves / array.columns) for _, filters in strips]
    turns = [ceil(rows / array.height) for rows, _ in strips]
    cells = [rows * filters * cells_a_weight for rows, filters in strips]
    arrays, longest = sum(pieces), max(turns, default=0)
    if stacked:
        tall = ((rows, t, p) for (rows, _), t, p in zip(strips, turns, pieces, strict=True))
        arrays, longest = _stack([(rows, t) for rows, t, p in tall for _ in range(p)], array.rows)
    converted = sum(t * filters * cells_a_weight for t, (_, filters) in zip(turns, strips, strict=True))
    array_reads = sum(t * p for t, p in zip(turns, pieces, strict=True))
    return {
        "arrays": arrays,
        "cells": sum(cells),
        "utilization": sum(cells) / max(1, arrays * array.rows * array.columns),
        "steps": reads * longest,
        "adc_used": reads * converted // share,
        "adc_full": reads * array_reads * array.columns // share,
        "dac_used": reads * sum(rows * p for (rows, _), p in zip(strips, pieces, strict=True)),
        "dac_full": reads * arrays * array.rows,
        "cell_reads": reads * sum(cells),
        "array_reads": reads * array_reads,
    }


def _stack(pieces: list[tuple[int, int]], rows: int) -> tuple[int, int]:
    """Arrays that pieces of (rows, turns) fill, the tallest first, each where there is room; and the most turns."""
    free: list[int] = []
    turns: list[int] = []
    for height, turn in sorted(pieces, reverse=True):
        place = next((i for i, room in enumerate(free) if room >= height), None)
        if place is None:
            place = len(free)
            free.append(rows)
            turns.append(0)
        free[place] -= height
        turns[place] += turn
    return len(free), max(turns, default=0)
