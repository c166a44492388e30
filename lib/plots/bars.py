"""Bars of tidy rows, named by their columns."""

from textwrap import fill
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.plots.axes import draw, publish
from lib.plots.rows import Interval, Part, Rows, ends, named, parts, summary
from lib.plots.style import called, looks


def bars(
    rows: Rows,
    value: str,
    by: str,
    *,
    colour: str = "",
    panel: str = "",
    stacked: bool = False,
    horizontal: bool = False,
    interval: Interval = "range",
    text: str = "",
    marks: pd.DataFrame | None = None,
    **look: Any,
) -> Figure:
    """Means over runs as bars, a group for each value of ``by``, a bar in it for each of ``colour``, with their ends.

    Args:
        rows, panel, look: as in `curves`. interval: as `lib.plots.rows.summary` has it.
        stacked: bars of a group stand on one another and have no ends.
        text: written at the end of a bar: a format of its mean, as ``{:.2g}x``, or a column.
        marks: published values, columns ``by``, ``value``, ``colour`` and perhaps ``panel``, as crosses; not for
            horizontal bars.

    Raises:
        PlotError: a column that the rows do not have, or groups without a name.

    >>> import pandas as pd
    >>> from lib.plots import bars
    >>> stored = pd.DataFrame({"network": ["dense", "dense", "pruned"], "kilobytes": [10.0, 40.0, 0.9]})
    >>> ax = bars(stored, "kilobytes", "network", text="{:.2g} kB").axes[0]
    >>> [round(float(bar.get_height()), 3) for bar in ax.patches], [said.get_text() for said in ax.texts]
    ([25.0, 0.9], ['25 kB', '0.9 kB'])
    """
    written = text if "{" not in text else ""
    found, names = named(parts(rows, value, panel, by, colour, written), _by=by, _colour=colour)
    own, order = looks(names["_colour"]), names["_by"]
    thick = 0.8 if stacked else 0.8 / max(1, len(own))
    shift = {name: 0.0 if stacked else (i - (len(own) - 1) / 2) * thick for i, name in enumerate(own)}
    if marks is not None:
        place = marks[by].map(order.index) + (marks[colour].map(shift) if colour else 0.0)
        marks = marks.assign(_place=place)

    def draw_part(ax: Axes, part: Part) -> pd.DataFrame:
        base, drawn = pd.Series(0.0, index=order), [pd.DataFrame({"place": [], "mean": [], "high": [], "text": []})]
        for name, shown in part.rows.groupby("_colour", sort=False):
            means = summary(shown, "_by", part.y, None if stacked else interval)
            means["place"] = means.index.map(order.index) + shift[name]
            style = {"color": own[name][0], "label": called(colour, name)}
            below = base[means.index] if stacked else 0
            (ax.barh if horizontal else ax.bar)(means["place"], means["mean"], 0.95 * thick, below, **style)
            if stacked:
                base[means.index] += means["mean"]
                means["mean"] = means["high"] = base[means.index]
            elif interval:
                at = (means["mean"], means["place"]) if horizontal else (means["place"], means["mean"])
                ax.errorbar(*at, **{"xerr" if horizontal else "yerr": ends(means)}, color="0.25", lw=0.9, ls="")
            said = shown.groupby("_by")[written].first() if written else means["mean"].map(text.format)
            drawn.append(means.assign(text=said))
        tops = pd.concat(drawn).drop_duplicates("place", keep="last")  # of a stack: all of it
        _write(ax, tops, horizontal)
        _name(ax, order, horizontal)
        publish(ax, marks, part, "_place", panel, "", {})
        ax.margins(**{"x" if horizontal else "y": 0.15 if text else 0.05})
        return tops.rename(columns={"mean": "x", "place": "y"} if horizontal else {"place": "x", "mean": "y"})

    many = len(order) * (1 if stacked else len(own))
    size = {"width": 10.4} if many > 16 else {}
    if horizontal:
        size = {"height": 1.2 + 0.22 * max(many, 1.6 * len(order))}
    return draw(found, draw_part, horizontal=horizontal, **size | look)


def _write(ax: Axes, tops: pd.DataFrame, horizontal: bool) -> None:
    """Texts beyond the ends of bars."""
    beside = {"xytext": (4, 0), "va": "center"} if horizontal else {"xytext": (0, 2), "ha": "center"}
    for place, high, text in tops[["place", "high", "text"]].itertuples(index=False):
        end = (high, place) if horizontal else (place, high)
        ax.annotate(text, end, textcoords="offset points", fontsize="small", **beside)


def _name(ax: Axes, order: list, horizontal: bool) -> None:
    """Groups of bars by their names: side by side where there is room, else slanted."""
    groups = [str(name) for name in order]
    if horizontal:
        ax.set_yticks(range(len(order)), groups)
        ax.set_ylim(len(order) - 0.5, -0.5)
    elif len(order) > 8:
        ax.set_xticks(range(len(order)), groups, rotation=30, ha="right", rotation_mode="anchor")
    else:
        ax.set_xticks(range(len(order)), [fill(group, 11, break_long_words=False) for group in groups])
    ax.grid(axis="y" if horizontal else "x", visible=False)
