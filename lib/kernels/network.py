"""A network with kernels where they are faster: measured on its own inputs, layer by layer."""

from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lib.constraint import plain
from lib.kernels.balanced import BalancedLinear
from lib.kernels.compressed import CsrLinear
from lib.kernels.convolutions import SparseConv2d
from lib.kernels.errors import KernelError
from lib.kernels.recurrent import GroupedDirection, TorchDirection
from lib.kernels.rows import GroupedConv2d, GroupedLinear
from lib.models import Direction, more_than
from lib.shapes import prunable


def candidates(layer: nn.Module) -> list[nn.Module]:
    """The kernels that a layer can have."""
    if isinstance(layer, Direction):
        return [GroupedDirection(layer)]
    if isinstance(layer, nn.Conv2d):
        grouped = [GroupedConv2d(layer)] if layer.groups == 1 else []
        few = [kernel for kernel in grouped if 4 * len(kernel.kept.offset) <= len(layer.weight) + 4]
        return [SparseConv2d(layer), *few]  # as many groups as filters gather more than they multiply
    if not isinstance(layer, nn.Linear):
        return []
    balanced = min((BalancedLinear(layer, m) for m in (4, 8, 16)), key=lambda kernel: kernel.kept.values.size)
    few = 2 * balanced.kept.n <= balanced.kept.m  # with more it is no N:M, and stores what is not there
    return [GroupedLinear(layer), CsrLinear(layer), *[balanced] * few]


def compile(model: nn.Module, example: Tensor, repeats: int = 7, gain: float = 1.1, threads: int = 1) -> nn.Module:
    """A copy of a network that computes the same, with a kernel in the place of every layer that it makes faster.

    Layers with zeros are timed in turns on what they get from ``example``: dense in both of PyTorch's layouts, and with
    each kernel that they can have. The dense layer stays where no kernel is ``gain`` times faster,
    where it has a hook or a forward pass of its own, and where the network itself looks at its weight; it stays in the
    layout of the network given, so that a whole network in channels last can be faster than one with few kernels. A
    direction of a recurrent layer is one layer here, all gates and all steps; where it stays dense torch's own module
    takes its place if it is faster.

    Args:
        example: a batch of inputs of the size that the network will get. repeats: of a timing, the median counts.
        threads: that the network will run on (``torch.set_num_threads``). Only dense layers and dense parts of kernels
            use more than one; times are then of the clock, not of the CPU. A choice made for one thread may be a loss
            on more.

    Returns:
        The copy, in evaluation mode, for inference on a CPU; ``choices`` is a table of it: ``layer``, ``density``,
        ``kernel`` (``dense`` where it stays), ``speedup`` over the faster dense layout, and ``why`` a layer stays
        dense, with ``attrs["threads"]``.

    Raises:
        KernelError: less than one thread; a kernel's outputs are not those of the dense layer, or the network's differ
            from pass to pass.

    >>> from lib import kernels, models, pruning
    >>> from lib.constraint import harden
    >>> net = models.build("lenet300", (1, 28, 28), 10)
    >>> net = harden(net, pruning.uniform_plan(net, pruning.Filter(0.9), keep_dense=("fc3",)))
    >>> fast, x = kernels.compile(net, torch.rand(1, 1, 28, 28)), torch.rand(1, 1, 28, 28)
    >>> torch.allclose(fast(x), net(x), atol=1e-5), fast.choices["layer"].tolist()
    (True, ['fc1', 'fc2', 'fc3'])
    """
    if threads < 1:
        raise KernelError(f"threads = {threads}: allowed are whole numbers from 1")
    fast = plain(model).eval()
    seen: dict[str, tuple] = {}
    layers = {name: m for name, m in fast.named_modules() if isinstance(m, Direction)}
    gates = {id(gate) for direction in layers.values() for gate in direction.modules()}
    layers |= {name: layer for name, layer in prunable(fast).items() if id(layer) not in gates}

    def met(_: nn.Module, *given: Any, name: str) -> None:
        seen.setdefault(name, given)

    hooks = [
        layer.register_forward_pre_hook(partial(met, name=name), with_kwargs=True) for name, layer in layers.items()
    ]
    found_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            before = _whole(fast, example)
            for hook in hooks:
                hook.remove()
            rows = {
                name: (name, density, *_choose(fast, name, layer, density, *seen[name], repeats, gain))
                if name in seen
                else (name, density, "dense", 1.0, "the example never meets it")
                for name, layer in layers.items()
                for density in [_density(layer)]
            }
            replaced = [name for name in rows if fast.get_submodule(name) is not layers[name]]
            while not _same(fast, example, before):  # somebody reads a weight, as torch's transformer layers do
                if not replaced:
                    raise KernelError("the network gives other outputs for the same inputs: none can be compared")
                fast.set_submodule(name := replaced.pop(), layers[name])
                rows[name] = (*rows[name][:2], "dense", 1.0, "the network itself looks at its weight")
    finally:
        torch.set_num_threads(found_threads)
    fast.choices = pd.DataFrame(rows.values(), columns=["layer", "density", "kernel", "speedup", "why"])
    fast.choices.attrs["threads"] = threads
    return fast


