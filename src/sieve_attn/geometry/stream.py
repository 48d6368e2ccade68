"""A geometry that grows with its cache in place: buffers double, so that appending costs O(new keys)."""

from __future__ import annotations

from typing import Any

from sieve_attn import arrays
from sieve_attn import native as kernels
from sieve_attn.geometry import native
from sieve_attn.geometry.build import build
from sieve_attn.geometry.edit import head, map_arrays, reorder, sealed_blocks, tail
from sieve_attn.types import Geometry, Statistics

Array = Any


class Stream:
    """Streaming geometry of one layer's key cache.

    ``update`` after every change of the cache (append or crop), ``reorder`` and ``reset`` with it; ``geometry`` is the
    current view. Views share the buffers: use them before the next ``update``.
    """

    def __init__(self, block_size: int, statistics: Statistics):
        self.block_size = block_size
        self.statistics = statistics
        self.reset()

    def reset(self) -> None:
        self.geometry: Geometry | None = None
        self._buffers: Geometry | None = None
        self._settled: int | None = None  # from this many keys on sealed blocks stay: their channel scale is fixed

    def update(
        self, key: Array, *, value: Array | None = None, key_mask: Array | None = None, unchanged: int | None = None
    ) -> Geometry:
        """Follow the cache to ``key`` [batch, kv_heads, kv_len, dim], of which the first ``unchanged`` keys are as before."""
        kv_len = int(key.shape[2])
        known = 0 if self.geometry is None else self.geometry.kv_len
        same = min(known if unchanged is None else unchanged, known, kv_len)
        if self.geometry is not None and same == kv_len == known:
            return self.geometry
        sealed = self._sealed(same)
        if sealed == 0:
            self._replace(build(key, self.block_size, self.statistics, value=value, key_mask=key_mask))
            return self.geometry
        blocks = -(-kv_len // self.block_size)
        if sealed * self.block_size < kv_len:
            self._reserve(blocks)
            if native.extends(self._buffers, key):
                start = sealed * self.block_size
                native.extend(self._buffers, key[:, :, start:], sealed, None if key_mask is None else key_mask[:, start:])
            else:
                self._write(tail(self.geometry, sealed, key, value, key_mask), sealed)
        self.geometry = map_arrays(self._buffers, head, blocks, kv_len, kv_len)
        return self.geometry

    def reorder(self, index: Array) -> None:
        """Follow a cache whose batch was permuted, repeated or cut: sequence ``i`` is now the former ``index[i]``."""
        if self.geometry is not None:
            self._replace(reorder(self.geometry, index))

    def _replace(self, geometry: Geometry) -> None:
        self.geometry = self._buffers = geometry
        self._settled = None

    def _sealed(self, length: int) -> int:
        """How many blocks of the first ``length`` keys stay as they are."""
        if self.geometry is None:
            return 0
        if self._settled is None or length < self._settled:
            if sealed_blocks(self.geometry, length) == 0:
                return 0
            self._settled = length
        return length // self.block_size

    def _reserve(self, blocks: int) -> None:
        if self._buffers.blocks >= blocks and self._buffers.kv_len >= blocks * self.block_size:
            return
        xp = arrays.namespace(self.geometry.count)
        capacity = 2 * blocks

        def grow(x, axis, length):
            bigger = kernels.on_large_pages(xp.allocate_like(x, axis, length))
            bigger[(slice(None),) * axis + (slice(0, x.shape[axis]),)] = x
            return bigger

        keys = capacity * self.block_size
        self._buffers = map_arrays(self.geometry, grow, capacity, keys, keys)

    def _write(self, rest: Geometry, sealed: int) -> None:
        """Put ``rest`` behind the first ``sealed`` blocks of the buffers."""
        sources, targets = [], []
        map_arrays(rest, lambda x, axis, start: sources.append((x, axis, start)), sealed, sealed * self.block_size, 0)
        map_arrays(self._buffers, lambda x, axis, start: targets.append(x), 0, 0, 0)
        for target, (source, axis, start) in zip(targets, sources, strict=True):
            target[(slice(None),) * axis + (slice(start, start + source.shape[axis]),)] = source
