"""What a case becomes when its arrays exist: our call, its check, its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sieve_attn.bench.peers import Peer
from sieve_attn.pipeline import attention


class Unavailable(Exception):
    """This installation cannot run the case; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """``call`` is ours; its first result goes to ``check``, which returns what is wrong ("" if nothing) and fields of the row.

    ``peers`` are made only where they are asked for. ``first`` runs instead of ``call`` where the check needs more than the
    timed call returns. ``parts``: seconds that a result knows about itself. ``beside``: calls of ours that are clocked in
    the same turns and are no peers; ``front`` is the PyTorch front-end.
    """

    call: Callable[[], Any]
    check: Callable[[Any], tuple[str, dict[str, Any]]]
    peers: dict[str, Callable[[], Peer]]
    first: Callable[[], Any] | None = None
    parts: Callable[[Any], dict[str, float]] = field(default=lambda result: {})
    notes: tuple[str, ...] = ()
    beside: dict[str, Callable[[], Any]] = field(default_factory=dict)


def which_backend(query: Tensor, key: Tensor, value: Tensor, backend: str) -> str:
    """The backend that runs calls of this dtype and these head dimensions, found by one call of one query and one key."""
    one = (slice(None), slice(None), slice(0, 1))
    return attention(query[one].detach(), key[one].detach(), value[one].detach(), backend=backend, return_report=True)[1].backend
