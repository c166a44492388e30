from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from math import isnan, sqrt

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, linear

from lib.constraint import attach_masks, leaf
from lib.data import Split
from lib.layers import LayerError, choosing
from lib.layers.gates import RecurrentGate, SkippedBlock, gate_of, skippable
from lib.models import BasicBlock, build
from lib.recipes.e2_train import MiniBatchDropping, SignPrediction, e2_train, low_precision, predictive_signs
from lib.recipes.e2_train.signs import leading, quantized
from lib.shapes import macs, prunable
from lib.training import Hook, StrideFirst, TrainingError, batches, cached, evaluate, fit, metered

FAST = {"lr": 0.1, "batch_size": 20, "schedule": "cosine"}


@pytest.fixture(scope="session")
def images(small_images):
    return small_images


@pytest.fixture
def plain(images):
    return build("resnet14", images.shape, images.classes, width=4)


@pytest.fixture
def gated(plain):
    return skippable(deepcopy(plain))


def probabilities(net):
    """What the gate says in the next passes, in the graph."""
    said = []
    gate_of(net).register_forward_hook(lambda _, args, p: said.append(p))
    return said


def open_to(net, bias):
    gate_of(net).read_out.bias.data.fill_(bias)
    return net


def step(net, images, n=16):
    net.train()
    with StrideFirst():
        loss = cross_entropy(net(images.train.x[:n]), images.train.y[:n])
        loss.backward()
    return loss


# Batches


def test_half_of_the_batches_are_dropped_whatever_the_neighbours_do():
    draws = {seed: [MiniBatchDropping(0.5, seed).skips(None, s) for s in range(1000)] for seed in range(4)}
    assert draws[0] == [MiniBatchDropping(0.5, 0).skips(None, s) for s in range(1000)]
    for seed, drawn in draws.items():
        assert 450 <= 1000 - sum(drawn) <= 550
        assert 450 <= sum(a == b for a, b in pairwise(drawn)) <= 550  # consecutive steps
        other = draws[(seed + 1) % 4]
        assert 440 <= sum(a == b for a, b in zip(drawn, other, strict=True)) <= 560  # consecutive seeds


def test_what_a_small_share_drops_a_large_one_drops_too():
    few, many = ([MiniBatchDropping(share, 3).skips(None, s) for s in range(500)] for share in (0.2, 0.6))
    assert all(b for a, b in zip(few, many, strict=True) if a)
    assert not any(MiniBatchDropping(0.0).skips(None, s) for s in range(500))


class _Watch(Hook):
    def __init__(self):
        self.taken, self.before = [], []

    def stops(self, model, step):
        self.before.append({k: v.clone() for k, v in model.state_dict().items()})
        return False

    def after_backward(self, model, step):
        self.taken.append(step)


def test_a_dropped_batch_moves_nothing(images):
    net, watch = build("resnet8", images.shape, images.classes, width=4), _Watch()
    log = e2_train(net, images, epochs=2, drop=0.5, weight_decay=1e-3, seed=5, hooks=(watch,), **FAST)
    kept = [s for s in range(100) if not MiniBatchDropping(0.5, 5).skips(None, s)]
    assert watch.taken == kept
    assert log["images"].sum() == 20 * len(kept)
    states = [*watch.before, net.state_dict()]
    for s in range(100):
        moved = any(not torch.equal(states[s][k], states[s + 1][k]) for k in states[s])
        assert moved == (s in kept)


def test_without_options_it_is_the_plain_loop(images):
    a, b = (build("resnet8", images.shape, images.classes, width=4) for _ in range(2))
    one, other = e2_train(a, images, epochs=1, **FAST), fit(b, images, epochs=1, **FAST)
    assert one["train_loss"].equals(other["train_loss"])
    assert one[["executed", "predicted", "agreement"]].isna().all(axis=None)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_epochs_without_a_batch_have_no_row(images):
    net = skippable(build("resnet8", images.shape, images.classes, width=4))
    options = {"epochs": 6, "lr": 0.1, "batch_size": 1000, "drop": 0.5, "skip_cost": 0.0}
    log = e2_train(net, images, **options)
    assert log["epoch"].tolist() == [s + 1 for s in range(6) if not MiniBatchDropping(0.5).skips(None, s)]
    assert 1 < len(log) < 6
    assert log["executed"].between(0.5, 1).all()


