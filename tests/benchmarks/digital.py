"""Searching the tilings of whole networks, and simulating arrays by event: CPU seconds on one thread."""

from collections.abc import Callable
from dataclasses import replace
from time import process_time
from typing import Any

import torchvision

from lib.costs.digital import DATAFLOWS, Chip, Loops, RowStationary, fine, search, systolic
from lib.shapes import loop_bounds


def seconds(call: Callable, *arguments: Any) -> float:
    """CPU time of a call."""
    start = process_time()
    call(*arguments)
    return process_time() - start


def searched(layers: list[Loops], dataflow: str, chip: Chip) -> None:
    """Every layer at its best tiling."""
    for layer in layers:
        search(layer, dataflow, chip)


if __name__ == "__main__":
    chip = Chip.read("eyeriss")  # with registers that hold a kernel of any layer
    chip = replace(chip, size={**chip.size, "rf_inputs": 448, "rf_outputs": 448})
    print(f"{'network':14}{'closed form':>20}" + "".join(f"{name:>20}" for name in DATAFLOWS))
    for name in ("alexnet", "vgg16", "resnet50", "mobilenet_v2"):
        layers = Loops.of(loop_bounds(torchvision.models.get_model(name, weights=None), (3, 224, 224)))
        times = [seconds(RowStationary().bill, layers)]
        times += [seconds(searched, layers, dataflow, chip) for dataflow in DATAFLOWS]
        print(f"{name:14}" + "".join(f"{t:20.2f}" for t in times))
    for size in (4, 8, 12):
        steps = systolic(size, 2)
        watts = {component: 0.5 for step in steps.values() for component, _ in step.uses}
        print(f"array of {size} x {size}, {len(steps)} steps: {seconds(fine, steps, watts, 1e9):.2f}")
