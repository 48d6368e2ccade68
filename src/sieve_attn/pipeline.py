"""The data flow, one call per stage: read this first.

    key -> geometry -> scores -> selection (+ forced pattern) -> attend -> output (+ lse) -> certificate

A key arrives here, is summarised into its block's Geometry, the block is scored against a query tile, selected or not, and
if selected is read once by ``attend``; if not, it leaves its bound in the Certificate.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from sieve_attn import arrays, checks, dispatch
from sieve_attn import geometry as stage_geometry
from sieve_attn.attend import far_field as far
from sieve_attn.attend import streaming
from sieve_attn.certify import certify
from sieve_attn.certify.reference import require_full_precision
from sieve_attn.policies import FAR_FIELD_BOUND, FAR_FIELD_STATISTICS, Policy
from sieve_attn.selection import RunningMaximum, native_scan
from sieve_attn.selection import native as gate
from sieve_attn.selection import triton as device_gate
from sieve_attn.selection.counting import count_keys
from sieve_attn.selection.reference import Tiles, choose
from sieve_attn.types import Blocks, Call, Certificate, Fallback, Geometry, Ranges, Report, Rows, Scores, Selection, Statistics

Array = Any

DENSE = Policy()


def attention(
    query: Array,
    key: Array,
    value: Array,
    policy: Policy | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Array | None = None,
    key_mask: Array | None = None,
    bias: Array | None = None,
    softcap: float | None = None,
    geometry: Geometry | None = None,
    selection: Selection | None = None,
    cu_seqlens: Array | None = None,
    per_query: bool = False,
    backend: str = "auto",
    return_lse: bool = False,
    return_report: bool = False,
    sink: Array | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Any:
    """Attention over the keys that ``policy`` keeps: ``softmax(cap(scale * q k^T) + bias) v`` restricted to the selection.

    query [batch, q_heads, q_len, dim]; key, value [batch, kv_heads, kv_len, dim | v_dim]; ``q_heads % kv_heads == 0``.
    ``scale`` defaults to ``dim ** -0.5``. Query ``i`` sits at position ``kv_len - q_len + i``. ``mask`` [batch | 1, q_heads | 1,
    q_len, kv_len] and ``key_mask`` [batch, kv_len] are True where a query may attend; ``bias`` is added to the capped logits;
    ``cu_seqlens`` [sequences + 1] packs sequences; ``window`` hides keys that many positions away or farther; ``sink``
    [q_heads] is a logit that takes mass and gives no value. ``per_query``: each row keeps only what it chose itself.
    A ready ``geometry`` or ``selection`` skips the stages before it.

    Returns the output [batch, q_heads, q_len, v_dim], then ``lse`` [batch, q_heads, q_len] with ``return_lse`` and a
    :class:`~sieve_attn.types.Report` with ``return_report``. A query that sees no key gets zeros and ``lse = -inf``.

    Raises ValueError before any work for shapes, dtypes, devices and values that do not fit, TypeError for what is no array
    or no policy; the message names the argument, the rule, the value and a remedy. Source: the pipeline is this library's;
    each policy names its own.

    With ``policy=None`` it equals, for as many queries as keys::

        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    """
    policy = DENSE if policy is None else policy
    checks.policy_like(policy, Policy)
    options = {
        "causal": causal, "scale": scale, "mask": mask, "key_mask": key_mask, "bias": bias, "softcap": softcap,
        "cu_seqlens": cu_seqlens, "sink": sink, "window": window, "dropout": dropout,
    }  # fmt: skip
    if _traced():
        # what is selected depends on the data: compilers and transforms see one operator
        from sieve_attn.torch import compiled

        options |= {"per_query": per_query, "backend": backend, "return_lse": return_lse, "return_report": return_report}
        return compiled(query, key, value, policy.text, geometry=geometry, selection=selection, **options)
    query, key, value = _front_end(query, key, value)
    call = _call(query, key, value, **options)
    checks.holding_values(query)
    if selection is None and not policy.chooses_blocks and policy.keep is not None and call.kv_len >= policy.min_seq_length:
        selection = policy.keep.selection(call.q_len, call.kv_len, causal=causal).beside(query)
    elif selection is not None:
        checks.selection_fits(selection, query, key)
    name, why = dispatch.choose(backend, _request(call, policy, selection))
    seconds, clock = {}, perf_counter()
    fall_back = tuple
    geometry_from = "given" if geometry is not None else "keys"
    counts, selected_by, made = None, "", None
    expands = policy.far_field and (selection is not None or call.kv_len >= policy.min_seq_length)

    if selection is None and call.kv_len < policy.min_seq_length:
        tiles = call.query.shape[0] * call.query.shape[1]
        # without the length itself, so that the steps of a growing cache add up to one line
        short = Fallback(f"fewer keys than min_seq_length {policy.min_seq_length}", tiles)
        fall_back = partial(tuple, (short,))
        selection = _everything(call)
    elif selection is None and not policy.chooses_blocks:
        selection = _everything(call)
    elif selection is None and geometry is None and _nothing_to_choose(call, policy, per_query):
        selection, counts = _every_block(call, policy)
        seconds["selection"], clock = perf_counter() - clock, perf_counter()
    elif selection is None:
        if geometry is None:
            geometry = stage_geometry.build(
                key, policy.block_size, policy.statistics, value=value, key_mask=key_mask, backend=backend
            )
        else:
            checks.geometry_fits(geometry, key, key_mask, policy.block_size, policy.statistics)
        seconds["geometry"], clock = perf_counter() - clock, perf_counter()
        made, selected_by, (selection, counts, dense) = _stream_or_choose(
            call, geometry, policy, per_query, backend, name, return_report
        )
        # how many there are is known on the device: it is asked when somebody reads it
        fall_back = partial(fallbacks, policy, *counts, dense)
        seconds["selection"], clock = perf_counter() - clock, perf_counter()

    field = None
    if expands:
        if geometry is None or not geometry.has(FAR_FIELD_STATISTICS):
            geometry = stage_geometry.build(key, policy.block_size, policy.statistics, value=value, key_mask=key_mask)
        field = far.FarField(geometry, FAR_FIELD_BOUND)
    output, lse = made or _attend(call, selection, name, field)
    seconds["attend"] = perf_counter() - clock

    results = [output]
    if return_lse:
        results.append(lse)
    if return_report:
        kept, visible = counts if counts is not None else count_keys(call, selection)
        results.append(Report(
            policy=policy.text, backend=name, why_backend=why, bound=repr(policy.certifier), kept=kept, visible=visible,
            requested_sparsity=None if policy.selector is None else policy.selector.requested_sparsity,
            selected_by=selected_by, computed=call.shared.get(gate.COMPUTED), fall_back=fall_back, seconds=seconds,
            geometry_from=geometry_from, selection=selection,
            certify=lambda: certificate(call, selection, policy, output, lse, geometry, field, name),
        ))  # fmt: skip
    return results[0] if len(results) == 1 else tuple(results)


def attend(
    query: Array,
    key: Array,
    value: Array,
    selection: Selection,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Array | None = None,
    key_mask: Array | None = None,
    bias: Array | None = None,
    softcap: float | None = None,
    cu_seqlens: Array | None = None,
    sink: Array | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> tuple[Array, Array]:
    """The kernel stage alone: ``(output, lse)`` of ``softmax(cap(scale * q k^T) + bias) v`` over the visible keys of a selection.

    Arrays and options as in :func:`attention`. ``selection`` is what a policy chose (``report.selection``) or a pattern
    (``Window(64).selection(q_len, kv_len)``), made for these lengths. Returns the output [batch, q_heads, q_len, v_dim] in
    the dtype of ``query`` and ``lse`` [batch, q_heads, q_len], the log of the kept mass, in fp32 (fp64 for fp64 inputs).
    Differentiable in both; the kept set is a constant, so pairs that were dropped get exactly zero.

    Raises ValueError for what :func:`attention` refuses and for selections of other lengths, batches or heads, TypeError for
    what is no selection. Source: this library's own stage; FlashAttention's ``(output, lse)``. On one head it equals::

        kept = selection.to_dense(query)[0, 0] & visible                        # [q_len, kv_len]
        logits = (scale * query @ key.T + bias).masked_fill(~kept, -math.inf)
        output, lse = logits.softmax(-1) @ value, logits.logsumexp(-1)
    """
    options = {
        "causal": causal, "scale": scale, "mask": mask, "key_mask": key_mask, "bias": bias, "softcap": softcap,
        "cu_seqlens": cu_seqlens, "sink": sink, "window": window,
    }  # fmt: skip
    if _traced():
        from sieve_attn.torch import compiled_attend

        return compiled_attend(query, key, value, selection, backend=backend, **options)
    query, key, value = _front_end(query, key, value)
    call = _call(query, key, value, dropout=0.0, **options)
    checks.holding_values(query)
    checks.selection_fits(selection, query, key)
    return _attend(call, selection, dispatch.choose(backend, _request(call, DENSE, selection))[0], None)


def _kernels(call: Call, geometry: Geometry, policy: Policy, per_query: bool, backend: str) -> tuple[str, Any]:
    """``(name, module)`` of what chooses for this call: kernels on the device, or in C++ for a few queries or tile by tile, else
    ``reference``, which alone knows every policy, and None."""
    asked = (call, geometry, policy, per_query)
    # most calls are on a CPU, where Triton runs only if it is named
    if backend == "triton" or (backend == "auto" and _device(call.query) != "cpu"):
        device = streaming if isinstance(policy.selector, RunningMaximum) else device_gate
        if not device.why_not(*asked, named=backend == "triton"):
            return "triton", device
    for kernels in (native_scan, gate) if backend != "reference" else ():
        if not kernels.why_not(*asked):
            return "native", kernels
    return "reference", None


def select(call: Call, geometry: Geometry, policy: Policy, *, per_query: bool = False, backend: str = "auto"):
    """Stages 2 and 3: ``(selection, (kept, visible) key counts [batch, heads, tiles], fallbacks)``.

    ``backend="reference"`` goes chunk by chunk through array operations; others take kernels where kernels know the policy.
    """
    selection, counts, dense = _choose(call, geometry, policy, per_query, backend)
    return selection, counts, fallbacks(policy, *counts, dense)


def _choose(call: Call, geometry: Geometry, policy: Policy, per_query: bool, backend: str):
    """``(selection, (kept, visible), tiles that turned dense)``"""
    return _choose_by(_kernels(call, geometry, policy, per_query, backend)[1], call, geometry, policy, per_query)


def _choose_by(kernels: Any, call: Call, geometry: Geometry, policy: Policy, per_query: bool):
    """The same by a module of kernels, or by the reference where that is None."""
    if policy.selector.needs_brackets:
        # a proof made of rounded products would be none
        require_full_precision(arrays.namespace(call.query), call.query)
    if kernels is not None:
        return kernels.select(call, geometry, policy)
    return _select(call, geometry, policy, per_query)


def _stream_or_choose(
    call: Call, geometry: Geometry, policy: Policy, per_query: bool, backend: str, name: str, report: bool
) -> tuple[tuple[Array, Array] | None, str, tuple]:
    """``(output and lse or None, who chose, what _choose returns)``: one kernel does both where no gradient is wanted, and lists
    what it read for a ``report`` alone."""
    who, kernels = _kernels(call, geometry, policy, per_query, backend)
    if name != "triton" or kernels is not streaming:
        return None, who, _choose_by(kernels, call, geometry, policy, per_query)
    from sieve_attn.attend import torch_op

    require_full_precision(arrays.namespace(call.query), call.query)
    if not torch_op.nobody_watches(call):
        return None, who, _choose_by(kernels, call, geometry, policy, per_query)
    output, lse, chosen = streaming.attend(call, geometry, policy, marked=report)
    return (output, lse), who, chosen() if report else (None, (None, None), None)


def fallbacks(policy: Policy, kept: Array, visible: Array, dense: Array) -> tuple[Fallback, ...]:
    """Where the policy turned dense on its own."""
    if not policy.selector.may_turn_dense:
        return ()
    turned = int(dense.sum())
    reason = f"{type(policy.selector).__name__} would keep more than dense_above={policy.dense_above} of a tile"
    fallbacks = (Fallback(reason, turned),) if turned else ()
    whole = int(((kept == visible) & (visible > 0)).sum()) - turned
    if policy.selector.needs_brackets and whole:
        fallbacks += (Fallback("the proof needed every visible block of a tile", whole),)
    return fallbacks


def _nothing_to_choose(call: Call, policy: Policy, per_query: bool) -> bool:
    """Whether all blocks that a tile sees are kept, which lengths alone tell: as many as a rank selector wants at least."""
    if per_query or not call.q_len or not policy.takes_all(call.kv_len) or _device(call.query) != "cpu":
        return False
    return call.window is None and all(getattr(call, name) is None for name in ("mask", "key_mask", "bias", "cu_seqlens"))


def _every_block(call: Call, policy: Policy) -> tuple[Selection, tuple[Array, Array]]:
    """``(selection, (kept, visible) key counts [batch, heads, tiles])`` of every block that some query of a tile sees."""
    xp, like = arrays.namespace(call.query), call.query
    batch, heads = like.shape[0], call.key.shape[1] if policy.share_group else like.shape[1]
    lead = call.lead(policy.query_tile)
    tiles, units = -(-(call.q_len + lead) // policy.query_tile), batch * heads
    last = call.offset + np.minimum((np.arange(tiles) + 1) * policy.query_tile - lead, call.q_len)
    seen = np.clip(last, 0, call.kv_len) if call.causal else np.full(tiles, call.kv_len)
    blocks = -(-seen // policy.block_size)
    ends = blocks.cumsum()
    row_ptr = np.append(0, np.arange(units)[:, None] * ends[-1] + ends)
    index = np.tile(np.concatenate([np.arange(n, dtype=np.int32) for n in blocks]), units)
    count = xp.asarray(np.tile(seen, units).reshape(batch, heads, tiles), xp.int64, like)
    part = Blocks(
        xp.asarray(row_ptr, xp.int64, like), xp.asarray(index, xp.int32, like), batch, heads, call.q_len, call.kv_len,
        policy.query_tile, policy.block_size, lead,
    )  # fmt: skip
    return Selection((part,)), (count, count)


def _select(call: Call, geometry: Geometry, policy: Policy, per_query: bool):
    """The reference: ``(selection, (kept, visible), tiles that turned dense)``, chunk by chunk."""
    xp = arrays.namespace(call.query)
    heads = call.key.shape[1] if policy.share_group else call.query.shape[1]
    parts = []
    with xp.no_grad():
        for start, stop in call.chunks(policy.query_tile):
            seen = call.kv_stop(stop, policy.block_size)
            rows, front = call.rows(start, stop, seen), far.front(geometry, seen)
            tiles = Tiles(stop - start, call.lead(policy.query_tile) if start == 0 else 0, policy.query_tile)
            scores = _score(call, policy, rows, front, start, None if per_query else tiles)
            chosen = choose(
                scores,
                rows,
                front,
                policy.selector,
                policy.keep,
                tiles=tiles,
                heads=heads,
                per_query=per_query,
                dense_above=policy.dense_above,
                rescore=lambda rows=rows, front=front: policy.scorer.score(rows, front).estimate,
            )
            missing = geometry.blocks - front.blocks
            wide = xp.pad_end(chosen.tiles, 3, missing, False)
            by_row = None if chosen.rows is None else xp.pad_end(chosen.rows, 3, missing, False)
            parts.append(replace(chosen, tiles=wide, rows=by_row))
    joined = {f: xp.concat([getattr(p, f) for p in parts], 2) for f in ("tiles", "kept", "visible", "dense_tiles")}
    rows = xp.concat([p.rows for p in parts], 2) if per_query else None
    blocks = Blocks.from_tiles(
        joined["tiles"],
        rows=rows,
        q_len=call.q_len,
        kv_len=call.kv_len,
        q_block=policy.query_tile,
        kv_block=policy.block_size,
        lead=call.lead(policy.query_tile),
    )
    return Selection((blocks,)), (joined["kept"], joined["visible"]), joined["dense_tiles"]


def _score(call: Call, policy: Policy, rows: Rows, front: Geometry, start: int, tiles: Tiles | None) -> Scores:
    """Stage 2 on the chunk of queries that begins with ``start``."""
    if tiles is None:
        return policy.scorer.score(rows, front, brackets=policy.selector.needs_brackets)
    return score_rows(
        call, policy, rows, front, arrays.namespace(call.query).arange(start, start + tiles.rows, call.query), tiles
    )


def score_rows(call: Call, policy: Policy, rows: Rows, front: Geometry, number: Array, tiles: Tiles) -> Scores:
    """Stage 2 on the queries ``number`` [rows]. Those that the policy's stride passes over score -inf and cost nothing."""
    xp = arrays.namespace(call.query)
    if policy.query_stride == 1 or policy.selector.every_query:
        return policy.scorer.score(rows, front, brackets=policy.selector.needs_brackets)
    looked = tiles.looked_at(policy.query_stride, call.query)
    found = policy.scorer.score(call.rows_at(number[looked], rows.visible.shape[-1]), front).estimate
    every = xp.full((*found.shape[:2], rows.query.shape[2], found.shape[3]), -math.inf, found.dtype, found)
    return Scores(xp.put_along(every, 2, looked, found))


