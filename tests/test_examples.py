"""Every public function and class of lib has an example in its docstring, and the examples are true."""

import doctest
import importlib
import inspect
import pkgutil

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import lib

EXEMPT = {"lib.reproduce.execute.main"}  # it would end the process that calls it when that one's parent ends
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(module.name for module in pkgutil.walk_packages(lib.__path__, "lib."))

matplotlib.use("Agg")  # figures need no screen


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
    runner, said = doctest.DocTestRunner(optionflags=OPTIONS), []
    for example in doctest.DocTestFinder().find(module, globs={"torch": torch}):  # the rest they import, to be copied
        torch.manual_seed(0)
        runner.run(example, out=said.append)
        plt.close("all")
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_an_example(name):
    parser = doctest.DocTestParser()
    found = public(importlib.import_module(name))
    without = {f"{name}.{own}" for own, item in found.items() if not parser.get_examples(inspect.getdoc(item) or "")}
    assert without <= EXEMPT, f"no example in the docstring of {', '.join(sorted(without - EXEMPT))}"
