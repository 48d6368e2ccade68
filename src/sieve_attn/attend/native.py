"""C++ kernels on the CPU: fp32, fp16 and bf16, forward and backward, over blocks, ranges, offsets and single tokens.

One build holds every instruction set (portable, AVX2, AVX-512, VNNI with AVX512-BF16, AMX); the best that the machine runs is
chosen when first asked, or by ``SIEVE_LEVEL``. fp32 accumulation throughout; with AMX or AVX512-BF16, bf16 inputs multiply as
they are and probabilities are rounded to bf16 before they meet the values (their sum is not). Those instructions take denormal
numbers, below 2^-126, for zero: queries that hold one, or one beyond 2^64, are multiplied in fp32. Threads: torch's count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sieve_attn import arrays, native
from sieve_attn.bounds import Rounding
from sieve_attn.types import Call, Offsets, Ranges, Selection, Tokens

if TYPE_CHECKING:
    from sieve_attn.attend.paged import Pages

Array = Any

DTYPES = ("float32", "float16", "bfloat16")
KINDS = ("Blocks", "Ranges", "Offsets", "Tokens")
DECODE_QUERIES = 16  # up to here the cache is read in place
ROUNDING = Rounding(exponential=2.0**-18)  # weights of bf16 keys come from a short polynomial


def why_not(request: Any) -> tuple[str, ...]:
    reasons = list(native.missing())
    if request.framework == "jax":
        reasons.append("arrays of JAX go to kernels through sieve_attn.jax")
    if request.device != "cpu":
        reasons.append(f"kernels run on cpu, not on {request.device}")
    if request.dtype not in DTYPES:
        reasons.append(f"kernels know {', '.join(DTYPES)}, not {request.dtype}")
    if request.far_field:
        reasons.append("kernels have no far field")
    unknown = [kind for kind in request.kinds if kind not in KINDS]
    # lists of single keys take ranges beside them; blocks stand alone
    several = len(request.kinds) > 1 and sorted(request.kinds) != ["Offsets", "Ranges"]
    if unknown or several:
        reasons.append(f"kernels take one part of {' or '.join(KINDS)}, or Ranges and Offsets, not {', '.join(request.kinds)}")
    return tuple(reasons)


def attend(call: Call, selection: Selection, far_field: None = None) -> tuple[Array, Array]:
    """``(output [batch, q_heads, q_len, v_dim] in the query's dtype, lse [batch, q_heads, q_len])``."""
    xp = arrays.namespace(call.query)
    batch, heads, q_len, _ = call.query.shape
    output = xp.empty((batch, heads, q_len, call.value.shape[3]), call.query.dtype, call.query)
    lse = xp.empty((batch, heads, q_len), xp.float32, call.query)
    if q_len and batch and heads:
        prepared, keep_alive = _prepare(xp, call, selection)
        rows = _row_choice(xp, prepared, selection, keep_alive)
        if rows is not None:
            native.module().attend_rows(prepared, rows, native.view(output), native.view(lse))
        elif _few_rows(call):
            native.module().decode(prepared, table=None, length=None, out=native.view(output), lse=native.view(lse))
        else:
            native.module().attend(prepared, native.view(output), native.view(lse))
        del keep_alive
    return output, lse


def attend_paged(pages: Pages) -> tuple[Array, Array]:
    """``(output, lse)`` of a few queries a sequence over a cache in pages; see :mod:`sieve_attn.attend.paged`."""
    xp = arrays.namespace(pages.query)
    batch, heads, q_len, _ = pages.query.shape
    output = xp.empty((batch, heads, q_len, pages.value.shape[3]), pages.query.dtype, pages.query)
    lse = xp.empty((batch, heads, q_len), xp.float32, pages.query)
    sink = None if pages.sink is None else xp.contiguous(xp.cast(pages.sink, xp.float32))
    held = [native.view(x) for x in (pages.query, pages.key, pages.value)]
    prepared = native.module().Attention(
        *held, mask=None, bias=None, key_mask=None, sink=None if sink is None else native.view(sink), edges=None, causal=True,
        window=pages.window, scale=float(pages.scale), softcap=pages.softcap, threads=native.threads(pages.query),
    )  # fmt: skip
    chosen = pages.selection
    if chosen is not None:
        part = chosen.parts[0].listed
        arrays_of = [xp.contiguous(part.row_ptr), xp.contiguous(part.block_index)]
        prepared.choose_blocks(
            *(native.view(x) for x in arrays_of), None, heads=part.heads, batch=part.batch, q_block=part.q_block,
            kv_block=part.kv_block, lead=part.lead, kv_len=part.kv_len,
        )  # fmt: skip
    table, lengths = xp.contiguous(pages.block_table), xp.contiguous(pages.lengths)
    native.module().decode(prepared, native.view(table), native.view(lengths), native.view(output), native.view(lse))
    return output, lse


def _few_rows(call: Call) -> bool:
    """Whether keys and values are better read where they lie than packed for many rows."""
    side_by_side = all(_last_stride(x) == 1 for x in (call.query, call.key, call.value))
    return side_by_side and call.q_len <= DECODE_QUERIES


def _last_stride(x: Array) -> int:
    return x.stride(3) if hasattr(x, "data_ptr") else x.strides[3] // x.dtype.itemsize


def top_k(call: Call, count: int) -> tuple[Array, Array, Array, Array]:
    """Exact top-k attention with scoring and selection in one pass; see :func:`sieve_attn.attend.top_k.attend`."""
    xp = arrays.namespace(call.query)
    batch, heads, q_len, _ = call.query.shape
    output = xp.empty((batch, heads, q_len, call.value.shape[3]), call.query.dtype, call.query)
    lse = xp.empty((batch, heads, q_len), xp.float32, call.query)
    index = xp.empty((batch, heads, q_len, count), xp.int32, call.query)
    counts = xp.zeros((batch, heads, 2), xp.int64, call.query)
    everything = Selection((Ranges(call.q_len, call.kv_len, prefix=call.kv_len),))
    prepared, keep_alive = _prepare(xp, call, everything)
    native.module().top_k_attention(prepared, count, *(native.view(x) for x in (output, lse, index, counts)))
    del keep_alive
    return output, lse, index, counts


def backward(
    call: Call, selection: Selection, grad_output: Array, grad_lse: Array, far_field: None = None, *, output: Array, lse: Array
) -> dict[str, Array]:
    """Gradients of query, key and value, and of bias and sink where the call has them; see the reference."""
    xp = arrays.namespace(call.query)
    pull = xp.cast(grad_output, xp.float32)
    d_lse = xp.where(lse == -float("inf"), 0.0, xp.cast(grad_lse, xp.float32))
    shift = d_lse - (pull * xp.cast(output, xp.float32)).sum(-1)
    grads = {n: xp.empty(tuple(getattr(call, n).shape), getattr(call, n).dtype, call.query) for n in ("query", "key", "value")}
    d_bias = None if call.bias is None else xp.zeros(tuple(call.bias.shape), xp.float32, call.query)
    prepared, keep_alive = _prepare(xp, call, selection)
    lse, shift = xp.contiguous(lse), xp.contiguous(shift)
    views = [native.view(x) for x in (grad_output, lse, shift, grads["query"], grads["key"], grads["value"])]
    views.append(None if d_bias is None else _broadcast(d_bias, call))
    rows = _row_choice(xp, prepared, selection, keep_alive)
    if rows is not None:
        native.module().attend_rows_backward(prepared, rows, *views)
    else:
        native.module().attend_backward(prepared, *views)
    del keep_alive
    if d_bias is not None:
        grads["bias"] = xp.cast(d_bias, call.bias.dtype)
    if call.sink is not None:
        weight = xp.exp(xp.cast(call.sink, xp.float32)[None, :, None] - lse)
        grads["sink"] = xp.cast((weight * shift).sum(-1).sum(0), call.sink.dtype)
    return grads


def _broadcast(x: Array, call: Call) -> Any:
    """A view of [batch | 1, q_heads | 1, q_len | 1, kv_len | 1] with stride 0 along what is shared."""
    batch, heads, q_len, _ = call.query.shape
    return native.view(arrays.namespace(x).broadcast_to(x, (batch, heads, q_len, call.kv_len)))


def _row_choice(xp: Any, prepared: Any, selection: Selection, alive: list) -> Any:
    """The lists of single keys that ``selection`` means, or None where it is made of blocks or of ranges alone."""
    given = {}
    for part in selection.parts:
        if isinstance(part, Tokens):
            index = part.index if str(part.index.dtype).endswith(("int32", "int64")) else xp.cast(part.index, xp.int64)
            alive.append(index)
            given["index"] = native.view(index)
        elif isinstance(part, Offsets):
            given |= {"offsets": list(part.offsets), "first_key": part.first_key}
        elif isinstance(part, Ranges) and len(selection.parts) > 1:
            given |= {"prefix": part.prefix, "window": part.window, "two_sided": part.two_sided}
    return native.module().RowChoice(prepared, **given) if given else None


def _prepare(xp: Any, call: Call, selection: Selection) -> tuple[Any, list]:
    """The kernels' description of a call, and the arrays that must outlive it."""
    part = selection.parts[0]
    alive: list[Array] = []

    def held(x: Array) -> Any:
        alive.append(x)
        return native.view(x)

    mask = None if call.mask is None else _broadcast(call.mask, call)
    bias = call.bias
    if bias is not None:
        if str(bias.dtype).rpartition(".")[2] not in DTYPES:
            bias = xp.cast(bias, xp.float32)
        alive.append(bias)
        bias = _broadcast(bias, call)
    sink = None if call.sink is None else held(xp.contiguous(xp.cast(call.sink, xp.float32)))
    edges = None if call.cu_seqlens is None else held(xp.contiguous(xp.cast(call.cu_seqlens, xp.int64)))
    prepared = native.module().Attention(
        held(call.query), held(call.key), held(call.value), mask=mask, bias=bias,
        key_mask=None if call.key_mask is None else held(call.key_mask), sink=sink, edges=edges, causal=bool(call.causal),
        window=call.window, scale=float(call.scale), softcap=call.softcap, threads=native.threads(call.query),
    )  # fmt: skip
    if isinstance(part, (Offsets, Tokens)) or len(selection.parts) > 1:
        return prepared, alive
    if isinstance(part, Ranges):
        prepared.choose_ranges(part.prefix, part.window, part.two_sided)
    else:
        part = part.listed
        prepared.choose_blocks(
            held(xp.contiguous(xp.cast(part.row_ptr, xp.int64))), held(xp.contiguous(xp.cast(part.block_index, xp.int32))),
            None if part.row_mask is None else held(xp.contiguous(part.row_mask)),
            heads=part.heads, batch=part.batch, q_block=part.q_block, kv_block=part.kv_block, lead=part.lead,
        )  # fmt: skip
    return prepared, alive
