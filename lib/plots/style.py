"""The house style: colours, captions, bands, tables."""

import base64
import hashlib
import html
import io
from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any, Literal

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from lib.study import NETWORKS, Shown, measured

# Told apart with every kind of colour vision (Wong, Nature Methods 2011, as seaborn has it); then darker, for the many.
_SAFE = [
    colour for i, colour in enumerate(sns.color_palette("colorblind", 10)) if i != 7
]  # grey is the dense network's
PALETTE = [*_SAFE, *(tuple(0.55 * c for c in colour) for colour in _SAFE)]
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN = _SAFE[:6]
GREY = "0.45"
MARKERS = "osD^vP*X<>hd"
DASHES = ("-", "--", ":", "-.")
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
    **{"one-shot": (BROWN, "D"), "iterative": (ORANGE, "s"), "ADMM": (PURPLE, "o")},
    **{"offset": (GREEN, "s"), "two_column": (ORANGE, "D"), "differential": (BLUE, "o"), "polarized": (PURPLE, "v")},
}
"""The colour and marker of what returns in many figures: structures, ways to retrain, searches, mappings."""
BAND = "Bands and bars reach from the lowest network to the highest."

VERDICT_COLOURS = {
    "reproduced": "#1a7f37",
    "direction only": "#0b5cad",
    "not reproduced": "#b42318",
    "inconclusive": "#8a6100",
}


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


def show(figure: Figure, caption: str, *, alt: str, finding: str = "", kind: Literal["svg", "png"] = "svg") -> HTML:
    """A figure with its caption, what it shows, and a description for who cannot see it, to be a cell's last value.

    Args:
        figure: closed here, so that the notebook does not show it twice.
        caption: below the figure: what is drawn, over how many runs, what the bands are.
        alt: what the figure shows, in a sentence.
        finding: what a reader should take from it, in one or two sentences that the numbers fill.
        kind: ``svg`` for curves, ``png`` for clouds of points.

    >>> import matplotlib.pyplot as plt
    >>> from lib.plots import show
    >>> page = show(figure := plt.figure(), "Mean over 3 seeds.", alt="An empty figure").data
    >>> 'alt="An empty figure"' in page, "Mean over 3 seeds.</figcaption>" in page, plt.fignum_exists(figure.number)
    (True, True, False)
    """
    legend(figure)
    raw = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(raw, format=kind, bbox_inches="tight", dpi=150, metadata=metadata)
    plt.close(figure)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    source = f"data:{mime};base64,{base64.b64encode(raw.getvalue()).decode()}"
    page = (
        f'<figure style="margin:1em 0"><img src="{source}" alt="{html.escape(alt)}" style="max-width:100%">'
        f'<figcaption style="color:#555;max-width:60em">{html.escape(caption)}</figcaption></figure>'
    )
    page += f'<p class="finding" style="max-width:46em">{html.escape(finding, quote=False)}</p>' if finding else ""
    return Shown(page, figure=alt, svg=raw.getvalue().decode()) if kind == "svg" else HTML(page)


