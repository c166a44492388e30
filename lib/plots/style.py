"""The house style: colours, markers, bands, tables."""

import hashlib
import html
from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from pandas.io.formats.style import Styler

from lib.study import NETWORKS, measured, too_few

# Told apart with every kind of colour vision (Wong, Nature Methods 2011, as seaborn has it); then darker, for the many.
_ALL = sns.color_palette("colorblind", 10)  # grey is the dense network's; yellow and pink are pale: darker, and last
_SAFE = [*_ALL[:6], _ALL[9], tuple(0.7 * c for c in _ALL[8]), _ALL[6]]
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
    heads = ["claim", "published", "measured, 95 % interval", "networks", "verdict"]
    rows = "".join(f'<th scope="col" style="text-align:left">{head}</th>' for head in heads)
    rows = f"<thead><tr>{rows}</tr></thead>"
    for i, row in enumerate(ledger.to_dict("records"), 1):  # the index of all claims leads to a row by its number
        said = {key: html.escape(str(value)) for key, value in row.items()}
        of = "; ".join(filter(None, [said["paper"], said["source"], said["setting"]]))
        judged = f"Criterion ({said['kind']}, fixed {said['fixed']}): {said['criterion']}"
        judged += f"<br>Condition: {said['condition']}" if said["condition"] else ""
        more = f"<details><summary>criterion</summary>{judged}<br>{of}</details>"
        few = f"{row['n']} of {NETWORKS}" if too_few(row) else said["n"]
        few += f" {said['over']}" * (row["over"] != "networks")
        cells = [said["claim"] + more, said["published"], measured(row), "" if row["kind"] == "arithmetic" else few]
        told = zip(heads, cells, strict=False)
        shown = "".join(f'<td data-label="{head}" style="text-align:left">{cell}</td>' for head, cell in told)
        look = f"text-align:left;font-weight:600;color:{VERDICT_COLOURS[row['verdict']]}"
        kind = row["verdict"].replace(" ", "-")
        rows += f'<tr id="claim-{i}">{shown}<td class="verdict {kind}" style="{look}">{said["verdict"]}</td></tr>'
    return HTML(f'<table class="claims">{rows}</table>')


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
