"""Sets of allowed weights, plans that assign them to layers, and masks that hold a network inside them.

A `Constraint` is a set with a Euclidean projection; a *plan* is ``{layer name: Constraint}``. Functions here take a
model and a plan and know nothing of any particular set.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lib.models import prunable


class ConstraintError(ValueError):
    """A constraint, plan or mask that cannot be: the message names it and what is allowed.

    >>> from lib.pruning import Unstructured
    >>> Unstructured(1.5)
    Traceback (most recent call last):
        ...
    lib.constraint.ConstraintError: sparsity = 1.5: allowed are numbers in [0, 1)
    """


class Storage(NamedTuple):
    """Bits that a layer takes, counted apart so that a report can show data alone beside all of it.

    >>> from lib.constraint import Storage
    >>> Storage(data=800, index=100).total
    900.0
    """

    data: float
    index: float = 0.0
    table: float = 0.0

    @property
    def total(self) -> float:
        """Data, index and tables together."""
        return sum(self)


@dataclass(frozen=True)
class Constraint:
    """A set of allowed weights for one layer, or for several together when ``per_layer`` is False.

    Layers that hold equal coupling sets (``per_layer = False``) in a plan are projected together: `view` says how
    their weights are laid side by side. Some sets adapt to the weights (a pattern library, block sizes): `fit` chooses
    that part once, and projecting before it is refused.

    The flags are claims that the property tests hold a set to: ``exact`` (the projection is a nearest point),
    ``cone`` (closed under positive scaling), ``masklike`` (the set is a union of supports, so a mask says it all).

    >>> from lib.constraint import Constraint
    >>> class Nonnegative(Constraint):
    ...     def project(self, weight):
    ...         return weight.clamp(min=0)
    >>> Nonnegative().distance2(torch.tensor([1.0, -2.0])).item()
    4.0
    >>> Nonnegative().member(torch.tensor([1.0, 0.0]))
    True
    """

    per_layer = True
    exact = True
    cone = True
    masklike = False

    @property
    def parts(self) -> tuple["Constraint", ...]:
        """The simpler sets whose intersection this is; the set itself when it is simple."""
        return (self,)

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, "Constraint"]:
        """For each of the layers that share this set: the set with its adaptive part chosen and frozen."""
        return dict.fromkeys(weights, self)

    def view(self, weight: Tensor) -> Tensor:
        """How a coupling set sees one layer; the layers' views are joined along the last dimension."""
        return weight.reshape(-1)

    def project(self, weight: Tensor) -> Tensor:
        """The nearest point of the set to ``weight`` (any shape; the result has the same)."""
        raise NotImplementedError

    def distance2(self, weight: Tensor) -> Tensor:
        """Squared Euclidean distance from ``weight`` to the set, a scalar tensor."""
        return (weight - self.project(weight)).square().sum()

    def member(self, weight: Tensor, tolerance: float = 0.0) -> bool:
        """Whether ``weight`` lies in the set, to an absolute tolerance per entry."""
        return bool((weight - self.project(weight)).abs().max() <= tolerance)

    def tangent(self, z: Tensor, gradient: Tensor) -> Tensor:
        """``gradient`` projected onto the directions in which ``z`` can move without leaving the set."""
        raise NotImplementedError

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """What a member of the set, or for sets of supports its mask, takes at ``bits`` per stored weight."""
        raise NotImplementedError


