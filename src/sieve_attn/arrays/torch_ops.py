"""PyTorch operations under the names that the reference stages use. Same names and meanings as ``numpy_ops``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# compiled code holds as long as no framework is added to those known: any call may meet NumPy's, which counts positions
from sieve_attn.arrays import numpy_ops, of_type  # noqa: F401

name = "torch"
float16, bfloat16, float32, float64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
int32, int64, uint8, boolean = torch.int32, torch.int64, torch.uint8, torch.bool

exp, expm1, log, log1p, sqrt, tanh = torch.exp, torch.expm1, torch.log, torch.log1p, torch.sqrt, torch.tanh
isfinite, isnan, where, floor = torch.isfinite, torch.isnan, torch.where, torch.floor
einsum, broadcast_to, logaddexp = torch.einsum, torch.broadcast_to, torch.logaddexp


@contextmanager
def no_grad() -> Iterator[None]:
    """Neither gradients nor autocast: what ranks, attends or proves is computed in the precision that it was written for."""
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        with torch.no_grad():
            yield
        return
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def maximum(a, b):
    """Elementwise maximum; either side may be a Python number."""
    return torch.clamp(a, min=b) if not isinstance(b, torch.Tensor) else torch.maximum(a, b)


def minimum(a, b):
    """Elementwise minimum; either side may be a Python number."""
    return torch.clamp(a, max=b) if not isinstance(b, torch.Tensor) else torch.minimum(a, b)


def cast(x, dtype):
    return x.to(dtype)


def itemsize(dtype) -> int:
    return dtype.itemsize


def is_float(x) -> bool:
    return x.dtype.is_floating_point


def compute_dtype(*arrays):
    """fp64 if any input is, otherwise fp32: statistics and scores never live in 16 bits."""
    return torch.float64 if any(a is not None and a.dtype == torch.float64 for a in arrays) else torch.float32


def asarray(x, dtype, like):
    return torch.as_tensor(x, dtype=dtype, device=like.device)


def zeros(shape, dtype, like):
    return torch.zeros(shape, dtype=dtype, device=like.device)


def empty(shape, dtype, like):
    return torch.empty(shape, dtype=dtype, device=like.device)


def contiguous(x):
    return x.contiguous()


def full(shape, value, dtype, like):
    return torch.full(shape, value, dtype=dtype, device=like.device)


def arange(start, stop, like):
    return torch.arange(start, stop, device=like.device)


def amax(x, axis):
    return x.amax(axis)


def amin(x, axis):
    return x.amin(axis)


def any_(x, axis):
    return x.any(axis)


def all_(x, axis):
    return x.all(axis)


def total(x, axis, dtype=None):
    return x.sum(axis, dtype=dtype)


def argmax(x, axis):
    """Index of the largest entry; the smaller index wins a tie."""
    return torch.sort(x, dim=axis, descending=True, stable=True).indices.select(axis, 0)


def cumsum(x, axis):
    return x.cumsum(axis)


def flip(x, axis):
    return x.flip(axis)


def norm(x):
    """Euclidean norm over the last axis that neither overflows nor loses small vectors."""
    top = x.abs().amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top) & (top > 0), top, 1.0)
    return torch.linalg.vector_norm(x / top, dim=-1) * top[..., 0]


def logsumexp(x, axis):
    """``log(sum(exp(x)))``, -inf for an empty or all ``-inf`` slice."""
    if x.shape[axis] == 0:
        return x.sum(axis) - torch.inf
    top = x.amax(axis, keepdim=True)
    empty = top == -torch.inf
    top = torch.where(torch.isfinite(top), top, 0.0)
    # results that underflow cost ten times as much as others, and beside e^0 they count for nothing
    summed = torch.exp((x - top).clamp_(min=-80.0)).sum(axis)
    return torch.where(empty.squeeze(axis), -torch.inf, torch.log(summed) + top.squeeze(axis))


def sort_descending(x, axis):
    """(values, indices), equal values in order of index."""
    out = torch.sort(x, dim=axis, descending=True, stable=True)
    return out.values, out.indices


def kth_largest(x, k):
    """[..., 1] the ``k``-th largest entry of the last axis; NaN is above everything."""
    return torch.topk(x, k, dim=-1).values[..., k - 1 :]


def inverse_permutation(order, axis):
    ranks = torch.arange(order.shape[axis], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(axis, order, ranks)


def take_along(x, index, axis):
    return torch.take_along_dim(x, index, axis)


def concat(parts, axis):
    return torch.cat(parts, axis)


def stack(parts, axis):
    return torch.stack(parts, axis)


def repeat_each(x, n, axis):
    return x if n == 1 else x.repeat_interleave(n, axis)


def permute(x, axes):
    return x.permute(axes)


def transpose_last(x):
    return x.transpose(-1, -2)


def pad_end(x, axis, n, value):
    """``x`` with ``n`` entries of ``value`` appended along ``axis``."""
    if n == 0:
        return x
    shape = list(x.shape)
    shape[axis] = n
    return torch.cat([x, torch.full(shape, value, dtype=x.dtype, device=x.device)], axis)


def nonzero(x):
    """One index array per axis, in row-major order."""
    return torch.nonzero(x, as_tuple=True)


def searchsorted(edges, x):
    """For each ``x`` the number of ``edges`` that are at most ``x``."""
    return torch.searchsorted(edges.contiguous(), x.contiguous(), right=True)


def scatter_true(shape, index, like):
    """A boolean array of ``shape``, true at the ``index`` tuple."""
    out = torch.zeros(shape, dtype=torch.bool, device=like.device)
    out[index] = True
    return out


def put_along(x, axis, index, part):
    """``x`` with ``part`` at the places ``index`` [n] of ``axis``; ``x`` itself may change."""
    return x.index_copy_(axis, index, part)


_LARGEST_ROOM = 1 << 28  # entries that are given room for rather than waited for


def waits(x) -> bool:
    """Whether reading a number of ``x`` would wait for a device."""
    return x.device.type != "cpu"


def true_columns(x):
    """int32 places along the last axis of the true entries of ``x``, in order; spare room behind them where counting waits."""
    if waits(x) and x.numel() <= _LARGEST_ROOM:
        return _with_room(x)
    return torch.nonzero(x, as_tuple=True)[-1].to(torch.int32)


def _with_room(x):
    flat = x.reshape(-1)
    slot = torch.where(flat, flat.cumsum(0) - 1, flat.shape[0])
    column = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device).expand(x.shape).reshape(-1)
    return torch.zeros(flat.shape[0] + 1, dtype=torch.int32, device=x.device).scatter_(0, slot, column)[:-1]


def known_empty(x) -> bool:
    """Whether no entry is true, as far as can be told now: a device is not waited for."""
    return not waits(x) and not bool(x.any())


def tabulated(rule, counts, largest):
    """``rule(counts)`` for integers 0..``largest``."""
    return rule(counts)


def half_above(x):
    """The smallest fp16 value that is at least ``x >= 0`` (infinity beyond its range)."""
    near = x.to(torch.float16)
    bumped = (near.view(torch.int16) + 1).view(torch.float16)
    return torch.where(near.to(x.dtype) < x, bumped, near)


def detach(x):
    return x.detach()


def to_numpy(x):
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def allocate_like(x, axis, size):
    shape = list(x.shape)
    shape[axis] = size
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def matmul_precision(x) -> str:
    """How fp32 matrix products on ``x``'s device are computed; only 'highest' is fp32 throughout."""
    if x.device.type == "cuda":
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "highest"
    return torch.get_float32_matmul_precision()


def autocast(*parts):
    """Under autocast, all of ``parts`` in its dtype (fp64 stays fp64, as PyTorch's own operators keep it)."""
    if not torch._C._is_any_autocast_enabled():
        return parts
    device = parts[0].device.type
    # devices without arithmetic, as `meta`, are not known to autocast
    active = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not active or any(p.dtype == torch.float64 for p in parts):
        return parts
    return tuple(p.to(torch.get_autocast_dtype(device)) if p.dtype.is_floating_point else p for p in parts)


of_type[torch.Tensor] = sys.modules[__name__]
