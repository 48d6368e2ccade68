"""Whole calls drawn at random against plain fp64 attention, all options and layouts together. `make soak` draws 20,000."""

import math
import random

import pytest
import torch

from sieve_attn import attention, geometry, pipeline, policies, scores, selection
from sieve_attn.policies import Policy
from sieve_attn.testing import GENERATORS, Shape, oracle
from sieve_attn.testing.contracts import spread_heads

DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
POISONS = (None, math.nan, math.inf, -math.inf)


def a_bound(draw):
    sketch = scores.KeySketch(draw.choice((1, 2, 3, 4, 6, 8)), query_bits=draw.choice((None, None, 8)))
    others = (scores.Euclidean(), scores.Cosh(), scores.Bennett(), scores.Box(), scores.Exact())
    return draw.choice((sketch, sketch, sketch, scores.Tightest((sketch, scores.Bennett())), draw.choice(others)))


def a_policy(draw):
    sinks, window = draw.choice((0, 1, 5, 16, 20)), draw.choice((0, 1, 7, 16, 64))
    size, tile = draw.choice((1, 2, 3, 7, 16, 16, 16, 24, 48, 64, 100)), draw.choice((1, 2, 5, 16, 64, 64, 100))
    mass, error = draw.choice((0.5, 0.9, 0.999)), draw.choice((0.001, 0.02, 0.1, 0.4))
    ends = {"sinks": sinks, "window": window}
    selector = draw.choice((selection.TopK(draw.choice((1, 2, 4))), selection.Mass(mass), selection.Certified(error)))
    chosen = Policy(
        a_bound(draw), selector, policies._ends(sinks, window), block_size=size, query_tile=tile,
        query_stride=min(tile, draw.choice((1, 1, 2, 4))), share_group=draw.random() < 0.6, dense_above=draw.choice((1.0, 0.5)),
    )  # fmt: skip
    presets = (
        policies.Dense(),
        policies.Aether(draw.choice((-1.0, 0.0, 0.15, 3.0)), size),
        policies.EventRadar(0.15, size, target_sparsity=draw.choice((None, 0.5, 0.9)), sink_blocks=draw.choice((0, 1))),
        policies.Quest(draw.choice((1, 3)), size),
        policies.TopBlocks(draw.choice((1, 2, 5)), **ends),
        policies.Adaptive(mass, **ends),
        policies.Certified(error, **ends),
        policies.Windowed(sinks, max(window, 1)),
    )
    return draw.choice((chosen, chosen, chosen, draw.choice(presets)))


