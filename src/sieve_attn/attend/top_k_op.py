"""Exact top-k attention as a PyTorch operator. Its gradient is that of attention over the keys that it chose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sieve_attn import dispatch
from sieve_attn.arrays import torch_ops
from sieve_attn.attend import top_k as stage
from sieve_attn.attend.torch_op import _call, _empty_output, backward_op, one_by_one
from sieve_attn.types import Call

_CHOICE = repr([("Tokens", {}, {"index": 0})])  # the selection that `index` is, as `torch_op.unpack` reads it


def _chosen(query: Tensor, value: Tensor, backend: str) -> str:
    """The backend's name; a compiled call leaves ``auto`` to the moment it runs."""
    dtype = str(query.dtype).removeprefix("torch.")
    request = dispatch.Request("torch", query.device.type, dtype, query.shape[3], value.shape[3], False, ("Tokens",))
    return dispatch.choose(backend, request)[0] if backend == "auto" else backend


@torch.library.custom_op("sieve_attn::top_k_attention", mutates_args=())
def top_k_op(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_mask: Tensor | None, cu_seqlens: Tensor | None,
    sink: Tensor | None, causal: bool, scale: float, softcap: float | None, window: int | None, top_k: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(output, lse, index, counts)``; see :func:`sieve_attn.attend.top_k.attend`."""
    call = _call(query, key, value, mask, key_mask, None, cu_seqlens, sink, causal, scale, softcap, window)
    with torch_ops.no_grad():
        return stage.attend(call, top_k, _chosen(query, value, backend))


@top_k_op.register_fake
def _(query, key, value, mask, key_mask, cu_seqlens, sink, causal, scale, softcap, window, top_k, backend):
    batch, heads, n, _ = query.shape
    index = query.new_empty((batch, heads, n, top_k), dtype=torch.int32)
    return *_empty_output(query, value), index, query.new_empty((batch, heads, 2), dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, value, mask, key_mask, cu_seqlens, sink, *plain = inputs
    optional = [mask, key_mask, cu_seqlens, sink]
    ctx.present = [x is not None for x in optional]
    ctx.save_for_backward(*output[:3], query, key, value, *(x for x in optional if x is not None))
    ctx.plain = plain
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor, *_: Any) -> tuple:
    output, lse, index, query, key, value, *rest = ctx.saved_tensors
    mask, key_mask, cu_seqlens, sink = (rest.pop(0) if there else None for there in ctx.present)
    *plain, _, backend = ctx.plain
    dq, dk, dv, _, dsink = backward_op(
        grad_output, grad_lse, output, lse, query, key, value, mask, key_mask, None, cu_seqlens, sink, *plain, [index], _CHOICE,
        backend, 0,
    )  # fmt: skip
    return dq, dk, dv, None, None, None, None if sink is None else dsink, *[None] * 6


top_k_op.register_autograd(_backward, setup_context=_setup)
top_k_op.register_vmap(one_by_one(top_k_op))


def attend(call: Call, top_k: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return top_k_op(
        call.query, call.key, call.value, call.mask, call.key_mask, call.cu_seqlens, call.sink, call.causal, call.scale,
        call.softcap, call.window, top_k, backend,
    )  # fmt: skip
