"""The kernels as foreign functions of XLA: registered once, called with named arrays and named numbers.

A handler is told the names of its arrays in the attributes ``inputs`` and ``outputs``, so optional arrays are simply left out.
``vmap`` adds a leading axis to every array, of length 1 where it is not mapped; handlers loop over leading axes, so nothing is
copied. Threads: torch's count where torch is loaded, else those of the process.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from sieve_attn import native

PREFIX = "sieve_attn_"


def why_not() -> tuple[str, ...]:
    """Why the kernels cannot be registered; empty if they can (and then they are)."""
    return _register()


@lru_cache
def _register() -> tuple[str, ...]:
    if not hasattr(native.module(), "xla_handlers"):
        return ("the C++ kernels were built without their XLA handlers; build them again",)
    for name, capsule in native.module().xla_handlers().items():
        jax.ffi.register_ffi_target(PREFIX + name, capsule, platform="cpu")
    return ()


def threads() -> int:
    """How many threads a kernel may use: torch's count where torch is loaded, else every core of the process."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return torch.get_num_threads()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def call(target: str, inputs: dict[str, jax.Array | None], outputs: dict[str, Any], **numbers: Any) -> dict[str, jax.Array]:
    """Run handler ``target``: arrays by name in, arrays of the shapes and dtypes in ``outputs`` by name out."""
    given = {name: x for name, x in inputs.items() if x is not None}
    attributes = {name: _attribute(x) for name, x in numbers.items() if x is not None}
    run = jax.ffi.ffi_call(PREFIX + target, list(outputs.values()), vmap_method="expand_dims")
    found = run(*given.values(), inputs=" ".join(given), outputs=" ".join(outputs), threads=np.int64(threads()), **attributes)
    return dict(zip(outputs, found, strict=True))


def _attribute(x: Any) -> Any:
    if isinstance(x, bool):
        return np.int64(x)
    if isinstance(x, int):
        return np.int64(x)
    if isinstance(x, float):
        return np.float64(x)
    return x
