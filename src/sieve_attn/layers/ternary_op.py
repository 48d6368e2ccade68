"""The product with packed ternary weights as a PyTorch operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional
from torch.utils.weak import WeakTensorKeyDictionary

from sieve_attn import native
from sieve_attn.arrays import torch_ops
from sieve_attn.attend.torch_op import _modes, _transforms, refuse_tangents
from sieve_attn.layers import packing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_EXPANDED = WeakTensorKeyDictionary()  # codes in base 3 -> (their version, the same in two bits)
_FEWEST = WeakTensorKeyDictionary()  # codes in two bits -> (their version, trits that are not zero in the row that has fewest)


def two_bits(codes: Tensor, rows: int, columns: int) -> Tensor:
    """``codes`` as kernels read them. Those in base 3 are expanded once, and again when something was written into them."""
    if codes.dtype != torch.uint8:
        return codes
    if codes.is_inference():  # nobody counts what is written into these
        return packing.pack(packing.unpack(codes, rows, columns))
    known = _EXPANDED.get(codes)
    if known is None or known[0] != codes._version:
        known = _EXPANDED[codes] = (codes._version, packing.pack(packing.unpack(codes, rows, columns)))
    return known[1]


def fewest(codes: Tensor, rows: int, columns: int) -> int:
    """Trits that are not zero in the row of two-bit ``codes`` that has fewest, counted once; 0 where changes go unseen."""
    if codes.is_inference():
        return 0
    known = _FEWEST.get(codes)
    if known is None or known[0] != codes._version:
        count = native.module().ternary_fewest(native.view(codes), rows, columns)
        known = _FEWEST[codes] = (codes._version, count)
    return known[1]


def weight_of(codes: Tensor, alpha: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """``alpha * trits`` [rows, columns]."""
    return packing.unpack(codes, rows, columns).to(dtype) * alpha.to(dtype)[:, None]


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(q, scale)`` with ``x ~ q * scale``: whole numbers up to 127, and ``max |x| / 127`` a token or NaN."""
    scale = x.abs().amax(-1, keepdim=True) / 127.0
    known = torch.isfinite(scale) & (scale >= torch.finfo(scale.dtype).tiny)
    q = torch.where(known, torch.round(x / torch.where(known, scale, 1.0)), 0.0)
    return q, torch.where(known, scale, torch.where(torch.isfinite(scale), 0.0, torch.nan))


def reference(x: Tensor, codes: Tensor, alpha: Tensor, rows: int, int8: bool) -> Tensor:
    """``alpha * (x @ trits.T)`` from the unpacked weights, in fp32 or, for fp64 inputs, in fp64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    trits = packing.unpack(codes, rows, x.shape[-1]).to(wide)
    y, scale = round_tokens(x.to(wide)) if int8 else (x.to(wide), 1.0)
    return (functional.linear(y, trits) * (alpha.to(wide) * scale)).to(x.dtype)


def _compute(x: Tensor, codes: Tensor, alpha: Tensor, rows: int, int8: bool) -> Tensor:
    if not x.is_cpu or x.dtype not in DTYPES or native.missing():
        return reference(x, codes, alpha, rows, int8)
    *lead, columns = x.shape
    out = torch.empty(*lead, rows, dtype=x.dtype)
    if out.numel():
        # kernels read tokens along one axis
        flat, to = (x, out) if len(lead) < 2 else (x.reshape(-1, columns), out.view(-1, rows))
        words = two_bits(codes, rows, columns)
        see, threads = native.view, native.threads(x)
        trits = fewest(words, rows, columns)
        native.module().ternary_linear(see(words), see(alpha), rows, columns, trits, see(flat), int8, see(to), threads)
    return out


@torch.library.custom_op("sieve_attn::ternary_linear", mutates_args=())
def ternary_linear_op(x: Tensor, codes: Tensor, alpha: Tensor, rows: int, int8: bool) -> Tensor:
    """``alpha * (x @ trits.T)`` [..., rows] for ``x`` [..., columns], packed ``codes`` and ``alpha`` [1 | rows] fp32."""
    with torch_ops.no_grad():
        return _compute(x, codes, alpha, rows, int8)


@ternary_linear_op.register_fake
def _(x, codes, alpha, rows, int8):
    return x.new_empty(*x.shape[:-1], rows)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, codes, alpha, rows, _ = inputs
    ctx.save_for_backward(codes, alpha)
    ctx.sizes = (rows, x.shape[-1])


def _backward(ctx: Any, grad: Tensor) -> tuple:
    # rounding to 8 bits counts as the identity
    codes, alpha = ctx.saved_tensors
    return grad @ weight_of(codes, alpha, *ctx.sizes, grad.dtype), None, None, None, None


ternary_linear_op.register_autograd(_backward, setup_context=_setup)


def ternary_linear(x: Tensor, codes: Tensor, alpha: Tensor, rows: int, int8: bool = False) -> Tensor:
    """The operator, passed by where nobody needs to see it: it costs as much as a small layer."""
    refuse_tangents(x, argument="x", why="packed weights differentiate in reverse mode only")
    if watched(x):
        return ternary_linear_op(x, codes, alpha, rows, int8)
    return _compute(x, codes, alpha, rows, int8)


def watched(*tensors: Tensor) -> bool:
    """Whether the compiler, autograd, a transform or a tensor of another kind must see an operator."""
    if torch.compiler.is_compiling() or _transforms() is not None or _modes() > 0:
        return True
    grad = torch.is_grad_enabled()
    return any(type(x) not in (Tensor, Parameter) or (grad and x.requires_grad) for x in tensors)
