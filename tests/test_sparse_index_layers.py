"""The layers of number-theoretic attention: what they compute, their caches, their errors."""

import copy
import math
import pickle
from contextlib import nullcontext
from dataclasses import InitVar, dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional

import sieve_attn
from sieve_attn import layers, native, patterns
from sieve_attn.attend import offset_op
from sieve_attn.functional import offset_attention
from sieve_attn.layers import MianChowlaSelfAttention, PrimeSelfAttention, SparseIndexAttention, SquareSelfAttention, sparse_index
from sieve_attn.testing import assert_close

FAMILY = {PrimeSelfAttention: [2, 3, 5, 7, 11, 13], SquareSelfAttention: [1, 4, 9, 16], MianChowlaSelfAttention: [1, 2, 4, 8, 13]}
LEVELS = native.module().levels() if not native.missing() else ["none"]


@pytest.fixture(params=LEVELS)
def level(request):
    if native.missing():
        yield "none"
        return
    native.module().force_level(request.param)
    yield request.param
    native.module().force_level("")


def plain(layer, x, offsets):
    """The layer as its paper says it, with 1-based positions and one loop over queries."""
    _, length, width = x.shape
    heads, dim = layer.heads, width // layer.heads
    qkv = x @ layer.in_proj.weight.T + layer.in_proj.bias
    out = torch.zeros_like(x)
    for h in range(heads):
        q, k, v = (qkv[..., n * width + h * dim : n * width + (h + 1) * dim] for n in range(3))
        for i in range(1, length + 1):
            index = {j for j in range(1, i + 1) if j <= layer.global_tokens or j >= i - layer.window or i - j in offsets}
            index = torch.tensor(sorted(index)) - 1
            p = torch.softmax((k[:, index] @ q[:, i - 1, :, None])[..., 0] / math.sqrt(dim), -1)
            out[:, i - 1, h * dim : (h + 1) * dim] = (p[..., None] * v[:, index]).sum(1)
    return out @ layer.out_proj.weight.T + layer.out_proj.bias


@pytest.mark.parametrize("make", FAMILY)
@pytest.mark.parametrize("heads", [1, 3])
def test_layers_compute_what_their_definition_says(level, make, heads):
    torch.manual_seed(0)
    layer = make(24, heads)
    x = torch.randn(2, 17, 24)
    assert_close(layer(x), plain(layer, x, FAMILY[make]), dtype=torch.float32)


