"""What Sieve is tested with, for your own scorers, selectors, patterns and backends: inherit a contract and run pytest."""

from sieve_attn.testing import oracle, strategies, tolerances
from sieve_attn.testing.contracts import BackendContract, BoundContract, PatternContract, ScorerContract, SelectorContract
from sieve_attn.testing.strategies import GENERATORS, Shape
from sieve_attn.testing.tolerances import allowed_error, assert_close

__all__ = [
    "GENERATORS",
    "BackendContract",
    "BoundContract",
    "PatternContract",
    "ScorerContract",
    "SelectorContract",
    "Shape",
    "allowed_error",
    "assert_close",
    "oracle",
    "strategies",
    "tolerances",
]
