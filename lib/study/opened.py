"""An open study: parameters that passed, provenance, and where results and claims go."""

import html
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython import get_ipython

from lib.files import write_whole
from lib.study.claims import CLAIM_COLUMNS, JUDGED, Claim, Criterion, measured, settled
from lib.study.measurements import Audit, Store
from lib.study.papers import OURS, check_paper
from lib.study.parameters import PROJECT, check_parameters, declared, injected, outside, require
from lib.study.ranges import ParameterError
from lib.study.shown import Shown
from lib.training.cache import instructions

DETAILS = [f.name for f in fields(Claim) if f.default is not MISSING]


@dataclass
class Study:
    """An open study: its checked parameters, its provenance, what it measured, and where results and claims go.

    >>> from lib.study import Criterion, Study
    >>> study = Study("09_mine", parameters={}, provenance={"commit": "unknown"})
    >>> study.expect("C1", "costs little", Criterion("<=", 0.5), kind="ours")
    >>> study.settle("C1", [0.1, 0.3, 0.2, 0.2, 0.3])
    >>> study.ledger()[["claim", "n", "verdict"]].values.tolist(), study.met("C1")
    ([['C1 costs little', 5, 'reproduced']], True)
    >>> study.answer("It costs {C1} points.").data
    '<div class="answer">It costs <strong>0.22 [0.12, 0.32]</strong> points.</div>'
    """

    name: str
    parameters: dict[str, Any]
    provenance: dict[str, Any]
    claims: dict[str, Claim] = field(default_factory=dict)
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    store: Store | None = None

    @property
    def report_dir(self) -> Path | None:
        """``reports/<preset>`` in a batch run; None when somebody plays in JupyterLab."""
        chosen = self.parameters.get("report_dir", "")
        return PROJECT / chosen if chosen else None  # relative to the project, so that no report holds a user's path

    def require(self, name: str, holds: bool, expected: str) -> None:
        """What a parameter has to fit besides its own range, said in the set-up cell.

        A batch looks at it before anything runs, where it speaks of parameters alone (see `check_parameters`).

        Raises:
            ParameterError: ``holds`` is false; it names the parameter, its value and what is expected.
        """
        require(self.parameters, name, holds, expected)

    def measure(
        self, experiment: Callable, points: Iterable[dict[str, Any]], timed: Sequence[str] = ()
    ) -> pd.DataFrame:
        """The rows that ``experiment(**point)`` returns for each point; a call that was made before is read.

        See `lib.study.measurements.Store.measure`, also for errors.
        """
        self.store = self.store or Store(self.name)
        return self.store.measure(experiment, points, timed)

    def expect(
        self,
        id: str,
        statement: str,
        criterion: Criterion,
        *,
        paper: str = OURS,
        kind: str = "direction",
        source: str = "",
        published: str = "",
        **details: Any,
    ) -> None:
        """State a claim and its criterion, before any result exists.

        Args:
            paper: a key of ``data/papers.csv``; a control or goal of this workbook has none.
            kind: ``number``, ``direction``, ``arithmetic`` or ``ours``.
            source: where the paper says ``published``.
            details: ``unit``; ``condition`` and ``holding``, what must hold with it, in words and as a criterion;
                ``fixed``, when the criterion was written; ``setting``, what is smaller than in the paper; ``dataset``
                and ``model`` where the claim is tested on others than the study's own; ``over``, what its interval is
                over where not over independent networks, as ``"layers"``.

        Raises:
            ParameterError: the claim is stated twice, the paper is unknown, or a detail is none of those allowed.
        """
        if id in self.claims:
            raise ParameterError(f"claim {id!r} is stated twice")
        if not isinstance(criterion, Criterion):
            raise ParameterError(f"claim {id!r}, criterion = {criterion!r}: expected at_least, at_most or near")
        if unknown := [name for name in details if name not in DETAILS]:
            raise ParameterError(f"claim {id!r}, {unknown[0]}: allowed are {', '.join(DETAILS)}")
        claim = Claim(id, statement, paper, kind, source, published, criterion, **details)
        check_paper(paper, ours=kind == "ours")
        self.claims[id] = claim

    def settle(
        self,
        id: str,
        values: Sequence[float],
        *,
        geometric: bool = False,
        also: float = 0.0,
        condition: Sequence[float] | None = None,
        words: str = "",
    ) -> None:
        """Give a claim its measurements, one per independent network; the verdict follows from them.

        Args:
            geometric: average their logarithms, as ratios ask for: 2 and 1/2 then have the mean 1.
            also: a standard error that all values have in common (of logarithms, where these are averaged).
            condition: the same for what must hold with it; its values are averaged as they are.
            words: what the measurements make a reader of the statement ask; they end it in the ledger.

        Raises:
            ParameterError: the claim was never stated, or has a condition and is given nothing for it; there are
                more values, of networks, than the parameter ``seeds`` trains.
        """
        claim, seeds = self._stated(id), self.parameters.get("seeds")
        if claim.over == "networks" and seeds is not None and len(values) > seeds:
            said = f"claim {id!r} is given {len(values)} values, and seeds = {seeds} networks are trained"
            raise ParameterError(f"{said}: say what its interval is over, as in over='chips'")
        if (claim.holding is None) != (condition is None):
            raise ParameterError(f"claim {id!r} has {'a' if claim.holding else 'no'} condition")
        self.verdicts[id] = {
            "claim": f"{id} {claim.statement}{words}",
            **settled(claim, values, geometric, also, condition),
            "cell": shell.execution_count if (shell := get_ipython()) else None,
        }

    def met(self, id: str) -> bool | None:
        """Whether a claim's whole interval meets its bound, or none of it; None where neither, or nothing is measured.

        For sentences; a verdict asks for more. A claim with a condition is met as its verdict is.

        Raises:
            ParameterError: the claim was never stated.
        """
        claim, row = self._stated(id), self.verdicts.get(id)
        if row and claim.holding:
            return {"inconclusive": None, "not reproduced": False}.get(row["verdict"], True)
        return claim.criterion.holds(row["low"], row["high"]) if row else None

    def says(self, id: str, yes: str, no: str, open: str) -> str:
        """One of three wordings: the claim's interval meets its bound, does not, or lies on both sides (`met`).

        >>> from lib.study import Study, at_least
        >>> (study := Study("09_mine", parameters={}, provenance={})).expect("C1", "wins", at_least(0), kind="ours")
        >>> study.settle("C1", [-0.1, 0.1, 0.3])
        >>> study.says("C1", yes="It wins.", no="It does not win.", open="It cannot be told.")
        'It cannot be told.'
        """
        return {True: yes, False: no, None: open}[self.met(id)]

    def _stated(self, id: str) -> Claim:
        if id not in self.claims:
            raise ParameterError(f"claim {id!r} was never stated: allowed are {', '.join(self.claims)}")
        return self.claims[id]

    def criteria(self) -> pd.DataFrame:
        """The claims as stated, to be shown before the results."""
        rows = [
            (
                c.id,
                c.statement,
                c.paper,
                c.kind,
                c.published + f" ({c.source})" * bool(c.source),
                c.wording,
                c.joint,
                c.fixed,
            )
            for c in self.claims.values()
        ]
        columns = ["claim", "statement", "paper", "kind", "published", "criterion", "condition", "fixed"]
        return pd.DataFrame(rows, columns=columns)

    def ledger(self) -> pd.DataFrame:
        """One row per claim in the columns of the results contract, and beside them what a page reads as numbers.

        A claim without measurements is inconclusive.
        """
        nothing = {"measured": np.nan, "low": np.nan, "high": np.nan, "n": 0, "verdict": "inconclusive"}
        shared = {
            "study": self.name,
            "preset": self.report_dir.name if self.report_dir else "",
            "commit": self.provenance["commit"],
        }
        rows = [
            shared
            | asdict(c.criterion)
            | {
                "paper": c.paper,
                "claim": f"{c.id} {c.statement}",
                "kind": c.kind,
                "fixed": c.fixed,
                "source": c.source,
                "published": c.published,
                "over": c.over,
                "criterion": c.wording,
                "condition": c.joint,
                "setting": c.setting if c.kind != "ours" else "",
                "dataset": c.dataset or self.parameters.get("dataset", ""),
                "model": c.model or self.parameters.get("model", ""),
            }
            | self.verdicts.get(c.id, nothing)
            for c in self.claims.values()
        ]
        return pd.DataFrame(rows, columns=[*CLAIM_COLUMNS, *JUDGED])

    def answer(self, sentence: str, *facts: str, caveat: str = "") -> Shown:
        """The study's answer, to be a cell's last value; a report shows it on top, for a reader of 30 seconds.

        Args:
            sentence: answers the question in plain words.
            facts: the few numbers that it rests on, a line each.
            caveat: what a reader must know before believing it.

        All hold whatever was measured, with ``{claim id}`` where a claim's value and its interval go. Claims that the
        parameters leave out are "not measured".
        """
        rows = dict(zip(self.claims, self.ledger().to_dict("records"), strict=True))

        def value(match: re.Match) -> str:
            row = rows.get(match[1])
            return f"<strong>{measured(row) if row else 'not measured'}</strong>"

        told = (re.sub(r"{([^}]+)}", value, html.escape(text, quote=False)) for text in (sentence, *facts, caveat))
        answer, *lines, beware = told
        answer += f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" * bool(lines)
        answer += f' <span class="soft">{beware}</span>' * bool(beware)
        evidence = self.store.evidence() if self.store else ""
        return Shown(f'<div class="answer">{answer}</div>', answer=answer, evidence=evidence)

    def save(self) -> None:
        """Write the measurements and this study's claims, when the study was given a ``report_dir``.

        Raises:
            OSError: the folder cannot be written; nothing half-written is left.
        """
        if self.report_dir is None:
            return
        if self.store:
            self.store.publish(self.report_dir / "results" / f"{self.name}.csv")
            if self.store.audits:
                audit = pd.DataFrame(self.store.audits).to_csv(index=False)
                write_whole(self.report_dir / "audits" / f"{self.name}.csv", audit)
        write_whole(self.report_dir / "claims" / f"{self.name}.csv", self.ledger().to_csv(index=False))

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        def table(title: str, rows: dict[str, Any]) -> str:
            cells = "".join(
                f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items()
            )
            return f"<div><strong>{title}</strong><table>{cells}</table></div>"

        hidden = ("report_dir", "data_root")  # where files lie is no part of a result, and no reader's business
        shown = {k: v for k, v in self.parameters.items() if k not in hidden}
        parts = table("Parameters", shown) + table("Provenance", self.provenance)
        page = f'<div class="provenance" style="display:flex;gap:3em;flex-wrap:wrap">{parts}</div>'
        return Shown(page, provenance=self.provenance)._repr_mimebundle_()


