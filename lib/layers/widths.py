"""One set of weights, several networks: the first channels of every layer, with batch norms of their own.

Slimmable networks (Yu et al., ICLR 2019) share weights among widths; a width is a multiplier for all layers, or a
number of channels for each (non-uniform subnets, Yang et al., DAC 2020). On arrays of cells the columns of channels
that are left out are switched off. How many each layer can spare is chosen on data, one step after the other (AutoSlim,
Yu and Huang, arXiv 1903.11728).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lib.constraint import masks
from lib.data import Split
from lib.layers.gates import LayerError
from lib.models import BasicBlock, PaddedShortcut, copied
from lib.shapes import in_mode, macs
from lib.training import Objective

Width = float | Mapping[str, int]
"""A share of every layer's channels, or the channels of some layers, all others whole."""


class SlimConv2d(nn.Conv2d):
    """A convolution of which the first ``counts[active]`` filters run, on as many channels as come in."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, c, H, W)`` -> ``(N, counts[active], H', W')``."""
        count = self.counts[self.active]
        bias = None if self.bias is None else self.bias[:count]
        weight = self.weight[:count, : x.shape[1]]
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)


class SlimLinear(nn.Linear):
    """A linear layer that takes as many inputs as come in; all its outputs run."""

    counts: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """``(..., c)`` -> ``(..., F)``."""
        return F.linear(x, self.weight[:, : x.shape[-1]], self.bias)


