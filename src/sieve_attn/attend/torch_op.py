"""PyTorch operators over the attend stage: one forward, one backward, whatever backend computes them.

``sieve_attn::attend`` takes a selection; ``sieve_attn::attention`` runs the whole pipeline in one opaque step, so that
``torch.compile(fullgraph=True)`` works although what is selected depends on the data. In both the kept set is a constant:
gradients go through the masked softmax, and a dropped (tile, block) pair contributes exactly zero.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from sieve_attn import dispatch, expression, policies
from sieve_attn import geometry as stage_geometry
from sieve_attn.arrays import torch_ops
from sieve_attn.attend import far_field as far
from sieve_attn.checks import error
from sieve_attn.types import Blocks, Call, Offsets, Ranges, Selection, Tokens

_transforms = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack
_KINDS = {kind.__name__: kind for kind in (Blocks, Ranges, Offsets, Tokens)}


def pack(selection: Selection) -> tuple[list[Tensor], str]:
    """A selection as operator arguments: its tensors, and everything else as text."""
    tensors, spec = [], []
    for part in selection.parts:
        plain, places = {}, {}
        for name in (f.name for f in fields(part)):
            item = getattr(part, name)
            if isinstance(item, Tensor):
                places[name] = len(tensors)
                tensors.append(item)
            else:
                plain[name] = item
        spec.append((type(part).__name__, plain, places))
    return tensors, repr(spec)


@lru_cache(maxsize=256)
def _read(spec: str) -> list[tuple[str, dict[str, Any], dict[str, int]]]:
    """The kind, the plain fields and the places of tensors of every part. A training loop asks for the same ones each step."""
    return ast.literal_eval(expression.read(spec))


def unpack(tensors: list[Tensor], spec: str, call: Call) -> Selection:
    """The selection that a text and its tensors describe. What follows from the lengths of ``call`` may be left to this: a text
    made of the compiler's symbols would fix them, and every length would compile again."""
    parts = []
    for kind, plain, places in _read(spec):
        if kind == "Policy":
            return _selected(call, policies.parse(plain["text"]), tensors)
        parts.append(_KINDS[kind](**{"kv_len": call.kv_len, **plain, **{name: tensors[i] for name, i in places.items()}}))
    return Selection(tuple(parts))


def _selected(call: Call, policy: policies.Policy, tensors: list[Tensor]) -> Selection:
    """What ``policy`` kept in ``call``: by position, or as blocks in the ``tensors`` that :func:`attention_op` returned."""
    grid = _grid(call.query, call.key, policy, call.causal)
    if grid is not None:
        row_ptr, block_index, *row_mask = tensors
        return Selection((Blocks(row_ptr, block_index, **grid, row_mask=row_mask[0] if row_mask else None),))
    q_len, kv_len = call.q_len, call.kv_len
    if policy.keep is None or kv_len < policy.min_seq_length:
        return Selection((Ranges(q_len, kv_len, prefix=kv_len),))
    return policy.keep.selection(q_len, kv_len, causal=call.causal).beside(call.query)


