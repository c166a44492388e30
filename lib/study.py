"""What every study notebook shares: checked parameters, provenance, results, and claims with their verdicts."""

import ast
import html
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import nbformat
import numpy as np
import pandas as pd
import torch
from scipy import stats

from lib import data, models
from lib.files import write_whole

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOKS = PROJECT / "notebooks"
CLAIM_COLUMNS = (
    *("study", "system", "claim", "source", "published", "measured", "low", "high", "n"),
    *("criterion", "verdict", "dataset", "model", "preset", "commit"),
)


# --- parameters -------------------------------------------------------------------------------------------------------


class ParameterError(ValueError):
    """A study's parameter is unknown, of the wrong type or out of range. Notebooks show it as one line."""

    def _render_traceback_(self) -> list[str]:  # IPython's own protocol for a short display
        return [f"ParameterError: {self}"]


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: ``name: type = default  # help``."""

    name: str
    type: str
    default: Any
    help: str


@cache
def declared(study: str) -> dict[str, Parameter]:
    """The parameters that a study's notebook declares, by name.

    Raises:
        ParameterError: no such study, not exactly one parameters cell, or a line in it that is not
            ``name: type = literal``.
    """
    path = NOTEBOOKS / f"{study}.ipynb"
    if not path.is_file():
        known = ", ".join(p.stem for p in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")))
        raise ParameterError(f"study {study!r} is unknown: allowed are {known}")
    cells = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ParameterError(f"{path.name} has {len(cells)} cells tagged 'parameters'; it needs exactly one")
    found: dict[str, Parameter] = {}
    lines = cells[0].source.splitlines()
    for node in ast.parse(cells[0].source).body:
        try:
            name, kind, value = node.target.id, ast.unparse(node.annotation), ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            raise ParameterError(f"{path.name}: {ast.unparse(node)!r} is not `name: type = literal`") from None
        found[name] = Parameter(name, kind, value, lines[node.end_lineno - 1].partition("#")[2].strip())
    return found


def _parsed(value: Any, kind: str) -> Any:
    """A list that came as text: ``papermill -p name "[0.5, 0.9]"`` passes it so. Anything else is left as it is."""
    if isinstance(value, str) and kind.startswith("list["):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return value


def _has_type(value: Any, kind: str) -> bool:
    """Whether a value fits ``int``, ``float``, ``str``, ``bool`` or a ``list[...]`` of one; an int is a float too."""
    if kind.startswith("list["):
        return isinstance(value, list) and all(_has_type(v, kind[5:-1]) for v in value)
    if isinstance(value, bool):
        return kind == "bool"
    return isinstance(value, {"int": int, "float": (int, float), "str": str}.get(kind, ()))


Check = tuple[Callable[[Any], bool], str]


def _each(check: Callable[[Any], bool], allowed: str, least: int = 1) -> Check:
    return lambda v: len(v) >= least and len(set(v)) == len(v) and all(map(check, v)), (
        f"a list of {least} or more different values, each {allowed}"
    )


_POSITIVE: Check = (lambda v: v > 0, "numbers above 0")
_COUNT: Check = (lambda v: v >= 1, "whole numbers from 1")
_NATURAL: Check = (lambda v: v >= 0, "whole numbers from 0")
CHECKS: dict[str, Check] = {
    "sparsities": _each(lambda v: 0 <= v < 1, "in [0, 1)"),
    "learning_rates": (
        lambda v: len(v) == 2 and 0 < v[0] < v[1],
        "two numbers above 0, the insufficient rate first and the larger, desirable one second",
    ),
    "top_fractions": _each(lambda v: 0 < v <= 1, "in (0, 1]"),
    "seeds": _COUNT,
    "epochs": _COUNT,
    "admm_epochs": _COUNT,
    "rewind_epoch": _NATURAL,
    "width": _COUNT,
    "batch_size": _COUNT,
    "train_size": _NATURAL,
    "test_size": _NATURAL,
    "threads": _COUNT,
    "lr": _POSITIVE,
    "rho": _POSITIVE,
    "weight_decay": (lambda v: v >= 0, "numbers from 0"),
    "round_fraction": (lambda v: 0 < v < 1, "numbers in (0, 1)"),
}
"""What a parameter of a given name may hold, in every study: a test and its wording."""


def check_parameters(study: str, given: dict[str, Any]) -> dict[str, Any]:
    """A study's defaults with ``given`` values over them, all checked: names, types, ranges, data set and model.

    Raises:
        ParameterError: names the parameter, its value and what is allowed.
    """
    known = declared(study)
    for name in given:
        if name not in known:
            raise ParameterError(f"parameter {name!r} is unknown in {study}: allowed are {', '.join(known)}")
    values = {name: _parsed(given.get(name, p.default), p.type) for name, p in known.items()}
    for name, value in values.items():
        if not _has_type(value, known[name].type):
            raise ParameterError(f"{name} = {value!r} is {type(value).__name__}: expected {known[name].type}")
        test, allowed = CHECKS.get(name, (lambda v: True, ""))
        if not test(value):
            raise ParameterError(f"{name} = {value!r}: allowed are {allowed}")
    if values.get("rewind_epoch", 0) > values.get("epochs", 0):
        raise ParameterError(
            f"rewind_epoch = {values['rewind_epoch']}: allowed are whole numbers up to epochs = {values['epochs']}"
        )
    try:
        if "model" in values:
            models.builder(values["model"])
        if "dataset" in values:
            data.check_name(values["dataset"])
        if "data_root" in values:
            data.data_root(values["data_root"])
    except ValueError as error:
        raise ParameterError(str(error)) from None
    return values


def _injected(cells: Sequence[str]) -> list[str]:
    """Names that Papermill's injected cell assigns: IPython keeps the source of what ran."""
    sources = [c for c in cells if c.lstrip().startswith("# Parameters\n")]
    return [t.id for source in sources for node in ast.parse(source).body for t in getattr(node, "targets", [])]


# --- claims -----------------------------------------------------------------------------------------------------------

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]


