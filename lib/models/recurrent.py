"""Recurrent layers whose gates are layers of their own: what torch's GRU and LSTM compute, gate by gate.

Torch packs all gates into one tensor, so that a block of a constraint, or an array, would straddle gates. Here every
gate has a linear layer that reads inputs, ``ih_<gate>``, and one that reads the state, ``hh_<gate>``; whatever speaks
of layers speaks of these. `by_gate` converts a network of torch's, `fused` converts it back.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lib.models.attention import Attention, packed
from lib.models.errors import ModelError
from lib.models.replacing import copied, more_than, replaced

GATES = {"GRU": ("reset", "update", "new"), "LSTM": ("input", "forget", "cell", "output")}
"""In the order of torch's tensors."""

State = tuple[Tensor, ...]
"""``(h,)`` of a GRU, ``(h, c)`` of an LSTM, each ``(N, units)``."""


def _gru(x: Sequence[Tensor], h: Sequence[Tensor], state: State) -> State:
    """One step (Cho et al. 2014, as in torch: the reset gate acts on the product with the state)."""
    reset, update = torch.sigmoid(x[0] + h[0]), torch.sigmoid(x[1] + h[1])
    new = torch.tanh(x[2] + reset * h[2])
    return (new + update * (state[0] - new),)


def _lstm(x: Sequence[Tensor], h: Sequence[Tensor], state: State) -> State:
    """One step (Hochreiter and Schmidhuber 1997, with a forget gate)."""
    i, f, g, o = (a + b for a, b in zip(x, h, strict=True))
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _products(layers: Sequence[nn.Module]) -> Callable[[Tensor], Sequence[Tensor]]:
    """What all gates make of one input: in one product where nobody watches single gates."""
    if any(more_than(layer, nn.Linear) for layer in layers):
        return lambda x: [layer(x) for layer in layers]
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return lambda x: linear(x, weight, bias).chunk(len(layers), -1)


