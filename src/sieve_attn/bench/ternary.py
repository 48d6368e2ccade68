"""``ternary``: products with packed weights against dense ones, and a decoding step against a cache kept by concatenation.

N counts tokens. For products M and D are the sides of the matrix, for steps the cached tokens and the width of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sieve_attn.bench import peers, truth
from sieve_attn.bench.cases import Case
from sieve_attn.bench.prepared import Prepared
from sieve_attn.bench.rows import Target
from sieve_attn.bench.settings import Settings

SIDE, CACHED, WIDTH, D_HEAD, TOP_K = 4096, 65_536, 256, 32, 8
FIGURES = {"float32": 6.0, "bfloat16": 3.0}
STEP_FIGURE = 10.0
TOKENS = (1, 16, 256)
EIGHT_BIT, STEP, SCAN = "int8 activations", "cached step", "state path"


def cases(settings: Settings) -> Iterator[Case]:
    """Products of one, 16 and 256 tokens in each dtype, exact and with 8-bit activations; one step; the recurrence."""
    side = settings.n or SIDE
    for dtype in settings.dtypes or tuple(FIGURES):
        for tokens in TOKENS:
            for name in ("packed product", EIGHT_BIT):
                stated = name == "packed product" and tokens == 1 and side == SIDE and dtype in FIGURES
                targets = (Target("ratio", FIGURES[dtype]),) if stated else ()
                yield Case("ternary", f"{name} x {tokens}", dtype, tokens, side, side, 16, heads=1, kv_heads=1, targets=targets)
    cached = min(CACHED, settings.keys or CACHED)
    targets = (Target("ratio", STEP_FIGURE),) if cached == CACHED else ()
    yield Case("ternary", STEP, "float32", 1, cached, D_HEAD, 1, heads=1, kv_heads=1, targets=targets)
    length = settings.n or SIDE
    yield Case("ternary", SCAN, "float32", length, length, WIDTH, 1, heads=1, kv_heads=1)


def prepare(case: Case, settings: Settings) -> Prepared:
    """One case with its arrays."""
    torch.manual_seed(settings.seed)
    make = {STEP: _step, SCAN: _scan}.get(case.name, _product)
    return make(case)


def _product(case: Case) -> Prepared:
    from sieve_attn.layers import TernaryLinear

    dtype, eight = getattr(torch, case.dtype), case.name.startswith(EIGHT_BIT)
    layer = TernaryLinear(case.dim, case.kv_len).requires_grad_(False)
    packed = layer.pack(int8_activations=eight)
    weight, x = layer.ternary_weight(), torch.randn(case.q_len, case.dim).to(dtype)
    dense = weight.to(dtype)

    def check(result: Tensor) -> tuple[str, dict[str, Any]]:
        exact = x.double() @ weight.double().T
        size = packed.codes.numel() * 4
        known = {"bytes_mb": size / 1e6}
        if not eight:
            return truth.complaint("the product", result, exact, (x.float() @ weight.T).to(dtype)), known
        # 8 bits round every entry of a token by at most half of a step
        step = x.double().abs().amax(-1, keepdim=True) / 127
        limit = 0.5 * step * weight.double().abs().sum(-1) + 8 * torch.finfo(dtype).eps * (1 + exact.abs())
        wrong = not bool(((result.double() - exact).abs() <= limit).all())
        return "the product errs by more than its rounding allows" if wrong else "", known

    return Prepared(lambda: packed(x), check, {"naive": lambda: peers.Peer(lambda: functional.linear(x, dense))},
                    notes=("dense is torch.nn.functional.linear on the unpacked weights",))  # fmt: skip


def _step(case: Case) -> Prepared:
    from sieve_attn.layers import SparseCausalAttention, pack_ternary

    layer = pack_ternary(SparseCausalAttention(WIDTH, case.dim, TOP_K))
    x, prompt = torch.randn(1, 1, WIDTH), torch.randn(1, case.kv_len - 1, WIDTH)
    held = {"ours": layer.warmup_cache(prompt)}
    held["plain"] = [a[:, 0].clone() for a in held["ours"].arrays]

    def ours() -> Tensor:
        y, held["ours"] = layer.forward_incremental(x, held["ours"])
        return y

    def plain() -> Tensor:
        query, key, value = layer.query(x), layer.key(x), layer.value(x)
        held["plain"] = [torch.cat([old, new], 1) for old, new in zip(held["plain"], (key, value), strict=True)]
        return attended(query, *held["plain"])

    def check(result: Tensor) -> tuple[str, dict[str, Any]]:
        keys, values = (a[:, 0] for a in held["ours"].arrays)
        exact = attended(layer.query(x).double(), keys.double(), values.double())
        return truth.complaint("the step", result, exact, attended(layer.query(x), keys, values)), {}

    return Prepared(
        ours,
        check,
        {"naive": lambda: peers.Peer(plain)},
        notes=("dense keeps its cache by concatenation; both project with packed weights",),
    )


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores, ``topk``, softmax and the sum of the chosen values, one token and one head."""
    scores, index = (query @ key.transpose(1, 2) * key.shape[-1] ** -0.5).topk(min(TOP_K, key.shape[1]), -1)
    return (scores.softmax(-1)[0] @ value[0, index[0, 0]])[None]


def _scan(case: Case) -> Prepared:
    from sieve_attn.layers.scan_op import chunked, diagonal_scan

    x, decay, start = torch.randn(1, case.q_len, case.dim), torch.tanh(torch.linspace(-2, 2, case.dim)), torch.zeros(1, case.dim)

    def check(result: Tensor) -> tuple[str, dict[str, Any]]:
        exact = chunked(x.double(), decay.double(), start.double())
        return truth.complaint("the recurrence", result, exact, chunked(x, decay, start)), {}

    return Prepared(lambda: diagonal_scan(x, decay, start, False), check,
                    {"naive": lambda: peers.Peer(lambda: chunked(x, decay, start))},
                    notes=("dense is the chunked form by matrix products",))  # fmt: skip
