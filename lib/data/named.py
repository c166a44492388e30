"""The data sets that have a name: Fashion-MNIST, which ships, MNIST and CIFAR."""

import gzip
import hashlib
import os
import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from lib.data.errors import DataError

SHIPPED_ROOT = Path(__file__).resolve().parent.parent.parent / "data"
DAMAGED = (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error)
"""What numpy raises of an ``.npz`` that is cut short, changed, or something else."""

NAMES = ("fashion_mnist", "mnist", "cifar10", "cifar100")

# SHA-256 of the four decompressed idx files of Fashion-MNIST (Xiao et al. 2017, as packaged by Debian).
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

# MD5 of those of MNIST, whose archives torchvision checks when it downloads them, but not what lies there.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}

Arrays = tuple[Tensor, Tensor, Tensor, Tensor]
"""Training images and labels, test images and labels."""


def data_root(root: str | Path | None = None) -> Path:
    """The folder that data sets lie in: ``root``, else the environment's ``DATA_ROOT``, else the project's ``data/``.

    Raises:
        DataError: the folder does not exist.

    >>> from lib.data import data_root
    >>> data_root("/no/such/folder")
    Traceback (most recent call last):
        ...
    lib.data.errors.DataError: data_root '/no/such/folder' is not a folder; give one that exists, or leave it empty
    """
    chosen = Path(os.path.expanduser(root or os.environ.get("DATA_ROOT") or SHIPPED_ROOT))
    if not chosen.is_dir():
        raise DataError(f"data_root {str(chosen)!r} is not a folder; give one that exists, or leave it empty")
    return chosen


def read_named(name: str, root: Path) -> Arrays:
    """The training and test images of one of `NAMES` ``(N, C, H, W)`` uint8 with their labels, as published.

    Raises:
        DataError: a file is missing or damaged, or cannot be downloaded.

    >>> from lib.data.named import SHIPPED_ROOT, read_named
    >>> [part.shape for part in read_named("fashion_mnist", SHIPPED_ROOT)[:2]]
    [torch.Size([60000, 1, 28, 28]), torch.Size([60000])]
    """
    return _fashion_mnist(root) if name == "fashion_mnist" else _torchvision(name, root)


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
        except (EOFError, OSError, zlib.error) as error:
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
    from torchvision.datasets.utils import check_integrity

    kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    how = f"put the files there in torchvision's layout, or allow {name} to be downloaded"
    try:
        try:
            train, test = (kind(root, train=part) for part in (True, False))
        except RuntimeError:  # torchvision's "not found"; ask for it only now, so that a read-only root works
            train, test = (kind(root, train=part, download=True) for part in (True, False))
        for file, md5 in MNIST_MD5.items() if name == "mnist" else ():
            if not check_integrity(root / "MNIST" / "raw" / file, md5):
                raise RuntimeError(f"{file} is not MNIST's")
    except (OSError, RuntimeError, ValueError, EOFError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"{name} could not be read under {root} ({reason}); {how}") from None

    def arrays(part) -> tuple[Tensor, Tensor]:
        x = torch.as_tensor(part.data)
        x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)  # (N, H, W[, C]) -> (N, C, H, W)
        return x, torch.as_tensor(part.targets)

    return *arrays(train), *arrays(test)
