"""Kernel patterns: every kernel keeps one of a few arrangements of its weights.

A pattern is an integer whose bit ``i`` says that position ``i`` of the flattened kernel is kept, so that a library is
a tuple of numbers and can be compared, cached and stored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from lib.constraint import ConstraintError, Storage, SupportConstraint, check_count, check_sparsity, formats
from lib.constraint.selection import keep_largest, keep_largest_in_rows, kept
from lib.constraint.views import kernel_area, spread, wide
from lib.pruning.groups import Kernel

CENTRE, EDGES, CORNERS = 4, (1, 3, 5, 7), (0, 2, 6, 8)  # positions of a 3x3 kernel


def code(positions: Iterable[int]) -> int:
    """The pattern that keeps these positions."""
    return sum(1 << i for i in positions)


NATURAL = tuple(code((CENTRE, *others)) for others in combinations((*range(4), *range(5, 9)), 3))
"""The 56 natural patterns: the centre and any 3 of the other 8 (PatDNN, arXiv 2001.00138)."""


def _published() -> dict[str, tuple[int, ...]]:
    def adjacent(corner: int, edge: int) -> bool:
        return abs(corner // 3 - edge // 3) + abs(corner % 3 - edge % 3) == 1

    lines = ((1, 7), (3, 5))
    bent = [(a, b, corner) for a in (1, 7) for b in (3, 5) for corner in CORNERS]
    return {
        "edges": (code(EDGES),),
        "line and corner": tuple(code((CENTRE, *line, corner)) for line in lines for corner in CORNERS),
        "bent": tuple(code((CENTRE, a, b, c)) for a, b, c in bent if adjacent(c, a) != adjacent(c, b)),
        "T": tuple(code((CENTRE, *edges)) for edges in combinations(EDGES, 3)),
    }


PUBLISHED = _published()
"""The 21 patterns that the group's released code ships, by shape; "T" are those of PCONV."""


def kernels(weight: Tensor) -> Tensor:
    """The kernels of a convolution, flattened: ``(F, C, Kh, Kw) -> (F*C, Kh*Kw)``.

    Raises:
        ConstraintError: the layer has no kernels of more than one weight.
    """
    if kernel_area(weight) == 1:
        raise ConstraintError(f"patterns are for kernels larger than 1x1, and the weight is {tuple(weight.shape)}")
    return weight.reshape(-1, kernel_area(weight))  # (F*C, Kh*Kw)


def table(library: Iterable[int], area: int, like: Tensor) -> Tensor:
    """The library as masks, ``(patterns, Kh*Kw)`` of zeros and ones in the type of ``like``."""
    return torch.tensor(
        [[code >> i & 1 for i in range(area)] for code in library], dtype=like.dtype, device=like.device
    )


def _codes(masks: Tensor) -> Tensor:
    """The pattern of each row of a boolean ``(kernels, Kh*Kw)``."""
    if masks.shape[1] > 62:
        raise ConstraintError(f"patterns are counted for kernels of up to 62 weights; these have {masks.shape[1]}")
    return (masks.long() << torch.arange(masks.shape[1], device=masks.device)).sum(1)


def _natural(weight: Tensor) -> Tensor:
    """The natural pattern of each 3x3 kernel that has weights: the centre and the 3 largest of the other 8."""
    if weight.shape[2:] != (3, 3):
        raise ConstraintError(f"natural patterns are for 3x3 kernels, and the weight is {tuple(weight.shape)}")
    magnitude = kernels(weight).abs()
    magnitude = magnitude[magnitude.any(1)]  # an empty kernel prefers nothing
    magnitude[:, CENTRE] = torch.inf
    return _codes(keep_largest_in_rows(magnitude, 4))


