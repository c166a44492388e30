from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lib.constraint import attach_masks, kept, masks, select, sparsity, state_of, weights
from lib.data import Split
from lib.faults import StuckAt, UnderFaults
from lib.pruning import Unstructured, cubic, uniform_plan
from lib.recipes import MiniBatchDropping, admm, gradual, iterative, one_shot, prune_and_tune, rewind
from lib.recipes.admm import _Pull
from lib.shapes import prunable
from lib.training import Hook, TrainingError, evaluate, fit


@pytest.fixture
def trained(net, images):
    fit(net, images, epochs=4, lr=0.05)
    return net


def test_one_shot_keeps_the_largest(trained):
    plan = uniform_plan(trained, Unstructured(0.9))
    mask = one_shot(trained, plan)["fc1"]
    w = trained.fc1.weight.detach().abs()
    assert int(mask.sum()) == kept(0.9, w.numel())
    assert w[mask].min() >= w[~mask].max()


def test_rewinding_restores_every_parameter_and_buffer(images):
    from lib.models import build

    net = build("resnet8", images.shape, images.classes, width=4)
    start = state_of(net)
    fit(net, images, epochs=1, lr=0.05)
    assert not torch.equal(net.bn1.running_mean, start["bn1.running_mean"])
    plan = uniform_plan(net, Unstructured(0.5))
    m = one_shot(net, plan)
    rewind(net, start, m)
    state = state_of(net)
    assert torch.equal(state["bn1.running_mean"], start["bn1.running_mean"])
    assert all(torch.equal(state[f"{n}.weight"], start[f"{n}.weight"] * m[n]) for n in m)


def test_state_of_a_masked_model_has_plain_names(trained):
    names = set(trained.state_dict())
    attach_masks(trained, one_shot(trained, uniform_plan(trained, Unstructured(0.5))))
    assert set(state_of(trained)) == names
    assert masks(trained)  # the model itself stays masked


def test_iterative_masks_are_nested_and_exact(trained, images):
    start = state_of(trained)
    plans = [uniform_plan(trained, Unstructured(s)) for s in (0.3, 0.6, 0.9)]
    found = iterative(trained, plans, images, start, epochs=1, lr=0.05)
    for i, s in enumerate((0.3, 0.6, 0.9)):
        for name, mask in found[i].items():
            assert int(mask.sum()) == kept(s, mask.numel())
            assert i == 0 or not (mask & ~found[i - 1][name]).any()


def test_iterative_first_round_is_one_shot_and_later_rounds_retrain(trained, images):
    dense = deepcopy(trained)
    plans = [uniform_plan(trained, Unstructured(s)) for s in (0.3, 0.9)]
    found = iterative(trained, plans, images, state_of(dense), epochs=1, lr=0.05)
    assert torch.equal(found[0]["fc1"], one_shot(dense, plans[0])["fc1"])
    assert not torch.equal(found[1]["fc1"], one_shot(dense, plans[1])["fc1"])


@pytest.mark.parametrize("recipe", ["prune_and_tune", "iterative"])
def test_what_one_plan_removed_stays_away_when_the_next_names_other_layers(net, images, recipe):
    plans = [{"fc1": Unstructured(0.75)}, {"fc2": Unstructured(0.5)}, {"fc1": Unstructured(0.5)}]
    few, options = replace(images, train=Split(images.train.x[:100], images.train.y[:100])), {"epochs": 1, "lr": 0.05}
    if recipe == "iterative":
        found = iterative(net, plans, few, state_of(net), **options)
        assert [[*m] for m in found] == [["fc1"], ["fc1", "fc2"], ["fc1", "fc2"]]
        assert all((after[n] <= m).all() for before, after in pairwise(found) for n, m in before.items())
    else:
        prune_and_tune(net, plans, few, dense_epochs=1, **options)
    assert [sparsity(net, [n]) for n in ("fc1", "fc2", "fc3")] == pytest.approx([0.75, 0.5, 0.0])


def test_gradual_pruning_follows_its_sparsities_through_one_training(net, images):
    seen = []

    class Watch(Hook):
        def after_backward(self, model, step):
            seen.append({name: mask.clone() for name, mask in masks(model).items()})

    path = cubic(0.9, prunings=4)
    plans = [uniform_plan(net, Unstructured(s)) for s in path]
    options = {"lr": 0.05, "batch_size": 50, "first": 0.2, "last": 0.8}  # 20 steps an epoch
    log = gradual(net, plans, images, epochs=2, hooks=(Watch(),), **options)
    assert len(log) == 2
    sizes = {name: mask.numel() for name, mask in seen[0].items()}
    for step, found in enumerate(seen):  # dense to step 8, then tighter at 14, 20, 26, 32
        done = sum(step >= at for at in (14, 20, 26, 32))
        for name, mask in found.items():
            assert int(mask.sum()) == (kept(path[done - 1], sizes[name]) if done else sizes[name]), step
            assert not (mask & ~seen[max(step - 1, 0)][name]).any()
    assert not masks(net)
    assert {n: int(layer.weight.count_nonzero()) for n, layer in prunable(net).items()} == {
        name: kept(0.9, size) for name, size in sizes.items()
    }


