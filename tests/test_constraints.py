"""Laws that every constraint must obey (papers/pruning.md section A.1), and those of plans and masks."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch

from lib import constraint
from lib.constraint import ConstraintError, attach_masks, detach_masks, harden, project, select, weights
from lib.models import build, prunable
from lib.pruning import Unstructured, correlation, keep_largest, kept, rounds, uniform_plan

CONSTRAINTS = [Unstructured(s, scope) for s in (0.0, 0.3, 0.9, 0.999) for scope in ("layer", "global")]
SHAPES = [(7, 5), (4, 3, 3, 3), (50,)]


@pytest.fixture(params=SHAPES, ids=str)
def weight(request):
    return torch.randn(request.param, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("c", CONSTRAINTS, ids=str)
class TestEveryConstraint:
    def test_idempotent_and_member(self, c, weight):
        z = c.project(weight)
        assert torch.equal(c.project(z), z)
        assert c.member(z)

    def test_no_random_member_is_nearer(self, c, weight):
        generator = torch.Generator().manual_seed(1)
        distance = c.distance2(weight)
        for _ in range(200):
            mask = c.select(torch.randn(weight.shape, generator=generator))
            assert distance <= (weight - torch.where(mask, weight, 0)).square().sum() + 1e-6

    def test_cone(self, c, weight):
        assert torch.allclose(c.project(2.5 * weight), 2.5 * c.project(weight))

    @pytest.mark.parametrize("kind", ["random", "zero", "ties"])
    def test_exact_budget(self, c, weight, kind):
        w = {"random": weight, "zero": torch.zeros_like(weight), "ties": weight.sign()}[kind]
        assert int(c.select(w).sum()) == kept(c.sparsity, w.numel())


def test_ties_go_to_the_first():
    assert keep_largest(torch.ones(5), 2).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2, float("nan")])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(ConstraintError, match=r"sparsity = .*allowed are numbers in \[0, 1\)"):
        Unstructured(sparsity)


def test_unknown_scope():
    with pytest.raises(ConstraintError, match="'layer' and 'global'"):
        Unstructured(0.5, "network")


def test_global_budget_is_the_top_of_all_layers_together(net):
    layers = prunable(net)
    net.fc1.weight.data *= 10  # fc1 must then keep nearly all of the budget
    shared = Unstructured(0.9, "global")
    masks = select(uniform_plan(net, shared), weights(net, dict.fromkeys(layers, shared)))
    flat = torch.cat([layers[n].weight.detach().abs().reshape(-1) for n in layers])
    chosen = torch.cat([masks[n].reshape(-1) for n in layers])
    assert int(chosen.sum()) == kept(0.9, flat.numel())
    assert flat[chosen].min() >= flat[~chosen].max()
    assert masks["fc3"].float().mean() < 0.01 < masks["fc1"].float().mean()


def test_harden_puts_the_model_into_the_plan(net):
    plan = uniform_plan(net, Unstructured(0.8), keep_dense=("fc3",))
    before = net.fc3.weight.clone()
    harden(net, plan)
    assert all(plan[n].member(prunable(net)[n].weight) for n in plan)
    assert torch.equal(net.fc3.weight, before)
    assert constraint.sparsity(net, ["fc1", "fc2"]) == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"fc1": torch.ones(300, 784)}, "torch.float32"),
        ({"fc1": torch.ones(784, 300, dtype=torch.bool)}, "expected torch.bool \\(300, 784\\)"),
        ({"fc9": torch.ones(1, dtype=torch.bool)}, "'fc9'; the model has fc1"),
    ],
)
def test_a_wrong_mask_is_refused(net, mask, message):
    with pytest.raises(ConstraintError, match=message):
        attach_masks(net, mask)


def test_wrong_plans_are_refused(net):
    with pytest.raises(ConstraintError, match="plan is empty"):
        weights(net, {})
    with pytest.raises(ConstraintError, match="'conv1'; the model has fc1"):
        weights(net, {"conv1": Unstructured(0.5)})
    net.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(ConstraintError, match="'fc1' has weights that are not finite"):
        weights(net, {"fc1": Unstructured(0.5)})
    with pytest.raises(ConstraintError, match="keep_dense"):
        uniform_plan(net, Unstructured(0.5), keep_dense=("conv1",))


def test_masks_hold_and_come_off(net):
    plan = uniform_plan(net, Unstructured(0.7))
    masks = select(plan, weights(net, plan))
    attach_masks(net, masks)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(4, 1, 28, 28)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(prunable(net)[n].weight != 0, m) for n, m in masks.items())
    output = deepcopy(net)(torch.ones(1, 1, 28, 28))
    detach_masks(net)
    assert set(net.state_dict()) == set(build("lenet300", (1, 28, 28), 10).state_dict())
    assert torch.equal(net(torch.ones(1, 1, 28, 28)), output)


def test_masked_weight_gets_no_gradient(net):
    plan = uniform_plan(net, Unstructured(0.5))
    masks = select(plan, weights(net, plan))
    attach_masks(net, masks)
    net(torch.randn(4, 1, 28, 28)).square().sum().backward()
    gradient = constraint.leaf(net.fc1).grad
    assert not gradient[~masks["fc1"]].any()
    assert gradient[masks["fc1"]].any()


def test_projection_of_a_plan_is_layer_by_layer(net):
    plan = {"fc1": Unstructured(0.5), "fc3": Unstructured(0.9)}
    z = project(plan, weights(net, plan))
    assert set(z) == {"fc1", "fc3"}
    assert torch.equal(z["fc3"], Unstructured(0.9).project(net.fc3.weight))


def test_correlation_of_independent_and_equal_weights():
    generator = torch.Generator().manual_seed(0)
    a, b = ({n: torch.randn(400, 500, generator=generator) for n in ("x", "y")} for _ in range(2))
    for p in (0.1, 0.3, 0.5):
        assert correlation(a, a, p) == 1
        assert correlation(a, b, p) == pytest.approx(p, abs=0.005)
    assert correlation(a, {n: -3 * w for n, w in a.items()}, 0.2) == 1  # magnitudes count, not signs or scales


def test_correlation_is_pooled_over_layers_not_global():
    # a layer with huge weights must not crowd out the other: top p is taken in each
    a = {"x": 100 * torch.arange(1.0, 11), "y": torch.arange(1.0, 11)}
    b = {"x": 100 * torch.arange(1.0, 11), "y": torch.arange(10.0, 0, -1)}
    assert correlation(a, b, 0.5) == pytest.approx(0.5)


def test_correlation_refuses_more_weights_than_survive():
    sparse = {"x": torch.tensor([1.0, 2.0, 0.0, 0.0])}
    assert correlation(sparse, sparse, 0.5) == 1
    with pytest.raises(ValueError, match="3 weights of 'x', which has 2 nonzero"):
        correlation(sparse, sparse, 0.75)


def test_rounds_pass_through_every_target_and_never_loosen():
    path = rounds([0.9, 0.5, 0.97], 0.2)
    assert {0.5, 0.9, 0.97} <= set(path)
    assert path == sorted(path)
    assert len(path) == len(set(path))
    densities = [1.0] + [1 - s for s in path]
    assert all(after >= 0.8 * before - 1e-5 for before, after in pairwise(densities))
