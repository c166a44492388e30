"""Row-stationary chips in closed form: Eyeriss as the DNN-Chip Predictor counts it, and the search over its tilings.

Rows of filters stay in the processing elements, rows of inputs run diagonally through them, and partial sums go from
one to the next. Filters are split in four, ``K = K0 K1 K2 K3`` (register file, array, buffer, DRAM), channels in three
(``C0 C1 C2``), output rows in two (``Yo1 Yo3``); kernels and rows of the image stay whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, inf, prod
from typing import Any, Literal

import numpy as np
import pandas as pd

from lib.costs.digital.loops import Loops, Words, combined, priced, splits, tidy
from lib.costs.energy import CostError
from lib.technology import table

Objective = Literal["energy", "latency", "both"]

BUFFER = ("buffer", "fill")
"""Levels of accesses that pass the buffer's port."""

RELEASED = {"mac": 1.0, "dram": 0.3, "fill": 0.5, "buffer": 0.5, "network": 2.0, "register": 2.0}
"""Unit energies (pJ for 16 bits) in the released script: not Eyeriss's ratios, and DRAM below a multiplication."""


def eyeriss_units() -> dict[str, float]:
    """Energy of an access to a word of 16 bits, in multiply-accumulates, as Eyeriss printed them (ISCA 2016).

    >>> from lib.costs.digital import eyeriss_units
    >>> eyeriss_units()["dram"]
    200.0
    """
    rows = {"mac": "mac", "dram": "dram", "fill": "buffer", "buffer": "buffer", "network": "network"}
    return {k: table("eyeriss")(v, "energy_per_mac") for k, v in (rows | {"register": "register_file"}).items()}


