"""Inputs of layers at few bits, in evaluation and in training."""

import torch
from torch import Tensor, nn

from lib.constraint import check_count
from lib.constraint.views import wide
from lib.shapes import all_layers, in_mode, uses


class InputQuantizer(nn.Module):
    """Rounds a layer's input to ``2^bits`` equal steps from ``low`` to ``high``; the gradient goes straight through.

    Inputs outside are clipped, and get no gradient. Zero is always one of the values.
    """

    def __init__(self, bits: int, low: float, high: float) -> None:
        super().__init__()
        self.bits = bits
        scale = (high - low) / (2**bits - 1) or 1.0
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero", torch.tensor(round(-low / scale), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """``x``, rounded."""
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, 0, 2**self.bits - 1)

    def extra_repr(self) -> str:
        """Shown with the network."""
        return f"{self.bits} bits"


@torch.no_grad()
def quantize_activations(model: nn.Module, bits: int, images: Tensor) -> nn.Module:
    """Round the inputs of all layers to ``bits`` from now on, in place. Returns the model.

    Each layer's range is from 0 where no input is negative, as after ReLU, and from the low end otherwise. It covers
    what the layer meets in all of its uses on ``images``, with both ends drawn in by the one share, of 46 from 0.1 to
    1, that has the least squared error. A share for each end would find less where inputs have two signs: at 4 bits 0.6
    of it for Fashion-MNIST's pixels, which the first layer meets. A layer that is never met keeps its inputs. Called
    again, the ranges are chosen anew; the network's own weights and their names stay, two buffers a layer are added.

    Raises:
        ConstraintError: fewer than 1 bit or more than 16.

    >>> from lib.quantization import quantize_activations
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    >>> model[0].weight.data.fill_(10).item()
    10.0
    >>> model = quantize_activations(model, bits=2, images=torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    >>> round(model(torch.tensor([[1.4]])).item(), 3)
    10.0
    """
    check_count(1, 16, bits=bits)
    layers = all_layers(model, "inputs at few bits", skip=True)
    full_precision_activations(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, n=name: seen[n].append(args[0].flatten()))
        for name, modules in uses(model).items()
        for layer in modules
    ]
    try:
        with in_mode(model, training=False):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    for name, modules in uses(model).items():
        for layer in modules if seen[name] else ():
            layer.add_module("quantize_input", _calibrated(bits, torch.cat(seen[name])))
            layer.register_forward_pre_hook(_quantized)
    return model


def full_precision_activations(model: nn.Module) -> nn.Module:
    """Take the rounding of inputs away again, in place. Returns the model.

    >>> from lib.quantization import full_precision_activations, quantize_activations
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    >>> model[0].weight.data.fill_(10).item()
    10.0
    >>> model = quantize_activations(model, bits=2, images=torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    >>> round(full_precision_activations(model)(torch.tensor([[1.4]])).item(), 3)
    14.0
    """
    for layer in (m for modules in uses(model).values() for m in modules):
        if hasattr(layer, "quantize_input"):
            del layer.quantize_input
            for key in [k for k, hook in layer._forward_pre_hooks.items() if hook is _quantized]:
                del layer._forward_pre_hooks[key]
    return model


def _quantized(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (layer.quantize_input(args[0]), *args[1:])


def _calibrated(bits: int, x: Tensor) -> InputQuantizer:
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    tried = [
        InputQuantizer(bits, share * low, share * high).to(x.device) for share in torch.linspace(0.1, 1, 46).tolist()
    ]
    return min(tried, key=lambda q: float((wide(q(x)) - wide(x)).square().sum()))  # halves end at 65,504
