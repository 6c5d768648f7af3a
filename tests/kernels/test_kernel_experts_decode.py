"""A mixture for few tokens: gate, adapters of tokens, experts that are elsewhere, any strides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from benchmarks.kernels.experts_decode import QWEN3, launches
from benchmarks.kernels.experts_gate import GPT_OSS as GPT_OSS_20B
from benchmarks.kernels.table import traffic
from benchmarks.static.run import TARGETS
from peftkern.kernels.experts_decode import ExpertsDecodeConfig, FewLinear, decode
from peftkern.kernels.experts_gate_reference import hidden
from peftkern.kernels.experts_gates import LAYOUTS, Clamp
from peftkern.kernels.mlp_arguments import ACTIVATIONS
from tests.kernels.compiler import python
from tests.kernels.experts import factors, index_of
from tests.kernels.oracle import DTYPES, assert_as_good_as_torch, few, matrix

pytestmark = pytest.mark.numeric  # of `make test-versions`

GPT_OSS = Clamp(1.702, 1.5, 1.0)


def linear_of(E, N, K, ranks, dtype, adapter, seed, bias=False, transposed=False):
    """A linear with an adapter of each of the ranks; 0 is for one without weights."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(E, K, N, generator=g).mul(K**-0.5).to(dtype)
    w = w.transpose(1, 2) if transposed else w.transpose(1, 2).contiguous()
    return FewLinear(
        w,
        torch.randn(E, N, generator=g).to(dtype) if bias else None,
        [factors(E, r, K, adapter, "a", seed + i) if r else None for i, r in enumerate(ranks)],
        [
            factors(E, r, N, adapter, "b", seed + 50 + i).transpose(1, 2) if r else None
            for i, r in enumerate(ranks)
        ],
        [1.5 + i for i in range(len(ranks))],
    )


def formula(x, index, weights, up, down, name, layout, choice=None, clamp=None):
    """The mixture in x's dtype, pair by pair, with torch's operations."""

    def linear(x, part, e, i):
        y = F.linear(x, part.weight[e].to(x.dtype))
        if part.bias is not None:
            y = y + part.bias[e].to(x.dtype)
        if 0 <= i < len(part.a) and part.a[i] is not None:
            s = part.scales[i] * F.linear(x, part.a[i][e].to(x.dtype))
            y = y + F.linear(s, part.b[i][e].to(x.dtype))
        return y

    out = x.new_zeros(x.shape[0], down.weight.shape[1])
    for t, j in torch.ones_like(index).nonzero().tolist():
        e, i = int(index[t, j]), 0 if choice is None else int(choice[t])
        if 0 <= e < up.weight.shape[0]:
            h = hidden(linear(x[t : t + 1], up, e, i), name, layout, clamp)
            out[t] += (weights[t, j].to(x.dtype) * linear(h, down, e, i))[0]
    return out


