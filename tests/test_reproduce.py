"""Batch runs from end to end: results that the contract names, failures that are seen, runs that survive a kill."""

import ast
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types

import nbformat
import pandas as pd
import psutil
import pytest
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

from lib import reproduce as room
from lib import study
from lib.reproduce import batch, last_run, preset_parameters, render, reproduce, up_to_date_key
from lib.reproduce.__main__ import _processes, main
from lib.reproduce.page import mathml, outline
from lib.reproduce.run import failure
from lib.study.tables import Measurement, read_table, write_table

NAME = "01_lottery_ticket_vs_finetuning"
TINY = {"train_size": 256, "test_size": 256, "epochs": 2, "admm_epochs": 1, "seeds": 1}


def ran(folder):
    """The studies of which a folder has reports."""
    return sorted(record.stem for record in (folder / "runs").iterdir())


def test_everything_that_the_contract_names_is_there(smoke):
    assert len(ran(smoke)) == 2
    assert {p.name for p in smoke.iterdir()} == {
        *(f"{name}.html" for name in ran(smoke)),
        "index.html",
        "claims.csv",
        "results",
        "claims",
        "figures",
        "runs",
    }
    ledger = pd.read_csv(smoke / "claims.csv")
    assert tuple(ledger.columns) == study.CLAIM_COLUMNS
    assert set(ledger["preset"]) == {"smoke"}
    tables = ledger["dataset"].isin(["none", "published tables"])
    sums = ledger["criterion"].str.endswith("arithmetic") & tables  # whoever asks
    chance = (ledger["kind"] != "arithmetic") & ~sums
    assert set(ledger.loc[chance, "verdict"]) == {"inconclusive"}  # two networks are no evidence
    assert ledger.loc[ledger["study"] == NAME, "measured"].notna().all()
    results = pd.read_csv(smoke / "results" / f"{NAME}.csv")
    assert {"experiment", "seed", "quantity", "value", "point", "code", "device", "check"} <= set(results.columns)


def test_a_record_says_what_a_run_took(smoke):
    for name in ran(smoke):
        run = last_run(name, smoke)
        assert run.error == ""
        assert 0 < run.minutes < 10
        assert 100 < run.memory_mb < 20_000
        assert {"commit", "torch", "device"} <= set(run.provenance)
        assert run.provenance["threads"] == 1  # of the kernel, not of the batch
        assert run.figure
        assert "not measured" not in run.answer
        page = (smoke / f"{name}.html").read_text("utf-8")
        assert "parts done" in page
        assert "were expected" not in page  # a progress line that counts what there is


def test_budgets_count_every_epoch(smoke):
    results = pd.read_csv(smoke / "results" / f"{NAME}.csv").query("quantity == 'accuracy_percent'")
    spent = results.groupby(["mask", "sparsity", "mode"])["total_epochs"].unique().apply(tuple).to_dict()
    assert spent["none", 0.0, "dense"] == (2,)
    assert spent["one-shot", 0.8, "fine-tune"] == spent["one-shot", 0.8, "ticket"] == (4,)
    assert spent["ADMM", 0.8, "rewind"] == (5,)
    assert spent["iterative", 0.5, "ticket"] == (4,)  # the first round prunes the dense network
    assert spent["iterative", 0.8, "ticket"] == (8,)  # rounds at 0.5, 0.75, 0.8: two more trainings


def test_a_second_run_has_nothing_to_do(smoke, monkeypatch):
    monkeypatch.setattr(batch, "run_study", lambda *a: pytest.fail("the study ran again"))
    before = (smoke / f"{NAME}.html").stat().st_mtime_ns
    assert reproduce("smoke", only=ran(smoke), changed={"seeds": 2}, reports=smoke) == dict.fromkeys(ran(smoke), "")
    assert (smoke / f"{NAME}.html").stat().st_mtime_ns == before


# --- small studies of every fate --------------------------------------------------------------------------------------

CELLS = {
    "01_raises": "raise ValueError('the cell says why')",
    "02_dies": "import os; os._exit(1)",
    "03_works": "from lib.study import open_study\nprint(n)",
}


PARAMETERS = """n: int = 1  # a number; in [0, 99]
x: float = 0.5  # another; > 0
word: str = ""  # any; any text
report_dir: str = ""  # where; any text"""


