"""Masks that hold a network inside a support, and its state without them."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lib.constraint.sets import ConstraintError
from lib.models import copied
from lib.shapes import RECOMPUTING, Parametrization, all_layers, in_mode, leaf, prunable, uses

Masks = dict[str, Tensor]
State = dict[str, Tensor]


def mask_of(layer: nn.Module) -> Tensor | None:
    """The mask that holds a layer's weights, or None.

    >>> from lib.constraint import attach_masks
    >>> from lib.constraint import mask_of
    >>> net = attach_masks(torch.nn.Sequential(torch.nn.Linear(2, 1)), {"0": torch.tensor([[True, False]])})
    >>> mask_of(net[0]).tolist(), mask_of(torch.nn.Linear(2, 1))
    ([[True, False]], None)
    """
    chain = layer.parametrizations["weight"] if parametrize.is_parametrized(layer, "weight") else ()
    return next((p.mask for p in chain if isinstance(p, Mask)), None)


class Mask(Parametrization):
    """Parametrization ``W -> m * W``: removed weights are zero in every forward pass and get no gradient.

    >>> from lib.constraint import Mask
    >>> Mask(torch.tensor([True, False]))(torch.tensor([3.0, 1.0])).tolist()
    [3.0, 0.0]
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` with the removed entries at zero, whatever they were."""
        return torch.where(self.mask, weight, 0.0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to a masked weight stores it with the removed entries at zero."""
        return torch.where(self.mask, weight, 0.0)


def attach_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Hold the layers inside their masks from now on, in place, replacing masks that they have. Returns the model.

    A mask is named by its layer (the weight) or by the full name of any other parameter, such as ``bn1.bias``. Where
    several modules share a layer's tensor, all of them are held.

    Raises:
        ConstraintError: a mask is not boolean, has another shape than its weight, or names nothing in the model.
        ShapeError: something else makes the weight anew in every pass.

    >>> from lib.constraint import attach_masks, leaf
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> layer = attach_masks(model, {"0": torch.tensor([[True, False]])})[0]
    >>> model(torch.ones(1, 2)).backward()
    >>> (layer.weight != 0).tolist(), leaf(layer).grad.tolist()
    ([[True, False]], [[1.0, 0.0]])
    """
    found = places(model, masks)
    detach_masks(model)
    for name, (modules, parameter) in found.items():
        weight = getattr(modules[0], parameter)
        attach(modules, Mask(torch.empty_like(weight, dtype=torch.bool).copy_(masks[name])), parameter)  # in its layout
    return model


def attach(modules: list[nn.Module], parametrization: Parametrization, parameter: str = "weight") -> None:
    """Put ``parametrization`` behind whatever else this project has attached to a tensor, in all modules that share it.

    Raises:
        ShapeError: something else makes the weight anew in every pass.

    >>> from lib.constraint import Mask, attach
    >>> layer = torch.nn.Linear(2, 1)
    >>> attach([layer], Mask(torch.tensor([[True, False]])))
    >>> (layer.weight != 0).tolist()
    [[True, False]]
    """
    for module in modules:
        leaf(module, parameter)
        if parametrize.is_parametrized(module) and not parametrize.is_parametrized(module, parameter):
            _own_class(module)
        parametrize.register_parametrization(module, parameter, parametrization)


def _own_class(module: nn.Module) -> None:
    """A deep copy shares the class that torch made for parametrizing with its original: what one gets, both would."""
    own = type(module)
    module.__class__ = type(own.__name__, own.__bases__, dict(vars(own)))


def detach(modules: list[nn.Module], kind: type[nn.Module], parameter: str = "weight", bake: bool = False) -> None:
    """Take away what `attach` has put there, wherever it stands; ``bake`` leaves the tensor as seen through all.

    >>> from lib.constraint import Mask, attach, detach
    >>> layer = torch.nn.Linear(2, 1)
    >>> attach([layer], Mask(torch.tensor([[True, False]])))
    >>> detach([layer], Mask)
    >>> type(layer.weight)
    <class 'torch.nn.parameter.Parameter'>
    """
    for i, module in enumerate(modules):
        chain = module.parametrizations[parameter] if parametrize.is_parametrized(module, parameter) else []
        places = [place for place, link in enumerate(chain) if isinstance(link, kind)]
        if not places:
            continue
        if len(chain) > 1 and not bake:
            del chain[places[-1]]
            continue
        trained = any(p.requires_grad for p in chain.parameters(recurse=False))
        _own_class(module)
        parametrize.remove_parametrizations(module, parameter, leave_parametrized=bake and i == 0)  # one tensor
        if parameter not in module._parameters:  # made of several, which had no gradient
            tensor = getattr(module, parameter).detach()
            delattr(module, parameter)
            module.register_parameter(parameter, nn.Parameter(tensor, trained))


def places(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, tuple[list[nn.Module], str]]:
    """For each mask the modules whose tensor it is for, and the name of the parameter in them: see `attach_masks`."""
    found = {name: _place(model, name) for name in masks}
    for name, (modules, parameter) in found.items():
        mask, shape = masks[name], getattr(modules[0], parameter).shape
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ConstraintError(f"mask of {name!r} is {mask.dtype} {(*mask.shape,)}; expected torch.bool {(*shape,)}")
    return found


def _place(model: nn.Module, name: str) -> tuple[list[nn.Module], str]:
    """The modules and the parameter in them that a mask's name stands for."""
    layers, every = uses(model), dict(model.named_modules())
    owner, _, parameter = name.rpartition(".")
    if name in layers:
        modules, parameter = layers[name], "weight"
    elif isinstance(getattr(every.get(owner), parameter, None), Tensor):
        modules = [every[owner]]
    else:
        raise ConstraintError(f"mask for layer {name!r}; the model has {', '.join(layers)}")
    refuse_others(model, name, modules, parameter)
    return modules, parameter


def refuse_others(model: nn.Module, name: str, modules: list[nn.Module], parameter: str = "weight") -> None:
    """What is attached to a tensor in some modules holds it in these alone.

    Raises:
        ConstraintError: other modules have that tensor too, such as an embedding that a decoder is tied to.
    """
    tensor = leaf(modules[0], parameter)
    for other, module in model.named_modules():
        own = module in modules or isinstance(module, parametrize.ParametrizationList)
        if not own and any(p is tensor for p in module._parameters.values()):
            kind = type(module).__name__
            raise ConstraintError(f"{name!r}: its tensor is also in {other} ({kind}), which nothing here would hold")


def _masked(model: nn.Module) -> Iterator[tuple[str, list[nn.Module], str]]:
    """Every tensor that a mask holds: the mask's name, the modules that share it and the parameter in them."""
    layers = uses(model)
    names = {id(module): name for name, modules in layers.items() for module in modules}
    for owner, module in model.named_modules():
        for parameter, chain in module.parametrizations.items() if parametrize.is_parametrized(module) else ():
            if any(isinstance(p, Mask) for p in chain):
                name = names.get(id(module)) if parameter == "weight" else None
                if name is None:
                    yield f"{owner}.{parameter}".lstrip("."), [module], parameter
                elif module is layers[name][0]:
                    yield name, layers[name], parameter


def detach_masks(model: nn.Module) -> nn.Module:
    """Make an ordinary network of a masked one, in place: the zeros stay, nothing holds them. Returns the model.

    Raises:
        ShapeError: something else was put behind a mask, and makes the weight anew in every pass.

    >>> from lib.constraint import attach_masks, detach_masks, masks
    >>> model = attach_masks(torch.nn.Sequential(torch.nn.Linear(2, 1)), {"0": torch.tensor([[True, False]])})
    >>> (detach_masks(model)[0].weight != 0).tolist(), masks(model)
    ([[True, False]], {})
    """
    found = [*_masked(model)]
    for _, modules, parameter in found:
        leaf(modules[0], parameter)
    for _, modules, parameter in found:
        detach(modules, Parametrization, parameter, bake=True)
    return model


def plain(model: nn.Module) -> nn.Module:
    """A copy of a network with all that makes its weights baked in: masks, and hooks and parametrizations of others.

    What is then written into a weight stays there, and what is read is what the network computes with.

    Raises:
        ShapeError: a weight that is no parameter, and nothing says what makes it.

    >>> from torch.nn.utils import prune
    >>> from lib.constraint import plain
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> model[0].weight.data = torch.tensor([[3.0, 1.0]])
    >>> prune.l1_unstructured(model[0], "weight", amount=0.5)
    Linear(in_features=2, out_features=1, bias=True)
    >>> plain(model)[0]._parameters["weight"].tolist()
    [[3.0, 0.0]]
    """
    copy = copied(model)
    with in_mode(copy, training=False):  # in training spectral norm takes a step whenever a weight is made
        for layers in uses(copy).values():
            detach(layers, nn.Module, bake=True)
        for module in copy.modules():
            for key, hook in [*module._forward_pre_hooks.items()]:
                if isinstance(hook, RECOMPUTING):
                    del module._forward_pre_hooks[key]
                    hook(module, ())  # a copy that has never run has the weight of its original's last pass
                    hook.remove(module)
            for parameter in [*module.parametrizations] if parametrize.is_parametrized(module) else ():
                detach([module], nn.Module, parameter, bake=True)
    for layer in prunable(copy).values():
        leaf(layer)
    return copy


def masks(model: nn.Module) -> Masks:
    """The masks attached to a model, by layer, or by name for parameters that are no layer's weight.

    >>> from lib.constraint import attach_masks, masks
    >>> model = attach_masks(torch.nn.Sequential(torch.nn.Linear(2, 1)), {"0": torch.tensor([[True, False]])})
    >>> {name: mask.tolist() for name, mask in masks(model).items()}
    {'0': [[True, False]]}
    """
    return {
        name: next(p.mask for p in modules[0].parametrizations[parameter] if isinstance(p, Mask))
        for name, modules, parameter in _masked(model)
    }


def sparsity(model: nn.Module, layers: list[str] | None = None) -> float:
    """Fraction of exact zeros among the weights of ``layers`` (all by default; other weights are left out aloud).

    Raises:
        ConstraintError: a layer that the model lacks, or an empty list.

    >>> from lib.constraint import sparsity
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 1))
    >>> model[0].weight.data = torch.tensor([[0.0, 2.0, 0.0, 0.0]])
    >>> sparsity(model)
    0.75
    """
    if layers is not None and not layers:
        raise ConstraintError("sparsity of no layer: name some, or None for all")
    found = prunable(model) if layers else all_layers(model, "sparsity", skip=True)
    if unknown := [n for n in layers or () if n not in found]:
        raise ConstraintError(f"sparsity of layer {unknown[0]!r}; the model has {', '.join(found)}")
    chosen = [found[n].weight for n in (layers or found)]
    return 1 - sum(int(w.count_nonzero()) for w in chosen) / sum(w.numel() for w in chosen)


def state_of(model: nn.Module) -> State:
    """A copy of a network's parameters and buffers under the names of the unmasked network, zeros baked in.

    >>> from lib.constraint import attach_masks
    >>> from lib.constraint import state_of
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> model[0].weight.data = torch.tensor([[3.0, 1.0]])
    >>> state = state_of(attach_masks(model, {"0": torch.tensor([[True, False]])}))
    >>> sorted(state), state["0.weight"].tolist()
    (['0.bias', '0.weight'], [[3.0, 0.0]])
    """
    return plain(model).state_dict()
