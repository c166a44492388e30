"""Digital chips: published and released figures to the digit, and counts against loops that are really run."""

import itertools
import random
from collections import Counter
from dataclasses import replace
from math import inf, prod

import numpy as np
import pandas as pd
import pytest
from torch import nn

from lib import crossbar, models
from lib.costs import CostError, crossbar_bill, designs, digital_bill, training_bill, training_energy
from lib.costs.bitwise import FLOATS, bitwise, bitwise_left, float_steps
from lib.costs.digital import (
    DATAFLOWS,
    Chip,
    Loops,
    Nest,
    RowStationary,
    Step,
    Stored,
    accesses,
    check,
    coarse,
    explore,
    eyeriss_units,
    fine,
    memory_cycles,
    moved,
    path_cycles,
    search,
    splits,
    systolic,
    tiles,
    with_stored,
)
from lib.costs.digital.builder import PARTS
from lib.costs.digital.loops import priced
from lib.costs.digital.nests import LEVELS, RELEVANT, energy, latency, refreshes, volume
from lib.costs.digital.row_stationary import cycles
from lib.shapes import ShapeError, layer_shapes, loop_bounds
from lib.technology import table

EYERISS = Chip.read("eyeriss")
SMALL = Loops(K=8, C=6, Yo=4, Xo=4, R=3, S=3)


class TestLoops:
    @pytest.mark.parametrize("name", ["lenet5", "resnet8", "mobilenet_v2"])
    def test_the_work_is_that_of_the_shapes(self, name):
        shape = (3, 64, 64) if name == "mobilenet_v2" else (1, 28, 28)
        model = models.build(name, shape, 10)
        layers = Loops.of(loop_bounds(model, shape))
        assert sum(layer.groups * layer.macs for layer in layers) == layer_shapes(model, shape)["macs"].sum()

    def test_linear_layers_take_tokens_and_convolutions_may_have_one_dimension(self):
        net = nn.Sequential(nn.Conv1d(3, 8, 5, stride=2), nn.Linear(30, 4))
        first, second = Loops.of(loop_bounds(net, (3, 63)))
        assert (first.K, first.C, first.Yo, first.Xo, first.R, first.S, first.U) == (8, 3, 1, 30, 1, 5, 2)
        assert (second.K, second.C, second.Xo, second.macs) == (4, 30, 8, 8 * 120)

    def test_two_strides_are_refused(self):
        with pytest.raises(ShapeError, match=r"layer 0 has the stride \(2, 1\)"):
            loop_bounds(nn.Sequential(nn.Conv2d(1, 1, 3, stride=(2, 1))), (1, 9, 9))
        with pytest.raises(CostError, match="0: D = 2: loops of a kernel without dilation"):
            Loops.of(loop_bounds(nn.Sequential(nn.Conv2d(1, 1, 3, dilation=2)), (1, 9, 9)))

    def test_splits_are_all_there_and_none_twice(self):
        found = {*map(tuple, splits(12, 3).tolist())}
        assert found == {w for w in itertools.product(range(1, 13), repeat=3) if prod(w) == 12}
        assert len(found) == len(splits(12, 3))