# Blocks


def test_a_gate_that_never_skips_is_the_plain_network(plain, gated, images):
    open_to(gated, 100.0)  # sigmoid(100) is 1 in single precision
    assert torch.equal(step(plain, images), step(gated, images))
    theirs = {n.replace(".block.", "."): p.grad for n, p in gated.named_parameters()}
    for name, p in plain.named_parameters():
        assert torch.equal(p.grad, theirs[name]), name
    assert torch.equal(plain.eval()(images.test.x[:50]), gated.eval()(images.test.x[:50]))
    assert gate_of(gated).now.share == 1


def test_a_closed_gate_leaves_images_as_they_came(gated, images):
    open_to(gated, -200.0)
    ran = []
    for module in gated.modules():
        if isinstance(module, BasicBlock):
            module.register_forward_hook(lambda *_: ran.append(1))
    step(gated, images)
    assert len(ran) == 2  # those that change the shape
    assert gate_of(gated).now.share == 0
    x = torch.rand(3, 4, 7, 7)
    assert torch.equal(gated.block1_1.train()(x), x)


def test_batch_norm_and_products_see_only_the_images_drawn():
    torch.manual_seed(0)
    block = SkippedBlock(BasicBlock(4, 4, 1), RecurrentGate([4]), 0)
    block.gate.read_out.bias.data.fill_(0.0)
    seen = []
    block.block.bn1.register_forward_hook(lambda _, args, y: seen.append(args[0].shape[0]))
    x = torch.rand(200, 4, 6, 6)
    y = block(x)
    kept = (y == x).flatten(1).all(1)
    assert seen == [200 - int(kept.sum())]
    assert 60 < seen[0] < 140
    assert torch.equal(y[~kept], block.block.train()(x[~kept]))
    assert block.gate.now.share == seen[0] / 200


def test_evaluation_runs_where_the_gate_is_more_than_half_open():
    torch.manual_seed(0)
    block = SkippedBlock(BasicBlock(4, 4, 1), RecurrentGate([4]), 0).eval()
    block.gate.read_out.weight.data.mul_(30)
    x = torch.rand(50, 4, 3, 3) * torch.linspace(-3, 3, 50).view(-1, 1, 1, 1)
    p = block.gate(x, 0)
    block.gate.read_out.bias.data.sub_(torch.logit(p).median())  # so that half of them pass
    passes = block.gate(x, 0) > 0.5
    assert 20 <= passes.sum() <= 30
    assert torch.equal(block(x)[~passes], x[~passes])
    assert torch.allclose(block(x)[passes], block.block(x)[passes], atol=1e-6)


def test_the_gates_gradient_is_the_straight_through_one_on_average():
    torch.manual_seed(1)
    block = SkippedBlock(BasicBlock(3, 3, 1), RecurrentGate([3]), 0)
    block.block.eval()  # F(x) of an image is then the same whoever else was drawn
    block.gate.read_out.bias.data.fill_(0.0)
    block.gate.read_out.weight.data.mul_(8)
    x, draws = torch.rand(5, 3, 4, 4) * torch.linspace(0.2, 6, 5).view(-1, 1, 1, 1), 6000
    outside = torch.randn_like(x)  # dL/dout
    said = probabilities(block)
    out = block(x.repeat(draws, 1, 1, 1))
    said[0].retain_grad()
    (out * outside.repeat(draws, 1, 1, 1)).sum().backward()
    found = said[0].grad.view(draws, 5)
    full = (outside * (block.block(x) - x)).flatten(1).sum(1).detach()  # the straight-through gradient
    error = (found.mean(0) - full).abs() / (found.std(0) / sqrt(draws))
    assert error.max() < 4  # standard errors
    assert (found.std(0) > 0.4 * full.abs()).all()  # it does vary: by sqrt(1 / p - 1)
    p = said[0].detach().view(draws, 5)
    ran = found != 0
    assert torch.allclose(found[ran], (full.expand_as(p) / p)[ran], rtol=1e-4)


