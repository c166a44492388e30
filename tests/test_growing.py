"""Grow-and-prune, its parallel form, and regrowth by gradient."""

from copy import deepcopy
from functools import partial
from itertools import chain

import pytest
import torch

from lib.constraint import ConstraintError, attach_masks, kept, masks, sparsity, state_of
from lib.models import build
from lib.pruning import NM, Block, Filter, LayerAdaptive, Unstructured, uniform_plan
from lib.quantization import ternary
from lib.recipes import contiguous_parts, grow_and_prune, parallel_grow_and_prune, random_masks, rigl
from lib.recipes import growing as module
from lib.shapes import prunable
from lib.training import Hook, TrainingError, fit, metered

OPTIONS = {"lr": 0.05, "batch_size": 100}
STEPS = {"rounds": 2, "epochs": 1, "tune_epochs": 1, **OPTIONS}


@pytest.fixture(scope="session")
def images(small_images):
    return small_images


@pytest.fixture
def small(images):
    return build("vgg", images.shape, images.classes, seed=1, width=4)


def watch_fits(monkeypatch):
    """What masks each training runs inside, and which seed it has."""
    seen = []

    def watched(model, data, **options):
        seen.append(({n: m.clone() for n, m in masks(model).items()}, options["seed"], state_of(model)))
        return fit(model, data, **options)

    monkeypatch.setattr(module, "fit", watched)
    return seen


@pytest.mark.parametrize("values", [Unstructured(0.9), NM(1, 4), Block(0.75, 2, 2), Filter(0.5)], ids=str)
def test_random_masks_lie_in_the_set_and_differ_by_seed(net, values):
    plan = uniform_plan(net, values, keep_dense=("fc3",))
    first, again, other = (random_masks(net, plan, seed) for seed in (0, 0, 1))
    for name, mask in first.items():
        w = torch.where(mask, torch.randn(mask.shape), 0.0)
        assert values.member(w)
        assert torch.equal(mask, again[name])
        assert not torch.equal(mask, other[name])


def test_parts_are_runs_of_layers():
    plan = dict.fromkeys("abcdefg", Unstructured(0.5))
    assert contiguous_parts(plan, 3) == [["a", "b", "c"], ["d", "e"], ["f", "g"]]
    assert contiguous_parts(plan, 1) == [list("abcdefg")]
    with pytest.raises(TrainingError, match="parts = 8: allowed are 1 to 7"):
        contiguous_parts(plan, 8)


def test_in_turn_each_part_is_dense_and_all_others_are_in_their_sets(small, images, monkeypatch):
    seen = watch_fits(monkeypatch)
    plan = uniform_plan(small, Unstructured(0.8))
    parts = contiguous_parts(plan, 3)
    grow_and_prune(small, plan, images, parts=3, **STEPS)
    assert len(seen) == 2 * 3 + 1
    for step, (held, _, state) in enumerate(seen[:-1]):
        assert set(held) == set(plan) - set(parts[step % 3])
        for name, mask in held.items():
            assert int(mask.sum()) == kept(0.8, mask.numel())
            assert not state[f"{name}.weight"][~mask].any()
    assert set(seen[-1][0]) == set(plan)
    assert len({seed for _, seed, _ in seen}) == 7  # every step sees its images in an order of its own


def test_what_grows_back_starts_at_zero_and_is_trained(small, images, monkeypatch):
    seen = watch_fits(monkeypatch)
    plan = uniform_plan(small, Unstructured(0.8))
    parts = contiguous_parts(plan, 3)
    log = grow_and_prune(small, plan, images, parts=3, **STEPS | {"epochs": 2, "lr": 0.2})
    for step, part in enumerate(parts, start=3):  # held before the second round, dense in it, pruned again after it
        won = places = 0
        for name in part:
            held, before, chosen = seen[step - 1][0][name], seen[step][2][f"{name}.weight"], seen[step + 1][0][name]
            assert not before[~held].any()
            assert int(chosen.sum()) == int(held.sum())
            won, places = won + int((chosen & ~held).sum()), places + int(held.sum())
        assert log["exchanged"].iloc[step] == won / places
    assert log["exchanged"].iloc[3:6].max() > 0  # some won their place


@pytest.mark.parametrize(
    "plan_of",
    [
        lambda net: uniform_plan(net, NM(1, 4), keep_dense=("conv1_1",)),
        lambda net: uniform_plan(net, Block(0.75, 2, 2)),
        lambda net: uniform_plan(net, Unstructured(0.8, scope="global")),
        lambda net: uniform_plan(net, LayerAdaptive(5.0)),
    ],
    ids=["N:M", "blocks", "global", "LAMP"],
)
def test_other_sets_and_budgets_of_the_whole_network(small, images, plan_of):
    plan = plan_of(small)
    log = grow_and_prune(small, plan, images, parts=2, **STEPS)
    assert sparsity(small, [*plan]) == pytest.approx(
        0.75 if "Block" in str(plan) or "NM" in str(plan) else 0.8, abs=0.02
    )
    assert not masks(small)
    assert log["epochs"].tolist() == [1, 2, 3, 4, 5]
    first = next(iter(plan.values()))
    if first.per_layer and not isinstance(first, LayerAdaptive):
        assert all(plan[n].member(w.weight.detach()) for n, w in prunable(small).items() if n in plan)


