"""Compiles what the device stages launch, for cards that are not here: run with an architecture and case names.

Launches are recorded instead of made, so that exactly what a call would run is compiled. Prints one JSON line a kernel.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sieve_attn import policies, scores, selection
from sieve_attn.attend.triton import best_keys, diagonals, tokens
from sieve_attn.geometry.triton import launch as geometry
from sieve_attn.selection.triton import launch as gate
from sieve_attn.types import Call, Geometry, Selection, Sketch, Statistics, Tokens

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
         torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1"}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
launched = []


def record(kernel, grid):
    return lambda *arguments, **named: launched.append((kernel, arguments, named))


JITFunction.__getitem__ = record


def qkv(q_len, kv_len, dim, dtype):
    return (torch.empty(1, heads, n, dim, dtype=dtype) for heads, n in ((32, q_len), (8, kv_len), (8, kv_len)))


def choosing(policy, q_len, kv_len, dim=128, dtype=torch.bfloat16, **options):
    q, k, v = qkv(q_len, kv_len, dim, dtype)
    asked = policy.statistics
    clips = (1.0, 0.92, 0.84, 0.76)
    made = geometry.summarise(k, policy.block_size, asked, None, options.get("key_mask"), None, clips)
    sketch = None
    if asked.sketch_bits:
        names = ("planes", "scale", "error", "metric_error", "channel_scale")
        sketch = Sketch(asked.sketch_bits, *(made.pop(name) for name in names))
    found = Geometry(policy.block_size, kv_len, asked, **made, sketch=sketch)
    gate.select(Call(q, k, v, scale=dim**-0.5, **options), found, policy)


def top_k(dim=128, dtype=torch.bfloat16):
    q, k, v = qkv(512, 512, dim, dtype)
    call = Call(q, k, v, causal=True, scale=1.0)
    best_keys.choose(call, 8)
    chosen = Selection((Tokens(torch.zeros(1, 32, 512, 8, dtype=torch.int32), 512),))
    output, lse = tokens.attend(call, chosen)
    tokens.backward(call, chosen, output, lse, output, lse)


def offsets(dim=128, dtype=torch.bfloat16):
    q, k, v = qkv(512, 512, dim, dtype)
    given = (q, k, v, torch.arange(9), 2, 1.0)
    output, lse = diagonals.attend(*given)
    diagonals.backward(*given, output, lse, output, lse)


def summaries(dim, size, dtype, **more):
    k = torch.empty(1, 8, 512, dim, dtype=dtype)
    asked = Statistics(radius=True, sketch_bits=8, **more)
    geometry.summarise(k, size, asked, k if asked.value else None, None, None, (1.0, 0.95))


MEANS = policies.Policy(scores.Mean(), selection.TargetSparsity(0.9), block_size=64)
MASK = torch.ones(1, 4096, dtype=torch.bool)
CASES = {
    "prefill": lambda: choosing(policies.TopBlocks(64), 8192, 8192, causal=True),
    "decode": lambda: choosing(policies.TopBlocks(64), 1, 131_072),
    "means": lambda: choosing(MEANS, 4096, 4096, causal=True),
    "mass": lambda: choosing(policies.Adaptive(0.9, dense_above=0.5), 4096, 4096, causal=True, key_mask=MASK),
    "ball": lambda: choosing(policies.Aether(0.15), 1024, 1024, causal=True, window=300),
    "exact queries": lambda: choosing(policies.Policy(scores.KeySketch(8), selection.RelativeThreshold(3.0)), 512, 512, dim=64,
                                      dtype=torch.float32, softcap=20.0),
    "top-k": top_k,
    "top-k fp32": lambda: top_k(64, torch.float32),
    "offsets": offsets,
    "summaries": lambda: summaries(64, 16, torch.float16, box=True, value=True),
    "large blocks": lambda: summaries(128, 64, torch.float32),
}  # fmt: skip


def type_of(x):
    if isinstance(x, torch.Tensor):
        return f"*{NAMES[x.dtype]}"
    if isinstance(x, bool):
        return "i1"
    if isinstance(x, int):
        return "i32" if -(2**31) <= x < 2**31 else "i64"
    return "fp32"


def compiled(kernel, arguments, named, architecture):
    options = {name: named[name] for name in OPTIONS if name in named}
    bound = dict(zip(kernel.arg_names, arguments, strict=False)) | {n: x for n, x in named.items() if n not in OPTIONS}
    constants = {p.name: bound[p.name] for p in kernel.params if p.is_constexpr and p.name in bound}
    signature = {n: "constexpr" if n in constants else type_of(bound[n]) for n in kernel.arg_names if n in bound}
    made = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", architecture, 32), options=options
    )
    ptxas = (knobs.nvidia.ptxas_blackwell if architecture >= 100 else knobs.nvidia.ptxas).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
        told = subprocess.run(
            [ptxas, "-v", f"-arch={name}", file.name, "-o", "/dev/null"], capture_output=True, text=True, check=True
        )
    registers, spilled = (int(re.search(rf"(\d+) {what}", told.stderr)[1]) for what in ("registers", "bytes spill stores"))
    return {"kernel": kernel.__name__, "registers": registers, "spilled": spilled, "shared": made.metadata.shared,
            "constants": {n: x for n, x in constants.items() if isinstance(x, (int, float, bool))}}  # fmt: skip


if __name__ == "__main__":
    architecture, done = int(sys.argv[1]), set()
    for case in sys.argv[2:]:
        launched.clear()
        CASES[case]()
        for kernel, arguments, named in launched:
            key = (kernel.__name__, tuple(map(type_of, arguments)), tuple(named.items()))
            if key not in done:
                done.add(key)
                print(json.dumps({"case": case} | compiled(kernel, arguments, named, architecture)), flush=True)
