"""What the rooms of lib export has an example in its docstring, and all examples are true."""

import ast
import doctest
import importlib
import inspect
import operator
import pkgutil
import re
import subprocess
import sys
import textwrap
from functools import cache
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import lib
from lib.data.named import read_named
from lib.study import PROJECT

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(module.name for module in pkgutil.walk_packages(lib.__path__, "lib."))

matplotlib.use("Agg")  # figures need no screen


def shows(item: object) -> bool:
    """Whether it is a function or a class; names of types, such as ``Plan``, have no docstring of their own."""
    return inspect.isclass(item) or (callable(item) and inspect.isfunction(inspect.unwrap(item)))


def public(module) -> set[str]:
    """What a room shows to others: its ``__all__``, or what a room of one file defines without an underscore."""
    if hasattr(module, "__all__") or module.__name__.count(".") > 1:
        return set(getattr(module, "__all__", ()))
    return {n for n, item in vars(module).items() if n[0] != "_" and getattr(item, "__module__", "") == module.__name__}


@pytest.fixture(autouse=True, scope="module")
def _images_are_read_once():
    """Most examples load the same images, and most of their time would be spent on unpacking them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.data.loading.read_named", cache(read_named))
        yield


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
    module = importlib.import_module(name)
    runner, said = doctest.DocTestRunner(optionflags=OPTIONS), []
    for example in doctest.DocTestFinder().find(module, globs={"torch": torch}):  # the rest they import, to be copied
        torch.manual_seed(0)
        runner.run(example, out=said.append)
        plt.close("all")
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("name", MODULES)
def test_every_exported_name_has_an_example(name):
    """What a room's ``__all__`` exports; of a room that is one file without it, what is public there."""
    module, parser = importlib.import_module(name), doctest.DocTestParser()
    shown = {n: getattr(module, n) for n in public(module) if shows(getattr(module, n))}
    without = {n for n, item in shown.items() if not parser.get_examples(inspect.getdoc(item) or "")}
    assert not without, f"no example in the docstring of {name}.{', '.join(sorted(without))}"


def blocks(document):
    """The Python of a document's blocks, one after another."""
    text = (PROJECT / document).read_text("utf-8")
    return "\n".join(textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", text, re.M | re.S))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_a_document_calls_what_is_there(document, tmp_path):
    """Names are bound before they are used, and `lib` has what is called, with these keywords."""
    (tmp_path / "blocks.py").write_text(blocks(document), "utf-8")
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise"]
    done = subprocess.run([*ruff, tmp_path / "blocks.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    tree, known = ast.parse(blocks(document)), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "lib":
            room = importlib.import_module(node.module)
            known |= {
                a.name: getattr(room, a.name, None) or importlib.import_module(f"lib.{a.name}") for a in node.names
            }
    called = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            assert hasattr(known[node.value.id], node.attr), f"line {node.lineno}: {ast.unparse(node)}"
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if name.split(".")[0] in known and re.fullmatch(r"[\w.]+", name):
            function = operator.attrgetter(name)(SimpleNamespace(**known))
            inspect.signature(function).bind_partial(*node.args, **{k.arg: None for k in node.keywords if k.arg})
            called += 1
    assert called > 20 or document != "README.md"