class SlimNorm(nn.Module):
    """A batch norm for each width, of as many channels as come in."""

    def __init__(self, norm: nn.BatchNorm2d, widths: int) -> None:
        super().__init__()
        self.norms, self.active = nn.ModuleList(deepcopy(norm) for _ in range(widths)), widths - 1

    def forward(self, x: Tensor) -> Tensor:
        """``(N, c, H, W)`` -> ``(N, c, H, W)``."""
        norm, c = self.norms[self.active], x.shape[1]
        momentum = norm.momentum
        if norm.training:
            norm.num_batches_tracked += 1
            if momentum is None:
                momentum = 1 / float(norm.num_batches_tracked)  # the plain average, as in torch's own
        means, variances, scale, shift = (t[:c] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
        return F.batch_norm(x, means, variances, scale, shift, norm.training, momentum or 0.0, norm.eps)


def slimmable(model: nn.Module, widths: Sequence[Width]) -> nn.Module:
    """Let a network run at several widths, from narrow to wide, in place; the last one is active.

    Args:
        widths: each a share of all channels, at least one a layer, or ``{layer: channels}``. Linear layers keep all of
            their outputs. Layers that residual sums add up must keep as many, which shares do.

    Raises:
        LayerError: no width, a share outside (0, 1], a layer that is no convolution, channels it does not have;
            modules with weights other than the three that are known (so grouped or masked convolutions, and networks
            that are slimmable already); shares of a network with `lib.models.PaddedShortcut`. Nothing is changed then.

    >>> from lib import models
    >>> from lib.layers import at_width, slimmable
    >>> net = slimmable(models.build("vgg", (1, 28, 28), 10, width=8), [0.25, {"conv3_1": 4}, 1.0])
    >>> with at_width(net, 0):
    ...     tuple(net.conv1_1(torch.zeros(1, 1, 28, 28)).shape)
    (1, 2, 28, 28)
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if not widths:
        raise LayerError(f"widths = {list(widths)}: allowed are one or more")
    if unknown := [f"{name} ({type(m).__name__})" for name, m in model.named_modules() if not _known(m)]:
        raise LayerError(
            f"slimmable: {', '.join(unknown)}; allowed are plain Conv2d without groups and padded with zeros, "
            "Linear, and BatchNorm2d with scales and statistics, none masked (lib.constraint.plain) or slimmable yet"
        )
    for width in widths:
        _check_width(width, convs)
    padded = [name for name, m in model.named_modules() if isinstance(m, PaddedShortcut)]
    if padded and any(not isinstance(width, Mapping) and width < 1 for width in widths):
        raise LayerError(
            f"slimmable: {padded[0]} adds a fixed number of channels, which no share fits (PaddedShortcut)"
        )
    norms = {}
    for name, layer in [*model.named_modules(remove_duplicate=False)]:  # what stands in two places stays one
        if type(layer) in (nn.Conv2d, nn.Linear):
            layer.__class__ = SlimConv2d if isinstance(layer, nn.Conv2d) else SlimLinear
            layer.counts = tuple(_count(layer, name, width) for width in widths)
            layer.active = len(widths) - 1
        elif isinstance(layer, nn.BatchNorm2d):
            if layer not in norms:
                norms[layer] = SlimNorm(layer, len(widths)).train(layer.training)
            model.set_submodule(name, norms[layer])
    return model


def _known(layer: nn.Module) -> bool:
    """Whether a module has no weights of channels, or is one whose first channels alone can run."""
    if type(layer) is nn.BatchNorm2d:
        return layer.affine and layer.running_mean is not None
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and "weight" in layer._parameters
    if type(layer) is nn.Linear:
        return "weight" in layer._parameters
    other = isinstance(layer, nn.Conv2d | nn.Linear | _BatchNorm)  # a subclass, or masked
    return not other and all(p.numel() == 1 for p in layer.parameters(recurse=False))


def _check_width(width: Width, convs: Mapping[str, nn.Conv2d]) -> None:
    if not isinstance(width, Mapping):
        if not 0 < width <= 1:
            raise LayerError(f"width = {width}: allowed are shares in (0, 1]")
        return
    for name, count in width.items():
        if name not in convs or not 1 <= count <= convs[name].out_channels:
            has = f"1 to {convs[name].out_channels} channels" if name in convs else f"layers {', '.join(convs)}"
            raise LayerError(f"width {name!r}: {count}; allowed are {has}")


def _count(layer: nn.Module, name: str, width: Width) -> int:
    whole = len(layer.weight)
    if isinstance(layer, nn.Linear):
        return whole
    return width.get(name, whole) if isinstance(width, Mapping) else max(1, round(width * whole))


def _slim(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, SlimConv2d | SlimLinear | SlimNorm)]


def _widths(model: nn.Module) -> int:
    return max((len(m.counts) for m in _slim(model) if not isinstance(m, SlimNorm)), default=0)


@contextmanager
def at_width(model: nn.Module, index: int) -> Iterator[nn.Module]:
    """Within, the network runs at its width of this number.

    Raises:
        LayerError: a network that is not slimmable, or has no such width.

    >>> from lib import models
    >>> from lib.layers import at_width, slimmable
    >>> net, x = slimmable(models.build("resnet8", (1, 8, 8), 10, width=4), [0.5, 1.0]).eval(), torch.rand(2, 1, 8, 8)
    >>> with at_width(net, 1):
    ...     wide = net(x)
    >>> torch.equal(wide, net(x))
    True
    """
    slim, count = _slim(model), _widths(model)
    if not 0 <= index < count:
        raise LayerError(f"width {index}: the network has {count}; allowed are 0 to {count - 1}")
    before = [m.active for m in slim]
    try:
        for m in slim:
            m.active = index
        yield model
    finally:
        for m, active in zip(slim, before, strict=True):
            m.active = active


def sandwich(widths: int) -> Objective:
    """An objective for `lib.training.fit`: the widest learns from the labels, narrower ones from the widest.

    Each batch runs at the widest, at the narrowest and at a random width between; the narrower have the
    Kullback-Leibler divergence from the widest's softmax as their loss (sandwich rule, in-place distillation: Yu and
    Huang, ICCV 2019).

    Raises:
        LayerError: in training, a network of another number of widths.

    >>> from lib import models
    >>> from lib.layers import sandwich, slimmable
    >>> net, x = slimmable(models.build("resnet8", (1, 8, 8), 10, width=4), [0.5, 1.0]), torch.rand(2, 1, 8, 8)
    >>> y, output = torch.tensor([1, 2]), net(x)
    >>> bool(sandwich(2)(net, x, y, output) > torch.nn.functional.cross_entropy(output, y))
    True
    """

    def objective(model: nn.Module, x: Tensor, y: Tensor, output: Tensor) -> Tensor:
        if widths != _widths(model):
            raise LayerError(f"sandwich({widths}): the network has {_widths(model)} widths; give their number")
        loss, teacher = F.cross_entropy(output, y), output.detach().softmax(1)
        between = [int(torch.randint(1, widths - 1, ()))] if widths > 2 else []
        for index in [*between, *([0] if widths > 1 else [])]:
            with at_width(model, index):
                loss = loss + F.kl_div(model(x).log_softmax(1), teacher, reduction="batchmean")
        return loss

    return objective


def _part(parameter: nn.Parameter, place: slice | tuple[slice, ...]) -> nn.Parameter:
    """A part of a parameter as one of its own, trained if the whole is."""
    return nn.Parameter(parameter[place].clone(), parameter.requires_grad)


@torch.no_grad()
def cut_to(model: nn.Module, index: int, shape: tuple[int, ...]) -> nn.Module:
    """The network of one width on its own, with ordinary layers: what arrays hold, and what a clock measures.

    Args:
        shape: of one image.

    Raises:
        LayerError: as `at_width`.

    >>> from lib import models
    >>> from lib.layers import cut_to, slimmable
    >>> net = slimmable(models.build("resnet8", (1, 8, 8), 10, width=4), [0.5, 1.0])
    >>> cut_to(net, 0, (1, 8, 8)).block3_1.conv2
    Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    small, met = copied(model), {}
    handles = [
        m.register_forward_pre_hook(
            lambda _, x, m=m: met.update({m: x[0].shape[-1 if isinstance(m, SlimLinear) else 1]})
        )
        for m in _slim(small)
    ]
    with at_width(small, index), in_mode(small, training=False):
        small(next(small.parameters()).new_zeros(1, *shape))
    for handle in handles:
        handle.remove()
    for name, layer in [*small.named_modules()]:
        if isinstance(layer, SlimNorm):
            norm, c = layer.norms[index], met[layer]
            for part in ("weight", "bias"):
                setattr(norm, part, _part(getattr(norm, part), slice(c)))
            norm.running_mean, norm.running_var = norm.running_mean[:c].clone(), norm.running_var[:c].clone()
            norm.num_features = c
            small.set_submodule(name, norm)
        elif isinstance(layer, SlimConv2d | SlimLinear):
            count, c = layer.counts[index], met[layer]
            layer.weight = _part(layer.weight, (slice(count), slice(c)))
            if layer.bias is not None:
                layer.bias = _part(layer.bias, slice(count))
            if isinstance(layer, SlimConv2d):
                layer.__class__, layer.out_channels, layer.in_channels = nn.Conv2d, count, c
            else:
                layer.__class__, layer.in_features = nn.Linear, c
            del layer.counts, layer.active
    return small