def hostile(draw, source, *size):
    """Numbers whose channels, rows and entries differ by orders of magnitude, stay silent, repeat or vanish."""
    x = torch.randn(size, generator=source)
    batch, heads, n, dim = size

    def apart(*shape):
        return torch.exp(draw.choice((1, 3)) * torch.randn(shape, generator=source))

    def rare(share, *shape):
        return torch.rand(shape, generator=source) < share

    for _ in range(draw.randint(0, 3)):
        kind = draw.randrange(9)
        if kind == 0:
            x = x * apart(batch, heads, 1, dim)
        elif kind == 1:
            x = x * apart(batch, heads, n, 1)
        elif kind == 2:
            x = torch.where(rare(draw.choice((0.5, 0.9, 0.98)), *size), 0.0, x)
        elif kind == 3:
            x = torch.where(rare(0.02, *size), x * draw.choice((30.0, 300.0)), x)
        elif kind == 4:
            x[:, :, : draw.choice((5, 64, 70)), dim // 2 :] = 0.0
        elif kind == 5:
            x = x * draw.choice((1e-3, 10.0, 100.0))
        elif kind == 6:
            x = x[:, :, torch.randint(0, max(1, n // 4), (n,), generator=source)]
        elif kind == 7:
            x = x + draw.choice((3.0, 30.0)) * torch.randn(1, 1, 1, dim, generator=source)
        else:
            x = torch.where(rare(0.3, batch, heads, n, 1), x * 1e-40, x)
    return x


def laid_out(draw, x):
    """The same numbers with other strides."""
    kind = draw.randrange(4)
    if kind == 1:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 2:
        inside = torch.zeros(*x.shape[:2], x.shape[2] + 3, x.shape[3] + 5, dtype=x.dtype)[:, :, 1:-2, 2:-3]
        return inside.copy_(x)
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if kind == 3 else x


def some_inputs(draw, source):
    batch, kv_heads, kv_len = (
        draw.choice((1, 1, 2, 3)),
        draw.choice((1, 1, 2, 3)),
        draw.choice((1, 2, 16, 31, 65, 80, 129, 200, 300)),
    )
    q_len = kv_len if draw.random() < 0.4 else min(kv_len, draw.choice((1, 1, 2, 5, 17, 40)))
    dim = draw.choice((1, 3, 8, 16, 32, 40, 64, 64, 80, 128))
    shape = Shape(batch, kv_heads * draw.choice((1, 1, 2, 4)), kv_heads, q_len, kv_len, dim, draw.choice((dim, dim, 1, 8, 24)))
    dtype = draw.choice(DTYPES)
    if draw.random() < 0.5:
        name = draw.choice(sorted(GENERATORS))
        q, k, v = GENERATORS[name](draw.randrange(2**31), shape)
    else:
        q, k = hostile(draw, source, batch, shape.q_heads, q_len, dim), hostile(draw, source, batch, kv_heads, kv_len, dim)
        v = torch.randn(batch, kv_heads, kv_len, shape.v_dim, generator=source)
    if dtype == torch.float16:
        q, k = (x.clamp(-6e4, 6e4) for x in (q, k))
    return tuple(x.to(dtype) for x in (q, k, v))


def some_options(draw, source, q, k):
    batch, heads, q_len, kv_len = *q.shape[:3], k.shape[2]
    found = {"causal": draw.random() < 0.6}
    if draw.random() < 0.2:
        found["scale"] = draw.choice((0.01, 1.0, 0.3))
    if draw.random() < 0.2:
        found["softcap"] = draw.choice((2.0, 10.0, 50.0))
    if draw.random() < 0.2:
        found["window"] = draw.choice((1, 3, 16, 50))
    if draw.random() < 0.25 and batch == 1 and 2 < kv_len == q_len:
        cuts = sorted(draw.sample(range(1, kv_len), min(kv_len - 1, draw.choice((1, 2, 4)))))
        found["cu_seqlens"] = torch.tensor([0, *cuts, kv_len], dtype=torch.int32)
    if draw.random() < 0.25:
        found["key_mask"] = torch.rand(batch, kv_len, generator=source) < draw.choice((0.1, 0.5, 0.9))
    if draw.random() < 0.2:
        size = (draw.choice((1, batch)), draw.choice((1, heads)), q_len, kv_len)
        found["mask"] = torch.rand(size, generator=source) < draw.choice((0.3, 0.8))
    if draw.random() < 0.15:
        found["bias"] = torch.randn(draw.choice((1, batch)), draw.choice((1, heads)), q_len, kv_len, generator=source)
    if draw.random() < 0.15:
        found["sink"] = 3 * torch.randn(heads, generator=source)
    return found


class Truth:
    """What plain fp64 attention makes of the same inputs."""

    def __init__(self, q, k, v, options, grad=False):
        self.q, self.k, self.v = (x.detach().double().requires_grad_(grad) for x in (q, k, v))
        of_keys = ("causal", "window", "cu_seqlens", "mask", "key_mask")
        seen = oracle.visible_keys(q.shape[2], k.shape[2], **{n: options[n] for n in of_keys if n in options})
        self.seen = seen.expand(*q.shape[:3], k.shape[2])
        self.options = {n: options[n] for n in ("scale", "softcap") if n in options}
        if "bias" in options:
            self.options["bias"] = options["bias"].double()
        self.sink = options["sink"].double() if "sink" in options else None

    def kept(self, report):
        if report.selection is None:
            return self.seen
        like = torch.zeros(*self.q.shape[:2], 1, 1)
        return (spread_heads(report.selection.to_dense(like), self.q.shape[1]) & self.seen).expand_as(self.seen)

    def logits(self):
        return oracle.plain_logits(self.q.detach(), self.k.detach(), self.seen, **self.options)

    def attend(self, kept):
        return oracle.plain_attention(self.q, self.k, self.v, kept, sink=self.sink, **self.options)

    def rounding(self):
        """What fp32 sums may move a logit by."""
        scale = self.options.get("scale", self.q.shape[-1] ** -0.5)
        return float(self.q.detach().abs().max() * self.k.detach().abs().max()) * self.q.shape[-1] * scale * 2.0**-20


def check_call(seed):
    """One call with everything drawn from its seed: output, lse, gradients and certificate."""
    draw, source = random.Random(seed), torch.Generator().manual_seed(seed)
    q, k, v = (laid_out(draw, x) for x in some_inputs(draw, source))
    policy, options, per_query = a_policy(draw), some_options(draw, source, q, k), draw.random() < 0.15
    grad = q.dtype == torch.float32 and draw.random() < 0.3
    poison = draw.choice(POISONS) if "key_mask" in options else None
    where = (seed, policy.text, per_query, sorted(options), poison)
    truth = Truth(q, k, v, options, grad)
    if poison is not None:
        hole = ~options["key_mask"][:, None, :, None]
        k, v = (x.masked_fill(hole, poison) for x in (k, v))
    if grad:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse, report = attention(q, k, v, policy, per_query=per_query, return_lse=True, return_report=True, **options)

    kept = truth.kept(report)
    exact, exact_lse = truth.attend(kept)
    known, size = torch.isfinite(exact_lse), 1 + truth.v.detach().abs().max()
    assert (out.double() - exact).abs().max() <= (TOLERANCE[q.dtype] + truth.rounding()) * size, where
    assert torch.equal(known, torch.isfinite(lse)), where
    apart = torch.where(known, lse.double() - exact_lse, 0.0).abs()
    assert (apart <= 1e-4 * (1 + exact_lse.nan_to_num(0, 0, 0).abs()) + truth.rounding()).all(), where

    lost = oracle.dropped_mass(truth.logits(), kept, truth.sink)
    certified = report.certificate.dropped_mass.double()
    assert (lost <= certified * (1 + 1e-9) + 1e-12).all(), where
    if isinstance(policy.selector, selection.Certified) and not per_query and policy.query_stride == 1:
        assert (lost <= policy.selector.error * (1 + 1e-6)).all(), where
    if grad:
        by_output = torch.randn(out.shape, generator=source)
        by_lse = torch.where(known, torch.randn(lse.shape, generator=source), 0.0)
        ours = torch.autograd.grad((out * by_output).sum() + (torch.where(known, lse, 0.0) * by_lse).sum(), (q, k, v))
        loss = (exact * by_output).sum() + (torch.where(known, exact_lse, 0.0) * by_lse).sum()
        for mine, wanted in zip(ours, torch.autograd.grad(loss, (truth.q, truth.k, truth.v)), strict=True):
            limit = (1e-3 + 50 * truth.rounding()) * (1 + wanted.abs().max())
            assert (mine.double() - wanted).abs().max() <= limit, where


def check_brackets(seed):
    """One bound over one geometry of hostile keys: the true mass of every block lies inside of its bracket."""
    draw, source = random.Random(seed), torch.Generator().manual_seed(seed)
    q, k, v = some_inputs(draw, source)
    options, size, bound = some_options(draw, source, q, k), draw.choice((1, 2, 3, 8, 16, 16, 24, 64)), a_bound(draw)
    options.pop("sink", None)
    none = dict.fromkeys(("scale", "softcap", "mask", "key_mask", "bias", "cu_seqlens", "sink", "window"))
    call = pipeline._call(q, k, v, **none | {"dropout": 0.0} | options)
    masked = {"key_mask": options["key_mask"]} if "key_mask" in options else {}
    made = geometry.build(k, size, bound.proof_statistics, backend=draw.choice(("auto", "reference")), **masked)
    found = bound.score(call.rows(0, q.shape[2]), made, brackets=True)
    logits = Truth(q, k, v, options).logits()
    blocks = torch.nn.functional.pad(logits, (0, -logits.shape[-1] % size), value=-math.inf).unflatten(-1, (-1, size))
    mass = torch.logsumexp(blocks, -1)
    where = (seed, bound, size, sorted(options), q.dtype)
    assert (mass <= found.upper.double()).all(), where
    assert (found.lower.double() <= mass).all(), where


@pytest.mark.parametrize("part", range(4))
def test_a_call_is_plain_attention_over_what_its_report_says(part):
    for seed in range(part * 100, part * 100 + 100):
        check_call(seed)


def test_brackets_hold_the_mass_of_hostile_keys():
    for seed in range(500):
        check_brackets(seed)


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_a_call_is_plain_attention_at_length(part):
    for seed in range(10_000 + part * 1000, 11_000 + part * 1000):
        check_call(seed)
        check_brackets(seed)