def certificate(
    call: Call,
    selection: Selection,
    policy: Policy,
    output: Array,
    lse: Array,
    geometry: Geometry | None = None,
    field: Any = None,
    backend: str = "reference",
) -> Certificate:
    """Stage 5: the certificate of what a call dropped, by the policy's bound, with value statistics for the output error."""
    xp = arrays.namespace(call.query)
    asked = policy.certifier.proof_statistics | Statistics(value=True)
    if field is not None:
        asked = asked | FAR_FIELD_STATISTICS
    if geometry is not None and xp.waits(call.key):
        checks.geometry_counts(geometry, call.key, call.key_mask)
    if geometry is None or not geometry.has(asked):
        geometry = stage_geometry.build(call.key, policy.block_size, asked, value=call.value, key_mask=call.key_mask)
    rounding = dispatch.module(backend).ROUNDING
    if field is not None:
        # the far field's own mass is an estimate: K is what was really read
        lse = _attend(call, selection, backend, None)[1]
        field = far.FarField(geometry, FAR_FIELD_BOUND)
    return certify(call, selection, geometry, policy.certifier, xp.detach(lse), xp.detach(output), field, rounding)


def _everything(call: Call) -> Selection:
    return Selection((Ranges(call.q_len, call.kv_len, prefix=call.kv_len),))


