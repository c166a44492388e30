"""Figures about faulty cells: what they do to weights, to accuracy, and to the rate that a network tolerates."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from lib.plots.style import BLUE, GREEN, GREY, ORANGE, band, legend_beside

SCHEME_COLOURS = {"offset": GREEN, "two_column": ORANGE, "differential": BLUE}


def _palette(names: Sequence[str]) -> dict[str, tuple]:
    others = [n for n in names if n not in SCHEME_COLOURS]
    return SCHEME_COLOURS | dict(zip(others, sns.color_palette("deep", 10)[3:], strict=False))


def accuracy_against_faults(
    results: pd.DataFrame,
    *,
    panels: Sequence[str],
    dense: float,
    panel: str = "network",
    line: str = "mapping",
    x: str = "rate",
    xlabel: str = "share of broken cells",
    log: bool = True,
    marks: Mapping[str, Sequence[tuple[float, float, str]]] | None = None,
) -> Figure:
    """Test accuracy against a fault rate, a panel for each network, a line with its band over trials for each mapping.

    Args:
        results: columns ``x``, ``accuracy_percent``, and those that ``panel`` and ``line`` name; a row per trial.
        dense: accuracy of the healthy dense network, dashed.
        marks: published points ``(x, accuracy, label)`` by line, as crosses in every panel.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.4 * columns, 3.5 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
    lines = list(dict.fromkeys(results[line]))
    palette = _palette(lines)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    values = results.loc[results[panel].isin(panels), x]
    for ax, name in zip(axes.flat, panels, strict=False):
        if log:  # before a line is drawn: a single rate has no scale of its own
            ax.set(xscale="log", xlim=(values.min() / 1.3, values.max() * 1.3))
        ax.axhline(dense, color=GREY, ls="--", lw=1.2)
        for label in lines:
            part = results[(results[panel] == name) & (results[line] == label)]
            if len(part):
                band(ax, part, x, "accuracy_percent", label, color=palette[label], marker="o", legend=False)
            for value, accuracy, text in (marks or {}).get(label, ()):
                ax.plot(value, accuracy, "x", color=palette[label], ms=8, mew=2, label=text)
        ax.set(title=name, xlabel=xlabel, ylabel="test accuracy (%)")
    legend_beside(figure, axes[0][0])
    return figure


def tolerated_bars(
    tolerated: pd.DataFrame,
    *,
    networks: Sequence[str],
    mappings: Sequence[str],
    drops: Sequence[float],
    reference: tuple[str, str],
) -> Figure:
    """Tolerated fault rates as bars, a panel a drop; over each bar how many times the reference tolerates it.

    Args:
        tolerated: columns ``network``, ``mapping``, ``drop``, ``seed``, ``tolerated_rate`` and its interval
            ``low``, ``high`` over chips; ``bound``, "<" or ">" where the drop lies outside the rates looked at. Bars
            are geometric means over seeds, lines from the lowest end to the highest.
        reference: network and mapping that the ratios refer to.
    """
    figure, axes = plt.subplots(1, len(drops), figsize=(6.2 * len(drops), 4), squeeze=False, sharey=True)
    for ax, drop in zip(axes[0], drops, strict=True):
        part = tolerated[tolerated["drop"] == drop]
        groups = part.groupby(["network", "mapping"])
        mean = groups["tolerated_rate"].agg(lambda v: np.exp(np.log(v).mean()))
        low, high = groups["low"].min(), groups["high"].max()
        flag = groups["bound"].agg(lambda b: "".join(sorted(set(b) - {""})))
        for i, mapping in enumerate(mappings):
            names = [n for n in networks if (n, mapping) in mean.index]
            place = np.array([networks.index(n) for n in names]) + (i - (len(mappings) - 1) / 2) * 0.8 / len(mappings)
            height = np.array([mean[n, mapping] for n in names])
            ends = np.abs([height - [low[n, mapping] for n in names], [high[n, mapping] for n in names] - height])
            ax.bar(place, height, 0.76 / len(mappings), color=SCHEME_COLOURS.get(mapping), label=mapping)
            ax.errorbar(place, height, ends, color="0.25", lw=0.9, ls="")
            for x, y, n in zip(place, height + ends[1], names, strict=True):
                times = f"{flag[n, mapping]}{mean[n, mapping] / mean[reference]:.2g}x"
                ax.text(x, y * 1.06, times, ha="center", fontsize="xx-small")
        ax.set_xticks(
            range(len(networks)), [n.replace(" ", "\n", 1) if len(n) > 8 else n for n in networks], fontsize="small"
        )
        ax.set(
            title=f"drop of {drop:g} point{'s' * (drop != 1)}", yscale="log", ylabel="tolerated share of broken cells"
        )
        ax.grid(axis="x", visible=False)
    legend_beside(figure, axes[0][-1])
    return figure


