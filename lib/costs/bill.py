"""One bill for every design: what a network takes, by layer and component, in rows that add up.

``layer, component, energy_pJ, cycles, area_mm2``: every figure stands in one row, so that the sum of a column is the
network's. Time stands in a row ``time`` of each layer, area in rows of the layer ``chip``.
"""

from collections.abc import Mapping

import pandas as pd

from lib.costs.designs import Design
from lib.costs.digital.compressed import Stored, addition, with_stored
from lib.costs.digital.loops import Loops, tidy
from lib.costs.digital.row_stationary import Objective, RowStationary, accesses
from lib.costs.digital.row_stationary import cycles as arithmetic
from lib.costs.energy import CostError, training_energy
from lib.technology import table

BILL = ["layer", "component", "energy_pJ", "cycles", "area_mm2"]

ORDER = {"forward": "xwy", "input_gradient": "ywx", "weight_gradient": "xyw", "weight_sign": "xyw"}
"""Operands and result of the products of training: inputs or their gradients, weights, outputs."""


def _rows(energy: pd.DataFrame, cycles: Mapping[str, float], area: Mapping[str, float]) -> pd.DataFrame:
    parts = [
        energy,
        pd.DataFrame({"layer": [*cycles], "component": "time", "cycles": [*cycles.values()]}),
        pd.DataFrame({"layer": "chip", "component": [*area], "area_mm2": [*area.values()]}),
    ]
    return pd.concat(parts, ignore_index=True).reindex(columns=BILL).fillna(dict.fromkeys(BILL[2:], 0.0))


def crossbar_bill(design: Design, tiles: pd.DataFrame, cycles: Mapping[str, float] | None = None) -> pd.DataFrame:
    """The bill of arrays, as a design of `lib.costs.designs` prices them; a cycle is one read of an array.

    Args:
        tiles: as of `lib.crossbar.tile` or `lib.crossbar.occupied`. cycles: as of `Design.energy`.

    Raises:
        CostError: a design that has no prices, or ``cycles`` as `Design.energy` refuses them.

    >>> import torch
    >>> from lib import crossbar
    >>> from lib.costs import crossbar_bill, designs
    >>> model, isaac = torch.nn.Sequential(torch.nn.Linear(256, 32)), designs.Isaac()
    >>> bill = crossbar_bill(isaac, crossbar.occupied(model, (256,), isaac.array))
    >>> bill.groupby("component")["energy_pJ"].sum().idxmax(), int(bill["cycles"].sum())
    ('adc', 8)
    """
    taken = design.share(tiles, cycles) * tiles["steps"]
    energy = design.energy(tiles, cycles).drop(columns="total")
    energy = energy.melt("layer", var_name="component", value_name="energy_pJ")
    area = design.area(int(tiles["arrays"].sum()))
    return _rows(energy, dict(zip(tiles["layer"], taken.astype(float), strict=True)), area.to_dict())


def digital_bill(
    chip: RowStationary,
    layers: list[Loops],
    stored: Mapping[str, Stored] | None = None,
    objective: Objective = "both",
) -> pd.DataFrame:
    """The bill of a row-stationary chip, each layer at the best tiling of its dense form.

    Energies are Eyeriss's ratios at a picojoule for a multiply-accumulate of 16 bits, as the DNN-Chip Predictor's
    configuration of that chip has them. Products that are skipped take no cycle, but time is never less than the ports
    of the chip need; making weights anew takes none.

    Args:
        stored: how the weights of a layer are kept, by layer; all of 16 bits where nothing is said.

    Raises:
        CostError: a layer of ``stored`` that is not there, or one that fits in no tiling.

    >>> from lib.costs import digital_bill
    >>> from lib.costs.digital import Loops, RowStationary, Stored
    >>> layers = [Loops(K=64, C=64, Yo=8, Xo=8, R=3, S=3, layer="conv")]
    >>> dense = digital_bill(RowStationary(), layers)
    >>> half = digital_bill(RowStationary(), layers, {"conv": Stored(bits=8, skipped=0.5)})
    >>> float(dense["cycles"].sum() / half["cycles"].sum())
    2.0
    """
    stored = dict(stored or {})
    if unknown := sorted({*stored} - {layer.layer for layer in layers}):
        raise CostError(f"stored: no layer {unknown[0]}; there are {', '.join(layer.layer for layer in layers)}")
    mac = table("digital_chips")("eyeriss", "mac_pJ")
    units = {level: mac * cost for level, cost in (chip.units | {"rebuild": addition()}).items()}
    parts, cycles = [], {}
    for layer in layers:
        best, kept = chip.search(layer, objective), stored.get(layer.layer, Stored(bits=16))
        words = with_stored(accesses(layer, best.to_dict()), kept)
        found = tidy(words, units, layer.groups).groupby("level", sort=False)["energy"].sum()
        parts.append(pd.DataFrame({"layer": layer.layer, "component": found.index, "energy_pJ": found.to_numpy()}))
        time = chip.latency(arithmetic(layer, best) * (1 - kept.skipped), words) * layer.groups
        cycles[layer.layer] = cycles.get(layer.layer, 0.0) + time  # a row a use
    return _rows(pd.concat(parts), cycles, {"chip": chip.area_mm2})


