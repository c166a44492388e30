"""Panels of a figure: their size, scales, axes that end where all is seen, levels and published points."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, pairwise
from math import ceil, floor, log10
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from pandas.api.types import is_integer_dtype

from lib.plots.rows import Part
from lib.plots.style import DASHES, GREY

KEYED = (Mapping, pd.Series)
WIDTHS = {1: 6.8, 2: 9.6}
"""Inches of a figure by its columns; more columns share 10.4, which a page of 1,400 pixels shows at about full size."""


def panels(
    titles: Sequence[str],
    *,
    columns: int = 3,
    width: float | None = None,
    height: float = 3.6,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure no wider than a page, and in it a panel for each title, to draw on.

    Args:
        columns: panels side by side at most. width: of the figure, in inches; height: of a panel.

    >>> from lib.plots import panels
    >>> figure, axes = panels(["a", "b", "c", "d"])
    >>> [ax.get_title() for ax in axes], figure.axes == axes
    (['a', 'b', 'c', 'd'], True)
    """
    lines, columns = -(-len(titles) // columns), min(columns, len(titles))
    shape = {"figsize": (width or WIDTHS.get(columns, 10.4), height * lines), "layout": "constrained", "squeeze": False}
    figure, grid = plt.subplots(lines, columns, sharex=sharex, sharey=sharey, **shape)
    for ax in grid.flat[len(titles) :]:
        ax.remove()
    for ax, title in zip(grid.flat, titles, strict=False):
        ax.set_title(title)
    return figure, list(grid.flat[: len(titles)])


def log_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis as plain numbers, as many as can be read, within what the axis shows by now.

    >>> import matplotlib.pyplot as plt
    >>> from lib.plots.axes import log_ticks
    >>> for ends in ((2, 16), (2, 60), (0.5, 1500), (1e-5, 1)):
    ...     log_ticks((ax := plt.figure().add_subplot(xscale="log", xlim=ends)).xaxis)
    ...     print(*[tick.get_text() for tick in ax.get_xticklabels()])
    2 3 4 6 8 10 15
    2 5 10 20 50
    1 3 10 30 100 300 1,000
    1e-05 0.0001 0.001 0.01 0.1 1
    """
    low, high = sorted(axis.get_view_interval())
    if high < 3 * low:  # as good as linear
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(lambda tick, _: f"{tick:,.6g}")
        axis.set_minor_locator(NullLocator())
        return
    powers = [10.0**k for k in range(floor(log10(low)), ceil(log10(high)) + 1)]
    for steps in ((1, 1.5, 2, 3, 4, 6, 8), (1, 2, 5), (1, 3), (1,)):
        found = [tick for power in powers for step in steps if low * 0.999 <= (tick := step * power) <= high * 1.001]
        labels = [f"{tick:,.0f}" if tick >= 10 else f"{tick:g}" for tick in found]
        shares = np.diff(np.log10(found)) / log10(high / low)
        if all(36 * share > 1 + (len(a) + len(b)) / 2 for share, (a, b) in zip(shares, pairwise(labels), strict=True)):
            break  # of 36 letters beside one another
    axis.set_ticks(found, labels)
    axis.set_ticks([], minor=True)


def dress(
    ax: Axes,
    drawn: pd.DataFrame,
    *,
    xlabel: str = "",
    ylabel: str = "",
    xscale: Literal["linear", "log", "sparsity"] = "linear",
    yscale: Literal["linear", "log"] = "linear",
    lost: float | None = None,
    below: float | None = None,
    levels: Mapping[str, float] | None = None,
    horizontal: bool = False,
) -> None:
    """Give a panel its labels, scales and limits, once its data are drawn.

    Args:
        drawn: means and ends, columns ``x`` and ``y``.
        xscale: ``sparsity`` is spaced by the logarithm of what is kept, with a tick at each value.
        lost: the axis shows points lost, less is higher, and ends at this many; dashed at 0: the dense network.
        below: the axis shows accuracy and ends this far below the highest of levels and data. A line may leave both
            axes, but where even the best arm loses about as much, they reach twice as far as it: no panel is empty.
        levels: lines across the panel, dashed, by their names in the legend; ``horizontal``: upright, across such bars.

    >>> import matplotlib.pyplot as plt
    >>> import pandas as pd
    >>> from lib.plots.axes import dress
    >>> for best in (0.5, 7.0):
    ...     dress(ax := plt.figure().add_subplot(), pd.DataFrame({"x": [2, 4], "y": [best, 40.0]}), lost=5.0)
    ...     print([float(end) for end in ax.get_ylim()])
    [5.0, -0.2]
    [14.0, -0.56]
    """
    ax.set(xlabel=xlabel, ylabel=ylabel)
    levels = ({} if lost is None else {"": 0.0}) | dict(levels or {})
    for (name, value), dash in zip(levels.items(), cycle(DASHES[1:]), strict=False):
        (ax.axvline if horizontal else ax.axhline)(value, color=GREY, ls=dash, lw=1.3, label=name)
    if not len(drawn):
        return
    least, most, places = drawn["y"].min(), drawn["y"].max(), sorted(set(drawn["x"]))
    if lost is not None:
        lowest = max(most, *(other.dataLim.y1 for other in ax.get_shared_y_axes().get_siblings(ax)))  # published too
        end = min(max(lost, 2 * least), lowest)
        beside = 0.04 * max(5.0, end - min(0.0, least))  # room for the markers
        ax.set_ylim(end + beside * (end == lowest), min(0.0, least) - beside)
    if below is not None:
        top = max([most, *levels.values()])
        ax.set_ylim(bottom=max(ax.get_ylim()[0], top - max(below, 2 * (top - most))))
    if xscale == "sparsity":
        ax.set_xscale("function", functions=(lambda s: -np.log(np.maximum(1 - s, 1e-6)), lambda t: 1 - np.exp(-t)))
        aside = max(1.05, ((1 - places[0]) / (1 - places[-1])) ** 0.05)
        ax.set_xlim(1 - (1 - places[0]) * aside, 1 - (1 - places[-1]) / aside)
        ax.set_xticks(places, [f"{100 * place:.3g}%" for place in places], fontsize="small")
    elif xscale == "log":
        ax.set_xscale("log")
        if ax.dataLim.x0 == ax.dataLim.x1:  # no scale of its own
            ax.set_xlim(ax.dataLim.x0 / 1.3, ax.dataLim.x1 * 1.3)
        log_ticks(ax.xaxis)
    elif is_integer_dtype(drawn["x"]):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if yscale == "log":
        ax.set_yscale("log")
        log_ticks(ax.yaxis)


def draw(
    found: list[Part],
    draw_part: Callable[[Axes, Part], pd.DataFrame],
    *,
    columns: int = 3,
    sharey: bool | None = None,
    ylabel: str = "",
    levels: Mapping[str, Any] | None = None,
    width: float | None = None,
    height: float = 3.6,
    **look: Any,
) -> Figure:
    """A panel for each part, drawn by ``draw_part``, which returns the means and ends that it drew, then dressed.

    Args:
        sharey: one vertical axis for all; by default when all show one quantity.
        levels, look: as `dress` has them, each value for all panels or a mapping by the key of a part.
    """
    shared = len({part.y for part in found}) == 1 if sharey is None else sharey
    titles = [part.title for part in found]
    figure, axes = panels(titles, columns=columns, width=width, height=height, sharey=shared)
    drawn = [draw_part(ax, part) for ax, part in zip(axes, found, strict=True)]
    for i, (ax, part) in enumerate(zip(axes, found, strict=True)):
        lines = {name: value[part.key] if isinstance(value, KEYED) else value for name, value in (levels or {}).items()}
        own = {name: value.get(part.key) if isinstance(value, KEYED) else value for name, value in look.items()}
        own = {name: value for name, value in own.items() if value is not None}
        label = part.label or ylabel * (not shared or i % columns == 0)
        dress(ax, pd.concat(drawn) if shared else drawn[i], ylabel=label, levels=lines, **own)
    return figure


def publish(ax: Axes, marks: pd.DataFrame | None, part: Part, x: str, panel: str, line: str, own: dict) -> None:
    """Crosses at published points, in the panel that they belong to, in the colour of their line if they have one."""
    if marks is None or part.y not in marks:
        return
    for mark in (marks[marks[panel] == part.key] if panel in marks else marks).to_dict("records"):
        colour, at = own.get(mark.get(line), ("k",))[0], (mark[x], mark[part.y])
        ax.plot(*at, "x", color=colour, ms=7, mew=1.6, label=mark.get("label", "published"))
        over = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": "small"}
        ax.annotate(mark.get("text", ""), at, **over)
