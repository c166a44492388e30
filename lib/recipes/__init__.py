"""Training schemes: toward a plan (one-shot, ADMM, straight-through, ...), sparse from the start, and at less energy.

Each recipe works on a model in place, for any plan whose constraints it makes sense for, and leaves the masks or
the weights that training goes on from. The loop is always `lib.training.fit`; recipes only hook into it.
"""

from lib.recipes.admm import admm, progressive, split
from lib.recipes.budgets import search_budgets, search_rate
from lib.recipes.clustering import deep_kmeans
from lib.recipes.e2_train import MiniBatchDropping, e2_train, low_precision, predictive_signs
from lib.recipes.early_bird import (
    ScalePull,
    channels_by_norm,
    drawing_point,
    early_bird,
    mask_distances,
    norms_of_channels,
    ticket,
)
from lib.recipes.federated import dirichlet_split, dropouts, fed_avg, group_split, local_clients
from lib.recipes.gradual import gradual
from lib.recipes.growing import contiguous_parts, grow_and_prune, parallel_grow_and_prune, random_masks, static
from lib.recipes.inside import alternating, retrain_inside, snapped
from lib.recipes.private import layer_errors, prune_without_data, synthetic_inputs
from lib.recipes.purification import purify
from lib.recipes.quantizing import partial_hardening, straight_through
from lib.recipes.regrowth import rigl
from lib.recipes.reweighted import reweighted, search_strength
from lib.recipes.rewinding import iterative, layer_weights, one_shot, prune_and_tune, rewind
from lib.recipes.shares import FixedPoint, Server, in_shares

__all__ = [
    "FixedPoint",
    "MiniBatchDropping",
    "ScalePull",
    "Server",
    "admm",
    "alternating",
    "channels_by_norm",
    "contiguous_parts",
    "deep_kmeans",
    "dirichlet_split",
    "drawing_point",
    "dropouts",
    "e2_train",
    "early_bird",
    "fed_avg",
    "gradual",
    "group_split",
    "grow_and_prune",
    "in_shares",
    "iterative",
    "layer_errors",
    "layer_weights",
    "local_clients",
    "low_precision",
    "mask_distances",
    "norms_of_channels",
    "one_shot",
    "parallel_grow_and_prune",
    "partial_hardening",
    "predictive_signs",
    "progressive",
    "prune_and_tune",
    "prune_without_data",
    "purify",
    "random_masks",
    "retrain_inside",
    "reweighted",
    "rewind",
    "rigl",
    "search_budgets",
    "search_rate",
    "search_strength",
    "snapped",
    "split",
    "static",
    "straight_through",
    "synthetic_inputs",
    "ticket",
]
