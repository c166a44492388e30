"""Accuracy on faulty chips: one trial, sweeps over rates, and the rate that a network tolerates."""

import hashlib
import json
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Mapping as Dict
from copy import copy, deepcopy
from math import ceil, log, log1p, log2, sqrt
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
import torch
from scipy.stats import bootstrap
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lib.constraint import plain
from lib.crossbar import CrossbarError, Device, Mapping, as_mapping
from lib.data import Split, Task
from lib.faults.stuck import StuckAt
from lib.faults.variation import ReadNoise, stream
from lib.keys import code_version, fingerprint
from lib.shapes import all_layers, prunable
from lib.training import CACHE_ROOT, Progress, evaluate

Mapped = Mapping | str | Dict[str, Mapping | str]
"""One mapping for all layers, or one for each layer that lies in crossbars; the other layers stay digital."""

Devices = Device | tuple[Device, ...]
"""What happens to the cells, in this order."""


def on_crossbars(model: nn.Module, mapping: Mapped) -> dict[str, Mapping]:
    """The layers that are mapped to cells, and how: convolutions and linear layers, all of them unless named.

    Batch norm, biases and activations stay digital and healthy.

    Raises:
        ShapeError: one mapping for all, and weights that are no layer's; name the layers that lie in crossbars.
        CrossbarError: an unknown mapping, a layer that the model lacks, or weights that are not finite.

    >>> from lib.faults import on_crossbars
    >>> from lib.models import build
    >>> plan = on_crossbars(build("lenet300", (1, 28, 28), 10), {"fc1": "offset", "fc2": "differential"})
    >>> {name: mapping.columns for name, mapping in plan.items()}  # fc3 stays digital
    {'fc1': 1, 'fc2': 2}
    """
    layers = prunable(model)
    plan = mapping if isinstance(mapping, Dict) else dict.fromkeys(all_layers(model, "one mapping for all"), mapping)
    if not plan:
        raise CrossbarError(f"the plan of mappings is empty; it may name {', '.join(layers)}")
    for name in plan:
        if name not in layers:
            raise CrossbarError(f"the plan maps layer {name!r}; the model has {', '.join(layers)}")
        if not layers[name].weight.isfinite().all():
            raise CrossbarError(f"layer {name!r} has weights that are not finite: they cannot be mapped to cells")
    return {name: as_mapping(m) for name, m in plan.items()}


def read_back(weight: Tensor, mapping: Mapping, devices: Devices, chip: int, layer: str) -> Tensor:
    """What one layer's weights read back as from a chip: encoded, disturbed, decoded.

    >>> from lib.crossbar import Mapping
    >>> from lib.faults import StuckAt, read_back
    >>> weight = torch.tensor([4.0, -2.0, 0.5])
    >>> read_back(weight, Mapping(clip=0.5), (), chip=0, layer="fc1").tolist()  # perfect cells, a clipped range
    [2.0, -2.0, 0.5]
    >>> read_back(weight, Mapping(), StuckAt(1.0, ratio=0), chip=0, layer="fc1").tolist()
    [0.0, 0.0, 0.0]
    """
    scale = mapping.range_of(weight)
    cells = mapping.encode(weight, scale)
    for device in devices if isinstance(devices, tuple) else (devices,):
        cells = device.disturb(cells, mapping, chip, layer)
    return mapping.decode(cells, scale)


def on_chip(model: nn.Module, mapping: Mapped, devices: Devices, chip: int) -> nn.Module:
    """A copy of the model, without masks and in evaluation mode, with the weights that a chip gives back.

    >>> from lib.faults import StuckAt, on_chip
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> model[0].weight.data = torch.tensor([[4.0, -2.0]])
    >>> on_chip(model, "offset", StuckAt(1.0, ratio=0), chip=0)[0].weight.tolist(), model[0].weight.tolist()
    ([[-4.0, -4.0]], [[4.0, -2.0]])
    """
    copy = plain(model).eval()
    layers = prunable(copy)
    with torch.no_grad():
        for name, m in on_crossbars(copy, mapping).items():
            layers[name].weight.copy_(read_back(layers[name].weight, m, devices, chip, name))
    return copy


