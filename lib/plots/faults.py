"""Figures about faulty cells: what they do to weights, to accuracy, and to the rate that a network tolerates."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from lib.plots.style import BLUE, GREY, OWN_LOOK, band, legend_beside, looks

SCHEME_COLOURS = {scheme: OWN_LOOK[scheme][0] for scheme in ("offset", "two_column", "differential")}


def _palette(names: Sequence[str]) -> dict[str, tuple]:
    return {name: colour for name, (colour, _) in looks([*SCHEME_COLOURS, *names]).items()}


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

    >>> import pandas as pd
    >>> from lib.plots import accuracy_against_faults
    >>> chips = {"network": ["dense", "pruned"], "mapping": "offset", "rate": 0.01, "accuracy_percent": [88.0, 85.0]}
    >>> figure = accuracy_against_faults(pd.DataFrame(chips), panels=["dense", "pruned"], dense=90.0)
    >>> [ax.get_title() for ax in figure.axes], [text.get_text() for text in figure.legends[0].get_texts()]
    (['dense', 'pruned'], ['offset'])
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

    >>> import pandas as pd
    >>> from lib.plots import tolerated_bars
    >>> rates = {"tolerated_rate": [0.01, 0.04], "low": [0.008, 0.03], "high": [0.012, 0.05], "bound": ["", ">"]}
    >>> rows = pd.DataFrame({"network": "dense", "mapping": ["offset", "differential"], "drop": 1.0, "seed": 0} | rates)
    >>> shown = {"networks": ["dense"], "mappings": ["offset", "differential"], "reference": ("dense", "offset")}
    >>> [times.get_text() for times in tolerated_bars(rows, drops=[1.0], **shown).axes[0].texts]
    ['1x', '>4x']
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
    """A quantity against density on logarithmic axes, a line a mapping (or whatever ``line`` names), points by seed.

    >>> import pandas as pd
    >>> from lib.plots import tolerated_against_density
    >>> seeds = pd.DataFrame({"mapping": "offset", "density": [1.0, 0.2, 0.2], "tolerated_rate": [0.03, 0.02, 0.005]})
    >>> figure = tolerated_against_density(seeds, line="mapping")
    >>> figure.axes[0].lines[0].get_ydata().round(3).tolist()  # by rising density; geometric means over seeds
    [0.01, 0.03]
    """
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
    """Horizontal bars of a column ``gain`` on a logarithmic axis, in the order of the rows; goals as dashed lines.

    >>> import pandas as pd
    >>> from lib.plots import gain_bars
    >>> gains = pd.DataFrame({"network": ["hardened", "hardened", "pruned"], "gain": [10.0, 40.0, 0.9]})
    >>> figure = gain_bars(gains, label="network", goals={"published": 10.0})
    >>> [round(float(bar.get_width()), 3) for bar in figure.axes[0].patches]  # the geometric mean of 10 and 40; 0.9
    [20.0, 0.9]
    """
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

    >>> import pandas as pd
    >>> from lib.plots import error_against_weight
    >>> errors = pd.DataFrame({"mapping": "offset", "weight": [-1.0, 1.0], "mean_square": 0.2, "mean": [0.1, -0.1]})
    >>> [ax.get_ylabel() for ax in error_against_weight(errors, points=errors).axes]
    ['mean squared error / range²', 'mean error / range']
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
    """A corner of one layer's matrix as written and as read back from a broken chip, and the errors between them.

    >>> from lib.plots import broken_layer
    >>> figure = broken_layer(torch.eye(4), {"offset": torch.ones(4, 4)})
    >>> [ax.get_title() for ax in figure.axes[:2]]  # the third is the scale of colours
    ['offset: read back', 'offset: error']
    >>> figure.axes[1].images[0].get_array().sum().item()  # 12 of 16 weights read 1 for 0
    12.0
    """
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
