"""One bare training loop, evaluation, and what a recipe may do inside the loop."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import isfinite, nan
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.data import Data, Split
from lib.shapes import in_mode
from lib.training.strides import StrideFirst

Progress = Callable[[float, str], None]
"""Called with the fraction done and a short message; a study passes its progress line here."""

Objective = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""``(model, x, y, output) -> ()``: what is minimized in place of the task's loss, after the forward pass of a batch."""

Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(output, y) -> ((), ())``: a sum over a batch and the number of its terms, as in `lib.data.Task`."""


class TrainingError(ValueError):
    """Training or a recipe cannot start, or went wrong: the message names the setting to change.

    >>> from lib.training import learning_rate
    >>> learning_rate("linear", 0.1, progress=0.5)
    Traceback (most recent call last):
        ...
    lib.training.loop.TrainingError: schedule = 'linear': allowed are 'constant', 'step' and 'cosine'
    """


def device() -> torch.device:
    """CUDA when there is one, else the CPU.

    >>> from lib.training import device
    >>> device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    True
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Hook:
    """What a recipe may do inside `fit`; every method does nothing by default. Steps count the batches of a run from 0.

    >>> from lib import data, models, training
    >>> class Watch(training.Hook):
    ...     def before_step(self, model, step):
    ...         print("batch", step)
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> net = models.build("lenet300", images.shape, images.classes)
    >>> log = training.fit(net, images, epochs=2, lr=0.05, batch_size=100, hooks=(Watch(),))
    batch 0
    batch 1
    batch 2
    batch 3
    """

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called once, before anything else: who moves weights by hand clears their momentum in ``optimizer.state``."""

    def end(self, model: nn.Module) -> None:
        """Called once, whatever happened, an interrupt too: what was attached to the model is taken away here."""

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Called before the first batch of an epoch."""

    def stops(self, model: nn.Module, step: int) -> bool:
        """Asked before a batch: whether training ends here, with the weights as they are."""
        return False

    def skips(self, model: nn.Module, step: int) -> bool:
        """Asked before a batch: whether it is left out. Then nothing is computed, and nothing moves."""
        return False

    def before_step(self, model: nn.Module, step: int) -> None:
        """Called before the forward pass of a batch."""

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Called when ``.grad`` is filled and the optimizer has not stepped: the place to pull weights."""

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """Called after the last batch of an epoch."""


Schedule = Literal["constant", "step", "cosine"]


def learning_rate(schedule: Schedule, lr: float, progress: float) -> float:
    """The learning rate at a fraction ``progress`` in [0, 1) of the run.

    ``step`` multiplies by 0.1 at 8/15 and at 12/15 (epochs 80 and 120 of 150: N. Liu et al., ICML 2021).

    >>> from lib.training import learning_rate
    >>> [round(learning_rate("step", 0.1, progress), 4) for progress in (0.0, 0.6, 0.9)]
    [0.1, 0.01, 0.001]
    >>> [round(learning_rate("cosine", 0.1, progress), 4) for progress in (0.0, 0.5, 1.0)]
    [0.1, 0.05, 0.0]
    """
    if schedule == "constant":
        return lr
    if schedule == "step":
        return lr * 0.1 ** ((progress >= 8 / 15) + (progress >= 12 / 15))
    if schedule == "cosine":
        return lr * float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress))))
    raise TrainingError(f"schedule = {schedule!r}: allowed are 'constant', 'step' and 'cosine'")


def make_optimizer(
    model: nn.Module, name: Literal["sgd", "adam"], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """A fresh optimizer over all parameters that require a gradient.

    >>> from lib.training import make_optimizer
    >>> layer = torch.nn.Linear(4, 2)
    >>> layer.bias.requires_grad = False
    >>> opt = make_optimizer(layer, "sgd", lr=0.1, momentum=0.9, weight_decay=0.0)
    >>> [tuple(p.shape) for p in opt.param_groups[0]["params"]]
    [(2, 4)]
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, foreach=True)
    if name == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=weight_decay, foreach=True)
    raise TrainingError(f"optimizer = {name!r}: allowed are 'sgd' and 'adam'")


def _sizes(examples: int, batch_size: int) -> list[int]:
    """Of an epoch's batches. One example left over joins the batch before: no batch norm could normalize it alone."""
    if batch_size < 1:
        raise TrainingError(f"{batch_size=}: allowed are whole numbers from 1")
    full, rest = divmod(examples, int(batch_size))
    sizes = [int(batch_size)] * full
    if full and rest == 1:
        sizes[-1] += 1
    return [*sizes, rest] if rest and sum(sizes) < examples else sizes


