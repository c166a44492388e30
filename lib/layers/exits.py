"""Early exits: a classifier after some of the blocks, and rules by which an image leaves there."""

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.layers.choices import Costs
from lib.layers.gates import LayerError, gate_of
from lib.shapes import in_mode

LAST = "end"
"""The network's own output, which is its last exit."""


class Exits(nn.Module):
    """A sequential network with a classifier after some of its blocks: pooling over positions and one linear layer.

    Raises:
        LayerError: no plain ``nn.Sequential``, as then its children in order need not be the network; or an exit after
            what gives no ``(N, C, H, W)``.

    >>> from lib import models
    >>> from lib.layers import Exits
    >>> net = Exits(models.build("resnet8", (1, 28, 28), 10, width=4), ["block1_1"], (1, 28, 28)).eval()
    >>> [(name, tuple(y.shape)) for name, y in net.steps(torch.zeros(2, 1, 28, 28))]
    [('block1_1', (2, 10)), ('end', (2, 10))]
    """

    def __init__(self, net: nn.Sequential, after: Sequence[str], shape: tuple[int, ...], seed: int = 0) -> None:
        super().__init__()
        if getattr(type(net), "forward", None) is not nn.Sequential.forward:
            raise LayerError(f"Exits: {type(net).__name__} has a forward of its own; allowed are nn.Sequential")
        self.net, self.heads, self.outputs = net, nn.ModuleDict(), []
        weight = next(net.parameters())
        x = weight.new_zeros(1, *shape)
        sizes = {}
        with torch.no_grad(), in_mode(net, training=False):
            for name, layer in net._modules.items():  # named_children leaves out what stands there a second time
                sizes[name] = (x := layer(x)).shape
        for name in after:
            if name not in sizes or len(sizes[name]) != 4:
                allowed = [name for name, size in sizes.items() if len(size) == 4]
                raise LayerError(f"no exit can be after {name!r}; allowed are {', '.join(allowed)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in (name for name in sizes if name in after):
                head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[name][1], x.shape[1]))
                self.heads[name] = head.to(weight)

    def steps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Exit after exit its name and its logits: who takes no more of them computes no more."""
        for name, layer in self.net._modules.items():
            x = layer(x)
            if name in self.heads:
                yield name, self.heads[name](x)
        yield LAST, x

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` -> ``(N, classes)`` of the last exit; all of them are in ``outputs``."""
        self.outputs = [y for _, y in self.steps(x)]
        return self.outputs[-1]

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and saved: all but the last outputs, which belong to a graph."""
        return self.__dict__ | {"outputs": []}


def at_all_exits(model: Exits, x: Tensor, y: Tensor, output: Tensor) -> Tensor:
    """An objective for `lib.training.fit`: the mean of the cross-entropies of all exits.

    >>> from lib import models
    >>> from lib.layers import Exits, at_all_exits
    >>> net, x = Exits(models.build("resnet8", (1, 8, 8), 10, width=4), [], (1, 8, 8)), torch.rand(2, 1, 8, 8)
    >>> y = torch.tensor([1, 2])
    >>> torch.equal(at_all_exits(net, x, y, net(x)), torch.nn.functional.cross_entropy(net.outputs[0], y))
    True
    """
    return torch.stack([F.cross_entropy(each, y) for each in model.outputs]).mean()


def stages(model: Exits, costs: Costs) -> dict[str, list[str]]:
    """What of a cost table is spent on the way from one exit to the next, classifiers (``exit <name>``) included.

    Raises:
        LayerError: an exit whose classifier the table misses, or an entry that is of no stage.

    >>> from lib import models
    >>> from lib.layers import Exits, stages
    >>> net = Exits(models.build("resnet8", (1, 8, 8), 10, width=4), ["block1_1"], (1, 8, 8))
    >>> stages(net, {"conv1": 3.0, "block1_1.conv1": 4.0, "exit block1_1": 1.0, "fc": 2.0})
    {'block1_1': ['conv1', 'block1_1.conv1', 'exit block1_1'], 'end': ['fc']}
    """
    found, here = {}, []
    for name in model.net._modules:
        here += [entry for entry in costs if entry == name or entry.startswith(f"{name}.")]
        if name in model.heads:
            if f"exit {name}" not in costs:
                raise LayerError(f"the cost table misses 'exit {name}', the classifier after {name!r}")
            found[name], here = [*here, f"exit {name}"], []
    found[LAST] = here
    if left := costs.keys() - {entry for entries in found.values() for entry in entries}:
        raise LayerError(
            f"the network has no {', '.join(map(repr, sorted(left)))}, for which the cost table has entries"
        )
    return found


def _spent(model: Exits, costs: Costs, entries: list[str], images: int) -> Tensor:
    """What the images of this pass spent on some entries of the table ``(N,)``."""
    chosen = gate_of(model).now.chosen if any(isinstance(costs[entry], tuple) for entry in entries) else {}
    cost = next(model.parameters()).new_zeros(images)
    for entry in entries:
        price = costs[entry]
        cost = cost + (chosen[entry] @ cost.new_tensor(price) if isinstance(price, tuple) else price)
    return cost


def dearest(model: Exits, costs: Costs, overhead: float = 0.0) -> list[float]:
    """The most that the way to each exit may cost, from the exit before; to the first with what all images spend.

    >>> from lib import models
    >>> from lib.layers import Exits, dearest
    >>> net = Exits(models.build("resnet8", (1, 8, 8), 10, width=4), ["block1_1"], (1, 8, 8))
    >>> dearest(net, {"conv1": 3.0, "block1_1": (0.0, 4.0), "exit block1_1": 1.0, "fc": 2.0})
    [8.0, 2.0]
    """
    ways = stages(model, costs).values()
    most = [float(sum(max(c) if isinstance(c := costs[e], tuple) else c for e in entries)) for entries in ways]
    return [most[0] + overhead, *most[1:]]


def _check(budget: float, most: Sequence[float]) -> None:
    if budget < most[0]:
        raise LayerError(f"budget = {budget:g}: the shortest path, to the first exit, may take {most[0]:.6g}")


@torch.no_grad()
def anytime(model: Exits, x: Tensor, costs: Costs, overhead: float = 0.0) -> tuple[Tensor, Tensor]:
    """Every exit's logits ``(E, N, classes)`` and what an image has spent when it gets there ``(E, N)``.

    Args:
        costs: of a network with exits, classifiers included. overhead: spent by every image, such as on its gate.

    >>> from lib import models
    >>> from lib.layers import Exits, anytime
    >>> net = Exits(models.build("resnet8", (1, 8, 8), 10, width=4), ["block1_1"], (1, 8, 8))
    >>> costs = {"block1_1": 5.0, "exit block1_1": 1.0, "block2_1": 4.0, "fc": 1.0}
    >>> anytime(net, torch.zeros(2, 1, 8, 8), costs)[1].tolist()
    [[6.0, 6.0], [11.0, 11.0]]
    """
    ways, outputs, cost = stages(model, costs), [], [torch.full((len(x),), float(overhead)).to(x.device)]
    with in_mode(model, training=False):
        for name, y in model.steps(x):
            outputs.append(y)
            cost.append(cost[-1] + _spent(model, costs, ways[name], len(x)))
    return torch.stack(outputs), torch.stack(cost[1:])


def exit_of(
    logits: Tensor, cost: Tensor, most: Sequence[float], *, budget: float = inf, confidence: float = inf
) -> Tensor:
    """At which exit each image leaves ``(N,)``, from 0, by what `anytime` found.

    An image goes on if the largest softmax is below ``confidence`` and if the *dearest* way to the next exit still
    fits into its budget, which therefore is never exceeded (DDI halts every image when its budget is spent).

    Args:
        most: what `dearest` says.

    Raises:
        LayerError: a budget into which the dearest way to the first exit does not fit, with that way's cost.

    >>> from lib.layers import exit_of
    >>> logits = torch.tensor([[[0.0, 9.0], [0.0, 0.1]], [[0.0, 9.0], [0.0, 9.0]]])
    >>> cost = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    >>> exit_of(logits, cost, [1, 2], confidence=0.9).tolist(), exit_of(logits, cost, [1, 2], budget=2.5).tolist()
    ([0, 1], [0, 0])
    """
    _check(budget, most)
    sure = logits.softmax(2).amax(2) >= confidence  # (E, N)
    over = cost[:-1] + cost.new_tensor(most[1:])[:, None] > budget
    return torch.cat([sure[:-1] | over, torch.ones_like(sure[-1:])]).int().argmax(0)  # nobody goes on from the last


@torch.no_grad()
def leave(
    model: Exits, x: Tensor, costs: Costs, *, budget: float = inf, confidence: float = inf, overhead: float = 0.0
) -> tuple[Tensor, int, float]:
    """Classify one image and compute nothing after the exit that `exit_of` names.

    Returns:
        Its logits ``(1, classes)``, the number of its exit, and what was spent.

    Raises:
        LayerError: several images, or as `exit_of`.

    >>> from lib import models
    >>> from lib.layers import Exits, leave
    >>> net = Exits(models.build("resnet8", (1, 8, 8), 10, width=4), ["block1_1"], (1, 8, 8)).eval()
    >>> costs = {"block1_1": 5.0, "exit block1_1": 1.0, "block2_1": 4.0, "fc": 1.0}
    >>> leave(net, torch.zeros(1, 1, 8, 8), costs, budget=10.0)[1:]  # the end takes 11
    (0, 6.0)
    """
    if len(x) != 1:
        raise LayerError(f"{len(x)} images: each leaves at an exit of its own; give one")
    ways, most, cost = stages(model, costs), dearest(model, costs, overhead), float(overhead)
    _check(budget, most)
    with in_mode(model, training=False):
        for number, (name, y) in enumerate(model.steps(x)):
            cost += float(_spent(model, costs, ways[name], 1))
            last = number + 1 == len(ways)
            if last or float(y.softmax(1).amax()) >= confidence or cost + most[number + 1] > budget:
                return y, number, cost
