"""The HTML report of an executed notebook: one file that opens anywhere, without a script or a request."""

import html
import re
from collections import Counter
from collections.abc import Container
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from nbformat import NotebookNode

from lib.reproduce.links import link
from lib.study import SAID

TEMPLATES = Path(__file__).resolve().parent / "templates"
WIDGET = "application/vnd.jupyter.widget-view+json"
VERDICTS = ("reproduced", "direction only", "not reproduced", "inconclusive")
HIGHLIGHTED = '<div class=" highlight'  # how nbconvert begins code
OPENING, OUTER = "provenance", {"provenance", "answer"}  # outputs that say these have places of their own in a page
FORMULA = re.compile(
    r"^ {0,3}(?P<fence>`{3,}|~{3,}).*?(?:^ {0,3}(?P=fence)|\Z)"  # what is code, or escaped, is no formula
    r"|(?<!`)(?P<ticks>`+)(?!`)(?:.(?!\n\s*\n))+?(?<!`)(?P=ticks)(?!`)|\\\$"
    r"|\$\$(?P<display>[^`]+?)\$\$"
    r"|\$(?=\S)(?P<inline>(?:\\.|[^`$\\\n]|\n(?!\s*\n))+?)(?<=\S)\$(?!\d)",  # by pandoc's rule: $5 to $10 is text
    re.DOTALL | re.MULTILINE,
)


def render(
    executed: Path,
    *,
    run: dict[str, Any] | None = None,
    ledger: pd.DataFrame | None = None,
    measured: Container[str] = (),
    source: str = "",
) -> str:
    """A self-contained HTML page of an executed notebook: answer and verdicts on top, provenance at the foot.

    Args:
        run: the record of the run, for the foot of the page.
        ledger: the study's claims, for the verdicts on top. measured: its experiments that have rows.
        source: where the notebook lies from the page, if it does.

    >>> from lib.reproduce import render
    >>> from lib.study import NOTEBOOKS
    >>> page = render(NOTEBOOKS / "01_lottery_ticket_vs_finetuning.ipynb")
    >>> page[:15], "<math" in page, "<script" in page
    ('<!doctype html>', True, False)
    """
    from nbconvert import HTMLExporter

    notebook, opened = nbformat.read(executed, 4), ""
    notebook.metadata.pop("widgets", None)  # a page has no kernel that would answer
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = mathml(cell.source)
        for output in list(cell.get("outputs", [])):
            output.get("data", {}).pop(WIDGET, None)
            if OUTER & said(output).keys():
                cell.outputs.remove(output)
                opened = output.data["text/html"] if OPENING in said(output) else opened
    if ledger is not None:
        link(notebook.cells, [*pd.to_numeric(ledger["cell"])], f"results/{executed.stem}.csv", measured)
    cells = folded(notebook.cells)
    first = int(cells[:1] != [] and cells[0].source.startswith("# "))  # the title stands before the answer
    options = {"exclude_input_prompt": True, "exclude_output_prompt": True}
    exporter = HTMLExporter(template_name="report", extra_template_basedirs=[str(TEMPLATES)], **options)
    exporter.register_filter("clean_html", _cleaned)
    parts = (nbformat.from_dict({**notebook, "cells": part}) for part in (cells[:first], cells[first:]))
    head, body = (scrolling(exporter.from_notebook_node(part)[0]) for part in parts)
    published = ledger[ledger["kind"] != "ours"] if ledger is not None else pd.DataFrame(columns=["kind", "verdict"])
    counts = Counter(published["verdict"])
    sums = int(((published["kind"] == "arithmetic") & (published["verdict"] == "reproduced")).sum())
    return template("report.html.j2").render(
        study=executed.stem,
        head=head,
        body=body,
        opened=opened,
        contents=re.findall(r'<h2 id="([^"]+)">(.*?)<a class="anchor-link"', body),
        verdicts=[(v, counts[v]) for v in VERDICTS if counts.get(v)],
        sums=sums,  # which say that we count as the paper does, and nothing of networks
        run=run,
        source=source,
        colours=_code_colours(),
        **outline(executed),
    )


def _cleaned(part: str) -> str:
    """A raw cell's HTML without what runs. Code is as Pygments escaped it: cleaning took a third of a page's time."""
    from nbconvert.filters import clean_html

    return part if part.startswith(HIGHLIGHTED) else clean_html(part)


def outline(executed: Path) -> dict[str, Any]:
    """What an executed notebook, or what there is of it, says as data.

    Of several figures it is the first after the claims, whose results it shows; before them stand those of the method.

    Returns:
        ``title`` and ``answer``, as HTML, ``evidence``, ``figure``, ``svg``, ``provenance``; "" for what is not said.
    """
    try:
        cells = nbformat.read(executed, 4).cells
    except (OSError, ValueError):
        cells = []
    claims = next((i for i, c in enumerate(cells) if re.search(r"^## Claims$", c.source, re.MULTILINE)), 0)
    results = [said(output) for cell in cells[claims:] for output in cell.get("outputs", [])]
    told = [s for s in results if "figure" in s]
    told += [said(output) for cell in cells for output in cell.get("outputs", [])]
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    title = next((m[1] for text in texts if (m := re.search(r"^# (.+)$", text, re.MULTILINE))), executed.stem)
    found = {
        key: next((s[key] for s in told if key in s), "")
        for key in ("answer", "evidence", "figure", "svg", "provenance")
    }
    return {"title": html.escape(title)} | found


def scrolling(page: str) -> str:
    """Every table in a frame of its own, which scrolls where the table is wider than the page; text too, by keys."""
    frame = r'<div class="scroll" tabindex="0">\g<0></div>'
    return re.sub(r"<table\b.*?</table>", frame, page.replace("<pre>", '<pre tabindex="0">'), flags=re.DOTALL)


def said(output: NotebookNode) -> dict[str, Any]:
    """What an output of a notebook says as data, see `lib.study.Shown`."""
    return output.get("data", {}).get(SAID, {})


def folded(cells: list[NotebookNode]) -> list[NotebookNode]:
    """Cells as a page has them: code with nothing shown in between is one; none that is empty or Papermill's own."""
    found: list[NotebookNode] = []
    for cell in cells:
        if not cell.source.strip() or "papermill-error-cell-tag" in cell.metadata.get("tags", []):
            continue
        if found and cell.cell_type == found[-1].cell_type == "code" and not found[-1].outputs:
            cell.source = f"{found.pop().source}\n\n{cell.source}"
        found.append(cell)
    return found


def mathml(markdown: str) -> str:
    """``$$...$$`` and ``$...$`` as MathML, which browsers draw without a script; a formula that is none stays text."""
    from latex2mathml.converter import convert

    def drawn(match: re.Match) -> str:
        try:
            if match["display"]:
                block = convert(match["display"].strip(), display="block")
                return block.replace("<math ", '<math tabindex="0" ', 1)  # it scrolls where the page is narrow
            return convert(match["inline"]) if match["inline"] else match[0]
        except Exception:  # it raises errors of many types, and a formula as text is better than no report
            return match[0]

    return FORMULA.sub(drawn, markdown)


@cache
def template(name: str):
    """A Jinja template of this folder."""
    loader = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=False)
    return loader.get_template(name)


@cache
def _code_colours() -> str:
    from pygments.formatters import HtmlFormatter

    light, dark = (
        HtmlFormatter(style=s, nobackground=True).get_style_defs(".highlight") for s in ("default", "monokai")
    )
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}"
