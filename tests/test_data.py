import gzip
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from lib import data
from lib.data import named
from lib.data.folders import read_folder
from lib.data.loading import _mean_and_std
from lib.keys import content


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


@pytest.mark.parametrize("damage", ["truncated", "swapped byte", "swapped byte of the archive"])
def test_damaged_file_is_refused_in_one_line(tmp_path, damage):
    raw = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(data.SHIPPED_ROOT / "FashionMNIST" / "raw", raw)
    victim = raw / "train-labels-idx1-ubyte.gz"
    content = victim.read_bytes()
    if damage == "truncated":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "swapped byte of the archive":
        victim.write_bytes(content[:100] + bytes(200) + content[300:])
    else:
        plain = bytearray(gzip.decompress(content))
        plain[100] ^= 1
        victim.write_bytes(gzip.compress(bytes(plain)))
    with pytest.raises(data.DataError, match=r"train-labels.*(damaged|checksum)") as error:
        data.load(root=tmp_path)
    assert "\n" not in str(error.value)


def test_data_are_the_same_bits_whatever_the_threads_and_instructions():
    few = "data.load(train_size=10000, validation_size=1000).checksum"  # sums that depend on both in float32
    code = f"import torch; torch.set_num_threads(2); from lib import data; print({few})"
    env = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    there = subprocess.check_output([sys.executable, "-c", code], text=True, env=env).strip()
    assert there == data.load(train_size=10000, validation_size=1000).checksum


def test_mean_and_deviation_are_exact():
    pixels = torch.randint(0, 256, (50, 2, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = _mean_and_std(pixels, 255)
    for channel in range(2):
        values = [Fraction(v, 255) for v in pixels[:, channel].flatten().tolist()]
        exact = sum(values) / len(values)
        variance = sum((v - exact) ** 2 for v in values) / (len(values) - 1)
        assert mean[0, channel] == torch.tensor(float(exact))
        assert std[0, channel] == torch.tensor(float(variance) ** 0.5)


def test_unknown_name_and_missing_root_are_named():
    with pytest.raises(data.DataError, match=r"'fashion' is unknown: allowed are fashion_mnist, mnist"):
        data.load("fashion")
    with pytest.raises(data.DataError, match=r"no/such/folder.* is not a folder"):
        data.load(root="no/such/folder")


def test_data_root_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "gone"))
    with pytest.raises(data.DataError, match="gone"):
        data.load()


def test_data_root_may_lie_in_the_home_folder(monkeypatch, tmp_path):
    _write_mnist(tmp_path / "sets")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA_ROOT", "~/sets")
    assert len(data.load("mnist").test) == 20
    with pytest.raises(data.DataError, match="'~nobody-of-this-name/sets' is not a folder"):
        data.data_root("~nobody-of-this-name/sets")


