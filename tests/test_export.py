"""Files of compressed networks: what is written comes back to the bit, in as few bits as the account says."""

import math
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file

from lib import export
from lib.constraint import attach_masks, fitted, harden, project, state_of, weights
from lib.costs import network_storage
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


def test_bad_files_are_named(tmp_path):
    net, _ = compressed("joint")
    path = tmp_path / "net.safetensors"
    export.save(net, path)
    before = deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="another network"):
        export.restore(build("lenet300", (1, 28, 28), 10), path)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="damaged"):
        export.restore(net, path)
    assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())
    with pytest.raises(FileNotFoundError):
        export.read(tmp_path / "nothing.safetensors")


def test_any_reader_of_the_format_opens_it(tmp_path):
    net, _ = compressed("binary")
    export.save(net, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["fc1.weight"].dtype == torch.uint8
    assert len(tensors["fc1.weight"]) == 400_000 // 8 + 4
    assert torch.equal(tensors["fc1.bias"], net.fc1.bias)
