"""When two things are the same: what changes a result makes another key, and nothing else does."""

import ast
import functools
import importlib
import shutil
import subprocess
import sys
from collections import OrderedDict, namedtuple
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.compilerop import CachingCompiler
from torch import nn
from torch.nn.utils import parametrizations

from lib import data
from lib.keys import KeysError, apart, code, content, script
from lib.keys.source import Walk

PROJECT = Path(__file__).resolve().parent.parent


# --- code in files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write modules beside each other and import the last of them anew."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which tells two files of one second apart by their size
    written = set()

    def write(**modules):
        for name, text in modules.items():
            place = tmp_path / f"{name}.py"
            place.write_text(text)
            written.add(name)
        for known in written:
            sys.modules.pop(known, None)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


REFERENCES = {
    "a function": "def helper(): return 1\ndef top(): return helper()",
    "a function of a function": "def deep(): return 1\ndef helper(): return deep()\ndef top(): return helper()",
    "a function that calls back": "def helper(n): return top(n) if n else 1\ndef top(n): return helper(n - 2)",
    "a constant": "LIMIT = 1\ndef top(): return LIMIT",
    "a constant with a hint": "LIMIT: int = 1\ndef top(): return LIMIT",
    "a constant of a constant": "LIMIT = 1\nTWICE = 2 * LIMIT\ndef top(): return TWICE",
    "a constant that is no plain value": "from collections import deque\nLAST = deque([], 1)\ndef top(): return LAST",
    "an object": "class Tool:\n    def use(self): return 1\ntool = Tool()\ndef top(): return tool.use()",
    "a tuple of functions": "def helper(): return 1\nALL = (helper,)\ndef top(): return ALL[0]()",
    "a dict of functions": "def helper(): return 1\nALL = {'a': helper}\ndef top(k): return ALL[k]()",
    "a dict that is filled": "ALL = {}\ndef helper(): return 1\nALL['a'] = helper\ndef top(k): return ALL[k]()",
    "a list that is filled if": "ALL = []\ndef helper(): return 1\nif True:\n    ALL.extend([helper])\n"
    "def top(k): return ALL[k]()",
    "a list that is filled": "ALL = []\ndef helper(): return 1\nALL.append(helper)\ndef top(k): return ALL[k]()",
    "a lambda": "helper = lambda: 1\ndef top(): return helper()",
    "a static method": "class Tool:\n    @staticmethod\n    def make(): return 1\ndef top(): return Tool.make()",
    "a class method": "class Tool:\n    @classmethod\n    def make(cls): return 1\ndef top(): return Tool.make()",
    "a method of self": "class top:\n    def run(self): return self.step()\n    def step(self): return 1",
    "a method of a base": "class Base:\n    def step(self): return 1\nclass top(Base):\n    def run(self): self.step()",
    "a property": "class top:\n    @property\n    def size(self): return 1",
    "an attribute of a class": "class top:\n    size = 1\n    def run(self): return self.size",
    "a constant in a class": "LIMIT = 1\nclass top:\n    size = LIMIT",
    "a constant of the same name in a class": "size = 1\nclass top:\n    size = size",
    "a field": "from dataclasses import dataclass\n@dataclass\nclass top:\n    size: int = 1",
    "a field's default": "from dataclasses import dataclass\nLIMIT = 1\n@dataclass\nclass top:\n    size: int = LIMIT",
    "a field's factory": "from dataclasses import dataclass, field\ndef make(): return [1]\n@dataclass\nclass top:\n"
    "    sizes: list = field(default_factory=make)",
    "a hint that makes a field": "from dataclasses import dataclass\n@dataclass\nclass top:\n    size: 'list[1]' = 0",
    "a member of an enumeration": "from enum import Enum\nclass Kind(Enum):\n    A = 1\ndef top(): return Kind.A",
    "a default": "LIMIT = 1\ndef top(x=LIMIT): return x",
    "a default by name": "LIMIT = 1\ndef top(*, x=LIMIT): return x",
    "a default of an inner function": "LIMIT = 1\ndef top():\n    def inner(x=LIMIT): return x\n    return inner",
    "a decorator": "def twice(f): return lambda: f() * 1\n@twice\ndef top(): return 3",
    "a decorated function": "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def inner(): return f() * 2"
    "\n    return inner\n@twice\ndef top(): return 1",
    "a decorator's argument": "LIMIT = 1\ndef times(n): return lambda f: f\n@times(LIMIT)\ndef top(): return 3",
    "a cached function": "import functools\n@functools.cache\ndef helper(): return 1\ndef top(): return helper()",
    "a context": "from contextlib import contextmanager\n@contextmanager\ndef held(): yield 1\ndef top():\n"
    "    with held() as x: return x",
    "a partial function": "from functools import partial\ndef helper(x): return 1\ntop = partial(helper, 2)",
    "a partial function's argument": "from functools import partial\ndef helper(x): return x\ntop = partial(helper, 1)",
    "a partial function's name": "from functools import partial\ndef helper(x): return x\ntop = partial(helper, x=1)",
    "what a closure holds": "def make(x):\n    def inner(): return x\n    return inner\ntop = make(1)",
    "a function that a closure holds": "def helper(): return 1\ndef make(f):\n    def inner(): return f()\n"
    "    return inner\ntop = make(helper)",
    "what a closure's closure holds": "def make(x):\n    def middle():\n        def inner(): return x\n"
    "        return inner\n    return middle\ntop = make(1)()",
    "a default of a loop": "top = [lambda i=i: i for i in (1, 5)][0]",
    "an attribute of a function": "def top(): return top.limit\ntop.limit = 1",
    "a bound method": "class Tool:\n    def __init__(self): self.size = 1\n    def use(self): return self.size\n"
    "top = Tool().use",
    "a comprehension": "def helper(x): return 1\ndef top(): return [helper(x) for x in range(3)]",
    "the source of a comprehension": "def helper(): return [1]\ndef top(): return [helper for helper in helper()]",
    "a comprehension's own name elsewhere": "def x(): return 1\ndef top(): return [x for x in range(3)] + [*x()]",
    "an inner function": "def helper(): return 1\ndef top():\n    def inner(): return helper()\n    return inner()",
    "an inner lambda": "def helper(x): return 1\ndef top(xs): return sorted(xs, key=lambda x: helper(x))",
    "a name that is local elsewhere": "def helper(): return 1\ndef top():\n    def inner(helper): return helper\n"
    "    return inner(helper())",
    "a global": "LIMIT = 1\ndef top():\n    global LIMIT\n    LIMIT += 2\n    return LIMIT",
    "an f-string": "LIMIT = 1\ndef top(): return f'{LIMIT:>{LIMIT}}'",
    "a conditional definition": "if True:\n    def helper(): return 1\nelse:\n    def helper(): return 3\n"
    "def top(): return helper()",
    "a definition that replaces another": "def helper(): return 1\nfirst = helper\ndef helper(): return first()\n"
    "def top(): return helper()",
    "an exception": "class Stop(Exception):\n    code = 1\ndef top():\n    try: pass\n    except Stop as e: return e",
    "an own metaclass": "class Meta(type):\n    def size(cls): return 1\nclass top(metaclass=Meta): pass",
    "what a match compares": "class Kind:\n    A = 1\ndef top(x):\n    match x:\n        case Kind.A: return 0",
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_every_reference_is_seen(kind, write):
    """What is referred to makes another key when it changes, and leaves those of others."""
    text = f"{REFERENCES[kind]}\n\ndef other(): return 0\n"
    assert text.count("1") == 1
    before = write(mine=text)
    keys = code(before.top), code(before.other), script("import mine; mine.top()"), script("import mine; mine.other()")
    assert len({*keys}) == 4
    again = write(mine=text)
    assert (code(again.top), code(again.other)) == keys[:2]
    after = write(mine=text.replace("1", "2", 1))
    assert code(after.top) != keys[0]
    assert code(after.other) == keys[1]
    assert script("import mine; mine.other()") == keys[3]
    assert script("from mine import top; top()") != keys[2]


IMPORTS = {
    "a name": "from two import helper\ndef top(): return helper()",
    "another name": "from two import helper as h\ndef top(): return h()",
    "a module": "import two\ndef top(): return two.helper()",
    "a module by another name": "import two as t\ndef top(): return t.helper()",
    "a name, inside": "def top():\n    from two import helper\n    return helper()",
    "a module, inside": "def top():\n    import two\n    return two.helper()",
    "all": "from two import *\ndef top(): return helper()",
    "if it is there": "try:\n    from two import helper\nexcept ImportError:\n    pass\ndef top(): return helper()",
    "a module that is handed on": "import two\ndef top(): return vars(two)['helper']()",
    "a constant": "from two import LIMIT\ndef top(): return LIMIT",
    "through a third": "from three import helper\ndef top(): return helper()",
    "a class as a base": "import two\nclass top(two.Base): pass",
}
TWO = "LIMIT = 1\ndef helper(): return LIMIT\nclass Base:\n    limit = LIMIT\ndef other(): return 0\n"


@pytest.mark.parametrize("kind", IMPORTS)
def test_every_import_is_followed(kind, write):
    third = {"three": "from two import helper, other"}
    before = code(write(two=TWO, **third, one=IMPORTS[kind]).top)
    assert code(write(two=TWO.replace("1", "2"), **third, one=IMPORTS[kind]).top) != before
    unrelated = code(write(two=TWO.replace("return 0", "return 5"), **third, one=IMPORTS[kind]).top)
    assert (unrelated == before) == (kind != "a module that is handed on")


SAME = {
    "comments": "# why\nLIMIT = 3  # why\ndef helper(x):  # why\n    return x + LIMIT\ndef top(x): return helper(x)",
    "docstrings": '"""Says."""\nLIMIT = 3\n"""Says."""\ndef helper(x):\n    """Says."""\n    return x + LIMIT\n'
    'def top(x):\n    """Says\n    more."""\n    return helper(x)',
    "hints": "LIMIT = 3\ndef helper(x: int) -> int: return x + LIMIT\ndef top(x: 'float') -> list: return helper(x)",
    "layout": "LIMIT = (\n    3\n)\ndef top(x): return helper(\n    x\n)\ndef helper(x): return (x + LIMIT)",
    "a file of its own": "from two import helper\ndef top(x): return helper(x)",
    "a module's name": "import two as t\ndef top(x): return t.helper(x)",
    "an import inside": "def top(x):\n    from two import helper\n    return helper(x)",
    "another name of an import": "from two import helper as h\ndef top(x): return h(x)",
    "other things beside": "import math\nfrom two import *\nOTHER = 7\ndef helper(x): return x + LIMIT\nLIMIT = 3\n"
    "def top(x): return helper(x)\ndef bottom(): return top(OTHER)",
}


@pytest.mark.parametrize("kind", SAME)
def test_what_changes_no_result_makes_no_other_key(kind, write):
    two = "LIMIT = 3\n\n\ndef helper(x):\n    return x + LIMIT\n"
    plain = code(write(plain=f"{two}\n\ndef top(x):\n    return helper(x)\n").top)
    assert code(write(two=two, one=SAME[kind]).top) == plain


def test_who_refers_to_which_counts_not_only_what_is_there(write):
    text = "def a(): return 1\ndef b(): return 2\ndef top(): return a() - b()"
    swapped = "from two import a as b, b as a\ndef top(): return a() - b()"
    assert code(write(two=text, one=swapped).top) != code(write(two=text, one=text).top)
    two = "def one(): return 1\ndef two(): return 2"
    a = "from two import one as x, two as y\ndef first(): return x() - y()\ndef second(): return x()\n"
    b = a.replace("second(): return x()", "second(): return y()")
    top = "def top(): return first(), second()"
    assert code(write(two=two, one=a + top).top) != code(write(two=two, one=b + top).top)


def test_what_is_installed_goes_by_its_name(write):
    sine, cosine = (f"from math import {name} as f\ndef top(x): return f(x)" for name in ("sin", "cos"))
    assert code(write(one=sine).top) != code(write(one=cosine).top)
    assert code(write(one="import math\ndef top(x): return math.sin(x)").top) == code(write(one=sine).top)


def test_what_is_put_in_the_place_of_a_function_or_a_value_counts(write, monkeypatch):
    one = write(one="LIMIT = 3\ndef helper(): return LIMIT\ndef top(): return helper()")
    before = code(one.top)
    with monkeypatch.context() as patch:
        patch.setattr(one, "helper", lambda: 4)
        assert code(one.top) != before
    with monkeypatch.context() as patch:
        patch.setattr(one, "LIMIT", 4)
        assert code(one.top) != before
    assert code(one.top) == before


def test_a_method_that_is_put_into_a_class_counts(write, monkeypatch):
    """What a network computes is its class's forward pass, whoever put it there."""
    net = "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x): return x\n"
    one = write(one=net + "def other(self, x): return -x\ndef top(): return Net()")
    for kind, key in ((one.Net, lambda: code(one.top)), (nn.ReLU, lambda: content(nn.ReLU()))):
        before = key()
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", one.other)
            assert key() != before
        assert key() == before


def test_a_class_that_no_module_holds_is_not_one_of_python_s():
    exec("class A:\n    def f(self): return 1\n", space := {})
    with pytest.raises(KeysError, match="source"):
        content(space["A"])


def test_a_file_that_is_edited_while_a_process_runs_is_that_of_its_import(write, tmp_path):
    """The process runs the old code: its results must not lie under the new code's key, nor be lost."""
    one = write(one="def top(): return 1\n")
    before = code(one.top), script("import one; one.top()")
    (tmp_path / "one.py").write_text("# moved\ndef top(): return 2\n")
    assert code(one.top) == before[0]
    assert script("import one; one.top()") != before[1]  # another process will import the new one
    again = importlib.reload(one)
    assert code(again.top) == code(write(one="def top(): return 2\n").top) != before[0]


def test_a_file_that_was_edited_before_anybody_looked_is_refused(write, tmp_path):
    one = write(one="from torch import Tensor\ndef top(): return 1\n")
    (tmp_path / "one.py").write_text("from torch import Tensor\ndef top(): return 2\n")
    with pytest.raises(KeysError, match=r"one.py was changed after it was imported: restart the kernel"):
        code(one.top)
    (tmp_path / "one.py").write_text("from torch import Tensor\ndef top(): return 1  # why\n")
    assert code(importlib.reload(one).top)


def test_names_that_do_not_count(write):
    text = "class Set:\n    def project(self, w): return w\n    def bits(self, z): return 1\n"
    texts = text, text.replace("1", "2"), text.replace("w\n", "-w\n")
    keys = [code(write(one=t).Set, without=("bits",)) for t in texts]
    assert keys[0] == keys[1] != keys[2]
    assert code(write(one=text).Set) != code(write(one=text.replace("1", "2")).Set)


# --- code in notebooks ------------------------------------------------------------------------------------------------


@pytest.fixture
def cell():
    """Run source as a notebook's kernel does, which keeps its text."""
    compiler = CachingCompiler()

    def cell(source, **variables):
        space = {"__name__": "__main__"} | variables
        exec(compile(source, compiler.cache(source), "exec"), space)
        return space

    return cell


IN_A_CELL = {
    "a function": "def own(w): return w > 1",
    "a lambda": "own = lambda w: w > 1",
    "one of several lambdas on a line": "own, other = lambda w: w > 1, lambda w: w > 3",
    "a class": "class own:\n    def select(self, w): return w > 1",
    "an attribute of a class": "class own:\n    limit = 1\n    def select(self, w): return w > self.limit",
    "a class without methods": "class own:\n    limit = 1",
    "a hidden attribute": "class own:\n    _limit = 1",
    "an enumeration": "from enum import Enum\nclass own(Enum):\n    LIMIT = 1",
    "a member of an enumeration": "from enum import Enum\nclass Kind(Enum):\n    A = 1\ndef own(w): return Kind.A",
    "a class's base": "class Base:\n    def select(self, w): return w > 1\nclass own(Base): pass",
    "a class in a function": "def make(x):\n    class own:\n        def select(self, w): return w > x\n    return own\n"
    "own = make(1)",
    "another function": "def helper(w): return w > 1\ndef own(w): return helper(w)",
    "a variable": "limit = 1\ndef own(w): return w > limit",
    "a variable of a class": "limit = 1\nclass own:\n    def select(self, w): return w > limit",
    "a field": "from dataclasses import dataclass\n@dataclass\nclass own:\n    limit: int = 1\n    def f(self): 0",
    "a tensor": "import torch\nlimit = torch.tensor(1)\ndef own(w): return w > limit",
    "a property": "class own:\n    @property\n    def limit(self): return 1",
    "a property that is kept": "import functools as f\nclass own:\n    @f.cached_property\n    def own(self): return 1",
}


@pytest.mark.parametrize("kind", IN_A_CELL)
def test_a_notebook_s_definitions_count_by_their_text_and_variables(kind, cell):
    source = IN_A_CELL[kind]
    before = code(cell(source)["own"])
    assert code(cell(f"# why\n\n{source}  # why")["own"]) == before
    assert code(cell(source.replace("1", "2"))["own"]) != before
    assert code(cell(f"{source}\nunrelated = 5")["own"]) == before


def test_lambdas_on_a_line_are_told_apart(cell):
    found = cell("fs = [lambda w: w > 3, lambda w: w, lambda w: [w > 3], lambda: (lambda w: w), lambda w: w > 4]")["fs"]
    assert len({code(f) for f in found}) == 5
    assert code(found[0]) == code(cell("f = lambda w: w > 3")["f"])


def test_what_a_notebook_imports_is_followed(cell):
    both = "from lib import training\nfrom lib.training import fit as f"
    calls = "f", "training.fit", "training.evaluate"
    one, two, three = (code(cell(f"{both}\ndef own(*x): return {call}(*x)")["own"]) for call in calls)
    assert one == two != three


def test_equal_variables_are_the_same_however_python_keeps_them(cell):
    text = "def own(): return a, b"
    shared, apart = cell(f"a = b = (300, 'x y')\n{text}"), cell(text, a=(300, "x y"), b=(int("300"), "x" + " y"))
    assert shared["a"] is shared["b"]
    assert apart["a"] is not apart["b"]
    assert code(shared["own"]) == code(apart["own"])


SCRIPT = """
import os, sys
sys.path.insert(0, {project!r})
from lib.keys import code, content

RATE = 0.05
RATES = dict(on=1, off=2)

class Device:
    exponent = 0.05

    def disturb(self, cells):
        return cells * RATE

def drift(cells):
    return cells * RATE + RATES["on"] + sum(later)

later = [1]
keys = [code(drift)]
{change}
keys.append(code(drift))
devices = [content(Device())]
Device.exponent = 0.3
devices.append(content(Device()))
Device.exponent = 0.05
devices.append(content(Device()))
print(keys[0] == keys[1], devices[0] == devices[1], devices[0] == devices[2])
"""


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("pass", True),
        ("RATE = 0.3", False),
        ("for RATE in (0.1, 0.3): pass", False),
        ("RATES['on'] = 3", False),
        ("later += [2]", False),
        ("globals()['RATE'] = 0.3", False),
        ("os.environ['X'] = 'y'", True),
    ],
)
def test_a_script_s_variables_and_classes_count_by_what_they_hold(change, same, tmp_path):
    """A script still runs: what its text says of a variable is not what it holds now."""
    (tmp_path / "mine.py").write_text(SCRIPT.format(project=str(PROJECT), change=change))
    done = subprocess.run([sys.executable, tmp_path / "mine.py"], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(same), "False", "True"], done.stderr


