"""AutoDNNchip's search for a design (FPGA 2020): coarsely over all, then finely over what is left.

Coarse: each layer at its best tiling in closed form, and the time of whichever is slowest: the array, the buffer's
port, a network, or DRAM. Fine: tiles that are loaded, fed, computed and stored by event, with two buffers and one port
to DRAM, so that stalls count. Spaces are small enough to look at every design; no optimizer chooses among them.
"""

from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cache
from math import ceil, inf

import numpy as np
import pandas as pd

from lib.costs.digital.loops import Loops
from lib.costs.digital.pipeline import Step, fine, memory_cycles, path_cycles
from lib.costs.digital.row_stationary import BUFFER, Objective, RowStationary, accesses, chosen
from lib.costs.digital.row_stationary import cycles as arithmetic
from lib.costs.energy import CostError

OBJECTIVES: tuple[Objective, ...] = ("energy", "latency", "both")

BITS = 16

PARTS = dict.fromkeys(["dram", "array", "buffer", *(f"network of {d}" for d in ("inputs", "weights", "sums"))], 0.0)
"""Components of a tile's steps; their power is 0, as energy is counted by access and not by busy cycle."""


@cache
def _best(chip: RowStationary, layer: Loops) -> dict[Objective, dict[str, float]]:
    found = chip.tilings(layer)
    return {objective: chosen(found, objective).to_dict() for objective in OBJECTIVES}


def tiles(
    layer: Loops, tiling: dict[str, float], words_per_cycle: float, buffers: int = 2, chip: RowStationary | None = None
) -> dict[str, Step]:
    """A layer as steps of `lib.costs.digital.fine`: each tile is loaded, computed, stored, with so many buffers.

    While a tile is computed, the buffer feeds the array and the networks spread what it feeds, where the chip limits
    them; whichever takes longest holds the next tile up.

    Args:
        tiling: as of `RowStationary.tilings`. words_per_cycle: that DRAM's only port moves.
        chip: whose ports count; None: they are unlimited.

    Returns:
        Steps of the components of `PARTS`.

    Raises:
        CostError: no buffer, or a port that moves nothing.

    >>> from lib.costs.digital import Loops, RowStationary, fine, tiles
    >>> from lib.costs.digital.builder import PARTS
    >>> layer = Loops(K=64, C=64, Yo=8, Xo=8, R=3, S=3)
    >>> best = RowStationary().search(layer).to_dict()
    >>> run = fine(tiles(layer, best, words_per_cycle=4), PARTS, hertz=1)
    >>> run.cycles > best["cycles"]  # the first load and the last store come on top
    True
    """
    if buffers < 1:
        raise CostError(f"buffers = {buffers}: 1 or more is allowed")
    chip = chip or RowStationary()
    words, count = accesses(layer, tiling), int(tiling["K3"] * tiling["Yo3"])

    def passing(keys: Iterable[tuple[str, str]], port: float) -> int:
        return memory_cycles(sum(words[key] for key in keys) / count, BITS, BITS * port)

    load = passing([("dram", "inputs"), ("dram", "weights")], words_per_cycle)
    store = passing([("dram", "sums")], words_per_cycle)
    uses = {"array": ceil(arithmetic(layer, tiling) / count)}
    uses["buffer"] = passing([key for key in words if key[0] in BUFFER], chip.buffer_port)
    for data in ("inputs", "weights", "sums"):
        uses[f"network of {data}"] = path_cycles(words["network", data] / count, BITS, BITS * chip.network_port, inf)
    uses = {component: taken for component, taken in uses.items() if taken}
    steps = {}
    for i in range(count):
        before = tuple(f"{component} {i - buffers}" for component in uses)
        if i >= buffers:
            steps[f"store {i - buffers}"] = Step((("dram", store),), before)
        steps[f"load {i}"] = Step((("dram", load),), before if i >= buffers else ())
        steps |= {f"{part} {i}": Step(((part, taken),), (f"load {i}",)) for part, taken in uses.items()}
    for i in range(max(0, count - buffers), count):
        steps[f"store {i}"] = Step((("dram", store),), tuple(f"{component} {i}" for component in uses))
    return steps


def _judged(chip: RowStationary, layers: list[Loops], objective: Objective, words_per_cycle: float, finely: bool):
    """Energy and cycles of a network."""
    energy = time = 0.0
    for layer in layers:
        best = _best(chip, replace(layer, layer="", groups=1))[objective]
        dram = sum(count for (level, _), count in accesses(layer, best).items() if level == "dram")
        cycles = max(best["cycles"], dram / words_per_cycle)
        if finely:
            cycles = fine(tiles(layer, best, words_per_cycle, chip=chip), PARTS, hertz=1).cycles
        energy, time = energy + layer.groups * best["energy"], time + layer.groups * cycles
    return energy, time


