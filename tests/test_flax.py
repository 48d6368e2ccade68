"""The Flax NNX modules: equal to the PyTorch ones on copied weights, in output, gradients and step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from penzai_models import quick_compilation  # noqa: F401

from sieve_attn import flax, layers, patterns

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
X = np.random.default_rng(0).normal(size=(2, 40, 24)).astype(np.float32)
MODULES = {
    "prime": lambda: layers.PrimeSelfAttention(24, heads=2),
    "square": lambda: layers.SquareSelfAttention(24, window=0, global_tokens=0),
    "mian_chowla": lambda: layers.MianChowlaSelfAttention(24, heads=3, global_tokens=5, upstream_compat=True),
    "index": lambda: layers.SparseIndexAttention(24, [2, 7, 30], heads=2, seq_len_max=None),
    "top_k": lambda: layers.SparseCausalAttention(24, 8, 4, heads=2),
    "top_k_plain": lambda: layers.SparseCausalAttention(24, 8, 4, quantize=False),
    "ternary": lambda: layers.TernaryLinear(24, 16),
    "ternary_plain": lambda: layers.TernaryLinear(24, 16, quantize=False),
    "ternary_per_row": lambda: layers.TernaryLinear(24, 16, per_row=True),
    "ternary_lsq": lambda: layers.TernaryLinear(24, 16, lsq=True),
    "ternary_rotated": lambda: layers.TernaryLinear(24, 16, hadamard=True),
}
STEPPING = ["prime", "mian_chowla", "index", "top_k"]


def torch_module(name):
    torch.manual_seed(1)
    return MODULES[name]()


@pytest.mark.parametrize("name", MODULES)
def test_output_and_gradients_are_those_of_pytorch(name):
    theirs = torch_module(name)
    ours = flax.from_torch(theirs)
    x = torch.from_numpy(X).requires_grad_()
    wanted = theirs(x)
    (wanted**2).sum().backward()

    @jax.jit
    def run(parameters, x):
        y = nnx.merge(graph, parameters, rest)(x)
        return (y**2).sum(), y

    graph, parameters, rest = nnx.split(ours, nnx.Param, ...)
    (d_parameters, d_x), y = jax.grad(run, argnums=(0, 1), has_aux=True)(parameters, jnp.asarray(X))
    np.testing.assert_allclose(y, wanted.detach(), **CLOSE)
    loose = {"atol": 2e-3, "rtol": 1e-3}
    np.testing.assert_allclose(d_x, x.grad, **loose)
    given = dict(theirs.named_parameters())
    for path, value in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(d_parameters)):
        keys = [str(k.key) for k in path]
        other = given[".".join(keys).replace("kernel", "weight")].grad
        np.testing.assert_allclose(value, other.T if keys[-1] == "kernel" else other, **loose)


@pytest.mark.parametrize("name", MODULES)
def test_there_and_back(name):
    theirs = torch_module(name)
    back = flax.to_torch(flax.from_torch(theirs))
    assert repr(back) == repr(theirs)
    assert torch.equal(back(torch.from_numpy(X)), theirs(torch.from_numpy(X)))


def test_weights_keep_their_dtype():
    for made in (layers.PrimeSelfAttention(24), layers.SparseCausalAttention(24)):
        theirs = made.bfloat16()
        ours = flax.from_torch(theirs)
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(ours, nnx.Param))} == {jnp.dtype("bfloat16")}
        for name, value in flax.to_torch(ours).state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name])
    with pytest.raises(ValueError, match=r"`module` must not hold float64 weights while jax_enable_x64 is off"):
        flax.from_torch(layers.PrimeSelfAttention(24).double())


@pytest.mark.parametrize("name", STEPPING)
def test_steps_equal_the_whole(name):
    ours = flax.from_torch(torch_module(name))
    x = jnp.asarray(X)
    whole = nnx.jit(lambda m, x: m(x))(ours, x)
    ours.init_cache(2, 40)
    step = nnx.jit(lambda m, x: m.step(x))
    parts = [ours.step(x[:, :30]), *(step(ours, x[:, n : n + 1]) for n in range(30, 40))]
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, **CLOSE)
    assert int(ours.cache_index[...]) == 40
    assert jnp.isnan(step(ours, x[:, :1])).all()
    with pytest.raises(ValueError, match="`x` must fit the cache of max_length 40; got 42 tokens; make a longer one"):
        ours.step(x[:, :1])


def test_state_is_explicit():
    ours = flax.from_torch(torch_module("top_k"))
    ours.init_cache(2, 8)
    graph, parameters, cache = nnx.split(ours, nnx.Param, nnx.Cache)
    assert set(nnx.to_pure_dict(cache)) == {"cached_key", "cached_value", "cache_index"}
    assert set(nnx.to_pure_dict(parameters)) == {"query", "key", "value"}
    first = nnx.merge(graph, parameters, cache)
    first.step(jnp.asarray(X[:, :3]))
    assert int(first.cache_index[...]) == 3


@pytest.mark.parametrize("axes", [3, 4, 5])
def test_the_gate_is_that_of_pytorch(axes):
    shape = {3: (2, 50, 8), 4: (2, 50, 3, 8), 5: (2, 50, 2, 3, 8)}[axes]
    q, k, v = (3 * np.random.default_rng(n).normal(size=shape).astype(np.float32) for n in range(3))
    theirs = layers.AetherAttention(40.0, 8, causal=True)
    ours = flax.from_torch(theirs)
    tensors, arrays = [torch.from_numpy(x) for x in (q, k, v)], [jnp.asarray(x) for x in (q, k, v)]
    wanted = theirs(*tensors)
    assert (wanted - layers.AetherAttention(-float("inf"), 8, causal=True)(*tensors)).abs().max() > 0.1
    np.testing.assert_allclose(ours(*arrays), wanted, **CLOSE)
    np.testing.assert_allclose(nnx.jit(lambda m, *x: m(*x))(ours, *arrays), wanted, **CLOSE)
    bias = np.random.default_rng(4).normal(size=(50, 50)).astype(np.float32)
    np.testing.assert_allclose(ours(*arrays, jnp.asarray(bias)), theirs(*tensors, torch.from_numpy(bias)), **CLOSE)
    assert repr(flax.to_torch(ours)) == repr(theirs)


def test_fresh_modules():
    rngs = nnx.Rngs(0)
    made = flax.TernaryLinear(30, 20, hadamard=True, lsq=False, rngs=rngs)
    turn = made.rotation[...]
    np.testing.assert_allclose(turn @ turn.T, np.eye(30), atol=1e-5)
    assert set(np.unique(made.trits())) <= {-1, 0, 1}
    assert float(jnp.std(made.weight[...])) == pytest.approx(30**-0.5, rel=0.1)
    for factory, kind in [
        (flax.PrimeSelfAttention, patterns.Primes), (flax.SquareSelfAttention, patterns.Squares),
        (flax.MianChowlaSelfAttention, patterns.MianChowla),
    ]:  # fmt: skip
        assert isinstance(factory(8, rngs=rngs).offsets, kind)
    assert flax.SparseCausalAttention(8, rngs=rngs)(jnp.ones((1, 3, 8))).shape == (1, 3, 8)


def test_bad_input():
    rngs = nnx.Rngs(0)
    prime, top_k = flax.PrimeSelfAttention(24, seq_len_max=20, rngs=rngs), flax.SparseCausalAttention(24, rngs=rngs)
    x = jnp.asarray(X)
    for call, text in [
        (lambda: prime(x), "`x` must not go beyond seq_len_max 20; got 40 tokens; pass seq_len_max=None"),
        (lambda: prime(x[0]), r"`x` must have shape \[batch, len, 24\] with at least one token; got shape \(40, 24\)"),
        (lambda: prime.init_cache(2, 21), "`x` must not go beyond seq_len_max 20; got 21 tokens"),
        (lambda: top_k.step(x), r"`cache` must be made before the first step; got no cache; call init_cache\(batch_size"),
        (lambda: top_k.init_cache(2, 0), "`max_length` must be an integer of at least 1; got 0"),
        (lambda: flax.PrimeSelfAttention(24, heads=5, rngs=rngs), "`heads` must divide embed_dim 24; got 5"),
        (lambda: flax.SparseCausalAttention(24, heads=5, rngs=rngs), "`heads` must divide `d_model`; got 5 heads on a width"),
        (lambda: flax.TernaryLinear(4, 4, per_row=True, lsq=True, rngs=rngs), "`lsq` learns one scale for the tensor"),
        (lambda: flax.TernaryLinear(4, 4, rngs=rngs)(x), r"`x` must have shape \[..., 4\] for weights of shape \[4, 4\]"),
        (lambda: flax.AetherAttention(float("nan")), "`sparsity_threshold` must be a number and not NaN"),
        (lambda: jax.jit(lambda n: flax.AetherAttention(0.1, n).block_size)(8), "`block_size` must be static: it fixes"),
        (lambda: flax.AetherAttention()(x[0], x, x), "must all have 3, 4 or 5 axes: .*; got 2, 3 and 3"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=text):
            call()
    top_k.init_cache(2, 8)
    with pytest.raises(ValueError, match=r"`x` must have shape \[2, new, 24\], the batch of the cache; got shape \(1, 40, 24\)"):
        top_k.step(x[:1])
    for convert, given in ((flax.from_torch, torch.nn.Linear(2, 2)), (flax.to_torch, nnx.Linear(2, 2, rngs=rngs))):
        with pytest.raises(
            TypeError, match=r"`module` must be one of sieve_attn.*SparseIndexAttention.*; got Linear; convert its parts"
        ):
            convert(given)
