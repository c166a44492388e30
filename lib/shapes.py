"""What each layer of a network is, and what it computes: the one place that decides, and the one count of work.

A *layer* is one tensor of weights that meets its inputs in a product: a convolution, a linear layer, or several modules
that share one tensor. Constraints, faults, arrays and accounts all speak of these and of no others.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lib.models.replacing import overridden

KINDS = (nn.Conv1d, nn.Conv2d, nn.Linear)
RECOMPUTING = (BasePruningMethod, SpectralNorm, WeightNorm)
"""Forward hooks of torch that make a new ``weight`` before every pass; whatever is written there is lost."""


def own_forward(*_) -> None:
    """A hook that does nothing: where there is one, torch's fused transformer layer lets its layers run themselves.

    >>> from lib.shapes import own_forward
    >>> layer = torch.nn.Linear(2, 1)
    >>> hook = layer.register_forward_pre_hook(own_forward)
    >>> tuple(layer(torch.ones(3, 2)).shape)
    (3, 1)
    """


CONVOLVING = {getattr(nn.functional, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)}
CONVOLVING.add(nn.functional.linear)
MULTIPLYING = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
"""Products of torch; the second tensor of the first kind is a weight."""


WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""Of torch: a compiled network runs no hooks that come later, and a name with a prefix has other chips."""


class ShapeError(ValueError):
    """A network with weights that cannot be spoken of: the message names the layers, and what can be done.

    >>> from lib.shapes import prunable
    >>> prunable(torch.nn.DataParallel(torch.nn.Linear(2, 1)))
    Traceback (most recent call last):
        ...
    lib.shapes.ShapeError: the model is wrapped in DataParallel; give the network inside it, model.module
    """


class Parametrization(nn.Module):
    """What this project attaches to a weight (masks, straight-through values, faults); all others are somebody else's.

    >>> from lib.constraint import Mask
    >>> from lib.shapes import Parametrization
    >>> isinstance(Mask(torch.tensor([True])), Parametrization)
    True
    """


