"""Attention of a few queries a sequence over a key and value cache that lies in pages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sieve_attn import arrays, dispatch
from sieve_attn.checks import error, positive_int, shape_of
from sieve_attn.types import Blocks, Call, Ranges, Selection

Array = Any


@dataclass(frozen=True)
class Pages:
    """A checked call: caches as [pages, kv_heads, page_size, channels], whatever their strides."""

    query: Array  # [batch, q_heads, q_len, dim]
    key: Array
    value: Array
    block_table: Array  # [batch, most pages] int32
    lengths: Array  # [batch] int64
    scale: float
    softcap: float | None = None
    window: int | None = None
    sink: Array | None = None
    selection: Selection | None = None


def paged_attention(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    block_table: Array,
    lengths: Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink: Array | None = None,
    selection: Selection | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Causal attention of the last ``q_len`` tokens of every sequence over a paged cache: no key or value is copied.

    query [batch, q_heads, q_len, dim], ``q_len`` in 1..16; key_cache [pages, page_size, kv_heads, dim] and value_cache [pages,
    page_size, kv_heads, v_dim] of one dtype; block_table [batch, most pages] (int32): key ``j`` of sequence ``b`` lies in page
    ``block_table[b, j // page_size]`` at ``j % page_size``; lengths [batch]: keys of each sequence, its queries' own included,
    so that query ``i`` sits at ``lengths[b] - q_len + i``. ``selection`` may hold one part of Blocks whose ``q_len`` is the
    call's and whose ``kv_len`` covers the longest sequence. ``scale``, ``softcap``, ``window`` and ``sink`` are as in
    :func:`sieve_attn.attention`.

    Returns the output [batch, q_heads, q_len, v_dim], with ``return_lse`` also lse [batch, q_heads, q_len] in fp32. Raises
    ValueError (or TypeError) before any work, also where the table names no page of the cache; with ``lengths`` on a GPU, the
    numbers in the table and in ``lengths`` are not read back, and whoever fills them vouches for them. For one sequence it
    equals::

        pages = block_table[b, : ceil(lengths[b] / page_size)]
        key = key_cache[pages].flatten(0, 1)[: lengths[b]].transpose(0, 1)[None]
        attention(query[b : b + 1], key, value, causal=True)  # value alike
    """
    pages = _checked(query, key_cache, value_cache, block_table, lengths, scale, softcap, window, sink, selection)
    device = str(getattr(query, "device", "cpu")).partition(":")[0]
    kinds = ("Ranges",) if selection is None else selection.kinds
    request = dispatch.Request(
        arrays.namespace(query).name,
        device,
        str(query.dtype).rpartition(".")[2],
        query.shape[3],
        value_cache.shape[3],
        kinds=kinds,
    )
    name, _ = dispatch.choose(backend, request) if backend != "auto" else _automatic(request)
    module = dispatch.module(name)
    if hasattr(module, "attend_paged"):
        output, lse = module.attend_paged(pages)
    else:
        output, lse = reference(pages, name)
    return (output, lse) if return_lse else output


