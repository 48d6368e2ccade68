"""Arrays that grow along one axis: amortised appending, old views stay valid, gradients are right."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from sieve_attn import checks, native

LEAST = 64
_CLAIMS = Lock()  # one for all: it is held for two lines, and caches are copied and pickled


class _Storage:
    """Buffers that several views share, and how many of their entries are written or about to be."""

    __slots__ = ("buffers", "inference", "used")

    def __init__(self, buffers: list[Tensor], used: int):
        self.buffers, self.used = buffers, used
        # asked here, since compilers do not answer
        self.inference = not torch.compiler.is_compiling() and any(b.is_inference() for b in buffers)

    def claim(self, length: int, total: int) -> bool:
        """Whether the caller may write the entries from ``length`` to ``total``: of all that ask for them, one may."""
        # the compiler follows no lock: threads may not step through compiled code from one cache
        with nullcontext() if torch.compiler.is_compiling() else _CLAIMS:
            free = self.used == length
            if free:
                self.used = total
        return free


class GrowingArrays:
    """A tuple of arrays [batch, heads, length, width_i] that is never changed: ``append`` returns a longer one.

    Where no gradient is recorded, new entries are written behind the old ones into buffers that grow by a quarter when they
    are full, so that appending costs O(new entries) on average. The first of several appends to one object does that; the
    others copy what they keep (a branch). Where a gradient is recorded, appending concatenates: autograd sees every entry.
    """

    __slots__ = ("_storage", "length")

    def __init__(self, storage: _Storage, length: int):
        self._storage, self.length = storage, length

    @classmethod
    def empty(cls, batch: int, heads: int, widths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> GrowingArrays:
        return cls(_Storage([torch.empty(batch, heads, 0, width, device=device, dtype=dtype) for width in widths], 0), 0)

    @classmethod
    def of(cls, *arrays: Tensor) -> GrowingArrays:
        """From arrays [batch, heads, length, width_i] made elsewhere; they are copied when something is appended."""
        length = arrays[0].shape[2]
        return cls(_Storage(list(arrays), length), length)

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        return tuple(buffer[:, :, : self.length] for buffer in self._storage.buffers)

    @property
    def batch(self) -> int:
        return self._storage.buffers[0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._storage.buffers[0].dtype

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        shapes = ", ".join(str(list(x.shape)) for x in self.arrays)
        return f"{type(self).__name__}({shapes}, dtype={self.dtype}, device={self._storage.buffers[0].device})"

    def append(self, new: tuple[Tensor, ...], recorded: bool = False) -> GrowingArrays:
        """``new`` [batch, heads, entries, width_i]; ``recorded``: whether what is made of them is differentiated all the same if
        neither they nor what is held require gradients."""
        total = self.length + new[0].shape[2]
        if recorded or (torch.is_grad_enabled() and any(x.requires_grad for x in (*self._storage.buffers, *new))):
            joined = [torch.cat([old, x], 2) for old, x in zip(self.arrays, new, strict=True)]
            return GrowingArrays(_Storage(joined, total), total)
        storage = self._storage
        with torch.no_grad():
            if not (all(_writable(storage, b, total) for b in storage.buffers) and storage.claim(self.length, total)):
                storage = self._copied(total + max(LEAST, total // 4))
                storage.claim(self.length, total)
            for buffer, x in zip(storage.buffers, new, strict=True):
                buffer[:, :, self.length : total] = x
        return GrowingArrays(storage, total)

    def _copied(self, capacity: int) -> _Storage:
        buffers = []
        for old in self.arrays:
            batch, heads, _, width = old.shape
            buffer = old.new_empty(batch, heads, capacity, width)
            if not torch.compiler.is_compiling():
                native.on_large_pages(buffer)
            buffer[:, :, : self.length] = old
            buffers.append(buffer)
        return _Storage(buffers, self.length)


def _writable(storage: _Storage, buffer: Tensor, total: int) -> bool:
    """Room is left, autograd holds no reference, and inference mode does not forbid it."""
    fits = buffer.shape[2] >= total and not buffer.requires_grad
    if torch.compiler.is_compiling():  # whether inference mode is on is not to be known there
        return fits and not storage.inference
    return fits and (torch.is_inference_mode_enabled() or not buffer.is_inference())


def step(
    cache: GrowingArrays, query: Tensor, new: tuple[Tensor, Tensor], attend: Callable[..., Any]
) -> tuple[Any, GrowingArrays]:
    """``(attend(query, keys, values), the longer cache)``, in the cache's dtype: the query is cast and not all that is cached."""
    # a query that is differentiated keeps the keys for its gradient: they may not be written to later
    cache = cache.append(tuple(x.to(cache.dtype) for x in new), torch.is_grad_enabled() and query.requires_grad)
    if query.dtype == cache.dtype:
        return attend(query, *cache.arrays), cache
    with torch.autocast(query.device.type, enabled=False):
        return attend(query.to(cache.dtype), *cache.arrays), cache


def check_cache(cache: Any, heads: int, widths: tuple[int, ...], device: torch.device) -> None:
    """Whether ``cache`` is one that a layer of these sizes makes. Raises ValueError."""
    if not isinstance(cache, GrowingArrays):
        raise checks.error("cache", "must come from this layer", type(cache).__name__, "start with empty_cache(batch_size)")
    wanted = tuple((heads, width) for width in widths)
    held = tuple((x.shape[1], x.shape[3]) for x in cache.arrays)
    if held != wanted:
        raise checks.error(
            "cache", f"must hold keys and values of (heads, width) {wanted}", held, "use the cache that this layer made"
        )
    if cache.arrays[0].device != device:
        raise checks.error(
            "cache", f"must be on {device}, where the layer is", cache.arrays[0].device, "pass `device` to empty_cache"
        )
