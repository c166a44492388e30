"""Files that are either whole or absent."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


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
