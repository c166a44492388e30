"""Spiking networks trained in a memory that does not grow with the steps (B. Lei et al., arXiv 2308.08649).

`reversible`, `plainly_reversible` and `checkpointed` are ways through time for a `lib.models.SpikingNetwork`, set as
its ``over_time``, beside `lib.models.stored`, which keeps every step. Results and gradients are the same up to
rounding; what differs is what is kept, and what is computed again. Of the paper only the abstract was at hand: node and
algorithms are this project's own form of what it says.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import isqrt

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pixel_shuffle
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lib.layers.gates import LayerError
from lib.models import SpikingLayer, SpikingNetwork, copied, unrolled
from lib.models.spiking import Halves, State, slope

SPIKES = 53
"""Bits of a reset in float64, one for each step that a neuron can go back."""


def inverse(layer: SpikingLayer, halves: Halves, state: State) -> tuple[Halves, State]:
    """What came into a layer in a step and the state before it, from what went out and the state after.

    Exact but for the rounding of a membrane, which a leak makes ``1 / leak`` times larger with every step back.

    Args:
        halves: ``(x2, x1 + s)``, each ``(N, C/2, H, W)``. state: ``(u, r)``, each of that shape.

    >>> from lib.layers import inverse
    >>> from lib.models import SpikingLayer
    >>> layer, x, before = SpikingLayer(4), torch.randn(2, 2, 4, 6, 6), None
    >>> for _ in range(3):
    ...     states, (y, before) = before, layer(tuple(x), before)
    >>> back, (u, r) = inverse(layer, y, before)
    >>> [bool((a - b).abs().max() < 1e-5) for a, b in zip((*back, u, r), (*x, *states))]
    [True, True, True, True]
    """
    with torch.no_grad(), _unseen(layer):
        x1, x2, r = _heard(halves, state)
        u = _before(layer, state, layer.current(x2), r)
        return _outside(layer, (x1, x2)), (u, r)


def previous(network: SpikingNetwork, images: Tensor, seed: int, t: int, states: list[State]) -> list[State]:
    """The states of all layers before step ``t``, from those after it.

    >>> from lib.layers import previous
    >>> from lib.models import spiking, unrolled
    >>> network, x = spiking((1, 28, 28), 10, width=8).eval(), torch.rand(2, 1, 28, 28)
    >>> before = unrolled(network, x, 0, times=range(0, 5))[1]
    >>> after = unrolled(network, x, 0, before, times=range(5, 6))[1]
    >>> [bool((u - v[0]).abs().max() < 1e-5) for (u, _), v in zip(previous(network, x, 0, 5, after), before)]
    [True, True, True, True]
    """
    with torch.no_grad(), _unseen(network):
        halves, before = _upward(network, network.encoded(images, seed, t), states), []
        for layer, state in zip(reversed(network.layers), reversed(states), strict=True):
            halves, own = inverse(layer, halves, state)
            before.insert(0, own)
    return before


def _upward(network: SpikingNetwork, halves: Halves, states: list[State]) -> Halves:
    """What left the last layer in the step before these states, from what entered the first: without a convolution."""
    for layer, state in zip(network.layers, states, strict=True):
        x1, x2 = layer.enter(halves)
        halves = x2, x1 + _fired(state)
    return halves


def _fired(state: State) -> Tensor:
    """The spikes of a step, which are the first bit of the reset after it."""
    return (state[1] >= 0.5).to(state[0].dtype)


def _heard(halves: Halves, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Of a step that is over: what the layer worked on, ``x1`` and ``x2``, and the reset before it."""
    spikes = _fired(state)
    return halves[1] - spikes, halves[0], 2 * state[1] - spikes


def _before(layer: SpikingLayer, state: State, current: Tensor, r: Tensor) -> Tensor:
    """The membrane before a step."""
    return (state[0] - current + r.to(current.dtype)) / layer.neurons.leak


def _outside(layer: SpikingLayer, halves: Halves) -> Halves:
    """Halves that a layer works on, as the layer below gave them."""
    return tuple(pixel_shuffle(x, 2) for x in halves) if layer.squeeze else halves


