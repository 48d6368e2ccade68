"""What every selector keeps: worked by hand, by law, and through every block size and length."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sieve_attn import attention, pipeline
from sieve_attn import geometry as stage_geometry
from sieve_attn.arrays import torch_ops
from sieve_attn.patterns import Sinks, Union, Window
from sieve_attn.pipeline import select
from sieve_attn.policies import Adaptive, Aether, Certified, Policy, Quest, TopBlocks
from sieve_attn.scores import Box, EventRadar, Exact, Heuristic, KeySketch, Mean, Random
from sieve_attn.selection import Certified as CertifiedSelector
from sieve_attn.selection import Mass, RelativeThreshold, RunningMaximum, TargetSparsity, Threshold, TopK
from sieve_attn.selection.top_k import target_blocks
from sieve_attn.testing import PatternContract, SelectorContract, Shape, assert_close
from sieve_attn.testing.contracts import a_call
from sieve_attn.testing.strategies import gaussian
from sieve_attn.types import Call, Geometry, Sketch

SELECTORS = (
    Threshold(0.5), RelativeThreshold(1.0), TopK(3), TargetSparsity(0.6), Mass(0.8), CertifiedSelector(0.1),
    RunningMaximum(0.5, step=16, run=32),
)  # fmt: skip


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: type(s).__name__, scope="class")
class TestEverySelector(SelectorContract):
    @pytest.fixture(autouse=True)
    def _given(self, selector):
        self.selector = selector


@pytest.mark.parametrize("pattern", [Sinks(3), Window(1), Window(7), Sinks(2) | Window(4)], ids=repr, scope="class")
class TestEveryPattern(PatternContract):
    @pytest.fixture(autouse=True)
    def _given(self, pattern):
        self.pattern = pattern


def elsewhere(x):
    """On a device whose numbers nobody can read."""
    if isinstance(x, torch.Tensor):
        return x.to("meta")
    if isinstance(x, (Sketch, Geometry)):
        return replace(x, **{f.name: elsewhere(getattr(x, f.name)) for f in fields(x)})
    return x


@pytest.mark.parametrize("policy", [Certified(0.1), Policy(Box(), RunningMaximum(2.0))], ids=lambda p: type(p.selector).__name__)
def test_array_operations_choose_on_a_device_without_waiting_for_it(policy):
    q, k, v = gaussian(1, Shape(1, 4, 2, 70, 130, 8, 4))
    geometry = stage_geometry.build(k, policy.block_size, policy.statistics)
    call = Call(elsewhere(q), elsewhere(k), elsewhere(v), causal=True, scale=0.3)
    selection, (kept, visible), _ = pipeline._choose(call, elsewhere(geometry), policy, False, "auto")
    assert selection.blocks.block_index.shape[0] == 2 * 3 * 9  # room for every block of every tile
    assert kept.shape == visible.shape == (1, 2, 3)


def test_lists_with_room_to_spare_begin_with_the_same_blocks():
    kept = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.4
    room = torch_ops._with_room(kept)
    assert room.dtype == torch.int32
    assert room[: kept.sum()].tolist() == torch_ops.true_columns(kept).tolist() == kept.nonzero()[:, 3].tolist()


class Given(Heuristic):
    """Scores that the test wrote down: [rows, blocks], the same for every head unless it has more axes."""

    def __init__(self, *table):
        self.table = torch.tensor(table, dtype=torch.float32)

    def __repr__(self):
        return "Given()"

    def estimate(self, rows, geometry):
        table = self.table if self.table.ndim == 3 else self.table[None]
        return table[:, rows.position, : geometry.blocks].expand(rows.query.shape[0], rows.query.shape[1], -1, -1)


def chosen(scorer, selector, *, rows=2, blocks=4, heads=(1, 1), causal=False, per_query=False, block_size=2, **changes):
    """The kept blocks of every tile of a call with as many positions as keys would need."""
    length = blocks * block_size
    q, k, v = gaussian(1, Shape(1, *heads, rows, length, 4, 4))
    call = Call(q, k, v, causal=causal, scale=0.5)
    changes = {"query_tile": rows, **changes}
    policy = Policy(scorer, selector, block_size=block_size, **changes)
    geometry = stage_geometry.build(k, block_size, policy.statistics)
    found = select(call, geometry, policy, per_query=per_query)
    return found[0].blocks, found


def kept(part, head=0, tile=0):
    return part.to_tiles()[0, head, tile].nonzero()[:, 0].tolist()


class Rows(Given):
    """As Given, but by the row's number instead of its position."""

    def estimate(self, rows, geometry):
        offset = 8 - self.table.shape[-2]
        table = self.table if self.table.ndim == 3 else self.table[None]
        return table[:, rows.position - offset].expand(rows.query.shape[0], rows.query.shape[1], -1, -1)


