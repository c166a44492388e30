"""Network builders by name."""

import importlib.util
import inspect
import os
import pickle
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lib.models.errors import ModelError
from lib.models.recurrent import gru, lstm

NAMES = ("lenet5", "lenet300", "resnet<6n+2>", "vgg", "gru", "lstm", "any torchvision.models name", "file.py:function")
OWN = ("lenet5", "lenet300", "vgg", "gru", "lstm")


def lenet5(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The Caffe LeNet-5: conv 20 and 50 of 5x5, each max-pooled, fc 500, fc ``classes`` (430,500 weights on 28x28).

    ReLU after each convolution, the PyTorch form; behind the pool, where the same values take a quarter of the work.

    >>> from lib.models import lenet5
    >>> from lib.shapes import prunable
    >>> {name: layer.weight.numel() for name, layer in prunable(lenet5((1, 28, 28), 10)).items()}
    {'conv1': 500, 'conv2': 25000, 'fc1': 400000, 'fc2': 5000}
    """
    c, h, w = shape
    rows, columns = (((side - 4) // 2 - 4) // 2 for side in (h, w))
    if min(rows, columns) <= 0:
        raise ModelError(f"lenet5 takes no images of {h}x{w}: the smallest square ones are 16x16")
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(c, 20, 5),
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flat=nn.Flatten(),
            fc1=nn.Linear(50 * rows * columns, 500),
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


class PaddedShortcut(nn.Module):
    """A shortcut without weights (option A of He et al. 2016): every ``stride``-th pixel, zero channels on both sides.

    >>> from lib.models import PaddedShortcut
    >>> PaddedShortcut(2, 4, stride=2)(torch.ones(1, 2, 4, 4))[0, :, 0, 0].tolist()
    [0.0, 1.0, 1.0, 0.0]
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.before = stride, (c_out - c_in) // 2
        self.after = c_out - c_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        """``(N, c_in, H, W)`` -> ``(N, c_out, H/stride, W/stride)``."""
        return pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: identity, or where the shape changes option A or B of `resnet`.

    >>> from lib.models import BasicBlock
    >>> tuple(BasicBlock(16, 32, stride=2)(torch.zeros(1, 16, 8, 8)).shape)
    (1, 32, 4, 4)
    """

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: Literal["A", "B"] = "B") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Identity()
        if (stride != 1 or c_in != c_out) and shortcut == "A":
            self.shortcut = PaddedShortcut(c_in, c_out, stride)
        elif stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, c_in, H, W)`` -> ``(N, c_out, H/stride, W/stride)``."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def resnet(
    shape: tuple[int, int, int],
    classes: int,
    depth: int = 20,
    width: int = 16,
    shortcut: Literal["A", "B"] = "B",
) -> nn.Module:
    """A CIFAR-style residual network (He et al. 2016, section 4.2): ``depth = 6n + 2`` layers, ``width``, 2x, 4x wide.

    Shortcuts that change shape are 1x1 convolutions (option B of that paper), or pad with zeros (option A).

    >>> from lib.shapes import prunable
    >>> from lib.models import resnet
    >>> layers = prunable(resnet((3, 32, 32), 10, depth=20))
    >>> len(layers), [name for name in layers if "shortcut" in name]
    (22, ['block2_1.shortcut.0', 'block3_1.shortcut.0'])
    >>> len(prunable(resnet((3, 32, 32), 10, depth=20, shortcut="A")))
    20
    """
    if shortcut not in ("A", "B"):
        raise ModelError(f"shortcut = {shortcut!r}: allowed are 'A' and 'B'")
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise ModelError(f"resnet depth = {depth}: allowed are 8, 14, 20, 26, ... (6n + 2)")
    layers = OrderedDict(
        conv1=nn.Conv2d(shape[0], width, 3, 1, 1, bias=False), bn1=nn.BatchNorm2d(width), relu1=nn.ReLU()
    )
    channels = width
    for stage, out in enumerate((width, 2 * width, 4 * width), start=1):
        for i in range(n):
            layers[f"block{stage}_{i + 1}"] = BasicBlock(channels, out, 2 if stage > 1 and i == 0 else 1, shortcut)
            channels = out
    head = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(channels, classes))
    return nn.Sequential(layers | head)


FAILS = (AssertionError, RuntimeError, ValueError)  # of torchvision, about sizes


def _torchvision(name: str, shape: tuple[int, int, int], classes: int, pretrained: bool = False) -> nn.Module:
    """A torchvision classifier without auxiliary heads: fresh and fitted to the images, or as it was published."""
    import torchvision

    if pretrained:
        return _pretrained(name, shape, classes)

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


def _pretrained(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """With torchvision's default weights, from the cache of ``torch.hub`` or downloaded there."""
    from torchvision.models import get_model, get_model_weights

    weights = get_model_weights(name).DEFAULT
    known = len(weights.meta["categories"])
    if shape[0] != 3 or classes != known:
        raise ModelError(
            f"{name} was trained on 3 channels and {known} classes, the data have {shape[0]} and {classes}"
        )
    try:
        model = get_model(name, weights=weights)
    except OSError as error:  # urllib's errors are of this kind
        place = f"{torch.hub.get_dir()}/checkpoints"
        raise ModelError(
            f"no weights of {name}: {place} lacks {weights.url.rpartition('/')[2]}, and {weights.url} cannot be "
            f"downloaded ({error}); put the file there"
        ) from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        place, reason = (
            f"{torch.hub.get_dir()}/checkpoints/{weights.url.rpartition('/')[2]}",
            str(error).splitlines()[:1],
        )
        raise ModelError(f"{place} is damaged ({', '.join(reason)}); remove it, or get {weights.url} again") from None
    if not _runs(model.eval(), torch.zeros(1, *shape)):
        raise ModelError(f"{name} takes no images of {shape[1]}x{shape[2]}")
    return model.train()


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


def _of_torchvision(name: str) -> bool:
    import torchvision

    return name in torchvision.models.list_models(module=torchvision.models)


FILE = re.compile(r"(.+)\.py:(\w+)")
_READ: dict[str, tuple[types.ModuleType, bytes]] = {}


def own(name: str) -> bool:
    """Whether a model's name is a function in a file.

    >>> from lib.models import own
    >>> own("nets.py:thin"), own("lenet5")
    (True, False)
    """
    return FILE.fullmatch(name) is not None


def _of_file(file: str, function: str) -> Callable[..., nn.Module]:
    """A user's own builder, as the file says it now: read again when it has changed, never from compiled code."""
    path, said = Path(os.path.expanduser(file)).absolute(), f"model '{file}:{function}'"
    name = path.stem
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{said}: {path} cannot be read ({error.strerror})") from None
    module, known = _READ.get(str(path), (None, b""))
    if module is None or known != text or sys.modules.get(name) is not module:
        module = _executed(name, path, text, said)
        _READ[str(path)] = module, text
    if not callable(found := vars(module).get(function)):
        raise ModelError(f"{said}: there is no function {function!r} in {path}")
    return found


def _executed(name: str, path: Path, text: bytes, said: str) -> types.ModuleType:
    """A file as a module of its own, which other processes find by its name."""
    there = sys.modules.get(name)
    spec = getattr(there, "__spec__", None) if there else name.isidentifier() and importlib.util.find_spec(name)
    if not name.isidentifier() or ((there or spec) and Path(getattr(spec, "origin", None) or "") != path):
        raise ModelError(f"{said}: {name!r} is no name for a module, or that of another; rename the file")
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        exec(compile(text, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ModelError(f"{said}: {type(error).__name__}: {error}") from error
    return module


def builder(name: str) -> Callable[..., nn.Module]:
    """The function ``(shape, classes, **options) -> model`` for a model name; its source is part of a cache key.

    Args:
        name: of `NAMES`. ``nets.py:thin`` is the function ``thin`` in a file of your own.

    Raises:
        ModelError: unknown name, a residual depth that is not 6n + 2, or a file that cannot be imported.

    >>> from lib.models import builder
    >>> builder("lenet300")((1, 28, 28), 10).fc3
    Linear(in_features=100, out_features=10, bias=True)
    """
    if own(name):
        file, function = FILE.fullmatch(name).groups()
        return _of_file(f"{file}.py", function)
    if name in OWN:
        return {"lenet5": lenet5, "lenet300": lenet300, "vgg": vgg, "gru": gru, "lstm": lstm}[name]
    found = re.fullmatch(r"resnet(\d+)", name)
    depth = int(found[1]) if found else 0
    if depth > 2 and depth % 6 == 2 and depth not in (50, 152):  # torchvision's, whose import takes seconds
        return lambda shape, classes, width=16, shortcut="B": resnet(shape, classes, depth, width, shortcut)
    if _of_torchvision(name):
        return lambda shape, classes, pretrained=False: _torchvision(name, shape, classes, pretrained)
    raise ModelError(f"model {name!r} is unknown: allowed are {', '.join(NAMES)}")


def build(
    name: str, shape: tuple[int, int, int], classes: int, seed: int = 0, pretrained: bool = False, **options
) -> nn.Module:
    """A model for images ``(C, H, W)``, freshly initialized: the same ``seed`` gives the same weights, bit for bit.

    The global random state is left as it was.

    Args:
        pretrained: with the default weights of a torchvision model, where the machine has or may download them. It
            expects pixels as ``torchvision.models.get_model_weights(name).DEFAULT.transforms()`` makes them (see
            `Pixels`).
        options: of the model, such as the ``width`` of ``vgg`` and of residual networks.

    Raises:
        ModelError: as `builder`, or a network that takes no images of this size, or has no such weights, or is none.

    >>> from lib.models import build
    >>> from lib.shapes import prunable
    >>> sum(layer.weight.numel() for layer in prunable(build("lenet5", (1, 28, 28), 10)).values())
    430500
    >>> a, b = (build("lenet5", (1, 28, 28), 10, seed=3) for _ in range(2))
    >>> torch.equal(a.fc1.weight, b.fc1.weight)
    True
    """
    make = builder(name)
    if pretrained:
        if name in OWN or not _of_torchvision(name):
            raise ModelError(f"pretrained = True: {name} is no torchvision model; lib.published reads other networks")
        options["pretrained"] = True
    if own(name):
        try:
            inspect.signature(make).bind(shape, classes, **options)
        except TypeError as error:
            raise ModelError(
                f"model {name!r} is called with shape, classes{', '.join(['', *options])}: {error}"
            ) from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(shape, classes, **options)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {name!r} built a {type(model).__name__}, no torch.nn.Module")
    return model.to(memory_format=torch.channels_last)


class Pixels(nn.Module):
    """The first layer of a network that takes bytes: ``(N, C, H, W)`` from 0 to 255 become ``(x - mean) / std``.

    Images stay bytes in memory, a quarter of their size as floats, and are normalized a batch at a time.

    Args:
        mean, std: of each channel, in bytes, in the order that the network wants. bgr: it wants that of blue, green,
            red.

    >>> from lib.models import Pixels
    >>> image = torch.tensor([255, 0, 51], dtype=torch.uint8).reshape(1, 3, 1, 1)
    >>> Pixels([127.5] * 3, [127.5] * 3)(image).flatten().tolist()
    [1.0, -1.0, -0.6000000238418579]
    >>> model = torch.nn.Sequential(Pixels([0.0] * 3, [1.0] * 3, bgr=True), torch.nn.Flatten())
    >>> model(image).tolist()
    [[51.0, 0.0, 255.0]]
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], bgr: bool = False) -> None:
        super().__init__()
        self.bgr = bgr
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` of any type -> the same shape, float."""
        return ((x.flip(1) if self.bgr else x) - self.mean) / self.std


def set_weights(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Set a network's ``state_dict``, in place. Returns the model. A count of batches that is missing does not matter.

    Raises:
        ModelError: weights of another architecture; the first entry that does not fit, with both shapes.

    >>> from lib.models import lenet300, set_weights
    >>> set_weights(lenet300((1, 28, 28), 10), lenet300((1, 32, 32), 10).state_dict())
    Traceback (most recent call last):
        ...
    lib.models.errors.ModelError: weights of another network: fc1.weight is (300, 1024), and (300, 784) in this one
    """
    own = model.state_dict()
    shapes = [{n: tuple(t.shape) for n, t in each.items() if "num_batches" not in n} for each in (state, own)]
    for name in dict.fromkeys([*shapes[1], *shapes[0]]):
        there, here = (each.get(name, "missing") for each in shapes)
        if there != here:
            raise ModelError(f"weights of another network: {name} is {there}, and {here} in this one")
    model.load_state_dict(state, strict=False)
    return model
