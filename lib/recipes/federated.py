"""Federated averaging of networks that may be pruned, by clients that may leave, summed in the open or in shares."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lib.constraint import Plan, State, fitted, masks, plain, state_of
from lib.constraint.formats import index_width, which
from lib.data import Data, Split
from lib.models import copied
from lib.recipes.common import stage_seed
from lib.recipes.rewinding import one_shot, rewind
from lib.recipes.shares import FixedPoint, Server, in_shares
from lib.shapes import prunable
from lib.training import Progress, TrainingError, charge_all, evaluate, fit
from lib.training.spent import Meter, is_counting

Client = Callable[[nn.Module, int], Any]
"""Trains a network of its own in place, in a round; what it has as ``size`` is its weight in the mean, 1 without."""

STAGES = ("", "asked", "training", "sending", "sent")
"""Where a client may leave a round: nowhere; before the network reaches it; before anything is sent; when the first of
two servers has its share (in the open: in the middle of the message); after everything was sent, when it counts."""


LEAST_UNITS = 2**7
"""Of the last fraction bit, in the sum of sizes in shares: with fewer the mean is off by more than half a percent."""


@dataclass(frozen=True)
class Local:
    """A client that trains on data of its own by `fit`, with a new order of batches in every round.

    Raises:
        TrainingError: it has no data.
    """

    data: Data
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if not len(self.data.train):
            raise TrainingError(f"the client with seed {self.seed} has no data: leave it out")

    @property
    def size(self) -> int:
        """Its examples."""
        return len(self.data.train)

    def __call__(self, model: nn.Module, round: int) -> None:
        """Train the network in place."""
        fit(model, self.data, seed=stage_seed(self.seed, round), **self.options)


def local_clients(data: Data, parts: Sequence[Tensor], seed: int = 0, **fit_options: Any) -> list[Local]:
    """A client for each part of the training examples; none sees another's.

    >>> from lib import data
    >>> from lib.recipes import dirichlet_split, local_clients
    >>> images = data.load(train_size=300, test_size=100, validation_size=100)
    >>> parts = dirichlet_split(images.train.y, 3, alpha=1.0)
    >>> sum(client.size for client in local_clients(images, parts, epochs=1, lr=0.05))
    300
    """
    nothing = replace(data.test, x=data.test.x[:0], y=data.test.y[:0])  # it travels to processes, and nobody asks it
    return [
        Local(
            replace(data, train=replace(data.train, x=data.train.x[part], y=data.train.y[part]), test=nothing),
            fit_options,
            1000 * seed + i,
        )
        for i, part in enumerate(parts)
    ]


def dirichlet_split(labels: Tensor, clients: int, alpha: float, seed: int = 0, least: int = 1) -> list[Tensor]:
    """Examples ``(N,)`` int64 of every client: each class is shared out by a draw from Dirichlet(alpha).

    A small ``alpha`` gives each client few classes; infinity is an even split at random (Hsu et al., arXiv 1909.06335).
    Draws are repeated until every client has ``least`` examples.

    Raises:
        TrainingError: a wrong number, labels that are not ``(N,)``, or no such draw in a thousand.

    >>> from lib.recipes import dirichlet_split
    >>> labels = torch.arange(100) % 2
    >>> parts = dirichlet_split(labels, 4, alpha=0.5)
    >>> sorted(torch.cat(parts).tolist()) == list(range(100))
    True
    >>> [len(part) for part in dirichlet_split(labels, 4, alpha=float("inf"))]
    [25, 25, 25, 25]
    """
    if not 1 <= clients * least <= len(labels) or not alpha > 0:
        raise TrainingError(f"{clients=}, {alpha=}, {least=}: allowed are alpha > 0 and {len(labels)} examples in all")
    if labels.ndim != 1:
        raise TrainingError(f"dirichlet_split: labels {tuple(labels.shape)}: allowed is one for each example, (N,)")
    random = np.random.default_rng(seed)
    if np.isinf(alpha):
        return [torch.from_numpy(part) for part in np.array_split(random.permutation(len(labels)), clients)]
    y = labels.cpu().numpy()
    for _ in range(1000):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(y):
            own = random.permutation(np.flatnonzero(y == label))
            cuts = np.round(np.cumsum(random.dirichlet([alpha] * clients))[:-1] * len(own)).astype(int)
            for part, piece in zip(parts, np.split(own, cuts), strict=True):
                part.append(piece)
        found = [torch.from_numpy(np.concatenate(part)) for part in parts]
        if min(map(len, found)) >= least:
            return found
    raise TrainingError(f"{clients=}, {alpha=}: no draw of 1000 leaves {least} examples to each; a larger alpha does")


def group_split(groups: Sequence[Any]) -> list[Tensor]:
    """Examples of every client, where each has a group of its own, such as a writer or a speaker, in their order.

    >>> from lib.recipes import group_split
    >>> [part.tolist() for part in group_split(["ada", "bob", "ada"])]
    [[0, 2], [1]]
    """
    members: dict[Any, list[int]] = {}
    for i, group in enumerate(groups.tolist() if hasattr(groups, "tolist") else groups):
        members.setdefault(group, []).append(i)
    return [torch.tensor(members[group]) for group in sorted(members)]


def dropouts(rate: float, seed: int = 0) -> Callable[[int, int], str]:
    """Clients that leave a round with probability ``rate``, at any of the four points alike (see `fed_avg`).

    Who leaves after having sent still counts, so that a quarter of these are no loss.

    >>> from lib.recipes import dropouts
    >>> leaves = dropouts(0.4)
    >>> gone = [leaves(0, client) for client in range(1000)]
    >>> 0.35 < sum(stage != "" for stage in gone) / 1000 < 0.45, sorted({*gone})
    (True, ['', 'asked', 'sending', 'sent', 'training'])
    """
    if not 0 <= rate <= 1:
        raise TrainingError(f"dropouts: {rate=}: allowed are numbers in [0, 1]")

    def leaves(round: int, client: int) -> str:
        random = np.random.default_rng([seed, round, client, 1])  # NumPy takes [seed, round, 0] for [seed, round]
        return str(random.choice(STAGES[1:])) if random.random() < rate else ""

    return leaves


def fed_avg(
    model: nn.Module,
    clients: Sequence[Client],
    *,
    rounds: int,
    asked: int | None = None,
    leaves: Callable[[int, int], str] | None = None,
    plans: Mapping[int, Plan] | None = None,
    keep: float = 1.0,
    fraction_bits: int | None = None,
    judge: Split | None = None,
    processes: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Federated averaging (McMahan et al., AISTATS 2017), in place: clients train, the server adds their mean change.

    Args:
        asked: clients of a round, drawn anew; None: all.
        leaves: ``(round, client)`` -> one of `STAGES`, where the client leaves that round; None: nobody does.
        plans: ``{round: plan}``, where rounds count from 0, as for ``leaves`` and clients: before that round the
            server prunes the mean network to the plan. Its masks hold at clients too, so that both directions carry
            kept values only; the download says which these are.
        keep: the share of an upload's values, the largest, that a client picks by itself and sends with their indices.
            What is left out is lost: clients remember nothing.
        fraction_bits: of a sum in two servers' shares (`FixedPoint`), in the setting of SEFL (EMNLP 2021); None: in
            the open. Every client sends each server a share of its weighted change and of its size. The servers tell
            each other whose share they have, and one sends its sum over the clients that both have to the other.
        judge: asked for its score after every round.
        processes: clients at the same time; the result does not depend on it. A client that raises an error, or gives
            back a NaN or an infinity, is one that left in training, and so is one whose process dies (which with 1 is
            this process).

    Returns:
        One row per round, from 1: ``asked``, ``survivors``, ``failed`` (with ``reason``), ``down_bytes``,
        ``up_bytes``, ``between_bytes`` of the servers, ``seconds`` of training and ``score``. Values take 32 bits,
        a size too; a message that was broken off is counted as a whole one. All numbers of the state travel, each once:
        also parameters that are frozen, and the statistics of norms.

    Raises:
        TrainingError: no client, no survivor in a round, a plan for a round that there is not, a client that gives back
            another network, survivors whose sizes sum to nothing or to little beside the largest size for so few
            fraction bits, or a change that the fixed point does not hold: then nothing of that round has been sent. In
            shares also ``keep`` below 1, as shares of zeros are as long as others, and a single survivor with a size
            above 0, whose change the sum would be. Such a round moves nothing.

    >>> from lib import data, models, recipes
    >>> images = data.load(train_size=300, test_size=100, validation_size=100)
    >>> parts = recipes.dirichlet_split(images.train.y, 3, alpha=1.0)
    >>> clients = recipes.local_clients(images, parts, epochs=1, lr=0.05)
    >>> model = models.build("lenet300", images.shape, images.classes)
    >>> log = recipes.fed_avg(model, clients, rounds=2, fraction_bits=16, judge=images.validation)
    >>> log[["round", "survivors", "up_bytes"]].astype(int).values.tolist()  # 266,610 values and a size, twice
    [[1, 3, 6398664], [2, 3, 6398664]]
    """
    asked = len(clients) if asked is None else asked
    if not 1 <= asked <= len(clients) or not 0 < keep <= 1 or rounds < 1:
        raise TrainingError(f"{len(clients)} clients, {asked=}, {keep=}, {rounds=}: allowed are 1 <= asked <= clients, "
                            "0 < keep <= 1 and rounds from 1")  # fmt: skip
    if keep < 1 and fraction_bits is not None:
        raise TrainingError(f"{keep=} in shares: what is left out is as long as what is sent; allowed is 1, or plans")
    if late := sorted(set(plans or {}) - set(range(rounds))):
        raise TrainingError(f"plans for rounds {late}: allowed are 0 to {rounds - 1}; the log counts from 1")
    sizes = [getattr(client, "size", 1) for client in clients]
    rows = []
    for r in range(rounds):
        random = np.random.default_rng([seed, r])
        if r in (plans or {}):
            bare = plain(model)
            others = {name: mask for name, mask in masks(model).items() if name not in plans[r]}
            rewind(model, bare.state_dict(), others | one_shot(bare, fitted(bare, plans[r])))
        chosen = sorted(random.choice(len(clients), asked, replace=False).tolist())
        stage = {c: leaves(r, c) if leaves else "" for c in chosen}
        if odd := [c for c in chosen if stage[c] not in STAGES]:
            raise TrainingError(f"client {odd[0]} leaves at {stage[odd[0]]!r}: allowed are {', '.join(STAGES[1:])}")
        start, values = state_of(model), _places(model)
        begun = perf_counter()
        busy = [c for c in chosen if stage[c] not in ("asked", "training")]
        trained = dict(zip(busy, _run(model, [clients[c] for c in busy], r, processes), strict=True))
        row = {"round": r + 1, "asked": asked, "seconds": perf_counter() - begun}
        failed = {c: reason for c, reason in trained.items() if isinstance(reason, str)}
        changes = {c: _change(state, start, values, keep, c) for c, state in trained.items() if c not in failed}
        complete = [c for c in changes if stage[c] != "sending"]
        if not complete:
            told = f"; client {min(failed)} failed: {failed[min(failed)]}" if failed else ""
            raise TrainingError(f"round {r + 1}: none of {asked} clients survived{told}")
        counted = [c for c in complete if sizes[c]]
        if fraction_bits is not None and len(counted) == 1:
            alone = f"client {counted[0]} alone survived, and a sum in shares would be its own change"
            raise TrainingError(f"round {r + 1}: {alone}; servers exchange sums of at least two")
        whole, between = _mean(changes, complete, sizes, values, fraction_bits, asked, random), 0
        count = sum(int(place.sum()) for place in values.values())
        sent = round(keep * count) * (32 + (index_width(count) if keep < 1 else 0)) / 8
        ways = 1 if fraction_bits is None else 2
        if fraction_bits is not None:
            between = 4 * (len(changes) + len(complete)) + 4 * (count + 1)
        row |= {"survivors": len(complete), "failed": len(failed), "reason": next(iter(failed.values()), "")}
        row["down_bytes"] = _download(values) * sum(stage[c] != "asked" for c in chosen)
        row["up_bytes"] = (sent + 4) * (ways * len(complete) + len(changes) - len(complete))
        row["between_bytes"] = between
        rewind(model, _moved(start, whole, values), masks(model))
        row["score"] = evaluate(model, judge) if judge is not None else float("nan")
        rows.append(row)
        if progress:
            progress((r + 1) / rounds, f"round {r + 1} of {rounds}, {len(complete)} of {asked} clients")
    return pd.DataFrame(rows)


