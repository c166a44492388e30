"""Measurements: made once, kept by what they depend on, shared, merged and audited; nothing is lost."""

import json
import multiprocessing
import os
import signal
import sys
import time
import types
import warnings
from dataclasses import replace

import pandas as pd
import pytest
from filelock import FileLock

from lib.keys import apart
from lib.study import Audit, MeasurementError, ParameterError
from lib.study.measurements import Store, spread_of_networks
from lib.study.tables import Measurement, merge, read_table, write_table

CELL = """
def helper(x):
    return 2 * x
def kept(seed, rate):
    return {"kept": helper(seed) + rate * slope}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))


@pytest.fixture
def cell(monkeypatch):
    """A notebook's cell that was run: ``cell()`` returns its function, and all calls from then on."""
    import linecache

    calls, call = [], Store._call

    def counted(store, experiment, key, point, code):
        calls.append((point["seed"], point.get("rate")))
        return call(store, experiment, key, point, code)

    monkeypatch.setattr(Store, "_call", counted)

    def run(*replaced, slope=1.0):
        source = CELL
        for old, new in replaced:
            source = source.replace(old, new)
        name = f"<cell {abs(hash(source))}>"
        linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
        space = {"__name__": "__main__", "slope": slope}
        exec(compile(source, name, "exec"), space)
        calls.clear()
        return types.SimpleNamespace(kept=space["kept"], calls=calls)

    return run


POINTS = [{"seed": s, "rate": r} for s in range(2) for r in (0.5, 2.0)]


def test_a_seed_more_measures_only_its_rows(cell):
    notebook = cell()
    frame = Store("s").measure(notebook.kept, POINTS)
    assert frame["kept"].tolist() == [0.5, 2.0, 2.5, 4.0]
    assert [*frame] == ["seed", "rate", "kept"]
    more = Store("s").measure(notebook.kept, [*POINTS, {"seed": 2, "rate": 2.0}])
    assert notebook.calls == [(p["seed"], p["rate"]) for p in POINTS] + [(2, 2.0)]
    assert more["kept"].tolist() == [0.5, 2.0, 2.5, 4.0, 6.0]


def test_what_says_the_same_is_the_same_and_what_does_not_is_not(cell):
    Store("s").measure(cell().kept, POINTS)
    for same in (("def helper(x):", "def helper(x):  # twice"), ("(seed, rate)", "(seed, rate: float)")):
        assert not measured_by(cell(same))
    assert len(measured_by(cell(("2 * x", "x + x")))) == 4
    assert len(measured_by(cell(slope=1.5))) == 4
    assert not measured_by(cell(slope=1.5))


def measured_by(notebook, **options):
    Store("s", **options).measure(notebook.kept, POINTS)
    return notebook.calls


def test_a_run_that_fails_keeps_what_was_finished_and_goes_on(cell):
    broken = cell(("    return {", "    seed == 1 and 1 / 0\n    return {"))
    for calls in (3, 4):  # two are kept, and the third is tried again
        with pytest.raises(ZeroDivisionError):
            Store("s").measure(broken.kept, POINTS)
        assert len(broken.calls) == calls


def slow(seed):
    time.sleep(0.1)
    with open(os.environ["CALLS"], "a") as file:
        file.write(f"{seed}\n")
    return [{"part": i, "value": seed / 3 + i} for i in range(2)]


def work(path, kill):
    os.environ["CALLS"] = str(path)
    if kill:
        multiprocessing.get_context("fork")
        signal.setitimer(signal.ITIMER_REAL, 0.35)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    Store("s").measure(slow, [{"seed": s} for s in range(12)])


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_anywhere_and_shared_by_processes(tmp_path):
    """One process is killed at work; two go on together; each point was finished once, and the rows are whole."""
    spawn = multiprocessing.get_context("fork")
    path = tmp_path / "calls"
    first = spawn.Process(target=work, args=(path, True))
    first.start()
    first.join(60)
    assert first.exitcode == -signal.SIGKILL
    others = [spawn.Process(target=work, args=(path, False)) for _ in range(2)]
    for process in others:
        process.start()
    for process in others:
        process.join(60)
        assert process.exitcode == 0
    made = sorted(map(int, path.read_text().split()))
    assert sorted({*made}) == [*range(12)]
    assert len(made) <= 13  # the one at which the first was killed may have been made twice
    os.environ["CALLS"] = str(path)
    frame = Store("s").measure(slow, [{"seed": s} for s in range(12)])
    assert len(path.read_text().split()) == len(made)
    assert frame["value"].tolist() == [s / 3 + i for s in range(12) for i in range(2)]


