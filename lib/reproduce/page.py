"""The HTML report of an executed notebook: one file that opens anywhere, without a script or a request."""

import base64
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pandas as pd
from bs4 import BeautifulSoup, Tag
from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).resolve().parent / "templates"
VERDICTS = ("reproduced", "not reproduced", "inconclusive")


def render(executed: Path, *, run: dict[str, Any] | None = None, ledger: pd.DataFrame | None = None) -> str:
    """A self-contained HTML page of an executed notebook.

    Args:
        run: the record of the run, for the foot of the page.
        ledger: the study's claims, for the verdicts on top; their rows in the page get anchors ``claim-1``, ...

    >>> from lib.reproduce import render
    >>> from lib.study import NOTEBOOKS
    >>> page = render(NOTEBOOKS / "01_lottery_ticket_vs_finetuning.ipynb")
    >>> page[:15], "<math" in page, "<script" in page
    ('<!doctype html>', True, False)
    """
    from nbconvert import HTMLExporter

    notebook = nbformat.read(executed, 4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = mathml(cell.source)
    notebook.cells = [c for c in notebook.cells if c.source.strip()]
    exporter = HTMLExporter(template_name="report", extra_template_basedirs=[str(TEMPLATES)])
    body, _ = exporter.from_notebook_node(notebook)
    return lay_out(executed.stem, body, run=run, ledger=ledger)


class Outline(NamedTuple):
    """What an index tells of a report: its title, its answer as HTML, and what its first figure shows.

    >>> from lib.reproduce.page import Outline
    >>> Outline("Mine", "It costs <strong>0.2</strong> points.", "accuracy against rate").title
    'Mine'
    """

    title: str
    answer: str
    figure: str


def outline(executed: Path) -> Outline:
    """That of an executed notebook, or of whatever part of it there is.

    >>> from pathlib import Path
    >>> from lib.reproduce.page import outline
    >>> from lib.study import NOTEBOOKS
    >>> outline(NOTEBOOKS / "06_quantization.ipynb").title, outline(Path("lost.ipynb"))
    ('Which numbers may weights be?', Outline(title='lost', answer='', figure=''))
    """
    try:
        cells = nbformat.read(executed, 4).cells
    except (OSError, ValueError):
        return Outline(executed.stem, "", "")
    title = next((m[1] for c in cells if (m := re.search(r"^# (.+)$", c.source, re.MULTILINE))), executed.stem)
    outputs = [o.get("data", {}).get("text/html", "") for c in cells for o in c.get("outputs", [])]
    shown = "".join("".join(o) for o in outputs)
    answer = re.search(r'<p class="answer">(.*?)</p>', shown, re.DOTALL)
    return Outline(title, answer[1] if answer else "", first_figure(shown)[0])


def first_figure(page: str) -> tuple[str, bytes]:
    """What the first drawing of a page shows, as HTML, and the drawing as SVG; both empty if there is none.

    >>> from lib.reproduce.page import first_figure
    >>> first_figure('<img src="data:image/svg+xml;base64,PHN2Zy8+" alt="a line">'), first_figure("no image")
    (('a line', b'<svg/>'), ('', b''))
    """
    for image in re.finditer(r'<img[^>]* src="data:image/svg\+xml;base64,([^"]+)"[^>]*>', page):
        if alt := re.search(r' alt="([^"]*)"', image[0]):
            return alt[1], base64.b64decode(image[1])
    return "", b""


def mathml(markdown: str) -> str:
    """``$$...$$`` and ``$...$`` as MathML, which browsers draw without a script.

    >>> from lib.reproduce.page import mathml
    >>> mathml("a share of $p$")
    'a share of <math ...><mrow><mi>p</mi></mrow></math>'
    """
    from latex2mathml.converter import convert

    markdown = re.sub(r"\$\$(.+?)\$\$", lambda m: convert(m[1].strip(), display="block"), markdown, flags=re.DOTALL)
    return re.sub(r"(?<![\\$])\$([^$\n]+?)\$", lambda m: convert(m[1]), markdown)


def lay_out(study: str, body: str, *, run: dict[str, Any] | None = None, ledger: pd.DataFrame | None = None) -> str:
    """The page around a notebook's cells as HTML: answer and verdicts on top, contents, provenance at the foot.

    >>> from lib.reproduce.page import lay_out
    >>> page = lay_out("09_mine", '<h1>Mine</h1><p>How.</p><p class="answer">Yes.</p>')
    >>> "<title>Mine</title>" in page, page.index("Yes.") < page.index("How.")
    (True, True)
    """
    soup = BeautifulSoup(body, "html.parser")
    for prompt in soup.select(".jp-InputPrompt, .jp-OutputPrompt, .jp-Collapser"):
        prompt.decompose()
    title = soup.h1.get_text().removesuffix("¶") if soup.h1 else study
    opened = _taken(soup, "div.provenance")
    answer = _taken(soup, "p.answer")
    _fold_code(soup)
    for table in soup.find_all("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
    _mark_verdicts(soup)
    start = soup.select_one(".jp-MarkdownCell")
    head = start.extract() if start and start.h1 else ""
    contents = [(h["id"], h.get_text().removesuffix("¶")) for h in soup.find_all("h2") if h.get("id")]
    counts = Counter(ledger["verdict"]) if ledger is not None else {}
    return template("report.html.j2").render(
        study=study,
        title=title,
        head=str(head),
        body=str(soup),
        answer=answer.decode_contents() if answer else "",
        opened=str(opened or ""),
        contents=contents,
        verdicts=[(v, counts[v]) for v in VERDICTS if counts.get(v)],
        run=run,
        colours=_code_colours(),
    )


@cache
def template(name: str):
    """A Jinja template of this folder.

    >>> from lib.reproduce.page import template
    >>> template("index.html.j2").name
    'index.html.j2'
    """
    loader = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=False)
    return loader.get_template(name)


@cache
def _code_colours() -> str:
    from pygments.formatters import HtmlFormatter

    light, dark = (
        HtmlFormatter(style=s, nobackground=True).get_style_defs(".highlight") for s in ("default", "monokai")
    )
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}"


def _taken(soup: BeautifulSoup, selector: str) -> Tag | None:
    """The first match, out of its place, and without the output around it that is empty then."""
    found = soup.select_one(selector)
    if found is None:
        return None
    output = found.find_parent(class_="jp-Cell-outputWrapper")
    found.extract()
    if output is not None and not output.get_text(strip=True) and not output.find("img"):
        output.decompose()
    return found


def _fold_code(soup: BeautifulSoup) -> None:
    """One fold for code cells that follow each other with nothing shown in between."""
    for cell, following in pairwise(soup.select(".jp-Cell")):
        code, next_code = cell.select_one("details.code"), following.select_one("details.code")
        if code and next_code and not cell.select_one(".jp-OutputArea-child"):
            code.summary.decompose()
            for part in reversed(list(code.contents)):
                next_code.summary.insert_after(part.extract())
            cell.decompose()


def _mark_verdicts(soup: BeautifulSoup) -> None:
    """Anchors and colours for the rows of the ledger, the table whose last column is a verdict with a measurement."""
    for table in soup.find_all("table"):
        heads = [th.get_text(strip=True) for th in table.select("thead th")]
        if heads[:1] == ["claim"] and heads[-1:] == ["verdict"] and "measured" in heads:
            for i, row in enumerate(table.select("tbody tr"), 1):
                row["id"] = f"claim-{i}"
                cell = row.find_all("td")[-1]
                cell["class"] = [*cell.get("class", []), cell.get_text(strip=True).replace(" ", "-")]