class Direction(nn.Module):
    """One layer of a GRU or an LSTM in one direction.

    Args:
        kind: ``GRU`` or ``LSTM``. projection: of an LSTM's state to so many numbers, by the layer ``hr``; 0: none.
        reverse: from the last frame to the first.

    >>> from lib.models import Direction
    >>> [name for name, _ in Direction("GRU", 4, 8).named_children()]
    ['ih_reset', 'ih_update', 'ih_new', 'hh_reset', 'hh_update', 'hh_new']
    """

    def __init__(
        self, kind: str, inputs: int, units: int, bias: bool = True, projection: int = 0, reverse: bool = False
    ) -> None:
        super().__init__()
        self.kind, self.units, self.reverse = kind, units, reverse
        self.outputs = projection or units
        for part, size in (("ih", inputs), ("hh", self.outputs)):
            for gate in GATES[kind]:
                self.add_module(f"{part}_{gate}", nn.Linear(size, units, bias))
        self.hr = nn.Linear(units, projection, bias=False) if projection else None
        for parameter in self.parameters():  # torch's own way to begin a recurrent layer
            nn.init.uniform_(parameter, -(units**-0.5), units**-0.5)

    def gates(self, part: str) -> list[nn.Module]:
        """The layers that read inputs (``ih``) or the state (``hh``), in torch's order."""
        return [getattr(self, f"{part}_{gate}") for gate in GATES[self.kind]]

    def forward(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Outputs ``(N, T, outputs)`` of frames ``(N, T, C)``, and the last state.

        Args:
            mask: ``(N, T)``, False for frames that are padding: they leave the state as it is, and their output is 0.
        """
        step = _gru if self.kind == "GRU" else _lstm
        outputs: list[Tensor] = [x] * x.shape[1]
        with parametrize.cached():  # a masked weight is made once, not at every step
            frames = list(zip(*(gate.unbind(1) for gate in _products(self.gates("ih"))(x)), strict=True))
            products = _products(self.gates("hh"))
            for t in reversed(range(len(frames))) if self.reverse else range(len(frames)):
                new = step(frames[t], products(state[0]), state)
                if self.hr is not None:
                    new = self.hr(new[0]), *new[1:]
                if mask is not None:
                    new = tuple(torch.where(mask[:, t, None], a, b) for a, b in zip(new, state, strict=True))
                state = new
                outputs[t] = state[0]
        found = torch.stack(outputs, 1)
        return found if mask is None else found * mask.unsqueeze(-1), state


class Recurrent(nn.Module):
    """``torch.nn.GRU`` or ``torch.nn.LSTM`` by gate: the same arguments, the same inputs, the same outputs.

    Its layers are ``layer1``, ``layer1_reverse``, ``layer2``, ..., each a `Direction`.

    Raises:
        ModelError: another kind, or a projection of a GRU, which torch has not either.

    >>> from lib.models import Recurrent
    >>> out, last = Recurrent("GRU", 4, 8, num_layers=2, batch_first=True)(torch.zeros(3, 5, 4))
    >>> tuple(out.shape), tuple(last.shape)
    ((3, 5, 8), (2, 3, 8))
    """

    def __init__(
        self,
        kind: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
    ) -> None:
        super().__init__()
        if kind not in GATES or (proj_size and kind != "LSTM"):
            raise ModelError(f"kind = {kind!r}, proj_size = {proj_size}: allowed are GRU, and LSTM also with proj_size")
        self.kind, self.input_size, self.batch_first = kind, input_size, batch_first
        self.num_layers, self.bidirectional = num_layers, bidirectional
        self.hidden_size, self.proj_size, self.bias, self.dropout = hidden_size, proj_size, bias, dropout
        size = input_size
        for i in range(num_layers):
            for reverse in (False, True)[: 1 + bidirectional]:
                one = Direction(kind, size, hidden_size, bias, proj_size, reverse)
                self.add_module(f"layer{i + 1}" + "_reverse" * reverse, one)
            size = one.outputs * (1 + bidirectional)

    def directions(self) -> list[nn.Module]:
        """In torch's order: layer by layer, forward then reverse."""
        return [m for name, m in self.named_children() if name.startswith("layer")]

    def flatten_parameters(self) -> None:
        """Nothing: networks written for torch's module call it, whose tensors it lays side by side."""

    def forward(self, input: Tensor | PackedSequence, hx=None, lengths: Tensor | None = None):
        """As torch's module: ``(output, h_n)`` of a GRU, ``(output, (h_n, c_n))`` of an LSTM.

        Args:
            input: ``(T, N, C)``, ``(N, T, C)`` with ``batch_first``, ``(T, C)`` of one sequence, or packed.
            lengths: frames of each sequence, ``(N,)``; what follows them is padding.

        Raises:
            ModelError: frames or a state of another size, or lengths that the input has not.
        """
        packed = input if isinstance(input, PackedSequence) else None
        if packed is not None:
            x, lengths = pad_packed_sequence(packed, batch_first=True)
        else:
            alone = input.ndim == 2
            x = input.unsqueeze(0) if alone else input if self.batch_first else input.transpose(0, 1)
        if x.shape[-1] != self.input_size:
            raise ModelError(f"frames of {x.shape[-1]} numbers: {self.input_size} are expected")
        mask = None
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=x.device)
            if lengths.shape != x.shape[:1] or not ((lengths >= 1) & (lengths <= x.shape[1])).all():
                raise ModelError(f"lengths {lengths.tolist()}: each of {len(x)} sequences has 1 to {x.shape[1]} frames")
            mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        if hx is not None:
            hx = [
                part.unsqueeze(1) if packed is None and alone else part
                for part in (hx if self.kind == "LSTM" else [hx])
            ]
            states = self.num_layers * (1 + self.bidirectional)
            asked = [(states, len(x), size) for size in self._sizes()]
            if (given := [(*part.shape,) for part in hx]) != asked:
                raise ModelError(f"a state of {given}: {asked} is expected")
        x, last = self._through(x, hx, mask)
        last = [torch.stack(parts) for parts in zip(*last, strict=True)]
        if packed is not None:
            order = packed.sorted_indices if packed.sorted_indices is not None else slice(None)
            cut = pack_padded_sequence(x[order], lengths[order].cpu(), batch_first=True)
            x = PackedSequence(cut.data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        elif alone:
            x, last = x.squeeze(0), [part.squeeze(1) for part in last]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x, tuple(last) if self.kind == "LSTM" else last[0]

    def _sizes(self) -> tuple[int, ...]:
        """Numbers of a state, ``h`` and, of an LSTM, ``c``."""
        return (self.proj_size or self.hidden_size, self.hidden_size)[: 1 + (self.kind == "LSTM")]

    def _through(self, x: Tensor, hx: Sequence[Tensor] | None, mask: Tensor | None) -> tuple[Tensor, list[State]]:
        """All layers on ``(N, T, C)``: outputs of the last, and the last state of each direction."""
        last: list[State] = []
        sides: list[Tensor] = []
        both = 1 + self.bidirectional
        for i, one in enumerate(directions := self.directions()):
            state = tuple(p[i] for p in hx) if hx else tuple(x.new_zeros(len(x), size) for size in self._sizes())
            found, state = one(x, state, mask)
            last.append(state)
            sides.append(found)
            if len(sides) == both:
                x, sides = torch.cat(sides, -1) if both == 2 else found, []
                x = dropout(x, self.dropout, self.training) if i + 1 < len(directions) else x
        return x, last


def _torch_names(module: Recurrent) -> list[tuple[str, Direction]]:
    """The end of torch's names of each direction's tensors."""
    both = (False, True)[: 1 + module.bidirectional]
    ends = [f"l{i}" + "_reverse" * reverse for i in range(module.num_layers) for reverse in both]
    return [*zip(ends, module.directions(), strict=True)]


def by_gate(model: nn.Module) -> nn.Module:
    """A copy of a network with every ``torch.nn.GRU`` and ``torch.nn.LSTM`` as a `Recurrent`, of the same weights.

    All of their options are taken: layers, both directions, ``batch_first``, no bias, projections, dropout between
    layers. A network that packs its batches goes on doing so.

    Raises:
        ModelError: a recurrent layer whose tensors something else makes (weight norm, a parametrization) or another
            module has as well, or that has a hook, by name.

    >>> from lib.models import by_gate
    >>> from lib.shapes import prunable
    >>> theirs, x = torch.nn.GRU(4, 8, batch_first=True), torch.rand(2, 5, 4)
    >>> mine = by_gate(theirs)
    >>> list(prunable(mine))[:2], torch.allclose(mine(x)[0], theirs(x)[0], atol=1e-6)
    (['layer1.ih_reset', 'layer1.ih_update'], True)
    """

    @torch.no_grad()
    def convert(name: str, module: nn.Module) -> Recurrent:
        tensors = module._parameters
        if type(module) not in (nn.GRU, nn.LSTM) or not all(n in tensors for n in module._flat_weights_names):
            raise ModelError(
                f"{name or 'the model'} ({type(module).__name__}): its weights are made by something else, "
                "which would be lost; only torch.nn.GRU and torch.nn.LSTM as they are can be converted"
            )
        options = ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
        new = Recurrent(module.mode, module.input_size, module.hidden_size, **{o: getattr(module, o) for o in options})
        new.to(tensors["weight_ih_l0"])
        for end, one in _torch_names(new):
            for part in ("ih", "hh"):
                for kind in ("weight", "bias")[: 1 + module.bias]:
                    whole = tensors[f"{kind}_{part}_{end}"]
                    for gate, piece in zip(one.gates(part), whole.chunk(len(one.gates(part))), strict=True):
                        setattr(gate, kind, nn.Parameter(piece.clone(), whole.requires_grad))
            if one.hr is not None:
                whole = tensors[f"weight_hr_{end}"]
                one.hr.weight = nn.Parameter(whole.clone(), whole.requires_grad)
        return new

    copy = copied(model)
    found = {name: module for name, module in copy.named_modules() if isinstance(module, nn.GRU | nn.LSTM)}
    return replaced(copy, found, convert, nn.GRU, nn.LSTM)


def fused(model: nn.Module) -> nn.Module:
    """The way back: a copy with every `Recurrent` and `Attention` as torch's module, of the weights as they are.

    Raises:
        ModelError: a gate or projection that does something else than a linear layer, by name: on arrays, with rounded
            inputs, or with a kernel; some frozen and others not, as torch's tensor of all is trained or is not.

    >>> from lib.models import Recurrent, fused
    >>> type(fused(Recurrent("LSTM", 4, 8))).__name__
    'LSTM'
    """

    @torch.no_grad()
    def convert(name: str, module: nn.Module) -> nn.Module:
        if isinstance(module, Attention):
            return packed(name, module)
        first = module.directions()[0]
        gates = first.gates("ih")
        options = {"proj_size": first.outputs} if first.hr is not None else {}
        new = getattr(nn, module.kind)(
            module.input_size,
            first.units,
            module.num_layers,
            bias=module.bias,
            batch_first=module.batch_first,
            dropout=module.dropout,
            bidirectional=module.bidirectional,
            **options,
        ).to(gates[0].weight)
        own = dict(new.named_parameters())

        def fill(tensor: str, kind: str, gates: Sequence[nn.Module]) -> None:
            trained = {p.requires_grad for gate in gates for n, p in gate.named_parameters() if kind in n.split(".")}
            if len(trained) > 1:
                raise ModelError(f"{name or 'the model'}: of {tensor} some gates are frozen, others not")
            own[tensor].copy_(torch.cat([getattr(gate, kind) for gate in gates]))
            own[tensor].requires_grad = trained.pop()

        for end, one in _torch_names(module):
            for part in ("ih", "hh"):
                for kind in ("weight", "bias")[: 1 + module.bias]:
                    fill(f"{kind}_{part}_{end}", kind, one.gates(part))
            if one.hr is not None:
                fill(f"weight_hr_{end}", "weight", [one.hr])
        return new

    copy = copied(model)
    found = {name: module for name, module in copy.named_modules() if isinstance(module, Recurrent | Attention)}
    return replaced(copy, found, convert, Recurrent, Direction, Attention, nn.Linear)


def lengths_of(x: Tensor) -> Tensor:
    """Frames of each sequence of a batch ``(N, T, C)``: those before the first that has no number, ``(N,)``.

    >>> from lib.models import lengths_of
    >>> lengths_of(torch.tensor([[[1.0], [2.0]], [[3.0], [torch.nan]]])).tolist()
    [2, 1]
    """
    return x.isnan().all(-1).cumsum(1).eq(0).sum(1)


class SequenceNet(nn.Module):
    """A recurrent network with a linear layer behind it, for batches of sequences that end in NaN.

    A batch ``(N, T, C)`` of sequences of different lengths is filled up with NaN: whoever forgot the lengths would see
    it. The network reads them from there, and its recurrent layer meets zeros that change nothing.

    Args:
        rnn: a `Recurrent` with ``batch_first``. each: classes of every frame, ``(N, classes, T)``, instead of the
            sequence's, ``(N, classes)``, which are read from the last state of both directions.

    >>> from lib.models import Recurrent, SequenceNet
    >>> net, x = SequenceNet(Recurrent("GRU", 4, 8, batch_first=True), classes=3), torch.rand(2, 5, 4)
    >>> x[1, 3:] = torch.nan
    >>> torch.allclose(net(x)[1], net(x[1:, :3])[0], atol=1e-6)
    True
    """

    def __init__(self, rnn: Recurrent, classes: int, each: bool = False) -> None:
        super().__init__()
        self.rnn, self.each = rnn, each
        self.fc = nn.Linear(rnn.directions()[0].outputs * (1 + rnn.bidirectional), classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, C)`` -> ``(N, classes)``, or ``(N, classes, T)``.

        Raises:
            ModelError: a missing value, NaN before the end of a sequence.
        """
        lengths, time = lengths_of(x), x.shape[1]
        ended = torch.arange(time, device=x.device) >= lengths[:, None]
        if (x.isnan() != ended.unsqueeze(-1)).any():
            raise ModelError("NaN before the end of a sequence: only what follows it is NaN; fill in missing values")
        longest = int(lengths.max())
        whole = bool((lengths == longest).all())
        out, last = self.rnn(x[:, :longest].nan_to_num(), lengths=None if whole else lengths)
        if self.each:
            scores = self.fc(out).transpose(1, 2)
            return nn.functional.pad(scores, (0, time - longest))
        h = last[0] if self.rnn.kind == "LSTM" else last
        return self.fc(h[-1 - self.rnn.bidirectional :].transpose(0, 1).flatten(1))


def gru(shape: tuple[int, int], classes: int, units: int = 128, layers: int = 2, **options) -> SequenceNet:
    """A GRU for sequences of ``shape`` ``(T, C)``, 2 layers of 128 units, with a linear layer behind it.

    Args:
        options: ``bidirectional`` and ``dropout`` of `Recurrent`, ``each`` of `SequenceNet`.

    >>> from lib.models import build
    >>> from lib.shapes import prunable
    >>> net = build("gru", (28, 28), 10, units=16, layers=1)
    >>> {name: tuple(layer.weight.shape) for name, layer in prunable(net).items() if "reset" in name}
    {'rnn.layer1.ih_reset': (16, 28), 'rnn.layer1.hh_reset': (16, 16)}
    """
    return _sequence_net("GRU", shape, classes, units, layers, **options)


def lstm(shape: tuple[int, int], classes: int, units: int = 128, layers: int = 2, **options) -> SequenceNet:
    """The same as an LSTM.

    >>> from lib.models import build
    >>> [n for n, _ in build("lstm", (28, 28), 10, layers=1).rnn.layer1.named_children()][:4]
    ['ih_input', 'ih_forget', 'ih_cell', 'ih_output']
    """
    return _sequence_net("LSTM", shape, classes, units, layers, **options)


def _sequence_net(kind: str, shape, classes: int, units: int, layers: int, each: bool = False, **options):
    if len(shape) != 2:
        raise ModelError(f"{kind} takes sequences (T, C), such as lib.data.sequences gives, not {(*shape,)}")
    return SequenceNet(Recurrent(kind, shape[1], units, layers, batch_first=True, **options), classes, each)
