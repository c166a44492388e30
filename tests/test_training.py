import errno
import functools
import hashlib
import importlib
import io
import multiprocessing
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lib import files
from lib.keys import KeysError
from lib.models import build
from lib.training import Hook, TrainingError, cache, cached, evaluate, fit, learning_rate, loop, steps_per_epoch

PROJECT = Path(__file__).resolve().parent.parent

PROJECT = Path(__file__).resolve().parent.parent


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["lenet5", "resnet8"])
def test_training_twice_gives_the_same_bits(images, name):
    options = {"width": 4} if name == "resnet8" else {}
    a, b = (build(name, images.shape, images.classes, seed=2, **options) for _ in range(2))
    torch.rand(17)  # whatever was drawn before must not matter
    first = fit(a, images, epochs=2, lr=0.05, seed=5)
    torch.rand(3)
    second = fit(b, images, epochs=2, lr=0.05, seed=5)
    assert same(a, b)
    pd.testing.assert_frame_equal(first, second)


def test_the_seed_orders_the_data(images, net):
    other = deepcopy(net)
    fit(net, images, epochs=1, lr=0.05, seed=0)
    fit(other, images, epochs=1, lr=0.05, seed=1)
    assert not same(net, other)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.05), ("adam", 0.001)])
def test_training_learns(images, net, optimizer, lr):
    history = fit(net, images, epochs=8, lr=lr, optimizer=optimizer, schedule="cosine")
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert evaluate(net, images.test) > 0.2  # twice what guessing gives


def test_stopping_early_is_the_beginning_of_the_same_run(images, net):
    class Snapshot(Hook):
        def after_epoch(self, model, epoch):
            if epoch == 1:
                self.state = deepcopy(model.state_dict())

    whole, snapshot = deepcopy(net), Snapshot()
    fit(whole, images, epochs=4, lr=0.05, hooks=(snapshot,))
    fit(net, images, epochs=4, lr=0.05, stop=2 * steps_per_epoch(images))
    assert all(torch.equal(net.state_dict()[k], v) for k, v in snapshot.state.items())


def test_schedules():
    steps = [learning_rate("step", 1.0, e / 150) for e in (0, 79, 80, 119, 120, 149)]
    assert steps == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert learning_rate("cosine", 1.0, 0.5) == pytest.approx(0.5)
    assert learning_rate("constant", 0.3, 0.9) == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"schedule": "linear"}, "'linear': allowed are 'constant', 'step' and 'cosine'"),
        ({"optimizer": "lion"}, "'lion': allowed are 'sgd' and 'adam'"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_settings_are_named(images, net, options, message):
    with pytest.raises(TrainingError, match=message):
        fit(net, images, **({"epochs": 1, "lr": 0.1} | options))


@pytest.mark.parametrize(("given", "told"), [(lambda y: y.square(), r"a tensor \(128, 10\)"), (lambda y: 1.0, "1.0")])
def test_an_objective_that_is_no_number_is_refused(images, net, given, told):
    with pytest.raises(TrainingError, match=f"the loss is {told}: what is minimized is one number"):
        fit(net, images, epochs=1, lr=0.05, objective=lambda model, x, y, output: given(output))


def test_divergence_is_reported(images, net):
    with pytest.raises(TrainingError, match=r"diverged in epoch 1.*lower lr"):
        fit(net, images, epochs=1, lr=1e6)


def test_evaluate_counts_and_keeps_the_mode(images, net):
    net.train()
    with torch.no_grad():
        right = (net(images.test.x).argmax(1) == images.test.y).float().mean()
    assert evaluate(net, images.test, batch_size=77) == pytest.approx(float(right))
    assert net.training


# --- cache ------------------------------------------------------------------------------------------------------------


def test_cache_gives_back_the_same_run(images, net):
    fresh, again, said = deepcopy(net), deepcopy(net), []
    first = cached(fit, fresh, images, epochs=1, lr=0.05)
    second = cached(fit, again, images, epochs=1, lr=0.05, progress=lambda done, text: said.append(text))
    assert same(fresh, again)
    assert said == ["from the cache"]
    pd.testing.assert_frame_equal(first, second)


def test_cache_key_holds_all_that_determines_the_result(images, net, monkeypatch):
    other_net, other_data = deepcopy(net), deepcopy(images)
    with torch.no_grad():
        other_net.fc1.weight[0, 0] += 1e-6
    other_data.train.x[0, 0, 0, 0] += 1
    given = {"epochs": 1, "lr": 0.05}
    base = cache._key(fit, net, (images,), given)
    assert cache._key(fit, net, (images,), dict(reversed(given.items()))) == base
    keys = [
        cache._key(fit, other_net, (images,), given),
        cache._key(fit, net, (other_data,), given),
        cache._key(fit, net, (images,), given | {"lr": 0.051}),
        cache._key(fit, net.requires_grad_(False), (images,), given),
    ]
    net.requires_grad_(True)
    torch.set_num_threads(2)
    keys.append(cache._key(fit, net, (images,), given))
    torch.set_num_threads(1)
    monkeypatch.setattr(loop, "learning_rate", lambda schedule, lr, progress: lr)
    keys.append(cache._key(fit, net, (images,), given))
    assert len({base, *keys}) == 7


def test_cache_key_holds_how_precisely_torch_computes(images, net):
    def key():
        return cache._key(fit, net, (images,), {"epochs": 1})

    base, keys = key(), []
    for kind in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=kind):
            keys.append(key())
    for precision in ("high", "medium", "highest"):  # highest: what it is unasked
        torch.set_float32_matmul_precision(precision)
        keys.append(key())
    torch.backends.cudnn.allow_tf32 = False
    keys.append(key())
    torch.backends.cudnn.allow_tf32 = True
    assert [len({*keys}), keys[4], key()] == [6, base, base]
    assert not cache._told("cpu")  # so that what was kept before holds


