"""Accelerators priced from published tables: energy, area and latency of what `lib.crossbar` counts.

Energies are in pJ, areas in mm2, times in ns. Every figure is read from ``data/technology``; what follows from several
is computed here and says how. Charging events alone assumes that nothing idle draws power: all totals are lower bounds,
and absolute ones are good to 30 % at best.
"""

from collections.abc import Mapping as Dict
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import ceil
from typing import ClassVar

import numpy as np
import pandas as pd

from lib.costs.energy import CostError
from lib.crossbar import Array, Mapping, Polarized
from lib.crossbar.tiling import layout
from lib.technology import table

READ_NS = 100.0
"""One read of an ISAAC array, all its columns converted (ISCA 2016)."""


@cache
def converter_law() -> tuple[tuple[float, float], tuple[float, float]]:
    """ISAAC's converters at other widths: ``a * bits + b * 2^bits``, for energy (pJ) and area (um2).

    Supply, memory and clock grow with the bits and the capacitors with their power of two, as ISAAC says; ``a`` and
    ``b`` are the least-squares fit to the seven points of the Accelergy library.
    """
    points = table("adc").frame.filter(like="isaac_scaled", axis=0)
    terms = np.stack([points["bits"], 2.0 ** points["bits"]], axis=1)
    fits = (np.linalg.lstsq(terms, points[c].to_numpy(), rcond=None)[0] for c in ("energy_pJ", "area_um2"))
    return tuple(tuple(float(x) for x in fit) for fit in fits)


def converter(bits: int) -> tuple[float, float]:
    """Energy (pJ) of a conversion and area (um2) of a converter by ISAAC's law, tied to its own 8 bits."""
    (energy, at_8), (area, _) = ([a * b + c * 2**b for b in (bits, 8)] for a, c in converter_law())
    return energy / at_8 * table("isaac")("ima_adc", "power_mW") * READ_NS / (8 * 128), area


@dataclass(frozen=True)
class Design:
    """What the accelerators below share. ``energy``, ``area`` and ``latency`` take rows of `lib.crossbar.tile`.

    Attributes:
        array: how a network lies in it.
        counted, left_out: for the reader.
    """

    array: Array
    name: ClassVar[str] = ""
    counted: ClassVar[str] = ""
    left_out: ClassVar[str] = ""

    def events(self) -> dict[str, tuple[str, float]]:
        """By component: the column of `lib.crossbar.tile` that counts it, and what one costs in pJ."""
        raise NotImplementedError

    @property
    def read_ns(self) -> float:
        """Time of one read of an array."""
        return READ_NS

    def energy(self, tiles: pd.DataFrame, cycles: Dict[str, float] | None = None) -> pd.DataFrame:
        """Energy of one input in pJ, of what holds something: a row per layer, a column per component and ``total``.

        Args:
            cycles: steps that inputs take on average, by layer, where zeros ahead are skipped
                (`lib.crossbar.effective_cycles`); others take all of ``array.steps``.

        Raises:
            CostError: rows that were counted for another array; a layer of ``cycles`` that is not there, or more of
                them than steps.
        """
        share = self.share(tiles, cycles)
        parts = {part: tiles[column] * share * pj for part, (column, pj) in self.events().items()}
        found = pd.DataFrame({"layer": tiles["layer"], **parts})
        return found.assign(total=found.drop(columns="layer").sum(axis=1))

    def area(self, arrays: int) -> pd.Series:
        """Area of so many arrays and what goes with them, in mm2, by component."""
        raise NotImplementedError

    def latency(self, tiles: pd.DataFrame, cycles: Dict[str, float] | None = None) -> float:
        """Time of one input in ns, layer after layer."""
        return float((tiles["steps"] * self.share(tiles, cycles)).sum() * self.read_ns)

    def share(self, tiles: pd.DataFrame, cycles: Dict[str, float] | None) -> pd.Series:
        """Of all steps that each layer's inputs take."""
        self.check(tiles)
        steps, cycles = self.array.steps, cycles or {}
        if unknown := sorted({*cycles} - {*tiles["layer"]}):
            raise CostError(f"cycles: no layer {unknown[0]}; there are {', '.join(tiles['layer'])}")
        if wrong := [f"{layer} {taken}" for layer, taken in cycles.items() if not 0 <= taken <= steps]:
            raise CostError(f"cycles: {wrong[0]}; allowed are 0 to the {steps} steps of {self.name}")
        return tiles["layer"].map(cycles).fillna(steps) / steps

    def check(self, tiles: pd.DataFrame) -> None:
        """Refuse rows that say that they were counted for another layout of cells, with CostError."""
        for name, value in layout(self.array).items():
            if (other := tiles.attrs.get("layout", {}).get(name, value)) != value:
                raise CostError(f"{self.name} has an array of {name} = {value}; the rows were counted for {other}")

    def conversions(self, tiles: pd.DataFrame) -> pd.Series:
        """Of every layer's columns into numbers, where no step is skipped."""
        return tiles["adc_used"]

    def summary(self, tiles: pd.DataFrame, cycles: Dict[str, float] | None = None) -> pd.Series:
        """Arrays, conversions, energy (nJ), area (mm2) and time (us) of one network."""
        share, arrays = self.share(tiles, cycles), int(tiles["arrays"].sum())
        return pd.Series(
            {
                "arrays": arrays,
                "conversions": float((self.conversions(tiles) * share).sum()),
                "energy_nJ": self.energy(tiles, cycles=cycles)["total"].sum() / 1000,
                "area_mm2": self.area(arrays).sum(),
                "latency_us": self.latency(tiles, cycles=cycles) / 1000,
            }
        )