def reversible(network: SpikingNetwork, images: Tensor, seed: int) -> Tensor:
    """Through time with the last states kept alone: backward, every layer's step is undone while it is differentiated.

    One convolution of a layer and step is computed again, the one whose gradient is due: its current undoes the step,
    and its graph is the one that is differentiated. What a neuron fired is read from its reset.

    Args:
        images: ``(N, C, H, W)``; a gradient reaches weights, not images. seed: as `SpikingNetwork.frame` takes it.

    Raises:
        LayerError: neurons that are reset at once, more steps than float64 has bits, or images that want a gradient.

    >>> from lib.layers import reversible
    >>> from lib.models import spiking, stored
    >>> network, x = spiking((1, 28, 28), 10, width=8).double(), torch.rand(5, 1, 28, 28, dtype=torch.float64)
    >>> found = []
    >>> for over_time in (stored, reversible):
    ...     loss = over_time(network, x, seed=0).square().sum()
    ...     found.append(torch.autograd.grad(loss, network.layers[0].conv.weight)[0])
    >>> torch.allclose(*found, rtol=1e-9)
    True
    """
    return _through(network, images, seed, _undone)


def plainly_reversible(network: SpikingNetwork, images: Tensor, seed: int) -> Tensor:
    """The same as any reversible layer does it: a layer's step is undone, computed again, and then differentiated.

    Two convolutions of a layer and step are computed again where `reversible` needs one.

    >>> from lib.layers import plainly_reversible, reversible
    >>> from lib.models import spiking
    >>> network, x = spiking((1, 28, 28), 10, width=8), torch.rand(2, 1, 28, 28)
    >>> torch.equal(plainly_reversible(network, x, seed=0), reversible(network, x, seed=0))
    True
    """
    return _through(network, images, seed, _undone_and_redone)


def _through(network: SpikingNetwork, images: Tensor, seed: int, back) -> Tensor:
    if any(layer.neurons.reset != "halving" for layer in network.layers) or network.steps > SPIKES:
        raise LayerError(
            f"reversible, {network.steps} steps: allowed are neurons with reset = 'halving' and up to {SPIKES} steps"
        )
    if images.requires_grad:
        raise LayerError("reversible: the images want a gradient; only weights get one")
    learned = [p for p in network.parameters() if p.requires_grad]
    return _Through.apply(network, images, seed, back, *learned) / network.steps


class _Through(torch.autograd.Function):
    """All steps of a network: the sum of the features, with the images and the last states kept for the gradient."""

    @staticmethod
    def forward(ctx, network: SpikingNetwork, images: Tensor, seed: int, back, *learned: Tensor) -> Tensor:
        total, states = unrolled(network, images, seed)
        ctx.network, ctx.seed, ctx.back, ctx.learned = network, seed, back, learned
        ctx.save_for_backward(images, *(tensor for state in states for tensor in state))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        network, (images, *flat) = ctx.network, ctx.saved_tensors
        states = list(zip(flat[::2], flat[1::2], strict=True))
        sums = {id(p): torch.zeros_like(p) for p in ctx.learned}
        of_u = [torch.zeros_like(u) for u, _ in states]
        with _unseen(network):
            for t in reversed(range(network.steps)):
                with torch.enable_grad():
                    start = network.encoded(images, ctx.seed, t)
                halves = _upward(network, tuple(x.detach() for x in start), states)
                size = halves[0][0, 0].numel()
                of_halves = tuple((g / size)[..., None, None].expand_as(halves[0]) for g in gradient.chunk(2, 1))
                for i, layer in reversed([*enumerate(network.layers)]):
                    halves, states[i], of_halves, of_u[i] = ctx.back(layer, halves, states[i], of_halves, of_u[i], sums)
                _add(sums, network.stem, start, of_halves)
        return None, None, None, None, *(sums[id(p)] for p in ctx.learned)


def _undone(
    layer: SpikingLayer, halves: Halves, state: State, of_halves: Halves, of_u: Tensor, sums: dict[int, Tensor]
) -> tuple[Halves, State, Halves, Tensor]:
    """A layer's step and its gradient undone together, by formulas: what it was given, and the gradients of that."""
    x1, x2, r = _heard(halves, state)
    with torch.enable_grad():
        x2.requires_grad_()
        current = layer.current(x2)
    u = _before(layer, state, current.detach(), r)
    of_current = of_u + of_halves[1] * slope(state[0] - 1)
    of_x2 = of_halves[0] + _add(sums, layer, [current], [of_current], [x2])[0]
    halves, of_halves = (x1, x2.detach()), (of_halves[1], of_x2)
    return _outside(layer, halves), (u, r), _outside(layer, of_halves), layer.neurons.leak * of_current


