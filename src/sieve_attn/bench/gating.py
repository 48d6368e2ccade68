"""``gate`` and ``decode``: whole calls with a policy, choosing included, and what choosing takes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from sieve_attn import geometry as stage_geometry
from sieve_attn import pipeline, policies
from sieve_attn.bench import peers, timing, truth
from sieve_attn.bench.cases import Case
from sieve_attn.bench.inputs import KEYS, density_of, inputs, random_blocks
from sieve_attn.bench.prepared import Prepared, moved, which_backend
from sieve_attn.bench.settings import Settings
from sieve_attn.layers.growing import GrowingArrays
from sieve_attn.pipeline import attend, attention
from sieve_attn.types import Call, Geometry

DENSE_LIMIT = 1 << 18  # dense attention beyond takes a quarter of an hour a call
CHECKED_LENGTH = 1 << 16  # the reference chooses for one tile that ends here
LEAST_OVERLAP = 0.9  # kernels may round queries and scores: blocks that nearly tie may swap


def gate(case: Case, settings: Settings) -> Prepared:
    """One causal call; the report's own clock says what choosing (geometry, scores, selection) and attending took."""
    host = inputs(case, settings.seed)
    query, key, value = moved(host, settings.device)
    policy = policies.parse(case.policy)
    notes = [case.policy, f"keys `{case.keys}`: {KEYS[case.keys].__doc__.partition(chr(10))[0]}"]

    # where a policy turns dense, counting what is visible takes longer than the call
    turns_dense = case.kv_len < policy.min_seq_length

    def call(report: bool = not turns_dense) -> Any:
        options = {"causal": True, "backend": settings.backend, "return_lse": True}
        return attention(query, key, value, policy, return_report=report, **options)

    def check(result: Any) -> tuple[str, dict[str, Any]]:
        output, lse, report = result
        wrong, dropped = truth.check_attention(*moved((output, lse), "cpu"), *host, moved(report.selection, "cpu"), causal=True)
        wrong = wrong or check_promise(policy, dropped) or check_choice(report, policy, *host)
        density = report.density
        return wrong, {"density": density, "ideal": 1.0 / density, "dropped_mass": dropped, "backend": report.backend}

    def chosen() -> Any:
        made = stage_geometry.build(key, policy.block_size, policy.statistics, backend=settings.backend)
        whole = Call(query, key, value, causal=True, scale=case.dim**-0.5)
        return pipeline._choose(whole, made, policy, False, settings.backend)

    others = peers.dense(query, key, value, True)
    if case.q_len >= DENSE_LIMIT:
        others = {
            name: lambda: peers.Peer(why=f"not run at {case.q_len:,} tokens, a quarter of an hour a call") for name in others
        }
    found = Prepared(call, check, others, notes=tuple(notes))
    if settings.device != "cpu":
        # nothing waits for the device inside of a call, so that its own clock knows nothing: choosing is timed once more
        return replace(
            found, call=partial(call, False), first=partial(call, True), beside={} if turns_dense else {"gate": chosen}
        )
    return replace(found, first=lambda: call(True)) if turns_dense else replace(found, parts=lambda result: split(result[2]))


def split(report: Any) -> dict[str, float]:
    """Seconds of choosing and of attending."""
    chosen = report.seconds.get("geometry", 0.0) + report.seconds.get("selection", 0.0)
    return {"gate": chosen, "attend": report.seconds["attend"]}


def check_promise(policy: policies.Policy | None, dropped: float) -> str:
    """What is wrong with the mass that a policy with a proof dropped. Such policies may choose as they like within it."""
    if policy is None or policy.selector is None or not policy.selector.needs_brackets:
        return ""
    error = policy.selector.error
    return "" if dropped <= error * (1 + 1e-4) + 1e-6 else f"{dropped:.4f} of a softmax is dropped, at most {error:g} is promised"


def check_choice(report: Any, policy: policies.Policy, query: Tensor, key: Tensor, value: Tensor) -> str:
    """What is wrong with the blocks of the last tile (of the last before 65,536), which the reference chooses once more."""
    blocks = report.selection.blocks
    if blocks is None or report.backend == "reference" or policy.selector.needs_brackets:
        return ""
    stop = min(query.shape[2], CHECKED_LENGTH)
    start = (stop - 1) // policy.query_tile * policy.query_tile
    q, k, v = query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop]
    again = attention(q, k, v, policy, causal=True, backend="reference", return_report=True)[1].selection.blocks
    return overlap(_row(blocks, start), _row(again, 0))


def _row(blocks: Any, query: int) -> set[tuple[int, int]]:
    """(head, block) pairs that a query of sequence 0 keeps."""
    tile, found = (query + blocks.lead) // blocks.q_block, set()
    for head in range(blocks.heads):
        start, stop = blocks.row_ptr[head * blocks.tiles + tile :][:2].tolist()
        found |= {(head, block) for block in blocks.block_index[start:stop].tolist()}
    return found


def overlap(mine: set, theirs: set) -> str:
    """What is wrong with a choice that should be ``theirs``: too little in common."""
    shared = len(mine & theirs) / max(1, len(mine | theirs))
    return "" if shared >= LEAST_OVERLAP else f"the choice shares {shared:.0%} with the reference's, at least 90 % are asked for"