@pytest.mark.parametrize("nu", ["nu", "_nu"])
def test_what_is_put_in_the_place_of_a_class_s_value_counts(nu, write, cell):
    text = f"class Device:\n    {nu} = 0.05\n    def disturb(self, cells): return cells * self.{nu}\n"
    for device in (write(mine=text).Device, cell(text)["Device"]):
        keys = [code(device)]
        for value in (0.3, 0.05):
            setattr(device, nu, value)
            keys.append(code(device))
        device.more = 1
        assert keys[0] == keys[2] != keys[1] != code(device) != keys[0]


def test_code_without_source_is_refused_by_name():
    space = {"__name__": "__main__"}
    exec("def own(w): return w", space)
    with pytest.raises(KeysError, match="own has no source of its own: write it in a file or a cell"):
        code(space["own"])


def test_a_notebook_s_variable_that_cannot_be_told_is_named(cell):
    found = cell("stream = (i for i in range(3))\ndef own(): return next(stream)")
    with pytest.raises(KeysError, match=r"two generator are the same \(stream\)"):
        code(found["own"])


@pytest.mark.parametrize("held", ["{'of': lambda: room.Set()}", "room.Set()", "[room.Set]"])
def test_what_a_file_defines_is_a_variable_s_by_name_and_code_s_by_what_it_says(held, write, cell):
    """Else an edit of a class in `lib` would lose every row of a notebook that keeps one in a variable."""

    def kept(limit, held=held):
        write(room=f"class Set:\n    def select(self, w): return w > {limit}\nclass Other: pass")
        return apart(cell(f"import room\nheld = {held}\ndef own(w): return held")["own"])

    (code_1, variables_1), (code_2, variables_2) = kept(1), kept(2)
    assert variables_1 == variables_2
    assert variables_1.keys() == {"held"}
    assert code_1 != code_2
    assert kept(1) == (code_1, variables_1) != kept(1, held.replace("Set", "Other"))
    assert kept(1)[1] != kept(1, f"[{held}]")[1]


