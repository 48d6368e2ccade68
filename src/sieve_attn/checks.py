"""Every user-facing error: the argument, the rule, the value received, the remedy."""

from __future__ import annotations

import math
from typing import Any

from sieve_attn import arrays

Array = Any


def error(argument: str, rule: str, value: Any, remedy: str, kind: type[Exception] = ValueError) -> Exception:
    """The one form in which Sieve says no."""
    return kind(f"`{argument}` {rule}; got {value}; {remedy}")


def positive_int(argument: str, value: Any, remedy: str, *, least: int = 1) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise error(argument, f"must be an integer of at least {least}", repr(value), remedy)
    try:
        number = int(value.__index__())
    except TypeError:
        # an array that is being traced has the method and no number
        rule = f"must be an integer of at least {least}, known when the call is traced"
        raise error(argument, rule, type(value).__name__, remedy) from None
    if number < least:
        raise error(argument, f"must be an integer of at least {least}", repr(value), remedy)
    return number


def share(argument: str, value: Any, remedy: str, *, open_right: bool = False) -> float:
    """A number in [0, 1], or in [0, 1) with ``open_right``."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (good and value >= 0 and (value < 1 if open_right else value <= 1)):
        raise error(argument, f"must lie in [0, 1{')' if open_right else ']'}", repr(value), remedy)
    return float(value)


def threshold(argument: str, value: Any) -> float:
    """A real number; infinities are thresholds too, NaN is not."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value):
        raise error(argument, "must be a number and not NaN", repr(value), "use float('-inf') to keep everything")
    return float(value)


def shape_of(x: Array) -> tuple[int, ...]:
    return tuple(int(n) for n in x.shape)


