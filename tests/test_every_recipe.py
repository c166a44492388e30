"""What holds for all recipes alike: how they take hooks, seeds and progress, what they leave, and what they refuse."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lib import pruning, quantization, recipes
from lib.constraint import ConstraintError, attach_masks, harden, masks, plain, state_of
from lib.data import Data, Split
from lib.faults import StuckAt, UnderFaults
from lib.layers import skippable
from lib.models import Recurrent, build, fused
from lib.pruning import Unstructured
from lib.shapes import ShapeError, prunable
from lib.sharing import Codebook
from lib.training import Hook, TrainingError, cached, evaluate, fit


class Net(nn.Module):
    """Two convolutions with batch norms, a linear layer, and one that the forward pass never meets."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.two, self.behind = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.out, self.unmet = nn.Linear(16, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.one(x)).relu()
        return self.out(self.behind(self.two(x)).relu().flatten(1))


def split_of(n):
    generator = torch.Generator().manual_seed(n)
    return Split(torch.randn(n, 1, 6, 6, generator=generator), torch.arange(n) % 3)


FEW = Data("few", split_of(40), split_of(20), split_of(20), 3)
FIT = {"lr": 0.05, "batch_size": 20}
LAYERS = ("one", "two", "out")


def plan(constraint=None, layers=LAYERS):
    return dict.fromkeys(layers, constraint or Unstructured(0.5))


def plans(layers):
    return [plan(Unstructured(s), layers) for s in (0.25, 0.5)]


def inside(net, layers, **options):
    net = harden(net, plan(quantization.binary(), layers)) if all(n in prunable(net) for n in layers) else net
    return recipes.retrain_inside(net, plan(quantization.binary(), layers), FEW, epochs=1, **options)


def grow(recipe, **more):
    steps = {"rounds": 1, "epochs": 1, "tune_epochs": 1} | more
    return lambda net, layers, **o: recipe(net, plan(None, layers), FEW, parts=min(2, len(layers)), **steps, **o)


r, values = recipes, quantization.Levels(2)
RUNS = {
    "admm": lambda net, layers, **o: r.admm(net, plan(None, layers), FEW, epochs=2, **o),
    "alternating": lambda net, layers, **o: r.alternating(net, plan(values, layers), FEW, epochs=2, **o),
    "deep_kmeans": lambda net, layers, **o: r.deep_kmeans(
        net, plan(Codebook(2), layers), FEW, epochs=2, strength=0.1, **o
    ),
    "e2_train": lambda net, layers, **o: r.e2_train(net, FEW, epochs=3, drop=0.2, signs=True, **o),
    "early_bird": lambda net, layers, **o: r.early_bird(net, FEW, epochs=3, sparsity=0.5, window=2, tolerance=1.0, **o),
    "gradual": lambda net, layers, **o: r.gradual(net, plans(layers), FEW, epochs=3, **o),
    "grow_and_prune": grow(recipes.grow_and_prune),
    "iterative": lambda net, layers, **o: r.iterative(net, plans(layers), FEW, state_of(net), epochs=1, **o),
    "parallel_grow_and_prune": grow(recipes.parallel_grow_and_prune, processes=1),
    "partial_hardening": lambda net, layers, **o: r.partial_hardening(
        net, plan(values, layers), FEW, shares=(0.3, 0.5), epochs=1, **o
    ),
    "progressive": lambda net, layers, **o: r.progressive(
        net, [*plans(layers), plan(values, layers)], FEW, search={"epochs": 1}, retrain={"epochs": 1}, **o
    ),
    "prune_and_tune": lambda net, layers, **o: r.prune_and_tune(net, plans(layers), FEW, dense_epochs=1, epochs=1, **o),
    "prune_without_data": lambda net, layers, **o: r.prune_without_data(
        net, plan(None, layers), FEW.train.x, epochs=2, **o
    ),
    "retrain_inside": inside,
    "reweighted": lambda net, layers, **o: r.reweighted(
        net, plan(pruning.Filter(0.5), layers), FEW, strength=0.1, epochs=1, **o
    ),
    "rigl": lambda net, layers, **o: r.rigl(net, plan(None, layers), FEW, epochs=2, interval=1, **o),
    "search_budgets": lambda net, layers, **o: r.search_budgets(net, FEW, 2.0, trials=3, epochs=1, **o),
    "search_rate": lambda net, layers, **o: r.search_rate(net, FEW, 0.3, trials=2, highest=4.0, epochs=1, **o),
    "search_strength": lambda net, layers, **o: r.search_strength(
        net, plan(pruning.Filter(0.5), layers), FEW, trials=2, epochs=1, **o
    ),
    "static": lambda net, layers, **o: r.static(net, plan(None, layers), FEW, epochs=1, **o),
    "straight_through": lambda net, layers, **o: r.straight_through(net, plan(values, layers), FEW, epochs=1, **o),
}
NO_TRAINING = {
    *("MiniBatchDropping", "ScalePull", "channels_by_norm", "contiguous_parts", "drawing_point", "layer_weights"),
    *("mask_distances", "norms_of_channels", "one_shot", "predictive_signs", "purify", "random_masks", "rewind"),
    *("snapped", "split", "ticket"),
}
FEDERATED = {"fed_avg", "local_clients"}  # whose clients are recipes, with options of their own
NO_TRAINING |= {"FixedPoint", "Server", "dirichlet_split", "dropouts", "group_split", "in_shares", "layer_errors"}
NO_TRAINING |= {"low_precision", "synthetic_inputs"}  # which trains inputs
PLANNED = [name for name in RUNS if name not in ("e2_train", "early_bird", "search_budgets", "search_rate")]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def run(name, net, layers=LAYERS, **options):
    return RUNS[name](net, layers, **FIT | options)


