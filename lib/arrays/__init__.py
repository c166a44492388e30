"""Arrays of cells: where a network lies in them, what its layers compute there, and what a pruned one occupies.

`layer_shapes` and `tile` count from shapes alone; `Programmed` is the product of one matrix, bit by bit, `on_arrays` a
whole network; `occupied` leaves zeros out, and `effective_cycles` measures what skipping zeros of inputs saves.
"""

from lib.arrays.converters import Converter, calibrated, exact_bits
from lib.arrays.inference import ArrayLayer, on_arrays
from lib.arrays.occupied import occupied
from lib.arrays.product import Programmed
from lib.arrays.skipping import effective_cycles, input_cycles
from lib.arrays.tiling import Array, balanced, layer_shapes, network_total, tile
from lib.arrays.wires import Wires, effective, line_loss

__all__ = [
    "Array",
    "ArrayLayer",
    "Converter",
    "Programmed",
    "Wires",
    "balanced",
    "calibrated",
    "effective",
    "effective_cycles",
    "exact_bits",
    "input_cycles",
    "layer_shapes",
    "line_loss",
    "network_total",
    "occupied",
    "on_arrays",
    "tile",
]
