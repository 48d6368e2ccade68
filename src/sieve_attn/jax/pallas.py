"""A Pallas kernel for attention over kept blocks: one program a (batch, query head, query tile), which walks the tile's list.

Forward only; gradients are the gather's, which computes the same function. On GPU and TPU the kernel is compiled, elsewhere
Pallas interprets it: slow, and the same results. It takes causality, a window and a soft cap; other options are refused by name.
Values must be finite: elsewhere a weight of zero hides a NaN, here it reaches every query of a tile that keeps its block, earlier
ones too.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton

from sieve_attn.jax import call as front
from sieve_attn.jax import gather
from sieve_attn.jax.call import Call
from sieve_attn.jax.selection import PaddedBlocks
from sieve_attn.types import Selection

LEAST = -1e30  # instead of -inf inside of the kernel, where inf - inf must not arise


def why_not(selection: PaddedBlocks | Selection) -> tuple[str, ...]:
    if not isinstance(selection, PaddedBlocks):
        return (f"the Pallas kernel takes Blocks, not {', '.join(selection.kinds)}",)
    return sizes_why_not(selection.q_block, selection.kv_block, selection.rows is not None)


def sizes_why_not(q_block: int, kv_block: int, per_query: bool) -> tuple[str, ...]:
    """Choices of whole tiles, and tiles that matrix units take: powers of two from 16 on."""
    if per_query:
        return ("the Pallas kernel takes choices of whole tiles, not per_query",)
    wrong = [f"{name} {n}" for name, n in (("q_block", q_block), ("kv_block", kv_block)) if n < 16 or n & (n - 1)]
    return (f"the Pallas kernel takes tiles and blocks of 16, 32, 64, ..., not {', '.join(wrong)}",) if wrong else ()


def options_why_not(call: Call) -> tuple[str, ...]:
    """Which arguments of ``call`` the kernel does not know."""
    names = ("mask", "key_mask", "bias", "cu_seqlens", "sink", "kv_length")
    return tuple(f"the Pallas kernel has no {name}" for name in names if getattr(call, name) is not None)


def attend(call: Call, selection: PaddedBlocks) -> tuple[jax.Array, jax.Array]:
    """``(output [batch, q_heads, q_len, v_dim] in the query's dtype, lse [batch, q_heads, q_len])``."""
    return attend_on(call, selection, front.platform(call.query))


def attend_on(call: Call, selection: PaddedBlocks, platform: str) -> tuple[jax.Array, jax.Array]:
    """As :func:`attend`, for the ``platform`` that the call is lowered for: ``tpu``, ``gpu`` or ``cuda``; ``cpu`` interprets."""
    settled = (call.causal, call.scale, call.softcap, call.window)
    return _attend(call.query, call.key, call.value, selection, settled, platform)


def _as_call(query: jax.Array, key: jax.Array, value: jax.Array, settled: tuple) -> Call:
    causal, scale, softcap, window = settled
    return Call(query, key, value, causal=causal, scale=scale, softcap=softcap, window=window)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, selection: PaddedBlocks, settled: tuple, platform: str):
    return _forward_only(_as_call(query, key, value, settled), selection, platform)


def _forward(query, key, value, selection, settled, platform):
    return _attend(query, key, value, selection, settled, platform), (query, key, value, selection)


def _backward(settled, platform, kept, gradients):
    query, key, value, selection = kept
    _, pull = jax.vjp(lambda *floats: gather.attend(_as_call(*floats, settled), selection), query, key, value)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jax.dtypes.float0), selection)
    return (*pull(gradients), zeros)


_attend.defvjp(_forward, _backward)