def _front(table: pd.DataFrame, margin: float = 0.0) -> np.ndarray:
    """Rows that no other beats by more than a margin in energy and in cycles at once."""
    energy, cycles = table["energy"].to_numpy(), table["cycles"].to_numpy()
    e, c = energy * (1 + margin), cycles * (1 + margin)
    better = (e[:, None] <= energy) & (c[:, None] <= cycles) & ((e[:, None] < energy) | (c[:, None] < cycles))
    return ~better.any(0)


def _count(table: pd.DataFrame) -> dict[str, int]:
    return table["stage"].value_counts().to_dict()


def explore(
    chips: Iterable[RowStationary],
    layers: list[Loops],
    *,
    area_mm2: float = inf,
    power: float = inf,
    cycles: float = inf,
    words_per_cycle: float = 4.0,
    margin: float = 0.1,
) -> pd.DataFrame:
    """The designs that no other beats in energy and time at once.

    Args:
        chips: the space of designs. layers: of the network that it is built for.
        area_mm2: a limit on `RowStationary.area_mm2`. power: on energy over cycles (multiply-accumulates of 16 bits a
            cycle). cycles: on the time of one input, throughput's reciprocal. Both are asked of what was simulated;
            of a coarse time only where stalls within the margin could not mend it.
        words_per_cycle: that DRAM moves.
        margin: what the coarse stage may be wrong by; designs that another beats by more are not simulated. Infinite:
            all are, for a comparison.

    Returns:
        A row for each design and objective: the sizes; ``area_mm2``; ``objective``; ``energy``; ``coarse_cycles``;
        ``cycles``, by event where ``stage`` is ``fine``; ``front``, whether nothing that was simulated beats it.
        ``stage`` is ``coarse`` for what was set aside, behind others that were simulated and are within the limits,
        else the limit that refused it: ``area``, ``power``, ``cycles``, or ``fits`` where a layer has no tiling.

    Raises:
        CostError: no design is within the limits, there is none or no layer, or a number out of range.

    >>> from lib.costs.digital import Loops, RowStationary, explore
    >>> chips = [RowStationary(processors=n, buffer_words=b) for n in (42, 168) for b in (8192, 65536)]
    >>> found = explore(chips, [Loops(K=64, C=64, Yo=14, Xo=14, R=3, S=3)])
    >>> found[found["front"]]["processors"].unique().tolist()
    [168]
    """
    rows, chips = [], [*chips]
    if not chips or not layers:
        raise CostError(f"{len(chips)} designs and {len(layers)} layers: at least one of each is expected")
    if not (words_per_cycle > 0 and margin >= 0):
        raise CostError(f"words_per_cycle = {words_per_cycle}, margin = {margin}: above 0, and 0 or more, are allowed")
    for chip in chips:
        row = {"chip": chip, **asdict(chip), "area_mm2": chip.area_mm2, "stage": "area"}
        if chip.area_mm2 > area_mm2:
            rows.append(row)
            continue
        try:
            found = {o: _judged(chip, layers, o, words_per_cycle, finely=False) for o in OBJECTIVES}
        except CostError:  # a layer that no tiling of this design holds
            rows.append(row | {"stage": "fits"})
            continue
        for objective, (energy, time) in found.items():
            over = "cycles" if time > cycles else "power" if energy / time > power * (1 + margin) else "coarse"
            rows.append(row | {"stage": over, "objective": objective, "energy": energy, "coarse_cycles": time})
    table = pd.DataFrame(rows)
    if "coarse_cycles" in table:
        table["cycles"] = table["coarse_cycles"]
    while True:  # again, where a limit takes away what stood before others
        left = table[table["stage"].isin(["coarse", "fine"])]
        if left.empty:
            raise CostError(f"none of {len(chips)} designs is within the limits: {_count(table)}")
        ahead = left.index[_front(left.assign(cycles=left["coarse_cycles"]), margin) & (left["stage"] == "coarse")]
        if ahead.empty:
            break
        for i in ahead:
            row = table.loc[i]
            energy, time = _judged(row["chip"], layers, row["objective"], words_per_cycle, finely=True)
            stage = "cycles" if time > cycles else "power" if energy / time > power else "fine"
            table.loc[i, ["cycles", "stage"]] = time, stage
    simulated = table.index[table["stage"] == "fine"]
    table["front"] = False
    table.loc[simulated, "front"] = _front(table.loc[simulated])
    return table.drop(columns="chip")
