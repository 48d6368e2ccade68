"""Proofs of a prefill in C++ on every instruction set: the reference's blocks up to ties, and a promise kept to every query."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import attention, native, pipeline
from sieve_attn import geometry as g
from sieve_attn.attend import native as kernels
from sieve_attn.certify import certify, true_dropped_mass
from sieve_attn.patterns import Sinks, Window
from sieve_attn.policies import Certified as CertifiedPolicy
from sieve_attn.policies import Policy
from sieve_attn.scores import Bennett, KeySketch
from sieve_attn.selection import Certified
from sieve_attn.selection import native as gate
from sieve_attn.testing import GENERATORS, Shape
from sieve_attn.testing.contracts import coins
from sieve_attn.testing.strategies import clustered, gaussian, generators, huge_norms, outlier_channels, seeds
from sieve_attn.types import Call

pytestmark = pytest.mark.skipif(bool(native.missing()), reason="pure-Python installation")

LAWS = settings(max_examples=40, deadline=None, derandomize=True)
LEVELS = native.module().levels() if not native.missing() else []
NEAR = 2e-3  # in logits: what may tie


@pytest.fixture(params=LEVELS, autouse=True)
def level(request):
    native.module().force_level(request.param)
    yield request.param
    native.module().force_level("")


class Slack(Certified):
    """The reference's rule with its blocks that nearly tie added (``lax``) or left out."""

    lax = True

    def keep(self, candidates):
        kept, scores, visible = super().keep(candidates), candidates.scores, candidates.visible
        kappa = self.error / (1 - self.error)
        middle = scores.estimate.clamp(min=scores.lower, max=scores.upper)
        priority = torch.logaddexp(scores.upper, math.log(kappa) + middle)
        first = visible & (candidates.forced | ~priority.isfinite() & (scores.upper > 0))
        last = priority.masked_fill(~kept | first, math.inf).amin(-1, keepdim=True)
        near = NEAR + 2.0**-18 * last.abs().nan_to_num(posinf=0.0)
        if self.lax:
            return visible & (kept | (priority >= last - near))
        top = torch.zeros_like(kept).scatter(-1, priority.masked_fill(~visible, -math.inf).argmax(-1, keepdim=True), True)
        return kept & (first | (priority > last + near) | top)


class Strict(Slack):
    lax = False


def prepared(q, k, v, policy, **options):
    call = Call(q, k, v, scale=q.shape[-1] ** -0.5, **options)
    return call, g.build(k, policy.block_size, policy.statistics, key_mask=call.key_mask)


def tiles_of(call, geometry, policy):
    return pipeline.select(call, geometry, policy, backend="reference")[0].blocks.to_tiles()


def assert_proved(call, policy, geometry):
    """The promise holds, and what is kept lies between those of a slightly laxer one and of one stricter by what glances lose."""
    assert gate.why_not(call, geometry, policy, False) == ()
    found, (kept, visible), _ = gate.select(call, geometry, policy)
    error, mine = policy.selector.error, found.blocks.to_tiles()
    stricter = error * (7 / 8 if native.level() in ("vnni", "amx") else 1) * 0.996
    fewer = tiles_of(call, geometry, replace(policy, selector=Strict(min(0.999, error * 1.004))))
    more = tiles_of(call, geometry, replace(policy, selector=Slack(stricter)))
    assert not (fewer & ~mine).any()
    assert not (mine & ~more).any()
    assert (kept <= visible).all()
    assert_promise(call, found, error)


def assert_promise(call, found, error):
    exact = replace(call, **{name: getattr(call, name).double() for name in ("query", "key", "value")}, shared={})
    dropped = true_dropped_mass(exact, found)
    assert dropped.nan_to_num(0.0).max() <= error


@st.composite
def cases(draw):
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    q_len = draw(st.one_of(st.integers(1, 15), st.integers(16, 140)))
    kv_len = draw(st.integers(1, 400)) if draw(st.booleans()) else q_len
    shape = Shape(draw(st.integers(1, 2)), kv_heads * group, kv_heads, q_len, kv_len, draw(st.sampled_from([8, 17, 64, 130])), 3)
    scorer = KeySketch(draw(st.sampled_from([2, 4, 7, 8])), draw(st.sampled_from([None, 8])))
    policy = Policy(
        scorer, Certified(draw(st.sampled_from([0.005, 0.05, 0.3, 0.9]))),
        draw(st.sampled_from([None, Sinks(3), Sinks(5) | Window(20)])), block_size=draw(st.sampled_from([1, 4, 16, 24, 64])),
        query_tile=draw(st.sampled_from([8, 33, 64])), query_stride=draw(st.sampled_from([1, 4])),
        share_group=draw(st.booleans()),
    )  # fmt: skip
    options = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 60))
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.sampled_from([2.0, 20.0]))
    if draw(st.integers(0, 3)) == 0:
        options["sink"] = torch.linspace(-3.0, 4.0, shape.q_heads)
    if 1 < q_len == kv_len and draw(st.booleans()):
        inner = sorted(draw(st.sets(st.integers(1, q_len - 1), max_size=4)))
        options["cu_seqlens"] = torch.tensor([0, *inner, q_len])
    return shape, policy, options


