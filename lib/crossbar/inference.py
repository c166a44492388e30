"""A whole network with its layers in arrays: quantized inputs, bit by bit through cells and converters."""

from collections import Counter
from collections.abc import Mapping as Dict
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lib.constraint import plain
from lib.crossbar.converters import Converter, calibrated
from lib.crossbar.devices import Devices, disturbed, each
from lib.crossbar.mapping import CrossbarError
from lib.crossbar.product import CHUNK, Programmed
from lib.crossbar.tiling import Array
from lib.crossbar.wires import Wires
from lib.shapes import all_layers, own_forward, refuse_overridden, uses


class ArrayLayer:
    """What a layer whose weights lie in arrays computes in place of its own ``forward``; its bias stays digital.

    Attributes:
        inputs: how activations become whole numbers: of ``input_bits``, signed if the layer meets negative ones.
    """

    def __init__(self, layer: nn.Module, programmed: Programmed) -> None:
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            raise CrossbarError(f"padding_mode = {layer.padding_mode!r}: arrays take layers that are padded with zeros")
        self.layer, self.programmed = layer, programmed
        self.linear, self.sequence = isinstance(layer, nn.Linear), isinstance(layer, nn.Conv1d)
        self.inputs: Converter | None = None
        if not self.linear:  # a convolution over a sequence is one over images that are one pixel high
            flat = (1,) * self.sequence
            self.kernel, self.stride, self.dilation = (
                flat + layer.kernel_size,
                flat + layer.stride,
                flat + layer.dilation,
            )
            self.padding = (*layer._reversed_padding_repeated_twice, 0, 0)[:4]  # left, right, top, bottom

    def calibrate(self, *x: Tensor) -> None:
        """Choose the range of inputs, then that of converters, by least squared error over the inputs of all uses."""
        values = torch.cat([_exact(part).flatten() for part in x])
        self.inputs = calibrated(values, self.programmed.array.input_bits, signed=bool((values < 0).any()))
        self.programmed.calibrate(*(self.vectors(self.whole(part)) for part in x), signed=self.inputs.low < 0)

    def digital(self, x: Tensor) -> Tensor:
        """The layer's output without arrays."""
        return type(self.layer).forward(self.layer, x)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output, by way of whole numbers, which no gradient passes."""
        whole, signed, programmed = self.whole(x), self.inputs.low < 0, self.programmed
        few = max(1, CHUNK // (self._windows(whole) * self.layer.weight[0].numel()))  # images at a time
        if programmed.folds:
            y = self._product(whole.to(programmed.folded.dtype), programmed.folded, programmed.groups)
            for some in (part for part in self._saturated(whole).split(few) if len(part)):
                y = y.double()
                y[some] -= self._shaped(programmed.lost(self.vectors(whole[some]), signed), whole[some])
        else:
            parts = whole.split(few)
            y = torch.cat([self._shaped(programmed(self.vectors(part), signed), part) for part in parts])
        wide = torch.promote_types(x.dtype, torch.float32)  # sums of whole numbers are beyond what halves hold
        y, scale = _exact(y.to(wide)) if y.dtype != torch.float32 else y, self.inputs.step * programmed.scale
        if self.layer.bias is None:
            y = y * scale
        else:
            bias = self.layer.bias if self.linear else self.layer.bias[:, None, None]
            y = torch.add(bias, y, alpha=scale)
        y = y.to(x.dtype)
        return y.squeeze(2) if self.sequence else y

    def _saturated(self, whole: Tensor) -> Tensor:
        """The images with a column that may saturate, by number; all where looking costs more than the product."""
        if not 0 < self.programmed.risky.sum() <= len(self.layer.weight):
            return torch.arange(len(whole) * len(self.programmed.risky[:1]))
        weight, limits = self.programmed.reach
        weight = weight if self.linear else weight.unflatten(1, (-1, *self.layer.weight.shape[2:]))
        sums = self._product((whole != 0).float(), weight, 1)
        beyond = sums > (limits if self.linear else limits[:, None, None])
        return beyond.flatten(1).any(1).nonzero()[:, 0]

    def _product(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """The layer's product of whole numbers, with weights in place of its own."""
        if self.linear:
            return nn.functional.linear(x, weight)
        left, right, top, bottom = self.padding
        if (left, top) != (right, bottom):  # `same` with an even kernel
            x, top, left = pad(x, self.padding), 0, 0
        weight = weight.unsqueeze(2) if self.sequence else weight
        return nn.functional.conv2d(x, weight, None, self.stride, (top, left), self.dilation, groups)

    def whole(self, x: Tensor) -> Tensor:
        """Activations as whole numbers: ``(N, C, H, W)`` of a convolution, as they are of a linear layer."""
        if x.ndim < 2 if self.linear else x.ndim != 2 + len(self.layer.kernel_size):
            raise CrossbarError(f"inputs {tuple(x.shape)} of a layer in arrays: allowed are batches, (N, ...)")
        low, step = round(self.inputs.low / self.inputs.step), self.inputs.step
        x = _exact(x.double() if self.programmed.array.input_bits > 24 else x)  # float32 holds no more bits
        x = x.unsqueeze(2) if self.sequence else x
        return (x / step).round_().clamp_(low, low + self.inputs.codes)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        """Output positions of a convolution, high and wide."""
        left, right, top, bottom = self.padding
        sides = x.shape[2] + top + bottom, x.shape[3] + left + right
        spans = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))
        return tuple((n - span) // s + 1 for n, span, s in zip(sides, spans, self.stride, strict=True))

    def _windows(self, x: Tensor) -> int:
        """Vectors of one image."""
        if self.linear:
            return max(1, x[0].numel() // x.shape[-1])
        high, wide = self._grid(x)
        return high * wide

    def vectors(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` or ``(N, ..., inputs)`` as the vectors that meet the matrix, ``(G * rows, M)``."""
        if self.linear:
            return x.flatten(0, -2).transpose(0, 1)
        grid = self._grid(x)
        x = pad(x, self.padding).contiguous()
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        n, c, h, w = x.stride()
        windows = x.as_strided((x.shape[1], kh, kw, len(x), *grid), (c, dh * h, dw * w, n, sh * h, sw * w))
        return windows.reshape(x.shape[1] * kh * kw, len(x) * grid[0] * grid[1])

    def _shaped(self, y: Tensor, x: Tensor) -> Tensor:
        """``(F, M)`` as the layer's output for ``x``."""
        if self.linear:
            return y.T.reshape(*x.shape[:-1], len(y))
        return y.view(len(y), len(x), *self._grid(x)).transpose(0, 1)


def _exact(x: Tensor) -> Tensor:
    """Numbers in at least float32: bfloat16 has no whole numbers above 256."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def on_arrays(
    model: nn.Module,
    array: Array | Dict[str, Array],
    images: Tensor,
    *,
    devices: Devices = (),
    chip: int = 0,
    wires: Wires | None = None,
) -> nn.Module:
    """A copy of the model, in evaluation mode, whose layers run bit by bit in arrays: for `lib.training.evaluate`.

    Layer by layer in the order in which they run, the ranges of inputs and converters are chosen on what ``images``
    give in the copy as it then is; those of a layer that is used several times, over all uses: up to it the copy runs
    in arrays then, and from its first use on without. Batch norm, biases and activations stay digital.

    Args:
        array: of all convolutions and linear layers, or by the name of those that lie in arrays.
        images: ``(N, C, H, W)`` of the training data; test images would flatter.
        devices: what happens to the cells of a chip (`lib.faults`), before the wires weaken them.

    Raises:
        CrossbarError: no images, or one without a batch; a layer that the model lacks or ``images`` never meet, none at
            all, layers that lie in arrays already, a device that is new at every read, or what `Array` and `Wires`
            refuse.
        ShapeError: a layer with a forward pass of its own.

    >>> from lib.crossbar import Array, on_arrays
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)), torch.tensor([[255.0, 100.0]])
    >>> model[0].weight.data = torch.tensor([[127.0, 1.4]])
    >>> round(model(x).item()), round(on_arrays(model, Array(), x)(x).item())  # 1.4 lies there as 1
    (32525, 32485)
    """
    refuse_arrays(model)
    if not len(images):
        raise CrossbarError("ranges are chosen on what images give: there are none")
    copy = plain(model).eval()
    layers = uses(copy)
    plan = array if isinstance(array, Dict) else dict.fromkeys(all_layers(copy, "one array for all"), array)
    if not plan or (unknown := set(plan) - set(layers)):
        named = f"layer {min(unknown)!r}" if plan else "no layer"
        raise CrossbarError(f"the plan of arrays names {named}; the model has {', '.join(layers) or 'none'}")
    refuse_overridden([module for name in plan for module in layers[name]], "arrays")
    placed, drawn = {}, each(devices, lasting=True)
    for name, a in plan.items():
        cells = _programmed(layers[name][0], a, drawn, chip, name, wires)
        placed[name] = [ArrayLayer(module, cells) for module in layers[name]]
        for module in layers[name]:
            module.register_forward_pre_hook(own_forward)
    with torch.no_grad():
        _choose_ranges(copy, placed, images)
    for user in (u for users in placed.values() for u in users):
        user.layer.forward = user
    return copy


def _choose_ranges(copy: nn.Module, placed: dict[str, list[ArrayLayer]], images: Tensor) -> None:
    """A layer that is used once gets its ranges as it runs; for each that is used more often the network runs again."""
    times, waiting, seen = Counter(), None, []

    def count(name: str, user: ArrayLayer, x: Tensor) -> Tensor:
        times[name] += 1
        return user.digital(x)

    def choose(name: str, *x: Tensor) -> None:
        first, *others = placed[name]
        first.calibrate(*x)
        for user in others:
            user.inputs = first.inputs

    def run_as_far_as_known(name: str, user: ArrayLayer, x: Tensor) -> Tensor:
        nonlocal waiting
        if user.inputs is None and waiting in (None, name):
            if times[name] == 1:
                choose(name, x)
            else:
                waiting = name
                seen.append(x)
        return user(x) if user.inputs else user.digital(x)

    def run(rule) -> None:
        for name, users in placed.items():
            for user in users:
                user.layer.forward = partial(rule, name, user)
        copy(images)

    run(count)
    while unknown := [name for name, users in placed.items() if not users[0].inputs]:
        run(run_as_far_as_known)
        if waiting:
            choose(waiting, *seen)
        elif never := [name for name in unknown if not placed[name][0].inputs]:
            raise CrossbarError(f"the images never meet {', '.join(never)}: name the layers that lie in arrays")
        waiting, seen = None, []


def in_arrays(model: nn.Module) -> dict[str, list[ArrayLayer]]:
    """The layers of a network of `on_arrays` that lie in arrays, each with all modules that share its weights."""
    found = {name: [vars(m).get("forward") for m in modules] for name, modules in uses(model).items()}
    return {name: users for name, users in found.items() if isinstance(users[0], ArrayLayer)}


def refuse_arrays(model: nn.Module) -> None:
    """Layers that lie in arrays no longer look at their ``weight``: what is written there would be lost.

    Raises:
        CrossbarError: the model has such layers.
    """
    if found := in_arrays(model):
        raise CrossbarError(f"{', '.join(found)}: in arrays already; give on_arrays the network itself, and devices")


def _programmed(layer, array, devices, chip, name, wires) -> Programmed:
    groups = getattr(layer, "groups", 1)

    def change(cells: Tensor) -> Tensor:
        cells = disturbed(cells, devices, array.mapping, chip, name)
        return wires.weaken(cells, array, groups) if wires else cells

    return Programmed(layer.weight.detach(), array, groups, change if devices or wires else None)