def accesses(layer: Loops, t: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """Words moved at each level by one group of a layer, for one tiling or for arrays of them.

    ``fill`` is the buffer's side of what comes from and goes to DRAM; weights bypass the buffer.

    Args:
        t: ``K0`` to ``K3``, ``C0`` to ``C2``, ``Yo1`` and ``Yo3``.

    >>> from lib.costs.digital import Loops, accesses
    >>> t = {"K0": 10, "K1": 1, "K2": 1, "K3": 5, "C0": 2, "C1": 2, "C2": 5, "Yo1": 8, "Yo3": 1}
    >>> words = accesses(Loops(K=50, C=20, Yo=8, Xo=8, R=5, S=5), t)
    >>> words["network", "weights"], int(words["register", "sums"])
    (200000, 2880000)
    """
    inputs, weights, outputs, macs = layer.inputs, layer.weights, layer.outputs, layer.macs
    share = layer.R * layer.Yo / layer.Yi  # rows of inputs that the rows of the array take, for each that there is
    return {
        ("mac", "all"): macs + 0 * t["K0"],
        ("dram", "inputs"): inputs * t["K3"],
        ("dram", "weights"): weights * t["Yo3"],
        ("dram", "sums"): outputs + 0 * t["K0"],
        ("fill", "inputs"): inputs * t["K3"],
        ("fill", "sums"): outputs + 0 * t["K0"],
        ("buffer", "inputs"): inputs * t["K3"] * t["K2"],
        ("buffer", "sums"): outputs * np.maximum(2 * (t["C2"] - 1), 1),
        ("network", "inputs"): inputs * t["K3"] * t["K2"] * t["K1"] * share,
        ("network", "weights"): weights * t["Yo3"] * t["Yo1"],
        ("network", "sums"): outputs * np.maximum(t["C2"] * (t["C1"] * layer.R - 1), 1),
        ("register", "inputs"): macs + 0 * t["K0"],
        ("register", "weights"): macs + 0 * t["K0"],
        ("register", "sums"): outputs * np.maximum(2 * layer.R * (layer.C * layer.S - t["C1"] * t["C2"]), 1),
    }


def cycles(layer: Loops, t: Mapping[str, Any]) -> Any:
    """Of one group: every element that is in use does one multiply-accumulate in each."""
    return layer.N * prod(t[k] for k in ("K3", "K2", "K0", "C2", "C0", "Yo3")) * layer.Xo * layer.S


def chosen(tilings: pd.DataFrame, objective: Objective) -> pd.Series:
    """The best row by ``energy`` and ``cycles``.

    Args:
        objective: the least ``energy`` (and of these the least time), the least ``latency`` (and of these the least
            energy), or ``both``, the least sum of the two, each less its least and divided by its largest: the
            released script's choice.

    Raises:
        CostError: another objective.
    """
    energy, time = tilings["energy"].to_numpy(), tilings["cycles"].to_numpy()
    keys = {"energy": (time, energy), "latency": (energy, time)}
    keys["both"] = (time, (energy - energy.min()) / energy.max() + (time - time.min()) / time.max())
    if objective not in keys:
        raise CostError(f"objective = {objective!r}: allowed are {', '.join(keys)}")
    return tilings.iloc[np.lexsort(keys[objective])[0]]


@dataclass(frozen=True)
class RowStationary:
    """A row-stationary chip; the numbers are Eyeriss's, as the released script has them.

    Attributes:
        processors: processing elements. input_words, weight_words, sum_words: of 16 bits, in the registers of each.
        buffer_words: of the global buffer, for inputs and partial sums.
        buffer_port, network_port: words of 16 bits that the buffer, and the network of elements for each kind of data,
            move in a cycle; unlimited, as the released configuration of Eyeriss has it, where nothing is said.
        released: as the script that the authors released: its unit energies, limits that are not quite reached, and
            the tiling with the smallest sum of normalized energy and latency.

    >>> from lib.costs.digital import Loops, RowStationary
    >>> layer = Loops(K=64, C=64, Yo=8, Xo=8, R=3, S=3, Yi=8, Xi=8)
    >>> found = RowStationary(released=True).search(layer)
    >>> f"{found['energy'] / 1e9:.7f} mJ, {found['cycles'] / 250e3:.6f} ms"  # pJ, and 250 MHz
    '0.0201023 mJ, 0.098304 ms'
    """

    processors: int = 168
    input_words: int = 12
    weight_words: int = 192
    sum_words: int = 16
    buffer_words: int = 65536
    buffer_port: float = inf
    network_port: float = inf
    released: bool = False

    def __post_init__(self) -> None:
        for name in ("processors", "input_words", "weight_words", "sum_words", "buffer_words"):
            if getattr(self, name) < 1:
                raise CostError(f"{name} = {getattr(self, name)}: 1 or more is allowed")
        for name in ("buffer_port", "network_port"):
            if not getattr(self, name) > 0:
                raise CostError(f"{name} = {getattr(self, name)} words a cycle: more than 0 is allowed")

    @property
    def units(self) -> dict[str, float]:
        """Unit energies by level."""
        return RELEASED if self.released else eyeriss_units()

    @property
    def area_mm2(self) -> float:
        """At 45 nm: multipliers, adders and registers of the Aladdin library, and a buffer as dense as ISAAC's eDRAM.

        A multiplier of 16 bits takes a quarter of one of 32, and ISAAC's memory grows with the square of the feature
        size: assumptions, so that only areas by this rule should be compared.
        """
        area = {name: table("digital_area")(name, "area_um2") for name in ("adder_32", "multiplier_32", "register_1")}
        words = self.input_words + self.weight_words + self.sum_words
        element = area["multiplier_32"] / 4 + area["adder_32"] + 16 * words * area["register_1"]
        bit = table("isaac")("tile_edram", "area_mm2") / (64 * 1024 * 8) * (45 / 32) ** 2
        return self.processors * element / 1e6 + 16 * self.buffer_words * bit

    def latency(self, arithmetic: Any, words: Words) -> Any:
        """Cycles of one group: the longest of its arithmetic, its traffic at the buffer, and each network's.

        Args:
            words: as of `accesses`; what DRAM fills and takes passes the buffer's port too.

        >>> from lib.costs.digital import RowStationary
        >>> words = {("buffer", "inputs"): 60, ("fill", "inputs"): 20, ("network", "weights"): 30}
        >>> chips = RowStationary(buffer_port=8), RowStationary(network_port=2)
        >>> tuple(float(chip.latency(7, words)) for chip in chips)
        (10.0, 15.0)
        """
        longest = np.maximum(
            arithmetic, sum(n for (level, _), n in words.items() if level in BUFFER) / self.buffer_port
        )
        for (level, _), count in words.items():
            longest = np.maximum(longest, count / self.network_port) if level == "network" else longest
        return longest

    def needs(self, layer: Loops, t: Mapping[str, Any]) -> dict[str, tuple[Any, int]]:
        """What a tiling takes of each resource, and how much there is.

        Of a batch it is one input's partial sums, though weights come once for all: Eyeriss's printed mappings have
        room for no more.
        """
        window = ((t["Yo1"] - 1) * layer.U + layer.R) * ((layer.Xo - 1) * layer.U + layer.S)
        sums = t["K2"] * t["K1"] * t["K0"] * t["Yo1"] * layer.Xo
        return {
            "processors": (t["K1"] * t["C1"] * t["Yo1"] * layer.R, self.processors),
            "input_words": (t["C0"] * layer.S, self.input_words),
            "weight_words": (t["K0"] * t["C0"] * layer.S, self.weight_words),
            "sum_words": (t["K0"], self.sum_words),
            "buffer_words": (t["C1"] * t["C0"] * window + sums, self.buffer_words),
        }

    def fits(self, layer: Loops, t: Mapping[str, Any]) -> Any:
        """Whether tilings fit the chip."""
        needs = self.needs(layer, t)
        below = [n < has if self.released and name != "sum_words" else n <= has for name, (n, has) in needs.items()]
        spread = [t["Yo1"] != 1] if self.released and layer.Yo > 1 else []
        return np.logical_and.reduce([*below, *spread])

    def check(self, layer: Loops, t: Mapping[str, int]) -> None:
        """That a tiling covers a layer and fits.

        Raises:
            CostError: it does not; the message names the loop or the resource, and by how much.
        """
        for loop in ("K", "C", "Yo"):
            product = prod(v for k, v in t.items() if k[:-1] == loop)
            if product < getattr(layer, loop):
                raise CostError(f"{layer.layer}: tiles of {loop} cover {product} of {getattr(layer, loop)}")
        for name, (needed, there) in self.needs(layer, t).items():
            if needed > there:
                raise CostError(f"{layer.layer}: {name} = {there}, but the tiling takes {needed}")

    def tilings(self, layer: Loops) -> pd.DataFrame:
        """Every tiling of a layer that fits: its factors, and ``energy`` and ``cycles`` of one group.

        Raises:
            CostError: none fits; the message says what each resource would at least have to be.
        """
        ways = {"K": splits(layer.K, 4), "C": splits(layer.C, 3), "Yo": splits(layer.Yo, 2)}
        ways["K"] = ways["K"][ways["K"][:, 0] <= self.sum_words]
        ways["C"] = ways["C"][ways["C"][:, 0] * layer.S <= self.input_words]
        if not len(ways["C"]):
            raise CostError(f"{layer.layer}: input_words = {self.input_words} hold no row of {layer.S} weights")
        t = combined(ways)
        t["Yo3"], t["Yo1"] = t.pop("Yo1"), t.pop("Yo0")
        ok = self.fits(layer, t)
        if not ok.any():
            short = {n: (int(np.min(need)), has) for n, (need, has) in self.needs(layer, t).items()}
            least = ", ".join(f"{n} {has} of at least {need}" for n, (need, has) in short.items())
            raise CostError(f"{layer.layer}: no tiling fits the chip ({least})")
        found = pd.DataFrame({name: value[ok] for name, value in t.items()})
        t = {name: value[ok].astype(float) for name, value in t.items()}
        words = accesses(layer, t)
        return found.assign(energy=priced(words, self.units), cycles=self.latency(cycles(layer, t), words))

    def search(self, layer: Loops, objective: Objective = "both") -> pd.Series:
        """The best of all tilings of a layer.

        Args:
            objective: as `chosen`.

        Returns:
            The tiling; ``cycles`` and ``energy`` of all groups; ``valid``, how many tilings fitted.

        Raises:
            CostError: no tiling fits, or another objective.
        """
        found = self.tilings(layer)
        best = chosen(found, objective)
        tiling = {name: int(best[name]) for name in found.columns.drop(["energy", "cycles"])}
        total = {"cycles": ceil(best["cycles"]) * layer.groups, "energy": float(best["energy"]) * layer.groups}
        return pd.Series({"layer": layer.layer, **tiling, **total, "valid": len(found)})

    def bill(self, layers: list[Loops], objective: Objective = "both") -> pd.DataFrame:
        """What a network takes, each layer at its best tiling.

        Returns:
            A row for each layer, level and kind of data: ``layer``, ``level``, ``data``, ``words``, ``energy`` (in
            multiply-accumulates of 16 bits, in pJ where ``released``) and ``cycles`` of the whole layer.
        """
        parts = []
        for layer in layers:
            best = self.search(layer, objective)
            part = tidy(accesses(layer, best.to_dict()), self.units, layer.groups)
            parts.append(part.assign(layer=layer.layer, cycles=best["cycles"]))
        return pd.concat(parts, ignore_index=True)[["layer", "level", "data", "words", "energy", "cycles"]]
