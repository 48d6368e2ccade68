"""A cache layer that keeps the geometry of its keys up to date, so that decoding never reads all keys to choose a few."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from sieve_attn.geometry import Geometry, Stream
from sieve_attn.layers.growing import GrowingArrays
from sieve_attn.policies import Policy


def _own(edit: Callable[..., Any]) -> Callable[..., Any]:
    """An edit that the stream can follow, once what others did to the cache before it is noticed."""

    @wraps(edit)
    def followed(self: StreamedLayer, *args: Any, **kwargs: Any) -> None:
        self._notice()
        edit(self, *args, **kwargs)
        self._unchanged = min(self._unchanged, self.get_seq_length())
        if self.keys is not self._left[0]:
            self._grown = None
        self._leave()

    return followed


class StreamedLayer(DynamicLayer):
    """``DynamicLayer`` with a :class:`~sieve_attn.geometry.Stream`, which follows every change of the cache.

    Sealed blocks are summarised once; appending costs O(new keys). The padding mask is known only where attention is
    computed, so that is where the stream catches up: :meth:`geometry`. Keys and values lie in buffers with room behind them,
    which ``update`` fills in place where no gradient is recorded. ``keys`` and ``values`` that others replaced, or changed in
    place, make the stream start anew; changes in place that PyTorch does not count (in inference mode, through ``.data``) are
    not seen.
    """

    def __init__(self, policy: Policy):
        super().__init__()
        self.stream = Stream(policy.block_size, policy.statistics)
        self._unchanged = 0  # leading keys that are as the stream last saw them
        self._padding: Tensor | None = None
        self._handed_out: tuple | None = None
        self._grown: GrowingArrays | None = None
        self._leave()

    def fits(self, policy: Policy) -> bool:
        return self.stream.block_size == policy.block_size and self.stream.statistics == policy.statistics

    def holds(self, key: Tensor) -> bool:
        """Whether ``key`` is what ``update`` returned: some models change the keys after they were cached."""
        return self._handed_out == _identity(key)

    def geometry(self, key: Tensor, value: Tensor, padding: Tensor | None) -> Geometry:
        """The geometry of ``key`` [batch, kv_heads, kv_len, dim]; ``padding`` [batch, kv_len] is True for real tokens."""
        if not self._same_padding(padding) or self._frozen():
            self.stream.reset()
        known = self.stream.update(key, value=value, key_mask=padding, unchanged=self._unchanged)
        self._unchanged, self._padding = int(key.shape[2]), padding
        return known

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._notice()
        if torch.is_grad_enabled() or key_states.shape[:2] != value_states.shape[:2]:
            self.keys, self.values = super().update(key_states, value_states, *args, **kwargs)
            self._grown = None
        else:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self._grown = self._room(key_states, value_states).append((key_states, value_states), recorded=False)
            self.keys, self.values = self._grown.arrays
        self._handed_out = _identity(self.keys)
        self._leave()
        return self.keys, self.values

    def _room(self, key: Tensor, value: Tensor) -> GrowingArrays:
        """What the cache holds, ready to grow."""
        if self.get_seq_length() == 0:
            widths = (key.shape[3], value.shape[3])
            return GrowingArrays.empty(*key.shape[:2], widths, key.device, key.dtype)
        return GrowingArrays.of(self.keys, self.values) if self._grown is None else self._grown

    def _notice(self) -> None:
        """Forget what is known of keys and values that are not as they were left."""
        keys, values, *versions = self._left
        if keys is not self.keys or values is not self.values or versions != [_version(keys), _version(values)]:
            self.stream.reset()
            self._unchanged, self._grown = 0, None

    def _leave(self) -> None:
        self._left = (self.keys, self.values, _version(self.keys), _version(self.values))

    crop = _own(DynamicLayer.crop)
    offload = _own(DynamicLayer.offload)
    prefetch = _own(DynamicLayer.prefetch)

    def reset(self) -> None:
        super().reset()
        self.stream.reset()
        self._unchanged, self._padding, self._handed_out, self._grown = 0, None, None, None
        self._leave()

    @_own
    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._follow(beam_idx)

    @_own
    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = self.keys.shape[0] if self.get_seq_length() else 0
        super().batch_repeat_interleave(repeats)
        if batch:
            self._follow(torch.arange(batch, device=self.keys.device).repeat_interleave(repeats))

    @_own
    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._follow(indices)

    def _follow(self, index: Tensor) -> None:
        if self.stream.geometry is None:
            return
        index = index.to(self.stream.geometry.count.device)
        self.stream.reorder(index)
        if self._padding is not None:
            self._padding = self._padding[index]

    def _same_padding(self, padding: Tensor | None) -> bool:
        """Whether the keys that the stream has summarised are masked as they were then."""
        n = self._unchanged
        if n == 0 or (padding is None and self._padding is None):
            return True
        before, now = (None if p is None else p[:, :n] for p in (self._padding, padding))
        if before is None or now is None:
            return bool((now if before is None else before).all())
        return torch.equal(before, now)

    def _frozen(self) -> bool:
        """Buffers that inference mode made cannot be written outside of it."""
        made = self.stream.geometry
        return made is not None and made.count.is_inference() and not torch.is_inference_mode_enabled()


def adopt(cache: Cache, index: int, policy: Policy) -> Any:
    """The cache's layer ``index``, made streaming if it is a plain one that holds nothing yet; None if there is none."""
    layers = cache.layers
    if cache.layer_class_to_replicate is DynamicLayer:
        layers.extend(DynamicLayer() for _ in range(index + 1 - len(layers)))
    if index >= len(layers):
        return None
    layer = layers[index]
    stale = isinstance(layer, StreamedLayer) and not layer.fits(policy)
    if policy.chooses_blocks and (type(layer) is DynamicLayer or stale) and layer.get_seq_length() == 0:
        layers[index] = StreamedLayer(policy)
    return layers[index]


def fills(layer: Any, key: Tensor) -> bool:
    """Whether ``layer`` is one without empty slots, and ``key`` is all it holds."""
    return type(layer) in (DynamicLayer, StreamedLayer) and layer.get_seq_length() == key.shape[2]


def why_recomputed(layer: Any, policy: Policy, key: Tensor) -> str | None:
    """Why the geometry of ``key`` cannot come from ``layer``; None if it can."""
    if layer is None:
        return "no cache"
    if not isinstance(layer, StreamedLayer):
        if type(layer) is DynamicLayer:
            return "the cache was filled before it met this model"
        return f"a cache layer of type {type(layer).__name__} holds no geometry"
    if not layer.fits(policy):
        return "the cache was filled under another policy"
    return None if layer.holds(key) else "the keys attended to are not those of the cache"


def _identity(key: Tensor) -> tuple:
    # a number, not the tensor: an offloaded cache must not be kept on the device
    return key.data_ptr(), tuple(key.shape)


def _version(x: Tensor | None) -> int:
    """How often ``x`` was written to, as far as that is counted."""
    return 0 if x is None or x.is_inference() else x._version
