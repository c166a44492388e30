import ast
import importlib
import inspect
import math
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from lib import study as room
from lib.reproduce import preset_parameters, presets
from lib.study import (
    NOTEBOOKS,
    PROJECT,
    ParameterError,
    Progress,
    check_parameters,
    declared,
    gain_at,
    open_study,
    provenance,
    studies,
)
from lib.study.parameters import python_of
from lib.study.ranges import read, refusal

NAME = "01_lottery_ticket_vs_finetuning"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": [0.5]}, "parameter 'sparsity' is unknown .*allowed are dataset"),
        ({"epochs": "three"}, "epochs = 'three' is str: expected int"),
        ({"epochs": "1:30"}, "epochs = '1:30' is str: expected int"),
        ({"epochs": 2.5}, "epochs = 2.5 is float: expected int"),
        ({"epochs": True}, "epochs = True is bool: expected int"),
        ({"weight_decay": "no"}, "weight_decay = 'no' is str: expected float"),
        ({"epochs": -1}, "epochs = -1: expected 1 or more$"),
        ({"sparsities": [0.5, 1.0]}, r"sparsities = \[0.5, 1.0\]: expected at least 1, each in \[0, 1\), distinct"),
        ({"sparsities": [-0.1]}, "sparsities"),
        ({"sparsities": []}, "sparsities = .*at least 1"),
        ({"sparsities": 0.5}, r"expected list\[float\]"),
        ({"sparsities": "0.5"}, r"expected list\[float\]"),
        ({"sparsities": [None]}, r"expected list\[float\]"),
        ({"sparsities": [0.5, 0.5]}, "distinct"),
        ({"learning_rates": [0.1, 0.01]}, "exactly 2, each > 0, rising"),
        ({"learning_rates": [0.1]}, "exactly 2, each > 0, rising"),
        ({"seeds": 0}, "seeds = 0"),
        ({"admm_lr": -0.1}, "admm_lr = -0.1: expected > 0"),
        ({"dataset": "fashion"}, "dataset 'fashion' is unknown: allowed are fashion_mnist"),
        ({"model": "lenet"}, "model 'lenet' is unknown: allowed are lenet5"),
        ({"data_root": "no/such/root"}, "data_root 'no/such/root' is not a folder"),
        ({"rho": float("nan")}, "rho = nan"),
        ({"rho": float("inf")}, "rho = inf"),
        ({"rewind_epoch": 7}, "rewind_epoch = 7: expected at most epochs = 5"),
    ],
)
def test_bad_parameters_are_named_in_one_line(given, message):
    with pytest.raises(ParameterError, match=message) as error:
        check_parameters(NAME, given)
    assert "\n" not in str(error.value)
    assert len(error.value._render_traceback_()) == 1


@pytest.mark.parametrize(
    ("study", "given", "message"),
    [
        ("02", {"lenet_train_sizes": [0, 0]}, r"lenet_train_sizes = \[0, 0\]: expected one for each of \['fashion"),
        ("02", {"library_sizes": [1, 56]}, r"library_sizes = \[1, 56\]: expected 8 among them"),
        ("03", {"second_model": "lenet5"}, "second_model = 'lenet5': expected another network than lenet5"),
        ("04", {"single_rates": [50.0]}, r"single_rates = \[50.0\]: expected members of \[12.0, 40.0, 100.0\]"),
        ("04", {"level_rates": [40.0, 101.0]}, r"level_rates = \[40.0, 101.0\]: expected rates up to 100"),
        ("04", {"train_sizes": [0, 0]}, r"train_sizes = \[0, 0\]: expected one for each of \['fashion_mnist'\]"),
        ("04", {"budget_rate": 50.0}, r"budget_rate = 50.0: expected 0 or a member of \[12.0, 40.0, 100.0\]"),
        ("05", {"fragment": 12}, "fragment = 12: expected a divisor of array_size = 128"),
        ("05", {"segment_rows": 129}, "segment_rows = 129: expected at most array_size = 128"),
        ("06", {"model": "resnet8"}, "second_model = 'resnet8': expected another network than resnet8"),
    ],
)
def test_parameters_that_do_not_fit_each_other_are_named_before_anything_runs(study, given, message):
    name = next(name for name in studies() if name.startswith(study))
    with pytest.raises(ParameterError, match=message):
        check_parameters(name, given)


def test_what_a_notebook_requires_stands_in_its_set_up_cell():
    for name in studies():
        code = [c for c in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells if c.cell_type == "code"]
        assert not any(".require(" in cell.source for cell in [code[0], *code[2:]])


