"""PyTorch operators over offset attention: one forward, one backward, whatever computes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sieve_attn import native
from sieve_attn.arrays import torch_ops
from sieve_attn.attend import offsets as stage
from sieve_attn.attend.torch_op import _empty_output


@torch.library.custom_op("sieve_attn::offset_attention", mutates_args=())
def offset_op(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, prefix: int, scale: float, plan: str) -> tuple[Tensor, Tensor]:
    """``(output, lse)``; ``offsets`` int64 on the CPU, increasing from 0 on."""
    with torch_ops.no_grad():
        return stage.forward(query, key, value, offsets, prefix, scale, chosen(query, key, offsets, prefix, plan))


def chosen(query: Tensor, key: Tensor, offsets: Tensor, prefix: int, plan: str) -> stage.Plan:
    dtype = str(query.dtype).removeprefix("torch.")
    found = stage.Reach(prefix, offsets.numpy())
    return stage.choose_plan(plan, found, query.shape[2], key.shape[2], dtype, native.level() or "portable")


@offset_op.register_fake
def _(query, key, value, offsets, prefix, scale, plan):
    return _empty_output(query, value)


@torch.library.custom_op("sieve_attn::offset_attention_backward", mutates_args=())
def offset_backward_op(
    grad_output: Tensor, grad_lse: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor,
    prefix: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch_ops.no_grad():
        return stage.backward(query, key, value, offsets, prefix, scale, grad_output, grad_lse, output, lse)


@offset_backward_op.register_fake
def _(grad_output, grad_lse, output, lse, query, key, value, offsets, prefix, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, value, offsets, ctx.prefix, ctx.scale, _ = inputs
    ctx.save_for_backward(*output, query, key, value, offsets)


def _backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple:
    output, lse, query, key, value, offsets = ctx.saved_tensors
    grads = offset_backward_op(grad_output, grad_lse, output, lse, query, key, value, offsets, ctx.prefix, ctx.scale)
    return *grads, None, None, None, None


offset_op.register_autograd(_backward, setup_context=_setup)
