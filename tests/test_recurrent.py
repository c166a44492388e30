"""Recurrent layers by gate compute what torch's do, and are layers like all others; sequences come with lengths."""

import wave
from copy import deepcopy
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lib import (
    channels,
    crossbar,
    data,
    export,
    faults,
    kernels,
    models,
    pruning,
    quantization,
    recipes,
    shapes,
    sharing,
    training,
)
from lib.constraint import ConstraintError, attach_masks, fitted, harden, weights
from lib.costs import network_storage
from lib.data import PADDING, DataError
from lib.kernels.recurrent import TorchDirection
from lib.models import Direction, ModelError, Recurrent, by_gate, fused, lengths_of

OPTIONS = {
    "plain": {},
    "deep": {"num_layers": 3, "dropout": 0.5},
    "both directions": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
}
MODULES = [(kind, name) for kind in (nn.GRU, nn.LSTM) for name in OPTIONS] + [(nn.LSTM, "projection")]
OPTIONS["projection"] = {"proj_size": 3, "num_layers": 2, "bidirectional": True}


def flat(out):
    """All tensors of what a recurrent module returns."""
    return [t for part in out for t in (flat(part) if isinstance(part, tuple) else [part])]


def same(found, expected):
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(flat(found), flat(expected), strict=True))


@pytest.fixture(params=MODULES, ids=lambda pair: f"{pair[0].__name__}, {pair[1]}")
def theirs(request):
    torch.manual_seed(0)
    kind, name = request.param
    return kind(5, 7, **OPTIONS[name]).eval()


class TestConversion:
    def test_outputs_states_and_gradients(self, theirs):
        mine, x = by_gate(theirs), torch.randn(4, 6, 5)
        assert same(mine(x), theirs(x))
        assert same(mine(x[:, 0]), theirs(x[:, 0]))  # one sequence, without a batch
        start = theirs(x)[1]
        assert same(mine(x, start), theirs(x, start))
        grads = [
            torch.autograd.grad(m(own := x.clone().requires_grad_())[0].square().sum(), own) for m in (mine, theirs)
        ]
        assert same(*grads)

    @pytest.mark.parametrize("sort", [True, False])
    def test_packed_batches(self, theirs, sort):
        mine, x, lengths = by_gate(theirs), torch.randn(4, 6, 5), torch.tensor([6, 4, 2, 1] if sort else [2, 6, 1, 4])
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=sort)
        found, expected = mine(packed), theirs(packed)
        assert torch.equal(found[0].batch_sizes, expected[0].batch_sizes)
        assert same([found[0].data, found[1]], [expected[0].data, expected[1]])
        padded, _ = pad_packed_sequence(expected[0], batch_first=True)
        x[torch.arange(6) >= lengths[:, None]] = 1e3  # whatever stands there
        given = x if mine.batch_first else x.transpose(0, 1)
        out, last = mine(given, lengths=lengths)
        out = out if mine.batch_first else out.transpose(0, 1)
        assert same([out, last], [padded, expected[1]])

    def test_and_back(self, theirs):
        back = fused(by_gate(theirs))
        assert type(back) is type(theirs)
        assert back.extra_repr() == theirs.extra_repr()
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), theirs.parameters(), strict=True))
        frozen = fused(by_gate(deepcopy(theirs).requires_grad_(False)))
        assert not any(p.requires_grad for p in frozen.parameters())

    def test_what_networks_ask_of_their_recurrent_layer(self, theirs):
        mine = by_gate(theirs)
        mine.flatten_parameters()
        for name in ("hidden_size", "proj_size", "num_layers", "bias", "dropout", "bidirectional", "batch_first"):
            assert getattr(mine, name) == getattr(theirs, name)

    def test_inside_a_network(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.GRU(5, 5, batch_first=True)
                self.again, self.other = self.first, nn.Sequential(nn.Linear(5, 5), nn.LSTM(5, 4))

            def forward(self, x):
                return self.other(self.again(self.first(x)[0])[0])[0]

        net, x = Twice().double(), torch.randn(2, 3, 5).double()
        net.first.weight_hh_l0.requires_grad = False
        mine = by_gate(net)
        assert mine.first is mine.again
        assert torch.allclose(mine(x), net(x))
        assert not mine.first.layer1.hh_new.weight.requires_grad
        assert not shapes.others(mine)
        assert shapes.others(net) == ["first (GRU)", "other.1 (LSTM)"]

    def test_what_is_refused(self):
        net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.GRU(4, 4), "weight_hh_l0"))
        with pytest.raises(ModelError, match=r"^0 .*made by something else"):
            by_gate(net)
        mine = nn.Sequential(Recurrent("GRU", 4, 4))
        mine[0].layer1.hh_new = kernels.CsrLinear(mine[0].layer1.hh_new)
        with pytest.raises(ModelError, match=r"0.layer1.hh_new \(CsrLinear\)"):
            fused(mine)
        hooked, tied = nn.GRU(4, 4), nn.ModuleList([nn.GRU(4, 4), nn.GRU(4, 4)])
        hooked.register_forward_hook(lambda *_: None)
        with pytest.raises(ModelError, match=r"^0 \(GRU\) does more than its class"):
            by_gate(nn.Sequential(hooked))
        tied[1].weight_hh_l0 = tied[0].weight_hh_l0
        with pytest.raises(ModelError, match="0: weight_hh_l0 is also another module's"):
            by_gate(tied)
        mine = Recurrent("GRU", 4, 4)
        mine.layer1.hh_new.weight.requires_grad = False
        with pytest.raises(ModelError, match="of weight_hh_l0 some gates are frozen"):
            fused(mine)
        mine.layer1.register_forward_hook(lambda *_: None)
        with pytest.raises(ModelError, match=r"^layer1 \(Direction\) does more"):
            fused(mine)
        for wrong in (torch.zeros(1, 1, 4), torch.zeros(3, 2, 4)):
            with pytest.raises(ModelError, match=r"\(1, 2, 4\)\] is expected"):
                Recurrent("GRU", 4, 4, batch_first=True)(torch.zeros(2, 3, 4), wrong)
        with pytest.raises(ModelError, match="numbers: 4 are expected"):
            Recurrent("GRU", 4, 4)(torch.zeros(2, 3, 5))
        with pytest.raises(ModelError, match=r"lengths \[0, 3\]"):
            Recurrent("GRU", 4, 4, batch_first=True)(torch.zeros(2, 3, 4), lengths=torch.tensor([0, 3]))
        with pytest.raises(ModelError, match="allowed are GRU"):
            Recurrent("RNN", 4, 4)
        with pytest.raises(shapes.ShapeError, match="by_gate"):
            shapes.all_layers(nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4)), "storage")


