"""Linear layers with ternary weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sieve_attn import checks

LEAST_SCALE = 1e-5


class Rotation(nnx.Variable):
    """An orthogonal matrix that is no parameter."""


def mean_size(weight: jax.Array, per_row: bool = False) -> jax.Array:
    """``alpha``: the mean of ``|W|`` over the tensor, or over each row with an axis left; at least 1e-5, without gradient."""
    size = jnp.abs(jax.lax.stop_gradient(weight))
    return jnp.maximum(size.mean(-1, keepdims=True) if per_row else size.mean(), LEAST_SCALE)


def trits_of(weight: jax.Array, alpha: jax.Array) -> jax.Array:
    """``clip(round(W / alpha), -1, 1)``; halves round to even."""
    return jnp.clip(jnp.round(jax.lax.stop_gradient(weight) / alpha), -1.0, 1.0)


def straight_through(weight: jax.Array, value: jax.Array) -> jax.Array:
    """``value``, bit for bit, with the gradient of ``weight``."""
    return jax.lax.stop_gradient(value) + (weight - jax.lax.stop_gradient(weight))


class TernaryLinear(nnx.Module):
    """:class:`sieve_attn.layers.TernaryLinear` on JAX arrays: ``y = x W_q^T``, ``W_q = clip(round(W / alpha), -1, 1) * alpha``.

    ``weight`` [out_features, in_features] is a parameter and gets the gradient of ``W_q``; with ``lsq`` so is ``scale``. See
    there for ``alpha``, ``per_row``, ``lsq`` and ``hadamard``. The orthogonal matrix of ``hadamard`` is Sylvester's for a power
    of two; for other widths it is drawn once from ``rngs`` and kept in the variable ``rotation``, which converting carries over.

    ``x`` [..., in_features] gives [..., out_features]. Raises ValueError for ``lsq`` with ``per_row`` and for other widths.
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
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features = checks.positive_int("in_features", in_features, "try 256")
        self.out_features = checks.positive_int("out_features", out_features, "try 256")
        if lsq and per_row:
            raise checks.error("lsq", "learns one scale for the tensor and excludes `per_row`", "both", "choose one of them")
        self.quantize, self.per_row, self.hadamard, self.lsq = bool(quantize), bool(per_row), bool(hadamard), bool(lsq)
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (out_features, in_features), dtype) * in_features**-0.5)
        drawn = hadamard and in_features & (in_features - 1)
        self.rotation = Rotation(_orthogonal(rngs.params(), in_features)) if drawn else None
        self.scale = nnx.Param(mean_size(self._rotated())) if lsq else None

    def _turn(self, x: jax.Array) -> jax.Array:
        if not self.hadamard:
            return x
        if self.rotation is not None:
            return x @ self.rotation[...].astype(x.dtype)
        bits = self.in_features.bit_length() - 1
        left, right = _sylvester(1 << bits // 2, x.dtype), _sylvester(1 << (bits - bits // 2), x.dtype)
        parts = x.reshape(*x.shape[:-1], left.shape[0], right.shape[0])
        return ((left @ parts) @ right).reshape(x.shape) * self.in_features**-0.5

    def _rotated(self) -> jax.Array:
        return self._turn(self.weight[...])

    def alpha(self) -> jax.Array:
        """The scale of the trits: a number, or [out_features, 1] with ``per_row``; without gradient."""
        if self.lsq:
            return jnp.maximum(jax.lax.stop_gradient(self.scale[...]), LEAST_SCALE)
        return mean_size(self._rotated(), self.per_row)

    def trits(self) -> jax.Array:
        """[out_features, in_features] int8 of -1, 0 and 1, of the rotated weights with ``hadamard``."""
        return trits_of(self._rotated(), self.alpha()).astype(jnp.int8)

    def ternary_weight(self) -> jax.Array:
        """``W_q`` [out_features, in_features], of the rotated weights with ``hadamard``, with straight-through gradients."""
        weight = self._rotated()
        if not self.quantize:
            return weight
        alpha = self.alpha()
        trits = trits_of(weight, alpha)
        value = straight_through(weight, trits * alpha)
        if not self.lsq:
            return value
        ratio = jax.lax.stop_gradient(weight) / alpha
        slope = jnp.where(jnp.abs(ratio) < 1, trits - ratio, trits) * weight.size**-0.5
        return value + slope * (self.scale[...] - jax.lax.stop_gradient(self.scale[...]))

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise checks.error(
                "x", f"must have shape [..., {self.in_features}] for weights of shape [{self.out_features}, {self.in_features}]",
                f"shape {x.shape}", "the last axis holds the channels",
            )  # fmt: skip
        if not self.quantize:
            return x @ self.weight[...].T
        return self._turn(x) @ self.ternary_weight().T


def _sylvester(size: int, dtype: Any) -> jax.Array:
    h = np.ones((1, 1), np.float32)
    while h.shape[0] < size:
        h = np.block([[h, h], [h, -h]])
    return jnp.asarray(h, dtype)


def _orthogonal(key: jax.Array, width: int) -> jax.Array:
    q, r = jnp.linalg.qr(jax.random.normal(key, (width, width)))
    return q * jnp.sign(jnp.diagonal(r))
