"""PyTorch operators over offset attention: one forward, one backward, whatever computes them.

The pattern travels as its text, as policies do, so that a compiled graph holds it and nothing is traced into it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sieve_attn import native, policies
from sieve_attn.arrays import torch_ops
from sieve_attn.attend import offsets as stage
from sieve_attn.attend.torch_op import _empty_output, one_by_one, refuse_second
from sieve_attn.checks import error
from sieve_attn.patterns import Pattern
from sieve_attn.patterns.base import written

_KNOWN: dict[str, Pattern] = {}  # patterns that their text alone does not give back


def text_of(pattern: Pattern) -> str:
    """The text under which the operator finds ``pattern`` again."""
    text = written(pattern)
    if not torch.compiler.is_compiling() and ("@" in text or "#" in text):
        _KNOWN[text] = pattern  # for good: a graph may name it at any time
    return text


def found_in(text: str, kv_len: int) -> tuple[stage.Reach, Tensor]:
    """What the pattern keeps, and its offsets as a tensor; the offsets reach to a power of two above ``kv_len``."""
    return _found(text, 1 << max(kv_len - 1, 1).bit_length())


@lru_cache(maxsize=64)
def _found(text: str, limit: int) -> tuple[stage.Reach, Tensor]:
    pattern = _KNOWN.get(text) or _read(text)
    found = stage.reach(pattern, limit)
    return found, torch.from_numpy(found.offsets.copy())


@torch.compiler.assume_constant_result
def settled(text: str, kv_len: int) -> tuple[int, tuple[int, ...]]:
    """First tokens and offsets below ``kv_len`` that the pattern keeps: plain numbers, which compilers take as they are."""
    found = found_in(text, kv_len)[0]
    return found.prefix, tuple(found.offsets[found.offsets < kv_len].tolist())


def _read(text: str) -> Pattern:
    # the class of an entry point is found by its name; an identity (#) is a comment to the parser, so nothing is made of it
    try:
        return policies.parse(f"Policy(keep={re.sub('@[0-9]+', '', text)})").keep
    except ValueError:
        remedy = "call it once outside of torch.compile, or give its package the entry point `sieve_attn.patterns`"
        raise error("pattern", "of a class of your own must be known before it is compiled", text, remedy) from None


def chosen(query: Tensor, key: Tensor, value: Tensor, found: stage.Reach, plan: str, *, gradient: bool = False) -> stage.Plan:
    dtype, pace = _where(query, value)
    if pace == "cuda" and max(query.shape[3], value.shape[3]) > stage.LARGEST_TILED_DIM:
        plan = "diagonals"
    return stage.choose_plan(plan, found, query.shape[2], key.shape[2], dtype, pace, gradient=gradient)


def weighed(query: Tensor, key: Tensor, value: Tensor, found: stage.Reach) -> list[stage.Plan]:
    """What ``auto`` chooses from."""
    return stage.weigh(found, query.shape[2], key.shape[2], *_where(query, value))


def _where(query: Tensor, value: Tensor) -> tuple[str, str]:
    pace = "cuda" if stage.on_device(query, value) else native.pace()
    return str(query.dtype).removeprefix("torch."), pace


@torch.library.custom_op("sieve_attn::offset_attention", mutates_args=())
def offset_op(query: Tensor, key: Tensor, value: Tensor, pattern: str, scale: float, plan: str) -> tuple[Tensor, Tensor]:
    """``(output, lse)`` over the keys that ``pattern`` keeps."""
    found, offsets = found_in(pattern, key.shape[2])
    with torch_ops.no_grad():
        return stage.forward(query, key, value, offsets, found.prefix, scale, chosen(query, key, value, found, plan))


@offset_op.register_fake
def _(query, key, value, pattern, scale, plan):
    return _empty_output(query, value)


@torch.library.custom_op("sieve_attn::offset_attention_backward", mutates_args=())
def offset_backward_op(
    grad_output: Tensor, grad_lse: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, pattern: str,
    scale: float, plan: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    found, offsets = found_in(pattern, key.shape[2])
    with torch_ops.no_grad():
        ran = chosen(query, key, value, found, plan, gradient=True)
        return stage.backward(query, key, value, offsets, found.prefix, scale, ran, grad_output, grad_lse, output, lse)


@offset_backward_op.register_fake
def _(grad_output, grad_lse, output, lse, query, key, value, pattern, scale, plan):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, value, ctx.pattern, ctx.scale, ctx.plan = inputs
    ctx.save_for_backward(*output, query, key, value)


def _backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple:
    output, lse, query, key, value = ctx.saved_tensors
    grads = offset_backward_op(grad_output, grad_lse, output, lse, query, key, value, ctx.pattern, ctx.scale, ctx.plan)
    return *grads, None, None, None


offset_op.register_autograd(_backward, setup_context=_setup)
offset_op.register_vmap(one_by_one(offset_op))
offset_backward_op.register_autograd(refuse_second)
offset_backward_op.register_vmap(one_by_one(offset_backward_op))