def test_the_gradient_of_the_weights_is_that_of_the_path_that_ran():
    torch.manual_seed(2)
    block = SkippedBlock(BasicBlock(3, 3, 1), RecurrentGate([3]), 0)
    gate_of(block).keep.fill_(0.5)
    x = torch.rand(12, 3, 4, 4, requires_grad=True)
    y = block(x)
    ran = ~(y == x).flatten(1).all(1)
    y.square().sum().backward()
    other = x.detach().clone().requires_grad_()
    twin = deepcopy(block.block)
    twin.zero_grad()
    (twin(other[ran]).square().sum() + other[~ran].square().sum()).backward()
    assert torch.allclose(x.grad, other.grad, atol=1e-6)
    for p, q in zip(block.block.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5)


@pytest.mark.parametrize(("least", "sign"), [(0.0, 1), (1.0, -1)])
def test_the_cost_is_the_expected_share_of_the_work(gated, images, least, sign):
    """Its gradient is all there is where the task has none, an objective of the caller's included."""
    few, found, twin = replace(images, train=Split(images.train.x[:30], images.train.y[:30])), {}, deepcopy(gated)

    class Look(Hook):
        def after_backward(self, model, step):
            found.update({n: p.grad.clone() for n, p in gate_of(model).named_parameters()})

    nothing = {"objective": lambda model, x, y, output: 0.0 * output.sum(), "hooks": (Look(),), "seed": 3}
    e2_train(open_to(gated, 0.5), few, epochs=1, lr=1e-9, skip_cost=0.7, least=least, **nothing)
    said = probabilities(open_to(twin, 0.5))
    torch.manual_seed(3)
    with StrideFirst():
        twin.train()(next(batches(few.train, 128, seed=3, epoch=0))[0])
    work = torch.tensor([18.0 * c * c * side**2 for c, side in ((4, 14), (4, 14), (8, 7), (16, 4))])
    cost = 0.7 * sum(w * p.mean() for w, p in zip(work, said, strict=True)) / work.sum()
    assert float(gate_of(twin).now.expected(0.7).detach()) == pytest.approx(float(cost.detach()))
    assert cost > 0.1
    (sign * cost).backward()
    for name, p in gate_of(twin).named_parameters():
        assert torch.allclose(found[name], p.grad, atol=1e-7), name


def test_a_high_cost_closes_blocks_and_least_keeps_them(images):
    last = {}
    for least in (0.0, 0.6):
        net = skippable(build("resnet14", images.shape, images.classes, width=4))
        log = e2_train(net, images, epochs=3, skip_cost=4.0, least=least, **FAST)
        last[least] = log["executed"].tolist()
    assert last[0.0][0] > last[0.0][2]
    assert last[0.6][2] > last[0.0][2]


def test_the_random_gate_keeps_its_share_and_learns_nothing(gated, images):
    before = deepcopy(gate_of(gated).state_dict())
    log = e2_train(gated, images, epochs=2, keep=0.7, **FAST)
    assert log["executed"].between(0.66, 0.74).all()
    after = gate_of(gated).state_dict()
    assert after["keep"] == torch.tensor(0.7)
    assert all(torch.equal(before[k], after[k]) for k in before if k != "keep")
    block, x = gated.block2_2.eval(), torch.rand(4, 8, 5, 5)
    assert torch.allclose(block(x), 0.3 * x + 0.7 * block.block(x), atol=1e-6)
    e2_train(gated, images, epochs=1, skip_cost=0.0, **FAST)
    assert gate_of(gated).keep == 0  # learned again


