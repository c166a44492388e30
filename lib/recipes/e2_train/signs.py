"""Training at 8 and 16 bits, and signs of gradients of which most come from 4 bits of the inputs (arXiv 1910.13349)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import nan
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear, pad
from torch.nn.grad import conv2d_input, conv2d_weight

from lib.constraint import mask_of
from lib.layers.gates import RecurrentGate
from lib.shapes import dense_macs, own_forward, refuse_overridden, uses
from lib.training import TrainingError, charge
from lib.training.strides import narrow, read

BITS = 8  # of weights and of layer inputs
GRADIENT_BITS = 16  # of the gradient of a layer's output


class Codes(NamedTuple):
    """Integers (held as floats) and the one step that they count.

    >>> from lib.recipes.e2_train.signs import Codes
    >>> Codes(torch.tensor([2.0, -3.0]), torch.tensor(0.5)).value.tolist()
    [1.0, -1.5]
    """

    codes: Tensor
    step: Tensor

    @property
    def value(self) -> Tensor:
        """What they stand for."""
        return self.codes * self.step


def quantized(x: Tensor, bits: int, signed: bool = True) -> Codes:
    """``x`` in equal steps up to its largest magnitude; unsigned codes only where asked for, and nothing is negative.

    >>> from lib.recipes.e2_train.signs import quantized
    >>> quantized(torch.tensor([0.0, 1.0, 5.0]), bits=2, signed=False).codes.tolist()  # 0 to 3
    [0.0, 1.0, 3.0]
    >>> quantized(torch.tensor([0.0, 1.0, 5.0]), bits=2).value.tolist()  # -1 to 1
    [0.0, 0.0, 5.0]
    """
    half, whole = 2.0 ** (bits - 1) - 1, 2.0**bits - 1
    top = half if signed else torch.where(x.amin() < 0, half, whole)
    largest = x.abs().amax()
    step = torch.where(largest > 0, largest, 1.0) / top
    return Codes((x / step).round(), step)


def leading(x: Codes, bits: int) -> Tensor:
    """The values of eight-bit codes at their ``bits`` most significant bits, rounded to nearest as in the paper's code.

    >>> from lib.recipes.e2_train.signs import leading, quantized
    >>> x = quantized(torch.tensor([0.0, 30.0, 255.0]), 8, signed=False)
    >>> leading(x, bits=4).tolist()  # multiples of 16 up to 15 * 16
    [0.0, 32.0, 240.0]
    """
    unit = 2.0 ** (BITS - bits)
    top = torch.where(x.codes.amin() < 0, 2.0 ** (bits - 1) - 1, 2.0**bits - 1)
    return (x.codes / unit).round().clamp(-top, top) * unit * x.step


class SignPrediction:
    """The rule that predicts signs of weight gradients, and how often it was used and right since `reset`.

    >>> from lib.recipes.e2_train import SignPrediction
    >>> rule = SignPrediction(threshold=0.5)
    >>> rule.signs(rough=torch.tensor([4.0, -2.0, 1.0]), full=torch.tensor([3.0, 1.0, -1.0])).tolist()
    [1.0, -1.0, -1.0]
    >>> round(rule.predicted, 3), rule.agreement  # two of three, and one of the two rightly
    (0.667, 0.5)
    """

    def __init__(
        self, threshold: float = 0.05, msb_bits: int = 4, msb_bits_grad: int = GRADIENT_BITS, scale: float = 1.0
    ) -> None:
        if not threshold >= 0:
            raise TrainingError(f"threshold = {threshold}: allowed are numbers >= 0, in shares of the largest")
        if not 2 <= msb_bits <= BITS or not 2 <= msb_bits_grad <= GRADIENT_BITS:
            raise TrainingError(f"{msb_bits=}, {msb_bits_grad=}: allowed are 2 to {BITS} and 2 to {GRADIENT_BITS}")
        if not 0 < scale < float("inf"):
            raise TrainingError(f"scale = {scale}: allowed are numbers > 0")
        self.threshold, self.msb_bits, self.msb_bits_grad, self.scale = threshold, msb_bits, msb_bits_grad, scale
        self.passes: dict[int, int] = {}  # of each layer, the backward pass that it was last met in
        self.reset()

    def once(self, layer: nn.Module) -> None:
        """Refuse a second use of a layer in one backward pass: the sum of two signs is no sign of the sum."""
        now = torch._C._current_graph_task_id()
        if self.passes.get(id(layer)) == now:
            raise TrainingError(f"predictive_signs: {layer} is used more than once in a pass: one sign a step is known")
        self.passes[id(layer)] = now

    def reset(self) -> None:
        """Count from zero."""
        self._weights = self._predicted = self._right = 0

    @property
    def predicted(self) -> float:
        """Share of weight gradients whose sign was predicted; NaN before the first."""
        return self._predicted / self._weights if self._weights else nan

    @property
    def agreement(self) -> float:
        """Share of the predicted signs that are the full gradient's; NaN without any."""
        return self._right / self._predicted if self._predicted else nan

    def signs(self, rough: Tensor, full: Tensor, live: Tensor | None = None) -> Tensor:
        """Signs of ``rough`` where it is at least ``threshold`` times its largest magnitude, else of ``full``.

        Where ``live`` (a mask) is False there is no weight: the sign is 0 and nothing is counted.
        """
        if live is not None:
            rough, full = rough * live, full * live
        size = rough.abs()
        sure = size >= self.threshold * size.amax()
        if live is not None:
            sure &= live
        self.last = int(sure.sum()) / max(weights := full.numel() if live is None else int(live.sum()), 1)
        self._weights += weights
        self._predicted += int(sure.sum())
        self._right += int((sure & (rough.sign() == full.sign())).sum())
        return torch.where(sure, rough, full).sign()


