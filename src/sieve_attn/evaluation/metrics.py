"""Sparse attention against dense attention: one function a metric, on torch or NumPy arrays, fp64 inside.

``p`` [..., kv_len] are dense softmax probabilities, ``q`` those of sparse attention over the kept keys ``S``:
``q_j = p_j / (1 - delta)`` on S and 0 elsewhere, with ``delta = sum of p_j over the dropped keys``, the *dropped mass*. All
that compares p with q is then a function of delta: ``TV(p, q) = delta`` and ``KL(q || p) = -log(1 - delta)``; ``KL(p || q)`` is
infinite as soon as anything is dropped, which is why published tables clamp it. Every function reduces the last axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sieve_attn import arrays
from sieve_attn.checks import error, positive_int, shape_of, share

Array = Any

CLAMP = 1e-10  # the floor of the published KL(dense || sparse)


def cosine(dense: Array, sparse: Array) -> Array:
    """``<o, o'> / (||o|| ||o'||)`` of outputs [..., v_dim]; 1 where both are zero, 0 where one is."""
    xp, dense, sparse = _wide(dense, sparse)
    norms = xp.norm(dense) * xp.norm(sparse)
    both = (xp.norm(dense) == 0) & (xp.norm(sparse) == 0)
    angle = (dense * sparse).sum(-1) / xp.where(norms == 0, 1.0, norms)
    return xp.where(both, xp.cast(both, xp.float64), angle)


def relative_l2(dense: Array, sparse: Array) -> Array:
    """``||o - o'|| / ||o||`` of outputs [..., v_dim]; 0 where both are zero, infinite where only the dense one is."""
    xp, dense, sparse = _wide(dense, sparse)
    distance, norm = xp.norm(dense - sparse), xp.norm(dense)
    ratio = xp.where(norm == 0, math.inf, distance / xp.where(norm == 0, 1.0, norm))
    return xp.where(distance == 0, 0.0, ratio)


def dropped_mass(p: Array, kept: Array) -> Array:
    """``delta``: the dense mass of the keys outside ``kept`` [..., kv_len] bool. Summed directly, so tiny values survive."""
    xp, p = _wide(p)
    return xp.where(kept, 0.0, p).sum(-1)


def total_variation(p: Array, q: Array) -> Array:
    """``TV = sum |p - q| / 2``; equal to the dropped mass when ``q`` is sparse attention."""
    xp, p, q = _wide(p, q)
    return xp.maximum(p - q, 0.0).sum(-1) / 2 + xp.maximum(q - p, 0.0).sum(-1) / 2


def kl_divergence(p: Array, q: Array) -> Array:
    """``KL(p || q) = sum p log(p / q)`` in nats; infinite where ``q`` is 0 under some ``p > 0``."""
    xp, p, q = _wide(p, q)
    there = p > 0
    ratio = xp.log(xp.where(there, p, 1.0)) - xp.log(xp.where(there & (q > 0), q, 1.0))
    each = xp.where(there, xp.where(q > 0, p * ratio, math.inf), 0.0)
    return each.sum(-1)


def kl_of_dropping(delta: Array) -> Array:
    """``KL(sparse || dense) = -log(1 - delta)`` in nats, from the dropped mass alone; infinite at 1."""
    xp, delta = _wide(delta)
    whole = delta >= 1
    return xp.where(whole, math.inf, -xp.log1p(-xp.where(whole, 0.0, delta)))


def clamped_kl(p: Array, q: Array, floor: float = CLAMP) -> Array:
    """The published ``KL(dense || sparse)``: ``sum p log(max(p, floor) / max(q, floor))`` in nats.

    Its value is set by ``floor``: about ``delta * log(1 / floor)`` for the dropped keys. Comparable between runs with one
    floor only.
    """
    xp, p, q = _wide(p, q)
    if not 0 < floor < 1:
        raise error("floor", "must lie in (0, 1)", floor, "the published one is 1e-10")
    return (p * (xp.log(xp.maximum(p, floor)) - xp.log(xp.maximum(q, floor)))).sum(-1)


def entropy(p: Array) -> Array:
    """``-sum p log p`` in nats."""
    xp, p = _wide(p)
    return -xp.where(p > 0, p * xp.log(xp.where(p > 0, p, 1.0)), 0.0).sum(-1)


