from sieve_attn import aether as aether
from sieve_attn import certify as certify
from sieve_attn import evaluation as evaluation
from sieve_attn import functional as functional
from sieve_attn import geometry as geometry
from sieve_attn import layers as layers
from sieve_attn import llm as llm
from sieve_attn import patterns as patterns
from sieve_attn import policies as policies
from sieve_attn import scores as scores
from sieve_attn import selection as selection
from sieve_attn import testing as testing
from sieve_attn import torch as torch
from sieve_attn import transformers as transformers
from sieve_attn import types as types
from sieve_attn.layers import AetherAttention as AetherAttention
from sieve_attn.layers import MianChowlaSelfAttention as MianChowlaSelfAttention
from sieve_attn.layers import PrimeSelfAttention as PrimeSelfAttention
from sieve_attn.layers import SquareSelfAttention as SquareSelfAttention
from sieve_attn.llm import LLM as LLM
from sieve_attn.llm import AetherSparseAttentionConfig as AetherSparseAttentionConfig
from sieve_attn.pipeline import attend as attend
from sieve_attn.pipeline import attention as attention
from sieve_attn.torch import aether_attention as aether_attention
from sieve_attn.transformers import sparsify as sparsify

__version__: str
