"""Bit-wise arithmetic in arrays of one-bit cells, as SOT-MRAM engines compute it: counts, and no joule.

Weights and inputs lie in bits. An array gives the AND of one bit of the inputs with a bit of the weights; ones are
counted, shifted and added up (Yuan et al., arXiv 1912.05416; Yang et al., SOCC 2020, by their abstracts). No figure per
operation is verified, so that counts of networks are compared with each other and with nothing else.
"""

from math import ceil, log2

import pandas as pd
from torch import nn

from lib.costs.energy import CostError
from lib.crossbar import Array, Mapping, occupied, tile
from lib.shapes import layer_shapes

FLOATS = {"fp32": (8, 23), "fp16": (5, 10), "bfloat16": (8, 7)}
"""Bits of exponent and of fraction (IEEE 754; bfloat16 is the upper half of fp32)."""


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


def bitwise_left(
    model: nn.Module,
    shape: tuple[int, ...],
    weight_bits: int = 8,
    input_bits: int = 8,
    rows: int = 512,
    columns: int = 512,
) -> pd.DataFrame:
    """`bitwise` for a compressed network: rows and columns that are zero throughout a layer are left out.

    Returns:
        As of `bitwise`; ``columns_off`` are all of the dense network's arrays that nothing lies in.

    Raises:
        CrossbarError: as `bitwise`.

    >>> import torch
    >>> from lib.costs.bitwise import bitwise_left
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 32))
    >>> model[0].weight.data[8:] = 0.0  # 8 filters of 4 bits are left
    >>> bitwise_left(model, (256,), weight_bits=4)[["columns", "columns_off"]].values.tolist()
    [[32, 480]]
    """
    array = Array(rows, columns, Mapping("offset", weight_bits, cell_bits=1), input_bits)
    dense = bitwise(layer_shapes(model, shape), weight_bits, input_bits, rows, columns)
    tiles = occupied(model, shape, array, "lines")
    used = (tiles["adc_used"] // (tiles["vectors"].clip(lower=1) * array.steps)).to_numpy()
    return dense.assign(
        arrays=tiles["arrays"].to_numpy(),
        columns=used,
        columns_off=dense["columns"] + dense["columns_off"] - used,
        column_reads=tiles["adc_used"].to_numpy(),
        bit_operations=tiles["cell_reads"].to_numpy(),
    )


def float_steps(exponent: int, fraction: int) -> pd.DataFrame:
    """Steps on single bits of an addition and a multiplication in floating point: derived here, printed by no paper.

    Sign and magnitude, a hidden one, results cut off; rounding, infinities and subnormal numbers are left out. With
    ``p = fraction + 1`` and ``s = ceil(log2 p)`` stages of a shifter, an addition

    1. compares both magnitudes and puts the larger first: ``exponent + fraction`` full additions (a subtraction), and
       a choice for every bit of both, signs too;
    2. aligns: ``exponent`` full additions; ``s`` stages and one that clears what is too far, of ``p`` choices each;
    3. adds or subtracts: ``p`` full additions, and as many bits that are turned or not;
    4. normalizes: one place to the right, or by ``s`` stages to the left, of ``p`` choices each; exponent corrected
       both ways.

    A multiplication adds exponents and takes the bias off; makes ``p^2`` partial products and adds them up in rows of
    ``p``; and shifts by one place at most.

    Args:
        exponent, fraction: bits, as of `FLOATS`.

    Returns:
        A row for ``addition`` and ``multiplication``: ``full_additions`` of three bits, ``choices`` between two bits,
        ``gates`` (AND, OR, XOR of two bits), and ``steps``, their sum.

    Raises:
        CostError: no fraction, or an exponent of fewer bits than the shifter has stages.

    >>> from lib.costs.bitwise import FLOATS, float_steps
    >>> float_steps(*FLOATS["bfloat16"]).to_dict("index")["multiplication"]
    {'full_additions': 80, 'choices': 8, 'gates': 65, 'steps': 153}
    """
    p = fraction + 1
    stages = ceil(log2(p)) if p > 0 else 0
    if fraction < 1 or exponent < stages:
        raise CostError(
            f"exponent = {exponent}, fraction = {fraction}: 1 bit or more, and an exponent that can shift it"
        )
    far = max(0, exponent - stages - 1)  # gates that ask whether any higher bit of the difference is set
    zeros = sum(2**k - 1 for k in range(stages))  # the same of the first 2^k bits, before a shift to the left by them
    steps = {
        "addition": {
            "full_additions": (exponent + fraction) + exponent + p + 2 * exponent,
            "choices": 2 * (1 + exponent + fraction) + (stages + 1) * p + p + stages * p,
            "gates": far + p + zeros + 2,
        },
        "multiplication": {
            "full_additions": 3 * exponent + p * (p - 1),
            "choices": p,
            "gates": 1 + p * p,
        },
    }
    found = pd.DataFrame(steps).T
    return found.assign(steps=found.sum(axis=1))
