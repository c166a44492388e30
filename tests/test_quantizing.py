"""Recipes that train onto levels."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lib.constraint import ConstraintError, attach_masks, fitted, harden, masks, weights
from lib.data import Split
from lib.models import build
from lib.pruning import Unstructured, uniform_plan
from lib.quantization import Levels, Quantized, binary
from lib.recipes import admm, one_shot, partial_hardening, straight_through
from lib.training import Hook, TrainingError, cached, evaluate, fit


@pytest.fixture
def trained(net, images):
    fit(net, images, epochs=4, lr=0.05)
    return net


@pytest.fixture
def pruned(trained):
    return attach_masks(trained, one_shot(trained, uniform_plan(trained, Unstructured(0.8))))


OPTIONS = {"lr": 0.02, "epochs": 2, "momentum": 0.9}


class TestStraightThrough:
    def test_binary_recovers_what_hardening_loses(self, trained, images):
        plan = uniform_plan(trained, binary())
        hardened = evaluate(harden(deepcopy(trained), plan), images.validation)
        log = straight_through(trained, plan, images, lr=0.05, epochs=8)
        assert all(len(w.abs().unique()) == 1 for w in weights(trained, plan).values())
        assert evaluate(trained, images.validation) > hardened
        assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]

    def test_loss_and_gradient_are_those_of_the_projected_network(self, trained, images):
        plan = fitted(trained, uniform_plan(trained, Levels(2)))
        x, y = images.train.x[:64], images.train.y[:64]
        hardened = harden(deepcopy(trained), plan)
        torch.nn.functional.cross_entropy(hardened(x), y).backward()

        class Look(Hook):
            def after_backward(self, model, step):
                if step == 0:
                    self.gradient = model.fc1.parametrizations["weight"].original.grad.clone()

        look, few = Look(), replace(images, train=Split(x, y))  # one batch: all orders have the same gradient
        straight_through(trained, plan, few, hooks=(look,), epochs=1, lr=0.01, batch_size=64)
        assert torch.allclose(look.gradient, hardened.fc1.weight.grad, atol=1e-6)

    def test_removed_weights_stay_removed(self, pruned, images):
        before = {n: m.clone() for n, m in masks(pruned).items()}
        straight_through(pruned, uniform_plan(pruned, Levels(2)), images, **OPTIONS)
        after = masks(pruned)
        assert all(torch.equal(after[n], m) for n, m in before.items())
        assert all(torch.equal(w != 0, before[n]) for n, w in weights(pruned, before).items())

    def test_network_is_left_as_it_was_made_when_training_fails(self, trained, images):
        with pytest.raises(TrainingError, match="epochs"):
            straight_through(trained, uniform_plan(trained, binary()), images, epochs=-1, lr=0.1)
        assert set(trained.state_dict()) == set(build("lenet300", images.shape, 10).state_dict())

    def test_a_decoder_tied_to_an_embedding_is_refused(self, images):
        """The embedding would go on with the weights that the decoder has projected."""
        net = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
        net[1].weight = net[0].weight
        for recipe, options in ((straight_through, {}), (admm, {"rho": 0.01})):
            with pytest.raises(ConstraintError, match=r"its tensor is also in 0 \(Embedding\)"):
                recipe(net, {"1": binary()}, images, epochs=1, lr=0.01, **options)

    def test_a_copy_of_a_network_with_another_mask_leaves_its_original_alone(self, trained, images):
        net = attach_masks(deepcopy(trained), {"fc3.bias": torch.arange(10) > 2})
        copy, before = deepcopy(net), net(images.test.x[:5])
        straight_through(copy, {"fc3": binary()}, images, epochs=1, lr=0.01)
        assert torch.equal(net(images.test.x[:5]), before)

    def test_coupled_layers_are_refused(self, trained, images):
        with pytest.raises(TrainingError, match="couples"):
            straight_through(trained, uniform_plan(trained, Unstructured(0.5, "global")), images, **OPTIONS)


class TestPartialHardening:
    def test_every_weight_ends_at_its_level_and_frozen_ones_never_move(self, pruned, images):
        plan = fitted(pruned, uniform_plan(pruned, Levels(2)))
        mask = masks(pruned)
        seen = []

        class Look(Hook):
            def after_epoch(self, model, epoch):
                seen.append({n: (w.clone(), masks(model)[n].clone()) for n, w in weights(model, plan).items()})

        log = partial_hardening(pruned, plan, images, shares=(0.5, 0.5), hooks=(Look(),), **OPTIONS)
        assert log["frozen"].tolist() == pytest.approx([0.5, 0.75], abs=0.01)
        final = weights(pruned, plan)
        for n, c in plan.items():
            assert c.member(final[n])
            assert torch.equal(final[n] != 0, mask[n])
            for w, free in seen_of(seen, n):
                assert torch.equal(w[~free], final[n][~free])
                assert not torch.equal(w[free], final[n][free])
        assert evaluate(pruned, images.validation) == pytest.approx(log["hardened_accuracy"].iloc[-1])

    def test_nearest_first_at_every_level(self, trained, images):
        plan = fitted(trained, {"fc1": Levels(2)})
        before = weights(trained, plan)["fc1"].clone()
        frozen = {}

        class Look(Hook):
            def before_epoch(self, model, epoch):
                frozen.setdefault("mask", ~model.fc1.parametrizations.weight[-1].free)

        partial_hardening(trained, plan, images, shares=(0.3,), hooks=(Look(),), epochs=1, lr=0.01)
        level = plan["fc1"].project(before)
        for value in level.unique():
            at = level == value
            distance, chosen = (before - value).abs()[at], frozen["mask"][at]
            assert float(chosen.float().mean()) == pytest.approx(0.3, abs=0.01)
            assert distance[chosen].max() <= distance[~chosen].min()

    def test_better_than_snapping_at_once(self, pruned, images):
        plan = uniform_plan(pruned, binary())
        at_once = evaluate(harden(deepcopy(pruned), plan), images.validation)
        partial_hardening(pruned, plan, images, lr=0.05, epochs=4)
        assert evaluate(pruned, images.validation) > at_once

    def test_can_be_cached(self, pruned, images):
        start = deepcopy(pruned)
        plan = uniform_plan(pruned, Levels(2))
        first = cached(partial_hardening, pruned, plan, images, shares=(0.5,), epochs=1, lr=0.01)
        again = cached(partial_hardening, start, plan, images, shares=(0.5,), epochs=1, lr=0.01)
        assert first.equals(again)
        assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), start.parameters(), strict=True))

    def test_shares_are_checked(self, trained, images):
        with pytest.raises(TrainingError, match="shares"):
            partial_hardening(trained, uniform_plan(trained, binary()), images, shares=(1.5,), **OPTIONS)


def seen_of(seen, name):
    return [epoch[name] for epoch in seen]


def test_admm_reaches_a_joint_set(trained, images):
    plan = fitted(trained, uniform_plan(trained, Quantized(Unstructured(0.8), Levels(2))))
    at_once = evaluate(harden(deepcopy(trained), plan), images.validation)
    admm(trained, plan, images, epochs=8, lr=0.05, rho=0.05)
    assert all(plan[n].member(w) for n, w in weights(trained, plan).items())
    assert evaluate(trained, images.validation) > at_once
