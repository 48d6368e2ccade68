"""Language models: strings in, objects out that print as text, with sparse attention and its report on request."""

from sieve_attn.llm.config import AetherSparseAttentionConfig
from sieve_attn.llm.llm import LLM
from sieve_attn.llm.loading import EMBEDDED, embedded_model_is_present
from sieve_attn.llm.outputs import Output, Timings

__all__ = ["EMBEDDED", "LLM", "AetherSparseAttentionConfig", "Output", "Timings", "embedded_model_is_present"]
