"""Recurrent layers whose gates are layers of their own: what torch's GRU and LSTM compute, gate by gate.

Torch packs all gates into one tensor, so that a block of a constraint, or an array, would straddle gates. Here every
gate has a linear layer that reads inputs, ``ih_<gate>``, and one that reads the state, ``hh_<gate>``; whatever speaks
of layers speaks of these. `by_gate` converts a network of torch's, `fused` converts it back.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lib.models.errors import ModelError

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


def as_built(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module does what one of these classes does, and nothing else: no hook, no forward pass of its own.

    What replaces a module asks, as a hook (rounded inputs, a user's own) would be gone with it.

    >>> from lib.models import as_built
    >>> layer = torch.nn.Linear(2, 1)
    >>> as_built(layer, torch.nn.Linear), layer.register_forward_hook(print) and as_built(layer, torch.nn.Linear)
    (True, False)
    """
    watched = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    same = any(type(module).forward is kind.forward for kind in kinds)
    return same and "forward" not in vars(module) and not any(watched)


def _products(layers: Sequence[nn.Module]) -> Callable[[Tensor], Sequence[Tensor]]:
    """What all gates make of one input: in one product where nobody watches single gates."""
    if not all(as_built(layer, nn.Linear) for layer in layers):
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
        self.hidden_size, self.proj_size, self.bias = hidden_size, proj_size, bias
        self.dropout = nn.Dropout(dropout)
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
        """Nothing: there for networks that call it, as torch's modules have it."""

    def forward(self, input: Tensor | PackedSequence, hx=None, lengths: Tensor | None = None):
        """As torch's module: ``(output, h_n)`` of a GRU, ``(output, (h_n, c_n))`` of an LSTM.

        Args:
            input: ``(T, N, C)``, ``(N, T, C)`` with ``batch_first``, ``(T, C)`` of one sequence, or packed.
            lengths: frames of each sequence, ``(N,)``; what follows them is padding.

        Raises:
            ModelError: frames or states of another size, or lengths that the input has not.
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
            one, count = self.directions()[0], self.num_layers * (1 + self.bidirectional)
            for part, size in zip(hx, (one.outputs, one.units), strict=False):
                if part.shape != (count, len(x), size):
                    raise ModelError(f"a state of {tuple(part.shape)}: {(count, len(x), size)} is expected")
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

    def _through(self, x: Tensor, hx: Sequence[Tensor] | None, mask: Tensor | None) -> tuple[Tensor, list[State]]:
        """All layers on ``(N, T, C)``: outputs of the last, and the last state of each direction."""
        last: list[State] = []
        sides: list[Tensor] = []
        both = 1 + self.bidirectional
        for i, one in enumerate(directions := self.directions()):
            sizes = (one.outputs, one.units)[: 1 + (self.kind == "LSTM")]
            state = tuple(part[i] for part in hx) if hx else tuple(x.new_zeros(len(x), size) for size in sizes)
            found, state = one(x, state, mask)
            last.append(state)
            sides.append(found)
            if len(sides) == both:
                x, sides = torch.cat(sides, -1) if both == 2 else found, []
                x = self.dropout(x) if i + 1 < len(directions) else x
        return x, last


def _places(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under each of its names: one that is used twice has two."""
    return [*model.named_modules(remove_duplicate=False)]


def _replaced(model: nn.Module, make: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """A copy, with what ``make`` has another module for replaced wherever it stands."""
    copy, made = deepcopy(model), {}
    for name, module in _places(copy):
        if id(module) not in made:
            made[id(module)] = module, make(name, module)  # the module as well, so that its id stays its own
        if (new := made[id(module)][1]) is None:
            continue
        new.train(module.training)
        if not name:
            return new
        copy.set_submodule(name, new)
    return copy


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
        ModelError: a recurrent layer whose tensors something else makes (weight norm, a parametrization), or that has
            hooks, by name.

    >>> from lib.models import by_gate
    >>> from lib.shapes import prunable
    >>> theirs, x = torch.nn.GRU(4, 8, batch_first=True), torch.rand(2, 5, 4)
    >>> mine = by_gate(theirs)
    >>> list(prunable(mine))[:2], torch.allclose(mine(x)[0], theirs(x)[0], atol=1e-6)
    (['layer1.ih_reset', 'layer1.ih_update'], True)
    """

    @torch.no_grad()
    def convert(name: str, module: nn.Module) -> Recurrent | None:
        if not isinstance(module, nn.GRU | nn.LSTM):
            return None
        tensors = module._parameters
        if type(module) not in (nn.GRU, nn.LSTM) or not all(n in tensors for n in module._flat_weights_names):
            raise ModelError(
                f"{name or 'the model'} ({type(module).__name__}): its weights are made by something else, "
                "which would be lost; only torch.nn.GRU and torch.nn.LSTM as they are can be converted"
            )
        if not as_built(module, nn.GRU, nn.LSTM):
            raise ModelError(f"{name or 'the model'} ({type(module).__name__}): its hooks would be lost")
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

    return _replaced(model, convert)


def fused(model: nn.Module) -> nn.Module:
    """The way back: a copy with every `Recurrent` as torch's module, of the weights as they are, zeros and all.

    Raises:
        ModelError: a gate that does something else than a linear layer, by name: on arrays, with rounded inputs, or
            with a kernel.

    >>> from lib.models import Recurrent, fused
    >>> type(fused(Recurrent("LSTM", 4, 8))).__name__
    'LSTM'
    """

    @torch.no_grad()
    def convert(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, Recurrent):
            return None
        first = module.directions()[0]
        for part, gate in module.named_modules():
            if part.count(".") < 2 and not as_built(gate, Recurrent, Direction, nn.Dropout, nn.Linear):
                place = f"{name}.{part}" if name else part
                raise ModelError(
                    f"{place} ({type(gate).__name__}) does more than a linear layer: torch's has no place for it"
                )
        gates = first.gates("ih")
        options = {"proj_size": first.outputs} if first.hr is not None else {}
        new = getattr(nn, module.kind)(
            module.input_size,
            first.units,
            module.num_layers,
            bias=gates[0].bias is not None,
            batch_first=module.batch_first,
            dropout=module.dropout.p,
            bidirectional=module.bidirectional,
            **options,
        ).to(gates[0].weight)
        own = dict(new.named_parameters())
        for end, one in _torch_names(module):
            for part in ("ih", "hh"):
                for kind in ("weight", "bias")[: 1 + (gates[0].bias is not None)]:
                    pieces = [getattr(gate, kind) for gate in one.gates(part)]
                    whole = own[f"{kind}_{part}_{end}"].copy_(torch.cat(pieces))
                    whole.requires_grad_(any(piece.requires_grad for piece in pieces))
            if one.hr is not None:
                own[f"weight_hr_{end}"].copy_(one.hr.weight).requires_grad_(one.hr.weight.requires_grad)
        return new

    return _replaced(model, convert)


def lengths_of(x: Tensor) -> Tensor:
    """Frames of each sequence of a batch ``(N, T, C)``: those before the first that is not a number, ``(N,)``.

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
            ModelError: what is not a number within a sequence, which would be taken for 0, or behind its end anything.
        """
        lengths, time = lengths_of(x), x.shape[1]
        if (x.isnan().any(-1) != (torch.arange(time, device=x.device) >= lengths[:, None])).any():
            raise ModelError("a sequence holds NaN before its end, or numbers behind it: fill what is missing")
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
