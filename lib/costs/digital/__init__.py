"""Digital chips: what a dataflow moves, how a design is searched, and what compressed weights save on it."""

from lib.costs.digital.builder import explore, tiles
from lib.costs.digital.compressed import Stored, addition, with_stored
from lib.costs.digital.loops import Loops, splits
from lib.costs.digital.nests import DATAFLOWS, Chip, Nest, check, moved, search
from lib.costs.digital.pipeline import Step, coarse, fine, memory_cycles, path_cycles, systolic
from lib.costs.digital.row_stationary import RowStationary, accesses, eyeriss_units

__all__ = [
    "DATAFLOWS",
    "Chip",
    "Loops",
    "Nest",
    "RowStationary",
    "Step",
    "Stored",
    "accesses",
    "addition",
    "check",
    "coarse",
    "explore",
    "eyeriss_units",
    "fine",
    "memory_cycles",
    "moved",
    "path_cycles",
    "search",
    "splits",
    "systolic",
    "tiles",
    "with_stored",
]
