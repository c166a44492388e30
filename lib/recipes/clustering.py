"""Training weights toward few clusters."""

from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lib.constraint import Plan, harden, weights
from lib.data import Data
from lib.models import copied
from lib.recipes.common import Pulling
from lib.sharing import Codebook
from lib.training import Hook, TrainingError, evaluate, fit


class _Spectral(Pulling):
    """The pull of relaxed k-means: ``strength * (S - F F^T S)``, where ``F`` are the samples' first singular vectors.

    Samples are the rows of ``S (N, d)``. The term is half of ``strength * (|S|^2 - |F^T S|^2)``.
    """

    def __init__(self, model: nn.Module, plan: Plan, data: Data, strength: float, interval: int) -> None:
        super().__init__(model, plan)
        self.data, self.strength, self.interval = data, strength, interval
        self.rows: list[dict[str, float]] = []
        self.refresh()

    def samples(self, name: str, tensor: Tensor) -> Tensor:
        return self.plan[name].samples(tensor)

    @torch.no_grad()
    def refresh(self) -> None:
        self.vectors = {}
        for name, w in self.parameters.items():
            s = self.samples(name, w)
            self.vectors[name] = torch.linalg.svd(s, full_matrices=False).U[:, : self.plan[name].k]

    def outside(self, name: str) -> Tensor:
        """What of the samples lies outside the span that ``F`` had when it was refreshed."""
        s, f = self.samples(name, self.parameters[name]), self.vectors[name]
        return s - f @ (f.T @ s)

    def pull(self, name: str, parameter: nn.Parameter) -> None:
        parameter.grad.add_(self.outside(name).reshape(parameter.shape), alpha=self.strength)

    @torch.no_grad()
    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        row = {"epoch": epoch + 1, "accuracy": evaluate(model, self.data.validation)}
        row |= {f"term/{n}": self._term(n) for n in self.plan}
        if (epoch + 1) % self.interval == 0:
            self.refresh()
        row |= {f"fresh/{n}": self._term(n) for n in self.plan}
        hardened = harden(copied(model), self.plan)
        row["hardened_accuracy"] = evaluate(hardened, self.data.validation)
        for name, z in weights(hardened, self.plan).items():
            w = self.parameters[name]
            row[f"distance/{name}"] = float((w - z).norm() / w.norm().clamp(min=1e-30))
        self.rows.append(row)

    @torch.no_grad()
    def _term(self, name: str) -> float:
        """In shares of the samples' energy, without the strength."""
        return float(self.outside(name).square().sum() / self.parameters[name].square().sum().clamp(min=1e-30))


def deep_kmeans(
    model: nn.Module,
    plan: Plan,
    data: Data,
    *,
    epochs: int,
    strength: float,
    interval: int = 1,
    hooks: tuple[Hook, ...] = (),
    **fit_options: Any,
) -> pd.DataFrame:
    """Retrain toward codebooks by the spectral relaxation of k-means, in place (Wu et al., ICML 2018; 15b).

    The loss gets ``strength / 2 * (|S|^2 - |F^T S|^2)``: the energy of the samples outside the span of their first
    ``k`` singular vectors, which no codebook of ``k`` entries can hold. ``F`` is found anew every ``interval`` epochs.
    Samples of no more numbers than there are entries (``d <= k``) are always inside: the term is then zero after each
    refresh, and acts only as ``F`` gets stale. Hardening is up to the caller.

    Returns:
        One row an epoch: validation ``accuracy``, ``hardened_accuracy`` after k-means, and for each layer ``term/`` and
        ``fresh/`` (the energy outside, in shares, before and after ``F`` was found anew) and ``distance/`` to the set.

    Raises:
        TrainingError: a set that is no `Codebook`, epochs or interval below 1, or a negative strength.

    >>> from lib import data, models, recipes
    >>> from lib.sharing import Codebook
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> model = models.build("lenet5", images.shape, images.classes)
    >>> log = recipes.deep_kmeans(model, {"conv2": Codebook(4, "row")}, images, epochs=2, lr=0.05, strength=0.1)
    >>> bool(log["fresh/conv2"].iloc[-1] < log["fresh/conv2"].iloc[0])  # less energy outside the span of 4 samples
    True
    """
    if epochs < 1 or interval < 1 or strength < 0:
        raise TrainingError(
            f"deep_kmeans: {epochs=}, {interval=}, {strength=}: allowed are 1 or more, and a strength >= 0"
        )
    for name, c in plan.items():
        if not isinstance(c, Codebook):
            raise TrainingError(f"{name}: {type(c).__name__} has no samples to cluster; deep_kmeans is for Codebook")
    spectral = _Spectral(model, plan, data, strength, interval)
    fit(model, data, epochs=epochs, hooks=(*hooks, spectral), **fit_options)
    return pd.DataFrame(spectral.rows)