@pytest.mark.parametrize("seed", range(4))
def test_gradual_pruning_reaches_its_last_plan_whatever_is_skipped(net, images, seed):
    """Also where a batch is dropped before which a plan was due, and on chips of which many cells are stuck."""
    plans = [uniform_plan(net, Unstructured(s)) for s in (0.3, 0.6, 0.9)]
    dropping = MiniBatchDropping(0.5, seed=seed)
    gradual(net, plans, images, epochs=1, lr=0.05, batch_size=100, hooks=(dropping,), last=0.99)
    assert all(int(layer.weight.count_nonzero()) == kept(0.9, layer.weight.numel()) for layer in prunable(net).values())


def test_weights_are_ranked_as_they_are_and_not_as_a_chip_gives_them_back(net, images):
    plan, still = {"fc1": Unstructured(0.9)}, {"lr": 1e-9, "momentum": 0.0}
    largest, hook = one_shot(net, plan)["fc1"], UnderFaults({"fc1": "two_column"}, StuckAt(0.2))
    gradual(net, [plan], images, epochs=1, batch_size=100, hooks=(hook,), **still)
    assert torch.equal(net.fc1.weight != 0, largest)


def test_gradual_pruning_names_what_does_not_fit(net, images):
    plan = uniform_plan(net, Unstructured(0.5))
    for plans, options in (([], {}), ([plan], {"first": 0.8, "last": 0.7}), ([plan], {"last": 1.0}), ([plan] * 99, {})):
        with pytest.raises(TrainingError, match=f"gradual: {len(plans)} plans"):
            gradual(net, plans, images, epochs=1, lr=0.05, **options)


def test_pull_is_the_gradient_of_the_squared_penalty(trained, images):
    plan = uniform_plan(trained, Unstructured(0.8))
    pull = _Pull(trained, plan, images, 1, 0.3, 1.3, 1.0, False)
    pull.after_epoch(trained, 0)  # U is no longer zero
    rho = pull.rho
    w = {n: layer.weight for n, layer in prunable(trained).items()}
    penalty = sum(rho / 2 * (w[n] - pull.pairs[0].z[n] + pull.pairs[0].u[n]).square().sum() for n in plan)
    expected = torch.autograd.grad(penalty, [w[n] for n in plan])
    for n in plan:
        w[n].grad = torch.zeros_like(w[n])
    pull.after_backward(trained, 0)
    for n, gradient in zip(plan, expected, strict=True):
        assert torch.allclose(w[n].grad, gradient, atol=1e-7)


def test_z_and_u_steps_follow_the_algorithm(trained, images):
    plan = {"fc1": Unstructured(0.8)}
    w = trained.fc1.weight.detach().clone()
    pull = _Pull(trained, plan, images, 2, 0.01, 1.5, 0.012, True)
    assert torch.equal(pull.pairs[0].z["fc1"], Unstructured(0.8).project(w))  # Z_0 = P_S(W)
    pull.after_epoch(trained, 0)
    assert not pull.rows  # interval 2: no update after the first epoch
    pull.after_epoch(trained, 1)
    z = Unstructured(0.8).project(w)  # W did not move, U was zero
    assert torch.equal(pull.pairs[0].z["fc1"], z)
    assert pull.rho == pytest.approx(0.012)  # capped
    assert torch.allclose(pull.pairs[0].u["fc1"], (w - z) / 1.2)  # rescaled by the growth that happened


def test_admm_moves_weights_toward_the_set_and_hardens(trained, images):
    plan = uniform_plan(trained, Unstructured(0.95))
    one_shot_accuracy = evaluate(attach_masks(deepcopy(trained), one_shot(trained, plan)), images.validation)
    log = admm(trained, plan, images, epochs=10, lr=0.02, rho=0.05, rho_growth=1.5, rho_max=5.0, batch_size=20)
    assert log["distance"].iloc[-1] < log["distance"].iloc[0]
    assert all(plan[n].member(w) for n, w in weights(trained, plan).items())
    gap = (log["accuracy"] - log["hardened_accuracy"]).abs()
    assert gap.iloc[-1] < gap.iloc[0]
    assert evaluate(trained, images.validation) > one_shot_accuracy
    assert list(log["epoch"]) == list(range(1, 11))


def test_masked_retraining_after_admm_stays_in_the_set(trained, images):
    plan = uniform_plan(trained, Unstructured(0.9))
    admm(trained, plan, images, epochs=2, lr=0.02)
    m = one_shot(trained, plan)
    attach_masks(trained, m)
    fit(trained, images, epochs=1, lr=0.05, weight_decay=5e-4)
    assert all(not w[~m[n]].any() for n, w in weights(trained, plan).items())
    assert select(plan, weights(trained, plan))["fc1"].equal(m["fc1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 3, "interval": 2}, "positive multiple"),
        ({"epochs": 0}, "positive multiple"),
        ({"epochs": 1, "rho": 0.0}, "0 < rho <= rho_max"),
        ({"epochs": 1, "rho": 1.0, "rho_max": 0.1}, "0 < rho <= rho_max"),
        ({"epochs": 1, "rho_growth": 0.5}, "rho_growth >= 1"),
    ],
)
def test_admm_refuses_bad_schedules(net, images, options, message):
    with pytest.raises(TrainingError, match=message):
        admm(net, uniform_plan(net, Unstructured(0.5)), images, lr=0.01, **options)
