"""Sets of allowed weights, plans that assign them to layers, masks that hold a network inside them, storage formats.

A `Constraint` is a set with a Euclidean projection; a *plan* is ``{layer name: Constraint}``. Functions here take a
model and a plan and know nothing of any particular set.
"""

from lib.constraint.formats import Storage
from lib.constraint.masks import (
    Mask,
    Masks,
    State,
    attach,
    attach_masks,
    detach,
    detach_masks,
    leaf,
    mask_of,
    masks,
    plain,
    sparsity,
    state_of,
)
from lib.constraint.plans import Plan, apply, fitted, harden, project, select, weights
from lib.constraint.selection import keep_largest, keep_largest_in_rows, kept, nearest_power
from lib.constraint.sets import Constraint, ConstraintError, SupportConstraint, check_count, check_sparsity

__all__ = [
    "Constraint",
    "ConstraintError",
    "Mask",
    "Masks",
    "Plan",
    "State",
    "Storage",
    "SupportConstraint",
    "apply",
    "attach",
    "attach_masks",
    "check_count",
    "check_sparsity",
    "detach",
    "detach_masks",
    "fitted",
    "harden",
    "keep_largest",
    "keep_largest_in_rows",
    "kept",
    "leaf",
    "mask_of",
    "masks",
    "nearest_power",
    "plain",
    "project",
    "select",
    "sparsity",
    "state_of",
    "weights",
]
