"""The JAX front-end equals the PyTorch one on the same arrays: output, selection and gradients, eagerly, under jit and vmap."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_inputs import arrays, far_apart, torch_of

import sieve_attn
import sieve_attn.jax as sj
from sieve_attn import policies as P
from sieve_attn.patterns import OffsetPattern, Sinks, Window
from sieve_attn.scores import Mean
from sieve_attn.selection import TopK
from sieve_attn.types import Blocks, Selection

PRESETS = {
    "dense": P.Dense(),
    "aether": P.Aether(6.0, 16),
    "event_radar": P.EventRadar(target_sparsity=0.7, block_size=32, use_variance=True, local_window=1),
    "quest": P.Quest(2),
    "top_blocks": P.TopBlocks(2, sinks=1, window=16),
    "adaptive": P.Adaptive(0.2, sinks=1, window=0),
    "certified": P.Certified(0.3, sinks=1, window=16),
    "windowed": P.Windowed(16, 50),
}
KEPT = {"top_blocks": 0.8, "adaptive": 0.99, "quest": 0.7, "event_radar": 0.8, "aether": 0.99, "windowed": 0.7}


GATHERED = ("top_blocks", "certified", "windowed")  # the stages that choose are the same: the others are for the long tests


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "auto") for name in PRESETS]
    + [pytest.param(name, "gather", marks=() if name in GATHERED else pytest.mark.long) for name in PRESETS],
)
def test_every_preset_chooses_and_computes_what_pytorch_does(name, backend):
    query, key, value = arrays()
    causal = name not in ("quest", "adaptive")
    ours, lse, report = sj.attention(
        query, key, value, PRESETS[name], causal=causal, backend=backend, return_lse=True, return_report=True
    )
    theirs, other, told = sieve_attn.attention(
        *torch_of(query, key, value), PRESETS[name], causal=causal, return_lse=True, return_report=True
    )
    if told.selection.blocks is not None:
        assert (np.asarray(report.selection.to_tiles()) == told.selection.blocks.to_tiles().numpy()).all()
        assert (np.asarray(report.kept) == told.kept.numpy()).all()
        assert not np.asarray(report.overflow).any()
    assert float(report.density) == pytest.approx(told.density, abs=1e-6)
    assert told.density <= KEPT.get(name, 1.0), "a test of sparsity that keeps everything shows nothing"
    if backend == "auto":
        # the same kernels on the same arrays
        assert report.backend == "native"
        assert (np.asarray(ours) == theirs.numpy()).all()
    assert far_apart(ours, theirs) < 5e-6
    assert far_apart(lse, other) < 5e-6


def gradients_of(query, key, value, bias, sink, policy, **options):
    """d sum(output * w) + sum(lse * u) by PyTorch."""
    given = [x.requires_grad_() if x is not None else None for x in torch_of(query, key, value, bias, sink)]
    options["key_mask"] = torch.from_numpy(options["key_mask"])
    out, lse = sieve_attn.attention(*given[:3], policy, bias=given[3], sink=given[4], return_lse=True, **options)
    pull = torch.sin(torch.arange(out.numel(), dtype=torch.float32)).reshape(out.shape)
    ((out * pull).sum() + (lse * pull[..., 0]).sum()).backward()
    return [x.grad.numpy() for x in given]


@pytest.mark.parametrize("backend", ["native", "gather"])
def test_gradients_equal_those_of_pytorch(backend):
    query, key, value = arrays(60, 140)
    rng = np.random.default_rng(1)
    bias, sink = rng.standard_normal((1, 4, 60, 140)).astype(np.float32), rng.standard_normal(4).astype(np.float32)
    key_mask = rng.random((2, 140)) > 0.1
    policy = P.TopBlocks(2, sinks=1, window=8)
    options = {"causal": True, "softcap": 8.0, "window": 100, "key_mask": key_mask}

    @jax.jit
    def loss(query, key, value, bias, sink):
        out, lse, report = sj.attention(
            query, key, value, policy, bias=bias, sink=sink, max_blocks=8, backend=backend, return_lse=True,
            return_report=True, **options,
        )  # fmt: skip
        pull = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (out * pull).sum() + (lse * pull[..., 0]).sum(), report.overflow

    ours, overflow = jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True)(query, key, value, bias, sink)
    assert not bool(overflow.any()), "the gather must run, not the branch that reads everything"
    for mine, other in zip(ours, gradients_of(query, key, value, bias, sink, policy, **options), strict=True):
        assert np.abs(other).max() > 0.01
        assert far_apart(mine, other) < 2e-5


def test_a_dropped_block_gets_exactly_zero_gradient():
    query, key, value = arrays(16, 128, q_heads=1, kv_heads=1, batch=1)
    kept = np.zeros((1, 1, 1, 8), bool)
    kept[..., [1, 5]] = True
    chosen = sj.PaddedBlocks.from_tiles(jnp.asarray(kept), 2, q_len=16, kv_len=128, q_block=64, kv_block=16)
    for backend in ("native", "gather"):
        pull = jax.grad(lambda k, v, b=backend: sj.attend(query, k, v, chosen, backend=b)[0].sum(), (0, 1))(key, value)
        for grad in pull:
            blocks = np.abs(np.asarray(grad)).reshape(8, -1).max(-1)
            assert (blocks[[1, 5]] > 0).all()
            assert (np.delete(blocks, [1, 5]) == 0).all()


def test_masks_options_and_packing_equal_pytorch():
    query, key, value = arrays(160, 160, batch=1)
    mask = np.random.default_rng(2).random((1, 1, 160, 160)) > 0.2
    edges = np.array([0, 30, 70, 160], np.int32)
    for options in ({"mask": mask, "window": 40, "softcap": 5.0}, {"cu_seqlens": edges}):
        policy = P.TopBlocks(1, sinks=0, window=8)
        told = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
        theirs = sieve_attn.attention(*torch_of(query, key, value), policy, causal=True, **told)
        for backend in ("native", "gather"):
            # room for eight of ten blocks: the gather runs, and packed offsets stay tracers
            run = jax.jit(lambda q, k, v, o, b=backend, s=options, policy=policy: sj.attention(
                q, k, v, policy, causal=True, max_blocks=8, backend=b, return_report=True,
                **({n: x for n, x in s.items() if n not in o} | o)
            ))  # fmt: skip
            traced = {n: jnp.asarray(x) for n, x in options.items() if isinstance(x, np.ndarray)}
            ours, report = run(query, key, value, traced)
            assert not bool(report.overflow.any())
            assert far_apart(ours, theirs) < 5e-6, (backend, options.keys())


def test_packed_offsets_that_are_traced_are_checked_when_the_call_runs():
    query, key, value = arrays(32, 32, batch=1)
    run = jax.jit(lambda edges: sj.attention(query, key, value, causal=True, cu_seqlens=edges))
    with pytest.raises(Exception, match=r"`cu_seqlens` must rise from 0 to 32"):
        jax.block_until_ready(run(jnp.array([0, 20, 20, 32])))


@pytest.mark.parametrize("q_len", [1, 5, 16])
def test_decoding_scans_the_sketch_like_pytorch(q_len):
    query, key, value = arrays(q_len, 300)
    for policy in (P.TopBlocks(3, sinks=1, window=8), P.Certified(0.2, sinks=1, window=8)):
        ours, report = sj.attention(query, key, value, policy, causal=True, return_report=True)
        theirs, told = sieve_attn.attention(*torch_of(query, key, value), policy, causal=True, return_report=True)
        assert report.selected_by == told.selected_by == "native"
        assert (np.asarray(report.selection.to_tiles()) == told.selection.blocks.to_tiles().numpy()).all()
        assert told.density < 1 or policy.selector.needs_brackets
        assert (np.asarray(ours) == theirs.numpy()).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_in_its_dtype(dtype):
    query, key, value = (jnp.asarray(x, dtype) for x in arrays(48, 64))
    wide = [torch.from_numpy(np.array(x, np.float32)).to(torch.bfloat16 if dtype == jnp.bfloat16 else torch.float16)
            for x in (query, key, value)]  # fmt: skip
    policy = P.TopBlocks(1, sinks=1, window=8)
    theirs = sieve_attn.attention(*wide, policy, causal=True)
    ours = sj.attention(query, key, value, policy, causal=True)
    assert ours.dtype == dtype
    assert (np.asarray(ours, np.float32) == theirs.float().numpy()).all()
    pull = jax.grad(lambda v: sj.attention(query, key, v, policy, causal=True).astype(jnp.float32).sum())(value)
    assert pull.dtype == dtype
    assert bool(jnp.isfinite(pull).all())


@pytest.mark.parametrize(("dtype", "max_blocks"), [(jnp.bfloat16, 1), pytest.param(jnp.float16, 5, marks=pytest.mark.long)])
def test_half_precision_passes_both_branches_of_the_gather(dtype, max_blocks):
    query, key, value = (jnp.asarray(x, dtype) for x in arrays(40, 96, batch=1))
    policy = P.TopBlocks(2, sinks=0, window=0)
    chosen = sj.select(query, key, policy, causal=True, max_blocks=max_blocks)
    assert bool(chosen.overflow.any()) == (max_blocks == 1)
    last = query[:, :, -1:]

    def run(backend):
        def loss(query):
            given = sj.attend(query, key, value, chosen, causal=True, backend=backend)[0]
            cached = sj.attention(last, key, value, policy, kv_length=50, max_blocks=max_blocks, backend=backend)
            return (given.astype(jnp.float32) ** 2).sum(), (given, cached)

        return jax.grad(loss, has_aux=True)(query)

    (grad, outputs), (other, wanted) = run("gather"), run("native")
    assert all(x.dtype == dtype for x in (grad, *outputs))
    # 2^-8: rounding to the dtype
    for mine, theirs in zip((grad, *outputs), (other, *wanted), strict=True):
        assert far_apart(mine.astype(jnp.float32), theirs.astype(jnp.float32)) < 2**-7 * float(abs(theirs).max())


def test_vmap_equals_a_loop_wherever_it_maps():
    query, key, value = arrays(40, 64, batch=6)
    many = query.reshape(3, 2, 4, 40, 16)
    policy = P.TopBlocks(1, sinks=1, window=8)

    def one(query, key, value):
        return sj.attention(query, key, value, policy, causal=True)

    # queries mapped, keys shared; nothing is copied
    shared = jax.vmap(one, (0, None, None))(many, key[:2], value[:2])
    for mine, part in zip(shared, many, strict=True):
        assert (np.asarray(mine) == np.asarray(one(part, key[:2], value[:2]))).all()
    keys, values = key.reshape(3, 2, 2, 64, 16), value.reshape(3, 2, 2, 64, 24)
    mapped = jax.jit(jax.vmap(jax.grad(lambda q, k, v: one(q, k, v).sum(), (0, 1, 2))))(many, keys, values)
    for n in range(3):
        alone = jax.grad(lambda q, k, v: one(q, k, v).sum(), (0, 1, 2))(many[n], keys[n], values[n])
        for mine, other in zip(mapped, alone, strict=True):
            assert (np.asarray(mine[n]) == np.asarray(other)).all()
    twice = jax.vmap(jax.vmap(one, (0, None, None)), (None, 0, 0))(many, keys, values)
    assert twice.shape == (3, 3, 2, 4, 40, 24)
    assert (np.asarray(twice[1, 2]) == np.asarray(one(many[2], keys[1], values[1]))).all()


def test_checkpoint_and_scan_change_nothing():
    query, key, value = arrays(32, 64)
    policy = P.TopBlocks(1, sinks=1, window=8)

    def loss(query):
        return (sj.attention(query, key, value, policy, causal=True) ** 2).sum()

    plain = jax.grad(loss)(query)
    assert far_apart(jax.jit(jax.grad(jax.checkpoint(loss)))(query), plain) == 0
    total, _ = jax.lax.scan(lambda kept, scale: (kept + loss(query * scale), None), 0.0, jnp.ones(2))
    assert float(total) == pytest.approx(2 * float(loss(query)), rel=1e-6)


def test_overflow_attends_to_every_block_and_is_reported():
    query, key, value = arrays(128, 256, batch=1)
    policy = P.TopBlocks(8, sinks=0, window=0)
    out, report = sj.attention(query, key, value, policy, max_blocks=3, return_report=True)
    assert bool(report.overflow.all())
    assert float(report.density) == 1.0
    assert (np.asarray(report.selection.counts) == 8).all()
    assert bool(report.selection.to_tiles().all())
    dense = sj.attention(query, key, value)
    assert far_apart(out, dense) < 2e-6
    assert far_apart(sj.attend(query, key, value, report.selection, backend="gather")[0], dense) < 2e-6
    _, enough = sj.attention(query, key, value, policy, max_blocks=8, return_report=True)
    assert not bool(enough.overflow.any())
    assert float(enough.density) == 0.5


def test_one_tile_that_overflows_leaves_the_others_alone():
    query, key, value = arrays(128, 128, q_heads=1, kv_heads=1, batch=1)
    kept = np.zeros((1, 1, 2, 8), bool)
    kept[0, 0, 0, [0, 3]] = True
    kept[0, 0, 1, [1, 2, 4]] = True
    chosen = sj.PaddedBlocks.from_tiles(jnp.asarray(kept), 2, q_len=128, kv_len=128, q_block=64, kv_block=16)
    full = kept.copy()
    full[0, 0, 1] = True
    wanted = Selection((Blocks.from_tiles(torch.from_numpy(full), q_len=128, kv_len=128, q_block=64, kv_block=16),))
    theirs, _ = sieve_attn.attend(*torch_of(query, key, value), wanted)
    for backend in ("native", "gather"):
        assert far_apart(sj.attend(query, key, value, chosen, backend=backend)[0], theirs) < 2e-6


def test_select_then_attend_is_attention_and_manifold_shows_it():
    query, key, value = arrays()
    policy = PRESETS["top_blocks"]

    @jax.jit
    def apart(query, key, value):
        made = sj.geometry(key, policy)
        chosen = sj.select(query, key, policy, causal=True, geometry=made, max_blocks=12)
        return sj.attend(query, key, value, chosen, causal=True)[0], chosen, sj.attention(
            query, key, value, policy, causal=True, geometry=made, max_blocks=12
        )  # fmt: skip

    out, chosen, whole = apart(query, key, value)
    assert (np.asarray(out) == np.asarray(whole)).all()
    tiles = sj.manifold(query, key, policy, causal=True)
    assert tiles.dtype == bool
    assert tiles.shape == (2, 2, 3, 11)
    assert (np.asarray(tiles) == np.asarray(chosen.to_tiles())).all()
    dense = chosen.to_dense()
    assert dense.shape == (2, 2, 150, 170)
    # row 149 sits at the end of the last tile
    assert (np.asarray(dense[:, :, 149, ::16]) == np.asarray(tiles[:, :, 2])).all()


def test_selections_made_elsewhere_are_taken():
    query, key, value = arrays(64, 64, batch=1)
    told = sieve_attn.attention(*torch_of(query, key, value), PRESETS["top_blocks"], causal=True, return_report=True)[1]
    theirs, _ = sieve_attn.attend(*torch_of(query, key, value), told.selection, causal=True)
    assert far_apart(sj.attend(query, key, value, told.selection, causal=True)[0], theirs) == 0
    offsets = (Sinks(2) | OffsetPattern((1, 7, 30)) | Window(3)).selection(64, 64, causal=True)
    theirs, _ = sieve_attn.attend(*torch_of(query, key, value), offsets, causal=True)
    assert far_apart(sj.attend(query, key, value, offsets, causal=True)[0], theirs) == 0


def test_the_reference_is_the_oracle_here_too():
    query, key, value = arrays(32, 48, batch=1, q_heads=2, kv_heads=1)
    policy = P.Policy(Mean(), TopK(1))
    fast, one = sj.attention(query, key, value, policy, causal=True, return_report=True)
    slow, two = sj.attention(query, key, value, policy, causal=True, backend="reference", return_report=True)
    assert far_apart(fast, slow) < 5e-6
    assert (np.asarray(one.selection.to_tiles()) == np.asarray(two.selection.to_tiles())).all()
    with pytest.raises(ValueError, match="does not run under jit, grad or vmap"):
        jax.jit(lambda q: sj.attention(q, key, value, policy, backend="reference"))(query)


def test_short_sequences_turn_dense_where_the_policy_says_so():
    query, key, value = arrays(40, 64)
    policy = P.EventRadar(5.0, 16, min_seq_length=128)
    assert far_apart(sj.attention(query, key, value, policy), sj.attention(query, key, value)) == 0


@pytest.mark.parametrize("backend", ["native", "gather"])
def test_a_key_after_a_query_changes_nothing(backend):
    # the first tile holds positions 96 to 127, the keys of the others change
    query, key, value = arrays(96, 192)
    run = jax.jit(lambda k, v: sj.attention(
        query, k, v, P.TopBlocks(1, sinks=1, window=8), causal=True, max_blocks=8, backend=backend, return_report=True
    ))  # fmt: skip
    late_key, late_value = key.copy(), value.copy()
    late_key[:, :, 128:] += 100.0
    # choosing sees keys alone, so values tell of leaks inside of the tile
    late_value[:, :, 110:] = np.nan
    (before, report), (after, _) = run(key, value), run(late_key, late_value)
    assert not bool(report.overflow.any())
    assert far_apart(before[:, :, :14], after[:, :, :14]) == 0
    assert np.isfinite(np.asarray(after[:, :, :14])).all()
    assert not np.isfinite(np.asarray(after[:, :, 14])).any()


@pytest.mark.parametrize("softcap", [5.0, pytest.param(None, marks=pytest.mark.long)])
def test_what_is_no_number_has_no_part_in_gradients_of_those_who_do_not_see_it(softcap):
    query, key, value = arrays(20, 40)
    query[:, :, 3], key[:, :, 30], value[:, :, 30] = np.nan, np.nan, np.nan  # rows from 10 on see the key, the query 23 keys
    run = lambda *qkv: sj.attention(*qkv, P.TopBlocks(2), causal=True, max_blocks=2, backend="gather", softcap=softcap).sum()  # noqa: E731
    d_query = np.asarray(jax.grad(run)(query, key, value))
    assert np.isfinite(d_query[:, :, [0, 1, 2, *range(4, 10)]]).all()
    assert not np.isfinite(d_query[:, :, [3, *range(10, 20)]]).any()
    key[:, :, 30], value[:, :, 30] = 0.0, 0.0
    d_key = np.asarray(jax.grad(run, 1)(query, key, value))
    assert np.isfinite(d_key[:, :, 24:]).all()
    assert not np.isfinite(d_key[:, :, :24]).any()


def test_nothing_of_queries_by_keys_is_in_the_compiled_module():
    length = 4096
    shape = jax.ShapeDtypeStruct((1, 1, length, 16), jnp.float32)
    run = jax.jit(lambda q, k, v: sj.attention(q, k, v, P.TopBlocks(12), causal=True))
    compiled = run.lower(shape, shape, shape).compile()
    memory = compiled.memory_analysis()
    # booleans of that shape would already be too many
    assert memory.temp_size_in_bytes < length * length // 8
    pull = jax.jit(jax.grad(lambda q, k, v: run(q, k, v).sum(), (0, 1, 2))).lower(shape, shape, shape).compile()
    assert pull.memory_analysis().temp_size_in_bytes < length * length // 4
    text = compiled.as_text()
    assert f"{length},{length}" not in text
    assert 'custom_call_target="sieve_attn_attend"' in text


def test_the_gather_holds_nothing_of_queries_by_keys_either():
    length = 4096
    shape = jax.ShapeDtypeStruct((1, 1, length, 16), jnp.float32)
    blocks = sj.PaddedBlocks(
        jax.ShapeDtypeStruct((1, 1, 64), jnp.int32), jax.ShapeDtypeStruct((1, 1, 64, 8), jnp.int32), length, length, 64, 16
    )
    run = jax.jit(lambda q, k, v, chosen: sj.attend(q, k, v, chosen, causal=True, backend="gather"))
    compiled = run.lower(shape, shape, shape, blocks).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length * length
    assert f"{length},{length}" not in compiled.as_text()


def test_two_devices_run_side_by_side():
    """pmap needs its devices before JAX starts, hence a process of its own."""
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import jax, numpy as np; from jax_inputs import arrays; import sieve_attn.jax as sj\n"
        "from sieve_attn import policies as P\n"
        "given = arrays(32, 64, batch=4); many = [x.reshape(2, 2, *x.shape[1:]) for x in given]\n"
        "one = lambda q, k, v: sj.attention(q, k, v, P.TopBlocks(1, sinks=1, window=8), causal=True)\n"
        "apart = jax.pmap(jax.value_and_grad(lambda *x: one(*x).sum()))(*many)[1]\n"
        "whole = jax.grad(lambda *x: one(*x).sum())(*given)\n"
        "print(jax.device_count(), np.array_equal(np.asarray(apart).reshape(whole.shape), whole))"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "2 True\n", done.stderr


def test_calls_from_several_threads_do_not_meet():
    query, key, value = arrays(64, 128)
    run = jax.jit(lambda q: sj.attention(q, key, value, P.TopBlocks(1, sinks=1, window=8), causal=True))
    alone = [np.asarray(run(query * n)) for n in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda n: np.asarray(run(query * n)), range(1, 5)))
    for mine, other in zip(together, alone, strict=True):
        assert (mine == other).all()
