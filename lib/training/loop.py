"""One bare training loop, evaluation, and what a recipe may do inside the loop."""

from collections.abc import Callable, Iterator
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from lib.data import Data, Split
from lib.training.strides import StrideFirst

Progress = Callable[[float, str], None]
"""Called with the fraction done and a short message; a study passes its progress line here."""


class TrainingError(RuntimeError):
    """Training cannot start, or went wrong: the message names the setting to change.

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
    """What a recipe may do inside `fit`; every method does nothing by default.

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


def batches(split: Split, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of batches in an order that depends on ``seed`` and ``epoch`` alone: paired arms see the same.

    >>> from lib.data import Split
    >>> from lib.training import batches
    >>> split = Split(torch.zeros(5, 1, 1, 1), torch.arange(5))
    >>> order = [y.tolist() for _, y in batches(split, 2, seed=0, epoch=0)]
    >>> [len(y) for y in order], sorted(sum(order, []))
    ([2, 2, 1], [0, 1, 2, 3, 4])
    >>> order == [y.tolist() for _, y in batches(split, 2, seed=0, epoch=0)]
    True
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    for index in torch.randperm(len(split), generator=generator).to(split.y.device).split(batch_size):
        yield split.x[index], split.y[index]


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
    start_step: int = 0,
    stop_after: int | None = None,
    hooks: tuple[Hook, ...] = (),
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Train ``model`` in place on ``data.train`` by cross-entropy, where the model and the data already are.

    Bit-identical for the same seed, device and thread count. The last epoch's weights are what is left: nothing is
    selected by its accuracy. ``stop_after = k`` leaves the weights as they are after the first ``k`` epochs of a run of
    ``epochs``: the ``theta_k`` that rewinding goes back to. ``start_step = s`` goes on where a run of ``epochs`` has
    taken ``s`` batches, with its learning rate and its order of batches but no momentum; hooks see the run's own steps.

    Returns:
        One row per epoch that had a batch: ``epoch`` (from 1), ``lr``, ``train_loss``, ``train_accuracy`` over the
        ``images`` that it saw.

    Raises:
        TrainingError: a bad setting, or a loss that is not finite any more.

    >>> from lib import data, models, training
    >>> images = data.load(train_size=1000, test_size=100, validation_size=100)
    >>> net = models.build("lenet300", images.shape, images.classes)
    >>> log = training.fit(net, images, epochs=3, lr=0.05)
    >>> log["epoch"].tolist(), log["train_loss"].is_monotonic_decreasing, training.evaluate(net, images.test) > 0.5
    ([1, 2, 3], True, True)
    """
    if epochs < 0 or batch_size < 1 or lr <= 0:
        raise TrainingError(f"{epochs=}, {batch_size=}, {lr=}: allowed are epochs >= 0, batch_size >= 1, lr > 0")
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    opt = make_optimizer(model, optimizer, lr, momentum, weight_decay)
    steps = -(-len(data.train) // batch_size)
    rows = []
    for hook in hooks:
        hook.begin(model, opt)
    stopped = False
    for epoch in range(start_step // steps, epochs if stop_after is None else min(stop_after, epochs)):
        model.train()
        for hook in hooks:
            hook.before_epoch(model, epoch)
        seen, loss_sum = 0, torch.zeros((), device=data.train.y.device)
        correct = torch.zeros((), dtype=torch.long, device=data.train.y.device)
        for step, (x, y) in enumerate(batches(data.train, batch_size, seed, epoch), start=epoch * steps):
            if stopped := step >= start_step and any(hook.stops(model, step) for hook in hooks):
                break
            if step < start_step or any(hook.skips(model, step) for hook in hooks):
                continue
            opt.param_groups[0]["lr"] = learning_rate(schedule, lr, step / (epochs * steps))
            with StrideFirst():
                for hook in hooks:
                    hook.before_step(model, step)
                output = model(x)
                loss = cross_entropy(output, y)
                opt.zero_grad()
                loss.backward()
                for hook in hooks:
                    hook.after_backward(model, step)
            opt.step()
            seen += len(y)
            loss_sum += loss.detach() * len(y)
            correct += (output.detach().argmax(1) == y).sum()
        if seen:
            mean_loss, accuracy = float(loss_sum) / seen, int(correct) / seen
            if not torch.isfinite(loss_sum):
                raise TrainingError(f"training diverged in epoch {epoch + 1} (loss {mean_loss}): lower lr = {lr}")
            rows.append((epoch + 1, opt.param_groups[0]["lr"], mean_loss, accuracy, seen))
            if progress:
                progress((epoch + 1) / epochs, f"epoch {epoch + 1}/{epochs}, loss {mean_loss:.3f}, {accuracy:.1%}")
        if stopped:
            break
        for hook in hooks:
            hook.after_epoch(model, epoch)
    return pd.DataFrame(rows, columns=["epoch", "lr", "train_loss", "train_accuracy", "images"])


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int = 200) -> float:
    """Accuracy in [0, 1] on a split, in evaluation mode; the model's own mode is restored.

    >>> from lib.data import Split
    >>> from lib.training import evaluate
    >>> split = Split(torch.eye(4).reshape(4, 4, 1, 1), torch.tensor([0, 1, 2, 2]))
    >>> evaluate(torch.nn.Flatten(), split)  # the largest input is the class: wrong once in four
    0.75
    """
    mode = model.training
    model.eval()
    correct = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(split.x.split(batch_size), split.y.split(batch_size), strict=True)
    )
    model.train(mode)
    return correct / len(split)


@torch.no_grad()
def recalibrate(model: nn.Module, data: Data, batch_size: int = 200, batches: int = 10) -> nn.Module:
    """Find the mean and variance of every batch norm anew on training images, in place. Returns the model.

    They are plain averages over the batches; what else the network holds is not touched. A pruned or merged network
    otherwise carries the statistics of another one.

    >>> from lib import data, models, training
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("vgg", images.shape, images.classes)
    >>> float(training.recalibrate(model, images, batches=1).bn1_1.running_mean.abs().max()) > 0  # it was 0
    True
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return model
    mode, momenta = model.training, [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
    model.train()
    for x in data.train.x.split(batch_size)[:batches]:
        model(x)
    model.train(mode)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model
