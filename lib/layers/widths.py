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

from lib.data import Split
from lib.layers.gates import LayerError
from lib.models import BasicBlock
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
        """``(N, c)`` -> ``(N, F)``."""
        return F.linear(x, self.weight[:, : x.shape[1]], self.bias)


class SlimNorm(nn.Module):
    """A batch norm for each width, of as many channels as come in."""

    def __init__(self, norm: nn.BatchNorm2d, widths: int) -> None:
        super().__init__()
        self.norms, self.active = nn.ModuleList(deepcopy(norm) for _ in range(widths)), widths - 1

    def forward(self, x: Tensor) -> Tensor:
        """``(N, c, H, W)`` -> ``(N, c, H, W)``."""
        norm, c = self.norms[self.active], x.shape[1]
        if norm.training:
            norm.num_batches_tracked += 1
        means, variances, scale, shift = (t[:c] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
        return F.batch_norm(x, means, variances, scale, shift, norm.training, norm.momentum, norm.eps)


def slimmable(model: nn.Module, widths: Sequence[Width]) -> nn.Module:
    """Let a network run at several widths, from narrow to wide, in place; the last one is active.

    Args:
        widths: each a share of all channels, at least one a layer, or ``{layer: channels}``. Linear layers keep all of
            their outputs. Layers that residual sums add up must keep as many, which shares do.

    Raises:
        LayerError: no width, a share outside (0, 1], a layer that is no convolution, channels it does not have, or
            grouped convolutions.

    >>> from lib import models
    >>> from lib.layers import at_width, slimmable
    >>> net = slimmable(models.build("vgg", (1, 28, 28), 10, width=8), [0.25, {"conv3_1": 4}, 1.0])
    >>> with at_width(net, 0):
    ...     tuple(net.conv1_1(torch.zeros(1, 1, 28, 28)).shape)
    (1, 2, 28, 28)
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if not widths or any(m.groups > 1 for m in convs.values()):
        raise LayerError(f"widths = {list(widths)}: allowed are one or more, of convolutions without groups")
    for width in widths:
        _check_width(width, convs)
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.__class__ = SlimConv2d if isinstance(layer, nn.Conv2d) else SlimLinear
            layer.counts = tuple(_count(layer, name, width) for width in widths)
            layer.active = len(widths) - 1
        elif isinstance(layer, nn.BatchNorm2d):
            model.set_submodule(name, SlimNorm(layer, len(widths)).train(layer.training))
    return model


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
    slim = _slim(model)
    count = max((len(m.counts) for m in slim if not isinstance(m, SlimNorm)), default=0)
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

    >>> from lib import models
    >>> from lib.layers import sandwich, slimmable
    >>> net, x = slimmable(models.build("resnet8", (1, 8, 8), 10, width=4), [0.5, 1.0]), torch.rand(2, 1, 8, 8)
    >>> y, output = torch.tensor([1, 2]), net(x)
    >>> bool(sandwich(2)(net, x, y, output) > torch.nn.functional.cross_entropy(output, y))
    True
    """

    def objective(model: nn.Module, x: Tensor, y: Tensor, output: Tensor) -> Tensor:
        loss, teacher = F.cross_entropy(output, y), output.detach().softmax(1)
        between = [int(torch.randint(1, widths - 1, ()))] if widths > 2 else []
        for index in [*between, *([0] if widths > 1 else [])]:
            with at_width(model, index):
                loss = loss + F.kl_div(model(x).log_softmax(1), teacher, reduction="batchmean")
        return loss

    return objective


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
    small, met = deepcopy(model), {}
    handles = [
        m.register_forward_pre_hook(lambda _, args, m=m: met.update({m: args[0].shape[1]})) for m in _slim(small)
    ]
    with at_width(small, index), in_mode(small, training=False):
        small(next(small.parameters()).new_zeros(1, *shape))
    for handle in handles:
        handle.remove()
    for name, layer in [*small.named_modules()]:
        if isinstance(layer, SlimNorm):
            norm, c = layer.norms[index], met[layer]
            for part in ("weight", "bias"):
                setattr(norm, part, nn.Parameter(getattr(norm, part)[:c].clone()))
            norm.running_mean, norm.running_var = norm.running_mean[:c].clone(), norm.running_var[:c].clone()
            norm.num_features = c
            small.set_submodule(name, norm)
        elif isinstance(layer, SlimConv2d | SlimLinear):
            count, c = layer.counts[index], met[layer]
            layer.weight = nn.Parameter(layer.weight[:count, :c].clone())
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias[:count].clone())
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
    for block in _blocks(model).values():
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
    net, table = deepcopy(model), macs(model, shape).set_index("layer")["macs"]
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
