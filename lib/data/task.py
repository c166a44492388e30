"""What is learned from a data set: a loss to train by, and a score that tells how well it went."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from lib.data.errors import DataError

PADDING = -100
"""The label that counts for nothing, in `cross_entropy` and in `accuracy`: what fills sequences up to one length."""


def accuracy(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """How many labels are right, and of how many: ``output`` ``(N, classes, ...)``, ``y`` ``(N, ...)`` int64.

    Raises:
        DataError: labels of another shape, such as ``(N, 1)``, or outputs for one class alone.

    >>> from lib.data import accuracy
    >>> right, of = accuracy(torch.eye(3), torch.tensor([0, 2, -100]))  # one right, one wrong, one left out
    >>> int(right), int(of)
    (1, 2)
    """
    if output.ndim < 2 or output.shape[1] < 2 or output[:, 0].shape != y.shape:
        raise DataError(
            f"outputs {tuple(output.shape)} and labels {tuple(y.shape)}: expected (N, classes, ...) of 2 classes or "
            "more, and (N, ...)"
        )
    return (output.argmax(1) == y).sum(), (y != PADDING).sum()


@dataclass(frozen=True)
class Task:
    """A loss and a score, both of a model's output and the labels of a batch; functions of a module, to be pickled.

    Attributes:
        name: what the task is called in text.
        loss: gives the mean over the batch, ``()``, which a gradient goes through.
        score: gives a sum over the batch and the number of its terms, both ``()``. The score of a split is all sums
            over all numbers, so that no size of batches changes it; more is better.
        whole: the score is no mean over examples (an area under a curve, a correlation), or takes long: it is asked
            once, of the outputs of a whole split.

    >>> from torch.nn.functional import mse_loss
    >>> from lib.data import Split, Task
    >>> def near(output, y):  # the share of points within a tenth
    ...     hit = (output - y).norm(dim=-1) < 0.1
    ...     return hit.sum(), torch.tensor(hit.numel())
    >>> keypoints = Task("keypoints", mse_loss, near)
    >>> faces = Split(torch.zeros(2, 1, 96, 96), torch.zeros(2, 15, 2), keypoints)  # 15 points in each of two images
    >>> near(torch.ones(2, 15, 2), faces.y)
    (tensor(0), tensor(30))
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    whole: bool = False


classification = Task("classification", cross_entropy, accuracy)
"""Cross-entropy and accuracy: one label for an example, or one for each of its parts (``y`` ``(N, T)``)."""
