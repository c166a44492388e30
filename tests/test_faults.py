"""Chips, devices, closed forms, trials and training under faults."""

import os
import signal
import subprocess
import sys
from collections import OrderedDict
from copy import deepcopy
from dataclasses import make_dataclass, replace
from functools import partial
from math import exp, log, sqrt

import numpy as np
import pytest
import torch
from torch import nn

from lib import data, models, pruning, recipes, shapes, training
from lib.constraint import attach_masks, leaf, masks, state_of
from lib.crossbar import CrossbarError, Mapping
from lib.crossbar.devices import disturbed
from lib.faults import (
    Device,
    InSlice,
    PhaseChange,
    PowerLaw,
    Published,
    ReadNoise,
    Relaxation,
    StuckAt,
    UnderFaults,
    Variation,
    moments,
    on_chip,
    read_back,
    sweep,
    tolerated_rate,
)
from lib.faults import trials as trials_module
from lib.faults.chips import events, failures, time_of
from lib.faults.journal import Journal

WHERE = ("cells", "rows", "columns", "clusters")
SHAPE = torch.Size((1, 2, 200, 300))


# --- chips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("rate", [0.002, 0.05, 0.5])
def test_every_pattern_breaks_the_same_share_of_cells(where, rate):
    faults, mapping = StuckAt(rate, where=where), Mapping()
    shape = torch.Size((1, 2, 50, 100) if where == "clusters" else (1, 2, 100, 200))
    draws = [faults.draw(shape, mapping, chip, "fc1") for chip in range(30)]
    shares = np.array([len(index) for index, _ in draws]) / shape.numel()
    assert all(len(np.unique(index)) == len(index) for index, _ in draws)
    assert abs(shares.mean() - rate) < 4 * shares.std(ddof=1) / sqrt(len(shares))
    on = np.array([is_on.mean() if len(is_on) else np.nan for _, is_on in draws])
    assert abs(np.nanmean(on) - 5.2 / 6.2) < 4 * np.nanstd(on) / sqrt(np.isfinite(on).sum()) + 1e-3


@pytest.mark.parametrize("where", WHERE)
def test_faults_at_a_low_rate_are_among_those_at_a_higher_one(where):
    before: dict[int, bool] = {}
    for rate in (1e-4, 0.003, 0.01, 0.08, 0.4, 0.8):
        index, on = StuckAt(rate, where=where).draw(SHAPE, Mapping(), 3, "fc1")
        now = dict(zip(index.tolist(), on.tolist(), strict=True))
        assert all(now[i] == was for i, was in before.items())
        before = now
    assert len(before) > 0.7 * SHAPE.numel()


def test_all_cells_fail_at_rate_one_and_none_at_zero():
    assert len(StuckAt(1.0).draw(SHAPE, Mapping(), 0, "a")[0]) == SHAPE.numel()
    assert len(StuckAt(0.0).draw(SHAPE, Mapping(), 0, "a")[0]) == 0


def test_mappings_share_a_chip():
    faults = StuckAt(0.05)
    index, on = faults.draw(SHAPE, Mapping("two_column"), 1, "fc1")
    assert [v.tolist() for v in faults.draw(SHAPE, Mapping("differential"), 1, "fc1")] == [index.tolist(), on.tolist()]
    single = faults.draw(torch.Size((1, 1, 200, 300)), Mapping("offset"), 1, "fc1")
    first = index < 200 * 300  # the first column of the pair
    assert single[0].tolist() == index[first].tolist()
    assert single[1].tolist() == on[first].tolist()


def test_chips_and_layers_differ_and_repeat():
    faults = StuckAt(0.01)
    draw = lambda chip, layer: faults.draw(SHAPE, Mapping(), chip, layer)[0].tolist()  # noqa: E731
    assert draw(0, "a") == draw(0, "a")
    assert draw(0, "a") != draw(1, "a")
    assert draw(0, "a") != draw(0, "b")


def test_failure_times_are_exponential():
    for until in (0.2, 1.7):
        count = np.mean([len(failures(20000, until, chip, "x")[0]) for chip in range(20)]) / 20000
        assert count == pytest.approx(1 - exp(-until), abs=4 * sqrt(0.25 / 400000))
    places, _ = events(1000, 2.0, 0.3, 0, "x")
    assert len(places) == pytest.approx(600, abs=5 * sqrt(600))
    assert time_of(0.1) == pytest.approx(-log(0.9))


def test_lines_are_whole_segments_of_an_array():
    mapping, shape = Mapping("two_column"), torch.Size((1, 2, 40, 300))
    for where, length in (("columns", 128), ("rows", 80)):  # 300 inputs are segments of 128, 128, 44; 80 cells a row
        index, on = StuckAt(0.1, where=where).draw(shape, mapping, 0, "fc")
        broken = np.zeros(shape.numel())
        broken[index] = np.where(on, 1, -1)
        place = np.array([[mapping.index(r, c, shape[2:]) for c in range(80)] for r in range(300)])
        plane = broken[place]
        lines = plane[:128].T if where == "columns" else plane
        assert {abs(int(s)) for s in lines.sum(1)} == {0, length}