def test_the_same_seed_gives_the_same_gate_and_leaves_the_random_state(plain):
    state = torch.get_rng_state()
    a, b, c = (gate_of(skippable(deepcopy(plain), seed=s)) for s in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a.cell.weight_ih, b.cell.weight_ih)
    assert not torch.equal(a.cell.weight_ih, c.cell.weight_ih)
    assert len([k for k in skippable(plain).state_dict() if "cell" in k]) == 4  # once, not once a block


def test_a_copy_has_a_gate_of_its_own(gated, images):
    gated.train()(images.train.x[:8])  # a graph is alive
    copy = deepcopy(gated)
    mine, yours = ([m._shared[0] for m in net.modules() if isinstance(m, SkippedBlock)] for net in (gated, copy))
    assert len({id(g) for g in mine}) == len({id(g) for g in yours}) == 1
    assert mine[0] is not yours[0]
    open_to(copy, -200.0)
    step(copy, images)
    assert gate_of(copy).now.share == 0 < gate_of(gated).now.share
    assert all(p.grad is None for p in gated.parameters())
    assert any(p.grad is not None for p in gate_of(copy).parameters())


# Signs


def _layers():
    return {
        "linear": (nn.Linear(12, 7), torch.randn(9, 12)),
        "three axes": (nn.Linear(12, 7, bias=False), torch.randn(3, 5, 12)),
        "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.rand(5, 4, 9, 9)),
        "grouped": (nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2), torch.randn(5, 4, 8, 8)),
        "reflected": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), torch.rand(2, 2, 6, 6)),
    }


@pytest.mark.parametrize("name", list(_layers()))
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_signs_and_input_gradients_are_those_of_the_rounded_operands(name, threshold):
    torch.manual_seed(0)
    layer, x = _layers()[name]
    twin, x = deepcopy(layer), x.requires_grad_()
    with predictive_signs(layer, threshold) as rule:
        y = layer(x)
        g = torch.randn_like(y)
        y.backward(g)
    inputs = quantized(x.detach(), 8, signed=False)
    twin.weight.data = quantized(layer.weight.detach(), 8).value
    other = inputs.value.clone().requires_grad_()
    expected = twin(other)
    assert torch.allclose(y, expected, atol=1e-5)
    expected.backward(quantized(g, 16).value)
    assert torch.allclose(x.grad, other.grad, atol=1e-5)
    if threshold == 0:  # all are predicted
        twin.zero_grad()
        twin(leading(inputs, 4)).backward(quantized(g, 16).value)
    assert rule.predicted == (threshold == 0)
    assert isnan(rule.agreement) == (threshold > 1)
    clear = twin.weight.grad.abs() > 1e-5 * twin.weight.grad.abs().max()  # sums in another order may end beside zero
    assert clear.float().mean() > 0.95
    assert torch.equal(layer.weight.grad[clear], twin.weight.grad.sign()[clear])
    if layer.bias is not None:
        true = g.sum(0) if g.ndim == 2 else g.sum((0, 2, 3))
        assert torch.allclose(layer.bias.grad, true, atol=1e-5)


@pytest.mark.parametrize("name", list(_layers()))
def test_at_low_precision_gradients_are_those_of_the_rounded_operands(name):
    torch.manual_seed(0)
    layer, x = _layers()[name]
    twin, other = deepcopy(layer), quantized(x, 8, signed=False).value.requires_grad_()
    twin.weight.data = quantized(layer.weight.detach(), 8).value
    with low_precision(layer):
        y = layer(x.requires_grad_())
        y.backward(g := torch.randn_like(y))
    twin(other).backward(quantized(g, 16).value)
    assert torch.allclose(x.grad, other.grad, atol=1e-5)
    assert torch.allclose(layer.weight.grad, twin.weight.grad, rtol=1e-4, atol=1e-4)
    assert layer.weight.grad.unique().numel() > 3  # no signs


