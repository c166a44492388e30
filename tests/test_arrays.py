"""Arrays of cells: counts against worked examples, products against whole numbers, wires against a nodal solution."""

import itertools
from copy import deepcopy
from functools import partial
from math import ceil

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from lib import crossbar, data, faults, models, quantization
from lib.constraint import harden
from lib.crossbar import Array, Converter, CrossbarError, Mapping, Polarized, Programmed, Wires, exact_bits
from lib.crossbar.wires import in_series, on_lines
from lib.pruning import PolarizedFragments, uniform_plan
from lib.shapes import layer_shapes, prunable, uses

OFFSET = Mapping("offset", 8, 2)
EVENTS = {"adc": 1.5625, "dac": 0.390625, "cell": 30 / 128**2, "array": 30.0}  # pJ, from ISAAC's table


def lenet_classic():
    convolutions = [nn.Conv2d(1, 6, 5, padding=2), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10))


@pytest.fixture(scope="module")
def lenet():
    return models.build("lenet5", (1, 28, 28), 10, seed=0)


@pytest.fixture(scope="module")
def shapes(lenet):
    return layer_shapes(lenet, (1, 28, 28))


def used(tiles):
    """Energy of converters and cells that hold something, in nJ."""
    counts = tiles["adc_used"] * EVENTS["adc"] + tiles["dac_used"] * EVENTS["dac"]
    return (counts + tiles["cell_reads"] * EVENTS["cell"]) / 1000


def full(tiles):
    """Energy of all converters and arrays, in nJ."""
    counts = tiles["adc_full"] * EVENTS["adc"] + tiles["dac_full"] * EVENTS["dac"]
    return (counts + tiles["array_reads"] * EVENTS["array"]) / 1000


