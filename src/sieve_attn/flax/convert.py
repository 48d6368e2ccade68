"""Weights from the PyTorch modules to the NNX ones and back."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sieve_attn.checks import error
from sieve_attn.flax.aether import AetherAttention
from sieve_attn.flax.sparse_causal import SparseCausalAttention
from sieve_attn.flax.sparse_index import SparseIndexAttention
from sieve_attn.flax.ternary import Rotation, TernaryLinear

TERNARY = ("in_features", "out_features", "quantize", "per_row", "hadamard", "lsq")
INDEX = ("embed_dim", "offsets", "heads", "window", "global_tokens", "seq_len_max")


def from_torch(module: Any) -> nnx.Module:
    """The NNX module with the configuration and a copy of the weights of a module of :mod:`sieve_attn.layers`.

    Takes ``AetherAttention``, ``SparseIndexAttention`` (``PrimeSelfAttention`` and its like), ``SparseCausalAttention`` and
    ``TernaryLinear``; raises TypeError for others. Weights keep their dtype; caches are not carried over.
    """
    from sieve_attn import layers

    rngs = nnx.Rngs(0)  # every weight it draws is replaced
    if type(module) is layers.AetherAttention:
        return AetherAttention(module.sparsity_threshold, module.block_size, scale=module.scale, causal=module.causal)
    if type(module) is layers.TernaryLinear:
        return _ternary_from_torch(module)
    if type(module) is layers.SparseCausalAttention:
        made = SparseCausalAttention(module.d_model, module.d_head, module.top_k, module.query.quantize, module.heads, rngs=rngs)
        for name in ("query", "key", "value"):
            setattr(made, name, _ternary_from_torch(getattr(module, name)))
        return made
    if type(module) is layers.SparseIndexAttention:
        made = SparseIndexAttention(*(getattr(module, name) for name in INDEX), upstream_compat=module.upstream_compat, rngs=rngs)
        for name in ("in_proj", "out_proj"):
            linear, target = getattr(module, name), getattr(made, name)
            target.kernel, target.bias = nnx.Param(_to_jax(linear.weight).T), nnx.Param(_to_jax(linear.bias))
        return made
    known = "AetherAttention, SparseCausalAttention, SparseIndexAttention, TernaryLinear"
    raise error("module", f"must be one of sieve_attn.layers: {known}", type(module).__name__, "convert its parts", TypeError)


def to_torch(module: nnx.Module) -> Any:
    """The module of :mod:`sieve_attn.layers` with the configuration and a copy of the weights of ``module``: the other way."""
    import torch

    from sieve_attn import layers

    if type(module) is AetherAttention:
        return layers.AetherAttention(module.sparsity_threshold, module.block_size, scale=module.scale, causal=module.causal)
    if type(module) is TernaryLinear:
        return _ternary_to_torch(module)
    if type(module) is SparseCausalAttention:
        made = layers.SparseCausalAttention(module.d_model, module.d_head, module.top_k, module.query.quantize, module.heads)
        for name in ("query", "key", "value"):
            setattr(made, name, _ternary_to_torch(getattr(module, name)))
        return made
    if type(module) is SparseIndexAttention:
        dtype = _to_torch(module.in_proj.kernel[...]).dtype
        made = layers.SparseIndexAttention(
            *(getattr(module, name) for name in INDEX), upstream_compat=module.upstream_compat, dtype=dtype
        )
        with torch.no_grad():
            for name in ("in_proj", "out_proj"):
                linear, source = getattr(made, name), getattr(module, name)
                linear.weight.copy_(_to_torch(source.kernel[...].T))
                linear.bias.copy_(_to_torch(source.bias[...]))
        return made
    known = "AetherAttention, SparseCausalAttention, SparseIndexAttention, TernaryLinear"
    raise error("module", f"must be one of sieve_attn.flax: {known}", type(module).__name__, "convert its parts", TypeError)


def _ternary_from_torch(module: Any) -> TernaryLinear:
    made = TernaryLinear(*(getattr(module, name) for name in TERNARY), rngs=nnx.Rngs(0))
    made.weight = nnx.Param(_to_jax(module.weight))
    if module.lsq:
        made.scale = nnx.Param(_to_jax(module.scale))
    if made.rotation is not None:
        made.rotation = Rotation(_to_jax(module.rotation.factors[0]))
    return made


def _ternary_to_torch(module: TernaryLinear) -> Any:
    import torch

    from sieve_attn import layers

    made = layers.TernaryLinear(*(getattr(module, name) for name in TERNARY), dtype=_to_torch(module.weight[...]).dtype)
    with torch.no_grad():
        made.weight.copy_(_to_torch(module.weight[...]))
        if module.lsq:
            made.scale.copy_(_to_torch(module.scale[...]))
        if module.rotation is not None:
            made.rotation.factors[0].copy_(_to_torch(module.rotation[...]))
    return made


def _to_jax(tensor: Any) -> Any:
    """A copy, bit for bit; NumPy knows bfloat16 through ml_dtypes only."""
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        return jnp.asarray(tensor.view(dtype=_torch().int16).numpy().copy()).view(jnp.bfloat16)
    if str(tensor.dtype) == "torch.float64" and not _x64():
        raise error("module", "must not hold float64 weights while jax_enable_x64 is off", "float64", "call module.float() first")
    return jnp.asarray(tensor.numpy().copy())


def _to_torch(array: Any) -> Any:
    if array.dtype == jnp.bfloat16:
        return _torch().from_numpy(np.asarray(array.view(jnp.int16)).copy()).view(_torch().bfloat16)
    return _torch().from_numpy(np.asarray(array).copy())


def _torch() -> Any:
    import torch

    return torch


def _x64() -> bool:
    import jax

    return jax.config.jax_enable_x64