def check(T, k, E, K, width, N, *, ranks=(4,), down_ranks=None, dtype=torch.float32,
          adapter=torch.float32, name="silu", layout="halves", clamp=None, bias=False,
          transposed=False, how="any", choice=None, config=None):  # fmt: skip
    x, index = matrix(T, K, dtype, seed=0, offset=1), index_of(T, k, E, how)
    weights = torch.rand(T, k, generator=torch.Generator().manual_seed(1))
    wide = width if layout == "alone" else 2 * width
    made = dict(dtype=dtype, adapter=adapter, bias=bias, transposed=transposed)
    up = linear_of(E, wide, K, ranks, seed=10, **made)
    down = linear_of(E, N, width, ranks if down_ranks is None else down_ranks, seed=100, **made)
    call = index, weights, up, down, name, layout

    def run():
        return decode(x, *call, choice=choice, clamp=clamp, config=config)

    ours = run()
    assert ours.dtype == dtype and torch.equal(ours, run()), "two runs differ"
    # sums of so few numbers: the order alone can double the largest error
    torchs, exact = (formula(v, *call, choice, clamp) for v in (x, x.double()))
    assert_as_good_as_torch(ours, torchs, exact, average=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(layout, dtype):
    check(3, 2, 5, 75, 41, 37, layout=layout, dtype=dtype, bias=True)
    check(1, 4, 8, 64, 48, 32, layout=layout, dtype=dtype, adapter=dtype, transposed=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates(name):
    check(2, 2, 4, 40, 24, 20, name=name)


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_the_clamped_gate(layout):
    check(2, 2, 4, 40, 24, 20, layout=layout, clamp=GPT_OSS, bias=True)


@pytest.mark.parametrize("r", [1, 16, 17, 64, 129, 256])
def test_ranks(r):
    """Of a down with large ranks the parts of S are added by a launch of their own."""
    check(2, 2, 3, 50, 70, 40, ranks=(r,), dtype=torch.bfloat16)


def test_s_of_up_in_parts():
    check(1, 2, 3, 2100, 20, 16)


@pytest.mark.parametrize("ranks, down_ranks", [((), ()), ((3,), ()), ((), (3,)), ((3,), (70,))])
def test_adapters_of_one_linear(ranks, down_ranks):
    check(2, 2, 3, 40, 24, 20, ranks=ranks, down_ranks=down_ranks)


@pytest.mark.parametrize(
    "T, k, E, how",
    [
        (1, 1, 1, "any"), (1, 8, 512, "any"), (8, 8, 16, "any"), (9, 2, 4, "one"),
        (8, 3, 4, "elsewhere"), (0, 2, 4, "any"), (64, 1, 3, "few"),
    ],
)  # fmt: skip
def test_routings(T, k, E, how):
    check(T, k, E, 33, 17, 19, how=how)


def test_an_index_out_of_range_reads_nothing():
    index = torch.tensor([[-1, 4], [9, 2]])
    x, weights = matrix(2, 40, torch.float32, seed=0), torch.ones(2, 2)
    up = linear_of(4, 48, 40, (4,), torch.float32, torch.float32, 1)
    down = linear_of(4, 20, 24, (4,), torch.float32, torch.float32, 2)
    config = ExpertsDecodeConfig()
    y = decode(x, index, weights, up, down, config=config)
    assert not y[0].any() and y[1].any()
    alone = decode(x[1:], index[1:, 1:], weights[1:, 1:], up, down, config=config)
    assert torch.equal(y[1:], alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_token_has_its_own_adapter(dtype):
    """-1 and numbers out of range are tokens without one; adapters 1 and 2 lack a linear."""
    choice = torch.tensor([0, -1, 2, 1, 7, 0], dtype=torch.int32)
    check(6, 2, 4, 40, 24, 20, ranks=(4, 0, 9), down_ranks=(2, 5, 0), choice=choice, dtype=dtype)


@few
@given(
    T=st.integers(1, 8),
    k=st.integers(1, 8),
    E=st.integers(1, 9),
    K=st.integers(1, 100),
    width=st.integers(1, 70),
    N=st.integers(1, 70),
    r=st.integers(1, 40),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    bias=st.booleans(),
    block=st.sampled_from([4, 8, 16]),
)
def test_any_shape(T, k, E, K, width, N, r, layout, dtype, transposed, bias, block):
    config = ExpertsDecodeConfig(up_n=block, up_k=32, down_n=block, down_k=32)
    check(T, k, E, K, width, N, ranks=(r,), layout=layout, dtype=dtype, transposed=transposed,
          bias=bias, config=config)  # fmt: skip


def test_bad_arguments_are_named():
    x, index, weights = torch.ones(3, 8), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    up = linear_of(4, 12, 8, (2,), torch.float32, torch.float32, 1)
    down = linear_of(4, 5, 6, (2,), torch.float32, torch.float32, 2)
    many = torch.zeros(3, 22, dtype=torch.int64)
    for call, message in (
        ((x, many, weights, up, down), "index has 66 entries; allowed: at most 64"),
        ((x, index.float(), weights, up, down), "index has dtype torch.float32"),
        ((x, index, weights[:, :1], up, down), r"weights has shape \(3, 1\)"),
        ((x[:, :7], index, weights, up, down), r"up.weight has shape \(4, 12, 8\); allowed: .*7"),
        ((x.half(), index, weights, up, down), "up.weight has dtype torch.float32"),
        ((x, index, weights, up, down, "swish"), "name is 'swish'"),
        ((x, index, weights, up, down, "silu", "alone"), r"down.weight has shape .* allowed.*12"),
        (
            (x, index, weights, up._replace(scales=[]), down),
            "up.a, .b and .scales have 1, 1 and 0 entries",
        ),
        (
            (x, index, weights, up._replace(b=[torch.ones(4, 12, 3)]), down),
            r"up.a\[0\] has rank 2, .b\[0\] 3; allowed: one",
        ),
        ((x, index, weights, up._replace(b=[None]), down), "allowed: both, or neither"),
        (
            (x, index, weights, up, down._replace(weight=down.weight[:3])),
            r"down.a\[0\] has shape",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            decode(*call)
    two = linear_of(4, 12, 8, (2, 2), torch.float32, torch.float32, 1)
    with pytest.raises(ValueError, match="up and down have different numbers of adapters"):
        decode(x, index, weights, two, down)
    with pytest.raises(ValueError, match="choice is None with 2 adapters"):
        decode(x, index, weights, two, FewLinear(down.weight))
    with pytest.raises(ValueError, match="down.weight has 3 experts; allowed: 4"):
        decode(x, index, weights, up, FewLinear(down.weight[:3]))
    with pytest.raises(ValueError, match="ExpertsDecodeConfig.up_k is 8"):
        ExpertsDecodeConfig(up_k=8)


@pytest.mark.parametrize("shape, change", [(QWEN3, {}), (GPT_OSS_20B, dict(transposed=True))])
def test_one_token_moves_little_more_than_the_weights_of_its_experts(shape, change):
    """As counted; also of all that programs load, of which L2 serves what is read again."""
    plan = launches(shape.few(1), 16, "silu", TARGETS["sm_90"].arch, **change)
    assert len(plan) == 3
    found = [traffic(launch) for launch in plan]
    weights = 2 * shape.k * (shape.N * shape.D + shape.D * shape.I)
    assert weights < sum(t.bytes for t in found) < 1.1 * weights
    assert sum(t.requested for t in found) < 1.15 * weights


COMPILED = """
import re
from benchmarks.kernels.experts_decode import QWEN3, launches
from benchmarks.static.compiling import NoDevice, gpu_target
from benchmarks.static.run import TARGETS
from triton.runtime import driver

driver.set_active(NoDevice(gpu_target("sm_90")))
for launch in launches(QWEN3.few(1), 16, "silu", TARGETS["sm_90"].arch):
    compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
    events = re.findall(r"launch_dependents|griddepcontrol.wait|cp.async.c[ag]|st.global",
                        compiled.asm["ptx"])
    order = [e for i, e in enumerate(events) if i == 0 or e != events[i - 1]]
    print("FOUND", compiled.metadata.launch_pdl, *order)
"""


@pytest.mark.long
def test_later_launches_start_early_and_wait_before_they_read_what_is_young():
    """H streams W (cp.async) before it waits for S; Y waits before it reads H."""
    done = python("-c", COMPILED, cache=None)
    assert done.returncode == 0, done.stderr
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("FOUND")]
    wait = "griddepcontrol.wait"
    (first, *shrink), (second, *up), (third, *down) = found
    assert (first, second, third) == ("False", "True", "True")
    assert shrink[0] == up[0] == "launch_dependents" and wait not in shrink
    assert up[1].startswith("cp.async") and up.count(wait) == 1
    assert up.index("st.global") > up.index(wait) > 1
    assert down[0] == wait and down.count(wait) == 1 and "launch_dependents" not in down
