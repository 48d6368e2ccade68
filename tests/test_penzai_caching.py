"""Sampling: models with ``GeometricSparseAttention`` inside ``KVCachingTransformerLM``."""

import dataclasses
import sys

import jax
import numpy as np
import pytest
from penzai import pz
from penzai.models.transformer.sampling_mode import KVCachingTransformerLM
from penzai.models.transformer.simple_decoding_loop import temperature_sample_pyloop
from penzai_models import EVERYTHING, build, jitted, part, plain, quick, quick_compilation, sparse, tokens  # noqa: F401

import sieve_attn.jax as sj
from sieve_attn import policies
from sieve_attn.penzai import (
    GeometricSparseAttention,
    KVCachingGeometricSparseAttention,
    capture_masks,
    captured_masks,
    kv_caching,
)

CLOSE = {"atol": 3e-5, "rtol": 3e-5}
BATCH = {"batch": 2}


class Jitted:
    """A caching model whose calls are compiled, for Penzai's own sampling loop."""

    def __init__(self, model):
        self.model = model

    def __call__(self, tokens):
        return jitted(self.model, tokens)

    def __getattr__(self, name):
        return getattr(self.model, name)


def sample(model, prompt, steps=5):
    return np.asarray(temperature_sample_pyloop(model, prompt, jax.random.key(3), 1.0, steps).unwrap("batch", "seq"))


@pytest.mark.parametrize("variant", quick("llama"))
def test_sampling_with_every_block_gives_the_tokens_of_the_dense_model(variant):
    model, prompt = build(variant), tokens(20, batch=2)
    # a random model samples any token, so none may mean padding
    made = kv_caching(sparse(model, threshold=EVERYTHING, block_size=8), 32, BATCH, pad_id=-1)
    dense = Jitted(KVCachingTransformerLM.from_uncached(model, 32, BATCH, pad_id=-1))
    np.testing.assert_array_equal(sample(Jitted(made), prompt), sample(dense, prompt))
    assert pz.select(made).at_instances_of(KVCachingGeometricSparseAttention).count() in (1, 2)
    assert pz.select(made).at_instances_of(pz.nn.KVCachingAttention).count() == 0


@pytest.mark.parametrize(
    ("variant", "how"),
    [
        pytest.param("llama", "at once", marks=pytest.mark.long),
        pytest.param("gemma2", "jitted", marks=pytest.mark.long),
        ("llama_stacked", "jitted"),
    ],
)
def test_a_prefill_in_pieces_chooses_what_one_prefill_chooses(variant, how):
    thin, x = sparse(build(variant), threshold=35.0, block_size=4), tokens(48, batch=2)
    wanted = plain(jitted(thin, x))
    assert np.abs(wanted - plain(jitted(build(variant), x))).max() > 1e-2
    caching = kv_caching(thin, 66, BATCH)  # not a whole number of blocks
    run = jitted if how == "jitted" else lambda model, x: model(x)
    pieces = [plain(run(caching, part(x, *ends))) for ends in ((0, 28), (28, 48))]
    np.testing.assert_allclose(np.concatenate(pieces, 1), wanted, **CLOSE)


def test_steps_stay_sparse_and_read_what_the_policy_keeps():
    thin, x = sparse(build("llama"), policy="top_blocks(k=1, sinks=0, window=0)"), tokens(100, batch=2)
    caching, dense = kv_caching(thin, 128, BATCH), kv_caching(sparse(build("llama"), threshold=EVERYTHING), 128, BATCH)
    watched = capture_masks(caching)
    for model in (watched, dense):
        jitted(model, part(x, 0, 99))
    step, full = (jitted(model, part(x, 99, 100)) for model in (watched, dense))
    assert np.abs(plain(step) - plain(full)).max() > 1e-3
    for mask in captured_masks(watched).values():
        names = {"batch": 2, "head_groups": 2, "q_block": 1, "kv_block": 8}
        assert dict(mask.kept.named_shape) == names
        kept, keys = (np.asarray(y.unwrap(*names)) for y in (mask.kept, mask.keys))
        np.testing.assert_array_equal(kept.sum((2, 3)), 1)
        np.testing.assert_array_equal(keys[1, 0, 0], [16] * 6 + [4, 0])


