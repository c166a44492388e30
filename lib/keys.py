"""When two things are the same: arguments by their content, code by what it says and refers to."""

import ast
import hashlib
import inspect
import json
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from lib.data import Data


def fingerprint(value: Any) -> Any:
    """A JSON form that is equal exactly when two arguments would give the same result.

    >>> from lib.keys import fingerprint
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
    >>> from lib.keys import code_version
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