def test_low_precision_reaches_into_torchs_fused_layers():
    torch.manual_seed(0)
    net, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(3, 5, 8)
    found = {}
    for training in (True, False):
        net.train(training)
        with low_precision(net), torch.no_grad():
            found[training] = net(x)
    with torch.no_grad():
        assert not torch.allclose(found[False], net(x), atol=1e-5)  # fused again
    assert torch.allclose(found[True], found[False], atol=1e-6)


def test_layers_that_are_shared_add_their_gradients_at_low_precision():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight, x = first.weight, torch.randn(3, 4)
    with low_precision(nn.Sequential(first, second)):
        second(first(x).relu()).sum().backward()
        both, first.weight.grad = first.weight.grad, None
        second(first(x).relu().detach()).sum().backward()
        last, first.weight.grad = first.weight.grad, None
        second.weight = nn.Parameter(first.weight.detach().clone())
        second(first(x).relu()).sum().backward()
    assert torch.allclose(both, first.weight.grad + last, atol=1e-5)


def test_operands_have_no_more_levels_than_bits():
    torch.manual_seed(0)
    x = torch.randn(4000)
    for codes, top in ((quantized(x, 8), 127), (quantized(x.abs(), 8, signed=False), 255), (quantized(x, 16), 32767)):
        assert codes.codes.abs().max() == top
        assert torch.equal(codes.codes, codes.codes.round())
    assert torch.allclose(quantized(x, 8).value, x, atol=float(x.abs().max()) / 254 * 1.001)
    assert len(leading(quantized(x, 8), 4).unique()) == 15
    assert len(leading(quantized(x.abs(), 8, signed=False), 4).unique()) == 16
    assert quantized(torch.zeros(3), 8).value.tolist() == [0, 0, 0]


def test_the_rule_predicts_the_large_ones():
    torch.manual_seed(0)
    rough, noise = torch.randn(10_000), 0.1 * torch.randn(10_000)
    rule = SignPrediction(0.05)
    signs = rule.signs(rough, rough + noise)
    sure = rough.abs() >= 0.05 * rough.abs().max()
    assert rule.predicted == float(sure.double().mean())
    assert rule.agreement == float(((rough + noise).sign() == rough.sign())[sure].double().mean())
    assert torch.equal(signs, torch.where(sure, rough, rough + noise).sign())
    rule.reset()
    assert isnan(rule.predicted)


def test_the_rate_is_scaled_and_norms_keep_their_gradients(plain, images):
    with predictive_signs(plain, scale=0.01):
        step(plain, images)
    for layer in prunable(plain).values():
        assert set(layer.weight.grad.unique().tolist()) <= {-torch.tensor(0.01).item(), 0.0, torch.tensor(0.01).item()}
    assert len(plain.bn1.weight.grad.unique()) == 4
    assert len(plain.fc.bias.grad.unique()) == 10


def test_masked_layers_get_signs_where_there_is_a_weight():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4))
    mask = torch.rand(4, 6) < 0.5
    attach_masks(net, {"0": mask})

    def once(model):
        with predictive_signs(model, 0.3) as rule:
            model(torch.randn(8, 6)).square().sum().backward()
        return rule.predicted

    predicted, spent = metered(net, lambda model, progress: once(model))
    gradient = leaf(net[0]).grad
    assert not gradient[~mask].any()
    assert gradient[mask].abs().eq(1).all()
    live = 8.0 * int(mask.sum())
    assert 0 < predicted < 1
    assert {(r.product, r.bits_a, r.bits_b): r.macs for r in spent.itertuples()} == pytest.approx(
        {
            ("forward", 8, 8): live,
            ("weight_sign", 4, 16): live,
            ("weight_gradient", 8, 16): live * (1 - predicted),
        }
    )