def _places(model: nn.Module) -> dict[str, Tensor]:
    """Of every tensor of numbers in the state, once under its first name: which of them are kept, and travel."""
    layers, held, bare = prunable(model), masks(model), plain(model)
    held = {f"{name}.weight".lstrip(".") if name in layers else name: mask for name, mask in held.items()}
    first = {name for name, _ in (*bare.named_parameters(), *bare.named_buffers())}
    floating = {key: v for key, v in bare.state_dict().items() if key in first and v.is_floating_point()}
    return {key: held.get(key, torch.ones_like(value, dtype=torch.bool)) for key, value in floating.items()}


def _download(places: Mapping[str, Tensor]) -> float:
    """Bytes: the values that are kept, and for each tensor which they are."""
    return sum(32 * int(place.sum()) + which(place) for place in places.values()) / 8


def _change(state: State, start: State, places: Mapping[str, Tensor], keep: float, client: int) -> State:
    """What a client sends: its change at the places that travel, the rest at zero."""
    for key in places:
        if key not in state or state[key].shape != start[key].shape:
            came = tuple(state[key].shape) if key in state else "missing"
            raise TrainingError(f"client {client}: {key} is {came}, and {tuple(start[key].shape)} at the server")
    change = {key: torch.where(place, state[key] - start[key], 0.0) for key, place in places.items()}
    if keep == 1:
        return change
    flat = torch.cat([change[key][place] for key, place in places.items()])
    kept = torch.zeros_like(flat)
    top = flat.abs().topk(round(keep * len(flat))).indices
    kept[top] = flat[top]
    pieces = kept.split([int(place.sum()) for place in places.values()])
    for (key, place), piece in zip(places.items(), pieces, strict=True):
        change[key][place] = piece
    return change


