"""One module in the place of another: where it stands, and what it must not lose on the way."""

from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lib.models.errors import ModelError


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a network that keeps what its last pass made: torch copies no tensor with a graph behind it.

    >>> from lib.models import copied
    >>> layer = torch.nn.Linear(2, 1)
    >>> layer.kept = layer(torch.ones(1, 2))
    >>> copied(layer).kept.requires_grad, copied(layer).weight.requires_grad
    (False, True)
    """
    kept = tree_leaves([vars(module) for module in model.modules()])
    return deepcopy(model, {id(v): v.detach() for v in kept if isinstance(v, Tensor) and not v.is_leaf})


FORWARD = ("forward", "_conv_forward")
"""Where a layer says what it computes."""


def overridden(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module has a forward pass that is none of ``kinds``: what computes theirs in its place would lose it.

    Weights that it standardizes, scales or masks on the way, inputs that it pads: all of that would be lost.

    >>> from lib.models.replacing import overridden
    >>> class Scaled(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return torch.nn.functional.linear(x, 0.25 * self.weight, self.bias)
    >>> [overridden(layer(2, 1), torch.nn.Linear) for layer in (torch.nn.Linear, Scaled)]
    [False, True]
    """
    alike = (all(getattr(type(module), f, None) is getattr(kind, f, None) for f in FORWARD) for kind in kinds)
    return not any(alike) or bool(vars(module).keys() & set(FORWARD))


def _lone(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    watched = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not overridden(module, *kinds) and not any(watched)


def more_than(module: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """Parts of a module, ``''`` for itself, that do more than one of ``kinds`` does: what replaces it would lose that.

    A hook (rounded inputs, errors), a forward pass of its own, a child of another kind. A parametrized weight is none.

    >>> from lib.models import more_than
    >>> layer = torch.nn.Linear(2, 1)
    >>> more_than(layer, torch.nn.Linear)
    []
    >>> hook = layer.register_forward_pre_hook(lambda layer, x: (x[0].round(),))
    >>> more_than(layer, torch.nn.Linear)
    ['']
    """
    parts = ((name, part) for name, part in module.named_modules() if "parametrizations" not in name.split("."))
    return [name for name, part in parts if not _lone(part, kinds)]


def replaced(
    model: nn.Module,
    found: Mapping[str, nn.Module],
    make: Callable[[str, nn.Module], nn.Module],
    *kinds: type[nn.Module],
    error: type[ValueError] = ModelError,
) -> nn.Module:
    """The network with what ``make`` gives for each of the modules found in it, wherever that stands. In place.

    Args:
        found: modules by one of their names. kinds: what they, and all inside of them, have to be.

    Returns:
        The model, or what replaces it as a whole.

    Raises:
        ModelError, or ``error``: a module that does `more_than` its class, or shares a tensor with another.

    >>> from lib.models import replaced
    >>> relu = torch.nn.ReLU()
    >>> net = torch.nn.Sequential(relu, torch.nn.Linear(2, 2), relu)
    >>> replaced(net, {"0": relu}, lambda name, module: torch.nn.Tanh(), torch.nn.ReLU)[2]
    Tanh()
    """
    held = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    made = {}
    for name, module in found.items():
        for part in more_than(module, *kinds):
            place, kind = ".".join(filter(None, (name, part))), type(module.get_submodule(part)).__name__
            raise error(f"{place or 'the model'} ({kind}) does more than its class, which would be lost: a hook, say")
        if shared := [own for own, p in module.named_parameters() if held[id(p)] > 1]:
            raise error(f"{name or 'the model'}: {shared[0]} is also another module's: they would go separate ways")
        made[id(module)] = make(name, module).train(module.training)
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if (new := made.get(id(module))) is not None:
            if not name:
                return new
            model.set_submodule(name, new)
    return model
