"""Files of compressed networks: what is written comes back to the bit, in as few bits as the account says."""

import math
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

from lib import export
from lib.constraint import attach_masks, fitted, harden, project, state_of, weights
from lib.costs import network_storage
from lib.export import ExportError
from lib.models import build
from lib.pruning import Column, Filter, FilterColumn, Unstructured, uniform_plan
from lib.quantization import Levels, Quantized, binary, ternary
from lib.recipes import one_shot
from lib.shapes import prunable

PLANS = {
    "dense": None,
    "few": Unstructured(0.99),
    "half": Unstructured(0.5),
    "filters and columns": FilterColumn(0.5, 0.5),
    "binary": binary(),
    "ternary": ternary(),
    "31 levels": Levels(31),
    "joint": Quantized(Unstructured(0.97), Levels(2)),
    "columns, 4 levels": Quantized(Column(0.8), Levels(4)),
    "filters, with zero": Quantized(Filter(0.5), Levels(3, zero=True)),
}


def compressed(name, model="lenet5"):
    net = build(model, (1, 28, 28), 10, seed=3)
    with torch.no_grad():
        for layer in prunable(net).values():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(4)))
    plan = uniform_plan(net, PLANS[name]) if PLANS[name] else {}
    return (harden(net, fitted(net, plan)), fitted(net, plan)) if plan else (net, plan)


@pytest.mark.parametrize("name", PLANS)
def test_bit_for_bit(name, tmp_path):
    net, _ = compressed(name)
    bill = export.save(net, tmp_path / "net.safetensors")
    fresh = export.restore(build("lenet5", (1, 28, 28), 10, seed=9), tmp_path / "net.safetensors")
    want, found = net.state_dict(), fresh.state_dict()
    assert all(torch.equal(want[n], found[n]) and want[n].dtype == found[n].dtype for n in want)
    x = torch.randn(5, 1, 28, 28)
    assert torch.equal(net(x), fresh(x))
    assert bill["kept"].tolist() == [int(w.count_nonzero()) for w in weights(net, prunable(net)).values()]


@pytest.mark.parametrize("name", [n for n in PLANS if PLANS[n]])
def test_size_on_disk_is_within_five_per_cent_of_the_account(name, tmp_path):
    net, plan = compressed(name)
    export.save(net, tmp_path / "net.safetensors")
    account = network_storage(net, plan, 32)[["data_bits", "index_bits", "table_bits"]].sum().sum() / 8
    others = sum(p.numel() * 4 for n, p in net.state_dict().items() if "bias" in n)
    raw = (tmp_path / "net.safetensors").read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    assert len(raw) - others - header == pytest.approx(account, rel=0.05)
    assert header < 1200


def test_masks_are_baked_in_and_other_parameters_kept(tmp_path):
    net = build("resnet8", (3, 32, 32), 10, seed=1, width=4)
    net(torch.randn(8, 3, 32, 32))
    attach_masks(net, one_shot(net, uniform_plan(net, Unstructured(0.9))))
    export.save(net, tmp_path / "a.safetensors")
    found, want = export.read(tmp_path / "a.safetensors"), state_of(net)
    assert set(found) == set(want)
    assert all(torch.equal(found[n], want[n]) for n in want)
    assert found["bn1.num_batches_tracked"].dtype == torch.int64


def test_the_cheapest_way_is_taken(tmp_path):
    net = build("lenet300", (1, 28, 28), 10)
    layers = prunable(net)
    with torch.no_grad():
        w = layers["fc1"].weight  # whole rows
        w[30:] = 0
        layers["fc2"].weight.copy_(project({"fc2": Levels(2)}, {"fc2": layers["fc2"].weight})["fc2"])
        layers["fc3"].weight.copy_(project({"fc3": Unstructured(0.99)}, {"fc3": layers["fc3"].weight})["fc3"])
    bill = export.save(net, tmp_path / "a.safetensors").set_index("layer")
    assert bill["positions"].to_dict() == {"fc1": "submatrix", "fc2": "all", "fc3": "runs"}
    assert bill["values"].to_dict() == {"fc1": "raw", "fc2": "step", "fc3": "raw"}
    assert bill.loc["fc2", "data_bits"] == 2 * 300 * 100


def test_edge_weights(tmp_path):
    net = build("lenet300", (1, 28, 28), 10)
    layers = prunable(net)
    with torch.no_grad():
        layers["fc1"].weight.zero_()
        layers["fc2"].weight.fill_(0.3)
        layers["fc3"].weight.zero_()
        layers["fc3"].weight[9, 99] = -1e-30  # after the longest run
    export.save(net, tmp_path / "a.safetensors")
    found = export.read(tmp_path / "a.safetensors")
    assert all(torch.equal(found[f"{n}.weight"], layer.weight) for n, layer in layers.items())


def test_levels_that_are_no_multiples_are_listed(tmp_path):
    net = build("lenet300", (1, 28, 28), 10)
    layer = prunable(net)["fc2"]
    levels = torch.tensor([-0.7, 0.1234, math.pi])
    with torch.no_grad():
        layer.weight.copy_(levels[torch.randint(3, layer.weight.shape)])
    bill = export.save(net, tmp_path / "a.safetensors").set_index("layer")
    assert bill.loc["fc2", ["values", "data_bits", "table_bits"]].tolist() == ["table", 2 * 30000, 96]
    assert torch.equal(export.read(tmp_path / "a.safetensors")["fc2.weight"], layer.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["dense", "half", "filters and columns", "ternary", "31 levels"])
