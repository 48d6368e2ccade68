"""JAX operations under the names that the reference stages use. Same names and meanings as ``torch_ops``.

They work on concrete arrays and, but for :func:`nonzero`, under ``jit``. Without ``jax_enable_x64`` 64-bit dtypes are their
32-bit neighbours, as everywhere in JAX; nothing here counts beyond 2^31.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sieve_attn.arrays import of_type

name = "jax"
float16, bfloat16, float32, float64 = (jnp.dtype(t) for t in ("float16", "bfloat16", "float32", "float64"))
int32, int64, uint8, boolean = (jnp.dtype(t) for t in ("int32", "int64", "uint8", "bool"))

exp, expm1, log, log1p, sqrt, tanh = jnp.exp, jnp.expm1, jnp.log, jnp.log1p, jnp.sqrt, jnp.tanh
isfinite, isnan, where, floor = jnp.isfinite, jnp.isnan, jnp.where, jnp.floor
maximum, minimum, broadcast_to, logaddexp = jnp.maximum, jnp.minimum, jnp.broadcast_to, jnp.logaddexp
einsum = jnp.einsum


@contextmanager
def no_grad():
    """What ranks or proves multiplies in full precision, whatever the platform's default; gradients are cut by the front-end."""
    with jax.default_matmul_precision("highest"):
        yield


def _known(dtype):
    return None if dtype is None else jax.dtypes.canonicalize_dtype(dtype)


def cast(x, dtype):
    return jnp.asarray(x).astype(_known(dtype))


def itemsize(dtype) -> int:
    return jnp.dtype(dtype).itemsize


def is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def compute_dtype(*arrays):
    """fp64 if any input is, otherwise fp32: statistics and scores never live in 16 bits."""
    return float64 if any(a is not None and a.dtype == float64 for a in arrays) else float32


def asarray(x, dtype, like):
    return jnp.asarray(x, _known(dtype))


def zeros(shape, dtype, like):
    return jnp.zeros(shape, _known(dtype))


def empty(shape, dtype, like):
    return jnp.zeros(shape, _known(dtype))


def contiguous(x):
    return x


def full(shape, value, dtype, like):
    return jnp.full(shape, value, _known(dtype))


def arange(start, stop, like):
    return jnp.arange(start, stop)


def amax(x, axis):
    return x.max(axis)


def amin(x, axis):
    return x.min(axis)


def any_(x, axis):
    return x.any(axis)


def all_(x, axis):
    return x.all(axis)


def total(x, axis, dtype=None):
    return x.sum(axis, dtype=_known(dtype))


def argmax(x, axis):
    return x.argmax(axis)


def cumsum(x, axis):
    return x.cumsum(axis)


def flip(x, axis):
    return jnp.flip(x, axis)


def norm(x):
    top = abs(x).max(-1, keepdims=True, initial=0)
    top = jnp.where(jnp.isfinite(top) & (top > 0), top, 1.0)
    return jnp.sqrt(((x / top) ** 2).sum(-1)) * top[..., 0]


def logsumexp(x, axis):
    """``log(sum(exp(x)))``, -inf for an empty or all ``-inf`` slice."""
    if x.shape[axis] == 0:
        return x.sum(axis) - jnp.inf
    top = x.max(axis, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.log(jnp.exp(x - top).sum(axis)) + top.squeeze(axis)


def sort_descending(x, axis):
    """(values, indices), equal values in order of index."""
    order = jnp.argsort(x, axis=axis, stable=True, descending=True)
    return jnp.take_along_axis(x, order, axis), order


def kth_largest(x, k):
    return jax.lax.top_k(x, k)[0][..., k - 1 :]


def inverse_permutation(order, axis):
    return jnp.argsort(order, axis=axis, stable=True)


def take_along(x, index, axis):
    return jnp.take_along_axis(x, index, axis)


def concat(parts, axis):
    return jnp.concatenate(parts, axis)


def stack(parts, axis):
    return jnp.stack(parts, axis)


def repeat_each(x, n, axis):
    return x if n == 1 else jnp.repeat(x, n, axis)


def permute(x, axes):
    return jnp.transpose(x, axes)


def transpose_last(x):
    return jnp.swapaxes(x, -1, -2)


def pad_end(x, axis, n, value):
    """``x`` with ``n`` entries of ``value`` appended along ``axis``."""
    if n == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, n)
    return jnp.pad(x, widths, constant_values=value)


def nonzero(x):
    """One index array per axis, in row-major order. Its length depends on the data: concrete arrays only."""
    return jnp.nonzero(x)


def searchsorted(edges, x):
    """For each ``x`` the number of ``edges`` that are at most ``x``."""
    if edges.ndim == 1:
        return jnp.searchsorted(edges, x, side="right")
    return (edges[..., None, :] <= x[..., None]).sum(-1)


def scatter_true(shape, index, like):
    """A boolean array of ``shape``, true at the ``index`` tuple."""
    return jnp.zeros(shape, bool).at[index].set(True)


def put_along(x, axis, index, part):
    """``x`` with ``part`` at the places ``index`` [n] of ``axis``."""
    return x.at[(slice(None),) * axis + (index,)].set(part)


def waits(x) -> bool:
    return False


def true_columns(x):
    return jnp.nonzero(x)[-1].astype(jnp.int32)


def known_empty(x) -> bool:
    """Whether no entry is true. What is being traced is not known."""
    return not isinstance(x, Tracer) and not bool(x.any())


def tabulated(rule, counts, largest):
    """``rule(counts)`` for integers 0..``largest``: looked up, since a rule may need the 64 bits that JAX leaves out."""
    return jnp.asarray(np.asarray(rule(np.arange(largest + 1))), _known(int64))[counts]


def half_above(x):
    """The smallest fp16 value that is at least ``x >= 0`` (infinity beyond its range)."""
    near = x.astype(float16)
    bumped = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(near, jnp.int16) + jnp.int16(1), float16)
    return jnp.where(near.astype(x.dtype) < x, bumped, near)


def detach(x):
    return jax.lax.stop_gradient(x)


def to_numpy(x):
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype == bfloat16 else x


def allocate_like(x, axis, size):
    shape = list(x.shape)
    shape[axis] = size
    return jnp.zeros(shape, x.dtype)


def matmul_precision(x) -> str:
    """How fp32 matrix products are computed: inside of :func:`no_grad`, and on the CPU always, fp32 throughout."""
    if jax.default_backend() == "cpu":
        return "highest"
    return jax.config.jax_default_matmul_precision or "default"


def autocast(*parts):
    """JAX casts nothing by itself. What comes through this door must be known: the stages behind it depend on data."""
    if any(isinstance(part, Tracer) for part in parts):
        raise TypeError("`query` must be a concrete array here; got a JAX tracer; use sieve_attn.jax.attention under jit")
    return parts


of_type[type(jnp.zeros(()))] = sys.modules[__name__]
