"""What every study notebook shares: checked parameters, provenance, results, and claims with their verdicts."""

from lib.study.claims import CLAIM_COLUMNS, Claim, Criterion, interval, measured
from lib.study.curves import gain_at
from lib.study.opened import Study, open_study, provenance
from lib.study.parameters import NOTEBOOKS, PROJECT, check_parameters, declared, question, studies
from lib.study.progress import Progress
from lib.study.ranges import ParameterError
from lib.study.shown import SAID, Shown

__all__ = [
    "CLAIM_COLUMNS",
    "NOTEBOOKS",
    "PROJECT",
    "SAID",
    "Claim",
    "Criterion",
    "ParameterError",
    "Progress",
    "Shown",
    "Study",
    "check_parameters",
    "declared",
    "gain_at",
    "interval",
    "measured",
    "open_study",
    "provenance",
    "question",
    "studies",
]