def test_faults_in_one_slice_leave_the_others():
    mapping = Mapping("differential", 9, 2)
    cells = mapping.encode(torch.rand(20, 30), 1.0)
    broken = InSlice(StuckAt(0.3), 2).disturb(cells.clone(), mapping, 0, "fc")
    changed = (broken != cells).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False]
    both = InSlice((StuckAt(0.3), StuckAt(1.0, ratio=0)), 2).disturb(cells.clone(), mapping, 0, "fc")
    assert (both[2] == mapping.g_min).all()
    assert torch.equal(both[:2], cells[:2])
    with pytest.raises(CrossbarError, match="slices 0 to 3"):
        InSlice(StuckAt(0.3), 4).disturb(cells, mapping, 0, "fc")


def test_clusters_are_clustered():
    def neighbours(where):
        index, _ = StuckAt(0.02, where=where).draw(torch.Size((1, 1, 200, 300)), Mapping("offset"), 0, "fc")
        plane = np.zeros(200 * 300, bool)
        plane[index] = True
        plane = plane.reshape(200, 300)
        return (plane[:, 1:] & plane[:, :-1]).sum() / plane.sum()

    assert neighbours("clusters") > 10 * neighbours("cells")


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_table():
    """By hand at 9.04 % and 1.75 %."""
    table = {
        0.0: ((0.0729, 0.1079), (0, 0.16446), (0, 0.03439)),
        0.1: ((0.0621, 0.0944), (-0.0108, 0.1494), (-0.0108, 0.0323)),
        0.5: ((0.0190, 0.0620), (-0.0540, 0.1108), (-0.0540, 0.0458)),
        1.0: ((-0.0350, 0.0700), (-0.1079, 0.1111), (-0.1079, 0.1111)),
    }
    faults = StuckAt.of(on=0.0904, off=0.0175)
    for w, expected in table.items():
        for scheme, (mean, square) in zip(("offset", "two_column", "differential"), expected, strict=True):
            found = moments(torch.tensor([w]), Mapping(scheme), faults)
            assert float(found[0]) == pytest.approx(mean, abs=6e-5)
            assert float(found[1]) == pytest.approx(square, abs=6e-5)


