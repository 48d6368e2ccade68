"""What a case becomes when its arrays exist: our call, its check, its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from sieve_attn.bench.peers import Peer
from sieve_attn.pipeline import attention
from sieve_attn.types import Blocks, Selection


def moved(x: Any, device: str) -> Any:
    """``x``, its tensors and the tensors of its blocks on ``device``; itself where that is where it is."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, tuple):
        return tuple(moved(part, device) for part in x)
    if isinstance(x, Selection):
        return Selection(tuple(moved(part, device) for part in x.parts))
    if isinstance(x, Blocks):
        mask = None if x.row_mask is None else x.row_mask.to(device)
        exact = x.listed
        return replace(exact, row_ptr=exact.row_ptr.to(device), block_index=exact.block_index.to(device), row_mask=mask)
    return x


class Unavailable(Exception):
    """This installation cannot run the case; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """``call`` is ours; its first result goes to ``check``, which returns what is wrong ("" if nothing) and fields of the row.

    ``peers`` are made only where they are asked for. ``first`` runs instead of ``call`` where the check needs more than the
    timed call returns. ``parts``: seconds that a result knows about itself. ``beside``: calls of ours that are clocked in
    the same turns and are no peers, by the name of what they measure; ``front`` is the PyTorch front-end.
    """

    call: Callable[[], Any]
    check: Callable[[Any], tuple[str, dict[str, Any]]]
    peers: dict[str, Callable[[], Peer]]
    first: Callable[[], Any] | None = None
    parts: Callable[[Any], dict[str, float]] = field(default=lambda result: {})
    beside: dict[str, Callable[[], Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def which_backend(query: Tensor, key: Tensor, value: Tensor, backend: str) -> str:
    """The backend that runs calls of this dtype and these head dimensions, found by one call of one query and one key."""
    one = (slice(None), slice(None), slice(0, 1))
    return attention(query[one].detach(), key[one].detach(), value[one].detach(), backend=backend, return_report=True)[1].backend
