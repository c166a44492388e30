"""What a compressed network costs: bits of storage, multiply-accumulates, measured time, and energy of training."""

from lib.costs.compute import break_even, latency_ratio, product_times, sparse_speedup
from lib.costs.energy import CostError, mac_pj, training_energy
from lib.costs.storage import compression, network_storage

__all__ = [
    "CostError",
    "break_even",
    "compression",
    "latency_ratio",
    "mac_pj",
    "network_storage",
    "product_times",
    "sparse_speedup",
    "training_energy",
]
