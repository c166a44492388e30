"""Laws that every constraint must obey, and those of plans and masks."""

from copy import deepcopy
from dataclasses import fields
from itertools import combinations, pairwise
from math import ceil

import numpy as np
import pytest
import torch

from lib import constraint
from lib.constraint import (
    Constraint,
    ConstraintError,
    attach_masks,
    detach_masks,
    fitted,
    harden,
    keep_largest,
    keep_largest_in_rows,
    kept,
    masks,
    project,
    select,
    weights,
)
from lib.constraint.views import blocks, gemm, joined, kernel_area
from lib.models import build
from lib.pruning import (
    DARB,
    NATURAL,
    NM,
    PCNN,
    PUBLISHED,
    AlignedLines,
    Block,
    BlockColumns,
    BlockLines,
    BlockRows,
    BlockStructured,
    Channel,
    Column,
    Filter,
    FilterColumn,
    GroupAdaptive,
    Kernel,
    LayerAdaptive,
    PatternKernels,
    Patterns,
    PETile,
    SharedShapes,
    SubmatrixAdaptive,
    Unstructured,
    block_max,
    correlation,
    first_conv,
    rounds,
    uniform_plan,
)
from lib.pruning.adaptive import _lamp
from lib.shapes import prunable

GROUPS = {  # constraint: height and width of a group, then of the region that has the budget, on the GEMM matrix
    Unstructured(0.0): lambda f, k, a: ((1, 1), (f, k)),
    Unstructured(0.3): lambda f, k, a: ((1, 1), (f, k)),
    Unstructured(0.999): lambda f, k, a: ((1, 1), (f, k)),
    Unstructured(0.9, "global"): lambda f, k, a: ((1, 1), (f, k)),
    Filter(0.6): lambda f, k, a: ((1, k), (f, k)),
    Filter(0.6, coupled="sum"): lambda f, k, a: ((1, k), (f, k)),
    Column(0.7): lambda f, k, a: ((f, 1), (f, k)),
    Channel(0.5): lambda f, k, a: ((f, a), (f, k)),
    Kernel(0.7): lambda f, k, a: ((1, a), (f, k)),
    Block(0.6, 2, 4): lambda f, k, a: ((2, 4), (f, k)),
    Block(0.6, 64, 64): lambda f, k, a: ((64, 64), (f, k)),
    PETile(0.5, 4, 2): lambda f, k, a: ((4, 2 * a), (f, k)),
    BlockColumns(0.6, 4, 5): lambda f, k, a: ((min(4, f), 1), (min(4, f), 5)),
    BlockColumns(0.6, 4, 5, per="layer"): lambda f, k, a: ((min(4, f), 1), (f, k)),
    BlockRows(0.6, 4, 5): lambda f, k, a: ((1, min(5, k)), (4, min(5, k))),
    NM(n=2, m=4): lambda f, k, a: ((1, 1), (1, 4)),
    NM(n=3, m=7): lambda f, k, a: ((1, 1), (1, 7)),
    NM(n=5, m=20): lambda f, k, a: ((1, 1), (1, 20)),
    block_max(8): lambda f, k, a: ((1, 1), (1, 8)),
}
PATTERNED = [
    Patterns(4),
    Patterns(library=NATURAL),
    Patterns(library=PUBLISHED["T"]),
    PatternKernels(4, sparsity=0.6),
    PCNN(3),
    PCNN(2, patterns=5),
]
COMPOSED = [
    FilterColumn(0.5, 0.6),
    BlockStructured(0.5, 0.5, 4, 5),
    DARB(0.8),
    DARB(0.5, menu=(2, 8)),
    BlockLines(0.5, 0.4, 3, 5),
    AlignedLines(0.5, 0.6, rows=4, filters=2),
    SharedShapes(0.5, rows=4, shapes=2),
]
SHAPE = (1, 28, 28)  # of an image
SHAPES = [(7, 5), (20, 13), (6, 4, 3, 3), (6, 4, 5), (50,)]  # the fourth is a convolution along one dimension
CASES = [(c, s) for c in [*GROUPS, *PATTERNED, *COMPOSED] for s in SHAPES if len(s) == 4 or c not in PATTERNED]
CASES += [(c, (6, 4, 5)) for c in (Patterns(library=(0b00111, 0b11100, 0b10101)), PCNN(3), PCNN(2, patterns=3))]


