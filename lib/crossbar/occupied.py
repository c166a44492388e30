"""Arrays that a pruned network still occupies, by how its zeros are used."""

from typing import Literal, get_args

import pandas as pd
from torch import Tensor, nn

from lib.constraint import weights
from lib.constraint.formats import index_width
from lib.crossbar.mapping import CrossbarError
from lib.crossbar.tiling import Array, Strip, count, counted
from lib.shapes import layer_shapes, prunable

Rule = Literal["none", "lines", "blocks", "shapes"]


def occupied(
    model: nn.Module, shape: tuple[int, ...], array: Array, rule: Rule = "lines", rows: int | None = None
) -> pd.DataFrame:
    """`tile` for the weights that are left: zeros are left out as far as a rule can.

    - ``none``: all stay; what an unstructured network takes, and one with a limit on each column (TinyADC).
    - ``lines``: rows and columns that are zero throughout a matrix are left out. No index: the layers before and after
      lose the same channels, or read what they need. Weights that read a removed filter count until they are zero
      themselves: `lib.channels.follow` finds them.
    - ``blocks``: columns that are zero in a group of ``rows`` rows are left out there (PIM-Prune); each that is left
      carries its filter's number. Groups that are lower than an array are stacked as below.
    - ``shapes``: in every group of rows, columns that keep the same rows lie side by side without the others
      (SegPrune); such strips are stacked into arrays and read one after the other. A strip carries its rows' mask, each
      column its filter's number.

    Args:
        rows: of a group; None: as many as an array has.

    Returns:
        The columns of `tile`, ``kept`` weights and ``index_bits``; ``rows`` and ``filters`` are those of dense layers,
        ``rows_left`` and ``filters_left`` of the largest group: under ``none`` all, else those that are not all zero.

    Raises:
        CrossbarError: an unknown rule, more rows in a group than an array has, or rows under a rule without groups.

    >>> from lib.crossbar import Array, occupied
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 32))  # 32 weights of 4 cells fill the columns of an array
    >>> model[0].weight.data[:, :128] = 0.0
    >>> [int(occupied(model, (256,), Array(), rule)["arrays"].sum()) for rule in ("none", "lines")]
    [2, 1]
    """
    if rule not in get_args(Rule):
        raise CrossbarError(f"rule = {rule!r}: allowed are {', '.join(get_args(Rule))}")
    if rows is not None and not 1 <= rows <= array.rows:
        raise CrossbarError(f"rows = {rows}: a group has 1 to {array.rows} rows")
    if rows is not None and rule in ("none", "lines"):
        raise CrossbarError(f"rows = {rows}: under {rule} there are no groups")
    shapes, found = layer_shapes(model, shape), []
    effective = weights(model, dict.fromkeys(prunable(model)))
    for layer in shapes.itertuples():
        mask = (effective[layer.layer] != 0).flatten(1)
        height = min(rows or array.rows, array.usable_rows(layer.kernel))
        strips, index = [], 0
        for part in mask.chunk(layer.groups):
            more, bits = _strips(part, rule, height)
            strips, index = strips + more, index + bits
        stacked = rule == "shapes" or (rule == "blocks" and height < array.usable_rows(layer.kernel))
        row = count(strips, layer.vectors, array, stacked)
        there = mask | (rule == "none")
        left = [(int(part.any(0).sum()), int(part.any(1).sum())) for part in there.chunk(layer.groups)]
        row |= {"rows_left": max(r for r, _ in left), "filters_left": max(f for _, f in left)}
        found.append(row | {"kept": int(mask.sum()), "index_bits": index})
    return counted(pd.concat([shapes, pd.DataFrame(found, index=shapes.index)], axis=1), array)


def _strips(mask: Tensor, rule: Rule, height: int) -> tuple[list[Strip], int]:
    """Strips of the matrix of one group ``(F, K)``, and the bits that tell what lies where."""
    filters = len(mask)
    if rule != "none":
        mask = mask[mask.any(1)][:, mask.any(0)] if rule == "lines" else mask
    parts = [part for part in mask.split(height, dim=1) if part.numel()]
    if rule in ("none", "lines"):
        return [(part.shape[1], len(part)) for part in parts], 0
    number, strips, index = index_width(filters), [], 0
    for part in parts:
        alive = part[part.any(1)]
        index += number * len(alive)
        if rule == "blocks":
            strips += [(int(alive.any(0).sum()), len(alive))] * bool(len(alive))
        else:
            kept, counts = alive.unique(dim=0, return_counts=True)
            strips += [(int(k.sum()), int(n)) for k, n in zip(kept, counts, strict=True)]
            index += part.shape[1] * len(kept)
    return strips, index
