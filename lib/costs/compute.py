"""Multiply-accumulates and measured time.

Counts are of one image, in multiply-accumulates (MACs). Times are of this machine, on one thread, and only ever
compared: a speed-up is a ratio of times measured in turns, because what a shared machine does meanwhile slows both
alike, and no time in seconds would be the same tomorrow.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import exp, inf, log
from statistics import median
from time import perf_counter
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from scipy.stats import bootstrap
from torch import Tensor, nn

from lib.constraint import Plan, plain, weights
from lib.costs.energy import CostError
from lib.shapes import macs, prunable


def network_operations(model: nn.Module, plan: Plan, shape: tuple[int, ...], skip: bool = False) -> pd.DataFrame:
    """Additions and multiplications of every layer for one input of ``shape``: those of its form, and of a dense one.

    Blocks of circulants are counted by their transforms, constants included (`BlockCirculant.operations`); of every
    other layer two for each weight that is left and each output position, as `lib.shapes.macs` counts them.

    Args:
        plan: sets that the weights are in. skip: leave out weights that are no layer's, with a warning.

    Returns:
        One row per layer: ``layer``, ``dense``, ``operations``.

    Raises:
        ConstraintError: a plan that cannot be, or blocks whose side is no power of two.
        CostError: blocks of circulants in a convolution with groups or a stride.

    >>> from lib import costs, models, sharing
    >>> model, plan = models.build("lenet300", (1, 16, 16), 10), {"fc1": sharing.BlockCirculant(4)}
    >>> costs.network_operations(model, plan, (1, 16, 16)).values.tolist()[:2]  # 300 x 256 weights, 100 x 300
    [['fc1', 153600, 58134], ['fc2', 60000, 60000]]
    """
    _ = plan and weights(model, plan)  # says what is wrong with the plan
    layers, work, rows = prunable(model), macs(model, shape, skip), []
    for layer, size, dense, left in work[["layer", "weights", "dense_macs", "macs"]].itertuples(index=False):
        own = getattr(plan.get(layer), "operations", None)
        if own and (getattr(layers[layer], "groups", 1) > 1 or {*getattr(layers[layer], "stride", ())} - {1}):
            raise CostError(f"{layer}: by transforms, a convolution without groups and stride is counted")
        operations = own(layers[layer].weight.detach()) * (dense // size) if own else 2 * left
        rows.append((layer, 2 * int(dense), int(operations)))
    return pd.DataFrame(rows, columns=["layer", "dense", "operations"])


Structure = Literal["unstructured", "block", "filter", "column"]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Measure on one thread, without autograd."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


def _seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call; waits for an accelerator."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - start


def _in_turns(
    first: Callable[[], object], second: Callable[[], object], repeats: int, warmup: int, budget_s: float = inf
) -> list[tuple[float, float]]:
    """Times in seconds of two calls measured in turns, first one ahead and then the other.

    Stops after ``repeats`` pairs, or when ``budget_s`` is spent, but not before three pairs.
    """
    begin = perf_counter()
    for _ in range(warmup):
        first(), second()
    pairs: list[tuple[float, float]] = []
    while len(pairs) < min(3, repeats) or (len(pairs) < repeats and perf_counter() - begin < budget_s):
        if len(pairs) % 2:
            late, early = _seconds(second), _seconds(first)
            pairs.append((early, late))
        else:
            pairs.append((_seconds(first), _seconds(second)))
    return pairs


def latency_ratio(
    model: nn.Module, other: nn.Module, x: Tensor, repeats: int = 30, warmup: int = 5
) -> tuple[float, float, float]:
    """How many times faster ``other`` is than ``model`` on the batch ``x``: time(model) / time(other), no unit.

    Measured in turns on one thread in eval mode; masks, and whatever else makes weights, are baked in. It is a ratio
    because the noise of a machine hits both of a pair.

    Returns:
        The median of the paired ratios and the ends of its 95 % percentile bootstrap interval.

    Raises:
        CostError: fewer than 2 repeats.

    >>> from lib.costs import latency_ratio
    >>> large, small = torch.nn.Linear(1000, 1000), torch.nn.Linear(1000, 10)
    >>> ratio, low, high = latency_ratio(large, small, torch.zeros(16, 1000))
    >>> ratio > 1, low <= ratio <= high
    (True, True)
    """
    if repeats < 2:
        raise CostError(f"repeats = {repeats}: an interval takes at least 2")
    slow, fast = (plain(net).eval() for net in (model, other))
    with _one_thread():
        pairs = _in_turns(lambda: slow(x), lambda: fast(x), repeats, max(warmup, 1))
    ratios = np.array([a / b for a, b in pairs])
    middle = float(np.median(ratios))
    found = bootstrap((ratios,), np.median, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return middle, min(float(found.low), middle), max(float(found.high), middle)


def _check(structure: Structure, rows: int, columns: int, block: int) -> None:
    if structure not in get_args(Structure):
        raise CostError(f"structure = {structure!r}: allowed are {', '.join(get_args(Structure))}")
    if structure == "block" and (rows % block or columns % block):
        raise CostError(f"block = {block}: must divide both sides of a {rows} x {columns} weight")


def sparse_weight(
    rows: int, columns: int, density: float, structure: Structure, block: int = 5, seed: int = 0
) -> Tensor:
    """A random GEMM weight ``(F, K)`` with that fraction kept, at random places: weights, blocks, rows or columns.

    Raises:
        CostError: an unknown structure, a density outside (0, 1], or a block that does not divide both sides.
    """
    _check(structure, rows, columns, block)
    if not 0 < density <= 1:
        raise CostError(f"density = {density}: allowed are numbers in (0, 1]")
    height, width = {"unstructured": (1, 1), "block": (block, block), "filter": (1, columns), "column": (rows, 1)}[
        structure
    ]
    generator = torch.Generator().manual_seed(seed)
    grid = (rows // height, columns // width)
    order = torch.rand(grid, generator=generator).flatten().argsort()
    keep = torch.zeros(len(order), dtype=torch.bool)
    keep[order[: max(1, round(density * len(order)))]] = True
    spread = keep.view(grid).repeat_interleave(height, 0).repeat_interleave(width, 1)
    return torch.randn(rows, columns, generator=generator) * spread


def product(weight: Tensor, structure: Structure, block: int = 5) -> Callable[[Tensor], Tensor]:
    """The product ``W x`` as the structure of ``weight`` (F, K) allows: a function of activations (K, N).

    - ``unstructured``: compressed sparse rows times dense (MKL), ``(F, N)``.
    - ``block``: compressed sparse blocks times dense (MKL), ``(F, N)``; MKL takes square blocks only.
    - ``filter``: the dense product of the rows that are left, ``(kept F, N)``: the others are nobody's input.
    - ``column``: the dense product of the columns that are left, ``(F, N)``, gathering their activations included.

    Raises:
        CostError: an unknown structure, or a block that does not divide both sides.
    """
    _check(structure, *weight.shape, block)
    if structure in ("unstructured", "block"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its sparse layouts a beta
            unstructured = structure == "unstructured"
            return (weight.to_sparse_csr() if unstructured else weight.to_sparse_bsr((block, block))).matmul
    if structure == "filter":
        return weight[weight.any(1)].matmul
    columns = weight.any(0).nonzero().flatten()
    narrow = weight[:, columns].contiguous()
    return lambda x: narrow @ x.index_select(0, columns)


def product_times(
    rows: int,
    columns: int,
    positions: int,
    densities: Sequence[float],
    structure: Structure,
    block: int = 5,
    repeats: int = 30,
    budget_s: float = 3.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Measured speed-ups over the dense product of a layer's GEMM, ``(F, K) x (K, N)``, on one thread in float32.

    Args:
        rows: ``F``. columns: ``K = C*Kh*Kw``. positions: ``N``, the output positions of a batch.
        densities: kept/total, each measured against the dense product in turns.
        block: side of the square blocks of ``block``.
        repeats: pairs of measurements for a density, fewer where ``budget_s`` (for all densities) is spent before.

    Returns:
        A row per density: ``structure``, ``density``, ``rate`` (weights/kept, of the drawn weight), ``dense_us``,
        ``product_us`` (medians, this machine's) and ``speedup`` (median of the paired ratios; above 1 is faster).

    Raises:
        CostError: what `sparse_weight` refuses.

    >>> from lib.costs import product_times
    >>> times = product_times(rows=64, columns=64, positions=64, densities=[1.0, 0.5], structure="column", repeats=3)
    >>> times["rate"].tolist(), times.columns[3:].tolist()
    ([1.0, 2.0], ['dense_us', 'product_us', 'speedup'])
    """
    share = budget_s / max(len(densities), 1)
    table = []
    x = torch.randn(columns, positions, generator=torch.Generator().manual_seed(seed + 1))
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 2))
    for density in densities:
        weight = sparse_weight(rows, columns, density, structure, block, seed)
        call = product(weight, structure, block)
        with _one_thread():
            pairs = _in_turns(lambda: dense @ x, lambda call=call: call(x), repeats, warmup=1, budget_s=share)
        dense_us, product_us = (1e6 * median(side) for side in zip(*pairs, strict=True))
        rate = weight.numel() / int(weight.count_nonzero())
        speedup = median(a / b for a, b in pairs)
        table.append((structure, density, rate, dense_us, product_us, speedup))
    return pd.DataFrame(table, columns=["structure", "density", "rate", "dense_us", "product_us", "speedup"])


