"""Finished trials on disk, each as soon as it is done, for several processes and machines at once."""

import uuid
import warnings
from contextlib import suppress
from zlib import crc32

from lib.files import cache_folder, write_whole


class Journal:
    """Accuracies by devices and chip, of one network under one mapping on one split: files of lines in a folder.

    A line is ``devices,chip,accuracy,CRC-32 of the rest``. Whoever writes has a file of his own, to which whole lines
    are appended: nothing is locked, so that it may lie on a shared folder, and a process that is killed leaves at most
    the beginning of a line, which does not count. A file with other damage is set aside under the name of
    ``*.damaged``, aloud, and its good lines stay.

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
        self.folder = cache_folder("trials", key)
        self.path = self.folder / f"{uuid.uuid4().hex}.csv"

    def read(self) -> dict[tuple[str, int], float]:
        """All that is there, whoever wrote it."""
        found = {}
        for path in sorted(self.folder.glob("*.csv")):
            lines = path.read_bytes().split(b"\n")[:-1]  # what no line break ends is not finished
            good = [line for line in lines if _checked(line.rpartition(b",")[0]) == line]
            for devices, chip, accuracy, _ in (line.decode().rsplit(",", 3) for line in good):
                found[devices, int(chip)] = float(accuracy)
            if len(good) < len(lines):
                name, damaged = f"{self.folder.name}/{path.name}", len(lines) - len(good)
                warnings.warn(f"journal {name} is damaged: {damaged} of {len(lines)} lines do not count", stacklevel=2)
                with suppress(OSError):  # another process sets it aside, or nobody may write
                    write_whole(path.with_name(f"{uuid.uuid4().hex}.csv"), b"".join(line + b"\n" for line in good))
                    path.rename(path.with_suffix(".damaged"))
        return found

    def write(self, devices: str, chip: int, accuracy: float) -> None:
        """Add a trial.

        Raises:
            OSError: the disk is full, ...: one line with the path.
        """
        line = _checked(f"{devices},{int(chip)},{float(accuracy)!r}".encode()) + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                whole = file.write(line) == len(line)
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from None
        if not whole:
            raise OSError(f"cannot write {self.path}: no space left on device")


def _checked(text: bytes) -> bytes:
    return text + b",%08x" % crc32(text)
