"""A model's own queries, keys and values: recorded, or attended to by a function of ours. One unpadded sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from sieve_attn.pipeline import attention

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Inputs:
    """What one layer attends with: query [1, q_heads, q_len, dim], key and value [1, kv_heads, kv_len, dim], and the scale."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


@contextmanager
def attending_with(model: Any, attend: Attend) -> Iterator[None]:
    """While open, every attention of ``model`` is ``attend(layer, query, key, value, scale)``, causal and without padding."""
    before = model.config._attn_implementation

    def function(module, query, key, value, attention_mask, *, scaling=None, **_):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(module.layer_idx, query, key, value, scale).transpose(1, 2).contiguous(), None

    AttentionInterface.register("sieve_probe", function)
    AttentionMaskInterface.register("sieve_probe", lambda *_, **__: None)
    model.set_attn_implementation("sieve_probe")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def dense(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """PyTorch's own attention, aligned bottom right."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if q_len == kv_len:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return attention(query, key, value, causal=True, scale=scale)


@torch.no_grad()
def attention_inputs(model: Any, tokens: Tensor) -> list[Inputs]:
    """What every layer of ``model`` attends with on ``tokens`` [1, len] under dense attention."""
    found: list[Inputs] = []

    def record(layer, query, key, value, scale):
        found.append(Inputs(layer, query.contiguous(), key.contiguous(), value.contiguous(), scale))
        return dense(layer, query, key, value, scale)

    with attending_with(model, record):
        model(tokens, use_cache=False)
    return found
