"""Layers of block-circulant weights, trained by first columns, computed by Fourier transforms (CirCNN, MICRO 2017)."""

from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.constraint import Plan, plain, weights
from lib.constraint.views import wide
from lib.layers.gates import LayerError
from lib.models import replaced
from lib.shapes import KINDS, prunable
from lib.sharing import BlockCirculant


class _Circulant(nn.Module):
    """First columns of the blocks of a weight, ``(R, S, k, ...)``, and its bias, taken from a layer."""

    def __init__(self, layer: nn.Module, k: int) -> None:
        super().__init__()
        self.blocks, self.shape = BlockCirculant(k), layer.weight.shape
        self.columns = nn.Parameter(self.blocks.columns(layer.weight.detach()), layer.weight.requires_grad)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        self._kept: tuple | None = None

    def reset_parameters(self) -> None:
        """Draw first columns as a dense layer draws its weights: by the inputs that an output has."""
        bound = 1 / sqrt(self.shape[1:].numel())
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def weight(self) -> Tensor:
        """The dense weight."""
        return self.blocks.weight(self.columns, self.shape)

    def spectrum(self) -> Tensor:
        """Transforms of the first columns, as the product takes them; on a CPU made once, without a gradient.

        Kept with the values that they are of: what is written through ``.data`` counts no version.
        """
        columns = wide(self.columns)
        if torch.is_grad_enabled() or columns.device.type != "cpu":
            return self._arranged(torch.fft.rfft(columns, dim=2))
        now = columns.detach().numpy()
        if self._kept is None or self._kept[0].dtype != now.dtype or not np.array_equal(self._kept[0], now):
            self._kept = now.copy(), self._arranged(torch.fft.rfft(columns, dim=2))
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and saved: all but the transforms."""
        return self.__dict__ | {"_kept": None}


class CirculantLinear(_Circulant):
    """A linear layer of circulant blocks: ``y_r = IFFT(sum_s FFT(c_rs) FFT(x_s))``.

    Its parameter is no dense weight, so that whatever speaks of layers refuses it by name; `as_dense` makes it one.

    Args:
        layer: whose weight is projected, and whose bias it takes. k: side of a block.

    >>> from lib.layers import CirculantLinear
    >>> layer = CirculantLinear(torch.nn.Linear(10, 6), k=4)
    >>> x = torch.rand(5, 10)
    >>> torch.allclose(layer(x), x @ layer.weight().T + layer.bias, atol=1e-6)
    True
    """

    @staticmethod
    def _arranged(spectrum: Tensor) -> Tensor:
        return spectrum.permute(2, 1, 0).contiguous()  # (frequencies, S, R)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` -> ``(..., F)``."""
        k, (outputs, inputs) = self.blocks.k, self.shape
        parts = F.pad(x.reshape(-1, inputs), (0, -inputs % k)).unflatten(1, (-1, k))  # (N, S, k)
        product = torch.fft.rfft(wide(parts)).permute(2, 0, 1) @ self.spectrum()  # (frequencies, N, R)
        out = torch.fft.irfft(product.permute(1, 2, 0), n=k).flatten(1)[:, :outputs].to(x.dtype)
        return (out if self.bias is None else out + self.bias).reshape(*x.shape[:-1], outputs)

    def dense(self) -> nn.Linear:
        """The same as a dense layer."""
        layer = nn.Linear(*reversed(self.shape), bias=self.bias is not None)
        return _filled(layer, self)


