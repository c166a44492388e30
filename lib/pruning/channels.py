"""Network level: what a removed filter takes with it.

A *space* is the set of layers that write the same channels (several where residual sums add them up), the batch norms
on the way and the layers that read them. A filter that is removed takes its bias and batch norm along; a channel that
nobody writes, or nobody reads, takes its readers' input columns or its writers' filters along, and so on through the
network (unused-path removal, papers/pruning.md sections A.4 and 7). torch-pruning traces which layers share channels.

A channel is *dead* when no writer has a weight left for it and it arrives as zero at every reader. A bias, a beta or
a sigmoid on the way that makes a constant of it keeps it alive: dropping a constant would change the outputs.
"""

import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.constraint import ConstraintError, Masks, Plan, detach_masks
from lib.models import prunable
from lib.pruning.groups import Filter

# Operations that hand channels on; a space with any other (a layer norm, attention, a bare parameter) is left alone.
PASSING = {"CONV", "LINEAR", "BN", "ELEMENTWISE", "CONCAT", "SPLIT", "RESHAPE", "UNBIND", "EXPAND", "SLICE", "OUTPUT"}


class End(NamedTuple):
    """Where a space meets a module: its filter, input channel or norm entry ``index[i]`` is the channel ``channel[i]``.

    Both are ``(n,)``. One channel meets ``H*W`` columns of a linear layer behind a flattened map.
    """

    name: str
    index: Tensor
    channel: Tensor

    def write(self, alive: Tensor, flags: Tensor) -> None:
        """Clear in the module's ``flags`` (entries,) what is not ``alive`` (channels,)."""
        flags[self.index[~alive[self.channel]]] = False


class Space(NamedTuple):
    """Channels that are written together: see the module's first paragraph."""

    size: int
    writers: list[End]
    readers: list[End]
    norms: list[End]
    output: bool  # the network's output reads it: never cut
    frozen: bool  # holds an operation that is not understood: never cut

    def gather(self, ends: list[End], flags: Mapping[str, Tensor]) -> Tensor:
        """The channels (size,) that any of the ends' flags set."""
        found = torch.zeros(self.size, dtype=torch.bool, device=self.writers[0].index.device)
        for end in ends:
            found[end.channel[flags[end.name][end.index]]] = True
        return found


