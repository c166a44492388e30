"""Images of several people with the points of everybody on them: drawn figures, or faces on one canvas."""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lib.data.errors import DataError
from lib.data.loading import _shuffled
from lib.data.named import DAMAGED, data_root
from lib.data.skeletons import FACE, FIGURE, STRIDE
from lib.data.splits import Data, Split

SKELETONS = {"figures": FIGURE, "faces": FACE}
FACE_POINTS = (30, 8, 0, 16, 36, 39, 42, 45, 48, 54)
"""Those of `FACE`, in the usual numbering of 68."""


def poses(
    name: Literal["figures", "faces"] = "figures",
    root: str | Path | None = None,
    *,
    people: int = 3,
    side: int = 64,
    train_size: int = 2000,
    test_size: int = 500,
    validation_size: int = 500,
) -> Data:
    """Images of one to ``people`` people ``(N, 1, side, side)`` with their points ``(N, people, K, 2)``.

    - ``figures`` (the default, which needs no files) are drawn: upright stick figures of several sizes, with limbs in
      any position, on a noisy ground; figure by figure from a seed, the same on every machine up to rounding.
    - ``faces`` are cut closely from photographs and put on one canvas, two by two: ``faces/faces68_training.npz`` and
      ``faces68_test.npz`` in the data root, each with ``images`` ``(N, 64, 64)`` uint8 and ``keypoints`` ``(N, 68, 2)``
      in pixels. Canvases of training and validation have different images of faces; in the published files many test
      and validation images are other frames of videos that training images are from. A point that lies outside its
      cut is not to be seen.

    Pixels are normalized by mean and deviation over the training images.

    Raises:
        DataError: an unknown name, a size that is not allowed, missing or damaged files.

    >>> from lib.data import poses
    >>> drawn = poses("figures", train_size=8, validation_size=4, test_size=4)
    >>> drawn.shape, tuple(drawn.train.y.shape), drawn.task.name
    ((1, 64, 64), (8, 3, 14, 2), 'poses')
    """
    if name not in SKELETONS:
        raise DataError(f"poses {name!r} are unknown: allowed are {', '.join(SKELETONS)}")
    sizes = {"train_size": train_size, "validation_size": validation_size, "test_size": test_size}
    for key, value in (sizes | {"people": people}).items():
        if not isinstance(value, int) or value < 1:
            raise DataError(f"{key} = {value!r}: allowed are whole numbers from 1")
    if side % STRIDE or side < 32:
        raise DataError(f"side = {side}: allowed are multiples of {STRIDE} from 32")
    if people > 4:
        raise DataError(f"people = {people}: a canvas has room for 4")
    if name == "figures":
        draw = partial(_drawn, people=people, side=side)
        parts = [draw(size, seed) for seed, size in enumerate(sizes.values())]
    else:
        x, y = _faces(data_root(root) / "faces" / "faces68_training.npz")
        order = _shuffled(len(x))
        held, rest = order[: len(x) // 5], order[len(x) // 5 :]
        tested = _faces(data_root(root) / "faces" / "faces68_test.npz")
        sources = [(x[rest], y[rest]), (x[held], y[held]), tested]
        parts = [
            _canvases(*source, size, people, side, seed)
            for seed, (source, size) in enumerate(zip(sources, sizes.values(), strict=True))
        ]
    mean, std = parts[0][0].mean(), parts[0][0].std()
    skeleton = SKELETONS[name]
    for _, y in parts:
        skeleton.check(y, (side, side))
    splits = [Split((x - mean) / std, y, skeleton.task) for x, y in parts]
    return Data(name, *splits, classes=skeleton.channels)


def _drawn(count: int, seed: int, people: int, side: int) -> tuple[Tensor, Tensor]:
    """Stick figures ``(count, 1, side, side)`` and their points ``(count, people, 14, 2)``.

    Boxes overlap by a quarter of the smaller at the most, so that there may be fewer figures than were wanted.
    """
    rng = np.random.default_rng(seed)
    y = np.full((count, people, len(FIGURE.points), 2), np.nan, np.float32)
    x = np.empty((count, 1, side, side), np.float32)
    for i in range(count):
        image = x[i, 0]
        image[:] = rng.uniform(0, 0.3) + 0.1 * rng.standard_normal((side, side))
        boxes: list[np.ndarray] = []
        wanted = rng.integers(1, people + 1)
        for _ in range(5 * wanted):
            if len(boxes) == wanted:
                break
            points = _figure(rng, rng.uniform(0.08, 0.13) * side)
            low, high = points.min(0), points.max(0)
            room = np.maximum(side - 4 - (high - low), 0)
            points += 2 - low + rng.uniform(0, 1, 2) * room
            box = np.stack([points.min(0), points.max(0)])
            if (box[1] < side - 1).all() and all(_overlap(box, b) < 0.25 for b in boxes):
                y[i, len(boxes)] = points
                boxes.append(box)
                _draw(image, points, box, rng.uniform(0.6, 1.0))
        if not boxes:
            raise DataError(f"side = {side}: no figure fits")
    return torch.from_numpy(x), torch.from_numpy(y)


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Of two boxes ``(2, 2)``, in shares of the smaller."""
    common = (np.minimum(one[1], other[1]) - np.maximum(one[0], other[0])).clip(0).prod()
    return float(common / min((one[1] - one[0]).prod(), (other[1] - other[0]).prod()))


def _draw(image: np.ndarray, points: np.ndarray, box: np.ndarray, light: float) -> None:
    (left, top), (right, bottom) = np.floor(box[0]).astype(int) - 2, np.ceil(box[1]).astype(int) + 2
    part = image[max(top, 0) : bottom, max(left, 0) : right]
    rows, columns = np.mgrid[: part.shape[0], : part.shape[1]] + 0.5
    a, b = (points[list(ends)] for ends in zip(*FIGURE.limbs, strict=True))
    way = b - a
    px = columns[..., None] + max(left, 0) - a[:, 0]  # (rows, columns, limbs)
    py = rows[..., None] + max(top, 0) - a[:, 1]
    share = ((px * way[:, 0] + py * way[:, 1]) / (way**2).sum(1)).clip(0, 1)
    apart = np.hypot(px - share * way[:, 0], py - share * way[:, 1])
    apart[..., 0] -= 1.0  # the head is thick
    np.maximum(part, light * (1.5 - apart.min(-1)).clip(0, 1), out=part)


def _figure(rng: np.random.Generator, unit: float) -> np.ndarray:
    """Points of an upright figure ``(14, 2)`` whose arms and legs have two pieces of ``unit`` pixels each."""
    lean = rng.uniform(-0.3, 0.3)
    down, across = np.array([np.sin(lean), np.cos(lean)]), np.array([np.cos(lean), -np.sin(lean)])
    neck = np.zeros(2)
    hip = neck + 1.8 * unit * down
    points = [neck, neck - 0.9 * unit * down]
    for base, sides, spread in ((neck, 0.6, 1.9), (hip, 0.4, 0.6)):
        for sign in (1, -1):  # left first
            joint = base + sign * sides * unit * across + 0.15 * unit * down
            points.append(joint)
            angle = lean + sign * rng.uniform(0.1, spread)
            for bend in (0, sign * rng.uniform(-0.8, 0.8)):
                angle += bend
                joint = joint + unit * np.array([np.sin(angle), np.cos(angle)])
                points.append(joint)
    return np.stack(points)


def _faces(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = torch.from_numpy(file["images"]), torch.from_numpy(file["keypoints"])
    except DAMAGED as error:
        raise DataError(
            f"faces: {path} cannot be read ({error}); it should hold square images (N, H, H) uint8 and keypoints "
            "(N, 68, 2)"
        ) from None
    if x.dtype != torch.uint8 or x.ndim != 3 or x.shape[1] != x.shape[2] or y.shape != (len(x), 68, 2):
        raise DataError(f"faces: {path} holds images {tuple(x.shape)} {x.dtype} and keypoints {tuple(y.shape)}")
    y = y[:, FACE_POINTS].float()
    y[~((y >= 0) & (y <= x.shape[1])).all(-1)] = torch.nan  # also where only one of the two is a number
    for i in (y[..., 0].isnan().all(1)).nonzero()[:1, 0].tolist():
        raise DataError(f"faces: image {i} of {path.name} has no point on it")
    return x, y


def _canvases(x: Tensor, y: Tensor, count: int, people: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Faces in quarters of a canvas, each of 0.8 to 1 of a quarter's side."""
    rng = np.random.default_rng(seed)
    canvas, points = torch.zeros(count, 1, side, side), torch.full((count, people, len(FACE.points), 2), torch.nan)
    for i in range(count):
        quarters = rng.permutation(4)[: rng.integers(1, people + 1)]
        for person, quarter in enumerate(quarters.tolist()):
            face, own = _close(x, y, int(rng.integers(len(x))))
            size = round(side / 2 * rng.uniform(0.8, 1.0))
            left, top = (q * side // 2 + int(rng.integers(side // 2 - size + 1)) for q in divmod(quarter, 2)[::-1])
            small = interpolate(face[None, None].float() / 255, (size, size), mode="bilinear", antialias=True)
            canvas[i, 0, top : top + size, left : left + size] = small[0, 0]
            points[i, person] = own * (size / len(face)) + torch.tensor([left, top])
    return canvas, points


def _close(x: Tensor, y: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """A square of an image that shows little more than the points, and the points on it."""
    low, high = y[i].nan_to_num(torch.inf).amin(0), y[i].nan_to_num(-torch.inf).amax(0)
    side = min(int(1.5 * float((high - low).amax())) + 1, x.shape[1])
    left, top = (int(v.clamp(0, x.shape[1] - side)) for v in (low + high - side) / 2)
    return x[i, top : top + side, left : left + side], y[i] - torch.tensor([left, top])
