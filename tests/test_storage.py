"""Bits of every format against counts by hand, and the index of random positions against its closed form."""

import pytest
import torch

from lib import models, pruning
from lib.constraint import fitted, harden
from lib.constraint.formats import (
    bitmask,
    csr,
    dense,
    escaped_runs,
    formats,
    index_width,
    irregular,
    relative_index,
    submatrix,
    which,
)
from lib.costs import compression, network_storage


def at(positions, size):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[positions] = True
    return mask


@pytest.mark.parametrize(("choices", "bits"), [(1, 0), (2, 1), (3, 2), (8, 3), (9, 4), (56, 6)])
def test_index_width(choices, bits):
    assert index_width(choices) == bits


def test_relative_index_by_hand():
    mask = at([0, 1, 6, 15], 16)  # runs of 0, 0, 4 and 8 zeros
    assert relative_index(mask, 8, width=2) == (32, (4 + 1 + 2) * 10 - 32, 0)  # 4 // 4 + 8 // 4 fillers
    assert relative_index(mask, 8, width=3) == (32, (4 + 1) * 11 - 32, 0)
    assert relative_index(mask, 8, width=4) == (32, 4 * 12 - 32, 0)
    assert relative_index(mask, 8) == relative_index(mask, 8, width=4)
    assert relative_index(at([3], 4), 8).total == 10  # a run of 3 takes two bits
    assert relative_index(at([], 4), 8).total == 0


def test_escaped_runs_by_hand():
    mask = at([0, 2, 9, 10], 20)  # runs of 0, 1, 6, 0
    assert escaped_runs(mask, 8) == (32, 11, 0)  # a bit each: 7 zeros and 4 ends; two bits: 12
    assert escaped_runs(at([3], 4), 8) == (8, 3, 0)  # three bits hold runs up to 6
    assert escaped_runs(at([], 4), 8).total == 0


@pytest.mark.parametrize(
    ("density", "best", "bits_per_nonzero", "with_4", "with_5"),
    [(0.2, 3, 6.0, 6.2, 7.0), (0.08, 5, 7.5, 8.1, 7.5), (0.02, 7, 9.7, 21.7, 14.7), (0.009, 8, 11.1, 44.6, 27.9)],
)
def test_random_positions_cost_what_the_closed_form_says(density, best, bits_per_nonzero, with_4, with_5):
    """2-bit weights at random places: fillers per nonzero ``q^(2^k) / (1 - q^(2^k))``."""
    mask = torch.rand(2_000_000, generator=torch.Generator().manual_seed(0)) < density
    nonzero = int(mask.sum())
    for width, expected in ((best, bits_per_nonzero), (4, with_4), (5, with_5)):
        assert relative_index(mask, 2, width).total / nonzero == pytest.approx(expected, rel=0.02)
    assert relative_index(mask, 2) == relative_index(mask, 2, best)


@pytest.mark.parametrize(
    ("c", "index"),
    [
        (pruning.NM(4, 8), 20 * 25),  # rows of 25 take four regions of 8, of which 7 weights are none
        (pruning.BlockColumns(0.5, height=4, width=64), 5 * 25),  # five blocks of 25 columns, not of 64
        (pruning.BlockRows(0.5, height=16, width=5), 5 * 20),
    ],
    ids=str,
)
def test_a_bitmap_is_of_what_there_is(c, index):
    z = c.project(torch.randn(20, 1, 5, 5, generator=torch.Generator().manual_seed(0)))
    assert c.storage_bits(z, 8).index == index


@pytest.mark.parametrize(("bits", "crossing"), [(2, 0.35), (4, 0.29), (8, 0.25)])
def test_a_bitmask_beats_the_best_relative_index_only_above_a_density(bits, crossing):
    uniform = torch.rand(1_000_000, generator=torch.Generator().manual_seed(1))
    for density, bitmask_wins in ((crossing - 0.02, False), (crossing + 0.02, True)):
        mask = uniform < density
        assert (bitmask(mask, bits).total < relative_index(mask, bits).total) is bitmask_wins


def test_other_formats_by_hand():
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0, 1] = mask[2, 5] = mask[2, 7] = True
    assert dense(mask, 4) == (128, 0, 0)
    assert bitmask(mask, 4) == (12, 32, 0)
    assert csr(mask, 4) == (12, 3 * 3 + 5 * 2, 0)  # 3 bits name one of 8 columns, 2 bits count to 3
    assert submatrix(mask, 4) == (2 * 3 * 4, min(4, 2 * 2) + min(8, 3 * 3), 0)
    assert set(formats(mask, 4)) == {"dense", "bitmask", "relative index", "csr"}
    assert irregular(mask, 4).total == min(f.total for n, f in formats(mask, 4).items() if n != "dense")
    assert which(mask[0]) == 3
    assert which(torch.ones(8, dtype=torch.bool)) == 0


