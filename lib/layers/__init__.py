"""What replaces a layer: branches, circulants, gates, choices, exits, widths, lines, attention, ways back in time."""

from lib.layers.attention import SparseAttention, dense_attention
from lib.layers.branches import Branches, branched
from lib.layers.choices import (
    ChoosingBlock,
    block_costs,
    choosing,
    choosing_blocks,
    path_costs,
    spent,
    to_budget,
)
from lib.layers.circulant import CirculantConv2d, CirculantLinear, as_dense, circulant
from lib.layers.exits import Exits, anytime, at_all_exits, dearest, exit_of, leave, stages
from lib.layers.gates import FeedForwardGate, LayerError, RecurrentGate, SkippedBlock, gate_of, skippable
from lib.layers.packed import Packed, packed
from lib.layers.reversible import checkpointed, inverse, plainly_reversible, previous, reversible, saved_bytes
from lib.layers.widths import at_width, cut_to, ordered, sandwich, slimmable, uneven

__all__ = [
    "Branches",
    "ChoosingBlock",
    "CirculantConv2d",
    "CirculantLinear",
    "Exits",
    "FeedForwardGate",
    "LayerError",
    "Packed",
    "RecurrentGate",
    "SkippedBlock",
    "SparseAttention",
    "anytime",
    "as_dense",
    "at_all_exits",
    "at_width",
    "block_costs",
    "branched",
    "checkpointed",
    "choosing",
    "choosing_blocks",
    "circulant",
    "cut_to",
    "dearest",
    "dense_attention",
    "exit_of",
    "gate_of",
    "inverse",
    "leave",
    "ordered",
    "packed",
    "path_costs",
    "plainly_reversible",
    "previous",
    "reversible",
    "sandwich",
    "saved_bytes",
    "skippable",
    "slimmable",
    "spent",
    "stages",
    "to_budget",
    "uneven",
]