def distance2(c, weight):
    return (weight - c.project(weight)).square().sum()


@pytest.fixture
def net():
    return build("lenet300", SHAPE, 10, seed=1)


def tiles(shape, size):
    """The tiles of a GEMM matrix as slices, by plain loops."""
    (rows, columns), (height, width) = shape, size
    return [
        (slice(i, min(i + height, rows)), slice(j, min(j + width, columns)))
        for i in range(0, rows, height)
        for j in range(0, columns, width)
    ]


def by_loops(weight, group, region, sparsity):
    """The mask of a group set, computed tile by tile: what the vectorized code must agree with."""
    matrix = weight.reshape(1, -1) if weight.dim() == 1 else weight.reshape(len(weight), -1)
    mask = torch.zeros(matrix.shape, dtype=torch.bool)
    for place in tiles(matrix.shape, region):
        inside, inside_mask = matrix[place], mask[place]
        groups = tiles(inside.shape, group)
        by_norm = sorted(groups, key=lambda g: -float(inside[g].double().square().sum()))
        for g in by_norm[: kept(sparsity, len(groups))]:
            inside_mask[g] = True
    return mask.reshape(weight.shape)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} {case[1]}".replace(str(NATURAL), "NATURAL"))
def case(request):
    """A constraint, fitted, and a weight for it."""
    c, shape = request.param
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return c.fit({"layer": weight})["layer"], weight