class CirculantConv2d(_Circulant):
    """A convolution with circulant blocks between filters and channels, at every position of its kernel.

    Each frequency is a convolution of its own between blocks of channels and blocks of filters.

    Raises:
        LayerError: channels in groups, or padding that is no zeros.

    >>> from lib.layers import CirculantConv2d
    >>> layer, x = CirculantConv2d(torch.nn.Conv2d(6, 10, 3, padding=1), k=4), torch.rand(2, 6, 9, 9)
    >>> torch.allclose(layer(x), torch.nn.functional.conv2d(x, layer.weight(), layer.bias, padding=1), atol=1e-6)
    True
    """

    def __init__(self, layer: nn.Conv2d, k: int) -> None:
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise LayerError(f"groups = {layer.groups}, {layer.padding_mode}: one group padded with zeros is known")
        super().__init__(layer, k)
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation

    @staticmethod
    def _arranged(spectrum: Tensor) -> Tensor:
        return spectrum.permute(2, 0, 1, 3, 4).flatten(0, 1)  # (frequencies * R, S, Kh, Kw)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` -> ``(N, F, H', W')``."""
        k, (outputs, inputs) = self.blocks.k, self.shape[:2]
        parts = F.pad(x, (0, 0, 0, 0, 0, -inputs % k)).unflatten(1, (-1, k))  # (N, S, k, H, W)
        spectrum = torch.fft.rfft(wide(parts), dim=2).transpose(1, 2)  # (N, frequencies, S, H, W)
        groups = spectrum.shape[1]
        product = F.conv2d(
            spectrum.flatten(1, 2), self.spectrum(), None, self.stride, self.padding, self.dilation, groups
        )
        product = product.unflatten(1, (groups, -1)).transpose(1, 2)  # (N, R, frequencies, H', W')
        out = torch.fft.irfft(product, n=k, dim=2).flatten(1, 2)[:, :outputs].to(x.dtype)
        return out if self.bias is None else out + self.bias[:, None, None]

    def dense(self) -> nn.Conv2d:
        """The same as a dense layer."""
        filters, channels, *kernel = self.shape
        options = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return _filled(nn.Conv2d(channels, filters, kernel, bias=self.bias is not None, **options), self)


@torch.no_grad()
def _filled(layer: nn.Module, circulant: _Circulant) -> nn.Module:
    layer.weight.copy_(circulant.weight()).requires_grad_(circulant.columns.requires_grad)
    if layer.bias is not None:
        layer.bias.copy_(circulant.bias).requires_grad_(circulant.bias.requires_grad)
    return layer.to(circulant.columns.device, circulant.columns.dtype)


def circulant(model: nn.Module, plan: Plan, fresh: bool = False) -> nn.Module:
    """A copy of the network whose planned layers are computed by transforms, and trained by first columns.

    Args:
        plan: `BlockCirculant` sets, onto which weights are projected. fresh: draw first columns anew.

    Raises:
        LayerError: another set, a layer that has no such form, that shares its weight with another module, or that has
            a hook.

    >>> from lib.layers import circulant
    >>> from lib.sharing import BlockCirculant
    >>> net = circulant(torch.nn.Sequential(torch.nn.Linear(16, 8)), {"0": BlockCirculant(4)})
    >>> tuple(net[0].columns.shape)
    (2, 4, 4)
    """
    result = plain(model)
    layers = prunable(result)
    weights(result, plan)  # says what is wrong with the plan

    def convert(name: str, dense: nn.Module) -> nn.Module:
        kind = {nn.Linear: CirculantLinear, nn.Conv2d: CirculantConv2d}.get(type(dense))
        if kind is None or not isinstance(plan[name], BlockCirculant):
            raise LayerError(f"{name}: {type(plan[name]).__name__} on {type(dense).__name__} has no transform")
        layer = kind(dense, plan[name].k)
        if fresh:
            layer.reset_parameters()
        return layer

    return replaced(result, {name: layers[name] for name in plan}, convert, *KINDS, error=LayerError)


def as_dense(model: nn.Module) -> nn.Module:
    """A copy of the network with circulant layers as dense ones, which faults, arrays and accounts speak of.

    Raises:
        LayerError: a circulant layer that shares its columns with another, or that has a hook.

    >>> from lib.layers import circulant, as_dense
    >>> from lib.sharing import BlockCirculant
    >>> net, plan = torch.nn.Sequential(torch.nn.Linear(16, 8)), {"0": BlockCirculant(4)}
    >>> plan["0"].member(as_dense(circulant(net, plan))[0].weight, 1e-6)
    True
    """
    result = plain(model)
    found = {name: layer for name, layer in result.named_modules() if isinstance(layer, _Circulant)}
    kinds = CirculantLinear, CirculantConv2d
    return replaced(result, found, lambda _, layer: layer.dense(), *kinds, error=LayerError)
