"""What a device does to the cells that a mapping writes; `lib.faults` has the devices."""

from math import inf
from typing import ClassVar

from torch import Tensor

from lib.crossbar.mapping import CrossbarError, Mapping


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

    draws: ClassVar[tuple[str, ...]] = ()
    """Kinds of random numbers of a chip that it takes, where others may take the same, see `disturbed`."""

    lasting: ClassVar[bool] = True
    """Whether cells stay as they are until the next write, so that weights can be read back once for all inputs."""

    def disturb(self, cells: Tensor, mapping: Mapping, chip: int, layer: str) -> Tensor:
        """New conductances in shares of G_max, ``(slices, columns, F, ...)`` as ``cells``, which it may overwrite."""
        raise NotImplementedError


Devices = Device | tuple[Device, ...]
"""What happens to the cells, in this order."""


def each(devices: Devices, lasting: bool = False) -> tuple[Device, ...]:
    """One device or several, one by one.

    Args:
        lasting: others are refused.

    Raises:
        CrossbarError: something that is no device, a dataclass that is not frozen or holds a list, or a device that is
            new at every read where it cannot be drawn.
    """
    found = tuple(devices) if isinstance(devices, tuple | list) else (devices,)
    for device in found:
        if not isinstance(device, Device):
            raise CrossbarError(f"{device!r} is no device: allowed are those of lib.faults, one or a tuple of them")
        try:
            hash(device)
        except TypeError:
            wants = "write @dataclass(frozen=True), and its fields without lists, dicts or arrays"
            raise CrossbarError(f"{device!r} cannot be told from its equals: {wants}") from None
        if lasting and not device.lasting:
            raise CrossbarError(f"{device!r} is new at every read: only the trials of lib.faults.sweep draw it")
    return found


def disturbed(cells: Tensor, devices: Devices, mapping: Mapping, chip: int, layer: str) -> Tensor:
    """The cells after a device, or after several in turn, which are independent even where they draw the same kind.

    The first to draw a kind of random numbers draws those that it draws alone; the next ones have others.

    Raises:
        CrossbarError: as `each`; a device that gives back cells of another shape, or what is no conductance.
    """
    met: dict[str, int] = {}
    for device in each(devices):
        before = max((met.get(kind, 0) for kind in device.draws), default=0)
        met |= dict.fromkeys(device.draws, before + 1)
        shape, cells = cells.shape, device.disturb(cells, mapping, chip, of_its_own(layer, before))
        if not isinstance(cells, Tensor):
            raise CrossbarError(f"{device!r} makes a {type(cells).__name__} of cells, {layer}: expected a tensor")
        if cells.shape != shape:
            raise CrossbarError(f"{device!r} makes cells {tuple(cells.shape)} of {tuple(shape)}, {layer}")
        if cells.numel() and not (0 <= (ends := [float(end) for end in cells.detach().aminmax()])[0] <= ends[1] < inf):
            raise CrossbarError(f"{device!r} makes conductances from {ends[0]:g} to {ends[1]:g}, {layer}")
    return cells


def of_its_own(layer: str, before: int) -> str:
    """The name by which a device draws a layer's random numbers, behind so many others that draw the same kind."""
    return f"{layer}, {before}" if before else layer
