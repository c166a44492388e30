"""The index of a report folder: what the studies found, how they stand, and the ledger of claims."""

import base64
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from lib.files import write_whole
from lib.reproduce.page import VERDICTS, template
from lib.reproduce.run import last_run
from lib.study import CLAIM_COLUMNS, measured


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
    found = [claims for claims in found if len(claims)]
    ledger = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=[*CLAIM_COLUMNS])
    for column in ("measured", "low", "high"):
        ledger[column] = pd.to_numeric(ledger[column])
    write_whole(reports / "claims.csv", ledger[[*CLAIM_COLUMNS]].to_csv(index=False))
    page = template("index.html.j2").render(
        preset=reports.name,
        studies=[_study(study, state, reports, ledger) for study, state in states.items()],
        systems=_systems(ledger),
        counts=_counts(ledger),
        verdicts=VERDICTS,
    )
    write_whole(reports / "index.html", page)


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
        "counts": _counts(ledger[ledger["study"] == study]),
        "picture": base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else "",
    }


def _systems(ledger: pd.DataFrame) -> list[tuple[str, list[dict[str, Any]]]]:
    """The claims by system, each with the anchor of its row in the report."""
    numbered = ledger.assign(anchor=ledger.groupby("study").cumcount() + 1)
    groups = numbered.groupby("system", sort=False)
    return [(str(system), [c | {"shown": measured(c)} for c in claims.to_dict("records")]) for system, claims in groups]