class TestRowStationary:
    @pytest.mark.parametrize(
        ("layer", "t", "energy", "time", "levels"),
        [
            (
                Loops(K=50, C=20, Yo=8, Xo=8, R=5, S=5),
                {"K0": 10, "K1": 1, "K2": 1, "K3": 5, "C0": 2, "C1": 2, "C2": 5, "Yo1": 8, "Yo3": 1},
                17_329_600,
                20_000,
                {"dram": 8_520_000, "buffer": 240_000, "fill": 105_600, "network": 784_000, "register": 6_080_000},
            ),
            (
                Loops(K=64, C=64, Yo=8, Xo=8, R=3, S=3, Yi=8, Xi=8),
                {"K0": 16, "K1": 1, "K2": 4, "K3": 1, "C0": 2, "C1": 2, "C2": 16, "Yo1": 8, "Yo3": 1},
                22_249_472,
                49_152,
                {"dram": 9_011_200, "buffer": 835_584, "fill": 49_152, "network": 1_343_488, "register": 8_650_752},
            ),
        ],
    )
    def test_two_layers_by_hand(self, layer, t, energy, time, levels):
        words, units = accesses(layer, t), eyeriss_units()
        by_level = Counter()
        for (level, _), count in words.items():
            by_level[level] += units[level] * count
        assert by_level == levels | {"mac": layer.macs}
        assert (priced(words, units), cycles(layer, t)) == (energy, time)

    @pytest.mark.parametrize(
        ("kernel", "channels", "side", "mJ", "ms"),
        [(3, 64, 8, 0.0201023, 0.098304), (3, 16, 32, 0.0196631, 0.098304), (1, 64, 8, 0.00172605, 0.016384)],
    )
    def test_figures_of_the_released_script(self, kernel, channels, side, mJ, ms):
        layer = Loops(K=channels, C=channels, Yo=side, Xo=side, R=kernel, S=kernel, Yi=side, Xi=side)
        found = RowStationary(released=True).search(layer)
        assert found["energy"] / 1e9 == pytest.approx(mJ, rel=5e-6)
        assert found["cycles"] / 250e3 == pytest.approx(ms)

    def test_the_search_looks_at_every_tiling(self):
        chip = RowStationary(processors=24, input_words=6, weight_words=32, sum_words=4, buffer_words=300)
        names = ("K0", "K1", "K2", "K3", "C0", "C1", "C2", "Yo1", "Yo3")
        best = {"energy": inf, "latency": inf}
        count = 0
        for k, c, y in itertools.product(splits(8, 4), splits(6, 3), splits(4, 2)):
            t = dict(zip(names, map(int, (*k, *c, *y)), strict=True))
            if all(needed <= there for needed, there in chip.needs(SMALL, t).values()):
                count += 1
                best["energy"] = min(best["energy"], priced(accesses(SMALL, t), chip.units))
                best["latency"] = min(best["latency"], cycles(SMALL, t))
        assert 0 < count == len(chip.tilings(SMALL))
        assert chip.search(SMALL, "energy")["energy"] == best["energy"]
        assert chip.search(SMALL, "latency")["cycles"] == best["latency"]

    def test_time_is_the_longest_of_array_and_ports(self):
        """The second fixture by hand: 49,152 cycles of arithmetic; 147,456 words through the buffer."""
        layer = Loops(K=64, C=64, Yo=8, Xo=8, R=3, S=3, Yi=8, Xi=8)
        t = {"K0": 16, "K1": 1, "K2": 4, "K3": 1, "C0": 2, "C1": 2, "C2": 16, "Yo1": 8, "Yo3": 1}
        words, arithmetic = accesses(layer, t), cycles(layer, t)
        through = 4096 * 4 + 4096 * 30 + 4096 + 4096  # inputs, sums back and forth, filled, taken
        assert through == 147_456
        for port, time in ((inf, 49_152), (4, 49_152), (2, through / 2), (1, through)):
            assert RowStationary(buffer_port=port).latency(arithmetic, words) == time
        assert RowStationary(network_port=1).latency(arithmetic, words) == 4096 * 16 * 5  # of sums, the most
        narrow = RowStationary(buffer_port=1)
        assert (narrow.tilings(layer)["cycles"] >= RowStationary().tilings(layer)["cycles"]).all()
        assert narrow.search(layer, "latency")["cycles"] == narrow.tilings(layer)["cycles"].min()

    def test_groups_come_one_after_the_other(self):
        one, four = RowStationary().search(SMALL), RowStationary().search(replace(SMALL, groups=4))
        assert (four["energy"], four["cycles"]) == (4 * one["energy"], 4 * one["cycles"])

    def test_a_bill_is_the_search_by_level(self):
        bill = RowStationary().bill([SMALL, replace(SMALL, K=16, groups=2, layer="other")])
        searched = [RowStationary().search(x) for x in (SMALL, replace(SMALL, K=16, groups=2))]
        assert bill["energy"].sum() == pytest.approx(sum(s["energy"] for s in searched))
        assert bill.groupby("layer")["cycles"].first().sum() == sum(s["cycles"] for s in searched)

    def test_refusals(self):
        t = {"K0": 8, "K1": 1, "K2": 1, "K3": 1, "C0": 6, "C1": 1, "C2": 1, "Yo1": 4, "Yo3": 1}
        RowStationary(input_words=18).check(SMALL, t)
        with pytest.raises(CostError, match="input_words = 12, but the tiling takes 18"):
            RowStationary().check(SMALL, t)
        with pytest.raises(CostError, match="tiles of C cover 3 of 6"):
            RowStationary().check(SMALL, t | {"C0": 3})
        with pytest.raises(CostError, match="input_words = 12 hold no row of 13 weights"):
            RowStationary().search(Loops(K=2, C=2, R=1, S=13))
        with pytest.raises(CostError, match=r"no tiling fits the chip \(.*buffer_words 10 of at least"):
            RowStationary(buffer_words=10).search(SMALL)
        with pytest.raises(CostError, match="objective = 'area': allowed are energy, latency, both"):
            RowStationary().search(SMALL, "area")
        with pytest.raises(CostError, match="processors = 0"):
            RowStationary(processors=0)
        with pytest.raises(CostError, match="buffer_port = 0 words a cycle"):
            RowStationary(buffer_port=0)
        with pytest.raises(CostError, match="unit energy of dram: -1"):
            priced({("dram", "inputs"): 3}, {"dram": -1})
        with pytest.raises(CostError, match="fc: K = 0"):
            Loops(K=0, C=1, layer="fc")


