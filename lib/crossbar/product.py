"""The product of a matrix in arrays of cells and vectors, bit by bit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lib.crossbar import compiled
from lib.crossbar.converters import Converter, calibrated, sample
from lib.crossbar.mapping import CrossbarError, Polarized
from lib.crossbar.tiling import Array

Change = Callable[[Tensor], Tensor]
"""What happens to conductances in shares of G_max, ``(slices, columns, F, ...)``, after they were written."""

CHUNK = 1 << 20
"""Sums at a time; as many as stay in the cache of a core."""


def planes(x: Tensor, array: Array) -> Tensor:
    """What whole numbers ``(rows, M)`` put on the rows step by step, lowest first: ``(rows, T, M)`` in float32."""
    shifts = array.dac_bits * torch.arange(array.steps, device=x.device)
    return (x.long()[:, None] >> shifts[:, None]).bitwise_and_(array.input_top).float()


def check_inputs(x: Tensor, array: Array, signed: bool = False) -> None:
    """Refuse whole numbers that do not fit on the rows.

    Raises:
        CrossbarError: numbers that are not whole, or that ``input_bits`` do not hold, with their signs where more than
            one bit goes a step.
    """
    if x.is_floating_point() and not torch.equal(x, x.round()):
        raise CrossbarError("inputs that are no whole numbers: quantize them, as `on_arrays` does")
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
    are one product of whole numbers (`folded`), less what saturates (`lost`). Everything else goes bit by bit,
    compiled on a CPU: the sums of whole cells by counting bits that meet, others by adding what is on.

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
        """Write ``weight`` (F, ...) of a layer with ``groups`` into cells.

        Raises:
            CrossbarError: sums of products that float64 does not hold exactly.
        """
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
        highest = max(array.cell_top, float(self.cells[:, :-1].abs().max()))  # what is stuck may conduct more
        full = self.cells.shape[2] * highest  # a column, under inputs of one
        if full * array.input_top >= 2**24:  # float32 holds no larger sums exactly
            self.cells = self.cells.double()
        if (most := self.tiles * full * int(self.gains.sum()) * 2**array.input_bits) >= 2**53:
            raise CrossbarError(f"sums of products up to {most:.3g}: float64 holds whole numbers up to 2^53")
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
        digits = torch.arange(mapping.digits, dtype=torch.float64, device=cells.device)
        gains = 2.0 ** (self.array.cell_bits * digits.repeat(mapping.copies).repeat_interleave(levels.shape[3]))
        ones = there[:, :, 0, 0, :1].to(levels)
        return torch.cat((levels.flatten(2, 4), ones), dim=2).flatten(0, 1).contiguous(), gains

    @property
    def converter(self) -> Converter:
        """Of the columns."""
        return self._converter

    @converter.setter
    def converter(self, converter: Converter) -> None:
        self._converter = converter
        for name in ("risky", "reach", "_risky_bits"):  # follow from it
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

    def calibrate(self, *inputs: Tensor, signed: bool = False, most: int = 256) -> Converter:
        """Choose the converter's range that loses least of the columns' sums for inputs as in calls.

        Args:
            most: vectors of each that are looked at.
        """
        if not self.lossless:
            some = (x[:, sample(x.shape[1], most)] for x in inputs)
            parts = [part for x in some for part in self._parts(x, signed)]
            sums = (sums[:, :-1] for part in parts for sums in self._sums(part))
            sums = sums if self.signed_sums else (part.abs() for part in sums)
            vectors, columns = sum(part.shape[1] for part in parts), self.cells[:, :-1].shape[:2].numel()
            count = vectors * columns * self.array.steps
            self.converter = calibrated(sums, self.array.adc_bits, self.signed_sums, count=count)
        return self.converter

    def __call__(self, x: Tensor, signed: bool = False) -> Tensor:
        """Sums of products ``(F, M)`` in float64, in units of weight and input, for whole numbers ``(G * rows, M)``.

        Signed inputs are two's complement, bit by bit; with more bits a step both signs are applied one by one.

        Raises:
            CrossbarError: inputs that are not whole, or that the bits do not hold.
        """
        if not self.folds:
            return self._passes(self._read, x, signed)
        check_inputs(x, self.array, signed)
        return self._product(x) - self.lost(x, signed) if len(self.risky) else self._product(x)

    def bit_by_bit(self, x: Tensor, signed: bool = False) -> Tensor:
        """The same as an array computes it: every column of every tile converted at every step."""
        return self._passes(self._slowly, x, signed)

    @property
    def folds(self) -> bool:
        """Whether a column's code is its sum, unless it saturates."""
        return self.whole and self.converter.step == 1 and self.array.mapping.copies == 1

    @cached_property
    def folded(self) -> Tensor:
        """The whole numbers that the arrays multiply inputs with where nothing saturates, in the weight's shape.

        In float32 where every sum of products is exact in it, in float64 else.
        """
        filters = self.shape[0] // self.groups
        cells = self.cells[:, :-1].unflatten(1, (-1, filters)).double()  # (B, slices, F/G, height)
        weight = torch.einsum("bsfh,s->bfh", cells, self.gains).unflatten(0, (self.groups, self.tiles))
        there = self.cells[:, -1].double().unflatten(0, (self.groups, self.tiles))[:, :, None]
        if self.flipped is not None:
            weight = weight + self._full_columns()[..., None] * there
        if self.array.mapping.scheme == "offset":
            weight = weight - 2 ** (self.array.mapping.weight_bits - 1) * there
        weight = weight.transpose(1, 2).flatten(2)[..., : self.shape[1:].numel()].reshape(self.shape)
        largest = float(weight.flatten(1).abs().sum(1).max()) * 2**self.array.input_bits
        return weight.float() if largest < 2**24 and not weight.is_cuda else weight

    @property
    def limits(self) -> tuple[float, float]:
        """Codes between which a column's sum in steps of the converter is read."""
        codes = self.converter.codes
        low = self.converter.low / self.converter.step if self.signed_sums else -codes
        return low, low + codes if self.signed_sums else codes

    @cached_property
    def risky(self) -> Tensor:
        """Which columns can saturate at all, with every input at its largest: ``(B, columns)``, or ``(0, 0)``."""
        low, high = self.limits
        cells, top = self.cells[:, :-1], self.array.input_top
        risky = (cells.clamp(min=0).sum(2) * top > high) | (cells.clamp(max=0).sum(2) * top < low)
        return risky if risky.any() else risky[:0, :0]

    @cached_property
    def reach(self) -> tuple[Tensor, Tensor]:
        """Which sums each risky column can have: weights of the rows that are on ``(n, all inputs)``, and its limits.

        A vector whose rows give no more than the limits saturates nothing.
        """
        rows, height = self.shape[1:].numel(), self.cells.shape[-1]
        weights, limits = [], []
        for b, risky in enumerate(self.risky):
            group, tile = divmod(b, self.tiles)
            start, own = group * rows + tile * height, self.cells[b, :-1][risky, : rows - tile * height].float()
            for sign, limit in zip((1, -1), self.limits[::-1], strict=True):
                weight = torch.zeros(len(own), self.groups * rows, device=own.device)
                weight[:, start : start + own.shape[1]] = (sign * own).clamp(min=0) * self.array.input_top
                able = weight.sum(1) > sign * limit
                weights.append(weight[able])
                limits.append(torch.full((int(able.sum()),), sign * limit, device=own.device))
        return torch.cat(weights), torch.cat(limits)

    def lost(self, x: Tensor, signed: bool = False) -> Tensor:
        """What columns that saturate lose of their sums, ``(F, M)`` in float64, where the converter's steps are one."""
        if self.counts and not x.is_cuda:
            return self._passes(partial(self._count, bits=self._risky_bits, less=1), x, signed).flatten(0, 1)
        return self._product(x) - self._passes(self._read, x, signed)

    def _product(self, x: Tensor) -> Tensor:
        """Of what is `folded` and whole numbers ``(G * rows, M)``: ``(F, M)``."""
        weight = self.folded.double().flatten(1).unflatten(0, (self.groups, -1))
        return torch.bmm(weight, x.unflatten(0, (self.groups, -1)).double()).flatten(0, 1)

    def _parts(self, x: Tensor, signed: bool) -> list[Tensor]:
        """What goes on the rows: one sign after the other where more than one bit goes a step."""
        check_inputs(x, self.array, signed)
        return [x.clamp(min=0), (-x).clamp(min=0)] if signed and self.array.dac_bits > 1 else [x]

    def _passes(self, read: Callable[[Tensor, bool], Tensor], x: Tensor, signed: bool) -> Tensor:
        """What ``read`` finds for ``x``, told whether the last step counts down."""
        parts = self._parts(x, signed)
        return read(x, signed) if len(parts) == 1 else read(parts[0], False) - read(parts[1], False)

    def _slowly(self, x: Tensor, signed: bool) -> Tensor:
        """Shift and add over slices and sides, steps and tiles: ``(F, M)``."""
        places, parts = step_weights(self.array, signed).to(x.device), []
        for sums in self._sums(x):
            codes = (sums[:, :-1] / self.converter.step).round_().clamp_(*self.limits).double()
            codes = codes.unflatten(0, (self.groups, self.tiles)).unflatten(2, (len(self.gains), -1))
            total = torch.einsum("gksftm,s,t->gfm", codes, self.gains, places)
            ones = torch.einsum("btm,t->bm", sums[:, -1].double(), places).unflatten(0, (self.groups, self.tiles))
            parts.append(self._weights_alone(total, ones))
        return torch.cat(parts, dim=1)

    def _read(self, x: Tensor, signed: bool) -> Tensor:
        """What `_slowly` computes, compiled."""
        if x.is_cuda:
            return self._slowly(x, signed)
        rows = x.unflatten(0, (self.groups, -1))
        if self.counts:
            total = self._count(x, signed, self._bits)
        else:
            total = torch.zeros(self.groups, x.shape[1], self.shape[0] // self.groups, dtype=torch.float64)
            vectors = rows.transpose(1, 2).long().contiguous().numpy()
            compiled.add(vectors, self.array.dac_bits, *self._rows, *self._reading(signed), total.numpy())
            total = total.transpose(1, 2)
        ones = [part.sum(1, dtype=torch.float64) for part in rows.split(self.cells.shape[-1], 1)]
        return self._weights_alone(total, torch.stack(ones, 1))

    def _count(self, x: Tensor, signed: bool, bits: tuple[np.ndarray, ...], less: int = 0) -> Tensor:
        """Codes, shifted and added, ``(G, F / G, M)``; or, with ``less = 1``, what is lost in them."""
        total = torch.zeros(self.groups, self.shape[0] // self.groups, x.shape[1], dtype=torch.float64)
        rows = x.unflatten(0, (self.groups, -1)).float().contiguous().numpy()
        sizes = self.cells.shape[-1], self.array.dac_bits
        compiled.count(rows, *sizes, *bits, *self._reading(signed), np.float32(less), total.numpy())
        return -total if less else total

    def _reading(self, signed: bool) -> tuple:
        """What each step counts for, the converter's step and its limits, as `compiled` takes them."""
        exact = self.converter.codes * 2**self.array.input_bits < 2**24  # as whole numbers of float32
        places = step_weights(self.array, signed).to(torch.float32 if exact else torch.float64).numpy()
        return places, *self.cells.new_tensor([self.converter.step, *self.limits]).numpy()

    @property
    def counts(self) -> bool:
        """Whether the sums of columns are soonest found by counting bits that meet."""
        return self.whole and self.array.dac_bits * self._digits[0] <= 4 and self.array.input_bits <= 24

    @cached_property
    def _digits(self) -> tuple[int, bool]:
        """Bits of a column's levels, which may exceed a cell's; and whether two signs meet in one column."""
        cells = self.cells[:, :-1]
        both = self.signed_sums or bool(((cells < 0).any(2) & (cells > 0).any(2)).any())
        return max(1, int(cells.abs().max()).bit_length()) + both, both

    @cached_property
    def _bits(self) -> tuple[np.ndarray, ...]:
        """Cells, rows, units and gains as `compiled.count` takes them.

        A column whose levels are negative counts down; where both signs meet, they are in two's complement.
        """
        digit, cells, (bits, both) = self.array.dac_bits, self.cells[:, :-1].long(), self._digits
        gains = self.gains.repeat_interleave(self.shape[0] // self.groups).repeat(len(cells), 1)
        units = 2 ** torch.arange(bits)
        if both:
            units[-1] *= -1
        else:
            gains[(cells < 0).any(2)] *= -1
            cells = cells.abs()
        cells = pad(cells, (0, -cells.shape[2] % 64)).unflatten(2, (-1, 64))  # (B, columns, words, 64)
        words = torch.stack([((cells >> bit & 1) << torch.arange(64)).sum(3) for bit in range(bits)], 2)
        count = words.shape[3]  # of (B, columns, bits, words)
        words = words[:, :, :, None].expand(-1, -1, -1, digit, -1).flatten(2)  # terms: bits of cells, inputs, rows
        units = (units[:, None, None] * 2 ** torch.arange(digit)[:, None]).expand(-1, -1, count).flatten()
        rows = torch.arange(count * digit).view(count, digit).T.flatten().repeat(bits)
        words, units, rows = (pad(t, (0, t.shape[-1] % 2)) for t in (words, units, rows))
        return words.numpy().view(np.uint64), rows.numpy(), units.numpy().astype(np.uint32), gains.numpy()

    @cached_property
    def _risky_bits(self) -> tuple[np.ndarray, ...]:
        """The same, of columns that can saturate."""
        words, *others = self._bits
        return words * self.risky.numpy()[:, :, None].astype(np.uint64), *others

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Cells row by row and gains, as `compiled.add` takes them."""
        gains = self.gains.repeat_interleave(self.shape[0] // self.groups)
        return pad(self.cells[:, :-1].transpose(1, 2), (0, 0, 0, 1)).contiguous().numpy(), gains.numpy()

    def _weights_alone(self, total: Tensor, ones: Tensor) -> Tensor:
        """Sums of products ``(F, M)`` from codes that were shifted and added, ``(G, F / G, M)``.

        Args:
            ones: sums of each tile's inputs, ``(G, tiles, M)``; what is there beside the weights goes with them.
        """
        total = total * self.converter.step / self.array.mapping.copies
        if self.flipped is not None:  # a flipped column counts down from what it would be when full
            total += torch.einsum("gkm,gkf->gfm", ones, self._full_columns())
        if self.array.mapping.scheme == "offset":
            total -= 2 ** (self.array.mapping.weight_bits - 1) * ones.sum(1, keepdim=True)
        return total.flatten(0, 1)

    def _full_columns(self) -> Tensor:
        """What the flipped columns of each tile and filter would be with all cells full, for an input of one."""
        side = torch.ones(self.flipped.shape[2:4], dtype=torch.float64, device=self.flipped.device)
        side[:, 1:] = -1
        gains = self.gains.view(side.shape) / self.array.mapping.copies * side
        signs = 1.0
        if isinstance(self.array.mapping, Polarized):
            signs = self._tiled(self.array.mapping.signs[None, None])[:, :, 0, 0, :, 0].double()
        full = torch.einsum("gkscf,sc->gkf", self.flipped[..., 0].double(), gains)
        return full * signs * self.array.cell_top

    def _sums(self, x: Tensor) -> Iterator[Tensor]:
        """The columns' sums ``(B, columns + 1, T, M')``, for as many vectors at a time as stay in the cache."""
        blocks, height = len(self.cells), self.cells.shape[-1]
        for part in x.split(max(1, CHUNK // (self.conversions * self.array.steps)), dim=1):
            digits = planes(part, self.array).to(self.cells).unflatten(0, (self.groups, -1))
            if missing := self.tiles * height - digits.shape[1]:
                digits = pad(digits, (0, 0, 0, 0, 0, missing))
            yield torch.bmm(self.cells, digits.reshape(blocks, height, -1)).unflatten(2, (self.array.steps, -1))
