"""What a layer is: one place decides it for constraints, faults, arrays and accounts."""

import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from lib import (
    constraint,
    costs,
    crossbar,
    data,
    faults,
    layers,
    models,
    pruning,
    quantization,
    recipes,
    shapes,
    training,
)
from lib.constraint import attach_masks, detach_masks, harden, masks, plain
from lib.shapes import ShapeError, prunable

CORNERS = data.Split(torch.eye(4).reshape(4, 1, 2, 2), torch.arange(4))
GIVEN = data.Data("corners", CORNERS, CORNERS, CORNERS, 4)
HALF = torch.tensor([[True, False, False, True]] * 4)


def identity() -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False))
    net[1].weight.data = torch.eye(4)
    return net


class Tied(nn.Module):
    """Two modules, one tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x.flatten(1)))


def off(rate):
    return faults.StuckAt(rate, ratio=0)


class TestWeightsThatSomethingElseMakes:
    KINDS = (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        weight_norm,
        spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    )

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*")
    @pytest.mark.parametrize("make", KINDS)
    def test_a_copy_has_them_baked_in(self, make):
        net = identity()
        make(net[1])
        net.eval()
        out = net(CORNERS.x)  # old hooks leave a tensor with a graph behind it, which torch does not copy
        copy = plain(net)
        assert torch.allclose(copy(CORNERS.x), out, atol=1e-6)
        assert isinstance(copy[1]._parameters["weight"], nn.Parameter)
        copy[1].weight.data.zero_()
        assert not copy(CORNERS.x).any()
        assert torch.equal(net(CORNERS.x), out)

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*")
    @pytest.mark.parametrize("make", KINDS)
    def test_broken_cells_reach_the_outputs(self, make):
        net = identity()
        make(net[1])
        net(CORNERS.x)
        assert faults.sweep(net, "two_column", [1.0], 2, CORNERS, faults=off)["accuracy"].tolist() == [0.25, 0.25]
        assert not faults.on_chip(net, "two_column", off(1.0), 0)(CORNERS.x).any()
        assert crossbar.on_arrays(net.eval(), crossbar.Array(), CORNERS.x)(CORNERS.x).shape == (4, 4)

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*")
    @pytest.mark.parametrize("make", KINDS)
    def test_what_changes_the_model_itself_refuses(self, make):
        net = identity()
        make(net[1])
        plan = {"1": pruning.Unstructured(0.5)}
        for change in (lambda: harden(net, plan), lambda: attach_masks(net, {"1": HALF})):
            with pytest.raises(ShapeError, match=r"weight of .*Linear is made by .*[Nn]orm|Pruning|[Oo]rthogonal|L1"):
                change()

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*")
    @pytest.mark.parametrize("make", KINDS)
    def test_other_layers_are_left_alone(self, make):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        make(net[1])
        net.eval()
        x = torch.eye(4)
        wanted = net[1](x)
        harden(net, {"0": pruning.Unstructured(0.5)})
        attach_masks(net, {"0": HALF})
        assert list(masks(net)) == ["0"]
        detach_masks(net)
        assert torch.allclose(net[1](x), wanted, atol=1e-6)
        assert shapes.makers(net[1])
        before = net[0].weight.clone()
        with pytest.raises(ShapeError, match="is made by"):
            harden(net, dict.fromkeys("01", pruning.Unstructured(0.75)))
        with pytest.raises(ShapeError, match="is made by"):
            attach_masks(net, {"0": HALF, "1": HALF})
        assert torch.equal(net[0].weight, before)  # all or none
        assert not masks(net)

    def test_a_hook_on_the_bias_makes_no_weight(self):
        net = nn.Sequential(nn.Linear(4, 4))
        prune.l1_unstructured(net[0], "bias", amount=0.5)
        attach_masks(net, {"0": HALF})
        with pytest.raises(ShapeError, match=r"the bias of .*Linear is made by L1Unstructured"):
            attach_masks(net, {"0.bias": HALF[0]})
        assert list(masks(net)) == ["0"]  # what is refused changes nothing
        with pytest.raises(constraint.ConstraintError, match=r"'1'; the model has 0"):
            attach_masks(net, {"0": ~HALF, "1": HALF})
        assert torch.equal(masks(net)["0"], HALF)

    def test_what_is_put_behind_a_mask_is_not_taken_away_with_it(self):
        net = attach_masks(nn.Sequential(nn.Linear(4, 4)), {"0": HALF})
        parametrizations.weight_norm(net[0])
        with pytest.raises(ShapeError, match="is made by _WeightNorm"):
            detach_masks(net)
        assert torch.equal(masks(net)["0"], HALF)

    def test_removed_weights_may_be_infinite(self):
        net = attach_masks(identity(), {"1": HALF})
        shapes.leaf(net[1]).data[~HALF] = torch.inf
        assert net(CORNERS.x).isfinite().all()
        net(CORNERS.x).sum().backward()
        assert shapes.leaf(net[1]).grad.isfinite().all()
        assert plain(net)[1].weight.isfinite().all()

    def test_a_model_that_is_one_layer(self):
        net = attach_masks(nn.Linear(4, 4), {"": HALF, "bias": HALF[0]})
        assert list(masks(net)) == ["", "bias"]
        assert list(masks(attach_masks(net, masks(net)))) == ["", "bias"]


class TestOneTensorIsOneLayer:
    def test_counted_once_and_met_twice(self):
        net = Tied()
        assert list(prunable(net)) == ["first"]
        assert shapes.layer_shapes(net, (1, 2, 2))[["weights", "vectors", "macs"]].values.tolist() == [[16, 2, 32]]
        assert costs.network_storage(net, {}, 8)["data_bits"].tolist() == [128]
        with training.spent.Meter(net) as meter:
            net(CORNERS.x)
        assert meter.frame().query("product == 'forward'")["macs"].tolist() == [4 * 32]

    def test_faulted_once(self):
        net, devices = Tied(), faults.StuckAt(0.3)
        chip = faults.on_chip(net, "two_column", devices, 3)
        assert torch.equal(chip.first.weight, chip.second.weight)
        assert not torch.equal(chip.first.weight, net.first.weight)
        found = faults.sweep(net, "two_column", [0.3], [3], CORNERS, faults=lambda rate: devices)["accuracy"].tolist()
        assert found == [training.evaluate(chip, CORNERS)]

    def test_one_mask_holds_both_uses_and_the_tie_survives(self):
        net = attach_masks(Tied(), {"first": HALF})
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        net(CORNERS.x).square().sum().backward()
        optimizer.step()
        for layer in (net.first, net.second):
            assert not layer.weight[~HALF].any()
        assert [*masks(net)] == ["first"]
        out, copy = net(CORNERS.x), deepcopy(net)
        for bare in (plain(net), detach_masks(copy)):
            assert bare.first.weight is bare.second.weight
            assert torch.equal(bare(CORNERS.x), out)

    def test_a_mask_holds_every_use_or_is_refused(self):
        """An embedding has no mask: it would go on with weights that the layer beside it has lost."""
        net = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
        net[1].weight = net[0].weight
        assert shapes.others(net) == ["0 (Embedding)"]
        with pytest.raises(constraint.ConstraintError, match=r"its tensor is also in 0 \(Embedding\)"):
            attach_masks(net, {"1": HALF})
        net = Tied()
        with pytest.raises(constraint.ConstraintError, match=r"its tensor is also in first \(Linear\)"):
            attach_masks(net, {"second.weight": HALF})
        assert not masks(net)

    def test_weights_that_are_no_parameters_are_seen(self):
        packed, net = torch.ao.nn.quantized, nn.Sequential(nn.Linear(4, 4), nn.Module(), nn.Module())
        net[1].register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int8))
        net[2].register_buffer("mask", torch.zeros(4, 4))  # of attention, say
        net += nn.Sequential(packed.Conv2d(3, 8, 3), packed.dynamic.Linear(4, 4), packed.FloatFunctional())
        assert shapes.others(net) == ["1 (Module)", "3 (Conv2d)", "4._packed_params (LinearPackedParams)"]

    def test_errors_of_a_chip_are_added_once(self):
        net = Tied()
        hook = faults.UnderFaults("two_column", faults.StuckAt(0.3))
        hook.before_epoch(net, 0)
        hook.before_step(net, 0)
        seen = net.first.weight.detach()
        assert torch.equal(plain(net).second.weight, seen)


class TestWhatIsNotKnown:
    MODELS = (
        nn.Sequential(nn.Flatten(1), nn.Linear(4, 4), nn.Unflatten(1, (1, 4)), nn.GRU(4, 4)),
        nn.Sequential(nn.ConvTranspose2d(1, 1, 2), nn.Flatten(), nn.Linear(9, 4)),
        nn.Sequential(nn.Flatten(2), nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 1, 8, batch_first=True)),
    )

    @pytest.mark.parametrize("net", MODELS, ids=["GRU", "ConvTranspose2d", "MultiheadAttention"])
    def test_refused_by_name_or_left_out_aloud(self, net, request):
        kind = request.node.callspec.id
        for speak in (
            lambda: shapes.macs(net, (1, 2, 2)),
            lambda: costs.network_storage(net, {}, 8),
            lambda: faults.on_crossbars(net, "offset"),
            lambda: crossbar.on_arrays(net, crossbar.Array(), CORNERS.x),
            lambda: training.spent.Meter(net),
        ):
            with pytest.raises(ShapeError, match=kind):
                speak()
        for speak in (
            lambda: shapes.macs(net, (1, 2, 2), skip=True),
            lambda: costs.network_storage(net, {}, 8, skip=True),
            lambda: pruning.uniform_plan(net, pruning.Unstructured(0.5)),
            lambda: constraint.sparsity(net),
        ):
            with pytest.warns(UserWarning, match=kind):
                speak()

    def test_a_network_without_layers_is_refused(self):
        with pytest.raises(ShapeError, match="no convolution and no linear layer"):
            shapes.layer_shapes(nn.Sequential(nn.ReLU()), (3,))

    def test_named_layers_need_no_warning(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [*faults.on_crossbars(self.MODELS[0], {"1": "offset"})] == ["1"]

    def test_a_bare_parameter_is_named(self):
        net = identity()
        net.scale = nn.Parameter(torch.ones(2, 2))
        with pytest.raises(ShapeError, match=r"the model \(Sequential\)"):
            shapes.layer_shapes(net, (1, 2, 2))

    def test_wrappers_are_refused(self):
        for wrapped, inside in ((torch.compile(identity()), "_orig_mod"), (nn.DataParallel(identity()), "module")):
            with pytest.raises(ShapeError, match=rf"model\.{inside}"):
                faults.sweep(wrapped, "offset", [0.1], 2, CORNERS)


class Standardized(nn.Conv2d):
    """Weight standardization, as in BiT and timm's StdConv2d."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