# --- values -----------------------------------------------------------------------------------------------------------


class Color(Enum):
    RED = 1
    BLUE = 2


Point = namedtuple("Point", "x y")


@dataclass(frozen=True)
class Set:
    size: int = 1
    parts: tuple = ()

    @functools.cached_property
    def doubled(self):
        return 2 * self.size


@dataclass(frozen=True, slots=True)
class Slotted:
    size: int = 1


class Plain:
    def __init__(self, size):
        self.size = size


def used(value):
    assert value.doubled
    return value


DIFFERENT = [
    (0, 0.0, False, None, "", "0", -0.0, float("nan"), float("inf"), 1, True, 1.0, 1j, (), {}, set(), b"", ...),
    ([1, 2], [2, 1], [1, [2]], [[1], 2], ["1", 2], {1, 2}, {1: 2}, {"1": 2}, [1, 2, None], Point(1, 2), range(1, 2)),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2, "b": 1}, OrderedDict(a=1, b=3), [["a", 1], ["b", 2]]),
    (np.float32(0.1), 0.1, np.float16(0.1), np.array(0.1), np.array([0.1]), torch.tensor(0.1)),
    (np.arange(3), np.arange(3.0), np.arange(3)[:, None], np.arange(4), [0, 1, 2], torch.arange(3)),
    (
        torch.zeros(2),
        torch.zeros(2, 1),
        torch.zeros(2).double(),
        torch.zeros(2).bfloat16(),
        torch.ones(2),
        torch.zeros(0),
    ),
    (torch.zeros(2), torch.zeros(2, requires_grad=True), torch.zeros(2, dtype=torch.cfloat), torch.zeros(2).bool()),
    (Color.RED, Color.BLUE, Color, Set(), Set(2), Set(1, (Set(),)), Set, Slotted(), Slotted(2), Plain(1), Plain(2)),
    (functools.partial(max, 1), functools.partial(max, 2), functools.partial(min, 1), max, min, torch.relu, torch.tanh),
    (nn.functional.relu, nn.functional.gelu, nn.ReLU, nn.ReLU(), nn.GELU(), nn.ReLU(inplace=True)),
    (torch.float32, torch.float64, torch.device("cpu"), torch.device("meta"), torch.Size([1]), np.dtype("i4")),
    (pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [2]}), pd.DataFrame({"b": [1]}), pd.Series([1])),
    (np.random.default_rng(0), np.random.default_rng(1)),
    tuple(torch.Generator().manual_seed(seed) for seed in (0, 1)),
]
EQUAL = [
    ([1, 2], (1, 2)),
    (3, np.int64(3)),
    (0.5, np.float64(0.5)),
    (True, np.True_),
    ({"b", "a", "c"}, {"c", "b", "a"}, set("abc")),
    (frozenset([max, min]), frozenset([min, max])),
    (Set(3), Set(np.int64(3)), replace(Set(1), size=3), used(Set(3))),
    (torch.zeros(2, 3), torch.zeros(3, 2).T, torch.zeros(2, 6)[:, ::2]),
    (pd.DataFrame({"a": [1], "b": [2]}), pd.DataFrame({"a": [1]}).assign(b=2), pd.DataFrame([[1, 2]], columns=[*"ab"])),
    (nn.Linear, torch.nn.modules.linear.Linear),
]