def test_beside_another_process_it_comes_from_the_other_end(cell, monkeypatch):
    """Neighbouring points often share a network, which two processes would wait to see trained."""
    notebook, call = cell(), Store._call
    store = Store("s")
    first = FileLock(store.folder / f"{store._point('kept', POINTS[0], apart(notebook.kept)[1])}.lock")

    def finishing(store, experiment, key, point, code):
        first.release()
        return call(store, experiment, key, point, code)

    monkeypatch.setattr(Store, "_call", finishing)
    with first:
        frame = store.measure(notebook.kept, POINTS)
    assert notebook.calls == [(p["seed"], p["rate"]) for p in (POINTS[3], POINTS[2], POINTS[1], POINTS[0])]
    assert frame["kept"].tolist() == [0.5, 2.0, 2.5, 4.0]


def test_a_table_gives_back_what_it_was_given(tmp_path, cell):
    store = Store("s", stamps={"commit": "abc", "device": "CPU", "torch": "2"})
    odd = {"x": 1 / 3, "n": 7, "yes": True, "nothing": None, "word": 'two, or "three"'}
    store.measure(lambda seed: [odd, {"x": -0.0}], [{"seed": 0}])
    store.publish(path := tmp_path / "results" / "s.csv")
    (m,) = read_table(path)
    (used, _), *_ = store.used.values()
    assert repr(m) == repr(used)
    assert (
        repr(m.rows[0])
        == "{'seed': 0, 'x': 0.3333333333333333, 'n': 7, 'yes': True, 'nothing': nan, 'word': 'two, or \"three\"'}"
    )
    assert (m.commit, m.device, m.torch) == ("abc", "CPU", "2")
    write_table(again := tmp_path / "again.csv", [m])
    assert again.read_bytes() == path.read_bytes()
    assert pd.read_csv(path)["x"].tolist() == [1 / 3, -0.0]


def test_a_table_alone_is_enough_on_another_machine(tmp_path, cell, monkeypatch):
    store = Store("s")
    store.measure(cell().kept, POINTS)
    store.publish(path := tmp_path / "s.csv")
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "another"))
    assert not measured_by(cell(), table=path)


def test_the_evidence_says_on_which_devices_rows_were_measured(tmp_path, cell):
    first = Store("s", stamps={"device": "CPU"})
    first.measure(cell().kept, POINTS[:3])
    assert first.evidence() == "3 measurements; on CPU."
    first.publish(path := tmp_path / "s.csv")
    later = Store("s", path, stamps={"device": "a GPU"})
    later.measure(cell().kept, POINTS)
    assert later.evidence() == f"{len(POINTS)} measurements; 3 on CPU, 1 on a GPU."