def _groups(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


def _depthwise(layer: nn.Module) -> bool:
    """Whether input channel ``c`` is all that filter ``c`` reads, so that the two go together."""
    return _groups(layer) > 1 and layer.groups == layer.in_channels == layer.out_channels


def _ungrouped(conv: nn.Conv2d) -> nn.Conv2d:
    """A stand-in without groups, for tracing only: what it reads and what it writes are then different spaces."""
    sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    stand_in = nn.Conv2d(*sizes, bias=conv.bias is not None, device="meta")
    stand_in.weight = nn.Parameter(conv.weight.new_zeros(()).expand(stand_in.weight.shape))  # takes no memory
    stand_in.bias = conv.bias
    return stand_in


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _graph(model: nn.Module, example: Tensor) -> tp.DependencyGraph:
    """torch-pruning's dependency graph of an ordinary copy of the model."""
    plain = detach_masks(deepcopy(model)).requires_grad_(True)
    for name, layer in prunable(plain).items():
        if _groups(layer) > 1:
            plain.set_submodule(name, _ungrouped(layer))
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside known layers: their spaces are frozen
        try:
            return tp.DependencyGraph().build_dependency(plain, (example,))
        except Exception as error:
            raise ConstraintError(f"torch-pruning cannot trace this model: {_line(error)}") from error


def _spaces(graph: tp.DependencyGraph, device: torch.device) -> list[Space]:
    """The spaces of a traced model that a convolution or linear layer writes."""
    names = {module: name for name, module in graph.model.named_modules()}
    layers = prunable(graph.model)
    found = []
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        writers, readers, norms, output, frozen = [], [], [], False, False
        for item in group.items:
            node, module = item.dep.target, item.dep.target.module
            name = names.get(module) if isinstance(module, nn.Module) else None
            index, channel = (torch.tensor(i, device=device) for i in (item.idxs, item.root_idxs))
            outgoing = graph.is_out_channel_pruning_fn(item.dep.handler)
            if name in layers:
                (writers if outgoing else readers).append(End(name, index, channel))
            elif node.type.name == "BN":
                norms.append(End(name, index, channel))
            frozen |= node.type.name not in PASSING or (node.type.name == "CONV" and name not in layers)
            output |= node.type.name == "OUTPUT" or (outgoing and not node.outputs)
        size = len(group[0].idxs)
        found.append(Space(size, writers, readers, norms, output or not readers, frozen))
    return found


def _own_norms(graph: tp.DependencyGraph) -> dict[str, list[str]]:
    """For each layer: the batch norms that its output goes to directly and alone."""
    names = {module: name for name, module in graph.model.named_modules()}
    own = {}
    for name, layer in prunable(graph.model).items():
        node = graph.module2node.get(layer)
        after = node.outputs if node else []
        own[name] = [names[o.module] for o in after if isinstance(o.module, _BatchNorm) and len(o.inputs) == 1]
    return own


@torch.no_grad()
def _arriving(model: nn.Module, spaces: list[Space], example: Tensor) -> list[Tensor]:
    """For each space: the channels (size,) that are not zero at every reader when the model sees the example.

    Raises:
        ConstraintError: a layer is used twice, so that its filters belong to several spaces at once.
    """
    seen: set[str] = set()
    model = deepcopy(model).eval()
    nonzero = {  # what is not met counts as read
        name: torch.ones(layer.weight.shape[1] * _groups(layer), dtype=torch.bool, device=example.device)
        for name, layer in prunable(model).items()
    }

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
        if name in seen:
            raise ConstraintError(f"layer {name!r} is used twice in a forward pass: its channels cannot be followed")
        seen.add(name)
        x = inputs[0].transpose(1, -1) if isinstance(layer, nn.Conv2d) else inputs[0]  # channels last
        nonzero[name] = (x != 0).flatten(0, -2).any(0)

    for name, layer in prunable(model).items():
        layer.register_forward_pre_hook(partial(look, name=name))
    model(example)
    return [space.gather(space.readers, nonzero) for space in spaces]


@torch.no_grad()
def _silent(model: nn.Module) -> nn.Module:
    """A copy in which every layer and batch norm is removed: what still arrives anywhere is made on the way."""
    copy = detach_masks(deepcopy(model))
    for module in copy.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm):
            for parameter in module.parameters(recurse=False):
                parameter.zero_()
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.fill_(1)  # without a gamma to remove, a norm makes a constant of a zero
    return copy


