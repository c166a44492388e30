"""Technology tables, and what designs make of them, against published totals and arithmetic done elsewhere."""

from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn

from lib import crossbar, models, technology
from lib.costs import CostError, crossbar_bill, designs, mac_pj
from lib.costs.designs import Forms, Isaac, Prime, Timely, at_bits, converter
from lib.crossbar import Array, CrossbarError, Mapping
from lib.crossbar.skipping import input_cycles
from lib.shapes import layer_shapes
from lib.technology import TechnologyError, table


@pytest.fixture(scope="module")
def shapes():
    return layer_shapes(models.build("lenet5", (1, 28, 28), 10, seed=0), (1, 28, 28))


class TestTables:
    def test_every_table_has_sources(self):
        paths = [*technology.FOLDER.glob("*.csv")]
        assert len(paths) >= 9
        for path in paths:
            frame = table(path.stem).frame
            assert len(frame) > 0
            assert set(frame["status"]) <= {"verified", "unverified"}

    def test_unverified_rows_are_refused_unless_asked_for(self):
        with pytest.raises(TechnologyError, match=r"'dram_32bit' is not verified .*ask for unverified"):
            table("digital")("dram_32bit", "energy_pJ")
        assert table("digital", unverified=True)("dram_32bit", "energy_pJ") == 640

    @pytest.mark.parametrize(
        ("text", "row", "message"),
        [
            ("name,x,status,source\na,1,verified,here\n", "b", "has no row 'b': a"),
            (
                "name,x,status,source\na,,verified,here\nb,1,verified,here\n",
                "a",
                "'a' has no x; its source prints none",
            ),
            ("name,x,status,source\na,-1,verified,here\n", "a", "'a' has x = -1"),
            (
                "name,x,status,source\na,1,verified,here\nb,1,verified,here\nc,~2,verified,here\n",
                "a",
                "'c' has x = ~2;",
            ),
            ("name,x,status,source\na,1 pJ,verified,here\n", "a", "'a' has x = 1 pJ, no number"),
            ("name,x,status,source\na,1,verified,\n", "a", "every row needs a source"),
            ("name,x,status,source\na,1,verified,here\na,2,verified,here\n", "a", "'a' is there twice"),
        ],
    )
    def test_damaged_tables(self, tmp_path, text, row, message):
        (tmp_path / "own.csv").write_text(text)
        with pytest.raises(TechnologyError, match=message):
            table("own", folder=tmp_path)(row, "x")

    def test_no_such_table(self):
        with pytest.raises(TechnologyError, match="no technology table 'gold' in technology: adc, "):
            table("gold")

    def test_wires_follow_from_their_inputs(self):
        """Resistance of a pitch of 4 F along a row and 12 F along a column, F the width of a wire."""
        for node, row in table("wires").frame.iterrows():
            area = (row["wire_nm"] * 1e-9) ** 2 * row["aspect_ratio"]
            ohm = row["resistivity_ohm_m"] * row["wire_nm"] * 1e-9 / area
            assert (4 * ohm, 12 * ohm) == pytest.approx((row["row_ohm"], row["column_ohm"]), rel=0.01), node


