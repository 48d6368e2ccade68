"""Stage 5 on JAX arrays: what a call dropped, bounded by the shared formulas, a chunk of queries at a time.

Inside ``jit`` a certificate is traced where it is read and costs nothing where it is not; outside it is compiled when first read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sieve_attn.arrays import jax_ops as xp
from sieve_attn.attend.far_field import FarField
from sieve_attn.attend.native import ROUNDING
from sieve_attn.bounds import FP32
from sieve_attn.certify.reference import certify_rows, require_full_precision
from sieve_attn.jax import call as front
from sieve_attn.jax import geometry as stage_geometry
from sieve_attn.jax import stages
from sieve_attn.jax.selection import STATIC, PaddedBlocks
from sieve_attn.policies import FAR_FIELD_BOUND, FAR_FIELD_STATISTICS, Policy
from sieve_attn.scores import KeySketch
from sieve_attn.scores.key_sketch import decoded_keys
from sieve_attn.types import Call, Certificate, Geometry, Selection, Statistics
from sieve_attn.types.call import CHUNK_BYTES

jax.tree_util.register_dataclass(Certificate, ["dropped_mass", "output_error"], ["bound", "kind", "confidence"])


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Evidence:
    """What a certificate is made from: the arrays of the call, what it returned, and what chose."""

    arrays: dict[str, jax.Array]
    output: jax.Array
    lse: jax.Array
    geometry: Geometry | None
    selection: PaddedBlocks | None
    settled: tuple = field(metadata=STATIC)
    policy: Policy = field(metadata=STATIC)
    backend: str = field(metadata=STATIC)
    chosen: Selection | None = field(default=None, metadata=STATIC)
    expands: bool = field(default=False, metadata=STATIC)  # whether the output holds a far field


@jax.jit
def certify(evidence: Evidence) -> Certificate:
    """The certificate of a call; of every call where ``vmap`` or ``scan`` put calls side by side."""
    run = _certify
    for _ in range(evidence.output.ndim - 4):
        run = jax.vmap(run)
    return run(evidence)


def _certify(evidence: Evidence) -> Certificate:
    evidence = jax.lax.stop_gradient(evidence)
    policy, expands = evidence.policy, evidence.expands
    bound, selection = policy.certifier, evidence.selection if evidence.chosen is None else evidence.chosen
    call = front.put_together(evidence.arrays, evidence.settled)
    asked = bound.proof_statistics | Statistics(value=True)
    asked = asked | FAR_FIELD_STATISTICS if expands else asked
    geometry, lse = evidence.geometry, evidence.lse
    if geometry is None:
        geometry = stage_geometry.build(call.key, policy.block_size, asked, call.value, call.present)
    field = None
    if expands:
        from sieve_attn.jax import gather

        # the far field's own mass is an estimate: K is what was really read
        lse, field = gather.attend(call, selection)[1], FarField(geometry, FAR_FIELD_BOUND)
    rounding = ROUNDING if evidence.backend == "native" else FP32
    with xp.no_grad():
        require_full_precision(xp, call.query)
        dropped, wrong = _by_chunks(call, selection, geometry, bound, lse, evidence.output, field, rounding)
    return Certificate(dropped, repr(bound), wrong)


def _by_chunks(call: Call, selection: Any, geometry: Geometry, bound: Any, lse, output, field, rounding) -> tuple:
    batch, heads, q_len, _ = call.query.shape
    row = batch * heads * call.kv_len * xp.itemsize(xp.compute_dtype(call.query))
    step = max(1, min(q_len, CHUNK_BYTES // max(row, 1)))
    chunks = -(-q_len // step)
    numbers = np.minimum(np.arange(chunks * step), q_len - 1).reshape(chunks, step).astype(np.int32)
    reached = jnp.asarray(_reached(call, geometry.block_size)[numbers])
    tiles = stages.tiles_in(selection)
    if geometry.sketch is not None:
        # decoded once, in front of the loop
        for bits in {geometry.sketch.bits, *(min(b.bits, geometry.sketch.bits) for b in [bound] if isinstance(b, KeySketch))}:
            decoded_keys(call.rows_at(jnp.asarray(numbers[0, :1])), geometry, bits)
    shared = dict(call.shared)

    def one(given):
        number, keys = given
        # what chunks share must not outlive the trace of this one
        mine = replace(call, shared=dict(shared))
        rows = mine.rows_at(number)
        kept = stages.kept_by(selection, call, number, rows.position, tiles)
        taken = (x[:, :, number] for x in (lse, output))
        return certify_rows(rows, geometry, kept, *taken, bound, mine, field, rounding, keys)

    parts = jax.lax.map(one, (jnp.asarray(numbers), reached))
    return tuple(jnp.moveaxis(x, 0, 2).reshape(batch, heads, -1)[:, :, :q_len] for x in parts)


def _reached(call: Call, block_size: int) -> np.ndarray:
    """[q_len] how many keys the sums of each query's chunk run over where chunks end with what they see, as they do elsewhere."""
    reached = np.full(call.q_len, call.kv_len, np.int32)
    if call.kv_length is None:
        for start, stop in call.chunks():
            reached[start:stop] = call.kv_stop(stop, block_size)
    return reached
