"""Sums that no single server sees: additive shares of fixed-point numbers, one for each of two servers.

Beside it what the other way costs: Paillier's scheme, in which one server adds what it cannot read.

This passes messages around inside one program, to count them and to see what arrives. It is no implementation to send
secrets with, and no proof of security: numpy's random numbers are not those of cryptography, nobody is authenticated,
and both servers together see everything.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from time import thread_time

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


def paillier_sum(words: np.ndarray, bits: int, slots: int = 0) -> tuple[np.ndarray, dict[str, float]]:
    """Clients' words ``(clients, N)`` uint32, summed without being read, and what a ciphertext takes.

    Paillier's scheme (Eurocrypt 1999): the product of two ciphertexts, of twice the key's bits each, is one of the sum.

    Args:
        bits: of the key. slots: words in a plaintext, each with room for the sum of all clients; 0: as many as fit.

    Returns:
        The sums ``(N,)`` uint32, modulo 2^32; and seconds of this thread for a ciphertext: ``encrypt_s`` at a client,
        ``add_s`` of one more client at the server and ``decrypt_s`` of a sum where the key is; with ``slots``.

    Raises:
        TrainingError: the optional package phe is missing, or as many slots do not fit in the key.
    """
    try:
        from phe import paillier
    except ImportError:
        raise TrainingError("paillier_sum needs the package phe: pip install -e '.[private]'") from None
    wide = 32 + (len(words) - 1).bit_length()
    fit = (bits - 1) // wide
    slots = slots or fit
    if not 1 <= slots <= fit:
        raise TrainingError(f"paillier_sum: {slots=}: a key of {bits} bits has room for {fit} of {wide} bits each")
    public, secret = paillier.generate_paillier_keypair(n_length=bits)
    parts = range(0, words.shape[1], slots)
    packs = [[sum(int(w) << wide * i for i, w in enumerate(own[k : k + slots])) for k in parts] for own in words]
    begin = thread_time()
    hidden = [[public.raw_encrypt(pack) for pack in own] for own in packs]
    sent = thread_time()
    total = hidden[0]
    for own in hidden[1:]:
        total = [one * other % public.nsquare for one, other in zip(total, own, strict=True)]
    added = thread_time()
    opened = [secret.raw_decrypt(each) for each in total]
    end = thread_time()
    sums = [each >> wide * i & (1 << wide) - 1 for each in opened for i in range(slots)]
    seconds = {"encrypt_s": (sent - begin) / len(words), "add_s": (added - sent) / max(len(words) - 1, 1)}
    each = {key: value / len(parts) for key, value in (seconds | {"decrypt_s": end - added}).items()}
    return (np.array(sums[: words.shape[1]]) % 2**32).astype(np.uint32), each | {"slots": slots}
