"""Patterns of offsets and blocks against their definitions, written once more here."""

import itertools
import math
import random
from time import process_time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import patterns, policies
from sieve_attn.attend.offsets import reach
from sieve_attn.patterns import Dilated, Fibonacci, GlobalTokens, MianChowla, OffsetPattern, Primes, RandomBlocks, Squares, Window
from sieve_attn.patterns.mian_chowla import _Greedy, mian_chowla
from sieve_attn.patterns.primes import primes
from sieve_attn.testing import PatternContract

EVERY = [
    Primes(), Primes(3), Squares(), Squares(2), MianChowla(), MianChowla(4), Fibonacci(), Dilated(3, 5), GlobalTokens(2),
    OffsetPattern((1, 6, 20)), RandomBlocks(2, 4), RandomBlocks(1, 8, seed=3, window=2, global_blocks=1),
    RandomBlocks(0, 5, window=1),
]  # fmt: skip


@pytest.mark.parametrize("pattern", EVERY, ids=repr, scope="class")
class TestEveryPattern(PatternContract):
    @pytest.fixture(autouse=True)
    def _given(self, pattern):
        self.pattern = pattern


def is_prime(n):
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def greedy_sidon(count):
    terms, sums = [], set()
    for c in itertools.count(1):
        made = {c + a for a in [*terms, c]}
        if not made & sums:
            terms.append(c)
            sums |= made
        if len(terms) == count:
            return terms


def test_the_published_counts_up_to_4096():
    assert [len(p.up_to(4096)) for p in (Primes(), Squares(), MianChowla())] == [564, 64, 46]


def test_generators_give_what_their_definitions_say():
    assert primes(5000).tolist() == [n for n in range(5001) if is_prime(n)]
    assert Squares().up_to(2000).tolist() == [n * n for n in range(1, 45)]
    assert mian_chowla(60).tolist() == greedy_sidon(60)
    assert Fibonacci().up_to(100).tolist() == [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]
    assert Dilated(4, 3).up_to(11).tolist() == [3, 6, 9]
    assert MianChowla().up_to(100).tolist() == [1, 2, 4, 8, 13, 21, 31, 45, 66, 81, 97]


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 8, 9, 10, 2_097_155, 2_097_169])
def test_the_sieve_is_right_at_its_borders(limit):
    # the last two lie at the end of a segment of the sieve
    found = primes(limit)
    assert all(is_prime(int(n)) for n in found[-50:])
    wanted = [n for n in range(max(0, limit - 300), limit + 1) if is_prime(n)]
    assert found[len(found) - len(wanted) :].tolist() == wanted


def test_ten_million_are_sieved():
    assert len(primes(10_000_000)) == 664_579


@pytest.mark.long
def test_two_thousand_terms_of_mian_chowla_take_seconds():
    start = process_time()
    terms = _Greedy().first(2000)
    assert process_time() - start < 10  # 28 s when every sum was an index of its own
    assert int(terms[-1]) == 96_592_680


def test_mian_chowla_is_sidon_and_greedy_far_out():
    terms = mian_chowla(400)
    apart = (terms[:, None] - terms[None, :])[np.tril_indices(400, -1)]
    assert len(np.unique(apart)) == len(apart)
    # a number that was passed over makes a difference that is there already
    source = random.Random(0)
    chosen = set(terms.tolist())
    for _ in range(200):
        c = source.randrange(int(terms[0]) + 1, int(terms[-1]))
        if c not in chosen:
            before = terms[terms < c]
            inner = (before[:, None] - before[None, :])[np.tril_indices(len(before), -1)]
            assert np.isin(c - before, inner).any(), c


@pytest.mark.parametrize("pattern", [p for p in EVERY if isinstance(p, patterns.OffsetSet)], ids=repr)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (40, 40), (7, 40), (40, 7)])
def test_density_counts_pairs(pattern, q_len, kv_len):
    dense = pattern.to_dense(q_len, kv_len)
    position, key = np.arange(kv_len - q_len, kv_len)[:, None], np.arange(kv_len)[None]
    visible = key <= position
    assert np.array_equal(dense, np.isin(position - key, pattern.up_to(kv_len)) & visible)
    wanted = dense.sum() / visible.sum() if visible.any() else 1.0
    assert pattern.density(q_len, kv_len) == pytest.approx(wanted)
    assert patterns.Pattern.density(pattern, q_len, kv_len) == pytest.approx(wanted)


