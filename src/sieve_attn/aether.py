"""AETHER's published functions: block geometry of the xFormers form, metadata and gate of the TensorRT-LLM form."""

from __future__ import annotations

import math
from typing import Any

from sieve_attn import arrays, checks
from sieve_attn import geometry as stage_geometry
from sieve_attn.scores.event_radar import add_recency, check_recency, radar_scores
from sieve_attn.selection.top_k import target_blocks
from sieve_attn.types import Statistics

Array = Any


def _rank(name: str, x: Array, axes: str) -> None:
    checks.given_array(name, x)
    checks.floating(name, x)
    count = axes.count(",") + 1
    if len(x.shape) != count or 0 in tuple(x.shape):
        raise checks.error(name, f"must be a non-empty {axes} array", f"shape {tuple(x.shape)}", "add or drop axes with reshape")


def compute_block_geometry(k: Array, block_size: int = 64) -> tuple[Array, Array]:
    """``(centroids [batch, blocks, heads, head_dim], radii [batch, blocks, heads])`` of keys [batch, len, heads, head_dim].

    ``mu`` = mean of the raw keys of a block, ``r = max ||k - mu||``, both fp32 whatever the key dtype, ``r`` rounded outward.
    The last block may be ragged: it counts the keys it has. Raises ValueError for other ranks, dtypes that are not floating and
    block sizes below 1, TypeError for what is no array. Source: the AETHER operator proposed to xFormers. A whole block is::

        block = k[:, b * block_size : (b + 1) * block_size].float()
        centroid = block.mean(1)
        radius = (block - centroid[:, None]).norm(dim=-1).amax(1)
    """
    _rank("k", k, "[batch, len, heads, head_dim]")
    block_size = checks.positive_int("block_size", block_size, "try 48 or 64")
    xp = arrays.namespace(k)
    if xp.name == "torch":
        from sieve_attn.layers.operators import block_geometry, no_tangents

        no_tangents(k, argument="k")
        return block_geometry(k, block_size)
    return geometry_of(k, block_size)


def geometry_of(k: Array, block_size: int) -> tuple[Array, Array]:
    """:func:`compute_block_geometry` without its checks."""
    xp = arrays.namespace(k)
    found = stage_geometry.build(xp.permute(k, (0, 2, 1, 3)), block_size, Statistics(radius=True))
    radii = xp.cast(xp.permute(found.radius * (1.0 + 2.0**-23), (0, 2, 1)), xp.float32)
    return xp.cast(xp.permute(found.mean, (0, 2, 1, 3)), xp.float32), radii


def precompute_metadata(
    keys: Array, block_size: int = 64, compute_variance: bool = False, compute_concentration: bool = False
) -> tuple[Array, Array, Array | None, Array | None]:
    """Event Radar's metadata of ``keys`` [batch, heads, len, head_dim], on normalised keys ``k^ = k / ||k||``:

    ``means mu^ = normalize(mean k^)`` [batch, heads, blocks, head_dim]; ``radii = max d`` with ``d = ||k^ - mu^||``;
    ``variances = mean d^2`` and ``concentrations = clamp(mean k^.mu^, 0.1, 1)``, [batch, heads, blocks] or None unless asked.
    fp32. (``variance == 2 - 2 * mean alignment``: one statistic in two forms.)

    Raises ValueError for other ranks, dtypes that are not floating and block sizes below 1, TypeError for what is no array.
    Source: AETHER's TensorRT-LLM form. A whole block is::

        unit = normalize(keys[:, :, b * block_size : (b + 1) * block_size].float(), dim=-1)
        mean = normalize(unit.mean(2), dim=-1)
        distance = (unit - mean[:, :, None]).norm(dim=-1)
        radius, variance = distance.amax(-1), distance.square().mean(-1)
    """
    _rank("keys", keys, "[batch, heads, len, head_dim]")
    block_size = checks.positive_int("block_size", block_size, "try 48 or 64")
    if arrays.namespace(keys).name == "torch":
        from sieve_attn.layers.operators import aether_metadata, no_tangents

        no_tangents(keys, argument="keys")
        means, radii, variances, concentrations = aether_metadata(keys, block_size)
    else:
        means, radii, variances, concentrations = metadata_of(keys, block_size)
    return means, radii, variances if compute_variance else None, concentrations if compute_concentration else None


def metadata_of(keys: Array, block_size: int) -> tuple[Array, Array, Array, Array]:
    """All four statistics, without checks."""
    xp = arrays.namespace(keys)
    found = stage_geometry.build(keys, block_size, Statistics(direction=True))
    parts = (found.direction_mean, found.direction_radius, found.direction_variance, found.concentration)
    return tuple(xp.cast(x, xp.float32) for x in parts)


