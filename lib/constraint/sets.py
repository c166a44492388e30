"""Sets of allowed weights, plans that assign them to layers, and masks that hold a network inside them.

A `Constraint` is a set with a Euclidean projection; a *plan* is ``{layer name: Constraint}``. Functions here take a
model and a plan and know nothing of any particular set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from lib.constraint.formats import Storage, irregular


class ConstraintError(ValueError):
    """A constraint, plan or mask that cannot be: the message names it and what is allowed.

    >>> from lib.pruning import Unstructured
    >>> Unstructured(1.5)
    Traceback (most recent call last):
        ...
    lib.constraint.sets.ConstraintError: sparsity = 1.5: allowed are numbers in [0, 1)
    """


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
    >>> Nonnegative().project(torch.tensor([1.0, -2.0])).tolist()
    [1.0, 0.0]
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
    anywhere = False  # whether nonzeros may lie anywhere, so that no format has an order to exploit

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
        return irregular(z, bits)


def check_sparsity(**named: float) -> None:
    """Refuse a sparsity outside [0, 1), by the name that the user gave it.

    >>> from lib.constraint import check_sparsity
    >>> check_sparsity(filter_sparsity=0.5, column_sparsity=1.0)
    Traceback (most recent call last):
        ...
    lib.constraint.sets.ConstraintError: column_sparsity = 1.0: allowed are numbers in [0, 1)
    """
    for name, value in named.items():
        if not (isinstance(value, Real) and 0 <= value < 1):
            raise ConstraintError(f"{name} = {value!r}: allowed are numbers in [0, 1)")


def check_count(least: int = 1, most: int | None = None, /, **named: int) -> None:
    """Refuse what is no whole number, or is below ``least`` or above ``most``, by the name that the user gave it.

    >>> from lib.constraint import check_count
    >>> check_count(height=4, width=0)
    Traceback (most recent call last):
        ...
    lib.constraint.sets.ConstraintError: width = 0: allowed are whole numbers from 1
    """
    for name, value in named.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            to = "" if most is None else f" to {most}"
            raise ConstraintError(f"{name} = {value!r}: allowed are whole numbers from {least}{to}")
