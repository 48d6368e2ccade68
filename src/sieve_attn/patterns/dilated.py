"""A window with gaps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sieve_attn.checks import positive_int
from sieve_attn.patterns.offsets import OffsetSet


@dataclass(frozen=True)
class Dilated(OffsetSet):
    """Keys ``i - step, i - 2 step, ..., i - tokens * step``."""

    tokens: int
    step: int

    def __post_init__(self):
        positive_int("tokens", self.tokens, "leave the pattern out for none")
        positive_int("step", self.step, "1 is a window without gaps")

    def up_to(self, limit: int) -> np.ndarray:
        return np.arange(1, min(self.tokens, max(limit, 0) // self.step) + 1, dtype=np.int64) * self.step
