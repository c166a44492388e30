"""Shifted and mirrored images, so that a network sees other pixels of the same pictures in every epoch."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lib.training.loop import Hook, TrainingError

APART = 500_000
"""From the seeds that `lib.training.batches` orders images by. The CPU's generator takes the low 32 bits of a seed."""


def crop_and_flip(x: Tensor, border: int, random: torch.Generator) -> Tensor:
    """Every image ``(N, C, H, W)`` in a frame of ``border`` zeros, cut out anywhere, and mirrored or not.

    Random numbers are drawn on the CPU, so that they are the same on every device. The result is in ``channels_last``.

    Raises:
        TrainingError: no images.

    >>> from lib.training import crop_and_flip
    >>> x = torch.arange(1.0, 5.0).reshape(1, 1, 2, 2)
    >>> crop_and_flip(x, 0, torch.Generator().manual_seed(1)).tolist()  # mirrored
    [[[[2.0, 1.0], [4.0, 3.0]]]]
    """
    if x.ndim != 4:
        raise TrainingError(f"crop_and_flip: x is {tuple(x.shape)}; images are (N, C, H, W)")
    n, _, h, w = x.shape
    top, left = torch.randint(0, 2 * border + 1, (2, n, 1), generator=random)
    rows, columns = top + torch.arange(h), left + torch.arange(w)  # (N, H), (N, W)
    columns = torch.where(torch.rand(n, 1, generator=random) < 0.5, columns.flip(1), columns)
    image, rows, columns = (
        i.to(x.device) for i in (torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None])
    )
    return pad(x, [border] * 4)[image, :, rows, columns].permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


class _Moved:
    """A forward pre-hook: the same shifts at every pass of one step."""

    def __init__(self, border: int, seed: int) -> None:
        self.border, self.seed = border, seed

    def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not model.training:
            return None
        random = torch.Generator().manual_seed(self.seed)
        return (crop_and_flip(inputs[0], self.border, random), *inputs[1:])


@dataclass(frozen=True)
class CropAndFlip(Hook):
    """A hook of `fit` and of every recipe: each training batch is shifted by up to ``border`` pixels, and mirrored.

    As for CIFAR (He et al. 2016, section 4.2). What a batch looks like follows from ``seed`` and the step alone, so
    paired arms see the same. The frame is zero in what the network is given: black in bytes, the mean in normalized
    pixels. An objective that asks other networks (a teacher) shows them the images as they are.

    >>> from lib import data, models, training
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> logs = []
    >>> for seed in (0, 0, 1):
    ...     net, moved = models.build("lenet300", images.shape, images.classes), training.CropAndFlip(2, seed)
    ...     logs.append(training.fit(net, images, epochs=1, lr=0.05, hooks=(moved,)))
    >>> logs[0].equals(logs[1]), logs[0].equals(logs[2])
    (True, False)
    """

    border: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.border < 0:
            raise TrainingError(f"border = {self.border}: allowed are whole numbers of pixels from 0")

    def before_step(self, model: nn.Module, step: int) -> None:
        """Stand before the network for one step."""
        model.register_forward_pre_hook(_Moved(self.border, 1_000_003 * self.seed + step + APART))

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Step aside: who looks at the network between steps sees images as they are."""
        self.end(model)

    def end(self, model: nn.Module) -> None:
        """Step aside, also when training broke off."""
        for key, hook in [*model._forward_pre_hooks.items()]:
            if isinstance(hook, _Moved):
                del model._forward_pre_hooks[key]