def decode(case: Case, settings: Settings) -> Prepared:
    """One step against a cache. Its geometry exists before, as it streams along; scan, choice and attending are timed."""
    host = inputs(case, settings.seed)
    query, *held = moved(host, settings.device)
    key, value = cached(*held)
    policy = None if case.policy is None else policies.parse(case.policy)
    selection = geometry = None
    if policy is not None:
        geometry = stage_geometry.build(key, case.block, policy.statistics)
    elif case.density is not None:
        selection = random_blocks(
            settings.seed, case.density, heads=case.kv_heads, q_len=1, kv_len=case.kv_len, block=case.block, q_block=1,
            causal=False,
        )  # fmt: skip
        exact, selection = selection, moved(selection, settings.device)
    options = {"backend": settings.backend}

    def call() -> Any:
        if selection is not None:
            return *attend(query, key, value, selection, **options), None
        if policy is None:
            return *attention(query, key, value, return_lse=True, **options), None
        return attention(query, key, value, policy, geometry=geometry, return_lse=True, return_report=True, **options)

    def unasked() -> Any:
        # a report looks at what was chosen: on a GPU that is no part of a step
        return call() if policy is None else attention(query, key, value, policy, geometry=geometry, **options)

    def check(result: Any) -> tuple[str, dict[str, Any]]:
        output, lse, report = result
        chosen = (None if selection is None else exact) if report is None else moved(report.selection, "cpu")
        density = 1.0 if chosen is None else density_of(chosen, False) if report is None else report.density
        backend = which_backend(query, key, value, settings.backend) if report is None else report.backend
        wrong, dropped = truth.check_attention(*moved((output, lse), "cpu"), *host, chosen, causal=False)
        wrong = wrong or check_promise(policy, dropped)
        if not wrong and backend != "reference" and policy is not None and not policy.selector.needs_brackets:
            reference = attention(query, key, value, policy, geometry=geometry, backend="reference", return_report=True)[1]
            wrong = overlap(_row(chosen.blocks, 0), _row(reference.selection.blocks, 0))
        size = density * (key.nbytes + value.nbytes) + (0 if policy is None else scan_bytes(geometry, policy))
        fields = {"density": density, "bytes_mb": size / 1e6, "floor_ms": size / speed / 1e6}
        return wrong, fields | {"dropped_mass": None if policy is None else dropped, "backend": backend}

    def flex() -> peers.Peer:
        whole = random_blocks(0, 1.0, heads=1, q_len=1, kv_len=case.kv_len, block=64, q_block=1, causal=False)
        return peers.flex(query, key, value, selection or moved(whole, settings.device), False, check_flex)

    def check_flex(output: Tensor) -> str:
        return truth.check_attention(moved(output, "cpu"), None, *host, None if selection is None else exact, causal=False)[0]

    others = peers.dense(query, key, value, False) | ({} if policy is not None else {"flex": flex})
    speed, how = bandwidth(case.threads, settings.device)
    reader = settings.device if settings.device != "cpu" else f"{case.threads} thread{'s' if case.threads > 1 else ''}"
    notes = [f"read bandwidth, {reader}: {speed:.1f} GB/s ({how})"]
    notes += [] if policy is None else [case.policy]
    if policy is not None and case.name.startswith("certified"):
        notes.append(f"the scan's bytes are those of one bit plane and the errors; {needed(*host[:2], 0.95)}")
    if settings.device != "cpu":
        return Prepared(unasked, check, others, first=call, notes=tuple(notes))
    return Prepared(call, check, others, parts=lambda r: {} if r[2] is None else split(r[2]), notes=tuple(notes))


def cached(key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Keys and values as the cache of a sparse model holds them: in buffers with room behind, on large pages."""
    widths = (key.shape[3], value.shape[3])
    return GrowingArrays.empty(*key.shape[:2], widths, key.device, key.dtype).append((key, value)).arrays


def scan_bytes(geometry: Geometry, policy: policies.Policy) -> int:
    """What choosing must read at least: the summaries, or the planes of the scorer (one, where planes are read progressively)."""
    sketch = geometry.sketch
    if sketch is None:
        return geometry.mean.nbytes + (0 if geometry.radius is None else geometry.radius.nbytes)
    if policy.selector.needs_brackets:
        errors = (sketch.error, sketch.metric_error, sketch.spectral, sketch.metric_spectral)
        return sketch.planes[0].nbytes + sketch.scale.nbytes + sum(x.nbytes for x in errors if x is not None)
    return sketch.planes[: policy.scorer.bits].nbytes + sketch.scale.nbytes + sketch.channel_scale.nbytes


def needed(query: Tensor, key: Tensor, mass: float, block: int = 16) -> str:
    """How many blocks an oracle keeps: the fewest that hold ``mass`` of each query, the union over a group."""
    group, shares = query.shape[1] // key.shape[1], []
    for head in range(key.shape[1]):
        logits = query[0, head * group : (head + 1) * group, 0].float() @ key[0, head].float().T * query.shape[-1] ** -0.5
        weight = torch.nn.functional.pad(torch.softmax(logits, -1), (0, -key.shape[2] % block)).unflatten(-1, (-1, block)).sum(-1)
        ordered, order = weight.sort(-1, descending=True)
        kept = (ordered.cumsum(-1) - ordered < mass).gather(-1, order.argsort(-1))
        shares.append(kept.any(0).float().mean().item())
    return f"an oracle needs {sum(shares) / len(shares):.1%} of the blocks"


@lru_cache
def bandwidth(threads: int, device: str = "cpu") -> tuple[float, str]:
    """``(GB/s, how)`` of plain reads with so many threads, measured once a run."""
    with timing.threads(threads):
        return timing.read_bandwidth(device=device)