def test_all_recipes_are_here():
    assert {*RUNS} | NO_TRAINING | FEDERATED == {*recipes.__all__}


class Gates(nn.Module):
    """Rows of an image as the frames of a GRU, whose gates are layers."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = Recurrent("GRU", 6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.rnn(x[:, 0])[0][:, -1])


GATES = ("rnn.layer1.ih_new", "rnn.layer1.hh_reset", "rnn.layer1.hh_new")


@pytest.mark.parametrize("name", PLANNED)
def test_gates_are_layers_like_others(name):
    """Those of the plan end with half of their weights or few values, masks on others stay, torch's module takes it."""
    torch.manual_seed(0)
    net = attach_masks(Gates(), {"rnn.layer1.ih_reset": torch.arange(48).view(8, 6) % 2 == 0})
    before = masks(net)
    run(name, net, GATES)
    assert {n: mask.tolist() for n, mask in masks(net).items() if n in before} == {
        n: mask.tolist() for n, mask in before.items()
    }
    if name not in ("deep_kmeans", "search_strength"):  # which leave the last step to others
        for weight in (prunable(net)[gate].weight for gate in GATES):
            assert 2 * weight.count_nonzero() == weight.numel() or len(weight.unique()) <= 5
    x = FEW.test.x[:, 0]
    assert torch.allclose(fused(plain(net).rnn)(x)[0], net.rnn(x)[0], atol=1e-5)


class Count(Hook):
    """What was called, and a number that tells one order of images from another."""

    def __init__(self):
        self.begun = self.ended = 0
        self.seen = []

    def begin(self, model, optimizer):
        self.begun += 1

    def end(self, model):
        self.ended += 1

    def after_backward(self, model, step):
        self.seen.append(float(model.out.bias.grad.sum() + model.out.bias.grad[0]))


def structure(net):
    """All but the values: modules, their modes and hooks, names of parameters, masks."""
    kinds = [
        (name, type(m).__name__, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
        for name, m in net.named_modules()
    ]
    held = {name: mask.tolist() for name, mask in masks(net).items()}
    return kinds, sorted(net.state_dict()), {n: p.requires_grad for n, p in net.named_parameters()}, held


@pytest.mark.parametrize("name", RUNS)
def test_hooks_seed_and_progress(name, net):
    count, said, before = Count(), [], structure(net.eval())
    hooks = (UnderFaults("differential", StuckAt(0.02)), count)
    run(name, net, hooks=hooks, seed=3, progress=lambda done, text: said.append(done))
    assert count.begun == count.ended > 0
    assert len(count.seen) > 0
    assert said == sorted(said)
    assert said[0] >= 0
    assert said[-1] == pytest.approx(1)
    assert structure(net) == before  # the modes as well


@pytest.mark.parametrize("name", PLANNED)
def test_masks_of_layers_outside_the_plan_stay(name, net):
    """Layer after layer may be pruned, each by a recipe of its own."""
    attach_masks(net, {"one": torch.arange(36).view(4, 1, 3, 3) % 2 == 0, "norm.bias": torch.arange(4) > 0})
    before = masks(net)
    run(name, net, ("two", "out"))
    assert {n: mask.tolist() for n, mask in masks(net).items() if n in before} == {
        n: mask.tolist() for n, mask in before.items()
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_seed_is_an_order_of_images(name, net):
    orders = []
    for seed in (3, np.int64(3), 4):
        orders.append(Count())
        run(name, deepcopy(net), hooks=(orders[-1],), seed=seed)
    assert orders[0].seen == orders[1].seen != orders[2].seen


class Break(Hook):
    """Interrupts a run in one of its phases, at the second chance: so that something has begun."""

    def __init__(self, phase):
        self.left = 2 if phase in ("before_step", "after_backward") else 1
        setattr(self, phase, self.stop)

    def stop(self, *_):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


PHASES = ("begin", "before_epoch", "stops", "skips", "before_step", "after_backward", "after_epoch", "end")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupt_leaves_the_network_as_it_was_made(name, net, masked):
    if masked:
        attach_masks(net, {"two": torch.arange(144).reshape(4, 4, 3, 3) % 3 > 0})
    net.norm.eval()
    before = structure(net)
    for phase in PHASES:
        with pytest.raises(KeyboardInterrupt):
            run(name, net, hooks=(UnderFaults("two_column", StuckAt(0.1)), Break(phase)))
        assert structure(net) == before, phase
    with pytest.raises(KeyboardInterrupt):
        run(name, net, progress=Break("progress").progress)
    assert structure(net) == before


def test_a_ticket_drawn_under_faults_comes_back_from_the_cache(net):
    options = {"sparsity": 0.5, "epochs": 3, "window": 2, "tolerance": 1.0, **FIT}
    options["hooks"] = (UnderFaults("differential", StuckAt(0.1)),)
    twin, third = deepcopy(net), deepcopy(net)
    _, steps, end = cached(recipes.early_bird, net, FEW, **options)
    assert end == steps[-1] == 2
    assert cached(recipes.early_bird, twin, FEW, **options)[2] == end
    assert torch.equal(net.two.weight, twin.two.weight)
    assert not torch.equal(net.two.weight, third.two.weight)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"batch_size": 0}, {"optimizer": "lion"}, {"schedule": "linear"}])
