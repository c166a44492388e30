"""Budgets: totals are kept, the search lowers the loss, and bad questions are named."""

from copy import deepcopy
from itertools import product

import pytest
import torch

from lib.constraint import attach_masks, fitted, harden, kept, weights
from lib.pruning import LayerAdaptive, Unstructured, uniform_plan
from lib.quantization import Levels, Quantized
from lib.recipes import one_shot, progressive, search_budgets, search_rate
from lib.recipes.budgets import _loss, _moved
from lib.shapes import prunable
from lib.training import TrainingError, cached, evaluate, fit

TRAIN = {"epochs": 2, "lr": 0.05, "seed": 3}


@pytest.fixture
def trained(net, images):
    fit(net, images, epochs=4, lr=0.05)
    return net


def after_a_trial(net, images, sparsities):
    copy = deepcopy(net)
    attach_masks(copy, one_shot(copy, {n: Unstructured(s) for n, s in sparsities.items()}))
    fit(copy, images, **TRAIN)
    return _loss(copy, images), evaluate(copy, images.validation)


def total(net, sparsities):
    return sum(kept(s, prunable(net)[n].weight.numel()) for n, s in sparsities.items())


def test_search_lowers_the_loss_at_the_same_total(trained, images):
    before = deepcopy(trained.state_dict())
    start = {n: c.sparsity for n, c in fitted(trained, uniform_plan(trained, LayerAdaptive(40))).items()}
    found = search_budgets(trained, images, 40, trials=12, **TRAIN)
    assert all(torch.equal(before[n], v) for n, v in trained.state_dict().items())
    assert total(trained, found) == pytest.approx(266_200 / 40, abs=5)
    assert after_a_trial(trained, images, found)[0] < after_a_trial(trained, images, start)[0]
    assert found == cached(search_budgets, trained, images, 40, trials=12, **TRAIN)


def test_trials_are_bounded_and_one_gives_lamp(trained, images):
    seen = []
    found = search_budgets(trained, images, 50, trials=1, progress=lambda share, text: seen.append(share), **TRAIN)
    assert seen == [0.5, 1.0, 1.0]  # two epochs, and the end
    assert found == {n: c.sparsity for n, c in fitted(trained, uniform_plan(trained, LayerAdaptive(50))).items()}


def test_moves_keep_the_total():
    sizes = {"a": 100, "b": 1000, "c": 50}
    start = {"a": 10.0, "b": 40.0, "c": 20.0}
    for layer in sizes:
        for factor in (0.25, 2.0):
            moved = _moved(start, layer, factor, sizes)
            assert moved[layer] == min(factor * start[layer], 68)
            assert sum(moved.values()) == pytest.approx(70, abs=1)
    assert _moved(start, "c", 4.0, sizes)["c"] == 50


def test_what_full_layers_cannot_take_the_others_get():
    """LeNet-5 at 4x has convolutions that are nearly full: no move changes how many weights are kept in all."""
    sizes = {"conv1": 500, "conv2": 25_000, "fc1": 400_000, "fc2": 5000}
    start = {"conv1": 500.0, "conv2": 20_000.0, "fc1": 82_125.0, "fc2": 5000.0}
    for layer, factor in product(sizes, (1e-6, 0.25, 0.5, 2.0, 100.0)):
        moved = _moved(start, layer, factor, sizes)
        assert sum(moved.values()) == pytest.approx(sum(start.values()), abs=1e-6)
        assert all(1 <= k <= sizes[n] for n, k in moved.items())
        assert [*moved] == [*sizes]
    few = {"a": 1.0, "b": 1.5, "c": 900.0}
    assert _moved(few, "c", 1.1, dict.fromkeys(few, 1000)) == pytest.approx({"a": 1.0, "b": 1.0, "c": 900.5})
    assert _moved({"a": 50.0}, "a", 2.0, {"a": 100}) == {"a": 50.0}


def test_rate_for_an_accuracy(trained, images):
    """Bisection: the rate reached the accuracy, and the next of the 32 between 1 and 1000 did not."""
    target = 0.8 * evaluate(trained, images.validation)
    reached = search_rate(trained, images, target, trials=5, **TRAIN)
    assert 1 < reached < 1000 ** (31 / 32)
    for rate, enough in ((reached, True), (reached * 1000 ** (1 / 32), False)):
        at = {n: c.sparsity for n, c in fitted(trained, uniform_plan(trained, LayerAdaptive(rate))).items()}
        assert (after_a_trial(trained, images, at)[1] >= target) == enough
    assert search_rate(trained, images, 0.999, trials=2, **TRAIN) == 1.0


@pytest.mark.parametrize("options", [{"trials": 0}, {"step": 1.0}])
def test_bad_searches_are_named(trained, images, options):
    with pytest.raises(TrainingError, match="search_budgets"):
        search_budgets(trained, images, 10, **options, **TRAIN)
    with pytest.raises(TrainingError, match="search_rate"):
        search_rate(trained, images, 1.5, **TRAIN)


class TestProgressive:
    SEARCH, RETRAIN = {"epochs": 2, "lr": 0.03, "rho": 0.02}, {"epochs": 1, "lr": 0.03}

    def test_rising_rates_then_falling_bits(self, trained, images):
        plans = [
            uniform_plan(trained, LayerAdaptive(4)),
            uniform_plan(trained, LayerAdaptive(10)),
            uniform_plan(trained, Quantized(LayerAdaptive(10), Levels(4))),
            uniform_plan(trained, Quantized(LayerAdaptive(10), Levels(1))),
        ]
        at_once = evaluate(harden(deepcopy(trained), fitted(trained, plans[-1])), images.validation)
        log = progressive(trained, plans, images, search=self.SEARCH, retrain=self.RETRAIN)
        assert log["step"].unique().tolist() == [1, 2, 3, 4]
        left = weights(trained, plans[0])
        assert sum(int(w.count_nonzero()) for w in left.values()) <= 26_620
        assert all(len(w[w != 0].abs().unique()) == 1 for w in left.values())
        assert evaluate(trained, images.validation) > at_once

    def test_a_chain_goes_on_where_it_stopped(self, trained, images):
        plans = [uniform_plan(trained, LayerAdaptive(rate)) for rate in (4, 10)]
        apart = deepcopy(trained)
        progressive(trained, plans[:1], images, search=self.SEARCH, retrain=self.RETRAIN)
        first = {n: w != 0 for n, w in weights(trained, plans[0]).items()}
        progressive(trained, plans[1:], images, search=self.SEARCH, retrain=self.RETRAIN)
        assert all(not w[~first[n]].any() for n, w in weights(trained, plans[0]).items())
        progressive(apart, plans, images, search=self.SEARCH, retrain=self.RETRAIN)
        assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), apart.parameters(), strict=True))
