"""Mappings: exact round trips, the published encodings, and what one broken cell does to a weight; whole networks."""

from itertools import product
from math import inf

import numpy as np
import pytest
import torch
from torch import nn

from lib.crossbar import SCHEMES, Array, CrossbarError, Mapping, Polarized, calibrated, exact_bits, on_arrays

BITS = ((None, None), (8, 2), (8, None), (8, 3), (5, 2), (4, 1), (2, 1), (16, 4))


@pytest.mark.parametrize(("scheme", "bits", "on_off"), [*product(SCHEMES, BITS, (inf, 15.0))])
def test_perfect_cells_read_back_what_was_written(scheme, bits, on_off):
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last)
    mapping = Mapping(scheme, *bits, on_off=on_off)
    scale = mapping.range_of(weight)
    cells = mapping.encode(weight, scale)
    assert cells.shape == (mapping.slices, mapping.columns, *weight.shape)
    assert cells.min() >= mapping.g_min - 1e-6
    assert cells.max() <= 1 + 1e-6
    unit = 2 ** (bits[0] - 1) - 1 if bits[0] else None
    expected = (weight / scale * unit).round() / unit * scale if unit else weight
    torch.testing.assert_close(mapping.decode(cells, scale), expected, rtol=0, atol=2e-5 * float(scale))


def test_encodings_are_the_published_ones():
    w = torch.tensor([0.25, 0.0, -0.75])
    pair = {"two_column": [[0.25, 0, 0], [0, 0, 0.75]], "differential": [[1, 1, 0.25], [0.75, 1, 1]]}
    for scheme, cells in pair.items():
        torch.testing.assert_close(Mapping(scheme).encode(w, 1.0)[0], torch.tensor(cells))
    torch.testing.assert_close(Mapping("offset").encode(w, 1.0)[0, 0], (w + 1) / 2)


def test_offset_slices_are_those_of_the_worked_example():
    """Four signed bits on two-bit cells; the range 7 leaves -4 to 3 as they are."""
    w = torch.tensor([-2.0, 1, 3, -4])
    cells = Mapping("offset", 4, 2).encode(w, 7.0) * 3
    assert cells[0, 0].tolist() == [2, 1, 3, 0]
    assert cells[1, 0].tolist() == [1, 2, 2, 1]


def test_a_zero_weight_is_off_or_on_in_every_slice():
    zero = torch.zeros(3)
    assert Mapping("two_column", 8, 2).encode(zero, 1.0).max() == 0
    assert Mapping("differential", 8, 2).encode(zero, 1.0).min() == 1


@pytest.mark.parametrize("m", [0.3, 0.8])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_broken_cell_does_what_the_paper_says(m, sign):
    """Worked out by hand: scheme, cell, stuck value -> weight for w > 0; w < 0 is the mirror image."""
    table = {
        ("two_column", 0, 0): 0, ("two_column", 0, 1): 1, ("two_column", 1, 0): m, ("two_column", 1, 1): m - 1,
        ("differential", 0, 1): m, ("differential", 0, 0): m - 1, ("differential", 1, 1): 0, ("differential", 1, 0): 1,
    }  # fmt: skip
    for (scheme, cell, value), expected in table.items():
        mapping = Mapping(scheme)
        cells = mapping.encode(torch.tensor([sign * m]), 1.0)
        cells[0, cell if sign > 0 else 1 - cell] = value
        assert float(mapping.decode(cells, 1.0)) == pytest.approx(sign * expected, abs=1e-6)


@pytest.mark.parametrize("cell", [0, 1])
def test_a_broken_cell_of_a_zero_weight(cell):
    for scheme, harmless in (("two_column", 0.0), ("differential", 1.0)):
        cells = Mapping(scheme).encode(torch.zeros(1), 1.0)
        for value in (0.0, 1.0):
            broken = cells.clone()
            broken[0, cell] = value
            weight = float(Mapping(scheme).decode(broken, 1.0))
            assert weight == (0 if value == harmless else (1 if (cell == 0) == (value > harmless) else -1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_plane_and_index_name_every_cell_once(scheme):
    mapping, shape = Mapping(scheme, 8, 2), torch.Size((3, 2, 2, 2))
    rows, columns = mapping.plane(shape)
    index = [mapping.index(r, c, shape) for r in range(rows) for c in range(columns)]
    assert sorted(index) == list(range(mapping.slices * mapping.columns * shape.numel()))
    cells = torch.zeros(mapping.slices, mapping.columns, *shape)
    cells.view(-1)[mapping.index(5, columns - 1, shape)] = 1  # the last cell of the last filter's row 5
    assert cells[-1, -1, 2].view(-1)[5] == 1


def test_a_clipped_range_saturates_and_a_zero_layer_stays_zero():
    weight = torch.tensor([[1.0, -0.5, 0.2]])
    mapping = Mapping("differential", clip=0.4)
    back = mapping.decode(mapping.encode(weight, mapping.range_of(weight)), mapping.range_of(weight))
    torch.testing.assert_close(back, torch.tensor([[0.4, -0.4, 0.2]]))
    zero = torch.zeros(2, 3)
    assert mapping.decode(mapping.encode(zero, mapping.range_of(zero)), mapping.range_of(zero)).abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "polar"}, "'polar' is unknown: allowed are offset, two_column, differential"),
        ({"cell_bits": 2}, "without weight_bits"),
        ({"weight_bits": 1}, "allowed are 2 to 16"),
        ({"weight_bits": 4, "cell_bits": 5}, "allowed are 1 to weight_bits = 4"),
        ({"on_off": 1.0}, "on_off > 1"),
        ({"clip": 0.0}, "0 < clip <= 1"),
        ({"copies": 0}, "whole numbers from 1"),
    ],
)
def test_impossible_mappings_are_refused(options, message):
    with pytest.raises(CrossbarError, match=message):
        Mapping(**options)