class TestNests:
    @pytest.mark.parametrize("number", range(1, 6))
    def test_energies_of_the_released_code(self, number):
        row = table("nests").frame.loc[f"eyeriss_alexnet_{number}"]
        layer = Loops(**{k: int(row[k]) for k in ("N", "K", "C", "Yo", "Xo", "R", "S", "U")})
        nest = Nest.parse(row["loops"])
        found = energy(layer, moved(layer, nest, EYERISS, released=True), EYERISS)
        assert float(sum(found.values())) == pytest.approx(row["released_pJ"], rel=1e-12)
        assert latency(layer, nest, EYERISS, moved(layer, nest, EYERISS), released=True) == layer.macs

    def test_what_the_released_code_lets_through(self):
        """It compares numbers with bytes, and takes the array for one element."""
        refusals = []
        for _, row in table("nests").frame.filter(like="eyeriss", axis=0).iterrows():
            layer = Loops(**{k: int(row[k]) for k in ("N", "K", "C", "Yo", "Xo", "R", "S", "U")})
            try:
                check(layer, Nest.parse(row["loops"]), EYERISS)
            except CostError as error:
                refusals.append(str(error))
        assert len(refusals) == 4  # the file limits no port, so that no time but the arithmetic's is known
        assert {*EYERISS.port.values()} == {inf}
        assert "270 elements at once; eyeriss has 168" in refusals[0]
        assert all("sram0 of eyeriss holds 131072 bytes, but takes 140592" in r for r in refusals[1:])

    def test_every_shipped_nest_covers_its_layer_and_says_what_does_not_fit(self):
        """ShiDianNao's and i-FlatCam's, of which no figure of the authors' code is at hand."""
        said = {}
        for name, row in table("nests").frame.iterrows():
            layer, chip = Loops(**{k: int(row[k]) for k in ("N", "K", "C", "Yo", "Xo", "R", "S", "U")}), row["chip"]
            nest = Nest.parse(row["loops"])
            tiles = [nest.tiles(level) for level in LEVELS]
            assert all(prod(t.get(loop, 1) for t in tiles) >= getattr(layer, loop) for loop in RELEVANT["inputs"])
            try:
                check(layer, nest, Chip.read(chip))
                said[name] = "fits"
            except CostError as error:
                said[name] = str(error).partition(": ")[2]
        assert [said[f"shidiannao_alexnet_{i}"] for i in (3, 4, 5)] == ["fits"] * 3
        # conv1: (227 x 227 x 3 inputs of the tiles' 64 x 64 outputs, 263 on a side) and 96 x 363 weights, of 2 bytes
        assert 2 * (3 * 263 * 263 + 96 * 363) == 484_710
        assert said["shidiannao_alexnet_1"] == "sram0 of shidiannao holds 262144 bytes, but takes 484710"
        assert said["iflatcam_5"] == "320 elements at once; iflatcam has 256"

    def test_inputs_of_shidiannao_enter_once_and_go_on(self):
        """By hand, conv3: 13 x 13 elements, a window of 15 x 15 for 256 channels and each of 384 filters."""
        row, chip = table("nests").frame.loc["shidiannao_alexnet_3"], Chip.read("shidiannao")
        layer = Loops(**{k: int(row[k]) for k in ("N", "K", "C", "Yo", "Xo", "R", "S", "U")})
        found = moved(layer, Nest.parse(row["loops"]), chip)
        assert found["sram", "inputs"] == 2 * 384 * 256 * 15 * 15
        assert found["rf", "inputs"] == 2 * layer.macs
        assert found["forward", "inputs"] == found["rf", "inputs"] - found["sram", "inputs"]
        assert found["sram", "weights"] == 2 * layer.weights  # one read goes to all elements
        assert found["dram", "outputs"] == found["sram", "outputs"] == 2 * layer.outputs  # whole when they leave
        prices = energy(layer, found, chip)
        assert prices["forward", "inputs"] == pytest.approx(0.1 * found["forward", "inputs"])
        assert prices["dram", "weights"] == 100 * 2 * layer.weights

    @pytest.mark.parametrize(
        ("number", "arithmetic", "weights"),
        [(1, 1920, 960), (2, 3840, 3840), (3, 7680, 7680), (4, 15360, 15360), (5, 6144, 6144)],
    )
    def test_time_is_the_longest_of_arithmetic_and_transfers(self, number, arithmetic, weights):
        """i-FlatCam by hand: a byte of weights for each of 32 or 64 columns a cycle, and 64 bytes a cycle."""
        row, chip = table("nests").frame.loc[f"iflatcam_{number}"], Chip.read("iflatcam")
        layer = Loops(**{k: int(row[k]) for k in ("N", "K", "C", "Yo", "Xo", "R", "S", "U")})
        nest = Nest.parse(row["loops"])
        found = moved(layer, nest, chip)
        assert found["sram", "weights"] == 64 * weights
        assert latency(layer, nest, chip, found) == arithmetic
        for name, port, time in (("sram2", 16, 4 * weights), ("multicast", 8, 8 * weights), ("sram0", 1e9, arithmetic)):
            assert latency(layer, nest, replace(chip, port={name: port}), found) == max(time, arithmetic)
        slow = replace(chip, memory=dict.fromkeys(chip.memory, "sram0"), port={"sram0": 1})  # one port for all three
        assert latency(layer, nest, slow, found) == sum(found["sram", data] for data in RELEVANT)

    @pytest.mark.parametrize("seed", range(20))
    def test_loads_and_volumes_against_loops_that_run(self, seed):
        """Outside a memory's mark the loops run one by one, and a load is where other numbers are asked for."""
        rng = random.Random(seed)
        layer = Loops(K=4, C=4, Yo=4, Xo=4, R=2, S=2, U=rng.choice([1, 2]))
        bounds = {"K": 4, "C": 4, "Yo": 4, "Xo": 4}
        parts = {loop: [int(b) for b in rng.choice(splits(bound, 4))] for loop, bound in bounds.items()}
        levels = {}
        for i, level in enumerate(LEVELS):
            loops = [(loop, parts[loop][i]) for loop in bounds] + ([("R", 2), ("S", 2)] if level == "rf" else [])
            rng.shuffle(loops)
            for mark in ("*I", "*O", "*W") if level in ("sram", "rf") else ():
                loops.insert(rng.randint(0, len(loops)), (mark, 1))
            levels[level] = (*loops,)
        nest = Nest(levels)
        inner = [x for level in ("noc", "rf") for x in nest.tiles(level).items()]
        for data, relevant in RELEVANT.items():
            above, below = nest.split("sram", data)
            loads, held = 0, None
            for index in itertools.product(*(range(bound) for _, bound in above)):
                asked = tuple(i for i, (loop, _) in zip(index, above, strict=True) if loop in relevant)
                loads, held = loads + (asked != held), asked
            assert int(refreshes(above, data)) == loads
            touched = set()
            sizes = {loop: prod(b for name, b in below + inner if name == loop) for loop in (*bounds, "R", "S")}
            for k, c, y, x, r, s in itertools.product(*(range(sizes[loop]) for loop in (*bounds, "R", "S"))):
                pixel = (c, y * layer.U + r, x * layer.U + s)
                touched.add({"inputs": pixel, "outputs": (k, y, x), "weights": (k, c, r, s)}[data])
            whole = all(sizes[k] == 2 for k in ("R", "S"))
            if data != "inputs" or layer.U == 1 or (whole and layer.U <= 2):
                assert int(volume(layer, below + inner, data)) == len(touched)

    def test_a_window_that_slides_loads_each_pixel_of_a_row_once(self):
        layer = Loops(K=2, C=1, Yo=1, Xo=6, R=1, S=3, U=2)
        nest = Nest.parse("dram K2; sram *I *O *W K1; noc K1; rf Xo6 *I *W S3 C1 *O")
        row = 5 * 2 + 3
        assert moved(layer, nest, EYERISS)["rf", "inputs"] == 2 * row * 2  # for either filter, of 2 bytes
        apart = Nest.parse("dram K2; sram *I *O *W K1; noc K1; rf Xo6 S3 *I *W C1 *O")
        assert moved(layer, apart, EYERISS)["rf", "inputs"] == 2 * 6 * 3 * 2  # each place's taps one by one

    def test_neighbours_that_hand_inputs_on_spare_the_buffer_and_nothing_else(self):
        layer = Loops(K=4, C=3, Yo=8, Xo=8, R=3, S=3)
        nest = Nest.parse("dram K1; sram *W K4 *I Yo2 Xo2; noc Yo4 Xo4; rf *O C3 R3 S3")
        alone = moved(layer, nest, replace(EYERISS, forwards=()))
        together = moved(layer, nest, replace(EYERISS, forwards=("inputs",)))
        assert together["sram", "inputs"] == 2 * 4 * 4 * 3 * 6 * 6  # filters, tiles, channels, windows of 6 x 6
        assert together["sram", "inputs"] + together["forward", "inputs"] == together["rf", "inputs"]
        changed = {key for key in alone if alone[key] != together[key]}
        assert changed == {("sram", "inputs"), ("multicast", "inputs")}

    @pytest.mark.parametrize("dataflow", DATAFLOWS)
    def test_the_best_tiling_covers_fits_and_is_no_dearer_than_any(self, dataflow):
        layer = Loops(K=4, C=4, Yo=4, Xo=4, R=3, S=3)
        chip = replace(EYERISS, rows=4, columns=4, size={**EYERISS.size, "sram0": 2000})
        found = search(layer, dataflow, chip)
        text, best, count = DATAFLOWS[dataflow], inf, 0
        words = [w for level in text.split(";") for w in level.split()[1:] if not w.startswith("*")]
        ways = {loop: splits(getattr(layer, loop), words.count(loop)) for loop in dict.fromkeys(words)}
        for choice in itertools.product(*ways.values()):
            tile = {f"{loop}{i}": int(b) for loop, way in zip(ways, choice, strict=True) for i, b in enumerate(way)}
            nest = Nest.parse(text, tile)
            try:
                check(layer, nest, chip)
            except CostError:
                continue
            count += 1
            best = min(best, float(sum(energy(layer, moved(layer, nest, chip), chip).values())))
        assert (count, found["energy"].sum()) == (found["tilings"].iloc[0], pytest.approx(best, rel=1e-12))

    def test_refusals(self):
        with pytest.raises(CostError, match="tiles of C cover 3 of 6"):
            check(SMALL, Nest.parse("dram K8; sram C3; noc Yo4; rf Xo4 R3 S3"), EYERISS)
        with pytest.raises(CostError, match="'R3' at dram"):
            Nest.parse("dram R3; sram; noc; rf")
        with pytest.raises(CostError, match="'Q2' at rf"):
            Nest.parse("dram; sram; noc; rf Q2")
        with pytest.raises(CostError, match="levels dram, rf; expected dram, sram, noc, rf"):
            Nest.parse("dram K2; rf S5")
        with pytest.raises(CostError, match="dataflow = 'no local reuse': known are row stationary"):
            search(SMALL, "no local reuse", EYERISS)
        with pytest.raises(CostError, match="layer: row stationary tiles of N cover 1 of 4"):
            search(replace(SMALL, N=4), "row stationary", EYERISS)
        with pytest.raises(CostError, match="chip 'tpu': known are eyeriss, shidiannao"):
            Chip.read("tpu")
        with pytest.raises(CostError, match="unit energy dram = -1"):
            replace(EYERISS, energy={**EYERISS.energy, "dram": -1})
        tiny = replace(EYERISS, size={**EYERISS.size, "sram0": 1})
        with pytest.raises(CostError, match=r"no row stationary tiling fits eyeriss \(sram0 1 of at least \d+\)"):
            search(SMALL, "row stationary", tiny)
        with pytest.raises(CostError, match="eyeriss: port of dram = 0 bytes a cycle"):
            replace(EYERISS, port={"dram": 0})


