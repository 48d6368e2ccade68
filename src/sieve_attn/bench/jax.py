"""``sieve bench --framework jax``: the jitted front-end, gate included, against both dense attentions, PyTorch's and JAX's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from sieve_attn.bench import peers, truth
from sieve_attn.bench.cases import Case, gates
from sieve_attn.bench.inputs import inputs
from sieve_attn.bench.prepared import Prepared, Unavailable
from sieve_attn.bench.rows import Target
from sieve_attn.bench.settings import Settings
from sieve_attn.pipeline import attention
from sieve_attn.policies import parse
from sieve_attn.types import Blocks, Selection

LENGTHS = (4096, 8192, 16_384)
LONG = 100_000
DENSE_LIMIT = 1 << 14  # JAX's dense attention on the CPU holds arrays of queries x keys
FASTER, NEAR = 5.0, 0.9  # than the faster dense attention; of the PyTorch front-end's speed
COMPILE_SECONDS = 10.0


def cases(settings: Settings) -> Iterator[Case]:
    """A tenth of the blocks kept, causal, at growing lengths; ``--long`` adds 100,000 tokens."""
    lengths = (*LENGTHS, *((LONG,) if settings.long else ())) if settings.n is None else (settings.n,)
    for dtype in settings.dtypes or ("float32", "bfloat16"):
        for dim in settings.head_dims or (64,):
            for n in lengths:
                for name, (policy, block) in gates(n, 0.1).items():
                    stated = (n, dtype, dim) == (8192, "float32", 64)
                    held = (Target("ratio", FASTER), Target("ratio_front", NEAR)) if stated else ()
                    yield Case("jax", name, dtype, n, n, dim, block, policy=policy, targets=held)


def prepare(case: Case, settings: Settings) -> Prepared:
    """Our call compiled once, its memory and its selection checked; three clocks beside it."""
    try:
        import jax
        import jax.numpy as jnp

        from sieve_attn import jax as front
        from sieve_attn.jax import ffi
    except ModuleNotFoundError as missing:
        raise Unavailable(str(missing)) from None
    held = inputs(case, settings.seed)
    given = tuple(jnp.asarray(_to_numpy(x), case.dtype) for x in held)
    policy, backend = parse(case.policy), settings.backend
    clock = time.perf_counter()
    run = jax.jit(lambda q, k, v: front.attention(q, k, v, policy, causal=True, backend=backend)).lower(*given).compile()
    seconds = time.perf_counter() - clock
    temporary = run.memory_analysis().temp_size_in_bytes

    def call() -> Any:
        return jax.block_until_ready(run(*given))

    def check(result: Any) -> tuple[str, dict[str, Any]]:
        report = jax.jit(lambda q, k, v: front.attention(q, k, v, policy, causal=True, backend=backend, return_report=True)[1])(
            *given
        )
        grid = {name: getattr(report.selection, name) for name in ("q_len", "kv_len", "q_block", "kv_block", "lead")}
        tiles = torch.from_numpy(_to_numpy(report.selection.to_tiles()).copy())
        selection = Selection((Blocks.from_tiles(tiles, **grid),))
        output = torch.from_numpy(_to_numpy(result.astype(jnp.float32)).copy()).to(held[0].dtype)
        wrong, _ = truth.check_attention(output, None, *held, selection, causal=True)
        density = float(report.density)
        if not wrong and temporary >= 4 * case.q_len * case.kv_len:
            wrong = f"the compiled module holds {temporary / 1e6:.0f} MB of temporaries, room for queries x keys"
        if not wrong and seconds > COMPILE_SECONDS:
            wrong = f"compiling took {seconds:.1f} s, allowed are {COMPILE_SECONDS:g} s"
        return wrong, {"density": density, "ideal": 1.0 / density, "backend": report.backend}

    def dense() -> peers.Peer:
        if case.q_len > DENSE_LIMIT:
            size = case.heads * case.q_len**2 * 4 / 1e9
            return peers.Peer(why=f"not run at {case.q_len:,} tokens, where one array of its logits takes {size:.0f} GB")
        across = tuple(x.swapaxes(1, 2) for x in given)
        compiled = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)).lower(*across).compile()
        return peers.Peer(lambda: jax.block_until_ready(compiled(*across)))

    def sdpa() -> peers.Peer:
        if case.q_len > DENSE_LIMIT:
            return peers.Peer(why=f"not run at {case.q_len:,} tokens, where it takes minutes")
        return peers.sdpa(*held, True)

    note = f"naive is jax.nn.dot_product_attention on XLA's own threads ({os.cpu_count()}), ours on {ffi.threads()}; "
    note += f"compiled in {seconds:.2f} s, {temporary / 1e6:.1f} MB of temporaries"
    return Prepared(
        call, check, {"sdpa": sdpa, "naive": dense}, notes=(note,),
        beside={"front": lambda: attention(*held, policy, causal=True, backend=backend)},
    )  # fmt: skip


def _to_numpy(x: Any) -> Any:
    """NumPy arrays of PyTorch and JAX; bf16 as fp32, which holds it exactly."""
    import numpy as np

    if isinstance(x, torch.Tensor):
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return np.asarray(x)