def prunable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by name, in the order of their definition: what a plan may constrain.

    Layers of other kinds (transposed, torch's own recurrent ones and attention, embeddings) are not among them:
    whoever speaks of a whole network asks `all_layers`, which says so. Of a recurrent layer `lib.models.by_gate` makes
    one layer for each gate, of attention `lib.models.by_projection` one for each projection.

    Raises:
        ShapeError: a model inside a wrapper, whose hooks would never run or whose names have a prefix.

    >>> from lib.models import build
    >>> from lib.shapes import prunable
    >>> list(prunable(build("lenet5", (1, 28, 28), 10)))
    ['conv1', 'conv2', 'fc1', 'fc2']
    """
    return {name: modules[0] for name, modules in uses(model).items()}


def uses(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The layers by name, each with all modules that hold its tensor: one tensor is one layer, named by the first.

    >>> from lib.shapes import uses
    >>> encoder, decoder = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    >>> decoder.weight = encoder.weight
    >>> {name: len(modules) for name, modules in uses(torch.nn.Sequential(encoder, decoder)).items()}
    {'0': 2}
    """
    if inside := WRAPPERS.get(type(model).__name__):
        raise ShapeError(f"the model is wrapped in {type(model).__name__}; give the network inside it, model.{inside}")
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise ShapeError(f"{name or 'the model'} is compiled and runs no hooks; give the network before that")
    attention = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    fused = {id(m) for a in attention for m in a.modules()}  # its output projection's own forward never runs
    found: dict[int, tuple[str, list[nn.Module]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, KINDS) and id(module) not in fused:
            _refuse_weight(name, module._parameters.get("weight"))
            found.setdefault(id(source(module)), (name, []))[1].append(module)
    return dict(found.values())


def _refuse_weight(name: str, weight: Tensor | None) -> None:
    """Weights of which nothing here can be said."""
    said = ""
    if isinstance(weight, nn.parameter.UninitializedTensorMixin):
        said = "has no shape yet: let the network run once"
    elif weight is not None and weight.is_complex():
        said = "has complex weights: real ones are known"
    if said:
        raise ShapeError(f"layer {name or 'the model'} {said}")


def refuse_overridden(layers: Iterable[nn.Module], what: str) -> None:
    """Refuse layers that are `overridden`, for what computes their product in another way.

    Raises:
        ShapeError: one of them has a forward pass of its own.

    >>> from lib.shapes import refuse_overridden
    >>> refuse_overridden([torch.nn.Linear(2, 1)], "arrays")
    """
    for layer in layers:
        if overridden(layer, *KINDS):
            raise ShapeError(f"{what}: {type(layer).__name__} has a forward pass of its own, which would be lost")


def source(layer: nn.Module, parameter: str = "weight") -> object:
    """What a layer's weight is made of: the weight itself, or the tensor behind its parametrization.

    >>> from lib.shapes import source
    >>> layer = torch.nn.Linear(2, 1)
    >>> source(layer) is layer.weight
    True
    """
    if parametrize.is_parametrized(layer, parameter):
        return next(layer.parametrizations[parameter].parameters(recurse=False))
    return layer._parameters.get(parameter, layer)


def leaf(layer: nn.Module, parameter: str = "weight") -> nn.Parameter:
    """The parameter that an optimizer moves: the weight itself, or the tensor behind what this project attached.

    Raises:
        ShapeError: something else makes the weight (a hook, another parametrization): what is written would be undone.

    >>> from lib.constraint import attach_masks
    >>> from lib.shapes import leaf
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> model[0].weight.data = torch.tensor([[3.0, 1.0]])
    >>> layer = attach_masks(model, {"0": torch.tensor([[True, False]])})[0]
    >>> leaf(layer).data.fill_(5).tolist(), layer.weight.tolist()
    ([[5.0, 5.0]], [[5.0, 0.0]])
    """
    made = makers(layer, parameter)
    if made or not isinstance(source(layer, parameter), nn.Parameter):
        by = ", ".join(made) or "its own forward pass"
        raise ShapeError(
            f"the {parameter} of {type(layer).__name__} is made by {by}, which would undo what is written; "
            "remove it first, or work on lib.constraint.plain(model), a copy that has it baked in"
        )
    return source(layer, parameter)


def makers(layer: nn.Module, parameter: str = "weight") -> list[str]:
    """Names of what makes a layer's weight anew in every pass and is not of this project.

    >>> from lib.shapes import makers
    >>> makers(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 1)))
    ['_WeightNorm']
    """
    hooks = [h for h in layer._forward_pre_hooks.values() if isinstance(h, RECOMPUTING)]
    hooks = [h for h in hooks if parameter in (getattr(h, "name", ""), getattr(h, "_tensor_name", ""))]
    chain = layer.parametrizations[parameter] if parametrize.is_parametrized(layer, parameter) else ()
    return [type(p).__name__ for p in (*hooks, *chain) if not isinstance(p, Parametrization)]


def hides_weights(module: nn.Module) -> bool:
    """Whether a module keeps weights where nobody finds them: kernels as arrays, torch's quantized layers packed.

    >>> from lib.shapes import hides_weights
    >>> hides_weights(torch.nn.Linear(2, 1))
    False
    """
    return getattr(module, "stands_for_layer", False) or any(
        type(value) is torch.ScriptObject for value in vars(module).values()
    )


def others(model: nn.Module) -> list[str]:
    """Modules with weights that are no layers, with their kinds; what is ``digital`` by its own word does not count.

    >>> from lib.shapes import others
    >>> others(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GRU(4, 4)))
    ['1 (GRU)']
    """
    known = [layer for modules in uses(model).values() for layer in modules]
    known += [m for m in model.modules() if getattr(m, "digital", False)]
    inside = {id(m) for module in known for m in module.modules()}
    return sorted(
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if id(module) not in inside and (hides_weights(module) or any(tensor.ndim > 1 for tensor in _weights(module)))
    )


def _weights(module: nn.Module) -> list[Tensor]:
    """Its own parameters, and buffers called weights; others are masks of attention, positions and the like."""
    buffers = [buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith("weight")]
    return [*module.parameters(recurse=False), *buffers]


def all_layers(model: nn.Module, what: str, skip: bool = False) -> dict[str, nn.Module]:
    """`prunable`, for what speaks of the whole network: other weights are refused by name, or left out aloud.

    Args:
        what: is being said of the network, for the message. skip: warn of other weights, and go on without them.

    Raises:
        ShapeError: no layer at all, or weights in other modules.

    >>> from lib.shapes import all_layers
    >>> all_layers(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GRU(4, 4)), "storage")
    Traceback (most recent call last):
        ...
    lib.shapes.ShapeError: storage: convolutions and linear layers are known; the model also has 1 (GRU), ...
    """
    layers = prunable(model)
    if not layers:
        raise ShapeError(f"{what}: the model has no convolution and no linear layer")
    if left_out := ", ".join(others(model)):
        if "GRU)" in left_out or "LSTM)" in left_out:
            left_out += ", of which lib.models.by_gate makes layers"
        if not skip:
            raise ShapeError(f"{what}: convolutions and linear layers are known; the model also has {left_out}")
        warnings.warn(f"{what}: left out, as only convolutions and linear layers are known: {left_out}", stacklevel=3)
    return layers


def dense_macs(layer: nn.Module, output: Tensor) -> int:
    """Multiply-accumulates of the forward pass that gave ``output``, all weights counted.

    >>> from lib.shapes import dense_macs
    >>> conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    >>> dense_macs(conv, conv(torch.zeros(2, 3, 10, 10)))  # 2 images, 100 positions, 8 x 27 weights
    43200
    """
    shape = layer.weight.shape
    return output.numel() // shape[0] * shape.numel()


def layer_shapes(model: nn.Module, shape: tuple[int, ...], skip: bool = False) -> pd.DataFrame:
    """The matrices of a network's layers and how many vectors meet each, for one input of ``shape``, without a batch.

    A convolution is ``groups`` matrices of ``C/groups * Kh * Kw`` rows (inputs) and ``F/groups`` columns (filters), and
    as many vectors as it has output positions; a linear layer is one, with a vector for every token. A layer that is
    used twice meets the vectors of both uses. Works on ``meta`` tensors where the network can: it then takes neither
    the time nor the memory of the network.

    Args:
        skip: leave layers out that have weights but no such matrix, with a warning that names them.

    Returns:
        One row per layer: ``layer``, ``groups``, ``channels`` and ``kernel`` (weights of a channel, ``Kh * Kw``) of one
        group, ``rows``, ``filters`` of one group, ``vectors``, ``inputs`` (numbers that go in), ``weights``, ``macs``.
        A layer that the forward pass never meets has no vectors.

    Raises:
        ShapeError: as `all_layers`, the network does not take such an input, or a weight meets inputs outside of its
            layer's own call, by a function of torch, so that not all of its vectors would be counted.

    >>> from lib import models, shapes
    >>> found = shapes.layer_shapes(models.build("lenet5", (1, 28, 28), 10), (1, 28, 28))
    >>> found[["layer", "rows", "filters", "vectors"]].values.tolist()
    [['conv1', 25, 20, 576], ['conv2', 500, 50, 64], ['fc1', 800, 500, 1], ['fc2', 500, 10, 1]]
    """
    layers = all_layers(model, "shapes", skip)
    with in_mode(model, training=False):  # in which spectral norm takes no step when a weight is read
        return _shapes_of(model, layers, shape)


def _shapes_of(model: nn.Module, layers: dict[str, nn.Module], shape: tuple[int, ...]) -> pd.DataFrame:
    """`layer_shapes` of layers in evaluation mode."""
    if empty := [name for name, layer in layers.items() if not layer.weight.numel()]:
        raise ShapeError(f"layer {empty[0]} has no weights, {tuple(layers[empty[0]].weight.shape)}")
    vectors, inputs = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
    for name, layer, x, y in _met(model, shape):
        vectors[name] += dense_macs(layer, y) // layer.weight.numel()
        inputs[name] += x.numel()
    rows = []
    for name, layer in layers.items():
        groups, size = getattr(layer, "groups", 1), layer.weight.shape
        kernel = size[2:].numel()
        rows.append((name, groups, size[1], kernel, size[1:].numel(), size[0] // groups, vectors[name], inputs[name]))
    columns = ["layer", "groups", "channels", "kernel", "rows", "filters", "vectors", "inputs"]
    found = pd.DataFrame(rows, columns=columns)
    found["weights"] = found["groups"] * found["rows"] * found["filters"]
    found["macs"] = found["weights"] * found["vectors"]
    return found


def loop_bounds(model: nn.Module, shape: tuple[int, ...], skip: bool = False) -> pd.DataFrame:
    """The loops that compute each layer for one input of ``shape``, without a batch: what a loop nest tiles.

    Args:
        skip: as `layer_shapes`.

    Returns:
        One row per use of a layer: ``layer``; ``groups``; ``K`` filters and ``C`` input channels of one group; ``Yo``
        and ``Xo`` of the output; ``R`` and ``S`` of the kernel; ``U``, the stride, and ``D``, the dilation; ``Yi`` and
        ``Xi`` of the input, without padding. A linear layer is a convolution whose output is as wide as it has tokens.

    Raises:
        ShapeError: as `all_layers`, or a stride or dilation that differs between rows and columns.

    >>> from lib import models, shapes
    >>> shapes.loop_bounds(models.build("lenet5", (1, 28, 28), 10), (1, 28, 28)).iloc[1, 2:].tolist()
    [50, 20, 8, 8, 5, 5, 1, 1, 12, 12]
    """
    all_layers(model, "loops", skip)
    rows = []
    for name, layer, x, y in _met(model, shape):
        filters, channels, *kernel = layer.weight.shape
        if isinstance(layer, nn.Linear):
            inside, outside, both = [x.numel() // channels], [y.numel() // filters], [1, 1]
        else:
            inside, outside, both = x.shape[-len(kernel) :], y.shape[-len(kernel) :], []
            for what in ("stride", "dilation"):
                first, *others = getattr(layer, what)
                if others not in ([], [first]):
                    raise ShapeError(
                        f"loops: layer {name} has the {what} {first, *others}; the same both ways is known"
                    )
                both.append(first)
        groups = getattr(layer, "groups", 1)
        (Yi, Xi), (Yo, Xo), (R, S) = ((1,) * (2 - len(size)) + (*size,) for size in (inside, outside, kernel))
        rows.append((name, groups, filters // groups, channels, Yo, Xo, R, S, *both, Yi, Xi))
    return pd.DataFrame(rows, columns=["layer", "groups", "K", "C", "Yo", "Xo", "R", "S", "U", "D", "Yi", "Xi"])


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Within, the whole network is in training or in evaluation mode; afterwards each module is as it was.

    >>> from lib.shapes import in_mode
    >>> net = torch.nn.Sequential(torch.nn.BatchNorm1d(2).eval())
    >>> with in_mode(net, training=True):
    ...     net[0].training
    True
    >>> net.training, net[0].training
    (True, False)
    """
    before = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _met(model: nn.Module, shape: tuple[int, ...]) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Every use of a layer when the model sees one input of zeros: its name, the module, input and output.

    On ``meta`` a copy runs, which may keep what it makes, such as positions.
    """
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    layers = uses(model)
    beside = _Beside()

    def enter(*_) -> None:
        beside.inside += 1

    def leave(module: nn.Module, given: tuple, named: dict, output: Tensor, name: str) -> None:
        beside.inside -= 1
        seen.append((name, module, next(iter((*given, *named.values()))), output))

    handles = []
    for name, modules in layers.items():
        for module in modules:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(partial(leave, name=name), with_kwargs=True))
    weight = next(model.parameters())
    image = torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device)
    held = {name: t for name, modules in layers.items() for t in [source(modules[0])] if isinstance(t, Tensor)}
    fixed = {name: t for name, t in model.named_buffers() if t.ndim > 1}
    try:
        with torch.no_grad(), in_mode(model, training=False):
            try:
                metas = {id(t): torch.empty_like(t, device="meta") for t in (*model.parameters(), *model.buffers())}
                copy = deepcopy(model, metas)
                with beside.watching(*({name: metas[id(t)] for name, t in own.items()} for own in (held, fixed))):
                    copy(image.to("meta"))
            except Exception:  # what depends on values has none on meta
                seen.clear()
                with beside.watching(held, fixed):
                    model(image)
    except (RuntimeError, IndexError, TypeError) as error:
        takes = f"the model does not take an input of zeros {(1, *shape)}, {image.dtype} (tokens are not known here)"
        raise ShapeError(f"{takes}: {str(error).splitlines()[0]}") from error
    finally:
        for handle in handles:
            handle.remove()
    if beside.found:
        raise ShapeError(f"{', '.join(sorted(beside.found))}: in a product outside of a layer's own call, not counted")
    return iter(seen)


class _Beside(TorchFunctionMode):
    """Within, notes weights of layers, and fixed weights, that a product takes outside of a layer's own call."""

    def watching(self, weights: dict[str, Tensor], fixed: dict[str, Tensor]) -> Self:
        """The mode, for weights of layers, and buffers that may be weights, by name; views count as they do."""
        self.inside, self.found = 0, set()
        self.weights, self.fixed = (
            {t.untyped_storage()._cdata: name for name, t in own.items()} for own in (weights, fixed)
        )
        return self

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called by PyTorch in place of ``function``, with the mode itself set aside."""
        if not self.inside and (function in CONVOLVING or function in MULTIPLYING):
            given = [t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)][:2]
            self.found |= {self.weights[t] for t in given if t in self.weights}
            self.found |= {self.fixed[t] for t in given[1:] if t in self.fixed and function in CONVOLVING}
        return function(*args, **kwargs or {})


def macs(model: nn.Module, shape: tuple[int, ...], skip: bool = False) -> pd.DataFrame:
    """Multiply-accumulates of every layer for one input of ``shape``, without a batch: `layer_shapes` in short.

    ``macs = dense_macs * kept / weights``, as each weight is used equally often but at the padded edges. Biases, norms
    and activations are not counted.

    Returns:
        One row per layer: ``layer``, ``weights``, ``kept`` (nonzero ones), ``dense_macs``, ``macs``.

    Raises:
        ShapeError: as `all_layers`.

    >>> from lib import models, shapes
    >>> shapes.macs(models.build("lenet5", (1, 28, 28), 10), (1, 28, 28))["macs"].tolist()  # 24^2 * 500, 8^2 * 25000
    [288000.0, 1600000.0, 400000.0, 5000.0]
    """
    found = layer_shapes(model, shape, skip).rename(columns={"macs": "dense_macs"})
    layers = prunable(model)
    with in_mode(model, training=False):
        found["kept"] = [int(layers[name].weight.count_nonzero()) for name in found["layer"]]
    found["macs"] = found["dense_macs"] * found["kept"] / found["weights"]
    return found[["layer", "weights", "kept", "dense_macs", "macs"]]
