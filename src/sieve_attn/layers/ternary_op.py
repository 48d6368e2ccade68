"""The product with packed ternary weights as a PyTorch operator."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter, functional

from sieve_attn import checks, native
from sieve_attn.arrays import torch_ops
from sieve_attn.attend.torch_op import _modes, _transforms, refuse_tangents, refuse_transforms
from sieve_attn.layers import packing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Matrix(NamedTuple):
    """Codes and scales as kernels were given them: good for as long as those are what they were."""

    codes: ref[Tensor]
    alpha: ref[Tensor]
    version: int | None  # None where nobody counts what is written into codes
    start: int
    alpha_start: int
    words: Tensor | None  # codes in base 3, expanded; what kernels read lives as long as this
    kernel: Any


_MATRICES: dict[int, Matrix] = {}  # by the identity of codes


def matrix_of(codes: Tensor, alpha: Tensor, rows: int, columns: int) -> Matrix | None:
    """``codes`` and ``alpha`` for kernels, or None without kernels. Raises ValueError for those of another matrix.

    Made once, and again when something was written into codes; those in base 3 are expanded for it. ``kernel.fewest`` is the
    number of trits that are not zero in the row that has fewest, or 0 where changes of codes go unseen.
    """
    known = _MATRICES.get(id(codes))
    same = known is not None and known.codes() is codes and known.alpha() is alpha and known.version == codes._version
    if same and known.start == codes.data_ptr() and known.alpha_start == alpha.data_ptr():
        return known
    return None if native.missing() else _give(codes, alpha, rows, columns)


def _give(codes: Tensor, alpha: Tensor, rows: int, columns: int) -> Matrix:
    words = codes if codes.dtype != torch.uint8 else packing.pack(packing.unpack(codes, rows, columns))
    shape = packing.describe(rows, columns, "2-bit")[0]
    good = words.shape == shape and words.dtype == torch.int32 and words.is_contiguous() and alpha.is_contiguous()
    if not good or alpha.dtype != torch.float32 or alpha.numel() not in (1, rows):
        rule = f"must be contiguous int32 of shape {shape}, with fp32 alpha [1] or [{rows}], for weights [{rows}, {columns}]"
        raise checks.error("codes", rule, f"{words.dtype} of shape {tuple(words.shape)}", "pack the trits with packing.pack")
    version, key = None if codes.is_inference() else codes._version, id(codes)
    kernel = native.module().TernaryWeights(native.view(words), native.view(alpha), rows, columns, version is not None)
    expanded, held = None if words is codes else words, ref(codes, lambda _: _MATRICES.pop(key, None))
    matrix = Matrix(held, ref(alpha), version, codes.data_ptr(), alpha.data_ptr(), expanded, kernel)
    if version is not None:
        _MATRICES[key] = matrix
    return matrix


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
    matrix = matrix_of(codes, alpha, rows, x.shape[-1]) if x.is_cpu and x.dtype in DTYPES else None
    if matrix is None:
        return reference(x, codes, alpha, rows, int8)
    *lead, columns = x.shape
    out = torch.empty(*lead, rows, dtype=x.dtype)
    if out.numel():
        # kernels read tokens along one axis
        flat, to = (x, out) if len(lead) < 2 else (x.reshape(-1, columns), out.view(-1, rows))
        matrix.kernel.multiply(flat, to, int8, torch.get_num_threads())
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
    if watched(x):
        refuse_tangents(x, argument="x", why="packed weights differentiate in reverse mode only")
        refuse_transforms(x, argument="x")
        return ternary_linear_op(x, codes, alpha, rows, int8)
    return _compute(x, codes, alpha, rows, int8)


def watched(*tensors: Tensor) -> bool:
    """Whether the compiler, autograd of either kind, a transform or a tensor of another kind must see an operator."""
    if torch.compiler.is_compiling() or _transforms() is not None or _modes() > 0 or forward_ad._current_level >= 0:
        return True
    grad = torch.is_grad_enabled()
    return any(type(x) not in (Tensor, Parameter) or (grad and x.requires_grad) for x in tensors)