class TestIsaac:
    def test_chip_closes(self):
        """Rows 1 to 5 of the validation ledger."""
        chip, printed = designs.isaac_chip(), table("published")
        for ours, theirs, tolerance in (
            ("tile_power_mW", "isaac_tile_power", 0.005),
            ("tile_area_mm2", "isaac_tile_area", 0.005),
            ("chip_power_W", "isaac_chip_power", 0.005),
            ("chip_area_mm2", "isaac_chip_area", 0.005),
            ("GOPS_per_W", "isaac_power_efficiency", 0.005),
            ("GOPS_per_mm2", "isaac_compute_density", 0.015),
            ("MB_per_mm2", "isaac_storage_density", 0.005),
        ):
            assert chip[ours] == pytest.approx(printed(theirs, "value"), rel=tolerance), ours
        assert chip["GOPS"] == pytest.approx(41_288, abs=0.5)
        assert chip["ima_power_mW"] == pytest.approx(24.08)
        assert chip["ima_area_mm2"] == pytest.approx(0.013120)
        shares = chip[["adc_share_tile_power", "adc_share_tile_area", "adc_share_chip_power"]]
        assert (100 * shares).tolist() == pytest.approx([58, 31, 49], abs=1)
        density = printed("isaac_compute_density", "value") / printed("dadiannao_compute_density", "value")
        assert density == pytest.approx(7.5, rel=0.02)

    def test_events(self):
        """ISAAC's power over its events, worked out apart."""
        events = Isaac(Array(adc_bits=8)).events()
        assert {part: pj for part, (_, pj) in events.items()} == pytest.approx(
            {"adc": 1.5625, "dac": 0.390625, "array": 30.0 / 128**2, "sample_hold": 0.000977, "shift_add": 0.01953},
            rel=1e-3,
        )

    def test_converter_law(self):
        """The fit of scaled converters, worked out apart."""
        (a, b), (c, d) = designs.converter_law()
        assert (a, b) == pytest.approx((0.19543, 0.000414), rel=1e-3)
        assert (c, d) == pytest.approx((81.727, 2.13353), rel=1e-5)
        for bits in range(4, 11):
            row = f"isaac_scaled_{bits}"
            assert c * bits + d * 2**bits == pytest.approx(table("adc")(row, "area_um2"), abs=6e-3)
            assert a * bits + b * 2**bits == pytest.approx(table("adc")(row, "energy_pJ"), rel=2.5e-3)

    def test_tiny_adc_savings(self):
        """From 9 to 6 bits 1.64x energy and 2.92x area, from 8 to 4 bits 2.11x and 3.32x, nothing approximated."""
        for (many, few), (energy, area) in {(9, 6): (1.64, 2.92), (8, 4): (2.11, 3.32)}.items():
            more, less = designs.converter(many), designs.converter(few)
            assert more[0] / less[0] == pytest.approx(energy, abs=0.01)
            assert more[1] / less[1] == pytest.approx(area, abs=0.005)

    @pytest.mark.parametrize("design", [Isaac(), Forms(), Timely()], ids=lambda d: d.name)
    def test_a_cell_holds_no_more_bits_than_a_weight(self, design):
        assert at_bits(design, 2, 8).array.mapping.slices == 1
        assert at_bits(design, 8, 8).array.mapping == replace(design.array.mapping, weight_bits=8)

    @pytest.mark.parametrize(("bits", "count", "area", "latency"), [(16, 246, 1.0513, 1027.2), (8, 125, 0.6396, 513.6)])
    def test_lenet(self, shapes, bits, count, area, latency):
        """LeNet-5 with 16 and with 8 bits, worked out apart."""
        design = at_bits(Isaac(), bits, bits)
        tiles = crossbar.tile(shapes, design.array)
        summary = design.summary(tiles)
        assert summary["arrays"] == count
        assert round(summary["area_mm2"], 4) == area
        assert summary["latency_us"] == pytest.approx(latency)
        parts = design.energy(tiles)[["adc", "dac", "array"]].sum().sum() / 1000
        assert parts == pytest.approx({16: 7252.547, 8: 1813.918}[bits], rel=1e-5)

    @pytest.mark.parametrize(("size", "energy"), [(32, 3838.2), (64, 2563.8), (128, 1813.9), (256, 1476.5)])
    def test_array_sizes(self, shapes, size, energy):
        """Converters of the flip rule's bits, 6 to 9."""
        design = Isaac(Array(size, size, flip=True))
        found = design.energy(crossbar.tile(shapes, design.array))[["adc", "dac", "array"]].sum().sum() / 1000
        assert found == pytest.approx(energy, rel=2e-3)


