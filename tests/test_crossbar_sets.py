"""Sets made for arrays of cells, and the arrays that networks in them occupy."""

import itertools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lib import crossbar, data, models, recipes, training
from lib.constraint import ConstraintError, attach_masks, fitted, harden, weights
from lib.costs.designs import forms_array
from lib.crossbar import Array, CrossbarError, Mapping, exact_bits
from lib.layers import LayerError, Packed, packed
from lib.pruning import (
    NM,
    AlignedLines,
    BlockLines,
    FilterColumn,
    PolarizedFragments,
    SharedShapes,
    SubmatrixAdaptive,
    SubmatrixByCost,
    tiny_adc,
    uniform_plan,
)
from lib.shapes import layer_shapes


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestPolarizedFragments:
    def test_nearest_point_by_brute_force(self):
        """All choices of signs of three fragments, the last of them short."""
        for seed in range(20):
            weight = random(1, 8, seed=seed)
            best = torch.inf
            for signs in itertools.product((1, -1), repeat=3):
                sign = torch.tensor(signs).repeat_interleave(3)[:8]
                best = min(best, float((weight - torch.where(weight * sign > 0, weight, 0.0)).square().sum()))
            found = PolarizedFragments(3).project(weight)
            assert float((weight - found).square().sum()) == pytest.approx(best)

    def test_the_sum_can_choose_worse(self):
        weight = torch.tensor([[1.0, -0.6, -0.6]])
        assert PolarizedFragments(3).project(weight).tolist() == [[1.0, 0.0, 0.0]]
        assert PolarizedFragments(3, by="sum").project(weight).flatten().tolist() == pytest.approx([0.0, -0.6, -0.6])

    @pytest.mark.parametrize("shape", [(7, 5), (6, 4, 3, 3), (5,)])
    def test_laws(self, shape):
        weight, c = random(*shape), PolarizedFragments(4)
        z = c.project(weight)
        assert c.member(z)
        assert torch.equal(c.project(z), z)
        assert not c.member(weight)
        assert torch.equal(c.project(2 * weight), 2 * z)
        assert torch.equal(c.tangent(z, torch.ones_like(z)) != 0, z != 0)

    def test_bill(self):
        """8-bit weights: 7 bits of magnitude, and a sign for each of 2 x 3 fragments."""
        z = PolarizedFragments(4).project(random(2, 10)).clamp(min=0)
        bill = PolarizedFragments(4).storage_bits(z, 8)
        assert bill.data == 7 * int(z.count_nonzero())
        assert bill.table == 6

    def test_signs_survive_training_inside_a_mask(self):
        few = data.load(train_size=300, test_size=50, validation_size=50)
        net = models.build("lenet300", few.shape, few.classes, seed=0)
        training.fit(net, few, epochs=1, lr=0.05)
        recipes.progressive(
            net,
            [uniform_plan(net, FilterColumn(0.3, 0.3)), uniform_plan(net, PolarizedFragments(8))],
            few,
            search={"epochs": 1, "lr": 0.01},
            retrain={"epochs": 1, "lr": 0.01},
        )
        for weight in weights(net, uniform_plan(net, PolarizedFragments(8))).values():
            assert PolarizedFragments(8).member(weight)
            assert (weight != 0).any(1).sum() <= round(0.7 * len(weight))

    @pytest.mark.parametrize("options", [{"rows": 0}, {"by": "chance"}])
    def test_refusals(self, options):
        with pytest.raises(ConstraintError):
            PolarizedFragments(**options)


