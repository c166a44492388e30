"""The journal of trials: whole lines of several processes, whatever ends them."""

import multiprocessing
import os
import signal
import warnings

import pytest

from lib import files
from lib.faults.journal import Journal

DAMAGE = {
    "a page of zeros": lambda raw: raw[:4096] + bytes(4096) + raw[8192:],
    "a bit": lambda raw: raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:],
    "no text": lambda raw: raw[:4096] + bytes(range(128, 256)) + raw[4096:],
    "another file": lambda raw: b"rate,chip,accuracy\n0.1,3,0.5\n" + raw,
    "a line of somebody": lambda raw: raw + b"devices,7,0.9,00000000\n",
    "lines that were joined": lambda raw: raw[:5000].rpartition(b"\n")[0] + raw[5000:],
}


@pytest.fixture
def journal():
    """A thousand trials in one file, ten in another."""
    first, second = Journal("net"), Journal("net")
    for chip in range(1000):
        first.write("devices", chip, chip / 3000)
    for chip in range(1000, 1010):
        second.write("devices", chip, chip / 3000)
    return first


def test_what_was_written_is_read_to_the_last_bit(journal):
    assert Journal("net").read() == {("devices", chip): chip / 3000 for chip in range(1010)}
    assert Journal("another").read() == {}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_set_aside_and_its_good_lines_stay(journal, damage):
    whole = journal.read()
    raw = DAMAGE[damage](journal.path.read_bytes())
    journal.path.write_bytes(raw)
    with pytest.warns(
        UserWarning, match=rf"journal net/{journal.path.name} is damaged: \d+ of 1?\d* ?lines|of \d+ lines"
    ):
        left = journal.read()
    assert len(left) >= 1010 - 2 * 4096 // 30
    assert left.items() <= whole.items()
    assert journal.path.with_suffix(".damaged").read_bytes() == raw
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Journal("net").read() == left
    journal.write("devices", 5, 5 / 3000)  # whoever had the file goes on
    assert Journal("net").read() == left | {("devices", 5): 5 / 3000}


def test_who_reads_on_misses_no_line_of_a_file_that_was_set_aside():
    writer, reader = files.Journal("of"), files.Journal("of")
    for i in range(3):
        writer.write(f"line {i}")
    assert reader.news() == ["line 0", "line 1", "line 2"]
    with writer.path.open("ab") as file:
        file.write(b"no line of a journal\n")
    with pytest.warns(UserWarning, match="is damaged"):
        assert reader.news() == []
    writer.write("line 3")  # into a new file under the old name
    assert reader.news() == ["line 3"]
    assert sorted(files.Journal("of").read()) == [f"line {i}" for i in range(4)]


@pytest.mark.parametrize("cut", [1, 10, 20])
def test_the_beginning_of_a_line_does_not_count(journal, cut):
    raw = journal.path.read_bytes()
    journal.path.write_bytes(raw[:-cut])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(journal.read()) == 1009


def write_for_ever(name, said):
    journal = Journal("net")
    for trial in range(10**9):
        journal.write(name, trial, trial / 7)
        said.send(trial)


def test_processes_that_are_killed_leave_all_that_they_said():
    context = multiprocessing.get_context("fork")
    pipes = {name: context.Pipe(duplex=False) for name in ("a", "b")}
    writers = [context.Process(target=write_for_ever, args=(name, send)) for name, (_, send) in pipes.items()]
    for writer in writers:
        writer.start()
    for receive, _ in pipes.values():
        assert [receive.recv() for _ in range(300)] == [*range(300)]
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Journal("net").read()
    assert all(found[name, trial] == trial / 7 for name in ("a", "b") for trial in range(300))
    assert all(accuracy == trial / 7 for (_, trial), accuracy in found.items())


def test_a_full_disk_is_one_line(journal, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(journal.path), "open", no_space)
    with pytest.raises(OSError, match=r"cannot write .*\.csv: No space left on device"):
        journal.write("devices", 1, 0.5)