TWO = Rows([1.0, 2.0, 3.0, 4.0], [4.0, 0.0, 0.0, 0.0])


def test_a_threshold_is_strict_and_looks_at_every_query():
    assert kept(chosen(TWO, Threshold(3.0))[0]) == [0, 3]
    assert kept(chosen(TWO, Threshold(2.999))[0]) == [0, 2, 3]
    assert kept(chosen(TWO, Threshold(3.0), query_stride=2)[0]) == [0, 3]


def test_threshold_infinities():
    assert kept(chosen(TWO, Threshold(-math.inf))[0]) == [0, 1, 2, 3]
    assert kept(chosen(TWO, Threshold(math.inf))[0]) == [0, 3]  # each query's best block
    assert kept(chosen(TWO, Threshold(math.inf), keep=Sinks(3))[0]) == [0, 1]  # the pattern leaves nobody with nothing


def test_a_relative_threshold_is_relative_to_each_query():
    assert kept(chosen(TWO, RelativeThreshold(1.0))[0]) == [0, 2, 3]
    assert kept(chosen(TWO, RelativeThreshold(0.0))[0]) == [0, 3]


def test_ranks_go_by_the_largest_share():
    # shares of row 0: .03 .09 .24 .64; of row 1: .95 .02 .02 .02
    assert kept(chosen(TWO, TopK(1))[0]) == [0]
    assert kept(chosen(TWO, TopK(2))[0]) == [0, 3]
    assert kept(chosen(TWO, TopK(3))[0]) == [0, 2, 3]
    assert kept(chosen(TWO, TopK(9))[0]) == [0, 1, 2, 3]


def test_a_stride_looks_at_every_second_query_and_the_last():
    rows = Rows([9.0, 0.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0])
    assert kept(chosen(rows, TopK(1), rows=3, query_stride=2)[0]) == [1]
    assert kept(chosen(rows, TopK(2), rows=3, query_stride=2)[0]) == [1, 2]
    assert kept(chosen(rows, Mass(0.9), rows=3, query_stride=2)[0]) == [1, 2]
    assert kept(chosen(rows, Mass(0.9), rows=3)[0]) == [0, 1, 2]


def test_mass_keeps_prefixes_and_their_union():
    rows = Rows(
        [math.log(0.5), math.log(0.3), math.log(0.15), math.log(0.05)],
        [math.log(0.1), math.log(0.1), math.log(0.1), math.log(0.7)],
    )
    one = rows.table[:1].tolist()
    assert kept(chosen(Rows(*one), Mass(0.45), rows=1)[0]) == [0]
    assert kept(chosen(Rows(*one), Mass(0.75), rows=1)[0]) == [0, 1]
    assert kept(chosen(Rows(*one), Mass(0.9), rows=1)[0]) == [0, 1, 2]
    assert kept(chosen(Rows(*one), Mass(1.0), rows=1)[0]) == [0, 1, 2, 3]
    assert kept(chosen(Rows(*one), Mass(0.0), rows=1)[0]) == [0]  # nobody is left with nothing
    assert kept(chosen(rows, Mass(0.45))[0]) == [0, 3]


def test_per_query_rows_keep_their_own():
    part, _ = chosen(TWO, TopK(1), per_query=True)
    assert kept(part) == [0, 3]
    assert part.block_rows(0, 2)[0, 0].tolist() == [[False, False, False, True], [True, False, False, False]]
    part, _ = chosen(TWO, Mass(0.6), per_query=True)
    assert part.block_rows(0, 2)[0, 0].tolist() == [[False, False, False, True], [True, False, False, False]]


