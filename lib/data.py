"""Data sets by name, as in-memory tensors with a fixed train / validation / test split.

Every data set becomes one normalized float tensor per split, ``(N, C, H, W)`` in ``channels_last`` order, so that a
batch is an index and not a worker process.
"""

import gzip
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SHIPPED_ROOT = Path(__file__).resolve().parent.parent / "data"
NAMES = ("fashion_mnist", "mnist", "cifar10", "cifar100")

# SHA-256 of the four decompressed idx files of Fashion-MNIST (Xiao et al. 2017, as packaged by Debian).
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class DataError(ValueError):
    """A data set is unknown, missing or damaged; the message says what was looked for, where, and what to do.

    >>> from lib.data import load
    >>> load(train_size=-1)
    Traceback (most recent call last):
        ...
    lib.data.DataError: train_size = -1: allowed are 0 (all) and positive numbers of images
    """


def check_name(name: str) -> None:
    """Refuse a data set that `load` does not know.

    Raises:
        DataError: neither a known name nor a folder with ``train/`` and ``test/``.

    >>> from lib.data import check_name
    >>> check_name("mnist")
    >>> check_name("imagenet")
    Traceback (most recent call last):
        ...
    lib.data.DataError: dataset 'imagenet' is unknown: allowed are fashion_mnist, mnist, ...
    """
    folder = Path(name).expanduser()
    if name not in NAMES and not ((folder / "train").is_dir() and (folder / "test").is_dir()):
        raise DataError(
            f"dataset {name!r} is unknown: allowed are {', '.join(NAMES)}, "
            "or the path of a folder with train/<class>/* and test/<class>/*"
        )


@dataclass(frozen=True)
class Split:
    """Images ``x`` ``(N, C, H, W)`` float32, normalized per channel; labels ``y`` ``(N,)`` int64.

    >>> from lib.data import Split
    >>> len(Split(torch.zeros(3, 1, 28, 28), torch.tensor([0, 1, 1])))
    3
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str) -> "Split":
        """The same split on another device; images stay in ``channels_last`` order."""
        return Split(self.x.to(device, memory_format=torch.channels_last), self.y.to(device))


@dataclass(frozen=True)
class Data:
    """A data set: its three splits, the number of classes and a checksum of everything that training can see.

    >>> from lib.data import Data, Split
    >>> corners = Split(torch.eye(4).reshape(4, 1, 2, 2), torch.arange(4))
    >>> Data("corners", corners, corners, corners, classes=4, checksum="corners").shape
    (1, 2, 2)
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    checksum: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        return tuple(self.train.x.shape[1:])

    def to(self, device: torch.device | str) -> "Data":
        """The same data on another device."""
        moved = (s.to(device) for s in (self.train, self.validation, self.test))
        return Data(self.name, *moved, self.classes, self.checksum)


def data_root(root: str | Path | None = None) -> Path:
    """The folder that data sets lie in: ``root``, else the environment's ``DATA_ROOT``, else the project's ``data/``.

    Raises:
        DataError: the folder does not exist.

    >>> from lib.data import data_root
    >>> data_root("/no/such/folder")
    Traceback (most recent call last):
        ...
    lib.data.DataError: data_root '/no/such/folder' is not a folder; give one that exists, or leave it empty
    """
    chosen = Path(root or os.environ.get("DATA_ROOT") or SHIPPED_ROOT).expanduser()
    if not chosen.is_dir():
        raise DataError(f"data_root {str(chosen)!r} is not a folder; give one that exists, or leave it empty")
    return chosen


