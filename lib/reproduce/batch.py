"""The batch: what is not up to date runs, several studies at a time, and a failure stops no other."""

import concurrent.futures
import hashlib
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from tqdm import tqdm

from lib.files import write_whole
from lib.reproduce.index import write_index
from lib.reproduce.plan import chosen, preset_parameters, up_to_date_key
from lib.reproduce.run import Run, assist, last_run, run_study
from lib.study import PROJECT, Audit, ParameterError, studies
from lib.study.tables import merge


def folders(preset: str, reports: Path | None = None) -> tuple[Path, Path]:
    """Where reports go, and where executed notebooks, logs and locks of the runs behind them lie."""
    reports = (reports or PROJECT / "reports" / preset).resolve()
    own = reports.parent == PROJECT / "reports"
    return reports, PROJECT / "build" / (reports.name if own else hashlib.sha256(str(reports).encode()).hexdigest()[:8])


def state(study: str, values: dict[str, Any], reports: Path) -> str:
    """``never ran``, ``failed``, ``stale`` (what it depends on has changed since) or ``complete``."""
    if last_run(study, reports, failed=True):
        return "failed"
    run = last_run(study, reports)
    if run is None or not (reports / f"{study}.html").is_file():
        return "never ran"
    return "complete" if run.key == up_to_date_key(study, values) else "stale"


def overview(parameters: dict[str, dict[str, Any]], reports: Path) -> pd.DataFrame:
    """Each study's state, and the time and memory of its last complete run."""
    rows = []
    for study, values in parameters.items():
        run = last_run(study, reports)
        row = {"study": study, "state": state(study, values, reports)}
        rows.append(row | {"minutes": run.minutes if run else None, "memory_mb": run.memory_mb if run else None})
    return pd.DataFrame(rows, columns=["study", "state", "minutes", "memory_mb"])


def reproduce(
    preset: str,
    *,
    only: Sequence[str] | None = None,
    changed: dict[str, Any] | None = None,
    jobs: int = 1,
    force: bool = False,
    reports: Path | None = None,
    audit: Audit | None = None,
) -> dict[str, str]:
    """Run the studies of a preset in ``jobs`` processes, and write reports, claims and index.

    Where there are more processes than studies left, several share one: each measures what no other is at.

    A failed study does not stop the others: a page shows the failing cell, the index shows it red. Another batch on the
    same reports is waited for, study by study, and what it has run is not run again.

    Args:
        only: studies, by name or number. changed: parameters over those of the preset, for these studies.
        force: run studies again that are up to date.
        audit: which of the measurements that earlier code made to make again; studies then run again.

    Returns:
        By study, the error of its last run, or "".

    Raises:
        ParameterError: the preset or a study's parameters are wrong, or an unknown study is asked for.
        OSError: the report folder cannot be written.

    >>> from lib.reproduce import reproduce
    >>> reproduce("smoke", only=["99"])
    Traceback (most recent call last):
        ...
    lib.study.ranges.ParameterError: study '99' is unknown: allowed are 00_start_here, ...
    """
    parameters = preset_parameters(preset, changed, only)
    asked = chosen(parameters, only)
    reports, build = folders(preset, reports)
    write_whole(reports / ".writable", "")  # a read-only folder is refused now, not after an hour
    (reports / ".writable").unlink(missing_ok=True)
    build.mkdir(parents=True, exist_ok=True)
    force = force or audit is not None
    states = _states(parameters, reports)
    todo = [s for s in asked if force or states[s] != "complete"]
    errors = _run_all(todo, parameters, states, reports, build, jobs, force, audit) if todo else {}
    _index(_states(parameters, reports) if todo else states, reports, build)
    return {s: errors.get(s, "") for s in asked}


def merged(preset: str, other: Path, reports: Path | None = None) -> dict[str, tuple[int, int]]:
    """Add the measurements of another report folder to those of a preset, see `lib.study.tables.merge`.

    A study that runs is waited for: it publishes the table that it began with.

    Returns:
        By study, how many were added and how many replaced.

    Raises:
        ParameterError: the other folder has none. MeasurementError, OSError: as there.
    """
    reports, build = folders(preset, reports)
    found = {file.stem: file for file in sorted((other / "results").glob("*.csv")) if file.stem in studies()}
    if not found:
        raise ParameterError(f"{other} has no results/*.csv of a study")
    build.mkdir(parents=True, exist_ok=True)
    counts = {}
    for study, file in found.items():
        with FileLock(build / f"{study}.lock"):
            counts[study] = merge(reports / "results" / f"{study}.csv", file)
    return counts


