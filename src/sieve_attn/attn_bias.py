"""xFormers' attention biases, recognised by type name and ``materialize``, so that xFormers need not be installed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sieve_attn.checks import error

_TRIANGULAR = {"LowerTriangularMask"}
_BOTTOM_RIGHT = {"LowerTriangularFromBottomRightMask"}
_LOCAL = {"LowerTriangularFromBottomRightLocalAttentionMask"}


def read_attn_bias(attn_bias: Any, query: Tensor, key: Tensor) -> dict[str, Any]:
    """``attn_bias`` as keyword arguments of ``attention``: ``causal``, ``window``, ``mask``, ``bias``, ``cu_seqlens``.

    A lower-triangular bias is aligned top left in xFormers; with ``q_len != kv_len`` it becomes a mask.
    """
    plain = {"causal": False, "bias": None}
    if attn_bias is None:
        return plain
    if isinstance(attn_bias, Tensor):
        # [batch, q_len, kv_len] holds for all heads, [q_len, kv_len] for all sequences as well
        bias = attn_bias[:, None] if attn_bias.ndim == 3 else attn_bias[None, None] if attn_bias.ndim == 2 else attn_bias
        return plain | {"bias": bias}
    name = type(attn_bias).__name__
    q_len, kv_len = query.shape[2], key.shape[2]
    if name in _BOTTOM_RIGHT or (name in _TRIANGULAR and q_len == kv_len):
        return plain | {"causal": True}
    if name in _LOCAL and hasattr(attn_bias, "_window_size"):
        return plain | {"causal": True, "window": int(attn_bias._window_size)}
    if name in ("BlockDiagonalMask", "BlockDiagonalCausalMask"):
        packed = _packed(attn_bias, q_len, kv_len)
        if packed is not None:
            return plain | {"causal": name == "BlockDiagonalCausalMask", "cu_seqlens": packed}
    if hasattr(attn_bias, "materialize"):
        dense = attn_bias.materialize((q_len, kv_len), dtype=query.dtype, device=query.device)
        dense = dense.reshape((1,) * (4 - dense.ndim) + tuple(dense.shape))
        return plain | {"bias": dense.float()}
    raise error(
        "attn_bias",
        "must be None, a tensor, or an object with `materialize(shape, dtype, device)`",
        name,
        "use a bias of xformers.ops.fmha.attn_bias",
        TypeError,
    )


def _packed(attn_bias: Any, q_len: int, kv_len: int) -> Tensor | None:
    """The sequence starts of a block-diagonal bias whose queries and keys are packed alike."""
    starts = [getattr(getattr(attn_bias, f"{side}_seqinfo", None), "seqstart", None) for side in ("q", "k")]
    if any(s is None for s in starts) or q_len != kv_len:
        return None
    same = starts[0].shape == starts[1].shape and bool((starts[0] == starts[1]).all())
    return starts[0] if same else None
