"""Sparse products that are really faster: compiled kernels, and the formats that they run on."""

from lib.kernels.convolutions import SparseConv, SparseConv2d
from lib.kernels.errors import KernelError
from lib.kernels.network import CsrLinear, compile
from lib.kernels.rows import GroupedLinear, GroupedRows

__all__ = [
    "CsrLinear",
    "GroupedLinear",
    "GroupedRows",
    "KernelError",
    "SparseConv",
    "SparseConv2d",
    "compile",
]
