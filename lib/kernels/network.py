"""A network with kernels where they are faster: measured on its own inputs, layer by layer."""

from collections.abc import Callable, Sequence
from statistics import median
from time import thread_time

import pandas as pd
import scipy.sparse
import torch
from torch import Tensor, nn

from lib.constraint import plain
from lib.kernels.balanced import BalancedLinear
from lib.kernels.convolutions import SparseConv2d
from lib.kernels.errors import KernelError
from lib.kernels.rows import GroupedLinear
from lib.shapes import prunable


class CsrLinear(nn.Module):
    """A linear layer as compressed sparse rows, by SciPy: what an irregular matrix takes.

    >>> from lib.kernels import CsrLinear
    >>> layer = torch.nn.Linear(8, 4)
    >>> x = torch.rand(5, 8)
    >>> torch.allclose(CsrLinear(layer)(x), layer(x), atol=1e-6)
    True
    """

    format = "compressed sparse rows"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.kept = scipy.sparse.csr_matrix(layer.weight.detach().cpu().float().numpy())
        self.bias = None if layer.bias is None else layer.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of ``(..., K)``, without a gradient."""
        out = torch.from_numpy((self.kept @ x.detach().reshape(-1, x.shape[-1]).numpy().T).T)
        out = out if self.bias is None else out + self.bias
        return out.reshape(*x.shape[:-1], -1).contiguous()


def candidates(layer: nn.Module) -> list[nn.Module]:
    """The kernels that a layer can have."""
    if isinstance(layer, nn.Conv2d):
        return [SparseConv2d(layer)]
    if not isinstance(layer, nn.Linear):
        return []
    balanced = min((BalancedLinear(layer, m) for m in (4, 8, 16)), key=lambda kernel: kernel.kept.values.size)
    few = 2 * balanced.kept.n <= balanced.kept.m  # with more it is no N:M, and stores what is not there
    return [GroupedLinear(layer), CsrLinear(layer), *[balanced] * few]


def compile(model: nn.Module, example: Tensor, repeats: int = 7, gain: float = 1.1) -> nn.Module:
    """A copy of a network that computes the same, with a kernel in the place of every layer that it makes faster.

    Layers with zeros are timed in turns on what they get from ``example``, on one thread: dense in both of PyTorch's
    layouts, and with each kernel that they can have. The dense layer stays where no kernel is ``gain`` times faster.

    Args:
        example: a batch of inputs of the size that the network will get. repeats: of a timing, the median counts.

    Returns:
        The copy, in evaluation mode, for inference on a CPU; ``choices`` is a table of it: ``layer``, ``density``,
        ``kernel`` (``dense`` where it stays) and ``speedup`` over the faster dense layout.

    Raises:
        KernelError: a kernel's outputs are not those of the dense layer.

    >>> from lib import kernels, models, pruning
    >>> from lib.constraint import harden
    >>> net = models.build("lenet300", (1, 28, 28), 10)
    >>> net = harden(net, pruning.uniform_plan(net, pruning.Filter(0.9), keep_dense=("fc3",)))
    >>> fast, x = kernels.compile(net, torch.rand(1, 1, 28, 28)), torch.rand(1, 1, 28, 28)
    >>> torch.allclose(fast(x), net(x), atol=1e-5), fast.choices["layer"].tolist()
    (True, ['fc1', 'fc2', 'fc3'])
    """
    fast = plain(model).eval()
    seen: dict[str, Tensor] = {}
    layers = prunable(fast)
    hooks = [
        layer.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, x[0].detach()))
        for name, layer in layers.items()
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            fast(example)
            for hook in hooks:
                hook.remove()
            rows = [
                _choose(fast, name, layer, seen[name], repeats, gain) for name, layer in layers.items() if name in seen
            ]
    finally:
        torch.set_num_threads(threads)
    fast.choices = pd.DataFrame(rows, columns=["layer", "density", "kernel", "speedup"])
    return fast


def _choose(model: nn.Module, name: str, layer: nn.Module, x: Tensor, repeats: int, gain: float) -> tuple:
    density = float(layer.weight.count_nonzero() / layer.weight.numel())
    try:
        found = candidates(layer) if density < 1 else []
    except KernelError:  # what no kernel takes stays dense, and the table says so
        found = []
    if not found:
        return name, density, "dense", 1.0
    dense, expected = [lambda: layer(x)], layer(x)
    if isinstance(layer, nn.Conv2d):
        wide = plain(layer).to(memory_format=torch.channels_last)
        dense.append(lambda: wide(x))
    for kernel in found:
        error = float((kernel(x) - expected).abs().max())
        if not error <= 1e-3 * float(expected.abs().max()) + 1e-6:
            raise KernelError(f"{name}: {kernel.format} differs from the dense layer by {error:g}")
    times = in_turns([*dense, *(lambda kernel=kernel: kernel(x) for kernel in found)], repeats)
    base, own = min(times[: len(dense)]), times[len(dense) :]
    best = min(range(len(found)), key=own.__getitem__)
    if base < gain * own[best]:
        return name, density, "dense", 1.0
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, found[best])
    return name, density, found[best].format, base / own[best]


def in_turns(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median CPU seconds of each call, in turns, after a first one that compiles; what interrupts it does not count.

    >>> from lib.kernels import in_turns
    >>> short, long = torch.rand(8, 8), torch.rand(800, 800)
    >>> times = in_turns([lambda: short @ short, lambda: long @ long], repeats=3)
    >>> times[0] < times[1]
    True
    """
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, own in zip(calls, times, strict=True):
            start = thread_time()
            call()
            own.append(thread_time() - start)
    return [median(own) for own in times]
