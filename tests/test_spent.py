"""What training computes: the meter against sums by hand."""

from copy import deepcopy
from dataclasses import replace

import pandas as pd
import pytest
import torch

from lib import channels, costs, layers, models, pruning, quantization, recipes, shapes, training
from lib.constraint import attach_masks, state_of
from lib.data import Split
from lib.keys import code
from lib.models import build
from lib.pruning import Unstructured, uniform_plan
from lib.training import Hook, TrainingError, cached, fit, metered
from lib.training.spent import Meter

OPTIONS = {"lr": 0.05, "batch_size": 100}


def by_product(spent):
    return spent.groupby("product")["macs"].sum()


@pytest.mark.parametrize("name", ["lenet5", "vgg", "resnet8"])
def test_a_dense_run_costs_three_forward_passes_less_the_first_input_gradient(images, name):
    net = build(name, images.shape, images.classes)
    table = shapes.macs(net, images.shape).set_index("layer")["dense_macs"]
    _, spent = metered(net, fit, images, epochs=1, **OPTIONS)
    total, n = by_product(spent), len(images.train)
    assert total["forward"] == n * table.sum() == total["weight_gradient"]
    assert total["input_gradient"] == n * (table.sum() - table.iloc[0])
    assert set(spent["layer"]) == set(table.index)


def test_masks_count_at_their_density_and_plain_zeros_do_not(images, net):
    masks = recipes.one_shot(net, uniform_plan(net, Unstructured(0.9)))
    _, dense = metered(deepcopy(net), fit, images, epochs=1, **OPTIONS)
    _, sparse = metered(attach_masks(deepcopy(net), masks), fit, images, epochs=1, **OPTIONS)
    for layer, mask in masks.items():
        share = sparse[sparse["layer"] == layer]["macs"].sum() / dense[dense["layer"] == layer]["macs"].sum()
        assert share == pytest.approx(float(mask.float().mean()))
    with torch.no_grad():
        net.fc1.weight.zero_()
    assert metered(net, fit, images, epochs=1, **OPTIONS)[1]["macs"].sum() == dense["macs"].sum()


def test_frozen_weights_have_no_gradient(images, net):
    net.fc2.requires_grad_(False)
    _, spent = metered(net, fit, images, epochs=1, **OPTIONS)
    assert {*spent.loc[spent["layer"] == "fc2", "product"]} == {"forward", "input_gradient"}
    assert {*spent.loc[spent["layer"] == "fc3", "product"]} == {"forward", "input_gradient", "weight_gradient"}


@pytest.mark.parametrize("way", [layers.checkpointed, layers.reversible])
def test_a_pass_that_is_made_again_has_one_backward_pass(images, way):
    few = replace(images.train, x=images.train.x[:100], y=images.train.y[:100])
    nets = [models.spiking((1, 28, 28), 10, width=4, steps=3, over_time=over) for over in (models.stored, way)]
    stored, again = (by_product(metered(one, fit, replace(images, train=few), epochs=1, **OPTIONS)[1]) for one in nets)
    assert (again[["input_gradient", "weight_gradient"]] == stored[["input_gradient", "weight_gradient"]]).all()
    assert stored["forward"] < again["forward"] <= 2 * stored["forward"]


def test_a_smaller_network_costs_what_its_shapes_say(images):
    net = build("vgg", images.shape, images.classes, width=8)
    masks = recipes.one_shot(net, uniform_plan(net, pruning.Filter(0.5), keep_dense=("fc",)))
    small = channels.compact(
        channels.paths.zeroed(net, channels.follow(net, masks, images.train.x[:1])), images.train.x[:1]
    )
    _, spent = metered(small, fit, images, epochs=1, **OPTIONS)
    assert by_product(spent)["forward"] == len(images.train) * shapes.macs(small, images.shape)["dense_macs"].sum()
    assert by_product(spent)["forward"] < 0.35 * len(images.train) * shapes.macs(net, images.shape)["dense_macs"].sum()