def _blocks(model: nn.Module) -> dict[str, BasicBlock]:
    return {name: m for name, m in model.named_modules() if name and isinstance(m, BasicBlock)}


@torch.no_grad()
def ordered(model: nn.Module) -> nn.Module:
    """Sort the channels between each residual block's convolutions, in place: what gives most comes first.

    Channel ``c`` gives ``|gamma_c| * ||W2[:, c]||``, the scale of its norm times the weights that read it. The network
    computes what it did, and its first channels are those to keep.

    Raises:
        LayerError: a masked network, as masks would stay where they are; a block whose weights cannot be written.

    >>> from lib import models
    >>> from lib.layers import ordered
    >>> net, x = models.build("resnet8", (1, 8, 8), 10, width=4).eval(), torch.rand(2, 1, 8, 8)
    >>> y = net(x)
    >>> bool(torch.allclose(ordered(net)(x), y, atol=1e-5))
    True
    >>> reads = torch.linalg.vector_norm(net.block1_1.conv2.weight, dim=(0, 2, 3))  # the scales are still 1
    >>> bool((reads.diff() <= 0).all())
    True
    """
    blocks = _blocks(model).values()
    if masks(model) or any("weight" not in m._parameters for b in blocks for m in (b.conv1, b.bn1, b.conv2)):
        raise LayerError("ordered: the network is masked, or something else makes its weights; give it before that, or "
                         "lib.constraint.plain(model)")  # fmt: skip
    for block in blocks:
        gives = block.bn1.weight.abs() * torch.linalg.vector_norm(block.conv2.weight, dim=(0, 2, 3))  # (C,)
        order = gives.argsort(descending=True)
        for tensor in (block.conv1.weight, *block.bn1.parameters(), block.bn1.running_mean, block.bn1.running_var):
            tensor.copy_(tensor[order])
        block.conv2.weight.copy_(block.conv2.weight[:, order])
    return model


