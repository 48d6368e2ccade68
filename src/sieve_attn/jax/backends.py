"""Which code attends to JAX arrays. A named backend runs or raises with every reason; ``auto`` takes the first that can."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import jax

from sieve_attn import native, pipeline
from sieve_attn.attend import native as kernels
from sieve_attn.checks import error
from sieve_attn.jax import call as front
from sieve_attn.jax.report import Report
from sieve_attn.jax.selection import PaddedBlocks
from sieve_attn.policies import Policy
from sieve_attn.types import Blocks, Call, Ranges, Selection

ORDER = ("native", "gather", "pallas", "reference")  # auto takes native or gather
MODULES = {"native": "sieve_attn.jax.ffi_attend", "gather": "sieve_attn.jax.gather", "pallas": "sieve_attn.jax.pallas"}


def module(name: str) -> ModuleType:
    return import_module(MODULES[name])


def everything(call: Call) -> Selection:
    return Selection((Ranges(call.q_len, call.kv_len, prefix=call.kv_len),))


def why_not(name: str, call: Call, selection: PaddedBlocks | Selection | None) -> tuple[str, ...]:
    """Every reason why backend ``name`` cannot run ``call``; empty if it can. ``selection=None``: blocks, still to be chosen."""
    if name == "reference":
        traced = any(isinstance(x, jax.core.Tracer) for x in (call.query, call.key, call.value))
        return ("the reference's shapes depend on data, so it does not run under jit, grad or vmap",) if traced else ()
    if name == "native":
        return native_why_not(call)
    return (*module(name).options_why_not(call), *(() if selection is None else module(name).why_not(selection)))


def pallas_fits(policy: Policy) -> None:
    """Refuse a policy whose tiles the Pallas kernel does not take, before it chooses."""
    reasons = module("pallas").sizes_why_not(policy.query_tile, policy.block_size)
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


def choose(backend: str, call: Call, selection: PaddedBlocks | Selection | None) -> tuple[str, str]:
    """``(name, why)`` of the backend to use."""
    if backend != "auto" and backend not in ORDER:
        raise error("backend", f"must be 'auto' or one of {', '.join(ORDER)}", repr(backend), "use 'auto'")
    if backend != "auto":
        reasons = why_not(backend, call, selection)
        if reasons:
            raise error("backend", f"cannot run this call: {'; '.join(reasons)}", repr(backend),
                        "use backend='auto' or mend every reason")  # fmt: skip
        return backend, "named by the caller"
    passed = []
    for name in ("native", "gather"):
        reasons = why_not(name, call, selection)
        if not reasons:
            return name, "; ".join(passed) or "first choice"
        passed.append(f"{name}: {', '.join(reasons)}")
    raise error("backend", f"found none that can run this call ({'; '.join(passed)})", repr(backend), "see `sieve doctor`")


def reference(call: Call, plan: Any, geometry: Any, padded: PaddedBlocks | None) -> tuple[jax.Array, jax.Array, Report | None]:
    """The shared pipeline on concrete arrays, as the oracle."""
    chosen = plan.chosen
    if padded is not None:
        blocks = Blocks.from_tiles(padded.to_tiles(), **{
            name: getattr(padded, name) for name in ("q_len", "kv_len", "q_block", "kv_block", "lead")
        })  # fmt: skip
        chosen = Selection((blocks,))
    options = {name: getattr(call, name) for name in ("causal", "scale", "mask", "key_mask", "bias", "softcap", "cu_seqlens",
                                                      "sink", "window")}  # fmt: skip
    policy = plan.policy if plan.chooses else None
    output, lse, told = pipeline.attention(
        call.query, call.key, call.value, policy, geometry=geometry, selection=chosen, backend="reference", return_lse=True,
        return_report=True, **options,
    )  # fmt: skip
    if not plan.report:
        return output, lse, None
    if not plan.chooses:
        overflow = None if padded is None else padded.overflow
        return output, lse, Report(told.kept, told.visible, None, overflow, padded, repr(plan.policy), "reference", plan.why, "")
    chosen = PaddedBlocks.from_selection(told.selection)
    return output, lse, Report(told.kept, told.visible, None, chosen.overflow, chosen, repr(plan.policy), "reference",
                               plan.why, "reference")  # fmt: skip