def test_looks_at_the_network_cost_nothing(images, net):
    class Look(Hook):
        def after_epoch(self, model, epoch):
            training.evaluate(model, images.validation)
            with training.uncounted():
                training.recalibrate(deepcopy(model).train(), images)
                deepcopy(model).train()(images.train.x[:10])

    _, plain = metered(deepcopy(net), fit, images, epochs=1, **OPTIONS)
    _, watched = metered(deepcopy(net), fit, images, epochs=1, hooks=(Look(),), **OPTIONS)
    pd.testing.assert_frame_equal(plain, watched)


def test_every_recipe_can_be_metered(images, net):
    """ADMM's pull, straight-through and iterative pruning: as many passes as epochs, at the density that was live."""
    plan = uniform_plan(net, Unstructured(0.9))
    _, once = metered(deepcopy(net), fit, images, epochs=1, **OPTIONS)
    _, spent = metered(deepcopy(net), recipes.admm, plan, images, epochs=2, rho=0.01, **OPTIONS)
    assert spent["macs"].sum() == 2 * once["macs"].sum()
    plans = [uniform_plan(net, Unstructured(s)) for s in (0.5, 0.75)]
    start = state_of(net)
    _, spent = metered(deepcopy(net), recipes.iterative, plans, images, start, epochs=1, **OPTIONS)
    assert spent["macs"].sum() == pytest.approx(0.5 * once["macs"].sum(), rel=1e-3)  # the round inside the first mask


def test_a_weight_that_is_frozen_at_a_level_is_multiplied_and_has_no_gradient(images, net):
    net.fc1.weight.data[:60] = 0  # what is zero at first stays: a fifth is removed
    plan = {name: quantization.Levels(3) for name in ("fc1", "fc2")}
    _, once = metered(deepcopy(net), fit, images, epochs=1, **OPTIONS)
    _, spent = metered(net, recipes.partial_hardening, plan, images, shares=(0.5, 1.0), epochs=1, **OPTIONS)
    dense, spent = (each.groupby(["layer", "product"])["macs"].sum() for each in (once, spent))
    assert spent["fc3"].tolist() == (2 * dense["fc3"]).tolist()
    for name, there in (("fc1", 0.8), ("fc2", 1.0)):
        assert spent[name]["forward"] == pytest.approx(2 * there * dense[name]["forward"])
        assert spent[name]["weight_gradient"] == pytest.approx(0.5 * there * dense[name]["weight_gradient"], rel=1e-3)
    assert spent["fc2"]["input_gradient"] == 2 * dense["fc2"]["input_gradient"]


def test_nothing_is_left_behind_and_a_second_meter_counts_alike(images, net):
    first = metered(net, fit, images, epochs=1, **OPTIONS)[1]
    assert not any(layer._forward_hooks for layer in net.modules())
    pd.testing.assert_frame_equal(first, metered(net, fit, images, epochs=1, **OPTIONS)[1])

    def fails(model, **_):
        model(images.train.x[:10])
        raise RuntimeError("out")

    with pytest.raises(RuntimeError, match="out"):
        metered(net, fails)
    assert not any(layer._forward_hooks for layer in net.modules())
    assert not training.spent._open


def test_what_was_counted_comes_back_from_the_cache(images, net):
    again = deepcopy(net)
    log, spent = cached(metered, net, fit, images, epochs=1, **OPTIONS)
    log_again, spent_again = cached(metered, again, fit, images, epochs=1, **OPTIONS)
    pd.testing.assert_frame_equal(log, log_again)
    pd.testing.assert_frame_equal(spent, spent_again)
    assert torch.equal(net.fc1.weight, again.fc1.weight)
    third = build("lenet300", images.shape, images.classes, seed=1)
    cached(metered, third, recipes.rigl, uniform_plan(third, Unstructured(0.5)), images, epochs=1, **OPTIONS)
    assert not torch.equal(third.fc1.weight, net.fc1.weight)  # another recipe is another entry


def test_energy_is_the_bit_product_rule(images, net):
    spent = pd.DataFrame(
        [("a", "forward", 32, 32, 10.0), ("a", "weight_gradient", 4, 16, 16.0)],
        columns=["layer", "product", "bits_a", "bits_b", "macs"],
    )
    priced = costs.training_energy(spent)
    assert priced["equivalent_macs"].tolist() == [10.0, 1.0]
    assert priced["energy_J"].tolist() == pytest.approx([4.6e-11, 4.6e-12])


