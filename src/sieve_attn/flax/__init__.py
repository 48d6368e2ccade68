"""Flax NNX modules: AETHER's gate, number-theoretic attention, causal top-k attention and ternary projections.

The modules of :mod:`sieve_attn.layers` over JAX arrays, with parameters and state in NNX variables: ``nnx.split`` takes them
apart, ``nnx.merge`` puts them together. :func:`from_torch` and :func:`to_torch` carry weights over.
"""

from importlib.util import find_spec

if missing := [name for name in ("jax", "flax") if find_spec(name) is None]:
    raise ModuleNotFoundError(
        f"`sieve_attn.flax` needs {missing[0]}, which is not installed; install it with `pip install 'sieve-attn[flax]'`",
        name=missing[0],
    )

from sieve_attn.flax.aether import AetherAttention
from sieve_attn.flax.convert import from_torch, to_torch
from sieve_attn.flax.sparse_causal import SparseCausalAttention
from sieve_attn.flax.sparse_index import MianChowlaSelfAttention, PrimeSelfAttention, SparseIndexAttention, SquareSelfAttention
from sieve_attn.flax.ternary import TernaryLinear

__all__ = [
    "AetherAttention", "MianChowlaSelfAttention", "PrimeSelfAttention", "SparseCausalAttention", "SparseIndexAttention",
    "SquareSelfAttention", "TernaryLinear", "from_torch", "to_torch",
]  # fmt: skip
