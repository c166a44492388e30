"""A physically smaller network that computes the same."""

from collections.abc import Iterator, Mapping

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.channels.paths import arriving, check_same, settle
from lib.channels.spaces import End, Space, groups_of, is_depthwise, spaces_of, trace
from lib.constraint import plain
from lib.models import copied
from lib.shapes import prunable


def _cuttable(spaces: list[Space], layers: Mapping[str, nn.Module], alive: list[Tensor]) -> list[Tensor]:
    """For each space the channels to keep: those alive, at least one filter a layer, alike on both sides of a tie.

    A depthwise convolution's filter and input channel are cut together or not at all; other grouped convolutions
    are not cut.
    """
    keep = [channels.clone() for channels in alive]
    for space, channels in zip(spaces, keep, strict=True):
        for end in space.writers:
            if not channels[end.channel].any():
                channels[end.channel[0]] = True
    tied = [name for name, layer in layers.items() if groups_of(layer) > 1]
    left = -1
    while left != (left := sum(int(channels.sum()) for channels in keep)):
        for name in tied:
            sides = list(_sides(spaces, keep, name))
            flags = torch.zeros(layers[name].in_channels, dtype=torch.bool, device=keep[0].device)
            for end, channels in sides if is_depthwise(layers[name]) else []:
                flags[end.index[channels[end.channel]]] = True
            for end, channels in sides:
                channels[end.channel[flags[end.index]] if is_depthwise(layers[name]) else end.channel] = True
    return keep


def _sides(spaces: list[Space], keep: list[Tensor], name: str) -> Iterator[tuple[End, Tensor]]:
    """The ends of a layer, each with its space's channels."""
    for space, channels in zip(spaces, keep, strict=True):
        for end in [*space.writers, *space.readers]:
            if end.name == name:
                yield end, channels


def compact(model: nn.Module, example: Tensor) -> nn.Module:
    """A physically smaller copy that computes the same: what is removed everywhere in its space is cut out.

    Cut are the channels that are dead and those that nobody reads, from all writers, batch norms and readers, to a
    fixed point; each layer keeps at least one filter. Not cut are filters that are removed in only some of the layers
    that a sum adds up, channels that a bias or a beta makes a nonzero constant at a reader (`follow` masks those),
    spaces with other norms than batch norms or with layers that are not known (`lib.shapes`), and grouped convolutions
    that are not depthwise.

    Args:
        model: masked, or with zeros in its weights. example: images ``(N, C, H, W)`` of the network's size.

    Returns:
        An ordinary network without masks, in the model's mode and memory format.

    Raises:
        ConstraintError: a layer is used twice or shares a tensor, or the smaller network does not run or gives other
            outputs, as for sizes written into ``forward``.

    >>> from lib import channels, models, pruning, recipes
    >>> from lib.constraint import attach_masks
    >>> model, image = models.build("lenet5", (1, 28, 28), 10), torch.rand(1, 1, 28, 28)
    >>> masks = recipes.one_shot(model, {"conv1": pruning.Filter(0.75)})
    >>> small = channels.compact(attach_masks(model, channels.follow(model, masks, image)), image)
    >>> small.conv1.out_channels, small.conv2.in_channels
    (5, 5)
    """
    bare = plain(model)
    layers, spaces = prunable(bare), spaces_of(trace(bare, example), example.device)
    nonzero = {name: layer.weight.detach() != 0 for name, layer in layers.items()}
    groups = {name: groups_of(layer) for name, layer in layers.items()}
    _, alive = settle(spaces, nonzero, groups, arriving(bare, spaces, example))
    small = copied(bare)
    _cut(small, spaces, _cuttable(spaces, layers, alive))
    trained = {name: parameter.requires_grad for name, parameter in bare.named_parameters()}
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(trained[name])  # frozen layers stay so
    if any(_channels_last(p) for p in bare.parameters()):
        small = small.to(memory_format=torch.channels_last)
    check_same(bare, small, example, "cutting out dead channels")
    return small


def _channels_last(parameter: Tensor) -> bool:
    last = parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return last and not parameter.is_contiguous()


@torch.no_grad()
def _cut(model: nn.Module, spaces: list[Space], keep: list[Tensor]) -> None:
    """Cut what is not kept out of every module, in place."""
    modules = dict(model.named_modules())
    gone: dict[tuple[str, bool], set[int]] = {}  # (module, is it an input side) -> entries
    for space, channels in zip(spaces, keep, strict=True):
        for ends, reading in ((space.writers, False), (space.norms, False), (space.readers, True)):
            for end in ends:
                gone.setdefault((end.name, reading), set()).update(end.index[~channels[end.channel]].tolist())
    for (name, reading), entries in gone.items():
        if entries and not (reading and groups_of(modules[name]) > 1):  # a depthwise one is cut as a writer
            _cutter(modules[name], reading)(modules[name], sorted(entries))


def _cutter(module: nn.Module, reading: bool):
    """torch-pruning's function that shortens one side of a module."""
    if isinstance(module, _BatchNorm):
        return tp.prune_batchnorm_out_channels
    if isinstance(module, nn.Linear):
        return tp.prune_linear_in_channels if reading else tp.prune_linear_out_channels
    if is_depthwise(module):
        return tp.prune_depthwise_conv_out_channels
    return tp.prune_conv_in_channels if reading else tp.prune_conv_out_channels
