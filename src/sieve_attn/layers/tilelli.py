"""A block that routes every token over several causal paths."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sieve_attn import checks
from sieve_attn.layers.paths import LocalPath, StatePath
from sieve_attn.layers.sparse_causal import SparseCausalAttention, check_step, check_tokens
from sieve_attn.layers.ternary import TernaryLinear

PATHS = ("local", "state", "sparse")


class TilelliBlock(nn.Module):
    """``h = LayerNorm(x)``; ``r = softmax(TernaryLinear(d_model, P)(h))`` a token; ``y = x + sum_i r_i * path_i(h)``.

    ``paths`` names the paths, or holds modules that have their methods: ``"local"`` is a ternary depthwise causal convolution,
    ``"state"`` a diagonal recurrence, ``"sparse"`` :class:`~sieve_attn.layers.SparseCausalAttention` with ``d_head``, ``top_k``
    and ``heads``. ``quantize=False`` leaves all weights as they are.

    ``x`` [batch, len, d_model] gives the same shape. ``y, cache = block.forward_incremental(x_step, cache)`` takes one token;
    its rows equal those of the full call within rounding. A cache is a tuple, one entry a path, and is never changed.

    Raises ValueError for no path or an unknown name, and for an ``x`` of another rank or width.
    """

    def __init__(
        self, d_model: int, paths: Iterable[str | nn.Module] = PATHS, *, kernel_size: int = 5, d_head: int = 32, top_k: int = 8,
        heads: int = 1, quantize: bool = True, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        self.d_model = checks.positive_int("d_model", d_model, "try 256")
        where = {"device": device, "dtype": dtype}
        make = {
            "local": lambda: LocalPath(d_model, kernel_size, quantize, **where),
            "state": lambda: StatePath(d_model, **where),
            "sparse": lambda: SparseCausalAttention(d_model, d_head, top_k, quantize, heads, **where),
        }
        asked = list(paths) if isinstance(paths, Iterable) and not isinstance(paths, str) else [paths]
        unknown = [p for p in asked if not isinstance(p, nn.Module) and p not in make]
        if unknown or not asked:
            raise checks.error(
                "paths", f"must name at least one of {', '.join(map(repr, PATHS))}, or hold modules", repr(unknown or asked),
                "leave it out for all three",
            )  # fmt: skip
        self.norm = nn.LayerNorm(d_model, **where)
        self.router = TernaryLinear(d_model, len(asked), quantize=quantize, **where)
        self.paths = nn.ModuleList(p if isinstance(p, nn.Module) else make[p]() for p in asked)

    def routing(self, x: Tensor) -> Tensor:
        """The weights of the paths [batch, len, P]; they sum to 1 a token."""
        check_tokens(x, self.d_model)
        return torch.softmax(self.router(self.norm(x)), -1)

    def _combine(self, x: Tensor, h: Tensor, outputs: list[Tensor]) -> Tensor:
        weights = torch.softmax(self.router(h), -1)
        for n, output in enumerate(outputs):
            x = x + weights[..., n : n + 1] * output
        return x

    def forward(self, x: Tensor) -> Tensor:
        check_tokens(x, self.d_model)
        h = self.norm(x)
        return self._combine(x, h, [path(h) for path in self.paths])

    def empty_cache(self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> tuple:
        """A cache of no token."""
        return tuple(path.empty_cache(batch_size, device, dtype) for path in self.paths)

    def prefill(self, x: Tensor) -> tuple[Tensor, tuple]:
        """``(forward(x), the cache after x)``."""
        check_tokens(x, self.d_model)
        h = self.norm(x)
        outputs, cache = zip(*(path.prefill(h) for path in self.paths), strict=True)
        return self._combine(x, h, list(outputs)), tuple(cache)

    def warmup_cache(self, x: Tensor) -> tuple:
        """The cache after the tokens ``x`` [batch, len, d_model]."""
        check_tokens(x, self.d_model)
        h = self.norm(x)
        return tuple(path.warmup_cache(h) for path in self.paths)

    def forward_incremental(self, x_step: Tensor, cache: tuple) -> tuple[Tensor, tuple]:
        """``(y [batch, 1, d_model], the cache with this token)``."""
        held = len(cache) if isinstance(cache, (tuple, list)) else None
        if held != len(self.paths):
            held = type(cache).__name__ if held is None else f"{held} entries"
            raise checks.error("cache", f"must hold {len(self.paths)} entries, one a path", held, "use empty_cache")
        check_step(x_step, self.d_model, x_step.shape[0] if x_step.dim() else 0)
        h = self.norm(x_step)
        steps = [path.forward_incremental(h, held) for path, held in zip(self.paths, cache, strict=True)]
        return self._combine(x_step, h, [y for y, _ in steps]), tuple(held for _, held in steps)
