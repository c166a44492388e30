"""What leads where in a report: a verdict to the figure that shows it, a figure to the rows that it was drawn from."""

import ast
import re
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

from nbformat import NotebookNode

CLAIMS = '<table class="claims"'


class Place(NamedTuple):
    """A code cell that was executed: its number, its section, and the anchors of its figures and tables."""

    cell: int
    section: int
    anchors: list[str]


def link(cells: list[NotebookNode], settled: Sequence[float], table: str, measured: Container[str]) -> None:
    """Number the figures of an executed notebook, and put links into them and into its table of claims.

    Args:
        settled: for every claim the cell that settled it, or NaN. table: where the measurements lie, from the page.
        measured: the experiments that have rows there; one that was asked for nothing has none.
    """
    rows, places, counts, section = experiments(cells), [], Counter(), 0
    for cell in cells:
        section += cell.cell_type == "markdown" and bool(re.search(r"^## ", cell.source, re.MULTILINE))
        place = Place(cell.get("execution_count"), section, [])
        for output, page in _pages(cell):
            kind = "figure" if "<figure" in page else "table" if "<table" in page and CLAIMS not in page else ""
            if kind:
                counts[kind] += 1
                place.anchors.append(f"{kind}-{counts[kind]}")
                said = ", ".join(f"<code>{name}</code>" for name in rows.get(place.cell, ()) if name in measured)
                of = f' <a href="{table}" download>Rows</a> of {said}.' if said else ""
                page = page.replace("</figcaption>", f"{of}</figcaption>")
                output.data["text/html"] = f'<div id="{place.anchors[-1]}">{page}</div>'
        places.append(place)
    for output, page in (found for cell in cells for found in _pages(cell) if CLAIMS in found[1]):
        for claim, at in enumerate(settled, 1):
            if anchor := _shows(places, at):
                verdict = rf'(<tr id="claim-{claim}">.*?<td class="verdict [^>]*>)(.*?)</td>'
                page = re.sub(verdict, rf'\1<a href="#{anchor}">\2</a></td>', page, count=1, flags=re.DOTALL)
        output.data["text/html"] = page


def _pages(cell: NotebookNode) -> Iterator[tuple[NotebookNode, str]]:
    """The outputs of a cell that are HTML, each with it."""
    for output in cell.get("outputs", []):
        if page := output.get("data", {}).get("text/html"):
            yield output, page


def _shows(places: list[Place], cell: float) -> str | None:
    """What shows what a cell settled: the first figure of its section from there on, else the last, else a table."""
    section = next((place.section for place in places if place.cell == cell), None)
    here = [(place.cell, anchor) for place in places if place.section == section for anchor in place.anchors]
    for kind in ("figure", "table"):
        own = [(at, anchor) for at, anchor in here if anchor.startswith(kind)]
        if own:
            return next((anchor for at, anchor in own if at >= cell), own[-1][1])
    return None


def experiments(cells: list[NotebookNode]) -> dict[int, list[str]]:
    """By executed cell, the experiments whose rows its last statement uses, followed through the names in between.

    >>> from lib.reproduce.links import experiments
    >>> from nbformat.v4 import new_code_cell
    >>> code = ["rows = study.measure(kept, [{}])", "means = rows.mean()", "other = 1", "plots.show(means)"]
    >>> experiments([new_code_cell(source, execution_count=i) for i, source in enumerate(code, 1)])
    {1: ['kept'], 2: ['kept'], 3: [], 4: ['kept']}
    """
    behind: dict[str, list[str]] = {}  # a name
    found, measuring = {}, {"measure"}
    for cell in cells:
        if cell.cell_type != "code" or cell.get("execution_count") is None:
            continue
        used = []
        for statement in _statements(cell.source):
            asked, read, written = _names(statement, measuring)
            if isinstance(statement, ast.FunctionDef) and {*asked} & {arg.arg for arg in statement.args.args}:
                measuring.add(statement.name)  # a short form of its own
                asked = []
            used = [*dict.fromkeys([name for n in behind if n in read for name in behind[n]] + asked)]
            behind |= dict.fromkeys(written, used)
        found[cell.execution_count] = used
    return found


def _statements(source: str) -> Iterator[ast.stmt]:
    """Those of a cell in their order; of a loop, what its names stand for and what is in it."""
    try:
        todo = ast.parse(source).body
    except SyntaxError:  # IPython's own commands
        return
    while todo:
        statement = todo.pop(0)
        if isinstance(statement, ast.For):
            todo = [ast.Assign([statement.target], statement.iter), *statement.body, *todo]
        elif isinstance(statement, ast.If | ast.With):
            todo = [*statement.body, *todo]
        else:
            yield statement


def _names(statement: ast.stmt, measuring: set[str]) -> tuple[list[str], set[str], set[str]]:
    """The experiments that a statement measures, the names that it reads, and those that it sets or changes a part of.

    What an experiment is asked for is in its rows, and what is named inside of a function or comprehension stays there.
    """
    asked, inside, nodes, todo = [], set(), [], [statement]
    while todo:
        node = todo.pop()
        nodes.append(node)
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).rpartition(".")[2] in measuring:
            asked.insert(0, ast.unparse(node.args[0]))
            continue
        inside |= {node.arg} if isinstance(node, ast.arg) else set()
        inside |= (
            {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
            if isinstance(node, ast.comprehension)
            else set()
        )
        todo += ast.iter_child_nodes(node)
    named = [node for node in nodes if isinstance(node, ast.Name)]
    written = {node.id for node in named if isinstance(node.ctx, ast.Store)} - inside
    parts = [node.value for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)]
    written |= {part.id for part in parts if isinstance(part, ast.Name)}
    if isinstance(statement, ast.FunctionDef):
        inside, written = inside | written, {statement.name}
    read = {node.id for node in named if isinstance(node.ctx, ast.Load)} - inside
    return asked, read | (written if isinstance(statement, ast.AugAssign) else set()), written
