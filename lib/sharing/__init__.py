"""Weights that share: codebooks, blocks of one magnitude, factors of few bits."""

from lib.sharing.codebook import Codebook
from lib.sharing.factors import Factors, SmartExchange
from lib.sharing.unified import Unified

__all__ = [
    "Codebook",
    "Factors",
    "SmartExchange",
    "Unified",
]
