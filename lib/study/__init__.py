"""What every study notebook shares: checked parameters, provenance, results, and claims with their verdicts."""

from lib.study.claims import (
    CLAIM_COLUMNS,
    JUDGED,
    NETWORKS,
    Claim,
    Criterion,
    at_least,
    at_most,
    chance_of_error,
    common_error,
    interval,
    measured,
    near,
    networks,
    too_few,
)
from lib.study.curves import gain_at
from lib.study.measurements import Audit, Store
from lib.study.opened import Study, open_study, provenance
from lib.study.papers import OURS, papers
from lib.study.parameters import NOTEBOOKS, PROJECT, check_parameters, declared, question, studies
from lib.study.progress import Progress
from lib.study.ranges import ParameterError
from lib.study.shown import SAID, Shown
from lib.study.tables import MeasurementError

__all__ = [
    "CLAIM_COLUMNS",
    "JUDGED",
    "NETWORKS",
    "NOTEBOOKS",
    "OURS",
    "PROJECT",
    "SAID",
    "Audit",
    "Claim",
    "Criterion",
    "MeasurementError",
    "ParameterError",
    "Progress",
    "Shown",
    "Store",
    "Study",
    "at_least",
    "at_most",
    "chance_of_error",
    "check_parameters",
    "common_error",
    "declared",
    "gain_at",
    "interval",
    "measured",
    "near",
    "networks",
    "open_study",
    "papers",
    "provenance",
    "question",
    "studies",
    "too_few",
]
