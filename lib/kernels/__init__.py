"""Sparse products that are really faster: compiled kernels, and the formats that they run on."""

from lib.kernels.attention import ordered_attention
from lib.kernels.balanced import BalancedLinear, BalancedRows
from lib.kernels.compressed import CompressedRows, CsrLinear
from lib.kernels.convolutions import SparseConv, SparseConv2d
from lib.kernels.errors import KernelError
from lib.kernels.network import compile, in_turns
from lib.kernels.recurrent import GroupedDirection
from lib.kernels.rows import GroupedConv2d, GroupedLinear, GroupedRows

__all__ = [
    "BalancedLinear",
    "BalancedRows",
    "CompressedRows",
    "CsrLinear",
    "GroupedConv2d",
    "GroupedDirection",
    "GroupedLinear",
    "GroupedRows",
    "KernelError",
    "SparseConv",
    "SparseConv2d",
    "compile",
    "in_turns",
    "ordered_attention",
]