def test_numbers_of_16_bits(name, dtype, tmp_path):
    net = compressed(name)[0].to(dtype)
    bill = export.save(net, tmp_path / "net.safetensors")
    fresh = export.restore(build("lenet5", (1, 28, 28), 10, seed=9).to(dtype), tmp_path / "net.safetensors")
    assert all(torch.equal(v, fresh.state_dict()[n]) for n, v in net.state_dict().items())
    assert bill["data_bits"].max() <= 400_000 * 16
    with pytest.raises(ExportError, match=f"is {dtype}, in the model torch.float32"):
        export.restore(build("lenet5", (1, 28, 28), 10), tmp_path / "net.safetensors")


class Shares(nn.Module):
    """A weight, a bias, a batch norm and an embedding under two names each, and a part of a tensor."""

    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight, self.two.bias, self.out.weight = self.one.weight, self.one.bias, self.words.weight
        self.norm = self.again = nn.BatchNorm1d(4)
        self.register_buffer("part", self.norm.running_mean[1:3])

    def forward(self, x):
        return self.out(self.again(self.two(self.norm(self.one(self.words(x))))))


def test_a_tensor_of_several_names_is_stored_once(tmp_path):
    torch.manual_seed(0)
    net, path = Shares(), tmp_path / "net.safetensors"
    net(torch.arange(9))
    assert export.save(net, path)["layer"].tolist() == ["out", "one"]
    assert not {"two.weight", "two.bias", "again.weight", "out.weight"} & load_file(path).keys()
    torch.manual_seed(1)
    found, fresh = export.read(path), export.restore(Shares(), path)
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(v, found[n]) and torch.equal(v, fresh.state_dict()[n]) for n, v in net.state_dict().items())
    assert found["two.weight"] is found["one.weight"]
    assert torch.equal(net.eval()(torch.arange(9)), fresh.eval()(torch.arange(9)))


def test_two_tensors_are_not_put_into_one(tmp_path):
    net, path = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), tmp_path / "net.safetensors"
    export.save(net, path)
    net[1].weight = net[0].weight
    before = net[0].weight.clone()
    with pytest.raises(ExportError, match=r"1.weight and 0.weight are two tensors, in the model they are one"):
        export.restore(net, path)
    assert torch.equal(net[0].weight, before)


def test_weights_that_something_makes_are_written_as_they_are(tmp_path):
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(9, 2))  # noqa: E731
    net, x = make(), torch.randn(4, 2, 5)
    nn.utils.parametrizations.weight_norm(net[0])
    prune.l1_unstructured(net[2], "weight", amount=0.5)
    bill = export.save(net, tmp_path / "net.safetensors")
    assert bill["kept"].tolist() == [18, 9]
    with torch.no_grad():
        assert torch.equal(export.restore(make(), tmp_path / "net.safetensors")(x), net(x))


def test_files_of_others_are_read(tmp_path):
    state = build("lenet300", (1, 28, 28), 10).state_dict()
    save_file(state, tmp_path / "a.safetensors", {"format": "pt"})
    assert all(torch.equal(v, state[n]) for n, v in export.read(tmp_path / "a.safetensors").items())


def test_bad_files_are_named(tmp_path):
    net, _ = compressed("joint")
    path = tmp_path / "net.safetensors"
    export.save(net, path)
    before = deepcopy(net.state_dict())
    with pytest.raises(ExportError, match="another network"):
        export.restore(build("lenet300", (1, 28, 28), 10), path)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ExportError, match="damaged"):
        export.restore(net, path)
    assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())
    with pytest.raises(FileNotFoundError):
        export.read(tmp_path / "nothing.safetensors")


def test_every_damage_that_shows_is_named(tmp_path):
    torch.manual_seed(0)
    net, path = nn.Sequential(nn.Linear(20, 9)), tmp_path / "net.safetensors"
    net[0].weight.data *= torch.rand(9, 20) < 0.5
    assert export.save(net, path)["positions"].tolist() == ["bitmask"]
    raw, found = path.read_bytes(), 0
    for bit in range(0, 8 * len(raw), 5):
        other = bytearray(raw)
        other[bit // 8] ^= 1 << bit % 8
        path.write_bytes(other)
        try:
            export.read(path)
        except ExportError:
            found += 1
    assert found > 100


class Extra(nn.Linear):
    def get_extra_state(self):
        return {}


def test_what_is_no_tensor_of_numbers_is_named(tmp_path):
    path = tmp_path / "net.safetensors"
    for net, name in ((nn.Sequential(Extra(2, 2)), "0._extra_state"), (nn.Linear(2, 2).to("meta"), "weight")):
        with pytest.raises(ExportError, match=f"{name} is no dense tensor of numbers"):
            export.save(net, path)
    export.save(nn.Linear(4, 0), path)
    assert export.read(path)["weight"].shape == (0, 4)


def test_any_reader_of_the_format_opens_it(tmp_path):
    net, _ = compressed("binary")
    export.save(net, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["fc1.weight"].dtype == torch.uint8
    assert len(tensors["fc1.weight"]) == 400_000 // 8 + 4
    assert torch.equal(tensors["fc1.bias"], net.fc1.bias)
