"""Levels against brute force, joint sets against every support, and recipes that train toward them."""

from copy import deepcopy
from itertools import combinations

import pytest
import torch
from torch import nn

from lib.constraint import ConstraintError, Storage
from lib.constraint.formats import escaped_runs
from lib.pruning import NATURAL, Block, Column, Filter, Patterns, Unstructured
from lib.quantization import Levels, Quantized, binary, quantize_activations, ternary
from lib.quantization.levels import STEP_BITS, best_step

LEVELS = [
    *(Levels(k, zero, step) for k in (1, 2, 4, 31) for zero in (False, True) for step in (None, 0.05, 0.4)),
]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance2(c, weight):
    return (weight - c.project(weight)).square().sum()


def grid(values, step):
    """All allowed values of levels, by listing them."""
    positive = [i * step for i in range(1, values.per_side + 1)]
    return torch.tensor([-p for p in positive] + positive + [0.0] * values.zero)


@pytest.mark.parametrize("values", LEVELS, ids=str)
class TestLevels:
    def test_every_weight_goes_to_the_nearest_value(self, values):
        weight = random(300)
        z = values.project(weight)
        allowed = grid(values, values.step or best_step(weight, values.per_side, values.zero))
        assert torch.allclose((z - weight).abs(), (weight[:, None] - allowed).abs().min(1).values, atol=1e-5)

    def test_idempotent_and_member(self, values):
        z = values.project(random(20, 30))
        assert values.member(z, 1e-5)
        assert torch.allclose(values.project(z), z, atol=1e-5)
        assert len(z.unique()) <= 2 * values.per_side + values.zero

    def test_exact_zeros_are_off_the_support(self, values):
        weight = torch.where(random(200, seed=1) > 0, random(200), 0.0)
        z = values.project(weight)
        assert (z[weight == 0] == 0).all()
        assert torch.equal(z[weight != 0], values.project(weight[weight != 0]))
        assert not values.project(torch.zeros(5)).any()

    def test_cone_when_the_step_is_free(self, values):
        weight = random(200)
        assert torch.allclose(values.project(2.5 * weight), 2.5 * values.project(weight), atol=1e-4) == values.cone

    def test_tangent_stays_in_the_set(self, values):
        z, gradient = values.project(random(200)), random(200, seed=1)
        moved = values.tangent(z, gradient)
        assert bool(moved.any()) == (values.step is None)
        assert values.member(z + 0.1 * moved, 1e-5)
        if values.step is None:  # the nearest of all directions that keep the set: what is left is at right angles
            assert abs(float(((gradient - moved) * z).sum())) < 1e-3

    def test_fit_freezes_the_step(self, values):
        weight = random(200)
        fitted = values.fit({"a": weight, "b": 3 * weight})
        assert torch.equal(fitted["a"].project(weight), values.project(weight))
        assert fitted["b"].step == pytest.approx(3 * fitted["a"].step if values.step is None else values.step)
        assert fitted["a"].exact


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("per_side", [1, 2, 3, 7, 31])
def test_no_step_of_a_fine_grid_is_better(per_side, zero):
    for seed in range(5):
        weight = random(400, seed=seed) * random(400, seed=99).exp()
        found = distance2(Levels(per_side, zero, best_step(weight, per_side, zero)), weight)
        steps = torch.linspace(0.01, 1.2, 1500)[:, None] * weight.abs().max() / max(1, per_side - 1)
        levels = (weight.abs() / steps).round().clamp(0 if zero else 1, per_side)  # (steps, weights)
        assert found <= (weight.abs() - levels * steps).square().sum(1).min() * 1.001


def test_binary_and_ternary_by_brute_force():
    for seed in range(20):
        weight = random(7, seed=seed)
        a = weight.abs().mean()
        assert torch.allclose(binary().project(weight), a * weight.sign())
        s = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 7)  # (3^7, 7): all choices of signs
        scale = (s @ weight) / s.square().sum(1).clamp(min=1)
        best = float((weight - scale[:, None] * s).square().sum(1).min())
        assert float(distance2(ternary(), weight)) == pytest.approx(best, rel=1e-4)


