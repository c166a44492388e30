"""Figures about the shape of sparsity: what a structure looks like, what it costs and what it buys."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from lib.plots.style import BLUE, GREY, band, legend_beside, looks


def rate_axis(ax: Axes, rates: Sequence[float], label: str = "rate: weights / kept") -> None:
    """A logarithmic axis with a tick at each round rate inside the data.

    >>> import matplotlib.pyplot as plt
    >>> from lib.plots.structures import rate_axis
    >>> rate_axis(plt.figure().add_subplot(), [2, 3.9, 8])
    >>> [tick.get_text() for tick in plt.gca().get_xticklabels()]
    ['2', '3', '4', '6', '8']
    """
    ticks = [
        t for t in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128) if min(rates) <= t * 1.01 and t <= max(rates) * 1.2
    ]
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel(label)


def plain_log_axis(ax: Axes) -> None:
    """A logarithmic vertical axis with ticks at 1, 2 and 5, written as plain numbers.

    >>> import matplotlib.pyplot as plt
    >>> from lib.plots.structures import plain_log_axis
    >>> plain_log_axis(ax := plt.figure().add_subplot(ylim=(1, 20)))
    >>> [tick.get_text() for tick in ax.get_yticklabels() if 1 <= tick.get_position()[1] <= 20]
    ['1', '2', '5', '10', '20']
    """
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def structure_gallery(weight: Tensor, masks: Mapping[str, Tensor], columns: int = 4) -> Figure:
    """One GEMM matrix ``(F, C*Kh*Kw)`` under every mask: dark is a large kept weight, white is removed.

    >>> from lib.plots import structure_gallery
    >>> masks = {"diagonal": torch.eye(4), "triangle": torch.ones(4, 4).tril()}
    >>> figure = structure_gallery(torch.ones(4, 4), masks, columns=2)
    >>> [ax.get_title() for ax in figure.axes]
    ['diagonal, 4x', 'triangle, 1.6x']
    """
    matrix = weight.detach().cpu().flatten(1).abs()
    shade = (matrix / matrix.quantile(0.98)).clamp(max=1) * 0.75 + 0.25
    rows = -(-len(masks) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 1.35 * rows), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (name, mask) in zip(axes.flat, masks.items(), strict=False):
        kept = mask.cpu().flatten(1)
        ax.imshow(np.where(kept, shade, 0), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        ax.add_patch(plt.Rectangle((0, 0), 1, 1, transform=ax.transAxes, fill=False, ec="0.7", lw=0.8))
        ax.set_title(f"{name}, {mask.numel() / int(mask.sum()):.2g}x", fontsize="small", fontweight="normal", pad=3)
    figure.tight_layout()
    return figure


def accuracy_by_structure(
    results: pd.DataFrame,
    families: Mapping[str, Sequence[str]],
    *,
    dense: Mapping[str, float],
    x: str = "rate",
    xlabel: str = "rate: weights / kept",
    reference: str = "unstructured",
    reach: float = 8.0,
) -> Figure:
    """Test accuracy against ``x``, a panel for every family of structures, ``reference`` in grey in all of them.

    Args:
        results: columns ``structure``, ``nominal_rate``, ``accuracy_percent`` and ``x``, a row per run. Runs of one
            structure and nominal rate are drawn at their mean ``x``, with the range of their accuracies as a bar.
        dense: baselines, label to accuracy in percent.
        reach: how many points below the best baseline the axis goes at most; a line may leave it.

    >>> import pandas as pd
    >>> from lib.plots import accuracy_by_structure
    >>> runs = {"structure": ["unstructured", "filter", "block"], "nominal_rate": 4, "rate": [4.0, 4.1, 3.9]}
    >>> families = {"lines": ["filter"], "tiles": ["block"]}
    >>> figure = accuracy_by_structure(pd.DataFrame(runs | {"accuracy_percent": [90, 86, 88]}), families, dense={})
    >>> {ax.get_title(): [text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes}
    {'lines': ['unstructured', 'filter'], 'tiles': ['unstructured', 'block']}
    """
    figure, axes = plt.subplots(1, len(families), figsize=(4.6 * len(families), 4), sharey=True, squeeze=False)
    for ax, (family, names) in zip(axes[0], families.items(), strict=True):
        for (label, accuracy), dash in zip(dense.items(), ("--", ":"), strict=False):
            ax.axhline(accuracy, color=GREY, ls=dash, lw=1.2)
            if ax is axes[0][0]:
                ax.annotate(
                    label, (0.02, accuracy), xycoords=("axes fraction", "data"), fontsize="x-small", va="bottom"
                )
        for name, look in looks([reference, *(n for n in names if n != reference)]).items():
            _line(ax, results[results["structure"] == name], x, name, *look)
        ax.set_title(family)
        rate_axis(ax, results[x], xlabel)
        ax.legend(fontsize="x-small", loc="lower left")
    top = max([*dense.values(), results["accuracy_percent"].max()])
    axes[0][0].set(ylabel="test accuracy (%)", ylim=(max(axes[0][0].get_ylim()[0], top - reach), top + 0.5))
    figure.tight_layout()
    return figure


def _line(ax: Axes, runs: pd.DataFrame, x: str, label: str, colour: str | tuple, marker: str) -> None:
    """Means over seeds, joined; bars from the worst seed to the best."""
    if runs.empty:
        return
    groups = runs.groupby("nominal_rate")
    accuracy = groups["accuracy_percent"]
    spread = [(accuracy.mean() - accuracy.min()).clip(0), (accuracy.max() - accuracy.mean()).clip(0)]  # rounding
    place = groups[x].mean()
    ax.errorbar(place, accuracy.mean(), spread, color=colour, marker=marker, ms=5, lw=1.4, elinewidth=0.8, label=label)


def storage_against_rate(results: pd.DataFrame, structures: Sequence[str], bit_widths: Sequence[int]) -> Figure:
    """Kilobytes of the whole network against rate, a panel per weight width: with index solid, data alone dashed.

    >>> import pandas as pd
    >>> from lib.plots import storage_against_rate
    >>> kilobytes = {"total_kilobyte_8bit": [60.0, 20.0], "data_kilobyte_8bit": [40.0, 12.0]}
    >>> runs = pd.DataFrame({"structure": "unstructured", "nominal_rate": [2, 8], "rate": [2.0, 8.0]} | kilobytes)
    >>> figure = storage_against_rate(runs, ["unstructured"], bit_widths=[8])
    >>> figure.axes[0].get_title(), [line.get_ydata().tolist() for line in figure.axes[0].lines]
    ('8-bit weights', [[60.0, 20.0], [40.0, 12.0]])
    """
    figure, axes = plt.subplots(1, len(bit_widths), figsize=(3.6 * len(bit_widths), 3.8), squeeze=False)
    for ax, bits in zip(axes[0], bit_widths, strict=True):
        for name, (colour, _) in looks(structures).items():
            mean = results[results["structure"] == name].groupby("nominal_rate").mean(numeric_only=True)
            ax.plot(mean["rate"], mean[f"total_kilobyte_{bits}bit"], color=colour, marker=".", label=name)
            ax.plot(mean["rate"], mean[f"data_kilobyte_{bits}bit"], color=colour, ls="--", lw=1)
        rate_axis(ax, results.loc[results["structure"].isin(structures), "rate"])
        ax.set_title(f"{bits}-bit weights")
        plain_log_axis(ax)
    axes[0][0].set_ylabel("storage of the network (kB)")
    legend_beside(figure, axes[0][-1])
    return figure


def matched_compression(matched: pd.DataFrame, order: Sequence[str], bit_widths: Sequence[int], title: str) -> Figure:
    """Bars of compression at matched accuracy by structure, one colour per weight width, from lowest to highest seed.

    Args:
        matched: columns ``structure``, ``bits``, ``seed``, ``compression`` (dense bits over all stored bits).

    >>> import pandas as pd
    >>> from lib.plots import matched_compression
    >>> best = {"structure": "filter", "bits": [8, 8, 2], "seed": [0, 1, 0], "compression": [10.0, 14.0, 20.0]}
    >>> figure = matched_compression(pd.DataFrame(best), ["filter"], [8, 2], "Within a point of accuracy")
    >>> [float(bar.get_height()) for bar in figure.axes[0].patches]  # a bar for each width, the mean over seeds
    [12.0, 20.0]
    """
    figure, ax = plt.subplots(figsize=(11, 4))
    for i, (bits, colour) in enumerate(zip(bit_widths, sns.color_palette("viridis", len(bit_widths)), strict=True)):
        part = matched[matched["bits"] == bits].groupby("structure")["compression"]
        mean, low, high = (part.agg(f).reindex(order) for f in ("mean", "min", "max"))
        place = np.arange(len(order)) + (i - (len(bit_widths) - 1) / 2) * 0.8 / len(bit_widths)
        ax.bar(place, mean, 0.78 / len(bit_widths), color=colour, label=f"{bits} bits")
        ax.errorbar(place, mean, [(mean - low).clip(0), (high - mean).clip(0)], color="0.2", lw=0.8, ls="")
    ax.set_xticks(range(len(order)), [n.replace(" ", "\n", 1) for n in order], fontsize="x-small")
    ax.axhline(1, color=GREY, lw=1)
    ax.set(title=title, ylabel="dense bits / stored bits")
    ax.grid(axis="x", visible=False)
    ax.legend(title="weight width", fontsize="x-small", title_fontsize="x-small")
    figure.tight_layout()
    return figure


def speedup_against_rate(times: pd.DataFrame, layers: Mapping[str, str]) -> Figure:
    """Speed-up of one layer's product over the dense one against rate, a panel per layer, a line per structure.

    Args:
        times: `lib.costs.compute.product_times` with a column ``layer``. layers: their names to panel titles.

    >>> import pandas as pd
    >>> from lib.plots import speedup_against_rate
    >>> times = {"layer": "fc1", "structure": "csr", "density": [0.5, 0.1], "rate": [2.0, 10.0], "speedup": [0.4, 3.0]}
    >>> figure = speedup_against_rate(pd.DataFrame(times), {"fc1": "fully connected"})
    >>> figure.axes[0].get_title(), figure.axes[0].lines[1].get_ydata().tolist()  # the first is the dense product's
    ('fully connected', [0.4, 3.0])
    """
    figure, axes = plt.subplots(1, len(layers), figsize=(4.2 * len(layers), 3.8), sharey=True, squeeze=False)
    drawn = looks(times["structure"])
    for ax, (layer, title) in zip(axes[0], layers.items(), strict=True):
        ax.axhline(1, color=GREY, lw=1.2, ls="--")
        for structure, part in times[times["layer"] == layer].groupby("structure", sort=False):
            mean = part.groupby("density")[["rate", "speedup"]].mean().sort_values("rate")
            colour, marker = drawn[structure]
            ax.plot(mean["rate"], mean["speedup"], color=colour, marker=marker, ms=4, label=structure)
        ax.set_title(title)
        rate_axis(ax, times["rate"])
        plain_log_axis(ax)
    axes[0][0].set_ylabel("time of dense / time of sparse")
    legend_beside(figure, axes[0][-1])
    return figure


def accuracy_against_choice(panels: Mapping[str, pd.DataFrame], *, dense: float) -> Figure:
    """Accuracy for the values of one choice each, a panel a choice: pattern counts, block heights, ...

    Args:
        panels: title to runs with columns ``choice`` (in the order to draw) and ``accuracy_percent``.

    >>> import pandas as pd
    >>> from lib.plots import accuracy_against_choice
    >>> runs = pd.DataFrame({"choice": ["8", "1", "8"], "accuracy_percent": [88.0, 84.0, 90.0]})
    >>> figure = accuracy_against_choice({"patterns": runs}, dense=91.0)
    >>> [tick.get_text() for tick in figure.axes[0].get_xticklabels()], figure.axes[0].lines[0].get_ydata().tolist()
    (['8', '1'], [89.0, 84.0])
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    for ax, (title, runs) in zip(axes[0], panels.items(), strict=True):
        order = list(dict.fromkeys(runs["choice"]))
        part = runs.assign(place=runs["choice"].map(order.index))
        band(ax, part, "place", "accuracy_percent", "", color=BLUE, marker="o", legend=False)
        ax.axhline(dense, color=GREY, ls="--", lw=1.2)
        ax.set_xticks(range(len(order)), order, fontsize="small")
        ax.set(title=title, xlabel="", ylabel="test accuracy (%)")
    figure.tight_layout()
    return figure
