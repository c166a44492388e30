"""One study in a process of its own, and what came of it."""

import html
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import psutil

from lib.files import write_whole
from lib.reproduce.page import outline, render
from lib.reproduce.plan import up_to_date_key
from lib.study import PROJECT, Audit, parameters, provenance


@dataclass(frozen=True)
class Run:
    """How a study's run ended.

    Attributes:
        key: of what it depended on, see `up_to_date_key`.
        error: of the failed cell, in one line; "" for a complete run. cell: its number, or None.
        title, answer: of the report, as HTML. figure: what its first one shows, "" without any.
        evidence: how many measurements it rests on, and where they are from.
        minutes: of wall time, with whatever came from the cache. memory_mb: most memory of all its processes together,
            looked at three times a second. finished: UTC, to the minute.

    >>> from lib.reproduce import Run
    >>> took = {"minutes": 1.5, "memory_mb": 900, "finished": "2026-01-31 12:00", "provenance": {}}
    >>> run = Run("09_mine", "key", error="ValueError: why", cell=3, title="Mine", answer="", figure="", **took)
    >>> f"failed in cell {run.cell}: {run.error}"
    'failed in cell 3: ValueError: why'
    """

    study: str
    key: str
    error: str
    cell: int | None
    title: str
    answer: str
    figure: str
    minutes: float
    memory_mb: int
    finished: str
    provenance: dict[str, Any]
    evidence: str = ""


class Interrupted(Exception):
    """The batch is being stopped: the run was ended and leaves nothing."""


