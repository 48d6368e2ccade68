"""Every formula of ``bounds`` against brute force in fp64: upper ones never below, lower ones never above."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import bounds
from sieve_attn.arrays import numpy_ops as xp
from sieve_attn.testing.strategies import seeds

LAWS = settings(max_examples=40, deadline=None, derandomize=True)
positive = st.floats(1e-3, 30.0)


def centred(rng, n, kind):
    x = {"normal": rng.normal(size=n), "two points": np.where(np.arange(n) == 0, 5.0, -5.0 / max(n - 1, 1)),
         "heavy": rng.standard_t(2, size=n), "equal": np.ones(n)}[kind]  # fmt: skip
    return x - x.mean()


@LAWS
@given(seeds(), st.integers(1, 70), st.sampled_from(["normal", "two points", "heavy", "equal"]), st.floats(0.01, 8.0))
def test_bennett_is_above_every_sample(seed, n, kind, size):
    x = size * centred(np.random.default_rng(seed), n, kind)
    reach, variance = np.abs(x).max() + 1e-12, (x**2).mean() + 1e-12
    truth = np.log(np.exp(x - x.max()).mean()) + x.max()
    found = bounds.bennett_log_mgf(xp, np.asarray(reach), np.asarray(variance), np.asarray(float(n)))
    assert found >= truth - 1e-9 * (1 + abs(truth))


@LAWS
@given(positive, positive, st.integers(1, 100), st.floats(1.0, 3.0), st.floats(1.0, 3.0))
def test_bennett_is_monotone_in_reach_and_variance(reach, variance, n, more, wider):
    def f(r, v):
        return float(bounds.bennett_log_mgf(xp, np.asarray(r), np.asarray(v), np.asarray(float(n))))

    base = f(reach, variance)
    assert base >= 0
    assert f(reach * more, variance) >= base - 1e-9
    assert f(reach, variance * wider) >= base - 1e-9
    assert base <= reach + 1e-9  # never above the largest value itself
    assert base <= float(bounds.log_cosh(xp, np.asarray(reach))) + 1e-9  # the ball gives a variance of at most R^2


def test_bennett_is_reached_by_its_two_points():
    reach, variance = 2.0, 0.5
    p = variance / (reach**2 + variance)
    exact = math.log(p * math.exp(reach) + (1 - p) * math.exp(-variance / reach))
    assert float(bounds.bennett_log_mgf(xp, np.asarray(reach), np.asarray(variance), np.asarray(1e9))) == pytest.approx(
        exact, rel=1e-12
    )


@pytest.mark.parametrize(("reach", "variance"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_bennett_of_nothing_is_nothing(reach, variance):
    assert float(bounds.bennett_log_mgf(xp, np.asarray(reach), np.asarray(variance), np.asarray(16.0))) == 0.0


def test_bennett_neither_overflows_nor_turns_nan():
    reach = np.asarray([1e-30, 1e-3, 700.0, 1e5, 1e18], np.float32)
    for variance in (reach**2, reach * 1e-3, np.full_like(reach, 1e-30)):
        found = bounds.bennett_log_mgf(xp, reach, variance, np.full_like(reach, 16.0))
        assert np.isfinite(found).all()
        assert (found >= 0).all()


@LAWS
@given(st.floats(0, 500))
def test_log_cosh(x):
    exact = abs(x) + math.log1p(math.exp(-2 * abs(x))) - math.log(2)
    assert float(bounds.log_cosh(xp, np.asarray(x))) == pytest.approx(exact, rel=1e-12, abs=1e-12)
    if x < 300:
        assert float(bounds.log_cosh(xp, np.asarray(x))) == pytest.approx(math.log(math.cosh(x)), rel=1e-9, abs=1e-9)


@LAWS
@given(
    seeds(),
    st.floats(5.0, 60.0),
    st.floats(0.05, 30.0),
    st.floats(-80, 80),
    st.integers(2, 64),
    st.sampled_from(["normal", "two points", "heavy"]),
)
def test_soft_cap_shifts_hold(seed, cap, size, centre, n, kind):
    x = size * centred(np.random.default_rng(seed), n, kind)
    capped = cap * np.tanh((centre + x) / cap)
    truth = np.log(np.exp(capped - capped.max()).sum()) + capped.max()
    log_f = np.log(np.exp(x - x.max()).mean()) + x.max()
    upper = math.log(n) + cap * math.tanh((centre + log_f) / cap) + bounds.capped_upper_shift(cap)
    assert upper >= truth - 1e-9
    lower = math.log(n) + cap * math.tanh(centre / cap) - bounds.capped_lower_shift(xp, np.asarray(x.std()), cap)
    assert lower <= truth + 1e-9


@LAWS
@given(seeds(), st.integers(1, 20), st.integers(1, 40), st.sampled_from([1e-20, 1.0, 1e15]))
def test_largest_eigenvalue_is_never_below(seed, n, d, size):
    rows = (size * np.random.default_rng(seed).normal(size=(3, n, d))).astype(np.float32)
    rows[1] = rows[1, :1]  # rank one
    rows[2] = 0
    found = bounds.largest_eigenvalue(xp, rows)
    exact = np.linalg.svd(rows.astype(np.float64), compute_uv=False)[:, 0] ** 2
    assert (found >= exact).all()
    assert (found[:2] <= exact[:2] * min(n, d) ** 0.125 * 1.01 + 2.0**-126).all()
    assert found[2] == 0
    assert (bounds.largest_eigenvalue(_torch(), torch.from_numpy(rows)).numpy() >= exact).all()


def _torch():
    from sieve_attn.arrays import torch_ops

    return torch_ops


@LAWS
@given(seeds(), st.integers(1, 20), st.integers(2, 16), st.floats(1e-3, 4.0), st.booleans())
def test_sketch_brackets_hold_the_sum(seed, n, d, size, hidden):
    rng = np.random.default_rng(seed)
    query, keys = rng.normal(size=d), rng.normal(size=(n, d))
    errors = size * rng.normal(size=(n, d))
    sketched, logits = keys @ query, (keys + errors) @ query
    if hidden and n > 1:
        sketched, logits = (np.where(np.arange(n) == 0, -np.inf, x) for x in (sketched, logits))
    truth = np.logaddexp.reduce(logits)
    each = np.linalg.norm(query) * np.linalg.norm(errors, axis=1)
    spectral = np.asarray(np.linalg.norm(query) * np.linalg.norm(errors, 2))
    for use in (True, False):
        upper = bounds.sketch_upper(xp, sketched, each, spectral, use_spectral=use)
        lower = bounds.sketch_lower(xp, sketched, each, spectral, use_spectral=use)
        assert upper >= truth - 1e-9
        assert lower <= truth + 1e-9
        assert upper <= np.logaddexp.reduce(sketched + each) + 1e-12


@LAWS
@given(seeds(), st.integers(1, 20), st.floats(1, 400), st.floats(1, 400), st.sampled_from(["numpy", "torch"]))
def test_sketch_brackets_hold_the_worst_of_spread_out_logits(seed, n, low, size, namespace):
    # fp32 weights underflow 100 below the largest: a key that seems to weigh nothing may be the one that is hardly known
    rng = np.random.default_rng(seed)
    sketched, error = rng.normal(size=n), rng.random(n)
    unknown = rng.random(n) < 0.3
    sketched = np.where(unknown, -low * rng.random(n), sketched).astype(np.float32)
    error = np.where(unknown, size * error, error).astype(np.float32)
    spectral = np.float32(np.linalg.norm(error.astype(np.float64)) * (1 + 1e-6))
    moved = error * np.where(rng.random(n) < 0.8, 1.0, rng.uniform(-1, 1, n))
    wide = xp if namespace == "numpy" else _torch()
    given_as = [np.asarray(x) if namespace == "numpy" else torch.as_tensor(x) for x in (sketched, error, spectral)]
    slack = 1e-6 * (1 + np.abs(sketched) + error).max()
    for sign in (1.0, -1.0):
        truth = np.logaddexp.reduce(sketched.astype(np.float64) + sign * moved)
        assert float(bounds.sketch_upper(wide, *given_as)) >= truth - slack
        assert float(bounds.sketch_lower(wide, *given_as)) <= truth + slack


def test_a_key_that_is_nearly_unknown_counts_though_it_seems_to_weigh_nothing():
    # e^-157 is no fp32 number, but with its error the key may weigh e^394
    sketched, error = np.array([-159.5, -2.5], np.float32), np.array([553.5, 3.5], np.float32)
    upper = bounds.sketch_upper(xp, sketched, error, np.float32(554.0))
    assert upper == pytest.approx(553.5 - 159.5)


def test_sketch_bounds_of_nothing():
    nothing, zero = np.full((2, 4), -np.inf), np.zeros((2, 4))
    assert (bounds.sketch_upper(xp, nothing, zero, np.zeros(2)) == -np.inf).all()
    assert (bounds.sketch_lower(xp, nothing, zero, np.zeros(2)) == -np.inf).all()


@LAWS
@given(st.floats(-700, 700), st.floats(-700, 700))
def test_dropped_mass_is_at_least_its_definition(kept, dropped):
    delta = float(bounds.dropped_mass(xp, np.asarray(kept), np.asarray(dropped)))
    exact = math.exp(dropped - np.logaddexp(kept, dropped))
    assert exact <= delta <= 1
    assert delta > 0


@pytest.mark.parametrize(
    ("kept", "dropped", "wanted"),
    [
        (0.0, -math.inf, 0.0),
        (-math.inf, -math.inf, 0.0),
        (-math.inf, 3.0, 1.0),
        (math.nan, 0.0, 1.0),
        (0.0, math.nan, 1.0),
        (0.0, math.inf, 1.0),
        (math.inf, math.inf, 1.0),
        (500.0, -500.0, 2.0**-126),
    ],
)
def test_dropped_mass_at_the_edges(kept, dropped, wanted):
    with np.errstate(invalid="ignore"):
        assert float(bounds.dropped_mass(xp, np.float32(kept), np.float32(dropped))) == wanted
    torch_kept, torch_dropped = torch.tensor(kept, dtype=torch.float32), torch.tensor(dropped, dtype=torch.float32)
    assert float(bounds.dropped_mass(_torch(), torch_kept, torch_dropped)) == wanted


def test_dropped_mass_rises_with_what_is_dropped_and_falls_with_what_is_kept():
    level = np.linspace(-60, 60, 241)
    rising = bounds.dropped_mass(xp, np.asarray(0.0), level)
    falling = bounds.dropped_mass(xp, level, np.asarray(0.0))
    assert (np.diff(rising) >= 0).all()
    assert (np.diff(falling) <= 0).all()


def test_rounding_goes_outward():
    x = np.asarray([-100.0, -1.0, 0.0, 5.0, -np.inf])
    assert (bounds.round_up(xp, x, 0.0)[:4] > x[:4]).all()
    assert (bounds.round_down(xp, x, 0.0)[:4] < x[:4]).all()
    assert bounds.round_up(xp, x, 0.0)[4] == bounds.round_down(xp, x, 0.0)[4] == -np.inf
    assert (bounds.kept_mass(xp, x, margin=0.0, additions=10)[:4] < x[:4]).all()
    assert (
        bounds.kept_mass(xp, x, margin=0.0, additions=10, rounding=bounds.Rounding(rounded_probabilities=True))[:4]
        < x[:4] - 2.0**-9
    ).all()


@LAWS
@given(st.floats(0, 1), st.integers(1, 500), st.floats(0.001, 0.5))
def test_kl_limit_solves_its_equation(mean, samples, alpha):
    limit = float(bounds.kl_upper_limit(xp, np.asarray(mean), samples, alpha))
    assert mean <= limit <= 1
    target = math.log(1 / alpha) / samples
    if limit < 1 - 1e-9 and mean < 1:
        left = mean * math.log(mean / limit) if mean > 0 else 0.0
        assert left + (1 - mean) * math.log((1 - mean) / (1 - limit)) == pytest.approx(target, rel=1e-6, abs=1e-9)
    if mean == 0:
        assert limit == pytest.approx(1 - alpha ** (1 / samples), rel=1e-6)


@pytest.mark.parametrize(("samples", "p", "alpha"), [(5, 0.3, 0.1), (20, 0.05, 0.05), (50, 0.6, 0.05), (256, 0.01, 0.2)])
def test_kl_limit_covers(samples, p, alpha):
    hits = np.random.default_rng(1).binomial(samples, p, size=20_000)
    limit = bounds.kl_upper_limit(xp, hits / samples, samples, alpha)
    assert (limit >= p).mean() >= 1 - alpha - 0.005
