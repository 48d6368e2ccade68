"""What a figure depends on: the machine, the versions, the commit, the command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sieve_attn import __version__
from sieve_attn.bench.timing import PEAK_BY, last_level_cache


def facts() -> dict[str, Any]:
    """Plain values that go beside every table."""
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "largest_cache_mb": round(last_level_cache() / 1e6, 1),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1) if hasattr(os, "sysconf") else None,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sieve_attn": __version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "peak_mb_is": PEAK_BY,
    }


def gpu() -> dict[str, Any]:
    """The GPU, its driver, and the versions that kernels for it depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = torch.cuda.get_device_properties(0)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "gpu": found.name,
        "gpu_memory_gb": round(found.total_memory / 1e9, 1),
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton,
        "peak_mb_is": "growth of what PyTorch allocated on the GPU during the first call of a row",
    }


def driver() -> str | None:
    """The version of the GPU's driver, None where the system does not tell."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str | None:
    """The commit that this code is from, with ``+`` if files differ from it; None outside of a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
