"""Pass by blocks that cannot matter beside the heaviest key met so far, in a fixed order of visits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sieve_attn import arrays
from sieve_attn.checks import error, positive_int, threshold
from sieve_attn.scores.base import exact_logits, split_blocks
from sieve_attn.selection.base import Candidates, RowSelector

Array = Any


@dataclass(frozen=True)
class RunningMaximum(RowSelector):
    """Keep iff the upper bound of the block's log mass is at least ``m - margin``, ``m`` the largest logit met before it.

    What comes before what is fixed, so that every backend means the same. Keys fall into runs of ``run`` keys from key 0 on,
    each walked by itself (so that programs share a long cache), step by step of ``step`` keys, from its last step to its first.
    ``m`` starts with the forced blocks of the first and the last step that the query sees, and takes in all keys that the query
    sees of the steps behind it; whether they were kept changes nothing, for a block that is passed by cannot hold a larger
    logit. A query that has met nothing yet keeps what it meets. Steps and runs are whole numbers of blocks, steps a power of two.

    Each block that is dropped weighs less than ``e^-margin`` times the query's heaviest key, so ``blocks * e^-margin`` bounds
    the dropped mass beforehand; the certificate says how much it was.
    """

    margin: float = 12.0
    step: int = 1024
    run: int = 8192
    needs_brackets = True
    every_query = True
    keeps_some = True

    def __post_init__(self):
        if not threshold("margin", self.margin) >= 0:
            raise error("margin", "must be at least 0", self.margin, "12.0 drops blocks below e^-12 of the heaviest key")
        positive_int("step", self.step, "try 1024")
        positive_int("run", self.run, "try 8192")
        if self.run % self.step:
            raise error("run", f"must be a multiple of step ({self.step})", self.run, f"try {8 * self.step}")

    def step_blocks(self, block_size: int) -> int:
        """Blocks of a step."""
        return 1 << (max(1, self.step // block_size).bit_length() - 1)

    def keep(self, candidates: Candidates) -> Array:
        xp = arrays.namespace(candidates.visible)
        size, blocks = candidates.geometry.block_size, candidates.visible.shape[-1]
        each, steps = self.step_blocks(size), self.run // self.step
        logits = exact_logits(candidates.rows)
        heaviest = xp.amax(split_blocks(xp.where(xp.isfinite(logits), logits, -float("inf")), size, -float("inf")), -1)
        ends = _ends(xp, candidates.rows.structural, size, each)
        met = xp.amax(xp.where(candidates.forced & ends, heaviest, -float("inf")), -1)[..., None]
        padded = xp.pad_end(heaviest, -1, -blocks % (each * steps), -float("inf"))
        peak = xp.amax(padded.reshape(*padded.shape[:-1], -1, steps, each), -1)
        levels = [met] * steps
        for step in reversed(range(steps)):
            levels[step] = xp.broadcast_to(met, peak.shape[:-1])
            met = xp.maximum(met, peak[..., step])
        level = xp.repeat_each(xp.stack(levels, -1).reshape(*peak.shape[:-2], -1), each, -1)[..., :blocks]
        return candidates.visible & (candidates.scores.upper >= level - self.margin)


def _ends(xp: Any, structural: Array, size: int, each: int) -> Array:
    """[rows, blocks]: the block lies in the first or the last step that causality, window and packing show the query."""
    seen = xp.any_(split_blocks(structural, size, False), -1)
    steps = xp.any_(split_blocks(seen, each, False), -1)
    count = xp.cast(steps, xp.int32)
    first = steps & (xp.cumsum(count, -1) == 1)
    last = steps & (xp.flip(xp.cumsum(xp.flip(count, -1), -1), -1) == 1)
    return xp.repeat_each(first | last, each, -1)[:, : seen.shape[-1]][None, None]
