"""One kernel that reads the geometry, decides and attends: the reference's choice, attention over it, sound certificates."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import attention, pipeline
from sieve_attn import geometry as g
from sieve_attn.attend import streaming
from sieve_attn.certify import true_dropped_mass
from sieve_attn.patterns import Primes, Sinks, Window
from sieve_attn.policies import Policy
from sieve_attn.scores import Box, Euclidean
from sieve_attn.selection import RunningMaximum
from sieve_attn.testing import GENERATORS, Shape, assert_close, choices
from sieve_attn.testing.contracts import coins
from sieve_attn.testing.strategies import gaussian
from sieve_attn.types import Call

KEEPS = (None, Sinks(3), Window(9), Sinks(5) | Window(20))


def a_policy(margin=2.0, keep=Sinks(4) | Window(8), **changes):
    given = {"block_size": 8, "query_tile": 16} | changes
    return Policy(Euclidean(), RunningMaximum(margin, step=given["block_size"] * 2, run=given["block_size"] * 8), keep, **given)


def a_cache(seed, shape, dtype=torch.float32):
    """Queries that look one way and keys near a few centres: a ball tells blocks apart, for a whole tile."""
    q, k, v = gaussian(seed, shape)
    where = torch.arange(shape.kv_len) // 24
    centre = gaussian(seed + 1, Shape(1, 1, 1, 1, int(where[-1]) + 1, shape.dim, 1))[1][0, 0][where]
    way = gaussian(seed + 2, Shape(1, 1, 1, 1, 1, shape.dim, 1))[1]
    return [x.to(dtype) for x in (q * 0.5 + way * 3, centre * 2 + k * 0.1, v)]


def check(call, policy, dtype=torch.float32):
    """The choice is the reference's but for ties, and the output is attention over exactly that choice."""
    geometry = g.build(call.key, policy.block_size, policy.statistics, key_mask=call.key_mask)
    assert streaming.why_not(call, geometry, policy, False, named=True) == ()
    out, lse, chosen = streaming.attend(call, geometry, policy)
    found = (*chosen()[:2], ())
    choices.assert_same_choice(found, call, geometry, policy)
    wanted = pipeline.dispatch.module("reference").attend(
        Call(**{n: x.double() if n in ("query", "key", "value") else x for n, x in vars(call).items() if n != "shared"}), found[0]
    )
    plain = pipeline.dispatch.module("reference").attend(call, found[0])
    assert_close(out, wanted[0], plain=plain[0], dtype=dtype)
    assert_close(lse, wanted[1], dtype=torch.float32)
    return found


@pytest.mark.parametrize(("keep", "causal"), [(None, False), (Sinks(3), True), (Sinks(5) | Window(20), True)], ids=repr)
def test_it_reads_what_the_reference_reads(keep, causal):
    q, k, v = a_cache(3, Shape(1, 4, 2, 3, 150, 16, 24))
    call = Call(q, k, v, causal=causal, scale=0.25)
    _, (kept, visible), _ = check(call, a_policy(keep=keep))
    assert 0 < kept.sum() < 0.9 * visible.sum()
    if keep is None:
        check(call, a_policy(0.0, share_group=False))


