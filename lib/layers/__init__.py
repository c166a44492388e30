"""What replaces a layer or a block: sums of branches, gates that skip, attention that stops."""

from lib.layers.attention import SparseAttention, dense_attention
from lib.layers.branches import Branches, branched
from lib.layers.gates import LayerError, RecurrentGate, SkippedBlock, gate_of, skippable

__all__ = [
    "Branches",
    "LayerError",
    "RecurrentGate",
    "SkippedBlock",
    "SparseAttention",
    "branched",
    "dense_attention",
    "gate_of",
    "skippable",
]
