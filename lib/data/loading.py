"""Loading: what a name stands for, splits of a fixed order, and normalized pixels."""

import operator
import os
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from lib.data.errors import DataError
from lib.data.folders import read_folder
from lib.data.named import NAMES, data_root, read_named
from lib.data.splits import Data, Split


def check_name(name: str) -> None:
    """Refuse a data set that `load` does not know.

    Raises:
        DataError: neither a known name nor a folder with ``train/`` and ``test/``.

    >>> from lib.data import check_name
    >>> check_name("mnist")
    >>> check_name("imagenet")
    Traceback (most recent call last):
        ...
    lib.data.errors.DataError: dataset 'imagenet' is unknown: allowed are fashion_mnist, mnist, ...
    """
    folder = Path(os.path.expanduser(name))
    if name not in NAMES and not ((folder / "train").is_dir() and (folder / "test").is_dir()):
        raise DataError(
            f"dataset {name!r} is unknown: allowed are {', '.join(NAMES)}, "
            "or the path of a folder with train/<class>/* and test/<class>/*"
        )


def load(
    name: str = "fashion_mnist",
    root: str | Path | None = None,
    *,
    train_size: int = 0,
    test_size: int = 0,
    validation_size: int = 5000,
    image_size: int = 0,
) -> Data:
    """Load a data set by name, or a folder with ``train/<class>/*`` and ``test/<class>/*`` by its path.

    Images come in a fixed shuffled order, so that the first few of a split are a fair sample of it, whatever order the
    files have. The validation split is ``validation_size`` images taken out of the training set, the same ones whatever
    ``train_size`` is. Pixels are scaled to [0, 1], then normalized with the training split's mean and standard
    deviation of each channel, both exact, so that the data are the same bits on every machine. The deviation of a
    channel that never changes counts as 1.

    Args:
        name: one of ``NAMES`` or the path of a folder of images (which ones, and how they are read: see `read_folder`).
        root: where the files lie (see `data_root`); Fashion-MNIST falls back to the copy that ships.
        train_size: keep only this many training images (0: all); ``test_size`` likewise.
        validation_size: images held out of the training set; at most a fifth of it is taken; 0: none.
        image_size: resize to a square of this many pixels (folders only; needed when their sizes differ).

    Raises:
        DataError: unknown name, missing root, missing or damaged file, sizes that do not fit.

    >>> from lib.data import load
    >>> images = load("fashion_mnist", train_size=1000, test_size=500)
    >>> len(images.train), len(images.validation), len(images.test), images.shape, images.classes
    (1000, 5000, 500, (1, 28, 28), 10)
    >>> abs(images.train.x.mean().item()) < 1e-4, round(images.train.x.std().item(), 3)
    (True, 1.0)
    """
    sizes = {"train_size": train_size, "test_size": test_size, "validation_size": validation_size}
    for key, size in (sizes | {"image_size": image_size}).items():
        allowed = "0 (all) and positive numbers of images" if key in sizes else "0 (as they are) and positive sides"
        if not hasattr(size, "__index__") or operator.index(size) < 0:
            raise DataError(f"{key} = {size!r}: allowed are {allowed}")
    check_name(name)
    if image_size and name in NAMES:
        raise DataError(f"image_size = {image_size}: {name} has a size of its own; only folders of images are resized")
    folder = Path(os.path.expanduser(name)).absolute()
    x, y, x_test, y_test = read_named(name, data_root(root)) if name in NAMES else read_folder(folder, image_size)
    classes = int(y.max()) + 1  # before any cut: a small sample need not hold every class
    order, test = _shuffled(len(y)), _shuffled(len(y_test))
    held_out = min(validation_size, len(y) // 5)
    if validation_size and not held_out:
        raise DataError(f"{name} has {len(y)} training images: no validation split comes out of fewer than 5")
    validation, train = order[:held_out], order[held_out:]
    for key, size, there in (("train_size", train_size, train), ("test_size", test_size, test)):
        if size > len(there):
            kind = "training images after validation" if key == "train_size" else "test images"
            raise DataError(f"{key} = {size}: {name} has {len(there)} {kind}")
    train, test = train[: train_size or None], test[: test_size or None]

    top = 255 if x.dtype == torch.uint8 else 65535
    mean, std = _mean_and_std(x[train], top)

    def split(pixels: Tensor, labels: Tensor) -> Split:
        normal = (pixels.float().div_(top) - mean) / std
        return Split(normal.contiguous(memory_format=torch.channels_last), labels.long())

    return Data(
        name if name in NAMES else folder.name,
        split(x[train], y[train]),
        split(x[validation], y[validation]),
        split(x_test[test], y_test[test]),
        classes,
    )


def _shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _mean_and_std(pixels: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Of the pixels over ``top`` in each channel ``(1, C, 1, 1)``, from whole numbers: no order of summing matters."""
    values, found = torch.arange(top + 1), []
    for channel in pixels.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=top + 1)
        n, total, squares = int(counts.sum()), int((counts * values).sum()), int((counts * values.square()).sum())
        variance = (n * squares - total**2) / (n * max(n - 1, 1) * top**2)
        found.append((total / (n * top), sqrt(variance) or 1.0))  # a constant is divided by one
    mean, std = torch.tensor(found, dtype=torch.float32).T.reshape(2, 1, -1, 1, 1)
    return mean, std
