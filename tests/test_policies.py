"""Presets, text and back, and what the report says."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import attention, policies, registry, scores
from sieve_attn.patterns import Sinks, Window
from sieve_attn.policies import Adaptive, Aether, Certified, Dense, EventRadar, Policy, Quest, TopBlocks, Windowed, parse
from sieve_attn.scores import Bennett, Box, Euclidean, KeySketch, Tightest
from sieve_attn.selection import Mass, RelativeThreshold, TargetSparsity, Threshold, TopK
from sieve_attn.testing import Shape
from sieve_attn.testing.contracts import coins
from sieve_attn.testing.strategies import gaussian

EVERY = [make() for make in policies.PRESETS.values()] + [
    Aether(-math.inf), Aether(math.inf, 48), EventRadar(target_sparsity=0.8, sink_blocks=1, use_variance=True, recency="legacy"),
    Certified(0.5, bits=4, sinks=0), Windowed(0, 5), Policy(keep=Sinks(1) | Window(2) | Sinks(3)),
    Policy(Tightest((Euclidean(), Box(), KeySketch(8, query_bits=8))), RelativeThreshold(2.0), bound=Bennett(), far_field=True),
    Policy(scores.Random(7), TargetSparsity(0.25), query_stride=4, share_group=False, dense_above=0.5, min_seq_length=128),
]  # fmt: skip


@pytest.mark.parametrize("policy", EVERY, ids=repr)
def test_text_reads_back(policy):
    assert parse(repr(policy)) == policy
    assert policy.text == repr(policy)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(allow_nan=False), st.integers(1, 999), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_every_number_reads_back(level, k, share):
    for policy in (Aether(level, k), TopBlocks(k), Adaptive(share), Certified(share)):
        assert parse(repr(policy)) == policy


def test_reading_a_policy_asks_nobody_what_is_installed(monkeypatch):
    """Operators get the text at every call, and going through all installed packages takes longer than attention."""
    monkeypatch.setattr(registry, "entry_points", None)
    for policy in EVERY:
        policies._read.cache_clear()
        assert parse(policy.text) == policy
        assert parse(policy.text) is parse(policy.text)


@pytest.mark.parametrize("name", policies.PRESETS)
def test_presets_run_by_name(name):
    q, k, v = gaussian(1, Shape(1, 4, 2, 20, 100, 8, 4))
    out, report = attention(q, k, v, parse(name), causal=True, return_report=True)
    assert out.shape == (1, 4, 20, 4)
    assert 0 < report.density <= 1
    assert parse(report.policy) == parse(name)


NUMPY_NUMBERS = """
import numpy as np
from sieve_attn import policies as P, scores as S, selection as L
number, count = np.float64(0.5), np.int64(4)
for made, plain in (
    (P.Aether(np.float32(0.5), count), P.Aether(0.5, 4)), (P.Certified(number), P.Certified(0.5)),
    (P.TopBlocks(count, bits=count, sinks=count), P.TopBlocks(4, bits=4, sinks=4)), (P.Windowed(count, count), P.Windowed(4, 4)),
    (P.EventRadar(target_sparsity=number, sink_blocks=count), P.EventRadar(target_sparsity=0.5, sink_blocks=4)),
    (P.Policy(S.SubMeans(count), L.TopK(count), dense_above=number), P.Policy(S.SubMeans(4), L.TopK(4), dense_above=0.5)),
):
    assert made == plain == P.parse(made.text) and made.text == repr(made) == repr(plain), made.text