class Scaled(nn.Linear):
    """StyleGAN's equalized learning rate."""

    def forward(self, x):
        return nn.functional.linear(x, 0.25 * self.weight, self.bias)


def low(net, x):
    with recipes.low_precision(net):
        return net(x)


def in_cells(net, x):
    return crossbar.on_arrays(net, crossbar.Array(), x)(x)


def as_branches(net, x):
    plan = pruning.uniform_plan(net, quantization.Expansion((0.2, 0.5)))
    return layers.branched(harden(net, plan), plan)(x)


class TestWhatComputesALayersProductInAnotherWay:
    """Arrays, few bits and branches take a layer's weight and inputs: more than their product is refused, not lost."""

    @pytest.mark.parametrize("layer", [Standardized(1, 4, 3), Scaled(8, 4)], ids=["standardized", "scaled"])
    @pytest.mark.parametrize(
        ("what", "way"), {"arrays": in_cells, "low_precision": low, "branches": as_branches}.items()
    )
    def test_a_forward_pass_of_its_own_is_refused(self, what, way, layer):
        net, x = nn.Sequential(deepcopy(layer), nn.ReLU()), torch.rand(2, 1, 8, 8)
        with pytest.raises(ShapeError, match=f"{what}.*{type(layer).__name__} has a forward pass of its own"):
            way(net, x)

    def test_a_hook_on_outputs_sees_no_branches(self):
        net = nn.Sequential(nn.Linear(4, 2))
        net[0].register_forward_hook(lambda layer, x, y: y.clamp(0, 1))
        with pytest.raises(layers.LayerError, match="0 has a hook on its outputs"):
            as_branches(net, torch.rand(3, 4))

    def test_other_names_of_a_class_and_attached_masks_are_no_forward_pass(self):
        class Named(nn.Linear):
            """A linear layer of another name."""

        net = attach_masks(nn.Sequential(Named(4, 4)), {"0": HALF})
        shapes.refuse_overridden(net, "arrays")

    def test_a_network_compiled_in_place_or_in_part_is_refused(self):
        whole = nn.Sequential(nn.Linear(4, 2))
        whole.compile(backend="eager")
        part = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager"), nn.Linear(4, 2))
        for net in (whole, part):
            with pytest.raises(ShapeError, match="is compiled and runs no hooks"):
                quantization.quantize_activations(net, 2, torch.rand(3, 4))


