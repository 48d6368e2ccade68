"""The certificate is at least the truth: dropped mass in fp64, output error, far field; and the meters cover."""

import random

import pytest
import torch

from sieve_attn import attention, certify
from sieve_attn import geometry as stage_geometry
from sieve_attn.attend.reference import attend as reference_attend
from sieve_attn.policies import Adaptive, Aether, Certified, Policy, Quest, TopBlocks
from sieve_attn.scores import Bennett, Box, Cosh, Euclidean, EventRadar, Exact, KeySketch, Mean, Tightest
from sieve_attn.selection import Certified as CertifiedSelector
from sieve_attn.selection import TopK
from sieve_attn.testing import GENERATORS, Shape, oracle
from sieve_attn.testing.contracts import a_call, spread_heads
from sieve_attn.testing.strategies import gaussian, options, random_blocks
from sieve_attn.types import Ranges, Selection, Statistics

BOUNDS = (KeySketch(8), KeySketch(4), KeySketch(2), Bennett(), Box(), Euclidean(), Cosh(), Exact(), KeySketch(8, query_bits=8),
          Tightest((KeySketch(4), Bennett())))  # fmt: skip
POLICIES = (
    TopBlocks(2, sinks=0, window=0),
    Adaptive(0.9, sinks=0, window=0),
    Certified(0.1, sinks=0, window=16),
    Aether(3.0, 16),
    Quest(2),
)


def truth(q, k, v, selection, causal, extra):
    """fp64 ``(dropped mass, dense output, sparse output)`` for the inputs as given."""
    wide = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in extra.items()}
    seen = oracle.visible_keys(q.shape[2], k.shape[2], causal=causal)
    kept = spread_heads(selection.to_dense(q), q.shape[1])
    q, k, v = q.double(), k.double(), v.double()
    logits = oracle.plain_logits(q, k, seen, softcap=wide.get("softcap"), bias=wide.get("bias"))
    dense, sparse = (oracle.plain_attention(q, k, v, allowed, **wide)[0] for allowed in (seen, seen & kept))
    return oracle.dropped_mass(logits, kept), dense, sparse


def check(name, seed, shape):
    """One call with options drawn from its seed: how many (query, selection) pairs it covers; raises on a violation."""
    draw = random.Random(seed)
    dtypes = [torch.float32, torch.bfloat16] + [torch.float16] * (name != "huge_norms")  # beyond fp16's range
    dtype, causal, bound = draw.choice(dtypes), draw.random() < 0.5, draw.choice(BOUNDS)
    q, k, v = GENERATORS[name](seed, shape, dtype)
    extra = options(name, seed, shape)
    if draw.random() < 0.35:
        chosen = draw.choice(POLICIES)
        selection = attention(q, k, v, chosen, causal=causal, return_report=True, **extra)[1].selection
    else:
        chosen = draw.choice((0.05, 0.3, 0.8))
        selection = random_blocks(
            seed,
            shape,
            q_block=32,
            kv_block=draw.choice((8, 16)),
            density=chosen,
            causal=causal,
            per_query=draw.random() < 0.2,
            heads=shape.q_heads,
        )
    policy = Policy(bound=bound)
    out, report = attention(q, k, v, policy, selection=selection, causal=causal, return_report=True, **extra)
    found = report.certificate
    delta, dense, sparse = truth(q, k, v, selection, causal, extra)
    where = (name, seed, chosen, bound, dtype)
    assert (found.dropped_mass.double() >= delta).all(), where
    assert (found.dropped_mass <= 1).all(), where
    # the kernel's own rounding of the output is another thing, and is not part of the certificate
    rounding = (sparse - out.double()).norm(dim=-1) * (1 + 1e-6) + 1e-12
    assert (found.output_error.double() + rounding >= (dense - out.double()).norm(dim=-1)).all(), where
    return delta.numel()


def soundness(pairs, shape):
    done, seed = 0, 1000
    while done < pairs:
        for name in sorted(GENERATORS):
            done += check(name, seed, shape)
            seed += 1
    return done