def test_a_group_shares_its_choice_or_not():
    heads = Rows([[5.0, 0.0, 0.0, 0.0]] * 2, [[0.0, 4.0, 0.0, 0.0]] * 2)
    together, _ = chosen(heads, TopK(1), heads=(2, 1))
    assert together.heads == 1
    assert kept(together) == [0]
    apart, _ = chosen(heads, TopK(1), heads=(2, 1), share_group=False)
    assert apart.heads == 2
    assert (kept(apart, 0), kept(apart, 1)) == ([0], [1])
    assert kept(chosen(heads, Threshold(3.0), heads=(2, 1))[0]) == [0, 1]


def test_ties_go_to_the_smaller_index():
    flat = Rows([1.0, 1.0, 1.0, 1.0])
    assert kept(chosen(flat, TopK(2), rows=1)[0]) == [0, 1]
    assert kept(chosen(flat, TargetSparsity(0.5), rows=1)[0]) == [0, 1]
    assert kept(chosen(flat, Threshold(math.inf), rows=1)[0]) == [0]


def test_forced_blocks_come_on_top():
    assert kept(chosen(Rows([1.0, 2.0, 3.0, 4.0]), TopK(1), rows=1, keep=Sinks(1))[0]) == [0, 3]
    part, (taken, seen), _ = chosen(Rows([1.0, 2.0, 3.0, 4.0]), TopK(2), rows=1, keep=Sinks(1) | Window(1))[1]
    assert kept(part.blocks) == [0, 2, 3]
    assert (int(taken), int(seen)) == (6, 8)


def test_what_causality_cuts_is_kept():
    # tile 4..7 of 8 positions, blocks of 2: blocks 2 and 3 are cut for some query
    part, _ = chosen(Rows(*([[9.0, 1.0, 0.0, 0.0]] * 4)), TopK(1), rows=4, causal=True)
    assert kept(part) == [0, 2, 3]


@pytest.mark.parametrize(
    ("visible", "sparsity", "wanted"),
    [
        (10, 0.8, 2),
        (5, 0.5, 2),
        (7, 0.5, 4),
        (1, 0.99, 1),
        (3, 1.0, 1),
        (4, 0.0, 4),
        (9, 0.75, 2),
        (6, 0.75, 2),
        (14, 0.75, 4),
        (0, 0.5, 1),
    ],
)
def test_target_sparsity_rounds_halves_to_even(visible, sparsity, wanted):
    assert int(target_blocks(torch.tensor([visible]), sparsity)) == wanted
    assert wanted == max(1, round(visible * (1 - sparsity)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 4000), st.floats(0, 1))
def test_target_sparsity_is_pythons_round(visible, sparsity):
    assert int(target_blocks(torch.tensor([visible]), sparsity)) == max(1, round(visible * (1 - sparsity)))