class Functional(nn.Module):
    """Takes its layer's weight, a transpose of it, or a fixed kernel, by a function of torch."""

    def __init__(self, way):
        super().__init__()
        self.way, self.first, self.last = way, nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("blur", torch.ones(1, 1, 3, 3) / 9)

    def forward(self, x):
        if self.way == "blur":
            x = nn.functional.conv2d(x, self.blur, padding=1)
        x = x.flatten(1)
        if self.way == "functional":
            return self.last(nn.functional.linear(x, self.first.weight))
        x = self.first(x)
        return self.last(x @ self.first.weight if self.way == "transposed" else x)


class TestWeightsBesideLayers:
    @pytest.mark.parametrize(
        ("way", "name"), [("functional", "first"), ("transposed", "first"), ("blur", "blur"), ("", "")]
    )
    def test_products_that_no_layer_makes_are_no_silent_gap_in_the_count(self, way, name):
        if name:
            with pytest.raises(ShapeError, match=f"^{name}: in a product outside of a layer's own call"):
                shapes.macs(Functional(way), (1, 4, 4))
        else:
            assert shapes.macs(Functional(way), (1, 4, 4))["macs"].tolist() == [256, 48]

    def test_an_input_by_its_name_is_an_input(self):
        class Named(nn.Sequential):
            def forward(self, x):
                return self[0](input=x.flatten(1))

        assert shapes.macs(Named(nn.Linear(4, 2)), (1, 2, 2))["macs"].tolist() == [8]

    def test_two_inputs_are_said_to_be_one_too_many(self):
        class Two(nn.Linear):
            def forward(self, x, y):
                return super().forward(x + y)

        with pytest.raises(ShapeError, match="does not take an input of zeros"):
            shapes.macs(nn.Sequential(Two(4, 2)), (4,))

    @pytest.mark.parametrize(
        ("layer", "said"),
        [(nn.Linear(4, 2, dtype=torch.complex64), "complex weights"), (nn.LazyLinear(2), "no shape yet")],
        ids=["complex", "lazy"],
    )
    def test_weights_of_which_nothing_can_be_said_are_refused(self, layer, said):
        with pytest.raises(ShapeError, match=f"layer 0 has {said}"):
            prunable(nn.Sequential(layer))
        if layer.weight.is_complex():
            with pytest.raises(ShapeError, match="complex"):
                pruning.Unstructured(0.5).project(layer.weight)

    def test_a_layer_of_no_units_has_no_shape_to_speak_of(self):
        with pytest.raises(ShapeError, match="layer 0 has no weights"):
            shapes.macs(nn.Sequential(nn.Linear(4, 0)), (4,))

    @pytest.mark.parametrize("norm", [spectral_norm, parametrizations.spectral_norm])
    def test_reading_a_weight_takes_no_step_of_a_spectral_norm(self, norm):
        net = nn.Sequential(norm(nn.Linear(8, 8)))  # in training mode
        before, copy = {k: v.clone() for k, v in net.state_dict().items()}, plain(net)
        shapes.macs(net, (8,))
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        x = torch.rand(3, 8)
        assert torch.allclose(copy(x), net.eval()(x), atol=1e-6)

    def test_a_network_that_keeps_what_it_made_is_copied(self):
        class Keeps(nn.Sequential):
            def forward(self, x):
                self.kept = [super().forward(x)]
                return self.kept[0]

        net = Keeps(nn.Linear(4, 2))
        net(torch.rand(1, 4))
        with pytest.raises(RuntimeError):
            deepcopy(net)
        assert torch.equal(models.copied(net)[0].weight, net[0].weight)
        log = recipes.partial_hardening(
            Keeps(nn.Flatten(), nn.Linear(4, 4)), {"1": quantization.Levels(2)}, GIVEN, epochs=1, lr=0.05
        )
        assert len(log)


