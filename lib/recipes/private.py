"""Pruning a trained network without its data: made-up inputs, and a copy of the network as it came for a teacher."""

from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.modules.batchnorm import _BatchNorm

from lib.constraint import Plan, plain
from lib.data import Data, Split, Task
from lib.recipes.admm import admm
from lib.recipes.common import movable
from lib.shapes import all_layers, in_mode, uses
from lib.training import Hook, TrainingError, fit


def _agreement(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (output.argmax(1) == y.argmax(1)).sum(), torch.tensor(len(y))


like_the_teacher = Task("agreement with the teacher", mse_loss, _agreement)
"""What is learned where there are no labels: the teacher's outputs; the score is how often the largest is the same."""


def prune_without_data(
    model: nn.Module,
    plan: Plan,
    x: Tensor,
    *,
    match: Literal["layers", "logits"] = "layers",
    inputs: Literal["student", "teacher"] = "student",
    hooks: tuple[Hook, ...] = (),
    **options: Any,
) -> pd.DataFrame:
    """ADMM toward a plan, in place, with no data but inputs that anybody can make up (arXiv 2003.06513).

    Each planned layer is to compute what it did in the network as it came, the teacher: the sum over layers of
    ``||f_n(student) - f_n(teacher)||^2 / ||f_n(teacher)||^2`` is minimized, and the gradient of a layer's term moves
    that layer alone. ``f_n`` is a layer's own output, before batch norm and activation. All layers move in one run,
    where the paper takes one after the other. The client gets ``recipes.one_shot(model, plan)``, the masks, with the
    weights or without, and retrains on data that nobody else has seen.

    Args:
        x: ``(N, ...)`` inputs, normalized as the network expects them; a tenth of them is held out, for the log.
        match: ``logits`` compares the last output alone, through the whole network: a baseline.
        inputs: of a layer: what the ``student`` hands on, errors of the layers before it included, or what the
            ``teacher`` hands on (not for ``logits``).
        options: of `admm` (``epochs``, ``rho``, ...) and `fit` (``lr``, ``optimizer``, ...).

    Returns:
        As `admm`; the accuracies are agreements with the teacher on inputs that were held out.

    Raises:
        TrainingError: as `admm`, fewer than 20 inputs, or a wrong ``match`` or ``inputs``.

    >>> from lib import constraint, models, pruning, recipes
    >>> model = models.build("lenet300", (1, 28, 28), 10)
    >>> plan = pruning.uniform_plan(model, pruning.Unstructured(0.9))
    >>> x = recipes.synthetic_inputs(model, 200, (1, 28, 28), "uniform", low=-0.8, high=2.0)
    >>> log = recipes.prune_without_data(model, plan, x, epochs=2, lr=0.001, optimizer="adam")
    >>> log["epoch"].tolist(), round(constraint.sparsity(model), 3)
    ([1, 2], 0.9)
    """
    for name, value, allowed in (
        ("match", match, ("layers", "logits")),
        ("inputs", inputs, ("student", "teacher")),
    ):
        if value not in allowed:
            raise TrainingError(f"prune_without_data: {name} = {value!r}: allowed are {' and '.join(allowed)}")
    if len(x) < 20:
        raise TrainingError(f"prune_without_data: {len(x)} inputs: at least 20 are needed")
    movable(model, plan)
    data = _answered(model, x)
    if match == "logits":
        return admm(model, plan, data, hooks=(*hooks, _Frozen()), **options)
    matching = _LayerMatching(model, plan, inputs == "student")
    return admm(model, plan, data, objective=matching.loss, hooks=(*hooks, matching), **options)


def _answered(teacher: nn.Module, x: Tensor) -> Data:
    """Inputs with the teacher's outputs in place of labels."""
    with torch.no_grad(), in_mode(teacher, training=False):
        y = torch.cat([teacher(part) for part in x.split(500)])
    held = len(x) // 10
    parts = [Split(x[s], y[s], like_the_teacher) for s in (slice(held, None), slice(held), slice(held))]
    return Data("made-up inputs", *parts, classes=y.shape[1])


class _Frozen(Hook):
    """Keeps batch norm and dropout as they are in use: made-up inputs would ruin running statistics.

    The model itself is in training mode between passes, which is how hooks tell training from a look at it.
    """

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.mode = model.training

        def still(model, args):
            self.mode, model.training = model.training, False  # a dropout in its own forward asks

        def back(model, args, output):
            model.training = self.mode

        self.handles = [model.register_forward_pre_hook(still), model.register_forward_hook(back, always_call=True)]

    def before_step(self, model: nn.Module, step: int) -> None:
        for child in model.children():
            child.eval()

    def end(self, model: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()


class _LayerMatching(_Frozen):
    """What the planned layers compute, in the student and in the teacher, and how far apart that is.

    Hooks cut the graph in front of every layer, so that one forward pass and one backward pass do for all of them.
    """

    def __init__(self, model: nn.Module, plan: Plan, of_student: bool) -> None:
        self.layers, self.of_student = list(plan), of_student
        self.teacher = plain(model).requires_grad_(False).eval()
        self.given, self.aimed, self.made = _Uses(), _Uses(), _Uses()
        self.on = False
        _recorded(self.teacher, self.layers, self.given, self.aimed)

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def ask(model, args):
            self.on = model.training
            if self.on:
                for each in (self.given, self.aimed, self.made):
                    each.clear()
                self.teacher(*args)

        def cut(name):
            def hook(layer, args):
                if self.on:
                    return (args[0].detach() if self.of_student else self.given[name][len(self.made[name])],)

            return hook

        def keep(name):
            return lambda layer, args, output: self.made[name].append(output) if self.on else None

        asking = model.register_forward_pre_hook(ask)  # before the model's own mode is changed
        super().begin(model, optimizer)
        self.handles.append(asking)
        found = uses(model)
        for name in self.layers:
            for layer in found[name]:
                self.handles += [layer.register_forward_pre_hook(cut(name)), layer.register_forward_hook(keep(name))]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, output: Tensor) -> Tensor:
        """The sum of the layers' relative squared errors, ``()``."""
        _all_met(self.layers, self.made, "leave it out of the plan")
        return sum(_relative(self.made[name], self.aimed[name]) for name in self.layers)


class _Uses(defaultdict):
    """By layer the tensors of all of its uses in a pass, in their order."""

    def __init__(self) -> None:
        super().__init__(list)


def _all_met(layers: Iterable[str], made: _Uses, advice: str) -> None:
    if missing := [name for name in layers if not made[name]]:
        raise TrainingError(f"the forward pass does not meet {missing[0]}: {advice}")


def _relative(made: list[Tensor], aimed: list[Tensor]) -> Tensor:
    error = sum((a - b).square().sum() for a, b in zip(made, aimed, strict=True))
    return error / sum(b.square().sum() for b in aimed).clamp_min(1e-12)


def _recorded(model: nn.Module, layers: Iterable[str], given: _Uses, made: _Uses) -> list:
    """Hooks that write what layers get and make, use by use, into two dicts."""

    def keep(name):
        def hook(layer, args, output):
            given[name].append(args[0].detach())
            made[name].append(output.detach())

        return hook

    found = uses(model)
    return [layer.register_forward_hook(keep(name)) for name in layers for layer in found[name]]


@torch.no_grad()
def layer_errors(model: nn.Module, teacher: nn.Module, x: Tensor) -> dict[str, float]:
    """How far each layer's output is from the teacher's: ``||f_n - t_n||^2 / ||t_n||^2`` on inputs ``(N, ...)``.

    Each network feeds its layers itself, so that errors of earlier layers are in it. Of a layer that is used twice both
    uses are summed.

    Raises:
        TrainingError: a layer that the forward pass does not meet.

    >>> from lib.recipes import layer_errors
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    >>> layer_errors(model, model, torch.randn(5, 2))
    {'0': 0.0, '2': 0.0}
    """
    found: list[_Uses] = []
    names = list(all_layers(teacher, "layer_errors", skip=True))
    for net in (model, teacher):
        made = _Uses()
        handles = _recorded(net, names, _Uses(), made)
        with in_mode(net, training=False):
            net(x)
        for handle in handles:
            handle.remove()
        found.append(made)
        _all_met(names, made, "there is no error of it")
    return {name: float(_relative(found[0][name], found[1][name])) for name in names}


def synthetic_inputs(
    model: nn.Module,
    count: int,
    shape: tuple[int, ...],
    kind: Literal["uniform", "gaussian", "batch norm"],
    *,
    low: float = -1.0,
    high: float = 1.0,
    epochs: int = 20,
    lr: float = 0.05,
    seed: int = 0,
) -> Tensor:
    """Inputs ``(count, *shape)`` that are made of nothing but the network and the range of its inputs.

    ``uniform`` in [low, high], which is where normalized pixels lie; ``gaussian`` of mean 0 and deviation 1, which is
    how normalized data are spread; ``batch norm`` begins there, and moves the inputs until mean and variance before
    every batch norm are those that it met in training (Yin et al., DeepInversion, CVPR 2020, without its other terms).

    Args:
        epochs, lr: of Adam on the inputs themselves, for ``batch norm``, in batches of 100.

    Raises:
        TrainingError: another kind, or no batch norm with running statistics in the network.

    >>> from lib.recipes import synthetic_inputs
    >>> x = synthetic_inputs(torch.nn.Flatten(), 1000, (1, 4, 4), "uniform", low=-1, high=3)
    >>> tuple(x.shape), round(x.mean().item(), 1), bool(x.min() >= -1), bool(x.max() <= 3)
    ((1000, 1, 4, 4), 1.0, True, True)
    """
    generator = torch.Generator().manual_seed(int(seed))
    if kind == "uniform":
        return torch.rand(count, *shape, generator=generator) * (high - low) + low
    x = torch.randn(count, *shape, generator=generator)
    if kind == "gaussian":
        return x
    if kind != "batch norm":
        raise TrainingError(f"synthetic_inputs: kind = {kind!r}: allowed are 'uniform', 'gaussian' and 'batch norm'")
    return _as_batch_norm_saw(model, x, epochs, lr, seed)


class _Inputs(nn.Module):
    """Inputs as parameters: the model of a `fit` whose data are their numbers."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.clone())

    def forward(self, index: Tensor) -> Tensor:
        return self.x[index]


def _as_batch_norm_saw(model: nn.Module, x: Tensor, epochs: int, lr: float, seed: int) -> Tensor:
    net = deepcopy(plain(model)).requires_grad_(False).eval()
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise TrainingError("synthetic_inputs: kind = 'batch norm', and the network has none with running statistics")
    apart: list[Tensor] = []

    def compare(norm, args):
        variance, mean = torch.var_mean(args[0].transpose(0, 1).flatten(1), 1, correction=0)  # (C,) of all positions
        scale = norm.running_var + norm.eps
        apart.append(((mean - norm.running_mean).square() / scale).mean() + (variance / scale - 1).square().mean())

    for norm in norms:
        norm.register_forward_pre_hook(compare)

    def distance(inputs, index, y, images):
        apart.clear()
        net(images)
        return sum(apart)

    like = norms[0].running_mean
    index, nothing = torch.arange(len(x), device=like.device), torch.zeros(len(x), *x.shape[1:], device=like.device)
    numbers, inputs = Split(index, nothing, Task("nothing", mse_loss, _no_score)), _Inputs(x.to(like))
    options = {"epochs": epochs, "lr": lr, "optimizer": "adam", "schedule": "cosine", "batch_size": 100, "seed": seed}
    fit(inputs, Data("inputs", numbers, numbers, numbers, classes=1), objective=distance, **options)
    return inputs.x.detach().to(x)


def _no_score(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tensor(0), torch.tensor(1)
