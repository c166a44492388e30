import gzip
import hashlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lib import data


def test_shipped_data_have_the_published_sizes():
    d = data.load()
    assert (len(d.train), len(d.validation), len(d.test), d.classes) == (55000, 5000, 10000, 10)
    assert d.shape == (1, 28, 28)
    assert abs(float(d.train.x.mean())) < 1e-3
    assert abs(float(d.train.x.std()) - 1) < 1e-3


def test_validation_split_is_the_same_at_every_training_size():
    small, large = data.load(train_size=100), data.load(train_size=2000)
    assert torch.equal(small.validation.y, large.validation.y)
    assert torch.equal(small.train.y, large.train.y[:100])
    assert small.checksum != large.checksum


def test_splits_share_no_image():
    d = data.load(train_size=3000)
    pixels = [{hashlib.sha256(i.numpy().tobytes()).digest() for i in s.x} for s in (d.train, d.validation)]
    overlap = pixels[0] & pixels[1]
    assert len(overlap) <= 3  # Fashion-MNIST itself holds a few identical images


@pytest.mark.parametrize("damage", ["truncated", "swapped byte"])
def test_damaged_file_is_refused_in_one_line(tmp_path, damage):
    raw = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(data.SHIPPED_ROOT / "FashionMNIST" / "raw", raw)
    victim = raw / "train-labels-idx1-ubyte.gz"
    content = victim.read_bytes()
    if damage == "truncated":
        victim.write_bytes(content[: len(content) // 2])
    else:
        plain = bytearray(gzip.decompress(content))
        plain[100] ^= 1
        victim.write_bytes(gzip.compress(bytes(plain)))
    with pytest.raises(data.DataError, match=r"train-labels.*(damaged|checksum)") as error:
        data.load(root=tmp_path)
    assert "\n" not in str(error.value)


def test_unknown_name_and_missing_root_are_named():
    with pytest.raises(data.DataError, match=r"'fashion' is unknown: allowed are fashion_mnist, mnist"):
        data.load("fashion")
    with pytest.raises(data.DataError, match=r"no/such/folder.* is not a folder"):
        data.load(root="no/such/folder")


def test_data_root_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "gone"))
    with pytest.raises(data.DataError, match="gone"):
        data.load()


def test_missing_mnist_says_where_it_looked(tmp_path, monkeypatch):
    from torchvision import datasets

    def no_network(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(datasets.MNIST, "download", no_network)
    with pytest.raises(data.DataError, match=f"mnist could not be read under {tmp_path}") as error:
        data.load("mnist", tmp_path)
    assert "\n" not in str(error.value)


def _write_mnist(root, n_train=100, n_test=20):
    """Idx files in torchvision's layout, with known pixels."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", n_train), ("t10k", n_test)):
        pixels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        header = (0x803).to_bytes(4, "big") + b"".join(v.to_bytes(4, "big") for v in pixels.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = (0x801).to_bytes(4, "big") + n.to_bytes(4, "big")
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def test_mnist_is_read_from_a_root(tmp_path):
    _write_mnist(tmp_path)
    d = data.load("mnist", tmp_path)
    assert (len(d.train), len(d.validation), len(d.test), d.shape) == (80, 20, 20, (1, 28, 28))


def _write_folder(root, sizes=(32, 32)):
    rng = np.random.default_rng(0)
    for part, n in (("train", 10), ("test", 4)):
        for label, size in zip(("cat", "dog"), sizes, strict=True):
            (root / part / label).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{i}.png")


def test_own_folder_of_images(tmp_path):
    _write_folder(tmp_path)
    d = data.load(str(tmp_path))
    assert (len(d.train), len(d.validation), len(d.test), d.classes) == (16, 4, 8, 2)
    assert d.shape == (3, 32, 32)
    assert d.train.x.is_contiguous(memory_format=torch.channels_last)


def test_own_folder_with_mixed_sizes_needs_image_size(tmp_path):
    _write_folder(tmp_path, sizes=(32, 24))
    with pytest.raises(data.DataError, match="differ in size; give image_size"):
        data.load(str(tmp_path))
    assert data.load(str(tmp_path), image_size=16).shape == (3, 16, 16)


@pytest.mark.parametrize(("key", "value"), [("train_size", -1), ("test_size", -5), ("validation_size", -1)])
def test_negative_sizes_are_refused(key, value):
    with pytest.raises(data.DataError, match=f"{key} = {value}"):
        data.load(**{key: value})


def test_more_training_images_than_there_are():
    with pytest.raises(data.DataError, match="has 55000 training images"):
        data.load(train_size=60000)
