"""Stuck-at faults: cells that stay at one end of their range, alone, in lines or in clusters."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lib.crossbar import CrossbarError, Device, Mapping
from lib.crossbar.devices import Devices, disturbed, each
from lib.crossbar.mapping import whole
from lib.faults.chips import events, failures, time_of

RATIO = 5.2
"""Stuck-on over stuck-off cells: 9.04 % and 1.75 % of all cells in Chen et al. 2015."""


@dataclass(frozen=True)
class StuckAt(Device):
    """Cells stuck at their highest (on) or lowest (off) conductance, whatever is written.

    Where they are: ``cells`` one by one, independently; ``rows`` or ``columns`` of an array as a whole, both cells of
    a pair in the first case, stuck at the same end; ``clusters`` of cells within ``radius`` of a centre, each with
    probability ``fill``. In all of them a cell is broken with probability ``rate``.

    Attributes:
        rate: share of all cells, on and off together, in [0, 1].
        ratio: stuck_on over stuck_off; 0: all are off, ``inf``: all are on.
        stuck_on_value: conductance of a stuck_on cell in shares of G_max (up to 4 in Liu et al., DAC 2017).
        array: length of a row and of a column of one array, in cells; a layer's cells are one matrix here
            (`Mapping.plane`), groups side by side, cut every so many cells, whatever `lib.crossbar.Array` runs it.

    >>> from lib.crossbar import Mapping
    >>> from lib.faults import StuckAt, read_back
    >>> [round(p, 4) for p in StuckAt(0.0108).probabilities]  # on and off, 5.2 to 1
    [0.0091, 0.0017]
    >>> weight = torch.tensor([1.0, -0.5, 0.0])
    >>> [read_back(weight, Mapping(m), StuckAt(1.0, ratio=0), 0, "fc1").tolist() for m in ("two_column", "offset")]
    [[0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]]
    """

    rate: float
    ratio: float = RATIO
    stuck_on_value: float = 1.0
    where: Literal["cells", "rows", "columns", "clusters"] = "cells"
    array: int = 128
    radius: float = 3.0
    fill: float = 0.5
    draws: ClassVar = ("failures",)

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise CrossbarError(f"rate = {self.rate}: allowed are shares of all cells, 0 to 1")
        if not self.ratio >= 0 or not self.stuck_on_value > 0:
            raise CrossbarError(f"{self.ratio=}, {self.stuck_on_value=}: allowed are ratio >= 0, stuck_on_value > 0")
        if self.where not in ("cells", "rows", "columns", "clusters"):
            raise CrossbarError(f"where = {self.where!r}: allowed are 'cells', 'rows', 'columns' and 'clusters'")
        whole(self, "array")
        if self.array < 1 or self.radius < 0 or not 0 < self.fill <= 1:
            raise CrossbarError(f"{self.array=}, {self.radius=}, {self.fill=}: allowed are >= 1, >= 0, above 0 to 1")

    @classmethod
    def of(cls, on: float, off: float, **options) -> "StuckAt":
        """From the probabilities of a cell to be stuck on and to be stuck off.

        Raises:
            CrossbarError: a probability outside [0, 1], or more than 1 together.
        """
        if not (0 <= on <= 1 and 0 <= off <= 1 and on + off <= 1):
            raise CrossbarError(f"on = {on}, off = {off}: allowed are probabilities that add up to at most 1")
        return cls(on + off, ratio=on / off if off else inf, **options)

    @property
    def probabilities(self) -> tuple[float, float]:
        """Of a cell to be stuck on, and to be stuck off."""
        on = 1.0 if self.ratio == inf else self.ratio / (1 + self.ratio)
        return self.rate * on, self.rate * (1 - on)

    def disturb(self, cells: Tensor, mapping: Mapping, chip: int, layer: str) -> Tensor:
        """Write the stuck values."""
        index, on = self.draw(cells.shape, mapping, chip, layer)
        values = torch.from_numpy(np.where(on, self.stuck_on_value, mapping.g_min).astype(np.float32))
        cells.view(-1)[torch.from_numpy(index).to(cells.device)] = values.to(cells)
        return cells

    def draw(self, shape: torch.Size, mapping: Mapping, chip: int, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """Broken cells of one layer: places in the flattened ``(slices, columns, F, ...)``, and whether stuck on."""
        until = time_of(self.rate)
        place = {"cells": self._cells, "rows": self._lines, "columns": self._lines, "clusters": self._clusters}
        index, marks = place[self.where](shape, mapping, until, chip, layer)
        return index, marks * (1 + self.ratio) < self.ratio if self.ratio < inf else np.ones(len(index), bool)

    def _cells(self, shape, mapping, until, chip, layer):
        slices, columns, *weight = shape
        side = int(np.prod(weight))
        index, marks = failures(slices * 2 * side, until, chip, layer)  # a single column is the first of a pair
        if columns == 1:
            index, marks = index[(index // side) % 2 == 0], marks[(index // side) % 2 == 0]
            index = index // (2 * side) * side + index % side
        return index, marks

    def _lines(self, shape, mapping, until, chip, layer):
        height, width = mapping.plane(shape[2:])
        across, along = (height, width) if self.where == "rows" else (width, height)
        lines, marks = failures(across * -(-along // self.array), until, chip, layer)
        line, segment = lines % across, lines // across
        step = np.arange(self.array)
        position = segment[:, None] * self.array + step
        inside = position < along
        line, mark = (np.broadcast_to(v[:, None], inside.shape)[inside] for v in (line, marks))
        position = position[inside]
        row, column = (line, position) if self.where == "rows" else (position, line)
        return mapping.index(row, column, shape[2:]), mark

    def _clusters(self, shape, mapping, until, chip, layer):
        height, width = mapping.plane(shape[2:])
        reach = int(self.radius)
        dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        near = dy**2 + dx**2 <= self.radius**2
        dy, dx = dy[near], dx[near]
        wide, high = width + 2 * reach, height + 2 * reach  # centres outside too, so that edges fail as often
        centres, marks = events(wide * high, 1 / (self.fill * len(dy)), min(until, 12.0), chip, layer)
        random = [np.random.default_rng([chip, int(m * 2**53)]).random((2, len(dy))) for m in marks]  # own, so nested
        if not random:
            return np.empty(0, np.int64), np.empty(0)
        hit, own = np.stack(random, 1)
        row = centres[:, None] // wide - reach + dy
        column = centres[:, None] % wide - reach + dx
        inside = (hit < self.fill) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        index, first = np.unique(mapping.index(row[inside], column[inside], shape[2:]), return_index=True)
        return index, own[inside][first]


@dataclass(frozen=True)
class InSlice(Device):
    """A device, or several, that disturb the cells of one slice alone, the lowest digit first: which digit hurts most?

    >>> from lib.crossbar import Mapping
    >>> from lib.faults import InSlice, StuckAt, read_back
    >>> mapping = Mapping("offset", weight_bits=8, cell_bits=2)  # -127 to 127, plus 128, in 4 cells
    >>> device = InSlice(StuckAt(1.0, ratio=0), slice=3)
    >>> back = read_back(torch.tensor([127.0, -127.0]), mapping, device, chip=0, layer="fc1")
    >>> back.round().tolist()  # 255 becomes 63, 1 stays 1
    [-65.0, -127.0]
    """

    device: Devices
    slice: int

    def __post_init__(self) -> None:
        each(self.device, lasting=True)

    @property
    def draws(self) -> tuple[str, ...]:
        """What its devices draw."""
        return tuple(kind for device in each(self.device) for kind in device.draws)

    def disturb(self, cells: Tensor, mapping: Mapping, chip: int, layer: str) -> Tensor:
        """The other slices stay as they are.

        Raises:
            CrossbarError: the mapping has no such slice.
        """
        if not 0 <= self.slice < len(cells):
            raise CrossbarError(f"slice = {self.slice}: the mapping has slices 0 to {len(cells) - 1}")
        cells[self.slice] = disturbed(cells.clone(), self.device, mapping, chip, layer)[self.slice]
        return cells
