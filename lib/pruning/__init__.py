"""Sparsity sets and their projections, and plans made of them."""

from lib.pruning.adaptive import GroupAdaptive, LayerAdaptive, SubmatrixAdaptive, SubmatrixByCost
from lib.pruning.composed import DARB, BlockStructured, FilterColumn
from lib.pruning.crossbars import AlignedLines, BlockLines, PolarizedFragments, SharedShapes, tiny_adc
from lib.pruning.groups import (
    NM,
    Block,
    BlockColumns,
    BlockRows,
    Channel,
    Column,
    Filter,
    Groups,
    Kernel,
    PETile,
    Unstructured,
    block_max,
)
from lib.pruning.patterns import NATURAL, PCNN, PUBLISHED, PatternKernels, Patterns
from lib.pruning.plans import correlation, cubic, first_conv, rounds, uniform_plan

__all__ = [
    "DARB",
    "NATURAL",
    "NM",
    "PCNN",
    "PUBLISHED",
    "AlignedLines",
    "Block",
    "BlockColumns",
    "BlockLines",
    "BlockRows",
    "BlockStructured",
    "Channel",
    "Column",
    "Filter",
    "FilterColumn",
    "GroupAdaptive",
    "Groups",
    "Kernel",
    "LayerAdaptive",
    "PETile",
    "PatternKernels",
    "Patterns",
    "PolarizedFragments",
    "SharedShapes",
    "SubmatrixAdaptive",
    "SubmatrixByCost",
    "Unstructured",
    "block_max",
    "correlation",
    "cubic",
    "first_conv",
    "rounds",
    "tiny_adc",
    "uniform_plan",
]
