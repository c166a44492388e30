"""The house style: colours, captions, bands, tables."""

import base64
import hashlib
import html
import io
from collections.abc import Callable, Sequence
from typing import Any, Literal

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from pandas.io.formats.style import Styler

from lib.study import measured

BLUE, ORANGE, GREEN, RED, PURPLE, BROWN = sns.color_palette("deep", 6)
PALETTE = [*sns.color_palette("deep", 10), *sns.color_palette("dark", 10)]
GREY = "0.45"
BAND = "Bands and bars: 95 % bootstrap interval over seeds."

VERDICT_COLOURS = {"reproduced": "#1a7f37", "not reproduced": "#b42318", "inconclusive": "#8a6100"}


def house_style() -> None:
    """Set the look of every figure: white background, light grid, real text in SVG, the same bytes every time."""
    sns.set_theme(context="notebook", style="whitegrid", palette="deep", font_scale=0.9)
    plt.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "workbook",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
        "axes.titlesize": "medium",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "0.9",
        "legend.frameon": False,
    }


def show(figure: Figure, caption: str, *, alt: str, kind: Literal["svg", "png"] = "svg") -> HTML:
    """A figure with its caption and a description for who cannot see it, to be a cell's last value.

    Args:
        figure: closed here, so that the notebook does not show it twice.
        caption: below the figure: what is drawn, over how many runs, what the bands are.
        alt: what the figure shows, in a sentence.
        kind: ``svg`` for curves, ``png`` for clouds of points.
    """
    raw = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(raw, format=kind, bbox_inches="tight", dpi=150, metadata=metadata)
    plt.close(figure)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    source = f"data:{mime};base64,{base64.b64encode(raw.getvalue()).decode()}"
    return HTML(
        f'<figure style="margin:1em 0"><img src="{source}" alt="{html.escape(alt)}" style="max-width:100%">'
        f'<figcaption style="color:#555;max-width:60em">{html.escape(caption)}</figcaption></figure>'
    )


def band(ax: Axes, frame: pd.DataFrame, x: str, y: str, label: str, **style) -> None:
    """Mean line over runs with the 95 % bootstrap interval as a band; points only where there is a single x."""
    sns.lineplot(frame, x=x, y=y, ax=ax, label=label, errorbar=("ci", 95), seed=0, err_kws={"alpha": 0.15}, **style)


def log_ticks(axis: Axis, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Ticks of a logarithmic axis as plain numbers."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def lost_line(
    ax: Axes, runs: pd.DataFrame, by: str, x: str, label: str, colour: tuple, marker: str, **style: Any
) -> None:
    """Means of ``drop`` over seeds, joined along the settings ``by``; bars from the best network to the worst."""
    groups = runs.groupby(by)
    place, lost = groups[x].mean(), groups["drop"]
    spread = [(lost.mean() - lost.min()).clip(0), (lost.max() - lost.mean()).clip(0)]
    style = {"color": colour, "marker": marker, "ms": 5, "lw": 1.4, "elinewidth": 0.8, "label": label} | style
    ax.errorbar(place, lost.mean(), spread, **style)


def lost_axis(ax: Axes, shown: pd.DataFrame, most: float) -> None:
    """Points lost in ``drop``, less is higher, down to ``most``; the dense network is the dashed line."""
    ax.axhline(0, color=GREY, ls="--", lw=1.2)
    ax.set_ylim(min(most, shown["drop"].max() + 0.2), min(-0.2, shown["drop"].min() - 0.2))
    ax.set_ylabel("points of accuracy lost")


def legend_beside(figure: Figure, ax: Axes) -> None:
    """The legend of ``ax`` to the right of the figure, once for all its panels."""
    handles, labels = ax.get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.55))


def ledger_table(ledger: pd.DataFrame) -> HTML:
    """The claims with our value, its interval and the coloured verdict."""
    shown = pd.DataFrame(
        {
            "claim": ledger["claim"],
            "published": ledger["published"],
            "criterion": ledger["criterion"],
            "measured": [measured(row) for row in ledger.to_dict("records")],
            "n": ledger["n"],
            "verdict": ledger["verdict"],
        }
    )
    return table(shown, verdict=lambda v: f"color:{VERDICT_COLOURS[v]};font-weight:600")


def table(frame: pd.DataFrame, **styles: Callable[[Any], str]) -> HTML:
    """A data frame as a page shows it: no index, left-aligned, nothing cut off; ``styles`` give CSS by column."""
    uuid = hashlib.sha256(frame.to_csv().encode()).hexdigest()[:8]  # two tables of a page need two names
    styled = Styler(frame, uuid=uuid, cell_ids=False).hide(axis="index").format(na_rep="–", precision=2)
    for column, css in styles.items():
        styled = styled.map(css, subset=column)
    return HTML(styled.set_table_styles([{"selector": "th, td", "props": "text-align:left"}]).to_html())


house_style()