def legend(figure: Figure) -> None:
    """One legend for all panels: beside one or two, below more. None where panels have their own.

    >>> from lib.plots import panels
    >>> from lib.plots.style import legend
    >>> figure, axes = panels(["a", "b"])
    >>> lines = [ax.plot([0, 1], label="filter") for ax in axes]
    >>> legend(figure)
    >>> [text.get_text() for text in figure.legends[0].get_texts()]
    ['filter']
    """
    entries: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries or figure.legends or any(ax.get_legend() for ax in figure.axes):
        return
    spec, longest = figure.axes[0].get_subplotspec(), max(map(len, entries))
    if spec is None or (spec.get_gridspec().ncols <= 2 and longest < 32):
        figure.legend(entries.values(), entries.keys(), loc="outside right upper")
        return
    columns = max(1, min(len(entries), 110 // (longest + 6)))
    figure.set_figheight(figure.get_figheight() + 0.25 * -(-len(entries) // columns))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def looks(names: Iterable[Any]) -> dict[Any, Look]:
    """A colour and a marker for each name: its own wherever it appears, for others the next free; numbers take a scale.

    >>> from lib.plots import looks
    >>> drawn = looks(["filter", "mine"])
    >>> drawn["filter"] == looks(["other", "filter"])["filter"], drawn["mine"] == drawn["filter"]
    (True, False)
    """
    names = list(dict.fromkeys(names))
    if names and not any(isinstance(name, str) for name in names):
        scale = dict(zip(sorted(names), sns.color_palette("viridis", len(names)), strict=True))
        return {name: (scale[name], "o") for name in names}
    taken = {OWN_LOOK[name] for name in names if name in OWN_LOOK}
    used = {colour for colour, _ in taken}
    free = ((c, MARKERS[i % len(MARKERS)]) for i, c in enumerate(cycle(PALETTE)) if c not in used)
    return {name: OWN_LOOK.get(name) or next(free) for name in names}


def called(column: str, value: Any) -> str:
    """How the legend tells a value: words speak for themselves, a number is one of its column."""
    return value if isinstance(value, str) else f"{column} {value:g}"


def ledger_table(ledger: pd.DataFrame) -> HTML:
    """The claims with our value, its interval and the coloured verdict; what they are judged by is folded away.

    >>> from lib.plots import ledger_table
    >>> from lib.study import Study, at_most
    >>> study = Study("09_mine", parameters={}, provenance={"commit": "unknown"})
    >>> study.expect("C1", "costs little", at_most(0.5), kind="ours", unit="points")
    >>> study.settle("C1", [0.1, 0.2, 0.3, 0.2, 0.2])
    >>> page = ledger_table(study.ledger()).data
    >>> "0.20 [0.11, 0.29]</td>" in page, "reproduced</td>" in page, "&lt;= 0.5 points" in page
    (True, True, True)
    """
    heads, left = ["claim", "published", "measured, 95 % interval", "networks", "verdict"], "text-align:left"
    rows = "<tr>" + "".join(f'<th scope="col" style="{left}">{head}</th>' for head in heads) + "</tr>"
    for i, row in enumerate(ledger.to_dict("records"), 1):  # the index of all claims leads to a row by its number
        said = {key: html.escape(str(value)) for key, value in row.items()}
        of = "; ".join(filter(None, [said["paper"], said["source"], said["setting"]]))
        judged = f"Criterion ({said['kind']}, fixed {said['fixed']}): {said['criterion']}"
        judged += f"<br>Condition: {said['condition']}" if said["condition"] else ""
        look = "display:inline-block;vertical-align:top;color:#777;margin-left:.6em"
        more = f'<details style="{look}"><summary>criterion</summary>{judged}<br>{of}</details>'
        few = f"{row['n']} of {NETWORKS}" if row["n"] < NETWORKS else said["n"]
        cells = [said["claim"] + more, said["published"], measured(row), "" if row["kind"] == "arithmetic" else few]
        rows += f'<tr id="claim-{i}">' + "".join(f'<td style="{left}">{cell}</td>' for cell in cells)
        look = f"{left};font-weight:600;color:{VERDICT_COLOURS[row['verdict']]}"
        rows += f'<td class="{row["verdict"].replace(" ", "-")}" style="{look}">{said["verdict"]}</td></tr>'
    return HTML(f"<table>{rows}</table>")


def table(frame: pd.DataFrame, *, fold: str = "", **styles: Callable[[Any], str]) -> HTML:
    """A data frame as a page shows it: no index, left-aligned, nothing cut off; ``styles`` give CSS by column.

    More than 20 rows, or any with ``fold`` as a heading, are folded away.

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
    page = styled.set_table_styles([{"selector": "th, td", "props": "text-align:left"}]).to_html()
    heading = fold or (f"{len(frame)} rows" if len(frame) > 20 else "")
    return HTML(f"<details><summary>{heading}</summary>{page}</details>" if heading else page)


house_style()
