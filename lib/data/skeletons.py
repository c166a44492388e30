"""Points of people: the maps that a network learns to make of them, and how people are read out of such maps.

Bottom-up, as in OpenPose (Cao et al. 2017): one heat map for each kind of point, one field of unit vectors for each
kind of limb (its part affinity); peaks are joined to people where the field runs along the line between them.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate, max_pool2d

from lib.data.errors import DataError
from lib.data.task import Task

STRIDE, SIGMA, REACH = 4, 1.0, 0.1
"""Pixels of the image for one of a map; the width of a peak, in pixels of a map; how far from its true place a point
still counts as found, in shares of the longer side of its person's box."""


@dataclass(frozen=True)
class Skeleton:
    """The kinds of points that a person has, ``K``, and the limbs between them, ``L`` pairs that make a tree.

    A model's output has ``K`` heat maps, then ``2 L`` affinities (x and y of each limb): ``(N, K + 2 L, H/4, W/4)``.
    What is to be said of images is ``(N, people, K, 2)``, x and y in pixels; NaN where a point, or a person, is absent.

    Raises:
        DataError: limbs that are no tree, or are not in an order in which each one's first end is known.

    >>> from lib.data import Skeleton
    >>> arm = Skeleton(("shoulder", "elbow", "wrist"), ((0, 1), (1, 2)))
    >>> y = torch.tensor([[[[8.0, 8.0], [8.0, 24.0], [24.0, 24.0]]]])  # one image, one person
    >>> maps = arm.maps(y, (32, 32))
    >>> tuple(maps.shape), float(arm.score(maps, y)[0])  # all three points are found in what should be said
    ((1, 7, 8, 8), 3.0)
    """

    points: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        known = {self.limbs[0][0]} if self.limbs else set()
        for a, b in self.limbs:
            if a not in known or b in known or not 0 <= b < len(self.points):
                raise DataError(f"limb {(a, b)} of {len(self.points)} points: limbs make a tree, from its root outward")
            known.add(b)
        if len(known) != len(self.points):
            raise DataError(f"{len(self.limbs)} limbs join {len(known)} of {len(self.points)} points: all are needed")

    @property
    def channels(self) -> int:
        """Of a model's output."""
        return len(self.points) + 2 * len(self.limbs)

    @property
    def task(self) -> Task:
        """Squared error of the maps, and the share of points found (see `score`)."""
        return Task("poses", self.loss, self.score, whole=True)  # people are not sought after every batch

    def maps(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        """What a model should say ``(N, K + 2 L, H/4, W/4)`` of images of ``size``: peaks of height 1; unit vectors
        within a pixel of a map of each limb, averaged where limbs of several people cross.

        Raises:
            DataError: a point outside its image, or a person of whom no point is there, but some of a later one.
        """
        self.check(y, size)
        rows, columns = (torch.arange(n // STRIDE, device=y.device) for n in size)
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).float()  # (H, W, 2): x, y
        at = (y / STRIDE - 0.5)[:, :, :, None, None]  # (N, P, K, 1, 1, 2), in pixels of a map
        peak = [
            torch.exp(-(n - at[..., 0, 0, i, None]).square() / (2 * SIGMA**2)) for i, n in ((0, columns), (1, rows))
        ]
        heat = (peak[1][..., None] * peak[0][..., None, :]).nan_to_num(0.0).amax(1)
        a, b = (at[:, :, list(ends)] for ends in zip(*self.limbs, strict=True))
        length = (b - a).norm(dim=-1, keepdim=True).clamp(min=1e-6)
        unit = (b - a) / length
        along = ((grid - a) * unit).sum(-1, keepdim=True)
        apart = (grid - a - torch.minimum(along.clamp(min=0), length) * unit).norm(dim=-1)
        on = (apart <= 1.0).float()[..., None]  # NaN is on no limb
        field = (on * unit.nan_to_num(0.0)).sum(1) / on.sum(1).clamp(min=1)  # (N, L, H, W, 2)
        return torch.cat([heat, field.permute(0, 1, 4, 2, 3).flatten(1, 2)], 1)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Squared error, summed over a map, averaged over maps and images: a map's few peaks count, not its area."""
        size = output.shape[2] * STRIDE, output.shape[3] * STRIDE
        return (output - self.maps(y, size)).square().sum((2, 3)).mean()

    def people(
        self, output: Tensor, threshold: float = 0.25, matching: Literal["optimal", "greedy"] = "optimal", fine: int = 2
    ) -> list[Tensor]:
        """Who is on each image: ``(people, K, 2)`` in pixels, NaN where a point was not found.

        Peaks of the heat maps above ``threshold`` are joined limb by limb: of all pairs of its two kinds of ends those
        with the largest mean of affinity along their line, each peak once, above a tenth. A person is what hangs
        together by limbs, of three points or more.

        Args:
            matching: pairs whose affinities have the largest sum, or the best pair first, then the best of the rest.
            fine: maps are enlarged so many times before peaks are sought (bicubic); 1: as they are.
        """
        k = len(self.points)
        heat, field = output[:, :k].detach(), output[:, k:].detach().unflatten(1, (-1, 2))
        if fine > 1:
            heat = interpolate(heat, scale_factor=fine, mode="bicubic", align_corners=False)
        top = (heat == max_pool2d(heat, 2 * fine + 1, 1, fine)) & (heat > threshold)
        found = []
        for i in range(len(output)):
            peaks = [top[i, j].nonzero().flip(1).float().add(0.5) / fine for j in range(k)]  # (count, 2) on a map
            found.append(self._joined(peaks, field[i], matching))
        return found

    def _joined(self, peaks: list[Tensor], field: Tensor, matching: str) -> Tensor:
        owners = [[-1] * len(p) for p in peaks]  # of each peak: the number of its person
        count = 0
        for limb, (a, b) in enumerate(self.limbs):
            if not len(peaks[a]) or not len(peaks[b]):
                continue
            worth = along(field[limb], peaks[a], peaks[b])
            for i, j in (_optimal if matching == "optimal" else _greedy)(worth.cpu().numpy()):
                if worth[i, j] > 0.1:
                    if owners[a][i] < 0:
                        owners[a][i], count = count, count + 1
                    owners[b][j] = owners[a][i]
        people = torch.full((count, len(peaks), 2), torch.nan)
        for j, (places, who) in enumerate(zip(peaks, owners, strict=True)):
            for place, person in zip(places, who, strict=True):
                if person >= 0:
                    people[person, j] = place.cpu() * STRIDE
        return people[(~people[..., 0].isnan()).sum(1) >= min(3, len(peaks))]

    def score(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """How many points are found (PCK), and of how many: each true person is given to at most one person found, so
        that the most points are within a tenth of the longer side of the true person's box. Further people that are
        found cost nothing here; `errors` counts them."""
        table = self.errors(self.people(output), y)
        return torch.tensor(float(table[:, 0].sum())), torch.tensor(float(table[:, 1].sum()))

    def errors(self, people: list[Tensor], y: Tensor) -> np.ndarray:
        """By image ``(N, 4)``: points found; true points; the sum of distances of the found points over the longer side
        of their person's box; points of people found who are nobody's."""
        table = np.zeros((len(y), 4))
        for i, (guess, true) in enumerate(zip(people, y.cpu(), strict=True)):
            true = true[~true[..., 0].isnan().all(1)]
            there = ~true[..., 0].isnan()
            table[i, 1] = there.sum()
            spare = (~guess[..., 0].isnan()).sum(1)
            table[i, 3] = spare.sum()
            if not len(guess) or not len(true):
                continue
            box = (true.nan_to_num(-torch.inf).amax(1) - true.nan_to_num(torch.inf).amin(1)).amax(-1)
            apart = (guess[:, None] - true[None]).norm(dim=-1) / box[:, None]  # (found, true, K)
            hits = apart < REACH
            for g, t in _optimal(hits.sum(-1).numpy()):
                if hits[g, t].any():
                    table[i, 0] += hits[g, t].sum()
                    table[i, 2] += apart[g, t][hits[g, t]].sum()
                    table[i, 3] -= spare[g]
        return table

    def check(self, y: Tensor, size: tuple[int, int]) -> None:
        """Refuse points ``(N, people, K, 2)`` that are not on images of ``size``, and images of people without points.

        Raises:
            DataError: names the image, the person and the point.
        """
        if y.ndim != 4 or y.shape[2:] != (len(self.points), 2):
            raise DataError(f"points of shape {tuple(y.shape)}: (images, people, {len(self.points)}, 2) is expected")
        out = ((y < 0) | (y > torch.tensor([size[1], size[0]], device=y.device))).any(-1)
        if out.any():
            n, p, k = out.nonzero()[0].tolist()
            place = ", ".join(f"{v:.1f}" for v in y[n, p, k].tolist())
            raise DataError(
                f"image {n}, person {p}: the {self.points[k]} at ({place}) is not on the image of "
                f"{size[1]}x{size[0]} pixels; NaN says that a point is not to be seen"
            )
        there = ~y[..., 0].isnan().all(2)
        if (late := there[:, 1:] & ~there[:, :-1]).any():
            n, p = late.nonzero()[0].tolist()
            raise DataError(f"image {n}: person {p} has no points, but person {p + 1} has")
        if not there.any(1).all():
            raise DataError(f"image {int((~there.any(1)).nonzero()[0])} has nobody with points")


def along(field: Tensor, starts: Tensor, ends: Tensor, steps: int = 10) -> Tensor:
    """The mean of a field ``(2, H, W)`` along the unit vectors from each of ``starts`` ``(A, 2)`` to each of ``ends``
    ``(B, 2)``, in pixels of the field, at ``steps`` places between them: ``(A, B)``; what OpenPose calls E.

    >>> from lib.data.skeletons import along
    >>> right = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
    >>> along(right, torch.tensor([[1.0, 4.0]]), torch.tensor([[6.0, 4.0], [1.0, 7.0]])).tolist()
    [[1.0, 0.0]]
    """
    way = ends[None] - starts[:, None]  # (A, B, 2)
    unit = way / way.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    share = torch.linspace(0, 1, steps, device=way.device)[:, None]
    places = starts[:, None, None] + share * way[:, :, None]  # (A, B, steps, 2)
    size = torch.tensor([field.shape[2], field.shape[1]], device=way.device)
    read = grid_sample(field[None], (2 * places / size - 1).flatten(0, 1)[None], align_corners=False)[0]
    read = read.unflatten(1, way.shape[:2])  # (2, A, B, steps)
    return (read.mean(-1) * unit.permute(2, 0, 1)).sum(0)


def _optimal(worth: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(*linear_sum_assignment(worth, maximize=True), strict=True))


def _greedy(worth: np.ndarray) -> list[tuple[int, int]]:
    pairs, left = [], worth.astype(float)
    for _ in range(min(worth.shape)):
        i, j = np.unravel_index(left.argmax(), left.shape)
        pairs.append((i, j))
        left[i], left[:, j] = -np.inf, -np.inf
    return pairs


ARM, LEG = ("shoulder", "elbow", "wrist"), ("hip", "knee", "ankle")
FIGURE = Skeleton(
    ("neck", "head", *(f"{side} {part}" for parts in (ARM, LEG) for side in ("left", "right") for part in parts)),
    ((0, 1), (0, 2), (2, 3), (3, 4), (0, 5), (5, 6), (6, 7), (0, 8), (8, 9), (9, 10), (0, 11), (11, 12), (12, 13)),
)
"""Of drawn figures, who all face us: their left is on the right."""

EYES = ("right eye, outer", "right eye, inner", "left eye, inner", "left eye, outer")
FACE = Skeleton(
    ("nose", "chin", "jaw, right", "jaw, left", *EYES, "mouth, right", "mouth, left"),
    tuple((0, i) for i in range(1, 10)),
)
"""Ten points of a face, all joined to the nose."""
