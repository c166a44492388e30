"""A compressed network as a file to carry away: packed positions and levels in safetensors, restored exactly.

Nothing has to be known of how a network was compressed: a layer's weights are looked at, and stored in the cheapest
of the ways below. ``lib.costs.network_storage`` accounts for the same bits from the constraints' side.

A layer is one tensor of bytes, a stream of bits, lowest first: positions, numbers of levels, levels.

- Positions. ``all``: every weight is stored. ``bitmask``: a bit a weight. ``runs``: for each nonzero the zeros before
  it in ``width`` bits, of which the largest number means so many zeros and no weight yet. ``submatrix``: a bit for each
  row and each column of the GEMM matrix that is not all zero; what lies on both is stored.
- Values. ``step``: of the levels ``n * step``, with ``n`` from ``-K`` to ``K``, 0 only where zeros are stored.
  ``table``: of levels that are listed. ``raw``: the 16 or 32 bits of a weight.

A tensor that has several names, such as a tied weight, is stored under the first. The file's metadata hold, as JSON, a
`Packed` for each layer and the first name for each of the other names. What else a ``state_dict`` holds is stored as it
is.
"""

import json
from collections.abc import Iterator
from math import ceil, log2
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from lib.constraint import State, state_of
from lib.files import write_whole
from lib.models import ModelError, set_weights
from lib.shapes import hides_weights, prunable

__all__ = ["ExportError", "read", "restore", "save"]

SAID = "lib.export"
"""Of the metadata, what is ours."""

KINDS = {"float32": 32, "bfloat16": 16, "float16": 16}
"""Types of weights that are packed, and their bits; float32 holds all of them exactly."""


class ExportError(ValueError):
    """A network that cannot be written, or a file that cannot be read: the message names what is wrong.

    >>> from lib import export
    >>> export.save(torch.nn.Sequential(torch.nn.Linear(2, 1)).double(), "small.safetensors")
    Traceback (most recent call last):
        ...
    lib.export.ExportError: layer '0' is float64: a file holds float32, bfloat16, float16; convert the network first
    """


class Packed(NamedTuple):
    """How a layer's weight lies in its bytes."""

    shape: list[int]
    positions: str
    width: int
    """Bits of one run."""
    runs: int
    values: str
    bits: int
    """Bits of one value."""
    count: int
    """Values stored."""
    levels: int
    """How many are listed, or ``K``; negative if 0 is one of the levels ``n * step``."""
    dtype: str = "float32"


def save(model: nn.Module, path: str | Path) -> pd.DataFrame:
    """Write a network, its masks baked in, to ``path`` (usually ``*.safetensors``), whole or not at all.

    A compiled network has no file of its own: save the one that it was made of, and call `lib.kernels.compile` on what
    `restore` gives back. The kernels that are chosen are those that are faster on the machine at hand.

    Returns:
        One row per layer: ``layer``, ``positions``, ``values``, ``kept`` (nonzero), ``data_bits``, ``index_bits``,
        ``table_bits``, as in `lib.costs.network_storage`; the rest of the file is biases, batch norm and its header.

    Raises:
        ExportError: a layer of other numbers than float32, bfloat16 and float16; a module that keeps its weights where
            no file would find them (a compiled kernel, a quantized layer of torch); an entry that is no tensor.
        OSError: the file cannot be written.

    >>> from tempfile import TemporaryDirectory
    >>> from lib import export
    >>> folder, model = TemporaryDirectory(), torch.nn.Sequential(torch.nn.Linear(8, 1))
    >>> model[0].weight.data = torch.tensor([[0.0, 0.5, 0.0, 0.0, -1.0, 0.0, 0.0, 0.5]])
    >>> rows = export.save(model, f"{folder.name}/small.safetensors")
    >>> rows.to_dict("records")[0]  # 2 bits for each run of zeros, 2 for each multiple of 0.5, and the step
    {'layer': '0', 'positions': 'runs', 'values': 'step', 'kept': 3, 'data_bits': 6, 'index_bits': 6, 'table_bits': 32}
    """
    if hidden := [name or "the model" for name, module in model.named_modules() if hides_weights(module)]:
        raise ExportError(
            f"{', '.join(hidden)}: its weights are in no state_dict; save the network that it was made of"
        )
    state, rows = state_of(model), []
    first = _first_names(state)
    said: dict[str, Packed | str] = {name: other for name, other in first.items() if other != name}
    stored = {name: state[name].cpu().contiguous().clone() for name in state if first[name] == name}
    for layer in prunable(model):
        name = first[f"{layer}.weight".lstrip(".")]
        weight, dtype = stored[name], str(stored[name].dtype).removeprefix("torch.")
        if dtype not in KINDS:
            raise ExportError(f"layer {layer!r} is {dtype}: a file holds {', '.join(KINDS)}; convert the network first")
        exact = weight.float().numpy()
        packed, (index, data, table) = min(_ways(exact, dtype), key=lambda way: sum(len(part) for part in way[1]))
        stored[name] = torch.from_numpy(np.packbits(np.concatenate([index, data, table]), bitorder="little"))
        said[name] = packed
        kept = int(np.count_nonzero(exact))
        rows.append((layer, packed.positions, packed.values, kept, len(data), len(index), len(table)))
    write_whole(Path(path), to_bytes(stored, {SAID: json.dumps(said, separators=(",", ":"))}))
    return pd.DataFrame(rows, columns=["layer", "positions", "values", "kept", "data_bits", "index_bits", "table_bits"])