class TestCounts:
    """Worked out apart, to the digit."""

    def test_shapes(self, shapes):
        assert shapes[["rows", "filters", "vectors"]].to_numpy().tolist() == [
            [25, 20, 576],
            [500, 50, 64],
            [800, 500, 1],
            [500, 10, 1],
        ]
        assert shapes["weights"].sum() == 430_500
        assert shapes["macs"].sum() == 2_293_000

    def test_16_bits(self, shapes):
        tiles = crossbar.tile(shapes, Array(mapping=Mapping("offset", 16, 2), input_bits=16))
        assert tiles["arrays"].tolist() == [2, 16, 224, 4]
        assert tiles["adc_used"].tolist() == [1_474_560, 1_638_400, 448_000, 5120]
        assert tiles["adc_full"].tolist() == [2_359_296, 2_097_152, 458_752, 8192]
        assert tiles["dac_used"].tolist() == [460_800, 2_048_000, 409_600, 8000]
        assert tiles["utilization"].round(4).tolist() == [0.1221, 0.7629, 0.8719, 0.6104]
        assert used(tiles).tolist() == pytest.approx([2551.5, 3735.0, 953.75, 12.297], abs=6e-4)
        assert full(tiles).tolist() == pytest.approx([5160.96, 4587.52, 1003.52, 17.92], abs=1e-9)
        assert tiles["steps"].sum() * 100e-9 == pytest.approx(1.0272e-3)
        assert tiles[["arrays", "adc_used", "dac_used"]].sum().tolist() == [246, 3_566_080, 2_926_400]

    def test_8_bits(self, shapes):
        tiles = crossbar.tile(shapes, Array())
        assert tiles["arrays"].tolist() == [1, 8, 112, 4]
        assert tiles["adc_used"].sum() == 891_520
        assert tiles["adc_full"].sum() == 1_232_896
        assert used(tiles).sum() == pytest.approx(1813.918, abs=2e-3)
        assert full(tiles).sum() == pytest.approx(2696.96)
        assert crossbar.tile(shapes, Array(input_bits=16))["adc_used"].sum() == 1_783_040

    def test_pairs(self, shapes):
        pair = Mapping("two_column", 8, 2)
        digital = crossbar.tile(shapes, Array(mapping=pair))
        assert digital["arrays"].sum() == 246
        assert digital["adc_used"].sum() == 1_783_040
        assert crossbar.tile(shapes, Array(mapping=pair, analog_difference=True))["adc_used"].sum() == 891_520
        apart = crossbar.tile(shapes, Array(mapping=pair, pair="arrays"))
        assert apart["arrays"].tolist() == [2, 16, 224, 8]

    @pytest.mark.parametrize(
        ("size", "count", "adc", "dac"),
        [
            (32, 1722, 2_412_160, 2_548_800),
            (64, 458, 1_398_400, 1_463_200),
            (128, 125, 891_520, 733_600),
            (256, 37, 638_080, 426_400),
        ],
    )
    def test_sizes(self, shapes, size, count, adc, dac):
        tiles = crossbar.tile(shapes, Array(size, size))
        assert tiles[["arrays", "adc_used", "dac_used"]].sum().tolist() == [count, adc, dac]

    def test_classic(self):
        shapes = layer_shapes(lenet_classic(), (1, 28, 28))
        wide = crossbar.tile(shapes, Array(mapping=Mapping("offset", 16, 2), input_bits=16))
        assert wide["arrays"].tolist() == [1, 2, 32, 6, 1]
        assert wide["adc_used"].sum() == 1_085_184
        assert wide["adc_full"].sum() == 2_095_104
        narrow = crossbar.tile(shapes, Array())
        assert narrow["arrays"].sum() == 23
        assert narrow["adc_used"].sum() == 271_296
        assert used(narrow).sum() == pytest.approx(562.818, abs=2e-3)

    def test_fragments(self, shapes):
        array = Array(mapping=Polarized(weight_bits=8, cell_bits=2, fragment=8), input_bits=16, active_rows=8)
        tiles = crossbar.tile(shapes, array)
        assert tiles["arrays"].sum() == 125
        assert tiles["adc_used"].tolist() == [2_949_120, 12_902_400, 3_200_000, 40_320]
        assert tiles["steps"].tolist() == [576 * 16 * 4, 64 * 16 * 16, 16 * 16, 16 * 16]

    def test_prime(self):
        """PRIME's conversions per multiply-accumulate, both cells of a pair subtracted before one."""
        mapping = Mapping("two_column", 8, 4)
        array = Array(256, 256, mapping, input_bits=6, dac_bits=3, pair="arrays", analog_difference=True)
        with torch.device("meta"):
            shapes = layer_shapes(nn.Sequential(nn.Linear(25600, 25600)), (25600,))
        tiles = crossbar.tile(shapes, array)
        assert tiles["adc_used"].sum() / tiles["macs"].sum() == pytest.approx(0.015625)

    def test_isaac_limit(self):
        """One conversion a multiply-accumulate at 16 bits, a quarter at 8."""
        shapes = layer_shapes(nn.Sequential(nn.Linear(1280, 640)), (1280,))
        wide = crossbar.tile(shapes, Array(mapping=Mapping("offset", 16, 2), input_bits=16))
        assert wide["adc_used"].sum() == shapes["macs"].sum()
        assert crossbar.tile(shapes, Array())["adc_used"].sum() * 4 == shapes["macs"].sum()

    def test_groups(self):
        """Every group takes arrays of its own; a depthwise layer as many as it has channels."""
        net = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32, padding=1), nn.Conv2d(32, 64, 1, groups=2))
        tiles = crossbar.tile(layer_shapes(net, (32, 8, 8)), Array())
        assert tiles["arrays"].tolist() == [32, 2]
        assert tiles["cells"].tolist() == [32 * 9 * 4, 2 * 16 * 32 * 4]

    def test_channel_aligned(self):
        """MNSIM's rule: 14 channels of a 3x3 kernel in 128 rows."""
        shapes = layer_shapes(nn.Sequential(nn.Conv2d(64, 10, 3)), (64, 5, 5))
        assert crossbar.tile(shapes, Array())["arrays"].item() == ceil(576 / 128)
        assert crossbar.tile(shapes, Array(128, tiling="channel_aligned"))["arrays"].item() == ceil(64 / 14)
        with pytest.raises(CrossbarError, match="channel_aligned: kernels of 9 weights, and arrays of 8 rows"):
            crossbar.tile(shapes, Array(8, 8, tiling="channel_aligned"))

    def test_large_networks_from_shapes_alone(self):
        with torch.device("meta"):
            nets = torchvision.models.resnet50(), torchvision.models.vgg16()
        counted = [crossbar.tile(layer_shapes(net, (3, 224, 224)), Array()) for net in nets]
        assert [t["macs"].sum() for t in counted] == [4_089_184_256, 15_470_264_320]
        assert all(t["arrays"].gt(0).all() for t in counted)

    def test_the_model_is_left_as_it_was(self, lenet):
        net = deepcopy(lenet).train()
        before = deepcopy(net.state_dict())
        layer_shapes(net, (1, 28, 28))
        assert net.training
        assert not net.conv1._forward_hooks
        assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "an array of 0 rows"),
        ({"columns": 0}, "0 columns"),
        ({"mapping": Mapping("offset")}, "needs weight_bits"),
        ({"input_bits": 0}, "input_bits = 0"),
        ({"dac_bits": 9}, "dac_bits = 9"),
        ({"adc_bits": 0}, "adc_bits = 0"),
        ({"tiling": "loose"}, "allowed are dense, channel_aligned"),
        ({"pair": "arrays"}, "there is no pair to place"),
        ({"active_rows": 129}, "divisors of rows = 128"),
        ({"active_rows": 7}, "divisors of rows = 128"),
        ({"active_rows": 8, "tiling": "channel_aligned"}, "channel_aligned reads all 128 rows at once"),
        ({"mapping": Mapping("two_column", 8, 2), "flip": True, "analog_difference": True}, "flip inverts single"),
        ({"mapping": Polarized(weight_bits=8, cell_bits=2)}, "a fragment is read at once"),
    ],
)
def test_arrays_that_cannot_be(options, message):
    with pytest.raises(CrossbarError, match=message):
        Array(**options)


