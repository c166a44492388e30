"""One bare training loop, evaluation, and a cache of finished runs."""

import ast
import hashlib
import inspect
import io
import json
import os
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lib.data import Data, Split
from lib.files import write_whole

Progress = Callable[[float, str], None]
"""Called with the fraction done and a short message; a study passes its progress line here."""

CACHE_ROOT = Path(__file__).resolve().parent.parent / ".cache"


class TrainingError(RuntimeError):
    """Training cannot start, or went wrong: the message names the setting to change.

    >>> from lib.training import learning_rate
    >>> learning_rate("linear", 0.1, progress=0.5)
    Traceback (most recent call last):
        ...
    lib.training.TrainingError: schedule = 'linear': allowed are 'constant', 'step' and 'cosine'
    """


def device() -> torch.device:
    """CUDA when there is one, else the CPU.

    >>> from lib.training import device
    >>> device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    True
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Hook:
    """What a recipe may do inside `fit`; every method does nothing by default.

    >>> from lib import data, models, training
    >>> class Watch(training.Hook):
    ...     def before_step(self, model, step):
    ...         print("batch", step)
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> net = models.build("lenet300", images.shape, images.classes)
    >>> log = training.fit(net, images, epochs=2, lr=0.05, batch_size=100, hooks=(Watch(),))
    batch 0
    batch 1
    batch 2
    batch 3
    """

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Called before the first batch of an epoch."""

    def before_step(self, model: nn.Module, step: int) -> None:
        """Called before the forward pass of a batch."""

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Called when ``.grad`` is filled and the optimizer has not stepped: the place to pull weights."""

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """Called after the last batch of an epoch."""


Schedule = Literal["constant", "step", "cosine"]


def learning_rate(schedule: Schedule, lr: float, progress: float) -> float:
    """The learning rate at a fraction ``progress`` in [0, 1) of the run.

    ``step`` multiplies by 0.1 at 8/15 and at 12/15 (epochs 80 and 120 of 150, papers/pruning.md section 2).

    >>> from lib.training import learning_rate
    >>> [round(learning_rate("step", 0.1, progress), 4) for progress in (0.0, 0.6, 0.9)]
    [0.1, 0.01, 0.001]
    >>> [round(learning_rate("cosine", 0.1, progress), 4) for progress in (0.0, 0.5, 1.0)]
    [0.1, 0.05, 0.0]
    """
    if schedule == "constant":
        return lr
    if schedule == "step":
        return lr * 0.1 ** ((progress >= 8 / 15) + (progress >= 12 / 15))
    if schedule == "cosine":
        return lr * float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress))))
    raise TrainingError(f"schedule = {schedule!r}: allowed are 'constant', 'step' and 'cosine'")


def make_optimizer(
    model: nn.Module, name: Literal["sgd", "adam"], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """A fresh optimizer over all parameters that require a gradient.

    >>> from lib.training import make_optimizer
    >>> layer = torch.nn.Linear(4, 2)
    >>> layer.bias.requires_grad = False
    >>> opt = make_optimizer(layer, "sgd", lr=0.1, momentum=0.9, weight_decay=0.0)
    >>> [tuple(p.shape) for p in opt.param_groups[0]["params"]]
    [(2, 4)]
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, foreach=True)
    if name == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=weight_decay, foreach=True)
    raise TrainingError(f"optimizer = {name!r}: allowed are 'sgd' and 'adam'")


