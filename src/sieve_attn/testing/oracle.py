"""Plain attention, written once more and apart from the library, so that nothing is tested against itself.

Dense, masked, differentiable by PyTorch, in whatever dtype its inputs have: with fp64 inputs it is the truth, with others the
plain code that tolerances are measured on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(
    q_len: int,
    kv_len: int,
    *,
    causal: bool = False,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """[batch | 1, heads | 1, q_len, kv_len]: what each query may attend to; query ``i`` sits at ``kv_len - q_len + i``."""
    position = torch.arange(kv_len - q_len, kv_len)[:, None]
    key = torch.arange(kv_len)[None, :]
    seen = torch.ones(q_len, kv_len, dtype=torch.bool)
    if causal:
        seen = seen & (key <= position)
    if window is not None:
        seen = seen & ((position - key).abs() < window)
    if cu_seqlens is not None:
        owner = torch.zeros(kv_len, dtype=torch.long)
        for start in cu_seqlens.tolist()[1:-1]:
            owner[start:] += 1
        seen = seen & (owner[:, None] == owner[None, :])
    seen = seen[None, None]
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    return seen if mask is None else seen & mask


def plain_logits(
    query: Tensor,
    key: Tensor,
    allowed: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Capped, biased logits, -inf where not ``allowed``: [batch, q_heads, q_len, kv_len]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query @ key.transpose(-1, -2)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    return logits.masked_fill(~allowed, -torch.inf)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(output, lse)`` over the ``allowed`` keys; zeros and -inf for a query without any."""
    logits = plain_logits(query, key, allowed, scale=scale, bias=bias, softcap=softcap)
    top = logits.detach().amax(-1, keepdim=True)
    if sink is not None:
        sink = sink[None, :, None, None].to(logits.dtype)
        top = torch.maximum(top, sink.detach())
    top = torch.where(torch.isfinite(top), top, 0.0)
    weight = torch.exp(logits - top)
    total = weight.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    lse = torch.where(empty, -torch.inf, torch.log(total) + top)[..., 0]
    return (weight / total) @ value, lse


def dropped_mass(logits: Tensor, kept: Tensor, sink: Tensor | None = None) -> Tensor:
    """The softmax mass outside of ``kept``, summed over the dropped keys directly; 0 for a query without any key."""
    every = torch.logsumexp(logits, -1)
    if sink is not None:
        every = torch.logaddexp(every, sink[None, :, None].to(logits.dtype))
    lost = torch.logsumexp(logits.masked_fill(kept, -torch.inf), -1)
    return torch.where(lost == -torch.inf, 0.0, torch.exp(lost - every))