def reference(pages: Pages, backend: str = "reference") -> tuple[Array, Array]:
    """The same from a copy of every sequence, gathered page by page: what kernels are held against."""
    xp = arrays.namespace(pages.query)
    outputs, sums = [], []
    size, q_len = pages.key.shape[2], pages.query.shape[2]
    for b in range(pages.query.shape[0]):
        length = int(pages.lengths[b])
        held = xp.cast(pages.block_table[b, : -(-length // size)], xp.int64)
        key, value = (_in_a_row(x[held], length) for x in (pages.key, pages.value))
        call = Call(
            pages.query[b : b + 1], key, value, causal=True, scale=pages.scale, softcap=pages.softcap, window=pages.window,
            sink=pages.sink,
        )  # fmt: skip
        chosen = Selection((Ranges(q_len, length, prefix=length),))
        if pages.selection is not None:
            chosen = Selection((_of_sequence(pages.selection.parts[0], b, length),))
        output, lse = dispatch.module(backend).attend(call, chosen, None)
        outputs.append(output)
        sums.append(lse)
    return xp.concat(outputs, 0), xp.cast(xp.concat(sums, 0), xp.float32)


def _in_a_row(pages: Array, length: int) -> Array:
    """[pages, heads, page_size, n] to [1, heads, length, n]."""
    xp = arrays.namespace(pages)
    heads, n = pages.shape[1], pages.shape[3]
    return xp.permute(pages, (1, 0, 2, 3)).reshape(heads, -1, n)[None, :, :length]


def _of_sequence(part: Blocks, b: int, length: int) -> Blocks:
    every = part.to_tiles()
    mine = every if part.batch == 1 else every[b : b + 1]
    kept = mine[..., : -(-length // part.kv_block)]
    return Blocks.from_tiles(kept, q_len=part.q_len, kv_len=length, q_block=part.q_block, kv_block=part.kv_block, lead=part.lead)


def _automatic(request: dispatch.Request) -> tuple[str, str]:
    """The fastest backend that reads pages, else the reference on a copy."""
    for name in dispatch.ORDER:
        if not dispatch.why_not(name, request) and (name == "reference" or hasattr(dispatch.module(name), "attend_paged")):
            return name, ""
    return dispatch.choose("reference", request)


def _checked(query, key_cache, value_cache, block_table, lengths, scale, softcap, window, sink, selection) -> Pages:
    xp = arrays.namespace(query, key_cache, value_cache)
    for name, x in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        if len(x.shape) != 4 or 0 in shape_of(x):
            raise error(name, "must have 4 axes, none of length 0", f"shape {shape_of(x)}", "see paged_attention for the axes")
    if not query.dtype == key_cache.dtype == value_cache.dtype or not xp.is_float(query):
        dtypes = f"{query.dtype}, {key_cache.dtype}, {value_cache.dtype}"
        raise error(
            "query, key_cache, value_cache", "must share one floating dtype", dtypes, "cast the query to the cache's dtype"
        )
    batch, q_heads, q_len, dim = shape_of(query)
    count, size, kv_heads, key_dim = shape_of(key_cache)
    if shape_of(value_cache)[:3] != (count, size, kv_heads):
        rule = "must have the pages, page size and heads of `key_cache`"
        raise error(
            "value_cache", rule, f"{shape_of(value_cache)} against {shape_of(key_cache)}", "pass both caches of one layer"
        )
    if key_dim != dim or q_heads % kv_heads:
        rule = f"must have head_dim {dim} and a number of KV heads that divides {q_heads}"
        raise error("key_cache", rule, f"shape {shape_of(key_cache)}", "the axes are [pages, page_size, kv_heads, dim]")
    if not 1 <= q_len <= 16:
        raise error("query", "must hold 1..16 queries a sequence", q_len, "prefill with attention() and decode with this")
    if len(block_table.shape) != 2 or block_table.shape[0] != batch or str(block_table.dtype).rpartition(".")[2] != "int32":
        rule = f"must be int32 of shape [{batch}, most pages]"
        raise error("block_table", rule, f"{block_table.dtype} of shape {shape_of(block_table)}", "give every sequence a row")
    most = int(block_table.shape[1]) * size
    # what lies on another device is not read back: a step would wait for it and could not be captured in a graph
    held = [int(n) for n in lengths] if str(getattr(lengths, "device", "cpu")) == "cpu" else None
    if len(lengths) != batch or (held and (min(held) < q_len or max(held) > most)):
        rule = f"must hold one number a sequence, from q_len ({q_len}) to the table's {most} keys"
        raise error("lengths", rule, str((held or lengths.shape)[:8]), "count the queries' own keys too")
    for b, length in enumerate(held or ()):
        row = block_table[b, : -(-length // size)]
        if int(row.min()) < 0 or int(row.max()) >= count:
            rule = f"must name pages 0..{count - 1} of the cache"
            raise error("block_table", rule, f"{int(row.min())}..{int(row.max())} in row {b}", "pass the table of this cache")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise error("scale", "must be a positive finite number", repr(scale), "leave it out for head_dim ** -0.5")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise error("softcap", "must be a positive finite number or None", repr(softcap), "pass None for no cap")
    if window is not None:
        positive_int("window", window, "pass None for no window")
    if sink is not None and shape_of(sink) != (q_heads,):
        raise error("sink", f"must hold one logit a query head, shape [{q_heads}]", f"shape {shape_of(sink)}", "expand it")
    if selection is not None:
        _selection_fits(selection, batch, q_heads, kv_heads, q_len, max(held) if held else q_len)
    if any(_last_stride(x) != 1 for x in (query, key_cache, value_cache)):
        raise error("query, key_cache, value_cache", "must have channels side by side", "other strides", "call .contiguous()")
    key, value = (xp.permute(x, (0, 2, 1, 3)) for x in (key_cache, value_cache))
    return Pages(
        query,
        key,
        value,
        block_table,
        xp.asarray(lengths if held is None else held, xp.int64, query),
        scale or dim**-0.5,
        softcap,
        window,
        sink,
        selection,
    )


def _selection_fits(selection, batch: int, q_heads: int, kv_heads: int, q_len: int, longest: int) -> None:
    part = selection.parts[0]
    if len(selection.parts) != 1 or not isinstance(part, Blocks) or part.row_mask is not None:
        raise error("selection", "must be one part of Blocks without row masks", selection.kinds, "choose blocks per tile")
    if part.q_len != q_len or part.kv_len < longest or part.batch not in (1, batch) or part.heads not in (1, kv_heads, q_heads):
        got = f"q_len {part.q_len}, kv_len {part.kv_len}, batch {part.batch}, heads {part.heads}"
        rule = f"must be made for q_len {q_len}, at least {longest} keys, batch 1 or {batch}, heads 1, {kv_heads} or {q_heads}"
        raise error("selection", rule, got, "select again for these inputs")


def _last_stride(x: Array) -> int:
    return x.stride(3) if hasattr(x, "data_ptr") else x.strides[3] // x.dtype.itemsize
