"""Spiking networks and their ways through time: the same gradients, with less kept."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from lib import recipes, training
from lib.constraint import attach_masks
from lib.data import Split
from lib.layers import checkpointed, inverse, plainly_reversible, previous, reversible, saved_bytes
from lib.layers.gates import LayerError
from lib.models import LeakyNeurons, ModelError, SpikingLayer, spiking, stored, unrolled
from lib.pruning import Filter, Unstructured
from lib.quantization import ternary
from lib.shapes import layer_shapes, prunable
from lib.training.spent import Meter

WAYS = (reversible, plainly_reversible, checkpointed)
SMALL = {"width": 4, "depth": 2, "steps": 6}


def network(**options):
    return spiking((1, 12, 12), 3, **SMALL | options)


def some(n=5, dtype=torch.float32):
    return torch.rand(n, 1, 12, 12, dtype=dtype, generator=torch.Generator().manual_seed(0))


def gradients(net, x, over_time):
    """Of a copy that goes through time so, with its batch norm statistics afterwards."""
    net = deepcopy(net)
    net.over_time = over_time
    torch.manual_seed(1)
    net(x).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]), dict(net.named_buffers())


def apart(found, expected):
    return float((found - expected).norm() / expected.norm())


class TestNeurons:
    def test_reset_at_once_they_are_snntorchs(self):
        snntorch = pytest.importorskip("snntorch")
        theirs, ours = snntorch.Leaky(beta=0.8), LeakyNeurons(leak=0.8, reset="at once")
        found = []
        for neurons, membrane in ((theirs, lambda state: state), (ours, lambda state: state[0])):
            currents = (1.5 * torch.rand(20, 3, 7, generator=torch.Generator().manual_seed(0))).requires_grad_()
            state, seen = torch.zeros(3, 7) if neurons is theirs else None, []
            for current in currents:
                spikes, state = neurons(current, state)
                seen.append((spikes, membrane(state)))
            spikes, membranes = map(torch.stack, zip(*seen, strict=True))
            (spikes * torch.arange(7.0)).sum().add(membranes.square().sum()).backward()
            found.append((spikes, membranes, currents.grad))
        assert found[0][0].sum() > 10
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)

    def test_a_reset_is_the_last_spikes_in_binary(self):
        neurons, state, spikes = LeakyNeurons(), None, []
        for current in 2 * torch.rand(53, 100, generator=torch.Generator().manual_seed(0)):
            fired, state = neurons(current, state)
            spikes.append(fired)
        r, bits = state[1], torch.stack(spikes).double()
        assert torch.equal(r, (bits.flip(0) / 2.0 ** torch.arange(1, 54, dtype=torch.float64)[:, None]).sum(0))
        for expected in reversed(spikes):  # all 53 of them, exactly
            s = (r >= 0.5).double()
            assert torch.equal(s, expected.double())
            r = 2 * r - s
        assert not r.any()

    @pytest.mark.parametrize("options", [{"leak": 0.0}, {"leak": 1.1}, {"reset": "never"}])
    def test_refusals(self, options):
        with pytest.raises(ModelError, match="allowed are a leak in"):
            LeakyNeurons(**options)


class TestInverse:
    @pytest.mark.parametrize("squeeze", [False, True])
    @pytest.mark.parametrize("leak", [1.0, 0.9])
    def test_steps_of_a_layer_are_undone(self, leak, squeeze):
        layer = SpikingLayer(8, squeeze, leak=leak)
        frames = torch.randn(12, 2, 3, *((2, 8, 8) if squeeze else (8, 4, 4)))
        states, outs = [None], []
        for x in frames:
            halves, state = layer(tuple(x), states[-1])
            states.append(state)
            outs.append(halves)
        assert sum((b - layer.enter(tuple(x))[0]).mean() for (_, b), x in zip(outs, frames, strict=True)) / 12 > 0.05
        state = states[-1]
        for x, halves, (u, r) in zip(frames.flip(0), outs[::-1], states[-2:0:-1], strict=False):
            back, state = inverse(layer, halves, state)
            torch.testing.assert_close(torch.stack(back), x, atol=1e-5, rtol=0)
            torch.testing.assert_close(state[0], u, atol=1e-5, rtol=0)
            assert torch.equal(state[1], r)

    def test_a_network_is_run_back_to_its_start(self):
        """Resets bit for bit, membranes but for what a leak makes of their rounding; no statistics move."""
        net, seen = network(steps=12), [None]
        with torch.no_grad():
            for t in range(12):
                seen.append(unrolled(net, some(), 0, seen[-1], range(t, t + 1))[1])
        state, norms = seen[-1], deepcopy(dict(net.named_buffers()))
        for t in range(11, 0, -1):
            state = previous(net, some(), 0, t, state)
            for (u, r), (own_u, own_r) in zip(state, seen[t], strict=True):
                torch.testing.assert_close(u, own_u, atol=1e-5, rtol=0)
                assert torch.equal(r, own_r)
        assert all(torch.equal(t, norms[name]) for name, t in net.named_buffers())

    def test_an_error_of_a_membrane_grows_by_the_leak_alone(self):
        """An offset comes back as ``offset / leak^k`` and never touches a spike."""
        layer, x, state = SpikingLayer(4, leak=0.5).double(), torch.randn(2, 2, 4, 3, 3, dtype=torch.float64), None
        for _ in range(8):
            halves, state = layer(tuple(x), state)
        with torch.no_grad():
            right, wrong = state, (state[0] + 1e-6, state[1])
            for _ in range(7):
                right, wrong = (inverse(layer, halves, s)[1] for s in (right, wrong))
                halves = x[1], x[0] + (right[1] >= 0.5)
        torch.testing.assert_close(wrong[0] - right[0], torch.full_like(wrong[0], 1e-6 * 2**7), rtol=1e-6, atol=0)
        assert torch.equal(wrong[1], right[1])


class TestGradients:
    @pytest.mark.parametrize("over_time", WAYS)
    @pytest.mark.parametrize("options", [{"leak": 1.0}, {"coding": "direct"}, {"depth": 1, "steps": 1}, {"steps": 20}])
    def test_they_are_those_of_all_steps_kept(self, over_time, options):
        net = network(**options).double()
        expected, norms = gradients(net, some(dtype=torch.float64), stored)
        found, own = gradients(net, some(dtype=torch.float64), over_time)
        assert expected.abs().max() > 0
        assert apart(found, expected) < 1e-9
        for name in norms:  # nothing is counted twice
            torch.testing.assert_close(own[name], norms[name])

    @pytest.mark.parametrize("over_time", WAYS)
    def test_in_single_precision(self, over_time):
        net = network(steps=16)
        assert apart(gradients(net, some(), over_time)[0], gradients(net, some(), stored)[0]) < 1e-5

    @pytest.mark.parametrize("over_time", WAYS)
    def test_of_frozen_and_of_masked_weights_and_in_evaluation(self, over_time):
        net = network().double().eval()
        net.stem.requires_grad_(False)
        net.layers[1].requires_grad_(False)
        attach_masks(net, {"layers.0.conv": torch.rand(2, 2, 3, 3) > 0.5})
        x = some(dtype=torch.float64)
        assert apart(gradients(net, x, over_time)[0], gradients(net, x, stored)[0]) < 1e-9

    def test_nothing_is_left_behind(self):
        net = network(over_time=reversible)
        net(some()).sum().backward()
        assert all(m.momentum == 0.1 and m.track_running_stats for m in net.modules() if hasattr(m, "momentum"))
        assert net.layers[0].bn.num_batches_tracked == SMALL["steps"]

    def test_refusals(self):
        for options in ({"reset": "at once"}, {"steps": 54}):
            with pytest.raises(LayerError, match="'halving' and up to 53 steps"):
                network(over_time=reversible, **options)(some())
        with pytest.raises(LayerError, match="only weights get one"):
            network(over_time=reversible)(some().requires_grad_())


class TestMemory:
    def bytes(self, over_time, steps, depth=1):
        return saved_bytes(network(over_time=over_time, steps=steps, depth=depth), some(5))

    def test_what_is_saved_by_hand(self):
        """Membranes in 4 bytes and resets in 8 of 5 x (2 x 36 + 8 x 9) neurons, and the head's input; no images."""
        assert self.bytes(reversible, 4)["saved"] == 5 * (12 * (2 * 36 + 8 * 9) + 4 * 16)

    def test_images_count_in_no_way(self):
        """Checkpoints hold them where autograd does not see it: one of them keeps what a reversible network does."""
        assert self.bytes(checkpointed, 4)["saved"] == self.bytes(reversible, 4)["saved"]

    @pytest.mark.parametrize("over_time", [reversible, plainly_reversible])
    def test_it_does_not_grow_with_the_steps(self, over_time):
        found = [self.bytes(over_time, steps) for steps in (4, 8, 32)]
        assert found[0] == found[1] == found[2]

    def test_what_others_keep_grows(self):
        saved = [self.bytes(stored, steps)["saved"] for steps in (4, 8, 16)]
        assert saved[2] - saved[1] == 2 * (saved[1] - saved[0]) > saved[0]
        few, many = (self.bytes(checkpointed, steps) for steps in (4, 16))
        assert few["saved"] < many["saved"] < saved[2]
        assert many["peak"] < self.bytes(stored, 16)["peak"]

    def test_a_network_is_left_as_it_was(self):
        net = network()
        before = deepcopy(net.state_dict())
        assert saved_bytes(net, some())["peak"] > saved_bytes(net, some())["saved"]
        assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())

    def test_a_view_counts_its_storage_once(self):
        class Twice(torch.nn.Module):
            def forward(self, x):
                x = x + 1  # not the images themselves, which count nowhere
                return (x[:1] ** 2 * x[1:] ** 2).sum()

        x = torch.rand(2, 1000, requires_grad=True)  # two halves of x, and two squares
        assert saved_bytes(Twice(), x)["saved"] == 4 * (2000 + 2 * 1000)


