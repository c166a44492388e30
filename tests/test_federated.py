"""Federated averaging: exact sums in shares, dropouts anywhere, bytes as sent, and what is refused."""

import os
import sys
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from lib import pruning, recipes
from lib.constraint import masks, sparsity, state_of
from lib.recipes import FixedPoint, Server, dirichlet_split, fed_avg, federated, group_split, in_shares, local_clients
from lib.recipes.federated import STAGES
from lib.recipes.shares import paillier_sum
from lib.training import TrainingError, metered


@dataclass(frozen=True)
class Adds:
    """A client that adds a constant to what is not masked."""

    number: float
    size: int = 1

    def __call__(self, model, round):
        for p in model.parameters():
            p.data += self.number


def test_who_leaves_has_nothing_to_do_with_who_is_asked():
    """NumPy seeds [seed, round, 0] like [seed, round], with which the server draws."""
    leaves = recipes.dropouts(0.4, seed=3)
    for client in range(3):
        asked = [np.random.default_rng([3, r]).random() < 0.4 for r in range(1000)]
        gone = [leaves(r, client) != "" for r in range(1000)]
        assert abs(np.corrcoef(asked, gone)[0, 1]) < 0.15


def fails(model, round):
    raise RuntimeError("out of memory")


def dies(model, round):
    os._exit(9)


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))  # 32 weights and 6 biases


def moved(clients, **options):
    net = tiny()
    before = state_of(net)
    log = fed_avg(net, clients, rounds=1, **options)
    return {key: value - before[key] for key, value in state_of(net).items()}, log


class TestShares:
    def test_a_sum_is_that_of_the_whole_numbers_exactly(self):
        random = np.random.default_rng(0)
        point, n = FixedPoint(clients=7, fraction_bits=16), 10_000
        values = [torch.randn(n, dtype=torch.float64) * point.largest / 6 for _ in range(7)]
        values = [v.clamp(-point.largest, point.largest) for v in values]
        plain = sum(torch.round(v * 2**16).long() for v in values)
        first, second = Server(), Server()
        for client, v in enumerate(values):
            one, other = in_shares(point.encode("x", v), random)
            first.receive(client, one)
            second.receive(client, other)
        total = point.decode(first.total(range(7)) + second.total(range(7)))
        assert torch.equal((total * 2**16).long(), plain)

    def test_the_largest_numbers_of_all_clients_still_add_up(self):
        point = FixedPoint(clients=5, fraction_bits=20)
        for sign in (1, -1):
            word = point.encode("x", torch.tensor([sign * point.largest], dtype=torch.float64))
            total = point.decode(np.sum([word] * 5, axis=0, dtype=np.uint32))
            assert total.item() == pytest.approx(5 * sign * point.largest, rel=1e-12)

    @pytest.mark.parametrize("secret", [0, 1, 2**31, 2**32 - 1])
    def test_one_view_is_uniform_whatever_is_shared(self, secret):
        """Every byte of a share takes 256 values alike: chi squared, at a level that no seed but a broken one meets."""
        words = np.full(40_000, secret, np.uint32)
        for share in in_shares(words, np.random.default_rng(1)):
            for byte in share.view(np.uint8).reshape(-1, 4).T:
                assert stats.chisquare(np.bincount(byte, minlength=256)).pvalue > 1e-6
        one, other = in_shares(words, np.random.default_rng(1))
        assert (one + other == words).all()

    def test_refusals(self):
        with pytest.raises(TrainingError, match=r"conv1.weight is from -2 to 9000: 16 fraction bits and a sum over 10"):
            FixedPoint(10).encode("conv1.weight", torch.tensor([-2.0, 9000.0]))
        with pytest.raises(TrainingError, match="fc is from nan"):
            FixedPoint(10).encode("fc", torch.tensor([float("nan")]))
        server = Server()
        server.receive(0, np.zeros(3, np.uint32))
        server.receive(4, np.zeros(2, np.uint32))
        with pytest.raises(TrainingError, match="different lengths: 3 of client 0, 2 of client 4"):
            server.total([0, 4])


