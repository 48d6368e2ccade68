"""Which backend runs a call. A named one runs or raises with every reason; ``auto`` chooses and says what it chose."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from sieve_attn.checks import error

log = logging.getLogger("sieve_attn")

ORDER = ("triton", "native", "reference")  # fastest first; each is a module of sieve_attn.attend with why_not() and attend()


@dataclass(frozen=True)
class Request:
    """What a backend must be able to do."""

    framework: str
    device: str
    dtype: str
    head_dim: int
    value_dim: int
    far_field: bool = False
    kinds: tuple[str, ...] = ()  # what the selection is made of: Blocks, Ranges, Offsets, Tokens
    named: bool = False  # the caller asked for this backend: what only serves then, as an interpreter does, may run


def why_not(name: str, request: Request) -> tuple[str, ...]:
    """Every reason why backend ``name`` cannot run ``request``; empty if it can."""
    if not _is_there(name):
        return (f"sieve_attn.attend.{name} is not part of this installation",)
    return tuple(module(name).why_not(request))


@lru_cache
def _is_there(name: str) -> bool:
    return find_spec(f"sieve_attn.attend.{name}") is not None


@lru_cache
def module(name: str) -> ModuleType:
    return import_module(f"sieve_attn.attend.{name}")


def known(backend: str) -> None:
    """Raises ValueError for a name that is none of a backend."""
    if backend != "auto" and backend not in ORDER:
        raise error("backend", f"must be 'auto' or one of {', '.join(ORDER)}", repr(backend), "use 'auto'")


def choose(backend: str, request: Request) -> tuple[str, str]:
    """``(name, why)`` of the backend to use."""
    known(backend)
    if backend != "auto":
        reasons = why_not(backend, replace(request, named=True))
        if reasons:
            raise error(
                "backend", f"cannot run this call: {'; '.join(reasons)}", repr(backend), "use backend='auto' or mend every reason"
            )
        return backend, "named by the caller"
    passed = []
    for name in ORDER:
        reasons = why_not(name, request)
        if not reasons:
            why = "; ".join(passed) or "first choice"
            _say_once(name, why)
            return name, why
        passed.append(f"{name}: {', '.join(reasons)}")
    raise error("backend", f"found none that can run this call ({'; '.join(passed)})", repr(backend), "see `sieve doctor`")


@lru_cache
def _say_once(name: str, why: str) -> None:
    log.info("backend %s (%s)", name, why)