def _forward_only(call: Call, selection: PaddedBlocks, platform: str) -> tuple[jax.Array, jax.Array]:
    batch, heads, q_len, _ = call.query.shape
    kv_heads, kv_len, v_dim = call.key.shape[1], call.kv_len, call.value.shape[3]
    size, tile, lead, tiles = selection.kv_block, selection.q_block, selection.lead, selection.tiles
    group, choosers = heads // kv_heads, selection.indices.shape[1]
    every = selection.blocks

    def padded(x, front_rows, length):
        # channels of zeros change no product, and matrix units take powers of two
        channels = max(16, 1 << (x.shape[3] - 1).bit_length()) - x.shape[3]
        return jnp.pad(x, ((0, 0), (0, 0), (front_rows, length - front_rows - x.shape[2]), (0, channels)))

    query = padded(call.query, lead, tiles * tile)
    key, value = (padded(x, 0, every * size) for x in (call.key, call.value))
    counts = jnp.broadcast_to(selection.counts, (batch, choosers, tiles))
    indices = jnp.broadcast_to(selection.indices, (batch, choosers, tiles, selection.max_blocks)).reshape(batch, choosers, -1)

    def of_tile(b, h, t):
        return b, h, t, 0

    def of_keys(b, h, t):
        return b, jax.lax.div(h, jnp.int32(group)), 0, 0

    tpu = platform == "tpu"
    lists = pl.BlockSpec(memory_space=pltpu.SMEM) if tpu else pl.BlockSpec()
    kernel = partial(
        _walk, shared=heads // choosers, size=size, room=selection.max_blocks, blocks=every, kv_len=kv_len,
        first=call.offset - lead, causal=call.causal, window=call.window, scale=call.scale, softcap=call.softcap,
    )  # fmt: skip
    out, lse = pl.pallas_call(
        kernel,
        grid=(batch, heads, tiles),
        in_specs=[
            lists,
            lists,
            pl.BlockSpec((None, None, tile, query.shape[3]), of_tile),
            pl.BlockSpec((None, None, every * size, key.shape[3]), of_keys),
            pl.BlockSpec((None, None, every * size, value.shape[3]), of_keys),
        ],
        out_specs=[pl.BlockSpec((None, None, tile, value.shape[3]), of_tile), pl.BlockSpec((None, None, tile, 1), of_tile)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, tiles * tile, value.shape[3]), call.query.dtype),
            jax.ShapeDtypeStruct((batch, heads, tiles * tile, 1), jnp.float32),
        ],
        interpret=platform == "cpu",
        compiler_params=None if platform in ("cpu", "tpu") else triton.CompilerParams(num_warps=4),
    )(counts, indices, query, key, value)
    return out[:, :, lead : lead + q_len, :v_dim], lse[:, :, lead : lead + q_len, 0]


def _walk(
    counts_ref, indices_ref, query_ref, key_ref, value_ref, out_ref, lse_ref, *, shared: int, size: int, room: int,
    blocks: int, kv_len: int, first: int, causal: bool, window: int | None, scale: float, softcap: float | None,
) -> None:  # fmt: skip
    """One query tile: online softmax over its blocks, in fp32."""
    query = query_ref[...].astype(jnp.float32)
    tile = query.shape[0]
    sequence, chooser, number = pl.program_id(0), jax.lax.div(pl.program_id(1), jnp.int32(shared)), pl.program_id(2)
    wanted = counts_ref[sequence, chooser, number]
    overflows = wanted > room
    position = first + number * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, size), 0)

    def step(place, carried):
        top, total, out = carried
        # a tile that overflows walks all blocks
        listed = indices_ref[sequence, chooser, number * room + jnp.minimum(place, room - 1)]
        block = jnp.where(overflows, place, listed)
        rows = pl.ds(pl.multiple_of(block * size, size), size)
        key, value = key_ref[rows, :].astype(jnp.float32), value_ref[rows, :].astype(jnp.float32)
        logits = jax.lax.dot_general(query, key, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32,
                                     precision=jax.lax.Precision.HIGHEST) * scale  # fmt: skip
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        column = block * size + jax.lax.broadcasted_iota(jnp.int32, (tile, size), 1)
        seen = column < kv_len
        if causal:
            seen = seen & (column <= position)
        if window is not None:
            seen = seen & (column > position - window) & (column < position + window)
        logits = jnp.where(seen, logits, LEAST)
        higher = jnp.maximum(top, jnp.max(logits, 1, keepdims=True))
        weight = jnp.where(seen, jnp.exp(logits - higher), 0.0)
        shrink = jnp.exp(top - higher)
        product = jax.lax.dot_general(weight, value, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32,
                                      precision=jax.lax.Precision.HIGHEST)  # fmt: skip
        return higher, total * shrink + jnp.sum(weight, 1, keepdims=True), out * shrink + product

    start = (jnp.full((tile, 1), LEAST, jnp.float32), jnp.zeros((tile, 1), jnp.float32), jnp.zeros(out_ref.shape, jnp.float32))
    top, total, out = jax.lax.fori_loop(0, jnp.where(overflows, blocks, wanted), step, start)
    empty = total == 0.0
    out_ref[...] = (out / jnp.where(empty, 1.0, total)).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(empty, -math.inf, jnp.log(jnp.where(empty, 1.0, total)) + top)
