"""Masks with all that a removed filter or channel takes along, and filters that can only go together."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from lib.channels.spaces import Space, first_line, groups_of, is_depthwise, own_norms, spaces_of, trace
from lib.constraint import ConstraintError, Masks, Plan, plain
from lib.constraint.masks import places
from lib.models import copied
from lib.pruning.groups import Filter
from lib.shapes import KINDS, prunable


@torch.no_grad()
def arriving(model: nn.Module, spaces: list[Space], example: Tensor) -> list[Tensor]:
    """For each space: the channels (size,) that are not zero at every reader when the model sees the example.

    Raises:
        ConstraintError: a layer is used twice, so that its filters belong to several spaces at once.
    """
    seen: set[str] = set()
    model = copied(model).eval()
    nonzero = {  # what is not met counts as read
        name: torch.ones(layer.weight.shape[1] * groups_of(layer), dtype=torch.bool, device=example.device)
        for name, layer in prunable(model).items()
    }

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
        if name in seen:
            raise ConstraintError(f"layer {name!r} is used twice in a forward pass: its channels cannot be followed")
        seen.add(name)
        x = inputs[0].transpose(1, -1) if layer.weight.dim() > 2 else inputs[0]  # channels last
        nonzero[name] = (x != 0).flatten(0, -2).any(0)  # (C,)

    for name, layer in prunable(model).items():
        layer.register_forward_pre_hook(partial(look, name=name))
    model(example)
    return [space.gather(space.readers, nonzero) for space in spaces]


@torch.no_grad()
def _silent(model: nn.Module, mean: float) -> nn.Module:
    """A copy in which every layer and batch norm is removed: what still arrives anywhere is made on the way.

    Without a gamma to remove, a norm makes a constant of a zero, ``-mean`` in shares of its deviation.
    """
    copy = plain(model)
    for module in copy.modules():
        if isinstance(module, (*KINDS, _BatchNorm)):
            for parameter in module.parameters(recurse=False):
                parameter.zero_()
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.fill_(mean)
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


def settle(
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
        ConstraintError: layers share some channels but not all (a sum with a concatenation), two modules share a
            tensor, or the model cannot be traced.

    >>> from lib import models
    >>> from lib.channels import residual_groups
    >>> residual_groups(models.build("resnet8", (1, 8, 8), 10, width=2), torch.zeros(1, 1, 8, 8))[:3]
    [['conv1', 'block1_1.conv2'], ['block1_1.conv1'], ['block2_1.conv1']]
    """
    layers = prunable(model)
    sets: list[set[str]] = []
    for space in spaces_of(trace(model, example), example.device):
        ends = [*space.writers, *(end for end in space.readers if is_depthwise(layers[end.name]))]
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

    >>> from lib import channels, models, pruning
    >>> model, image = models.build("resnet8", (1, 8, 8), 10, width=2), torch.zeros(1, 1, 8, 8)
    >>> plan = channels.coupled(model, pruning.uniform_plan(model, pruning.Filter(0.5)), image)
    >>> {name: plan[name].coupled for name in ("conv1", "block1_1.conv1", "block1_1.conv2")}
    {'conv1': 'conv1', 'block1_1.conv1': '', 'block1_1.conv2': 'conv1'}
    """
    plan = dict(plan)
    for names in residual_groups(model, example):
        sets = {plan.get(name) for name in names}
        if len(names) > 1 and len(sets) == 1 and isinstance(plan.get(names[0]), Filter):
            plan |= dict.fromkeys(names, replace(plan[names[0]], coupled=names[0]))
    return plan


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
        ConstraintError: a mask fits no layer, a layer is used twice or shares a tensor, or the model does something
            with its channels that torch-pruning does not see (such as shuffling them), so that (b) would change its
            output. What the model does only in training, such as auxiliary classifiers, is not seen.

    >>> from lib import channels, models, pruning, recipes
    >>> model, image = models.build("lenet5", (1, 28, 28), 10), torch.rand(1, 1, 28, 28)
    >>> masks = recipes.one_shot(model, {"conv1": pruning.Filter(0.75)})
    >>> masks = channels.follow(model, masks, image)
    >>> {name: int(mask.sum()) for name, mask in masks.items()}  # 5 of 20 filters of 25, 5 biases, 50 * 5 * 25 weights
    {'conv1': 125, 'conv2': 6250, 'conv1.bias': 5}
    """
    places(model, masks)  # refuses what fits no layer
    layers, graph = prunable(model), trace(model, example)
    spaces = spaces_of(graph, example.device)
    dense = {name: torch.ones(layer.weight.shape, dtype=torch.bool) for name, layer in layers.items()}
    given = {name: masks.get(name, mask).to(example.device) for name, mask in dense.items()}
    groups = {name: groups_of(layer) for name, layer in layers.items()}
    constant = [arriving(_silent(model, mean), spaces, example) for mean in (-1.0, 1.0)]  # one passes a ReLU
    keep, alive = settle(spaces, given, groups, [above | below for above, below in zip(*constant, strict=True)])
    extra = _constants(plain(model), spaces, own_norms(graph), keep, alive)
    check_same(zeroed(model, given | extra), zeroed(model, keep | extra), example, "unused-path removal")
    found = {n: m for n, m in (keep | extra).items() if n in masks or not m.all()}
    return {n: m & masks[n].to(m.device) if n in masks else m for n, m in (masks | found).items()}


@torch.no_grad()
def zeroed(model: nn.Module, masks: Masks) -> nn.Module:
    """An ordinary copy with the masked-out parameters at zero."""
    copy = plain(model)
    parameters, layers = dict(copy.named_parameters()), prunable(copy)
    for name, mask in masks.items():
        (layers[name].weight if name in layers else parameters[name]).mul_(mask)
    return copy


@torch.no_grad()
def check_same(model: nn.Module, other: nn.Module, example: Tensor, what: str) -> None:
    """Refuse a change of the outputs beyond rounding: the traced graph then misses something that the model does.

    Outputs are all tensors that it returns, in whatever tuples and dicts, and are compared for the example and, as of
    zeros most networks make zeros, for noise of its shape; whole numbers other than bytes are their own noise.
    """
    images, draws = [example], torch.Generator().manual_seed(0)
    if example.is_floating_point():
        noise = torch.randn(example.shape, generator=draws)
        images += [noise.to(example), (255 * noise).to(example)]  # what looks at sizes, as a local norm, may be small
    elif example.dtype == torch.uint8:
        images.append(torch.randint(256, example.shape, generator=draws).to(example))
    try:
        before, after = ([copied(net).eval()(x) for x in images] for net in (model, other))
    except (RuntimeError, IndexError) as error:
        raise ConstraintError(f"{what}: the model does not run any more ({first_line(error)})") from error
    pairs = zip(tree_leaves(before), tree_leaves(after), strict=True)
    if not (tensors := [pair for pair in pairs if isinstance(pair[0], Tensor)]):
        raise ConstraintError(f"{what}: the model returns no tensors that could be compared")
    for old, new in tensors:
        if old.shape != new.shape:
            raise ConstraintError(f"{what}: the model returns channels that would go, {tuple(old.shape)}")
        if not torch.allclose(old, new, rtol=1e-4, atol=1e-5 * max(1.0, float(old.abs().max()))):
            worst = float((old - new).abs().max())
            raise ConstraintError(f"{what} changes outputs by up to {worst:.2g}: the model mixes its channels unseen")
