"""A budget for a whole network that `fit` shares out among its layers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.constraint import ConstraintError, SupportConstraint
from lib.pruning.groups import Unstructured
from lib.pruning.selection import keep_largest


@dataclass(frozen=True)
class LayerAdaptive(SupportConstraint):
    """Total over kept weights of all layers that share it, each layer's part chosen by LAMP (Lee et al., ICLR 2021).

    A weight's score is its square over the sum of all squares in its layer that are not smaller: what removing it
    distorts, relative to what would be left of the layer. The largest scores of the network are kept, so that no layer
    is emptied, whatever the scale of its weights. `fit` makes `Unstructured` sets of it; there is no other projection.

    Raises:
        ConstraintError: a rate below 1.
    """

    rate: float

    def __post_init__(self) -> None:
        if not self.rate >= 1:
            raise ConstraintError(f"rate = {self.rate}: allowed are numbers from 1")

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, Unstructured]:
        """For each layer its own budget; at least one weight each.

        Raises:
            ConstraintError: the rate leaves fewer weights than there are layers.
        """
        scores = [_lamp(w) for w in weights.values()]
        sizes = [len(s) for s in scores]
        count = round(sum(sizes) / self.rate)
        if count < len(sizes):
            raise ConstraintError(f"rate = {self.rate} leaves {count} of {sum(sizes)} weights for {len(sizes)} layers")
        kept = [max(1, int(k.sum())) for k in keep_largest(torch.cat(scores), count).split(sizes)]
        return {name: Unstructured(1 - k / n) for name, k, n in zip(weights, kept, sizes, strict=True)}

    def select(self, weight: Tensor) -> Tensor:
        """Refused: a layer's part is not chosen yet."""
        raise ConstraintError("LayerAdaptive has to be fitted to a network first: lib.constraint.fitted(model, plan)")


def _lamp(weight: Tensor) -> Tensor:
    """The scores of a layer's weights, ``(N,)``, in their order."""
    square, order = weight.detach().double().reshape(-1).square().sort()
    not_smaller = square.flip(0).cumsum(0).flip(0)
    return torch.empty_like(square).scatter_(0, order, square / not_smaller.clamp(min=1e-300))
