"""A study's parameters: what its notebook declares and requires of them, and the refusal of anything else."""

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager

from lib import data, models
from lib.keys import code
from lib.study.ranges import ParameterError, Refusal, has_type, read, refusal

PROJECT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = PROJECT / "notebooks"


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: ``name: type = default  # what it means; range``, see `lib.study.ranges`."""

    name: str
    type: str
    default: Any
    help: str

    @property
    def range(self) -> str:
        """The words of its range, "" where the comment has none."""
        return self.help.rpartition("; ")[2] if "; " in self.help else ""

    @property
    def refused(self) -> Refusal:
        """What is wrong with a value of its type, "" if nothing is; a truth value needs no range.

        Raises:
            ParameterError: the comment has no range of that type.
        """
        return refusal(self.range, self.type) if self.type != "bool" else lambda value: ""


def studies() -> list[str]:
    """The names of all study notebooks, in order: of ``NN_name.ipynb``, not of JupyterLab's ``NN_name-Copy1.ipynb``.

    >>> from lib.study import studies
    >>> studies()[:2]
    ['00_start_here', '01_lottery_ticket_vs_finetuning']
    """
    return sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb") if re.fullmatch(r"\d\d_\w+", p.stem))


def _cells(study: str) -> list[tuple[str, str, list[str]]]:
    """Kind, source and tags of every cell. Read as JSON: nbformat's check takes a kernel seconds before it begins."""
    path = NOTEBOOKS / f"{study}.ipynb"
    if study not in studies():
        raise ParameterError(f"study {study!r} is unknown: allowed are {', '.join(studies())}")
    try:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        return [(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", [])) for c in cells]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ParameterError(f"{path.name} is no notebook: {str(error).splitlines()[0]}") from None


def question(study: str) -> str:
    """What a study asks: the paragraph of its first cell that begins with **Question.**

    >>> from lib.study import question
    >>> question("06_quantization")
    'Equal steps, three values, sums of three values, ...?'
    """
    return re.search(r"^\*\*Question\.\*\* (.+)$", _cells(study)[0][1], re.MULTILINE)[1].replace("*", "")


def python_of(study: str) -> str:
    """A notebook's code as Python: IPython's magics as calls, without cells that are none, as a kernel will say."""
    return _python(tuple(source for kind, source, _ in _cells(study) if kind == "code"))


@cache  # a batch asks more than once, and each time it takes a second for all studies
def _python(sources: tuple[str, ...]) -> str:
    found = []
    for source in sources:
        try:
            ast.parse(python := TransformerManager().transform_cell(source))
        except SyntaxError:
            continue
        found.append(python)
    return "".join(found)


def declared(study: str) -> dict[str, Parameter]:
    """The parameters that a study's notebook declares, by name.

    Raises:
        ParameterError: no such study, not exactly one parameters cell, or a line in it that is not
            ``name: type = literal  # what it means; range``.

    >>> from lib.study import declared
    >>> declared("01_lottery_ticket_vs_finetuning")["seeds"]
    Parameter(name='seeds', type='int', default=..., help='independent networks...')
    """
    cells = [source for _, source, tags in _cells(study) if "parameters" in tags]
    if len(cells) != 1:
        raise ParameterError(f"{study} has {len(cells)} cells tagged 'parameters'; it needs exactly one")
    found: dict[str, Parameter] = {}
    lines = cells[0].splitlines()
    try:
        nodes = ast.parse(cells[0]).body
    except SyntaxError as error:
        raise ParameterError(f"{study}: its parameters are no Python: {error}") from None
    for node in nodes:
        try:
            name, kind, value = node.target.id, ast.unparse(node.annotation), ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            raise ParameterError(f"{study}: {ast.unparse(node)!r} is not `name: type = literal`") from None
        help_ = lines[node.end_lineno - 1].partition("#")[2].strip()
        found[name] = Parameter(name, kind, value, help_)
        try:
            _ = found[name].refused
        except ParameterError as error:
            raise ParameterError(
                f"{study}, {name}: {error}; its comment ends with `; range`, say `; 1 or more`"
            ) from None
    return found


def check_parameters(study: str, given: dict[str, Any]) -> dict[str, Any]:
    """A study's defaults with ``given`` values over them, all checked: names, types, ranges, and how they fit together.

    Text is read as its declared type. What the notebook requires of several parameters (`Study.require`) is checked as
    far as it speaks of parameters alone; what needs more is left to the notebook's set-up cell.

    Raises:
        ParameterError: names the parameter, its value and what is expected.

    >>> from lib.study import check_parameters
    >>> check_parameters("01_lottery_ticket_vs_finetuning", {"sparsities": "[0.5, 0.9]"})["sparsities"]
    [0.5, 0.9]
    >>> check_parameters("01_lottery_ticket_vs_finetuning", {"sparsities": [1.5]})
    Traceback (most recent call last):
        ...
    lib.study.ranges.ParameterError: sparsities = [1.5]: expected ... each in [0, 1), distinct
    """
    known = declared(study)
    for name in given:
        if name not in known:
            raise ParameterError(f"parameter {name!r} is unknown in {study}: allowed are {', '.join(known)}")
    values = {name: read(given.get(name, p.default), p.type) for name, p in known.items()}
    for name, value in values.items():
        if not has_type(value, known[name].type):
            raise ParameterError(f"{name} = {value!r} is {type(value).__name__}: expected {known[name].type}")
        if said := known[name].refused(value):
            raise ParameterError(f"{name} = {value!r}: {said}")
    for rule in _rules(python_of(study)):
        try:
            name, holds, expected = (eval(part, dict(values)) for part in rule)
        except NameError:
            continue
        require(values, name, holds, expected)
    return values


def outside(study: str, values: dict[str, Any]) -> dict[str, str]:
    """What a study's parameters name that is no part of the project, with a hash of it: folders of data, own networks.

    >>> from lib.study.parameters import outside
    >>> outside("01_lottery_ticket_vs_finetuning", {"dataset": "mnist", "model": "lenet5"})
    {}
    """
    found = {}
    for name, parameter in declared(study).items():
        value = values.get(name, "")
        for each in filter(None, [value] if isinstance(value, str) else value if isinstance(value, list) else []):
            if "a data set" in parameter.range and each not in data.NAMES:
                found[each] = data.fingerprint(each)
            elif "a model" in parameter.range and models.own(each):
                found[each] = code(models.builder(each))
    return dict(sorted(found.items()))


def require(values: dict[str, Any], name: str, holds: bool, expected: str) -> None:
    """Refuse a parameter that does not fit the others.

    Raises:
        ParameterError: ``holds`` is false.
    """
    if not holds:
        raise ParameterError(f"{name} = {values[name]!r}: expected {expected}")


@cache
def _rules(python: str) -> list[list[CodeType]]:
    """The arguments of every ``study.require(name, holds, expected)`` of a notebook, compiled."""
    calls = (n for n in ast.walk(ast.parse(python)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute))
    asked = (call.args for call in calls if call.func.attr == "require")
    return [[compile(ast.Expression(part), "<require>", "eval") for part in parts] for parts in asked]


def injected(cells: Sequence[str]) -> list[str]:
    """Names that Papermill's injected cell assigns: IPython keeps the source of what ran."""
    sources = [c for c in cells if c.lstrip().startswith("# Parameters\n")]
    return [t.id for source in sources for node in ast.parse(source).body for t in getattr(node, "targets", [])]
