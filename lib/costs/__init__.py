"""What a compressed network costs: bits, operations, measured time, energy of training, one bill of all."""

from lib.costs.bill import crossbar_bill, digital_bill, training_bill
from lib.costs.bitwise import bitwise
from lib.costs.compute import break_even, latency_ratio, network_operations, product_times
from lib.costs.energy import CostError, mac_pj, training_energy
from lib.costs.storage import compression, network_storage

__all__ = [
    "CostError",
    "bitwise",
    "break_even",
    "compression",
    "crossbar_bill",
    "digital_bill",
    "latency_ratio",
    "mac_pj",
    "network_operations",
    "network_storage",
    "product_times",
    "training_bill",
    "training_energy",
]