class SupportConstraint(Constraint):
    """A set that is a union of supports: the projection zeroes what `select` does not keep.

    >>> from lib.constraint import SupportConstraint
    >>> class Diagonal(SupportConstraint):
    ...     def select(self, weight):
    ...         return torch.eye(*weight.shape, dtype=torch.bool)
    >>> Diagonal().project(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[1.0, 0.0], [0.0, 4.0]]
    """

    masklike = True

    def select(self, weight: Tensor) -> Tensor:
        """The boolean mask, of the weight's shape, of the entries that the projection keeps."""
        raise NotImplementedError

    def project(self, weight: Tensor) -> Tensor:
        """``weight`` with everything outside `select` set to zero."""
        return torch.where(self.select(weight), weight, 0.0)

    def tangent(self, z: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of what `select` keeps of ``z``; removed weights do not move."""
        return torch.where(self.select(z), gradient, 0.0)

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """In the cheapest format for nonzeros that may lie anywhere; sets with more order say better."""
        from lib.costs.storage import irregular

        return irregular(z, bits)


Plan = Mapping[str, Constraint]
Masks = dict[str, Tensor]


def weights(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The effective (masked) weights of the planned layers, detached.

    Raises:
        ConstraintError: the plan is empty, names a layer that the model lacks, or meets a weight that is not finite.

    >>> from lib.constraint import attach_masks, weights
    >>> from lib.pruning import Unstructured
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> model[0].weight.data = torch.tensor([[-3.0, 1.0]])
    >>> weights(attach_masks(model, {"0": torch.tensor([[True, False]])}), {"0": Unstructured(0.5)})["0"].tolist()
    [[-3.0, 0.0]]
    """
    layers = prunable(model)
    if not plan:
        raise ConstraintError(f"the plan is empty; it may name {', '.join(layers)}")
    for name in plan:
        if name not in layers:
            raise ConstraintError(f"the plan names layer {name!r}; the model has {', '.join(layers)}")
    found = {name: layers[name].weight.detach() for name in plan}
    for name, weight in found.items():
        if not weight.isfinite().all():
            raise ConstraintError(f"layer {name!r} has weights that are not finite: nothing to project")
    return found


def _shared(plan: Plan) -> dict[Constraint, list[str]]:
    """The layers that hold equal constraints, by constraint."""
    layers: dict[Constraint, list[str]] = {}
    for name, constraint in plan.items():
        if unseen := set(vars(constraint)) - {f.name for f in fields(constraint)}:  # equality would not see it
            kind = type(constraint).__name__
            raise ConstraintError(f"{name}: {kind}.{min(unseen)} is not a field; decorate it @dataclass(frozen=True)")
        layers.setdefault(constraint, []).append(name)
    return layers


def fitted(model: nn.Module, plan: Plan) -> Plan:
    """The plan with the adaptive part of every constraint chosen from the model's weights; do it once, then train.

    >>> from lib.constraint import fitted
    >>> from lib.quantization import binary
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> model[0].weight.data = torch.tensor([[3.0, -1.0]])
    >>> fitted(model, {"0": binary()})["0"].step  # the mean magnitude, from now on
    2.0
    """
    found = weights(model, plan)
    chosen = {}
    for constraint, names in _shared(plan).items():
        with _told(names):
            chosen |= constraint.fit({name: found[name] for name in names})
    return {name: chosen[name] for name in plan}


@contextmanager
def _told(names: list[str]) -> Iterator[None]:
    """Say in an error of a constraint which layers it was about."""
    try:
        yield
    except ConstraintError as error:
        raise ConstraintError(f"{', '.join(names)}: {error}") from None


def apply(
    plan: Plan, tensors: Mapping[str, Tensor], function: Callable[[Constraint, Tensor], Tensor]
) -> dict[str, Tensor]:
    """``function(constraint, weight)``, of the weight's shape, for every layer; coupled layers go in as one tensor.

    >>> from lib.constraint import apply
    >>> from lib.pruning import Unstructured
    >>> plan, tensors = {"fc": Unstructured(0.5)}, {"fc": torch.tensor([3.0, -1.0])}
    >>> apply(plan, tensors, lambda constraint, w: w - constraint.project(w))["fc"].tolist()  # what would be lost
    [0.0, -1.0]
    """
    result: dict[str, Tensor] = {}
    for constraint, names in _shared(plan).items():
        if constraint.per_layer:
            for name in names:
                with _told([name]):
                    result[name] = function(constraint, tensors[name])
            continue
        with _told(names):
            views = [constraint.view(tensors[name]) for name in names]
            if len({v.shape[:-1] for v in views}) > 1:
                raise ConstraintError(f"layers of shapes {[tuple(tensors[n].shape) for n in names]} cannot share it")
            joined = function(constraint, torch.cat(views, dim=-1))
        parts = joined.split([v.shape[-1] for v in views], dim=-1)
        result |= {n: part.reshape(tensors[n].shape) for n, part in zip(names, parts, strict=True)}
    return result


def project(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``Z = P_S(W)`` for every layer of the plan; ``tensors`` are the layers' weights by name.

    >>> from lib.constraint import project
    >>> from lib.pruning import Unstructured
    >>> plan = dict.fromkeys(("fc1", "fc2"), Unstructured(0.5, scope="global"))  # half of all weights together
    >>> z = project(plan, {"fc1": torch.tensor([1.0, 2.0]), "fc2": torch.tensor([3.0, 4.0])})
    >>> z["fc1"].tolist(), z["fc2"].tolist()
    ([0.0, 0.0], [3.0, 4.0])
    """
    return apply(plan, tensors, lambda constraint, w: constraint.project(w))


def select(plan: Plan, tensors: Mapping[str, Tensor]) -> Masks:
    """The masks that the plan's projections keep.

    Raises:
        ConstraintError: a constraint is not a set of supports, so that a mask would say nothing of its values.

    >>> from lib.constraint import select
    >>> from lib.pruning import Filter
    >>> select({"fc": Filter(0.5)}, {"fc": torch.tensor([[1.0, 2.0], [3.0, 0.0]])})["fc"].tolist()
    [[False, False], [True, True]]
    """
    for name, constraint in plan.items():
        if not constraint.masklike:
            raise ConstraintError(f"{type(constraint).__name__} on {name!r} is a set of values: it has no mask")
    return apply(plan, tensors, lambda constraint, w: constraint.select(w))


@torch.no_grad()
def harden(model: nn.Module, plan: Plan) -> nn.Module:
    """Replace the planned weights by their projection, in place: ``W <- P_S(W)``. Returns the model.

    >>> from lib.constraint import harden
    >>> from lib.pruning import Unstructured
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> model[0].weight.data = torch.tensor([[3.0, -1.0]])
    >>> harden(model, {"0": Unstructured(0.5)})[0].weight.tolist()
    [[3.0, 0.0]]
    """
    layers = prunable(model)
    for name, z in project(plan, weights(model, plan)).items():
        leaf(layers[name]).copy_(z)
    return model


def leaf(layer: nn.Module) -> nn.Parameter:
    """The parameter that an optimizer moves: the weight itself, or the tensor behind its mask.

    >>> from lib.constraint import attach_masks, leaf
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> model[0].weight.data = torch.tensor([[3.0, 1.0]])
    >>> layer = attach_masks(model, {"0": torch.tensor([[True, False]])})[0]
    >>> leaf(layer).data.fill_(5).tolist(), layer.weight.tolist()
    ([[5.0, 5.0]], [[5.0, 0.0]])
    """
    return layer.parametrizations["weight"].original if parametrize.is_parametrized(layer, "weight") else layer.weight


class Mask(nn.Module):
    """Parametrization ``W -> m * W``: removed weights are zero in every forward pass and get no gradient.

    >>> from lib.constraint import Mask
    >>> Mask(torch.tensor([True, False]))(torch.tensor([3.0, 1.0])).tolist()
    [3.0, 0.0]
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` with the removed entries at zero."""
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to a masked weight stores it with the removed entries at zero."""
        return weight * self.mask


def attach_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Hold the layers inside their masks from now on, in place, replacing masks that they have. Returns the model.

    A mask is named by its layer (the weight) or by the full name of any other parameter, such as ``bn1.bias``.

    Raises:
        ConstraintError: a mask is not boolean, has another shape than its weight, or names nothing in the model.

    >>> from lib.constraint import attach_masks, leaf
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> layer = attach_masks(model, {"0": torch.tensor([[True, False]])})[0]
    >>> model(torch.ones(1, 2)).backward()
    >>> (layer.weight != 0).tolist(), leaf(layer).grad.tolist()
    ([[True, False]], [[1.0, 0.0]])
    """
    detach_masks(model)
    for name, mask in masks.items():
        module, parameter = _slot(model, name)
        weight = getattr(module, parameter)
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ConstraintError(
                f"mask of {name!r} is {mask.dtype} {tuple(mask.shape)}; expected torch.bool {tuple(weight.shape)}"
            )
        parametrize.register_parametrization(module, parameter, Mask(mask.to(weight.device)))
    return model


def _slot(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module and the parameter in it that a mask's name stands for."""
    layers = prunable(model)
    if name in layers:
        return layers[name], "weight"
    owner, _, parameter = name.rpartition(".")
    module = dict(model.named_modules()).get(owner)
    if parameter not in getattr(module, "_parameters", ()):
        raise ConstraintError(f"mask for layer {name!r}; the model has {', '.join(layers)}")
    return module, parameter


def _masked(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter that a mask holds: the mask's name, the module and the parameter in it."""
    layers = prunable(model)
    for owner, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for parameter in module.parametrizations:
                short = owner in layers and parameter == "weight"
                yield owner if short else f"{owner}.{parameter}", module, parameter


def detach_masks(model: nn.Module) -> nn.Module:
    """Make an ordinary network of a masked one, in place: the zeros stay, nothing holds them. Returns the model.

    >>> from lib.constraint import attach_masks, detach_masks, masks
    >>> model = attach_masks(torch.nn.Sequential(torch.nn.Linear(2, 1)), {"0": torch.tensor([[True, False]])})
    >>> (detach_masks(model)[0].weight != 0).tolist(), masks(model)
    ([[True, False]], {})
    """
    for _, module, parameter in [*_masked(model)]:
        kind = type(module)  # a deep copy shares this class with its original, and removal would strip it from both
        module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)
    return model


def masks(model: nn.Module) -> Masks:
    """The masks attached to a model, by layer, or by name for parameters that are no layer's weight.

    >>> from lib.constraint import attach_masks, masks
    >>> model = attach_masks(torch.nn.Sequential(torch.nn.Linear(2, 1)), {"0": torch.tensor([[True, False]])})
    >>> {name: mask.tolist() for name, mask in masks(model).items()}
    {'0': [[True, False]]}
    """
    return {name: module.parametrizations[parameter][0].mask for name, module, parameter in _masked(model)}


def sparsity(model: nn.Module, layers: list[str] | None = None) -> float:
    """Fraction of exact zeros among the weights of ``layers`` (all prunable ones by default).

    >>> from lib.constraint import sparsity
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 1))
    >>> model[0].weight.data = torch.tensor([[0.0, 2.0, 0.0, 0.0]])
    >>> sparsity(model)
    0.75
    """
    found = prunable(model)
    chosen = [found[n].weight for n in (layers or found)]
    return 1 - sum(int(w.count_nonzero()) for w in chosen) / sum(w.numel() for w in chosen)
