"""Exact top-k attention: the chosen keys are the best, ties go to the earlier one, and nothing else depends on how."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import attend, native
from sieve_attn.functional import top_k_attention
from sieve_attn.testing import Shape, assert_close, oracle
from sieve_attn.testing.contracts import SEEN_OPTIONS, coins, draw
from sieve_attn.testing.strategies import GENERATORS, gaussian, seeds, shapes
from sieve_attn.types import call as call_module

LAWS = settings(max_examples=30, deadline=None, derandomize=True)
LEVELS = [] if native.missing() else native.module().levels()
BACKENDS = ["reference", *(f"native {level}" for level in LEVELS)]
LONG = Shape(1, 2, 1, 150, 400, 24, 20)  # enough queries and keys for blocks to be bounded

CASES = {
    "plain": (LONG, {}),
    "causal": (LONG, {"causal": True}),
    "square": (Shape(2, 4, 2, 193, 193, 16, 16), {"causal": True}),
    "one query": (Shape(2, 4, 2, 1, 333, 16, 40), {"causal": True}),
    "more queries than keys": (Shape(1, 2, 1, 90, 37, 16, 8), {"causal": True}),
    "window": (LONG, {"causal": True, "window": 33}),
    "window, both ways": (LONG, {"window": 33}),
    "key_mask": (LONG, {"key_mask": coins(2, 0.7, 1, 400)}),
    "mask": (LONG, {"mask": coins(3, 0.5, 1, 2, 150, 400), "causal": True}),
    "packed": (Shape(1, 2, 2, 300, 300, 16, 16), {"cu_seqlens": torch.tensor([0, 5, 130, 300]), "causal": True}),
    "softcap": (LONG, {"softcap": 2.0, "causal": True}),
    "sink": (LONG, {"sink": draw(5, 2).float(), "causal": True}),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    name, _, level = request.param.partition(" ")
    if level:
        native.module().force_level(level)
    yield name
    if level:
        native.module().force_level("")


def chosen(report):
    return report.selection.parts[0].index


def check(q, k, v, top_k, backend, steep=False, **options):
    """Everything that the result promises, against fp64 logits; swaps within the rounding of fp32 products are allowed."""
    out, lse, report = top_k_attention(q, k, v, top_k, backend=backend, return_lse=True, return_report=True, **options)
    index = chosen(report)
    seen = oracle.visible_keys(q.shape[2], k.shape[2], **{n: options[n] for n in SEEN_OPTIONS if n in options})
    seen = seen.expand(q.shape[0], q.shape[1], -1, -1)
    count = seen.sum(-1)
    assert torch.equal((index >= 0).sum(-1), count.clamp(max=top_k))
    kept = report.selection.to_dense(q)
    assert torch.equal(kept.sum(-1), count.clamp(max=top_k)), "a key is listed twice"
    assert not (kept & ~seen).any()
    exact = oracle.plain_logits(q.double(), k.double(), seen, scale=options.get("scale"))
    worst = exact.masked_fill(~kept, torch.inf).amin(-1)
    best = exact.masked_fill(kept, -torch.inf).amax(-1)
    group = q.shape[1] // k.shape[1]
    size = q.double().norm(dim=-1) * k.double().norm(dim=-1).amax(-1).repeat_interleave(group, 1)[..., None]
    scale = options.get("scale") or q.shape[3] ** -0.5
    margin = 2.0 * (q.shape[3] + 8) * torch.finfo(torch.float32).eps * size * scale
    assert (best <= worst + margin).all()
    rest = {n: options[n] for n in ("softcap", "scale") if n in options}
    sink = options.get("sink")
    exact_out, exact_lse = oracle.plain_attention(q.double(), k.double(), v.double(), seen & kept, **rest,
                                                  sink=None if sink is None else sink.double())  # fmt: skip
    plain, plain_lse = oracle.plain_attention(q, k, v, seen & kept, **rest, sink=None if sink is None else sink.to(q.dtype))
    if steep:  # logits of thousands: their own rounding is what outputs differ by
        assert ((out - exact_out).abs().amax(-1) <= 2 * margin.amax(-1, keepdim=True) * v.abs().max()).all()
    else:
        assert_close(out, exact_out, plain=plain, dtype=q.dtype)
        assert_close(lse, exact_lse, plain=plain_lse, dtype=torch.float32)
    assert report.visible.sum() == count.sum()
    assert report.kept.sum() == count.clamp(max=top_k).sum()
    assert (report.computed <= report.visible).all()
    assert (report.computed >= report.kept).all()
    return report


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kept_keys_are_the_best(name, dtype, backend):
    shape, options = CASES[name]
    q, k, v = gaussian(7, shape, dtype)
    for top_k in (1, 8, 70):
        check(q, k, v, top_k, backend, **options)


@LAWS
@given(shapes(90), seeds(), st.integers(1, 20), st.booleans(), st.sampled_from(sorted(GENERATORS)))
def test_any_shape_and_any_keys(shape, seed, top_k, causal, keys):
    q, k, v = GENERATORS[keys](seed, shape)
    if not torch.isfinite(k).all() or not torch.isfinite(v).all():
        return
    for name in ("reference",) if native.missing() else ("reference", "native"):
        check(q, k, v, top_k, name, steep=keys == "huge_norms", causal=causal)


@pytest.mark.parametrize("keys", ["clustered", "outlier_channels", "huge_norms", "decaying_spectrum", "bf16_rounded"])
@pytest.mark.parametrize("causal", [True, False])
def test_long_inputs_of_every_kind(keys, causal, backend):
    q, k, v = GENERATORS[keys](3, Shape(1, 2, 1, 130, 900, 16, 16))
    check(q, k, v, 8, backend, steep=keys == "huge_norms", causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_equal_logits_keep_the_earliest(causal, backend):
    q, k, v = gaussian(1, LONG)
    count = torch.arange(LONG.kv_len - LONG.q_len + 1, LONG.kv_len + 1) if causal else torch.full((LONG.q_len,), LONG.kv_len)
    _, report = top_k_attention(q, torch.zeros_like(k), v, 9, causal=causal, backend=backend, return_report=True)
    assert (count >= 9).all()
    assert torch.equal(chosen(report), torch.arange(9, dtype=torch.int32).expand(1, 2, LONG.q_len, 9))
    # three different keys in turn: the best of them, from the front
    few = k[:, :, :3].repeat(1, 1, 134, 1)[:, :, : LONG.kv_len]
    _, report = top_k_attention(q, few, v, 9, causal=causal, backend=backend, return_report=True)
    logits = q @ k[:, :, :3].transpose(-1, -2)
    best = logits.argmax(-1, keepdim=True)
    assert torch.equal(chosen(report), (best + 3 * torch.arange(9)).int())


def test_blocks_are_pruned_and_the_choice_does_not_change():
    if native.missing():
        pytest.skip("pure-Python installation")
    source = torch.Generator().manual_seed(1)
    centre = torch.randn(32, 1, 16, generator=source)
    k = (centre + 0.05 * torch.randn(32, 64, 16, generator=source)).reshape(1, 1, 2048, 16)
    q, v = torch.randn(1, 1, 2048, 16, generator=source), torch.randn(1, 1, 2048, 8, generator=source)
    out, report = top_k_attention(q, k, v, 8, causal=True, backend="native", return_report=True)
    _, plain = top_k_attention(q, k, v, 8, causal=True, backend="reference", return_report=True)
    assert report.computed.sum() < 0.4 * report.visible.sum()
    assert torch.equal(plain.computed, plain.visible)
    assert torch.equal(plain.visible, report.visible)
    differ = (chosen(report) != chosen(plain)).any(-1)
    assert differ.float().mean() < 0.01
    check(q, k, v, 8, "native", causal=True)
    # one query at a time nothing is bounded: the same bits
    for i in (5, 700, 2047):
        alone = top_k_attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], 8, causal=True, backend="native")
        assert torch.equal(alone[0, 0, 0], out[0, 0, i])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_keys_that_are_not_finite_show(poison, backend):
    q, k, v = gaussian(1, LONG)
    k[0, 0, 130, 3] = poison
    out = top_k_attention(q, k, v, 4, causal=True, backend=backend)
    rest = torch.arange(400) != 130
    seen = oracle.visible_keys(150, 400, causal=True)[..., rest]
    clean = top_k_attention(q, k[:, :, rest], v[:, :, rest], 4, mask=seen, backend=backend)
    sees = torch.ones(1, 2, 150, dtype=torch.bool) if torch.tensor(poison).isnan() else (q[..., 3] * poison) > 0
    assert out[sees].isnan().all()
    assert_close(out[~sees], clean[~sees], dtype=torch.float32)


def test_a_query_that_sees_nothing_gives_zeros(backend):
    q, k, v = gaussian(1, Shape(1, 2, 1, 70, 200, 8, 8))
    mask = coins(1, 0.5, 1, 1, 70, 200)
    mask[:, :, 11] = False
    out, lse = top_k_attention(q, k, v, 3, mask=mask, backend=backend, return_lse=True)
    assert (out[:, :, 11] == 0).all()
    assert (lse[:, :, 11] == -torch.inf).all()
    assert torch.isfinite(lse[:, :, :11]).all()


def test_the_future_changes_nothing(backend):
    q, k, v = gaussian(1, Shape(1, 2, 1, 300, 300, 16, 16))
    first = top_k_attention(q, k, v, 5, causal=True, backend=backend)
    k[:, :, 170:], v[:, :, 170:] = 100.0, torch.nan
    second = top_k_attention(q, k, v, 5, causal=True, backend=backend)
    assert torch.equal(first[:, :, :170], second[:, :, :170])


def test_threads_do_not_change_the_bits(backend):
    q, k, v = (x.requires_grad_() for x in gaussian(1, Shape(2, 4, 2, 150, 300, 16, 16)))

    def everything():
        out, lse, report = top_k_attention(q, k, v, 8, causal=True, backend=backend, return_lse=True, return_report=True)
        return (out, lse, chosen(report), report.computed, *torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)))

    one = everything()
    torch.set_num_threads(3)
    try:
        if backend == "native":
            assert all(torch.equal(a, b) for a, b in zip(one, everything(), strict=True))
    finally:
        torch.set_num_threads(1)


def test_a_long_cache_is_shared_out_and_nothing_changes(backend):
    torch.manual_seed(1)
    # every key twice, half of the cache apart: the earlier of both is in another thread's share
    half = torch.randn(1, 2, 9000, 16)
    k, v, q = torch.cat([half, half], 2), torch.randn(1, 2, 18000, 16), torch.randn(1, 4, 3, 16)
    want = top_k_attention(q, k, v, 7, causal=True, backend="reference", return_report=True)
    torch.set_num_threads(3)
    try:
        got = top_k_attention(q, k, v, 7, causal=True, backend=backend, return_report=True)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(chosen(got[1]), chosen(want[1]))
    assert_close(got[0], want[0].double(), dtype=torch.float32)


@pytest.mark.parametrize("name", ["causal", "one query", "key_mask", "softcap", "sink"])
def test_gradients_are_those_of_attention_over_the_chosen_keys(name, backend):
    shape, options = CASES[name]
    leaves = [x.requires_grad_() for x in gaussian(3, shape)]
    if "sink" in options:
        leaves.append(options["sink"].clone().requires_grad_())

    def gradients(function, dtype):
        given = [x.detach().to(dtype).requires_grad_() for x in leaves]
        rest = options | ({"sink": given[3]} if "sink" in options else {})
        out, lse = function(given[:3], rest)
        return torch.autograd.grad((out * draw(5, *out.shape).to(dtype)).sum() + lse.sum(), given)

    _, report = top_k_attention(*leaves[:3], 6, backend=backend, return_report=True, **options)
    got = gradients(lambda x, rest: top_k_attention(*x, 6, backend=backend, return_lse=True, **rest), torch.float32)
    plain = gradients(lambda x, rest: attend(*x, report.selection, backend="reference", **rest), torch.float32)
    exact = gradients(lambda x, rest: attend(*x, report.selection, backend="reference", **rest), torch.float64)
    for a, b, c in zip(got, exact, plain, strict=True):
        assert_close(a, b, plain=c, dtype=torch.float32)


def test_the_operator_passes_opcheck_and_compiles():
    q, k, v = (x.requires_grad_() for x in gaussian(3, Shape(1, 2, 1, 20, 40, 8, 8)))
    arguments = (q, k, v, None, coins(1, 0.8, 1, 40), None, None, True, 0.3, 2.0, None, 5, "auto")
    from sieve_attn.attend import top_k_op

    assert top_k_op.top_k_op is not None
    torch.library.opcheck(torch.ops.sieve_attn.top_k_attention.default, arguments)
    run = torch.compile(lambda q, k, v: top_k_attention(q, k, v, 5, causal=True), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(q, k, v), top_k_attention(q, k, v, 5, causal=True))


def test_gradcheck_in_fp64():
    q, k, v = (x.requires_grad_() for x in gaussian(3, Shape(1, 2, 1, 5, 9, 3, 2), torch.float64))
    assert torch.autograd.gradcheck(lambda *x: top_k_attention(*x, 3, causal=True, softcap=4.0), (q, k, v))


def test_numpy_and_torch_agree(backend):
    q, k, v = gaussian(3, LONG)
    out, report = top_k_attention(q.numpy(), k.numpy(), v.numpy(), 8, causal=True, backend=backend, return_report=True)
    assert isinstance(out, np.ndarray)
    other, same = top_k_attention(q, k, v, 8, causal=True, backend=backend, return_report=True)
    assert_close(out, other, dtype=torch.float32)
    assert np.array_equal(chosen(report), chosen(same).numpy())


def test_rows_may_be_cut_anywhere(monkeypatch):
    q, k, v = gaussian(3, LONG, torch.float64)
    whole = top_k_attention(q, k, v, 8, causal=True)
    monkeypatch.setattr(call_module, "CHUNK_BYTES", 1)
    assert_close(top_k_attention(q, k, v, 8, causal=True), whole)


def test_the_report_certifies_what_was_dropped():
    q, k, v = gaussian(3, LONG)
    _, report = top_k_attention(q, k, v, 8, causal=True, return_report=True)
    logits = oracle.plain_logits(q.double(), k.double(), oracle.visible_keys(150, 400, causal=True))
    truth = oracle.dropped_mass(logits, report.selection.to_dense(q))
    assert (report.certificate.dropped_mass.double() >= truth).all()


def test_what_is_refused():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"`top_k` must be an integer of at least 1; got 0; try 8"):
        top_k_attention(q, q, q, 0)
    with pytest.raises(ValueError, match=r"`top_k` must be an integer of at least 1; got 2.5; try 8"):
        top_k_attention(q, q, q, 2.5)
    with pytest.raises(ValueError, match="`query` must have 4 axes"):
        top_k_attention(q[0], q, q, 2)
    if not native.missing():
        with pytest.raises(ValueError, match="kernels know float32, float16, bfloat16, not float64"):
            top_k_attention(q.double(), q.double(), q.double(), 2, backend="native")


PROGRAM = """
import resource, torch
from sieve_attn.functional import top_k_attention
torch.set_num_threads(2)
length = 20_000
q, k, v = (torch.randn(1, 1, length, 32, requires_grad=True) for _ in range(3))
top_k_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], 8, causal=True).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
top_k_attention(q, k, v, 8, causal=True, backend="native").sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
"""


@pytest.mark.skipif(bool(native.missing()), reason="pure-Python installation")
def test_memory_grows_with_the_chosen_keys_alone():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # one boolean array of queries x keys would be 380 MiB
    assert float(done.stdout) < 64
