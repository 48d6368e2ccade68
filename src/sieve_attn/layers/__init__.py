"""PyTorch modules over the pipeline."""

from sieve_attn.layers.aether import AetherAttention
from sieve_attn.layers.paths import LocalPath, StatePath
from sieve_attn.layers.sparse_causal import SparseCausalAttention
from sieve_attn.layers.sparse_index import MianChowlaSelfAttention, PrimeSelfAttention, SparseIndexAttention, SquareSelfAttention
from sieve_attn.layers.ternary import PackedTernaryLinear, TernaryLinear, pack_ternary
from sieve_attn.layers.tilelli import TilelliBlock

__all__ = [
    "AetherAttention", "LocalPath", "MianChowlaSelfAttention", "PackedTernaryLinear", "PrimeSelfAttention",
    "SparseCausalAttention", "SparseIndexAttention", "SquareSelfAttention", "StatePath", "TernaryLinear", "TilelliBlock",
    "pack_ternary",
]  # fmt: skip
