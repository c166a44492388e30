"""Plans over a model's layers, pruning schedules, and how alike two sets of large weights are."""

from collections.abc import Mapping

from torch import Tensor, nn

from lib.constraint import Constraint, ConstraintError, Plan
from lib.constraint.selection import keep_largest, kept
from lib.shapes import all_layers, prunable


def uniform_plan(model: nn.Module, constraint: Constraint, keep_dense: tuple[str, ...] = ()) -> Plan:
    """The same constraint on every layer but those named in ``keep_dense``; other weights are left out aloud.

    Raises:
        ConstraintError: ``keep_dense`` names a layer that the model lacks, or leaves nothing to prune.

    >>> from lib import models, pruning
    >>> model = models.build("lenet5", (1, 28, 28), 10)
    >>> list(pruning.uniform_plan(model, pruning.Unstructured(0.9), keep_dense=("conv1",)))
    ['conv2', 'fc1', 'fc2']
    """
    layers = all_layers(model, "uniform plan", skip=True)
    if unknown := [n for n in keep_dense if n not in layers]:
        raise ConstraintError(f"keep_dense names {unknown[0]!r}; the model has {', '.join(layers)}")
    plan = {name: constraint for name in layers if name not in keep_dense}
    if not plan:
        raise ConstraintError("keep_dense leaves no layer to prune")
    return plan


def correlation(theta: Mapping[str, Tensor], other: Mapping[str, Tensor], p: float) -> float:
    """The correlation indicator ``R_p`` of two sets of layer weights (N. Liu et al., ICML 2021).

    ``R_p = sum_l |T_p(theta_l) & T_p(theta'_l)| / (p * sum_l N_l)``, with ``T_p`` the top ``p`` fraction of layer
    ``l`` by magnitude. Independent weights give about ``p``; 1 means the same large weights in every layer.

    Args:
        theta: ``{layer name: weight}``; ``other`` holds the same names and shapes (more names do no harm).
        p: fraction of each layer, of all its weights. For a sparse network it must not exceed the density: weights
            that are exactly zero have no rank.

    Raises:
        ValueError: ``p`` outside (0, 1], or more weights asked for than are nonzero.

    >>> from lib.pruning import correlation
    >>> theta, other = {"fc": torch.tensor([4.0, -3.0, 2.0, 1.0])}, {"fc": torch.tensor([5.0, 1.0, -3.0, 2.0])}
    >>> correlation(theta, other, p=0.5)  # of the largest two, one is the same
    0.5
    """
    if not 0 < p <= 1:
        raise ValueError(f"p = {p}: allowed are numbers in (0, 1]")
    shared = total = 0
    for name, weight in theta.items():
        k = kept(1 - p, weight.numel())
        for w in (weight, other[name]):
            if int(w.count_nonzero()) < k:
                raise ValueError(
                    f"p = {p} asks for {k} weights of {name!r}, which has {int(w.count_nonzero())} nonzero"
                )
        shared += int((keep_largest(weight.abs(), k) & keep_largest(other[name].abs(), k)).sum())
        total += k
    return shared / total


def first_conv(model: nn.Module) -> tuple[str, ...]:
    """The name of the first convolution, which most papers leave dense; empty for a network without one.

    >>> from lib import models, pruning
    >>> [pruning.first_conv(models.build(name, (1, 28, 28), 10)) for name in ("lenet5", "lenet300")]
    [('conv1',), ()]
    """
    return tuple(n for n, m in prunable(model).items() if isinstance(m, nn.Conv1d | nn.Conv2d))[:1]


def rounds(target: list[float], fraction: float) -> list[float]:
    """Sparsities of iterative pruning by ``fraction`` of the remaining weights a round, stopping at every target.

    Raises:
        ConstraintError: a fraction outside (0, 1), or a target outside [0, 1).

    >>> from lib.pruning import rounds
    >>> rounds([0.5, 0.8], 0.3)
    [0.3, 0.5, 0.65, 0.755, 0.8]
    """
    if not 0 < fraction < 1 or not all(0 <= goal < 1 for goal in target):
        raise ConstraintError(f"rounds: {target=}, {fraction=}: allowed are sparsities in [0, 1), a fraction in (0, 1)")
    path, density = [], 1.0
    for goal in sorted(target):
        while density * (1 - fraction) > (1 - goal) * (1 + 1e-6):
            density *= 1 - fraction
            path.append(round(1 - density, 6))
        density = 1 - goal
        path.append(goal)
    return path


def cubic(target: float, prunings: int) -> list[float]:
    """Sparsities of gradual pruning: many weights go at first, when most are redundant, and few at the end.

    ``s_i = s (1 - (1 - i / n)^3)`` for i from 1 to n (Zhu and Gupta, arXiv 1710.01878, 2017, from dense).

    >>> from lib.pruning import cubic
    >>> [round(s, 4) for s in cubic(0.8, prunings=4)]
    [0.4625, 0.7, 0.7875, 0.8]
    """
    return [target * (1 - (1 - (i + 1) / prunings) ** 3) for i in range(prunings)]
