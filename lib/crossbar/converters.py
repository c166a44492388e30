"""Converters at the columns of an array: how many bits they need, and what fewer do."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from lib.crossbar.mapping import CrossbarError, integer, whole


def exact_bits(rows: int, cell_bits: int, dac_bits: int = 1, flip: bool = False) -> int:
    """Bits that tell every possible sum of a column apart: ``ceil(log2(rows * (2^w - 1) * (2^v - 1) + 1))``.

    Args:
        rows: that are read at once, and hold something other than zero.
        flip: columns that are more than half full are stored inverted (ISAAC), which halves the largest sum.

    Raises:
        CrossbarError: a number below one.

    >>> from lib.crossbar import exact_bits
    >>> exact_bits(128, 2), exact_bits(128, 2, flip=True)
    (9, 8)
    """
    rows, cell_bits, dac_bits = integer("rows", rows), integer("cell_bits", cell_bits), integer("dac_bits", dac_bits)
    if rows < 1 or cell_bits < 1 or dac_bits < 1:
        raise CrossbarError(f"{rows=}, {cell_bits=}, {dac_bits=}: all must be 1 or more")
    largest = rows * (2**cell_bits - 1) * (2**dac_bits - 1)
    return max(1, (largest // 2 if flip else largest).bit_length())


@dataclass(frozen=True)
class Converter:
    """An analog-to-digital converter: ``2^bits`` equal steps from ``low`` on, rounding, saturating beyond.

    Attributes:
        bits: 1 to 24.
        low, step: in units of a column's sum, one level of a cell times one of its input; ``low`` in whole steps, so
            that zero is a code.

    Raises:
        CrossbarError: bits below one, no step, or a zero between two codes.

    >>> from lib.crossbar import Converter
    >>> Converter(bits=2, step=2.0).convert(torch.tensor([0.9, 3.1, 100.0])).tolist()
    [0.0, 4.0, 6.0]
    """

    bits: int
    low: float = 0.0
    step: float = 1.0

    def __post_init__(self) -> None:
        whole(self, "bits")
        if not 1 <= self.bits <= 24:
            raise CrossbarError(f"adc_bits = {self.bits}: allowed are 1 to 24")
        if not self.step > 0:
            raise CrossbarError(f"a converter whose step is {self.step}: it must be above 0")
        if abs(self.low / self.step - round(self.low / self.step)) > 1e-6:
            raise CrossbarError(f"a converter from {self.low} in steps of {self.step}: zero must be a code")

    @classmethod
    def up_to(cls, largest: float, bits: int, signed: bool = False, whole: bool = True) -> "Converter":
        """For sums from 0, or from ``-largest`` if ``signed``; zero is a code, and steps of 1 are small enough.

        Args:
            whole: no step is below 1, as the sums of whole numbers need none.
        """
        codes = max(1, 2 ** (bits - 1) - 1) if signed else 2**bits - 1
        step = max(1.0, largest / codes) if whole else largest / codes
        return cls(bits, -(2.0 ** (bits - 1)) * step if signed else 0.0, step)

    @property
    def codes(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def convert(self, sums: Tensor) -> Tensor:
        """The values that sums are read as."""
        return ((sums - self.low) / self.step).round().clamp(0, self.codes) * self.step + self.low


def sample(count: int, most: int) -> Tensor | slice:
    """Which of ``count`` things to look at, at most ``most`` of them: drawn once for all, so the same in every call.

    What lies image by image, row by row, is periodic: even steps through it meet the same place of every image.
    """
    return torch.randint(count, (most,), generator=torch.Generator().manual_seed(0)) if count > most else slice(None)


def calibrated(
    values: Tensor | Iterable[Tensor],
    bits: int,
    signed: bool,
    tried: int = 20,
    most: int = 1 << 18,
    count: int | None = None,
) -> Converter:
    """The converter of least squared error over some values, its range a share of their largest, in equal parts.

    Args:
        values: all at once, or piece by piece, ``count`` together: of sums there can be gigabytes.
        tried: ranges. most: values that are looked at, drawn once for all; the largest of all is known.

    Raises:
        CrossbarError: values that are not finite, or pieces that are not ``count`` values together.

    >>> from lib.crossbar import calibrated
    >>> calibrated(torch.tensor([0.0, 1.0, 2.0, 3.0]), bits=2, signed=False)
    Converter(bits=2, low=0.0, step=1.0)
    >>> sums = torch.tensor([1.0, 2.0, 3.0]).repeat(100)
    >>> calibrated(torch.cat([sums, torch.tensor([12.0])]), bits=2, signed=False).step  # one large sum may saturate
    1.0
    """
    pieces, count = ([values], values.numel()) if isinstance(values, Tensor) else (values, count)
    if not count:
        raise CrossbarError(f"count = {count}: a range is chosen for values, and pieces need their number")
    drawn = sample(count, most)
    places = torch.arange(count) if isinstance(drawn, slice) else drawn.sort().values
    start, largest, some = 0, 0.0, []
    for piece in (piece.flatten() for piece in pieces if piece.numel()):
        if not isfinite(end := float(torch.stack(piece.aminmax()).abs().max())):
            raise CrossbarError("values that are not finite: no converter has a range for them")
        here = places[(places >= start) & (places < start + len(piece))] - start
        some.append(piece[here.to(piece.device)])
        largest, start = max(largest, end), start + len(piece)
    if start != count:
        raise CrossbarError(f"{start} values in pieces, and count = {count}")
    values = torch.cat(some)
    whole = bool((values == values.round()).all())
    converters = (Converter.up_to((largest or 1.0) * k / tried, bits, signed, whole) for k in range(1, tried + 1))
    return min(converters, key=lambda c: float((c.convert(values) - values).square().mean()))
