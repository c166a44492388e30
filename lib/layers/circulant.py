"""Layers of block-circulant weights, trained by first columns, computed by Fourier transforms (CirCNN, MICRO 2017)."""

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.constraint import Plan, plain, weights
from lib.layers.gates import LayerError
from lib.models import as_built
from lib.shapes import prunable, uses
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
        """Transforms of the first columns, as the product takes them; made once where no gradient is asked for."""
        if torch.is_grad_enabled() or self.columns.is_inference():  # the latter count no changes
            return self._arranged(torch.fft.rfft(self.columns, dim=2))
        bits = self.columns.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[self.columns.element_size()])
        made_of = (self.columns.data_ptr(), self.columns._version, int(bits.sum()))  # `.data` leaves the others as are
        if self._kept is None or self._kept[0] != made_of:
            self._kept = made_of, self._arranged(torch.fft.rfft(self.columns, dim=2))
        return self._kept[1]

    def __getstate__(self) -> dict:
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
        product = torch.fft.rfft(parts).permute(2, 0, 1) @ self.spectrum()  # (frequencies, N, R)
        out = torch.fft.irfft(product.permute(1, 2, 0), n=k).flatten(1)[:, :outputs]
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
        spectrum = torch.fft.rfft(parts, dim=2).transpose(1, 2)  # (N, frequencies, S, H, W)
        groups = spectrum.shape[1]
        product = F.conv2d(
            spectrum.flatten(1, 2), self.spectrum(), None, self.stride, self.padding, self.dilation, groups
        )
        product = product.unflatten(1, (groups, -1)).transpose(1, 2)  # (N, R, frequencies, H', W')
        out = torch.fft.irfft(product, n=k, dim=2).flatten(1, 2)[:, :outputs]
        return out if self.bias is None else out + self.bias[:, None, None]

    def dense(self) -> nn.Conv2d:
        """The same as a dense layer."""
        filters, channels, *kernel = self.shape
        options = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return _filled(nn.Conv2d(channels, filters, kernel, bias=self.bias is not None, **options), self)


@torch.no_grad()
def _filled(layer: nn.Module, circulant: _Circulant) -> nn.Module:
    layer.weight.copy_(circulant.weight())
    layer.weight.requires_grad_(circulant.columns.requires_grad)
    if layer.bias is not None:
        layer.bias.copy_(circulant.bias).requires_grad_(circulant.bias.requires_grad)
    return layer.to(circulant.columns.device, circulant.columns.dtype)


def circulant(model: nn.Module, plan: Plan, fresh: bool = False) -> nn.Module:
    """A copy of the network whose planned layers are computed by transforms, and trained by first columns.

    Args:
        plan: `BlockCirculant` sets, onto which weights are projected. fresh: draw first columns anew.

    Raises:
        LayerError: another set, a layer that has no such form, has hooks, or shares its weight with another.

    >>> from lib.layers import circulant
    >>> from lib.sharing import BlockCirculant
    >>> net = circulant(torch.nn.Sequential(torch.nn.Linear(16, 8)), {"0": BlockCirculant(4)})
    >>> tuple(net[0].columns.shape)
    (2, 4, 4)
    """
    result = plain(model)
    layers = prunable(result)
    weights(result, plan)  # says what is wrong with the plan
    made = {}
    for name, constraint in plan.items():
        kind = {nn.Linear: CirculantLinear, nn.Conv2d: CirculantConv2d}.get(type(layers[name]))
        if kind is None or not isinstance(constraint, BlockCirculant):
            raise LayerError(f"{name}: {type(constraint).__name__} on {type(layers[name]).__name__} has no transform")
        if not as_built(layers[name], type(layers[name])) or len(uses(result)[name]) > 1:
            raise LayerError(f"{name}: it has hooks, or shares its weight with another layer, and would lose these")
        made[id(layers[name])] = layer = kind(layers[name], constraint.k)
        if fresh:
            layer.reset_parameters()
    return _with(result, made)


def _with(model: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Others in the place of some modules, by id, wherever these stand."""
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if id(module) in made:
            model.set_submodule(name, made[id(module)])
    return model


def as_dense(model: nn.Module) -> nn.Module:
    """A copy of the network with circulant layers as dense ones, which faults, arrays and accounts speak of.

    >>> from lib.layers import circulant, as_dense
    >>> from lib.sharing import BlockCirculant
    >>> net, plan = torch.nn.Sequential(torch.nn.Linear(16, 8)), {"0": BlockCirculant(4)}
    >>> plan["0"].member(as_dense(circulant(net, plan))[0].weight, 1e-6)
    True
    """
    result = plain(model)
    return _with(result, {id(layer): layer.dense() for layer in result.modules() if isinstance(layer, _Circulant)})
