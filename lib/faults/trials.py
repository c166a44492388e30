"""Accuracy on faulty chips: one trial, and sweeps of them over rates and chips."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from numbers import Integral

import joblib
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lib.constraint import plain
from lib.crossbar import CrossbarError
from lib.crossbar.devices import Devices, each, of_its_own
from lib.data import Split, Task
from lib.faults.chips import stream
from lib.faults.journal import Journal
from lib.faults.readback import Mapped, on_crossbars, read_back
from lib.faults.stuck import StuckAt
from lib.faults.variation import ReadNoise
from lib.keys import content
from lib.shapes import uses
from lib.training import Progress, evaluate
from lib.training.cache import instructions


class _Bench:
    """A network and images made ready for many trials: nothing is copied twice."""

    def __init__(self, model: nn.Module, mapping: Mapped, split: Split, batch_size: int) -> None:
        if not len(split) or batch_size < 1:
            raise CrossbarError(f"{len(split)} images in batches of {batch_size}: a trial needs some of both")
        self.mapping = on_crossbars(model, mapping)
        self.model = plain(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.batch_size = batch_size
        self.side_by_side = not split.task.whole
        found = uses(self.model)
        self.layers = {name: found[name] for name in self.mapping}
        self.healthy = {name: modules[0].weight.detach().clone() for name, modules in self.layers.items()}
        self.split = split.to(split.x.device)
        if split.x.is_floating_point():
            self.split = replace(self.split, x=self.split.x.to(next(self.model.parameters()).dtype))

    def weights(self, devices: Devices, chip: int) -> dict[str, Tensor]:
        return {n: read_back(self.healthy[n], m, devices, chip, n) for n, m in self.mapping.items()}

    @torch.no_grad()
    def trial(self, devices: Devices, chip: int) -> float:
        """Accuracy in [0, 1] on one chip."""
        for name, weight in self.weights(devices, chip).items():
            self.layers[name][0].weight.copy_(weight)
        hooks = [hook for i, device in enumerate(_reads(devices)) for hook in self._read_noise(device, chip, i)]
        never = set(self.layers) if hooks else set()
        for name in never:
            watch = lambda *_, name=name: never.discard(name)  # noqa: E731
            hooks += [module.register_forward_hook(watch) for module in self.layers[name]]
        try:
            accuracy = evaluate(self.model, self.split, self.batch_size)
            for name in [*never]:  # it had no noise, which is right only if its weight has no say either
                self.layers[name][0].weight.fill_(torch.nan)
                if self.model(self.split.x[: self.batch_size]).isnan().any() and name in never:
                    raise CrossbarError(f"{name}: its weight is used, but not by its forward, which noise would reach")
                self.layers[name][0].weight.copy_(self.healthy[name])
        finally:
            for hook in hooks:
                hook.remove()
        return accuracy

    def _read_noise(self, device: ReadNoise, chip: int, before: int = 0) -> Iterator:
        for name, modules in self.layers.items():
            sigma = device.sigma * self.mapping[name].noise_gain(self.mapping[name].range_of(self.healthy[name]))
            random = torch.Generator(self.healthy[name].device)
            random.manual_seed(int(stream(chip, of_its_own(name, before), 5).integers(2**62)))
            yield from (_add_noise(module, float(sigma), random) for module in modules)

    def together(self, devices: Devices, chips: Sequence[int]) -> list[float]:
        """Accuracies on several chips: what fills a GPU, where it can be done; otherwise one after the other."""
        if self.side_by_side and not _reads(devices):
            try:
                return self._in_one_batch(devices, chips)
            except Exception:  # vmap knows no LSTM, no writing in place, no `if` on values; a true error comes up below
                self.side_by_side = False
        return [self.trial(devices, chip) for chip in chips]

    @torch.no_grad()
    def _in_one_batch(self, devices: Devices, chips: Sequence[int]) -> list[float]:
        stacks = [self.weights(devices, chip) for chip in chips]
        stacked = {f"{n}.weight": torch.stack([s[n] for s in stacks]) for n in self.layers}
        forward = vmap(lambda weights, x: functional_call(self.model, weights, (x,)), in_dims=(0, None))
        sums = torch.zeros(2, len(chips), dtype=torch.float64, device=self.split.y.device)
        for x, y in zip(self.split.x.split(self.batch_size), self.split.y.split(self.batch_size), strict=True):
            sums += torch.stack([torch.stack(self.split.task.score(out, y)) for out in forward(stacked, x)], dim=1)
        return (sums[0] / sums[1]).tolist()


def _reads(devices: Devices) -> list[ReadNoise]:
    found = [device for device in each(devices) if not device.lasting]
    if others := [device for device in found if not isinstance(device, ReadNoise)]:
        raise CrossbarError(f"{others[0]!r}: lasting = False is for ReadNoise, whose noise outputs are given")
    return found


def _add_noise(layer: nn.Module, sigma: float, random: torch.Generator):
    """A forward hook: noise of independent reads of all weights, ``sigma`` each, on every output of a layer."""
    energy = deepcopy(layer)
    energy._forward_hooks.clear()
    energy._forward_pre_hooks.clear()  # what they do to inputs is done
    energy.bias = None
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    energy.weight = nn.Parameter(torch.ones_like(layer.weight, dtype=wide), requires_grad=False)

    def add(_, inputs, output):
        axis = 1 - layer.weight.ndim  # of the channels; a block that chooses lets some of them rest
        size = output.shape[axis], inputs[0].shape[axis] // getattr(layer, "groups", 1)
        if size != energy.weight.shape[:2]:
            ones = torch.ones(*size, *layer.weight.shape[2:], dtype=wide, device=output.device)
            energy.weight = nn.Parameter(ones, requires_grad=False)
        x = inputs[0].to(energy.weight.dtype)  # wide: squares are beyond what halves hold
        spread = energy(x.square()).sqrt_()  # the same for all outputs of a group, so a plain convolution
        noise = torch.randn(output.shape, generator=random, device=output.device).to(spread)
        return output + (sigma * spread * noise).to(output)

    return layer.register_forward_hook(add)


# --- finished trials --------------------------------------------------------------------------------------------------


def journal_of(bench: _Bench) -> Journal:
    """Where the finished trials of a network under a mapping on a split lie."""
    place = bench.split.y.device.type
    versions = torch.__version__.split("+")[0], place, instructions(place)
    return Journal(content(_Bench, bench.model, bench.mapping, bench.split, bench.batch_size, versions))


def accuracies(
    bench: _Bench, journal: Journal, tasks: Sequence[tuple[Devices, int]], processes: int
) -> Iterator[tuple[Devices, int, float]]:
    """Every task's accuracy, those on disk first, then the others as they are done."""
    if processes < 1:
        raise CrossbarError(f"processes = {processes}: allowed are whole numbers from 1")
    names, known = {devices: content(devices) for devices in dict.fromkeys(d for d, _ in tasks)}, journal.read()
    yield from ((d, chip, known[names[d], chip]) for d, chip in tasks if (names[d], chip) in known)
    rest = [(d, chip) for d, chip in tasks if (names[d], chip) not in known]
    for devices, chip, accuracy in _run(bench, rest, processes):
        journal.write(names[devices], chip, accuracy)
        yield devices, chip, accuracy


