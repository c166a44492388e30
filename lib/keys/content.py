"""What code says, with the values that it meets: where it stands in files by their text, elsewhere by what is there."""

import ast
import inspect
import linecache
import sys
import time
import types
from collections.abc import Callable, Sequence
from enum import EnumMeta
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lib.keys.source import FUNCTION, File, aside, binds, installed, read
from lib.keys.values import KeysError, Values, name_of

BORN = time.time_ns()
HEAP = 1 << 9
"""Of a class that Python code made: Py_TPFLAGS_HEAPTYPE."""


def content(*values: Any, without: Sequence[str] = (), beside: Sequence[Tensor] = ()) -> str:
    """A hash that is equal exactly when values, in this order, would give the same results.

    Of functions and classes it is the code (see `code`); of networks all that they hold: class, attributes, hooks,
    parameters and buffers, what is frozen and what is tied; of data sets their tensors and task; of a path the file; of
    other objects what they would be copied with. Python's version, the machine and places in memory do not count.

    Args:
        without: names of methods of classes and attributes of objects that do not count.
        beside: tensors whose values do not count.

    Raises:
        KeysError: an object whose state is not known, such as an open file; code as in `code`.

    >>> import torch
    >>> from lib.keys import content
    >>> content(0.5, [1, 2]) == content(0.5, (1, 2)), content(torch.zeros(2)) == content([0.0, 0.0])
    (True, False)
    """
    walk = _Live(without, beside)
    return walk.digest([walk.value(value) for value in values])


def code(function: Callable, without: Sequence[str] = ()) -> str:
    """A hash of what a function or class says, and of all code of ours that it refers to, however far.

    Ours is what is not installed: ``lib``, notebooks, a user's own files. Comments, docstrings, hints, layout, imports
    and the file that a definition stands in do not count, nor do rooms that only present results or keep them.
    Names are followed through modules, closures, defaults, decorators and partial functions. Variables of a notebook,
    and of the script that runs, count by their values, and so does what somebody puts in the place of a module's
    function or literal or of a class's value. What a function reads from a file by its name does not.

    Raises:
        KeysError: a function without source, or whose file was changed after it was imported; a variable of a notebook
            as in `content`.

    >>> from lib.pruning import Column, Filter
    >>> from lib.keys import code
    >>> code(Filter) == code(Filter), code(Filter) == code(Column)
    (True, False)
    """
    return content(function, without=without)


def apart(function: Callable, without: Sequence[str] = ()) -> tuple[str, dict[str, str]]:
    """What a function's code says, and beside it the variables of the notebook that this code refers to.

    Returns:
        A hash as of `code`, in which these variables count by name alone, and by name a hash of what each holds.
        What a file of ours defines, such as the class of an object, is code there too, and in variables only a name.
        Objects that only present results or keep them are no variables.

    Raises:
        KeysError: as `code` and `content` do.

    >>> from lib.keys import apart
    >>> rate = 0.5
    >>> apart(lambda n: n * rate)[1].keys()
    dict_keys(['rate'])
    """
    walk = _Apart(without, ())
    return walk.digest([walk.value(function)]), walk.variables