class TestCounts:
    def test_a_layer_of_one_dimension(self):
        net = nn.Sequential(nn.Conv1d(2, 6, 3, groups=2), nn.Flatten(), nn.Linear(48, 2))
        found = shapes.layer_shapes(net, (2, 10)).set_index("layer")
        assert found.loc["0", ["groups", "channels", "kernel", "rows", "filters", "vectors"]].tolist() == [
            2,
            1,
            3,
            3,
            3,
            8,
        ]
        assert found["macs"].tolist() == [18 * 8, 96]
        plan = pruning.uniform_plan(net, pruning.Kernel(0.5))
        assert (harden(net, plan)[0].weight != 0).flatten(1).any(1).sum() == 3

    def test_what_depends_on_values_is_run_for_real(self):
        class Skips(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x):
                return self.fc(x) if x.sum() < 1 else x

        assert shapes.macs(Skips(), (4,))["macs"].tolist() == [16]

    def test_what_a_network_keeps_of_a_pass_is_left_alone(self):
        class Positions(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.kept, self.all = nn.Linear(8, 8), None, {}

            def forward(self, x):
                if self.kept is None:
                    self.kept = self.all["x"] = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
                return self.fc(x + self.kept + self.all["x"])

        net = Positions()
        assert shapes.macs(net, (8,))["macs"].tolist() == [64]
        assert net(torch.zeros(1, 8)).shape == (1, 8)  # not on meta

    def test_networks_of_tokens_are_told(self):
        net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
        with pytest.warns(UserWarning, match="left out"), pytest.raises(ShapeError, match=r"zeros \(1, 5\), .*tokens"):
            shapes.macs(net, (5,), skip=True)

    def test_counting_leaves_every_module_in_its_mode(self):
        """A norm that stays in evaluation while the rest trains is no mistake."""
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2))
        shapes.macs(net, (4,))
        quantization.quantize_activations(net, 4, torch.randn(8, 4))
        assert [m.training for m in net[:3]] == [True, False, True]
        assert not net[1].num_batches_tracked
        with pytest.raises(ShapeError, match=r"zeros \(1, 5\), torch.float32 .*cannot be multiplied"):
            shapes.macs(net, (5,))
        assert [m.training for m in net[:3]] == [True, False, True]
        assert not net[0]._forward_hooks

    def test_as_torch_counts(self):
        from torch.utils.flop_counter import FlopCounterMode

        for name in ("lenet5", "resnet8", "mobilenet_v2"):
            net, image = models.build(name, (3, 32, 32), 10).eval(), torch.zeros(1, 3, 32, 32)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                net(image)
            assert 2 * shapes.macs(net, (3, 32, 32))["dense_macs"].sum() == counter.get_total_flops()


class TestRangesOverAllUses:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(1, 1, bias=False)
            self.fc.weight.data.fill_(0.01)

        def forward(self, x):
            return self.fc(100 * self.fc(x) * 100)

    def test_inputs_at_few_bits(self):
        net, x = self.Twice(), torch.tensor([[1.0], [0.5]])
        wanted = net(x)
        assert torch.allclose(quantization.quantize_activations(net, 12, x)(x), wanted, rtol=0.05)

    def test_a_layer_that_is_never_met_keeps_its_inputs(self):
        net = self.Twice()
        net.spare = nn.Linear(3, 3)
        quantization.quantize_activations(net, 4, torch.tensor([[1.0]]))
        assert not hasattr(net.spare, "quantize_input")