def _states(parameters: dict[str, dict], reports: Path) -> dict[str, str]:
    return {study: state(study, values, reports) for study, values in parameters.items()}


def _index(states: dict[str, str], reports: Path, build: Path) -> None:
    with FileLock(build / "index.lock"):
        write_index(reports, states)


def _unsettled(claims: Path) -> str:
    """The claims that a run left without a measurement: by its parameters, or because a notebook forgot them."""
    if not claims.is_file():
        return ""
    ledger = pd.read_csv(claims)
    left = [f"{text:.40}" for text in ledger["claim"][ledger["n"] == 0]]
    return f"; claims without a measurement: {', '.join(left)}" if left else ""


@dataclass
class _Running:
    """A study that runs: since when, how many other processes have joined it, and whether it is over."""

    study: str
    since: float = field(default_factory=time.monotonic)
    joined: int = 0
    over: bool = False


def _run_all(
    todo: list[str],
    parameters: dict[str, dict],
    states: dict[str, str],
    reports: Path,
    build: Path,
    jobs: int,
    force: bool,
    audit: Audit | None,
) -> dict[str, str]:
    stop, done = threading.Event(), dict.fromkeys(todo, 0.0)
    current: dict[str, str] = {}
    helped: dict[str, _Running] = {}
    running: dict[concurrent.futures.Future, str] = {}
    bar = tqdm(
        total=len(todo),
        desc="studies",
        bar_format="{desc} {bar} {n:.1f}/{total} [{elapsed}<{remaining}]{postfix}",
        mininterval=0.2 if sys.stderr.isatty() else 60,  # a file or a CI log gets a line now and then, not megabytes
        miniters=0,
    )

    def tell(study: str, cells: int, total: int) -> None:
        if total:
            current[study], fraction = f"{study.split('_')[0]}: cell {cells} of {total}", cells / total
            bar.set_postfix_str(", ".join(current.values()), refresh=False)
            bar.update(fraction - done[study])
            done[study] = fraction

    def work(study: str) -> Run | None:
        with FileLock(build / f"{study}.lock"):
            if not force and state(study, parameters[study], reports) == "complete":  # another batch ran it
                return None
            own = helped[study] = _Running(study)
            try:
                told = lambda *cells: tell(study, *cells)  # noqa: E731
                return run_study(study, parameters[study], reports, build, told, stop, audit)
            finally:
                own.over = True
                helped.pop(study, None)
                current.pop(study, None)

    def share() -> None:
        """A process that has no study of its own joins the run that the fewest have joined."""
        while not stop.is_set() and not all(future.done() for future in running):
            time.sleep(1)
            long = [run for run in [*helped.values()] if time.monotonic() > run.since + 20]
            run = min(long, key=lambda run: run.joined, default=None)
            if run is not None:
                run.joined += 1
                assist(run.study, parameters[run.study], reports, build, lambda run=run: stop.is_set() or run.over)
                run.over or time.sleep(10)  # it was through before the run itself: nothing is left to share

    errors: dict[str, str] = {}
    with bar, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running |= {pool.submit(work, study): study for study in todo}
        for _ in range(jobs if audit is None else 0):
            pool.submit(share)
        try:
            for future in concurrent.futures.as_completed(running):
                study = running[future]
                try:
                    run = future.result()
                    errors[study] = run.error if run else ""
                    text = f"{run.minutes:.1f} min, {run.memory_mb} MB" if run else "ran in another batch"
                    text += "" if errors[study] else _unsettled(reports / "claims" / f"{study}.csv")
                except Exception as error:  # a full disk, a page that cannot be laid out: this study's, not the batch's
                    errors[study], text = f"{type(error).__name__}: {error}".splitlines()[0], "not published"
                bar.update(1 - done[study])
                bar.write(f"{study}: {errors[study] or 'complete'} ({text})", file=sys.stderr)
                states[study] = state(study, parameters[study], reports)  # its own alone: the keys of all take seconds
                _index(states, reports, build)  # each page is there as soon as it is done
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return errors