@pytest.fixture(scope="module")
def rows():
    return data.sequences(train_size=64, test_size=40, validation_size=20)


@pytest.fixture(scope="module", params=["gru", "lstm"])
def trained(request, rows):
    torch.set_num_threads(1)
    net = models.build(request.param, rows.shape, rows.classes, seed=1, units=12, layers=1, bidirectional=True)
    training.fit(net, rows, epochs=1, lr=0.01, optimizer="adam", batch_size=32)
    return net


SETS = [
    *(pruning.Unstructured(0.5), pruning.Unstructured(0.5, "global"), pruning.Filter(0.5), pruning.Column(0.5)),
    *(pruning.FilterColumn(0.5, 0.25), pruning.Block(0.5, 3, 2), pruning.PETile(0.5, 2, 2), pruning.NM(n=1, m=4)),
    *(pruning.BlockColumns(0.5, 3, 6), pruning.BlockRows(0.5, 3, 6), pruning.BlockStructured(0.5, 0.25, 3, 6)),
    *(pruning.DARB(0.5, menu=(1, 2, 4)), pruning.block_max(2), pruning.tiny_adc(4, 6)),
    *(pruning.BlockLines(0.25, 0.25, 3, 6), pruning.SharedShapes(0.5, 4, 2), pruning.AlignedLines(0.25, 0.25, 4, 2)),
    *(quantization.binary(), quantization.ternary(), quantization.uniform(4), quantization.PowerOfTwo(3)),
    *(sharing.BlockCirculant(4), sharing.Codebook(4), sharing.Unified(0.5, 0.25, 2, 2)),
]