class TestPacked:
    """Rows and filters that keep a weight, and no others."""

    LAYERS = (
        (nn.Linear(9, 7), (5, 9)),
        (nn.Linear(9, 7, bias=False), (2, 5, 9)),
        (nn.Conv2d(3, 6, 3), (2, 3, 8, 8)),
        (nn.Conv2d(3, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=2), (2, 3, 12, 14)),
    )

    @pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
    def test_it_computes_what_the_layer_does(self, layer, shape):
        layer, x = deepcopy(layer), random(*shape)
        matrix = layer.weight.data.flatten(1)
        matrix[[1, 4]], matrix[:, ::2] = 0.0, 0.0
        small = Packed(layer)
        assert small.lines.weight.shape == (len(matrix) - 2, matrix.shape[1] // 2)
        assert torch.allclose(small(x), layer(x), atol=1e-5)
        layer.weight.data.zero_()
        assert torch.allclose(Packed(layer)(x), layer(x))

    def test_a_pruned_network_takes_the_same_arrays_and_its_fragments_lie_side_by_side(self, images):
        net = models.build("lenet5", images.shape, images.classes, seed=1)
        harden(net, fitted(net, uniform_plan(net, SubmatrixAdaptive(8.0))))
        small, x = packed(net), images.test.x[:20]
        assert torch.allclose(small(x), net(x), atol=1e-4)
        lines, shape = (crossbar.occupied(n, images.shape, Array(), "lines") for n in (net, small)), images.shape
        columns = ["rows_left", "filters_left", "vectors", "arrays", "adc_used", "kept"]
        assert next(lines)[columns].equals(next(lines)[columns])
        harden(small, uniform_plan(small, PolarizedFragments(8)))
        for name, layer in small.named_modules():
            if name.endswith(".lines"):
                for part in layer.weight.split(8, dim=1):
                    assert ((part >= 0).all(1) | (part <= 0).all(1)).all()
        with torch.no_grad():
            there = crossbar.on_arrays(small, replace(forms_array(8), adc_bits=None), images.train.x[:100])(x)
            assert torch.allclose(there, small(x), atol=0.05 * float(small(x).abs().max()))
        counts = [crossbar.occupied(n, shape, forms_array(8), r) for n, r in ((net, "lines"), (small, "none"))]
        assert counts[0]["arrays"].tolist() == counts[1]["arrays"].tolist()

    def test_a_layer_in_two_places_is_one_and_what_is_frozen_stays_so(self):
        layer = nn.Linear(3, 3).requires_grad_(False)
        net, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(4, 3)
        small = packed(net)
        assert small[0] is small[2]
        assert torch.allclose(small(x), net(x), atol=1e-6)
        assert not any(p.requires_grad for p in small.parameters())

    def test_refusals(self):
        for layer in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv1d(2, 2, 3), nn.Conv2d(2, 2, 3, padding="same")):
            with pytest.raises(LayerError, match="cannot be packed"):
                packed(nn.Sequential(layer))
        tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        tied[1].weight = tied[0].weight
        with pytest.raises(LayerError, match="weight is also another module's"):
            packed(tied)
        hooked = nn.Sequential(nn.Linear(3, 3))
        hooked[0].register_forward_pre_hook(lambda layer, x: (x[0].round(),))
        with pytest.raises(LayerError, match=r"0 \(Linear\) does more than its class"):
            packed(hooked)
        assert isinstance(packed(nn.Linear(3, 3)), Packed)


class TestAlignedLines:
    def test_whole_arrays(self):
        """From 0.6 * 100 filters to the nearest multiple of 32, and 0.5 * 300 weights to that of 128."""
        (found,) = AlignedLines(0.4, 0.5, rows=128, filters=32).fit({"": random(100, 300)}).values()
        mask = found.select(random(100, 300))
        assert (int(mask.any(1).sum()), int(mask.any(0).sum())) == (64, 128)

    def test_less_than_an_array_is_kept_whole(self):
        (found,) = AlignedLines(0.9, 0.9, rows=128, filters=32).fit({"": random(20, 25)}).values()
        assert found.select(random(20, 25)).all()

    def test_same_arrays_more_weights(self):
        """Of two networks in as many arrays the aligned one has more weights left."""
        array = Array(32, 32, Mapping("offset", 8, 2))
        net = nn.Sequential(nn.Linear(300, 100))
        counts = {}
        for c in (FilterColumn(0.45, 0.55), AlignedLines(0.45, 0.55, rows=32, filters=8)):
            copy = deepcopy(net)
            harden(copy, fitted(copy, uniform_plan(copy, c)))
            found = crossbar.occupied(copy, (300,), array)
            counts[type(c)] = int(found["arrays"].iloc[0]), int(found["kept"].iloc[0])
        assert counts[AlignedLines][0] <= counts[FilterColumn][0]
        assert counts[AlignedLines][1] / counts[AlignedLines][0] > counts[FilterColumn][1] / counts[FilterColumn][0]


class TestBlockLines:
    def test_every_block_on_its_own(self):
        weight = random(6, 10)
        mask = BlockLines(0.5, 0.6, filters=3, rows=5).select(weight)
        for i, j in itertools.product((0, 3), (0, 5)):
            block = mask[i : i + 3, j : j + 5]
            lines, rows = block.any(1), block.any(0)
            assert (int(lines.sum()), int(rows.sum())) == (2, 2)  # round(1.5), round(2.0)
            assert torch.equal(block, lines[:, None] & rows)
        assert len({tuple(mask[:, j].tolist()) for j in range(10)}) > 2  # blocks differ

    def test_one_block_is_filter_and_column(self):
        weight = random(7, 9)
        found = BlockLines(0.4, 0.3, filters=64, rows=64).select(weight)
        assert torch.equal(found, FilterColumn(0.4, 0.3).select(weight))


