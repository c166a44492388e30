import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.nn.functional import avg_pool2d

from lib import data, models

PROJECT = Path(__file__).resolve().parent.parent


LONG = ("test_paper", "test_snakefile", "test_reproduce", "test_reports")


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


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The reports of a smoke run, made once for all test processes; ``SMOKE_CACHE`` keeps its networks for nbval."""
    from lib import reproduce, study

    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke-run"
    with FileLock(f"{place}.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHE_ROOT", os.environ.get("SMOKE_CACHE") or str(place / "cache"))
        errors = reproduce.reproduce("smoke", reports=place / "smoke", jobs=2)  # nothing is left to do the second time
    assert errors == dict.fromkeys(study.studies(), "")
    return place / "smoke"


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
