"""What replaces a layer or a block: sums of branches, gates that skip."""

from lib.layers.branches import Branches, branched
from lib.layers.gates import LayerError, RecurrentGate, SkippedBlock, gate_of, skippable

__all__ = [
    "Branches",
    "LayerError",
    "RecurrentGate",
    "SkippedBlock",
    "branched",
    "gate_of",
    "skippable",
]
