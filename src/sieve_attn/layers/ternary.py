"""Linear layers with ternary weights: one to train, one packed."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from sieve_attn import checks
from sieve_attn.arrays import torch_ops
from sieve_attn.layers import packing
from sieve_attn.layers.rotation import Rotation
from sieve_attn.layers.ternary_op import ternary_linear

LEAST_SCALE = 1e-5


def mean_size(weight: Tensor, per_row: bool = False) -> Tensor:
    """``alpha``: the mean of ``|W|`` over the tensor, or over each row with an axis left; at least 1e-5, without gradient."""
    size = weight.detach().abs()
    return (size.mean(-1, keepdim=True) if per_row else size.mean()).clamp_min(LEAST_SCALE)


def trits_of(weight: Tensor, alpha: Tensor) -> Tensor:
    """``clip(round(W / alpha), -1, 1)``; halves round to even."""
    return torch.round(weight.detach() / alpha).clamp_(-1.0, 1.0)


def straight_through(weight: Tensor, value: Tensor) -> Tensor:
    """``value``, bit for bit, with the gradient of ``weight``."""
    return value.detach() + (weight - weight.detach())


class TernaryLinear(nn.Module):
    """``y = x W_q^T`` with ``W_q = clip(round(W / alpha), -1, 1) * alpha``, no bias; ``W`` gets the gradient of ``W_q``.

    ``alpha`` is the mean of ``|W|``, at least 1e-5: over the tensor, or for each output channel with ``per_row``. With ``lsq`` it
    is a parameter, ``scale``, that starts at that mean and learns by the gradient of the rounding step, ``trit - W / scale``
    inside of the clip and ``trit`` outside of it, divided by the root of the number of weights. ``hadamard`` multiplies input
    and weight by one orthogonal matrix before rounding (:class:`~sieve_attn.layers.rotation.Rotation`); ``y`` would be the same
    without rounding. ``quantize=False`` is a plain linear layer. Weights start as N(0, 1 / in_features).

    ``x`` [..., in_features] gives [..., out_features]. Raises ValueError for ``lsq`` with ``per_row`` and for an ``x`` of
    another width.

    References: BitNet b1.58 (Ma et al., 2024) for ``alpha``; Learned Step Size Quantization (Esser et al., 2020) for ``lsq``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quantize: bool = True,
        per_row: bool = False,
        hadamard: bool = False,
        lsq: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features = checks.positive_int("in_features", in_features, "try 256")
        self.out_features = checks.positive_int("out_features", out_features, "try 256")
        if lsq and per_row:
            raise checks.error("lsq", "learns one scale for the tensor and excludes `per_row`", "both", "choose one of them")
        self.quantize, self.per_row, self.hadamard, self.lsq = bool(quantize), bool(per_row), bool(hadamard), bool(lsq)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.empty((), device=device, dtype=dtype)) if lsq else None
        self.rotation = Rotation(self.in_features).to(self.weight.device) if hadamard else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        self.reset_scale()

    @torch.no_grad()
    def reset_scale(self) -> None:
        """With ``lsq``: start again at the mean of ``|W|``, as after copying weights."""
        if self.scale is not None:
            self.scale.copy_(mean_size(self._rotated()))

    def _rotated(self) -> Tensor:
        if self.rotation is None:
            return self.weight
        # trits are chosen from what comes out: autocast would round it first, and choose others than `trits` and `pack` do
        device, wide = self.weight.device.type, torch.promote_types(self.weight.dtype, torch.float32)
        known = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if known else nullcontext():
            return self.rotation(self.weight.to(wide)).to(self.weight.dtype)

    def alpha(self) -> Tensor:
        """The scale of the trits: a number, or [out_features, 1] with ``per_row``; without gradient."""
        return self.scale.detach().clamp_min(LEAST_SCALE) if self.lsq else mean_size(self._rotated(), self.per_row)

    @torch.no_grad()
    def trits(self) -> Tensor:
        """[out_features, in_features] int8 of -1, 0 and 1, of the rotated weights with ``hadamard``."""
        return trits_of(self._rotated(), self.alpha()).to(torch.int8)

    def ternary_weight(self) -> Tensor:
        """``W_q`` [out_features, in_features], of the rotated weights with ``hadamard``, with straight-through gradients."""
        weight = self._rotated()
        if not self.quantize:
            return weight
        alpha = self.scale.detach().clamp_min(LEAST_SCALE) if self.lsq else mean_size(weight, self.per_row)
        trits = trits_of(weight, alpha)
        value = straight_through(weight, trits * alpha)
        if self.scale is None:
            return value
        ratio = weight.detach() / alpha
        slope = torch.where(ratio.abs() < 1, trits - ratio, trits) * weight.numel() ** -0.5
        return value + slope * (self.scale - self.scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        _check_width(x, self.in_features, self.out_features)
        if not self.quantize:
            return functional.linear(x, self.weight)
        return functional.linear(x if self.rotation is None else self.rotation(x), self.ternary_weight())

    def pack(self, form: str = "2-bit", *, int8_activations: bool = False) -> PackedTernaryLinear:
        """The inference form of this layer; see :class:`PackedTernaryLinear`. Raises ValueError if it is not quantised."""
        if not self.quantize:
            raise checks.error(
                "quantize", "must be True to pack a layer: plain weights are no trits", "False", "train it with True"
            )
        if not bool(torch.isfinite(self.weight).all()):
            raise checks.error(
                "weight", "must be finite to be packed: trits cannot hold NaN", "NaN or infinities", "mend them first"
            )
        packed = PackedTernaryLinear(
            self.in_features, self.out_features, form, per_row=self.per_row, hadamard=self.hadamard,
            int8_activations=int8_activations, device=self.weight.device,
        )  # fmt: skip
        packed.codes.copy_(packing.pack(self.trits(), form))
        packed.alpha.copy_(self.alpha().reshape(-1))
        return packed.train(self.training)

    def extra_repr(self) -> str:
        flags = "".join(f", {name}=True" for name in ("per_row", "hadamard", "lsq") if getattr(self, name))
        return f"{self.in_features}, {self.out_features}, quantize={self.quantize}{flags}"


class PackedTernaryLinear(nn.Module):
    """``y = alpha * (x T^T)`` from packed trits ``T``: no parameters, the buffers ``codes`` and ``alpha`` are its state.

    ``form="2-bit"`` takes a sixteenth of fp32 weights and is computed with as it is; ``form="base-3"`` stores five trits a byte
    and is expanded to two bits when it is first used. fp32, fp16 and bf16 inputs are summed in fp32; with ``int8_activations``
    every token is rounded to 8 bits under its own scale ``max |x| / 127`` first (faster, and off by that rounding). ``alpha`` [1]
    or [out_features] stays fp32 whatever the module is cast to. ``x`` may require gradients.

    ``x`` [..., in_features] gives [..., out_features]; raises ValueError for another width.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: str = "2-bit",
        *,
        per_row: bool = False,
        hadamard: bool = False,
        int8_activations: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features = checks.positive_int("in_features", in_features, "try 256")
        self.out_features = checks.positive_int("out_features", out_features, "try 256")
        self.form, self.int8_activations = form, bool(int8_activations)
        shape, fill, dtype = packing.describe(self.out_features, self.in_features, form)
        self.register_buffer("codes", torch.full(shape, fill, dtype=dtype, device=device))
        self.register_buffer("alpha", torch.ones(out_features if per_row else 1, dtype=torch.float32, device=device))
        self.rotation = Rotation(self.in_features).to(self.codes.device) if hadamard else None

    def _apply(self, fn, recurse=True):
        alpha = self.alpha
        super()._apply(fn, recurse)
        if self.alpha.dtype != torch.float32:
            self.alpha = alpha.to(self.alpha.device)
        return self

    def trits(self) -> Tensor:
        """[out_features, in_features] int8 of -1, 0 and 1."""
        return packing.unpack(self.codes, self.out_features, self.in_features)

    def unpack(self) -> Tensor:
        """The ternary weights [out_features, in_features] fp32, exactly those that were packed."""
        return self.trits().float() * self.alpha[:, None]

    def forward(self, x: Tensor) -> Tensor:
        # a step of decoding streams weights through the caches: what Python touches here comes from memory, so it is little
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            _check_width(x, self.in_features, self.out_features)
        if torch._C._is_any_autocast_enabled():
            (x,) = torch_ops.autocast(x)
        x = x if self.rotation is None else self.rotation(x)
        held = self._buffers
        return ternary_linear(x, held["codes"], held["alpha"], self.out_features, self.int8_activations)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, form={self.form!r}, int8_activations={self.int8_activations}"


def pack_ternary(module: nn.Module, form: str = "2-bit", *, int8_activations: bool = False) -> nn.Module:
    """``module`` with every quantised :class:`TernaryLinear` below it replaced, in place, by its packed form."""
    if isinstance(module, TernaryLinear):
        return module.pack(form, int8_activations=int8_activations) if module.quantize else module
    for name, child in list(module.named_children()):
        setattr(module, name, pack_ternary(child, form, int8_activations=int8_activations))
    return module


def _check_width(x: Tensor, width: int, out: int) -> None:
    if x.dim() < 1 or x.shape[-1] != width:
        raise checks.error(
            "x", f"must have shape [..., {width}] for weights of shape [{out}, {width}]", f"shape {tuple(x.shape)}",
            "the last axis holds the channels",
        )  # fmt: skip
    if not x.is_floating_point():
        raise checks.error("x", "must be of a floating dtype", x.dtype, "cast it first")