def test_missing_mnist_says_where_it_looked(tmp_path, monkeypatch):
    from torchvision import datasets

    def no_network(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(datasets.MNIST, "download", no_network)
    with pytest.raises(data.DataError, match=f"mnist could not be read under {tmp_path}") as error:
        data.load("mnist", tmp_path)
    assert "\n" not in str(error.value)


@pytest.fixture(autouse=True)
def small_mnist(monkeypatch, request):
    if "another" not in request.node.name:
        monkeypatch.setattr(named, "MNIST_MD5", {})


def test_another_mnist_is_refused(tmp_path):
    """What was measured on the one would else be read for the other."""
    _write_mnist(tmp_path)
    with pytest.raises(data.DataError, match=r"train-images-idx3-ubyte is not MNIST's\); put the files there"):
        data.load("mnist", tmp_path)


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


@pytest.mark.parametrize(
    ("key", "value"),
    [("train_size", -1), ("test_size", -5), ("validation_size", -1), ("image_size", -8), ("test_size", 2.5)],
)
def test_sizes_are_natural_numbers(key, value):
    with pytest.raises(data.DataError, match=f"{key} = {value}: allowed are 0"):
        data.load(**{key: value})


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_sizes_may_be_whole_numbers_of_any_type(tmp_path, kind):
    _write_mnist(tmp_path)
    d = data.load("mnist", tmp_path, train_size=kind(7), test_size=kind(6), validation_size=kind(5))
    assert (len(d.train), len(d.test), len(d.validation)) == (7, 6, 5)


def test_more_images_than_there_are(tmp_path):
    _write_mnist(tmp_path)
    with pytest.raises(data.DataError, match="train_size = 81: mnist has 80 training images after validation"):
        data.load("mnist", tmp_path, train_size=81)
    with pytest.raises(data.DataError, match="test_size = 21: mnist has 20 test images"):
        data.load("mnist", tmp_path, test_size=21)


def test_no_split_is_empty_unasked(tmp_path):
    _write_mnist(tmp_path, n_train=4, n_test=4)
    with pytest.raises(data.DataError, match="mnist has 4 training images: no validation split"):
        data.load("mnist", tmp_path)
    d = data.load("mnist", tmp_path, validation_size=0)
    assert (len(d.train), len(d.validation)) == (4, 0)


def test_image_size_is_not_ignored():
    with pytest.raises(data.DataError, match="image_size = 32: mnist has a size of its own"):
        data.load("mnist", image_size=32)


# --- folders of images ------------------------------------------------------------------------------------------------


def _write(root, image, **more):
    """A folder with one class of five training images and one test image, all the same but for ``more``."""
    for part, n in (("train", 5), ("test", 1)):
        (root / part / "a").mkdir(parents=True)
        for i in range(n):
            image.save(root / part / "a" / f"{i}.{more.get('ending', 'png')}")
    return root


def test_a_cut_test_set_is_a_sample_of_all_classes(tmp_path):
    for part in ("train", "test"):
        for label in range(4):
            (tmp_path / part / str(label)).mkdir(parents=True)
            for i in range(100):
                Image.new("L", (1, 1), label).save(tmp_path / part / str(label) / f"{i}.png")
    whole, cut = data.load(str(tmp_path)), data.load(str(tmp_path), test_size=40)
    assert torch.equal(cut.test.y, whole.test.y[:40])
    for split in (cut.test, whole.train, whole.validation):
        assert split.y[:40].bincount(minlength=4).min() >= 4  # by chance 10 each
    assert whole.test.y.bincount().tolist() == [100] * 4


def test_a_channel_that_never_changes_is_only_shifted(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 10), ("test", 2)):
        (tmp_path / part / "a").mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            pixels[:, :, 1] = 179 if part == "train" else 230  # 179 / 255 is no float: sums of it are rounded
            Image.fromarray(pixels).save(tmp_path / part / "a" / f"{i}.png")
    d = data.load(str(tmp_path))
    assert not d.train.x[:, 1].any()
    assert torch.allclose(d.test.x[:, 1], torch.tensor((230 - 179) / 255))
    assert float(d.train.x[:, 0].std()) == pytest.approx(1, abs=1e-5)


GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    ("deep", "ending"),
    [
        (Image.fromarray(GREYS.astype(np.uint16) * 257), "png"),
        (Image.fromarray(GREYS.astype(np.uint16) * 257), "tiff"),
        (Image.fromarray((GREYS.astype(np.uint16) * 257).astype(">u2")), "tiff"),
        (Image.fromarray(GREYS.astype(np.int32) * 257), "tiff"),
        (Image.fromarray(GREYS.astype(np.float32) / 255), "tiff"),
    ],
    ids=["I;16 png", "I;16 tiff", "I;16B tiff", "I tiff", "F tiff"],
)
def test_deep_images_keep_their_range(tmp_path, deep, ending):
    shallow = data.load(str(_write(tmp_path / "8", Image.fromarray(GREYS))))
    scaled = data.load(str(_write(tmp_path / "16", deep, ending=ending)))
    assert torch.allclose(shallow.train.x, scaled.train.x, atol=1e-5)
    assert scaled.train.x.unique().numel() == 256
    half = data.load(str(tmp_path / "16"), image_size=8).train.x
    assert torch.allclose(half, data.load(str(tmp_path / "8"), image_size=8).train.x, atol=0.02)


