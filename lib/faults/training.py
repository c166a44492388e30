"""Training on faulty chips, so that a network learns to live with faults that it has not seen."""

from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lib.constraint import attach, detach
from lib.crossbar import CrossbarError, Mapping
from lib.crossbar.devices import Devices, each
from lib.faults.readback import on_crossbars, read_back
from lib.shapes import Parametrization, prunable, uses
from lib.training import Hook, TrainingError

NEW = 1 << 40
"""Chips from this number on are for training: no sweep meets them."""


class _Error(Parametrization):
    """Parametrization ``W -> W + (broken(W) - W)``, the difference a constant: gradients go straight through."""

    def __init__(self, name: str, mapping: Mapping, hook: "UnderFaults") -> None:
        super().__init__()
        self.name, self.mapping, self.hook, self.error = name, mapping, hook, None

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` as the chip of this step gives it back."""
        return weight if self.error is None else weight + self.error

    def draw(self, layer: nn.Module, devices: Devices, chip: int) -> None:
        """Move to another chip."""
        self.error = None
        weight = layer.weight
        self.error = read_back(weight, self.mapping, devices, chip, self.name) - weight


@dataclass(frozen=True)
class UnderFaults(Hook):
    """Fault-injected training: every step runs on a chip of its own, forward and backward, and moves healthy weights.

    A recipe of several trainings meets the same chips in each, as each begins at step 0.

    Put it first among a call's hooks, ``fit(..., hooks=(UnderFaults("differential", StuckAt(0.1)),))``; recipes pass
    ``hooks`` on. It stands behind the masks of pruned layers: a removed weight still has cells that can fail.

    Attributes:
        mapping: one mapping, or one for each layer that lies in crossbars. devices: what happens to the cells.
        seed: training runs of different seeds see different chips.

    >>> from lib import data, faults, models, training
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> hook = faults.UnderFaults("two_column", faults.StuckAt(1.0, ratio=0))  # all cells off: biases alone are left
    >>> log = training.fit(model, images, epochs=1, lr=0.001, hooks=(hook,))
    >>> f"{log['train_loss'].iloc[0]:.1f}", bool(model.fc1.weight.any())  # ln 10 in training, healthy after it
    ('2.3', True)
    """

    mapping: Mapping | str | Dict[str, Mapping | str]
    devices: Devices
    seed: int = 0

    def __post_init__(self) -> None:
        each(self.devices, lasting=True)

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Stand behind every mapped weight."""
        layers = uses(model)
        for name, mapping in on_crossbars(model, self.mapping).items():
            attach(layers[name], _Error(name, mapping, self))

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        """Draw a chip.

        Raises:
            TrainingError: the weights have left the finite numbers.
        """
        try:
            for layer, error in self._errors(model):
                error.draw(layer, self.devices, NEW + (self.seed << 24) + step)
        except CrossbarError as error:
            raise TrainingError(f"training under faults diverged in step {step}: {error}; lower lr or clip") from None

    def after_backward(self, model: nn.Module, step: int) -> None:
        """From here to the next step weights read healthy, also to whoever ranks or pulls them."""
        for _, error in self._errors(model):
            error.error = None

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """Leave the network healthy for whoever looks at it between epochs."""
        self.end(model)

    def end(self, model: nn.Module) -> None:
        """Leave it healthy, also when training broke off."""
        for modules in uses(model).values():
            detach(modules, _Error)

    def _errors(self, model: nn.Module) -> Iterator[tuple[nn.Module, _Error]]:
        for layer in prunable(model).values():
            last = layer.parametrizations["weight"][-1] if parametrize.is_parametrized(layer, "weight") else None
            if isinstance(last, _Error) and last.hook is self:
                yield layer, last
