"""One process, several threads: policies are read and gradients taken while the collector runs and threads change often.

Python before 3.11.8 and 3.12.2 fails now and then in ``ast.parse`` under just these conditions (CPython's issue 106905).
"""

import gc
import sys
import threading

import pytest
import torch

from sieve_attn import attention
from sieve_attn.attend.torch_op import pack, unpack
from sieve_attn.policies import TopBlocks, parse
from sieve_attn.testing import Shape
from sieve_attn.testing.strategies import gaussian, random_blocks
from sieve_attn.types import Call, Offsets, Ranges, Selection, Tokens


class _Rubbish:
    """Goes round in a circle, and runs Python when it is collected: other threads may then come in between."""

    def __init__(self):
        self.me = self

    def __del__(self):
        sum(range(50))


@pytest.fixture
def restless():
    often, when = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(20)
    yield
    gc.set_threshold(*when)
    sys.setswitchinterval(often)


def in_threads(work, count=4):
    """What ``work(thread)`` gave in each of ``count`` threads; what one raised is raised."""
    found, failed = [None] * count, []

    def run(i):
        try:
            found[i] = work(i)
        except BaseException as why:
            failed.append(why)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


def test_threads_read_policies(restless):
    def work(i):
        made = []
        for n in range(300):
            _Rubbish()
            made.append(parse(f"top_blocks(k={1 + 4 * n + i})"))
        return made

    assert in_threads(work) == [[TopBlocks(k=1 + 4 * n + i) for n in range(300)] for i in range(4)]


def test_threads_read_selections(restless):
    shape = Shape(1, 2, 1, 40, 60, 8, 8)
    call = Call(*gaussian(1, shape))
    index = torch.arange(40)[None, None, :, None] - torch.arange(3)
    parts = random_blocks(1, shape, causal=True).parts
    parts += (Ranges(40, 60, prefix=3, window=20), Offsets(40, 60, (0, 1, 4, 9)), Tokens(index.clamp(min=-1), 60))

    def work(_):
        for _ in range(300):
            _Rubbish()
            made = unpack(*pack(Selection(parts)), call)
        return made

    for made in in_threads(work):
        assert repr(made) == repr(Selection(parts))
        assert all(type(a) is type(b) for a, b in zip(made.parts, parts, strict=True))


@pytest.mark.parametrize("policy", ["top_blocks(k=2)", "windowed(window=8)"])
def test_threads_train_at_once(policy, restless):
    q, k, v = gaussian(1, Shape(1, 2, 1, 70, 130, 8, 8), torch.float32)

    def work(_=0):
        for _ in range(10):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = attention(*leaves, parse(policy), causal=True)
            grads = torch.autograd.grad(out.square().sum(), leaves)
        return (out.detach(), *grads)

    expected = work()
    for found in in_threads(work):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