class TestForms:
    def test_fixture(self, shapes):
        """FORMS worked out apart, and ISAAC's hardware with the same weights beside it."""
        design = Forms()
        tiles = crossbar.tile(shapes, design.array)
        assert design.energy(tiles)["adc"].sum() / 1000 == pytest.approx(4318.4, abs=0.3)
        isaac = at_bits(Isaac(), 8, 16)
        assert isaac.energy(crossbar.tile(shapes, isaac.array))["adc"].sum() / 1000 == pytest.approx(2786.0, abs=0.1)

    @pytest.mark.parametrize(("fragment", "ns"), [(4, 487.6), (8, 243.8), (16, 121.9)])
    def test_times(self, fragment, ns):
        """An array of 128 rows, bit by bit."""
        design = Forms(designs.forms_array(fragment))
        assert design.read_ns == pytest.approx(15.24, abs=0.005)
        assert design.read_ns * 128 / fragment == pytest.approx(ns, abs=0.1)

    def test_converter_is_the_cheaper_point(self, shapes):
        own, scaled = Forms().conversion()[0], Forms(own_converter=False).conversion()[0]
        assert own == pytest.approx(0.2262)
        assert table("adc")("isaac_scaled_4", "energy_pJ") / own == pytest.approx(3.5, abs=0.01)
        assert scaled == pytest.approx(0.79 * 1.5625 / 1.67, rel=2e-3)

    def test_a_converter_is_priced_by_its_bits(self):
        """ISAAC's law at the array's bits; of FORMS's own converter one width is published."""
        arrays = {bits: replace(designs.forms_array(8), adc_bits=bits) for bits in (3, 4, 5, None)}
        law = [Forms(array, own_converter=False).conversion() for array in arrays.values()]
        assert law == [converter(b) for b in (3, 4, 5, 5)]  # 24 = 8 x 3 is below 2^5
        assert Forms(arrays[4]).conversion() == Forms().conversion()
        for bits in (3, 5, None):
            with pytest.raises(CostError, match=f"has 4 bits, the array {bits or 5}: own_converter=False"):
                Forms(arrays[bits]).summary(crossbar.tile(layer_shapes(nn.Linear(8, 8), (8,)), arrays[bits]))

    def test_drivers_of_several_bits_have_no_price(self):
        with pytest.raises(CostError, match="dac_bits = 2: ISAAC-like prices row drivers of 1 bit"):
            Isaac(Array(dac_bits=2))

    def test_converters_that_columns_share(self, shapes):
        """More of them take area and no time; fewer take less area, and the read waits for them."""
        tiles = crossbar.tile(shapes, Isaac().array)
        few, as_published, many = (Isaac(columns_per_adc=columns) for columns in (512, 128, 8))
        assert as_published == Isaac()
        areas = [design.area(96)["adc"] for design in (few, as_published, many)]
        assert areas == pytest.approx([areas[1] / 4, areas[1], 16 * areas[1]])
        times = [design.latency(tiles) for design in (few, as_published, many)]
        assert times == pytest.approx([4 * times[1], times[1], times[1]])
        with pytest.raises(CostError, match="columns_per_adc = 0"):
            Isaac(columns_per_adc=0)

    @pytest.mark.parametrize("design", [Isaac(), Forms(), Prime(), Timely()], ids=lambda design: design.name)
    def test_no_design_prices_the_counts_of_another_array(self, shapes, design):
        other = replace(design.array, rows=16, columns=16, active_rows=None) if design != Forms() else Array()
        net = nn.Sequential(nn.Linear(9, 3))
        for tiles in (crossbar.tile(shapes, other), crossbar.occupied(net, (9,), other)):
            with pytest.raises(CostError, match="; the rows were counted for "):
                design.summary(tiles)

    def test_what_is_priced_is_what_computes(self):
        """Bits of the converters that a design pays for, and of those that read every sum exactly."""
        for pair in (True, False):
            for height, cell_bits in ((128, 2), (32, 1), (8, 4)):
                mapping = Mapping("differential", 9, cell_bits)
                array = Array(mapping=mapping, active_rows=height, analog_difference=pair)
                assert Isaac(array).adc_bits == crossbar.Programmed(torch.ones(2, 128), array).converter.bits
        flip = Array(flip=True)
        assert Isaac(flip).adc_bits == crossbar.Programmed(torch.ones(2, 128), flip).converter.bits == 8

    def test_cycles_of_no_layer_or_beyond_all_steps_are_refused(self, shapes):
        design = Forms()
        tiles = crossbar.tile(shapes, design.array)
        for wrong in ({"net.conv1": 4.0}, {"conv1": float("nan")}, {"conv1": -1.0}, {"conv1": 17.0}):
            for price in (design.energy, design.latency, design.summary, partial(crossbar_bill, design)):
                with pytest.raises(CostError, match=r"cycles: (no layer net.conv1;|conv1 .*allowed are 0 to the 16)"):
                    price(tiles, wrong)

    def test_skipping(self, shapes):
        design = Forms()
        tiles = crossbar.tile(shapes, design.array)
        cycles = dict.fromkeys(tiles["layer"], 4.0)
        assert design.energy(tiles, cycles=cycles)["total"].sum() == pytest.approx(
            design.energy(tiles)["total"].sum() / 4
        )
        assert design.latency(tiles, cycles=cycles) == pytest.approx(design.latency(tiles) / 4)
        one = {"conv1": 8.0}
        assert design.latency(tiles, cycles=one) > design.latency(tiles, cycles=cycles)

    def test_published_products(self):
        """Row 9: 23.18 (pruning) x 4 (32 to 8 bits) x 2 (one column a weight instead of two arrays)."""
        assert round(23.18 * 4 * 2, 2) == 185.44
        pair, one = Mapping("two_column", 8, 2), designs.forms_array(8).mapping
        assert pair.columns * pair.slices / (one.columns * one.slices) == 2
        assert pytest.approx(0.96645, abs=5e-6) == 1 - 1 / 29.81  # row 12
        assert pytest.approx(0.95211, abs=5e-6) == 1 - 1 / 20.88


