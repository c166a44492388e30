"""What the rooms of lib export has an example in its docstring, and all examples are true."""

import doctest
import importlib
import inspect
import pkgutil

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import lib

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
def test_every_exported_name_has_an_example(name):
    """What a room's ``__all__`` exports; of a room that is one file without it, what is public there."""
    module, parser = importlib.import_module(name), doctest.DocTestParser()
    own = public(module) if name.count(".") == 1 else {}
    exported = {n: getattr(module, n) for n in module.__all__} if hasattr(module, "__all__") else own
    shown = {n: item for n, item in exported.items() if inspect.isclass(item) or callable(item)}
    without = {n for n, item in shown.items() if not parser.get_examples(inspect.getdoc(item) or "")}
    assert not without, f"no example in the docstring of {name}.{', '.join(sorted(without))}"
