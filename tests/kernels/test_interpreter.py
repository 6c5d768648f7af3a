"""The faster interpreter computes the same as Triton's, and reports integers that overflow."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from peftkern.kernels.prefix_attention import AttendConfig, attend
from tests.kernels import interpreter
from tests.kernels.oracle import DTYPES


@triton.jit
def several(at, out, what: tl.constexpr, BLOCK: tl.constexpr):
    """A sum, a difference and a product of integers; standard functions, which are patched anew."""
    where = tl.arange(0, BLOCK)
    x, y = tl.load(at + where), tl.load(at + BLOCK + where)
    z = x + y if what == "add" else (x - y if what == "sub" else x * y)
    total = tl.sum(tl.zeros([BLOCK], z.dtype) + z, 0)
    tl.store(out + where, tl.maximum(z, total) + tl.cdiv(BLOCK, 3))


def run(x, what):
    out = torch.zeros(x.shape[1], dtype=x.dtype)
    several[(1,)](x, out, what, x.shape[1])
    return out


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize("what, x, y", [("add", 1, 2), ("sub", 3, 1), ("mul", 2, 3)])
def test_integers(what, x, y, dtype):
    small = torch.tensor([[x] * 4, [y] * 4], dtype=dtype)
    got = run(small, what)
    with interpreter.plain():
        assert torch.equal(run(small, what), got)
    if dtype == torch.int64:  # no wider dtype could show the overflow
        return
    ends = torch.iinfo(dtype)
    for place in range(4):
        large = small.clone()
        large[0, place], large[1, place] = ends.min if what == "sub" else ends.max, 2
        with pytest.raises(InterpreterError, match=f"OverflowError.*{what} gives"):
            run(large, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_of_loops_masks_and_products(dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16, generator=g).to(dtype) for n in (5, 20, 20))
    prefix = torch.randn(2, 2, 3, 16, generator=g).to(dtype)

    def numbers():
        return attend(q, k, v, *prefix, window=9, config=AttendConfig(16, 16, 4, 1))

    got = numbers()
    with interpreter.plain():
        assert all(map(torch.equal, numbers(), got))


def test_types_are_made_when_asked():
    made = interpreter.core.tuple([1, 2])
    assert "type" not in vars(made)
    with interpreter.plain():
        want = interpreter.core.tuple([1, 2]).type
    assert made.type == want and made.type is made.type
    assert interpreter.core.tuple([1], want).type is want


@triton.jit
def masked(at, out, count, BLOCK: tl.constexpr):
    where = tl.arange(0, BLOCK)
    ok = (where < 3) & (count > 0)  # in the interpreter an integer argument is Python's
    tl.store(out + where, tl.load(at + where, mask=ok, other=7), mask=(where > 0) & (count < 2))


@pytest.mark.parametrize("count, expected", [(0, [7, 7, 7]), (1, [1, 2, 7]), (2, [-1, -1, -1])])
def test_masks_with_conditions_on_integers(count, expected):
    out = torch.full((4,), -1)
    masked[(1,)](torch.arange(4), out, count, 4)
    assert out.tolist() == [-1, *expected]
