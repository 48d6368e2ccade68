"""Decoding kernels: every level reads a cache in place, whole or in pages, and gives what the fp64 oracle gives."""

import ctypes
import mmap

import pytest
import torch

from sieve_attn import attend, functional, native
from sieve_attn.attend import native as kernels
from sieve_attn.testing import assert_close, oracle
from sieve_attn.testing.strategies import Shape, gaussian
from sieve_attn.types import Blocks, Call, Ranges, Selection

pytestmark = pytest.mark.skipif(bool(native.missing()), reason="pure-Python installation")
LEVELS = native.module().levels() if not native.missing() else []
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = {
    "one query, a group of four": Shape(1, 8, 2, 1, 700, 64, 64),
    "five queries, odd channels": Shape(2, 3, 1, 5, 333, 48, 40),
    "sixteen queries, wide group": Shape(1, 16, 2, 16, 530, 128, 96),
    "values wider than keys": Shape(1, 4, 2, 3, 515, 32, 256),
    "seven rows, channels behind whole vectors": Shape(1, 7, 1, 1, 300, 72, 112),
    "six rows, channels behind pairs of vectors": Shape(1, 6, 2, 2, 300, 80, 112),
}
OPTIONS = {
    "whole": lambda s: {},
    "causal window": lambda s: {"causal": True, "window": 100},
    "soft cap": lambda s: {"causal": True, "softcap": 5.0},
    "bias and sink": lambda s: {"bias": torch.randn(1, 1, s.q_len, s.kv_len), "sink": torch.randn(s.q_heads)},
    "padding": lambda s: {"key_mask": torch.rand(s.batch, s.kv_len) > 0.3},
    "mask": lambda s: {"mask": torch.rand(s.batch, 1, s.q_len, s.kv_len) > 0.5},
}


@pytest.fixture(autouse=True, params=LEVELS)
def each_level(request):
    native.module().force_level(request.param)
    yield
    native.module().force_level("")