@pytest.mark.parametrize(
    "constraint", SETS, ids=lambda c: f"{type(c).__name__} {[getattr(c, f.name) for f in fields(c)]}"
)
def test_every_set_on_every_gate(constraint, trained, rows):
    net, gates = deepcopy(trained), [name for name in shapes.prunable(trained) if "rnn" in name]
    assert len(gates) == 2 * 2 * len(models.Direction(net.rnn.kind, 1, 1).gates("ih"))
    plan = fitted(net, dict.fromkeys(gates, constraint))
    if constraint.masklike:
        masks = recipes.one_shot(net, plan)
        training.fit(attach_masks(net, masks), rows, epochs=1, lr=0.01, batch_size=64)
        assert all(not w[~masks[name]].any() for name, w in weights(net, plan).items())
        assert sum(int(mask.sum()) for mask in masks.values()) < sum(mask.numel() for mask in masks.values())
    else:
        recipes.straight_through(net, plan, rows, epochs=1, lr=0.01, batch_size=64)
        harden(net, plan)
    assert all(plan[name].member(w) for name, w in weights(net, plan).items() if plan[name].per_layer)
    back = fused(net)  # torch's own module, of the same weights
    assert torch.allclose(back.rnn(rows.test.x.nan_to_num())[0], net.rnn(rows.test.x.nan_to_num())[0], atol=1e-5)
    assert set(network_storage(net, plan, 8, skip=True)["layer"]) >= set(gates)


@pytest.mark.parametrize("mapping", ["offset", "two_column", "differential"])
def test_faults_by_gate(mapping, trained, rows):
    healthy = training.evaluate(trained, rows.test)
    found = faults.sweep(trained, mapping, [0.0, 0.5], 2, rows.test)
    assert (found[found["rate"] == 0]["accuracy"] == healthy).all()
    hook = faults.UnderFaults(mapping, faults.StuckAt(0.1))
    before = weights(net := deepcopy(trained), dict.fromkeys(shapes.prunable(trained)))
    before = {name: w.clone() for name, w in before.items()}
    training.fit(net, rows, epochs=1, lr=0.01, hooks=(hook,))
    assert all((weights(net, dict.fromkeys(before))[name] != w).any() for name, w in before.items())


def test_accounts_and_arrays_by_gate(trained, rows, tmp_path):
    gates = len(trained.rnn.layer1.gates("ih"))
    found = shapes.layer_shapes(trained, rows.shape).set_index("layer")
    time, size = rows.shape
    assert (found.filter(like="rnn", axis=0)["vectors"] == time).all()
    per_frame = found.filter(like="rnn", axis=0)["macs"].sum() / time
    assert per_frame == 2 * gates * 12 * (size + 12)
    assert found.loc["fc", "rows"] == 24
    arrays = crossbar.on_arrays(trained, crossbar.Array(), rows.train.x[:16])
    assert torch.nn.functional.mse_loss(arrays(rows.test.x), trained(rows.test.x)) < 1e-3
    rounded = quantization.quantize_activations(deepcopy(trained), 8, rows.train.x)
    assert torch.nn.functional.mse_loss(rounded(rows.test.x), trained(rows.test.x)) < 1e-3
    export.save(trained, tmp_path / "net.cw")
    assert torch.equal(export.restore(deepcopy(trained), tmp_path / "net.cw")(rows.test.x), trained(rows.test.x))
    with pytest.raises(ConstraintError, match="rnn"):
        channels.compact(trained, rows.test.x[:2])


def test_a_recipe_from_dense_to_compiled(trained, rows):
    net = deepcopy(trained)
    plan = dict.fromkeys([n for n in shapes.prunable(net) if "rnn" in n], pruning.BlockStructured(0.5, 0.25, 4, 6))
    recipes.admm(net, plan, rows, epochs=1, lr=0.01, rho=0.1, pairs="split", batch_size=64)
    recipes.one_shot(net, plan)
    for gain in (0.0, 1e9):
        fast = kernels.compile(net, rows.test.x[:1], gain=gain)
        assert torch.allclose(fast(rows.test.x), net(rows.test.x), atol=1e-5)