def _mean(
    changes: Mapping[int, State],
    complete: Sequence[int],
    sizes: Sequence[float],
    places: Mapping[str, Tensor],
    fraction_bits: int | None,
    asked: int,
    random: np.random.Generator,
) -> Tensor:
    """The mean change of the clients that are complete, weighted by size; flat float64, in the order of the places.

    In shares, weights are sizes over the largest size of all clients, which is taken to be public.
    """
    if not sum(sizes[c] for c in complete) > 0:
        raise TrainingError(f"the sizes of clients {[*complete]} sum to 0: a mean needs a weight above 0")
    if fraction_bits is None:
        weight = np.array([sizes[c] for c in complete], float) / sum(sizes[c] for c in complete)
        flat = [torch.cat([changes[c][key][place] for key, place in places.items()]).double() for c in complete]
        return sum(w * each for w, each in zip(weight, flat, strict=True))
    point, most = FixedPoint(asked, fraction_bits), max(sizes)  # who will leave, no client knows
    words = {}
    for c, change in changes.items():  # all that is to be sent is encoded before any of it is
        share = sizes[c] / most
        parts = [point.encode(f"client {c}: {key}", change[key][place] * share) for key, place in places.items()]
        words[c] = np.concatenate([*parts, point.encode(f"client {c}: its size", torch.tensor(share))])
    first, second = Server(), Server()
    for c, own in words.items():
        one, other = in_shares(own, random)
        first.receive(c, one)
        if c in complete:
            second.receive(c, other)
    both = [c for c in first.received if c in second.received]
    total = point.decode(first.total(both) + second.total(both))
    if float(total[-1]) * 2**fraction_bits < LEAST_UNITS:
        raise TrainingError(
            f"the sizes of clients {both} sum to {float(total[-1]):.3g} of the largest, which {fraction_bits} fraction "
            "bits round too much; more fraction bits, or more clients"
        )
    return total[:-1] / total[-1]


