"""Network builders by name, and the layers that constraints apply to."""

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("lenet5", "lenet300", "resnet<6n+2>", "vgg", "any torchvision.models name")


class ModelError(ValueError):
    """A network that is unknown, or that cannot be built for such images: the message says what can.

    >>> from lib.models import build
    >>> build("alexnet", (1, 28, 28), 10)
    Traceback (most recent call last):
        ...
    lib.models.ModelError: alexnet takes no images of 28x28: the smallest square ones are 63x63
    """


def lenet5(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The Caffe LeNet-5: conv 20 and 50 of 5x5, each max-pooled, fc 500, fc ``classes`` (430,500 weights on 28x28).

    ReLU after each convolution, the PyTorch form.

    >>> from lib.models import lenet5
    >>> from lib.shapes import prunable
    >>> {name: layer.weight.numel() for name, layer in prunable(lenet5((1, 28, 28), 10)).items()}
    {'conv1': 500, 'conv2': 25000, 'fc1': 400000, 'fc2': 5000}
    """
    c, h, w = shape
    flat = 50 * (((h - 4) // 2 - 4) // 2) * (((w - 4) // 2 - 4) // 2)
    if flat <= 0:
        raise ModelError(f"lenet5 takes no images of {h}x{w}: the smallest square ones are 16x16")
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(c, 20, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flat=nn.Flatten(),
            fc1=nn.Linear(flat, 500),
            relu3=nn.ReLU(),
            fc2=nn.Linear(500, classes),
        )
    )


def lenet300(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet-300-100: two hidden layers of 300 and 100 neurons (266,200 weights on 28x28).

    >>> from lib.models import lenet300
    >>> from lib.shapes import prunable
    >>> {name: layer.weight.numel() for name, layer in prunable(lenet300((1, 28, 28), 10)).items()}
    {'fc1': 235200, 'fc2': 30000, 'fc3': 1000}
    """
    c, h, w = shape
    return nn.Sequential(
        OrderedDict(
            flat=nn.Flatten(),
            fc1=nn.Linear(c * h * w, 300),
            relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            fc3=nn.Linear(100, classes),
        )
    )


def vgg(shape: tuple[int, int, int], classes: int, width: int = 16) -> nn.Module:
    """A small VGG: three stages of two 3x3 convolutions with batch norm, ``width``, 2x and 4x channels; one fc.

    >>> from lib.shapes import prunable
    >>> from lib.models import vgg
    >>> [len(layer.weight) for layer in prunable(vgg((3, 32, 32), 10, width=8)).values()]
    [8, 8, 16, 16, 32, 32, 10]
    """
    if min(shape[1:]) < 8:
        raise ModelError(f"vgg takes no images of {shape[1]}x{shape[2]}: the smallest square ones are 8x8")
    stages: dict[str, nn.Module] = {}
    channels = shape[0]
    for stage, out in enumerate((width, 2 * width, 4 * width), start=1):
        for i in (1, 2):
            stages[f"conv{stage}_{i}"] = nn.Conv2d(channels, out, 3, padding=1, bias=False)
            stages[f"bn{stage}_{i}"] = nn.BatchNorm2d(out)
            stages[f"relu{stage}_{i}"] = nn.ReLU()
            channels = out
        stages[f"pool{stage}"] = nn.MaxPool2d(2)
    head = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(channels, classes))
    return nn.Sequential(OrderedDict(**stages) | head)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: identity, or a strided 1x1 convolution where the shape changes.

    >>> from lib.models import BasicBlock
    >>> tuple(BasicBlock(16, 32, stride=2)(torch.zeros(1, 16, 8, 8)).shape)
    (1, 32, 4, 4)
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, c_in, H, W)`` -> ``(N, c_out, H/stride, W/stride)``."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def resnet(shape: tuple[int, int, int], classes: int, depth: int = 20, width: int = 16) -> nn.Module:
    """A CIFAR-style residual network (He et al. 2016, section 4.2): ``depth = 6n + 2`` layers, ``width``, 2x, 4x wide.

    Shortcuts that change shape are 1x1 convolutions (option B of that paper).

    >>> from lib.shapes import prunable
    >>> from lib.models import resnet
    >>> layers = prunable(resnet((3, 32, 32), 10, depth=20))
    >>> len(layers), [name for name in layers if "shortcut" in name]
    (22, ['block2_1.shortcut.0', 'block3_1.shortcut.0'])
    """
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise ModelError(f"resnet depth = {depth}: allowed are 8, 14, 20, 26, ... (6n + 2)")
    layers = OrderedDict(
        conv1=nn.Conv2d(shape[0], width, 3, 1, 1, bias=False), bn1=nn.BatchNorm2d(width), relu1=nn.ReLU()
    )
    channels = width
    for stage, out in enumerate((width, 2 * width, 4 * width), start=1):
        for i in range(n):
            layers[f"block{stage}_{i + 1}"] = BasicBlock(channels, out, 2 if stage > 1 and i == 0 else 1)
            channels = out
    head = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(channels, classes))
    return nn.Sequential(layers | head)