def _first_names(state: State) -> dict[str, str]:
    """For every entry, the first of those that are the same tensor.

    Raises:
        ExportError: an entry that is no tensor of numbers.
    """
    for name, t in state.items():
        if not isinstance(t, Tensor) or t.is_meta or t.is_quantized or t.layout != torch.strided:
            raise ExportError(f"{name} is no dense tensor of numbers ({type(t).__name__}): it cannot be in a file")
    first: dict[tuple, str] = {}
    place = {name: (t.data_ptr(), t.shape, t.stride()) if t.numel() else (name,) for name, t in state.items()}
    return {name: first.setdefault(place[name], name) for name in state}


def read(path: str | Path) -> State:
    """The ``state_dict`` of a file that `save` has written, weights unpacked (any safetensors file will do).

    Raises:
        FileNotFoundError: there is no such file. ExportError: it is damaged.

    >>> from tempfile import TemporaryDirectory
    >>> from lib import export
    >>> folder, model = TemporaryDirectory(), torch.nn.Sequential(torch.nn.Linear(4, 1))
    >>> model[0].weight.data = torch.tensor([[0.0, 0.3, 0.0, -0.7]])
    >>> rows = export.save(model, f"{folder.name}/small.safetensors")
    >>> torch.equal(export.read(f"{folder.name}/small.safetensors")["0.weight"], model[0].weight)
    True
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            said = json.loads((file.metadata() or {}).get(SAID, "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        for name, packed in said.items():
            if isinstance(packed, list):
                state[name] = _unpack(state[name].numpy(), Packed(*packed))
        return state | {name: state[other] for name, other in said.items() if isinstance(other, str)}
    except (SafetensorError, TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise ExportError(f"{path} is damaged, or was not written by lib.export.save: {error}") from None


def restore(model: nn.Module, path: str | Path) -> nn.Module:
    """Set a network of the same structure to what a file holds, in place. Returns the model.

    Raises:
        FileNotFoundError: there is no such file. ExportError: it is of another structure, or damaged.

    >>> from tempfile import TemporaryDirectory
    >>> from lib import export, models
    >>> folder, model = TemporaryDirectory(), models.build("lenet300", (1, 4, 4), 2, seed=1)
    >>> rows = export.save(model, f"{folder.name}/small.safetensors")
    >>> other = export.restore(models.build("lenet300", (1, 4, 4), 2, seed=2), f"{folder.name}/small.safetensors")
    >>> torch.equal(other.fc1.weight, model.fc1.weight)
    True
    """
    state, own = read(path), model.state_dict()
    first, unlike = _first_names(own), f"{path} holds another network:"
    for name in (n for n in own if n in state):
        if state[name].dtype != own[name].dtype:
            raise ExportError(f"{unlike} {name} is {state[name].dtype}, in the model {own[name].dtype}")
        if first[name] in state and not torch.equal(state[name], state[first[name]]):
            raise ExportError(f"{unlike} {name} and {first[name]} are two tensors, in the model they are one")
    try:
        return set_weights(model, state)
    except ModelError as error:
        raise ExportError(f"{path} holds {error}") from None


# --- numbers as bits --------------------------------------------------------------------------------------------------


def _to_bits(numbers: np.ndarray, width: int) -> np.ndarray:
    return ((numbers[:, None] >> np.arange(width)) & 1).astype(np.uint8).reshape(-1)


def _to_numbers(bits: np.ndarray, width: int) -> np.ndarray:
    return bits.reshape(-1, width).astype(np.int64) @ (1 << np.arange(width)) if width else np.zeros(0, np.int64)


def _width(choices: int) -> int:
    return ceil(log2(choices)) if choices > 1 else 0


# --- ways to store a layer --------------------------------------------------------------------------------------------

Streams = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Bits of the positions, of the values and of the levels."""


def _ways(weight: np.ndarray, dtype: str) -> Iterator[tuple[Packed, Streams]]:
    flat, matrix = weight.reshape(-1), weight.reshape(len(weight), np.prod(weight.shape[1:]))
    nonzero, rows, columns = flat != 0, matrix.any(1), matrix.any(0)
    runs, width = _runs(nonzero)
    for positions, *sizes, index, stored in (
        ("bitmask", 0, 0, nonzero, flat[nonzero]),
        ("runs", width, len(runs), _to_bits(runs, width), flat[nonzero]),
        ("submatrix", 0, 0, np.concatenate([rows, columns]), matrix[rows][:, columns].reshape(-1)),
        ("all", 0, 0, nonzero[:0], flat),
    ):
        for *value, data, table in _values(stored, dtype):
            yield Packed([*weight.shape], positions, *sizes, *value, dtype), (index.astype(np.uint8), data, table)


