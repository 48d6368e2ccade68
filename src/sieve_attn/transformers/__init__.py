"""Hugging Face models with sparse attention: ``sparsify`` a model, ``generate`` as before, read the ``report``."""

from sieve_attn.transformers.cache import StreamedLayer
from sieve_attn.transformers.install import capture, desparsify, report, sparsify
from sieve_attn.transformers.records import Record
from sieve_attn.transformers.reports import LayerReport, ModelReport

__all__ = ["LayerReport", "ModelReport", "Record", "StreamedLayer", "capture", "desparsify", "report", "sparsify"]
