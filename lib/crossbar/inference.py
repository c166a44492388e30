"""A whole network with its layers in arrays: quantized inputs, bit by bit through cells and converters."""

from collections.abc import Mapping as Dict

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lib.constraint import plain
from lib.crossbar.converters import Converter, calibrated
from lib.crossbar.devices import Device
from lib.crossbar.mapping import CrossbarError
from lib.crossbar.product import CHUNK, Programmed
from lib.crossbar.tiling import Array
from lib.crossbar.wires import Wires
from lib.shapes import all_layers, prunable


class ArrayLayer(nn.Module):
    """A convolution or linear layer whose weights lie in arrays; its bias stays digital.

    Attributes:
        inputs: how activations become whole numbers: of ``input_bits``, signed if the layer meets negative ones.

    >>> from lib.crossbar import Array, ArrayLayer, Programmed
    >>> layer, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[255.0, 5.0]])
    >>> layer.weight.data = torch.tensor([[1.0, -1.0]])
    >>> in_array = ArrayLayer(layer, Programmed(layer.weight.detach(), Array()))
    >>> in_array.calibrate(x)
    >>> round(in_array(x).item(), 3)
    250.0
    """

    def __init__(self, layer: nn.Module, programmed: Programmed) -> None:
        super().__init__()
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            raise CrossbarError(f"padding_mode = {layer.padding_mode!r}: arrays take layers that are padded with zeros")
        self.layer, self.programmed = layer, programmed
        self.inputs: Converter | None = None

    def calibrate(self, x: Tensor) -> None:
        """Choose the range of inputs, then that of converters, by least squared error over the inputs ``x``."""
        self.inputs = calibrated(x, self.programmed.array.input_bits, signed=bool((x < 0).any()))
        self.programmed.calibrate(self.whole(x), self.inputs.low < 0, self.vectors)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, by way of whole numbers."""
        if self.inputs is None:
            raise CrossbarError("a layer in arrays does not know the range of its inputs: calibrate it")
        whole, signed = self.whole(x), self.inputs.low < 0
        numbers = max(self.programmed.conversions, self.layer.weight[0].numel()) * self.programmed.array.steps
        images = max(1, CHUNK // (self._windows(x) * numbers))
        y = torch.cat([self._shaped(self.programmed(p, signed, self.vectors), p) for p in whole.split(images)])
        y = (y * (self.inputs.step * self.programmed.scale)).to(x.dtype)
        if self.layer.bias is None:
            return y
        return y + (self.layer.bias[:, None, None] if isinstance(self.layer, nn.Conv2d) else self.layer.bias)

    def whole(self, x: Tensor) -> Tensor:
        """Activations as whole numbers."""
        low, step = self.inputs.low, self.inputs.step
        return ((x - low) / step).round().clamp(0, self.inputs.codes) + round(low / step)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        """Output positions of a convolution, high and wide."""
        conv, (left, right, top, bottom) = self.layer, self.layer._reversed_padding_repeated_twice
        sides = x.shape[2] + top + bottom, x.shape[3] + left + right
        spans = (d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        return tuple((n - span) // s + 1 for n, span, s in zip(sides, spans, conv.stride, strict=True))

    def _windows(self, x: Tensor) -> int:
        """Vectors of one image."""
        if isinstance(self.layer, nn.Linear):
            return max(1, x[0].numel() // x.shape[-1])
        high, wide = self._grid(x)
        return high * wide

    def vectors(self, digits: Tensor) -> Tensor:
        """``(N, C, H, W, T)`` or ``(N, ..., inputs, T)`` as the vectors that meet the matrix, ``(G * rows, M, T)``."""
        if isinstance(self.layer, nn.Linear):
            return digits.flatten(0, -3).transpose(0, 1)
        conv, (left, right, top, bottom) = self.layer, self.layer._reversed_padding_repeated_twice
        grid = self._grid(digits)
        digits = pad(digits, (0, 0, left, right, top, bottom)).contiguous()
        (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
        n, c, h, w, _ = digits.stride()
        strides = (c, dh * h, dw * w, n, sh * h, sw * w, 1)
        windows = digits.as_strided((digits.shape[1], kh, kw, len(digits), *grid, digits.shape[-1]), strides)
        return windows.reshape(-1, len(digits) * grid[0] * grid[1], digits.shape[-1])

    def _shaped(self, y: Tensor, x: Tensor) -> Tensor:
        """``(F, M)`` as the layer's output for ``x``."""
        if isinstance(self.layer, nn.Linear):
            return y.T.reshape(*x.shape[:-1], len(y))
        return y.view(len(y), len(x), *self._grid(x)).transpose(0, 1)


def on_arrays(
    model: nn.Module,
    array: Array | Dict[str, Array],
    images: Tensor,
    *,
    devices: Device | tuple[Device, ...] = (),
    chip: int = 0,
    wires: Wires | None = None,
) -> nn.Module:
    """A copy of the model, in evaluation mode, whose layers run bit by bit in arrays: for `lib.training.evaluate`.

    Layer by layer in the order in which they run, the ranges of inputs and converters are chosen on what ``images``
    give in the copy as it then is. Batch norm, biases and activations stay digital.

    Args:
        array: of all convolutions and linear layers, or by the name of those that lie in arrays.
        images: ``(N, C, H, W)`` of the training data; test images would flatter.
        devices: what happens to the cells of a chip (`lib.faults`), before the wires weaken them.

    Raises:
        CrossbarError: a layer that the model lacks, none at all, or what `Array` and `Wires` refuse.

    >>> from lib.crossbar import Array, on_arrays
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)), torch.tensor([[255.0, 100.0]])
    >>> model[0].weight.data = torch.tensor([[127.0, 1.4]])
    >>> round(model(x).item()), round(on_arrays(model, Array(), x)(x).item())  # 1.4 lies there as 1
    (32525, 32485)
    """
    copy = plain(model).eval()
    layers = prunable(copy)
    plan = array if isinstance(array, Dict) else dict.fromkeys(all_layers(copy, "one array for all"), array)
    if not plan or (unknown := set(plan) - set(layers)):
        named = f"layer {min(unknown)!r}" if plan else "no layer"
        raise CrossbarError(f"the plan of arrays names {named}; the model has {', '.join(layers) or 'none'}")
    for name, a in plan.items():
        wanted = ArrayLayer(layers[name], _programmed(layers[name], a, devices, chip, name, wires))
        copy.set_submodule(name, wanted)

        def first(layer, inputs):
            if layer.inputs is None:
                layer.calibrate(inputs[0])

        wanted.register_forward_pre_hook(first)
    with torch.no_grad():
        copy(images)
    return copy


def _programmed(layer, array, devices, chip, name, wires) -> Programmed:
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1

    def change(cells: Tensor) -> Tensor:
        for device in devices if isinstance(devices, tuple) else (devices,):
            cells = device.disturb(cells, array.mapping, chip, name)
        return wires.weaken(cells, array, groups) if wires else cells

    return Programmed(layer.weight.detach(), array, groups, change if devices or wires else None)