class TestEveryConstraint:
    def test_idempotent_and_member(self, case):
        c, weight = case
        z = c.project(weight)
        assert torch.equal(c.project(z), z)
        assert c.member(z)
        assert c.member(weight) == bool((z == weight).all())

    def test_no_random_member_is_nearer(self, case):
        c, weight = case
        if not c.exact:
            pytest.skip("states that its projection need not be the nearest point")
        generator = torch.Generator().manual_seed(1)
        distance = distance2(c, weight)
        for _ in range(30):
            mask = c.select(torch.randn(weight.shape, generator=generator))
            assert distance <= (weight - torch.where(mask, weight, 0)).square().sum() + 1e-5

    def test_a_member_with_a_weight_near_zero_is_one(self, case):
        """Its square is below the rounding of a sum in single precision, and must decide all the same."""
        c, weight = case
        z = c.project(weight)
        small = z.flatten()
        for i in small.nonzero().flatten().tolist()[:40]:
            near = small.clone()
            near[i] = 2e-5 * z.abs().max()
            assert c.member(near.view_as(z), 1e-6 * float(z.abs().max())) or not c.exact

    def test_cone(self, case):
        c, weight = case
        assert torch.allclose(c.project(2.5 * weight), 2.5 * c.project(weight))

    @pytest.mark.parametrize("kind", ["zero", "ties"])
    def test_the_budget_is_met_under_ties(self, case, kind):
        c, weight = case
        w = {"zero": torch.zeros_like(weight), "ties": weight.sign()}[kind]
        if c in GROUPS:
            flat = weight.reshape(1, -1) if weight.dim() == 1 else weight.reshape(len(weight), -1)
            group, region = GROUPS[c](*flat.shape, kernel_area(weight))
            masks_of_groups = by_loops(w, group, region, c.sparsity)
            assert torch.equal(c.select(w), masks_of_groups)
        elif type(c) is Patterns or isinstance(c, PCNN):
            size = c.n if isinstance(c, PCNN) else c.library[0].bit_count()
            assert (c.select(w).flatten(2).sum(2) == size).all()
        elif isinstance(c, PatternKernels):
            assert int(c.select(w).sum()) == 4 * kept(c.sparsity, 24)
        else:
            assert int(c.select(w).sum()) == int(c.select(weight).sum())

    def test_tangent_moves_only_what_is_kept(self, case):
        c, weight = case
        z, gradient = c.project(weight), torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
        moved = c.tangent(z, gradient)
        assert torch.equal(moved != 0, z != 0)
        assert c.member(z + 0.1 * moved)

    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_is_the_same_choice(self, case, half):
        """Sums and squares are taken where the numbers of few bits still differ."""
        c, weight = case
        z = c.project(weight.to(half))
        assert z.dtype == half
        assert torch.equal(z.float(), c.project(weight.to(half).float()))
        assert c.fit({"layer": weight.to(half)}) == c.fit({"layer": weight.to(half).float()})
        assert c.tangent(z, z).dtype == half

    def test_numbers_of_numpy_are_numbers(self, case):
        c, weight = case
        kinds = {int: np.int64, float: np.float64}
        values = {f.name: getattr(c, f.name) for f in fields(c) if f.init}
        same = type(c)(**{n: kinds.get(type(v), lambda v: v)(v) for n, v in values.items()})
        assert same == c
        assert torch.equal(same.project(weight), c.project(weight))
        assert same.storage_bits(c.project(weight), 8) == c.storage_bits(c.project(weight), 8)

    def test_stored_data_are_the_weights_that_the_format_holds(self, case):
        c, weight = case
        z = c.project(weight)
        narrow, wide = c.storage_bits(z, 2), c.storage_bits(z, 8)
        assert wide.data == 4 * narrow.data >= 8 * int(z.count_nonzero())
        assert narrow.index >= 0
        assert narrow.table == wide.table


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("c", GROUPS, ids=str)
def test_groups_agree_with_plain_loops(c, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    rows = 1 if len(shape) == 1 else shape[0]
    group, region = GROUPS[c](rows, weight.numel() // rows, kernel_area(weight))
    assert torch.equal(c.select(weight), by_loops(weight, group, region, c.sparsity))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 1), (64, 64)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_joined_as_they_were_cut(shape, size):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = blocks(gemm(weight), size)
    for place, block in zip(tiles(gemm(weight).shape, size), found.flatten(0, 1), strict=True):
        inside = gemm(weight)[place]
        assert torch.equal(block[: inside.shape[0], : inside.shape[1]], inside)
        assert block.count_nonzero() == inside.count_nonzero()
    assert torch.equal(joined(found, weight.shape), weight)


def brute_force(weight, supports):
    """The most energy that any of the supports (lists of flat positions) keeps."""
    energy = weight.reshape(-1).square()
    return max(float(energy[list(s)].sum()) for s in supports)


def test_pattern_kernels_projection_is_the_joint_optimum():
    c = PatternKernels(library=PUBLISHED["T"], sparsity=0.5)
    positions = [[i for i in range(9) if code >> i & 1] for code in c.library]
    for seed in range(20):
        weight = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
        supports = [
            [9 * i + x for x in positions[p]] + [9 * j + x for x in positions[q]]
            for i, j in combinations(range(4), 2)
            for p in range(4)
            for q in range(4)
        ]
        assert float(c.project(weight).square().sum()) == pytest.approx(brute_force(weight, supports))


def test_ranking_kernels_by_norm_is_not_the_joint_projection():
    """A kernel of nine equal weights has the larger norm and keeps less in four of them."""
    weight = torch.zeros(1, 2, 3, 3)
    weight[0, 0] = 1.0  # norm 3, keeps 2
    weight[0, 1, :2, 1] = 2.0  # norm 2.83, keeps all of it
    mask = PatternKernels(library=PUBLISHED["T"], sparsity=0.5).select(weight)
    assert not mask[0, 0].any()
    assert mask[0, 1].sum() == 4
    assert Kernel(0.5).select(weight)[0, 0].all()


def best_submatrix(energy, n, m):
    """The most that ``n`` rows and ``m`` columns keep, over all choices of both."""
    rows, columns = energy.shape
    return max(
        float(energy[list(i)][:, list(j)].sum())
        for i in combinations(range(rows), n)
        for j in combinations(range(columns), m)
    )


@pytest.mark.parametrize("shape", [(4, 4), (6, 5), (3, 8)])
def test_filter_and_column_is_the_optimum_where_small(shape):
    """Alternation alone misses it in one of twelve such draws."""
    for seed in range(30):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        mask = FilterColumn(0.5, 0.4).select(weight)
        n, m = kept(0.5, shape[0]), kept(0.4, shape[1])
        assert (mask.any(1).sum(), mask.any(0).sum(), mask.sum()) == (n, m, n * m)
        assert float(weight.square()[mask].sum()) == pytest.approx(best_submatrix(weight.square(), n, m))


def test_blocks_of_lines_are_each_the_optimum_where_small():
    """Blocks of 3 x 5 and those at the edges, of 3 x 4, 1 x 5 and 1 x 4."""
    for seed in range(10):
        energy = torch.randn(7, 14, generator=torch.Generator().manual_seed(seed)).square()
        mask = BlockLines(0.4, 0.5, filters=3, rows=5).select(energy.sqrt())
        for place in tiles(energy.shape, (3, 5)):
            block, inside = energy[place], mask[place]
            n, m = kept(0.4, block.shape[0]), kept(0.5, block.shape[1])
            assert float(block[inside].sum()) == pytest.approx(best_submatrix(block, n, m))


@pytest.mark.parametrize("c", [FilterColumn(0.5, 0.5), BlockLines(0.5, 0.5, filters=64, rows=64)], ids=str)
def test_turns_stop_where_no_change_of_one_side_helps(c):
    for seed in range(5):
        energy = torch.randn(30, 40, generator=torch.Generator().manual_seed(seed)).square()
        mask = c.select(energy.sqrt())
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns)
        assert torch.equal(keep_largest(energy @ columns.float(), 15), rows)
        assert torch.equal(keep_largest(rows.float() @ energy, 20), columns)