def test_target_sparsity_keeps_exactly_its_count():
    for blocks in (4, 7, 13):
        part, _ = chosen(Random(), TargetSparsity(0.7), rows=3, blocks=blocks)
        assert len(kept(part)) == max(1, round(blocks * 0.3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize(("q_len", "kv_len"), [(63, 63), (257, 257), (65, 130), (130, 97), (1, 191)])
def test_aether_laws(dtype, block_size, q_len, kv_len):
    shape = Shape(1, 2, 1, q_len, kv_len, 16, 8)
    leaves = [x.requires_grad_() for x in gaussian(2, shape, dtype)]

    def run(policy):
        out, lse = attention(*leaves, policy, causal=True, return_lse=True)
        return out, lse, torch.autograd.grad(out.float().square().sum(), leaves)

    everything, dense = run(Aether(-math.inf, block_size)), run(None)
    assert torch.equal(everything[0], dense[0])
    assert torch.equal(everything[1], dense[1])
    for a, b in zip(everything[2], dense[2], strict=True):
        assert_close(a, b, dtype=dtype)
    again = run(Aether(0.5, block_size))
    assert torch.equal(again[0], run(Aether(0.5, block_size))[0])
    # nothing passes +inf: the forced blocks and each query's best are left
    _, report = attention(*leaves, Aether(math.inf, block_size), causal=True, return_report=True)
    part = report.selection.blocks
    position = torch.arange(q_len) + kv_len - q_len
    tile = position // block_size - (kv_len - q_len) // block_size
    for t in range(part.tiles):
        inside = position[tile == t]
        blocks = kept(part, tile=t)
        cut = {
            b for b in range(part.blocks) for p in inside.tolist() if b * block_size <= p < min((b + 1) * block_size, kv_len) - 1
        }
        assert cut <= set(blocks)
        assert len(blocks) <= max(len(cut), 1) + 1 + 2 * len(inside) * (not cut)


def test_no_key_above_the_threshold_is_dropped():
    q, k, v = gaussian(4, Shape(1, 4, 2, 100, 200, 16, 8))
    for level in (0.5, 2.0, 5.0):
        _, report = attention(q, k, v, Aether(level, 32), causal=True, return_report=True)
        kept_keys = report.selection.to_dense(q).repeat_interleave(2, 1)
        logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) / 4
        position = torch.arange(100, 200)[:, None]
        dropped = ~kept_keys & (torch.arange(200) <= position)
        assert (logits[dropped] <= level).all()


def test_015_keeps_every_block_of_gaussian_keys():
    q, k, v = gaussian(4, Shape(1, 2, 2, 128, 256, 32, 8))
    assert attention(q, k, v, Aether(), return_report=True)[1].density == 1.0


CHUNKED = [
    TopBlocks(3, sinks=4, window=8),
    Adaptive(0.9, sinks=4, window=8),
    Certified(0.2),
    Quest(3),
    Aether(1.0, 16),
    Policy(KeySketch(4), TargetSparsity(0.7), query_stride=4),
]


@pytest.mark.parametrize("policy", CHUNKED)
def test_a_prefill_in_chunks_chooses_what_one_prefill_would(policy):
    q, k, v = gaussian(6, Shape(1, 4, 2, 320, 320, 16, 8), torch.float64)
    whole, report = attention(q, k, v, policy, causal=True, return_report=True)
    dense = report.selection.to_dense(q)
    for start, stop in ((64, 128), (128, 320), (256, 320)):
        out, part = attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], policy, causal=True, return_report=True)
        assert torch.equal(part.selection.to_dense(q), dense[:, :, start:stop, :stop])
        assert_close(out, whole[:, :, start:stop])


@pytest.mark.parametrize("scorer", [KeySketch(4), Exact(), Box(), Mean(), EventRadar(True, True)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "selector", [TopK(2), Mass(0.7), RelativeThreshold(0.5), Threshold(1.0), TargetSparsity(0.5)], ids=lambda s: type(s).__name__
)
def test_per_query_choices_do_not_look_ahead(scorer, selector):
    q, k, v = gaussian(6, Shape(1, 2, 1, 200, 200, 16, 8), torch.float64)
    policy = Policy(scorer, selector, block_size=16)
    future = 150
    other_k, other_v, other_q = k.clone(), v.clone(), q.clone()
    for x in (other_k, other_v, other_q):
        x[:, :, future:] = 5 * x[:, :, future:].flip(2)
    first, second = (
        attention(a, b, c, policy, causal=True, per_query=True) for a, b, c in ((q, k, v), (other_q, other_k, other_v))
    )
    assert_close(first[:, :, :future], second[:, :, :future])


@pytest.mark.parametrize("selector", [TopK(2), Mass(0.7)], ids=lambda s: type(s).__name__)
def test_early_queries_do_not_look_ahead_through_the_scales_of_the_sketch(selector):
    q, k, v = gaussian(6, Shape(1, 2, 1, 100, 100, 16, 8), torch.float64)
    policy = Policy(KeySketch(2), selector, block_size=4)
    other_k = k.clone()
    other_k[:, :, 40:, ::2] *= 30
    first, second = (attention(q, keys, v, policy, causal=True, per_query=True) for keys in (k, other_k))
    assert_close(first[:, :, :40], second[:, :, :40])


def test_certified_unions_meet_every_query():
    call = a_call(Shape(1, 4, 2, 64, 256, 16, 8), "clustered", causal=True)
    policy = Policy(KeySketch(8), CertifiedSelector(0.1), query_stride=4)
    geometry = stage_geometry.build(call.key, 16, policy.statistics)
    rows = select(call, geometry, policy, per_query=True)[0].to_dense(call.query)
    tiles = select(call, geometry, policy)[0].to_dense(call.query)
    assert not (rows & ~tiles).any()


def test_patterns_read_back_what_they_were_made_of():
    both = Sinks(4) | Window(8) | Sinks(2)
    assert both == Union((Sinks(4), Window(8), Sinks(2)))