def write_study(folder, name, source, saved=None, text=""):
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    save = (
        "from pathlib import Path\nplace = Path(report_dir) / 'results'\nplace.mkdir(parents=True, exist_ok=True)\n"
        f"(place / '{saved or name}.csv').write_text(str(n))"
    )
    cells = [new_markdown_cell(f"# {name}\n\n{text}"), parameters, new_code_cell(source), new_code_cell(save)]
    notebook = new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder for notebooks with presets, and where reports go: ``(notebooks, reports)``."""
    folder = tmp_path / "notebooks"
    (folder / "presets").mkdir(parents=True)
    (folder / "presets" / "smoke.yaml").write_text("")
    monkeypatch.setattr(study.parameters, "NOTEBOOKS", folder)
    monkeypatch.setattr(batch, "PROJECT", tmp_path)
    monkeypatch.chdir(study.PROJECT)
    return folder, tmp_path / "elsewhere" / "reports"


@pytest.fixture
def broken(small):
    """Three studies: one that raises, one whose kernel dies, one that works."""
    folder, reports = small
    for name, source in CELLS.items():
        write_study(folder, name, source)
    (folder / "presets" / "smoke.yaml").write_text("03_works: {n: 7}\n")
    return folder, reports


def run_batch(reports, *words):
    return main(["--preset", "smoke", "--reports", str(reports), *words])


def test_a_failed_study_is_seen_and_stops_no_other(broken, capsys):
    _, reports = broken
    assert run_batch(reports, "--jobs", "2") == 1
    failed = {name: last_run(name, reports, failed=True) for name in CELLS}
    assert (failed["01_raises"].error, failed["01_raises"].cell) == ("ValueError: the cell says why", 3)
    assert "kernel died" in failed["02_dies"].error
    log = batch.folders("smoke", reports)[1] / "02_dies.log"
    assert failed["02_dies"].error.endswith(f"see build/{log.parent.name}/02_dies.log")
    assert "DeadKernelError" in log.read_text("utf-8")
    assert failed["03_works"] is None
    assert (reports / "results" / "03_works.csv").read_text() == "7"
    index = (reports / "index.html").read_text()
    assert "failed in cell 3: ValueError: the cell says why" in index
    assert "the cell says why" in (reports / "01_raises.failed.html").read_text()
    assert not (reports / "01_raises.html").exists()  # nothing that looks complete
    assert (reports / "03_works.html").is_file()


def test_only_failed_studies_run_again(broken, monkeypatch):
    _, reports = broken
    run_batch(reports)
    ran = []
    real = batch.run_study
    monkeypatch.setattr(batch, "run_study", lambda name, *a: ran.append(name) or real(name, *a))
    run_batch(reports)
    assert sorted(ran) == ["01_raises", "02_dies"]  # several at once


def test_a_failure_leaves_the_complete_report_and_goes_when_mended(small):
    folder, reports = small
    write_study(folder, "01_study", "value = 1")
    assert run_batch(reports) == 0
    good = (reports / "01_study.html").read_text()
    write_study(folder, "01_study", "raise KeyError('now broken')")
    assert run_batch(reports) == 1
    assert (reports / "01_study.html").read_text() == good
    assert (reports / "results" / "01_study.csv").read_text() == "1"
    assert "now broken" in (reports / "index.html").read_text()
    write_study(folder, "01_study", "value = 2")
    assert run_batch(reports) == 0
    assert not (reports / "01_study.failed.html").exists()
    assert "now broken" not in (reports / "index.html").read_text()


def test_what_a_run_depends_on(small):
    folder, _ = small
    write_study(folder, "01_study", "from lib import plots, pruning\npruning.Filter(0.5)\nplots.show")
    before = up_to_date_key("01_study", {"n": 1})
    assert up_to_date_key("01_study", {}) == before  # the notebook's own value
    assert up_to_date_key("01_study", {"n": 2}) != before
    assert up_to_date_key("01_study", {"report_dir": "elsewhere"}) == before
    same = "import json\nfrom lib import plots, faults, pruning as p  # why\n\np.Filter(0.5)\nplots.show"
    write_study(folder, "01_study", same)
    assert up_to_date_key("01_study", {"n": 1}) == before
    write_study(folder, "01_study", "from lib import plots, pruning\npruning.Column(0.5)\nplots.show")
    assert up_to_date_key("01_study", {"n": 1}) != before


def test_a_report_is_stale_when_what_its_notebook_refers_to_has_changed(small, monkeypatch):
    folder, _ = small
    monkeypatch.syspath_prepend(folder)
    write_study(folder, "01_study", "import own\nown.measure()")
    text = "def measure(): return 1\n\ndef draw(): return 2\n"
    keys = []
    for source in (text, text.replace("2", "3"), f"# why\n{text}", text.replace("1", "3")):
        (folder / "own.py").write_text(source)
        keys.append(up_to_date_key("01_study", {}))
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_a_changed_parameter_goes_to_the_studies_that_have_it(small, capsys):
    folder, reports = small
    write_study(folder, "01_study", "value = 1")
    assert run_batch(reports, "-p", "n", "5", "01") == 0
    assert (reports / "results" / "01_study.csv").read_text() == "5"
    assert run_batch(reports, "-p", "m", "5") == 2
    assert "parameter 'm' is unknown in every study" in capsys.readouterr().err
    assert run_batch(reports, "-p", "n", "five") == 2
    assert "01_study at smoke: n = 'five' is str: expected int" in capsys.readouterr().err


def test_what_a_study_of_one_s_own_forgot_is_told(small, capsys):
    """An entry in the preset, and a claim that was never settled: both are allowed, and neither is silent."""
    folder, reports = small
    source = """
