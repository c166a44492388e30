"""Blocks that choose, exits and widths: their laws, and what is refused."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from lib import shapes
from lib.constraint import attach_masks, leaf
from lib.costs import bitwise
from lib.data import Split
from lib.faults import ReadNoise, sweep
from lib.layers import (
    Exits,
    LayerError,
    anytime,
    at_all_exits,
    at_width,
    block_costs,
    choosing,
    choosing_blocks,
    cut_to,
    dearest,
    exit_of,
    gate_of,
    leave,
    ordered,
    path_costs,
    sandwich,
    skippable,
    slimmable,
    spent,
    stages,
    to_budget,
    uneven,
)
from lib.layers.choices import of_bits
from lib.models import BasicBlock, build
from lib.recipes import predictive_signs
from lib.training import evaluate, fit, recalibrate
from lib.training.spent import Meter

SHAPE = (1, 14, 14)


def resnet(width=8, depth=14):
    """With statistics that are no longer those of an untrained network."""
    torch.manual_seed(0)
    net = build(f"resnet{depth}", SHAPE, 10, width=width).train()
    for _ in range(3):
        net(torch.rand(32, *SHAPE))
    return net.eval()


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


class Swapped(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


def masked(net):
    return attach_masks(net, {"block1_1.conv1": torch.ones(8, 8, 3, 3, dtype=torch.bool)})


def torn(net, spread=40.0):
    """The gate's answers depend on the image."""
    gate, generator = gate_of(net), torch.Generator().manual_seed(1)
    for read_out in [gate.read_out] if hasattr(gate, "read_out") else gate.read_outs:
        read_out.bias.data.zero_()
        read_out.weight.data = spread * torch.randn(read_out.weight.shape, generator=generator)
    for projection in gate.projections:
        projection.weight.data = 5 * torch.randn(projection.weight.shape, generator=generator)
    return net


def pictures(n=24):
    generator = torch.Generator().manual_seed(2)
    return torch.rand(n, *SHAPE, generator=generator) * torch.linspace(-2, 3, n).view(-1, 1, 1, 1)


def costs_of(net, plain):
    return block_costs(net, shapes.macs(plain, SHAPE).set_index("layer")["macs"])


def test_ten_blocks_cost_what_dfs_says():
    assert sum(map(of_bits, [0] * 3 + [8] * 4 + [32] * 3)) / 10 == 0.325
    assert [of_bits(b) for b in (0, 8, 10, 12, 14, 16, 32)] == [0, 1 / 16, 25 / 256, 9 / 64, 49 / 256, 1 / 4, 1]


def test_the_cost_of_ten_blocks_is_what_their_gate_chose():
    torch.manual_seed(0)
    blocks = nn.Sequential(*(BasicBlock(4, 4, 1) for _ in range(10)))
    net = choosing(blocks, bits=(0, 8, 32)).eval()
    for block, choice in zip(choosing_blocks(net).values(), [0] * 3 + [1] * 4 + [2] * 3, strict=True):
        block.drawn[choice] = 1.0
    net(torch.rand(5, 4, 6, 6))
    found = spent(net, {str(i): tuple(map(of_bits, (0, 8, 32))) for i in range(10)}) / 10
    assert found.tolist() == pytest.approx([0.325] * 5)


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize(("bits", "groups"), [((0, 32), 1), ((0, 4, 8, 32), 1), ((0, 32), 4), ((32,), 2)])
def test_everything_at_first_and_that_is_the_dense_output(bits, groups, recurrent):
    plain = resnet()
    net, x = choosing(deepcopy(plain), bits, groups, recurrent=recurrent), pictures()
    assert torch.equal(net(x), plain(x))
    costs = costs_of(net, plain)
    assert spent(net, costs).tolist() == [path_costs(costs)[1]] * len(x)
    assert path_costs(costs)[1] == shapes.macs(plain, SHAPE)["macs"].sum()


@pytest.mark.parametrize(("bits", "groups"), [((0, 32), 1), ((0, 4, 8, 32), 1), ((0, 32), 4), ((0, 6, 32), 2)])
def test_what_is_skipped_changes_nothing(bits, groups):
    """In batches, and image by image, the outputs are those of a network that computes all and multiplies by 0."""
    net, x = torn(choosing(resnet(), bits, groups)), pictures()
    for block in choosing_blocks(net).values():
        block.masked = True
    masked = net(x)
    chosen = gate_of(net).now.chosen
    for block in choosing_blocks(net).values():
        block.masked = False
    together, alone = net(x), torch.cat([net(one) for one in x.split(1)])
    assert all(((p >= 0) & (p <= 1)).all() for p in chosen.values())
    shares = torch.stack([parts.sum(1) if groups > 1 else parts.argmax(1).float() for parts in chosen.values()])
    assert len(shares.unique()) > 1  # images do choose differently
    assert torch.allclose(together, masked, atol=1e-4, rtol=1e-4)
    assert torch.allclose(alone, masked, atol=1e-4, rtol=1e-4)