class _Bench:
    """A network and images made ready for many trials: nothing is copied twice."""

    def __init__(self, model: nn.Module, mapping: Mapped, split: Split, batch_size: int) -> None:
        self.mapping = on_crossbars(model, mapping)
        self.model = plain(model).eval().to(memory_format=torch.channels_last)
        self.split = split.to(split.x.device)
        self.batch_size = batch_size
        layers = prunable(self.model)
        self.layers = {name: layers[name] for name in self.mapping}
        self.healthy = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}

    def weights(self, devices: Devices, chip: int) -> dict[str, Tensor]:
        return {n: read_back(self.healthy[n], m, devices, chip, n) for n, m in self.mapping.items()}

    @torch.no_grad()
    def trial(self, devices: Devices, chip: int) -> float:
        """Accuracy in [0, 1] on one chip."""
        for name, weight in self.weights(devices, chip).items():
            self.layers[name].weight.copy_(weight)
        hooks = [*self._read_noise(devices, chip)]
        try:
            return evaluate(self.model, self.split, self.batch_size)
        finally:
            for hook in hooks:
                hook.remove()

    def _read_noise(self, devices: Devices, chip: int) -> Iterator:
        for device in devices if isinstance(devices, tuple) else (devices,):
            if isinstance(device, ReadNoise):
                for name, layer in self.layers.items():
                    m = self.mapping[name]
                    yield _add_noise(layer, device.sigma * m.noise_gain(m.range_of(self.healthy[name])), chip, name)

    @torch.no_grad()
    def together(self, devices: Devices, chips: Sequence[int]) -> list[float]:
        """Accuracies on several chips, their networks side by side in one batch: what fills a GPU."""
        stacks = [self.weights(devices, chip) for chip in chips]
        stacked = {f"{n}.weight": torch.stack([s[n] for s in stacks]) for n in self.layers}
        correct = torch.zeros(len(chips), device=self.split.y.device)
        forward = vmap(lambda weights, x: functional_call(self.model, weights, (x,)), in_dims=(0, None))
        for x, y in zip(self.split.x.split(self.batch_size), self.split.y.split(self.batch_size), strict=True):
            correct += (forward(stacked, x).argmax(-1) == y).sum(1)
        return (correct / len(self.split)).tolist()


def _add_noise(layer: nn.Module, sigma: float, chip: int, name: str):
    """A forward hook: noise of independent reads of all weights, ``sigma`` each, on every output of a layer."""
    random = torch.Generator(layer.weight.device).manual_seed(int(stream(chip, name, 5).integers(2**62)))
    energy = deepcopy(layer)
    energy.bias = None
    energy.weight = nn.Parameter(torch.ones_like(layer.weight), requires_grad=False)

    def add(_, inputs, output):
        spread = energy(inputs[0].square()).sqrt_()  # the same for all outputs of a group, so a plain convolution
        return output + float(sigma) * spread * torch.randn(output.shape, generator=random, device=output.device)

    return layer.register_forward_hook(add)


# --- finished trials --------------------------------------------------------------------------------------------------


