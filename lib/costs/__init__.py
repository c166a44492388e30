"""What a compressed network costs: bits of storage, multiply-accumulates, measured time, and energy of training."""

from lib.constraint.formats import formats
from lib.costs.compute import break_even, latency_ratio, product_times, sparse_speedup
from lib.costs.energy import training_energy
from lib.costs.storage import compression, network_storage

__all__ = [
    "break_even",
    "compression",
    "formats",
    "latency_ratio",
    "network_storage",
    "product_times",
    "sparse_speedup",
    "training_energy",
]