from lib.study import Study, at_least
study = Study("01_study", {"seeds": 1, "report_dir": report_dir}, {"commit": ""})
study.expect("1a", "costs nothing", at_least(0), kind="ours")
study.expect("1b", "wins", at_least(0), kind="ours")
study.settle("1a", [1.0])
study.save()
"""
    write_study(folder, "01_study", source)
    assert run_batch(reports, "01") == 0
    said = capsys.readouterr().err
    assert "01_study has no entry in presets/smoke.yaml: it runs with its defaults" in said
    assert "claims without a measurement: 1b wins" in said
    (folder / "presets" / "smoke.yaml").write_text("01_study: {}\n")
    assert run_batch(reports, "01") == 0
    assert "no entry" not in capsys.readouterr().err


def test_a_changed_parameter_has_to_suit_the_studies_that_run_alone(small, capsys):
    folder, reports = small
    for name in ("01_study", "02_other"):
        write_study(folder, name, "value = 1")
    other = folder / "02_other.ipynb"
    other.write_text(other.read_text().replace("n: int = 1  # a number; in [0, 99]", "m: int = 1  # one; in [0, 1]"))
    assert run_batch(reports, "-p", "m", "5", "--dry-run") == 2
    assert "02_other at smoke: m = 5: expected in [0, 1]" in capsys.readouterr().err
    assert run_batch(reports, "-p", "n", "5", "--dry-run", "01") == 0
    assert preset_parameters("smoke", {"n": 5}, ["01"]) == {"01_study": {"n": 5}, "02_other": {}}
    assert run_batch(reports, "-p", "m", "1", "--dry-run", "01") == 2
    assert "parameter 'm' is unknown in 01" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("x", "1e-4", 1e-4), ("x", "2", 2.0), ("n", "010", 10), ("word", "no", "no"), ("word", "1:30", "1:30")],
)
def test_values_are_read_against_their_declared_type(small, name, text, value):
    folder, _ = small
    write_study(folder, "01_study", "value = 1")
    (folder / "presets" / "mine.yaml").write_text(f"01_study:\n  {name}: {text}\n")
    found = [preset_parameters("mine"), preset_parameters("smoke", {name: text})]
    assert found == [{"01_study": {name: value}}] * 2
    assert type(found[0]["01_study"][name]) is type(value)


def test_list_and_dry_run_run_nothing(broken, capsys):
    _, reports = broken
    assert run_batch(reports, "--dry-run") == 0
    assert "3 to run" in capsys.readouterr().out
    assert not reports.exists()
    run_batch(reports, "03")
    capsys.readouterr()
    assert run_batch(reports, "--list") == 0
    states = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "never ran" in states["01_raises"]
    assert "complete" in states["03_works"]
    assert run_batch(reports, "--dry-run", "03") == 0
    assert "nothing to run" in capsys.readouterr().out


def test_a_notebook_that_stopped_half_way_is_no_success(tmp_path):
    done, missing = new_code_cell("1", execution_count=1), new_code_cell("2")
    nbformat.write(new_notebook(cells=[done, missing]), tmp_path / "half.ipynb")
    cell, error = failure(tmp_path / "half.ipynb", 0, "its.log")
    assert cell == 2
    assert error.startswith("1 of 2 cells did not run")
    assert error.endswith("see its.log")
    assert "no notebook" in failure(tmp_path / "none.ipynb", -9, "its.log")[1]


# --- whose results ----------------------------------------------------------------------------------------------------


def test_what_was_never_measured_is_left_out_of_pages_from_measurements(small, monkeypatch, capsys):
    folder, reports = small
    for name in ("01_measured", "02_not"):
        write_study(folder, name, "pass")
    monkeypatch.setenv("WORKBOOK_CLOSED", "")
    assert run_batch(reports, "--render") == 2
    assert "has no measurements" in capsys.readouterr().err
    (reports / "results").mkdir(parents=True)
    (reports / "results" / "01_measured.csv").write_text("0")
    assert run_batch(reports, "--render") == 0
    assert "left out, as nothing was measured: 02_not" in capsys.readouterr().err
    assert last_run("02_not", reports) is None
    assert last_run("01_measured", reports)


def test_a_number_that_two_studies_have_is_asked_back(small, capsys):
    folder, reports = small
    for name in ("01_one", "01_other"):
        write_study(folder, name, "value = 1")
    assert run_batch(reports, "01") == 2
    assert "study '01' is 01_one or 01_other" in capsys.readouterr().err
    assert run_batch(reports, "01_other") == 0
    assert {p.name for p in (reports / "runs").iterdir()} == {"01_other.json"}


def test_a_copy_is_told_and_skipped(small, capsys):
    folder, reports = small
    write_study(folder, "01_study", "value = 1")
    write_study(folder, "01_study-Copy1", "value = 1", saved="01_study")
    assert run_batch(reports, "-p", "n", "5") == 0
    assert "01_study-Copy1.ipynb is skipped" in capsys.readouterr().err
    assert [p.name for p in reports.rglob("*Copy*")] == []


def test_a_run_publishes_what_is_its_own(small):
    folder, reports = small
    write_study(folder, "01_study", "import os; assert os.environ['WORKBOOK_STUDY'] == '01_study'")
    assert run_batch(reports) == 0
    write_study(folder, "02_copy", "n = 7", saved="01_study")
    assert run_batch(reports) == 1
    assert (reports / "results" / "01_study.csv").read_text() == "1"
    assert "results/01_study.csv: expected files of its own name" in last_run("02_copy", reports, failed=True).error


# --- nothing that ran is lost to presentation -------------------------------------------------------------------------

REFUSED = [r"$\left( a$", "$x^$", r"$$ a \over $$", "costs $5 to $10", "`$DATA_ROOT`, else `$CACHE_ROOT`"]
REFUSED += ["$5-$10", "```sh\necho $HOME $PATH\n```", "~~~\n$x$\n~~~", r"\$5 and \$6", "for $10, in `$HOME`"]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_formula_stays_text(text):
    assert mathml(text) == text


@pytest.mark.parametrize(
    "text", ["$x$", "($a$)", "$a\n+ b$", "a ` b\n\n$x$ ` c", "`$A` $x$ `$B`", "$$a\n+ b$$", "| $|w|$ |"]
)
def test_what_is_a_formula_is_drawn(text):
    assert mathml(text).count("<math") == 1


def test_a_formula_that_is_refused_costs_no_report(small):
    folder, reports = small
    write_study(folder, "01_study", "value = 1", text=" ".join(REFUSED[:3]))
    assert run_batch(reports) == 0
    assert r"\left( a" in (reports / "01_study.html").read_text("utf-8")


def test_answer_figure_and_provenance_are_read_as_data(tmp_path):
    shown = [
        study.Shown("<p>opened</p>", provenance={"threads": 1}),
        study.Shown("<figure>one</figure>", figure="one", svg="<svg/>"),
        study.Shown("<figure>two</figure>", figure="two", svg="<svg>2</svg>"),
        study.Shown("<p class=answer>It <b>does</b>.</p>", answer="It <b>does</b>."),
    ]
    cells = [new_markdown_cell("# Q & A\n\n**Question.** Does it?")]
    cells += [new_code_cell("x", outputs=[new_output("display_data", o._repr_mimebundle_())]) for o in shown]
    nbformat.write(new_notebook(cells=cells), executed := tmp_path / "01_mine.ipynb")
    found, page = outline(executed), render(executed)
    told = {"title": "Q &amp; A", "answer": "It <b>does</b>.", "evidence": ""}
    assert found == told | shown[1].said | shown[0].said
    assert page.count("It <b>does</b>.") == page.count("<p>opened</p>") == 1
    places = [page.index(part) for part in ("Does it?", "It <b>", "<figure>one", "<figure>two", "<p>opened")]
    assert places == sorted(places)  # title, answer, figures, and at the foot what the study was opened with
    cells.insert(3, new_markdown_cell("Some words.\n\n## Claims\n\nIt does."))  # a picture before them is of a method
    nbformat.write(new_notebook(cells=cells), executed)
    assert (outline(executed)["figure"], outline(executed)["svg"]) == ("two", "<svg>2</svg>")


def test_a_page_runs_nothing_of_a_raw_cell_and_shows_code_as_it_is(tmp_path):
    raw = new_raw_cell("<script>alert(1)</script>", metadata={"raw_mimetype": "text/html"})
    cells = [new_markdown_cell("# Mine"), new_code_cell("a < '<script>'"), raw]
    nbformat.write(new_notebook(cells=cells), executed := tmp_path / "01_mine.ipynb")
    page = render(executed)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(small):
    """A study that says when it runs, then waits to be let go: ``(notebooks, reports, started, go)``."""
    folder, reports = small
    started, go = folder / "started", folder / "go"
    source = (
        f"import time\nfrom pathlib import Path\nPath({str(started)!r}).write_text(str(n))\n"
        f"while not Path({str(go)!r}).exists(): time.sleep(0.1)"
    )
    write_study(folder, "01_slow", source)
    return folder, reports, started, go


def begin(folder, reports, said=subprocess.PIPE):
    """The batch in a process of its own, which knows these notebooks; what it says may go into a file."""
    code = (
        "import sys; from pathlib import Path; from lib import study; from lib.reproduce import batch\n"
        f"study.parameters.NOTEBOOKS = Path({str(folder)!r}); batch.PROJECT = Path({str(folder.parent)!r})\n"
        "from lib.reproduce.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["--preset", "smoke", "--reports", str(reports)]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  # what runs in the background ignores it
    return subprocess.Popen([sys.executable, "-c", code, *words], stderr=said, text=True, preexec_fn=heard)


def wait_for(condition, seconds=300):  # of which a busy machine takes most to import torch
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


def test_a_killed_batch_leaves_no_report_and_no_process(slow):
    folder, reports, started, go = slow
    process = begin(folder, reports)
    wait_for(started.exists)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 2  # papermill and its kernel
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(below, timeout=30)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in below)
    assert [p for p in reports.rglob("*") if p.is_file()] == []
    go.touch()
    assert run_batch(reports) == 0  # the same command goes on
    assert (reports / "01_slow.html").is_file()
    assert list((batch.folders("smoke", reports)[1]).glob("*.run")) == []


def test_rows_are_merged_after_a_run_which_publishes_the_table_that_it_began_with(small, tmp_path):
    folder, reports = small
    write_study(folder, "01_study", "n")
    row = Measurement("kept", ({"seed": 0, "kept": 1.0},), "p", "c")
    write_table(tmp_path / "theirs" / "results" / "01_study.csv", [row])
    (build := batch.folders("smoke", reports)[1]).mkdir(parents=True)
    adds = threading.Thread(target=lambda: batch.merged("smoke", tmp_path / "theirs", reports))
    with FileLock(build / "01_study.lock"):  # as a batch holds it
        adds.start()
        adds.join(0.3)
        write_table(table := reports / "results" / "01_study.csv", [])
    adds.join(10)
    assert [m.rows for m in read_table(table)] == [row.rows]


def test_cores_are_counted_where_a_process_has_none_of_its_own(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    monkeypatch.delattr(psutil.Process, "cpu_affinity", raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1 << 60))
    assert _processes() == os.cpu_count()


def test_a_killed_kernel_is_a_failure_that_is_told(slow):
    folder, reports, started, _go = slow
    process = begin(folder, reports)
    wait_for(started.exists)
    kernel = [p for p in psutil.Process(process.pid).children(recursive=True) if "ipykernel" in " ".join(p.cmdline())]
    assert kernel
    kernel[0].kill()
    assert process.wait(300) == 1
    assert "kernel died" in last_run("01_slow", reports, failed=True).error
    assert not (reports / "01_slow.html").exists()


def test_ctrl_c_ends_what_runs_and_leaves_nothing(slow):
    folder, reports, started, _go = slow
    process = begin(folder, reports)
    wait_for(started.exists)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    assert "the same command goes on" in process.stderr.read()
    psutil.wait_procs(below, timeout=30)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in below)
    assert not (reports / "runs").exists()


def test_two_batches_at_once_run_a_study_once(slow):
    folder, reports, started, go = slow
    write_study(folder, "02_other", "value = 1")
    said = [folder / "first", folder / "second"]
    first, second = (begin(folder, reports, file.open("w")) for file in said)
    wait_for(lambda: started.exists() and all("studies" in file.read_text() for file in said))  # both have begun
    time.sleep(1)
    go.touch()
    assert (first.wait(300), second.wait(300)) == (0, 0)
    assert "ran in another batch" in "".join(file.read_text() for file in said)
    assert {p.name for p in (reports / "runs").iterdir()} == {"01_slow.json", "02_other.json"}
    assert (reports / "index.html").read_text().count('class="state complete"') == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no such template")])
def test_a_page_that_cannot_be_laid_out_costs_no_report_and_no_result(small, monkeypatch, error, capsys):
    folder, reports = small
    write_study(folder, "01_study", "value = 1")
    assert run_batch(reports) == 0
    good = (reports / "01_study.html").read_text()

    def full(*words, **named):
        raise error

    monkeypatch.setattr(room.run, "render", full)
    assert run_batch(reports, "--force") == 1
    assert error.args[-1] in capsys.readouterr().err
    assert (reports / "01_study.html").read_text() == good
    assert last_run("01_study", reports).error == ""
    (batch.folders("smoke", reports)[1] / "01_study.ipynb").unlink()
    write_study(folder, "01_study", "n = 2")
    assert run_batch(reports) == 1
    assert (reports / "results" / "01_study.csv").read_text() == "2"  # what was measured is kept
    assert (batch.folders("smoke", reports)[1] / "01_study.ipynb").is_file()
    assert "its page could not be laid out" in (reports / "01_study.failed.html").read_text("utf-8")


def test_a_full_disk_costs_the_study_and_no_report(small, monkeypatch, capsys):
    folder, reports = small
    write_study(folder, "01_study", "value = 1")
    assert run_batch(reports) == 0
    good = (reports / "01_study.html").read_text()
    real = room.run.write_whole

    def full(path, content):
        if path.is_relative_to(reports):
            raise OSError(28, f"cannot write {path}: No space left on device")
        real(path, content)

    monkeypatch.setattr(room.run, "write_whole", full)
    assert run_batch(reports, "--force") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (reports / "01_study.html").read_text() == good


def test_a_run_is_stopped_between_two_looks(slow):
    folder, reports, _started, _go = slow
    stop = threading.Event()
    threading.Timer(2, stop.set).start()
    with pytest.raises(room.run.Interrupted):
        room.run_study("01_slow", {}, reports, folder / "build", stop=stop)
    assert list((folder / "build").glob("*.run")) == []


# --- requests that cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "fast"], "preset 'fast' is unknown: allowed are paper, quick, smoke"),
        (["02_none"], "study '02_none' is unknown: allowed are 0"),
        (["--jobs", "0"], "--jobs 0: allowed are whole numbers from 1"),
        (["01", "-p", "sparsity", "0.5"], "parameter 'sparsity' is unknown in 01: near are sparsities"),
        (["--audit", "2"], "an audit of a share of 2.0: allowed are shares above 0, up to 1"),
        (["--again"], "--again says what --audit measures again: expected both"),
        (["--experiment", "retrained"], "--experiment says what --audit measures again: expected both"),
        (["01", "--preset", "paper", "--audit", "--experiment", "none"], "--experiment none: there were measured "),
    ],
)
def test_wrong_requests_are_one_line_and_exit_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", r"mine\.yaml is no YAML"),
        ("01_study: {word: Gr\u00f6\u00dfe}".encode("latin-1"), r"mine\.yaml is no YAML in UTF-8"),
        (b"- 01_study", r"mine\.yaml holds \['01_study'\]: expected `study:`"),
        (b"01_study: [n, 5]", r"mine\.yaml, 01_study holds \['n', '5'\]: expected"),
        (b"01_study: {n: 1, x: 2, n: 3}", r"mine\.yaml: 'n' is there twice"),
        (b"01_study: {n: 1}\n01_study: {n: 2}", r"mine\.yaml: '01_study' is there twice"),
        (b"01_study: {n: no}", "01_study at mine: n = 'no' is str: expected int"),
        (b"01_study: {n: 1:30}", "n = '1:30' is str: expected int"),
        (b"01_study: {n: }", "n = '' is str: expected int"),
        (b"01_study: {n: {a: 1}}", "n = {'a': '1'} is dict: expected int"),
        (b"02_none: {n: 1}", "study '02_none' is unknown"),
    ],
)
def test_a_preset_that_cannot_be_meant_is_refused_by_name(small, content, message):
    folder, _ = small
    write_study(folder, "01_study", "value = 1")
    (folder / "presets" / "mine.yaml").write_bytes(content)
    with pytest.raises(study.ParameterError, match=message):
        preset_parameters("mine")


def test_no_file_is_read_or_written_in_the_machine_s_own_encoding():
    for file in (study.PROJECT / "lib").rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            given = {word.arg for word in call.keywords}
            if name in ("read_text", "write_text"):
                assert "encoding" in given or len(call.args) > (name == "write_text"), f"{file}:{call.lineno}"
            if name == "open" and isinstance(call.func, ast.Name):
                assert "encoding" in given or "b" in ast.unparse(call.args[1]), f"{file}:{call.lineno}"
            if name in ("run", "Popen", "check_output"):
                assert not given & {"text", "universal_newlines"}, f"{file}:{call.lineno}"


def test_unwritable_reports_are_refused_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")  # root may write to any folder, so a mode would not stop it
    assert main(["--preset", "smoke", "--reports", str(tmp_path / "file" / "reports")]) == 2
    assert "cannot write" in capsys.readouterr().err


# --- papermill by hand ------------------------------------------------------------------------------------------------


def _papermill(folder, *parameters):
    notebook = study.NOTEBOOKS / f"{NAME}.ipynb"
    command = [sys.executable, "-m", "papermill", str(notebook), "out.ipynb", "-k", "python3", *parameters]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_plain_papermill_works_from_any_folder(tmp_path):
    values = [word for name, value in TINY.items() for word in ("-p", name, str(value))]
    run = _papermill(tmp_path, "-p", "sparsities", "[0.5, 0.9]", *values)
    assert run.returncode == 0, run.stderr[-2000:]
    assert [p.name for p in tmp_path.glob("*.ipynb")] == ["out.ipynb"]
    assert "Verdicts" in render(tmp_path / "out.ipynb")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sparsity", "0.5", "parameter 'sparsity' is unknown"),
        ("sparsities", "[1.5]", "sparsities = [1.5]: expected at least 1, each in [0, 1), distinct"),
    ],
)
def test_plain_papermill_stops_in_the_set_up_cell(tmp_path, name, value, message):
    run = _papermill(tmp_path, "-p", name, value)
    assert run.returncode != 0
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    errors = [o for c in cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    assert len(errors) == 1
    assert message in errors[0].evalue
    assert len(errors[0].traceback) == 1
    assert sum(c.get("execution_count") is not None for c in cells) <= 3


def test_a_damaged_record_means_the_study_runs_again(small):
    folder, reports = small
    write_study(folder, "01_study", "value = 1")
    run_batch(reports)
    record = reports / "runs" / "01_study.json"
    record.write_text(record.read_text()[:40])
    assert batch.state("01_study", {}, reports) == "never ran"
    assert run_batch(reports) == 0
    assert json.loads(record.read_text())["study"] == "01_study"
