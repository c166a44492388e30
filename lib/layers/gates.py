"""Gates: what is decided for every image before a block, and E2-Train's selective layer update (arXiv 1910.13349)."""

from math import nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lib.constraint import leaf
from lib.models import BasicBlock
from lib.training import charge

OPEN = 3.0  # the read-out's first bias: sigmoid(3) = 0.95, so that training begins with nearly every block


class LayerError(ValueError):
    """A network in which a layer or block cannot be replaced so: the message says what is missing.

    >>> from lib.layers import gate_of
    >>> gate_of(torch.nn.Linear(2, 1))
    Traceback (most recent call last):
        ...
    lib.layers.gates.LayerError: the network has no gate: call skippable(model) before it is trained
    """


class _Pass:
    """One forward pass of a gated network: the memory of its gate, what ran, and what was expected to."""

    def __init__(self) -> None:
        self.memory: tuple[Tensor, Tensor] | None = None
        self.macs = self.executed = 0.0
        self.asked: list[tuple[float, Tensor]] = []  # of each block: multiply-accumulates of an image, probabilities
        self.chosen: dict[str, Tensor] = {}  # of each block that chooses: what of it runs (`lib.layers.choices`)

    @property
    def share(self) -> float:
        """Executed share of the gated blocks' multiply-accumulates."""
        return self.executed / self.macs if self.macs else nan

    def expected(self, price: float = 1.0) -> Tensor:
        """``price`` times the expected share, ``sum_b macs_b mean(p_b) / sum_b macs_b``: a cost that gates learn by."""
        return sum(price * macs / self.macs * p.sum() for macs, p in self.asked)


