"""xFormers' attention biases, recognised by type name and ``materialize``, so that xFormers need not be installed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sieve_attn.checks import error

_TRIANGULAR = {"LowerTriangularMask"}
_BOTTOM_RIGHT = {"LowerTriangularFromBottomRightMask"}
_LOCAL = {"LowerTriangularFromBottomRightLocalAttentionMask"}


def read_attn_bias(attn_bias: Any, query: Tensor, key: Tensor, groups: tuple[int, int] | None = None) -> dict[str, Any]:
    """``attn_bias`` as keyword arguments of ``attention``: ``causal``, ``window``, ``bias``, ``cu_seqlens``.

    A lower-triangular bias is aligned top left in xFormers; with ``q_len != kv_len`` it becomes a tensor. ``groups``: the
    (groups, heads) of a grouped call, whose heads lie side by side in ``query``.
    """
    plain = {"causal": False, "bias": None}
    if attn_bias is None:
        return plain
    q_len, kv_len = query.shape[2], key.shape[2]
    wide = (query.shape[0], query.shape[1], q_len, kv_len, groups)
    # some of xFormers' biases are tensors by type, and hold nothing that could be added
    if isinstance(attn_bias, Tensor) and not hasattr(attn_bias, "materialize"):
        return plain | {"bias": _dense(attn_bias, *wide)}
    name = type(attn_bias).__name__
    if name in _BOTTOM_RIGHT or (name in _TRIANGULAR and q_len == kv_len):
        return plain | {"causal": True}
    if name in _LOCAL and hasattr(attn_bias, "_window_size"):
        return plain | {"causal": True, "window": int(attn_bias._window_size)}
    if name in ("BlockDiagonalMask", "BlockDiagonalCausalMask"):
        if query.shape[0] != 1:
            rule = "must come with a batch of 1, its sequences side by side"
            raise error("attn_bias", rule, f"{name} with batch {query.shape[0]}", "pack the sequences along the length")
        packed = _packed(attn_bias, q_len, kv_len)
        if packed is not None:
            return plain | {"causal": name == "BlockDiagonalCausalMask", "cu_seqlens": packed}
    if hasattr(attn_bias, "materialize"):
        dense = attn_bias.materialize((q_len, kv_len), dtype=query.dtype, device=query.device)
        return plain | {"bias": _dense(dense.float(), *wide)}
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
    # sequences without a token have no part in anything
    return starts[0].unique_consecutive() if same else None


def _dense(bias: Tensor, batch: int, heads: int, q_len: int, kv_len: int, groups: tuple[int, int] | None) -> Tensor:
    """A tensor bias with the four axes that ``attention`` takes."""
    if not bias.dtype.is_floating_point:
        rule = "must be floating: a tensor is added to the logits"
        raise error("attn_bias", rule, f"dtype {bias.dtype}", "write a mask as 0 and -inf, or use `attention(mask=...)`")
    given = tuple(bias.shape)
    if bias.ndim == 5 and groups is not None:
        known = all(n in (1, whole) for n, whole in zip(given, (batch, *groups, q_len, kv_len), strict=True))
        if known:
            spread = given[1:3] if given[1:3] == (1, 1) else groups
            return bias.expand(given[0], *spread, *given[3:]).flatten(1, 2)
    # [batch, q_len, kv_len] holds for all heads, [q_len, kv_len] for all sequences as well
    made = bias[:, None] if bias.ndim == 3 else bias[None, None] if bias.ndim == 2 else bias
    if made.ndim != 4 or any(n not in (1, whole) for n, whole in zip(made.shape, (batch, heads, q_len, kv_len), strict=True)):
        wide = [batch, heads, q_len, kv_len] if groups is None else [batch, *groups, q_len, kv_len]
        raise error("attn_bias", f"must broadcast to {wide}", f"shape {given}", "add axes of length 1 where it does not vary")
    return made
