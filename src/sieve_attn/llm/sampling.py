"""One prompt's choice of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sieve_attn.checks import error


class Sampler:
    """Greedy at temperature 0; otherwise nucleus sampling from a generator of its own."""

    def __init__(self, temperature: float, top_p: float, seed: int):
        if not isinstance(temperature, (int, float)) or not 0 <= temperature < math.inf:
            raise error("temperature", "must be a finite number, 0 or more", repr(temperature), "0 takes the most likely token")
        if not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
            raise error("top_p", "must lie in (0, 1]", repr(top_p), "1.0 keeps every token")
        self.temperature, self.top_p = float(temperature), float(top_p)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """A token id from logits [vocabulary]."""
        if self.temperature == 0:
            return int(logits.argmax())
        # on the CPU and in fp64, so that a seed means the same tokens on every device
        share = torch.softmax(logits.detach().cpu().double() / self.temperature, -1)
        ordered, index = share.sort(descending=True, stable=True)
        # the token that crosses top_p belongs to the nucleus
        ordered = torch.where(ordered.cumsum(-1) - ordered < self.top_p, ordered, 0.0)
        return int(index[torch.multinomial(ordered, 1, generator=self.generator)])
