"""What arrays compute fast is, bit for bit, what goes bit by bit: in one product, by counting, or by adding."""

import random
from collections import Counter

import pytest
import torch
from torch import nn

from lib import faults
from lib.crossbar import Array, Converter, CrossbarError, Mapping, Polarized, Programmed, on_arrays
from lib.crossbar.inference import in_arrays


def drawn(seed):
    """A layer in an array of random layout, and inputs; None for what cannot be built."""
    rnd, g = random.Random(seed), torch.Generator().manual_seed(seed)
    scheme, fragment = rnd.choice(["offset", "two_column", "differential", "polarized"]), rnd.choice([4, 8])
    cells = {"weight_bits": rnd.choice([4, 8]), "cell_bits": rnd.choice([1, 2, 4])}
    cells["on_off"] = rnd.choice([2.0, 4.0, 10.0, 1e9])
    cells["copies"] = rnd.choice([1, 1, 1, 3])
    if rnd.random() < 0.7:
        del cells["on_off"]
    bits, signed = rnd.choice([4, 8]), rnd.random() < 0.4
    try:
        array = Array(
            mapping=Polarized(fragment=fragment, **cells) if scheme == "polarized" else Mapping(scheme, **cells),
            rows=rnd.choice([8, 32, 128]),
            adc_bits=rnd.choice([1, 2, 3, 4, 5, 6, 7, 8, None]),
            flip=rnd.random() < 0.3,
            dac_bits=rnd.choice([1, 1, 2]),
            input_bits=bits,
            analog_difference=rnd.random() < 0.3 and scheme in ("two_column", "differential"),
            dummy=rnd.random() < 0.5,
        )
    except CrossbarError:
        return None
    groups, filters, rows = rnd.choice([1, 1, 2]), 2 * rnd.randint(1, 4), rnd.choice([5, 30, 150])
    weight = torch.randn(filters, rows, generator=g)
    if scheme == "polarized":
        signs = torch.randint(0, 2, (filters, -(-rows // fragment)), generator=g) * 2.0 - 1
        weight = weight.abs() * signs.repeat_interleave(fragment, 1)[:, :rows]

    def stuck(cells):
        draw = torch.rand(cells.shape, generator=torch.Generator().manual_seed(seed))
        cells = torch.where(draw < 0.05, 1.0, cells)
        return torch.where(draw > 0.95, array.mapping.g_min, cells)

    def beyond(cells):  # more than a good cell conducts, and less
        draw = torch.rand(cells.shape, generator=torch.Generator().manual_seed(seed))
        cells = torch.where(draw < 0.05, float(rnd.choice([2, 4])), cells)
        return torch.where(draw > 0.95, 0.0, cells)

    def varied(cells):
        return cells * torch.randn(cells.shape, generator=torch.Generator().manual_seed(seed)).mul(0.1).exp()

    layer = Programmed(weight, array, groups, rnd.choice([None, None, stuck, stuck, beyond, varied]))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    x = torch.randint(low, high, (groups * rows, rnd.randint(1, 9)), generator=g).float()
    x = torch.where(torch.rand(x.shape, generator=g) < rnd.choice([0.1, 0.5, 1.0]), x, 0.0)
    kind = rnd.random()
    if kind < 0.3:
        layer.calibrate(x, signed=signed)
    elif kind < 0.8:  # a range that many sums leave
        codes = rnd.randint(1, 6)
        layer.converter = Converter(codes, -(2.0 ** (codes - 1)) if layer.signed_sums else 0.0)
    return layer, x, signed


def test_what_is_computed_is_what_goes_bit_by_bit():
    ways = Counter()
    for seed in range(900):
        found = drawn(seed)
        if found is None:
            continue
        layer, x, signed = found
        fast, slow = layer(x, signed), layer.bit_by_bit(x, signed)
        if layer.whole:
            assert torch.equal(fast, slow), layer.array
            way = "folded" if layer.folds else "counted" if layer.counts else "added"
            ways["saturated"] += layer.folds and len(layer.risky) and bool((layer.lost(x, signed) != 0).any())
        else:  # float32 adds in another order: a sum between two codes may become the other one
            way = "not whole"
            ways["off"] += int(((fast - slow).abs() > 1e-9 * slow.abs().max()).sum())
            ways["numbers"] += slow.numel()
            code = layer.converter.step * float(layer.gains.max()) * 2**layer.array.input_bits
            assert (fast - slow).abs().max() <= code
        ways[way] += 1
    assert min(ways[way] for way in ("folded", "saturated", "counted", "added", "not whole")) > 30, ways
    assert ways["off"] < 0.005 * ways["numbers"], ways


def test_what_is_computed_of_a_vector_does_not_depend_on_others():
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 150, generator=g), torch.randint(0, 256, (150, 300), generator=g).float()
    for array in (Array(adc_bits=4), Array(adc_bits=8, rows=32)):
        for change in (None, lambda cells: cells * torch.rand(cells.shape, generator=torch.Generator().manual_seed(1))):
            layer = Programmed(weight, array, change=change)
            assert torch.equal(layer(x), torch.cat([layer(part) for part in x.split(7, dim=1)], 1))


LAYERS = {
    "strided": nn.Conv2d(3, 8, 3, stride=2, padding=1),
    "dilated, same": nn.Conv2d(3, 8, 4, dilation=2, padding="same"),
    "grouped": nn.Conv2d(4, 8, 3, groups=2, bias=False),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4),
    "of a sequence": nn.Conv1d(3, 8, 5, stride=2, padding=2),
    "linear": nn.Linear(12, 5),
    "linear of sequences": nn.Linear(12, 5, bias=False),
    "double": nn.Linear(12, 5).double(),
}
ARRAYS = {
    "flips": Array(adc_bits=8, flip=True),
    "six bits": Array(adc_bits=6, rows=16),
    "analog differences": Array(mapping=Mapping("two_column", 8, 2), adc_bits=5, rows=32, analog_difference=True),
    "differential": Array(mapping=Mapping("differential", 8, 1), adc_bits=7),
    "all bits": Array(),
}


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.05])
def test_layers_of_every_form(name, array, signed, share, monkeypatch):
    torch.manual_seed(len(name))
    layer, net = LAYERS[name], nn.Sequential(LAYERS[name])
    shape = {"Conv2d": (9, 10), "Conv1d": (21,), "Linear": (12,)}[type(layer).__name__]
    shape = (layer.in_channels, *shape) if hasattr(layer, "in_channels") else (*(7,) * ("seq" in name), *shape)
    x = torch.randn(40, *shape, dtype=layer.weight.dtype)
    x = x if signed else x.relu()
    net = on_arrays(net, ARRAYS[array], x, devices=faults.StuckAt(share) if share else ())
    placed = in_arrays(net)["0"][0].programmed
    if placed.converter.step == 1:
        assert placed.folds
    one = net(x)
    monkeypatch.setattr(Programmed, "folds", property(lambda self: False))
    monkeypatch.setattr(Programmed, "__call__", Programmed.bit_by_bit)
    assert torch.equal(net(x), one)


