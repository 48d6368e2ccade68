"""The gate of decoding: the blocks that the reference keeps, proofs that hold, on every level and any number of threads."""

from dataclasses import replace

import pytest
import torch

from sieve_attn import attention, geometry, native, pipeline
from sieve_attn.attend import native as kernels
from sieve_attn.certify import certify, true_dropped_mass
from sieve_attn.patterns import Sinks, Window
from sieve_attn.policies import Policy
from sieve_attn.scores import Euclidean, KeySketch, Mean
from sieve_attn.selection import Certified, Mass, RelativeThreshold, TargetSparsity, Threshold, TopK, native_scan
from sieve_attn.testing import choices
from sieve_attn.testing.strategies import Shape, clustered, gaussian, huge_norms, outlier_channels
from sieve_attn.types import Call, Statistics

pytestmark = pytest.mark.skipif(bool(native.missing()), reason="pure-Python installation")
LEVELS = native.module().levels() if not native.missing() else []
SHAPES = (
    Shape(2, 8, 2, 1, 613, 64, 64),
    Shape(1, 3, 3, 5, 400, 128, 32),
    Shape(1, 6, 2, 16, 517, 40, 40),
    Shape(1, 8, 1, 2, 300, 160, 16),
    Shape(1, 4, 2, 3, 330, 32, 16),
    Shape(1, 2, 2, 1, 290, 256, 16),
)
POLICIES = [(KeySketch(b, query_bits=8), TopK(7)) for b in (1, 2, 3, 4, 5, 6, 7, 8)] + [
    (KeySketch(4), TopK(9)), (KeySketch(2), TargetSparsity(0.7)), (KeySketch(4), Mass(0.9)), (KeySketch(4, 8), Mass(0.5)),
    (KeySketch(8), Threshold(0.2)), (KeySketch(3), RelativeThreshold(3.0)), (Mean(), TopK(5)), (Euclidean(), TopK(5)),
    (Euclidean(), Threshold(0.15)),
]  # fmt: skip
GRIDS = ((16, 64, 1, True), (32, 4, 4, False), (64, 64, 1, True))


@pytest.fixture(params=LEVELS)
def each_level(request):
    native.module().force_level(request.param)
    yield
    native.module().force_level("")


def options(name, s):
    torch.manual_seed(9)
    return {
        "causal": {"causal": True},
        "whole": {},
        "window": {"causal": True, "window": 90},
        "padding": {"causal": True, "key_mask": torch.rand(s.batch, s.kv_len) > 0.2},
        "sink": {"causal": True, "sink": torch.randn(s.q_heads)},
        "cap": {"causal": True, "softcap": 5.0},
    }[name]


def prepared(make, s, scorer, selector, grid, extra, dtype=torch.float32):
    block, tile, stride, shared = grid
    policy = Policy(
        scorer, selector, Sinks(3) | Window(20), block_size=block, query_tile=tile, query_stride=stride, share_group=shared
    )
    call = Call(*make(3, s, dtype), scale=s.dim**-0.5, **extra)
    asked = Statistics(sketch_bits=getattr(scorer, "bits", 0), radius=True, spectral=isinstance(scorer, KeySketch))
    return call, geometry.build(call.key, block, asked, key_mask=extra.get("key_mask")), policy


@pytest.mark.parametrize(("scorer", "selector"), POLICIES, ids=str)
@pytest.mark.parametrize("name", ["causal", "whole", "window", "padding", "sink", "cap"])
def test_the_reference_keeps_the_same_blocks(scorer, selector, name, each_level):
    for i, s in enumerate(SHAPES):
        make = (gaussian, clustered, outlier_channels, huge_norms)[i % 4]
        call, summary, policy = prepared(
            make, s, scorer, selector, GRIDS[i % 3], options(name, s), (torch.float32, torch.bfloat16)[i % 2]
        )
        assert not native_scan.why_not(call, summary, policy, False)
        found, (kept, visible), dense = native_scan.select(call, summary, policy)
        if name == "cap":
            # where a cap levels scores, rounding decides between them
            choices.assert_same_choice(pipeline.select(call, summary, policy), call, summary, policy)
            continue
        exact, (kept_, visible_), _ = pipeline.select(call, summary, policy, backend="reference")
        assert torch.equal(found.blocks.to_tiles(), exact.blocks.to_tiles())
        assert torch.equal(kept, kept_)
        assert torch.equal(visible, visible_)
        assert not dense.any()


