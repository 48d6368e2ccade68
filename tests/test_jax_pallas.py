"""The Pallas kernel: interpreted here and held against the kernels, lowered for the platforms that this machine does not have."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_inputs import arrays, far_apart

import sieve_attn.jax as sj
from sieve_attn import policies as P
from sieve_attn.jax import call as front
from sieve_attn.jax import pallas


def chosen(query, key, max_blocks, **options):
    return sj.select(query, key, P.TopBlocks(1, sinks=1, window=8), causal=True, max_blocks=max_blocks, **options)


@pytest.mark.parametrize(("max_blocks", "causal"), [(8, True), (2, True), (2, False)])
def test_interpreted_it_equals_the_native_kernels(max_blocks, causal):
    # head dims that are no power of two, a ragged tail, grouped heads, a lead, and with 2 places tiles that overflow
    query, key, value = arrays(70, 100, q_heads=4, kv_heads=2, dim=12, v_dim=20)
    blocks = sj.select(query, key, P.TopBlocks(1 if causal else 3, sinks=1, window=8), causal=causal, max_blocks=max_blocks)
    assert bool(blocks.overflow.any()) == (max_blocks == 2)
    options = {"causal": causal, "softcap": 9.0, "window": 90}
    for mine, other in zip(
        sj.attend(query, key, value, blocks, backend="pallas", **options),
        sj.attend(query, key, value, blocks, backend="native", **options), strict=True,
    ):  # fmt: skip
        assert far_apart(mine, other) < 3e-6


def test_its_gradients_are_the_gathers():
    query, key, value = arrays(32, 32, q_heads=2, kv_heads=1, batch=1)
    blocks = chosen(query, key, 1)

    def loss(backend):
        return lambda v: (sj.attend(query, key, v, blocks, causal=True, backend=backend)[0] ** 2).sum()

    assert far_apart(jax.grad(loss("pallas"))(value), jax.grad(loss("native"))(value)) < 1e-5


def test_it_runs_where_double_precision_is_enabled():
    program = (
        "import jax, numpy as np; jax.config.update('jax_enable_x64', True); import sieve_attn.jax as sj\n"
        "from sieve_attn import policies as P; x = np.random.default_rng(0).standard_normal((1, 2, 64, 16)).astype(np.float32)\n"
        "for room in (4, 1):\n"
        "    one, two = (sj.attention(x, x[:, :1], x[:, :1], P.TopBlocks(1), causal=True, max_blocks=room, backend=b)\n"
        "                for b in ('pallas', 'native'))\n"
        "    print(one.dtype, float(abs(one - two).max()) < 3e-6)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["float32", "True"] * 2


def test_a_query_without_keys_gives_zeros():
    query, key, value = arrays(32, 16, q_heads=1, kv_heads=1, batch=1)
    blocks = sj.PaddedBlocks.from_tiles(jnp.ones((1, 1, 3, 1), bool), 1, q_len=32, kv_len=16, q_block=16, kv_block=16, lead=0)
    blocks = sj.PaddedBlocks(blocks.counts[:, :, :2], blocks.indices[:, :, :2], 32, 16, 16, 16, 0)
    output, lse = sj.attend(query, key, value, blocks, causal=True, backend="pallas")
    assert (np.asarray(output[:, :, :16]) == 0).all()
    assert np.isneginf(np.asarray(lse[:, :, :16])).all()
    assert np.isfinite(np.asarray(lse[:, :, 16:])).all()


@pytest.mark.parametrize(("platform", "target"), [("cuda", "__gpu$xla.gpu.triton"), ("tpu", "tpu_custom_call")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_lowered_for(platform, target, dtype):
    query, key, value = (jnp.asarray(x, dtype) for x in arrays(128, 256, dim=64, v_dim=64))
    blocks = chosen(query, key, 8)

    def call(query, key, value, blocks):
        return pallas.attend_on(front.make(query, key, value, causal=True, scale=None), blocks, platform)

    lowered = jax.jit(call).trace(query, key, value, blocks).lower(lowering_platforms=(platform,))
    # lowering checks the kernel's operations and its memory; compiling it takes the device
    assert target in lowered.as_text()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_gather_and_the_stages_are_exported_for(platform, monkeypatch):
    monkeypatch.setattr(front, "platform", lambda x: platform)
    shape = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 2, 32, 16), (1, 1, 32, 16), (1, 1, 32, 16))]
    run = jax.jit(lambda q, k, v: sj.attention(q, k, v, P.TopBlocks(1, sinks=1, window=8), causal=True, max_blocks=1))
    exported = jax.export.export(run, platforms=[platform])(*shape)
    assert exported.platforms == (platform,)
    assert "sieve_attn_" not in exported.mlir_module()


def test_what_it_does_not_know_is_refused_by_name():
    query, key, value = arrays(16, 32)
    with pytest.raises(ValueError, match=r"the Pallas kernel has no key_mask; got 'pallas'"):
        sj.attention(query, key, value, P.TopBlocks(1), key_mask=np.ones((2, 32), bool), backend="pallas")
    with pytest.raises(ValueError, match=r"the Pallas kernel takes Blocks, not Ranges"):
        sj.attention(query, key, value, P.Windowed(1, 8), backend="pallas")
    with pytest.raises(
        ValueError, match=r"the Pallas kernel takes tiles and blocks of 16, 32, 64, ..., not q_block 48, kv_block 48"
    ):
        sj.attention(query, key, value, P.Aether(1.0, 48), backend="pallas")
