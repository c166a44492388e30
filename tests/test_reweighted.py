from copy import deepcopy

import pytest
import torch

from lib import pruning
from lib.constraint import weights
from lib.pruning import uniform_plan
from lib.recipes import admm, progressive, reweighted, search_strength
from lib.recipes.admm import _Pull
from lib.recipes.reweighted import _Shrink
from lib.shapes import prunable
from lib.training import TrainingError, fit


@pytest.fixture
def trained(net, images):
    fit(net, images, epochs=3, lr=0.05)
    return net


def test_shrink_is_the_proximal_step_of_the_group_norm(trained, images):
    """It minimizes ``0.5 * ||V - W||^2 + t * sum ||V_G||``, and some groups vanish."""
    plan = {"fc1": pruning.Column(0.9)}
    hook = _Shrink(trained, plan, images, {"fc1": 9.0})  # columns of less than 0.9 mean norms vanish
    w, scale, hook.lr = trained.fc1.weight.detach().clone(), hook.scale[0]["fc1"], 0.1
    hook.shrink()
    v = trained.fc1.weight.detach()

    def objective(x):
        return 0.5 * (x - w).double().square().sum() + 0.1 * 9 * scale * x.double().norm(dim=0).sum()

    gone = v.norm(dim=0) == 0
    assert gone.any()
    assert not gone.all()
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 1e-1):
        assert objective(v) < objective(v + size * torch.randn(v.shape, generator=generator))
    for c in range(0, 784, 50):
        other = v.clone()
        other[:, c] = 0 if not gone[c] else 0.01 * w[:, c]
        assert objective(v) <= objective(other) + 1e-9


def test_intersections_shrink_the_groups_of_both_parts(trained, images):
    plan = {"fc1": pruning.FilterColumn(0.5, 0.5)}
    hook = _Shrink(trained, plan, images, {"fc1": 9.0})
    hook.lr = 0.1
    assert [type(p["fc1"]) for p in hook.penalties] == [pruning.Filter, pruning.Column]
    hook.shrink()
    assert (trained.fc1.weight.norm(dim=0) == 0).any()


def test_reweighting_lets_large_groups_go(trained, images):
    """Alpha falls for what is large and rises for what is small; the group lasso keeps it as it was."""
    plan = {"fc1": pruning.Filter(0.5)}
    hook = _Shrink(trained, plan, images, {"fc1": 1.0})
    trained.fc1.weight.data[0] *= 0.01
    hook.after_epoch(trained, 0)
    after, norm = hook.alpha[0]["fc1"], trained.fc1.weight.norm(dim=1, keepdim=True).expand(300, 784)
    assert after[0, 0] > 10 > 2 > after[1:].max()
    assert torch.allclose(after, 1 / (norm / hook.scale[0]["fc1"] + 0.01), rtol=1e-3)
    lasso = _Shrink(trained, plan, images, {"fc1": 1.0}, interval=0)
    lasso.after_epoch(trained, 0)
    assert lasso.alpha == [{"fc1": 1.0}]


def test_density_falls_with_strength(trained, images):
    plan = {"fc1": pruning.Unstructured(0.9), "fc2": pruning.Unstructured(0.9)}
    left = [
        reweighted(deepcopy(trained), plan, images, strength=s, epochs=2, lr=0.05)["density/fc1"].iloc[-1]
        for s in (0.0, 0.03, 0.3, 3.0)
    ]
    assert left[0] == 1
    assert left == sorted(left, reverse=True)
    assert left[-1] < left[0]


def test_search_finds_a_strength_at_which_training_reaches_the_budget(trained, images):
    plan = {"fc1": pruning.Unstructured(0.9), "fc2": pruning.Column(0.5)}
    untouched = deepcopy(trained.state_dict())
    options = {"epochs": 2, "lr": 0.05}
    strength = search_strength(trained, plan, images, trials=7, **options)
    assert all(torch.equal(v, untouched[n]) for n, v in trained.state_dict().items())
    for budget, layer in ((0.1, "density/fc1"), (0.5, "density/fc2")):  # it lies between a tenth and ten times
        few, many = (
            reweighted(deepcopy(trained), plan, images, strength={n: s * k for n, s in strength.items()}, **options)
            for k in (0.1, 10)
        )
        assert few[layer].iloc[-1] > budget >= many[layer].iloc[-1]
    reweighted(trained, plan, images, strength=strength, **options)
    assert all(plan[n].member(w) for n, w in weights(trained, plan).items())


def test_split_pairs_pull_toward_both_sets(images):
    from lib import models
    from lib.constraint import fitted

    net = models.build("vgg", images.shape, images.classes, width=4)
    plan = fitted(net, {"conv2_1": pruning.PatternKernels(4, sparsity=0.5), "conv3_1": pruning.Filter(0.5)})
    pull = _Pull(net, plan, images, 1, 0.3, 1.3, 1.0, False, "split")
    patterns, kernels = pull.pairs
    assert set(patterns.z) == {"conv2_1", "conv3_1"}
    assert set(kernels.z) == {"conv2_1"}
    w = prunable(net)["conv2_1"].weight
    assert torch.equal(patterns.z["conv2_1"], plan["conv2_1"].parts[0].project(w))
    assert torch.equal(kernels.z["conv2_1"], plan["conv2_1"].parts[1].project(w))
    w.grad = torch.zeros_like(w)
    net.conv3_1.weight.grad = torch.zeros_like(net.conv3_1.weight)
    pull.after_backward(net, 0)
    expected = 0.3 * (2 * w - patterns.z["conv2_1"] - kernels.z["conv2_1"])
    assert torch.allclose(w.grad, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "allowed are numbers from 0"),
        ({"strength": {"fc1": 1.0}}, "for every layer"),
        ({"strength": 1.0, "eps": 0.0}, "eps=0.0"),
        ({"strength": 1.0, "interval": -1}, "interval=-1"),
    ],
)
def test_reweighted_refuses_bad_settings(net, images, options, message):
    plan = uniform_plan(net, pruning.Unstructured(0.5))
    with pytest.raises(TrainingError, match=message):
        reweighted(net, plan, images, epochs=1, lr=0.01, **options)


def test_other_refusals(net, images):
    plan = uniform_plan(net, pruning.Unstructured(0.5))
    with pytest.raises(TrainingError, match="trials=0"):
        search_strength(net, plan, images, trials=0, epochs=1, lr=0.01)
    with pytest.raises(TrainingError, match="at least one plan"):
        progressive(net, [], images, search={}, retrain={})
    with pytest.raises(TrainingError, match="'joint' and 'split'"):
        admm(net, plan, images, epochs=1, lr=0.01, pairs="both")
