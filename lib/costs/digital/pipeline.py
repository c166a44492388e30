"""AutoDNNchip's view of a chip (FPGA 2020): steps that wait for numbers and for components, coarsely and by event.

A *step* takes some components one after the other, each for some cycles, and begins when the steps before it are done.
Coarse mode adds up energy and takes the longest path, as if every step had components of its own. Fine mode lets steps
wait for components that are busy, so that pipelines between components, and their stalls, come out by themselves.
"""

import heapq
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from math import ceil, inf
from typing import NamedTuple

from lib.costs.energy import CostError


@dataclass(frozen=True)
class Step:
    """A piece of work.

    Attributes:
        uses: components in their order, each with the cycles that it is busy.
        after: names of the steps that have to be done before.

    >>> from lib.costs.digital import Step
    >>> Step((("memory", 2), ("multiplier", 1)), after=("load",)).uses[0]
    ('memory', 2)
    """

    uses: tuple[tuple[str, int], ...]
    after: tuple[str, ...] = ()


class Run(NamedTuple):
    """Cycles until the last step is done, the energy, and the busy cycles of each component."""

    cycles: int
    joules: float
    busy: dict[str, int]


def memory_cycles(numbers: float, bits: int, port_bits: float, clocks: int = 1, overhead: int = 0) -> int:
    """Cycles in which a memory reads or writes; ``clocks`` of the chip's make one of its own.

    Raises:
        CostError: numbers below 0, or a port, word or clock that moves nothing.

    >>> from lib.costs.digital import memory_cycles
    >>> memory_cycles(numbers=10, bits=16, port_bits=64)
    3
    """
    _moves(numbers, bits=bits, port_bits=port_bits, clocks=clocks)
    return ceil(numbers * bits / port_bits) * clocks + overhead


def path_cycles(numbers: float, bits: int, port_bits: float, burst: float, clocks: int = 1, overhead: int = 0) -> int:
    """The same of a path that starts every burst of so many words anew, at an overhead for each.

    Raises:
        CostError: as of `memory_cycles`, or an empty burst.

    >>> from lib.costs.digital import path_cycles
    >>> path_cycles(numbers=10, bits=16, port_bits=64, burst=2, overhead=5)
    13
    """
    _moves(numbers, bits=bits, port_bits=port_bits, burst=burst, clocks=clocks)
    return ceil(numbers * bits / port_bits) * clocks + overhead * ceil(numbers * bits / (port_bits * burst))


def coarse(steps: Mapping[str, Step], watts: Mapping[str, float], hertz: float) -> Run:
    """The longest path through the steps, and the energy of all.

    Args:
        steps: by name. watts: of each component while it is busy. hertz: the chip's clock.

    Raises:
        CostError: steps that wait for each other or for one that is not there, or a component without power.

    >>> from lib.costs.digital import Step, coarse
    >>> steps = {"load": Step((("memory", 2),)), "add": Step((("adder", 1),), ("load",))}
    >>> coarse(steps, {"memory": 0.5, "adder": 0.5}, hertz=1).joules
    1.5
    """
    _check(steps, watts)
    done: dict[str, int] = {}
    for name in _order(steps):
        step = steps[name]
        done[name] = max((done[before] for before in step.after), default=0) + sum(cycles for _, cycles in step.uses)
    return _run(max(done.values(), default=0), steps, watts, hertz)


def fine(steps: Mapping[str, Step], watts: Mapping[str, float], hertz: float) -> Run:
    """Every step begins as soon as what it waits for is done and its component is free; the first in order goes first.

    Args and errors as of `coarse`.

    >>> from lib.costs.digital import Step, coarse, fine
    >>> steps = {str(i): Step((("memory", 2), ("multiplier", 3))) for i in range(4)}
    >>> power = {"memory": 0.5, "multiplier": 0.5}
    >>> coarse(steps, power, 1e9).cycles, fine(steps, power, 1e9).cycles  # 2 + 4 * 3: the multiplier is never idle
    (5, 14)
    """
    _check(steps, watts)
    rank = {name: i for i, name in enumerate(steps)}
    missing = {name: len(step.after) for name, step in steps.items()}
    followers = defaultdict(list)
    for name, step in steps.items():
        for before in step.after:
            followers[before].append(name)
    waiting: dict[str, list[tuple[int, str, int]]] = defaultdict(list)  # by component: rank, step, which of its uses
    events: list[tuple[int, int, str, int]] = []  # end, rank, step, which of its uses
    busy: set[str] = set()
    freed: set[str] = set()
    arrived, now = [(name, 0) for name, left in missing.items() if not left], 0
    while arrived or freed:
        for name, use in arrived:
            component = steps[name].uses[use][0]
            heapq.heappush(waiting[component], (rank[name], name, use))
            freed.add(component)
        for component in freed - busy:
            if waiting[component]:
                place, name, use = heapq.heappop(waiting[component])
                busy.add(component)
                heapq.heappush(events, (now + steps[name].uses[use][1], place, name, use))
        now, arrived, freed = events[0][0] if events else now, [], set()
        while events and events[0][0] == now:
            *_, name, use = heapq.heappop(events)
            busy.remove(component := steps[name].uses[use][0])
            freed.add(component)
            if use + 1 < len(steps[name].uses):
                arrived.append((name, use + 1))
                continue
            for follower in followers[name]:
                missing[follower] -= 1
                if not missing[follower]:
                    arrived.append((follower, 0))
    return _run(now, steps, watts, hertz)


