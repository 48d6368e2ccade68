"""Offset attention against the oracle: both plans, every level, forward, backward, decoding."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from sieve_attn import functional, native, patterns
from sieve_attn.attend import offset_op, offsets
from sieve_attn.attend.offsets import COSTS, GRADIENT_COSTS, Reach, choose_plan, reach
from sieve_attn.functional import offset_attention
from sieve_attn.patterns import GlobalTokens, MianChowla, OffsetPattern, Primes, RandomBlocks, Squares, Window
from sieve_attn.testing import assert_close, oracle

PRIMES = Primes() | Window(4) | GlobalTokens(2)
SHAPES = {  # q_heads, kv_heads, q_len, kv_len, dim, v_dim
    "square": (2, 2, 150, 150, 64, 64),
    "grouped": (4, 2, 70, 150, 64, 64),
    "odd dims": (2, 1, 67, 131, 20, 36),
    "wide": (1, 1, 40, 200, 128, 128),
    "narrow": (2, 1, 40, 90, 32, 32),
    "one step": (4, 1, 1, 300, 64, 64),
    "before the first key": (1, 1, 40, 9, 16, 16),
    "one key": (1, 1, 1, 1, 8, 8),
}
PATTERNS = {
    "primes": PRIMES,
    "squares": Squares() | Window(4) | GlobalTokens(2),
    "offsets alone": OffsetPattern((3, 40)),
    "window alone": Window(70),
    "first tokens": GlobalTokens(70) | Window(1),
    "mian-chowla": MianChowla() | Window(1),
}
LEVELS = native.module().levels() if not native.missing() else ["none"]


@pytest.fixture(params=LEVELS)
def level(request):
    if native.missing():
        yield "none"
        return
    native.module().force_level(request.param)
    yield request.param
    native.module().force_level("")


def inputs(shape, dtype=torch.float32, batch=2, seed=0):
    q_heads, kv_heads, q_len, kv_len, dim, v_dim = shape
    source = torch.Generator().manual_seed(seed)
    sizes = ((q_heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, v_dim))
    return [torch.randn(batch, *size, generator=source).to(dtype).requires_grad_() for size in sizes]


def compare(tensors, pattern, plan="auto", **options):
    """Output, lse and gradients (lse pulled as well) against the fp64 oracle, judged by plain code in the dtype."""
    q, k, v = tensors
    kept = torch.from_numpy(pattern.to_dense(q.shape[2], k.shape[2]))[None, None]
    source = torch.Generator().manual_seed(9)
    pull = torch.randn(*q.shape[:3], v.shape[3], generator=source)
    pull_lse = torch.randn(q.shape[:3], generator=source)

    def run(function, cast):
        given = [x.detach().to(cast).requires_grad_() for x in tensors]
        out, lse = function(*given)
        seen = torch.isfinite(lse)
        total = (out * pull.to(out.dtype)).sum() + torch.where(seen, lse * pull_lse.to(lse.dtype), 0.0).sum()
        return [out, lse, *torch.autograd.grad(total, given)]

    def truth(*given):
        return oracle.plain_attention(*given, kept, **options)

    exact, plain = run(truth, torch.float64), run(truth, q.dtype)
    got = run(lambda *x: offset_attention(*x, pattern, plan=plan, return_lse=True, **options), q.dtype)
    for what, a, b, c in zip(("output", "lse", "query", "key", "value"), got, exact, plain, strict=True):
        assert_close(a, b, plain=c, dtype=torch.float32 if what == "lse" and q.dtype == torch.float32 else q.dtype, what=what)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_oracle(level, shape, dtype):
    compare(inputs(SHAPES[shape], dtype), PRIMES)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("plan", ["diagonals", "wheel"])
def test_every_pattern_on_both_plans(level, pattern, plan):
    compare(inputs((2, 1, 333, 500, 32, 32), batch=1), PATTERNS[pattern], plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 400, 1030, 64, 64), (1, 1, 333, 333, 20, 36), (2, 2, 70, 31, 16, 16)])
def test_the_wheel_equals_the_oracle(level, dtype, shape):
    compare(inputs(shape, dtype, batch=1), PRIMES, "wheel")


@pytest.mark.parametrize("plan", ["diagonals", "wheel"])
def test_rows_of_several_tiles_add_up(plan):
    compare(inputs((1, 1, 1100, 1150, 16, 16), batch=1), PRIMES, plan)


def test_float64_runs_on_the_reference():
    compare(inputs(SHAPES["grouped"], torch.float64), PRIMES, scale=0.3)


def test_scale_and_strides(level):
    q, k, v = inputs(SHAPES["grouped"])
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    every_other = [torch.stack([x.detach(), x.detach()], -1)[..., 0].requires_grad_() for x in (q, k, v)]
    for tensors in (turned, every_other):
        compare(tensors, PRIMES, scale=0.7)


@pytest.mark.parametrize("plan", ["diagonals", "wheel"])
def test_one_row_expanded_over_all_positions_is_what_its_copies_are(level, plan):
    q, k, v = inputs(SHAPES["grouped"])
    one = [x.detach()[:, :, :1].expand_as(x).requires_grad_() for x in (k, v)]
    for tensors in ((q, one[0], v), (q, k, one[1]), (q, *one)):
        compare(tensors, PRIMES, plan)


def test_gradients_of_the_reference_are_right():
    given = [x.double() for x in inputs((2, 1, 7, 9, 4, 4), batch=1)]
    given = [x.detach().requires_grad_() for x in given]
    for compat in (False, True):
        assert torch.autograd.gradcheck(lambda *x, c=compat: offset_attention(*x, PRIMES, upstream_compat=c), given)


def test_the_operator_keeps_its_contract():
    for dtype in (torch.float32, torch.float64):
        tensors = inputs((2, 1, 9, 12, 4, 4), dtype)
        torch.library.opcheck(offset_op.offset_op, (*tensors, repr(PRIMES), 0.5, "auto"))


@pytest.mark.parametrize("plan", ["diagonals", "wheel"])
def test_steps_equal_the_prefill(level, plan):
    q, k, v = (x.detach() for x in inputs((4, 2, 120, 120, 32, 32)))
    whole, lse = offset_attention(q, k, v, PRIMES, plan=plan, return_lse=True)
    for n in (1, 2, 3, 64, 119, 120):
        out, one = offset_attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], PRIMES, return_lse=True)
        assert_close(out, whole[:, :, n - 1 : n], dtype=torch.float32)
        assert_close(one, lse[:, :, n - 1 : n], dtype=torch.float32)
    chunk = offset_attention(q[:, :, 50:], k, v, PRIMES, plan=plan)
    assert_close(chunk, whole[:, :, 50:], dtype=torch.float32)


@pytest.mark.parametrize("plan", ["diagonals", "wheel"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_kept_is_not_read(level, plan, poison, dtype):
    """Keys and values after a query, and those that its pattern passes over, change nothing, not even as NaN."""
    tensors = [x.detach() for x in inputs((2, 1, 200, 200, 32, 32), dtype, batch=1)]
    clean = offset_attention(*tensors, PRIMES, plan=plan, return_lse=True)
    kept = torch.from_numpy(PRIMES.to_dense(200))
    bad = [3, 50, 51, 130, 199]
    q, k, v = (x.clone() for x in tensors)
    k[:, :, bad] = poison
    v[:, :, bad] = poison
    hit = kept[:, bad].any(1)
    assert hit.any()
    assert not hit.all()
    for a, b in zip(offset_attention(q, k, v, PRIMES, plan=plan, return_lse=True), clean, strict=True):
        # rounding may fall otherwise where tiles of a row hold other rows' poison, but not by more
        assert_close(a[:, :, ~hit], b[:, :, ~hit], dtype=dtype)


@pytest.mark.parametrize("plan", ["diagonals", "wheel"])
def test_dropped_pairs_get_exactly_zero_gradient(level, plan):
    q, k, v = inputs((1, 1, 100, 100, 16, 16), batch=1)
    row = 90
    out = offset_attention(q, k, v, PRIMES, plan=plan)
    dk, dv = torch.autograd.grad(out[:, :, row].sum(), (k, v))
    kept = torch.from_numpy(PRIMES.to_dense(100))[row]
    assert (dk[0, 0, ~kept] == 0).all()
    assert (dv[0, 0, ~kept] == 0).all()
    assert (dv[0, 0, kept] != 0).any(-1).all()


@pytest.mark.parametrize("plan", ["diagonals", "wheel"])
def test_is_deterministic_to_the_bit_on_any_number_of_threads(level, plan):
    tensors = inputs((4, 2, 300, 300, 32, 32))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            out, lse = offset_attention(*tensors, PRIMES, plan=plan, return_lse=True)
            results.append([out, lse, *torch.autograd.grad(out.square().sum(), tensors)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("plan", ["diagonals", "wheel"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_gradients_read_only_what_is_kept(level, plan, poison):
    """Non-finite keys and values leave the gradients of the queries that pass over them, and of every key that these keep."""
    q, k, v = inputs((2, 1, 200, 200, 32, 32), batch=1)
    kept = torch.from_numpy(PRIMES.to_dense(200))
    bad = [50, 51, 130]
    rows = ~kept[:, bad].any(1)
    pull = torch.randn(1, 2, 200, 32, generator=torch.Generator().manual_seed(4)) * rows[:, None]
    clean = torch.autograd.grad((offset_attention(q, k, v, PRIMES, plan=plan) * pull).sum(), (q, k, v))
    dirty = [x.detach().clone() for x in (q, k, v)]
    for x in dirty[1:]:
        x[:, :, bad] = poison
    given = [x.requires_grad_() for x in dirty]
    out = offset_attention(*given, PRIMES, plan=plan)
    got = torch.autograd.grad((out[:, :, rows] * pull[:, :, rows]).sum(), given)
    assert_close(got[0][:, :, rows], clean[0][:, :, rows], dtype=torch.float32)
    unread = [j for j in range(200) if not (kept[:, j] & ~rows).any()]
    for a, b in zip(got[1:], clean[1:], strict=True):
        assert_close(a[:, :, unread], b[:, :, unread], dtype=torch.float32)


def test_weights_are_those_of_the_kept_keys_alone():
    q, k, v = (x.detach() for x in inputs(SHAPES["grouped"]))
    out, sparse = offset_attention(q, k, v, PRIMES, return_attention=True)
    kept = torch.from_numpy(PRIMES.to_dense(70, 150))
    assert torch.equal((sparse.index >= 0).sum(1), kept.sum(1))
    for row in (0, 5, 69):
        index = sparse.index[row]
        assert torch.equal(index[index >= 0], kept[row].nonzero()[:, 0])
    dense = sparse.to_dense(150)
    assert_close(dense.sum(-1), torch.ones(2, 4, 70), dtype=torch.float32)
    assert_close(dense @ v.repeat_interleave(2, 1), out, dtype=torch.float32)


@pytest.mark.parametrize(("q_len", "kv_len"), [(30, 30), (6, 30), (1, 4), (3, 3), (1, 30)])
def test_upstream_compat_counts_global_tokens_in_the_window_twice(q_len, kv_len):
    """The loops of the Julia kernel, with 1-based positions: globals before the query, then the window with the query itself,
    then offsets that neither of the two covers."""
    window, global_tokens = 3, 2
    q, k, v = (x.detach().double() for x in inputs((2, 1, q_len, kv_len, 8, 8)))
    out, lse, sparse = offset_attention(q, k, v, PRIMES, upstream_compat=True, return_lse=True, return_attention=True)
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
    for row in range(q_len):
        i = kv_len - q_len + row + 1
        listed = [g for g in range(1, global_tokens + 1) if g < i] + list(range(max(1, i - window), i + 1))
        listed += [i - int(p) for p in Primes().up_to(i) if i - p >= 1 and global_tokens < i - p < i - window]
        index = torch.tensor(listed) - 1
        weight = torch.exp(logits[:, :, row, index])
        wanted = (weight[..., None] * v.repeat_interleave(2, 1)[:, :, index]).sum(2) / weight.sum(-1)[..., None]
        assert_close(out[:, :, row], wanted)
        assert_close(lse[:, :, row], weight.sum(-1).log())
    assert_close(sparse.weight.sum(-1), torch.ones(2, 2, q_len).double())


def test_patterns_of_blocks_go_to_attend():
    pattern = RandomBlocks(2, 16, window=2, global_blocks=1)
    q, k, v = inputs((2, 1, 100, 100, 16, 16))
    out, lse = offset_attention(q, k, v, pattern, return_lse=True)
    exact, total = oracle.plain_attention(q, k, v, torch.from_numpy(pattern.to_dense(100))[None, None])
    assert_close(out, exact, dtype=torch.float32)
    assert_close(lse, total, dtype=torch.float32)
    out.sum().backward()
    assert torch.isfinite(k.grad).all()


def test_the_plan_follows_cost_and_is_reported():
    primes, squares = (reach(p | Window(4), 16_384) for p in (Primes(), Squares()))
    assert choose_plan("auto", primes, 16_384, 16_384, "bfloat16", "amx").name == "wheel"
    assert choose_plan("auto", squares, 16_384, 16_384, "bfloat16", "amx").name == "diagonals"
    assert choose_plan("auto", primes, 1, 16_384, "bfloat16", "amx").name == "diagonals"
    for gradient in (False, True):
        # on a GPU tiles are cheaper still
        made = choose_plan("auto", primes, 16_384, 16_384, "bfloat16", "cuda", gradient=gradient)
        assert (made.name, made.modulus, len(made.residues) >= 8) == ("wheel", 30, True)
        assert choose_plan("auto", primes, 64, 16_384, "bfloat16", "cuda", gradient=gradient).name == "diagonals"
    # where 512 bits take two turns, tiles pay off for bf16 alone, whose products are twice as fast
    for gradient, dtype, name in ((False, "float32", "diagonals"), (False, "bfloat16", "wheel"), (True, "bfloat16", "diagonals")):
        assert choose_plan("auto", primes, 16_384, 16_384, dtype, "vnni-halved", gradient=gradient).name == name
    assert native.pace() in {*COSTS} - {"cuda"}
    assert COSTS.keys() == GRADIENT_COSTS.keys()
    even = reach(patterns.Dilated(8_000, 2), 16_384)
    for gradient in (False, True):
        dense = choose_plan("auto", even, 16_384, 16_384, "float32", "avx512", gradient=gradient)
        assert (dense.name, dense.residues) == ("wheel", tuple(range(0, 30, 2)))
        assert choose_plan("auto", squares, 16_384, 16_384, "float32", "avx512", gradient=gradient).name == "diagonals"
    wheel = choose_plan("wheel", primes, 16_384, 16_384, "float32", "avx512")
    assert (wheel.name, wheel.modulus) == ("wheel", 30)
    assert {1, 7, 11, 13, 17, 19, 23, 29} <= set(wheel.residues)
    made = choose_plan("auto", primes, 16_384, 16_384, "bfloat16", "amx")
    assert set(made.residues) == {1, 7, 11, 13, 17, 19, 23, 29}
    q, k, v = inputs((1, 1, 64, 64, 16, 16))
    _, report = offset_attention(q, k, v, PRIMES, plan="wheel", return_report=True)
    assert report.density == pytest.approx(PRIMES.density(64))
    assert report.pairs == PRIMES.to_dense(64).sum()
    if not native.missing():
        assert (report.backend, report.plan, report.gradient_plan) == ("native", "wheel", f"wheel {report.modulus}")
        assert list(report.estimates) == ["diagonals", "wheel 30", "wheel 240"]
        assert all(cost >= 0 for cost in report.estimates.values())


def test_a_window_is_one_list_of_offsets():
    found = reach(Window(3) | Primes() | GlobalTokens(1) | Window(2) | GlobalTokens(4), 16)
    assert (found.prefix, found.offsets.tolist()[:7]) == (4, [0, 1, 2, 3, 5, 7, 11])
    assert isinstance(found, Reach)
    assert reach(RandomBlocks(1) | Window(2), 16) is None


def test_kernels_refuse_offsets_that_do_not_increase():
    if native.missing():
        pytest.skip("pure-Python installation")
    q, k, v = (x.detach() for x in inputs((1, 1, 8, 8, 16, 16)))
    for wrong in ([2, 1], [-1, 3], [1, 1]):
        with pytest.raises(ValueError, match="`offsets` must increase"):
            offsets.forward(q, k, v, torch.tensor(wrong), 0, 0.5, offsets.Plan("diagonals"))


def test_bad_input_is_refused_in_words():
    q, k, v = (x.detach() for x in inputs((2, 1, 5, 5, 8, 8)))
    cases = [
        (lambda: offset_attention(q, k, v, "primes"), TypeError, ("`pattern`", "'primes'", "Window(4)")),
        (lambda: offset_attention(q[0], k, v, PRIMES), ValueError, ("`query`", "4 axes")),
        (lambda: offset_attention(q, k, v, PRIMES, scale=-1.0), ValueError, ("`scale`", "-1.0")),
        (lambda: offset_attention(q, k, v, PRIMES, plan="fast"), ValueError, ("`plan`", "'fast'", "'auto'")),
        (lambda: offset_attention(q, k.half(), v, PRIMES), ValueError, ("one dtype",)),
        (
            lambda: offset_attention(q, k, v, RandomBlocks(1), upstream_compat=True),
            ValueError,
            ("`upstream_compat`", "RandomBlocks", "leave it out"),
        ),
    ]
    for call, kind, words in cases:
        with pytest.raises(kind) as caught:
            call()
        for word in words:
            assert word in str(caught.value)
    with pytest.raises(AttributeError, match=r"offers .*offset_attention"):
        functional.nonsense  # noqa: B018


PROGRAM = """
import resource, torch
from sieve_attn import patterns
from sieve_attn.functional import offset_attention
torch.set_num_threads(1)
n = 16384
q, k, v = (torch.randn(1, 1, n, 32, requires_grad=True) for _ in range(3))
pattern = patterns.Squares() | patterns.Window(4) | patterns.GlobalTokens(2)
offset_attention(*(x[:, :, :64] for x in (q, k, v)), pattern).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for plan in ("diagonals", "wheel"):
    offset_attention(q, k, v, pattern, plan=plan).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
"""


@pytest.mark.skipif(bool(native.missing()), reason="pure-Python installation")
def test_memory_is_linear_in_the_length():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # inputs take 2 MB each; one array of queries x keys would take 1,024, of queries x offsets x channels 270
    assert float(done.stdout) < 60


def test_offsets_of_the_reference_are_the_pattern():
    found = reach(PRIMES, 40)
    dense = offsets.selection_of(found, 30, 40).to_dense(np.zeros(1))[0, 0]
    assert np.array_equal(dense & np.tri(40, dtype=bool)[-30:], PRIMES.to_dense(30, 40))
    assert isinstance(PRIMES, patterns.Union)
