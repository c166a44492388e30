"""Block-circulant weights: the nearest ones, layers that compute by transforms as dense ones do, and their bills."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib import costs, data, faults, models, recipes
from lib.constraint import ConstraintError, Storage, harden
from lib.keys import content
from lib.layers import CirculantConv2d, CirculantLinear, LayerError, as_dense, circulant
from lib.pruning import Filter
from lib.shapes import ShapeError, layer_shapes
from lib.sharing import BlockCirculant, fft_operations


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "k"), [((7, 10), 4), ((8, 8), 8), ((5, 6, 3, 2), 4), ((3, 2, 3), 5), ((9,), 3)])
def test_projection_by_loops(shape, k):
    """Means of the numbers of a diagonal that are there, at every position of the kernel."""
    weight = random(*shape)
    w = weight.reshape(1, -1, 1) if len(shape) == 1 else weight.flatten(2) if len(shape) > 2 else weight[..., None]
    found = BlockCirculant(k).project(weight).reshape(w.shape)
    for f in range(w.shape[0]):
        for c in range(w.shape[1]):
            top, left = f // k * k, c // k * k
            same = [
                w[i, j]
                for i in range(top, min(top + k, w.shape[0]))
                for j in range(left, min(left + k, w.shape[1]))
                if (i - j - f + c) % k == 0
            ]
            assert torch.allclose(found[f, c], torch.stack(same).mean(0), atol=1e-6)


def test_one_block_is_a_circulant():
    columns = torch.arange(5.0).reshape(1, 1, 5)
    weight = BlockCirculant(5).weight(columns, torch.Size([5, 5]))
    x = random(5)
    assert torch.allclose(weight @ x, torch.fft.ifft(torch.fft.fft(columns[0, 0]) * torch.fft.fft(x)).real, atol=1e-5)


LINEAR = [(12, 8, 4), (10, 7, 3), (5, 5, 8), (6, 9, 1), (16, 32, 16)]


@pytest.mark.parametrize(("inputs", "outputs", "k"), LINEAR)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_forward_and_backward(inputs, outputs, k, bias):
    torch.manual_seed(k)
    layer = CirculantLinear(nn.Linear(inputs, outputs, bias=bias), k)
    same_as_dense(layer, random(3, 2, inputs), lambda x, w: F.linear(x, w, layer.bias))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "bias": False}], ids=str)
def test_convolution_forward_and_backward(k, options):
    torch.manual_seed(k)
    layer = CirculantConv2d(nn.Conv2d(6, 10, (3, 2), **options), k)
    kept = {name: value for name, value in options.items() if name != "bias"}
    same_as_dense(layer, random(2, 6, 9, 8), lambda x, w: F.conv2d(x, w, layer.bias, **kept))


def same_as_dense(layer, x, product):
    """Outputs, gradients of inputs and of first columns, with and without a kept spectrum."""
    x = x.requires_grad_()
    expected = product(x, layer.weight())
    target = random(*expected.shape, seed=7)
    wanted = torch.autograd.grad((expected * target).sum(), (x, *layer.parameters()))
    found = layer(x)
    got = torch.autograd.grad((found * target).sum(), (x, *layer.parameters()))
    for ours, theirs in zip((found, *got), (expected, *wanted), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()) + 1e-7)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-7)
        layer.columns.mul_(2)  # the spectrum that was kept is of other columns
        assert torch.allclose(layer(x), product(x, layer.weight()), rtol=1e-4, atol=1e-4)
    assert torch.allclose(layer.dense()(x), layer(x), rtol=1e-4, atol=1e-4)


def test_operations_by_counting():
    """Every sum and product of a transform of 8 and of the products between, counted by hand."""
    assert [fft_operations(k) for k in (1, 2, 4, 8, 16)] == [0, 2, 6, 22, 70]
    # (2 + 3) transforms, 6 blocks of 2 real and 3 complex products, and for each row of blocks one sum of 8 numbers
    assert BlockCirculant(8).operations(torch.zeros(24, 16)) == 5 * 22 + 6 * (2 + 3 * 6) + 3 * 8
    assert BlockCirculant(1).operations(torch.zeros(4, 6)) == 4 * (6 + 5)
    for k in (2, 4, 64):  # a convolution: transforms once a pixel, products at every position
        conv, linear = (BlockCirculant(k).operations(torch.zeros(64, 64, *kernel)) for kernel in ((3, 3), ()))
        transforms = 2 * (64 // k) * fft_operations(k)
        assert conv - transforms == 9 * (linear - transforms) + (9 - 1) * 64
    with pytest.raises(ConstraintError, match="k = 6: operations"):
        BlockCirculant(6).operations(torch.zeros(12, 12))


def test_work_grows_as_n_log_n():
    """Of one block of n: operations over n log2 n stay between two constants while the dense product's grow by n."""
    counts = [BlockCirculant(n).operations(torch.zeros(n, n)) / (n * (n.bit_length() - 1)) for n in (64, 512, 4096)]
    assert counts == sorted(counts)
    assert counts[-1] < 4