def ticks(steps):
    """Cycle by cycle: in each, steps in their order take a component that is free, or go on with theirs."""
    left = {name: [list(use) for use in step.uses] for name, step in steps.items()}
    done, holds, cycle = set(), {}, 0
    while left:
        free = {component for step in steps.values() for component, _ in step.uses} - {*holds.values()}
        finished = []
        for name in [n for n in steps if n in left]:
            use = left[name][0]
            if holds.get(name) != use[0]:
                if use[0] not in free or not done.issuperset(steps[name].after):
                    continue
                free.discard(use[0])
                holds[name] = use[0]
            use[1] -= 1
            if not use[1]:
                finished.append(name)
        for name in finished:
            left[name].pop(0)
            del holds[name]
            if not left[name]:
                del left[name]
                done.add(name)
        cycle += 1
    return cycle


class TestPipelines:
    @pytest.mark.parametrize(
        ("size", "width", "time", "joules"),
        [(3, 1, 11, 4.05e-8), (6, 1, 20, 2.16e-7), (3, 2, 32, 2.88e-7), (8, 2, 82, 3.328e-6)],
    )
    def test_arrays_of_the_authors_logs(self, size, width, time, joules):
        """Half a watt for every component is what their library has in the place of power."""
        steps = systolic(size, width)
        watts = {component: 0.5 for step in steps.values() for component, _ in step.uses}
        found = fine(steps, watts, hertz=1e9)
        assert found.cycles == time == (3 * size + 2 if width == 1 else 10 * size + 2)
        assert found.joules == pytest.approx(joules, rel=1e-9)
        assert coarse(steps, watts, hertz=1e9).joules == pytest.approx(joules, rel=1e-9)

    @pytest.mark.parametrize("seed", range(30))
    def test_events_are_what_ticks_are(self, seed):
        rng = random.Random(seed)
        steps = {}
        for i in range(rng.randint(1, 12)):
            uses = [(rng.choice("abc"), rng.randint(1, 4)) for _ in range(rng.randint(1, 3))]
            uses = [u for k, u in enumerate(uses) if k == 0 or u[0] != uses[k - 1][0]]
            steps[str(i)] = Step((*uses,), (*(n for n in steps if rng.random() < 0.3),))
        watts = dict.fromkeys("abc", 1.0)
        found, path = fine(steps, watts, 1.0), coarse(steps, watts, 1.0)
        assert found.cycles == ticks(steps)
        assert max(path.cycles, *found.busy.values()) <= found.cycles
        assert found.joules == path.joules == sum(c for step in steps.values() for _, c in step.uses)

    def test_refusals(self):
        with pytest.raises(CostError, match="step a waits for 'b', which is not there"):
            fine({"a": Step((("x", 1),), ("b",))}, {"x": 1}, 1)
        with pytest.raises(CostError, match="steps wait for each other: "):
            coarse({"a": Step((("x", 1),), ("b",)), "b": Step((("x", 1),), ("a",))}, {"x": 1}, 1)
        with pytest.raises(CostError, match="power of x: -1 W"):
            fine({"a": Step((("x", 1),))}, {"x": -1}, 1)
        with pytest.raises(CostError, match="at least one component, for 1 cycle or more"):
            fine({"a": Step((("x", 0),))}, {"x": 1}, 1)
        with pytest.raises(CostError, match="size = 0"):
            systolic(0)
        with pytest.raises(CostError, match="port_bits = 0: more than 0 is allowed"):
            memory_cycles(10, 16, 0)
        with pytest.raises(CostError, match="burst = 0: more than 0 is allowed"):
            path_cycles(10, 16, 64, burst=0)
        with pytest.raises(CostError, match="numbers = -1: 0 or more is allowed"):
            memory_cycles(-1, 16, 64)

    def test_cycles_of_memories_and_paths_by_hand(self):
        """7 words of 16 bits through 32 bits take 4 turns; two chip cycles each, and 3 to begin."""
        assert memory_cycles(7, 16, 32, clocks=2, overhead=3) == 4 * 2 + 3
        assert path_cycles(7, 16, 32, burst=2, clocks=2, overhead=3) == 4 * 2 + 3 * 2  # two bursts of two turns
        assert path_cycles(7, 16, 32, burst=inf) == memory_cycles(7, 16, 32) == 4


