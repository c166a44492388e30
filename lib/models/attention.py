"""Attention whose projections are layers of their own: what ``torch.nn.MultiheadAttention`` computes, by product.

Torch packs the projections of queries, keys and values into one tensor and never calls the module of its output's, so
that no constraint and no hook reaches them. `by_projection` converts a network of torch's, `lib.models.fused` converts
it back.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.nn.utils import parametrize

from lib.models.errors import ModelError
from lib.models.replacing import copied, replaced

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""In the order of torch's packed tensors; the fourth is ``out_proj``."""


class Attention(nn.Module):
    """``torch.nn.MultiheadAttention`` by projection (Vaswani et al. 2017): the same arguments, inputs and outputs.

    Its layers are ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``. There are no keys beside those that are given
    (``add_bias_kv``, ``add_zero_attn``).

    Raises:
        ModelError: heads that do not divide the units.

    >>> from lib.models import Attention
    >>> x = torch.zeros(3, 5, 8)
    >>> out, weights = Attention(8, 2, batch_first=True)(x, x, x)
    >>> tuple(out.shape), tuple(weights.shape)
    ((3, 5, 8), (3, 5, 5))
    """

    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False  # torch's encoder layers ask, and leave their way around all modules alone

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ModelError(f"num_heads = {num_heads}: allowed are divisors of the {embed_dim} units")
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = embed_dim, num_heads, dropout, batch_first
        for name, size in zip(PROJECTIONS, (embed_dim, kdim or embed_dim, vdim or embed_dim), strict=True):
            self.add_module(name, nn.Linear(size, embed_dim, bias))
            nn.init.xavier_uniform_(self.get_submodule(name).weight)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's module: outputs, and the attention weights if they are asked for.

        Args:
            query: ``(T, N, E)``, ``(N, T, E)`` with ``batch_first``, ``(T, E)`` of one sequence; ``key`` and ``value``
                alike, of S places.
            key_padding_mask: ``(N, S)``, True (or a number to add) where a key is padding.
            attn_mask: ``(T, S)`` or ``(N heads, T, S)``, alike. is_causal: says of it that it is causal.

        Raises:
            ModelError: ``is_causal`` without a mask.
        """
        if is_causal and attn_mask is None:
            raise ModelError("is_causal says what attn_mask is: give that too")
        alone = query.ndim == 2
        given = [x.unsqueeze(0) if alone else x if self.batch_first else x.transpose(0, 1) for x in (query, key, value)]
        q, k, v = (
            self.get_submodule(name)(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, T, E / heads)
            for name, x in zip(PROJECTIONS, given, strict=True)
        )
        mask = None
        if attn_mask is not None:
            mask = _added(attn_mask, q)
            mask = mask.view(len(q), self.num_heads, *mask.shape[1:]) if mask.ndim == 3 else mask
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q).view(len(q), 1, 1, -1)
            mask = padding if mask is None else mask + padding
        rate, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            weights = dropout((scores if mask is None else scores + mask).softmax(-1), rate)
            x = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            x = scaled_dot_product_attention(q, k, v, mask, rate)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        if alone:
            return x.squeeze(0), weights if weights is None else weights.squeeze(0)
        return x if self.batch_first else x.transpose(0, 1), weights


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to scores: minus infinity where a mask of torch's says True."""
    if mask.dtype != torch.bool:
        return mask.to(like)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


def by_projection(model: nn.Module) -> nn.Module:
    """A copy of a network with every ``torch.nn.MultiheadAttention`` as an `Attention`, of the same weights.

    Torch's encoder layers around it then call their modules one by one also in evaluation, where they would go around
    them: what is attached to a layer is always computed.

    Raises:
        ModelError: an attention with learned keys (``add_bias_kv``, ``add_zero_attn``), whose tensors something else
            makes or another module has as well, or that has a hook, by name.

    >>> from lib.models import by_projection
    >>> from lib.shapes import prunable
    >>> theirs = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    >>> mine, x = by_projection(theirs), torch.rand(2, 5, 8)
    >>> list(prunable(mine)), torch.allclose(mine(x), theirs(x), atol=1e-6)
    (['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'self_attn.out_proj', 'linear1', 'linear2'], True)
    """

    @torch.no_grad()
    def convert(name: str, module: nn.Module) -> Attention:
        name, out = name or "the model", module.out_proj
        if module.bias_k is not None or module.add_zero_attn:
            raise ModelError(f"{name}: keys of its own (add_bias_kv, add_zero_attn) are not taken over")
        if parametrize.is_parametrized(module) or parametrize.is_parametrized(out):
            raise ModelError(f"{name}: its weights are made by something else, which would be lost")
        one = module.in_proj_weight  # None where keys or values have other sizes than queries
        weights = [module.get_parameter(f"{p}_weight") for p in PROJECTIONS] if one is None else one.chunk(3)
        whole = module.in_proj_bias
        new = Attention(
            module.embed_dim, module.num_heads, module.dropout, whole is not None, module.kdim, module.vdim,
            module.batch_first,
        ).to(weights[0])  # fmt: skip
        for i, (part, weight) in enumerate(zip(PROJECTIONS, weights, strict=True)):
            layer = new.get_submodule(part)
            layer.weight = nn.Parameter(weight.clone(), weight.requires_grad)
            if whole is not None:
                layer.bias = nn.Parameter(whole.chunk(3)[i].clone(), whole.requires_grad)
        new.out_proj.load_state_dict(out.state_dict())
        for own, theirs in zip(new.out_proj.parameters(), out.parameters(), strict=True):
            own.requires_grad = theirs.requires_grad
        return new

    copy = copied(model)
    found = {name: module for name, module in copy.named_modules() if isinstance(module, nn.MultiheadAttention)}
    for module in copy.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # sequences without their padding, which only torch's own way can take
    return replaced(copy, found, convert, nn.MultiheadAttention, nn.Linear)


@torch.no_grad()
def packed(name: str, module: Attention) -> nn.MultiheadAttention:
    """One `Attention` as torch's module, of the weights as they are, for `lib.models.fused`."""
    layers = [module.get_submodule(part) for part in PROJECTIONS]
    new = nn.MultiheadAttention(
        module.embed_dim, module.num_heads, module.dropout, layers[0].bias is not None,
        kdim=layers[1].in_features, vdim=layers[2].in_features, batch_first=module.batch_first,
    ).to(layers[0].weight)  # fmt: skip
    if new.in_proj_weight is not None:
        new.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
    else:
        for part, layer in zip(PROJECTIONS, layers, strict=True):
            new.get_parameter(f"{part}_weight").copy_(layer.weight)
    if new.in_proj_bias is not None:
        new.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        new.out_proj.bias.copy_(module.out_proj.bias)
    new.out_proj.weight.copy_(module.out_proj.weight)
    frozen = {not p.requires_grad for layer in (*layers, module.out_proj) for p in layer.parameters()}
    if len(frozen) > 1:
        raise ModelError(f"{name or 'the model'}: some projections are frozen, others not")
    return new.requires_grad_(not frozen.pop())