@pytest.mark.parametrize(
    "mapping",
    [
        Mapping("offset"), Mapping("two_column"), Mapping("differential"), Mapping("differential", 8, 2),
        Mapping("offset", 8, 2), Mapping("two_column", 8, 2, on_off=15.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("w", [0.0, 0.3, -0.8])
def test_moments_agree_with_injected_cells(mapping, w):
    """Half a million draws or more, 3 %."""
    faults = StuckAt(0.1, stuck_on_value=1.5)
    weight = torch.full((700, 700), w)
    if mapping.weight_bits:
        weight = (weight * 127).round() / 127
    errors = []
    for chip in range(1 if not mapping.weight_bits else 3):
        cells = faults.disturb(mapping.encode(weight, 1.0), mapping, chip, "fc")
        errors.append(mapping.decode(cells, 1.0) - weight)
    error = torch.cat(errors).double()
    mean, square = (float(v) for v in moments(weight[:1, :1], mapping, faults))
    assert float(error.square().mean()) == pytest.approx(square, rel=0.03)
    assert float(error.mean()) == pytest.approx(mean, abs=4 * sqrt(square / error.numel()))


def test_a_zero_weight_errs_by_the_ratio_of_the_probabilities():
    faults = StuckAt(0.001)
    square = [float(moments(torch.zeros(1), Mapping(s), faults)[1]) for s in ("two_column", "differential")]
    assert square[0] / square[1] == pytest.approx(5.2, rel=2e-3)


# --- variation --------------------------------------------------------------------------------------------------------


def _disturbed(device, level, mapping=None, n=400_000):
    return device.disturb(torch.full((1, 2, 1, n), level), mapping or Mapping(), 0, "x").double()


@pytest.mark.parametrize("sigma", [0.1, 0.4])
def test_lognormal_moments(sigma):
    """The mean is exp(sigma^2/2), the relative deviation sqrt(exp(sigma^2) - 1)."""
    free, corrected = (_disturbed(Variation(sigma, mean_corrected=c), 0.5) / 0.5 for c in (False, True))
    assert float(free.mean()) == pytest.approx(exp(sigma**2 / 2), rel=3e-3)
    assert float(corrected.mean()) == pytest.approx(1, rel=3e-3)
    assert float(corrected.std()) == pytest.approx(sqrt(exp(sigma**2) - 1), rel=0.01)


def test_gaussian_scales_with_the_state_and_additive_does_not():
    assert float(_disturbed(Variation(0.1, "gaussian"), 0.5).std()) == pytest.approx(0.05, rel=0.01)
    assert [float(_disturbed(Variation(0.05, "additive"), g).std()) for g in (0.3, 0.9)] == pytest.approx(
        [0.05, 0.05], rel=0.01
    )


def test_published_deviations():
    """Check values of the published polynomials."""
    half = torch.tensor([0.5])
    names = ("wan_1s_quartic", "wan_1day_quartic", "wan_2days_quartic")
    assert [float(Published(n).sigma(half)) * 40 for n in names] == pytest.approx([2.023, 3.909, 3.929], abs=1e-3)
    assert float(Published("milo_hfo2").sigma(torch.tensor([100 / 225]))) * 225 == pytest.approx(3.871621, abs=1e-4)
    with pytest.raises(CrossbarError, match="'pcm' is unknown: allowed are milo_hfo2"):
        Published("pcm")


def test_drift():
    assert float(_disturbed(PowerLaw(100, 0.05), 0.5).mean()) == pytest.approx(0.5 * 100**-0.05, rel=1e-5)
    assert float(_disturbed(PowerLaw(1e9, 0.1, "on"), 0.5).max()) == 1
    assert float(_disturbed(PowerLaw(1e9, 0.9), 0.5, Mapping(on_off=10.0)).min()) == pytest.approx(0.1)
    later, soon = (float(_disturbed(PhaseChange(t), 0.8).mean()) for t in (1e6, 20.0))
    assert soon == pytest.approx(0.8, rel=0.01)
    assert later == pytest.approx(0.8 * (1e6 / 20) ** -0.049, rel=0.02)  # nu is clipped from below at 0.049
    moved = _disturbed(Relaxation(1000, 90.0), 0.5) * 90
    assert float(moved.mean()) == pytest.approx(45 - 0.0890 * log(1000), abs=0.01)
    assert float(moved.std()) == pytest.approx(0.0420 * log(1000) + 0.4118, rel=0.01)


def test_read_noise_is_that_of_independent_reads():
    """Against drawing every cell anew for every read."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(2, 1, 3), torch.rand(1, 2, 3, 3)
    mapping, sigma = Mapping("differential", 4, 1, on_off=10.0), 0.03
    gain = mapping.noise_gain(mapping.range_of(layer.weight))
    hook = trials_module._add_noise(layer, float(sigma * gain), torch.Generator().manual_seed(0))
    with torch.no_grad():
        fast = layer(x.expand(20_000, -1, -1, -1)).flatten()
        hook.remove()
        scale = mapping.range_of(layer.weight)
        cells = mapping.encode(layer.weight, scale)
        reads = torch.stack([mapping.decode(cells + sigma * torch.randn_like(cells), scale) for _ in range(4000)])
        slow = (reads * x).sum((1, 2, 3, 4)) + layer.bias
        steady = (mapping.decode(cells, scale) * x).sum() + layer.bias
    assert float(fast.std()) == pytest.approx(float(slow.std()), rel=0.05)
    assert float(slow.mean()) == pytest.approx(float(steady), abs=5 * float(slow.std()) / sqrt(4000))


def test_reads_of_a_layer_that_is_never_called_are_refused(images, bypassed):
    with pytest.raises(CrossbarError, match="fc: its weight is used, but not by its forward"):
        sweep(bypassed, "two_column", [0.1], 1, images.test, faults=ReadNoise)
    assert len(sweep(bypassed, {"unused": "two_column"}, [0.1], 1, images.test, faults=ReadNoise)) == 1


def test_read_noise_is_new_for_every_chip_and_the_same_for_the_same(trained, images):
    found = sweep(trained, "differential", [0.0, 0.05], [0, 1], images.test, faults=ReadNoise)["accuracy"]
    os.environ["CACHE_ROOT"] += "-other"
    assert sweep(trained, "differential", [0.0, 0.05], [0, 1], images.test, faults=ReadNoise)["accuracy"].equals(found)
    assert found[0] == found[1]
    assert found[2] != found[3]


def test_read_noise_of_halves_is_that_of_the_wide_network():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(50, 10)), 600 * torch.rand(200, 50)
    for dtype in (torch.float32, torch.float16):  # squares of inputs are beyond what halves hold
        narrow, seen = deepcopy(net).to(dtype), x.to(dtype)
        own = data.Split(seen, narrow(seen).argmax(1))
        assert trials_module._Bench(narrow, "two_column", own, 100).trial(ReadNoise(0.0), 0) == 1.0


# --- several devices --------------------------------------------------------------------------------------------------


def test_defects_of_two_devices_are_two_populations():
    """In all cells or in those of a slice; the later defect is the one that is seen."""
    on, off = StuckAt.of(on=0.3, off=0), StuckAt.of(on=0, off=0.4)
    for pair in ((on, off), (InSlice(on, 0), off), (on, InSlice(off, 0)), (InSlice((on, off), 0),)):
        cells = disturbed(torch.full(SHAPE, 0.5), pair, Mapping(), 0, "fc")
        shares = [float((cells == g).float().mean()) for g in (0.0, 1.0)]
        assert shares == pytest.approx([0.4, 0.3 * 0.6], abs=4 * sqrt(0.25 / SHAPE.numel()))


def test_what_several_devices_draw_is_independent():
    kinds = Variation(0.05), Published("milo_hfo2"), PowerLaw(2, 0.05, "random"), PhaseChange(60), Relaxation(1000, 90)
    half = torch.full((1, 2, 100, 100), 0.5)
    for one in kinds:
        alone = disturbed(half.clone(), one, Mapping(), 0, "fc")
        for other in kinds:
            both = disturbed(half.clone(), (one, other), Mapping(), 0, "fc")
            together = float(torch.corrcoef(torch.stack([alone, both - alone]).flatten(1))[0, 1])
            assert abs(together) < 0.1, (one, other)  # some move a cell by its state; of equal numbers it is 0.7 to 1
    seen = disturbed(half.clone(), (Variation(0.2), StuckAt(0.1)), Mapping(), 0, "fc")  # of one kind each: as alone
    by_hand = StuckAt(0.1).disturb(Variation(0.2).disturb(half, Mapping(), 0, "fc"), Mapping(), 0, "fc")
    assert torch.equal(seen, by_hand)


def test_noise_of_two_reads_is_independent():
    net = nn.Sequential(nn.Linear(4, 2000, bias=False))
    bench = trials_module._Bench(net, "two_column", data.Split(torch.ones(1, 4), torch.zeros(1).long()), 1)
    steady, noises = bench.model(torch.ones(1, 4)), []
    for before in (0, 1):
        (hook,) = bench._read_noise(ReadNoise(0.1), 0, before)
        noises.append((bench.model(torch.ones(1, 4)) - steady)[0])
        hook.remove()
    assert abs(float(torch.corrcoef(torch.stack(noises))[0, 1])) < 5 / sqrt(2000)


# --- trials -----------------------------------------------------------------------------------------------------------


def perceptron(seed=1):
    torch.manual_seed(seed)
    layers = {"flat": nn.Flatten(), "fc1": nn.Linear(784, 32), "relu1": nn.ReLU(), "fc2": nn.Linear(32, 24)}
    return nn.Sequential(OrderedDict(layers | {"relu2": nn.ReLU(), "fc3": nn.Linear(24, 10)}))


@pytest.fixture(scope="module")
def trained(images):
    """A small network that has learned something real."""
    net = perceptron()
    training.fit(net, images, epochs=4, lr=0.05, batch_size=32)
    return net


def test_a_sweep_is_what_one_would_measure_by_hand(trained, images):
    found = sweep(trained, "two_column", [0.0, 0.02], 2, images.test)
    assert found.columns.tolist() == ["rate", "chip", "accuracy"]
    assert found["chip"].tolist() == [0, 1, 0, 1]
    for row in found.itertuples():
        net = on_chip(trained, "two_column", StuckAt(row.rate), row.chip)
        assert row.accuracy == training.evaluate(net, images.test)
    assert found["accuracy"][0] == pytest.approx(training.evaluate(trained, images.test), abs=0.004)


def test_faults_hurt_and_the_differential_mapping_hurts_less(trained, images):
    mean = {s: sweep(trained, s, [0.03], 6, images.test)["accuracy"].mean() for s in ("two_column", "differential")}
    reverse = partial(StuckAt, ratio=1 / 5.2)
    swapped = {
        s: sweep(trained, s, [0.03], 6, images.test, faults=reverse)["accuracy"].mean()
        for s in ("two_column", "differential")
    }
    assert mean["differential"] > mean["two_column"]
    assert swapped["two_column"] > swapped["differential"]


def test_compressed_models_of_any_kind_go_in(trained, images):
    net = deepcopy(trained)
    attach_masks(net, recipes.one_shot(net, {"fc1": pruning.Unstructured(0.9), "fc2": pruning.Column(0.5)}))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    mapping = {"fc1": Mapping("differential", 4, 2), "fc2": "offset"}  # fc3 stays digital
    assert len(sweep(net, mapping, [0.01], 1, images.test)) == 1
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert set(masks(net)) == {"fc1", "fc2"}


def test_batch_norm_and_biases_stay_healthy(images):
    net = models.build("resnet8", images.shape, images.classes)
    broken = on_chip(net, "offset", StuckAt(0.3), 0)
    weights = {f"{n}.weight" for n in shapes.prunable(net)}
    for name, value in net.state_dict().items():
        assert torch.equal(value, broken.state_dict()[name]) == (name not in weights)


def test_processes_and_side_by_side_give_the_same_numbers(trained, images):
    tasks = [(StuckAt(rate), chip) for rate in (0.01, 0.05) for chip in range(4)]
    for dtype in (torch.float32, torch.bfloat16):
        bench = trials_module._Bench(deepcopy(trained).to(dtype), "differential", images.test, 200)
        alone, both = ({(d, c): a for d, c, a in trials_module._run(bench, tasks, n)} for n in (1, 2))
        assert both == alone
        found = bench.together(StuckAt(0.05), range(4))
        assert bench.side_by_side
        assert found == pytest.approx([alone[task] for task in tasks[4:]], abs=4 * torch.finfo(dtype).eps + 0.0021)


class Allocates(nn.Module):
    """Writes into an output that is there before."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        out = torch.empty(len(x), 4)
        out[:] = self.fc(x.flatten(1))
        return out


class Asks(Allocates):
    """Goes on as the values are."""

    def forward(self, x):
        x = self.fc(x.flatten(1))
        return x if x.sum() > 0 else -x


class Remembers(nn.Module):
    """Reads an image row by row."""

    def __init__(self):
        super().__init__()
        self.rows, self.lstm, self.fc = nn.Linear(2, 3), nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.lstm(self.rows(x[:, 0]))[0][:, -1])


@pytest.mark.parametrize("kind", [Allocates, Asks, Remembers])
def test_what_cannot_run_side_by_side_runs_chip_by_chip(kind):
    torch.manual_seed(0)
    net, split = kind(), data.Split(torch.randn(60, 1, 2, 2), torch.arange(60) % 4)
    bench = trials_module._Bench(net, dict.fromkeys(shapes.prunable(net), "two_column"), split, 20)
    alone = [bench.trial(StuckAt(0.3), chip) for chip in range(8)]
    assert bench.together(StuckAt(0.3), range(8)) == alone
    assert not bench.side_by_side
    assert len(set(alone)) > 1


def near(output, y):
    """Points within one of where they are: a sum that no batch of a single class gives."""
    hit = (output - y).norm(dim=-1) < 1
    return hit.sum(), torch.tensor(hit.numel())


def test_side_by_side_keeps_the_score_of_the_task():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 10), nn.Unflatten(1, (5, 2))), torch.randn(30, 6)
    task = data.Task("points", nn.functional.mse_loss, near)
    bench = trials_module._Bench(net, "two_column", data.Split(x, net(x).detach(), task), 7)
    found = bench.together(StuckAt(0.05), range(5))
    assert bench.side_by_side
    for chip, score in enumerate(found):
        with torch.no_grad():
            hit, of = near(on_chip(net, "two_column", StuckAt(0.05), chip)(x), net(x))
        assert score == pytest.approx(float(hit / of), abs=0.011)
    assert len(set(found)) > 1
    whole = replace(bench.split, task=replace(task, whole=True))
    assert not trials_module._Bench(net, "two_column", whole, 7).side_by_side


