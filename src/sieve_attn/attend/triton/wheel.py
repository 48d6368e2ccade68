"""The wheel on the device: offsets of dense residues through the kernels of block attention, the others as diagonals.

Position ``p = m x + c`` is row ``x`` of group ``c``, and the offsets of one residue are diagonals between two groups. Queries are
copied group after group, keys too but from the end, and groups lie so far apart that ``row + place of the key`` tells an offset
from all others: which pairs attend is read from one row of bits, as a mask whose rows and keys both move by one bit. No pair is
computed outside of 64 x 64 or 128 x 128 tiles that hold an offset.

Both parts are exact softmaxes over keys that do not overlap; their sums meet by ``lse``, and gradients with the ``lse`` of both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sieve_attn.attend.triton import diagonals, gradients
from sieve_attn.attend.triton.forward import launch_forward
from sieve_attn.types import Blocks, Call, Selection

LONG = 1 << 17  # keys from which tiles are twice as wide, so that lists stay short


@dataclass(frozen=True)
class Spokes:
    """What a wheel reads, for one shape: where rows and keys lie, which tiles, which pairs, and what is left for diagonals."""

    row: Tensor  # [places] the query at each place, 0 where there is none
    real: Tensor  # [places] bool: there is one
    at: Tensor  # [q_len - lost] the place of each query
    lost: int  # queries before the first key, which lie nowhere
    key: Tensor  # [places] the key at each place, 0 where there is none
    shown: Tensor  # [1, places] bool: a key that tiles may read
    place: Tensor  # [kv_len] the place of each key
    bits: Tensor  # bool: place of the query + place of the key -> whether the pair attends
    blocks: Blocks
    rest: Tensor  # offsets that go by diagonals, on the host

    def mask(self) -> Tensor:
        """[1, 1, places, places] bool over one row of bits."""
        places = self.key.shape[0]
        return self.bits.as_strided((1, 1, places, places), (0, 0, 1, 1))


def spokes(offsets: Tensor, prefix: int, q_len: int, kv_len: int, plan: Any) -> Spokes:
    """Worked out on the host from the shapes and the offsets alone."""
    m, block = plan.modulus, 64 if kv_len <= LONG else 128
    every = offsets.numpy()[: diagonals.within(offsets, kv_len)]
    tiled = np.isin(every % m, plan.residues)
    longest = -(-kv_len // m)
    apart = -(-(2 * longest + 2) // block) * block
    places = m * apart
    offset, lost = max(kv_len - q_len, 0), max(q_len - kv_len, 0)
    first = offset // m

    # rows of a group are counted from the first that holds a query
    bits = np.zeros(2 * places + apart, bool)
    turns, residues = np.divmod(every[tiled], m)
    bits[places - 1 + residues * apart + turns] = True
    wrapped = residues > 0
    bits[places - 1 + (residues[wrapped] - m) * apart + turns[wrapped] + 1] = True
    bits = bits[first : first + 2 * places]

    position = np.arange(m)[:, None] + m * np.arange(apart)[None, :]
    real_key = position < kv_len
    key = np.where(real_key, position, 0).reshape(-1)[::-1]
    shown = (real_key & (position >= prefix)).reshape(-1)[::-1]
    number = np.arange(kv_len)
    place = places - 1 - (number % m * apart + number // m)
    query = position + m * first - offset
    real_row = (query >= 0) & (query < q_len - lost)
    number = np.arange(offset, kv_len)
    at = number % m * apart + number // m - first
    blocks = _lists(every[tiled], plan, real_row, first, longest, block)
    return Spokes(
        _tensor(np.where(real_row, query + lost, 0).reshape(-1)), _tensor(real_row.reshape(-1)), _tensor(at), lost, _tensor(key),
        _tensor(shown[None]), _tensor(place), _tensor(bits), blocks, torch.from_numpy(every[~tiled].copy()),
    )  # fmt: skip


def _lists(tiled: np.ndarray, plan: Any, real_row: np.ndarray, first: int, longest: int, block: int) -> Blocks:
    """For every group and tile of its rows the blocks of keys that hold an offset of one of its pairs."""
    m, apart = real_row.shape
    tiles = apart // block
    low = np.arange(tiles)[None, :] * block
    top = first + low.T
    bottom = top + block - 1
    used = np.zeros((m, tiles, m, tiles), bool)
    groups = np.arange(m)
    for residue in plan.residues:
        turns = np.sort(tiled[tiled % m == residue] // m)
        for wrap in (0, 1):
            # rows `top..bottom` meet keys `low..low + block` at all distances in between
            least, most = top - (low + block - 1) - wrap, bottom - low - wrap
            hit = np.searchsorted(turns, most, side="right") > np.searchsorted(turns, least, side="left")
            of = groups[groups < residue] if wrap else groups[groups >= residue]
            used[of, :, (of - residue) % m] |= hit & (low < longest)
    used &= real_row.reshape(m, tiles, block).any(-1)[:, :, None, None]
    # places run backwards
    flat = used.reshape(m, tiles, -1)[..., ::-1]
    pointer = np.concatenate([[0], flat.sum(-1).reshape(-1).cumsum()])
    index = _tensor(flat.nonzero()[2].astype(np.int32))
    return Blocks(_tensor(pointer.astype(np.int64)), index, 1, 1, m * apart, m * apart, block, block)


def _tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


_HELD: dict[tuple, tuple[Tensor, Spokes]] = {}  # by host array of offsets, shape, plan and device


def spokes_on(offsets: Tensor, prefix: int, q_len: int, kv_len: int, plan: Any, like: Tensor) -> Spokes:
    """The spokes beside ``like``, worked out and copied once."""
    at = (id(offsets), prefix, q_len, kv_len, plan.modulus, plan.residues, str(like.device))
    if at not in _HELD:
        if len(_HELD) >= 16:
            _HELD.pop(next(iter(_HELD)))
        made = spokes(offsets, prefix, q_len, kv_len, plan)
        moved = {n: getattr(made, n).to(like.device) for n in ("row", "real", "at", "key", "shown", "place", "bits")}
        lists = {n: getattr(made.blocks, n).to(like.device) for n in ("row_ptr", "block_index")}
        _HELD[at] = (offsets, replace(made, **moved, blocks=replace(made.blocks, **lists)))
    return _HELD[at][1]


def by_group(x: Tensor, s: Spokes) -> Tensor:
    """[batch, heads, q_len, n] to [1, batch * heads, places, n]."""
    return x.flatten(0, 1)[None, :, s.row]


def by_query(x: Tensor, s: Spokes, batch: int, fill: float = 0.0) -> Tensor:
    """[1, batch * heads, places, n] to [batch, heads, q_len, n]; ``fill`` for queries before the first key."""
    found = x[0, :, s.at]
    if s.lost:
        found = torch.cat([found.new_full((found.shape[0], s.lost, found.shape[2]), fill), found], 1)
    return found.unflatten(0, (batch, -1))


def grouped_call(query: Tensor, key: Tensor, value: Tensor, scale: float, s: Spokes) -> tuple[Call, Selection]:
    """The tiles as a call of block attention whose heads are those of all sequences."""
    keys, values = (x.detach().flatten(0, 1)[None, :, s.key] for x in (key, value))
    call = Call(by_group(query.detach(), s), keys, values, scale=float(scale), mask=s.mask(), key_mask=s.shown)
    return call, Selection((s.blocks,))


def attend(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, prefix: int, scale: float, plan: Any
) -> tuple[Tensor, Tensor]:
    """``(output, lse)``; see :func:`sieve_attn.attend.triton.diagonals.attend`."""
    batch, q_len = query.shape[0], query.shape[2]
    if not batch or not q_len:
        return diagonals.attend(query, key, value, offsets, prefix, scale)
    s = spokes_on(offsets, prefix, q_len, key.shape[2], plan, query)
    call, selection = grouped_call(query, key, value, scale, s)
    out = torch.empty((*call.query.shape[:3], value.shape[3]), dtype=torch.float32, device=query.device)
    lse = torch.empty(call.query.shape[:3], dtype=torch.float32, device=query.device)
    launch_forward(call, selection, out, lse).run(query)
    tiles, tiles_lse = by_query(out, s, batch), by_query(lse[..., None], s, batch, -torch.inf)[..., 0]
    # the others by themselves, in fp32 until both have met
    rest, rest_lse = diagonals.attend(query, key, value, s.rest, prefix, scale, torch.float32)
    total = torch.logaddexp(tiles_lse, rest_lse)
    base = torch.where(total == -torch.inf, 0.0, total)
    output = sum(_share(x, part - base) for x, part in ((tiles, tiles_lse), (rest, rest_lse)))
    return output.to(query.dtype), total


def _share(x: Tensor, log: Tensor) -> Tensor:
    # a weight of zero hides what is not a number
    weight = torch.exp(log)[..., None]
    return torch.where(weight == 0.0, 0.0, weight * x)


def backward(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, prefix: int, scale: float, grad_output: Tensor, grad_lse: Tensor,
    output: Tensor, lse: Tensor, plan: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value."""
    batch, _, q_len, _ = query.shape
    given = (query, key, value)
    if not batch or not q_len:
        return diagonals.backward(*given, offsets, prefix, scale, grad_output, grad_lse, output, lse)
    s = spokes_on(offsets, prefix, q_len, key.shape[2], plan, query)
    rest = diagonals.backward(*given, s.rest, prefix, scale, grad_output, grad_lse, output, lse, torch.float32)
    call, selection = grouped_call(*given, scale, s)
    d_lse = torch.where(lse == -torch.inf, 0.0, grad_lse.float())
    shift = d_lse - (grad_output.float() * output.float()).sum(-1)
    # rows that are none get weights of zero
    log = torch.where(s.real, by_group(lse[..., None], s)[..., 0], torch.inf).contiguous()
    sizes = ((n, getattr(call, n).shape) for n in ("query", "key", "value"))
    made = {n: torch.empty(size, dtype=torch.float32, device=query.device) for n, size in sizes}
    pull = by_group(grad_output, s)
    for launch in gradients.launch_backward(call, selection, pull, log, by_group(shift[..., None], s)[..., 0].contiguous(), made):
        launch.run(query)
    tiles = [by_query(made["query"], s, batch)]
    tiles += [made[n][0, :, s.place].unflatten(0, (batch, -1)) for n in ("key", "value")]
    return tuple((a + b).to(x.dtype) for a, b, x in zip(tiles, rest, given, strict=True))
