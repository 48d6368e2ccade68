"""The kernels as a guest of a Python process: threads, forks, odd memory layouts, levels, malformed input, and their absence."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from sieve_attn import attend, attention, dispatch, native, policies
from sieve_attn.functional import top_k_attention
from sieve_attn.testing import Shape
from sieve_attn.testing.strategies import gaussian, random_blocks
from sieve_attn.types import Blocks, Offsets, Ranges, Selection, Tokens

needs_kernels = pytest.mark.skipif(bool(native.missing()), reason="pure-Python installation")
SHAPE = Shape(2, 4, 2, 70, 130, 24, 20)


def operations(q, k, v):
    """Every operation of the kernels on one input: results and gradients."""
    shape = Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    lengths = (shape.q_len, shape.kv_len)
    index = torch.arange(shape.q_len)[None, None, :, None] % shape.kv_len - torch.arange(4) % 3
    selections = (
        random_blocks(1, shape, causal=True),
        Selection((Ranges(*lengths, prefix=3, window=20),)),
        Selection((Offsets(*lengths, (0, 1, 4, 9)),)),
        Selection((Tokens(index, shape.kv_len),)),
    )
    found = []
    for run in (
        *(lambda *x, s=s: attend(*x, s, causal=True, backend="native")[0] for s in selections),
        lambda *x: top_k_attention(*x, 5, causal=True, backend="native"),
    ):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = run(*leaves)
        found += [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]
    return found


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(params=[] if native.missing() else native.module().levels())
def level(request):
    native.module().force_level(request.param)
    yield request.param
    native.module().force_level("")


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_concurrent_calls_give_identical_bits(level, dtype):
    inputs = gaussian(1, SHAPE, dtype)
    expected, found = operations(*inputs), [None] * 4

    def work(i):
        for _ in range(3):
            found[i] = operations(*inputs)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(same(expected, got) for got in found)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [1.0, 0.3, 0.02])
def test_the_number_of_threads_changes_no_bit(level, dtype, density, monkeypatch):
    # one thread takes several tiles of queries side by side, many threads take tile by tile
    shape = Shape(1, 4, 2, 600, 730, 40, 24)
    q, k, v = gaussian(3, shape, dtype)
    v[0, 1, 77, 5] = float("nan")  # some tiles are done twice, their neighbours are not
    options = {"heads": 4, "q_block": 16, "kv_block": 16, "density": density, "causal": True}
    blocks = (random_blocks(5, shape, **options), random_blocks(6, shape, per_query=True, **options))
    dense = Selection((Ranges(shape.q_len, shape.kv_len, prefix=shape.kv_len),))

    def run():
        return [x.nan_to_num(7.0) for s in (*blocks, dense) for x in attend(q, k, v, s, causal=True, backend="native")]

    monkeypatch.setattr(native, "threads", lambda like: 1)
    alone = run()
    assert density == 1.0 or (alone[0] == 0).all(dim=-1).any() == (density < 0.1), "rows without keys are among the thin ones"
    monkeypatch.setattr(native, "threads", lambda like: 40)
    assert same(alone, run())


def _on_numpy(q, k, v):
    out, _ = attend(q, k, v, Selection((Ranges(70, 130, prefix=130),)), causal=True, backend="native")
    return out, top_k_attention(q, k, v, 5, causal=True, backend="native")


@needs_kernels
@pytest.mark.filterwarnings("ignore:os.fork.* was called:RuntimeWarning")  # JAX says so of its own threads where it is loaded
def test_a_forked_child_can_call_kernels(level, monkeypatch):
    monkeypatch.setattr(native, "threads", lambda like: 2)
    inputs = [x.numpy() for x in gaussian(1, SHAPE)]
    expected = _on_numpy(*inputs)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(_on_numpy(*inputs)))
    child.start()
    got = queue.get()
    child.join(60)
    assert child.exitcode == 0
    assert all(np.array_equal(a, b) for a, b in zip(expected, got, strict=True))


BEFORE_LOADING = """
import os, torch
torch.set_num_threads(2)
torch.randn(1 << 20).sum()  # OpenMP has threads now, and loses them
child = os.fork()
if child:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
import numpy
from sieve_attn.functional import top_k_attention
x = numpy.random.default_rng(0).standard_normal((1, 4, 300, 64)).astype(numpy.float32)
top_k_attention(x, x, x, 5, causal=True, backend="native")
os._exit(7)
"""


@needs_kernels
def test_a_child_can_load_kernels_that_its_parent_had_not():
    assert subprocess.run([sys.executable, "-c", BEFORE_LOADING], timeout=120).returncode == 7


@needs_kernels
def test_the_gil_is_released():
    q, k, v = gaussian(1, Shape(1, 4, 4, 3000, 3000, 64, 64))
    ticks, running = [], threading.Event()

    def clock():
        running.wait()
        while running.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    other = threading.Thread(target=clock)
    other.start()
    prepared_for = Selection((Ranges(3000, 3000, prefix=3000),))
    attend(q[:, :, :8], k[:, :, :8], v[:, :, :8], Selection((Ranges(8, 8, prefix=8),)), backend="native")
    running.set()
    begin = time.perf_counter()
    attend(q, k, v, prepared_for, causal=True, backend="native")
    end = time.perf_counter()
    running.clear()
    other.join()
    # a held GIL would let the other thread run at the borders of the call alone
    inside = [t for t in ticks if begin + 0.2 * (end - begin) < t < begin + 0.8 * (end - begin)]
    assert len(inside) >= 3


def layouts(x):
    """The same numbers, laid out in other ways."""
    yield "transposed", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "channels outside", x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    wide = torch.zeros(*x.shape[:3], x.shape[3] + 5, dtype=x.dtype)
    wide[..., 2:-3] = x
    yield "inside of a wider one", wide[..., 2:-3]
    storage = torch.zeros(x.numel() + 3, dtype=x.dtype)
    storage[3:] = x.reshape(-1)
    yield "three numbers into its storage", storage[3:].view(x.shape)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layout_does_not_matter(level, dtype):
    q, k, v = gaussian(1, SHAPE, dtype)
    expected = operations(q, k, v)
    for other_q, other_k, other_v in zip(layouts(q), layouts(k), layouts(v), strict=True):
        assert same(expected, operations(other_q[1], other_k[1], other_v[1])), other_q[0]


@needs_kernels
def test_expanded_arrays_mean_their_copies(level):
    q, k, v = gaussian(1, Shape(1, 1, 1, 40, 60, 16, 16))
    wide = [x.expand(2, 2, -1, -1) for x in (q, k, v)]
    copies = [x.contiguous() for x in wide]
    assert same(operations(*wide), operations(*copies))


@needs_kernels
def test_numpy_arrays_may_step_backwards(level):
    q, k, v = (x.numpy() for x in gaussian(1, SHAPE))
    back = [np.ascontiguousarray(x[:, :, ::-1, ::-1])[:, :, ::-1, ::-1] for x in (q, k, v)]
    assert back[0].strides[2] < 0
    assert back[0].strides[3] < 0
    selection = Selection((Ranges(70, 130, prefix=40, window=9),))
    for run in (
        lambda *x: attend(*x, selection, causal=True, backend="native")[0],
        lambda *x: top_k_attention(*x, 5, causal=True, backend="native"),
    ):
        assert np.array_equal(run(q, k, v), run(*back))


@needs_kernels
def test_unknown_levels_are_refused():
    with pytest.raises(ValueError, match=r"`level` must be one that was built .*portable.*; got 'mmx'; leave SIEVE_LEVEL unset"):
        native.module().force_level("mmx")
    assert native.level() in native.module().levels()


def python(program, **variables):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**os.environ, **variables}
    )


@needs_kernels
@pytest.mark.parametrize("name", [] if native.missing() else native.module().levels())
def test_the_environment_chooses_the_level(name):
    done = python("from sieve_attn import native; print(native.level())", SIEVE_LEVEL=name)
    assert done.stdout.split() == [name], done.stderr


@needs_kernels
def test_an_unknown_level_in_the_environment_is_an_error_and_no_crash():
    done = python("from sieve_attn import native; native.level()", SIEVE_LEVEL="mmx")
    assert done.returncode == 1
    assert "ValueError: `level` must be one that was built" in done.stderr


@needs_kernels
@pytest.mark.parametrize(
    ("row_ptr", "block_index"),
    [
        ([0, 1, 2], [0, 3]),  # a block behind the last
        ([0, 1, 2], [0, -1]),
        ([0, 2, 2], [1, 0]),  # not in order
        ([0, 2, 2], [1, 1]),
        ([0, 2, 1], [0, 1]),  # falling
        ([0, 1, 5], [0, 1]),  # more entries than there are
        ([1, 1, 2], [0, 1]),
        ([0, 2], [0, 1]),  # a tile is missing
        ([], []),
        ([0, 1 << 40, 2], [0, 1]),
    ],
)
def test_malformed_blocks_are_refused(row_ptr, block_index):
    q = torch.randn(1, 1, 32, 16)
    blocks = Blocks(torch.tensor(row_ptr), torch.tensor(block_index, dtype=torch.int32), 1, 1, 32, 48, q_block=16, kv_block=16)
    k = torch.randn(1, 1, 48, 16)
    with pytest.raises(ValueError, match=r"`selection` must list the blocks of every tile in increasing order, each below 3"):
        attend(q, k, k, Selection((blocks,)), backend="native")


@needs_kernels
@pytest.mark.parametrize("grid", [{"q_block": 0}, {"kv_block": 0}, {"kv_block": -16}, {"lead": -1}, {"lead": 16}])
def test_a_malformed_grid_is_refused(grid):
    q = torch.randn(1, 1, 32, 16)
    given = {"q_block": 16, "kv_block": 16, "lead": 0} | grid
    blocks = Blocks(torch.tensor([0, 1, 2]), torch.tensor([0, 1], dtype=torch.int32), 1, 1, 32, 32, **given)
    with pytest.raises(ValueError, match="`selection`"):
        attend(q, q, q, Selection((blocks,)), backend="native")


@needs_kernels
def test_a_row_mask_of_another_size_is_refused():
    q = torch.randn(1, 1, 32, 16)
    blocks = Blocks(torch.tensor([0, 1, 2]), torch.tensor([0, 1], dtype=torch.int32), 1, 1, 32, 32, 16, 16,
                    row_mask=torch.ones(1, 16, dtype=torch.bool))  # fmt: skip
    with pytest.raises(ValueError, match="`selection`"):
        attend(q, q, q, Selection((blocks,)), backend="native")


@needs_kernels
@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int32), (torch.int64, torch.int64), (torch.int32, torch.int64)])
def test_indices_of_other_integer_types_mean_the_same(dtypes):
    q, k, v = gaussian(1, SHAPE)
    selection = random_blocks(1, SHAPE, causal=True)
    part = selection.parts[0]
    grid = {n: getattr(part, n) for n in ("batch", "heads", "q_len", "kv_len", "q_block", "kv_block", "lead")}
    other = Selection((Blocks(part.row_ptr.to(dtypes[0]), part.block_index.to(dtypes[1]), **grid),))
    assert torch.equal(attend(q, k, v, other, backend="native")[0], attend(q, k, v, selection, backend="native")[0])


def test_without_kernels_everything_runs_on_the_reference(monkeypatch):
    reason = "the C++ kernels are not installed (No module named 'sieve_attn._native')"
    q, k, v = (x.requires_grad_() for x in gaussian(1, SHAPE))
    with_kernels = attention(q, k, v, policies.TopBlocks(3), causal=True)
    monkeypatch.setattr(native, "missing", lambda: (reason,))
    monkeypatch.setattr(native, "module", lambda: pytest.fail("the kernels were called"))
    assert native.level() is None
    out, report = attention(q, k, v, policies.TopBlocks(3), causal=True, return_report=True)
    assert report.backend == "reference"
    assert reason in report.why_backend
    assert torch.allclose(out, with_kernels, atol=1e-5)
    best, report = top_k_attention(q, k, v, 5, causal=True, return_report=True)
    assert report.backend == "reference"
    assert reason in report.why_backend
    assert report.certificate.dropped_mass.shape == q.shape[:3]
    (out.sum() + best.sum()).backward()
    assert torch.isfinite(q.grad).all()
    for part in (Offsets(70, 130, (0, 3)), Ranges(70, 130, window=5)):
        assert torch.isfinite(attend(q, k, v, Selection((part,)), causal=True)[0]).all()
    with pytest.raises(ValueError, match="the C\\+\\+ kernels are not installed"):
        dispatch.choose("native", dispatch.Request("torch", "cpu", "float32", 16, 16))


def test_an_import_that_fails_is_a_reason():
    program = (
        "import sys; sys.modules['sieve_attn._native'] = None\n"
        "import numpy as np, sieve_attn\n"
        "from sieve_attn import native, dispatch\n"
        "x = np.ones((1, 1, 40, 8), np.float32)\n"
        "out, report = sieve_attn.attention(x, x, x, return_report=True)\n"
        "assert report.backend == 'reference' and 'kernels are not installed' in report.why_backend, report.why_backend\n"
        "assert np.allclose(out, 1)\n"
        "print(native.missing()[0])"
    )
    done = python(program)
    assert done.returncode == 0, done.stderr
    assert "SIEVE_PURE_PYTHON" in done.stdout
