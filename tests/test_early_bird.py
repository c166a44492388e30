"""Early-Bird tickets: distances, the drawing point, and the network that is left."""

from copy import deepcopy

import pytest
import torch

from lib import pruning
from lib.models import build
from lib.recipes import channels_by_norm, drawing_point, early_bird, mask_distances, norms_of_channels, ticket
from lib.shapes import prunable
from lib.training import Hook, TrainingError, cached, evaluate, fit

OPTIONS = {"lr": 0.05, "batch_size": 100, "epochs": 3}


@pytest.fixture(scope="session")
def images(small_images):
    return small_images


@pytest.fixture
def vgg(images):
    return build("vgg", images.shape, images.classes, seed=1, width=4)


def spread_scales(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data = torch.rand(module.num_features, generator=generator)
            module.bias.data = torch.randn(module.num_features, generator=generator) / 10
    return net


def test_distances_are_shares_of_entries_that_differ():
    masks = torch.rand(6, 40) < 0.5
    found = mask_distances(masks)
    for i in range(6):
        for j in range(6):
            assert float(found[i, j]) == pytest.approx(float((masks[i] ^ masks[j]).float().mean()), abs=1e-6)


@pytest.mark.parametrize("p", [0.3, 0.5, 0.9])
def test_independent_masks_are_2p_1_minus_p_apart(p):
    masks = torch.rand(2, 400_000, generator=torch.Generator().manual_seed(1)) < 1 - p
    assert float(mask_distances(masks)[0, 1]) == pytest.approx(2 * p * (1 - p), abs=0.005)


def test_the_ticket_is_drawn_when_the_last_few_agree_and_not_before():
    n = 100
    masks = torch.zeros(9, n, dtype=torch.bool)
    masks[:3, :50] = True  # three of one kind, then another for good
    masks[3:, :30] = True
    assert drawing_point(masks, window=5, tolerance=0.1) == 7  # of 3 to 7
    assert drawing_point(masks, window=5, tolerance=0.2) == 4  # all are that near, but five must have been seen
    assert drawing_point(masks[:7], window=5, tolerance=0.1) is None
    masks[7, 60:71] = True  # 11 entries more
    assert drawing_point(masks, window=5, tolerance=0.1) is None


def test_the_tolerance_itself_is_near_enough():
    masks = torch.zeros(2, 10, dtype=torch.bool)
    masks[1, 0] = True
    assert drawing_point(masks, window=2, tolerance=0.1) == 1


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5])
def test_channels_are_ranked_in_all_layers_together(vgg, images, sparsity):
    norms = norms_of_channels(spread_scales(vgg), images.train.x[:1])
    stay = torch.cat([*channels_by_norm(vgg, norms, sparsity).values()])
    scales = torch.cat([vgg.get_submodule(norm).weight.detach() for norm in norms.values()])
    assert int((~stay).sum()) == (0 if sparsity == 0 else int(sparsity * len(stay)) + 1)
    assert scales[~stay].max() <= scales[stay].min() if sparsity else stay.all()


def test_no_layer_is_emptied(vgg, images):
    norms = norms_of_channels(vgg, images.train.x[:1])
    spread_scales(vgg).bn2_1.weight.data *= 1e-6
    stay = channels_by_norm(vgg, norms, 0.7)
    assert int(stay["conv2_1"].sum()) == 1
    assert stay["conv2_1"][vgg.bn2_1.weight.abs().argmax()]


def test_the_ticket_is_the_network_without_those_channels(vgg, images):
    """Checked against the network in which their scales and shifts are zero."""
    norms = norms_of_channels(spread_scales(vgg), images.train.x[:1])
    channels = channels_by_norm(vgg, norms, 0.5)
    small, silenced = ticket(vgg, channels, images.train.x[:1]).eval(), deepcopy(vgg).eval()
    for conv, norm in norms.items():
        silenced.get_submodule(norm).weight.data[~channels[conv]] = 0
        silenced.get_submodule(norm).bias.data[~channels[conv]] = 0
    x = images.test.x[:50]
    assert torch.allclose(small(x), silenced(x), atol=1e-5)
    assert [len(prunable(small)[c].weight) for c in channels] == [int(s.sum()) for s in channels.values()]
    fit(small, images, **OPTIONS)  # it trains like any network


