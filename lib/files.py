"""Files that are either whole or absent."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

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
