"""What values hold: plain ones, tensors, networks, data sets, files and other objects."""

import copyreg
import hashlib
import types
from collections import ChainMap, OrderedDict
from collections.abc import Iterator, Sequence
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lib.data import Data, Split
from lib.keys.source import Walk, aside

PLAIN = (types.NoneType, bool, int, float, str)
BARE = vars(nn.Module())


class KeysError(TypeError):
    """It cannot be told when two things are the same; the message says which, where it was met, and why.

    >>> from lib.keys import content
    >>> content({"rates": (rate / 10 for rate in range(3))})
    Traceback (most recent call last):
        ...
    lib.keys.values.KeysError: cannot tell when two generator are the same (['rates']): cannot pickle ...
    """


class Values(Walk):
    """A walk that begins at values; what functions and classes among them say is for who derives from it."""

    def __init__(self, without: Sequence[str], beside: Sequence[Tensor]) -> None:
        super().__init__(without)
        self.beside = {id(tensor) for tensor in beside}
        self.alive: list[Any] = [*beside]  # so that nothing else gets their ids
        self.open: dict[int, str] = {}
        self.networks: dict[int, int] = {}
        self.storages: dict[int, int] = {}
        self.inside = 0  # of a network

    def value(self, value: Any, name: str = "") -> Any:
        """The form of a value, which was met under a name."""
        if type(value) in PLAIN:
            return value
        if id(value) in self.open:
            return ["up", [*self.open].index(id(value))]
        self.open[id(value)] = name
        try:
            return self._say(value, type(value))
        finally:
            del self.open[id(value)]

    def refusal(self, value: Any, why: object) -> KeysError:
        """What to raise."""
        where = "".join(self.open.values()).strip(".")
        return KeysError(f"cannot tell when two {type(value).__name__} are the same{where and f' ({where})'}: {why}")

    def _say(self, value: Any, kind: type) -> Any:
        if kind in (list, tuple, torch.Size):
            return ["list", *(self.value(v, f"[{i}]") for i, v in enumerate(value))]
        if kind in (dict, OrderedDict, types.MappingProxyType):
            return ["dict", *([self.value(k), self.value(v, f"[{k!r:.40}]")] for k, v in value.items())]
        if kind in (set, frozenset):
            return ["set", *map(self.value, sorted(value, key=lambda v: (type(v).__name__, name_of(v) or repr(v))))]
        if kind in (complex, bytes):
            return [kind.__name__, repr(value) if kind is complex else digest(value)]
        if place := self.place(value):
            return self.refer("", *place)
        if kind is Data:  # what derives from it may hold more
            return ["data", value.checksum, value.classes, self.value(value.task, ".task")]
        if kind is Split:
            return ["split", value.checksum, self.value(value.task, ".task")]
        for kinds, say in (
            (type, self._class),
            (types.FunctionType, self._function),
            (types.ModuleType, lambda m: self.refer("", m.__name__, [])),
            (Tensor, self._tensor),
            (nn.Module, self._network),
            (Enum, lambda e: ["enum", self.value(kind), e.name, self.value(e.value, ".value")]),
            (np.generic, self._number),
            (pd.DataFrame, lambda f: ["frame", self.value(f.to_dict("split"))]),
            (Path, self._file),
        ):
            if isinstance(value, kinds):
                return say(value)
        return self._object(value, kind)

    def _number(self, value: np.generic) -> Any:
        item = value.item()
        same = type(item) in (*PLAIN, complex) and np.asarray(item).dtype == value.dtype
        return self.value(item) if same else ["number", str(value.dtype), value.tobytes().hex()]

    def _file(self, path: Path) -> Any:
        if not path.is_file():
            raise self.refusal(path, f"{path} is no file, whose bytes would count")
        return ["file", digest(path.read_bytes())]

    def _object(self, value: Any, kind: type) -> Any:
        """By what it would be copied with."""
        if aside(kind.__module__):
            raise self.refusal(value, "it only presents results or keeps them")
        try:
            copied = copyreg.dispatch_table.get(kind, lambda v: v.__reduce_ex__(4))(value)
        except Exception as error:
            raise self.refusal(value, error) from None
        if isinstance(copied, str):  # by its name; what functools.cache made has a function inside
            return [name_of(kind), copied, self.value(getattr(value, "__wrapped__", None))]
        parts = [[*part] if isinstance(part, Iterator) else self._counted(kind, part) for part in copied]
        return ["object", *map(self.value, parts)]

    def _counted(self, kind: type, state: Any) -> Any:
        """Attributes, without those that do not count and those that only save time."""
        if not isinstance(state, dict):
            return state
        said = ChainMap(*map(vars, kind.__mro__))
        kept = {k for k in state if isinstance(said.get(str(k)), cached_property)}
        return {k: v for k, v in state.items() if k not in kept and k not in self.without}

    def _tensor(self, tensor: Tensor) -> Any:
        if id(tensor) in self.beside:
            return ["beside"]
        try:
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        except (RuntimeError, TypeError, ValueError) as error:
            raise self.refusal(tensor, error) from None
        form = ["tensor", str(tensor.dtype), [*tensor.shape], digest(values), tensor.requires_grad]
        hooks = [*(tensor._backward_hooks or {}).values(), *(tensor._post_accumulate_grad_hooks or {}).values()]
        form += [self.value([hooks, vars(tensor)])] if hooks or vars(tensor) else []
        storage = tensor.untyped_storage()
        if self.inside and storage.nbytes():  # in a network, where tensors that share their values move together
            self.alive.append(tensor)
            tie = self.storages.setdefault(storage.data_ptr(), number := len(self.storages))
            form += [] if tie == number else [tie, tensor.storage_offset()]
        return form

    def _network(self, network: nn.Module) -> Any:
        if id(network) in self.networks:
            return ["again", self.networks[id(network)]]
        self.networks[id(network)] = len(self.networks)
        self.alive.append(network)
        try:
            state = network.__getstate__()  # a class may leave out what it only holds between two calls
        except RuntimeError:  # parametrized layers refuse
            state = vars(network)
        form = ["network", self.value(type(network))]
        self.inside += 1
        for name, value in sorted(self._counted(type(network), state).items()):
            if name not in BARE or value != BARE[name]:
                if name in BARE and "hooks" in name:
                    value = [*value.values()]  # their keys count all hooks that ever were
                elif name in ("_parameters", "_buffers"):
                    value = dict(sorted(value.items()))  # who takes one away and puts it back changes nothing
                form.append([name, self.value(value, f".{name}")])
        self.inside -= 1
        return form


def digest(raw: Any) -> str:
    """A hash of bytes."""
    return hashlib.sha256(raw).hexdigest()


def name_of(value: Any) -> str:
    """Of something that is installed: its package, and its name there."""
    return f"{(getattr(value, '__module__', None) or '').split('.')[0]} {getattr(value, '__qualname__', '')}".strip()