def test_the_certificate_is_at_least_the_truth():
    assert soundness(20_000, Shape(2, 4, 2, 48, 176, 32, 16)) >= 20_000


@pytest.mark.parametrize("name", GENERATORS)
def test_certified_drops_no_more_than_its_error(name):
    shape = Shape(1, 4, 2, 64, 256, 32, 16)
    q, k, v = GENERATORS[name](3, shape)
    extra = options(name, 3, shape)
    for error in (0.3, 0.01):
        _, report = attention(q, k, v, Certified(error), causal=True, return_report=True, **extra)
        delta, *_ = truth(q, k, v, report.selection, True, extra)
        assert (delta <= error).all()
        if name != "huge_norms":  # there the rounding of one product order differs from another's
            assert (report.certificate.dropped_mass <= error).all()


@pytest.mark.parametrize("bound", [Euclidean(), Bennett(), Box(), KeySketch(4), Exact()])
def test_any_bound_can_choose_for_certified(bound):
    shape = Shape(1, 2, 1, 32, 160, 16, 8)
    q, k, v = GENERATORS["clustered"](3, shape)
    policy = Policy(bound, CertifiedSelector(0.05), query_tile=32)
    _, report = attention(q, k, v, policy, causal=True, return_report=True)
    delta, *_ = truth(q, k, v, report.selection, True, {})
    assert (delta <= 0.05).all()
    assert (report.certificate.dropped_mass <= 0.05).all()
    assert report.certificate.bound == repr(bound)


def test_adding_blocks_never_raises_the_certificate():
    shape = Shape(1, 4, 2, 32, 160, 16, 8)
    q, k, v = GENERATORS["clustered"](5, shape)
    policy = Policy(bound=KeySketch(4))
    few, more = (random_blocks(s, shape, q_block=32, kv_block=16, density=0.3) for s in (1, 2))
    results = []
    for selection in (few, few | more):
        results.append(attention(q, k, v, policy, selection=selection, return_report=True)[1].certificate.dropped_mass)
    assert (results[1] <= results[0] * (1 + 1e-5)).all()
    assert (results[1] < results[0]).any()


def test_dropping_nothing_is_certified_as_nothing():
    shape = Shape(1, 2, 1, 20, 50, 8, 8)
    q, k, v = gaussian(1, shape)
    _, report = attention(q, k, v, causal=True, return_report=True)
    assert (report.certificate.dropped_mass == 0).all()
    assert (report.certificate.output_error == 0).all()


def test_a_row_that_lost_everything_is_certified_as_lost():
    shape = Shape(1, 2, 1, 8, 16, 8, 8)
    q, k, v = gaussian(1, shape)
    nothing = random_blocks(1, shape, density=0.0)
    _, report = attention(q, k, v, selection=nothing, return_report=True)
    assert (report.certificate.dropped_mass == 1).all()


def test_sinks_belong_to_what_is_kept():
    shape = Shape(1, 4, 2, 32, 96, 16, 8)
    q, k, v = gaussian(1, shape)
    sink = torch.tensor([3.0, 0.0, -2.0, 8.0])
    selection = random_blocks(1, shape, q_block=32, kv_block=16)
    _, report = attention(q, k, v, Policy(bound=KeySketch(8)), selection=selection, sink=sink, return_report=True)
    logits = oracle.plain_logits(q.double(), k.double(), oracle.visible_keys(32, 96))
    delta = oracle.dropped_mass(logits, spread_heads(selection.to_dense(q), 4), sink.double())
    assert (report.certificate.dropped_mass >= delta).all()
    assert (report.certificate.dropped_mass <= 1.3 * delta + 1e-6).all()


@pytest.mark.parametrize("name", ["gaussian", "clustered", "decaying_spectrum", "duplicates", "soft_capped", "biased"])
def test_the_far_field_error_is_at_least_the_truth(name):
    shape = Shape(2, 4, 2, 48, 160, 16, 8)
    q, k, v = GENERATORS[name](2, shape)
    extra = options(name, 2, shape)
    for causal in (False, True):
        policy = Policy(KeySketch(4), TopK(3), query_tile=16, far_field=True)
        out, report = attention(q, k, v, policy, causal=causal, return_report=True, **extra)
        delta, dense, _ = truth(q, k, v, report.selection, causal, extra)
        apart = (dense - out.double()).norm(dim=-1)
        assert (report.certificate.output_error.double() + 1e-5 >= apart).all()
        assert (report.certificate.dropped_mass.double() >= delta).all()


