"""The door to the C++ kernels (``sieve_attn._native``): whether they are here, arrays as they want them, threads.

Every ``native.py`` of a stage calls through this file. The extension is absent from a pure-Python installation
(``SIEVE_PURE_PYTHON=1``); everything then runs on the reference, slower and with the same results.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

Array = Any

PURE = "SIEVE_PURE_PYTHON"
LARGE = 1 << 22  # bytes from which an array holds at least one page of 2 MB


@lru_cache
def _load() -> tuple[ModuleType | None, str]:
    if find_spec("sieve_attn._native") is None:
        return None, f"install with a C++17 compiler and without {PURE}"
    try:
        from sieve_attn import _native
    except ImportError as why:
        return None, f"loading them failed: {why}"
    return _native, ""


def missing() -> tuple[str, ...]:
    """Why there are no kernels; empty if there are."""
    found, why = _load()
    if found is not None:
        return ()
    return (f"the C++ kernels are not installed; {why}",)


def module() -> ModuleType:
    found, why = _load()
    if found is None:
        raise ImportError(why)
    return found


def level() -> str | None:
    """The instruction-set level in use (portable, avx2, avx512, vnni, amx), or None without kernels."""
    return None if missing() else module().level()


def pace() -> str:
    """What costs of kernels are listed under: the level, with ``-halved`` where 512 bits take two turns (Zen 4's AVX-512)."""
    name = level() or "portable"
    return f"{name}-halved" if name in ("avx512", "vnni") and module().halves_vectors() else name


def view(x: Array) -> Any:
    """``x`` as the kernels see it; whoever makes it keeps ``x`` alive."""
    if hasattr(x, "data_ptr"):
        return module().View(x)
    size = x.dtype.itemsize
    return module().View(x.__array_interface__["data"][0], x.dtype.name, x.shape, [s // size for s in x.strides])


def unreadable(x: Array) -> tuple[str, ...]:
    """Why kernels cannot read and write ``x`` where it lies; empty if they can."""
    # immutable, and perhaps not there yet: XLA itself hands such arrays over
    return ("arrays of JAX go to kernels through sieve_attn.jax",) if hasattr(x, "unsafe_buffer_pointer") else ()


def on_large_pages(fresh: Array) -> Array:
    """``fresh``, an array of a cache that was just allocated and not written to, on pages of 2 MB where the system has them.

    A step of decoding reads few blocks far apart; on pages of 4 KB, looking up where they lie takes a fifth of its time. Linux
    may leave it to programs which memory deserves large pages. Other arrays, and pure-Python installations, stay as they are.
    """
    if hasattr(fresh, "data_ptr") and fresh.device.type == "cpu" and fresh.nbytes >= LARGE and not missing():
        module().prefer_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def threads(like: Array) -> int:
    """How many threads a kernel may use: torch's count where torch is loaded."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else 1
