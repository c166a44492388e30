"""Pruning without data: layers are matched one by one, the teacher stays, inputs are made of the network alone."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from lib import models, pruning, recipes
from lib.constraint import fitted, harden, weights
from lib.recipes import layer_errors, prune_without_data, synthetic_inputs
from lib.recipes.private import _answered, _LayerMatching
from lib.training import Hook, TrainingError, fit

OPTIONS = {"epochs": 2, "lr": 1e-3, "optimizer": "adam"}


@pytest.fixture(scope="module")
def vgg(small_images):
    torch.set_num_threads(1)
    net = models.build("vgg", small_images.shape, small_images.classes, seed=1, width=4)
    fit(net, small_images, epochs=2, lr=0.05)
    return net


@pytest.mark.parametrize("inputs", ["student", "teacher"])
def test_a_gradient_stays_in_its_layer(vgg, inputs):
    """An error in the first layer moves the others where the student feeds them, and not where the teacher does."""
    net, x = deepcopy(vgg), torch.randn(64, 1, 14, 14)
    plan = {name: pruning.Unstructured(0.0) for name in ("conv1_1", "conv2_1", "fc")}
    net.conv1_1.weight.data *= 0.5
    teacher = deepcopy(vgg)
    found = {}

    class Watch(Hook):
        def after_backward(self, model, step):
            found.update({name: float(getattr(model, name).weight.grad.abs().sum()) for name in plan})
            found["bn"] = model.bn1_1.weight.grad

    matching = _LayerMatching(teacher, plan, inputs == "student")
    data = _answered(teacher, x)
    fit(net, data, epochs=1, lr=1e-9, objective=matching.loss, hooks=(matching, Watch()), batch_size=64)
    assert found["conv1_1"] > 0
    assert found["bn"] is None  # no term reaches what lies between the layers
    assert (found["conv2_1"] > 1e-3) == (inputs == "student")  # the student hands its error on, the teacher none


def test_teacher_forced_layers_are_least_squares(vgg):
    """Without a set to reach, every layer comes back toward the teacher, where there is no error."""
    net = deepcopy(vgg)
    for weight in weights(net, {"conv1_1": pruning.Unstructured(0.0)}).values():
        weight.mul_(1.3)
    before = layer_errors(net, vgg, torch.randn(64, 1, 14, 14))
    matching = _LayerMatching(vgg, {"conv1_1": pruning.Unstructured(0.0)}, False)
    data = _answered(vgg, torch.randn(400, 1, 14, 14))
    fit(net, data, epochs=10, lr=1e-2, optimizer="adam", objective=matching.loss, hooks=(matching,))
    after = layer_errors(net, vgg, torch.randn(64, 1, 14, 14))
    assert before["conv1_1"] == pytest.approx(0.09, rel=1e-3)
    assert after["conv1_1"] < 0.1 * before["conv1_1"]


SETS = {
    "unstructured": pruning.Unstructured(0.8),
    "filters": pruning.Filter(0.5),
    "columns": pruning.Column(0.5),
    "patterns": pruning.PatternKernels(sparsity=0.6),
}


@pytest.mark.parametrize(("match", "of"), [*(("layers", of) for of in SETS), ("logits", "unstructured")])
def test_nothing_but_weights_of_the_plan_moves(vgg, match, of):
    """Statistics of batch norm above all: made-up inputs would ruin them."""
    net, x = deepcopy(vgg), torch.randn(100, 1, 14, 14)
    plan = fitted(net, {"conv1_2": SETS[of], "fc": pruning.Unstructured(0.5)})
    log = prune_without_data(net, plan, x, match=match, **OPTIONS)
    assert log["epoch"].tolist() == [1, 2]
    assert all(plan[name].member(weight) for name, weight in weights(net, plan).items())
    for name, buffer in vgg.named_buffers():
        assert torch.equal(buffer, dict(net.named_buffers())[name])
    if match == "layers":
        assert torch.equal(net.bn1_1.weight, vgg.bn1_1.weight)
        assert torch.equal(net.conv2_2.weight, vgg.conv2_2.weight)
    assert not net._forward_pre_hooks
    assert not net.conv1_2._forward_hooks


def test_inputs_decide_which_weights_stay():
    """A weight of a loud input moves the output most: matching keeps it where magnitude would not."""
    torch.manual_seed(0)
    loud = torch.logspace(-1, 1, 30)
    net = nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 3))
    teacher, plan, x = deepcopy(net), {"0": pruning.Unstructured(0.7)}, torch.randn(1000, 30) * loud
    one_shot = harden(deepcopy(net), plan)
    prune_without_data(net, plan, x, epochs=20, lr=1e-2, optimizer="adam", rho=1e-3, rho_growth=1.5)
    unseen = torch.randn(500, 30) * loud
    ours, theirs = (layer_errors(each, teacher, unseen)["0"] for each in (net, one_shot))
    assert ours < 0.5 * theirs
    kept = [(each[0].weight != 0).float().mean(0) @ loud for each in (net, one_shot)]
    assert kept[0] > 1.5 * kept[1]


def test_inputs_by_batch_norm(vgg):
    """They come nearer to what the batch norms met than noise does, and the network is as it was."""
    state, net = deepcopy(vgg.state_dict()), deepcopy(vgg).eval()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    far = []

    def look(norm, args):
        variance, mean = torch.var_mean(args[0], (0, 2, 3))
        far[-1] += float(((mean - norm.running_mean).square() / norm.running_var).mean())
        far[-1] += float((variance / norm.running_var - 1).square().mean())

    for norm in norms:
        norm.register_forward_pre_hook(look)
    for kind in ("gaussian", "batch norm"):
        x = synthetic_inputs(vgg, 200, (1, 14, 14), kind, epochs=20, lr=0.1)
        far.append(0.0)
        with torch.no_grad():
            net(x)
    assert far[1] < 0.6 * far[0]
    assert all(torch.equal(value, state[name]) for name, value in vgg.state_dict().items())
    assert torch.equal(x, synthetic_inputs(vgg, 200, (1, 14, 14), kind, epochs=20, lr=0.1))


class Twice(torch.nn.Module):
    """One layer used twice, with dropout in the outermost forward, and one that is never met."""

    def __init__(self, unused=False):
        super().__init__()
        self.a, self.b = torch.nn.Linear(16, 16), torch.nn.Linear(16, 4)
        if unused:
            self.unused = torch.nn.Linear(4, 4)

    def forward(self, x):
        h = self.a(self.a(x).relu()).relu()
        return self.b(torch.nn.functional.dropout(h, 0.5, self.training))


@pytest.mark.parametrize("match", ["layers", "logits"])
def test_the_student_is_at_first_the_teacher_in_all_uses(match):
    """Also where the outermost forward has a dropout."""
    norms = []

    class Look(Hook):
        def after_backward(self, model, step):
            assert model.training
            norms.append(float(model.b.weight.grad.norm()))

    plan = {"a": pruning.Unstructured(0.0), "b": pruning.Unstructured(0.0)}
    options = {"epochs": 1, "lr": 1e-9, "rho": 1e-9, "rho_max": 1.0, "match": match, "hooks": (Look(),)}
    prune_without_data(Twice(), plan, torch.randn(100, 16), **options)
    assert norms[0] == 0


def test_errors_are_of_all_uses_of_layers_that_are_met():
    student, teacher, x = Twice().eval(), Twice().eval(), torch.randn(5, 16)
    aimed, made = ([net.a(x), net.a(net.a(x).relu())] for net in (teacher, student))
    error = sum((m - t).square().sum() for m, t in zip(made, aimed, strict=True)) / sum(t.square().sum() for t in aimed)
    assert layer_errors(student, teacher, x)["a"] == pytest.approx(error.item())
    with pytest.raises(TrainingError, match="does not meet unused"):
        layer_errors(Twice(True), Twice(True), x)


def test_inputs_come_back_as_they_are_made_for_any_network():
    norm = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).double()
    assert synthetic_inputs(norm, 5, (1, 4, 4), "batch norm", epochs=1).dtype == torch.float32


def test_refusals(net):
    plan = {"fc1": pruning.Unstructured(0.5)}
    x = torch.randn(40, 1, 28, 28)
    with pytest.raises(TrainingError, match="match = 'output': allowed are layers and logits"):
        prune_without_data(net, plan, x, match="output", **OPTIONS)
    with pytest.raises(TrainingError, match="3 inputs: at least 20"):
        prune_without_data(net, plan, x[:3], **OPTIONS)
    with pytest.raises(TrainingError, match="has none with running statistics"):
        synthetic_inputs(net, 10, (1, 28, 28), "batch norm")
    with pytest.raises(TrainingError, match="kind = 'pink'"):
        synthetic_inputs(net, 10, (1, 28, 28), "pink")
    unused = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    unused[1].register_module("aside", nn.Linear(3, 3))
    with pytest.raises(TrainingError, match="does not meet"):
        recipes.prune_without_data(unused, {"1.aside": pruning.Unstructured(0.5)}, x, **OPTIONS)