class TestPaillier:
    @pytest.mark.parametrize("slots", [0, 1])
    def test_a_sum_of_ciphertexts_is_that_of_the_words(self, slots):
        pytest.importorskip("phe")
        words = np.random.default_rng(0).integers(2**31, 2**32, (3, 9), dtype=np.uint32)  # all three sums overflow
        sums, seconds = paillier_sum(words, 256, slots)
        assert (sums == np.sum(words, axis=0, dtype=np.uint32)).all()
        assert seconds["slots"] == (slots or 255 // 34)
        assert min(seconds.values()) >= 0

    def test_refusals(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "phe", None)
        with pytest.raises(TrainingError, match="needs the package phe"):
            paillier_sum(np.zeros((2, 3), np.uint32), 256)

    def test_more_words_than_a_key_holds(self):
        pytest.importorskip("phe")
        with pytest.raises(TrainingError, match="slots=8: a key of 256 bits has room for 7 of 33 bits"):
            paillier_sum(np.zeros((2, 9), np.uint32), 256, slots=8)


class TestSplits:
    @pytest.mark.parametrize("alpha", [0.1, 1.0, float("inf")])
    def test_every_example_goes_to_one_client(self, alpha):
        labels = torch.arange(500) % 10
        parts = dirichlet_split(labels, 7, alpha, seed=3, least=2)
        assert sorted(torch.cat(parts).tolist()) == list(range(500))
        assert min(map(len, parts)) >= 2
        again = dirichlet_split(labels, 7, alpha, seed=3, least=2)
        assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))

    def test_a_small_alpha_leaves_few_classes(self):
        labels = torch.arange(2000) % 10
        shares = []
        for alpha in (0.1, 100.0):
            parts = dirichlet_split(labels, 5, alpha, seed=0)
            shares.append(np.mean([torch.bincount(labels[p]).max() / len(p) for p in parts]))
        assert shares[0] > 0.3 > 0.15 > shares[1]

    def test_groups(self):
        parts = group_split(torch.tensor([5, 2, 5, 9]).tolist())
        assert [part.tolist() for part in parts] == [[1], [0, 2], [3]]
        for groups in (torch.tensor([5, 2, 5, 9]), np.array([5, 2, 5, 9])):
            assert all(torch.equal(a, b) for a, b in zip(group_split(groups), parts, strict=True))
        pairs = group_split([("ada", 1), ("bob", 2), ("ada", 1)])
        assert [part.tolist() for part in pairs] == [[0, 2], [1]]

    def test_refusals(self, images):
        with pytest.raises(TrainingError, match="allowed are alpha > 0 and 3 examples in all"):
            dirichlet_split(torch.zeros(3), 4, 1.0)
        with pytest.raises(TrainingError, match=r"labels \(20, 5\): allowed is one for each example"):
            dirichlet_split(torch.zeros(20, 5, dtype=torch.long), 2, 1.0)
        with pytest.raises(TrainingError, match="no draw of 1000"):
            dirichlet_split(torch.zeros(40), 20, 0.001, least=2)
        with pytest.raises(TrainingError, match="seed 1 has no data"):
            local_clients(images, [torch.arange(3), torch.arange(0)])