def batches(split: Split, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of batches in an order that depends on ``seed`` and ``epoch`` alone: paired arms see the same.

    >>> from lib.data import Split
    >>> from lib.training import batches
    >>> split = Split(torch.zeros(5, 1, 1, 1), torch.arange(5))
    >>> order = [y.tolist() for _, y in batches(split, 2, seed=0, epoch=0)]
    >>> [len(y) for y in order], sorted(sum(order, []))
    ([2, 2, 1], [0, 1, 2, 3, 4])
    >>> order == [y.tolist() for _, y in batches(split, 2, seed=0, epoch=0)]
    True
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    for index in torch.randperm(len(split), generator=generator).to(split.y.device).split(batch_size):
        yield split.x[index], split.y[index]


def fit(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    lr: float,
    optimizer: Literal["sgd", "adam"] = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    batch_size: int = 128,
    schedule: Schedule = "step",
    seed: int = 0,
    stop_after: int | None = None,
    hooks: tuple[Hook, ...] = (),
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Train ``model`` in place on ``data.train`` by cross-entropy, where the model and the data already are.

    Bit-identical for the same seed, device and thread count. The last epoch's weights are what is left: nothing is
    selected by its accuracy. ``stop_after = k`` leaves the weights as they are after the first ``k`` epochs of a run of
    ``epochs``: the ``theta_k`` that rewinding goes back to.

    Returns:
        One row per epoch: ``epoch`` (from 1), ``lr``, ``train_loss``, ``train_accuracy``.

    Raises:
        TrainingError: a bad setting, or a loss that is not finite any more.

    >>> from lib import data, models, training
    >>> images = data.load(train_size=1000, test_size=100, validation_size=100)
    >>> net = models.build("lenet300", images.shape, images.classes)
    >>> log = training.fit(net, images, epochs=3, lr=0.05)
    >>> log["epoch"].tolist(), log["train_loss"].is_monotonic_decreasing, training.evaluate(net, images.test) > 0.5
    ([1, 2, 3], True, True)
    """
    if epochs < 0 or batch_size < 1 or lr <= 0:
        raise TrainingError(f"{epochs=}, {batch_size=}, {lr=}: allowed are epochs >= 0, batch_size >= 1, lr > 0")
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    opt = make_optimizer(model, optimizer, lr, momentum, weight_decay)
    steps = -(-len(data.train) // batch_size)
    rows = []
    for epoch in range(epochs if stop_after is None else min(stop_after, epochs)):
        model.train()
        for hook in hooks:
            hook.before_epoch(model, epoch)
        loss_sum = torch.zeros((), device=data.train.y.device)
        correct = torch.zeros((), dtype=torch.long, device=data.train.y.device)
        for step, (x, y) in enumerate(batches(data.train, batch_size, seed, epoch), start=epoch * steps):
            opt.param_groups[0]["lr"] = learning_rate(schedule, lr, step / (epochs * steps))
            for hook in hooks:
                hook.before_step(model, step)
            output = model(x)
            loss = cross_entropy(output, y)
            opt.zero_grad()
            loss.backward()
            for hook in hooks:
                hook.after_backward(model, step)
            opt.step()
            loss_sum += loss.detach() * len(y)
            correct += (output.detach().argmax(1) == y).sum()
        for hook in hooks:
            hook.after_epoch(model, epoch)
        mean_loss, accuracy = float(loss_sum) / len(data.train), int(correct) / len(data.train)
        if not torch.isfinite(loss_sum):
            raise TrainingError(f"training diverged in epoch {epoch + 1} (loss {mean_loss}): lower lr = {lr}")
        rows.append((epoch + 1, opt.param_groups[0]["lr"], mean_loss, accuracy))
        if progress:
            progress((epoch + 1) / epochs, f"epoch {epoch + 1}/{epochs}, loss {mean_loss:.3f}, {accuracy:.1%}")
    return pd.DataFrame(rows, columns=["epoch", "lr", "train_loss", "train_accuracy"])


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int = 200) -> float:
    """Accuracy in [0, 1] on a split, in evaluation mode; the model's own mode is restored.

    >>> from lib.data import Split
    >>> from lib.training import evaluate
    >>> split = Split(torch.eye(4).reshape(4, 4, 1, 1), torch.tensor([0, 1, 2, 2]))
    >>> evaluate(torch.nn.Flatten(), split)  # the largest input is the class: wrong once in four
    0.75
    """
    mode = model.training
    model.eval()
    correct = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(split.x.split(batch_size), split.y.split(batch_size), strict=True)
    )
    model.train(mode)
    return correct / len(split)


# --- cache of finished runs -------------------------------------------------------------------------------------------


def cached(function: Callable[..., Any], model: nn.Module, *args: Any, progress: Progress | None = None, **kwargs: Any):
    """``function(model, *args, **kwargs)``, or what it did and returned the last time everything was the same.

    The function changes the model's ``state_dict`` in place without changing its keys, and returns data that
    ``torch.save`` can write. The key holds all that determines the result: the function's code and that of
    everything in ``lib`` which it refers to, the model's structure and weights, the data's checksum, the arguments,
    device kind, thread count and torch version. Two processes that want the same entry compute it once; a damaged
    file is reported and computed anew. The cache lies in ``.cache/`` or in the environment's ``CACHE_ROOT``.

    >>> from lib import data, models
    >>> from lib.training import cached, fit
    >>> images = data.load(train_size=100, test_size=100, validation_size=100)
    >>> for _ in range(2):
    ...     net = models.build("lenet300", images.shape, images.classes)
    ...     log = cached(fit, net, images, epochs=1, lr=0.05, progress=lambda done, message: print(message))
    epoch 1/1, loss ...
    from the cache
    """
    key = _key(function, model, args, kwargs)
    path = Path(os.environ.get("CACHE_ROOT") or CACHE_ROOT) / function.__name__ / f"{key}.pt"
    with _locked(path):
        entry = _read(path)
        if entry is None:
            value = function(model, *args, progress=progress, **kwargs)
            payload = io.BytesIO()
            state = {k: v.cpu() for k, v in model.state_dict().items()}
            torch.save({"state": state, "value": _to_plain(value)}, payload)
            digest = hashlib.sha256(payload.getvalue()).digest()
            write_whole(path, digest + payload.getvalue())
        else:
            model.load_state_dict(entry["state"])
            value = _from_plain(entry["value"])
            if progress:
                progress(1.0, "from the cache")
    return value


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a cache entry alone; a process that dies lets go of it."""
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise OSError(error.errno, f"cannot write the cache {path.parent}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def _read(path: Path) -> dict | None:
    """The entry, or None when it is missing or does not match the digest that it begins with."""
    if not path.is_file():
        return None
    raw = path.read_bytes()
    if hashlib.sha256(raw[32:]).digest() != raw[:32]:
        warnings.warn(f"cache file {path.name} is damaged; computing it anew", stacklevel=3)
        return None
    return torch.load(io.BytesIO(raw[32:]), weights_only=True)


def _to_plain(value: Any) -> Any:
    return {"frame": value.to_dict("list")} if isinstance(value, pd.DataFrame) else {"plain": value}


def _from_plain(stored: dict) -> Any:
    return pd.DataFrame(stored["frame"]) if "frame" in stored else stored["plain"]


def _key(function: Callable, model: nn.Module, args: tuple, kwargs: dict) -> str:
    place = next(model.parameters()).device.type
    versions = [torch.__version__.split("+")[0], place, torch.get_num_threads() if place == "cpu" else 0]
    parts = [
        code_version(function),
        *sorted({code_version(type(m)) for m in model.modules()}),
        fingerprint(model),
        fingerprint(args),
        fingerprint(kwargs),
        versions,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def fingerprint(value: Any) -> Any:
    """A JSON form that is equal exactly when two arguments would give the same result.

    >>> from lib.training import fingerprint
    >>> fingerprint({"lr": 0.05, "shares": (0.3, 0.5)})
    {'lr': 0.05, 'shares': [0.3, 0.5]}
    >>> fingerprint(torch.zeros(2)) == fingerprint(torch.zeros(2)), fingerprint(torch.zeros(2)) == fingerprint([0, 0])
    (True, False)
    """
    if isinstance(value, Data):
        return ["data", value.checksum, value.classes]
    if isinstance(value, nn.Module):
        return ["module", repr(value), fingerprint(value.state_dict())]
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous()
        return [str(array.dtype), list(array.shape), hashlib.sha256(array.numpy().tobytes()).hexdigest()]
    if is_dataclass(value) and not isinstance(value, type):
        return [code_version(type(value)), {f.name: fingerprint(getattr(value, f.name)) for f in fields(value)}]
    if isinstance(value, Mapping):
        return {str(k): fingerprint(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [fingerprint(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cached() cannot tell when two {type(value).__name__} arguments are the same")


COUNTED = ("storage_bits",)
"""Methods that only count what training has left: a better account of it is no reason to train again."""


def code_version(root: Callable | type) -> str:
    """A hash of the code of a function or class and of everything in ``lib`` that it refers to, however far.

    Comments, docstrings and layout do not count: only a change that could change a result makes a new version.

    >>> from lib.pruning import Column, Filter
    >>> from lib.training import code_version
    >>> code_version(Filter) == code_version(Filter), code_version(Filter) == code_version(Column)
    (True, False)
    """
    seen: dict[str, str] = {}
    queue: list[tuple[str, Any]] = [("", root)]
    while queue:
        name, item = queue.pop()
        if isinstance(item, bool | int | float | str | tuple | list | dict):
            seen[f"constant {name}"] = repr(item)
            continue
        module = getattr(item, "__module__", None) or ""
        name = f"{module}.{getattr(item, '__qualname__', '')}"
        if module.split(".")[0] not in ("lib", "__main__") or name in seen:
            continue
        seen[name] = _normal_source(item)
        parts = [v for k, v in vars(item).items() if k not in COUNTED] if isinstance(item, type) else [item]
        queue.extend(("", base) for base in (item.__mro__ if isinstance(item, type) else ()))
        for part in parts:
            queue.extend(_references(getattr(part, "fget", part)))
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


def _references(function: Any) -> Iterator[tuple[str, Any]]:
    """The functions, classes and constants that a function's code names, directly or as attributes of our modules."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    codes = [code] if code else []
    while codes:
        code = codes.pop()
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
        for name in code.co_names:
            item = inspect.unwrap(function).__globals__.get(name)
            if isinstance(item, types.ModuleType) and item.__name__.startswith("lib."):
                yield from ((n, getattr(item, n)) for n in code.co_names if hasattr(item, n))
            elif item is not None and not name.startswith("__"):
                yield name, item


def _compiled(item: Any) -> str:
    """Instead of the source: instructions, constants and names of a function, or of a class's methods and values."""
    parts = list(vars(item).values()) if isinstance(item, type) else [item]
    plain = [p for p in parts if isinstance(p, bool | int | float | tuple)]
    parts = [getattr(p, "fget", getattr(p, "__func__", p)) for p in parts]
    codes, said = [p.__code__ for p in parts if hasattr(p, "__code__")], []
    while codes:
        code = codes.pop()
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
        constants = [repr(c) for c in code.co_consts if not isinstance(c, types.CodeType)]
        said.append((code.co_code.hex(), constants, code.co_names))
    return repr((plain, said))


@cache
def _normal_source(item: Any) -> str:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(item))))
    except (OSError, TypeError, SyntaxError):  # made at run time, a lambda in an expression, a class in a notebook
        return _compiled(item)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.ClassDef):
            body[:] = [n for n in body if getattr(n, "name", None) not in COUNTED]
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body.pop(0)
    return ast.dump(tree)
