"""The product of a matrix in arrays of cells and vectors, bit by bit."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lib.crossbar.converters import Converter, calibrated
from lib.crossbar.mapping import CrossbarError, Polarized
from lib.crossbar.tiling import Array

Change = Callable[[Tensor], Tensor]
"""What happens to conductances in shares of G_max, ``(slices, columns, F, ...)``, after they were written."""

Arrange = Callable[[Tensor], Tensor]
"""How a layer's inputs become the vectors that meet its matrix."""

CHUNK = 1 << 20
"""Sums at a time; as many as stay in the cache of a core."""


def planes(x: Tensor, array: Array, signed: bool = False) -> Tensor:
    """The numbers that whole numbers put on the rows step by step, lowest first: ``(*x.shape, T)`` in float32.

    Signed numbers are two's complement: the last step counts negative (`step_weights`).

    Raises:
        CrossbarError: numbers that ``input_bits`` do not hold, or signed ones with more than one bit a step.
    """
    if signed and array.dac_bits > 1:
        raise CrossbarError(f"signed inputs go bit by bit: dac_bits = {array.dac_bits}; apply both signs one by one")
    low, high = (-(2 ** (array.input_bits - 1)), 2 ** (array.input_bits - 1)) if signed else (0, 2**array.input_bits)
    if x.numel() and not (low <= int(x.min()) and int(x.max()) < high):
        raise CrossbarError(
            f"inputs from {int(x.min())} to {int(x.max())}: {array.input_bits} bits hold {low} to {high - 1}"
        )
    shifts = array.dac_bits * torch.arange(array.steps, device=x.device, dtype=torch.int32)
    return (x.int()[..., None] >> shifts).bitwise_and_(array.input_top).float()


def step_weights(array: Array, signed: bool = False) -> Tensor:
    """What a unit on a row counts for at each step, ``(T,)``."""
    w = 2.0 ** (array.dac_bits * torch.arange(array.steps, dtype=torch.float64))
    if signed:
        w[-1] *= -1
    return w


