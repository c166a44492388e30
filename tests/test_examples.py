"""Every public function and class of lib has an example in its docstring, and the examples are true."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import lib

LATER = ("lib.plots", "lib.study")  # rooms whose functions need no example yet; those that are there run all the same
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(lib.__path__, "lib.") if not module.name.startswith("lib.reproduce")
)


def later(name: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in LATER)


def public(module) -> dict[str, object]:
    """The functions and classes that a module defines for others to use."""
    return {
        name: item
        for name, item in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(item) or inspect.isfunction(inspect.unwrap(item) if callable(item) else item))
        and item.__module__ == module.__name__
    }


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
    module = importlib.import_module(name)
    names = vars(module) if later(name) else {}  # examples import what they use, to be copied as they are
    runner, said = doctest.DocTestRunner(optionflags=OPTIONS), []
    for example in doctest.DocTestFinder().find(module, globs=names | {"torch": torch}):
        torch.manual_seed(0)
        runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("name", [name for name in MODULES if not later(name)])
def test_every_public_name_has_an_example(name):
    parser = doctest.DocTestParser()
    found = public(importlib.import_module(name))
    without = [own for own, item in found.items() if not parser.get_examples(inspect.getdoc(item) or "")]
    assert not without, f"{name}: no example in the docstring of {', '.join(without)}"
