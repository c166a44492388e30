"""Batch runs: every study through Papermill at a preset, rendered to HTML, with an index of all claims.

``python -m lib.reproduce --preset quick`` resumes: a study whose notebook, parameters and code are those of its last
good run is left alone, and inside a study every finished training run comes from the cache.
"""

import argparse
import base64
import concurrent.futures
import hashlib
import html
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import yaml
from tqdm import tqdm

from lib.files import write_whole
from lib.plots import VERDICT_COLOURS, measured
from lib.study import CLAIM_COLUMNS, NOTEBOOKS, PROJECT, ParameterError, check_parameters

TEMPLATE = Path(__file__).resolve().parent / "template"


@dataclass(frozen=True)
class Outcome:
    """How one study's last run ended: ``key`` of what it ran, the error or "", and how long it took."""

    study: str
    key: str
    error: str
    minutes: float
    has_figure: bool


def studies() -> list[str]:
    """The names of all study notebooks, in order."""
    return sorted(p.stem for p in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def presets() -> list[str]:
    """The names of the presets that exist."""
    return sorted(p.stem for p in (NOTEBOOKS / "presets").glob("*.yaml"))


def preset_parameters(preset: str) -> dict[str, dict[str, Any]]:
    """Each study's parameters at a preset, checked.

    Raises:
        ParameterError: unknown preset, a study that does not exist, or a parameter that its notebook refuses.
    """
    if preset not in presets():
        raise ParameterError(f"preset {preset!r} is unknown: allowed are {', '.join(presets())}")
    given = yaml.safe_load((NOTEBOOKS / "presets" / f"{preset}.yaml").read_text()) or {}
    for study, parameters in given.items():
        check_parameters(study, parameters or {})
    return {study: given.get(study) or {} for study in studies()}


def prepare(preset: str, folder: Path) -> None:
    """Write every notebook with the preset's parameters injected, and run none: the input of nbval."""
    from papermill import execute_notebook

    folder.mkdir(parents=True, exist_ok=True)
    for study, parameters in preset_parameters(preset).items():
        target = folder / f"{study}.ipynb"
        execute_notebook(
            NOTEBOOKS / f"{study}.ipynb",
            target,
            parameters,
            kernel_name="python3",
            prepare_only=True,
            progress_bar=False,
        )


# --- one study --------------------------------------------------------------------------------------------------------


def _key(study: str, parameters: dict[str, Any]) -> str:
    """Changes when the notebook's source, its parameters or any code of ``lib`` changes."""
    cells = [c.source for c in nbformat.read(NOTEBOOKS / f"{study}.ipynb", 4).cells]
    code = [p.read_text() for p in sorted((PROJECT / "lib").rglob("*")) if p.suffix in (".py", ".j2")]
    return hashlib.sha256(json.dumps([cells, parameters, code], sort_keys=True).encode()).hexdigest()[:16]


def _cells_done(executed: Path) -> int:
    """How many cells of a running notebook are finished: Papermill saves after each."""
    try:
        cells = json.loads(executed.read_text())["cells"]
    except (OSError, ValueError, KeyError):
        return 0
    return sum(c["metadata"].get("papermill", {}).get("status") == "completed" for c in cells)


def _failure(executed: Path, returncode: int) -> str:
    """The error of an executed notebook in one line, "" if every code cell really ran.

    Papermill calls every cell "completed" after a timeout, a dead kernel or Ctrl-C, so its exit code and an
    execution count on every code cell are asked for both.
    """
    try:
        cells = nbformat.read(executed, 4).cells
    except (OSError, ValueError):
        return f"papermill wrote no notebook (exit code {returncode})"
    code = [c for c in cells if c.cell_type == "code" and c.source.strip()]
    for cell in code:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return f"{output.ename}: {output.evalue}".splitlines()[0]
    if missing := sum(c.execution_count is None for c in code):
        return f"{missing} of {len(code)} cells did not run (exit code {returncode}: killed, or the kernel died)"
    return f"papermill ended with exit code {returncode}" if returncode else ""


def run_study(study: str, parameters: dict[str, Any], reports: Path, build: Path, bar: tqdm | None = None) -> Outcome:
    """Run one study through Papermill in a process of its own, and render what came of it, failed or not."""
    key, started = _key(study, parameters), time.monotonic()
    executed, log = build / f"{study}.ipynb", build / f"{study}.log"
    values = build / f"{study}.yaml"
    executed.unlink(missing_ok=True)
    where = reports.relative_to(PROJECT) if reports.is_relative_to(PROJECT) else reports
    write_whole(values, yaml.safe_dump(parameters | {"report_dir": where.as_posix()}))
    command = [sys.executable, "-m", "papermill", NOTEBOOKS / f"{study}.ipynb", executed, "-k", "python3", "-f", values]
    with log.open("w") as output:
        process = subprocess.Popen([str(c) for c in command], stdout=output, stderr=subprocess.STDOUT)
        try:
            seen = 0
            while process.poll() is None:
                time.sleep(0.3)
                if bar is not None:
                    done = _cells_done(executed)
                    bar.update(done - seen)
                    seen = done
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    error = _failure(executed, process.returncode)
    first = None
    if executed.is_file():
        page = render(executed)
        write_whole(reports / f"{study}.html", page)
        if first := re.search(r'<img[^>]* src="data:image/svg\+xml;base64,([^"]+)"', page):
            write_whole(reports / "figures" / f"{study}.svg", base64.b64decode(first[1]))
    outcome = Outcome(study, key, error, round((time.monotonic() - started) / 60, 2), first is not None)
    write_whole(build / f"{study}.json", json.dumps(asdict(outcome)))
    return outcome


def render(executed: Path) -> str:
    """A self-contained HTML page of an executed notebook: equations as MathML, code folded, no script, no request."""
    from nbconvert import HTMLExporter

    notebook = nbformat.read(executed, 4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _mathml(cell.source)
    notebook.cells = [c for c in notebook.cells if c.source.strip()]
    heading = re.search(r"^# (.+)$", notebook.cells[0].source, re.MULTILINE)
    exporter = HTMLExporter(template_name=TEMPLATE.name, extra_template_basedirs=[str(TEMPLATE.parent)])
    title = heading[1] if heading else executed.stem
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
    return page


def _mathml(markdown: str) -> str:
    """``$$...$$`` and ``$...$`` as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    markdown = re.sub(r"\$\$(.+?)\$\$", lambda m: convert(m[1].strip(), display="block"), markdown, flags=re.DOTALL)
    return re.sub(r"(?<![\\$])\$([^$\n]+?)\$", lambda m: convert(m[1]), markdown)


# --- the index --------------------------------------------------------------------------------------------------------


def write_index(reports: Path, outcomes: list[Outcome]) -> None:
    """``claims.csv`` from the studies' own claims, and ``index.html``: studies, then the ledger by system."""
    found = [pd.read_csv(path, keep_default_na=False) for path in sorted((reports / "claims").glob("*.csv"))]
    ledger = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=[*CLAIM_COLUMNS])
    for column in ("measured", "low", "high"):
        ledger[column] = pd.to_numeric(ledger[column])
    write_whole(reports / "claims.csv", ledger[[*CLAIM_COLUMNS]].to_csv(index=False))
    write_whole(reports / "index.html", _index_page(reports.name, ledger, outcomes))


def _index_page(preset: str, ledger: pd.DataFrame, outcomes: list[Outcome]) -> str:
    def row(*cells: str, tag: str = "td") -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    def coloured(text: str, colour: str) -> str:
        return f'<strong style="color:{colour}">{html.escape(text)}</strong>'

    lines = [row("study", "state", "minutes (beside cached runs)", "claims", "first figure", tag="th")]
    for o in outcomes:
        state = coloured(f"failed: {o.error}", "#b42318") if o.error else "complete"
        counts = ledger.loc[ledger["study"] == o.study, "verdict"].value_counts()
        verdicts = ", ".join(coloured(f"{n} {v}", VERDICT_COLOURS[v]) for v, n in counts.items())
        link = f'<a href="{o.study}.html">{o.study}</a>'
        figure = (
            f'<img src="figures/{o.study}.svg" alt="first figure of {o.study}" width="420">' if o.has_figure else ""
        )
        lines.append(row(link, state, f"{o.minutes:.1f}", verdicts, figure))
    parts = [f"<table>{''.join(lines)}</table><h2>Ledger of published claims</h2>"]
    for system, claims in ledger.groupby("system"):
        rows = [row("claim", "published", "criterion", "measured, 95 % interval", "n", "verdict", "study", tag="th")]
        for c in claims.to_dict("records"):
            text = [html.escape(str(c[k])) for k in ("claim", "published", "criterion")]
            link = f'<a href="{c["study"]}.html">{c["dataset"]}, {c["model"]}</a>'
            verdict = coloured(c["verdict"], VERDICT_COLOURS[c["verdict"]])
            rows.append(row(*text, html.escape(measured(c)), str(c["n"]), verdict, link))
        parts.append(f"<h3>{html.escape(str(system))}</h3><table>{''.join(rows)}</table>")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:80em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;font-size:14px}td,th{border-bottom:1px solid #ddd;padding:.35em .8em;"
        "text-align:left;vertical-align:top}th{color:#555}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Studies, preset {preset}</title>'
        f"<style>{style}</style></head><body><h1>Studies at the <code>{html.escape(preset)}</code> preset</h1>"
        "<p>Every study runs a published claim against measurements of our own. A verdict is computed from the data: "
        "<em>reproduced</em> when the whole 95 % interval meets a criterion fixed before the run, "
        "<em>not reproduced</em> when none of it does, <em>inconclusive</em> otherwise. The same table as data: "
        f'<a href="claims.csv">claims.csv</a>.</p>{"".join(parts)}</body></html>'
    )