def _whole(model: nn.Module, example: Tensor) -> list[Tensor]:
    """All outputs of a network as numbers that can be compared, from the same draws at every call."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        outputs = [out for out in tree_leaves(model(example)) if isinstance(out, Tensor)]
    return [out.double().nan_to_num(0.0, 0.0, 0.0) for out in outputs]  # a masked score may be -inf


def _same(model: nn.Module, example: Tensor, before: list[Tensor]) -> bool:
    """Whether a network still gives the outputs that it gave."""
    try:
        return all(map(_close, _whole(model, example), before))
    except Exception:  # whatever its own forward pass does with a layer that is no layer any more
        return False


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-3 * float(b.abs().max()) + 1e-6) if b.numel() else a.shape == b.shape


def _density(layer: nn.Module) -> float:
    matrices = [w for w in layer.parameters() if w.ndim > 1]
    return float(sum(w.count_nonzero() for w in matrices) / sum(w.numel() for w in matrices))


def _choose(
    model: nn.Module, name: str, layer: nn.Module, density: float, given: tuple, named: dict, repeats: int, gain: float
) -> tuple[str, float, str]:
    """A layer's kernel, put in its place, what it gains, and why there is none."""
    if not isinstance(layer, nn.Conv2d | nn.Linear | Direction):
        return "dense", 1.0, f"no kernel is for a {type(layer).__name__}"
    if named or more_than(layer, nn.Conv2d, nn.Linear, Direction):
        return "dense", 1.0, "its inputs are named" if named else "a hook, or a forward pass of its own"
    why = "no zeros"
    try:
        found = candidates(layer) if density < 1 else []
        outputs = [_outputs(kernel(*given)) for kernel in found]
    except KernelError as error:  # what no kernel takes stays dense, and the table says so
        found, outputs, why = [], [], str(error)
    dense = [layer]
    if isinstance(layer, nn.Conv2d) and found:
        dense.append(plain(layer).to(memory_format=torch.channels_last))
    if isinstance(layer, Direction):
        dense.append(TorchDirection(layer))
    if len(dense) + len(found) == 1:
        return "dense", 1.0, why
    expected = _outputs(layer(*given))
    for kernel, output in zip(found, outputs, strict=True):
        if not _close(output, expected):
            error = float((output - expected).abs().max())
            raise KernelError(f"{name}: {kernel.format} differs from the dense layer by {error:g}")
    times = in_turns([lambda m=m: m(*given) for m in (*dense, *found)], repeats)
    base, own = min(times[: len(dense)]), times[len(dense) :]
    if own:
        why = f"{found[own.index(min(own))].format} is {base / min(own):.2g} times as fast"
    new, chosen = layer, ("dense", 1.0, why)
    if isinstance(layer, Direction) and times[1] < times[0]:
        new = dense[1]
    if own and base >= gain * min(own):
        new = found[own.index(min(own))]
        chosen = new.format, base / min(own), ""
    if new is not layer:
        model.set_submodule(name, new)
    return chosen


def _outputs(out: Tensor | tuple) -> Tensor:
    """Of a layer; a recurrent one returns its state as well."""
    return out[0] if isinstance(out, tuple) else out


def in_turns(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each call, in turns, after a first one that compiles.

    Every turn has an order of its own (drawn, always the same draws): no call always finds the caches as the same other
    one left them. On one thread CPU time counts, so that what interrupts a call does not; on more the clock's.

    >>> from lib.kernels import in_turns
    >>> short, long = torch.rand(8, 8), torch.rand(800, 800)
    >>> times = in_turns([lambda: short @ short, lambda: long @ long], repeats=3)
    >>> times[0] < times[1]
    True
    """
    clock, orders = thread_time if torch.get_num_threads() == 1 else perf_counter, Random(0)
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for i in orders.sample(range(len(calls)), len(calls)):
            start = clock()
            calls[i]()
            times[i].append(clock() - start)
    return [median(own) for own in times]