class TestKernels:
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("kind", ["GRU", "LSTM"])
    @pytest.mark.parametrize("new", [kernels.GroupedDirection, TorchDirection])
    def test_a_direction(self, new, kind, bias, reverse):
        torch.manual_seed(0)
        one = Direction(kind, 20, 24, bias, reverse=reverse)
        for gate in one.gates("hh") + one.gates("ih")[:1]:
            gate.weight.data[:16, torch.rand(gate.in_features) < 0.8] = 0
            gate.weight.data[20] = 0
        state = tuple(torch.randn(3, 24) for _ in range(1 + (kind == "LSTM")))
        before = [part.clone() for part in state]
        mask = torch.arange(6) < torch.tensor([2, 6, 4])[:, None]
        with torch.no_grad():
            for x in (torch.randn(3, 6, 20), torch.randn(3, 20, 6).transpose(1, 2)):  # memory in another order
                for given in ((x, state), (x, state, mask)):
                    assert same(new(one)(*given), one(*given))
        assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))  # the state given stays

    @pytest.mark.parametrize("kind", ["GRU", "LSTM"])
    def test_saturated_gates(self, kind):
        one = Direction(kind, 2, 3)
        for gate in one.gates("ih"):
            gate.weight.data *= 1e3
        x, state = torch.randn(1, 9, 2), (torch.zeros(1, 3),) * (1 + (kind == "LSTM"))
        with torch.no_grad():
            assert same(kernels.GroupedDirection(one)(x, state), one(x, state))

    def test_compiled_by_direction(self):
        net = models.build("lstm", (6, 5), 3, units=8, bidirectional=True).eval()
        x = torch.randn(2, 6, 5)
        dense = kernels.compile(net, x, repeats=3)
        assert dense.choices["kernel"].tolist() == ["dense"] * 5
        net.rnn.layer2.hh_cell.weight.data[1:] = 0
        fast = kernels.compile(net, x, repeats=3, gain=0.0)
        assert fast.choices["layer"][fast.choices["kernel"] == "grouped rows"].tolist() == ["rnn.layer2"]
        x[0, 3:] = torch.nan
        with torch.no_grad():
            assert same([fast(x), fast(x[:1])], [net(x), net(x[:1])])
        projected = nn.Sequential(Recurrent("LSTM", 4, 6, proj_size=2, batch_first=True))
        projected[0].layer1.hr.weight.data[0] = 0
        assert kernels.compile(projected, torch.randn(1, 3, 4)).choices["kernel"].tolist() == ["dense"]

    def test_what_is_refused(self):
        with pytest.raises(kernels.KernelError, match="without one are allowed"):
            kernels.GroupedDirection(Direction("LSTM", 2, 3, projection=2))
        with pytest.raises(kernels.KernelError, match=r"\(N, T, 2\) of float32"):
            kernels.GroupedDirection(Direction("GRU", 2, 3))(torch.zeros(1, 4, 3), (torch.zeros(1, 3),))


