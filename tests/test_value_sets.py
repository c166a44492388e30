"""Ternary by rule, expansions, powers of two, codebooks, unified blocks and factors: laws, and answers by brute force.

`Expansion` and `SmartExchange` are no projections: applied twice they move, which is
asserted here, so that nobody comes to count on the contrary.
"""

from itertools import combinations, product

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lib import models
from lib.constraint import ConstraintError, Storage, attach_masks, harden, nearest_power
from lib.layers import LayerError, branched
from lib.pruning import Filter, PolarizedFragments, Unstructured
from lib.quantization import (
    Expansion,
    Levels,
    PowerOfTwo,
    Quantized,
    TernaryRule,
    branch,
    ternary,
    uniform,
)
from lib.quantization.levels import STEP_BITS
from lib.shapes import prunable
from lib.sharing import BlockCirculant, Codebook, SmartExchange, Unified

SETS = [
    TernaryRule(),
    TernaryRule(0.3),
    PowerOfTwo(2),
    PowerOfTwo(4),
    PowerOfTwo(3, top=-1),
    Codebook(5),
    Codebook(5, "row"),
    Codebook(4, "kernel", seed=3),
    Codebook(3, "filter"),
    Unified(0.5),
    Unified(1.0, width=3),
    Unified(0.4, 0.3, 2, 2),
    Unified(0.6, 0.4, 2, 5),
    Unified(0.0, 0.5, 1, 8),
    BlockCirculant(2),
    BlockCirculant(4),
    BlockCirculant(5),
]

