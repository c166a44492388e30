"""Laws of removing filters from a whole network: outputs stay, sums and depthwise ties hold."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from lib.channels import compact, coupled, follow, residual_groups
from lib.channels.paths import check_same
from lib.constraint import ConstraintError, attach_masks, detach_masks, masks, select, weights
from lib.models import build
from lib.pruning import Filter
from lib.shapes import prunable
from lib.training import StrideFirst


def mobilenet(shape, classes, seed=1):
    """MobileNetV2 with five of its seventeen blocks: depthwise convolutions, expansions and sums."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]
        net = torchvision.models.MobileNetV2(classes, inverted_residual_setting=blocks)
        return net.to(memory_format=torch.channels_last)


def resnet(shape, classes, seed=1):
    """ResNet-18 with a block in each stage: channels that are pooled before a sum."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], classes)
        return net.to(memory_format=torch.channels_last)


NETS = {
    "lenet5": ((1, 28, 28), partial(build, "lenet5")),
    "vgg": ((1, 16, 16), partial(build, "vgg", width=4)),
    "resnet8": ((1, 16, 16), partial(build, "resnet8", width=4)),
    "resnet14": ((1, 16, 16), partial(build, "resnet14", width=4)),
    "mobilenet": ((3, 32, 32), mobilenet),
    "resnet": ((3, 32, 32), resnet),
}


def images(shape, n=1):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(9))


def randomized(model, seed=0):
    """Batch norms as after training: every constant that a removed filter could leave behind is there."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
    return model.eval()


@pytest.fixture(params=NETS)
def case(request):
    shape, make = NETS[request.param]
    return randomized(make(shape, 10, seed=1)), images(shape)


def filter_masks(removed, model):
    """Masks without the filters in ``removed``: {layer: indices}."""
    layers, result = prunable(model), {}
    for name, filters in removed.items():
        result[name] = torch.ones(layers[name].weight.shape, dtype=torch.bool)
        result[name][filters] = False
    return result


def random_masks(model, example, rate=0.4, seed=0):
    """Random filters of every layer but the last removed, coupled layers alike."""
    generator = torch.Generator().manual_seed(seed)
    removed = {}
    for names in residual_groups(model, example):
        count = len(prunable(model)[names[0]].weight)
        removed |= dict.fromkeys(names, torch.randperm(count, generator=generator)[: int(rate * count)])
    return filter_masks(removed, model)


def independent_masks(model, rate=0.4, seed=0):
    """Random filters of every layer but the last, whatever the sums."""
    generator, layers = torch.Generator().manual_seed(seed), list(prunable(model))[:-1]
    return filter_masks(
        {n: torch.rand(len(prunable(model)[n].weight), generator=generator) < rate for n in layers}, model
    )


@torch.no_grad()
def zeroed(model, found):
    return detach_masks(attach_masks(deepcopy(model), found))


def size(model):
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def outputs(model, x):
    return model.eval()(x)


