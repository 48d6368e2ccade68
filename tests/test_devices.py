"""One call, one device: kernels take addresses, so an array elsewhere must be named and not read. `meta` stands for elsewhere."""

import pytest
import torch

from sieve_attn import attend, attention, patterns, policies
from sieve_attn.functional import offset_attention, top_k_attention
from sieve_attn.layers import PrimeSelfAttention, SparseCausalAttention
from sieve_attn.patterns import RandomBlocks

X = torch.randn(1, 2, 64, 16)
AWAY = X.to("meta")
CALLS = {
    "attention": lambda q, k, v: attention(q, k, v, causal=True),
    "a policy": lambda q, k, v: attention(q, k, v, policies.TopBlocks(2), causal=True),
    "top_k_attention": lambda q, k, v: top_k_attention(q, k, v, 3, causal=True),
    "offset_attention": lambda q, k, v: offset_attention(q, k, v, patterns.Primes()),
}
OPTIONS = {
    "mask": torch.ones(1, 1, 64, 64, dtype=torch.bool),
    "key_mask": torch.ones(1, 64, dtype=torch.bool),
    "bias": torch.zeros(1, 1, 64, 64),
    "sink": torch.zeros(2),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["key", "value"])
def test_keys_and_values_lie_beside_queries(call, name):
    key, value = (AWAY, X) if name == "key" else (X, AWAY)
    with pytest.raises(ValueError, match=f"`{name}` must lie on the device of `query`, cpu; got meta; move it with"):
        CALLS[call](X, key, value)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_lie_beside_queries(name):
    with pytest.raises(ValueError, match=f"`{name}` must lie on the device of `query`, cpu; got meta"):
        attention(X, X, X, **{name: OPTIONS[name].to("meta")})


def test_selections_lie_beside_queries():
    selection = RandomBlocks(1, 16, window=1).selection(64, 64).beside(AWAY)
    with pytest.raises(ValueError, match="`selection` must lie on the device of `query`, cpu; got meta"):
        attend(X, X, X, selection, causal=True)


@pytest.mark.parametrize("make", [PrimeSelfAttention, SparseCausalAttention])
def test_layers_tell_their_shapes_without_memory(make):
    layer = make(16, device="meta")
    assert layer(torch.empty(2, 9, 16, device="meta")).shape == (2, 9, 16)
