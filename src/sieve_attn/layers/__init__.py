"""PyTorch modules over the pipeline."""

from sieve_attn.layers.aether import AetherAttention

__all__ = ["AetherAttention"]