@torch.no_grad()
def uneven(
    model: nn.Module, split: Split, shape: tuple[int, ...], budgets: Sequence[float], steps: int = 8
) -> list[dict[str, int]]:
    """How many channels each residual block keeps between its convolutions, for `slimmable`.

    Greedy: again and again one block loses its last channels, a ``steps``-th of them, where the loss on ``split`` rises
    least for a multiply-accumulate that is saved, until the network takes no more than each budget. Sort channels
    first (`ordered`); choose on validation images.

    Args:
        shape: of one image. budgets: multiply-accumulates of an image, falling.

    Returns:
        By budget ``{layer: channels}``; a narrower network is a part of the wider ones.

    Raises:
        LayerError: budgets that do not fall, or one below what a ``steps``-th of the channels of all blocks takes.

    >>> from lib import models
    >>> from lib.data import Split
    >>> from lib.layers import uneven
    >>> net = models.build("resnet8", (1, 8, 8), 10, width=8)  # 193,344 multiply-accumulates
    >>> split = Split(torch.rand(20, 1, 8, 8), torch.arange(20) % 10)
    >>> wide, narrow = uneven(net, split, (1, 8, 8), [150000, 60000])
    >>> list(narrow), all(narrow[layer] <= wide[layer] for layer in wide)
    (['block1_1.conv1', 'block2_1.conv1', 'block3_1.conv1'], True)
    """
    net, table = copied(model), macs(model, shape).set_index("layer")["macs"]
    blocks = _blocks(net)
    kept = {name: block.conv1.out_channels for name, block in blocks.items()}
    part = {name: max(1, count // steps) for name, count in kept.items()}
    price = {name: (table[f"{name}.conv1"] + table[f"{name}.conv2"]) / count for name, count in kept.items()}
    work, found = float(table.sum()), []
    least = work - sum((kept[name] - part[name]) * price[name] for name in blocks)
    if list(budgets) != sorted(set(budgets), reverse=True) or not budgets or budgets[-1] < least:
        raise LayerError(f"budgets = {list(budgets)}: allowed are falling numbers of at least {least:g}")

    def loss_without(name: str) -> float:
        norm, rest = blocks[name].bn1, slice(kept[name] - part[name], kept[name])
        saved = norm.weight[rest].clone(), norm.bias[rest].clone()
        norm.weight[rest], norm.bias[rest] = 0.0, 0.0  # a channel of zeros gives nothing
        loss = float(split.task.loss(net(split.x), split.y))
        norm.weight[rest], norm.bias[rest] = saved
        return loss

    with in_mode(net, training=False):
        for budget in budgets:
            while work > budget:
                before = float(split.task.loss(net(split.x), split.y))
                rises = {n: (loss_without(n) - before) / (part[n] * price[n]) for n in blocks if kept[n] > part[n]}
                name = min(rises, key=rises.get)
                kept[name] -= part[name]
                work -= part[name] * price[name]
                for tensor in blocks[name].bn1.parameters():
                    tensor[kept[name] :] = 0.0
            found.append({f"{name}.conv1": count for name, count in kept.items()})
    return found
