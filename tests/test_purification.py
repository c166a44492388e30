"""Purification: what counts as nearly empty, and that accuracy holds."""

from copy import deepcopy

import pytest
import torch

from lib.channels import follow
from lib.constraint import attach_masks, harden, weights
from lib.models import build
from lib.pruning import Column, FilterColumn, uniform_plan
from lib.recipes import purify
from lib.recipes.purification import _input_channels, _scores
from lib.shapes import prunable
from lib.training import TrainingError, evaluate, fit


@pytest.fixture(scope="module")
def pruned(images):
    net = build("lenet5", images.shape, images.classes, seed=1)
    fit(net, images, epochs=4, lr=0.03)
    harden(net, uniform_plan(net, FilterColumn(0.3, 0.5)) | {"fc2": Column(0.5)})
    return net


def test_scores_by_hand(images):
    net = build("lenet5", images.shape, images.classes)
    with torch.no_grad():
        net.conv2.weight.zero_()
        net.conv2.weight[:, 3, 0, :2] = 2.0  # 2 of 25 columns, 50 filters
        net.fc1.weight.zero_()
        net.fc1.weight[7, 16 * 4 + 5] = 3.0  # one of the 16 columns of channel 4
    channels = dict(_input_channels(net, images.test.x[:1]))
    assert set(channels) == {"conv2", "fc1", "fc2"}
    empty, importance = _scores(net.conv2.weight.detach(), channels["conv2"])
    assert empty[3] == pytest.approx(23 / 25)
    assert importance[3] == 2 * 50 * 4
    assert (empty[:3] == 1).all()
    empty, importance = _scores(net.fc1.weight.detach(), channels["fc1"])
    assert (float(empty[4]), float(importance[4]), len(empty)) == (15 / 16, 9.0, 50)


@pytest.mark.parametrize("drop", [0.0, 2.0])
def test_accuracy_holds_and_weights_go(pruned, images, drop):
    before = deepcopy(pruned.state_dict())
    x = images.test.x[:1]
    masks = purify(pruned, x, images.validation, drop)
    assert all(torch.equal(v, before[n]) for n, v in pruned.state_dict().items())
    alone = attach_masks(deepcopy(pruned), follow(pruned, _nonzero(pruned), x))
    net = attach_masks(deepcopy(pruned), masks)
    assert evaluate(net, images.validation) >= evaluate(alone, images.validation) - drop / 100
    left, free = (sum(int(w.count_nonzero()) for w in weights(n, prunable(n)).values()) for n in (net, alone))
    assert left < free if drop else left <= free
    gone = set(_whole_channels(net)) - set(_whole_channels(alone))
    assert gone or not drop
    again = follow(net, {n: m for n, m in masks.items() if n in prunable(net)}, x)
    assert all(torch.equal(again[n], masks[n]) for n in prunable(net))  # a fixed point


def _nonzero(net):
    return {n: layer.weight != 0 for n, layer in prunable(net).items()}


def _whole_channels(net):
    return [(n, c) for n in ("conv2", "fc1", "fc2") for c in _removed(prunable(net)[n].weight)]


def _removed(weight):
    return (
        (~weight.flatten(2).bool().any(2).any(0) if weight.dim() == 4 else ~weight.bool().any(0))
        .nonzero()
        .flatten()
        .tolist()
    )


def test_a_residual_network(small_images):
    images = small_images
    net = build("resnet8", images.shape, images.classes, seed=1, width=4)
    fit(net, images, epochs=1, lr=0.05)
    harden(net, uniform_plan(net, Column(0.6), keep_dense=("conv1", "fc")))
    masks = purify(net, images.test.x[:1], images.validation, 5.0)
    pure = attach_masks(deepcopy(net), masks)
    assert evaluate(pure, images.validation) >= evaluate(net, images.validation) - 0.05
    assert sum(int(m.sum()) for n, m in masks.items() if n in prunable(net)) < sum(
        int(m.sum()) for m in _nonzero(net).values()
    )


@pytest.mark.parametrize(("drop", "emptiness"), [(-1.0, (0.5,)), (1.0, (2.0,)), (1.0, ())])
def test_bad_thresholds_are_named(pruned, images, drop, emptiness):
    with pytest.raises(TrainingError, match="purify"):
        purify(pruned, images.test.x[:1], images.validation, drop, emptiness)
