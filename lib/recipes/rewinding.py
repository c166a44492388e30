"""One-shot masks, iterative pruning, and setting a network back to weights that it had."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from lib.constraint import Masks, Plan, attach_masks, detach_masks, select, weights
from lib.data import Data
from lib.training import Progress, fit

State = dict[str, Tensor]


def state_of(model: nn.Module) -> State:
    """A copy of a network's parameters and buffers under the names of the unmasked network, zeros baked in."""
    return deepcopy(detach_masks(deepcopy(model)).state_dict())


def layer_weights(state: State, layers: Iterable[str]) -> dict[str, Tensor]:
    """The weights of some layers out of a `state_of` a network, by layer name: what `lib.pruning.correlation` takes."""
    return {name: state[f"{name}.weight"] for name in layers}


def rewind(model: nn.Module, state: State, masks: Masks | None = None) -> nn.Module:
    """Set every parameter and buffer (batch norm included) to ``state``, then hold ``masks``. Returns the model.

    The lottery ticket is ``rewind(model, theta_0, m)``, fine-tuning starts from ``rewind(model, theta_T, m)``.
    """
    detach_masks(model).load_state_dict(state)
    return attach_masks(model, masks or {})


def one_shot(model: nn.Module, plan: Plan) -> Masks:
    """Masks of the projection of the weights as they are: for `Unstructured`, magnitude pruning in one step."""
    return select(plan, weights(model, plan))


def iterative(
    model: nn.Module,
    plans: Sequence[Plan],
    data: Data,
    start: State,
    *,
    progress: Progress | None = None,
    **fit_options: Any,
) -> list[Masks]:
    """Iterative magnitude pruning with rewinding (Frankle and Carbin 2019; papers/pruning.md section 2).

    ``model`` comes in trained. Each round prunes it to the next, tighter plan, rewinds what is left to ``start``
    (``theta_0``, or ``theta_k``) and trains it again; the last plan's mask needs no training after it. So the search
    costs ``(len(plans) - 1) * epochs`` on top of the dense training, and the mask of plan ``i`` costs ``i * epochs``.

    Returns:
        The masks of every plan, each inside the one before it.
    """
    found: list[Masks] = []
    for i, plan in enumerate(plans):
        if i:
            report = None
            if progress:
                report = lambda done, text, i=i: progress((i - 1 + done) / (len(plans) - 1), f"round {i}: {text}")  # noqa: E731
            fit(model, data, progress=report, **fit_options)
        masks = one_shot(model, plan)
        if found:  # a survivor that became exactly zero must not be traded for a removed weight
            masks = {name: m & found[-1].get(name, m) for name, m in masks.items()}
        found.append(masks)
        rewind(model, start, masks)
    detach_masks(model)
    return found
