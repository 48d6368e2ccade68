"""Calls of attention drawn at random, and what plain fp64 attention makes of them."""

import math
import random

import torch

from sieve_attn import attention, policies, scores, selection
from sieve_attn.policies import Policy
from sieve_attn.testing import GENERATORS, Shape, oracle
from sieve_attn.testing.contracts import spread_heads

DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LENGTHS = (1, 2, 16, 31, 65, 80, 129, 200, 300)
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


def some_inputs(draw, source, dtypes=DTYPES, lengths=LENGTHS):
    batch, kv_heads, kv_len = draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2, 3)), draw.choice(lengths)
    q_len = kv_len if draw.random() < 0.4 else min(kv_len, draw.choice((1, 1, 2, 5, 17, 40)))
    dim = draw.choice((1, 3, 8, 16, 32, 40, 64, 64, 80, 128))
    shape = Shape(batch, kv_heads * draw.choice((1, 1, 2, 4)), kv_heads, q_len, kv_len, dim, draw.choice((dim, dim, 1, 8, 24)))
    dtype = draw.choice(dtypes)
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


class Drawn:
    """One call with everything drawn from its seed, and whether what came out of it is what it should be."""

    def __init__(self, seed, dtypes=DTYPES, lengths=LENGTHS):
        draw, self.source = random.Random(seed), torch.Generator().manual_seed(seed)
        q, k, v = (laid_out(draw, x) for x in some_inputs(draw, self.source, dtypes, lengths))
        self.policy, self.options = a_policy(draw), some_options(draw, self.source, q, k)
        self.per_query, self.grad = draw.random() < 0.15, q.dtype == torch.float32 and draw.random() < 0.3
        poison = draw.choice(POISONS) if "key_mask" in self.options else None
        self.where = (seed, self.policy.text, self.per_query, sorted(self.options), poison)
        self.truth = Truth(q, k, v, self.options, self.grad)
        if poison is not None:
            hole = ~self.options["key_mask"][:, None, :, None]
            k, v = (x.masked_fill(hole, poison) for x in (k, v))
        self.inputs = tuple(x.detach().requires_grad_(self.grad) for x in (q, k, v))

    def check(self, out, lse, kept, certified):
        """Output, lse and bound of the dropped mass; ``kept`` [.., q_len, kv_len] are the pairs that a report says were kept."""
        truth, rounding = self.truth, self.truth.rounding()
        self.exact, self.exact_lse = truth.attend(kept)
        known, size = torch.isfinite(self.exact_lse), 1 + truth.v.detach().abs().max()
        assert (out.double() - self.exact).abs().max() <= (TOLERANCE[self.inputs[0].dtype] + rounding) * size, self.where
        assert torch.equal(known, torch.isfinite(lse)), self.where
        apart = torch.where(known, lse.double() - self.exact_lse, 0.0).abs()
        assert (apart <= 1e-4 * (1 + self.exact_lse.nan_to_num(0, 0, 0).abs()) + rounding).all(), self.where
        lost = oracle.dropped_mass(truth.logits(), kept, truth.sink)
        assert (lost <= certified.double() * (1 + 1e-9) + 1e-12).all(), self.where
        if isinstance(self.policy.selector, selection.Certified) and not self.per_query and self.policy.query_stride == 1:
            assert (lost <= self.policy.selector.error * (1 + 1e-6)).all(), self.where

    def upstream(self):
        """Gradients of the output and of the lse, none of an lse that is -inf."""
        known = torch.isfinite(self.exact_lse)
        by_output = torch.randn(self.exact.shape, generator=self.source)
        return by_output, torch.where(known, torch.randn(known.shape, generator=self.source), 0.0)

    def check_gradients(self, ours, by_output, by_lse):
        """Those of query, key and value."""
        known, truth = torch.isfinite(self.exact_lse), self.truth
        loss = (self.exact * by_output).sum() + (torch.where(known, self.exact_lse, 0.0) * by_lse).sum()
        for mine, wanted in zip(ours, torch.autograd.grad(loss, (truth.q, truth.k, truth.v)), strict=True):
            limit = (1e-3 + 50 * truth.rounding()) * (1 + wanted.abs().max())
            assert (mine.double() - wanted).abs().max() <= limit, self.where


def check_pytorch(call, backend="auto"):
    """A call of the PyTorch front-end: output, lse, gradients and certificate. Returns its report."""
    out, lse, report = attention(
        *call.inputs, call.policy, per_query=call.per_query, backend=backend, return_lse=True, return_report=True, **call.options
    )
    call.check(out, lse, call.truth.kept(report), report.certificate.dropped_mass)
    if call.grad:
        by_output, by_lse = call.upstream()
        loss = (out * by_output).sum() + (torch.where(torch.isfinite(lse), lse, 0.0) * by_lse).sum()
        call.check_gradients(torch.autograd.grad(loss, call.inputs), by_output, by_lse)
    return report