def tolerated_against_density(
    tolerated: pd.DataFrame, *, line: str, ylabel: str = "tolerated share of broken cells", y: str = "tolerated_rate"
) -> Figure:
    """A quantity against density on logarithmic axes, a line a mapping (or whatever ``line`` names), points by seed."""
    figure, ax = plt.subplots(figsize=(6.4, 4.2))
    names = list(dict.fromkeys(tolerated[line]))
    palette = _palette(names)
    for name in names:
        part = tolerated[tolerated[line] == name]
        mean = part.groupby("density")[y].agg(lambda v: np.exp(np.log(v).mean()))
        ax.plot(mean.index, mean, marker="o", color=palette[name], label=name)
        ax.plot(part["density"], part[y], ".", color=palette[name], ms=4, alpha=0.5)
    ticks = sorted(set(tolerated["density"].round(3)))
    ax.set(xscale="log", yscale="log", xlabel="density: weights kept / weights", ylabel=ylabel)
    ax.set_xticks(ticks, [f"{t:.3g}" for t in ticks], fontsize="small")
    ax.minorticks_off()
    ax.invert_xaxis()
    legend_beside(figure, ax)
    return figure


def gain_bars(gains: pd.DataFrame, *, label: str, goals: Mapping[str, float]) -> Figure:
    """Horizontal bars of a column ``gain`` on a logarithmic axis, in the order of the rows; goals as dashed lines."""
    names = list(dict.fromkeys(gains[label]))
    groups = gains.groupby(label)["gain"]
    mean = groups.agg(lambda v: np.exp(np.log(v).mean())).reindex(names)
    ends = [mean - groups.min().reindex(names), groups.max().reindex(names) - mean]
    figure, ax = plt.subplots(figsize=(8, 0.36 * len(names) + 1))
    ax.barh(names, mean, color=BLUE)
    ax.errorbar(mean, names, xerr=np.clip(ends, 0, None), color="0.25", lw=0.9, ls="")
    for text, value in goals.items():
        ax.axvline(value, color=GREY, ls="--", lw=1.2)
        ax.annotate(text, (value, 1), xycoords=("data", "axes fraction"), fontsize="small", ha="center", va="bottom")
    ax.set(xscale="log", xlabel="tolerated share of broken cells / that of dense two-column")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    figure.tight_layout()
    return figure


def error_against_weight(curves: pd.DataFrame, points: pd.DataFrame) -> Figure:
    """Mean squared and mean error of a weight against its value: closed form as lines, broken cells as points.

    Args:
        curves, points: columns ``mapping``, ``weight``, ``mean_square``, ``mean``.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8))
    for ax, column, label in zip(axes, ("mean_square", "mean"), ("mean squared error", "mean error"), strict=True):
        for name, part in curves.groupby("mapping", sort=False):
            ax.plot(part["weight"], part[column], color=SCHEME_COLOURS[name], label=name)
        for name, part in points.groupby("mapping", sort=False):
            ax.plot(part["weight"], part[column], "o", color=SCHEME_COLOURS[name], ms=4)
        ax.set(
            xlabel="weight / range of its layer", ylabel=f"{label} / range" + ("²" if column == "mean_square" else "")
        )
    axes[1].axhline(0, color=GREY, lw=1)
    legend_beside(figure, axes[1])
    return figure


def broken_layer(weight: Tensor, read: Mapping[str, Tensor], rows: int = 60, columns: int = 120) -> Figure:
    """A corner of one layer's matrix as written and as read back from a broken chip, and the errors between them."""
    corner = lambda w: w.detach().flatten(1)[:rows, :columns].cpu().numpy()  # noqa: E731
    limit = float(weight.abs().max())
    figure, axes = plt.subplots(len(read), 2, figsize=(11, 2.5 * len(read)), squeeze=False)
    for pair, (name, broken) in zip(axes, read.items(), strict=True):
        for ax, shown, title in (
            (pair[0], corner(broken), f"{name}: read back"),
            (pair[1], corner(broken) - corner(weight), f"{name}: error"),
        ):
            image = ax.imshow(shown, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            ax.set_title(title, fontsize="small")
            ax.set(xticks=[], yticks=[])
        figure.colorbar(image, ax=list(pair), fraction=0.02, pad=0.01)
    return figure
