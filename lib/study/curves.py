"""Reading a measured curve where accuracy crosses a floor."""

from collections.abc import Sequence
from itertools import pairwise
from math import exp, log

from lib.study.ranges import ParameterError


def gain_at(gains: Sequence[float], accuracies: Sequence[float], floor: float) -> float:
    """The gain (rate, compression, ...) up to which accuracy stays at or above ``floor``: the *first* crossing.

    Points are taken in the order of their gain, of several at one gain the most accurate; between the last that holds
    and the first that does not, accuracy is interpolated linearly in the logarithm of the gain. The largest gain when
    accuracy never falls below the floor, so that the value is then a lower bound; NaN when not even the smallest gain
    holds it, or the first that does not has an accuracy of NaN.

    Raises:
        ParameterError: lists of different length, empty, or a gain that is not positive.

    >>> from lib.study import gain_at
    >>> round(gain_at([1, 4, 16], [90, 89, 87], 88), 3)
    8.0
    """
    if len(gains) != len(accuracies) or not len(gains) or not all(gain > 0 for gain in gains):
        raise ParameterError(f"{len(gains)} gains and {len(accuracies)} accuracies: expected as many, gains above 0")
    best = dict(sorted(zip(gains, accuracies, strict=True)))  # of equal gains the last, the most accurate
    points = [*best.items()]
    if not points[0][1] >= floor:  # a NaN holds nothing
        return float("nan")
    for (g0, a0), (g1, a1) in pairwise(points):
        if not a1 >= floor:
            return exp(log(g0) + (a0 - floor) / (a0 - a1) * (log(g1) - log(g0)))
    return float(points[-1][0])
