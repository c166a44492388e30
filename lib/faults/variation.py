"""Conductances that differ from what was written: write variation, read noise, drift.

Conductances stay above zero: a deviation that would leave the physical range ends at it.
"""

from dataclasses import dataclass
from math import inf, log, sqrt
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lib.crossbar import CrossbarError, Device, Mapping
from lib.faults.chips import stream
from lib.technology import table

WRITE, DRIFT, READ = 2, 3, 4  # purposes of random streams; 0 and 1 are the failures'


def _normal(cells: Tensor, chip: int, layer: str, *purpose: int) -> Tensor:
    """Standard normal numbers for all cells of a layer; a single column gets those of the first of a pair."""
    slices, columns, *weight = cells.shape
    draw = stream(chip, layer, *purpose).standard_normal((slices, 2, *weight), dtype=np.float32)[:, :columns]
    return torch.from_numpy(draw).to(cells)


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise CrossbarError(message)


@dataclass(frozen=True)
class Variation(Device):
    """Write variation, drawn once for every cell of a chip.

    ``lognormal``: ``G exp(N(0, sigma))``, whose mean is ``exp(sigma^2 / 2)`` times ``G`` unless ``mean_corrected``;
    ``gaussian``: ``G (1 + N(0, sigma))``; ``additive``: ``G + N(0, sigma) G_max``, the same for all states.

    >>> from lib.crossbar import Mapping
    >>> from lib.faults import Variation
    >>> cells = Variation(0.1, mean_corrected=True).disturb(torch.ones(1, 1, 100, 100), Mapping(), chip=0, layer="fc1")
    >>> round(cells.mean().item(), 2), round(cells.std().item(), 2)
    (1.0, 0.1)
    """

    sigma: float
    kind: Literal["lognormal", "gaussian", "additive"] = "lognormal"
    mean_corrected: bool = False
    draws: ClassVar = ("write",)

    def __post_init__(self) -> None:
        _need(0 <= self.sigma < inf, f"sigma = {self.sigma}: allowed are numbers from 0")
        kinds = ("lognormal", "gaussian", "additive")
        _need(self.kind in kinds, f"kind = {self.kind!r}: allowed are {', '.join(kinds)}")

    def disturb(self, cells: Tensor, mapping: Mapping, chip: int, layer: str) -> Tensor:
        """Each cell by its own deviation."""
        n = _normal(cells, chip, layer, WRITE).mul_(self.sigma)
        if self.kind == "lognormal":
            return cells * n.sub_(self.sigma**2 / 2 if self.mean_corrected else 0).exp_()
        return (cells * (1 + n) if self.kind == "gaussian" else cells + n).clamp_(min=0)


@dataclass(frozen=True)
class Published(Device):
    """Write variation of a published device: ``name`` is a row of ``data/technology/write_variation.csv``.

    The lowest conductance that was measured is the device's own: choose the mapping's ``on_off`` accordingly.

    >>> from lib.faults import Published
    >>> sigma = Published("milo_hfo2").sigma(torch.tensor([1.0]))
    >>> round(225 * sigma.item(), 3)  # uS, at G_max = 225 uS: 4.782321 - 0.009107 * 225
    2.733
    """

    name: str
    draws: ClassVar = ("write",)

    def __post_init__(self) -> None:
        known = table("write_variation").frame.index
        _need(self.name in known, f"device {self.name!r} is unknown: allowed are {', '.join(known)}")

    def sigma(self, cells: Tensor) -> Tensor:
        """The standard deviation at each conductance, both in shares of G_max."""
        figures = table("write_variation")
        top, lowest = figures(self.name, "g_max_uS"), figures(self.name, "lowest_uS")
        unit = top if figures.frame.loc[self.name, "variable"] == "G_uS" else 1
        x = unit * cells.clamp(lowest / top, 1)
        polynomial = sum(figures(self.name, f"c{k}_uS") * x**k for k in range(5))
        return polynomial.clamp(min=0) / top

    def disturb(self, cells: Tensor, mapping: Mapping, chip: int, layer: str) -> Tensor:
        """Each cell by a normal deviation of its state's width."""
        return (cells + self.sigma(cells) * _normal(cells, chip, layer, WRITE)).clamp_(min=0)


@dataclass(frozen=True)
class PowerLaw(Device):
    """Retention ``G(t) = G (t / 1 s)^(exponent)`` (NeuroSim), upward, downward, or up or down by cell at random.

    >>> from lib.crossbar import Mapping
    >>> from lib.faults import PowerLaw
    >>> cells = PowerLaw(seconds=100, exponent=0.05).disturb(torch.ones(1, 1, 1, 1), Mapping(), chip=0, layer="fc1")
    >>> round(cells.item(), 4)  # 100^-0.05
    0.7943
    """

    seconds: float
    exponent: float
    toward: Literal["on", "off", "random"] = "off"
    draws: ClassVar = ("drift",)

    def __post_init__(self) -> None:
        _need(self.seconds >= 1, f"seconds = {self.seconds}: allowed is 1 or more")
        _need(self.exponent >= 0, f"exponent = {self.exponent}: allowed is 0 or more; toward gives its sign")
        _need(self.toward in ("on", "off", "random"), f"toward = {self.toward!r}: allowed are on, off, random")

    def disturb(self, cells: Tensor, mapping: Mapping, chip: int, layer: str) -> Tensor:
        """Kept inside ``[G_min, G_max]``."""
        sign = {"on": 1.0, "off": -1.0}.get(self.toward) or _normal(cells, chip, layer, DRIFT).sign()
        return (cells * self.seconds ** (sign * self.exponent)).clamp_(mapping.g_min, 1)


