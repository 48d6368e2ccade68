"""Choices of single queries and decoding from caches of fixed size: equal to PyTorch, in static shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_inputs import arrays, far_apart, torch_of
from test_jax import PRESETS

import sieve_attn
import sieve_attn.jax as sj
from sieve_attn import policies as P
from sieve_attn import scores, selection
from sieve_attn.patterns import OffsetPattern, RandomBlocks, Sinks, Window


@pytest.mark.parametrize(("name", "backend"), [("top_blocks", "native"), ("certified", "native"), ("quest", "gather")])
def test_every_row_keeps_what_it_chose_as_in_pytorch(name, backend):
    query, key, value = arrays(batch=1)
    causal = name not in ("quest", "adaptive")
    options = {"causal": causal, "per_query": True, "return_report": True}
    ours, report = sj.attention(query, key, value, PRESETS[name], backend=backend, **options)
    theirs, told = sieve_attn.attention(*torch_of(query, key, value), PRESETS[name], **options)
    wanted = told.selection.to_dense(torch.zeros(1)).numpy()
    assert (np.asarray(report.selection.to_dense()) == wanted).all()
    by_tile = sieve_attn.attention(*torch_of(query, key, value), PRESETS[name], causal=causal, return_report=True)[1]
    assert (wanted != by_tile.selection.to_dense(torch.zeros(1)).numpy()).any(), "rows must differ from their tiles"
    assert (np.asarray(report.kept) == told.kept.numpy()).all()
    assert (np.asarray(report.visible) == told.visible.numpy()).all()
    assert report.selected_by == "stages"
    assert far_apart(ours, theirs) < 5e-6
    if backend == "native":
        assert (np.asarray(ours) == theirs.numpy()).all()


@pytest.mark.parametrize("backend", ["native", pytest.param("gather", marks=pytest.mark.long)])
def test_gradients_of_choices_by_row_equal_those_of_pytorch(backend):
    query, key, value = arrays(60, 140)
    policy = P.Policy(scores.Mean(), selection.TopK(1), Window(8), query_tile=16)
    pull = np.sin(np.arange(2 * 4 * 60 * 24, dtype=np.float32)).reshape(2, 4, 60, 24)

    def loss(query, key, value):
        options = {"causal": True, "per_query": True, "max_blocks": 8, "backend": backend, "return_report": True}
        out, report = sj.attention(query, key, value, policy, **options)
        return (out * pull).sum(), report.overflow

    ours, overflow = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
    assert not bool(overflow.any())
    held = [x.requires_grad_() for x in torch_of(query, key, value)]
    (sieve_attn.attention(*held, policy, causal=True, per_query=True) * torch.from_numpy(pull)).sum().backward()
    for mine, x in zip(ours, held, strict=True):
        assert far_apart(mine, x.grad) < 2e-5
    if backend == "native":
        mapped = jax.vmap(jax.grad(lambda *x: loss(*x)[0]), (None, 0, None))(query, jnp.stack([key, key * 0.5]), value)
        assert far_apart(mapped[0], ours[0]) < 1e-6


def test_rows_of_a_tile_that_overflows_see_everything():
    query, key, value = arrays(64, 128, batch=1)
    out, report = sj.attention(query, key, value, P.Quest(3), max_blocks=2, per_query=True, return_report=True)
    assert bool(report.overflow.all())
    for backend in ("native", "gather"):
        again = sj.attend(query, key, value, report.selection, backend=backend)[0]
        assert far_apart(again, sj.attention(query, key, value)) < 2e-6
    assert far_apart(out, again) < 2e-6


def test_choices_by_row_made_elsewhere_are_taken():
    query, key, value = arrays(32, 64, batch=1)
    options = {"causal": True, "per_query": True}
    theirs, told = sieve_attn.attention(*torch_of(query, key, value), P.Quest(1), return_report=True, **options)
    for backend in ("native", "gather"):
        assert far_apart(sj.attend(query, key, value, told.selection, causal=True, backend=backend)[0], theirs) < 5e-6
    with pytest.raises(ValueError, match=r"the Pallas kernel takes choices of whole tiles, not per_query"):
        sj.attention(query, key, value, P.TopBlocks(1), backend="pallas", **options)
    with pytest.raises(ValueError, match=r"`per_query` must be True or False, known when the call is traced"):
        jax.jit(lambda p: sj.attention(query, key, value, P.Quest(1), per_query=p))(True)


@pytest.mark.long
def test_the_reference_takes_choices_by_row():
    query, key, value = arrays(32, 64, batch=1)
    options = {"causal": True, "per_query": True}
    theirs, told = sieve_attn.attention(*torch_of(query, key, value), P.Quest(1), return_report=True, **options)
    assert far_apart(sj.attend(query, key, value, told.selection, causal=True, backend="reference")[0], theirs) < 5e-6
    slow, report = sj.attention(query, key, value, P.Quest(1), backend="reference", return_report=True, **options)
    assert far_apart(slow, theirs) < 5e-6
    assert report.selection.rows is not None
    assert float(np.asarray(report.certificate.dropped_mass).max()) > 0


@pytest.mark.parametrize(
    "keep", [OffsetPattern((3, 40, 90)) | Sinks(3), RandomBlocks(1, 32, window=1)], ids=["offsets", "blocks"]
)
def test_forced_patterns_of_any_kind_are_those_of_pytorch(keep):
    query, key, value = arrays(100, 170, batch=1)
    policy = P.Policy(scores.Mean(), selection.TopK(1), keep, query_tile=16)
    ours, report = jax.jit(lambda q: sj.attention(q, key, value, policy, causal=True, return_report=True))(query)
    theirs, told = sieve_attn.attention(*torch_of(query, key, value), policy, causal=True, return_report=True)
    assert (np.asarray(report.selection.to_tiles()) == told.selection.blocks.to_tiles().numpy()).all()
    assert told.density < 0.9
    assert far_apart(ours, theirs) < 5e-6


STEPS = [("top_blocks", "native"), ("aether", "native"), ("windowed", "native"), ("windowed", "gather")]
LONG = [("certified", "native"), ("quest", "native"), ("top_blocks", "gather")]


@pytest.mark.parametrize(("name", "backend"), [*STEPS, *(pytest.param(*one, marks=pytest.mark.long) for one in LONG)])
def test_a_step_from_a_cache_of_fixed_size_is_the_step_from_what_fills_it(name, backend):
    query, key, value = arrays(1, 160, batch=1)
    policy = PRESETS[name]
    run = jax.jit(lambda n: sj.attention(query, key, value, policy, kv_length=n, backend=backend, return_report=True))
    for length in (33, 100, 160):  # less than calibrates a sketch, a cut block, everything
        ours, report = run(length)
        cut = torch_of(query, key[:, :, :length], value[:, :, :length])
        theirs, told = sieve_attn.attention(*cut, policy, causal=True, return_report=True)
        assert far_apart(ours, theirs) < 5e-6, length
        if told.selection.blocks is not None:
            blocks = told.selection.blocks.to_tiles().numpy()
            mine = np.asarray(report.selection.to_tiles())
            assert (mine[..., : blocks.shape[-1]] == blocks).all(), length
            assert not mine[..., blocks.shape[-1] :].any()
        assert float(report.density) == pytest.approx(told.density, abs=1e-6)
        if length == 100 and name == "aether":
            assert far_apart(report.certificate.dropped_mass, told.certificate.dropped_mass) < 1e-5


def test_gradients_stop_where_the_cache_ends():
    query, key, value = arrays(1, 96, batch=1)
    for backend in ("native", "gather"):
        loss = lambda k, v, b=backend: sj.attention(query, k, v, P.TopBlocks(2), kv_length=50, backend=b).sum()  # noqa: E731
        for grad in jax.grad(loss, (0, 1))(key, value):
            assert np.abs(grad[:, :, :50]).max() > 0
            assert np.abs(grad[:, :, 50:]).max() == 0


def test_lengths_that_cannot_be():
    query, key, value = arrays(2, 32)
    with pytest.raises(ValueError, match=r"`kv_length` must go with one query a sequence.*; got q_len 2"):
        sj.attention(query, key, value, kv_length=8)
    one = query[:, :, :1]
    with pytest.raises(ValueError, match=r"`kv_length` must lie in 1..32; got 33"):
        sj.attention(one, key, value, kv_length=33)
    with pytest.raises(ValueError, match=r"`kv_length` must be one integer for all sequences; got int32 of shape \(2,\)"):
        sj.attention(one, key, value, kv_length=np.array([3, 4]))
    with pytest.raises(Exception, match=r"`kv_length` must be an int32 in 1..32; got 0"):
        jax.block_until_ready(jax.jit(lambda n: sj.attention(one, key, value, kv_length=n))(0))


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(P.Certified(0.1), id="kernels"),
        pytest.param(P.EventRadar(use_variance=True), id="stages", marks=pytest.mark.long),
    ],
)
def test_a_geometry_that_grows_in_place_is_the_one_built_anew(policy):
    key = arrays(1, 200)[1]
    mask = np.random.default_rng(0).random((2, 200)) > 0.1
    step = jax.jit(sj.append, static_argnums=3)
    cache = np.zeros_like(key)
    grown, at = sj.geometry(cache, policy, key_mask=np.zeros((2, 200), bool)), 0
    for new in (5, 40, 1, 40, 1, 1, 40, 70, 1, 1):
        cache[:, :, at : at + new] = key[:, :, at : at + new]
        grown, at = step(grown, cache, at, new, key_mask=mask), at + new
        anew = sj.geometry(cache, policy, key_mask=mask & (np.arange(200) < at))
        for (path, mine), other in zip(jax.tree_util.tree_leaves_with_path(grown), jax.tree.leaves(anew), strict=True):
            # kernels sum a block alike wherever it lies, XLA may not
            slack = 0 if policy.selector.needs_brackets else 1e-6
            np.testing.assert_allclose(mine, other, rtol=slack, atol=slack, err_msg=f"{path} after {at} keys")
    assert at == 200


def test_growing_reads_the_new_keys_and_not_the_old_ones():
    """Old keys are replaced by NaN behind the geometry's back: nothing it says may change."""
    key = arrays(1, 256, batch=1)[1]
    policy = P.TopBlocks(2)
    filled = np.arange(256) < 200
    known = sj.geometry(key, policy, key_mask=filled[None])
    poisoned = key.copy()
    poisoned[:, :, :192] = np.nan
    grown = jax.jit(sj.append, static_argnums=3)(known, poisoned, 200, 1)
    anew = sj.geometry(key, policy, key_mask=(np.arange(256) < 201)[None])
    for mine, other in zip(jax.tree.leaves(grown), jax.tree.leaves(anew), strict=True):
        np.testing.assert_array_equal(mine, other)
    with pytest.raises(ValueError, match=r"`key` must hold the cache that the geometry describes, 256 places"):
        sj.append(known, key[:, :, :100], 3, 1)
    with pytest.raises(ValueError, match=r"`new` must be an integer of at least 1; got 0"):
        sj.append(known, key, 3, 0)
    with pytest.raises(ValueError, match=r"`new` must fit the cache of 256 places; got 300"):
        sj.append(known, key, 3, 300)