@pytest.mark.parametrize("size", [1.0, 1e3, 1e5])
@pytest.mark.parametrize("block_size", [1, 8])
def test_the_far_field_error_holds_for_huge_logits_and_blocks_kept_in_part(size, block_size):
    dropped = 0
    for seed in range(30):
        draw, shape = random.Random(seed), Shape(1, 2, 1, 16, 40, 8, 4)
        q, k, v = gaussian(seed, shape)
        v[:, :, : draw.choice((0, 30))] *= 0.01
        extra = {"sink": torch.tensor([1.0, -3.0])} if seed % 3 == 0 else {}
        keys = Ranges(16, 40, prefix=draw.choice((0, 3, 7)), window=draw.choice((1, 3, 7)))
        chosen = Selection((keys,)) if seed % 2 else None
        policy = Policy(Mean(), TopK(1), bound=draw.choice(BOUNDS), block_size=block_size, query_tile=4, far_field=True)
        call = {"selection": chosen, "causal": True, "return_report": True}
        out, report = attention(q * size, k, v, policy, **call, **extra)
        _, dense, _ = truth(q * size, k, v, report.selection, True, extra)
        wide = {n: x.double() for n, x in extra.items()}
        exact, _ = attention(*(x.double() for x in (q * size, k, v)), policy, **call | {"selection": report.selection}, **wide)
        rounding = (exact - out.double()).norm(dim=-1) * (1 + 1e-6) + 1e-6
        assert (report.certificate.output_error.double() + rounding >= (dense - out.double()).norm(dim=-1)).all(), seed
        # at worst the largest distance between what is seen and what was made
        assert (report.certificate.output_error < 20).all(), seed
        dropped += int((report.certificate.dropped_mass > 0).sum())
    assert dropped > 500


@pytest.mark.parametrize("far_field", [False, True])
@pytest.mark.parametrize("what", ["key", "value"])
def test_an_output_that_is_no_number_has_no_finite_error(what, far_field):
    given = dict(zip(("query", "key", "value"), gaussian(1, Shape(1, 1, 1, 24, 48, 8, 4)), strict=True))
    policy = Policy(Mean(), TopK(1), block_size=8, query_tile=8, far_field=far_field)
    given[what][:, :, 30] = torch.nan
    out, report = attention(*given.values(), policy, causal=True, return_report=True)
    found, lost = report.certificate, out.isnan().any(-1)
    assert lost.any()
    assert not lost.all()
    assert not found.output_error.isnan().any()
    assert (found.output_error[lost & (found.dropped_mass > 0)] == torch.inf).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_keys_are_certified_as_one(poison):
    shape = Shape(1, 4, 2, 32, 96, 16, 8)
    q, k, v = gaussian(1, shape)
    k[0, 0, 40, 2] = poison
    _, report = attention(q, k, v, TopBlocks(2, sinks=0, window=0), return_report=True)
    found = report.certificate.dropped_mass
    assert (found[:, :2] == 1).all()
    assert (found[:, 2:] < 1).any()
    assert report.selection.blocks.to_tiles()[0, 0, :, 2].all()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_shortcuts_in_fp32_products_are_refused(precision):
    q, k, v = gaussian(1, Shape(1, 2, 1, 8, 64, 8, 8))
    torch.set_float32_matmul_precision(precision)
    try:
        with pytest.raises(ValueError, match=r"'highest'.*set_float32_matmul_precision"):
            attention(q, k, v, TopBlocks(1), return_report=True)[1].certificate  # noqa: B018
        with pytest.raises(ValueError, match="'highest'"):
            attention(q, k, v, Certified(0.1))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_heuristic_cannot_certify():
    call = a_call(Shape(1, 2, 1, 4, 32, 8, 8))
    selection = random_blocks(1, Shape(1, 2, 1, 4, 32, 8, 8))
    geometry = stage_geometry.build(call.key, 8, EventRadar().statistics)
    with pytest.raises(TypeError, match="bound"):
        certify.certify(call, selection, geometry, EventRadar(), torch.zeros(1, 2, 4))
    with pytest.raises(TypeError, match="`bound` must be a Bound or None; got EventRadar"):
        Policy(bound=EventRadar())
    with pytest.raises(ValueError, match="must be a Bound for Certified"):
        Policy(EventRadar(), CertifiedSelector(0.1))


