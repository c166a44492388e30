"""Early-Bird tickets: the channels that a network can do without show early in training (You et al., ICLR 2020)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.channels import compact, follow, residual_groups
from lib.channels.paths import zeroed
from lib.channels.spaces import own_norms, trace
from lib.constraint import Plan
from lib.data import Data
from lib.recipes.rewinding import one_shot
from lib.shapes import prunable
from lib.training import Hook, TrainingError, fit, steps_per_epoch

Channels = dict[str, Tensor]
"""For each convolution: which of its filters (F,) stay."""


def norms_of_channels(model: nn.Module, example: Tensor) -> dict[str, str]:
    """The convolutions whose channels can be cut one by one, and the batch norm behind each.

    Channels that residual sums add up belong to several convolutions and are left alone, as the paper's channel
    selection layers would need another network.

    Raises:
        TrainingError: no batch norm scales the channels of any convolution.

    >>> from lib import models, recipes
    >>> recipes.norms_of_channels(models.build("resnet8", (1, 28, 28), 10), torch.zeros(1, 1, 28, 28))
    {'block1_1.conv1': 'block1_1.bn1', 'block2_1.conv1': 'block2_1.bn1', 'block3_1.conv1': 'block3_1.bn1'}
    """
    own = own_norms(trace(model, example))
    free = [names[0] for names in residual_groups(model, example) if len(names) == 1]
    found = {name: own[name][0] for name in free if own[name] and model.get_submodule(own[name][0]).affine}
    if not found:
        raise TrainingError("no convolution of the model has channels of its own with a batch norm behind them")
    return found


@torch.no_grad()
def channels_by_norm(model: nn.Module, norms: Mapping[str, str], sparsity: float) -> Channels:
    """The channels whose batch norm scale is large: all layers ranked together.

    ``|gamma|`` has to exceed the value at place ``floor(sparsity * channels)`` of the sorted ones; a layer that would
    be emptied keeps its largest channel.

    Raises:
        TrainingError: a sparsity outside [0, 1).

    >>> from lib.recipes import channels_by_norm
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    >>> net[1].weight.data = torch.tensor([0.1, -0.9, 0.5, 0.2])
    >>> channels_by_norm(net, {"0": "1"}, sparsity=0.25)["0"].tolist()
    [False, True, True, False]
    """
    if not 0 <= sparsity < 1:
        raise TrainingError(f"sparsity = {sparsity}: allowed are numbers in [0, 1)")
    scales = {conv: model.get_submodule(norm).weight.abs() for conv, norm in norms.items()}
    ranked = torch.cat([*scales.values()]).sort().values
    threshold = ranked[int(sparsity * len(ranked))] if sparsity else -1.0
    stay = {conv: scale > threshold for conv, scale in scales.items()}
    for conv, scale in scales.items():
        stay[conv][scale.argmax()] = True
    return stay


def ticket(model: nn.Module, channels: Channels, example: Tensor) -> nn.Module:
    """The physically smaller network of the channels that stay, with their weights and batch norm statistics.

    Unlike `lib.channels.compact` alone this changes the outputs: the other channels are gone.

    >>> from lib import models, recipes
    >>> net, image = models.build("vgg", (1, 28, 28), 10), torch.zeros(1, 1, 28, 28)
    >>> channels = recipes.channels_by_norm(net, recipes.norms_of_channels(net, image), sparsity=0.0)
    >>> channels["conv1_1"][4:] = False
    >>> small = recipes.ticket(net, channels, image)
    >>> small.conv1_1.out_channels, small.conv1_2.in_channels, small.bn1_1.num_features
    (4, 4, 4)
    """
    layers = prunable(model)
    masks = {n: stay.view(-1, *(1,) * (layers[n].weight.dim() - 1)) for n, stay in channels.items()}
    masks = {n: mask.expand_as(layers[n].weight).contiguous() for n, mask in masks.items()}
    return compact(zeroed(model, follow(model, masks, example)), example)


def mask_distances(masks: Tensor) -> Tensor:
    """The share of entries in which masks differ: (T, n) booleans, one mask a row, to (T, T) distances in [0, 1].

    Independent masks of sparsity ``p`` have the distance ``2 p (1 - p)``.

    >>> from lib.recipes import mask_distances
    >>> mask_distances(torch.tensor([[True, False], [True, True]])).tolist()
    [[0.0, 0.5], [0.5, 0.0]]
    """
    signs = masks.float() * 2 - 1
    return (1 - signs @ signs.T / masks.shape[1]).clamp(min=0) / 2


def drawing_point(masks: Tensor, window: int = 5, tolerance: float = 0.1) -> int | None:
    """The first mask (T, n) that differs by at most ``tolerance`` from each of the ``window - 1`` before it, or None.

    >>> from lib.recipes import drawing_point
    >>> masks = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0], [1, 0, 1, 0]], dtype=torch.bool)
    >>> drawing_point(masks, window=3)
    3
    """
    distances = mask_distances(masks)
    for t in range(window - 1, len(masks)):
        if (distances[t, t - window + 1 : t] <= tolerance + 1e-6).all():
            return t
    return None


@dataclass(frozen=True)
class ScalePull(Hook):
    """An L1 penalty of weight ``strength`` on batch norm scales, by its subgradient: what a ticket trains on with.

    >>> from lib.recipes import ScalePull
    >>> norm = torch.nn.BatchNorm2d(2)
    >>> norm.weight.data, norm.weight.grad = torch.tensor([2.0, -3.0]), torch.zeros(2)
    >>> ScalePull(0.5).after_backward(norm, step=0)
    >>> norm.weight.grad.tolist()
    [0.5, -0.5]
    """

    strength: float

    @torch.no_grad()
    def after_backward(self, model: nn.Module, step: int) -> None:
        """Add the penalty's subgradient to the gradients."""
        for norm in model.modules():
            learns = isinstance(norm, _BatchNorm) and norm.affine and norm.weight.grad is not None  # not where frozen
            if self.strength and learns:
                norm.weight.grad += self.strength * norm.weight.sign()


