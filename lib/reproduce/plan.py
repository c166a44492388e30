"""What a batch would run: studies, presets with their parameters, and what a run depends on."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lib.keys import content, script
from lib.study import ParameterError, check_parameters, parameters, studies


class _Loader(yaml.BaseLoader):
    """YAML with text for every value (`no` is no truth value, `010` no 8), and every name once."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(name) for name, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ParameterError(f"{twice[0]!r} is there twice")
        return super().construct_mapping(node, deep)


def presets() -> list[str]:
    """The names of the presets that exist.

    >>> from lib.reproduce import presets
    >>> {"paper", "quick", "smoke"} <= set(presets())
    True
    """
    return sorted(p.stem for p in (parameters.NOTEBOOKS / "presets").glob("*.yaml"))


def chosen(names: Iterable[str], only: Sequence[str] | None) -> list[str]:
    """The studies that are asked for, in order; all of them by default. ``05`` stands for ``05_crossbar_costs``.

    Raises:
        ParameterError: an unknown study, or a number that several have.
    """
    if not only:
        return [*names]
    found = {name: [s for s in names if s == name or s.split("_")[0] == name] for name in only}
    for name, matches in found.items():
        if len(matches) != 1:
            raise ParameterError(
                f"study {name!r} is {' or '.join(matches) or 'unknown'}: allowed are {', '.join(names)}"
            )
    return [s for s in names if [s] in found.values()]


def preset_parameters(
    preset: str, changed: dict[str, Any] | None = None, only: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Each study's parameters at a preset, checked.

    Args:
        changed: values over those of the preset, for every study that declares the name, or those ``only``.

    Raises:
        ParameterError: unknown preset, a study that does not exist, a parameter that its notebook refuses, or a changed
            one that none of these studies has.

    >>> from lib.reproduce import preset_parameters
    >>> preset_parameters("smoke", {"seeds": 2})["01_lottery_ticket_vs_finetuning"]["seeds"]
    2
    """
    told = given(preset)
    result = {study: told.get(study) or {} for study in sorted({*studies(), *told})}
    known = {study: parameters.declared(study) for study in result}
    for name, value in (changed or {}).items():
        holders = [study for study in chosen(result, only) if name in known[study]]
        if not holders:
            known_there = {n for study in chosen(result, only) for n in known[study]}
            near = get_close_matches(name, known_there)
            allowed = f"near are {', '.join(near)}" if near else f"allowed are {', '.join(sorted(known_there))}"
            where = ", ".join(only) if only else "every study"
            raise ParameterError(f"parameter {name!r} is unknown in {where}: {allowed}")
        for study in holders:
            result[study] = result[study] | {name: value}
    for study, values in result.items():
        try:
            checked = check_parameters(study, values)
        except ParameterError as error:
            raise ParameterError(f"{study} at {preset}: {error}") from None
        result[study] = {name: checked[name] for name in values}
    return {study: result[study] for study in studies()}


def given(preset: str) -> dict[str, dict[str, str | list[str]]]:
    """A preset's file as it is, every value text; ``""`` for a study without any."""
    if preset not in presets():
        raise ParameterError(f"preset {preset!r} is unknown: allowed are {', '.join(presets())}")
    path = parameters.NOTEBOOKS / "presets" / f"{preset}.yaml"
    try:
        told = yaml.load(path.read_text("utf-8"), _Loader) or {}
    except ParameterError as error:
        raise ParameterError(f"{path.name}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path.name} is no YAML in UTF-8: {' '.join(str(error).split())}") from None
    for place, found in {"": told, **(told if isinstance(told, dict) else {})}.items():
        if found and not isinstance(found, dict):
            where = f"{path.name}, {place}" if place else path.name
            raise ParameterError(f"{where} holds {found!r:.60}: expected `study:` and under it lines `name: value`")
    return told


def prepare(preset: str, folder: Path) -> None:
    """Write every notebook with the preset's parameters injected, and run none: the input of nbval.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from lib.reproduce import prepare
    >>> from lib.study import studies
    >>> prepare("smoke", Path((folder := TemporaryDirectory()).name))
    >>> sorted(path.stem for path in Path(folder.name).iterdir()) == studies()
    True
    """
    from papermill import execute_notebook

    folder.mkdir(parents=True, exist_ok=True)
    for study, values in preset_parameters(preset).items():
        execute_notebook(
            parameters.NOTEBOOKS / f"{study}.ipynb",
            folder / f"{study}.ipynb",
            values,
            kernel_name="python3",
            prepare_only=True,
            progress_bar=False,
        )


def up_to_date_key(study: str, values: dict[str, Any]) -> str:
    """Changes when a run would: with the notebook's code and what it refers to, its parameters, or its data.

    Text cells, outputs, comments and docstrings do not count, nor do the rooms that only present results or keep them
    (see `lib.keys.script`).

    >>> from lib.reproduce import up_to_date_key
    >>> study = "01_lottery_ticket_vs_finetuning"
    >>> [up_to_date_key(study, given) == up_to_date_key(study, {}) for given in ({"report_dir": "x"}, {"seeds": 99})]
    [True, False]
    """
    python = f"{parameters.python_of(study)}\nfrom lib.study.claims import settled\nsettled"  # what a study judges by
    full = check_parameters(study, values)
    hidden = ("data_root", "report_dir")  # where files lie changes no result
    counted = {k: full[k] for k in sorted(full) if k not in hidden}
    return content(script(python), counted, parameters.outside(study, full))
