"""Recurrent layers with few weights: all steps of a sequence in one compiled loop, the matrices in groups of rows."""

from copy import deepcopy

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lib.kernels.common import check_inputs
from lib.kernels.errors import KernelError
from lib.kernels.rows import GroupedRows, _one
from lib.models import Direction, Recurrent, fused

HALF, ONE = np.float32(0.5), np.float32(1)
LIMIT = np.float32(7.9053111)
"""Beyond it a tanh of float32 is 1."""
ABOVE = [-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08]
ABOVE = np.array([*ABOVE, 1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03], np.float32)
BELOW = np.array([1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03], np.float32)
"""Eigen's rational approximation of tanh, x ABOVE(x^2) / BELOW(x^2): a few units of float32's last place, and a loop of
it is one of vectors, which calls of the C library's are not."""


@njit(nogil=True, fastmath=True)
def _tanh(x):
    x = min(max(x, -LIMIT), LIMIT)
    y = x * x
    above, below = ABOVE[0], BELOW[0]
    for i in range(1, 7):
        above = above * y + ABOVE[i]
    for i in range(1, 4):
        below = below * y + BELOW[i]
    return x * above / below


@njit(nogil=True, fastmath=True)
def _sigmoid(x):
    return HALF + HALF * _tanh(HALF * x)


@njit(nogil=True, fastmath=True)
def _gru(a, b, h):
    """A step from the gates' products with a frame and with the state, gate by gate; ``h`` is changed in place."""
    units = len(h)
    reset, update, new = a[:units], a[units : 2 * units], a[2 * units :]
    reset_h, update_h, new_h = b[:units], b[units : 2 * units], b[2 * units :]
    for i in range(units):
        n = _tanh(new[i] + _sigmoid(reset[i] + reset_h[i]) * new_h[i])
        h[i] = n + _sigmoid(update[i] + update_h[i]) * (h[i] - n)


@njit(nogil=True, fastmath=True)
def _lstm(a, b, h, c):
    units = len(h)
    for i in range(4 * units):
        a[i] += b[i]
    take, keep, cell, show = a[:units], a[units : 2 * units], a[2 * units : 3 * units], a[3 * units :]
    for i in range(units):
        c[i] = _sigmoid(keep[i]) * c[i] + _sigmoid(take[i]) * _tanh(cell[i])
        h[i] = _sigmoid(show[i]) * _tanh(c[i])


@njit(nogil=True, fastmath=True)
def _sequence(frames, reverse, ih, hh, ih_bias, hh_bias, h, c, scratch, out):
    """Frames ``(T, C)`` of one sequence; ``h`` and, of an LSTM, ``c`` are changed in place. A GRU has no ``c``."""
    a, b = np.empty(len(ih_bias), np.float32), np.empty(len(hh_bias), np.float32)
    for step in range(len(frames)):
        t = len(frames) - 1 - step if reverse else step
        a[:] = ih_bias
        _one(frames[t], *ih, scratch, a)
        b[:] = hh_bias
        _one(h, *hh, scratch, b)
        if len(c) == 0:
            _gru(a, b, h)
        else:
            _lstm(a, b, h, c)
        out[t] = h


class _Replacing(nn.Module):
    """What stands in a `Recurrent` in the place of a `Direction`."""

    stands_for_layer = True

    def __init__(self, direction: Direction) -> None:
        super().__init__()
        self.kind, self.units, self.outputs = direction.kind, direction.units, direction.outputs
        self.reverse = direction.reverse


