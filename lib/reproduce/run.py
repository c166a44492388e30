"""One study in a process of its own, and what came of it."""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import psutil
import yaml

from lib.files import write_whole
from lib.reproduce.page import first_figure, outline, render
from lib.reproduce.plan import up_to_date_key
from lib.study import PROJECT, parameters, provenance


@dataclass(frozen=True)
class Run:
    """How a study's run ended.

    Attributes:
        key: of what it depended on, see `up_to_date_key`.
        error: of the failed cell, in one line; "" for a complete run. cell: its number, or None.
        title, answer: of the report, as HTML. figure: what its first one shows, "" without any.
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


class Interrupted(Exception):
    """The batch is being stopped: the run was ended and leaves nothing.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from threading import Event
    >>> from lib.reproduce import run_study
    >>> (stop := Event()).set()
    >>> with TemporaryDirectory() as folder:
    ...     run_study("01_lottery_ticket_vs_finetuning", {}, Path(folder), Path(folder), stop=stop)
    Traceback (most recent call last):
        ...
    lib.reproduce.run.Interrupted
    """


def last_run(study: str, reports: Path, *, failed: bool = False) -> Run | None:
    """The study's last complete run in a report folder, or the failure after it, if there is one.

    >>> from pathlib import Path
    >>> from lib.reproduce import last_run
    >>> last_run("01_lottery_ticket_vs_finetuning", Path("no/such/reports")) is None
    True
    """
    try:
        return Run(**json.loads(_record(study, reports, failed).read_text()))
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
) -> Run:
    """Run one study through Papermill and publish what came of it.

    All files come into being in a folder of this run alone and go to ``reports`` at the end, the record of the run
    last: whatever is killed, and whenever, a report is that of a complete run or the one before. A failed run leaves
    the last complete report as it is and puts its own page beside it, ``<study>.failed.html``.

    Args:
        report: is told how many cells are done, and of how many.
        stop: when set, the run is ended.

    Raises:
        Interrupted: ``stop`` was set. OSError: a folder cannot be written.

    >>> from pathlib import Path
    >>> from lib.reproduce import run_study
    >>> run_study("01_lottery_ticket_vs_finetuning", {"seeds": 0}, Path("reports"), Path("build"))
    Traceback (most recent call last):
        ...
    lib.study.parameters.ParameterError: seeds = 0: allowed are whole numbers from 1
    """
    key, started = up_to_date_key(study, values), time.monotonic()
    for left in build.glob(f"{study}.*.run"):  # of a batch that was killed; whoever calls holds the study's lock
        shutil.rmtree(left, ignore_errors=True)
    build.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{study}.", suffix=".run", dir=build))
    try:
        executed, stage = folder / f"{study}.ipynb", folder / reports.name  # claims tell the preset by its name
        where = stage.relative_to(PROJECT) if stage.is_relative_to(PROJECT) else stage
        given = folder / "parameters.yaml"
        write_whole(given, yaml.safe_dump(values | {"report_dir": where.as_posix()}))
        script = Path(__file__).with_name("execute.py")  # by its path: as a module it would import torch first
        command = [sys.executable, "-P", script, parameters.NOTEBOOKS / f"{study}.ipynb"]
        with (build / f"{study}.log").open("w") as log:
            process = subprocess.Popen(
                [*map(str, command), str(executed), str(given)], stdout=log, stderr=subprocess.STDOUT
            )
            memory = _watch(process, executed, report, stop)
        cell, error = failure(executed, process.returncode)
        took = {"minutes": round((time.monotonic() - started) / 60, 2), "memory_mb": memory}
        took |= {"finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), "provenance": provenance()}
        run = Run(study, key, error, cell, **outline(executed)._asdict(), **took)
        _publish(run, executed, stage, reports)
        if executed.is_file():
            executed.replace(build / executed.name)
        return run
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
        cells = json.loads(executed.read_text())["cells"]
    except (OSError, ValueError, KeyError):
        return 0, 0
    return sum(c["metadata"].get("papermill", {}).get("status") == "completed" for c in cells), len(cells)


def failure(executed: Path, returncode: int) -> tuple[int | None, str]:
    """The failed cell of an executed notebook and its error in one line; ``(None, "")`` if every cell really ran.

    Papermill calls every cell "completed" after a timeout, a dead kernel or Ctrl-C, so its exit code and an
    execution count on every code cell are asked for both. Cells are counted from 1, with text cells and without the
    one that Papermill injects.

    >>> from pathlib import Path
    >>> from tempfile import NamedTemporaryFile
    >>> from nbformat import v4, write
    >>> from lib.reproduce.run import failure
    >>> write(v4.new_notebook(cells=[v4.new_code_cell("x = 1")]), (file := NamedTemporaryFile()).name)
    >>> failure(Path(file.name), returncode=-9)
    (1, '1 of 1 cells did not run (exit code -9: killed, or the kernel died)')
    """
    try:
        cells = nbformat.read(executed, 4).cells
    except (OSError, ValueError):
        return None, f"papermill wrote no notebook (exit code {returncode})"
    own = [c for c in cells if "injected-parameters" not in c.metadata.get("tags", []) or c.get("outputs")]
    own = [c for c in own if "papermill-error-cell-tag" not in c.metadata.get("tags", [])]
    code = [(i, c) for i, c in enumerate(own, 1) if c.cell_type == "code" and c.source.strip()]
    for i, cell in code:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return i, f"{output.ename}: {output.evalue}".splitlines()[0]
    if missing := [i for i, c in code if c.execution_count is None]:
        how = f"exit code {returncode}: killed, or the kernel died"
        return missing[0], f"{len(missing)} of {len(code)} cells did not run ({how})"
    return None, f"papermill ended with exit code {returncode}" if returncode else ""


def _publish(run: Run, executed: Path, stage: Path, reports: Path) -> None:
    """Move a run's files to the reports, the record of it last."""
    record = _record(run.study, reports, bool(run.error))
    if run.error:
        if executed.is_file():
            write_whole(reports / f"{run.study}.failed.html", render(executed, run=asdict(run)))
    else:
        claims = stage / "claims" / f"{run.study}.csv"
        ledger = pd.read_csv(claims, keep_default_na=False) if claims.is_file() else None
        page = render(executed, run=asdict(run), ledger=ledger)
        record.unlink(missing_ok=True)  # from here to its new one the report is that of no run
        write_whole(reports / f"{run.study}.html", page)
        if run.figure:
            write_whole(reports / "figures" / f"{run.study}.svg", first_figure(page)[1])
        for file in stage.rglob("*.csv"):
            write_whole(reports / file.relative_to(stage), file.read_bytes())
        _record(run.study, reports, failed=True).unlink(missing_ok=True)
        (reports / f"{run.study}.failed.html").unlink(missing_ok=True)
    write_whole(record, json.dumps(asdict(run), indent=1) + "\n")
