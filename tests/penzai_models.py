"""Tiny random Penzai models of every transformer variant, and what the tests of the Penzai front-end share."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from penzai import pz
from penzai.models.transformer.variants import gpt_neox, llamalike_common

from sieve_attn.penzai import GeometricSparseAttention

EVERYTHING = -float("inf")
WINDOW = llamalike_common.AttentionTypeSlidingWindowCausal(9)
GLOBAL = llamalike_common.AttentionTypeGlobalCausal()
LLAMALIKE = {
    "llama": {"num_kv_heads": 2, "query_head_multiplier": 2},
    "llama_stacked": {"num_kv_heads": 2, "query_head_multiplier": 2, "use_layer_stack": True},
    "mistral": {"num_kv_heads": 2, "query_head_multiplier": 2, "attention_type": WINDOW},
    "gemma": {"num_kv_heads": 1, "query_head_multiplier": 4, "mlp_variant": "geglu_approx", "tie_embedder_and_logits": True},
    "gemma2": {
        "num_kv_heads": 2, "query_head_multiplier": 2, "mlp_variant": "geglu_approx", "tie_embedder_and_logits": True,
        "attention_type": (WINDOW, GLOBAL), "use_post_attn_norm": True, "use_post_ffw_norm": True,
        "final_logit_softcap": 30.0, "attn_logits_soft_cap": 5.0,
    },
}  # fmt: skip
VARIANTS = [*LLAMALIKE, "gpt_neox"]


def quick(*few):
    """All variants, those that are not among the ``few`` for the long tests."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.long) for name in VARIANTS]


VOCABULARY = 17


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@cache
def build(variant):
    """A model of width 32; queries and keys are wide enough that attention is far from uniform."""
    if variant == "gpt_neox":
        config = gpt_neox.GPTNeoXTransformerConfig(
            num_attention_heads=4, embedding_dim=32, projection_dim=8, mlp_hidden_dim=32, num_decoder_blocks=1,
            vocab_size=VOCABULARY, activation_fn="gelu_exact", rope_subset_size=4, rope_wavelength=1e4, layernorm_epsilon=1e-5,
            parameter_dtype=jnp.float32, activation_dtype=jnp.float32,
        )  # fmt: skip
        model = gpt_neox.build_gpt_neox_transformer(config, jax.random.key(0))
    else:
        shape = {
            "embedding_dim": 32,
            "projection_dim": 8,
            "mlp_hidden_dim": 32,
            "num_decoder_blocks": 2 if variant == "gemma2" else 1,
        }
        given = {"mlp_variant": "swiglu", "tie_embedder_and_logits": False} | shape | LLAMALIKE[variant]
        config = llamalike_common.LlamalikeTransformerConfig(vocab_size=VOCABULARY, **given)
        model = llamalike_common.build_llamalike_transformer(config, jax.random.key(0))
    for parameter in pz.select(model).at_instances_of(pz.Parameter).get_sequence():
        if "query" in str(parameter.label) or "key" in str(parameter.label):
            parameter.value = parameter.value * 2.5
    return model


def sparse(model, **options):
    """``model`` with every attention layer replaced."""
    replace = lambda attn: GeometricSparseAttention.from_attention(attn, **options)  # noqa: E731
    return pz.select(model).at_instances_of(pz.nn.Attention).apply(replace)


def tokens(length=50, seed=1, **batch):
    shape = (*batch.values(), length)
    return pz.nx.wrap(jax.random.randint(jax.random.key(seed), shape, 1, VOCABULARY), *batch, "seq")


def part(x, start, stop):
    return x[{"seq": pz.slice[start:stop]}]


def plain(x):
    """A NumPy array with axes in order of their names."""
    return np.asarray(x.unwrap(*sorted(x.named_shape)))


jitted = pz.variable_jit(lambda model, x, **sides: model(x, **sides))


def attention_of(model):
    """The first ``pz.nn.Attention`` of a model."""
    return pz.select(model).at_instances_of(pz.nn.Attention).get_sequence()[0]