def _kernels(mask: Tensor, groups: int) -> Tensor:
    """A layer's mask by group of the convolution, ``(F, C/g, Kh, Kw) -> (g, F/g, C/g, Kh*Kw)``; a view."""
    return mask.view(groups, mask.shape[0] // groups, mask.shape[1], -1)


def _filters(mask: Tensor) -> Tensor:
    """Which filters have a weight left, ``(F,)``."""
    return mask.flatten(1).any(1)


def _columns(mask: Tensor, groups: int) -> Tensor:
    """Which input channels have a weight left, ``(C,)``."""
    return _kernels(mask, groups).any(3).any(1).flatten()


def _settle(
    spaces: list[Space], keep: Masks, groups: Mapping[str, int], constant: list[Tensor]
) -> tuple[Masks, list[Tensor]]:
    """Unused-path removal to the fixed point: the tightened masks, and for each space which channels are alive.

    Args:
        keep: a mask for every layer. groups: the groups of every layer (1 for a linear one).
        constant: for each space the channels (size,) that are not zero at the readers even when nobody writes them.
    """
    keep = {name: mask.clone(memory_format=torch.contiguous_format) for name, mask in keep.items()}
    alive = [torch.ones_like(c) for c in constant]
    left = -1
    while left != (left := sum(int(mask.sum()) for mask in keep.values())):
        for i, space in enumerate(spaces):
            if space.frozen or space.output:
                continue
            filters = {end.name: _filters(keep[end.name]) for end in space.writers}
            columns = {end.name: _columns(keep[end.name], groups[end.name]) for end in space.readers}
            written = space.gather(space.writers, filters) | constant[i]
            alive[i] = written & space.gather(space.readers, columns)
            for end in space.readers:
                end.write(alive[i], columns[end.name])
                g = groups[end.name]
                _kernels(keep[end.name], g).logical_and_(columns[end.name].view(g, 1, -1, 1))
            for end in space.writers:
                end.write(alive[i], filters[end.name])
                keep[end.name][~filters[end.name]] = False
    return keep, alive


def residual_groups(model: nn.Module, example: Tensor) -> list[list[str]]:
    """The layers whose filters must go together: those that residual sums add up, and depthwise ones with their input.

    A partition of the prunable layers but the output layer (and layers that a forward pass never meets): a layer that
    is free to lose any filter is a group of one. Order of definition.

    Args:
        example: images ``(N, C, H, W)`` of the network's size; one is enough and their values don't matter.

    Raises:
        ConstraintError: layers share some channels but not all (a sum with a concatenation), or the model cannot be
            traced.
    """
    layers = prunable(model)
    sets: list[set[str]] = []
    for space in _spaces(_graph(model, example), example.device):
        ends = [*space.writers, *(end for end in space.readers if _depthwise(layers[end.name]))]
        whole = all(len(end.index) == space.size and torch.equal(end.index, end.channel) for end in ends)
        if space.output:
            continue
        if len(ends) > 1 and not whole:
            raise ConstraintError(f"{', '.join(end.name for end in ends)} share some of their channels, not all")
        names = {end.name for end in ends}.union(*(s for s in sets if any(end.name in s for end in ends)))
        sets = [s for s in sets if not s & names] + [names]
    order = {name: i for i, name in enumerate(layers)}
    return sorted((sorted(names, key=order.get) for names in sets), key=lambda names: order[names[0]])


def coupled(model: nn.Module, plan: Plan, example: Tensor) -> Plan:
    """The plan with its `Filter` sets coupled inside every residual group, so that a removed filter can be cut out.

    Groups that the plan does not hold to one equal `Filter` set in all their layers stay as they are: their filters
    can be zeroed, but not cut. Other sets are not touched.
    """
    plan = dict(plan)
    for names in residual_groups(model, example):
        sets = {plan.get(name) for name in names}
        if len(names) > 1 and len(sets) == 1 and isinstance(plan.get(names[0]), Filter):
            plan |= dict.fromkeys(names, replace(plan[names[0]], coupled=names[0]))
    return plan


def _check(model: nn.Module, masks: Masks) -> None:
    """Refuse masks of unknown layers or of another shape."""
    layers, parameters = prunable(model), dict(detach_masks(deepcopy(model)).named_parameters())
    for name, mask in masks.items():
        weight = layers[name].weight if name in layers else parameters.get(name)
        if weight is None:
            raise ConstraintError(f"mask for layer {name!r}; the model has {', '.join(layers)}")
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ConstraintError(
                f"mask of {name!r} is {mask.dtype} {tuple(mask.shape)}; expected torch.bool {tuple(weight.shape)}"
            )


def _constants(
    model: nn.Module, spaces: list[Space], own: dict[str, list[str]], keep: Masks, alive: list[Tensor]
) -> Masks:
    """The masks of biases and batch norms that go with removed filters and dead channels, by parameter name."""
    modules = dict(model.named_modules())
    result: Masks = {}

    def flags(name: str) -> Tensor:
        size = modules[name].num_features if isinstance(modules[name], _BatchNorm) else len(keep[name])
        return result.setdefault(name, torch.ones(size, dtype=torch.bool, device=alive[0].device))

    final = {end.name for space in spaces if space.output for end in space.writers}
    for layer in keep.keys() - final:
        for name in [layer, *own[layer]]:
            flags(name).logical_and_(_filters(keep[layer]))
    for space, living in zip(spaces, alive, strict=True):
        for end in space.norms:
            end.write(living, flags(end.name))
    named: Masks = {}
    for name in [n for n in modules if n in result]:  # in the model's order
        owned = ("weight", "bias") if isinstance(modules[name], _BatchNorm) else ("bias",)
        named |= {f"{name}.{p}": result[name].clone() for p in owned if getattr(modules[name], p) is not None}
    return named


def follow(model: nn.Module, masks: Masks, example: Tensor) -> Masks:
    """The masks with all that a removed filter or input channel takes with it; the model is left as it is.

    (a) A filter without weights loses its bias and the gamma and beta of its own batch norm; a channel that is dead
    in its whole space loses those of every batch norm on the way. The network's output layer keeps its biases.
    (b) Unused-path removal to a fixed point: a dead channel takes its readers' columns, a channel that nobody reads
    takes its writers' filters. Given (a), this changes no output. The output layer's filters are never removed.

    Args:
        masks: by layer; layers without one are dense. Masks of other parameters are passed on, tightened.
        example: images ``(N, C, H, W)`` of the network's size; one is enough.

    Returns:
        The given masks, tightened, and those that follow: by layer, and as ``bn1.weight``, ``bn1.bias``,
        ``conv1.bias`` by parameter. `lib.constraint.attach_masks` takes them all.

    Raises:
        ConstraintError: a mask fits no layer, a layer is used twice, or the model does something with its channels
            that torch-pruning does not see (such as shuffling them), so that (b) would change its output. What the
            model does only in training, such as auxiliary classifiers, is not seen.
    """
    _check(model, masks)
    layers, graph = prunable(model), _graph(model, example)
    spaces = _spaces(graph, example.device)
    dense = {name: torch.ones(layer.weight.shape, dtype=torch.bool) for name, layer in layers.items()}
    given = {name: masks.get(name, mask).to(example.device) for name, mask in dense.items()}
    groups = {name: _groups(layer) for name, layer in layers.items()}
    keep, alive = _settle(spaces, given, groups, _arriving(_silent(model), spaces, example))
    extra = _constants(detach_masks(deepcopy(model)), spaces, _own_norms(graph), keep, alive)
    _same(_zeroed(model, given | extra), _zeroed(model, keep | extra), example, "unused-path removal")
    found = {n: m for n, m in (keep | extra).items() if n in masks or not m.all()}
    return {n: m & masks[n].to(m.device) if n in masks else m for n, m in (masks | found).items()}


@torch.no_grad()
def _zeroed(model: nn.Module, masks: Masks) -> nn.Module:
    """An ordinary copy with the masked-out parameters at zero."""
    copy = detach_masks(deepcopy(model))
    parameters, layers = dict(copy.named_parameters()), prunable(copy)
    for name, mask in masks.items():
        (layers[name].weight if name in layers else parameters[name]).mul_(mask)
    return copy


@torch.no_grad()
def _same(model: nn.Module, other: nn.Module, example: Tensor, what: str) -> None:
    """Refuse a change of the outputs beyond rounding: the traced graph then misses something that the model does."""
    try:
        before, after = (deepcopy(net).eval()(example) for net in (model, other))
    except RuntimeError as error:
        raise ConstraintError(f"{what}: the model does not run any more ({_line(error)})") from error
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-5 * max(1.0, float(before.abs().max()))):
        worst = float((before - after).abs().max())
        raise ConstraintError(f"{what} changes the outputs by up to {worst:.2g}: the model mixes its channels unseen")


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
    tied = [name for name, layer in layers.items() if _groups(layer) > 1]
    left = -1
    while left != (left := sum(int(channels.sum()) for channels in keep)):
        for name in tied:
            sides = list(_sides(spaces, keep, name))
            flags = torch.zeros(layers[name].in_channels, dtype=torch.bool, device=keep[0].device)
            for end, channels in sides if _depthwise(layers[name]) else []:
                flags[end.index[channels[end.channel]]] = True
            for end, channels in sides:
                channels[end.channel[flags[end.index]] if _depthwise(layers[name]) else end.channel] = True
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
    spaces with other norms than batch norms, and grouped convolutions that are not depthwise.

    Args:
        model: masked, or with zeros in its weights. example: images ``(N, C, H, W)`` of the network's size.

    Returns:
        An ordinary network without masks, in the model's mode and memory format.

    Raises:
        ConstraintError: a layer is used twice, or the smaller network does not run or gives other outputs, as for
            sizes written into ``forward``.
    """
    plain = detach_masks(deepcopy(model))
    layers, spaces = prunable(plain), _spaces(_graph(plain, example), example.device)
    nonzero = {name: layer.weight.detach() != 0 for name, layer in layers.items()}
    groups = {name: _groups(layer) for name, layer in layers.items()}
    _, alive = _settle(spaces, nonzero, groups, _arriving(plain, spaces, example))
    small = deepcopy(plain)
    _cut(small, spaces, _cuttable(spaces, layers, alive))
    if any(_channels_last(p) for p in plain.parameters()):
        small = small.to(memory_format=torch.channels_last)
    _same(plain, small, example, "cutting out dead channels")
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
        if entries and not (reading and _groups(modules[name]) > 1):  # a depthwise one is cut as a writer
            _cutter(modules[name], reading)(modules[name], sorted(entries))


def _cutter(module: nn.Module, reading: bool):
    """torch-pruning's function that shortens one side of a module."""
    if isinstance(module, _BatchNorm):
        return tp.prune_batchnorm_out_channels
    if isinstance(module, nn.Linear):
        return tp.prune_linear_in_channels if reading else tp.prune_linear_out_channels
    if _depthwise(module):
        return tp.prune_depthwise_conv_out_channels
    return tp.prune_conv_in_channels if reading else tp.prune_conv_out_channels
