"""Loop nests on a chip with three memories: the DNN-Chip Predictor's general form (ICASSP 2020).

A nest says in which order the seven loops of a layer run, in what tiles, and where: at DRAM, at the buffer (``sram``),
side by side in the array (``noc``), in a processing element (``rf``). A mark, ``*I``, ``*O`` or ``*W``, says above
which loop of a level inputs, outputs or weights are loaded anew. All formulas hold for numbers and for arrays of them,
so that all tilings of a layer are judged at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, prod
from typing import Any, Self

import numpy as np
import pandas as pd

from lib.costs.digital.loops import Loops, Words, combined, covered, splits
from lib.costs.energy import CostError
from lib.technology import table

RELEVANT = {
    "inputs": ["N", "C", "Yo", "Xo", "R", "S"],
    "outputs": ["N", "K", "Yo", "Xo"],
    "weights": ["K", "C", "R", "S"],
}
"""The loops that change which number of each kind is used; the others use it again."""

MARKS = {"*I": "inputs", "*O": "outputs", "*W": "weights"}
LEVELS = ("dram", "sram", "noc", "rf")

DATAFLOWS = {
    "row stationary": "dram K Yo; sram C *I *O *W K; noc K Yo C R; rf Xo *I *W S C *O K",
    "output stationary": "dram K Yo; sram *W *O K *I Yo Xo; noc Yo Xo; rf *O C R S",
    "weight stationary": "dram K C Yo; sram *I *O *W K C; noc K C; rf *W Yo Xo *I *O R S",
}
"""Orders of loops without tiles: Eyeriss's, ShiDianNao's, and weights that stay while the image runs past."""


@dataclass(frozen=True)
class Nest:
    """The loops of every level, outermost first, as pairs of a name and a bound; a mark has no bound.

    >>> from lib.costs.digital import Nest
    >>> Nest.parse("dram K2; sram *I *O *W C3; noc Yo7; rf S5").levels["sram"][-1]
    ('C', 3)
    """

    levels: Mapping[str, tuple[tuple[str, Any], ...]]

    @classmethod
    def parse(cls, text: str, tiles: Mapping[str, Any] | None = None) -> Self:
        """From ``dram K2 ...; sram ...; noc ...; rf ...``.

        Args:
            tiles: bounds by loop and position from the outside, ``K0``, ``K1``, ..., for a text without numbers.

        Raises:
            CostError: a level or loop that is unknown or missing, or a kernel's loop at DRAM.
        """
        levels, met = {}, dict.fromkeys(["N", "K", "C", "Yo", "Xo", "R", "S"], 0)
        for part in text.split(";"):
            level, *words = part.split()
            levels[level] = []
            for word in words:
                loop = word.rstrip("0123456789")
                if word in MARKS:
                    levels[level].append((word, 1))
                    continue
                if loop not in met or (level == "dram" and loop in ("R", "S")):
                    raise CostError(f"nest: {word!r} at {level}; loops are {', '.join(met)}, and R and S not at dram")
                bound = tiles[f"{loop}{met[loop]}"] if tiles is not None else int(word[len(loop) :])
                levels[level].append((loop, bound))
                met[loop] += 1
        if (*levels,) != LEVELS:
            raise CostError(f"nest: levels {', '.join(levels)}; expected {', '.join(LEVELS)}")
        return cls({level: (*loops,) for level, loops in levels.items()})

    def tiles(self, level: str) -> dict[str, Any]:
        """The bounds of a level by loop."""
        return {loop: bound for loop, bound in self.levels[level] if loop not in MARKS}

    def split(self, level: str, data: str) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
        """The loops above the point where a kind of data is loaded into a memory, and those below, this level's own.

        Above also stand the loops of the memories outside; without a mark all loops of the level do.
        """
        loops = self.levels[level]
        at = next((i for i, (word, _) in enumerate(loops) if MARKS.get(word) == data), len(loops))
        above, below = ([x for x in part if x[0] not in MARKS] for part in (loops[:at], loops[at:]))
        outer = [*self.tiles("dram").items()] if level == "sram" else []
        outer = [x for o in ("dram", "sram") for x in self.tiles(o).items()] if level == "rf" else outer
        return outer + above, below


@dataclass(frozen=True)
class Chip:
    """A chip of ``data/technology/digital_chips.csv``: unit energies in pJ for a byte, sizes in bytes.

    Attributes:
        forwards, multicasts: kinds of data that elements hand on to their neighbours, or that one read sends to many.
        port: bytes a cycle, by memory (``dram``, ``sram0``, ...) and network (``forward``, ...); unlimited where
            nothing is said. The authors' files limit the buffers of i-FlatCam, say "unlimited" elsewhere, and say
            nothing of DRAM.
        bits: of ``inputs`` (and finished outputs), ``sums`` and ``weights``, as the files of its layers have them.

    Raises:
        CostError: a unit energy that is negative, or a port that moves nothing.

    >>> from lib.costs.digital import Chip
    >>> Chip.read("shidiannao").forwards
    ('inputs',)
    """

    name: str
    rows: int
    columns: int
    energy: Mapping[str, float]
    memory: Mapping[str, str]
    size: Mapping[str, float]
    forwards: tuple[str, ...] = ("outputs",)
    multicasts: tuple[str, ...] = ("inputs", "weights")
    port: Mapping[str, float] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=lambda: {"inputs": 16, "sums": 24, "weights": 16})

    def __post_init__(self) -> None:
        for name, value in self.port.items():
            if not value > 0:
                raise CostError(f"{self.name}: port of {name} = {value} bytes a cycle; expected more than 0")
        for name, value in self.energy.items():
            if not value >= 0:
                raise CostError(f"{self.name}: unit energy {name} = {value}; expected at least 0")

    @classmethod
    def read(cls, name: str) -> Self:
        """By name: ``eyeriss``, ``shidiannao`` or ``iflatcam``, as configured in the authors' code.

        >>> from lib.costs.digital import Chip
        >>> Chip.read("eyeriss").energy["dram"]
        100.0
        """
        frame = table("digital_chips").frame
        if name not in frame.index:
            raise CostError(f"chip {name!r}: known are {', '.join(frame.index)}")
        row = frame.loc[name]
        energy = {k.removesuffix("_pJ"): float(v) for k, v in row.items() if k.endswith("_pJ")}
        size = {k.removesuffix("_bytes"): inf if pd.isna(v) else v for k, v in row.items() if k.endswith("_bytes")}
        memory = {data: f"sram{row[f'sram_of_{data}']}" for data in RELEVANT}
        kinds = (tuple(str(row[what]).split()) for what in ("forwards", "multicasts"))
        port = {k.removesuffix("_port"): float(v) for k, v in row.items() if k.endswith("_port") and not pd.isna(v)}
        bits = {data: int(row[f"{data}_bits"]) for data in ("inputs", "sums", "weights")}
        return cls(name, int(row["pe_rows"]), int(row["pe_columns"]), energy, memory, size, *kinds, port, bits)


def refreshes(loops: list[tuple[str, Any]], data: str, released: bool = False, of: str = "") -> Any:
    """How often data are loaded: all turns of the loops outside, down to the innermost that asks for other numbers.

    A loop of one turn asks for nothing; the released code counts it by its name.

    Args:
        of: count the turns of this loop alone: of outputs, how many partial sums come back where it is ``C``.
    """
    met, count = False, 1
    for loop, bound in reversed(loops):
        met = met | ((loop in RELEVANT[data]) & (released | (np.asarray(bound) > 1)))
        count = count * np.where(met & (loop == (of or loop)), bound, 1)
    return count


def volume(layer: Loops, loops: list[tuple[str, Any]], data: str) -> Any:
    """How many numbers of a kind the loops inside use; of inputs the window that they slide over."""
    bounds = {name: prod(b for loop, b in loops if loop == name) for name in RELEVANT[data]}
    if data != "inputs":
        return prod(bounds.values())
    rows, columns = ((bounds[o] - 1) * layer.U + bounds[k] for o, k in (("Yo", "R"), ("Xo", "S")))
    return bounds["N"] * bounds["C"] * rows * columns


def _slid(layer: Loops, above: list[tuple[str, Any]], below: list[tuple[str, Any]], nest: Nest, released: bool) -> Any:
    """Inputs that an element loads: where the window moves along a row, only what is new after its first place."""
    first, count = volume(layer, below, "inputs"), refreshes(above, "inputs", released)
    asked = [(loop, bound) for loop, bound in above if loop in RELEVANT["inputs"]]
    kernel = {"Xo": "S", "Yo": "R"}.get(asked[-1][0]) if asked else None
    inside = {name: prod(b for loop, b in below if loop == name) for name in ("Xo", "Yo", "R", "S")}
    if kernel is None or np.all(inside[kernel] == 1):
        return count * first
    axis, turns = asked[-1]
    new = first / ((inside[axis] - 1) * layer.U + inside[kernel]) * inside[axis] * layer.U
    new = np.minimum(new, first)
    if released:  # divides by the innermost loop at DRAM, and counts one new place
        return count // nest.levels["dram"][-1][1] * (first + new)
    return count / turns * (first + (turns - 1) * new)


def _bytes(chip: Chip, bits: Mapping[str, int] | None) -> dict[str, float]:
    return {k: b / 8 for k, b in (dict(chip.bits) | dict(bits or {})).items()}


def _side(nest: Nest, data: str) -> tuple[Any, Any]:
    """Elements side by side that take other numbers of a kind, and those that take the same."""
    array = nest.tiles("noc").items()
    return (prod(b for loop, b in array if (loop in RELEVANT[data]) == relevant) for relevant in (True, False))


def _inside(layer: Loops, nest: Nest, data: str) -> Any:
    """Numbers of a kind that the buffer holds at a time."""
    loops = [*nest.split("sram", data)[1], *nest.tiles("noc").items(), *nest.tiles("rf").items()]
    return volume(layer, loops, data)


def _outputs(layer: Loops, nest: Nest, size: Mapping[str, float], released: bool) -> dict[tuple[str, str], Any]:
    """Outputs: written once where sums are whole; else partial sums, which come back and go on to neighbours."""
    above, _ = nest.split("sram", "outputs")
    sums, whole = refreshes(above, "outputs", released, of="C"), size["inputs"]
    dram = _inside(layer, nest, "outputs") * refreshes(above, "outputs", released) / sums
    dram = dram * np.where(sums > 1, whole + (2 * sums - 1) * size["sums"], whole)
    above, below = nest.split("rf", "outputs")
    side, same = _side(nest, "outputs")
    sums = refreshes(above, "outputs", released, of="C")
    each = refreshes(above, "outputs", released) / sums * side * volume(layer, below, "outputs")
    added = (sums > 1) | (same > 1)
    return {
        ("dram", "outputs"): dram,
        ("sram", "outputs"): each * np.where(sums > 1, (2 * sums - 1) * size["sums"], whole),
        ("unicast", "outputs"): each * np.where(sums > 1, sums * size["sums"], whole),
        ("forward", "outputs"): each * sums * (same - 1) * size["sums"],
        ("rf", "outputs"): each * np.where(added, (2 * sums * same - 1) * size["sums"], whole),
    }


def moved(
    layer: Loops, nest: Nest, chip: Chip, bits: Mapping[str, int] | None = None, released: bool = False
) -> dict[tuple[str, str], Any]:
    """Bytes moved by one group of a layer, by level and kind of data, for one nest or for arrays of tiles.

    Levels: ``dram``; ``sram``, reads of the buffer; ``forward``, ``multicast`` and ``unicast`` in the array; ``rf``.

    Args:
        bits: of ``inputs`` (and finished outputs), ``sums`` and ``weights``; the chip's where nothing is said.
        released: as the released code counts, which loads too few inputs where a window slides: it divides by the
            bound of another loop and counts one further place instead of all. Inputs that neighbours hand on are
            counted as here, not as there.

    >>> from lib.costs.digital import Chip, Loops, Nest, moved
    >>> layer = Loops(N=4, K=96, C=3, Yo=55, Xo=55, R=11, S=11, U=4)
    >>> text = "dram N4 K1 Yo8; sram C3 *I *O *W K3; noc K2 Yo7 C1 R11; rf N1 Xo55 *I *W S11 C1 *O K16"
    >>> float(moved(layer, Nest.parse(text), Chip.read("eyeriss"))["dram", "weights"])
    2230272.0
    """
    size = _bytes(chip, bits)
    found = _outputs(layer, nest, size, released)
    for data in ("inputs", "weights"):
        above, _ = nest.split("sram", data)
        side, same = _side(nest, data)
        found["dram", data] = refreshes(above, data, released) * _inside(layer, nest, data) * size[data]
        above, below = nest.split("rf", data)
        one = volume(layer, below, data) * refreshes(above, data, released)
        one = _slid(layer, above, below, nest, released) if data == "inputs" else one
        loaded, written = one * side * size[data], one * side * same * size[data]
        if data == "inputs" and data in chip.forwards:  # each pixel enters the array once, and goes on from there
            taps = prod(bound for loop, bound in above if loop in ("R", "S"))
            window = [*nest.tiles("noc").items(), *below, ("R", layer.R), ("S", layer.S)]
            once = volume(layer, window, data) / volume(layer, below, data)
            loaded = np.minimum(one / taps * once * size[data], written)
            found["forward", data] = written - loaded
        read = loaded if data in chip.multicasts else written
        found["sram", data] = read
        found["multicast" if data in chip.multicasts else "unicast", data] = read
        found["rf", data] = written
    return found


def held(layer: Loops, nest: Nest, chip: Chip, bits: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Bytes that each memory has to hold: ``sram0``, ``sram1`` and the registers ``rf_inputs``, ``rf_outputs``, ..."""
    size = _bytes(chip, bits)
    size["outputs"] = size["sums"]
    needs: dict[str, Any] = {}
    for data in RELEVANT:
        whole = _inside(layer, nest, data) * size[data]
        needs[chip.memory[data]] = needs.get(chip.memory[data], 0) + whole
        needs[f"rf_{data}"] = volume(layer, nest.split("rf", data)[1], data) * size[data]
    return needs


