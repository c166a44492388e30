"""Test images as bytes, for networks that others trained and that normalize them in a way of their own."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib.data.errors import DataError
from lib.data.folders import _read, images
from lib.data.named import NAMES, data_root, read_named
from lib.data.splits import Split


def pixels(
    name: str,
    root: str | Path | None = None,
    *,
    classes: int,
    size: int = 0,
    resize: int | tuple[int, int] = 0,
    crop: int = 0,
    bicubic: bool = False,
) -> Split:
    """Labelled images as bytes ``(N, C, H, W)``: a quarter of their size as floats, 150 MB for 1,000 of 224 x 224.

    Those of a folder become RGB, those of ``NAMES`` keep their channels.

    The class of an image is the folder that it lies in or, where images lie side by side, its name up to the first
    ``_``; labels number the classes in the order of their names, as ImageNet's do. Images come class by class in
    turn, by name, so that the first few are a fair sample.

    Args:
        name: one of ``NAMES``, whose test images are meant, or a folder, in ``root`` unless its path is absolute.
        classes: how many there must be.
        size: keep so many, spread over the classes evenly; 0: all.
        resize: the shorter side becomes so long, or both ``(H, W)``; 0: as they are. crop: then the middle square.
        bicubic: how to resize; else bilinear.

    Raises:
        DataError: images that are missing, differ in size or cannot be read; labels that are not those of ``classes``;
            ``resize`` or ``crop`` of one of ``NAMES``.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> from lib.data import pixels
    >>> folder = TemporaryDirectory()
    >>> for i, name in enumerate(("b_3.png", "a_2.png", "a_1.png")):
    ...     Image.new("RGB", (8, 6), (i, i, i)).save(Path(folder.name, name))
    >>> few = pixels(folder.name, classes=2, resize=3, crop=2)
    >>> few.x.shape, few.x[:, 0, 0, 0].tolist(), few.y.tolist()
    (torch.Size([3, 3, 2, 2]), [2, 0, 1], [0, 1, 0])
    """
    if name in NAMES:
        if resize or crop:
            raise DataError(f"{name}: resize = {resize}, crop = {crop}; images of a known set stay as they are")
        _, _, x, y = read_named(name, data_root(root))
        labels, take = y.tolist(), lambda index: x[index]
    else:
        folder = Path(name).expanduser()
        folder = folder if folder.is_absolute() else data_root(root) / folder
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            raise DataError(f"{folder} holds train/ and test/: say which of them, as in {name}/test")
        paths = images(folder) if folder.is_dir() else []
        if not paths:
            raise DataError(
                f"{folder} has no images; put them there as <class>/<any name>, or side by side as <class>_*"
            )
        of = [path.parent.name if path.parent != folder else path.name.partition("_")[0] for path in paths]
        labels, number = [], {name: i for i, name in enumerate(sorted(set(of)))}
        labels = [number[name] for name in of]
        take = lambda index: _stacked([paths[i] for i in index], resize, crop, bicubic)  # noqa: E731
    if len(set(labels)) != classes:
        raise DataError(f"{name} holds images of {len(set(labels))} classes, the network knows {classes}")
    index = _in_turn(labels, classes, size)
    return Split(take(index).contiguous(memory_format=torch.channels_last), torch.tensor(labels)[index])


def _in_turn(labels: list[int], classes: int, size: int) -> list[int]:
    """Places of ``size`` images, the first of every class, the second, ...; of the last round every few classes."""
    if not 0 <= size <= len(labels):
        raise DataError(f"size = {size}: allowed are 0 (all) to {len(labels)} images")
    rank = np.zeros(len(labels), int)
    for label in set(labels):
        own = np.flatnonzero(np.equal(labels, label))
        rank[own] = np.arange(len(own))
    order = np.lexsort((labels, rank))
    size = size or len(order)
    full = size // classes * classes
    rest = order[full : full + classes]
    spread = rest[np.arange(size - full) * len(rest) // max(size - full, 1)]
    return [*order[:full].tolist(), *spread.tolist()]


def _stacked(paths: list[Path], resize: int | tuple[int, int], crop: int, bicubic: bool) -> Tensor:
    """``(N, 3, H, W)`` uint8."""
    found: np.ndarray | None = None
    for i, path in enumerate(paths):
        image = np.asarray(_fitted(path, resize, crop, bicubic))  # (H, W, 3)
        found = np.empty((len(paths), *image.shape), np.uint8) if found is None else found
        if image.shape != found.shape[1:]:
            sizes = " and ".join(f"{h}x{w}" for h, w, _ in (found.shape[1:], image.shape))
            raise DataError(f"images differ in size, {sizes} ({path}); give resize and crop")
        found[i] = image
    return torch.from_numpy(found).permute(0, 3, 1, 2)


def _fitted(path: Path, resize: int | tuple[int, int], crop: int, bicubic: bool) -> Image.Image:
    """Resized and cropped as torchvision's transforms do it."""
    raw = _read(path, 0)
    if raw.dtype != np.uint8:
        raise DataError(f"image {path} is of 16 bits a channel: save it with 8")
    image = Image.fromarray(raw)
    w, h = image.size
    if isinstance(resize, int):
        height, width = (resize * side // min(h, w) for side in (h, w)) if resize else (h, w)
    else:
        height, width = resize
    if (width, height) != (w, h):
        image = image.resize((width, height), Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR)
    if not crop:
        return image
    if crop > min(height, width):
        raise DataError(f"crop = {crop}: image {path} is {height}x{width} after resizing; resize to {crop} or more")
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return image.crop((left, top, left + crop, top + crop))
