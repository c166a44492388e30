"""Sums that no single server sees: additive shares of fixed-point numbers, one for each of two servers.

This passes messages around inside one program, to count them and to see what arrives. It is no implementation to send
secrets with, and no proof of security: numpy's random numbers are not those of cryptography, nobody is authenticated,
and both servers together see everything.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.training import TrainingError


@dataclass(frozen=True)
class FixedPoint:
    """Numbers as whole ones modulo 2^32, small enough that the sum of those of all ``clients`` is exact.

    Attributes:
        clients: as many may be added. fraction_bits: behind the point.

    >>> import numpy as np, torch
    >>> from lib.recipes import FixedPoint
    >>> point = FixedPoint(clients=2)
    >>> point.decode(point.encode("fc", torch.tensor([-1.5])) + point.encode("fc", torch.tensor([0.25])))
    tensor([-1.2500], dtype=torch.float64)
    """

    clients: int
    fraction_bits: int = 16

    def __post_init__(self) -> None:
        if self.clients < 1 or not 0 <= self.fraction_bits <= 31:
            raise TrainingError(f"{self}: allowed are clients from 1 and 0 to 31 fraction bits")

    @property
    def largest(self) -> float:
        """What no number may exceed in size."""
        return (2**31 - 1) // self.clients / 2**self.fraction_bits

    def encode(self, name: str, values: Tensor) -> np.ndarray:
        """``values`` of any shape, rounded to ``2^-fraction_bits``, as flat uint32.

        Raises:
            TrainingError: a number does not fit; it names what holds it, its range and what fits.
        """
        values = values.detach().double().flatten()
        if len(values) and not float(values.abs().max()) <= self.largest:  # nor is it with a NaN
            low, high = values.min(), values.max()
            raise TrainingError(
                f"{name} is from {low:.4g} to {high:.4g}: {self.fraction_bits} fraction bits and a sum over "
                f"{self.clients} clients leave room for {self.largest:.4g}; fewer fraction bits, or smaller updates"
            )
        whole = torch.round(values * 2**self.fraction_bits).long()
        return (whole % 2**32).cpu().numpy().astype(np.uint32)

    def decode(self, total: np.ndarray) -> Tensor:
        """Flat float64 of a sum of encoded numbers."""
        return torch.from_numpy(total.astype(np.uint32).view(np.int32).astype(np.float64)) / 2**self.fraction_bits


def in_shares(words: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays that sum to ``words`` modulo 2^32, each alone uniform whatever the words are.

    >>> import numpy as np
    >>> from lib.recipes import in_shares
    >>> words = np.arange(5, dtype=np.uint32)
    >>> one, other = in_shares(words, np.random.default_rng(0))
    >>> (one + other).tolist(), bool((one == words).any())
    ([0, 1, 2, 3, 4], False)
    """
    one = random.integers(0, 2**32, words.shape, dtype=np.uint32)
    return one, words - one


class Server:
    """One of the two: what it has received, and the sum over those clients that both have heard of.

    >>> import numpy as np
    >>> from lib.recipes import Server
    >>> server = Server()
    >>> server.receive(3, np.array([2**32 - 1], np.uint32))
    >>> server.receive(5, np.array([3], np.uint32))
    >>> server.total([3, 5]).tolist()
    [2]
    """

    def __init__(self) -> None:
        self.received: dict[int, np.ndarray] = {}

    def receive(self, client: int, share: np.ndarray) -> None:
        """Keep a client's share."""
        self.received[client] = share

    def total(self, clients: Iterable[int]) -> np.ndarray:
        """The sum of these clients' shares modulo 2^32.

        Raises:
            TrainingError: shares of different lengths.
        """
        chosen = {client: self.received[client] for client in clients}
        if len({share.shape for share in chosen.values()}) > 1:
            told = ", ".join(f"{len(share)} of client {client}" for client, share in chosen.items())
            raise TrainingError(f"shares of different lengths: {told}")
        return np.sum([*chosen.values()], axis=0, dtype=np.uint32)