def test_bad_settings_have_one_kind_of_error(name, net, wrong):
    before = structure(net)
    with pytest.raises(TrainingError):
        run(name, net, **wrong)
    assert structure(net) == before


@pytest.mark.parametrize("name", PLANNED)
def test_layers_that_cannot_be_planned_are_named_before_training(name, net):
    count = Count()
    with pytest.raises(ConstraintError, match="five"):
        run(name, net, ("one", "five"), hooks=(count,))
    weight_norm(net.two)
    with pytest.raises(ShapeError, match="_WeightNorm"):
        run(name, net, hooks=(count,))
    frozen = Net()
    frozen.out.weight.requires_grad_(False)
    with pytest.raises(TrainingError, match="no training moves out"):
        run(name, frozen, hooks=(count,))
    assert not count.seen


@pytest.mark.parametrize("name", ["search_budgets", "search_rate"])
def test_searches_over_all_layers_name_a_frozen_one(name, net):
    net.two.requires_grad_(False)
    with pytest.raises(TrainingError, match="no training moves two"):
        run(name, net)


NEED_GRADIENTS = ("admm", "progressive", "prune_without_data", "deep_kmeans", "retrain_inside", "rigl")


@pytest.mark.parametrize("name", PLANNED)
def test_a_layer_that_no_batch_meets_is_named_or_brought_into_its_set(name, net):
    if name in NEED_GRADIENTS:
        with pytest.raises(TrainingError, match="does not meet unmet"):
            run(name, net, (*LAYERS, "unmet"))
    else:
        run(name, net, (*LAYERS, "unmet"))
        assert net.unmet.weight.count_nonzero() <= 12


def test_a_layer_that_some_batches_skip_is_pulled_all_the_same():
    net = skippable(build("resnet8", (1, 6, 6), 3, width=4))
    net.block1_1.gate.read_out.bias.data.fill_(100.0)  # no block skips
    layer = "block1_1.block.conv1"

    class Close(Hook):
        def before_step(self, model, step):
            if step:
                model.block1_1.gate.read_out.bias.data.fill_(-200.0)

    options = {"epochs": 1, "rho": 0.1, "hooks": (Close(),), **FIT}
    recipes.admm(net, {layer: Unstructured(0.5)}, FEW, **options)
    assert prunable(net)[layer].weight.count_nonzero() == 72


def test_arguments_may_be_numpys(net):
    options = {"epochs": np.int64(1), "lr": np.float64(0.05), "batch_size": np.int64(20), "seed": np.int64(2)}
    twin, plain = deepcopy(net), {"epochs": 1, "lr": 0.05, "batch_size": 20, "seed": 2}
    fit(net, FEW, **options)
    fit(twin, FEW, **plain)
    assert torch.equal(net.two.weight, twin.two.weight)
    steps = {"parts": np.int64(2), "rounds": np.int64(1), "tune_epochs": np.int64(1)}
    recipes.grow_and_prune(net, plan(), FEW, **steps, **options)
    recipes.early_bird(net, FEW, sparsity=np.float64(0.5), checks=np.int64(2), **options)
    recipes.admm(net, plan(), FEW, interval=np.int64(1), **options)
    assert 0 <= evaluate(net, FEW.test) <= 1
