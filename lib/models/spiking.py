"""A small spiking network: leaky integrate-and-fire neurons that can be run backward in time, in a VGG of two stages.

Neurons of a layer receive a current ``I`` at every step. With the leak ``l``, the threshold 1 and the reset ``r``:

    u[t] = l u[t-1] + I[t] - r[t-1],    s[t] = 1 if u[t] > 1 else 0,    r[t] = (r[t-1] + s[t]) / 2

A spike takes 1 off the membrane ``u``: a half in the next step, a quarter in the one after, and so on. The bits of
``r`` are thus the neuron's last spikes, so that ``s[t] = (r[t] >= 1/2)`` and ``r[t-1] = 2 r[t] - s[t]`` give the past
back exactly, and ``u[t-1] = (u[t] - I[t] + r[t-1]) / l`` up to rounding. Neurons that are reset at once, ``r[t] =
s[t]``, are the ordinary ones (snntorch's ``Leaky``). They have no way back: whether there was a spike is forgotten.
"""

from collections.abc import Callable
from math import pi
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pixel_unshuffle

from lib.models.errors import ModelError

Halves = tuple[Tensor, Tensor]
State = tuple[Tensor, Tensor]
"""Of a layer's neurons: membrane ``u`` and reset ``r``, both ``(N, C/2, H, W)``, ``r`` in float64 (53 spikes)."""


def spike(excess: Tensor) -> Tensor:
    """1 where a membrane is above its threshold, else 0; backward ``1 / (1 + (pi x)^2)``, the slope of an arctangent.

    Args:
        excess: membrane less threshold, any shape.

    >>> from lib.models import spike
    >>> x = torch.tensor([-0.5, 0.0, 0.5], requires_grad=True)
    >>> spike(x).tolist()
    [0.0, 0.0, 1.0]
    >>> spike(x).sum().backward()
    >>> x.grad[1].item(), round(x.grad[2].item(), 3)
    (1.0, 0.288)
    """
    return _Spike.apply(excess)


