"""Sparse attention for Penzai models: a layer to put in the place of ``pz.nn.Attention``, and a view of what it keeps."""

from importlib.util import find_spec

if missing := [name for name in ("jax", "penzai", "treescope") if find_spec(name) is None]:
    raise ModuleNotFoundError(
        f"`sieve_attn.penzai` needs {missing[0]}, which is not installed; install it with `pip install 'sieve-attn[penzai]'`",
        name=missing[0],
    )

from sieve_attn.penzai.caching import KVCachingGeometricSparseAttention, kv_caching
from sieve_attn.penzai.layer import GeometricSparseAttention
from sieve_attn.penzai.masks import ManifoldMask
from sieve_attn.penzai.reading import AttentionAxes, CausalMask, ExplicitMask
from sieve_attn.penzai.view import MaskFigure, capture_masks, captured_masks, show_masks

__all__ = [
    "AttentionAxes", "CausalMask", "ExplicitMask", "GeometricSparseAttention", "KVCachingGeometricSparseAttention",
    "ManifoldMask", "MaskFigure", "capture_masks", "captured_masks", "kv_caching", "show_masks",
]  # fmt: skip
