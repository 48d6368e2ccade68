"""The whole contract on a CUDA device, bf16 included, and what only a device can show: graphs, compilation, larger shapes."""

import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sieve_attn import attend, attention, geometry, policies
from sieve_attn.certify import true_dropped_mass
from sieve_attn.functional import offset_attention, paged_attention
from sieve_attn.patterns import GlobalTokens, Primes, Sinks, Window
from sieve_attn.scores import Euclidean, Mean
from sieve_attn.selection import RunningMaximum, TargetSparsity
from sieve_attn.testing import BackendContract, assert_close
from sieve_attn.testing.oracle import plain_attention
from sieve_attn.testing.strategies import Shape, gaussian, random_blocks
from sieve_attn.types import Blocks, Call, Ranges, Selection

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


@pytest.mark.parametrize("seed", range(32))
def test_any_shape(seed):
    """One shape a test, since each compiles kernels of its own: so workers share them out."""
    source = random.Random(seed)
    q_len, kv_len, group, q_block = (source.randint(1, most) for most in (300, 700, 8, 200))
    kv_block, dim = source.choice((4, 16, 48, 64, 128)), source.choice((16, 40, 64, 128, 192, 256))
    dtype, causal, per_query = source.choice((*HALVES, torch.float32)), source.random() < 0.5, source.random() < 0.5
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


POLICIES = (
    policies.TopBlocks(16), policies.Adaptive(0.9), policies.Policy(Mean(), TargetSparsity(0.9), block_size=64),
    policies.Policy(Euclidean(), RunningMaximum(4.0), Sinks(16) | Window(64), query_tile=8),
)  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_decoding_step_can_be_captured_gate_and_all(policy):
    (q, k, v), _ = a_call(q_len=1, kv_len=4096)
    held = geometry.build(k, policy.block_size, policy.statistics)
    options = {"causal": True, "backend": "triton", "geometry": held}
    attention(q, k, v, policy, **options)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, policy, **options)
    for step in range(2):
        q.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(step)))
        graph.replay()
        assert torch.equal(out, attention(q, k, v, policy, **options))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_prefill_can_be_captured_geometry_and_gate_included(policy):
    (q, k, v), _ = a_call()
    expected = attention(q, k, v, policy, causal=True, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, policy, causal=True, backend="triton")
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("policy", [*POLICIES, policies.Certified(0.05)], ids=repr)
def test_choosing_and_attending_wait_for_nothing(policy):
    (q, k, v), _ = a_call()
    held = geometry.build(k, policy.block_size, policy.statistics)
    attention(q, k, v, policy, causal=True, backend="triton", geometry=held)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(q, k, v, policy, causal=True, backend="triton", geometry=held)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", [*POLICIES, policies.Certified(0.05)], ids=repr)
def test_a_certificate_on_the_device_holds(policy):
    (q, k, v), _ = a_call(kv_len=2048)
    _, report = attention(q, k, v, policy, causal=True, backend="triton", return_report=True)
    call = Call(q.cpu().double(), k.cpu().double(), v.cpu().double(), causal=True, scale=128**-0.5)
    moved = Selection(tuple(replace(p.listed, row_ptr=p.row_ptr.cpu(), block_index=p.listed.block_index.cpu())
                            for p in report.selection.parts))  # fmt: skip
    assert (report.certificate.dropped_mass.cpu().double() >= true_dropped_mass(call, moved)).all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("plan", ["diagonals", "wheel", "auto"])
def test_offsets_forward_and_backward(dtype, plan):
    pattern = Primes() | Window(4) | GlobalTokens(2)
    inputs = gaussian(1, Shape(1, 2, 1, 1500, 1500, 64, 64), dtype)
    kept = torch.from_numpy(pattern.to_dense(1500))[None, None]

    def run(cast, device, call):
        leaves = [x.to(device, cast).requires_grad_() for x in inputs]
        out = call(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    exact, plain = (run(cast, "cpu", lambda *x: plain_attention(*x, kept)[0]) for cast in (torch.float64, dtype))
    got = run(dtype, "cuda", lambda *x: offset_attention(*x, pattern, plan=plan))
    for a, b, c in zip(got, exact, plain, strict=True):
        assert_close(a.cpu(), b, plain=c, dtype=dtype)
    _, report = offset_attention(*(x.cuda() for x in inputs), pattern, plan=plan, return_report=True)
    assert report.backend == "triton"
    assert report.plan == ("wheel" if plan == "auto" else plan)


FIRST = """
import time, torch
from sieve_attn import attention, policies
q, k, v = (torch.randn(1, heads, 4096, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
torch.cuda.synchronize()
start = time.perf_counter()
attention(q, k, v, policies.TopBlocks(16), causal=True, backend="triton")
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


@pytest.mark.alone
def test_the_first_call_takes_less_than_ten_seconds(tmp_path):
    """In a process of its own, with nothing compiled before: geometry, gate and attention."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 10.0


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
    for policy in (policies.TopBlocks(16), None):
        run = torch.compile(lambda *x, p=policy: attention(*x, p, causal=True, backend="triton"), fullgraph=True)
        assert torch.equal(run(q, k, v), attention(q, k, v, policy, causal=True, backend="triton"))


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
