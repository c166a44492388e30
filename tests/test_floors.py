"""A file of lib imports its own room and lower floors only, also inside functions."""

import ast
import re
from pathlib import Path

import pytest

LIB = Path(__file__).resolve().parent.parent / "lib"
FLOORS = (
    {"files", "technology", "data", "models"},
    {"shapes", "keys"},
    {"constraint"},
    {"pruning", "quantization", "sharing", "crossbar", "training"},
    {"channels", "faults", "kernels"},
    {"costs", "layers"},
    {"recipes"},
    {"study", "export", "language", "published"},
    {"plots"},
    {"reproduce"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SHOW = {"matplotlib", "seaborn", "IPython", "papermill"}
"""What shows or runs things: nothing below the study knows it."""
FILES = sorted(file for file in LIB.rglob("*.py") if file.parent != LIB or file.stem != "__init__")


def imported(file: Path) -> set[str]:
    """``lib.room`` and the first names of everything else that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"lib.{alias.name}" for alias in node.names} if node.module == "lib" else {node.module}
    return {".".join(name.split(".")[: 1 + name.startswith("lib.")]) for name in found}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(LIB).as_posix())
def test_nothing_above_is_imported(file):
    room = file.relative_to(LIB).parts[0].removesuffix(".py")
    rooms = {name.removeprefix("lib.") for name in imported(file) if name.startswith("lib.")}
    assert rooms <= FLOOR.keys(), "a room without a floor"
    assert {other for other in rooms if FLOOR[other] >= FLOOR[room]} <= {room}
    assert FLOOR[room] >= FLOOR["study"] or not imported(file) & SHOW


def test_what_is_reached_through_a_room_comes_with_it():
    """``room.file.name`` works in a fresh kernel only if the room imports the file."""
    texts = [*LIB.rglob("*.py"), *LIB.parent.glob("notebooks/*.ipynb"), *LIB.parent.glob("*.md")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in texts)
    reached = set(re.findall(r"(?<![\w.])(\w+)\.(\w+)\.\w", text))
    for init in LIB.glob("*/__init__.py"):
        room, brought = init.parent.name, init.read_text(encoding="utf-8")
        files = {file.stem for file in init.parent.glob("*.py") if (room, file.stem) in reached}
        assert all(f"from lib.{room}.{file} import" in brought for file in files), (room, files)