def test_noise_of_reads_is_drawn_chip_by_chip(trained, images):
    bench, noise = trials_module._Bench(trained, "differential", images.test, 200), (StuckAt(0.01), ReadNoise(0.05))
    found = bench.together(noise, [0, 1])
    assert found == [bench.trial(noise, chip) for chip in (0, 1)]
    assert found != bench.together(noise[0], [0, 1])
    assert bench.side_by_side


def test_a_tensor_that_is_read_twice_has_noise_twice():
    """Two modules or one: the noise of a read is new, and its variance is that of all reads."""
    for tied in (True, False):
        one = nn.Linear(1, 1, bias=False)
        two = nn.Linear(1, 1, bias=False) if tied else one
        one.weight.data.fill_(1.0)
        two.weight = one.weight

        class Sum(nn.Module):
            def __init__(self, one, two):
                super().__init__()
                self.one, self.two = one, two

            def forward(self, x):
                return self.one(x) + self.two(x)

        split = data.Split(torch.ones(20_000, 1), torch.zeros(20_000).long())
        bench = trials_module._Bench(Sum(one, two), "two_column", split, 20_000)
        with torch.no_grad():
            hooks = [*bench._read_noise(ReadNoise(0.1), 0)]
            spread = float(bench.model(split.x).std())
        assert len(hooks) == 1 + tied
        assert spread == pytest.approx(0.1 * 2, rel=0.03)  # two reads of two cells each