class Programmed:
    """A layer's weights as they lie in arrays: a function from whole numbers on the rows to sums of products.

    With perfect cells and enough converter bits the sums are those of whole numbers, exactly.

    Attributes:
        scale: of a unit of weight: a weight is its whole number times this.
        converter: of the columns; `calibrate` chooses its range from data.

    >>> from lib.crossbar import Array, Programmed
    >>> weight, x = torch.tensor([[127.0, -64.0]]), torch.tensor([[3], [1]])
    >>> Programmed(weight, Array())(x).tolist()  # 3 * 127 - 64, by way of cells of 2 bits and inputs of 1
    [[317.0]]
    >>> Programmed(weight, Array(adc_bits=1, rows=2))(x).tolist() == [[317.0]]  # too few bits
    False
    """

    def __init__(self, weight: Tensor, array: Array, groups: int = 1, change: Change | None = None) -> None:
        """Write ``weight`` (F, ...) of a layer with ``groups`` into cells."""
        mapping = array.mapping
        if isinstance(mapping, Polarized):
            mapping = mapping.of(weight)
        self.array, self.groups, self.shape = replace(array, mapping=mapping), groups, weight.shape
        self.height = min(array.height, array.usable_rows(weight.shape[2:].numel()))
        span = mapping.range_of(weight)
        self.scale = float(span) / (2 ** (mapping.weight_bits - 1) - 1)
        cells = mapping.encode(weight.float(), span)
        cells = self._tiled(cells)
        cells, self.flipped = self._flip(cells) if array.flip else (cells, None)
        if change:
            cells = self._tiled(change(self._untiled(cells).contiguous()))
        self.cells, self.gains = self._columns(cells)
        self.whole = change is None and (array.dummy or mapping.columns == 2 or mapping.g_min == 0)
        if self.whole:
            self.cells.round_()  # levels are fractions; cells hold whole numbers
        self.converter = self._full_range()

    def _tiled(self, cells: Tensor) -> Tensor:
        """``(slices, columns, F, ...)`` as ``(G, tiles, slices, columns, F/G, height)``; -1 where a tile has no row."""
        cells = cells.flatten(3)
        slices, columns, filters, rows = cells.shape
        height = min(self.height, rows)
        cells = pad(cells, (0, -rows % height), value=-1.0)
        return cells.view(slices, columns, self.groups, filters // self.groups, -1, height).permute(2, 4, 0, 1, 3, 5)

    def _untiled(self, cells: Tensor) -> Tensor:
        slices, columns = cells.shape[2:4]
        flat = cells.permute(2, 3, 0, 4, 1, 5).flatten(4).flatten(2, 3)
        return flat[..., : self.shape[1:].numel()].reshape(slices, columns, *self.shape)

    def _flip(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Columns whose cells are more than half full in all, the other way round."""
        there, low = cells >= 0, self.array.mapping.g_min
        full = ((cells - low) * there).sum(-1, keepdim=True) > (1 - low) * there.sum(-1, keepdim=True) / 2
        return torch.where(full & there, 1 + low - cells, cells), full

    def _columns(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """What the columns add up, in levels of a cell, ``(B, columns + 1, height)``, and what each slice counts for.

        ``B`` runs over groups and tiles, columns over slices, sides and filters; the last column is all ones. Columns
        that count down (the second of a pair, flipped ones, negative fragments) have negative levels: a converter that
        starts at zero reads them as it reads the others.
        """
        mapping, top = self.array.mapping, self.array.cell_top
        there, low = cells >= 0, mapping.g_min
        base = low if self.array.dummy or mapping.columns == 2 else 0.0
        levels = torch.where(there, (cells - base) * (top / (1 - low)), 0.0)
        if self.array.analog_difference:
            levels = levels[:, :, :, :1] - levels[:, :, :, 1:]
        elif mapping.columns == 2:
            levels = levels * torch.tensor([1.0, -1.0]).to(levels)[:, None, None]
        elif isinstance(mapping, Polarized):  # a fragment is a tile, and its sign that of its first row
            levels = levels * self._tiled(mapping.signs[None, None])[..., :1]
        if self.flipped is not None:
            levels = levels * (1 - 2 * self.flipped.to(levels))
        gains = 2.0 ** (self.array.cell_bits * torch.arange(mapping.digits, device=cells.device))
        gains = (gains.repeat(mapping.copies) / mapping.copies).repeat_interleave(levels.shape[3])
        ones = there[:, :, 0, 0, :1].to(levels)
        return torch.cat((levels.flatten(2, 4), ones), dim=2).flatten(0, 1).contiguous(), gains

    @property
    def tiles(self) -> int:
        """Groups of rows that are read at once."""
        return len(self.cells) // self.groups

    @property
    def signed_sums(self) -> bool:
        """Whether a column's sum can be negative."""
        return self.array.analog_difference

    @property
    def largest(self) -> int:
        """The largest sum that a column of perfect cells can have."""
        largest = self.cells.shape[-1] * self.array.cell_top * self.array.input_top
        return largest // 2 if self.array.flip else largest

    @property
    def conversions(self) -> int:
        """Sums that a vector takes in every step."""
        return self.cells.shape[:2].numel()

    @property
    def lossless(self) -> bool:
        """Whether perfect cells are read exactly, with a code for every sum that there can be."""
        bits = self.array.adc_bits
        return bits is None or bits >= self.largest.bit_length() + self.signed_sums

    def _full_range(self) -> Converter:
        """For the largest sum that there can be; a step for every whole number where the bits allow it."""
        bits = self.array.adc_bits or max(1, self.largest.bit_length()) + self.signed_sums
        return Converter.up_to(self.largest, bits, self.signed_sums)

    def calibrate(
        self, *inputs: Tensor, signed: bool = False, arrange: Arrange = torch.as_tensor, most: int = 256
    ) -> Converter:
        """Choose the converter's range that loses least of the columns' sums for inputs as in calls.

        Args:
            most: vectors of each that are looked at, evenly spread.
        """
        if not self.lossless:
            found = []
            for part, negative in (p for x in inputs for p in self._passes(x, signed)):
                digits = arrange(planes(part, self.array, negative))
                digits = digits[:, :: -(-digits.shape[1] // most)]
                found += [sums[:, :-1].flatten() for sums in self._sums(digits)]
            sums = torch.cat(found)
            self.converter = calibrated(sums if self.signed_sums else sums.abs(), self.array.adc_bits, self.signed_sums)
        return self.converter

    def __call__(self, x: Tensor, signed: bool = False, arrange: Arrange = torch.as_tensor) -> Tensor:
        """Sums of products ``(F, M)`` in float64, in units of weight and input, for whole numbers.

        Signed inputs are two's complement, bit by bit; with more bits a step both signs are applied one by one.

        Args:
            x: ``(G * rows, M)``, or what ``arrange`` makes ``(G * rows, M, T)`` of, with steps as last dimension.
        """
        results = [self._read(arrange(planes(part, self.array, neg)), neg) for part, neg in self._passes(x, signed)]
        return results[0] if len(results) == 1 else results[0] - results[1]

    def _passes(self, x: Tensor, signed: bool) -> list[tuple[Tensor, bool]]:
        if signed and self.array.dac_bits > 1:
            return [(x.clamp(min=0), False), ((-x).clamp(min=0), False)]
        return [(x, signed)]

    def _read(self, digits: Tensor, signed: bool) -> Tensor:
        steps, converter = step_weights(self.array, signed).to(digits.device), self.converter
        low = converter.low / converter.step if self.signed_sums else -converter.codes
        parts = []
        for sums in self._sums(digits):
            codes = sums[:, :-1]
            if not (converter.step == 1 and self.whole):
                codes.div_(converter.step).round_()
            codes.clamp_(low, low + converter.codes if self.signed_sums else converter.codes)
            parts.append(self._combined(sums, steps))
        return torch.cat(parts, dim=1)

    def _combined(self, sums: Tensor, steps: Tensor) -> Tensor:
        """Shift and add over slices and sides, tiles and steps, ``(F, M')``; what is there beside the weights goes.

        Args:
            sums: codes of ``(B, columns + 1, M', T)``; the last column is that of ones.
        """
        slices, filters = len(self.gains), self.shape[0] // self.groups
        exact = self.tiles * self.converter.codes * float(self.gains.sum()) < 2**24  # as whole numbers of float32
        codes, gains = sums[:, :-1].flatten(2), self.gains.expand(len(sums), 1, slices)
        codes = codes.unflatten(1, (slices, filters)).flatten(2)
        total = torch.bmm(gains, codes) if exact else torch.bmm(gains.double(), codes.double())
        total = total.view(self.groups, self.tiles, filters, *sums.shape[2:]).sum(1).double() @ steps
        total *= self.converter.step
        ones = (sums[:, -1].double() @ steps).unflatten(0, (self.groups, self.tiles))  # (G, tiles, M')
        if self.flipped is not None:  # a flipped column counts down from what it would be when full
            total += torch.einsum("gkm,gkf->gfm", ones, self._full_columns())
        if self.array.mapping.scheme == "offset":
            total -= 2 ** (self.array.mapping.weight_bits - 1) * ones.sum(1, keepdim=True)
        return total.flatten(0, 1)

    def _full_columns(self) -> Tensor:
        """What the flipped columns of each tile and filter would be with all cells full, for an input of one."""
        side = torch.ones(self.flipped.shape[2:4], dtype=torch.float64, device=self.flipped.device)
        side[:, 1:] = -1
        gains = self.gains.double().view(side.shape) * side
        signs = 1.0
        if isinstance(self.array.mapping, Polarized):
            signs = self._tiled(self.array.mapping.signs[None, None])[:, :, 0, 0, :, 0].double()
        full = torch.einsum("gkscf,sc->gkf", self.flipped[..., 0].double(), gains)
        return full * signs * self.array.cell_top

    def _sums(self, digits: Tensor) -> Iterator[Tensor]:
        """The columns' sums ``(B, columns + 1, M', T)``, for as many vectors at a time as stay in the cache."""
        steps = digits.shape[-1]
        digits = digits.unflatten(0, (self.groups, -1))
        height = self.cells.shape[-1]
        for part in digits.split(max(1, CHUNK // (self.conversions * steps)), dim=2):
            if missing := self.tiles * height - part.shape[1]:
                part = pad(part, (0, 0, 0, 0, 0, missing))
            rows = part.flatten(2).reshape(len(self.cells), height, -1)
            yield torch.bmm(self.cells, rows).unflatten(2, (-1, steps))
