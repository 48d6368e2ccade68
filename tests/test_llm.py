"""``LLM``: strings in, objects out that print as text."""

import json

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from sieve_attn import LLM, AetherSparseAttentionConfig, policies
from sieve_attn.llm.loading import encode

PROMPTS = ["import json\n", "def area(radius):\n    return ", "x"]


def tiny_model(layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model as a folder on disk."""
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    ByT5Tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder)


def test_a_string_gives_an_output_that_prints_as_text_and_a_list_gives_a_list(llm):
    one = llm.generate(PROMPTS[0], max_tokens=5)
    assert str(one) == one.text
    assert one.prompt == PROMPTS[0]
    assert len(one.tokens) <= 5
    assert one.finish_reason in ("length", "eos")
    assert one.report is None
    assert one.timings.prefill_seconds > 0
    assert one.timings.tokens_per_second > 0
    assert json.loads(json.dumps(one.to_dict()))["text"] == one.text
    several = llm.generate(PROMPTS, max_tokens=5)
    assert [o.prompt for o in several] == PROMPTS


def test_a_batch_of_different_lengths_gives_what_each_prompt_gives_alone(llm):
    together = llm.generate(PROMPTS, max_tokens=8)
    assert [o.tokens for o in together] == [llm.generate(p, max_tokens=8).tokens for p in PROMPTS]


def test_what_a_sparse_model_keeps_of_a_prompt_does_not_depend_on_the_prompts_beside_it(folder):
    sparse = LLM(folder, policies.TopBlocks(1, sinks=4, window=0))
    prompts = [f"def {name}(x):\n" * 9 + "ab" * n for name, n in (("f", 1), ("g", 9), ("h", 1), ("k", 20))]
    together = sparse.generate(prompts, max_tokens=12, temperature=1.0)
    alone = [sparse.generate(p, max_tokens=12, temperature=1.0) for p in prompts]
    assert [o.tokens for o in together] == [o.tokens for o in alone]
    assert [o.prompt for o in together] == prompts
    # those of one length run together
    assert together[0].timings is together[2].timings is not together[1].timings


def test_greedy_tokens_are_those_of_transformers(llm):
    ids = torch.tensor([encode(llm.tokenizer, PROMPTS[1])])
    theirs = llm.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert llm.generate(PROMPTS[1], max_tokens=8).tokens == theirs.tolist()


def test_one_seed_means_one_text_whatever_runs_beside_it_and_leaves_the_global_generator_alone(llm):
    state = torch.get_rng_state()
    first = llm.generate(PROMPTS[0], max_tokens=8, temperature=1.0, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    assert llm.generate(PROMPTS, max_tokens=8, temperature=1.0, seed=7)[0].tokens == first.tokens
    assert llm.generate(PROMPTS[0], max_tokens=8, temperature=1.0, seed=8).tokens != first.tokens
    a, b = llm.generate([PROMPTS[0]] * 2, max_tokens=8, temperature=1.0, seed=[7, 8])
    assert a.tokens == first.tokens != b.tokens


def test_a_nucleus_of_one_token_is_greedy(llm):
    greedy = llm.generate(PROMPTS[0], max_tokens=6)
    assert llm.generate(PROMPTS[0], max_tokens=6, temperature=1.0, top_p=1e-9).tokens == greedy.tokens


def test_text_is_cut_before_the_stop_string(llm):
    whole = llm.generate(PROMPTS[0], max_tokens=12, temperature=1.0, seed=3)
    stop = next(c for c in whole.text[1:] if c.isprintable())
    cut = llm.generate(PROMPTS[0], max_tokens=12, temperature=1.0, seed=3, stop=["never there", stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"


def test_a_full_context_ends_generation(llm, monkeypatch):
    monkeypatch.setattr(llm.model.config, "max_position_embeddings", 20)
    longer, shorter = llm.generate(["a" * 18, "b" * 5], max_tokens=9)
    assert (len(longer.tokens), longer.finish_reason) == (2, "length")
    assert shorter.tokens == llm.generate("b" * 5, max_tokens=9).tokens


def test_the_end_of_the_text_ends_generation(llm, monkeypatch):
    first = llm.generate(PROMPTS[0], max_tokens=1).tokens[0]
    monkeypatch.setattr(llm.model.generation_config, "eos_token_id", first)
    ended = llm.generate(PROMPTS[0], max_tokens=5)
    assert (ended.finish_reason, ended.tokens, ended.text) == ("eos", [first], "")


def test_keeping_everything_gives_the_dense_tokens_and_a_report(folder, llm):
    config = AetherSparseAttentionConfig(threshold=float("-inf"), min_seq_length=0)
    sparse = LLM(folder, config).generate(PROMPTS, max_tokens=6)
    assert [o.tokens for o in sparse] == [o.tokens for o in llm.generate(PROMPTS, max_tokens=6)]
    assert sparse[0].report.density == pytest.approx(1.0)


def test_a_report_is_about_one_call_and_says_that_short_texts_stay_dense(folder):
    made = LLM(folder, AetherSparseAttentionConfig(target_sparsity=0.5))
    short = made.generate("import json\n", max_tokens=2).report.to_dict()
    assert "min_seq_length" in short["layers"][0]["fallbacks"][0]["reason"]
    long = made.generate("import json\n" * 60, max_tokens=2).report.to_dict()
    assert long["layers"][0]["calls"] == 2
    assert long["layers"][0]["fallbacks"] == []
    assert long["density"] < 1.0
    assert long["layers"][0]["requested_sparsity"] == 0.5


def test_a_loaded_model_and_a_policy_text_work_too():
    made = LLM(tiny_model(), "top_blocks(k=1, sinks=0, window=16)", tokenizer=ByT5Tokenizer())
    assert made.generate("abc " * 40, max_tokens=3).report.density < 1.0


def test_the_embedded_model_writes_python():
    output = LLM().generate("import os\nimport sys\nimport json\nimport ", max_tokens=12)
    assert output.text.isascii()
    assert len(output.tokens) == 12


def test_the_configuration_is_the_published_gate():
    config = AetherSparseAttentionConfig()
    policy = config.to_policy()
    assert (config.block_size, config.threshold, config.local_window, config.min_seq_length) == (64, 0.05, 8, 128)
    assert (policy.block_size, policy.query_tile, policy.min_seq_length) == (64, 64, 128)
    assert policy.scorer.use_variance
    assert policy.scorer.use_concentration
    assert policy.keep.patterns == policies.EventRadar(local_window=8, sink_blocks=1).keep.patterns
    assert AetherSparseAttentionConfig(is_causal=False, sink_blocks=0).to_policy().keep is None
    other = AetherSparseAttentionConfig(policy="certified(error=0.1)", min_seq_length=99).to_policy()
    assert other == policies.parse(repr(other))
    assert (type(other.selector).__name__, other.min_seq_length) == ("Certified", 99)


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"block_size": 48.5}, ValueError, r"`block_size` must be an integer of at least 1; got 48.5; try 16 or 64"),
        ({"threshold": float("nan")}, ValueError, r"`threshold` must be a number and not NaN; got nan"),
        ({"local_window": -1}, ValueError, r"`local_window` must be an integer of at least 0; got -1; in blocks"),
        ({"use_variance": 1}, TypeError, r"`use_variance` must be True or False; got 1; pass a bool"),
        ({"target_sparsity": 1.5}, ValueError, r"`target_sparsity` must lie in \[0, 1\]; got 1.5"),
        ({"recency_decay": 0.0}, ValueError, r"`recency_decay` must lie in \(0, 1\]; got 0.0"),
        ({"recency": "newest"}, ValueError, r"`recency` must be 'additive' or 'legacy'; got 'newest'"),
        ({"min_seq_length": None}, ValueError, r"`min_seq_length` must be an integer of at least 0; got None"),
        ({"policy": 3}, TypeError, r"`policy` must be a Policy or None; got 3"),
        ({"policy": "nothing()"}, ValueError, r"`policy` must be made of known names: .*; got 'nothing'; check the spelling"),
    ],
)
def test_configuration_errors_name_field_rule_value_and_remedy(fields, kind, said):
    with pytest.raises(kind, match=said):
        AetherSparseAttentionConfig(**fields)


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"prompts": ""}, ValueError, r"`prompts` must hold at least one prompt and none that is empty; got ''"),
        ({"prompts": []}, ValueError, r"`prompts` must hold at least one prompt"),
        ({"prompts": ["a", ""]}, ValueError, r"`prompts` must hold at least one prompt"),
        ({"prompts": ["a", "b\ud800"]}, ValueError, r"`prompts` must be valid Unicode; got '\\ud800' at position 1; pass UTF-8"),
        ({"prompts": 5}, TypeError, r"`prompts` must be a string or a list of strings; got int"),
        ({"prompts": [b"a"]}, TypeError, r"`prompts` must be a string or a list of strings; got list"),
        ({"max_tokens": 0}, ValueError, r"`max_tokens` must be an integer of at least 1; got 0; ask for at least one token"),
        ({"temperature": -1}, ValueError, r"`temperature` must be a finite number, 0 or more; got -1"),
        ({"top_p": 0}, ValueError, r"`top_p` must lie in \(0, 1\]; got 0"),
        ({"stop": [""]}, ValueError, r"`stop` must be a string or several, none empty; got \[''\]"),
        (
            {"prompts": "a" * 4096},
            ValueError,
            r"`prompts` must be shorter than the model's context of 4,096 tokens; got 4,096 tok",
        ),
        ({"seed": 2**64}, ValueError, r"`seed` must be an integer of at most 64 bits; got 18446744073709551616"),
        ({"seed": "a"}, ValueError, r"`seed` must be an integer of at most 64 bits; got 'a'"),
        ({"stop": 3}, ValueError, r"`stop` must be a string or several, none empty; got 3"),
        ({"seed": [1, 2]}, ValueError, r"`seed` must be one integer or 1, one a prompt; got \[1, 2\]; try seed=0"),
    ],
)
def test_generate_errors_name_argument_rule_value_and_remedy(llm, arguments, kind, said):
    with pytest.raises(kind, match=said):
        llm.generate(**{"prompts": "a", **arguments})


def test_unreadable_models_and_wrong_types_are_refused(tmp_path):
    with pytest.raises(OSError, match=r"`model` must be a folder with a readable model .*no such folder.*; check the path"):
        LLM(tmp_path / "nothing")
    with pytest.raises(OSError, match=r"`model` must be a folder with a readable model"):
        LLM(tmp_path)
    with pytest.raises(TypeError, match=r"`model` must be 'embedded', a path or a loaded Hugging Face model; got int"):
        LLM(3)
    with pytest.raises(TypeError, match=r"`model` must be a causal language model of Hugging Face; got Linear"):
        LLM(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"`sparse_attention_config` must be an AetherSparseAttentionConfig"):
        LLM(sparse_attention_config=0.5)
    with pytest.raises(ValueError, match=r"`dtype` must be one of float32, .*; got 'int3'; leave it out"):
        LLM(dtype="int3")
    with pytest.raises(ValueError, match=r"`dtype` must be one of float32, .*; got torch.int8; leave it out"):
        LLM(dtype=torch.int8)
    small = LlamaForCausalLM(LlamaConfig(**{**tiny_model().config.to_dict(), "vocab_size": 64})).eval()
    with pytest.raises(ValueError, match=r"`prompts` must have a tokenizer of at most 64 ids, .*; got id 1\d\d; load the tok"):
        LLM(small, tokenizer=ByT5Tokenizer()).generate("xyz")
    with pytest.raises(ValueError, match=r"`backend` must be 'auto' or one of triton, native, reference; got 'abacus'"):
        LLM(backend="abacus")
    with pytest.raises(ValueError, match=r"`tokenizer` must be given with a model that was not loaded from a path"):
        LLM(tiny_model())
    with pytest.raises(TypeError, match=r"`tokenizer` must be a Hugging Face tokenizer or a path; got int"):
        LLM(tiny_model(), tokenizer=3)
