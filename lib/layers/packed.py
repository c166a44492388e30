"""A layer as the rows and columns of its matrix that keep a weight: what lies in arrays when whole lines are pruned."""

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from lib.constraint import plain
from lib.layers.gates import LayerError
from lib.models import replaced
from lib.shapes import KINDS, uses


class Packed(nn.Module):
    """A convolution or linear layer whose matrix has only those rows and filters that keep a weight.

    ``lines`` is the linear layer of these, without a bias; every vector of inputs goes through it. The output has the
    shape of the layer's, with its bias alone where a filter is gone.

    >>> from lib.layers import Packed
    >>> layer = torch.nn.Linear(4, 3)
    >>> layer.weight.data[1], layer.weight.data[:, 2:] = 0.0, 0.0
    >>> packed, x = Packed(layer), torch.rand(5, 4)
    >>> packed.lines, torch.allclose(packed(x), layer(x), atol=1e-6)
    (Linear(in_features=2, out_features=2, bias=False), True)
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        if layer.weight.dim() == 3 or getattr(layer, "groups", 1) > 1:
            raise LayerError(f"{layer} cannot be packed: allowed are linear layers and Conv2d without groups")
        if getattr(layer, "padding_mode", "zeros") != "zeros" or isinstance(getattr(layer, "padding", 0), str):
            raise LayerError(f"{layer} cannot be packed: padding is zeros, as many as numbers say")
        matrix = layer.weight.detach().flatten(1)
        self.register_buffer("rows", _alive(matrix.any(0)))
        self.register_buffer("filters", _alive(matrix.any(1)))
        self.size, self.bias = len(matrix), layer.bias
        self.windows = None
        if isinstance(layer, nn.Conv2d):
            names = ("kernel_size", "dilation", "padding", "stride")
            self.windows = tuple(getattr(layer, name) for name in names)
        self.lines = nn.Linear(len(self.rows), len(self.filters), bias=False, device=matrix.device, dtype=matrix.dtype)
        self.lines.weight.data.copy_(matrix[self.filters][:, self.rows])
        self.lines.weight.requires_grad_(layer.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes."""
        vectors = x if self.windows is None else unfold(x, *self.windows).transpose(1, 2)  # (..., rows)
        y = self.lines(vectors[..., self.rows])
        y = y.new_zeros(*y.shape[:-1], self.size).index_copy(-1, self.filters, y)
        y = y if self.bias is None else y + self.bias
        if self.windows is None:
            return y
        sides = zip(x.shape[2:], *self.windows, strict=True)
        return y.transpose(1, 2).unflatten(2, [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in sides])


def _alive(there: Tensor) -> Tensor:
    """Where something is; the first place of all where nothing is, as no matrix is empty."""
    return there.nonzero().flatten() if there.any() else torch.zeros(1, dtype=torch.long, device=there.device)


def packed(model: nn.Module) -> nn.Module:
    """A copy of the network with every layer `Packed`, its matrices as they lie in arrays without their empty lines.

    What counts rows one after another, such as fragments of rows with one sign, then counts those that lie there. In
    the copy a layer is called ``<name>.lines``; it computes what the network does, up to rounding.

    Raises:
        LayerError: a layer that cannot be packed: with groups, along one dimension, padded by a word, whose weights
            others share, or that does more than its class, by a hook, say.

    >>> from lib import models
    >>> from lib.layers import packed
    >>> from lib.shapes import layer_shapes
    >>> net = models.build("lenet5", (1, 28, 28), 10)
    >>> net.conv2.weight.data[:, 5:] = 0.0  # of 20 channels
    >>> layer_shapes(packed(net), (1, 28, 28))[["layer", "rows", "filters", "vectors"]].values.tolist()[1]
    ['conv2.lines', 125, 50, 64]
    """
    result = plain(model)
    layers = {name: modules[0] for name, modules in uses(result).items()}
    return replaced(result, layers, lambda _, layer: Packed(layer), *KINDS, error=LayerError)