def test_random_order_grows_every_layer_once_a_round(small, images, monkeypatch):
    seen = watch_fits(monkeypatch)
    plan = uniform_plan(small, Unstructured(0.8))
    grow_and_prune(small, plan, images, parts=3, order="random", **STEPS)
    for r in range(2):
        grown = [set(plan) - set(held) for held, _, _ in seen[3 * r : 3 * r + 3]]
        assert sorted(chain(*grown)) == sorted(plan)
    assert [set(plan) - set(h) for h, _, _ in seen[:3]] != [set(p) for p in contiguous_parts(plan, 3)]


def test_the_meter_sees_one_part_dense_and_the_rest_sparse(net, images):
    plan = uniform_plan(net, Unstructured(0.9))
    _, dense = metered(deepcopy(net), fit, images, epochs=1, **OPTIONS)
    _, spent = metered(net, grow_and_prune, plan, images, parts=3, rounds=1, epochs=1, tune_epochs=1, **OPTIONS)
    by_layer = spent.groupby("layer")["macs"].sum() / dense.groupby("layer")["macs"].sum()
    assert by_layer.tolist() == pytest.approx([1.3, 1.3, 1.3], rel=1e-3)  # dense once, a tenth three times


# --- parallel ---------------------------------------------------------------------------------------------------------


def test_with_one_part_parallel_is_cyclic_bit_for_bit(net, images, monkeypatch):
    """All of the network grows: one replica, nothing to merge. The start is made the same."""
    plan = uniform_plan(net, Unstructured(0.9))
    start = random_masks(net, plan, 3)
    with torch.no_grad():
        for name, layer in prunable(net).items():
            layer.weight *= start[name]
    monkeypatch.setattr(module, "random_masks", lambda model, plan, seed: start)
    one, many = deepcopy(net), deepcopy(net)
    grow_and_prune(one, plan, images, parts=1, seed=3, **STEPS)
    parallel_grow_and_prune(many, plan, images, parts=1, seed=3, processes=1, **STEPS)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))


def test_processes_change_nothing_and_count_the_same(small, images):
    plan, found = uniform_plan(small, Unstructured(0.8)), []
    for processes in (1, 2):
        copy = deepcopy(small)
        log, spent = metered(copy, parallel_grow_and_prune, plan, images, parts=2, processes=processes, **STEPS)
        found.append((copy.state_dict(), log, spent.sort_values(["layer", "product"]).reset_index(drop=True)))
    (state, log, spent), (other, other_log, other_spent) = found
    assert all(torch.equal(state[k], other[k]) for k in state)
    assert log.equals(other_log)
    assert spent["macs"].tolist() == pytest.approx(other_spent["macs"].tolist())


def test_growing_in_parallel_costs_what_growing_in_turn_does(small, images):
    """Statistics of batch norms, found anew for the log, are no training."""
    plan, total = uniform_plan(small, Unstructured(0.8)), []
    for recipe in (grow_and_prune, partial(parallel_grow_and_prune, processes=1)):
        _, spent = metered(deepcopy(small), recipe, plan, images, parts=2, **STEPS)
        total.append(spent.groupby(["layer", "product"])["macs"].sum())
    assert len(total[0]) > 3
    assert total[1].to_dict() == pytest.approx(total[0].to_dict(), rel=1e-9)


def test_the_merged_network_has_each_part_from_where_it_grew(small, images):
    states = [{k: torch.full_like(v, i) for k, v in small.state_dict().items()} for i in (1, 2)]
    groups = contiguous_parts(uniform_plan(small, Unstructured(0.5)), 2)
    merged = module._merged(states, groups, small)
    for i, part in enumerate(groups, start=1):
        assert all((merged[f"{name}.weight"] == i).all() for name in part)
    assert (merged["bn1_1.weight"] == 1.5).all()
    assert (merged["bn1_1.running_var"] == 1.5).all()
    assert (merged["fc.bias"] == 2).all()


def test_a_part_that_two_modules_share_is_the_one_that_grew():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = (torch.nn.Linear(4, n) for n in (4, 4, 2))
            self.b.weight = self.a.weight
            self.again = self.out

    net = Tied()
    states = [{k: torch.full_like(v, i) for k, v in state_of(net).items()} for i in (1, 2)]
    net.load_state_dict(module._merged(states, [["a"], ["out"]], net))
    assert (net.a.weight == 1).all()
    assert (net.b.bias == 1).all()
    assert (net.out.weight == 2).all()


# --- regrowth by gradient ---------------------------------------------------------------------------------------------


