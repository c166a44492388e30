"""The loops of a layer, and the ways to split them among the levels of a chip."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from math import prod
from typing import Any, Self

import numpy as np
import pandas as pd

from lib.costs.energy import CostError

Words = Mapping[tuple[str, str], Any]
"""Accesses by level and kind of data: a number, or an array with one for each tiling."""


@dataclass(frozen=True)
class Loops:
    """A convolution as seven loops, in the letters of the DNN-Chip Predictor: a linear layer has ones for the last.

    Attributes:
        K, C: filters, and input channels. Yo, Xo: rows and columns of the output. R, S: of the kernel. U: stride.
        N: inputs in a batch. Yi, Xi: rows and columns of the input; 0: as many as the output takes, unpadded.
        groups: that compute so, one after the other. D: dilation, of which only 1 is known.

    Raises:
        CostError: a number that is not positive, or a dilated kernel, whose windows have gaps.

    >>> from lib.costs.digital import Loops
    >>> layer = Loops(K=50, C=20, Yo=8, Xo=8, R=5, S=5)
    >>> layer.macs, layer.inputs, layer.weights, layer.outputs
    (1600000, 2880, 25000, 3200)
    """

    K: int
    C: int
    Yo: int = 1
    Xo: int = 1
    R: int = 1
    S: int = 1
    U: int = 1
    N: int = 1
    Yi: int = 0
    Xi: int = 0
    groups: int = 1
    layer: str = "layer"
    D: int = 1

    def __post_init__(self) -> None:
        for size, out, kernel in (("Yi", self.Yo, self.R), ("Xi", self.Xo, self.S)):
            if getattr(self, size) == 0:
                object.__setattr__(self, size, (out - 1) * self.U + kernel)
        for name in ("K", "C", "Yo", "Xo", "R", "S", "U", "N", "Yi", "Xi", "groups"):
            if getattr(self, name) < 1:
                raise CostError(f"{self.layer}: {name} = {getattr(self, name)}: 1 or more is allowed")
        if self.D != 1:
            raise CostError(f"{self.layer}: D = {self.D}: loops of a kernel without dilation are known")

    @classmethod
    def of(cls, bounds: pd.DataFrame) -> list[Self]:
        """From the rows of `lib.shapes.loop_bounds`."""
        names = {f.name for f in fields(cls)}
        return [cls(**{k: v for k, v in row.items() if k in names}) for row in bounds.to_dict("records")]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one group."""
        return self.N * self.K * self.C * self.Yo * self.Xo * self.R * self.S

    @property
    def inputs(self) -> int:
        """Numbers that go into one group."""
        return self.N * self.C * self.Yi * self.Xi

    @property
    def weights(self) -> int:
        """Weights of one group."""
        return self.K * self.C * self.R * self.S

    @property
    def outputs(self) -> int:
        """Numbers that come out of one group."""
        return self.N * self.K * self.Yo * self.Xo


@cache
def splits(bound: int, levels: int) -> np.ndarray:
    """All ways to write a loop's bound as a product of whole numbers, one for each level: ``(ways, levels)``.

    >>> from lib.costs.digital import splits
    >>> splits(4, 2).tolist()
    [[1, 4], [2, 2], [4, 1]]
    """
    if levels == 1:
        return np.array([[bound]])
    divisors = [d for d in range(1, bound + 1) if bound % d == 0]
    rest = [splits(bound // d, levels - 1) for d in divisors]
    return np.concatenate([np.insert(r, 0, d, axis=1) for d, r in zip(divisors, rest, strict=True)])


def combined(ways: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every combination of splits of several loops: a column for each name ``K0``, ``K1``, ..., all of one length."""
    index = np.indices([len(w) for w in ways.values()]).reshape(len(ways), -1)
    return {
        f"{loop}{level}": way[i, level]
        for (loop, way), i in zip(ways.items(), index, strict=True)
        for level in range(way.shape[1])
    }


def priced(words: Words, units: Mapping[str, float]) -> Any:
    """Energy of accesses by level and kind of data, at a unit energy for each level.

    Raises:
        CostError: a level without a price, or a negative one.
    """
    for level, _ in words:
        if not units.get(level, -1) >= 0:
            raise CostError(f"unit energy of {level}: {units.get(level)}; expected a number of at least 0")
    return sum(units[level] * count for (level, _), count in words.items())


def tidy(words: Words, units: Mapping[str, float], groups: int = 1) -> pd.DataFrame:
    """One row for each level and kind of data: ``level``, ``data``, ``words`` and ``energy``, of all groups."""
    rows = [(level, data, groups * float(n), groups * float(n) * units[level]) for (level, data), n in words.items()]
    return pd.DataFrame(rows, columns=["level", "data", "words", "energy"])


def covered(layer: Loops, tiles: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[str, int, int]]:
    """Loops that a tiling does not cover: name, the product of its tiles, and what the layer asks for."""
    for loop in ("N", "K", "C", "Yo", "Xo", "R", "S"):
        product = prod(level.get(loop, 1) for level in tiles.values())
        if np.any(product < getattr(layer, loop)):
            yield loop, int(np.min(product)), getattr(layer, loop)