def test_shallow_and_deep_images_share_a_scale(tmp_path):
    _write(tmp_path, Image.fromarray(np.full((4, 4), 51, np.uint8)))
    Image.fromarray(np.full((4, 4), 51 * 257, np.uint16)).save(tmp_path / "test" / "a" / "0.png")
    assert read_folder(tmp_path)[2].unique().tolist() == read_folder(tmp_path)[0].unique().tolist() == [51 * 257]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 70000, np.int32), "mode I with values from 70000 to 70000: allowed are 0 to 65535"),
        (np.full((4, 4), -1, np.int32), "mode I with values from -1"),
        (np.full((4, 4), 1.5, np.float32), "mode F with values from 1.5 to 1.5: allowed are 0 to 1"),
        (np.full((4, 4), np.nan, np.float32), "mode F with values from nan"),
    ],
)
def test_values_without_a_known_range_are_refused(tmp_path, values, message):
    _write(tmp_path, Image.fromarray(values), ending="tiff")
    with pytest.raises(data.DataError, match=rf"train/a/0.tiff cannot be read: {message}"):
        data.load(str(tmp_path))


def test_what_is_transparent_lies_on_white(tmp_path):
    clear, ink = np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2, 4), np.uint8)
    ink[..., 3] = 51  # a fifth of black
    palette = Image.fromarray(np.zeros((2, 2), np.uint8), "P")
    palette.putpalette([0, 0, 0])
    expected = [(Image.fromarray(clear), 255), (Image.fromarray(ink), 204)]
    expected += [(Image.fromarray(ink).convert("LA"), 204), (Image.new("RGB", (2, 2)), 0)]
    for i, (image, value) in enumerate(expected):
        x = read_folder(_write(tmp_path / str(i), image))[0]
        assert x.shape == (5, 3, 2, 2)
        assert x.unique().tolist() == [value]
    place = _write(tmp_path / "P", palette)
    palette.save(place / "train" / "a" / "0.png", transparency=0)
    assert read_folder(place)[0].flatten(1).unique(dim=1).flatten().tolist() == [255, 0, 0, 0, 0]


def test_hidden_folders_and_files_are_no_data(tmp_path):
    _write_folder(tmp_path)
    before, print_before = data.load(str(tmp_path)), data.fingerprint(str(tmp_path))
    for place in (tmp_path / "train", tmp_path / "train" / "cat", tmp_path / "test"):
        (place / ".ipynb_checkpoints").mkdir()
        shutil.copy(tmp_path / "train" / "cat" / "0.png", place / ".ipynb_checkpoints" / "0-checkpoint.png")
    shutil.copy(tmp_path / "train" / "cat" / "0.png", tmp_path / "test" / "dog" / "._0.png")
    after = data.load(str(tmp_path))
    assert (after.classes, after.checksum) == (2, before.checksum)
    assert data.fingerprint(str(tmp_path)) == print_before


def test_links_to_folders_count(tmp_path):
    _write_folder(tmp_path / "real")
    for part in ("train", "test"):
        (tmp_path / "linked" / part).mkdir(parents=True)
        for label in ("cat", "dog"):
            (tmp_path / "linked" / part / label).symlink_to(tmp_path / "real" / part / label)
    (tmp_path / "real" / "train" / "cat" / "up").symlink_to(tmp_path / "real" / "train")  # no way out of a circle
    linked = str(tmp_path / "linked")
    assert data.load(linked).checksum == data.load(str(tmp_path / "real")).checksum
    seen = [data.fingerprint(linked)]
    new = tmp_path / "real" / "train" / "dog" / "new.png"
    shutil.copy(tmp_path / "real" / "train" / "dog" / "0.png", new)
    seen.append(data.fingerprint(linked))
    os.utime(new, ns=(1, 1))
    seen.append(data.fingerprint(linked))
    assert len({*seen}) == 3


def test_sounds_of_a_folder_count(tmp_path):
    _write_folder(tmp_path)
    before = data.fingerprint(str(tmp_path))
    (tmp_path / "train" / "cat" / "meow.wav").write_bytes(b"RIFF")
    assert data.fingerprint(str(tmp_path)) != before


