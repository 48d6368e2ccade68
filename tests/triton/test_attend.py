"""The contract of every backend, and what only these kernels could get wrong: tile sizes, head dims, strides, malformed lists."""

import torch

from sieve_attn.testing import BackendContract


class TestTriton(BackendContract):
    backend = "triton"
    dtypes = (torch.float16, torch.float32)
