"""``GeometricSparseAttention`` in the place of ``pz.nn.Attention``, in every transformer variant of Penzai."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from penzai import pz
from penzai_models import EVERYTHING, VARIANTS, attention_of, build, jitted, plain, quick_compilation, sparse, tokens  # noqa: F401

import sieve_attn
from sieve_attn import policies
from sieve_attn.penzai import AttentionAxes, CausalMask, ExplicitMask, GeometricSparseAttention

CLOSE = {"atol": 3e-5, "rtol": 3e-5}
POLICY = "top_blocks(k=1, sinks=0, window=8)"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_threshold_of_minus_infinity_is_the_dense_model(variant):
    model, x = build(variant), tokens(batch=2)
    np.testing.assert_allclose(
        plain(jitted(sparse(model, threshold=EVERYTHING, block_size=8), x)), plain(jitted(model, x)), **CLOSE
    )


@pytest.mark.parametrize("variant", ["llama_stacked", pytest.param("gemma2", marks=pytest.mark.long)])
def test_a_policy_prunes_and_a_jitted_model_prunes_the_same(variant):
    model, x = build(variant), tokens(100, batch=2)
    thin = sparse(model, policy=POLICY)
    logits = plain(thin(x))
    assert np.abs(logits - plain(jitted(model, x))).max() > 1e-2
    np.testing.assert_allclose(plain(jitted(thin, x)), logits, **CLOSE)


def test_the_layer_is_the_functional_form_on_the_same_arrays():
    attn, x = attention_of(build("llama")), activations(batch=2, beam=3, seq=70)
    layer = GeometricSparseAttention.from_attention(attn, threshold=30.0, block_size=4)
    positions = {"token_positions": pz.nx.arange("seq", 70)}
    query, key, value = (part(x, **positions) for part in (layer.input_to_query, layer.input_to_key, layer.input_to_value))
    order = ("batch", "beam", "head_groups", "query_heads", "seq", "projection")
    q = torch.tensor(np.asarray(query.unwrap(*order)).reshape(6, 4, 70, 8))
    k, v = (torch.tensor(np.asarray(y.unwrap(*order[:3], *order[4:])).reshape(6, 2, 70, 8)) for y in (key, value))
    wanted, report = sieve_attn.attention(q, k, v, policies.Aether(30.0, 4), causal=True, scale=1.0, return_report=True)
    assert 0.1 < report.density < 0.9
    rows = pz.nx.arange("seq", 70)
    mask = rows >= rows.untag("seq").tag("kv_seq")
    made = layer.attend(query, key, value, mask)
    assert set(made.named_shape) == set(order)
    np.testing.assert_allclose(np.asarray(made.unwrap(*order)).reshape(6, 4, 70, 8), wanted.numpy(), **CLOSE)


def activations(seed=0, embedding=32, **axes):
    return pz.nx.wrap(jax.random.normal(jax.random.key(seed), (*axes.values(), embedding)), *axes, "embedding")


def test_without_masks_every_key_is_seen():
    layer = GeometricSparseAttention.from_attention(attention_of(build("llama")), threshold=EVERYTHING, block_size=8)
    names = ("head_groups", "seq", "projection")
    draw = lambda seed, *shape: pz.nx.wrap(jax.random.normal(jax.random.key(seed), shape), *names)  # noqa: E731
    key, value = draw(1, 2, 20, 8), draw(2, 2, 20, 8)
    query = pz.nx.wrap(jax.random.normal(jax.random.key(3), (2, 2, 20, 8)), "head_groups", "query_heads", "seq", "projection")
    logits = jnp.einsum("ghqd,gkd->ghqk", query.unwrap(*query.named_shape), key.unwrap(*names))
    wanted = jnp.einsum("ghqk,gkd->ghqd", jax.nn.softmax(logits, -1), value.unwrap(*names))
    np.testing.assert_allclose(np.asarray(layer.attend(query, key, value).unwrap(*query.named_shape)), wanted, **CLOSE)


def test_tokens_after_a_tile_influence_nothing_in_it():
    # a tile is 64 queries, which choose together
    thin, start = sparse(build("llama"), policy=POLICY), tokens(64)
    one, other = (plain(jitted(thin, pz.nx.concatenate([start, tokens(36, seed=n)], "seq"))) for n in (5, 6))
    np.testing.assert_allclose(one[:64], other[:64], **CLOSE)
    assert np.abs(one[64:] - other[64:]).max() > 0.1


def test_the_constructor_takes_the_sublayers_of_an_attention():
    model, x = build("llama"), tokens(batch=2)

    def replace(attn):
        parts = (attn.input_to_query, attn.input_to_key, attn.input_to_value, attn.attn_value_to_output)
        return GeometricSparseAttention(*parts, block_size=8, threshold=EVERYTHING)

    made = pz.select(model).at_instances_of(pz.nn.Attention).apply(replace)
    layer = pz.select(made).at_instances_of(GeometricSparseAttention).get_sequence()[0]
    assert layer.named_axes() == AttentionAxes(common_heads=("head_groups",), query_heads=("query_heads",))
    np.testing.assert_allclose(plain(jitted(made, x)), plain(jitted(model, x)), **CLOSE)


def test_what_is_read_from_the_layer_that_is_replaced():
    layer = GeometricSparseAttention.from_attention(attention_of(build("gemma2")), policy="adaptive(mass=0.9)")
    assert (layer.scale, layer.softcap, layer.masks) == (1.0, 5.0, (CausalMask(window=9),))
    assert (layer.block_size, layer.threshold) == (16, None)
    assert layer.chosen_policy() == policies.Adaptive(0.9)
    assert GeometricSparseAttention.from_attention(attention_of(build("llama"))).chosen_policy() == policies.Aether(0.15, 64)


def rescaled_and_masked_explicitly():
    attn = attention_of(build("llama"))
    einsum, *_, softmax = attn.query_key_to_attn.sublayers
    layers = [einsum, pz.nn.ConstantRescale(0.5), pz.nn.Identity(), pz.nn.ApplyExplicitAttentionMask("seen", -1e9), softmax]
    return dataclasses.replace(attn, query_key_to_attn=pz.nn.Sequential(layers))


@pytest.mark.parametrize("axes", [("seq", "kv_seq"), ("batch", "seq", "kv_seq"), ("head_groups", "query_heads", "kv_seq")])
def test_explicit_masks_and_scales_between_the_layers(axes):
    attn, x = rescaled_and_masked_explicitly(), activations(batch=2, seq=20)
    layer = GeometricSparseAttention.from_attention(attn, threshold=EVERYTHING, block_size=8)
    assert (layer.scale, layer.masks) == (0.5, (ExplicitMask("seen"),))
    sizes = {"batch": 2, "head_groups": 2, "query_heads": 2, "seq": 20, "kv_seq": 20}
    drawn = jax.random.bernoulli(jax.random.key(4), 0.5, tuple(sizes[n] for n in axes)).at[..., 0].set(True)
    sides = {"seen": pz.nx.wrap(drawn, *axes), "token_positions": pz.nx.arange("seq", 20)}
    run = jitted if "batch" in axes else lambda layer, x, **sides: layer(x, **sides)
    np.testing.assert_allclose(plain(run(layer, x, **sides)), plain(jitted(attn, x, **sides)), **CLOSE)


@pytest.mark.parametrize("how", ["at once", "jitted"])
def test_a_causal_mask_given_explicitly_leaks_nothing_into_the_choice(how):
    # queries 64..79 see a part of the second block, whose mean holds keys after them
    policy = "Policy(Euclidean(), TopK(1), block_size=64, query_tile=16)"
    layer = GeometricSparseAttention.from_attention(rescaled_and_masked_explicitly(), policy=policy)
    rows = pz.nx.arange("seq", 128)
    sides = {"seen": rows >= rows.untag("seq").tag("kv_seq"), "token_positions": rows}
    start = activations(seq=80)
    run = jitted if how == "jitted" else lambda layer, x, **sides: layer(x, **sides)
    ends = [scale * activations(seed=8, seq=48) for scale in (0.0, 10.0, -10.0)]
    made = [run(layer, pz.nx.concatenate([start, end], "seq"), **sides) for end in ends]
    one, two, three = (np.asarray(y.unwrap("seq", "embedding"))[:80] for y in made)
    np.testing.assert_allclose(one, two, **CLOSE)
    np.testing.assert_allclose(one, three, **CLOSE)


@pytest.mark.parametrize("variant", [pytest.param("llama", marks=pytest.mark.long), "mistral"])
def test_padding_and_gaps_in_the_positions(variant):
    model = build(variant)
    every = sparse(model, threshold=EVERYTHING, block_size=8)
    positions = np.cumsum(np.random.default_rng(0).integers(1, 4, 40))
    positions[[3, 4, 20]] = -1
    sides = pz.nx.wrap(jnp.asarray(positions), "seq")
    x, real = tokens(40), positions >= 0
    wanted = plain(jitted(model, x, token_positions=sides))[real]
    for run in (jitted, lambda model, x, **sides: model(x, **sides)):
        np.testing.assert_allclose(plain(run(every, x, token_positions=sides))[real], wanted, **CLOSE)


def test_positions_that_do_not_rise():
    every = sparse(build("llama"), threshold=EVERYTHING, block_size=8)
    fallen = pz.nx.wrap(jnp.array([0, 1, 3, 2, 4]), "seq")
    with pytest.raises(ValueError, match="`token_positions` must rise along the sequence, -1 for padding"):
        every(tokens(5), token_positions=fallen)
    assert np.isnan(plain(jitted(every, tokens(5), token_positions=fallen))).all()


def test_gradients_are_those_of_the_dense_model():
    model, x = build("llama"), tokens(40)
    every = sparse(model, threshold=EVERYTHING, block_size=8)

    def gradient(model):
        pure, parameters = pz.unbind_params(model, freeze=True)
        loss = lambda p: (pz.bind_variables(pure, p)(x).unwrap("seq", "vocabulary") ** 2).mean()  # noqa: E731
        return jax.tree_util.tree_leaves(jax.jit(jax.grad(loss))(parameters))

    for one, two in zip(gradient(every), gradient(model), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4, rtol=1e-3)
