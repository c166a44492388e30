"""Budgets for a whole network that `fit` shares out among its layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lib.constraint import ConstraintError, SupportConstraint
from lib.constraint.selection import keep_largest
from lib.constraint.views import gemm
from lib.pruning.composed import FilterColumn
from lib.pruning.groups import NM, Groups, Unstructured


@dataclass(frozen=True)
class _NetworkBudget(SupportConstraint):
    """What the budgets below share: total over kept weights of all the layers that hold an equal one.

    Raises:
        ConstraintError: a rate below 1; in `fit`, one that leaves fewer weights than there are layers.
    """

    rate: float

    def __post_init__(self) -> None:
        if not self.rate >= 1:
            raise ConstraintError(f"rate = {self.rate}: allowed are numbers from 1")

    def count(self, weights: Mapping[str, Tensor]) -> int:
        """How many weights the rate leaves."""
        size = sum(w.numel() for w in weights.values())
        if (count := round(size / self.rate)) < len(weights):
            raise ConstraintError(f"rate = {self.rate} leaves {count} of {size} weights for {len(weights)} layers")
        return count

    def select(self, weight: Tensor) -> Tensor:
        """Refused: a layer's part is not chosen yet."""
        kind = type(self).__name__
        raise ConstraintError(f"{kind} has to be fitted to a network first: lib.constraint.fitted(model, plan)")


@dataclass(frozen=True)
class LayerAdaptive(_NetworkBudget):
    """Single weights, each layer's part chosen by LAMP (Lee et al., ICLR 2021).

    A weight's score is its square over the sum of all squares in its layer that are not smaller: what removing it
    distorts, relative to what would be left of the layer. The largest scores of the network are kept, so that no layer
    is emptied, whatever the scale of its weights. `fit` makes `Unstructured` sets of it; there is no other projection.

    >>> from lib.pruning import LayerAdaptive
    >>> weight = torch.tensor([8.0, 4.0, 2.0, 1.0])
    >>> sets = LayerAdaptive(rate=2.0).fit({"fc1": weight, "fc2": weight / 1000})
    >>> {name: s.sparsity for name, s in sets.items()}  # a smaller scale is no reason to go
    {'fc1': 0.5, 'fc2': 0.5}
    """

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, Unstructured]:
        """For each layer its own budget; at least one weight each."""
        scores = [_lamp(w) for w in weights.values()]
        sizes = [len(s) for s in scores]
        kept = [max(1, int(k.sum())) for k in keep_largest(torch.cat(scores), self.count(weights)).split(sizes)]
        return {name: Unstructured(1 - k / n) for name, k, n in zip(weights, kept, sizes, strict=True)}


def _lamp(weight: Tensor) -> Tensor:
    """The scores of a layer's weights, ``(N,)``, the smallest first."""
    square = weight.detach().reshape(-1).abs().sort().values.double().square()
    not_smaller = square.flip(0).cumsum(0).flip(0)
    return square / not_smaller.clamp(min=1e-300)


@dataclass(frozen=True)
class GroupAdaptive(_NetworkBudget):
    """Whole groups of one kind, each layer's part chosen as LAMP's: by the energy that goes with each weight.

    A group's score is its energy over that of all groups in its layer that do not rank below it, and over its number of
    weights; the largest scores of the network are kept. Groups of one weight give `LayerAdaptive`. Ours, not from a
    paper.

    Attributes:
        rate: total over kept weights. groups: the kind; `fit` makes such sets with a sparsity for each layer.

    Raises:
        ConstraintError: a rate below 1, no groups, or those of another budget: N:M, coupled filters, a global scope.

    >>> from lib.pruning import Filter, GroupAdaptive
    >>> layers = {"fc1": torch.tensor([[4.0, 4.0], [4.0, 4.0]]), "fc2": torch.tensor([[4.0, 4.0], [1.0, 1.0]])}
    >>> GroupAdaptive(rate=8 / 6, groups=Filter(0.0)).fit(layers)["fc2"]
    Filter(sparsity=0.5, coupled='')
    """

    groups: Groups = field(default_factory=lambda: Unstructured(0.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.groups, Groups) or isinstance(self.groups, NM) or not self.groups.per_layer:
            raise ConstraintError(f"groups = {self.groups}: allowed are groups with a sparsity, which couple no layers")

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, Groups]:
        """For each layer its own budget; at least one group each."""
        scored = [_scored(self.groups, w) for w in weights.values()]
        scores, sizes = (torch.cat(column) for column in zip(*scored, strict=True))
        order = scores.argsort(descending=True, stable=True)
        keep = torch.zeros_like(scores)
        keep[order[sizes[order].cumsum(0) <= self.count(weights)]] = 1
        parts = keep.split([len(s) for s, _ in scored])
        return {
            name: replace(self.groups, sparsity=1 - max(1, int(part.sum())) / len(part))
            for name, part in zip(weights, parts, strict=True)
        }


