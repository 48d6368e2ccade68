"""``sieve bench aether --verify``: the published functions against their definitions, written once more in plain fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from sieve_attn.aether import precompute_metadata, run_aether_sparse
from sieve_attn.bench.aether.cases import VARIANTS, Cache, Options
from sieve_attn.bench.aether.run import keep_something, selection_of
from sieve_attn.pipeline import attend

NEAR = 1e-4  # scores are fp32: blocks so near to the border may fall on either side


def verify(o: Options, cache: Cache | None = None) -> Iterator[tuple[str, str]]:
    """``(law, what is wrong)``, "" where it holds."""
    cache = Cache.make(o) if cache is None else cache
    query, key, value = cache.query, cache.key, cache.value
    made = precompute_metadata(key, o.block_size, compute_variance=True, compute_concentration=True)
    exact = plain_metadata(key, o.block_size)
    yield "metadata equals its definition", _metadata(made, exact)
    requests = o.sparsity_sweep or (o.target_sparsity,)
    for variant in [name for name in o.variants if name in VARIANTS]:
        flags = VARIANTS[variant]
        for request in requests:
            named = f"{variant}, {f'threshold {o.threshold:g}' if request is None else f'target sparsity {request:g}'}"
            mask, scores = run_aether_sparse(query[:, :, 0], *made, threshold=o.threshold, target_sparsity=request, **flags)
            yield f"{named}: the mask equals a plain recomputation", _mask(mask, query, exact, o.threshold, request, flags)
            if request is not None:
                least = "at least" if flags.get("is_causal") else "exactly"
                yield f"{named}: {least} max(1, round(blocks * (1 - target))) blocks", _count(mask, scores, request, flags)
            kept = keep_something(mask, scores)
            output, _ = attend(query, key, value, selection_of(kept, o.seq_len, o.block_size), backend=o.backend)
            allowed = kept.repeat_interleave(o.block_size, -1)[:, :, None, : o.seq_len]
            yield f"{named}: the output equals masked SDPA", _same(output, query, key, value, allowed)
        everything, scores = run_aether_sparse(query[:, :, 0], *made, threshold=-math.inf, **flags)
        wrong = "" if everything.all() else "some block is dropped"
        output, _ = attend(query, key, value, selection_of(everything, o.seq_len, o.block_size), backend=o.backend)
        yield f"{variant}: threshold=-inf equals dense attention", wrong or _same(output, query, key, value, None)


def plain_metadata(key: Tensor, block_size: int) -> tuple[Tensor, ...]:
    """Means, radii, variances and concentrations of normalised keys, block by block, in fp64."""
    found = []
    for keys in key.split(block_size, 2):
        unit = normalize(keys.double(), dim=-1, eps=0.0)
        mean = normalize(unit.mean(2), dim=-1, eps=0.0)
        apart = (unit - mean[:, :, None]).norm(dim=-1)
        aligned = (unit * mean[:, :, None]).sum(-1).mean(-1)
        found.append((mean, apart.amax(-1), (apart**2).mean(-1), aligned.clamp(0.1, 1.0)))
    return tuple(torch.stack(parts, 2) for parts in zip(*found, strict=True))


def plain_scores(
    query: Tensor, metadata: tuple[Tensor, ...], use_variance=False, use_concentration=False, is_causal=False
) -> Tensor:
    """``s = scale * (q.mu + ||q|| r (1 + sqrt(var)) conc)``, and ``log(0.95) * age`` when causal, in fp64."""
    means, radii, variances, concentrations = metadata
    q = query[:, :, 0].double()
    reach = q.norm(dim=-1, keepdim=True) * radii
    reach = reach * (1.0 + variances.sqrt()) if use_variance else reach
    reach = reach * concentrations if use_concentration else reach
    scores = (torch.einsum("bhd,bhnd->bhn", q, means) + reach) / math.sqrt(q.shape[-1])
    age = torch.arange(scores.shape[-1] - 1, -1, -1, dtype=torch.float64)
    return scores + math.log(0.95) * age if is_causal else scores


def _metadata(made: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> str:
    for name, got, wanted in zip(("means", "radii", "variances", "concentrations"), made, exact, strict=True):
        worst = (got.double() - wanted).abs().max().item()
        if not worst <= 1e-5:
            return f"{name} err by {worst:.1e}"
    return ""


def _mask(mask: Tensor, query: Tensor, metadata: tuple, threshold: float, request: float | None, flags: dict) -> str:
    scores = plain_scores(query, metadata, **flags)
    border = torch.tensor(threshold, dtype=torch.float64)
    if request is not None:
        border = scores.sort(-1, descending=True).values[..., _wanted(scores.shape[-1], request) - 1 :][..., :1]
    expected = scores > border if request is None else scores >= border
    if flags.get("is_causal"):
        expected = expected | (torch.arange(scores.shape[-1]) >= scores.shape[-1] - 4)
    wrong = (mask != expected) & ((scores - border).abs() > NEAR * (1.0 + border.abs()))
    return f"{int(wrong.sum())} of {wrong.numel()} blocks differ" if wrong.any() else ""


def _wanted(blocks: int, sparsity: float) -> int:
    return max(1, round(blocks * (1.0 - sparsity)))


def _count(mask: Tensor, scores: Tensor, request: float, flags: dict) -> str:
    """Causal calls add the local window to the count, so that it is a minimum."""
    counts, wanted = mask.sum(-1), _wanted(scores.shape[-1], request)
    good = (counts >= wanted) if flags.get("is_causal") else (counts == wanted)
    return "" if good.all() else f"{int(counts.min())} to {int(counts.max())} are kept, not {wanted}"


def _same(output: Tensor, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> str:
    """Against SDPA in fp32, within rounding of the dtype."""
    whole = torch.ones(key.shape[0], 1, 1, 1, dtype=torch.bool)
    parts = zip(query, key, value, whole if allowed is None else allowed, strict=True)
    exact = torch.stack([scaled_dot_product_attention(q.float(), k.float(), v.float(), mask) for q, k, v, mask in parts])
    worst = (output.float() - exact).abs().max().item()
    limit = 8 * max(torch.finfo(output.dtype).eps, 1e-6) * (1.0 + exact.abs().max().item())
    return "" if worst <= limit else f"errs by {worst:.1e}, allowed are {limit:.1e}"