def test_a_rule_that_needs_more_than_parameters_is_left_to_the_notebook(opened):
    check_parameters("05_crossbar_costs", {"node": "5 nm"})
    with pytest.raises(ParameterError, match="seeds = 3: expected an even number"):
        opened.require("seeds", opened.parameters["seeds"] % 2 == 0, "an even number")


GOOD_AND_BAD = [
    ("int", "1 or more", [1, 7], [0]),
    ("float", "> 0", [1e-9, 5.0], [0.0, -1.0, float("inf"), float("nan")]),
    ("float", "in [0, 1)", [0.0, 0.999], [-1e-9, 1.0]),
    ("float", "in (0, 1]", [1e-9, 1.0], [0.0, 1.001]),
    ("float", "0 or > 1", [0.0, 1.5], [1.0, 0.5, -1.0]),
    ("str", "nodal, series or line", ["nodal", "series", "line"], ["", "nodal, series", "or line"]),
    ("str", "like 1x8", ["1x8", "12x3"], ["0x8", "1x", "1x8x2", "x8"]),
    ("str", "a model or empty", ["", "lenet5", "resnet20"], ["lenet"]),
    ("str", "any text", ["", "x"], []),
    ("list[float]", "each in (0, 1], distinct", [[1.0], [0.5, 0.1]], [[], [0.5, 0.5], [0.5, 0.0]]),
    ("list[int]", "any number, each in [2, 16], distinct", [[], [2, 16]], [[1], [2, 2]]),
    ("list[int]", "exactly 3, each 1 or more", [[1, 1, 1]], [[1, 1], [1, 1, 1, 1], [0, 1, 1]]),
    ("list[float]", "at least 2, each > 0, rising", [[1.0, 2.0]], [[1.0], [2.0, 1.0], [1.0, 1.0]]),
    ("list[str]", "each filters or blocks (PIM-Prune, ours), distinct", [["blocks (PIM-Prune, ours)"]], [["ours)"]]),
]


