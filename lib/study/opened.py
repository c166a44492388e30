"""An open study: parameters that passed, provenance, and where results and claims go."""

import html
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lib.files import write_whole
from lib.study.claims import CLAIM_COLUMNS, Claim, Criterion, interval, measured
from lib.study.parameters import PROJECT, check_parameters, declared, injected, require
from lib.study.ranges import ParameterError
from lib.study.shown import Shown


@dataclass
class Study:
    """An open study: its checked parameters, its provenance, and where its results and claims go.

    >>> from lib.study import Criterion, Study
    >>> study = Study("09_mine", "Mine", parameters={}, provenance={"commit": "unknown"})
    >>> study.expect("C1", "costs little", source="nowhere", published="0.1 points", criterion=Criterion("<=", 0.5))
    >>> study.settle("C1", [0.1, 0.3, 0.8])
    >>> study.ledger()[["claim", "n", "verdict"]].values.tolist()
    [['C1 costs little', 3, 'inconclusive']]
    >>> study.answer("It costs {C1} points.").data
    '<p class="answer">It costs <strong>0.40 [0.10, 0.80]</strong> points.</p>'
    """

    name: str
    system: str
    parameters: dict[str, Any]
    provenance: dict[str, Any]
    claims: dict[str, Claim] = field(default_factory=dict)
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)

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

    def expect(
        self,
        id: str,
        statement: str,
        *,
        source: str,
        published: str,
        criterion: Criterion,
        unit: str = "",
        dataset: str = "",
        model: str = "",
    ) -> None:
        """State a claim and its criterion, before any result exists.

        Args:
            dataset: what the claim is tested on where that is not the study's own; ``model`` likewise.

        Raises:
            ParameterError: the claim is stated twice.
        """
        if id in self.claims:
            raise ParameterError(f"claim {id!r} is stated twice")
        self.claims[id] = Claim(id, statement, source, published, criterion, unit, dataset, model)

    def settle(self, id: str, values: Sequence[float], *, geometric: bool = False) -> None:
        """Give a claim its measurements, one per independent run; the verdict follows from them.

        Args:
            geometric: average their logarithms, as ratios ask for: 2 and 1/2 then have the mean 1.

        Raises:
            ParameterError: the claim was never stated.
        """
        if id not in self.claims:
            raise ParameterError(f"claim {id!r} was never stated: allowed are {', '.join(self.claims)}")
        claim = self.claims[id]
        mean, low, high = np.exp(interval(np.log(values))) if geometric else interval(values)
        if claim.criterion.n == len(values) == 1:
            low = high = mean
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
                "dataset": c.dataset or self.parameters.get("dataset", ""),
                "model": c.model or self.parameters.get("model", ""),
            }
            | self.verdicts.get(c.id, nothing)
            for c in self.claims.values()
        ]
        return pd.DataFrame(rows, columns=[*CLAIM_COLUMNS])

    def answer(self, sentence: str) -> Shown:
        """The study's answer in a sentence or two, to be a cell's last value; a report shows it on top.

        Args:
            sentence: words that hold whatever was measured, with ``{claim id}`` where a claim's value and its interval
                go. Claims that the parameters leave out are "not measured".
        """
        rows = dict(zip(self.claims, self.ledger().to_dict("records"), strict=True))

        def value(match: re.Match) -> str:
            row = rows.get(match[1])
            return f"<strong>{measured(row) if row else 'not measured'}</strong>"

        answer = re.sub(r"{([^}]+)}", value, html.escape(sentence, quote=False))
        return Shown(f'<p class="answer">{answer}</p>', answer=answer)

    def save(self, results: pd.DataFrame) -> None:
        """Write the tidy results and this study's claims, when the study was given a ``report_dir``.

        Raises:
            OSError: the folder cannot be written; nothing half-written is left.
        """
        if self.report_dir is None:
            return
        write_whole(self.report_dir / "results" / f"{self.name}.csv", results.to_csv(index=False))
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


def open_study(name: str, system: str, namespace: dict[str, Any]) -> Study:
    """Open a study from its set-up cell: ``study = open_study("01_...", "System", globals())``.

    Checks every parameter (also names that Papermill injected and the study does not know), that the report folder
    can be written, sets the thread count, and gathers provenance. A batch tells its kernels whose notebook they run,
    so that a copy does not publish under the name of the original.

    Raises:
        ParameterError: a parameter is unknown, of the wrong type or out of range, the report folder cannot be written,
            or the notebook that a batch runs has another name.

    >>> from lib.study import open_study
    >>> cell = {"sparsities": "[0.5, 0.9]", "seeds": 3}  # lists as Papermill passes them
    >>> study = open_study("01_lottery_ticket_vs_finetuning", "Tickets", cell)
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
        "instructions": _instructions(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The model of the CPU, where the system tells it."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text("utf-8", "replace"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _instructions() -> str:
    """The instruction set that PyTorch's kernels use, and the limit on oneDNN's, which chooses by itself."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    return torch.backends.cpu.get_cpu_capability() + (f" (oneDNN: at most {limit})" if limit else "")


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
