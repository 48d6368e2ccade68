"""``attention``, ``select``, ``attend`` and ``manifold``: the pipeline's calls on JAX arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sieve_attn import checks
from sieve_attn.checks import error
from sieve_attn.jax import backends, ffi, stages
from sieve_attn.jax import call as front
from sieve_attn.jax import geometry as stage_geometry
from sieve_attn.jax.report import Report
from sieve_attn.jax.selection import PaddedBlocks
from sieve_attn.policies import Policy
from sieve_attn.types import Call, Geometry, Ranges, Selection

DENSE = Policy()


@dataclass(frozen=True)
class Plan:
    """What is settled before tracing: everything but the arrays."""

    policy: Policy
    backend: str
    why: str
    max_blocks: int | None
    report: bool
    chosen: Selection | None = None  # ranges, offsets: what follows from positions alone
    chooses: bool = False
    threads: int = 1  # of the kernels: what was compiled for another count is compiled again


def attention(
    query: Any,
    key: Any,
    value: Any,
    policy: Policy | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    softcap: float | None = None,
    window: int | None = None,
    sink: Any = None,
    cu_seqlens: Any = None,
    geometry: Geometry | None = None,
    selection: PaddedBlocks | Selection | None = None,
    max_blocks: int | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    return_report: bool = False,
) -> Any:
    """Attention over the keys that ``policy`` keeps: ``softmax(cap(scale * q k^T) + bias) v`` restricted to the selection.

    The arguments of :func:`sieve_attn.attention`, on arrays of JAX or NumPy: query [batch, q_heads, q_len, dim]; key, value
    [batch, kv_heads, kv_len, dim | v_dim]; everything that is no array is static under ``jit``. Differentiable in query, key,
    value, bias and sink; the kept set is a constant. ``max_blocks`` bounds how many blocks a tile may keep; None leaves room for
    all, so that nothing overflows. A tile that wants more attends to every block it sees, and ``report.overflow`` says so.

    ``backend``: ``native`` (C++ through XLA's foreign functions, CPU), ``gather`` (``jax.numpy``, any platform), ``pallas``
    (block-sparse kernel; forward natively on GPU and TPU, interpreted on CPU; gradients by the gather), ``reference`` (the shared
    oracle, outside of ``jit`` only), or ``auto``: native where it can run, else gather. What is being traced counts as being on
    ``jax.default_backend()``.

    Returns the output [batch, q_heads, q_len, v_dim], then ``lse`` [batch, q_heads, q_len] with ``return_lse`` and a
    :class:`~sieve_attn.jax.Report` with ``return_report``. Raises ValueError (or TypeError) before any work.

    With ``policy=None`` it equals::

        jax.nn.dot_product_attention(*(x.swapaxes(1, 2) for x in (query, key, value)), is_causal=causal).swapaxes(1, 2)
    """
    policy = DENSE if policy is None else policy
    checks.policy_like(policy, Policy)
    call = front.make(
        query, key, value, causal=causal, scale=scale, mask=mask, key_mask=key_mask, bias=bias, softcap=softcap, window=window,
        sink=sink, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if max_blocks is not None:
        max_blocks = checks.positive_int("max_blocks", max_blocks, "leave it out for room for every block")
    short = call.kv_len < policy.min_seq_length
    if policy.far_field and not short:
        raise error("policy", "must have no far field under JAX", repr(policy), "leave far_field out")
    if selection is not None:
        selection = to_selection(selection, call)
    chooses = selection is None and policy.chooses_blocks and not short
    if selection is None and not chooses:
        selection = backends.everything(call)
        if policy.keep is not None and not policy.chooses_blocks and not short:
            selection = to_selection(policy.keep.selection(call.q_len, call.kv_len, causal=call.causal), call)
    if geometry is not None and chooses:
        geometry_fits(geometry, call, policy)
    if backend == "pallas" and chooses:
        backends.pallas_fits(policy)
    name, why = backends.choose(backend, call, selection)
    if chooses and name != "reference":
        stages.check_pattern(policy)
    chosen = selection if isinstance(selection, Selection) else None
    plan = Plan(policy, name, why, max_blocks, return_report, chosen, chooses, ffi.threads())
    padded = selection if isinstance(selection, PaddedBlocks) else None
    if name == "reference":
        output, lse, report = backends.reference(call, plan, geometry, padded)
    else:
        output, lse, report = _run(*_taken_apart(call), geometry, padded, plan)
    results = (output, *([lse] if return_lse else []), *([report] if return_report else []))
    return results[0] if len(results) == 1 else results


def attend(
    query: Any,
    key: Any,
    value: Any,
    selection: PaddedBlocks | Selection,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    softcap: float | None = None,
    window: int | None = None,
    sink: Any = None,
    cu_seqlens: Any = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """The kernel stage alone: ``(output, lse)`` over the visible keys of ``selection``; see :func:`attention`."""
    return attention(
        query, key, value, None, selection=selection, causal=causal, scale=scale, mask=mask, key_mask=key_mask, bias=bias,
        softcap=softcap, window=window, sink=sink, cu_seqlens=cu_seqlens, backend=backend, return_lse=True,
    )  # fmt: skip


def select(
    query: Any,
    key: Any,
    policy: Policy,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    softcap: float | None = None,
    window: int | None = None,
    sink: Any = None,
    cu_seqlens: Any = None,
    geometry: Geometry | None = None,
    max_blocks: int | None = None,
    backend: str = "auto",
) -> PaddedBlocks:
    """What ``policy`` keeps of ``key`` for ``query``: a :class:`~sieve_attn.jax.PaddedBlocks`, to pass as ``selection``.

    The arguments are those of :func:`attention`; the policy must choose blocks (Dense and Windowed choose none).
    """
    checks.policy_like(policy, Policy)
    if not policy.chooses_blocks:
        raise error("policy", "must have a scorer and a selector to choose blocks", repr(policy), "try policies.TopBlocks(64)")
    stages.check_pattern(policy)
    call = front.make(
        query, key, key, causal=causal, scale=scale, mask=mask, key_mask=key_mask, bias=bias, softcap=softcap, window=window,
        sink=sink, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if geometry is not None:
        geometry_fits(geometry, call, policy)
    if max_blocks is not None:
        max_blocks = checks.positive_int("max_blocks", max_blocks, "leave it out for room for every block")
    name, why = backends.choose("gather" if backend == "reference" else backend, call, None)
    return _select(*_taken_apart(call), geometry, Plan(policy, name, why, max_blocks, False, chooses=True, threads=ffi.threads()))


def manifold(query: Any, key: Any, policy: Policy, **options: Any) -> jax.Array:
    """[batch, heads, q_tiles, kv_blocks] bool: the blocks that :func:`select` keeps, for a picture; the same arguments."""
    return select(query, key, policy, **options).to_tiles()


def to_selection(selection: Any, call: Call) -> PaddedBlocks | Selection:
    """A selection made elsewhere: blocks padded, ranges and offsets as they are, each for this call."""
    if not isinstance(selection, (PaddedBlocks, Selection)):
        raise error(
            "selection", "must be a PaddedBlocks or a Selection", type(selection).__name__, "make it with select", TypeError
        )
    if (selection.q_len, selection.kv_len) != (call.q_len, call.kv_len):
        checks.selection_fits(selection, call.query, call.key)
    if isinstance(selection, Selection):
        checks.selection_fits(selection, call.query, call.key)
        if any(isinstance(part, Ranges) for part in selection.parts) or selection.blocks is None:
            return selection
        return PaddedBlocks.from_selection(selection)
    for name in ("q_block", "kv_block"):
        checks.positive_int(f"selection.{name}", getattr(selection, name), "make it with select or PaddedBlocks.from_tiles")
    shape = tuple(selection.counts.shape)
    if len(shape) != 3 or tuple(selection.indices.shape[:-1]) != shape or shape[2] != selection.tiles or not selection.max_blocks:
        raise error("selection", f"must have counts [batch, heads, {selection.tiles}] and indices of that shape times max_blocks",
                    f"shapes {shape} and {tuple(selection.indices.shape)}",
                    "make it with select or PaddedBlocks.from_tiles")  # fmt: skip
    batch, heads = shape[:2]
    if batch not in (1, call.query.shape[0]) or heads not in (1, call.key.shape[1], call.query.shape[1]):
        raise error("selection", f"must have batch 1 or {call.query.shape[0]} and heads 1, {call.key.shape[1]} or "
                    f"{call.query.shape[1]}", f"batch {batch}, heads {heads}", "select again for these inputs")  # fmt: skip
    return selection


def geometry_fits(geometry: Geometry, call: Call, policy: Policy) -> None:
    """Shapes and statistics; which keys a geometry was built from is not known while it is traced."""
    if not isinstance(geometry, Geometry):
        raise error("geometry", "must be a Geometry", type(geometry).__name__, "build it with sieve_attn.jax.geometry", TypeError)
    if isinstance(geometry.count, jax.core.Tracer) or isinstance(call.key_mask, jax.core.Tracer):
        known = call.key.shape[0] * call.key.shape[1] * call.kv_len
        held = replace(geometry, count=_full_count(geometry.count.shape, known))
        checks.geometry_fits(held, call.key, None, policy.block_size, policy.statistics)
    else:
        checks.geometry_fits(geometry, call.key, call.key_mask, policy.block_size, policy.statistics)


class _full_count:
    """Stands for counts that are being traced."""

    def __init__(self, shape: tuple[int, ...], total: int):
        self.shape, self.total = shape, total

    def sum(self) -> int:
        return self.total


def _taken_apart(call: Call) -> tuple[dict, tuple]:
    names = ("query", "key", "value", *front.OPTIONAL)
    held = {name: x for name in names if (x := getattr(call, name)) is not None}
    return held, (call.causal, call.scale, call.softcap, call.window)


def _put_together(held: dict, settled: tuple) -> Call:
    causal, scale, softcap, window = settled
    return Call(**held, causal=causal, scale=scale, softcap=softcap, window=window)


@partial(jax.jit, static_argnums=(1, 4))
def _run(held: dict, settled: tuple, geometry: Geometry | None, padded: PaddedBlocks | None, plan: Plan):
    call = _put_together(held, settled)
    counts, selected_by = (None, None, None), ""
    if plan.chooses:
        padded, counts, selected_by = _choose(call, geometry, plan)
    selection = plan.chosen if plan.chosen is not None else padded
    output, lse = backends.module(plan.backend).attend(call, selection)
    if not plan.report:
        return output, lse, None
    kept, visible, dense = counts
    overflow = None if padded is None else padded.overflow
    if kept is not None:
        kept = jnp.where(overflow, visible, kept)
    else:
        kept, visible = stages.count_keys(call, selection)
    report = Report(kept, visible, dense, overflow, padded, repr(plan.policy), plan.backend, plan.why, selected_by)
    return output, lse, report


@partial(jax.jit, static_argnums=(1, 3))
def _select(held: dict, settled: tuple, geometry: Geometry | None, plan: Plan) -> PaddedBlocks:
    return _choose(_put_together(held, settled), geometry, plan)[0]


def _choose(call: Call, geometry: Geometry | None, plan: Plan):
    """Stages 1 to 3: ``(PaddedBlocks, (kept, visible, dense tiles), who chose)``."""
    policy = plan.policy
    blocks = -(-call.kv_len // policy.block_size)
    room = blocks if plan.max_blocks is None else min(plan.max_blocks, blocks)
    native = plan.backend == "native"
    if geometry is None:
        key = jax.lax.stop_gradient(call.key)
        backend = "native" if native else "gather"
        geometry = stage_geometry.geometry(key, policy, value=call.value, key_mask=call.key_mask, backend=backend)
    if native:
        from sieve_attn.jax import ffi_stages

        found = ffi_stages.choose(call, geometry, policy, room)
        if found is not None:
            return (*found, "native")
    found = stages.choose_tiles(call, geometry, policy)
    grid = {"q_len": call.q_len, "kv_len": call.kv_len, "q_block": policy.query_tile, "kv_block": policy.block_size,
            "lead": call.lead(policy.query_tile)}  # fmt: skip
    padded = PaddedBlocks.from_tiles(found.tiles, room, **grid)
    return padded, (found.kept, found.visible, found.dense_tiles), "stages"


__all__ = ["attend", "attention", "manifold", "select"]
