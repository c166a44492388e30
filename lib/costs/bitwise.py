"""Bit-wise products in arrays of one-bit cells, as SOT-MRAM engines compute them: counts, and no joule.

Weights and inputs lie in bits. An array gives the AND of one bit of the inputs with a bit of the weights; ones are
counted, shifted and added up (Yuan et al., arXiv 1912.05416; Yang et al., SOCC 2020, by their abstracts). No figure per
operation is verified, so that counts of networks are compared with each other and with nothing else.
"""

import pandas as pd

from lib.crossbar import Array, Mapping, tile


def bitwise(
    layers: pd.DataFrame, weight_bits: int = 8, input_bits: int = 8, rows: int = 512, columns: int = 512
) -> pd.DataFrame:
    """What every layer takes in arrays of ``rows`` x ``columns`` one-bit cells, for one input.

    A filter lies in ``weight_bits`` columns of as many rows as it has weights; columns that hold nothing are switched
    off. The size of an array is a choice: the abstracts name none.

    Args:
        layers: as `lib.shapes.layer_shapes` says.

    Returns:
        One row per layer: ``layer``, ``arrays``; ``columns`` in use and ``columns_off``; ``column_reads``, of columns
        in use with one bit of an input; ``bit_operations``, ANDs of one bit with one bit.

    Raises:
        CrossbarError: numbers of bits or sizes of arrays that cannot be.

    >>> from lib import models, shapes
    >>> from lib.costs import bitwise
    >>> layers = shapes.layer_shapes(models.build("lenet5", (1, 28, 28), 10), (1, 28, 28))
    >>> found = bitwise(layers, weight_bits=4)
    >>> found[["arrays", "columns", "columns_off"]].values.tolist()[1]  # conv2: 500 x 50 weights, 4 columns a filter
    [1, 200, 312]
    >>> int(found["bit_operations"][1]) == 500 * 50 * 64 * 4 * 8  # weights, positions, bits
    True
    """
    array = Array(rows, columns, Mapping("offset", weight_bits, cell_bits=1), input_bits)
    tiles = tile(layers, array)
    used = tiles["adc_used"] // (tiles["vectors"].clip(lower=1) * array.steps)
    return pd.DataFrame(
        {
            "layer": tiles["layer"],
            "arrays": tiles["arrays"],
            "columns": used,
            "columns_off": tiles["arrays"] * columns - used,
            "column_reads": tiles["adc_used"],
            "bit_operations": tiles["cell_reads"],
        }
    )
