"""The batch through Snakemake, two jobs at a time: the numbers that one process gives. An extra: skips without it."""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lib.study import PROJECT
from lib.study.tables import read_table

NAME = "01_lottery_ticket_vs_finetuning"


@pytest.fixture
def snakemake(tmp_path):
    """Runs it on this project: ``snakemake(*words)`` returns what it said."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = shutil.which("snakemake", path=path) or pytest.skip("snakemake is not installed")

    def run(*words, config=(), command=(found,)):
        places = [f"reports={tmp_path}/many/smoke", f"parts={tmp_path}/parts"]
        command = [*command, "--jobs", "2", "--nolock", *words, "--config", "preset=smoke", f"studies={NAME}", *places]
        command += ["set={seeds: 2, sparsities: [0.5, 0.8]}", *config]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


def test_two_jobs_give_the_numbers_of_one(snakemake, tmp_path, monkeypatch, smoke):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "shared"))
    snakemake("--quiet", "all", "--until", "part")
    with monkeypatch.context() as elsewhere:  # where no network is and nothing is measured: the parts have it all
        elsewhere.setenv("CACHE_ROOT", str(tmp_path / "empty"))
        elsewhere.setenv("WORKBOOK_CLOSED", "1")
        snakemake("--quiet", "all")
    parts = sorted(p.name for p in (tmp_path / "parts" / NAME).iterdir())
    assert parts == ["1-all-0", "2-all-0"]  # smoke begins with the second network

    shared, alone = ({p.name for p in root.rglob("*.pt")} for root in (tmp_path / "shared", smoke.parent / "cache"))
    assert shared
    assert shared <= alone  # and the tour's
    many, one = tmp_path / "many" / "smoke", smoke
    tables = [[replace(m, seconds=None) for m in read_table(r / "results" / f"{NAME}.csv")] for r in (many, one)]
    assert tables[0]
    assert repr(tables[0]) == repr(tables[1])
    verdicts = [(r / "claims" / f"{NAME}.csv").read_bytes() for r in (many, one)]
    assert verdicts[0] == verdicts[1]
    assert (tmp_path / "many" / "smoke" / "index.html").is_file()


def test_a_job_for_each_seed_and_value(snakemake):
    said = snakemake("--dry-run", "--printshellcmds", config=[f"split={{{NAME}: [top_fractions]}}"])
    jobs = [line for line in said.splitlines() if "lib.reproduce" in line and "first_seed" in line]
    assert len(jobs) == 2 * 5  # seeds, and values of top_fractions
    assert all("-p seeds 1" in job and "-p top_fractions" in job for job in jobs)


def test_an_environment_may_lie_in_a_path_with_a_space(snakemake, tmp_path):
    (tmp_path / "my environment").symlink_to(sys.prefix)
    python = str(tmp_path / "my environment" / "bin" / "python")
    said = snakemake("--dry-run", "--printshellcmds", command=(python, "-m", "snakemake"))
    jobs = [shlex.split(line.partition(": ")[2]) for line in said.splitlines() if " lib.reproduce " in line]
    assert len(jobs) == 3  # two parts, the index; the study runs the same command, after it has merged their rows
    assert all(python in job for job in jobs)
