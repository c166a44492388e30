"""One-shot masks, pruning in steps, iterative pruning, and setting a network back to weights that it had."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from torch import Tensor, nn

from lib.constraint import Masks, Plan, State, attach_masks, detach_masks, fitted, leaf, select, weights
from lib.data import Data
from lib.recipes.common import movable, own_masks, part, stage_seed
from lib.shapes import prunable
from lib.training import Progress, TrainingError, fit


def layer_weights(state: State, layers: Iterable[str]) -> dict[str, Tensor]:
    """The weights of some layers out of a `state_of` a network, by layer name: what `lib.pruning.correlation` takes.

    >>> from lib.models import build
    >>> from lib.recipes import layer_weights
    >>> from lib.constraint import state_of
    >>> theta = layer_weights(state_of(build("lenet300", (1, 28, 28), 10)), ["fc1", "fc3"])
    >>> {name: tuple(weight.shape) for name, weight in theta.items()}
    {'fc1': (300, 784), 'fc3': (10, 100)}
    """
    return {name: state[f"{name}.weight"] for name in layers}


def rewind(model: nn.Module, state: State, masks: Masks | None = None) -> nn.Module:
    """Set every parameter and buffer (batch norm included) to ``state``, then hold ``masks``. Returns the model.

    The lottery ticket is ``rewind(model, theta_0, m)``, fine-tuning starts from ``rewind(model, theta_T, m)``.

    Raises:
        ShapeError: something else makes a weight of the model.

    >>> from lib.recipes import rewind
    >>> from lib.constraint import state_of
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> model[0].weight.data = torch.tensor([[1.0, 2.0]])
    >>> start = state_of(model)
    >>> model[0].weight.data = torch.tensor([[9.0, 0.5]])  # as if trained
    >>> rewind(model, start, {"0": torch.tensor([[True, False]])})[0].weight.tolist()
    [[1.0, 0.0]]
    """
    for layer in prunable(model).values():
        leaf(layer)
    detach_masks(model).load_state_dict(state)
    return attach_masks(model, masks or {})


def one_shot(model: nn.Module, plan: Plan) -> Masks:
    """Masks of the projection of the weights as they are: for `Unstructured`, magnitude pruning in one step.

    >>> from lib.pruning import Unstructured
    >>> from lib.recipes import one_shot
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 1))
    >>> model[0].weight.data = torch.tensor([[3.0, -1.0, 0.5, -2.0]])
    >>> one_shot(model, {"0": Unstructured(0.5)})["0"].tolist()
    [[True, False, False, True]]
    """
    return select(plan, weights(model, plan))


def _tightened(held: Masks, found: Masks) -> Masks:
    """All masks so far inside new ones: a survivor that became exactly zero is not traded for a removed weight."""
    return held | {name: mask & held.get(name, mask) for name, mask in found.items()}


def iterative(
    model: nn.Module,
    plans: Sequence[Plan],
    data: Data,
    start: State,
    *,
    progress: Progress | None = None,
    **fit_options: Any,
) -> list[Masks]:
    """Iterative magnitude pruning with rewinding (Frankle and Carbin, ICLR 2019).

    ``model`` comes in trained. Each round prunes it to the next, tighter plan, rewinds what is left to ``start``
    (``theta_0``, or ``theta_k``) and trains it again; the last plan's mask needs no training after it. So the search
    costs ``(len(plans) - 1) * epochs`` on top of the dense training, and the mask of plan ``i`` costs ``i * epochs``.

    Returns:
        The masks of every plan, each inside the one before it, also where a plan names other layers than that did.

    Raises:
        TrainingError: no plan.

    >>> from lib import constraint, data, models, pruning, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> plans = [pruning.uniform_plan(model, pruning.Unstructured(sparsity)) for sparsity in (0.5, 0.75)]
    >>> masks = recipes.iterative(model, plans, images, constraint.state_of(model), epochs=1, lr=0.05)
    >>> [int(m["fc2"].sum()) for m in masks], bool((masks[1]["fc2"] <= masks[0]["fc2"]).all())
    ([15000, 7500], True)
    """
    if not plans:
        raise TrainingError("iterative: at least one plan is needed")
    for plan in plans:
        movable(model, plan)
    found: list[Masks] = []
    with own_masks(model, *plans) as others:
        for i, plan in enumerate(plans):
            if i:
                fit(model, data, progress=part(progress, i - 1, 1, len(plans) - 1, f"round {i}"), **fit_options)
            found.append(_tightened(found[-1] if found else {}, one_shot(model, plan)))
            rewind(model, start, others | found[-1])
    return found


def prune_and_tune(
    model: nn.Module,
    plans: Sequence[Plan],
    data: Data,
    *,
    dense_epochs: int,
    epochs: int,
    seed: int = 0,
    progress: Progress | None = None,
    **fit_options: Any,
) -> pd.DataFrame:
    """Train dense, then prune to one plan after the other and train inside each, in place (Han et al., NeurIPS 2015).

    With one plan this is one-shot pruning with fine-tuning; with several, gradual pruning without rewinding. Every
    training is a schedule of its own. What one plan has removed stays away, whatever the next one names. The network is
    left with its zeros, without masks.

    Returns:
        As `fit`, the rows of all trainings, with ``stage`` (0: dense).

    Raises:
        ConstraintError: a set of values, which has no mask.

    >>> from lib import constraint, data, models, pruning, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> plans = [pruning.uniform_plan(model, pruning.Unstructured(sparsity)) for sparsity in (0.5, 0.75)]
    >>> log = recipes.prune_and_tune(model, plans, images, dense_epochs=2, epochs=1, lr=0.05)
    >>> log["stage"].tolist(), round(constraint.sparsity(model), 4)
    ([0, 0, 1, 2], 0.75)
    """
    for plan in plans:
        movable(model, plan)
    logs, held = [], {}
    with own_masks(model, *plans) as others:
        for stage, (plan, length) in enumerate([(None, dense_epochs), *((plan, epochs) for plan in plans)]):
            held = _tightened(held, one_shot(model, fitted(model, plan)) if plan else {})
            attach_masks(model, others | held)
            report = part(progress, stage, 1, len(plans) + 1, f"stage {stage}")
            seeded = {"seed": stage_seed(seed, stage), "progress": report}
            logs.append(fit(model, data, epochs=length, **seeded, **fit_options))
            logs[-1].insert(0, "stage", stage)
    return pd.concat(logs, ignore_index=True)