def _run(bench: _Bench, tasks: list[tuple[Devices, int]], processes: int) -> Iterator[tuple[Devices, int, float]]:
    if bench.split.y.is_cuda:
        for devices, chips in _groups(tasks):
            yield from ((devices, c, a) for c, a in zip(chips, bench.together(devices, chips), strict=True))
    elif processes == 1 or len(tasks) < 2 * processes:
        yield from ((d, chip, bench.trial(d, chip)) for d, chip in tasks)
    else:
        size = max(1, min(16, len(tasks) // (4 * processes)))  # a part is what a killed sweep can lose
        parts = [tasks[i : i + size] for i in range(0, len(tasks), size)]
        light, split = copy(bench), bench.split
        light.split, bits = None, _bits(split.x.dtype)
        shared = split.x.view(bits).numpy(), split.y.numpy()  # arrays are shared among processes, not sent
        with joblib.Parallel(processes, return_as="generator_unordered", mmap_mode="c") as pool:
            work = joblib.delayed(_in_worker)
            for done in pool(work(light, *shared, split.x.dtype, split.task, part) for part in parts):
                yield from done


def _bits(dtype: torch.dtype) -> torch.dtype:
    """What NumPy can hold numbers as."""
    return torch.int16 if dtype == torch.bfloat16 else dtype


def _in_worker(bench: _Bench, x: np.ndarray, y: np.ndarray, dtype: torch.dtype, task: Task, tasks: list) -> list:
    torch.set_num_threads(1)
    bench.split = Split(torch.from_numpy(x).view(dtype), torch.from_numpy(y), task)
    return [(d, chip, bench.trial(d, chip)) for d, chip in tasks]


def _groups(tasks: list[tuple[Devices, int]], width: int = 16) -> Iterator[tuple[Devices, list[int]]]:
    """Chips of equal devices, a few at a time."""
    for devices in dict.fromkeys(d for d, _ in tasks):
        chips = [chip for d, chip in tasks if d == devices]
        yield from ((devices, chips[i : i + width]) for i in range(0, len(chips), width))


# --- what a study asks ------------------------------------------------------------------------------------------------


def numbers_of(chips: int | Sequence[int]) -> list[int]:
    """The chips' numbers."""
    numbers = [*range(chips)] if isinstance(chips, Integral) else [*chips]
    if not numbers or len(set(numbers)) < len(numbers) or not all(isinstance(n, Integral) and n >= 0 for n in numbers):
        raise CrossbarError(f"chips = {chips}: allowed is a number of chips, or different whole numbers from 0")
    return [int(n) for n in numbers]


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

    Finished trials lie in ``.cache/trials/`` (or under the environment's ``CACHE_ROOT``), so that an
    interrupted sweep, or one with more rates or chips, only runs what is missing.

    Args:
        model: pruned, quantized, masked or dense; it is not changed.
        chips: how many, or their numbers.
        faults: from a rate to what happens to the cells, e.g. ``partial(StuckAt, ratio=1 / 5.2)``, `Variation` (the
            rate is its sigma) or ``lambda r: (Variation(0.1), StuckAt(r))``.
        batch_size: images at a time; it changes speed only, and from 100 to 500 by less than what one run differs
            from the next, so that no probe chooses it.
        processes: trials at the same time on a CPU. A GPU runs several chips side by side instead.

    Returns:
        One row per trial: ``rate``, ``chip``, ``accuracy`` in [0, 1].

    Raises:
        CrossbarError: a rate, chip, mapping or model that cannot be; noise of reads in a layer that is never called,
            though its weight is used.
        OSError: the cache folder cannot be written.

    >>> from functools import partial
    >>> from lib import data, faults
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4, bias=False))
    >>> model[1].weight.data, split = torch.eye(4), data.Split(torch.eye(4).reshape(4, 1, 2, 2), torch.arange(4))
    >>> found = faults.sweep(model, "two_column", [0.0, 1.0], 2, split, faults=partial(faults.StuckAt, ratio=0))
    >>> found.values.tolist()  # rate, chip, accuracy: with all cells off, one class is left
    [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.25], [1.0, 1.0, 0.25]]
    """
    numbers, rates = numbers_of(chips), [float(rate) for rate in rates]
    if len(set(rates)) < len(rates):
        raise CrossbarError(f"rates = {rates}: each is allowed once")
    devices = {rate: each(faults(rate)) for rate in rates}
    bench = _Bench(model, mapping, split, batch_size)
    tasks = [(d, chip) for d in devices.values() for chip in numbers]
    found = {}
    for done, (d, chip, accuracy) in enumerate(accuracies(bench, journal_of(bench), tasks, processes), start=1):
        found[d, chip] = accuracy
        if progress:
            progress(done / len(tasks), f"trial {done} of {len(tasks)}, {accuracy:.1%}")
    rows = [(rate, chip, found[d, chip]) for rate, d in devices.items() for chip in numbers]
    return pd.DataFrame(rows, columns=["rate", "chip", "accuracy"])
