"""Layers in every form against PyTorch's dense ones in turns, on one thread: how many times faster, by density.

A star: below the goal that was set for this form (patterns 1.5 at 256 channels, 28 x 28 and 25 %; groups of rows 5 at
3072 x 1024 and 10 %).
"""

from copy import deepcopy
from functools import partial

import torch
from torch import nn

from lib import models, pruning
from lib.constraint import fitted, harden
from lib.kernels import (
    BalancedLinear,
    CsrLinear,
    GroupedConv2d,
    GroupedDirection,
    GroupedLinear,
    SparseConv2d,
    in_turns,
)
from lib.layers import CirculantConv2d, CirculantLinear

DENSITIES = (0.05, 0.1, 0.25, 0.4)
GOALS = {("3 x 3, 256 channels, 28 x 28", "patterns", 0.25): 1.5, ("3072 x 1024, batch 1", "groups of rows", 0.1): 5.0}


def pruned(layer, kept):
    """A copy within a set."""
    net = nn.Sequential(deepcopy(layer))
    return harden(net, fitted(net, {"0": kept}))[0]


def convolutions(layer, density):
    """A 3 x 3 layer in every form that takes this density."""
    patterns = pruned(layer, pruning.PatternKernels(sparsity=1 - 9 / 4 * density))
    return {
        "patterns": SparseConv2d(patterns),
        "patterns, loads not shared": SparseConv2d(patterns, share=False),
        "patterns, not sorted": SparseConv2d(patterns, reorder=False),
        "anywhere": SparseConv2d(pruned(layer, pruning.Unstructured(1 - density))),
        "kernels": SparseConv2d(pruned(layer, pruning.Kernel(1 - density))),
        "block columns": GroupedConv2d(pruned(layer, pruning.BlockColumns(1 - density, 64, 9 * layer.in_channels))),
        "filters": nn.Conv2d(layer.in_channels, round(density * layer.out_channels), 3, padding=1),
        "circulant": CirculantConv2d(layer, 2 ** round(torch.tensor(1 / density).log2().item())),
    }


def matrices(layer, density):
    """A matrix in every form."""
    anywhere, n = pruned(layer, pruning.Unstructured(1 - density)), round(1 / density)
    rank = round(density * layer.weight.numel() / sum(layer.weight.shape))
    first, second = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)
    return {
        "groups of rows": GroupedLinear(pruned(layer, pruning.BlockColumns(1 - density, 64, layer.in_features))),
        "anywhere, CSR": CsrLinear(anywhere),
        "N:M": BalancedLinear(pruned(layer, pruning.NM(1, n)), n),
        "low rank": nn.Sequential(first, second),
        "circulant": CirculantLinear(layer, 2 ** round(torch.tensor(1 / density).log2().item())),
    }


def recurrent(net, density):
    """A GRU with compiled gates: in groups of rows, or every row of its own."""
    forms = {"in blocks": pruning.BlockColumns(1 - density, 64, 64), "anywhere": pruning.Unstructured(1 - density)}
    nets = {form: harden(deepcopy(net), pruning.uniform_plan(net, kept)) for form, kept in forms.items()}
    for one in nets.values():
        one.layer1 = GroupedDirection(one.layer1)
    return nets


def table(name, dense, forms_of, x, repeats=9):
    """A line for every form: the fastest dense call's time over its own, at every density."""
    lines = {}
    for density in DENSITIES:
        forms = forms_of(density)
        with torch.inference_mode():
            times = in_turns([partial(call, x) for call in (*dense, *forms.values())], repeats)
        for form, own in zip(forms, times[len(dense) :], strict=True):
            faster = min(times[: len(dense)]) / own
            missed = faster < GOALS.get((name, form, density), 0)
            lines[form] = lines.get(form, "") + f"{faster:7.2f}" + (" *" if missed else "  ")
    for form, line in lines.items():
        print(f"{name:32}{form:28}{line}")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{'times as fast as dense, kept':60}" + "".join(f"{d:>7.0%}  " for d in DENSITIES))
    for channels, side in ((64, 56), (128, 28), (256, 28), (256, 14), (512, 7)):
        layer, x = nn.Conv2d(channels, channels, 3, padding=1), torch.randn(1, channels, side, side)
        dense = [layer, nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last)]
        table(f"3 x 3, {channels} channels, {side} x {side}", dense, partial(convolutions, layer), x)
    for rows, columns in ((1024, 1024), (3072, 1024), (4096, 4096)):
        layer = nn.Linear(columns, rows)
        for batch in (1, 32):
            x = torch.randn(batch, columns)
            table(f"{rows} x {columns}, batch {batch}", [layer], partial(matrices, layer), x)
    for units in (256, 1024):
        net = models.Recurrent("GRU", 39, units, batch_first=True).eval()
        table(f"GRU, {units} units, a frame", [models.fused(net)], partial(recurrent, net), torch.randn(1, 1, 39))
