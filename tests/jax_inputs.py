"""Arrays that the tests of the JAX front-end share: drawn once in NumPy, given to both frameworks."""

import jax
import numpy as np
import torch

torch.set_num_threads(1)
# what is compiled here runs once on small arrays
jax.config.update("jax_disable_most_optimizations", True)


def arrays(q_len=150, kv_len=170, q_heads=4, kv_heads=2, dim=16, v_dim=24, batch=2, seed=0, dtype=np.float32):
    """Clustered keys, so that blocks differ."""
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((batch, q_heads, q_len, dim))
    centre = np.repeat(rng.standard_normal((batch, kv_heads, -(-kv_len // 16), dim)) * 1.5, 16, 2)[:, :, :kv_len]
    key = centre + 0.5 * rng.standard_normal((batch, kv_heads, kv_len, dim))
    value = rng.standard_normal((batch, kv_heads, kv_len, v_dim))
    return tuple(x.astype(dtype) for x in (query, key, value))


def torch_of(*parts):
    return tuple(None if x is None else torch.from_numpy(np.array(x)) for x in parts)


def far_apart(a, b):
    """Largest difference, infinities that agree left out."""
    a, b = (np.asarray(x.detach().float() if isinstance(x, torch.Tensor) else x, np.float64) for x in (a, b))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return float(np.max(np.where(same, 0.0, np.abs(np.where(same, 0.0, a) - np.where(same, 0.0, b))), initial=0.0))