def test_the_network_is_an_ordinary_one_afterwards(plain, images):
    x, kinds = images.test.x[:20], [type(m) for m in plain.modules()]
    before = {name: set(vars(layer)) for name, layer in prunable(plain).items()}
    expected = plain.eval()(x)
    with predictive_signs(plain):
        rounded = plain(x)
        assert all(layer.charges_itself for layer in prunable(plain).values())
        with pytest.raises(TrainingError, match="swapped already"), predictive_signs(plain):
            pass
    assert not torch.equal(rounded, expected)
    assert torch.allclose(rounded, expected, atol=0.1 * float(expected.detach().abs().max()))
    with pytest.raises(KeyError), predictive_signs(plain):
        raise KeyError
    assert torch.equal(plain(x), expected)
    assert [type(m) for m in plain.modules()] == kinds
    assert {name: set(vars(layer)) for name, layer in prunable(plain).items()} == before
    assert not any(hasattr(layer, "charges_itself") for layer in prunable(plain).values())


def test_the_gate_stays_at_full_width(gated):
    inside = [*gate_of(gated).projections, gate_of(gated).read_out]
    with predictive_signs(gated):
        assert not any("forward" in vars(layer) for layer in inside)
        assert "forward" in vars(gated.block1_1.block.conv1)


def test_a_convolution_along_one_dimension_is_refused():
    with pytest.raises(TrainingError, match="layer 0 is a Conv1d"), predictive_signs(nn.Sequential(nn.Conv1d(1, 2, 3))):
        pass


def test_evaluation_at_eight_bits(images):
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3).eval(), torch.randn(4, 5)
    with torch.no_grad(), predictive_signs(layer):
        y = layer(x)
    weight = quantized(layer.weight.detach(), 8).value
    assert torch.allclose(y, linear(quantized(x, 8).value, weight, layer.bias), atol=1e-6)
    conv, x = nn.Conv2d(2, 3, 3), torch.rand(2, 2, 5, 5)
    with torch.no_grad(), predictive_signs(conv):
        y = conv(x)
    weight = quantized(conv.weight.detach(), 8).value
    assert torch.allclose(y, conv2d(quantized(x, 8, signed=False).value, weight, conv.bias), atol=1e-6)


# All together


ALL = {"drop": 0.5, "skip_cost": 0.5, "signs": True, "epochs": 2, **FAST}


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_the_meter_is_the_product_of_the_three(plain, gated, images, threshold):
    log, spent = metered(gated, e2_train, images, threshold=threshold, **ALL)
    assert log["predicted"].eq(threshold == 0).all()
    kept = [s for s in range(100) if not MiniBatchDropping(0.5).skips(None, s)]
    n = int(log["images"].sum())
    assert n == 20 * len(kept)
    dense = macs(plain, images.shape).set_index("layer")["macs"]
    first, skipped = dense["conv1"], sum(m for name, m in dense.items() if name[:8] in GATED)
    executed = float((log["images"] * log["executed"]).sum()) / n
    assert 0.5 < executed < 1
    body = n * (dense.sum() - skipped * (1 - executed))
    network = spent[~spent["layer"].str.contains("gate")]
    found = network.groupby(["product", "bits_a", "bits_b"])["macs"].sum().to_dict()
    expected = {
        ("forward", 8, 8): body,
        ("input_gradient", 16, 8): body - n * first,
        ("weight_sign", 4, 16): body,
        ("weight_gradient", 8, 16): body,
    }
    if threshold == 0:
        del expected["weight_gradient", 8, 16]
    assert found == pytest.approx(expected, rel=1e-9)
    energy = (network["macs"] * network["bits_a"] * network["bits_b"]).sum() / 1024
    psg = (8 * 8 + 16 * 8 + 4 * 16 + (threshold > 0) * 8 * 16) / 1024 / 3
    dropped = 1 - n / 2000
    cp = body / (n * dense.sum())
    formula = 2000 * 3 * dense.sum() * (1 - dropped) * cp * psg - n * first * 16 * 8 / 1024  # no gradient of images
    assert energy == pytest.approx(formula, rel=1e-9)