def test_a_sequence_is_an_image_one_pixel_high():
    torch.manual_seed(0)
    flat, image = nn.Conv1d(3, 4, 3, stride=2, bias=False), nn.Conv2d(3, 4, (1, 3), stride=2, bias=False)
    image.weight.data = flat.weight.data[:, :, None]
    for where in WHERE:
        devices = (StuckAt(0.1, where=where), Variation(0.1))
        one, other = (on_chip(nn.Sequential(n), "differential", devices, 0)[0].weight for n in (flat, image))
        assert torch.equal(one, other[:, :, 0])
        assert not torch.equal(one, flat.weight)
    x, y = torch.randn(50, 3, 11), torch.zeros(50).long()
    for devices in (StuckAt, ReadNoise):
        found = [
            sweep(nn.Sequential(layer, nn.Flatten()), "offset", [0.05], 3, data.Split(v, y), faults=devices)
            for layer, v in ((flat, x), (image, x[:, :, None]))
        ]
        assert found[0].equals(found[1])


def test_a_network_in_few_bits_reads_back_as_one(trained, images):
    """Cells hold more than bfloat16 does: 1 - 0.001 would be 1 there, and the weight gone."""
    weight = torch.tensor([1.0, 0.001, -0.004], dtype=torch.bfloat16)
    for scheme in ("offset", "two_column", "differential"):
        assert torch.equal(read_back(weight, Mapping(scheme), (), 0, "fc"), weight)
    net = deepcopy(trained).bfloat16()
    own = training.evaluate(net, data.Split(images.test.x.bfloat16(), images.test.y), 100)
    bench = trials_module._Bench(net, "differential", images.test, 100)
    assert [bench.trial(devices, 0) for devices in (StuckAt(0.0), ReadNoise(0.0))] == [own, own]


