"""Network purification: nearly empty channels go as a whole, and what they leave unused goes with them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lib.channels.paths import follow, zeroed
from lib.channels.spaces import groups_of, spaces_of, trace
from lib.constraint import Masks, plain
from lib.data import Split
from lib.shapes import prunable
from lib.training import Progress, TrainingError, evaluate


@torch.no_grad()
def purify(
    model: nn.Module,
    example: Tensor,
    split: Split,
    drop: float,
    emptiness: Sequence[float] = (0.75, 0.5, 0.25),
    progress: Progress | None = None,
) -> Masks:
    """Masks without the input channels that column pruning has nearly emptied (P-RM, arXiv 1905.00136).

    An input channel of a layer has ``Kh*Kw`` columns (behind a flattened map ``H*W``). Its *emptiness* is the share of
    them without a weight, its *importance* the squared norm of those left. In each layer, channels that are at least
    so empty are removed, the least important first, and then all that is unused without them (`follow`). The
    thresholds are searched, as the paper tells none: of the given emptinesses, and by bisection of all importances,
    those that leave the fewest weights while the score on ``split`` falls by at most ``drop`` hundredths (points of
    accuracy) in all. No training.

    Args:
        model: pruned by filters and columns, or in any other way; it is not changed.
        example: images ``(N, C, H, W)`` of the network's size; one is enough.
        split: the validation images.

    Returns:
        Masks for `attach_masks`, of all layers that lost weights and of what follows.

    Raises:
        ConstraintError: as `follow`. TrainingError: a negative drop, or an emptiness outside [0, 1].

    >>> from torch import nn
    >>> from lib import data, recipes
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2), nn.Flatten())
    >>> net[2].weight.data[:, 0].flatten(1)[:, :3] = 0.0  # of a channel, one of four columns is left
    >>> images = data.Split(torch.ones(2, 1, 4, 4), torch.tensor([0, 1]))
    >>> recipes.purify(net, images.x, images, drop=100, emptiness=[0.75])["2"].flatten(2).any(2).tolist()
    [[False, True, True, True], [False, True, True, True]]
    """
    if not drop >= 0 or not emptiness or min(emptiness) < 0 or max(emptiness) > 1:
        raise TrainingError(f"purify: {drop=}, {emptiness=}: allowed are drop >= 0 and shares in [0, 1]")
    bare = plain(model)
    best = follow(bare, {name: layer.weight != 0 for name, layer in prunable(bare).items()}, example)
    floor = evaluate(zeroed(bare, best), split) - drop / 100
    readers = [*_input_channels(bare, example)]
    for done, (layer, channel) in enumerate(readers):
        if progress:
            progress(done / len(readers), f"{layer}: {_weights(best)} weights left")
        start = best
        empty, importance = _scores(prunable(zeroed(bare, start))[layer].weight, channel)
        by_importance = importance.argsort()
        for least in emptiness:
            order = by_importance[(empty >= least)[by_importance] & (importance > 0)[by_importance]]
            low, high = 0, len(order)
            while low < high:  # the more channels go, the lower the accuracy, nearly
                middle = (low + high + 1) // 2
                kept = start[layer] & ~_columns(order[:middle], channel, start[layer])
                masks = follow(bare, start | {layer: kept}, example)
                if evaluate(zeroed(bare, masks), split) < floor:
                    high = middle - 1
                else:
                    low, best = middle, min(best, masks, key=_weights)
    if progress:
        progress(1.0, f"{_weights(best)} weights left")
    return best


def _weights(masks: Masks) -> int:
    return sum(int(m.sum()) for m in masks.values())


def _input_channels(model: nn.Module, example: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Layers that read channels of others, and for each of their inputs which channel it is, ``(inputs,)``."""
    layers = prunable(model)
    for space in spaces_of(trace(model, example), example.device):
        for end in space.readers:
            if groups_of(layers[end.name]) == 1 and not space.frozen:
                channel = torch.full((layers[end.name].weight.shape[1],), -1, device=example.device)
                channel[end.index] = end.channel
                yield end.name, channel


def _scores(weight: Tensor, channel: Tensor) -> tuple[Tensor, Tensor]:
    """Emptiness and importance of every channel that a layer reads, ``(channels,)``; inputs at -1 are not its."""
    energy = weight.square().sum(0).reshape(weight.shape[1], -1)  # (inputs, Kh*Kw)
    own, channels = channel >= 0, int(channel.max()) + 1

    def by_channel(values: Tensor) -> Tensor:
        return energy.new_zeros(channels).index_add_(0, channel[own], values[own].to(energy))

    columns = by_channel(torch.full_like(energy, 1.0).sum(1))
    return by_channel((energy == 0).sum(1)) / columns.clamp(min=1), by_channel(energy.sum(1))


def _columns(gone: Tensor, channel: Tensor, mask: Tensor) -> Tensor:
    """Where a layer's mask meets the channels that go, of the mask's shape."""
    inputs = torch.isin(channel, gone)
    return inputs.view(1, -1, *[1] * (mask.dim() - 2)).expand_as(mask)
