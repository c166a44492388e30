"""Zeros ahead of inputs: how many steps they take when what is zero for all rows of a fragment is skipped (FORMS)."""

from collections import defaultdict
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from lib.crossbar.inference import ArrayLayer, in_arrays
from lib.crossbar.mapping import CrossbarError


def input_cycles(x: Tensor, fragment: int, input_bits: int, dac_bits: int = 1) -> Tensor:
    """Steps of each fragment and vector, ``(fragments, M)``, for whole numbers on the rows, ``(rows, M)``.

    A fragment takes as many steps as its largest input has bits. A negative number is two's complement and has ones
    ahead: its fragment takes all steps.
    """
    rows = len(x)
    x = torch.nn.functional.pad(x, (0, 0, 0, -rows % fragment)).unflatten(0, (-1, fragment))
    bits = torch.where((x < 0).any(1), input_bits, torch.frexp(x.clamp(min=0).double()).exponent.amax(1))
    return -(-bits // dac_bits)


def effective_cycles(model: nn.Module, images: Tensor, fragments: Sequence[int]) -> pd.DataFrame:
    """Mean input cycles of every layer of a network of `on_arrays`, measured on what ``images`` give there.

    Returns:
        A row per layer and size of fragment: ``layer``, ``fragment``, ``cycles`` of all uses together, and ``steps``
        without skipping.

    Raises:
        CrossbarError: no layer lies in arrays, or a fragment below one row.

    >>> from lib.crossbar import Array, effective_cycles, on_arrays
    >>> x = torch.tensor([[255.0, 5.0, 1.0, 1.0]])
    >>> model = on_arrays(torch.nn.Sequential(torch.nn.Linear(4, 1)), Array(), x)
    >>> effective_cycles(model, x, [1, 2, 4])["cycles"].tolist()  # (8 + 3 + 1 + 1) / 4, (8 + 1) / 2, 8
    [3.25, 4.5, 8.0]
    """
    layers = in_arrays(model)
    if not layers or min(fragments, default=0) < 1:
        raise CrossbarError(
            f"fragments = {list(fragments)} of a model with {len(layers)} layers in arrays: both need one"
        )
    sums: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])

    def met(name: str, user: ArrayLayer):
        def hook(_, args):
            array, groups = user.programmed.array, user.programmed.groups
            vectors = user.vectors(user.whole(args[0]))
            for f in fragments:
                for part in vectors.chunk(groups):
                    found = input_cycles(part, f, array.input_bits, array.dac_bits)
                    sums[name, f][0] += int(found.sum())
                    sums[name, f][1] += found.numel()

        return hook

    users = [(name, user) for name, shared in layers.items() for user in shared]
    handles = [user.layer.register_forward_pre_hook(met(name, user)) for name, user in users]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    rows = [(n, f, total / of, layers[n][0].programmed.array.steps) for (n, f), (total, of) in sums.items()]
    return pd.DataFrame(rows, columns=["layer", "fragment", "cycles", "steps"])