class RecurrentGate(nn.Module):
    """The probability that an image passes a block: an LSTM over the gated blocks in order, shared by all of them.

    Block ``b``'s input ``(N, C, H, W)`` is averaged over its positions, projected to ``hidden`` numbers by a layer of
    its own, and read out by the LSTM cell and one more layer as a logit. The cell's memory begins anew with each
    forward pass of the network (Wang et al., NeurIPS 2019, section 3.2; SkipNet, Wang et al., ECCV 2018). The first
    bias of the read-out is 3: nearly every block runs at the start.

    Args:
        outputs: logits of a block and image; `forward` is of the first.

    Attributes:
        keep: above 0, the gate is not asked: each image passes each block with this probability, which is the control
            (stochastic depth, Huang et al. 2016, by image). A buffer, since evaluation depends on it.

    >>> from lib.layers.gates import RecurrentGate
    >>> gate = RecurrentGate([8, 16])
    >>> p = gate(torch.zeros(5, 8, 4, 4), 0)
    >>> tuple(p.shape), bool((p > 0.8).all())
    ((5,), True)
    """

    digital = True  # control logic, which lies in no array and accounts for itself

    def __init__(self, channels: list[int], hidden: int = 10, outputs: int = 1) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(c, hidden) for c in channels)
        self.cell = nn.LSTMCell(hidden, hidden)
        self.read_out = nn.Linear(hidden, outputs)
        nn.init.constant_(self.read_out.bias, OPEN)
        self.register_buffer("keep", torch.zeros(()))
        self.now = _Pass()

    def forward(self, x: Tensor, index: int) -> Tensor:
        """``(N, C, H, W)``, the input of gated block ``index`` -> probabilities ``(N,)``."""
        if index == 0:
            self.now = _Pass()
        if self.keep > 0:
            return self.keep.expand(len(x))
        return self.logits(x, index)[:, 0].sigmoid()

    def logits(self, x: Tensor, index: int) -> Tensor:
        """``(N, C, H, W)``, the input of gated block ``index`` -> ``(N, outputs)``."""
        if index == 0:
            self.now = _Pass()
        features = self.projections[index](x.mean((2, 3)))  # (N, hidden)
        h, c = self.cell(features, self.now.memory)
        self._charge(len(x), index, h.requires_grad)
        self.now.memory = (h, c) if index + 1 < len(self.projections) else None
        return self.read_out(h)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of deciding on one image, all blocks."""
        once = leaf(self.read_out).numel() + 8 * self.cell.hidden_size**2
        return sum(leaf(layer).numel() + once for layer in self.projections)

    def _charge(self, images: int, index: int, learns: bool) -> None:
        """The cell's products, which no meter sees: four gates from the features and from the last hidden state."""
        if self.training:
            half = 4.0 * images * self.cell.hidden_size**2
            charge(self.cell, "forward", 2 * half)
            if learns:
                charge(self.cell, "input_gradient", half * (1 + (index > 0)))  # the first state is no one's output
                charge(self.cell, "weight_gradient", 2 * half)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and saved: all but the last pass, whose tensors belong to a graph."""
        return self.__dict__ | {"now": _Pass()}


class FeedForwardGate(nn.Module):
    """What `RecurrentGate` decides from the block's own input alone: two layers for each block, and no memory.

    >>> from lib.layers import FeedForwardGate
    >>> gate = FeedForwardGate([8, 16], outputs=3)
    >>> tuple(gate.logits(torch.zeros(5, 16, 4, 4), index=1).shape), gate.macs  # (8 + 3 + 16 + 3) * 10
    ((5, 3), 300)
    """

    digital = True

    def __init__(self, channels: list[int], hidden: int = 10, outputs: int = 1) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(c, hidden) for c in channels)
        self.read_outs = nn.ModuleList(nn.Linear(hidden, outputs) for _ in channels)
        self.now = _Pass()

    def logits(self, x: Tensor, index: int) -> Tensor:
        """``(N, C, H, W)``, the input of gated block ``index`` -> ``(N, outputs)``."""
        if index == 0:
            self.now = _Pass()
        return self.read_outs[index](self.projections[index](x.mean((2, 3))).relu())

    @property
    def macs(self) -> int:
        """Multiply-accumulates of deciding on one image, all blocks."""
        return sum(leaf(layer).numel() for layer in (*self.projections, *self.read_outs))

    __getstate__ = RecurrentGate.__getstate__


class SkippedBlock(nn.Module):
    """A residual block with an identity shortcut that only some images of a batch pass; the others leave as they came.

    In training each image is drawn with its gate's probability ``p``, and the block runs on those drawn alone: its
    batch norm sees no others, and its convolutions cost no more. In evaluation it runs where ``p > 0.5``; with a
    constant ``keep`` it runs on all, and gives the expected output ``x + keep (F(x) - x)`` (Huang et al. 2016).

    The paper's straight-through estimator, ``dL/dp = <dL/dout, F(x) - x>`` for every image, needs ``F(x)`` of those
    that are skipped as well. Here executed images have ``<dL/dout, F(x) - x> / p`` and the skipped have 0. For a given
    ``dL/dout`` that is the same on average, without bias; where the draw itself changes ``dL/dout``, the estimate is
    of its value for executed images. The factor does no harm: in the logit it is ``p (1 - p) / p = 1 - p``.

    >>> from lib.models import BasicBlock
    >>> from lib.layers.gates import RecurrentGate, SkippedBlock
    >>> block = SkippedBlock(BasicBlock(4, 4, stride=1), RecurrentGate([4]), index=0).eval()
    >>> x = torch.rand(2, 4, 5, 5)
    >>> torch.equal(block(x), block.block(x))
    True
    >>> block.gate.read_out.bias.data.fill_(-9.0).item()
    -9.0
    >>> torch.equal(block(x), x)
    True
    """

    def __init__(self, block: BasicBlock, gate: RecurrentGate, index: int) -> None:
        super().__init__()
        self.block, self.index = block, index
        self._shared = (gate,)  # a tuple hides it: only the first block registers it, and copies of a network share one
        if index == 0:
            self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` -> ``(N, C, H, W)``."""
        gate = self._shared[0]
        p = gate(x, self.index)
        macs = float(sum(leaf(conv).numel() for conv in (self.block.conv1, self.block.conv2)) * x[0, 0].numel())
        gate.now.macs += macs * len(x)
        gate.now.asked.append((macs, p))
        if not self.training and gate.keep > 0:
            gate.now.executed += macs * len(x)
            return torch.lerp(x, self.block(x), gate.keep)
        drawn = (torch.rand_like(p) < p if self.training else p > 0.5).nonzero().flatten()
        gate.now.executed += macs * len(drawn)
        some = x if len(drawn) == len(x) else x[drawn]
        return _Passed.apply(x, self.block(some) if len(drawn) else some, p, drawn)