class TestSequences:
    def test_rows_begin_and_end_with_something(self, rows):
        lengths = lengths_of(rows.train.x)
        assert rows.shape == (28, 28)
        assert 1 <= int(lengths.min()) < int(lengths.max()) <= 28
        raw = data.load(train_size=64, test_size=40, validation_size=20)
        assert raw.classes == rows.classes
        assert rows.train.y.unique().numel() > 5

    def test_no_padding_is_learned_from(self, rows):
        net = models.build("gru", rows.shape, rows.classes, units=8)
        short = rows.train.x[:1, : int(lengths_of(rows.train.x[:1]))]
        assert torch.allclose(net(rows.train.x)[0], net(short)[0], atol=1e-6)

    def test_missing_values_are_no_end(self):
        nan = torch.nan
        x = torch.tensor([[[1.0, 1], [nan, 1], [nan, nan], [4, 4]], [[1, 1], [2, 2], [3, 3], [nan, nan]]])
        assert lengths_of(x).tolist() == [2, 3]
        net = models.build("gru", (4, 2), 3, units=4, layers=1)
        assert net(x[1:]).isfinite().all()
        for wrong in (x[:1, :2], x[:1, [0, 2, 3]]):
            with pytest.raises(ModelError, match="NaN before the end of a sequence"):
                net(wrong)

    def test_sounds(self, tmp_path):
        for part in ("train", "test"):
            for label, hertz in (("low", 300), ("high", 3000)):
                (folder := tmp_path / part / label).mkdir(parents=True)
                for i in range(6):
                    tone = np.sin(np.arange(600 + 200 * i) * 2 * np.pi * hertz / 8000) * 2**14
                    with wave.open(str(folder / f"{i}.wav"), "wb") as file:
                        file.setparams((1, 2, 8000, 0, "NONE", ""))
                        file.writeframes(tone.astype("<i2").tobytes())
        found = data.sequences(str(tmp_path))
        assert (found.classes, found.train.x.shape[1:], len(found.test)) == (2, (1 + (1600 - 256) // 128, 32), 12)
        peak = torch.tensor(
            [x[: int(n)].mean(0).argmax() for x, n in zip(found.test.x, lengths_of(found.test.x), strict=True)]
        )
        assert (peak[found.test.y == 0] > peak[found.test.y == 1].max()).all()  # classes by name: high, low
        with pytest.raises(DataError, match=r"longest = 5: .* 11 frames"):
            data.sequences(str(tmp_path), longest=5)
        for file in (tmp_path / "test").glob("*/*.wav"):
            with wave.open(str(file), "rb") as sound:
                frames = sound.readframes(sound.getnframes())
            with wave.open(str(file), "wb") as sound:
                sound.setparams((1, 2, 16000, 0, "NONE", ""))
                sound.writeframes(frames)
        with pytest.raises(DataError, match=r"has 16000 samples a second, .* has 8000: one rate is allowed"):
            data.sequences(str(tmp_path))
        (tmp_path / "train" / "low" / "0.wav").write_bytes(b"RIFF")
        with pytest.raises(DataError, match=r"0.wav cannot be read"):
            data.sequences(str(tmp_path))

    def test_text(self, tmp_path):
        (path := tmp_path / "few.txt").write_text("\n\n".join(["ab", "abc"] * 10))
        found = data.sequences(str(path), validation_size=3)
        assert (found.classes, found.shape, found.test.y.shape) == (4, (3, 4), (2, 3))
        x, y = found.train.x, found.train.y
        inside = torch.arange(3) < lengths_of(x)[:, None]
        assert ((y != PADDING) == inside).all()
        assert (x[:, 1:].argmax(-1)[inside[:, 1:]] == y[:, :-1][inside[:, 1:]]).all()  # the next one
        net = models.build("gru", found.shape, found.classes, units=4, each=True)
        assert net(x).shape == (len(x), 4, 3)
        log = training.fit(net, found, epochs=3, lr=0.05, optimizer="adam")
        assert log["train_loss"].is_monotonic_decreasing

    def test_recordings_are_told_by_the_ends_of_their_names(self, tmp_path):
        (folder := tmp_path / "speech" / "fsdd").mkdir(parents=True)
        for name in ("3_my_name_0.wav", "3_my_name_7.wav", "4_x_y.wav"):
            (folder / name).write_bytes(b"RIFF")
        with pytest.raises(DataError, match=r"4_x_y.wav is no <digit>_<speaker>_<index>.wav"):
            data.sequences("spoken_digits", tmp_path)
        (folder / "4_x_y.wav").unlink()
        with pytest.raises(DataError, match=r"3_my_name_7.wav cannot be read"):
            data.sequences("spoken_digits", tmp_path)

    def test_what_is_refused(self, tmp_path):
        for wrong, said in (
            ({"name": "cifar10"}, "are unknown: allowed are fashion_mnist, mnist"),
            ({"name": "spoken_digits", "root": tmp_path}, "no <digit>_<speaker>_<index>.wav"),
            ({"name": str(tmp_path / "no.txt")}, "cannot be read as a text"),
            ({"train_size": -1}, "train_size = -1"),
            ({"test_size": 10**6}, "has 10000 such sequences"),
        ):
            with pytest.raises(DataError, match=said):
                data.sequences(**wrong)
        with pytest.raises(ModelError, match="takes sequences"):
            models.build("gru", (1, 28, 28), 10)
