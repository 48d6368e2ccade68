"""The kernel gate on every instruction set against the reference: the same choice, but where estimates tie within rounding."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import attention, native, pipeline
from sieve_attn import geometry as g
from sieve_attn.patterns import Sinks, Window
from sieve_attn.policies import Adaptive, Aether, Policy, TopBlocks
from sieve_attn.scores import Euclidean, KeySketch, Mean
from sieve_attn.selection import Certified, Mass, RelativeThreshold, TargetSparsity, Threshold, TopK
from sieve_attn.selection import native as gate
from sieve_attn.testing import GENERATORS, Shape, choices
from sieve_attn.testing.choices import reference, tiles_of
from sieve_attn.testing.contracts import coins
from sieve_attn.testing.strategies import gaussian, generators, seeds
from sieve_attn.types import Call

pytestmark = pytest.mark.skipif(bool(native.missing()), reason="pure-Python installation")

LAWS = settings(max_examples=60, deadline=None, derandomize=True)
LEVELS = native.module().levels() if not native.missing() else []
SCORERS = (
    KeySketch(4, query_bits=8), KeySketch(1, query_bits=8), KeySketch(7, query_bits=8), KeySketch(8, query_bits=8), KeySketch(2),
    KeySketch(5, query_bits=8), KeySketch(6, query_bits=8), KeySketch(8), Mean(), Euclidean(),
)  # fmt: skip
SELECTORS = (
    TopK(2), TopK(5), TargetSparsity(0.7), Threshold(1.5), Threshold(math.inf), Threshold(-math.inf), RelativeThreshold(1.0),
    Mass(0.8), Mass(0.999), Mass(1.0), Mass(0.0),
)  # fmt: skip
KEEPS = (None, Sinks(3), Window(9), Sinks(5) | Window(20))


@pytest.fixture(params=LEVELS, autouse=True)
def level(request):
    native.module().force_level(request.param)
    yield request.param
    native.module().force_level("")


def assert_same_choice(call, policy, geometry=None):
    geometry = g.build(call.key, policy.block_size, policy.statistics, key_mask=call.key_mask) if geometry is None else geometry
    assert gate.why_not(call, geometry, policy, False) == ()
    selection, counts, dense = gate.select(call, geometry, policy)
    choices.assert_same_choice((selection, counts, pipeline.fallbacks(policy, *counts, dense)), call, geometry, policy)


@st.composite
def cases(draw):
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    q_len = draw(st.one_of(st.integers(1, 15), st.integers(16, 140)))
    kv_len = draw(st.integers(1, 400)) if draw(st.booleans()) else q_len
    dim = draw(st.sampled_from([8, 17, 64, 80, 130]))
    shape = Shape(draw(st.integers(1, 2)), kv_heads * group, kv_heads, q_len, kv_len, dim, 3)
    block_size = draw(st.sampled_from([1, 4, 16, 24, 64]))
    query_tile = draw(st.sampled_from([8, 16, 33, 64]))
    policy = Policy(
        draw(st.sampled_from(SCORERS)), draw(st.sampled_from(SELECTORS)), draw(st.sampled_from(KEEPS)), block_size=block_size,
        query_tile=query_tile, query_stride=draw(st.sampled_from([1, 3, 4])), share_group=draw(st.booleans()),
    )  # fmt: skip
    options = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 60))
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.sampled_from([2.0, 20.0]))
    if 1 < q_len == kv_len and draw(st.booleans()):
        inner = sorted(draw(st.sets(st.integers(1, q_len - 1), max_size=4)))
        options["cu_seqlens"] = torch.tensor([0, *inner, q_len])
    return shape, policy, options


@LAWS
@given(
    cases(), generators(), seeds(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.booleans(), st.booleans()
)
def test_kernels_choose_what_the_reference_chooses(case, name, seed, dtype, masked, poisoned):
    shape, policy, options = case
    q, k, v = GENERATORS[name](seed, shape, dtype)
    if poisoned:
        k = k.clone()
        k[..., :1][coins(seed, 0.03, *k.shape[:3])[..., None]] = torch.nan
    if masked:
        options = {**options, "key_mask": coins(seed, 0.6, shape.batch, shape.kv_len)}
    assert_same_choice(Call(q, k, v, scale=shape.dim**-0.5, **options), policy)


@pytest.mark.parametrize("dim", [64, 128, 200])
@pytest.mark.parametrize("causal", [False, True])
def test_long_calls(dim, causal):
    q, k, v = gaussian(3, Shape(1, 4, 2, 500, 1500, dim, 3), torch.bfloat16)
    call = Call(q, k, v, causal=causal, scale=dim**-0.5)
    for policy in (TopBlocks(16), Adaptive(0.8), Aether(3.0, 64), Policy(Mean(), TopK(4), block_size=64)):
        assert_same_choice(call, policy)


def test_queries_that_are_not_numbers():
    q, k, v = gaussian(3, Shape(1, 2, 2, 70, 200, 16, 3))
    q[0, 0, 5, 3], q[0, 1, 69] = torch.nan, torch.inf
    for scorer in (KeySketch(4, query_bits=8), KeySketch(8, query_bits=8)):
        for selector in (TopK(3), Mass(0.7), RelativeThreshold(0.5), Threshold(1.0)):
            assert_same_choice(Call(q, k, v, causal=True, scale=0.25), Policy(scorer, selector, query_tile=16))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_largest_products_fit_their_sums(bits):
    """All channels at the ends of their codes, all queries at 127: sums of integers are as large as they become."""
    signs = torch.where(coins(5, 0.5, 1, 1, 320, 1), 1.0, -1.0)
    k = (signs * torch.linspace(0.5, 2.0, 320)[:, None]).expand(1, 1, 320, 128).contiguous()
    q = torch.where(coins(6, 0.5, 1, 1, 48, 1), 1.0, -1.0).expand(1, 1, 48, 128).contiguous()
    for selector in (TopK(3), Mass(0.5)):
        policy = Policy(KeySketch(bits, query_bits=8), selector, block_size=4, query_tile=16)
        assert_same_choice(Call(q, k, k, scale=0.05), policy)


def test_logits_far_apart():
    """Far beyond what one exponent holds: every block keeps a reference of its own."""
    q, k, v = gaussian(3, Shape(1, 2, 2, 64, 640, 16, 3))
    k *= torch.linspace(0.1, 60, 640)[:, None]
    call = Call(20 * q, k, v, scale=0.25)
    for selector in (TopK(4), TopK(20), Mass(0.9), RelativeThreshold(100.0)):
        assert_same_choice(call, Policy(KeySketch(4, query_bits=8), selector, query_tile=16))


def test_ties_go_to_the_smaller_index():
    q, k, v = gaussian(1, Shape(1, 2, 1, 64, 512, 64, 3))
    k = k[:, :, :16].repeat(1, 1, 32, 1)
    for scorer in (KeySketch(4, query_bits=8), KeySketch(3), Mean(), Euclidean()):
        policy = Policy(scorer, TopK(5), query_stride=4)
        # the channel scale is fixed by the first keys, so equal keys have equal codes
        found = tiles_of(pipeline.select(Call(q, k, v, scale=0.125), g.build(k, 16, policy.statistics), policy))
        assert found.nonzero()[:, 3].tolist() == [0, 1, 2, 3, 4]


def test_no_query_looks_ahead():
    """Nothing after a tile of queries changes a bit of its choice."""
    q, k, v = gaussian(6, Shape(1, 4, 2, 400, 400, 64, 8))
    for policy in (
        TopBlocks(3, sinks=4, window=8), Adaptive(0.9), Adaptive(0.9, bits=8), Aether(1.0, 16),
        Policy(Mean(), TargetSparsity(0.6)),
        Policy(KeySketch(2), RelativeThreshold(0.7), block_size=24), Policy(KeySketch(3), TopK(2), query_tile=16, block_size=4),
    ):  # fmt: skip
        tile = policy.query_tile
        for stop in (2 * tile, 4 * tile):
            other_q, other_k = q.clone(), k.clone()
            other_q[:, :, stop:] = torch.nan
            other_k[:, :, stop:] = 50 * other_k[:, :, stop:].flip(2)
            found = []
            for a, b in ((q, k), (other_q, other_k)):
                call = Call(a, b, v, causal=True, scale=0.125)
                geometry = g.build(b, policy.block_size, policy.statistics)
                assert gate.why_not(call, geometry, policy, False) == ()
                found.append(tiles_of(pipeline.select(call, geometry, policy))[:, :, : stop // tile])
            assert torch.equal(*found), policy


def test_early_queries_read_the_keys_themselves():
    """Before the channel scale is known, the sketch would tell of keys to come."""
    q, k, v = gaussian(6, Shape(1, 2, 1, 100, 100, 16, 8))
    policy = Policy(KeySketch(2, query_bits=8), TopK(2), block_size=4, query_tile=8)
    other = k.clone()
    other[:, :, 40:, ::2] *= 30
    found = [
        tiles_of(pipeline.select(Call(q, keys, v, causal=True, scale=0.25), g.build(keys, 4, policy.statistics), policy))[
            :, :, :5
        ]
        for keys in (k, other)
    ]
    assert torch.equal(*found)


def test_a_prefill_in_chunks_chooses_what_one_prefill_would():
    q, k, v = gaussian(6, Shape(1, 4, 2, 320, 320, 16, 8))
    for policy in (TopBlocks(3, sinks=4, window=8), Adaptive(0.9), Aether(1.0, 16), Policy(KeySketch(4), TargetSparsity(0.7))):
        whole = pipeline.select(Call(q, k, v, causal=True, scale=0.25), g.build(k, 16, policy.statistics), policy)
        dense = whole[0].to_dense(q)
        for start, stop in ((64, 128), (128, 320), (100, 320)):
            call = Call(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], causal=True, scale=0.25)
            part = pipeline.select(call, g.build(call.key, 16, policy.statistics), policy)
            first = -(-start // policy.query_tile) * policy.query_tile  # a tile that is cut asks fewer queries
            assert torch.equal(part[0].to_dense(q)[:, :, first - start :], dense[:, :, first:stop, :stop])


def test_thread_counts_change_no_bit():
    q, k, v = gaussian(6, Shape(2, 4, 2, 700, 700, 64, 8))
    call = Call(q, k, v, causal=True, scale=0.125)
    for policy in (TopBlocks(9), Adaptive(0.9), Policy(Mean(), TopK(3))):
        geometry = g.build(k, 16, policy.statistics)
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            try:
                found.append(pipeline.select(call, geometry, policy))
            finally:
                torch.set_num_threads(1)
        for other in found[1:]:
            assert torch.equal(other[0].blocks.row_ptr, found[0][0].blocks.row_ptr)
            assert torch.equal(other[0].blocks.block_index, found[0][0].blocks.block_index)
            assert torch.equal(other[1][0], found[0][1][0])


def test_turning_dense_is_counted():
    q, k, v = gaussian(6, Shape(1, 4, 2, 320, 320, 16, 8))
    call = Call(q, k, v, causal=True, scale=0.25)
    policy = Adaptive(0.95, dense_above=0.6)
    geometry = g.build(k, 16, policy.statistics)
    got, wanted = pipeline.select(call, geometry, policy), reference(call, geometry, policy)
    assert got[2] == wanted[2]
    assert got[2][0].count > 0
    assert torch.equal(tiles_of(got), tiles_of(wanted))


def test_what_kernels_do_not_know_goes_to_the_reference():
    q, k, v = gaussian(6, Shape(1, 2, 2, 64, 64, 16, 8))
    call, policy = Call(q, k, v, scale=0.25), TopBlocks(2)
    geometry = g.build(k, 16, policy.statistics)
    assert gate.why_not(call, geometry, policy, False) == ()
    declined = {
        "a bias": (Call(q, k, v, scale=0.25, bias=torch.zeros(1, 1, 64, 64)), policy, False),
        "a mask": (Call(q, k, v, scale=0.25, mask=torch.ones(1, 1, 64, 64, dtype=torch.bool)), policy, False),
        "every query": (call, policy, True),
        "float64": (Call(q.double(), k.double(), v.double(), scale=0.25), policy, False),
    }
    for words, (other, rule, per_query) in declined.items():
        assert any(words in reason for reason in gate.why_not(other, geometry, rule, per_query)), words


def test_the_report_says_who_chose():
    q, k, v = gaussian(6, Shape(1, 2, 2, 64, 64, 16, 8))
    for options, wanted in (({}, "native"), ({"backend": "reference"}, "reference"), ({"per_query": True}, "reference")):
        assert attention(q, k, v, TopBlocks(1), return_report=True, **options)[1].selected_by == wanted
    assert attention(q, k, v, return_report=True)[1].selected_by == ""


@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"window": 40}, {}], ids=str)
@pytest.mark.parametrize(("queries", "keys", "size"), [(1, 40, 16), (1, 500, 24), (3, 500, 16), (1, 500, 16)])
def test_no_step_of_decoding_falls_back(options, queries, keys, size):
    """Caps, blocks that the scan does not take, and the first tokens, which calibrate the sketch, have kernels too."""
    q, k, v = gaussian(6, Shape(1, 4, 2, queries, keys, 16, 8))
    for selector in (TopK(2), Mass(0.8), Certified(0.1)):
        policy = Policy(KeySketch(8), selector, block_size=size)
        _, report = attention(q, k, v, policy, causal=True, return_report=True, **options)
        assert report.selected_by == "native"
        assert report.certificate.dropped_mass.max() <= (0.1 if selector.needs_brackets else 1.0)


def test_a_wider_sketch_serves_by_its_leading_planes():
    q, k, v = gaussian(6, Shape(1, 4, 2, 300, 300, 64, 8))
    policy = TopBlocks(6, bits=3)
    assert_same_choice(Call(q, k, v, causal=True, scale=0.125), policy, g.build(k, 16, KeySketch(8).statistics))


def test_a_streamed_geometry_serves():
    q, k, v = gaussian(6, Shape(1, 4, 2, 300, 300, 64, 8))
    for policy in (TopBlocks(6), Aether(1.0, 16)):
        stream = g.Stream(16, policy.statistics)
        for stop in (100, 117, 300):
            geometry = stream.update(k[:, :, :stop])
        assert_same_choice(Call(q, k, v, causal=True, scale=0.125), policy, geometry)


def _runs_of_like_keys(queries=128, kv_len=17_000, dim=32, dtype=torch.bfloat16):
    """Long runs of nearly equal keys, and queries that point hard at one of them: what lies elsewhere weighs nothing."""
    torch.manual_seed(4)
    centres = torch.nn.functional.normalize(torch.randn(24, dim), dim=-1)
    keys = centres[torch.randint(24, (kv_len // 512 + 1,))].repeat_interleave(512, 0)[:kv_len]
    k = (10 * keys + 0.05 * torch.randn(kv_len, dim))[None, None]
    k[:, :, :64] = 2 * torch.randn(64, dim)  # keys of every kind fix the channel scale
    q = (60 * centres[torch.randint(24, (2, queries // 16))].repeat_interleave(16, 1) + 0.1 * torch.randn(2, queries, dim))[None]
    return q.to(dtype), k.to(dtype), k.to(dtype)


GROUPED = (
    Policy(KeySketch(4, query_bits=8), TopK(20), query_tile=16, query_stride=4),
    Policy(KeySketch(4), TargetSparsity(0.995), query_tile=16),
    Policy(KeySketch(8, query_bits=8), Mass(0.9), Sinks(20), query_tile=16),
)


@pytest.mark.parametrize("policy", GROUPED, ids=repr)
@pytest.mark.parametrize("options", [{"causal": True}, {}, {"causal": True, "softcap": 30.0}, {"window": 16_500}], ids=str)
def test_two_levels_choose_what_one_level_chooses(policy, options):
    q, k, v = _runs_of_like_keys()
    assert_same_choice(Call(q, k, v, scale=32**-0.5, **options), policy)


def test_groups_of_blocks_are_passed_over_where_they_weigh_nothing():
    q, k, v = _runs_of_like_keys()
    for policy in GROUPED:
        _, report = attention(q, k, v, policy, causal=True, return_report=True)
        assert report.computed.shape == report.visible.shape
        assert report.computed.sum() < 0.7 * report.visible.sum(), policy


def test_one_level_remains_where_everything_weighs_something():
    q, k, v = gaussian(2, Shape(1, 2, 1, 128, 17_000, 32, 8), torch.bfloat16)
    for policy in GROUPED:
        # sixteen rows a tile, so that no others can decide for them
        _, report = attention(q, k, v, replace(policy, share_group=False), causal=True, return_report=True)
        assert torch.equal(report.computed, report.visible)


SPREAD = (
    Policy(KeySketch(4, query_bits=8), Mass(0.9999)),
    Policy(KeySketch(4), Threshold(-9.0)),
    Policy(KeySketch(4, query_bits=8), RelativeThreshold(30.0), Sinks(20)),
    Policy(KeySketch(8), Certified(1e-4), Window(64)),
    Adaptive(0.95, dense_above=0.3),
)


@pytest.mark.parametrize("policy", SPREAD, ids=repr)
@pytest.mark.parametrize("options", [{"causal": True}, {}, {"window": 300}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_rows_that_have_nothing_to_add_are_passed_over(policy, options, masked):
    """Where attention is spread over everything, the first rows of a tile decide for all of them."""
    q, k, v = gaussian(8, Shape(1, 4, 2, 512, 512, 32, 8))
    if masked:
        present = torch.ones(1, 512, dtype=torch.bool)
        present[:, 100:180] = False
        options = options | {"key_mask": present}
    assert_same_choice(Call(q, k, v, scale=32**-0.5, **options), policy)
    _, report = attention(q, k, v, policy, return_report=True, **options)
    assert report.selected_by == "native"
    assert torch.equal(report.kept, report.visible)
    assert report.computed.sum() < 0.4 * report.visible.sum()


def test_a_choice_that_reaches_beyond_the_groups_looked_at_is_made_again():
    """More blocks are asked for than have any weight: the rest is ranked by shares that are next to nothing."""
    q, k, v = _runs_of_like_keys()
    policy = Policy(KeySketch(4, query_bits=8), TopK(700), query_tile=16, query_stride=4)
    call = Call(q, k, v, scale=32**-0.5, causal=True)
    assert_same_choice(call, policy)


def test_what_is_passed_over_changes_no_share():
    """A fifth of what some queries look at lies far away: left out, it would raise their blocks above others'."""
    q, k, v = _runs_of_like_keys()
    pull = torch.tensor([0.05, 1.0, 0.06, 0.05]).repeat_interleave(4).repeat(8)
    for blocks in (24, 40, 56):
        policy = Policy(KeySketch(8, query_bits=8), TopK(blocks), query_tile=16, query_stride=1)
        assert_same_choice(Call((q * pull[:, None]).to(q.dtype), k, v, scale=32**-0.5, causal=True), policy)