class Trace(Hook):
    """The masks before every step."""

    def __init__(self):
        self.masks = []

    def before_step(self, model, step):
        self.masks.append(masks(model)["fc1"].clone())


def test_masks_move_only_when_due_and_keep_their_number(net, images):
    trace = Trace()
    plan = uniform_plan(net, Unstructured(0.9))
    rigl(net, plan, images, epochs=2, interval=4, share=0.3, until=0.75, hooks=(trace,), **OPTIONS)
    moved = [int((a ^ b).sum()) for a, b in zip(trace.masks, trace.masks[1:], strict=False)]
    assert [i for i, n in enumerate(moved) if n] == [4, 8, 12]  # of 20 steps, until the 15th
    assert all(int(m.sum()) == kept(0.9, m.numel()) for m in trace.masks)
    assert moved[4] > moved[8] > moved[12]
    assert moved[4] <= 2 * 0.3 * int(trace.masks[0].sum())


def test_the_smallest_go_and_the_steepest_come_at_zero_without_momentum():
    from lib.recipes.regrowth import _Regrow

    layer = torch.nn.Sequential(torch.nn.Linear(6, 1, bias=False))
    layer[0].weight.data = torch.tensor([[5.0, -0.1, 3.0, 0.0, 0.0, 0.0]])
    live = torch.tensor([[True, True, True, False, False, False]])
    attach_masks(layer, {"0": live})
    hook = _Regrow(layer, {"0": live}, interval=1, share=0.7, last=10)
    weight = layer[0].parametrizations.weight.original
    optimizer = torch.optim.SGD([weight], 0.1, 0.9)
    optimizer.state[weight]["momentum_buffer"] = torch.ones_like(weight)
    hook.begin(layer, optimizer)
    hook._move("0", torch.tensor([[9.0, 0.5, 9.0, 1.0, -4.0, 2.0]]), fraction=0.34)
    assert layer[0].parametrizations.weight[0].mask.tolist() == [[True, False, True, False, True, False]]
    assert weight.tolist() == [[5.0, 0.0, 3.0, 0.0, 0.0, 0.0]]
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]]


def test_the_gradient_of_removed_weights_is_paid_for(net, images):
    plan = uniform_plan(net, Unstructured(0.9))
    _, static = metered(attach_masks(deepcopy(net), random_masks(net, plan)), fit, images, epochs=2, **OPTIONS)
    _, spent = metered(net, rigl, plan, images, epochs=2, interval=5, until=1.0, **OPTIONS)
    extra = spent.groupby("product")["macs"].sum() - static.groupby("product")["macs"].sum()
    weights = sum(layer.weight.numel() for layer in prunable(net).values())
    assert extra[["forward", "input_gradient"]].abs().max() < 1
    assert extra["weight_gradient"] == pytest.approx(3 * 100 * 0.9 * weights, rel=1e-3)  # steps 5, 10 and 15


def test_a_layer_of_two_modules_pays_as_one_that_is_used_twice(images):
    class Net(torch.nn.Module):
        def __init__(self, tied):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.out = torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 10)
            self.b = torch.nn.Linear(16, 16, bias=False) if tied else self.a
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.out(self.b(self.a(x.flatten(1)[:, :16]).relu()))

    plan, options = {"a": Unstructured(0.75)}, {"epochs": 2, "interval": 3, "until": 1.0}
    (_, twice), (_, shared) = (metered(Net(tied), rigl, plan, images, **options, **OPTIONS) for tied in (False, True))
    assert twice.equals(shared)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parts": 9}, "parts = 9: allowed are 1 to 3"),
        ({"parts": [["fc1"], ["fc2"]]}, "every layer of the plan belongs to one part"),
        ({"parts": 2, "order": "up"}, "order = 'up': allowed are 'cyclic' and 'random'"),
        ({"parts": 2, "rounds": 0}, "rounds = 0"),
    ],
)
def test_parts_that_cannot_be(net, images, wrong, message):
    before = deepcopy(net.state_dict())
    with pytest.raises(TrainingError, match=message):
        grow_and_prune(net, uniform_plan(net, Unstructured(0.5)), images, **STEPS | wrong)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_sets_that_cannot_be(net, images):
    with pytest.raises(ConstraintError, match="it has no mask"):
        grow_and_prune(net, uniform_plan(net, ternary()), images, parts=2, **STEPS)
    with pytest.raises(TrainingError, match="rigl moves single weights, Filter would be left"):
        rigl(net, uniform_plan(net, Filter(0.5)), images, epochs=1, **OPTIONS)
    with pytest.raises(TrainingError, match="interval=0"):
        rigl(net, uniform_plan(net, Unstructured(0.5)), images, epochs=1, interval=0, **OPTIONS)
    with pytest.raises(TrainingError, match="processes = 0"):
        parallel_grow_and_prune(net, uniform_plan(net, Unstructured(0.5)), images, parts=2, processes=0, **STEPS)