def test_they_are_found_where_users_look():
    for name in ("PrimeSelfAttention", "SquareSelfAttention", "MianChowlaSelfAttention"):
        assert getattr(sieve_attn, name) is getattr(layers, name)
    layer = PrimeSelfAttention(8)
    assert isinstance(layer, SparseIndexAttention)
    assert (layer.heads, layer.window, layer.global_tokens, layer.seq_len_max) == (1, 3, 2, 4096)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "in_proj.weight": (24, 8), "in_proj.bias": (24,), "out_proj.weight": (8, 8), "out_proj.bias": (8,),
    }  # fmt: skip
    assert "Primes()" in repr(layer).replace("terms=None", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compat", [False, True])
def test_steps_equal_the_forward_pass(level, dtype, compat):
    torch.manual_seed(1)
    layer = MianChowlaSelfAttention(32, 2, seq_len_max=None, upstream_compat=compat, dtype=dtype)
    x = torch.randn(3, 150, 32).to(dtype)
    with torch.no_grad():
        whole = layer(x)
        cache, rows = layer.empty_cache(3), []
        for n in [1] * 70 + [7, 1, 60, 12]:
            row, cache = layer.step(x[:, sum(r.shape[1] for r in rows) :][:, :n], cache)
            rows.append(row)
    assert len(cache) == 150
    assert_close(torch.cat(rows, 1), whole, dtype=dtype)


def test_an_older_cache_stays_what_it_was():
    torch.manual_seed(2)
    layer = PrimeSelfAttention(16, 2)
    x, other = torch.randn(1, 10, 16), torch.randn(1, 4, 16)
    with torch.no_grad():
        _, five = layer.step(x[:, :5], layer.empty_cache(1))
        before = [held.clone() for held in five.arrays]
        first, ten = layer.step(x[:, 5:], five)
        branch, _ = layer.step(other, five)
        again, _ = layer.step(x[:, 5:], five)
        assert all(torch.equal(a, b) for a, b in zip(five.arrays, before, strict=True))
        assert torch.equal(first, again)
        assert_close(branch, layer(torch.cat([x[:, :5], other], 1))[:, 5:], dtype=torch.float32)
        longer, _ = layer.step(other, ten)
        assert_close(longer, layer(torch.cat([x, other], 1))[:, 10:], dtype=torch.float32)


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float64], ids=str)
def test_a_cache_of_another_dtype_is_attended_to_as_it_is(held, monkeypatch):
    layer, x, seen = SquareSelfAttention(8, 2), torch.randn(1, 30, 8), []
    real = sparse_index.offset_attention
    monkeypatch.setattr(sparse_index, "offset_attention", lambda q, k, *rest, **kw: seen.append(k) or real(q, k, *rest, **kw))
    with torch.no_grad():
        whole = layer(x)
        for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
            cache, rows = layer.empty_cache(1, dtype=held), []
            with context:
                for n in range(30):
                    row, cache = layer.step(x[:, n : n + 1], cache)
                    rows.append(row)
            # nothing of what is cached was converted or copied for the last step
            assert seen[-1].data_ptr() == cache.arrays[0].data_ptr()
            assert seen[-1].dtype == cache.dtype == held
            assert torch.allclose(torch.cat(rows, 1).float(), whole, atol=0.02)
    assert rows[0].dtype == torch.bfloat16  # what autocast makes


def test_gradients_go_through_steps():
    torch.manual_seed(3)
    layer = PrimeSelfAttention(8, 2, dtype=torch.float64)
    x = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    cache, total = layer.empty_cache(1), 0.0
    for n in range(9):
        y, cache = layer.step(x[:, n : n + 1], cache)
        total = total + y.square().sum()
    for a, b in zip(torch.autograd.grad(total, [x, *layer.parameters()]), wanted, strict=True):
        assert_close(a, b)


def test_weights_come_with_both_calls():
    layer, x = PrimeSelfAttention(12, 3), torch.randn(2, 20, 12)
    with torch.no_grad():
        y, weights = layer(x, return_attention=True)
        assert torch.equal(y, layer(x))
        assert weights.weight.shape[:3] == (2, 3, 20)
        assert_close(weights.weight.sum(-1), torch.ones(2, 3, 20), dtype=torch.float32)
        _, cache = layer.step(x[:, :19], layer.empty_cache(2))
        _, last, cache = layer.step(x[:, 19:], cache, return_attention=True)
        assert_close(last.to_dense(20), weights.to_dense(20)[:, :, 19:], dtype=torch.float32)


def test_own_offsets_and_none_besides():
    torch.manual_seed(4)
    layer, x = SparseIndexAttention(8, (3, 5), window=0, global_tokens=0), torch.randn(1, 12, 8)
    assert layer.pattern == patterns.OffsetPattern((3, 5)) | patterns.Window(1)
    assert_close(layer(x), plain(layer, x, [3, 5]), dtype=torch.float32)


def test_upstream_compat_changes_only_the_first_rows():
    torch.manual_seed(5)
    layer, x = PrimeSelfAttention(8, window=3, global_tokens=2), torch.randn(1, 30, 8)
    compat = PrimeSelfAttention(8, window=3, global_tokens=2, upstream_compat=True)
    compat.load_state_dict(layer.state_dict())
    a, b = layer(x), compat(x)
    changed = (a - b).abs().amax((0, 2)) > 1e-6
    # 1-based: token 1 has no earlier token; token 6 is the first whose window holds no global token
    assert changed.nonzero()[:, 0].tolist() == [1, 2, 3, 4]
    assert torch.equal(a[:, 5:], b[:, 5:])