def test_the_shorter_way_computes_every_convolution_once_less():
    found = {}
    for over_time in (stored, reversible, plainly_reversible):
        net = network(over_time=over_time)
        with Meter(net) as meter:
            net(some()).sum().backward()
        macs = meter.frame().groupby(["product", "layer"])["macs"].sum().unstack()
        found[over_time] = macs.loc["forward"] / macs.loc["weight_gradient"]
    inner, once = [f"layers.{i}.conv" for i in range(4)], found[stored]
    assert (once == 1).all()
    assert (found[reversible][inner] == 2).all()
    assert (found[plainly_reversible][inner] == 3).all()
    assert all(found[way]["stem.0"] == 2 and found[way]["head"] == 1 for way in (reversible, plainly_reversible))


class TestNetwork:
    def test_training_draws_and_evaluation_repeats(self):
        net, x = network(), some()
        assert not torch.equal(net.train()(x), net(x))
        assert torch.equal(net.eval()(x), net(x))

    def test_a_pixel_is_on_as_often_as_it_is_bright(self):
        """Between the image's darkest and brightest, whatever the data were normalized by."""
        net, x = network(), torch.linspace(-1, 3, 144).reshape(1, 1, 12, 12)
        rate = torch.stack([net.frame(x, seed=0, t=t) for t in range(2000)]).mean(0)
        assert float((rate - (x + 1) / 4).abs().max()) < 5 * 0.5 / 2000**0.5

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"width": 3}, "an even width"),
            ({"depth": 0}, "a depth"),
            ({"steps": 0}, "steps from 1"),
            ({"coding": "x"}, "'rate' or"),
        ],
    )
    def test_refusals(self, options, words):
        with pytest.raises(ModelError, match=words):
            network(**options)

    def test_sides_that_do_not_halve_twice_are_refused(self):
        with pytest.raises(ModelError, match="10x12"):
            spiking((1, 10, 12), 3)

    def test_its_layers_are_counted_once_a_step(self):
        shapes = layer_shapes(network(), (1, 12, 12)).set_index("layer")
        assert list(shapes.index) == ["stem.0", *(f"layers.{i}.conv" for i in range(4)), "head"]
        assert shapes["vectors"].tolist() == [6 * 36, 6 * 36, 6 * 36, 6 * 9, 6 * 9, 1]