class TestCycles:
    def test_fixture(self):
        """Inputs 0, 3, 5, 1 of 8 bits take 3 steps."""
        assert input_cycles(torch.tensor([[0], [3], [5], [1]]), 4, 8).tolist() == [[3]]

    def test_fragments_and_signs(self):
        x = torch.tensor([[0, 1], [0, -1], [255, 0], [0, 0], [7, 0]])
        assert input_cycles(x, 2, 8).tolist() == [[0, 8], [8, 0], [3, 0]]
        assert input_cycles(x, 2, 8, dac_bits=3).tolist() == [[0, 3], [3, 0], [1, 0]]

    def test_by_hand(self):
        torch.manual_seed(0)
        layer, x = nn.Conv2d(3, 4, 3, padding=1), torch.rand(2, 3, 6, 6) ** 4
        net = crossbar.on_arrays(nn.Sequential(layer), Array(), x)
        found = crossbar.effective_cycles(net, x, (4, 27)).set_index("fragment")["cycles"]
        whole = nn.functional.unfold(net[0].forward.whole(x), 3, padding=1).permute(1, 0, 2).flatten(1)  # (27, vectors)
        for f in (4, 27):
            parts = [whole[i : i + f].amax(0).int().tolist() for i in range(0, 27, f)]
            expected = [v.bit_length() for part in parts for v in part]
            assert found[f] == pytest.approx(sum(expected) / len(expected))
        assert found[4] < found[27] <= 8

    def test_all_uses_count(self):
        """A layer that meets 1 and then 255, of 8 bits: 1 and 8 steps."""

        class Again(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(1, 1, bias=False)
                self.fc.weight.data.fill_(1.0)

            def forward(self, x):
                return self.fc(255 * self.fc(x))

        x = torch.tensor([[1.0]])
        found = crossbar.effective_cycles(crossbar.on_arrays(Again(), Array(), x), x, (1,))
        assert found.values.tolist() == [["fc", 1, 4.5, 8]]

    def test_a_sequence_is_an_image_one_pixel_high(self):
        torch.manual_seed(0)
        flat, x = nn.Conv1d(3, 4, 3, padding=1), torch.rand(2, 3, 9)
        image = nn.Conv2d(3, 4, (1, 3), padding=(0, 1))
        image.weight.data, image.bias = flat.weight.data[:, :, None], flat.bias
        found = [
            crossbar.effective_cycles(crossbar.on_arrays(nn.Sequential(layer), Array(), v), v, (4,))["cycles"].item()
            for layer, v in ((flat, x), (image, x[:, :, None]))
        ]
        assert found[0] == found[1] < 8
        tiles = [
            crossbar.occupied(nn.Sequential(layer), shape, Array(), "lines")
            for layer, shape in ((flat, (3, 9)), (image, (3, 1, 9)))
        ]
        assert tiles[0].equals(tiles[1])

    def test_refusals(self):
        with pytest.raises(CrossbarError, match="0 layers in arrays"):
            crossbar.effective_cycles(nn.Linear(3, 3), torch.ones(1, 3), (4,))


class TestOthers:
    def test_prime_has_no_absolute_figures(self, shapes):
        design = Prime()
        tiles = crossbar.tile(shapes, design.array)
        for ask in (lambda: design.energy(tiles), lambda: design.area(3), lambda: design.latency(tiles)):
            with pytest.raises(CostError, match="PRIME prints no absolute"):
                ask()
        summary = design.summary(tiles)
        assert summary["arrays"] == tiles["arrays"].sum()
        assert summary.isna().sum() == 3

    def test_timely_shares_conversions(self):
        """12 arrays side by side convert their inputs once, 12 below each other their sums once."""
        shapes = layer_shapes(nn.Sequential(nn.Linear(12 * 256, 12 * 128)), (12 * 256,))
        shared, alone = (Timely(across=n, down=n) for n in (12, 1))
        both = [d.energy(crossbar.tile(shapes, d.array)).iloc[0] for d in (shared, alone)]
        assert both[1]["dtc"] == pytest.approx(12 * both[0]["dtc"])
        assert both[1]["tdc"] == pytest.approx(12 * both[0]["tdc"])
        counts = [d.summary(crossbar.tile(shapes, d.array))["conversions"] for d in (shared, alone)]
        assert counts == [12 * 128 * 2, 12 * 12 * 128 * 2]  # of the numbers that the energy counts
        assert both[0]["tdc"] == pytest.approx(counts[0] * table("timely")("tdc", "energy_fJ") / 1000)
        assert both[0]["input_reads"] == pytest.approx(12 * 256 * 12.736)

    def test_timely_prices_zeros_by_their_rule_and_inputs_of_one_step(self):
        net, design = nn.Sequential(nn.Linear(512, 512)), Timely()
        full = design.energy(crossbar.tile(layer_shapes(net, (512,)), design.array))["total"].sum()
        net[0].weight.data[:256] = 0
        tiles = {rule: crossbar.occupied(net, (512,), design.array, rule) for rule in ("none", "lines")}
        assert design.energy(tiles["none"])["total"].sum() == full
        assert design.energy(tiles["lines"])["total"].sum() < full
        with pytest.raises(CostError, match="inputs of 16 bits, 8 at a time: one step"):
            at_bits(design, 8, 16)

    def test_timely_reads_inputs_once(self, shapes):
        """Unfolding reads an input up to 25 times in a 5x5 convolution."""
        assert shapes.set_index("layer")["inputs"].to_dict() == {"conv1": 784, "conv2": 2880, "fc1": 800, "fc2": 500}
        again = shapes["rows"] * shapes["vectors"] / shapes["inputs"]
        assert again.round(2).tolist() == [18.37, 11.11, 1.0, 1.0]

    def test_published_ratios(self):
        """Row 10: arithmetic on printed figures, before and after ISAAC's erratum."""
        value = {name: table("published")(name, "value") for name in ("isaac_power_efficiency",)}
        timely = {bits: table("published")(f"timely_power_efficiency_{bits}bit", "value") for bits in (8, 16)}
        assert timely[8] / table("published")("prime_power_efficiency_8bit", "value") == pytest.approx(10.0)
        quoted = table("published")("isaac_power_efficiency_as_timely_quotes", "value")
        assert timely[16] / quoted == pytest.approx(18.2, abs=0.05)
        assert timely[16] / value["isaac_power_efficiency"] == pytest.approx(11.0, abs=0.05)

    def test_digital(self):
        """A digital accelerator, worked out apart."""
        assert 2.293 * mac_pj("fp32") == pytest.approx(10.548, abs=5e-4)
        assert 2.293 * mac_pj("int8") == pytest.approx(0.688, abs=5e-4)

    @pytest.mark.parametrize("design", [Isaac(), Forms(), Prime(), Timely()])
    def test_each_says_what_it_counts(self, design):
        assert design.name
        assert design.counted
        assert design.left_out

    def test_large_networks(self):
        with torch.device("meta"):
            net = models.build("resnet50", (3, 224, 224), 1000)
        shapes = layer_shapes(net, (3, 224, 224))
        for design in (Isaac(), Forms(), Timely()):
            summary = design.summary(crossbar.tile(shapes, design.array))
            assert isinstance(summary, pd.Series)
            assert (summary > 0).all()
