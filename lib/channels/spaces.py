"""Which layers share channels: torch-pruning's dependency graph, read as spaces."""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.constraint import ConstraintError, plain
from lib.models import Recurrent
from lib.shapes import KINDS, prunable

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
        try:
            for end in ends:
                found[end.channel[flags[end.name][end.index]]] = True
        except IndexError:
            raise ConstraintError(
                f"{end.name}: its channels are regrouped on the way, which cannot be followed"
            ) from None
        return found


def groups_of(layer: nn.Module) -> int:
    """The groups of a convolution; 1 for a linear layer."""
    return getattr(layer, "groups", 1)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether input channel ``c`` is all that filter ``c`` reads, so that the two go together."""
    return groups_of(layer) > 1 and layer.groups == layer.in_channels == layer.out_channels


def _ungrouped(conv: nn.Conv1d | nn.Conv2d) -> nn.Module:
    """A stand-in without groups, for tracing only: what it reads and what it writes are then different spaces."""
    kind = nn.Conv1d if isinstance(conv, nn.Conv1d) else nn.Conv2d
    sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    stand_in = kind(*sizes, bias=conv.bias is not None, device="meta")
    stand_in.weight = nn.Parameter(conv.weight.new_zeros(()).expand(stand_in.weight.shape))  # takes no memory
    stand_in.bias = conv.bias
    return stand_in


def first_line(error: Exception) -> str:
    """The kind and the first line of an error."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def trace(model: nn.Module, example: Tensor) -> tp.DependencyGraph:
    """torch-pruning's dependency graph of an ordinary copy of the model.

    Raises:
        ConstraintError: two modules share a tensor, a layer is recurrent, or torch-pruning cannot trace the model.
    """
    if recurrent := [name or "the model" for name, m in model.named_modules() if isinstance(m, Recurrent)]:
        raise ConstraintError(f"{', '.join(recurrent)}: channels of recurrent layers cannot be followed")
    bare = plain(model).requires_grad_(True)
    owners: dict[Tensor, str] = {}
    for name, module in bare.named_modules():
        for parameter in module.parameters(recurse=False):
            if (other := owners.setdefault(parameter, name)) != name:
                raise ConstraintError(f"{other} and {name} share a tensor: their channels cannot be followed")
    for name, layer in prunable(bare).items():
        if groups_of(layer) > 1:
            bare.set_submodule(name, _ungrouped(layer))
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside known layers: their spaces are frozen
        try:
            return tp.DependencyGraph().build_dependency(bare, (example,))
        except Exception as error:
            raise ConstraintError(f"torch-pruning cannot trace this model: {first_line(error)}") from error


def spaces_of(graph: tp.DependencyGraph, device: torch.device) -> list[Space]:
    """The spaces of a traced model that a convolution or linear layer writes.

    >>> from lib import models
    >>> from lib.channels.spaces import spaces_of, trace
    >>> graph = trace(models.build("lenet5", (1, 28, 28), 10), torch.zeros(1, 1, 28, 28))
    >>> for space in sorted(spaces_of(graph, torch.device("cpu")), key=lambda space: space.size):
    ...     print(space.size, [end.name for end in space.writers], [end.name for end in space.readers])
    10 ['fc2'] []
    20 ['conv1'] ['conv2']
    50 ['conv2'] ['fc1']
    500 ['fc1'] ['fc2']
    """
    names = {module: name for name, module in graph.model.named_modules()}
    layers = prunable(graph.model)
    found = []
    for group in graph.get_all_groups(root_module_types=[*KINDS]):
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


def own_norms(graph: tp.DependencyGraph) -> dict[str, list[str]]:
    """For each layer: the batch norms that its output goes to directly and alone."""
    names = {module: name for name, module in graph.model.named_modules()}
    own = {}
    for name, layer in prunable(graph.model).items():
        node = graph.module2node.get(layer)
        after = node.outputs if node else []
        own[name] = [names[o.module] for o in after if isinstance(o.module, _BatchNorm) and len(o.inputs) == 1]
    return own