def test_storage_counts_the_padding():
    assert BlockCirculant(4).storage_bits(torch.zeros(10, 7, 3, 3), 8) == Storage(3 * 2 * 4 * 9 * 8)
    layer = CirculantConv2d(nn.Conv2d(7, 10, 3), 4)
    assert 8 * layer.columns.numel() == BlockCirculant(4).storage_bits(layer.weight(), 8).total


def test_a_network_and_back():
    torch.manual_seed(0)
    net = models.build("lenet5", (1, 28, 28), 10)
    plan = {"conv2": BlockCirculant(8), "fc1": BlockCirculant(16)}
    x = random(4, 1, 28, 28)
    fast, hard = circulant(net, plan), harden(models.build("lenet5", (1, 28, 28), 10), plan)
    with torch.no_grad():
        assert torch.allclose(fast(x), hard(x), rtol=1e-4, atol=1e-4)
        assert torch.allclose(as_dense(fast)(x), hard(x), rtol=1e-4, atol=1e-4)
    assert isinstance(net.conv2, nn.Conv2d)  # a copy
    bill = costs.network_storage(as_dense(fast), plan, bits=8).set_index("layer")
    assert bill.loc["fc1", "data_bits"] == 8 * fast.fc1.columns.numel() == 8 * 32 * 50 * 16
    drawn = circulant(net, plan, fresh=True)
    assert float(drawn.fc1.columns.detach().std()) == pytest.approx((1 / 800 / 3) ** 0.5, rel=0.05)  # as if dense


def test_what_speaks_of_layers_refuses_transforms_by_name():
    net = circulant(models.build("lenet300", (1, 8, 8), 10), {"fc1": BlockCirculant(4)})
    for call in (
        lambda: costs.network_storage(net, {}, 8),
        lambda: layer_shapes(net, (1, 8, 8)),
        lambda: faults.on_crossbars(net, "two_column"),
    ):
        with pytest.raises(ShapeError, match=r"fc1 \(CirculantLinear\)"):
            call()


def test_refusals():
    with pytest.raises(LayerError, match="groups = 2"):
        CirculantConv2d(nn.Conv2d(4, 4, 3, groups=2), 2)
    with pytest.raises(LayerError, match="0: Filter on Linear has no transform"):
        circulant(nn.Sequential(nn.Linear(4, 4)), {"0": Filter(0.5)})
    plan, tied, hooked = {"0": BlockCirculant(2)}, nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4)), nn.Linear(4, 4)
    tied[1].weight = tied[0].weight
    with pytest.raises(LayerError, match="0: weight is also another module's"):
        circulant(tied, plan)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(LayerError, match=r"0 \(Linear\) does more than its class"):
        circulant(nn.Sequential(hooked), plan)
    fast = circulant(nn.Sequential(nn.Linear(4, 4)), plan)
    fast[0].register_forward_hook(lambda *_: None)
    with pytest.raises(LayerError, match=r"0 \(CirculantLinear\) does more than its class"):
        as_dense(fast)


def test_what_is_written_past_the_optimizer_counts():
    layer, x = CirculantLinear(nn.Linear(8, 8), 4), random(3, 8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            before = content(layer)
            layer(x)
            assert content(layer) == before  # what is kept between two calls is no part of the network
            layer.columns.data.mul_(3)
            assert torch.allclose(layer(x), F.linear(x, layer.weight(), layer.bias), atol=1e-5)


def test_a_layer_used_twice_is_one_and_frozen_ones_stay_frozen():
    fc = nn.Linear(8, 8).requires_grad_(False)
    fast = circulant(nn.Sequential(fc, nn.ReLU(), fc), {"0": BlockCirculant(4)})
    dense = as_dense(fast)
    assert (type(fast[0]), type(dense[0])) == (CirculantLinear, nn.Linear)
    assert (fast[0], dense[0]) == (fast[2], dense[2])
    assert not any(p.requires_grad for p in (*fast.parameters(), *dense.parameters()))


def test_half_precision():
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 4)).half()
    fast, x = circulant(net, {"0": BlockCirculant(2), "2": BlockCirculant(4)}), random(2, 4, 4, 4)
    with torch.no_grad():
        assert torch.allclose(fast(x.half()).float(), as_dense(fast).float()(x), atol=1e-2)


def test_training_inside_is_training_by_columns():
    """A step along the tangent is the step of the first columns whose gradient, a sum of k, is divided by k."""
    images = data.load(train_size=64, test_size=100, validation_size=100)
    plan = {"fc1": BlockCirculant(4)}
    net = harden(models.build("lenet300", images.shape, images.classes), plan)
    columns = circulant(net, plan)
    for at, model in enumerate((net, columns)):
        loss = F.cross_entropy(model(images.train.x), images.train.y)
        loss.backward()
        if at == 0:
            model.fc1.weight.data -= 0.1 * plan["fc1"].tangent(model.fc1.weight, model.fc1.weight.grad)
        else:
            model.fc1.columns.data -= 0.1 * model.fc1.columns.grad / 4
    assert torch.allclose(columns.fc1.weight(), net.fc1.weight, atol=1e-6)
    recipes.retrain_inside(net, plan, images, epochs=1, lr=0.05)
    assert plan["fc1"].member(net.fc1.weight, 1e-5)
