"""Value sets: what a layer's weights may be, alone or on what a sparsity set keeps.

Pruning comes first and quantization after it, so a weight that is exactly zero is off the support: it takes no part in
the choice of values and stays zero. A mask that is attached, or a network pruned before, is a frozen support. `Unified`
is the exception: the sign of zero is + in a block that shares a magnitude.
"""

from lib.quantization.activations import full_precision_activations, quantize_activations
from lib.quantization.branches import Expansion, TernaryRule, branch
from lib.quantization.joint import Quantized
from lib.quantization.levels import Levels, binary, ternary, uniform
from lib.quantization.powers import PowerOfTwo

__all__ = [
    "Expansion",
    "Levels",
    "PowerOfTwo",
    "Quantized",
    "TernaryRule",
    "binary",
    "branch",
    "full_precision_activations",
    "quantize_activations",
    "ternary",
    "uniform",
]