FAILS = (AssertionError, RuntimeError, ValueError)  # of torchvision, about sizes


def _torchvision(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A torchvision classifier without pretrained weights and auxiliary heads, fitted to the images."""
    import torchvision

    def made(height: int, width: int) -> nn.Module:
        plain = {"aux_logits": False, "init_weights": True}
        own = {"vit": {"image_size": height}, "maxvit": {"input_size": (height, width)}}
        own |= {"googlenet": plain, "inception": plain}
        options = own.get(name.split("_")[0], {})
        return torchvision.models.get_model(name, weights=None, num_classes=classes, **options)

    channels, height, width = shape
    sizes = range(min(height, width), 513)
    try:
        model = made(height, width)
    except FAILS:  # the size is a part of it
        with torch.device("meta"):
            takes = (n for n in sizes if _runs(made, n, n))
    else:
        _fit_channels(model, channels)
        if _runs(model.eval(), torch.zeros(1, *shape)):
            return model.train()
        takes = (n for n in sizes if _runs(model, torch.zeros(1, channels, n, n)))
    known = next((f": the smallest square ones are {n}x{n}" for n in takes), "")
    raise ModelError(f"{name} takes no images of {height}x{width}{known}")


@torch.no_grad()
def _runs(function: Callable, *args: Any) -> bool:
    try:
        function(*args)
    except FAILS:
        return False
    return True


def _fit_channels(model: nn.Module, channels: int) -> None:
    """Give the first convolution as many input channels, all else as it was."""
    name, conv = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if conv.in_channels != channels:
        kept = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        options = {key: getattr(conv, key) for key in kept}
        model.set_submodule(name, nn.Conv2d(channels, bias=conv.bias is not None, **options))


def builder(name: str) -> Callable[..., nn.Module]:
    """The function ``(shape, classes, **options) -> model`` for a model name; its source is part of a cache key.

    Raises:
        ModelError: unknown name, or a residual depth that is not 6n + 2.

    >>> from lib.models import builder
    >>> builder("lenet300")((1, 28, 28), 10).fc3
    Linear(in_features=100, out_features=10, bias=True)
    """
    if name in ("lenet5", "lenet300", "vgg"):
        return {"lenet5": lenet5, "lenet300": lenet300, "vgg": vgg}[name]
    import torchvision

    if name in torchvision.models.list_models(module=torchvision.models):
        return lambda shape, classes: _torchvision(name, shape, classes)
    if depth := re.fullmatch(r"resnet(\d+)", name):
        n, rest = divmod(int(depth[1]) - 2, 6)
        if rest == 0 and n >= 1:
            return lambda shape, classes, width=16: resnet(shape, classes, int(depth[1]), width)
    raise ModelError(f"model {name!r} is unknown: allowed are {', '.join(NAMES)}")


def build(name: str, shape: tuple[int, int, int], classes: int, seed: int = 0, **options) -> nn.Module:
    """A freshly initialized model for images ``(C, H, W)``; the same ``seed`` gives the same weights, bit for bit.

    The global random state is left as it was.

    Raises:
        ModelError: as `builder`, or a network that takes no images of this size.

    >>> from lib.models import build
    >>> from lib.shapes import prunable
    >>> sum(layer.weight.numel() for layer in prunable(build("lenet5", (1, 28, 28), 10)).values())
    430500
    >>> a, b = (build("lenet5", (1, 28, 28), 10, seed=3) for _ in range(2))
    >>> torch.equal(a.fc1.weight, b.fc1.weight)
    True
    """
    make = builder(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(shape, classes, **options).to(memory_format=torch.channels_last)
