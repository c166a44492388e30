"""Codebooks: a layer's weights, or pieces of it, share a few values found by k-means (Deep k-Means, ICML 2018)."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from scipy.cluster.vq import kmeans2, vq
from torch import Tensor

from lib.constraint import Constraint, ConstraintError, Storage, check_count
from lib.constraint.views import gemm, kernel_area

Sample = Literal["weight", "row", "kernel", "filter"]
CENTROID_BITS = 32
"""What a number of the codebook takes in its table."""


@dataclass(frozen=True)
class Codebook(Constraint):
    """At most ``k`` distinct samples in a layer: single weights, rows of kernels (Deep k-Means), kernels or filters.

    Without ``centroids`` every projection runs k-means (k-means++ and Lloyd's turns, `scipy.cluster.vq.kmeans2`), a
    heuristic for a hard problem; `fit` freezes the centroids of the weights as they are, to which the nearest centroid
    is the exact projection. A sample of zeros is off the support and stays; it is one more entry.

    Attributes:
        k: entries. sample: what shares them. seed: of k-means++. centroids: ``(k, length)`` as tuples; chosen by `fit`.

    Raises:
        ConstraintError: fewer entries than one, an unknown sample, or rows or kernels of a linear layer.

    >>> from lib.sharing import Codebook
    >>> codebook, weight = Codebook(k=2), torch.tensor([1.0, 9.0, 0.0, 2.0, 10.0])
    >>> codebook.project(weight).tolist()  # zero stays
    [1.5, 9.5, 0.0, 1.5, 9.5]
    >>> frozen = codebook.fit({"fc": weight})["fc"]
    >>> frozen.project(torch.tensor([5.0, 6.0])).tolist()
    [1.5, 9.5]
    """

    k: int
    sample: Sample = "weight"
    seed: int = 0
    centroids: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        check_count(k=self.k)
        if self.sample not in get_args(Sample):
            raise ConstraintError(f"sample = {self.sample!r}: allowed are {', '.join(get_args(Sample))}")

    @property
    def exact(self) -> bool:
        """With given centroids."""
        return self.centroids is not None

    @property
    def cone(self) -> bool:
        """A free codebook scales with the weights."""
        return self.centroids is None

    def samples(self, weight: Tensor) -> Tensor:
        """``(samples, length)``, in the order of the weights."""
        if self.sample == "weight":
            return weight.reshape(-1, 1)  # (F*C*Kh*Kw, 1)
        if self.sample == "filter":
            return gemm(weight)
        if weight.dim() < 3:
            raise ConstraintError(f"sample = {self.sample!r} is of kernels; a layer {tuple(weight.shape)} has none")
        length = kernel_area(weight) if self.sample == "kernel" else weight.shape[-1]
        return weight.reshape(-1, length)  # (F*C, Kh*Kw) or (F*C*Kh, Kw)

    def fit(self, weights: Mapping[str, Tensor]) -> dict[str, "Codebook"]:
        """For each layer its own centroids.

        Raises:
            ConstraintError: a layer has no weight left, so that there is nothing to find them of.
        """
        if empty := [n for n, w in weights.items() if self.centroids is None and not w.any()]:
            raise ConstraintError(f"{empty[0]} has no weight that is not zero: no centroids to find")
        return {n: replace(self, centroids=tuple(map(tuple, self._centroids(w).tolist()))) for n, w in weights.items()}

    def _centroids(self, weight: Tensor) -> np.ndarray:
        if self.centroids is not None:
            return np.asarray(self.centroids)
        samples = self.samples(weight.detach())
        x = samples[samples.any(1)].double().cpu().numpy()
        distinct = np.unique(x, axis=0)
        if len(distinct) <= self.k:
            return distinct
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an entry that loses all its samples stays where it is
            return kmeans2(x, self.k, iter=50, minit="++", rng=np.random.default_rng(self.seed))[0]

    def project(self, weight: Tensor) -> Tensor:
        """Every sample at the nearest centroid; samples of zeros stay."""
        samples, centroids = self.samples(weight), self._centroids(weight)
        if not len(centroids):
            return torch.zeros_like(weight)
        nearest = vq(samples.detach().double().cpu().numpy(), centroids)[0]
        z = torch.as_tensor(centroids[nearest], dtype=weight.dtype, device=weight.device)
        return torch.where(samples.any(1, keepdim=True), z, 0.0).reshape(weight.shape)  # from (samples, length)

    def entries(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct samples ``(entries, length)`` and which one each sample is."""
        samples = self.samples(z)
        if samples.shape[1] > 1:
            return samples.unique(dim=0, return_inverse=True)
        values, which = samples[:, 0].unique(return_inverse=True)  # far quicker than whole rows
        return values[:, None], which

    def member(self, weight: Tensor, tolerance: float = 0.0) -> bool:
        """Whether there are at most ``k`` distinct samples, or with given centroids only these."""
        if self.centroids is not None:
            return super().member(weight, tolerance)
        return int(self.entries(weight)[0].any(1).sum()) <= self.k

    def tangent(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Every entry moves by the mean gradient of its samples."""
        entries, which = self.entries(z)
        g = self.samples(gradient)
        mean = torch.zeros_like(entries).index_add_(0, which, g) / which.bincount(minlength=len(entries))[:, None]
        return torch.where(entries.any(1, keepdim=True), mean, 0.0)[which].reshape(z.shape)  # from (samples, length)

    def storage_bits(self, z: Tensor, bits: int) -> Storage:
        """Entry numbers at their entropy, and the entries in 32 bits a number; ``bits`` is not used.

        The released account of Deep k-Means: an entropy code needs a little more.
        """
        entries, which = self.entries(z)
        counts = which.bincount(minlength=len(entries))
        share = counts.double() / counts.sum()
        entropy = float(-(share * share.log2()).sum())
        return Storage(int(counts.sum()) * entropy, table=int(entries.any(1).sum()) * entries.shape[1] * CENTROID_BITS)