def test_more_cell_bits_than_weight_bits():
    with pytest.raises(CrossbarError, match="cell_bits = 9"):
        Mapping("offset", 8, 9)


class TestConverters:
    def test_bits_of_the_table(self):
        """Bits by active rows, by hand."""
        rows = (4, 8, 16, 32, 64, 128, 256)
        assert [exact_bits(n, 2) for n in rows] == [4, 5, 6, 7, 8, 9, 10]
        assert [exact_bits(n, 2, flip=True) for n in rows] == [3, 4, 5, 6, 7, 8, 9]

    def test_all_codes_of_whole_numbers(self):
        sums = torch.arange(16.0)
        assert torch.equal(Converter(4).convert(sums), sums)
        assert torch.equal(Converter(3).convert(sums), sums.clamp(max=7))
        signed = Converter.up_to(7, 4, signed=True)
        assert torch.equal(signed.convert(torch.arange(-9.0, 9)), torch.arange(-9.0, 9).clamp(-8, 7))

    def test_zero_is_a_code(self):
        for bits, signed in itertools.product((1, 2, 5), (False, True)):
            assert Converter.up_to(100.0, bits, signed, whole=False).convert(torch.zeros(1)).item() == 0

    def test_calibration_beats_the_full_range(self):
        """Few sums are large: a range that cuts them off loses less."""
        sums = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).abs() * 10
        sums[0] = 384
        full, found = Converter.up_to(384, 4, whole=False), crossbar.calibrated(sums, 4, signed=False)
        errors = [float((c.convert(sums) - sums).square().mean()) for c in (full, found)]
        assert errors[1] < errors[0] / 3
        assert found.codes * found.step < 100

    @pytest.mark.parametrize("bad", [{"bits": 0}, {"bits": 25}])
    def test_bits_that_cannot_be(self, bad):
        with pytest.raises(CrossbarError, match="adc_bits"):
            Converter(**bad)


def whole_weights(random, bits, filters, rows, scheme, fragment):
    top = 2 ** (bits - 1) - 1
    weight = torch.from_numpy(random.integers(-top, top + 1, (filters, rows)))
    if scheme == "polarized":
        signs = torch.from_numpy(random.choice([-1, 1], (filters, ceil(rows / fragment))))
        weight = weight.abs() * signs.repeat_interleave(fragment, 1)[:, :rows]
    weight[0, 0] = top if scheme != "polarized" else top * weight[0, :fragment].sum().sign().clamp(min=0).mul(2).sub(1)
    return weight, top


