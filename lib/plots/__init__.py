"""The house style and a handful of general figures, of rows and the names of their columns. Only here is drawn."""

from lib.plots.axes import panels
from lib.plots.bars import bars
from lib.plots.curves import curves, pareto, points
from lib.plots.dots import dots
from lib.plots.figures import Played, show
from lib.plots.pictures import pictures
from lib.plots.rows import PlotError
from lib.plots.style import (
    BAND,
    BLUE,
    GREY,
    VERDICT_COLOURS,
    house_style,
    ledger_table,
    looks,
    table,
)

__all__ = [
    "BAND",
    "BLUE",
    "GREY",
    "VERDICT_COLOURS",
    "Played",
    "PlotError",
    "bars",
    "curves",
    "dots",
    "house_style",
    "ledger_table",
    "looks",
    "panels",
    "pareto",
    "pictures",
    "points",
    "show",
    "table",
]
