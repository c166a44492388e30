"""A cache of finished runs, and when two runs are the same."""

import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock
from torch import nn

from lib.files import write_whole
from lib.keys import code_version, fingerprint
from lib.training.loop import Progress

CACHE_ROOT = Path(__file__).resolve().parent.parent.parent / ".cache"


def cached(function: Callable[..., Any], model: nn.Module, *args: Any, progress: Progress | None = None, **kwargs: Any):
    """``function(model, *args, **kwargs)``, or what it did and returned the last time everything was the same.

    The function changes the model's ``state_dict`` in place without changing its keys, and returns data that
    ``torch.save`` can write. The key holds all that determines the result: the function's code and that of
    everything in ``lib`` which it refers to, the model's structure and weights, the data's checksum, the arguments,
    device kind, thread count and torch version. Two processes that want the same entry compute it once; a damaged
    file is reported and computed anew. The cache lies in ``.cache/`` or in the environment's ``CACHE_ROOT``.

    >>> from lib import data, models
    >>> from lib.training import cached, fit
    >>> images = data.load(train_size=100, test_size=100, validation_size=100)
    >>> for _ in range(2):
    ...     net = models.build("lenet300", images.shape, images.classes)
    ...     log = cached(fit, net, images, epochs=1, lr=0.05, progress=lambda done, message: print(message))
    epoch 1/1, loss ...
    from the cache
    """
    key = _key(function, model, args, kwargs)
    path = Path(os.environ.get("CACHE_ROOT") or CACHE_ROOT) / function.__name__ / f"{key}.pt"
    with _locked(path):
        entry = _read(path)
        if entry is None:
            value = function(model, *args, progress=progress, **kwargs)
            payload = io.BytesIO()
            state = {k: v.cpu() for k, v in model.state_dict().items()}
            torch.save({"state": state, "value": _to_plain(value)}, payload)
            digest = hashlib.sha256(payload.getvalue()).digest()
            write_whole(path, digest + payload.getvalue())
        else:
            model.load_state_dict(entry["state"])
            value = _from_plain(entry["value"])
            if progress:
                progress(1.0, "from the cache")
    return value


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a cache entry alone; a process that dies lets go of it."""
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise OSError(error.errno, f"cannot write the cache {path.parent}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def _read(path: Path) -> dict | None:
    """The entry, or None when it is missing or does not match the digest that it begins with."""
    if not path.is_file():
        return None
    raw = path.read_bytes()
    if hashlib.sha256(raw[32:]).digest() != raw[:32]:
        warnings.warn(f"cache file {path.name} is damaged; computing it anew", stacklevel=3)
        return None
    return torch.load(io.BytesIO(raw[32:]), weights_only=True)


def _to_plain(value: Any) -> dict[str, Any]:
    if isinstance(value, tuple):
        return {"tuple": [_to_plain(v) for v in value]}
    return {"frame": value.to_dict("list")} if isinstance(value, pd.DataFrame) else {"plain": value}


def _from_plain(stored: dict[str, Any]) -> Any:
    if "tuple" in stored:
        return tuple(_from_plain(v) for v in stored["tuple"])
    return pd.DataFrame(stored["frame"]) if "frame" in stored else stored["plain"]


def _key(function: Callable, model: nn.Module, args: tuple, kwargs: dict) -> str:
    place = next(model.parameters()).device.type
    versions = [torch.__version__.split("+")[0], place, torch.get_num_threads() if place == "cpu" else 0]
    parts = [
        code_version(function),
        *sorted({code_version(type(m)) for m in model.modules()}),
        fingerprint(model),
        fingerprint(args),
        fingerprint(kwargs),
        versions,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
