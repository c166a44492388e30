"""The gradients of narrow, strided 1x1 convolutions. Where they are wrong, memory is too: a child process trains."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d, cross_entropy
from torch.overrides import _len_torch_function_stack

from lib.constraint import attach_masks
from lib.data import Data, Split
from lib.recipes.e2_train.signs import _weight_gradient
from lib.training import Hook, StrideFirst, fit

CHANNELS = (2, 3, 4, 5, 7, 8, 12, 15)
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


class OwnWords(nn.Module):
    """A user's layer, which is no `nn.Conv2d`."""

    def __init__(self, channels, stride):
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(8, channels, 1, 1))
        self.stride = stride

    def forward(self, x):
        return conv2d(input=x, weight=self.kernels, stride=(self.stride, self.stride))


def layers(c, stride):
    """Layers over ``c`` input channels a group, as they occur."""
    yield "plain", nn.Conv2d(c, 2 * c, 1, stride, bias=False)
    yield "biased", nn.Conv2d(c, 5, 1, (stride, 1))
    yield "padded", nn.Conv2d(c, 8, 1, stride, padding=stride)
    yield "grouped", nn.Conv2d(2 * c, 4 * c, 1, stride, groups=2)
    yield "depthwise", nn.Conv2d(c, 2 * c, 1, stride, groups=c)
    yield "own", OwnWords(c, stride)
    yield "transposed", nn.ConvTranspose2d(4, c, 1, stride, output_padding=stride - 1)
    masked = nn.Sequential(nn.Conv2d(c, 8, 1, stride))
    yield "masked", attach_masks(masked, {"0": torch.rand(8, c, 1, 1) < 0.7})


def network(layer, channels):
    """The layer under a hook of PyTorch's, and a classifier on top."""
    layer.register_forward_hook(lambda module, inputs, output: output * 1.5)
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.LazyLinear(10))
    model(torch.zeros(1, channels, 12, 12))
    return model.to(memory_format=torch.channels_last)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


class Keep(Hook):
    def after_backward(self, model, step):
        self.found = gradients(model)


def error(found, exact):
    """The largest error, in shares of the largest exact value."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def trained(layer, channels):
    """The gradients of one step of `fit` against those of the same network in float64."""
    x, y = torch.randn(8, channels, 12, 12), torch.randint(10, (8,))
    split = Split(x.contiguous(memory_format=torch.channels_last), y)
    model, keep = deepcopy(network(layer, channels)), Keep()
    twin = deepcopy(model).double()
    cross_entropy(twin(x.double()), y).backward()
    fit(model, Data("noise", split, split, split, classes=10), epochs=1, lr=0.1, hooks=(keep,))
    assert _len_torch_function_stack() == 0
    return max(error(keep.found[name], exact) for name, exact in gradients(twin).items())


def signed(c, stride):
    """The weight gradient that predictive signs ask for, against float64."""
    x, gradient = torch.randn(8, c, 12, 12), torch.randn(8, 8, 12 // stride, 12 // stride)
    geometry = ((stride, stride), (0, 0), (1, 1), 1)
    exact = _weight_gradient(gradient.double(), x.double(), torch.Size((8, c, 1, 1)), geometry)
    last = {"memory_format": torch.channels_last}
    found = _weight_gradient(gradient.contiguous(**last), x.contiguous(**last), torch.Size((8, c, 1, 1)), geometry)
    return error(found, exact)


def main():
    """A line a case, first without and then with its error; the last line before a crash says where it was."""
    torch.manual_seed(0)
    for threads, stride, c in product((1, 2), (2, 3), CHANNELS):
        torch.set_num_threads(threads)
        for name, layer in layers(c, stride):
            case = {"threads": threads, "stride": stride, "channels": c, "layer": name}
            print(json.dumps(case), flush=True)
            case["error"] = trained(layer, {"grouped": 2 * c, "transposed": 4}.get(name, c))
            print(json.dumps(case), flush=True)
        print(json.dumps(case | {"layer": "signs", "error": signed(c, stride)}), flush=True)


NATIVE = [pytest.param({}, id="native")] * (torch.backends.cpu.get_cpu_capability() != "AVX2")  # the same there


@pytest.mark.parametrize("instructions", [*NATIVE, pytest.param(AVX2, id="avx2")])
def test_gradients_are_those_of_float64(instructions):
    child = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | instructions,
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = child.stdout.splitlines()
    assert child.returncode == 0, f"died of {child.returncode} in {lines[-1:]}: {child.stderr[-500:]}"
    done = [case for case in map(json.loads, lines) if "error" in case]
    assert len(done) == 2 * 2 * len(CHANNELS) * 9
    assert [case for case in done if not case["error"] < 1e-4] == []


GEOMETRIES = [
    {"stride": 2},
    {"stride": [3]},
    {"stride": (2, 1)},
    {"stride": (1, 3), "padding": (2, 1)},
    {"stride": 2, "padding": "valid"},
    {"stride": (3, 2), "padding": 1, "groups": 2},
    {"stride": 2, "padding": 1, "dilation": 5},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 13, 10), (6, 13, 10), (2, 6, 1, 1)], ids=str)
def test_the_function_is_the_same(geometry, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6 // geometry.get("groups", 1), 1, 1, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    plain = conv2d(x, weight, bias, **geometry)
    with StrideFirst():
        guarded = conv2d(x, weight, bias, **geometry)
    torch.testing.assert_close(guarded, plain)
    direction = torch.randn_like(plain)
    for one, other in zip(
        torch.autograd.grad(guarded, (x, weight, bias), direction),
        torch.autograd.grad(plain, (x, weight, bias), direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": 2},
        {"stride": (2, 3), "output_padding": (1, 2)},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"stride": (1, 4), "groups": 2},
    ],
    ids=str,
)
def test_the_transposed_function_is_the_same(geometry, bias):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(3 * geometry.get("groups", 1), dtype=torch.float64) if bias else None
    plain = conv_transpose2d(x, weight, offset, **geometry)
    with StrideFirst():
        guarded = conv_transpose2d(x, weight, offset, **geometry)
    torch.testing.assert_close(guarded, plain)
    direction = torch.randn_like(plain)
    for one, other in zip(
        torch.autograd.grad(guarded, (x, weight), direction),
        torch.autograd.grad(plain, (x, weight), direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("channels", "kernel", "stride"), [(4, 3, 2), (4, 1, 1), (16, 1, 2), (20, 1, 3), (4, (1, 2), 2)], ids=str
)
def test_other_layers_keep_their_bits(channels, kernel, stride):
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 8, kernel, stride).to(memory_format=torch.channels_last)
    x = torch.randn(8, channels, 12, 12).contiguous(memory_format=torch.channels_last)
    found = []
    for _ in range(2):
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        found.append((y.detach(), *gradients(layer).values()))
        if len(found) == 1:
            guard = StrideFirst()
            guard.__enter__()
    guard.__exit__(None, None, None)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_is_left_after_an_error(images, net):
    class Broken(Hook):
        def before_step(self, model, step):
            raise KeyError

    with pytest.raises(KeyError):
        fit(net, images, epochs=1, lr=0.1, hooks=(Broken(),))
    assert _len_torch_function_stack() == 0


if __name__ == "__main__":
    main()
