"""AutoDNNchip's search for a design (FPGA 2020): coarsely over all, then finely over what is left.

Coarse: each layer at its best tiling in closed form, and the time of whichever is slower, the array or DRAM. Fine:
tiles that are loaded, computed and stored by event, with two buffers and one port to DRAM, so that stalls count.
"""

from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cache
from math import ceil, inf

import numpy as np
import pandas as pd

from lib.costs.digital.loops import Loops
from lib.costs.digital.pipeline import Step, fine
from lib.costs.digital.row_stationary import Objective, RowStationary, accesses, chosen
from lib.costs.energy import CostError

OBJECTIVES: tuple[Objective, ...] = ("energy", "latency", "both")


@cache
def _best(chip: RowStationary, layer: Loops) -> dict[Objective, dict[str, float]]:
    found = chip.tilings(layer)
    return {objective: chosen(found, objective).to_dict() for objective in OBJECTIVES}


def tiles(layer: Loops, tiling: dict[str, float], words_per_cycle: float, buffers: int = 2) -> dict[str, Step]:
    """A layer as steps of `lib.costs.digital.fine`: each tile is loaded, computed, stored, with so many buffers.

    Args:
        tiling: with ``cycles``, as of `RowStationary.tilings`. words_per_cycle: that DRAM's only port moves.

    >>> from lib.costs.digital import Loops, RowStationary, fine, tiles
    >>> layer = Loops(K=64, C=64, Yo=8, Xo=8, R=3, S=3)
    >>> best = RowStationary().search(layer).to_dict()
    >>> run = fine(tiles(layer, best, words_per_cycle=4), {"dram": 0, "array": 0}, hertz=1)
    >>> run.cycles > best["cycles"]  # the first load and the last store come on top
    True
    """
    words, count = accesses(layer, tiling), int(tiling["K3"] * tiling["Yo3"])
    load = ceil((words["dram", "inputs"] + words["dram", "weights"]) / count / words_per_cycle)
    store, compute = ceil(words["dram", "sums"] / count / words_per_cycle), ceil(tiling["cycles"] / count)
    steps = {}
    for i in range(count):
        steps[f"store {i - buffers}"] = Step((("dram", store),), (f"compute {i - buffers}",))
        steps[f"load {i}"] = Step((("dram", load),), (f"compute {i - buffers}",) if i >= buffers else ())
        steps[f"compute {i}"] = Step((("array", compute),), (f"load {i}",))
    for i in range(max(0, count - buffers), count):
        steps[f"store {i}"] = Step((("dram", store),), (f"compute {i}",))
    return {name: step for name, step in steps.items() if not name.startswith("store -")}


def _judged(chip: RowStationary, layers: list[Loops], objective: Objective, words_per_cycle: float, finely: bool):
    """Energy and cycles of a network."""
    energy = time = 0.0
    for layer in layers:
        best = _best(chip, replace(layer, layer="", groups=1))[objective]
        dram = sum(count for (level, _), count in accesses(layer, best).items() if level == "dram")
        cycles = max(best["cycles"], dram / words_per_cycle)
        if finely:
            cycles = fine(tiles(layer, best, words_per_cycle), {"dram": 0, "array": 0}, hertz=1).cycles
        energy, time = energy + layer.groups * best["energy"], time + layer.groups * cycles
    return energy, time


def _front(table: pd.DataFrame, margin: float = 0.0) -> np.ndarray:
    """Rows that no other beats by more than a margin in energy and in cycles at once."""
    energy, cycles = table["energy"].to_numpy(), table["cycles"].to_numpy()
    e, c = energy * (1 + margin), cycles * (1 + margin)
    better = (e[:, None] <= energy) & (c[:, None] <= cycles) & ((e[:, None] < energy) | (c[:, None] < cycles))
    return ~better.any(0)


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
            cycle). cycles: on the time of one input.
        words_per_cycle: that DRAM moves.
        margin: what the coarse stage may be wrong by; designs that another beats by more are not simulated. Infinite:
            all are, for a comparison.

    Returns:
        A row for each design and objective: the sizes; ``area_mm2``; ``objective``; ``energy``; ``coarse_cycles``;
        ``cycles``, by event where ``stage`` is ``fine``; ``front``, whether nothing that was simulated beats it.
        ``stage`` is ``coarse`` for what was set aside, else the limit that refused it: ``area``, ``power``, ``cycles``,
        or ``fits`` where a layer has no tiling.

    Raises:
        CostError: no design is within the limits.

    >>> from lib.costs.digital import Loops, RowStationary, explore
    >>> chips = [RowStationary(processors=n, buffer_words=b) for n in (42, 168) for b in (8192, 65536)]
    >>> found = explore(chips, [Loops(K=64, C=64, Yo=14, Xo=14, R=3, S=3)])
    >>> found[found["front"]]["processors"].unique().tolist()
    [168]
    """
    rows = []
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
            over = "cycles" if time > cycles else "power" if energy / time > power else "coarse"
            rows.append(row | {"stage": over, "objective": objective, "energy": energy, "coarse_cycles": time})
    table = pd.DataFrame(rows)
    if not (table["stage"] == "coarse").any():
        raise CostError(f"none of {len(table)} designs is within the limits: {table['stage'].value_counts().to_dict()}")
    table["cycles"] = table["coarse_cycles"]
    left = table[table["stage"] == "coarse"]
    for i in left.index[_front(left, margin)]:
        row = table.loc[i]
        _, time = _judged(row["chip"], layers, row["objective"], words_per_cycle, finely=True)
        table.loc[i, ["cycles", "stage"]] = time, "fine" if time <= cycles else "cycles"
    simulated = table.index[table["stage"] == "fine"]
    table["front"] = False
    table.loc[simulated, "front"] = _front(table.loc[simulated])
    return table.drop(columns="chip")
