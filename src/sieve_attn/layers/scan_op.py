"""The diagonal recurrence ``h_t = a h_(t-1) + x_t`` as a PyTorch operator: O(len * width) time and memory, both ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sieve_attn import checks, native
from sieve_attn.arrays import torch_ops
from sieve_attn.attend.torch_op import refuse_tangents, refuse_transforms
from sieve_attn.layers.ternary_op import watched

CHUNK = 32


def chunked(x: Tensor, decay: Tensor, start: Tensor) -> Tensor:
    """Without kernels: a triangular product with the powers of ``a`` inside of chunks, then one short loop over chunks."""
    length = x.shape[1]
    size = min(CHUNK, length)
    apart = torch.arange(size, device=x.device)[:, None] - torch.arange(size, device=x.device)
    powers = torch.where(apart >= 0, decay[:, None, None] ** apart.clamp_min(0), 0.0)  # [width, to, from]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -length % size)).unflatten(1, (-1, size))
    inner = torch.einsum("wts,bcsw->bctw", powers, padded)
    reach = (decay[:, None] ** torch.arange(1, size + 1, device=x.device)).T  # [to, width]
    states, state = [], start
    for part in inner.unbind(1):
        states.append(part + reach * state[:, None])
        state = states[-1][:, -1]
    return torch.cat(states, 1)[:, :length].contiguous()


def _compute(x: Tensor, decay: Tensor, start: Tensor, reverse: bool) -> Tensor:
    if not x.numel():
        return torch.empty_like(x)
    if x.device.type != "cpu" or x.dtype != torch.float32 or native.missing():
        steps = chunked(x.flip(1) if reverse else x, decay, start)
        return steps.flip(1) if reverse else steps
    x, decay, start = (y.contiguous() for y in (x, decay, start))
    out = torch.empty_like(x)
    views = (native.view(y) for y in (x, decay, start, out))
    native.module().diagonal_scan(*views, reverse, native.threads(x))
    return out


@torch.library.custom_op("sieve_attn::diagonal_scan", mutates_args=())
def diagonal_scan_op(x: Tensor, decay: Tensor, start: Tensor, reverse: bool) -> Tensor:
    """See :func:`diagonal_scan`."""
    with torch_ops.no_grad():
        return _compute(x, decay, start, reverse)


@diagonal_scan_op.register_fake
def _(x, decay, start, reverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, decay, start, reverse = inputs
    ctx.save_for_backward(decay, start, output)
    ctx.reverse = reverse


def _backward(ctx: Any, grad: Tensor) -> tuple:
    # the gradient of x_t is that of h_t and of everything that h_t reaches: the same recurrence against time
    decay, start, states = ctx.saved_tensors
    pull = diagonal_scan(grad.contiguous(), decay, torch.zeros_like(start), not ctx.reverse)
    first = pull[:, -1 if ctx.reverse else 0]
    before, after = (states[:, 1:], pull[:, :-1]) if ctx.reverse else (states[:, :-1], pull[:, 1:])
    return pull, (after * before).sum((0, 1)) + (first * start).sum(0), first * decay, None


diagonal_scan_op.register_autograd(_backward, setup_context=_setup)


def diagonal_scan(x: Tensor, decay: Tensor, start: Tensor, reverse: bool = False) -> Tensor:
    """``h`` [batch, len, width] for ``x`` of that shape, ``a = decay`` [width] and ``start`` [batch, width], the state before.

    ``reverse`` runs from the last token to the first. All arrays share one dtype. Raises ValueError where shapes do not fit.
    """
    batch, _, width = x.shape
    if decay.shape != (width,) or start.shape != (batch, width):
        raise checks.error(
            "decay, start", f"must have shapes [{width}] and [{batch}, {width}]", f"{list(decay.shape)}, {list(start.shape)}",
            "give every channel a factor and every sequence a state",
        )  # fmt: skip
    refuse_tangents(x, decay, start, argument="x, decay, start", why="the recurrence differentiates in reverse mode only")
    if not watched(x, decay, start):
        return _compute(x, decay, start, reverse)
    refuse_transforms(x, decay, start, argument="x, decay, start")
    return diagonal_scan_op(x, decay, start, reverse)
