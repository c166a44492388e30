"""Bits of storage: data, index and tables apart.

A layer is described by its mask, or by a weight whose nonzeros are what is stored; ``bits`` is the width of a weight.
Index widths are searched, never assumed: a width that suits one density ruins another. Biases and batch norm are left
out, as in the papers.
"""

import pandas as pd
from torch import nn

from lib.constraint import Plan, weights
from lib.constraint.formats import submatrix
from lib.shapes import all_layers


def network_storage(model: nn.Module, plan: Plan, bits: int, skip: bool = False) -> pd.DataFrame:
    """Bits of every layer: those of the plan as their constraint stores them, of the others what is left.

    Args:
        skip: leave out weights that are no layer's, with a warning that names them.

    Returns:
        One row per layer: ``layer``, ``weights``, ``kept`` (nonzero), ``data_bits``, ``index_bits``, ``table_bits``.

    Raises:
        ConstraintError: a plan that cannot be. ShapeError: weights that are no layer's, unless ``skip``.

    >>> from lib import constraint, costs, models, pruning
    >>> model, plan = models.build("lenet300", (1, 28, 28), 10), {"fc1": pruning.Unstructured(0.9)}
    >>> bill = costs.network_storage(constraint.harden(model, plan), plan, bits=8)
    >>> bill[["layer", "kept", "data_bits"]].values.tolist()
    [['fc1', 23520, 188160], ['fc2', 30000, 240000], ['fc3', 1000, 8000]]
    """
    rows, _ = [], plan and weights(model, plan)  # says what is wrong with the plan
    for name, layer in all_layers(model, "storage", skip).items():
        weight = layer.weight.detach()
        bill = plan[name].storage_bits(weight, bits) if name in plan else submatrix(weight, bits)
        rows.append((name, weight.numel(), int(weight.count_nonzero()), *bill))
    return pd.DataFrame(rows, columns=["layer", "weights", "kept", "data_bits", "index_bits", "table_bits"])


def compression(bill: pd.DataFrame, bits: int) -> dict[str, float]:
    """Dense bits over stored bits: ``data`` alone, and ``total`` with index and tables, at ``bits`` on both sides.

    >>> import pandas as pd
    >>> from lib.costs import compression
    >>> bill = pd.DataFrame({"weights": [1000], "data_bits": [800], "index_bits": [190], "table_bits": [10]})
    >>> {name: float(times) for name, times in compression(bill, bits=8).items()}
    {'data': 10.0, 'total': 8.0}
    """
    dense_bits, data = bits * bill["weights"].sum(), bill["data_bits"].sum()
    return {
        "data": dense_bits / data,
        "total": dense_bits / bill[["data_bits", "index_bits", "table_bits"]].sum().sum(),
    }