def run_aether_sparse(
    query: Array,
    means: Array,
    radii: Array,
    block_variances: Array | None = None,
    block_concentrations: Array | None = None,
    threshold: float = 0.15,
    scale: float | None = None,
    use_variance: bool = False,
    use_concentration: bool = False,
    is_causal: bool = False,
    local_window: int = 4,
    recency_decay: float = 0.95,
    target_sparsity: float | None = None,
    recency: str = "additive",
) -> tuple[Array, Array]:
    """Event Radar's gate for one query per (batch, head): ``(mask bool, scores fp32)``, both [batch, heads, blocks].

    ``s = scale * (q.mu^ + ||q|| r (1 + sqrt(var)) conc)``, the last two factors with their flags; a block is kept iff ``s >
    threshold``, or, with ``target_sparsity``, if it is among the ``max(1, round(blocks * (1 - target)))`` best (ties to the
    smaller index). With ``is_causal`` recent blocks are favoured and the last ``local_window`` blocks kept besides:
    ``s + log(recency_decay) * age``; ``recency="legacy"`` is the published factor, which favours the oldest block.

    A heuristic: normalised means against raw queries bound nothing, so no certificate ever rests on it. query [batch,
    heads, head_dim]; the rest as :func:`precompute_metadata` returns it. ``scale`` defaults to ``head_dim ** -0.5``.

    Raises ValueError if a flag's statistic is missing, for shapes that do not fit and for values out of range, TypeError for
    what is no array. Source: AETHER's TensorRT-LLM form. Without flags it equals::

        scores = scale * ((query[:, :, None] * means).sum(-1) + query.norm(dim=-1)[..., None] * radii)
        mask = scores > threshold
    """
    _rank("query", query, "[batch, heads, head_dim]")
    _rank("means", means, "[batch, heads, blocks, head_dim]")
    if (*query.shape[:2], query.shape[2]) != (*means.shape[:2], means.shape[3]) or tuple(radii.shape) != tuple(means.shape[:3]):
        raise checks.error(
            "means, radii",
            f"must fit a query of shape {tuple(query.shape)}",
            f"shapes {tuple(means.shape)} and {tuple(radii.shape)}",
            "pass what precompute_metadata returned",
        )
    variances = _statistic("variance", block_variances, radii) if use_variance else None
    concentrations = _statistic("concentration", block_concentrations, radii) if use_concentration else None
    xp = arrays.namespace(query, means, radii, variances, concentrations)
    checks.threshold("threshold", threshold)
    checks.positive_int("local_window", local_window, "use 0 for none", least=0)
    check_recency(recency, recency_decay)
    if target_sparsity is not None:
        checks.share("target_sparsity", target_sparsity, "0.8 drops 80 % of the blocks")
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[2])
    checks.positive("scale", scale, "fold a sign into the query")
    options = (float(threshold), float(scale), is_causal, local_window, recency_decay, target_sparsity, recency)
    if xp.name == "torch":
        from sieve_attn.layers.operators import aether_gate, no_tangents

        no_tangents(query, means, radii, variances, concentrations, argument="query, means, radii")
        return aether_gate(query, means, radii, variances, concentrations, *options)
    return gate(query, means, radii, variances, concentrations, *options)


def _statistic(kind: str, given: Array | None, radii: Array) -> Array:
    """A block statistic that a flag of ``run_aether_sparse`` needs."""
    name, remedy = f"block_{kind}s", f"compute it with precompute_metadata(compute_{kind}=True)"
    if given is None:
        raise checks.error(name, f"must be given with use_{kind}=True", "None", remedy)
    checks.given_array(name, given)
    if tuple(given.shape) != tuple(radii.shape):
        raise checks.error(name, f"must have the shape of `radii`, {tuple(radii.shape)}", f"shape {tuple(given.shape)}", remedy)
    return given


def gate(
    query,
    means,
    radii,
    variances,
    concentrations,
    threshold,
    scale,
    is_causal,
    local_window,
    recency_decay,
    target_sparsity,
    recency,
) -> tuple[Array, Array]:
    """:func:`run_aether_sparse` without its checks."""
    xp = arrays.namespace(query)
    query, means, radii = (xp.cast(x, xp.float32) for x in (query, means, radii))
    alignment = (query[:, :, None, :] * means).sum(-1)
    scores = radar_scores(alignment, xp.norm(query)[..., None], radii, scale, variance=variances, concentration=concentrations)
    blocks = scores.shape[-1]
    age = xp.cast(blocks - 1 - xp.arange(0, blocks, scores), scores.dtype)
    if is_causal:
        scores = add_recency(scores, age, recency_decay, recency)
    if target_sparsity is None:
        mask = scores > threshold
    else:
        keep = target_blocks(xp.full((1,), blocks, xp.int64, scores), target_sparsity)
        _, order = xp.sort_descending(scores, -1)
        mask = xp.inverse_permutation(order, -1) < keep
    return (mask | (age < local_window) if is_causal else mask), scores
