"""Convolutions with few weights, computed from these alone.

Every kept kernel is a place in the inputs and its weights. Where all kernels keep one of a few patterns (PatDNN, ASPLOS
2020) there is a loop for each pattern, with its taps written out, and one index for a whole kernel; otherwise every
weight is a kernel of one tap (direct sparse convolution; Park et al., ICLR 2017), and the index is as long as the
weights. Sums of a strip of outputs stay in registers either way.
"""

from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from lib.constraint import Storage
from lib.constraint.formats import index_width
from lib.kernels.common import bias_of, check_inputs
from lib.kernels.errors import KernelError
from lib.kernels.strips import LANES, Pattern, convolution

MOST_PATTERNS = 16
ACCUMULATORS = 12
"""Sums that fit into 16 vector registers, with room for a weight and inputs."""


@dataclass(frozen=True, eq=False)
class SparseConv:
    """The kept weights of a convolution, by filter, in each by pattern, in each by channel: PatDNN's FKW arrays.

    Of PatDNN's filter-kernel reorder these are the kernels: one thread has no use for filters of equal length side by
    side.

    Attributes:
        shape: of the weight, ``(F, C, Kh, Kw)``, ``C`` of one group. patterns: kept taps.
        channels: of every kernel that is kept, ``(kernels,)``. weights: ``(kernels, taps)``.
        bounds: where each filter's kernels of each pattern begin, and end, ``(F, patterns + 1)``.
        which: the pattern of every kernel, ``(kernels,)``, where they are in the order of their channels alone, and
            bounds are those of filters, ``(F, 2)``; else empty.

    >>> from lib.kernels import SparseConv
    >>> weight = torch.zeros(2, 3, 3, 3)
    >>> weight[0, 1, 0, :2], weight[1, 2, 0, :2] = 1.0, 2.0
    >>> kept = SparseConv.of(weight)
    >>> kept.patterns, kept.channels.tolist(), kept.storage(bits=8).data
    ((((0, 0), (0, 1)),), [1, 2], 32.0)
    """

    shape: tuple[int, ...]
    patterns: tuple[Pattern, ...]
    channels: np.ndarray
    weights: np.ndarray
    bounds: np.ndarray
    which: np.ndarray

    @classmethod
    def of(cls, weight: Tensor, patterns: bool = True, reorder: bool = True) -> Self:
        """From a weight ``(F, C, Kh, Kw)`` with zeros.

        Args:
            patterns: look for them; without, every weight stands alone. reorder: a filter's kernels by pattern.

        Raises:
            KernelError: no weight is left.
        """
        if not weight.any():
            raise KernelError("a convolution without any weight")
        filters, channels, height, width = weight.shape
        w = weight.detach().cpu().float().numpy().reshape(filters, channels, -1)
        kept = w != 0
        found = np.unique(kept.reshape(-1, height * width), axis=0)
        found = found[found.any(1)]
        sizes = found.sum(1)
        if patterns and 1 < sizes.min() == sizes.max() and len(found) <= MOST_PATTERNS:
            shown = (kept == found[:, None, None]).all(-1)
        else:  # every place of a kernel is a pattern of its own
            found, shown, reorder = np.eye(height * width, dtype=bool), kept.transpose(2, 0, 1), True
        taps = np.stack([np.flatnonzero(one) for one in found])
        filter_, which, channel = np.nonzero(shown.transpose(1, 0, 2))
        ends = shown.sum(2).T.cumsum().reshape(filters, -1)
        starts = np.append(0, ends.ravel()[:-1]).reshape(ends.shape)
        bounds = np.hstack([starts, ends[:, -1:]])
        if not reorder:
            order = np.lexsort((channel, filter_))
            filter_, which, channel, bounds = filter_[order], which[order], channel[order], bounds[:, [0, -1]]
        return cls(
            (*weight.shape,),
            (*((*((int(t) // width, int(t) % width) for t in one),) for one in taps),),
            channel.astype(np.int32),
            w[filter_[:, None], channel[:, None], taps[which]],
            bounds,
            (which[:0] if reorder else which).astype(np.int32),
        )

    def storage(self, bits: int) -> Storage:
        """Bits of weights, of their index, and of the patterns."""
        _, channels, *kernel = self.shape
        starts = self.bounds.size * index_width(len(self.channels) + 1)
        table = len(self.patterns) * len(self.patterns[0]) * sum(index_width(k) for k in kernel)
        index = len(self.channels) * index_width(channels) + len(self.which) * index_width(len(self.patterns)) + starts
        return Storage(float(self.weights.size * bits), float(index), float(table))


class SparseConv2d(nn.Module):
    """A convolution that computes with kept weights alone: inference on a CPU, in float32, on one thread.

    Patterns have a loop of their own for stride 1 without dilation; else every weight stands alone.

    Args:
        layer: whose weights, bias, stride, padding, dilation and groups it takes. patterns: as of `SparseConv.of`.
        share: as of `lib.kernels.strips.convolution`. reorder: as of `SparseConv.of`; both are there to be left out and
            timed, as PatDNN does.

    Raises:
        KernelError: padding that is no number of zeros, or a layer without any weight.

    >>> from lib.kernels import SparseConv2d
    >>> layer = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
    >>> _ = torch.nn.init.sparse_(layer.weight.data.view(4, 27), 0.5)
    >>> x = torch.rand(2, 3, 9, 9)
    >>> torch.allclose(SparseConv2d(layer)(x), layer(x), atol=1e-6)
    True
    """

    stands_for_layer = True

    def __init__(self, layer: nn.Conv2d, patterns: bool = True, share: bool = True, reorder: bool = True) -> None:
        super().__init__()
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            raise KernelError(f"padding {layer.padding!r}, {layer.padding_mode}: numbers of zeros are known")
        plain = layer.stride == (1, 1) and layer.dilation == (1, 1)
        self.kept = SparseConv.of(layer.weight, patterns and plain, reorder)
        self.bias = bias_of(layer)
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.groups, self.inputs, self.share = layer.groups, layer.in_channels, share
        self._plans: dict[tuple[int, int], tuple] = {}

    @property
    def format(self) -> str:
        """``patterns`` or ``irregular``."""
        return "patterns" if len(self.kept.patterns[0]) > 1 else "irregular"

    def _plan(self, height: int, width: int) -> tuple:
        """For images of a size: the compiled loop, where kernels begin, and the sizes of the padded arrays."""
        kept, (sy, sx), (dy, dx) = self.kept, self.stride, self.dilation
        reach = [(k - 1) * d for k, d in zip(kept.shape[2:], self.dilation, strict=True)]
        out = [
            (n + 2 * p - r - 1) // s + 1
            for n, p, r, s in zip((height, width), self.padding, reach, self.stride, strict=True)
        ]
        if min(out) < 1:
            raise KernelError(f"images of {height} x {width} are smaller than the kernel")
        rows, vectors = _strip(*out)
        high, wide = ceil(out[0] / rows) * rows, ceil(out[1] / (vectors * LANES)) * vectors * LANES
        tall, line = high + reach[0] // sy + 1, wide + reach[1] // sx + 1
        plane = tall * line
        in_filter = np.diff(kept.bounds[:, [0, -1]], axis=1)[:, 0]
        group = np.repeat(np.arange(kept.shape[0]), in_filter) // (kept.shape[0] // self.groups)
        places = (group * kept.shape[1] + kept.channels) * (sy * sx * plane)
        patterns, bounds = kept.patterns, kept.bounds
        if len(patterns[0]) == 1:  # a tap's own place is part of the index, and all are one pattern
            taps = np.array([tap for (tap,) in patterns])
            which = np.repeat(np.tile(np.arange(len(taps)), len(bounds)), np.diff(bounds, axis=1).ravel())
            y, x = (taps * [dy, dx])[which].T
            places = places + ((y % sy) * sx + x % sx) * plane + (y // sy) * line + x // sx
            patterns, bounds = (((0, 0),),), bounds[:, [0, -1]]
        loop = _compiled(patterns, rows, vectors, self.share, len(kept.which) == 0)
        bounds = np.ascontiguousarray(bounds).reshape(-1)
        return loop, places.astype(np.int32), bounds, out, (high, wide), (tall, line)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of ``(N, C, H, W)``, without a gradient.

        Raises:
            KernelError: other inputs than float32 numbers of that shape on a CPU.
        """
        check_inputs(x, x.ndim == 4 and x.shape[1] == self.inputs, f"(N, {self.inputs}, H, W)")
        size = (*x.shape[2:],)
        if size not in self._plans:
            self._plans[size] = self._plan(*size)
        loop, places, bounds, (oh, ow), inside, (tall, line) = self._plans[size]
        (sy, sx), (py, px) = self.stride, self.padding
        count = self.inputs * sy * sx * tall * line
        flat = np.zeros(count + (ACCUMULATORS + 1) * LANES, np.float32)
        planes = flat[:count].reshape(self.inputs, sy, sx, tall, line)  # every stride's pixels side by side
        out = np.empty((len(x), self.kept.shape[0], *inside), np.float32)
        weights = self.kept.weights.reshape(-1)
        for image, result in zip(x.detach().numpy(), out, strict=True):
            for a in range(sy):
                for b in range(sx):
                    y, u = (a - py) % sy, (b - px) % sx  # the first pixels of the image that lie in this plane
                    part = image[:, y::sy, u::sx]
                    top, left = (y + py) // sy, (u + px) // sx
                    part = part[:, : tall - top, : line - left]
                    planes[:, a, b, top : top + part.shape[1], left : left + part.shape[2]] = part
            loop(flat, places, weights, self.kept.which, bounds, self.bias, line, result)
        return torch.from_numpy(np.ascontiguousarray(out[:, :, :oh, :ow]))


@cache
def _compiled(patterns: tuple[Pattern, ...], rows: int, vectors: int, share: bool, reorder: bool):
    return convolution(patterns, rows, vectors, share, reorder)


def _strip(height: int, width: int) -> tuple[int, int]:
    """Rows and vectors of a strip: few outputs beyond the image, few turns through the weights, then wide strips."""
    sizes = [(r, v) for v in (1, 2, 3, 4) for r in (1, 2, 3, 4) if r * v <= ACCUMULATORS]

    def cost(size: tuple[int, int]) -> tuple[float, int]:
        rows, vectors = size
        lanes = vectors * LANES
        outputs = ceil(height / rows) * rows * ceil(width / lanes) * lanes
        return outputs * (1 + 1 / (rows * vectors)), -vectors

    return min(sizes, key=cost)
