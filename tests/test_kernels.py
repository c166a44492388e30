"""Compiled kernels compute what dense layers do, to the rounding of float32, and say what they are made of."""

import os
import random
import subprocess
import sys
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import nn

from lib import costs, export, kernels, models, pruning, quantization, shapes
from lib.constraint import harden
from lib.kernels import (
    BalancedLinear,
    BalancedRows,
    CompressedRows,
    CsrLinear,
    GroupedConv2d,
    GroupedLinear,
    GroupedRows,
    KernelError,
    SparseConv,
    SparseConv2d,
)
from lib.kernels.convolutions import _strip
from lib.kernels.network import candidates
from lib.shapes import ShapeError


def near(found, expected):
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * largest + 1e-7)


def thinned(layer, kept, seed):
    """The layer with that share of its weights."""
    mask = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) < kept
    mask.view(-1)[0] = True
    layer.weight.data *= mask
    return layer


@pytest.mark.parametrize("seed", range(40))
def test_convolutions_of_any_shape(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    groups = rng.choice([1, 1, 2, 3])
    kernel = (rng.randint(1, 4), rng.randint(1, 4))
    options = {
        "stride": (rng.randint(1, 3), rng.randint(1, 3)),
        "padding": (rng.randint(0, 2), rng.randint(0, 2)),
        "dilation": (rng.randint(1, 2), rng.randint(1, 2)),
        "groups": groups,
        "bias": rng.random() < 0.5,
    }
    layer = thinned(nn.Conv2d(groups * rng.randint(1, 4), groups * rng.randint(1, 5), kernel, **options), 0.4, seed)
    x = torch.randn(rng.randint(1, 3), layer.in_channels, rng.randint(8, 40), rng.randint(8, 40))
    with torch.no_grad():
        assert near(SparseConv2d(layer)(x), layer(x))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("size", [5, 8, 28, 33])
def test_patterns_share_an_index(share, size):
    torch.manual_seed(size)
    layer = nn.Conv2d(6, 10, 3, padding=1)
    weight = layer.weight.data
    for f in range(10):
        for c in range(6):
            taps = [(0, 1, 3, 4), (1, 2, 4, 5), (4, 5, 7, 8), ()][(f + c) % 4]
            weight[f, c].view(-1)[[i for i in range(9) if i not in taps]] = 0
    kernel = SparseConv2d(layer, share=share)
    assert (kernel.format, len(kernel.kept.patterns)) == ("patterns", 3)
    irregular = SparseConv2d(layer, patterns=False)
    assert irregular.format == "irregular"
    x = torch.randn(2, 6, size, size)
    with torch.no_grad():
        assert near(kernel(x), layer(x))
        assert near(irregular(x), layer(x))
        asked = SparseConv2d(layer, share=share, reorder=False)
        assert near(asked(x), layer(x))
    assert asked.kept.bounds.shape == (10, 2)
    assert len(asked.kept.which) == len(kernel.kept.channels) > len(kernel.kept.which) == 0
    assert asked.kept.storage(8).index == 46 * (3 + 2) + 20 * 6  # a channel and a pattern each, and two ends a filter
    kept = int(weight.count_nonzero())
    assert kernel.kept.storage(8).data == irregular.kept.storage(8).data == 8 * kept
    assert len(irregular.kept.channels) == kept == 4 * len(kernel.kept.channels)
    assert kernel.kept.storage(8).index < irregular.kept.storage(8).index


@pytest.mark.parametrize("seed", range(8))
def test_filters_that_share_columns(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kernel = (rng.randint(1, 3), rng.randint(1, 3))
    options = {"stride": (rng.randint(1, 3), rng.randint(1, 2)), "padding": (rng.randint(0, 2), rng.randint(0, 2))}
    options |= {"dilation": (rng.randint(1, 2), rng.randint(1, 3)), "bias": rng.random() < 0.5}
    layer = nn.Conv2d(rng.randint(1, 6), 12, kernel, **options)
    layer.weight.data = pruning.BlockColumns(0.5, height=5, width=4).project(layer.weight.data)
    x = torch.randn(rng.randint(1, 3), layer.in_channels, rng.randint(8, 20), rng.randint(8, 20))
    with torch.no_grad():
        assert near(GroupedConv2d(layer)(x), layer(x))


@pytest.mark.parametrize("seed", range(12))
def test_patterns_of_any_shape(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kernel, padding = (rng.randint(2, 4), rng.randint(2, 4)), (rng.randint(0, 2), rng.randint(0, 2))
    groups, taps = rng.choice([1, 1, 2]), rng.randint(2, 4)
    layer = nn.Conv2d(groups * rng.randint(2, 6), groups * rng.randint(2, 7), kernel, padding=padding, groups=groups)
    menu = [rng.sample(range(kernel[0] * kernel[1]), taps) for _ in range(rng.randint(1, 8))]
    for i, one in enumerate(layer.weight.data.flatten(0, 1).flatten(1)):
        left = rng.choice([[], *menu]) if i else menu[0]  # one kernel at least is kept
        one[[tap for tap in range(len(one)) if tap not in left]] = 0
    x = torch.randn(rng.randint(1, 4), layer.in_channels, rng.randint(4, 40), rng.randint(4, 40))
    options = {"share": rng.random() < 0.5, "reorder": rng.random() < 0.5}
    with torch.no_grad():
        assert near((fast := SparseConv2d(layer, **options))(x), layer(x))
    assert fast.format == "patterns"


def test_strips_fill_the_registers_and_waste_little():
    assert _strip(28, 28) == (2, 4)
    for height in range(1, 60):
        rows, vectors = _strip(height, height)
        assert rows * vectors <= 12
        assert -(-height // rows) * rows <= height + 3


@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (0,)])
@pytest.mark.parametrize("kind", [GroupedLinear, CsrLinear])
def test_linear_layers(batch, kind):
    torch.manual_seed(len(batch))
    layer = nn.Linear(40, 24)
    layer.weight.data[:8, ::2] = 0  # columns by groups of rows, a row without any
    layer.weight.data[8:16, 5:] = 0
    layer.weight.data[20] = 0
    x = torch.randn(*batch, 40)
    with torch.no_grad():
        found = kind(layer)(x)
        assert found.shape == (*batch, 24)
        assert near(found, layer(x))


@pytest.mark.parametrize("seed", range(12))
def test_matrices_of_any_shape(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layer = nn.Linear(rng.randint(1, 90), rng.randint(1, 70), bias=rng.random() < 0.5)
    x = torch.randn(*rng.choice([(), (1,), (rng.randint(2, 40),), (3, rng.randint(1, 5))]), layer.in_features)
    m = rng.choice([4, 8, 16])
    sets = {
        GroupedLinear: pruning.BlockColumns(rng.random() * 0.9, height=rng.randint(1, 9), width=rng.randint(1, 30)),
        CsrLinear: pruning.Unstructured(rng.random() * 0.9),
        BalancedLinear: pruning.NM(rng.randint(1, m // 2), m),
    }
    for kind, allowed in sets.items():
        net = harden(nn.Sequential(deepcopy(layer)), {"0": allowed})[0]
        with torch.no_grad():
            assert near((kind(net, m) if kind is BalancedLinear else kind(net))(x), net(x))


def test_bits_of_a_matrix_by_hand():
    """Two groups of four and three rows, of 3 and 5 columns among 16; a row without any weight."""
    weight = torch.zeros(8, 16)
    weight[:4, [1, 2, 9]], weight[4:7, [0, 3, 4, 8, 15]] = 1.0, 2.0
    kept = GroupedRows.of(weight).storage(bits=8)
    assert kept.data == 8 * (4 * 3 + 3 * 5)
    assert kept.index == 7 * 3 + 8 * 4 + (3 + 3) * 4  # rows, columns, and where groups' rows and columns begin
    rows = CompressedRows.of(weight).storage(bits=8)
    assert (rows.data, rows.index) == (8 * 27, 27 * 4 + 9 * 5)  # a column for each weight, and nine starts


ONE_THREAD = """
import torch, numpy, time  # before lib, whose environment comes too late then
from lib.kernels import GroupedConv2d, GroupedLinear
torch.set_num_threads(1)
linear, conv = GroupedLinear(torch.nn.Linear(2000, 2000)), GroupedConv2d(torch.nn.Conv2d(128, 128, 3))
x, images = torch.rand(128, 2000), torch.rand(1, 128, 30, 30)
for call in (lambda: linear(x), lambda: conv(images)):
    call()
    own, all_ = time.thread_time(), time.process_time()
    for _ in range(10):
        call()
    print((time.process_time() - all_) / (time.thread_time() - own))
"""


def test_products_keep_to_the_threads_that_torch_has():
    """CPU time of the process is that of the thread: with a second thread it would be about twice."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", ONE_THREAD], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(map(float, done.stdout.split())) < 1.3


def test_every_turn_has_an_order_of_its_own():
    seen = []
    assert len(kernels.in_turns([lambda i=i: seen.append(i) for i in range(4)], repeats=30)) == 4
    turns = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    assert all(sorted(turn) == [0, 1, 2, 3] for turn in turns)
    assert turns[0] == [0, 1, 2, 3]  # which compiles
    after = {(a, b) for turn in turns[1:] for a, b in pairwise(turn)}
    assert len(after) == 12  # every call comes after every other one


def test_groups_of_rows_are_their_matrix():
    weight = torch.zeros(12, 16)
    weight[::3, 1:5], weight[1::3, [0, 7, 9]] = torch.randn(4, 4), torch.randn(4, 3)
    kept = GroupedRows.of(weight)
    assert (len(kept.offset), len(kept.reorder), len(kept.index), len(kept.values)) == (3, 8, 7, 28)
    again, at = torch.zeros(12, 16), 0
    for g in range(2):
        rows = kept.reorder[kept.offset[g] : kept.offset[g + 1]]
        columns = kept.index[kept.stride[g] : kept.stride[g + 1]]
        for column in columns:
            again[rows, column] = torch.from_numpy(kept.values[at : at + len(rows)])
            at += len(rows)
    assert torch.equal(again, weight)


@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 8), (3, 16)])
@pytest.mark.parametrize("columns", [40, 43])
def test_n_of_m(batch, n, m, columns):
    torch.manual_seed(n)
    layer = nn.Linear(columns, 24)
    layer.weight.data = pruning.NM(n, m).project(layer.weight.data)
    layer.weight.data[20] = 0
    kernel, x = BalancedLinear(layer, m), torch.randn(*batch, columns)
    assert (kernel.format, kernel.kept.values.shape) == (f"{n}:{m}", (24, -(-columns // m) * n))
    with torch.no_grad():
        assert near(kernel(x), layer(x))


def test_a_network_of_n_of_m_gets_its_kernel():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 40))
    net[0].weight.data = pruning.NM(1, 8).project(net[0].weight.data)
    kernel = candidates(net[0])[-1]
    assert (kernel.format, kernel.kept.storage(8)) == ("1:8", (8 * 512 * 64, 3 * 512 * 64, 0))
    assert not any(isinstance(k, BalancedLinear) for k in candidates(net[1]))
    fast, x = kernels.compile(net, torch.randn(1, 512), gain=0.0), torch.randn(1, 512)
    assert near(fast(x), net(x).detach())


def test_a_network_is_the_same_and_says_what_it_chose():
    torch.manual_seed(0)
    net = models.build("vgg", (3, 32, 32), 10)
    plan = pruning.uniform_plan(net, pruning.Unstructured(0.95))
    net = harden(net, plan).eval()
    x = torch.randn(2, 3, 32, 32)
    fast = kernels.compile(net, x, repeats=3, gain=0.0)
    chosen = fast.choices.set_index("layer")
    assert [*chosen.index] == [*plan]
    known = {"irregular", "patterns", "grouped rows", "grouped filters", "compressed sparse rows"}
    assert {kernel for kernel in chosen["kernel"] if ":" not in kernel} <= known  # else n:m
    with torch.no_grad():
        assert near(fast(x), net(x))
        assert near(fast(x[:1]), net(x[:1]))  # another batch
    dense = kernels.compile(models.build("vgg", (3, 32, 32), 10), x, repeats=3)
    assert set(dense.choices["kernel"]) == {"dense"}
    slow = kernels.compile(net, x, repeats=3, gain=1e9)
    assert set(slow.choices["kernel"]) == {"dense"}
    assert set(dense.choices["why"]) == {"no zeros"}
    assert all(why.endswith("times as fast") for why in slow.choices["why"])
    assert set(chosen["why"]) == {""}


def test_a_layer_that_stays_dense_says_why():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.audio, self.wide, self.never = nn.Conv1d(1, 4, 3), nn.Linear(4 * 30, 8), nn.Linear(8, 8)
            self.named, self.hooked = nn.Linear(8, 8), nn.Linear(8, 8)
            self.hooked.register_forward_pre_hook(lambda layer, x: (x[0].round(),))

        def forward(self, x):
            return self.hooked(self.named(input=self.wide(self.audio(x).flatten(1))))

    net = Net().eval()
    for layer in (net.audio, net.never, net.named, net.hooked):
        thin(layer, 0.5)
    found = kernels.compile(net, torch.randn(2, 1, 32), repeats=3, gain=0.0).choices.set_index("layer")
    assert set(found["kernel"]) == {"dense"}
    assert found["why"].to_dict() == {
        "audio": "no kernel is for a Conv1d",
        "wide": "no zeros",
        "never": "the example never meets it",
        "named": "its inputs are named",
        "hooked": "a hook, or a forward pass of its own",
    }


def test_the_network_given_stays_as_it_was():
    net = nn.Sequential(thinned(nn.Linear(30, 20), 0.1, 0))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    kernels.compile(net, torch.randn(1, 30), gain=0.0)
    assert isinstance(net[0], nn.Linear)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("threads", [1, 2])
def test_a_network_is_compiled_for_a_number_of_threads(threads):
    net, before = nn.Sequential(thinned(nn.Linear(300, 200), 0.1, 0)), torch.get_num_threads()
    x = torch.randn(1, 300)
    fast = kernels.compile(net, x, gain=0.0, threads=threads)
    assert (torch.get_num_threads(), fast.choices.attrs["threads"]) == (before, threads)
    assert near(fast(x), net(x).detach())
    with pytest.raises(KernelError, match="threads = 0"):
        kernels.compile(net, x, threads=0)


def test_refusals():
    with pytest.raises(KernelError, match="without any weight"):
        SparseConv.of(torch.zeros(2, 3, 3, 3))
    with pytest.raises(KernelError, match="without any weight"):
        SparseConv2d(thinned(nn.Conv2d(1, 1, 1), 0.0, 0).apply(lambda layer: layer.weight.data.zero_()))
    kernel = SparseConv2d(thinned(nn.Conv2d(2, 2, 3), 0.5, 0))
    with pytest.raises(KernelError, match=r"inputs \(1, 3, 9, 9\), torch.float32 on cpu: \(N, 2, H, W\) of float32"):
        kernel(torch.zeros(1, 3, 9, 9))
    with pytest.raises(KernelError, match=r"torch\.float64"):
        kernel(torch.zeros(1, 2, 9, 9, dtype=torch.float64))
    with pytest.raises(KernelError, match="images of 2 x 9 are smaller than the kernel"):
        kernel(torch.zeros(1, 2, 2, 9))
    with pytest.raises(KernelError, match=r"\(\.\.\., 8\) of float32"):
        GroupedLinear(nn.Linear(8, 2))(torch.zeros(3, 7))
    with pytest.raises(KernelError, match="groups = 2"):
        GroupedConv2d(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(KernelError, match=r"\(N, 4, H, W\) of float32"):
        GroupedConv2d(nn.Conv2d(4, 4, 3))(torch.zeros(1, 3, 9, 9))
    with pytest.raises(KernelError, match=r"\(\.\.\., 8\) of float32"):
        BalancedLinear(nn.Linear(8, 2))(torch.zeros(3, 7))
    with pytest.raises(KernelError, match="m = 0"):
        BalancedRows.of(torch.ones(2, 2), 0)


def test_storage_of_an_irregular_kernel_counts_every_weight():
    weight = torch.zeros(4, 4, 3, 3)
    weight[0, 0, 0, 0] = weight[1, 2, 1, 2] = weight[3, 3, 2, 0] = 1.0
    kept = SparseConv.of(weight, patterns=False)
    assert (kept.storage(16).data, len(kept.patterns)) == (48, 9)


def thin(layer, kept=0.03):
    layer.weight.data *= torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1)) < kept
    return layer


class TestWhatStandsInANetwork:
    @pytest.fixture
    def net(self):
        return nn.Sequential(thin(nn.Linear(400, 400)), nn.ReLU(), nn.Linear(400, 10)).eval()

    def test_a_compiled_layer_is_no_layer_that_an_account_could_miss(self, net, tmp_path):
        fast = kernels.compile(net, torch.rand(1, 400), gain=0)  # whatever is faster today
        with pytest.raises(ShapeError, match=r"storage.*the model also has 0 "):
            costs.network_storage(fast, {}, 8)
        with pytest.raises(ShapeError, match="the model also has 0 "):
            shapes.macs(fast, (400,))
        with pytest.raises(export.ExportError, match="0: its weights are in no state_dict"):
            export.save(fast, tmp_path / "fast.safetensors")

    def test_a_layer_with_a_hook_stays(self, net):
        quantization.quantize_activations(net, 2, torch.rand(64, 400))
        fast, x = kernels.compile(net, torch.rand(1, 400), gain=0), torch.rand(1, 400)
        assert fast.choices["kernel"].tolist() == ["dense", "dense"]
        assert torch.equal(fast(x), net(x))

    def test_layers_of_other_numbers_and_subclasses_stay(self, net):
        class Doubled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        gru = models.by_gate(nn.Sequential(nn.GRU(8, 8, batch_first=True)))
        gru[0].layer1.hh_new.weight.data.zero_()
        for other, x in (
            (nn.Sequential(thin(Doubled(40, 8), 0.1)), torch.rand(2, 40)),
            (net.double(), torch.rand(2, 400).double()),
            (gru.bfloat16(), torch.rand(2, 5, 8).bfloat16()),
        ):
            assert set(kernels.compile(other, x, repeats=3, gain=0.0).choices["kernel"]) == {"dense"}

    def test_gates_that_are_frozen_in_part(self):
        gru = models.by_gate(nn.Sequential(nn.GRU(8, 8, batch_first=True)))
        gru[0].layer1.hh_new.weight.requires_grad_(False).zero_()
        fast = kernels.compile(gru, torch.rand(2, 5, 8), repeats=3, gain=0.0)
        assert fast.choices["kernel"].tolist() == ["grouped rows"]

    def test_networks_with_draws_and_infinite_outputs(self, net):
        class Drawn(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, x):
                y = self.net(x) + torch.rand(10)
                return {"scores": y.where(y > y.mean(), -torch.inf), "any": y > 0}

        fast = kernels.compile(Drawn(), torch.rand(1, 400), repeats=3, gain=0.0)
        assert fast.choices["kernel"].tolist() != ["dense", "dense"]

    @pytest.mark.parametrize("called", ["functional", "keyword"])
    def test_a_network_that_reads_the_weight_itself_stays_dense(self, called):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.enc = thin(nn.Linear(400, 400))

            def forward(self, x):
                if called == "keyword":
                    return self.enc(input=x)
                return nn.functional.linear(self.enc(x).relu(), self.enc.weight.t())

        net, x = Tied().eval(), torch.rand(1, 400)
        fast = kernels.compile(net, x, gain=0)
        assert fast.choices["kernel"].tolist() == ["dense"]
        assert torch.equal(fast(x), net(x))


def test_a_network_that_uses_a_layer_twice_is_compiled():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.last = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.last(self.again(self.again(self.first(x)).relu()).relu())

    net, x = Twice().eval(), torch.rand(4, 64)
    harden(net, pruning.uniform_plan(net, pruning.NM(4, 16), keep_dense=("last",)))
    assert torch.allclose(kernels.compile(net, x, repeats=1, gain=0.0)(x), net(x), atol=1e-6)