def test_rows_of_earlier_code_count_where_they_may(tmp_path, cell, monkeypatch):
    store = Store("s")
    store.measure(cell().kept, POINTS)
    store.publish(path := tmp_path / "s.csv")
    changed = cell(("2 * x", "x + x"))
    later = Store("s", path, earlier=True)
    later.measure(changed.kept, POINTS[:3])
    assert not changed.calls
    spare = "the table holds 1 more that this study does not ask for"
    assert later.evidence() == f"3 measurements; all by earlier code, of 1 commit; {spare}."
    later.publish(path)
    assert len(read_table(path)) == 4  # nobody asked for the fourth
    assert len(measured_by(changed, table=path)) == 4  # nor may they count where that is not said


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda text: text.replace("0.5,", "0.6,", 1), 1),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", 0),
        (lambda text: text[:-20], 1),
        (lambda text: text + "a,foreign,row\n", 1),
        (lambda text: text + text.split("\n")[1] + "\n", 0),
    ],
)
def test_what_is_damaged_is_set_aside_and_the_rest_stays(tmp_path, cell, damage, lost):
    store = Store("s")
    store.measure(cell().kept, POINTS)
    store.publish(path := tmp_path / "s.csv")
    path.write_text(damage(text := path.read_text()))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        left = read_table(path)
    assert {m.rows for m in map(frozen, left)} <= {m.rows for m in map(frozen, store_of(text, tmp_path))}
    assert len(said) == lost
    aside = tmp_path / "damaged" / "s.csv"
    assert aside.is_file() == bool(lost)
    assert not lost or "set aside in damaged/s.csv" in str(said[0].message)


def frozen(m):
    return types.SimpleNamespace(rows=tuple(tuple(sorted(row.items())) for row in m.rows))


def store_of(text, folder):
    (folder / "whole.csv").write_text(text)
    return read_table(folder / "whole.csv")


def test_a_point_that_two_rows_contradict_is_named(tmp_path):
    one, other = (Measurement("kept", ({"seed": 0, "kept": k},), "p", "c") for k in (0.5, 0.7))
    write_table(path := tmp_path / "s.csv", [one, other])
    with pytest.warns(UserWarning, match="1 of 2 rows are damaged, without their others, or differ from others"):
        assert [m.rows for m in read_table(path)] == [one.rows]


def test_a_measurement_without_one_of_its_rows_does_not_count(tmp_path):
    """An interval over 29 chips of 30 would pass for one over all."""
    whole = Measurement("trials", tuple({"chip": i, "acc": i / 7} for i in range(30)), "p", "c")
    write_table(path := tmp_path / "s.csv", [whole, Measurement("trials", ({"chip": 0, "acc": 0.5},), "q", "c")])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:9] + lines[10:]))
    with pytest.warns(UserWarning, match="29 of 30 rows are damaged, without their others"):
        assert [m.point for m in read_table(path)] == ["q"]


@pytest.mark.parametrize("text", ["", "seed,kept\n0,1\n", "experiment,seed\n", "\x00\x01"])
def test_what_is_no_table_is_refused(tmp_path, text):
    (path := tmp_path / "s.csv").write_text(text)
    with pytest.raises(MeasurementError, match=r"s.csv is no table of measurements"):
        read_table(path)


def test_tables_of_two_machines_are_added(tmp_path):
    mine, theirs = tmp_path / "mine.csv", tmp_path / "theirs.csv"
    rows = [Measurement("kept", ({"seed": s, "kept": s / 2},), f"p{s}", "c") for s in range(4)]
    old = Measurement("kept", ({"seed": 1, "kept": 0.4},), "p1", "")
    false = Measurement("kept", ({"seed": 2, "kept": 0.9},), "p2", "c")
    write_table(mine, [rows[0], old, rows[2]])
    write_table(theirs, [rows[1], false, rows[3]])
    with pytest.warns(UserWarning, match="1 measurements differ in .*theirs.csv, .*: left as they were"):
        assert merge(mine, theirs) == (1, 1)
    assert {m.point: m.rows[0]["kept"] for m in read_table(mine)} == {"p0": 0, "p1": 0.5, "p2": 1.0, "p3": 1.5}
    assert merge(tmp_path / "new.csv", mine) == (4, 0)


