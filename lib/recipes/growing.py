"""Grow-and-prune: part after part of a sparse network is dense for a while (GaP; Ma et al., ICLR 2022)."""

import os
from collections.abc import Iterable, Sequence
from itertools import chain
from numbers import Integral
from typing import Any, Literal

import joblib
import pandas as pd
import torch
from torch import nn

from lib.constraint import Masks, Plan, State, attach_masks, detach_masks, fitted, plain, select, state_of, weights
from lib.data import Data
from lib.models import copied
from lib.recipes.common import movable, own_masks, part, stage_seed
from lib.recipes.rewinding import one_shot, rewind
from lib.shapes import uses
from lib.training import Progress, TrainingError, charge_all, evaluate, fit, metered, recalibrate, uncounted

Parts = Sequence[Sequence[str]]


def random_masks(model: nn.Module, plan: Plan, seed: int = 0) -> Masks:
    """Masks of the plan's sets at random places: what the projection of random weights keeps.

    Trained as they are, they are the static baseline of every method that is sparse from the start.

    Raises:
        ConstraintError: a set of values, which has no mask.

    >>> from lib import models, pruning, recipes
    >>> model = models.build("lenet300", (1, 28, 28), 10)
    >>> masks = recipes.random_masks(model, pruning.uniform_plan(model, pruning.Unstructured(0.9)), seed=1)
    >>> [int(mask.sum()) for mask in masks.values()]
    [23520, 3000, 100]
    """
    generator = torch.Generator().manual_seed(int(seed))
    drawn = {n: torch.randn(w.shape, generator=generator).to(w.device) for n, w in weights(model, plan).items()}
    return select(fitted(model, plan), drawn)


def static(model: nn.Module, plan: Plan, data: Data, *, seed: int = 0, **fit_options: Any) -> pd.DataFrame:
    """Train inside random masks that never move, in place: what sparse training costs least, and at least achieves.

    Returns:
        As `fit`. The network is left with its zeros, without masks.

    >>> from lib import constraint, data, models, pruning, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> log = recipes.static(model, pruning.uniform_plan(model, pruning.NM(1, 4)), images, epochs=1, lr=0.05)
    >>> constraint.sparsity(model)
    0.75
    """
    movable(model, plan)
    with own_masks(model, plan) as others:
        attach_masks(model, others | random_masks(model, plan, seed))
        return fit(model, data, seed=seed, **fit_options)


def contiguous_parts(plan: Plan, parts: int) -> list[list[str]]:
    """The plan's layers, in their order, in so many runs of as equal numbers of layers as can be.

    Raises:
        TrainingError: fewer layers than parts.

    >>> from lib.pruning import Unstructured
    >>> from lib.recipes import contiguous_parts
    >>> contiguous_parts(dict.fromkeys(("conv1", "conv2", "fc1"), Unstructured(0.9)), 2)
    [['conv1', 'conv2'], ['fc1']]
    """
    names = list(plan)
    if not 1 <= parts <= len(names):
        raise TrainingError(f"parts = {parts}: allowed are 1 to {len(names)}, the number of planned layers")
    return [[names[i] for i in part.tolist()] for part in torch.arange(len(names)).tensor_split(parts)]


def _turns(plan: Plan, parts: int | Parts, rounds: int, order: str, seed: int) -> list[list[list[str]]]:
    """For each round the parts that grow one after another; every layer grows once a round."""
    if isinstance(parts, Integral):
        parts = contiguous_parts(plan, parts)
    parts = [list(part) for part in parts]
    if sorted(chain(*parts)) != sorted(plan) or not all(parts):
        raise TrainingError(f"parts = {parts}: every layer of the plan belongs to one part: {', '.join(plan)}")
    if rounds < 1:
        raise TrainingError(f"rounds = {rounds}: allowed are whole numbers from 1")
    if order == "cyclic":
        return [parts] * rounds
    if order != "random":
        raise TrainingError(f"order = {order!r}: allowed are 'cyclic' and 'random'")
    names, generator, turns = list(plan), torch.Generator().manual_seed(int(seed)), []
    for _ in range(rounds):
        drawn = iter([names[i] for i in torch.randperm(len(names), generator=generator).tolist()])
        turns.append([[next(drawn) for _ in part] for part in parts])
    return turns


def _pruned(model: nn.Module, plan: Plan) -> Masks:
    """The whole plan's masks of the weights as they are; budgets for all layers together are shared out anew."""
    return one_shot(model, fitted(model, plan))


