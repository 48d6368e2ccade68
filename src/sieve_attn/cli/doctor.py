"""``sieve doctor``: what is installed, which backends run, and why others do not."""

from __future__ import annotations

import json as json_module
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from sieve_attn import dispatch, native
from sieve_attn.cli import options as o

PACKAGES = (
    "sieve-attn", "numpy", "torch", "transformers", "safetensors", "tokenizers", "jax", "penzai", "triton", "typer", "rich",
)  # fmt: skip
CPU_FEATURES = (
    "avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve",
    "bf16",
)  # fmt: skip
HEAD_DIM = 64


def doctor(json: o.Json = False) -> None:
    """What is installed, which backends run, and why others do not."""
    found = examine()
    if json:
        typer.echo(json_module.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in found["packages"].items():
        table.add_row(name, value or "not installed")
    machine = found["machine"]
    table.add_row("python", machine["python"])
    table.add_row("machine", f"{machine['system']}, {machine['cpus']} CPUs, torch threads {machine['torch_threads']}")
    table.add_row("cpu features", " ".join(machine["cpu_features"]) or "unknown")
    kernels = found["kernels"]
    if kernels["missing"]:
        table.add_row("native kernels", "; ".join(kernels["missing"]))
    else:
        table.add_row(
            "native kernels", f"level {kernels['level']} of {', '.join(kernels['levels'])} (SIEVE_LEVEL chooses another)"
        )
    table.add_row("accelerators", ", ".join(machine["accelerators"]) or "none")
    table.add_row("embedded model", "present" if found["embedded_model"] else "missing: train it with models/train.py")
    console.print(table)
    for request, backends in found["backends"].items():
        console.print(f"\nbackends for {request}, in order:")
        for name, reasons in backends.items():
            console.print(f"  {name:<10} {'runs' if not reasons else 'does not run: ' + '; '.join(reasons)}")


def examine() -> dict[str, Any]:
    """Everything that ``sieve doctor`` prints, as plain values."""
    import sieve_attn

    embedded = Path(sieve_attn.__file__).parent / "llm" / "embedded"
    threads, accelerators = None, []
    if find_spec("torch") is not None:
        import torch

        threads = torch.get_num_threads()
        accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ["cpu", *(["cuda"] if accelerators else [])]
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {
            "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}", "cpus": os.cpu_count(),
            "torch_threads": threads, "cpu_features": cpu_features(), "accelerators": accelerators,
        },
        "kernels": {
            "missing": list(native.missing()), "level": native.level(),
            "levels": [] if native.missing() else native.module().levels(),
        },
        "embedded_model": all((embedded / name).is_file() for name in ("config.json", "model.safetensors")),
        "backends": {
            f"torch on {device}, {dtype}, head_dim {HEAD_DIM}": {
                name: list(dispatch.why_not(name, dispatch.Request("torch", device, dtype, HEAD_DIM, HEAD_DIM)))
                for name in dispatch.ORDER
            }
            for device in devices for dtype in ("float32", "bfloat16")
        },
    }  # fmt: skip


def cpu_features() -> list[str]:
    """The instruction sets that kernels care about, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [name for name in CPU_FEATURES if name in flags]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
