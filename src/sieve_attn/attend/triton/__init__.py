"""Triton kernels on CUDA: fp32, fp16 and bf16, forward and backward, over lists of blocks and over ranges.

Products multiply in the inputs' dtype on tensor cores with fp32 sums; fp32 inputs multiply in full fp32, never in TF32.
Selections are read on the device: nothing here waits for it, so a call can be captured in a CUDA graph. With Triton's
interpreter (``TRITON_INTERPRET=1``) the same kernels run on the CPU, where the backend is named.
"""

from __future__ import annotations

from typing import Any

from sieve_attn import triton as door
from sieve_attn.bounds import Rounding
from sieve_attn.types import Call, Selection

Array = Any

KINDS = ("Blocks", "Ranges", "Tokens")
HEAD_DIMS = (1, 256)
# tensor cores cut their sums, weights meet the values in the inputs' dtype only after they were summed in fp32
ROUNDING = Rounding(unit=2.0**-22, exponential=2.0**-20)


def why_not(request: Any) -> tuple[str, ...]:
    reasons = list(door.unsuitable(request.framework, request.device, request.dtype, named=request.named))
    least, most = HEAD_DIMS
    for name, dim in (("head_dim", request.head_dim), ("v_dim", request.value_dim)):
        if not least <= dim <= most:
            reasons.append(f"Triton kernels know {name} {least} to {most}, not {dim}")
    if request.far_field:
        reasons.append("Triton kernels have no far field")
    if len(request.kinds) > 1 or any(kind not in KINDS for kind in request.kinds):
        reasons.append(f"Triton kernels take one part of {' or '.join(KINDS)}, not {', '.join(request.kinds)}")
    return tuple(reasons)


def attend(call: Call, selection: Selection, far_field: None = None) -> tuple[Array, Array]:
    """``(output [batch, q_heads, q_len, v_dim] in the query's dtype, lse [batch, q_heads, q_len])``."""
    from sieve_attn.attend.triton import forward, launch, tokens

    if selection.kinds == ("Tokens",):
        return tokens.attend(call, selection)
    if selection.blocks is not None:
        launch.check_blocks(selection.blocks)
    return forward.attend(call, selection)


def attend_paged(pages: Any) -> tuple[Array, Array]:
    """``(output, lse)`` of a few queries a sequence over a cache in pages; see :mod:`sieve_attn.attend.paged`."""
    from sieve_attn.attend.triton import forward

    return forward.attend_paged(pages)


def top_k(call: Call, count: int) -> tuple[Array, Array, Array, Array]:
    """Exact top-k attention, chosen and attended to on the device; see :func:`sieve_attn.attend.top_k.attend`."""
    from sieve_attn.attend.triton.best_keys import top_k

    return top_k(call, count)


def backward(
    call: Call, selection: Selection, grad_output: Array, grad_lse: Array, far_field: None = None, *, output: Array, lse: Array
) -> dict[str, Array]:
    """Gradients of query, key and value, and of bias and sink where the call has them; see the reference."""
    from sieve_attn.attend.triton import gradients, tokens

    return (tokens if selection.kinds == ("Tokens",) else gradients).backward(call, selection, grad_output, grad_lse, output, lse)