@pytest.mark.parametrize("values", DIFFERENT, ids=range(len(DIFFERENT)))
def test_different_values_are_told_apart(values):
    keys = [content(value) for value in values]
    assert len({*keys}) == len(keys)
    assert keys == [content(value) for value in values]


@pytest.mark.parametrize("values", EQUAL, ids=range(len(EQUAL)))
def test_equal_values_are_the_same(values):
    assert len({content(value) for value in values}) == 1


def test_a_file_is_what_it_holds(tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(text)
    a, b, c = (content(tmp_path / name) for name in "abc")
    assert a == b != c
    with pytest.raises(KeysError, match=r"cannot tell when two PosixPath are the same \(\[0\]\): .* is no file"):
        content([tmp_path])


def test_what_cannot_be_told_is_named():
    net = nn.Sequential(nn.Linear(1, 1))
    net[0].stream = (i for i in range(3))
    with pytest.raises(KeysError, match=r"two generator are the same \(_modules\['0'\]\.stream\): cannot pickle"):
        content(net)
    with pytest.raises(KeysError, match=r"two Tensor are the same"):
        content(torch.zeros(2, device="meta"))


def test_circles_end():
    ring, net, other = [1], nn.Sequential(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1))
    ring.append(ring)
    net[0].parent = [net]
    other.load_state_dict(net.state_dict())
    assert content(ring) == content(ring)
    assert content(net) == content(deepcopy(net)) != content(other)