class _Journal:
    """Finished trials of one network under one mapping on one split, on disk: each is there as soon as it is done."""

    def __init__(self, bench: _Bench) -> None:
        parts = [code_version(_Bench), *sorted({code_version(type(m)) for m in bench.model.modules()})]
        parts += [fingerprint(bench.model), fingerprint(bench.mapping), fingerprint(bench.split), bench.batch_size]
        parts += [torch.__version__.split("+")[0], bench.split.y.device.type]
        self.key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
        self.names: dict[Devices, str] = {}
        self.path = Path(os.environ.get("CACHE_ROOT") or CACHE_ROOT) / "trials.sqlite"
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise OSError(f"cannot write the cache {self.path}: {error}") from None
            warnings.warn(f"cache file {self.path.name} is damaged; computing its trials anew", stacklevel=2)
            self.path.rename(self.path.with_suffix(".damaged"))
            self._open()

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"cannot write the cache {self.path.parent}: {error.strerror}") from None
        self.base = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        self.base.execute("PRAGMA journal_mode = WAL")  # a killed process loses nothing, and a write costs no disk sync
        self.base.execute("PRAGMA synchronous = NORMAL")
        columns = "network TEXT, devices TEXT, chip INTEGER, accuracy REAL, PRIMARY KEY (network, devices, chip)"
        self.base.execute(f"CREATE TABLE IF NOT EXISTS trials ({columns}) WITHOUT ROWID")

    def read(self, devices: Devices) -> dict[int, float]:
        query = "SELECT chip, accuracy FROM trials WHERE network = ? AND devices = ?"
        return dict(self.base.execute(query, (self.key, self._name(devices))).fetchall())

    def write(self, devices: Devices, chip: int, accuracy: float) -> None:
        row = (self.key, self._name(devices), int(chip), accuracy)
        self.base.execute("INSERT OR REPLACE INTO trials VALUES (?, ?, ?, ?)", row)

    def _name(self, devices: Devices) -> str:
        if devices not in self.names:
            self.names[devices] = json.dumps(fingerprint(devices), sort_keys=True)
        return self.names[devices]


def accuracies(
    bench: _Bench, journal: _Journal, tasks: Sequence[tuple[Devices, int]], processes: int
) -> Iterator[tuple[Devices, int, float]]:
    """Every task's accuracy, those on disk first, then the others as they are done.

    >>> from lib import data
    >>> from lib.faults import StuckAt, trials
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4, bias=False))
    >>> model[1].weight.data, split = torch.eye(4), data.Split(torch.eye(4).reshape(4, 1, 2, 2), torch.arange(4))
    >>> bench, tasks = trials._Bench(model, "two_column", split, 4), [(StuckAt(0.0), 0), (StuckAt(1.0, ratio=0), 0)]
    >>> [accuracy for _, _, accuracy in trials.accuracies(bench, trials._Journal(bench), tasks, processes=1)]
    [1.0, 0.25]
    """
    known = {devices: journal.read(devices) for devices in dict.fromkeys(d for d, _ in tasks)}
    yield from ((d, chip, known[d][chip]) for d, chip in tasks if chip in known[d])
    rest = [(d, chip) for d, chip in tasks if chip not in known[d]]
    for devices, chip, accuracy in _run(bench, rest, processes):
        journal.write(devices, chip, accuracy)
        yield devices, chip, accuracy


