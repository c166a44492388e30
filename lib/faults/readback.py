"""What the weights of a network read back as from the cells of a chip."""

from collections.abc import Mapping as Dict

import torch
from torch import Tensor, nn

from lib.constraint import plain
from lib.crossbar import CrossbarError, Mapping
from lib.crossbar.devices import Devices, disturbed, each
from lib.crossbar.inference import refuse_arrays
from lib.shapes import all_layers, prunable

Mapped = Mapping | str | Dict[str, Mapping | str]
"""One mapping for all layers, or one for each layer that lies in crossbars; the other layers stay digital."""


def on_crossbars(model: nn.Module, mapping: Mapped) -> dict[str, Mapping]:
    """The layers that are mapped to cells, and how: convolutions and linear layers, all of them unless named.

    Batch norm, biases and activations stay digital and healthy.

    Raises:
        ShapeError: one mapping for all, and weights that are no layer's; name the layers that lie in crossbars.
        CrossbarError: an unknown mapping, a layer that the model lacks, one that lies in arrays already, or weights
            that are not finite.

    >>> from lib.faults import on_crossbars
    >>> from lib.models import build
    >>> plan = on_crossbars(build("lenet300", (1, 28, 28), 10), {"fc1": "offset", "fc2": "differential"})
    >>> {name: mapping.columns for name, mapping in plan.items()}  # fc3 stays digital
    {'fc1': 1, 'fc2': 2}
    """
    refuse_arrays(model)
    layers = prunable(model)
    plan = mapping if isinstance(mapping, Dict) else dict.fromkeys(all_layers(model, "one mapping for all"), mapping)
    if not plan:
        raise CrossbarError(f"the plan of mappings is empty; it may name {', '.join(layers)}")
    for name in plan:
        if name not in layers:
            raise CrossbarError(f"the plan maps layer {name!r}; the model has {', '.join(layers)}")
        if not layers[name].weight.isfinite().all():
            raise CrossbarError(f"layer {name!r} has weights that are not finite: they cannot be mapped to cells")
    return {name: m if isinstance(m, Mapping) else Mapping(m) for name, m in plan.items()}


def read_back(weight: Tensor, mapping: Mapping, devices: Devices, chip: int, layer: str) -> Tensor:
    """What one layer's weights read back as from a chip: encoded, disturbed, decoded, in float32.

    >>> from lib.crossbar import Mapping
    >>> from lib.faults import StuckAt, read_back
    >>> weight = torch.tensor([4.0, -2.0, 0.5])
    >>> read_back(weight, Mapping(clip=0.5), (), chip=0, layer="fc1").tolist()  # perfect cells, a clipped range
    [2.0, -2.0, 0.5]
    >>> read_back(weight, Mapping(), StuckAt(1.0, ratio=0), chip=0, layer="fc1").tolist()
    [0.0, 0.0, 0.0]
    """
    exact = weight.float()  # 1 - 0.001 is 1 in bfloat16
    scale = mapping.range_of(exact)
    cells = mapping.encode(exact, scale)
    cells = disturbed(cells, devices, mapping, chip, layer)
    return mapping.decode(cells, scale).to(weight.dtype)


def on_chip(model: nn.Module, mapping: Mapped, devices: Devices, chip: int) -> nn.Module:
    """A copy of the model, without masks and in evaluation mode, with the weights that a chip gives back.

    Raises:
        CrossbarError: as `on_crossbars`; a device that is new at every read.

    >>> from lib.faults import StuckAt, on_chip
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> model[0].weight.data = torch.tensor([[4.0, -2.0]])
    >>> on_chip(model, "offset", StuckAt(1.0, ratio=0), chip=0)[0].weight.tolist(), model[0].weight.tolist()
    ([[-4.0, -4.0]], [[4.0, -2.0]])
    """
    copy, drawn = plain(model).eval(), each(devices, lasting=True)
    layers = prunable(copy)
    with torch.no_grad():
        for name, m in on_crossbars(copy, mapping).items():
            layers[name].weight.copy_(read_back(layers[name].weight, m, drawn, chip, name))
    return copy
