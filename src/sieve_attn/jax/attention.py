"""``attention``, ``select``, ``attend`` and ``manifold``: the pipeline's calls on JAX arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sieve_attn import checks
from sieve_attn.checks import error
from sieve_attn.jax import backends, ffi, forced, stages
from sieve_attn.jax import call as front
from sieve_attn.jax import geometry as stage_geometry
from sieve_attn.jax.call import Call
from sieve_attn.jax.certificate import Evidence
from sieve_attn.jax.given import geometry_fits, static_flag, to_selection
from sieve_attn.jax.report import Report
from sieve_attn.jax.selection import PaddedBlocks
from sieve_attn.policies import FAR_FIELD_STATISTICS, Policy
from sieve_attn.types import Fallback, Geometry, Selection, Statistics

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
    per_query: bool = False
    expands: bool = False  # with the far field
    short: Fallback | None = None
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
    kv_length: Any = None,
    per_query: bool = False,
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
    ``kv_length``: a scalar, perhaps traced, for decoding from a cache of fixed size: only so many keys are there, and the one
    query of each sequence sits at the last of them. ``native`` refuses a traced one that does
    not lie in 1..kv_len when the call runs; the gather cannot tell, and its result then means nothing.

    ``backend``: ``native`` (C++ through XLA's foreign functions, CPU), ``gather`` (``jax.numpy``, any platform), ``pallas``
    (block-sparse kernel; forward natively on GPU and TPU, interpreted on CPU; gradients by the gather; finite values only),
    ``reference`` (the shared oracle, outside of ``jit`` only), or ``auto``: native where it can run, else gather. What is being
    traced counts as being on ``jax.default_backend()``.

    Returns the output [batch, q_heads, q_len, v_dim], then ``lse`` [batch, q_heads, q_len] with ``return_lse`` and a
    :class:`~sieve_attn.jax.Report`, which holds the certificate, with ``return_report``. Raises ValueError (or TypeError) before
    any work.

    With ``policy=None`` it equals::

        jax.nn.dot_product_attention(*(x.swapaxes(1, 2) for x in (query, key, value)), is_causal=causal).swapaxes(1, 2)
    """
    policy = DENSE if policy is None else policy
    checks.policy_like(policy, Policy)
    call = front.make(
        query, key, value, causal=causal, scale=scale, mask=mask, key_mask=key_mask, bias=bias, softcap=softcap, window=window,
        sink=sink, cu_seqlens=cu_seqlens, kv_length=kv_length,
    )  # fmt: skip
    if max_blocks is not None:
        max_blocks = checks.positive_int("max_blocks", max_blocks, "leave it out for room for every block")
    static_flag("per_query", per_query)
    short = None
    if selection is None and call.kv_len < policy.min_seq_length:
        reason = f"kv_len {call.kv_len} is below min_seq_length {policy.min_seq_length}"
        short = Fallback(reason, call.query.shape[0] * call.query.shape[1])
    if selection is not None:
        selection = to_selection(selection, call)
    chooses = selection is None and policy.chooses_blocks and short is None
    expands = policy.far_field and short is None
    if selection is None and not chooses:
        selection = backends.everything(call)
        if policy.keep is not None and not policy.chooses_blocks and short is None:
            selection = to_selection(policy.keep.selection(call.q_len, call.kv_len, causal=call.causal), call)
    if geometry is not None and (chooses or expands):
        geometry_fits(geometry, call, policy)
    if backend == "pallas" and chooses:
        backends.pallas_fits(policy, per_query)
    name, why = backends.choose(backend, call, selection, expands)
    if chooses and name != "reference":
        forced.check(policy.keep)
    chosen = selection if isinstance(selection, Selection) else None
    plan = Plan(policy, name, why, max_blocks, return_report, chosen, chooses, per_query, expands, short, ffi.threads())
    padded = selection if isinstance(selection, PaddedBlocks) else None
    held, settled = front.taken_apart(call)
    if name == "reference":
        output, lse, report = backends.reference(call, plan, geometry, padded)
    else:
        output, lse, report = _run(held, settled, geometry, padded, plan)
    if report is not None:
        asked = policy.certifier.proof_statistics | Statistics(value=True)
        known = geometry if geometry is not None and geometry.has(asked) else None
        proof = Evidence(held, output, lse, known, report.selection, settled, policy, name, chosen, expands)
        report = replace(report, evidence=proof)
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
    kv_length: Any = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """The kernel stage alone: ``(output, lse)`` over the visible keys of ``selection``; see :func:`attention`."""
    return attention(
        query, key, value, None, selection=selection, causal=causal, scale=scale, mask=mask, key_mask=key_mask, bias=bias,
        softcap=softcap, window=window, sink=sink, cu_seqlens=cu_seqlens, kv_length=kv_length, backend=backend, return_lse=True,
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
    kv_length: Any = None,
    per_query: bool = False,
    max_blocks: int | None = None,
    backend: str = "auto",
) -> PaddedBlocks:
    """What ``policy`` keeps of ``key`` for ``query``: a :class:`~sieve_attn.jax.PaddedBlocks`, to pass as ``selection``.

    The arguments are those of :func:`attention`; the policy must choose blocks (Dense and Windowed choose none).
    """
    checks.policy_like(policy, Policy)
    if not policy.chooses_blocks:
        raise error("policy", "must have a scorer and a selector to choose blocks", repr(policy), "try policies.TopBlocks(64)")
    forced.check(policy.keep)
    static_flag("per_query", per_query)
    call = front.make(
        query, key, key, causal=causal, scale=scale, mask=mask, key_mask=key_mask, bias=bias, softcap=softcap, window=window,
        sink=sink, cu_seqlens=cu_seqlens, kv_length=kv_length,
    )  # fmt: skip
    if geometry is not None:
        geometry_fits(geometry, call, policy)
    if max_blocks is not None:
        max_blocks = checks.positive_int("max_blocks", max_blocks, "leave it out for room for every block")
    name, why = backends.choose("gather" if backend == "reference" else backend, call, None)
    plan = Plan(policy, name, why, max_blocks, False, chooses=True, per_query=per_query, threads=ffi.threads())
    return _select(*front.taken_apart(call), geometry, plan)


