"""Resistance of wires: what of a cell's current is left at the end of its column."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from math import sqrt, tanh
from typing import Literal, get_args

import torch
from torch import Tensor

from lib.crossbar.mapping import CrossbarError
from lib.crossbar.tiling import Array

BLOCKS = 1 << 24
"""Numbers in the blocks of column nodes that are held at once."""

Model = Literal["line", "series", "nodal"]


def line_loss(cells: int, conductance: float, resistance: float) -> float:
    """Share of the current that a line of equal cells loses, all at one voltage, with a sink at one end.

    ``1 - tanh(x) / x`` with ``x = N * sqrt(r * G)``: the closed form of a continuous line.

    Args:
        cells: N. conductance: of a cell, in siemens. resistance: of the wire between two cells, in ohms.

    >>> from lib.crossbar import line_loss
    >>> round(line_loss(128, 1e-5, 2.12), 4)
    0.1017
    """
    x = cells * sqrt(resistance * conductance)
    return 1 - tanh(x) / x if x else 0.0


def effective(conductance: Tensor, row: float, column: float) -> Tensor:
    """Column currents per volt on each row, ``(..., R, C)``, of arrays with resistive wires, exactly.

    Rows are driven at their left ends, at 0 V where the input is 0; columns end at the bottom in a virtual ground. All
    is linear then, so that an array with wires acts like one without whose cells are smaller: these. They are found by
    eliminating the nodes of one row after the other, with a dense ``C x C`` block of column nodes at a time.

    Args:
        conductance: of the cells in siemens, ``(..., R, C)``, row 0 farthest from the ground.
        row, column: resistance of a wire between two cells, in ohms, at the ends too; above 0.

    Raises:
        CrossbarError: a resistance that is not above 0.

    >>> from lib.crossbar import effective
    >>> round(1 / effective(torch.tensor([[1e-3]]), row=1.0, column=2.0).item(), 1)  # a cell of 1 kOhm and two wires
    1003.0
    >>> cells = effective(torch.full((2, 2), 1e-3), row=1.0, column=1.0)
    >>> bool(cells[0, 1] == cells.min())  # farthest from driver and ground
    True
    """
    if not (row > 0 and column > 0):
        raise CrossbarError(f"wires of {row} and {column} ohms a cell: both must be above 0")
    g = conductance.double()
    *_, rows, columns = g.shape
    gr, gc = 1 / row, 1 / column
    along = 2 * gr * torch.ones(columns, dtype=g.dtype, device=g.device)
    along[-1] = gr
    beside = torch.diag_embed(-gr * torch.ones(columns - 1, dtype=g.dtype, device=g.device), 1)
    wire = torch.diag(along) + beside + beside.T  # of one row: its left end is driven
    eye = torch.eye(columns, dtype=g.dtype, device=g.device)
    above, currents, chain = None, [], []
    for i in range(rows):  # from the top: S_i = D_i - gc^2 / S_(i-1)
        diagonal = torch.diag_embed(g[..., i, :])
        inverse = torch.linalg.inv(wire + diagonal)
        coupled = diagonal - diagonal @ inverse @ diagonal
        ends = gc * (1 if i == 0 else 2)
        block = coupled + ends * eye - (gc**2 * above if above is not None else 0)
        above = torch.linalg.inv(block)
        currents.append(g[..., i, :] * inverse[..., :, 0] * gr)  # into the column nodes, per volt
        chain.append(above)
    found, down = [], gc * chain[-1]
    for i in reversed(range(rows)):
        found.append((down @ currents[i][..., None])[..., 0])
        if i:
            down = down @ (gc * chain[i - 1])
    return torch.stack(found[::-1], dim=-2).to(conductance.dtype)


def in_series(conductance: Tensor, row: float, column: float) -> Tensor:
    """The same by MNSIM 2.0's rule: every cell in series with its wire to the driver and to the ground, none shared.

    Cheap, and too good: wires carry the currents of other cells as well.
    """
    rows, columns = conductance.shape[-2:]
    to_driver = row * torch.arange(1, columns + 1, device=conductance.device)
    to_ground = column * torch.arange(rows, 0, -1, device=conductance.device)
    return conductance / (1 + conductance * (to_driver + to_ground[:, None]))


def on_lines(conductance: Tensor, row: float, column: float) -> Tensor:
    """The same by the closed form of `line_loss`, for each column with its mean conductance; rows are left perfect."""
    x = conductance.shape[-2] * (column * conductance.mean(-2, keepdim=True)).sqrt()
    return conductance * torch.where(x > 0, torch.tanh(x) / x.clamp(min=1e-12), 1.0)


@dataclass(frozen=True)
class Wires:
    """Wires of an array, and by which model they weaken its cells.

    Attributes:
        row, column: resistance of a wire between two cells, in ohms.
        r_on: resistance of a cell that is on, in ohms; 1 / G_max.
        model: ``nodal`` is exact for driven rows and a virtual ground (`effective`); ``series`` is `in_series`;
            ``line`` is `on_lines`.

    Raises:
        CrossbarError: a resistance that is not above 0, or an unknown model.

    >>> from lib.crossbar import Array, Wires
    >>> wires = Wires(row=1.0, column=2.0, r_on=1000.0)
    >>> round(wires.weaken(torch.ones(1, 1, 1, 1), Array()).item(), 4)  # 1000 / 1003
    0.997
    """

    row: float
    column: float
    r_on: float
    model: Model = "nodal"

    def __post_init__(self) -> None:
        if not (self.row > 0 and self.column > 0 and self.r_on > 0):
            raise CrossbarError(
                f"row = {self.row}, column = {self.column}, r_on = {self.r_on} ohms: all must be above 0"
            )
        if self.model not in get_args(Model):
            raise CrossbarError(f"model {self.model!r} of wires is unknown: allowed are {', '.join(get_args(Model))}")

    def weaken(self, cells: Tensor, array: Array, groups: int = 1) -> Tensor:
        """What cells act like behind their wires; conductances in shares of G_max, ``(slices, columns, F, ...)``.

        The cells of a weight lie side by side, as in `lib.crossbar.Mapping.plane`. What does not fill an array lies
        nearest to its drivers and its ground, so that empty rows and columns carry nothing.
        """
        if array.tiling != "dense":
            raise CrossbarError(f"wires of an array with tiling = {array.tiling!r} are not modelled: use 'dense'")
        lines = cells.flatten(3).unflatten(2, (groups, -1))  # (slices, sides, G, F/G, rows)
        sides = [lines] if array.pair == "columns" else lines.split(1, dim=1)
        weak = torch.cat([self._of_matrix(part, array) for part in sides], dim=1)
        return weak.flatten(2, 3).view(cells.shape)

    def _of_matrix(self, lines: Tensor, array: Array) -> Tensor:
        """``(slices, sides, G, F/G, rows)``, cut into arrays and put together again."""
        slices, sides, groups, filters, rows = lines.shape
        matrix = lines.permute(2, 4, 3, 1, 0).reshape(groups, rows, filters * sides * slices)
        rule, weak = {"nodal": effective, "series": in_series, "line": on_lines}[self.model], torch.empty_like(matrix)
        by_size = defaultdict(list)  # those of one size at once
        for i, j in product(range(0, rows, array.rows), range(0, matrix.shape[2], array.columns)):
            place = slice(None), slice(i, i + array.rows), slice(j, j + array.columns)
            by_size[matrix[place].shape].append(place)
        for size, places in by_size.items():
            most = max(1, BLOCKS // (size.numel() * size[2]))
            for some in (places[i : i + most] for i in range(0, len(places), most)):
                cells = torch.stack([matrix[place] for place in some])
                for place, part in zip(some, rule(cells / self.r_on, self.row, self.column) * self.r_on, strict=True):
                    weak[place] = part
        return weak.view(groups, rows, filters, sides, slices).permute(4, 3, 0, 2, 1)
