"""Causal top-k attention as a layer: its definition, steps against full calls, caches that branch and grow, gradients."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sieve_attn
from sieve_attn.layers import PrimeSelfAttention, SparseCausalAttention, pack_ternary, sparse_causal
from sieve_attn.layers.growing import LEAST, GrowingArrays
from sieve_attn.testing import assert_close


def plain(layer, x, dtype):
    """The definition with a dense array of scores."""
    weight = {name: getattr(layer, name).ternary_weight().detach().to(dtype) for name in ("query", "key", "value")}
    batch, n, width = x.shape
    q, k, v = ((x.detach().to(dtype) @ w.T).reshape(batch, n, layer.heads, -1).transpose(1, 2) for w in weight.values())
    scores = (q @ k.transpose(-1, -2) * layer.d_head**-0.5).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    best, index = scores.topk(min(layer.top_k, n), -1)
    scores = torch.full_like(scores, -torch.inf).scatter(-1, index, best)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, n, width)


def steps(layer, x, cache=None):
    """All tokens of ``x`` one after the other."""
    cache = layer.empty_cache(x.shape[0]) if cache is None else cache
    rows = []
    for n in range(x.shape[1]):
        row, cache = layer.forward_incremental(x[:, n : n + 1], cache)
        rows.append(row)
    return torch.cat(rows, 1), cache


def make(seed=0, batch=2, n=70, width=24, **options):
    torch.manual_seed(seed)
    layer = SparseCausalAttention(width, **({"d_head": 8, "top_k": 5} | options))
    return layer, torch.randn(batch, n, width)


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_layer_is_its_definition(heads, quantize):
    layer, x = make(heads=heads, quantize=quantize)
    assert_close(layer(x), plain(layer, x, torch.float64), plain=plain(layer, x, torch.float32), dtype=torch.float32)


def test_widths_are_those_of_the_design():
    layer = SparseCausalAttention(48, d_head=8, heads=4)
    assert layer.query.weight.shape == layer.key.weight.shape == (32, 48)
    assert layer.value.weight.shape == (48, 48)
    assert (SparseCausalAttention(48).d_head, SparseCausalAttention(48).top_k, SparseCausalAttention(48).heads) == (32, 8, 1)


@given(
    heads=st.sampled_from([1, 2]),
    n=st.integers(1, 90),
    top_k=st.integers(1, 9),
    prompt=st.integers(0, 40),
    seed=st.integers(0, 50),
)
@settings(max_examples=25, deadline=None)
def test_steps_equal_the_full_call(heads, n, top_k, prompt, seed):
    layer, x = make(seed, n=n, heads=heads, top_k=top_k)
    prompt = min(prompt, n - 1)
    with torch.no_grad():
        cache = layer.warmup_cache(x[:, :prompt]) if prompt else None
        rows, cache = steps(layer, x[:, prompt:], cache)
        full = layer(x)
    assert len(cache) == n
    assert_close(rows, plain(layer, x, torch.float64)[:, prompt:], plain=full[:, prompt:], dtype=torch.float32)


def test_prefill_is_both():
    layer, x = make()
    with torch.no_grad():
        y, cache = layer.prefill(x)
        assert torch.equal(y, layer(x))
        assert all(torch.equal(a, b) for a, b in zip(cache.arrays, layer.warmup_cache(x).arrays, strict=True))


def test_later_tokens_influence_nothing():
    layer, x = make()
    with torch.no_grad():
        before = layer(x)
        x[:, 40:] = torch.randn(2, 30, 24) * 100
        assert torch.equal(layer(x)[:, :40], before[:, :40])


# caches ------------------------------------------------------------------------------------------------------------------


def test_an_older_cache_stays_valid():
    layer, x = make(n=40)
    with torch.no_grad():
        _, trunk = steps(layer, x[:, :20])
        held = [a.clone() for a in trunk.arrays]
        left, _ = steps(layer, x[:, 20:], trunk)
        other = torch.randn(2, 20, 24)
        right, _ = steps(layer, other, trunk)
        again, _ = steps(layer, x[:, 20:], trunk)
        assert all(torch.equal(a, b) for a, b in zip(trunk.arrays, held, strict=True))
        assert torch.equal(left, again)
        assert torch.equal(right, steps(layer, torch.cat([x[:, :20], other], 1))[0][:, 20:])


@given(moves=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_any_tree_of_appends_holds_what_was_appended(moves):
    caches, truth = [GrowingArrays.empty(1, 2, (3, 4), torch.device("cpu"), torch.float32)], [torch.empty(1, 2, 0, 7)]
    for source, count in moves:
        source %= len(caches)
        new = torch.randn(1, 2, count, 7)
        caches.append(caches[source].append((new[..., :3], new[..., 3:]), False))
        truth.append(torch.cat([truth[source], new], 2))
    for cache, expected in zip(caches, truth, strict=True):
        assert torch.equal(torch.cat(cache.arrays, -1), expected)
        assert len(cache) == expected.shape[2]


class Interrupted(torch.Tensor):
    """Lets something else happen at the moment at which it is written into a buffer, as another thread would."""

    meanwhile: ClassVar = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__setitem__ and cls.meanwhile:
            cls.meanwhile.pop()()
        return super().__torch_function__(func, types, args, kwargs or {})


def test_threads_that_step_from_one_cache_share_no_entries():
    cache = GrowingArrays.empty(1, 1, (2,), torch.device("cpu"), torch.float32).append((torch.zeros(1, 1, 3, 2),))
    others = []
    Interrupted.meanwhile.append(lambda: others.append(cache.append((torch.full((1, 1, 2, 2), 5.0),))))
    mine = cache.append((torch.ones(1, 1, 1, 2).as_subclass(Interrupted),))
    assert mine.arrays[0].flatten().tolist() == [0.0] * 6 + [1.0] * 2
    assert others[0].arrays[0].flatten().tolist() == [0.0] * 6 + [5.0] * 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_caches_can_be_copied(copied):
    layer, x = make(n=9)
    with torch.no_grad():
        _, cache = steps(layer, x[:, :6])
        rows, _ = steps(layer, x[:, 6:], copied(cache))
        assert torch.equal(rows, steps(layer, x[:, 6:], cache)[0])


def test_appending_copies_seldom():
    cache, moved = GrowingArrays.empty(1, 1, (2,), torch.device("cpu"), torch.float32), 0
    place = None
    for _ in range(4096):
        cache = cache.append((torch.ones(1, 1, 1, 2),), False)
        if cache.arrays[0].data_ptr() != place:
            place, moved = cache.arrays[0].data_ptr(), moved + 1
    assert moved <= 17  # a quarter more each time
    assert float(cache.arrays[0].sum()) == 8192
    assert cache._storage.buffers[0].shape[2] <= 1.25 * 4096 + LEAST


def test_inference_mode_and_caches_from_it():
    layer, x = make(n=12)
    with torch.inference_mode():
        _, cache = steps(layer, x[:, :6])
    with torch.no_grad():
        rows, _ = steps(layer, x[:, 6:], cache)
        assert torch.equal(rows, steps(layer, x)[0][:, 6:])
    rows, _ = steps(layer, x[:, 6:], cache)
    rows.sum().backward()


def test_gradients_through_steps_are_those_of_the_full_call():
    layer, x = make(n=30)
    upstream = torch.randn(2, 30, 24)
    x.requires_grad_()
    full = torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)
    rows, _ = steps(layer, x)
    stepped = torch.autograd.grad(rows, [x, *layer.parameters()], upstream)
    for got, expected in zip(stepped, full, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_step_with_gradients_survives_later_steps_without():
    layer, x = make(n=30)
    with torch.no_grad():
        _, cache = steps(layer, x[:, :20])
    y, recorded = layer.forward_incremental(x[:, 20:21], cache)
    with torch.no_grad():
        steps(layer, x[:, 21:], cache)
        steps(layer, x[:, 21:], recorded)
    y.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())


def test_only_the_query_is_trained():
    layer, x = make(n=30)
    layer.key.requires_grad_(False)
    layer.value.requires_grad_(False)
    rows, _ = steps(layer, x)
    rows.sum().backward()
    expected = layer.query.weight.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    assert torch.allclose(expected, layer.query.weight.grad, rtol=1e-4, atol=1e-4)


def test_caches_follow_the_dtype_of_the_layer():
    layer, x = make(n=20)
    layer = layer.to(torch.bfloat16)
    with torch.no_grad():
        rows, cache = steps(layer, x.bfloat16())
    assert cache.arrays[0].dtype == rows.dtype == torch.bfloat16
    assert layer.empty_cache(2, "cpu", torch.float64).arrays[1].dtype == torch.float64


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float64], ids=str)
def test_a_cache_of_another_dtype_is_attended_to_as_it_is(held, monkeypatch):
    layer, x = make(n=20)
    seen = []
    real = sparse_causal.top_k_attention
    monkeypatch.setattr(sparse_causal, "top_k_attention", lambda q, k, *rest, **kw: seen.append(k) or real(q, k, *rest, **kw))
    with torch.no_grad():
        rows, cache = steps(layer, x, layer.empty_cache(2, dtype=held))
        q, k, v = (layer._split(project(x)).to(held) for project in (layer.query, layer.key, layer.value))
        expected = real(q, k, v, layer.top_k, causal=True).transpose(1, 2).flatten(2)
    assert rows.dtype == torch.float32
    assert cache.dtype == held
    # nothing of what is cached was converted or copied for the last step
    assert seen[-1].data_ptr() == cache.arrays[0].data_ptr()
    assert torch.allclose(rows, expected.float(), atol=0.02 if held == torch.bfloat16 else 1e-5)


def test_autocast_steps_from_a_cache_of_any_dtype():
    layer, x = make(n=20)
    with torch.no_grad():
        outside, inside = layer.empty_cache(2), None
        with torch.autocast("cpu", torch.bfloat16):
            full, inside = layer(x), layer.warmup_cache(x[:, :10])
            for cache, rest in ((outside, x), (inside, x[:, 10:])):
                rows, last = steps(layer, rest, cache)
                assert last.dtype == cache.dtype
                assert rows.dtype == torch.bfloat16
                assert torch.allclose(rows.float(), full[:, -rows.shape[1] :].float(), atol=0.05)


def test_packed_layers_step_too():
    layer, x = make()
    with torch.no_grad():
        before = layer(x)
        pack_ternary(layer)
        rows, _ = steps(layer, x)
    assert torch.allclose(rows, before, atol=1e-5)
    assert not list(layer.parameters())


# bad input ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SparseCausalAttention(24, heads=5), "`heads` must divide `d_model`; got 5 heads on a width of 24"),
        (lambda: SparseCausalAttention(24, top_k=0), "`top_k` must be an integer of at least 1; got 0"),
        (lambda: SparseCausalAttention(24, d_head=0), "`d_head` must be an integer of at least 1; got 0"),
        (lambda: make()[0](torch.ones(2, 24)), r"`x` must have shape \[batch, len, 24\] .* got shape \(2, 24\)"),
        (lambda: make()[0](torch.ones(2, 3, 25)), r"`x` must have shape \[batch, len, 24\] .* got shape \(2, 3, 25\)"),
        (lambda: make()[0](torch.ones(2, 0, 24)), r"with at least one token; got shape \(2, 0, 24\)"),
        (lambda: make()[0].warmup_cache(torch.ones(24)), r"`x` must have shape \[batch, len, 24\] .* got shape \(24,\)"),
        (lambda: make()[0].forward_incremental(torch.ones(2, 2, 24), make()[0].empty_cache(2)),
         r"`x_step` must have shape \[2, 1, 24\]: one token for each sequence of the cache; got shape \(2, 2, 24\)"),
        (lambda: make()[0].forward_incremental(torch.ones(3, 1, 24), make()[0].empty_cache(2)),
         r"`x_step` must have shape \[2, 1, 24\].* got shape \(3, 1, 24\)"),
        (lambda: make()[0].forward_incremental(torch.ones(2, 1, 24), make()[0].empty_cache(2, "meta")),
         "`cache` must be on cpu, where the layer is; got meta"),
        (lambda: make()[0].forward_incremental(torch.ones(2, 1, 24), PrimeSelfAttention(24).empty_cache(2)),
         r"`cache` must hold keys and values of \(heads, width\) .*; got \(\(1, 24\), \(1, 24\)\)"),
        (lambda: make()[0].forward_incremental(torch.ones(2, 1, 24), None), "`cache` must come from this layer; got NoneType"),
        (lambda: make()[0].empty_cache(0), "`batch_size` must be an integer of at least 1; got 0"),
    ],
)  # fmt: skip
def test_bad_input_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_name_at_the_top():
    assert sieve_attn.SparseCausalAttention is SparseCausalAttention