def test_natural_patterns_are_56_with_centre_and_published_21():
    assert len(set(NATURAL)) == 56
    assert all(code.bit_count() == 4 and code >> 4 & 1 for code in NATURAL)
    assert {name: len(codes) for name, codes in PUBLISHED.items()} == {
        "edges": 1,
        "line and corner": 8,
        "bent": 8,
        "T": 4,
    }
    everything = [code for codes in PUBLISHED.values() for code in codes]
    assert len(set(everything)) == 21
    assert set(everything) - set(PUBLISHED["edges"]) <= set(NATURAL)
    assert PUBLISHED["edges"] == (0b010101010,)


def test_the_library_is_voted_for_by_all_layers_together():
    a, b = torch.full((5, 1, 3, 3), 0.1), torch.full((4, 1, 3, 3), 0.1)
    a[:, 0, 0] = 1.0  # top row and centre
    b[:, 0, 2] = 1.0  # bottom row and centre
    top, bottom = 0b000010111, 0b111010000
    shared = Patterns(1).fit({"a": a, "b": b})
    assert shared["a"] == shared["b"] == Patterns(library=(top,))
    assert Patterns(2).fit({"a": a, "b": b})["b"].library == (top, bottom)
    assert Patterns(1).fit({"b": b})["b"].library == (bottom,)


def test_empty_kernels_do_not_vote():
    weight = torch.zeros(9, 1, 3, 3)
    weight[:2, 0, 2] = 1.0  # bottom row, beside seven kernels of zeros
    assert Patterns(2).fit({"w": weight, "x": torch.zeros(4, 1, 3, 3)})["x"].library == (0b111010000,)
    assert Patterns(2).fit({"x": torch.zeros(4, 1, 3, 3)})["x"].library == NATURAL[:2]  # any will do


def test_a_given_library_of_pcnn_is_the_one():
    weight = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    assert PCNN(2, library=(0b011,)).project(weight).tolist() == [[[[1.0, 2.0, 0.0]]]]
    assert PCNN(2, library=(0b011, 0b101)).patterns == 2


def test_pcnn_patterns_are_picked_by_the_energy_that_they_add():
    weight = torch.zeros(6, 1, 1, 3)
    weight[:3, 0, 0] = torch.tensor([2.0, 1.9, 0.0])
    weight[3:5, 0, 0] = torch.tensor([2.0, 0.0, 1.9])
    weight[5, 0, 0] = torch.tensor([0.0, 9.0, 9.0])  # one kernel, but the most energy
    chosen = PCNN(2, patterns=2).fit({"w": weight})["w"]
    assert chosen.library == (0b110, 0b011)
    assert PCNN(2, patterns=3).fit({"w": weight})["w"].project(weight).equal(weight)
    assert PCNN(2).project(weight).equal(weight)


