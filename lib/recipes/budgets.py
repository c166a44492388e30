"""How much to keep, in each layer and in all: searched on validation images, as papers don't tell at extreme rates."""

from collections.abc import Mapping
from itertools import product
from typing import Any

from torch import Tensor, nn

from lib.constraint import attach_masks, fitted
from lib.data import Data
from lib.models import copied
from lib.pruning.adaptive import LayerAdaptive
from lib.pruning.groups import Unstructured
from lib.recipes.common import movable, part
from lib.recipes.rewinding import one_shot
from lib.shapes import prunable
from lib.training import Progress, TrainingError, evaluate, fit

Kept = dict[str, float]
"""Weights to keep, by layer."""


def search_budgets(
    model: nn.Module,
    data: Data,
    rate: float,
    *,
    trials: int = 24,
    step: float = 2.0,
    progress: Progress | None = None,
    **train: Any,
) -> dict[str, float]:
    """The sparsity of every layer at a total rate, by coordinate descent on the validation loss.

    Starts from LAMP's budgets (`LayerAdaptive`). Layer by layer, ``step`` times as many weights are kept in it, or as
    many times fewer, and the others give or take in proportion; what lowers the loss after a short training stays.
    When no layer gains any more, the step becomes its square root, until it is below 1.1 or the trials are used up.

    Args:
        model: trained; it is not changed. Weights that are zero in it are the first to go.
        trials: at most so many short trainings, each of a copy, inside the masks of its budgets.
        train: options of `fit` for a trial (``epochs``, ``lr``, ...).

    Returns:
        Sparsity by layer: ``{name: Unstructured(s)}`` is the plan.

    Raises:
        TrainingError: no trial, or a step below 1.1. ConstraintError: as `LayerAdaptive`.

    >>> from lib import data, models, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> found = recipes.search_budgets(model, images, rate=10.0, trials=3, epochs=1, lr=0.05)
    >>> sizes = {"fc1": 235200, "fc2": 30000, "fc3": 1000}
    >>> round(sum((1 - found[name]) * size for name, size in sizes.items()) / 266200, 2)  # kept, however shared out
    0.1
    """
    if trials < 1 or step < 1.1:
        raise TrainingError(f"search_budgets: {trials=}, {step=}: allowed are trials >= 1, step >= 1.1")
    attempt = _Trials(model, data, train, trials, progress)
    kept = attempt.lamp(rate)
    least = attempt(kept)[0]
    while step >= 1.1 and attempt.left:
        gained = False
        for layer, factor in product(kept, (step, 1 / step)):
            if layer == gained or not attempt.left:  # the layer's larger budget was a gain: no need to try a smaller
                continue
            other = _moved(kept, layer, factor, attempt.sizes)
            loss = attempt(other)[0]
            if loss < least:
                kept, least, gained = other, loss, layer
        step = step if gained else step**0.5
    return attempt.ended(attempt.sparsities(kept))


def search_rate(
    model: nn.Module,
    data: Data,
    accuracy: float,
    *,
    trials: int = 8,
    highest: float = 1000.0,
    progress: Progress | None = None,
    **train: Any,
) -> float:
    """The highest total rate that reaches a validation accuracy after a short training, with LAMP's budgets.

    Bisection of the rate's logarithm, from 1 to ``highest``. `search_budgets` may then find better budgets for it, and
    a real training more accuracy: a rate to start from, on the safe side.

    Args:
        accuracy: in [0, 1]. train: options of `fit` for a trial.

    Returns:
        The rate; 1 if every trial stays below the accuracy.

    Raises:
        TrainingError: an accuracy outside (0, 1), no trial, or a highest rate below 1.

    >>> from lib import data, models, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> trials = {"trials": 2, "highest": 100.0, "epochs": 1, "lr": 0.05}
    >>> recipes.search_rate(model, images, accuracy=0.999, **trials)  # no rate gets there
    1.0
    >>> round(recipes.search_rate(model, images, accuracy=0.001, **trials), 1)  # all do: 10, then 10^1.5
    31.6
    """
    if not 0 < accuracy < 1 or trials < 1 or highest < 1:
        raise TrainingError(f"search_rate: {accuracy=}, {trials=}, {highest=}: allowed are 0 to 1, >= 1 and >= 1")
    attempt = _Trials(model, data, train, trials, progress)
    low, high = 1.0, highest
    for _ in range(trials):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if attempt(attempt.lamp(middle))[1] >= accuracy else (low, middle)
    return attempt.ended(low)


