"""Narrow 1x1 convolutions with a stride, computed in a form that oneDNN gets right."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, pad
from torch.overrides import TorchFunctionMode

IC_BLOCK = 16
"""Input channels that oneDNN takes at once under AVX-512; 8 under AVX2. One constant: all machines compute alike."""


class StrideFirst(TorchFunctionMode):
    """Within, a narrow 1x1 convolution first picks the positions that it reads, then goes over them without a stride.

    It is the same function. In ``channels_last``, oneDNN 3.13 writes the weight gradient of a 1x1 convolution with a
    stride and fewer input channels than `IC_BLOCK` past its workspace (oneDNN issue 6035): with one thread the process
    dies, with more every gradient is wrong. The gradient of a 1x1 transposed convolution is that same product with
    input and output exchanged. All other calls are untouched, and so is the model: what counts is the shape of a call
    on a CPU, whoever makes it. Every step of `fit` is taken within; gradients that are found elsewhere should be too.

    >>> from lib.training import StrideFirst
    >>> conv, x = torch.nn.Conv2d(4, 8, 1, stride=2), torch.rand(3, 4, 10, 10)
    >>> with StrideFirst():
    ...     y = conv(x)
    ...     y.sum().backward()
    >>> torch.allclose(y, conv(x)), torch.allclose(conv.weight.grad[0].flatten(), x[..., ::2, ::2].sum((0, 2, 3)))
    (True, True)
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called by PyTorch in place of ``function``, with the mode itself set aside."""
        if function is conv2d:
            function = _convolved
        elif function is conv_transpose2d:
            function = _spread
        return function(*args, **kwargs or {})


def narrow(weight: torch.Size, stride: tuple[int, int], place: torch.device) -> bool:
    """Whether oneDNN may get the gradient of such a weight ``(F, C/groups, 1, 1)`` wrong."""
    return place.type == "cpu" and weight[2:] == (1, 1) and weight[1] < IC_BLOCK and max(stride) > 1


def read(x: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """What a 1x1 convolution reads of its input: ``(..., H, W)`` -> ``(..., ceil((H + 2 padding) / stride), ...)``.

    >>> from lib.training.strides import read
    >>> read(torch.arange(12.0).reshape(1, 1, 3, 4), (2, 3), (0, 0)).tolist()
    [[[[0.0, 3.0], [8.0, 11.0]]]]
    """
    if any(padding):
        x = pad(x, (padding[1], padding[1], padding[0], padding[0]))
    return x[..., :: stride[0], :: stride[1]]


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """A number for both directions, as PyTorch's functions take it: ``2``, ``(2,)`` or ``(2, 2)``."""
    return tuple(value) * (3 - len(value)) if isinstance(value, list | tuple) else (value, value)


def _convolved(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """``conv2d``."""
    if padding != "same" and narrow(weight.shape, _pair(stride), input.device):
        input, stride, padding = read(input, _pair(stride), (0, 0) if padding == "valid" else _pair(padding)), 1, 0
    return conv2d(input, weight, bias, stride, padding, dilation, groups)


def _spread(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """``conv_transpose2d``: products at every ``stride``-th position, zero between."""
    if not narrow(weight.shape, _pair(stride), input.device):
        return conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    (sh, sw), (ph, pw), (oh, ow) = _pair(stride), _pair(padding), _pair(output_padding)
    y = conv_transpose2d(input, weight, groups=groups)
    *rest, h, w = y.shape
    wide = y.new_zeros(*rest, (h - 1) * sh + 1 + oh, (w - 1) * sw + 1 + ow)
    wide[..., ::sh, ::sw] = y
    wide = wide[..., ph : wide.shape[-2] - ph, pw : wide.shape[-1] - pw]
    return wide if bias is None else wide + bias[:, None, None]
