"""Folders of images, one sub-folder a class."""

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lib.data.errors import DataError
from lib.data.named import NAMES, Arrays

ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
Parts = dict[tuple[str, str], list[Path]]


def fingerprint(name: str) -> str:
    """Changes when the images or sounds of a folder do: their names, sizes and times of change; "" for known sets.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from lib.data import fingerprint
    >>> cats = Path((folder := TemporaryDirectory()).name, "train", "cat")
    >>> before = fingerprint(folder.name)
    >>> cats.mkdir(parents=True), (cats / "0.png").write_bytes(b"a cat")
    (None, 5)
    >>> fingerprint(folder.name) == before, fingerprint("mnist")
    (False, '')
    """
    if name in NAMES:
        return ""
    folder = Path(os.path.expanduser(name))
    try:
        parts = [folder / part for part in ("train", "test") if (folder / part).is_dir()]
        found = [p for part in parts for p in images(part, (*ENDINGS, ".wav"))]
        listed = [(p.relative_to(folder).as_posix(), (s := p.stat()).st_size, s.st_mtime_ns) for p in found]
    except (DataError, OSError) as error:  # whoever loads it is told
        listed = str(error)
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def images(folder: Path, endings: tuple[str, ...] = ENDINGS) -> list[Path]:
    """The images below a folder, by name; links are followed, hidden files and folders left out.

    Raises:
        DataError: a folder that cannot be listed.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from lib.data.folders import images
    >>> place = Path((folder := TemporaryDirectory()).name)
    >>> [(place / name).write_bytes(b"") for name in ("2.png", "1.JPG", ".hidden.png", "labels.txt")]
    [0, 0, 0, 0]
    >>> [path.name for path in images(place)]
    ['1.JPG', '2.png']
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed: {error.strerror}")

    found = []
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(place)
        inner = {f: (here / f).resolve() for f in folders if not f.startswith(".")}
        folders[:] = [f for f, target in inner.items() if not here.resolve().is_relative_to(target)]  # no way back up
        found += [here / f for f in files if not f.startswith(".") and f.lower().endswith(endings)]
    return sorted(found)


def read_folder(folder: Path, image_size: int = 0) -> Arrays:
    """The training and test images of a folder with their labels, in the order of classes.

    Every image becomes RGB. What is transparent lies on white. Grey images of 16 bits keep them: if there is one, all
    pixels are ``(N, 3, H, W)`` int32 up to 65535, else uint8. Floating-point images are in [0, 1] or refused; 32-bit
    whole numbers are taken for 16-bit ones, or refused.

    Args:
        folder: holds ``train/<class>/*`` and ``test/<class>/*``.
        image_size: side of the square that images are resized to; 0: as they are.

    Raises:
        DataError: an image that cannot be read, by its path; no images; different classes or sizes.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> from lib.data.folders import read_folder
    >>> folder = TemporaryDirectory()
    >>> for part in ("train", "test"):
    ...     (place := Path(folder.name, part, "cat")).mkdir(parents=True)
    ...     Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(place / "nothing.png")
    >>> x, y, x_test, y_test = read_folder(Path(folder.name), image_size=2)
    >>> x.shape, x.unique().tolist(), y_test.tolist()
    (torch.Size([1, 3, 2, 2]), [255], [0])
    """
    classes, found = by_class(folder)
    pixels = [_read(path, image_size) for paths in found.values() for path in paths]
    if len({p.shape for p in pixels}) > 1:
        raise DataError(f"dataset {str(folder)!r}: images differ in size; give image_size to resize them")
    if any(p.dtype == np.uint16 for p in pixels):
        pixels = [p.astype(np.int32) * (1 if p.dtype == np.uint16 else 257) for p in pixels]  # 255 becomes 65535
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W)
    y = torch.tensor([classes.index(name) for (_, name), paths in found.items() for _ in paths])
    train = sum(len(paths) for (part, _), paths in found.items() if part == "train")
    return x[:train], y[:train], x[train:], y[train:]


def by_class(folder: Path, endings: tuple[str, ...] = ENDINGS, what: str = "images") -> tuple[list[str], Parts]:
    """The classes of a folder, and the files of each by ``train`` or ``test`` and class.

    Raises:
        DataError: a folder that cannot be listed, a class that is in one part alone, or one without files.
    """
    classes, test_classes = (_classes(folder / part) for part in ("train", "test"))
    if classes != test_classes:
        only = sorted({*classes} ^ {*test_classes})
        raise DataError(f"dataset {str(folder)!r}: train/ and test/ hold different classes: {', '.join(only)} in one")
    if not classes:
        raise DataError(f"dataset {str(folder)!r}: train/ and test/ hold no folders, one a class")
    found = {(part, name): images(folder / part / name, endings) for part in ("train", "test") for name in classes}
    for (part, name), paths in found.items():
        if not paths:
            raise DataError(f"dataset {str(folder)!r}: {part}/{name} has no {what} ({', '.join(endings)})")
    return classes, found


def _classes(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from None


def _read(path: Path, size: int) -> np.ndarray:
    """One image ``(H, W, 3)``, uint8 or, where its mode holds more, uint16."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                deep = image.mode.startswith(("I", "F"))
                if deep and "transparency" in image.info:
                    raise ValueError(f"mode {image.mode} with transparency: save it with 8 bits")
                image = _grey(image) if deep else _opaque(image)
                if size:
                    image = image.resize((size, size), Image.Resampling.BILINEAR)
                if not deep:
                    return np.asarray(image)
                return np.asarray(image).round().astype(np.uint16)[..., None].repeat(3, axis=2)
    except Exception as error:  # a decoder may raise anything; one that names no file helps nobody
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"image {path} cannot be read: {reason}") from None


def _grey(image: Image.Image) -> Image.Image:
    """In mode F, from 0 to 65535."""
    top = 1.0 if image.mode == "F" else 65535.0
    values = np.asarray(image.convert("F"))
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # nor NaN
        raise ValueError(f"mode {image.mode} with values from {low:g} to {high:g}: allowed are 0 to {top:g}")
    return Image.fromarray(values * np.float32(65535 / top))


def _opaque(image: Image.Image) -> Image.Image:
    """In mode RGB, on a white ground."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
