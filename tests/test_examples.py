"""What the rooms of lib export has an example in its docstring, and all examples are true."""

import doctest
import importlib
import inspect
import pkgutil
from functools import cache

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import lib
from lib.data.named import read_named

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