class GroupedDirection(_Replacing):
    """One direction of a recurrent layer with all gates' matrices as `GroupedRows`: inference on a CPU, in float32.

    Args:
        direction: of a GRU or an LSTM without a projection, whose weights and biases it takes.

    Raises:
        KernelError: an LSTM with a projection.

    >>> from lib.kernels import GroupedDirection
    >>> from lib.models import Direction
    >>> one, x, h = Direction("GRU", 4, 8), torch.rand(2, 5, 4), torch.zeros(2, 8)
    >>> torch.allclose(GroupedDirection(one)(x, (h,))[0], one(x, (h,))[0], atol=1e-6)
    True
    """

    format = "grouped rows"

    def __init__(self, direction: Direction) -> None:
        super().__init__(direction)
        if direction.hr is not None:
            raise KernelError("a recurrent layer with a projection: GRU and LSTM without one are allowed")
        gates = {part: direction.gates(part) for part in ("ih", "hh")}
        self.kept = {p: GroupedRows.of(torch.cat([gate.weight for gate in own])) for p, own in gates.items()}
        self.bias = {
            part: np.concatenate(
                [np.zeros(self.units) if g.bias is None else g.bias.detach().cpu().float().numpy() for g in own]
            ).astype(np.float32)
            for part, own in gates.items()
        }

    def forward(self, x: Tensor, state: tuple[Tensor, ...], mask: Tensor | None = None):
        """As `lib.models.Direction`, without a gradient.

        Raises:
            KernelError: other inputs than float32 numbers ``(N, T, C)`` on a CPU. Those that the mask keeps have to be
                finite, which is not looked at: compiled code takes that for granted.
        """
        size = self.kept["ih"].shape[1]
        check_inputs(x, x.ndim == 3 and x.shape[2] == size, f"(N, T, {size})")
        arrays = [(k.reorder, k.offset, k.stride, k.index, k.values) for k in self.kept.values()]
        last = [part.detach().clone(memory_format=torch.contiguous_format).numpy() for part in state]
        out = np.zeros((*x.shape[:2], self.units), np.float32)
        scratch = np.empty(max(size, 4 * self.units), np.float32)
        lengths = [x.shape[1]] * len(x) if mask is None else mask.sum(1).tolist()
        frames, none = x.detach().contiguous().numpy(), np.empty(0, np.float32)
        for n, length in enumerate(lengths):
            h, c = last[0][n], last[1][n] if self.kind == "LSTM" else none
            _sequence(frames[n, :length], self.reverse, *arrays, *self.bias.values(), h, c, scratch, out[n, :length])
        return torch.from_numpy(out), tuple(map(torch.from_numpy, last))


class TorchDirection(_Replacing):
    """One direction of a recurrent layer as torch's own module, which takes all gates in one dense product.

    >>> from lib.kernels.recurrent import TorchDirection
    >>> from lib.models import Direction
    >>> one, x, h = Direction("GRU", 4, 8, reverse=True), torch.rand(2, 5, 4), torch.zeros(2, 8)
    >>> mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    >>> torch.allclose(TorchDirection(one)(x, (h,), mask)[0], one(x, (h,), mask)[0], atol=1e-6)
    True
    """

    format = "dense, all gates"

    def __init__(self, direction: Direction) -> None:
        super().__init__(direction)
        gate = direction.gates("ih")[0]
        options = {"batch_first": True, "proj_size": direction.outputs if direction.hr is not None else 0}
        with torch.inference_mode(False):  # tensors made in that mode could not be used outside of it
            whole = Recurrent(self.kind, gate.in_features, self.units, bias=gate.bias is not None, **options)
            whole.layer1 = deepcopy(direction).requires_grad_(False)  # frozen in part or not: this is inference
            self.rnn = fused(whole).eval()

    def forward(self, x: Tensor, state: tuple[Tensor, ...], mask: Tensor | None = None):
        """As `lib.models.Direction`."""
        start = tuple(part.unsqueeze(0) for part in state)
        lengths = torch.full((len(x),), x.shape[1]) if mask is None else mask.sum(1).cpu()
        x = _turned(x, lengths) if self.reverse else x
        given = x if mask is None else pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, last = self.rnn(given, start if self.kind == "LSTM" else start[0])
        if mask is not None:
            out, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        last = last if self.kind == "LSTM" else (last,)
        return (_turned(out, lengths) if self.reverse else out), tuple(part.squeeze(0) for part in last)


def _turned(x: Tensor, lengths: Tensor) -> Tensor:
    """Frames of each sequence ``(N, T, C)`` from the last to the first; padding stays where it is."""
    t, ends = torch.arange(x.shape[1]), lengths[:, None]
    places = torch.where(t < ends, ends - 1 - t, t)
    return x.gather(1, places[..., None].expand_as(x).to(x.device))
