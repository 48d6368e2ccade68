"""Python expressions from text: what policies and selections are written as where only text may pass.

Before Python 3.11.8 and 3.12.2 its parser counts its depth in one place for all threads: where the collector runs in the middle
and another thread comes in to parse, a SystemError follows (CPython's issue 106905). Hence one thread at a time.
"""

from __future__ import annotations

import ast
from threading import Lock

_parser = Lock()


def read(text: str) -> ast.expr:
    """The tree of the expression that ``text`` holds; nothing is evaluated. A SyntaxError if it holds none."""
    with _parser:
        return ast.parse(text.strip(), mode="eval").body
