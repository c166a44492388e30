"""The rate of broken cells that a network tolerates."""

from collections.abc import Callable, Iterable, Sequence
from math import ceil, inf, isfinite, log, log1p, log2, nan, sqrt
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap
from torch import nn

from lib.crossbar import CrossbarError
from lib.crossbar.devices import Devices, each
from lib.data import Split
from lib.faults.readback import Mapped
from lib.faults.stuck import StuckAt
from lib.faults.trials import _Bench, accuracies, journal_of, numbers_of
from lib.training import Progress

FEW = 3
"""Chips that a rate is first looked at with, where not all have to meet it."""


class Tolerated(NamedTuple):
    """The rate at which the mean accuracy over chips has dropped by so many points, with its 95 % interval.

    >>> from lib.faults import Tolerated
    >>> plain = Tolerated(0.005, 0.004, 0.006, trials=180, bound="")
    >>> hardened = Tolerated(0.5, 0.5, 0.5, trials=150, bound=">")
    >>> f"{hardened.bound} {hardened.rate / plain.rate:.0f} times"
    '> 100 times'
    """

    rate: float
    low: float
    high: float
    trials: int
    bound: str
    """``<`` or ``>`` when the drop is reached below the lowest, or not before the highest rate that was allowed."""


def tolerated_rate(
    model: nn.Module,
    mapping: Mapped,
    drop: float,
    chips: int | Sequence[int],
    split: Split,
    *,
    faults: Callable[[float], Devices] = StuckAt,
    reference: float | None = None,
    lowest: float = 1e-5,
    highest: float = 0.5,
    precision: float = 0.1,
    sure: float = inf,
    batch_size: int = 100,
    processes: int = 1,
    progress: Progress | None = None,
) -> Tolerated:
    """The rate at which mean accuracy falls ``drop`` points below ``reference``, by bisection of its logarithm.

    As the faults of a chip are nested, accuracy falls along the rate on (nearly) every chip, and about
    ``log2(log(highest / lowest) / (2 precision))`` rates have to be measured. Between the two that are left the drop is
    interpolated; the interval is a bootstrap over chips, all rates of a chip together, and not a number for one chip.

    Over many sets of chips the rate is right on average, to one or two per cent of its logarithm; one set of 20 or 30
    chips is not: on 784-32-10 neurons, against 1,500 chips, its logarithm had a standard deviation of 0.15 to 0.3, and
    the interval held the true rate in 86 to 91 % of sets. Networks that meet the same chips are off together, so
    compare them by the ratio of their rates, and never take their agreement for precision.

    Args:
        drop: points of accuracy, 1.0 for one image in a hundred.
        reference: accuracy in [0, 1]; by default that of the healthy mapped model.
        precision: half the width of the last bracket, as a share of the rate.
        sure: a rate far from the one sought is left to the first `FEW` chips, twice as many, ..., whose mean lies this
            many standard errors, and a quarter of the drop, from where it has to be. All chips meet the last bracket,
            and rates beside it until the interval ends between two of them, or at ``lowest`` or ``highest``, where it
            is open. By default all meet every rate.

    Raises:
        CrossbarError: as `sweep`; a drop that is not positive, a reference that is no number; bounds that are not
            0 < lowest < highest <= 1.

    >>> from lib import data, faults
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4, bias=False))
    >>> model[1].weight.data, split = torch.eye(4), data.Split(torch.eye(4).reshape(4, 1, 2, 2), torch.arange(4))
    >>> found = faults.tolerated_rate(model, "two_column", drop=10, chips=50, split=split)
    >>> round(found.rate, 2), found.low < found.rate < found.high  # of 32 cells
    (0.08, True)
    """
    if not (0 < drop < inf and 0 < lowest < highest <= 1 and 0 < precision < inf and sure > 0):
        values = f"{drop=}, {lowest=}, {highest=}, {precision=}, {sure=}"
        raise CrossbarError(f"{values}: allowed are positive, and lowest < highest")
    if reference is not None and not isfinite(reference):
        raise CrossbarError(f"reference = {reference}: allowed is an accuracy")
    numbers = numbers_of(chips)
    bench = _Bench(model, mapping, split, batch_size)
    journal = journal_of(bench)
    measured: dict[float, list[float]] = {}

    def look(rate: float, count: int) -> list[float]:
        """Accuracies of the first so many chips."""
        known = measured.setdefault(rate, [])
        tasks = [(each(faults(rate)), chip) for chip in numbers[len(known) : count]]
        found = {chip: accuracy for _, chip, accuracy in accuracies(bench, journal, tasks, processes)}
        known += [found[chip] for _, chip in tasks]
        return known

    def holds(rate: float) -> bool:
        count = len(numbers) if sure == inf else min(FEW, len(numbers))
        while not _clear(look(rate, count), floor, sure, drop) and count < len(numbers):
            count = min(2 * count, len(numbers))
        if progress:
            progress(len(measured) / (steps + 1), f"rate {rate:.3g}: {np.mean(measured[rate]):.1%}")
        return np.mean(measured[rate]) >= floor

    floor = (bench.trial((), 0) if reference is None else reference) - drop / 100
    steps = max(1, ceil(log2(log(highest / lowest) / log1p(2 * precision))))
    low, high = lowest, highest
    for _ in range(steps):
        middle = sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    bound = ">" if high == highest and holds(highest) else "<" if low == lowest and not holds(lowest) else ""
    wanted = [low, high]
    while wanted:
        for rate in wanted:
            look(rate, len(numbers))
        rates = np.array(sorted(rate for rate, found in measured.items() if len(found) == len(numbers)))
        rate, ends = _with_interval(rates, np.array([measured[r] for r in rates]), floor)
        wanted = [_beyond(rates[0], lowest, measured)] if ends[0] <= rates[0] > lowest else []
        wanted += [_beyond(rates[-1], highest, measured)] if ends[1] >= rates[-1] < highest else []
    return Tolerated(rate, *ends, sum(map(len, measured.values())), bound)