class _Passed(torch.autograd.Function):
    """``x`` with the rows ``drawn`` replaced by ``y``, and the gradient of their probabilities ``p``: see above."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, p: Tensor, drawn: Tensor) -> Tensor:
        if ctx.needs_input_grad[2]:
            ctx.save_for_backward(drawn, p, y - x[drawn])
        else:
            ctx.save_for_backward(drawn)
        return x.clone().index_copy_(0, drawn, y)  # a clone keeps the memory format, and with it every last bit

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        drawn, *saved = ctx.saved_tensors
        of_p = None
        if saved:
            p, change = saved
            of_p = torch.zeros_like(p)
            of_p[drawn] = (gradient[drawn] * change).flatten(1).sum(1) / p[drawn]
        return gradient.clone().index_fill_(0, drawn, 0.0), gradient[drawn], of_p, None


def skippable(model: nn.Module, seed: int = 0, hidden: int = 10) -> nn.Module:
    """Put every residual block with an identity shortcut behind one recurrent gate, in place. Returns the model.

    Blocks are those `lib.models.BasicBlock` whose shortcut is ``nn.Identity``, in the order of their definition, which
    must be that of the forward pass. The same ``seed`` gives the same gate, and the global random state is left as it
    was. Names of layers within change (``block1_1.conv1`` is now ``block1_1.block.conv1``), so do this before masks.

    Raises:
        LayerError: a network without such a block, or one that is gated already.

    >>> from lib import models
    >>> from lib.layers.gates import skippable
    >>> net = skippable(models.build("resnet14", (1, 28, 28), 10, width=8))
    >>> [name for name, module in net.named_modules() if type(module).__name__ == "SkippedBlock"]
    ['block1_1', 'block1_2', 'block2_2', 'block3_2']
    """
    if any(isinstance(m, SkippedBlock) for m in model.modules()):
        raise LayerError("skippable: the network has gated blocks already")
    found = [
        (name, m)
        for name, m in model.named_modules()
        if name and isinstance(m, BasicBlock) and isinstance(m.shortcut, nn.Identity)
    ]
    if not found:
        raise LayerError("skippable: the network has no residual block (BasicBlock) with an identity shortcut to skip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = RecurrentGate([block.conv1.in_channels for _, block in found], hidden)
    gate.to(leaf(found[0][1].conv1))
    for index, (name, block) in enumerate(found):
        model.set_submodule(name, SkippedBlock(block, gate, index).train(block.training))
    return model


def gate_of(model: nn.Module) -> RecurrentGate | FeedForwardGate:
    """The gate of a network that `skippable` or `lib.layers.choosing` has prepared.

    Raises:
        LayerError: it has none.

    >>> from lib import models
    >>> from lib.layers.gates import gate_of, skippable
    >>> len(gate_of(skippable(models.build("resnet8", (1, 28, 28), 10, width=4))).projections)  # blocks
    1
    """
    gates = [m for m in model.modules() if isinstance(m, RecurrentGate | FeedForwardGate)]
    if not gates:
        raise LayerError("the network has no gate: call skippable(model) before it is trained")
    return gates[0]