class TestJoint:
    def test_exact_over_all_supports_and_levels(self):
        values = Levels(2, step=0.6)
        for seed in range(20):
            weight = random(6, seed=seed)
            costs = (weight[:, None] - grid(values, 0.6)).square().min(1).values
            kept = [s for k in (1, 2, 3) for s in combinations(range(6), k)]
            best = min(
                float(sum(costs[i] if i in s else weight[i] ** 2 for i in range(6))) for s in [(), *kept]
            )  # at most 3
            assert float(distance2(Quantized(Unstructured(0.5), values), weight)) == pytest.approx(best, rel=1e-5)

    def test_groups_are_kept_by_what_their_levels_save(self):
        """A group of small weights has the largest norm, but its levels are so far away that it saves nothing."""
        weight = torch.tensor([[0.45] * 8, [1.0, 0.0, 0, 0, 0, 0, 0, 0]])
        c = Quantized(Filter(0.5), Levels(1, step=1.0))
        assert float(weight[0].norm()) > float(weight[1].norm())
        assert torch.equal(c.project(weight), torch.tensor([[0.0] * 8, [1.0] + [0.0] * 7]))

    @pytest.mark.parametrize("step", [None, 0.3])
    @pytest.mark.parametrize(
        "support", [Unstructured(0.8), Filter(0.5), Column(0.6), Block(0.5, 2, 3), Patterns(library=NATURAL)], ids=str
    )
    def test_laws(self, support, step):
        weight = random(6, 4, 3, 3)
        c = Quantized(support, Levels(2, step=step)).fit({"": weight})[""]
        z = c.project(weight)
        assert c.exact
        assert torch.equal(c.project(z), z)
        assert c.member(z)
        assert bool(z.count_nonzero() <= support.select(weight).count_nonzero())
        assert set((z.abs() / c.values.step).round().unique().tolist()) <= {0.0, 1.0, 2.0}
        for seed in range(50):  # random members: any support of the set, any levels
            mask = support.select(random(6, 4, 3, 3, seed=seed))
            other = torch.where(mask, c.values.project(random(6, 4, 3, 3, seed=seed + 100)), 0.0)
            assert distance2(c, weight) <= (weight - other).square().sum() + 1e-5

    def test_free_step_is_as_good_as_pruning_and_then_quantizing(self):
        weight = random(40, 50)
        free = Quantized(Unstructured(0.9), binary())
        assert not free.exact
        two_steps = binary().project(Unstructured(0.9).project(weight))
        assert distance2(free, weight) <= (weight - two_steps).square().sum() + 1e-4
        assert not free.project(torch.zeros(4, 4)).any()

    def test_a_frozen_support_stays(self):
        """Inside a mask nothing is traded: zeros save nothing."""
        mask = Unstructured(0.9).select(random(40, 50))
        weight = torch.where(mask, random(40, 50), 0.0)
        assert not Quantized(Unstructured(0.5), Levels(4)).project(weight)[~mask].any()


class TestStorage:
    def test_dense_levels(self):
        z = Levels(4, step=0.1).project(random(100))
        assert Levels(4, step=0.1).storage_bits(z, 32) == Storage(300, 0, STEP_BITS)
        assert Levels(63).bits == 7

    def test_zero_may_be_named(self):
        dense = Levels(3, zero=True, step=1.0)
        z = dense.project(random(1000) * 3)
        assert dense.storage_bits(z, 32) == Storage(3000, 0, STEP_BITS)  # 7 values
        few = torch.where(random(1000) > 2, 1.0, 0.0)
        assert dense.storage_bits(few, 32).total < 1000

    def test_joint_takes_the_account_of_its_support(self):
        z = torch.zeros(8, 100)
        z[::2] = 0.1
        c = Quantized(Filter(0.5), Levels(2, step=0.1))
        assert c.storage_bits(z, 32) == Storage(400 * 2, 8, STEP_BITS)  # 4 filters of 100 weights, one bit a filter
        z[0, 7] = 0  # a fifth number
        assert c.storage_bits(z, 32) == Storage(400 * 3, 8, STEP_BITS)
        z = torch.where(random(500, seed=5) > 2, 1.0, 0.0)
        assert Quantized(Unstructured(0.9), Levels(2, step=1.0)).storage_bits(z, 32) == escaped_runs(
            z != 0, 2
        )._replace(table=STEP_BITS)


def test_ranges_of_halves_are_those_of_the_wide_network():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(256, 4)), torch.randn(4000, 256).relu() * 30  # squares end above 65,504
    found = [quantize_activations(deepcopy(net).to(t), 4, x.to(t))[0].quantize_input for t in (torch.half, torch.float)]
    assert float(found[0].scale) == pytest.approx(float(found[1].scale), rel=0.05)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Levels(0),
        lambda: Levels(1.5),
        lambda: Levels(2, step=-1.0),
        lambda: Levels(2, step=float("nan")),
        lambda: Quantized(Unstructured(0.5, "global"), binary()),
        lambda: Levels(2).fit({"fc": torch.zeros(3)}),
    ],
)
def test_bad_input_is_named(make):
    with pytest.raises(ConstraintError, match=r"per_side|step|couples"):
        make()
