"""A study's parameters: what its notebook declares, and the refusal of anything else."""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nbformat

from lib import data, models

PROJECT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = PROJECT / "notebooks"


class ParameterError(ValueError):
    """A study's parameter is unknown, of the wrong type or out of range. Notebooks show it as one line.

    >>> from lib.study import declared
    >>> declared("99_none")
    Traceback (most recent call last):
        ...
    lib.study.parameters.ParameterError: study '99_none' is unknown: allowed are 00_start_here, ...
    """

    def _render_traceback_(self) -> list[str]:  # IPython's own protocol for a short display
        return [f"ParameterError: {self}"]


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: ``name: type = default  # help``.

    >>> from lib.study.parameters import Parameter
    >>> seeds = Parameter("seeds", "int", 2, "a verdict needs 3")  # of the line `seeds: int = 2  # a verdict needs 3`
    >>> seeds.default, seeds.help
    (2, 'a verdict needs 3')
    """

    name: str
    type: str
    default: Any
    help: str


@cache
def declared(study: str) -> dict[str, Parameter]:
    """The parameters that a study's notebook declares, by name.

    Raises:
        ParameterError: no such study, not exactly one parameters cell, or a line in it that is not
            ``name: type = literal``.

    >>> from lib.study import declared
    >>> declared("01_lottery_ticket_vs_finetuning")["seeds"]
    Parameter(name='seeds', type='int', default=..., help='independent repetitions...')
    """
    path = NOTEBOOKS / f"{study}.ipynb"
    if not path.is_file():
        known = ", ".join(p.stem for p in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")))
        raise ParameterError(f"study {study!r} is unknown: allowed are {known}")
    cells = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ParameterError(f"{path.name} has {len(cells)} cells tagged 'parameters'; it needs exactly one")
    found: dict[str, Parameter] = {}
    lines = cells[0].source.splitlines()
    for node in ast.parse(cells[0].source).body:
        try:
            name, kind, value = node.target.id, ast.unparse(node.annotation), ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            raise ParameterError(f"{path.name}: {ast.unparse(node)!r} is not `name: type = literal`") from None
        found[name] = Parameter(name, kind, value, lines[node.end_lineno - 1].partition("#")[2].strip())
    return found


def _parsed(value: Any, kind: str) -> Any:
    """A list that came as text: ``papermill -p name "[0.5, 0.9]"`` passes it so. Anything else is left as it is."""
    if isinstance(value, str) and kind.startswith("list["):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return value


def _has_type(value: Any, kind: str) -> bool:
    """Whether a value fits ``int``, ``float``, ``str``, ``bool`` or a ``list[...]`` of one; an int is a float too."""
    if kind.startswith("list["):
        return isinstance(value, list) and all(_has_type(v, kind[5:-1]) for v in value)
    if isinstance(value, bool):
        return kind == "bool"
    return isinstance(value, {"int": int, "float": (int, float), "str": str}.get(kind, ()))


Check = tuple[Callable[[Any], bool], str]


def _each(check: Callable[[Any], bool], allowed: str, least: int = 1) -> Check:
    return lambda v: len(v) >= least and len(set(v)) == len(v) and all(map(check, v)), (
        f"a list of {least} or more different values, each {allowed}"
    )


_POSITIVE: Check = (lambda v: v > 0, "numbers above 0")
_COUNT: Check = (lambda v: v >= 1, "whole numbers from 1")
_NATURAL: Check = (lambda v: v >= 0, "whole numbers from 0")
CHECKS: dict[str, Check] = {
    "sparsities": _each(lambda v: 0 <= v < 1, "in [0, 1)"),
    "learning_rates": (
        lambda v: len(v) == 2 and 0 < v[0] < v[1],
        "two numbers above 0, the insufficient rate first and the larger, desirable one second",
    ),
    "top_fractions": _each(lambda v: 0 < v <= 1, "in (0, 1]"),
    "weight_rates": _each(lambda v: 1 < v <= 16, "in (1, 16]"),
    "group_rates": _each(lambda v: v > 1, "above 1"),
    "line_rates": _each(lambda v: v > 1, "above 1"),
    "lenet_structure_rates": _each(lambda v: v > 1, "above 1"),
    "lenet_rates": _each(lambda v: v > 1, "above 1", least=0),
    "library_sizes": (lambda v: 8 in v and all(1 <= n <= 56 for n in v), "whole numbers from 1 to 56, 8 among them"),
    "block_heights": _each(lambda v: v >= 1, "from 1", least=2),
    "bit_widths": _each(lambda v: 1 <= v <= 64, "from 1 to 64"),
    "lenet_datasets": (lambda v: len(v) >= 1, "one or more data sets"),
    "lenet_train_sizes": (lambda v: all(n >= 0 for n in v), "whole numbers from 0"),
    "lenet_epochs": (lambda v: len(v) == 3 and min(v) >= 1, "three whole numbers from 1"),
    "rates": _each(lambda v: 0 < v <= 1, "in (0, 1]"),
    "densities": _each(lambda v: 0 < v < 1, "in (0, 1)"),
    "search_sparsities": _each(lambda v: 0 < v < 1, "in (0, 1)", least=2),
    "sigmas": _each(lambda v: v > 0, "above 0"),
    "chain_rates": _each(lambda v: v > 1, "above 1"),
    "single_rates": _each(lambda v: v > 1, "above 1", least=0),
    "level_rates": _each(lambda v: v > 1, "above 1"),
    "structured_rates": _each(lambda v: v > 1, "above 1"),
    "second_rates": _each(lambda v: v > 1, "above 1"),
    "second_structured_rates": _each(lambda v: v > 1, "above 1"),
    "prune_rates": _each(lambda v: v > 1, "above 1"),
    "array_size": _COUNT,
    "segment_rows": _COUNT,
    "shapes": _COUNT,
    "fragment": _COUNT,
    "fragments": _each(lambda v: v >= 1, "from 1"),
    "sizes": _each(lambda v: v >= 1, "from 1"),
    "adc_bits": _each(lambda v: 1 <= v <= 24, "from 1 to 24"),
    "r_on": _each(lambda v: v > 0, "ohms above 0"),
    "bits": _each(lambda v: 3 <= v <= 16, "from 3 to 16"),
    "input_bits": _each(lambda v: 2 <= v <= 16, "from 2 to 16", least=0),
    "branches": _each(lambda v: 2 <= v <= 19, "from 2 to 19"),
    "power_bits": _each(lambda v: 2 <= v <= 5, "from 2 to 5"),
    "entries": _each(lambda v: v >= 2, "from 2"),
    "cluster_entries": (lambda v: v >= 2, "whole numbers from 2"),
    "cluster_strength": _POSITIVE,
    "blocks": _each(lambda v: re.fullmatch(r"[1-9]\d*x[1-9]\d*", v), 'such as "1x4"', least=2),
    "shares": _each(lambda v: 0 < v < 1, "in (0, 1)"),
    "thresholds": _each(lambda v: 0 <= v < 1, "in [0, 1)"),
    "tile_rates": _each(lambda v: v > 1, "above 1"),
    "tile": _COUNT,
    "group_sparsity": (lambda v: 0 < v < 1, "numbers in (0, 1)"),
    "parts": _COUNT,
    "rounds": (lambda v: v >= 2, "whole numbers from 2"),
    "step_epochs": _COUNT,
    "tune_epochs": _COUNT,
    "interval": _COUNT,
    "channel_sparsities": _each(lambda v: 0 < v < 1, "in (0, 1)"),
    "checks": _COUNT,
    "window": (lambda v: v >= 2, "whole numbers from 2"),
    "tolerance": (lambda v: 0 <= v <= 1, "shares in [0, 1]"),
    "pull": (lambda v: v >= 0, "numbers from 0"),
    "late_shares": _each(lambda v: 0 < v < 1, "in (0, 1)"),
    "less_shares": _each(lambda v: 0 < v < 1, "in (0, 1)"),
    "drop_share": (lambda v: 0 < v < 1, "shares in (0, 1)"),
    "skip_cost": (lambda v: v >= 0, "numbers from 0"),
    "least": (lambda v: 0 <= v <= 1, "shares in [0, 1]"),
    "sign_threshold": (lambda v: v >= 0, "numbers from 0"),
    "sign_scale": _POSITIVE,
    "second_lr": _POSITIVE,
    "width": _COUNT,
    "second_width": _COUNT,
    "plain_shrink": _POSITIVE,
    "clipped_shrink": _POSITIVE,
    "clip": _POSITIVE,
    "wire_model": (lambda v: v in ("nodal", "series", "line"), "nodal, series and line"),
    "fault_drop": (lambda v: 0 < v < 100, "points in (0, 100)"),
    "array_images": _COUNT,
    "calibration_images": _COUNT,
    "levels": _each(lambda v: 1 <= v <= 127, "from 1 to 127"),
    "purify_drops": _each(lambda v: 0 <= v < 100, "points in [0, 100)"),
    "budget_rate": (lambda v: v == 0 or v > 1, "0, or numbers above 1"),
    "budget_trials": _COUNT,
    "datasets": (lambda v: len(v) >= 1 and len(set(v)) == len(v), "one or more different data sets"),
    "train_sizes": (lambda v: all(n >= 0 for n in v), "whole numbers from 0"),
    "level_lr": _POSITIVE,
    "drops": _each(lambda v: 0 < v < 100, "points in (0, 100)"),
    "ratio": _POSITIVE,
    "search_rate": (lambda v: 0 < v <= 1, "numbers in (0, 1]"),
    "hardening_rate": (lambda v: 0 < v <= 1, "numbers in (0, 1]"),
    "hardening_clip": (lambda v: 0 < v <= 1, "numbers in (0, 1]"),
    "hardening_epochs": _COUNT,
    "hardening_lr": _POSITIVE,
    "chips": (lambda v: v >= 2, "whole numbers from 2"),
    "processes": _COUNT,
    "retrain_epochs": _COUNT,
    "search_epochs": _COUNT,
    "lambda_trials": _COUNT,
    "lr": _POSITIVE,
    "search_lr": _POSITIVE,
    "lenet_rho": _POSITIVE,
    "rho_growth": (lambda v: v >= 1, "numbers from 1"),
    "drop": _POSITIVE,
    "timing_seconds": _POSITIVE,
    "seeds": _COUNT,
    "epochs": _COUNT,
    "admm_epochs": _COUNT,
    "rewind_epoch": _NATURAL,
    "first_seed": _NATURAL,
    "batch_size": _COUNT,
    "train_size": _NATURAL,
    "test_size": _NATURAL,
    "validation_size": _COUNT,
    "threads": _COUNT,
    "admm_lr": _POSITIVE,
    "rho": _POSITIVE,
    "weight_decay": (lambda v: v >= 0, "numbers from 0"),
    "round_fraction": (lambda v: 0 < v < 1, "numbers in (0, 1)"),
}
"""What a parameter of a given name may hold, in every study: a test and its wording."""


def check_parameters(study: str, given: dict[str, Any]) -> dict[str, Any]:
    """A study's defaults with ``given`` values over them, all checked: names, types, ranges, data set and model.

    Raises:
        ParameterError: names the parameter, its value and what is allowed.

    >>> from lib.study import check_parameters
    >>> check_parameters("01_lottery_ticket_vs_finetuning", {"sparsities": "[0.5, 0.9]"})["sparsities"]
    [0.5, 0.9]
    >>> check_parameters("01_lottery_ticket_vs_finetuning", {"sparsities": [1.5]})
    Traceback (most recent call last):
        ...
    lib.study.parameters.ParameterError: sparsities = [1.5]: allowed are ... values, each in [0, 1)
    """
    known = declared(study)
    for name in given:
        if name not in known:
            raise ParameterError(f"parameter {name!r} is unknown in {study}: allowed are {', '.join(known)}")
    values = {name: _parsed(given.get(name, p.default), p.type) for name, p in known.items()}
    for name, value in values.items():
        if not _has_type(value, known[name].type):
            raise ParameterError(f"{name} = {value!r} is {type(value).__name__}: expected {known[name].type}")
        test, allowed = CHECKS.get(name, (lambda v: True, ""))
        if not test(value):
            raise ParameterError(f"{name} = {value!r}: allowed are {allowed}")
    if values.get("rewind_epoch", 0) > values.get("epochs", 0):
        raise ParameterError(
            f"rewind_epoch = {values['rewind_epoch']}: allowed are whole numbers up to epochs = {values['epochs']}"
        )
    for several, sizes in (("lenet_datasets", "lenet_train_sizes"), ("datasets", "train_sizes")):
        if len(values.get(several, [])) != len(values.get(sizes, [])):
            raise ParameterError(f"{sizes} = {values[sizes]!r}: one for each of {several} = {values[several]!r}")
    chain = values.get("chain_rates", [])
    if not set(values.get("single_rates", [])) <= set(chain):
        raise ParameterError(f"single_rates = {values['single_rates']!r}: allowed are members of {chain!r}")
    if max(values.get("level_rates", []), default=0.0) > max(chain, default=0.0):
        raise ParameterError(f"level_rates = {values['level_rates']!r}: allowed are rates up to {max(chain)!r}")
    try:
        for several in ("lenet_datasets", "datasets", "single_layer_datasets"):
            for name in values.get(several, []):
                data.check_name(name)
        for name in filter(None, (values.get("model"), values.get("second_model"))):
            models.builder(name)
        if "dataset" in values:
            data.check_name(values["dataset"])
        if "data_root" in values:
            data.data_root(values["data_root"])
    except ValueError as error:
        raise ParameterError(str(error)) from None
    return values


def injected(cells: Sequence[str]) -> list[str]:
    r"""Names that Papermill's injected cell assigns: IPython keeps the source of what ran.

    >>> from lib.study.parameters import injected
    >>> injected(["lr = 0.1", "# Parameters\nseeds = 2\nepochs = 5"])
    ['seeds', 'epochs']
    """
    sources = [c for c in cells if c.lstrip().startswith("# Parameters\n")]
    return [t.id for source in sources for node in ast.parse(source).body for t in getattr(node, "targets", [])]
