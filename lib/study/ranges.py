"""What a parameter may hold, read from the words at the end of its comment, which a refusal repeats.

Of one value these are ``1 or more``, ``> 0``, ``in [0, 1)``, a value itself, ``like 1x8`` (the same with other whole
numbers from 1), ``a data set``, ``a model``, ``a folder``, ``empty``, ``any text``, or several: ``0 or > 1``, ``nodal,
series or line``. Of a list they are ``each`` and the same, before it ``at least 2``, ``exactly 3`` or ``any number``
(at least 1 where nothing is said), after it ``distinct`` or ``rising``. There is no ``=`` in them: Papermill's help
leaves out a parameter with one in its comment.
"""

import math
import re
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import yaml

from lib import data, models

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_NAMED = {"a data set": data.check_name, "a model": models.builder, "a folder": data.data_root}

Refusal = Callable[[Any], str]  # of a value: what is wrong with it, "" if nothing is


class ParameterError(ValueError):
    """What a study was given is unknown, of the wrong type or out of range. Notebooks show it as one line.

    >>> from lib.study import declared
    >>> declared("99_none")
    Traceback (most recent call last):
        ...
    lib.study.ranges.ParameterError: study '99_none' is unknown: allowed are 00_start_here, ...
    """

    def _render_traceback_(self) -> list[str]:  # IPython's own protocol for a short display
        return [f"ParameterError: {self}"]


def read(value: Any, kind: str) -> Any:
    """Text as a value of the declared type, so that no file's or command line's own rules matter; else it as it is."""
    if kind.startswith("list["):
        if isinstance(value, str):
            try:
                value = yaml.load(value, yaml.BaseLoader)  # which leaves every item text
            except yaml.YAMLError:
                return value
        return [read(item, kind[5:-1]) for item in value] if isinstance(value, list) else value
    if isinstance(value, str):
        if kind == "int" and re.fullmatch(r"[-+]?\d+", value):
            return int(value)
        if kind == "float" and re.fullmatch(_NUMBER, value):
            return float(value)
        if kind == "bool" and value.lower() in ("true", "false"):
            return value.lower() == "true"
    if kind == "int" and isinstance(value, Integral) and not isinstance(value, bool):  # numpy's too
        return int(value)
    return float(value) if kind == "float" and isinstance(value, Real) and not isinstance(value, bool) else value


def has_type(value: Any, kind: str) -> bool:
    """Whether a value is an ``int``, ``float``, ``str`` or ``bool``, or a list of one: ``list[int]``."""
    if kind.startswith("list["):
        return isinstance(value, list) and all(has_type(item, kind[5:-1]) for item in value)
    return type(value).__name__ == kind


def refusal(words: str, kind: str) -> Refusal:
    """What the words of a range refuse, of values that have the type.

    Raises:
        ParameterError: no range of that type can be read from the words.
    """
    if kind.startswith("list["):
        return _of_list(words, kind[5:-1])
    tests = [_test(part, kind) for part in re.split(r", (?![^\[(]*[\])])| or (?!more)", words)]

    def refused(value: Any) -> str:
        said = f"expected {words}"
        for test in tests:
            try:
                if test(value) is not False:
                    return ""
            except ValueError as error:  # which knows the names that there are
                said = str(error)
        return said

    return refused


def _of_list(words: str, kind: str) -> Refusal:
    parts = re.fullmatch(r"(?:(any number|(?:at least|exactly) \d+), )?each (.+?)(?:, (distinct|rising))?", words)
    if not parts:
        raise ParameterError(f"no range of list[{kind}] can be read from {words!r}")
    count, each, order = parts[1] or "at least 1", refusal(parts[2], kind), parts[3]
    number = int("".join(filter(str.isdigit, count)) or 0)

    def refused(values: list) -> str:
        right = len(values) == number if count.startswith("exactly") else len(values) >= number
        right &= order is None or len({*values}) == len(values)
        right &= order != "rising" or values == sorted(values)
        said = next(filter(None, map(each, values)), "") if right else "expected"
        return f"expected {words if parts[1] else f'{count}, {words}'}" if said.startswith("expected") else said

    return refused


def _test(words: str, kind: str) -> Callable[[Any], Any]:
    if kind in ("int", "float"):
        if least := re.fullmatch(rf"({_NUMBER}) or more", words):
            return lambda v: float(least[1]) <= v < math.inf
        if above := re.fullmatch(rf"> ({_NUMBER})", words):
            return lambda v: float(above[1]) < v < math.inf
        if ends := re.fullmatch(rf"in ([\[(])({_NUMBER}), ({_NUMBER})([\])])", words):
            low, high = float(ends[2]), float(ends[3])
            return lambda v: low <= v <= high and (v != low or ends[1] == "[") and (v != high or ends[4] == "]")
        if re.fullmatch(_NUMBER, words):
            return lambda v: v == float(words)
    elif kind == "str" and words:
        if words.startswith("like "):
            pattern = re.sub(r"\d+", r"[1-9]\\d*", re.escape(words.removeprefix("like ")))
            return lambda v: bool(re.fullmatch(pattern, v))
        own = {"any text": lambda v: True, "empty": lambda v: v == ""} | _NAMED
        return own.get(words, lambda v: v == words)
    raise ParameterError(f"no range of {kind} can be read from {words!r}")
