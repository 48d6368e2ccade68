"""Which code attends to JAX arrays. A named backend runs or raises with every reason; ``auto`` takes the first that can."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from sieve_attn import native, pipeline
from sieve_attn.attend import native as kernels
from sieve_attn.checks import error
from sieve_attn.jax import call as front
from sieve_attn.jax.call import Call
from sieve_attn.jax.report import Report
from sieve_attn.jax.selection import PaddedBlocks
from sieve_attn.policies import Policy
from sieve_attn.types import Blocks, Ranges, Selection

ORDER = ("native", "gather", "pallas", "reference")  # auto takes native or gather
MODULES = {"native": "sieve_attn.jax.ffi_attend", "gather": "sieve_attn.jax.gather", "pallas": "sieve_attn.jax.pallas"}


def module(name: str) -> ModuleType:
    return import_module(MODULES[name])


def everything(call: Call) -> Selection:
    return Selection((Ranges(call.q_len, call.kv_len, prefix=call.kv_len),))


def why_not(name: str, call: Call, selection: PaddedBlocks | Selection | None, far_field: bool = False) -> tuple[str, ...]:
    """Every reason why backend ``name`` cannot run ``call``; empty if it can. ``selection=None``: blocks, still to be chosen."""
    if name == "reference":
        traced = any(isinstance(x, jax.core.Tracer) for x in (call.query, call.key, call.value))
        reasons = ("the reference's shapes depend on data, so it does not run under jit, grad or vmap",) if traced else ()
        return (*reasons, *(() if call.kv_length is None else ("the reference has no kv_length",)))
    field = ("kernels have no far field",) if far_field and name in ("native", "pallas") else ()
    if name == "native":
        return (*native_why_not(call), *field)
    return (*field, *module(name).options_why_not(call), *(() if selection is None else module(name).why_not(selection)))


def pallas_fits(policy: Policy, per_query: bool) -> None:
    """Refuse what the Pallas kernel does not take, before anything is chosen."""
    reasons = module("pallas").sizes_why_not(policy.query_tile, policy.block_size, per_query)
    if reasons:
        raise error("backend", f"cannot run this call: {'; '.join(reasons)}", "'pallas'", "use backend='auto'")


def native_why_not(call: Call) -> tuple[str, ...]:
    """Why the C++ kernels cannot be called through XLA."""
    from sieve_attn.jax import ffi

    reasons = list(native.missing()) or list(ffi.why_not())
    where = front.platform(call.query)
    if where != "cpu":
        reasons.append(f"kernels run on cpu, not on {where}")
    if call.query.dtype.name not in kernels.DTYPES:
        reasons.append(f"kernels know {', '.join(kernels.DTYPES)}, not {call.query.dtype}")
    return tuple(reasons)


def choose(backend: str, call: Call, selection: PaddedBlocks | Selection | None, far_field: bool = False) -> tuple[str, str]:
    """``(name, why)`` of the backend to use."""
    if backend != "auto" and backend not in ORDER:
        raise error("backend", f"must be 'auto' or one of {', '.join(ORDER)}", repr(backend), "use 'auto'")
    if backend != "auto":
        reasons = why_not(backend, call, selection, far_field)
        if reasons:
            raise error("backend", f"cannot run this call: {'; '.join(reasons)}", repr(backend),
                        "use backend='auto' or mend every reason")  # fmt: skip
        return backend, "named by the caller"
    passed = []
    for name in ("native", "gather"):
        reasons = why_not(name, call, selection, far_field)
        if not reasons:
            return name, "; ".join(passed) or "first choice"
        passed.append(f"{name}: {', '.join(reasons)}")
    raise error("backend", f"found none that can run this call ({'; '.join(passed)})", repr(backend), "see `sieve doctor`")


def reference(call: Call, plan: Any, geometry: Any, padded: PaddedBlocks | None) -> tuple[jax.Array, jax.Array, Report | None]:
    """The shared pipeline on concrete arrays, as the oracle."""
    chosen = plan.chosen
    if padded is not None:
        rows = None if padded.rows is None else padded.to_rows(jnp.arange(padded.q_len))
        blocks = Blocks.from_tiles(padded.to_tiles(), rows=rows, **{
            name: getattr(padded, name) for name in ("q_len", "kv_len", "q_block", "kv_block", "lead")
        })  # fmt: skip
        chosen = Selection((blocks,))
    options = {name: getattr(call, name) for name in ("causal", "scale", "mask", "key_mask", "bias", "softcap", "cu_seqlens",
                                                      "sink", "window")}  # fmt: skip
    policy = plan.policy if plan.chooses or plan.expands else None
    output, lse, told = pipeline.attention(
        call.query, call.key, call.value, policy, geometry=geometry, selection=chosen, per_query=plan.per_query,
        backend="reference", return_lse=True, return_report=True, **options,
    )  # fmt: skip
    if not plan.report:
        return output, lse, None
    if plan.chooses:
        padded = PaddedBlocks.from_selection(told.selection)
    overflow = None if padded is None else padded.overflow
    return output, lse, Report(told.kept, told.visible, None, overflow, padded, plan.policy, "reference", plan.why,
                               "reference" if plan.chooses else "", plan.short)  # fmt: skip
