"""Keys that queries see and keep, counted by the ends of intervals, against counting every pair by its definition."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sieve_attn as sa
import sieve_attn.jax as sieve_jax
from sieve_attn import policies as P
from sieve_attn.jax import stages
from sieve_attn.jax.call import Call as JaxCall
from sieve_attn.selection import counting
from sieve_attn.testing import Shape
from sieve_attn.testing.strategies import random_blocks
from sieve_attn.types import Call, Offsets, Ranges, Selection

LAWS = settings(max_examples=150, deadline=None, derandomize=True)
FEWER = settings(LAWS, max_examples=30)  # JAX compiles every shape anew


def a_selection(draw, shape, causal, kinds):
    lengths = (shape.q_len, shape.kv_len)
    prefix, window = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    offsets = tuple(draw(st.lists(st.integers(-6, 45), max_size=8)))
    kind = draw(st.sampled_from(kinds))
    if kind == "ranges":
        return Selection((Ranges(*lengths, prefix=prefix, window=window, two_sided=draw(st.booleans())),))
    if kind == "offsets":
        return Selection((Offsets(*lengths, offsets, first_key=draw(st.integers(0, 3))),))
    if kind == "both":
        return Selection((Ranges(*lengths, prefix=prefix, window=window),)) | Selection((Offsets(*lengths, offsets),))
    grid = {"q_block": draw(st.sampled_from([1, 3, 16])), "kv_block": draw(st.sampled_from([1, 5, 16]))}
    heads = draw(st.sampled_from([1, shape.kv_heads, shape.q_heads]))
    return random_blocks(
        draw(st.integers(0, 1000)), shape, **grid, heads=heads, causal=causal, density=0.4, per_query=draw(st.booleans())
    )


@st.composite
def calls(draw, kinds=("ranges", "offsets", "both", "blocks")):
    """``(options, shape, selection)`` without arrays of a framework, and which pairs see each other, [batch, q_len, kv_len]."""
    packed = draw(st.booleans()) and draw(st.booleans())
    kv_len = draw(st.integers(1, 40))
    q_len = kv_len if packed else draw(st.integers(1, 50))
    shape = Shape(1 if packed else draw(st.integers(1, 2)), 4, draw(st.sampled_from([1, 2, 4])), q_len, kv_len, 4, 4)
    options = {"causal": draw(st.booleans()), "window": draw(st.sampled_from([None, None, 1, 6, 100]))}
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    if packed:
        inside = draw(st.lists(st.integers(0, kv_len), max_size=4))
        options["cu_seqlens"] = np.array(sorted([0, kv_len, *inside]))
    if draw(st.booleans()):
        options["key_mask"] = random.random((shape.batch, kv_len)) < 0.6
    seen = np.zeros((shape.batch, q_len, kv_len), bool)
    for i in range(q_len):
        for j in range(kv_len):
            position, sees = i + kv_len - q_len, True
            if options["causal"]:
                sees = j <= position
            if options["window"] is not None:
                sees = sees and abs(j - position) < options["window"]
            if packed:
                sees = sees and not any(min(i, j) < edge <= max(i, j) for edge in options["cu_seqlens"])
            seen[:, i, j] = sees
    if "key_mask" in options:
        seen &= options["key_mask"][:, None, :]
    return options, shape, a_selection(draw, shape, options["causal"], kinds), seen


def a_call(framework, options, shape):
    make = {"torch": torch.zeros, "numpy": np.zeros, "jax": jnp.zeros}[framework]
    arrays = {"torch": torch.as_tensor, "numpy": np.asarray, "jax": jnp.asarray}[framework]
    query = make((shape.batch, shape.q_heads, shape.q_len, 4))
    key = make((shape.batch, shape.kv_heads, shape.kv_len, 4))
    given = {name: arrays(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    return (JaxCall if framework == "jax" else Call)(query, key, key, **given)


def check_counts(framework, drawn, count):
    options, shape, selection, seen = drawn
    call = a_call(framework, options, shape)
    dense = selection.to_dense(torch.zeros(1)).numpy()
    dense = dense.repeat(shape.q_heads // dense.shape[1], 1)
    visible = np.broadcast_to(seen[:, None], (shape.batch, shape.q_heads, shape.q_len, shape.kv_len))
    assert not counting.needs_pairs(call, selection)
    kept, found = (np.asarray(x) for x in count(call, selection))
    assert kept.shape == found.shape == (shape.batch, shape.q_heads, 1)
    assert (found[..., 0] == visible.sum((2, 3))).all()
    assert (kept[..., 0] == (visible & dense).sum((2, 3))).all()
    rows = np.asarray(call.rows(0, shape.q_len).visible)
    assert (np.broadcast_to(rows[:, 0], seen.shape) == seen).all()


@pytest.mark.parametrize("framework", ["torch", "numpy"])
@LAWS
@given(calls())
def test_counts_are_those_of_pairs(framework, drawn):
    check_counts(framework, drawn, counting.count_keys)


@FEWER
@given(calls(kinds=("ranges", "offsets", "both")))
def test_counts_of_jax_are_those_of_pairs(drawn):
    check_counts("jax", drawn, stages.count_keys)


def test_masks_and_biases_hide_keys_from_the_count():
    shape = Shape(2, 4, 2, 6, 9, 4, 4)
    hidden = torch.zeros(1, 4, 6, 9)
    hidden[:, 1, 2, 3:] = -torch.inf
    selection = Selection((Ranges(6, 9, prefix=4),))
    for options in ({"bias": hidden}, {"mask": hidden == 0}):
        kept, visible = counting.count_keys(a_call("torch", options, shape), selection)
        assert visible[:, :, 0].tolist() == [[54, 48, 54, 54]] * 2
        assert kept[:, :, 0].tolist() == [[24, 23, 24, 24]] * 2


def test_a_report_of_a_window_does_not_go_over_the_pairs():
    """100,000 tokens: an array of all pairs would take 10 GB of booleans."""
    n, window, sinks = 100_000, 64, 4
    q = torch.zeros(1, 1, n, 16)
    tracemalloc.start()
    _, report = sa.attention(q, q, q, P.Windowed(sinks, window), causal=True, return_report=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    near = window * (window + 1) // 2 + (n - window) * window
    # of the first 64 + 4 tokens the window itself covers some sinks
    far = sum(min(sinks, max(i + 1 - window, 0)) for i in range(window + sinks)) + (n - window - sinks) * sinks
    assert report.kept.tolist() == [[[near + far]]]
    assert report.visible.tolist() == [[[n * (n + 1) // 2]]]
    assert peak < 20e6


def test_a_report_of_jax_counts_beyond_32_bits():
    n = 100_000
    x = jnp.zeros((1, 1, n, 16))
    _, report = jax.jit(lambda x: sieve_jax.attention(x, x, x, P.Windowed(4, 64), causal=True, return_report=True))(x)
    assert float(report.visible[0, 0, 0]) == pytest.approx(n * (n + 1) / 2, rel=1e-6)