def same(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_compact_network_computes_the_same(case):
    model, example = case
    attach_masks(model, follow(model, random_masks(model, example), example))
    small, x = compact(model, example), images(example.shape[1:], 3)
    assert same(outputs(model, x), outputs(small, x))
    assert outputs(model, x).std() > 0
    live = masks(model)
    kept = sum(int(live[n].sum()) if n in live else m.weight.numel() for n, m in prunable(model).items())
    assert sum(layer.weight.numel() for layer in prunable(small).values()) == kept  # nothing but live weights is left
    assert not masks(small)
    conv = next(m for m in small.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert masks(model)
    assert outputs(model, x).shape == (3, 10)  # the masked network still runs: its copies share no class with it


def test_unused_path_removal_changes_no_output(case):
    model, example = case
    given = independent_masks(model)
    found = follow(model, given, example)
    constants = {name: mask for name, mask in found.items() if name not in prunable(model)}
    x = images(example.shape[1:], 2)
    before, after = zeroed(model, given | constants), zeroed(model, found)
    assert same(outputs(before, x), outputs(after, x))
    assert same(outputs(after, x), outputs(compact(after, example), x))
    assert all((found[name] <= mask).all() for name, mask in given.items())
    assert sum(int(found[n].sum()) for n in given) < sum(int(m.sum()) for m in given.values())


def test_follow_is_idempotent(case):
    model, example = case
    found = follow(model, independent_masks(model), example)
    again = follow(model, found, example)
    assert list(again) == list(found)
    assert all(torch.equal(again[name], mask) for name, mask in found.items())
    masked = follow(attach_masks(model, found), found, example)
    assert all(torch.equal(masked[name], mask) for name, mask in found.items())


def test_lenet5_by_closed_form():
    model, example = build("lenet5", (1, 28, 28), 10), images((1, 28, 28))
    removed = {"conv1": range(7, 20), "conv2": range(0, 39), "fc1": range(10, 477)}
    found = follow(model, filter_masks({name: list(f) for name, f in removed.items()}, model), example)
    small = compact(attach_masks(model, found), example)
    layers = [25 * 7 + 7, 7 * 25 * 11 + 11, 11 * 16 * 33 + 33, 33 * 10 + 10]
    assert [size(layer) for layer in prunable(small).values()] == layers
    assert [int(found[n].sum()) for n in ("conv1", "conv2", "fc1", "fc2")] == [25 * 7, 7 * 25 * 11, 11 * 16 * 33, 330]
    assert [int(found[f"{n}.bias"].sum()) for n in ("conv1", "conv2", "fc1")] == [7, 11, 33]
    assert "fc2.bias" not in found


def test_one_channel_is_its_columns_behind_a_flattened_map():
    model, example = build("lenet5", (1, 28, 28), 10), images((1, 28, 28))
    found = follow(model, filter_masks({"conv2": [3]}, model), example)
    assert found["fc1"].sum(0).eq(0).nonzero().flatten().tolist() == list(range(48, 64))
    partly = torch.ones(500, 800, dtype=torch.bool)
    partly[:, 48:63] = False  # one of the sixteen positions is still read
    assert set(follow(model, {"fc1": partly}, example)) == {"fc1"}


def test_what_nobody_reads_is_removed_backwards():
    model, example = randomized(build("vgg", (1, 16, 16), 10, width=4)), images((1, 16, 16))
    unread = torch.ones_like(model.conv2_1.weight, dtype=torch.bool)
    unread[:, 2] = False
    found = follow(model, {"conv2_1": unread}, example)
    assert set(found) == {"conv1_2", "conv2_1", "bn1_2.weight", "bn1_2.bias"}
    for name in ("conv1_2", "bn1_2.weight", "bn1_2.bias"):
        assert found[name].view(4, -1).any(1).tolist() == [True, True, False, True]
    alone = torch.ones_like(model.conv1_2.weight, dtype=torch.bool)
    alone[:, 1:] = False  # conv1_2 reads the first channel only
    found = follow(model, {"conv1_2": alone}, example)
    assert found["conv1_1"].flatten(1).any(1).tolist() == [True, False, False, False]


def test_a_sum_shrinks_only_when_all_its_producers_lose_the_filter():
    model, example = randomized(build("resnet8", (1, 16, 16), 10, width=4)), images((1, 16, 16))
    assert residual_groups(model, example) == [
        ["conv1", "block1_1.conv2"],
        ["block1_1.conv1"],
        ["block2_1.conv1"],
        ["block2_1.conv2", "block2_1.shortcut.0"],
        ["block3_1.conv1"],
        ["block3_1.conv2", "block3_1.shortcut.0"],
    ]
    one = follow(model, filter_masks({"block2_1.conv2": [5]}, model), example)
    assert set(one) == {"block2_1.conv2", "block2_1.bn2.weight", "block2_1.bn2.bias"}
    assert size(compact(zeroed(model, one), example)) == size(model)
    both = follow(model, filter_masks({"block2_1.conv2": [5], "block2_1.shortcut.0": [5]}, model), example)
    assert {"block2_1.shortcut.1.bias", "block3_1.conv1", "block3_1.shortcut.0"} < set(both)
    gone = 8 * 9 + 4 + 2 * 2 + 16 * 9 + 16  # rows of conv2 and shortcut, their norms, columns of the next two
    assert size(compact(zeroed(model, both), example)) == size(model) - gone


def test_a_depthwise_filter_goes_with_its_input():
    model, example = randomized(mobilenet((3, 32, 32), 10)), images((3, 32, 32))
    expand, depthwise, projection = (f"features.2.conv.{i}" for i in ("0.0", "1.0", "2"))
    assert [expand, depthwise] in residual_groups(model, example)
    from_above = follow(model, filter_masks({expand: [4]}, model), example)
    from_below = follow(model, filter_masks({depthwise: [4]}, model), example)
    assert set(from_above) == set(from_below)
    assert {expand, depthwise, projection, "features.2.conv.0.1.bias", "features.2.conv.1.1.bias"} <= set(from_above)
    small = compact(zeroed(model, from_above), example)
    assert (prunable(small)[depthwise].groups, prunable(small)[projection].in_channels) == (95, 95)


@pytest.mark.parametrize("name", [*NETS][:3])
def test_removed_constants_stay_removed_in_training(name):
    shape, make = NETS[name]
    model, example = randomized(make(shape, 10, seed=0)), images(shape)
    found = follow(model, random_masks(model, example), example)
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    convs = [n for n, m in prunable(model).items() if m.bias is not None][:-1]
    assert {f"{n}.{p}" for n in norms for p in ("weight", "bias")} | {f"{n}.bias" for n in convs} <= set(found)
    attach_masks(model, found).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        with StrideFirst():
            nn.functional.cross_entropy(model(images(shape, 8)), torch.arange(8)).backward()
        optimizer.step()
    parameters = dict(detach_masks(deepcopy(model)).named_parameters())
    for n, mask in found.items():
        assert not parameters[n if n in parameters else f"{n}.weight"][~mask].any()
    x = images(shape, 2)
    assert same(outputs(model, x), outputs(compact(model, example), x))


def test_a_constant_that_is_read_is_not_cut():
    model, example = build("lenet5", (1, 28, 28), 10), images((1, 28, 28))
    with torch.no_grad():
        model.conv1.weight[:2] = 0
        model.conv1.bias[:2] = torch.tensor([0.5, 0.0])
    small = compact(model, example)
    assert small.conv1.out_channels == 19
    assert same(outputs(model, example), outputs(small, example))
    with torch.no_grad():
        model.conv2.weight[:, 0] = 0  # nobody reads the constant any more
    assert compact(model, example).conv1.out_channels == 18


def test_a_sigmoid_makes_a_constant_of_a_removed_filter():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    example = images((1, 8, 8))
    found = follow(model, filter_masks({"0": [1], "2": [2]}, model), example)
    assert set(found) == {"0", "0.bias", "2", "2.bias", "4"}
    assert found["2"].flatten(2).any(2).any(0).all()  # the half that the sigmoid makes of zero is still read
    assert compact(zeroed(model, found), example)[0].out_channels == 4


class Preactivation(nn.Module):
    """A norm behind a sum, and a concatenation."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.c, self.fc = nn.Conv2d(4, 3, 1), nn.Linear(7, 2)

    def forward(self, x):
        y = self.bn(self.a(x) + self.b(x)).relu()
        return self.fc(torch.cat([y, self.c(y)], 1).mean((2, 3)))


def test_norms_behind_a_sum_and_concatenations():
    model, example = randomized(Preactivation()), images((1, 8, 8))
    assert "bn.bias" not in follow(model, filter_masks({"a": [1]}, model), example)
    found = follow(model, filter_masks({"a": [1], "b": [1], "c": [0, 2]}, model), example)
    assert found["bn.bias"].tolist() == [True, False, True, True]
    assert found["fc"].any(0).tolist() == [True, False, True, True, False, True, False]
    small = compact(attach_masks(model, found), example)
    assert (small.fc.in_features, small.c.in_channels, small.c.out_channels) == (4, 3, 1)
    assert same(outputs(model, example), outputs(small, example))


def test_the_output_layer_keeps_its_rows_and_biases():
    model, example = build("lenet5", (1, 28, 28), 10), images((1, 28, 28))
    found = follow(model, filter_masks({"fc2": [3]}, model), example)
    assert set(found) == {"fc2"}
    assert not any("fc2" in names for names in residual_groups(model, example))
    everything = follow(model, filter_masks({"conv1": slice(None)}, model), example)
    assert not any(everything[n].any() for n in ("conv1", "conv2", "fc1", "fc2"))
    assert "fc2.bias" not in everything
    small = compact(zeroed(model, everything), example)
    assert [layer.weight.shape[0] for layer in prunable(small).values()] == [1, 1, 1, 10]
    assert same(outputs(small, example), model.fc2.bias[None].expand(1, 10))


def test_other_masks_pass_through_and_nothing_is_changed():
    model, example = randomized(build("vgg", (1, 16, 16), 10, width=4)).train(), images((1, 16, 16))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mine = {"bn1_1.bias": torch.tensor([True, True, False, True])} | filter_masks({"conv1_1": [0]}, model)
    found = follow(model, mine, example)
    assert found["bn1_1.bias"].tolist() == [False, True, False, True]
    assert mine["bn1_1.bias"][0]
    assert model.training
    assert compact(model, example).training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert follow(model, {}, example) == {}


def test_convolutions_along_one_dimension():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 6, 3, groups=6), nn.Conv1d(6, 4, 1), nn.Flatten()
    )
    model.append(nn.Linear(4 * 6, 3)).eval()
    for tensor in (model[1].weight.data, model[1].bias.data, model[1].running_mean):
        tensor.copy_(torch.rand(6, generator=generator) + 0.2)
    x = torch.randn(3, 2, 10, generator=generator)
    assert residual_groups(model, x[:1]) == [["0", "3"], ["4"]]
    found = follow(model, filter_masks({"0": [1, 2], "4": [0]}, model), x[:1])
    small = compact(attach_masks(deepcopy(model), found), x[:1])
    shapes = [tuple(layer.weight.shape) for layer in prunable(small).values()]
    assert shapes == [(4, 2, 3), (4, 1, 3), (3, 4, 1), (3, 18)]
    assert same(outputs(zeroed(model, found), x), outputs(small, x))


def test_layers_that_the_forward_pass_never_meets():
    class Spare(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).relu())

    model = Spare(nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 5), nn.Conv2d(4, 4, 3, groups=2))
    x = torch.randn(1, 4)
    assert residual_groups(model, x) == [["0"]]
    found = follow(model, filter_masks({"0": [1], "2": [2]}, model), x)
    small = compact(attach_masks(deepcopy(model), found), x)
    assert [tuple(layer.weight.shape) for layer in prunable(small).values()] == [(4, 4), (2, 4), (5, 5), (4, 2, 3, 3)]
    assert same(outputs(zeroed(model, found), x), outputs(small, x))


def test_frozen_layers_stay_frozen():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    x = torch.randn(1, 4)
    small = compact(attach_masks(model, follow(model, filter_masks({"0": [1]}, model), x)), x)
    assert small[0].out_features == 4
    assert {n: p.requires_grad for n, p in small.named_parameters()} == {
        "0.weight": False,
        "0.bias": False,
        "2.weight": True,
        "2.bias": True,
    }


@pytest.mark.parametrize("trained", [True, False])
def test_weights_that_something_else_makes_are_cut_as_they_are(trained):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), parametrizations.weight_norm(nn.Linear(5, 2)))
    model.requires_grad_(trained)
    x = torch.randn(1, 4)
    found = follow(model, filter_masks({"0": [1]}, model), x)
    small = compact(zeroed(model, {"0": found["0"], "0.bias": found["0.bias"]}), x)
    assert tuple(small[2].weight.shape) == (2, 4)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0
    assert same(outputs(model, x), outputs(small, x))
    assert small[2].weight.requires_grad == trained


class TiedLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(self.b(self.a(x).relu()).relu())


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.hidden, self.b = nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.hidden(self.a(x.long())).relu())


@pytest.mark.parametrize("make", [TiedLayers, TiedEmbedding])
@pytest.mark.parametrize(
    "cut", [residual_groups, compact, lambda m, x: follow(m, {}, x), lambda m, x: coupled(m, {}, x)]
)
def test_layers_that_share_a_tensor_are_refused_by_name(make, cut):
    with pytest.raises(ConstraintError, match="a and b share a tensor"):
        cut(make(), torch.ones(1, 4))


class Twice(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](self[0](x)).flatten(1))


class WrittenSize(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x).view(-1, 4 * 36))


class Shuffled(nn.Sequential):
    """The channels change places before they are read."""

    def forward(self, x):
        return self[1](self[0](x).relu()[:, [1, 2, 3, 0]]).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "mask", "message"),
    [
        (nn.Sequential(nn.Linear(4, 2)), {"nope": torch.ones(2, 4).bool()}, "'nope'; the model has 0"),
        (nn.Sequential(nn.Linear(4, 2)), {"0": torch.ones(2, 4)}, "expected torch.bool"),
        (Twice(nn.Conv2d(1, 1, 3), nn.Linear(16, 2)), {}, "used twice"),
        (Shuffled(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1)), {"0": [1]}, "unseen"),
    ],
)
def test_refusals_of_follow(model, mask, message):
    example = images((1, 8, 8)) if isinstance(model[0], nn.Conv2d) else torch.randn(1, 4)
    found = filter_masks(mask, model) if any(isinstance(m, list) for m in mask.values()) else mask
    with pytest.raises(ConstraintError, match=message):
        follow(model, found, example)


class Rolled(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x).relu().roll(1, 1))


@pytest.mark.parametrize("cut", [follow, lambda model, masks, example: compact(model, example)])
def test_an_example_of_zeros_hides_no_change(cut):
    torch.manual_seed(0)
    model = Rolled(nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(4, 2, 1, bias=False))
    model[0].weight.data[1] = 0
    with pytest.raises(ConstraintError, match="unseen"):
        cut(model, {"0": model[0].weight != 0}, torch.zeros(1, 1, 8, 8))


class Heads(nn.Sequential):
    def forward(self, x):
        x = self[0](x).relu()
        return {"out": self[1](x), "others": (self[2](x),)}


class Words(nn.Sequential):
    def forward(self, x):
        return type("Words", (), {"y": super().forward(x)})()


def test_all_outputs_are_compared():
    model, example = Heads(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1)), images((1, 8, 8))
    model[0].weight.data[1], model[0].bias.data[1] = 0, 0
    small, other = compact(model, example), deepcopy(model)
    assert small[0].out_channels == 3
    other[2].bias.data += 1
    with pytest.raises(ConstraintError, match="it changes outputs by up to 1"):
        check_same(model, other, example, "it")
    with pytest.raises(ConstraintError, match="returns no tensors"):
        check_same(Words(), Words(), example, "it")


def test_a_size_written_into_forward_is_refused():
    model, example = WrittenSize(nn.Conv2d(1, 4, 3), nn.Linear(144, 2)), images((1, 8, 8))
    found = follow(model, filter_masks({"0": [1]}, model), example)
    with pytest.raises(ConstraintError, match="does not run any more"):
        compact(attach_masks(model, found), example)


def test_sums_that_share_some_channels_have_no_group():
    class Partial(nn.Sequential):
        def forward(self, x):
            return self[3]((torch.cat([self[0](x), self[1](x)], 1) + self[2](x)).mean((2, 3)))

    model = Partial(nn.Conv2d(1, 2, 3), nn.Conv2d(1, 3, 3), nn.Conv2d(1, 5, 3), nn.Linear(5, 2))
    example = images((1, 8, 8))
    with pytest.raises(ConstraintError, match="share some"):
        residual_groups(model, example)
    found = follow(model, filter_masks({"0": [0], "1": [1], "2": [0, 2, 3]}, model), example)
    assert found["3"].any(0).tolist() == [False, True, True, False, True]
    assert same(outputs(zeroed(model, found), example), outputs(compact(zeroed(model, found), example), example))


def test_coupled_filters_of_a_residual_network_can_be_cut():
    """A budget of filters need not cut anything at a sum when each layer chooses for itself; here it must."""
    net = build("resnet8", (1, 16, 16), 10, seed=0, width=8)
    example = images((1, 16, 16))
    apart = dict.fromkeys([*prunable(net)][:-1], Filter(0.5))
    together = coupled(net, apart, example)
    sizes = {}
    for name, plan in (("apart", apart), ("together", together)):
        found = follow(net, select(plan, weights(net, plan)), example)
        sizes[name] = compact(attach_masks(deepcopy(net), found), example).conv1.out_channels
    assert sizes["together"] == 4 < sizes["apart"]
    assert together["conv1"] == together["block1_1.conv2"] != together["block1_1.conv1"] == apart["block1_1.conv1"]
    part = {"conv1": Filter(0.5), "block1_1.conv1": Filter(0.5)}  # the sum's other layer is dense: nothing to couple
    assert coupled(net, part, example) == part


def test_a_constant_that_a_norm_makes_is_seen_through_a_relu():
    """Without gamma a norm turns a removed filter into a constant, which a ReLU passes if its mean was negative."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()
    )
    net.append(nn.Linear(4 * 4 * 4, 3))
    net[1].running_mean.fill_(-0.5)
    image, mask = torch.rand(2, 1, 8, 8), torch.ones_like(net[0].weight, dtype=torch.bool)
    mask[:4] = False
    found = follow(net.eval(), {"0": mask}, image)
    assert "3" not in found or found["3"].all()  # a constant still arrives there


class Regrouped(nn.Module):
    def __init__(self, between, channels):
        super().__init__()
        self.first, self.between, self.last = nn.Conv2d(1, 8, 3, padding=1), between, nn.Conv2d(channels, 3, 1)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


@pytest.mark.parametrize(("between", "channels"), [(nn.PixelShuffle(2), 2), (nn.GLU(1), 4)], ids=["shuffle", "glu"])
def test_channels_that_are_regrouped_are_refused_by_name(between, channels):
    net, image = Regrouped(between, channels), torch.rand(2, 1, 8, 8)
    mask = torch.ones_like(net.first.weight, dtype=torch.bool)
    mask[:4] = False
    with pytest.raises(ConstraintError, match=r"regrouped|unseen|run any more"):
        follow(net, {"first": mask}, image)


def test_norms_over_neighbours_are_no_function_of_single_channels():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.LocalResponseNorm(3), nn.Conv2d(8, 6, 3), nn.Flatten())
    net.append(nn.Linear(6 * 4 * 4, 3))
    image, mask = torch.rand(2, 1, 8, 8), torch.ones_like(net[0].weight, dtype=torch.bool)
    mask[::2] = False
    with pytest.raises(ConstraintError, match="mixes its channels unseen"):
        compact(attach_masks(net.eval(), follow(net, {"0": mask}, image)), image)


def test_channels_that_are_returned_as_well_are_not_cut():
    class Features(Regrouped):
        def forward(self, x):
            h = self.first(x)
            return self.last(h), h

    net, image = Features(nn.Identity(), 8), torch.rand(2, 1, 8, 8)
    mask = torch.ones_like(net.first.weight, dtype=torch.bool)
    mask[:4] = False
    with pytest.raises(ConstraintError, match="returns channels that would go"):
        compact(attach_masks(net, follow(net, {"first": mask}, image)), image)