@dataclass(frozen=True)
class Isaac(Design):
    """ISAAC-CE (ISCA 2016): offset weights, bit-serial inputs, converters that an array's columns share.

    Converters have the array's ``adc_bits``, or as many as tell its sums apart (``exact_bits``), by `converter`. One
    converts 128 columns in the 100 ns that a read takes; where more columns share it, reads take longer.

    Raises:
        CostError: inputs of several bits a step, as the row drivers that are priced are inverters; no whole number of
            columns.
    """

    array: Array = field(default_factory=partial(Array, flip=True))
    columns_per_adc: int = 128
    name: ClassVar[str] = "ISAAC-like"
    counted: ClassVar[str] = (
        "converters both ways, cells, sample-and-hold, shift-and-add; area: registers and tiles too"
    )
    left_out: ClassVar[str] = (
        "energy of eDRAM, bus, router, registers, sigmoid and pooling; HyperTransport; columns of reference"
    )

    def __post_init__(self) -> None:
        if self.array.dac_bits != 1:
            raise CostError(f"dac_bits = {self.array.dac_bits}: {self.name} prices row drivers of 1 bit")
        if not isinstance(self.columns_per_adc, int) or self.columns_per_adc < 1:
            raise CostError(f"columns_per_adc = {self.columns_per_adc}: allowed are whole numbers from 1")

    @property
    def adc_bits(self) -> int:
        """Of the converters."""
        return self.array.exact_bits if self.array.adc_bits is None else self.array.adc_bits

    @property
    def read_ns(self) -> float:
        """Of the cells, or of converting the columns that share a converter, where these are more than 128."""
        return READ_NS * max(1.0, self.columns_per_adc / 128)

    def conversion(self) -> tuple[float, float]:
        """Energy (pJ) of a conversion, and area (um2) of a converter."""
        return converter(self.adc_bits)

    def events(self) -> dict[str, tuple[str, float]]:
        """Power of a group over 100 ns, divided among its events at full occupancy."""
        isaac, ima = table("isaac"), 8 * 128
        pj = {c: isaac(f"ima_{c}", "power_mW") * READ_NS / ima for c in ("dac", "array", "sample_hold", "shift_add")}
        return {
            "adc": ("adc_used", self.conversion()[0]),
            "dac": ("dac_used", pj["dac"]),
            "array": ("cell_reads", pj["array"] / 128),
            "sample_hold": ("adc_used", pj["sample_hold"]),
            "shift_add": ("adc_used", pj["shift_add"]),
        }

    def area(self, arrays: int) -> pd.Series:
        """Whole IMAs of 8 arrays and whole tiles of 12 IMAs, with a quarter of a router each."""
        isaac = table("isaac")
        units = ceil(arrays / 8)
        tiles = ceil(units / 12)
        of_ima = {c: isaac(f"ima_{c}", "area_mm2") for c in ("dac", "array", "sample_hold", "shift_add")}
        rows, columns = self.array.rows / 128, self.array.columns / 128
        scale = {"dac": rows, "array": rows * columns, "sample_hold": columns, "shift_add": columns}
        registers = isaac("ima_input_register", "area_mm2") + isaac("ima_output_register", "area_mm2")
        adcs = units * 8 * self.array.columns / self.columns_per_adc
        found = {"adc": adcs * self.conversion()[1] / 1e6, "registers": units * registers}
        found |= {part: units * area * scale[part] for part, area in of_ima.items()}
        return pd.Series(found | {"tiles": tiles * tile_periphery("area_mm2")})