def test_darb_gives_dense_rows_small_blocks_and_stays_inside_its_budget():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 128, generator=generator) * torch.tensor([8.0, 4, 2, 1, 1, 0.5, 0.5, 0.25])[:, None]
    for sparsity in (0.5, 0.8, 0.95):
        c = DARB(sparsity).fit({"w": weight})["w"]
        budget = kept(sparsity, weight.numel())
        survivors = int(c.select(weight).sum())
        assert survivors == sum(ceil(128 / b) for b in c.blocks)
        assert survivors <= budget
        assert survivors >= 0.8 * budget
        assert c.blocks[0] <= c.blocks[2] <= c.blocks[5] <= c.blocks[7]
        assert c.blocks[0] < c.blocks[7]
    uniform = NM(n=1, m=8)
    c = DARB(1 - 1 / 8).fit({"w": weight})["w"]
    assert distance2(c, weight) < 0.6 * distance2(uniform, weight)


@pytest.mark.parametrize(
    "c",
    [Patterns(3), PatternKernels(3, sparsity=0.5), PCNN(2, patterns=3), DARB(0.8)],
    ids=str,
)
def test_adaptive_sets_want_to_be_fitted_and_then_stay(c):
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConstraintError, match=r"fitted\(model, plan\)"):
        c.project(weight)
    chosen = c.fit({"w": weight})["w"]
    assert chosen.fit({"w": 1 - weight})["w"] == chosen


def test_fitted_plan_of_a_network():
    net = build("vgg", SHAPE, 10, width=4)
    plan = fitted(net, {n: Patterns(3) for n in prunable(net) if n != "fc"} | {"fc": DARB(0.5)})
    assert len({c.library for n, c in plan.items() if n != "fc"}) == 1
    assert len(plan["fc"].blocks) == 10
    harden(net, plan)
    assert all(plan[n].member(w) for n, w in weights(net, plan).items())
    with pytest.raises(ConstraintError, match="fc: patterns are for kernels larger than 1x1"):
        project({"fc": Patterns(library=NATURAL)}, weights(net, {"fc": DARB(0.5)}))


def test_coupled_filters_go_together():
    net = build("resnet8", SHAPE, 10, width=4)
    coupled = Filter(0.5, coupled="block1")
    plan = {"conv1": coupled, "block1_1.conv2": coupled, "block1_1.conv1": Filter(0.5)}
    net.conv1.weight.data *= torch.tensor([1.0, 1, 100, 1])[:, None, None, None]
    m = {n: mask.flatten(1).any(1) for n, mask in select(plan, weights(net, plan)).items()}
    assert torch.equal(m["conv1"], m["block1_1.conv2"])
    assert m["conv1"][2]
    energy = sum(w.flatten(1).square().sum(1) for n, w in weights(net, plan).items() if n != "block1_1.conv1")
    assert torch.equal(m["conv1"], keep_largest(energy, 2))
    with pytest.raises(ConstraintError, match=r"conv1, block2_1\.conv1: layers of shapes"):
        select(dict.fromkeys(("conv1", "block2_1.conv1"), coupled), weights(net, dict.fromkeys(prunable(net), coupled)))