CHIPS = [
    RowStationary(processors=p, buffer_words=b, weight_words=w)
    for p in (42, 84, 168)
    for b in (2048, 8192, 65536)
    for w in (48, 192)
]
LAYERS = [Loops(K=16, C=8, Yo=12, Xo=12, R=3, S=3), Loops(K=32, C=16, Yo=6, Xo=6, R=3, S=3, groups=2)]


class TestBuilder:
    def test_two_stages_find_what_one_finds(self):
        """With a margin for what stalls change the front is the same; without, fewer are simulated, none otherwise."""
        found = {margin: explore(CHIPS, LAYERS, margin=margin) for margin in (0, 0.1, inf)}
        points = {m: {*map(tuple, f[f["front"]][["energy", "cycles"]].to_numpy())} for m, f in found.items()}
        assert points[0.1] == points[inf]
        count = {m: (f["stage"] == "fine").sum() for m, f in found.items()}
        assert 0 < count[0] < count[inf] == 3 * len(CHIPS)
        fine = found[0].query("stage == 'fine'")
        assert fine["cycles"].tolist() == found[inf].loc[fine.index, "cycles"].tolist()

    def test_stalls_never_make_it_faster(self):
        found = explore(CHIPS, LAYERS, margin=inf, words_per_cycle=0.5)
        assert (found["cycles"] >= found["coarse_cycles"]).all()
        wide = explore(CHIPS, LAYERS, margin=inf, words_per_cycle=1e9)
        assert (wide["cycles"] <= found["cycles"]).all()

    def test_limits(self):
        areas = sorted({chip.area_mm2 for chip in CHIPS})
        found = explore(CHIPS, LAYERS, area_mm2=areas[8])
        assert found[found["front"]]["area_mm2"].max() <= areas[8]
        assert (found["stage"] == "area").sum() == sum(chip.area_mm2 > areas[8] for chip in CHIPS)
        with pytest.raises(CostError, match=r"none of 18 designs is within the limits: \{'area': 18\}"):
            explore(CHIPS, LAYERS, area_mm2=0.01)
        with pytest.raises(CostError, match="'cycles': "):
            explore(CHIPS, LAYERS, cycles=10)

    def test_limits_of_power_and_throughput_are_asked_of_what_was_simulated(self):
        """Against a look at every design with its stalls: the same front, and nothing in it beyond the limit."""
        whole = explore(CHIPS, LAYERS, margin=inf, words_per_cycle=0.5)
        whole["power"] = whole["energy"] / whole["cycles"]
        for name, limit in (("power", whole["power"].quantile(0.4)), ("cycles", whole["cycles"].quantile(0.4))):
            found = explore(CHIPS, LAYERS, margin=inf, words_per_cycle=0.5, **{name: limit})
            within = whole[whole[name] <= limit]
            expected = {
                (a.energy, a.cycles)
                for a in within.itertuples()
                if not ((within["energy"] <= a.energy) & (within["cycles"] < a.cycles)).any()
                and not ((within["energy"] < a.energy) & (within["cycles"] <= a.cycles)).any()
            }
            assert {*map(tuple, found[found["front"]][["energy", "cycles"]].to_numpy())} == expected
            assert (found["stage"] == name).sum() == (whole[name] > limit).sum() > 0
        with pytest.raises(CostError, match=r"none of 18 designs is within the limits: \{'power': 54\}"):
            explore(CHIPS, LAYERS, power=1e-3)

    def test_a_design_behind_another_counts_where_a_limit_takes_that_away(self, monkeypatch):
        """The first is ahead by the coarse times, and stalls beyond the limit; the second does not."""
        times = {42: (10.0, 20.0), 84: (11.0, 15.0), 168: (12.0, 16.0)}

        def judged(chip, layers, objective, words_per_cycle, finely):
            return float(chip.processors), times[chip.processors][finely]

        monkeypatch.setattr("lib.costs.digital.builder._judged", judged)
        chips = [RowStationary(processors=n) for n in times]
        free, held = (explore(chips, LAYERS, margin=0, cycles=limit) for limit in (inf, 17))
        assert free.loc[free["front"], "processors"].unique().tolist() == [42]
        assert held.loc[held["front"], "processors"].unique().tolist() == [84]
        assert held.groupby("processors")["stage"].first().tolist() == ["cycles", "fine", "coarse"]

    def test_ports_hold_up_what_is_simulated(self):
        """One tile by hand: a load, then the slowest of array, buffer and networks, then a store."""
        layer = Loops(K=64, C=64, Yo=8, Xo=8, R=3, S=3, Yi=8, Xi=8)
        t = {"K0": 16, "K1": 1, "K2": 4, "K3": 1, "C0": 2, "C1": 2, "C2": 16, "Yo1": 8, "Yo3": 1}
        load, store = (4096 + 36_864) // 4, 4096 // 4
        for chip, slowest in (
            (RowStationary(), 49_152),
            (RowStationary(buffer_port=2), 73_728),
            (RowStationary(network_port=1), 327_680),
        ):
            assert fine(tiles(layer, t, 4, chip=chip), PARTS, 1).cycles == load + slowest + store
        wide, narrow = (explore([RowStationary(buffer_port=n)], LAYERS)["cycles"].min() for n in (inf, 1))
        assert narrow > wide

    def test_refusals(self):
        with pytest.raises(CostError, match="0 designs and 2 layers"):
            explore([], LAYERS)
        with pytest.raises(CostError, match="18 designs and 0 layers"):
            explore(CHIPS, [])
        for wrong in ({"words_per_cycle": 0}, {"margin": -0.5}):
            with pytest.raises(CostError, match="above 0, and 0 or more, are allowed"):
                explore(CHIPS, LAYERS, **wrong)
        t = RowStationary().search(SMALL).to_dict()
        with pytest.raises(CostError, match="buffers = 0: 1 or more is allowed"):
            tiles(SMALL, t, 4, buffers=0)
        with pytest.raises(CostError, match="port_bits = 0: more than 0 is allowed"):
            tiles(SMALL, t, 0)

    def test_one_buffer_waits_where_two_overlap(self):
        best = RowStationary(buffer_words=1024).search(Loops(K=64, C=8, Yo=8, Xo=8, R=3, S=3), "energy").to_dict()
        assert best["K3"] * best["Yo3"] > 1
        layer = Loops(K=64, C=8, Yo=8, Xo=8, R=3, S=3)
        one, two = (fine(tiles(layer, best, 4, n), PARTS, 1).cycles for n in (1, 2))
        assert two < one


