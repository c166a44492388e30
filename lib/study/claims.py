"""Published claims: what was said and by whom, criteria, intervals, and the verdicts that follow from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from scipy import stats

from lib.study.ranges import ParameterError

CLAIM_COLUMNS = (
    *("study", "paper", "claim", "kind", "fixed", "source", "published", "measured", "low", "high", "n", "over"),
    *("criterion", "condition", "verdict", "setting", "dataset", "model", "preset", "commit"),
)

JUDGED = ("sign", "bound", "value", "within", "cell")
"""Beside them, in a study's own table: the criterion as numbers, and which cell, as executed, settled the claim."""

Kind = Literal["number", "direction", "arithmetic", "ours"]
"""A quantity that the paper prints; what it says in words, or for another scale; sums without chance; a control."""

Fixed = Literal["before", "after pilot", "after results"]
"""When the criterion was written."""

Setting = Literal["as published", "smaller network", "other data", "smaller network, other data"]

Verdict = Literal["reproduced", "direction only", "not reproduced", "inconclusive"]

NETWORKS = 5
"""Independent networks that a verdict on anything measured needs."""


@dataclass(frozen=True)
class Criterion:
    """``value >= bound`` or ``<= bound`` for a whole interval; with ``value``, beside it how near that has to be.

    Args:
        sign, bound: the direction, or a bound that the paper prints.
        value, within: a number that the paper prints, and how far from it still counts as this number.
        n: networks that a verdict needs; 1 for what no chance is in, such as sums of a published table.

    >>> from lib.study import Criterion
    >>> number = Criterion(">=", 1.0, value=1.93, within=0.2)
    >>> [number.verdict(low, high, n=5) for low, high in [(1.8, 2.0), (1.1, 1.2), (0.7, 0.9), (0.9, 1.2)]]
    ['reproduced', 'direction only', 'not reproduced', 'inconclusive']
    """

    sign: Literal[">=", "<="]
    bound: float
    value: float | None = None
    within: float | None = None
    n: int = NETWORKS

    def __post_init__(self) -> None:
        if (self.value is None) != (self.within is None) or (self.within is not None and not self.within >= 0):
            raise ParameterError(f"a value of {self.value} within {self.within}: expected both, or neither")

    def verdict(self, low: float, high: float, n: int) -> Verdict:
        """What all of the interval [low, high] from ``n`` networks meets."""
        if n < self.n or not (np.isfinite(low) and np.isfinite(high)):
            return "inconclusive"
        met = [self._met(v) for v in (low, high)]
        if self.value is not None:
            slack = 1e-12 * max(1.0, abs(self.value))
            if self.value - self.within - slack <= low and high <= self.value + self.within + slack:
                return "reproduced"
        elif all(met):
            return "reproduced"
        return "direction only" if all(met) else "inconclusive" if any(met) else "not reproduced"

    def holds(self, low: float, high: float) -> bool | None:
        """Whether all of the interval meets the bound, or none (False); None for one that lies on both sides."""
        met = {self._met(v) for v in (low, high)} if np.isfinite(low) and np.isfinite(high) else {True, False}
        return met.pop() if len(met) == 1 else None

    def _met(self, value: float) -> bool:
        slack = 1e-12 * max(1.0, abs(self.bound))  # rounding decides nothing: in floating point 0.2 * 3 / 3 > 0.2
        return value >= self.bound - slack if self.sign == ">=" else value <= self.bound + slack

    def said(self, unit: str = "") -> str:
        """The criterion as a reader sees it."""
        unit = unit and f" {unit}"
        bound = f"{self.sign} {self.bound:g}{unit}"
        return bound if self.value is None else f"{self.value:g} within {self.within:g}{unit}; direction {bound}"


def at_least(bound: float, n: int = NETWORKS) -> Criterion:
    """``>= bound``; of ``n = 1`` what no chance is in.

    >>> from lib.study import at_least
    >>> at_least(0.5).said("points")
    '>= 0.5 points'
    """
    return Criterion(">=", bound, n=n)


def at_most(bound: float, n: int = NETWORKS) -> Criterion:
    """``<= bound``; of ``n = 1`` what no chance is in.

    >>> from lib.study import at_most
    >>> at_most(0.01, n=1).verdict(0.0, 0.0, n=1)
    'reproduced'
    """
    return Criterion("<=", bound, n=n)