def test_finished_trials_are_not_run_again(trained, images, monkeypatch):
    first = sweep(trained, "offset", [0.01], 3, images.test)
    ran = []
    write = Journal.write
    monkeypatch.setattr(Journal, "write", lambda self, *row: ran.append(row) or write(self, *row))
    again = sweep(trained, "offset", [0.01, 0.02], 4, images.test)
    assert len(ran) == 1 + 4  # the new chip at the old rate, all chips at the new rate
    assert again[(again["rate"] == 0.01) & (again["chip"] < 3)].equals(first)
    sweep(trained, "offset", [0.01], 3, images.test, batch_size=50)  # another batch size may round otherwise
    assert len(ran) == 5 + 3


KILLED = """
import sys
from lib import data, models
from lib.faults import sweep
images = data.load(train_size=100, test_size=300, validation_size=100)
net = models.build("lenet300", images.shape, images.classes, seed=1)
sweep(net, "differential", [0.01, 0.02], 40, images.test, progress=lambda done, text: print(done, flush=True))
"""


def test_a_killed_sweep_resumes_to_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "killed"))
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    for _ in range(25):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    from lib import data

    images = data.load(train_size=100, test_size=300, validation_size=100)
    net = models.build("lenet300", images.shape, images.classes, seed=1)
    left = len(trials_module.journal_of(trials_module._Bench(net, "differential", images.test, 100)).read())
    assert 25 <= left < 80
    resumed = sweep(net, "differential", [0.01, 0.02], 40, images.test)
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "whole"))
    assert resumed.equals(sweep(net, "differential", [0.01, 0.02], 40, images.test))


def test_frozen_and_free_networks_share_their_trials_and_a_scaled_one_has_its_own(trained, images):
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.net, self.factor = deepcopy(trained), factor

        def forward(self, x):
            return self.factor * self.net(x)

    def place(net):
        return trials_module.journal_of(trials_module._Bench(net, "offset", images.test, 100)).folder

    assert place(trained) == place(deepcopy(trained).requires_grad_(False).eval())
    assert len({place(trained), place(Scaled(1.0)), place(Scaled(-1.0))}) == 3
    found = [sweep(Scaled(factor), "offset", [0.0], 1, images.test)["accuracy"].item() for factor in (1.0, -1.0)]
    assert found[0] > 0.5 > found[1]


def test_a_cache_that_cannot_be_written_is_one_line(trained, images, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "file"))
    with pytest.raises(OSError, match="cannot write the cache"):
        sweep(trained, "offset", [0.01], 1, images.test)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": [1.5]}, "rate = 1.5: allowed are shares of all cells, 0 to 1"),
        ({"rates": [-0.1]}, "rate = -0.1"),
        ({"rates": [0.1, 0.2, 0.1]}, r"rates = \[0.1, 0.2, 0.1\]: each is allowed once"),
        ({"rates": [-0.1], "faults": Variation}, "sigma = -0.1: allowed are numbers from 0"),
        ({"rates": [float("nan")], "faults": Variation}, "sigma = nan"),
        ({"rates": [0.1], "faults": lambda rate: rate}, "0.1 is no device"),
        ({"split": data.Split(torch.zeros(0, 1, 28, 28), torch.zeros(0).long())}, "0 images in batches of 100"),
        ({"batch_size": 0}, "in batches of 0"),
        ({"processes": 0}, "processes = 0: allowed are whole numbers from 1"),
        ({"chips": [0, 0.5]}, "different whole numbers from 0"),
        ({"chips": -1}, "chips = -1"),
        ({"chips": [3, -1]}, "allowed is a number of chips"),
        ({"chips": 0}, "chips = 0"),
        ({"mapping": "sideways"}, "'sideways' is unknown"),
        ({"mapping": {}}, "empty; it may name fc1, fc2, fc3"),
        ({"mapping": {"fc9": "offset"}}, "layer 'fc9'; the model has fc1, fc2, fc3"),
    ],
)
def test_bad_input_is_named(trained, images, change, message):
    given = {"model": trained, "mapping": "offset", "rates": [0.1], "chips": 1, "split": images.test} | change
    with pytest.raises(CrossbarError, match=message):
        sweep(**given)


