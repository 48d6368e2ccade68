"""Sieve for JAX: the library's attention on JAX arrays, under ``jit``, ``grad``, ``vmap`` and ``jax.checkpoint``.

On the CPU the C++ kernels run through XLA's foreign function interface; elsewhere kept blocks are gathered in ``jax.numpy``, or
read by a Pallas kernel that is asked for by name. Under ``jit`` shapes are fixed, so a selection holds ``max_blocks`` blocks a
tile; a tile that wants more attends to all of its blocks, and the report counts it.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("jax") is None:
    raise ModuleNotFoundError(
        "`sieve_attn.jax` needs jax, which is not installed; install it with `pip install 'sieve-attn[jax]'`", name="jax"
    )

from sieve_attn.jax.attention import attend, attention, manifold, select
from sieve_attn.jax.geometry import append, geometry
from sieve_attn.jax.offsets import offset_attention
from sieve_attn.jax.report import Report
from sieve_attn.jax.selection import PaddedBlocks
from sieve_attn.jax.top_k import top_k_attention

__all__ = [
    "PaddedBlocks", "Report", "append", "attend", "attention", "geometry", "manifold", "offset_attention", "select",
    "top_k_attention",
]  # fmt: skip