def test_the_compiler_sees_one_graph():
    layer, x = PrimeSelfAttention(16, 2), torch.randn(1, 12, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x), dtype=torch.float32)


def own(*offsets, plain=False):
    """A pattern of a class of the caller's, which is called the same whatever it keeps."""

    class Mine(patterns.OffsetSet):
        def up_to(self, limit):
            return np.array([s for s in offsets if s <= limit], np.int64)

    return Mine() if plain else dataclass(frozen=True)(Mine)()


@pytest.mark.parametrize("plain", [False, True])
def test_patterns_of_ones_own_are_told_apart(plain):
    x = torch.randn(1, 2, 30, 8)
    for offsets in ((1, 2), (5, 9)):
        pattern = own(*offsets, plain=plain) | patterns.Window(1)
        kept = torch.from_numpy(pattern.to_dense(30))
        wanted = functional.scaled_dot_product_attention(x, x, x, attn_mask=kept)
        assert_close(offset_attention(x, x, x, pattern), wanted, dtype=torch.float32)


class Multiples(patterns.OffsetSet):
    def __init__(self, step):
        self.step = step

    def up_to(self, limit):
        return np.arange(self.step, limit + 1, self.step)


class Shifted(patterns.Primes):
    """Inherits the fields of a dataclass, which do not tell its instances apart."""

    def __init__(self, by):
        super().__init__()
        object.__setattr__(self, "by", by)

    def up_to(self, limit):
        return super().up_to(max(limit - self.by, 0)) + self.by


@dataclass(frozen=True)
class Listed(patterns.OffsetSet):
    """Holds an array, whose repr is abbreviated and which cannot be hashed."""

    table: np.ndarray

    def up_to(self, limit):
        return self.table[: np.searchsorted(self.table, limit, "right")]


@dataclass(frozen=True)
class Taken(patterns.OffsetSet):
    """Takes what is none of its fields."""

    step: InitVar[int] = 1

    def __post_init__(self, step):
        object.__setattr__(self, "every", step)

    def up_to(self, limit):
        return np.arange(self.every, limit + 1, self.every)


ALIKE = {
    "a plain class": [Multiples(2), Multiples(3)],
    "a subclass of a dataclass": [Shifted(1), Shifted(7)],
    "a long array": [Listed(np.arange(1, 3000, 2)), Listed(np.r_[1:1000:2, 1002:1102:2, 1101:3000:2])],
    "what is no field": [Taken(2), Taken(3)],
    "unions": [Shifted(n) | patterns.Window(2) for n in (1, 7)],
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("pair", ALIKE)
def test_patterns_of_one_class_are_told_apart(pair, compiled):
    torch._dynamo.reset()
    x, call = torch.randn(1, 1, 2000, 8), offset_attention
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="eager")
    for pattern in ALIKE[pair]:
        # not by `keeps`, which remembers patterns as well
        apart, kept = np.subtract.outer(np.arange(2000), np.arange(2000)), pattern.reach(1999).offsets
        dense = (apart >= 0) & np.isin(apart, kept)
        _, report = offset_attention(x, x, x, pattern, return_report=True)
        assert report.pairs == dense.sum()
        assert np.array_equal(pattern.to_dense(2000), dense)
        wanted = functional.scaled_dot_product_attention(x, x, x, attn_mask=torch.from_numpy(dense))
        seen = torch.from_numpy(dense.any(1))  # of a query without keys PyTorch makes what it likes
        assert_close(call(x, x, x, pattern)[:, :, seen], wanted[:, :, seen], dtype=torch.float32)


def test_patterns_that_their_text_gives_back_are_not_held():
    before = dict(offset_op._KNOWN)
    x = torch.zeros(1, 1, 4, 8)
    for n in range(2, 9):
        offset_attention(x, x, x, patterns.OffsetPattern((1, n)) | patterns.Window(n))
    assert before == offset_op._KNOWN


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copied_layer_compiles_with_a_pattern_of_ones_own(copied):
    torch._dynamo.reset()
    layer, x = SparseIndexAttention(8, Multiples(3)), torch.randn(1, 9, 8)
    assert_close(torch.compile(copied(layer), fullgraph=True, backend="eager")(x), layer(x), dtype=torch.float32)


