"""What Sieve is measured against: PyTorch's own attention, and compiled FlexAttention on the very same selection.

FlexAttention compiled for the CPU computes forward only, in fp32, fp16 and bf16, at any length and any block size (16 keys under
tiles of 64 queries included), with grouped queries. It needs x86 with AVX2 and a C++ compiler, and about 3 s a shape.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sieve_attn.types import Selection


@dataclass(frozen=True)
class Peer:
    """A call to be timed, and what is wrong with its result ("" if nothing). ``why``: the reason if there is no call."""

    call: Callable[[], Any] | None = None
    check: Callable[[Any], str] = lambda result: ""
    why: str = ""


def sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Peer:
    """Dense attention by ``scaled_dot_product_attention``."""
    grouped = query.shape[1] != key.shape[1]
    causal = causal and query.shape[2] > 1
    if causal and query.shape[2] != key.shape[2]:
        return Peer(why="its causal mask starts at the first key")
    return Peer(lambda: scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped))


def dense(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> dict[str, Callable[[], Peer]]:
    """The dense peers by name: on a GPU every fused kernel of SDPA that is asked for by name, elsewhere what SDPA takes."""
    if query.device.type != "cuda":
        return {"sdpa": lambda: sdpa(query, key, value, causal)}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def named(backend: Any) -> Peer:
        plain = sdpa(query, key, value, causal)
        if plain.call is None:
            return plain

        def call() -> Any:
            with sdpa_kernel(backend):
                return plain.call()

        return Peer(call)

    kernels = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
    return {name: lambda backend=backend: named(backend) for name, backend in kernels.items()}


def flex(query: Tensor, key: Tensor, value: Tensor, selection: Selection, causal: bool, check: Callable[[Tensor], str]) -> Peer:
    """Compiled FlexAttention over ``selection``; its first call compiles."""
    blocks = selection.blocks
    if blocks is None or blocks.row_mask is not None or blocks.lead:
        return Peer(why="the selection is not made of whole blocks under tiles that start at the first query")
    mask = block_mask(selection, query.shape[1], causal)
    run = _compiled(
        torch.get_num_threads(), query.device.type, query.dtype, tuple(query.shape), tuple(key.shape), mask.BLOCK_SIZE, causal
    )
    grouped = query.shape[1] != key.shape[1]
    return Peer(lambda: run(query, key, value, mask, grouped), check)


def block_mask(selection: Selection, q_heads: int, causal: bool) -> Any:
    """The selection as a ``BlockMask``: blocks that causality cuts as partial ones, all others as full ones."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = selection.blocks
    kept = blocks.to_tiles()
    kept = kept.repeat_interleave(q_heads // kept.shape[1], 1)
    offset = blocks.kv_len - blocks.q_len
    device = kept.device
    cut = torch.zeros(kept.shape[-2:], dtype=torch.bool, device=device)
    if causal:
        first = offset + torch.arange(blocks.tiles, device=device) * blocks.q_block
        last = ((torch.arange(blocks.blocks, device=device) + 1) * blocks.kv_block).clamp_max(blocks.kv_len) - 1
        start = torch.arange(blocks.blocks, device=device) * blocks.kv_block
        cut = last > first[:, None]
        kept = kept & (start <= (first + blocks.q_block - 1).clamp_max(blocks.kv_len - 1)[:, None])
    return BlockMask.from_kv_blocks(
        *_ordered(kept & cut),
        *_ordered(kept & ~cut),
        BLOCK_SIZE=(blocks.q_block, blocks.kv_block),
        mask_mod=(lambda b, h, q, k: q + offset >= k) if causal else None,
        seq_lengths=(blocks.q_len, blocks.kv_len),
        compute_q_blocks=False,
    )


def _ordered(kept: Tensor) -> tuple[Tensor, Tensor]:
    """``(counts, indices)`` of the kept blocks, those first that are kept."""
    order = torch.argsort(kept.int(), dim=-1, descending=True, stable=True)
    return kept.sum(-1).int().contiguous(), order.int().contiguous()


@lru_cache
def _compiled(*key: Any) -> Callable:
    """One compiled function a shape, each with a code object of its own: none recompiles or searches the others' guards."""
    from torch.nn.attention.flex_attention import flex_attention

    def call(query, key, value, mask, grouped):
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=grouped)

    call.__code__ = call.__code__.replace()
    return torch.compile(call, dynamic=False)


def usable(peers: dict[str, Callable[[], Peer]]) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """``(calls by name, why the others are left out)``, after one call and one check of each."""
    calls, reasons = {}, []
    for name, make in peers.items():
        with warnings.catch_warnings():
            # what PyTorch says about itself while it compiles is not about this run
            warnings.simplefilter("ignore")
            try:
                peer = make()
                wrong = peer.why or peer.check(peer.call())
            except Exception as reason:
                wrong = _first_line(reason)
        if wrong:
            reasons.append(f"{name}: {wrong}")
        else:
            calls[name] = peer.call
    return calls, reasons


def _first_line(reason: Exception) -> str:
    lines = str(reason).strip().splitlines()
    return f"{type(reason).__name__}: {lines[0][:160] if lines else 'no message'}"
