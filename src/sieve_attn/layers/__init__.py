"""PyTorch modules over the pipeline."""

from sieve_attn.layers.aether import AetherAttention
from sieve_attn.layers.sparse_index import (
    MianChowlaSelfAttention,
    PrimeSelfAttention,
    SparseIndexAttention,
    SquareSelfAttention,
)

__all__ = ["AetherAttention", "MianChowlaSelfAttention", "PrimeSelfAttention", "SparseIndexAttention", "SquareSelfAttention"]