def _attend(call: Call, selection: Selection, backend: str, field: Any) -> tuple[Array, Array]:
    if arrays.namespace(call.query).name == "torch":
        # autograd and torch.compile see one operator whatever the backend
        from sieve_attn.attend import torch_op

        return torch_op.attend(call, selection, backend, field)
    return dispatch.module(backend).attend(call, selection, field)


def _traced() -> bool:
    """Under ``torch.compile``, or under a transform of ``torch.func``, whose tensors kernels cannot read."""
    torch = sys.modules.get("torch")
    return torch is not None and (torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None)


def _front_end(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """What a framework does to arrays before any check: autocast casts q, k and v together."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x is None:
            raise checks.error(name, "must be an array", "None", "pass a tensor or a NumPy array", TypeError)
    xp = arrays.namespace(query, key, value)
    return xp.autocast(query, key, value)


def _call(query, key, value, *, scale, dropout, **options) -> Call:
    xp = arrays.namespace(query, key, value)
    checks.qkv(query, key, value, xp=xp)
    checked = ("mask", "key_mask", "bias", "softcap", "cu_seqlens", "sink", "window")
    checks.attention_options(query, key, scale=scale, dropout=dropout, xp=xp, **{name: options[name] for name in checked})
    if options["cu_seqlens"] is not None:
        options["cu_seqlens"] = xp.asarray(options["cu_seqlens"], xp.int64, query)
    return Call(query, key, value, scale=scale or 1.0 / math.sqrt(query.shape[3]), **options)


def _request(call: Call, policy: Policy, selection: Selection | None) -> dispatch.Request:
    framework, device = arrays.namespace(call.query).name, _device(call.query)
    kinds = selection.kinds if selection is not None else ("Blocks",) if policy.chooses_blocks else ("Ranges",)
    dims = (int(call.query.shape[3]), int(call.value.shape[3]))
    return dispatch.Request(framework, device, str(call.query.dtype).rpartition(".")[2], *dims, policy.far_field, kinds)


def _device(x: Array) -> str:
    return str(getattr(x, "device", "cpu")).partition(":")[0]
