"""Attention by projection against torch's own module, and what every set, fault and account makes of its layers."""

import pytest
import torch
from torch import nn

from lib import constraint, costs, pruning, shapes
from lib.models import Attention, ModelError, by_projection, fused

OPTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "other keys": {"kdim": 6, "vdim": 5},
}


@pytest.fixture(params=OPTIONS)
def theirs(request):
    torch.manual_seed(0)
    net = nn.MultiheadAttention(8, 2, **OPTIONS[request.param]).eval().double()
    for parameter in net.parameters():  # biases begin at zero
        nn.init.normal_(parameter)
    return net


def inputs(module, batch=3):
    """Queries of 4 places, keys and values of 7."""
    torch.manual_seed(1)
    sizes = [(4, module.embed_dim), (7, module.kdim), (7, module.vdim)]
    found = [torch.randn(batch, *size).double() for size in sizes]
    return found if module.batch_first else [x.transpose(0, 1) for x in found]


def same(a, b):
    return all(x is y is None or torch.allclose(x, y, atol=1e-9) for x, y in zip(a, b, strict=True))


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": torch.arange(7).expand(3, 7) > torch.tensor([[6], [4], [2]])},
    "places": {"attn_mask": torch.arange(7) > torch.arange(3, 7)[:, None]},
    "numbers by head": {"attn_mask": torch.randn(6, 4, 7, generator=torch.Generator().manual_seed(2)).double()},
}
MASKS["both"] = {"key_padding_mask": MASKS["padding"]["key_padding_mask"].double() * -3, **MASKS["numbers by head"]}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("weights", [{}, {"average_attn_weights": False}, {"need_weights": False}])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_outputs_and_weights(theirs, masks, weights):
    given = inputs(theirs)
    assert same(by_projection(theirs)(*given, **masks, **weights), theirs(*given, **masks, **weights))


def test_one_sequence_and_gradients(theirs):
    mine, given = by_projection(theirs), inputs(theirs)
    alone = [x[0] if theirs.batch_first else x[:, 0] for x in given]
    assert same(mine(*alone), theirs(*alone))
    found = []
    for module in (mine, theirs):
        own = [x.clone().requires_grad_() for x in given]
        module(*own)[0].square().sum().backward()
        found.append([x.grad for x in own])
    assert same(*found)


def test_dropout_is_of_weights_in_training_alone():
    theirs = nn.MultiheadAttention(8, 2, dropout=0.5)
    mine, x = by_projection(theirs), torch.randn(4, 3, 8)
    assert not torch.equal(mine(x, x, x)[0], mine(x, x, x)[0])
    zeros = (mine(x, x, x, average_attn_weights=False)[1] == 0).float().mean()
    assert 0.3 < zeros < 0.7
    assert torch.equal(mine.eval()(x, x, x)[0], mine(x, x, x)[0])


def test_and_back(theirs):
    back = fused(by_projection(theirs))
    assert type(back) is nn.MultiheadAttention
    assert {n: p.tolist() for n, p in back.named_parameters()} == {n: p.tolist() for n, p in theirs.named_parameters()}
    assert same(back(*inputs(theirs)), theirs(*inputs(theirs)))
    assert not any(p.requires_grad for p in fused(by_projection(theirs.requires_grad_(False))).parameters())


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()


def test_inside_torchs_encoder_every_layer_is_called(encoder):
    mine, x = by_projection(encoder), torch.randn(3, 5, 8)
    padding = torch.arange(5).expand(3, 5) > 3
    masked = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        assert torch.allclose(mine(x), encoder(x), atol=1e-5)
        assert torch.allclose(mine(x, src_key_padding_mask=padding)[:, :4], masked[:, :4], atol=1e-5)
        layers = shapes.layer_shapes(mine, (5, 8))
    assert len(layers) == 2 * 6
    assert "layers.0.self_attn (MultiheadAttention)" in shapes.others(encoder)
    assert not shapes.others(mine)


def test_a_plan_reaches_the_projections_and_survives_the_way_back(encoder):
    mine, x = by_projection(encoder), torch.randn(3, 5, 8)
    plan = dict.fromkeys(shapes.prunable(mine), pruning.Unstructured(0.75))
    constraint.harden(mine, plan)
    for name, layer in shapes.prunable(mine).items():
        assert (layer.weight == 0).float().mean() == pytest.approx(0.75, abs=0.02), name
    back = fused(mine)
    with torch.no_grad():
        assert torch.allclose(back(x), mine(x), atol=1e-5)
    assert (back.layers[0].self_attn.in_proj_weight == 0).float().mean() == pytest.approx(0.75, abs=0.02)
    kept = sum(layer.weight.count_nonzero() for layer in shapes.prunable(mine).values())
    assert costs.network_storage(mine, plan, bits=8)["data_bits"].sum() == 8 * kept


def test_what_is_refused():
    own = nn.Sequential(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    with pytest.raises(ModelError, match=r"^0: keys of its own"):
        by_projection(own)
    for place, weight in ((lambda net: net, "in_proj_weight"), (lambda net: net.out_proj, "weight")):
        net = nn.MultiheadAttention(8, 2)
        nn.utils.parametrizations.weight_norm(place(net), weight)
        with pytest.raises(ModelError, match="made by something else"):
            by_projection(nn.Sequential(net))
    hooked = nn.MultiheadAttention(8, 2)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match=r"^0 \(MultiheadAttention\) does more than its class"):
        by_projection(nn.Sequential(hooked))
    mine = Attention(8, 2)
    mine.q_proj.requires_grad_(False)
    with pytest.raises(ModelError, match="some projections are frozen"):
        fused(mine)
    mine.q_proj.register_forward_pre_hook(lambda layer, x: (x[0].round(),))
    with pytest.raises(ModelError, match=r"^q_proj \(Linear\) does more"):
        fused(mine)
    with pytest.raises(ModelError, match="num_heads = 3"):
        Attention(8, 3)
    x = torch.zeros(1, 2, 8)
    with pytest.raises(ModelError, match="is_causal"):
        mine(x, x, x, is_causal=True)
