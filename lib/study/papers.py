"""The papers of the field: ``data/papers.csv``, a row each."""

import re
from difflib import get_close_matches
from functools import cache

import pandas as pd

from lib.study.parameters import NOTEBOOKS, PROJECT
from lib.study.ranges import ParameterError

OURS = "this workbook"
"""Whose a claim is that no paper makes: a control, or a goal."""

COLUMNS = ("paper", "title", "authors", "venue", "year", "link", "implemented", "source", "status")
PATH = PROJECT / "data" / "papers.csv"


@cache
def papers() -> pd.DataFrame:
    """Every paper that the workbook tests or knows, in the order of the table, by its key ``paper``.

    ``implemented`` names what of it ``lib`` has, "" for nothing yet; ``status`` says whether the row was checked.

    Raises:
        ParameterError: a line without one of the fields, or with the key of another.

    >>> from lib.study import papers
    >>> papers().loc["E2-Train", "year"]
    '2019'
    """
    try:
        table = pd.read_csv(PATH, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ParameterError(f"{PATH.name}: {error}") from None
    if (*table,) != COLUMNS:
        raise ParameterError(f"{PATH.name} has the columns {', '.join(table)}: expected {', '.join(COLUMNS)}")
    for line, row in enumerate(table.to_dict("records"), 2):
        if missing := [name for name, value in row.items() if not value and name != "implemented"]:
            raise ParameterError(f"{PATH.name}, line {line} ({row['paper'] or 'no key'}): {missing[0]} is missing")
    if twice := table["paper"][table["paper"].duplicated()].tolist():
        raise ParameterError(f"{PATH.name}: {twice[0]!r} is there twice")
    return table.set_index("paper", drop=False)


def named_in(paper: str) -> list[str]:
    """The studies whose notebooks name a paper, by its key or its link.

    >>> from lib.study.papers import named_in
    >>> named_in("TinyADC")
    ['05_crossbar_costs']
    """
    words = paper, papers().loc[paper, "link"]
    whole = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, words))})(?![\w-])")
    texts = {file.stem: file.read_text("utf-8") for file in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))}
    return [study for study, text in texts.items() if any(w in text for w in words) and whole.search(text)]


def check_paper(key: str, ours: bool) -> None:
    """Refuse a claim that is nobody's.

    Raises:
        ParameterError: the key is in no line of the table; a claim of this workbook that names a paper, or another
            that names none.
    """
    if ours or key == OURS:
        if not ours:
            raise ParameterError(f"paper = {OURS!r}: such a claim is of kind='ours'; name a paper for any other")
        if key != OURS:
            raise ParameterError(f"paper = {key!r}, kind = 'ours': such a claim names no paper")
        return
    if key not in papers().index:
        near = get_close_matches(key, papers().index, 3, 0.75)
        hint = f"near are {', '.join(near)}" if near else "none is near; add its line first"
        raise ParameterError(f"paper = {key!r} is no key of {PATH.name}: {hint}")
