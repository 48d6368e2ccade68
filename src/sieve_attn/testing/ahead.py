"""Compile Triton kernels for cards that are not here, and read what they would take of them.

A kernel is compiled from the very arguments that a launch would pass, so types, alignment and constants are those of the real
call. Registers and spills are what ``ptxas`` reports, shared memory is the compiler's own figure. Not for a process in which
Triton's interpreter is on.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one program may have, by compute capability


@dataclass(frozen=True)
class Built:
    """What one compiled kernel takes."""

    registers: int  # a thread
    spilled: int  # bytes of a thread that did not fit into registers
    shared: int  # bytes of a program
    tensor_cores: bool

    def fits(self, capability: int) -> bool:
        return self.shared <= SHARED_LIMIT[capability]


def compile_ahead(kernel: Any, arguments: dict[str, Any], chosen: dict[str, Any], capability: int) -> Built:
    """``kernel`` as launched with ``arguments`` and the options ``chosen``, for compute capability ``capability / 10``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments, **chosen)
    options, signature, constants, attributes = kernel._pack_args(backend, chosen, bound, specialization, options)
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=target, options=options.__dict__)
    report = _assembled(backend, made.asm["ptx"], options, capability)
    # spills come function by function: the kernel's own, and those of functions that were not put into it
    registers, spilled = (
        [int(n) for n in re.findall(line, report)] for line in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    )
    if not (registers and spilled):
        raise RuntimeError(f"ptxas reported no registers or no spills:\n{report}")
    products = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
    used = any(name in made.asm["ptx"] for name in products)
    return Built(max(registers), sum(spilled), made.metadata.shared, used)


def _assembled(backend: Any, ptx: str, options: Any, capability: int) -> str:
    """What ``ptxas`` reports where Triton calls it, with options of Triton's own on which registers and spills depend."""
    from triton import knobs

    report = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(report):
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(ptx, {}, options, capability)
    return report.getvalue()