class _Live(Values):
    """A walk that begins at values of this process, the code among them."""

    def __init__(self, without: Sequence[str], beside: Sequence[Tensor]) -> None:
        super().__init__(without, beside)
        for module in sys.modules.keys() - _SAVED.keys():
            _saved(module)

    def file(self, module: str) -> File | None:
        """A module as its file was when it was imported: who edits it meanwhile does not change what runs here."""
        if module not in sys.modules:
            return super().file(module)
        if module not in self.files:
            _, path, text = _saved(module)
            self.files[module] = path and _read(path, module, text, vars(sys.modules[module]))
        return self.files[module]

    def place(self, value: Any) -> tuple[str, list[str]] | None:
        """The module and name of a function or class that is what a file of ours says under that name."""
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if not isinstance(module, str) or not isinstance(name, str) or not self.file(module):
            return None
        own = name in self.file(module).bound and getattr(sys.modules.get(module), name, None) is value
        return (module, [name]) if own else None

    def define(self, module: str, name: str) -> list:
        """What a file says under a name, and what this process has in its place."""
        space = vars(sys.modules[module]) if module in sys.modules else {}
        statements = self.file(module).bound[name]
        if name not in space:
            return super().define(module, name)
        here, definitions = space[name], (*FUNCTION, ast.ClassDef)
        if module == "__main__":  # a script that still runs: a variable is what it holds now
            statements = [s for s in statements if isinstance(s, definitions) and _explains(s, here, space)]
            form = [self.form(statement, module) for statement in statements] or [self.value(here, name)]
        else:
            form = super().define(module, name)
            if len(statements) == 1 and not _explains(statements[0], here, space):
                return [*form, self.value(here, name)]
        if len(statements) == 1 and isinstance(statements[0], ast.ClassDef) and isinstance(here, type):
            form += [put] if (put := self._put(here, statements[0])) else []
        return form

    def look(self, space: dict, free: Sequence[str], module: str, place: str, parts: Sequence[str]) -> list:
        """`refer` for code that is not on the first level of a file."""
        name, *rest = parts
        if place or (name not in free and self.file(module)):
            return self.refer(module, place, parts)
        if name in free or name not in space:
            return [".".join(parts)]
        value = space[name]
        if isinstance(value, types.ModuleType):
            return self.refer(module, value.__name__, rest)
        if found := self.place(value):
            return self.refer(module, found[0], [*found[1], *rest])
        return [[self.number((id(space), name), lambda: self.value(value, name)), *rest]]

    def _function(self, function: types.FunctionType) -> Any:
        if _theirs(function):
            inner = getattr(function, "__wrapped__", None)
            return [name_of(function), self.value(inner) if inner else self._cells(function)]
        self.alive.append(function)
        return [self.number(("function", id(function)), partial(self._closure, function))]

    def _closure(self, function: types.FunctionType) -> Any:
        self.open[id(function)] = function.__qualname__
        said = self._text(_node(self._tree(function), function.__code__), [function])
        given = {k: v for k, v in vars(function).items() if k != "__wrapped__"}
        form = [said, *map(self.value, (function.__defaults__, function.__kwdefaults__, given))]
        del self.open[id(function)]
        return form

    def _class(self, kind: type) -> Any:
        if _theirs(kind):
            put = [(k, v) for base in kind.__mro__ if _theirs(base) for k, v in vars(base).items() if _somebodys(v)]
            bases = [self.value(base) for base in kind.__mro__[1:] if not _theirs(base)]
            return [name_of(kind), *bases, *([k, self.value(v, k)] for k, v in sorted(put))]
        self.alive.append(kind)
        return [self.number(("class", id(kind)), partial(self._members, kind))]

    def _members(self, kind: type) -> Any:
        """Of a class in a notebook, whose text is found by its methods; without any, its values and hints are all."""
        members = [inspect.unwrap(getattr(m, "fget", getattr(m, "func", m)) or m) for m in vars(kind).values()]
        functions = [m for m in members if isinstance(m, types.FunctionType)]
        methods = [m for m in functions if m.__qualname__.startswith(kind.__qualname__)]
        for method in methods:
            line = method.__code__.co_firstlineno
            nodes = [n for n in ast.walk(self._tree(method)) if isinstance(n, ast.ClassDef) and n.name == kind.__name__]
            for node in [n for n in nodes if n.lineno <= line <= n.end_lineno][-1:]:
                put = self._put(kind, node)
                return [self._text(node, methods), put] if put else self._text(node, methods)
        own = {k: v for k, v in vars(kind).items() if not k[0] == k[-1] == "_"}  # but what Python has for itself
        values = self._counted(kind, own)
        return [*map(self.value, (kind.__bases__, [*inspect.get_annotations(kind)], values))]

    def _put(self, kind: type, node: ast.ClassDef) -> list:
        """The attributes of a class that have other values, or methods, than its text gives them."""
        says = {name: statement for statement in node.body for name in binds(statement)}
        held = {} if isinstance(kind, EnumMeta) else dict(sorted(vars(kind).items()))
        values = {k: v for k, v in held.items() if not callable(v) and not hasattr(type(v), "__get__")}
        put = [k for k, v in values.items() if (not _explains(says[k], v, {}) if k in says else k[0] != "_")]
        for name, method in held.items():
            plain = isinstance(says.get(name), FUNCTION) and not says[name].decorator_list
            counts = isinstance(method, types.FunctionType) and (plain or (name not in says and name[0] != "_"))
            own = kind.__module__, f"{kind.__qualname__}.{name}"
            if counts and (method.__module__, method.__qualname__) != own:
                values[name] = method
                put.append(name)
        return [[k, self.value(values[k], k)] for k in put]  # hidden ones that it does not say are Python's own

    def _text(self, node: ast.AST, functions: list[types.FunctionType]) -> Any:
        free = {name for f in functions for name in f.__code__.co_freevars}
        space = functions[0].__globals__
        said = self.form(node, space.get("__name__", ""), partial(self.look, space, free))
        return [said, *map(self._cells, functions)]

    def _cells(self, function: types.FunctionType) -> Any:
        found = []
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # nothing is in it yet
                continue
            found.append([name, self.value(held, f", {name}")])
        return found

    def _tree(self, function: types.FunctionType) -> ast.Module:
        path, space = Path(function.__code__.co_filename), function.__globals__
        file = self.file(space.get("__name__", ""))
        if file and _saved(space["__name__"])[1] == path:
            return file.tree
        if path.is_file():
            return _read(path, "", path.read_bytes(), space).tree
        return _parsed("".join(linecache.getlines(str(path), space)))  # IPython keeps the text of cells there


_SAVED: dict[str, tuple[Any, Path | None, bytes]] = {}


def _saved(module: str) -> tuple[Any, Path | None, bytes]:
    """A module's specification, and its file with the text that was there at the first look after the import."""
    spec, path = (getattr(sys.modules[module], "__dict__", {}).get(name) for name in ("__spec__", "__file__"))
    if module not in _SAVED or _SAVED[module][0] is not spec:  # imported anew
        ours = path and path.endswith(".py") and not installed(path) and Path(path).is_file()
        _SAVED[module] = (spec, Path(path), Path(path).read_bytes()) if ours else (spec, None, b"")
    return _SAVED[module]