# --- the loop: skipping, stopping, going on ---------------------------------------------------------------------------


class Stop(Hook):
    def __init__(self, at):
        self.at = at

    def stops(self, model, step):
        return step == self.at


class Skip(Hook):
    def __init__(self, steps):
        self.steps, self.taken = steps, []

    def skips(self, model, step):
        return step in self.steps

    def before_step(self, model, step):
        self.taken.append(step)


def test_a_run_that_stops_and_goes_on_is_the_same_run_without_momentum(images, net):
    """Also within an epoch: the same batches at the same learning rates."""
    plain = OPTIONS | {"epochs": 3, "momentum": 0.0, "schedule": "cosine"}
    whole, halves = deepcopy(net), deepcopy(net)
    fit(whole, images, **plain)
    log = fit(halves, images, hooks=(Stop(13),), **plain)
    assert log[["epoch", "images"]].values.tolist() == [[1, 1000], [2, 300]]
    log = fit(halves, images, start=13, **plain)
    assert log[["epoch", "images"]].values.tolist() == [[2, 700], [3, 1000]]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


def test_a_skipped_batch_moves_nothing(images, net):
    """Not even momentum or weight decay; an epoch without a batch has no row."""
    hook, start = Skip(set(range(10)) | {11, 13}), deepcopy(net)
    log = fit(net, images, epochs=2, weight_decay=0.1, hooks=(hook,), **OPTIONS)
    assert hook.taken == [10, 12, *range(14, 20)]
    assert log[["epoch", "images"]].values.tolist() == [[2, 800]]
    log = fit(start, images, epochs=1, weight_decay=0.1, hooks=(Skip(set(range(10))),), **OPTIONS)
    assert log.empty
    assert torch.equal(start.fc1.bias, build("lenet300", images.shape, images.classes, seed=1).fc1.bias)


def test_stopping_at_once_leaves_the_network_as_it_was(images, net):
    start = deepcopy(net)
    assert fit(net, images, epochs=1, hooks=(Stop(0),), **OPTIONS).empty
    assert torch.equal(start.fc1.weight, net.fc1.weight)


def test_recalibration_gives_the_plain_average_of_batches(images):
    net = build("vgg", images.shape, images.classes, width=4)
    weights = {n: p.clone() for n, p in net.named_parameters()}
    training.recalibrate(net, images, batch_size=250, batches=4)
    outputs = net.conv1_1(images.train.x).transpose(0, 1).flatten(1)
    assert torch.allclose(net.bn1_1.running_mean, outputs.mean(1), atol=1e-4)  # of batches of one size, of all images
    assert net.bn1_1.momentum == 0.1
    assert all(torch.equal(weights[n], p) for n, p in net.named_parameters())


def test_recalibration_sees_all_classes_where_data_lie_class_by_class(images):
    y = torch.arange(10).repeat_interleave(30)
    sort = Split(torch.randn(300, 4, generator=torch.Generator().manual_seed(0)) + 5.0 * y[:, None], y)
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 10))
    for batches in (10, 3):  # of 30; the first three hold three classes
        training.recalibrate(net, replace(images, train=sort), batch_size=30, batches=batches)
        assert torch.allclose(net[0].running_var, sort.x.var(0), rtol=0.25)
        assert torch.allclose(net[0].running_mean, sort.x.mean(0), rtol=0.15)


def test_a_layer_that_is_trained_and_never_called_is_named(images, bypassed):
    with pytest.raises(TrainingError, match="fc was trained, but never called in training mode"):
        metered(bypassed, fit, images, epochs=1, lr=0.01)
    bypassed.fc.requires_grad_(False)
    with Meter(bypassed) as meter:
        bypassed(images.test.x[:5])
    assert meter.frame().empty


def test_an_open_meter_is_no_part_of_a_key(net):
    before = code(recipes.rigl), code(metered)
    with Meter(net):
        assert (code(recipes.rigl), code(metered)) == before