def test_no_margin_at_all_reads_everything():
    q, k, v = a_cache(3, Shape(1, 2, 1, 3, 70, 8, 8))
    _, (kept, visible), _ = check(Call(q, k, v, causal=True, scale=0.25), a_policy(math.inf))
    assert torch.equal(kept, visible)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    st.sampled_from([1, 3, 16, 40]), st.integers(1, 90), st.integers(1, 3), st.sampled_from([8, 17]),
    st.sampled_from(sorted(GENERATORS)), st.sampled_from(KEEPS), st.sampled_from([4, 8, 24]), st.sampled_from([8, 12]),
    st.booleans(), st.sampled_from([None, 30]), st.sampled_from([None, 6.0]),
    st.sampled_from(["", "masked", "poisoned", "packed"]),
)  # fmt: skip
def test_any_call(q_len, kv_len, group, dim, name, keep, size, tile, causal, window, softcap, kind):
    kv_len = q_len if kind == "packed" else kv_len
    q, k, v = GENERATORS[name](kv_len, Shape(1, 2 * group, 2, q_len, kv_len, dim, 8))
    options = {}
    if kind == "masked":
        options["key_mask"] = coins(3, 0.6, 1, kv_len)
    if kind == "packed":
        options["cu_seqlens"] = torch.tensor([0, *sorted({q_len // 3, q_len // 2} - {0, q_len}), q_len])
    policy = a_policy(1.0, keep, block_size=size, query_tile=tile)
    call = Call(q, k, v, causal=causal, scale=dim**-0.5, window=window, softcap=softcap, **options)
    if kind == "poisoned":
        k[:, :, kv_len // 2, 0] = torch.nan
        geometry = g.build(k, size, policy.statistics)
        found = streaming.select(call, geometry, policy)
        return choices.assert_same_choice((*found[:2], ()), call, geometry, policy)
    check(call, policy)


def test_half_precision_and_strides():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in a_cache(5, Shape(2, 4, 2, 3, 120, 32, 32), torch.float16))
    check(Call(q, k, v, causal=True, scale=0.2, sink=torch.tensor([0.5, -1.0, 2.0, 0.0])), a_policy(), torch.float16)


def test_what_it_passed_by_is_in_the_certificate_and_below_its_promise():
    q, k, v = a_cache(7, Shape(1, 4, 2, 4, 240, 16, 8))
    policy = a_policy(1.5)
    out, report = attention(q, k, v, policy, causal=True, backend="triton", return_report=True)
    assert (report.backend, report.selected_by) == ("triton", "triton")
    assert report.density < 0.9
    exact = Call(q.double(), k.double(), v.double(), causal=True, scale=0.25)
    truth = true_dropped_mass(exact, report.selection)
    assert (truth > 1e-5).any()
    assert (report.certificate.dropped_mass.double() >= truth).all()
    for margin in (4.0, 7.0):
        strict = attention(q, k, v, a_policy(margin), causal=True, backend="reference", return_report=True)[1]
        assert strict.density < 1.0
        assert (true_dropped_mass(exact, strict.selection) <= 30 * math.exp(-margin)).all()
    dense = attention(q.double(), k.double(), v.double(), causal=True)
    error = (dense - out.double()).norm(dim=-1)
    assert (report.certificate.output_error.double() + 1e-5 >= error).all()
    assert torch.equal(attention(q, k, v, policy, causal=True, backend="triton"), out)


def test_keys_that_it_passed_by_are_never_read():
    q, k, v = a_cache(9, Shape(1, 2, 1, 1, 240, 16, 8))
    policy = a_policy(1.0)
    call = Call(q, k, v, causal=True, scale=0.25)
    geometry = g.build(k, 8, policy.statistics)
    out, _, chosen = streaming.attend(call, geometry, policy)
    unread = ~chosen()[0].to_dense(q)[0, 0, 0]
    assert unread.any()
    k[:, :, unread] = torch.nan
    v[:, :, unread] = torch.nan
    assert torch.equal(streaming.attend(call, geometry, policy)[0], out)


def test_gradients_go_through_what_it_chose():
    leaves = [x.requires_grad_() for x in a_cache(9, Shape(1, 2, 1, 1, 160, 8, 8))]
    policy, found = a_policy(1.0), []
    for backend in ("triton", "reference"):
        found.append(torch.autograd.grad(attention(*leaves, policy, causal=True, backend=backend).square().sum(), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    report = attention(*leaves, policy, causal=True, backend="triton", return_report=True)[1]
    unread = ~report.selection.to_dense(leaves[0])[0, 0, 0]
    assert unread.any()
    assert all((x[:, :, unread] == 0).all() for x in found[0][1:])


def test_every_reason_is_said():
    q, k, v = gaussian(1, Shape(1, 16, 1, 64, 64, 8, 8))
    call = Call(q, k, v, bias=torch.zeros(1, 1, 64, 64), scale=1.0)
    policy = Policy(Box(), RunningMaximum(step=4096, run=4096), Primes(), query_tile=64)
    reasons = "; ".join(streaming.why_not(call, g.build(k, 16, policy.statistics), policy, True, named=True))
    for part in ("without a bias", "not for every query", "score by Euclidean, not by Box", "force Sinks and Window",
                 "holds at most 32 rows, not 64 queries of 16 heads", "at most 128 blocks a step"):  # fmt: skip
        assert part in reasons
    # the pipeline then chooses by the reference, and says so
    report = attention(q, k, v, Policy(Box(), RunningMaximum()), backend="triton", return_report=True)[1]
    assert (report.backend, report.selected_by) == ("triton", "reference")