def test_residual_channels_are_left_alone(images):
    net = spread_scales(build("resnet8", images.shape, images.classes, width=8))
    norms = norms_of_channels(net, images.train.x[:1])
    small = ticket(net, channels_by_norm(net, norms, 0.7), images.train.x[:1])
    assert small.block1_1.conv1.out_channels < 8
    assert [len(small.get_submodule(n).weight) for n in ("conv1", "block1_1.conv2")] == [8, 8]


def test_training_ends_where_the_ticket_is_drawn(vgg, images):
    """At the weights that a run of as many batches has."""
    plain = deepcopy(vgg)
    found = early_bird(vgg, images, sparsity=0.5, checks=5, window=3, tolerance=0.45, pull=0.0, **OPTIONS)
    masks, steps, end = found
    assert steps == [*range(0, end + 1, 2)]
    assert end == steps[drawing_point(masks, 3, 0.45)] < 30
    whole, _, last = early_bird(deepcopy(plain), images, sparsity=0.5, checks=5, pull=0.0, draw=False, **OPTIONS)
    assert last == 30
    assert len(whole) == 15
    assert torch.equal(whole[: len(masks)], masks)
    log = fit(plain, images, hooks=(Stop(end),), **OPTIONS)
    assert int(log["images"].sum()) == 100 * end
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), vgg.parameters(), strict=True))


class Stop(Hook):
    def __init__(self, at):
        self.at = at

    def stops(self, model, step):
        return step == self.at


def test_a_ticket_that_is_never_drawn_is_the_whole_run(vgg, images):
    masks, steps, end = early_bird(vgg, images, sparsity=0.5, window=3, tolerance=0.0, **OPTIONS)
    assert (len(masks), steps, end) == (3, [0, 10, 20], 30)


def test_the_pull_shrinks_scales(vgg, images):
    sums = []
    for pull in (0.0, 0.02):
        net = deepcopy(vgg)
        early_bird(net, images, sparsity=0.5, pull=pull, draw=False, **OPTIONS)
        sums.append(
            sum(float(m.weight.detach().abs().sum()) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
        )
    assert sums[1] < sums[0]


def test_frozen_scales_are_not_pulled(vgg, images):
    vgg.bn1_1.requires_grad_(False)
    masks, _, _ = early_bird(vgg, images, sparsity=0.5, draw=False, **OPTIONS)
    assert len(masks) == 3
    assert (vgg.bn1_1.weight == 1).all()


def test_the_same_detector_for_magnitude(net, images):
    plan = pruning.uniform_plan(net, pruning.Unstructured(0.5))
    masks, _, _ = early_bird(net, images, plan=plan, draw=False, **OPTIONS)
    assert masks.shape == (3, sum(layer.weight.numel() for layer in prunable(net).values()))
    assert masks.float().mean() == pytest.approx(0.5, abs=1e-3)
    distances = mask_distances(masks)
    assert distances[1, 2] < distances[0, 2] < 0.5  # they settle; masks that know nothing of each other are 0.5 apart


def test_it_comes_back_from_the_cache(vgg, images):
    again, options = deepcopy(vgg), {"sparsity": 0.5, "draw": False} | OPTIONS
    first, second = (cached(early_bird, n, images, **options) for n in (vgg, again))
    assert torch.equal(first[0], second[0])
    assert first[1:] == second[1:]
    assert evaluate(vgg, images.test) == evaluate(again, images.test)


def test_what_is_refused(net, vgg, images):
    plan = pruning.uniform_plan(net, pruning.Unstructured(0.5))
    with pytest.raises(TrainingError, match="give one of the two"):
        early_bird(net, images, **OPTIONS)
    with pytest.raises(TrainingError, match="give one of the two"):
        early_bird(net, images, sparsity=0.5, plan=plan, **OPTIONS)
    with pytest.raises(TrainingError, match=r"checks=11.*1 to 10 checks"):
        early_bird(net, images, plan=plan, checks=11, **OPTIONS)
    with pytest.raises(TrainingError, match="checks=1 an epoch of 10 batches, and none before batch 3"):
        early_bird(net, images, plan=plan, start=1, stop=3, **OPTIONS)
    with pytest.raises(TrainingError, match="no convolution of the model has channels"):
        early_bird(net, images, sparsity=0.5, **OPTIONS)
    with pytest.raises(TrainingError, match=r"sparsity = 1.0: allowed are numbers in \[0, 1\)"):
        early_bird(vgg, images, sparsity=1.0, **OPTIONS)
