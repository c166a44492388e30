"""The command line of the batch."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import psutil

from lib.reproduce.batch import folders, merged, overview, reproduce
from lib.reproduce.plan import chosen, given, prepare, preset_parameters, presets
from lib.study import PROJECT, Audit, MeasurementError, ParameterError, parameters, studies
from lib.study.tables import read_table


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, 1 when a study failed, 2 when it was asked for something that cannot be, 130 when interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return _answer(options)
    except (ParameterError, MeasurementError, OSError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from here\n")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lib.reproduce", description="Run studies and render their reports."
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="only these, by name or number (default: all)")
    parser.add_argument("--preset", default="quick", help=f"one of {', '.join(presets())} (default: quick)")
    parser.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        dest="changed",
        help="a parameter over the preset's, for every STUDY that has it; reports go to reports/custom",
    )
    parser.add_argument("--jobs", type=int, help="processes (default: as many as cores and memory allow)")
    parser.add_argument("--force", action="store_true", help="run studies again that are up to date")
    parser.add_argument("--reports", type=Path, metavar="DIR", help="write reports here, not to reports/PRESET")
    parser.add_argument(
        "--audit",
        nargs="?",
        type=float,
        const=0.05,
        metavar="SHARE",
        help="measure this share of each experiment again (default: 0.05), the quickest first, and compare",
    )
    parser.add_argument(
        "--experiment",
        action="append",
        default=[],
        metavar="NAME",
        dest="experiments",
        help="audit this one alone, or several such; the column `experiment` of results/*.csv names them",
    )
    parser.add_argument(
        "--again", action="store_true", help="audit what today's code made: what a later audit here compares with"
    )
    parser.add_argument("--render", action="store_true", help="make pages of what was measured, and measure nothing")
    parser.add_argument("--merge", type=Path, metavar="DIR", help="add the measurements of another report folder")
    parser.add_argument("--list", action="store_true", help="say how every study stands, and run none")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and for how long, and run none")
    parser.add_argument("--prepare-only", type=Path, metavar="DIR", help="write notebooks with parameters, run none")
    return parser


def _answer(options: argparse.Namespace) -> int:
    if options.jobs is not None and options.jobs < 1:
        raise ParameterError(f"--jobs {options.jobs}: allowed are whole numbers from 1")
    if (options.experiments or options.again) and options.audit is None:
        alone = "--experiment" if options.experiments else "--again"
        raise ParameterError(f"{alone} says what --audit measures again: expected both")
    audit = Audit(options.audit, tuple(options.experiments), options.again) if options.audit is not None else None
    if options.prepare_only:
        prepare(options.preset, options.prepare_only)
        return 0
    for other in sorted(p.name for p in parameters.NOTEBOOKS.glob("[0-9]*.ipynb") if p.stem not in studies()):
        sys.stderr.write(f"{other} is skipped: a study is called NN_name.ipynb, a copy needs a name of its own\n")
    changed = dict(options.changed)
    values = preset_parameters(options.preset, changed, options.studies)
    place = options.reports or (PROJECT / "reports" / "custom" if changed else None)
    reports, _ = folders(options.preset, place)
    known = _experiments(chosen(values, options.studies), reports) if options.experiments else set()
    if unknown := [name for name in options.experiments if name not in known]:
        raise ParameterError(f"--experiment {unknown[0]}: there were measured {', '.join(sorted(known)) or 'none'}")
    if options.list or options.dry_run:
        asked = chosen(values, options.studies)
        _tell(overview({s: values[s] for s in asked}, reports), options)
        return 0
    if options.merge:
        for study, (added, replaced) in merged(options.preset, options.merge, place).items():
            sys.stdout.write(f"{study}: {added} measurements added, {replaced} replaced\n")
        return 0
    if options.render:
        os.environ["WORKBOOK_CLOSED"] = "1"  # for the kernels of this batch
        options.studies = options.studies or _measured(values, reports)
    for study in sorted({*chosen(values, options.studies)} - {*given(options.preset)}):
        sys.stderr.write(f"{study} has no entry in presets/{options.preset}.yaml: it runs with its defaults\n")
    errors = reproduce(
        options.preset,
        only=options.studies,
        changed=changed,
        jobs=options.jobs or _processes(),
        force=options.force or options.render,
        reports=reports,
        audit=audit,
    )
    if audit is not None and _audited(reports, [s for s in chosen(values, options.studies) if not errors[s]]):
        return 1
    shown = reports.relative_to(Path.cwd()) if reports.is_relative_to(Path.cwd()) else reports
    sys.stderr.write(f"open {shown / 'index.html'}\n")
    return 1 if any(errors.values()) else 0


def _measured(names: Iterable[str], reports: Path) -> list[str]:
    """Those of which there are measurements; the others are named."""
    left = [name for name in names if not (reports / "results" / f"{name}.csv").is_file()]
    if not (found := [name for name in names if name not in left]):
        raise ParameterError(f"{reports} has no measurements, results/*.csv, that a page could be made of")
    if left:
        sys.stderr.write(f"left out, as nothing was measured: {', '.join(left)}\n")
    return found


def _experiments(names: Iterable[str], reports: Path) -> set[str]:
    tables = [table for name in names if (table := reports / "results" / f"{name}.csv").is_file()]
    return {m.experiment for table in tables for m in read_table(table)}


def _processes() -> int:
    """As many as there are cores for, and two gigabytes of free memory each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS: all
    return max(1, min(cores, psutil.virtual_memory().available >> 31))


def _audited(reports: Path, names: list[str]) -> bool:
    """Print what the audits found; whether anything differs."""
    files = [reports / "audits" / f"{name}.csv" for name in names]
    found = [pd.read_csv(file, keep_default_na=False).assign(study=file.stem) for file in files if file.is_file()]
    if not found:
        sys.stdout.write("nothing to audit: no measurement is of such code\n")
        return False
    table = pd.concat(found)
    columns = ["study", "experiment", "points", "again", "differ"]
    sys.stdout.write(table[columns].to_string(index=False) + "\n")
    for row in table[table["differ"] > 0].to_dict("records"):
        sys.stdout.write(f"{row['study']}, {row['experiment']}: {row['first']}; none of it is stamped\n")
    return bool((table["differ"] > 0).any())


def _tell(studies, options: argparse.Namespace) -> None:
    if options.dry_run and not options.force:
        studies = studies[studies["state"] != "complete"]
    if studies.empty:
        sys.stdout.write("nothing to run: every study is up to date\n")
        return
    sys.stdout.write(studies.to_string(index=False, na_rep="?", float_format="{:.1f}".format) + "\n")
    if options.dry_run:
        known = studies["minutes"].dropna()
        total = known.sum() / (options.jobs or _processes())
        unknown = len(studies) - len(known)
        more = f", and {unknown} that never ran" if unknown else ""
        sys.stdout.write(f"{len(studies)} to run, about {total:.0f} min by the last runs{more}\n")


if __name__ == "__main__":
    sys.exit(main())