def break_even(rates: Sequence[float], speedups: Sequence[float]) -> float:
    """The smallest pruning rate from which the product is never slower than dense on the grid (section C).

    Between the last rate that is slower and the next, the speed-up is interpolated linearly in the log of the rate.
    The first rate of the grid when all are as fast; infinity when the last is slower.

    Raises:
        CostError: lists of different length, empty, or numbers that are not positive.

    >>> from lib.costs import break_even
    >>> round(break_even([1, 2, 4], [0.25, 0.5, 1.5]), 3)
    2.828
    """
    if len(rates) != len(speedups) or not len(rates):
        raise CostError(f"{len(rates)} rates and {len(speedups)} speedups: expected as many, and at least one")
    if not all(r > 0 and s > 0 for r, s in zip(rates, speedups, strict=True)):
        raise CostError("rates and speedups must be positive numbers")
    grid = sorted(zip(rates, speedups, strict=True))
    slower = [i for i, (_, speedup) in enumerate(grid) if speedup < 1]
    if not slower:
        return float(grid[0][0])
    if slower[-1] == len(grid) - 1:
        return inf
    (r0, s0), (r1, s1) = grid[slower[-1] : slower[-1] + 2]
    return exp(log(r0) + (1 - s0) / (s1 - s0) * (log(r1) - log(r0)))
