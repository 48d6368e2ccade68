"""Reports of the JAX front-end: the certificate is PyTorch's on the same arrays, covers the fp64 truth, is free until read."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_inputs import arrays, far_apart, torch_of

import sieve_attn
import sieve_attn.jax as sj
from sieve_attn import policies as P
from sieve_attn import scores, selection
from sieve_attn.testing import GENERATORS, Shape, oracle
from sieve_attn.testing.contracts import spread_heads
from sieve_attn.testing.strategies import random_blocks

CERTIFIED = {
    "top_blocks": P.TopBlocks(2, sinks=1, window=16),
    "aether": P.Aether(6.0, 16),
    "event_radar": P.EventRadar(target_sparsity=0.7, block_size=32, use_variance=True, local_window=1),
    "windowed": P.Windowed(16, 50),
}
FAR = P.Policy(scores.Mean(), selection.TopK(2), far_field=True, bound=scores.Euclidean())


def relative(ours, theirs):
    ours, theirs = np.asarray(ours), theirs.numpy()
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs) / np.maximum(theirs, 1e-9)))


@pytest.mark.parametrize(
    ("name", "per_query"),
    [("top_blocks", False), ("aether", True), ("windowed", False), pytest.param("event_radar", False, marks=pytest.mark.long)],
)
def test_a_certificate_is_that_of_pytorch(name, per_query):
    query, key, value = arrays(batch=1)
    options = {"causal": True, "per_query": per_query, "return_report": True}
    _, report = sj.attention(query, key, value, CERTIFIED[name], **options)
    _, told = sieve_attn.attention(*torch_of(query, key, value), CERTIFIED[name], **options)
    ours, theirs = report.certificate, told.certificate
    # sums in another order may round the sketch another way, and every bracket allows for that
    assert relative(ours.dropped_mass, theirs.dropped_mass) < 1e-3
    assert relative(ours.output_error, theirs.output_error) < 1e-3
    assert (ours.bound, ours.kind, report.bound, report.policy) == (theirs.bound, theirs.kind, told.bound, told.policy)
    assert report.requested_sparsity == told.requested_sparsity
    assert [(f.reason, f.count) for f in report.fallbacks] == [(f.reason, f.count) for f in told.fallbacks]
    assert float(report.achieved_sparsity) == pytest.approx(told.achieved_sparsity, abs=1e-6)


def with_room(chosen, room):
    """One shape for all selections, so that one program does."""
    found = sj.PaddedBlocks.from_selection(chosen)
    more = room - found.max_blocks
    rows = None if found.rows is None else jnp.pad(found.rows, ((0, 0),) * 3 + ((0, more), (0, 0)))
    return replace(found, indices=jnp.pad(found.indices, ((0, 0),) * 3 + ((0, more),), constant_values=-1), rows=rows)


@pytest.mark.parametrize("backend", ["native", pytest.param("gather", marks=pytest.mark.long)])
def test_a_certificate_is_at_least_the_truth(backend):
    shape = Shape(q_len=40, kv_len=96, dim=16, v_dim=8)
    bound = {"native": scores.KeySketch(2), "gather": scores.Box()}[backend]
    pairs = 0
    for seed, name in enumerate(sorted(GENERATORS)):
        dtype = torch.bfloat16 if seed % 3 == 0 else torch.float32
        given = GENERATORS[name](seed, shape, dtype)
        chosen = random_blocks(seed, shape, q_block=32, kv_block=8, density=0.4, causal=True, heads=4, per_query=seed % 3 == 0)
        mine = tuple(jnp.asarray(x.float().numpy(), jnp.bfloat16 if dtype == torch.bfloat16 else jnp.float32) for x in given)
        out, report = sj.attention(
            *mine, P.Policy(bound=bound, block_size=8), selection=with_room(chosen, 12), causal=True, backend=backend,
            return_report=True,
        )  # fmt: skip
        q, k, v = (x.double() for x in given)
        seen = oracle.visible_keys(40, 96, causal=True)
        kept = spread_heads(chosen.to_dense(given[0]), 4)
        delta = oracle.dropped_mass(oracle.plain_logits(q, k, seen), kept)
        dense, sparse = (oracle.plain_attention(q, k, v, allowed)[0] for allowed in (seen, seen & kept))
        found = report.certificate
        assert (torch.from_numpy(np.array(found.dropped_mass)).double() >= delta).all(), (name, seed)
        made = torch.from_numpy(np.array(out, np.float32)).double()
        # the kernel's own rounding of the output is no part of the certificate
        rounding = (sparse - made).norm(dim=-1) * (1 + 1e-6) + 1e-12
        error = torch.from_numpy(np.array(found.output_error)).double()
        assert (error + rounding >= (dense - made).norm(dim=-1)).all(), (name, seed)
        pairs += delta.numel()
        assert float(delta.max()) > 0.01, "a test that drops nothing shows nothing"
    assert pairs > 1000


def test_a_report_carries_its_certificate_through_jit_vmap_and_scan():
    query, key, value = arrays(48, 96, batch=4)
    policy = P.Aether(6.0, 16)

    def told(query, key, value):
        return sj.attention(query, key, value, policy, causal=True, return_report=True)[1]

    whole = told(query, key, value).certificate
    # read inside of the program, after it, and after it let go of its arrays there

    @jax.jit
    def program(*given):
        report = told(*given)
        return report.certificate, report, report.without_arrays()

    inside, after, alone = program(query, key, value)
    assert alone.evidence is None
    for found in (inside, after.certificate, alone.certificate):
        assert far_apart(found.dropped_mass, whole.dropped_mass) < 1e-6
        assert found.bound == "Euclidean()"
    many = [x.reshape(2, 2, *x.shape[1:]) for x in (query, key, value)]
    mapped = jax.vmap(told)(*many).certificate
    _, scanned = jax.lax.scan(lambda kept, x: (kept, told(*x)), 0, tuple(many))
    for found in (mapped, scanned.certificate):
        assert found.dropped_mass.shape == (2, 2, 4, 48)
        assert far_apart(found.dropped_mass.reshape(4, 4, 48), whole.dropped_mass) < 1e-6
    with pytest.raises(ValueError, match=r"`report.certificate` needs the call's arrays; this report let go of them"):
        _ = told(query, key, value).without_arrays(certify=False).certificate


def test_a_certificate_that_nobody_reads_is_not_computed():
    query, key, value = arrays(64, 128, batch=1)

    def run(read):
        def call(query, key, value):
            out, report = sj.attention(query, key, value, P.Aether(6.0), causal=True, return_report=True)
            return (out, report.density, report.certificate.dropped_mass) if read else (out, report.density)

        compiled = jax.jit(call).lower(query, key, value).compile()
        return compiled.as_text().count("dot("), compiled.memory_analysis().temp_size_in_bytes

    (products, held), (more, larger) = run(False), run(True)
    assert products == 0
    assert more > 0
    assert larger > held


def test_a_certificate_holds_nothing_of_queries_by_keys():
    length = 4096
    shape = jax.ShapeDtypeStruct((1, 1, length, 16), jnp.float32)
    run = jax.jit(lambda q, k, v: sj.attention(q, k, v, P.Aether(2.0, 16), causal=True, return_report=True)[1].certificate)
    text = run.lower(shape, shape, shape).compile().as_text()
    assert f"{length},{length}" not in text


def test_a_far_field_is_that_of_pytorch():
    query, key, value = arrays(70, 128, batch=1)
    pull = np.sin(np.arange(4 * 70 * 24, dtype=np.float32)).reshape(1, 4, 70, 24)

    @jax.jit
    def ours(query, key, value):
        out, lse, report = sj.attention(query, key, value, FAR, causal=True, return_lse=True, return_report=True)
        return (out * pull).sum() + (lse * pull[..., 0]).sum(), (out, lse, report)

    grads, (out, lse, report) = jax.grad(ours, (0, 1, 2), has_aux=True)(query, key, value)
    held = [x.requires_grad_() for x in torch_of(query, key, value)]
    other, other_lse, told = sieve_attn.attention(*held, FAR, causal=True, return_lse=True, return_report=True)
    weight = torch.from_numpy(pull)
    ((other * weight).sum() + (other_lse * weight[..., 0]).sum()).backward()
    assert report.backend == "gather"
    assert "kernels have no far field" in report.why_backend
    assert far_apart(out, other) < 5e-6
    assert far_apart(lse, other_lse) < 5e-6
    for mine, x in zip(grads, held, strict=True):
        assert float(x.grad.abs().max()) > 0.01
        assert far_apart(mine, x.grad) < 5e-5
    assert relative(report.certificate.dropped_mass, told.certificate.dropped_mass) < 1e-3
    assert relative(report.certificate.output_error, told.certificate.output_error) < 1e-3
    with pytest.raises(ValueError, match=r"`backend` cannot run this call: kernels have no far field; got 'native'"):
        sj.attention(query, key, value, FAR, backend="native")


@pytest.mark.parametrize("poison", [np.nan, *(pytest.param(x, marks=pytest.mark.long) for x in (np.inf, -np.inf))])
def test_a_far_field_reads_nothing_that_is_hidden(poison):
    query, key, value = arrays(40, 64, batch=1, q_heads=2, kv_heads=1)
    there = np.arange(64) % 5 != 0

    @jax.jit
    def run(query, key, value):
        def loss(query, key, value):
            out, lse = sj.attention(query, key, value, FAR, key_mask=there[None], return_lse=True)
            return (out**2).sum() + lse.sum(), (out, lse)

        grads, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
        return [out, lse, grads[0], grads[1][:, :, there], grads[2][:, :, there]]

    plain = run(query, key, value)
    bad = [np.where(there[:, None], x, poison).astype(np.float32) for x in (key, value)]
    for mine, other in zip(run(query, *bad), plain, strict=True):
        assert (np.asarray(mine) == np.asarray(other)).all()
    # of a future value that is no number its own query knows, and no other
    late = value.copy()
    late[:, :, -1] = poison
    out, far = (np.asarray(sj.attention(query, key, x, FAR, causal=True)) for x in (value, late))
    assert (out[:, :, :-1] == far[:, :, :-1]).all()
    assert not np.isfinite(far[:, :, -1]).all()


@pytest.mark.parametrize("given", [False, True])
def test_a_far_field_reads_no_place_of_a_cache_that_is_not_filled(given):
    query, key, value = arrays(1, 32, batch=1)
    policy = replace(FAR, selector=selection.TopK(1), block_size=8)
    there = np.arange(32) < 18
    out, lse, report = sj.attention(query, key[:, :, :18], value[:, :, :18], policy, causal=True, return_lse=True,
                                    return_report=True)  # fmt: skip
    assert float(report.density) < 1

    @jax.jit
    def run(key, value, length):
        options = {"geometry": sj.geometry(key, policy, value=value, key_mask=there[None])} if given else {}
        options |= {"kv_length": length, "return_lse": True, "return_report": True}
        mine = sj.attention(query, key, value, policy, **options)
        grads = jax.grad(lambda k, v: sj.attention(query, k, v, policy, **options)[0].sum(), (0, 1))(key, value)
        return *mine[:2], mine[2].certificate, grads

    for poison in (0.0, 100.0, np.nan):
        bad = [np.where(there[:, None], x, poison).astype(np.float32) for x in (key, value)]
        mine, other, told, grads = run(*bad, 18)
        assert far_apart(mine, out) < 1e-6
        assert far_apart(other, lse) < 1e-6
        for name in ("dropped_mass", "output_error"):
            assert far_apart(getattr(told, name), getattr(report.certificate, name)) < 1e-4, name
        for grad in grads:
            assert (np.asarray(grad)[:, :, 18:] == 0).all()
            assert np.isfinite(np.asarray(grad)).all()


def test_short_sequences_say_why_they_are_dense():
    query, key, value = arrays(40, 64)
    _, report = sj.attention(query, key, value, P.EventRadar(5.0, 16, min_seq_length=128), return_report=True)
    assert [(f.reason, f.count) for f in report.fallbacks] == [("kv_len 64 is below min_seq_length 128", 8)]
    assert float(np.asarray(report.certificate.dropped_mass).max()) == 0