def one_by_one(op: Any, stacked: int | None = None) -> Any:
    """A rule of ``torch.func.vmap``: one call an entry. Outputs from ``stacked`` on are left empty: how many blocks were chosen
    differs from entry to entry, and above the map nobody asks for them."""

    def rule(info: Any, dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        made = [op(*_entry(args, dims, n)) for n in range(info.batch_size)]
        whole = tuple(torch.stack(parts) for parts in zip(*(m[:stacked] for m in made), strict=True))
        rest = tuple(x.new_empty(0) for x in made[0][len(whole) :])
        return whole + rest, (0,) * len(whole) + (None,) * len(rest)

    return rule


def _entry(args: Sequence[Any], dims: Sequence[Any], n: int) -> list[Any]:
    """The arguments of entry ``n``: tensors are cut along their mapped axis, also those in lists."""
    pairs = zip(args, dims, strict=True)
    return [_entry(x, dim, n) if isinstance(x, list) else x if dim is None else x.select(dim, n) for x, dim in pairs]


def _call(query, key, value, mask, key_mask, bias, cu_seqlens, sink, causal, scale, softcap, window) -> Call:
    return Call(query, key, value, causal, scale, mask, key_mask, bias, softcap, cu_seqlens, sink, window)


def _field(call: Call, block_size: int) -> far.FarField | None:
    if not block_size:
        return None
    geometry = stage_geometry.build(call.key, block_size, policies.FAR_FIELD_STATISTICS, value=call.value, key_mask=call.key_mask)
    return far.FarField(geometry, policies.FAR_FIELD_BOUND)


def _backend(query: Tensor, value: Tensor, name: str, far_field: bool, selection: Selection) -> Any:
    """The module of a backend; a compiled call leaves ``auto`` to the moment it runs."""
    if name == "auto":
        dtype = str(query.dtype).removeprefix("torch.")
        dims = (query.shape[3], value.shape[3])
        name = dispatch.choose(name, dispatch.Request("torch", query.device.type, dtype, *dims, far_field, selection.kinds))[0]
    return dispatch.module(name)


@torch.library.custom_op("sieve_attn::attend", mutates_args=())
def attend_op(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_mask: Tensor | None, bias: Tensor | None,
    cu_seqlens: Tensor | None, sink: Tensor | None, causal: bool, scale: float, softcap: float | None, window: int | None,
    parts: list[Tensor], spec: str, backend: str, far_block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = _call(query, key, value, mask, key_mask, bias, cu_seqlens, sink, causal, scale, softcap, window)
    selection = unpack(parts, spec, call)
    with torch_ops.no_grad():
        return _backend(query, value, backend, far_block > 0, selection).attend(call, selection, _field(call, far_block))


@torch.library.custom_op("sieve_attn::attend_backward", mutates_args=())
def backward_op(
    grad_output: Tensor, grad_lse: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    mask: Tensor | None, key_mask: Tensor | None, bias: Tensor | None, cu_seqlens: Tensor | None, sink: Tensor | None,
    causal: bool, scale: float, softcap: float | None, window: int | None, parts: list[Tensor], spec: str, backend: str,
    far_block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value, bias and sink (empty where absent)."""
    call = _call(query, key, value, mask, key_mask, bias, cu_seqlens, sink, causal, scale, softcap, window)
    selection = unpack(parts, spec, call)
    with torch_ops.no_grad():
        made = _backend(query, value, backend, far_block > 0, selection).backward(
            call, selection, grad_output, grad_lse, _field(call, far_block), output=output, lse=lse
        )
    return tuple(made[n] if n in made else query.new_empty(0) for n in ("query", "key", "value", "bias", "sink"))


def _like(x: Tensor | None, query: Tensor) -> Tensor:
    return query.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)


@backward_op.register_fake
def _(
    grad_output,
    grad_lse,
    output,
    lse,
    query,
    key,
    value,
    mask,
    key_mask,
    bias,
    cu_seqlens,
    sink,
    causal,
    scale,
    softcap,
    window,
    parts,
    spec,
    backend,
    far_block,
):
    return tuple(_like(x, query) for x in (query, key, value, bias, sink))


def _empty_output(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, n, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(batch, heads, n, value.shape[3]), query.new_empty(batch, heads, n, dtype=wide)


@attend_op.register_fake
def _(query, key, value, *rest):
    return _empty_output(query, value)


def _save(ctx: Any, inputs: tuple, made: tuple, parts: list[Tensor], spec: str, backend: str, far_block: int) -> None:
    query, key, value, mask, key_mask, bias, cu_seqlens, sink, causal, scale, softcap, window = inputs
    optional = [mask, key_mask, bias, cu_seqlens, sink]
    ctx.present = [x is not None for x in optional]
    ctx.parts = len(parts)
    ctx.save_for_backward(*made[:2], query, key, value, *(x for x in optional if x is not None), *parts)
    ctx.plain = (causal, scale, softcap, window)
    ctx.selection = (spec, backend, far_block)


def _backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple:
    output, lse, query, key, value, *rest = ctx.saved_tensors
    rest = list(rest)
    mask, key_mask, bias, cu_seqlens, sink = (rest.pop(0) if there else None for there in ctx.present)
    spec, backend, far_block = ctx.selection
    grads = backward_op(
        grad_output,
        grad_lse,
        output,
        lse,
        query,
        key,
        value,
        mask,
        key_mask,
        bias,
        cu_seqlens,
        sink,
        *ctx.plain,
        rest,
        spec,
        backend,
        far_block,
    )
    dq, dk, dv, dbias, dsink = grads
    return dq, dk, dv, None, None, None if bias is None else dbias, None, None if sink is None else dsink, None, None, None, None


def _setup_attend(ctx, inputs, output):
    *tensors, parts, spec, backend, far_block = inputs
    _save(ctx, tuple(tensors), output, parts, spec, backend, far_block)


def _backward_attend(ctx, grad_output, grad_lse):
    # a selection's own tensors are indices: no gradient, one None for each. They are counted when saved, since under
    # gradient checkpointing what was saved may be asked for once only
    return (*_backward(ctx, grad_output, grad_lse), [None] * ctx.parts, None, None, None)


attend_op.register_autograd(_backward_attend, setup_context=_setup_attend)
attend_op.register_vmap(one_by_one(attend_op))
backward_op.register_vmap(one_by_one(backward_op))


def refuse_tangents(
    *tensors: Tensor | None, argument: str = "query, key, value, bias, sink",
    why: str = "attention differentiates in reverse mode only", remedy: str = "use torch.autograd.grad",
) -> None:  # fmt: skip
    """Operators drop the tangents of forward-mode differentiation: a derivative of zero would come out."""
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise error(argument, f"must not carry tangents: {why}", "forward-mode differentiation", remedy)


def refuse_transforms(*tensors: Tensor | None, argument: str = "query, key, value, bias, sink") -> None:
    """``torch.func`` takes derivatives of another kind of operator; ``vmap`` alone takes this one."""
    if torch.compiler.is_compiling() or _transforms() is None:
        return
    asked = any(each.key() == TransformType.Grad for each in get_interpreter_stack())
    if asked and torch.is_grad_enabled() and any(x is not None and _tracked(x) for x in tensors):
        raise error(argument, "must not be differentiated by torch.func", "grad, vjp or jacrev", "use torch.autograd.grad")


def _tracked(x: Tensor) -> bool:
    """Whether autograd follows ``x``, or what a transform wrapped in it."""
    while is_functorch_wrapped_tensor(x) and not x.requires_grad:
        x = get_unwrapped(x)
    return x.requires_grad


def refuse_second(ctx: Any, *_: Any) -> None:
    """The backward of a backward operator."""
    raise error("create_graph", "must not lead to second derivatives: attention differentiates once", "a gradient of a gradient",
                "detach the first one")  # fmt: skip


backward_op.register_autograd(refuse_second)


def nobody_watches(call: Call) -> bool:
    """Neither autograd nor a transform nor a tensor of another kind needs to see an operator: it can be passed by."""
    tensors = [x for x in (call.query, call.key, call.value, call.mask, call.key_mask, call.bias, call.sink) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    plain = all(type(x) is Tensor for x in tensors) and forward_ad._current_level < 0
    return plain and _transforms() is None and _modes() == 0


def attend(call: Call, selection: Selection, backend: str, field: far.FarField | None) -> tuple[Tensor, Tensor]:
    refuse_tangents(call.query, call.key, call.value, call.bias, call.sink)
    if nobody_watches(call):
        with torch_ops.no_grad():
            return dispatch.module(backend).attend(call, selection, field)
    refuse_transforms(call.query, call.key, call.value, call.bias, call.sink)
    parts, spec = pack(selection)
    return attend_op(
        call.query, call.key, call.value, call.mask, call.key_mask, call.bias, call.cu_seqlens, call.sink, call.causal,
        call.scale, call.softcap, call.window, parts, spec, backend, 0 if field is None else field.geometry.block_size,
    )  # fmt: skip


@torch.library.custom_op("sieve_attn::attention", mutates_args=())
def attention_op(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_mask: Tensor | None, bias: Tensor | None,
    cu_seqlens: Tensor | None, sink: Tensor | None, causal: bool, scale: float | None, softcap: float | None,
    window: int | None, policy: str, per_query: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The whole pipeline: ``(output, lse, row_ptr, block_index, row_mask)``, the last three empty where no blocks are chosen."""
    from sieve_attn.pipeline import attention

    output, lse, report = attention(
        query, key, value, policies.parse(policy), mask=mask, key_mask=key_mask, bias=bias, cu_seqlens=cu_seqlens, sink=sink,
        causal=causal, scale=scale, softcap=softcap, window=window, per_query=per_query, backend=backend, return_lse=True,
        return_report=True,
    )  # fmt: skip
    blocks = report.selection.blocks
    if blocks is None:
        return output, lse, *(query.new_empty(0, dtype=t) for t in (torch.int64, torch.int32, torch.bool))
    row_mask = blocks.row_mask if blocks.row_mask is not None else query.new_empty(0, dtype=torch.bool)
    return output, lse, blocks.row_ptr.clone(), blocks.block_index.clone(), row_mask.clone()


def _grid(query: Tensor, key: Tensor, policy: policies.Policy, causal: bool) -> dict[str, int] | None:
    """The block grid of the selection that ``policy`` makes for these shapes, or None where it makes none."""
    if not policy.chooses_blocks or key.shape[2] < policy.min_seq_length:
        return None
    lead = (key.shape[2] - query.shape[2]) % policy.query_tile if causal else 0
    heads = key.shape[1] if policy.share_group else query.shape[1]
    return {
        "batch": query.shape[0],
        "heads": heads,
        "q_len": query.shape[2],
        "kv_len": key.shape[2],
        "q_block": policy.query_tile,
        "kv_block": policy.block_size,
        "lead": lead,
    }


@attention_op.register_fake
def _(query, key, value, mask, key_mask, bias, cu_seqlens, sink, causal, scale, softcap, window, policy, per_query, backend):
    chosen = policies.parse(policy)
    grid = _grid(query, key, chosen, causal)
    output, lse = _empty_output(query, value)
    if grid is None:
        return output, lse, *(query.new_empty(0, dtype=t) for t in (torch.int64, torch.int32, torch.bool))
    tiles = -(-(grid["q_len"] + grid["lead"]) // grid["q_block"])
    entries = torch.library.get_ctx().new_dynamic_size()
    row_mask = query.new_empty((entries, grid["q_block"]) if per_query else 0, dtype=torch.bool)
    row_ptr = query.new_empty(grid["batch"] * grid["heads"] * tiles + 1, dtype=torch.int64)
    return output, lse, row_ptr, query.new_empty(entries, dtype=torch.int32), row_mask


def _setup_attention(ctx, inputs, output):
    *tensors, causal, scale, softcap, window, policy, per_query, backend = inputs
    query, key = tensors[:2]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    chosen = policies.parse(policy)
    far_block = chosen.block_size if chosen.far_field and key.shape[2] >= chosen.min_seq_length else 0
    parts, spec = list(output[2 : 5 if per_query else 4]), repr([("Policy", {"text": policy}, {})])
    _save(ctx, (*tensors, causal, scale, softcap, window), output, parts, spec, backend, far_block)
    ctx.mark_non_differentiable(*output[2:])


def _backward_attention(ctx, grad_output, grad_lse, *_):
    return (*_backward(ctx, grad_output, grad_lse), None, None, None)


attention_op.register_autograd(_backward_attention, setup_context=_setup_attention)


@attention_op.register_vmap
def _(info: Any, dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The mapped axis becomes part of the batch, where every sequence chooses for itself."""
    cu_seqlens, sink_dim = args[6], dims[7]
    if cu_seqlens is not None or sink_dim is not None:  # neither has a batch
        return one_by_one(attention_op, 2)(info, dims, *args)
    size, batch = info.batch_size, args[0].shape[1 if dims[0] == 0 else 0]
    folded = [_folded(x, dim, size, batch, shared=n in (3, 5)) for n, (x, dim) in enumerate(zip(args[:6], dims[:6], strict=True))]
    output, lse, *chosen = attention_op(*folded, *args[6:])
    return (*(x.unflatten(0, (size, batch)) for x in (output, lse)), *chosen), (0, 0, None, None, None)


def _folded(x: Tensor | None, dim: int | None, size: int, batch: int, *, shared: bool) -> Tensor | None:
    """[size * batch, ...]; what may be ``shared``, masks and biases, stays as it is where it is the same for every sequence."""
    if x is None or (shared and dim is None and x.shape[0] == 1):
        return x
    x = x[None] if dim is None else x.movedim(dim, 0)
    return x.expand(size, batch, *x.shape[2:]).flatten(0, 1)