def training_bill(spent: pd.DataFrame, layers: list[Loops], batch: int = 1) -> pd.DataFrame:
    """The bill of a training run: E2-Train's price of arithmetic (`training_energy`), and beside it DRAM.

    Every product takes both operands from DRAM once and writes its result once, weights and their gradients once a
    batch: less no chip can move whose buffer holds no whole layer. Where signs of gradients are predicted from leading
    bits, the rest of the bits follows for the share that is not, and a result is written once. A byte costs what the
    DNN-Chip Predictor's configuration of Eyeriss says; results are as wide as the wider operand. How often a layer ran
    is told from its arithmetic, so that under masks, which leave arithmetic out, activations would move less as well:
    this is for dense networks. Time and area are left out.

    Args:
        spent: as `lib.training.metered` returns it, all uses of a layer together. layers: of one input, a row a use.
        batch: inputs that are computed with the same weights.

    Returns:
        As of `digital_bill`; components are ``forward, arithmetic``, ``forward, DRAM``, and so on.

    Raises:
        CostError: a layer of ``spent`` that is not there, a batch below 1, or signs predicted in a layer that also had
            ordinary gradients of other widths: two trainings, of which nobody can tell what moved in which.

    >>> import pandas as pd
    >>> from lib.costs import training_bill
    >>> from lib.costs.digital import Loops
    >>> spent = pd.DataFrame({"layer": ["fc"], "product": ["forward"], "bits_a": [32], "bits_b": [32], "macs": [1e6]})
    >>> bill = training_bill(spent, [Loops(K=1000, C=1000, layer="fc")])
    >>> [int(pj) for pj in bill["energy_pJ"]]  # arithmetic, and a million weights of four bytes at 100 pJ
    [4600000, 400800000]
    """
    loops = {layer.layer: [use for use in layers if use.layer == layer.layer] for layer in layers}
    if unknown := sorted({*spent["layer"]} - {*loops}):
        raise CostError(f"spent: no layer {unknown[0]}; there are {', '.join(loops)}")
    if batch < 1:
        raise CostError(f"batch = {batch}: 1 or more is allowed")
    byte, rows = table("digital_chips")("eyeriss", "dram_pJ"), []
    signs, gradients = (spent[spent["product"] == f"weight_{kind}"].set_index("layer") for kind in ("sign", "gradient"))
    twice = {*signs.index[signs.index.duplicated()], *gradients.index[gradients.index.duplicated()]}
    if mixed := sorted(twice & {*signs.index}):
        raise CostError(f"spent: {mixed[0]} had signs of gradients and gradients of several widths: bill them apart")
    for row in training_energy(spent).itertuples(index=False):
        sizes = ("inputs", "weights", "outputs", "macs")
        inputs, weights, outputs, macs = (sum(getattr(use, size) for use in loops[row.layer]) for size in sizes)
        numbers = {"x": inputs, "w": weights / batch, "y": outputs}
        a, b, out = (numbers[name] for name in ORDER[row.product])
        bits = a * row.bits_a + b * row.bits_b + out * max(row.bits_a, row.bits_b)
        if row.product == "weight_gradient" and row.layer in signs.index:  # what the sign was predicted from is there
            bits = a * (row.bits_a - signs.at[row.layer, "bits_a"]) + b * (row.bits_b - signs.at[row.layer, "bits_b"])
        rows.append((row.layer, f"{row.product}, arithmetic".replace("_", " "), row.energy_J * 1e12))
        rows.append((row.layer, f"{row.product}, DRAM".replace("_", " "), bits / 8 * byte * row.macs / macs))
    return _rows(pd.DataFrame(rows, columns=BILL[:3]), {}, {})