class TestSharedShapes:
    def test_votes(self):
        """Two kinds of filters, two shapes: each finds its own."""
        weight = torch.full((6, 4), 0.1)
        weight[:3, :2], weight[3:, 2:] = 1.0, 2.0
        (found,) = SharedShapes(0.5, rows=4, shapes=2).fit({"": weight}).values()
        assert sorted(found.codes[0]) == [0b0011, 0b1100]
        assert torch.equal(found.select(weight), weight >= 1)

    def test_one_shape_is_a_choice_of_rows(self):
        (found,) = SharedShapes(0.5, rows=8, shapes=1).fit({"": random(9, 8)}).values()
        assert len(found.select(random(9, 8)).unique(dim=0)) == 1

    def test_more_shapes_keep_more(self):
        weight, kept = random(40, 64), []
        for shapes in (1, 2, 4, 16):
            (found,) = SharedShapes(0.5, rows=16, shapes=shapes).fit({"": weight}).values()
            kept.append(float(found.project(weight).square().sum()))
        assert kept == sorted(kept)
        assert kept[-1] > 1.1 * kept[0]

    def test_not_before_fit(self):
        with pytest.raises(ConstraintError, match="shapes are not chosen yet"):
            SharedShapes(0.5).project(random(4, 40))


class TestTinyADC:
    def test_is_a_limit_on_every_column_of_an_array(self):
        assert tiny_adc(8, 128) == NM(n=8, m=128)

    def test_halving_saves_a_bit(self):
        assert [exact_bits(n, 2) for n in (128, 64, 32, 16, 8, 4)] == [9, 8, 7, 6, 5, 4]

    def test_fewer_bits_are_exact(self):
        """At most 8 of 128 rows hold something: 5 bits read every sum, for unsigned weights in two columns."""
        weight = tiny_adc(8, 128).project(random(10, 256))
        x = torch.randint(0, 256, (256, 20), generator=torch.Generator().manual_seed(0))
        mapping = Mapping("two_column", 8, 2)
        exact = crossbar.Programmed(weight, Array(mapping=mapping))(x)
        product = crossbar.Programmed(weight, Array(mapping=mapping, adc_bits=5))
        product.converter = crossbar.Converter(5)
        assert torch.equal(product(x), exact)
        product.converter = crossbar.Converter(3)
        assert not torch.equal(product(x), exact)


def pruned(shape, keep):
    """A linear layer of ones with a submatrix left."""
    layer = nn.Linear(*shape)
    nn.init.zeros_(layer.weight)
    filters, rows = keep
    layer.weight.data[:filters, :rows] = 1
    return nn.Sequential(layer)


class TestBudgetsByCost:
    def test_equal_costs_are_weights(self):
        weights = {"a": random(12, 20), "b": random(30, 8, seed=1)}
        plain = SubmatrixAdaptive(4.0).fit(weights)
        assert SubmatrixByCost(4.0, (("a", 1.0), ("b", 1.0))).fit(weights) == plain

    def test_what_costs_more_goes_first(self):
        weights = {"a": random(16, 16), "b": random(16, 16, seed=1)}
        found = SubmatrixByCost(2.0, (("a", 100.0), ("b", 1.0))).fit(weights)
        left = {n: int(c.select(weights[n]).sum()) for n, c in found.items()}
        assert left["a"] <= 128
        assert left["b"] > 200

    def test_products_of_a_network(self):
        """By vectors, the rate is that of products; by weights, convolutions keep most of theirs."""
        net = models.build("lenet5", (1, 28, 28), 10, seed=0)
        shapes = layer_shapes(net, (1, 28, 28))
        costs = tuple(zip(shapes["layer"], shapes["vectors"], strict=True))
        saved = {}
        for c in (SubmatrixAdaptive(3.0), SubmatrixByCost(3.0, costs)):
            copy = deepcopy(net)
            harden(copy, fitted(copy, uniform_plan(copy, c)))
            products = (crossbar.occupied(copy, (1, 28, 28), Array())["kept"] * shapes["vectors"]).sum()
            saved[type(c)] = shapes["macs"].sum() / products
        assert saved[SubmatrixByCost] == pytest.approx(3.0, rel=0.05)
        assert saved[SubmatrixAdaptive] < 2

    def test_every_layer_needs_a_cost(self):
        with pytest.raises(ConstraintError, match="layer 'b' needs one above 0"):
            SubmatrixByCost(2.0, (("a", 1.0),)).fit({"a": random(4, 4), "b": random(4, 4)})