@LAWS
@given(
    cases(), generators(), seeds(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.booleans(), st.booleans()
)
def test_every_query_gets_its_proof(case, name, seed, dtype, masked, poisoned):
    shape, policy, options = case
    q, k, v = GENERATORS[name](seed, shape, dtype)
    if poisoned:
        k = k.clone()
        k[..., :1][coins(seed, 0.01, *k.shape[:3])[..., None]] = torch.nan
    if masked:
        options = {**options, "key_mask": coins(seed, 0.6, shape.batch, shape.kv_len)}
    call, geometry = prepared(q, k, v, policy, **options)
    assert_proved(call, policy, geometry)


@pytest.mark.parametrize("error", [0.1, 0.01])
@pytest.mark.parametrize("make", [gaussian, clustered, outlier_channels, huge_norms])
def test_certificates_agree(make, error):
    """The certificate of the output, made by the reference from other sums, meets the promise too."""
    for dtype, causal in ((torch.float32, True), (torch.bfloat16, False)):
        q, k, v = make(3, Shape(1, 4, 2, 300, 700, 64, 16), dtype)
        policy = replace(CertifiedPolicy(error), query_tile=2, share_group=False)
        call, geometry = prepared(q, k, v, policy, causal=causal)
        found, (kept, visible), _ = gate.select(call, geometry, policy)
        _, lse = kernels.attend(call, found)
        proof = certify(call, found, geometry, policy.certifier, lse, rounding=kernels.ROUNDING)
        assert proof.dropped_mass.max() <= error
        assert_promise(call, found, error)
        reference = pipeline.select(call, geometry, policy, backend="reference")[1][0]
        assert kept.sum() <= 1.05 * reference.sum() + 64
        assert kept.sum() < visible.sum()


def test_without_spectral_numbers_proofs_go_key_by_key():
    q, k, v = clustered(5, Shape(1, 4, 2, 128, 600, 64, 8))
    policy = Policy(KeySketch(4), Certified(0.05))
    call = Call(q, k, v, causal=True, scale=0.125)
    geometry = g.build(k, 16, KeySketch(4).statistics)
    assert geometry.sketch.spectral is None
    assert_proved(call, policy, geometry)


def test_of_equal_blocks_the_first_are_kept():
    q, k, v = gaussian(1, Shape(1, 2, 1, 64, 2048, 64, 3))
    k = k[:, :, :16].repeat(1, 1, 128, 1)
    policy = Policy(KeySketch(8), Certified(0.25))
    call, geometry = prepared(q, k, v, policy)
    found, (kept, visible), _ = gate.select(call, geometry, policy)
    blocks = found.blocks.block_index.tolist()
    assert blocks == list(range(len(blocks)))
    assert 0.75 <= int(kept.sum()) / int(visible.sum()) <= 0.78


def test_a_query_that_is_no_number_keeps_everything():
    q, k, v = gaussian(3, Shape(1, 2, 2, 70, 500, 16, 3))
    q = q / 8
    q[0, 0, 5, 3] = torch.nan
    policy = Policy(KeySketch(8), Certified(0.5), query_tile=16)
    call, geometry = prepared(q, k, v, policy)
    _, (kept, visible), _ = gate.select(call, geometry, policy)
    assert kept[0, 0, 0] == visible[0, 0, 0]
    assert (kept[0, 1] < visible[0, 1]).all()


def test_nothing_after_a_tile_changes_its_proof():
    q, k, v = gaussian(6, Shape(1, 4, 2, 400, 400, 64, 8))
    policy = CertifiedPolicy(0.1)
    for stop in (128, 256):
        other_q, other_k = q.clone(), k.clone()
        other_q[:, :, stop:] = torch.nan
        other_k[:, :, stop:] = 50 * other_k[:, :, stop:].flip(2)
        found = []
        for a, b in ((q, k), (other_q, other_k)):
            call, geometry = prepared(a, b, v, policy, causal=True)
            found.append(gate.select(call, geometry, policy)[0].blocks.to_tiles()[:, :, : stop // 64])
        assert torch.equal(*found)


def test_thread_counts_change_no_bit():
    q, k, v = clustered(6, Shape(2, 4, 2, 500, 500, 64, 8))
    policy, found = CertifiedPolicy(0.05), []
    call, geometry = prepared(q, k, v, policy, causal=True)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            found.append(gate.select(call, geometry, policy)[0].blocks)
        finally:
            torch.set_num_threads(1)
    for other in found[1:]:
        assert torch.equal(other.row_ptr, found[0].row_ptr)
        assert torch.equal(other.block_index, found[0].block_index)


def test_turning_dense_is_counted():
    q, k, v = gaussian(6, Shape(1, 4, 2, 320, 320, 16, 8))
    policy = CertifiedPolicy(0.05, dense_above=0.6)
    call, geometry = prepared(q, k, v, policy, causal=True)
    got, wanted = pipeline.select(call, geometry, policy), pipeline.select(call, geometry, policy, backend="reference")
    assert got[2][0].count > 0
    assert got[2] == wanted[2]
    assert torch.equal(got[0].blocks.to_tiles(), wanted[0].blocks.to_tiles())


def test_the_report_says_who_proved():
    q, k, v = clustered(6, Shape(1, 4, 2, 256, 256, 64, 64))
    _, report = attention(q, k, v, CertifiedPolicy(0.05), causal=True, return_report=True)
    assert report.selected_by == "native"
    assert report.certificate.dropped_mass.max() <= 0.05


def test_other_bounds_are_left_to_the_reference():
    q, k, v = gaussian(6, Shape(1, 2, 2, 64, 64, 16, 8))
    for policy, sketch, words in (
        (Policy(Bennett(), Certified(0.1)), Bennett().statistics, "prove with KeySketch"),
        (Policy(KeySketch(4), Certified(0.1)), KeySketch(8).statistics, "all 8 bits"),
    ):
        call = Call(q, k, v, scale=0.25)
        assert any(words in reason for reason in gate.why_not(call, g.build(k, 16, sketch), policy, False))
