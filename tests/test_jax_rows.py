"""Top-k and offset attention on JAX arrays equal the PyTorch ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_inputs import arrays, far_apart, torch_of

import sieve_attn.jax as sj
from sieve_attn import functional, patterns


def pulled(output):
    """Weights that tell every entry of an output from every other."""
    return np.sin(np.arange(np.prod(output.shape), dtype=np.float32)).reshape(output.shape)


def compare(ours, theirs, given, tolerance):
    """``ours(q, k, v)`` and ``theirs(q, k, v)`` return (output, lse): both, and the gradients of both."""
    held = [x.requires_grad_() for x in torch_of(*given)]
    out, lse = theirs(*held)
    pull = torch.from_numpy(pulled(out))
    ((out * pull).sum() + (lse * pull[..., 0]).sum()).backward()
    weight = jnp.asarray(pull.numpy())

    def loss(*parts):
        mine, mine_lse = ours(*parts)
        return (mine * weight).sum() + (mine_lse * weight[..., 0]).sum(), (mine, mine_lse)

    grads, (mine, mine_lse) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*given)
    assert far_apart(mine, out) < tolerance
    assert far_apart(mine_lse, lse) < tolerance
    for grad, x in zip(grads, held, strict=True):
        assert float(x.grad.abs().max()) > 0.01
        assert far_apart(grad, x.grad) < 4 * tolerance


@pytest.mark.parametrize("backend", ["native", "gather"])
def test_top_k_equals_pytorch(backend):
    given = arrays(40, 60)
    compare(
        lambda q, k, v: sj.top_k_attention(q, k, v, 5, causal=True, softcap=6.0, backend=backend, return_lse=True),
        lambda q, k, v: functional.top_k_attention(q, k, v, 5, causal=True, softcap=6.0, return_lse=True),
        given, 5e-6,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["native", "gather"])
def test_top_k_breaks_ties_by_the_earlier_key_and_pads(backend):
    query, key, value = np.ones((1, 1, 3, 8), np.float32), np.ones((1, 1, 6, 8), np.float32), arrays(3, 6, 1, 1, batch=1)[2]
    _, index = sj.top_k_attention(query, key, value, 5, causal=True, backend=backend, return_index=True)
    assert np.asarray(index)[0, 0].tolist() == [[0, 1, 2, 3, -1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_top_k_maps_over_a_batch():
    query, key, value = arrays(8, 32, batch=4)
    whole = sj.top_k_attention(query, key, value, 3)
    mapped = jax.vmap(lambda q, k, v: sj.top_k_attention(q[None], k[None], v[None], 3)[0])(query, key, value)
    assert (np.asarray(whole) == np.asarray(mapped)).all()


PATTERN = patterns.Sinks(2) | patterns.Primes() | patterns.Window(4)


@pytest.mark.parametrize(
    "options", [{"plan": "diagonals"}, {"plan": "wheel"}, pytest.param({"backend": "gather"}, marks=pytest.mark.long)], ids=str
)
def test_offsets_equal_pytorch(options):
    given = arrays(100, 120)
    compare(
        lambda q, k, v: sj.offset_attention(q, k, v, PATTERN, return_lse=True, **options),
        lambda q, k, v: functional.offset_attention(q, k, v, PATTERN, return_lse=True),
        given, 5e-6,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["native", "gather"])
def test_offsets_beyond_the_sequence_leave_zeros(backend):
    query, key, value = arrays(2, 2)

    def loss(query, key, value):
        out, lse = sj.offset_attention(query, key, value, patterns.OffsetPattern((2, 7)), backend=backend, return_lse=True)
        return out.sum(), (out, lse)

    grads, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
    assert out.shape == (2, 4, 2, 24)
    assert all((np.asarray(x) == 0).all() for x in (out, *grads))
    assert np.isneginf(np.asarray(lse)).all()


def test_offset_attention_maps_with_shared_keys():
    query, key, value = arrays(20, 40)
    many = jnp.stack([query, query * 0.5])
    mapped = jax.vmap(lambda q: sj.offset_attention(q, key, value, PATTERN))(many)
    for mine, part in zip(mapped, many, strict=True):
        assert (np.asarray(mine) == np.asarray(sj.offset_attention(part, key, value, PATTERN))).all()


def test_wrong_arguments_are_named():
    query, key, value = arrays(8, 16)
    with pytest.raises(ValueError, match=r"`top_k` must be an integer of at least 1; got 0"):
        sj.top_k_attention(query, key, value, 0)
    with pytest.raises(ValueError, match=r"`backend` must be 'auto' or one of native, gather; got 'triton'"):
        sj.top_k_attention(query, key, value, 2, backend="triton")
    with pytest.raises(TypeError, match=r"`pattern` must be a Pattern; got 'primes'"):
        sj.offset_attention(query, key, value, "primes")
    with pytest.raises(ValueError, match=r"`plan` must be one of auto, diagonals, wheel"):
        sj.offset_attention(query, key, value, PATTERN, plan="fast")
    with pytest.raises(ValueError, match=r"`pattern` must be made of first tokens, windows and offsets"):
        sj.offset_attention(query, key, value, patterns.RandomBlocks(1))
