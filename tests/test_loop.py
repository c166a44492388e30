"""The training loop: objectives and tasks, batches and steps, what is refused, and what is left."""

from copy import deepcopy
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lib.data import PADDING, Data, Split, Task
from lib.models import build
from lib.training import TrainingError, batches, evaluate, fit, recalibrate, steps_per_epoch


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# --- objectives and tasks ---------------------------------------------------------------------------------------------


def test_an_objective_takes_the_place_of_the_loss_and_is_told_beside_it(images, net):
    """As an objective the task's own loss changes nothing; twice of it is twice the learning rate, without momentum."""
    task, options = images.task, {"epochs": 1, "momentum": 0.0, "schedule": "constant"}
    nets = [deepcopy(net) for _ in range(3)]
    plain = fit(nets[0], images, lr=0.02, **options)
    told = fit(nets[1], images, lr=0.02, objective=lambda model, x, y, output: task.loss(output, y), **options)
    twice = fit(nets[2], images, lr=0.01, objective=lambda model, x, y, output: 2 * task.loss(output, y), **options)
    assert same(nets[0], nets[1])
    pd.testing.assert_frame_equal(plain, told.drop(columns="objective"))
    assert told["objective"].equals(told["train_loss"])
    for p, q in zip(nets[0].parameters(), nets[2].parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)
    assert twice["objective"].iloc[0] == pytest.approx(2 * twice["train_loss"].iloc[0])


def test_distillation_and_matching_need_no_loop_of_their_own(images, net):
    """The distances to a teacher's output and to its first layer's are what falls; labels play no part in them."""
    teacher, seen = build("lenet300", images.shape, images.classes, seed=7).eval(), {}
    teacher.fc1.register_forward_hook(lambda m, x, y: seen.update(teacher=y))
    net.fc1.register_forward_hook(lambda m, x, y: seen.update(student=y))

    def apart(model, x, y, output):
        with torch.no_grad():
            whole = teacher(x)
        return mse_loss(output, whole) + mse_loss(seen["student"], seen["teacher"])

    log = fit(net, images, epochs=3, lr=0.05, schedule="constant", objective=apart)
    assert log["objective"].is_monotonic_decreasing
    other = replace(images, train=replace(images.train, y=images.train.y.flip(0)))
    twin = build("lenet300", images.shape, images.classes, seed=1)
    twin.fc1.register_forward_hook(lambda m, x, y: seen.update(student=y))
    assert fit(twin, other, epochs=3, lr=0.05, schedule="constant", objective=apart)["objective"].equals(
        log["objective"]
    )


def near(output, y):
    return ((output - y).norm(dim=-1) < 1.0).sum(), torch.tensor(len(y))


def correlation(output, y):
    return torch.corrcoef(torch.stack([output.flatten(), y.flatten()]))[0, 1], torch.tensor(1)


@pytest.mark.parametrize("whole", [False, True])
def test_a_task_brings_its_loss_and_score(whole):
    """Points in a picture, which no cross-entropy knows; a correlation is asked of a whole split at once."""
    x = torch.randn(300, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y = x.flatten(1)[:, :2] * 3
    task = Task("points", mse_loss, correlation if whole else near, whole)
    points = Data("points", *(Split(x[i : i + 100], y[i : i + 100], task) for i in (0, 100, 200)), classes=2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    start = evaluate(net, points.test, batch_size=7)
    log = fit(net, points, epochs=20, lr=0.1, batch_size=10, schedule="constant")
    with torch.no_grad():
        output = net(points.test.x)
    score, of = task.score(output, points.test.y)
    assert evaluate(net, points.test, batch_size=7) == pytest.approx(float(score) / float(of))
    assert float(score) / float(of) > start
    assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]
    assert log["train_accuracy"].isna().all() == whole
    squares = evaluate(
        net, points.test, score=lambda output, y: ((output - y).square().sum(), torch.tensor(2 * len(y)))
    )
    assert squares == pytest.approx(float(mse_loss(output, points.test.y)), rel=1e-4)


class Swap(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)  # (N, T, classes) -> (N, classes, T)


def test_labels_of_every_part_of_a_sequence():
    """``y (N, T)``, padded at the end: what is padding counts for nothing."""
    x = torch.randint(0, 5, (60, 8), generator=torch.Generator().manual_seed(0))
    words = Split(x, torch.where(torch.arange(8) < 6, x % 3, PADDING))
    net = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 3), Swap())
    fit(net, Data("words", words, words, words, 3), epochs=20, lr=0.5, batch_size=20)
    assert evaluate(net, words) == 1.0


