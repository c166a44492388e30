"""Crossbars: signed weights as cells, where a network lies in arrays of them, and what its layers compute there.

`Mapping` says how a weight becomes conductances, `tile` counts from shapes alone; `Programmed` is the product of one
matrix, bit by bit, `on_arrays` a whole network; `occupied` leaves zeros out, and `effective_cycles` measures what
skipping zeros of inputs saves.
"""

from lib.crossbar.converters import Converter, calibrated, exact_bits
from lib.crossbar.devices import Device
from lib.crossbar.inference import on_arrays
from lib.crossbar.mapping import SCHEMES, CrossbarError, Mapping, Polarized
from lib.crossbar.occupied import occupied
from lib.crossbar.product import Programmed
from lib.crossbar.skipping import effective_cycles
from lib.crossbar.tiling import Array, tile
from lib.crossbar.wires import Wires, effective, line_loss

__all__ = [
    "SCHEMES",
    "Array",
    "Converter",
    "CrossbarError",
    "Device",
    "Mapping",
    "Polarized",
    "Programmed",
    "Wires",
    "calibrated",
    "effective",
    "effective_cycles",
    "exact_bits",
    "line_loss",
    "occupied",
    "on_arrays",
    "tile",
]
