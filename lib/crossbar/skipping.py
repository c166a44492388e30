"""Zeros ahead of inputs: how many steps they take when what is zero for all rows of a fragment is skipped (FORMS)."""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from lib.crossbar.inference import ArrayLayer
from lib.crossbar.mapping import CrossbarError


def bit_length(x: Tensor) -> Tensor:
    """Bits of whole numbers from 0: that of the highest one; 0 for 0.

    >>> from lib.crossbar.skipping import bit_length
    >>> bit_length(torch.tensor([0, 1, 2, 3, 4, 255])).tolist()
    [0, 1, 2, 2, 3, 8]
    """
    return torch.frexp(x.double()).exponent


def input_cycles(x: Tensor, fragment: int, input_bits: int, dac_bits: int = 1) -> Tensor:
    """Steps of each fragment and vector, ``(fragments, M)``, for whole numbers on the rows, ``(rows, M)``.

    A fragment takes as many steps as its largest input has bits. A negative number is two's complement and has ones
    ahead: its fragment takes all steps.

    >>> from lib.crossbar import input_cycles
    >>> input_cycles(torch.tensor([[1], [5], [0], [1]]), fragment=2, input_bits=8).tolist()  # 5 has 3 bits
    [[3], [1]]
    """
    rows = len(x)
    x = torch.nn.functional.pad(x, (0, 0, 0, -rows % fragment)).unflatten(0, (-1, fragment))
    bits = torch.where((x < 0).any(1), input_bits, bit_length(x.clamp(min=0)).amax(1))
    return -(-bits // dac_bits)


def effective_cycles(model: nn.Module, images: Tensor, fragments: Sequence[int]) -> pd.DataFrame:
    """Mean input cycles of every layer of a network of `on_arrays`, measured on what ``images`` give there.

    Returns:
        A row per layer and size of fragment: ``layer``, ``fragment``, ``cycles``, and ``steps`` without skipping.

    Raises:
        CrossbarError: no layer lies in arrays, or a fragment below one row.

    >>> from lib.crossbar import Array, effective_cycles, on_arrays
    >>> x = torch.tensor([[255.0, 5.0, 1.0, 1.0]])
    >>> model = on_arrays(torch.nn.Sequential(torch.nn.Linear(4, 1)), Array(), x)
    >>> effective_cycles(model, x, [1, 2, 4])["cycles"].tolist()  # (8 + 3 + 1 + 1) / 4, (8 + 1) / 2, 8
    [3.25, 4.5, 8.0]
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ArrayLayer)}
    if not layers or min(fragments, default=0) < 1:
        raise CrossbarError(
            f"fragments = {list(fragments)} of a model with {len(layers)} layers in arrays: both need one"
        )
    rows = []

    def met(name: str):
        def hook(layer, args):
            array, x = layer.programmed.array, layer.whole(args[0])
            vectors = layer.vectors(x[..., None])[..., 0]
            for f in fragments:
                groups = vectors.chunk(layer.programmed.groups)
                found = torch.cat([input_cycles(g, f, array.input_bits, array.dac_bits) for g in groups])
                rows.append((name, f, float(found.double().mean()), array.steps))

        return hook

    handles = [layer.register_forward_pre_hook(met(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return pd.DataFrame(rows, columns=["layer", "fragment", "cycles", "steps"])