def steps_per_epoch(data: Data, batch_size: int = 128, **_: Any) -> int:
    """Batches of an epoch: time within a run is counted in these. Other options of `fit` may come along.

    >>> from lib import data
    >>> from lib.training import steps_per_epoch
    >>> images = data.load(train_size=257, test_size=100, validation_size=100)
    >>> steps_per_epoch(images, lr=0.1), steps_per_epoch(images, batch_size=100)  # the last of 129, of 57
    (2, 3)
    """
    return len(_sizes(len(data.train), batch_size))


def batches(split: Split, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of batches in an order that depends on ``seed`` and ``epoch`` alone: paired arms see the same.

    A single example that is left over joins the batch before it.

    >>> from lib.data import Split
    >>> from lib.training import batches
    >>> split = Split(torch.zeros(5, 1, 1, 1), torch.arange(5))
    >>> order = [y.tolist() for _, y in batches(split, 2, seed=0, epoch=0)]
    >>> [len(y) for y in order], sorted(sum(order, []))
    ([2, 3], [0, 1, 2, 3, 4])
    >>> order == [y.tolist() for _, y in batches(split, 2, seed=0, epoch=0)]
    True
    """
    generator = torch.Generator().manual_seed(int(1_000_003 * seed + epoch))
    order = torch.randperm(len(split), generator=generator).to(split.y.device)
    for index in order.split(_sizes(len(split), batch_size)):
        yield split.x[index], split.y[index]


def _check_fit(model: nn.Module, split: Split) -> None:
    """Refuse what torch would refuse later in words of its own."""
    if not len(split):
        raise TrainingError("the split is empty: there is nothing to learn from or to be judged by")
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if split.x.is_floating_point() and kinds and split.x.dtype not in kinds:
        raise TrainingError(
            f"the model is of {', '.join(map(str, kinds))} and the data of {split.x.dtype}: convert one"
        )


def _output(model: nn.Module, x: Tensor) -> Tensor:
    try:
        return model(x)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(f"a batch norm meets one position of one example: batch_size = 1? ({error})") from None


def fit(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    lr: float,
    optimizer: Literal["sgd", "adam"] = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    batch_size: int = 128,
    schedule: Schedule = "step",
    seed: int = 0,
    start: int = 0,
    stop: int | None = None,
    objective: Objective | None = None,
    hooks: tuple[Hook, ...] = (),
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Train ``model`` in place on ``data.train`` by the loss of its task, where the model and the data already are.

    Bit-identical for the same seed, device and thread count; torch's global generator is set to ``seed``. The last
    epoch's weights are what is left: nothing is selected by its score. Whatever happens, also an error or an interrupt,
    hooks are ended and each module is in the mode that it had.

    Args:
        start: step (batch of the whole run, see `steps_per_epoch`) to go on from, with its learning rate and its order
            of batches but no momentum. stop: step before which to end, with the weights as they are then, such as the
            ``theta_k`` that rewinding goes back to; None: after all ``epochs``. Hooks see the run's own steps.
        objective: what is minimized in place of the task's loss: that plus a cost, a distance to a teacher's output.

    Returns:
        One row per epoch that had a batch: ``epoch`` (from 1), ``lr``, ``train_loss`` and ``train_accuracy``, the
        task's loss and score over the ``images`` that it saw (NaN for a score of whole splits only), and with an
        objective its mean, ``objective``.

    Raises:
        TrainingError: a bad setting, data that do not fit the model, or a loss that is not finite any more.

    >>> from lib import data, models, training
    >>> images = data.load(train_size=1000, test_size=100, validation_size=100)
    >>> net = models.build("lenet300", images.shape, images.classes)
    >>> log = training.fit(net, images, epochs=3, lr=0.05)
    >>> log["epoch"].tolist(), log["train_loss"].is_monotonic_decreasing, training.evaluate(net, images.test) > 0.2
    ([1, 2, 3], True, True)
    >>> def smooth(model, x, y, output):
    ...     return torch.nn.functional.cross_entropy(output, y, label_smoothing=0.1)
    >>> log = training.fit(net, images, epochs=1, lr=0.01, objective=smooth)
    >>> bool(log["objective"].iloc[0] > log["train_loss"].iloc[0])
    True
    """
    if epochs < 0 or not lr > 0:
        raise TrainingError(f"{epochs=}, {lr=}: allowed are epochs >= 0 and lr > 0")
    _check_fit(model, data.train)
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError("no parameter of the model is trained: requires_grad is False in all, or there is none")
    learning_rate(schedule, lr, 0.0)
    steps, task = steps_per_epoch(data, batch_size), data.task
    end = epochs * steps if stop is None else stop
    if not 0 <= start <= end <= epochs * steps:
        raise TrainingError(f"{start=}, {stop=}: allowed are 0 <= start <= stop <= {epochs * steps} batches")
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    opt = make_optimizer(model, optimizer, lr, momentum, weight_decay)
    rows = []
    with in_mode(model, training=True), ExitStack() as ends:
        for hook in hooks:
            ends.callback(hook.end, model)
            hook.begin(model, opt)
        for epoch in range(start // steps, -(-end // steps)):
            model.train()
            for hook in hooks:
                hook.before_epoch(model, epoch)
            seen, stopped = [], False
            for step, (x, y) in enumerate(batches(data.train, batch_size, seed, epoch), start=epoch * steps):
                if step < start:
                    continue
                if stopped := step == end or any(hook.stops(model, step) for hook in hooks):
                    break
                if any(hook.skips(model, step) for hook in hooks):
                    continue
                opt.param_groups[0]["lr"] = learning_rate(schedule, lr, step / (epochs * steps))
                with StrideFirst():
                    for hook in hooks:
                        hook.before_step(model, step)
                    output = _output(model, x)
                    loss = objective(model, x, y, output) if objective else task.loss(output, y)
                    if not isinstance(loss, Tensor) or loss.numel() != 1:
                        given = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
                        raise TrainingError(f"the loss is {given}: what is minimized is one number, a tensor ()")
                    opt.zero_grad()
                    loss.backward()
                    for hook in hooks:
                        hook.after_backward(model, step)
                opt.step()
                with torch.no_grad():
                    losses = loss, task.loss(output, y) if objective else loss
                    score = (nan, 1) if task.whole else task.score(output, y)
                    seen.append((len(y), *(each.detach() * len(y) for each in losses), *score))
            said = "no batch"
            if seen:
                images, aim, loss, score, of = (float(sum(column)) for column in zip(*seen, strict=True))
                if not isfinite(aim):
                    raise TrainingError(f"training diverged in epoch {epoch + 1} (loss {aim}): lower lr = {lr}")
                means = loss / images, score / of
                rows.append((epoch + 1, opt.param_groups[0]["lr"], *means, int(images), aim / images))
                said = "loss {:.3f}, score {:.3f}".format(*means)
            if progress:
                done = 1.0 if stopped else (min((epoch + 1) * steps, end) - start) / (end - start)
                progress(done, f"epoch {epoch + 1}/{epochs}, {said}")
            if stopped:
                break
            for hook in hooks:
                hook.after_epoch(model, epoch)
    columns = ["epoch", "lr", "train_loss", "train_accuracy", "images", "objective"]
    return pd.DataFrame(rows, columns=columns).drop(columns=[] if objective else "objective")


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int = 200, score: Score | None = None) -> float:
    """The task's score on a split (accuracy in [0, 1] of classes), in evaluation mode; each module's mode is restored.

    Args:
        score: another one, of the same form: a sum over a batch and the number of its terms; over the whole split where
            it has an attribute ``whole`` that is true.

    Raises:
        TrainingError: an empty split, or one that does not fit the model.

    >>> from lib.data import Split
    >>> from lib.training import evaluate
    >>> split = Split(torch.eye(4).reshape(4, 4, 1, 1), torch.tensor([0, 1, 2, 2]))
    >>> evaluate(torch.nn.Flatten(), split)  # the largest input is the class: wrong once in four
    0.75
    """
    _check_fit(model, split)
    with in_mode(model, training=False):
        outputs = (model(x) for x in split.x.split(batch_size))
        pairs = zip(outputs, split.y.split(batch_size), strict=True)
        if split.task.whole if score is None else getattr(score, "whole", False):
            pairs = [(torch.cat([output for output, _ in pairs]), split.y)]
        sums, numbers = zip(*((score or split.task.score)(output, y) for output, y in pairs), strict=True)
    return float(sum(sums)) / float(sum(numbers))


@torch.no_grad()
def recalibrate(model: nn.Module, data: Data, batch_size: int = 200, batches: int = 10) -> nn.Module:
    """Find the mean and variance of every batch norm anew on training images, in place. Returns the model.

    They are plain averages over the batches, which are drawn at random, always the same, as data may lie class by
    class; what else the network holds is not touched. A pruned or merged network otherwise carries the statistics of
    another one. A batch norm that no batch meets (of a width that is not active, of a block that is skipped) keeps its
    statistics, and all of them do if the pass fails.

    >>> from lib import data, models, training
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("vgg", images.shape, images.classes)
    >>> float(training.recalibrate(model, images, batches=1).bn1_1.running_mean.abs().max()) > 0  # it was 0
    True
    """
    norms = {
        m: (m.momentum, [b.clone() for b in m.buffers(recurse=False)])
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    }
    done = False
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain average
        with in_mode(model, training=True), torch.random.fork_rng():
            torch.manual_seed(0)  # of what draws in training mode, such as dropout
            order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0)).to(data.train.x.device)
            for index in order.split(_sizes(len(data.train), batch_size))[: batches if norms else 0]:
                model(data.train.x[index])
        done = True
    finally:
        for norm, (momentum, before) in norms.items():
            norm.momentum = momentum
            if not done or not norm.num_batches_tracked:
                for buffer, value in zip(norm.buffers(recurse=False), before, strict=True):
                    buffer.copy_(value)
    return model
