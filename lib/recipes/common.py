"""What recipes have in common: the parameters that a plan speaks of, pulls on them, masks of a recipe's own, stages."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lib.constraint import Masks, Plan, attach_masks, leaf, masks, weights
from lib.constraint.masks import refuse_others
from lib.shapes import uses
from lib.training import Hook, Progress, TrainingError


def movable(model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """The parameters behind the planned layers: what is wrong with a plan is said before anything is trained.

    Raises:
        ConstraintError: as `weights`, or a tensor that is also in what is no layer. ShapeError: something else makes a
            weight. TrainingError: a layer is frozen.
    """
    weights(model, plan)
    layers = {name: modules for name, modules in uses(model).items() if name in plan}
    for name, modules in layers.items():
        refuse_others(model, name, modules)
    found = {name: leaf(modules[0]) for name, modules in layers.items()}
    if frozen := [name for name, parameter in found.items() if not parameter.requires_grad]:
        raise TrainingError(f"no training moves {', '.join(frozen)}: requires_grad is False; leave it out of the plan")
    return found


class Pulling(Hook):
    """Changes the gradients of planned layers; `pull` is called for each when it is filled."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.plan, self.parameters = plan, movable(model, plan)
        self.met: set[str] = set()

    @torch.no_grad()
    def after_backward(self, model: nn.Module, step: int) -> None:
        """Pull every layer; one that this batch has not met, as a block was skipped, has a gradient of zero.

        Raises:
            TrainingError: no batch has met a layer yet.
        """
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                if name not in self.met:
                    raise TrainingError(f"the forward pass does not meet {name}: leave it out of the plan")
                parameter.grad = torch.zeros_like(parameter)
            self.met.add(name)
            self.pull(name, parameter)

    def pull(self, name: str, parameter: nn.Parameter) -> None:
        """Change ``parameter.grad``."""


@contextmanager
def own_masks(model: nn.Module, *plans: Plan) -> Iterator[Masks]:
    """Within, a recipe attaches masks of its own beside those of what no plan names, which are given.

    Afterwards its own are gone; if it fails, all from before are back.
    """
    before = masks(model)
    others = {name: mask for name, mask in before.items() if not any(name in plan for plan in plans)}
    try:
        yield others
        before = others
    finally:
        attach_masks(model, before)


def part(progress: Progress | None, done: float, share: float, of: float, what: str) -> Progress | None:
    """Of the progress of a recipe, what one of its trainings reports: ``share`` of all ``of``, after those ``done``."""
    return progress and (lambda fraction, text: progress((done + share * fraction) / of, f"{what}: {text}"))


def stage_seed(seed: int, stage: int) -> int:
    """A seed for one of several trainings: another order of batches in every stage, the same one in paired runs."""
    return 10_007 * seed + stage