@pytest.mark.parametrize("variant", [pytest.param("llama", marks=pytest.mark.long), "llama_stacked"])
def test_summaries_grow_with_the_cache_and_are_those_built_anew(variant, monkeypatch):
    thin, x = sparse(build(variant), policy="top_blocks(k=1, sinks=0, window=32)"), tokens(99, batch=2)
    caching = capture_masks(kv_caching(thin, 130, BATCH))
    for ends in ((0, 40), (40, 97)):
        jitted(caching, part(x, *ends))
    # a step that summarised the whole cache would call this
    monkeypatch.setattr(sys.modules["sieve_attn.jax.attention"], "_geometry", None)
    for at in (97, 98):
        jitted(caching, part(x, at, at + 1))
    layer = pz.select(caching).at_instances_of(KVCachingGeometricSparseAttention).get_sequence()[0]
    stack = {"blocks": 1} if variant == "llama_stacked" else {}
    order = (*stack, "batch", "head_groups", "seq", "projection")
    key = np.asarray(layer.kv_cache.value[0].unwrap(*order)).reshape(2, 2, 130, 8)
    held = layer.kv_geometry.value
    anew = sj.geometry(key, policies.TopBlocks(1), key_mask=np.broadcast_to(np.arange(130) < 99, (2, 130)))
    assert int(np.asarray(anew.count).sum()) == 4 * 99
    leaves = jax.tree.leaves(held, is_leaf=lambda x: isinstance(x, pz.nx.NamedArrayBase))
    for mine, other in zip(leaves, jax.tree.leaves(anew), strict=True):
        rest = [name for name in mine.named_shape if name.startswith("summary")]
        mine = np.asarray(mine.unwrap(*stack, "batch", "head_groups", *sorted(rest)))
        mine = mine.reshape(2, 2, *mine.shape[2 + len(stack) :])
        other = np.moveaxis(np.asarray(other), 0, 2) if other.ndim == 5 else np.asarray(other)
        np.testing.assert_array_equal(mine, other)
    for mask in captured_masks(caching).values():
        kept = np.asarray(mask.kept.unwrap(*stack, "batch", "head_groups", "q_block", "kv_block"))
        # the policy's window ends with the token itself, not with the cache
        assert kept[..., 4:7].all()
        assert (kept.sum(-1) <= 4).all()


def test_padding_in_the_prompt_is_no_token():
    model = build("mistral")
    x = tokens(24, batch=2)
    padded = pz.nx.wrap(
        np.where((np.arange(24) % 5 == 0) & (np.arange(2) == 1)[:, None], 0, x.unwrap("batch", "seq")), "batch", "seq"
    )
    made = kv_caching(sparse(model, threshold=EVERYTHING, block_size=8), 40, BATCH)
    dense = KVCachingTransformerLM.from_uncached(model, 40, BATCH)
    real = np.asarray(padded.unwrap("batch", "seq")) > 0
    one, two = (plain(jitted(m, padded)) for m in (made, dense))
    np.testing.assert_allclose(one[real], two[real], **CLOSE)
    one, two = (plain(jitted(m, part(x, 0, 1))) for m in (made, dense))
    np.testing.assert_allclose(one, two, **CLOSE)


def test_plain_attention_and_the_layer_in_one_model():
    model, prompt = build("gemma2"), tokens(16, batch=2)
    first = pz.select(model).at_instances_of(pz.nn.Attention).pick_nth_selected(0)
    mixed = first.apply(lambda attn: GeometricSparseAttention.from_attention(attn, threshold=EVERYTHING, block_size=8))
    made = kv_caching(mixed, 24, BATCH)
    assert pz.select(made).at_instances_of(pz.nn.KVCachingAttention).count() == 1
    dense = KVCachingTransformerLM.from_uncached(model, 24, BATCH)
    np.testing.assert_allclose(plain(jitted(made, prompt)), plain(jitted(dense, prompt)), **CLOSE)


def test_the_conversion_of_penzai_is_noticed():
    lost = KVCachingTransformerLM.from_uncached(sparse(build("llama"), threshold=EVERYTHING), 32, BATCH)
    with pytest.raises(ValueError, match=r"side input 'kv_token_positions'` belongs to a model that caches keys.*kv_caching"):
        lost(tokens(8, batch=2))


def test_what_cannot_follow_a_cache():
    model = sparse(build("llama"), threshold=EVERYTHING)

    def with_masks(masks):
        change = lambda layer: dataclasses.replace(layer, masks=masks)  # noqa: E731
        return pz.select(model).at_instances_of(GeometricSparseAttention).apply(change)

    from sieve_attn.penzai import CausalMask, ExplicitMask

    with pytest.raises(ValueError, match=r"`masks` must go by token positions to follow a cache; got ExplicitMask.*'seen'"):
        kv_caching(with_masks((ExplicitMask("seen"),)), 32, BATCH)
    with pytest.raises(ValueError, match=r"must read key positions from 'token_positions'.*got 'places'"):
        kv_caching(with_masks((CausalMask(kv_positions="places"),)), 32, BATCH)
    with pytest.raises(TypeError, match="`model` must be a TransformerLM; got Sequential"):
        kv_caching(model.body, 32, BATCH)
    with pytest.raises(ValueError, match="`cache_len` must be an integer of at least 1; got 0"):
        kv_caching(model, 0, BATCH)
    layer = pz.select(kv_caching(model, 32, BATCH)).at_instances_of(KVCachingGeometricSparseAttention).get_sequence()[0]
    x = pz.nx.wrap(np.zeros((2, 1, 32), np.float32), "batch", "seq", "embedding")
    with pytest.raises(ValueError, match="side input 'cache_end_index'` must say how much of the cache is filled"):
        layer(x, token_positions=pz.nx.arange("seq", 1))