def _moved(start: State, change: Tensor, places: Mapping[str, Tensor]) -> State:
    """The server's state after a mean change."""
    pieces = change.split([int(place.sum()) for place in places.values()])
    moved = deepcopy(start)  # in which a tensor is still one under all of its names
    for (key, place), piece in zip(places.items(), pieces, strict=True):
        moved[key][place] += piece.to(moved[key])
    return moved


def _run(model: nn.Module, clients: Sequence[Client], round: int, processes: int) -> list[State | str]:
    """What each client makes of the network, or why it failed.

    Where a process dies, nobody knows whose work it took along: then all train again, each alone, and who dies there
    has failed.
    """
    jobs = [joblib.delayed(_counted)(is_counting(), model, client, round) for client in clients]
    try:
        done = joblib.Parallel(processes)(jobs)
    except BrokenProcessPool:
        done = [_alone(job) for job in jobs]
    for _, spent in done:
        if spent is not None:
            charge_all(spent)
    return [state for state, _ in done]


def _alone(job: tuple) -> tuple[State | str, pd.DataFrame | None]:
    try:
        return joblib.Parallel(2)([job])[0]  # one process would be this one
    except BrokenProcessPool as error:
        return f"its process died: {error}".splitlines()[0], None


def _counted(counts: bool, model: nn.Module, *job: Any) -> tuple[State | str, pd.DataFrame | None]:
    """What a client makes of a network of its own, and what that computed, where no meter of this process sees it."""
    own = copied(model)
    if not counts or is_counting():
        return _trained(own, *job), None
    with Meter(own) as meter:
        return _trained(own, *job), meter.frame()


def _trained(own: nn.Module, client: Client, round: int) -> State | str:
    try:
        client(own, round)
    except Exception as error:  # whatever breaks a client, the others go on
        return f"{type(error).__name__}: {error}"
    state = state_of(own)
    if strange := [key for key, value in state.items() if not value.isfinite().all()]:
        return f"it gave back numbers that are not finite: {strange[0]}"
    return state