def _run(bench: _Bench, tasks: list[tuple[Devices, int]], processes: int) -> Iterator[tuple[Devices, int, float]]:
    reads = any(isinstance(part, ReadNoise) for d, _ in tasks for part in (d if isinstance(d, tuple) else (d,)))
    if bench.split.y.is_cuda and not reads:
        for devices, chips in _side_by_side(tasks):
            yield from ((devices, c, a) for c, a in zip(chips, bench.together(devices, chips), strict=True))
    elif processes == 1 or len(tasks) < 2 * processes:
        yield from ((d, chip, bench.trial(d, chip)) for d, chip in tasks)
    else:
        size = max(1, min(16, len(tasks) // (4 * processes)))  # a part is what a killed sweep can lose
        parts = [tasks[i : i + size] for i in range(0, len(tasks), size)]
        light = copy(bench)
        images, labels, light.split = bench.split.x.numpy(), bench.split.y.numpy(), None  # arrays are shared, not sent
        with joblib.Parallel(processes, return_as="generator_unordered", mmap_mode="c") as pool:
            for done in pool(
                joblib.delayed(_in_worker)(light, images, labels, bench.split.task, part) for part in parts
            ):
                yield from done


def _in_worker(bench: _Bench, images: np.ndarray, labels: np.ndarray, task: Task, tasks: list) -> list:
    torch.set_num_threads(1)
    bench.split = Split(torch.from_numpy(images), torch.from_numpy(labels), task)
    return [(d, chip, bench.trial(d, chip)) for d, chip in tasks]


def _side_by_side(tasks: list[tuple[Devices, int]], width: int = 16) -> Iterator[tuple[Devices, list[int]]]:
    """Chips of equal devices, a few at a time."""
    for devices in dict.fromkeys(d for d, _ in tasks):
        chips = [chip for d, chip in tasks if d == devices]
        yield from ((devices, chips[i : i + width]) for i in range(0, len(chips), width))


# --- what a study asks ------------------------------------------------------------------------------------------------


def _chips(chips: int | Sequence[int]) -> list[int]:
    numbers = [*range(chips)] if isinstance(chips, int) else [*chips]
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise CrossbarError(f"chips = {chips}: allowed is a number of chips, or different numbers from 0")
    return numbers


def sweep(
    model: nn.Module,
    mapping: Mapped,
    rates: Sequence[float],
    chips: int | Sequence[int],
    split: Split,
    *,
    faults: Callable[[float], Devices] = StuckAt,
    batch_size: int = 100,
    processes: int = 1,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Accuracy on every chip at every rate: a trial each, on the same chips at all rates, for all mappings and models.

    Finished trials lie in ``.cache/trials.sqlite`` (or under the environment's ``CACHE_ROOT``), so that an
    interrupted sweep, or one with more rates or chips, only runs what is missing.

    Args:
        model: pruned, quantized, masked or dense; it is not changed.
        chips: how many, or their numbers.
        faults: from a rate to what happens to the cells, e.g. ``partial(StuckAt, ratio=1 / 5.2)``, `Variation` (the
            rate is its sigma) or ``lambda r: (Variation(0.1), StuckAt(r))``.
        batch_size: images at a time; it changes speed only.
        processes: trials at the same time on a CPU. A GPU runs several chips side by side instead.

    Returns:
        One row per trial: ``rate``, ``chip``, ``accuracy`` in [0, 1].

    Raises:
        CrossbarError: a rate, chip, mapping or model that cannot be.
        OSError: the cache folder cannot be written.

    >>> from functools import partial
    >>> from lib import data, faults
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4, bias=False))
    >>> model[1].weight.data, split = torch.eye(4), data.Split(torch.eye(4).reshape(4, 1, 2, 2), torch.arange(4))
    >>> found = faults.sweep(model, "two_column", [0.0, 1.0], 2, split, faults=partial(faults.StuckAt, ratio=0))
    >>> found.values.tolist()  # rate, chip, accuracy: with all cells off, one class is left
    [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.25], [1.0, 1.0, 0.25]]
    """
    numbers = _chips(chips)
    devices = {rate: faults(rate) for rate in rates}
    bench = _Bench(model, mapping, split, batch_size)
    tasks = [(d, chip) for d in devices.values() for chip in numbers]
    found = {}
    for done, (d, chip, accuracy) in enumerate(accuracies(bench, _Journal(bench), tasks, processes), start=1):
        found[d, chip] = accuracy
        if progress:
            progress(done / len(tasks), f"trial {done} of {len(tasks)}, {accuracy:.1%}")
    rows = [(rate, chip, found[d, chip]) for rate, d in devices.items() for chip in numbers]
    return pd.DataFrame(rows, columns=["rate", "chip", "accuracy"])


class Tolerated(NamedTuple):
    """The rate at which the mean accuracy over chips has dropped by so many points, with its 95 % interval.

    >>> from lib.faults import Tolerated
    >>> plain = Tolerated(0.005, 0.004, 0.006, trials=180, bound="")
    >>> hardened = Tolerated(0.5, 0.5, 0.5, trials=150, bound=">")
    >>> f"{hardened.bound} {hardened.rate / plain.rate:.0f} times"
    '> 100 times'
    """

    rate: float
    low: float
    high: float
    trials: int
    bound: str
    """``<`` or ``>`` when the drop is reached below the lowest, or not before the highest rate that was allowed."""


def tolerated_rate(
    model: nn.Module,
    mapping: Mapped,
    drop: float,
    chips: int | Sequence[int],
    split: Split,
    *,
    faults: Callable[[float], Devices] = StuckAt,
    reference: float | None = None,
    lowest: float = 1e-5,
    highest: float = 0.5,
    precision: float = 0.1,
    batch_size: int = 100,
    processes: int = 1,
    progress: Progress | None = None,
) -> Tolerated:
    """The rate at which mean accuracy falls ``drop`` points below ``reference``, by bisection of its logarithm.

    As the faults of a chip are nested, accuracy falls along the rate on (nearly) every chip, and about
    ``log2(log(highest / lowest) / (2 precision))`` rates have to be measured. Between the two that are left the drop is
    interpolated; the interval is a bootstrap over chips, all rates of a chip together.

    Args:
        drop: points of accuracy. reference: accuracy in [0, 1]; by default that of the healthy mapped model.
        precision: half the width of the last bracket, as a share of the rate.

    Raises:
        CrossbarError: as `sweep`; a drop that is not positive; bounds that are not 0 < lowest < highest <= 1.

    >>> from lib import data, faults
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4, bias=False))
    >>> model[1].weight.data, split = torch.eye(4), data.Split(torch.eye(4).reshape(4, 1, 2, 2), torch.arange(4))
    >>> found = faults.tolerated_rate(model, "two_column", drop=10, chips=50, split=split)
    >>> round(found.rate, 2), found.low < found.rate < found.high  # of 32 cells
    (0.08, True)
    """
    if drop <= 0 or not 0 < lowest < highest <= 1 or precision <= 0:
        raise CrossbarError(f"{drop=}, {lowest=}, {highest=}, {precision=}: allowed are positive, and lowest < highest")
    numbers = _chips(chips)
    bench = _Bench(model, mapping, split, batch_size)
    journal = _Journal(bench)
    measured: dict[float, list[float]] = {}

    def holds(rate: float) -> bool:
        tasks = [(faults(rate), chip) for chip in numbers]
        found = {chip: accuracy for _, chip, accuracy in accuracies(bench, journal, tasks, processes)}
        measured[rate] = [found[chip] for chip in numbers]
        if progress:
            progress(len(measured) / (steps + 1), f"rate {rate:.3g}: {np.mean(measured[rate]):.1%}")
        return np.mean(measured[rate]) >= floor

    floor = (bench.trial((), 0) if reference is None else reference) - drop / 100
    steps = max(1, ceil(log2(log(highest / lowest) / log1p(2 * precision))))
    low, high = lowest, highest
    for _ in range(steps):
        middle = sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    bound = ">" if high == highest and holds(highest) else "<" if low == lowest and not holds(lowest) else ""
    rates = np.array(sorted(measured))
    grid = np.array([measured[rate] for rate in rates])  # rates x chips
    rate = float(_crossing(rates, grid.mean(1), floor))
    spread = bootstrap(
        (np.arange(len(numbers)),),
        lambda index, axis=-1: _crossing(rates, grid[:, index].mean(-1), floor),
        n_resamples=2000,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Tolerated(rate, float(spread.low), float(spread.high), len(rates) * len(numbers), bound)


def _crossing(rates: np.ndarray, accuracy: np.ndarray, floor: float) -> np.ndarray:
    """Where curves ``(rates, ...)`` first fall below a floor, interpolated in the rate's logarithm; else an end."""
    falling = np.minimum.accumulate(accuracy, axis=0)
    after = np.clip((falling >= floor).sum(0), 1, len(rates) - 1)
    above, below = (np.take_along_axis(falling, i[None], 0)[0] for i in (after - 1, after))
    share = np.clip((above - floor) / np.maximum(above - below, 1e-12), 0, 1)
    x = np.log(rates)
    return np.exp(x[after - 1] + share * (x[after] - x[after - 1]))