@pytest.mark.parametrize("bits", [4, 5])  # from far beyond the range to just beyond it
def test_a_narrow_range_saturates_and_only_some_images_are_looked_at(bits, monkeypatch):
    torch.manual_seed(0)
    x = torch.rand(30, 64)
    x[:20] *= torch.rand(20, 64) < 0.05
    net = nn.Sequential(nn.Linear(64, 12))
    net[0].weight.data[1:] = 0  # one filter's columns can saturate
    net = on_arrays(net, Array(mapping=Mapping("two_column", 8, 2), adc_bits=8), x)
    layer = in_arrays(net)["0"][0]
    layer.programmed.converter = Converter(bits)
    seen = layer._saturated(layer.whole(x))
    assert 0 < len(seen) < 30
    one = net(x)
    monkeypatch.setattr(Programmed, "folds", property(lambda self: False))
    monkeypatch.setattr(Programmed, "__call__", Programmed.bit_by_bit)
    assert torch.equal(net(x), one)


def test_what_is_not_whole_goes_bit_by_bit():
    weight = torch.randn(4, 30)
    noisy = Programmed(weight, Array(adc_bits=9), change=lambda cells: cells * 1.01)
    assert not noisy.folds
    assert not Programmed(weight, Array(adc_bits=4)).folds  # steps of more than one
    assert not Programmed(weight, Array(mapping=Mapping("offset", 8, 2, copies=3))).folds
    assert Programmed(weight, Array(adc_bits=9)).folds


def test_sums_beyond_what_numbers_hold_are_refused_and_large_ones_are_exact():
    wide = Array(mapping=Mapping("offset", 16, 2), input_bits=16)
    weight = torch.randn(2, 300)
    layer = Programmed(weight, wide)
    assert layer.folded.dtype == torch.float64
    x = torch.randint(0, 2**16, (300, 3)).float()
    whole = (weight.double() / layer.scale).round()
    assert torch.equal(layer(x), whole @ x.double())
    with pytest.raises(CrossbarError, match="16 bits hold 0 to 65535"):
        layer(x.clamp(min=2**16))
    with pytest.raises(CrossbarError, match=r"up to 1.08e\+17: float64 holds whole numbers up to 2\^53"):
        Programmed(weight, Array(mapping=Mapping("offset", 16, 2), input_bits=32))