# --- batches and steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("examples", "batch_size", "sizes"),
    [
        *((256, 128, [128, 128]), (257, 128, [128, 129]), (258, 128, [128, 128, 2]), (129, 128, [129])),
        *((1, 128, [1]), (3, 1, [1, 1, 1]), (7, 3, [3, 4]), (5, 128, [5])),
    ],
)
def test_a_single_example_left_over_joins_the_batch_before(examples, batch_size, sizes):
    split = Split(torch.zeros(examples, 1, 1, 1), torch.arange(examples))
    found = [y for _, y in batches(split, batch_size, seed=1, epoch=2)]
    assert [len(y) for y in found] == sizes
    assert sorted(torch.cat(found).tolist()) == [*range(examples)]
    assert steps_per_epoch(Data("zeros", split, split, split, examples), batch_size) == len(sizes)


def test_batch_norm_on_one_position_trains_with_an_odd_number_of_images_and_is_found_anew_the_same():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    odd = Split(torch.randn(9, 1, 2, 2), torch.arange(9) % 2)
    data = Data("odd", odd, odd, odd, 2)
    assert fit(net, data, epochs=1, lr=0.1, batch_size=4)["images"].tolist() == [9]
    recalibrate(net, data, batch_size=4)
    dropped = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(4))
    before = torch.random.get_rng_state()
    found = [recalibrate(deepcopy(dropped), data, batch_size=4)[2].running_mean for _ in range(2)]
    assert torch.equal(*found)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(TrainingError, match="batch norm meets one position of one example: batch_size = 1"):
        fit(net, data, epochs=1, lr=0.1, batch_size=1)


@pytest.mark.parametrize("steps", [{"start": -1}, {"start": 17}, {"stop": 17}, {"start": 9, "stop": 8}])
def test_steps_outside_the_run_are_named(images, net, steps):
    with pytest.raises(TrainingError, match="0 <= start <= stop <= 16"):
        fit(net, images, epochs=2, lr=0.1, **steps)


def test_progress_is_that_of_the_part_which_runs(images, net):
    said = []
    fit(net, images, epochs=4, lr=0.05, start=8, stop=20, progress=lambda done, text: said.append(done))
    assert said == [8 / 12, 1.0]  # the second epoch, and half of the third


# --- what is refused, and what is left --------------------------------------------------------------------------------


def test_data_that_do_not_fit_are_named(images, net):
    nothing = Split(torch.zeros(0, 1, 28, 28), torch.zeros(0, dtype=torch.long))
    half = deepcopy(net).bfloat16()
    with pytest.raises(TrainingError, match="the split is empty"):
        fit(net, replace(images, train=nothing), epochs=1, lr=0.1)
    with pytest.raises(TrainingError, match="the split is empty"):
        evaluate(net, nothing)
    for call in (lambda: fit(half, images, epochs=1, lr=0.1), lambda: evaluate(half, images.test)):
        with pytest.raises(TrainingError, match=r"bfloat16.*float32"):
            call()
    few = Split(images.train.x[:200].bfloat16(), images.train.y[:200])
    log = fit(half, Data("few", few, few, few, 10), epochs=4, lr=0.05, schedule="constant")
    assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]
    assert half.fc1.weight.dtype == torch.bfloat16


def test_modes_and_momenta_come_back_whatever_happens(images):
    net = build("vgg", images.shape, images.classes, width=4).train()
    net.bn1_1.eval()  # a frozen norm among others
    modes = [m.training for m in net.modules()]

    def broken(*_):
        raise KeyboardInterrupt

    calls = [
        lambda: evaluate(net, images.test),
        lambda: recalibrate(net, images),
        lambda: fit(net, images, epochs=1, lr=0.01, stop=1),
    ]
    for call in calls:
        call()
        assert [m.training for m in net.modules()] == modes
    net.conv3_2.register_forward_hook(broken)
    for call in calls:
        with pytest.raises(KeyboardInterrupt):
            call()
        assert [m.training for m in net.modules()] == modes
    assert all(m.momentum == 0.1 for m in net.modules() if isinstance(m, nn.BatchNorm2d))
