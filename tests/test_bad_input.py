"""Every bad input is refused before any work, by a message with the argument, the rule, the value and the remedy."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from sieve_attn import (
    AetherAttention,
    aether,
    aether_attention,
    attend,
    attention,
    certify,
    dispatch,
    geometry,
    patterns,
    policies,
    scores,
    selection,
)
from sieve_attn.policies import Policy, TopBlocks
from sieve_attn.testing import Shape
from sieve_attn.testing.contracts import a_call
from sieve_attn.testing.strategies import gaussian, random_blocks
from sieve_attn.types import Blocks, Ranges, Selection, Tokens

Q, K, V = gaussian(1, Shape(2, 4, 2, 6, 10, 8, 4))
ALL = Selection((Ranges(6, 10, prefix=10),))


def refuse(run, *words, kind=ValueError):
    """``run`` raises ``kind``, and its message holds every one of ``words``."""
    with pytest.raises(kind) as caught:
        run()
    message = str(caught.value)
    missing = [w for w in words if w not in message]
    assert not missing, f"{missing} not in: {message}"
    assert re.match(r"`.+` .+; got .+; .+", message, re.DOTALL), f"not argument, rule, value, remedy: {message}"


BAD_ARRAYS = {
    "query of rank 3": ((Q[0], K, V), {}, ("`query`", "4 axes", "(4, 6, 8)", "unsqueeze")),
    "key of rank 5": ((Q, K[None], V), {}, ("`key`", "4 axes", "(1, 2, 2, 10, 8)")),
    "value of rank 2": ((Q, K, V[0, 0]), {}, ("`value`", "4 axes", "(10, 4)")),
    "integers": ((Q.long(), K, V), {}, ("`query`", "floating", "int64", "cast")),
    "mixed dtypes": ((Q, K.bfloat16(), V), {}, ("`query, key, value`", "one dtype", "bfloat16", "cast")),
    "another batch": ((Q, K[:1], V[:1]), {}, ("batch", "2, 1, 1")),
    "an empty batch": ((Q[:0], K[:0], V[:0]), {}, ("`query`", "at least one", "(0, 4, 6, 8)", "empty")),
    "no queries": ((Q[:, :, :0], K, V), {}, ("`query`", "at least one", "(2, 4, 0, 8)", "empty sequences")),
    "no keys": ((Q, K[:, :, :0], V[:, :, :0]), {}, ("`key`", "at least one", "(2, 2, 0, 8)")),
    "no channels": ((Q[..., :0], K[..., :0], V), {}, ("`query`", "at least one")),
    "another head_dim": ((Q[..., :7], K, V), {}, ("`key`", "head_dim", "8 against 7", "`value` may")),
    "another number of value heads": ((Q, K, V[:, :1]), {}, ("`value`", "heads of `key`", "1 against 2")),
    "another number of values": ((Q, K, V[:, :, :9]), {}, ("`value`", "length of `key`", "9 against 10")),
    "heads that do not divide": ((Q[:, :3], K, V), {}, ("`query`", "multiple", "3 query heads on 2 KV heads", "n * kv_heads")),
    "scale 0": ((Q, K, V), {"scale": 0.0}, ("`scale`", "positive finite", "0.0", "sign")),
    "scale NaN": ((Q, K, V), {"scale": math.nan}, ("`scale`", "nan")),
    "scale as text": ((Q, K, V), {"scale": "auto"}, ("`scale`", "'auto'")),
    "softcap below 0": ((Q, K, V), {"softcap": -1.0}, ("`softcap`", "positive", "-1.0", "None")),
    "a float mask": ((Q, K, V), {"mask": torch.zeros(1, 1, 6, 10)}, ("`mask`", "boolean", "float32", "`bias`")),
    "a mask of another shape": (
        (Q, K, V),
        {"mask": torch.ones(6, 10, dtype=torch.bool)},
        ("`mask`", "[2 or 1, 4 or 1, 6, 10]", "(6, 10)", "key_mask"),
    ),
    "a mask over other heads": ((Q, K, V), {"mask": torch.ones(2, 2, 6, 10, dtype=torch.bool)}, ("`mask`", "(2, 2, 6, 10)")),
    "a key_mask of another shape": (
        (Q, K, V),
        {"key_mask": torch.ones(2, 9, dtype=torch.bool)},
        ("`key_mask`", "[2, 10]", "(2, 9)"),
    ),
    "an integer key_mask": ((Q, K, V), {"key_mask": torch.ones(2, 10, dtype=torch.int64)}, ("`key_mask`", "boolean", "int64")),
    "an integer bias": ((Q, K, V), {"bias": torch.zeros(1, 1, 6, 10, dtype=torch.int64)}, ("`bias`", "floating", "int64")),
    "a bias of another shape": ((Q, K, V), {"bias": torch.zeros(1, 3, 6, 10)}, ("`bias`", "[2, 4, 6, 10]", "(1, 3, 6, 10)")),
    "a bias of rank 2": ((Q, K, V), {"bias": torch.zeros(6, 10)}, ("`bias`", "4 axes", "(6, 10)")),
    "packed with a batch": ((Q, K, V), {"cu_seqlens": torch.tensor([0, 10])}, ("`cu_seqlens`", "one packed batch", "batch 2")),
    "a sink too few": ((Q, K, V), {"sink": torch.zeros(3)}, ("`sink`", "[4]", "(3,)", "heads")),
    "window 0": ((Q, K, V), {"window": 0}, ("`window`", "at least 1", "0", "None")),
    "window 2.5": ((Q, K, V), {"window": 2.5}, ("`window`", "integer", "2.5")),
    "a float8 query": ((Q.to(torch.float8_e4m3fn), K, V), {}, ("`query`", "fp16, bf16, fp32, fp64", "float8_e4m3fn", "cast")),
    "keys elsewhere": ((Q, K.to("meta"), V.to("meta")), {}, ("`key`", "device of `query`, cpu", "meta", ".to(query.device)")),
    "arrays without values": (tuple(x.to("meta") for x in (Q, K, V)), {}, ("`query`", "hold values", "meta", "move it")),
    "a bias elsewhere": ((Q, K, V), {"bias": torch.zeros(1, 1, 6, 10, device="meta")}, ("`bias`", "device of `query`", "meta")),
    "scale True": ((Q, K, V), {"scale": True}, ("`scale`", "True")),
    "an unknown backend": ((Q, K, V), {"backend": "cuda"}, ("`backend`", "triton, native, reference", "'cuda'", "'auto'")),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays(name):
    arrays, options, words = BAD_ARRAYS[name]
    refuse(lambda: attention(*arrays, **options), *words)
    refuse(lambda: attention(*arrays, TopBlocks(1), **options), *words)
    refuse(lambda: attend(*arrays, ALL, **options), *words)


@pytest.mark.parametrize("edges", [[0, 5], [1, 10], [0, 7, 5, 10], [0, 5, 5, 10], []])
def test_bad_sequence_edges(edges):
    q, k, v = (x[:1, :2, :10] for x in (K, K, V))
    refuse(
        lambda: attention(q, k, v, cu_seqlens=torch.tensor(edges, dtype=torch.int32)),
        "`cu_seqlens`",
        "0 to 10",
        str(edges[:8]),
        "empty",
    )


@pytest.mark.parametrize("edges", [torch.tensor([0.0, 10.0]), torch.tensor([[0, 10]]), [0, 4.5, 10], "0, 10", 10])
def test_sequence_edges_are_integers_along_one_axis(edges):
    q, k, v = (x[:1, :2, :10] for x in (K, K, V))
    refuse(lambda: attention(q, k, v, cu_seqlens=edges), "`cu_seqlens`", "integers along one axis", "cumulative lengths")


@pytest.mark.parametrize("name", ["mask", "key_mask", "bias", "sink"])
def test_options_are_arrays_of_the_querys_framework(name):
    refuse(lambda: attention(Q, K, V, **{name: [1.0]}), f"`{name}`", "array", "list", "tensor", kind=TypeError)
    refuse(lambda: attention(Q, K, V, **{name: np.ones(4)}), f"`{name}`", "of torch", "ndarray", "convert", kind=TypeError)


def test_sequence_edges_may_be_a_list():
    q, k, v = (x[:1, :2, :10] for x in (K, K, V))
    assert torch.equal(attention(q, k, v, cu_seqlens=[0, 4, 10]), attention(q, k, v, cu_seqlens=torch.tensor([0, 4, 10])))


def test_dropout_is_refused():
    refuse(lambda: attention(Q, K, V, dropout=0.1), "`dropout`", "must be 0", "0.1", "model.eval()")
    assert attention(Q, K, V, dropout=0.0).shape == (2, 4, 6, 4)


def test_a_policy_must_be_one():
    refuse(
        lambda: attention(Q, K, V, "adaptive"), "`policy`", "Policy or None", "'adaptive'", "policies.Adaptive", kind=TypeError
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'polcy'"):
        attention(Q, K, V, polcy=None)
    refuse(lambda: attention(None, K, V), "`query`", "array", "None", kind=TypeError)
    refuse(lambda: attention(Q, K, None), "`value`", "array", "None", kind=TypeError)
    with pytest.raises(TypeError, match="arrays must all come from one of torch, numpy"):
        attention(Q.numpy(), K, V)
    with pytest.raises(TypeError, match="arrays must all come from one of torch, numpy, jax; got list"):
        attention([[1.0]], [[1.0]], [[1.0]])


@pytest.mark.parametrize("name", dispatch.ORDER)
def test_a_backend_that_cannot_run_lists_its_reasons(name):
    reasons = dispatch.why_not(name, dispatch.Request("torch", "cpu", "float32", 8, 4))
    if reasons:
        refuse(lambda: attention(Q, K, V, backend=name), "`backend`", "cannot run", repr(name), "backend='auto'", *reasons)
    else:
        assert attention(Q, K, V, backend=name).shape == (2, 4, 6, 4)


def test_selections_must_fit():
    refuse(
        lambda: attend(Q, K, V, Selection((Ranges(6, 11, prefix=3),))), "`selection`", "(6, 11) against (6, 10)", "select again"
    )
    wrong = random_blocks(1, Shape(2, 3, 3, 6, 10, 8, 4), heads=3)
    refuse(lambda: attend(Q, K, V, wrong), "`selection`", "heads 1, 2 or 4", "heads 3")
    three = random_blocks(1, Shape(3, 2, 2, 6, 10, 8, 4))
    refuse(lambda: attention(Q, K, V, selection=three), "`selection`", "batch 1 or 2", "batch 3")
    tokens = Selection((Tokens(torch.zeros(2, 3, 6, 2, dtype=torch.int64), 10),))
    refuse(lambda: attend(Q, K, V, tokens), "`selection`", "heads 3")
    refuse(lambda: attend(Q, K, V, None), "`selection`", "a Selection", "NoneType", "report.selection", kind=TypeError)
    assert isinstance(wrong.blocks, Blocks)


def test_geometries_must_fit():
    refuse(lambda: attention(Q, K, V, TopBlocks(1), geometry="x"), "`geometry`", "Geometry", "str", "build", kind=TypeError)
    short = geometry.build(K[:, :, :9], 16, TopBlocks(1).statistics)
    refuse(lambda: attention(Q, K, V, TopBlocks(1), geometry=short), "`geometry`", "(2, 2, 10, 16)", "(2, 2, 9, 16)", "append")
    poor = geometry.build(K, 16)
    refuse(lambda: attention(Q, K, V, TopBlocks(1), geometry=poor), "`geometry`", "sketch_bits=4", "statistics=policy.statistics")
    few = geometry.build(K, 16, scores.KeySketch(2).statistics)
    refuse(lambda: attention(Q, K, V, TopBlocks(1), geometry=few), "`geometry`", "sketch_bits=2")


BAD_POLICIES = {
    "NaN threshold": (lambda: policies.Aether(math.nan), ValueError, ("`threshold`", "not NaN", "nan", "float('-inf')")),
    "NaN margin": (lambda: selection.RelativeThreshold(math.nan), ValueError, ("`margin`", "nan")),
    "NaN running margin": (lambda: selection.RunningMaximum(math.nan), ValueError, ("`margin`", "nan")),
    "negative running margin": (lambda: selection.RunningMaximum(-1.0), ValueError, ("`margin`", "at least 0", "-1.0")),
    "step of a run": (lambda: selection.RunningMaximum(step=0), ValueError, ("`step`", "0")),
    "run of half a step": (lambda: selection.RunningMaximum(step=64, run=96), ValueError, ("`run`", "multiple of step", "96")),
    "negative margin": (lambda: selection.RelativeThreshold(-1.0), ValueError, ("`margin`", "at least 0", "-1.0")),
    "mass above 1": (lambda: policies.Adaptive(1.5), ValueError, ("`mass`", "[0, 1]", "1.5", "0.99")),
    "mass below 0": (lambda: policies.Adaptive(-0.1), ValueError, ("`mass`", "[0, 1]", "-0.1")),
    "NaN mass": (lambda: policies.Adaptive(math.nan), ValueError, ("`mass`", "nan")),
    "error of 0": (lambda: policies.Certified(0.0), ValueError, ("`error`", "between 0 and 1", "Dense()")),
    "error of 1": (lambda: policies.Certified(1.0), ValueError, ("`error`", "between 0 and 1")),
    "error above 1": (lambda: policies.Certified(2.0), ValueError, ("`error`", "[0, 1]", "2.0")),
    "no blocks": (lambda: policies.TopBlocks(0), ValueError, ("`k`", "at least 1", "0")),
    "nine bits": (lambda: policies.TopBlocks(4, bits=9), ValueError, ("`bits`", "1..8", "9", "try 4")),
    "0 bits": (lambda: scores.KeySketch(0), ValueError, ("`bits`", "1..8")),
    "4-bit queries": (lambda: scores.KeySketch(4, query_bits=4), ValueError, ("`query_bits`", "None or 8", "4")),
    "negative sinks": (lambda: policies.TopBlocks(4, sinks=-1), ValueError, ("`sinks`", "at least 0", "-1")),
    "no window": (lambda: policies.Windowed(4, 0), ValueError, ("`window`", "at least 1", "0")),
    "empty pattern": (lambda: patterns.Sinks(0), ValueError, ("`tokens`", "at least 1", "leave the pattern out")),
    "sparsity above 1": (lambda: policies.EventRadar(target_sparsity=1.2), ValueError, ("`sparsity`", "[0, 1]", "1.2")),
    "unknown recency": (
        lambda: policies.EventRadar(recency="newest"),
        ValueError,
        ("`recency`", "'additive' or 'legacy'", "'newest'"),
    ),
    "decay of 0": (lambda: policies.EventRadar(recency_decay=0.0), ValueError, ("`recency_decay`", "(0, 1]", "0.0")),
    "block_size 48.5": (
        lambda: policies.Aether(0.1, 48.5),
        ValueError,
        ("`block_size`", "integer of at least 1", "48.5", "try 16 or 64"),
    ),
    "block_size True": (lambda: policies.Aether(0.1, True), ValueError, ("`block_size`", "True")),
    "no tile": (lambda: Policy(query_tile=0), ValueError, ("`query_tile`", "at least 1")),
    "a stride over the tile": (
        lambda: Policy(query_tile=4, query_stride=8),
        ValueError,
        ("`query_stride`", "at most query_tile (4)", "8"),
    ),
    "dense_above 2": (lambda: Policy(dense_above=2.0), ValueError, ("`dense_above`", "[0, 1]", "2.0")),
    "negative length": (lambda: Policy(min_seq_length=-1), ValueError, ("`min_seq_length`", "at least 0", "-1")),
    "a scorer alone": (lambda: Policy(scores.Exact()), ValueError, ("`scorer, selector`", "together", "Exact()")),
    "a selector alone": (
        lambda: Policy(None, selection.TopK(3)),
        ValueError,
        ("`scorer, selector`", "together", "TopK(blocks=3)"),
    ),
    "a selector for a scorer": (
        lambda: Policy(selection.TopK(3), selection.TopK(3)),
        TypeError,
        ("`scorer`", "Scorer", "TopK", "sieve_attn.scores"),
    ),
    "a class for a scorer": (lambda: Policy(scores.Exact, selection.TopK(3)), TypeError, ("`scorer`", "Scorer", "Exact")),
    "a far field of nothing": (lambda: Policy(far_field=True), ValueError, ("`far_field`", "scorer", "True")),
    "a proof from a heuristic": (
        lambda: Policy(scores.Mean(), selection.Certified(0.1)),
        ValueError,
        ("`scorer`", "Bound", "Mean()", "KeySketch(bits=8)"),
    ),
    "no sub-mean": (lambda: scores.SubMeans(0), ValueError, ("`size`", "at least 1")),
    "unknown policy": (
        lambda: policies.parse("fastest"),
        ValueError,
        ("`policy`", "known names", "top_blocks", "'fastest'", "spelling"),
    ),
    "no call": (lambda: policies.parse("top_blocks(k="), ValueError, ("`policy`", "read like a call", "adaptive")),
    "an expression": (lambda: policies.parse("top_blocks(k=3 + 4)"), ValueError, ("`policy`", "names, calls, numbers")),
    "code": (lambda: policies.parse("__import__('os').system('true')"), ValueError, ("`policy`",)),
    "a scorer as policy": (lambda: policies.parse("Exact()"), ValueError, ("`policy`", "name a policy", "dense, aether")),
    "a bad share in text": (lambda: policies.parse("adaptive(mass=7.5)"), ValueError, ("`mass`", "7.5")),
    "stars": (lambda: policies.parse("top_blocks(**{'k': 3})"), ValueError, ("`policy`",)),
}


@pytest.mark.parametrize("name", BAD_POLICIES)
def test_bad_policies(name):
    make, kind, words = BAD_POLICIES[name]
    refuse(make, *words, kind=kind)


WRONG_KINDS = """
from sieve_attn import policies, scores, selection
for make in (lambda: policies.Aether("high"), lambda: policies.TopBlocks(2.5), lambda: policies.Adaptive(7),
             lambda: policies.Certified(True),
             lambda: scores.KeySketch("4"), lambda: selection.TopK(True), lambda: scores.SubMeans(1.5)):
    try:
        make()
    except ValueError as refused:
        print(refused)
