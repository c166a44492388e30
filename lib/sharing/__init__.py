"""Weights that share: codebooks, blocks of one magnitude, blocks of circulants, factors of few bits."""

from lib.sharing.circulant import BlockCirculant, fft_operations
from lib.sharing.codebook import Codebook
from lib.sharing.factors import Factors, SmartExchange
from lib.sharing.unified import Unified

__all__ = [
    "BlockCirculant",
    "Codebook",
    "Factors",
    "SmartExchange",
    "Unified",
    "fft_operations",
]
