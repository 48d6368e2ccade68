"""Published functional forms, thin over the pipeline."""

from importlib import import_module

from sieve_attn.pipeline import attend, attention

__all__ = ["attend", "attention", "offset_attention"]  # noqa: F822


def __getattr__(name):
    # over PyTorch, which `attend` and `attention` do not need
    if name == "offset_attention":
        return import_module("sieve_attn.offset_attention").offset_attention
    raise AttributeError(f"module 'sieve_attn.functional' has no attribute {name!r}; it offers {', '.join(__all__)}")
