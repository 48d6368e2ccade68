"""Models and tokenizers from a folder, without a network."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sieve_attn.checks import error

EMBEDDED = Path(__file__).parent / "embedded"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def embedded_model_is_present() -> bool:
    return (EMBEDDED / "config.json").is_file() and (EMBEDDED / "model.safetensors").is_file()


def load(model: Any, tokenizer: Any = None, dtype: Any = None) -> tuple[Any, Any]:
    """``(model, tokenizer)`` from "embedded", a folder (or the id of a downloaded model), or a loaded Hugging Face model.

    ``dtype`` is a torch dtype or its name; None keeps a loaded model as it is and loads others in fp32 on a CPU. Raises OSError
    if the path cannot be read as a model, TypeError for other types, ValueError for an unknown dtype.
    """
    wanted = _dtype(dtype)
    if isinstance(model, torch.nn.Module):
        return _loaded(model, tokenizer, wanted)
    if not isinstance(model, (str, Path)):
        raise error(
            "model",
            "must be 'embedded', a path or a loaded Hugging Face model",
            type(model).__name__,
            "pass the folder that holds config.json and model.safetensors",
            TypeError,
        )
    path = EMBEDDED if str(model) == "embedded" else model
    if wanted is None:
        wanted = torch.float32 if not torch.cuda.is_available() else "auto"
    made = _read("model", path, "AutoModelForCausalLM", dtype=wanted)
    if torch.cuda.is_available():
        made = made.to("cuda")
    return made.eval(), _tokenizer(path if tokenizer is None else tokenizer)


def _loaded(model: Any, tokenizer: Any, wanted: Any) -> tuple[Any, Any]:
    if not callable(getattr(model, "generate", None)) or not hasattr(model, "config"):
        raise error(
            "model",
            "must be a causal language model of Hugging Face",
            type(model).__name__,
            "load it with transformers.AutoModelForCausalLM",
            TypeError,
        )
    name = getattr(model.config, "_name_or_path", "")
    if tokenizer is None and not name:
        raise error(
            "tokenizer",
            "must be given with a model that was not loaded from a path",
            "None",
            "pass tokenizer=AutoTokenizer.from_pretrained(...)",
        )
    model = model if wanted is None else model.to(wanted)
    return model.eval(), _tokenizer(name if tokenizer is None else tokenizer)


def _tokenizer(given: Any) -> Any:
    if isinstance(given, (str, Path)):
        return _read("tokenizer", given, "AutoTokenizer")
    if not callable(given) or not hasattr(given, "decode"):
        raise error(
            "tokenizer",
            "must be a Hugging Face tokenizer or a path",
            type(given).__name__,
            "pass AutoTokenizer.from_pretrained(...)",
            TypeError,
        )
    return given


def _read(argument: str, path: Any, loader: str, **options: Any) -> Any:
    import transformers

    with _quiet():
        try:
            return getattr(transformers, loader).from_pretrained(str(path), local_files_only=True, **options)
        except (OSError, ValueError, KeyError) as why:
            missing = str(path).startswith(("/", ".", "~")) and not Path(path).exists()
            first = "no such folder" if missing else str(why).strip().partition("\n")[0]
            raise error(argument, "must be a folder with a readable model (config.json, weights, tokenizer)",
                        f"{str(path)!r} ({first})", "check the path, or use model='embedded'; nothing is downloaded", OSError,
                        ) from why  # fmt: skip


@contextmanager
def _quiet():
    """Without the loader's progress bar: it would mix with our own output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise error("dtype", f"must be one of {', '.join(DTYPES)}", repr(dtype), "leave it out for fp32 on a CPU")
    return DTYPES[dtype]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a prompt. Tokenizers that close every text with its end (ByT5's does) would end the prompt: that id is left out."""
    ids = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == getattr(tokenizer, "eos_token_id", None):
        ids.pop()
    return ids


def decode(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    """The text that ``ids`` add after the ids ``before`` (a tokenizer may treat the start of a text differently)."""
    context = before[-8:]
    whole, known = (tokenizer.decode(x, clean_up_tokenization_spaces=False) for x in (context + ids, context))
    return whole[len(known) :]


def eos_ids(model: Any) -> frozenset[int]:
    """The ids that end a text."""
    held = getattr(model, "generation_config", None)
    eos = getattr(held, "eos_token_id", None)
    eos = getattr(model.config, "eos_token_id", None) if eos is None else eos
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def context_length(model: Any) -> int | None:
    """How many tokens the model was made for; None if its configuration does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
