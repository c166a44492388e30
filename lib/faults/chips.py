"""Chips: a chip is a number, from which all that is particular about its cells follows.

The same chip has the same faults and deviations at every setting of a device, under every mapping of as many slices,
and in every network whose layers have the same names and shapes. Of two devices that draw the same kind of random
numbers only the first has those of the chip (`lib.crossbar.devices.disturbed`), so that their populations are two.

Which cells fail, and when?

Every cell has a failure time, exponential with mean 1. At a rate ``p`` of broken cells those are broken whose time has
come before ``-log(1 - p)``: each cell with probability ``p``, and cells that are broken at one rate are broken, and
stuck at the same end, at every higher one. Failures come as events of a Poisson process, in time order, each taking
one cell, a line or a neighbourhood; so drawing a chip costs as much as it has faults, not as much as it has cells.
"""

import zlib
from math import expm1, log1p

import numpy as np

EARLIEST = 2.0**-14
"""Times are drawn in periods that double from here on, each with a random stream of its own."""

LATE = 2.0**-6
"""From this time on, a rate of 1.6 %, a number for every site is drawn faster than events in time order."""


def stream(chip: int, layer: str, *purpose: int) -> np.random.Generator:
    """The random numbers of one layer of one chip for one purpose; independent of all others.

    Purposes from 100 on are free for devices of your own, each with a number and a word in ``draws`` of its own; those
    below are taken by `lib.faults`.

    >>> import torch
    >>> from dataclasses import dataclass
    >>> from typing import ClassVar
    >>> from lib.crossbar import Mapping
    >>> from lib.faults import Device, read_back, stream
    >>> @dataclass(frozen=True)
    ... class Open(Device):  # a share of all cells conducts nothing
    ...     share: float
    ...     draws: ClassVar = ("open",)  # so that two of them break different cells
    ...     def disturb(self, cells, mapping, chip, layer):
    ...         broken = stream(chip, layer, 100).random(cells.shape) < self.share
    ...         return cells.masked_fill(torch.from_numpy(broken).to(cells.device), 0.0)
    >>> read_back(torch.ones(1000), Mapping("two_column"), Open(0.1), chip=0, layer="fc1").mean().item()
    0.9...
    """
    return np.random.default_rng([chip, zlib.crc32(layer.encode()), *purpose])


def time_of(rate: float) -> float:
    """The time by which a share ``rate`` of all cells has failed."""
    return -log1p(-rate) if rate < 1 else np.inf


def events(sites: int, intensity: float, until: float, chip: int, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Places in ``range(sites)`` where events happen before a time, in time order, and a uniform number for each.

    Args:
        intensity: events per site in a unit of time.
    """
    places, marks = [np.empty(0, np.int64)], [np.empty(0)]
    start, end, period = 0.0, EARLIEST, 0
    while start < until:
        random = stream(chip, layer, 0, period)
        count = random.poisson(sites * intensity * (end - start))
        gaps = random.standard_exponential(count + 1)  # uniform times in order are partial sums of gaps over their sum
        times = start + (end - start) * np.cumsum(gaps)[:-1] / gaps.sum()
        early = np.searchsorted(times, until)
        places.append(random.integers(0, sites, count)[:early])
        marks.append(random.random(count)[:early])
        start, end, period = end, 2 * end, period + 1
    return np.concatenate(places), np.concatenate(marks)


def failures(sites: int, until: float, chip: int, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """The sites that fail on their own before a time, each once, and the uniform number of its first event."""
    places, marks = events(sites, 1.0, min(until, LATE), chip, layer)
    places, first = np.unique(places, return_index=True)
    marks = marks[first]
    if until > LATE:
        number = stream(chip, layer, 1).integers(0, 1 << 32, sites, dtype=np.uint32)
        late = number < -expm1(LATE - until) * 2**32  # the exponential has no memory
        late[places] = False
        index = late.nonzero()[0]
        places = np.append(places, index)
        marks = np.append(marks, (number[index] & 0xFFFF) / 2**16)  # the low bits say nothing of the time
    return places, marks
