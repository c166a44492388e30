import errno
import multiprocessing
import sys
from copy import deepcopy

import pandas as pd
import pytest
import torch

from lib import files
from lib.keys import code_version
from lib.models import build
from lib.training import Hook, TrainingError, cache, cached, evaluate, fit, learning_rate, loop, steps_per_epoch


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
    assert history["train_loss"].iloc[-1] < 0.5 * history["train_loss"].iloc[0]
    assert evaluate(net, images.test) > 0.7


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


def count_calls(monkeypatch):
    calls = []
    real = loop.batches
    monkeypatch.setattr(loop, "batches", lambda *a: calls.append(1) or real(*a))
    return calls


def test_cache_gives_back_the_same_run(images, net, monkeypatch):
    fresh, again = deepcopy(net), deepcopy(net)
    calls = count_calls(monkeypatch)
    first = cached(fit, fresh, images, epochs=1, lr=0.05)
    second = cached(fit, again, images, epochs=1, lr=0.05)
    assert same(fresh, again)
    assert len(calls) == 1
    pd.testing.assert_frame_equal(first, second)


def test_cache_key_holds_all_that_determines_the_result(images, net, monkeypatch):
    other_net, other_data = deepcopy(net), deepcopy(images)
    with torch.no_grad():
        other_net.fc1.weight[0, 0] += 1e-6
    other_data.train.x[0, 0, 0, 0] += 1
    base = cache._key(fit, net, (images,), {"epochs": 1, "lr": 0.05})
    keys = [
        cache._key(fit, other_net, (images,), {"epochs": 1, "lr": 0.05}),
        cache._key(fit, net, (other_data,), {"epochs": 1, "lr": 0.05}),
        cache._key(fit, net, (images,), {"epochs": 1, "lr": 0.051}),
    ]
    torch.set_num_threads(2)
    keys.append(cache._key(fit, net, (images,), {"epochs": 1, "lr": 0.05}))
    torch.set_num_threads(1)
    monkeypatch.setattr(loop, "learning_rate", lambda schedule, lr, progress: lr)
    loop.learning_rate.__module__ = "lib.training.loop"
    keys.append(cache._key(fit, net, (images,), {"epochs": 1, "lr": 0.05}))
    assert len({base, *keys}) == 6


def version(tmp_path, helper, constant=1):
    """The version of a function that calls ``helper``, which may use CONSTANT."""
    source = (
        f'CONSTANT = {constant}\n\ndef helper(x):\n    {helper}\n\ndef top(x):\n    """Doc."""\n    return helper(x)\n'
    )
    path = tmp_path / f"m{abs(hash(source))}.py"
    path.write_text(source)
    space = {"__name__": "lib.made_up"}
    exec(compile(source, str(path), "exec"), space)
    return code_version(space["top"])


@pytest.mark.parametrize(
    "frame", ["class Own:\n    limit = {1}\n    def select(self, w): return {0}", "Own = lambda w: {0}"]
)
def test_code_version_sees_what_a_notebook_defines(frame):
    """Python has no source of classes from notebook cells; an edited set must not get the old one's networks."""

    def own(expression, limit=1):
        cell = {"__name__": "__main__"}
        exec(frame.format(expression, limit), cell)
        return code_version(cell["Own"])

    assert own("w.abs() > 1") == own("w.abs() > 1")
    assert len({own("w.abs() > 1"), own("w.abs() > 2"), own("w.abs() < 1"), own("w.sign() > 1")}) == 4
    assert (own("w.abs() > 1", 2) != own("w.abs() > 1")) == ("limit" in frame)


def test_code_version_ignores_comments_and_follows_calls_and_constants(tmp_path):
    base = version(tmp_path, "return x + CONSTANT")
    assert base == version(tmp_path, "return x + CONSTANT  # why")
    assert base != version(tmp_path, "return x - CONSTANT")
    assert base != version(tmp_path, "return x + CONSTANT", constant=2)


def test_an_account_of_storage_is_no_reason_to_train_again(tmp_path):
    """A set's ``storage_bits`` may change and the runs toward it stay; any other method of it makes new ones."""
    from importlib import util

    def version_of(name, projection, bits):
        path = tmp_path / f"{name}.py"
        path.write_text(
            f"class Set:\n    def project(self, w):\n        return {projection}\n\n"
            f"    def storage_bits(self, z, bits):\n        return {bits}\n"
        )
        spec = util.spec_from_file_location("lib.made_up", path)
        spec.loader.exec_module(module := util.module_from_spec(spec))
        sys.modules["lib.made_up"] = module
        return code_version(module.Set)

    base = version_of("a", "w", "bits")
    assert version_of("b", "w", "2 * bits") == base
    assert version_of("c", "2 * w", "bits") != base
    del sys.modules["lib.made_up"]


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


def test_unknown_argument_types_are_refused(images, net):
    with pytest.raises(TypeError, match="cannot tell when two Hook"):
        cached(fit, net, images, epochs=1, lr=0.1, hooks=(Hook(),))


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