@dataclass(frozen=True)
class Criterion:
    """``value >= bound`` or ``value <= bound`` for the whole 95 % interval, from at least ``n`` independent runs.

    >>> Criterion(">=", 0.0, n=3).verdict(low=0.1, high=0.4, n=5)
    'reproduced'
    """

    sign: Literal[">=", "<="]
    bound: float
    n: int = 3

    def verdict(self, low: float, high: float, n: int) -> Verdict:
        """``reproduced`` if all of [low, high] meets the bound, ``not reproduced`` if none does."""
        if n < self.n or not (np.isfinite(low) and np.isfinite(high)):
            return "inconclusive"
        met = [v >= self.bound if self.sign == ">=" else v <= self.bound for v in (low, high)]
        return "reproduced" if all(met) else "inconclusive" if any(met) else "not reproduced"


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and percentile-bootstrap interval of independent values; NaN bounds for fewer than two.

    Returns:
        ``(mean, low, high)``. The resampling is seeded: the same values give the same interval.
    """
    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()) if len(x) else np.nan, np.nan, np.nan
    if np.ptp(x) == 0:
        return float(x[0]), float(x[0]), float(x[0])
    ci = stats.bootstrap((x,), np.mean, confidence_level=confidence, method="percentile", rng=0).confidence_interval
    return float(x.mean()), float(ci.low), float(ci.high)


@dataclass
class Claim:
    """A published statement with a criterion that is fixed before the run."""

    id: str
    statement: str
    source: str
    published: str
    criterion: Criterion
    unit: str = ""

    @property
    def wording(self) -> str:
        """The criterion as a reader sees it, with its unit."""
        c = self.criterion
        return f"{c.sign} {c.bound:g}{self.unit and ' ' + self.unit}, from {c.n} or more seeds"


# --- the study --------------------------------------------------------------------------------------------------------


@dataclass
class Study:
    """An open study: its checked parameters, its provenance, and where its results and claims go."""

    name: str
    system: str
    parameters: dict[str, Any]
    provenance: dict[str, Any]
    claims: dict[str, Claim] = field(default_factory=dict)
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def report_dir(self) -> Path | None:
        """``reports/<preset>`` in a batch run; None when somebody plays in JupyterLab."""
        chosen = self.parameters.get("report_dir", "")
        return PROJECT / chosen if chosen else None  # relative to the project, so that no report holds a user's path

    def expect(self, id: str, statement: str, *, source: str, published: str, criterion: Criterion, unit: str = ""):
        """State a claim and its criterion, before any result exists.

        Raises:
            ValueError: the claim is stated twice.
        """
        if id in self.claims:
            raise ValueError(f"claim {id!r} is stated twice")
        self.claims[id] = Claim(id, statement, source, published, criterion, unit)

    def settle(self, id: str, values: Sequence[float]) -> None:
        """Give a claim its measurements, one per independent run; the verdict follows from them.

        Raises:
            KeyError: the claim was never stated.
        """
        claim = self.claims[id]
        mean, low, high = interval(values)
        self.verdicts[id] = {
            "measured": mean,
            "low": low,
            "high": high,
            "n": len(values),
            "verdict": claim.criterion.verdict(low, high, len(values)),
        }

    def criteria(self) -> pd.DataFrame:
        """The claims as stated, to be shown before the results."""
        rows = [(c.id, c.statement, f"{c.published} ({c.source})", c.wording) for c in self.claims.values()]
        return pd.DataFrame(rows, columns=["claim", "statement", "published", "criterion"])

    def ledger(self) -> pd.DataFrame:
        """One row per claim in the columns of the results contract; a claim without measurements is inconclusive."""
        nothing = {"measured": np.nan, "low": np.nan, "high": np.nan, "n": 0, "verdict": "inconclusive"}
        shared = {
            "study": self.name,
            "system": self.system,
            "dataset": self.parameters.get("dataset", ""),
            "model": self.parameters.get("model", ""),
            "preset": self.report_dir.name if self.report_dir else "",
            "commit": self.provenance["commit"],
        }
        rows = [
            shared
            | {
                "claim": f"{c.id} {c.statement}",
                "source": c.source,
                "published": c.published,
                "criterion": c.wording,
            }
            | self.verdicts.get(c.id, nothing)
            for c in self.claims.values()
        ]
        return pd.DataFrame(rows, columns=[*CLAIM_COLUMNS])

    def save(self, results: pd.DataFrame) -> None:
        """Write the tidy results and this study's claims, when the study was given a ``report_dir``.

        Raises:
            OSError: the folder cannot be written; nothing half-written is left.
        """
        if self.report_dir is None:
            return
        write_whole(self.report_dir / "results" / f"{self.name}.csv", results.to_csv(index=False))
        write_whole(self.report_dir / "claims" / f"{self.name}.csv", self.ledger().to_csv(index=False))

    def _repr_html_(self) -> str:
        def table(title: str, rows: dict[str, Any]) -> str:
            cells = "".join(
                f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items()
            )
            return f"<div><strong>{title}</strong><table>{cells}</table></div>"

        hidden = ("report_dir", "data_root")  # where files lie is no part of a result, and no reader's business
        shown = {k: v for k, v in self.parameters.items() if k not in hidden}
        parts = table("Parameters", shown) + table("Provenance", self.provenance)
        return f'<div class="provenance" style="display:flex;gap:3em;flex-wrap:wrap">{parts}</div>'


def open_study(name: str, system: str, namespace: dict[str, Any]) -> Study:
    """Open a study from its set-up cell: ``study = open_study("01_...", "System", globals())``.

    Checks every parameter (also names that Papermill injected and the study does not know), that the report folder
    can be written, sets the thread count, and gathers provenance.

    Raises:
        ParameterError: a parameter is unknown, of the wrong type or out of range.
        OSError: the report folder cannot be written.
    """
    given = {k: namespace[k] for k in declared(name) if k in namespace}
    given |= {k: namespace.get(k) for k in _injected(namespace.get("In", []))}
    parameters = check_parameters(name, given)
    namespace.update(parameters)  # lists that came as text are lists from here on
    torch.set_num_threads(parameters.get("threads", 1))
    study = Study(name, system, parameters, provenance())
    if study.report_dir is not None:
        probe = study.report_dir / "results" / f".{name}.{os.getpid()}"
        try:
            write_whole(probe, "")
            probe.unlink()
        except OSError as error:
            raise ParameterError(f"report_dir = {str(study.report_dir)!r}: {error.strerror}") from None
    return study


def provenance() -> dict[str, Any]:
    """What a result depends on besides its parameters: commit, versions, device, threads."""
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    versions = ("torch", "torchvision", "numpy", "pandas")
    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in versions},
        "device": place,
        "threads": torch.get_num_threads(),
    }


def commit() -> str:
    """The short git commit, with ``+`` behind it when tracked source was changed; ``unknown`` outside git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "lib", "notebooks")
        return git("rev-parse", "--short=9", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Progress:
    """One line that is rewritten in place and stays truthful in JupyterLab, in the executed file and in the HTML.

    Call it with the fraction done and a message (`lib.training.fit` does), or step through ``total`` parts with
    ``with progress.part("name") as report``.
    """

    def __init__(self, total: int) -> None:
        from IPython.display import display

        self.total, self.finished, self.started, self.shown = total, 0, time.monotonic(), 0.0
        self.handle = display({"text/plain": "starting"}, raw=True, display_id=True)

    def part(self, name: str) -> Callable[[float, str], None]:
        """Begin the next part; the returned function takes the fraction of it that is done, and a message."""
        self.finished += 1
        self._show(0.0, name, force=True)
        return lambda done, text: self._show(done, f"{name}: {text}", force=False)

    def done(self) -> None:
        """Leave a last line that says what was done and how long it took."""
        minutes = (time.monotonic() - self.started) / 60
        self._write(f"{self.total} of {self.total} parts done in {minutes:.1f} min")

    def _show(self, fraction: float, text: str, force: bool) -> None:
        if not force and time.monotonic() - self.shown < 0.5:  # an update costs a message to the browser
            return
        self.shown = time.monotonic()
        share = (self.finished - 1 + fraction) / self.total
        spent = time.monotonic() - self.started
        left = f", about {spent * (1 - share) / share / 60:.0f} min left" if share > 0.02 else ""
        bar = "█" * round(30 * share) + "░" * (30 - round(30 * share))
        self._write(f"{bar} {share:4.0%}  part {self.finished} of {self.total}{left}  {text}")

    def _write(self, line: str) -> None:
        if self.handle is not None:
            self.handle.update({"text/plain": line}, raw=True)