HALVES = {
    Mapping: ("weight_bits", "copies"),
    Array: ("rows", "columns", "input_bits", "dac_bits", "active_rows", "adc_bits"),
    Polarized: ("fragment",),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in HALVES.items() for name in names])
def test_halves_are_refused(kind, name):
    with pytest.raises(CrossbarError, match=f"{name} = 2.5: allowed are integers"):
        kind(**{name: 2.5})


def test_numbers_of_numpy_become_pythons():
    """Whose bits are counted without a method that numpy lacks, and whose powers of two do not overflow."""
    rows, bits = np.int64(128), np.int8(8)
    array = Array(rows, rows, Mapping("offset", bits, np.uint8(2)), bits, bits)
    assert array == Array(128, 128, Mapping("offset", 8, 2), 8, 8)
    assert (array.input_top, array.exact_bits, exact_bits(np.uint8(200), np.uint8(2))) == (255, 17, 10)


def test_values_without_a_range_are_refused():
    nan, known = torch.tensor([1.0, float("nan")]), torch.ones(10)
    for values in (nan, iter([known, nan]), torch.tensor([float("inf")])):
        with pytest.raises(CrossbarError, match="not finite"):
            calibrated(values, 4, False, count=12)
    for count, message in ((None, "count = None"), (0, "count = 0"), (11, "10 values in pieces, and count = 11")):
        with pytest.raises(CrossbarError, match=message):
            calibrated(iter([known]), 4, False, count=count)
    net, image = nn.Sequential(nn.Conv2d(1, 2, 3)), torch.rand(1, 1, 6, 6)
    image[0, 0, 0, 0] = float("nan")
    with pytest.raises(CrossbarError, match="not finite"):
        on_arrays(net, Array(), image)


def test_a_range_is_the_same_whether_sums_come_at_once_or_piece_by_piece():
    for values in (torch.randn(5000).mul(20).round(), torch.randn(400_000)):  # fewer and more than are looked at
        for bits, signed in product((3, 6), (False, True)):
            pieces = values.split([1000, 3000, len(values) - 4000])
            assert calibrated(iter(pieces), bits, signed, count=len(values)) == calibrated(values, bits, signed)


def test_arrays_outside_of_no_grad():
    """Whatever the converters: what they round has no gradient, and what needs one elsewhere is no error."""
    x = torch.rand(4, 1, 6, 6)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    for bits in (None, 3):
        there = on_arrays(net, Array(adc_bits=bits), x)
        with torch.no_grad():
            known = there(x)
        assert torch.equal(there(x), known)


def test_copies_are_independent_cells_and_read_back_as_their_mean():
    mapping, w = Mapping("differential", copies=3), torch.tensor([0.5, -0.2])
    cells = mapping.encode(w, 1.0)
    assert cells.shape == (3, 2, 2)
    torch.testing.assert_close(mapping.decode(cells, 1.0), w)
    cells[1, 1, 0] = 1  # one of three copies of +0.5 is lost
    torch.testing.assert_close(mapping.decode(cells, 1.0), torch.tensor([0.5 * 2 / 3, -0.2]))
    assert float(mapping.noise_gain(1.0)) == pytest.approx((2 / 3) ** 0.5)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(CrossbarError, match="not finite"):
        Mapping("offset").range_of(torch.tensor([1.0, float("nan")]))


def test_a_network_in_arrays_takes_batches():
    image, layer = torch.rand(1, 8, 8), nn.Conv2d(1, 2, 3)
    for net, x in ((layer, image), (nn.Linear(8, 2), image[0, 0]), (nn.Conv1d(1, 2, 3), image[0, :1])):
        with pytest.raises(CrossbarError, match=r"inputs \(.*\) of a layer in arrays: allowed are batches"):
            on_arrays(nn.Sequential(net), Array(), x)
        with pytest.raises(CrossbarError, match="ranges are chosen on what images give: there are none"):
            on_arrays(nn.Sequential(net), Array(), x[None][:0])
        in_arrays = on_arrays(nn.Sequential(net), Array(), x[None])
        with pytest.raises(CrossbarError, match="allowed are batches"):
            in_arrays(x)