"""


def test_values_of_a_wrong_kind():
    # in a process of its own: inside the suite the type checker would speak first
    done = subprocess.run([sys.executable, "-c", WRONG_KINDS], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    words = [
        ("`threshold`", "'high'"),
        ("`k`", "2.5"),
        ("`mass`", "7"),
        ("`error`", "True"),
        ("`bits`", "'4'"),
        ("`blocks`", "True"),
        ("`size`", "1.5"),
    ]
    assert len(said) == len(words)
    for line, wanted in zip(said, words, strict=True):
        assert all(w in line for w in wanted), line


def test_unknown_keywords_of_a_policy():
    with pytest.raises(TypeError, match="unexpected keyword argument 'blocks'"):
        policies.TopBlocks(blocks=3)
    said = (
        "`policy`",
        "top_blocks",
        "k, bits, sinks, window, query_stride",
        "'top_blocks(q=3)'",
        "unexpected keyword argument 'q'",
    )
    refuse(lambda: policies.parse("top_blocks(q=3)"), *said, kind=TypeError)
    refuse(lambda: policies.parse("quest(1, 2, 3)"), "`policy`", "quest", "too many positional", kind=TypeError)
    refuse(lambda: policies.parse("Policy(KeySketch, TopK)"), "`policy`", "TopK", "(blocks)", "missing", kind=TypeError)
    refuse(lambda: policies.parse(None), "`policy`", "text", "NoneType", "adaptive", kind=TypeError)


BAD_AETHER = {
    "ranks that differ": (lambda q, k, v: aether_attention(q, k[0], v), ("3, 4 or 5 axes", "4, 3 and 4")),
    "rank 2": (
        lambda q, k, v: aether_attention(q[0, :, 0], k[0, :, 0], v[0, :, 0]),
        ("3, 4 or 5 axes", "2, 2 and 2", "unsqueeze"),
    ),
    "NaN threshold": (lambda q, k, v: aether_attention(q, k, v, math.nan), ("`threshold`", "nan")),
    "no block": (lambda q, k, v: aether_attention(q, k, v, block_size=0), ("`block_size`", "0", "48 or 64")),
    "dropout": (lambda q, k, v: aether_attention(q, k, v, p=0.5), ("`p`", "must be 0", "0.5", "model.eval()")),
    "a boolean bias": (
        lambda q, k, v: aether_attention(q, k, v, attn_bias=torch.ones(8, 8, dtype=torch.bool)),
        ("`attn_bias`", "floating", "torch.bool", "mask="),
    ),
    "a bias of another shape": (
        lambda q, k, v: aether_attention(q, k, v, attn_bias=torch.zeros(3, 2, 8, 8)),
        ("`attn_bias`", "[1, 2, 8, 8]", "(3, 2, 8, 8)", "length 1"),
    ),
    "a bias of another shape, grouped": (
        lambda q, k, v: aether_attention(*(x[:, :, None] for x in (q, k, v)), attn_bias=torch.zeros(1, 3, 2, 8, 8)),
        ("`attn_bias`", "[1, 1, 2, 8, 8]", "(1, 3, 2, 8, 8)"),
    ),
    "geometry, integers": (lambda q, k, v: aether.compute_block_geometry(k.long()), ("`k`", "floating", "int64", "cast")),
    "metadata, integers": (lambda q, k, v: aether.precompute_metadata(k.long()), ("`keys`", "floating", "int64", "cast")),
    "other heads": (lambda q, k, v: aether_attention(q, k[:, :, :1].expand(-1, -1, 3, -1), v), ("heads", "2")),
    "other groups": (
        lambda q, k, v: aether_attention(q[:, :, None], k[:, :, :1, None], v[:, :, None]),
        ("`key`", "groups and heads", "(1, 2)"),
    ),
    "another dtype": (lambda q, k, v: aether_attention(q, k.half(), v), ("one dtype", "float16")),
    "module, NaN": (lambda q, k, v: AetherAttention(math.nan), ("`sparsity_threshold`", "nan")),
    "module, block": (lambda q, k, v: AetherAttention(0.1, 2.5), ("`block_size`", "2.5")),
    "geometry, rank": (lambda q, k, v: aether.compute_block_geometry(k[0]), ("`k`", "[batch, len, heads, head_dim]")),
    "geometry, empty": (lambda q, k, v: aether.compute_block_geometry(k[:, :0]), ("`k`", "non-empty")),
    "geometry, block": (lambda q, k, v: aether.compute_block_geometry(k, -3), ("`block_size`", "-3")),
    "metadata, rank": (lambda q, k, v: aether.precompute_metadata(k[0]), ("`keys`", "[batch, heads, len, head_dim]")),
    "metadata, block": (lambda q, k, v: aether.precompute_metadata(k, 0), ("`block_size`", "0")),
}


@pytest.mark.parametrize("name", BAD_AETHER)
def test_bad_aether_calls(name):
    run, words = BAD_AETHER[name]
    q, k, v = (torch.randn(1, 8, 2, 4) for _ in range(3))
    refuse(lambda: run(q, k, v), *words)


def test_an_unknown_attn_bias_is_refused_by_name():
    class Rubbish:
        pass

    q = torch.randn(1, 8, 2, 4)
    refuse(
        lambda: aether_attention(q, q, q, attn_bias=Rubbish()),
        "`attn_bias`",
        "materialize",
        "Rubbish",
        "xformers",
        kind=TypeError,
    )


def test_block_diagonal_biases_belong_to_one_packed_batch():
    q = torch.randn(2, 8, 2, 4)
    packed = type("BlockDiagonalMask", (), {})()
    said = ("`attn_bias`", "batch of 1", "BlockDiagonalMask with batch 2", "pack")
    refuse(lambda: aether_attention(q, q, q, attn_bias=packed), *said)


@pytest.mark.parametrize("wrong", [None, [[1.0]], np.ones((1, 8, 2, 4), np.float32)])
def test_the_published_functions_name_what_is_no_array(wrong):
    q = torch.randn(1, 8, 2, 4)
    refuse(lambda: aether_attention(q, wrong, q), "`key`", "tensor", type(wrong).__name__, kind=TypeError)
    if not isinstance(wrong, np.ndarray):
        refuse(lambda: aether.compute_block_geometry(wrong), "`k`", "array", type(wrong).__name__, kind=TypeError)
        refuse(lambda: aether.precompute_metadata(wrong), "`keys`", "array", type(wrong).__name__, kind=TypeError)


def test_bad_gates():
    query, keys = torch.randn(1, 2, 4), torch.randn(1, 2, 20, 4)
    means, radii, variances, concentrations = aether.precompute_metadata(keys, 8, True, True)
    run = aether.run_aether_sparse
    refuse(lambda: run(query, means, radii, use_variance=True), "`block_variances`", "use_variance=True", "compute_variance=True")
    refuse(
        lambda: run(query, means, radii, use_concentration=True),
        "`block_concentrations`",
        "use_concentration=True",
        "compute_concentration=True",
    )
    refuse(lambda: run(query[0], means, radii), "`query`", "[batch, heads, head_dim]", "(2, 4)")
    refuse(lambda: run(query, means[0], radii), "`means`", "[batch, heads, blocks, head_dim]")
    refuse(lambda: run(query, means, radii[:, :, :2]), "`means, radii`", "(1, 2, 2)", "precompute_metadata")
    refuse(lambda: run(query[..., :3], means, radii), "`means, radii`", "(1, 2, 3)")
    refuse(lambda: run(query, means, radii, threshold=math.nan), "`threshold`", "nan")
    refuse(lambda: run(query, means, radii, local_window=-1), "`local_window`", "-1")
    refuse(lambda: run(query, means, radii, target_sparsity=1.5), "`target_sparsity`", "[0, 1]", "1.5")
    refuse(lambda: run(query, means, radii, variances[..., :1], use_variance=True), "`block_variances`", "(1, 2, 3)", "(1, 2, 1)")
    refuse(
        lambda: run(query, means, radii, None, concentrations[:, :1], use_concentration=True),
        "`block_concentrations`",
        "(1, 2, 3)",
        "(1, 1, 3)",
    )
    for scale in (math.nan, 0.0, "auto"):
        refuse(lambda scale=scale: run(query, means, radii, scale=scale), "`scale`", "positive", repr(scale))
    refuse(lambda: run(query.long(), means, radii), "`query`", "floating", "int64")
    refuse(lambda: run(query, means, radii, recency="x"), "`recency`", "'x'")
    refuse(lambda: run(query, means, radii, recency_decay=2.0), "`recency_decay`", "2.0")
    assert variances.shape == concentrations.shape == (1, 2, 3)


BAD_GEOMETRY = {
    "rank": (lambda: geometry.build(K[0]), ("`key`", "[batch, kv_heads, kv_len, dim]", "(2, 10, 8)")),
    "empty": (lambda: geometry.build(K[:, :, :0]), ("`key`", "non-empty", "(2, 2, 0, 8)")),
    "block_size": (lambda: geometry.build(K, 0), ("`block_size`", "at least 1", "0")),
    "no values": (lambda: geometry.build(K, 4, geometry.Statistics(value=True)), ("`value`", "value statistics", "None")),
    "bits": (lambda: geometry.build(K, 4, geometry.Statistics(sketch_bits=9)), ("`sketch_bits`", "1..8", "9")),
    "sub-means": (lambda: geometry.build(K, 10, geometry.Statistics(sub_means=4)), ("`sub_means`", "divide", "10", "4")),
    "append shorter": (lambda: geometry.append(geometry.build(K, 4), K[:, :, :5]), ("`key`", "at least 10", "5 keys", "crop")),
    "crop to nothing": (lambda: geometry.crop(geometry.build(K, 4), 0, K), ("`length`", "1..10", "0")),
    "crop longer": (lambda: geometry.crop(geometry.build(K, 4), 11, K), ("`length`", "1..10", "11")),
}


@pytest.mark.parametrize("name", BAD_GEOMETRY)
def test_bad_geometry(name):
    run, words = BAD_GEOMETRY[name]
    refuse(run, *words)


def test_bad_meters():
    call = a_call(Shape(1, 2, 1, 4, 32, 8, 8))
    chosen = random_blocks(1, Shape(1, 2, 1, 4, 32, 8, 8))
    built = geometry.build(call.key, 4, geometry.Statistics(sketch_bits=4))
    lse = torch.zeros(1, 2, 4)
    refuse(lambda: certify.key_meter(call, chosen, built, lse, samples=0), "`samples`", "0")
    refuse(lambda: certify.key_meter(call, chosen, built, lse, alpha=1.0), "`alpha`", "[0, 1)", "1.0")
    refuse(lambda: certify.row_audit(call, chosen, rows=0), "`rows`", "0")
    refuse(lambda: certify.row_audit(call, chosen, alpha=-0.5), "`alpha`", "-0.5")
    refuse(lambda: certify.key_meter(call, chosen, built, lse, alpha=0.0), "`alpha`", "0.0")


@pytest.mark.parametrize("table", [scores.TABLE, selection.TABLE, patterns.TABLE])
def test_unknown_names_list_the_known_ones(table):
    refuse(lambda: table["nonsense"], "`name`", "'nonsense'", *table)


def test_numpy_arrays_are_checked_alike():
    q, k, v = (x.numpy() for x in (Q, K, V))
    refuse(lambda: attention(q[0], k, v), "`query`", "4 axes")
    refuse(lambda: attention(q, k.astype(np.float64), v), "one dtype", "float64")
    refuse(lambda: attention(q, k, v, mask=np.zeros((1, 1, 6, 10))), "`mask`", "boolean")