def _beyond(outermost: float, bound: float, measured: Iterable[float]) -> float:
    """The next rate outwards from the outermost that all chips have met, by a factor of two at most."""
    reach = max(outermost / 2, bound) if bound < outermost else min(2 * outermost, bound)
    between = [rate for rate in measured if min(outermost, reach) < rate < max(outermost, reach)]  # some have met
    return min(between, key=lambda rate: abs(log(rate / outermost)), default=reach)


def _clear(found: list[float], floor: float, sure: float, drop: float) -> bool:
    """Whether the mean over a few chips says on which side of the floor that over all lies."""
    gap = abs(np.mean(found) - floor)
    if len(found) < 2 or sure == inf:
        return False
    return gap > max(sure * np.std(found, ddof=1) / sqrt(len(found)), drop / 400)


def _with_interval(rates: np.ndarray, grid: np.ndarray, floor: float) -> tuple[float, tuple[float, float]]:
    """The crossing of the mean of ``grid`` ``(rates, chips)``, and its bootstrap interval over chips."""
    rate, chips = float(_crossing(rates, grid.mean(1), floor)), grid.shape[1]
    if chips == 1:
        return rate, (nan, nan)
    crossing = lambda index, axis=-1: _crossing(rates, grid[:, index].mean(-1), floor)  # noqa: E731
    options = {"n_resamples": 2000, "method": "percentile", "vectorized": True, "rng": np.random.default_rng(0)}
    low, high = bootstrap((np.arange(chips),), crossing, **options).confidence_interval
    return rate, (float(low), float(high))


def _crossing(rates: np.ndarray, accuracy: np.ndarray, floor: float) -> np.ndarray:
    """Where curves ``(rates, ...)`` first fall below a floor, interpolated in the rate's logarithm; else an end."""
    falling = np.minimum.accumulate(accuracy, axis=0)
    after = np.clip((falling >= floor).sum(0), 1, len(rates) - 1)
    above, below = (np.take_along_axis(falling, i[None], 0)[0] for i in (after - 1, after))
    share = np.clip((above - floor) / np.maximum(above - below, 1e-12), 0, 1)
    x = np.log(rates)
    return np.exp(x[after - 1] + share * (x[after] - x[after - 1]))