def near(value: float, within: float, direction: Criterion) -> Criterion:
    """The number that a paper prints, how far from it still counts as it, and the direction beside it.

    >>> from lib.study import at_least, near
    >>> near(1.93, 0.2, at_least(1)).said("x")
    '1.93 within 0.2 x; direction >= 1 x'
    """
    return replace(direction, value=value, within=within)


def interval(values: Sequence[float], confidence: float = 0.95, also: float = 0.0) -> tuple[float, float, float]:
    """Mean and Student's t interval of independent values; NaN bounds for fewer than two.

    Args:
        also: a standard error that all values have in common, such as that of chips which all networks met.

    Returns:
        ``(mean, low, high)``.

    >>> from lib.study import interval
    >>> [round(v, 2) for v in interval([1.0, 2.0, 3.0])], interval([5.0])
    ([2.0, -0.48, 4.48], (5.0, nan, nan))
    """
    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()) if len(x) else np.nan, np.nan, np.nan
    mean, error = float(x[0] if np.ptp(x) == 0 else x.mean()), np.hypot(stats.sem(x), also)
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * error)
    return mean, mean - half, mean + half


def common_error(statistic: Callable[..., float], *trials: np.ndarray, times: int = 1000) -> float:
    """The standard error that trials in common leave in a statistic of means over them: a bootstrap over the trials.

    More networks do not make it smaller where all met the same trials, such as the same broken chips.

    Args:
        statistic: a number, of as many arrays of means as there are ``trials``.
        trials: arrays, say ``(networks, chips)``, whose last axis is the same trials in all of them; of one trial the
            error is NaN.

    >>> import numpy as np
    >>> from lib.study import common_error
    >>> chips = np.random.default_rng(0).normal(size=(1, 100))
    >>> networks = np.array([[80.0], [81.0], [82.0]]) + chips  # all suffer alike: the error of 100 chips, not of 300
    >>> round(common_error(lambda mean: mean.mean(), networks), 1)
    0.1
    >>> round(common_error(lambda one, other: (one - other).mean(), networks, networks - 1.0), 9)  # paired: it cancels
    0.0
    """
    count, random = trials[0].shape[-1], np.random.default_rng(0)
    if count < 2:
        return float("nan")
    drawn = random.integers(0, count, (times, count))
    found = [statistic(*(own[..., index].mean(-1) for own in trials)) for index in drawn]
    return float(np.std(found, ddof=1)) * (count / max(1, count - 1)) ** 0.5  # a bootstrap of few is too narrow


@dataclass
class Claim:
    """A statement, whose it is, its criterion, and what tests it if not the study's own network.

    Its values are of independent networks; where they are of sizes, layers, texts, ... instead, ``over`` says so.

    >>> from lib.study import Claim, Criterion
    >>> Claim("C1", "costs little", "ADMM-NN", "direction", "nowhere", "little", Criterion("<=", 0.5), "points").wording
    '<= 0.5 points, from 5 or more networks'
    """

    id: str
    statement: str
    paper: str
    kind: Kind
    source: str
    published: str
    criterion: Criterion
    unit: str = ""
    condition: str = ""
    holding: Criterion | None = None
    fixed: Fixed = "before"
    setting: str = "smaller network, other data"
    dataset: str = ""
    model: str = ""
    over: str = "networks"

    def __post_init__(self) -> None:
        for name, allowed in (("kind", Kind), ("fixed", Fixed), ("setting", Setting)):
            if (value := getattr(self, name)) not in get_args(allowed):
                raise ParameterError(f"claim {self.id}, {name} = {value!r}: allowed are {', '.join(get_args(allowed))}")
        if bool(self.condition) != (self.holding is not None):
            raise ParameterError(f"claim {self.id}: a condition has words and a criterion, or neither")
        if self.holding and self.holding.value is not None:
            raise ParameterError(f"claim {self.id}: a condition is a bound; a number to be near is a claim of its own")

    @property
    def wording(self) -> str:
        """The criterion as a reader sees it, with its unit."""
        n = self.criterion.n
        runs = f"from {n} or more {self.over}" if n > 1 else "arithmetic"
        return f"{self.criterion.said(self.unit)}, {runs}"

    @property
    def joint(self) -> str:
        """The condition as a reader sees it, "" without any."""
        return f"{self.condition} {self.holding.said()}" if self.holding else ""