def manifold(query: Any, key: Any, policy: Policy, **options: Any) -> jax.Array:
    """[batch, heads, q_tiles, kv_blocks] bool: the blocks that :func:`select` keeps, for a picture; the same arguments."""
    return select(query, key, policy, **options).to_tiles()


@partial(jax.jit, static_argnums=(1, 4))
def _run(held: dict, settled: tuple, geometry: Geometry | None, padded: PaddedBlocks | None, plan: Plan):
    call = front.put_together(held, settled)
    counts, selected_by = (None, None, None), ""
    if plan.chooses:
        padded, counts, selected_by = _choose(call, geometry, plan)
    selection = plan.chosen if plan.chosen is not None else padded
    if plan.expands:
        from sieve_attn.jax import far_field

        if geometry is None or not geometry.has(FAR_FIELD_STATISTICS):
            geometry = _geometry(call, plan.policy, False)
        output, lse = far_field.attend(call, selection, geometry)
    else:
        output, lse = backends.module(plan.backend).attend(call, selection)
    if not plan.report:
        return output, lse, None
    kept, visible, dense = counts
    overflow = None if padded is None else padded.overflow
    if kept is not None:
        kept = jnp.where(overflow, visible, kept)
    else:
        kept, visible = stages.count_keys(call, selection)
    report = Report(kept, visible, dense, overflow, padded, plan.policy, plan.backend, plan.why, selected_by, plan.short)
    return output, lse, report


@partial(jax.jit, static_argnums=(1, 3))
def _select(held: dict, settled: tuple, geometry: Geometry | None, plan: Plan) -> PaddedBlocks:
    return _choose(front.put_together(held, settled), geometry, plan)[0]


def _choose(call: Call, geometry: Geometry | None, plan: Plan):
    """Stages 1 to 3: ``(PaddedBlocks, (kept, visible, dense tiles), who chose)``."""
    policy = plan.policy
    blocks = -(-call.kv_len // policy.block_size)
    room = blocks if plan.max_blocks is None else min(plan.max_blocks, blocks)
    native = plan.backend == "native"
    if geometry is None:
        geometry = _geometry(call, policy, native)

    def by_stages():
        return stages.choose(call, geometry, policy, room, plan.per_query)

    if native and not plan.per_query:
        from sieve_attn.jax import ffi_stages

        found = ffi_stages.choose(call, geometry, policy, room, by_stages)
        if found is not None:
            return (*found, "native")
    return (*by_stages(), "stages")


def _geometry(call: Call, policy: Policy, native: bool) -> Geometry:
    key, backend = jax.lax.stop_gradient(call.key), "native" if native else "gather"
    return stage_geometry.geometry(key, policy, value=call.value, key_mask=call.present, backend=backend)


__all__ = ["attend", "attention", "manifold", "select"]
