"""What the JAX front-end refuses, in its own words and before any work; and that nothing imports JAX unasked."""

import re
import subprocess
import sys
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_inputs import arrays, far_apart

import sieve_attn
import sieve_attn.jax as sj
from sieve_attn import policies as P
from sieve_attn import scores, selection
from sieve_attn.certify import key_meter
from sieve_attn.jax.backends import everything
from sieve_attn.patterns import Pattern
from sieve_attn.types import Blocks, Call, Offsets, Ranges, Selection, Tokens

QUERY, KEY, VALUE = arrays(16, 32)
TOP = P.TopBlocks(1)


def python(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_jax_is_imported_by_its_front_end_alone():
    assert python("import sieve_attn, sys; from sieve_attn import policies, pipeline; print('jax' in sys.modules)") == "False\n"
    # any call may be a process's first: each finds its kernels
    first = "sieve_attn.jax.geometry(numpy.ones((1, 1, 32, 8), 'float32'), sieve_attn.policies.TopBlocks(1))"
    assert python(f"import numpy, sieve_attn.jax, sys; {first}; print('torch' in sys.modules)") == "False\n"


@pytest.mark.parametrize("way", ["import sieve_attn.jax", "import sieve_attn; sieve_attn.jax"])
def test_missing_jax_says_how_to_install_it(way):
    program = "import importlib.util as u, sys; sys.modules['jax'] = None; find = u.find_spec\n"
    program += "u.find_spec = lambda name, *rest: None if name == 'jax' else find(name, *rest)\n"
    program += f"try: {way.replace(';', chr(10) + '   ')}\nexcept ModuleNotFoundError as e: print(e)"
    program = program.replace("try: import sieve_attn\n", "try:\n    import sieve_attn\n")
    assert "`sieve_attn.jax` needs jax, which is not installed; install it with `pip install 'sieve-attn[jax]'`" in python(
        program
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": np.asarray(QUERY, np.float64)}, "`query` must not be float64 while jax_enable_x64 is off"),
        ({"key": KEY.astype(np.float16)}, "`query, key, value` must share one dtype; got float32, float16, float32"),
        ({"query": QUERY[0]}, r"`query` must have 4 axes \[batch, heads, len, head_dim\]"),
        ({"query": QUERY[:, :3]}, "`query` must have a multiple of the KV heads of `key`; got 3 query heads on 2 KV heads"),
        ({"scale": -1.0}, "`scale` must be a positive finite number; got -1.0"),
        ({"mask": np.ones((1, 1, 16, 32), np.int32)}, "`mask` must be boolean"),
        ({"mask": np.ones((1, 1, 8, 32), bool)}, r"`mask` must have shape \[2 or 1, 4 or 1, 16, 32\]"),
        ({"cu_seqlens": np.array([0.0, 32.0], np.float32)}, "`cu_seqlens` must be one axis of integers; got float32"),
        ({"backend": "triton"}, "`backend` must be 'auto' or one of native, gather, pallas, reference; got 'triton'"),
        ({"max_blocks": 0}, "`max_blocks` must be an integer of at least 1; got 0"),
        ({"window": 0}, "`window` must be an integer of at least 1; got 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_wrong_arguments_are_named(options, message):
    given = {"query": QUERY, "key": KEY, "value": VALUE, "policy": TOP} | options
    with pytest.raises(ValueError, match=message):
        sj.attention(**given)


def test_arrays_of_other_frameworks_are_refused():
    with pytest.raises(TypeError, match=r"`key` must be an array of JAX or NumPy; got Tensor"):
        sj.attention(QUERY, torch.from_numpy(KEY), VALUE)
    with pytest.raises(TypeError, match=r"`value` must be an array; got None"):
        sj.attention(QUERY, KEY, None)


def test_double_precision_runs_where_it_is_enabled():
    program = (
        "import jax, numpy as np; jax.config.update('jax_enable_x64', True); import sieve_attn.jax as sj\n"
        "from sieve_attn import policies as P; x = np.random.default_rng(0).standard_normal((1, 1, 32, 8))\n"
        "o, r = sj.attention(x, x, x, P.TopBlocks(1), causal=True, return_report=True)\n"
        "print(o.dtype, r.backend, r.why_backend)\n"
        "try: sj.attention(x, x.astype(np.float32), x)\n"
        "except ValueError as e: print(e)"
    )
    told = python(program)
    assert told.startswith("float64 gather native: kernels know float32, float16, bfloat16, not float64")
    assert "`query, key, value` must share one dtype; got float64, float32, float64" in told


def test_what_must_be_static_says_so():
    program = "import jax; from sieve_attn import policies as P\n"
    program += "try: jax.jit(lambda t: P.Aether(t))(1.0)\nexcept ValueError as e: print(e)"
    assert "`threshold` must be a number and not NaN; got JitTracer" in python(program)
    with pytest.raises(ValueError, match=r"`block_size` must be an integer of at least 1, known when the call is traced"):
        jax.jit(lambda n: sj.attention(QUERY, KEY, VALUE, P.Aether(1.0, n)))(16)
    with pytest.raises(ValueError, match=r"`max_blocks` must be an integer of at least 1, known when the call is traced"):
        jax.jit(lambda n: sj.attention(QUERY, KEY, VALUE, TOP, max_blocks=n))(2)
    with pytest.raises(ValueError, match=r"`scale` must be a Python number, known when the call is traced; got a JAX array"):
        jax.jit(lambda s: sj.attention(QUERY, KEY, VALUE, TOP, scale=s))(0.5)
    with pytest.raises(ValueError, match=r"`causal` must be a Python number, known when the call is traced"):
        jax.jit(lambda c: sj.attention(QUERY, KEY, VALUE, TOP, causal=c))(True)
    with pytest.raises(TypeError, match=r"`policy` must be a Policy or None; got "):
        jax.jit(lambda p: sj.attention(QUERY, KEY, VALUE, p))(1.0)


def test_unsupported_platforms_are_named(monkeypatch):
    from sieve_attn.jax import call

    monkeypatch.setattr(call, "platform", lambda x: "tpu")
    with pytest.raises(ValueError, match=r"`backend` cannot run this call: kernels run on cpu, not on tpu; got 'native'"):
        sj.attention(QUERY, KEY, VALUE, backend="native")
    with pytest.raises(ValueError, match=r"`backend` cannot run this call: kernels run on cpu, not on tpu"):
        sj.top_k_attention(QUERY, KEY, VALUE, 2, backend="native")
    report = sj.attention(QUERY, KEY, VALUE, return_report=True)[1]
    assert (report.backend, report.why_backend) == ("gather", "native: kernels run on cpu, not on tpu")


@dataclass(frozen=True)
class OfSomebodyElse(Pattern):
    def keeps(self, position, key):
        return key % 2 == position % 2


def test_policies_that_cannot_be_traced_are_refused():
    forced = P.Policy(scores.KeySketch(), selection.TopK(1), OfSomebodyElse())
    with pytest.raises(ValueError, match=r"`policy` must force Sinks, Window, offsets and RandomBlocks only .* OfSomebody"):
        sj.attention(QUERY, KEY, VALUE, forced)
    with pytest.raises(ValueError, match=r"`policy` must have a scorer and a selector to choose blocks"):
        sj.select(QUERY, KEY, P.Windowed(1, 8))


def test_geometries_and_selections_of_other_calls_are_refused():
    other = sj.geometry(KEY[:, :, :16], TOP)
    with pytest.raises(ValueError, match=r"`geometry` must be built over this call's keys"):
        sj.attention(QUERY, KEY, VALUE, TOP, geometry=other)
    with pytest.raises(ValueError, match=r"`geometry` must hold what the policy asks for"):
        jax.jit(lambda k: sj.attention(QUERY, k, VALUE, TOP, geometry=sj.geometry(k, block_size=16)))(KEY)
    with pytest.raises(TypeError, match=r"`geometry` must be a Geometry; got dict"):
        sj.attention(QUERY, KEY, VALUE, TOP, geometry={})
    chosen = sj.select(QUERY, KEY, TOP)
    with pytest.raises(ValueError, match=r"`selection` must be made for this call's lengths"):
        sj.attend(QUERY[:, :, :8], KEY, VALUE, chosen)
    with pytest.raises(ValueError, match=r"`selection` must have batch 1 or 1 and heads 1, 2 or 4; got batch 2, heads 2"):
        sj.attend(QUERY[:1], KEY[:1], VALUE[:1], chosen)
    torn = sj.PaddedBlocks(chosen.counts[:, :, :0], chosen.indices, 16, 32, 64, 16)
    with pytest.raises(ValueError, match=r"`selection` must have counts \[batch, heads, 1\] and indices of that shape"):
        sj.attend(QUERY, KEY, VALUE, torn)
    with pytest.raises(ValueError, match=r"`selection.kv_block` must be an integer of at least 1; got 0"):
        sj.attend(QUERY, KEY, VALUE, sj.PaddedBlocks(chosen.counts, chosen.indices, 16, 32, 64, 0))
    with pytest.raises(TypeError, match=r"`selection` must be a PaddedBlocks or a Selection; got list"):
        sj.attend(QUERY, KEY, VALUE, [])
    with pytest.raises(ValueError, match=r"`selection` must have rows of the shape of indices times q_block; got shape \(2, 2\)"):
        sj.attend(QUERY, KEY, VALUE, replace(chosen, rows=jnp.zeros((2, 2), bool)))
    tokens, ranges = Tokens(jnp.zeros((2, 4, 16, 1), jnp.int32), 32), Ranges(16, 32, prefix=3)
    blocks = Blocks.from_tiles(np.ones((1, 1, 1, 2), bool), q_len=16, kv_len=32, q_block=64, kv_block=16)
    for parts, got, remedy in (
        ((tokens,), "Tokens", "use sieve_attn.jax.top_k_attention"),
        ((tokens, ranges), "Tokens, Ranges", "use sieve_attn.jax.top_k_attention"),
        ((ranges, ranges), "Ranges, Ranges", "join parts of one kind by `|`"),
        ((blocks, blocks), "Blocks, Blocks", "join parts of one kind by `|`"),
        ((blocks, ranges), "Blocks, Ranges", "join parts of one kind by `|`"),
        ((blocks, Offsets(16, 32, (2, 9))), "Blocks, Offsets", "join parts of one kind by `|`"),
    ):
        told = re.escape(f"`selection` must be made of Blocks, or of Ranges and Offsets, one of each; got {got}; {remedy}")
        with pytest.raises(ValueError, match=told):
            sj.attend(QUERY, KEY, VALUE, Selection(parts))
    with pytest.raises(ValueError, match=r"`policy` must be given, or block_size and statistics instead"):
        sj.geometry(KEY)


def test_a_meter_without_double_precision_is_refused():
    call = Call(*(jnp.asarray(x) for x in (QUERY, KEY, VALUE)))
    with pytest.raises(ValueError, match=r"`key_meter` must sum in float64, which jax_enable_x64 allows; got arrays of JAX"):
        key_meter(call, everything(call), sj.geometry(KEY, TOP), jnp.zeros((2, 4, 16)))


def test_blocks_outside_of_the_keys_are_refused_when_the_call_runs():
    wrong = sj.PaddedBlocks(jnp.ones((1, 1, 1), jnp.int32), jnp.full((1, 1, 1, 1), 7, jnp.int32), 16, 32, 64, 16)
    with pytest.raises(
        Exception, match=r"`selection` must list the blocks of every tile in increasing order, each below 2; got others"
    ):
        jax.block_until_ready(sj.attend(QUERY, KEY, VALUE, wrong))


def test_the_plain_pipeline_takes_known_arrays_and_sends_tracers_here():
    plain, report = sieve_attn.attention(*(jnp.asarray(x) for x in (QUERY, KEY, VALUE)), return_report=True)
    assert report.backend == "reference"
    assert "native: arrays of JAX go to kernels through sieve_attn.jax" in report.why_backend
    assert far_apart(plain, sj.attention(QUERY, KEY, VALUE)) < 2e-6
    with pytest.raises(ValueError, match=r"arrays of JAX go to kernels through sieve_attn.jax"):
        sieve_attn.attention(*(jnp.asarray(x) for x in (QUERY, KEY, VALUE)), backend="native")
    with pytest.raises(TypeError, match=r"`query` must be a concrete array here; got a JAX tracer; use sieve_attn.jax.attention"):
        jax.jit(lambda q: sieve_attn.attention(q, jnp.asarray(KEY), jnp.asarray(VALUE)))(QUERY)
