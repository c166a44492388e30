"""The house style: colours, captions, bands, tables."""

import base64
import hashlib
import html
import io
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
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

# Told apart with every kind of colour vision (Wong, Nature Methods 2011, as seaborn has it); then darker, for the many.
_SAFE = sns.color_palette("colorblind", 10)
PALETTE = [*_SAFE, *(tuple(0.55 * c for c in colour) for colour in _SAFE)]
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN = _SAFE[:6]
GREY = "0.45"
MARKERS = "osD^vP*X<>hd"
Look = tuple[tuple[float, ...] | str, str]
OWN_LOOK: dict[str, Look] = {
    "dense": (GREY, "o"),
    "unstructured": ("0.2", "o"),
    **dict.fromkeys(("filter", "filters"), (GREEN, "s")),
    **dict.fromkeys(("column", "columns"), (BLUE, "D")),
    **dict.fromkeys(("filter + column", "filters + columns"), (RED, "^")),
    **dict.fromkeys(("kernel", "kernels"), (PURPLE, "v")),
    **dict.fromkeys(("block columns", "blocks (PIM-Prune)"), (ORANGE, "P")),
    **{"fine-tune": (RED, "o"), "rewind": (ORANGE, "s"), "ticket": (BLUE, "D"), "random reinit": (GREEN, "^")},
    **{"offset": (GREEN, "s"), "two_column": (ORANGE, "D"), "differential": (BLUE, "o"), "polarized": (PURPLE, "v")},
}
"""The colour and marker of what returns in many figures: structures, ways to retrain, mappings."""
BAND = "Bands and bars: 95 % bootstrap interval over seeds."

VERDICT_COLOURS = {"reproduced": "#1a7f37", "not reproduced": "#b42318", "inconclusive": "#8a6100"}


def house_style() -> None:
    """Set the look of every figure: white background, light grid, real text in SVG, the same bytes every time.

    >>> import matplotlib.pyplot as plt
    >>> from lib.plots import house_style
    >>> house_style()
    >>> plt.rcParams["svg.hashsalt"], plt.rcParams["axes.spines.top"]
    ('workbook', False)
    """
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.9)
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

    >>> import matplotlib.pyplot as plt
    >>> from lib.plots import show
    >>> page = show(figure := plt.figure(), "Mean over 3 seeds.", alt="An empty figure").data
    >>> 'alt="An empty figure"' in page, "Mean over 3 seeds.</figcaption>" in page, plt.fignum_exists(figure.number)
    (True, True, False)
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


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A colour and a marker for each name: its own wherever it appears, for all others the next that are free.

    >>> from lib.plots.style import looks
    >>> drawn = looks(["filter", "mine"])
    >>> drawn["filter"] == looks(["other", "filter"])["filter"], drawn["mine"] == drawn["filter"]
    (True, False)
    """
    names = list(dict.fromkeys(names))
    taken = {OWN_LOOK[name] for name in names if name in OWN_LOOK}
    used = {colour for colour, _ in taken}
    free = ((c, MARKERS[i % len(MARKERS)]) for i, c in enumerate(cycle(PALETTE)) if c not in used)
    return {name: OWN_LOOK.get(name) or next(free) for name in names}


def band(ax: Axes, frame: pd.DataFrame, x: str, y: str, label: str, **style) -> None:
    """Mean line over runs with the 95 % bootstrap interval as a band.

    >>> import matplotlib.pyplot as plt
    >>> import pandas as pd
    >>> from lib.plots.style import band
    >>> runs = pd.DataFrame({"rate": [2, 2, 4, 4], "lost": [0.1, 0.3, 0.5, 0.9]})
    >>> band(ax := plt.figure().add_subplot(), runs, "rate", "lost", "filter")
    >>> ax.lines[0].get_ydata().round(2).tolist(), len(ax.collections)  # means, and one band
    ([0.2, 0.7], 1)
    """
    sns.lineplot(frame, x=x, y=y, ax=ax, label=label, errorbar=("ci", 95), seed=0, err_kws={"alpha": 0.15}, **style)


def log_ticks(axis: Axis, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Ticks of a logarithmic axis as plain numbers.

    >>> import matplotlib.pyplot as plt
    >>> from lib.plots.style import log_ticks
    >>> log_ticks((ax := plt.figure().add_subplot(xscale="log", xlim=(0.5, 1500))).xaxis, subs=(1,))
    >>> [tick.get_text() for tick in ax.get_xticklabels() if 0.5 <= tick.get_position()[0] <= 1500]
    ['1', '10', '100', '1,000']
    """
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def spread_of(values: pd.Series) -> list[list[float]]:
    """How far the lowest and the highest lie from the mean, as matplotlib's error bars take it; never below zero.

    >>> import pandas as pd
    >>> from lib.plots.style import spread_of
    >>> spread_of(pd.Series([1.0, 2.0, 6.0])), spread_of(pd.Series([0.1, 0.1, 0.1]))[1]  # rounding: a mean above 0.1
    ([[2.0], [3.0]], [0.0])
    """
    mean = values.mean()
    return [[max(0.0, float(mean - values.min()))], [max(0.0, float(values.max() - mean))]]


