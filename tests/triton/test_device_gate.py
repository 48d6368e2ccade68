"""The gate on the device against the reference: the same choice, but where estimates tie within rounding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import geometry as g
from sieve_attn import pipeline
from sieve_attn.patterns import Primes, Sinks, Window
from sieve_attn.policies import Adaptive, Aether, Certified, Policy, TopBlocks
from sieve_attn.scores import Box, Euclidean, KeySketch, Mean
from sieve_attn.selection import Mass, RelativeThreshold, TargetSparsity, Threshold, TopK
from sieve_attn.selection import triton as gate
from sieve_attn.selection.triton import launch
from sieve_attn.testing import GENERATORS, Shape, choices
from sieve_attn.testing.choices import tiles_of
from sieve_attn.testing.contracts import coins
from sieve_attn.testing.strategies import gaussian, generators, seeds
from sieve_attn.types import Call

LAWS = settings(max_examples=15, deadline=None, derandomize=True)
SCORERS = (KeySketch(4, query_bits=8), KeySketch(7, query_bits=8), KeySketch(8, query_bits=8), KeySketch(2), Mean(), Euclidean())
SELECTORS = (
    TopK(2), TopK(5), TargetSparsity(0.7), Threshold(1.5), Threshold(math.inf), Threshold(-math.inf), RelativeThreshold(1.0),
    Mass(0.8), Mass(0.999), Mass(1.0), Mass(0.0),
)  # fmt: skip
KEEPS = (None, Sinks(3), Window(9), Sinks(5) | Window(20))


def select(call, geometry, policy):
    assert gate.why_not(call, geometry, policy, False, named=True) == ()
    return pipeline.select(call, geometry, policy, backend="triton")


def build(call, policy):
    return g.build(call.key, policy.block_size, policy.statistics, key_mask=call.key_mask)


def assert_same_choice(call, policy, geometry=None):
    geometry = build(call, policy) if geometry is None else geometry
    choices.assert_same_choice(select(call, geometry, policy), call, geometry, policy)


@st.composite
def cases(draw):
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    q_len = draw(st.sampled_from([1, 3, 16, 40, 90]))
    kv_len = draw(st.integers(1, 260)) if draw(st.booleans()) else q_len
    shape = Shape(1, kv_heads * group, kv_heads, q_len, kv_len, draw(st.sampled_from([8, 17, 64])), 3)
    policy = Policy(
        draw(st.sampled_from(SCORERS)), draw(st.sampled_from(SELECTORS)), draw(st.sampled_from(KEEPS)),
        block_size=draw(st.sampled_from([1, 16, 24, 64])), query_tile=draw(st.sampled_from([8, 33, 64])),
        query_stride=draw(st.sampled_from([1, 3, 4])), share_group=draw(st.booleans()),
    )  # fmt: skip
    options = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 60))
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.sampled_from([2.0, 20.0]))
    if q_len == kv_len and q_len > 1 and draw(st.booleans()):
        inner = sorted(draw(st.sets(st.integers(1, q_len - 1), max_size=4)))
        options["cu_seqlens"] = torch.tensor([0, *inner, q_len])
    return shape, policy, options


@LAWS
@given(cases(), generators(), seeds(), st.sampled_from([torch.float32, torch.float16]), st.booleans(), st.booleans())
def test_the_device_chooses_what_the_reference_chooses(case, name, seed, dtype, masked, poisoned):
    shape, policy, options = case
    q, k, v = GENERATORS[name](seed, shape, dtype)
    if poisoned:
        k = k.clone()
        k[..., :1][coins(seed, 0.03, *k.shape[:3])[..., None]] = torch.nan
    if masked:
        options = {**options, "key_mask": coins(seed, 0.6, shape.batch, shape.kv_len)}
    assert_same_choice(Call(q, k, v, scale=shape.dim**-0.5, **options), policy)


@pytest.mark.parametrize("causal", [False, True])
def test_long_calls(causal):
    q, k, v = gaussian(3, Shape(1, 2, 1, 100, 700, 64, 3), torch.float16)
    for policy in (TopBlocks(9), Policy(Mean(), TopK(4), block_size=64)):
        assert_same_choice(Call(q, k, v, causal=causal, scale=0.125), policy)


@pytest.mark.parametrize("causal", [False, True])
def test_decoding(causal):
    q, k, v = gaussian(3, Shape(2, 4, 2, 2, 700, 32, 3), torch.float16)
    for policy in (TopBlocks(9, bits=2), Adaptive(0.8), Policy(KeySketch(4), TopK(5))):
        assert_same_choice(Call(q, k, v, causal=causal, scale=0.125), policy)
    assert_same_choice(Call(q[:, :, :1], k, v, causal=causal, scale=0.125), TopBlocks(16))


def test_chunks_of_units_change_nothing(monkeypatch):
    q, k, v = gaussian(3, Shape(2, 4, 2, 130, 130, 16, 3))
    call, policy = Call(q, k, v, causal=True, scale=0.25), TopBlocks(2, sinks=1, window=4)
    geometry = build(call, policy)
    whole = select(call, geometry, policy)
    for name, value in (("MOST_UNITS", 5), ("INDEX_BYTES", 0)):
        monkeypatch.setattr(launch, name, value)
        part = select(call, geometry, policy)
        assert torch.equal(part[0].blocks.row_ptr, whole[0].blocks.row_ptr)
        assert torch.equal(part[0].blocks.listed.block_index, whole[0].blocks.listed.block_index)
    # lists whose room would be too large are as long as they are
    assert part[0].blocks.block_index.shape[0] == int(part[0].blocks.row_ptr[-1]) < whole[0].blocks.block_index.shape[0]


def test_splits_of_the_keys_change_nothing(monkeypatch):
    q, k, v = gaussian(3, Shape(1, 4, 2, 1, 900, 16, 3))
    call = Call(q, k, v, scale=0.25)
    for policy in (TopBlocks(5), Adaptive(0.5), Policy(Mean(), RelativeThreshold(0.5))):
        geometry = build(call, policy)
        found = []
        for programs in (1, 64):
            monkeypatch.setattr(launch, "PROGRAMS", programs)
            found.append(tiles_of(select(call, geometry, policy)))
        assert torch.equal(*found)


def test_room_to_spare_means_nothing():
    """What lies behind the last entry is never read: a list that a device made serves like an exact one."""
    q, k, v = gaussian(3, Shape(1, 4, 2, 100, 300, 16, 3))
    call, policy = Call(q, k, v, causal=True, scale=0.25), TopBlocks(2)
    blocks = select(call, build(call, policy), policy)[0].blocks
    entries = int(blocks.row_ptr[-1])
    assert entries < blocks.block_index.shape[0]
    blocks.block_index[entries:] = 10**9
    exact = blocks.listed
    assert exact.block_index.shape[0] == entries
    assert torch.equal(blocks.to_tiles(), exact.to_tiles())
    assert torch.equal(blocks.rows(3, 50, q), exact.rows(3, 50, q))
    for a, b in zip(blocks.to_padded(), exact.to_padded(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert torch.equal(blocks.union(exact).block_index, exact.block_index)


def test_queries_that_are_not_numbers():
    q, k, v = gaussian(3, Shape(1, 2, 2, 70, 200, 16, 3))
    q[0, 0, 5, 3], q[0, 1, 69] = torch.nan, torch.inf
    for selector in (TopK(3), Mass(0.7), RelativeThreshold(0.5), Threshold(1.0)):
        assert_same_choice(Call(q, k, v, causal=True, scale=0.25), Policy(KeySketch(4, query_bits=8), selector, query_tile=16))


def test_logits_far_apart():
    q, k, v = gaussian(3, Shape(1, 2, 2, 64, 640, 16, 3))
    k *= torch.linspace(0.1, 60, 640)[:, None]
    for selector in (TopK(4), Mass(0.9), RelativeThreshold(100.0)):
        assert_same_choice(Call(20 * q, k, v, scale=0.25), Policy(KeySketch(4, query_bits=8), selector, query_tile=16))


def test_ties_go_to_the_smaller_index():
    q, k, v = gaussian(1, Shape(1, 2, 1, 64, 512, 64, 3))
    k = k[:, :, :16].repeat(1, 1, 32, 1)
    for scorer in (KeySketch(4, query_bits=8), KeySketch(3), Mean(), Euclidean()):
        policy = Policy(scorer, TopK(5), query_stride=4)
        found = tiles_of(select(Call(q, k, v, scale=0.125), g.build(k, 16, policy.statistics), policy))
        assert found.nonzero()[:, 3].tolist() == [0, 1, 2, 3, 4]


def test_no_query_looks_ahead():
    """Nothing after a tile of queries changes a bit of its choice."""
    q, k, v = gaussian(6, Shape(1, 2, 1, 150, 150, 32, 8))
    for policy in (
        TopBlocks(3, sinks=4, window=8), Aether(1.0, 16), Policy(KeySketch(3), TopK(2), query_tile=16, block_size=4),
    ):  # fmt: skip
        stop, tile = 128, policy.query_tile
        other_q, other_k = q.clone(), k.clone()
        other_q[:, :, stop:] = torch.nan
        other_k[:, :, stop:] = 50 * other_k[:, :, stop:].flip(2)
        found = []
        for a, b in ((q, k), (other_q, other_k)):
            call = Call(a, b, v, causal=True, scale=0.125)
            found.append(tiles_of(select(call, build(call, policy), policy))[:, :, : stop // tile])
        assert torch.equal(*found), policy


def test_early_queries_read_the_keys_themselves():
    q, k, v = gaussian(6, Shape(1, 2, 1, 100, 100, 16, 8))
    policy = Policy(KeySketch(2, query_bits=8), TopK(2), block_size=4, query_tile=8)
    other = k.clone()
    other[:, :, 40:, ::2] *= 30
    found = []
    for keys in (k, other):
        call = Call(q, keys, v, causal=True, scale=0.25)
        assert_same_choice(call, policy)
        found.append(tiles_of(select(call, build(call, policy), policy))[:, :, :5])
    assert torch.equal(*found)


def test_turning_dense_is_counted_and_only_when_it_is_read(monkeypatch):
    q, k, v = gaussian(6, Shape(1, 2, 1, 128, 128, 16, 8))
    call = Call(q, k, v, causal=True, scale=0.25)
    policy = Adaptive(0.95, dense_above=0.6)
    assert_same_choice(call, policy)
    got = select(call, build(call, policy), policy)
    assert got[2][0].count > 0
    asked = []
    real = pipeline.fallbacks
    monkeypatch.setattr(pipeline, "fallbacks", lambda *a: asked.append(1) or real(*a))
    report = pipeline.attention(q, k, v, policy, causal=True, scale=0.25, return_report=True)[1]
    assert not asked
    assert report.fallbacks == pipeline.select(call, build(call, policy), policy)[2]
    assert report.fallbacks is report.fallbacks


def test_a_wider_sketch_serves_by_its_leading_planes():
    q, k, v = gaussian(6, Shape(1, 4, 2, 100, 100, 32, 8))
    for q_len in (100, 2):
        call = Call(q[:, :, -q_len:], k, v, causal=True, scale=0.125)
        assert_same_choice(call, TopBlocks(3, bits=3), g.build(k, 16, KeySketch(8).statistics))
        assert_same_choice(call, TopBlocks(3, bits=6), g.build(k, 16, KeySketch(8).statistics))


def test_a_streamed_geometry_serves():
    q, k, v = gaussian(6, Shape(1, 4, 2, 30, 150, 32, 8))
    for policy in (TopBlocks(3), Aether(1.0, 16)):
        stream = g.Stream(16, policy.statistics)
        for stop in (100, 117, 150):
            geometry = stream.update(k[:, :, :stop])
        assert_same_choice(Call(q, k, v, causal=True, scale=0.125), policy, geometry)


def test_strides_do_not_matter():
    q, k, v = gaussian(6, Shape(2, 2, 2, 20, 90, 32, 8))
    policy = Policy(KeySketch(4, 8), TopK(2), block_size=4, query_tile=8)
    found = []
    for change in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT):
        call = Call(change(q), change(k), v, causal=True, scale=0.125)
        found.append(tiles_of(select(call, build(call, policy), policy)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_the_device_cannot_choose_is_said():
    q, k, v = gaussian(6, Shape(1, 2, 2, 64, 64, 16, 8))
    call, policy = Call(q, k, v, scale=0.25), TopBlocks(2)
    geometry = build(call, policy)
    assert gate.why_not(call, geometry, policy, False, named=True) == ()
    declined = {
        "a bias": (Call(q, k, v, scale=0.25, bias=torch.zeros(1, 1, 64, 64)), policy, False),
        "a mask": (Call(q, k, v, scale=0.25, mask=torch.ones(1, 1, 64, 64, dtype=torch.bool)), policy, False),
        "every query": (call, policy, True),
        "float64": (Call(q.double(), k.double(), v.double(), scale=0.25), policy, False),
        "bfloat16 wrongly": (Call(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale=0.25), policy, False),
        "positive scale": (Call(q, k, v, scale=-1.0), policy, False),
        "by Certified": (call, Certified(0.1), False),
        "by Box": (call, Policy(Box(), TopK(2)), False),
        "not Primes": (call, Policy(Mean(), TopK(2), Primes()), False),
        "queries a tile, not 300": (call, Policy(Mean(), TopK(2), query_tile=300), False),
        "keys a block, not 300": (call, Policy(Mean(), TopK(2), block_size=300), False),
    }
    for words, (other, rule, per_query) in declined.items():
        assert any(words in reason for reason in gate.why_not(other, geometry, rule, per_query, named=True)), words
    assert any("on cuda, not on cpu" in reason for reason in gate.why_not(call, geometry, policy, False))


def test_only_a_named_backend_takes_the_interpreter():
    q, k, v = gaussian(6, Shape(1, 2, 2, 64, 64, 16, 8))
    call, policy = Call(q, k, v, scale=0.25), TopBlocks(2)
    who = [pipeline._kernels(call, build(call, policy), policy, False, name)[0] for name in ("triton", "auto", "reference")]
    assert who[0] == "triton"
    assert who[1] in ("native", "reference")
    assert who[2] == "reference"
