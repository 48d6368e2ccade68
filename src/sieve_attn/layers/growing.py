"""Arrays that grow along one axis: amortised appending, old views stay valid, gradients are right."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 64


class _Storage:
    """Buffers that several views share, and how many of their entries are written."""

    __slots__ = ("buffers", "used")

    def __init__(self, buffers: list[Tensor], used: int):
        self.buffers, self.used = buffers, used


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

    def __len__(self) -> int:
        return self.length

    def append(self, new: tuple[Tensor, ...], recorded: bool) -> GrowingArrays:
        """``new`` [batch, heads, entries, width_i]; ``recorded``: whether somebody will differentiate what is made of them."""
        total = self.length + new[0].shape[2]
        if recorded or (torch.is_grad_enabled() and any(x.requires_grad for x in self._storage.buffers)):
            joined = [torch.cat([old, x], 2) for old, x in zip(self.arrays, new, strict=True)]
            return GrowingArrays(_Storage(joined, total), total)
        storage = self._storage
        with torch.no_grad():
            if storage.used != self.length or not all(_writable(b, total) for b in storage.buffers):
                storage = self._copied(total + max(LEAST, total // 4))
            for buffer, x in zip(storage.buffers, new, strict=True):
                buffer[:, :, self.length : total] = x
        storage.used = total
        return GrowingArrays(storage, total)

    def _copied(self, capacity: int) -> _Storage:
        buffers = []
        for old in self.arrays:
            batch, heads, _, width = old.shape
            buffer = old.new_empty(batch, heads, capacity, width)
            buffer[:, :, : self.length] = old
            buffers.append(buffer)
        return _Storage(buffers, self.length)


def _writable(buffer: Tensor, total: int) -> bool:
    """Room is left, autograd holds no reference, and inference mode does not forbid it."""
    fits = buffer.shape[2] >= total and not buffer.requires_grad
    return fits and (torch.is_inference_mode_enabled() or not buffer.is_inference())
