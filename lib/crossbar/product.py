"""The product of a matrix in arrays of cells and vectors, bit by bit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property

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
    check_inputs(x, array, signed)
    shifts = array.dac_bits * torch.arange(array.steps, device=x.device, dtype=torch.int32)
    return (x.int()[..., None] >> shifts).bitwise_and_(array.input_top).float()


def check_inputs(x: Tensor, array: Array, signed: bool = False) -> None:
    """Refuse whole numbers that do not fit on the rows.

    Raises:
        CrossbarError: numbers that ``input_bits`` do not hold, with their signs where more than one bit goes a step.
    """
    low, high = (-(2 ** (array.input_bits - 1)), 2 ** (array.input_bits - 1)) if signed else (0, 2**array.input_bits)
    low, high = (1 - 2**array.input_bits, 2**array.input_bits) if signed and array.dac_bits > 1 else (low, high)
    if x.numel() and not (low <= int(x.min()) and int(x.max()) < high):
        raise CrossbarError(
            f"inputs from {int(x.min())} to {int(x.max())}: {array.input_bits} bits hold {low} to {high - 1}"
        )


def step_weights(array: Array, signed: bool = False) -> Tensor:
    """What a unit on a row counts for at each step, ``(T,)``."""
    w = 2.0 ** (array.dac_bits * torch.arange(array.steps, dtype=torch.float64))
    if signed:
        w[-1] *= -1
    return w


class Programmed:
    """A layer's weights as they lie in arrays: a function from whole numbers on the rows to sums of products.

    With perfect cells and enough converter bits the sums are those of whole numbers, exactly. A converter that reads
    whole cells in steps of one loses nothing of a column's sum unless it saturates; then all steps, slices and tiles
    are one product of whole numbers (`folded`), less what saturates (`lost`). Everything else goes bit by bit.

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
        whole = self.cells.round()  # levels are fractions; perfect cells hold whole numbers, and so do stuck ones
        self.whole = bool(((whole - self.cells).abs() <= 1e-6 * max(1, self.array.cell_top)).all())
        if self.whole:
            self.cells = whole
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
    def converter(self) -> Converter:
        """Of the columns."""
        return self._converter

    @converter.setter
    def converter(self, converter: Converter) -> None:
        self._converter = converter
        for name in ("risky", "reach"):  # follow from it
            vars(self).pop(name, None)

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

        Raises:
            CrossbarError: inputs that the bits do not hold, see `planes`.
        """
        if not self.folds:
            return self.bit_by_bit(x, signed, arrange)
        check_inputs(x, self.array, signed)
        rows = arrange(x[..., None])[..., 0].unflatten(0, (self.groups, -1))
        weight = self.folded.double().flatten(1).unflatten(0, (self.groups, -1))
        total = torch.bmm(weight, rows.double()).flatten(0, 1)
        lost = self.lost(x, signed, arrange)
        return total if lost is None else total - lost

    def bit_by_bit(self, x: Tensor, signed: bool = False, arrange: Arrange = torch.as_tensor) -> Tensor:
        """The same as an array computes it: every column of every tile converted at every step."""
        results = [self._read(arrange(planes(part, self.array, neg)), neg) for part, neg in self._passes(x, signed)]
        return results[0] if len(results) == 1 else results[0] - results[1]

    @property
    def folds(self) -> bool:
        """Whether a column's code is its sum, unless it saturates."""
        return self.whole and self.converter.step == 1 and self.array.mapping.copies == 1

    @cached_property
    def folded(self) -> Tensor:
        """The whole numbers that the arrays multiply inputs with where nothing saturates, in the weight's shape.

        In float32 where every sum of products is exact in it, in float64 else.

        Raises:
            CrossbarError: sums that float64 does not hold exactly.
        """
        filters = self.shape[0] // self.groups
        cells = self.cells[:, :-1].unflatten(1, (-1, filters)).double()  # (B, slices, F/G, height)
        weight = torch.einsum("bsfh,s->bfh", cells, self.gains.double()).unflatten(0, (self.groups, self.tiles))
        there = self.cells[:, -1].double().unflatten(0, (self.groups, self.tiles))[:, :, None]
        if self.flipped is not None:
            weight = weight + self._full_columns()[..., None] * there
        if self.array.mapping.scheme == "offset":
            weight = weight - 2 ** (self.array.mapping.weight_bits - 1) * there
        weight = weight.transpose(1, 2).flatten(2)[..., : self.shape[1:].numel()].reshape(self.shape)
        largest = float(weight.flatten(1).abs().sum(1).max()) * 2**self.array.input_bits
        if largest >= 2**53:
            raise CrossbarError(f"sums of products up to {largest:.3g}: float64 holds whole numbers up to 2^53")
        return weight.float() if largest < 2**24 and not weight.is_cuda else weight

    @property
    def limits(self) -> tuple[float, float]:
        """Codes between which a column's sum in steps of the converter is read."""
        codes = self.converter.codes
        low = self.converter.low / self.converter.step if self.signed_sums else -codes
        return low, low + codes if self.signed_sums else codes

    @cached_property
    def risky(self) -> list[tuple[int, Tensor]]:
        """Columns that can saturate at all, with every input at its largest, for each block of rows that has some."""
        low, high = self.limits
        cells, top = self.cells[:, :-1], self.array.input_top
        beyond = (cells.clamp(min=0).sum(-1) * top > high) | (cells.clamp(max=0).sum(-1) * top < low)
        return [(b, own.nonzero()[:, 0]) for b, own in enumerate(beyond) if own.any()]

    @cached_property
    def reach(self) -> tuple[Tensor, Tensor]:
        """Which sums each risky column can have: weights of the rows that are on ``(n, all inputs)``, and its limits.

        A vector whose rows give no more than the limits saturates nothing.
        """
        rows, height = self.shape[1:].numel(), self.cells.shape[-1]
        weights, limits = [], []
        for b, columns in self.risky:
            group, tile = divmod(b, self.tiles)
            start, own = group * rows + tile * height, self.cells[b, columns][:, : rows - tile * height]
            for sign, limit in zip((1, -1), self.limits[::-1], strict=True):
                weight = torch.zeros(len(own), self.groups * rows, device=own.device)
                weight[:, start : start + own.shape[1]] = (sign * own).clamp(min=0) * self.array.input_top
                able = weight.sum(1) > sign * limit
                weights.append(weight[able])
                limits.append(torch.full((int(able.sum()),), sign * limit, device=own.device))
        return torch.cat(weights), torch.cat(limits)

    def lost(self, x: Tensor, signed: bool = False, arrange: Arrange = torch.as_tensor) -> Tensor | None:
        """What columns that saturate lose of their sums, ``(F, M)`` in float64; None where no column can.

        Only vectors with rows enough that are on at all are looked at bit by bit.
        """
        if not self.risky:
            return None
        low, high = self.limits
        filters, total = self.shape[0] // self.groups, None
        for sign, (part, negative) in zip((1, -1), self._passes(x, signed), strict=False):
            rows = arrange(part[..., None])[..., 0].unflatten(0, (self.groups, -1))
            steps = step_weights(self.array, negative).to(rows.device)
            if total is None:
                total = torch.zeros(self.shape[0], rows.shape[-1], dtype=torch.float64, device=rows.device)
            for b, columns in self.risky:
                group, tile = divmod(b, self.tiles)
                own = rows[group, tile * self.cells.shape[-1] :][: self.cells.shape[-1]]
                cells, on = self.cells[b, columns, : len(own)], (own != 0).to(self.cells)
                up, down = (cells.clamp(**end) @ on * self.array.input_top for end in ({"min": 0}, {"max": 0}))
                seen = ((up > high) | (down < low)).any(0).nonzero()[:, 0]
                for some in seen.split(max(1, CHUNK // (len(columns) * self.array.steps))):
                    sums = torch.einsum("ch,hmt->cmt", cells, planes(own[:, some], self.array, negative))
                    over = (
                        (sums - sums.clamp(low, high)).double() @ steps * self.gains[columns // filters, None].double()
                    )
                    at = torch.zeros(filters, len(some), dtype=torch.float64, device=x.device)
                    at.index_add_(0, columns % filters, over)
                    total[group * filters : (group + 1) * filters, some] += sign * at
        return total

    def _passes(self, x: Tensor, signed: bool) -> list[tuple[Tensor, bool]]:
        if signed and self.array.dac_bits > 1:
            return [(x.clamp(min=0), False), ((-x).clamp(min=0), False)]
        return [(x, signed)]

    def _read(self, digits: Tensor, signed: bool) -> Tensor:
        steps, converter, limits = step_weights(self.array, signed).to(digits.device), self.converter, self.limits
        parts = []
        for sums in self._sums(digits):
            codes = sums[:, :-1]
            if not (converter.step == 1 and self.whole):
                codes.div_(converter.step).round_()
            codes.clamp_(*limits)
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
