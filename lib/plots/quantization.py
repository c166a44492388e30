"""Figures about number formats: what bits cost, what sets do to weights, and what retraining is worth."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from lib.plots.structures import MARKERS
from lib.plots.style import BLUE, GREY, ORANGE, band, legend_beside

PALETTE = [*sns.color_palette("deep", 10), *sns.color_palette("dark", 10)]


def _log(ax: Axes, label: str, subs: tuple[int, ...] = (1, 2, 5)) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(label)


def _means(ax: Axes, runs: pd.DataFrame, by: str, x: str, label: str, colour, marker: str, **style) -> None:
    """Means over seeds, joined along the settings, with bars from the best network to the worst."""
    groups = runs.groupby(by)
    place, lost = groups[x].mean().sort_values(), groups["drop"]
    mean, low, high = (f().reindex(place.index) for f in (lost.mean, lost.min, lost.max))
    style = {"color": colour, "marker": marker, "ms": 6, "lw": 1.2, "elinewidth": 0.8, "label": label} | style
    ax.errorbar(place, mean, [(mean - low).clip(0), (high - mean).clip(0)], **style)


def _lost(ax: Axes, shown: pd.Series, most: float) -> None:
    ax.axhline(0, color=GREY, ls="--", lw=1.2)
    ax.set_ylim(min(most, shown.max() + 0.3), min(-0.3, shown.min() - 0.3))  # better is higher
    ax.set_ylabel("points of accuracy lost")


def lost_against_bits(results: pd.DataFrame, most: float = 12.0) -> Figure:
    """Accuracy lost against bits for each weight, a panel for each network, a line for each kind of set.

    Args:
        results: columns ``model``, ``arm``, ``setting``, ``bits_per_weight``, ``drop`` (points); a row per network.
        most: points lost at which the axis ends; a line may leave it.
    """
    names, arms = (list(dict.fromkeys(results[c])) for c in ("model", "arm"))
    figure, axes = plt.subplots(1, len(names), figsize=(5.8 * len(names), 4.4), squeeze=False, sharey=True)
    for i, (ax, name) in enumerate(zip(axes[0], names, strict=True)):
        for arm, colour, marker in zip(arms, PALETTE, MARKERS * 3, strict=False):
            part = results[(results["model"] == name) & (results["arm"] == arm)]
            if len(part):
                _means(ax, part, "setting", "bits_per_weight", arm, colour, marker)
            elif not i:  # in the legend all the same
                ax.plot([], [], color=colour, marker=marker, label=arm)
        _log(ax, "bits for each weight, everything counted", (1, 1.5, 2, 3, 4, 6, 8))
        ax.set_title(name)
        _lost(ax, results["drop"], most)
    legend_beside(figure, axes[0][0])
    return figure


def weight_histograms(weights: Mapping[str, Tensor]) -> Figure:
    """A panel for each set: the layer's weights in shares of the largest, zeros told apart."""
    columns = 4
    rows = -(-len(weights) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11.5, 1.9 * rows), squeeze=False, sharex=True, sharey=True)
    for ax, (name, weight) in zip(axes.flat, weights.items(), strict=False):
        w = (weight / weight.abs().max()).reshape(-1).cpu()
        ax.hist(w[w != 0].numpy(), np.linspace(-1.02, 1.02, 103), color=BLUE)
        ax.set_title(f"{name}\nzeros: {float((w == 0).float().mean()):.0%}", fontsize="small")
        ax.set_yscale("log")
    for ax in axes.flat[len(weights) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("weights")
    figure.tight_layout()
    return figure


def clipping(logs: pd.DataFrame) -> Figure:
    """Ternary scale and threshold and the tiles that are left, along training under the penalty.

    Args:
        logs: columns ``epoch``, ``scale``, ``threshold`` and ``tiles`` (shares of the start), ``penalty``, ``seed``.
    """
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.4))
    for ax, column, label in zip(
        axes, ("scale", "threshold", "tiles"), ("scale a", "threshold", "tiles left"), strict=True
    ):
        for kind, colour in zip(("plain", "clipped"), (ORANGE, BLUE), strict=True):
            band(ax, logs[logs["penalty"] == kind], "epoch", column, kind, color=colour, marker="o")
        ax.set(xlabel="epoch", ylabel=f"{label}, share of the start", ylim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.get_legend().remove()
    legend_beside(figure, axes[0])
    return figure


def unified_against_pruned(blocks: pd.DataFrame, most: float = 20.0) -> Figure:
    """Accuracy lost against the share of blocks: unified (solid), pruned (dashed) or half of each, a colour a block.

    Args:
        blocks: columns ``kind`` (``one magnitude``, ``half of each`` or ``pruned``), ``block``, ``setting`` (share),
            ``drop``.
    """
    figure, ax = plt.subplots(figsize=(6.6, 4))
    sizes = list(dict.fromkeys(blocks["block"]))
    for block, colour, marker in zip(sizes, PALETTE, MARKERS, strict=False):
        for kind, style in (("one magnitude", "-"), ("half of each", ":"), ("pruned", "--")):
            part = blocks[(blocks["block"] == block) & (blocks["kind"] == kind)]
            _means(ax, part, "setting", "setting", f"{block}, {kind}", colour, marker, ls=style)
    ax.set_xlabel("share of the blocks")
    _lost(ax, blocks["drop"], most)
    legend_beside(figure, ax)
    return figure


def with_and_without_retraining(factors: pd.DataFrame, most: float = 20.0) -> Figure:
    """Accuracy lost against compression, for one decomposition and by turns with training.

    Args:
        factors: columns ``arm``, ``setting`` (threshold), ``rate`` (32 bits over bits stored), ``drop`` (points).
    """
    figure, ax = plt.subplots(figsize=(6.4, 3.8))
    arms = list(dict.fromkeys(factors["arm"]))
    for arm, colour, marker in zip(arms, (ORANGE, BLUE), MARKERS, strict=False):
        _means(ax, factors[factors["arm"] == arm], "setting", "rate", arm, colour, marker)
    ax.set_xlabel("compression: 32 bits / bits for each weight")
    _lost(ax, factors["drop"], most)
    legend_beside(figure, ax)
    return figure
