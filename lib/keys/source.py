"""What code says, and what its names stand for: from text alone, the same under every version of Python.

Comments, docstrings, hints, layout, imports and the file that a definition stands in say nothing.
"""

import ast
import hashlib
import importlib.util
import json
import symtable
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ASIDE = ("lib.plots", "lib.reproduce", "lib.study", "lib.keys", "lib.files", "lib.training.cache", "lib.faults.journal")
"""Rooms that only present results or keep them: none depends on what they say ..."""

JUDGES = ("lib.study.claims", "lib.study.curves")
"""... but for what decides there what was found."""

PRICES = ("lib.technology", "table")
"""Who refers to it depends on the files of ``data/technology`` that it names, on all of them where it names none."""

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class File(NamedTuple):
    """A module of ours: what names are imported from, ``(module, attribute or "")``, and the statements of others."""

    package: str
    tree: ast.Module
    imported: dict[str, list[tuple[str, str]]]
    bound: dict[str, list[ast.stmt]]


class Walk:
    """Definitions in the order in which they are met, each said once: a number stands for it from then on.

    So what counts is which code refers to which, in whatever modules, and circles end. Names of methods and attributes
    in ``without`` do not count.
    """

    def __init__(self, without: Sequence[str] = ()) -> None:
        self.without = tuple(without)
        self.numbers: dict[Any, int] = {}
        self.waiting: deque[Callable[[], Any]] = deque()
        self.files: dict[str, File | None] = {}

    def digest(self, start: Any) -> str:
        """Of a JSON form and of everything that it refers to, however far."""
        found = hashlib.sha256(json.dumps(start).encode())
        while self.waiting:
            found.update(json.dumps(self.waiting.popleft()()).encode())
        return found.hexdigest()[:16]

    def number(self, key: Any, say: Callable[[], Any]) -> int:
        """That of the definition ``key``; ``say()`` is asked for its form when its turn comes."""
        if key not in self.numbers:
            self.numbers[key] = len(self.numbers)
            self.waiting.append(say)
        return self.numbers[key]

    def file(self, module: str) -> File | None:
        """A module, or None if it is none of ours: what is installed goes by its name."""
        if module not in self.files:
            place = find(module)
            self.files[module] = place and read(place, module, place.read_bytes())
        return self.files[module]

    def form(self, node: ast.AST, module: str, refer: Callable[..., list] | None = None) -> Any:
        """What a piece of a module's code says, and what every dotted name in it stands for."""
        text, names = said(node, self.without)
        found = [(refer or self.refer)(module, place, parts) for place, parts in names]
        prices = any([self.numbers.get(PRICES)] in refs for refs in found)
        return [text, found, _prices(node) if prices else []]

    def refer(self, module: str, place: str, parts: Sequence[str]) -> list:
        """What a dotted name in a module stands for: numbers of definitions, with the attributes asked of them.

        ``place`` is the module that it is looked up in, "" its own.
        """
        if place.startswith("."):
            place = importlib.util.resolve_name(place, self.file(module).package)
        module = place or module
        file, silent = self.file(module), aside(module)
        if file is None or (silent and not parts):
            return [".".join([module, *parts])]
        if not parts:  # a module that is handed on: anything public may be asked of it
            public = sorted(name for name in {*file.bound, *file.imported} if name[0] not in "_*")
            return [self.number(module, lambda: [[name, self.refer(module, "", [name])] for name in public])]
        name, *rest = parts
        origins = [(m, [*filter(None, [a]), *rest]) for m, a in file.imported.get(name, ()) if (m, a) != (module, name)]
        found = [ref for origin in origins for ref in self.refer(module, *origin)]
        if name in file.bound:
            found.append([name if silent else self.number((module, name), lambda: self.define(module, name)), *rest])
        if not found and self.file(f"{module}.{name}"):
            return self.refer(module, f"{module}.{name}", rest)
        stars = [star for star, _ in file.imported.get("*", ())]
        return found or [ref for star in stars for ref in self.refer(module, star, parts)] or [".".join(parts)]

    def define(self, module: str, name: str) -> list:
        """The statements of a module that bind a name."""
        return [self.form(statement, module) for statement in self.file(module).bound[name]]


def aside(module: str) -> bool:
    """Whether no result depends on a module."""
    return module.startswith(ASIDE) and not module.startswith(JUDGES)


def script(text: str) -> str:
    """A hash of a program, such as a notebook's cells, and of all of ``lib`` and other files of ours that it refers to.

    Rooms that only present results or keep them do not count (`ASIDE` says which).

    >>> from lib.keys import script
    >>> script("from lib.data import load\\nload()") == script("from lib import data  # where load lives\\ndata.load()")
    True
    """
    walk = Walk()
    return walk.digest(walk.form(ast.parse(text), ""))


