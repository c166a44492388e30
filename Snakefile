"""The batch on many machines, for who has them: an extra that needs `pip install "snakemake~=9.0"`.

    snakemake --jobs 8 --config preset=paper                       # this machine
    snakemake --jobs 30 --executor slurm --config preset=paper     # a cluster, with Snakemake's plugin for it

Every network of a study is trained by a job of its own, which is the command of the README with `first_seed` and
`seeds = 1`. It begins with the measurements that the report has, so that a seed more measures only its own; the job of
the study itself merges those of all parts and measures what no part has. A cache on a file system that every machine
sees (`CACHE_ROOT`) shares networks too.

Config: preset (quick), studies (all, by name), reports (reports/PRESET), parts (build/parts/PRESET), set (parameters
over the preset's, {name: value}), split ({study: [name]}, parameters that hold a list: a job for each of its values).
"""

import json
import shlex
import sys
from pathlib import Path

from lib.reproduce import preset_parameters
from lib.study import declared, studies
from lib.study.tables import merge


def options(values):
    """Text goes as it is: Snakemake hands numbers inside of --config on as text, and the batch reads them by type."""
    told = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return " ".join(f"-p {name} {shlex.quote(value)}" for name, value in told.items())


PRESET = config.get("preset", "quick")
PARTS = config.get("parts", f"build/parts/{PRESET}")
REPORTS = config.get("reports", f"reports/{PRESET}")
SET = config.get("set", {})
SPLIT = config.get("split", {})
STUDIES = str(config.get("studies", " ".join(studies()))).split()
PARAMETERS = preset_parameters(PRESET, SET, STUDIES)
RUN = f"{shlex.quote(sys.executable)} -m lib.reproduce --preset {PRESET} {options(SET)}"
CODE = [*map(str, Path("lib").rglob("*.py"))]


def value(study, name):
    return PARAMETERS[study].get(name, declared(study)[name].default)


def parts(study):
    """The jobs that share a study's training: a seed each, and a value of what is split."""
    first = value(study, "first_seed")
    points = [(name, i) for name in SPLIT.get(study, []) for i in range(len(value(study, name)))] or [("all", 0)]
    return [f"{seed}-{name}-{i}" for seed in range(first, first + value(study, "seeds")) for name, i in points]


def chosen(wildcards):
    """What a part changes: its seed, and the one value of a list."""
    seed, name, i = wildcards.part.rsplit("-", 2)
    point = {name: [value(wildcards.study, name)[int(i)]]} if name != "all" else {}
    return options({"first_seed": int(seed), "seeds": 1} | point)


wildcard_constraints:
    study=r"[0-9]{2}_\w+",


rule index:
    input:
        expand("{reports}/runs/{study}.json", reports=REPORTS, study=STUDIES),
    shell:
        f"{RUN} --reports {shlex.quote(REPORTS)} {' '.join(STUDIES)}"


rule study:
    input:
        lambda w: [f"{PARTS}/{w.study}/{part}/runs/{w.study}.json" for part in parts(w.study)],
        "notebooks/{study}.ipynb",
        CODE,
    output:
        REPORTS + "/runs/{study}.json",
    run:
        for part in parts(wildcards.study):
            measured = Path(PARTS, wildcards.study, part, "results", f"{wildcards.study}.csv")
            if measured.is_file():  # a study that keeps no measurements has none
                merge(Path(REPORTS, "results", measured.name), measured)
        shell(f"{RUN} --reports {shlex.quote(REPORTS)} {wildcards.study}")


rule part:
    input:
        "notebooks/{study}.ipynb",
        CODE,
    output:
        f"{PARTS}/{{study}}/{{part}}/runs/{{study}}.json",
    params:
        chosen=chosen,
        place=lambda w: shlex.quote(f"{PARTS}/{w.study}/{w.part}"),
        table=lambda w: shlex.quote(f"{REPORTS}/results/{w.study}.csv"),
    shell:
        "mkdir -p {params.place}/results && if [ -f {params.table} ]; then cp {params.table} {params.place}/results; fi; "
        f"{RUN} {{params.chosen}} --reports {{params.place}} {{wildcards.study}}"