@pytest.mark.parametrize("own", ["today", ""])
@pytest.mark.parametrize("code", ["other", ""])
@pytest.mark.parametrize("same", [True, False])
def test_only_a_code_that_is_known_is_newer_than_one_that_is_not(tmp_path, own, code, same):
    """Two that differ, of codes both known or both not, are in no order: what was there stays, and it is said."""
    first = Measurement("kept", ({"seed": 0, "kept": 90.0},), "p", own)
    second = Measurement("kept", ({"seed": 0, "kept": 90.0 if same else 10.0},), "p", code)
    open_ = not same and bool(own) == bool(code)
    won = second if code and not own else first
    write_table(mine := tmp_path / "mine.csv", [first])
    write_table(theirs := tmp_path / "theirs.csv", [second])
    write_table(both := tmp_path / "both.csv", [first, second])  # as of two tables one below the other
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert merge(mine, theirs) == (0, int(won is second))
        assert [(m.rows, m.code) for m in read_table(mine)] == [(won.rows, won.code)]
        assert [(m.rows, m.code) for m in read_table(both)] == [(won.rows, won.code)]
    assert len(said) == 2 * open_


@pytest.mark.parametrize(
    ("function", "points", "said"),
    [
        (lambda rates: {"a": 1}, [{"rates": [0.1]}], r"an argument of <lambda>, rates = \[0.1\]: expected a number"),
        (lambda seed: {"a": [1]}, [{"seed": 0}], r"a row of <lambda>, a = \[1\]: expected a number"),
        (lambda kind: {"a": 1}, [{"kind": "x"}, {"kind": ""}], "an argument of <lambda>, kind = '': a table cannot"),
        (lambda seed: {"a": "8"}, [{"seed": 0}], "as text it would not be told from another value"),
        (lambda seed: {"a": " b"}, [{"seed": 0}], "as text it would not be told from another value"),
        (lambda seed: {"seed": 1}, [{"seed": 0}], "a column 'seed', which is an argument's"),
        (lambda seed: {"code": 1}, [{"seed": 0}], "a column 'code', which is an argument's or a table's own"),
        (lambda seed: [], [{"seed": 0}], "returned .*: expected a row"),
        (lambda seed: 0.5, [{"seed": 0}], "returned 0.5: expected a row"),
        (lambda seed: {"a": 1}, [{"seed": 0}, {"seed": 0}], "is asked for .* twice"),
    ],
)
def test_what_a_table_cannot_hold_is_refused(function, points, said):
    with pytest.raises(MeasurementError, match=said):
        Store("s").measure(function, points)


def published(tmp_path, notebook, **stamps):
    store = Store("s", stamps=stamps)
    store.measure(notebook.kept, POINTS)
    store.publish(path := tmp_path / "s.csv")
    return path


def test_an_audit_that_agrees_stamps_its_rows(tmp_path, cell):
    path = published(tmp_path, cell(), commit="old")
    changed = cell(("2 * x", "x + x"))
    audit = Store("s", path, {"commit": "new"}, earlier=True, audit=Audit(0.3))
    audit.measure(changed.kept, POINTS)
    assert len(changed.calls) == 2  # 0.3 of four, rounded up
    assert [(a["points"], a["again"], a["differ"]) for a in audit.audits] == [(4, 2, 0)]
    audit.publish(path)
    assert {m.audited for m in read_table(path)} == {"2 of 4 at new on "}
    assert {m.commit for m in read_table(path)} == {"old"}
    assert not measured_by(cell(("2 * x", "x + x")), table=path)  # they are of today's code from now on


def test_an_audit_of_one_experiment_leaves_the_others_as_they_were(tmp_path, cell):
    path = published(tmp_path, cell())
    for told, again in ((Audit(1.0, ("tolerates",)), 0), (Audit(1.0, ("tolerates", "kept")), 4)):
        changed = cell(("2 * x", "x + x"))
        audit = Store("s", path, earlier=True, audit=Audit.of(str(told)))  # as a batch tells it
        audit.measure(changed.kept, POINTS)
        assert len(changed.calls) == again
        audit.publish(tmp_path / "t.csv")
        assert [bool(m.audited) for m in read_table(tmp_path / "t.csv")] == [again > 0] * 4
    assert Audit.of("") is None
    with pytest.raises(ParameterError, match=r"share of 1\.5"):
        Audit(1.5)


