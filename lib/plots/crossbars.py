"""Figures about arrays of cells: what converters and wires cost, what structures save, where a design gains."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from lib.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, band, legend_beside, log_ticks, looks, spread_of

COMPONENTS = {
    "adc": BLUE,
    "dac": ORANGE,
    "array": GREEN,
    "sample_hold": PURPLE,
    "shift_add": RED,
}


def converter_sweep(sweep: pd.DataFrame) -> Figure:
    """Accuracy lost and energy against the bits of converters, a line for each size of array.

    Args:
        sweep: columns ``size``, ``bits``, ``lost`` (points), ``energy`` (nJ); a row per network.

    >>> import pandas as pd
    >>> from lib.plots import converter_sweep
    >>> sweep = pd.DataFrame({"size": [64, 128], "bits": 8, "lost": [0.0, 0.4], "energy": [90.0, 60.0]})
    >>> figure = converter_sweep(sweep)
    >>> [ax.get_ylabel() for ax in figure.axes], [text.get_text() for text in figure.legends[0].get_texts()]
    (['points of accuracy lost', 'energy of an image (nJ)'], ['64 x 64', '128 x 128'])
    """
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 3.8))
    sizes = sorted(sweep["size"].unique())
    for size, colour in zip(sizes, sns.color_palette("crest", len(sizes)), strict=True):
        part = sweep[sweep["size"] == size]
        for ax, y in zip(axes, ("lost", "energy"), strict=True):
            band(ax, part, "bits", y, f"{size} x {size}", color=colour, marker="o", legend=False)
    axes[0].axhline(0, color=GREY, ls="--", lw=1.2)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="bits of a converter", ylabel="points of accuracy lost", title="Accuracy")
    axes[1].set(xlabel="bits of a converter", ylabel="energy of an image (nJ)", yscale="log", title="Energy")
    log_ticks(axes[1].yaxis)
    for ax in axes:
        ax.set_xticks(sorted(sweep["bits"].unique()))
    legend_beside(figure, axes[0])
    return figure


def wire_sweep(dropped: pd.DataFrame, current: Mapping[float, float]) -> Figure:
    """Accuracy lost to wires against the resistance of a cell that is on, a line for each network.

    Args:
        dropped: columns ``arm``, ``r_on`` (ohms), ``lost`` (points); a row per network.
        current: share of a full column's current that is lost, by resistance; written above the axis.

    >>> import pandas as pd
    >>> from lib.plots import wire_sweep
    >>> dropped = pd.DataFrame({"arm": ["dense", "pruned"], "r_on": 1e5, "lost": [0.1, 0.6]})
    >>> figure = wire_sweep(dropped, {1e5: 0.091, 1e6: 0.01})
    >>> [share.get_text() for share in figure.axes[0].texts]
    ['9.1%', '1.0%']
    """
    figure, ax = plt.subplots(figsize=(6.4, 3.8))
    for (arm, part), colour in zip(dropped.groupby("arm", sort=False), cycle((BLUE, ORANGE, GREEN, RED)), strict=False):
        band(ax, part, "r_on", "lost", arm, color=colour, marker="o")
    ax.axhline(0, color=GREY, ls="--", lw=1.2)
    ax.set(xscale="log", xlabel="resistance of a cell that is on (ohm)", ylabel="points of accuracy lost")
    ax.set_xlim(min(current) / 1.5, max(current) * 1.5)
    ax.invert_yaxis()
    log_ticks(ax.xaxis, subs=(1,))
    above = ax.get_xaxis_transform()
    for ohm, share in current.items():
        ax.text(ohm, 1.02, f"{share:.1%}", transform=above, ha="center", color=GREY, size="small")
    ax.legend()
    return figure


def lost_against_rate(tried: pd.DataFrame, allowed: float, most: float = 12.0) -> Figure:
    """Points of accuracy lost against the rate asked for, a line for each structure.

    Args:
        tried: columns ``arm``, ``rate``, ``lost``; a row per network.
        allowed: points, drawn as a dashed line.
        most: points at which the axis ends.

    >>> import pandas as pd
    >>> from lib.plots import lost_against_rate
    >>> tried = pd.DataFrame({"arm": ["column", "filter", "filter"], "rate": [2, 2, 4], "lost": [0.2, 0.4, 1.5]})
    >>> figure = lost_against_rate(tried, allowed=0.5)
    >>> [tick.get_text() for tick in figure.axes[0].get_xticklabels()], figure.axes[0].get_ylabel()
    (['2', '4'], 'points of validation accuracy lost')
    """
    figure, ax = plt.subplots(figsize=(6.8, 4.2))
    arms = sorted(tried["arm"].unique())
    for arm, (colour, marker) in looks(arms).items():
        band(ax, tried[tried["arm"] == arm], "rate", "lost", arm, color=colour, marker=marker, legend=False)
    ax.axhline(allowed, color=GREY, ls="--", lw=1.2)
    ax.set(xscale="log", xlabel="rate: weights / kept weights", ylabel="points of validation accuracy lost")
    ax.set_ylim(min(most, tried["lost"].max() + 0.3), min(-0.3, tried["lost"].min() - 0.3))
    ax.set_xticks(sorted(tried["rate"].unique()))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    legend_beside(figure, ax)
    return figure


def savings(results: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """What each structure saves over the dense network, a panel for each quantity, a bar for each structure.

    Args:
        results: columns ``arm``, ``seed`` and, for each quantity ``q``, ``"q saved"``: a ratio, above 1 is better.

    >>> import pandas as pd
    >>> from lib.plots import savings
    >>> saved = {"energy_nJ saved": [1.0, 2.5], "arrays saved": [1.0, 4.0]}
    >>> figure = savings(pd.DataFrame({"arm": ["dense", "filter"], "seed": 0} | saved), ["dense", "filter"])
    >>> {ax.get_title(): [times.get_text() for times in ax.texts] for ax in figure.axes}
    {'energy': ['2.5x'], 'arrays': ['4x']}
    """
    columns = [c for c in results if c.endswith(" saved")]
    titles = {"energy_nJ": "energy", "area_mm2": "area", "latency_us": "time"}
    size = (2.5 * len(columns), 0.42 * len(arms) + 1.2)
    figure, axes = plt.subplots(1, len(columns), figsize=size, sharey=True, squeeze=False)
    for ax, column in zip(axes[0], columns, strict=True):
        shown = results[results["arm"] != "dense"]
        order = [a for a in arms if a != "dense"]
        bars = {"order": order, "color": BLUE, "errorbar": ("ci", 95), "seed": 0, "err_kws": {"lw": 1}}
        sns.barplot(shown, x=column, y="arm", ax=ax, **bars)
        ax.axvline(1, color=GREY, ls="--", lw=1.2)
        for i, arm in enumerate(order):
            value = shown.loc[shown["arm"] == arm, column].mean()
            edge = ax.get_yaxis_transform()
            ax.text(0.98, i, f"{value:.2g}x", transform=edge, ha="right", va="center", size="x-small")
        name = column.removesuffix(" saved")
        ax.set(title=titles.get(name, name), xlabel="dense / this", ylabel="", xlim=(0, None))
        ax.set_xlim(0, ax.get_xlim()[1] * 1.25)
    figure.tight_layout()
    return figure


def decomposition(taken: pd.DataFrame) -> Figure:
    """Energy by component, and area times time, step by step.

    Args:
        taken: columns ``step``, ``seed``, the components in nJ, ``area_time`` (mm2 us); a row per network and step.

    >>> import pandas as pd
    >>> from lib.plots import decomposition
    >>> energy = {"adc": [600, 200], "array": [400, 200], "energy": [1000, 400]}
    >>> figure = decomposition(pd.DataFrame({"step": ["pruned", "FORMS"], "seed": 0, "area_time": [50, 40]} | energy))
    >>> [[gain.get_text().strip() for gain in ax.texts] for ax in figure.axes]
    [['1.00', '2.50'], ['1.00', '1.25']]
    """
    steps = list(dict.fromkeys(taken["step"]))
    parts = [c for c in COMPONENTS if c in taken]
    means = taken.groupby("step", sort=False)[[*parts, "energy", "area_time"]].mean().loc[steps]
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 0.45 * len(steps) + 1.4), sharey=True)
    left = np.zeros(len(steps))
    for part in parts:
        axes[0].barh(steps, means[part] / 1000, left=left, color=COMPONENTS[part], label=part.replace("_", " and "))
        left += means[part] / 1000
    axes[1].barh(steps, means["area_time"] / 1000, color=GREY)
    base = means.loc["pruned"] if "pruned" in means.index else means.iloc[0]
    for ax, column in zip(axes, ("energy", "area_time"), strict=True):
        for i, value in enumerate(means[column]):
            ax.text(value / 1000, i, f"  {base[column] / value:.2f}", va="center", size="small")
        ax.set_xlim(0, means[column].max() / 1000 * 1.12)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="energy of an image (uJ)", title="Energy; beside it the gain over pruned ISAAC")
    axes[1].set(xlabel="area x time (mm2 ms)", title="Area x time")
    legend_beside(figure, axes[0])
    return figure


def pareto(*goals: pd.Series) -> pd.Series:
    """Whether no other row is at least as good in every goal and better in one; larger is better.

    >>> import pandas as pd
    >>> from lib.plots import pareto
    >>> accuracy, saved = pd.Series([90, 99, 95]), pd.Series([5, 2, 1])
    >>> pareto(accuracy, saved).tolist()  # the second beats the third in both
    [True, True, False]
    """
    values = np.stack([g.to_numpy() for g in goals], axis=1)
    beaten = [bool(((values >= v).all(1) & (values > v).any(1)).any()) for v in values]
    return pd.Series(~np.array(beaten), index=goals[0].index)


def joint(results: pd.DataFrame, front: pd.Series) -> Figure:
    """Accuracy against energy, and tolerated faults against energy, of the same networks, named at their points.

    Args:
        results: columns ``arm``, ``accuracy_percent``, ``energy_nJ``, ``tolerated_percent``; a row per network.
        front: by arm, whether it lies on the Pareto front of all three: drawn filled.

    >>> import pandas as pd
    >>> from lib.plots import joint
    >>> goals = {"accuracy_percent": [99, 98], "energy_nJ": [900, 300], "tolerated_percent": [1.5, 0.3]}
    >>> front = pd.Series({"dense": True, "filter": False})
    >>> figure = joint(pd.DataFrame({"arm": ["dense", "filter"]} | goals), front)
    >>> [ax.get_ylabel() for ax in figure.axes], [text.get_text() for text in figure.legends[0].get_texts()]
    (['test accuracy (%)', 'tolerated broken cells (%)'], ['dense', 'filter'])
    """
    drawn = looks(front.index)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
    goals = (("accuracy_percent", "test accuracy (%)"), ("tolerated_percent", "tolerated broken cells (%)"))
    for ax, (goal, label) in zip(axes, goals, strict=True):
        for arm, (colour, marker) in drawn.items():
            part = results[results["arm"] == arm]
            x, y = part["energy_nJ"] / 1000, part[goal]
            style = {"fmt": marker, "ms": 9, "color": colour, "elinewidth": 0.9, "label": arm}
            style["mfc"] = colour if front[arm] else "white"
            ax.errorbar(x.mean(), y.mean(), spread_of(y), spread_of(x), **style)
        ax.set(xlabel="energy of an image (uJ)", ylabel=label, xscale="log")
        log_ticks(ax.xaxis)
    axes[1].set_yscale("log")
    log_ticks(axes[1].yaxis)
    legend_beside(figure, axes[0])
    return figure