class TestProduct:
    def test_worked_example(self):
        """By hand; a second filter sets the range."""
        array = Array(mapping=Mapping("offset", 4, 2), input_bits=2)
        product = Programmed(torch.tensor([[-2.0, 1, 3, -4], [7, 0, 0, 0]]), array)
        assert product(torch.tensor([[3], [1], [2], [0]])).tolist() == [[1.0], [21.0]]

    @pytest.mark.parametrize("scheme", ["offset", "two_column", "differential", "polarized"])
    @pytest.mark.parametrize("seed", range(40))
    def test_equals_whole_numbers(self, scheme, seed):
        """Any size, width, slicing and grouping, with as many converter bits as needed: the integer product exactly."""
        random = np.random.default_rng([seed, len(scheme)])
        bits, input_bits = int(random.integers(2, 17)), int(random.integers(1, 17))
        cell_bits, fragment = int(random.integers(1, min(bits, 5) + 1)), int(2 ** random.integers(0, 5))
        signed, groups = bool(random.integers(2)) and input_bits > 1, int(random.integers(1, 4))
        filters, rows, vectors = int(random.integers(1, 5)), int(random.integers(1, 60)), int(random.integers(1, 9))
        options = {"active_rows": fragment} if scheme == "polarized" else {}
        if scheme in ("two_column", "differential"):
            options = {"analog_difference": bool(random.integers(2)), "pair": str(random.choice(["columns", "arrays"]))}
        if not options.get("analog_difference"):
            options["flip"] = bool(random.integers(2))
        kind = Polarized if scheme == "polarized" else Mapping
        named = {"fragment": fragment} if scheme == "polarized" else {"scheme": scheme}
        mapping = kind(weight_bits=bits, cell_bits=cell_bits, on_off=float(random.choice([np.inf, 8.0])), **named)
        height = fragment * int(random.integers(1, 9)) if scheme == "polarized" else int(random.integers(1, 129))
        array = Array(height, 64, mapping, input_bits, int(random.integers(1, input_bits + 1)), **options)
        weight, top = whole_weights(random, bits, groups * filters, rows, scheme, fragment)
        low, high = (-(2 ** (input_bits - 1)), 2 ** (input_bits - 1)) if signed else (0, 2**input_bits)
        x = torch.from_numpy(random.integers(low, high, (groups * rows, vectors)))

        product = Programmed(weight * 0.37 / top, array, groups)
        found = product(x, signed)

        pairs = zip(weight.chunk(groups), x.chunk(groups), strict=True)
        assert torch.equal(found, torch.cat([w.double() @ x.double() for w, x in pairs]))
        assert product.scale == pytest.approx(0.37 / top, rel=1e-5)

    def test_isaac_needs_8_bits_with_flips_and_9_without(self):
        random = torch.Generator().manual_seed(0)
        weight = torch.randint(-127, 128, (16, 128), generator=random).float()
        weight[0] = 127
        x = torch.randint(0, 256, (128, 50), generator=random)
        exact = weight.double() @ x.double()
        for bits, flip, same in ((8, True, True), (7, True, False), (9, False, True), (8, False, False)):
            found = Programmed(weight / 127, Array(flip=flip, adc_bits=bits))(x)
            assert torch.equal(found, exact) == same, (bits, flip)

    def test_fewer_bits_lose_more(self):
        random = torch.Generator().manual_seed(0)
        weight = torch.randn(8, 200, generator=random)
        x = torch.randint(0, 256, (200, 30), generator=random)
        exact, errors = Programmed(weight, Array())(x), []
        for bits in (8, 6, 4, 2):
            product = Programmed(weight, Array(adc_bits=bits))
            product.calibrate(x)
            errors.append(float((product(x) - exact).square().mean()))
        assert errors == sorted(errors)
        assert errors[1] > errors[0] == 0

    def test_two_column_stands_a_small_on_off_ratio_offset_does_not(self):
        """Without a dummy column the current of cells that are off adds up; pairs cancel it."""
        random = torch.Generator().manual_seed(0)
        weight, x = torch.randn(4, 64, generator=random), torch.randint(0, 256, (64, 9), generator=random)
        errors = {}
        for scheme in ("offset", "two_column"):
            mapping = Mapping(scheme, 8, 2, on_off=10.0)
            exact = Programmed(weight, Array(mapping=mapping))(x)
            errors[scheme] = float((Programmed(weight, Array(mapping=mapping, dummy=False))(x) - exact).abs().max())
        # the constant: (2^w - 1) / (r - 1) * sum of inputs, in every slice
        constant = 3 / 9 * (1 + 4 + 16 + 64) * x.sum(0).double().max()
        assert errors["two_column"] == 0
        assert errors["offset"] == pytest.approx(float(constant), rel=0.02)

    def test_stuck_cells_read_as_in_the_fault_sweep(self):
        """The same chip, once as weights read back and once as currents of cells."""
        random = torch.Generator().manual_seed(0)
        weight, x = torch.randn(6, 40, generator=random), torch.randint(0, 256, (40, 12), generator=random)
        for mapping in (
            Mapping("offset", 8, 2),
            Mapping("two_column", 8, 2, on_off=20.0),
            Mapping("differential", 8, 4),
        ):
            device = faults.StuckAt.of(0.05, 0.05)
            read = faults.read_back(weight, mapping, device, 3, "layer")
            change = partial(device.disturb, mapping=mapping, chip=3, layer="layer")
            product = Programmed(weight, Array(mapping=mapping), change=change)
            assert (product(x) * product.scale).float() == pytest.approx(read @ x.float(), abs=2e-2)
            assert not torch.equal(read, weight)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            ([[256]], "from 256 to 256: 8 bits hold 0 to 255"),
            ([[-1]], "-1"),
            ([[255.7]], "no whole numbers"),
            ([[-0.9]], "no whole numbers"),
            ([[float("nan")]], "no whole numbers"),
        ],
    )
    @pytest.mark.parametrize("way", [Programmed.__call__, Programmed.bit_by_bit])
    def test_inputs_that_do_not_fit(self, x, message, way):
        with pytest.raises(CrossbarError, match=message):
            way(Programmed(torch.ones(1, 1), Array()), torch.tensor(x))

    def test_mixed_fragments_are_refused(self):
        array = Array(mapping=Polarized(weight_bits=8, cell_bits=2, fragment=4), active_rows=4)
        with pytest.raises(CrossbarError, match="1 of 2 fragments of 4 rows have weights of both signs"):
            Programmed(torch.tensor([[1.0, -1, 0, 0, 2, 3]]), array)