def test_equal_global_constraints_share_their_budget(net):
    """Two equal objects are one set: a plan that was copied or read from a file must not mean something else."""
    one = {n: Unstructured(0.9, "global") for n in prunable(net)}
    shared = dict.fromkeys(prunable(net), Unstructured(0.9, "global"))
    first, second = select(one, weights(net, one)), select(shared, weights(net, shared))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_constraint_with_hidden_attributes_is_refused(net):
    class Own(Unstructured):
        def __init__(self, k):
            super().__init__(0.5)
            object.__setattr__(self, "k", k)

    with pytest.raises(ConstraintError, match=r"fc1: Own\.k is not a field; decorate it @dataclass\(frozen=True\)"):
        project({"fc1": Own(3)}, weights(net, {"fc1": Own(3)}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Block(0.5, 0, 4), "height = 0: allowed are whole numbers from 1"),
        (lambda: Block(0.5, True, 4), "height = True: allowed are whole numbers from 1"),
        (lambda: Block(0.5, np.int64(0), 4), "height = .*0.*: allowed are whole numbers from 1"),
        (lambda: Block("0.5"), r"sparsity = '0.5': allowed are numbers in \[0, 1\)"),
        (lambda: Block(1.0), r"sparsity = 1.0: allowed are numbers in \[0, 1\)"),
        (lambda: FilterColumn(0.5, -1), "column_sparsity = -1"),
        (lambda: BlockStructured(0.5, 0.5, 4, 2.5), "width = 2.5"),
        (lambda: BlockColumns(0.5, per="row"), "'block' and 'layer'"),
        (lambda: NM(n=5, m=4), "n = 5: allowed are whole numbers up to m = 4"),
        (lambda: Patterns(0), "count = 0"),
        (lambda: Patterns(library=()), "one or more pattern codes"),
        (lambda: Patterns(library=NATURAL).project(torch.ones(4, 4)), r"larger than 1x1, and the weight is \(4, 4\)"),
        (lambda: Patterns(library=(1 << 20,)).project(torch.ones(1, 1, 3, 3)), "for larger kernels"),
        (lambda: Patterns(2).fit({"w": torch.ones(1, 1, 5, 5)}), "natural patterns are for 3x3"),
        (lambda: Patterns(2).fit({"w": torch.ones(1, 1, 1, 9)}), r"natural patterns are for 3x3.*\(1, 1, 1, 9\)"),
        (lambda: Patterns(2).fit({"w": torch.ones(1, 1, 9)}), r"natural patterns are for 3x3.*\(1, 1, 9\)"),
        (lambda: PCNN(2, patterns=2).fit({"w": torch.ones(1, 1, 11, 11)}), "up to 62 weights; these have 121"),
        (lambda: PCNN(10).project(torch.ones(1, 1, 3, 3)), "n = 10: allowed are whole numbers up to the 9"),
        (lambda: DARB(0.5, menu=(4, 2)), "increasing block sizes"),
        (lambda: DARB(0.5, blocks=(2, 2)).project(torch.ones(3, 4)), "2 block sizes for the 3 rows"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConstraintError, match=message):
        make()


@pytest.mark.parametrize("m", [3, 16, 17, 40])
def test_largest_in_rows_breaks_ties_by_place(m):
    scores = torch.randint(0, 4, (200, m), generator=torch.Generator().manual_seed(m)).float()
    k = torch.randint(1, m + 1, (200,), generator=torch.Generator().manual_seed(1))
    for mask, row, n in zip(keep_largest_in_rows(scores, k), scores, k.tolist(), strict=True):
        assert torch.equal(mask, keep_largest(row, n))
    assert torch.equal(keep_largest_in_rows(scores, 1).float().argmax(1), scores.argmax(1))


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
    chosen_masks = select(uniform_plan(net, shared), weights(net, dict.fromkeys(layers, shared)))
    flat = torch.cat([layers[n].weight.detach().abs().reshape(-1) for n in layers])
    chosen = torch.cat([chosen_masks[n].reshape(-1) for n in layers])
    assert int(chosen.sum()) == kept(0.9, flat.numel())
    assert flat[chosen].min() >= flat[~chosen].max()
    assert chosen_masks["fc3"].float().mean() < 0.01 < chosen_masks["fc1"].float().mean()


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
    with pytest.raises(ConstraintError, match="'conv1'; the model has fc1"):
        constraint.sparsity(net, ["fc1", "conv1"])


def test_masks_hold_and_come_off(net):
    plan = uniform_plan(net, Unstructured(0.7))
    m = select(plan, weights(net, plan))
    attach_masks(net, m)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(4, 1, 28, 28)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(prunable(net)[n].weight != 0, mask) for n, mask in m.items())
    output = deepcopy(net)(torch.ones(1, 1, 28, 28))
    detach_masks(net)
    assert set(net.state_dict()) == set(build("lenet300", (1, 28, 28), 10).state_dict())
    assert torch.equal(net(torch.ones(1, 1, 28, 28)), output)


def test_taking_masks_off_a_copy_leaves_the_original_alone(net):
    plan = uniform_plan(net, Unstructured(0.7))
    attach_masks(net, select(plan, weights(net, plan)))
    x = torch.ones(1, 1, 28, 28)
    output = net(x)
    copy = detach_masks(deepcopy(net))
    assert torch.equal(net(x), output)
    assert torch.equal(copy(x), output)
    assert set(masks(net)) == set(plan)


def test_masked_weight_gets_no_gradient(net):
    plan = uniform_plan(net, Unstructured(0.5))
    m = select(plan, weights(net, plan))
    attach_masks(net, m)
    net(torch.randn(4, 1, 28, 28)).square().sum().backward()
    gradient = constraint.leaf(net.fc1).grad
    assert not gradient[~m["fc1"]].any()
    assert gradient[m["fc1"]].any()


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