def systolic(size: int, tiles: int = 1) -> dict[str, Step]:
    """A matrix product on a square array, each element of which adds up one number of the result.

    Args:
        size: elements on a side. tiles: the product is so many times as wide, and made tile after tile.

    Returns:
        Steps of one cycle a component: a memory and a reader at each row and column, and at each element a multiplier,
        a writer and a memory.

    >>> from lib.costs.digital import fine, systolic
    >>> steps = systolic(3)
    >>> watts = {component: 0.5 for step in steps.values() for component, _ in step.uses}
    >>> fine(steps, watts, hertz=1e9).cycles  # 3 n + 2
    11
    """
    if size < 1 or tiles < 1:
        raise CostError(f"size = {size}, tiles = {tiles}: 1 or more is allowed")
    length, span = tiles * size, range(size)
    steps: dict[str, Step] = {}
    for t in range(tiles**2 * length):
        for i in span:
            steps[f"row {i} {t}"] = Step(((f"row memory {i}", 1), (f"row reader {i}", 1)))
            steps[f"column {i} {t}"] = Step(((f"column memory {i}", 1), (f"column reader {i}", 1)))
    for t in range(tiles**2 * length):
        for i in span:
            for j in span:
                left = f"{i} {j - 1} {t}" if j else f"row {i} {t}"
                above = f"{i - 1} {j} {t}" if i else f"column {j} {t}"
                sums = [f"{i} {j} {t - 1}"] if t % length else []
                steps[f"{i} {j} {t}"] = Step(((f"multiplier {i} {j}", 1),), (left, above, *sums))
                if t % length == length - 1:
                    uses = ((f"writer {i} {j}", 1), (f"result {i} {j}", 1))
                    steps[f"write {i} {j} {t}"] = Step(uses, (f"{i} {j} {t}",))
    return steps


def _moves(numbers: float, **sizes: float) -> None:
    if not 0 <= numbers < inf:
        raise CostError(f"numbers = {numbers}: 0 or more is allowed")
    for name, value in sizes.items():
        if not value > 0:
            raise CostError(f"{name} = {value}: more than 0 is allowed")


def _check(steps: Mapping[str, Step], watts: Mapping[str, float]) -> None:
    for name, step in steps.items():
        if unknown := [before for before in step.after if before not in steps]:
            raise CostError(f"step {name} waits for {unknown[0]!r}, which is not there")
        if not step.uses or any(cycles < 1 for _, cycles in step.uses):
            raise CostError(f"step {name} uses {step.uses}: at least one component, for 1 cycle or more, is allowed")
        for component, _ in step.uses:
            if not watts.get(component, -1) >= 0:
                raise CostError(f"power of {component}: {watts.get(component)} W; expected a number of at least 0")
    _order(steps)


def _order(steps: Mapping[str, Step]) -> list[str]:
    """The steps so that each comes after those that it waits for."""
    try:
        return [*TopologicalSorter({name: step.after for name, step in steps.items()}).static_order()]
    except CycleError as error:
        raise CostError(f"steps wait for each other: {' -> '.join(error.args[1])}") from None


def _run(cycles: int, steps: Mapping[str, Step], watts: Mapping[str, float], hertz: float) -> Run:
    busy: dict[str, int] = defaultdict(int)
    for step in steps.values():
        for component, used in step.uses:
            busy[component] += used
    return Run(cycles, sum(watts[c] * used for c, used in busy.items()) / hertz, dict(busy))