@pytest.mark.parametrize(("kind", "words", "good", "bad"), GOOD_AND_BAD)
def test_ranges_are_what_their_words_say(kind, words, good, bad):
    refused = refusal(words, kind)
    assert [refused(value) for value in good] == [""] * len(good)
    for value in bad:
        assert words in refused(value) or "allowed are" in refused(value)


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        ("1e-4", "float", 1e-4),
        ("3", "float", 3.0),
        ("010", "int", 10),
        ("no", "str", "no"),
        ("1:30", "str", "1:30"),
        ("[1e-4, 2]", "list[float]", [1e-4, 2.0]),
        ("[1x2, '1:30', no]", "list[str]", ["1x2", "1:30", "no"]),
        ("true", "bool", True),
        (np.int64(3), "int", 3),
        (np.int64(3), "float", 3.0),
        (np.float32(0.5), "float", 0.5),
        (True, "int", True),  # refused then
        (2.0, "int", 2.0),
        ("1:30", "int", "1:30"),  # refused then, as text
        ("1e3", "int", "1e3"),
        ("1_000", "int", "1_000"),
        ("inf", "float", "inf"),
        ("[1", "list[int]", "[1"),
    ],
)
def test_values_are_read_as_their_declared_type(given, kind, value):
    found = read(given, kind)
    assert found == value
    assert type(found) is type(value)


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Writes study ``01_mine`` from the lines of its cells."""
    monkeypatch.setattr(room.parameters, "NOTEBOOKS", tmp_path)

    def write(parameters, *cells):
        cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(new_code_cell, cells)]
        nbformat.write(new_notebook(cells=cells), tmp_path / "01_mine.ipynb")

    return write


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("n: int = 1", "no range of int can be read from ''"),
        ("n: int = 1  # a count", "01_mine, n: no range of int"),
        ("n: int = 1  # a count; more than one", "can be read from 'more than one'"),
        ("n: str = 'a'  # whose wires", "no range of str"),
        ("n: list[int] = [1]  # counts; 1 or more", r"no range of list\[int\] can be read from '1 or more'"),
        ("n: dict = {}  # things; any text", "no range of dict"),
        ("n: int = 2 * 3  # six; 1 or more", "is not `name: type = literal`"),
        ("n: int =", "its parameters are no Python"),
        ("n: int = 0  # a count; 1 or more", "n = 0: expected 1 or more"),
    ],
)
def test_no_parameter_slips_through_unchecked(notebook, line, message):
    notebook(line)
    with pytest.raises(ParameterError, match=message):
        check_parameters("01_mine", {})


def test_code_is_read_as_ipython_reads_it(notebook):
    notebook(
        "n: int = 1  # a count; 1 or more", "x = 1\n%matplotlib inline\n!ls", "%%time\ny = 2", "broken = (", "z = 3"
    )
    names = {node.id for node in ast.walk(ast.parse(python_of("01_mine"))) if isinstance(node, ast.Name)}
    assert {"x", "z", "get_ipython"} <= names
    assert "broken" not in names  # the kernel says so, in its cell


@pytest.mark.parametrize(
    "text", ["<<<<<<< ours", "", "[]", '{"worksheets": []}', '{"cells": ["x = 1"]}', '{"cells": 3}']
)
def test_a_damaged_notebook_is_named(notebook, tmp_path, text):
    (tmp_path / "01_mine.ipynb").write_text(text)
    with pytest.raises(ParameterError, match=r"01_mine\.ipynb is no notebook"):
        declared("01_mine")


def test_good_parameters_come_with_defaults():
    values = check_parameters(NAME, {"epochs": 2, "weight_decay": 0})
    assert values["epochs"] == 2
    assert values["dataset"] == "fashion_mnist"
    assert set(values) == set(declared(NAME))


def test_unknown_study_is_named():
    with pytest.raises(ParameterError, match="'02_none' is unknown: allowed are 0"):
        declared("02_none")


def test_names_that_papermill_injected_are_checked():
    cells = ["", "epochs: int = 6", "# Parameters\nepoch = 3\n"]
    with pytest.raises(ParameterError, match="parameter 'epoch' is unknown"):
        open_study(NAME, {"epoch": 3, "In": cells})


def test_a_notebook_publishes_under_its_own_name_alone(monkeypatch):
    monkeypatch.setenv("WORKBOOK_STUDY", "90_copy")
    with pytest.raises(ParameterError, match=r"open_study\('01_lot.* in 90_copy.ipynb: expected '90_copy'"):
        open_study(NAME, {})


def test_copies_are_no_studies(notebook, tmp_path):
    notebook("n: int = 1  # a count; 1 or more")
    for copy in ("01_mine-Copy1", "01_mine (1)", "Untitled", "1_mine"):
        (tmp_path / f"{copy}.ipynb").write_bytes((tmp_path / "01_mine.ipynb").read_bytes())
    assert studies() == ["01_mine"]


def test_a_commit_is_that_of_the_project_and_of_no_repository_around_it(tmp_path, monkeypatch):
    def git(*words):
        own = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *own, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("")
    (tmp_path / "inner").mkdir()
    git("add", "file")
    git("commit", "-m", "theirs")
    monkeypatch.setattr(room.opened, "PROJECT", tmp_path / "inner")
    assert room.opened.commit() == "unknown"
    monkeypatch.setattr(room.opened, "PROJECT", tmp_path)
    assert len(room.opened.commit()) >= 9


def test_progress_never_says_more_than_its_total(capsys):
    progress = Progress(2)
    for name in "abc":
        progress.part(name)(1.5, "beyond the end")
        assert progress.finished <= progress.total
    progress.done()
    said = []
    progress.handle = None
    progress._write = said.append
    progress.part("d")
    progress.done()
    assert "part 4 of 4" in said[0]
    assert said[1].startswith("4 parts done")
    assert said[1].endswith(", 2 were expected")


def test_read_only_report_folder_is_refused_before_anything_runs(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")  # root may write to any folder, so a mode would not stop it
    with pytest.raises(ParameterError, match=r"report_dir = .*cannot write"):
        open_study(NAME, {"report_dir": str(blocker / "reports")})


@pytest.fixture
def opened(tmp_path):
    return open_study(NAME, {"report_dir": str(tmp_path / "paper"), "seeds": 3})


# --- the notebooks and presets as files -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", studies())
def test_notebook_is_clean(name):
    text = (NOTEBOOKS / f"{name}.ipynb").read_text("utf-8")
    notebook = nbformat.reads(text, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(c.get("outputs") or c.get("execution_count") for c in notebook.cells)
    assert not any(f"/{folder}/" in text for folder in ("home", "root", "Users", "tmp", "work"))
    parameters = declared(name)  # one cell, `name: type = literal` on every line
    assert all(p.help and not set("\"'") & set(p.help) for p in parameters.values())
    assert parameters["report_dir"].default == ""
    assert check_parameters(name, {}) == {p.name: p.default for p in parameters.values()}
    code = [c.source.splitlines() for c in notebook.cells if c.cell_type == "code" and "tags" not in c.metadata]
    assert max(sum(not line.startswith(("import ", "from ")) for line in lines) for lines in code) <= 50
    kinds = "".join(c.cell_type[0] for c in notebook.cells)
    assert "ccccc" not in kinds  # a reader meets a sentence after four cells of code at most
    assert notebook.cells[0].source.startswith("# ")
    assert room.question(name).endswith("?")


@pytest.mark.parametrize("name", studies())
def test_a_notebook_uses_what_lib_has_after_it_is_imported(name):
    cells = [c.source for c in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells if c.cell_type == "code"]
    trees = [list(ast.walk(ast.parse(source))) for source in cells]
    imports = [[n for n in tree if isinstance(n, ast.ImportFrom) and n.module.split(".")[0] == "lib"] for tree in trees]
    every = {(a.asname or a.name): (n.module, a.name) for found in imports for n in found for a in n.names}
    known = {}
    for tree, found in zip(trees, imports, strict=True):
        for module, own, alias in ((n.module, a.name, a.asname or a.name) for n in found for a in n.names):
            known[alias] = getattr(importlib.import_module(module), own, None) or importlib.import_module(
                f"{module}.{own}"
            )
        used = {n.id for n in tree if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} & every.keys()
        assert used <= known.keys(), "used before it is imported"
        for node in (n for n in tree if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)):
            room = known.get(node.value.id)
            assert not inspect.ismodule(room) or hasattr(room, node.attr), f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("preset", presets())
def test_preset_fits_the_notebooks(preset):
    assert set(preset_parameters(preset)) == set(studies())


def test_unknown_preset_is_named():
    with pytest.raises(ParameterError, match="'fast' is unknown: allowed are paper, quick, smoke"):
        preset_parameters("fast")


@pytest.mark.parametrize("name", studies())
def test_parameter_help_is_what_papermill_shows(name):
    from papermill import inspect_notebook

    found = inspect_notebook(str(NOTEBOOKS / f"{name}.ipynb"))
    mine = declared(name)
    assert list(found) == list(mine)
    assert all(found[n]["help"] == mine[n].help for n in mine)
    assert all(found[n]["inferred_type_name"] == mine[n].type for n in mine)


def test_provenance_has_no_path(opened):
    assert str(PROJECT) not in opened._repr_mimebundle_()["text/html"]
    assert {"commit", "torch", "device", "threads"} <= set(opened.provenance)


@pytest.mark.parametrize(("limits", "said"), [({}, ""), ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, " (oneDNN: at most AVX2)")])
def test_provenance_names_processor_and_instructions(monkeypatch, limits, said):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    told = provenance()
    assert told["instructions"] == torch.backends.cpu.get_cpu_capability() + said
    assert told["cpu"]
    told_by_linux = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    assert "model name" not in told_by_linux or f": {told['cpu']}\n" in told_by_linux


def test_gain_is_read_at_the_first_crossing():
    assert gain_at([1, 4, 16], [90.0, 89.0, 87.0], 88.0) == pytest.approx(8)
    assert gain_at([16, 1, 4], [87.0, 90.0, 89.0], 88.0) == pytest.approx(8)  # order is of no account
    assert gain_at([1, 4, 4], [90, 89.5, 70], 89) == 4  # of two runs at one gain the better one
    assert gain_at([1, 2, 4, 8], [90, 88, 91, 80], 89) == pytest.approx(2**0.5)  # a recovery does not count
    assert gain_at([1, 4], [90, 89], 88) == 4
    assert math.isnan(gain_at([1, 4], [87, 89], 88))
    nan = math.nan  # of a training that diverged: it reaches nothing, and where accuracy fell is not known
    assert gain_at([1, 4, 16], [90, 87, nan], 88) == gain_at([1, 4], [90, 87], 88)
    for accuracies, floor in (([90, nan, 89], 88), ([nan, 90, 89], 88), ([90, 89, 87], nan)):
        assert math.isnan(gain_at([1, 4, 16], accuracies, floor))
    for gains, accuracies in (([], []), ([1, 2], [1]), ([0, 1], [1, 1]), ([1, nan], [1, 1])):
        with pytest.raises(ParameterError, match="expected as many"):
            gain_at(gains, accuracies, 0)