def test_densities_at_16384_as_the_issue_states_them():
    for pattern, wanted in ((Primes(), 0.123), (Squares(), 0.0104), (MianChowla(), 0.0071)):
        assert pattern.density(16_384) == pytest.approx(wanted, rel=0.02)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(0, 5), st.integers(0, 9), st.sets(st.integers(1, 70), min_size=1, max_size=12))
def test_the_index_set_of_the_specification(length, global_tokens, window, offsets):
    """1-based: {j <= g} | {i - w <= j <= i} | {i - s}, 1 <= j <= i, as a set."""
    pattern = OffsetPattern(tuple(sorted(offsets))) | Window(window + 1)
    pattern = pattern | GlobalTokens(global_tokens) if global_tokens else pattern
    dense = pattern.to_dense(length)
    found = reach(pattern, length)
    pairs = 0
    for i in range(1, length + 1):
        wanted = {j for j in range(1, i + 1) if j <= global_tokens or i - window <= j or i - j in offsets}
        assert {int(j) + 1 for j in np.flatnonzero(dense[i - 1])} == wanted
        kept = {j for j in range(1, i + 1) if j <= found.prefix or i - j in set(found.offsets.tolist())}
        assert kept == wanted
        pairs += len(wanted)
    assert found.pairs(length, length) == pairs


def test_random_blocks_are_distinct_earlier_and_the_same_in_pieces():
    pattern = RandomBlocks(3, 4, seed=5)
    drawn = pattern.drawn(0, 30)
    for t, row in enumerate(drawn.tolist()):
        there = [b for b in row if b >= 0]
        assert len(there) == min(t, 3) == len(set(there))
        assert all(b < t for b in there)
    assert np.array_equal(pattern.drawn(11, 30), drawn[11:])
    assert not np.array_equal(RandomBlocks(3, 4, seed=6).drawn(0, 30), drawn)
    whole = torch.from_numpy(pattern.to_dense(61))
    piece = pattern.selection(18, 61).to_dense(torch.zeros(1))[0, 0]
    causal = torch.ones(61, 61, dtype=torch.bool).tril()[-18:]
    assert torch.equal(piece & causal, whole[-18:])


@pytest.mark.parametrize("pattern", EVERY, ids=repr)
def test_policies_read_them_back(pattern):
    policy = policies.Policy(keep=pattern | Window(3))
    assert policies.parse(repr(policy)) == policy


def test_plots_are_drawn_where_matplotlib_is():
    pytest.importorskip("matplotlib").use("Agg")
    axes = (Primes() | Window(2)).plot(32)
    assert axes.get_xlabel() == "key"


BAD = {
    "empty": (lambda: OffsetPattern(()), ("`offsets`", "at least one", "(1, 2, 4, 8)")),
    "equal": (lambda: OffsetPattern((1, 2, 2)), ("`offsets`", "must increase", "2 after 2", "sorted(set(offsets))")),
    "falling": (lambda: OffsetPattern((4, 2)), ("`offsets`", "must increase", "2 after 4")),
    "zero": (lambda: OffsetPattern((0, 2)), ("`offsets`", "at least 1", "0", "Window(1)")),
    "negative": (lambda: OffsetPattern((-3, 2)), ("`offsets`", "at least 1", "-3")),
    "fraction": (lambda: OffsetPattern((1, 2.5)), ("`offsets`", "integer", "2.5")),
    "no sequence": (lambda: OffsetPattern(7), ("`offsets`", "sequence", "7")),
    "no terms": (lambda: Primes(0), ("`terms`", "at least 1", "0")),
    "no step": (lambda: Dilated(3, 0), ("`step`", "at least 1", "0")),
    "no tokens": (lambda: GlobalTokens(0), ("`tokens`", "at least 1")),
    "negative blocks": (lambda: RandomBlocks(-1), ("`blocks`", "at least 0", "-1")),
    "no block size": (lambda: RandomBlocks(1, 0), ("`block_size`", "at least 1")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_patterns_are_refused_in_words(case):
    make, words = BAD[case]
    with pytest.raises(ValueError, match=r".+; got .+; .+") as caught:
        make()
    for word in words:
        assert word in str(caught.value)