def _scored(groups: Groups, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of a layer's groups and their numbers of weights, in the order in which its sets remove them."""
    weight = weight.detach().double().cpu()
    energy, sizes = (groups.group_norms(w).square().flatten() for w in (weight, torch.ones_like(weight)))
    energy, sizes = energy[sizes > 0], sizes[sizes > 0].round()  # padding at a region's edge is no group
    order = energy.argsort(stable=True)
    energy, sizes = energy[order], sizes[order]
    not_below = energy.flip(0).cumsum(0).flip(0).clamp(min=1e-300)
    return (energy / not_below / sizes).cummax(0).values, sizes


@dataclass(frozen=True)
class SubmatrixAdaptive(_NetworkBudget):
    """Whole filters and columns, each layer's parts chosen by what they distort.

    Greedy: again and again the row or column of a layer's GEMM matrix goes whose share of the energy that is left in
    its layer is smallest for each weight that goes with it, until the rate is reached. `fit` makes `FilterColumn` sets
    of what is left. The same ground as LAMP's, for lines instead of weights; ours, not from a paper.

    >>> from lib.pruning import SubmatrixAdaptive
    >>> layers = {"fc1": torch.tensor([[4.0, 4.0], [4.0, 4.0]]), "fc2": torch.tensor([[4.0, 1.0], [4.0, 1.0]])}
    >>> SubmatrixAdaptive(rate=8 / 6).fit(layers)["fc2"]
    FilterColumn(filter_sparsity=0.0, column_sparsity=0.5)
    """

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, FilterColumn]:
        """For each layer its own budgets; at least one row and one column each."""
        return _without_lines(weights, dict.fromkeys(weights, 1), self.count(weights))


@dataclass(frozen=True)
class SubmatrixByCost(_NetworkBudget):
    """Whole filters and columns as `SubmatrixAdaptive`, where a weight costs what its layer says, not one.

    With the vectors that meet a layer (`lib.shapes.layer_shapes`) as costs, a convolution at many positions gives up
    its lines first: the hardware-aware budgets that ADMM-NN asks for, by multiply-accumulates.

    Attributes:
        rate: total over kept cost. costs: of a weight, by layer; hashable, so pairs of name and cost.

    >>> from lib.pruning import SubmatrixByCost
    >>> layers = {"conv": torch.full((2, 2), 4.0), "fc": torch.tensor([[4.0, 1.0], [4.0, 1.0]])}
    >>> sets = SubmatrixByCost(rate=1.5, costs=(("conv", 100.0), ("fc", 1.0))).fit(layers)  # 404 in all, 269 at most
    >>> sets["conv"], sets["fc"].column_sparsity
    (FilterColumn(filter_sparsity=0.5, column_sparsity=0.0), 0.0)
    """

    costs: tuple[tuple[str, float], ...] = ()

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, FilterColumn]:
        """For each layer its own budgets; at least one row and one column each.

        Raises:
            ConstraintError: a layer without a cost, or one that is not positive.
        """
        costs = dict(self.costs)
        if wrong := [n for n in weights if not costs.get(n, 0) > 0]:
            raise ConstraintError(f"costs: layer {wrong[0]!r} needs one above 0; there are {costs or 'none'}")
        return _without_lines(weights, costs, sum(costs[n] * w.numel() for n, w in weights.items()) / self.rate)


def _without_lines(weights: Mapping[str, Tensor], costs: Mapping[str, float], most: float) -> dict[str, FilterColumn]:
    """Lines go, the cheapest for their cost first, until what is left costs ``most``."""
    layers = {name: _Lines(w) for name, w in weights.items()}
    left = sum(costs[name] * layer.size for name, layer in layers.items())
    while left > most:
        name = min(layers, key=lambda n: layers[n].price / costs[n])
        if layers[name].price == float("inf"):
            break
        left -= costs[name] * layers[name].drop()
    return {name: layer.budgets() for name, layer in layers.items()}


class _Lines:
    """The rows and columns that are left of one layer's GEMM matrix, and what the cheapest of them costs."""

    def __init__(self, weight: Tensor) -> None:
        self.energy = gemm(weight.detach()).double().square().cpu()
        self.alive = [torch.ones(n, dtype=torch.bool) for n in self.energy.shape]
        self.sums = [self.energy.sum(1), self.energy.sum(0)]
        self._look()

    @property
    def size(self) -> int:
        return int(self.alive[0].sum() * self.alive[1].sum())

    def _look(self) -> None:
        """Find the line whose removal costs the least energy per weight, in shares of what is left."""
        total = self.sums[0][self.alive[0]].sum().clamp(min=1e-300)
        counts = [int(a.sum()) for a in self.alive]
        self.price, self.line = float("inf"), None
        for side in (0, 1):
            if counts[side] > 1:
                sums = torch.where(self.alive[side], self.sums[side], torch.inf)
                i = int(sums.argmin())
                price = float(sums[i] / total) / counts[1 - side]
                if price < self.price:
                    self.price, self.line = price, (side, i)

    def drop(self) -> int:
        """Remove that line; returns how many weights go with it."""
        side, i = self.line
        self.alive[side][i] = False
        self.sums[1 - side] -= self.energy[i] if side == 0 else self.energy[:, i]
        gone = int(self.alive[1 - side].sum())
        self.energy.select(side, i).zero_()
        self._look()
        return gone

    def budgets(self) -> FilterColumn:
        return FilterColumn(*(1 - int(a.sum()) / len(a) for a in self.alive))