class TestStored:
    def test_weights_as_they_are_change_nothing(self):
        words = RowStationary().search(SMALL).to_dict()
        dense = accesses(SMALL, words)
        same = with_stored(dense, Stored(bits=16))
        assert {k: v for k, v in same.items() if k[0] != "rebuild"} == dense
        assert same["rebuild", "weights"] == 0

    def test_what_is_saved(self):
        dense = accesses(SMALL, RowStationary().search(SMALL).to_dict())
        found = with_stored(dense, Stored(bits=4, skipped=0.75, additions=3))
        assert found["dram", "weights"] == dense["dram", "weights"] / 4
        assert found["mac", "all"] == dense["mac", "all"] / 4
        assert found["rebuild", "weights"] == 3 * dense["network", "weights"] / 4
        assert all(found[k] == dense[k] for k in dense if k[0] in ("fill", "buffer") or k == ("dram", "inputs"))

    def test_an_index_and_a_narrow_weight_by_hand(self):
        dense = accesses(SMALL, RowStationary().search(SMALL).to_dict())
        found = with_stored(dense, Stored(bits=4, skipped=0.5, index=0.5))
        assert found["register", "index"] == dense["mac", "all"] / 4
        narrow = with_stored(dense, Stored(bits=4, narrow=True))
        for key in [("mac", "all"), ("network", "weights"), ("register", "weights"), ("dram", "weights")]:
            assert narrow[key] == dense[key] / 4
        assert all(narrow[k] == dense[k] for k in dense if k[1] in ("inputs", "sums"))

    @pytest.mark.parametrize(
        "wrong", [{"bits": -1}, {"bits": 4, "skipped": 1.0}, {"bits": 4, "additions": np.nan}, {"bits": 4, "index": -1}]
    )
    def test_refusals(self, wrong):
        with pytest.raises(CostError, match="allowed"):
            Stored(**wrong)


class TestChip:
    """What Eyeriss was measured to take, by the counts at the mappings that it used."""

    ROWS = table("eyeriss_chip").frame

    def layer(self, row):
        return Loops(**{k: int(row[k]) for k in ("N", "K", "C", "Yo", "Xo", "R", "S", "U")})

    def test_transcribed_columns_add_up_to_the_printed_totals(self):
        sums = self.ROWS.groupby("network")[["total_ms", "processing_ms", "buffer_MB", "dram_MB"]].sum()
        assert sums.loc["alexnet"].to_numpy() == pytest.approx([115.3, 103.5, 208.5, 15.4], abs=0.11)
        assert sums.loc["vgg16"].to_numpy() == pytest.approx([4309.5, 3755.2, 11035.8, 321.1], abs=0.21)

    def test_mappings_cover_their_layers_take_the_printed_elements_and_fit(self):
        for _, row in self.ROWS[self.ROWS["network"] == "alexnet"].iterrows():
            layer, t = (
                self.layer(row),
                {k: int(row[k]) for k in ("K0", "K1", "K2", "K3", "C0", "C1", "C2", "Yo1", "Yo3")},
            )
            RowStationary().check(layer, t)
            assert RowStationary().needs(layer, t)["processors"][0] == row["active"]

    def test_macs_are_those_of_vgg16(self):
        layers = Loops.of(loop_bounds(models.build("vgg16", (3, 224, 224), 10), (3, 224, 224)))
        ours = [self.layer(row).macs for _, row in self.ROWS[self.ROWS["network"] == "vgg16"].iterrows()]
        assert ours == [3 * layer.macs for layer in layers if layer.R == 3]


