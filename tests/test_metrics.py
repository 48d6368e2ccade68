"""The metrics against the identities of attention and against cases worked by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn.evaluation import metrics


def attention_case(seed, q_len=7, kv_len=48, share=0.5):
    """``(p, kept, dense, sparse, value, q)`` in fp64, heads = 2; every query keeps at least one key."""
    rng = np.random.default_rng(seed)
    logits, value = 3 * rng.normal(size=(1, 2, q_len, kv_len)), rng.normal(size=(1, 2, kv_len, 5))
    kept = rng.random(logits.shape) < share
    kept[..., 0] = True
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    q = np.where(kept, p, 0) / np.where(kept, p, 0).sum(-1, keepdims=True)
    return p, kept, p @ value, q @ value, value, q


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 1.0))
def test_every_distance_between_dense_and_sparse_is_a_function_of_the_dropped_mass(seed, share):
    p, kept, _, _, _, q = attention_case(seed, share=share)
    delta = metrics.dropped_mass(p, kept)
    np.testing.assert_allclose(metrics.total_variation(p, q), delta, atol=1e-14)
    np.testing.assert_allclose(metrics.kl_divergence(q, p), metrics.kl_of_dropping(delta), atol=1e-12)
    infinite = np.isinf(metrics.kl_divergence(p, q))
    assert (infinite == (delta > 0)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_output_moves_by_the_dropped_mass_times_the_distance_to_the_dropped_output(seed):
    p, kept, dense, sparse, value, _ = attention_case(seed)
    delta = metrics.dropped_mass(p, kept)
    dropped_output = (np.where(kept, 0, p) @ value) / delta[..., None]
    np.testing.assert_allclose(dense - sparse, delta[..., None] * (dropped_output - sparse), atol=1e-12)


def test_torch_and_numpy_agree_and_sixteen_bits_are_widened_first():
    p, kept, dense, sparse, _, _ = attention_case(3)
    ours = metrics.evaluate(p, kept, dense, sparse, block_size=16)
    theirs = metrics.evaluate(*map(torch.from_numpy, (p, kept, dense, sparse)), block_size=16)
    for name in ours.mean:
        assert ours.mean[name] == pytest.approx(theirs.mean[name], rel=1e-12), name
    half = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    assert metrics.cosine(half, half).dtype == torch.float64


def test_values_worked_by_hand():
    p = np.array([0.5, 0.25, 0.125, 0.125])
    kept = np.array([True, True, False, False])
    q = np.array([2 / 3, 1 / 3, 0.0, 0.0])
    assert metrics.dropped_mass(p, kept) == 0.25
    assert metrics.total_variation(p, q) == pytest.approx(0.25)
    assert metrics.kl_of_dropping(np.array(0.25)) == pytest.approx(math.log(4 / 3))
    assert metrics.entropy(p) == pytest.approx(1.75 * math.log(2))
    assert metrics.entropy(q) == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    clamped = 0.75 * math.log(0.75) + 0.25 * math.log(0.125 / 1e-10)
    assert metrics.clamped_kl(p, q) == pytest.approx(clamped)
    assert metrics.cosine(np.array([1.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(math.sqrt(0.5))
    assert metrics.relative_l2(np.array([3.0, 4.0]), np.array([3.0, 0.0])) == pytest.approx(0.8)
    assert metrics.block_mass(p[:3], 2).tolist() == [0.75, 0.125]
    assert metrics.kv_bytes_not_read(10, 100, head_dim=64, v_dim=64, itemsize=2) == 90 * 256
    assert metrics.theoretical_speedup(0.9) == pytest.approx(10.0)
    assert metrics.measured_speedup(1.0, 2.0) == 0.5
    agreed = metrics.next_token_agreement(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[0.0, 2.0], [0.0, 1.0]]))
    assert agreed.tolist() == [True, False]


def test_degenerate_rows_have_defined_values():
    zero, one = np.zeros(3), np.ones(3)
    assert metrics.cosine(zero, zero) == 1.0
    assert metrics.cosine(zero, one) == 0.0
    assert metrics.relative_l2(zero, zero) == 0.0
    assert math.isinf(metrics.relative_l2(zero, one))
    assert math.isinf(metrics.kl_of_dropping(np.array(1.0)))
    assert math.isinf(metrics.theoretical_speedup(1))


def test_important_blocks_are_the_smallest_set_with_the_mass():
    mass = np.array([0.05, 0.5, 0.05, 0.4])
    assert metrics.important_blocks(mass).tolist() == [False, True, False, True]
    assert metrics.important_blocks(mass, 0.91).tolist() == [True, True, False, True]
    assert metrics.important_blocks(mass, 0.5).tolist() == [False, True, False, False]
    assert metrics.important_blocks(np.array([0.1, 0.2, 0.3, 0.4]), "above_median").tolist() == [False, False, True, True]
    seen = np.array([True, False, True, True])
    assert metrics.important_blocks(mass, "above_median", seen).tolist() == [False, False, False, True]
    precision, recall = metrics.precision_recall(np.array([True, True, True, False]), np.array([False, True, True, True]))
    assert (precision, recall) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_recall_under_the_median_definition_cannot_exceed_twice_the_kept_share(seed, keep):
    mass = np.random.default_rng(seed).random((50, 20))
    kept = metrics.important_blocks(mass, 1.0) & (mass >= np.sort(mass, -1)[:, -keep][:, None])
    sparsity = 1 - keep / 20
    _, recall = metrics.precision_recall(kept, metrics.important_blocks(mass, "above_median"))
    assert (recall <= (1 - sparsity) / 0.5 + 1e-12).all()


def test_aggregates_are_means_over_heads_and_queries():
    p, kept, dense, sparse, _, _ = attention_case(5)
    found = metrics.evaluate(p, kept, dense, sparse, block_size=16)
    assert found.per_head["total_variation"].shape == (1, 2)
    assert found.mean["total_variation"] == pytest.approx(metrics.dropped_mass(p, kept).mean())
    assert found.mean["kl_sparse_dense"] == pytest.approx(-np.log1p(-metrics.dropped_mass(p, kept)).mean())
    assert found.mean["sparsity"] == pytest.approx(1 - kept.mean())
    everything = metrics.evaluate(p, np.ones_like(kept), dense, dense, block_size=16)
    assert everything.mean["cosine"] == pytest.approx(1.0)
    assert everything.mean["relative_l2"] == everything.mean["total_variation"] == 0.0
    assert everything.mean["entropy_change"] == pytest.approx(0.0, abs=1e-12)
    assert everything.mean["recall"] == 1.0


def test_errors_name_argument_rule_value_and_remedy():
    p, kept, dense, sparse, _, _ = attention_case(0)
    with pytest.raises(ValueError, match=r"`p, dense, sparse` must be \[batch, heads, q_len, kv_len\].*got shapes .*; pass full"):
        metrics.evaluate(p[0], kept[0], dense[0], sparse[0], block_size=16)
    with pytest.raises(ValueError, match=r"`important` must be a share of the mass or 'above_median'; got 'mean'; try 0.9"):
        metrics.important_blocks(np.ones(4), "mean")
    with pytest.raises(ValueError, match=r"`sparse_seconds` must be a positive time; got 0.0; measure more steps"):
        metrics.measured_speedup(1.0, 0.0)
    with pytest.raises(ValueError, match=r"`sparsity` must lie in \[0, 1\]; got 1.5"):
        metrics.theoretical_speedup(1.5)
    with pytest.raises(ValueError, match=r"`floor` must lie in \(0, 1\); got 0"):
        metrics.clamped_kl(np.ones(2) / 2, np.ones(2) / 2, floor=0)