def qkv(query: Array, key: Array, value: Array, *, xp: Any) -> None:
    """Ranks, dtypes, batch, heads and lengths of the three arrays, before any work."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if len(x.shape) != 4:
            raise error(
                name,
                "must have 4 axes [batch, heads, len, head_dim]",
                f"shape {shape_of(x)}",
                "add the missing axes with reshape or unsqueeze",
            )
        if not xp.is_float(x):
            raise error(name, "must be of a floating dtype (fp16, bf16, fp32, fp64)", f"dtype {x.dtype}", "cast it first")
    if not query.dtype == key.dtype == value.dtype:
        raise error(
            "query, key, value",
            "must share one dtype",
            f"{query.dtype}, {key.dtype}, {value.dtype}",
            "cast them to one dtype, or run under autocast",
        )
    for name, x in (("query", query), ("key", key), ("value", value)):
        if 0 in shape_of(x):
            raise error(
                name,
                "must have at least one sequence, head, position and channel",
                f"shape {shape_of(x)}",
                "skip the call for empty sequences",
            )
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise error(
            "query, key, value",
            "must share the batch axis",
            f"{query.shape[0]}, {key.shape[0]}, {value.shape[0]}",
            "repeat or slice the smaller one",
        )
    if query.shape[3] != key.shape[3]:
        raise error(
            "key",
            "must have the head_dim of `query`",
            f"{key.shape[3]} against {query.shape[3]}",
            "only `value` may have another head_dim",
        )
    if key.shape[1] != value.shape[1]:
        raise error(
            "value", "must have the heads of `key`", f"{value.shape[1]} against {key.shape[1]}", "pass the same KV heads for both"
        )
    if key.shape[2] != value.shape[2]:
        raise error(
            "value", "must have the length of `key`", f"{value.shape[2]} against {key.shape[2]}", "pass one value for every key"
        )
    if query.shape[1] % key.shape[1]:
        raise error(
            "query",
            "must have a multiple of the KV heads of `key`",
            f"{query.shape[1]} query heads on {key.shape[1]} KV heads",
            "for grouped queries use q_heads = n * kv_heads",
        )
    one_device(query, key=key, value=value)


def one_device(query: Array, **others: Array | None) -> None:
    """Kernels are given addresses: what lies on another device would be read as memory of this one."""
    xp = arrays.namespace(query)
    if xp.name != "torch":
        return
    for name, x in others.items():
        if x is not None and arrays.namespace(x) is xp and x.device != query.device:
            raise error(name, f"must be on the device of `query`, {query.device}", f"{x.device}", "move it there with `.to(...)`")


def attention_options(
    query: Array,
    key: Array,
    *,
    scale: Any,
    mask: Any,
    key_mask: Any,
    bias: Any,
    softcap: Any,
    cu_seqlens: Any,
    sink: Any,
    window: Any,
    dropout: Any,
    xp: Any,
) -> None:
    """The keyword arguments of ``attention`` and ``attend``."""
    batch, q_heads, q_len, _ = shape_of(query)
    kv_len = int(key.shape[2])
    if dropout:
        raise error(
            "dropout", "must be 0: a certificate has no meaning under dropout", repr(dropout), "drop it, or call model.eval()"
        )
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
        raise error("scale", "must be a positive finite number", repr(scale), "fold a sign into the query")
    if softcap is not None and not (isinstance(softcap, (int, float)) and math.isfinite(softcap) and softcap > 0):
        raise error("softcap", "must be a positive finite number or None", repr(softcap), "pass None for no cap")
    if mask is not None:
        allowed = [(batch, 1), (q_heads, 1), (q_len,), (kv_len,)]
        if mask.dtype != xp.boolean:
            raise error(
                "mask", "must be boolean, True where a query may attend", f"dtype {mask.dtype}", "pass additive masks as `bias`"
            )
        if len(mask.shape) != 4 or any(n not in ok for n, ok in zip(shape_of(mask), allowed, strict=True)):
            raise error(
                "mask",
                f"must have shape [{batch} or 1, {q_heads} or 1, {q_len}, {kv_len}]",
                f"shape {shape_of(mask)}",
                "use `key_mask` for padding and `causal` or `window` for order",
            )
    if key_mask is not None and (key_mask.dtype != xp.boolean or shape_of(key_mask) != (batch, kv_len)):
        raise error(
            "key_mask",
            f"must be boolean of shape [{batch}, {kv_len}], True for real keys",
            f"{key_mask.dtype} of shape {shape_of(key_mask)}",
            "build it from the sequence lengths",
        )
    if bias is not None:
        allowed = [(batch, 1), (q_heads, 1), (q_len, 1), (kv_len, 1)]
        fits = len(bias.shape) == 4 and all(n in ok for n, ok in zip(shape_of(bias), allowed, strict=True))
        if not xp.is_float(bias) or not fits:
            raise error(
                "bias",
                f"must be floating and broadcast to [{batch}, {q_heads}, {q_len}, {kv_len}] from 4 axes",
                f"{bias.dtype} of shape {shape_of(bias)}",
                "add axes of length 1 where it does not vary",
            )
    if cu_seqlens is not None:
        edges = [int(n) for n in cu_seqlens]
        if batch != 1 or q_len != kv_len or not edges or edges[0] != 0 or edges[-1] != kv_len or edges != sorted(set(edges)):
            raise error(
                "cu_seqlens",
                f"must rise from 0 to {kv_len} over one packed batch with q_len == kv_len, no sequence empty",
                f"{edges[:8]} for batch {batch}, q_len {q_len}, kv_len {kv_len}",
                "drop empty sequences and pack along the length",
            )
    if sink is not None and shape_of(sink) != (q_heads,):
        raise error(
            "sink", f"must hold one logit a query head, shape [{q_heads}]", f"shape {shape_of(sink)}", "expand it over the heads"
        )
    if window is not None:
        positive_int("window", window, "pass None for no window")
    one_device(query, mask=mask, key_mask=key_mask, bias=bias, cu_seqlens=cu_seqlens, sink=sink)


def selection_fits(selection: Any, query: Array, key: Array) -> None:
    lengths = (int(query.shape[2]), int(key.shape[2]))
    if (selection.q_len, selection.kv_len) != lengths:
        raise error(
            "selection",
            "must be made for this call's lengths (q_len, kv_len)",
            f"{(selection.q_len, selection.kv_len)} against {lengths}",
            "select again for these inputs",
        )
    for part in selection.parts:
        index = getattr(part, "index", None)
        for x in (index, getattr(part, "block_index", None)):
            one_device(query, selection=x)
        batch, heads = shape_of(index)[:2] if index is not None else (getattr(part, "batch", 1), getattr(part, "heads", 1))
        if batch not in (1, query.shape[0]) or heads not in (1, key.shape[1], query.shape[1]):
            raise error(
                "selection",
                f"must have batch 1 or {query.shape[0]} and heads 1, {key.shape[1]} or {query.shape[1]}",
                f"batch {batch}, heads {heads}",
                "select again for these inputs",
            )


def geometry_fits(geometry: Any, key: Array, key_mask: Array | None, block_size: int, asked: Any) -> None:
    held = (geometry.count.shape[0], geometry.count.shape[1], geometry.kv_len, geometry.block_size)
    wanted = (int(key.shape[0]), int(key.shape[1]), int(key.shape[2]), block_size)
    if held != wanted:
        raise error(
            "geometry",
            f"must be built over this call's keys: (batch, kv_heads, kv_len, block_size) = {wanted}",
            held,
            "append the new keys to it, or leave it out",
        )
    if not geometry.has(asked):
        raise error(
            "geometry",
            f"must hold what the policy asks for, {asked}",
            geometry.statistics,
            "build it with statistics=policy.statistics",
        )
    xp = arrays.namespace(key)
    if key_mask is None:
        # no block can count more keys than it has, so the total alone says whether all of them do
        same = int(geometry.count.sum()) == held[0] * held[1] * held[2]
    else:
        blocks = xp.pad_end(key_mask, 1, -key_mask.shape[1] % block_size, False).reshape(key_mask.shape[0], -1, block_size)
        same = bool((geometry.count == xp.total(blocks, -1)[:, None, :]).all())
    if not same:
        raise error(
            "geometry",
            "must be built with this call's key_mask",
            "other counts of keys in its blocks",
            "pass the same key_mask to geometry.build and to attention",
        )


def policy_like(policy: Any, kind: type) -> None:
    if not isinstance(policy, kind):
        raise error("policy", "must be a Policy or None", repr(policy), "try policies.Adaptive(mass=0.99)", TypeError)