def _runs(nonzero: np.ndarray) -> tuple[np.ndarray, int]:
    """Runs of zeros with their escapes, at the width that takes the fewest bits."""
    gaps = np.diff(nonzero.nonzero()[0], prepend=-1) - 1
    if not len(gaps):
        return gaps, 1
    top = (1 << np.arange(1, int(gaps.max() + 1).bit_length() + 1)) - 1
    sizes = [(len(gaps) + int((gaps // t).sum())) * k for k, t in enumerate(top, start=1)]
    width = int(np.argmin(sizes)) + 1
    escapes = gaps // top[width - 1]
    runs = np.full(len(gaps) + int(escapes.sum()), top[width - 1])
    runs[np.cumsum(escapes + 1) - 1] = gaps % top[width - 1]
    return runs, width


def _values(stored: np.ndarray, dtype: str) -> Iterator[tuple]:
    """Kind, bits, count, levels, and the streams of the values and of the levels."""
    width = KINDS[dtype]
    raw = torch.from_numpy(stored).to(getattr(torch, dtype)).view(getattr(torch, f"int{width}")).numpy()
    yield "raw", width, len(stored), 0, _to_bits(raw, width), np.zeros(0, np.uint8)
    levels, numbers = np.unique(stored, return_inverse=True)
    if not 0 < len(levels) <= 256:
        return
    bits = _width(len(levels))
    yield "table", bits, len(stored), len(levels), _to_bits(numbers, bits), _raw(levels)
    if found := _step(levels):
        step, n = found
        k, zero = int(np.abs(n).max()), bool((n == 0).any())
        bits, levels = _width(2 * k + zero), -k if zero else k
        numbers = np.searchsorted(_multiples(levels), n)[numbers]
        yield "step", bits, len(stored), levels, _to_bits(numbers, bits), _raw(step[None])


def _raw(numbers: np.ndarray) -> np.ndarray:
    """The bits of float32."""
    return _to_bits(numbers.view(np.uint32).astype(np.int64), 32)


def _multiples(levels: int) -> np.ndarray:
    k = abs(levels)
    return np.array([n for n in range(-k, k + 1) if n or levels < 0])


def _step(levels: np.ndarray) -> tuple[np.float32, np.ndarray] | None:
    """A step of which all levels are whole multiples to the last bit, and the multiples."""
    smallest = np.abs(levels[levels != 0]).min(initial=np.inf)
    for n in range(1, 128) if np.isfinite(smallest) else ():
        near = np.float32(smallest / n)
        for step in (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))):
            multiples = np.rint(levels / step)
            if np.abs(multiples).max() < 128 and np.array_equal(multiples.astype(np.float32) * step, levels):
                return step, multiples.astype(np.int64)
    return None


def _unpack(stream: np.ndarray, packed: Packed) -> Tensor:
    """The weight, ``packed.shape``."""
    bits = np.unpackbits(stream, bitorder="little")
    size, taken = int(np.prod(packed.shape)), 0

    def take(count: int, width: int) -> np.ndarray:
        nonlocal taken
        taken += count * width
        return _to_numbers(bits[taken - count * width : taken], width) if width else np.zeros(count, np.int64)

    place = np.zeros(packed.shape, bool)
    if packed.positions == "runs":
        runs = take(packed.runs, packed.width)
        escape = runs == (1 << packed.width) - 1
        place.reshape(-1)[(np.cumsum(np.where(escape, runs, runs + 1)) - 1)[~escape]] = True
    elif packed.positions == "submatrix":
        matrix = place.reshape(len(place), -1)
        matrix[np.ix_(take(len(matrix), 1) == 1, take(matrix.shape[1], 1) == 1)] = True
    else:
        place.reshape(-1)[:] = take(size, 1) == 1 if packed.positions == "bitmask" else True
    numbers, dtype = take(packed.count, packed.bits), getattr(torch, packed.dtype)
    if packed.values == "raw":
        width = KINDS[packed.dtype]
        values = torch.from_numpy(numbers.astype(f"uint{width}").view(f"int{width}")).view(dtype).float().numpy()
    else:
        listed = take(1 if packed.values == "step" else packed.levels, 32).astype(np.uint32).view(np.float32)
        listed = _multiples(packed.levels).astype(np.float32) * listed if packed.values == "step" else listed
        values = listed[numbers]
    weight = np.zeros(packed.shape, np.float32)
    weight[place] = values
    return torch.from_numpy(weight).to(dtype)