def check(layer: Loops, nest: Nest, chip: Chip, bits: Mapping[str, int] | None = None) -> None:
    """That a nest covers a layer and fits a chip.

    Raises:
        CostError: it does not; the message names the loop or the memory, and by how much.

    >>> from lib.costs.digital import Chip, Loops, Nest, check
    >>> check(Loops(K=4, C=2), Nest.parse("dram K2; sram C2; noc; rf"), Chip.read("eyeriss"))
    Traceback (most recent call last):
        ...
    lib.costs.energy.CostError: layer: tiles of K cover 2 of 4
    """
    for loop, product, asked in covered(layer, {level: nest.tiles(level) for level in LEVELS}):
        raise CostError(f"{layer.layer}: tiles of {loop} cover {product} of {asked}")
    busy = prod(nest.tiles("noc").values())
    if busy > chip.rows * chip.columns:
        raise CostError(f"{layer.layer}: {busy} elements at once; {chip.name} has {chip.rows * chip.columns}")
    for memory, needed in held(layer, nest, chip, bits).items():
        if needed > chip.size[memory]:
            raise CostError(
                f"{layer.layer}: {memory} of {chip.name} holds {chip.size[memory]:g} bytes, but takes {needed:g}"
            )


def energy(layer: Loops, found: Words, chip: Chip) -> dict[tuple[str, str], Any]:
    """Of what `moved` counts, and of the multiplications, in pJ, by level and kind of data."""
    unit = chip.energy
    prices = {
        (level, data): unit.get(f"{level}_{data}", unit.get(level)) * count for (level, data), count in found.items()
    }
    return prices | {("mac", "all"): unit["mac"] * layer.macs}


