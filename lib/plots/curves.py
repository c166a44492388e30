"""Curves and points of tidy rows, named by their columns."""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.plots.axes import draw, publish
from lib.plots.rows import Interval, Part, Rows, ends, named, parts, placed, reached, summary
from lib.plots.style import DASHES, GREY, MARKERS, Look, called, looks


def curves(
    rows: Rows,
    x: str,
    y: str | Mapping[str, str],
    *,
    line: str = "",
    dash: str = "",
    panel: str = "",
    by: str = "",
    interval: Interval = "range",
    geometric: bool = False,
    marks: pd.DataFrame | None = None,
    **look: Any,
) -> Figure:
    """Means over runs against ``x``, joined; from lowest to highest as a band, other ends as bars.

    Args:
        rows: a row per run, or such rows by the title of their panel.
        x: a column; words are drawn in the order they come in.
        y: a column, or several with their labels: a panel each.
        line, dash, panel: columns whose values get a colour and a marker each, a style of line, a panel.
        by: the column whose values are a point each, at the mean of their ``x``; ``x`` itself by default.
        interval, geometric: as `lib.plots.rows.summary` has them.
        marks: published points, columns as in ``rows``: ``x``, ``y``, and ``panel`` for those that belong to one only,
            ``line`` for its colour, ``text`` to be written over them, ``label`` for the legend.
        look: ``columns``, ``width``, ``height`` and ``sharey`` of the panels; labels, scales, limits and ``levels`` as
            `lib.plots.axes.dress` has them, a value for all panels or a mapping by panel.

    Raises:
        PlotError: a column that the rows do not have, or lines without a name.

    >>> import pandas as pd
    >>> from lib.plots import curves
    >>> runs = pd.DataFrame({"data": "mnist", "arm": ["ADMM"] * 3, "rate": [2, 2, 8], "lost": [0.1, 0.3, 0.9]})
    >>> han = pd.DataFrame({"data": ["mnist"], "rate": 12.0, "lost": 0.0, "text": "Han"})
    >>> figure = curves(runs, "rate", "lost", line="arm", panel="data", marks=han, xscale="log", lost=5.0)
    >>> figure.axes[0].lines[0].get_ydata().round(2).tolist(), figure.axes[0].texts[0].get_text()
    ([0.2, 0.9], 'Han')
    """
    found, names = named(parts(rows, y, panel, x, line, dash, by), _line=line, _dash=dash)
    own, dashes = looks(names["_line"]), dict(zip(names["_dash"], cycle(DASHES), strict=False))

    def draw_part(ax: Axes, part: Part) -> pd.DataFrame:
        runs, words = placed(part.rows.dropna(subset=part.y), x)
        drawn = [pd.DataFrame({"x": runs[x], "y": runs[part.y]}).head(0)]
        for (name, kind), shown in runs.groupby(["_line", "_dash"], sort=False):
            means = summary(shown, by or x, part.y, interval, geometric).sort_index()
            at = shown.groupby(by)[x].mean() if by else means.index
            band = interval == "ci" or (interval == "range" and not by)
            _join(ax, at, means, own[name], dashes[kind], called(line, name), band, bool(interval))
            drawn.append(reached(at, means))
        for kind, style in dashes.items():
            ax.plot([], [], color=GREY, ls=style, label=called(dash, kind))
        if words:
            ax.set_xticks(range(len(words)), words)
        publish(ax, marks, part, x, panel, line, own)
        return pd.concat(drawn)

    return draw(found, draw_part, **look)


def _join(
    ax: Axes, at: pd.Index, means: pd.DataFrame, look: Look, dash: str, label: str, band: bool, tips: bool
) -> None:
    """One line through its means, with a band or bars to their ends."""
    colour, marker = look
    face, marker = colour if dash == "-" else "white", marker if len(means) <= 40 else ""  # more are computed, no runs
    ax.plot(at, means["mean"], label=label, color=colour, marker=marker, ms=5, mfc=face, lw=1.5, ls=dash)
    if band:
        ax.fill_between(at, means["low"], means["high"], color=colour, alpha=0.15, lw=0)
    elif tips:
        ax.errorbar(at, means["mean"], ends(means), color=colour, ls="", elinewidth=0.8)


def points(
    rows: Rows,
    x: str,
    y: str | Mapping[str, str],
    *,
    line: str,
    marker: str = "",
    by: str = "",
    filled: str = "",
    panel: str = "",
    **look: Any,
) -> Figure:
    """A point for each group of runs at its means, with a cross from the lowest to the highest of both quantities.

    Args:
        rows, y, panel, look: as in `curves`.
        line: the column whose values get a colour each. marker: a column whose values get a marker each; that of the
            colour by default. by: the column that divides the runs of one line into several points.
        filled: a column that says whose points are filled, those of the Pareto front for one; all by default.

    Raises:
        PlotError: a column that the rows do not have, or lines without a name.

    >>> import pandas as pd
    >>> from lib.plots import pareto, points
    >>> nets = pd.DataFrame({"arm": ["dense", "filter"], "accuracy": [99, 98], "energy_uJ": [0.9, 1.1]})
    >>> nets["front"] = pareto(nets["accuracy"], -nets["energy_uJ"])
    >>> ax = points(nets, "energy_uJ", "accuracy", line="arm", filled="front", xscale="log").axes[0]
    >>> [drawn[0].get_markerfacecolor() for drawn in ax.containers]
    ['0.45', 'white']
    """
    columns = (x, line, marker, by, filled)
    found, names = named(parts(rows, y, panel, *columns), _line=line, _marker=marker, _by=by, _filled=filled)
    own, shapes = looks(names["_line"]), dict(zip(names["_marker"], cycle(MARKERS), strict=False))

    def draw_part(ax: Axes, part: Part) -> pd.DataFrame:
        drawn = [pd.DataFrame({"x": [], "y": []})]
        for (name, kind, _), runs in part.rows.groupby(["_line", "_marker", "_by"], sort=False):
            across, up = (summary(runs, "_line", column, "range").iloc[0] for column in (x, part.y))
            colour, shape = own[name]
            style = {"color": colour, "marker": shapes[kind] if marker else shape, "ms": 7, "elinewidth": 0.8}
            style["mfc"] = colour if not filled or runs["_filled"].iloc[0] else "white"
            label = "" if marker else called(line, name)
            ax.errorbar(across["mean"], up["mean"], ends(up), ends(across), ls="", label=label, **style)
            drawn.append(reached([across["mean"]], up.to_frame().T))
        if marker:  # colour and marker each have a meaning of their own
            for name, (colour, _) in own.items():
                ax.plot([], [], color=colour, lw=4, label=called(line, name))
            for kind, shape in shapes.items():
                ax.plot([], [], color=GREY, ls="", marker=shape, label=called(marker, kind))
        return pd.concat(drawn)

    return draw(found, draw_part, **look)


def pareto(*goals: pd.Series) -> pd.Series:
    """Whether no other row is at least as good in every goal and better in one; larger is better. A NaN is on no front.

    >>> import pandas as pd
    >>> from lib.plots import pareto
    >>> accuracy, saved = pd.Series([90, 99, 95]), pd.Series([5, 2, 1])
    >>> pareto(accuracy, saved).tolist()  # the second beats the third in both
    [True, True, False]
    """
    values = np.stack([goal.to_numpy() for goal in goals], axis=1)
    beaten = [bool(((values >= v).all(1) & (values > v).any(1)).any()) for v in values]
    return pd.Series(~np.array(beaten) & ~np.isnan(values).any(1), index=goals[0].index)