def grow_and_prune(
    model: nn.Module,
    plan: Plan,
    data: Data,
    *,
    parts: int | Parts,
    rounds: int,
    epochs: int,
    tune_epochs: int,
    order: Literal["cyclic", "random"] = "cyclic",
    seed: int = 0,
    progress: Progress | None = None,
    **fit_options: Any,
) -> pd.DataFrame:
    """C-GaP: part after part of the network becomes dense, trains, and is pruned again (Ma et al., ICLR 2022).

    Before each step the weights are pruned to the plan; then all layers but those of the growing part are held inside
    their masks, and the network trains for ``epochs``. What grows back starts at zero, with fresh momentum and the
    schedule from its beginning. After the last round the network is pruned once more and trains inside its masks.

    Args:
        model: from random initial weights, as the method has it, or any others; left with its zeros, without masks.
        plan: sets of supports: single weights, N:M, blocks, ...; budgets of a network (`LayerAdaptive`, or
            `Unstructured` in scope "global") are the paper's non-uniform sparsity.
        parts: how many runs of layers (`contiguous_parts`), or the layers of each part.
        epochs: of one step; a round has a step for each part. tune_epochs: at the end.
        order: "cyclic", or "random": parts of the same sizes drawn anew for every round, each layer in one of them.

    Returns:
        One row per step and one for the end: ``round`` and ``part`` (from 1; part 0 is the end), ``epochs`` spent,
        ``exchanged``, the share of the part's weights that pruning keeps now and had removed before, ``accuracy`` on
        validation images as trained, and ``pruned_accuracy`` after pruning to the plan and finding the statistics of
        batch norms anew.

    Raises:
        ConstraintError: a set of values. TrainingError: parts that do not hold every planned layer once, an unknown
            order, no round.

    >>> from lib import constraint, data, models, pruning, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> plan = pruning.uniform_plan(model, pruning.Unstructured(0.9))
    >>> log = recipes.grow_and_prune(model, plan, images, parts=3, rounds=1, epochs=1, tune_epochs=1, lr=0.05)
    >>> log[["round", "part", "epochs"]].values.tolist(), round(constraint.sparsity(model), 3)
    ([[1, 1, 1], [1, 2, 2], [1, 3, 3], [1, 0, 4]], 0.9)
    """
    movable(model, plan)
    turns = _turns(plan, parts, rounds, order, seed)
    total, rows, spent = len(turns) * len(turns[0]) * epochs + tune_epochs, [], 0
    with own_masks(model, plan) as others:
        for step, growing in enumerate(chain(*turns)):
            masks = _pruned(model, plan)
            held = {name: mask for name, mask in masks.items() if name not in growing}
            detach_masks(attach_masks(model, masks if step else held))  # at first what grows is as it was initialized
            attach_masks(model, others | held)
            report = part(progress, spent, epochs, total, f"step {step + 1}")
            fit(model, data, epochs=epochs, seed=stage_seed(seed, step), progress=report, **fit_options)
            spent += epochs
            attach_masks(model, others)
            found = _pruned(model, plan)
            row = {"round": step // len(turns[0]) + 1, "part": step % len(turns[0]) + 1, "epochs": spent}
            row |= {"exchanged": _exchanged(masks, found, growing), "accuracy": evaluate(model, data.validation)}
            pruned = attach_masks(copied(model), others | found)
            with uncounted():
                recalibrate(pruned, data)
            rows.append(row | {"pruned_accuracy": evaluate(pruned, data.validation)})
        report = part(progress, spent, tune_epochs, total, "inside the masks")
        rows.append({"round": rounds, "part": 0, "epochs": total})
        rows[-1] |= _tuned(model, plan, others, data, tune_epochs, seed, report, fit_options)
    return pd.DataFrame(rows)


def _tuned(
    model: nn.Module,
    plan: Plan,
    others: Masks,
    data: Data,
    epochs: int,
    seed: int,
    progress: Progress | None,
    fit_options: dict,
) -> dict[str, float]:
    """Prune for good and train inside the masks, and inside those of other layers; how accurate that is."""
    attach_masks(model, others | _pruned(model, plan))
    fit(model, data, epochs=epochs, seed=stage_seed(seed, 10**6), progress=progress, **fit_options)
    return dict.fromkeys(("accuracy", "pruned_accuracy"), evaluate(model, data.validation))


def _exchanged(before: Masks, after: Masks, layers: Iterable[str]) -> float:
    """The share of the weights that stay which were removed before."""
    new = sum(int((after[name] & ~before[name]).sum()) for name in layers)
    return new / max(sum(int(after[name].sum()) for name in layers), 1)  # a budget for all layers can empty some


# --- parallel ---------------------------------------------------------------------------------------------------------


def parallel_grow_and_prune(
    model: nn.Module,
    plan: Plan,
    data: Data,
    *,
    parts: int | Parts,
    rounds: int,
    epochs: int,
    tune_epochs: int,
    processes: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **fit_options: Any,
) -> pd.DataFrame:
    """P-GaP: in each round a replica for every part trains with that part dense, each in a process of its own.

    Starts from random masks. After a round one network is made of all replicas: a part's layers with their biases come
    from the replica in which they grew; everything else (batch norms, layers outside the plan) is the average over the
    replicas, where the paper's text leaves it open. Then it is pruned to the plan and the statistics of its batch norms
    are found anew. A round costs as much training as one of `grow_and_prune`, in the time of one part.

    Args:
        processes: at the same time; None: as many as there are CPUs, at most one for each part. 1 stays in this
            process. The result does not depend on it, bit for bit.

    Returns:
        As `grow_and_prune`, a row per round (``part`` is 0): ``epochs`` counts those of all replicas, ``exchanged`` is
        of all layers, ``accuracy`` is that of the merged network before it is pruned.

    Raises:
        As `grow_and_prune`; TrainingError for fewer than one process.

    >>> from lib import constraint, data, models, pruning, recipes
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> plan = pruning.uniform_plan(model, pruning.NM(1, 4))
    >>> options = {"rounds": 1, "epochs": 1, "tune_epochs": 1, "lr": 0.05, "processes": 1}
    >>> log = recipes.parallel_grow_and_prune(model, plan, images, parts=3, **options)
    >>> log["epochs"].tolist(), constraint.sparsity(model)
    ([3, 4], 0.75)
    """
    movable(model, plan)
    groups = _turns(plan, parts, rounds, "cyclic", seed)[0]
    if processes is not None and processes < 1:
        raise TrainingError(f"processes = {processes}: allowed are whole numbers from 1, or None")
    processes = min(processes or os.cpu_count() or 1, len(groups))
    masks, rows = random_masks(model, plan, seed), []
    total = rounds * len(groups) * epochs + tune_epochs
    with own_masks(model, plan) as others:
        for r in range(rounds):
            start, bare = state_of(rewind(model, state_of(model), others | masks)), plain(model)
            jobs = []
            for i, group in enumerate(groups):
                held = others | {name: mask for name, mask in masks.items() if name not in group}
                seeded = fit_options | {"epochs": epochs, "seed": stage_seed(seed, r * len(groups) + i)}
                jobs.append(joblib.delayed(_grown)(bare, start, held, data, seeded))
            done = joblib.Parallel(processes)(jobs)
            for _, spent in done if processes > 1 else []:  # in this process the meter saw the replicas
                charge_all(spent)
            detach_masks(model).load_state_dict(_merged([state for state, _ in done], groups, model))
            attach_masks(model, others)
            row = {"round": r + 1, "part": 0, "epochs": (r + 1) * len(groups) * epochs}
            with uncounted():  # training needs no statistics of batch norms, the log does
                row["accuracy"] = evaluate(recalibrate(model, data), data.validation)
                before, masks = masks, _pruned(model, plan)
                pruned = recalibrate(attach_masks(model, others | masks), data)
                row["pruned_accuracy"] = evaluate(pruned, data.validation)
            row["exchanged"] = _exchanged(before, masks, masks)
            rows.append(row)
            if progress:
                progress(row["epochs"] / total, f"round {r + 1} of {rounds}, {row['pruned_accuracy']:.1%} pruned")
        report = part(progress, total - tune_epochs, tune_epochs, total, "inside the masks")
        rows.append({"round": rounds, "part": 0, "epochs": total})
        rows[-1] |= _tuned(model, plan, others, data, tune_epochs, seed, report, fit_options)
    return pd.DataFrame(rows)


def _grown(model: nn.Module, state: State, held: Masks, data: Data, options: dict) -> tuple[State, pd.DataFrame]:
    """A replica from ``state``, trained inside the masks that are held, and what it computed."""
    replica = copied(model)  # joblib hands on the very object when it stays in this process
    replica.load_state_dict(state)
    _, spent = metered(attach_masks(replica, held), fit, data, **options)
    return state_of(replica), spent


def _merged(states: list[State], groups: list[list[str]], model: nn.Module) -> State:
    """One network of all replicas."""
    layers = uses(model)
    home = {id(layer): i for i, part in enumerate(groups) for name in part for layer in layers[name]}
    found = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if id(m) in home]  # under all its names
    owner = {f"{n}.{p}": home[id(m)] for n, m in found for p, _ in m.named_parameters()}
    merged = {}
    for key, first in states[0].items():
        if key in owner:
            merged[key] = states[owner[key]][key]
        elif first.is_floating_point():
            merged[key] = torch.stack([state[key] for state in states]).mean(0)
        else:
            merged[key] = first
    return merged