@pytest.mark.parametrize("bits", [4, 8])
def test_planes_may_have_gaps(bits, each_level):
    call, summary, policy = prepared(clustered, SHAPES[0], KeySketch(bits), TopK(7), GRIDS[0], {"causal": True})
    planes = summary.sketch.planes
    wide = torch.full((*planes.shape[:-1], planes.shape[-1] + 3), 0xFF, dtype=torch.uint8)
    wide[..., : planes.shape[-1]] = planes
    gaps = replace(summary, sketch=replace(summary.sketch, planes=wide[..., : planes.shape[-1]]))
    found, want = (native_scan.select(call, g, policy)[0].blocks.to_tiles() for g in (gaps, summary))
    assert torch.equal(found, want)


@pytest.mark.parametrize("error", [0.1, 0.01])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("make", [gaussian, clustered, outlier_channels, huge_norms])
def test_what_is_dropped_is_proved(make, bits, error, each_level):
    names = ("causal", "padding", "sink", "window", "whole", "cap")
    cases = [*zip(SHAPES, names, GRIDS + GRIDS, strict=True), (SHAPES[0], "cap", GRIDS[0]), (SHAPES[2], "cap", GRIDS[1])]
    for s, name, grid in cases:
        call, summary, policy = prepared(make, s, KeySketch(bits), Certified(error), grid, options(name, s))
        found, _, _ = native_scan.select(call, summary, policy)
        _, lse = kernels.attend(call, found)
        assert true_dropped_mass(call, found).max() <= error
        assert certify(call, found, summary, KeySketch(bits), lse, rounding=kernels.ROUNDING).dropped_mass.max() <= error


def test_proofs_are_about_as_sparse_as_the_references():
    for make in (gaussian, clustered):
        call, summary, policy = prepared(make, SHAPES[0], KeySketch(8), Certified(0.05), GRIDS[0], {"causal": True})
        mine, theirs = (
            x[1][0].sum()
            for x in (native_scan.select(call, summary, policy), pipeline.select(call, summary, policy, backend="reference"))
        )
        assert mine <= 1.1 * theirs + 64


def test_coarse_planes_settle_what_is_far_below():
    torch.manual_seed(1)
    k = torch.randn(1, 1, 4096, 64) * 0.05
    k[:, :, 1000:1016] += 3.0
    q = torch.full((1, 2, 1, 64), 1.0)
    call, policy = Call(q, k, k, scale=0.125, causal=True), Policy(KeySketch(8), Certified(0.05), Sinks(16) | Window(16))
    summary = geometry.build(k, 16, Statistics(sketch_bits=8))
    found, (kept, _), _ = native_scan.select(call, summary, policy)
    assert true_dropped_mass(call, found).max() <= 0.05
    assert kept.sum() <= 64


def test_ties_go_to_the_smaller_block(each_level):
    k = torch.ones(1, 1, 512, 32)
    q = torch.ones(1, 2, 1, 32)
    policy = Policy(KeySketch(4, 8), TopK(5))
    summary = geometry.build(k, 16, Statistics(sketch_bits=4))
    found, _, _ = native_scan.select(Call(q, k, k, scale=0.1), summary, policy)
    assert found.blocks.block_index.tolist() == [0, 1, 2, 3, 4]


