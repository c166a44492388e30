"""Batch runs from end to end: reports that open anywhere, failures that are seen, runs that resume."""

import re
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lib import reproduce as room
from lib import study
from lib.reproduce import main, render, reproduce

NAME = "01_lottery_ticket_vs_finetuning"
TINY = {"train_size": 256, "test_size": 256, "epochs": 2, "admm_epochs": 1, "seeds": 1}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The reports of a smoke run."""
    reports = tmp_path_factory.mktemp("reports") / "smoke"
    outcomes = reproduce("smoke", reports=reports)
    assert {o.study: o.error for o in outcomes} == dict.fromkeys(room.studies(), "")
    return reports


def test_everything_that_the_contract_names_is_there(smoke):
    assert {p.name for p in smoke.iterdir()} == {
        *(f"{name}.html" for name in room.studies()),
        "index.html",
        "claims.csv",
        "results",
        "claims",
        "figures",
    }
    ledger = pd.read_csv(smoke / "claims.csv")
    assert tuple(ledger.columns) == study.CLAIM_COLUMNS
    chance = ~ledger["criterion"].str.endswith("arithmetic")
    assert set(ledger.loc[chance, "verdict"]) == {"inconclusive"}  # one seed is no evidence
    assert ledger.loc[ledger["study"] == NAME, "measured"].notna().all()
    results = pd.read_csv(smoke / "results" / f"{NAME}.csv")
    assert {"seed", "trial", "quantity", "value"} <= set(results.columns)


def test_the_first_figure_stands_alone_for_the_index(smoke):
    figure = (smoke / "figures" / f"{NAME}.svg").read_text()
    assert "desirable rate" in figure  # a curve's title, not one of the page's icons
    assert f"figures/{NAME}.svg" in (smoke / "index.html").read_text()


def test_budgets_count_every_epoch(smoke):
    results = pd.read_csv(smoke / "results" / f"{NAME}.csv").query("quantity == 'accuracy_percent'")
    spent = results.groupby(["mask", "sparsity", "mode"])["total_epochs"].unique().apply(tuple).to_dict()
    assert spent["none", 0.0, "dense"] == (2,)
    assert spent["one-shot", 0.8, "fine-tune"] == spent["one-shot", 0.8, "ticket"] == (4,)
    assert spent["ADMM", 0.8, "rewind"] == (5,)
    assert spent["iterative", 0.5, "ticket"] == (4,)  # the first round prunes the dense network
    assert spent["iterative", 0.8, "ticket"] == (8,)  # rounds at 0.5, 0.75, 0.8: two more trainings


def test_page_asks_for_nothing_from_outside(smoke):
    for page in smoke.glob("*.html"):
        text = page.read_text()
        outside = re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:|#|["'])([^"'\s>]+)""", text)
        linked = re.findall(r'<a[^>]*href="(https?:[^"]+)"', text)
        assert [u for u in outside if ":" in u and u not in linked] == []
        assert "<script" not in text
        assert "$" not in re.sub(r"<(pre|style).*?</\1>|data:[^\"]*", "", text, flags=re.DOTALL)
        assert str(study.PROJECT) not in text
        assert all('alt=""' not in tag and "alt=" in tag for tag in re.findall(r"<img[^>]*>", text))
        assert page.stat().st_size < 3_000_000


def test_page_opens_in_a_browser_without_a_complaint(smoke, chromium, tmp_path):
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --enable-logging=stderr"
    )
    page = smoke / f"{NAME}.html"
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path}", "--dump-dom", page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Verdicts" in run.stdout
    assert [line for line in run.stderr.splitlines() if "CONSOLE" in line] == []


def test_a_second_run_has_nothing_to_do(smoke, monkeypatch):
    monkeypatch.setattr(room, "run_study", lambda *a: pytest.fail("the study ran again"))
    before = (smoke / f"{NAME}.html").stat().st_mtime_ns
    reproduce("smoke", reports=smoke)
    assert (smoke / f"{NAME}.html").stat().st_mtime_ns == before


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Three studies: one that raises, one whose kernel dies, one that works."""
    folder = tmp_path / "notebooks"
    (folder / "presets").mkdir(parents=True)
    cells = {
        "01_raises": "raise ValueError('the cell says why')",
        "02_dies": "import os; os._exit(1)",
        "03_works": "print(n)",
    }
    for name, source in cells.items():
        parameters = new_code_cell(
            'n: int = 1  # a number\nreport_dir: str = ""  # where', metadata={"tags": ["parameters"]}
        )
        notebook = new_notebook(
            cells=[new_markdown_cell(f"# {name}"), parameters, new_code_cell(source), new_code_cell("1")]
        )
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, folder / f"{name}.ipynb")
    (folder / "presets" / "smoke.yaml").write_text("03_works: {n: 7}\n")
    monkeypatch.setattr(room, "NOTEBOOKS", folder)
    monkeypatch.setattr(study.parameters, "NOTEBOOKS", folder)
    study.declared.cache_clear()
    yield folder
    study.declared.cache_clear()


def test_a_failed_study_is_seen_and_stops_no_other(broken, tmp_path, capsys):
    reports = tmp_path / "reports"
    assert main(["--preset", "smoke", "--reports", str(reports)]) == 1
    errors = {o.study: o.error for o in (room.last_outcome(s, room.build_folder(reports)) for s in room.studies())}
    assert errors["01_raises"] == "ValueError: the cell says why"
    assert errors["02_dies"]
    assert errors["03_works"] == ""
    index = (reports / "index.html").read_text()
    assert "failed: ValueError: the cell says why" in index
    assert index.count("failed: ") == 2
    assert "the cell says why" in (reports / "01_raises.html").read_text()
    assert (reports / "03_works.html").is_file()


def test_only_failed_studies_run_again(broken, tmp_path, monkeypatch):
    reports = tmp_path / "reports"
    main(["--preset", "smoke", "--reports", str(reports)])
    ran = []
    real = room.run_study
    monkeypatch.setattr(room, "run_study", lambda name, *a: ran.append(name) or real(name, *a))
    main(["--preset", "smoke", "--reports", str(reports)])
    assert ran == ["01_raises", "02_dies"]


def test_a_notebook_that_stopped_half_way_is_no_success(tmp_path):
    done, missing = new_code_cell("1", execution_count=1), new_code_cell("2")
    nbformat.write(new_notebook(cells=[done, missing]), tmp_path / "half.ipynb")
    assert room._failure(tmp_path / "half.ipynb", 0).startswith("1 of 2 cells did not run")
    assert "no notebook" in room._failure(tmp_path / "none.ipynb", -9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "fast"], "preset 'fast' is unknown: allowed are paper, quick, smoke"),
        (["--only", "02_none"], "study '02_none' is unknown: allowed are 01_"),
        (["--jobs", "0"], "--jobs 0: allowed are whole numbers from 1"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_unwritable_reports_are_refused_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")  # root may write to any folder, so a mode would not stop it
    assert main(["--preset", "smoke", "--reports", str(tmp_path / "file" / "reports")]) == 2
    assert "cannot write" in capsys.readouterr().err


def _papermill(folder, *parameters):
    notebook = room.NOTEBOOKS / f"{NAME}.ipynb"
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
        ("sparsities", "[1.5]", "sparsities = [1.5]: allowed are"),
        ("data_root", "no/such/root", "data_root 'no/such/root' is not a folder"),
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
