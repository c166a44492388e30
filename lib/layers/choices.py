"""Blocks that run in part: for every image a gate chooses a width of numbers, nothing at all, or groups of channels.

Dynamic fractional skipping (DFS, Shen et al., AAAI 2020) chooses between skipping a residual block, computing it with
few bits, and computing it whole; dual dynamic inference (DDI, Wang et al., JSTSP 2020) between skipping it and
computing some groups of its channels. What is chosen costs something, by any table that adds up over blocks.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.constraint import leaf
from lib.layers.gates import FeedForwardGate, LayerError, RecurrentGate, gate_of
from lib.models import BasicBlock
from lib.training import Objective

FULL = 32
"""Bits of a block that is computed as it is."""

Costs = Mapping[str, float | tuple[float, ...]]
"""Of one image, in any unit: a number for a layer that always runs, one for each choice of a block that chooses."""


def few_bits(x: Tensor, bits: int, dims: tuple[int, ...]) -> Tensor:
    """``x`` rounded to ``2^bits`` equal steps from its least to its largest number over ``dims``, straight through.

    >>> from lib.layers.choices import few_bits
    >>> few_bits(torch.tensor([[0.0, 0.4, 3.0]]), bits=2, dims=(1,)).tolist()
    [[0.0, 0.0, 3.0]]
    """
    low, high = x.detach().amin(dims, keepdim=True), x.detach().amax(dims, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return x + (((x - low) / step).round() * step + low - x).detach()


class ChoosingBlock(nn.Module):
    """A residual block with an identity shortcut of which each image passes a part.

    The gate's first logits choose one of ``bits``: 0 skips the block, 32 computes it whole, others round weights, by
    layer, and inputs, by image, to so many bits between their ends. Where there are several ``groups``, the channels
    between the two convolutions are cut into so many, and a logit for each says whether it runs.

    In training all choices are computed and added up with weights 0 and 1, whose gradient is that of the softmax and
    of the sigmoid (straight through). In evaluation only what is chosen is computed, with what of the layers it needs;
    ``masked`` computes everything there too. Every product runs through the call of its convolution, so that meters,
    noise and signs see it; at few bits, or for some channels, not through a ``forward`` that somebody has put there.

    Raises:
        LayerError: in a forward pass, few bits or some channels of a convolution with such a ``forward``.

    >>> from lib.layers import ChoosingBlock, RecurrentGate
    >>> from lib.models import BasicBlock
    >>> block = ChoosingBlock(BasicBlock(4, 4, 1), RecurrentGate([4], outputs=2), 0, "block", (0, 32)).eval()
    >>> block.gate.read_out.bias.data = torch.tensor([0.0, 9.0])
    >>> x = torch.rand(2, 4, 5, 5)
    >>> torch.equal(block(x), block.block(x)), block.gate.now.chosen["block"].tolist()
    (True, [[0.0, 1.0], [0.0, 1.0]])
    """

    def __init__(
        self, block: BasicBlock, gate: nn.Module, index: int, name: str, bits: tuple[int, ...], groups: int = 1
    ) -> None:
        super().__init__()
        self.block, self.index, self.name, self.bits, self.groups = block, index, name, bits, groups
        self.masked = False
        self.register_buffer("drawn", torch.zeros(len(bits)))  # the control: above 0, chosen at random by these shares
        self._shared = (gate,)  # a tuple hides it: only the first block registers it, and copies of a network share one
        if index == 0:
            self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` -> ``(N, C, H, W)``."""
        chosen, on = self._decide(x)
        runs = chosen * on.mean(1, keepdim=True)  # (N, choices)
        parts = torch.cat([1 - runs.sum(1, keepdim=True), runs], 1) if self.idles else runs
        self._shared[0].now.chosen[self.name] = parts
        if self.training or self.masked:
            ways = [self._run(x, bits, on) if bits else x for bits in self.bits]
            return sum(part.view(-1, 1, 1, 1) * way for part, way in zip(chosen.T, ways, strict=True))
        return self._run_chosen(x, chosen.argmax(1), on)

    @property
    def idles(self) -> bool:
        """Whether a part can rest though nothing is skipped: it then stands first among the choices, and is free."""
        return self.groups > 1 and self.bits[0] > 0

    def _decide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which choice each image takes ``(N, choices)`` and which groups of channels run ``(N, groups)``: 0 or 1."""
        logits, count = self._shared[0].logits(x, self.index), len(self.bits)
        soft, open_ = logits[:, :count].softmax(1), logits[:, count:].sigmoid()
        if self.drawn.any():
            return F.one_hot(self.drawn.multinomial(len(x), replacement=True), count).to(x), x.new_ones(len(x), 1)
        hard = F.one_hot(soft.argmax(1), count)
        on = _through(open_ > 0.5, open_) if self.groups > 1 else x.new_ones(len(x), 1)
        return _through(hard, soft), on

    def _run(self, x: Tensor, bits: int, on: Tensor, kept: Tensor | None = None) -> Tensor:
        """The block at so many bits: all of its middle channels, times the groups that are ``on``, or those kept."""
        conv1, bn1 = self.block.conv1, self.block.bn1
        if kept is None:
            h = bn1(_product(conv1, x, bits)).relu()
            if on.shape[1] > 1:
                h = h * on.repeat_interleave(conv1.out_channels // self.groups, 1)[..., None, None]
        elif len(kept):
            statistics = (t[kept] for t in (bn1.running_mean, bn1.running_var, bn1.weight, bn1.bias))
            h = F.batch_norm(_product(conv1, x, bits, filters=kept), *statistics, eps=bn1.eps).relu()
        else:
            return (self.block.bn2(torch.zeros_like(x)) + x).relu()
        return (self.block.bn2(_product(self.block.conv2, h, bits, channels=kept)) + x).relu()

    def _run_chosen(self, x: Tensor, choice: Tensor, on: Tensor) -> Tensor:
        """Images that chose alike together, and nothing that they did not choose."""
        powers = 2 ** torch.arange(on.shape[1], device=x.device)
        codes = choice if on.shape[1] == 1 else choice + len(self.bits) * (on.long() * powers).sum(1)
        found, out = codes.unique().tolist(), None
        for code in found:
            rows = None if len(found) == 1 else (codes == code).nonzero().flatten()
            some = x if rows is None else x[rows]
            bits, kept = self.bits[code % len(self.bits)], None
            if bits and on.shape[1] > 1:
                first = 0 if rows is None else rows[0]
                kept = on[first].bool().repeat_interleave(self.block.conv1.out_channels // self.groups)
                kept = None if kept.all() else kept.nonzero().flatten()
            some = self._run(some, bits, on.new_ones(len(some), 1), kept) if bits else some
            if rows is None:
                return some
            out = x.clone() if out is None else out
            out[rows] = some
        return out


def _product(
    conv: nn.Conv2d, x: Tensor, bits: int, filters: Tensor | None = None, channels: Tensor | None = None
) -> Tensor:
    """A convolution at so many bits, of some of its filters or input channels, as a call of the layer."""
    if bits == FULL and filters is None and channels is None:
        return conv(x)
    if "forward" in vars(conv):
        raise LayerError(f"a convolution that computes in another way runs whole, and at {FULL} bits only; here {bits}")
    weight = conv.weight
    if bits != FULL:
        x, weight = few_bits(x, bits, (1, 2, 3)), few_bits(weight, bits, (0, 1, 2, 3))
    weight = weight if filters is None else weight[filters]
    weight = weight if channels is None else weight[:, channels]
    conv.forward = lambda inputs: conv._conv_forward(inputs, weight, None)
    try:
        return conv(x)
    finally:
        del conv.forward


def _through(hard: Tensor, soft: Tensor) -> Tensor:
    """``hard``, to the last bit, with the gradient of ``soft``."""
    return hard.to(soft) + (soft - soft.detach())


def choosing(
    model: nn.Module,
    bits: Sequence[int] = (0, FULL),
    groups: int = 1,
    *,
    blocks: Sequence[str] | None = None,
    recurrent: bool = True,
    hidden: int = 10,
    seed: int = 0,
) -> nn.Module:
    """Let images choose how much of every residual block with an identity shortcut they pass, in place.

    Args:
        bits: the choices, rising: 0 skips, 32 computes all; DFS has 0, 8, 10, 12, 14, 16 and 32.
        groups: of the channels between a block's convolutions, each of which a gate of its own can leave out (DDI).
        blocks: by name, in the order of the forward pass; None: all `lib.models.BasicBlock` with an identity shortcut.
        recurrent: one `RecurrentGate` for all blocks, or a `FeedForwardGate`. Both begin with everything running.

    Raises:
        LayerError: choices that do not rise or that end below 32, channels that do not fall into so many groups, or a
            block that cannot be skipped, as its shape changes.

    >>> from lib import models
    >>> from lib.layers import choosing
    >>> net = choosing(models.build("resnet14", (1, 28, 28), 10, width=8), bits=(0, 4, 8, 32)).eval()
    >>> [m.name for m in net.modules() if type(m).__name__ == "ChoosingBlock"]
    ['block1_1', 'block1_2', 'block2_2', 'block3_2']
    """
    bits = tuple(bits)
    if not bits or bits[-1] != FULL or bits[0] < 0 or list(bits) != sorted(set(bits)):
        raise LayerError(
            f"bits = {bits}: allowed are rising whole numbers from 0, which skips, to {FULL}, which is all"
        )
    residual = {name: m for name, m in model.named_modules() if name and isinstance(m, BasicBlock)}
    same = [name for name, m in residual.items() if isinstance(m.shortcut, nn.Identity)]
    for name in blocks if blocks is not None else same:
        if name not in same:
            why = "its shape changes on the way" if name in residual else "it is no BasicBlock of the network"
            raise LayerError(f"block {name!r} cannot be skipped: {why}; allowed are {', '.join(same)}")
        if residual[name].conv1.out_channels % groups:
            raise LayerError(f"block {name!r}: {residual[name].conv1.out_channels} channels are no {groups} groups")
    found = list(blocks if blocks is not None else same)
    if not found or any(isinstance(m, RecurrentGate | FeedForwardGate) for m in model.modules()):
        raise LayerError("choosing: the network has no residual block with an identity shortcut, or a gate already")
    outputs, kind = len(bits) + (groups if groups > 1 else 0), RecurrentGate if recurrent else FeedForwardGate
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = kind([residual[name].conv1.in_channels for name in found], hidden, outputs)
    for read_out in [gate.read_out] if recurrent else gate.read_outs:
        nn.init.zeros_(read_out.weight)
        nn.init.zeros_(read_out.bias)
        nn.init.ones_(read_out.bias[len(bits) - 1 :])
    gate.to(leaf(residual[found[0]].conv1))
    for index, name in enumerate(found):
        model.set_submodule(name, ChoosingBlock(residual[name], gate, index, name, bits, groups))
    return model.train(residual[found[0]].training)


def choosing_blocks(model: nn.Module) -> dict[str, ChoosingBlock]:
    """The blocks that choose, by the names that they had before.

    >>> from lib import models
    >>> from lib.layers import choosing, choosing_blocks
    >>> list(choosing_blocks(choosing(models.build("resnet8", (1, 28, 28), 10, width=4))))
    ['block1_1']
    """
    return {m.name: m for m in model.modules() if isinstance(m, ChoosingBlock)}


def of_bits(bits: int) -> float:
    """What a block of ``bits`` costs of one of 32, by DFS's rule: ``(bits / 32)^2``.

    >>> from lib.layers.choices import of_bits
    >>> sum(map(of_bits, [0] * 3 + [8] * 4 + [32] * 3)) / 10  # ten blocks: three skipped, four at 8 bits, three whole
    0.325
    """
    return (bits / FULL) ** 2


def block_costs(model: nn.Module, by_layer: Mapping[str, float], share: Callable[[int], float] = of_bits) -> Costs:
    """The cost table of a network whose blocks choose, from what each layer of the plain network costs.

    Args:
        by_layer: any quantity that adds up: multiply-accumulates, energy on a design, microseconds.
        share: of it that a block takes at so many bits.

    Returns:
        By block a number for each choice; by layer one for all else.

    Raises:
        LayerError: a block for which there is nothing in the table, or a table of the network with its gates.

    >>> from lib import models, shapes
    >>> from lib.layers import block_costs, choosing
    >>> net = models.build("resnet8", (1, 28, 28), 10, width=4)
    >>> table = shapes.macs(net, (1, 28, 28)).set_index("layer")["macs"]
    >>> costs = block_costs(choosing(net, bits=(0, 8, 32)), table)
    >>> costs["conv1"], costs["block1_1"]  # 784 positions: 36 weights; 2 * 144 of them
    (28224.0, (0.0, 14112.0, 225792.0))
    """
    found, table = {}, dict(by_layer)
    left = dict(table)
    for name, block in choosing_blocks(model).items():
        own = [left.pop(layer) for layer in list(left) if layer == name or layer.startswith(f"{name}.")]
        if any(layer.startswith((f"{name}.block.", f"{name}.gate.")) for layer in table):
            raise LayerError(f"the cost table is of a network whose block {name!r} chooses; give that of the plain one")
        if not own:
            raise LayerError(f"the cost table misses block {name!r}; it has {', '.join(map(str, table))}")
        found[name] = (0.0,) * block.idles + tuple(float(sum(own)) * share(bits) for bits in block.bits)
    return found | {layer: float(cost) for layer, cost in left.items()}


def path_costs(costs: Costs) -> tuple[float, float]:
    """What the cheapest and the dearest path through a network cost.

    >>> from lib.layers import path_costs
    >>> path_costs({"conv1": 2.0, "block1": (0.0, 1.0, 16.0)})
    (2.0, 18.0)
    """
    ways = [cost if isinstance(cost, tuple) else (cost,) for cost in costs.values()]
    return sum(map(min, ways)), sum(map(max, ways))


def spent(model: nn.Module, costs: Costs) -> Tensor:
    """What each image of the last forward pass cost ``(N,)``, with the gradient of the choices.

    Layers that always run count for all images, so that this is a whole pass; `lib.layers.Exits` tells its parts.

    Raises:
        LayerError: a block that chooses and that the table misses, or gives another number of choices.

    >>> from lib import models
    >>> from lib.layers import choosing, spent
    >>> net = choosing(models.build("resnet8", (1, 28, 28), 10, width=4)).eval()
    >>> y = net(torch.zeros(3, 1, 28, 28))
    >>> spent(net, {"conv1": 2.0, "block1_1": (0.0, 5.0)}).tolist()
    [7.0, 7.0, 7.0]
    """
    chosen = gate_of(model).now.chosen
    for name, parts in chosen.items():
        if not isinstance(costs.get(name), tuple) or len(costs[name]) != parts.shape[1]:
            raise LayerError(f"the cost table misses block {name!r} with its {parts.shape[1]} choices")
    always = sum(cost for cost in costs.values() if not isinstance(cost, tuple))
    return always + sum(parts @ parts.new_tensor(costs[name]) for name, parts in chosen.items())


def to_budget(costs: Costs, target: float, weight: float, task: Objective) -> Objective:
    """An objective for `lib.training.fit`: the task, and a pull of the mean cost toward a share of the dearest path.

    ``task + weight * sign(share - target) * share``: above the target the cost is a loss and below it a gain, so that
    it is reached from both sides (DFS, released code). In evaluation nothing is pulled.

    Args:
        target: share of the dearest path's cost. weight: of the share in the loss.

    Raises:
        LayerError: a target below the cheapest path, or above 1.

    >>> from lib.layers import to_budget
    >>> to_budget({"conv1": 2.0, "block1": (0.0, 8.0)}, 0.1, 1.0, None)
    Traceback (most recent call last):
        ...
    lib.layers.gates.LayerError: target = 0.1: the cheapest path takes 0.2 of the dearest; allowed are 0.2 to 1
    """
    least, most = path_costs(costs)
    if not least / most <= target <= 1:
        share = f"{least / most:.3g}"
        raise LayerError(f"target = {target}: the cheapest path takes {share} of the dearest; allowed are {share} to 1")

    def objective(model: nn.Module, x: Tensor, y: Tensor, output: Tensor) -> Tensor:
        share = (spent(model, costs) / most).mean()
        return task(model, x, y, output) + weight * torch.sign(share.detach() - target) * share

    return objective
