"""Every scorer of the table keeps the scorer laws; the formulas equal their definitions."""

import math

import pytest
import torch

from sieve_attn import geometry as stage_geometry
from sieve_attn import scores
from sieve_attn.scores import Bound, Box, Euclidean, EventRadar, Exact, Heuristic, KeySketch, Mean, Random, SubMeans, Tightest
from sieve_attn.testing import BoundContract, ScorerContract, Shape, assert_close
from sieve_attn.testing.contracts import a_call

EXAMPLES = {
    "tightest": Tightest((Euclidean(), Box(), KeySketch(4))),
    "event_radar": EventRadar(use_variance=True, use_concentration=True, recency_decay=0.9),
}
MORE = {
    "key_sketch, 1 bit": KeySketch(1),
    "key_sketch, 8 bits": KeySketch(8),
    "key_sketch, int8 queries": KeySketch(8, query_bits=8),
    "event_radar, legacy": EventRadar(recency_decay=0.9, recency="legacy"),
}


def example(name):
    return EXAMPLES.get(name) or MORE.get(name) or scores.TABLE[name]()


EVERY = [*scores.TABLE, *MORE]
BOUNDS = [name for name in EVERY if isinstance(example(name), scores.Bound)]


@pytest.mark.parametrize("name", [name for name in EVERY if name not in BOUNDS], scope="class")
class TestEveryHeuristic(ScorerContract):
    @pytest.fixture(autouse=True)
    def _given(self, name):
        self.scorer = example(name)


@pytest.mark.parametrize("name", BOUNDS, scope="class")
class TestEveryBound(BoundContract):
    @pytest.fixture(autouse=True)
    def _given(self, name):
        self.scorer = example(name)


def score(scorer, call, block_size=8, **options):
    geometry = stage_geometry.build(call.key, block_size, scorer.statistics, value=call.value, key_mask=call.key_mask)
    return scorer.score(call.rows(0, call.q_len), geometry, **options)


def naive(call, per_block):
    """``per_block(q, keys of the block)`` for every (query, block) of a plain call, in fp64."""
    q, k = call.query.double(), call.key.double().repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    blocks = [k[:, :, i : i + 8] for i in range(0, k.shape[2], 8)]
    rows = [
        [[[per_block(q[b, h, i], block[b, h]) for block in blocks] for i in range(q.shape[2])] for h in range(q.shape[1])]
        for b in range(q.shape[0])
    ]
    return torch.tensor(rows, dtype=torch.float64)


def test_estimates_are_what_their_definitions_say():
    call = a_call(Shape(1, 2, 1, 3, 29, 8, 4), dtype=torch.float64)
    s = call.scale

    def ball(q, keys):
        mu = keys.mean(0)
        return float(s * (q @ mu + q.norm() * (keys - mu).norm(dim=1).max()))

    def box(q, keys):
        return float(s * torch.maximum(q * keys.amin(0), q * keys.amax(0)).sum())

    def radar(q, keys):
        unit = keys / keys.norm(dim=1, keepdim=True)
        centre = unit.mean(0) / unit.mean(0).norm()
        apart = (unit - centre).norm(dim=1)
        together = (unit @ centre).mean().clamp(0.1, 1)
        return float(s * (q @ centre + q.norm() * apart.max() * (1 + apart.square().mean().sqrt()) * together))

    def halves(q, keys):
        return float(torch.logsumexp(torch.stack([len(p) ** 0 * math.log(len(p)) + s * q @ p.mean(0) for p in keys.split(4)]), 0))

    wanted = {
        Euclidean(): ball,
        Box(): box,
        EventRadar(True, True): radar,
        SubMeans(4): halves,
        Mean(): lambda q, keys: float(math.log(len(keys)) + s * q @ keys.mean(0)),
        Exact(): lambda q, keys: float(torch.logsumexp(s * keys @ q, 0)),
    }
    for scorer, definition in wanted.items():
        got, exact = score(scorer, call).estimate, naive(call, definition)
        assert torch.allclose(got, exact, rtol=1e-5, atol=1e-6), type(scorer).__name__


def test_event_radar_never_claims_to_be_a_bound():
    assert issubclass(EventRadar, Heuristic)
    assert not issubclass(EventRadar, Bound)


def test_recency_favours_recent_blocks():
    call = a_call(Shape(1, 1, 1, 1, 40, 8, 4), "all_zero", causal=True)
    additive = score(EventRadar(recency_decay=0.9), call).estimate[0, 0, 0]
    assert_close(additive, math.log(0.9) * torch.arange(4, -1, -1.0), dtype=torch.float32)
    assert (additive.diff() > 0).all()


def test_more_bits_bracket_tighter():
    call = a_call(Shape(1, 4, 2, 16, 128, 32, 4))
    widths = []
    for bits in (1, 2, 4, 8):
        found = score(KeySketch(bits), call, 16, brackets=True)
        widths.append(float((found.upper - found.lower).mean()))
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.2


def test_the_first_planes_of_a_sketch_rank_on_their_own():
    call = a_call(Shape(1, 4, 2, 16, 128, 32, 4))
    eight = stage_geometry.build(call.key, 16, KeySketch(8).statistics)
    rows = call.rows(0, 16)
    exact = Exact().estimate(rows, eight)
    two, four = (KeySketch(bits).estimate(rows, eight) for bits in (2, 4))
    assert (four - exact).abs().mean() < (two - exact).abs().mean() < 1.5
    # the error that is stored belongs to all planes, so a proof uses all of them
    few, all_planes = (KeySketch(bits).score(rows, eight, brackets=True) for bits in (2, 8))
    assert torch.equal(few.upper, all_planes.upper)


def test_tightest_is_the_tighter_of_its_bounds():
    call = a_call(Shape(1, 4, 2, 16, 128, 32, 4))
    parts = [score(b, call, 16, brackets=True) for b in (Euclidean(), Box())]
    both = score(Tightest((Euclidean(), Box())), call, 16, brackets=True)
    assert torch.equal(both.upper, torch.minimum(parts[0].upper, parts[1].upper))
    assert torch.equal(both.lower, torch.maximum(parts[0].lower, parts[1].lower))


def test_random_scores_depend_on_the_position_alone():
    call = a_call(Shape(1, 2, 1, 20, 60, 8, 4), causal=True)
    geometry = stage_geometry.build(call.key, 8)
    whole = Random().estimate(call.rows(0, 20), geometry)
    assert torch.equal(Random().estimate(call.rows(7, 9), geometry), whole[:, :, 7:9])
    assert not torch.equal(Random(1).estimate(call.rows(0, 20), geometry), whole)


def test_scores_stay_fp32_for_half_precision():
    call = a_call(Shape(1, 2, 1, 4, 32, 8, 4), dtype=torch.bfloat16)
    for name in scores.TABLE:
        assert score(example(name), call).estimate.dtype == torch.float32
