"""Faults: what cells do to the weights written into them, and what that does to a network.

Devices disturb the conductances that a `lib.crossbar.Mapping` writes: `StuckAt`, `Variation`, `Published`, `PowerLaw`,
`PhaseChange`, `Relaxation`, `ReadNoise`. A chip is a number; `sweep` and `tolerated_rate` run trials on chips, and
`UnderFaults` is a hook of `lib.training.fit` that trains on a new chip at every step. A device of your own derives from
`Device` and draws from `stream`.
"""

from lib.crossbar import Device
from lib.faults.chips import stream
from lib.faults.moments import moments
from lib.faults.readback import on_chip, on_crossbars, read_back
from lib.faults.stuck import InSlice, StuckAt
from lib.faults.tolerated import Tolerated, tolerated_rate
from lib.faults.training import UnderFaults
from lib.faults.trials import sweep
from lib.faults.variation import PhaseChange, PowerLaw, Published, ReadNoise, Relaxation, Variation

__all__ = [
    "Device",
    "InSlice",
    "PhaseChange",
    "PowerLaw",
    "Published",
    "ReadNoise",
    "Relaxation",
    "StuckAt",
    "Tolerated",
    "UnderFaults",
    "Variation",
    "moments",
    "on_chip",
    "on_crossbars",
    "read_back",
    "stream",
    "sweep",
    "tolerated_rate",
]