def fingerprint(name: str) -> str:
    """Changes when the files of a folder of images do: their names, sizes and times of change; "" for known sets.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from lib.data import fingerprint
    >>> before = fingerprint((folder := TemporaryDirectory()).name)
    >>> Path(folder.name, "train").mkdir(), Path(folder.name, "train", "cat.png").write_text("a cat")
    (None, 5)
    >>> fingerprint(folder.name) == before, fingerprint("mnist")
    (False, '')
    """
    if name in NAMES:
        return ""
    folder = Path(name).expanduser()
    files = sorted(p for part in ("train", "test") for p in (folder / part).rglob("*") if p.is_file())
    listed = [(p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


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

    The validation split is ``validation_size`` images taken out of the training set by a fixed permutation, the same
    whatever ``train_size`` is. Pixels are scaled to [0, 1], then normalized with the training split's channel mean and
    standard deviation.

    Args:
        name: one of ``NAMES`` or the path of a folder of images.
        root: where the files lie (see `data_root`); Fashion-MNIST falls back to the copy that ships.
        train_size: keep only this many training images (0: all); ``test_size`` likewise.
        validation_size: images held out of the training set; at most a fifth of it is taken.
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
    for key, size in {"train_size": train_size, "test_size": test_size, "validation_size": validation_size}.items():
        if size < 0:
            raise DataError(f"{key} = {size}: allowed are 0 (all) and positive numbers of images")
    check_name(name)
    folder = Path(name).expanduser()
    if name == "fashion_mnist":
        x, y, x_test, y_test = _fashion_mnist(data_root(root))
    elif name in NAMES:
        x, y, x_test, y_test = _torchvision(name, data_root(root))
    else:
        x, y, x_test, y_test = _image_folder(folder, image_size)
    classes = int(y.max()) + 1  # before any cut: a small sample need not hold every class
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held_out = min(validation_size, len(y) // 5)
    validation, train = order[:held_out], order[held_out:]
    if train_size > len(train):
        raise DataError(f"train_size = {train_size}: {name} has {len(train)} training images after validation")
    train = train[: train_size or None]
    x_test, y_test = x_test[: test_size or None], y_test[: test_size or None]
    checksum = _checksum(x[train], y[train], x[validation], y[validation], x_test, y_test)

    scale = x[train].float().div_(255)
    mean, std = scale.mean((0, 2, 3), keepdim=True), scale.std((0, 2, 3), keepdim=True)

    def split(pixels: Tensor, labels: Tensor) -> Split:
        normal = (pixels.float().div_(255) - mean) / std
        return Split(normal.contiguous(memory_format=torch.channels_last), labels.long())

    return Data(
        folder.name if name not in NAMES else name,
        split(x[train], y[train]),
        split(x[validation], y[validation]),
        split(x_test, y_test),
        classes,
        checksum,
    )


def _checksum(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(str(tuple(t.shape)).encode() + t.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


Arrays = tuple[Tensor, Tensor, Tensor, Tensor]


def _fashion_mnist(root: Path) -> Arrays:
    """The shipped gzip files, or those in ``root/FashionMNIST/raw``; every file is checked against its checksum."""
    folder = root / "FashionMNIST" / "raw"
    if not folder.is_dir():
        folder = SHIPPED_ROOT / "FashionMNIST" / "raw"

    def read(stem: str) -> Tensor:
        path = folder / f"{stem}.gz"
        plain = folder / stem
        if not path.is_file() and not plain.is_file():
            raise DataError(f"fashion_mnist: {path} is missing; restore it with `git checkout data`")
        try:
            raw = gzip.decompress(path.read_bytes()) if path.is_file() else plain.read_bytes()
        except (EOFError, OSError) as error:
            raise DataError(
                f"fashion_mnist: {path} is damaged ({error}); restore it with `git checkout data`"
            ) from None
        if hashlib.sha256(raw).hexdigest() != FASHION_MNIST_SHA256[stem]:
            raise DataError(f"fashion_mnist: {path} does not have the expected checksum; restore it from git")
        return _idx(raw)

    x, y, x_test, y_test = (read(stem) for stem in FASHION_MNIST_SHA256)
    return x.unsqueeze(1), y, x_test.unsqueeze(1), y_test


def _idx(raw: bytes) -> Tensor:
    """An idx file of unsigned bytes: magic 0x0000 08 <dims>, the big-endian sizes, the values."""
    dims = raw[3]
    shape = np.frombuffer(raw, ">u4", dims, 4).astype(int)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())


def _torchvision(name: str, root: Path) -> Arrays:
    """MNIST and CIFAR through torchvision: read from ``root``, downloaded there when missing."""
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    how = f"put the files there in torchvision's layout, or allow {name} to be downloaded"
    try:
        try:
            train, test = (kind(root, train=part) for part in (True, False))
        except RuntimeError:  # torchvision's "not found"; ask for it only now, so that a read-only root works
            train, test = (kind(root, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError, ValueError, EOFError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"{name} could not be read under {root} ({reason}); {how}") from None

    def arrays(part) -> tuple[Tensor, Tensor]:
        x = torch.as_tensor(part.data)
        x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)  # (N, H, W[, C]) -> (N, C, H, W)
        return x, torch.as_tensor(part.targets)

    return *arrays(train), *arrays(test)


def _image_folder(folder: Path, image_size: int) -> Arrays:
    """A folder of images, one sub-folder per class, read whole."""
    from torchvision import datasets
    from torchvision.transforms import v2

    resize = [v2.Resize((image_size, image_size), antialias=True)] if image_size else []

    def arrays(part: str) -> tuple[Tensor, Tensor, list[str]]:
        try:
            images = datasets.ImageFolder(folder / part, transform=v2.Compose([v2.PILToTensor(), *resize]))
            x, y = zip(*images, strict=True)
        except (OSError, FileNotFoundError) as error:
            raise DataError(f"dataset {str(folder)!r}: {str(error).splitlines()[0]}") from None
        if len({t.shape for t in x}) > 1:
            raise DataError(f"dataset {str(folder)!r}: images differ in size; give image_size to resize them")
        return torch.stack(x), torch.tensor(y), images.classes

    x, y, classes = arrays("train")
    x_test, y_test, test_classes = arrays("test")
    if classes != test_classes:
        raise DataError(f"dataset {str(folder)!r}: train/ and test/ hold different classes")
    return x, y, x_test, y_test