def network(**attributes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    vars(net[1]).update(attributes)
    return net


def changed(change):
    net = network()
    change(net)
    return net


def add_one(module, inputs, output):
    return output + 1


def add_two(module, inputs, output):
    return output + 2


def tie(net):
    net[3].weight = net[1].weight


def tie_values(net):
    net[3].weight.data = net[1].weight.data


def equal_values(net):
    net[3].weight.data.copy_(net[1].weight.data)


NETWORKS = {
    "": lambda net: None,
    "another seed": lambda net: net[1].reset_parameters(),
    "a weight": lambda net: net[1].weight.data[0, 0].add_(1e-6),
    "another weight": lambda net: net[1].bias.data[0].add_(1e-6),
    "a buffer": lambda net: net[2].running_mean.add_(1),
    "an attribute": lambda net: setattr(net[1], "factor", 1.0),
    "another attribute": lambda net: setattr(net[1], "factor", 2.0),
    "an attribute in a list": lambda net: setattr(net[1], "factor", [1.0, {"a": 1}]),
    "another attribute in a list": lambda net: setattr(net[1], "factor", [1.0, {"a": 2}]),
    "a tensor that is no buffer": lambda net: setattr(net[1], "factor", torch.ones(1)),
    "a buffer that is not saved": lambda net: net[1].register_buffer("factor", torch.ones(1), persistent=False),
    "another buffer that is not saved": lambda net: net[1].register_buffer("factor", torch.zeros(1), persistent=False),
    "a function": lambda net: setattr(net[1], "factor", add_one),
    "another function": lambda net: setattr(net[1], "factor", add_two),
    "its own forward": lambda net: setattr(net[1], "forward", add_one),
    "a built-in attribute": lambda net: setattr(net[2], "momentum", 0.2),
    "another built-in attribute": lambda net: setattr(net[2], "eps", 0.2),
    "frozen": lambda net: net[1].requires_grad_(False),
    "frozen in part": lambda net: net[1].bias.requires_grad_(False),
    "frozen norms": lambda net: net[2].eval(),
    "evaluation": lambda net: net.eval(),
    "tied": tie,
    "tied values": tie_values,
    "equal": equal_values,
    "a forward hook": lambda net: net[1].register_forward_hook(add_one),
    "another forward hook": lambda net: net[1].register_forward_hook(add_two),
    "a hook elsewhere": lambda net: net[3].register_forward_hook(add_one),
    "two hooks": lambda net: [net[1].register_forward_hook(f) for f in (add_one, add_two)],
    "two hooks in turn": lambda net: [net[1].register_forward_hook(f) for f in (add_two, add_one)],
    "a hook before": lambda net: net[1].register_forward_pre_hook(lambda module, inputs: inputs),
    "a backward hook": lambda net: net[1].register_full_backward_hook(lambda module, a, b: None),
    "a hook of a weight": lambda net: net[1].weight.register_hook(lambda grad: 2 * grad),
    "another hook of a weight": lambda net: net[1].weight.register_hook(lambda grad: 3 * grad),
    "an attribute of a weight": lambda net: setattr(net[1].weight, "factor", 2),
    "a parametrization": lambda net: parametrizations.orthogonal(net[1]),
    "another parametrization": lambda net: parametrizations.weight_norm(net[1]),
    "double": lambda net: net.double(),
    "another order": lambda net: net.append(net.pop(1)),
}


def test_networks_are_told_apart_by_all_that_they_hold():
    keys = {name: content(changed(change)) for name, change in NETWORKS.items()}
    twins = {frozenset(n for n in keys if keys[n] == key) for key in keys.values()}
    assert {t for t in twins if len(t) > 1} == {frozenset(["tied", "tied values"])}
    lost = {"tied values", "an attribute of a weight", "a hook of a weight", "another hook of a weight"}  # by copies
    for name, change in NETWORKS.items():
        assert content(changed(change)) == keys[name]
        assert (content(deepcopy(changed(change))) == keys[name]) == (name not in lost)


def test_gradients_hooks_that_were_removed_and_the_device_s_memory_do_not_count():
    net = network()
    net(torch.ones(2, 4)).sum().backward()
    net[1].register_forward_hook(add_one).remove()
    fresh = network()
    fresh[2].load_state_dict(net[2].state_dict())
    assert content(net) == content(fresh)


class Net(nn.Module):
    def __init__(self, rate=1):
        super().__init__()
        self.layer, self.rate = nn.Linear(1, 1), rate

    def forward(self, x):
        return self.rate * self.layer(x)


def test_the_source_of_every_class_of_ours_counts(write):
    text = "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x): return x + 1\n"
    inside = "from torch import nn\nfrom one import Net\ndef make(): return nn.Sequential(Net())"
    keys = [content(write(one=t, two=inside).make()) for t in (text, text.replace("1", "2"), f"# why\n{text}")]
    assert keys[0] == keys[2] != keys[1]


def test_a_network_and_one_that_holds_it_are_one(images):
    """A teacher that is the student itself moves with it."""
    net = Net()
    assert content(net, net) != content(net, deepcopy(net))
    assert content(net, images) == content(deepcopy(net), images)


def test_data_are_told_apart_by_their_tensors(images):
    other = replace(images, train=data.Split(images.train.x + 1, images.train.y))
    assert content(images) != content(other)
    assert content(images) == content(replace(images, name="by another name"))
    assert content(images.train) != content(images.test)


def test_another_process_finds_the_same():
    text = "content(training.fit, models.build('resnet8', (1, 28, 28), 10, width=2), {'a', 'b', 'c', max, min}, Adam)"
    names = "from torch.optim import Adam; from lib import models, training; from lib.keys import content"
    here = {}
    exec(f"{names}\nfound = {text}", here)
    ran = subprocess.run([sys.executable, "-c", f"{names}; print({text})"], capture_output=True, text=True, cwd=PROJECT)
    assert ran.stdout.strip() == here["found"], ran.stderr


# --- studies ----------------------------------------------------------------------------------------------------------


def referred(text):
    """The modules whose definitions a program refers to."""
    walk = Walk()
    walk.digest(walk.form(ast.parse(text), ""))
    return {key[0] for key in walk.numbers if isinstance(key, tuple)}


def test_a_study_depends_on_what_it_refers_to_and_not_on_what_is_imported():
    found = referred("from lib import plots, recipes, training\ntraining.cached(recipes.admm, net, plan, images)")
    assert {"lib.recipes.admm", "lib.training.loop", "lib.constraint.plans"} <= found
    assert not any(module.startswith(("lib.faults", "lib.pruning", "lib.costs", "lib.plots")) for module in found)
    assert "lib.recipes.reweighted" not in found


def test_what_only_presents_or_keeps_does_not_count():
    assert referred("from lib import plots\nfrom lib.study import open_study\nplots.show(open_study('x'))") == set()
    assert referred("from lib.study import Criterion\nCriterion('>=', 0)") == {"lib.study.claims"}


def test_prices_count_where_they_are_named(monkeypatch, tmp_path):
    from lib.keys import source

    texts = {
        "digital": "from lib.technology import table\ntable('digital')",
        "other": "from lib import data\ndata.load",
    }
    texts |= {"any": "from lib.technology import table\nname = input()\ntable(name)"}
    place = tmp_path / "lib" / "keys" / "source.py"
    shutil.copytree(PROJECT / "data" / "technology", tmp_path / "data" / "technology")
    monkeypatch.setattr(source, "__file__", str(place))
    before = {name: script(text) for name, text in texts.items()}
    with (tmp_path / "data" / "technology" / "timely.csv").open("a") as file:
        file.write("new,row\n")
    assert [name for name, text in texts.items() if script(text) != before[name]] == ["any"]
    with (tmp_path / "data" / "technology" / "digital.csv").open("a") as file:
        file.write("new,row\n")
    assert [name for name, text in texts.items() if script(text) != before[name]] == ["digital", "any"]


# --- Pythons ----------------------------------------------------------------------------------------------------------

SAMPLE = '''
"""Of all syntax that is read differently by one version or another."""
from dataclasses import dataclass
class A(B, metaclass=C):
    """Says."""
    x: int = 1
    ys: "list[int]" = field(default_factory=lambda: [i for i in range(LIMIT)])
    names = {k: v for k, v in TABLE.items() if k}
    def f(self, a, /, b: int = 2, *c, d=f"{LIMIT!r:>{WIDTH}} {'x' + y} {{}} \\n", **e) -> None:
        async def g(): return [x async for x in y]
        with open(a) as file, lock: yield from (z := lambda *q: (q, -1, 1e400, 2j, b"\\xff", ..., True, None))
        match a:
            case {"k": [1, *rest], **other} | P(x=2) as whole if whole: del b[1:2, ::3]
            case _: raise E from None
        try: return a if b else not c
        except* (E, F) as error: assert a @ b, 'said'
        for i, (j, k) in x: print(f"a" "b" f'{i}')
        else: nonlocal_ = 1 < 2 <= 3 is not 4
        said = f"{a:}{b=}{c!r:^{d}.{e}}" 'f' f"g{{{h:{i}}}}" rf"\\d{j}" f"", f"{k:%Y-%m}", "" f""
        return *a, {**b, 'c': {1, *d}}
'''


PYENV = sorted(Path.home().glob(".pyenv/versions/3.1[123].*/bin/python"))


def test_every_python_says_the_same():
    """The digest is that of Python 3.11, 3.12 and 3.13, and those of them that are there are asked again."""
    program = (
        "import ast, hashlib, json, sys; from pathlib import Path; from importlib import util\n"
        "spec = util.spec_from_file_location('source', sys.argv[1]); source = util.module_from_spec(spec)\n"
        "sys.modules['source'] = source; spec.loader.exec_module(source); digest = hashlib.sha256()\n"
        "for text in [sys.stdin.read(), *(p.read_text('utf-8') for p in sorted(Path(sys.argv[2]).rglob('*.py')))]:\n"
        "    digest.update(json.dumps([source.said(n) for n in ast.parse(text).body]).encode())\n"
        "    print(digest.hexdigest()[:16])\n"
    )
    words = ["-c", program, str(PROJECT / "lib" / "keys" / "source.py"), str(PROJECT / "lib" / "keys")]
    found = {}
    for python in (sys.executable, *(shutil.which(f"python3.{minor}") for minor in (11, 12, 13)), *PYENV):
        if python and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            ran = subprocess.run([python, *words], input=SAMPLE, capture_output=True, text=True, encoding="utf-8")
            assert ran.returncode == 0, ran.stderr
            found[python] = ran.stdout.split()
    assert {digests[0] for digests in found.values()} == {"e4d27997c23a445f"}
    assert len({tuple(digests) for digests in found.values()}) == 1


@dataclass(frozen=True)
class Weighted(data.Split):
    weight: float = 1.0


def test_what_a_data_set_holds_beside_counts():
    x, y = torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)
    assert content(Weighted(x, y, weight=1.0)) != content(Weighted(x, y, weight=2.0))
    assert content(Weighted(x, y)) == content(Weighted(x.clone(), y.clone()))
    assert content(data.Split(x, y)) == content(data.Split(x.clone(), y.clone()))