def test_an_image_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    _write_folder(tmp_path)
    victim = tmp_path / "train" / "dog" / "7.png"
    content = victim.read_bytes()
    for damage in (content[: len(content) // 2], content[:60] + bytes(100) + content[160:], b"no image", b""):
        victim.write_bytes(damage)
        with pytest.raises(data.DataError, match=r"image .*train/dog/7.png cannot be read: .+") as error:
            data.load(str(tmp_path))
        assert "\n" not in str(error.value)
    victim.unlink()
    victim.symlink_to(tmp_path / "gone.png")
    data.fingerprint(str(tmp_path))  # for the batch to go on and the study to say:
    with pytest.raises(data.DataError, match=r"train/dog/7.png cannot be read"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("limit", [600, 1000])  # more than twice PIL's limit is an error there, less only a warning
def test_a_decompression_bomb_is_named(tmp_path, monkeypatch, limit):
    _write_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit if limit == 1000 else 300)
    with pytest.raises(data.DataError, match=r"image .*train/cat/0.png cannot be read: .*decompression bomb"):
        data.load(str(tmp_path))


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    _write_folder(tmp_path)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(data.DataError, match="hold different classes: empty in one"):
        data.load(str(tmp_path))
    (tmp_path / "test" / "empty").mkdir()
    with pytest.raises(data.DataError, match="train/empty has no images"):
        data.load(str(tmp_path))


def test_training_and_test_images_have_one_size(tmp_path):
    _write_folder(tmp_path)
    for path in (tmp_path / "test").rglob("*.png"):
        Image.new("RGB", (24, 24)).save(path)
    with pytest.raises(data.DataError, match="differ in size; give image_size"):
        data.load(str(tmp_path))


# --- what data are told apart by --------------------------------------------------------------------------------------


@pytest.fixture
def corners():
    x = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    split = data.Split(x, torch.arange(6))
    return data.Data("corners", split, split, split, 6)


def test_checksum_is_that_of_the_tensors(corners):
    x, y = corners.train.x, corners.train.y
    same = [data.Split(x.clone(), y), data.Split(x.contiguous(memory_format=torch.channels_last), y)]
    same += [data.Split(x.flip(0).flip(0), y.clone()), corners.train.to("cpu"), deepcopy(corners).train]
    same += [pickle.loads(pickle.dumps(corners)).train]
    assert {s.checksum for s in same} == {corners.train.checksum}
    moved = x.clone()
    moved[5, 2, 1, 1] += 1e-6
    others = [data.Split(moved, y), data.Split(x, y + 1), data.Split(x, y.int()), data.Split(x.reshape(6, 3, 4), y)]
    others += [data.Split(x.bfloat16(), y), data.Split(x.double(), y), data.Split(x > 0, y), data.Split(y, x)]
    assert len({s.checksum for s in [corners.train, *others]}) == 1 + len(others)


def test_other_tensors_are_other_data(corners):
    half = data.Split(corners.train.x[:3], corners.train.y[:3])
    kinds = [replace(corners, train=half), replace(corners, validation=half), replace(corners, test=half)]
    assert len({d.checksum for d in (corners, *kinds)}) == 4


def test_a_change_in_place_changes_the_checksum(corners):
    before = corners.checksum
    corners.train.x[2:].add_(1)  # a view of it
    assert corners.checksum != before
    with torch.inference_mode():
        split = data.Split(torch.zeros(2, 2), torch.zeros(2))
        first = split.checksum
        split.x[0] += 1
        assert split.checksum != first


def test_a_change_that_torch_does_not_count_changes_the_checksum():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    split, found = data.Split(torch.from_numpy(array), torch.zeros(4)), []
    for change in (lambda: None, lambda: array.fill(1), lambda: split.x.data.mul_(2), lambda: split.y.data.add_(1)):
        change()
        found.append(split.checksum)
    array[:] = np.arange(24).reshape(4, 6)
    found.append(split.checksum)
    array[:] = array[::-1].copy()  # the same numbers in another order
    assert len({*found, split.checksum}) == 6


@pytest.mark.parametrize("through", ["torch", "data", "numpy"])
def test_examples_that_are_exchanged_change_the_checksum(through):
    random = torch.Generator().manual_seed(0)
    split = data.Split(torch.randn(6000, 1, 2, 2, generator=random), torch.arange(6000) % 7)
    pairs = torch.randperm(6000, generator=random)[:120]
    found = [split.checksum]
    for tensor in (split.y, split.x):
        for which in (pairs, pairs[:2]):
            place = {"torch": tensor, "data": tensor.data, "numpy": tensor.numpy()}[through]
            place[which if through != "numpy" else which.numpy()] = place[which.flip(0)]  # the sum of bits stays
            found.append(split.checksum)
    assert len({*found}) == 5
    assert found[-1] == data.Split(split.x.clone(), split.y.clone()).checksum


def test_a_tensor_is_hashed_once(corners, monkeypatch):
    corners.checksum  # noqa: B018
    monkeypatch.setattr(torch.Tensor, "flatten", lambda self: pytest.fail("looked at again"))
    assert corners.checksum == data.Data("again", *[corners.train] * 3, 6).checksum


# --- the task ---------------------------------------------------------------------------------------------------------


def absolute(output, y):
    return (output - y).abs().mean()


def closeness(output, y):
    return (-(output - y).abs()).sum(), torch.tensor(y.numel())


REGRESSION = data.Task("regression", absolute, closeness)


def test_accuracy_over_batches_is_that_of_the_whole():
    random = torch.Generator().manual_seed(0)
    output = torch.randn(50, 5, 7, generator=random)  # seven labels of five classes in each of fifty sequences
    y = torch.randint(0, 5, (50, 7), generator=random)
    y[torch.arange(7) >= torch.randint(1, 8, (50, 1), generator=random)] = data.PADDING
    right = sum(int(output[n, :, t].argmax() == y[n, t]) for n in range(50) for t in range(7) if y[n, t] >= 0)
    for size in (50, 7, 1):
        sums = [data.accuracy(*pair) for pair in zip(output.split(size), y.split(size), strict=True)]
        assert [int(sum(column)) for column in zip(*sums, strict=True)] == [right, int((y >= 0).sum())]
    counted = (y >= 0).flatten()
    flat = output.movedim(1, 2).flatten(0, 1)[counted]
    loss = torch.nn.functional.cross_entropy(flat, y.flatten()[counted])
    assert torch.allclose(data.classification.loss(output, y), loss)


@pytest.mark.parametrize(
    ("output", "y"), [((4, 3), (4, 1)), ((4, 1), (4,)), ((4, 3, 2), (4,)), ((4, 3), (4, 3)), ((4,), (4,))]
)
def test_labels_that_do_not_fit_outputs_have_no_accuracy(output, y):
    told = re.escape(f"outputs {output} and labels {y}: expected (N, classes, ...) of 2 classes or more, and (N, ...)")
    with pytest.raises(data.DataError, match=told):
        data.accuracy(torch.zeros(output), torch.zeros(y, dtype=torch.int64))


@pytest.mark.parametrize(
    ("y", "told"),
    [
        (torch.arange(1, 5), "corners', validation: labels from 1 to 4: expected 0 to 3"),
        (torch.tensor([0, 1, -1, 2]), "labels from -1 to 2: expected 0 to 3"),
        (torch.arange(4.0), r"labels are torch.float32: expected int64"),
        (torch.eye(4), r"labels are torch.float32: expected int64"),
    ],
)
def test_labels_are_numbers_of_classes(y, told):
    right = data.Split(torch.zeros(4, 1, 2, 2), torch.tensor([0, 3, data.PADDING, 1]))
    assert data.Data("corners", right, right, right, 4).classes == 4
    with pytest.raises(data.DataError, match=told):
        data.Data("corners", right, replace(right, y=y), right, 4)


def test_scores_of_many_chips_at_once():
    outputs, y = torch.randn(3, 8, 5), torch.randint(0, 5, (8,))
    right, of = torch.vmap(data.accuracy, in_dims=(0, None))(outputs, y)
    assert right.tolist() == [int(data.accuracy(o, y)[0]) for o in outputs]
    assert of.tolist() == [8, 8, 8]


def test_a_split_keeps_its_task(corners):
    sequences = data.Split(torch.zeros(4, 9, 2), torch.zeros(4, 9), REGRESSION)  # no images: no channels_last
    d = data.Data("steps", sequences, sequences, sequences, 1)
    for again in (d.to("cpu"), pickle.loads(pickle.dumps(d)), deepcopy(d), replace(d, name="other")):
        assert again.task == again.test.task == REGRESSION
        assert again.train.y.dtype == torch.float32
    assert d.shape == (9, 2)
    with pytest.raises(data.DataError, match="different tasks, regression, classification"):
        replace(d, test=corners.test)
    assert corners.task == data.classification


def test_a_split_refuses_what_is_none(corners):
    with pytest.raises(data.DataError, match="a split of 6 x and 5 y"):
        data.Split(corners.train.x, corners.train.y[:5])
    with pytest.raises(data.DataError, match="task = 'corners': allowed is a Task"):
        data.Split(corners.train.x, corners.train.y, "corners")


def test_the_task_is_part_of_a_key(corners):
    def key(task):
        return content(data.Data("d", *[replace(corners.train, task=task)] * 3, 6))

    tasks = [data.classification, REGRESSION, replace(REGRESSION, loss=torch.nn.functional.l1_loss)]
    assert len({str(key(task)) for task in tasks}) == 3
    assert key(REGRESSION) == key(replace(REGRESSION))


@pytest.fixture
def reviews(tmp_path):
    (tmp_path / "text").mkdir()
    lines = ["1 A fine , fine film", "0 a dull film", "1 fine", "0 dull \xc3\x85 dull"] * 3
    (tmp_path / "text" / "stsa.binary.train").write_bytes("\n".join(lines).encode("latin-1"))
    (tmp_path / "text" / "stsa.binary.test").write_text("0 dull\n1 nothing known\n", "utf-8")
    return tmp_path


def test_sentences_are_bags_of_the_most_frequent_training_words(reviews):
    found = data.texts("sst2", reviews, words=3, validation_size=2)  # fine and dull 9 times each, "a" and "film" 6
    assert (found.shape, found.classes, len(found.train), len(found.validation)) == ((3,), 2, 10, 2)
    assert found.test.x.tolist() == [[1, 0, 0], [0, 0, 0]]  # dull first, as letters decide between equals
    assert found.test.y.tolist() == [0, 1]
    every = torch.cat([found.train.x, found.validation.x])
    assert torch.allclose(every.norm(dim=1), torch.ones(12))
    dull, fine, a = sorted(every.unique(dim=0).tolist())[-1], [0, 1, 0], (1 / 5) ** 0.5
    assert dull == [1, 0, 0]
    assert fine in every.tolist()
    assert any(row == pytest.approx([0, 2 * a, a]) for row in every.tolist())  # fine twice, "a" once


def test_what_sentences_are_refused(reviews):
    for wrong, said in (
        ({"name": "imdb"}, "texts .imdb. are unknown: allowed are trec, sst2"),
        ({"name": "trec"}, "TREC.train cannot be read .*data/README.md says where to get it"),
        ({"name": "sst2", "words": 0}, "words = 0: allowed are whole numbers from 1"),
        ({"name": "sst2", "train_size": 11}, "sst2 has 10 such sentences"),
    ):
        with pytest.raises(data.DataError, match=said):
            data.texts(**{"root": reviews} | wrong)
    (reviews / "text" / "stsa.binary.test").write_text("2 strange\n", "utf-8")
    with pytest.raises(data.DataError, match="class 2 is in the test sentences only"):
        data.texts("sst2", reviews)
    (reviews / "text" / "stsa.binary.test").write_text("positive\n", "utf-8")
    with pytest.raises(data.DataError, match="a label, a space and a sentence"):
        data.texts("sst2", reviews)