def test_what_is_skipped_is_not_computed():
    net, seen = choosing(resnet()), []
    gate_of(net).read_out.bias.data = torch.tensor([9.0, 0.0])
    for block in choosing_blocks(net).values():
        block.block.bn2.register_forward_hook(lambda *_: seen.append(1))
    x = pictures(3)
    y, plain = net(x), resnet()
    assert not seen
    for name in choosing_blocks(net):
        plain.set_submodule(name, nn.Identity())
    assert torch.equal(y, plain(x))


def test_the_choice_learns_straight_through():
    """The gradient of a choice's probability is that of its output, also where another was chosen."""
    torch.manual_seed(3)
    net = choosing(nn.Sequential(resnet(4).block1_1)).train()
    block, x = net[0], torch.rand(6, 4, 5, 5)
    block.block.eval()
    outside, logits = torch.randn(6, 4, 5, 5), []
    ask = gate_of(net).logits
    gate_of(net).logits = lambda x, index: logits.append(ask(x, index)) or logits[0].retain_grad() or logits[0]
    (net(x) * outside).sum().backward()
    p = logits[0].detach().softmax(1)[:, 1]
    gain = (outside * (block.block(x) - x)).flatten(1).sum(1).detach()
    assert torch.allclose(logits[0].grad[:, 1], p * (1 - p) * gain, atol=1e-5)


def test_few_bits_come_near_and_32_are_exact():
    plain = resnet()
    apart = []
    for bits in (3, 6, 12):
        net = choosing(deepcopy(plain), (bits, 32))
        for block in choosing_blocks(net).values():
            block.drawn[0] = 1.0
        apart.append(float((net(pictures()) - plain(pictures())).abs().max().detach()))
    assert apart[0] > 4 * apart[1] > 16 * apart[2] > 0


