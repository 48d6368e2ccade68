"""Whether an output is right, at sampled queries, so that it is affordable at any length: no array of queries x keys.

The truth is plain attention in fp64. The rule is that of ``sieve_attn.testing.tolerances``: at most twice the error of plain code
in the dtype, plus a few rounding units. (That package is not imported: it needs Hypothesis.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sieve_attn.types import Selection

ROWS, PAIRS = 48, 1 << 22  # sampled queries at most, and sampled queries times keys
UNITS = 8


def sampled(q_len: int, kv_len: int, seed: int = 0) -> Tensor:
    """The queries to check: the first, the last, both sides of tile borders, and random ones."""
    count = max(4, min(ROWS, PAIRS // kv_len))
    fixed = [n for n in (0, q_len - 1, 63, 64, q_len // 2) if 0 <= n < q_len]
    drawn = torch.randint(q_len, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.unique(torch.cat([torch.tensor(fixed), drawn])[:count])


def allowed_keys(selection: Selection | None, rows: Tensor, q_len: int, kv_len: int, causal: bool) -> Tensor:
    """[batch | 1, heads | 1, rows, kv_len] bool: what the queries ``rows`` attend to."""
    seen = torch.ones(1, 1, len(rows), kv_len, dtype=torch.bool)
    if causal:
        seen = (torch.arange(kv_len) <= (rows + kv_len - q_len)[:, None])[None, None]
    if selection is None:
        return seen
    blocks = selection.blocks
    if blocks is None or blocks.row_mask is not None:
        return seen & torch.cat([selection.rows(int(n), int(n) + 1, seen) for n in rows], 2)
    kept = torch.zeros(blocks.batch * blocks.heads, len(rows), blocks.blocks, dtype=torch.bool)
    for place, row in enumerate(rows.tolist()):
        for head in range(kept.shape[0]):
            start, stop = blocks.row_ptr[head * blocks.tiles + (row + blocks.lead) // blocks.q_block :][:2].tolist()
            kept[head, place, blocks.block_index[start:stop].long()] = True
    keys = kept.repeat_interleave(blocks.kv_block, -1)[..., :kv_len]
    return seen & keys.reshape(blocks.batch, blocks.heads, len(rows), kv_len)


def plain(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """``(output, lse)`` of one KV head: query [group, rows, dim], key and value [keys, dim], in the dtype of the inputs."""
    logits = (query @ key.T * query.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    nothing = lse == -torch.inf
    weight = torch.softmax(logits.masked_fill(nothing[..., None], 0.0), -1).masked_fill(nothing[..., None], 0.0)
    return weight @ value, lse


def complaint(what: str, got: Tensor, exact: Tensor, rough: Tensor, reach: float = 0.0) -> str:
    """What is wrong with ``got``; empty if it is as near to ``exact`` as can be asked. ``rough``: plain code in its dtype."""
    if got.shape != exact.shape:
        return f"{what} has shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    got, finite = got.double(), torch.isfinite(exact)
    if not torch.isfinite(got[finite]).all() or not torch.equal(got[~finite], exact[~finite]):
        return f"{what} is not finite where it must be"
    unit = torch.finfo(rough.dtype).eps
    apart = (rough.double() - exact)[finite].abs().max().item() if finite.any() else 0.0
    size = exact[finite].abs().max().item() if finite.any() else 0.0
    limit = 2.0 * (apart if math.isfinite(apart) else 0.0) + UNITS * unit * (1.0 + size) + 2.0 * unit * reach * size
    worst = (got - exact)[finite].abs().max().item() if finite.any() else 0.0
    return "" if worst <= limit else f"{what} errs by {worst:.2e}, allowed are {limit:.2e}"


def check_attention(
    output: Tensor, lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, selection: Selection | None, *, causal: bool
) -> tuple[str, float]:
    """``(what is wrong, the largest dropped mass)`` at sampled queries; without a selection the truth is dense."""
    q_len, kv_len = query.shape[2], key.shape[2]
    rows = sampled(q_len, kv_len)
    allowed = allowed_keys(selection, rows, q_len, kv_len, causal)
    visible = allowed_keys(None, rows, q_len, kv_len, causal)
    group, dropped = query.shape[1] // key.shape[1], 0.0
    for batch in range(query.shape[0]):
        for head in range(key.shape[1]):
            mine = slice(head * group, (head + 1) * group)
            part = allowed[min(batch, allowed.shape[0] - 1)]
            part = part[mine] if part.shape[0] == query.shape[1] else part[min(head, part.shape[0] - 1)][None]
            q, k, v = query[batch, mine][:, rows], key[batch, head], value[batch, head]
            exact, total = plain(q.double(), k.double(), v.double(), part)
            rough, about = plain(q, k, v, part)
            wrong = complaint("the output", output[batch, mine][:, rows], exact, rough)
            if lse is not None and not wrong:
                wrong = complaint("lse", lse[batch, mine][:, rows], total, about)
            if wrong:
                return wrong, dropped
            if selection is not None:
                lost = plain(q.double(), k.double(), v.double(), visible[0, 0] & ~part)[1]
                dropped = max(dropped, torch.exp(lost - torch.logaddexp(lost, total)).nan_to_num(0.0).max().item())
    return "", dropped


def check_gradients(grads: tuple[Tensor, ...], upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, selection: Selection,
                    rows: Tensor, *, causal: bool) -> str:  # fmt: skip
    """What is wrong with the gradients of query, key and value, when ``upstream`` is zero but at the queries ``rows``.

    Then every entry of all three is known from those queries alone. Expects one KV head a query head and batch 1.
    """
    allowed = allowed_keys(selection, rows, query.shape[2], key.shape[2], causal)
    for head in range(query.shape[1]):
        part = allowed[0, min(head, allowed.shape[1] - 1)][None]
        known = []
        for dtype in (torch.float64, query.dtype):
            q, k, v = (x[0, head].detach().to(dtype).requires_grad_() for x in (query, key, value))
            out, total = plain(q[rows][None], k, v, part)
            known.append(torch.autograd.grad(out, (q, k, v), upstream[0, head, rows][None].to(dtype)))
        reach = total.detach()[torch.isfinite(total)].abs().max().item()
        for name, got, exact, rough in zip(("query", "key", "value"), grads, *known, strict=True):
            # kernels make the weights again from lse: they err by the rounding of the largest of them
            wrong = complaint(f"the gradient of {name}", got[0, head], exact, rough, reach)
            if wrong:
                return wrong
    return ""
