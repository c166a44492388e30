"""Experiments: functions of plain arguments, each call of which is made once, on whatever machine, and kept."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isclose
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from lib.files import Journal, cache_folder
from lib.keys import KeysError, apart, content
from lib.study.progress import Progress
from lib.study.ranges import ParameterError
from lib.study.tables import Measurement, MeasurementError, Row, plain, read_table, rows_of, write_table

Key = tuple[str, str]

ELSEWHERE = {"data_root", "report_dir", "threads", "processes"}
"""Parameters that say where and how fast something is made, not what."""


@dataclass(frozen=True)
class Audit:
    """What of the measurements that earlier code made is made again: of each experiment's a share, the quickest first.

    They are compared with what the earlier code measured on this machine, where it did; else with the table's.

    Args:
        share: above 0, up to 1. experiments: of these alone, by name; empty: of all.
        again: of what today's code made, not earlier code: for later audits on this machine, which then compare code
            with code. Another machine trains other networks, and whoever compares with them cannot tell.

    >>> from lib.study import Audit
    >>> Audit.of(str(Audit(0.05, ("tolerates",))))
    Audit(share=0.05, experiments=('tolerates',), again=False)
    """

    share: float
    experiments: tuple[str, ...] = ()
    again: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ParameterError(f"an audit of a share of {self.share}: allowed are shares above 0, up to 1")

    def chosen(self, old: Mapping[Key, Measurement]) -> list[Key]:
        """The quickest of every commit and machine: what one of these made says nothing of what another did."""
        groups: dict[tuple, list[Key]] = {}
        for key, m in old.items():
            groups.setdefault((m.code, m.commit, m.device, m.torch), []).append(key)
        unknown = {key: math.inf for key, m in old.items() if m.seconds != m.seconds}
        order = [sorted(keys, key=lambda key: unknown.get(key, old[key].seconds)) for keys in groups.values()]
        return [key for keys in order for key in keys[: math.ceil(self.share * len(keys))]]

    def __str__(self) -> str:  # as a batch tells it to a study
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, told: str) -> "Audit | None":
        """What a batch told; None for "", which is no audit."""
        return cls(**(held := json.loads(told)) | {"experiments": tuple(held["experiments"])}) if told else None


@dataclass
class Store:
    """The measurements of a study: a table of them, and this machine's journal.

    The journal, in the cache, takes each measurement as soon as it is made, from several processes at once. The table,
    ``reports/<preset>/results/<study>.csv``, is what a run begins with and what it publishes.

    Of data, a key knows the folders that are ``outside``; sets that ship are checked as they are loaded.
    Whatever else an experiment reads, as a text or recordings, it takes by name alone: one whose content may change
    under its name takes a checksum of it as an argument.

    Args:
        study: its name. table: where there is one. stamps: of new measurements: commit, device, torch.
        outside: by name, a hash of what the study's parameters name: folders of data, files of networks.
        earlier: whether the table's measurements that other code made are used, and kept where nobody asks for them.
        audit: which of these to measure again; None: no audit.
        closed: whether a point that was never measured is an error.

    >>> from lib.study.measurements import Store
    >>> def kept(seed, rate):
    ...     return {"kept": 1 / rate + seed}
    >>> frame = Store("09_mine").measure(kept, [{"seed": s, "rate": 4.0} for s in range(2)])
    {'text/plain': 'starting'}
    >>> frame["kept"].tolist()
    [0.25, 1.25]
    """

    study: str
    table: Path | None = None
    stamps: dict[str, str] = field(default_factory=dict)
    outside: Callable[[], dict[str, str]] = dict
    earlier: bool = False
    audit: Audit | None = None
    closed: bool = False

    def __post_init__(self) -> None:
        self.folder = cache_folder("measurements", self.study)
        self.journal = Journal("measurements", self.study)
        whole = self.table is not None and self.table.is_file()
        self.published: dict[Key, Measurement] = {m.key: m for m in read_table(self.table)} if whole else {}
        self.written: dict[tuple[Key, str], Measurement] = {}
        self.used: dict[Key, tuple[Measurement, bool]] = {}  # and whether today's code made it
        self.audits: list[Row] = []
        self.seen: dict[str, str] = {}  # what was outside when keys were last made
        self.memories: dict[Callable, str | None] = {}  # of the notebook, and what they were filled with

    def measure(self, experiment: Callable, points: Iterable[Row], timed: Sequence[str] = ()) -> pd.DataFrame:
        """What an experiment returns at each point, arguments first; a call that was made before is read.

        Its rows depend on its arguments, on the variables of the notebook that it refers to, and on code. Where
        another process is at a point, this one goes on from the other end and comes back. What was finished when a
        call fails is kept.

        Args:
            experiment: a function that returns a row (a dict), rows, or a data frame, of numbers, truth values and
                text. points: its arguments, as keywords: plain values. timed: columns that hold times, or ratios of
                times, which no machine gives twice: an audit allows them a factor of two.

        Raises:
            MeasurementError: a value that is not plain, a point twice, or, where the store is closed, a new one.
            KeysError: a variable of which nobody can tell when it is the same.
        """
        name = experiment.__name__
        asked = [*points]
        points = [plain(point, f"an argument of {name}") for point in asked]
        if lost := [{*point} - {*kept} for point, kept in zip(asked, points, strict=True) if len(kept) < len(point)]:
            raise MeasurementError(f"an argument of {name}, {min(lost[0])} = '': a table cannot tell it from none")
        code, variables = (found := apart(experiment))[0][:12], found[1]
        self.seen = self.outside()
        self._forget(experiment)
        keys = [(name, self._point(name, point, variables)) for point in points]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise MeasurementError(f"{name} is asked for {points[i]} twice")
        if self.audit is not None and name in (self.audit.experiments or (name,)):
            self._audit(experiment, dict(zip(keys, points, strict=True)), code, timed)
        found = {key: self.find(key, code) for key in keys}
        todo = [(key, point) for key, point in zip(keys, points, strict=True) if found[key] is None]
        if todo and self.closed:
            raise MeasurementError(
                f"{len(todo)} of {len(keys)} points of {name} were never measured: first {todo[0][1]}"
            )
        progress = Progress(len(todo)) if todo else None
        while todo:
            busy, before = [], len(todo)
            while todo:
                key, point = todo.pop(0)
                try:
                    with FileLock(self.folder / f"{key[1]}.lock", blocking=False):
                        found[key] = self.find(key, code)  # another process may have made it meanwhile
                        if found[key] is None:
                            progress.part(f"{name}: {', '.join(f'{k} {v}' for k, v in point.items())}")
                            found[key] = self._keep(self._call(experiment, key, point, code))
                except Timeout:
                    busy.append((key, point))
                    todo.reverse()  # neighbours often need the network that the other process is training now
            if len(busy) == before:
                time.sleep(0.5)
            todo = busy
        if progress:
            progress.done()
        self.used |= {key: (m, m.code == code) for key, m in found.items()}
        return pd.DataFrame([row for key in keys for row in found[key].rows])

    def _forget(self, experiment: Callable) -> None:
        """Empty the memories (`functools.cache`) of a notebook whose code or variables changed since they were filled.

        A memory that is met for the first time may hold what an earlier run of a cell gave, and is emptied too.
        """
        for kept in [value for value in experiment.__globals__.values() if hasattr(value, "cache_clear")]:
            inner = getattr(kept, "__wrapped__", None)
            if getattr(inner, "__globals__", None) is not experiment.__globals__:
                continue  # of a module, whose constants no parameter changes
            try:
                now = content(apart(inner), self.seen)
            except KeysError:
                now = None
            if now is None or self.memories.get(kept) != now:
                kept.cache_clear()
                self.memories[kept] = now

    def find(self, key: Key, code: str) -> Measurement | None:
        """What this code measured at a point; else, where earlier code counts, what the table has of it."""
        kept = self.published.get(key)
        if kept is not None and kept.code == code:
            return kept
        return self._here(key, code) or (kept if self.earlier else None)

    def publish(self, path: Path) -> None:
        """Write the table of what was used, and where earlier code counts, of what the table had beside it.

        Raises:
            OSError: it cannot be written.
        """
        rest = {key: m for key, m in self.published.items() if key not in self.used} if self.earlier else {}
        write_table(path, [*(m for m, _ in self.used.values()), *rest.values()])

    def evidence(self) -> str:
        """How many measurements the study rests on, where and by what code they were made, in one sentence."""
        today = sum(current for _, current in self.used.values())
        audited = sum(bool(m.audited) for m, _ in self.used.values())
        commits = dict.fromkeys(m.commit for m, current in self.used.values() if not current)
        said = f"{len(self.used)} measurements" + (f", {audited} of them of audited experiments" if audited else "")
        where = Counter(m.device for m, _ in self.used.values() if m.device)
        said += "; " * bool(where) + ", ".join(f"{n:,} " * (len(where) > 1) + f"on {d}" for d, n in where.items())
        if old := len(self.used) - today:
            said += f"; {old if today else 'all'} by earlier code, of {len(commits)} commit{'s' * (len(commits) > 1)}"
        if more := len(self.published.keys() - self.used) * self.earlier:
            said += f"; the table holds {more} more that this study does not ask for"
        return f"{said}."

    def _here(self, key: Key, code: str) -> Measurement | None:
        """What this code measured at a point on this machine."""
        if (key, code) not in self.written:
            for line in self.journal.news():
                m = Measurement(**(held := json.loads(line)) | {"rows": tuple(held["rows"])})
                self.written[m.key, m.code] = m
        return self.written.get((key, code))

    def _point(self, name: str, arguments: Row, variables: dict[str, str]) -> str:
        counted = {k: v for k, v in variables.items() if k not in ELSEWHERE}
        return content(name, sorted(arguments.items()), sorted(counted.items()), sorted(self.seen.items()))[:12]

    def _call(self, experiment: Callable, key: Key, point: Row, code: str) -> Measurement:
        started = time.monotonic()
        rows = rows_of(experiment(**point), point, key[0])
        took = round(time.monotonic() - started, 3)
        if changed := [given for given, found in self.outside().items() if found != self.seen.get(given)]:
            raise MeasurementError(f"{changed[0]} changed while {key[0]} was measured: nobody can tell which it is of")
        return Measurement(key[0], rows, key[1], code, **self.stamps, seconds=took)

    def _keep(self, made: Measurement) -> Measurement:
        self.journal.write(json.dumps(asdict(made)))
        self.written[made.key, made.code] = made
        return made

    def _audit(self, experiment: Callable, points: dict[Key, Row], code: str, timed: Sequence[str]) -> None:
        """Measure a share of the table's points again; if all agree, those of earlier code count as today's."""
        old = {key: m for key in points if (m := self.published.get(key)) and (m.code == code) == self.audit.again}
        if not old:
            return
        chosen, differ = self.audit.chosen(old), []
        known = [m for m in self.published.values() if m.experiment == experiment.__name__]  # of networks not asked too
        for key in chosen:
            new, was = self._call(experiment, key, points[key], code), old[key]
            if self.audit.again:
                self._keep(new)
            else:
                was = self._here(key, was.code) or was
            same = new.device == was.device and new.torch == was.torch
            spread = {} if same else spread_of_networks(known, points[key])
            if said := difference(was, new, spread, timed):
                differ.append(f"{points[key]}: {said}")
        said = f"{len(chosen)} of {len(old)} at {self.stamps.get('commit', '')} on {self.stamps.get('device', '')}"
        row = {"experiment": key[0], "points": len(old), "again": len(chosen), "differ": len(differ)}
        self.audits.append(row | {"first": differ[0] if differ else "", "device": self.stamps.get("device", "")})
        if not differ and not self.audit.again:
            self.published |= {key: replace(m, code=code, audited=said) for key, m in old.items()}


def difference(old: Measurement, new: Measurement, spread: dict[str, float], timed: Sequence[str] = ()) -> str:
    """The first value in which two measurements of a point differ, by more than its column's ``spread``; "" if none.

    Those in ``timed`` may differ by a factor of two.
    """
    if len(old.rows) != len(new.rows):
        return f"{len(new.rows)} rows, were {len(old.rows)}"
    for was, now in zip(old.rows, new.rows, strict=True):
        for name in dict.fromkeys([*was, *now]):
            a, b = was.get(name, ""), now.get(name, "")
            if name in timed and a and b:
                same = 0.5 <= b / a <= 2
            elif isinstance(a, int | float) and isinstance(b, int | float):
                same = isclose(a, b, rel_tol=0, abs_tol=spread.get(name, 0.0)) or (a != a and b != b)
            else:
                same = a == b
            if not same:
                return f"{name} = {b!r}, was {a!r}" + (f", further than {spread[name]:.3g}" if name in spread else "")
    return ""


def spread_of_networks(measurements: Sequence[Measurement], point: Row, times: float = 2.0) -> dict[str, float]:
    """For each numeric column ``times`` the standard deviation between networks at a point, which differ in ``seed``.

    Of several rows it is the mean; where the point has one network alone, that of the other points.
    """
    frame = pd.DataFrame([row | {"": i} for m in measurements for i, row in enumerate(m.rows)])
    others = {name: value for name, value in point.items() if name != "seed"}
    by = ["", *others]
    numbers = list(frame.select_dtypes("number").columns.difference([*by, "seed"]))
    if "seed" not in point or not numbers:
        return {}
    here = frame[(frame[[*others]] == pd.Series(others, dtype=object)).all(axis=1)]
    of_point, of_all = (rows.groupby(by, dropna=False)[numbers].var().mean() for rows in (here, frame))
    deviation = times * of_point.fillna(of_all) ** 0.5
    return {name: float(value) for name, value in deviation.items() if value > 0}