def test_bad_models_and_faults_are_named(trained, images):
    ill = deepcopy(trained)
    with torch.no_grad():
        ill.fc2.weight[0, 0] = float("nan")
    with pytest.raises(CrossbarError, match="'fc2' has weights that are not finite"):
        sweep(ill, "offset", [0.1], 1, images.test)
    aged = make_dataclass("Aged", [("by", float)], bases=(Device,))  # has no hash, so no trial could be known by it
    with pytest.raises(CrossbarError, match=r"Aged\(by=0.5\) cannot be told from its equals: .*frozen=True"):
        sweep(trained, "offset", [0.5], 1, images.test, faults=aged)
    listed = make_dataclass("Listed", [("by", list)], bases=(Device,), frozen=True)
    with pytest.raises(CrossbarError, match=r"Listed\(by=\[1\]\) cannot be told from its equals: .*without lists"):
        sweep(trained, "offset", [0.5], 1, images.test, faults=lambda _: listed([1]))
    fleeting = type("Fleeting", (Device,), {"lasting": False, "disturb": lambda self, cells, *_: cells})
    with pytest.raises(CrossbarError, match="lasting = False is for ReadNoise"):
        sweep(trained, "offset", [0.5], 1, images.test, faults=lambda _: fleeting())
    with pytest.raises(CrossbarError, match="add up to at most 1"):
        StuckAt.of(on=0.7, off=0.4)
    with pytest.raises(CrossbarError, match="allowed are 'cells', 'rows'"):
        StuckAt(0.1, where="corners")
    for drop in (0, float("nan"), -1.0):
        with pytest.raises(CrossbarError, match=f"drop={drop}"):
            tolerated_rate(trained, "offset", drop, 1, images.test)
    with pytest.raises(CrossbarError, match="reference = nan"):
        tolerated_rate(trained, "offset", 1, 1, images.test, reference=float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cells: cells[:, :1], r"makes cells \(1, 1, 3\) of \(1, 2, 3\), fc1"),  # would be broadcast
        (lambda cells: cells.numpy(), "makes a ndarray of cells, fc1"),
        (lambda cells: cells * float("nan"), "makes conductances from nan to nan, fc1"),
        (lambda cells: cells + float("inf"), "makes conductances from inf to inf"),
        (lambda cells: cells - 1, "makes conductances from -1 to 0"),
    ],
)
def test_what_are_no_cells_is_refused(change, message):
    device = type("Wrong", (Device,), {"disturb": lambda self, cells, *_: change(cells)})
    with pytest.raises(CrossbarError, match=message):
        read_back(torch.tensor([1.0, 0.5, -1.0]), Mapping("two_column"), device(), chip=0, layer="fc1")


# --- tolerated rate ---------------------------------------------------------------------------------------------------


def test_tolerated_rate_agrees_with_a_fine_grid(trained, images):
    found = tolerated_rate(trained, "differential", 3, 8, images.test, lowest=1e-3, highest=0.3)
    rates = np.geomspace(1e-3, 0.3, 32)  # 20 % apart
    grid = sweep(trained, "differential", rates.tolist(), 8, images.test).groupby("rate")["accuracy"].mean()
    floor = sweep(trained, "differential", [0.0], 1, images.test)["accuracy"].item() - 0.03
    last = grid.index[(grid < floor).argmax() - 1]
    assert last / 1.25 < found.rate < last * 1.5
    assert found.low <= found.rate <= found.high
    assert found.bound == ""
    assert 5 * found.trials <= len(rates) * 8


def test_chips_are_spent_where_they_decide(trained, images):
    options = {"lowest": 1e-4, "precision": 0.2}
    for mapping, drop in (("differential", 3), ("two_column", 1), ("offset", 10)):
        every = tolerated_rate(trained, mapping, drop, 12, images.test, **options)
        few = tolerated_rate(trained, mapping, drop, 12, images.test, sure=4, **options)
        assert few.trials < 0.9 * every.trials
        assert every.low <= few.rate <= every.high
        assert few.low < few.rate < few.high
        assert np.log(few.high / few.low) == pytest.approx(np.log(every.high / every.low), rel=0.5)


def test_an_interval_ends_where_chips_say_and_not_where_the_search_began(trained, images):
    """The first rates that are met depend on ``lowest`` and ``highest``; an interval that ended there would too."""
    ends = {}
    for lowest, highest in ((1e-5, 0.5), (1e-6, 0.5), (1e-5, 0.1), (3e-4, 0.2)):
        found = tolerated_rate(trained, "two_column", 3, 20, images.test, lowest=lowest, highest=highest)
        ends[lowest, highest] = np.log([found.low, found.rate, found.high])
    low, rate, high = np.ptp(list(ends.values()), axis=0)  # of logarithms; between the rates met it is interpolated
    assert (low < 0.1, rate < 0.1, high < 0.25) == (True, True, True), ends


def test_a_tolerated_rate_is_right_on_average_over_sets_of_chips_but_one_set_is_not():
    random = torch.Generator().manual_seed(0)
    classes = torch.randn(6, 24, generator=random)
    y = torch.arange(120) % 6
    net = nn.Sequential(nn.Flatten(), nn.Linear(24, 6, bias=False))
    net[1].weight.data = classes
    split = data.Split((classes[y] + torch.randn(120, 24, generator=random)).reshape(-1, 1, 4, 6), y)

    def log_rate(chips):
        return np.log(tolerated_rate(net, "two_column", 5, chips, split, lowest=1e-3, batch_size=120).rate)

    sets = [log_rate(range(first, first + 20)) for first in range(0, 200, 20)]
    deviation = np.array(sets) - log_rate(200)
    assert abs(deviation.mean()) < 0.08
    assert deviation.std() > 0.1


