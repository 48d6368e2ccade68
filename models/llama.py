"""A lean Llama whose parameter names equal those of Hugging Face's ``LlamaForCausalLM``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The architecture; vocabulary and special ids are ByT5Tokenizer's."""

    vocab: int = 384
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    feed_forward: int = 640
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    max_positions: int = 32_768


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def projection(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def fused_linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    """One matrix product for layers that share their input; the master weights stay in float32."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]).to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = projection(shape.hidden, shape.heads * shape.head_dim)
        self.k_proj = projection(shape.hidden, shape.kv_heads * shape.head_dim)
        self.v_proj = projection(shape.hidden, shape.kv_heads * shape.head_dim)
        self.o_proj = projection(shape.heads * shape.head_dim, shape.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shape = self.shape
        qkv = fused_linear(x, self.q_proj, self.k_proj, self.v_proj)
        qkv = qkv.view(batch, length, shape.heads + 2 * shape.kv_heads, shape.head_dim).transpose(1, 2)
        query, key, value = qkv.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        groups = shape.heads // shape.kv_heads
        query = rotate(query, cos, sin)
        key = rotate(key, cos, sin).repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return fused_linear(mixed.transpose(1, 2).reshape(batch, length, -1), self.o_proj)


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = projection(shape.hidden, shape.feed_forward)
        self.up_proj = projection(shape.hidden, shape.feed_forward)
        self.down_proj = projection(shape.feed_forward, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = fused_linear(x, self.gate_proj, self.up_proj).chunk(2, dim=-1)
        return fused_linear(F.silu(gate) * up, self.down_proj)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)


class Llama(nn.Module):
    """Causal language model with tied embeddings that computes in bfloat16 from float32 weights."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for layer in self.model.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits in float32 for every position of ``ids`` (batch, length)."""
        cos, sin = self._rotations(ids.shape[1])
        x = F.embedding(ids, self.model.embed_tokens.weight).bfloat16()
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight.bfloat16()).float()

    def loss(self, ids: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean loss and the per-token losses, in nats."""
        losses = F.cross_entropy(self(ids).flatten(0, 1), targets.flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum(), losses.detach()

    def _rotations(self, length: int) -> tuple[Tensor, Tensor]:
        half = self.shape.head_dim // 2
        frequencies = self.shape.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        return angles.cos().bfloat16(), angles.sin().bfloat16()
