"""Sets of allowed weights, plans that assign them to layers, and masks that hold a network inside them.

A `Constraint` is a set with a Euclidean projection; a *plan* is ``{layer name: Constraint}``. Functions here take a
model and a plan and know nothing of any particular set (papers/pruning.md section A).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lib.models import prunable


class ConstraintError(ValueError):
    """A constraint, plan or mask that cannot be: the message names it and what is allowed."""


@dataclass(frozen=True)
class Constraint:
    """A set of allowed weights for one layer, or for several together when ``per_layer`` is False.

    A coupling set (``per_layer = False``) sees the weights of all layers that share it in a plan as one vector.

    The flags are claims that the property tests hold a set to: ``exact`` (the projection is a nearest point),
    ``cone`` (closed under positive scaling), ``masklike`` (the set is a union of supports, so a mask says it all).
    """

    per_layer = True
    exact = True
    cone = True
    masklike = False

    def project(self, weight: Tensor) -> Tensor:
        """The nearest point of the set to ``weight`` (any shape; the result has the same)."""
        raise NotImplementedError

    def distance2(self, weight: Tensor) -> Tensor:
        """Squared Euclidean distance from ``weight`` to the set, a scalar tensor."""
        return (weight - self.project(weight)).square().sum()

    def member(self, weight: Tensor, tolerance: float = 0.0) -> bool:
        """Whether ``weight`` lies in the set, to an absolute tolerance per entry."""
        return bool((weight - self.project(weight)).abs().max() <= tolerance)


class SupportConstraint(Constraint):
    """A set that is a union of supports: the projection zeroes what `select` does not keep."""

    masklike = True

    def select(self, weight: Tensor) -> Tensor:
        """The boolean mask, of the weight's shape, of the entries that the projection keeps."""
        raise NotImplementedError

    def project(self, weight: Tensor) -> Tensor:
        """``weight`` with everything outside `select` set to zero."""
        return torch.where(self.select(weight), weight, 0.0)


Plan = Mapping[str, Constraint]
Masks = dict[str, Tensor]


def weights(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The effective (masked) weights of the planned layers, detached.

    Raises:
        ConstraintError: the plan is empty, names a layer that the model lacks, or meets a weight that is not finite.
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


def _groups(plan: Plan) -> Iterator[tuple[Constraint, list[str]]]:
    """Layers that are projected together: each alone, or all that share a coupling constraint."""
    coupled: dict[int, list[str]] = {}
    for name, constraint in plan.items():
        coupled.setdefault(id(name) if constraint.per_layer else id(constraint), []).append(name)
    for names in coupled.values():
        yield plan[names[0]], names


def _apply(plan: Plan, tensors: Mapping[str, Tensor], method: str) -> dict[str, Tensor]:
    """Call ``project`` or ``select`` layer by layer, coupled layers as one flat vector."""
    result: dict[str, Tensor] = {}
    for constraint, names in _groups(plan):
        if constraint.per_layer:
            result[names[0]] = getattr(constraint, method)(tensors[names[0]])
            continue
        flat = torch.cat([tensors[n].reshape(-1) for n in names])  # (sum of layer sizes,)
        parts = getattr(constraint, method)(flat).split([tensors[n].numel() for n in names])
        result |= {n: part.reshape(tensors[n].shape) for n, part in zip(names, parts, strict=True)}
    return result


def project(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``Z = P_S(W)`` for every layer of the plan; ``tensors`` are the layers' weights by name."""
    return _apply(plan, tensors, "project")


def select(plan: Plan, tensors: Mapping[str, Tensor]) -> Masks:
    """The masks that the plan's projections keep.

    Raises:
        ConstraintError: a constraint is not a set of supports, so that a mask would say nothing of its values.
    """
    for name, constraint in plan.items():
        if not constraint.masklike:
            raise ConstraintError(f"{type(constraint).__name__} on {name!r} is a set of values: it has no mask")
    return _apply(plan, tensors, "select")


@torch.no_grad()
def harden(model: nn.Module, plan: Plan) -> nn.Module:
    """Replace the planned weights by their projection, in place: ``W <- P_S(W)``. Returns the model."""
    layers = prunable(model)
    for name, z in project(plan, weights(model, plan)).items():
        leaf(layers[name]).copy_(z)
    return model


def leaf(layer: nn.Module) -> nn.Parameter:
    """The parameter that an optimizer moves: the weight itself, or the tensor behind its mask."""
    return layer.parametrizations["weight"].original if parametrize.is_parametrized(layer, "weight") else layer.weight


class Mask(nn.Module):
    """Parametrization ``W -> m * W``: removed weights are zero in every forward pass and get no gradient."""

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

    Raises:
        ConstraintError: a mask is not boolean, has another shape than its weight, or names no layer of the model.
    """
    detach_masks(model)
    layers = prunable(model)
    for name, mask in masks.items():
        if name not in layers:
            raise ConstraintError(f"mask for layer {name!r}; the model has {', '.join(layers)}")
        weight = layers[name].weight
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ConstraintError(
                f"mask of {name!r} is {mask.dtype} {tuple(mask.shape)}; expected torch.bool {tuple(weight.shape)}"
            )
        parametrize.register_parametrization(layers[name], "weight", Mask(mask.to(weight.device)))
    return model


def detach_masks(model: nn.Module) -> nn.Module:
    """Make an ordinary network of a masked one, in place: the zeros stay, nothing holds them. Returns the model."""
    for layer in prunable(model).values():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model


def masks(model: nn.Module) -> Masks:
    """The masks attached to a model, by layer."""
    return {
        name: layer.parametrizations["weight"][0].mask
        for name, layer in prunable(model).items()
        if parametrize.is_parametrized(layer, "weight")
    }


def sparsity(model: nn.Module, layers: list[str] | None = None) -> float:
    """Fraction of exact zeros among the weights of ``layers`` (all prunable ones by default)."""
    found = prunable(model)
    chosen = [found[n].weight for n in (layers or found)]
    return 1 - sum(int(w.count_nonzero()) for w in chosen) / sum(w.numel() for w in chosen)
