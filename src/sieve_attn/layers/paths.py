"""Paths through a token mixer that are cheap to step: a short convolution and a diagonal recurrence.

Each maps [batch, len, d_model] to itself causally and has ``empty_cache``, ``warmup_cache``, ``prefill`` and
``forward_incremental``, as :class:`~sieve_attn.layers.SparseCausalAttention` has. Caches are tensors and are never changed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sieve_attn import checks
from sieve_attn.layers.scan_op import diagonal_scan
from sieve_attn.layers.sparse_causal import check_step, check_tokens
from sieve_attn.layers.ternary import mean_size, straight_through, trits_of


class _Path(nn.Module):
    """What both share: a forward pass from a state to a state."""

    d_model: int

    def _run(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} must define `_run`")

    def _empty(self, batch: int, like: dict) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define `_empty`")

    def empty_cache(self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The state before the first token: zeros."""
        known = next(self.parameters())
        return self._empty(checks.positive_int("batch_size", batch_size, "try 1"),
                           {"device": device or known.device, "dtype": dtype or known.dtype})  # fmt: skip

    def prefill(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(forward(x), warmup_cache(x))`` for the price of the first."""
        check_tokens(x, self.d_model)
        return self._run(x, self._empty(x.shape[0], {"device": x.device, "dtype": x.dtype}))

    def warmup_cache(self, x: Tensor) -> Tensor:
        """The state after the tokens ``x`` [batch, len, d_model]."""
        return self.prefill(x)[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.prefill(x)[0]

    def forward_incremental(self, x_step: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """``(y [batch, 1, d_model], the state after this token)``."""
        shape = self._empty(1, {"device": "meta", "dtype": x_step.dtype}).shape[1:]
        held = (cache.shape[1:], cache.device) if isinstance(cache, Tensor) else None
        if held != (shape, x_step.device):
            raise checks.error(
                "cache", f"must be a state [batch, {', '.join(map(str, shape))}] on {x_step.device}",
                type(cache).__name__ if held is None else f"{list(held[0])} on {held[1]}", "use the cache that this path made",
            )  # fmt: skip
        check_step(x_step, self.d_model, cache.shape[0])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and cache.is_inference():
            cache = cache.clone()  # a state made in inference mode cannot be kept for gradients
        return self._run(x_step, cache)


class LocalPath(_Path):
    """``y_t = sum_n w_n * x_(t - kernel_size + 1 + n)``: a ternary depthwise causal convolution.

    Weights [d_model, kernel_size] are rounded as in :class:`~sieve_attn.layers.TernaryLinear`, with one scale. The cache holds
    the last ``kernel_size - 1`` tokens. One token goes through the operations of many: steps equal the full call bit for bit.
    """

    def __init__(
        self, d_model: int, kernel_size: int = 5, quantize: bool = True, *,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        self.d_model = checks.positive_int("d_model", d_model, "try 256")
        self.kernel_size = checks.positive_int("kernel_size", kernel_size, "try 5")
        self.quantize = bool(quantize)
        self.weight = nn.Parameter(torch.randn(d_model, kernel_size, device=device, dtype=dtype) * kernel_size**-0.5)

    def ternary_weight(self) -> Tensor:
        if not self.quantize:
            return self.weight
        alpha = mean_size(self.weight)
        return straight_through(self.weight, trits_of(self.weight, alpha) * alpha)

    def _empty(self, batch: int, like: dict) -> Tensor:
        return torch.zeros(batch, self.kernel_size - 1, self.d_model, **like)

    def _run(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        held, weight = torch.cat([state, x], 1), self.ternary_weight().T
        y = held[:, : x.shape[1]] * weight[0]
        for n in range(1, self.kernel_size):
            y = y + held[:, n : n + x.shape[1]] * weight[n]
        return y, held[:, x.shape[1] :].clone()


class StatePath(_Path):
    """``h_t = a * h_(t-1) + b * x_t``, ``y_t = c * h_t`` channel by channel, with ``a = tanh(decay)``.

    ``decay`` starts between 0.5 and 2.5, so that channels remember for between two and seventy tokens, and ``b`` where white
    noise keeps its variance. The cache is the state [batch, d_model], fp32 or wider as the recurrence itself.
    """

    def __init__(self, d_model: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.d_model = checks.positive_int("d_model", d_model, "try 256")
        decay = torch.linspace(0.5, 2.5, d_model, device=device)
        self.decay = nn.Parameter(decay.to(dtype))
        self.b = nn.Parameter((1 - torch.tanh(decay) ** 2).sqrt().to(dtype))
        self.c = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def _empty(self, batch: int, like: dict) -> Tensor:
        return torch.zeros(batch, self.d_model, device=like["device"], dtype=_wide(like["dtype"]))

    def _run(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        wide = _wide(x.dtype)
        decay, b, c = (p.to(wide) for p in (torch.tanh(self.decay.to(wide)), self.b, self.c))
        states = diagonal_scan(b * x, decay, state.to(wide), False)
        return (c * states).to(x.dtype), states[:, -1].clone()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
