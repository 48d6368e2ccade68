"""The door to Triton: whether it is here, whether its interpreter is on, and which arrays its kernels take.

Every Triton file of a stage calls through this one; inside the package ``import triton`` still means the real one, and nothing
here imports it before it is asked for. With ``TRITON_INTERPRET=1`` set before Triton is first imported, kernels run in its
interpreter, on CPU tensors too: slow, and only where the backend is named.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

Array = Any

CAPABILITY = (8, 0)  # the first cards with bf16 tensor cores and asynchronous copies
DTYPES = ("float16", "bfloat16", "float32")
# Launch options. A product fused into the subtraction of a rounded product leaves what the rounding took: with logits beyond
# 2^31 that is a weight of infinity, or none at all.
PLAIN = {"enable_fp_fusion": False}


@lru_cache
def missing() -> tuple[str, ...]:
    """Why there is no Triton; empty if there is."""
    if find_spec("triton") is None:
        return ("Triton is not installed; install sieve-attn[triton]",)
    return ()


@lru_cache
def interpreting() -> bool:
    """Whether kernels run in the interpreter; settled by the environment when Triton is first imported."""
    if missing():
        return False
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.cdiv, InterpretedFunction)


def unsuitable(framework: str, device: str, dtype: str, *, named: bool = False) -> tuple[str, ...]:
    """Every reason why kernels cannot take such arrays. ``named``: the caller asked for Triton, so its interpreter may serve."""
    reasons = list(missing())
    if framework != "torch":
        reasons.append(f"Triton kernels take PyTorch tensors, not {framework} arrays")
    interpreted = named and device in ("cpu", "cuda") and interpreting()
    if device == "cuda" and not interpreted:
        capability = sys.modules["torch"].cuda.get_device_capability()
        if capability < CAPABILITY:
            least, found = (".".join(map(str, version)) for version in (CAPABILITY, capability))
            reasons.append(f"Triton kernels need compute capability {least}, this GPU has {found}")
    elif not interpreted:
        reasons.append(f"Triton kernels run on cuda, not on {device} (there the interpreter may: name it, TRITON_INTERPRET=1)")
    if dtype not in DTYPES:
        reasons.append(f"Triton kernels know {', '.join(DTYPES)}, not {dtype}")
    if interpreted and dtype == "bfloat16":
        reasons.append("Triton's interpreter computes bfloat16 wrongly; use float16 or float32 in it")
    return tuple(reasons)


def launching_on(x: Array) -> AbstractContextManager:
    """Within it, launches go to the device of ``x``."""
    return sys.modules["torch"].cuda.device_of(x)


def capability(x: Array) -> tuple[int, int]:
    """Compute capability of the device of ``x``; the interpreter plays the oldest card that kernels know."""
    return _capability(x.device.index) if x.is_cuda else CAPABILITY


@lru_cache
def _capability(index: int) -> tuple[int, int]:
    return sys.modules["torch"].cuda.get_device_capability(index)


def multiprocessors(x: Array) -> int:
    """How many programs the device of ``x`` runs side by side, at the least."""
    return _multiprocessors(x.device.index) if x.is_cuda else 1


@lru_cache
def _multiprocessors(index: int) -> int:
    return sys.modules["torch"].cuda.get_device_properties(index).multi_processor_count
