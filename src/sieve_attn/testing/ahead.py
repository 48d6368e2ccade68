"""Compile Triton kernels for cards that are not here, and read what they would take of them.

A kernel is compiled from the very arguments that a launch would pass, so types, alignment and constants are those of the real
call. Registers and spills are what ``ptxas`` reports, shared memory is the compiler's own figure. Not for a process in which
Triton's interpreter is on.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sieve_attn.triton import PLAIN

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


def compile_ahead(kernel: Any, arguments: dict[str, Any], warps: int, stages: int, capability: int) -> Built:
    """``kernel`` as it would be launched with ``arguments``, for compute capability ``capability / 10``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    chosen = {"num_warps": warps, "num_stages": stages, **PLAIN}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments, **chosen)
    options, signature, constants, attributes = kernel._pack_args(backend, chosen, bound, specialization, options)
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=target, options=options.__dict__)
    report = _assemble(made.asm["ptx"], capability)
    registers = re.search(r"Used (\d+) registers", report)
    if registers is None:
        raise RuntimeError(f"ptxas reported no registers:\n{report}")
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report))
    products = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
    return Built(int(registers[1]), spilled, made.metadata.shared, any(name in made.asm["ptx"] for name in products))


def _assemble(ptx: str, capability: int) -> str:
    from triton.backends import nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "kernel.ptx"
        text.write_text(ptx)
        command = [tools / ("ptxas-blackwell" if capability >= 100 else "ptxas"), "-v", f"--gpu-name={architecture}", text]
        done = subprocess.run([*command, "-o", Path(folder) / "kernel"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas refused the kernel:\n{done.stderr}")
    return done.stderr
