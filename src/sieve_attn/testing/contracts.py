"""Laws as test classes: inherit one, name what it is about, and pytest runs every law on it.

class TestMine(BackendContract):
    backend = "native"
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sieve_attn import geometry as stage_geometry
from sieve_attn import pipeline
from sieve_attn.patterns import Pattern, Sinks, Union, Window
from sieve_attn.policies import Policy
from sieve_attn.scores import Scorer
from sieve_attn.selection import Selector
from sieve_attn.testing import oracle, strategies
from sieve_attn.testing.strategies import GENERATORS, Shape, gaussian, random_blocks
from sieve_attn.testing.tolerances import assert_close
from sieve_attn.types import Call, Selection
from sieve_attn.types import call as call_module

SEEN_OPTIONS = ("causal", "window", "cu_seqlens", "mask", "key_mask")
SMALL = Shape(2, 4, 2, 21, 37, 8, 8)
SQUARE = Shape(1, 4, 2, 29, 29, 8, 8)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coins(seed: int, chance: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < chance


def _alibi(s: Shape) -> Tensor:
    return -0.1 * torch.arange(s.kv_len - 1, -1, -1.0)[None, None, None] * torch.arange(1, s.q_heads + 1)[None, :, None, None]


# name -> (shape, call options, selection options)
BACKEND_CASES: dict[str, tuple[Shape, Callable[[Shape], dict], dict]] = {
    "plain": (SMALL, lambda s: {}, {}),
    "causal": (SMALL, lambda s: {"causal": True}, {"causal": True}),
    "more queries than keys": (Shape(1, 2, 1, 30, 19, 8, 8), lambda s: {"causal": True}, {"causal": True}),
    "one query": (Shape(2, 4, 2, 1, 37, 8, 8), lambda s: {"causal": True}, {"causal": True}),
    "a choice a query head": (SMALL, lambda s: {}, {"heads": 4}),
    "one choice for all heads": (SMALL, lambda s: {}, {"heads": 1}),
    "v_dim": (Shape(1, 4, 2, 21, 37, 8, 5), lambda s: {}, {}),
    "scale": (SMALL, lambda s: {"scale": 0.7}, {}),
    "mask": (SMALL, lambda s: {"mask": coins(1, 0.6, s.batch, s.q_heads, s.q_len, s.kv_len)}, {}),
    "broadcast mask": (SMALL, lambda s: {"mask": coins(1, 0.6, 1, 1, s.q_len, s.kv_len)}, {}),
    "key_mask": (SMALL, lambda s: {"key_mask": coins(2, 0.7, s.batch, s.kv_len), "causal": True}, {"causal": True}),
    "bias": (SMALL, lambda s: {"bias": draw(3, s.batch, s.q_heads, s.q_len, s.kv_len)}, {}),
    "broadcast bias": (SMALL, lambda s: {"bias": _alibi(s).double(), "causal": True}, {"causal": True}),
    "row bias": (SMALL, lambda s: {"bias": draw(3, 1, s.q_heads, s.q_len, 1)}, {}),
    "softcap": (SMALL, lambda s: {"softcap": 1.5, "causal": True}, {"causal": True}),
    "softcap and bias": (SMALL, lambda s: {"softcap": 1.5, "bias": draw(4, 1, s.q_heads, s.q_len, s.kv_len)}, {}),
    "packed": (SQUARE, lambda s: {"cu_seqlens": torch.tensor([0, 7, 8, 29]), "causal": True}, {"causal": True}),
    "packed, both ways": (SQUARE, lambda s: {"cu_seqlens": torch.tensor([0, 7, 8, 29])}, {}),
    "sink": (SMALL, lambda s: {"sink": draw(5, s.q_heads), "causal": True}, {"causal": True}),
    "window": (SMALL, lambda s: {"window": 6, "causal": True}, {"causal": True}),
    "window, both ways": (SMALL, lambda s: {"window": 6}, {}),
    "rows of their own": (SMALL, lambda s: {"causal": True}, {"causal": True, "per_query": True}),
    "nothing kept": (SMALL, lambda s: {}, {"density": 0.0}),
    "everything at once": (
        SQUARE,
        lambda s: {"causal": True, "window": 17, "softcap": 2.0, "sink": draw(5, s.q_heads), "scale": 0.4,
                   "bias": draw(6, 1, s.q_heads, 1, s.kv_len), "key_mask": coins(2, 0.8, s.batch, s.kv_len),
                   "cu_seqlens": torch.tensor([0, 11, 29]), "mask": coins(1, 0.8, 1, s.q_heads, s.q_len, s.kv_len)},
        {"causal": True, "per_query": True, "heads": 4},
    ),
}  # fmt: skip


def spread_heads(kept: Tensor, q_heads: int) -> Tensor:
    return kept if kept.shape[1] in (1, q_heads) else kept.repeat_interleave(q_heads // kept.shape[1], 1)


class BackendContract:
    """What every backend of the attend stage must do with a selection that somebody else made."""

    backend = "reference"
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

    def run(self, q: Tensor, k: Tensor, v: Tensor, selection: Selection, **options: Any) -> tuple[Tensor, Tensor]:
        return pipeline.attend(q, k, v, selection, backend=self.backend, **options)

    def plain(self, q: Tensor, k: Tensor, v: Tensor, selection: Selection, **options: Any) -> tuple[Tensor, Tensor]:
        """The oracle, in the dtype of its inputs."""
        seen = oracle.visible_keys(q.shape[2], k.shape[2], **{n: options[n] for n in SEEN_OPTIONS if n in options})
        kept = spread_heads(selection.to_dense(q), q.shape[1])
        rest = {n: x for n, x in options.items() if n not in SEEN_OPTIONS}
        return oracle.plain_attention(q, k, v, seen & kept, **rest)

    def case(self, name: str, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Selection, dict]:
        shape, options, chosen = BACKEND_CASES[name]
        return gaussian(7, shape, dtype), random_blocks(11, shape, **chosen), options(shape)

    def compare(self, inputs, selection: Selection, options: dict) -> None:
        """Output, lse and every gradient against the fp64 oracle, with plain code in the same dtype as the measure."""
        dtype = inputs[0].dtype

        def differentiate(function, cast, options=options):
            leaves = [x.detach().to(cast).requires_grad_() for x in inputs]
            extra = {n: options[n].to(cast).requires_grad_() for n in ("bias", "sink") if n in options}
            out, lse = function(*leaves, selection, **(options | extra))
            found = {"output": out, "lse": lse}
            pull, pull_lse = draw(13, *out.shape).to(out.dtype), draw(17, *lse.shape).to(lse.dtype)
            loss = (out * pull).sum() + torch.where(torch.isfinite(lse), lse * pull_lse, 0.0).sum()
            named = dict(zip(("query", "key", "value"), leaves, strict=True)) | extra
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for (name, leaf), grad in zip(named.items(), grads, strict=True):
                found[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
            return found

        exact = differentiate(self.plain, torch.float64)
        plain = differentiate(self.plain, dtype)
        terms = {}
        if "bias" in options:
            # the gradient of one entry adds up those of every pair that it was broadcast to, and they cancel
            bias, pairs = options["bias"], (*inputs[0].shape[:3], inputs[1].shape[2])
            each = differentiate(self.plain, torch.float64, options | {"bias": bias.expand(pairs)})["gradient of bias"]
            terms["gradient of bias"] = float(each.square().sum_to_size(bias.shape).sqrt().max())
        for name, got in differentiate(self.run, dtype).items():
            kind = got.dtype if name == "lse" else dtype
            assert_close(got, exact[name], plain=plain[name], dtype=kind, what=name, terms=terms.get(name, 0.0))

    @pytest.mark.parametrize("name", BACKEND_CASES)
    def test_equals_the_oracle(self, name):
        for dtype in (torch.float32, torch.float64):
            if dtype in self.dtypes:
                self.compare(*self.case(name, dtype))

    @pytest.mark.parametrize("name", ["causal", "softcap and bias", "sink", "more queries than keys", "everything at once"])
    def test_errs_no_more_than_plain_code_in_half_precision(self, name):
        for dtype in (torch.float16, torch.bfloat16):
            if dtype in self.dtypes:
                self.compare(*self.case(name, dtype))

    def test_keeps_the_dtypes(self):
        for dtype in self.dtypes:
            inputs, selection, options = self.case("causal", dtype)
            out, lse = self.run(*inputs, selection, **options)
            assert out.dtype == dtype
            assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    @pytest.mark.parametrize("name", ["nothing kept", "more queries than keys"])
    def test_empty_rows_give_zeros(self, name):
        inputs, selection, options = self.case(name, torch.float32)
        seen = oracle.visible_keys(inputs[0].shape[2], inputs[1].shape[2], **options)
        some = (seen & spread_heads(selection.to_dense(inputs[0]), inputs[0].shape[1])).any(-1).expand(inputs[0].shape[:3])
        assert not some.all()
        out, lse = self.run(*inputs, selection, **options)
        assert (out[~some] == 0).all()
        assert (lse[~some] == -torch.inf).all()
        assert torch.isfinite(lse[some]).all()

    @pytest.mark.parametrize("name", ["plain", "causal", "a choice a query head", "rows of their own", "everything at once"])
    def test_keys_that_nobody_keeps_change_nothing(self, name):
        (q, k, v), selection, options = self.case(name, torch.float32)
        kept = spread_heads(selection.to_dense(q), q.shape[1]).expand(q.shape[0], q.shape[1], -1, -1)
        kept = kept & oracle.visible_keys(q.shape[2], k.shape[2], **{n: options[n] for n in SEEN_OPTIONS if n in options})
        wanted = kept.reshape(q.shape[0], k.shape[1], -1, *kept.shape[2:]).any(2)  # by some query head of the group
        query_sees = (wanted.any(-2))[..., None]
        for value in (1e4, -3.0, 0.0):
            other_k, other_v = torch.where(query_sees, k, value), torch.where(query_sees, v, -value)
            out, lse = self.run(q, k, v, selection, **options)
            out_, lse_ = self.run(q, other_k, other_v, selection, **options)
            assert torch.equal(out, out_)
            assert torch.equal(lse, lse_)

    def test_dropped_pairs_get_exactly_zero_gradient(self):
        (q, k, v), selection, options = self.case("causal", torch.float32)
        kept = spread_heads(selection.to_dense(q), q.shape[1]).expand(q.shape[0], q.shape[1], -1, -1)
        kept = kept & oracle.visible_keys(q.shape[2], k.shape[2], causal=True)
        unseen = ~kept.reshape(q.shape[0], k.shape[1], -1, *kept.shape[2:]).any(2).any(-2)
        assert unseen.any()
        k, v = k.requires_grad_(), v.requires_grad_()
        out, _ = self.run(q, k, v, selection, **options)
        out.square().sum().backward()
        assert (k.grad[unseen] == 0).all()
        assert (v.grad[unseen] == 0).all()

    @pytest.mark.parametrize("poison", [1e4, torch.nan, torch.inf])
    def test_the_future_influences_nothing(self, poison):
        shape = Shape(1, 4, 2, 30, 37, 8, 8)
        q, k, v = gaussian(7, shape)
        selection = random_blocks(11, shape, causal=True, density=0.7)
        cut = 20  # queries before this one sit before key `cut + 7`
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, :, cut + 7 :], bad_v[:, :, cut + 7 :] = poison, poison
        results = []
        for keys, values in ((k, v), (bad_k, bad_v)):
            leaf = q.clone().requires_grad_()
            out, lse = self.run(leaf, keys, values, selection, causal=True)
            gradient = torch.autograd.grad(out[:, :, :cut].sum(), leaf)[0]
            results.append([out[:, :, :cut], lse[:, :, :cut], gradient[:, :, :cut]])
        for clean, dirty in zip(*results, strict=True):
            assert torch.equal(clean, dirty)

    def test_is_deterministic_to_the_bit(self):
        for name in ("causal", "everything at once"):
            inputs, selection, options = self.case(name, torch.float32)
            first, second = (self.run(*inputs, selection, **options) for _ in range(2))
            assert torch.equal(first[0], second[0])
            assert torch.equal(first[1], second[1])

    def test_inputs_may_be_strided(self):
        inputs, selection, options = self.case("causal", torch.float32)
        twisted = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        for a, b in zip(self.run(*inputs, selection, **options), self.run(*twisted, selection, **options), strict=True):
            assert_close(a, b, dtype=torch.float32)


def a_call(shape: Shape, name: str = "gaussian", seed: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    q, k, v = GENERATORS[name](seed, shape, dtype)
    return Call(q, k, v, scale=shape.dim**-0.5, **options)


class ScorerContract:
    """What every scorer must do; a Bound must bracket the truth besides."""

    scorer: Scorer
    block_size = 8
    cases = ("plain", "causal", "ragged", "key_mask", "window", "softcap", "small softcap", "bias", "masked")

    def make(self, case: str, generator: str, dtype: torch.dtype = torch.float32, seed: int = 5) -> Call:
        shape = Shape(2, 4, 2, 9, 43 if case == "ragged" else 40, 16, 4)
        options: dict[str, Any] = {
            "causal": {"causal": True},
            "key_mask": {"key_mask": coins(2, 0.6, 2, shape.kv_len)},
            "window": {"causal": True, "window": 11},
            "softcap": {"softcap": 8.0},
            "small softcap": {"softcap": 1.5, "causal": True},
            "bias": {"bias": 3 * draw(3, 2, 4, 9, shape.kv_len).float()},
            "masked": {"mask": coins(4, 0.7, 1, 4, 9, shape.kv_len), "causal": True},
        }.get(case, {})  # fmt: skip
        return a_call(shape, generator, seed, dtype, **({"causal": False} | options))

    def score(self, call: Call, *, brackets: bool = False):
        geometry = stage_geometry.build(
            call.key, self.block_size, self.scorer.statistics, value=call.value, key_mask=call.key_mask
        )
        return self.scorer.score(call.rows(0, call.q_len), geometry, brackets=brackets)

    def truth(self, call: Call) -> tuple[Tensor, Tensor]:
        """fp64 ``(log mass, seen)`` of every (query, block)."""
        seen = oracle.visible_keys(call.q_len, call.kv_len, **{n: getattr(call, n) for n in SEEN_OPTIONS})
        logits = oracle.plain_logits(
            call.query.double(),
            call.key.double(),
            seen,
            scale=call.scale,
            softcap=call.softcap,
            bias=None if call.bias is None else call.bias.double(),
        )
        logits = torch.nn.functional.pad(logits, (0, -call.kv_len % self.block_size), value=-torch.inf)
        mass = torch.logsumexp(logits.unflatten(-1, (-1, self.block_size)), -1)
        return mass, mass > -torch.inf

    @pytest.mark.parametrize("case", cases)
    def test_estimates_are_finite_where_visible(self, case):
        for generator in sorted(GENERATORS):
            call = self.make(case, generator)
            estimate = self.score(call).estimate
            _, seen = self.truth(call)
            assert estimate.shape == seen.shape
            assert torch.isfinite(estimate[seen]).all(), generator
            assert (estimate[~seen] == -torch.inf).all(), generator

    def test_non_finite_keys_give_no_nan(self):
        assert not torch.isnan(self.score(broken_keys(self.make("causal", "gaussian"))).estimate).any()


class BoundContract(ScorerContract):
    """Laws of every scorer that proves: what it brackets is inside of its brackets."""

    @pytest.mark.parametrize("case", ScorerContract.cases)
    def test_brackets_hold_the_truth(self, case):
        for turn, generator in enumerate(sorted(GENERATORS)):
            dtype = (torch.float32, torch.bfloat16, torch.float64)[turn % 3]
            call = self.make(case, generator, dtype, seed=len(case))
            scores = self.score(call, brackets=True)
            mass, seen = self.truth(call)
            assert (scores.upper.double() >= mass)[seen].all(), (generator, dtype)
            assert (scores.lower.double() <= mass)[seen].all(), (generator, dtype)
            assert (scores.upper[~seen] == -torch.inf).all(), (generator, dtype)

    def test_non_finite_keys_prove_nothing(self):
        scores = self.score(broken_keys(self.make("causal", "gaussian")), brackets=True)
        assert (scores.upper[0, 2:, :, 2] == torch.inf).all()
        assert (scores.upper[1, :2, :, 0] == torch.inf).all()
        assert not torch.isnan(scores.upper).any()
        assert not torch.isnan(scores.lower).any()


def broken_keys(call: Call) -> Call:
    """A NaN in one block of the second KV head, an infinity in one of the first."""
    call.key[0, 1, 17] = torch.nan
    call.key[1, 0, 3, 2] = -torch.inf
    return call


class PatternContract:
    """What every pattern must do."""

    pattern: Pattern

    @pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (23, 23), (9, 31), (31, 9)])
    @pytest.mark.parametrize("causal", [True, False])
    def test_selection_equals_keeps(self, q_len, kv_len, causal):
        position = torch.arange(kv_len - q_len, kv_len)[:, None]
        key = torch.arange(kv_len)[None, :]
        wanted = self.pattern.keeps(position, key)
        got = self.pattern.selection(q_len, kv_len, causal=causal).to_dense(key)[0, 0]
        seen = (key <= position) if causal else torch.ones(q_len, kv_len, dtype=torch.bool)
        assert torch.equal(got & seen, wanted & seen)

    def test_a_tile_equals_that_slice_of_the_whole(self):
        whole = self.pattern.selection(40, 50, causal=True)
        dense = whole.to_dense(torch.zeros(1))
        for start, stop in ((0, 1), (3, 17), (17, 40), (39, 40)):
            assert torch.equal(whole.rows(start, stop, torch.zeros(1)), dense[:, :, start:stop])

    def test_a_union_keeps_what_either_keeps(self):
        position, key = torch.arange(30)[:, None], torch.arange(30)[None, :]
        both = self.pattern | Sinks(3) | Window(2)
        assert isinstance(both, Union)
        assert torch.equal(
            both.keeps(position, key), self.pattern.keeps(position, key) | (key < 3) | ((position - key).abs() < 2)
        )


class SelectorContract:
    """What every selector must do, whatever scorer it is given."""

    selector: Selector
    keep: Pattern | None = Sinks(5) | Window(9)
    block_size, query_tile = 8, 16

    def policy(self, **changes: Any) -> Policy:
        from sieve_attn.scores import KeySketch

        given = {"keep": self.keep, "block_size": self.block_size, "query_tile": self.query_tile} | changes
        return Policy(KeySketch(8), self.selector, **given)

    def choose(self, call: Call, policy: Policy, *, per_query: bool = False):
        geometry = stage_geometry.build(call.key, policy.block_size, policy.statistics, value=call.value, key_mask=call.key_mask)
        return pipeline.select(call, geometry, policy, per_query=per_query)

    def calls(
        self,
        dtype: torch.dtype = torch.float32,
        names: tuple[str, ...] = ("gaussian", "clustered", "duplicates", "all_zero"),
        every_pair: bool = False,
    ):
        """Calls that hold each generator and each option; with ``every_pair`` each generator under each option."""
        shape = Shape(2, 4, 2, 75, 91, 8, 4)
        masked = {"causal": True, "key_mask": coins(2, 0.6, 2, 91)}
        options = ({}, {"causal": True}, masked, {"causal": True, "window": 30})
        for i, chosen in enumerate(options):
            for name in names if every_pair else (names[i % len(names)],):
                yield a_call(shape, name, 4, dtype, **chosen)

    def visible(self, call: Call, policy: Policy, blocks: int) -> Tensor:
        seen = oracle.visible_keys(call.q_len, call.kv_len, **{n: getattr(call, n) for n in SEEN_OPTIONS})
        seen = torch.nn.functional.pad(seen, (0, -call.kv_len % policy.block_size)).unflatten(-1, (blocks, -1)).any(-1)
        return seen.expand(call.query.shape[0], call.query.shape[1], -1, -1)

    @pytest.mark.parametrize("per_query", [False, True])
    @pytest.mark.parametrize("share_group", [False, True])
    def test_kept_is_visible_and_forced_is_kept(self, per_query, share_group):
        for call in self.calls(every_pair=True):
            policy = self.policy(share_group=share_group)
            selection, (kept, total), _ = self.choose(call, policy, per_query=per_query)
            part = selection.blocks
            assert part.heads == (2 if share_group else 4)
            chosen = spread_heads(part.block_rows(0, call.q_len), 4)
            seen = self.visible(call, policy, part.blocks)
            if per_query:
                assert not (chosen & ~spread_heads(_any_head(seen, part.heads), 4)).any()
            assert (kept <= total).all()
            assert (kept >= 0).all()
            # whoever sees something keeps something
            assert ((chosen & seen).any(-1) == seen.any(-1)).all()
            position = torch.arange(call.q_len)[:, None] + call.offset
            wanted = policy.keep.keeps(position, torch.arange(call.kv_len)[None, :])
            whole = spread_heads(selection.to_dense(call.query), 4)
            visible_keys = oracle.visible_keys(call.q_len, call.kv_len, **{n: getattr(call, n) for n in SEEN_OPTIONS})
            assert not (wanted & visible_keys & ~whole).any()

    def test_is_deterministic(self):
        for call in self.calls():
            first, second = (self.choose(call, self.policy())[0].blocks for _ in range(2))
            assert torch.equal(first.row_ptr, second.row_ptr)
            assert torch.equal(first.block_index, second.block_index)

    @pytest.mark.parametrize("per_query", [False, True])
    def test_chunks_choose_what_the_whole_chooses(self, per_query, monkeypatch):
        # duplicates are left out: equal blocks may swap where products are rounded in another order
        for call in self.calls(torch.float64, ("gaussian", "clustered", "all_zero")):
            whole, counts, _ = self.choose(call, self.policy(), per_query=per_query)
            with monkeypatch.context() as patch:
                patch.setattr(call_module, "CHUNK_BYTES", 1)
                assert len(list(call.chunks(self.query_tile))) > 3
                parts, part_counts, _ = self.choose(call, self.policy(), per_query=per_query)
            assert torch.equal(whole.to_dense(call.query), parts.to_dense(call.query))
            assert torch.equal(counts[0], part_counts[0])
            assert torch.equal(counts[1], part_counts[1])

    def test_equals_are_kept_from_the_front(self):
        call = a_call(Shape(1, 2, 1, 16, 64, 8, 4), "all_zero")
        part = self.choose(call, self.policy(keep=None, query_tile=16))[0].blocks
        kept = part.to_tiles()[0, 0, 0]
        count = int(kept.sum())
        assert kept[:count].all()

    def test_numpy_chooses_what_torch_chooses(self):
        for call in self.calls(torch.float64, ("gaussian", "clustered", "all_zero")):
            other = {n: x.numpy() if isinstance(x, Tensor) else x for n, x in vars(call).items() if n != "shared"}
            mine = self.choose(call, self.policy())[0].blocks
            theirs = self.choose(Call(**other), self.policy())[0].blocks
            assert mine.row_ptr.tolist() == theirs.row_ptr.tolist()
            assert mine.block_index.tolist() == theirs.block_index.tolist()


def _any_head(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.reshape(x.shape[0], heads, -1, *x.shape[2:]).any(2)


__all__ = [
    "BACKEND_CASES",
    "BackendContract",
    "BoundContract",
    "PatternContract",
    "ScorerContract",
    "SelectorContract",
    "strategies",
]
