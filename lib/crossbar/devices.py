"""What a device does to the cells that a mapping writes; `lib.faults` has the devices."""

from torch import Tensor

from lib.crossbar.mapping import Mapping


class Device:
    """One way in which cells differ from what was written into them.

    >>> from lib.crossbar import Mapping
    >>> from lib.faults import Device, read_back
    >>> class Aged(Device):
    ...     def disturb(self, cells, mapping, chip, layer):
    ...         return cells * 0.5
    >>> read_back(torch.tensor([1.0, -0.5]), Mapping("two_column"), Aged(), chip=0, layer="fc1").tolist()
    [0.5, -0.25]
    >>> read_back(torch.tensor([1.0, -0.5]), Mapping("offset"), Aged(), chip=0, layer="fc1").tolist()
    [0.0, -0.75]
    """

    def disturb(self, cells: Tensor, mapping: Mapping, chip: int, layer: str) -> Tensor:
        """New conductances in shares of G_max, ``(slices, columns, F, ...)`` as ``cells``, which it may overwrite."""
        raise NotImplementedError
