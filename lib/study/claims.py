"""Published claims: criteria fixed before the run, intervals, and the verdicts that follow from the two."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

CLAIM_COLUMNS = (
    *("study", "system", "claim", "source", "published", "measured", "low", "high", "n"),
    *("criterion", "verdict", "dataset", "model", "preset", "commit"),
)

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]


@dataclass(frozen=True)
class Criterion:
    """``value >= bound`` or ``value <= bound`` for the whole 95 % interval, from at least ``n`` independent runs.

    ``n = 1`` is for what no chance is in, such as sums of a published table: the value is its own interval.

    >>> from lib.study import Criterion
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
        slack = 1e-12 * max(1.0, abs(self.bound))  # rounding decides nothing: in floating point 0.2 * 3 / 3 > 0.2
        met = [v >= self.bound - slack if self.sign == ">=" else v <= self.bound + slack for v in (low, high)]
        return "reproduced" if all(met) else "inconclusive" if any(met) else "not reproduced"


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and percentile-bootstrap interval of independent values; NaN bounds for fewer than two.

    Returns:
        ``(mean, low, high)``. The resampling is seeded: the same values give the same interval.

    >>> from lib.study import interval
    >>> interval([1.0, 2.0, 3.0]), interval([5.0])  # of three values it is their range; of one there is none
    ((2.0, 1.0, 3.0), (5.0, nan, nan))
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
    """A published statement, its criterion fixed before the run, and what tests it if not the study's own network.

    >>> from lib.study import Claim, Criterion
    >>> Claim("C1", "costs little", "nowhere", "0.1 points", Criterion("<=", 0.5), unit="points").wording
    '<= 0.5 points, from 3 or more seeds'
    """

    id: str
    statement: str
    source: str
    published: str
    criterion: Criterion
    unit: str = ""
    dataset: str = ""
    model: str = ""

    @property
    def wording(self) -> str:
        """The criterion as a reader sees it, with its unit."""
        c = self.criterion
        runs = f"from {c.n} or more seeds" if c.n > 1 else "arithmetic"
        return f"{c.sign} {c.bound:g}{self.unit and ' ' + self.unit}, {runs}"


def measured(row: dict[str, Any]) -> str:
    """``mean [low, high]`` of a ledger row, with as many digits as the interval deserves.

    >>> from lib.study import measured
    >>> measured({"measured": 0.2164, "low": 0.2101, "high": 0.2202, "n": 3})
    '0.216 [0.210, 0.220]'
    >>> measured({"measured": 21.6, "low": 19.4, "high": 23.1, "n": 3})
    '21.60 [19.40, 23.10]'
    >>> measured({"measured": float("nan")})
    'not measured'
    """
    if pd.isna(row["measured"]):
        return "not measured"
    if pd.isna(row["low"]):
        return f"{row['measured']:.3g}, no interval"
    if row["n"] == 1:
        return f"{row['measured']:.4g}"
    digits = 3 if abs(row["measured"]) < 1 and row["high"] - row["low"] < 0.1 else 2
    return f"{row['measured']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