@dataclass(frozen=True)
class Patterns(SupportConstraint):
    """Every kernel keeps the positions of one pattern of a library (PatDNN, arXiv 2001.00138; PCONV, arXiv 1909.05073).

    Projection: the pattern of largest kept energy, exact. Without a ``library``, `fit` takes the ``count`` natural
    patterns that the 3x3 kernels of all layers sharing the set vote for; an empty kernel has no vote. ``library`` may
    be `NATURAL`, a family of `PUBLISHED`, or any pattern codes.

    Raises:
        ConstraintError: a count that is no whole number from 1, an empty library, a kernel that the patterns do not
            fit, or a projection before `fit`.

    >>> from lib.pruning import Patterns
    >>> rows = Patterns(library=(0b0011, 0b1100))  # of a 2x2 kernel, the upper row or the lower
    >>> rows.project(torch.tensor([[[[1.0, 2.0], [3.0, 0.0]]]])).tolist()
    [[[[0.0, 0.0], [3.0, 0.0]]]]
    """

    count: int = 8
    library: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_count(count=self.count)
        if self.library is not None:
            if not self.library or min(self.library) < 1:
                raise ConstraintError(f"library = {self.library}: allowed are one or more pattern codes from 1")
            object.__setattr__(self, "count", len(self.library))

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, SupportConstraint]:
        """The same library for all the layers."""
        if self.library is not None:
            return dict.fromkeys(weights, self)
        values, votes = torch.cat([_natural(w) for w in weights.values()]).unique(return_counts=True)
        elected = values[votes.argsort(descending=True, stable=True)[: self.count]]  # among equals the smaller
        return dict.fromkeys(weights, replace(self, library=tuple(elected.tolist()) or NATURAL[: self.count]))

    def best(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Of every kernel, the energy that its best pattern keeps ``(F*C,)`` and the pattern's index in the library."""
        if self.library is None:
            raise ConstraintError("the patterns are not chosen yet: call lib.constraint.fitted(model, plan) first")
        flat = kernels(wide(weight))
        if max(self.library) >> flat.shape[1]:
            raise ConstraintError(f"the library is for larger kernels than those of a {tuple(weight.shape)} weight")
        energy = flat.double().square()  # in single precision a small weight beside large ones would not count
        return tuple((energy @ table(self.library, flat.shape[1], energy).T).max(1))

    def select(self, weight: Tensor) -> Tensor:
        """Mask of each kernel's best pattern."""
        return self._masks(weight, self.best(weight)[1])

    def _masks(self, weight: Tensor, index: Tensor) -> Tensor:
        masks = table(self.library, kernel_area(weight), weight).bool()  # (patterns, Kh*Kw)
        return masks[index].reshape(weight.shape)  # from (F*C, Kh*Kw)

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """All weights of the patterns, a library index per kernel, and the library itself."""
        return self._bill(kernels(z), bits)

    def _bill(self, kept_kernels: Tensor, bits: int, which: float = 0.0) -> Storage:
        count, area = kept_kernels.shape
        size = max(code.bit_count() for code in self.library)  # equal lengths, so that no kernel needs a pointer
        index = count * formats.index_width(len(self.library)) + which
        return Storage(count * size * bits, index, len(self.library) * area)


@dataclass(frozen=True)
class PatternKernels(Patterns):
    """Patterns and connectivity together: at most ``(1 - sparsity) * F*C`` kernels, each in one pattern (PatDNN).

    The exact joint projection: rank kernels by the energy that their *best pattern* keeps, not by their norm. ``parts``
    are the two sets for ADMM with two auxiliary pairs.

    >>> from lib.pruning import PatternKernels
    >>> half = PatternKernels(library=(0b0011, 0b1100), sparsity=0.5)
    >>> weight = torch.tensor([[[[3.0, 0.0], [3.0, 0.0]]], [[[4.0, 0.0], [0.0, 0.0]]]])
    >>> half.project(weight).flatten(1).tolist()  # the first kernel is larger, but no pattern keeps both its weights
    [[0.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0]]
    """

    sparsity: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(sparsity=self.sparsity)

    @property
    def parts(self) -> tuple[SupportConstraint, SupportConstraint]:
        """The pattern set and the connectivity set."""
        return Patterns(self.count, self.library), Kernel(self.sparsity)

    def select(self, weight: Tensor) -> Tensor:
        """Mask of the best patterns of the kernels whose best patterns keep most."""
        energy, index = self.best(weight)
        keep = keep_largest(energy, kept(self.sparsity, energy.numel()))
        keep = spread(keep.view(weight.shape[:2]), (1, kernel_area(weight)), weight.shape)  # from (F, C)
        return self._masks(weight, index) & keep

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """The weights and a pattern index of every kept kernel, which kernels these are, and the library."""
        keep = kernels(z).any(1)
        return self._bill(kernels(z)[keep], bits, formats.which(keep))


@dataclass(frozen=True)
class PCNN(SupportConstraint):
    """``n`` weights in every kernel, in at most ``patterns`` arrangements per layer (PCNN, arXiv 2002.04997).

    ``patterns = 0`` sets no limit: the ``n`` largest of each kernel. A ``library`` is taken as it is. Otherwise `fit`
    picks each layer's patterns one after the other, each time the candidate that adds most kept energy: greedy on a
    submodular sum, so at least 1 - 1/e of the best choice. Candidates are the arrangements that the layer's own kernels
    prefer.

    Raises:
        ConstraintError: counts that are no whole numbers, more weights than the kernel has, or a projection before
            `fit`.

    >>> from lib.pruning import PCNN
    >>> PCNN(n=2).project(torch.tensor([[[[4.0, -1.0], [2.0, 3.0]]]])).tolist()
    [[[[4.0, 0.0], [0.0, 3.0]]]]
    >>> weight = torch.tensor([[[[4.0, -1.0], [2.0, 3.0]]], [[[5.0, 0.0], [0.0, 6.0]]], [[[0.0, 1.0], [1.0, 0.0]]]])
    >>> [f"{code:04b}" for code in PCNN(n=2, patterns=1).fit({"conv": weight})["conv"].library]
    ['1001']
    """

    n: int = 4
    patterns: int = 0
    library: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_count(n=self.n)
        if self.library is not None:
            object.__setattr__(self, "patterns", Patterns(library=self.library).count)
        if self.patterns:
            check_count(patterns=self.patterns)

    def _kernels(self, weight: Tensor) -> Tensor:
        flat = kernels(weight)
        if self.n > flat.shape[1]:
            raise ConstraintError(f"n = {self.n}: allowed are whole numbers up to the {flat.shape[1]} of a kernel")
        return flat

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, SupportConstraint]:
        """A library for each layer."""
        if self.library is not None or not self.patterns:
            return dict.fromkeys(weights, self)
        return {name: replace(self, library=self._distilled(w)) for name, w in weights.items()}

    def _distilled(self, weight: Tensor) -> tuple[int, ...]:
        flat = self._kernels(wide(weight))
        candidates = _codes(keep_largest_in_rows(flat.abs(), self.n)).unique()
        energy = flat.square() @ table(candidates.tolist(), flat.shape[1], flat).T  # (F*C, candidates)
        best, chosen = torch.zeros(len(flat), 1, device=flat.device), []
        for _ in range(min(self.patterns, len(candidates))):
            chosen.append(int((energy - best).clamp_(min=0).sum(0).argmax()))
            best = torch.maximum(best, energy[:, chosen[-1:]])
        return tuple(candidates[chosen].tolist())

    def select(self, weight: Tensor) -> Tensor:
        """Mask of each kernel's ``n`` largest, or of its best pattern."""
        if not self.patterns:
            return keep_largest_in_rows(self._kernels(weight).abs(), self.n).reshape(weight.shape)
        return Patterns(library=self.library).select(weight)

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """``n`` weights and a pattern index per kernel, and the table; without a library a bitmap per kernel."""
        count, area = self._kernels(z).shape
        if not self.patterns:
            return Storage(count * self.n * bits, count * area)
        return Patterns(library=self.library).storage_bits(z, bits)