def last_run(study: str, reports: Path, *, failed: bool = False) -> Run | None:
    """The study's last complete run in a report folder, or the failure after it, if there is one.

    >>> from pathlib import Path
    >>> from lib.reproduce import last_run
    >>> last_run("01_lottery_ticket_vs_finetuning", Path("no/such/reports")) is None
    True
    """
    try:
        return Run(**json.loads(_record(study, reports, failed).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _record(study: str, reports: Path, failed: bool) -> Path:
    return reports / "runs" / f"{study}{'.failed' * failed}.json"


def run_study(
    study: str,
    values: dict[str, Any],
    reports: Path,
    build: Path,
    report: Callable[[int, int], None] = lambda done, total: None,
    stop: threading.Event | None = None,
    audit: Audit | None = None,
) -> Run:
    """Run one study through Papermill and publish what came of it.

    All files come into being in a folder of this run alone and go to ``reports`` at the end, the record of the run
    last: whatever is killed, and whenever, a report is that of a complete run or the one before. A failed run leaves
    the last complete report as it is and puts its own page beside it, ``<study>.failed.html``.

    Args:
        report: is told how many cells are done, and of how many.
        stop: when set, the run is ended.
        audit: which of the measurements that earlier code made to make again.

    Raises:
        Interrupted: ``stop`` was set. OSError: a folder cannot be written.

    >>> from pathlib import Path
    >>> from lib.reproduce import run_study
    >>> run_study("01_lottery_ticket_vs_finetuning", {"seeds": 0}, Path("reports"), Path("build"))
    Traceback (most recent call last):
        ...
    lib.study.ranges.ParameterError: seeds = 0: expected 1 or more
    """
    key, started = up_to_date_key(study, values), time.monotonic()
    for left in build.glob(f"{study}.*.run"):  # of a batch that was killed; whoever calls holds the study's lock
        shutil.rmtree(left, ignore_errors=True)
    folder, stage, executed = _stage(study, reports, build)
    log = build / f"{study}.log"
    try:
        process = _start(study, values, folder, stage, log, audit)
        memory = _watch(process, executed, report, stop)
        cell, error = failure(executed, process.returncode, f"build/{build.name}/{log.name}")
        if others := [f.relative_to(stage).as_posix() for f in stage.rglob("*.*") if f.stem != study]:
            error = error or f"it wrote {', '.join(others)}: expected files of its own name"
        told = outline(executed)
        svg, seen = told.pop("svg"), told.pop("provenance") or provenance()
        took = {"minutes": round((time.monotonic() - started) / 60, 2), "memory_mb": memory}
        took |= {"finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), "provenance": seen}
        if executed.is_file():
            executed = executed.replace(build / executed.name)
        return _publish(Run(study, key, error, cell, **told, **took), executed, svg, stage, reports)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def assist(study: str, values: dict[str, Any], reports: Path, build: Path, stop: Callable[[], bool]) -> None:
    """Run a study beside the run of it that counts, and share its work: what one measures, the other reads.

    What it would publish is thrown away. It ends when it is through, or when ``stop()`` says so.
    """
    folder, stage, _ = _stage(study, reports, build)
    try:
        process = _start(study, values, folder, stage, folder / "assist.log", None)
        while process.poll() is None and not stop():
            time.sleep(0.5)
        if process.poll() is None:
            process.terminate()
            process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stage(study: str, reports: Path, build: Path) -> tuple[Path, Path, Path]:
    """A folder of this run alone, its own report folder with the measurements that there are, and its notebook."""
    build.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{study}.", suffix=".run", dir=build))
    stage = folder / reports.name  # claims tell the preset by its name
    table = reports / "results" / f"{study}.csv"
    if table.is_file():
        write_whole(stage / "results" / table.name, table.read_bytes())
    return folder, stage, folder / f"{study}.ipynb"


def _start(study: str, values: dict, folder: Path, stage: Path, log: Path, audit: Audit | None) -> subprocess.Popen:
    where = stage.relative_to(PROJECT) if stage.is_relative_to(PROJECT) else stage
    given = folder / "parameters.json"
    write_whole(given, json.dumps(values | {"report_dir": where.as_posix()}))
    script = Path(__file__).with_name("execute.py")  # by its path: as a module it would import torch first
    notebook = parameters.NOTEBOOKS / f"{study}.ipynb"
    command = [sys.executable, "-P", script, notebook, folder / notebook.name, given]
    own = os.environ | {"WORKBOOK_STUDY": study, "WORKBOOK_AUDIT": str(audit or "")}
    with log.open("wb") as file:
        return subprocess.Popen([*map(str, command)], stdout=file, stderr=subprocess.STDOUT, env=own)


def _watch(process: subprocess.Popen, executed: Path, report: Callable, stop: threading.Event | None) -> int:
    """Wait for the process to end; its most memory in MB."""
    most = 0
    try:
        while process.poll() is None:
            if stop is not None and stop.is_set():
                raise Interrupted
            time.sleep(0.3)
            most = max(most, _memory(process.pid))
            report(*_cells(executed))
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    return most


def _memory(pid: int) -> int:
    try:
        parent = psutil.Process(pid)
        return sum(p.memory_info().rss for p in (parent, *parent.children(recursive=True))) // 2**20
    except psutil.Error:  # it ended meanwhile
        return 0


def _cells(executed: Path) -> tuple[int, int]:
    """How many cells of a running notebook are finished, and of how many: Papermill saves after each."""
    try:
        cells = json.loads(executed.read_text("utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return 0, 0
    return sum(c["metadata"].get("papermill", {}).get("status") == "completed" for c in cells), len(cells)


def failure(executed: Path, returncode: int, log: str) -> tuple[int | None, str]:
    """The failed cell of an executed notebook and its error in one line; ``(None, "")`` if every cell really ran.

    Papermill calls every cell "completed" after a timeout, a dead kernel or Ctrl-C, so its exit code and an
    execution count on every code cell are asked for both. Cells are counted from 1, with text cells and without the
    one that Papermill injects. Where no cell says why, the error names the ``log``.
    """
    try:
        cells = nbformat.read(executed, 4).cells
    except (OSError, ValueError):
        return None, f"papermill wrote no notebook (exit code {returncode}), see {log}"
    own = [c for c in cells if "injected-parameters" not in c.metadata.get("tags", []) or c.get("outputs")]
    own = [c for c in own if "papermill-error-cell-tag" not in c.metadata.get("tags", [])]
    code = [(i, c) for i, c in enumerate(own, 1) if c.cell_type == "code" and c.source.strip()]
    for i, cell in code:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return i, f"{output.ename}: {output.evalue}".splitlines()[0]
    if missing := [i for i, c in code if c.execution_count is None]:
        how = f"exit code {returncode}: killed, or the kernel died"
        return missing[0], f"{len(missing)} of {len(code)} cells did not run ({how}), see {log}"
    return None, f"papermill ended with exit code {returncode}, see {log}" if returncode else ""


def _publish(run: Run, executed: Path, svg: str, stage: Path, reports: Path) -> Run:
    """Move a run's files to the reports: what it measured, then its page, the record of it last."""
    claims, rows = (stage / kind / f"{run.study}.csv" for kind in ("claims", "results"))
    ledger = pd.read_csv(claims, keep_default_na=False) if claims.is_file() and not run.error else None
    if not run.error:
        for file in stage.rglob("*.csv"):
            write_whole(reports / file.relative_to(stage), file.read_bytes())
        if svg:
            write_whole(reports / "figures" / f"{run.study}.svg", svg)
    try:
        notebook = parameters.NOTEBOOKS / f"{run.study}.ipynb"
        source = os.path.relpath(notebook, reports) if reports.is_relative_to(PROJECT) else ""
        measured = {*pd.read_csv(rows, low_memory=False).get("experiment", [])} if rows.is_file() else ()
        page = render(executed, run=asdict(run), ledger=ledger, measured=measured, source=source)
    except Exception as error:  # a page can be laid out again, a run may have taken hours
        said = f"its page could not be laid out, its results are kept: {type(error).__name__}: {error}".splitlines()[0]
        run = replace(run, error=run.error or said)
        page = f'<!doctype html><meta charset="utf-8"><title>{run.study}</title><p>{html.escape(run.error)}</p>'
    record, failed = (_record(run.study, reports, failed) for failed in (bool(run.error), True))
    if run.error:
        write_whole(reports / f"{run.study}.failed.html", page)
    else:
        record.unlink(missing_ok=True)  # from here to its new one the report is that of no run
        write_whole(reports / f"{run.study}.html", page)
        failed.unlink(missing_ok=True)
        (reports / f"{run.study}.failed.html").unlink(missing_ok=True)
    write_whole(record, json.dumps(asdict(run), indent=1) + "\n")
    return run
