"""Figures about training schedules: energy spent, masks that settle, rounds of growing, predicted signs."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lib.plots.crossbars import pareto
from lib.plots.style import GREY, band, legend_beside, log_ticks, looks, spread_of


def _point(ax: Axes, runs: pd.DataFrame, x: str, label: str, colour: tuple | str, marker: str, filled: bool) -> None:
    """The mean of some networks, with a cross from the lowest to the highest."""
    values, place = runs["accuracy_percent"], runs[x]
    face = colour if filled else "white"
    style = {"color": colour, "marker": marker, "ms": 6, "mfc": face, "elinewidth": 0.7, "ls": ""}
    ax.errorbar(place.mean(), values.mean(), spread_of(values), spread_of(place), label=label, **style)


def accuracy_against_energy(results: pd.DataFrame, reach: float = 8.0) -> Figure:
    """Accuracy against the energy of training, a panel for each model; filled points are on the Pareto front.

    Args:
        results: columns ``model``, ``arm``, ``setting``, ``accuracy_percent``, ``energy_J``, a row per network. The arm
            ``dense`` is drawn as a line over its settings: training less.
        reach: how many points below the best network the axis goes at most.

    >>> import pandas as pd
    >>> from lib.plots import accuracy_against_energy
    >>> arms = {"arm": ["dense", "dense", "static"], "setting": [0.5, 1.0, 0.9], "energy_J": [5.0, 10.0, 1.0]}
    >>> figure = accuracy_against_energy(pd.DataFrame({"model": "vgg", "accuracy_percent": [88, 90, 86]} | arms))
    >>> figure.axes[0].get_title(), [text.get_text() for text in figure.legends[0].get_texts()]
    ('vgg', ['dense, trained less', 'static'])
    """
    models = list(dict.fromkeys(results["model"]))
    figure, axes = plt.subplots(1, len(models), figsize=(6.0 * len(models), 4.4), squeeze=False)
    drawn = looks(arm for arm in dict.fromkeys(results["arm"]) if arm != "dense")
    for ax, name in zip(axes[0], models, strict=True):
        part = results[results["model"] == name]
        means = part.groupby(["arm", "setting"], sort=False)[["accuracy_percent", "energy_J"]].mean()
        front = pareto(means["accuracy_percent"], -means["energy_J"])
        dense = means.loc["dense"].sort_values("energy_J")
        ax.plot(dense["energy_J"], dense["accuracy_percent"], "--o", color=GREY, ms=4, label="dense, trained less")
        for key, runs in part[part["arm"] != "dense"].groupby(["arm", "setting"], sort=False):
            label = key[0] if key[0] not in ax.get_legend_handles_labels()[1] else "_"
            _point(ax, runs, "energy_J", label, *drawn[key[0]], filled=bool(front[key]))
        ax.set(title=name, xlabel="energy of training (J)", ylabel="test accuracy (%)", xscale="log")
        ax.set_ylim(bottom=max(ax.get_ylim()[0], means["accuracy_percent"].max() - reach))
        log_ticks(ax.xaxis)
    figure.tight_layout()
    handles = {}
    for ax in axes[0]:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.0, 0.55))
    return figure


def mask_distance_matrices(
    distances: dict[str, Tensor], epochs: Sequence[float], drawn: dict[str, float | None]
) -> Figure:
    """Pairwise distances of masks taken during training, a panel for each way to draw them, and the drawing point.

    Args:
        distances: by title, (T, T) shares of entries that differ. epochs: when the masks were taken, (T,).
        drawn: by title, the epoch at which the ticket was drawn.

    >>> from lib.plots import mask_distance_matrices
    >>> figure = mask_distance_matrices({"p = 0.5": torch.zeros(3, 3)}, [0, 1, 2], {"p = 0.5": 2})
    >>> figure.axes[0].get_title(), figure.axes[-1].get_ylabel()
    ('p = 0.5', 'share of entries that differ')
    """
    figure, axes = plt.subplots(
        1, len(distances), figsize=(4.4 * len(distances), 4), squeeze=False, layout="constrained"
    )
    most = max(float(d.max()) for d in distances.values()) or 1.0
    half = (epochs[1] - epochs[0]) / 2 if len(epochs) > 1 else 0.5
    extent = (epochs[0] - half, epochs[-1] + half, epochs[-1] + half, epochs[0] - half)
    for ax, (title, matrix) in zip(axes[0], distances.items(), strict=True):
        picture = ax.imshow(matrix.numpy(), cmap="cividis", vmin=0, vmax=most, extent=extent)
        if drawn[title] is not None:
            ax.axvline(drawn[title], color="white", lw=1.4, ls="--")
            ax.axhline(drawn[title], color="white", lw=1.4, ls="--")
        ax.set(title=title, xlabel="epoch", ylabel="epoch")
        ax.grid(visible=False)
    figure.colorbar(picture, ax=axes[0], label="share of entries that differ", shrink=0.85)
    return figure


def accuracy_by_round(logs: pd.DataFrame, rounds: int) -> Figure:
    """What pruning would leave at the end of each round, and the share of weights that changed places in it.

    Args:
        logs: columns ``arm``, ``round``, ``pruned_percent``, ``exchanged_percent``; a row per network and round.

    >>> import pandas as pd
    >>> from lib.plots import accuracy_by_round
    >>> log = {"arm": "cyclic", "round": [1, 2], "pruned_percent": [60, 70], "exchanged_percent": [30, 20]}
    >>> [ax.get_ylabel() for ax in accuracy_by_round(pd.DataFrame(log), rounds=2).axes]
    ['validation accuracy, pruned (%)', 'weights that changed places (%)']
    """
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4))
    names = {
        "pruned_percent": "validation accuracy, pruned (%)",
        "exchanged_percent": "weights that changed places (%)",
    }
    drawn = looks(logs["arm"])
    for ax, (column, label) in zip(axes, names.items(), strict=True):
        for arm, (colour, marker) in drawn.items():
            band(
                ax, logs[logs["arm"] == arm], "round", column, arm, color=colour, marker=marker, markeredgecolor=colour
            )
        ax.set(xlabel="round", ylabel=label, xticks=range(1, rounds + 1))
        ax.get_legend().remove()
    legend_beside(figure, axes[0])
    return figure


def parts_of_training(logs: pd.DataFrame) -> Figure:
    """Share of blocks executed, and of signs predicted, by epoch; the predicted signs that are wrong, as numbers.

    Args:
        logs: columns ``arm``, ``epoch``, ``executed``, ``predicted``, ``agreement``; NaN where a part is not used.

    >>> import pandas as pd
    >>> from lib.plots import parts_of_training
    >>> log = {"arm": "all", "epoch": [1, 2], "executed": [0.9, 0.6], "predicted": 0.7, "agreement": 0.999}
    >>> [ax.get_ylabel() for ax in parts_of_training(pd.DataFrame(log)).axes]
    ['blocks executed (%)', 'signs predicted (%)', 'predicted signs that are right (%)']
    """
    labels = ("blocks executed (%)", "signs predicted (%)", "predicted signs that are right (%)")
    figure, axes = plt.subplots(1, 3, figsize=(13.2, 3.8))
    drawn, handles = looks(logs["arm"]), {}
    for ax, column, label in zip(axes, ("executed", "predicted", "agreement"), labels, strict=True):
        shown = logs.dropna(subset=column)
        for arm in dict.fromkeys(shown["arm"]):
            part = shown[shown["arm"] == arm].assign(**{column: lambda f, c=column: 100 * f[c]})
            colour, marker = drawn[arm]
            band(ax, part, "epoch", column, arm, color=colour, marker=marker, ms=5, markeredgecolor=colour)
        if not shown.empty:
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
            ax.get_legend().remove()
        ax.set(xlabel="epoch", ylabel=label)
    axes[0].set_ylim(0, 105)
    axes[1].set_ylim(0, 105)
    figure.tight_layout()
    figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.0, 0.55))
    return figure


def lost_by_sparsity(results: pd.DataFrame, most: float) -> Figure:
    """Points of accuracy lost against the dense network by sparsity, a line for each way to get there.

    Args:
        results: columns ``arm``, ``sparsity``, ``drop``; a row per network. most: points that the axis goes down to.

    >>> import pandas as pd
    >>> from lib.plots import lost_by_sparsity
    >>> runs = pd.DataFrame({"arm": "static", "sparsity": [0.8, 0.9], "drop": [1.0, 3.0]})
    >>> [text.get_text() for text in lost_by_sparsity(runs, most=5.0).axes[0].get_xticklabels()]
    ['80 %', '90 %']
    """
    figure, ax = plt.subplots(figsize=(6.4, 4.4))
    shown = results.assign(density=1 - results["sparsity"])
    for arm, (colour, marker) in looks(results["arm"]).items():
        band(
            ax, shown[shown["arm"] == arm], "density", "drop", arm, color=colour, marker=marker, markeredgecolor=colour
        )
    ax.axhline(0, color=GREY, ls="--", lw=1.2)
    ax.set(xscale="log", xlabel="sparsity of the pruned layers (log scale of density)")
    ax.set(
        ylabel="points of accuracy lost", ylim=(min(most, shown["drop"].max() + 0.3), min(-0.3, shown["drop"].min()))
    )
    ax.invert_xaxis()
    ticks = sorted(results["sparsity"].unique())
    ax.set_xticks([1 - s for s in ticks], [f"{100 * s:g} %" for s in ticks])
    ax.minorticks_off()
    ax.get_legend().remove()
    legend_beside(figure, ax)
    return figure
