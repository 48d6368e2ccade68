"""Published functional forms, thin over the pipeline."""

from sieve_attn.pipeline import attend, attention

__all__ = ["attend", "attention"]