def test_an_audit_that_finds_a_difference_says_where_and_stamps_nothing(tmp_path, cell):
    path = published(tmp_path, cell())
    changed = cell(("2 * x", "2 * x + 0.001 * x"))
    audit = Store("s", path, earlier=True, audit=Audit(1.0))
    frame = audit.measure(changed.kept, POINTS)
    assert frame["kept"].tolist() == [0.5, 2.0, 2.5, 4.0]  # the ledger stays what it was
    (row,) = audit.audits
    assert (row["again"], row["differ"]) == (4, 2)
    assert row["first"] == "{'seed': 1, 'rate': 0.5}: kept = 2.501, was 2.5"
    audit.publish(path)
    assert not any(m.audited for m in read_table(path))


def test_an_audit_allows_times_a_factor_of_two_and_nothing_else(tmp_path, cell):
    path = tmp_path / "t.csv"
    Store("s").measure(cell().kept, POINTS)
    (old := Store("s")).measure(cell().kept, POINTS)
    old.publish(path)
    for factor, timed, differ in ((1.5, ["kept"], 0), (1.5, [], 4), (2.5, ["kept"], 4)):
        notebook = cell(("    return {", f"    rate *= {factor}; seed *= {factor}\n    return {{"))
        audit = Store("s", path, earlier=True, audit=Audit(1.0))
        audit.measure(notebook.kept, POINTS, timed=timed)
        assert audit.audits[0]["differ"] == differ


def test_on_another_machine_an_audit_allows_what_networks_differ_by(tmp_path, cell):
    """Seeds 0 and 1 are 2 apart: a standard deviation of 1.41, twice of which is allowed."""
    path = published(tmp_path, cell(), device="a CPU")
    for off, differ in ((1.0, 0), (3.0, 4)):
        audit = Store("s", path, {"device": "a GPU"}, earlier=True, audit=Audit(1.0))
        audit.measure(cell(("2 * x", f"2 * x + {off}")).kept, POINTS)
        assert audit.audits[0]["differ"] == differ
    audit = Store("s", path, {"device": "a GPU"}, earlier=True, audit=Audit(1.0))
    for seed in (0, 1):  # one network at a time: the other one is in the table all the same
        audit.measure(cell(("2 * x", "2 * x + 1.0")).kept, [point for point in POINTS if point["seed"] == seed])
    assert [row["differ"] for row in audit.audits] == [0, 0]


def test_what_the_old_code_measured_on_this_machine_tells_code_from_machine(tmp_path, cell, monkeypatch):
    trained = ("rate * slope", "rate * slope + float(__import__('os').environ.get('MACHINE', 0))")
    path = published(tmp_path, cell(trained), device="a CPU")
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("MACHINE", "0.25")  # its networks differ, and none of the code does
    options = {"table": path, "stamps": {"device": "a GPU"}, "earlier": True}
    repeat = Store("s", audit=Audit.of(str(Audit(0.5, again=True))), **options)
    assert repeat.measure(cell(trained).kept, POINTS)["kept"].tolist() == [0.5, 2.0, 2.5, 4.0]  # the table's
    assert [(a["points"], a["again"], a["differ"]) for a in repeat.audits] == [(4, 2, 0)]  # within twice the spread
    repeat.publish(path)
    assert not any(m.audited for m in read_table(path))
    for change, differ in ((("2 * x", "x + x"), 0), (("2 * x", "2 * x + 0.001"), 2)):
        audit = Store("s", audit=Audit(0.5), **options)
        audit.measure(cell(trained, change).kept, POINTS)
        assert audit.audits[0]["differ"] == differ
    (row,) = audit.audits
    assert row["first"].endswith("kept = 0.751, was 0.75")


