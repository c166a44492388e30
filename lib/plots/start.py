"""The figure of the first notebook: sets of weights compared in what they keep and what they cost."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lib.plots.structures import plain_log_axis, rate_axis
from lib.plots.style import GREY, band, legend_beside, looks


def comparison(results: pd.DataFrame, structures: Sequence[str], own: str) -> Figure:
    """Accuracy, tolerated broken cells and energy against rate, a line for each structure; the dense network dashed.

    Args:
        results: columns ``structure`` (``dense`` among them), ``rate``, ``accuracy_percent``, ``tolerated_percent``,
            ``energy_nJ``; a row per network.
        structures: the lines, in this order. own: the one drawn thick.

    >>> import pandas as pd
    >>> from lib.plots import comparison
    >>> goals = {"accuracy_percent": [90, 89, 88], "tolerated_percent": [1.5, 0.8, 0.3], "energy_nJ": [900, 900, 300]}
    >>> results = pd.DataFrame({"structure": ["dense", "unstructured", "mine"], "rate": [1, 4, 4]} | goals)
    >>> figure = comparison(results, ["unstructured", "mine"], own="mine")
    >>> len(figure.axes), figure.axes[2].get_ylabel(), [text.get_text() for text in figure.legends[0].get_texts()]
    (3, 'energy of an image (uJ)', ['dense, as long', 'unstructured', 'mine'])
    """
    results = results.assign(energy_uJ=results["energy_nJ"] / 1000)
    panels = {
        "accuracy_percent": "test accuracy (%)",
        "tolerated_percent": "tolerated broken cells (%)",
        "energy_uJ": "energy of an image (uJ)",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.7))
    for ax, (column, label) in zip(axes, panels.items(), strict=True):
        dense = results.loc[results["structure"] == "dense", column].mean()
        ax.axhline(dense, color=GREY, ls="--", lw=1.2, label="dense, as long")
        for name, (colour, marker) in looks(structures).items():
            part = results[results["structure"] == name]
            style = {"lw": 2.6, "ms": 8, "zorder": 3} if name == own else {"lw": 1.4, "ms": 6}
            band(ax, part, "rate", column, name, color=colour, marker=marker, legend=False, **style)
        rate_axis(ax, results.loc[results["structure"].isin(structures), "rate"])
        ax.set_ylabel(label)
    plain_log_axis(axes[1])
    axes[2].set_ylim(0, None)
    legend_beside(figure, axes[0])
    return figure
