"""Tensors with what is learned from them, told apart by what they hold."""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lib.data.errors import DataError
from lib.data.task import PADDING, Task, classification


@dataclass(frozen=True)
class Split:
    """Examples ``x`` ``(N, ...)``, what is to be said of them ``y`` ``(N, ...)``, and the task.

    Images are ``(N, C, H, W)`` float32, normalized per channel, in ``channels_last`` order, and labels ``(N,)`` int64;
    other tasks may have anything else. ``replace(split, x=..., y=...)`` keeps the task.

    Raises:
        DataError: not as many ``y`` as ``x``, or a ``task`` that is none.

    >>> from lib.data import Split
    >>> few = Split(torch.zeros(3, 1, 28, 28), torch.tensor([0, 1, 1]))
    >>> len(few), few.task.name, few.checksum == Split(few.x.clone(), few.y).checksum
    (3, 'classification', True)
    """

    x: Tensor
    y: Tensor
    task: Task = classification

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(f"a split of {len(self.x)} x and {len(self.y)} y: they come in pairs")
        if not isinstance(self.task, Task):
            raise DataError(f"task = {self.task!r}: allowed is a Task, such as lib.data.classification")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def checksum(self) -> str:
        """Of the values, types and shapes of ``x`` and ``y``: the same on every device and in every order of memory."""
        return _together(_digest(self.x), _digest(self.y))

    def to(self, device: torch.device | str) -> "Split":
        """The same split on another device; images in ``channels_last`` order."""
        order = torch.channels_last if self.x.ndim == 4 else torch.preserve_format
        return replace(self, x=self.x.to(device, memory_format=order), y=self.y.to(device))


@dataclass(frozen=True)
class Data:
    """A data set: its three splits, which share a task, and the number of classes (of a model's outputs, where no class
    is learned).

    Raises:
        DataError: the splits have different tasks, or labels of classes that are none of 0 to ``classes - 1``.

    >>> from lib.data import Data, Split
    >>> corners = Split(torch.eye(4).reshape(4, 1, 2, 2), torch.arange(4))
    >>> Data("corners", corners, corners, corners, classes=4).shape
    (1, 2, 2)
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int

    def __post_init__(self) -> None:
        tasks = {s.task: s.task.name for s in (self.train, self.validation, self.test)}
        if len(tasks) > 1:
            raise DataError(f"data {self.name!r}: its splits have different tasks, {', '.join(tasks.values())}")
        if self.task == classification:
            for part in ("train", "validation", "test"):
                _check_labels(f"data {self.name!r}, {part}", getattr(self, part).y, self.classes)

    @property
    def task(self) -> Task:
        """What is learned: the task of every split."""
        return self.train.task

    @property
    def checksum(self) -> str:
        """Of the three splits (see `Split.checksum`): what the data are told apart by, beside the task."""
        return _together(self.train.checksum, self.validation.checksum, self.test.checksum)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example: ``(C, H, W)`` of an image."""
        return tuple(self.train.x.shape[1:])

    def to(self, device: torch.device | str) -> "Data":
        """The same data on another device."""
        return replace(self, **{part: getattr(self, part).to(device) for part in ("train", "validation", "test")})


def _check_labels(what: str, y: Tensor, classes: int) -> None:
    if y.dtype != torch.int64:
        raise DataError(f"{what}: labels are {y.dtype}: expected int64, the numbers of classes")
    told = y[y != PADDING]
    if len(told) and not 0 <= int(told.min()) <= int(told.max()) < classes:
        raise DataError(
            f"{what}: labels from {int(told.min())} to {int(told.max())}: expected 0 to {classes - 1}, the numbers of "
            "classes, as torch.unique(y, return_inverse=True) gives them"
        )


_digests = WeakTensorKeyDictionary()
"""Of tensors that are alive: a glance at each, and its digest then."""


def _digest(tensor: Tensor) -> str:
    """Of a tensor's values in the order of its indices; computed once, and again when a glance shows a change."""
    glance, known = _glance(tensor), _digests.get(tensor)
    if known is None or known[0] != glance:
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        known = glance, _together(str(tensor.dtype), str(tuple(tensor.shape)), values)
        _digests[tensor] = known
    return known[1]


def _glance(tensor: Tensor) -> tuple[int, int, str]:
    """Torch's own count of edits, and for edits through NumPy or ``.data`` a sum of bits and some of the rows.

    A row counts by a power of its odd place, so that rows that change places are seen, as label noise is. A digest
    takes ten times as long. What NumPy moves about inside of a few rows goes unseen.
    """
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    bits = torch.atleast_1d(real).view(_WHOLE[real.element_size()])
    sums = bits[..., None].sum([*range(1, bits.ndim + 1)], dtype=torch.int64)  # (N,); flattened it would be a copy
    places = (2 * torch.arange(len(bits), device=bits.device) + 1) ** 3
    rows = bits[:: max(1, len(bits) // 16)].cpu().contiguous().numpy()
    edits = 0 if tensor.is_inference() else tensor._version
    return edits, int((sums * places).sum()), _together(rows)


_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _together(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\n" if isinstance(part, str) else part)
    return digest.hexdigest()[:16]