def lost_line(
    ax: Axes, runs: pd.DataFrame, by: str, x: str, label: str, colour: tuple, marker: str, **style: Any
) -> None:
    """Means of ``drop`` over seeds, joined along the settings ``by``; bars from the best network to the worst.

    >>> import matplotlib.pyplot as plt
    >>> import pandas as pd
    >>> from lib.plots.style import lost_line
    >>> runs = pd.DataFrame({"bits": [2, 2, 4], "rate": [14.0, 16.0, 8.0], "drop": [1.0, 3.0, 0.5]})
    >>> lost_line(ax := plt.figure().add_subplot(), runs, "bits", "rate", "levels", "red", "o")
    >>> [values.tolist() for values in ax.lines[0].get_data()]
    [[15.0, 8.0], [2.0, 0.5]]
    """
    groups = runs.groupby(by)
    place, lost = groups[x].mean(), groups["drop"]
    spread = [(lost.mean() - lost.min()).clip(0), (lost.max() - lost.mean()).clip(0)]
    style = {"color": colour, "marker": marker, "ms": 5, "lw": 1.4, "elinewidth": 0.8, "label": label} | style
    ax.errorbar(place, lost.mean(), spread, **style)


def lost_axis(ax: Axes, shown: pd.DataFrame, most: float) -> None:
    """Points lost in ``drop``, less is higher, down to ``most``; the dense network is the dashed line.

    Where even the best arm loses about as much, the axis reaches down to twice its loss: no panel is empty.

    >>> import matplotlib.pyplot as plt
    >>> import pandas as pd
    >>> from lib.plots.style import lost_axis
    >>> lost_axis(ax := plt.figure().add_subplot(), pd.DataFrame({"drop": [0.5, 40.0]}), most=5.0)
    >>> [float(end) for end in ax.get_ylim()], ax.get_ylabel()
    ([5.0, -0.2], 'points of accuracy lost')
    >>> lost_axis(ax, pd.DataFrame({"drop": [7.0, 40.0]}), most=5.0)
    >>> [float(end) for end in ax.get_ylim()]
    [14.0, -0.2]
    """
    ax.axhline(0, color=GREY, ls="--", lw=1.2)
    least, largest = shown["drop"].min(), shown["drop"].max()
    ax.set_ylim(min(max(most, 2 * least), largest + 0.2), min(-0.2, least - 0.2))
    ax.set_ylabel("points of accuracy lost")


def legend_beside(figure: Figure, ax: Axes) -> None:
    """The legend of ``ax`` to the right of the figure, once for all its panels.

    >>> import matplotlib.pyplot as plt
    >>> from lib.plots.style import legend_beside
    >>> figure, axes = plt.subplots(1, 2)
    >>> lines = [ax.plot([0, 1], label="filter") for ax in axes]
    >>> legend_beside(figure, axes[0])
    >>> len(figure.legends), [text.get_text() for text in figure.legends[0].get_texts()]
    (1, ['filter'])
    """
    handles, labels = ax.get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.55))


def ledger_table(ledger: pd.DataFrame) -> HTML:
    """The claims with our value, its interval and the coloured verdict.

    >>> from lib.plots import ledger_table
    >>> from lib.study import Criterion, Study
    >>> study = Study("09_mine", "Mine", parameters={}, provenance={"commit": "unknown"})
    >>> study.expect("C1", "costs little", source="nowhere", published="0.1 points", criterion=Criterion("<=", 0.5))
    >>> study.settle("C1", [0.1, 0.2, 0.3])
    >>> "0.20 [0.10, 0.30]</td>" in (page := ledger_table(study.ledger()).data), "reproduced</td>" in page
    (True, True)
    """
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
    """A data frame as a page shows it: no index, left-aligned, nothing cut off; ``styles`` give CSS by column.

    >>> import pandas as pd
    >>> from lib.plots import table
    >>> page = table(pd.DataFrame({"arm": ["dense", "filter"], "lost": [None, 0.123]}), lost=lambda v: "color:red").data
    >>> "0.12</td>" in page, "–</td>" in page, "color: red" in page
    (True, True, True)
    """
    uuid = hashlib.sha256(frame.to_csv().encode()).hexdigest()[:8]  # two tables of a page need two names
    styled = Styler(frame, uuid=uuid, cell_ids=False).hide(axis="index").format(na_rep="–", precision=2)
    for column, css in styles.items():
        styled = styled.map(css, subset=column)
    return HTML(styled.set_table_styles([{"selector": "th, td", "props": "text-align:left"}]).to_html())


house_style()
