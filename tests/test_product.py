"""Every constraint under every recipe, on a small real network: it works, or it is refused with the reason."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import avg_pool2d

from lib import models, pruning, quantization, recipes
from lib.constraint import ConstraintError, attach_masks, fitted, select, state_of, weights
from lib.training import TrainingError, fit

LAYERS = ("conv1_2", "conv2_1", "conv3_1")
CONSTRAINTS = {  # name: the set at a loose and at a tight budget
    "unstructured": (pruning.Unstructured(0.5), pruning.Unstructured(0.8)),
    "unstructured, global": (pruning.Unstructured(0.5, "global"), pruning.Unstructured(0.8, "global")),
    "filter": (pruning.Filter(0.25), pruning.Filter(0.5)),
    "channel": (pruning.Channel(0.25), pruning.Channel(0.5)),
    "column": (pruning.Column(0.3), pruning.Column(0.6)),
    "filter + column": (pruning.FilterColumn(0.25, 0.3), pruning.FilterColumn(0.5, 0.6)),
    "kernel": (pruning.Kernel(0.3), pruning.Kernel(0.6)),
    "block": (pruning.Block(0.3, 2, 4), pruning.Block(0.6, 2, 4)),
    "PE tile": (pruning.PETile(0.25, 2, 2), pruning.PETile(0.5, 2, 2)),
    "block columns": (pruning.BlockColumns(0.5, 2, 6), pruning.BlockColumns(0.8, 2, 6)),
    "block rows": (pruning.BlockRows(0.25, 4, 6), pruning.BlockRows(0.5, 4, 6)),
    "block-structured (BSP)": (
        pruning.BlockStructured(0.3, 0.25, 2, 6),
        pruning.BlockStructured(0.6, 0.5, 2, 6),
    ),
    "N:M": (pruning.NM(n=2, m=4), pruning.NM(n=1, m=4)),
    "block-max (BMWM)": (pruning.block_max(2), pruning.block_max(4)),
    "DARB": (pruning.DARB(0.5, menu=(1, 2, 4, 8)), pruning.DARB(0.75, menu=(1, 2, 4, 8))),
    "patterns": (pruning.Patterns(4), pruning.Patterns(4)),
    "patterns + kernels": (pruning.PatternKernels(4, sparsity=0.3), pruning.PatternKernels(4, sparsity=0.6)),
    "PCNN": (pruning.PCNN(4), pruning.PCNN(2)),
    "PCNN, 4 patterns": (pruning.PCNN(3, patterns=4), pruning.PCNN(3, patterns=4)),
    "TinyADC": (pruning.tiny_adc(8, 16), pruning.tiny_adc(4, 16)),
    "block lines (PIM-Prune)": (pruning.BlockLines(0.25, 0.25, 4, 9), pruning.BlockLines(0.5, 0.5, 4, 9)),
    "shared shapes (SegPrune)": (pruning.SharedShapes(0.5, 8, 2), pruning.SharedShapes(0.5, 8, 2)),
    "aligned lines": (pruning.AlignedLines(0.25, 0.3, 6, 2), pruning.AlignedLines(0.5, 0.6, 6, 2)),
}
RECIPES = (
    *("one-shot", "iterative", "ADMM", "ADMM, split pairs", "progressive", "reweighted", "group lasso"),
    *("prune and tune", "static", "grow and prune", "grow in parallel", "RigL"),
    "without data",
)
INTERSECTIONS = (
    *("filter + column", "block-structured (BSP)", "patterns + kernels"),
    *("block lines (PIM-Prune)", "aligned lines"),
)
NO_GROUPS = ("DARB", "patterns", "patterns + kernels", "PCNN", "PCNN, 4 patterns", "shared shapes (SegPrune)")
OPTIONS = {"epochs": 1, "lr": 0.02}


def refusal(name: str, recipe: str) -> str | None:
    """Why a pair makes no sense, as the error says it; None where it works."""
    if recipe == "ADMM, split pairs" and name not in INTERSECTIONS:
        return "is one set, not an intersection"
    if recipe in ("reweighted", "group lasso") and name in NO_GROUPS:
        return "has no fixed groups that a penalty could shrink"
    if recipe == "RigL" and not name.startswith("unstructured"):
        return "rigl moves single weights"
    return None


def run(recipe, model, plans, images):
    """Bring the model into the last plan; returns the masks to retrain in."""
    plan = plans[-1]
    if recipe == "iterative":
        start = state_of(model)
        masks = recipes.iterative(model, plans, images, start, **OPTIONS)[-1]
        recipes.rewind(model, start)
        return masks
    if recipe == "progressive":
        recipes.progressive(model, plans, images, search=OPTIONS, retrain=OPTIONS)
    elif recipe.startswith("ADMM"):
        recipes.admm(model, plan, images, **OPTIONS, rho=0.1, pairs="split" if "split" in recipe else "joint")
    elif recipe in ("reweighted", "group lasso"):
        interval = 1 if recipe == "reweighted" else 0
        recipes.reweighted(model, plan, images, strength=1.0, interval=interval, **OPTIONS)
    elif recipe == "prune and tune":
        recipes.prune_and_tune(model, plans, images, dense_epochs=1, **OPTIONS)
    elif recipe == "static":
        recipes.static(model, plan, images, **OPTIONS)
    elif recipe == "RigL":
        recipes.rigl(model, plan, images, interval=1, **OPTIONS)
    elif recipe == "without data":
        recipes.prune_without_data(model, plan, images.train.x, **OPTIONS, rho=0.1)
    elif recipe.startswith("grow"):
        grow, one = recipes.grow_and_prune, {}
        if recipe == "grow in parallel":
            grow, one = recipes.parallel_grow_and_prune, {"processes": 1}
        grow(model, plan, images, parts=3, rounds=1, tune_epochs=1, **one, **OPTIONS)
    if recipe != "one-shot":  # hardened already
        assert all(plan[n].member(w) for n, w in weights(model, plan).items() if plan[n].per_layer)
    return recipes.one_shot(model, plan)


@pytest.fixture(scope="module")
def few(images):
    """A hundred real images in 9x9: what is asked here are laws of sets, not accuracies."""

    def smaller(split, n):
        return replace(split, x=avg_pool2d(split.x[:n], 3), y=split.y[:n])

    return replace(
        images,
        train=smaller(images.train, 96),
        validation=smaller(images.validation, 40),
        test=smaller(images.test, 40),
    )


@pytest.fixture(scope="module")
def trained(few):
    torch.set_num_threads(1)
    net = models.build("vgg", few.shape, few.classes, seed=1, width=4)
    fit(net, few, epochs=2, lr=0.05, batch_size=32)
    return net


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_product(name, recipe, trained, few):
    net = deepcopy(trained)
    plans = [fitted(net, dict.fromkeys(LAYERS, c)) for c in CONSTRAINTS[name]]
    if reason := refusal(name, recipe):
        with pytest.raises(TrainingError, match=reason):
            run(recipe, net, plans, few)
        return

    masks = run(recipe, net, plans, few)
    budget = {n: int(m.sum()) for n, m in select(plans[-1], weights(trained, plans[-1])).items()}
    if plans[-1][LAYERS[0]].per_layer:
        assert {n: int(m.sum()) for n, m in masks.items()} == budget
    else:
        assert sum(int(m.sum()) for m in masks.values()) == sum(budget.values())
    if recipe == "one-shot":  # what masks hold depends on the masks alone, whichever recipe has found them
        fit(attach_masks(net, masks), few, epochs=1, lr=0.05, weight_decay=1e-3, batch_size=32)
        after = weights(net, plans[-1])
        assert all(not after[n][~masks[n]].any() for n in masks)
        assert all(after[n][masks[n]].any() for n in masks)
        assert all(plans[-1][n].member(w) for n, w in after.items() if plans[-1][n].per_layer)
    if recipe == "progressive":  # a chain stays inside its first step
        first = deepcopy(trained)
        recipes.progressive(first, plans[:1], few, search=OPTIONS, retrain=OPTIONS)
        outer, inner = recipes.one_shot(first, plans[0]), weights(net, plans[-1])
        assert all(not (inner[n] != 0)[~outer[n]].any() for n in inner)


VALUES = {  # sets of values, alone and on what a set of supports keeps
    "binary": quantization.binary(),
    "ternary": quantization.ternary(),
    "4 levels a side": quantization.Levels(4),
    "uniform with zero": quantization.Levels(3, zero=True),
    **{
        f"{name}, 2 levels a side": quantization.Quantized(CONSTRAINTS[name][0], quantization.Levels(2))
        for name in CONSTRAINTS
        if CONSTRAINTS[name][0].per_layer
    },
}
ONTO_VALUES = ("ADMM", "progressive", "straight-through", "partial hardening")


@pytest.mark.parametrize("recipe", ONTO_VALUES)
@pytest.mark.parametrize("name", VALUES)
def test_product_with_values(name, recipe, trained, few):
    net = deepcopy(trained)
    plan = fitted(net, dict.fromkeys(LAYERS, VALUES[name]))
    if recipe == "ADMM":
        recipes.admm(net, plan, few, **OPTIONS, rho=0.1)
    elif recipe == "progressive":
        recipes.progressive(net, [plan], few, search=OPTIONS, retrain=OPTIONS)
    elif recipe == "straight-through":
        recipes.straight_through(net, plan, few, **OPTIONS)
    else:
        recipes.partial_hardening(net, plan, few, shares=(0.5,), **OPTIONS)
    after = weights(net, plan)
    assert all(plan[n].member(w, 1e-6) for n, w in after.items())
    assert all(w.any() for w in after.values())
    most = 2 * getattr(VALUES[name], "values", VALUES[name]).per_side + 1
    assert all(len(w.unique()) <= most for w in after.values())


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("recipe", ["one-shot", "iterative", "reweighted"])
def test_values_have_no_masks_and_no_groups(name, recipe, trained, few):
    plans = [fitted(trained, dict.fromkeys(LAYERS, VALUES[name]))]
    with pytest.raises((ConstraintError, TrainingError), match=r"has no mask|no fixed groups"):
        run(recipe, deepcopy(trained), plans, few)
