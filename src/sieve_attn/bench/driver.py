"""One driver for all cases: first call and its memory, then the check, then peers, then interleaved clocks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from sieve_attn.bench import index, jax, ternary, timing
from sieve_attn.bench.attending import backward, prefill
from sieve_attn.bench.cases import Case, cases
from sieve_attn.bench.gating import decode, gate
from sieve_attn.bench.peers import usable
from sieve_attn.bench.prepared import Prepared, Unavailable, which_backend
from sieve_attn.bench.rows import FAILED, UNAVAILABLE, Row
from sieve_attn.bench.settings import Settings
from sieve_attn.bench.top_k import top_k

BUILDERS: dict[str, Callable[[Case, Settings], Prepared]] = {
    "prefill": prefill, "backward": backward, "gate": gate, "decode": decode, "topk": top_k,
    "ternary": ternary.prepare,
    "index": index.index, "jax": jax.prepare,
}  # fmt: skip

OURS = ("ours", "gate", "attend", "front")  # names of clocks that are of no peer
AGREE = 0.75  # of the turns


def run(settings: Settings, tell: Callable[[str, float], None] = lambda stage, done: None) -> Iterator[Row]:
    """The rows of a run as they are measured. ``tell(group, share done)`` hears of the progress."""
    wanted = cases(settings)
    for dtype, dim in {(case.dtype, case.dim): None for case in wanted}:
        # a backend that was named and cannot run says so before any work; and what is loaded once is no row's memory
        one = torch.zeros(1, 1, 1, dim, dtype=getattr(torch, dtype), device=settings.device)
        which_backend(one, one, one, settings.backend)
    single: dict[tuple, Row] = {}
    gc.collect()
    gc.freeze()  # the collector, which runs before every row, does not look through all that was there before
    try:
        for place, case in enumerate(wanted):
            same = [i for i, c in enumerate(wanted) if c.group == case.group]
            tell(case.group, (place - same[0]) / len(same))
            with timing.threads(case.threads):
                row = measure(case, settings)
            if case.threads == 1:
                single[row.identity[:-1]] = row
            yield scaled(row, single.get(row.identity[:-1]))
            tell(case.group, (place + 1 - same[0]) / len(same))
    finally:
        gc.unfreeze()


def measure(case: Case, settings: Settings) -> Row:
    """One case. What is wrong or raises makes a FAILED row, which carries no ratio."""
    row = Row(case.group, case.name, case.dtype, case.q_len, case.kv_len, case.dim, case.block, case.threads,
              targets=case.targets)  # fmt: skip
    try:
        prepared = BUILDERS[case.group](case, settings)
        result, growth, resident = timing.peak_growth(prepared.first or prepared.call, settings.device)
        wrong, known = prepared.check(result)
        del result
        row = replace(row, peak_mb=growth, resident_mb=resident, **known)
        if wrong:
            return replace(row, status=FAILED, notes=(wrong,))
        return clocked(row, prepared, settings)
    except Unavailable as why:
        return replace(row, status=UNAVAILABLE, notes=(str(why),))
    except Exception as why:
        return replace(row, status=FAILED, notes=(f"{type(why).__name__}: {why}",))


def clocked(row: Row, prepared: Prepared, settings: Settings) -> Row:
    """The row with its times and everything that follows from them."""
    asked = {n: make for n, make in prepared.peers.items() if n.partition(" ")[0] in settings.peers or n == "naive"}
    others, reasons = usable(asked)
    if prepared.first is not None:
        prepared.call()
    for call in prepared.beside.values():
        call()

    def parts(name: str, result: Any) -> dict[str, float]:
        return prepared.parts(result) if name == "ours" else {}

    calls = {"ours": prepared.call, **others, **prepared.beside}
    clock = timing.CLOCKS[settings.device]
    times = timing.interleave(calls, settings.repeats, parts, clock=clock, settled=lambda found: agreed(row, found))
    by_kernel = [f"{name.removeprefix('sdpa ')} {timing.median_ms(times[name]):.3f} ms" for name in others if kernel(name)]
    if by_kernel:
        reasons.append(f"SDPA: {', '.join(by_kernel)}")
    found = figures(row, times)
    return replace(found, samples=len(times["ours"]), spread=timing.spread(times["ours"]), notes=(*prepared.notes, *reasons))


def kernel(name: str) -> bool:
    """Whether a name is that of one kernel of SDPA."""
    return name.startswith("sdpa ")


def figures(row: Row, times: dict[str, list[float]]) -> Row:
    """The row with medians of ``times`` and the ratios between them. Everything that is not ours nor a part of it is a peer,
    but for ``front``; of the kernels of SDPA that were named the fastest is the dense peer."""
    ms = {name: timing.median_ms(samples) for name, samples in times.items()}
    named = [ms[name] for name in ms if kernel(name)]
    if named:
        ms["sdpa"] = min(named)
    dense, sparse = ms.get("sdpa", ms.get("naive")), ms["ours"]
    over = {name: found / sparse for name, found in ms.items() if name not in OURS}
    floor = row.floor_ms
    return replace(
        row,
        ratio=min(over.values(), default=None), ratio_sdpa=over.get("sdpa"), ratio_flex=over.get("flex"),
        ideal=row.ideal if floor is None or dense is None else dense / floor,
        dense_ms=dense, sparse_ms=sparse, flex_ms=ms.get("flex"), gate_ms=ms.get("gate"), attend_ms=ms.get("attend"),
        gate_percent=100.0 * ms["gate"] / dense if dense and "gate" in ms else None,
        ratio_naive=over.get("naive"), ratio_front=ms["front"] / sparse if "front" in ms else None,
        bandwidth_share=None if floor is None else floor / sparse,
    )  # fmt: skip


def agreed(row: Row, times: dict[str, list[float]]) -> bool:
    """Whether three quarters of the turns say the same of every target, met or missed; where they do not, more are taken."""
    turns = [figures(row, {name: [samples[i]] for name, samples in times.items()}) for i in range(len(times["ours"]))]
    for target in row.targets:
        met = [target.met(turn) for turn in turns]
        if None not in met and max(met.count(True), met.count(False)) < AGREE * len(met):
            return False
    return True


def scaled(row: Row, single: Row | None) -> Row:
    """How more threads helped us, over how they helped SDPA, beside the row of one thread."""
    if single is None or row.threads == 1 or not (row.ratio_sdpa and single.ratio_sdpa):
        return row
    return replace(row, scaling=row.ratio_sdpa / single.ratio_sdpa)
