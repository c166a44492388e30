"""The energy of training: a price on the multiply-accumulates that `lib.training.metered` counts."""

import pandas as pd

from lib.technology import table


def training_energy(spent: pd.DataFrame) -> pd.DataFrame:
    """What a training run cost, by layer and product, as E2-Train counts it.

    A product of operands of ``a`` and ``b`` bits counts ``a * b / 32^2`` of one of 32 bits, E2-Train's rule; one of 32
    bits takes a multiplication and an addition in floating point (Horowitz, ISSCC 2014, 45 nm). Arithmetic alone: no
    memory, no norms, no optimizer.

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
    digital = table("digital")
    joule = 1e-12 * (digital("fp32_mul", "energy_pJ") + digital("fp32_add", "energy_pJ"))
    equivalent = spent["macs"] * spent["bits_a"] * spent["bits_b"] / 32**2
    return spent.assign(equivalent_macs=equivalent, energy_J=joule * equivalent)
