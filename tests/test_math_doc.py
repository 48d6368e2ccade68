"""One numerical check a statement of ``docs/math.md``, under the statement's number, in fp64 unless it is about rounding."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sieve_attn import bounds, certify, geometry, pipeline, policies, scores, selection
from sieve_attn.arrays import numpy_ops as xp
from sieve_attn.geometry.sketch import decode
from sieve_attn.scores.event_radar import radar_scores
from sieve_attn.testing.strategies import Shape, clustered, gaussian, random_blocks
from sieve_attn.types import Call, Statistics

DOCUMENT = Path(__file__).parents[1] / "docs" / "math.md"
SHAPE = Shape(1, 2, 1, 24, 64, 8, 4)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def softmax(s):
    w = np.exp(s - s.max())
    return w / w.sum()


def centred(rng, n=16, trials=300):
    """Logits of mean zero over a block, from tiny to huge spread, some with one outlier."""
    x = rng.standard_normal((trials, n)) * np.exp(rng.uniform(-4, 2, (trials, 1)))
    x[::3, 0] += 5 * np.abs(x[::3]).max(-1)
    return x - x.mean(-1, keepdims=True)


def log_mean_exp(x):
    return xp.logsumexp(x, -1) - math.log(x.shape[-1])


def call_of(make=gaussian, shape=SHAPE, dtype=torch.float64, **options):
    query, key, value = make(3, shape, dtype)
    return Call(query, key, value, scale=shape.dim**-0.5, **options)


def exact_mass(call, size=16):
    logits = bounds.soft_cap(torch, call.query @ call.key.mT * call.scale, call.softcap)
    logits = logits if call.bias is None else logits + call.bias
    seen = call.rows(0, call.q_len).visible
    return torch.where(seen, logits, -torch.inf).unflatten(-1, (-1, size)).logsumexp(-1)


def test_every_numbered_statement_has_a_test():
    stated = set(re.findall(r"^\*\*(\d\.\d)", DOCUMENT.read_text(), re.M))
    tested = {f"{a}.{b}" for name in globals() if name.startswith("test_") for a, b in re.findall(r"(?<=_)(\d)_(\d)(?=_)", name)}
    assert stated - tested == {"9.4", "9.5"}, "9.4 and 9.5 are remarks"


def test_2_1_error_of_the_output_and_2_2_distances(rng):
    s, v, kept = 3 * rng.standard_normal(50), rng.standard_normal((50, 4)), rng.random(50) < 0.4
    p, sparse = softmax(s), np.zeros(50)
    sparse[kept] = softmax(s[kept])
    delta = p[~kept].sum()
    difference = p @ v - sparse @ v
    assert np.allclose(difference, delta * (softmax(s[~kept]) @ v[~kept] - sparse @ v), atol=1e-14)
    assert np.linalg.norm(difference) <= delta * np.linalg.norm(v[~kept] - sparse @ v, axis=1).max()
    assert np.isclose(0.5 * np.abs(p - sparse).sum(), delta)
    assert np.isclose((sparse[kept] * np.log(sparse[kept] / p[kept])).sum(), -math.log1p(-delta))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_2_3_error_of_the_output_from_summaries(dtype):
    q, k, v = clustered(1, SHAPE, dtype)
    policy = policies.Policy(scores.KeySketch(8), selection.TopK(2), query_tile=1)
    out, report = pipeline.attention(q, k, v, policy, return_report=True)
    wide = pipeline.attention(q.double(), k.double(), v.double(), selection=report.selection)
    dense = pipeline.attention(q.double(), k.double(), v.double())
    assert ((dense - wide).norm(dim=-1) <= report.certificate.output_error).all()
    assert out.dtype == dtype


@pytest.mark.parametrize("bound", [scores.Euclidean(), scores.Cosh(), scores.Bennett(), scores.Box()], ids=repr)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 5.0}, {"softcap": 6.0, "causal": True}], ids=str)
def test_3_1_to_3_4_brackets_of_whole_and_partly_visible_blocks(bound, options):
    call = call_of(**options)
    found = bound.score(call.rows(0, call.q_len), geometry.build(call.key, 16, bound.statistics), brackets=True)
    truth = exact_mass(call)
    assert (found.lower <= truth).all()
    assert (truth <= found.upper).all()


def test_3_1_jensen_needs_the_whole_block(rng):
    x = centred(rng)
    assert (log_mean_exp(x) >= -1e-12).all()
    lowest = np.sort(x, -1)[:, :4]  # a query that sees only these four
    assert (log_mean_exp(lowest) < 0).any()


def test_3_2_ball_3_3_box_and_3_4_mass_from_a_range(rng):
    keys, q = rng.standard_normal((16, 8)), rng.standard_normal(8)
    s, stored = keys @ q, np.round(keys.mean(0), 1)
    reach = np.linalg.norm(q) * np.linalg.norm(keys - stored, axis=1).max()
    assert np.abs(s - stored @ q).max() <= reach
    low, high = keys.min(0), keys.max(0)
    upper, lower = np.maximum(q, 0) @ high + np.minimum(q, 0) @ low, np.maximum(q, 0) @ low + np.minimum(q, 0) @ high
    assert np.isclose(upper, np.maximum(q * low, q * high).sum())
    assert lower <= s.min()
    assert s.max() <= upper
    assert math.log(16) + lower <= xp.logsumexp(s, 0) <= math.log(16) + upper


def test_3_5_cosh(rng):
    x = centred(rng)
    reach = np.abs(x).max(-1)
    assert (log_mean_exp(x) <= bounds.log_cosh(xp, reach) + 1e-12).all()
    assert np.isfinite(bounds.log_cosh(xp, np.array([0.0, 1e4]))).all()


def test_3_6_bennett_is_reached_and_monotone(rng):
    x = centred(rng)
    log_f = bounds.bennett_log_mgf(xp, np.abs(x).max(-1), x.var(-1), np.full(len(x), 16.0))
    assert (log_mean_exp(x) <= log_f + 1e-10).all()
    reach, sigma = np.meshgrid(np.linspace(0.1, 30, 60), np.linspace(0.05, 10, 50))
    values = bounds.bennett_log_mgf(xp, reach, sigma**2, np.full(reach.shape, 64.0))
    assert (np.diff(values, axis=0) >= -1e-12).all()
    assert (np.diff(values, axis=1) >= -1e-12).all()
    r, var = 2.0, 0.5  # the two points themselves
    p = var / (r * r + var)
    assert np.isclose(
        math.log(p * math.exp(r) + (1 - p) * math.exp(-var / r)),
        bounds.bennett_log_mgf(xp, np.array(r), np.array(var), np.array(1e6)),
    )


def test_3_7_clamps(rng):
    x = centred(rng)
    sigma = x.std(-1)
    assert (np.abs(x).max(-1) <= sigma * math.sqrt(15) * (1 + 1e-12)).all()
    one_outlier = np.array([15.0] + [-1.0] * 15)
    assert np.isclose(one_outlier.max(), one_outlier.std() * math.sqrt(15))
    loose = bounds.bennett_log_mgf(xp, 40 * sigma, 1600 * sigma**2, np.full(len(x), 16.0))
    assert (log_mean_exp(x) <= loose + 1e-10).all()
    assert bounds.bennett_log_mgf(xp, np.array(3.0), np.array(2.0), np.array(1.0)) == 0


@pytest.mark.parametrize("shape", [(16, 8), (5, 40), (64, 64), (1, 3)])
def test_3_8_largest_eigenvalue_is_never_below(rng, shape):
    rows = (rng.standard_normal((20, *shape)) * np.exp(rng.uniform(-9, 9, (20, 1, 1)))).astype(np.float32)
    rows[0] = rows[0, :1]  # rank one: no slack but the rounding
    truth = np.linalg.norm(rows.astype(np.float64), 2, axis=(1, 2)) ** 2
    found = bounds.largest_eigenvalue(xp, rows).astype(np.float64)
    assert (truth <= found).all()
    assert (found <= truth * min(shape) ** 0.125 * 1.01).all()


def concave_envelope_gap(cap: float) -> float:
    s = np.linspace(-12.0, 6.0, 10001)
    y, h = np.exp(s), np.exp(cap * np.tanh(s / cap))
    hull: list[int] = []
    for i in range(len(s)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (h[b] - h[a]) * (y[i] - y[b]) > (h[i] - h[b]) * (y[b] - y[a]):
                break
            hull.pop()
        hull.append(i)
    return float((np.log(np.interp(y, y[hull], h[hull])) - np.log(h)).max())


@pytest.mark.parametrize("cap", [5.0, 6.0, 8.0, 15.0, 30.0, 50.0, 100.0])
def test_3_9_soft_cap_shifts(rng, cap):
    assert 0.6 < concave_envelope_gap(cap) * cap**2 < 0.68 < bounds.capped_upper_shift(cap) * cap**2
    x = centred(rng)
    c = rng.uniform(-2 * cap, 2 * cap, (len(x), 1))
    truth = log_mean_exp(bounds.soft_cap(xp, c + x, cap))
    upper = bounds.soft_cap(xp, c[:, 0] + log_mean_exp(x), cap) + bounds.capped_upper_shift(cap)
    lower = bounds.soft_cap(xp, c[:, 0], cap) - bounds.capped_lower_shift(xp, x.std(-1), cap)
    assert (truth <= upper + 1e-12).all()
    assert (lower <= truth + 1e-12).all()
    t = np.tanh(np.linspace(-5, 5, 10001))
    assert (2 * np.abs(t) * (1 - t * t)).max() <= 2 * 0.385


@pytest.mark.parametrize("bound", [scores.Bennett(), scores.Box(), scores.KeySketch(3)], ids=repr)
def test_3_10_bias(bound):
    bias = 3 * torch.randn(1, 2, 24, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for options in ({}, {"causal": True}, {"softcap": 8.0}):
        call = call_of(bias=bias, **options)
        found = bound.score(call.rows(0, call.q_len), geometry.build(call.key, 16, bound.statistics), brackets=True)
        assert (found.lower <= exact_mass(call)).all()
        assert (exact_mass(call) <= found.upper).all()


def test_4_1_planes_are_nested_and_symmetric():
    call = call_of()
    sketch = geometry.build(call.key, 16, Statistics(sketch_bits=8)).sketch
    whole = decode(sketch, 8)
    step = sketch.scale.double()[..., None] * sketch.channel_scale.double()[:, :, None, :]
    for bits in range(1, 8):
        apart = (decode(sketch, bits) - whole) / step
        assert apart.abs().max() <= (2 ** (8 - bits) - 1) / 2 + 1e-9
        assert apart.max() > 0 > apart.min()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("query_bits", [None, 8])
def test_4_2_per_key_4_3_and_4_4_per_block(bits, query_bits):
    for dtype in (torch.float64, torch.float32):
        call = call_of(clustered, dtype=dtype)
        scorer = scores.KeySketch(bits, query_bits)
        shape, rows = geometry.build(call.key, 16, scorer.proof_statistics), call.rows(0, call.q_len)
        truth = call.query.double() @ call.key.double().mT * call.scale
        assert (truth <= scorer.key_upper(rows, shape).double()).all()
        error, spectral = (x.double() for x in scorer._errors(rows, shape))
        apart = truth - scorer._logits(rows, shape).double()
        assert (apart.abs() <= error + 1e-5).all()
        assert (apart.unflatten(-1, (-1, 16)).norm(dim=-1) <= spectral + 1e-5).all()
        found = scorer.score(rows, shape, brackets=True)
        mass = truth.unflatten(-1, (-1, 16)).logsumexp(-1)
        assert (found.lower.double() <= mass).all()
        assert (mass <= found.upper.double()).all()


def test_4_4_spectral_bracket_on_the_worst_errors(rng):
    w_log = 2 * rng.standard_normal((500, 16))
    w = np.exp(w_log)
    size = np.exp(rng.uniform(-6, 2, (500, 1)))
    along = w / np.linalg.norm(w, axis=-1, keepdims=True)  # errors along the weights are the worst direction
    for x in (along * size, -along * size, rng.standard_normal((500, 16)) * size):
        spectral, error = np.linalg.norm(x, axis=-1), np.abs(x)
        truth = xp.logsumexp(w_log + x, -1)
        for use in (True, False):
            assert (truth <= bounds.sketch_upper(xp, w_log, error, spectral, use_spectral=use) + 1e-9).all()
            assert (truth >= bounds.sketch_lower(xp, w_log, error, spectral, use_spectral=use) - 1e-9).all()
    total = w.sum(-1)
    linear = np.maximum(total - size[:, 0] * np.linalg.norm(w, axis=-1), 0)
    assert (total * np.exp(-size[:, 0] * np.linalg.norm(w, axis=-1) / total) >= linear).all()


def test_4_4_phi_grows_and_its_small_branch_is_above(rng):
    e = np.concatenate([np.linspace(-50, 50, 2001)[np.abs(np.linspace(-50, 50, 2001)) > 0.1]])
    assert (np.diff((np.expm1(e) - e) / e**2) > 0).all()
    small = np.linspace(1e-4, 1e-2, 200)
    series = sum(small**k / math.factorial(k + 2) for k in range(8))
    assert (series <= 0.5 + small / 6 + small**2 / 12).all()


@pytest.mark.parametrize("sink", [None, 1.5])
@pytest.mark.parametrize("bound", [scores.Bennett(), scores.KeySketch(4), scores.Exact()], ids=repr)
def test_5_1_certificate_of_any_selection(bound, sink):
    for seed in range(5):
        chosen = random_blocks(seed, SHAPE, kv_block=16, density=0.5)
        call = call_of(clustered, sink=None if sink is None else torch.full((2,), sink, dtype=torch.float64))
        _, lse = pipeline.attend(call.query, call.key, call.value, chosen, sink=call.sink)
        shape = geometry.build(call.key, 16, bound.statistics)
        proved = certify.certify(call, chosen, shape, bound, lse).dropped_mass
        assert (certify.true_dropped_mass(call, chosen) <= proved).all()


def test_5_2_rounding_is_outward(rng):
    log_kept, log_dropped = (rng.uniform(-90, 90, 20000).astype(np.float32) for _ in "ab")
    truth = 1 / (1 + np.exp(np.minimum(log_kept.astype(np.float64) - log_dropped, 700)))
    low, high = bounds.round_down(xp, log_kept, np.float32(0)), bounds.round_up(xp, log_dropped, np.float32(0))
    assert (truth <= bounds.dropped_mass(xp, low, high).astype(np.float64)).all()
    assert bounds.dropped_mass(xp, np.float32(0), np.float32(-np.inf)) == 0
    assert bounds.dropped_mass(xp, np.float32(np.nan), np.float32(0)) == 1
    assert bounds.dropped_mass(xp, np.float32(0), np.float32(-300)) == bounds.SMALLEST
    x = (30 * rng.standard_normal((2000, 64))).astype(np.float32)
    exact = np.log(np.exp(x.astype(np.float64)).sum(-1))
    assert (bounds.kept_mass(xp, xp.logsumexp(x, -1), margin=np.float32(0), additions=64) <= exact).all()


def test_5_3_a_geometry_of_other_lengths_is_refused():
    call = call_of()
    other = geometry.build(call.key[:, :, :48], 16, Statistics(sketch_bits=4))
    with pytest.raises(ValueError, match="must be built over this call's keys"):
        pipeline.attention(call.query, call.key, call.value, policies.Adaptive(), geometry=other)


def test_6_1_mass_keeps_the_smallest_estimated_set(rng):
    share = softmax(2 * rng.standard_normal(9))
    ordered = np.sort(share)[::-1]
    fewest = int(np.searchsorted(np.cumsum(ordered), 0.8)) + 1
    sets = [s for s in range(512) if share[[i for i in range(9) if s >> i & 1]].sum() >= 0.8]
    assert fewest == min(s.bit_count() for s in sets)


@pytest.mark.parametrize("error", [0.3, 0.1, 0.01])
def test_6_2_proved_mass_holds_and_6_5_the_certificate_meets_it(error):
    call = call_of(clustered, Shape(1, 4, 2, 64, 256, 16, 4), torch.float32)
    for bits in (2, 8):
        policy = policies.Certified(error, bits=bits, sinks=0, window=0)
        _, report = pipeline.attention(call.query, call.key, call.value, policy, return_report=True)
        assert float(report.certificate.dropped_mass.max()) <= error
        assert (certify.true_dropped_mass(call, report.selection) <= report.certificate.dropped_mass).all()


def test_6_3_the_first_success_is_final(rng):
    for _ in range(50):
        mass = np.exp(rng.standard_normal(12))
        upper, order = mass * np.exp(rng.random(12)), rng.permutation(12)
        kept = np.cumsum(mass[order])
        rest = upper.sum() - np.cumsum(upper[order])
        proved = rest <= 0.2 * kept
        assert (np.diff(proved.astype(int)) >= 0).all()


def test_6_4_the_order_gives_the_fewest_blocks(rng):
    kappa = 0.15
    for _ in range(20):
        low = np.exp(rng.standard_normal(8))
        high = low * np.exp(2 * rng.random(8))
        subsets = [[i for i in range(8) if s >> i & 1] for s in range(256)]
        fewest = min(len(s) for s in subsets if high.sum() - high[s].sum() <= kappa * low[s].sum() + 1e-12)
        order = np.argsort(-(high + kappa * low))
        first = next(n for n in range(9) if high.sum() - high[order[:n]].sum() <= kappa * low[order[:n]].sum() + 1e-12)
        assert first == fewest


def test_7_1_chernoff_covers_unequal_draws(rng):
    p = np.linspace(0.0, 0.2, 64) ** 2
    means = (rng.random((4000, 64)) < p).mean(-1)
    covered = bounds.kl_upper_limit(xp, means, 64, 0.05) >= p.mean()
    assert covered.mean() >= 0.95
    assert np.isclose(bounds.kl_upper_limit(xp, np.array(0.0), 64, 0.05), 1 - 0.05 ** (1 / 64))
    assert bounds.kl_upper_limit(xp, np.array(1.0), 64, 0.05) == 1


def test_7_2_key_meter_is_unbiased_and_covers(rng):
    b, y = np.exp(rng.standard_normal(40)), rng.random(40)
    edges = np.linspace(0, b.sum(), 9)
    ladder = np.concatenate([[0], np.cumsum(b)])
    overlap = np.clip(np.minimum(ladder[1:], edges[1:, None]) - np.maximum(ladder[:-1], edges[:-1, None]), 0, None)
    assert np.isclose(((overlap @ y) / (b.sum() / 8)).mean(), (b * y).sum() / b.sum())
    call, chosen = call_of(clustered), random_blocks(1, SHAPE, kv_block=16, density=0.5)
    shape = geometry.build(call.key, 16, Statistics(sketch_bits=4))
    _, lse = pipeline.attend(call.query, call.key, call.value, chosen)
    truth = certify.true_dropped_mass(call, chosen)
    limits = [certify.key_meter(call, chosen, shape, lse, samples=64, seed=s).dropped_mass for s in range(20)]
    assert (torch.stack(limits) >= truth).double().mean() >= 0.95


def test_7_3_row_audit(rng):
    rows, alpha = 20, 0.1
    draws = rng.random((20000, rows)).max(-1)  # F(M) for a continuous distribution
    assert (draws >= alpha ** (1 / rows)).mean() >= 1 - alpha - 0.01
    call, chosen = call_of(), random_blocks(1, SHAPE, kv_block=16)
    audit = certify.row_audit(call, chosen, rows=rows, alpha=alpha)
    assert math.isclose(audit.share_below_worst, alpha ** (1 / rows))
    truth = certify.true_dropped_mass(call, chosen)
    assert all(math.isclose(d, float(truth[at]), abs_tol=1e-12) for at, d in zip(audit.rows, audit.dropped_mass, strict=True))


def test_8_1_far_field_error(rng):
    for _ in range(30):
        s, v = 1.5 * rng.standard_normal((6, 8)), rng.standard_normal((6, 8, 3))
        mass, nu = np.exp(s).sum(1), v.mean(1)
        own = (np.exp(s)[..., None] * v).sum(1) / mass[:, None]
        kept, far = slice(0, 2), slice(2, 6)
        low, high = mass * np.exp(-rng.random(6)), mass * np.exp(rng.random(6))
        m = np.clip(mass * np.exp(rng.standard_normal(6)), low, high)
        near = (mass[kept, None] * own[kept]).sum(0)
        dense = (mass[:, None] * own).sum(0) / mass.sum()
        made = (near + (m[far, None] * nu[far]).sum(0)) / (mass[kept].sum() + m[far].sum())
        terms = (mass - m)[far, None] * (nu[far] - made) + mass[far, None] * (own - nu)[far]
        assert np.allclose(mass.sum() * (dense - made), terms.sum(0))
        rho = np.linalg.norm(v - nu[:, None], axis=-1).max(1)
        each = np.maximum(high - m, m - low) * np.linalg.norm(nu - made, axis=1) + high * rho
        assert np.linalg.norm(dense - made) <= each[far].sum() / (mass[kept].sum() + low[far].sum())


def test_9_1_an_absolute_threshold_bounds_nothing():
    s = np.array([0.2] + [0.1] * 1000)
    assert softmax(s)[s <= 0.15].sum() > 0.998
    shifted = s + 1
    assert np.allclose(softmax(shifted), softmax(s))
    assert (shifted > 0.15).all()


def test_9_2_event_radar_is_no_bound():
    key, query = torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
    shape = geometry.build(key, 16, Statistics(direction=True))
    score = radar_scores(query @ shape.direction_mean.mT, query.norm(dim=-1), shape.direction_radius, 1.0)
    assert float(score) < float(query @ key.mT) == 3
    assert not isinstance(scores.EventRadar(), scores.Bound)
    call = call_of()
    with pytest.raises(TypeError):
        certify.certify(call, random_blocks(0, SHAPE), shape, scores.EventRadar(), torch.zeros(1, 2, 24))


def test_9_3_a_t_interval_is_not_honest(rng):
    draws = (rng.random((20000, 64)) < 0.01).astype(float)
    upper = draws.mean(-1) + 1.67 * draws.std(-1, ddof=1) / 8
    assert (upper >= 0.01).mean() < 0.48
    assert math.isclose(0.99**64, 0.526, abs_tol=1e-3)
    assert (bounds.kl_upper_limit(xp, draws.mean(-1), 64, 0.05) >= 0.01).mean() >= 0.95
