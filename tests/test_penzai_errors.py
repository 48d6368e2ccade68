"""What the Penzai front-end refuses, and in which words."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from penzai import pz
from penzai_models import attention_of, build, sparse, tokens

from sieve_attn.penzai import AttentionAxes, CausalMask, GeometricSparseAttention, capture_masks, kv_caching, show_masks

read = GeometricSparseAttention.from_attention


def changed(*layers, after=1):
    """A Llama attention with ``layers`` put behind the first ``after`` sublayers of ``query_key_to_attn``."""
    attn = attention_of(build("llama"))
    old = attn.query_key_to_attn.sublayers
    return dataclasses.replace(attn, query_key_to_attn=pz.nn.Sequential([*old[:after], *layers, *old[after:]]))


@pz.pytree_dataclass
class AlibiBias(pz.nn.Layer):
    def __call__(self, x, **_):
        return x


UNREADABLE = [
    (AlibiBias(), 1, r"`query_key_to_attn` may hold ConstantRescale.*got \w+ layer AlibiBias; keep pz.nn.Attention there"),
    (pz.nn.Elementwise(jnp.tanh), 1, "got penzai layer Elementwise"),
    (pz.nn.TanhSoftCap(5.0), 2, "got penzai layer TanhSoftCap"),
    (pz.nn.ConstantRescale(2.0), 2, "got penzai layer ConstantRescale"),
    (pz.nn.ConstantRescale(-1.0), 1, "`ConstantRescale.by` must be a positive finite number; got -1.0"),
    (pz.nn.TanhSoftCap(jnp.ones(3)), 1, r"`TanhSoftCap.soft_cap` must be one number; got an array of shape \(3,\)"),
    (pz.nn.Elementwise(jnp.tanh), 3, r"must end with pz.nn.Softmax\('kv_seq'\); got penzai layer Elementwise"),
    (pz.nn.Elementwise(jnp.tanh), 0, "must start with the pz.nn.NamedEinsum of queries and keys; got penzai layer Elementwise"),
    (pz.nn.ApplyCausalAttentionMask(-1e9, seq_axis="time"), 1, "must mask the axes 'seq' and 'kv_seq'; got 'time' and 'kv_seq'"),
    (pz.nn.ApplyCausalSlidingWindowAttentionMask(-1e9, 0), 1, "`sliding_window_size` must be a positive integer; got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "after", "text"), UNREADABLE, ids=lambda x: type(x).__name__)
def test_a_layer_that_cannot_be_understood_is_refused_by_name(layer, after, text):
    at = {3: 3}.get(after, after)
    with pytest.raises(ValueError, match=text):
        read(changed(layer, after=at))


def test_contractions_that_are_no_attention():
    attn = attention_of(build("llama"))
    odd = pz.nn.NamedEinsum((("seq", "projection"), ("seq", "projection")), ("projection",))
    with pytest.raises(ValueError, match="`query_key_to_attn` must contract one axis of queries and keys and keep all others"):
        read(dataclasses.replace(attn, query_key_to_attn=pz.nn.Sequential([odd, *attn.query_key_to_attn.sublayers[1:]])))
    with pytest.raises(ValueError, match=r"`attn_value_to_output` must start with the pz.nn.NamedEinsum of attention weights"):
        read(dataclasses.replace(attn, attn_value_to_output=pz.nn.Identity()))
    with pytest.raises(TypeError, match=r"`attn` must be a pz.nn.Attention; got Sequential; select with .at_instances_of"):
        read(attn.query_key_to_attn)


def test_surgery_inside_of_jit():
    attn = pz.freeze_params(changed(pz.nn.TanhSoftCap(jnp.float32(5.0))))
    with pytest.raises(ValueError, match=r"`TanhSoftCap.soft_cap` must be a concrete number while layers are replaced"):
        jax.jit(lambda attn: read(attn).scale)(attn)


def test_sizes_and_thresholds_are_static():
    attn = attention_of(build("llama"))
    for given, text in [
        ({"block_size": 48.5}, "`block_size` must be an integer of at least 1; got 48.5; try 48 or 64"),
        ({"block_size": 0}, "`block_size` must be an integer of at least 1; got 0"),
        ({"threshold": float("nan")}, "`threshold` must be a number and not NaN"),
        ({"policy": "adaptive(mass=2.0)"}, r"`mass` must lie in"),
        (
            {"policy": "adaptive(mass=0.9)", "block_size": 8},
            "`policy` holds blocks and thresholds itself; got `block_size` besides",
        ),
        ({"max_blocks": 0}, "`max_blocks` must be an integer of at least 1"),
    ]:
        with pytest.raises(ValueError, match=text):
            read(attn, **given)
    with pytest.raises(TypeError, match="`policy` must be the text of a policy; got 7"):
        read(attn, policy=7)
    for name in ("block_size", "threshold"):
        with pytest.raises(ValueError, match=f"`{name}` must be static: it fixes shapes and the program; got .*static_argnums"):
            jax.jit(lambda n, name=name: read(attn, **{name: n}).block_size)(8)
    with pytest.raises(ValueError, match="`backend` must be 'auto' or one of"):
        sparse(build("llama"), backend="cuda")(tokens(8))


def named(**axes):
    return pz.nx.wrap(jnp.ones(tuple(axes.values())), *axes)


GOOD = {
    "query": {"head_groups": 2, "query_heads": 2, "seq": 4, "projection": 8},
    "key": {"head_groups": 2, "seq": 4, "projection": 8},
    "value": {"head_groups": 2, "seq": 4, "projection": 8},
}
AXES = [
    (
        {"key": {"seq": 4, "projection": 8}},
        r"`key` must have the named axes .*'head_groups'.*\['head_groups'\] missing: tag them",
    ),
    ({"query": GOOD["query"] | {"beam": 3}}, r"`key` must have the batch axes of `query`, \{'beam': 3\}.*got \{\}"),
    ({"key": GOOD["key"] | {"query_heads": 2}}, r"none of its own heads; got \{'query_heads': 2\}"),
    (
        {"key": GOOD["key"] | {"projection": 4}},
        r"must agree on the sizes of the axes that they share; got \{'projection': \(8, 4\)\}",
    ),
    ({"value": GOOD["value"] | {"seq": 5}}, r"got \{'seq of key and value': \(4, 5\)\}"),
]


@pytest.mark.parametrize(("wrong", "text"), AXES)
def test_axes_that_do_not_fit(wrong, text):
    layer = read(attention_of(build("llama")))
    with pytest.raises(ValueError, match=text):
        layer.attend(*(named(**axes) for axes in (GOOD | wrong).values()))


def test_arrays_without_names_and_masks_with_strange_ones():
    layer = read(attention_of(build("llama")))
    query, key, value = (named(**axes) for axes in GOOD.values())
    with pytest.raises(ValueError, match=r"`query` must be a NamedArray; got ArrayImpl; wrap it: pz.nx.wrap\(x, 'head_groups'"):
        layer.attend(jnp.ones((2, 2, 4, 8)), key, value)
    with pytest.raises(ValueError, match=r"`query` must have named axes only; got positional axes of shape \(4,\); tag them"):
        layer.attend(query.untag("seq"), key, value)
    with pytest.raises(ValueError, match=r"`mask` may have the named axes .*; got unknown axes \['time'\]; rename or slice"):
        layer.attend(query, key, value, named(time=4, kv_seq=4) > 0)
    with pytest.raises(ValueError, match=r"`mask` must have axes of the sizes .*; got \{'kv_seq': 5\}; build it for this input"):
        layer.attend(query, key, value, named(seq=4, kv_seq=5) > 0)


def test_side_inputs_that_are_missing_or_short():
    layer = read(attention_of(build("llama")))
    x = named(seq=4, embedding=32)
    positions = {"token_positions": pz.nx.arange("seq", 4)}
    other = dataclasses.replace(layer, masks=(CausalMask("places", "places"),))
    with pytest.raises(
        ValueError, match=r"side input 'places'` must be given to a layer whose mask reads it; got side inputs \['tok"
    ):
        other(x, **positions)
    with pytest.raises(ValueError, match="side input 'places'` must have length 4 along 'seq'; got 3; give one position a token"):
        other(x, places=pz.nx.arange("seq", 3), **positions)


def test_views_of_models_that_have_nothing_to_show_or_a_state():
    with pytest.raises(ValueError, match=r"`model` must hold GeometricSparseAttention layers; got TransformerLM; put them in"):
        show_masks(build("llama"), tokens(8))
    with pytest.raises(ValueError, match="`model` must hold no state, which running it would change; got KVCachingTransformerLM"):
        show_masks(kv_caching(capture_masks(sparse(build("llama"))), 16, {}), tokens(8))


def test_axes_without_a_reading():
    attn = attention_of(build("gpt_neox"))
    parts = (attn.input_to_query, attn.input_to_key, attn.input_to_value)
    made = GeometricSparseAttention(*parts, attn.attn_value_to_output)
    assert made.named_axes() == AttentionAxes(common_heads=("heads",))
    odd = pz.nn.NamedEinsum((("seq", "kv_seq"), ("kv_seq", "projection")), ("seq", "projection"))
    with pytest.raises(ValueError, match="`query_key_to_attn` must name the axes of queries and keys alike"):
        GeometricSparseAttention(*parts, odd).named_axes()


@pytest.mark.parametrize(("missing", "module"), [("penzai", "penzai"), ("treescope", "penzai"), ("jax", "penzai"),
                                                 ("flax", "flax"), ("jax", "flax")])  # fmt: skip
@pytest.mark.parametrize("how", ["import sieve_attn.{}", "import sieve_attn; sieve_attn.{}"])
def test_a_missing_package_is_named_with_its_remedy(missing, module, how):
    program = f"import sys; sys.modules[{missing!r}] = None\ntry: {how.format(module)}\nexcept ModuleNotFoundError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    wanted = (
        f"`sieve_attn.{module}` needs {missing}, which is not installed; install it with `pip install 'sieve-attn[{module}]'`"
    )
    assert done.stdout.strip() == wanted, done.stderr


def test_importing_the_package_imports_neither():
    program = "import sieve_attn, sys; sieve_attn.policies; print(*(m for m in ('penzai', 'flax', 'jax') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == ""
