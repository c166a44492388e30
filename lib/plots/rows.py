"""Rows as figures take them: the panels that they fall into, means of runs with their ends."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype
from scipy.stats import gmean

from lib.study import interval as interval_of

Rows = pd.DataFrame | Mapping[str, pd.DataFrame]
Interval = Literal["ci", "range"] | tuple[str, str] | None


class PlotError(ValueError):
    """Rows that a figure cannot be drawn from; the message names what came and what is there.

    >>> import pandas as pd
    >>> from lib.plots import PlotError, curves
    >>> try:
    ...     curves(pd.DataFrame({"rate": [2.0], "drop": [0.1]}), "rate", "lost")
    ... except PlotError as error:
    ...     print(error)
    no column lost: the rows have rate, drop
    """


class Part(NamedTuple):
    """What one panel shows; ``key`` is its title in a mapping, its value of ``panel``, or its column of ``y``."""

    title: str
    key: Any
    rows: pd.DataFrame
    y: str
    label: str = ""


def _all_have(rows: pd.DataFrame, column: str) -> None:
    if missing := int(rows[column].isna().sum()):
        raise PlotError(f"no {column} in {missing} of {len(rows)} rows: they would be in no line, group or panel")


def parts(rows: Rows, y: str | Mapping[str, str], panel: str, *columns: str) -> list[Part]:
    """The panels: a title each of a mapping to rows, a quantity each of ``y``, or a value each of the column ``panel``.

    Raises:
        PlotError: a column that the rows do not have, or rows without a panel.

    >>> import pandas as pd
    >>> from lib.plots.rows import parts
    >>> runs = pd.DataFrame({"model": ["vgg", "lenet5"], "lost": [0.1, 0.2], "energy": [9, 3]})
    >>> [(part.title, len(part.rows)) for part in parts(runs, "lost", "model")]
    [('vgg', 1), ('lenet5', 1)]
    >>> [(part.y, part.label) for part in parts(runs, {"lost": "points", "energy": "uJ"}, "")]
    [('lost', 'points'), ('energy', 'uJ')]
    """
    if isinstance(y, Mapping):
        found = [Part("", column, rows, column, label) for column, label in y.items()]
    elif isinstance(rows, Mapping):
        found = [Part(title, title, own, y) for title, own in rows.items()]
    elif panel in rows and len(rows):
        _all_have(rows, panel)
        found = [Part(str(key), key, rows[rows[panel] == key], y) for key in dict.fromkeys(rows[panel])]
    else:
        found = [Part("", None, rows, y)]
    for part in found:
        asked = [*columns, part.y, "" if isinstance(rows, Mapping) else panel]
        if missing := [name for name in asked if name and name not in part.rows]:
            raise PlotError(f"no column {', '.join(missing)}: the rows have {', '.join(map(str, part.rows))}")
    return found


def named(found: list[Part], **columns: str) -> tuple[list[Part], dict[str, list]]:
    """Parts whose rows have these columns under these names too ("" where there is none), and the values of each.

    Raises:
        PlotError: rows without a value there.
    """
    whole = []
    for part in found:
        own = part.rows.assign(**{name: part.rows[column] if column else "" for name, column in columns.items()})
        for column in filter(None, columns.values()):
            _all_have(own, column)
        whole.append(part._replace(rows=own))
    return whole, {name: list(dict.fromkeys(value for part in whole for value in part.rows[name])) for name in columns}


def summary(
    rows: pd.DataFrame, by: str | list[str], column: str, interval: Interval = "range", geometric: bool = False
) -> pd.DataFrame:
    """Mean, low and high end of a column by group, in the order of the rows; rounding puts no mean beyond its ends.

    Args:
        interval: ``ci``, the interval that claims have (`lib.study.interval`); ``range``, from lowest to highest; two
            columns that hold ends, of which the outermost are taken; or None.
        geometric: means are geometric.

    >>> import pandas as pd
    >>> from lib.plots.rows import summary
    >>> runs = pd.DataFrame({"arm": ["a", "a", "b"], "gain": [10.0, 40.0, 2.0]})
    >>> summary(runs, "arm", "gain", "range", geometric=True).round(3).loc["a"].tolist()
    [20.0, 10.0, 40.0]
    """

    def ends(own: pd.DataFrame) -> tuple[float, float, float]:
        values = own[column]
        mean = float(gmean(values) if geometric else values.mean())
        found = (mean, mean)
        if interval == "ci":
            found = interval_of(values)[1:]
        elif interval:
            low, high = (column, column) if interval == "range" else interval
            found = (own[low].min(), own[high].max())
        return mean, float(np.fmin(mean, found[0])), float(np.fmax(mean, found[1]))  # of a single network: NaN

    groups = rows.dropna(subset=column).groupby(by, sort=False)
    found = pd.Series({key: ends(own) for key, own in groups}, dtype=object)
    return pd.DataFrame(found.tolist(), index=found.index, columns=["mean", "low", "high"])


def ends(means: pd.DataFrame | pd.Series) -> np.ndarray:
    """How far the ends lie from the mean, as matplotlib takes them: (2, groups)."""
    return np.array([means["mean"] - means["low"], means["high"] - means["mean"]]).reshape(2, -1)


def reached(x: Any, means: pd.DataFrame) -> pd.DataFrame:
    """Means and ends at their places, as `dress` takes them."""
    return pd.concat([pd.DataFrame({"x": x, "y": means[end].to_numpy(float)}) for end in means])


def placed(rows: pd.DataFrame, x: str) -> tuple[pd.DataFrame, list[str]]:
    """Rows whose words in the column ``x`` are numbers 0, 1, ... in the order they come in, and the words, if any.

    >>> import pandas as pd
    >>> from lib.plots.rows import placed
    >>> rows, words = placed(pd.DataFrame({"choice": ["8", "1", "8"]}), "choice")
    >>> rows["choice"].tolist(), words
    ([0.0, 1.0, 0.0], ['8', '1'])
    """
    if is_numeric_dtype(rows[x]):
        return rows, []
    words = list(dict.fromkeys(rows[x]))
    return rows.assign(**{x: rows[x].map(words.index).astype(float)}), [str(word) for word in words]