def test_groups_that_rest_cost_nothing():
    plain = resnet()
    net = torn(choosing(deepcopy(plain), (32,), groups=4))
    costs = costs_of(net, plain)
    net(pictures())
    work, on = costs["block1_2"][1], gate_of(net).now.chosen["block1_2"]
    assert costs["block1_2"][0] == 0
    assert torch.allclose(on.sum(1), torch.ones(24))
    assert set((4 * on[:, 1]).round(decimals=4).tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    assert work == 2 * 8 * 8 * 9 * 14 * 14
    always = sum(cost for cost in costs.values() if not isinstance(cost, tuple))
    assert path_costs(costs)[0] == always


@pytest.mark.parametrize("target", [0.6, 0.8])
def test_the_target_is_pulled_from_both_sides(target, small_images):
    plain = resnet(4)
    net = choosing(deepcopy(plain))
    costs = costs_of(net, plain)
    pull, signs = to_budget(costs, target, 1.0, lambda model, x, y, output: 0.0 * output.sum()), set()

    def watched(*batch):
        loss = pull(*batch)
        signs.add(bool(loss > 0))
        return loss

    fit(net, small_images, epochs=3, lr=0.1, batch_size=40, objective=watched)
    assert signs == {True, False}


def test_training_toward_a_budget_skips(small_images):
    plain = resnet(4)
    net = choosing(deepcopy(plain), groups=2)
    costs = costs_of(net, plain)

    def task(model, x, y, output):
        return nn.functional.cross_entropy(output, y)

    objective = to_budget(costs, 0.6, 3.0, task)
    fit(net, small_images, epochs=2, lr=0.1, batch_size=40, objective=objective)
    evaluate(net, small_images.test)
    assert spent(net, costs).mean() < path_costs(costs)[1]


def test_at_random_the_shares_are_kept():
    net = choosing(resnet(), (0, 4, 32))
    for block in choosing_blocks(net).values():
        block.drawn.copy_(torch.tensor([0.5, 0.2, 0.3]))
    torch.manual_seed(0)
    net(pictures(2000))
    for parts in gate_of(net).now.chosen.values():
        assert parts.mean(0).tolist() == pytest.approx([0.5, 0.2, 0.3], abs=0.04)


@pytest.mark.parametrize(("bits", "groups"), [((0, 32), 1), ((0, 4, 32), 1), ((32,), 2)])
def test_the_work_of_blocks_that_choose_is_counted(bits, groups):
    """In training all choices are computed, each with two gradients."""
    net = choosing(resnet(), bits, groups).train()
    with Meter(net) as meter:
        net(pictures()).sum().backward()
    found = meter.frame().set_index(["layer", "product"])["macs"]
    ways = sum(b > 0 for b in bits)
    for product in ("forward", "input_gradient", "weight_gradient"):
        assert found["block1_1.block.conv2", product] == ways * 24 * 8 * 8 * 9 * 14 * 14


def test_signs_and_few_bits_do_not_mix():
    net = choosing(resnet()).train()
    with predictive_signs(net):
        net(pictures()).sum().backward()
    assert set(net.block1_1.block.conv1.weight.grad.unique().tolist()) <= {-1.0, 0.0, 1.0}
    few = choosing(resnet(), (0, 4, 32)).train()
    with predictive_signs(few), pytest.raises(LayerError, match="whole, and at 32 bits only; here 4"):
        few(pictures())


@pytest.mark.parametrize(("bits", "groups"), [((0, 32), 1), ((0, 4, 32), 1), ((32,), 4)])
def test_reads_in_blocks_that_choose_are_noisy(bits, groups):
    net = torn(choosing(resnet(), bits, groups))
    split = Split(pictures(), net(pictures()).argmax(1))
    inside = {name: "two_column" for name in shapes.prunable(net) if ".block." in name}
    found = sweep(net, inside, [0.0, 3.0], 1, split, faults=ReadNoise)["accuracy"]
    assert found[1] < found[0] == 1


def test_the_gates_work_is_counted():
    net = choosing(resnet(), recurrent=False)
    counted = sum(leaf(m).numel() for m in gate_of(net).modules() if isinstance(m, nn.Linear))
    assert gate_of(net).macs == counted
    net = choosing(resnet(), (0, 4, 8, 32))  # 4 blocks: LSTM 8 h^2, read-out 4 h, projections of their channels
    assert gate_of(net).macs == 4 * (800 + 40) + 10 * (8 + 8 + 16 + 32)


def with_exits(bits=(0, 32), groups=1):
    plain = resnet()
    table = shapes.macs(plain, SHAPE).set_index("layer")["macs"].to_dict()
    net = Exits(choosing(plain, bits, groups), ["block1_2", "block2_2"], SHAPE).eval()
    costs = block_costs(net, table) | {"exit block1_2": 80.0, "exit block2_2": 160.0}
    return net, {name.removeprefix("net."): cost for name, cost in costs.items()}


def test_exits_have_the_networks_output_at_the_end():
    net, _ = with_exits()
    x = pictures()
    assert torch.equal(net(x), net.net(x))
    assert [y.shape for y in net.outputs] == [(24, 10)] * 3


def test_a_module_that_stands_in_two_places_runs_twice_with_exits():
    act = nn.Tanh()
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    net, x = nn.Sequential(nn.Conv2d(1, 4, 3), act, nn.Conv2d(4, 4, 3), act, *tail).eval(), pictures()
    assert torch.equal(Exits(net, ["0"], SHAPE).eval()(x), net(x))


@pytest.mark.parametrize(
    "prepared",
    [skippable, choosing, lambda net: choosing(net, recurrent=False), lambda net: Exits(net, ["block1_1"], SHAPE)],
)
def test_a_network_of_double_precision_gets_gates_and_exits_of_its_own_kind(prepared):
    assert prepared(resnet(4).double()).eval()(pictures(2).double()).dtype == torch.float64


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("limit", [{"budget": 0.5}, {"budget": 0.8}, {"budget": 1.0}, {"confidence": 0.25}])
def test_leaving_is_what_the_whole_pass_says(limit, groups):
    """Each image on its own, with gates of blocks, and of groups of channels too; no hard budget is exceeded."""
    net, costs = with_exits(groups=groups)
    torn(net, 4.0)
    limit = dict(limit)
    overhead, x = float(gate_of(net).macs), pictures()
    most = dearest(net, costs, overhead)
    assert sum(most) == path_costs(costs)[1] + overhead
    if "budget" in limit:
        limit["budget"] *= sum(most)
    logits, cost = anytime(net, x, costs, overhead)
    exits = exit_of(logits, cost, most, **limit)
    every = torch.arange(len(x))
    for i, one in enumerate(x.split(1)):
        y, number, paid = leave(net, one, costs, overhead=overhead, **limit)
        assert number == exits[i]
        assert torch.allclose(y[0], logits[number, i], atol=1e-4, rtol=1e-4)
        assert paid == pytest.approx(float(cost[number, i]))
        assert paid <= limit.get("budget", sum(most))
    assert (cost[exits, every] <= limit.get("budget", sum(most))).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_budget_of_the_whole_is_the_dense_output(groups):
    """With gates that are open, as they begin; the least less, and nobody gets to the end."""
    net, costs = with_exits(groups=groups)
    plain, x, overhead = resnet(), pictures(), float(gate_of(net).macs)
    most = dearest(net, costs, overhead)
    logits, cost = anytime(net, x, costs, overhead)
    assert exit_of(logits, cost, most, budget=sum(most)).tolist() == [2] * len(x)
    assert exit_of(logits, cost, most, budget=sum(most) - 1).tolist() == [1] * len(x)
    y, number, paid = leave(net, x[:1], costs, budget=sum(most), overhead=overhead)
    assert torch.equal(logits[2], plain(x))
    assert torch.equal(y, plain(x[:1]))
    assert (number, paid) == (2, sum(most))


def test_exits_learn_together(small_images):
    net, _ = with_exits()
    before = deepcopy(net.heads.state_dict())
    fit(net, small_images, epochs=1, lr=0.05, objective=at_all_exits)
    assert all(not torch.equal(before[k], v) for k, v in net.heads.state_dict().items())


def test_the_widest_is_the_plain_network():
    plain = resnet()
    net, x = slimmable(deepcopy(plain), [0.25, 0.5, 1.0]), pictures()
    assert torch.equal(net(x), plain(x))


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_width_cut_out_computes_the_same(index):
    middle = {f"block{s}_{b}.conv1": 3 for s in (1, 2, 3) for b in (1, 2)}
    net, x = slimmable(resnet(), [0.25, middle, 0.5, 1.0]).train(), pictures()
    for width in range(4):  # statistics of their own
        with at_width(net, width):
            net(x + width)
    for name, p in net.named_parameters():
        p.requires_grad_("bias" not in name)
    small = cut_to(net.eval(), index, SHAPE)
    assert all(p.requires_grad == ("bias" not in name) for name, p in small.named_parameters())
    with at_width(net, index):
        assert torch.allclose(small(x), net(x), atol=1e-5)
    kinds = {type(m).__name__ for m in small.modules()}
    assert not kinds & {"SlimConv2d", "SlimLinear", "SlimNorm"}
    macs = shapes.macs(small, SHAPE).set_index("layer")["macs"]
    assert macs["block3_2.conv2"] == 16 * 9 * {0: 8 * 8, 1: 3 * 32, 2: 16 * 16, 3: 32 * 32}[index]


def test_a_width_is_recalibrated_alone(small_images):
    """The others keep what they had, and so do all where the pass fails."""
    net = slimmable(resnet(), [0.5, 1.0]).train()
    with at_width(net, 0):
        net(pictures())
    narrow = net.bn1.norms[0].running_mean.clone()
    count = len(small_images.train)  # in equal batches of all images, whose order then changes no mean
    recalibrate(net, small_images, batches=count, batch_size=count // 4)
    assert torch.allclose(net.bn1.norms[1].running_mean, net.conv1(small_images.train.x).mean((0, 2, 3)), atol=1e-5)
    assert torch.equal(net.bn1.norms[0].running_mean, narrow)
    wide = net.bn1.norms[1].running_mean.clone()
    net.fc.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recalibrate(net, small_images)
    assert torch.equal(net.bn1.norms[1].running_mean, wide)


def test_a_norm_in_two_places_and_a_layer_of_tokens_slim():
    norm = nn.BatchNorm2d(4)
    tokens = nn.Flatten(2), Swapped(), nn.Linear(4, 3)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Conv2d(4, 4, 3), norm, *tokens).eval()
    net, x = slimmable(deepcopy(plain), [0.5, 1.0]), pictures(2)
    assert torch.equal(net(x), plain(x))
    assert net[1] is net[3]
    with at_width(net, 0):
        assert net(x).shape == (2, 100, 3)
        assert cut_to(net, 0, SHAPE)[6].weight.shape == (3, 2)


def test_widths_have_statistics_of_their_own():
    net = slimmable(resnet(), [0.5, 1.0]).train()
    before = [norm.running_mean.clone() for norm in net.bn1.norms]
    with at_width(net, 0):
        net(pictures())
    changed = [not torch.equal(a, norm.running_mean) for a, norm in zip(before, net.bn1.norms, strict=True)]
    assert changed == [True, False]
    assert torch.equal(net.bn1.norms[0].running_mean[4:], before[0][4:])  # channels that did not run


def test_the_sandwich_moves_the_narrow_toward_the_wide(small_images):
    net = slimmable(resnet(), [0.25, 0.5, 0.75, 1.0])

    def apart():
        with torch.no_grad(), at_width(net, 0):
            narrow = net(x).log_softmax(1)
        return float(nn.functional.kl_div(narrow, net(x).softmax(1).detach(), reduction="batchmean"))

    x = small_images.test.x[:100]
    log = fit(net, small_images, epochs=2, lr=0.05, batch_size=50, objective=sandwich(4))
    assert log["objective"].is_monotonic_decreasing
    trained = apart()
    for parameter in net.bn1.norms[0].parameters():  # the narrow one forgets
        parameter.data.uniform_(-1, 1)
    assert trained < apart()


def test_sorted_channels_compute_the_same_and_the_first_give_most():
    plain = resnet()
    for parameter in plain.block1_2.bn1.parameters():
        parameter.data.uniform_(-1, 1)
    net = ordered(deepcopy(plain))
    assert torch.allclose(net(pictures()), plain(pictures()), atol=1e-5)
    gives = net.block1_2.bn1.weight.abs() * torch.linalg.vector_norm(net.block1_2.conv2.weight, dim=(0, 2, 3))
    assert (gives.diff() <= 0).all()
    assert not torch.equal(net.block1_2.conv1.weight, plain.block1_2.conv1.weight)


def test_uneven_widths_fit_their_budgets_and_the_first_step_is_the_best():
    net = ordered(resnet())
    split = Split(pictures(), net(pictures()).argmax(1))  # its own answers: every channel less is a loss
    table = shapes.macs(net, SHAPE).set_index("layer")["macs"]
    whole, blocks = float(table.sum()), [name for name, m in net.named_modules() if isinstance(m, BasicBlock)]
    step = {name: (table[f"{name}.conv1"] + table[f"{name}.conv2"]) / 4 for name in blocks}
    first, *narrower = uneven(net, split, SHAPE, [whole - 1, 0.7 * whole, 0.45 * whole], steps=4)

    def loss(counts):
        small = cut_to(slimmable(deepcopy(net), [counts, 1.0]), 0, SHAPE)
        return float(nn.functional.cross_entropy(small(split.x), split.y).detach()), shapes.macs(small, SHAPE)["macs"]

    def one_less(name):
        channels = net.get_submodule(name).conv1.out_channels
        return (loss({f"{name}.conv1": channels * 3 // 4})[0] - loss({})[0]) / step[name]

    (taken,) = [name for name in blocks if first[f"{name}.conv1"] < net.get_submodule(name).conv1.out_channels]
    assert taken == min(blocks, key=one_less)
    for counts, wider, share in zip(narrower, (first, narrower[0]), (0.7, 0.45), strict=True):
        assert share * whole - max(step.values()) < loss(counts)[1].sum() <= share * whole
        assert all(1 <= counts[layer] <= wider[layer] for layer in wider)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: choosing(resnet(), (0, 8)), "rising .* from 0, which skips, to 32"),
        (lambda: choosing(resnet(), (8, 0, 32)), "rising"),
        (lambda: choosing(resnet(), groups=3), "8 channels are no 3 groups"),
        (lambda: choosing(resnet(), blocks=["block2_1"]), "'block2_1' cannot be skipped: its shape changes"),
        (lambda: choosing(resnet(), blocks=["fc"]), "'fc' cannot be skipped: it is no BasicBlock"),
        (lambda: choosing(choosing(resnet())), "a gate already"),
        (lambda: block_costs(choosing(resnet()), {"block1_1.conv1": 1.0}), "misses block 'block1_2'"),
        (lambda: costs_of(choosing(net := resnet()), net), "of a network whose block 'block1_1' chooses"),
        (lambda: to_budget({"a": 1.0, "b": (0.0, 3.0)}, 0.2, 1.0, None), "the cheapest path takes 0.25 of the dearest"),
        (lambda: to_budget({"a": 1.0, "b": (0.0, 3.0)}, 1.2, 1.0, None), "allowed are 0.25 to 1"),
        (lambda: Exits(resnet(), ["fc"], SHAPE), "no exit can be after 'fc'; allowed are conv1"),
        (lambda: Exits(Doubled(), [], SHAPE), "Doubled has a forward of its own; allowed are nn.Sequential"),
        (lambda: Exits(BasicBlock(1, 1, 1), [], SHAPE), "BasicBlock has a forward of its own"),
        (lambda: stages(Exits(resnet(), [], SHAPE), {"conv": 1.0}), "the network has no 'conv', for which"),
        (lambda: slimmable(resnet(), [0.0, 1.0]), "width = 0.0: allowed are shares"),
        (lambda: slimmable(resnet(), [{"conv1": 9}]), "width 'conv1': 9; allowed are 1 to 8 channels"),
        (lambda: slimmable(resnet(), [{"fc": 9}]), "allowed are layers conv1"),
        (lambda: slimmable(nn.Conv2d(1, 4, 3, 1, 1, padding_mode="reflect"), [1.0]), r"\(Conv2d\); allowed are plain"),
        (lambda: slimmable(nn.Sequential(Standardized(1, 4, 3)), [1.0]), r"slimmable: 0 \(Standardized\)"),
        (lambda: slimmable(nn.Sequential(nn.Conv1d(1, 4, 3)), [1.0]), r"slimmable: 0 \(Conv1d\)"),
        (lambda: slimmable(nn.Sequential(nn.BatchNorm2d(4, affine=False)), [1.0]), r"0 \(BatchNorm2d\)"),
        (lambda: slimmable(slimmable(resnet(), [1.0]), [1.0]), r"conv1 \(SlimConv2d\).* or slimmable yet"),
        (lambda: slimmable(masked(resnet()), [1.0]), r"block1_1.conv1 \(ParametrizedConv2d\).*masked"),
        (lambda: slimmable(build("resnet8", SHAPE, 10, shortcut="A"), [0.5]), "block2_1.shortcut adds a fixed number"),
        (lambda: sandwich(2)(slimmable(resnet(), [0.5, 0.7, 1.0]), None, None, None), "the network has 3 widths"),
        (lambda: ordered(masked(resnet())), "ordered: the network is masked"),
        (lambda: at_width(resnet(), 0).__enter__(), "the network has 0"),
        (lambda: uneven(resnet(), None, SHAPE, [1e6, 2e6]), "allowed are falling numbers of at least"),
        (lambda: uneven(resnet(), None, SHAPE, [1e3]), r"budgets = \[1000.0\]: allowed are falling numbers"),
    ],
)
def test_what_is_refused_is_named(call, said):
    with pytest.raises(LayerError, match=said):
        call()


def test_a_budget_below_the_cheapest_path_is_named_with_its_cost():
    net, costs = with_exits()
    first = dearest(net, costs)[0]
    with pytest.raises(LayerError, match=f"to the first exit, may take {first:.6g}"):
        leave(net, pictures(1), costs, budget=first - 1)
    with pytest.raises(LayerError, match="2 images"):
        leave(net, pictures(2), costs)
    with pytest.raises(LayerError, match="misses 'exit block1_2'"):
        anytime(net, pictures(1), {k: v for k, v in costs.items() if k != "exit block1_2"})


def test_a_table_that_misses_a_block_is_refused_when_it_is_used():
    net = choosing(resnet())
    net(pictures(2))
    with pytest.raises(LayerError, match="misses block 'block1_2'"):
        spent(net, {"block1_1": (0.0, 1.0)})


def test_bitwise_counts_follow_from_shapes():
    """Columns in use and off fill the arrays, and halving bits halves the columns and quarters the operations."""
    layers = shapes.layer_shapes(resnet(16), SHAPE)
    eight, four = bitwise(layers, 8, 8, 128, 128), bitwise(layers, 4, 4, 128, 128)
    assert (eight["columns"] + eight["columns_off"] == 128 * eight["arrays"]).all()
    strips = -(-layers["rows"] // 128)
    assert eight["columns"].tolist() == (8 * layers["filters"] * strips).tolist()
    assert eight["bit_operations"].tolist() == (64 * layers["macs"]).tolist()
    assert (eight["bit_operations"] == 4 * four["bit_operations"]).all()
    assert (eight["columns"] == 2 * four["columns"]).all()