@pytest.fixture
def real(images):
    """Two hundred images of 12 x 12, from the middle of 28 x 28."""
    return replace(images, train=Split(images.train.x[:200, :, 2:26:2, 2:26:2].contiguous(), images.train.y[:200]))


@pytest.mark.parametrize("over_time", [stored, *WAYS])
def test_fit_trains_it_as_any_network(real, over_time):
    net = spiking((1, 12, 12), real.classes, width=8, depth=1, steps=3, over_time=over_time)
    log = training.fit(net, real, epochs=4, lr=0.1, batch_size=50)
    assert log["train_loss"].iloc[-1] < 0.85 * log["train_loss"].iloc[0]


def test_all_ways_train_alike(real):
    weights = []
    for over_time in (stored, *WAYS):
        net = spiking((1, 12, 12), real.classes, **SMALL, over_time=over_time)
        training.fit(net, real, epochs=1, lr=0.05, batch_size=100)
        weights.append(net.layers[0].conv.weight)
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=1e-5, rtol=1e-4)


class TestConstraints:
    """Layers of a spiking network are layers like any other, whichever way it goes through time."""

    def train(self, recipe, constraint, real, **options):
        net = spiking((1, 12, 12), real.classes, **SMALL, over_time=reversible)
        plan = {name: constraint for name in prunable(net) if name.startswith("layers")}
        assert len(plan) == 4
        before = {name: prunable(net)[name].weight.clone() for name in plan}
        recipe(net, plan, real, lr=0.05, batch_size=100, **options)
        layers = {name: prunable(net)[name].weight.detach() for name in plan}
        assert all(not torch.equal(layers[name], before[name]) for name in plan)
        assert all(constraint.member(w, 1e-6) for w in layers.values())
        return layers

    @pytest.mark.parametrize("constraint", [Unstructured(0.5), Filter(0.5)])
    def test_masks(self, real, constraint):
        layers = self.train(recipes.static, constraint, real, epochs=2)
        assert all(w.count_nonzero() <= w.numel() / 2 for w in layers.values())

    def test_quantizers(self, real):
        layers = self.train(recipes.straight_through, ternary(), real, epochs=2)
        assert all(len(w.unique()) <= 3 for w in layers.values())