def open_study(name: str, namespace: dict[str, Any]) -> Study:
    """Open a study from its set-up cell: ``study = open_study("01_...", globals())``.

    Checks every parameter (also names that Papermill injected and the study does not know), that the report folder
    can be written, sets the thread count, and gathers provenance. A batch tells its kernels whose notebook they run,
    so that a copy does not publish under the name of the original.

    Raises:
        ParameterError: a parameter is unknown, of the wrong type or out of range, the report folder cannot be written,
            or the notebook that a batch runs has another name.

    >>> from lib.study import open_study
    >>> cell = {"sparsities": "[0.5, 0.9]", "seeds": 3}  # lists as Papermill passes them
    >>> study = open_study("01_lottery_ticket_vs_finetuning", cell)
    >>> cell["sparsities"], study.parameters["seeds"], study.report_dir
    ([0.5, 0.9], 3, None)
    """
    own = os.environ.get("WORKBOOK_STUDY", name)
    if own != name:
        raise ParameterError(f"open_study({name!r}, ...) in {own}.ipynb: expected {own!r}, a study of its own")
    given = {k: namespace[k] for k in declared(name) if k in namespace}
    given |= {k: namespace.get(k) for k in injected(namespace.get("In", []))}
    parameters = check_parameters(name, given)
    namespace.update(parameters)  # lists that came as text are lists from here on
    torch.set_num_threads(parameters.get("threads", 1))
    study = Study(name, parameters, provenance())
    if study.report_dir is not None:
        probe = study.report_dir / "results" / f".{name}.{os.getpid()}"
        try:
            write_whole(probe, "")
            probe.unlink()
        except OSError as error:
            raise ParameterError(f"report_dir = {str(study.report_dir)!r}: {error.strerror}") from None
    study.store = _store(study)
    return study