@pytest.mark.parametrize(("target", "fraction"), [([0.5], 0.0), ([0.5], 1.0), ([1.0], 0.2), ([-0.5], 0.2)])
def test_rounds_that_would_never_end_are_refused(target, fraction):
    with pytest.raises(ConstraintError, match=r"rounds: target=.* allowed are sparsities"):
        rounds(target, fraction)


def test_the_first_convolution_of_any_dimension():
    net = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv1d(4, 4, 3))
    assert first_conv(net) == ("0",)
    assert list(uniform_plan(net, Filter(0.5), keep_dense=first_conv(net))) == ["2"]


def test_sparsity_of_no_layer_is_not_that_of_all():
    with pytest.raises(ConstraintError, match="sparsity of no layer"):
        constraint.sparsity(build("lenet300", SHAPE, 10), [])


def test_masks_hold_parameters_that_are_no_layer():
    net = build("vgg", SHAPE, 10, width=4)
    keep = torch.tensor([True, False, True, False])
    given = {"conv1_1": torch.ones(4, 1, 3, 3, dtype=torch.bool), "bn1_1.weight": keep, "bn1_1.bias": keep}
    attach_masks(net, given)
    assert set(masks(net)) == set(given)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(4, 1, 28, 28)).square().sum().backward()
        optimizer.step()
    assert torch.equal(net.bn1_1.weight != 0, keep)
    assert torch.equal(net.bn1_1.bias != 0, keep)
    detach_masks(net)
    assert set(net.state_dict()) == set(build("vgg", SHAPE, 10, width=4).state_dict())
    with pytest.raises(ConstraintError, match=r"bn9\.bias"):
        attach_masks(net, {"bn9.bias": keep})


def test_a_users_own_idea_needs_only_select(net):
    """The door for newcomers: a dataclass with one method works in plans, hardening and accounting."""
    from dataclasses import dataclass

    from lib.constraint import SupportConstraint

    @dataclass(frozen=True)
    class EvenRows(SupportConstraint):
        def select(self, weight):
            return torch.arange(len(weight))[:, None].expand_as(weight) % 2 == 0

    plan = {"fc1": EvenRows()}
    harden(net, plan)
    assert isinstance(plan["fc1"], Constraint)
    assert not net.fc1.weight[1::2].any()
    assert plan["fc1"].storage_bits(net.fc1.weight, 8).data == 150 * 784 * 8


class TestGroupAdaptive:
    def test_single_weights_are_lamp(self):
        net = build("lenet5", (1, 28, 28), 10, seed=2)
        ours, lamp = (fitted(net, uniform_plan(net, c)) for c in (GroupAdaptive(20), LayerAdaptive(20)))
        assert {n: c.sparsity for n, c in ours.items()} == pytest.approx({n: c.sparsity for n, c in lamp.items()})

    @pytest.mark.parametrize(("rate", "left"), [(1.0, (2, 2)), (1.5, (1, 2)), (2.0, (1, 1)), (3.0, (1, 1))])
    def test_by_hand(self, rate, left):
        """Energies of a's pairs 13 and 1, of b's weights 16 and 1: scores 1/2 and 1/28, 1 and 1/17."""
        weights = {"a": torch.tensor([[3.0, 2.0, 1.0, 0.0]]), "b": torch.tensor([[4.0], [1.0]])}
        found = GroupAdaptive(rate, Block(0.0, 1, 2)).fit(weights)
        groups = {"a": 2, "b": 2}
        assert tuple(kept(c.sparsity, groups[n]) for n, c in found.items()) == left

    @pytest.mark.parametrize("groups", [Filter(0.0), Block(0.0, 1, 128), Kernel(0.0), BlockColumns(0.0, 32, 128)])
    def test_the_rate_is_met(self, groups):
        net = build("lenet5", (1, 28, 28), 10, seed=2)
        plan = fitted(net, uniform_plan(net, GroupAdaptive(4.0, groups)))
        left = sum(int(m.sum()) for m in select(plan, weights(net, plan)).values())
        assert 430_500 / left == pytest.approx(4, rel=0.03)
        assert all(type(c) is type(groups) for c in plan.values())

    def test_refusals(self):
        with pytest.raises(ConstraintError, match="fitted"):
            GroupAdaptive(2.0).project(torch.ones(4, 4))
        with pytest.raises(ConstraintError, match="leaves 1 of 8"):
            GroupAdaptive(8.0).fit({"a": torch.ones(2, 2), "b": torch.ones(2, 2)})

    @pytest.mark.parametrize(
        "groups", [Filter(0.0, coupled="sum"), Unstructured(0.0, scope="global"), NM(2, 4), Patterns(4)], ids=str
    )
    def test_sets_whose_budget_is_another_are_refused(self, groups):
        with pytest.raises(ConstraintError, match=r"groups = .*: allowed are groups with a sparsity, which couple no"):
            GroupAdaptive(2.0, groups)


