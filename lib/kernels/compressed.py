"""Compressed sparse rows (CSR): what a matrix takes whose weights lie anywhere, by SciPy."""

from dataclasses import dataclass
from typing import Self

import scipy.sparse
import torch
from torch import Tensor, nn

from lib.constraint import Storage
from lib.constraint.formats import csr


@dataclass(frozen=True, eq=False)
class CompressedRows:
    """A matrix row by row: its weights, the column of each, and where every row begins.

    Attributes:
        matrix: SciPy's, ``(F, K)``, which multiplies on one thread.

    >>> from lib.kernels import CompressedRows
    >>> kept = CompressedRows.of(torch.tensor([[0.0, 2, 0, 1], [0, 0, 3, 0]]))
    >>> kept.matrix.indices.tolist(), kept.matrix.indptr.tolist(), kept.storage(bits=8)
    ([1, 3, 2], [0, 2, 3], Storage(data=24, index=12, table=0.0))
    """

    matrix: scipy.sparse.csr_matrix

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """From a matrix ``(F, K)`` with zeros."""
        return cls(scipy.sparse.csr_matrix(weight.detach().cpu().float().numpy()))

    def storage(self, bits: int) -> Storage:
        """Bits of weights and of their index."""
        return csr(torch.from_numpy(self.matrix.toarray() != 0), bits)


class CsrLinear(nn.Module):
    """A linear layer as compressed sparse rows: inference on a CPU, in float32.

    >>> from lib.kernels import CsrLinear
    >>> layer = torch.nn.Linear(8, 4)
    >>> x = torch.rand(5, 8)
    >>> torch.allclose(CsrLinear(layer)(x), layer(x), atol=1e-6)
    True
    """

    stands_for_layer = True

    format = "compressed sparse rows"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.kept = CompressedRows.of(layer.weight)
        self.bias = None if layer.bias is None else layer.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of ``(..., K)``, without a gradient."""
        matrix = self.kept.matrix
        out = torch.from_numpy((matrix @ x.detach().reshape(-1, x.shape[-1]).numpy().T).T)
        out = out if self.bias is None else out + self.bias
        return out.reshape(*x.shape[:-1], matrix.shape[0]).contiguous()