Geometry = tuple | None
"""Stride, padding, dilation and groups of a convolution; None for a linear layer."""


class _Product(torch.autograd.Function):
    """A layer's product at few bits; its weights' gradient, or the signs that a rule makes of it."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, layer: nn.Module, geometry: Geometry, rule: SignPrediction | None
    ) -> Tensor:
        inputs, weights = quantized(x, BITS, signed=False), quantized(weight, BITS)
        ctx.save_for_backward(*inputs, weights.value)
        ctx.layer, ctx.geometry, ctx.rule = layer, geometry, rule
        if geometry is None:
            y = linear(inputs.value, weights.value)
        else:
            y = conv2d(inputs.value, weights.value, None, *geometry)
        ctx.live = mask_of(layer)
        density = 1.0 if ctx.live is None else int(ctx.live.sum()) / ctx.live.numel()
        ctx.macs = dense_macs(layer, y) * density if layer.training else 0.0
        _charge(ctx, "forward", (BITS, BITS))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, weight = ctx.saved_tensors
        x, rule = Codes(*inputs), ctx.rule
        of_x = of_weight = None
        full = quantized(gradient, GRADIENT_BITS).value
        if ctx.needs_input_grad[0]:
            of_x = _input_gradient(full, weight, x.codes.shape, ctx.geometry)
            _charge(ctx, "input_gradient", (GRADIENT_BITS, BITS))
        if ctx.needs_input_grad[1]:
            of_weight, left = _weight_gradient(full, x.value, weight.shape, ctx.geometry), 1.0
            if rule:
                rule.once(ctx.layer)
                few = quantized(gradient, rule.msb_bits_grad).value
                rough = _weight_gradient(few, leading(x, rule.msb_bits), weight.shape, ctx.geometry)
                of_weight = rule.scale * rule.signs(rough, of_weight, ctx.live)
                _charge(ctx, "weight_sign", (rule.msb_bits, rule.msb_bits_grad))
                left -= rule.last
            _charge(ctx, "weight_gradient", (BITS, GRADIENT_BITS), left)
        return of_x, of_weight, None, None, None


def _charge(ctx, product: str, bits: tuple[int, int], share: float = 1.0) -> None:
    if ctx.macs * share:
        charge(ctx.layer, product, ctx.macs * share, bits)


def _input_gradient(gradient: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    return gradient @ weight if geometry is None else conv2d_input(shape, weight, gradient, *geometry)


def _weight_gradient(gradient: Tensor, x: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    if geometry is None:
        return gradient.flatten(0, -2).T @ x.flatten(0, -2)  # (F, N) @ (N, C)
    stride, padding, *rest = geometry
    if narrow(shape, stride, x.device):
        x, stride, padding = read(x, stride, padding), 1, 0
    return conv2d_weight(x, shape, gradient, stride, padding, *rest)


def _forward(layer: nn.Module, rule: SignPrediction | None, x: Tensor) -> Tensor:
    """What a layer computes while it is swapped; its bias is added apart, and so keeps its true gradient."""
    if isinstance(layer, nn.Linear):
        y = _Product.apply(x, layer.weight, layer, None, rule)
        return y if layer.bias is None else y + layer.bias
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = pad(x, layer._reversed_padding_repeated_twice, mode), (0, 0)
    geometry = (layer.stride, padding, layer.dilation, layer.groups)
    y = _Product.apply(x, layer.weight, layer, geometry, rule)
    return y if layer.bias is None else y + layer.bias.view(-1, 1, 1)


@contextmanager
def low_precision(model: nn.Module, rule: SignPrediction | None = None) -> Iterator[None]:
    """Within, convolutions and linear layers compute at few bits, in training and in evaluation.

    Forward: inputs and weights at 8 bits. Backward: the gradient of a layer's output at 16 bits; the gradients of its
    inputs and weights are the products of that with the 8-bit weights and inputs. Scales are a tensor's own: its
    largest magnitude, symmetric, but unsigned for inputs without negative values.

    The weights that are trained, and left in an ordinary network afterwards, are floats, never rounded themselves:
    whoever evaluates after the block measures the float network, within it the 8-bit one. The layers of a recurrent
    gate stay at 32 bits: the code released with E2-Train does so with its LSTM and its read-out, but not with its
    projections.

    Args:
        rule: what makes signs of the weights' gradients (`predictive_signs`); None: they are left as they are.

    Raises:
        TrainingError: a convolution along one dimension, or layers that another such block has swapped.
        ShapeError: a layer with a forward pass of its own.

    >>> from lib.recipes.e2_train import low_precision
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(layer.weight, 1.0)
    >>> with low_precision(layer):
    ...     y = layer(torch.tensor([1.0, 0.001]))  # 0.001 is less than half a step of 1 / 255
    >>> y.item()
    1.0
    """
    gates = {id(m) for gate in model.modules() if isinstance(gate, RecurrentGate) for m in gate.modules()}
    named = {name: layers for name, layers in uses(model).items() if id(layers[0]) not in gates}
    for name in (name for name, layers in named.items() if isinstance(layers[0], nn.Conv1d)):
        raise TrainingError(f"low_precision: layer {name} is a Conv1d; linear layers and Conv2d are known")
    layers = [layer for same in named.values() for layer in same]
    if any("forward" in vars(layer) for layer in layers):
        raise TrainingError("low_precision: the network's layers are swapped already; leave the other block first")
    refuse_overridden(layers, "low_precision")
    hooks = [layer.register_forward_pre_hook(own_forward) for layer in layers]
    for layer in layers:
        layer.forward, layer.charges_itself = partial(_forward, layer, rule), True
    try:
        yield
    finally:
        for layer, hook in zip(layers, hooks, strict=True):
            del layer.forward, layer.charges_itself
            hook.remove()


@contextmanager
def predictive_signs(
    model: nn.Module,
    threshold: float = 0.05,
    *,
    scale: float = 1.0,
    msb_bits: int = 4,
    msb_bits_grad: int = GRADIENT_BITS,
) -> Iterator[SignPrediction]:
    """Within, layers compute in `low_precision`, and their weights' gradients are signs (PSG).

    The weights' gradient ``g_msb`` is first found from the ``msb_bits`` most significant bits of the inputs and
    ``msb_bits_grad`` of the output's gradient; where ``|g_msb| >= threshold * max |g_msb|`` its sign is taken, and
    elsewhere that of the 8-bit by 16-bit product (Wang et al., NeurIPS 2019, section 3.3, where the threshold 0.05 is
    called beta). ``weight.grad`` is then ``scale`` times -1, 0 or 1; biases and norms keep their true gradients.

    The simulation computes the full gradient of all weights, to see how many signs were predicted rightly; hardware
    would only where none is predicted, and that is what the energy meter is charged.

    Yields:
        The rule, with the share ``predicted`` and the ``agreement`` since its ``reset``.

    Raises:
        TrainingError: as `low_precision`; a value that is not allowed; a layer that several modules share or that one
            backward pass meets twice, such as a recurrent one: the method signs the sum of all uses, and each use here
            knows its own.

    >>> from lib.recipes.e2_train import predictive_signs
    >>> layer = torch.nn.Linear(4, 3)
    >>> with predictive_signs(layer) as rule:
    ...     layer(torch.rand(5, 4)).square().sum().backward()
    >>> set(layer.weight.grad.unique().tolist()) <= {-1.0, 0.0, 1.0}, 0 < rule.predicted <= 1
    (True, True)
    """
    rule = SignPrediction(threshold, msb_bits, msb_bits_grad, scale)
    if shared := [name for name, layers in uses(model).items() if len(layers) > 1]:
        raise TrainingError(f"predictive_signs: several modules share {shared[0]}; one sign a step is known")
    with low_precision(model, rule):
        yield rule
