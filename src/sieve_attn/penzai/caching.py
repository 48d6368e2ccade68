"""Token by token: the layer with a cache, and the conversion of a whole model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from penzai import pz
from penzai.models.transformer.model_parts import TransformerLM
from penzai.models.transformer.sampling_mode import KVCachingTransformerLM

from sieve_attn.checks import error, positive_int
from sieve_attn.jax import append
from sieve_attn.penzai import summary
from sieve_attn.penzai.layer import GeometricSparseAttention, static_field
from sieve_attn.penzai.named import Layout, pack
from sieve_attn.penzai.reading import CausalMask
from sieve_attn.penzai.visibility import concrete, one_query, positional
from sieve_attn.types import Geometry

UNCACHED, CACHED = "token_positions", "kv_token_positions"


@pz.pytree_dataclass(has_implicitly_inherited_fields=True)
class KVCachingGeometricSparseAttention(GeometricSparseAttention):
    """:class:`GeometricSparseAttention` that keeps keys and values of the tokens before, as ``pz.nn.KVCachingAttention`` does.

    One query chooses among all that is cached, from summaries that grow with the cache: a step summarises the blocks that its
    tokens lie in, no others. Several queries are a prefill and choose what one prefill of everything would: blocks and tiles lie
    at places of the cache, wherever the call starts.

    Attributes:
      sequence_axis: The axis along which keys and values are cached.
      kv_cache_end_index_key: The side input that says how much of the cache is filled.
      kv_cache: A variable with the keys and the values.
      kv_geometry: A variable with the summaries of the cached keys that the policy selects by; None where it selects no blocks.
    """

    sequence_axis: str = static_field("seq")
    kv_cache_end_index_key: Hashable = static_field("cache_end_index")
    kv_cache: pz.StateVariable | None = None
    kv_geometry: pz.StateVariable | None = None

    @classmethod
    def from_uncached(
        cls,
        original: GeometricSparseAttention,
        cache_len: int,
        cached_axes: dict[str, int],
        cache_dtype: Any,
        cache_label: str,
        layerstack_axes: dict[str, int],
    ) -> KVCachingGeometricSparseAttention:
        """The caching form of ``original``; ``cached_axes`` are the other axes of keys and values, with their sizes."""
        axes = original.named_axes()
        masks = tuple(_follow_cache(mask) for mask in original.masks)
        width = cached_axes[axes.projection]
        rest = {n: size for n, size in cached_axes.items() if n != axes.projection}
        empty = tuple(
            pz.nx.zeros({**layerstack_axes, **rest, axes.sequence: cache_len, feature: width}, dtype=cache_dtype)
            for feature in (axes.projection, axes.value_projection)
        )
        metadata = {}
        if layerstack_axes:
            behavior = pz.nn.LayerStackVarBehavior.PER_LAYER
            metadata = {"layerstack_axes": dict.fromkeys(layerstack_axes, behavior)}
        fields = {f.name: getattr(original, f.name) for f in dataclasses.fields(original)} | {"masks": masks}
        cache = pz.StateVariable(value=empty, label=cache_label, metadata=metadata)
        summaries = None
        if original.chosen_policy().chooses_blocks:
            made = summary.of_nothing(original.chosen_policy(), axes, rest, cache_len, empty, layerstack_axes)
            summaries = pz.StateVariable(value=made, label=f"{cache_label}/geometry", metadata=metadata)
        return cls(**fields, sequence_axis=axes.sequence, kv_cache=cache, kv_geometry=summaries)

    def __call__(self, x: pz.nx.NamedArrayBase, **side_inputs: Any) -> pz.nx.NamedArray:
        """Runs the layer on the tokens ``x`` that come after those in the cache, and adds them to it."""
        if self.kv_cache_end_index_key not in side_inputs:
            raise error(
                f"side input {self.kv_cache_end_index_key!r}", "must say how much of the cache is filled",
                f"side inputs {sorted(map(str, side_inputs))}", "call the model that sieve_attn.penzai.kv_caching made",
            )  # fmt: skip
        end = side_inputs[self.kv_cache_end_index_key]
        query, *new = self._project(x, side_inputs)
        axis = self.sequence_axis
        cached = tuple(
            pz.nx.nmap(jax.lax.dynamic_update_slice)(old.untag(axis), made.untag(axis), (end,)).tag(axis)
            for old, made in zip(self.kv_cache.value, new, strict=True)
        )
        self.kv_cache.value = cached
        layout, q, k, v = pack(self.named_axes(), query, *cached)
        positions = [
            (
                mask.window,
                layout.positions(mask.query_positions, side_inputs[mask.query_positions], q.shape[2]),
                layout.positions(mask.kv_positions, side_inputs[mask.kv_positions], k.shape[2]),
            )
            for mask in self.masks
        ]
        known = self._grown(layout, k, v, positions, end, q.shape[2])
        return self._finish(self._attend_cached(layout, q, k, v, positions, end, known), side_inputs)

    def _grown(self, layout: Layout, k: jax.Array, v: jax.Array, positions: list, end: Any, new: int) -> Geometry | None:
        """The summaries of the cache with the ``new`` tokens in it, which are kept for the next call."""
        if self.kv_geometry is None:
            return None
        real = jnp.ones((layout.batch_size, k.shape[2]), bool)
        for _, _, key in positions:
            real = real & (key >= 0)
        before = summary.unnamed(self.kv_geometry.value, layout)
        grown = append(before, k, end, new, value=v, key_mask=real)
        self.kv_geometry.value = summary.named(grown, layout.batch | layout.common)
        return grown

    def _attend_cached(
        self, layout: Layout, q: jax.Array, k: jax.Array, v: jax.Array, positions: list, end: Any, known: Geometry | None
    ) -> pz.nx.NamedArray:
        q_len, kv_len = q.shape[2], k.shape[2]
        if q_len == 1:
            # shapes stay as they are from step to step
            return self._attend(layout, q, k, v, one_query(positions, layout.batch_size, kv_len, end, known))
        if concrete(end):
            stop = int(end) + q_len
            positions = [(window, query, key[:, :stop]) for window, query, key in positions]
            sight = positional(positions, layout.batch_size, q_len, stop, None)
            return self._attend(layout, q, k[:, :, :stop], v[:, :, :stop], sight)
        return self._attend_somewhere(layout, q, k, v, positions, end)

    def _attend_somewhere(
        self, layout: Layout, q: jax.Array, k: jax.Array, v: jax.Array, positions: list, end: jax.Array
    ) -> pz.nx.NamedArray:
        """A prefill that starts at a traced place, through arrays of one shape.

        Attention puts the last query at the last key. So the cache is turned until its filled part ends there, by a multiple of
        what blocks and tiles are aligned to; the rest is made up by rows before and after the queries that see nothing.
        """
        policy = self.chosen_policy()
        grid = math.lcm(policy.block_size, policy.query_tile)
        q_len, kv_len = q.shape[2], k.shape[2]
        turn = (kv_len - end - q_len) // grid * grid
        rows = q_len + grid - 1
        first = rows - q_len - (kv_len - end - q_len - turn)  # the row of the first query

        def place(x: jax.Array, axis: int, fill: Any) -> jax.Array:
            shape = (*x.shape[:axis], rows, *x.shape[axis + 1 :])
            return jax.lax.dynamic_update_slice_in_dim(jnp.full(shape, fill, x.dtype), x, first, axis)

        slot = jnp.arange(kv_len)
        filled = (slot < end + q_len)[None]
        turned = [
            (window, place(query, 1, -1), jnp.roll(jnp.where(filled, key, -1), turn, 1)) for window, query, key in positions
        ]
        plain = positional(turned, layout.batch_size, rows, kv_len, None)
        padding = place(jnp.zeros((1, 1, q_len, 1), q.dtype), 2, -jnp.inf)
        other = plain.fallback
        sight = dataclasses.replace(
            plain,
            arguments=plain.arguments | {"bias": padding},
            fallback=None if other is None else lambda: other() | {"bias": padding},
        )
        attended = self._attend(layout, place(q, 2, 0), jnp.roll(k, turn, 2), jnp.roll(v, turn, 2), sight)
        sequence = layout.axes.sequence
        cut = pz.nx.nmap(lambda x: jax.lax.dynamic_slice_in_dim(x, first, q_len))
        return cut(attended.untag(sequence)).tag(sequence)


def kv_caching(
    model: TransformerLM, cache_len: int, batch_axes: dict[str, int], pad_id: int = 0, variable_name_prefix: str = "sampler"
) -> KVCachingTransformerLM:
    """``KVCachingTransformerLM.from_uncached`` for models that hold :class:`GeometricSparseAttention` layers.

    Penzai's own conversion rebuilds plain ``pz.nn.Attention`` layers from their five sublayers and leaves others without a
    cache. This one converts both kinds and keeps the policy of ours. The arguments are those of
    ``KVCachingTransformerLM.from_uncached``. Raises ValueError for masks that cannot follow a cache.
    """
    if not isinstance(model, TransformerLM):
        raise error("model", "must be a TransformerLM", type(model).__name__, "convert the model before other changes", TypeError)
    positive_int("cache_len", cache_len, "the longest sequence to sample")
    known = {**batch_axes, **model.metadata.common_head_axes, "projection": model.metadata.projection_dim}
    caching = KVCachingTransformerLM.from_uncached(model, cache_len, batch_axes, pad_id, variable_name_prefix)
    layers = pz.select(caching.body).at_instances_of(GeometricSparseAttention)
    made = {}
    for number, (path, layer) in enumerate(layers.selected_by_path.items()):
        made[path] = KVCachingGeometricSparseAttention.from_uncached(
            layer,
            cache_len,
            known,
            model.metadata.activation_dtype,
            f"{variable_name_prefix}/sparse_cache_{number}",
            pz.nn.layerstack_axes_from_keypath(path),
        )
    return dataclasses.replace(caching, body=layers.set_by_path(made))


def _follow_cache(mask: Any) -> CausalMask:
    if not isinstance(mask, CausalMask):
        raise error(
            "masks",
            "must go by token positions to follow a cache",
            repr(mask),
            "apply the layers without it, or keep pz.nn.Attention",
        )
    if mask.kv_positions != UNCACHED:
        raise error(
            "masks", f"must read key positions from {UNCACHED!r}, which the cache replaces by {CACHED!r}",
            repr(mask.kv_positions), "rename the side input",
        )  # fmt: skip
    return dataclasses.replace(mask, kv_positions=CACHED)
