"""A cache of finished runs: what ran once is read wherever everything is the same."""

import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from torch import Tensor, nn

from lib.files import cache_folder, write_whole
from lib.keys import content
from lib.training.loop import Progress

COUNTED = ("storage_bits",)
"""Methods that only count what training has left: a better account of it is no reason to train again."""

AS_TORCH_COMES = ["ieee", "ieee", "ieee", "tf32", "tf32", "torch.float32"]
"""Precisions of products and convolutions, and the default type."""

PARTS = {"state", "training", "value"}


def cached(function: Callable[..., Any], model: nn.Module, *args: Any, progress: Progress | None = None, **kwargs: Any):
    """``function(model, *args, **kwargs)``, or what it did and returned the last time everything was the same.

    The function changes tensors of the model's ``state_dict`` in place, and nothing else, and returns numbers, text,
    tensors and data frames, or tuples, lists and dicts of these; a NumPy scalar comes back as Python's. The key holds
    all that determines the result (see `lib.keys.content`): the function's code and all that it refers to, the whole
    model, the data, the arguments, device kind, thread count, torch version, and the precision that torch was told
    (autocast, TF32, default type). Two processes that want the same entry compute it once. A file that is damaged or
    does not fit the model is reported and computed anew; a function that has changed more than it may, or returns
    something else, is reported, and nothing is kept. The cache lies in ``.cache/`` or in the environment's
    ``CACHE_ROOT``.

    Raises:
        KeysError: an argument, or an attribute of the model, of which nobody can tell when it is the same.
        OSError: the cache cannot be written.

    >>> from lib import data, models
    >>> from lib.training import cached, fit
    >>> images = data.load(train_size=100, test_size=100, validation_size=100)
    >>> for _ in range(2):
    ...     net = models.build("lenet300", images.shape, images.classes)
    ...     log = cached(fit, net, images, epochs=1, lr=0.05, progress=lambda done, message: print(message))
    epoch 1/1, loss ...
    from the cache
    """
    name = getattr(function, "__name__", type(function).__name__)
    path = cache_folder(name) / f"{_key(function, model, args, kwargs)}.pt"
    with _locked(path):
        entry = _read(path, model)
        if entry is not None:
            model.load_state_dict(entry["state"])
            for module, training in zip(model.modules(), entry["training"], strict=True):
                module.training = training
            if progress:
                progress(1.0, "from the cache")
            return _from_plain(entry["value"])
        before = _beside(model, args, kwargs)
        value = function(model, *args, progress=progress, **kwargs)
        if before != _beside(model, args, kwargs):
            warnings.warn(f"{name} changed more than the model's state_dict: nothing is kept", stacklevel=2)
            return value
        try:
            stored = _to_plain(value)
        except TypeError as error:
            warnings.warn(f"{name} returned {error}: nothing is kept", stacklevel=2)
            return value
        _write(path, model, stored)
        return _from_plain(stored)  # as it will come back


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a cache entry alone; a process that dies lets go of it."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire()
    except OSError as error:
        raise OSError(error.errno, f"cannot write the cache {path.parent}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def _write(path: Path, model: nn.Module, value: dict[str, Any]) -> None:
    state = {k: v.cpu() for k, v in model.state_dict().items()}
    payload = io.BytesIO()
    torch.save({"state": state, "training": [m.training for m in model.modules()], "value": value}, payload)
    write_whole(path, hashlib.sha256(payload.getvalue()).digest() + payload.getvalue())


def _read(path: Path, model: nn.Module) -> dict | None:
    """The entry; None when it is missing, does not match the digest that it begins with, or is of another network."""
    if not path.is_file():
        return None
    raw, wrong = path.read_bytes(), "is damaged"
    if hashlib.sha256(raw[32:]).digest() == raw[:32]:
        try:
            entry, wrong = torch.load(io.BytesIO(raw[32:]), weights_only=True), "is of another network"
        except pickle.UnpicklingError:
            entry = None
        if isinstance(entry, dict) and {*entry} == PARTS and _shapes(entry["state"]) == _shapes(model.state_dict()):
            return entry
    warnings.warn(f"cache file {path.parent.name}/{path.name} {wrong}; computing it anew", stacklevel=3)
    return None


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


def _to_plain(value: Any) -> dict[str, Any]:
    """A value as what can be read without running code; TypeError, in words, for what would come back as another."""
    value = value.item() if isinstance(value, np.generic) else value
    if type(value) in (tuple, list):
        return {type(value).__name__: [_to_plain(v) for v in value]}
    if type(value) is dict:
        return {"dict": [(_to_plain(k), _to_plain(v)) for k, v in value.items()]}
    if isinstance(value, pd.DataFrame):
        columns = value.to_dict("list")
        if not pd.DataFrame(columns).equals(value):
            raise TypeError("a data frame with an index or types of its own (reset_index?)")
        return {"frame": columns}
    if value is None or type(value) in (bool, int, float, complex, str, bytes) or isinstance(value, Tensor):
        return {"plain": value}
    raise TypeError(f"a {type(value).__name__}")


def _from_plain(stored: dict[str, Any]) -> Any:
    (kind, held), *_ = stored.items()
    if kind in ("tuple", "list"):
        return {"tuple": tuple, "list": list}[kind](_from_plain(v) for v in held)
    if kind == "dict":
        return {_from_plain(k): _from_plain(v) for k, v in held}
    return pd.DataFrame(held) if kind == "frame" else held


def _key(function: Callable, model: nn.Module, args: tuple, kwargs: dict) -> str:
    place = next(model.parameters(), torch.empty(0)).device.type
    versions = torch.__version__.split("+")[0], place, torch.get_num_threads() if place == "cpu" else 0
    return content(
        function,
        model,
        args,
        dict(sorted(kwargs.items())),
        (*versions, *_told(place)),
        instructions(place),
        without=COUNTED,
    )


def instructions(place: str = "cpu") -> str:
    """The instruction set that PyTorch's kernels use on a CPU, and the limit on oneDNN's, which chooses by itself.

    Others round in another order, and train other networks.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    told = torch.backends.cpu.get_cpu_capability() + (f" (oneDNN: at most {limit})" if limit else "")
    return told if place == "cpu" else ""


def _told(place: str) -> tuple[str, ...]:
    """How precisely torch was told to compute, beside the call; nothing where it is as torch comes."""
    now = torch.backends
    made = (now.cuda.matmul, now.mkldnn.matmul, now.mkldnn.conv, now.cudnn.conv, now.cudnn.rnn)
    told = [by.fp32_precision.replace("none", "ieee") for by in made] + [str(torch.get_default_dtype())]
    if torch.is_autocast_enabled(place):
        told.append(str(torch.get_autocast_dtype(place)))
    return () if told == AS_TORCH_COMES else tuple(told)


def _beside(model: nn.Module, args: tuple, kwargs: dict) -> str:
    """All that a function was given, without what an entry of the cache holds."""
    state = [*model.state_dict(keep_vars=True).values()]
    frozen = [tensor.requires_grad for tensor in state]
    return content(model, args, kwargs, frozen, without=(*COUNTED, "training"), beside=state)