def judged(claim: Claim, bounds: tuple[float, float], n: int, condition: tuple[float, float, int] | None) -> Verdict:
    """The verdict on a claim and its condition together: a condition that fails fails the claim, whatever it gains.

    Both, ``(low, high)`` from ``n`` and ``(low, high, n)``, need the networks that their criteria ask for.
    """
    verdict = claim.criterion.verdict(*bounds, n)
    if claim.holding is None or verdict == "not reproduced" or n < claim.criterion.n or not np.isfinite(bounds).all():
        return verdict
    low, high, beside = condition or (np.nan, np.nan, 0)
    holds = claim.holding.holds(low, high) if beside >= claim.holding.n else None
    return verdict if holds else "inconclusive" if holds is None else "not reproduced"


def settled(
    claim: Claim, values: Sequence[float], geometric: bool, also: float, condition: Sequence[float] | None
) -> dict[str, Any]:
    """What measurements make of a claim: their mean and interval, what they ask of its condition, and the verdict."""
    mean, low, high = np.exp(interval(np.log(values), also=also)) if geometric else interval(values, also=also)
    if claim.criterion.n == len(values) == 1:
        low = high = mean
    beside, joint = None, claim.joint
    if condition is not None:
        there, lowest, highest = interval(condition)
        if claim.holding.n == len(condition) == 1:
            lowest = highest = there
        beside = lowest, highest, len(condition)
        told = dict(zip(("low", "high", "n"), beside, strict=True))
        told |= {"measured": there, "bound": claim.holding.bound}
        joint += f": {measured(told)}" + f" (n = {len(condition)})" * (len(condition) != len(values))
    verdict = judged(claim, (low, high), len(values), beside)
    found = {"measured": mean, "low": low, "high": high, "n": len(values), "bound": claim.criterion.bound}
    return found | {"condition": joint, "verdict": verdict}


def measured(row: dict[str, Any]) -> str:
    """``mean [low, high]`` of a ledger row, with as many digits as the interval deserves and its ``bound`` needs.

    >>> from lib.study import measured
    >>> measured({"measured": 0.2164, "low": 0.2101, "high": 0.2202, "n": 3})
    '0.216 [0.210, 0.220]'
    >>> measured({"measured": 21.6, "low": 19.4, "high": 23.1, "n": 3})
    '21.60 [19.40, 23.10]'
    >>> measured({"measured": 1.11, "low": 0.997, "high": 1.245, "n": 5, "bound": 1.0})  # 1.00 would be a met bound
    '1.110 [0.997, 1.245]'
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
    ends, bound = (row["low"], row["high"]), row.get("bound")
    while digits < 6 and any(end != bound and round(end, digits) == bound for end in ends):
        digits += 1
    return f"{row['measured']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def too_few(rows: Any) -> Any:
    """Whether a ledger's row, or each of its rows, is open for want of networks; a sum is decided by one.

    >>> from lib.study.claims import too_few
    >>> too_few({"verdict": "inconclusive", "n": 3}), too_few({"verdict": "reproduced", "n": 1})
    (True, False)
    """
    return (rows["verdict"] == "inconclusive") & (rows["n"] < NETWORKS)


def networks(n: int) -> str:
    """How many, in words.

    >>> from lib.study import networks
    >>> networks(1), networks(5)
    ('1 network', '5 networks')
    """
    return f"{n} network{'s' * (n != 1)}"


def chance_of_error(ledger: pd.DataFrame) -> tuple[int, int, float]:
    """Of a ledger's claims with chance in them: how many were tested and decided, and how many decided wrongly at most.

    A 95 % interval lies on the wrong side of a bound as a whole in at most 2.5 % of tests, decided or not.

    >>> import pandas as pd
    >>> from lib.study.claims import chance_of_error
    >>> verdicts = ["reproduced", "inconclusive", "reproduced"]
    >>> chance_of_error(pd.DataFrame({"kind": ["number", "ours", "arithmetic"], "verdict": verdicts, "n": [5, 6, 1]}))
    (2, 1, 0.05)
    """
    tested = ledger[(ledger["n"].astype(int) >= NETWORKS) & (ledger["kind"] != "arithmetic")]
    return len(tested), int((tested["verdict"] != "inconclusive").sum()), 0.025 * len(tested)
