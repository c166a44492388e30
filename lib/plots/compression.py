"""Figures about extreme compression: what it costs, where weights survive, and what their storage is made of."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.plots.style import GREY, MARKERS, PALETTE, legend_beside, log_ticks, looks, lost_axis, lost_line


def _log_axis(ax: Axes, label: str) -> None:
    ax.set_xscale("log")
    ax.set_xlabel(label)
    log_ticks(ax.xaxis)


def drop_against(
    results: pd.DataFrame,
    arms: Sequence[str],
    *,
    x: str,
    xlabel: str,
    marks: Mapping[float, tuple[float, str]],
    of: str,
    most: float = 5.0,
) -> Figure:
    """Accuracy lost against a rate or compression, a panel for each data set, a line for each arm.

    Args:
        results: columns ``dataset``, ``arm``, ``nominal`` (the step), ``drop`` (points) and ``x``; a row per network.
        marks: published rates with the points lost and a label, drawn as crosses in the panel of the data set ``of``.
        most: points lost at which the axis ends; a line may leave it.

    >>> import pandas as pd
    >>> from lib.plots import drop_against
    >>> networks = {"dataset": "mnist", "arm": ["ADMM", "one-shot"], "nominal": 10, "rate": 10.1, "drop": [0.1, 0.8]}
    >>> marks = {8.0: (0.2, "Han"), 500.0: (0.0, "ours")}  # of these the ones within reach are drawn
    >>> shown = {"x": "rate", "xlabel": "rate", "marks": marks, "of": "mnist"}
    >>> figure = drop_against(pd.DataFrame(networks), ["ADMM", "one-shot"], **shown)
    >>> sorted(text.get_text() for text in figure.legends[0].get_texts()), [t.get_text() for t in figure.axes[0].texts]
    (['ADMM', 'one-shot', 'published'], ['Han'])
    """
    shown = results[results["arm"].isin(arms)]
    names = list(dict.fromkeys(shown["dataset"]))
    figure, axes = plt.subplots(1, len(names), figsize=(5.4 * len(names), 4.2), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        panel = shown[shown["dataset"] == name]
        for arm, (colour, marker) in looks(arms).items():
            part = panel[panel["arm"] == arm]
            if len(part):
                lost_line(ax, part, "nominal", x, arm, colour, marker)
        _log_axis(ax, xlabel)
        label = "published"
        for rate, (lost, text) in marks.items() if name == of else ():
            if rate <= 1.5 * panel[x].max():
                ax.plot(rate, lost, "kx", ms=7, mew=1.5, label=label, ls="")
                ax.annotate(text, (rate, lost), (0, 6), textcoords="offset points", fontsize="x-small", ha="center")
                label = None
        ax.set_title(name)
        lost_axis(ax, panel, most)
    legend_beside(figure, axes[0][0])
    return figure


def drop_against_compression(
    results: pd.DataFrame, arms: Sequence[str], *, marks: Mapping[float, str], of: str, most: float = 5.0
) -> Figure:
    """Accuracy lost against compression in data only (solid) and with index (dashed), a panel for each data set.

    Args:
        results: columns ``dataset``, ``arm``, ``nominal`` (the step), ``drop`` (points), ``data_only``, ``with_index``.
        marks: compressions in data only and their labels, dotted in the panel of the data set ``of``.
        most: points lost at which the axis ends.

    >>> import pandas as pd
    >>> from lib.plots import drop_against_compression
    >>> bits = {"nominal": [10, 40], "data_only": [40.0, 150.0], "with_index": [25.0, 80.0], "drop": [0.1, 0.9]}
    >>> networks = pd.DataFrame({"dataset": "mnist", "arm": "ADMM"} | bits)
    >>> figure = drop_against_compression(networks, ["ADMM"], marks={100: "100x"}, of="mnist")
    >>> [text.get_text() for text in figure.legends[0].get_texts()]
    ['ADMM, data only', 'ADMM, with index']
    """
    shown = results[results["arm"].isin(arms)]
    names = list(dict.fromkeys(shown["dataset"]))
    figure, axes = plt.subplots(1, len(names), figsize=(5.4 * len(names), 4.2), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        panel = shown[shown["dataset"] == name]
        for arm, (colour, marker) in looks(arms).items():
            part = panel[panel["arm"] == arm]
            lost_line(ax, part, "nominal", "data_only", f"{arm}, data only", colour, marker)
            lost_line(ax, part, "nominal", "with_index", f"{arm}, with index", colour, marker, ls="--", mfc="white")
        _log_axis(ax, "compression: bits of 32-bit dense weights / bits stored")
        for value, text in marks.items() if name == of else ():
            ax.axvline(value, color=GREY, lw=1, ls=":")
            ax.annotate(text, (value, 1.01), xycoords=("data", "axes fraction"), fontsize="x-small", ha="center")
        ax.set_title(name, pad=16)
        lost_axis(ax, panel, most)
    legend_beside(figure, axes[0][0])
    return figure


def survivors(results: pd.DataFrame) -> Figure:
    """Kept weights of each layer against the rate of the network, a panel for each data set.

    Args:
        results: columns ``dataset``, ``nominal`` and ``kept/<layer>``; a row per network and step.

    >>> import pandas as pd
    >>> from lib.plots import survivors
    >>> kept = {"kept/conv1": [500, 300], "kept/fc1": [4000, 900]}
    >>> figure = survivors(pd.DataFrame({"dataset": "mnist", "nominal": [10, 40], "rate": [10.1, 40.2]} | kept))
    >>> [text.get_text() for text in figure.legends[0].get_texts()], figure.axes[0].lines[1].get_ydata().tolist()
    (['conv1', 'fc1'], [4000.0, 900.0])
    """
    layers = [c for c in results if c.startswith("kept/") and results[c].notna().any()]
    names = list(dict.fromkeys(results["dataset"]))
    figure, axes = plt.subplots(1, len(names), figsize=(6.2 * len(names), 4), squeeze=False, sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        mean = results[results["dataset"] == name].groupby("nominal")[["rate", *layers]].mean()
        for layer, colour, marker in zip(layers, cycle(PALETTE), cycle(MARKERS), strict=False):
            ax.plot(mean["rate"], mean[layer], color=colour, marker=marker, ms=5, label=layer.partition("/")[2])
        _log_axis(ax, "rate: weights / kept weights")
        ax.set(title=name, yscale="log", ylabel="weights kept")
    legend_beside(figure, axes[0][0])
    return figure


def convergence_of_steps(log: pd.DataFrame) -> Figure:
    """ADMM's distance to the set, and validation accuracy of ``W`` and of ``P_S(W)``, over all steps of a chain.

    Args:
        log: rows of `lib.recipes.admm`, with ``nominal`` (the step's rate) and ``start`` (epochs before the step).

    >>> import pandas as pd
    >>> from lib.plots import convergence_of_steps
    >>> log = {"nominal": [4, 16], "start": [0, 5], "epoch": 1, "distance": [0.5, 0.4]}
    >>> figure = convergence_of_steps(pd.DataFrame(log | {"accuracy": 0.9, "hardened_accuracy": [0.8, 0.7]}))
    >>> len(figure.axes), [text.get_text() for text in figure.legends[0].get_texts()]
    (2, ['4x, $W$', '16x, $W$', '$P_S(W)$'])
    """
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5.4), sharex=True)
    log = log.assign(at=log["start"] + log["epoch"])
    rates = sorted(log["nominal"].unique())
    for rate, colour in zip(rates, sns.color_palette("viridis", len(rates)), strict=True):
        mean = log[log["nominal"] == rate].groupby("at")[["distance", "accuracy", "hardened_accuracy"]].mean()
        above.plot(mean.index, mean["distance"], color=colour, marker=".")
        below.plot(mean.index, 100 * mean["accuracy"], color=colour, marker=".", label=f"{rate:g}x, $W$")
        below.plot(mean.index, 100 * mean["hardened_accuracy"], color=colour, marker=".", ls="--")
    above.set(ylabel="distance to the set\n$||W-Z|| / ||W||$", ylim=(0, None))
    below.set(xlabel="epochs in all", ylabel="validation accuracy (%)")
    below.plot([], [], color=GREY, ls="--", label="$P_S(W)$")
    legend_beside(figure, below)
    return figure


def storage_bars(results: pd.DataFrame) -> Figure:
    """Kilobytes by data set, arm and rate, stacked: data, index, tables.

    Args:
        results: columns ``dataset``, ``arm``, ``nominal``, ``data_bits``, ``index_bits``, ``table_bits``.

    >>> import pandas as pd
    >>> from lib.plots import storage_bars
    >>> bits = {"data_bits": [16000, 8000], "index_bits": [8000, 0], "table_bits": [0, 400]}
    >>> figure = storage_bars(pd.DataFrame({"dataset": "mnist", "arm": ["ADMM", "levels"], "nominal": 16} | bits))
    >>> [total.get_text() for total in figure.axes[0].texts], figure.axes[0].get_ylabel()
    (['3', '1.05'], 'kilobytes of weights')
    """
    parts = {"data_bits": "data", "index_bits": "index", "table_bits": "tables"}
    mean = results.groupby(["dataset", "nominal", "arm"], sort=False)[[*parts]].mean() / 8e3
    several = results["dataset"].nunique() > 1
    figure, ax = plt.subplots(figsize=(max(5.0, 0.9 * len(mean)), 3.8))
    base = np.zeros(len(mean))
    for (column, label), colour in zip(parts.items(), PALETTE, strict=False):
        ax.bar(range(len(mean)), mean[column], 0.7, base, color=colour, label=label)
        base += mean[column].to_numpy()
    for x, total in enumerate(base):
        ax.annotate(f"{total:.3g}", (x, total), (0, 2), textcoords="offset points", ha="center", fontsize="x-small")
    names = [f"{arm}\n{rate:g}x" + f"\n{data}" * several for data, rate, arm in mean.index]
    ax.set_xticks(range(len(mean)), names, fontsize="x-small")
    ax.set_ylabel("kilobytes of weights")
    ax.grid(axis="x", visible=False)
    ax.legend()
    figure.tight_layout()
    return figure
