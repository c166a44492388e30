"""Figures about number formats: what bits cost, what sets do to weights, and what retraining is worth."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lib.plots.style import BLUE, MARKERS, ORANGE, band, legend_beside, log_ticks, looks, lost_axis, lost_line


def lost_against_bits(results: pd.DataFrame, most: float | None = None) -> Figure:
    """Accuracy lost against bits for each weight, a panel for each network, a line for each kind of set.

    Args:
        results: columns ``model``, ``arm``, ``setting``, ``bits_per_weight``, ``drop`` (points); a row per network.
        most: points lost at which the axis ends; a line may leave it. None: where 19 of 20 networks are above.

    >>> import pandas as pd
    >>> from lib.plots import lost_against_bits
    >>> cost = {"setting": 0, "bits_per_weight": [1.6, 1.0], "drop": [0.3, 4.0]}
    >>> figure = lost_against_bits(pd.DataFrame({"model": ["lenet5", "resnet8"], "arm": ["ternary", "binary"]} | cost))
    >>> [ax.get_title() for ax in figure.axes], sorted(text.get_text() for text in figure.legends[0].get_texts())
    (['lenet5', 'resnet8'], ['binary', 'ternary'])
    """
    names, arms = (list(dict.fromkeys(results[c])) for c in ("model", "arm"))
    figure, axes = plt.subplots(1, len(names), figsize=(5.8 * len(names), 5.0), squeeze=False, sharey=True)
    most = most or results["drop"].quantile(0.95) + 0.3
    for i, (ax, name) in enumerate(zip(axes[0], names, strict=True)):
        for arm, (colour, marker) in looks(arms).items():
            part = results[(results["model"] == name) & (results["arm"] == arm)]
            if len(part):
                lost_line(ax, part, "setting", "bits_per_weight", arm, colour, marker)
            elif not i:  # in the legend all the same
                ax.plot([], [], color=colour, marker=marker, label=arm)
        ax.set(xscale="log", xlabel="bits for each weight, everything counted")
        log_ticks(ax.xaxis, (1, 1.5, 2, 3, 4, 6, 8))
        ax.set_title(name)
        lost_axis(ax, results, most)
    legend_beside(figure, axes[0][0])
    return figure


def weight_histograms(weights: Mapping[str, Tensor]) -> Figure:
    """A panel for each set: the layer's weights in shares of the largest, zeros told apart.

    >>> from lib.plots import weight_histograms
    >>> figure = weight_histograms({"dense": torch.tensor([0.1, -0.4]), "ternary": torch.tensor([0.0, 0.0, 0.0, -2.0])})
    >>> [ax.get_title().splitlines() for ax in figure.axes if ax.get_visible()]
    [['dense', 'zeros: 0%'], ['ternary', 'zeros: 75%']]
    """
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

    >>> import pandas as pd
    >>> from lib.plots import clipping
    >>> shares = {"scale": [0.9, 0.6], "threshold": [0.8, 0.5], "tiles": [1.0, 0.4]}
    >>> figure = clipping(pd.DataFrame({"penalty": ["plain", "clipped"], "epoch": 1, "seed": 0} | shares))
    >>> len(figure.axes), figure.axes[2].get_ylabel(), [text.get_text() for text in figure.legends[0].get_texts()]
    (3, 'tiles left, share of the start', ['plain', 'clipped'])
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

    >>> import pandas as pd
    >>> from lib.plots import unified_against_pruned
    >>> kinds = {"kind": ["one magnitude", "half of each", "pruned"], "drop": [1.0, 3.0, 5.0]}
    >>> figure = unified_against_pruned(pd.DataFrame({"block": "1x4", "setting": 0.9} | kinds))
    >>> [text.get_text() for text in figure.legends[0].get_texts()], figure.axes[0].get_xlabel()
    (['1x4, one magnitude', '1x4, half of each', '1x4, pruned'], 'share of the blocks')
    """
    figure, ax = plt.subplots(figsize=(6.6, 4))
    sizes = list(dict.fromkeys(blocks["block"]))
    for block, (colour, marker) in looks(sizes).items():
        for kind, style in (("one magnitude", "-"), ("half of each", ":"), ("pruned", "--")):
            part = blocks[(blocks["block"] == block) & (blocks["kind"] == kind)]
            lost_line(ax, part, "setting", "setting", f"{block}, {kind}", colour, marker, ls=style)
    ax.set_xlabel("share of the blocks")
    lost_axis(ax, blocks, most)
    legend_beside(figure, ax)
    return figure


def with_and_without_retraining(factors: pd.DataFrame, most: float = 20.0) -> Figure:
    """Accuracy lost against compression, for one decomposition and by turns with training.

    Args:
        factors: columns ``arm``, ``setting`` (threshold), ``rate`` (32 bits over bits stored), ``drop`` (points).

    >>> import pandas as pd
    >>> from lib.plots import with_and_without_retraining
    >>> factors = {"arm": ["once", "by turns"], "setting": 0.3, "rate": [12.0, 11.0], "drop": [8.0, 1.0]}
    >>> figure = with_and_without_retraining(pd.DataFrame(factors))
    >>> [text.get_text() for text in figure.legends[0].get_texts()], figure.axes[0].get_ylabel()
    (['once', 'by turns'], 'points of accuracy lost')
    """
    figure, ax = plt.subplots(figsize=(6.4, 3.8))
    arms = list(dict.fromkeys(factors["arm"]))
    for arm, colour, marker in zip(arms, (ORANGE, BLUE), MARKERS, strict=False):
        lost_line(ax, factors[factors["arm"] == arm], "setting", "rate", arm, colour, marker)
    ax.set_xlabel("compression: 32 bits / bits for each weight")
    lost_axis(ax, factors, most)
    legend_beside(figure, ax)
    return figure
