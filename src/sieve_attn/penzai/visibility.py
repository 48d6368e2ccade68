"""What a query may see: Penzai's mask layers and side inputs as arguments of ``sieve_attn.jax.attention``.

Penzai masks by token positions, Sieve by place in the sequence, which is what block-sparse attention can skip by. Where
positions rise from token to token (-1 is padding) the two agree; that is checked in O(len) on the arrays, at once where they
are concrete and in the program where they are traced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from sieve_attn.checks import error
from sieve_attn.penzai.named import Layout
from sieve_attn.penzai.reading import CausalMask, ExplicitMask
from sieve_attn.types import Geometry


@dataclass(frozen=True)
class Visibility:
    """Arguments of an attention call. What ``fallback`` makes takes their place where the traced ``holds`` is False; rows are
    NaN where the traced ``valid`` is False."""

    arguments: dict[str, Any] = field(default_factory=dict)
    holds: jax.Array | None = None
    fallback: Callable[[], dict[str, Any]] | None = None
    valid: jax.Array | None = None


def concrete(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def see(
    masks: tuple[CausalMask | ExplicitMask, ...],
    layout: Layout,
    side_inputs: dict[Any, Any],
    q_len: int,
    kv_len: int,
    mask: Any = None,
) -> Visibility:
    """What the masks of an uncached layer, and ``mask`` besides, let queries see. Raises ValueError for missing side inputs."""
    explicit = [("mask", mask)] if mask is not None else []
    positions = []
    for one in masks:
        if isinstance(one, ExplicitMask):
            explicit.append((f"side input {one.input_name!r}", _side_input(side_inputs, one.input_name)))
        else:
            query = layout.positions(one.query_positions, _side_input(side_inputs, one.query_positions), q_len)
            key = layout.positions(one.kv_positions, _side_input(side_inputs, one.kv_positions), kv_len)
            positions.append((one.window, query, key))
    parts = [layout.mask(name, array, q_len, kv_len) for name, array in explicit]
    dense = None
    for part in parts:
        dense = part if dense is None else dense & part
    return positional(positions, layout.batch_size, q_len, kv_len, dense)


def positional(
    positions: list[tuple[int | None, jax.Array, jax.Array]], batch: int, q_len: int, kv_len: int, dense: jax.Array | None
) -> Visibility:
    """Causal order from ``(window, query positions [batch | 1, q_len], key positions [batch | 1, kv_len])`` and a dense mask.

    Query ``i`` must sit at place ``kv_len - q_len + i``. Raises ValueError where concrete positions do not rise.
    """
    if not positions:
        return _unordered(dense, q_len, kv_len)
    valid, real = jnp.asarray(True), jnp.asarray(True)
    straight, window = jnp.asarray(True), None
    for size, query, key in positions:
        there = key >= 0
        before = jax.lax.cummax(jnp.where(there, key, -1), axis=1)
        before = jnp.concatenate([jnp.full_like(before[:, :1], -1), before[:, :-1]], 1)
        own = key[:, jnp.clip(jnp.arange(kv_len - q_len, kv_len), 0)]
        valid &= jnp.where(there, key > before, True).all() & ((query == own) | (query < 0)).all()
        real = real & there
        if size is not None:
            # with the same shift everywhere, so many positions back is so many places back
            shift, far = key - jnp.arange(kv_len), jnp.iinfo(key.dtype).max
            straight &= (jnp.where(there, shift, -far).max(1) <= jnp.where(there, shift, far).min(1)).all()
            window = size if window is None else min(size, window)
    arguments: dict[str, Any] = {"causal": True}
    if not concrete(real) or not bool(real.all()):
        arguments["key_mask"] = jnp.broadcast_to(real, (batch, kv_len))
    if dense is not None:
        arguments["mask"] = dense
    if concrete(valid):
        if not bool(valid):
            raise _not_rising()
        valid = None
    if window is None:
        return Visibility(arguments, valid=valid)

    def by_position() -> dict[str, Any]:
        seen = dense
        for size, query, key in positions:
            if size is not None:
                near = (query[:, None, :, None] - key[:, None, None, :]) < size
                seen = near if seen is None else near & seen
        return arguments | {"mask": seen}

    windowed = arguments | {"window": window}
    if concrete(straight):
        return Visibility(windowed if bool(straight) else by_position(), valid=valid)
    return Visibility(windowed, straight, by_position, valid)


def one_query(
    positions: list[tuple[int | None, jax.Array, jax.Array]], batch: int, kv_len: int, end: Any, known: Geometry | None
) -> Visibility:
    """What the query at place ``end`` of a cache of ``kv_len`` places sees; ``known`` summarises the tokens before and its own.

    Raises ValueError where concrete positions do not rise.
    """
    filled = jnp.arange(kv_len)[None, :] <= end
    arguments: dict[str, Any] = {"kv_length": jnp.asarray(end, jnp.int32) + 1}
    if not positions:
        return Visibility(arguments | {"geometry": known})
    rises, straight = jnp.asarray(True), jnp.asarray(True)
    real, near, window = filled, filled, None
    for size, query, key in positions:
        there = filled & (key >= 0)
        rises = rises & ((key <= query) | ~there | (query < 0)).all()
        real = real & there & (key <= query)
        if size is not None:
            # by place and by position the same, where positions rise by one
            close = query - key < size
            near = near & close
            straight = straight & ((close == (end - jnp.arange(kv_len)[None, :] < size)) | ~there | (query < 0)).all()
            window = size if window is None else min(size, window)
    if concrete(rises) and not bool(rises):
        raise _not_rising()
    valid = None if concrete(rises) else rises
    arguments["key_mask"] = jnp.broadcast_to(real, (batch, kv_len))
    if window is None:
        return Visibility(arguments | {"geometry": known}, valid=valid)
    windowed = arguments | {"geometry": known, "window": window}
    # summaries of what is seen, which the ones at hand are not
    by_position = arguments | {"key_mask": jnp.broadcast_to(real & near, (batch, kv_len))}
    if concrete(straight):
        return Visibility(windowed if bool(straight) else by_position, valid=valid)
    return Visibility(windowed, straight, lambda: by_position, valid)


def _not_rising() -> Exception:
    return error(
        "token_positions", "must rise along the sequence, -1 for padding, alike for queries and keys",
        "positions that do not", "sort the tokens by position, or keep pz.nn.Attention for this layer",
    )  # fmt: skip


def _unordered(dense: jax.Array | None, q_len: int, kv_len: int) -> Visibility:
    """A dense mask alone. One that hides everything after the query is a causal one: said so, hidden keys choose nothing."""
    if dense is None:
        return Visibility()
    later = jnp.arange(kv_len)[None, :] > jnp.arange(q_len)[:, None] + (kv_len - q_len)
    causal = ~(dense & later).any()
    plain, ordered = {"mask": dense}, {"mask": dense, "causal": True}
    if concrete(causal):
        return Visibility(ordered if bool(causal) else plain)
    return Visibility(ordered, causal, lambda: plain)


def _side_input(side_inputs: dict[Any, Any], name: str) -> Any:
    if name not in side_inputs:
        raise error(
            f"side input {name!r}", "must be given to a layer whose mask reads it",
            f"side inputs {sorted(map(str, side_inputs))}", "call the whole model, or pass it as a keyword argument",
        )  # fmt: skip
    return side_inputs[name]
