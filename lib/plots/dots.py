"""Points of tidy rows on lines of their names: for axes without a zero that a bar could begin at."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.plots.axes import draw
from lib.plots.rows import Interval, Part, Rows, ends, named, parts, reached, summary
from lib.plots.style import called, looks


def dots(
    rows: Rows,
    value: str,
    by: str,
    *,
    colour: str = "",
    panel: str = "",
    apart: bool = True,
    interval: Interval = "range",
    geometric: bool = False,
    bound: str = "",
    text: str = "",
    sharey: bool = True,
    **look: Any,
) -> Figure:
    """Means over runs as points with their ends, from top to bottom a line for each value of ``by``.

    Args:
        rows, panel, look: as in `curves`. interval, geometric: as `lib.plots.rows.summary` has them.
        colour: the column of which every line has a point for each value; ``apart``: one below the other.
        bound: a column with ``<`` or ``>`` where a value is a bound only: an arrow says to which side of it.
        text: written beside a point: a format of its mean, as ``{:.2g}x``, or a column.
        sharey: panels have the same lines, of which the first panel shows the names.

    Raises:
        PlotError: a column that the rows do not have, or lines without a name.

    >>> import pandas as pd
    >>> from lib.plots import dots
    >>> gains = pd.DataFrame({"network": ["trained", "trained", "pruned"], "gain": [10.0, 40.0, 0.9]})
    >>> ax = dots(gains, "gain", "network", geometric=True, text="{:.2g}x", xscale="log").axes[0]
    >>> [round(float(x), 3) for x in ax.lines[0].get_xdata()], [tick.get_text() for tick in ax.get_yticklabels()]
    ([20.0, 0.9], ['trained', 'pruned'])
    """
    written = text if "{" not in text else ""
    found, names = named(parts(rows, value, panel, by, colour, bound, written), _by=by, _colour=colour)
    own = looks(names["_colour"])
    step = 0.8 / max(1, len(own)) if apart else 0.0
    shift = {name: (i - (len(own) - 1) / 2) * step for i, name in enumerate(own)}

    def draw_part(ax: Axes, part: Part) -> pd.DataFrame:
        order = names["_by"] if sharey else [*dict.fromkeys(part.rows["_by"])]
        ax.set_yticks(range(len(order)), [str(name) for name in order])
        ax.set_ylim(len(order) - 0.5, -0.5)
        ax.grid(axis="y", visible=not apart)
        ax.margins(x=0.15 if text else 0.05)
        drawn = [pd.DataFrame({"x": [], "y": []})]
        for name, shown in part.rows.groupby("_colour", sort=False):
            means = summary(shown, "_by", part.y, interval, geometric)
            places, (ink, marker) = means.index.map(order.index) + shift[name], own[name]
            style = {"color": ink, "fmt": marker, "ms": 6, "elinewidth": 0.9, "label": called(colour, name)}
            ax.errorbar(means["mean"], places, xerr=ends(means), **style)
            said = shown.groupby("_by")[written].first() if written else means["mean"].map(text.format)
            sides = shown.groupby("_by")[bound].agg("".join) if bound else said.map(lambda _: "")
            for key, place in zip(means.index, places, strict=True):
                _point(ax, means.loc[key], place, said[key], sides[key], ink)
            drawn.append(reached(places, means).rename(columns={"x": "y", "y": "x"}))
        return pd.concat(drawn)

    lines = max(len(dict.fromkeys(part.rows["_by"])) for part in found) if found else 1
    height = 1.2 + (0.22 * max(len(own), 1.6) if apart else 0.28) * lines
    return draw(found, draw_part, horizontal=True, sharey=sharey, **{"height": height} | look)


def _point(ax: Axes, ends: pd.Series, place: float, text: str, sides: str, ink: Any) -> None:
    """What a point says, and the arrow of a bound."""
    for side, across in (("<", -24), (">", 24)):
        if side in sides:
            arrow = {"arrowstyle": "<-", "color": ink, "lw": 1.2}
            ax.annotate("", (ends["mean"], place), (across, 0), textcoords="offset points", arrowprops=arrow)
    beside = {"xytext": (30 if ">" in sides else 5, 0), "textcoords": "offset points", "va": "center"}
    ax.annotate(text, (ends["high"], place), fontsize="small", **beside)
