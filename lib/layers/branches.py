"""A layer as the sum of its ternary branches, as it lies in arrays of one-bit cells."""

from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn

from lib.constraint import Plan, plain, weights
from lib.layers.gates import LayerError
from lib.shapes import refuse_overridden, uses


class Branches(nn.Module):
    """Layers of one input, added up.

    >>> from torch import nn
    >>> from lib.layers import Branches
    >>> Branches([nn.Identity(), nn.ReLU()])(torch.tensor([1.0, -2.0])).tolist()
    [2.0, -2.0]
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the layers' outputs."""
        return sum(layer(x) for layer in self.layers)


def branched(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the network in which every layer of ``plan`` is the sum of its ternary branches.

    So they lie in arrays: a weight of each branch fits a pair of one-bit cells, outputs are added digitally. A layer
    has as many branches as magnitudes, the bias goes with the first, and outputs stay the same up to rounding. Modules
    that share a weight share its branches.

    Args:
        plan: sets that the weights are in, `Expansion` or `TernaryRule`.

    Raises:
        LayerError: weights that are not in their set (harden first); a layer with a hook on its outputs.
        ShapeError: a layer with a forward pass of its own.

    >>> from lib.quantization import Expansion
    >>> from lib.layers import branched
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 1))
    >>> model[0].weight.data = torch.tensor([[0.0, -0.75, 1.75]])
    >>> [layer.weight.tolist() for layer in branched(model, {"0": Expansion((0.4, 0.8))})[0].layers]
    [[[0.0, -0.75, 0.75]], [[0.0, 0.0, 1.0]]]
    """
    result = plain(model)
    layers = uses(result)
    for name, weight in weights(result, plan).items():
        if not plan[name].member(weight, 1e-6 * float(weight.abs().max())):  # means are rounded
            raise LayerError(f"{name}: its weights are no sum of ternary branches; harden the network first")
        magnitudes = [0.0, *weight[weight != 0].abs().unique()]
        of_branch = (torch.where(weight.abs() >= b, (b - a) * weight.sign(), 0.0) for a, b in pairwise(magnitudes))
        parts = [nn.Parameter(part, layers[name][0].weight.requires_grad) for part in of_branch]
        refuse_overridden(layers[name], "branches")
        for layer in layers[name]:
            if layer._forward_hooks:
                raise LayerError(f"{name} has a hook on its outputs, which would see each branch apart")
            branches = [deepcopy(layer) for _ in parts]
            for branch, part in zip(branches, parts, strict=True):
                branch.weight = part
            for further in branches[1:]:
                further.bias = None
            new = Branches(branches or [layer])
            for place, module in [*result.named_modules(remove_duplicate=False)]:
                if module is layer:
                    result.set_submodule(place, new)
    return result