def test_an_audit_draws_from_what_every_commit_and_machine_made(tmp_path, cell):
    notebook = cell()
    for commit, seed in (("first", 0), ("second", 1)):
        store = Store("s", tmp_path / "s.csv", {"commit": commit}, earlier=True)
        store.measure(notebook.kept, [point for point in POINTS if point["seed"] == seed])
        store.publish(tmp_path / "s.csv")
    rows = [replace(m, seconds=float("nan") if m.commit == "first" else 1.0) for m in read_table(tmp_path / "s.csv")]
    write_table(tmp_path / "s.csv", rows)
    changed = cell(("2 * x", "2 * x + (x == 0)"))  # of the first commit's networks alone
    audit = Store("s", tmp_path / "s.csv", earlier=True, audit=Audit(0.05))
    audit.measure(changed.kept, POINTS)
    assert sorted(seed for seed, _ in changed.calls) == [0, 1]
    assert [(a["again"], a["differ"]) for a in audit.audits] == [(2, 1)]


def test_the_spread_of_networks_is_that_between_seeds_alone():
    rows = [
        Measurement("e", ({"seed": s, "rate": r, "acc": 100 * r + s},), f"{s}{r}", "") for s in (0, 1) for r in (1, 2)
    ]
    assert spread_of_networks(rows, {"seed": 0, "rate": 2}, times=1.0) == pytest.approx({"acc": 0.5**0.5})
    assert spread_of_networks(rows, {"rate": 2}) == {}


def test_an_arm_that_differs_little_between_seeds_has_a_narrow_spread():
    """One spread for all arms would let an easy one change by as much as a hard one varies."""
    found = {"easy": (90.0, 90.1, 89.9), "hard": (40.0, 60.0, 50.0), "once": (70.0,)}
    rows = [
        Measurement("e", ({"seed": s, "arm": arm, "acc": a},), f"{s}{arm}", "")
        for arm, accuracies in found.items()
        for s, a in enumerate(accuracies)
    ]
    spread = {arm: spread_of_networks(rows, {"seed": 0, "arm": arm}, times=1.0)["acc"] for arm in found}
    assert spread == pytest.approx({"easy": 0.1, "hard": 10.0, "once": (50.005) ** 0.5})


MEMO = """
from functools import cache
@cache
def images():
    return list(range(train_size))
def strength(x):
    return 1 * x
@cache
def trained(seed):
    return strength(len(images())) + seed
def tested(seed):
    return {"n": len(images()), "score": trained(seed)}
"""


def test_memories_of_a_notebook_are_emptied_when_what_filled_them_has_changed():
    """A cell's `functools.cache` outlives the parameter or the helper that it was filled with."""
    import linecache

    space = {"__name__": "__main__", "train_size": 100}

    def run(source):
        name = f"<cell {abs(hash(source))}>"
        linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
        exec(compile(source, name, "exec"), space)

    def found(store):
        return store.measure(space["tested"], [{"seed": 0}])[["n", "score"]].values.tolist()[0]

    run(MEMO)
    space["trained"](0)  # looked at before anything is measured
    run("train_size = 200")
    store = Store("s")
    assert found(store) == [200, 200]
    run("train_size = 300")
    assert found(store) == [300, 300]
    images = space["images"].cache_info().misses
    run("def strength(x):\n    return 7 * x")
    assert found(store) == [300, 2100]
    assert space["images"].cache_info().misses == images  # which nothing changed
    run("train_size = 100")
    assert found(Store("s")) == [100, 700]


def test_the_journal_is_text_that_anything_reads(tmp_path, cell):
    store = Store("s")
    store.measure(cell().kept, POINTS[:1])
    (line,) = store.journal.path.read_text().splitlines()
    assert json.loads(line.rpartition(",")[0])["rows"] == [{"seed": 0, "rate": 0.5, "kept": 0.5}]


def test_a_closed_store_measures_nothing(cell):
    notebook = cell()
    with pytest.raises(MeasurementError, match=r"4 of 4 points of kept were never measured: first \{'seed': 0"):
        Store("s", closed=True).measure(notebook.kept, POINTS)
    Store("s").measure(notebook.kept, POINTS)
    assert len(Store("s", closed=True).measure(notebook.kept, POINTS)) == 4