def tile_periphery(what: str) -> float:
    """``power_mW`` or ``area_mm2`` of an ISAAC tile beside its IMAs; a quarter of the router that four tiles share."""
    isaac = table("isaac")
    parts = isaac.frame[isaac.frame["level"] == "tile"].index
    return sum(isaac(p, what) * (isaac(p, "count") if p == "tile_router" else 1) for p in parts)


def isaac_chip() -> pd.Series:
    """ISAAC-CE's chip summed up from Table I: power, area, peak operations; what its Table IV prints follows."""
    isaac = table("isaac")
    parts = isaac.frame[isaac.frame["level"] == "ima"].index
    ima = {what: sum(isaac(p, what) for p in parts) for what in ("power_mW", "area_mm2")}
    tile = {w: 12 * ima[w] + tile_periphery(w) for w in ima}
    power = 168 * tile["power_mW"] / 1000 + isaac("chip_hyper_transport", "power_mW") / 1000
    area = 168 * tile["area_mm2"] + isaac("chip_hyper_transport", "area_mm2")
    arrays = 168 * 12 * 8
    gops = arrays * 2 * 128 * (128 // 8) / (16 * READ_NS)  # 16-bit weights in 8 cells, 16 steps
    adc_mw = 12 * isaac("ima_adc", "power_mW")
    return pd.Series(
        {
            "ima_power_mW": ima["power_mW"],
            "ima_area_mm2": ima["area_mm2"],
            "tile_power_mW": tile["power_mW"],
            "tile_area_mm2": tile["area_mm2"],
            "chip_power_W": power,
            "chip_area_mm2": area,
            "GOPS": gops,
            "GOPS_per_W": gops / power,
            "GOPS_per_mm2": gops / area,
            "MB_per_mm2": arrays * 128 * 128 * 2 / 8 / 2**20 / area,
            "adc_share_tile_power": adc_mw / tile["power_mW"],
            "adc_share_tile_area": 12 * isaac("ima_adc", "area_mm2") / tile["area_mm2"],
            "adc_share_chip_power": 168 * adc_mw / 1000 / power,
        }
    )


def forms_array(fragment: int, weight_bits: int = 8, input_bits: int = 16) -> Array:
    """FORMS's array: 128 x 128 cells of 2 bits, magnitudes, ``fragment`` rows at a time.

    Its converters have the paper's 4 bits, whatever the fragment: all sums of 8 rows take 5, of 64 rows 8.
    """
    mapping = Polarized(weight_bits=weight_bits, cell_bits=2, fragment=fragment)
    return Array(mapping=mapping, input_bits=input_bits, active_rows=fragment, adc_bits=4)


@dataclass(frozen=True)
class Forms(Isaac):
    """FORMS (ISCA 2021): polarized fragments read one after the other, small fast converters, zeros ahead skipped.

    Its 4-bit converter is 3.3 times cheaper than ISAAC's law makes one of 4 bits: ``own_converter = False`` takes that.
    Row drivers, cells, registers and tiles are ISAAC's.
    """

    array: Array = field(default_factory=partial(forms_array, 8))
    columns_per_adc: int = 32
    own_converter: bool = True
    name: ClassVar[str] = "FORMS-like"
    left_out: ClassVar[str] = Isaac.left_out + "; the sign table and the logic that skips zeros"

    @property
    def read_ns(self) -> float:
        """Of converting the columns that share a converter."""
        return self.columns_per_adc / table("adc")("forms", "rate_GSps")

    def conversion(self) -> tuple[float, float]:
        """Energy (pJ) of a conversion, and area (um2) of a converter.

        Raises:
            CostError: FORMS's own converter, of which only 4 bits are published, with other ``adc_bits``.
        """
        if not self.own_converter:
            return converter(self.adc_bits)
        if self.adc_bits != 4:
            raise CostError(f"FORMS's converter has 4 bits, the array {self.adc_bits}: own_converter=False has a law")
        return tuple(table("adc")("forms", column) for column in ("energy_pJ", "area_um2"))


PRIME_WEIGHTS = Mapping("two_column", 8, 4)
PRIME_PAIRS = {"pair": "arrays", "analog_difference": True, "adc_bits": 6}


@dataclass(frozen=True)
class Prime(Design):
    """PRIME (ISCA 2016): pairs of arrays subtracted before conversion, 3 input bits at once. Structure alone.

    PRIME prints no absolute energy, area or time, so there is none to price: compare conversions and arrays.
    """

    array: Array = field(default_factory=lambda: Array(256, 256, PRIME_WEIGHTS, 6, 3, **PRIME_PAIRS))
    name: ClassVar[str] = "PRIME-like"
    counted: ClassVar[str] = "arrays and conversions"
    left_out: ClassVar[str] = "energy, area and time: the paper prints none"

    def _refuse(self, *_, **__):
        """Energy, area and time are not there to be asked for."""
        raise CostError("PRIME prints no absolute energy, area or time; compare its arrays, conversions and steps")

    energy = area = latency = _refuse

    def summary(self, tiles: pd.DataFrame, cycles: Dict[str, float] | None = None) -> pd.Series:
        """Arrays and conversions; the rest is not a number."""
        self.check(tiles)
        counts = {"arrays": int(tiles["arrays"].sum()), "conversions": float(tiles["adc_used"].sum())}
        return pd.Series(counts | dict.fromkeys(("energy_nJ", "area_mm2", "latency_us"), float("nan")))


@dataclass(frozen=True)
class Timely(Design):
    """TIMELY (ISCA 2020), 65 nm: inputs cross ``across`` arrays before they are converted anew, sums ``down`` arrays.

    A time stands for a whole 8-bit number, so that there are no steps; each input is read from its buffer once. Up to
    twelve arrays across are published; as many down are a choice of ours. The crossbar's own energy is not verified and
    left out, so is the area of anything but converters and buffers. In the area the arrays of all layers share
    converters, twelve each, while the energy counts each layer's own.
    """

    array: Array = field(default_factory=lambda: Array(256, 256, Mapping("offset", 8, 4), input_bits=8, dac_bits=8))
    across: int = 12
    down: int = 12
    name: ClassVar[str] = "TIMELY-like, without cells"
    counted: ClassVar[str] = "time converters, analog buffers, adders, comparators, input reads, output writes"
    left_out: ClassVar[str] = "the cells' own energy (not verified); area of arrays, control and digital buffers"

    @property
    def read_ns(self) -> float:
        """Unit latency of the Accelergy library."""
        return table("timely")("unit_latency", "time_ns")

    def conversions(self, tiles: pd.DataFrame) -> pd.Series:
        """Of times into numbers: one for ``down`` arrays, whose sums were added before."""
        left, filters = self._left(tiles)
        tall = (left / self.array.rows).map(ceil)
        columns = filters * self.array.mapping.slices * self.array.mapping.columns
        return tiles["vectors"] * tiles["groups"] * columns * (tall / self.down).map(ceil)

    @staticmethod
    def _left(tiles: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
        """Rows and filters of every layer that lie in arrays."""
        return tuple(tiles.get(f"{what}_left", tiles[what]) for what in ("rows", "filters"))

    def energy(self, tiles: pd.DataFrame, cycles: Dict[str, float] | None = None) -> pd.DataFrame:
        """As `Design.energy`; ``cycles`` do not apply, as numbers go in whole."""
        self.check(tiles)
        timely = table("timely")
        pj = {part: timely(part, "energy_fJ") / 1000 for part in timely.frame.index if part not in UNPRICED}
        mapping, vectors = self.array.mapping, tiles["vectors"]
        left, filters = self._left(tiles)
        cells = filters * mapping.slices * mapping.columns
        rows, columns = tiles["groups"] * left, tiles["groups"] * cells
        wide, tall = (cells / self.array.columns).map(ceil), (left / self.array.rows).map(ceil)
        to_time, to_number = (wide / self.across).map(ceil), (tall / self.down).map(ceil)
        outputs = vectors * tiles["groups"] * filters
        found = pd.DataFrame(
            {
                "layer": tiles["layer"],
                "dtc": vectors * rows * to_time * pj["dtc"],
                "tdc": self.conversions(tiles) * pj["tdc"],
                "buffers": vectors * (rows * (wide - to_time) * pj["x_subbuf"] + columns * tall * pj["p_subbuf"]),
                "adders": vectors * columns * to_number * (pj["i_adder"] + pj["charging_comparator"]),
                "input_reads": tiles["inputs"] * pj["input_read"],
                "output_writes": outputs * pj["output_write"],
            }
        )
        return found.assign(total=found.drop(columns="layer").sum(axis=1))

    def area(self, arrays: int) -> pd.Series:
        """Converters and analog buffers of so many arrays, in mm2."""
        timely = table("timely")
        per_row = {"dtc": 1 / self.across, "x_subbuf": 1 - 1 / self.across}
        per_column = dict.fromkeys(("tdc", "i_adder", "charging_comparator"), 1 / self.down) | {"p_subbuf": 1.0}
        parts = {p: self.array.rows * share for p, share in per_row.items()}
        parts |= {p: self.array.columns * share for p, share in per_column.items()}
        return pd.Series({p: arrays * count * timely(p, "area_um2") / 1e6 for p, count in parts.items()})


UNPRICED = ("array_256x256", "unit_latency")
"""Rows of TIMELY's table that are no energy, or not verified."""


def at_bits(design: Design, weight_bits: int, input_bits: int) -> Design:
    """The design for numbers of other widths; cells that hold more bits than a weight has hold those.

    Raises:
        CostError: inputs that take several steps, of a design whose numbers go in whole.
    """
    if isinstance(design, Timely) and input_bits > design.array.dac_bits:
        raise CostError(f"{design.name}: inputs of {input_bits} bits, {design.array.dac_bits} at a time: one step")
    mapping = design.array.mapping
    cell_bits = mapping.cell_bits and min(mapping.cell_bits, weight_bits)
    mapping = replace(mapping, weight_bits=weight_bits, cell_bits=cell_bits)
    return replace(design, array=replace(design.array, mapping=mapping, input_bits=input_bits))
