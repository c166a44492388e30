"""The committed reports follow from the committed measurements: on any machine, without data or training."""

import hashlib
import json
import re

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from PIL import Image

from lib.reproduce.index import statements
from lib.study import PROJECT, studies

PAPER = PROJECT / "reports" / "paper"
COMMITTED = sorted(table.stem for table in (PAPER / "results").glob("*.csv"))


def test_the_ledger_is_the_committed_one(paper):
    """But for the commit; rounding of another numpy or scipy decides no verdict."""
    columns = ["measured", "low", "high"]
    committed, mine = (pd.read_csv(folder / "claims.csv", keep_default_na=False) for folder in (PAPER, paper))
    assert mine.drop(columns=[*columns, "commit"]).equals(committed.drop(columns=[*columns, "commit"]))
    for column in columns:
        ours, theirs = (pd.to_numeric(frame[column]).to_numpy() for frame in (mine, committed))
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9, nan_ok=True)


def test_the_readme_counts_the_ledger():
    claims = pd.read_csv(PAPER / "claims.csv")
    ours, verdict = claims["kind"] == "ours", claims["verdict"]
    reproduced, open_ = ~ours & (verdict == "reproduced"), ~ours & (verdict == "inconclusive")
    by_kind = claims["kind"][reproduced].value_counts().reindex(["arithmetic", "direction", "number"], fill_value=0)
    told = {v: (~ours & (verdict == v)).sum() for v in ("direction only", "not reproduced")}
    said = (
        f"Of {(~ours).sum()} claims of papers {reproduced.sum()} are reproduced: {by_kind['direction']} directions, "
        f"{by_kind['number'] or 'no'} printed number{'s' * int(by_kind['number'] != 1)}, and {by_kind['arithmetic']} "
        f"by arithmetic alone. {told['direction only']} hold in their direction only, {told['not reproduced']} do "
        f"not, and {open_.sum()} are inconclusive, {(open_ & (claims['n'] < 5)).sum()} of them with fewer than five "
        "networks. "
        f"Another {ours.sum()} claims are our own."
    )
    of = statements(claims)
    counted = (
        f"The claims of papers test {of['all']} published statements: {of['reproduced']} are reproduced wherever a "
        f"verdict was reached ({of['arithmetic']} by arithmetic), {of['no']} nowhere, {of['part']} in some tests or in "
        f"their direction alone; {of['open']} are open."
    )
    for sentence in (said, counted):
        assert sentence in " ".join((PROJECT / "README.md").read_text("utf-8").split())


NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


def test_every_number_that_the_readme_tells_of_a_study_is_on_its_page():
    """To the digits that the README gives; whether it is the number of the same thing, a reader has to see."""
    found = (PROJECT / "README.md").read_text("utf-8").split("## What the studies found")[1].split("\n![")[0]
    told_of = dict(re.findall(r"\n- \*\*\[.*?\]\(reports/paper/(\w+)\.html\)\*\*(.*?)(?=\n- |\Z)", found, re.DOTALL))
    assert sorted(told_of) == COMMITTED
    for study, words in told_of.items():
        page = BeautifulSoup((PAPER / f"{study}.html").read_text("utf-8"), "html.parser")
        for part in page.select("script, style, .provenance, .runs, details.code"):
            part.decompose()
        there = [number.replace(",", "") for number in NUMBER.findall(page.get_text(" "))]
        for number in (n.rstrip(",").replace(",", "") for n in NUMBER.findall(words)):
            digits = len(number.partition(".")[2])
            exact = [float(n) for n in there if len(n.partition(".")[2]) >= digits]
            assert any(abs(n - float(number)) <= 0.5 * 10**-digits + 1e-9 for n in exact), f"{study}: {number}"


def test_the_tables_are_the_committed_ones(paper):
    for table in sorted((PAPER / "results").glob("*.csv")):
        mine, committed = ((folder / "results" / table.name).read_text().splitlines() for folder in (paper, PAPER))
        assert sorted(mine) == sorted(committed), table.name


def test_every_report_is_there_and_says_what_it_rests_on(paper):
    assert {*COMMITTED} >= {*studies()} - {"00_start_here"}  # which is a tour, and tests no claim of a paper
    for study in COMMITTED:
        for folder in (paper, PAPER):
            page = (folder / f"{study}.html").read_text("utf-8")
            assert " measurements" in page
            assert len(page) < 2_000_000


def told(page):
    """The words of a page and its numbers; not its code and pictures, nor when, where and by which code it was made."""
    soup = BeautifulSoup(page.read_text("utf-8"), "html.parser")
    for part in soup.select("script, style, svg, footer, .provenance, .evidence, .runs, details.code"):
        part.decompose()
    return re.split(r"(\d[\d,]*(?:\.\d+)?)", soup.get_text(" ", strip=True))


@pytest.mark.parametrize("page", [*COMMITTED, "index"])
def test_a_page_says_what_the_committed_one_says(paper, page):
    """But for the last digit, which rounding of other libraries may move."""
    mine, committed = (told(folder / f"{page}.html") for folder in (paper, PAPER))
    assert mine[::2] == committed[::2]
    ours, theirs = ([float(number.replace(",", "")) for number in words[1::2]] for words in (mine, committed))
    assert ours == pytest.approx(theirs, rel=0.02, abs=0.02)


def test_the_picture_in_the_readme_is_of_this_ledger():
    ledger = hashlib.sha256((PAPER / "claims.csv").read_bytes()).hexdigest()
    assert Image.open(PAPER / "figures" / "index.png").text["claims.csv"] == ledger, "run tests/picture.py again"


@pytest.mark.parametrize("study", COMMITTED)
def test_an_answer_is_read_in_30_seconds(study):
    """A sentence that answers, three facts that it rests on, and a caveat."""
    answer = BeautifulSoup(json.loads((PAPER / "runs" / f"{study}.json").read_text())["answer"], "html.parser")
    facts = [fact.extract().get_text() for fact in answer.select("li")]
    assert 1 <= len(facts) <= 3
    assert max(map(len, facts)) <= 330
    assert len(answer.get_text()) <= 500


@pytest.mark.parametrize("study", COMMITTED)
def test_a_finding_is_a_statement_and_no_list(study):
    """A reader takes a sentence or three from a figure; what is more belongs in a table."""
    page = BeautifulSoup((PAPER / f"{study}.html").read_text("utf-8"), "html.parser")
    findings = [" ".join(text.get_text().split()) for text in page.select("p.finding")]
    assert findings
    assert [text for text in findings if len(text) > 400] == []