def meter_case(seed):
    shape = Shape(1, 4, 2, 64, 256, 16, 8)
    call = a_call(shape, "clustered", seed)
    selection = random_blocks(seed, shape, q_block=16, kv_block=16, density=0.4)
    _, lse = reference_attend(call, selection)
    return call, selection, lse


@pytest.mark.parametrize("bits", [4, 8])
def test_the_key_meter_covers(bits):
    alpha, misses, total, ratios = 0.2, 0, 0, []
    for seed in range(6):
        call, selection, lse = meter_case(seed)
        geometry = stage_geometry.build(call.key, 16, Statistics(sketch_bits=bits))
        found = certify.key_meter(call, selection, geometry, lse, samples=64, alpha=alpha, seed=seed)
        delta = certify.true_dropped_mass(call, selection)
        misses += int((found.dropped_mass < delta * (1 - 1e-5)).sum())
        total += delta.numel()
        ratios.append((found.dropped_mass / delta.clamp(min=1e-9)).median())
        assert found.kind == "statistical"
        assert found.confidence == 1 - alpha
    assert misses <= alpha * total
    assert max(ratios) < 3


def test_the_key_meter_draws_the_same_for_one_seed():
    call, selection, lse = meter_case(1)
    geometry = stage_geometry.build(call.key, 16, Statistics(sketch_bits=4))
    first, second, other = (certify.key_meter(call, selection, geometry, lse, seed=s).dropped_mass for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_row_audit_covers():
    call, selection, _ = meter_case(2)
    delta = certify.true_dropped_mass(call, selection)
    wrong_mean = wrong_share = 0
    for seed in range(40):
        audit = certify.row_audit(call, selection, rows=24, alpha=0.1, seed=seed)
        for place, value in zip(audit.rows, audit.dropped_mass, strict=True):
            assert value == pytest.approx(float(delta[place]), rel=1e-4, abs=1e-7)
        wrong_mean += audit.mean_limit < float(delta.mean())
        wrong_share += float((delta <= audit.worst * (1 + 1e-4)).double().mean()) < audit.share_below_worst
    assert wrong_mean <= 0.1 * 40
    assert wrong_share <= 0.2 * 40


def test_true_dropped_mass_is_the_oracles():
    for causal in (False, True):
        shape = Shape(1, 4, 2, 20, 60, 8, 4)
        call = a_call(shape, dtype=torch.float64, causal=causal)
        selection = random_blocks(1, shape)
        delta, *_ = truth(call.query, call.key, call.value, selection, causal, {})
        assert torch.allclose(certify.true_dropped_mass(call, selection), delta, atol=1e-12)


def test_kl_is_minus_log_of_the_kept_mass():
    shape = Shape(1, 2, 1, 16, 64, 8, 4)
    call = a_call(shape, dtype=torch.float64)
    selection = random_blocks(1, shape, density=0.6, q_block=16, kv_block=8)
    kept = spread_heads(selection.to_dense(call.query), 2)
    logits = oracle.plain_logits(call.query, call.key, oracle.visible_keys(16, 64))
    dense, sparse = (torch.softmax(x, -1) for x in (logits, logits.masked_fill(~kept, -torch.inf)))
    delta = certify.true_dropped_mass(call, selection)
    assert torch.allclose((dense - sparse).abs().sum(-1) / 2, delta)
    assert torch.allclose(torch.where(kept, sparse * (sparse / dense).clamp(min=1e-300).log(), 0.0).sum(-1), -torch.log1p(-delta))
