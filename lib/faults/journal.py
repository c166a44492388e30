"""Finished trials on disk, each as soon as it is done, for several processes and machines at once."""

from lib import files


class Journal(files.Journal):
    """Accuracies by devices and chip, of one network under one mapping on one split: ``devices,chip,accuracy``.

    Args:
        key: of all that the accuracies depend on besides devices and chip.

    Raises:
        OSError: the cache cannot be written.

    >>> from lib.faults.journal import Journal
    >>> Journal("of my network").write("stuck at 1 %", chip=7, accuracy=0.85)
    >>> Journal("of my network").read()
    {('stuck at 1 %', 7): 0.85}
    """

    def __init__(self, key: str) -> None:
        super().__init__("trials", key)

    def read(self) -> dict[tuple[str, int], float]:
        """All that is there, whoever wrote it."""
        trials = (line.rsplit(",", 2) for line in super().read())
        return {(devices, int(chip)): float(accuracy) for devices, chip, accuracy in trials}

    def write(self, devices: str, chip: int, accuracy: float) -> None:
        """Add a trial.

        Raises:
            OSError: the disk is full, ...: one line with the path.
        """
        super().write(f"{devices},{int(chip)},{float(accuracy)!r}")
