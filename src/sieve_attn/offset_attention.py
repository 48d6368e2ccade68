"""``functional.offset_attention``: attention over the keys of a position pattern."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sieve_attn import checks, patterns
from sieve_attn.arrays import torch_ops
from sieve_attn.attend import offset_op, torch_op
from sieve_attn.attend import offsets as stage
from sieve_attn.pipeline import attend, attention
from sieve_attn.policies import Policy
from sieve_attn.types import Offsets, Ranges, Selection

_WEIGHT_BYTES = 1 << 26  # what the keys gathered for `return_attention` may take at a time


@dataclass(frozen=True)
class SparseWeights:
    """Attention weights of the kept keys alone: ``index`` [q_len, kept] int64, -1 where a query keeps fewer; ``weight``
    [batch, q_heads, q_len, kept], zero there. Rows sum to 1, or to 0 for a query without keys."""

    index: Tensor
    weight: Tensor

    def to_dense(self, kv_len: int) -> Tensor:
        """[batch, q_heads, q_len, kv_len]; for tests and pictures."""
        shape = (*self.weight.shape[:3], kv_len + 1)
        place = torch.where(self.index < 0, kv_len, self.index).expand(self.weight.shape)
        return self.weight.new_zeros(shape).scatter_add(3, place, self.weight)[..., :kv_len]


@dataclass(frozen=True)
class OffsetReport:
    """What a call did: the ``plan`` of its output and that of its gradients, who computes them, how many pairs a head.

    ``modulus`` and ``tiled_residues`` are those of a wheel, 0 for diagonals. ``estimates`` are what the planner weighed for the
    output, in milliseconds a head of dimension 64 on one core or one GPU; queries fewer than 1,024 go by diagonals anyway.
    """

    pattern: str
    backend: str
    plan: str
    modulus: int
    tiled_residues: int
    gradient_plan: str
    estimates: dict[str, float]
    pairs: int
    density: float


def offset_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: patterns.Pattern,
    *,
    scale: float | None = None,
    plan: str = "auto",
    return_lse: bool = False,
    return_attention: bool = False,
    return_report: bool = False,
    upstream_compat: bool = False,
) -> Any:
    """Causal attention of every query to the keys that ``pattern`` keeps for its position: exact over those, nothing else.

    ``out_i = sum_j p_ij v_j`` over ``j <= i`` with ``pattern.keeps(i, j)``, ``p_ij = exp(scale q_i.k_j - lse_i)``. A key that the
    pattern names in two ways counts once. query [batch, q_heads, q_len, dim]; key, value [batch, kv_heads, kv_len, dim | v_dim],
    ``q_heads % kv_heads == 0``; query ``i`` sits at position ``kv_len - q_len + i``, so a decoding step passes its one query and
    the whole cache. A query without keys gives zeros and ``lse = -inf``.

    ``plan``: ``diagonals``, ``wheel`` or ``auto``, which goes by cost (see :mod:`sieve_attn.attend.offsets`). Patterns of
    blocks go to :func:`sieve_attn.attend`. ``upstream_compat`` counts global tokens inside of the window (not the query's own)
    twice, as PrimeAttention.jl does: ``ln 2`` is added to their logits.

    Returns the output [batch, q_heads, q_len, v_dim], then ``lse`` with ``return_lse``, :class:`SparseWeights` (outside of
    autograd) with ``return_attention`` and :class:`OffsetReport` with ``return_report``. Raises ValueError on shapes, on
    ``scale`` and ``plan``, TypeError if ``pattern`` is none. Memory beyond inputs and outputs: O(kv_len * dim).

    It equals, with ``kept = torch.from_numpy(pattern.to_dense(q_len, kv_len))``::

        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=kept, enable_gqa=True)
    """
    if not isinstance(pattern, patterns.Pattern):
        raise checks.error("pattern", "must be a Pattern", repr(pattern), "try patterns.Primes() | patterns.Window(4)", TypeError)
    query, key, value = torch_ops.autocast(query, key, value)
    checks.qkv(query, key, value, xp=torch_ops)
    options = dict.fromkeys(("mask", "key_mask", "bias", "softcap", "cu_seqlens", "sink", "window", "dropout"))
    checks.attention_options(query, key, scale=scale, xp=torch_ops, **options)
    if plan not in stage.PLANS:
        raise checks.error("plan", f"must be one of {', '.join(stage.PLANS)}", repr(plan), "use 'auto'")
    if (return_attention or return_report) and torch.compiler.is_compiling():
        name, remedy = "return_attention" if return_attention else "return_report", "call this outside of it to have that"
        raise checks.error(name, "cannot be used inside torch.compile", "True", remedy)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    q_len, kv_len = query.shape[2], key.shape[2]
    if stage.made_of_offsets(pattern):
        text = offset_op.text_of(pattern)
        torch_op.refuse_tangents(query, key, value)
        torch_op.refuse_transforms(query, key, value, argument="query, key, value")
        output, lse = offset_op.offset_op(query, key, value, text, scale, plan)
        if upstream_compat:
            output, lse = _doubled(query, key, value, pattern, text, output, lse, scale)
    else:
        asked = {"return_attention": return_attention, "upstream_compat": upstream_compat, "return_report": return_report}
        for name in (name for name, given in asked.items() if given):
            raise checks.error(name, "needs a pattern of offsets, windows and first tokens", repr(pattern), "leave it out")
        if torch.compiler.is_compiling() and type(pattern).__module__.startswith("sieve_attn."):
            # NumPy draws the blocks, which compilers cannot follow: an operator reads the pattern's text
            output, lse = attention(query, key, value, Policy(keep=pattern), causal=True, scale=scale, return_lse=True)
        else:
            selection = pattern.selection(q_len, kv_len, causal=True).beside(query)
            output, lse = attend(query, key, value, selection, causal=True, scale=scale)
    results = [output]
    if return_lse:
        results.append(lse)
    if return_attention:
        results.append(_weights(query, key, lse, stage.reach(pattern, kv_len), scale, _window(pattern) if upstream_compat else 0))
    if return_report:
        results.append(_report(query, key, value, pattern, plan))
    return results[0] if len(results) == 1 else tuple(results)


def _report(query: Tensor, key: Tensor, value: Tensor, pattern: patterns.Pattern, plan: str) -> OffsetReport:
    q_len, kv_len = query.shape[2], key.shape[2]
    found = stage.reach(pattern, kv_len)
    pairs, density = found.pairs(q_len, kv_len), found.density(q_len, kv_len)
    device = stage.on_device(query, value)
    if not device and stage.why_not(query, value):
        return OffsetReport(repr(pattern), "reference", "reference", 0, 0, "reference", {}, pairs, density)
    ran, back = (offset_op.chosen(query, key, value, found, plan, gradient=gradient) for gradient in (False, True))
    estimates = {option.title: option.cost / 1e6 for option in offset_op.weighed(query, key, value, found)}
    backend = "triton" if device else "native"
    return OffsetReport(repr(pattern), backend, ran.name, ran.modulus, len(ran.residues), back.title, estimates, pairs, density)


def _window(pattern: patterns.Pattern) -> int:
    """How many tokens before the query its window holds."""
    return max([0, *(p.tokens - 1 for p in patterns.base.members(pattern) if isinstance(p, patterns.Window))])


def _doubled(query, key, value, pattern, text, output, lse, scale) -> tuple[Tensor, Tensor]:
    """The first rows again, where global tokens lie inside of the window; no other row has any."""
    prefix, window = offset_op.settled(text, 1)[0], _window(pattern)
    offset = key.shape[2] - query.shape[2]
    first, stop = max(offset, 0), min(prefix + window, key.shape[2])
    if stop <= first or prefix == 0 or window == 0:
        return output, lse
    # these rows are few and the same for all longer sequences, so a compiler may settle their number
    first, stop = operator.index(first), operator.index(stop)
    size = {"q_len": stop - first, "kv_len": stop}
    offsets = Offsets(**size, offsets=offset_op.settled(text, stop)[1], first_key=prefix)
    rows = slice(first - offset, stop - offset)
    bias = _log_counts(torch.arange(first, stop)[:, None], torch.arange(stop)[None, :], prefix, window)
    out, sums = attend(
        query[:, :, rows], key[:, :, :stop], value[:, :, :stop], Selection((Ranges(**size, prefix=prefix), offsets)),
        causal=True, scale=scale, bias=bias.to(query.device, torch.promote_types(query.dtype, torch.float32))[None, None],
    )  # fmt: skip
    parts = [(x[:, :, : rows.start], y, x[:, :, rows.stop :]) for x, y in ((output, out), (lse, sums.to(lse.dtype)))]
    return tuple(torch.cat(p, 2) for p in parts)


def _log_counts(position: Tensor, key: Tensor, prefix: int, window: int) -> Tensor:
    """ln 2 where a global token lies in the window of a later query."""
    twice = (key < prefix) & (key < position) & (key >= position - window)
    return twice.double() * math.log(2.0)


@torch.no_grad()
def _weights(query: Tensor, key: Tensor, lse: Tensor, found: stage.Reach, scale: float, doubled: int) -> SparseWeights:
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    offset = kv_len - q_len
    offsets = torch.from_numpy(found.offsets[found.offsets < kv_len].copy())
    position = torch.arange(offset, kv_len)
    front = torch.arange(min(found.prefix, kv_len)).expand(q_len, -1)
    back = position[:, None] - offsets
    index = torch.cat([front.where(front <= position[:, None], -1), back.where(back >= found.prefix, -1)], 1).to(query.device)
    # kept keys first and in order
    index = torch.where(index < 0, kv_len, index).sort(1).values
    index = index[:, : int((index < kv_len).sum(1).max())] if index.shape[1] else index
    wide = torch.promote_types(query.dtype, torch.float32)
    weight = query.new_zeros(batch, heads, q_len, index.shape[1], dtype=wide)
    step = max(1, _WEIGHT_BYTES // max(1, 4 * batch * kv_heads * index.shape[1] * dim))
    for start in range(0, q_len, step):
        rows = slice(start, start + step)
        place = index[rows]
        keys = key[:, :, place.clamp_max(kv_len - 1)].to(wide)
        grouped = query[:, :, rows].to(wide).unflatten(1, (kv_heads, -1))
        logits = torch.einsum("bhgrd,bhrkd->bhgrk", grouped, keys).flatten(1, 2) * scale
        if doubled:
            logits = logits + _log_counts(position[rows, None].to(place.device), place, found.prefix, doubled).to(wide)
        shift = lse[:, :, rows].to(wide)
        shift = torch.where(shift == -torch.inf, 0.0, shift)[..., None]
        weight[:, :, rows] = torch.where(place < kv_len, torch.exp(logits - shift), 0.0)
    return SparseWeights(torch.where(index < kv_len, index, -1), weight)
