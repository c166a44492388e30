"""Crossbars: how a layer's signed weights become conductances of memory cells, and what the cells read back as.

Weights of a layer are divided by its range ``s``; a cell holds a level in [0, 1], from its lowest conductance G_min to
its highest G_max. A weight is mapped once, wherever its convolution slides: a broken cell is broken at every position
of the image.
"""

from dataclasses import dataclass, field, replace
from math import ceil, inf
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

Scheme = Literal["offset", "two_column", "differential"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


def integer(name: str, value: int) -> int:
    """A whole number as Python's own, also of numpy, whose small ones overflow without a word.

    Raises:
        CrossbarError: another value, by its name.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise CrossbarError(f"{name} = {value!r}: allowed are integers")
    return int(value)


def whole(owner: object, *names: str) -> None:
    """Make fields of a frozen dataclass Python's own integers; None stays. Raises as `integer`."""
    for name in names:
        if (value := getattr(owner, name)) is not None:
            object.__setattr__(owner, name, integer(name, value))


class CrossbarError(ValueError):
    """A mapping, fault model or sweep that cannot be: the message names what is wrong and what is allowed.

    >>> from lib.crossbar import Mapping
    >>> Mapping(cell_bits=2)
    Traceback (most recent call last):
        ...
    lib.crossbar.mapping.CrossbarError: cell_bits = 2 without weight_bits: a continuous cell has no bits
    """


@dataclass(frozen=True)
class Mapping:
    """How a signed weight ``w`` in [-1, 1] becomes cells; every scheme reads back exactly ``w`` from perfect cells.

    ========================  ==================================  ==================  =========
    scheme                    cell a                              cell b              ``w``
    ========================  ==================================  ==================  =========
    ``offset``                ``(w + 1) / 2``                     none                ``2a - 1``
    ``two_column``            ``max(w, 0)``                       ``max(-w, 0)``      ``a - b``
    ``differential``          ``1 - max(-w, 0)``                  ``1 - max(w, 0)``   ``a - b``
    ========================  ==================================  ==================  =========

    So a zero weight is two cells that are off under ``two_column``, and two cells that are on under ``differential``
    (Yuan et al., ISQED 2021). With ``weight_bits`` the weight is rounded to an integer in
    ``[-(2^(W-1) - 1), 2^(W-1) - 1]`` first, ``0`` becomes ``2^(W-1)`` under ``offset``, and the number in place of each
    cell is spread over ``slices`` cells of ``cell_bits``, added up with powers of two. The highest slice of a pair is
    full only when ``cell_bits`` divides ``weight_bits - 1``; ``differential`` counts down from the largest number that
    the slices hold, so that zeros have all cells on.

    Attributes:
        weight_bits: 2 to 16, sign included; None: continuous cells, as in the paper.
        cell_bits: bits that one cell holds; None: all of them.
        on_off: G_max / G_min of the cells, above 1.
        clip: the range of a layer in shares of its largest absolute weight; what is larger saturates.
        copies: how often every weight is stored; it reads back as their mean.

    >>> from lib.crossbar import Mapping
    >>> mapping, weight = Mapping("differential"), torch.tensor([0.0, 0.5, -1.0])
    >>> cells = mapping.encode(weight, scale=1.0)
    >>> cells.tolist()  # one slice, cells a and cells b
    [[[1.0, 1.0, 0.0], [1.0, 0.5, 1.0]]]
    >>> mapping.decode(cells, scale=1.0).tolist()
    [0.0, 0.5, -1.0]
    >>> Mapping("offset", weight_bits=8, cell_bits=2).slices
    4
    """

    scheme: Scheme = "differential"
    weight_bits: int | None = None
    cell_bits: int | None = None
    on_off: float = inf
    clip: float = 1.0
    copies: int = 1

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise CrossbarError(f"mapping {self.scheme!r} is unknown: allowed are {', '.join(SCHEMES)}")
        whole(self, "weight_bits", "cell_bits", "copies")
        if self.weight_bits is None and self.cell_bits is not None:
            raise CrossbarError(f"cell_bits = {self.cell_bits} without weight_bits: a continuous cell has no bits")
        if self.weight_bits is not None and not 2 <= self.weight_bits <= 16:
            raise CrossbarError(f"weight_bits = {self.weight_bits}: allowed are 2 to 16, or None for continuous cells")
        if self.cell_bits is not None and not 1 <= self.cell_bits <= self.weight_bits:
            raise CrossbarError(f"cell_bits = {self.cell_bits}: allowed are 1 to weight_bits = {self.weight_bits}")
        if not self.on_off > 1 or not 0 < self.clip <= 1:
            raise CrossbarError(f"on_off = {self.on_off}, clip = {self.clip}: allowed are on_off > 1, 0 < clip <= 1")
        if self.copies < 1:
            raise CrossbarError(f"copies = {self.copies}: allowed are whole numbers from 1")

    @property
    def columns(self) -> int:
        """Cells side by side that make a weight, slices aside: 1 or 2."""
        return 1 if self.scheme == "offset" else 2

    @property
    def digits(self) -> int:
        """Cells over which a number is spread."""
        if self.cell_bits is None:
            return 1
        return ceil((self.weight_bits - (self.columns == 2)) / self.cell_bits)

    @property
    def slices(self) -> int:
        """Cells that a column has for a weight: its digits, in every copy."""
        return self.digits * self.copies

    @property
    def _digit(self) -> int:
        """Bits of one slice."""
        return self.cell_bits or self.weight_bits - (self.columns == 2)

    @property
    def _top(self) -> int:
        """The largest number that the digits of one column hold."""
        return 1 if self.weight_bits is None else 2 ** (self._digit * self.digits) - 1

    @property
    def _unit(self) -> float:
        """What the largest weight of a layer is as a number in the cells."""
        if self.weight_bits is None:
            return 1 / 2 if self.scheme == "offset" else 1
        return 2 ** (self.weight_bits - 1) - 1

    @property
    def _zero(self) -> float:
        """What ``offset`` adds to every number."""
        return 1 / 2 if self.weight_bits is None else 2 ** (self.weight_bits - 1)

    @property
    def g_min(self) -> float:
        """Conductance of a cell that is off, in shares of G_max."""
        return 1 / self.on_off

    def range_of(self, weight: Tensor) -> Tensor:
        """The range ``s`` of a layer, a scalar: ``clip`` times its largest absolute weight; 1 when all are zero.

        Raises:
            CrossbarError: weights that are not finite.
        """
        largest = weight.detach().abs().amax()
        if not largest.isfinite():
            raise CrossbarError("weights that are not finite cannot be mapped to cells")
        return torch.where(largest > 0, self.clip * largest, 1.0)

    def encode(self, weight: Tensor, scale: Tensor | float) -> Tensor:
        """Conductances in shares of G_max, ``(slices, columns, *weight.shape)``, lowest digit first, copy by copy."""
        w = (weight / scale).contiguous().clamp_(-1, 1).mul_(self._unit)
        if self.weight_bits is not None:
            w.round_()
        if self.scheme == "offset":
            numbers = (w + self._zero)[None]
        else:
            numbers = torch.stack((w, -w)).clamp_(min=0)
            if self.scheme == "differential":
                numbers = (self._top - numbers).flip(0)
        if self.weight_bits is None:
            levels = numbers[None]
        else:
            whole, step = numbers.int(), 2**self._digit
            levels = torch.stack([(whole >> k * self._digit) & (step - 1) for k in range(self.digits)]) / (step - 1)
        if self.g_min > 0:
            levels = levels * (1 - self.g_min) + self.g_min
        return levels if self.copies == 1 else levels.repeat(self.copies, *[1] * (levels.ndim - 1))

    def decode(self, cells: Tensor, scale: Tensor | float) -> Tensor:
        """The weights that conductances read back as; the constant current of G_min is taken off, as in 1.6."""
        levels = cells if self.g_min == 0 else (cells - self.g_min) / (1 - self.g_min)
        weight = torch.einsum("sc,sc...->...", self.coefficients(cells), levels)
        return (weight - self._zero / self._unit if self.scheme == "offset" else weight) * scale

    def coefficients(self, like: Tensor) -> Tensor:
        """What a full cell adds to a weight, in shares of the layer's range: ``(slices, columns)``, as in `encode`."""
        digit = self._digit if self.weight_bits else 1
        one = [(2**digit - 1) * 2 ** (digit * k) / self._unit for k in range(self.digits)]
        pairs = [[c / self.copies, -c / self.copies][: self.columns] for c in one * self.copies]
        return torch.tensor(pairs, dtype=like.dtype, device=like.device)

    def noise_gain(self, scale: Tensor | float) -> Tensor | float:
        """Standard deviation of a weight for one unit of it, independent, in each of its cells' conductances."""
        return scale * float(self.coefficients(torch.zeros(())).square().sum().sqrt()) / (1 - self.g_min)

    def plane(self, shape: torch.Size) -> tuple[int, int]:
        """Rows and columns of cells of a layer: inputs by ``F * columns * slices``, a weight's cells side by side."""
        return shape[1:].numel(), shape[0] * self.columns * self.slices

    def index(self, row, column, shape: torch.Size):
        """Where the cell at a row and column of `plane` lies in `encode`'s tensor, flattened; takes arrays too."""
        f, cell = column // (self.columns * self.slices), column % (self.columns * self.slices)
        side, digit = cell // self.slices, cell % self.slices
        return ((digit * self.columns + side) * shape[0] + f) * shape[1:].numel() + row


@dataclass(frozen=True)
class Polarized(Mapping):
    """Magnitudes in one cell each, and one sign for every ``fragment`` rows of a column, kept digitally (FORMS).

    The rows of a fragment are read together, so that their sum takes the fragment's sign after conversion. ``of`` looks
    the signs of a layer up; without them the mapping says what a layer takes, and nothing can be written.

    Attributes:
        fragment: rows, ``F`` of a fragment share a sign; a layer's last fragment may be shorter.
        signs: +1 and -1 in the shape of the layer's weight; None: not known yet.

    Raises:
        CrossbarError: as `Mapping`, or a fragment below one row.

    >>> from lib.crossbar import Polarized
    >>> weight = torch.tensor([[1.0, 2.0, -4.0, -3.0]])
    >>> mapping = Polarized(fragment=2).of(weight)
    >>> mapping.signs.tolist(), mapping.encode(weight, scale=4.0).flatten().tolist()
    ([[1.0, 1.0, -1.0, -1.0]], [0.25, 0.5, 1.0, 0.75])
    """

    scheme: Literal["polarized"] = "polarized"
    fragment: int = 8
    signs: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.scheme != "polarized":
            raise CrossbarError(f"scheme = {self.scheme!r}: Polarized has no other than 'polarized'")
        whole(self, "fragment", "weight_bits", "cell_bits", "copies")
        if self.fragment < 1:
            raise CrossbarError(f"fragment = {self.fragment}: allowed are whole numbers from 1")
        Mapping("two_column", self.weight_bits, self.cell_bits, self.on_off, self.clip, self.copies)

    def of(self, weight: Tensor) -> "Polarized":
        """The mapping of one layer.

        Raises:
            CrossbarError: a fragment has weights of both signs.
        """
        rows = weight.detach().flatten(1)
        parts = pad(rows, (0, -rows.shape[1] % self.fragment)).unflatten(1, (-1, self.fragment))
        positive, negative = (parts > 0).any(-1), (parts < 0).any(-1)
        if (positive & negative).any():
            mixed = int((positive & negative).sum())
            raise CrossbarError(
                f"{mixed} of {positive.numel()} fragments of {self.fragment} rows have weights of both signs: "
                "train toward lib.pruning.PolarizedFragments first"
            )
        signs = torch.where(negative, -1.0, 1.0).to(weight).repeat_interleave(self.fragment, 1)
        return replace(self, signs=signs[:, : rows.shape[1]].reshape(weight.shape))

    @property
    def columns(self) -> int:
        """One cell a weight, slices aside."""
        return 1

    @property
    def digits(self) -> int:
        """Cells over which a magnitude is spread; its sign takes none."""
        return 1 if self.cell_bits is None else ceil((self.weight_bits - 1) / self.cell_bits)

    @property
    def _digit(self) -> int:
        return self.cell_bits or self.weight_bits - 1

    def _known(self) -> Tensor:
        if self.signs is None:
            raise CrossbarError("a polarized mapping needs the signs of a layer's fragments: Polarized.of(weight)")
        return self.signs

    def encode(self, weight: Tensor, scale: Tensor | float) -> Tensor:
        """Conductances as in `Mapping.encode`; what has the other sign than its fragment is written as zero."""
        both = Mapping("two_column", self.weight_bits, self.cell_bits, self.on_off, self.clip, self.copies)
        return both.encode(weight * self._known(), scale)[:, :1].contiguous()

    def decode(self, cells: Tensor, scale: Tensor | float) -> Tensor:
        """The weights that conductances read back as, each with its fragment's sign."""
        levels = cells if self.g_min == 0 else (cells - self.g_min) / (1 - self.g_min)
        return torch.einsum("sc,sc...->...", self.coefficients(cells), levels) * scale * self._known()