def test_blocks_with_a_key_that_is_no_number_are_kept(each_level):
    s = SHAPES[0]
    q, k, v = gaussian(3, s)
    k[:, :, 200] = torch.nan
    for scorer, selector in ((KeySketch(8, 8), TopK(3)), (KeySketch(8), Certified(0.1)), (Mean(), TopK(3))):
        summary = geometry.build(k, 16, Statistics(sketch_bits=8))
        found, _, _ = native_scan.select(Call(q, k, v, scale=0.125, causal=True), summary, Policy(scorer, selector))
        assert found.blocks.to_tiles()[..., 12].all()


def test_a_query_that_is_no_number_proves_nothing(each_level):
    q, k, v = gaussian(3, SHAPES[0])
    q[0, 1] = torch.nan
    summary = geometry.build(k, 16, Statistics(sketch_bits=8))
    _found, (kept, visible), _ = native_scan.select(Call(q, k, v, scale=0.125), summary, Policy(KeySketch(8), Certified(0.1)))
    assert kept[0, 0].sum() == visible[0, 0].sum()


def test_turning_dense_is_counted():
    call, summary, policy = prepared(gaussian, SHAPES[0], KeySketch(8), Certified(0.05), GRIDS[0], {"causal": True})
    policy = Policy(KeySketch(8), Certified(0.05), dense_above=0.1)
    found, (kept, visible), dense = native_scan.select(call, summary, policy)
    assert dense.all()
    assert torch.equal(kept, visible)
    assert found.blocks.to_tiles().all()


def test_threads_change_nothing(each_level):
    call, summary, policy = prepared(
        clustered, Shape(1, 4, 1, 1, 5000, 64, 64), KeySketch(8), Certified(0.05), GRIDS[0], {"causal": True}
    )
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(native_scan.select(call, summary, policy)[0].blocks.block_index)
    torch.set_num_threads(before)
    assert all(torch.equal(x, found[0]) for x in found[1:])


def test_the_future_is_not_seen(each_level):
    s = Shape(1, 4, 2, 4, 300, 64, 64)
    q, k, v = gaussian(3, s)
    policy = Policy(KeySketch(4, 8), TopK(4), query_tile=1)
    chosen = []
    for last in (0.0, 50.0):
        k[:, :, -1] = last
        summary = geometry.build(k, 16, Statistics(sketch_bits=4))
        chosen.append(native_scan.select(Call(q, k, v, scale=0.125, causal=True), summary, policy)[0].blocks.to_tiles()[:, :, :3])
    assert torch.equal(*chosen)


def test_the_pipeline_scans_and_says_so():
    q, k, v = gaussian(3, SHAPES[0])
    policy = Policy(KeySketch(4, 8), TopK(4), Sinks(16))
    _, report = attention(q, k, v, policy, causal=True, return_report=True)
    assert report.selected_by == "native"
    _, other = attention(q, k, v, policy, causal=True, return_report=True, backend="reference")
    assert other.selected_by == "reference"
    assert torch.equal(report.selection.blocks.to_tiles(), other.selection.blocks.to_tiles())


def test_every_reason_is_given():
    call, summary, policy = prepared(gaussian, SHAPES[0], KeySketch(4), TopK(3), GRIDS[0], {"causal": True})
    call = replace(call, bias=torch.zeros(1, 1, 1, call.kv_len))
    reasons = " ".join(native_scan.why_not(call, summary, policy, True))
    for text in ("bias", "single queries"):
        assert text in reasons
    reasons = " ".join(native_scan.why_not(call, summary, Policy(KeySketch(4), TopK(3), block_size=24), False))
    assert "made of 16 keys" in reasons
    early = Call(*(x[:, :, :70] for x in (call.query.expand(-1, -1, 16, -1), call.key, call.value)), causal=True, scale=0.1)
    assert any(
        "calibrate" in r
        for r in native_scan.why_not(early, geometry.build(early.key, 16, Statistics(sketch_bits=4)), policy, False)
    )