@cache
def said(node: ast.AST, without: tuple[str, ...] = ()) -> tuple[str, list[tuple[str, list[str]]]]:
    """A piece of code as text, with 0 for every dotted name that it takes from elsewhere; and these names.

    A name is the module that it is looked up in ("": that of the code), and its parts.
    """
    elsewhere, imported, names = _elsewhere(node), _imports(ast.walk(node)), []

    def follow(node: ast.AST) -> bool:
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load):
            return False
        origins = imported.get(node.id) or [(place, node.id) for place, _ in [("", ""), *imported.get("*", ())]]
        if node.id not in imported and node.id not in elsewhere:
            return False
        names.extend((place, [*filter(None, [name]), *parts]) for place, name in origins)
        return True

    def say(node: Any, follow: Callable = follow) -> Any:
        if isinstance(node, list):
            return [say(n, follow) for n in node if not _silent(n)]
        if not isinstance(node, ast.AST):
            return node
        if follow(node):
            return 0
        if isinstance(node, ast.Constant):
            plain = node.value is None or isinstance(node.value, bool | int | float | str)
            return ["Constant", node.value if plain else repr(node.value)]
        form, fields = [type(node).__name__], dict(ast.iter_fields(node))
        if isinstance(node, ast.JoinedStr):  # 3.12 ends some of them with nothing
            fields["values"] = [n for n in node.values if not isinstance(n, ast.Constant) or n.value]
        for silent in ("annotation", "ctx", "kind", "returns", "type_comment"):
            fields.pop(silent, None)
        if isinstance(node, ast.ClassDef):
            fields["body"] = [n for n in node.body if getattr(n, "name", None) not in without]
            hints = [n.annotation for n in node.body if isinstance(n, ast.AnnAssign)]  # they make a dataclass's fields
            form.append(say(hints, lambda _: False))
        return form + [[k, say(v, follow)] for k, v in fields.items() if v is not None and v != []]

    return json.dumps(say(node)), names


def _silent(node: Any) -> bool:
    """Docstrings and imports; where an import is used, it is said what it stands for."""
    words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return words or isinstance(node, ast.Import | ast.ImportFrom)


def _elsewhere(node: ast.AST) -> set[str]:
    """The names that a piece of code does not bind itself, by Python's own analysis."""
    nodes = [n for n in node.body if not _silent(n)] if isinstance(node, ast.Module) else [node]
    lines = [" pass", *(f" {line}" for n in nodes for line in ast.unparse(n).splitlines())]
    try:
        tables = [symtable.symtable("\n".join(["def _():", *lines]), "", "exec")]
    except SyntaxError:  # a nested function with `nonlocal`
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    for table in tables:
        tables += table.get_children()
    found = {s.get_name() for table in tables for s in table.get_symbols() if not s.is_local() and not s.is_free()}
    for statement in [s for n in ast.walk(node) if isinstance(n, ast.ClassDef) for s in n.body]:
        named = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]  # `size = size` takes it from outside
        stored, loaded = ({n.id for n in named if isinstance(n.ctx, kind)} for kind in (ast.Store, ast.Load))
        found |= stored & loaded if isinstance(statement, ast.Assign | ast.AnnAssign) else set()
    return found


def _imports(nodes: Iterable[ast.AST]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = alias.name if alias.asname else alias.name.split(".")[0]
                found.setdefault(alias.asname or module, []).append((module, ""))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                origin = "." * node.level + (node.module or ""), alias.name
                found.setdefault(alias.asname or alias.name, []).append(origin)
    return found


@cache
def read(path: Path, module: str, text: bytes) -> File:
    """A module as its text says; what is no Python binds nothing."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        tree = ast.Module([], [])
    bound: dict[str, list[ast.stmt]] = {}
    for statement in tree.body:
        for name in dict.fromkeys(binds(statement)):
            bound.setdefault(name, []).append(statement)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return File(package, tree, _imports(_outside(tree)), bound)


def _outside(node: ast.AST) -> list[ast.AST]:
    """A node and those below, without what is inside of functions and classes."""
    found = [node]
    for node in found:
        if not isinstance(node, (*FUNCTION, ast.ClassDef)):
            found += ast.iter_child_nodes(node)
    return found


def binds(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement defines or may change: `X = ...`, `X[k] = ...`, `X.append(...)`."""
    for node in _outside(statement):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Expr):
            yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name))
        elif isinstance(getattr(node, "ctx", None), ast.Store):
            while isinstance(node, ast.Attribute | ast.Subscript):
                node = node.value
            yield getattr(node, "id", "")


def find(module: str) -> Path | None:
    """The file of a module of ours: one that is no part of Python and was not installed."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top) if top else None
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return None
    places = [Path(root, *rest) for root in spec.submodule_search_locations or ()]
    files = [file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))]
    files += [Path(spec.origin)] if spec.has_location and not rest else []
    return next((file for file in files if file.suffix == ".py" and file.is_file() and not installed(file)), None)


def installed(file: str | Path) -> bool:
    """Whether a file is part of Python or of a package that was installed, other than ``lib`` itself."""
    file = Path(file)
    if file.is_relative_to(Path(__file__).parents[1]):
        return False
    packages = {"site-packages", "dist-packages"} & {*file.parts}
    return bool(packages) or file.is_relative_to(sysconfig.get_path("stdlib"))


def _prices(node: ast.AST) -> list[list[str]]:
    files = sorted((Path(__file__).resolve().parents[2] / "data" / "technology").glob("*.csv"))
    named = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
    chosen = [file for file in files if file.stem in named] or files
    return [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in chosen]
