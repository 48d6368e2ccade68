"""What is attended to: keys by name, random selections, and the density of a selection by counting."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sieve_attn.types import Blocks, Selection

QKV = tuple[Tensor, Tensor, Tensor]
RUN, SPAN = 64, 1024  # queries in a row that look for the same thing


def _source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noise(source: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Normal entries head by head, so that no fp32 copy of everything exists beside the result."""
    out = torch.empty(shape, dtype=dtype)
    for batch in out:
        for head in batch:
            head.copy_(torch.randn(head.shape, generator=source))
    return out


def uniform(case: Any, seed: int, dtype: torch.dtype) -> QKV:
    """Independent normal entries: scaled logits of deviation 1, attention spread over everything, nothing to find."""
    source = _source(seed)
    query = _noise(source, 1, case.heads, case.q_len, case.dim, dtype=dtype)
    key, value = (_noise(source, 1, case.kv_heads, case.kv_len, case.dim, dtype=dtype) for _ in range(2))
    return query, key, value


def clustered(case: Any, seed: int, dtype: torch.dtype) -> QKV:
    """Keys in runs of 16 near one of 64 centres, queries in runs of 64 near one: logits of about 12 inside, 0 +- 2 outside."""
    query, key, value = uniform(case, seed, dtype)
    source = _source(seed + 1)
    centres = torch.randn(64, case.dim, generator=source)
    centres = centres / centres.norm(dim=-1, keepdim=True)
    strength = math.sqrt(12.0 * math.sqrt(case.dim))
    for x, run in ((query, RUN), (key, 16)):
        for head in x[0]:
            which = torch.randint(64, (-(-head.shape[0] // run),), generator=source)
            near = centres[which].repeat_interleave(run, 0)[: head.shape[0]]
            head.copy_(0.5 * head.float() + strength * near)
    return query, key, value


def typical(case: Any, seed: int, dtype: torch.dtype) -> QKV:
    """Long text as it is usually described: sinks, local attention and a few blocks to retrieve, in channels of their own.

    Every query looks at the first 4 keys (logit about 15, in one channel), at its surroundings (12 at itself by features of its
    position, fading over some 100 tokens, in 3/4 of the channels), and, for 1,024 queries at a time, at 4 random earlier blocks
    of 16 keys (9, in the rest). Logits of all other keys have a deviation of 2.
    """
    query, key, value = uniform(case, seed, dtype)
    source = _source(seed + 1)
    near, far, first = (math.sqrt(logit * math.sqrt(case.dim)) for logit in (12.0, 9.0, 15.0))
    bands = 3 * case.dim // 8
    phase = torch.arange(case.kv_len)[:, None] * (torch.randn(bands, generator=source) / 100.0)
    place = torch.zeros(case.kv_len, case.dim)
    place[:, : 2 * bands] = torch.cat([phase.cos(), phase.sin()], 1) / math.sqrt(bands)
    sink = torch.nn.functional.one_hot(torch.tensor(2 * bands), case.dim)
    spans, span = -(-case.q_len // SPAN), torch.arange(case.q_len) // SPAN
    for head, keys in zip(query[0], key[0], strict=True):
        aims = torch.randn(spans, case.dim, generator=source)
        aims[:, : 2 * bands + 1] = 0.0
        aims = torch.nn.functional.normalize(aims, dim=-1)
        head.copy_(0.25 * head.float() + near * place + far * aims[span] + first * sink)
        target = 0.25 * keys.float() + near * place
        target[:4] += first * sink
        # the first span has nothing before it
        earlier = torch.arange(1, spans)[:, None] * (SPAN // 16)
        block = (torch.rand(spans - 1, 4, generator=source) * earlier).long()
        which = (block[:, :, None] * 16 + torch.arange(16)).reshape(-1)
        target.index_add_(0, which, far * aims[1:].repeat_interleave(64, 0))
        keys.copy_(target)
    return query, key, value


def peaked(case: Any, seed: int, dtype: torch.dtype) -> QKV:
    """Keys of which one block of 16 in ten holds just over 95 % of the softmax of every query: an oracle needs 10 %.

    The heads of a group look the same way, up to a little noise; heavy keys lie 5.4 above the others along it.
    """
    query, key, value = uniform(case, seed, dtype)
    source = _source(seed + 1)
    blocks = -(-case.kv_len // 16)
    for group, (queries, keys) in enumerate(zip(query[0].chunk(case.kv_heads), key[0], strict=True)):
        way = torch.nn.functional.normalize(torch.randn(case.dim, generator=_source(seed + 2 + group)), dim=0)
        queries.copy_(0.1 * queries.float() + math.sqrt(case.dim) * way)
        heavy = torch.zeros(blocks).index_fill_(0, torch.randperm(blocks, generator=source)[: -(-blocks // 10)], 1.0)
        keys.copy_(0.5 * keys.float() + 5.4 * way * heavy.repeat_interleave(16)[: case.kv_len, None])
    return query, key, value


KEYS = {f.__name__: f for f in (uniform, clustered, typical, peaked)}


def inputs(case: Any, seed: int) -> QKV:
    """``(query, key, value)`` [1, heads, len, dim] of a case, the same for the same seed."""
    return KEYS[case.keys](case, seed, getattr(torch, case.dtype))


def random_blocks(
    seed: int, density: float, *, heads: int, q_len: int, kv_len: int, block: int, q_block: int = 64, causal: bool = True
) -> Selection:
    """Blocks kept at random so that about ``density`` of the visible keys are; what the diagonal cuts is always kept."""
    lead = (kv_len - q_len) % q_block if causal else 0
    seen = _seen_keys(q_len, kv_len, q_block, block, lead, causal)
    first = kv_len - q_len - lead + torch.arange(seen.shape[0])[:, None] * q_block
    whole = (torch.arange(seen.shape[1]) + 1) * block <= first.clamp_min(kv_len - q_len) + 1
    forced = (seen > 0) & ~whole if causal else torch.zeros_like(seen, dtype=torch.bool)
    must, free = float(seen[forced].sum()), float(seen[~forced].sum())
    share = min(1.0, max(0.0, (density * float(seen.sum()) - must) / free)) if free else 1.0
    drawn = torch.rand(1, heads, *seen.shape, generator=_source(seed)) < share
    kept = (drawn | forced) & (seen > 0)
    if not causal:
        kept[..., 0] |= ~kept.any(-1)
    return Selection((Blocks.from_tiles(kept, q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=block, lead=lead),))


def density_of(selection: Selection, causal: bool) -> float:
    """Kept over visible keys, each (query tile, key block) pair counted with the keys that some query of the tile sees."""
    blocks = selection.blocks
    seen = _seen_keys(blocks.q_len, blocks.kv_len, blocks.q_block, blocks.kv_block, blocks.lead, causal)
    tile = torch.repeat_interleave(blocks.row_ptr.diff()) % blocks.tiles
    return float(seen[tile, blocks.block_index.long()].sum()) / (float(seen.sum()) * blocks.batch * blocks.heads)


def _seen_keys(q_len: int, kv_len: int, q_block: int, kv_block: int, lead: int, causal: bool) -> Tensor:
    """[tiles, blocks]: the keys of a block that some query of a tile sees."""
    tiles, blocks = -(-(q_len + lead) // q_block), -(-kv_len // kv_block)
    end = kv_len - q_len - lead + (torch.arange(tiles) + 1) * q_block if causal else torch.full((tiles,), kv_len)
    return (end.clamp_max(kv_len)[:, None] - torch.arange(blocks) * kv_block).clamp(0, kv_block)