JOINT = [Quantized(Unstructured(0.8), Levels(2)), Quantized(Filter(0.5), Levels(2, step=0.3)), PolarizedFragments(4)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance2(c, weight):
    return (weight - c.project(weight)).square().sum()


def moved_in(c, z):
    """Another member: a small step along the tangent."""
    return z + 0.01 * c.tangent(z, random(*z.shape, seed=5))


@pytest.mark.parametrize("c", SETS, ids=str)
class TestLaws:
    def test_idempotent_and_member(self, c):
        c = c.fit({"w": random(6, 4, 3, 3)})["w"]
        z = c.project(random(6, 4, 3, 3))
        assert torch.allclose(c.project(z), z, atol=1e-6)
        assert c.member(z, 1e-5)
        assert not c.member(random(6, 4, 3, 3, seed=9), 1e-5)

    def test_no_random_member_is_nearer(self, c):
        weight = random(6, 4, 3, 3)
        c = c.fit({"w": weight})["w"]
        if not c.exact:
            pytest.skip("states that it need not take the nearest point")
        for seed in range(50):
            other = c.project(random(6, 4, 3, 3, seed=seed))
            assert distance2(c, weight) <= (weight - other).square().sum() + 1e-4

    def test_cone(self, c):
        weight = random(6, 4, 3, 3)
        same = torch.allclose(c.project(2.5 * weight), 2.5 * c.project(weight), atol=1e-5)
        assert same == c.cone

    def test_tangent_keeps_the_set(self, c):
        z = c.project(random(6, 4, 3, 3))
        assert c.member(moved_in(c, z), 1e-5)
        assert torch.allclose(c.tangent(z, c.tangent(z, z)), c.tangent(z, z), atol=1e-6)  # a projection itself

    def test_tangent_is_the_nearest_direction(self, c):
        """What it leaves of a gradient is at right angles to every direction it allows."""
        z, g = c.project(random(6, 4, 3, 3)), random(6, 4, 3, 3, seed=3)
        rest = g - c.tangent(z, g)
        for seed in range(5):
            along = c.tangent(z, random(6, 4, 3, 3, seed=20 + seed))
            assert abs(float((rest * along).sum())) < 1e-3

    def test_zeros_and_a_bill(self, c):
        assert not c.project(torch.zeros(6, 4, 3, 3)).any()
        assert c.storage_bits(c.project(random(6, 4, 3, 3)), 8).total > 0


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("c", [*SETS, Expansion(), SmartExchange(), uniform(4), Levels(2, step=0.3), *JOINT], ids=str)
def test_half_precision_and_one_dimension(c, half):
    """A point is found where numbers of few bits still differ, and rounded once; on kernels of one row too."""
    for shape in ((6, 4, 3, 3), (6, 4, 5)):
        weight = random(*shape).to(half)
        z = c.project(weight)
        assert z.dtype == half
        assert torch.equal(z, c.project(weight.float()).to(half))
        assert c.fit({"w": weight}) == c.fit({"w": weight.float()})
        moved = c.tangent(z, weight)
        assert moved.dtype == half
        assert moved.isfinite().all()
        assert c.storage_bits(z, 8).total > 0


class TestTernary:
    def test_rule_by_hand(self):
        weight = torch.tensor([1.0, -0.5, 0.04, 0.06, 0.0])
        a, threshold = branch(weight, 0.05)
        assert (a, threshold) == (pytest.approx(0.52), pytest.approx(0.05))
        assert TernaryRule().project(weight).tolist() == pytest.approx([a, -a, 0, a, 0])

    def test_the_projection_is_nearer_and_sparser(self):
        weight = random(10_000)
        rule, nearest = TernaryRule(), ternary()
        assert distance2(rule, weight) > 1.3 * distance2(nearest, weight)
        assert (rule.project(weight) == 0).float().mean() < 0.2
        assert (nearest.project(weight) == 0).float().mean() == pytest.approx(
            0.46, abs=0.02
        )  # of a normal, 0.612 sigma

    def test_branches_add_up(self):
        weight = random(2000)
        first, second = branch(weight, 0.05)[0], branch(weight, 0.1)[0]
        z = Expansion().project(weight)
        assert z.abs().unique().tolist() == pytest.approx([0, first, first + second])
        assert Expansion().member(z)
        assert not Expansion((0.05,)).member(z)
        assert Expansion.of(4).betas == (0.05, 0.1, 0.15, 0.2)
        assert torch.equal(Expansion((0.3,)).project(weight), TernaryRule(0.3).project(weight))

    def test_an_expansion_moves_when_applied_twice(self):
        z = Expansion().project(random(2000))
        assert not torch.allclose(Expansion().project(z), z, atol=0.1)

    def test_magnitudes_move_apart(self):
        z = torch.tensor([1.0, -1.0, 2.0, 0.0, 2.0])
        moved = Expansion().tangent(z, torch.tensor([1.0, 3.0, 5.0, 7.0, -1.0]))
        assert moved.tolist() == [-1.0, 1.0, 2.0, 0.0, 2.0]

    def test_bill(self):
        z = Expansion().project(random(1000))
        few = Storage(2 * int(z.count_nonzero()), 1000, 2 * STEP_BITS)  # 4 values and a bitmap, less than 5 values
        assert Expansion().storage_bits(z, 8) == few
        assert Expansion.of(4).storage_bits(Expansion.of(4).project(random(1000)), 8).total <= 4000 + 4 * STEP_BITS

    def test_a_network_of_branches(self):
        net = models.build("lenet5", (1, 28, 28), 10, seed=0).eval()
        plan = {"conv2": Expansion.of(3), "fc2": TernaryRule(), "conv1": Expansion()}
        attach_masks(net, {"conv2": net.conv2.weight > 0})
        net.conv1.weight.data.zero_()
        x = torch.randn(4, 1, 28, 28)
        with pytest.raises(LayerError, match="conv2: its weights are no sum"):
            branched(net, plan)
        harden(net, plan)
        parts = branched(net, plan)
        assert torch.allclose(parts(x), net(x), atol=1e-5)
        assert [len(parts.get_submodule(n).layers) for n in plan] == [3, 1, 1]
        for layer in prunable(parts.conv2).values():
            assert len(layer.weight.abs().unique()) == 2
        assert isinstance(parts.fc1, nn.Linear)
        assert all(p.requires_grad for p in parts.parameters())
        assert not any(p.requires_grad for p in branched(net.requires_grad_(False), plan).parameters())
        assert is_parametrized(net.conv2)  # the original stays as it is

    def test_modules_that_share_a_weight_share_its_branches(self):
        a, b = nn.Linear(4, 4), nn.Linear(4, 4)
        b.weight = a.weight
        net, x = nn.Sequential(a, nn.Tanh(), b, a), torch.randn(3, 4)
        plan = {"0": Expansion((0.4, 0.8))}
        harden(net, plan)
        parts = branched(net, plan)
        assert torch.allclose(parts(x), net(x), atol=1e-5)
        assert parts[0] is parts[3]
        assert [*prunable(parts)] == ["0.layers.0", "0.layers.1"]

    @pytest.mark.parametrize("betas", [(), (0.1, 0.05), (0.1, 0.1), (0.0,), (1.5,)])
    def test_refusals(self, betas):
        with pytest.raises(ConstraintError, match="beta"):
            Expansion(betas)


class TestPowers:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("top", [-3, 0, 2])
    def test_nearest_of_all_values(self, bits, top):
        c = PowerOfTwo(bits, top)
        powers = [2.0 ** (top - i) for i in range(c.count)]
        values = torch.tensor([0.0, *powers, *(-p for p in powers)])
        weight = random(3000) * random(3000, seed=1).exp()
        z = c.project(weight)
        assert set(z.unique().tolist()) <= set(values.tolist())
        assert torch.allclose((z - weight).abs(), (weight[:, None] - values).abs().min(1).values)

    def test_half_way(self):
        assert nearest_power(torch.tensor([1.49, 1.51, 0.24, 0.26]), 1, 3).tolist() == [1.0, 2.0, 0.0, 0.5]

    def test_the_best_top_of_many(self):
        for seed in range(10):
            weight = random(500, seed=seed) * 0.07
            best = distance2(PowerOfTwo(3), weight)
            assert all(best <= distance2(PowerOfTwo(3, top), weight) for top in range(-20, 5))

    def test_bill(self):
        z = PowerOfTwo(4).project(random(1000))
        assert PowerOfTwo(4).storage_bits(z, 8).data in (4000, 4 * int(z.count_nonzero()))


@pytest.mark.parametrize("c", [PowerOfTwo(3), Codebook(2), Levels(1)], ids=str)
def test_a_layer_of_zeros_chooses_no_values(c):
    """Frozen at nothing, it would hold all later weights at zero."""
    with pytest.raises(ConstraintError, match="fc has no weight that is not zero"):
        c.fit({"conv": torch.ones(2, 2), "fc": torch.zeros(2, 2)})
    assert not c.project(torch.zeros(2, 2)).any()
    assert c.fit(fixed := {"fc": torch.tensor([1.0, 2.0])})["fc"].fit({"fc": torch.zeros(2)}) == c.fit(fixed)


class TestCodebook:
    def test_single_weights_by_brute_force(self):
        """Of sorted numbers, clusters are runs: the best of all cuts is found from some start."""
        for seed in range(3):
            weight = random(9, seed=seed)
            a = weight.sort().values
            best = min(
                sum(float((part - part.mean()).square().sum()) for part in a.tensor_split(cuts))
                for cuts in combinations(range(1, 9), 2)
            )
            found = min(float(distance2(Codebook(3, seed=s), weight)) for s in range(40))
            assert found == pytest.approx(best, rel=1e-4)

    @pytest.mark.parametrize("sample", ["weight", "row", "kernel", "filter"])
    def test_samples_share_entries(self, sample):
        c = Codebook(4, sample)
        z = c.project(random(8, 5, 3, 3))
        length = {"weight": 1, "row": 3, "kernel": 9, "filter": 45}[sample]
        assert c.samples(z).shape == (360 // length, length)
        assert len(z.reshape(-1, length).unique(dim=0)) == 4

    def test_zero_samples_stay(self):
        weight = random(8, 5, 3, 3)
        weight[:, 2] = 0
        z = Codebook(3, "kernel").project(weight)
        assert not z[:, 2].any()
        assert len(Codebook(3, "kernel").samples(z).unique(dim=0)) == 4

    def test_entropy(self):
        z = torch.tensor([1.0] * 50 + [2.0] * 25 + [3.0] * 25).reshape(10, 10)
        assert Codebook(3).storage_bits(z, 8) == Storage(150.0, 0.0, 3 * 32)

    def test_few_samples_are_kept_as_they_are(self):
        weight = random(3, 7)
        assert torch.allclose(Codebook(3, "filter").project(weight), weight)

    def test_refusals(self):
        with pytest.raises(ConstraintError, match="a layer \\(4, 4\\) has none"):
            Codebook(2, "row").project(random(4, 4))
        with pytest.raises(ConstraintError, match="sample"):
            Codebook(2, "column")
        with pytest.raises(ConstraintError, match="k = 0"):
            Codebook(0)


def blocks_of(weight, width):
    return weight.reshape(-1, width)


class TestUnified:
    def test_rounding_hides_no_difference(self):
        """A block whose magnitudes nearly meet costs more than one where they are equal, in single precision too."""
        equal = random(1, 200).repeat_interleave(2, 1)
        near = torch.tensor([[0.06054450571537018, -0.06050914153456688]])
        one, _ = Unified(200 / 201, width=2).states(torch.cat([near, equal], 1))
        assert one.tolist() == [False] + [True] * 200

    @pytest.mark.parametrize(("share", "pruned"), [(0.5, 0), (0, 0.5), (0.5, 0.5), (1, 0), (0.25, 0.75)])
    def test_exact_over_all_choices(self, share, pruned):
        c = Unified(share, pruned, 1, 3)
        assert c.exact
        for seed in range(10):
            weight = random(2, 6, seed=seed)
            costs = []
            for states in product((0, 1, 2), repeat=4):
                if states.count(1) == round(4 * share) and states.count(2) == round(4 * pruned):
                    parts = zip(blocks_of(weight, 3), states, strict=True)
                    costs.append(
                        sum((0, (b.abs() - b.abs().mean()).square().sum(), b.square().sum())[s] for b, s in parts)
                    )
            assert float(distance2(c, weight)) == pytest.approx(float(min(costs)), rel=1e-4)

    def test_pruning_first_is_not_always_best(self):
        """The weakest block goes, though it is unified already and a stronger one would lose less as zero."""
        c, weight = Unified(0.25, 0.25, 1, 2), torch.tensor([[0.5, 0.5, 0.8, 0.0, 5.0, 1.0, 9.0, 1.0]])
        assert not c.exact
        assert c.project(weight).tolist()[0][:4] == pytest.approx([0, 0, 0.4, 0.4])
        better = torch.tensor([[0.5, 0.5, 0.0, 0.0, 5.0, 1.0, 9.0, 1.0]])
        assert (better - weight).square().sum() < distance2(c, weight)

    def test_signs_and_short_blocks(self):
        weight = torch.tensor([[1.0, -2.0, 3.0, 0.0, -4.0]])
        assert Unified(1.0, width=4).project(weight).tolist() == [[1.5, -1.5, 1.5, 1.5, -4.0]]

    def test_training_inside_needs_the_tangent(self):
        """A step along the plain gradient leaves the set: a mask would not do."""
        c, g = Unified(1.0), random(8, 8, seed=3)
        z = c.project(random(8, 8))
        assert not c.member(z - 0.1 * g, 1e-4)
        assert c.member(z - 0.1 * c.tangent(z, g), 1e-6)

    def test_multiplications(self):
        weight = random(8, 16)
        assert Unified(1.0, width=4).multiplications(weight) == 8 * 4
        assert Unified(1.0, height=4, width=1).multiplications(weight) == 2 * 16
        assert Unified(1.0, height=4, width=4).multiplications(weight) == 2 * 4 * 4
        assert Unified(0.5, width=4).multiplications(weight) == 16 + 16 * 4
        assert Unified(0.5, 0.5, width=4).multiplications(weight) == 16
        assert Unified(0.0, width=4).multiplications(weight) == 128

    def test_bill(self):
        weight = random(8, 16)
        z = Unified(0.5, width=4).project(weight)
        assert Unified(0.5, width=4).storage_bits(z, 8) == Storage(16 * (7 + 4) + 16 * 32, 32)

    def test_refusals(self):
        for share, pruned in ((1.2, 0), (-0.1, 0), (0.6, 0.6), (float("nan"), 0)):
            with pytest.raises(ConstraintError, match="share"):
                Unified(share, pruned)


class TestSmartExchange:
    @pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 5, 5), (10, 50), (7, 4, 1, 1), (2, 600, 3, 3)])
    def test_the_product_is_that_of_its_factors(self, shape):
        c, weight = SmartExchange(), random(*shape) * 0.05
        f = c.factors(weight)
        n = shape[-1] if len(shape) == 4 and shape[-1] > 1 else 3
        assert f.coefficients.shape[1] <= 192
        assert f.basis.shape == (len(f.coefficients), n, n)
        assert f.weight.shape == weight.shape
        assert torch.allclose(
            c.slices(f.weight), f.coefficients @ f.basis * (c.slices(torch.ones(shape)) > 0), atol=1e-6
        )
        powers = f.coefficients[f.coefficients != 0].abs().log2()
        assert torch.equal(powers, powers.round())
        assert powers.min() >= -6
        assert powers.max() <= 0

    @pytest.mark.parametrize("bits", [4, 8])
    def test_bases_are_whole_numbers_of_so_many_bits(self, bits):
        f = SmartExchange(basis_bits=bits).factors(random(16, 3, 3, 3) * 0.05)
        for basis in f.basis:
            step = 2.0 ** next(e for e in range(-40, 10) if basis.abs().max() / 2.0**e <= 2 ** (bits - 1) - 1)
            assert torch.equal(basis / step, (basis / step).round())
        rough, fine = (min(SmartExchange(basis_bits=b).factors(random(16, 3, 3, 3)).errors) for b in (bits, 16))
        assert rough >= fine

    def test_the_best_turn_is_taken_though_errors_rise(self):
        rose = 0
        for seed in range(6):
            weight = random(16, 3, 3, 3, seed=seed)
            f = SmartExchange(0.3).factors(weight)
            assert float((weight - f.weight).norm() / weight.norm()) == pytest.approx(min(f.errors), rel=1e-4)
            rose += any(b > a + 1e-6 for a, b in zip(f.errors, f.errors[1:], strict=False))
        assert rose > 2

    def test_an_exact_product_is_found(self):
        """Powers of two in the unit basis come back as they are."""
        weight = nearest_power(random(4, 6, 3, 3), 1, 7)
        f = SmartExchange(threshold=0.001).factors(weight)
        assert min(f.errors) < 1e-6
        assert torch.allclose(f.weight, weight, atol=1e-5)

    def test_scale_does_not_matter(self):
        weight = random(16, 3, 3, 3)
        a, b = (SmartExchange().factors(s * weight) for s in (1, 8))
        assert torch.equal(a.coefficients, b.coefficients)

    def test_not_idempotent(self):
        moved = 0
        for seed in range(4):
            z = SmartExchange(0.3).project(random(16, 3, 3, 3, seed=seed))
            moved += not torch.allclose(SmartExchange(0.3).project(z), z, atol=1e-4)
        assert moved > 1
        with pytest.raises(ConstraintError, match="keep its factors"):
            SmartExchange().member(z)

    def test_tangent_is_what_bases_can_do(self):
        c, weight = SmartExchange(), random(6, 4, 3, 3)
        z, g = c.project(weight), random(6, 4, 3, 3, seed=1)
        once = c.tangent(z, g)
        assert torch.allclose(c.tangent(z, once), once, atol=1e-4)
        assert float((g * once).sum()) == pytest.approx(float(once.square().sum()), rel=1e-3)

    def test_bill(self):
        c, weight = SmartExchange(), random(16, 3, 3, 3)
        f = c.factors(weight)
        bill = f.storage(c.bits, c.basis_bits)
        assert bill.data == 4 * int(f.coefficients.count_nonzero())
        assert bill.table == 16 * (9 * 8 + 8)
        assert bill.index <= f.coefficients.numel()
        weight[:12] = 0
        assert c.storage_bits(weight, 8).table == 4 * (9 * 8 + 8)  # nothing is made of the other bases

    def test_refusals(self):
        for bad in ({"threshold": 1.0}, {"bits": 1}, {"basis_bits": 1}, {"iterations": 0}, {"rows": 2}):
            with pytest.raises(ConstraintError, match="allowed"):
                SmartExchange(**bad)


def test_uniform_levels():
    assert uniform(2) == ternary()
    assert uniform(8).per_side == 127
    assert len(uniform(4).project(random(5000)).unique()) == 15
    with pytest.raises(ConstraintError, match="bits"):
        uniform(1)
