"""Laws of the Hugging Face front-end: dense policies change no token, streams equal recomputation, reports tell the truth."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from streams import assert_recomputed_alike
from torch import nn
from transformers import DynamicCache, StaticCache

from sieve_attn import policies
from sieve_attn.transformers import ModelReport, StreamedLayer, capture, desparsify, report, sparsify

VOCABULARY, LENGTH, PADDING, WINDOW = 61, 75, 17, 24
DENSE = {"threshold": policies.Aether(float("-inf"), block_size=16), "dense": policies.Dense()}
LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"], "block_size": 16}
HYBRID = {"layer_types": ["full_attention", "linear_attention"], "block_size": 16}
SPARSE = policies.TopBlocks(1, sinks=4, window=8, query_stride=1)


def _model(name: str):
    """A random model of two layers; weights are large enough for attention to be far from uniform."""
    import transformers as hf

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    grouped = common | {"num_key_value_heads": 2, "head_dim": 8}
    windowed = grouped | {"sliding_window": WINDOW}
    capped = {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "attn_implementation": "eager"}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    sinks = {"num_local_experts": 4, "rope_parameters": rope, "attn_implementation": "eager"}
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    made = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**grouped)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**grouped)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**windowed)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**windowed, **capped)),
        "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**windowed, **sinks, num_experts_per_tok=2)),
        "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**common)),
        "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**grouped, **experts)),
        "minimax": lambda: hf.MiniMaxForCausalLM(hf.MiniMaxConfig(**grouped, **HYBRID, num_local_experts=4)),
        "minimax, linear first": lambda: hf.MiniMaxForCausalLM(hf.MiniMaxConfig(**grouped, **LINEAR_FIRST, num_local_experts=4)),
        "doge": lambda: hf.DogeForCausalLM(hf.DogeConfig(**grouped)),
    }
    torch.manual_seed(0)
    model = made[name]().eval()
    for what, parameter in model.named_parameters():
        if parameter.ndim > 1 or "sinks" in what:
            nn.init.normal_(parameter, 0.0, 2.0 if "sinks" in what else 0.3)
    return model


@pytest.fixture
def llama():
    return _model("llama")


@pytest.fixture
def prompt():
    """Two prompts in one batch; the first is left-padded."""
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :PADDING], mask[0, :PADDING] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


GENERATE = {
    "greedy, left-padded": {},
    "beam search": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 32},
    "static cache": {"cache_implementation": "static"},
}


def _generate(model, prompt, tokens=4, **options):
    return model.generate(**prompt, max_new_tokens=tokens, do_sample=False, **options)


@torch.no_grad()
def _logits(model, prompt, **options):
    return model(**prompt, **options).logits


def _packed(ids):
    """Two sequences in a row, the first of 40 tokens."""
    position = torch.cat([torch.arange(40), torch.arange(LENGTH - 40)])
    return {"input_ids": ids, "position_ids": position.expand(ids.shape)}


def _step(ids, mask):
    """One more token of every sequence."""
    return {"input_ids": ids[:, :1], "attention_mask": torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)}


def _streams(cache):
    return [layer for layer in cache.layers if isinstance(layer, StreamedLayer) and layer.stream.geometry is not None]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gpt_oss", "gpt_neox", "qwen3_moe"])
def test_dense_policies_give_the_tokens_of_dense_attention(name, prompt):
    model = _model(name)
    expected = {way: _generate(model, prompt, **options) for way, options in GENERATE.items()}
    logits, real = _logits(model, prompt), prompt["attention_mask"].bool()
    for policy in DENSE.values():
        sparsify(model, policy)
        torch.testing.assert_close(_logits(model, prompt)[real], logits[real], rtol=2e-4, atol=2e-4)
        if policy == DENSE["threshold"]:
            for way, options in GENERATE.items():
                assert torch.equal(_generate(model, prompt, **options), expected[way]), way
    assert torch.equal(_generate(model, prompt), expected["greedy, left-padded"])
    desparsify(model)
    assert torch.equal(_logits(model, prompt), logits)


def test_a_window_is_exact_in_a_cache_that_keeps_every_key(prompt):
    model = _model("mistral")
    expected = _generate(model, prompt, past_key_values=DynamicCache())
    sparsify(model, SPARSE)
    assert torch.equal(_generate(model, prompt, past_key_values=DynamicCache()), expected)
    assert all(layer.note == f"dense inside its sliding window of {WINDOW} keys" for layer in report(model).layers)


@pytest.mark.parametrize(("name", "layer"), [("minimax", 0), ("minimax, linear first", 1)])
def test_layers_of_linear_attention_are_left_alone(name, layer, prompt):
    model, ids = _model(name), {"input_ids": prompt["input_ids"][1:], "attention_mask": prompt["attention_mask"][1:]}
    expected = _generate(model, ids, 12)
    for policy in DENSE.values():
        assert torch.equal(_generate(sparsify(model, policy), ids, 12), expected)
        assert [each.layer for each in report(model).layers] == [layer]


def test_a_cache_whose_first_layer_keeps_no_keys_is_read_to_its_end(prompt):
    """The model counts its keys at a layer of linear attention, and so finds none."""
    model = sparsify(_model("minimax, linear first"), DENSE["dense"])
    whole = prompt | {"position_ids": torch.arange(LENGTH).expand(2, -1)}
    expected, cache = _logits(model, whole), None
    for i in range(0, LENGTH, 25):
        part = {name: x if name == "attention_mask" else x[:, i : i + 25] for name, x in whole.items()}
        part["attention_mask"] = part["attention_mask"][:, : i + 25]
        ran = model(**part, past_key_values=cache, use_cache=True)
        cache = ran.past_key_values
        torch.testing.assert_close(ran.logits, expected[:, i : i + 25], rtol=2e-4, atol=2e-4)


def test_packed_sequences_do_not_see_each_other(llama, prompt):
    packed = _packed(prompt["input_ids"][1:])
    expected = _logits(llama, packed, use_cache=False)
    sparsify(llama, DENSE["threshold"])
    torch.testing.assert_close(_logits(llama, packed, use_cache=False), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_the_users_own_is_honoured(llama, prompt, additive):
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[50:, 5:30] = False
    own = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    own = {"input_ids": prompt["input_ids"], "attention_mask": own.expand(2, 1, LENGTH, LENGTH)}
    expected = _logits(llama, own)
    sparsify(llama, DENSE["threshold"])
    torch.testing.assert_close(_logits(llama, own), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("padded", [True, False])
def test_streaming_geometry_equals_recomputation(llama, prompt, padded):
    sparsify(llama, SPARSE)
    if not padded:
        prompt["attention_mask"].fill_(1)
    mask, ids = prompt["attention_mask"], prompt["input_ids"]
    cache = llama(**prompt, use_cache=True).past_key_values

    def go_on(steps, tokens=1):
        nonlocal mask
        for _ in range(steps):
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], tokens)], 1)
            step = {"input_ids": ids[:1, :tokens].expand(mask.shape[0], -1), "attention_mask": mask}
            _logits(llama, step, past_key_values=cache)
        assert len(_streams(cache)) == 2
        for layer in _streams(cache):
            assert_recomputed_alike(layer, mask)

    go_on(0)
    # beyond the keys that set the channel scale of the padded sequence: from here on blocks are sealed
    go_on(1, tokens=40)
    go_on(7)
    cache.crop(-30)
    mask = mask[:, :-30]
    go_on(2, tokens=9)
    cache.reorder_cache(torch.tensor([1, 0]))
    mask = mask[[1, 0]]
    go_on(1)
    cache.batch_repeat_interleave(2)
    mask = mask.repeat_interleave(2, 0)
    cache.crop(-1)
    mask = mask[:, :-1]
    go_on(2)
    cache.batch_select_indices(torch.tensor([2]))
    mask = mask[2:3]
    go_on(1)
    cache.reset()
    mask = mask[:, :0]
    go_on(1, tokens=30)
    assert report(llama).layers[0].geometry == {"stream": sum(report(llama).layers[0].geometry.values())}


def test_speculative_decoding_rolls_the_streams_back(llama, prompt):
    ids = torch.cat([prompt["input_ids"][1:, :30]] * 3, 1)
    expected = _generate(llama, {"input_ids": ids}, tokens=8)
    sparsify(llama, DENSE["threshold"])
    cache = DynamicCache(config=llama.config)
    guessed = _generate(llama, {"input_ids": ids}, tokens=8, prompt_lookup_num_tokens=3, past_key_values=cache)
    assert torch.equal(guessed, expected)
    _logits(llama, {"input_ids": ids[:, :1]}, past_key_values=cache)
    for layer in _streams(cache):
        assert_recomputed_alike(layer)


def test_sealed_blocks_are_summarised_once(llama, prompt, monkeypatch):
    from sieve_attn.geometry import edit
    from sieve_attn.geometry import native as kernels

    sparsify(llama, SPARSE)
    ids = prompt["input_ids"]
    cache = llama(input_ids=ids, use_cache=True).past_key_values
    read = []
    for module, name in ((edit, "build"), (kernels, "extend")):

        def counted(*args, does=getattr(module, name), which=name == "extend", **named):
            read.append(args[which].shape[2])
            return does(*args, **named)

        monkeypatch.setattr(module, name, counted)
    _logits(llama, {"input_ids": ids[:, :1]}, past_key_values=cache)
    assert read == [(LENGTH + 1) % SPARSE.block_size] * 2


def test_nothing_is_summarised_before_something_can_be_left_out(llama):
    ids = torch.randint(3, VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(4))
    whole = _logits(llama, {"input_ids": ids[:, :48]})
    sparsify(llama, policies.TopBlocks(3, sinks=0, window=0, query_stride=1))
    cache = DynamicCache(config=llama.config)
    steps = [_logits(llama, {"input_ids": part}, past_key_values=cache) for part in ids[:, :48].split((40, 7, 1), 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    assert _streams(cache) == []
    assert [(layer.density, layer.geometry) for layer in report(llama).layers] == [(1.0, {})] * 2
    for part in ids[:, 48:].split(1, 1):
        _logits(llama, {"input_ids": part}, past_key_values=cache)
    assert len(_streams(cache)) == 2
    for layer in _streams(cache):
        assert_recomputed_alike(layer, torch.ones(1, 60, dtype=torch.long))
    assert [layer.geometry for layer in report(llama).layers] == [{"stream": 12}] * 2
    assert report(llama).layers[0].density < 1.0


def test_gradients_flow_through_the_cache(llama):
    sparsify(llama, policies.Aether(-torch.inf))
    ids = torch.arange(40)[None] % 30 + 3
    try:
        whole = llama(ids, use_cache=False).logits[0, -1]
        expected = torch.autograd.grad(whole.square().sum(), list(llama.parameters()), allow_unused=True)
        half = llama(ids[:, :30], use_cache=True)
        rest = llama(ids[:, 30:], past_key_values=half.past_key_values, use_cache=True).logits[0, -1]
        found = torch.autograd.grad(rest.square().sum(), list(llama.parameters()), allow_unused=True)
    finally:
        desparsify(llama)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_training_step_under_checkpointing_has_the_gradients_of_dense_attention(name, prompt):
    ids, losses, grads = prompt["input_ids"][1:], [], []
    for policy in (None, DENSE["threshold"]):
        model = _model(name).train()
        model.config.output_router_logits = False
        if policy is not None:
            sparsify(model, policy)
            model.activation_checkpointing_enable()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0])
    assert grads[0].keys() == grads[1].keys()
    for n, grad in grads[0].items():
        torch.testing.assert_close(grads[1][n], grad, rtol=1e-3, atol=1e-5 + 1e-4 * float(grad.abs().max()), msg=n)


def test_padding_that_changes_afterwards_makes_the_stream_start_anew(llama, prompt):
    sparsify(llama, SPARSE)
    cache = llama(input_ids=prompt["input_ids"], use_cache=True).past_key_values
    mask = torch.ones(2, LENGTH + 1, dtype=torch.int64)
    mask[1, :3] = 0
    _logits(llama, {"input_ids": prompt["input_ids"][:, :1], "attention_mask": mask}, past_key_values=cache)
    for layer in _streams(cache):
        assert_recomputed_alike(layer, mask)


def test_a_stream_made_in_inference_mode_lives_on_outside(llama, prompt):
    sparsify(llama, SPARSE)
    with torch.inference_mode():
        cache = llama(**prompt, use_cache=True).past_key_values
    step = _step(*prompt.values())
    _logits(llama, step, past_key_values=cache)
    assert_recomputed_alike(_streams(cache)[0], step["attention_mask"])


WITHOUT = {
    "filled": "the cache was filled before it met this model",
    "static": "a cache layer of type StaticLayer holds no geometry",
}


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_cache_without_geometry_decodes_alike_and_the_report_says_so(llama, prompt, kind):
    sparsify(llama, SPARSE)
    streamed = llama(**prompt, use_cache=True).past_key_values
    plain = StaticCache(llama.config, max_cache_len=128) if kind == "static" else DynamicCache(config=llama.config)
    for mine, theirs in zip(plain.layers, streamed.layers, strict=True):
        mine.update(theirs.keys, theirs.values)
    report(llama, reset=True)
    logits = [_logits(llama, _step(*prompt.values()), past_key_values=cache) for cache in (streamed, plain)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert report(llama).layers[0].geometry == {"stream": 1, f"recomputed: {WITHOUT[kind]}": 1}


def test_prefill_in_chunks_of_whole_tiles_chooses_what_one_prefill_chooses(llama):
    ids = torch.randint(3, VOCABULARY, (1, 150), generator=torch.Generator().manual_seed(2))
    sparsify(llama, SPARSE)
    whole = _logits(llama, {"input_ids": ids})
    cache = DynamicCache(config=llama.config)
    chunks = [_logits(llama, {"input_ids": part}, past_key_values=cache) for part in ids.split(64, 1)]
    torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=1e-4, atol=1e-4)


def test_certificates_cover_the_true_dropped_mass(llama, prompt):
    sparsify(llama, SPARSE)
    with capture(llama, truth=True) as records:
        _generate(llama, prompt, tokens=3)
    assert [(r.layer, r.phase, r.q_len, r.kv_len) for r in records[:3]] == [
        (0, "prefill", LENGTH, LENGTH), (1, "prefill", LENGTH, LENGTH), (0, "decode", 1, LENGTH + 1)]  # fmt: skip
    assert len(records) == 6
    for record in records:
        assert (record.certificate.dropped_mass >= record.true_dropped_mass - 1e-6).all()
        assert (record.certificate.output_error >= record.output_error - 1e-5).all()
        assert record.report.certificate is record.certificate
        assert record.report.selection is not None
        assert record.report.geometry_from == "stream"
    assert any(record.true_dropped_mass.max() > 1e-3 for record in records)


def test_capture_is_opt_in_and_keeps_only_what_was_asked_for(llama, prompt):
    sparsify(llama, SPARSE)
    with capture(llama, certificates=False, keep_selection=False) as records:
        _logits(llama, prompt)
    _logits(llama, prompt)
    assert len(records) == 2
    for record in records:
        assert record.certificate is record.true_dropped_mass is record.output_error is record.report.selection is None
    assert report(llama).certified_dropped_mass is None


def test_the_report_has_every_field(prompt):
    model = sparsify(_model("gemma2"), "Policy(KeySketch(4), TargetSparsity(0.6), min_seq_length=70)")
    _logits(model, {name: part[:, :20] for name, part in prompt.items()})
    with capture(model):
        _generate(model, prompt, tokens=2)
    made = report(model)
    assert isinstance(made, ModelReport)
    windowed, choosing = made.layers
    assert windowed.note == f"dense inside its sliding window of {WINDOW} keys"
    assert windowed.density == 1.0
    assert windowed.backend.startswith(("reference", "native", "triton"))
    assert choosing.phases.keys() == {"prefill", "decode"}
    assert choosing.requested_sparsity == 0.6
    assert 0 < choosing.density < 1
    assert choosing.achieved_sparsity == 1 - choosing.density
    assert len(choosing.density_per_head) == len(choosing.certified_per_head) == 4
    assert 0 < choosing.gate_overhead < 1
    assert choosing.geometry == {"stream": 2}
    assert choosing.fallbacks == [{"reason": "fewer keys than min_seq_length 70", "count": 8}]
    mass = choosing.certified_dropped_mass
    assert 0 <= mass["p50"] <= mass["p99"] <= mass["max"] <= 1
    assert mass["max"] == made.certified_dropped_mass
    assert json.loads(json.dumps(made.to_dict()))["layers"][1]["layer"] == 1
    for text in ("KeySketch", "60.0% requested", "dense inside its sliding window", "turned dense 8 times", "geometry stream"):
        assert text in str(made)
    assert report(model, reset=True).layers[1].calls
    assert report(model).layers[1].calls == 0


def test_a_second_policy_replaces_the_first_and_desparsify_restores_bit_for_bit(llama, prompt):
    before, implementation = _logits(llama, prompt), llama.config._attn_implementation
    sparsify(llama, SPARSE)
    sparse = _logits(llama, prompt)
    assert not torch.allclose(sparse, before)
    sparsify(llama, "windowed(sinks=2, window=3)")
    assert report(llama).policy == repr(policies.Windowed(sinks=2, window=3))
    assert not torch.allclose(_logits(llama, prompt), sparse)
    assert report(llama).density < 0.2
    twin = copy.deepcopy(llama)
    assert desparsify(llama) is llama
    assert llama.config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks for module in llama.modules())
    assert torch.equal(_logits(llama, prompt), before)
    assert desparsify(llama) is llama
    assert not torch.allclose(_logits(twin, prompt), before)
    assert torch.equal(_logits(desparsify(twin), prompt), before)


def test_models_that_share_a_configuration_stay_apart(llama, prompt):
    twin = type(llama)(shared := llama.config).eval()
    before = [_logits(model, prompt) for model in (llama, twin)]
    sparsify(llama, SPARSE)
    assert torch.equal(_logits(twin, prompt), before[1])
    sparse = _logits(sparsify(twin, SPARSE), prompt)
    desparsify(llama)
    assert torch.equal(_logits(twin, prompt), sparse)
    assert torch.equal(_logits(llama, prompt), before[0])
    assert torch.equal(_logits(desparsify(twin), prompt), before[1])
    assert shared._attn_implementation == "sdpa"
    twin = type(llama)(sparsify(llama, SPARSE).config)
    assert "must not have the configuration of a sparse model" in _refused(ValueError, lambda: sparsify(twin, SPARSE))
    assert "a model made from a sparse one's config needs one of its own" in _refused(ValueError, lambda: _logits(twin, prompt))


def test_a_configuration_object_is_turned_into_its_policy(llama):
    class Config:
        def to_policy(self):
            return SPARSE

    assert report(sparsify(llama, Config())).policy == repr(SPARSE)


def _refused(kind, call):
    with pytest.raises(kind) as raised:
        call()
    return str(raised.value)


def test_bad_input_is_refused_with_its_remedy(llama, prompt):
    from transformers import BertConfig, BertModel, BloomConfig, BloomForCausalLM, T5Config, T5ForConditionalGeneration

    bloom = BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2))
    bert = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert "must be a transformers PreTrainedModel; got Linear" in _refused(TypeError, lambda: sparsify(nn.Linear(2, 2), SPARSE))
    assert "attention interface of transformers; got BloomForCausalLM" in _refused(ValueError, lambda: sparsify(bloom, SPARSE))
    assert "must be decoder-only; got T5ForConditionalGeneration" in _refused(ValueError, lambda: sparsify(t5, SPARSE))
    assert "must have causal attention; got BertModel; leave encoders" in _refused(ValueError, lambda: sparsify(bert, SPARSE))
    assert "`config_or_policy` must be a Policy" in _refused(TypeError, lambda: sparsify(llama, 3))
    assert "`backend` must be 'auto' or one of" in _refused(ValueError, lambda: sparsify(llama, SPARSE, backend="cuda"))
    assert "call sieve_attn.sparsify(model, policy) first" in _refused(ValueError, lambda: report(llama))
    assert "must have been made sparse; got LlamaForCausalLM" in _refused(ValueError, lambda: capture(llama).__enter__())

    sparsify(llama, SPARSE)
    assert "`output_attentions` must be off" in _refused(ValueError, lambda: _logits(llama, prompt, output_attentions=True))
    assert "got bidirectional_mask_function" in _refused(ValueError, lambda: _logits(llama, prompt, is_causal=False))
    assert "`position_bias` is not understood by sparse attention; got Tensor" in _refused(
        ValueError, lambda: _logits(llama, prompt, position_bias=torch.zeros(1)))  # fmt: skip
    packed = _packed(prompt["input_ids"])
    assert "may pack sequences in a batch of one" in _refused(ValueError, lambda: _logits(llama, packed, use_cache=False))
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.1
    llama.train()
    assert "`dropout` must be 0 in a sparse model; got 0.1" in _refused(ValueError, lambda: _logits(llama, prompt))
    llama.eval().model.layers[1].self_attn.is_causal = False
    assert "`is_causal` must be True; got False" in _refused(ValueError, lambda: _logits(llama, prompt))


def test_a_model_that_makes_a_mask_of_its_own_is_refused(prompt):
    sparsify(model := _model("doge"), DENSE["dense"])
    assert "as the model made it; got what the attention module rewrote; leave this model dense" in _refused(
        ValueError, lambda: _logits(model, prompt))  # fmt: skip


def test_masks_that_are_not_understood_are_refused():
    from transformers import masking_utils as hf

    from sieve_attn.transformers.masks import mask_function

    other = {
        "chunked_overlay": hf.chunked_causal_mask_function(4, torch.zeros(1)),
        "or_masks": hf.or_masks(hf.causal_mask_function, hf.bidirectional_mask_function),
        "bidirectional_mask_function": hf.bidirectional_mask_function,
    }
    for name, function in other.items():
        message = _refused(ValueError, lambda function=function: mask_function(1, 4, 4, mask_function=function))
        assert f"got {name}; leave this model dense" in message