def some_blocks(s, share=0.4, rows=None):
    torch.manual_seed(5)
    kept = torch.rand(s.batch, s.kv_heads, 1, -(-s.kv_len // 16)) < share
    return Selection((Blocks.from_tiles(kept, q_len=s.q_len, kv_len=s.kv_len, q_block=64, kv_block=16, rows=rows),))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_equals_the_oracle(shape, options, dtype):
    s = SHAPES[shape]
    torch.manual_seed(3)
    extra = {n: x.to(dtype) if n in ("bias", "sink") else x for n, x in OPTIONS[options](s).items()}
    inputs = gaussian(1, s, dtype)
    seen = {n: extra[n] for n in ("causal", "window", "mask", "key_mask") if n in extra}
    rest = {n: extra[n] for n in ("bias", "softcap", "sink") if n in extra}
    visible = oracle.visible_keys(s.q_len, s.kv_len, **seen)
    choices = [Selection((Ranges(s.q_len, s.kv_len, prefix=s.kv_len),))]
    if not extra.get("causal"):
        choices.append(some_blocks(s))
    for selection in choices:
        call = Call(*inputs, scale=s.dim**-0.5, **extra)
        assert kernels._few_rows(call)
        kept = selection.to_dense(inputs[0])
        if kept.shape[1] > 1:
            kept = kept.repeat_interleave(s.q_heads // s.kv_heads, 1)
        doubled = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in rest.items()}
        exact = oracle.plain_attention(*(x.double() for x in inputs), visible & kept, **doubled)
        plain = oracle.plain_attention(*inputs, visible & kept, **rest)
        got = kernels.attend(call, selection)
        assert_close(got[0], exact[0], plain=plain[0], dtype=dtype, what="output")
        assert_close(got[1], exact[1], plain=plain[1], dtype=dtype, what="lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [8, 24, 100])
def test_every_query_may_keep_its_own_blocks(block, dtype):
    """Blocks that cut panels, over so many keys that the work is split."""
    s = Shape(1, 4, 2, 3, 1500, 64, 64)
    q, k, v = gaussian(2, s, dtype)
    torch.manual_seed(4)
    rows = torch.rand(1, 2, 3, -(-1500 // block)) < 0.5
    kept = rows.any(2, keepdim=True)
    selection = Selection((Blocks.from_tiles(kept, q_len=3, kv_len=1500, q_block=64, kv_block=block, rows=rows),))
    allowed = rows.repeat_interleave(2, 1).repeat_interleave(block, 3)[..., :1500]
    exact = oracle.plain_attention(q.double(), k.double(), v.double(), allowed)
    plain = oracle.plain_attention(q, k, v, allowed)
    for got, true, simple in zip(attend(q, k, v, selection, backend="native"), exact, plain, strict=True):
        assert_close(got, true, plain=simple, dtype=dtype)


def test_threads_change_no_bit():
    s = Shape(1, 4, 1, 1, 9000, 64, 64)
    before = torch.get_num_threads()
    for dtype in DTYPES:
        q, k, v = gaussian(3, s, dtype)
        for selection in (Selection((Ranges(1, 9000, prefix=9000),)), some_blocks(s)):
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(attend(q, k, v, selection, backend="native"))
            torch.set_num_threads(before)
            for out, lse in found[1:]:
                assert torch.equal(out, found[0][0])
                assert torch.equal(lse, found[0][1])


def test_values_that_nobody_attends_to_do_not_matter():
    s = Shape(1, 4, 2, 2, 300, 64, 64)
    for dtype in DTYPES:
        q, k, v = gaussian(4, s, dtype)
        mask = torch.rand(1, 300) > 0.3
        clean = attend(q, k, v, some_blocks(s), key_mask=mask, backend="native")
        v = torch.where(mask[:, None, :, None], v, torch.nan)
        found = attend(q, k, v, some_blocks(s), key_mask=mask, backend="native")
        assert torch.equal(found[0], clean[0])
        assert torch.equal(found[1], clean[1])


def test_a_row_without_keys_is_zero():
    s = Shape(1, 4, 2, 2, 64, 32, 32)
    q, k, v = gaussian(4, s, torch.bfloat16)
    out, lse = attend(q, k, v, some_blocks(s, 0.0), backend="native")
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def paged(seed, size, dtype, lengths=(400, 17, 333), q_len=3, dim=64, v_dim=96):
    torch.manual_seed(seed)
    batch, most = len(lengths), -(-max(lengths) // size)
    keys, values = (torch.randn(batch * most + 5, size, 2, n).to(dtype) for n in (dim, v_dim))
    table = torch.randperm(batch * most + 5)[: batch * most].reshape(batch, most).int()
    for b, length in enumerate(lengths):  # nothing behind a sequence's last key may be looked at
        keys[table[b].long()].flatten(0, 1)[length:] = torch.nan
        used = -(-length // size)
        table[b, used:] = -7
        for x in (keys, values):
            x[table[b, used - 1].long(), length - (used - 1) * size :] = torch.nan
    return torch.randn(batch, 8, q_len, dim).to(dtype), keys, values, table, torch.tensor(lengths)


@pytest.mark.parametrize("size", [5, 8, 16, 48, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_equal_one_cache(size, dtype):
    q, keys, values, table, lengths = paged(size, size, dtype)
    torch.manual_seed(1)
    chosen = torch.rand(3, 2, 1, 25) < 0.6
    blocks = Selection((Blocks.from_tiles(chosen, q_len=3, kv_len=400, q_block=16, kv_block=16),))
    for extra in ({}, {"window": 50, "softcap": 3.0, "sink": torch.randn(8)}, {"selection": blocks}):
        out, lse = functional.paged_attention(q, keys, values, table, lengths, return_lse=True, backend="native", **extra)
        exact = functional.paged_attention(
            q.double(), keys.double(), values.double(), table, lengths, return_lse=True, backend="reference", **extra
        )
        plain = functional.paged_attention(q, keys, values, table, lengths, return_lse=True, backend="reference", **extra)
        assert_close(out, exact[0], plain=plain[0], dtype=dtype)
        assert_close(lse, exact[1], plain=plain[1], dtype=dtype)


def test_pages_of_whole_panels_equal_a_contiguous_cache_to_the_bit():
    q, keys, values, table, lengths = paged(2, 32, torch.bfloat16)
    out = functional.paged_attention(q, keys, values, table, lengths, backend="native")
    for b, length in enumerate(lengths.tolist()):
        held = table[b, : -(-length // 32)].long()
        k, v = (x[held].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (keys, values))
        whole = Selection((Ranges(3, length, prefix=length),))
        assert_close(out[b : b + 1], attend(q[b : b + 1], k, v, whole, causal=True, backend="native")[0], dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_behind_the_last_key(dtype):
    s = Shape(1, 4, 2, 1, 213, 64, 64)
    q, k, v = gaussian(6, s, dtype)
    held = [before_a_guard(x) for x in (k, v)]
    whole = Selection((Ranges(1, 213, prefix=213),))
    out, _ = attend(q, *(x for x, _ in held), whole, backend="native")
    assert torch.equal(out, attend(q, k, v, whole, backend="native")[0])


def before_a_guard(x):
    """A copy of ``x`` that ends where the next page may not be read, and its memory."""
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + whole), page, 0) == 0
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=whole - size).view(x.shape)
    copy.copy_(x)
    return copy, memory


def test_bad_pages_are_refused():
    q, keys, values, table, lengths = paged(1, 16, torch.float32)
    for text, change in {
        "must name pages 0..": {"block_table": torch.full_like(table, 999)},
        "must be int32": {"block_table": table.long()},
        "must hold one number a sequence": {"lengths": torch.tensor([400, 2, 333])},
        "must hold 1..16 queries": {"query": torch.randn(3, 8, 17, 64)},
        "must share one floating dtype": {"query": q.half()},
        "that divides 6": {"query": torch.randn(3, 6, 1, 64)[..., :32]},
        "must be made for q_len": {"selection": some_blocks(Shape(3, 8, 2, 3, 64))},
    }.items():
        given = {"query": q, "key_cache": keys, "value_cache": values, "block_table": table, "lengths": lengths} | change
        with pytest.raises(ValueError, match=text):
            functional.paged_attention(**given)
