"""A cache of finished runs, and when two runs are the same."""

import ast
import hashlib
import inspect
import io
import json
import os
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock
from torch import Tensor, nn

from lib.data import Data
from lib.files import write_whole
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


def fingerprint(value: Any) -> Any:
    """A JSON form that is equal exactly when two arguments would give the same result.

    >>> from lib.training import fingerprint
    >>> fingerprint({"lr": 0.05, "shares": (0.3, 0.5)})
    {'lr': 0.05, 'shares': [0.3, 0.5]}
    >>> fingerprint(torch.zeros(2)) == fingerprint(torch.zeros(2)), fingerprint(torch.zeros(2)) == fingerprint([0, 0])
    (True, False)
    """
    if isinstance(value, Data):
        return ["data", value.checksum, value.classes, fingerprint(value.task)]
    if isinstance(value, nn.Module):
        return ["module", repr(value), fingerprint(value.state_dict())]
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous()
        return [str(array.dtype), list(array.shape), hashlib.sha256(array.numpy().tobytes()).hexdigest()]
    if is_dataclass(value) and not isinstance(value, type):
        return [code_version(type(value)), {f.name: fingerprint(getattr(value, f.name)) for f in fields(value)}]
    if isinstance(value, Mapping):
        return {str(k): fingerprint(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [fingerprint(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, types.FunctionType | type):
        return ["code", value.__qualname__, code_version(value)]
    raise TypeError(f"cached() cannot tell when two {type(value).__name__} arguments are the same")


COUNTED = ("storage_bits",)
"""Methods that only count what training has left: a better account of it is no reason to train again."""


def code_version(root: Callable | type) -> str:
    """A hash of the code of a function or class and of everything in ``lib`` that it refers to, however far.

    Comments, docstrings, layout and the file it stands in do not count: only a change that could change a result makes
    a new version.

    >>> from lib.pruning import Column, Filter
    >>> from lib.training import code_version
    >>> code_version(Filter) == code_version(Filter), code_version(Filter) == code_version(Column)
    (True, False)
    """
    seen: set[str] = set()
    parts: set[tuple[str, str]] = set()  # without the module: code that moves to another file is the same code
    queue: list[tuple[str, Any]] = [("", root)]
    while queue:
        name, item = queue.pop()
        if isinstance(item, bool | int | float | str | tuple | list | dict):
            parts.add((f"constant {name}", repr(item)))
            continue
        module, name = getattr(item, "__module__", None) or "", getattr(item, "__qualname__", "")
        if module.split(".")[0] not in ("lib", "__main__") or f"{module}.{name}" in seen:
            continue
        seen.add(f"{module}.{name}")
        parts.add((name, _normal_source(item)))
        inner = [v for k, v in vars(item).items() if k not in COUNTED] if isinstance(item, type) else [item]
        queue.extend(("", base) for base in (item.__mro__ if isinstance(item, type) else ()))
        for part in inner:
            queue.extend(_references(getattr(part, "fget", part)))
    return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()[:16]


def _references(function: Any) -> Iterator[tuple[str, Any]]:
    """The functions, classes and constants that a function's code names, directly or as attributes of our modules."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    codes = [code] if code else []
    while codes:
        code = codes.pop()
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
        for name in code.co_names:
            item = inspect.unwrap(function).__globals__.get(name)
            if isinstance(item, types.ModuleType) and item.__name__.startswith("lib."):
                yield from ((n, getattr(item, n)) for n in code.co_names if hasattr(item, n))
            elif item is not None and not name.startswith("__"):
                yield name, item


def _compiled(item: Any) -> str:
    """Instead of the source: instructions, constants and names of a function, or of a class's methods and values."""
    parts = list(vars(item).values()) if isinstance(item, type) else [item]
    plain = [p for p in parts if isinstance(p, bool | int | float | tuple)]
    parts = [getattr(p, "fget", getattr(p, "__func__", p)) for p in parts]
    codes, said = [p.__code__ for p in parts if hasattr(p, "__code__")], []
    while codes:
        code = codes.pop()
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
        constants = [repr(c) for c in code.co_consts if not isinstance(c, types.CodeType)]
        said.append((code.co_code.hex(), constants, code.co_names))
    return repr((plain, said))


@cache
def _normal_source(item: Any) -> str:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(item))))
    except (OSError, TypeError, SyntaxError):  # made at run time, a lambda in an expression, a class in a notebook
        return _compiled(item)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.ClassDef):
            body[:] = [n for n in body if getattr(n, "name", None) not in COUNTED]
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body.pop(0)
    return ast.dump(tree)
