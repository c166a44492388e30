"""Training inside sets of values, by turns with them, toward codebooks and vanishing tiles, and with rounded inputs."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from lib import shapes
from lib.constraint import ConstraintError, attach_masks, fitted, harden, weights
from lib.data import Split
from lib.models import build
from lib.pruning import Patterns, PETile, Unstructured, uniform_plan
from lib.quantization import (
    Expansion,
    Levels,
    PowerOfTwo,
    TernaryRule,
    branch,
    full_precision_activations,
    quantize_activations,
    uniform,
)
from lib.recipes import admm, alternating, deep_kmeans, one_shot, retrain_inside, reweighted, straight_through
from lib.recipes.clustering import _Spectral
from lib.recipes.inside import _Tangent
from lib.sharing import Codebook, SmartExchange, Unified
from lib.training import TrainingError, cached, evaluate, fit


@pytest.fixture(scope="module")
def dense(images):
    net = build("lenet5", images.shape, images.classes, seed=1)
    fit(net, images, epochs=4, lr=0.03, batch_size=32)
    return net


@pytest.fixture
def trained(dense):
    return deepcopy(dense)


OPTIONS = {"lr": 0.01, "epochs": 2, "seed": 3, "batch_size": 32}


@pytest.mark.parametrize("recipe", [admm, deep_kmeans])
def test_a_layer_of_zeros_has_no_distance(images, recipe):
    """Dead weights behind a dead bias never move."""
    net, plan = build("lenet300", images.shape, images.classes), {"fc2": Codebook(4), "fc3": Codebook(4)}
    few, options = replace(images, train=Split(images.train.x[:64], images.train.y[:64])), {"epochs": 1, "lr": 0.01}
    with torch.no_grad():
        net.fc2.weight.zero_()
        net.fc2.bias.fill_(-1.0)
    log = recipe(net, plan, few, **options, **({"strength": 0.1} if recipe is deep_kmeans else {"rho": 0.1}))
    assert not net.fc2.weight.any()
    assert not log.filter(regex="distance|term|fresh").isna().any(axis=None)


class TestRetrainInside:
    @pytest.mark.parametrize("c", [Unified(0.9, width=4), Unified(0.5, 0.4), TernaryRule(), Expansion()], ids=str)
    def test_it_stays_inside_and_gains(self, trained, images, c):
        plan = uniform_plan(trained, c)
        harden(trained, plan)
        before, accuracy = deepcopy(trained), evaluate(trained, images.train)
        retrain_inside(trained, plan, images, weight_decay=1e-4, **OPTIONS)
        assert all(plan[n].member(w, 1e-5) for n, w in weights(trained, plan).items())
        assert evaluate(trained, images.train) > accuracy
        for name, w in weights(trained, plan).items():
            was = shapes.prunable(before)[name].weight
            assert not torch.equal(w, was)
            assert torch.equal(w == 0, was == 0) or c.__class__ is Unified

    def test_shared_entries_move_as_one(self, trained, images):
        plan = {"conv2": Codebook(8, "row"), "fc1": Codebook(16, "filter")}
        harden(trained, plan)
        which = {n: plan[n].entries(w)[1] for n, w in weights(trained, plan).items()}
        retrain_inside(trained, plan, images, **OPTIONS)
        for name, w in weights(trained, plan).items():
            samples = plan[name].samples(w)
            for entry in which[name].unique():
                assert len(samples[which[name] == entry].unique(dim=0)) == 1

    def test_refusals(self, trained, images):
        plan = uniform_plan(trained, Unified())
        with pytest.raises(TrainingError, match=r"outside .* before training"):
            retrain_inside(trained, plan, images, **OPTIONS)
        harden(trained, plan)
        with pytest.raises(TrainingError, match="adam"):
            retrain_inside(trained, plan, images, optimizer="adam", **OPTIONS)
        plan = uniform_plan(trained, PowerOfTwo())
        with pytest.raises(TrainingError, match="weight decay"):
            retrain_inside(harden(trained, plan), plan, images, weight_decay=0.1, **OPTIONS)
        plan = {"fc1": Unstructured(0.5, "global"), "fc2": Unstructured(0.5, "global")}
        with pytest.raises(TrainingError, match="couples"):
            retrain_inside(trained, plan, images, **OPTIONS)

    def test_what_belongs_together_stays_so(self, trained):
        """A free block whose magnitudes happen to meet, beside a shared one that rounding has moved by a bit."""
        plan = {"fc2": Unified(0.5, width=2)}
        w = harden(trained, plan).get_submodule("fc2").weight
        hook = _Tangent(trained, plan)
        shared, _ = plan["fc2"].states(w)
        pairs = w.data.view(-1, 2)
        pairs[shared] *= torch.tensor([1.0, 1.0 + 1e-6])
        pairs[~shared] = pairs[~shared, :1] * torch.tensor([1.0, -1.0])
        w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
        before = w.grad.clone().view(-1, 2)
        hook.after_backward(trained, 0)
        along = (w.grad * w.sign()).view(-1, 2)
        assert torch.allclose(along[shared, 0], along[shared, 1])
        assert torch.equal(w.grad.view(-1, 2)[~shared], before[~shared])

    def test_a_step_out_is_noticed(self, trained, images, monkeypatch):
        plan = {"fc1": Unified(1.0)}
        harden(trained, plan)
        monkeypatch.setattr(Unified, "tangent", lambda self, z, g: g)
        with pytest.raises(TrainingError, match=r"fc1 is outside .* in epoch 1"):
            retrain_inside(trained, plan, images, **OPTIONS)


class TestAlternating:
    def test_better_than_a_single_shot(self, trained, images):
        plan = dict.fromkeys(("conv1", "conv2", "fc2"), SmartExchange(0.3, bits=3))
        single = evaluate(harden(deepcopy(trained), plan), images.train)
        log = alternating(trained, plan, images, lr=0.03, epochs=4, batch_size=32, schedule="cosine")
        assert evaluate(trained, images.train) > single
        assert log["epoch"].tolist() == [1, 2, 3, 4]
        assert log["distance"].iloc[-1] < log["distance"].iloc[0]
        assert evaluate(trained, images.validation) == pytest.approx(log["hardened_accuracy"].iloc[-1])

    def test_every_second_epoch_and_the_bill_of_the_very_point(self, trained, images):
        plan = {"conv2": PowerOfTwo(3)}
        log = alternating(trained, plan, images, lr=0.01, epochs=4, interval=2)
        assert log["epoch"].tolist() == [2, 4]
        bill = plan["conv2"].storage_bits(trained.conv2.weight.detach(), 32)
        assert tuple(log[["data_bits", "index_bits", "table_bits"]].iloc[-1]) == tuple(bill)
        assert plan["conv2"].member(trained.conv2.weight.detach(), 1e-6)

    def test_refusals(self, trained, images):
        with pytest.raises(TrainingError, match="multiple"):
            alternating(trained, {"fc1": TernaryRule()}, images, lr=0.01, epochs=3, interval=2)


class TestDeepKMeans:
    def test_the_term_and_its_gradient(self, trained, images):
        """The pull is the derivative of half the energy outside the span, F held."""
        plan = {"conv2": Codebook(4, "kernel")}
        hook = _Spectral(trained, plan, images, strength=2.0, interval=1)
        w = trained.conv2.weight
        s = w.reshape(-1, 25)
        f = torch.linalg.svd(s.detach(), full_matrices=False).U[:, :4]
        (2.0 / 2 * (s.square().sum() - (f.T @ s).square().sum())).backward()
        by_autograd, w.grad = w.grad, torch.zeros_like(w)
        hook.after_backward(trained, 0)
        assert torch.allclose(w.grad, by_autograd, atol=1e-4)
        values = torch.linalg.svdvals(s.detach()).square()
        assert hook._term("conv2") == pytest.approx(float(values[4:].sum() / values.sum()), rel=1e-3)

    def test_few_numbers_a_sample_are_always_inside(self, trained, images):
        """d <= k: the fresh term is zero, and what acts is staleness."""
        short, long = {"conv2": Codebook(16, "row")}, {"conv2": Codebook(4, "kernel")}
        log = deep_kmeans(deepcopy(trained), short, images, strength=0.1, interval=2, **OPTIONS)
        assert log["term/conv2"].iloc[0] > 1e-6
        assert log["fresh/conv2"].iloc[-1] < 1e-9
        log = deep_kmeans(deepcopy(trained), long, images, strength=0.1, **OPTIONS)
        assert log["fresh/conv2"].iloc[-1] > 1e-6

    def test_it_pulls_toward_clusters(self, trained, images):
        plan = {"conv2": Codebook(4, "kernel")}
        logs = [deep_kmeans(deepcopy(trained), plan, images, strength=s, **OPTIONS) for s in (0.0, 10.0)]
        free, pulled = (log["distance/conv2"].iloc[-1] for log in logs)
        assert pulled < free
        assert logs[1]["fresh/conv2"].iloc[-1] < logs[0]["fresh/conv2"].iloc[-1]

    def test_refusals(self, trained, images):
        with pytest.raises(TrainingError, match="conv2: Levels has no samples"):
            deep_kmeans(trained, {"conv2": Levels(2)}, images, strength=1.0, **OPTIONS)
        with pytest.raises(TrainingError, match="strength"):
            deep_kmeans(trained, {"conv2": Codebook(2)}, images, strength=-1.0, **OPTIONS)


TILES = {"conv2": PETile(0.0, 5, 4), "fc1": PETile(0.0, 10, 50)}  # a budget that keeps what the penalty leaves
LASSO = OPTIONS | {"interval": 0, "schedule": "cosine"}


class TestGroupLasso:
    def test_clipping_spares_the_strong(self, trained, images):
        """At tiles gone alike, what is left is larger, and so is the scale of ternary weights."""
        options = LASSO | {"epochs": 4}
        none = reweighted(deepcopy(trained), TILES, images, strength=0.0, **options)
        plain = reweighted(deepcopy(trained), TILES, images, strength=2.0, **options)
        clipped = reweighted(deepcopy(trained), TILES, images, strength=2.0, clip=1.0, **options)
        assert none["density/fc1"].iloc[-1] == 1
        assert plain["density/fc1"].iloc[-1] < 1
        assert clipped["density/fc1"].iloc[-1] < 1
        assert plain["scale/fc1"].iloc[-1] < min(log["scale/fc1"].iloc[-1] for log in (clipped, none))

    def test_vanished_tiles_are_zero(self, trained, images):
        log = reweighted(trained, TILES, images, strength=4.0, **LASSO)
        for name, c in TILES.items():
            norms = c.group_norms(shapes.prunable(trained)[name].weight)
            assert float((norms > 0).float().mean()) == pytest.approx(log[f"density/{name}"].iloc[-1])
            scale, threshold = branch(shapes.prunable(trained)[name].weight.detach(), 0.05)
            assert (scale, threshold) == pytest.approx(tuple(log[[f"scale/{name}", f"threshold/{name}"]].iloc[-1]))

    def test_with_ternary_weights(self, trained, images):
        values = {n: TernaryRule() for n in TILES}
        log = reweighted(trained, TILES, images, strength=4.0, clip=0.9, values=values, **LASSO)
        for name, w in weights(trained, values).items():
            assert len(w.abs().unique()) <= 2
            assert float((TILES[name].group_norms(w) > 0).float().mean()) <= log[f"density/{name}"].iloc[-1] + 1e-6

    def test_refusals(self, trained, images):
        with pytest.raises(TrainingError, match="Patterns has no fixed groups"):
            reweighted(trained, {"conv2": Patterns(4)}, images, strength=1.0, **LASSO)
        for bad in ({"strength": -1.0}, {"strength": 1.0, "clip": 0.0}):
            with pytest.raises(TrainingError, match="allowed"):
                reweighted(trained, TILES, images, **bad, **LASSO)


class TestActivations:
    def test_values_and_range(self, trained, images):
        quantize_activations(trained, 3, images.train.x[:100])
        seen = {}
        handle = trained.conv2.quantize_input.register_forward_hook(lambda m, a, y: seen.setdefault("y", y))
        trained(images.train.x[:20])
        handle.remove()
        assert len(seen["y"].unique()) <= 8
        assert (seen["y"] >= 0).all()  # after ReLU
        first = trained.conv1.quantize_input
        assert int(first.zero) > 0  # images have negative numbers
        assert 0.0 in (torch.arange(8) - int(first.zero)).mul(first.scale).tolist()

    def test_more_bits_lose_less_and_full_precision_comes_back(self, trained, images):
        exact = trained(images.test.x[:50]).detach()
        off = []
        for bits in (2, 4, 8):
            quantize_activations(trained, bits, images.train.x[:100])
            off.append(float((trained(images.test.x[:50]).detach() - exact).norm() / exact.norm()))
        assert off[0] > 3 * off[1] > 9 * off[2]
        assert torch.equal(full_precision_activations(trained)(images.test.x[:50]), exact)
        assert not any("quantize_input" in key for key in trained.state_dict())

    def test_training_with_them(self, trained, images):
        quantize_activations(trained, 2, images.train.x[:200])
        before = evaluate(trained, images.train)
        plan = fitted(trained, uniform_plan(trained, uniform(3)))
        straight_through(trained, plan, images, **OPTIONS)
        assert evaluate(trained, images.train) > before

    def test_the_cache_tells_networks_apart(self, trained, images):
        plain, rounded = deepcopy(trained), quantize_activations(deepcopy(trained), 2, images.train.x[:100])
        options = {"epochs": 1, "lr": 0.01}
        a, b = (cached(fit, net, images, **options) for net in (plain, rounded))
        assert a["train_loss"].iloc[0] != b["train_loss"].iloc[0]
        again = quantize_activations(deepcopy(trained), 2, images.train.x[:100])
        assert cached(fit, again, images, **options).equals(b)
        assert torch.equal(again.fc2.weight, rounded.fc2.weight)

    def test_masks_and_copies_go_with_it(self, trained, images):
        attach_masks(trained, one_shot(trained, uniform_plan(trained, Unstructured(0.5))))
        copy = deepcopy(quantize_activations(trained, 4, images.train.x[:50]))
        assert torch.equal(copy(images.test.x[:5]), trained(images.test.x[:5]))

    @pytest.mark.parametrize("bits", [0, 17, 2.5])
    def test_refusals(self, trained, images, bits):
        with pytest.raises(ConstraintError, match="bits"):
            quantize_activations(trained, bits, images.train.x[:5])
