"""What compressed weights save on a digital chip: bits that are not moved, and multiplications that are not made."""

from dataclasses import dataclass
from typing import Any

from lib.costs.digital.loops import Words
from lib.costs.energy import CostError, mac_pj
from lib.technology import table


@dataclass(frozen=True)
class Stored:
    """How a layer's weights are kept, and what the chip makes of it.

    Attributes:
        bits: that a weight of the dense layer takes in DRAM on average, index and tables included.
        skipped: the share of multiplications that the chip leaves out, with the accesses that they would take; 0 on
            a chip that has no path for the index, whatever the density.
        additions: that make a weight anew, where the array takes it in (SmartExchange: one for each column of its
            basis).
        index: accesses to a register that the path for the index takes for every product that is made.
        narrow: whether a weight is as narrow on the chip as in DRAM: in the network, in registers, and as an operand
            of the multiplier, whose energy then grows with the width (the rule by which E2-Train prices products).

    Raises:
        CostError: a number out of range.

    >>> from lib.costs.digital import Stored
    >>> Stored(bits=4, skipped=1.5)
    Traceback (most recent call last):
        ...
    lib.costs.energy.CostError: skipped = 1.5: allowed are numbers in [0, 1)
    """

    bits: float
    skipped: float = 0.0
    additions: float = 0.0
    index: float = 0.0
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.skipped < 1:
            raise CostError(f"skipped = {self.skipped}: allowed are numbers in [0, 1)")
        for name in ("bits", "additions", "index"):
            if not getattr(self, name) >= 0:
                raise CostError(f"{name} = {getattr(self, name)}: 0 or more is allowed")


def addition() -> float:
    """An addition of 16 bits in multiply-accumulates, by Horowitz's figures (ISSCC 2014) for products of 8 bits.

    >>> from lib.costs.digital import addition
    >>> round(addition(), 3)
    0.167
    """
    return table("digital")("int16_add", "energy_pJ") / mac_pj("int8")


def with_stored(words: Words, stored: Stored, word_bits: int = 16) -> dict[tuple[str, str], Any]:
    """Accesses of a dense layer (`accesses`) turned into those of a compressed one.

    Weights come from DRAM in the bits that they are stored in. Products that are skipped take no multiplication, no
    register and no weight from the network; inputs and sums move in the buffer as before, which is on the safe side.
    ``rebuild`` counts additions. Of a narrow weight the accesses and products are counted in words of ``word_bits``.

    >>> from lib.costs.digital import Stored, with_stored
    >>> dense = {("mac", "all"): 100, ("dram", "weights"): 10, ("dram", "inputs"): 5, ("network", "weights"): 20}
    >>> with_stored(dense, Stored(bits=4, skipped=0.5, additions=3))["rebuild", "weights"]
    30.0
    """
    left, width = 1 - stored.skipped, stored.bits / word_bits if stored.narrow else 1.0
    found = dict(words)
    for (level, data), count in words.items():
        if level == "dram" and data == "weights":
            found[level, data] = count * stored.bits / word_bits
        elif level in ("mac", "register") or (level, data) == ("network", "weights"):
            found[level, data] = count * left * (width if level == "mac" or data == "weights" else 1.0)
    if stored.index:
        found["register", "index"] = words["mac", "all"] * left * stored.index
    found["rebuild", "weights"] = words["network", "weights"] * left * stored.additions
    return found