def test_channels_that_are_gone_are_told_as_channels():
    z = torch.ones(4, 3, 3, 3)
    z[:, 1] = 0
    assert submatrix(z, 8) == (4 * 18 * 8, 3, 0)
    z[:, 0, 0, 0] = 0  # a column of a living channel
    assert submatrix(z, 8) == (4 * 17 * 8, 3 + 18, 0)


@pytest.mark.parametrize(
    ("constraint", "data", "index", "table"),
    [
        (pruning.Block(0.75, 2, 9), 4 * 18, min(16, 4 * 4), 0),
        (pruning.Kernel(0.75), 8 * 9, min(32, 8 * 5), 0),
        (pruning.NM(n=2, m=4), 8 * 18, 8 * 18 * 2, 0),
        (pruning.block_max(8), 8 * 5, 8 * 5 * 3, 0),
        (pruning.BlockColumns(0.75, 4, 4), 2 * 9 * 4, min(72, 18 * 2), 0),
        (pruning.Patterns(library=pruning.PUBLISHED["T"]), 32 * 4, 32 * 2, 4 * 9),
        (pruning.PatternKernels(library=pruning.PUBLISHED["T"], sparsity=0.75), 8 * 4, 8 * 2 + 32, 4 * 9),
        (pruning.BlockStructured(0.5, 0.5, 4, 4), 4 * 18, 2 * 36 + 8, 0),
        (pruning.PCNN(3), 32 * 3, 32 * 9, 0),
        (pruning.PCNN(3, patterns=4), 32 * 3, 32 * 2, 4 * 9),
        (pruning.Filter(0.5), 4 * 36, min(8, 4 * 3), 0),
        (pruning.DARB(0.75, menu=(2, 4, 8), blocks=(2, 2, 4, 4, 4, 4, 8, 8)), 36 + 36 + 10, 36 + 36 * 2 + 10 * 3, 16),
    ],
    ids=str,
)
def test_what_each_set_stores(constraint, data, index, table):
    """Of a layer of 8 filters and 4 channels of 3x3, in weights of one bit."""
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    fitted_set = constraint.fit({"w": weight})["w"]
    assert fitted_set.storage_bits(fitted_set.project(weight), 1) == (data, index, table)
    assert fitted_set.storage_bits(fitted_set.select(weight), 1) == (data, index, table)  # a mask says the same


@pytest.mark.parametrize(
    "constraint",
    [
        pruning.Block(0.5, 2, 9),
        pruning.Kernel(0.5),
        pruning.NM(n=4, m=8),
        pruning.BlockColumns(0.5, 16, 9),
        pruning.BlockRows(0.5, 4, 18),
        pruning.Filter(0.5),
        pruning.Column(0.5),
        pruning.FilterColumn(0.5, 0.25),
        pruning.BlockStructured(0.5, 0.5, 16, 18),
        pruning.PCNN(4, patterns=8),
    ],
    ids=str,
)
def test_a_structure_stores_kept_weights_that_are_zero(constraint):
    """Else nothing says which they are: what levels round to zero, say."""
    weight = torch.randn(32, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    fitted_set = constraint.fit({"w": weight})["w"]
    z = fitted_set.project(weight)
    some = z != 0
    some &= torch.rand(z.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    assert fitted_set.storage_bits(torch.where(some, 0.0, z), 8) == fitted_set.storage_bits(z, 8)


def test_network_storage_adds_up(images):
    net = models.build("lenet5", images.shape, images.classes)
    bill = network_storage(net, {}, 8)
    assert bill["data_bits"].sum() == 430_500 * 8
    assert bill[["index_bits", "table_bits"]].to_numpy().sum() == 0
    plan = fitted(net, {"conv2": pruning.Unstructured(0.9), "fc1": pruning.Column(0.75)})
    harden(net, plan)
    bill = network_storage(net, plan, 4).set_index("layer")
    assert bill.loc["fc1", "data_bits"] == 500 * 200 * 4
    assert bill.loc["conv2", "data_bits"] == 2500 * 4
    assert bill.loc["conv2", "index_bits"] == irregular(net.conv2.weight, 4).index
    assert list(bill["kept"]) == [500, 2500, 100_000, 5000]
    found = compression(network_storage(net, plan, 4), 4)
    assert found["data"] == pytest.approx(430_500 / 108_000)
    assert found["total"] < found["data"]
