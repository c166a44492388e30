"""Measurements, what an experiment returned and where from, and the tables that hold them."""

import csv
import io
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any
from zlib import crc32

import pandas as pd

from lib.files import write_whole

Row = dict[str, Any]

STAMPS = ("point", "code", "commit", "device", "torch", "seconds", "audited")
"""Columns of a table that say where a row is from."""

LAST = ("nth", "check")
"""Columns after them: which of how many rows of a measurement this is, and a checksum of the whole row."""

READ = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?inf(inity)?|nan|true|false", re.IGNORECASE)


class MeasurementError(ValueError):
    """What an experiment takes or returns cannot be kept in a table, or a table holds what it should not.

    >>> from lib.study.tables import plain
    >>> plain({"rates": [0.1, 0.2]}, "an argument")
    Traceback (most recent call last):
        ...
    lib.study.tables.MeasurementError: an argument, rates = [0.1, 0.2]: expected a number, a truth value or text
    """

    def _render_traceback_(self) -> list[str]:  # IPython's own protocol for a short display
        return [f"MeasurementError: {self}"]


@dataclass(frozen=True)
class Measurement:
    """What one call of an experiment returned, and where from.

    Attributes:
        experiment: the function's name. rows: its arguments and what it returned.
        point: a hash of the arguments and of the variables that the function refers to.
        code: a hash of all code that it depends on (see `lib.keys`); "" where nobody knows it any more.
        seconds: that the call took. audited: what was measured again since, in words; "" if nothing was.
    """

    experiment: str
    rows: tuple[Row, ...]
    point: str
    code: str
    commit: str = ""
    device: str = ""
    torch: str = ""
    seconds: float = nan
    audited: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What was measured, whatever the code."""
        return self.experiment, self.point


def plain(row: Row, what: str) -> Row:
    """A row's values as they come back from a table: Python's own numbers, truth values and text.

    Raises:
        MeasurementError: another value, or text that a reader of the table would take for one of these.
    """
    found = {}
    for name, value in row.items():
        value = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
        value = nan if value is None else value
        if not isinstance(value, bool | int | float | str):
            raise MeasurementError(f"{what}, {name} = {value!r:.60}: expected a number, a truth value or text")
        if isinstance(value, str) and (READ.fullmatch(value) or value != value.strip() or not value.isprintable()):
            raise MeasurementError(f"{what}, {name} = {value!r:.60}: as text it would not be told from another value")
        if value != "":  # which a table cannot tell from a column that a row does not have
            found[name] = value
    return found


def rows_of(returned: Any, arguments: Row, experiment: str) -> tuple[Row, ...]:
    """What an experiment returned (a row, rows, or a data frame) with its arguments before it.

    Raises:
        MeasurementError: something else, no row, or a column with the name of an argument or of a stamp.
    """
    if isinstance(returned, pd.DataFrame):
        returned = returned.to_dict("records")
    rows = [returned] if isinstance(returned, dict) else returned
    if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, dict) for row in rows):
        raise MeasurementError(f"{experiment} returned {returned!r:.60}: expected a row (a dict), or a list of rows")
    if taken := {*arguments, *STAMPS, *LAST, "experiment"} & {name for row in rows for name in row}:
        raise MeasurementError(
            f"{experiment} returned a column {min(taken)!r}, which is an argument's or a table's own"
        )
    return tuple(arguments | plain(row, f"a row of {experiment}") for row in rows)


def read_table(path: Path) -> list[Measurement]:
    """The measurements of a table; what is damaged or said twice is set aside in ``damaged/`` beside it, aloud.

    Raises:
        MeasurementError: a file that is no such table. OSError: it cannot be read, or the folder not be written.
    """
    try:
        lines = [*csv.reader(io.StringIO(path.read_text("utf-8")), strict=True)]
    except (ValueError, csv.Error) as error:
        raise MeasurementError(f"{path.name} is no table of measurements: {error}") from None
    head = lines[0] if lines else []
    own = slice(1, len(head) - len(STAMPS) - len(LAST))
    if head[:1] != ["experiment"] or (*head[own.stop :],) != (*STAMPS, *LAST) or len({*head}) < len(head):
        raise MeasurementError(f"{path.name} is no table of measurements: its first line has other columns")
    aside, found = [], {}
    parts: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for line in lines[1:]:
        if len(line) != len(head) or line[-1] != _check(head, line):
            aside.append(line)
            continue
        rows = parts.setdefault((line[0], *line[own.stop : -len(LAST)]), {})
        if rows.setdefault(line[-2], line) != line:
            aside.append(line)
    for stamps, rows in parts.items():
        whole = {f"{i + 1}/{len(rows)}" for i in range(len(rows))} == {*rows}
        values = [
            {k: _value(v) for k, v in zip(head[own], line[own], strict=True) if v != ""}
            for _, line in sorted(rows.items(), key=lambda row: int(row[0].partition("/")[0]) if whole else 0)
        ]
        told = dict(zip(STAMPS, stamps[1:], strict=True))
        m = Measurement(stamps[0], (*values,), **told | {"seconds": float(told["seconds"] or nan)})
        newer = _newer(found.get(m.key, m), m) if whole else None
        if newer is None:
            aside += rows.values()
        else:
            found[m.key] = newer
    if aside:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([head, *aside])
        write_whole(path.parent / "damaged" / path.name, text.getvalue())
        warnings.warn(
            f"{path.name}: {len(aside)} of {len(lines) - 1} rows are damaged, without their others, or differ from "
            f"others of the same point: set aside in damaged/{path.name}, the first {','.join(aside[0])[:50]}",
            stacklevel=2,
        )
    return [*found.values()]


def write_table(path: Path, measurements: Iterable[Measurement]) -> None:
    """Write a table of measurements, whole.

    Raises:
        OSError: it cannot be written.
    """
    measurements = [*measurements]
    columns = dict.fromkeys(name for m in measurements for row in m.rows for name in row)
    head = ["experiment", *columns, *STAMPS, *LAST]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for m in measurements:
        stamps = [_text(getattr(m, name)) for name in STAMPS]
        for i, row in enumerate(m.rows, 1):
            line = [m.experiment, *(_text(row.get(name, "")) for name in columns), *stamps, f"{i}/{len(m.rows)}"]
            writer.writerow([*line, _check(head, line)])
    write_whole(path, text.getvalue())


def merge(table: Path, other: Path) -> tuple[int, int]:
    """Add another table's measurements to one: those of points that it has not, and newer ones of those that it has.

    A measurement of code that is still known is newer than one of code that nobody knows any more. Of two others that
    differ nobody can tell which is newer: the table's own stays, aloud.

    Returns:
        How many were added, and how many of the table's own they replace.

    Raises:
        MeasurementError, OSError: as in `read_table`.
    """
    own = {m.key: m for m in read_table(table)} if table.is_file() else {}
    found, left = dict(own), []
    for m in read_table(other):
        newer = _newer(own[m.key], m) if m.key in own else m
        left += [m] * (newer is None)
        found[m.key] = newer or own[m.key]
    if left:
        warnings.warn(
            f"{table.name}: {len(left)} measurements differ in {other}, and no code is known to be the newer one: left "
            f"as they were, the first {left[0].experiment}({left[0].rows[0]})",
            stacklevel=2,
        )
    write_table(table, found.values())
    return len(found) - len(own), sum(found[key] is not m for key, m in own.items())


def _newer(own: Measurement, other: Measurement) -> Measurement | None:
    """Of two measurements of a point the one whose code is known, else the first if they agree; None: who can tell?"""
    if bool(own.code) != bool(other.code):
        return own if own.code else other
    return own if repr(own.rows) == repr(other.rows) else None


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _value(text: str) -> Any:
    if not READ.fullmatch(text):
        return text
    if text in ("True", "False"):
        return text == "True"
    try:
        return int(text)
    except ValueError:
        return float(text)


def _check(head: Sequence[str], line: Sequence[str]) -> str:
    """A checksum of the cells that a row has, by column, so that a new column of other rows changes nothing."""
    cells = [f"{name}={cell}" for name, cell in zip(head[:-1], line, strict=False) if cell != ""]
    return f"{crc32(chr(10).join(sorted(cells)).encode()):08x}"