def _store(study: Study) -> Store:
    """Where an open study's measurements are kept; in a batch its own table lies in its folder already."""
    table = study.report_dir / "results" / f"{study.name}.csv" if study.report_dir else None
    place = study.provenance["device"]
    return Store(
        study.name,
        table,
        stamps={
            "commit": study.provenance["commit"],
            "device": place if torch.cuda.is_available() else f"{place} {study.provenance['instructions']}",
            "torch": study.provenance["torch"],
        },
        outside=partial(outside, study.name, study.parameters),
        earlier=study.parameters.get("earlier_code", False),
        audit=Audit.of(os.environ.get("WORKBOOK_AUDIT", "")),
        closed=bool(os.environ.get("WORKBOOK_CLOSED")),
    )


def provenance() -> dict[str, Any]:
    """What a result depends on besides its parameters: commit, versions, device, processor, threads.

    >>> from lib.study import provenance
    >>> list(provenance()), provenance()["threads"] == torch.get_num_threads()
    (['commit', 'python', 'torch', 'torchvision', 'numpy', 'pandas', 'device', 'cpu', 'instructions', 'threads'], True)
    """
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    versions = ("torch", "torchvision", "numpy", "pandas")
    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in versions},
        "device": place,
        "cpu": _processor(),
        "instructions": instructions(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The model of the CPU, where the system tells it."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text("utf-8", "replace"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> str:
    """The short git commit, with ``+`` behind it when tracked source was changed; ``unknown`` without a repository."""
    told = {"cwd": PROJECT, "capture_output": True, "encoding": "utf-8", "errors": "surrogateescape", "check": True}

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], **told).stdout.strip()

    try:
        if not PROJECT.samefile(git("rev-parse", "--show-toplevel")):  # unpacked inside of another repository
            return "unknown"
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "lib", "notebooks")
        return git("rev-parse", "--short=9", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