class TestRounds:
    @pytest.mark.parametrize("fraction_bits", [None, 16])
    def test_the_mean_is_weighted_by_size(self, fraction_bits):
        clients = [Adds(0.5, 10), Adds(-0.25, 30), Adds(1.0, 40)]
        change, log = moved(clients, fraction_bits=fraction_bits)
        assert log["survivors"].tolist() == [3]
        for value in change.values():
            assert torch.allclose(value, torch.full_like(value, (5 - 7.5 + 40) / 80), atol=1e-4)

    @pytest.mark.parametrize("fraction_bits", [None, 16])
    @pytest.mark.parametrize("stage", STAGES)
    def test_who_leaves_changes_the_mean_over_survivors_only(self, stage, fraction_bits):
        clients = [Adds(0.5), Adds(8.0), Adds(0.25)]

        def leaves(round, client):
            return stage if client == 1 else ""

        change, log = moved(clients, leaves=leaves, fraction_bits=fraction_bits)
        counts = stage in ("", "sent")
        assert log["survivors"].tolist() == [3 if counts else 2]
        expected = (8.75 / 3) if counts else 0.375
        assert torch.allclose(change["0.weight"], torch.full((4, 6), expected), atol=1e-4)
        down, word, ways = 38 * 4, 39 * 4, 1 if fraction_bits is None else 2
        assert log["down_bytes"].tolist() == [down * (2 if stage == "asked" else 3)]
        of_one = {"": ways, "sent": ways, "sending": 1}.get(stage, 0)
        assert log["up_bytes"].tolist() == [word * (2 * ways + of_one)]
        told = 4 * ({"": 3, "sent": 3, "sending": 3}.get(stage, 2) + (3 if counts else 2))  # whose share each has
        assert log["between_bytes"].tolist() == [told + word if ways == 2 else 0]

    def test_a_client_that_fails_changes_the_mean_over_survivors_only(self):
        expected, _ = moved([Adds(0.5), Adds(0.25)])
        change, log = moved([Adds(0.5), fails, Adds(0.25)])
        assert log[["survivors", "failed", "reason"]].values.tolist() == [[2, 1, "RuntimeError: out of memory"]]
        assert all(torch.equal(change[key], expected[key]) for key in expected)

    @pytest.mark.parametrize("fraction_bits", [None, 16])
    def test_a_client_that_gives_back_no_numbers_has_failed(self, fraction_bits):
        clients = [Adds(0.25), Adds(float("nan")), Adds(float("inf")), Adds(0.25)]
        change, log = moved(clients, fraction_bits=fraction_bits)
        assert all(torch.allclose(c, torch.tensor(0.25)) for c in change.values())
        assert log[["survivors", "failed"]].values.tolist() == [[2, 2]]
        assert "not finite: 0.weight" in log["reason"][0]

    def test_shares_and_the_open_end_at_the_same_network(self, small_images):
        parts = dirichlet_split(small_images.train.y, 4, 0.5)
        clients = local_clients(small_images, parts, epochs=1, lr=0.05)
        nets = []
        for fraction_bits in (None, 20):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Flatten(), nn.Linear(196, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
            fed_avg(net, clients, rounds=2, asked=3, fraction_bits=fraction_bits, leaves=recipes.dropouts(0.2, seed=1))
            nets.append(state_of(net))
        assert all(torch.allclose(nets[0][key].double(), nets[1][key].double(), atol=1e-4) for key in nets[0])

    def test_masks_of_the_server_hold_and_travel_without_indices(self, small_images):
        clients = local_clients(small_images, dirichlet_split(small_images.train.y, 3, 1.0), epochs=1, lr=0.05)
        net = nn.Sequential(nn.Flatten(), nn.Linear(196, 16), nn.ReLU(), nn.Linear(16, 10))
        plans = {1: {"1": pruning.Unstructured(0.5)}, 2: {"1": pruning.Unstructured(0.9)}}
        log = fed_avg(net, clients, rounds=3, plans=plans)
        assert sparsity(net, ["1"]) == pytest.approx(0.9, abs=1e-3)
        assert int(masks(net)["1"].sum()) == 314
        rest = 16 + 170  # biases, and the second layer
        up = [4 * 3 * (kept + rest + 1) for kept in (3136, 1568, 314)]
        assert log["up_bytes"].tolist() == up
        bits = [0, 3136, 3136]  # a bitmap of the first layer is shorter than 314 numbers of 12 bits
        assert log["down_bytes"].tolist() == [
            3 * (4 * (kept + rest) + b / 8) for kept, b in zip((3136, 1568, 314), bits, strict=True)
        ]

    def test_a_client_picks_its_largest_changes_and_pays_for_their_indices(self):
        def one(model, round):
            model[0].weight.data[2, 3] += 5
            model[1].bias.data[1] -= 4
            model[0].bias.data += 0.1

        change, log = moved([one], keep=2 / 38)
        assert change["0.weight"][2, 3].item() == pytest.approx(5)
        assert change["1.bias"][1].item() == pytest.approx(-4)
        assert sum(int(value.count_nonzero()) for value in change.values()) == 2
        assert log["up_bytes"].tolist() == [2 * (32 + 6) / 8 + 4]  # 38 places have numbers of 6 bits

    def test_the_result_does_not_depend_on_processes_or_on_who_is_asked_first(self):
        clients = [Adds(i / 8, i + 1) for i in range(6)]
        changes = [moved(clients, asked=4, seed=2, processes=p)[0] for p in (1, 2)]
        assert all(torch.equal(changes[0][key], changes[1][key]) for key in changes[0])

    def test_a_client_whose_process_dies_changes_the_mean_over_survivors_only(self):
        expected, _ = moved([Adds(0.5)])
        change, log = moved([Adds(0.5), dies], processes=2)  # the pool of the test before, and one more
        assert log[["survivors", "failed"]].values.tolist() == [[1, 1]]
        assert log["reason"].item().startswith("its process died")
        assert all(torch.equal(change[key], expected[key]) for key in expected)

    def test_a_sum_over_a_single_survivor_is_refused_in_shares(self):
        """It would be that client's own change; who weighs nothing hides nobody."""

        def two_leave(round, client):
            return "" if client == 1 else "sending"

        for clients, leaves in (([Adds(0.5)] * 3, two_leave), ([Adds(0.5, 0), Adds(0.5, 2), Adds(0.5, 0)], None)):
            moved(clients, leaves=leaves)  # in the open nothing is hidden
            with pytest.raises(TrainingError, match="round 1: client 1 alone survived, and a sum in shares"):
                moved(clients, leaves=leaves, fraction_bits=16)

    def test_nothing_is_sent_and_nothing_moves_where_a_change_does_not_fit(self, monkeypatch):
        def receive(server, client, share):
            raise AssertionError(f"client {client} has sent")

        monkeypatch.setattr(federated.Server, "receive", receive)
        net = tiny()
        before = state_of(net)
        with pytest.raises(TrainingError, match=r"client 2: 0.weight is from 9000 to 9000"):
            fed_avg(net, [Adds(1.0), Adds(1.0), Adds(9000.0), Adds(0.0)], rounds=1, fraction_bits=16)
        assert all(torch.equal(value, before[key]) for key, value in state_of(net).items())

    def test_a_share_leaves_room_for_all_that_are_asked(self):
        """Nobody knows beforehand who will leave."""

        def two_leave(round, client):
            return "asked" if client < 2 else ""

        with pytest.raises(TrainingError, match="a sum over 4 clients leave room for 8192"):
            moved([Adds(9000.0)] * 4, leaves=two_leave, fraction_bits=16)

    def test_refusals(self):
        def everybody(round, client):
            return "training"

        with pytest.raises(TrainingError, match="round 1: none of 2 clients survived"):
            moved([Adds(1.0), Adds(2.0)], leaves=everybody)
        with pytest.raises(TrainingError, match="client 0 failed: RuntimeError: out of memory"):
            moved([fails])
        with pytest.raises(TrainingError, match=r"client 1: 0.weight is from 9000 to 9000"):
            moved([Adds(1.0), Adds(9000.0), Adds(1.0), Adds(0.0)], fraction_bits=16)
        with pytest.raises(TrainingError, match="sum to 0: a mean needs a weight above 0"):
            moved([Adds(0.1, 0), Adds(0.1, 0)])
        with pytest.raises(TrainingError, match=r"plans for rounds \[2\]: allowed are 0 to 0"):
            moved([Adds(0.1)], plans={2: {}})
        few = {"leaves": lambda round, client: "" if client else "training", "fraction_bits": 12}
        with pytest.raises(TrainingError, match=r"\[1, 2\] sum to 0.00293 of the largest, which 12 fraction bits"):
            moved([Adds(0.01, 1000), Adds(0.01, 2), Adds(0.01, 1)], **few)
        with pytest.raises(TrainingError, match="leaves at 'lunch': allowed are asked, training, sending, sent"):
            moved([Adds(1.0)], leaves=lambda round, client: "lunch")
        with pytest.raises(TrainingError, match=r"keep=0.5 in shares: what is left out is as long as what is sent"):
            moved([Adds(0.1), Adds(0.1)], keep=0.5, fraction_bits=16)
        with pytest.raises(TrainingError, match="asked=3"):
            moved([Adds(1.0)], asked=3)

        def other(model, round):
            model[1] = nn.Linear(4, 3)

        with pytest.raises(TrainingError, match=r"client 0: 1.weight is \(3, 4\), and \(2, 4\) at the server"):
            moved([other])


@dataclass(frozen=True)
class Sets:
    """A client that sets a linear layer's weights to those of its own."""

    values: torch.Tensor
    size: int = 1

    def __call__(self, model, round):
        for p in model.parameters():
            p.data = self.values.clone()


def watched(monkeypatch, clients, **options):
    """The network after a round in shares, from zeros, and what the two servers have heard and said."""
    servers = []

    class Watched(Server):
        def __init__(self):
            super().__init__()
            servers.append(self)

        def total(self, clients):
            self.said = super().total(clients)
            return self.said

    monkeypatch.setattr(federated, "Server", Watched)
    net = nn.Linear(*clients[0].values.shape[::-1], bias=False).double()
    nn.init.zeros_(net.weight)
    fed_avg(net, clients, rounds=1, fraction_bits=16, seed=4, **options)
    return net.weight.detach(), *servers


class TestWhatServersLearn:
    def test_the_aggregate_is_the_mean_of_whole_numbers_exactly(self, monkeypatch):
        """Weights, a mask and a client that leaves in the middle of sending: reckoned again in Python's own numbers."""
        random, sizes = torch.Generator().manual_seed(0), [3, 10, 7, 8]
        clients = [Sets(torch.randn(6, 5, generator=random, dtype=torch.float64), size) for size in sizes]
        mask = torch.arange(30).reshape(6, 5) % 3 > 0

        def leaves(round, client):
            return "sending" if client == 2 else ""

        plans = {0: {"": pruning.Unstructured(0.5)}}
        monkeypatch.setattr(federated, "one_shot", lambda net, plan: {"": mask})
        mean, first, second = watched(monkeypatch, clients, plans=plans, leaves=leaves)
        assert (len(first.received), len(second.received)) == (4, 3)
        staying = [c for c in clients if c is not clients[2]]
        whole = [[round(x * (c.size / 10) * 2**16) for x in c.values[mask].tolist()] for c in staying]
        size = sum(round(c.size / 10 * 2**16) for c in staying)
        expected = [sum(column) / size for column in zip(*whole, strict=True)]
        assert mean[mask].tolist() == expected
        assert not mean[~mask].any()

    def test_two_servers_learn_nothing_but_the_sum(self, monkeypatch):
        """Other values of the same sum leave the first server's view as it is, bit by bit, and the second's uniform."""
        values = [torch.randn(200, 200, generator=torch.Generator().manual_seed(i)).double() for i in range(3)]
        values = [torch.round(v * 2**16) / 2**16 for v in values]
        others = [values[0] + 5, values[1] - 3, values[2] - 2]
        nets, firsts, seconds = zip(
            *(watched(monkeypatch, [Sets(v) for v in own]) for own in (values, others)), strict=True
        )
        assert torch.equal(*nets)
        assert (seconds[0].said == seconds[1].said).all()  # what the first is told
        for client in range(3):
            assert (firsts[0].received[client] == firsts[1].received[client]).all()
            assert not (seconds[0].received[client] == seconds[1].received[client]).all()
        for second, first in zip(seconds, firsts, strict=True):
            for share in second.received.values():
                for byte in share.view(np.uint8).reshape(-1, 4).T:
                    assert stats.chisquare(np.bincount(byte, minlength=256)).pvalue > 1e-6
            known = np.sum([*second.received.values(), first.said], axis=0, dtype=np.uint32)
            assert (known[:-1].view(np.int32) == torch.round(sum(values) * 2**16).flatten().numpy()).all()


class Tied(nn.Module):
    """128 numbers under two names, of which 64 are there, and 24 others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = (nn.Linear(8, n, bias=False) for n in (8, 8, 3))
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(self.b(self.a(x).relu()).relu())


class TestOneTensorOfTwoNames:
    def test_travels_once_and_stays_one(self):
        net = Tied()
        start, log = state_of(net), fed_avg(net, [Adds(1.0), Adds(3.0)], rounds=1)
        assert log[["down_bytes", "up_bytes"]].values.tolist() == [[2 * 4 * 88, 2 * 4 * 89]]  # up: a size too
        assert net.a.weight is net.b.weight
        assert torch.allclose(net.a.weight, start["a.weight"] + 2)

    def test_is_pruned_under_both(self):
        log = fed_avg(Tied(), [Adds(1.0)], rounds=1, plans={0: {"a": pruning.Unstructured(0.5)}})
        assert log["up_bytes"].tolist() == [4 * (32 + 24 + 1)]

    def test_is_cut_once(self):
        net = Tied()
        start = state_of(net)
        fed_avg(net, [Adds(1.0)], rounds=1, keep=0.25)
        changed = sum(int((state_of(net)[key] != start[key]).sum()) for key in ("a.weight", "out.weight"))
        assert changed == round(0.25 * 88)


def test_processes_count_what_this_one_would(images):
    few = replace(images, train=replace(images.train, x=images.train.x[:60], y=images.train.y[:60]))
    clients = local_clients(few, [torch.arange(20), torch.arange(20, 60)], epochs=1, lr=0.05)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(784, 10)) for _ in range(2)]
    (_, here), (_, there) = (metered(net, fed_avg, clients, rounds=1, processes=n + 1) for n, net in enumerate(nets))
    assert here["macs"].tolist() == [60 * 7840] * 2  # forward, and of the weights
    assert here.equals(there)


def test_a_client_sees_its_own_examples_only(images):
    parts = [torch.arange(10), torch.arange(10, 30)]
    clients = local_clients(images, parts, epochs=1, lr=0.05)
    assert [client.size for client in clients] == [10, 20]
    assert torch.equal(clients[1].data.train.y, images.train.y[10:30])
    assert not len(clients[0].data.test)
    assert deepcopy(replace(clients[0], seed=5)).seed == 5
