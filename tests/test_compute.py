"""Multiply-accumulates by closed form, products that agree, and break-even points of made-up curves. No times."""

from copy import deepcopy
from math import inf, isfinite

import pytest
import torch
from torch import nn

from lib.constraint import attach_masks, masks
from lib.costs.compute import break_even, latency_ratio, product, product_times, sparse_weight
from lib.models import build
from lib.shapes import macs, prunable


def test_lenet5_macs():
    table = macs(build("lenet5", (1, 28, 28), 10), (1, 28, 28))
    assert list(table.columns) == ["layer", "weights", "kept", "dense_macs", "macs"]
    assert table.dense_macs.tolist() == [288_000, 1_600_000, 400_000, 5_000]
    assert table.weights.tolist() == table.kept.tolist() == [500, 25_000, 400_000, 5_000]
    assert table.macs.tolist() == table.dense_macs.tolist()


def test_resnet8_macs():
    table = macs(build("resnet8", (1, 28, 28), 10, width=4), (1, 28, 28)).set_index("layer")
    expected = {
        "conv1": 28**2 * 4 * 9,
        "block1_1.conv1": 28**2 * 4 * 4 * 9,
        "block2_1.conv1": 14**2 * 8 * 4 * 9,
        "block2_1.shortcut.0": 14**2 * 8 * 4,
        "block3_1.conv2": 7**2 * 16 * 16 * 9,
        "fc": 16 * 10,
    }
    assert table.dense_macs[list(expected)].to_dict() == expected
    assert len(table) == 10


def test_masked_and_depthwise_layers_count_what_is_kept():
    model = build("lenet5", (1, 28, 28), 10).train()
    half = torch.zeros(20, 1, 5, 5, dtype=torch.bool)
    half[:5] = True
    attach_masks(model, {"conv1": half})
    before = deepcopy(model.state_dict())
    table = macs(model, (1, 28, 28)).set_index("layer")
    assert tuple(table.loc["conv1"]) == (500, 125, 288_000, 72_000)
    assert model.training
    assert set(masks(model)) == {"conv1"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    depthwise = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6))
    assert macs(depthwise, (6, 5, 5)).dense_macs.tolist() == [6 * 9 * 9]


def test_layers_that_are_not_used_cost_nothing():
    class Spare(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    assert macs(Spare(nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)), (1, 4, 4)).macs.tolist() == [72, 0]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_latency_ratio_is_an_ordered_interval(memory_format):
    narrow, wide = (
        nn.Sequential(nn.Conv2d(1, w, 3), nn.BatchNorm2d(w)).to(memory_format=memory_format) for w in (4, 32)
    )
    attach_masks(narrow, {"0": torch.ones(4, 1, 3, 3, dtype=torch.bool)})
    threads = torch.get_num_threads()
    middle, low, high = latency_ratio(wide, narrow, torch.randn(4, 1, 12, 12), repeats=6, warmup=1)
    assert 0 < low <= middle <= high
    assert isfinite(high)
    assert torch.get_num_threads() == threads
    assert narrow.training
    assert masks(narrow)
    assert prunable(narrow)["0"].weight.requires_grad
    with pytest.raises(ValueError, match="at least 2"):
        latency_ratio(wide, narrow, torch.randn(1, 1, 12, 12), repeats=1)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_networks_whose_weights_are_made_in_every_pass_are_timed_without_that():
    made, x = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4))), torch.ones(2, 4)
    made(x)  # leaves a weight with a graph behind it, which torch does not copy
    middle, low, high = latency_ratio(made, nn.Sequential(nn.Linear(4, 4)), x, repeats=3)
    assert 0 < low <= middle <= high


@pytest.mark.parametrize("structure", ["unstructured", "block", "filter", "column"])
@pytest.mark.parametrize("density", [1.0, 0.3, 0.01])
def test_products_equal_the_dense_one(structure, density):
    weight, x = sparse_weight(20, 75, density, structure, seed=3), torch.randn(75, 40)
    expected = weight @ x
    found = product(weight, structure)(x)
    if structure == "filter":
        assert len(found) == max(1, round(20 * density))
        expected = expected[weight.any(1)]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_sparse_weights_keep_whole_groups():
    assert int(sparse_weight(20, 75, 0.1, "unstructured").count_nonzero()) == 150
    blocks = sparse_weight(20, 75, 0.1, "block", block=5).view(4, 5, 15, 5).ne(0).sum((1, 3))
    assert sorted(set(blocks.flatten().tolist())) == [0, 25]
    assert int((blocks > 0).sum()) == 6
    assert int(sparse_weight(20, 75, 0.2, "filter").any(1).sum()) == 4
    assert int(sparse_weight(20, 75, 0.2, "column").any(0).sum()) == 15
    assert torch.equal(sparse_weight(20, 75, 0.2, "column", seed=4), sparse_weight(20, 75, 0.2, "column", seed=4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((20, 75, 0.1, "diagonal"), "allowed are unstructured, block, filter, column"),
        ((20, 75, 0.0, "filter"), r"numbers in \(0, 1\]"),
        ((20, 75, 0.1, "block", 4), "must divide both sides of a 20 x 75 weight"),
    ],
)
def test_weights_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparse_weight(*arguments)


@pytest.mark.parametrize("structure", ["unstructured", "block", "filter", "column"])
def test_product_times_table(structure):
    table = product_times(10, 50, 16, [0.5, 0.1], structure, repeats=3)
    assert list(table.columns) == ["structure", "density", "rate", "dense_us", "product_us", "speedup"]
    assert table.rate.tolist() == [2.0, 10.0]
    assert (table[["dense_us", "product_us", "speedup"]] > 0).all(axis=None)


def test_break_even_of_made_up_curves():
    assert break_even([1, 2, 4, 8], [0.25, 0.5, 1.5, 3]) == pytest.approx(2 * 2**0.5)  # halfway in log rate
    assert break_even([8, 1, 4, 2], [3, 0.25, 1.5, 0.5]) == pytest.approx(2 * 2**0.5)  # in any order
    assert break_even([1, 2, 4, 8], [0.5, 1.2, 0.9, 1.1]) == pytest.approx(4 * 2**0.5)  # the last crossing counts
    assert break_even([1, 10], [0.9, 1.9]) == pytest.approx(10**0.1)
    assert break_even([2, 4], [1.0, 2.0]) == 2
    assert break_even([2, 4], [0.5, 1.0]) == pytest.approx(4)
    assert break_even([1, 2, 4], [0.1, 0.5, 0.9]) == inf
    assert break_even([1, 2, 4], [2, 1.5, 0.9]) == inf
    for wrong in (([], []), ([1, 2], [1]), ([0, 1], [1, 1])):
        with pytest.raises(ValueError, match=r"expected as many|positive"):
            break_even(*wrong)