def test_an_account_of_storage_is_no_reason_to_train_again(images, net, tmp_path):
    """A set's ``storage_bits`` may change and the runs toward it stay; any other method of it makes new ones."""

    def key(projection, bits):
        path = tmp_path / f"{projection} {bits}.py".replace("*", "x")
        path.write_text(
            f"class Set:\n    def project(self, w):\n        return {projection}\n\n"
            f"    def storage_bits(self, z, bits):\n        return {bits}\n"
        )
        space = {"__name__": "own"}
        exec(compile(path.read_text(), str(path), "exec"), space)
        return cache._key(fit, net, (images, {"fc1": space["Set"]()}), {})

    assert key("w", "bits") == key("w", "2 * bits") != key("2 * w", "bits")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_entry_is_never_trusted(images, net, damage, tmp_path):
    good = deepcopy(net)
    cached(fit, good, images, epochs=1, lr=0.05)
    (entry,) = (tmp_path / "cache" / "fit").glob("*.pt")
    raw = bytearray(entry.read_bytes())
    raw[len(raw) // 2] ^= 255
    entry.write_bytes({"truncated": raw[: len(raw) // 2], "flipped": raw, "empty": b""}[damage])
    with pytest.warns(UserWarning, match="is damaged; computing it anew"):
        cached(fit, net, images, epochs=1, lr=0.05)
    assert same(good, net)


def _worker(images, net, path, results):
    torch.set_num_threads(1)
    calls = []
    real = loop.batches
    loop.batches = lambda *a: calls.append(1) or real(*a)
    cached(fit, net, images, epochs=2, lr=0.05)
    results.put((len(calls), float(net.fc1.weight.detach().sum())))


def test_two_processes_compute_an_entry_once(images, net, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_worker, args=(images, deepcopy(net), tmp_path, results)) for _ in range(2)]
    for w in workers:
        w.start()
    found = [results.get(timeout=120) for _ in workers]
    for w in workers:
        w.join()
    assert sorted(calls for calls, _ in found) == [0, 2]
    assert found[0][1] == found[1][1]


def test_an_entry_of_another_network_is_computed_anew(images, net, tmp_path):
    """Whatever wrote it: nothing of it is loaded."""
    good = deepcopy(net)
    cached(fit, good, images, epochs=1, lr=0.05)
    (entry,) = (tmp_path / "cache" / "fit").glob("*.pt")
    saved = torch.load(io.BytesIO(entry.read_bytes()[32:]), weights_only=True)
    for wrong in (saved | {"state": {"fc1.weight": torch.zeros(2)}}, [1], {"state": {}}):
        payload = io.BytesIO()
        torch.save(wrong, payload)
        entry.write_bytes(hashlib.sha256(payload.getvalue()).digest() + payload.getvalue())
        again = deepcopy(net)
        with pytest.warns(UserWarning, match=r"cache file fit/.*\.pt is of another network; computing it anew"):
            cached(fit, again, images, epochs=1, lr=0.05)
        assert same(good, again)


def test_frozen_layers_stay_where_free_ones_were_cached(images, net):
    frozen = deepcopy(net)
    frozen.fc2.requires_grad_(False)
    cached(fit, net, images, epochs=1, lr=0.05)
    before = frozen.fc2.weight.clone()
    cached(fit, frozen, images, epochs=1, lr=0.05)
    assert torch.equal(frozen.fc2.weight, before)
    assert not torch.equal(frozen.fc1.weight, net.fc1.weight)


def test_an_attribute_that_the_forward_pass_reads_makes_another_run(images):
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.factor = nn.Linear(784, 10), factor

        def forward(self, x):
            return self.factor * self.layer(x.flatten(1))

    losses = [cached(fit, Scaled(factor), images, epochs=1, lr=0.01)["train_loss"].item() for factor in (1.0, 3.0, 1.0)]
    assert losses[0] == losses[2] != losses[1]


EDITED = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(784, 10)
    def forward(self, x): return {sign} self.fc(x.flatten(1))
"""


def test_an_edited_forward_pass_of_a_user_s_own_file_trains_again(images, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which tells two files of one second apart by their size
    said = []
    for sign in ("+", "-", "+"):
        (tmp_path / "own.py").write_text(EDITED.format(sign=sign))
        sys.modules.pop("own", None)
        torch.manual_seed(0)
        net = importlib.import_module("own").Net()
        cached(fit, net, images, epochs=1, lr=0.01, progress=lambda done, text: said.append(text))
    assert said[0] != said[1]
    assert said[2] == "from the cache"
    sys.modules.pop("own")


def freeze(model, data, progress=None):
    """Changes what no entry holds."""
    model.fc1.requires_grad_(False)


def test_a_function_that_changes_more_than_the_state_is_told_and_not_kept(images, net):
    class Counting(Hook):
        count = 0

        def before_epoch(self, model, epoch):
            self.count += 1

    hook = Counting()
    for attempt in range(2):
        with pytest.warns(UserWarning, match="fit changed more than the model's state_dict: nothing is kept"):
            cached(fit, deepcopy(net), images, epochs=1, lr=0.1, hooks=(hook,))
        assert hook.count == attempt + 1
    for _ in range(2):
        again = deepcopy(net)
        with pytest.warns(UserWarning, match="freeze changed more"):
            cached(freeze, again, images)
        assert not again.fc1.weight.requires_grad


def returns(value):
    def run(model, data, progress=None):
        return value

    return run


FRAME = pd.DataFrame({"epoch": [1, 2], "loss": [0.5, float("nan")], "name": ["a", "b"]})


@pytest.mark.parametrize(
    "value",
    [None, 1, "text", (1, [2.0, FRAME]), {"log": FRAME, 3: (True, None)}, np.float64(0.5), []],
    ids=str,
)
def test_what_comes_back_from_the_cache_is_what_came_first(images, net, value):
    first, again = (cached(returns(value), deepcopy(net), images) for _ in range(2))
    assert repr(first) == repr(again) == repr(value.item() if isinstance(value, np.generic) else value)
    assert type(first) is type(again)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.Size([1, 2]), "a Size"),
        (FRAME.set_index("epoch"), "a data frame with an index or types of its own"),
        (FRAME.astype({"loss": "float32"}), "a data frame with an index or types of its own"),
        ([{1, 2}], "a set"),
    ],
)
def test_what_would_come_back_as_something_else_is_told_and_not_kept(images, net, value, told):
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"run returned {told}.*: nothing is kept"):
            assert cached(returns(value), deepcopy(net), images) is value


def still(model, data, progress=None):
    """Leaves a part of the network in evaluation mode."""
    model.fc1.eval()


def test_the_mode_of_every_layer_is_that_after_the_run(images, net):
    for _ in range(2):
        again = deepcopy(net)
        cached(still, again, images)
        assert [name for name, module in again.named_modules() if not module.training] == ["fc1"]


def test_arguments_that_cannot_be_told_are_refused(images, net):
    with pytest.raises(KeysError, match=r"cannot tell when two generator are the same \(\['hooks'\]\)"):
        cached(fit, net, images, epochs=1, lr=0.1, hooks=(hook for hook in ()))


def one_epoch(net, data, **given):
    return fit(net, data, epochs=1, **given)


@pytest.mark.parametrize(
    "function", [functools.partial(fit, epochs=1), lambda *args, **given: one_epoch(*args, **given)]
)
def test_functions_without_a_name_can_be_cached(images, net, function):
    first, again = deepcopy(net), deepcopy(net)
    cached(function, first, images, lr=0.05)
    said = []
    cached(function, again, images, lr=0.05, progress=lambda done, text: said.append(text))
    assert said == ["from the cache"]
    assert same(first, again)


def test_the_cache_lies_at_home_and_at_one_place_for_all_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CACHE_ROOT", "~/mine")
    assert files.cache_folder("fit") == tmp_path / "mine" / "fit"
    assert (tmp_path / "mine" / "fit").is_dir()
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "a" / ".." / "b"))
    assert files.cache_folder().is_dir()
    monkeypatch.setattr(files, "CACHE_ROOT", tmp_path / "project" / ".cache")
    for given, place in (("", ".cache"), ("shared/x", "shared/x")):
        monkeypatch.setenv("CACHE_ROOT", given)
        for folder in (tmp_path, PROJECT):
            monkeypatch.chdir(folder)
            assert files.cache_folder("fit") == tmp_path / "project" / place / "fit"
    monkeypatch.setenv("CACHE_ROOT", "~no such user/x")
    with pytest.raises(OSError, match="CACHE_ROOT=~no such user/x: there is no such user"):
        files.cache_folder()


# --- files ------------------------------------------------------------------------------------------------------------


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "table.csv"
    target.write_text("old")
    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match=r"cannot write .*table.csv: No space left on device"):
        files.write_whole(target, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert target.read_text() == "old"


def test_cache_on_a_full_disk_names_the_file(images, net, monkeypatch, tmp_path):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match=r"cannot write .*cache.*: No space left"):
        cached(fit, net, images, epochs=1, lr=0.05)
    assert not list((tmp_path / "cache" / "fit").glob("*.pt"))
