"""Files that are either whole or absent."""

import os
import tempfile
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

CACHE_ROOT = Path(__file__).resolve().parent.parent / ".cache"


def cache_folder(*parts: str) -> Path:
    """A folder of the cache, made when missing: in the environment's ``CACHE_ROOT``, else in ``.cache`` of the project.

    ``~`` is the user's home, and a path that is not absolute begins at the project, wherever a notebook runs.

    Raises:
        OSError: it cannot be made; one line with the path.

    >>> from lib.files import cache_folder
    >>> cache_folder("trials").name
    'trials'
    """
    given = os.environ.get("CACHE_ROOT") or str(CACHE_ROOT)
    folder = CACHE_ROOT.parent.joinpath(os.path.expanduser(given), *parts)
    if given.startswith("~") and not os.path.isabs(os.path.expanduser(given)):
        raise OSError(f"cannot write the cache CACHE_ROOT={given}: there is no such user")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot write the cache {folder}: {error.strerror}") from None
    return folder


def write_whole(path: Path, content: str | bytes | Callable[[BinaryIO], None]) -> None:
    """Write ``path`` under a temporary name beside it and rename it: a reader never sees half a file.

    Args:
        path: its folder is made when missing.
        content: text (UTF-8), bytes, or a function that writes to the binary file it is given.

    Raises:
        OSError: the folder is read-only, the disk is full, ...: one line with the path; nothing is left behind.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from lib.files import write_whole
    >>> path = Path((folder := TemporaryDirectory()).name, "made", "claims.csv")
    >>> write_whole(path, "study,claim")
    >>> path.read_text(), [file.name for file in path.parent.iterdir()]
    ('study,claim', ['claims.csv'])
    """
    if isinstance(content, str):
        content = content.encode()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


class Journal:
    """Lines of text in a folder of the cache, each kept as soon as it is written, by several processes at once.

    Each line ends with a CRC-32 of the rest. Whoever writes has a file of his own, to which whole lines are appended:
    nothing is locked, so that it may lie on a shared folder, and a process that is killed leaves at most the beginning
    of a line, which does not count. A file with other damage is set aside under the name of ``*.damaged``, aloud, and
    its good lines stay.

    Raises:
        OSError: the cache cannot be written.

    >>> from lib.files import Journal
    >>> Journal("trials", "of a net").write("stuck at 1 %")
    >>> (reader := Journal("trials", "of a net")).read(), reader.news()
    (['stuck at 1 %'], [])
    """

    def __init__(self, *parts: str) -> None:
        self.folder = cache_folder(*parts)
        self.path = self.folder / f"{uuid.uuid4().hex}.csv"
        self.seen: dict[Path, int] = {}

    def read(self) -> list[str]:
        """All that is there, whoever wrote it."""
        self.seen.clear()
        return self.news()

    def news(self) -> list[str]:
        """What was written since this object was asked last."""
        found = []
        for path in sorted(self.folder.glob("*.csv")):
            with path.open("rb") as file:
                file.seek(start := self.seen.get(path, 0))
                raw = file.read()
            lines = raw.split(b"\n")[:-1]  # what no line break ends is not finished
            self.seen[path] = start + sum(len(line) + 1 for line in lines)
            good = [line for line in lines if _checked(line.rpartition(b",")[0]) == line]
            found += [line.rpartition(b",")[0].decode() for line in good]
            if len(good) < len(lines):
                self._set_aside(path, len(lines) - len(good), len(lines))
        return found

    def _set_aside(self, path: Path, damaged: int, lines: int) -> None:
        name = f"{self.folder.name}/{path.name}"
        warnings.warn(f"journal {name} is damaged: {damaged} of {lines} lines do not count", stacklevel=4)
        with suppress(OSError):  # another process sets it aside, or nobody may write
            whole = path.read_bytes().split(b"\n")[:-1]
            good = [line for line in whole if _checked(line.rpartition(b",")[0]) == line]
            write_whole(kept := path.with_name(f"{uuid.uuid4().hex}.csv"), b"".join(line + b"\n" for line in good))
            path.rename(path.with_suffix(".damaged"))
            self.seen[kept] = kept.stat().st_size
            self.seen.pop(path, None)  # whoever wrote it begins anew

    def write(self, line: str) -> None:
        """Add a line.

        Raises:
            OSError: the disk is full, ...: one line with the path.
        """
        checked = _checked(line.encode()) + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                whole = file.write(checked) == len(checked)
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from None
        if not whole:
            raise OSError(f"cannot write {self.path}: no space left on device")


def _checked(text: bytes) -> bytes:
    return text + b",%08x" % crc32(text)
