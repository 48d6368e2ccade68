"""One small operations file a framework, so that every formula and every reference stage is written once.

Arithmetic, comparison, indexing, ``reshape`` and ``shape`` are the same on every array type. What differs, or what the
array API lacks, is a function of the module that :func:`namespace` returns.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

_OPERATIONS = {
    "torch": "sieve_attn.arrays.torch_ops", "numpy": "sieve_attn.arrays.numpy_ops", "jax": "sieve_attn.arrays.jax_ops",
}  # fmt: skip

of_type: dict[type, ModuleType] = {}  # each operations module enters its array type here


def namespace(*arrays) -> ModuleType:
    """The operations module of the framework that made ``arrays`` (None entries are passed over)."""
    known = of_type.get(type(arrays[0])) if arrays else None
    if known is not None and all(a is None or type(a) is type(arrays[0]) for a in arrays):
        return known
    kinds = {base.__module__.partition(".")[0] for a in arrays if a is not None for base in type(a).__mro__}
    found = [name for name in _OPERATIONS if name in kinds]
    if len(found) != 1:
        names = sorted({type(a).__name__ for a in arrays if a is not None})
        raise TypeError(
            f"arrays must all come from one of {', '.join(_OPERATIONS)}; got {', '.join(names) or 'none'}; "
            "convert them to one framework first"
        )
    # the compiler can look a module up, but not import one
    known = sys.modules.get(_OPERATIONS[found[0]])
    return import_module(_OPERATIONS[found[0]]) if known is None else known
