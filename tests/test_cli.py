"""The command line: every command runs, ``--json`` is one document, errors are one readable line and exit code 2."""

import json
import os
import subprocess
import sys

import pytest
import torch
from command_line import sieve
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from sieve_attn import __version__, dispatch
from sieve_attn.cli.options import LEAST_DEMO_BYTES, demo_prompt
from sieve_attn.evaluation.tasks import HELD_OUT

TEXT = "import json\n\n\ndef area(radius):\n    return 3 * radius * radius\n" * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    ByT5Tokenizer().save_pretrained(path)
    return str(path)


def test_generate_prints_the_text_alone_on_stdout_and_the_rest_on_stderr(folder):
    dense = sieve("generate", "--model", folder, "--prompt", TEXT, "--max-tokens", 4)
    assert dense.exit_code == 0
    assert "tokens/s" in dense.stderr
    assert "tokens/s" not in dense.stdout
    sparse = sieve("generate", "--model", folder, "--prompt", TEXT, "--max-tokens", 4, "--max-error", 0.5, "--compare-baseline")
    assert "Certified(error=0.5)" in sparse.stderr
    assert "dense: prefill" in sparse.stderr


def test_generate_json_is_one_document(folder):
    flags = ["--model", folder, "--prompt", TEXT, "--max-tokens", 4, "--json"]
    found = json.loads(sieve("generate", *flags, "--policy", "top_blocks(k=1)", "--compare-baseline").stdout)
    assert len(found["tokens"]) <= 4
    assert found["report"]["density"] < 1.0
    assert found["baseline"]["report"] is None
    sampled = [json.loads(sieve("generate", *flags, "--temperature", 1, "--seed", seed).stdout)["tokens"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_the_flags_of_aether_build_its_configuration(folder):
    flags = ["--block-size", 16, "--threshold", 0.5, "--local-window", 1]
    found = json.loads(sieve("generate", "--model", folder, "--prompt", TEXT, "--max-tokens", 2, "--json", *flags).stdout)
    assert "EventRadar" in found["report"]["policy"]
    assert "Threshold(threshold=0.5)" in found["report"]["policy"]
    assert "block_size=16" in found["report"]["policy"]


def test_compare_says_how_fast_how_sparse_and_how_wrong(folder, tmp_path):
    file, page = tmp_path / "prompt.py", tmp_path / "page.html"
    file.write_text(TEXT)
    flags = ["--max-tokens", 4, "--policy", "top_blocks(k=2)", "--html", page, "--backend", "reference"]
    told = sieve("compare", "--model", folder, "--prompt-file", file, *flags)
    assert told.exit_code == 0
    for wanted in ("prefill", "decode step, median", "gate, share of attention", "certified", "output error", "Next tokens",
                   "the dense continuation, teacher-forced", "0 above their certificate", "On the reference backend prefill took",
                   "prompt.py", "wrote", f"report page: {page}"):  # fmt: skip
        assert wanted in told.stdout.replace("\n", " "), wanted
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_compare_json_holds_every_figure(folder):
    flags = ["--prompt", TEXT, "--max-tokens", 4, "--target-sparsity", 0.5, "--json"]
    found = json.loads(sieve("compare", "--model", folder, *flags).stdout)
    assert found["requested_sparsity"] == 0.5
    assert 0.0 <= found["achieved_sparsity"] < 1.0
    assert found["backend"] in dispatch.ORDER
    assert found["violations"] == 0
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    for layer in found["layers"]:
        assert layer["certified_dropped_mass"]["max"] >= layer["true_dropped_mass"]["max"] * 0.999
        assert layer["output_error"]["p50"] <= layer["output_error"]["p99"] <= layer["output_error"]["max"]
    assert [a["positions"] for a in found["agreement"]] == [4, 256]
    assert found["dense"]["prefill_seconds"] > 0


def test_compare_with_everything_kept_finds_no_difference(folder):
    flags = ["--prompt", "abc" * 30, "--policy", "dense", "--max-tokens", 3, "--json"]
    found = json.loads(sieve("compare", "--model", folder, *flags).stdout)
    assert found["density"] == 1.0
    assert found["dense"]["tokens"] == found["sparse"]["tokens"]
    assert all(a["share"] == 1.0 for a in found["agreement"])
    assert found["true_dropped_mass"]["max"] == 0.0


def test_inspect_writes_the_page(folder, tmp_path):
    page = tmp_path / "out.html"
    flags = ["--prompt", TEXT, "--max-tokens", 2, "--output", page, "--json"]
    found = json.loads(sieve("inspect", "--model", folder, *flags).stdout)
    assert found == {"page": str(page), "bytes": page.stat().st_size}


def test_doctor_says_what_runs_and_why_others_do_not():
    found = json.loads(sieve("doctor", "--json").stdout)
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["packages"]["sieve-attn"] == __version__
    backends = found["backends"]["torch on cpu, float32, head_dim 64"]
    assert backends["reference"] == []
    assert list(backends) == ["triton", "native", "reference"]
    told = sieve("doctor").stdout
    for name, reasons in backends.items():
        assert name in told
        assert not reasons or reasons[0] in told.replace("\n", " ")


def test_the_demo_prompt_is_long_real_and_held_out():
    text, source = demo_prompt()
    assert len(text.encode()) >= LEAST_DEMO_BYTES
    assert text.endswith("\n")
    assert source.partition(" ")[0] in HELD_OUT


def test_the_version_is_the_packages():
    assert sieve("--version").stdout == f"{__version__}\n"


def test_a_prompt_and_its_continuation_fit_the_models_context(folder):
    told = sieve("compare", "--prompt", "a" * 4090, "--max-tokens", 7, "--model", folder)
    assert told.exit_code == 2
    assert told.stderr.startswith(
        "sieve: `prompt` must leave room for 7 new tokens in the model's context of 4,096; got 4,090 tok"
    )


def test_help_needs_no_framework():
    code = "import sys, sieve_attn.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    told = sieve("--help").stdout
    assert all(name in told for name in ("generate", "compare", "inspect", "doctor"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--prompt", "x", "--policy", "top_bloks(k=3)"], "`policy` must be made of known names"),
        (["generate", "--prompt", "x", "--policy", "top_blocks(k=3)", "--max-error", 0.1], "`policy` must be given in one way"),
        (["generate", "--prompt", "x", "--max-error", 2], "`error` must lie in [0, 1]; got 2.0"),
        (["generate", "--prompt", "x", "--block-size", 0], "`block_size` must be an integer of at least 1; got 0"),
        (["generate", "--prompt", "x", "--threads", 0], "`threads` must be an integer of at least 1; got 0"),
        (["generate", "--prompt", "x", "--threads", 100_000], "`threads` must be at most"),
        (["bench", "--threads", 100_000], "`threads` must be at most"),
        (["bench", "aether", "--threads", 100_000], "`threads` must be at most"),
        (["generate", "--prompt", "x", "--dtype", "int3"], "`dtype` must be one of"),
        (["generate", "--prompt", "x", "--model", "/no/such/folder"], "`model` must be a folder with a readable model"),
        (["generate", "--prompt", "x", "--policy", "dense", "--backend", "abacus"], "`backend` must be 'auto' or one of"),
        (["generate"], "`prompt` must be given once, as --prompt or as --prompt-file; got none"),
        (
            ["compare", "--prompt", "x", "--prompt-file", "y"],
            "`prompt` must be given once, as --prompt or as --prompt-file or as --demo; got --prompt and --prompt-file",
        ),
        (
            ["compare", "--demo", "--prompt", "x"],
            "`prompt` must be given once, as --prompt or as --prompt-file or as --demo; got --prompt and --demo",
        ),
        (
            ["inspect", "--demo", "--prompt-file", "y"],
            "`prompt` must be given once, as --prompt or as --prompt-file or as --demo; got --prompt-file and --demo",
        ),
        (["generate", "--prompt", "a\udcff"], "`prompt` must be valid Unicode; got '\\udcff' at position 1"),
        (["compare", "--prompt", ""], "`prompt` must not be empty"),
        (["compare", "--prompt-file", "/no/such/file"], "`prompt-file` must be a readable UTF-8 text"),
        (
            ["compare", "--prompt", "xyz", "--policy", "top_blocks(q=3)"],
            "`policy` must call top_blocks with what it takes (k, bits",
        ),
        (["compare", "--prompt", "xyz", "--html", "/no/such/folder/x.html"], "`html` must be a file in a folder that exists"),
        (["inspect", "--prompt", "xyz", "--output", "/"], "`output` must be a file in a folder that exists"),
        (
            ["compare", "--prompt", "xyz", "--seed", 2**64],
            "`seed` must be an integer of at most 64 bits; got 18446744073709551616",
        ),
        (["generate", "--prompt", "xyz", "--backend", "abacus"], "`backend` must be 'auto' or one of"),
        (["compare", "--prompt", "x"], "`prompt` must have at least 2 tokens"),
        (["inspect", "--prompt", "xyz", "--max-tokens", 0], "`max_tokens` must be an integer of at least 1; got 0"),
    ],
)
def test_user_errors_are_one_line_on_stderr_and_exit_code_2(arguments, said):
    told = sieve(*arguments)
    assert told.exit_code == 2
    assert told.stderr.startswith(f"sieve: {said}")
    assert "Traceback" not in told.stderr
    assert told.stdout == ""


@pytest.mark.parametrize(("given", "code"), [(b"caf\xc3\xa9", 0), (b"a\xff", 2)])
def test_stdin_is_read_as_utf_8_whatever_the_locale(folder, given, code):
    program = "from sieve_attn.cli import main; main()"
    flags = ["--model", folder, "--prompt-file", "-", "--max-tokens", "1", "--json"]
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", program, "generate", *flags]
    done = subprocess.run(command, input=given, capture_output=True, check=False, env=os.environ | locale)
    assert done.returncode == code, done.stderr
    assert code == 0 or done.stderr.startswith(b"sieve: `prompt-file` must be a readable UTF-8 text; got '-' (")


def test_a_closed_stdin_is_said():
    program = "import sys; sys.stdin = None; from sieve_attn.cli import main; main()"
    command = [sys.executable, "-c", program, "generate", "--prompt-file", "-"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    said = "`prompt-file` '-' must come with an open stdin; got a closed one; pipe a text in, or name a file"
    assert (done.returncode, done.stderr) == (2, f"sieve: {said}\n")
