"""Crossbars: signed weights as cells, where a network lies in arrays of them, and what its layers compute there.

`Mapping` says how a weight becomes conductances, `tile` counts from shapes alone; `Programmed` is the product of one
matrix, bit by bit, `on_arrays` a whole network; `occupied` leaves zeros out, and `effective_cycles` measures what
skipping zeros of inputs saves.
"""

from lib.crossbar.converters import Converter, calibrated, exact_bits
from lib.crossbar.devices import Device
from lib.crossbar.inference import ArrayLayer, on_arrays
from lib.crossbar.mapping import SCHEMES, CrossbarError, Mapping, Polarized, Scheme, as_mapping
from lib.crossbar.occupied import occupied
from lib.crossbar.product import Programmed
from lib.crossbar.skipping import effective_cycles, input_cycles
from lib.crossbar.tiling import Array, balanced, network_total, tile
from lib.crossbar.wires import Wires, effective, line_loss

__all__ = [
    "SCHEMES",
    "Array",
    "ArrayLayer",
    "Converter",
    "CrossbarError",
    "Device",
    "Mapping",
    "Polarized",
    "Programmed",
    "Scheme",
    "Wires",
    "as_mapping",
    "balanced",
    "calibrated",
    "effective",
    "effective_cycles",
    "exact_bits",
    "input_cycles",
    "line_loss",
    "network_total",
    "occupied",
    "on_arrays",
    "tile",
]
