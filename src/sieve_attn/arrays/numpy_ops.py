"""NumPy operations under the names that the reference stages use. Same names and meanings as ``torch_ops``."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import numpy as np

from sieve_attn.arrays import of_type

name = "numpy"
float16, float32, float64 = np.float16, np.float32, np.float64
int32, int64, uint8, boolean = np.int32, np.int64, np.uint8, np.bool_

isfinite, isnan, where, floor = np.isfinite, np.isnan, np.where, np.floor
expm1, sqrt, tanh = np.expm1, np.sqrt, np.tanh
maximum, minimum, broadcast_to, no_grad = np.maximum, np.minimum, np.broadcast_to, nullcontext


def exp(x):
    with np.errstate(over="ignore"):
        return np.exp(x)


def log(x):
    with np.errstate(divide="ignore"):
        return np.log(x)


def log1p(x):
    with np.errstate(divide="ignore"):
        return np.log1p(x)


def logaddexp(a, b):
    with np.errstate(invalid="ignore"):
        return np.logaddexp(a, b)


def einsum(equation, *operands):
    with np.errstate(invalid="ignore", over="ignore"):
        return np.einsum(equation, *operands, optimize=True)


def cast(x, dtype):
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x).astype(dtype)


def itemsize(dtype) -> int:
    return np.dtype(dtype).itemsize


def is_float(x) -> bool:
    return np.issubdtype(x.dtype, np.floating)


def compute_dtype(*arrays):
    return np.float64 if any(a is not None and a.dtype == np.float64 for a in arrays) else np.float32


def asarray(x, dtype, like):
    return np.asarray(x, dtype=dtype)


def zeros(shape, dtype, like):
    return np.zeros(shape, dtype)


def empty(shape, dtype, like):
    return np.empty(shape, dtype=dtype)


def contiguous(x):
    return np.ascontiguousarray(x)


def full(shape, value, dtype, like):
    return np.full(shape, value, dtype)


def arange(start, stop, like):
    return np.arange(start, stop)


def amax(x, axis):
    return x.max(axis)


def amin(x, axis):
    return x.min(axis)


def any_(x, axis):
    return x.any(axis)


def all_(x, axis):
    return x.all(axis)


def total(x, axis, dtype=None):
    return x.sum(axis, dtype=dtype)


def argmax(x, axis):
    return x.argmax(axis)


def cumsum(x, axis):
    return x.cumsum(axis)


def flip(x, axis):
    return np.flip(x, axis)


def norm(x):
    top = np.abs(x).max(-1, keepdims=True, initial=0)
    top = np.where(np.isfinite(top) & (top > 0), top, 1).astype(x.dtype)
    return (np.sqrt(((x / top) ** 2).sum(-1)) * top[..., 0]).astype(x.dtype)


def logsumexp(x, axis):
    if x.shape[axis] == 0:
        return x.sum(axis) - np.inf
    top = x.max(axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0).astype(x.dtype)
    return log(exp(x - top).sum(axis)) + top.squeeze(axis)


def sort_descending(x, axis):
    order = np.argsort(-x, axis=axis, kind="stable")
    return np.take_along_axis(x, order, axis), order


def kth_largest(x, k):
    place = x.shape[-1] - k
    return np.partition(x, place, axis=-1)[..., place : place + 1]


def inverse_permutation(order, axis):
    return np.argsort(order, axis=axis, kind="stable")


def take_along(x, index, axis):
    return np.take_along_axis(x, index, axis)


def concat(parts, axis):
    return np.concatenate(parts, axis)


def stack(parts, axis):
    return np.stack(parts, axis)


def repeat_each(x, n, axis):
    return x if n == 1 else np.repeat(x, n, axis)


def permute(x, axes):
    return np.transpose(x, axes)


def transpose_last(x):
    return np.swapaxes(x, -1, -2)


def pad_end(x, axis, n, value):
    if n == 0:
        return x
    shape = list(x.shape)
    shape[axis] = n
    return np.concatenate([x, np.full(shape, value, x.dtype)], axis)


def nonzero(x):
    return np.nonzero(x)


def searchsorted(edges, x):
    if edges.ndim == 1:
        return np.searchsorted(edges, x, side="right")
    flat = zip(edges.reshape(-1, edges.shape[-1]), x.reshape(-1, x.shape[-1]), strict=True)
    return np.stack([np.searchsorted(e, row, side="right") for e, row in flat]).reshape(x.shape)


def scatter_true(shape, index, like):
    out = np.zeros(shape, np.bool_)
    out[index] = True
    return out


def put_along(x, axis, index, part):
    x[(slice(None),) * axis + (index,)] = part
    return x


def waits(x) -> bool:
    return False


def true_columns(x):
    return np.nonzero(x)[-1].astype(np.int32)


def known_empty(x) -> bool:
    return not bool(x.any())


def tabulated(rule, counts, largest):
    return rule(counts)


def half_above(x):
    near = cast(x, np.float16)
    bumped = (near.view(np.int16) + np.int16(1)).view(np.float16)
    return np.where(near.astype(x.dtype) < x, bumped, near)


def detach(x):
    return x


def to_numpy(x):
    return np.asarray(x)


def allocate_like(x, axis, size):
    shape = list(x.shape)
    shape[axis] = size
    return np.empty(shape, x.dtype)


def autocast(*parts):
    return parts


def matmul_precision(x) -> str:
    return "highest"


of_type[np.ndarray] = sys.modules[__name__]