def test_numbers_of_any_kind(trained, images):
    found = sweep(trained, "offset", np.array([0, 1]), np.int64(2), images.test)
    assert found.equals(sweep(trained, "offset", [0.0, 1.0], [np.int32(0), 1], images.test))
    one, several = (tolerated_rate(trained, "differential", 3, n, images.test, precision=0.5) for n in (1, np.int64(4)))
    assert 0 < one.rate < 0.5
    assert np.isnan([one.low, one.high]).all()  # one chip has no spread
    assert several.low <= several.rate <= several.high


def test_a_drop_outside_the_bounds_is_flagged(trained, images):
    assert tolerated_rate(trained, "offset", 3, 2, images.test, lowest=0.2, highest=0.4).bound == "<"
    assert tolerated_rate(trained, "differential", 30, 2, images.test, lowest=1e-6, highest=1e-5).bound == ">"


# --- training under faults --------------------------------------------------------------------------------------------


def test_gradients_go_straight_through_the_broken_weights(images):
    net = models.build("lenet300", images.shape, images.classes, seed=1)
    mask = recipes.one_shot(net, {"fc2": pruning.Unstructured(0.5)})
    attach_masks(net, mask)
    hook = UnderFaults("differential", StuckAt(0.1), seed=3)
    seen = {}

    class Look(training.Hook):
        def before_step(self, model, step):
            for n, layer in shapes.prunable(model).items():
                seen.setdefault(n, layer.weight.detach().clone())

        def after_backward(self, model, step):
            for n, layer in shapes.prunable(model).items():
                seen.setdefault(f"grad {n}", leaf(layer).grad.clone())

    start = deepcopy(net)
    training.fit(net, images, epochs=1, lr=1e-6, batch_size=1000, hooks=(hook, Look()))
    other = recipes.rewind(models.build("lenet300", images.shape, images.classes), state_of(start))
    with torch.no_grad():
        for name, layer in shapes.prunable(other).items():
            chip = (1 << 40) + (3 << 24)
            expected = read_back(layer.weight, Mapping("differential"), StuckAt(0.1), chip, name)
            torch.testing.assert_close(seen[name], expected, rtol=0, atol=1e-6)
            layer.weight.copy_(expected)
    assert (seen["fc2"] != 0)[~mask["fc2"]].any()  # cells of removed weights fail too
    x, y = next(training.batches(images.train, 1000, 0, 0))
    nn.functional.cross_entropy(other(x), y).backward()
    for name, layer in shapes.prunable(other).items():
        keep = mask.get(name, torch.ones_like(layer.weight, dtype=torch.bool))
        torch.testing.assert_close(seen[f"grad {name}"], layer.weight.grad * keep, rtol=1e-3, atol=1e-7)


def test_training_under_faults_leaves_an_ordinary_healthy_network(images):
    net = models.build("lenet300", images.shape, images.classes, seed=1)
    attach_masks(net, recipes.one_shot(net, {"fc1": pruning.Unstructured(0.5)}))
    keys = {*net.state_dict()}
    hook = UnderFaults({"fc1": "two_column", "fc2": Mapping("differential", clip=0.5)}, StuckAt(0.1))
    log = training.cached(training.fit, net, images, epochs=1, lr=0.05, hooks=(hook,))
    assert {*net.state_dict()} == keys
    assert set(masks(net)) == {"fc1"}
    again = models.build("lenet300", images.shape, images.classes, seed=1)
    attach_masks(again, recipes.one_shot(again, {"fc1": pruning.Unstructured(0.5)}))
    assert training.cached(training.fit, again, images, epochs=1, lr=0.05, hooks=(hook,)).equals(log)
    other = (replace(hook, devices=StuckAt(0.2)),)
    assert not training.fit(again, images, epochs=1, lr=0.05, hooks=other).equals(log)


def test_two_hooks_break_each_its_own_layers(images):
    net, seen = models.build("lenet300", images.shape, images.classes, seed=1), []
    hooks = [UnderFaults({name: "two_column"}, StuckAt(rate, ratio=0)) for name, rate in (("fc1", 1.0), ("fc2", 0.0))]

    class Look(training.Hook):
        def before_step(self, model, step):
            seen.append([float((layer.weight == 0).float().mean()) for layer in (model.fc1, model.fc2)])

        def after_backward(self, model, step):  # healthy again, for whoever ranks weights between two steps
            seen.append([float((layer.weight == 0).float().mean()) for layer in (model.fc1, model.fc2)])

    training.fit(net, images, epochs=1, lr=0.01, hooks=(*hooks, Look()))
    assert seen[:2] == [[1.0, 0.0], [0.0, 0.0]]


def test_a_network_learns_to_live_with_faults(trained, images):
    mapping, found = Mapping("differential", clip=0.4), []
    for hooks in ((), (UnderFaults(mapping, StuckAt(0.2)),)):
        net = deepcopy(trained)
        training.fit(net, images, epochs=4, lr=0.02, batch_size=32, schedule="cosine", hooks=hooks)
        found.append(sweep(net, mapping, [0.2], 8, images.test)["accuracy"].mean())
    assert found[1] > found[0]