def nodal(conductance, row, column):
    """Currents by Kirchhoff's law at every node, solved densely: what elimination must agree with."""
    rows, columns = conductance.shape
    count = rows * columns
    matrix = np.zeros((2 * count, 2 * count))

    def join(a, b, g):
        matrix[a, a] += g
        if b is not None:
            matrix[b, b] += g
            matrix[a, b] -= g
            matrix[b, a] -= g

    for i, j in itertools.product(range(rows), range(columns)):
        here = i * columns + j
        join(here, here - 1 if j else None, 1 / row)
        join(count + here, count + here + columns if i < rows - 1 else None, 1 / column)
        join(here, count + here, conductance[i, j])
    found = np.zeros((rows, columns))
    for i in range(rows):
        source = np.zeros(2 * count)
        source[i * columns] = 1 / row
        found[i] = np.linalg.solve(matrix, source)[-columns:] / column
    return found


class TestWires:
    @pytest.mark.parametrize(
        ("cells", "conductance", "ohms", "loss"),
        [(4, 1e-4, 10, 0.7439), (128, 1e-5, 2.12, 10.28), (128, 1e-4, 2.12, 49.2), (64, 1e-5, 2.12, 2.86)],
    )
    def test_lines(self, cells, conductance, ohms, loss):
        """A column of equal cells, all rows at one voltage."""
        line = torch.full((cells, 1), conductance, dtype=torch.float64)
        found = 1 - float(crossbar.effective(line, 1e-9, ohms).sum()) / (cells * conductance)
        digits = len(str(loss).partition(".")[2])
        assert round(100 * found, digits) == loss

    def test_closed_form(self):
        assert round(100 * crossbar.line_loss(128, 1e-5, 2.12), 2) == 10.17
        small = crossbar.line_loss(64, 1e-7, 2.12)
        assert small == pytest.approx(2.12e-7 * 64**2 / 3, rel=1e-3)
        assert crossbar.line_loss(64, 0.0, 2.12) == 0

    def test_against_kirchhoff(self):
        g = torch.rand(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3
        g[0, 2] = 0  # a row without cells
        found = crossbar.effective(g, 3.0, 5.0)
        for one, expected in zip(found, g, strict=True):
            assert one.numpy() == pytest.approx(nodal(expected.numpy(), 3.0, 5.0), rel=1e-9)

    def test_cheap_rules_are_right_where_little_is_lost(self):
        g = torch.rand(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-7
        exact = crossbar.effective(g, 1.0, 2.0)
        lost = float((g - exact).sum())
        assert 0 < float((g - in_series(g, 1.0, 2.0)).sum()) < lost  # no current shared
        ohms = 1 / in_series(torch.full((2, 2), 1e-3, dtype=torch.float64), row=1.0, column=10.0)
        assert ohms.flatten().tolist() == pytest.approx([1021, 1022, 1011, 1012])  # a cell, and wires to both ends
        column = torch.full((64, 1), 1e-5, dtype=torch.float64)
        exact = float(crossbar.effective(column, 1e-9, 2.12).sum())
        assert float(on_lines(column, 1.0, 2.12).sum()) == pytest.approx(exact, rel=2e-3)

    @pytest.mark.parametrize("pair", ["columns", "arrays"])
    def test_layers_are_cut_into_arrays(self, pair):
        """Cells keep their places: the same as arrays cut by hand."""
        mapping = Mapping("two_column", 4, 2)
        array = Array(8, 12, mapping, pair=pair)
        cells = torch.rand(2, 2, 5, 11, generator=torch.Generator().manual_seed(0))
        wires = Wires(2.0, 6.0, 1e4)
        found = wires.weaken(cells, array)
        for side in range(2) if pair == "arrays" else (slice(None),):
            kept = cells[:, [side]] if pair == "arrays" else cells
            matrix = kept.permute(3, 2, 1, 0).flatten(1)
            expected = torch.zeros_like(matrix)
            for i, j in itertools.product(range(0, 11, 8), range(0, matrix.shape[1], 12)):
                inside = matrix[i : i + 8, j : j + 12]
                whole = torch.zeros(8, 12)  # empty rows on top, far from the ground
                whole[8 - inside.shape[0] :, : inside.shape[1]] = inside
                weak = crossbar.effective(whole / 1e4, 2.0, 6.0) * 1e4
                expected[i : i + 8, j : j + 12] = weak[8 - inside.shape[0] :, : inside.shape[1]]
            here = found[:, [side]] if pair == "arrays" else found
            assert here.permute(3, 2, 1, 0).flatten(1) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("options", [{"row": 0.0}, {"r_on": -1.0}, {"model": "perfect"}])
    def test_wires_that_cannot_be(self, options):
        with pytest.raises(CrossbarError):
            Wires(**{"row": 1.0, "column": 1.0, "r_on": 1e5} | options)


@pytest.fixture(scope="module")
def net():
    """A small network with a bit of everything; nothing of it need be learned."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 4, 5, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 10)).eval()


IMAGES = torch.rand(60, 1, 16, 16, generator=torch.Generator().manual_seed(1))
SEEN, NEW = IMAGES[:40], IMAGES[40:]
WIDE = Array(mapping=Mapping("offset", 16, 4), input_bits=16)
"""Numbers so fine that a layer computes what it computes without arrays."""


def seen_by(network, images):
    """What every layer meets, and what it gives, by name; an entry for every use."""
    met = []
    handles = [
        module.register_forward_hook(lambda _, x, y, name=name: met.append((name, x[0], y)))
        for name, modules in uses(network).items()
        for module in modules
    ]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return met


def same_range(layer, x):
    """A layer's range of inputs is the one that suits ``x`` best."""
    best = crossbar.calibrated(x, 8, signed=bool((x < 0).any()))
    assert (layer.forward.inputs.low, layer.forward.inputs.step) == pytest.approx((best.low, best.step), rel=1e-5)


class TestNetworks:
    def test_exact_arrays_are_the_quantized_layers(self, net):
        """By hand: inputs and weights rounded, everything else as it was; layer by layer, as a last bit may tip one."""
        by_hand = dict(deepcopy(net).named_modules())
        in_arrays = crossbar.on_arrays(net, Array(), SEEN)
        met = seen_by(in_arrays, NEW)
        assert [name for name, _, _ in met] == ["0", "3", "6", "8"]
        for name, x, y in met:
            layer, rounds = by_hand[name], prunable(in_arrays)[name].forward.inputs.convert
            scale = layer.weight.detach().abs().max() / 127
            layer.weight.data = (layer.weight.data / scale).round() * scale
            with torch.no_grad():
                torch.testing.assert_close(y, layer(rounds(x)), rtol=1e-4, atol=1e-5)

    def test_ranges_do_not_hang_on_how_many_images_choose_them(self):
        """256 vectors are looked at: with 256 images of equal size, even steps would see the same corner of each."""
        torch.manual_seed(3)
        layer = nn.Conv2d(3, 8, 3, padding=1, bias=False).requires_grad_(False)
        images = torch.zeros(300, 3, 16, 16)
        images[:, :, 3:, 4:] = torch.rand(300, 3, 13, 12)  # the border is empty
        right = layer(images[:20])

        def error(count):
            placed = crossbar.on_arrays(nn.Sequential(layer), Array(adc_bits=4), images[:count])
            return float((placed(images[:20]) - right).norm())

        usual = error(250)
        assert [error(n) for n in (64, 128, 255, 256, 257)] == pytest.approx([usual] * 5, rel=0.1)

    def test_values_that_are_looked_at_are_of_all_places(self):
        rows = torch.zeros(1 << 10, 1 << 9)
        rows[:, 1::2] = torch.rand(1 << 10, 1 << 8, generator=torch.Generator().manual_seed(0)) + 1
        found = crossbar.calibrated(rows, 4, signed=False)  # of every second value, zeros alone are seen
        assert found.step < 1  # values are not whole, whatever the first of them are
        assert float((found.convert(rows) - rows).abs().max()) <= found.step

    def test_ranges_are_those_of_what_a_layer_meets_behind_arrays(self, net):
        in_arrays = crossbar.on_arrays(net, Array(adc_bits=5), SEEN)
        for name, x, _ in seen_by(in_arrays, SEEN):
            same_range(prunable(in_arrays)[name], x)

    @pytest.mark.parametrize(
        "layer",
        [
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.Conv2d(6, 6, 3, groups=6, padding="same", bias=False),
            nn.Conv2d(6, 4, (3, 1), dilation=(2, 1), groups=2, padding=(2, 0)),
            nn.Conv2d(6, 4, 1),
            nn.Conv1d(6, 8, 3, stride=2, padding=1),
            nn.Conv1d(6, 6, 5, groups=6, padding="same", bias=False),
            nn.Conv1d(6, 4, 2, dilation=3, groups=2, padding=2),
            nn.Linear(7, 4),
            nn.Linear(7, 4, bias=False),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_every_layer(self, layer, dtype):
        torch.manual_seed(0)
        nn.init.normal_(layer.weight)
        layer = deepcopy(layer).to(dtype)
        x = torch.randn(5, 6, 9, 7)[..., 0, :] if not isinstance(layer, nn.Conv2d) else torch.randn(5, 6, 9, 7)
        found = crossbar.on_arrays(nn.Sequential(layer), WIDE, x.to(dtype))
        with torch.no_grad():
            wanted = layer(x.to(dtype))
            assert found(x.to(dtype)).dtype == dtype
            torch.testing.assert_close(found(x.to(dtype)), wanted, rtol=0.02, atol=0.1 if dtype.itemsize == 2 else 5e-3)

    def test_layers_with_other_padding_are_refused(self):
        with pytest.raises(CrossbarError, match="padding_mode = 'circular'"):
            crossbar.on_arrays(nn.Sequential(nn.Conv1d(1, 1, 3, padding_mode="circular")), Array(), SEEN[0])

    def test_batches_do_not_matter(self, net):
        in_arrays = crossbar.on_arrays(net, Array(adc_bits=6), SEEN)
        with torch.no_grad():
            assert torch.equal(torch.cat([in_arrays(part) for part in NEW.split(7)]), in_arrays(NEW))
            assert torch.equal(deepcopy(in_arrays)(NEW), in_arrays(NEW))

    def test_named_layers_only(self, net):
        in_arrays = crossbar.on_arrays(net, {"6": Array()}, SEEN)
        assert [name for name, layer in prunable(in_arrays).items() if "forward" in vars(layer)] == ["6"]
        assert not any("forward" in vars(layer) for layer in net)
        with pytest.raises(CrossbarError, match="names layer 'fc9'"):
            crossbar.on_arrays(net, {"fc9": Array()}, SEEN)
        with pytest.raises(CrossbarError, match="names no layer"):
            crossbar.on_arrays(net, {}, SEEN)

    def test_what_arrays_cost(self, net):
        """The outputs of a network in good arrays are near its own; few bits, broken cells and wires move them."""
        with torch.no_grad():
            plain = net(NEW)

        def off(array=WIDE, **options):
            with torch.no_grad():
                return float((crossbar.on_arrays(net, array, SEEN, **options)(NEW) - plain).abs().mean() / plain.std())

        assert off() < 1e-4 < off(Array()) < 0.01 < off(Array(adc_bits=3))
        assert off(devices=faults.StuckAt.of(0.1, 0.1)) > 0.05
        assert off(wires=Wires(2.12, 6.36, 1e3, model="line")) > 0.05

    def test_polarized_networks(self, net):
        signs = deepcopy(net)
        harden(signs, uniform_plan(signs, PolarizedFragments(8)))
        array = Array(mapping=Polarized(weight_bits=8, cell_bits=2, fragment=8), active_rows=8, adc_bits=5)
        offset, polarized = (crossbar.on_arrays(signs, a, SEEN) for a in (Array(), array))
        with torch.no_grad():
            assert polarized(NEW) == pytest.approx(offset(NEW), abs=1e-4)


class Again(nn.Module):
    """One layer, met twice: first with numbers up to 1, then up to 100; what it gives stays within them."""

    def __init__(self, tied=False):
        super().__init__()
        self.first = self.second = nn.Linear(1, 1, bias=False)
        self.first.weight.data.fill_(0.01)
        if tied:
            self.second = nn.Linear(1, 1, bias=False)
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(1e4 * self.first(x))


class TestAllUses:
    """A layer is a tensor: whatever modules hold it, however often they run."""

    X = torch.tensor([[1.0], [0.5]])

    @pytest.mark.parametrize("tied", [False, True])
    def test_ranges_are_over_all_of_them(self, tied):
        net = Again(tied)
        in_arrays = crossbar.on_arrays(net, WIDE, self.X)
        with torch.no_grad():
            assert in_arrays(self.X).tolist() == [[pytest.approx(1, rel=0.01)], [pytest.approx(0.5, rel=0.01)]]
        first, second = in_arrays.first.forward, in_arrays.second.forward
        assert first.programmed is second.programmed
        assert first.inputs == second.inputs
        assert first.inputs.codes * first.inputs.step > 99

    def test_layers_in_between_and_behind_meet_arrays(self):
        class Between(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.head, self.twice, self.between, self.behind = (nn.Linear(6, 6) for _ in range(4))

            def forward(self, x):
                return self.behind(self.twice(self.between(self.twice(self.head(x)).relu())).relu())

        x = torch.rand(30, 6, generator=torch.Generator().manual_seed(0))
        in_arrays = crossbar.on_arrays(Between(), Array(adc_bits=4), x)
        for name, met, _ in seen_by(in_arrays, x):
            if name != "twice":
                same_range(prunable(in_arrays)[name], met)

    def test_images_of_two_sizes(self):
        class Sizes(nn.Sequential):
            def forward(self, x):
                return self[0](x).mean((2, 3)) + self[0](10 * x[..., ::2, ::2]).mean((2, 3))

        torch.manual_seed(0)
        net = Sizes(nn.Conv2d(1, 3, 3))
        with torch.no_grad():
            assert crossbar.on_arrays(net, WIDE, SEEN)(NEW) == pytest.approx(net(NEW), abs=5e-3)

    def test_what_images_never_meet_is_refused_by_name(self, net):
        class Apart(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.spare, self.bare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                return nn.functional.linear(self.fc(x), self.bare.weight)

        x = torch.rand(3, 4)
        with pytest.raises(CrossbarError, match="never meet spare, bare"):
            crossbar.on_arrays(Apart(), Array(), x)
        assert crossbar.on_arrays(Apart(), {"fc": Array()}, x)(x).shape == (3, 4)

    def test_layers_of_a_fused_kernel_run_themselves(self):
        torch.manual_seed(0)
        net, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(5, 3, 8)
        in_arrays = crossbar.on_arrays(net, {"linear1": WIDE, "linear2": Array(adc_bits=2)}, x)
        with torch.no_grad():
            assert crossbar.on_arrays(net, {"linear1": WIDE, "linear2": WIDE}, x)(x) == pytest.approx(net(x), abs=5e-3)
            assert (in_arrays(x) - net(x)).abs().max() > 0.05

    def test_hooks_of_a_layer_still_run(self):
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(6, 4)), torch.rand(50, 6)
        quantization.quantize_activations(net, 2, x)
        with torch.no_grad():
            assert crossbar.on_arrays(net, WIDE, x)(x) == pytest.approx(net(x), abs=2e-3)
            assert (net(x) - nn.Linear.forward(net[0], x)).abs().max() > 0.02

    def test_a_network_in_arrays_is_no_network_to_break(self, net):
        in_arrays, split = crossbar.on_arrays(net, {"6": Array()}, SEEN), data.Split(NEW, torch.zeros(20).long())
        for ask in (
            lambda: crossbar.on_arrays(in_arrays, Array(), SEEN),
            lambda: faults.sweep(in_arrays, "offset", [0.1], 1, split),
            lambda: faults.on_chip(in_arrays, "offset", faults.StuckAt(0.1), 0),
        ):
            with pytest.raises(CrossbarError, match="6: in arrays already"):
                ask()

    def test_noise_of_reads_is_not_left_out_without_a_word(self, net):
        for ask in (
            lambda noise: crossbar.on_arrays(net, Array(), SEEN, devices=noise),
            lambda noise: faults.on_chip(net, "offset", (faults.StuckAt(0.1), noise), 0),
            lambda noise: faults.InSlice(noise, 0),
            lambda noise: faults.UnderFaults("offset", noise),
        ):
            with pytest.raises(CrossbarError, match=r"ReadNoise\(sigma=0.1\) is new at every read"):
                ask(faults.ReadNoise(0.1))
        with pytest.raises(CrossbarError, match=r"0.1 is no device"):
            crossbar.on_arrays(net, Array(), SEEN, devices=0.1)


class TestPolarizedMapping:
    """FORMS's mapping in the fault sweep."""

    def test_reads_back_what_was_written(self):
        weight = torch.tensor([[0.5, 1.0, 0.0, -0.25, -1.0, -0.5, 0.75]])
        for options in ({}, {"weight_bits": 8, "cell_bits": 2}, {"on_off": 10.0}):
            mapping = Polarized(fragment=3, **options).of(weight)
            scale = mapping.range_of(weight)
            assert mapping.decode(mapping.encode(weight, scale), scale) == pytest.approx(weight, abs=5e-3)

    def test_signs_are_needed(self):
        with pytest.raises(CrossbarError, match=r"Polarized.of\(weight\)"):
            Polarized().encode(torch.ones(1, 4), 1.0)

    def test_half_the_cells_of_a_pair(self):
        pair, one = Mapping("two_column", 8, 2), Polarized(weight_bits=8, cell_bits=2)
        assert (one.columns * one.slices) * 2 == pair.columns * pair.slices == 8

    def test_a_plan_for_the_sweep(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(784, 100), nn.Linear(100, 10))
        for layer in net:
            layer.weight.data.abs_()
        plan = {n: Polarized().of(layer.weight) for n, layer in prunable(net).items()}
        healthy = faults.on_chip(net, plan, faults.StuckAt(0.0), 0)
        for a, b in zip(net.parameters(), healthy.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        broken = faults.on_chip(net, plan, faults.StuckAt.of(0.0, 0.1), 0)[0].weight
        share = float(((net[0].weight != 0) & (broken == 0)).double().mean())
        assert share == pytest.approx(0.1, abs=0.005)


def test_sabotage_is_noticed_by_the_worked_example():
    """The offset of a mapping is what a missing unit column would leave in every sum."""
    weight, x = torch.tensor([[-2.0, 1, 3, -4], [7, 0, 0, 0]]), torch.tensor([[3], [1], [2], [0]])
    wrong = Programmed(weight, Array(mapping=Mapping("offset", 4, 2), input_bits=2))
    wrong.cells[:, -1] = 0
    assert wrong(x).flatten().tolist() == [1.0 + 8 * 6, 21.0 + 8 * 6]
    assert crossbar.SCHEMES == ("offset", "two_column", "differential")
