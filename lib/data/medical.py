"""Medical images in MedMNIST's layout, and scores for classes of unequal size."""

from pathlib import Path

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor
from torch.nn.functional import cross_entropy

from lib.data.errors import DataError
from lib.data.loading import _mean_and_std, _shuffled
from lib.data.named import DAMAGED, data_root
from lib.data.splits import Data, Split
from lib.data.task import Task, classification


def auc(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The area under the ROC curve of the second of two classes: how often an image of it has a larger margin than one
    of the first, ties counted half (Mann-Whitney). ``output`` ``(N, 2)``, ``y`` ``(N,)``; times N, and N.

    Raises:
        DataError: images of one class alone, for which there is no such area; or not two outputs.

    >>> from lib.data import auc
    >>> margins = torch.tensor([0.1, 0.4, 0.35, 0.8])
    >>> area, of = auc(torch.stack([-margins, margins], 1), torch.tensor([0, 0, 1, 1]))
    >>> float(area / of)
    0.75
    """
    if output.ndim != 2 or output.shape[1] != 2:
        raise DataError(f"an area under the curve of outputs {tuple(output.shape)}: (N, 2) is expected")
    ill = (y == 1).cpu().numpy()
    if ill.all() or not ill.any():
        raise DataError(f"an area under the curve of {len(y)} images of one class: it takes both")
    margin = (output[:, 1] - output[:, 0]).detach().double().cpu().numpy()
    pairs = mannwhitneyu(margin[ill], margin[~ill]).statistic
    return torch.tensor(pairs / (ill.sum() * (~ill).sum()) * len(ill)), torch.tensor(len(ill))


def balanced_accuracy(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over classes of the share of their images that are recognized; times N, and N. A network that always
    says the most frequent class has one over the number of classes.

    Raises:
        DataError: a class of which there is no image.

    >>> from lib.data import balanced_accuracy
    >>> always_first = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    >>> right, of = balanced_accuracy(always_first, torch.tensor([0, 0, 0, 1]))
    >>> float(right / of)
    0.5
    """
    there = torch.bincount(y, minlength=output.shape[1])
    if (there == 0).any():
        raise DataError(f"balanced accuracy: there is no image of class {int((there == 0).nonzero()[0])}")
    right = torch.bincount(y[output.argmax(1) == y], minlength=output.shape[1])
    return (right / there).mean() * len(y), torch.tensor(len(y))


auc.whole = balanced_accuracy.whole = True  # of a split, not of its batches
illness = Task("illness", cross_entropy, auc, whole=True)
"""Two classes of unequal size: cross-entropy, and the area under the ROC curve."""


def medmnist(
    name: str = "pneumoniamnist",
    root: str | Path | None = None,
    *,
    train_size: int = 0,
    test_size: int = 0,
) -> Data:
    """A two-dimensional set of MedMNIST (Yang et al. 2023), in its official split.

    Read is ``medical/<name>.npz`` in the data root: ``<part>_images`` ``(N, H, W[, 3])`` uint8 and ``<part>_labels``
    ``(N, 1)`` of ``train``, ``val`` and ``test``. Images come in a fixed shuffled order, normalized by each channel's
    mean and deviation over those of training. Several may be of one patient, whom these sets do not name. Two classes
    are scored as `illness`, more by accuracy.

    Raises:
        DataError: no such file, or one of another form; a size that is not there.

    >>> from lib.data import medmnist
    >>> medmnist("no_such_set")
    Traceback (most recent call last):
        ...
    lib.data.errors.DataError: no_such_set: .../medical/no_such_set.npz is missing; put MedMNIST's file there
    """
    path = data_root(root) / "medical" / f"{name}.npz"
    if not path.is_file():
        raise DataError(f"{name}: {path} is missing; put MedMNIST's file there")
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = [(file[f"{part}_images"], file[f"{part}_labels"]) for part in ("train", "val", "test")]
    except DAMAGED as error:
        raise DataError(f"{name}: {path} cannot be read as a set of MedMNIST ({error})") from None
    for x, y in parts:
        if x.dtype != np.uint8 or not (x.ndim == 3 or (x.ndim == 4 and x.shape[3] == 3)) or y.shape != (len(x), 1):
            raise DataError(f"{name}: {path} holds images {x.shape} {x.dtype} with labels {y.shape}")
    kept = []
    for (x, y), size, part in zip(parts, (train_size, 0, test_size), ("train", "val", "test"), strict=True):
        if not isinstance(size, int) or not 0 <= size <= len(x):
            raise DataError(f"{part}: {size!r} images of {len(x)} are asked for; 0: all")
        order = _shuffled(len(x))[: size or None]
        pixels = torch.from_numpy(x)
        kept.append((pixels.unsqueeze(1) if x.ndim == 3 else pixels.permute(0, 3, 1, 2), torch.from_numpy(y)[:, 0]))
        kept[-1] = tuple(tensor[order] for tensor in kept[-1])
    mean, std = _mean_and_std(kept[0][0], 255)
    classes = int(max(y.max() for _, y in kept)) + 1
    task = illness if classes == 2 else classification
    splits = [
        Split(((x.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last), y.long(), task)
        for x, y in kept
    ]
    return Data(name, *splits, classes)
