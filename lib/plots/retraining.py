"""Figures about retraining a pruned network: tickets, rewinding, fine-tuning."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.plots.style import BLUE, GREY, RED, band, legend_beside, spread_of


def _sparsity_axis(ax: Axes, sparsities: Sequence[float]) -> None:
    """Sparsity growing to the right, spaced by the logarithm of what is kept."""
    ax.set_xscale("log")
    ax.invert_xaxis()
    ax.set_xticks([1 - s for s in sparsities], [f"{s:.0%}" for s in sparsities])
    ax.minorticks_off()
    ax.set_xlabel("sparsity of the pruned layers (log scale of density)")


def accuracy_against_sparsity(
    results: pd.DataFrame,
    *,
    line: str,
    styles: dict[str, dict],
    panel: str = "lr",
    panel_titles: dict[float, str],
    reach: float = 10.0,
) -> Figure:
    """Test accuracy against sparsity, one panel per value of ``panel``, one line per value of ``line``.

    Args:
        results: columns ``sparsity``, ``accuracy_percent``, ``mode``, and those named by ``line`` and ``panel``; rows
            whose ``mode`` begins with ``dense`` are the baselines.
        styles: the lines to draw, in order, with their matplotlib style.
        panel_titles: the panels, in order, with their titles; each has a vertical axis of its own.
        reach: how many points below the dense network the axis goes at most; a line may leave it.

    >>> import pandas as pd
    >>> from lib.plots import accuracy_against_sparsity
    >>> runs = {"lr": 0.1, "mode": ["dense", "dense, 2T", "ticket", "ticket"], "sparsity": [0, 0, 0.5, 0.9]}
    >>> looks = {"line": "mode", "styles": {"ticket": {"color": "red"}}, "panel_titles": {0.1: "lr = 0.1"}}
    >>> figure = accuracy_against_sparsity(pd.DataFrame(runs | {"accuracy_percent": [90, 91, 90, 88]}), **looks)
    >>> [text.get_text() for text in [*figure.legends[0].get_texts(), *figure.axes[0].get_xticklabels()]]
    ['dense, T', 'dense, 2T', 'ticket', '50%', '90%']
    """
    figure, axes = plt.subplots(1, len(panel_titles), figsize=(5.2 * len(panel_titles), 4), squeeze=False)
    for ax, (value, title) in zip(axes[0], panel_titles.items(), strict=True):
        part = results[results[panel] == value]
        for mode, dash in (("dense", "--"), ("dense, 2T", ":")):
            dense = part.loc[part["mode"] == mode, "accuracy_percent"]
            ax.axhline(
                dense.mean(),
                color=GREY,
                ls=dash,
                lw=1.3,
                label=mode.replace("dense", "dense, T") if "," not in mode else mode,
            )
        sparse = part[~part["mode"].str.startswith("dense")]
        for name, style in styles.items():
            band(
                ax,
                sparse[sparse[line] == name].assign(density=lambda f: 1 - f["sparsity"]),
                "density",
                "accuracy_percent",
                name,
                **style,
            )
        _sparsity_axis(ax, sorted(sparse["sparsity"].unique()))
        ax.set(title=title, ylabel="test accuracy (%)")
        ax.get_legend().remove()
        ax.set_ylim(bottom=max(ax.get_ylim()[0], part.loc[part["mode"] == "dense", "accuracy_percent"].mean() - reach))
    legend_beside(figure, axes[0][0])
    return figure


def accuracy_against_budget(
    results: pd.DataFrame, *, modes: dict[str, dict], markers: dict[str, str], panel_titles: dict[float, str]
) -> Figure:
    """Accuracy against all epochs spent, mask search included: colour is the training mode, marker the mask search.

    Args:
        results: one sparsity, plus the dense rows; columns ``lr``, ``mask``, ``mode``, ``total_epochs``,
            ``accuracy_percent``.

    >>> import pandas as pd
    >>> from lib.plots import accuracy_against_budget
    >>> runs = {"lr": 0.1, "mode": ["dense", "ticket"], "mask": ["none", "ADMM"], "total_epochs": [10, 25]}
    >>> looks = {"modes": {"ticket": {"color": "red"}}, "markers": {"ADMM": "D"}, "panel_titles": {0.1: "lr = 0.1"}}
    >>> figure = accuracy_against_budget(pd.DataFrame(runs | {"accuracy_percent": [90, 88]}), **looks)
    >>> [text.get_text() for text in figure.legends[0].get_texts()], figure.axes[0].get_xlabel()
    (['dense, T and 2T', 'ticket', 'ADMM mask'], 'epochs in total, mask search included')
    """
    figure, axes = plt.subplots(1, len(panel_titles), figsize=(5.2 * len(panel_titles), 4), sharey=True, squeeze=False)
    for ax, (lr, title) in zip(axes[0], panel_titles.items(), strict=True):
        part = results[results["lr"] == lr]
        dense = part[part["mode"].str.startswith("dense")].groupby("total_epochs")["accuracy_percent"].mean()
        ax.plot(dense.index, dense, color=GREY, ls="--", marker=".")
        for (mode, mask), runs in part.groupby(["mode", "mask"]):
            if mode in modes and mask in markers:
                values = runs["accuracy_percent"]
                spread = spread_of(values)
                look = {"color": modes[mode]["color"], "marker": markers[mask], "ms": 7, "lw": 1}
                ax.errorbar(runs["total_epochs"].iloc[0], values.mean(), spread, ls="", **look)
        ax.set(title=title, xlabel="epochs in total, mask search included", ylabel="test accuracy (%)", xscale="log")
        ticks = sorted(part["total_epochs"].unique())
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
    key = [Line2D([], [], color=GREY, ls="--", marker=".", label="dense, T and 2T")]
    key += [Line2D([], [], color=s["color"], lw=4, label=mode) for mode, s in modes.items()]
    key += [Line2D([], [], color="0.2", ls="", marker=m, label=f"{mask} mask") for mask, m in markers.items()]
    figure.tight_layout()
    figure.legend(handles=key, loc="center left", bbox_to_anchor=(1.0, 0.55))
    return figure


def correlation_against_p(correlations: pd.DataFrame, labels: dict[float, str]) -> Figure:
    """``R_p(theta_0, theta_T)`` of dense training against ``p``, one line per learning rate, beside independence.

    >>> import pandas as pd
    >>> from lib.plots import correlation_against_p
    >>> figure = correlation_against_p(pd.DataFrame({"lr": 0.1, "p": [0.1, 0.2], "r_p": [0.1, 0.2]}), {0.1: "lr = 0.1"})
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['independent weights: $R_p = p$', 'lr = 0.1']
    """
    figure, ax = plt.subplots(figsize=(5.6, 4))
    top = correlations["p"].max() * 1.05
    ax.plot([0, top], [0, top], color=GREY, ls="--", lw=1.3, label="independent weights: $R_p = p$")
    for (lr, label), colour in zip(labels.items(), (BLUE, RED), strict=False):
        band(ax, correlations[correlations["lr"] == lr], "p", "r_p", label, color=colour, marker="o")
    ax.set(
        xlim=(0, top), ylim=(0, 1), xlabel="p, fraction of each layer's weights", ylabel="$R_p(\\theta_0, \\theta_T)$"
    )
    ax.legend(loc="upper left")
    figure.tight_layout()
    return figure


def correlation_by_mode(
    correlations: pd.DataFrame, *, p: float, modes: dict[str, dict], panel_titles: dict[float, str], published: dict
) -> Figure:
    """``R_p`` of the retrained networks against the initial and the trained weights, as bars by training mode.

    Args:
        published: ``{(mode, lr, against): [values]}``, drawn as crosses.

    >>> import pandas as pd
    >>> from lib.plots import correlation_by_mode
    >>> shares = {"lr": 0.1, "p": 0.2, "mode": "ticket", "against": ["initial", "trained"], "r_p": [0.6, 0.2]}
    >>> looks = {"modes": {"ticket": {"color": "red"}}, "panel_titles": {0.1: "lr = 0.1"}, "published": {}}
    >>> ax = correlation_by_mode(pd.DataFrame(shares), p=0.2, **looks).axes[0]
    >>> {tick.get_text(): float(bar.get_height()) for tick, bar in zip(ax.get_xticklabels(), ax.patches)}
    {'against the initial weights': 0.6, 'against the trained weights': 0.2}
    """
    figure, axes = plt.subplots(1, len(panel_titles), figsize=(4.6 * len(panel_titles), 4), sharey=True, squeeze=False)
    against = {"initial": "initial weights", "trained": "trained weights"}
    for ax, (lr, title) in zip(axes[0], panel_titles.items(), strict=True):
        part = correlations[(correlations["lr"] == lr) & np.isclose(correlations["p"], p)]
        for i, (mode, style) in enumerate(modes.items()):
            for j, name in enumerate(against):
                x = j + (i - (len(modes) - 1) / 2) * 0.8 / len(modes)
                values = part.loc[(part["mode"] == mode) & (part["against"] == name), "r_p"]
                spread = spread_of(values)
                ax.bar(x, values.mean(), 0.75 / len(modes), color=style["color"], label=mode if j == 0 else None)
                ax.errorbar(x, values.mean(), spread, color="0.2", lw=1)
                for k, value in enumerate(published.get((mode, lr, name), [])):
                    first = j == 0 and k == 0
                    ax.plot(x, value, "kx", ms=6, label="published (five networks, CIFAR)" if first else None)
        ax.axhline(p, color=GREY, ls="--", lw=1.3, label="independent weights")
        ax.set(title=title, ylim=(0, 1), ylabel=f"$R_{{{p:g}}}$")
        ax.set_xticks(range(len(against)), [f"against the {label}" for label in against.values()])
        ax.grid(axis="x", visible=False)
    legend_beside(figure, axes[0][-1])
    return figure


def admm_convergence(diagnostics: pd.DataFrame, panel_titles: dict[float, str]) -> Figure:
    """Validation accuracy of ``W`` and of ``P_S(W)`` over the Z-steps, by sparsity: a working ADMM makes them meet.

    >>> import pandas as pd
    >>> from lib.plots import admm_convergence
    >>> steps = {"lr_dense": 0.1, "sparsity": 0.9, "epoch": [1, 2], "accuracy": 0.9, "hardened_accuracy": [0.6, 0.9]}
    >>> figure = admm_convergence(pd.DataFrame(steps), {0.1: "lr = 0.1"})
    >>> [text.get_text() for text in figure.legends[0].get_texts()], figure.axes[0].get_ylabel()
    (['90%, $W$', '90%, $P_S(W)$'], 'validation accuracy (%)')
    """
    figure, axes = plt.subplots(
        1, len(panel_titles), figsize=(5.2 * len(panel_titles), 3.6), sharey=True, squeeze=False
    )
    for ax, (lr, title) in zip(axes[0], panel_titles.items(), strict=True):
        part = diagnostics[diagnostics["lr_dense"] == lr]
        sparsities = sorted(part["sparsity"].unique())
        for s, colour in zip(sparsities, sns.color_palette("viridis", len(sparsities)), strict=True):
            mean = part[part["sparsity"] == s].groupby("epoch")[["accuracy", "hardened_accuracy"]].mean() * 100
            ax.plot(mean.index, mean["accuracy"], color=colour, marker=".", ls="-", label=f"{s:.0%}, $W$")
            ax.plot(
                mean.index, mean["hardened_accuracy"], color=colour, marker=".", ls="--", label=f"{s:.0%}, $P_S(W)$"
            )
        ax.set(title=title, xlabel="ADMM epoch", ylabel="validation accuracy (%)")
    legend_beside(figure, axes[0][0])
    return figure
