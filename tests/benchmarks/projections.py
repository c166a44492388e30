"""Seconds to project a ResNet-50-sized layer set (25 million weights) onto each set, one thread, no training.

The pattern family has only the 3x3 layers to work on (11 million weights). Beside each figure: its ratio to one
pass that squares and sums the same weights, which does not depend on the machine as seconds do.
"""

import time

import torch
import torchvision

from lib import pruning, sharing
from lib.shapes import prunable

CONSTRAINTS = [
    pruning.Unstructured(0.9),
    pruning.Unstructured(0.9, "global"),
    pruning.Filter(0.5),
    pruning.Channel(0.5),
    pruning.Column(0.5),
    pruning.FilterColumn(0.5, 0.5),
    pruning.Kernel(0.5),
    pruning.Block(0.9, 4, 4),
    pruning.PETile(0.5, 16, 16),
    pruning.BlockColumns(0.9, 8, 32),
    pruning.BlockRows(0.9, 32, 8),
    pruning.BlockStructured(0.8, 0.5, 16, 16),
    pruning.NM(n=2, m=4),
    pruning.NM(n=4, m=16),
    pruning.NM(n=8, m=32),
    pruning.block_max(16),
    pruning.DARB(0.9),
    pruning.Patterns(8),
    pruning.Patterns(library=pruning.NATURAL),
    pruning.PatternKernels(8, sparsity=0.7),
    pruning.PCNN(4),
    pruning.PCNN(2, patterns=16),
    sharing.BlockCirculant(8),
]
PATTERNS = (pruning.Patterns, pruning.PCNN)


def seconds(function, repeats: int = 3) -> float:
    """The best of a few runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    torch.set_num_threads(1)
    layers = prunable(torchvision.models.resnet50())
    everything = {n: layer.weight.detach() for n, layer in layers.items()}
    print(f"{sum(w.numel() for w in everything.values()):,} weights in {len(everything)} layers")
    print(f"{'set':72} {'fit s':>7} {'project s':>10} {'ratio':>7}")
    for constraint in CONSTRAINTS:
        pattern = isinstance(constraint, PATTERNS)
        weights = {n: w for n, w in everything.items() if not pattern or w.shape[2:] == (3, 3)}
        once = seconds(lambda weights=weights: [w.square().sum() for w in weights.values()])
        started = time.perf_counter()
        plan = constraint.fit(weights)
        fit = time.perf_counter() - started
        if constraint.per_layer:
            project = seconds(lambda plan=plan, weights=weights: [plan[n].project(w) for n, w in weights.items()])
        else:
            joined = torch.cat([w.reshape(-1) for w in weights.values()])
            project = seconds(lambda c=constraint, w=joined: c.project(w))
        name = str(constraint).replace(str(pruning.NATURAL), "NATURAL")
        print(f"{name:72} {fit:7.2f} {project:10.2f} {project / once:7.1f}")


if __name__ == "__main__":
    main()
