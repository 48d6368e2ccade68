"""Few queries: keys shared between programs and merged, one array or pages, lengths of every kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn.attend.paged import reference
from sieve_attn.functional import paged_attention
from sieve_attn.testing import assert_close, oracle
from sieve_attn.testing.contracts import spread_heads
from sieve_attn.testing.strategies import Shape, gaussian, random_blocks
from sieve_attn.types import Call, Ranges, Selection

pytest.importorskip("triton", reason="Triton is not installed")
from sieve_attn.attend.triton import forward


def compare(shape, selection, splits, dtype=torch.float32, **options):
    q, k, v = gaussian(3, shape, dtype)
    call = Call(q, k, v, scale=0.4, causal=True, **options)
    out, lse = forward.attend(call, selection, splits=splits)
    seen = oracle.visible_keys(shape.q_len, shape.kv_len, causal=True, window=options.get("window"))
    kept = seen & spread_heads(selection.to_dense(q), shape.q_heads)
    rest = {"scale": 0.4} | {n: options[n] for n in ("softcap", "sink") if n in options}
    exact = oracle.plain_attention(q.double(), k.double(), v.double(), kept, **rest)
    plain = oracle.plain_attention(q, k, v, kept, **{n: x.to(dtype) if n == "sink" else x for n, x in rest.items()})
    assert_close(out, exact[0], plain=plain[0], dtype=dtype, what="output")
    assert_close(lse, exact[1], plain=plain[1], dtype=dtype, what="lse")


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shared_keys_give_the_same(splits, dtype):
    shape = Shape(2, 6, 2, 3, 200, 16, 8)
    compare(shape, random_blocks(5, shape, causal=True, kv_block=16, q_block=4), splits, dtype)
    compare(shape, Selection((Ranges(3, 200, prefix=200),)), splits, dtype, sink=torch.linspace(-1, 3, 6))


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 16), st.integers(1, 140), st.integers(1, 5), st.integers(1, 2), st.sampled_from((4, 16, 48)),
    st.sampled_from((None, 7)), st.sampled_from((0.0, 0.3, 1.0)), st.integers(1, 5),
)  # fmt: skip
def test_any_lengths_and_groups(q_len, kv_len, group, kv_heads, kv_block, window, density, splits):
    shape = Shape(1, group * kv_heads, kv_heads, q_len, kv_len, 8, 8)
    selection = random_blocks(kv_len, shape, causal=True, kv_block=kv_block, q_block=16, density=density)
    compare(shape, selection, splits, window=window)


def paged_inputs(dtype=torch.float32, page_size=16, q_len=2):
    source = torch.Generator().manual_seed(0)
    batch, q_heads, kv_heads, dim, v_dim, pages = 3, 6, 2, 24, 16, 20
    draw = lambda *size: torch.randn(size, generator=source).to(dtype)  # noqa: E731
    caches = draw(pages, page_size, kv_heads, dim), draw(pages, page_size, kv_heads, v_dim)
    table = torch.randperm(pages, generator=source)[:18].reshape(batch, 6).to(torch.int32)
    return draw(batch, q_heads, q_len, dim), *caches, table, torch.tensor([5, 96, 61])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 2.0, "sink": torch.linspace(-1, 1, 6)}])
def test_pages_are_read_where_they_lie(options, dtype):
    inputs = paged_inputs(dtype)
    got = paged_attention(*inputs, backend="triton", return_lse=True, **options)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = paged_attention(*wide, backend="reference", return_lse=True, **options)
    plain = paged_attention(*inputs, backend="reference", return_lse=True, **options)
    assert_close(got[0], exact[0], plain=plain[0], dtype=dtype, what="output")
    assert_close(got[1], exact[1], plain=plain[1], dtype=dtype, what="lse")


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("splits", [1, 3])
def test_blocks_of_pages(heads, splits):
    inputs = paged_inputs()
    selection = random_blocks(4, Shape(3, 6, 2, 2, 96, 24, 16), heads=heads, kv_block=8, q_block=4, density=0.5)
    from sieve_attn.attend.paged import _checked

    pages = _checked(*inputs, None, None, None, None, selection)
    got = forward.attend_paged(pages, splits=splits)
    for a, b in zip(got, reference(pages), strict=True):
        assert_close(a, b, dtype=torch.float32)


def test_pages_beyond_a_sequence_are_not_read():
    query, key, value, table, lengths = paged_inputs()
    expected = paged_attention(query, key, value, table, lengths, backend="triton")
    for b, length in enumerate(lengths.tolist()):
        for page in range(6):
            inside = max(min(length - page * 16, 16), 0)
            key[table[b, page], inside:] = torch.nan
            value[table[b, page], inside:] = torch.nan
    assert torch.equal(paged_attention(query, key, value, table, lengths, backend="triton"), expected)
