"""What kernels have in common: the inputs that they take, and one way for a vector, another for many."""

import numpy as np
import torch
from torch import Tensor, nn

from lib.kernels.errors import KernelError


def check_inputs(x: Tensor, fits: bool, shape: str) -> None:
    """Refuse inputs of another shape, or other than float32 numbers on a CPU.

    Raises:
        KernelError: with what came and what is allowed.
    """
    if not fits or x.dtype != torch.float32 or x.device.type != "cpu":
        raise KernelError(f"inputs {(*x.shape,)}, {x.dtype} on {x.device}: {shape} of float32 on a CPU is allowed")


def bias_of(layer: nn.Module) -> np.ndarray:
    """A copy of the bias ``(F,)``, zeros without one."""
    bias = np.zeros(len(layer.weight), np.float32)
    return bias if layer.bias is None else bias + layer.bias.detach().cpu().float().numpy()


class Product(nn.Module):
    """A linear layer whose matrix is ``kept`` in some format: inference on a CPU, in float32.

    `one` adds to outputs ``(F,)`` those of a vector ``(K,)``, `many` to ``(F, N)`` those of vectors ``(K, N)``.
    """

    stands_for_layer = True

    def __init__(self, layer: nn.Linear, kept) -> None:
        super().__init__()
        self.kept, self.bias = kept, bias_of(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of ``(..., K)``, without a gradient.

        Raises:
            KernelError: other inputs than float32 numbers of that shape on a CPU.
        """
        rows, columns = self.kept.shape
        check_inputs(x, x.shape[-1:] == (columns,), f"(..., {columns})")
        vectors = x.detach().numpy().reshape(-1, columns)
        if len(vectors) == 1:
            out = self.bias.copy()
            self.one(np.ascontiguousarray(vectors[0]), out)
        else:
            sums = np.repeat(self.bias[:, None], len(vectors), 1)
            self.many(np.ascontiguousarray(vectors.T), sums)
            out = np.ascontiguousarray(sums.T)
        return torch.from_numpy(out).reshape(*x.shape[:-1], rows)
