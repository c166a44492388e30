"""What arithmetic costs: the one price of a multiply-accumulate, and the energy of training by it."""

import pandas as pd

from lib.technology import table


class CostError(ValueError):
    """Something that cannot be priced or timed: the message names what came and what is allowed.

    >>> from lib.costs import mac_pj
    >>> mac_pj("int4")
    Traceback (most recent call last):
        ...
    lib.costs.energy.CostError: kind = 'int4': allowed are int8, fp32
    """


MACS = {"int8": ("int8_mul", "int32_add"), "fp32": ("fp32_mul", "fp32_add")}
"""The operations of a multiply-accumulate: rows of ``data/technology/digital.csv``."""


def mac_pj(kind: str) -> float:
    """Energy of a multiply-accumulate at 45 nm in pJ (Horowitz, ISSCC 2014), without any memory.

    Args:
        kind: ``int8`` (with a 32-bit sum) or ``fp32``.

    Raises:
        CostError: another kind.

    >>> from lib.costs import mac_pj
    >>> round(mac_pj("int8"), 1), round(mac_pj("fp32"), 1)  # 0.2 + 0.1 and 3.7 + 0.9
    (0.3, 4.6)
    """
    if kind not in MACS:
        raise CostError(f"kind = {kind!r}: allowed are {', '.join(MACS)}")
    return sum(table("digital")(operation, "energy_pJ") for operation in MACS[kind])


def training_energy(spent: pd.DataFrame) -> pd.DataFrame:
    """What a training run cost, by layer and product, as E2-Train counts it.

    A product of operands of ``a`` and ``b`` bits counts ``a * b / 32^2`` of one of 32 bits, E2-Train's rule; one of 32
    bits takes a multiplication and an addition in floating point (`mac_pj`). Arithmetic alone: no memory, no norms, no
    optimizer.

    Args:
        spent: as `lib.training.metered` returns it.

    Returns:
        ``spent`` with ``equivalent_macs``, in multiply-accumulates of 32 bits, and ``energy_J``.

    >>> import pandas as pd
    >>> from lib.costs import training_energy
    >>> spent = pd.DataFrame({"layer": ["fc"], "product": ["forward"], "bits_a": [8], "bits_b": [8], "macs": [1.6e12]})
    >>> training_energy(spent)[["equivalent_macs", "energy_J"]].values.round(2).tolist()
    [[100000000000.0, 0.46]]
    """
    equivalent = spent["macs"] * spent["bits_a"] * spent["bits_b"] / 32**2
    return spent.assign(equivalent_macs=equivalent, energy_J=1e-12 * mac_pj("fp32") * equivalent)
