"""AETHER's geometry and gate as PyTorch operators, so that they stay whole inside ``torch.compile``."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sieve_attn import aether
from sieve_attn.attend.torch_op import refuse_tangents

no_tangents = partial(refuse_tangents, why="what chooses blocks has no derivative", remedy="detach it first")


@torch.library.custom_op("sieve_attn::block_geometry", mutates_args=())
def block_geometry(k: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    centroids, radii = aether.geometry_of(k, block_size)
    return centroids.contiguous(), radii.contiguous()


@block_geometry.register_fake
def _(k, block_size):
    batch, length, heads, dim = k.shape
    blocks = -(-length // block_size)
    return k.new_empty(batch, blocks, heads, dim, dtype=torch.float32), k.new_empty(batch, blocks, heads, dtype=torch.float32)


@torch.library.custom_op("sieve_attn::aether_metadata", mutates_args=())
def aether_metadata(keys: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return aether.metadata_of(keys, block_size)


@aether_metadata.register_fake
def _(keys, block_size):
    batch, heads, length, dim = keys.shape
    shape = (batch, heads, -(-length // block_size))
    return keys.new_empty(*shape, dim, dtype=torch.float32), *(keys.new_empty(shape, dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("sieve_attn::aether_gate", mutates_args=())
def aether_gate(
    query: Tensor, means: Tensor, radii: Tensor, variances: Tensor | None, concentrations: Tensor | None, threshold: float,
    scale: float, is_causal: bool, local_window: int, recency_decay: float, target_sparsity: float | None, recency: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return aether.gate(
        query,
        means,
        radii,
        variances,
        concentrations,
        threshold,
        scale,
        is_causal,
        local_window,
        recency_decay,
        target_sparsity,
        recency,
    )


@aether_gate.register_fake
def _(query, means, radii, *rest):
    return radii.new_empty(radii.shape, dtype=torch.bool), radii.new_empty(radii.shape, dtype=torch.float32)