def _undone_and_redone(
    layer: SpikingLayer, halves: Halves, state: State, of_halves: Halves, of_u: Tensor, sums: dict[int, Tensor]
) -> tuple[Halves, State, Halves, Tensor]:
    """The same of any layer that has an inverse: undone, computed again with a graph, and differentiated by that."""
    given, (u, r) = inverse(layer, halves, state)
    leaves = [x.detach().requires_grad_() for x in (*given, u)]
    with torch.enable_grad():
        halves, (after, _) = layer((leaves[0], leaves[1]), (leaves[2], r))
    of_x1, of_x2, of_before = _add(sums, layer, [*halves, after], [*of_halves, of_u], leaves)
    return given, (u, r), (of_x1, of_x2), of_before


def _add(sums: dict[int, Tensor], module: nn.Module, outputs, gradients, inputs=()) -> list[Tensor]:
    """Add the gradients of a module's parameters to their sums; returns those of the ``inputs``."""
    learned = [p for p in module.parameters() if id(p) in sums]
    if not any(x.requires_grad for x in outputs):
        return []
    found = torch.autograd.grad(outputs, [*inputs, *learned], gradients, allow_unused=True)
    for p, g in zip(learned, found[len(inputs) :], strict=True):
        if g is not None:
            sums[id(p)] += g
    return list(found[: len(inputs)])


@contextmanager
def _unseen(network: nn.Module) -> Iterator[None]:
    """What is computed again within is counted by no running mean of a batch norm in training."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, own in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = own


def checkpointed(network: SpikingNetwork, images: Tensor, seed: int) -> Tensor:
    """Through time with the states kept at every ``sqrt(steps)``-th step, from which the steps between are run again.

    That is ``torch.utils.checkpoint``, for neurons of any kind: memory grows as the root of the steps, and every
    convolution is computed once more (T. Chen et al., arXiv 1604.06174).

    >>> from lib.layers import checkpointed
    >>> from lib.models import spiking, stored
    >>> network, x = spiking((1, 28, 28), 10, width=8, reset="at once"), torch.rand(2, 1, 28, 28)
    >>> torch.allclose(checkpointed(network, x, seed=0), stored(network, x, seed=0))
    True
    """

    def run(times: range, *flat: Tensor) -> tuple[Tensor, ...]:  # flat, as checkpoint keeps tensors alone
        total, states = unrolled(network, images, seed, list(zip(flat[::2], flat[1::2], strict=True)), times)
        return total, *(tensor for state in states for tensor in state)

    total, flat, stride = 0.0, [], isqrt(network.steps)
    for start in range(0, network.steps, stride):
        times = range(start, min(start + stride, network.steps))
        again = {"use_reentrant": False, "preserve_rng_state": False}
        part, *flat = checkpoint(run, times, *flat, context_fn=lambda: (nullcontext(), _unseen(network)), **again)
        total = total + part
    return total / network.steps


def saved_bytes(network: nn.Module, images: Tensor) -> dict[str, int]:
    """What a training step of a copy of the network keeps, in bytes: its loss is the sum of the outputs.

    Returns:
        ``saved``: of the tensors that autograd holds when the forward pass is over, each storage once; parameters,
        buffers and the images, which are there anyway, are left out. ``peak``: the most bytes that tensors made in the
        step held at one time, forward, backward and the parameters' gradients together. What a kernel takes for itself
        within one call is in neither.

    >>> from lib.layers import saved_bytes
    >>> layer = torch.nn.Sequential(torch.nn.Linear(100, 50, bias=False), torch.nn.ReLU())
    >>> found = saved_bytes(layer, torch.rand(8, 100))
    >>> found["saved"] == 4 * 8 * 50, found["peak"] >= 4 * 100 * 50 + 4 * 8 * 50
    (True, True)
    """
    network = copied(network).train()
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers(), images)}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _Alive() as alive:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = network(images).sum()
        saved = sum(held.values())
        loss.backward()
    return {"saved": saved, "peak": alive.peak}


class _Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = function(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in given | self.known:
                storage = tensor.untyped_storage()
                self.known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