class TestBill:
    NET = models.build("lenet5", (1, 28, 28), 10)
    LAYERS = Loops.of(loop_bounds(NET, (1, 28, 28)))

    @pytest.mark.parametrize("design", [designs.Isaac(), designs.Forms(), designs.Timely()], ids=lambda d: d.name)
    def test_arrays_add_up_to_what_the_design_says(self, design):
        tiles = crossbar.occupied(self.NET, (1, 28, 28), design.array)
        bill, summary = crossbar_bill(design, tiles), design.summary(tiles)
        assert bill["energy_pJ"].sum() / 1000 == pytest.approx(summary["energy_nJ"])
        assert bill["area_mm2"].sum() == pytest.approx(summary["area_mm2"])
        assert bill["cycles"].sum() * design.read_ns / 1000 == pytest.approx(summary["latency_us"])

    def test_a_design_without_prices_is_refused(self):
        with pytest.raises(CostError, match="PRIME prints no absolute energy"):
            crossbar_bill(designs.Prime(), crossbar.occupied(self.NET, (1, 28, 28), designs.Prime().array))

    def test_a_digital_chip_adds_up_to_its_own_bill(self):
        chip = RowStationary()
        bill, own = digital_bill(chip, self.LAYERS), chip.bill(self.LAYERS)
        assert bill["energy_pJ"].sum() == pytest.approx(own["energy"].sum())
        assert bill["cycles"].sum() == own.groupby("layer")["cycles"].first().sum()
        assert bill["area_mm2"].sum() == chip.area_mm2

    def test_products_that_are_skipped_take_no_time_and_no_arithmetic(self):
        dense, kept = (digital_bill(RowStationary(), self.LAYERS, s) for s in ({}, {"fc1": Stored(4, skipped=0.75)}))
        one, other = (b[b["layer"] == "fc1"].set_index("component") for b in (dense, kept))
        assert other.loc["time", "cycles"] == one.loc["time", "cycles"] / 4
        assert other.loc["mac", "energy_pJ"] == one.loc["mac", "energy_pJ"] / 4
        with pytest.raises(CostError, match="no layer fc9; there are conv1, conv2, fc1, fc2"):
            digital_bill(RowStationary(), self.LAYERS, {"fc9": Stored(8)})

    def test_products_that_are_skipped_do_not_widen_the_buffers_port(self):
        """fc1 computes 800 x 500 products; at a word a cycle its inputs and sums pass the buffer first."""
        chip = RowStationary(buffer_port=0.01)
        dense, kept = (digital_bill(chip, self.LAYERS, s) for s in ({}, {"fc1": Stored(16, skipped=0.75)}))
        one, other = (b.loc[(b["layer"] == "fc1") & (b["component"] == "time"), "cycles"].item() for b in (dense, kept))
        assert one == other
        words = accesses(self.LAYERS[2], chip.search(self.LAYERS[2]).to_dict())
        assert one == pytest.approx(100 * sum(n for (level, _), n in words.items() if level in ("buffer", "fill")))

    def test_a_layer_used_twice_takes_both_uses(self):
        twice = [Loops(K=8, C=8, Yo=n, Xo=n, R=3, S=3, Yi=n, Xi=n, layer="conv") for n in (16, 4)]
        apart = [replace(use, layer=name) for use, name in zip(twice, "ab", strict=True)]
        for column in ("cycles", "energy_pJ"):
            sums = [digital_bill(RowStationary(), layers)[column].sum() for layers in (twice, apart)]
            assert sums[0] == pytest.approx(sums[1])
        spent = [("conv", "forward", 32, 32, sum(use.macs for use in twice))]
        spent = pd.DataFrame(spent, columns=["layer", "product", "bits_a", "bits_b", "macs"])
        for layers in (twice, twice[::-1]):  # 4 bytes at 100 pJ: inputs and outputs of 8 channels, 576 weights a use
            dram = training_bill(spent, layers).set_index("component")["energy_pJ"]["forward, DRAM"]
            assert dram == 400 * (2 * 8 * (16**2 + 4**2) + 2 * 576)

    def test_training_by_hand(self):
        layer = Loops(K=3, C=2, Yo=4, Xo=4, R=3, S=3, Yi=4, Xi=4, groups=2, layer="conv")
        macs = 10 * layer.groups * layer.macs
        spent = [("conv", p, a, b, macs) for p, a, b in (("forward", 8, 8), ("weight_gradient", 16, 8))]
        spent = pd.DataFrame(spent, columns=["layer", "product", "bits_a", "bits_b", "macs"])
        bill = training_bill(spent, [layer], batch=5).groupby("component")["energy_pJ"].sum()
        x, w, y = 2 * 16, 3 * 2 * 9 / 5, 3 * 16
        assert bill["forward, DRAM"] == pytest.approx(10 * 2 * 100 * (x + w + y))
        assert bill["weight gradient, DRAM"] == pytest.approx(10 * 2 * 100 * (2 * x + y + 2 * w))
        arithmetic = bill[[c for c in bill.index if c.endswith("arithmetic")]].sum()
        assert arithmetic == pytest.approx(1e12 * training_energy(spent)["energy_J"].sum())
        sign = [("conv", "weight_sign", 4, 16, macs), ("conv", "weight_gradient", 8, 16, macs / 4)]
        bill = training_bill(pd.DataFrame(sign, columns=spent.columns), [layer], batch=5)
        bill = bill.groupby("component")["energy_pJ"].sum()
        assert bill["weight sign, DRAM"] == pytest.approx(10 * 2 * 100 * (x / 2 + 2 * y + 2 * w))
        assert bill["weight gradient, DRAM"] == pytest.approx(10 * 2 * 100 * x / 2 / 4)  # half a byte of a quarter
        mixed = pd.DataFrame([*sign, ("conv", "weight_gradient", 32, 32, macs)], columns=spent.columns)
        with pytest.raises(CostError, match="conv had signs of gradients and gradients of several widths"):
            training_bill(mixed, [layer])
        with pytest.raises(CostError, match="no layer conv; there are fc"):
            training_bill(spent, [replace(layer, layer="fc")])
        with pytest.raises(CostError, match="batch = 0"):
            training_bill(spent, [layer], batch=0)