def _read(path: Path, module: str, text: bytes, space: dict) -> File:
    """A file's text; refused where the functions that were imported from it are others."""
    if path.is_file() and path.stat().st_mtime_ns > BORN:
        written = [compile(text, str(path), "exec", dont_inherit=True)]
        for code in written:
            written += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        members = [m for v in [*space.values()] for m in (v, *(vars(v).values() if isinstance(v, type) else ()))]
        inner = [inspect.unwrap(m) for m in members if isinstance(m, types.FunctionType)]
        held = [m.__code__ for m in inner if isinstance(m, types.FunctionType)]  # Tensor.__pow__ wraps one of C
        if not {code for code in held if code.co_filename == str(path)} <= {*written}:
            raise KeysError(f"{path.name} was changed after it was imported: restart the kernel")
    return read(path, module, text)


_parsed = cache(ast.parse)


def _theirs(value: types.FunctionType | type) -> bool:
    """Whether a function or class belongs to Python or to a package that is installed."""
    file = value.__code__.co_filename if isinstance(value, types.FunctionType) else ""
    if Path(file).is_absolute():
        return installed(file)
    if value.__module__ == "builtins" and getattr(value, "__flags__", HEAP) & HEAP:
        return False  # made where nothing says in which module
    module = sys.modules.get(value.__module__)
    if module is None or value.__module__ == "__main__":
        return False
    return getattr(module, "__file__", None) is None or installed(module.__file__)


def _somebodys(value: Any) -> bool:
    """Whether it is a function of a file or cell of ours, such as one that was put into a class of a package."""
    file = value.__code__.co_filename if isinstance(value, types.FunctionType) else ""
    return Path(file).is_absolute() and not installed(file)


class _Apart(_Live):
    """A walk that sets a notebook's variables aside."""

    def __init__(self, without: Sequence[str], beside: Sequence[Tensor]) -> None:
        super().__init__(without, beside)
        self.variables: dict[str, str] = {}

    def look(self, space: dict, free: Sequence[str], module: str, place: str, parts: Sequence[str]) -> list:
        """`_Live.look`, but of a variable only the name."""
        name, value = parts[0], space.get(parts[0])
        code = callable(value) or isinstance(value, types.ModuleType)
        if (
            place
            or name in free
            or name not in space
            or self.file(module)
            or (code and not isinstance(value, nn.Module))
        ):
            return super().look(space, free, module, place, parts)
        if aside(type(value).__module__):
            return [".".join(parts)]
        held = _Held(self.without, ())
        self.variables[name] = held.digest([held.value(value)])
        return [".".join(parts), *([self.value(value, name)] if held.met else [])]


class _Held(_Live):
    """A walk through what a variable holds; what our files define is met by name there: the rest is code's to say."""

    met = False

    def define(self, module: str, name: str) -> list:
        self.met = True
        return [name]


def _explains(statement: ast.stmt, here: Any, space: dict) -> bool:
    """Whether a definition is what a module has under its name, as far as this can be seen."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        if isinstance(here, type):
            return bool(statement.decorator_list) or here.__module__ == space["__name__"]
        return bool(statement.decorator_list) or getattr(here, "__globals__", None) is space
    try:
        literal = ast.literal_eval(getattr(statement, "value", None))
    except (ValueError, TypeError):
        return True
    return type(here) is type(literal) and here == literal


def _node(tree: ast.Module, code: types.CodeType) -> ast.AST:
    """The definition that a function was made by.

    Raises:
        KeysError: there is none, as nobody has kept its source.
    """
    nodes = [n for n in ast.walk(tree) if isinstance(n, FUNCTION) and getattr(n, "name", "<lambda>") == code.co_name]
    nodes = [n for n in nodes if min(m.lineno for m in [n, *getattr(n, "decorator_list", [])]) == code.co_firstlineno]
    if len(nodes) > 1:  # lambdas on one line: the innermost that holds all places of the code in its body
        spans = [((a, c), (b, d)) for a, b, c, d in code.co_positions() if d]
        bodies = {(n.body.lineno, n.body.col_offset, n.body.end_lineno, n.body.end_col_offset): n for n in nodes}
        fits = [k for k in bodies if spans and all(k[:2] <= start and end <= k[2:] for start, end in spans)]
        constant = [n for n in nodes if not spans and _says(n, code)]  # 3.12 gives what returns a constant no place
        nodes = constant if len({*map(ast.dump, constant)}) == 1 else [bodies[k] for k in sorted(fits)[-1:]]
    if not nodes:
        raise KeysError(f"{code.co_qualname} has no source of its own: write it in a file or a cell, one lambda a line")
    return nodes[0]


def _says(node: ast.AST, code: types.CodeType) -> bool:
    """Whether a lambda has the arguments of some code, and returns a constant of it."""
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    own = [*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
    return isinstance(node.body, ast.Constant) and names == own and node.body.value in code.co_consts