@dataclass(frozen=True)
class PhaseChange(Device):
    """A phase-change cell some seconds after writing: programming error, drift and 1/f noise (AIHWKit).

    The 1/f noise is drawn once for a chip, as if it were read once.

    >>> from lib.crossbar import Mapping
    >>> from lib.faults import PhaseChange
    >>> fresh, old = (
    ...     PhaseChange(seconds).disturb(torch.full((1, 1, 100, 100), 0.5), Mapping(), chip=0, layer="fc1")
    ...     for seconds in (20, 86400)
    ... )
    >>> round(fresh.mean().item(), 2), round((old / fresh).median().item(), 2), round((86400 / 20) ** -0.049, 2)
    (0.5, 0.66, 0.66)
    """

    seconds: float
    draws: ClassVar = ("write", "drift", "read")

    def __post_init__(self) -> None:
        _need(
            self.seconds >= 20, f"seconds = {self.seconds}: drift counts from 20 s after writing; allowed is 20 or more"
        )

    def disturb(self, cells: Tensor, mapping: Mapping, chip: int, layer: str) -> Tensor:
        """``sigma_prog``, then ``(t / 20 s)^-nu`` with ``nu`` by cell, then noise of ``Q(g) sqrt(ln ...)``."""
        written = Published("pcm_programming").disturb(cells, mapping, chip, layer)
        g = cells.clamp(min=1e-6)
        mean = (0.0244 - 0.0155 * g.log()).clamp_(0.049, 0.1)
        spread = (-0.0059 - 0.0125 * g.log()).clamp_(0.008, 0.045)
        nu = (mean + spread * _normal(cells, chip, layer, DRIFT)).clamp_(min=0)
        drifted = written * (self.seconds / 20) ** -nu
        read_s = 250e-9
        noise = (0.0088 / g**0.65).clamp_(max=0.2) * sqrt(log((self.seconds + read_s) / (2 * read_s)))
        return (drifted * (1 + noise * _normal(cells, chip, layer, READ))).clamp_(min=0)


@dataclass(frozen=True)
class Relaxation(Device):
    """Relaxation of CMO/HfOx cells: mean ``-0.0890 ln t`` and deviation ``0.0420 ln t + 0.4118`` uS (AIHWKit).

    >>> from lib.crossbar import Mapping
    >>> from lib.faults import Relaxation
    >>> device = Relaxation(seconds=1000, g_max_uS=90)
    >>> cells = 90 * device.disturb(torch.full((1, 1, 100, 100), 0.5), Mapping(), chip=0, layer="fc1")
    >>> round(cells.mean().item(), 1), round(cells.std().item(), 1)  # 45 - 0.089 ln 1000, 0.042 ln 1000 + 0.41 uS
    (44.4, 0.7)
    """

    seconds: float
    g_max_uS: float
    draws: ClassVar = ("drift",)

    def __post_init__(self) -> None:
        ok = self.seconds >= 1 and self.g_max_uS > 0
        _need(ok, f"{self.seconds=}, {self.g_max_uS=}: allowed are 1 s or more, above 0 uS")

    def disturb(self, cells: Tensor, mapping: Mapping, chip: int, layer: str) -> Tensor:
        """The same shift and width at every level."""
        age = log(self.seconds)
        shift = -0.0890 * age + (0.0420 * age + 0.4118) * _normal(cells, chip, layer, DRIFT)
        return (cells + shift / self.g_max_uS).clamp_(min=0)


@dataclass(frozen=True)
class ReadNoise(Device):
    """Gaussian noise of ``sigma`` G_max on every cell, new at every read: it leaves the cells as they are.

    A trial adds what it does to each sum of a column, exactly: a normal number of variance
    ``Var[w] * sum(x^2)`` for every output, where ``Var[w]`` is `Mapping.noise_gain` squared times ``sigma`` squared.

    >>> from lib.crossbar import Mapping
    >>> from lib.faults import ReadNoise
    >>> noise, cells = ReadNoise(0.1), torch.ones(1, 2, 1)
    >>> noise.disturb(cells, Mapping("two_column"), chip=0, layer="fc1") is cells
    True
    >>> round(noise.sigma * Mapping("two_column").noise_gain(scale=1.0), 4)  # of a weight, from two cells
    0.1414
    """

    sigma: float
    lasting: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _need(0 <= self.sigma < inf, f"sigma = {self.sigma}: allowed are numbers from 0")

    def disturb(self, cells: Tensor, mapping: Mapping, chip: int, layer: str) -> Tensor:
        """Nothing that lasts."""
        return cells