class _Watch(Hook):
    """Looks at a mask at the steps that are due, before the batch."""

    def __init__(self, look: Callable[[nn.Module], Tensor], due: Callable[[int], bool], until: Callable | None) -> None:
        self.look, self.due, self.until = look, due, until
        self.masks: list[Tensor] = []
        self.steps: list[int] = []

    def stops(self, model: nn.Module, step: int) -> bool:
        if not self.due(step):
            return False
        self.masks.append(self.look(model).cpu())
        self.steps.append(step)
        return self.until is not None and self.until(torch.stack(self.masks)) is not None


def early_bird(
    model: nn.Module,
    data: Data,
    *,
    sparsity: float | None = None,
    plan: Plan | None = None,
    epochs: int,
    checks: int = 1,
    window: int = 5,
    tolerance: float = 0.1,
    pull: float = 1e-4,
    draw: bool = True,
    hooks: tuple[Hook, ...] = (),
    **fit_options: Any,
) -> tuple[Tensor, list[int], int]:
    """Train until the mask stops changing, in place: Early-Bird tickets (You et al., ICLR 2020, arXiv 1909.11957).

    Before each check's batch the mask is drawn; when the newest of ``window`` differs from each of the others in at
    most ``tolerance`` of its entries, training ends there. `ticket` makes the smaller network, and
    ``fit(..., start=step)`` goes on with the same schedule. The mask is that of channels by batch norm scale at a
    global ``sparsity`` (`channels_by_norm`), or that of a ``plan``'s projection: single weights by magnitude, say.

    Args:
        epochs: of the whole schedule, of which only the beginning is run.
        checks: for each epoch, evenly; the paper looks once.
        pull: strength of the L1 penalty on batch norm scales (`ScalePull`).
        draw: False goes on to the end, or to ``stop``: a history that a drawing point can be read from, and a
            network that a late ticket can.

    Returns:
        The masks (T, n), the steps at which they were taken, and the step where training ended: the drawing point, or
        the last step when the ticket was never drawn.

    Raises:
        TrainingError: neither or both of sparsity and plan, fewer checks than 1 or more than batches, none of them
            between ``start`` and ``stop``, a window below 2.

    >>> from lib import data, models, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> net = models.build("vgg", images.shape, images.classes, width=4)
    >>> masks, steps, end = recipes.early_bird(
    ...     net, images, sparsity=0.5, epochs=4, checks=2, window=3, tolerance=0.5, lr=0.05, batch_size=50
    ... )
    >>> masks.shape, steps, end
    (torch.Size([3, 56]), [0, 2, 4], 4)
    """
    steps = steps_per_epoch(data, **fit_options)
    if (sparsity is None) == (plan is None):
        raise TrainingError(f"early_bird: {sparsity=}, plan={'given' if plan else None}: give one of the two")
    if not 1 <= checks <= steps or window < 2 or not tolerance >= 0 or epochs < 1:
        raise TrainingError(
            f"early_bird: {epochs=}, {checks=}, {window=}, {tolerance=}: allowed are epochs from 1, 1 to {steps} "
            "checks, a window from 2, and a tolerance from 0"
        )
    if plan is None:
        norms = norms_of_channels(model, data.train.x[:1])
        look = lambda net: torch.cat([*channels_by_norm(net, norms, sparsity).values()])  # noqa: E731
    else:
        look = lambda net: torch.cat([m.flatten() for m in one_shot(net, plan).values()])  # noqa: E731
    until = (lambda masks: drawing_point(masks, window, tolerance)) if draw else None
    places, last = {i * steps // checks for i in range(checks)}, fit_options.get("stop")
    last = epochs * steps if last is None else last
    if not any(step % steps in places for step in range(fit_options.get("start", 0), last)):
        raise TrainingError(f"early_bird: {checks=} an epoch of {steps} batches, and none before batch {last}")
    hook = _Watch(look, lambda step: step % steps in places, until)
    fit(model, data, epochs=epochs, hooks=(*hooks, hook, ScalePull(pull)), **fit_options)
    masks = torch.stack(hook.masks)
    ended = draw and drawing_point(masks, window, tolerance) is not None
    return masks, hook.steps, hook.steps[-1] if ended else last