def test_ordinary_gradients_of_eight_bits_are_charged_as_signs_with_nothing_predicted(plain, images):
    twin, options = deepcopy(plain), {"epochs": 1, **FAST}
    nothing = metered(twin, e2_train, images, signs=True, threshold=2.0, **options)[1]
    log, spent = metered(plain, e2_train, images, eight_bits=True, **options)
    assert spent.equals(nothing[nothing["product"] != "weight_sign"].reset_index(drop=True))
    assert log["predicted"].isna().all()


GATED = ("block1_1", "block1_2", "block2_2", "block3_2")


def test_the_gate_is_charged(gated, images):
    log, spent = metered(gated, e2_train, images, skip_cost=0.0, epochs=1, lr=0.1)
    spent = spent[spent["layer"].str.contains("gate")]
    assert (spent[["bits_a", "bits_b"]] == 32).all(axis=None)
    found = spent.groupby(["layer", "product"])["macs"].sum().to_dict()
    expected = {}
    for i, c in enumerate((4, 4, 8, 16)):
        expected |= {(f"block1_1.gate.projections.{i}", p): 1000.0 * 10 * c for p in PRODUCTS}
    expected |= {("block1_1.gate.read_out", p): 1000.0 * 4 * 10 for p in PRODUCTS}
    expected |= {("block1_1.gate.cell", p): 1000.0 * 4 * 800 for p in PRODUCTS}
    expected["block1_1.gate.cell", "input_gradient"] -= 1000 * 400  # the first state is zero
    assert found == expected
    assert log["images"].tolist() == [1000]


PRODUCTS = ("forward", "input_gradient", "weight_gradient")


def test_a_meter_opened_before_counts_plain_steps_again_afterwards(images):
    def both(model, data, progress):
        e2_train(model, data, epochs=1, lr=0.1, signs=True)
        fit(model, data, epochs=1, lr=0.1)

    _, spent = metered(build("resnet8", images.shape, images.classes, width=4), both, images)
    forward = spent[spent["product"] == "forward"].groupby(["bits_a", "bits_b"])["macs"].sum()
    assert forward.to_dict()[8, 8] == forward.to_dict()[32, 32]


PARTS = {
    "drop": {"drop": 0.3},
    "blocks": {"skip_cost": 0.1},
    "random": {"keep": 0.8},
    "eight bits": {"eight_bits": True},
    "signs": {"signs": True},
    "all": {"drop": 0.3, "skip_cost": 0.1, "least": 0.5, "signs": True},
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_learns(part, images):
    net = skippable(build("resnet8", images.shape, images.classes, width=8))
    log = e2_train(net, images, epochs=3, seed=1, **PARTS[part], **FAST)
    assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]
    assert evaluate(net, images.test) > 0.2  # twice what guessing gives
    assert log["executed"].notna().all()
    assert log["predicted"].notna().all() == ("signs" in PARTS[part])


@pytest.mark.parametrize("part", ["random", "all"])
def test_the_same_seed_gives_the_same_bits(part, images):
    runs = []
    for seed in (1, 1, 2):
        net = skippable(build("resnet8", images.shape, images.classes, width=4))
        log = e2_train(net, images, epochs=1, seed=seed, **PARTS[part], **FAST)
        runs.append((log, net.state_dict()))
    assert runs[0][0].equals(runs[1][0])
    assert all(torch.equal(a, runs[1][1][k]) for k, a in runs[0][1].items())
    assert not runs[0][0].equals(runs[2][0])


def test_a_higher_threshold_predicts_fewer_signs_and_more_of_them_rightly(plain, images):
    predicted, agreement = [], []
    for threshold in (0.0, 0.05, 0.2, 0.8, 2.0):
        net = deepcopy(plain)
        with predictive_signs(net, threshold) as rule:
            step(net, images)
        predicted.append(rule.predicted)
        agreement.append(rule.agreement)
    assert predicted == sorted(predicted, reverse=True)
    assert (predicted[0], predicted[-1]) == (1, 0)
    assert 0.5 < agreement[0] < agreement[1] <= agreement[2] <= agreement[3] == 1
    assert isnan(agreement[4])