def latency(layer: Loops, nest: Nest, chip: Chip, found: Words, released: bool = False) -> Any:
    """Cycles of one group: the longest of the arithmetic, one multiply-accumulate an element, and of every transfer.

    What shares a memory shares its port; networks are apart for every kind of data. The released code also takes
    kinds in one memory apart, which is the same on every chip whose ports it limits.

    Args:
        found: of `moved`. released: the released code takes the array for a single element.

    >>> from lib.costs.digital import Chip, Loops, Nest, moved
    >>> from lib.costs.digital.nests import latency
    >>> layer, chip = Loops(K=32, C=16, Yo=24, Xo=40), Chip.read("iflatcam")
    >>> nest = Nest.parse("dram K1; sram *O *W K1 *I Yo24 Xo5; noc Xo8 K32; rf *O R1 C16 S1")
    >>> float(latency(layer, nest, chip, moved(layer, nest, chip)))  # 491,520 products on 256 elements
    1920.0
    """
    longest = layer.macs / (1 if released else prod(nest.tiles("noc").values()))
    loads: dict[str, list[Any]] = {}
    for (level, data), count in found.items():
        if level in ("dram", "sram"):
            loads.setdefault(chip.memory[data] if level == "sram" else level, []).append(count)
    parts = [(memory, sum(counts)) for memory, counts in loads.items()]
    for name, count in parts + [(level, count) for (level, _), count in found.items()]:
        longest = np.maximum(longest, count / chip.port.get(name, inf))
    return longest


