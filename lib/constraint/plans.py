"""Plans, which assign sets to layers: checked, fitted, projected and hardened."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor, nn

from lib.constraint.masks import Masks, leaf
from lib.constraint.sets import Constraint, ConstraintError
from lib.shapes import prunable

Plan = Mapping[str, Constraint]


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

    >>> from lib import constraint
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

    Raises:
        ConstraintError: as `weights` and `project`. ShapeError: something else makes one of the weights.

    >>> from lib.constraint import harden
    >>> from lib.pruning import Unstructured
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> model[0].weight.data = torch.tensor([[3.0, -1.0]])
    >>> harden(model, {"0": Unstructured(0.5)})[0].weight.tolist()
    [[3.0, 0.0]]
    """
    z, layers = project(plan, weights(model, plan)), prunable(model)
    leaves = {name: leaf(layers[name]) for name in z}  # all or none
    for name, tensor in leaves.items():
        tensor.copy_(z[name])
    return model
