"""Sieve: sparse attention that says how much it skipped.

The names below load what they need when they are first used; importing the package imports no framework.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

_NAMES = {
    "AetherAttention": "sieve_attn.layers",
    "AetherSparseAttentionConfig": "sieve_attn.llm",
    "LLM": "sieve_attn.llm",
    "SparseCausalAttention": "sieve_attn.layers",
    "TernaryLinear": "sieve_attn.layers",
    "MianChowlaSelfAttention": "sieve_attn.layers",
    "PrimeSelfAttention": "sieve_attn.layers",
    "SquareSelfAttention": "sieve_attn.layers",
    "aether_attention": "sieve_attn.torch",
    "attend": "sieve_attn.pipeline",
    "attention": "sieve_attn.pipeline",
    "sparsify": "sieve_attn.transformers",
}
_MODULES = (
    "aether", "certify", "evaluation", "flax", "functional", "geometry", "jax", "layers", "llm", "patterns", "penzai", "policies",
    "scores", "selection", "testing", "torch", "transformers", "types",
)  # fmt: skip

__all__ = [*_NAMES, *_MODULES]

try:
    __version__ = version("sieve-attn")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"


_EXTRAS = {"torch": "torch", "transformers": "hf", "safetensors": "hf", "jax": "jax", "hypothesis": "dev", "pytest": "dev"}


def __getattr__(name):
    try:
        if name in _NAMES:
            return getattr(import_module(_NAMES[name]), name)
        if name in _MODULES:
            return import_module(f"sieve_attn.{name}")
    except ModuleNotFoundError as missing:
        if missing.name not in _EXTRAS or name in ("flax", "penzai"):
            raise  # those two say it themselves
        models = _NAMES.get(name, f"sieve_attn.{name}") in ("sieve_attn.llm", "sieve_attn.transformers", "sieve_attn.evaluation")
        remedy = f"install it with `pip install 'sieve-attn[{'hf' if models else _EXTRAS[missing.name]}]'`"
        raise ModuleNotFoundError(
            f"`sieve_attn.{name}` needs {missing.name}, which is not installed; {remedy}", name=missing.name
        ) from None
    raise AttributeError(f"module 'sieve_attn' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__():
    return __all__


class _Package(ModuleType):
    """``sieve_attn.attend`` is the function, although a stage's folder has that name and importing it would take the place."""

    @property
    def attend(self):
        return import_module("sieve_attn.pipeline").attend

    @attend.setter
    def attend(self, folder):
        pass


sys.modules[__name__].__class__ = _Package