def test_patterns_of_ones_own_compile_in_a_layer_and_say_why_not_elsewhere():
    torch._dynamo.reset()
    layer, x = SparseIndexAttention(8, own(2, 3)), torch.randn(1, 9, 8)
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), dtype=torch.float32)
    pattern, x = own(4), torch.randn(1, 1, 9, 8)
    with pytest.raises(ValueError, match="`pattern` of a class of your own must be known before it is compiled"):
        torch.compile(lambda x: offset_attention(x, x, x, pattern), fullgraph=True, backend="aot_eager")(x)


X = torch.zeros(1, 5, 8)
BAD = {
    "heads": (lambda: PrimeSelfAttention(10, 4), ("`heads`", "divide embed_dim 10", "4")),
    "no heads": (lambda: PrimeSelfAttention(10, 0), ("`heads`", "at least 1", "0")),
    "no width": (lambda: PrimeSelfAttention(0), ("`embed_dim`", "at least 1")),
    "negative window": (lambda: PrimeSelfAttention(8, window=-1), ("`window`", "at least 0", "-1")),
    "negative globals": (lambda: PrimeSelfAttention(8, global_tokens=-2), ("`global_tokens`", "at least 0", "-2")),
    "no length": (lambda: PrimeSelfAttention(8, seq_len_max=0), ("`seq_len_max`", "at least 1", "None")),
    "no offsets": (lambda: SparseIndexAttention(8, ()), ("`offsets`", "at least one")),
    "falling offsets": (lambda: SparseIndexAttention(8, (5, 3)), ("`offsets`", "must increase", "3 after 5")),
    "offset 0": (lambda: SparseIndexAttention(8, (0, 3)), ("`offsets`", "at least 1", "0")),
    "offset below 0": (lambda: SparseIndexAttention(8, (-4,)), ("`offsets`", "at least 1", "-4")),
    "too long": (lambda: PrimeSelfAttention(8, seq_len_max=4)(X), ("`x`", "seq_len_max 4", "5 tokens", "seq_len_max=None")),
    "wrong width": (lambda: PrimeSelfAttention(16)(X), ("`x`", "[batch, len, 16]", "(1, 5, 8)")),
    "wrong rank": (lambda: PrimeSelfAttention(8)(X[0]), ("`x`", "[batch, len, 8]", "(5, 8)")),
    "no tokens": (lambda: PrimeSelfAttention(8)(X[:, :0]), ("`x`", "at least one token", "(1, 0, 8)")),
    "no plan": (lambda: PrimeSelfAttention(8, plan="fast"), ("`plan`", "'fast'")),
    "cache of another layer": (
        lambda: PrimeSelfAttention(8, 2).step(X, PrimeSelfAttention(8).empty_cache(1)),
        ("`cache`", "((2, 4), (2, 4))", "((1, 8), (1, 8))"),
    ),
    "no cache": (lambda: PrimeSelfAttention(8).step(X, None), ("`cache`", "from this layer", "NoneType")),
    "cache elsewhere": (
        lambda: PrimeSelfAttention(8).step(X, PrimeSelfAttention(8).empty_cache(1, "meta")),
        ("`cache`", "on cpu", "meta"),
    ),
    "no batch": (lambda: PrimeSelfAttention(8).empty_cache(0), ("`batch_size`", "at least 1")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=r".+; got .+; .+") as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_steps_are_checked_against_their_cache():
    layer = PrimeSelfAttention(8, seq_len_max=6)
    _, cache = layer.step(X, layer.empty_cache(1))
    _, full = layer.step(X[:, :1], cache)
    with pytest.raises(ValueError, match=r"`x` must not go beyond seq_len_max 6; got 7 tokens"):
        layer.step(X[:, :1], full)
    with pytest.raises(ValueError, match=r"`x` must have the batch of the cache, 1"):
        layer.step(X[:, :1].repeat(2, 1, 1), cache)
