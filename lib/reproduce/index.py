"""The index of a report folder: every claim at a glance, what the studies found, and the ledger by paper."""

import base64
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from lib.files import write_whole
from lib.reproduce.page import VERDICTS, template
from lib.reproduce.run import last_run
from lib.study import CLAIM_COLUMNS, JUDGED, NETWORKS, OURS, chance_of_error, measured, papers, too_few
from lib.study.papers import named_in

REACH = 4.0
"""How many half-widths of the interval the plot of all claims shows on each side; what is further lies at its ends."""

LANES = 0.032
"""How near, as a share of the plot's width, two marks of a row may be before one goes below the other."""


def write_index(reports: Path, states: dict[str, str]) -> None:
    """``claims.csv`` from the studies' own claims, and ``index.html``, one file that needs only the reports beside it.

    Args:
        states: by study, how it stands.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from lib.reproduce import write_index
    >>> write_index(reports := Path((folder := TemporaryDirectory()).name), {"01_tickets": "never ran"})
    >>> sorted(file.name for file in reports.iterdir()), "never ran" in (reports / "index.html").read_text()
    (['claims.csv', 'index.html'], True)
    """
    found = [pd.read_csv(path, keep_default_na=False) for path in sorted((reports / "claims").glob("*.csv"))]
    columns = [*CLAIM_COLUMNS, *JUDGED]
    found = [claims for claims in found if len(claims) and [*claims] == columns]  # not an older version's
    ledger = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)
    for column in ("measured", "low", "high", "n", "bound", "value"):
        ledger[column] = pd.to_numeric(ledger[column])
    write_whole(reports / "claims.csv", ledger[[*CLAIM_COLUMNS]].to_csv(index=False))
    ledger["few"] = too_few(ledger)
    by_paper = _papers(ledger)
    tested, decided, wrong = chance_of_error(ledger)
    page = template("index.html.j2").render(
        preset=reports.name,
        studies=[_study(study, state, reports, ledger) for study, state in states.items()],
        papers=[p for p in by_paper if p["claims"]],
        untested=[p | {"named": named_in(p["paper"])} for p in by_paper if not p["claims"] and p["paper"] != OURS],
        tables={part: pd.crosstab(rows["kind"], rows["verdict"]) for part, rows in _parts(ledger).items() if len(rows)},
        total=len(ledger),
        statements=statements(ledger),
        controls=int((ledger["kind"] == "ours").sum()),
        tested=tested,
        decided=decided,
        wrong=wrong,
        few=int(ledger["few"].sum()),
        networks=NETWORKS,
        others=int(((ledger["kind"] != "arithmetic") & (ledger["over"] != "networks")).sum()),
        choices={
            "verdict": [v for v in VERDICTS if v in {*ledger["verdict"]}],
            **{column: sorted({*ledger[column]} - {""}) for column in ("kind", "fixed", "setting")},
        },
        verdicts=VERDICTS,
        reach=REACH,
    )
    write_whole(reports / "index.html", page)


def _parts(ledger: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What papers say, and what is this workbook's own."""
    ours = ledger["kind"] == "ours"
    return {"published": ledger[~ours], "ours": ledger[ours]}


def statements(ledger: pd.DataFrame) -> dict[str, int]:
    """How published statements stand, of which one may be put to several tests: how many, and of them by outcome."""
    own = ledger[ledger["kind"] != "ours"]
    outcomes = Counter(dict.fromkeys(("all", "reproduced", "arithmetic", "no", "part", "open"), 0))
    for _, tests in own.groupby(["paper", "published"]):
        met = {*tests["verdict"]} - {"inconclusive"}
        outcome = {"": "open", "reproduced": "reproduced", "not reproduced": "no"}.get("".join(met), "part")
        outcomes.update(
            ["all", outcome] + ["arithmetic"] * (outcome == "reproduced" and {*tests["kind"]} == {"arithmetic"})
        )
    return dict(outcomes)


def _counts(ledger: pd.DataFrame) -> list[tuple[str, int]]:
    counts = Counter(ledger["verdict"])
    return [(verdict, counts[verdict]) for verdict in VERDICTS if counts[verdict]]


def _study(study: str, state: str, reports: Path, ledger: pd.DataFrame) -> dict[str, Any]:
    """What the page says of a study: its last complete run, and the failure after it."""
    picture = reports / "figures" / f"{study}.svg"
    return {
        "name": study,
        "state": state,
        "run": last_run(study, reports),
        "failed": last_run(study, reports, failed=True),
        "counts": _counts(ledger[(ledger["study"] == study) & (ledger["kind"] != "ours")]),
        "picture": base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else "",
    }


def _papers(ledger: pd.DataFrame) -> list[dict[str, Any]]:
    """Every paper with its claims, each with the anchor of its row in the report and its place in the plot."""
    known = papers()
    rows = ledger.assign(anchor=ledger.groupby("study").cumcount() + 1).to_dict("records")
    keys = [*known.index, *sorted({row["paper"] for row in rows} - {*known.index, OURS}), OURS]
    told = {**known.to_dict("index"), OURS: {"title": "Controls and goals that no paper states"}}
    nothing = dict.fromkeys(("title", "link", "authors", "venue", "year"), "")
    found = []
    for key in keys:
        own = [row | {"shown": measured(row)} | _place(row) for row in rows if row["paper"] == key]
        lanes: list[float] = []
        for row in sorted(own, key=lambda row: row["at"]):
            free = [i for i, last in enumerate(lanes) if row["at"] - last >= LANES]
            row["lane"] = free[0] if free else len(lanes)
            lanes[row["lane"] : row["lane"] + 1] = [row["at"]]
        counts = _counts(pd.DataFrame(own, columns=["verdict"]))
        paper = nothing | told.get(key, {}) | {"paper": key, "claims": own, "lanes": len(lanes), "counts": counts}
        year = " ".join(str(paper[part]) for part in ("venue", "year") if paper[part] not in ("", "?"))
        paper["where"] = ", ".join(part for part in (paper["authors"], year) if part not in ("", "?"))
        found.append(paper)
    return found


def _place(row: dict[str, Any]) -> dict[str, Any]:
    """Where a claim lies in the plot: how many half-widths of its interval on the good side of its criterion.

    The half is that toward the criterion, as intervals of ratios have two. Its place and that of a published number are
    shares of the plot's width; beyond its ends they lie at the ends.
    """
    nothing, sign = {"at": 0.5, "number": None}, 1 if row["sign"] == ">=" else -1
    if not math.isfinite(row["measured"]):
        return nothing
    near = row["low"] if row["measured"] >= row["bound"] else row["high"]
    half = abs(row["measured"] - near) if math.isfinite(near) else math.nan
    if not half > 0:  # no chance is in it, and all that can be told is the side; or nobody knows
        side = 0.98 if sign * (row["measured"] - row["bound"]) >= -1e-9 else 0.02
        return nothing | ({"at": side} if row["kind"] == "arithmetic" or half == 0 else {})

    def place(value: float) -> float:
        return 0.5 + 0.48 * max(-1.0, min(1.0, sign * (value - row["bound"]) / half / REACH))

    return {"at": place(row["measured"]), "number": place(row["value"]) if math.isfinite(row["value"]) else None}