class TestOccupied:
    """Arrays worked out apart."""

    @pytest.mark.parametrize(
        ("shape", "keep", "dense", "left"), [((500, 50), (25, 250), 8, 2), ((800, 500), (250, 400), 112, 32)]
    )
    def test_lines(self, shape, keep, dense, left):
        net = pruned(shape, keep)
        assert crossbar.occupied(net, (shape[0],), Array(), "none")["arrays"].item() == dense
        found = crossbar.occupied(net, (shape[0],), Array())
        assert found["arrays"].item() == left
        assert found["index_bits"].item() == 0
        assert found["kept"].item() == keep[0] * keep[1]

    def test_none_is_the_dense_network(self):
        net = models.build("lenet5", (1, 28, 28), 10, seed=0)
        tiles = crossbar.tile(layer_shapes(net, (1, 28, 28)), Array())
        found = crossbar.occupied(net, (1, 28, 28), Array(), "none")
        assert found[tiles.columns].equals(tiles)

    def test_blocks(self):
        """Two groups of 4 rows: 3 filters are left in the first, 1 in the second, and a filter's number has 3 bits."""
        layer = nn.Linear(8, 6)
        nn.init.zeros_(layer.weight)
        layer.weight.data[:3, :4], layer.weight.data[5, 4:] = 1, 1
        found = crossbar.occupied(nn.Sequential(layer), (8,), Array(4, 8), "blocks").iloc[0]
        assert found["arrays"] == 2 + 1  # 3 filters of 4 cells in arrays of 8 columns, and 1
        assert found["index_bits"] == (3 + 1) * 3
        assert found["adc_used"] == (3 + 1) * 4 * 8
        assert found["cells"] == (3 * 4 + 1 * 4) * 4

    def test_groups_of_few_rows_share_arrays(self):
        """Eight groups of 16 rows fill the 128 of an array, one after the other, and are one group's reads each."""
        net = nn.Sequential(nn.Linear(128, 32))
        whole, fine = (crossbar.occupied(net, (128,), Array(), "blocks", rows).iloc[0] for rows in (128, 16))
        assert (whole["arrays"], fine["arrays"]) == (1, 1)
        assert (whole["steps"], fine["steps"]) == (8, 8 * 8)
        assert fine["adc_used"] == 8 * whole["adc_used"]
        for rule in ("none", "lines"):
            with pytest.raises(CrossbarError, match=f"rows = 16: under {rule} there are no groups"):
                crossbar.occupied(net, (128,), Array(), rule, 16)

    def test_shapes_are_stacked(self):
        """Four filters of two shapes, two rows each: strips of 2 x 2 filters lie above each other in one array."""
        layer = nn.Linear(4, 4)
        nn.init.zeros_(layer.weight)
        layer.weight.data[:2, :2], layer.weight.data[2:, 2:] = 1, 1
        found = crossbar.occupied(nn.Sequential(layer), (4,), Array(4, 8), "shapes").iloc[0]
        assert crossbar.occupied(nn.Sequential(layer), (4,), Array(4, 8), "none")["arrays"].item() == 2
        assert found["arrays"] == 1
        assert found["utilization"] == 1
        assert found["steps"] == 2 * 8  # one strip after the other
        assert found["adc_used"] == 4 * 4 * 8
        assert found["index_bits"] == 4 * 2 + 2 * 4  # a filter's number in each column, a mask of rows for each strip

    def test_groups_are_compacted_apart(self):
        conv = nn.Conv2d(4, 4, 1, groups=2, bias=False)
        nn.init.zeros_(conv.weight)
        conv.weight.data[0] = 1
        found = crossbar.occupied(nn.Sequential(conv), (4, 3, 3), Array()).iloc[0]
        assert found["arrays"] == 1
        assert found["cells"] == 2 * 4
        assert crossbar.occupied(nn.Sequential(conv), (4, 3, 3), Array(), "none")["arrays"].item() == 2

    def test_an_empty_layer_takes_nothing(self):
        found = crossbar.occupied(pruned((8, 8), (0, 0)), (8,), Array()).iloc[0]
        assert (found["arrays"], found["adc_used"], found["utilization"]) == (0, 0, 0)

    def test_masks_count(self):
        net = pruned((8, 8), (8, 8))
        attach_masks(net, {"0": torch.arange(64).view(8, 8) < 16})
        assert crossbar.occupied(net, (8,), Array())["kept"].item() == 16

    @pytest.mark.parametrize(("options", "message"), [({"rule": "luck"}, "rule = 'luck'"), ({"rows": 200}, "1 to 128")])
    def test_refusals(self, options, message):
        with pytest.raises(CrossbarError, match=message):
            crossbar.occupied(pruned((8, 8), (8, 8)), (8,), Array(), **options)