class _Trials:
    """Short trainings of copies of one network inside the masks of budgets; equal ones run once."""

    def __init__(
        self, model: nn.Module, data: Data, train: Mapping[str, Any], most: int, progress: Progress | None
    ) -> None:
        self.model, self.data, self.train, self.most, self.progress = model, data, train, most, progress
        self.sizes = {name: w.numel() for name, w in movable(model, dict.fromkeys(prunable(model))).items()}
        self.done: dict[tuple[int, ...], tuple[float, float]] = {}

    @property
    def left(self) -> int:
        return self.most - len(self.done)

    def lamp(self, rate: float) -> Kept:
        plan = fitted(self.model, dict.fromkeys(self.sizes, LayerAdaptive(rate)))
        return {n: (1 - c.sparsity) * self.sizes[n] for n, c in plan.items()}

    def sparsities(self, kept: Kept) -> dict[str, float]:
        return {n: 1 - max(1, round(k)) / self.sizes[n] for n, k in kept.items()}

    def __call__(self, kept: Kept) -> tuple[float, float]:
        """Mean validation loss and accuracy."""
        key = tuple(round(k) for k in kept.values())
        if key not in self.done:
            net = copied(self.model)
            attach_masks(net, one_shot(net, {n: Unstructured(s) for n, s in self.sparsities(kept).items()}))
            what = f"trial {len(self.done) + 1} of at most {self.most}"
            fit(net, self.data, progress=part(self.progress, len(self.done), 1, self.most, what), **self.train)
            self.done[key] = _loss(net, self.data), evaluate(net, self.data.validation)
        return self.done[key]

    def ended(self, found: Any) -> Any:
        if self.progress:
            self.progress(1.0, f"{len(self.done)} trials")
        return found


def _moved(kept: Kept, layer: str, factor: float, sizes: Mapping[str, int]) -> Kept:
    """Budgets with ``factor`` times as many weights in one layer and equally many in all."""
    total, others = sum(kept.values()), {n: k for n, k in kept.items() if n != layer}
    own = min(max(1.0, factor * kept[layer]), sizes[layer])
    least, most = total - sum(sizes[n] for n in others), total - len(others)  # the others all full; one weight each
    own = min(max(own, least), most)
    moved = _shared(total - own, others, sizes) | {layer: own}
    return {n: moved[n] for n in kept}  # in the layers' order, which trials are known by


def _shared(total: float, by: Kept, sizes: Mapping[str, int]) -> Kept:
    """``total`` in proportion to ``by``, from one to a layer's size: what a full layer cannot take, the others get."""
    open_, found = dict(by), {}
    while open_:
        scale = (total - sum(found.values())) / sum(open_.values())
        over = {n: float(sizes[n]) for n, k in open_.items() if scale * k > sizes[n]}
        under = {n: 1.0 for n, k in open_.items() if scale * k < 1}
        surplus = sum(scale * open_[n] - size for n, size in over.items())
        missing = sum(1 - scale * open_[n] for n in under)
        bound = over if surplus >= missing else under  # the other kind may be none, once these have moved the scale
        found |= bound or {n: scale * k for n, k in open_.items()}
        open_ = {n: k for n, k in open_.items() if n not in found}
    return {n: found[n] for n in by}


def _loss(model: nn.Module, data: Data) -> float:
    """The mean loss of the validation split."""

    def loss(output: Tensor, y: Tensor) -> tuple[float, int]:
        return float(data.task.loss(output, y)) * len(y), len(y)

    return evaluate(model, data.validation, batch_size=500, score=loss)