class Bits:
    """Arithmetic bit by bit, which counts: numbers are lists of bits, the lowest first."""

    def __init__(self):
        self.count = Counter()

    def add(self, a, b, carry=0):
        found = []
        for x, y in zip(a, b, strict=True):
            self.count["full_additions"] += 1
            found.append(x ^ y ^ carry)
            carry = (x & y) | (carry & (x ^ y))
        return found, carry

    def subtract(self, a, b):
        return self.add(a, [1 - y for y in b], 1)

    def choose(self, which, a, b):
        self.count["choices"] += len(a)
        return [*(a if which else b)]

    def gate(self, value):
        self.count["gates"] += 1
        return value

    def any(self, bits):
        found = bits[0]
        for bit in bits[1:]:
            found = self.gate(found | bit)
        return found


def bits_of(value, count):
    return [value >> i & 1 for i in range(count)]


def number(bits):
    return sum(bit << i for i, bit in enumerate(bits))


def add_floats(machine, a, b, exponent, fraction):
    """Signs, exponents and fractions of two numbers to those of their sum, by the steps that `float_steps` counts."""
    p = fraction + 1
    stages = (p - 1).bit_length()
    words = [[*bits_of(f, fraction), *bits_of(e, exponent), s] for s, e, f in (a, b)]
    _, first = machine.subtract(words[0][:-1], words[1][:-1])
    large, small = machine.choose(first, *words), machine.choose(first, *words[::-1])
    (x, e, sign), (y, f, other) = (([*w[:fraction], 1], w[fraction:-1], w[-1]) for w in (large, small))
    apart, _ = machine.subtract(e, f)
    for k in range(stages):
        y = machine.choose(apart[k], [*y[2**k :], *[0] * min(2**k, p)], y)
    if apart[stages:]:
        y = machine.choose(machine.any(apart[stages:]), [0] * p, y)
    unlike = machine.gate(sign ^ other)
    z, carry = machine.add(x, [machine.gate(bit ^ unlike) for bit in y], unlike)
    over = machine.gate(carry & (1 - unlike))
    z = machine.choose(over, [*z[1:], over], z)
    e, _ = machine.add(e, [over, *[0] * (exponent - 1)])
    shift = []
    for k in reversed(range(stages)):
        none = 1 - machine.any(z[-(2**k) :])
        z = machine.choose(none, [*[0] * 2**k, *z[: -(2**k)]], z)
        shift.insert(0, none)
    e, _ = machine.subtract(e, [*shift, *[0] * (exponent - stages)])
    return sign, number(e), number(z[:-1])


def multiply_floats(machine, a, b, exponent, fraction):
    (s, e, f), (t, g, h) = a, b
    x, y = ([*bits_of(v, fraction), 1] for v in (f, h))
    sign = machine.gate(s ^ t)
    power, _ = machine.add(bits_of(e, exponent), bits_of(g, exponent))
    power, _ = machine.subtract(power, bits_of(2 ** (exponent - 1) - 1, exponent))
    rows = [[machine.gate(bit & other) for bit in x] for other in y]
    total, low = [*rows[0], 0], []
    for row in rows[1:]:
        low.append(total[0])
        part, carry = machine.add(total[1:], row)
        total = [*part, carry]
    top = total[-1]
    z = machine.choose(top, total[1:], total[:-1])
    power, _ = machine.add(power, [top, *[0] * (exponent - 1)])
    return sign, number(power), number(z[:-1])


class TestBitSerial:
    @pytest.mark.parametrize("name", FLOATS)
    def test_steps_are_those_of_a_machine_that_computes(self, name):
        """Results within a unit in the last place (two for sums that cancel) of the exact ones; the count is exact."""
        (exponent, fraction), rng = FLOATS[name], random.Random(0)
        bias, steps = 2 ** (exponent - 1) - 1, float_steps(*FLOATS[name])

        def value(word):
            return (-1.0) ** word[0] * 2.0 ** (word[1] - bias) * (1 + word[2] / 2**fraction)

        for kind, compute in (("addition", add_floats), ("multiplication", multiply_floats)):
            for _ in range(60):
                a, b = ((rng.randint(0, 1), bias + rng.randint(-3, 3), rng.getrandbits(fraction)) for _ in range(2))
                exact = value(a) + value(b) if kind == "addition" else value(a) * value(b)
                if exact == 0:
                    continue
                machine = Bits()
                found = value(compute(machine, a, b, exponent, fraction))
                scale = max(abs(exact), abs(value(a)), abs(value(b))) if kind == "addition" else abs(exact)
                assert abs(found - exact) <= 2.0 ** (1 - fraction) * scale
                assert dict(machine.count) == steps.loc[kind].drop("steps").to_dict()

    def test_steps_by_hand(self):
        """bfloat16: 8 bits of exponent, p = 8, three stages; 8 x 7 full additions of partial products."""
        steps = float_steps(8, 7)
        assert steps.loc["multiplication"].tolist() == [3 * 8 + 8 * 7, 8, 1 + 64, 80 + 8 + 65]
        assert steps.loc["addition", "full_additions"] == 15 + 8 + 8 + 16
        assert steps.loc["addition", "choices"] == 2 * 16 + 8 * (3 + 1) + 8 + 8 * 3
        assert steps.loc["addition", "gates"] == 4 + 1 + 8 + 1 + (0 + 1 + 3)
        with pytest.raises(CostError, match="exponent = 2, fraction = 23"):
            float_steps(2, 23)

    def test_columns_of_what_is_left(self):
        net = nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))
        whole = bitwise(layer_shapes(net, (256,)), 4)
        assert bitwise_left(net, (256,), 4).equals(whole)
        net[0].weight.data[:24] = 0.0
        net[0].weight.data[:, :64] = 0.0
        left = bitwise_left(net, (256,), 4)
        assert left.loc[0, ["columns", "bit_operations"]].tolist() == [8 * 4, 8 * 192 * 4 * 8]
        assert (left["columns"] + left["columns_off"]).equals(whole["columns"] + whole["columns_off"])