# --- the batch --------------------------------------------------------------------------------------------------------


def last_outcome(study: str, build: Path) -> Outcome | None:
    """How the study's last run in this build folder ended, if there was one."""
    try:
        return Outcome(**json.loads((build / f"{study}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def build_folder(reports: Path) -> Path:
    """Where executed notebooks, logs and outcomes of the runs behind a report folder lie."""
    reports = reports.resolve()
    own = reports.parent == PROJECT / "reports"
    return PROJECT / "build" / (reports.name if own else hashlib.sha256(str(reports).encode()).hexdigest()[:8])


def reproduce(
    preset: str, *, only: list[str] | None = None, jobs: int = 1, force: bool = False, reports: Path | None = None
) -> list[Outcome]:
    """Run the studies of a preset, ``jobs`` at a time, and write reports, claims and index.

    A failed study does not stop the others: its report shows the failing cell, the index shows it red.

    Raises:
        ParameterError: the preset or a study's parameters are wrong, or an unknown study is asked for.
        OSError: the report folder cannot be written.
    """
    parameters = preset_parameters(preset)
    if unknown := [name for name in only or [] if name not in parameters]:
        raise ParameterError(f"study {unknown[0]!r} is unknown: allowed are {', '.join(parameters)}")
    reports = (reports or PROJECT / "reports" / preset).resolve()
    build = build_folder(reports)
    write_whole(reports / ".writable", "")  # a read-only folder is refused now, not after an hour
    (reports / ".writable").unlink()
    build.mkdir(parents=True, exist_ok=True)

    todo = []
    for study in only or parameters:
        last = last_outcome(study, build)
        fresh = last and not last.error and last.key == _key(study, parameters[study])
        if force or not fresh or not (reports / f"{study}.html").is_file():
            todo.append(study)
    cells = sum(len(nbformat.read(NOTEBOOKS / f"{s}.ipynb", 4).cells) + 1 for s in todo)
    with (
        tqdm(
            total=cells, unit="cell", desc=f"{len(todo)} of {len(parameters)} studies to run", disable=not todo
        ) as bar,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        started = [pool.submit(run_study, s, parameters[s], reports, build, bar) for s in todo]
        for future in concurrent.futures.as_completed(started):
            outcome = future.result()
            bar.write(f"{outcome.study}: {outcome.error or 'complete'} ({outcome.minutes:.1f} min)", file=sys.stderr)
    outcomes = [o for study in parameters if (o := last_outcome(study, build))]
    write_index(reports, outcomes)
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 when a study failed, 2 when it was asked for something that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m lib.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="quick", help=f"one of {', '.join(presets())} (default: quick)")
    parser.add_argument("--only", nargs="+", metavar="STUDY", help="run only these studies")
    parser.add_argument("--jobs", type=int, default=1, help="studies at a time (default: 1)")
    parser.add_argument("--force", action="store_true", help="run studies again that are up to date")
    parser.add_argument("--reports", type=Path, metavar="DIR", help="write reports here, not to reports/PRESET")
    parser.add_argument("--prepare-only", type=Path, metavar="DIR", help="write notebooks with parameters, run none")
    options = parser.parse_args(arguments)
    try:
        if options.jobs < 1:
            raise ParameterError(f"--jobs {options.jobs}: allowed are whole numbers from 1")
        if options.prepare_only:
            prepare(options.preset, options.prepare_only)
            return 0
        outcomes = reproduce(
            options.preset, only=options.only, jobs=options.jobs, force=options.force, reports=options.reports
        )
    except (ParameterError, OSError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    where = options.reports or Path("reports") / options.preset
    sys.stderr.write(f"open {where / 'index.html'}\n")
    return 1 if any(o.error for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
