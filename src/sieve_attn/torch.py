"""The PyTorch front-end: ``attention`` and ``attend`` on tensors, and AETHER's operator in the xFormers layout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sieve_attn import checks
from sieve_attn.arrays import torch_ops
from sieve_attn.attend import torch_op
from sieve_attn.attn_bias import read_attn_bias
from sieve_attn.pipeline import attend, attention
from sieve_attn.types import Call, Selection

__all__ = ["aether_attention", "attend", "attention"]


def aether_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float = 0.15,
    block_size: int = 64,
    *,
    attn_bias: Any = None,
    scale: float | None = None,
    causal: bool = False,
    p: float = 0.0,
) -> Tensor:
    """Attention over the key blocks that AETHER's Euclidean gate keeps, in the xFormers layout.

    A block is kept for a tile of ``block_size`` queries iff ``max over its queries of scale * (q.mu + ||q|| r) > threshold``,
    ``mu`` the mean of the block's keys and ``r`` their largest distance from it. No key whose scaled logit exceeds the
    threshold is dropped. That is exact attention only at ``-inf``: softmax does not change when logits shift, so an absolute
    threshold has no absolute meaning, and 0.15 keeps every block of Gaussian keys. For a promise about what was dropped use
    ``attention(..., policy=policies.Certified(error=0.02))``.

    query, key, value: [batch, len, heads, head_dim], [batch, len, head_dim] (one head) or [batch, len, groups, heads,
    head_dim] (grouped). ``attn_bias``: a tensor added to the scaled logits, broadcasting to [batch, heads, q_len, kv_len], or
    an xFormers bias object (lower-triangular, from bottom right, local, block-diagonal), recognised by its name. ``p``
    (dropout) must be 0. Returns the shape of ``query`` with the head_dim of ``value``. Differentiable in query, key, value
    and a tensor bias; dropped pairs get exactly zero gradient. Raises ValueError on shapes, NaN thresholds or dropout.

    Source: the AETHER operator proposed to xFormers. Where everything is kept it equals::

        softmax(scale * query @ key.transpose(-2, -1) + attn_bias) @ value        # per head
    """
    threshold = checks.threshold("threshold", threshold)
    block_size = checks.positive_int("block_size", block_size, "try 48 or 64")
    if p:
        raise checks.error("p", "must be 0: a kept set has no meaning under dropout", repr(p), "drop it, or call model.eval()")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise checks.error(name, "must be a tensor", type(x).__name__, "`attention` takes NumPy arrays", TypeError)
    q, k, v, restore = _from_xformers(query, key, value)
    extra = read_attn_bias(attn_bias, q, k, tuple(query.shape[2:4]) if query.ndim == 5 else None)
    bias = extra.pop("bias")
    # the policy goes by its text, so that the same line works inside torch.compile
    policy = f"aether(threshold={threshold!r}, block_size={block_size})"
    causal = extra.pop("causal") or causal
    out, _ = run(q, k, v, policy, causal=causal, scale=scale, bias=bias, **extra)
    return restore(out)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: str,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    sink: Tensor | None = None,
    window: int | None = None,
    per_query: bool = False,
    backend: str = "auto",
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``(output, lse)`` of the whole pipeline as one operator, checked first; ``policy`` goes by its text."""
    query, key, value = torch_ops.autocast(query, key, value)
    checks.qkv(query, key, value, xp=torch_ops)
    if isinstance(cu_seqlens, (list, tuple)):
        cu_seqlens = torch.tensor(cu_seqlens, device=query.device)
    # a compiler does not know the edges: the operator checks them when it runs
    edges = None if torch.compiler.is_compiling() else cu_seqlens
    checks.attention_options(
        query,
        key,
        scale=scale,
        mask=mask,
        key_mask=key_mask,
        bias=bias,
        softcap=softcap,
        cu_seqlens=edges,
        sink=sink,
        window=window,
        dropout=dropout,
        xp=torch_ops,
    )
    torch_op.refuse_tangents(query, key, value, bias, sink)
    torch_op.refuse_transforms(query, key, value, bias, sink)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
    made = torch_op.attention_op(
        query, key, value, mask, key_mask, bias, cu_seqlens, sink, causal, scale, softcap, window, policy, per_query, backend
    )
    return made[0], made[1]


def compiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: str,
    *,
    geometry: Any,
    selection: Any,
    return_report: bool,
    return_lse: bool,
    **options: Any,
) -> Any:
    """What ``attention`` is inside ``torch.compile`` and transforms. Reports and ready-made stages do not cross its border."""
    for name, given in (("geometry", geometry), ("selection", selection), ("return_report", return_report or None)):
        if given is not None:
            raise checks.error(
                name,
                "cannot be used inside torch.compile or a transform of torch.func",
                type(given).__name__,
                "call attention outside of that function for it, or use `attend` with a selection",
            )
    output, lse = run(query, key, value, policy, **options)
    return (output, lse) if return_lse else output


def compiled_attend(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, *, scale: float | None, backend: str, **options: Any
) -> tuple[Tensor, Tensor]:
    """What ``attend`` is inside ``torch.compile``: the same checks, then one operator that chooses its backend when it runs."""
    query, key, value = torch_ops.autocast(query, key, value)
    checks.qkv(query, key, value, xp=torch_ops)
    checked = {name: x for name, x in options.items() if name != "causal"}
    checks.attention_options(query, key, scale=scale, dropout=0.0, xp=torch_ops, **checked)
    checks.selection_fits(selection, query, key)
    call = Call(query, key, value, scale=1.0 / math.sqrt(query.shape[3]) if scale is None else scale, **options)
    return torch_op.attend(call, selection, backend, None)


def _from_xformers(query: Tensor, key: Tensor, value: Tensor):
    """[batch, len, (groups,) heads, dim] to [batch, heads, len, dim], and the way back for the output."""
    ranks = {query.ndim, key.ndim, value.ndim}
    if len(ranks) != 1 or query.ndim not in (3, 4, 5):
        raise checks.error(
            "query, key, value",
            "must all have 3, 4 or 5 axes: [batch, len, (groups,) (heads,) head_dim]",
            f"{query.ndim}, {key.ndim} and {value.ndim}",
            "add the missing axes with unsqueeze",
        )
    if query.ndim == 3:
        return *(x[:, None] for x in (query, key, value)), lambda out: out[:, 0]
    if query.ndim == 4:
        return *(x.transpose(1, 2) for x in (query, key, value)), lambda out: out.transpose(1, 2)
    groups, heads = query.shape[2:4]
    for name, x in (("key", key), ("value", value)):
        if x.shape[2:4] != query.shape[2:4]:
            raise checks.error(
                name,
                f"must have the groups and heads of `query`, {(groups, heads)}",
                tuple(x.shape[2:4]),
                "expand it over the heads of a group, as xFormers asks",
            )

    def flat(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1, 4).flatten(1, 2)

    return flat(query), flat(key), flat(value), lambda out: out.unflatten(1, (groups, heads)).permute(0, 3, 1, 2, 4)