@pytest.mark.parametrize("options", [ALL, {"keep": 0.6, "epochs": 1, **FAST}])
def test_the_cache_gives_back_log_counts_and_network(images, options):
    found = []
    for _ in range(2):
        net, said = skippable(build("resnet8", images.shape, images.classes, width=4)), []
        names = [*net.state_dict()]
        log, spent = cached(metered, net, e2_train, images, progress=lambda _, m, said=said: said.append(m), **options)
        assert [*net.state_dict()] == names
        found.append((log, spent, net.eval()(images.test.x[:50])))
    assert said == ["from the cache"]
    assert found[0][0].equals(found[1][0])
    assert found[0][1].equals(found[1][1])
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 1.0}, r"drop = 1.0: allowed are shares in \[0, 1\)"),
        ({"drop": -0.1}, "drop = -0.1"),
        ({"skip_cost": -1.0}, "skip_cost = -1.0: allowed are numbers >= 0"),
        ({"skip_cost": float("nan")}, "skip_cost = nan"),
        ({"keep": 0.0}, r"keep = 0.0: allowed are probabilities in \(0, 1\]"),
        ({"keep": 1.1}, "keep = 1.1"),
        ({"skip_cost": 1.0, "keep": 0.5}, "skip_cost=1.0, keep=0.5"),
        ({"skip_cost": 1.0, "least": 1.5}, "least=1.5"),
        ({"least": 0.5}, "least=0.5, skip_cost=None"),
        ({"signs": True, "threshold": -1.0}, "threshold = -1.0: allowed are numbers >= 0"),
        ({"signs": True, "sign_scale": 0.0}, "sign_scale = 0.0: allowed are numbers > 0"),
        ({"lr": 0.0}, "lr=0.0"),
    ],
)
def test_bad_values_are_refused_at_once(gated, images, options, message):
    before = deepcopy(gated.state_dict())
    with pytest.raises(TrainingError, match=message):
        e2_train(gated, images, **{"epochs": 1, "lr": 0.1} | options)
    assert all(torch.equal(v, before[k]) for k, v in gated.state_dict().items())


def test_networks_that_do_not_fit_are_refused(plain, net, images):
    with pytest.raises(LayerError, match=r"call skippable\(model\) before"):
        e2_train(plain, images, epochs=1, lr=0.1, skip_cost=0.1)
    with pytest.raises(LayerError, match="no gate"):
        e2_train(plain, images, epochs=1, lr=0.1, keep=0.5)
    with pytest.raises(LayerError, match="gate skips no block"):
        e2_train(choosing(deepcopy(plain)), images, epochs=1, lr=0.1, keep=0.5)
    assert e2_train(choosing(deepcopy(plain)), images, epochs=1, lr=0.1)["executed"].isna().all()
    with pytest.raises(LayerError, match="no residual block"):
        skippable(net)
    with pytest.raises(LayerError, match="already"):
        skippable(skippable(plain))
    twice = nn.Sequential(layer := nn.Linear(4, 4), nn.ReLU(), layer)
    with predictive_signs(twice), pytest.raises(TrainingError, match=r"Linear\(.* is used more than once in a pass"):
        twice(torch.ones(2, 4)).sum().backward()
    with predictive_signs(twice[:2]):  # two passes, each with a backward pass, are none
        for _ in range(2):
            twice[:2](torch.ones(2, 4)).sum().backward()
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with low_precision(tied), pytest.raises(TrainingError, match="swapped already"), low_precision(tied):
        pass
    with pytest.raises(TrainingError, match="several modules share 0"), predictive_signs(tied):
        pass
    for bits in ({"msb_bits": 1}, {"msb_bits": 9}, {"msb_bits_grad": 17}):
        with pytest.raises(TrainingError, match="msb_bits"), predictive_signs(net, **bits):
            pass