"""


def test_numbers_of_numpy_are_numbers():
    # a sweep over np.linspace is the common case; in a process of its own, since the type checker would speak first here
    done = subprocess.run([sys.executable, "-c", NUMPY_NUMBERS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_presets_name_their_own_arguments():
    for text, argument in (("top_blocks(k=0)", "k"), ("event_radar(local_window=-1)", "local_window"),
                           ("event_radar(sink_blocks=-1)", "sink_blocks")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^`{argument}` must be an integer.*got (0|-1);"):
            policies.parse(text)


def test_presets_are_just_such_lines():
    ends = Sinks(16) | Window(64)
    assert Dense() == Policy()
    assert TopBlocks(8) == Policy(KeySketch(4, query_bits=8), TopK(8), ends, query_stride=4)
    assert Adaptive(0.9) == Policy(KeySketch(4, query_bits=8), Mass(0.9), ends)
    assert Aether(0.2, 32) == Policy(Euclidean(), Threshold(0.2), block_size=32, query_tile=32)
    assert Quest(9).scorer == Box()
    assert Windowed(3, 4) == Policy(keep=Sinks(3) | Window(4))
    assert Certified(0.1).certifier == KeySketch(8)
    assert TopBlocks().certifier == KeySketch(4)
    assert EventRadar().certifier == KeySketch(8)


def test_windowed_keeps_exactly_its_tokens():
    q, k, v = gaussian(1, Shape(1, 2, 1, 30, 40, 8, 4))
    _, report = attention(q, k, v, Windowed(3, 5), causal=True, return_report=True)
    position, key = torch.arange(10, 40)[:, None], torch.arange(40)
    wanted = ((key < 3) | (key > position - 5)) & (key <= position)
    kept = report.selection.to_dense(q)[0, 0] & (key <= position)
    assert torch.equal(kept, wanted)
    assert report.density == pytest.approx(float(wanted.sum()) / float((key <= position).sum()))


def test_density_by_hand():
    # 2 tiles of 4 queries over 8 keys in blocks of 2, causal; tile 0 sees blocks 0, 1 and keeps both since both are cut;
    # tile 1 sees 4 blocks of which 2 and 3 are cut, and top-1 adds one of 2 keys. Queries see at most 2 keys of a block.
    q, k, v = gaussian(1, Shape(1, 1, 1, 8, 8, 4, 4))
    k[:, :, 2:4] = 50 * q[:, :, 7:8].sign()
    k[:, :, :2] = -k[:, :, 2:4]
    policy = Policy(scores.Exact(), TopK(1), block_size=2, query_tile=4)
    _, report = attention(q, k, v, policy, causal=True, return_report=True)
    assert report.visible.tolist() == [[[4, 8]]]
    assert report.kept[0, 0, 0] == 4
    assert report.kept[0, 0, 1] in (6, 8)
    assert report.density == float(report.kept.sum()) / 12
    assert report.achieved_sparsity == 1 - report.density
    assert report.density_per_head.shape == (1, 1)
    assert float(report.density_per_head) == pytest.approx(report.density)


def test_masked_keys_do_not_count():
    q, k, v = gaussian(1, Shape(2, 2, 1, 4, 32, 8, 4))
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[1, :16] = False
    policy = Policy(KeySketch(4), TopK(1), query_tile=4)
    _, report = attention(q, k, v, policy, key_mask=mask, return_report=True)
    assert report.visible.tolist() == [[[32]], [[16]]]
    assert report.kept.tolist() == [[[16]], [[16]]]


def test_requested_and_achieved_sparsity_stand_side_by_side():
    q, k, v = gaussian(1, Shape(1, 2, 1, 64, 640, 8, 4))
    _, report = attention(q, k, v, Policy(KeySketch(4), TargetSparsity(0.75)), return_report=True)
    assert report.requested_sparsity == 0.75
    assert report.achieved_sparsity == pytest.approx(0.75)
    _, forced = attention(q, k, v, Policy(KeySketch(4), TargetSparsity(0.75), Window(256)), return_report=True)
    assert forced.requested_sparsity == 0.75
    assert forced.achieved_sparsity < 0.75


def test_below_min_seq_length_attention_is_dense_and_says_so():
    q, k, v = gaussian(1, Shape(2, 2, 1, 40, 40, 8, 4))
    short = Policy(KeySketch(4), TopK(1), min_seq_length=41)
    out, report = attention(q, k, v, short, causal=True, return_report=True)
    assert torch.equal(out, attention(q, k, v, causal=True))
    assert report.density == 1
    assert [f.reason for f in report.fallbacks] == ["fewer keys than min_seq_length 41"]
    _, report = attention(q, k, v, Policy(KeySketch(4), TopK(1), min_seq_length=40), return_report=True)
    assert report.density < 1
    assert not report.fallbacks


def test_turning_dense_is_reported():
    q, k, v = gaussian(1, Shape(1, 2, 1, 64, 320, 8, 4))
    policy = Policy(KeySketch(4), Mass(0.9), dense_above=0.3)
    out, report = attention(q, k, v, policy, return_report=True)
    assert torch.equal(out, attention(q, k, v))
    assert report.density == 1
    assert len(report.fallbacks) == 1
    assert "dense_above=0.3" in report.fallbacks[0].reason
    assert report.fallbacks[0].count == 1


def test_a_fixed_policy_never_turns_dense():
    q, k, v = gaussian(1, Shape(1, 2, 1, 64, 320, 8, 4))
    for policy in (Policy(KeySketch(4), TopK(15), dense_above=0.1), Policy(KeySketch(4), TargetSparsity(0.1), dense_above=0.1)):
        _, report = attention(q, k, v, policy, return_report=True)
        assert report.density < 1
        assert not report.fallbacks


def test_a_proof_that_needs_everything_is_reported():
    q, k, v = gaussian(1, Shape(1, 2, 1, 64, 320, 8, 4))
    _, report = attention(q, k, v, Certified(1e-6, bits=1), return_report=True)
    assert report.density == 1
    assert [f.reason for f in report.fallbacks] == ["the proof needed every visible block of a tile"]


def test_tiles_that_see_nothing_are_no_fallback():
    q, k, v = gaussian(1, Shape(2, 2, 1, 64, 320, 8, 4))
    mask = torch.ones(2, 320, dtype=torch.bool)
    mask[0] = False
    _, report = attention(q, k, v, Certified(0.4, sinks=0, window=0), key_mask=mask, return_report=True)
    counted = sum(f.count for f in report.fallbacks)
    assert counted == int((report.kept == report.visible)[1].sum())


def test_the_report_is_lazy_and_can_let_go_of_its_arrays():
    q, k, v = gaussian(1, Shape(1, 2, 1, 8, 64, 8, 4))
    _, report = attention(q, k, v, TopBlocks(1, sinks=0, window=0), return_report=True)
    assert "certificate" not in vars(report)
    light = report.without_arrays()
    assert light.selection is None
    assert torch.equal(light.certificate.dropped_mass, report.certificate.dropped_mass)
    found = report.certificate
    values = found.dropped_mass.flatten().sort().values
    assert found.quantile(0.0) == float(values[0])
    assert found.quantile(1.0) == float(values[-1])
    assert set(report.seconds) == {"geometry", "selection", "attend"}


def test_a_ready_geometry_or_selection_skips_the_stages_before():
    from sieve_attn import geometry

    q, k, v = gaussian(1, Shape(1, 4, 2, 8, 100, 8, 4))
    mask = coins(1, 0.8, 1, 100)
    policy = TopBlocks(2, sinks=0, window=0)
    out, report = attention(q, k, v, policy, key_mask=mask, return_report=True)
    assert report.geometry_from == "keys"
    built = geometry.build(k, policy.block_size, policy.statistics, key_mask=mask)
    again, second = attention(q, k, v, policy, key_mask=mask, geometry=built, return_report=True)
    assert second.geometry_from == "given"
    assert torch.equal(out, again)
    assert torch.equal(out, attention(q, k, v, policy, key_mask=mask, selection=report.selection))


@settings(max_examples=60, deadline=None)
@given(
    q_len=st.integers(1, 150), kv_len=st.integers(1, 150), tile=st.sampled_from([8, 64]), causal=st.booleans(),
    share=st.booleans(), framework=st.sampled_from(["torch", "numpy"]),
)  # fmt: skip
def test_what_leaves_nothing_to_choose_is_neither_summarised_nor_scored(q_len, kv_len, tile, causal, share, framework):
    """The same blocks, counts and outputs as those of the policy that goes the whole way."""
    from sieve_attn import geometry

    q, k, v = gaussian(1, Shape(2, 4, 2, q_len, kv_len, 8, 4))
    if framework == "numpy":
        q, k, v = (x.numpy() for x in (q, k, v))
    blocks = -(-kv_len // 16)
    policy = Policy(KeySketch(4, query_bits=8), TopK(blocks), Sinks(16), query_tile=tile, share_group=share)
    out, lse, report = attention(q, k, v, policy, causal=causal, return_lse=True, return_report=True)
    assert (report.selected_by, set(report.seconds), report.computed) == ("", {"selection", "attend"}, None)
    made = geometry.build(k, 16, policy.statistics)
    again, lse_again, chosen = attention(q, k, v, policy, causal=causal, geometry=made, return_lse=True, return_report=True)
    assert chosen.selected_by != ""
    mine, theirs = report.selection.blocks, chosen.selection.blocks
    for field in ("batch", "heads", "q_len", "kv_len", "q_block", "kv_block", "lead", "row_mask"):
        assert getattr(mine, field) == getattr(theirs, field), field
    pairs = [(mine.row_ptr, theirs.row_ptr), (mine.block_index, theirs.listed.block_index), (out, again), (lse, lse_again)]
    for x, y in [*pairs, (report.kept, chosen.kept), (report.visible, chosen.visible)]:
        assert (x.dtype, tuple(x.shape)) == (y.dtype, tuple(y.shape))
        assert bool((x == y).all())
    assert float(report.certificate.dropped_mass.max()) == 0.0


def test_something_is_chosen_where_a_block_or_a_key_may_be_left_out():
    q, k, v = gaussian(1, Shape(1, 2, 2, 4, 64, 8, 4))
    for policy, options in (
        (TopBlocks(3), {}), (TopBlocks(4), {"key_mask": coins(1, 0.8, 1, 64)}), (TopBlocks(4), {"window": 20, "causal": True}),
        (TopBlocks(4), {"mask": coins(2, 0.8, 1, 1, 4, 64)}), (TopBlocks(4), {"per_query": True}), (Adaptive(1.0), {}),
    ):  # fmt: skip
        assert attention(q, k, v, policy, return_report=True, **options)[1].selected_by != ""