def block_mass(p: Array, block_size: int) -> Array:
    """[..., blocks] the mass of each block of ``block_size`` keys; a ragged last block counts what it has."""
    positive_int("block_size", block_size, "try 16 or 64")
    xp, p = _wide(p)
    blocks = -(-p.shape[-1] // block_size)
    padded = xp.pad_end(p, len(p.shape) - 1, blocks * block_size - p.shape[-1], 0.0)
    return padded.reshape(*p.shape[:-1], blocks, block_size).sum(-1)


def important_blocks(mass: Array, important: str | float = 0.9, visible: Array | None = None) -> Array:
    """Which blocks matter to a query, from their ``mass`` [..., blocks]: bool of the same shape.

    ``important=0.9``: the smallest set that holds 90 % of the query's mass (ties to the smaller index).
    ``important="above_median"``: the published definition, mass strictly above the median of the visible blocks. Half of all
    blocks are important then, whatever the attention looks like, so that recall cannot exceed ``(1 - sparsity) / 0.5``.
    """
    xp, mass = _wide(mass)
    visible = xp.full(tuple(mass.shape), True, xp.boolean, mass) if visible is None else visible
    mass = xp.where(visible, mass, -math.inf)
    ordered, order = xp.sort_descending(mass, -1)
    if important == "above_median":
        count = xp.total(visible, -1, xp.int64)[..., None]
        # the lower of the two middle blocks of an even number: exactly half lie above it
        median = xp.take_along(ordered, xp.minimum(count // 2, mass.shape[-1] - 1), -1)
        return visible & (mass > median)
    if isinstance(important, str):
        raise error("important", "must be a share of the mass or 'above_median'", repr(important), "try 0.9")
    wanted = share("important", important, "0.9 asks for the blocks that hold 90 % of the mass")
    mass_of = xp.where(xp.isfinite(ordered), ordered, 0.0)
    before = xp.cumsum(mass_of, -1) - mass_of
    needed = (before < wanted * mass_of.sum(-1)[..., None]) & (mass_of > 0)
    return xp.take_along(needed, xp.inverse_permutation(order, -1), -1)


def precision_recall(kept: Array, important: Array) -> tuple[Array, Array]:
    """``(|kept & important| / |kept|, |kept & important| / |important|)`` of blocks [..., blocks]; 1 where the divisor is 0."""
    xp = arrays.namespace(kept, important)
    both, mine, theirs = (xp.cast(xp.total(x, -1, xp.int64), xp.float64) for x in (kept & important, kept, important))
    return tuple(xp.where(n == 0, 1.0, both / xp.maximum(n, 1.0)) for n in (mine, theirs))


def kv_bytes_not_read(kept: Array, visible: Array, head_dim: int, v_dim: int, itemsize: int) -> Array:
    """``(visible - kept) * (head_dim + v_dim) * itemsize``: bytes of keys and values not loaded; counts are keys per KV head."""
    return (visible - kept) * ((head_dim + v_dim) * itemsize)


def theoretical_speedup(sparsity: float) -> float:
    """``1 / (1 - sparsity)``: what skipping alone could give if choosing cost nothing."""
    share("sparsity", sparsity, "pass achieved sparsity, 1 - density")
    return math.inf if sparsity == 1 else 1.0 / (1.0 - sparsity)


def measured_speedup(dense_seconds: float, sparse_seconds: float) -> float:
    """``dense / sparse`` wall time, choosing included; below 1 sparse was slower."""
    for name, seconds in (("dense_seconds", dense_seconds), ("sparse_seconds", sparse_seconds)):
        if not seconds > 0:
            raise error(name, "must be a positive time", seconds, "measure more steps")
    return dense_seconds / sparse_seconds


def next_token_agreement(dense_logits: Array, sparse_logits: Array) -> Array:
    """Whether both logits [..., vocabulary] have the same most likely token (ties to the smaller id)."""
    xp = arrays.namespace(dense_logits, sparse_logits)
    return xp.argmax(dense_logits, -1) == xp.argmax(sparse_logits, -1)


@dataclass(frozen=True)
class Metrics:
    """All metrics by name: ``per_head`` [batch, heads], the mean over queries, and ``mean`` over everything."""

    per_head: dict[str, Array]
    mean: dict[str, float]


def evaluate(
    p: Array,
    kept: Array,
    dense: Array,
    sparse: Array,
    *,
    block_size: int,
    important: str | float = 0.9,
    visible: Array | None = None,
) -> Metrics:
    """Every metric of one attention call, per head and aggregated.

    ``p`` [batch, heads, q_len, kv_len] dense probabilities; ``kept`` and ``visible`` (default: where ``p > 0``) bool,
    broadcasting to it; ``dense``, ``sparse`` [batch, heads, q_len, v_dim] outputs. A block is kept if one of its visible keys
    is. Raises ValueError if the shapes do not fit.
    """
    xp, p = _wide(p)
    if len(p.shape) != 4 or shape_of(dense)[:3] != shape_of(p)[:3] or shape_of(dense) != shape_of(sparse):
        raise error(
            "p, dense, sparse",
            "must be [batch, heads, q_len, kv_len] and twice [batch, heads, q_len, v_dim]",
            f"shapes {shape_of(p)}, {shape_of(dense)}, {shape_of(sparse)}",
            "pass full probabilities and both outputs",
        )
    visible = xp.broadcast_to(p > 0 if visible is None else visible, tuple(p.shape))
    kept = xp.broadcast_to(kept, tuple(p.shape)) & visible
    delta = dropped_mass(p, kept)
    rest = xp.where(kept, p, 0.0).sum(-1)[..., None]
    q = xp.where(kept, p, 0.0) / xp.where(rest == 0, 1.0, rest)
    seen_blocks, kept_blocks = (block_mass(xp.cast(x, xp.float64), block_size) > 0 for x in (visible, kept))
    precision, recall = precision_recall(kept_blocks, important_blocks(block_mass(p, block_size), important, seen_blocks))
    counts = [xp.cast(xp.total(x, -1, xp.int64), xp.float64) for x in (kept, visible)]
    rows = {
        "cosine": cosine(dense, sparse), "relative_l2": relative_l2(dense, sparse), "total_variation": delta,
        "kl_sparse_dense": kl_of_dropping(delta), "kl_dense_sparse_clamped": clamped_kl(p, q),
        "precision": precision, "recall": recall, "entropy_change": entropy(q) - entropy(p),
        "sparsity": 1.0 - counts[0] / xp.maximum(counts[1], 1.0),
    }  # fmt: skip
    per_head = {name: x.sum(-1) / x.shape[-1] for name, x in rows.items()}
    mean = {name: float(x.sum()) / (x.shape[0] * x.shape[1]) for name, x in per_head.items()}
    return Metrics(per_head, mean | {"theoretical_speedup": theoretical_speedup(mean["sparsity"])})


def _wide(*given: Array) -> tuple:
    """``(namespace, the arrays in fp64)``."""
    xp = arrays.namespace(*given)
    return xp, *(xp.cast(x, xp.float64) for x in given)
