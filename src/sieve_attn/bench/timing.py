"""Clocks and meters: interleaved medians, resident memory, read bandwidth, threads."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sieve_attn import native

PROC = Path("/proc/self")
PEAK_BY = (
    "growth of resident memory during the first call of a row: VmHWM, reset through /proc/self/clear_refs after malloc_trim, "
    "less VmRSS before the call"
)
LONG = 2.0  # seconds: what takes longer does not live by its caches
LEAST_SECONDS, MOST_SAMPLES = 0.2, 101  # short calls are repeated until a median has so much time behind it
MOST_SECONDS, FEWEST_SAMPLES = 120.0, 3  # and long ones are repeated less
PATIENCE = 5  # times as many turns at most where turns do not agree


@contextmanager
def threads(count: int) -> Iterator[None]:
    """``count`` threads for torch and for kernels that ask it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    calls: dict[str, Callable[[], Any]],
    repeats: int,
    parts: Callable[[str, Any], dict[str, float]] = lambda name, result: {},
    least_seconds: float = LEAST_SECONDS,
    *,
    clock: Callable[[Callable[[], Any]], tuple[Any, float]] | None = None,
    settled: Callable[[dict[str, list[float]]], bool] = lambda found: True,
) -> dict[str, list[float]]:
    """Seconds by name: all calls in turn, each turn beginning with another one; ``repeats`` turns, more until short calls fill
    ``least_seconds``, and fewer (not below 3) where they would take more than two minutes. While what was found is not
    ``settled``, there are up to ``PATIENCE`` times as many, as long as two minutes last.

    Each clocked call follows one of its own that is not, so that caches hold what this call left and not what another one did
    (calls longer than ``LONG`` are not repeated). The calls must have run before. ``parts(name, result)`` may add seconds that a
    result knows about itself. ``clock`` runs a call and says how long it took: by default :func:`on_host`.
    """
    clock = on_host if clock is None else clock
    found: dict[str, list[float]] = {name: [] for name in calls}
    names, turn, turns, collecting = list(calls), 0, repeats, gc.isenabled()
    begun = time.perf_counter()

    def unsettled() -> bool:
        return turn < PATIENCE * turns and time.perf_counter() - begun < MOST_SECONDS and not settled(found)

    gc.disable()
    try:
        while turn < turns or unsettled():
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if not found[name] or found[name][-1] < LONG:
                    calls[name]()
                result, seconds = clock(calls[name])
                found[name].append(seconds)
                for part, share in parts(name, result).items():
                    found.setdefault(part, []).append(share)
                del result
            turn += 1
            if turn == 1:
                once = sum(found[name][0] for name in names)
                turns = max(repeats, min(MOST_SAMPLES, math.ceil(least_seconds / once)))
                if turns * once > MOST_SECONDS:
                    turns = min(turns, max(FEWEST_SAMPLES, int(MOST_SECONDS / once)))
    finally:
        if collecting:
            gc.enable()
    return found


def on_host(call: Callable[[], Any]) -> tuple[Any, float]:
    """``(result, seconds)`` by the host's clock."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def on_cuda(call: Callable[[], Any]) -> tuple[Any, float]:
    """``(result, seconds)`` between two CUDA events around what the call launched; launching itself is not hidden by a queue."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = call()
    stop.record()
    stop.synchronize()
    return result, start.elapsed_time(stop) / 1e3


CLOCKS = {"cpu": on_host, "cuda": on_cuda}


def median_ms(samples: list[float] | None) -> float | None:
    return 1e3 * statistics.median(samples) if samples else None


def spread(samples: list[float]) -> float | None:
    """Interquartile range over the median: how restless the machine was. None for fewer than 3 samples."""
    if len(samples) < 3:
        return None
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


def peak_growth(call: Callable[[], Any], device: str = "cpu") -> tuple[Any, float | None, float | None]:
    """``(result, growth, peak)`` in MB: how far resident memory rose during ``call``, and how high. None where it cannot tell.

    On a GPU it is the memory that PyTorch allocated there.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e6
        return result, peak - before, peak
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROC / "clear_refs").write_text("5")
        before = _memory("VmRSS")
    except (AttributeError, OSError):  # no glibc, no /proc, or no right to write there
        return call(), None, None
    result = call()
    peak = _memory("VmHWM")
    return result, peak - before, peak


def _memory(field: str) -> float:
    """A field of /proc/self/status in MB."""
    lines = (PROC / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e6


def last_level_cache() -> int:
    """Bytes of the largest cache, 0 where the system does not tell."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=0)


def read_bandwidth(size: int | None = None, repeats: int = 3, device: str = "cpu") -> tuple[float, str]:
    """``(GB/s, how)``: the fastest plain read of ``size`` bytes by torch on its threads; by default twice the largest cache.

    The readers are an int64 sum, an fp32 sum and an fp32 dot product of two halves; the best time of each counts.
    """
    if size is None:
        size = 1 << 31 if device == "cuda" else max(2 * last_level_cache(), 1 << 28)
    words = native.on_large_pages(torch.empty(size // 4, dtype=torch.float32, device=device)).fill_(1.0)
    left, right = words.chunk(2) if len(words) % 2 == 0 else words[:-1].chunk(2)
    whole = words[: len(words) // 2 * 2].view(torch.int64)
    readers = {"int64 sum": whole.sum, "fp32 sum": words.sum, "fp32 dot": lambda: torch.dot(left, right)}
    for read in readers.values():
        read()
    best = {name: min(seconds) for name, seconds in interleave(readers, repeats, clock=CLOCKS[device]).items()}
    name = min(best, key=best.get)
    return words.nbytes / best[name] / 1e9, f"{name} over {words.nbytes / 1e6:.0f} MB"