def search(layer: Loops, dataflow: str, chip: Chip, bits: Mapping[str, int] | None = None) -> pd.DataFrame:
    """The tiling of a dataflow that takes the least energy, of all that divide a layer's loops and fit a chip.

    Args:
        dataflow: a name of `DATAFLOWS`.

    Returns:
        A row for each level and kind of data: ``layer``, ``level``, ``data``, ``energy`` in pJ of all groups, and
        ``cycles``, ``tilings`` (how many fitted).

    Raises:
        CostError: an unknown dataflow, one without a place for a loop of the layer (a batch), or no tiling fits.

    >>> from lib.costs.digital import Chip, Loops, search
    >>> layer = Loops(K=16, C=16, Yo=8, Xo=8, R=3, S=3)
    >>> float(search(layer, "weight stationary", Chip.read("eyeriss"))["cycles"].iloc[0])
    1152.0
    """
    if dataflow not in DATAFLOWS:
        raise CostError(f"dataflow = {dataflow!r}: known are {', '.join(DATAFLOWS)}")
    text = DATAFLOWS[dataflow]
    words = [(level.split()[0], word) for level in text.split(";") for word in level.split()[1:] if word not in MARKS]
    places = {loop: [level for level, word in words if word == loop] for loop in dict.fromkeys(w for _, w in words)}
    ways = {}
    for loop, levels in places.items():
        way = splits(getattr(layer, loop), len(levels))
        ways[loop] = way[way[:, levels.index("noc")] <= chip.rows * chip.columns] if "noc" in levels else way
    tiles = combined(ways)
    nest = Nest.parse(text, tiles)
    for loop, product, asked in covered(layer, {level: nest.tiles(level) for level in LEVELS}):
        raise CostError(f"{layer.layer}: {dataflow} tiles of {loop} cover {product} of {asked}")
    needs = {"elements": (prod(nest.tiles("noc").values()), chip.rows * chip.columns)}
    needs |= {memory: (needed, chip.size[memory]) for memory, needed in held(layer, nest, chip, bits).items()}
    fits = np.True_
    for needed, there in needs.values():
        fits = fits & (needed <= there)
    if not np.any(fits):
        least = {name: (float(np.min(needed)), there) for name, (needed, there) in needs.items()}
        short = [
            f"{name} {there:g} of at least {needed:g}" for name, (needed, there) in least.items() if needed > there
        ]
        what = ", ".join(short) or "each memory alone holds some tiling, and none holds the same one as the others"
        raise CostError(f"{layer.layer}: no {dataflow} tiling fits {chip.name} ({what})")
    nest = Nest.parse(text, {name: value[fits] for name, value in tiles.items()})
    found = moved(layer, nest, chip, bits)
    prices, size = energy(layer, found, chip), (int(fits.sum()),)
    time = np.broadcast_to(latency(layer, nest, chip, found), size)
    prices = {key: np.broadcast_to(price, size) for key, price in prices.items()}
    best = np.lexsort((time, sum(prices.values())))[0]
    rows = [(level, data, layer.groups * float(price[best])) for (level, data), price in prices.items()]
    best_rows = pd.DataFrame(rows, columns=["level", "data", "energy"])
    best_rows.insert(0, "layer", layer.layer)
    return best_rows.assign(cycles=layer.groups * float(time[best]), tilings=int(fits.sum()))
