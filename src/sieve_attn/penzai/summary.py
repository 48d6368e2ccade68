"""Summaries of cached keys as Penzai state: a :class:`~sieve_attn.types.Geometry` whose arrays have names."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from penzai import pz

from sieve_attn.jax import geometry
from sieve_attn.penzai.named import Layout
from sieve_attn.penzai.reading import AttentionAxes
from sieve_attn.policies import Policy
from sieve_attn.types import Geometry


def named(known: Geometry, leading: dict[str, int]) -> Geometry:
    """Arrays [batch, kv_heads, ...] with the ``leading`` axes by name; what lies behind them is numbered."""

    def one(x: jax.Array) -> pz.nx.NamedArray:
        return pz.nx.wrap(x.reshape(*leading.values(), *x.shape[2:]), *leading, *_numbered(x.ndim - 2))

    return jax.tree.map(one, _planes(known, 0, 2))


def unnamed(held: Geometry, layout: Layout) -> Geometry:
    """The inverse of :func:`named`."""
    leading = {**layout.batch, **layout.common}

    def one(x: pz.nx.NamedArrayBase) -> jax.Array:
        rest = _numbered(len(x.named_shape) - len(leading))
        plain = x.unwrap(*leading, *rest)
        return plain.reshape(layout.batch_size, layout.kv_heads, *plain.shape[len(leading) :])

    return _planes(jax.tree.map(one, held, is_leaf=lambda x: isinstance(x, pz.nx.NamedArrayBase)), 2, 0)


def of_nothing(
    policy: Policy,
    axes: AttentionAxes,
    leading: dict[str, int],
    cache_len: int,
    cache: tuple[pz.nx.NamedArray, pz.nx.NamedArray],
    layerstack_axes: dict[str, int],
) -> Geometry:
    """The summaries of an empty cache of keys and values; ``leading`` are its batch axes and heads."""
    order = {n: size for n, size in leading.items() if n not in axes.common_heads}
    order |= {n: leading[n] for n in axes.common_heads}
    batch = math.prod(size for n, size in order.items() if n not in axes.common_heads)
    heads = math.prod(order[n] for n in axes.common_heads)
    widths = (x.named_shape[n] for x, n in zip(cache, (axes.projection, axes.value_projection), strict=True))
    key, value = (jnp.zeros((batch, heads, cache_len, width), x.dtype) for x, width in zip(cache, widths, strict=True))
    made = geometry(key, policy, value=value, key_mask=jnp.zeros((batch, cache_len), bool))

    def stacked(x: pz.nx.NamedArray) -> pz.nx.NamedArray:
        return x.broadcast_to(named_shape={**layerstack_axes, **x.named_shape}) if layerstack_axes else x

    return jax.tree.map(stacked, named(made, order), is_leaf=lambda x: isinstance(x, pz.nx.NamedArrayBase))


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"summary_{i}" for i in range(count))


def _planes(known: Geometry, at: int, to: int) -> Geometry:
    """Bit planes lead the arrays of a sketch, batch and heads all others."""
    sketch: Any = known.sketch
    if sketch is None:
        return known
    return replace(known, sketch=replace(sketch, planes=jnp.moveaxis(sketch.planes, at, to)))