class TestLayerAdaptive:
    def net(self):
        return build("lenet5", (1, 28, 28), 10, seed=2)

    def test_scores_by_hand(self):
        weight = torch.tensor([3.0, -1.0, 2.0, 0.0])
        assert torch.allclose(_lamp(weight), torch.tensor([0.0, 1 / 14, 4 / 13, 1.0]).double())

    @pytest.mark.parametrize("rate", [1, 2, 85, 348, 430_500 / 4])
    def test_the_total_is_met(self, rate):
        net = self.net()
        plan = fitted(net, uniform_plan(net, LayerAdaptive(rate)))
        left = {n: int(m.sum()) for n, m in select(plan, weights(net, plan)).items()}
        assert sum(left.values()) == pytest.approx(430_500 / rate, abs=3)
        assert min(left.values()) >= 1

    def test_the_scale_of_a_layer_does_not_matter(self):
        net = self.net()
        before = fitted(net, uniform_plan(net, LayerAdaptive(20)))
        with torch.no_grad():
            net.fc1.weight.mul_(100)
        assert fitted(net, uniform_plan(net, LayerAdaptive(20))) == before

    def test_removed_weights_get_no_part(self):
        net = self.net()
        with torch.no_grad():
            net.conv2.weight[1:] = 0
        assert kept(fitted(net, uniform_plan(net, LayerAdaptive(5)))["conv2"].sparsity, 25_000) <= 500

    def test_refusals(self):
        net = self.net()
        with pytest.raises(ConstraintError, match="rate"):
            LayerAdaptive(0.5)
        with pytest.raises(ConstraintError, match="leaves 2 of 430500"):
            fitted(net, uniform_plan(net, LayerAdaptive(200_000)))
        with pytest.raises(ConstraintError, match="fitted"):
            harden(net, uniform_plan(net, LayerAdaptive(2)))


def budgets(c, rows, columns):
    return kept(c.filter_sparsity, rows), kept(c.column_sparsity, columns)


class TestSubmatrixAdaptive:
    def test_the_cheapest_line_goes_first(self):
        weight = torch.tensor([[3.0, 3.0, 0.1], [3.0, 3.0, 0.1], [2.0, 0.0, 0.0]])
        rows, columns = budgets(SubmatrixAdaptive(9 / 6).fit({"a": weight})["a"], 3, 3)
        assert (rows, columns) == (3, 2)
        rows, columns = budgets(SubmatrixAdaptive(9 / 4).fit({"a": weight})["a"], 3, 3)
        assert (rows, columns) == (2, 2)

    @pytest.mark.parametrize("rate", [2, 20, 232])
    def test_the_total_is_met_and_every_layer_keeps_something(self, rate):
        net = build("lenet5", (1, 28, 28), 10, seed=2)
        plan = fitted(net, uniform_plan(net, SubmatrixAdaptive(rate)))
        left = {n: int(m.sum()) for n, m in select(plan, weights(net, plan)).items()}
        assert 430_500 / rate - 500 <= sum(left.values()) <= 430_500 / rate + 1
        assert min(left.values()) >= 1

    def test_removed_lines_go_first(self):
        net = build("lenet5", (1, 28, 28), 10, seed=2)
        with torch.no_grad():
            net.fc1.weight[100:] = 0
            net.fc1.weight[:, 200:] = 0
        plan = fitted(net, uniform_plan(net, SubmatrixAdaptive(430_500 / 50_500)))
        assert budgets(plan["fc1"], 500, 800) == (100, 200)
        assert plan["conv2"] == FilterColumn(0.0, 0.0)