def slope(excess: Tensor) -> Tensor:
    """The derivative that `spike` is given."""
    return 1 / (1 + (pi * excess).square())


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, excess: Tensor) -> Tensor:
        ctx.save_for_backward(excess)
        return (excess > 0).to(excess.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * slope(*ctx.saved_tensors)


class LeakyNeurons(nn.Module):
    """Leaky integrate-and-fire neurons with the threshold 1. No gradient goes through a reset, as in snntorch.

    Args:
        leak: what a step leaves of a membrane, in (0, 1]; 1: nothing leaks. reset: ``halving``, which has an inverse,
            or ``at once``.

    Raises:
        ModelError: other values.

    >>> from lib.models import LeakyNeurons
    >>> neurons, state = LeakyNeurons(leak=1.0), None
    >>> for _ in range(3):
    ...     spikes, state = neurons(torch.tensor([1.2]), state)
    ...     print(spikes.item(), round(state[0].item(), 2), state[1].item())
    1.0 1.2 0.5
    1.0 1.9 0.75
    1.0 2.35 0.875
    """

    def __init__(self, leak: float = 0.9, reset: Literal["halving", "at once"] = "halving") -> None:
        super().__init__()
        if not 0 < leak <= 1 or reset not in ("halving", "at once"):
            raise ModelError(f"{leak=}, {reset=}: allowed are a leak in (0, 1], and 'halving' or 'at once'")
        self.leak, self.reset = leak, reset

    def forward(self, current: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Currents of one step and the state before it, None at first -> spikes and the state after it."""
        u, r = state or (torch.zeros_like(current), torch.zeros_like(current, dtype=torch.float64))
        u = self.leak * u + current - r.to(u.dtype)
        spikes = spike(u - 1)
        return spikes, (u, (r + spikes.detach()) / 2 if self.reset == "halving" else spikes.detach().double())


class SpikingLayer(nn.Module):
    """``(x1, x2) -> (x2, x1 + s)``: ``s`` are spikes of neurons whose current is a normalized convolution of ``x2``.

    Two layers are the reversible node ``y1 = x1 + F(x2), y2 = x2 + G(y1)``. What goes from layer to layer are sums of
    spikes and of the encoded image, so real numbers, not spikes.

    Args:
        channels: of one half. squeeze: the halves come with ``channels/4`` and twice the height and width; every 2 x 2
            pixels become four channels first, which loses nothing.

    >>> from lib.models import SpikingLayer
    >>> layer, x = SpikingLayer(4), torch.randn(2, 2, 4, 6, 6)
    >>> (first, second), (u, r) = layer(tuple(x), None)
    >>> torch.equal(first, x[1]), (second - x[0]).round().unique().tolist()
    (True, [0.0, 1.0])
    """

    def __init__(self, channels: int, squeeze: bool = False, **neurons) -> None:
        super().__init__()
        self.squeeze = squeeze
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.neurons = LeakyNeurons(**neurons)

    def enter(self, halves: Halves) -> Halves:
        """What the layer works on: the halves as they come, or squeezed."""
        return tuple(pixel_unshuffle(x, 2) for x in halves) if self.squeeze else halves

    def current(self, x2: Tensor) -> Tensor:
        """Of its neurons, ``(N, C/2, H, W)`` -> the same shape."""
        return self.bn(self.conv(x2))

    def forward(self, halves: Halves, state: State | None) -> tuple[Halves, State]:
        """One step: what comes in and the state before -> what goes out and the state after."""
        x1, x2 = self.enter(halves)
        spikes, state = self.neurons(self.current(x2), state)
        return (x2, x1 + spikes), state


class SpikingNetwork(nn.Module):
    """An image for ``steps`` steps: a stem, spiking layers, and a linear layer of their output, averaged over time.

    Args:
        width: channels of the first stage, an even number; the second, after a squeeze, has four times as many.
        depth: layers of each stage. steps: of time. coding: ``rate``, in which every pixel is 1 at random, as often as
            it is bright between the image's darkest and brightest pixel; or ``direct``, the image itself at every step.
            neurons: ``leak`` and ``reset`` of `LeakyNeurons`.

    Attributes:
        over_time: how the steps are gone through, ``(network, images, seed) -> features``. `stored` keeps all of them
            for the gradient; `lib.layers` has others, with the same result.

    Evaluation draws the same pixels for every batch of a size, other ones at each place in it: scores depend on how
    images are batched. Training draws others in each pass, from torch's generator.

    >>> from lib.models import SpikingNetwork
    >>> network = SpikingNetwork((1, 28, 28), 10, width=8, depth=1, steps=4, coding="rate").eval()
    >>> x = torch.rand(5, 1, 28, 28)
    >>> network.frame(x, seed=0, t=0).unique().tolist(), torch.equal(network(x), network(x))
    ([0.0, 1.0], True)
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        width: int,
        depth: int,
        steps: int,
        coding: Literal["rate", "direct"] = "rate",
        **neurons,
    ) -> None:
        super().__init__()
        if width % 2 or min(width, depth, steps) < 1 or coding not in ("rate", "direct"):
            raise ModelError(
                f"{width=}, {depth=}, {steps=}, {coding=}: allowed are an even width, a depth and steps from 1, "
                "and 'rate' or 'direct'"
            )
        if shape[1] % 4 or shape[2] % 4:
            raise ModelError(f"spiking takes no images of {shape[1]}x{shape[2]}: height and width are multiples of 4")
        self.steps, self.coding, self.over_time = steps, coding, stored
        self.stem = nn.Sequential(nn.Conv2d(shape[0], width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
        self.layers = nn.ModuleList(SpikingLayer(width // 2, **neurons) for _ in range(depth))
        self.layers.extend(SpikingLayer(2 * width, i == 0, **neurons) for i in range(depth))
        self.head = nn.Linear(4 * width, classes)

    def frame(self, images: Tensor, seed: int, t: int) -> Tensor:
        """The images as they are seen at step ``t``, the same for the same ``seed``."""
        if self.coding == "direct":
            return images
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        draw = torch.Generator(images.device).manual_seed(seed + t)
        random = torch.rand(images.shape, generator=draw, dtype=images.dtype, device=images.device)
        return (random * (high - low) < images - low).to(images.dtype)

    def encoded(self, images: Tensor, seed: int, t: int) -> Halves:
        """What enters the first layer at step ``t``: two halves of ``(N, width/2, H/2, W/2)``."""
        return tuple(self.stem(self.frame(images, seed, t)).chunk(2, 1))

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` -> scores ``(N, classes)``."""
        seed = int(torch.randint(2**31, ())) if self.training and self.coding == "rate" else 0
        return self.head(self.over_time(self, images, seed))


def stored(network: SpikingNetwork, images: Tensor, seed: int) -> Tensor:
    """Step by step, every step kept for the gradient as autograd does: features ``(N, 4 width)``, means over time.

    >>> from lib.models import spiking, stored
    >>> tuple(stored(spiking((1, 28, 28), 10, width=8), torch.rand(2, 1, 28, 28), seed=0).shape)
    (2, 32)
    """
    return unrolled(network, images, seed)[0] / network.steps


def unrolled(
    network: SpikingNetwork, images: Tensor, seed: int, states: list | None = None, times: range | None = None
) -> tuple[Tensor, list[State]]:
    """Steps one after the other: the sum of their features ``(N, 4 width)``, and the states of all layers at the end.

    Args:
        states: of all layers before the first of these steps, None where it is the first of all. times: which steps.

    >>> from lib.models import spiking, unrolled
    >>> network, x = spiking((1, 28, 28), 10, width=8, steps=4).eval(), torch.rand(2, 1, 28, 28)
    >>> first, states = unrolled(network, x, 0, times=range(0, 2))
    >>> second, _ = unrolled(network, x, 0, states, times=range(2, 4))
    >>> torch.allclose(first + second, unrolled(network, x, 0)[0])
    True
    """
    states, total = list(states or [None] * len(network.layers)), 0.0
    for t in times or range(network.steps):
        halves = network.encoded(images, seed, t)
        for i, layer in enumerate(network.layers):
            halves, states[i] = layer(halves, states[i])
        total = total + torch.cat([x.mean((2, 3)) for x in halves], 1)  # (N, 4 width)
    return total, states


def spiking(
    shape: tuple[int, int, int],
    classes: int,
    width: int = 16,
    depth: int = 2,
    steps: int = 8,
    coding: Literal["rate", "direct"] = "rate",
    seed: int = 0,
    over_time: Callable[[SpikingNetwork, Tensor, int], Tensor] = stored,
    **neurons,
) -> SpikingNetwork:
    """A `SpikingNetwork` for images ``(C, H, W)``, freshly initialized: the same ``seed``, the same weights.

    Raises:
        ModelError: a width that is not even, no layer, no step, images whose sides are no multiples of 4.

    >>> from lib.models import spiking
    >>> from lib.shapes import prunable
    >>> list(prunable(spiking((1, 28, 28), 10, depth=1)))
    ['stem.0', 'layers.0.conv', 'layers.1.conv', 'head']
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SpikingNetwork(shape, classes, width, depth, steps, coding, **neurons)
    network.over_time = over_time
    return network
