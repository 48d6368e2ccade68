"""Named arrays to [batch, heads, len, dim] and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from penzai import pz

from sieve_attn.checks import error
from sieve_attn.penzai.reading import AttentionAxes


@dataclass(frozen=True)
class Layout:
    """How the named axes of one call lie in plain arrays: sizes by name, in order."""

    axes: AttentionAxes
    batch: dict[str, int]
    common: dict[str, int]
    own: dict[str, int]

    @property
    def batch_size(self) -> int:
        return math.prod(self.batch.values())

    @property
    def kv_heads(self) -> int:
        return math.prod(self.common.values())

    @property
    def q_heads(self) -> int:
        return self.kv_heads * math.prod(self.own.values())

    def name_heads(self, x: jax.Array, *rest: str) -> pz.nx.NamedArray:
        """[batch, heads, ...rest] with names; heads of a group that share an entry have the common axes alone."""
        heads = self.common if x.shape[1] == self.kv_heads else {**self.common, **self.own}
        sizes = {**self.batch, **heads}
        return pz.nx.wrap(x.reshape(*sizes.values(), *x.shape[2:]), *sizes, *rest)

    def positions(self, name: str, array: Any, length: int) -> jax.Array:
        """[batch | 1, length] integers from a side input along the sequence."""
        sequence = self.axes.sequence
        x = _named(f"side input {name!r}", array, {*self.batch, sequence}, {sequence})
        if x.named_shape[sequence] != length:
            raise error(
                f"side input {name!r}", f"must have length {length} along {sequence!r}", x.named_shape[sequence],
                "give one position a token",
            )  # fmt: skip
        return self._spread(x, self.batch, (sequence,))

    def mask(self, name: str, array: Any, q_len: int, kv_len: int) -> jax.Array:
        """[batch | 1, q_heads | 1, q_len, kv_len] booleans from an array over any of the axes of the logits."""
        axes = self.axes
        ends = {axes.sequence: q_len, axes.kv_sequence: kv_len}
        x = _named(name, array, {*self.batch, *self.common, *self.own, *ends}, set())
        known = {**self.batch, **self.common, **self.own, **ends}
        wrong = {n: size for n, size in x.named_shape.items() if size != known[n]}
        if wrong:
            raise error(name, f"must have axes of the sizes {known}", wrong, "build it for this input")
        x = x.broadcast_to(named_shape={**x.named_shape, **ends}) if {*ends} - {*x.named_shape} else x
        heads = {**self.common, **self.own}
        x = x.broadcast_to(named_shape={**x.named_shape, **heads}) if {*heads} & {*x.named_shape} else x
        flat = self._spread(x, self.batch, (*(n for n in heads if n in x.named_shape), *ends))
        return flat.reshape(flat.shape[0], -1, q_len, kv_len) != 0

    @staticmethod
    def _spread(x: pz.nx.NamedArrayBase, batch: dict[str, int], rest: tuple[str, ...]) -> jax.Array:
        """Plain array with one leading batch axis, of length 1 where no batch axis is named."""
        if not {*batch} & {*x.named_shape}:
            return x.unwrap(*rest)[None]
        x = x.broadcast_to(named_shape={**x.named_shape, **batch})
        plain = x.unwrap(*batch, *rest)
        return plain.reshape(-1, *plain.shape[len(batch) :])


def pack(
    axes: AttentionAxes, query: pz.nx.NamedArrayBase, key: pz.nx.NamedArrayBase, value: pz.nx.NamedArrayBase
) -> tuple[Layout, jax.Array, jax.Array, jax.Array]:
    """The layout, query [batch, q_heads, q_len, dim], key and value [batch, kv_heads, kv_len, dim | v_dim].

    Raises ValueError for positional axes, missing axes, and axes that one of the three has and another lacks.
    """
    need = {*axes.common_heads, axes.sequence}
    query = _named("query", query, None, need | {*axes.query_heads, axes.projection})
    key = _named("key", key, None, need | {axes.projection})
    value = _named("value", value, None, need | {axes.value_projection})
    local = {axes.sequence, axes.projection, axes.value_projection, *axes.heads}
    batch = {n: size for n, size in query.named_shape.items() if n not in local}
    for name, x in (("key", key), ("value", value)):
        other = {n: size for n, size in x.named_shape.items() if n not in local}
        unknown = {n for n in x.named_shape if n in axes.query_heads}
        if other != batch or unknown:
            raise error(
                name, f"must have the batch axes of `query`, {batch}, and none of its own heads",
                other | {n: x.named_shape[n] for n in unknown},
                f"axes beside {sorted(local)} are batch axes: rename or broadcast them",
            )  # fmt: skip
    common = {n: key.named_shape[n] for n in axes.common_heads}
    own = {n: query.named_shape[n] for n in axes.query_heads}
    sizes = {n: (query.named_shape[n], key.named_shape[n], value.named_shape[n]) for n in axes.common_heads}
    sizes |= {axes.projection: (query.named_shape[axes.projection], key.named_shape[axes.projection])}
    sizes |= {f"{axes.sequence} of key and value": (key.named_shape[axes.sequence], value.named_shape[axes.sequence])}
    unlike = {n: found for n, found in sizes.items() if len(set(found)) > 1}
    if unlike:
        raise error("query, key, value", "must agree on the sizes of the axes that they share", unlike, "check the projections")
    layout = Layout(axes, batch, common, own)
    dtype = jnp.result_type(query.dtype, key.dtype, value.dtype)
    orders = (
        (query, (*batch, *common, *own), (axes.sequence, axes.projection), layout.q_heads),
        (key, (*batch, *common), (axes.sequence, axes.projection), layout.kv_heads),
        (value, (*batch, *common), (axes.sequence, axes.value_projection), layout.kv_heads),
    )
    plain = []
    for x, front, back, heads in orders:
        sizes = x.named_shape
        shape = (layout.batch_size, heads, *(sizes[n] for n in back))
        plain.append(x.unwrap(*front, *back).reshape(shape).astype(dtype))
    return layout, *plain


def _named(name: str, x: Any, allowed: set[str] | None, needed: set[str]) -> pz.nx.NamedArrayBase:
    if not isinstance(x, pz.nx.NamedArrayBase):
        raise error(
            name, "must be a NamedArray", type(x).__name__, f"wrap it: pz.nx.wrap(x, {', '.join(map(repr, sorted(needed)))})"
        )
    if x.positional_shape:
        raise error(name, "must have named axes only", f"positional axes of shape {x.positional_shape}", "tag them with names")
    missing = needed - {*x.named_shape}
    if missing:
        raise error(
            name, f"must have the named axes {sorted(needed)}", f"{dict(x.named_shape)}", f"{sorted(missing)} missing: tag them"
        )
    unknown = set() if allowed is None else {*x.named_shape} - allowed
    if unknown:
        raise error(
            name, f"may have the named axes {sorted(allowed)}", f"unknown axes {sorted(unknown)}", "rename or slice them away"
        )
    return x
