"""Layers with kernels against PyTorch's dense ones in turns, on one thread: how many times faster, by density."""

from statistics import median
from time import thread_time

import torch
from torch import nn

from lib.kernels import BalancedLinear, CsrLinear, GroupedLinear, SparseConv2d
from lib.layers import CirculantLinear
from lib.pruning import NM

PATTERNS = [
    (0, 1, 3, 4),
    (1, 2, 4, 5),
    (3, 4, 6, 7),
    (4, 5, 7, 8),
    (1, 3, 4, 5),
    (3, 4, 5, 7),
    (1, 4, 5, 7),
    (1, 3, 4, 7),
]
DENSITIES = (0.05, 0.1, 0.25, 0.4)


def ratios(dense, kernels, repeats=9):
    """Median CPU times of the fastest dense call over that of each kernel, in turns: what interrupts does not count."""
    times = [[] for _ in (*dense, *kernels)]
    for call in (*dense, *kernels):
        call()
    for _ in range(repeats):
        for call, own in zip((*dense, *kernels), times, strict=True):
            start = thread_time()
            call()
            own.append(thread_time() - start)
    medians = [median(own) for own in times]
    return [min(medians[: len(dense)]) / own for own in medians[len(dense) :]]


def patterned(layer, density):
    """Four taps of a kernel by one of eight patterns, and as many kernels as the density leaves."""
    kernels = layer.weight.data.flatten(0, 1).flatten(1)
    mask = torch.zeros_like(kernels)
    which = torch.randint(len(PATTERNS), (len(kernels),))
    mask.scatter_(1, torch.tensor(PATTERNS)[which], 1.0)
    mask *= (torch.rand(len(kernels), 1) < density * 9 / 4).float()
    kernels *= mask
    return layer


def blocks(layer, density, side=64):
    """In each block of rows other columns (RTMobile)."""
    for row in range(0, layer.out_features, side):
        layer.weight.data[row : row + side, torch.rand(layer.in_features) >= density] = 0
    return layer


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.inference_mode():
        print("3x3 convolutions, batch 1" + " " * 20 + "".join(f"{d:>8.0%}" for d in DENSITIES))
        for filters, side in ((64, 56), (128, 28), (256, 28), (256, 14), (512, 7)):
            x = torch.randn(1, filters, side, side)
            lines = {"patterns": [], "patterns, loads not shared": [], "patterns, not sorted": [], "irregular": []}
            for density in DENSITIES:
                layer = patterned(nn.Conv2d(filters, filters, 3, padding=1), density)
                other = nn.Conv2d(filters, filters, 3, padding=1)
                other.weight.data *= torch.rand_like(other.weight) < density
                wide = nn.Conv2d(filters, filters, 3, padding=1).to(memory_format=torch.channels_last)
                options = [SparseConv2d(layer, **o) for o in ({}, {"share": False}, {"reorder": False})]
                options.append(SparseConv2d(other))
                calls = [lambda kernel=kernel, x=x: kernel(x) for kernel in options]
                dense = [lambda layer=layer, x=x: layer(x), lambda wide=wide, x=x: wide(x)]
                for line, ratio in zip(lines.values(), ratios(dense, calls), strict=True):
                    line.append(ratio)
            for name, line in lines.items():
                print(f"{filters} x {filters}, {side} x {side}: {name:27}" + "".join(f"{r:8.2f}" for r in line))
        print("linear layers" + " " * 32 + "".join(f"{d:>8.0%}" for d in DENSITIES))
        for rows, columns in ((1024, 1024), (3072, 1024), (4096, 4096)):
            for batch in (1, 32):
                x = torch.randn(batch, columns)
                lines = {"grouped rows": [], "compressed sparse rows": []}
                for density in DENSITIES:
                    layer = blocks(nn.Linear(columns, rows), density)
                    calls = [lambda k=k, x=x: k(x) for k in (GroupedLinear(layer), CsrLinear(layer))]
                    for line, ratio in zip(
                        lines.values(), ratios([lambda layer=layer, x=x: layer(x)], calls), strict=True
                    ):
                        line.append(ratio)
                for name, line in lines.items():
                    print(f"{rows} x {columns}, batch {batch}: {name:24}" + "".join(f"{r:8.2f}" for r in line))
        print("linear layers, one vector" + " " * 20 + "     2:4     1:4     1:8, and circulant blocks of 8, 64, 512")
        for rows, columns in ((1024, 1024), (3072, 1024), (4096, 4096)):
            layer, x, line = nn.Linear(columns, rows), torch.randn(1, columns), []
            for n, m in ((2, 4), (1, 4), (1, 8)):
                sparse = nn.Linear(columns, rows)
                sparse.weight.data = NM(n, m).project(sparse.weight.data)
                kernel = BalancedLinear(sparse, m)
                line += ratios([lambda layer=layer, x=x: layer(x)], [lambda k=kernel, x=x: k(x)])
            for k in (8, 64, 512):
                with torch.inference_mode(False), torch.no_grad():  # its transforms are made once
                    fast = CirculantLinear(layer, k)
                    line += ratios([lambda layer=layer, x=x: layer(x)], [lambda f=fast, x=x: f(x)])
            print(f"{rows} x {columns}: {'':33}" + "".join(f"{r:8.2f}" for r in line))
