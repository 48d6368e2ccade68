"""Published functional forms, thin over the pipeline."""

from sieve_attn.attend.paged import paged_attention
from sieve_attn.pipeline import attend, attention

__all__ = ["attend", "attention", "paged_attention"]
