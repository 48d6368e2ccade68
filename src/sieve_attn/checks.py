"""Every user-facing error: the argument, the rule, the value received, the remedy."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from sieve_attn import arrays

Array = Any

NUMBER = (int, float, np.integer, np.floating)
FLOATS = ("float16", "bfloat16", "float32", "float64")
THREADS_PER_CPU = 4


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


def threads(value: Any, remedy: str) -> int:
    """Far more threads than cores only wait for each other, and where the system starts no more the process dies."""
    most = THREADS_PER_CPU * (os.cpu_count() or 1)
    count = positive_int("threads", value, remedy)
    if count > most:
        raise error("threads", f"must be at most {most}, {THREADS_PER_CPU} for each CPU here", repr(value), remedy)
    return count


def unicode_text(argument: str, text: str) -> str:
    """A string may hold halves of UTF-16 pairs, or bytes that a terminal could not decode: no tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError as why:
        got = f"{text[why.start]!r} at position {why.start}"
        raise error(argument, "must be valid Unicode", got, "pass UTF-8, or decode bytes with errors='replace'") from None
    return text


def seed(argument: str, value: Any) -> int:
    """What torch's generators take: 64 bits, signed or not."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not -(2**63) <= int(value) < 2**64:
        raise error(argument, "must be an integer of at most 64 bits", repr(value), "try 0")
    return int(value)


def share(argument: str, value: Any, remedy: str, *, open_right: bool = False) -> float:
    """A number in [0, 1], or in [0, 1) with ``open_right``."""
    good = isinstance(value, NUMBER) and not isinstance(value, bool)
    if not (good and value >= 0 and (value < 1 if open_right else value <= 1)):
        raise error(argument, f"must lie in [0, 1{')' if open_right else ']'}", repr(value), remedy)
    return float(value)


def threshold(argument: str, value: Any) -> float:
    """A real number; infinities are thresholds too, NaN is not."""
    if not isinstance(value, NUMBER) or isinstance(value, bool) or not -math.inf <= value <= math.inf:
        raise error(argument, "must be a number and not NaN", repr(value), "use float('-inf') to keep everything")
    return settled(value)


def settled(value: float) -> float:
    """The number itself where the compiler made it a symbol, as it may any float that it did not see written: a text holds it."""
    return float.fromhex(float(value).hex())


def positive(argument: str, value: Any, remedy: str, *, instead: str = "") -> None:
    """A positive finite number; ``instead`` says what else is allowed."""
    if not isinstance(value, NUMBER) or isinstance(value, bool) or not 0 < value < math.inf:
        raise error(argument, f"must be a positive finite number{instead}", repr(value), remedy)


def given_array(argument: str, x: Any) -> None:
    """An array of some framework: what has no shape or dtype is refused before anything asks for them."""
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise error(argument, "must be an array", type(x).__name__, "pass a tensor or a NumPy array", TypeError)


def floating(argument: str, x: Array) -> None:
    if str(x.dtype).rpartition(".")[2] not in FLOATS:
        raise error(argument, "must be of a floating dtype (fp16, bf16, fp32, fp64)", f"dtype {x.dtype}", "cast it first")


def _beside(argument: str, x: Any, query: Array, xp: Any) -> None:
    """An optional array comes from the framework and lies on the device of ``query``."""
    given_array(argument, x)
    if xp.name == "jax":
        return  # takes NumPy arrays as its own
    if xp.name not in {base.__module__.partition(".")[0] for base in type(x).__mro__}:
        raise error(argument, f"must be an array of {xp.name}, as `query` is", type(x).__name__, "convert it first", TypeError)
    one_device(argument, x, query)


def one_device(argument: str, x: Array | None, query: Array) -> None:
    """Kernels are given addresses: what lies on another device would be read as memory of this one."""
    if x is None or arrays.namespace(query).name != "torch":
        return
    where = getattr(x, "device", query.device)
    if where != query.device:
        raise error(argument, f"must lie on the device of `query`, {query.device}", where, "move it with `.to(query.device)`")


def shape_of(x: Array) -> tuple[int, ...]:
    return tuple(x.shape)  # not made integers: exporting would fix a length that it is to leave open


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
        if x is query or x.dtype != query.dtype:
            floating(name, x)
        one_device(name, x, query)
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


def holding_values(query: Array) -> None:
    """What is kept depends on values, so nothing can be said of arrays that have a shape alone."""
    if getattr(query, "is_meta", False) and type(query).__name__ == "Tensor":
        raise error("query", "must hold values: what is kept depends on them", "a tensor on device meta", "move it to a device")


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
    kv_len = key.shape[2]
    if dropout:
        raise error(
            "dropout", "must be 0: a certificate has no meaning under dropout", repr(dropout), "drop it, or call model.eval()"
        )
    if scale is not None:
        positive("scale", scale, "fold a sign into the query")
    if softcap is not None:
        positive("softcap", softcap, "pass None for no cap", instead=" or None")
    for name, x in (("mask", mask), ("key_mask", key_mask), ("bias", bias), ("sink", sink)):
        if x is not None:
            _beside(name, x, query, xp)
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
        edges = _edges(cu_seqlens)
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


def _edges(cu_seqlens: Any) -> list[int]:
    """The edges as Python integers, from an integer array of one axis or a sequence of integers."""
    shaped = hasattr(cu_seqlens, "shape")
    good = len(cu_seqlens.shape) == 1 and "int" in str(cu_seqlens.dtype) if shaped else isinstance(cu_seqlens, (list, tuple))
    if not good or not (shaped or all(hasattr(n, "__index__") for n in cu_seqlens)):
        got = f"{cu_seqlens.dtype} of shape {shape_of(cu_seqlens)}" if shaped else repr(cu_seqlens)
        raise error("cu_seqlens", "must be integers along one axis", got, "pass the cumulative lengths, for example [0, 5, 12]")
    return [int(n) for n in cu_seqlens]


def selection_fits(selection: Any, query: Array, key: Array) -> None:
    if not all(hasattr(selection, name) for name in ("q_len", "kv_len")):
        raise error("selection", "must be a Selection", type(selection).__name__, "take it from `report.selection`, or from "
                    "a pattern's `selection(q_len, kv_len)`", TypeError)  # fmt: skip
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
            one_device("selection", x, query)
        batch, heads = shape_of(index)[:2] if index is not None else (getattr(part, "batch", 1), getattr(part, "heads", 1))
        if batch not in (1, query.shape[0]) or heads not in (1, key.shape[1], query.shape[1]):
            raise error(
                "selection",
                f"must have batch 1 or {query.shape[0]} and heads 1, {key.shape[1]} or {query.shape[1]}",
                f"batch {batch}, heads {heads}",
                "select again for these inputs",
            )


def geometry_fits(geometry: Any, key: Array, key_mask: Array | None, block_size: int, asked: Any) -> None:
    if not all(hasattr(geometry, name) for name in ("count", "kv_len", "statistics")):
        raise error("geometry", "must be a Geometry", type(geometry).__name__, "make it with geometry.build", TypeError)
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
    if not arrays.namespace(key).waits(key):
        geometry_counts(geometry, key, key_mask)


def geometry_counts(geometry: Any, key: Array, key_mask: Array | None) -> None:
    """ValueError unless ``geometry`` was built with ``key_mask``. It reads counts, for which a GPU has to be waited for: there a
    call does not ask, and a certificate does."""
    xp, block_size = arrays.namespace(key), geometry.block_size
    held = (geometry.count.shape[0], geometry.count.shape[1], geometry.kv_len)
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
