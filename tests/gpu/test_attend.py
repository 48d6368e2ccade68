"""The whole contract on a CUDA device, bf16 included, and what only a device can show: graphs, compilation, larger shapes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import attend, attention, policies
from sieve_attn.functional import paged_attention
from sieve_attn.testing import BackendContract, assert_close
from sieve_attn.testing.strategies import Shape, gaussian, random_blocks
from sieve_attn.types import Blocks, Ranges, Selection

HALVES = (torch.float16, torch.bfloat16)


def on_device(x):
    if isinstance(x, torch.Tensor):
        return x.cuda()
    if isinstance(x, Selection):
        return Selection(tuple(on_device(part) for part in x.parts))
    if isinstance(x, Blocks):
        return replace(x, **{n: on_device(getattr(x, n)) for n in ("row_ptr", "block_index", "row_mask")})
    return x


class TestTriton(BackendContract):
    backend = "triton"
    dtypes = (*HALVES, torch.float32)

    def run(self, q, k, v, selection, **options):
        moved = {name: on_device(x) for name, x in options.items()}
        made = super().run(q.cuda(), k.cuda(), v.cuda(), on_device(selection), **moved)
        return tuple(x.cpu() for x in made)


class TestTritonStrided(TestTriton):
    """The same with channels far apart and rows in another order of memory."""

    def run(self, q, k, v, selection, **options):
        far = [torch.stack([x, x], -1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        return super().run(*far, selection, **options)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 700), st.integers(1, 8), st.integers(1, 200), st.sampled_from((4, 16, 48, 64, 128)),
    st.sampled_from((16, 40, 64, 128, 192, 256)), st.sampled_from((*HALVES, torch.float32)), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_shape(q_len, kv_len, group, q_block, kv_block, dim, dtype, causal, per_query):
    shape = Shape(1, 2 * group, 2, q_len, kv_len, dim, dim)
    blocks = random_blocks(kv_len, shape, q_block=q_block, kv_block=kv_block, causal=causal, per_query=per_query)
    TestTriton().compare(gaussian(7, shape, dtype), blocks, {"causal": causal})


def a_call(dtype=torch.bfloat16, q_len=1024, kv_len=1024, kv_block=16):
    shape = Shape(1, 8, 2, q_len, kv_len, 128, 128)
    selection = random_blocks(1, shape, causal=True, q_block=64, kv_block=kv_block, density=0.2)
    return [x.cuda() for x in gaussian(1, shape, dtype)], on_device(selection)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("kv_block", [16, 64, 128])
def test_every_run_gives_the_same_bits_and_writes_every_number(dtype, kv_block, monkeypatch):
    inputs, selection = a_call(dtype, kv_block=kv_block)
    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    found = []
    for _ in range(3):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, lse = attend(*leaves, selection, causal=True, backend="triton")
        found.append([out.detach(), lse.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert all(torch.isfinite(x[x != -torch.inf]).all() for x in found[0])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("q_len", [1, 5, 1024])
def test_a_call_can_be_captured(q_len):
    inputs, selection = a_call(q_len=q_len)
    expected = attend(*inputs, selection, causal=True, backend="triton")  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(*inputs, selection, causal=True, backend="triton")
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_a_step_over_pages_can_be_captured():
    source = torch.Generator().manual_seed(0)
    query = torch.randn(3, 8, 1, 128, generator=source).cuda().bfloat16()
    caches = [torch.randn(64, 16, 2, 128, generator=source).cuda().bfloat16() for _ in range(2)]
    table = torch.randperm(64, generator=source)[:60].reshape(3, 20).to(torch.int32)
    lengths = torch.tensor([5, 320, 161])
    exact = paged_attention(query.cpu().double(), *(c.cpu().double() for c in caches), table, lengths, backend="reference")
    plain = paged_attention(query.cpu(), *(c.cpu() for c in caches), table, lengths, backend="reference")
    table, lengths = table.cuda(), lengths.cuda()
    paged_attention(query, *caches, table, lengths, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(query, *caches, table, lengths, backend="triton")
    graph.replay()
    assert_close(out.cpu(), exact, plain=plain, dtype=torch.bfloat16)


def test_nothing_waits_for_the_device():
    inputs, selection = a_call()
    leaves = [x.requires_grad_() for x in inputs]
    pull = torch.ones_like(inputs[0])
    torch.autograd.grad(attend(*leaves, selection, causal=True, backend="triton")[0], leaves, pull)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(attend(*leaves, selection, causal=True, backend="triton")[0], leaves, pull)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_call_is_one_graph():
    (q, k, v), _ = a_call()
    run = torch.compile(lambda *x: attention(*x, policies.TopBlocks(16), causal=True, backend="triton"), fullgraph=True)
    assert torch.equal(run(q, k, v), attention(q, k, v, policies.TopBlocks(16), causal=True, backend="triton"))


def test_auto_takes_these_kernels():
    (q, k, v), _ = a_call()
    _, report = attention(q, k, v, causal=True, return_report=True)
    assert report.backend == "triton"


@pytest.mark.parametrize("kind", [{"prefix": 64, "window": 300}, {"prefix": 5000}, {"window": 512}])
def test_long_ranges(kind):
    q, k, v = gaussian(1, Shape(1, 2, 1, 700, 5000, 64, 64), torch.bfloat16)
    selection = Selection((Ranges(700, 5000, **kind),))
    exact = attend(q.double(), k.double(), v.double(), selection, causal=True, backend="reference")[0]
    plain = BackendContract().plain(q, k, v, selection, causal=True)[0]
    out = attend(q.cuda(), k.cuda(), v.cuda(), selection, causal=True, backend="triton")[0]
    assert_close(out.cpu(), exact, plain=plain, dtype=torch.bfloat16)
