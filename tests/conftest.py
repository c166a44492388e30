import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.nn.functional import avg_pool2d

from lib import data, models

PROJECT = Path(__file__).resolve().parent.parent


LONG = ("test_paper", "test_snakefile", "test_reproduce", "test_reports")
SMOKE = ["00_start_here", "01_lottery_ticket_vs_finetuning"]


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process is left alone with one at the end."""
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """Each test has a cache of its own and one thread, as a study has."""
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.delenv("DATA_ROOT", raising=False)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def images():
    """A thousand real training images."""
    return data.load(train_size=1000, test_size=500, validation_size=500)


@pytest.fixture(scope="session")
def small_images(images):
    """The same in 14x14, for laws that hold at any size."""
    parts = {name: getattr(images, name) for name in ("train", "validation", "test")}
    return replace(images, **{name: replace(split, x=avg_pool2d(split.x, 2)) for name, split in parts.items()})


@pytest.fixture
def net(images):
    return models.build("lenet300", images.shape, images.classes, seed=1)


@pytest.fixture
def study_file():
    """The notebook that parameter tests speak of."""
    path = PROJECT / "notebooks" / "01_lottery_ticket_vs_finetuning.ipynb"
    return path, json.loads(path.read_text())


def once(tmp_path_factory, name):
    """A folder of this name for all test processes, and the lock under which one of them fills it."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    return place, FileLock(f"{place}.lock")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The reports of a smoke run of the tour and of a study with two networks; nbval runs the notebooks of all."""
    from lib import reproduce

    place, lock = once(tmp_path_factory, "smoke-run")
    with lock, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHE_ROOT", str(place / "cache"))
        # nothing is left to do the second time
        errors = reproduce.reproduce("smoke", only=SMOKE, changed={"seeds": 2}, reports=place / "smoke", jobs=2)
    assert errors == dict.fromkeys(SMOKE, "")
    return place / "smoke"


@pytest.fixture(scope="session")
def paper(tmp_path_factory):
    """The paper preset, rendered from its rows alone, where there is neither a cache nor another data set."""
    place, lock = once(tmp_path_factory, "paper-run")
    committed = PROJECT / "reports" / "paper" / "results"
    with lock:
        if not place.is_dir():
            shutil.copytree(committed, place / "paper" / "results")
            env = os.environ | {"CACHE_ROOT": str(place / "cache"), "DATA_ROOT": str(place / "none")}
            words = sorted(table.stem for table in committed.glob("*.csv"))
            words += ["--preset", "paper", "--render", "--jobs", "2", "--reports", str(place / "paper")]
            command = [sys.executable, "-m", "lib.reproduce", *words]
            with (place / "log").open("w") as log:
                done = subprocess.run(command, cwd=PROJECT, env=env, stdout=log, stderr=log, timeout=1500)
            (place / "ended").write_text(str(done.returncode))
    assert (place / "ended").read_text() == "0", (place / "log").read_text()[-3000:]
    assert not [*(place / "cache").rglob("*.pt")]
    return place / "paper"


@pytest.fixture(scope="session")
def chromium():
    """A browser, or the test is skipped."""
    pytest.importorskip("playwright")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no headless browser on this machine")
    return found


class Bypassed(torch.nn.Module):
    """Multiplies by the weight of a layer that it never calls, so that no hook of that layer fires."""

    def __init__(self):
        super().__init__()
        self.fc, self.unused = torch.nn.Linear(784, 10), torch.nn.Linear(10, 10)

    def forward(self, x):
        return torch.nn.functional.linear(x.flatten(1), self.fc.weight)


@pytest.fixture
def bypassed():
    return Bypassed()
